"""The one door to images with a class per pixel: finds which layout a folder has, and its parts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.cityscapes import Cityscapes, is_cityscapes
from deepcluster.evaluation.datasets.coco_masks import CocoPanoptic, is_coco_panoptic
from deepcluster.evaluation.datasets.dense import MaskSet
from deepcluster.evaluation.datasets.labelled import contents_of
from deepcluster.evaluation.datasets.voc_masks import MASKS, find_devkits, find_sbd, voc_parts


@dataclass(frozen=True)
class MaskParts:
    """The images to train on, and those to test on; both have the same classes.

    Attributes:
        layout: "voc", "sbd", "cityscapes" or "coco".
    """

    train: MaskSet
    test: MaskSet
    layout: str

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers must know of both parts."""
        return [*dict.fromkeys((*self.train.notes, *self.test.notes))]

    def describe(self) -> dict[str, object]:
        """Return names and counts, for the results."""
        return {
            "train": self.train.name,
            "test": self.test.name,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "classes": len(self.train.class_names),
        }


@dataclass(frozen=True)
class _Layout:
    """What a layout is, in words; whether a folder has it; and its parts."""

    wanted: str
    fits: Callable[[Path], bool]
    parts: Callable[[Path, str, bool], tuple[MaskSet, MaskSet]]


def _cityscapes(data: Path, lists: str, _: bool) -> tuple[MaskSet, MaskSet]:
    return Cityscapes(data).parts(lists)


def _coco(data: Path, lists: str, _: bool) -> tuple[MaskSet, MaskSet]:
    return CocoPanoptic(data).parts(lists)


LAYOUTS: dict[str, _Layout] = {
    "voc": _Layout(
        f"a VOC devkit with {MASKS} and ImageSets/Segmentation",
        lambda data: next(find_devkits(data), None) is not None,
        voc_parts,
    ),
    "sbd": _Layout("SBD with cls and img", lambda data: find_sbd(data) is not None, voc_parts),
    "cityscapes": _Layout("Cityscapes with leftImg8bit and gtFine", is_cityscapes, _cityscapes),
    "coco": _Layout("COCO with annotations/panoptic_*.json", is_coco_panoptic, _coco),
}


def open_masks(data: Path, lists: str = "auto", *, more: bool = True) -> MaskParts:
    """Return the images with masks in a folder, to train on and to test on.

    Args:
        data: folder of a VOC devkit, SBD, Cityscapes or COCO.
        lists: part to test on: val, test or, of VOC, any list of ImageSets/Segmentation (seg11valid); auto: val, or test
            where there is no val.
        more: with VOC, train also on the masks of SBD (`SegmentationClassAug`, or SBD beside the devkit) if they are there.

    Raises:
        InputError: no layout fits (the message says what was looked for), or a list, an image or a mask is missing.
    """
    for name, layout in LAYOUTS.items():
        if layout.fits(data):
            train, test = layout.parts(data, lists, more)
            return MaskParts(train, test, name)
    wanted = "; ".join(layout.wanted for layout in LAYOUTS.values())
    raise InputError(f"{data} has no masks: {_what_is_there(data)}. Looked for: {wanted}")


def _what_is_there(data: Path) -> str:
    """Return what a folder without masks has of a data set with masks, else its contents."""
    devkits = [data, *sorted(data.glob("VOC20[0-9][0-9]")), *sorted(data.glob("VOCdevkit/VOC20[0-9][0-9]"))]
    for path in devkits:
        if (path / "Annotations").is_dir():
            return f"{path} is a devkit with boxes (Annotations) and without {MASKS}"
    instances = sorted(data.glob("annotations/instances_*.json"))
    if instances:
        return f"{instances[0]} has objects, and panoptic_*.json is not beside it (panoptic_annotations_trainval2017.zip)"
    for one, other in (("leftImg8bit", "gtFine"), ("gtFine", "leftImg8bit"), ("cls", "img")):
        if (data / one).is_dir():
            return f"{data / one} is there, and {other} is not"
    return contents_of(data)


def is_masks(data: Path) -> bool:
    """Return whether `open_masks` finds a layout, judging by its folders."""
    return any(layout.fits(data) for layout in LAYOUTS.values())
