"""What the network sees of an image: the cluster view, the training view, and colours in batches.

Every random draw is a row of `draws_BR`, a function of (seed, epoch, position) alone: the number of workers, a stop
and a resume change nothing. B batch, H and W pixels, R random numbers of a position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.data.resample import resample
from deepcluster.data.resize import resize

CROP_ATTEMPTS = 10
# Ten attempts at a crop (area, ratio), its place (x, y), flip, five of colour, and two to spare.
DRAWS = 2 * CROP_ATTEMPTS + 2 + 1 + 5 + 2
# Philox gives four numbers a step: positions must start on a whole step.
DRAWS_ALIGNED = -(-DRAWS // 4) * 4

# Of a strip longer than this many times its breadth, the middle alone is scaled: one of 1 x 100,000 pixels would take
# 20 GB on the way to the 224 x 224 of its centre.
LONGEST = 16

LUMA = (0.299, 0.587, 0.114)
LAST = torch.channels_last

# Images as they are kept: each one (H, W, 3), of any sizes; or many of one size as (B, H, 3, W). All uint8.
Images = Sequence[Tensor] | Tensor


def draws(seed: int, epoch: int, start: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers (count, R) of the positions start … start + count - 1 of an epoch."""
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    stream.advance(start * DRAWS_ALIGNED // 4)
    return np.random.Generator(stream).random((count, DRAWS_ALIGNED))


@dataclass(frozen=True)
class ClusterView:
    """The view that is clustered: shorter side to 256/224 of `size`, then the centre crop of `size` (section 3.3)."""

    size: int

    @property
    def resized(self) -> int:
        """What the shorter side is scaled to."""
        return round(self.size * 256 / 224)

    def __call__(self, images: Images, draws_BR: NDArray[np.float64] | None = None) -> Tensor:
        """The views (B, 3, size, size), uint8, channels last in memory."""
        if isinstance(images, Tensor):
            resized = self._resized(images.shape[1], images.shape[3])
            whole_B4 = torch.tensor([0, 0, images.shape[1], images.shape[3]]).expand(len(images), 4)
            return self._centre(resample(images, whole_B4, resized).permute(0, 2, 1, 3)).contiguous(memory_format=LAST)
        views = _room(len(images), self.size)
        for view_CHW, image_HWC in zip(views, map(_middle, images), strict=True):
            view_CHW.copy_(self._centre(resize(image_HWC, self._resized(*image_HWC.shape[:2]))))
        return views

    def is_cut_from(self, image_HWC: Tensor) -> bool:
        """Whether the view is a part of the image as it is, and costs nothing to make."""
        return min(image_HWC.shape[:2]) == self.resized

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        # In whole numbers: height * (resized / shorter) loses a row to rounding at some sizes, as at 98 x 49.
        shorter = min(height, width)
        return self.resized * height // shorter, self.resized * width // shorter

    def _centre(self, whole: Tensor) -> Tensor:
        top, left = (round((side - self.size) / 2) for side in whole.shape[-2:])
        return whole[..., top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class TrainingView:
    """The random view that is learned: a resized crop and a flip (section 3.3); colours change in `Colours`.

    Crops follow torchvision's RandomResizedCrop: ten attempts at a share of the area within `scale` and a ratio of the
    sides within `ratio`, else the largest centre crop of an allowed ratio.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def boxes(self, draws_BR: NDArray[np.float64], heights_B: NDArray[np.int64], widths_B: NDArray[np.int64]) -> Tensor:
        """Top, left, height and width of the crop in each image of that size; (B, 4), int64."""
        areas_B1, sides_B12 = (heights_B * widths_B)[:, None], np.stack([heights_B, widths_B], 1)[:, None]
        attempts_BA = draws_BR[:, : 2 * CROP_ATTEMPTS : 2], draws_BR[:, 1 : 2 * CROP_ATTEMPTS : 2]
        areas_BA = areas_B1 * (self.scale[0] + attempts_BA[0] * (self.scale[1] - self.scale[0]))
        low, high = np.log(self.ratio)
        ratios_BA = np.exp(low + attempts_BA[1] * (high - low))
        crops_BA2 = np.rint(np.sqrt(np.stack([areas_BA / ratios_BA, areas_BA * ratios_BA], 2)))
        fits_BA = ((crops_BA2 > 0) & (crops_BA2 <= sides_B12)).all(2)
        first_B = fits_BA.argmax(1)
        crops_B2 = crops_BA2[np.arange(len(crops_BA2)), first_B]
        places_B2 = draws_BR[:, 2 * CROP_ATTEMPTS : 2 * CROP_ATTEMPTS + 2]
        starts_B2 = np.floor(places_B2 * (sides_B12[:, 0] - crops_B2 + 1))
        largest_B2 = np.stack([np.rint(widths_B / self.ratio[0]), np.rint(heights_B * self.ratio[1])], 1)
        largest_B2 = np.minimum(largest_B2, sides_B12[:, 0])
        none_B1 = ~fits_BA.any(1)[:, None]
        crops_B2 = np.where(none_B1, largest_B2, crops_B2)
        starts_B2 = np.where(none_B1, (sides_B12[:, 0] - largest_B2) // 2, starts_B2)
        return torch.from_numpy(np.concatenate([starts_B2, crops_B2], 1).astype(np.int64))

    def __call__(self, images: Images, draws_BR: NDArray[np.float64]) -> Tensor:
        """The views (B, 3, size, size), uint8, channels last in memory."""
        flips_B = torch.from_numpy(draws_BR[:, 2 * CROP_ATTEMPTS + 2] < 0.5) if self.flip else None
        if isinstance(images, Tensor):
            sides = (np.full(len(images), side) for side in (images.shape[1], images.shape[3]))
            boxes_B4 = self.boxes(draws_BR, *sides)
            views = resample(images, boxes_B4, (self.size, self.size), flips_B)
            return views.permute(0, 2, 1, 3).contiguous(memory_format=LAST)
        sides_B2 = np.array([image_HWC.shape[:2] for image_HWC in images]).reshape(-1, 2)
        boxes = self.boxes(draws_BR, *sides_B2.T).tolist()
        flips = [False] * len(images) if flips_B is None else flips_B.tolist()
        views = _room(len(images), self.size)
        for view_CHW, image_HWC, (top, left, height, width), turned in zip(views, images, boxes, flips, strict=True):
            scaled_CHW = resize(image_HWC[top : top + height, left : left + width], (self.size, self.size))
            view_CHW.copy_(scaled_CHW.flip(2) if turned else scaled_CHW)
        return views


def _room(count: int, size: int) -> Tensor:
    return torch.empty(count, 3, size, size, dtype=torch.uint8, memory_format=LAST)


def _middle(image_HWC: Tensor) -> Tensor:
    """The image, or the middle of a very long one."""
    height, width, _ = image_HWC.shape
    longest = LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return image_HWC[top : top + longest, left : left + longest]


@dataclass(frozen=True)
class Colours:
    """Random colours of a batch: brightness, contrast, saturation and hue as one matrix an image, and grey at times.

    Args:
        jitter: strength s, as in the contrastive literature (SimCLR, appendix A): brightness, contrast and saturation
            are scaled by 1 ± 0.8 s, hue is turned by ± 0.2 s of the circle. 0: no change.
        grey: share of the images that lose their colour.
    """

    jitter: float = 0.0
    grey: float = 0.0

    def __call__(self, images_BCHW: Tensor, draws_BR: NDArray[np.float64]) -> Tensor:
        """Images in [0, 1], or of uint8, with other colours, in [0, 1]; the images themselves where none are asked for."""
        if self.jitter == 0 and self.grey == 0:
            return images_BCHW
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = images_BCHW.float().div_(255)
        first = 2 * CROP_ATTEMPTS + 3
        # In float64 and on the CPU, where the draws are: not every device has it.
        draws_B5 = torch.from_numpy(draws_BR[:, first : first + 5])
        brightness_B, contrast_B, saturation_B = (1 + 0.8 * self.jitter * (2 * draws_B5[:, :3] - 1)).clamp(min=0).T
        turn_B = 0.2 * self.jitter * (2 * draws_B5[:, 3] - 1) * 2 * pi
        saturation_B = torch.where(draws_B5[:, 4] < self.grey, 0, saturation_B)
        matrix_B33 = _hue_and_saturation(turn_B, saturation_B) * (brightness_B * contrast_B)[:, None, None]
        luma_3 = torch.tensor(LUMA).to(images_BCHW)
        mean_B = torch.einsum("bchw,c->b", images_BCHW, luma_3) / images_BCHW.shape[2:].numel()
        offset_B = ((1 - contrast_B) * brightness_B).to(images_BCHW) * mean_B
        pixels_BCP = torch.baddbmm(offset_B[:, None, None], matrix_B33.to(images_BCHW), images_BCHW.flatten(2))
        return pixels_BCP.clamp_(0, 1).view_as(images_BCHW)


def _hue_and_saturation(turn_B: Tensor, saturation_B: Tensor) -> Tensor:
    """Matrices (B, 3, 3) on RGB that turn the hue and scale the distance from grey, in the YIQ space; float64."""
    to_yiq = torch.tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)], dtype=torch.float64)
    cos_B, sin_B = saturation_B * turn_B.cos(), saturation_B * turn_B.sin()
    turned = torch.zeros(len(turn_B), 3, 3, dtype=torch.float64)
    turned[:, 0, 0] = 1
    turned[:, 1, 1], turned[:, 1, 2] = cos_B, -sin_B
    turned[:, 2, 1], turned[:, 2, 2] = sin_B, cos_B
    return to_yiq.inverse() @ turned @ to_yiq
