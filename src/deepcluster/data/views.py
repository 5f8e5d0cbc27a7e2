"""What the network sees of an image: the cluster view, the training view, and colours, blur and quarter turns in batches.

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

from deepcluster.data.resample import SIGMAS, blur, resample, resize

CROP_ATTEMPTS = 10
# Ten attempts at a crop (area, ratio), its place (x, y), flip, five of colour, whether these are used, and blur.
DRAWS = 2 * CROP_ATTEMPTS + 2 + 1 + 5 + 2
# Philox gives four numbers a step: positions must start on a whole step.
DRAWS_ALIGNED = -(-DRAWS // 4) * 4

# Of a strip longer than this many times its breadth, the middle alone is scaled: one of 1 x 100,000 pixels would take
# 20 GB on the way to the 224 x 224 of its centre.
LONGEST = 16

# The first draw of colours.
_COLOUR_DRAWS = 2 * CROP_ATTEMPTS + 3

LUMA = (0.299, 0.587, 0.114)
LAST = torch.channels_last

# Images as they are kept: each one (H, W, 3), of any sizes; or many of one size as (B, H, 3, W). All uint8.
Images = Sequence[Tensor] | Tensor


def draws(seed: int, epoch: int, start: int, count: int, *, crop: int = 0) -> NDArray[np.float64]:
    """Uniform numbers (count, R) of the positions start … start + count - 1 of an epoch, for the crop of that number."""
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    # Positions are the low half of Philox's counter of 256 bits, crops the high half: no two can meet.
    stream.advance(crop * 2**128 + start * DRAWS_ALIGNED // 4)
    return np.random.Generator(stream).random((count, DRAWS_ALIGNED))


@dataclass(frozen=True)
class ClusterView:
    """The view that is clustered: shorter side to 256/224 of `size`, then the centre crop of `size` (section 3)."""

    size: int

    @property
    def resized(self) -> int:
        """What the shorter side is scaled to."""
        return round(self.size * 256 / 224)

    def __call__(self, images: Images, draws_BR: NDArray[np.float64] | None = None) -> Tensor:
        """The views (B, 3, size, size), uint8, channels last in memory."""
        if isinstance(images, Tensor):
            return _centre(_resized_together(images, self.size), self.size).contiguous(memory_format=LAST)
        views = _room(len(images), self.size)
        for view_CHW, image_HWC in zip(views, images, strict=True):
            view_CHW.copy_(_centre(_resized_alone(image_HWC, self.size), self.size))
        return views

    def resized_sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image of that size once its shorter side is `resized`."""
        # In whole numbers: height * (resized / shorter) loses a row to rounding at some sizes, as at 98 x 49.
        shorter = min(height, width)
        return self.resized * height // shorter, self.resized * width // shorter


@dataclass(frozen=True)
class TrainingView:
    """The random view that is learned: a resized crop and a flip (section 3); colours change in `Colours`.

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


@dataclass(frozen=True)
class ShiftedView:
    """The random view of the published linear probe: shorter side to 256/224 of `size`, the centre square of that, and
    in it a crop of `size` at a random place; flipped half of the time (section 4.2, and the 2018 release's script).

    It draws its place and its flip from the same numbers of a row as `TrainingView` does.
    """

    size: int
    flip: bool = True

    def places(self, draws_BR: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Top and left (B, 2) of each crop within the centre square, int64; and which are flipped, (B,)."""
        room = ClusterView(self.size).resized - self.size
        places_B2 = np.floor(draws_BR[:, 2 * CROP_ATTEMPTS : 2 * CROP_ATTEMPTS + 2] * (room + 1)).astype(np.int64)
        flips_B = draws_BR[:, 2 * CROP_ATTEMPTS + 2] < (0.5 if self.flip else 0)
        return torch.from_numpy(places_B2), torch.from_numpy(flips_B)

    def __call__(self, images: Images, draws_BR: NDArray[np.float64]) -> Tensor:
        """The views (B, 3, size, size), uint8, channels last in memory."""
        places_B2, flips_B = self.places(draws_BR)
        if isinstance(images, Tensor):
            return self._cut_together(_resized_together(images, self.size), places_B2, flips_B)
        views = _room(len(images), self.size)
        places, flips = places_B2.tolist(), flips_B.tolist()
        for view_CHW, image_HWC, (top, left), turned in zip(views, images, places, flips, strict=True):
            square_CHW = _centre(_resized_alone(image_HWC, self.size), ClusterView(self.size).resized)
            crop_CHW = square_CHW[:, top : top + self.size, left : left + self.size]
            view_CHW.copy_(crop_CHW.flip(2) if turned else crop_CHW)
        return views

    def _cut_together(self, whole_BCHW: Tensor, places_B2: Tensor, flips_B: Tensor) -> Tensor:
        device, steps_S = whole_BCHW.device, torch.arange(self.size)
        down_BS = places_B2[:, :1] + steps_S
        across_BS = places_B2[:, 1:] + torch.where(flips_B[:, None], self.size - 1 - steps_S, steps_S)
        batch_B11 = torch.arange(len(whole_BCHW), device=device)[:, None, None]
        pixels_BHWC = _centre(whole_BCHW, ClusterView(self.size).resized).permute(0, 2, 3, 1)
        return pixels_BHWC[batch_B11, down_BS[:, :, None].to(device), across_BS[:, None].to(device)].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class TenCrops:
    """Ten fixed views of an image, as torchvision's TenCrop: shorter side to 256/224 of `size`, then the four corners and
    the centre of the whole image, and the same of its mirror image. Of very long strips the middle alone is seen.
    """

    size: int

    def __call__(self, images: Images, draws_BR: NDArray[np.float64] | None = None) -> Tensor:
        """The views (B, 10, 3, size, size), uint8, each channels last in memory."""
        device = images.device if isinstance(images, Tensor) else None
        views_BVHWC = torch.empty(len(images), 10, self.size, self.size, 3, dtype=torch.uint8, device=device)
        views_BVCHW = views_BVHWC.permute(0, 1, 4, 2, 3)
        if isinstance(images, Tensor):
            self._cut(_resized_together(images, self.size), views_BVCHW)
        else:
            for views_VCHW, image_HWC in zip(views_BVCHW, images, strict=True):
                self._cut(_resized_alone(image_HWC, self.size)[None], views_VCHW[None])
        return views_BVCHW

    def _cut(self, whole_BCHW: Tensor, views_BVCHW: Tensor) -> None:
        height, width = (side - self.size for side in whole_BCHW.shape[2:])
        corners = [(0, 0), (0, width), (height, 0), (height, width), (round(height / 2), round(width / 2))]
        for first, image_BCHW in ((0, whole_BCHW), (5, whole_BCHW.flip(3))):
            for number, (top, left) in enumerate(corners, first):
                views_BVCHW[:, number] = image_BCHW[..., top : top + self.size, left : left + self.size]


def _resized_alone(image_HWC: Tensor, size: int) -> Tensor:
    """The image (3, H, W), or the middle of a very long one, with its shorter side at 256/224 of `size`."""
    height, width, _ = image_HWC.shape
    longest = LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    middle_HWC = image_HWC[top : top + longest, left : left + longest]
    return resize(middle_HWC, ClusterView(size).resized_sides(*middle_HWC.shape[:2]))


def _resized_together(images_BHCW: Tensor, size: int) -> Tensor:
    """Many images of one size with their shorter sides at 256/224 of `size`; (B, 3, H, W)."""
    count, height, _, width = images_BHCW.shape
    whole_B4 = torch.tensor([0, 0, height, width]).expand(count, 4)
    return resample(images_BHCW, whole_B4, ClusterView(size).resized_sides(height, width)).permute(0, 2, 1, 3)


def _centre(whole: Tensor, side: int) -> Tensor:
    top, left = (round((length - side) / 2) for length in whole.shape[-2:])
    return whole[..., top : top + side, left : left + side]


def _room(count: int, size: int) -> Tensor:
    return torch.empty(count, 3, size, size, dtype=torch.uint8, memory_format=LAST)


@dataclass(frozen=True)
class Colours:
    """Random colours of a batch: brightness, contrast, saturation and hue as one matrix an image; grey and blur at times.

    Args:
        jitter: strength s, as in the contrastive literature (SimCLR, appendix A): brightness, contrast and saturation
            are scaled by 1 ± 0.8 s, hue is turned by ± 0.2 s of the circle. 0: no change.
        grey: share of the images that lose their colour.
        share: share of the images that are jittered; 0.8 in SimCLR and SwAV.
        blur: share of the images that are blurred, by a Gaussian of 0.1 to 2 pixels whatever the images' size, as SwAV
            does; 0.5 there. After the colours.
    """

    jitter: float = 0.0
    grey: float = 0.0
    share: float = 1.0
    blur: float = 0.0

    def __call__(self, images_BCHW: Tensor, draws_BR: NDArray[np.float64]) -> Tensor:
        """Images in [0, 1], or of uint8, with other colours, in [0, 1]; the images themselves where none are asked for."""
        if self.jitter == 0 and self.grey == 0 and self.blur == 0:
            return images_BCHW
        given_BCHW = images_BCHW
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = images_BCHW.float().div_(255)
        if self.jitter or self.grey:
            images_BCHW = self._jittered(images_BCHW, draws_BR)
        if self.blur == 0:
            return images_BCHW
        if images_BCHW is given_BCHW:
            images_BCHW = images_BCHW.clone()
        draws_B = torch.from_numpy(draws_BR[:, _COLOUR_DRAWS + 6])
        rows_N = (draws_B < self.blur).nonzero()[:, 0]
        # Of the draws below `blur`, uniform up to there, the widths are made.
        sigmas_N = SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * draws_B[rows_N] / self.blur
        rows_N = rows_N.to(images_BCHW.device)
        images_BCHW[rows_N] = blur(images_BCHW[rows_N], sigmas_N)
        return images_BCHW

    def _jittered(self, images_BCHW: Tensor, draws_BR: NDArray[np.float64]) -> Tensor:
        # In float64 and on the CPU, where the draws are: not every device has it.
        draws_B6 = torch.from_numpy(draws_BR[:, _COLOUR_DRAWS : _COLOUR_DRAWS + 6])
        spread_B1 = self.jitter * (draws_B6[:, 5:] < self.share).double()
        brightness_B, contrast_B, saturation_B = (1 + 0.8 * spread_B1 * (2 * draws_B6[:, :3] - 1)).clamp(min=0).T
        turn_B = 0.2 * spread_B1[:, 0] * (2 * draws_B6[:, 3] - 1) * 2 * pi
        saturation_B = torch.where(draws_B6[:, 4] < self.grey, 0, saturation_B)
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


def rotate_quarters(images_BCHW: Tensor, quarters_B: Tensor) -> Tensor:
    """Square images, each turned counter-clockwise by its number of quarters, 0 to 3 (Gidaris et al., arXiv 1803.07728).

    Args:
        images_BCHW: of any type, on any device; the result is laid out as they are.
        quarters_B: best on the CPU, where they are drawn: a GPU would be waited for.
    """
    turned_BCHW = torch.empty_like(images_BCHW)
    for quarters in range(4):
        rows_N = (quarters_B == quarters).nonzero()[:, 0].to(images_BCHW.device)
        turned_BCHW[rows_N] = images_BCHW[rows_N].rot90(quarters, (2, 3))
    return turned_BCHW
