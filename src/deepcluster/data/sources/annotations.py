"""Files that give classes to images: Tiny-ImageNet's and ImageNet's of their validation images, and tables of users.

Labels serve diagnostics and evaluation only, so what is wrong with such a file is a remark, not an error.
"""

import csv
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

from deepcluster.core.errors import InputError
from deepcluster.core.files import read_regular
from deepcluster.core.kinds import BEGIN_BYTES, stand_in
from deepcluster.core.text import are, count_of, printable
from deepcluster.data.sources.files import IMAGE_ENDINGS
from deepcluster.data.sources.lists import parse_pairs
from deepcluster.data.sources.text_tables import decode, of_windows

WNID = re.compile(r"n\d{8}")
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
# Tables of names of classes: a number of WordNet, and its words.
WORDS = ("words.txt", "LOC_synset_mapping.txt", "synset_words.txt")
_ENDING = re.compile(rf"\.(?:{'|'.join(sorted(IMAGE_ENDINGS))})$")
_MOST_BYTES = 256 << 20
# Image and class, or a line that can't be read.
_Rows = Iterator[tuple[str, str] | str]


class _Unusable(ValueError):
    """A file that gives no classes; the message says why."""


@dataclass(frozen=True)
class Annotations:
    """Classes by image.

    Attributes:
        file: name of the file, for messages.
        classes: class by name of the image, in small letters.
        problems: what is wrong with the file.
        is_table: whether it is the table of a user, which may leave out images on purpose.
    """

    file: str
    classes: dict[str, str]
    problems: tuple[str, ...] = ()
    is_table: bool = False

    def match(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the class of each image ("" = unknown), and remarks on images that only the file or the folder has.

        Capital letters and the endings of images make no difference; nor do folders, if all images are in one.
        """
        known: dict[str, str] = {}
        for image in self.classes:
            known.setdefault(_ENDING.sub("", image), image)
        is_flat = len({name.rpartition("/")[0] for name in names}) == 1
        labels, used, unknown = list[str](), set[str](), list[str]()
        for name in names:
            bare = _ENDING.sub("", folded(name))
            ways = (bare, bare.rpartition("/")[2]) if is_flat else (bare,)
            entry = next((known[way] for way in ways if way in known), None)
            labels.append("" if entry is None else self.classes[entry])
            if entry is None:
                unknown.append(name)
            else:
                used.add(entry)
        if not used:
            return labels, [f"{self.file} names none of the images"] * bool(self.classes)
        absent, notes = [image for image in self.classes if image not in used], []
        if unknown:
            verb = "has" if len(unknown) == 1 else "have"
            of = f"{len(unknown):,} of {count_of(len(names), 'image')}"
            notes.append(f"{of} {verb} no class in {self.file}, such as {printable(unknown[0])}")
        if absent:
            notes.append(f"{are(len(absent), 'image')} in {self.file} but not in the folder, such as {printable(absent[0])}")
        return labels, notes


def folded(name: str) -> str:
    """Return a name so that those are equal which look equal, or differ in capital letters only."""
    return name.casefold() if name.isascii() else normalize("NFC", name).casefold()


def val_annotations(path: Path) -> Annotations:
    """Read Tiny-ImageNet's `val_annotations.txt`: image, class, and the corners of a box, with tabs between them."""

    def rows() -> _Rows:
        for line in _lines(path):
            fields = line.split("\t") if "\t" in line else line.split()
            yield (fields[0].strip(), fields[1].strip()) if len(fields) > 1 else line

    return _read(path.name, rows)


def kaggle_solution(path: Path) -> Annotations:
    """Read Kaggle's `LOC_val_solution.csv`: an image, and a class before each box in it, the first of which counts."""

    def rows() -> _Rows:
        for number, cells in enumerate(csv.reader(io.StringIO("\n".join(_lines(path))))):
            if number or cells[0].strip().lower() != "imageid":
                classes = cells[1].split() if len(cells) > 1 else []
                is_class = classes and WNID.fullmatch(classes[0])
                yield (cells[0].strip(), classes[0]) if is_class else ",".join(cells)

    return _read(path.name, rows)


def devkit(path: Path) -> Annotations:
    """Read ImageNet's development kit: a folder with the ground truth and `meta.mat`, or `ILSVRC2012_devkit_t12.tar.gz`.

    Line i of the ground truth is the class of image i, a number that `meta.mat` translates.
    """
    name = GROUND_TRUTH if path.is_dir() else path.name

    def rows() -> _Rows:
        content = _of_folder(path) if path.is_dir() else _of_tar(path)
        wnids = _wnids(content[META])
        for number, line in enumerate(_lines_of(content[GROUND_TRUTH], GROUND_TRUTH), 1):
            wnid = wnids.get(int(line)) if line.isdecimal() else None
            yield line or "a blank line" if wnid is None else (f"ILSVRC2012_val_{number:08}", wnid)

    return _read(name, rows)


def user_table(path: Path) -> Annotations:
    """Read a table or list of images with labels; paths may be relative to it, to the folder of its name, or absolute."""
    folder = f"/{folded(path.stem)}/"

    def rows() -> _Rows:
        pairs, notes = parse_pairs("\n".join(_lines(path)), path.name)
        if not any(label for _, label in pairs):
            raise _Unusable(f"{path.name} has no labels" + "".join(f" ({note})" for note in notes))
        for image, label in pairs:
            if label:
                below = "/" + folded(of_windows(image).replace("\\", "/")).removeprefix("./")
                yield below.rpartition(folder)[2].removeprefix("/"), label

    return _read(path.name, rows, is_table=True)


def read_words(path: Path, wnids: Collection[str]) -> dict[str, str]:
    """Return the first word of some classes, such as `goldfish`, by number in WordNet; {} if the file can't be read."""
    with suppress(_Unusable, InputError):
        words = {line[:9]: line[9:].split(",")[0].strip(" \t\"'") for line in _lines(path) if line[:9] in wnids}
        return {wnid: word for wnid, word in words.items() if word}
    return {}


def _read(file: str, rows: Callable[[], _Rows], *, is_table: bool = False) -> Annotations:
    """Return the classes of the rows of a file."""
    classes: dict[str, str] = {}
    unclear: dict[str, tuple[str, str]] = {}
    bad = []
    try:
        for row in rows():
            if isinstance(row, str) or not all(row):
                bad.append(row if isinstance(row, str) else " ".join(row))
                continue
            image, label = folded(row[0]), of_windows(row[1])
            if classes.setdefault(image, label) != label:
                unclear[image] = classes[image], label
    except (_Unusable, InputError, csv.Error) as fault:
        return Annotations(file, {}, (str(fault),), is_table)
    problems = []
    if bad:
        problems.append(f"{count_of(len(bad), 'line')} of {file} can't be read, such as {printable(bad[0][:60])}")
    if unclear:
        image, both = next(iter(unclear.items()))
        problems.append(f"{file} gives {count_of(len(unclear), 'image')} two classes, such as {image}: {' and '.join(both)}")
    known = {image: label for image, label in classes.items() if image not in unclear}
    if not known:
        problems.append(f"{file} gives no image a class")
    return Annotations(file, known, tuple(problems), is_table)


def _lines(path: Path) -> list[str]:
    """Return the lines of a file that are not blank."""
    try:
        content = read_regular(path)
    except OSError as error:
        raise _Unusable(f"{path.name} can't be read: {(error.strerror or str(error)).lower()}") from error
    return [line for line in _lines_of(content, path.name) if line]


def _lines_of(content: bytes, file: str) -> list[str]:
    """Return the lines of a text, without blank ones at its end."""
    if found := stand_in(content[:BEGIN_BYTES]):
        raise _Unusable(f"{file} is no table: it is {found}")
    text = decode(content, file).lstrip("\ufeff").rstrip()
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text)]


def _of_folder(folder: Path) -> dict[str, bytes]:
    try:
        return {name: read_regular(folder / name) for name in (GROUND_TRUTH, META)}
    except OSError as error:
        name = Path(error.filename or folder).name
        raise _Unusable(f"{name} of ImageNet's devkit can't be read: {(error.strerror or str(error)).lower()}") from error


def _of_tar(path: Path) -> dict[str, bytes]:
    """Return the two files of the development kit in its archive; nothing is unpacked on disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in (GROUND_TRUTH, META) and member.isfile() and member.size < _MOST_BYTES:
                    file = tar.extractfile(member)
                    found[name] = file.read() if file else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _Unusable(f"{path.name} can't be read ({str(error) or 'it is damaged'})") from error
    if lacks := {GROUND_TRUTH, META} - found.keys():
        raise _Unusable(f"{path.name} lacks {' and '.join(sorted(lacks))}")
    return found


def _wnids(content: bytes) -> dict[int, str]:
    """Return the number in WordNet of each class of `meta.mat`."""
    import numpy as np
    from scipy.io import loadmat  # Rarely needed.

    try:
        synsets: Any = np.atleast_1d(loadmat(io.BytesIO(content), squeeze_me=True)["synsets"])
        return {int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except Exception as error:  # Damaged files raise a dozen types, from scipy, zlib, struct and NumPy.
        reason = (str(error) or type(error).__name__).partition("\n")[0][:100]
        raise _Unusable(f"{META} of ImageNet's devkit can't be read ({reason})") from error


def disagreement(first: Iterable[str], second: Iterable[str]) -> list[int]:
    """Return where two labels are known and differ; nothing if they name no class alike, as numbers and names do."""
    first, second = list(first), list(second)
    if not (set(first) & set(second)) - {""}:
        return []
    return [at for at, (one, other) in enumerate(zip(first, second, strict=True)) if one and other and one != other]
