"""Masks of the PASCAL VOC devkit, those that SBD adds, and SBD as it was published.

A devkit has `SegmentationClass/*.png`, JPEGImages, and lists in ImageSets/Segmentation (Everingham et al., IJCV 2010).
`SegmentationClassAug` has the masks of SBD (Hariharan et al., ICCV 2011) as PNG files; with its list aug.txt the 1,464
images of VOC 2012's train.txt become 10,582.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.names import PackedNames
from deepcluster.core.text import count_of
from deepcluster.data.sources.files import FileSource
from deepcluster.data.sources.joined import JoinedSource
from deepcluster.evaluation.datasets.dense import BACKGROUND, IGNORED, MaskSet
from deepcluster.evaluation.datasets.mask_files import (
    Mask,
    MaskFiles,
    check_classes,
    check_files,
    decoded_colours,
    packed,
    read_png,
)
from deepcluster.evaluation.datasets.voc import CLASSES, read_list

CLASS_NAMES = (BACKGROUND, *CLASSES)
LISTS = Path("ImageSets") / "Segmentation"
MASKS, AUG = "SegmentationClass", "SegmentationClassAug"
AUG_LISTS = ("aug", "trainaug", "train_aug")
IMAGES = "JPEGImages"
# The list to train on, where the other one is tested on; `train` with any other list.
TRAIN_OF = {"val": "train", "test": "trainval"}
SEG11VALID = "seg11valid"
VOID_AS_GREY = 220
SBD_INSIDE = ("", "dataset", "benchmark_RELEASE/dataset", "sbd", "SBD", "sbd/dataset", "sbd/benchmark_RELEASE/dataset")


def find_devkits(data: Path) -> Iterator[Path]:
    """Yield the folders with SegmentationClass in `data`, a VOC20xx in it or in its VOCdevkit; VOC2012 first."""
    inside = [path for folder in (data, data / "VOCdevkit") for path in sorted(folder.glob("VOC20[0-9][0-9]"))]
    for path in [data, *sorted(inside, key=lambda path: path.name != "VOC2012")]:
        if (path / MASKS).is_dir():
            yield path


def find_sbd(data: Path) -> Path | None:
    """Return the folder with cls and img of SBD, in `data` or where its archive puts it."""
    folders = (data / inside for inside in SBD_INSIDE)
    return next((path for path in folders if (path / "cls").is_dir() and (path / "img").is_dir()), None)


@dataclass(frozen=True)
class _Part:
    """Images of one folder, by name without ending, and a folder of their masks."""

    name: str
    names: list[str]
    images: Path
    masks: Path
    ending: str
    listed_in: Path
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        listed = f"that {self.listed_in} lists"
        check_files(self.images, (f"{one}.jpg" for one in self.names), f"images {listed}", "unpack the data set again")
        advice = f"without masks these images can't be used; unpack the data set again, or shorten {self.listed_in.name}"
        check_files(self.masks, (one + self.ending for one in self.names), f"masks of the images {listed}", advice)


@dataclass(frozen=True)
class VocMasks:
    """A devkit with masks.

    Attributes:
        sbd: a folder of SBD, for its masks where `SegmentationClassAug` is not there; None if there is none.
        others: folders in which a list is looked for that is not in ImageSets/Segmentation.
    """

    root: Path
    sbd: Path | None = None
    others: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the devkit."""
        return self.root.resolve().name

    def lists(self) -> list[str]:
        """Return the names of the lists in ImageSets/Segmentation."""
        return sorted(file.stem for file in (self.root / LISTS).glob("*.txt"))

    def parts(self, lists: str, *, more: bool) -> tuple[MaskSet, MaskSet]:
        """Return the images to train on, and those of a list to test on.

        Args:
            lists: list to test on: val (trained on train), test (trained on trainval), seg11valid (trained on SBD's train if
                SBD is there), another list (trained on train), or auto: val where it is there, else test.
            more: train also on the images of which SBD has masks, if there are such masks.

        Raises:
            InputError: a list, an image or a mask is missing.
        """
        if lists == "auto":
            lists = "test" if "val" not in self.lists() and "test" in self.lists() else "val"
        test = self._part(lists)
        if lists == SEG11VALID and self.sbd is not None:
            train = [sbd_part(self.sbd, ("train",))]
        else:
            train = [self._part(TRAIN_OF.get(lists, "train"))]
            train += [added for added in [self._added()] if more and added is not None]
        tested, taken, notes = set(test.names), set[str](), list[str]()
        for number, part in enumerate(train):
            names = [name for name in part.names if name not in tested and name not in taken]
            if number == 0 and len(names) < len(part.names):
                notes.append(
                    f"{count_of(len(part.names) - len(names), 'image')} of {part.name} left out of training: tested on"
                )
            train[number] = replace(part, names=names)
            taken.update(names)
        if more and len(train) == 1 and self.name == "VOC2012" and lists == "val":
            notes.append(
                f"trained on {count_of(len(train[0].names), 'image')}: {AUG} is not there; published results are of 10,582"
            )
        if not taken:
            raise InputError(f"{self.root}: all images of {train[0].name} are tested on ({lists}): none is left to train on")
        named = "+".join(part.name for part in train if part.names)
        return (
            _joined(f"{self.name} {named}", [part for part in train if part.names], notes),
            _joined(f"{self.name} {lists}", [test], []),
        )

    def open(self, name: str) -> MaskSet:
        """Return the images of a list (train, val, trainval, test, aug, trainaug, or any other) with their masks.

        Raises:
            InputError: the list, an image or a mask is missing.
        """
        return _joined(f"{self.name} {name}", [self._part(name)], [])

    def _part(self, name: str) -> _Part:
        file = next((file for file in self._places(name) if file.is_file()), None)
        if file is None:
            known = ", ".join(f"{one}.txt" for one in self.lists()) or "no lists"
            raise InputError(f"{self.root / LISTS / f'{name}.txt'} does not exist; {self.root / LISTS} has {known}")
        names, notes = read_names(file)
        folder = self.root / (AUG if name in AUG_LISTS else MASKS)
        if not folder.is_dir():
            raise InputError(f"{file} lists images with masks in {folder.name}, and {folder} does not exist")
        return _Part(name, names, self.root / IMAGES, folder, ".png", file, tuple(notes))

    def _places(self, name: str) -> list[Path]:
        return [folder / f"{name}.txt" for folder in (self.root / LISTS, *self.others)]

    def _added(self) -> _Part | None:
        """Return the images of which there are masks of SBD, without those of val.txt; None if there are none."""
        listed, folder = [name for name in AUG_LISTS if name in self.lists()], self.root / AUG
        if listed and folder.is_dir():
            part = self._part(listed[0])
        elif folder.is_dir():
            names = sorted(path.stem for path in folder.glob("*.png"))
            note = f"{self.root / LISTS} has no aug.txt: trained on all masks of {AUG} but those of val.txt"
            part = _Part("aug", names, self.root / IMAGES, folder, ".png", folder, (note,))
        elif self.sbd is not None:
            part = sbd_part(self.sbd, ("train", "val"))
        else:
            return None
        tested = set(self._part("val").names) if "val" in self.lists() else set()
        return replace(part, names=[name for name in part.names if name not in tested])


def voc_parts(data: Path, lists: str, more: bool) -> tuple[MaskSet, MaskSet]:
    """Return the parts (`VocMasks.parts`) of the devkit in `data`, or those of SBD where no devkit is there.

    Raises:
        InputError: a list, an image or a mask is missing.
    """
    root, sbd = next(find_devkits(data), None), find_sbd(data)
    if root is not None:
        others = (data, *([sbd] if sbd is not None else []))
        return VocMasks(root, sbd, others).parts(lists, more=more)
    if sbd is None:
        raise InputError(f"{data} has neither a folder {MASKS} of a devkit nor cls and img of SBD")
    if lists not in ("auto", "val"):
        raise InputError(f"{sbd} has the lists train and val, and no devkit beside it has {lists}.txt")
    train, test = (_joined(f"SBD {one}", [sbd_part(sbd, (one,))], []) for one in ("train", "val"))
    return train, test


def read_names(file: Path) -> tuple[list[str], list[str]]:
    """Return the images of a list, and notes; a line may also be the path of an image, as in copies of trainaug.txt."""
    names, notes = read_list(file)
    return [PurePosixPath(one).stem if "/" in one or one.endswith(".jpg") else one for one in names], notes


def sbd_part(root: Path, lists: Sequence[str]) -> _Part:
    """Return the images of lists of SBD: train (8,498), val (2,857)."""
    names: list[str] = []
    for one in lists:
        file = root / f"{one}.txt"
        if not file.is_file():
            raise InputError(f"{file} does not exist; SBD has its lists train.txt and val.txt there")
        names += read_names(file)[0]
    listed_in = root / f"{lists[0]}.txt"
    return _Part(f"SBD {'+'.join(lists)}", [*dict.fromkeys(names)], root / "img", root / "cls", ".mat", listed_in)


def _joined(name: str, parts: Sequence[_Part], notes: Sequence[str]) -> MaskSet:
    by_folder: dict[Path, list[str]] = {}
    for part in parts:
        part.check()
        by_folder.setdefault(part.images, []).extend(f"{one}.jpg" for one in part.names)
    sources = [FileSource(folder, PackedNames(names), None, f"of {name}") for folder, names in by_folder.items()]
    joined = [(folder.parent.name, source) for folder, source in zip(by_folder, sources, strict=True)]
    source = sources[0] if len(sources) == 1 else JoinedSource(joined)
    paths = PackedNames(str((part.masks / one).absolute()) + part.ending for part in parts for one in part.names)
    all_notes = (*(note for part in parts for note in part.notes), *notes)
    return MaskSet(name, source, CLASS_NAMES, MaskFiles(source, paths, _read_any), notes=all_notes)


def _read_any(path: Path) -> Mask:
    return read_sbd_mask(path) if path.suffix == ".mat" else read_voc_mask(path)


def voc_palette() -> NDArray[np.uint8]:
    """Return VOC's colours of the numbers 0 to 255, (256, 3): bit b of channel c is bit 3 * (7 - b) + c of the number."""
    numbers, palette = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


@cache
def _numbers_of_colours() -> dict[int, int]:
    colours = packed(voc_palette()).tolist()
    return {colours[number]: number for number in (*range(len(CLASS_NAMES)), IGNORED)}


@cache
def _greys() -> frozenset[int]:
    """Return what the colours of the classes become where a mask is converted to grey."""
    greys = voc_palette()[: len(CLASS_NAMES)] @ np.array([299, 587, 114]) / 1000
    return frozenset(round(one) for one in greys[1:].tolist())


def read_voc_mask(path: Path) -> Mask:
    """Return the class of each pixel of a PNG: the numbers of its palette or its grey values; or VOC's colours, decoded.

    Raises:
        InputError: it can't be read, or has a value that is no class.
    """
    pixels, mode = read_png(path)
    if mode == "RGB":
        return decoded_colours(pixels.astype(np.uint8), _numbers_of_colours(), path, "VOC's palette")
    hint = ""
    if mode == "L":
        values = set(np.unique(pixels).tolist()) - {0, IGNORED, VOID_AS_GREY}
        if values and values <= _greys():
            hint = ". These are VOC's colours turned into grey: use the original files"
    return check_classes(pixels, len(CLASS_NAMES), path, hint)


def read_sbd_mask(path: Path) -> Mask:
    """Return the class of each pixel in a file of SBD's `cls`.

    Raises:
        InputError: it can't be read, or has a value that is no class.
    """
    from scipy.io import loadmat

    try:
        content: Any = loadmat(path, variable_names=("GTcls",))["GTcls"]
        mask = np.asarray(content["Segmentation"][0, 0])
    except Exception as error:  # Of damaged files scipy raises many different types.
        raise InputError(f"{path} can't be read as a file of SBD's cls folder: {error}") from error
    if mask.ndim != 2 or mask.dtype.kind not in "ui":
        raise InputError(f"{path}: GTcls.Segmentation has the shape {mask.shape} and type {mask.dtype}, not a mask's")
    return check_classes(mask.astype(np.int64), len(CLASS_NAMES), path)
