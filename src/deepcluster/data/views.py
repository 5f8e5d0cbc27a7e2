"""What the network sees of an image: the cluster view, the training view, and colours in batches.

Every random draw is a row of `draws_BR`, a function of (seed, epoch, position) alone: the number of workers, a stop
and a resume change nothing. B batch, H and W pixels, R random numbers of a position.
"""

from dataclasses import dataclass
from math import log, pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

CROP_ATTEMPTS = 10
# Ten attempts at a crop (area, ratio), its place (x, y), flip, five of colour, and two to spare.
DRAWS = 2 * CROP_ATTEMPTS + 2 + 1 + 5 + 2
# Philox gives four numbers a step: positions must start on a whole step.
DRAWS_ALIGNED = -(-DRAWS // 4) * 4

# Of a strip longer than this many times its breadth, the middle alone is scaled: one of 1 x 100,000 pixels would take
# 20 GB on the way to the 224 x 224 of its centre.
LONGEST = 16

LUMA = (0.299, 0.587, 0.114)

Box = tuple[int, int, int, int]


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

    def __call__(self, image_HWC: Tensor) -> Tensor:
        """The view (3, size, size), uint8."""
        image_HWC = _middle(image_HWC)
        height, width, _ = image_HWC.shape
        shorter = min(height, width)
        # In whole numbers: height * (resized / shorter) loses a row to rounding at some sizes, as at 98 x 49.
        resized = (self.resized * height // shorter, self.resized * width // shorter)
        whole = _resize(image_HWC, resized)
        top, left = round((resized[0] - self.size) / 2), round((resized[1] - self.size) / 2)
        return whole[:, top : top + self.size, left : left + self.size]


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

    def crop(self, draws_R: NDArray[np.float64], height: int, width: int) -> Box:
        """Top, left, height and width of the crop in an image of that size."""
        for attempt in range(CROP_ATTEMPTS):
            area = height * width * (self.scale[0] + draws_R[2 * attempt] * (self.scale[1] - self.scale[0]))
            low, high = log(self.ratio[0]), log(self.ratio[1])
            ratio = np.exp(low + draws_R[2 * attempt + 1] * (high - low))
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                place_y, place_x = draws_R[2 * CROP_ATTEMPTS : 2 * CROP_ATTEMPTS + 2]
                return int(place_y * (height - h + 1)), int(place_x * (width - w + 1)), h, w
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, image_HWC: Tensor, draws_R: NDArray[np.float64]) -> Tensor:
        """The view (3, size, size), uint8."""
        top, left, height, width = self.crop(draws_R, *image_HWC.shape[:2])
        view_CHW = _resize(image_HWC[top : top + height, left : left + width], (self.size, self.size))
        return view_CHW.flip(2) if self.flip and draws_R[2 * CROP_ATTEMPTS + 2] < 0.5 else view_CHW


def _middle(image_HWC: Tensor) -> Tensor:
    """The image, or the middle of a very long one."""
    height, width, _ = image_HWC.shape
    longest = LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return image_HWC[top : top + longest, left : left + longest]


def _resize(image_HWC: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing, uint8 throughout, as torchvision's on tensors; (3, H, W)."""
    image_1CHW = image_HWC.permute(2, 0, 1)[None]
    if image_1CHW.shape[2:] == size:
        return image_1CHW[0]
    return interpolate(image_1CHW, size=size, mode="bilinear", antialias=True)[0]


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
        """Images in [0, 1] with other colours, in [0, 1]."""
        if self.jitter == 0 and self.grey == 0:
            return images_BCHW
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
