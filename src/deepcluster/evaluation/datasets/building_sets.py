"""Buildings data sets on disk: images with their ground truth, and the other set, on which whitening is learned."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.evaluation.datasets import buildings
from deepcluster.evaluation.datasets.labelled import contents_of, some

IMAGE_FOLDERS = ("jpg", "images")
OTHER = {"oxford": "paris", "paris": "oxford"}


@dataclass(frozen=True)
class Buildings:
    """A data set: images, and one or several ground truths of them."""

    folder: Path
    source: ImageSource
    truths: tuple[buildings.GroundTruth, ...]

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
            if stem not in buildings.DAMAGED_IN_PARIS:
                found[stem] = index
        return found

    def database(self, truth: buildings.GroundTruth) -> list[str]:
        """Return the images that are ranked."""
        return [name for name in truth.images or self.index_of if name in self.index_of]


def open_sets(data: Path) -> list[Buildings]:
    """Return the data set in a folder, or those in its folders.

    Raises:
        InputError: there is none, it does not parse, or images are missing.
    """
    below = sorted(path for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
    folders = [data] if buildings.is_buildings(data) else [path for path in below if buildings.is_buildings(path)]
    if not folders:
        places = ", ".join(buildings.LIST_FOLDERS)
        raise InputError(
            f"{data} holds no buildings data set: looked for *{buildings.QUERY_ENDING} (in it, or in its {places}), "
            f"gnd_*.pkl and gnd_*.json, here and one folder down; {contents_of(data)}"
        )
    truths = {path: buildings.find_ground_truths(path) for path in folders}
    names = [truth.name for of_one in truths.values() for truth in of_one]
    for path, of_one in truths.items():
        truths[path] = [replace(t, name=f"{path.name} {t.name}") if names.count(t.name) > 1 else t for t in of_one]
    sets = [Buildings(path, open_source(image_folder(path)), tuple(truths[path])) for path in folders]
    for one, truth in [(opened, truth) for opened in sets for truth in opened.truths]:
        listed = truth.listed() - buildings.DAMAGED_IN_PARIS
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
    others += [path for path in named_so if buildings.is_buildings(path) or image_folder(path) != path]
    if not others:
        raise InputError(
            f"{one.folder}: PCA-whitening is learned on images of another data set"
            f"{f' ({wanted.capitalize()}, for this one)' if wanted else ''}, and none is beside it; "
            "name a folder of images with --whiten-on"
        )
    return image_folder(others[0])


def overlap(first: Path, second: Path) -> bool:
    """Return whether two folders share images."""
    one, other = first.resolve(), second.resolve()
    return one == other or one in other.parents or other in one.parents
