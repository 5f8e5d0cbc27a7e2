"""Views of images and their masks for segmentation: random crops to train on, whole images to test on.

Images are uint8 (3, H, W), masks uint8 (H, W) under the name "mask". All draws are from torch's generator, which
`Samples` seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from deepcluster.evaluation.datasets.dense import IGNORED
from deepcluster.evaluation.dense.samples import MASK, Target
from deepcluster.models.statistics import IMAGENET_MEAN

RATIOS = (0.5, 2.0)
MOST_OF_ONE_CLASS, TRIES = 0.75, 10
# Zero after `normalise`, up to rounding.
PADDING = tuple(round(255 * mean) for mean in IMAGENET_MEAN)


@dataclass(frozen=True)
class Scale:
    """The size to which images are brought, keeping their aspect: as large as both sides allow.

    Attributes:
        short, long: pixels of the shorter and of the longer side; 0: the image as it is.
    """

    short: int
    long: int

    def size(self, height: int, width: int, ratio: float = 1.0) -> tuple[int, int]:
        """Return height and width of an image of this height and width, times `ratio`."""
        if not self.short:
            return height, width
        factor = min(int(ratio * self.short) / min(height, width), int(ratio * self.long) / max(height, width))
        return max(1, int(factor * height + 0.5)), max(1, int(factor * width + 0.5))


@dataclass(frozen=True)
class TrainingCrop:
    """A random crop of a resized image: the training views of OpenMMLab's FCN recipes (mmsegmentation, Apache-2.0).

    The scale is multiplied by 0.5 to 2; a crop of which one class covers 75 % or more is drawn again, up to ten times; then
    a flip, and brightness, contrast, saturation and hue are changed with probability ½ each. What the image does not fill
    is its mean colour, and `IGNORED` in the mask.
    """

    scale: Scale
    crop: int

    def __call__(self, image: tv_tensors.Image, target: Target) -> tuple[Tensor, Target]:
        """Return views (3, crop, crop) and (crop, crop)."""
        ratio = float(torch.empty(1).uniform_(*RATIOS))
        height, width = image.shape[-2:]
        image_CHW, mask_HW = _resized(image, target[MASK], self.scale.size(height, width, ratio))
        top, left = self._place(mask_HW)
        image_CHW, mask_HW = (one[..., top : top + self.crop, left : left + self.crop] for one in (image_CHW, mask_HW))
        if torch.rand(1) < 0.5:
            image_CHW, mask_HW = image_CHW.flip(-1), mask_HW.flip(-1)
        return self._padded(_distort(image_CHW), mask_HW)

    def _place(self, mask_HW: Tensor) -> tuple[int, int]:
        """Return top and left of the first crop that shows more than one class, or of the last one tried."""
        free = [max(0, length - self.crop) + 1 for length in mask_HW.shape]
        for _ in range(TRIES):
            top, left = (int(torch.randint(places, ())) for places in free)
            counts = torch.bincount(mask_HW[top : top + self.crop, left : left + self.crop].flatten(), minlength=256)
            counts[IGNORED] = 0
            if counts.max() < MOST_OF_ONE_CLASS * counts.sum():
                break
        return top, left

    def _padded(self, image_CHW: Tensor, mask_HW: Tensor) -> tuple[Tensor, Target]:
        height, width = mask_HW.shape
        whole_CHW = torch.tensor(PADDING, dtype=torch.uint8)[:, None, None].repeat(1, self.crop, self.crop)
        whole_HW = torch.full((self.crop, self.crop), IGNORED, dtype=torch.uint8)
        whole_CHW[:, :height, :width], whole_HW[:height, :width] = image_CHW, mask_HW
        return whole_CHW, {MASK: whole_HW}


@dataclass(frozen=True)
class WholeImage:
    """The image, brought to a size, and its mask; with `mask_too` at that size, else as it is (to test at its own size)."""

    scale: Scale
    mask_too: bool = False

    def __call__(self, image: tv_tensors.Image, target: Target) -> tuple[Tensor, Target]:
        """Return the view of the image, and the mask."""
        image_CHW, mask_HW = _resized(image, target[MASK], self.scale.size(*image.shape[-2:]))
        return image_CHW, {MASK: mask_HW if self.mask_too else target[MASK]}


def _resized(image: Tensor, mask_HW: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return both at a size: colours are interpolated; a pixel of the mask has the class of the nearest pixel's centre."""
    image_CHW, mask_HW = image.as_subclass(Tensor), mask_HW.as_subclass(Tensor)
    if tuple(mask_HW.shape) == size:
        return image_CHW, mask_HW
    nearest = functional.resize(mask_HW[None], [*size], interpolation=InterpolationMode.NEAREST_EXACT)
    return functional.resize(image_CHW, [*size], antialias=True), nearest[0]


class _Distort(v2.RandomPhotometricDistort):  # type: ignore[misc]
    """Changes of colour; the order of the channels stays, unlike in SSD, from which torchvision's transform is."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


# OpenMMLab adds up to ±32 of 255 to the brightness, where this multiplies; its hue turns by up to ±18 of OpenCV's 180.
_distort: Callable[[Tensor], Tensor] = _Distort(brightness=(0.875, 1.125), hue=(-0.1, 0.1))
