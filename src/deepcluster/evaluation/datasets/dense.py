"""Contracts of data sets with a class per pixel, or with objects in boxes. Readers of published layouts return these.

Class numbers index `class_names`. With objects, and where a set of masks has one, number 0 is "background".
H and W pixels of an image, M objects.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.data.sources import ImageSource
from deepcluster.evaluation.datasets.labelled import left_out

IGNORED = 255
BACKGROUND = "background"


@dataclass(frozen=True)
class DenseSet:
    """Images with annotations.

    Attributes:
        name: data set and part, for messages: "VOC2012 val".
        source: the images, in the order of the list that names them.
        class_names: by class number.
        notes: what a reader of the numbers must know.
    """

    name: str
    source: ImageSource
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.source)

    def left_out(self, unreadable: Mapping[int, str]) -> list[str]:
        """Return a note on unreadable images, which are given by index; no note if there are none."""
        return left_out(self.source.describe(), unreadable, self.source.name)


@dataclass(frozen=True)
class MaskSet(DenseSet):
    """Images with one class per pixel.

    Attributes:
        read_mask: returns (H, W), uint8, of the image's own size: class numbers, and `IGNORED`. Raises `InputError` where
            the file can't be read.
    """

    read_mask: Callable[[int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Objects:
    """The objects of an image.

    Attributes:
        boxes_M4: float32; left, top, right, bottom in continuous pixels: a box of the whole image is (0, 0, W, H).
        labels_M: int64, class numbers from 1.
        difficult_M: bool; a detection of such an object counts neither as right nor as wrong (VOC).
        crowd_M: bool; the box or mask is of a group of objects (COCO): ignored in the same way, by COCO's rule.
        masks_MHW: uint8, 1 = the object, of the image's own size; None where they were not asked for.
    """

    boxes_M4: Tensor
    labels_M: Tensor
    difficult_M: Tensor
    crowd_M: Tensor
    masks_MHW: Tensor | None = None


@dataclass(frozen=True)
class ObjectSet(DenseSet):
    """Images with objects.

    Attributes:
        read_objects: returns the objects of an image; with their masks if the second argument is true, which only sets with
            `has_masks` can.
        coco: the `pycocotools.coco.COCO` that was read, with `category_ids` by class number; None for VOC.
    """

    read_objects: Callable[[int, bool], Objects]
    has_masks: bool = False
    coco: Any = None
    category_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Detections:
    """What a detector found in an image, in the pixels of the image itself; D detections, of descending score.

    Attributes:
        boxes_D4, scores_D, labels_D: float32, float32 and int64, on the CPU.
        masks: COCO's run-length encoding of the mask of each detection; None where the detector makes none.
    """

    boxes_D4: Tensor
    scores_D: Tensor
    labels_D: Tensor
    masks: list[dict[str, Any]] | None = None
