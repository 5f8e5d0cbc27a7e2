"""The PASCAL VOC devkit: its lists of images, and which of the 20 classes each image shows (Everingham et al., IJCV 2010).

N images, C = 20 classes.
"""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.names import PackedNames
from deepcluster.core.text import count_of
from deepcluster.data.sources import ImageSource
from deepcluster.data.sources.files import FileSource
from deepcluster.evaluation.datasets.labelled import contents_of, left_out, some

NAMES = """
aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa train
tvmonitor"""
CLASSES = tuple(NAMES.split())
PRESENT, DIFFICULT, ABSENT = 1, 0, -1
SPLITS = ("train", "val", "trainval", "test")
LISTS = Path("ImageSets") / "Main"
PARTS = (Path("Annotations"), Path("JPEGImages"), LISTS)
# VOC's annotations have a few kilobytes; a file a thousand times larger is something else.
LARGEST_ANNOTATION = 4 << 20


@dataclass(frozen=True)
class VocSplit:
    """The images of one list, and the classes that they show; `names` are without ending, in the order of the list.

    Attributes:
        labels_NC: int8; 1 = the image has an object of the class that is not difficult, 0 = only difficult ones, which no
            score counts, -1 = none.
        notes: what a reader of the numbers must know.
    """

    source: ImageSource
    labels_NC: Tensor
    names: list[str]
    notes: tuple[str, ...] = ()

    def left_out(self, unreadable: Mapping[int, str]) -> list[str]:
        """Return a note on unreadable images, which are given by index; no note if there are none."""
        return left_out(self.source.describe(), unreadable, self.names.__getitem__)


@dataclass(frozen=True)
class Devkit:
    """A folder with `Annotations`, `JPEGImages` and `ImageSets/Main`."""

    root: Path
    name: str = field(default="", compare=False)

    def lists(self) -> list[str]:
        """Return which of train, val, trainval and test there are."""
        return [split for split in SPLITS if self._list_file(split).is_file()]

    def has_answers(self, split: str) -> bool:
        """Return whether the list is there, and an annotation of its first image; VOC 2012 has none of its test images."""
        if split not in self.lists():
            return False
        names, _ = read_list(self._list_file(split))
        return self.annotation(names[0]).is_file()

    def split(self, name: str) -> VocSplit:
        """Return the images of the list `name` (train, val, trainval or test) and their labels.

        Raises:
            InputError: no such list, it is empty, an image or an annotation that it names is missing, or an annotation
                does not parse.
        """
        source, names, notes = self.images(name)
        unknown: Counter[str] = Counter()
        rows = [_labels_of(self.annotation(image), unknown) for image in names]
        return VocSplit(source, torch.tensor(rows, dtype=torch.int8), names, (*notes, *note_on(unknown, name)))

    def images(self, name: str) -> tuple[FileSource, list[str], list[str]]:
        """Return the images of the list `name`, their names without ending, and notes on the list.

        Raises:
            InputError: no such list, it is empty, or an image or an annotation that it names is missing.
        """
        if name not in SPLITS:
            raise InputError(f"unknown split {name!r}{did_you_mean(name, SPLITS)}: use one of {', '.join(SPLITS)}")
        file = self._list_file(name)
        if not file.is_file():
            known = " and ".join(f"{one}.txt" for one in self.lists()) or f"none of {', '.join(f'{s}.txt' for s in SPLITS)}"
            raise InputError(f"{file} does not exist; {self.root / LISTS} has {known}")
        names, notes = read_list(file)
        check_there(names, self.root / "JPEGImages", ".jpg", file)
        check_there(names, self.root / "Annotations", ".xml", file)
        paths = PackedNames(f"{image}.jpg" for image in names)
        return FileSource(self.root / "JPEGImages", paths, None, f"of {self.title(name)}"), names, notes

    def annotation(self, image: str) -> Path:
        """Return the file with the objects of an image, which is named without ending."""
        return self.root / "Annotations" / f"{image}.xml"

    def title(self, split: str) -> str:
        """Return how messages name a list: `VOC2012 val`."""
        return f"{self.name or self.root.name} {split}"

    def _list_file(self, split: str) -> Path:
        return self.root / LISTS / f"{split}.txt"


def open_voc(data: Path) -> Devkit:
    """Return the devkit in `data`: the folder itself, a `VOC20xx` in it, or one in its `VOCdevkit`; VOC2007 if several.

    Raises:
        InputError: there is none.
    """
    # The protocols are named after VOC2007, the one whose test annotations are public.
    candidates = [data, *sorted(_by_year(data), key=lambda path: path.name != "VOC2007")]
    for path in candidates:
        if not _missing(path):
            return Devkit(path, path.resolve().name)
    wanted = ", ".join(map(str, PARTS))
    for path in candidates:
        missing = _missing(path)
        if len(missing) < len(PARTS):
            raise InputError(f"{path} is not a whole VOC devkit: {' and '.join(missing)} not there, of {wanted}")
    raise InputError(
        f"{data} is no VOC devkit: looked for folders {wanted} in it, in VOC2007 or VOC20xx, and in VOCdevkit/VOC20xx; "
        f"{contents_of(data)}"
    )


def open_vocs(data: Path) -> list[Devkit]:
    """Return all devkits in `data` or in its `VOCdevkit`, by year; the folder itself if it is one.

    Of 2008 to 2012 only the last is returned: since 2009, each year has the images of those before it, from 2008 on.

    Raises:
        InputError: there is none, or one of them is not whole.
    """
    first = open_voc(data)
    years = sorted(_by_year(data), key=lambda path: path.name)
    if first.root == data or not years:
        return [first]
    cumulative = [path.name for path in years if "VOC2008" <= path.name <= "VOC2012"]
    years = [path for path in years if path.name not in cumulative[:-1]]
    for path in years:
        if missing := _missing(path):
            raise InputError(
                f"{path} is not a whole VOC devkit, which {first.name} beside it is: {' and '.join(missing)} not there; "
                f"unpack it again, or give {first.root} alone"
            )
    return [Devkit(path, path.resolve().name) for path in years]


def _by_year(data: Path) -> list[Path]:
    return [path for folder in (data, data / "VOCdevkit") for path in sorted(folder.glob("VOC20[0-9][0-9]"))]


def _missing(folder: Path) -> list[str]:
    """Return which parts of a devkit a folder lacks."""
    return [str(part) for part in PARTS if not (folder / part).is_dir()]


def is_voc(data: Path) -> bool:
    """Return whether `open_voc` finds a devkit."""
    try:
        open_voc(data)
    except InputError:
        return False
    return True


def splits_for(devkit: Devkit, split: str) -> tuple[VocSplit, VocSplit]:
    """Return the splits to train and to test on: train and val, or trainval and test.

    Raises:
        InputError: a list is missing, or what `Devkit.split` raises.
    """
    train, held_out = lists_for(devkit, split)
    return devkit.split(train), devkit.split(held_out)


def lists_for(devkit: Devkit, split: str) -> tuple[str, str]:
    """Return the lists to train and to test on: train and val, or trainval and test.

    Raises:
        InputError: one of them is missing.
    """
    train, held_out = {"train": ("train", "val"), "trainval": ("trainval", "test")}[split]
    lists = devkit.lists()
    missing = [name for name in (train, held_out) if name not in lists]
    if missing:
        other = ("train", "val") if split == "trainval" else ("trainval", "test")
        hint = f"; use --split {other[0]}" if set(other) <= set(lists) else ""
        raise InputError(
            f"{devkit.root / LISTS} has no {' and no '.join(f'{name}.txt' for name in missing)}; there are "
            f"{', '.join(f'{name}.txt' for name in lists) or 'none of the lists train, val, trainval and test'}{hint}"
        )
    return train, held_out


def without_positives(labels_NC: Tensor, classes: Sequence[str] = CLASSES) -> list[str]:
    """Return the classes of which no image has an object that counts: they have no average precision."""
    return [name for name, labels_N in zip(classes, labels_NC.T, strict=True) if not (labels_N == PRESENT).any()]


def read_list(file: Path) -> tuple[list[str], list[str]]:
    """Return the images of a list, and notes. Lists of a class have a second column, which repeats the annotations."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read as UTF-8 text: {error}") from error
    listed = [line.split()[0] for line in lines if line.strip()]
    if not listed:
        raise InputError(f"{file} names no images; a VOC list has the name of one image per line, without .jpg")
    names = list(dict.fromkeys(listed))
    repeated = len(listed) - len(names)
    return names, [f"{count_of(repeated, 'repeated line')} of {file.name} skipped"] if repeated else []


def check_there(names: list[str], folder: Path, ending: str, listed_in: Path) -> None:
    there = {path.name for path in folder.iterdir()}
    missing = [name for name in names if name + ending not in there]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing):,} of the {count_of(len(names), 'image')} that {listed_in} lists: "
            f"{some(name + ending for name in missing)}; unpack the devkit again"
        )


def _labels_of(file: Path, unknown: Counter[str]) -> list[int]:
    """Return one label per class, of the objects of an annotation; count those of `unknown` classes."""
    best = dict.fromkeys(CLASSES, ABSENT)
    for _, name, difficult in objects_in(annotation(file), file, unknown):
        best[name] = max(best[name], DIFFICULT if difficult else PRESENT)
    return list(best.values())


def objects_in(
    root: ElementTree.Element, file: Path, unknown: Counter[str]
) -> Iterator[tuple[ElementTree.Element, str, bool]]:
    """Yield each object of VOC's classes, its class, and whether it is difficult; count the others by class."""
    for element in root.iter("object"):
        name = (element.findtext("name") or "").strip()
        if name not in CLASSES:
            unknown[name or "without a name"] += 1
            continue
        # VOC omits the tag where nothing was judged difficult.
        difficult = (element.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            raise InputError(f"{file}: <difficult> of a {name} is {difficult!r}; it must be 0 or 1")
        yield element, name, difficult == "1"


def note_on(unknown: Counter[str], split: str) -> list[str]:
    """Return a note on the objects of unknown classes; no note if there are none."""
    found = ", ".join(f"{one} ({count:,})" for one, count in sorted(unknown.items())[:5])
    return [f"objects of other classes than VOC's 20 are left out of {split}: {found}"] if unknown else []


def annotation(file: Path) -> ElementTree.Element:
    """Return the root of an annotation. Document types are refused: VOC has none, and entities can blow up a small file."""
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST_ANNOTATION + 1)
    except OSError as error:
        raise InputError(f"{file} can't be read: {(error.strerror or str(error)).lower()}") from error
    if len(content) > LARGEST_ANNOTATION:
        raise InputError(f"{file} is larger than {LARGEST_ANNOTATION >> 20} MiB: it is no VOC annotation")
    doctype = content.find(b"<!DOCTYPE")
    if doctype >= 0:
        line = content.count(b"\n", 0, doctype) + 1
        raise InputError(f"{file}, line {line}: a VOC annotation has no document type (<!DOCTYPE …>); it is not read")
    try:
        # Without a document type there are no entities; a <!DOCTYPE in UTF-16 meets expat's own limits.
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        line = error.position[0] if isinstance(error, ElementTree.ParseError) else 1
        raise InputError(f"{file}, line {line} does not parse as XML: {error}") from error
    if root.tag != "annotation":
        raise InputError(f"{file}, line 1: expected <annotation>, found <{root.tag}>: it is no VOC annotation")
    return root
