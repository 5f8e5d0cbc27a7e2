"""What the network sees of an image: the cluster view, random training views; colours, blur and quarter turns in batches.

A view says which windows it cuts out of images (`windows`), and `cut` does it: image by image on a processor, many at once
where they are small or on a GPU. Every random draw is a row of `draws_BR`, a function of (seed, epoch, position) only: the
number of workers, a stop and a resume change nothing.
B batch, V views, H and W pixels, S side of a view, R random numbers of a position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import pi

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.device import to_device
from deepcluster.data.resample import BILINEAR, SIGMAS, Ragged, Windows, blur, resample, resize, resize_alike

CROP_ATTEMPTS = 10
# Ten attempts at a crop (area, ratio), its place (x, y), flip, five of colour, whether these are used, and blur.
DRAWS = 2 * CROP_ATTEMPTS + 2 + 1 + 5 + 2
# Philox gives four numbers a step: positions must start on a whole step.
DRAWS_ALIGNED = -(-DRAWS // 4) * 4

# Of a strip longer than this many times its breadth, only the middle is scaled: one of 1 x 100,000 pixels would take
# 20 GB on the way to the 224 x 224 of its centre.
LONGEST = 16

# The draws of a crop's place, of its flip, and the first one of colours.
_PLACE_DRAWS = slice(2 * CROP_ATTEMPTS, 2 * CROP_ATTEMPTS + 2)
_FLIP_DRAW = 2 * CROP_ATTEMPTS + 2
_COLOUR_DRAWS = 2 * CROP_ATTEMPTS + 3

LUMA = (0.299, 0.587, 0.114)
LAST = torch.channels_last

# Decoded images, uint8: each one (H, W, 3), of any sizes; or many of one size (B, H, W, 3); or of any sizes on a GPU.
Images = Sequence[Tensor] | Tensor | Ragged
Draws = NDArray[np.float64]
# Returns memory (V, S, S, 3) for V views of side S.
Room = Callable[[int, int], Tensor]
# Cuts views out of images with the numbers that are drawn for them.
View = Callable[..., Tensor | tuple[Tensor, ...]]


def draws(seed: int, epoch: int, start: int, count: int, *, crop: int = 0) -> Draws:
    """Return uniform numbers (count, R) of positions start … start + count - 1 of an epoch, for the crop of that number."""
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    # Positions are the low half of Philox's counter of 256 bits, crops the high half: no two can meet.
    stream.advance(crop * 2**128 + start * DRAWS_ALIGNED // 4)
    return np.random.Generator(stream).random((count, DRAWS_ALIGNED))


def sides_of(images: Images) -> NDArray[np.int64]:
    """Return height and width (B, 2) of each image."""
    if isinstance(images, Ragged):
        return images.sizes_B2
    if isinstance(images, Tensor):
        return np.tile(np.array(images.shape[1:3], np.int64), (len(images), 1))
    return np.array([image_HWC.shape[:2] for image_HWC in images], np.int64).reshape(-1, 2)


def new_room(count: int, size: int) -> Tensor:
    """Return new memory (V, S, S, 3) for views."""
    return torch.empty(count, size, size, 3, dtype=torch.uint8)


def cut(
    images: Images, windows: Windows, size: int, rows: NDArray[np.int64] | None = None, *, room: Room = new_room
) -> Tensor:
    """Return windows (V, 3, S, S) of images, uint8, channels last in memory, on the device of the images.

    Args:
        windows: of V views.
        rows: the image of each view; view v is of image v by default.
        room: memory for views that are cut on the CPU.
    """
    by_products = windows.mode == BILINEAR
    if isinstance(images, Ragged) and by_products:
        return resample(images if rows is None else images.take(rows), windows, size)
    count = len(windows.flips_B)
    if isinstance(images, Ragged):
        views = torch.empty(count, size, size, 3, dtype=torch.uint8, device=images.pixels_P3.device).permute(0, 3, 1, 2)
    else:
        views = room(count, size).permute(0, 3, 1, 2)
    if isinstance(images, Tensor) and by_products:
        if len(images) and windows.are_equal():
            top, left, height, width = windows.boxes_B4[0].tolist()
            some = images if rows is None else images[torch.from_numpy(rows)]
            scaled_BCHW = resize_alike(some[:, top : top + height, left : left + width], tuple(windows.grids_B2[0].tolist()))
            top, left = windows.places_B2[0].tolist()
            return views.copy_(scaled_BCHW[..., top : top + size, left : left + size])
        return resample(images if rows is None else images[torch.from_numpy(rows)], windows, size, out=views)
    rows = np.arange(count) if rows is None else rows
    fields = (field.tolist() for field in (rows, windows.boxes_B4, windows.grids_B2, windows.places_B2, windows.flips_B))
    known, scaled_CHW = None, views
    for view_CHW, row, box, grid, (y, x), is_turned in zip(views, *fields, strict=True):
        if known != (row, box, grid):  # Several views of an image may be parts of the same grid.
            known, (top, left, height, width) = (row, box, grid), box
            scaled_CHW = resize(images[row][top : top + height, left : left + width], tuple(grid), windows.mode)
        window_CHW = scaled_CHW[:, y : y + size, x : x + size]
        view_CHW.copy_(window_CHW.flip(2) if is_turned else window_CHW)
    return views


@dataclass(frozen=True)
class ClusterView:
    """The view that is clustered: shorter side to 256/224 of `size`, then the centre crop of `size` (section 3).

    Of a very long strip only the middle is seen.

    Attributes:
        crop_pct: share of the resized shorter side that the crop shows; 224/256 in the paper.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    size: int
    crop_pct: float = 224 / 256
    interpolation: str = BILINEAR

    @property
    def resized(self) -> int:
        """What the shorter side is scaled to."""
        return round(self.size / self.crop_pct)

    def windows(self, sides_B2: NDArray[np.int64], side: int | None = None) -> Windows:
        """Return the centre square of images of these sizes, of `side` pixels (`size` by default)."""
        longest_B1 = LONGEST * sides_B2.min(1, keepdims=True)
        tops_B2 = np.maximum(0, sides_B2 - longest_B1) // 2
        boxes_B2 = np.minimum(sides_B2 - tops_B2, longest_B1)
        # In whole numbers: height * (resized / shorter) loses a row to rounding at some sizes, as at 98 x 49.
        grids_B2 = self.resized * boxes_B2 // boxes_B2.min(1, keepdims=True)
        places_B2 = np.rint((grids_B2 - (side or self.size)) / 2).astype(np.int64)
        return Windows(
            np.concatenate([tops_B2, boxes_B2], 1), grids_B2, places_B2, np.zeros(len(sides_B2), bool), self.interpolation
        )

    def __call__(self, images: Images, draws_BR: Draws | None = None, room: Room = new_room) -> Tensor:
        """Return the views (B, 3, S, S), uint8, channels last in memory."""
        return cut(images, self.windows(sides_of(images)), self.size, room=room)


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

    def windows(self, sides_B2: NDArray[np.int64], draws_BR: Draws) -> Windows:
        """Return the crops of images of these sizes."""
        heights_B, widths_B = sides_B2.T
        areas_B1, sides_B12 = (heights_B * widths_B)[:, None], np.stack([heights_B, widths_B], 1)[:, None]
        attempts_BA = draws_BR[:, : 2 * CROP_ATTEMPTS : 2], draws_BR[:, 1 : 2 * CROP_ATTEMPTS : 2]
        areas_BA = areas_B1 * (self.scale[0] + attempts_BA[0] * (self.scale[1] - self.scale[0]))
        low, high = np.log(self.ratio)
        ratios_BA = np.exp(low + attempts_BA[1] * (high - low))
        crops_BA2 = np.rint(np.sqrt(np.stack([areas_BA / ratios_BA, areas_BA * ratios_BA], 2)))
        fits_BA = ((crops_BA2 > 0) & (crops_BA2 <= sides_B12)).all(2)
        first_B = fits_BA.argmax(1)
        crops_B2 = crops_BA2[np.arange(len(crops_BA2)), first_B]
        places_B2 = draws_BR[:, _PLACE_DRAWS]
        starts_B2 = np.floor(places_B2 * (sides_B12[:, 0] - crops_B2 + 1))
        largest_B2 = np.stack([np.rint(widths_B / self.ratio[0]), np.rint(heights_B * self.ratio[1])], 1)
        largest_B2 = np.minimum(largest_B2, sides_B12[:, 0])
        none_B1 = ~fits_BA.any(1)[:, None]
        crops_B2 = np.where(none_B1, largest_B2, crops_B2)
        starts_B2 = np.where(none_B1, (sides_B12[:, 0] - largest_B2) // 2, starts_B2)
        boxes_B4 = np.concatenate([starts_B2, crops_B2], 1).astype(np.int64)
        flips_B = draws_BR[:, _FLIP_DRAW] < (0.5 if self.flip else 0)
        return Windows(boxes_B4, np.full_like(sides_B2, self.size), np.zeros_like(sides_B2), flips_B)

    def __call__(self, images: Images, draws_BR: Draws, room: Room = new_room) -> Tensor:
        """Return the views (B, 3, S, S), uint8, channels last in memory."""
        return cut(images, self.windows(sides_of(images), draws_BR), self.size, room=room)


@dataclass(frozen=True)
class ShiftedView:
    """The random view of the published linear probe: shorter side to 256/224 of `size`, the centre square of that, and
    in it a crop of `size` at a random place; flipped half of the time (section 4.2, and the 2018 release's script).

    It draws its place and its flip from the same numbers of a row as `TrainingView` does.
    """

    size: int
    flip: bool = True

    def windows(self, sides_B2: NDArray[np.int64], draws_BR: Draws) -> Windows:
        """Return the crops of images of these sizes."""
        view = ClusterView(self.size)
        square = view.windows(sides_B2, side=view.resized)
        shifts_B2 = np.floor(draws_BR[:, _PLACE_DRAWS] * (view.resized - self.size + 1)).astype(np.int64)
        flips_B = draws_BR[:, _FLIP_DRAW] < (0.5 if self.flip else 0)
        return Windows(square.boxes_B4, square.grids_B2, square.places_B2 + shifts_B2, flips_B)

    def __call__(self, images: Images, draws_BR: Draws, room: Room = new_room) -> Tensor:
        """Return the views (B, 3, S, S), uint8, channels last in memory."""
        return cut(images, self.windows(sides_of(images), draws_BR), self.size, room=room)


@dataclass(frozen=True)
class TenCrops:
    """Ten fixed views of an image, as torchvision's TenCrop: shorter side to 256/224 of `size`, then the four corners and
    the centre of the whole image, and the same of its mirror image. Of very long strips only the middle is seen.
    """

    size: int

    def __call__(self, images: Images, draws_BR: Draws | None = None, room: Room = new_room) -> Tensor:
        """Return the views (B, 10, 3, S, S), uint8, each channels last in memory."""
        centre = ClusterView(self.size).windows(sides_of(images))
        room_B2 = centre.grids_B2 - self.size
        corners_B52 = np.stack([room_B2 * corner for corner in ((0, 0), (0, 1), (1, 0), (1, 1))] + [centre.places_B2], 1)
        # The place in the image itself of what is a corner of its mirror image.
        mirrored_B52 = np.stack([corners_B52[..., 0], room_B2[:, 1:] - corners_B52[..., 1]], 2)
        places_V2 = np.concatenate([corners_B52, mirrored_B52], 1).reshape(-1, 2)
        flips_V = np.tile(np.arange(10) >= 5, len(images))
        windows = Windows(centre.boxes_B4.repeat(10, 0), centre.grids_B2.repeat(10, 0), places_V2, flips_V)
        views = cut(images, windows, self.size, np.arange(len(images)).repeat(10), room=room)
        return views.permute(0, 2, 3, 1).view(-1, 10, self.size, self.size, 3).permute(0, 1, 4, 2, 3)


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

    def __call__(self, images_BCHW: Tensor, draws_BR: Draws) -> Tensor:
        """Return images in [0, 1], or of uint8, with other colours, in [0, 1]; the images themselves if none are wanted."""
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
        rows_N = to_device(rows_N, images_BCHW.device)
        images_BCHW[rows_N] = blur(images_BCHW[rows_N], sigmas_N)
        return images_BCHW

    def _jittered(self, images_BCHW: Tensor, draws_BR: Draws) -> Tensor:
        # In float64, on the device of the images if that has it.
        device = images_BCHW.device if images_BCHW.is_cuda else torch.device("cpu")
        draws_B6 = to_device(torch.from_numpy(draws_BR[:, _COLOUR_DRAWS : _COLOUR_DRAWS + 6].copy()), device)
        spread_B1 = self.jitter * (draws_B6[:, 5:] < self.share).double()
        brightness_B, contrast_B, saturation_B = (1 + 0.8 * spread_B1 * (2 * draws_B6[:, :3] - 1)).clamp(min=0).T
        turn_B = 0.2 * spread_B1[:, 0] * (2 * draws_B6[:, 3] - 1) * 2 * pi
        saturation_B = torch.where(draws_B6[:, 4] < self.grey, 0, saturation_B)
        matrix_B33 = _hue_and_saturation(turn_B, saturation_B) * (brightness_B * contrast_B)[:, None, None]
        luma_3 = _colour_spaces(images_BCHW.device, images_BCHW.dtype)[0][0]
        mean_B = torch.einsum("bchw,c->b", images_BCHW, luma_3) / images_BCHW.shape[2:].numel()
        offset_B = ((1 - contrast_B) * brightness_B).to(images_BCHW) * mean_B
        pixels_BCP = torch.baddbmm(offset_B[:, None, None], matrix_B33.to(images_BCHW), images_BCHW.flatten(2))
        return pixels_BCP.clamp_(0, 1).view_as(images_BCHW)


def _hue_and_saturation(turn_B: Tensor, saturation_B: Tensor) -> Tensor:
    """Return matrices (B, 3, 3) on RGB that turn the hue and scale the distance from grey, in the YIQ space; float64."""
    to_yiq, from_yiq = _colour_spaces(turn_B.device, torch.float64)
    cos_B, sin_B = saturation_B * turn_B.cos(), saturation_B * turn_B.sin()
    turned = torch.zeros(len(turn_B), 3, 3, dtype=torch.float64, device=turn_B.device)
    turned[:, 0, 0] = 1
    turned[:, 1, 1], turned[:, 1, 2] = cos_B, -sin_B
    turned[:, 2, 1], turned[:, 2, 2] = sin_B, cos_B
    return from_yiq @ turned @ to_yiq


@lru_cache
def _colour_spaces(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the matrices from RGB to YIQ and back; the first row of the first one is the luma."""
    to_yiq = torch.tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)], dtype=torch.float64)
    return to_yiq.to(device, dtype), to_yiq.inverse().to(device, dtype)


def rotate_quarters(images_BCHW: Tensor, quarters_B: Tensor) -> Tensor:
    """Return square images, each turned counter-clockwise by 0 to 3 quarters (Gidaris et al., arXiv 1803.07728).

    Args:
        images_BCHW: of any type, on any device; the result is laid out as they are.
        quarters_B: best on the CPU, where they are drawn: a GPU would be waited for.
    """
    turned_BCHW = torch.empty_like(images_BCHW)
    for quarters in range(4):
        rows_N = to_device((quarters_B == quarters).nonzero()[:, 0], images_BCHW.device)
        turned_BCHW[rows_N] = images_BCHW[rows_N].rot90(quarters, (2, 3))
    return turned_BCHW
