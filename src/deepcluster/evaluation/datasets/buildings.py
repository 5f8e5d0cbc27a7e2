"""The buildings data sets (Oxford5k, Paris6k, and both revisited): images with their ground truth.

Three formats: text files as the Oxford group publishes them (Philbin et al., CVPR 2007 and 2008), lists in JSON, and the
`gnd_*.pkl` of Revisited Oxford and Paris (Radenovic et al., CVPR 2018). Images are named without folder and ending.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.pickles import read_plain_pickle
from deepcluster.core.text import count_of
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.evaluation.datasets.labelled import contents_of, some

LISTS = ("good", "ok", "junk")
LIST_FOLDERS = ("lab", "gt", "gt_files", "groundtruth")
QUERY_ENDING = "_query.txt"
OXFORD_PREFIX = "oxc1_"
WHOLE = ""
# Revisited Oxford and Paris: right answers, and images that are skipped; all others are wrong.
REVISITED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
# Images of Paris6k that are damaged as published; reported numbers leave them out.
_DAMAGED: Mapping[str, tuple[int, ...]] = {
    "louvre": (136, 146),
    "moulinrouge": (422,),
    "museedorsay": (1059,),
    "notredame": (188,),
    "pantheon": (284, 960, 974),
    "pompidou": (195, 196, 201, 467, 640),
    "sacrecoeur": (299, 330, 353),
    "triomphe": (662, 833, 863, 867),
}
DAMAGED_IN_PARIS = frozenset(f"paris_{place}_{number:06}" for place, numbers in _DAMAGED.items() for number in numbers)

IMAGE_FOLDERS = ("jpg", "images")
OTHER = {"oxford": "paris", "paris": "oxford"}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Judged:
    """The right answers to a query, and the images that are skipped as if they were not in the data set."""

    positives: frozenset[str]
    junk: frozenset[str]


@dataclass(frozen=True)
class Query:
    """A region of an image, and its answers.

    Attributes:
        box: left, top, right and bottom in pixels of the image as it is stored.
        judged: by case: easy, medium and hard for the revisited sets, otherwise the single case `WHOLE`.
    """

    name: str
    image: str
    box: Box
    judged: Mapping[str, Judged]


@dataclass(frozen=True)
class GroundTruth:
    """Queries of a data set such as oxford5k; `images` is the database in its order, None: all images of the folder."""

    name: str
    images: tuple[str, ...] | None
    queries: tuple[Query, ...]

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases in which each query is judged."""
        return tuple(self.queries[0].judged)

    def listed(self) -> set[str]:
        """Return all images that the ground truth names."""
        of_answers = (name for query in self.queries for one in query.judged.values() for name in one.positives | one.junk)
        return {*(self.images or ()), *(query.image for query in self.queries), *of_answers}


def is_buildings(folder: Path) -> bool:
    """Return whether a folder holds ground truth; no file is opened."""
    return any(_truth_files(folder))


def _truth_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the place of the text files (the folder, or one in it of a usual name) or no place, and `gnd_*` files."""
    places = (folder, *(folder / name for name in LIST_FOLDERS), *sorted(folder.glob("gt_files_*")))
    lists = [place for place in places if place.is_dir() and any(place.glob("*" + QUERY_ENDING))]
    return lists[:1], sorted([*folder.glob("gnd_*.pkl"), *folder.glob("gnd_*.json")])


def find_ground_truths(folder: Path) -> list[GroundTruth]:
    """Return the ground truths in a folder: its text files, and its `gnd_*.pkl` and `gnd_*.json`; none: an empty list.

    Raises:
        InputError: one does not parse (file and line, or place, are named).
    """
    lists, files = _truth_files(folder)
    found = [read_lists(place) for place in lists]
    for path in files:
        truth = read_gnd(path)
        if truth.name not in {one.name for one in found}:
            found.append(truth)
    return found


def _query(name: str, image: str, box: Box, named: Mapping[str, Iterable[str]]) -> Query:
    """Return a query of the images named `good` or `ok` (right) and `junk`, or `easy`, `hard` and `junk`."""
    cases = REVISITED if "easy" in named else {WHOLE: (("good", "ok"), ("junk",))}
    judged = {
        case: Judged(*(frozenset(one for kind in kinds for one in named.get(kind, ())) for kinds in of_case))
        for case, of_case in cases.items()
    }
    return Query(name, image, box, judged)


def read_lists(folder: Path) -> GroundTruth:
    """Read Oxford's format: for each query `NAME_query.txt` (image and box), `NAME_good.txt`, `_ok.txt` and `_junk.txt`.

    Raises:
        InputError: a list is missing, or a line does not parse.
    """
    queries, prefixed = [], False
    for path in sorted(folder.glob("*" + QUERY_ENDING)):
        name = path.name.removesuffix(QUERY_ENDING)
        image, box = _query_line(path)
        prefixed |= image.startswith(OXFORD_PREFIX)
        named: dict[str, list[str]] = {}
        for kind in LISTS:
            lines = _lines(listed := folder / f"{name}_{kind}.txt")
            for number, words in lines:
                if len(words) != 1:
                    found = " ".join(words)[:60]
                    raise InputError(f"{listed}, line {number}: one image name per line is expected, not {found!r}")
            named[kind] = [_bare(words[0]) for _, words in lines]
        queries.append(_query(name, _bare(image.removeprefix(OXFORD_PREFIX)), box, named))
    of_paris = all(query.image.startswith("paris_") for query in queries)
    usual = "paris6k" if of_paris else "oxford5k" if prefixed else folder.name
    return GroundTruth(usual, None, tuple(queries))


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return the words of each line that is not empty, and its number."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        files = "_query.txt, _good.txt, _ok.txt, _junk.txt"
        raise InputError(f"{path} is not there; each query has four files: {files}") from None
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"{path} can't be read as text: {fault}") from None
    return [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _query_line(path: Path) -> tuple[str, Box]:
    lines = _lines(path)
    number, words = lines[0] if lines else (1, [])
    try:
        image, *sides = words
        left, top, right, bottom = map(float, sides)
        valid = left < right and top < bottom
    except ValueError:
        valid = False
    if not valid or len(lines) != 1:
        raise InputError(
            f"{path}, line {number}: one line `IMAGE LEFT TOP RIGHT BOTTOM` in pixels is expected, not "
            f"{' '.join(words)[:60]!r}{'' if len(lines) < 2 else f' and {len(lines) - 1} more'}"
        )
    return image, (left, top, right, bottom)


def _bare(name: str) -> str:
    """Return a name without folder and image ending."""
    last = name.rpartition("/")[2]
    stem, dot, ending = last.rpartition(".")
    return stem if dot and ending.lower() in ("jpg", "jpeg", "png") else last


def read_gnd(path: Path) -> GroundTruth:
    """Read `gnd_NAME.pkl` or `.json`: imlist, qimlist, and gnd with `bbx` and indices (`ok` or `easy` and `hard`, `junk`).

    Raises:
        InputError: it is not of this form (the place is named), or a pickle asks for more than plain values.
    """
    try:
        content = read_plain_pickle(path) if path.suffix == ".pkl" else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise InputError(f"{path} can't be read as JSON: {fault}") from None
    wanted = ("imlist", "qimlist", "gnd")
    lists = [_listed(content.get(name)) for name in wanted] if isinstance(content, dict) else [None]
    if None in lists:
        there = ", ".join(map(str, content)) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(f"{path}: the lists imlist, qimlist and gnd are expected; there is {there[:80]}")
    images, asked, entries = (one or [] for one in lists)
    if not all(isinstance(name, str) for name in [*images, *asked]):
        raise InputError(f"{path}: imlist and qimlist should hold names of images")
    if len(asked) != len(entries) or not asked:
        counts = f"{len(asked)} names in qimlist and {len(entries)} entries in gnd"
        raise InputError(f"{path}: {counts}; there should be as many")
    images = [_bare(name) for name in images]
    pairs = enumerate(zip(entries, asked, strict=True))
    queries = tuple(_entry(f"{path}: gnd[{n}]", entry, _bare(name), images) for n, (entry, name) in pairs)
    if len({tuple(query.judged) for query in queries}) != 1:
        raise InputError(f"{path}: some entries of gnd have 'easy' and 'hard', others 'ok'; they should be of one kind")
    return GroundTruth(path.stem.removeprefix("gnd_"), tuple(images), queries)


def _listed(value: Any) -> list[Any] | None:
    """Return a list, tuple or array as a list of plain values; None for anything else."""
    whole = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(whole, list | tuple):
        return [whole] if whole is not value else None
    return [one.item() if hasattr(one, "item") else one for one in whole]


def _entry(place: str, entry: Any, image: str, images: Sequence[str]) -> Query:
    if not isinstance(entry, dict):
        raise InputError(f"{place} should be a dict with bbx and lists of indices")
    box = _listed(entry.get("bbx")) or []
    if len(box) != 4 or not all(isinstance(side, int | float) for side in box) or box[0] >= box[2] or box[1] >= box[3]:
        raise InputError(f"{place}: bbx should be left, top, right and bottom in pixels, not {entry.get('bbx')}")
    named, known = {}, count_of(len(images), "name")
    for kind in ("easy", "hard", "junk") if "easy" in entry else ("ok", "junk"):
        indices = _listed(entry.get(kind))
        if indices is None:
            raise InputError(f"{place}: {kind!r} should be a list of indices into imlist")
        for index in indices:
            if not isinstance(index, int) or not 0 <= index < len(images):
                raise InputError(f"{place}: {kind!r} holds {index!r}; indices into the {known} of imlist are expected")
        named[kind] = [images[index] for index in indices]
    return _query(image, image, (box[0], box[1], box[2], box[3]), named)


@dataclass(frozen=True)
class Buildings:
    """A data set: images, and one or several ground truths of them."""

    folder: Path
    source: ImageSource
    truths: tuple[GroundTruth, ...]

    @property
    def name(self) -> str:
        """The name of the first ground truth."""
        return self.truths[0].name

    @property
    def city(self) -> str | None:
        """Oxford or paris, if the names say so."""
        named = " ".join([*(truth.name for truth in self.truths), self.folder.resolve().name]).lower()
        return next((city for city in OTHER if city in named), None)

    @cached_property
    def index_of(self) -> dict[str, int]:
        """The index of each image by its name without folder and ending; images known to be damaged are left out."""
        found: dict[str, int] = {}
        for index in range(len(self.source)):
            stem = Path(self.source.name(index)).stem
            if stem in found:
                first = self.source.name(found[stem])
                raise InputError(f"{self.folder}: two images are called {stem}: {first} and {self.source.name(index)}")
            if stem not in DAMAGED_IN_PARIS:
                found[stem] = index
        return found

    def database(self, truth: GroundTruth) -> list[str]:
        """Return the images that are ranked."""
        return [name for name in truth.images or self.index_of if name in self.index_of]


def open_sets(data: Path) -> list[Buildings]:
    """Return the data set in a folder, or those in its folders.

    Raises:
        InputError: there is none, it does not parse, or images are missing.
    """
    below = sorted(path for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    folders = [data] if is_buildings(data) else [path for path in below if is_buildings(path)]
    if not folders:
        places = ", ".join(LIST_FOLDERS)
        raise InputError(
            f"{data} holds no buildings data set: looked for *{QUERY_ENDING} (in it, or in its {places}), "
            f"gnd_*.pkl and gnd_*.json, here and one folder down; {contents_of(data)}"
        )
    truths = {path: find_ground_truths(path) for path in folders}
    names = [truth.name for of_one in truths.values() for truth in of_one]
    for path, of_one in truths.items():
        truths[path] = [replace(t, name=f"{path.name} {t.name}") if names.count(t.name) > 1 else t for t in of_one]
    sets = [Buildings(path, open_source(image_folder(path)), tuple(truths[path])) for path in folders]
    for one, truth in [(opened, truth) for opened in sets for truth in opened.truths]:
        listed = truth.listed() - DAMAGED_IN_PARIS
        if missing := sorted(listed - one.index_of.keys()):
            raise InputError(
                f"{one.folder}: {len(missing):,} of the {count_of(len(listed), 'image')} that the ground truth "
                f"{truth.name} names are not in {image_folder(one.folder)}: {some(missing, 5)}"
            )
    return sets


def image_folder(folder: Path) -> Path:
    """Return the folder of the images of a data set."""
    return next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), folder)


def whitening_folder(one: Buildings, sets: Sequence[Buildings], whiten_on: str | None) -> Path:
    """Return the folder on which the whitening for a data set is learned: as requested, or that of the other city.

    Raises:
        InputError: there are none.
    """
    if whiten_on is not None:
        named = Path(whiten_on).expanduser()
        if not named.is_dir():
            raise InputError(f"--whiten-on {whiten_on}: {contents_of(named)}; name a folder of images")
        return image_folder(named)
    wanted = OTHER.get(one.city or "", "")
    beside = sorted(path for path in one.folder.resolve().parent.iterdir() if path.is_dir()) if wanted else []
    others = [other.folder for other in sets if wanted and other.city == wanted]
    named_so = [path for path in beside if wanted in path.name.lower()]
    others += [path for path in named_so if is_buildings(path) or image_folder(path) != path]
    if not others:
        raise InputError(
            f"{one.folder}: PCA-whitening is learned on images of another data set"
            f"{f' ({wanted.capitalize()}, for this one)' if wanted else ''}, and none is beside it; "
            "name a folder of images with --whiten-on"
        )
    return image_folder(others[0])
