"""Images to other sizes, one by one (`resize`) or many at once (`resample`), and Gaussian blur of a batch.

The latter two are matrix products: on a processor for small images, on a GPU for any.
The result of `resample` is that of `resize`, bit for bit: both round the weights of a line to whole numbers, and the lines
between the two passes. Products and sums of such numbers are exact in float32, in any order and on any device (float32
products must be real ones, as is torch's default, and not TF32).
B batch, C channels, H and W sides of the images, S side of the result, T taps of a kernel, P pixels.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from deepcluster.core.device import to_device

# Up to here a line's largest weight is over 1/4, and has 16 bits after the point. With the 8 of a pixel they make the 24 of
# float32; smaller weights have more.
_EXACT_SCALE = 3.0
_MOST_BITS, _FLOAT32_BITS = 22, 16
# Scaled together on a processor: what lies between the passes stays in its cache (32: 19 µs an image of 32 px, 256: 48).
_TOGETHER = 32
# Numbers of a piece that a GPU works on at once.
_GPU_NUMBERS = 1 << 27
# Widths of the published blur in pixels, for crops of every size (SwAV, arXiv 2006.09882, blurs 224 and 96 px alike;
# SimCLR, arXiv 2002.05709, appendix A).
SIGMAS = (0.1, 2.0)
# Taps on either side: four times the largest width, where the Gaussian is 1/3000 of its height.
REACH = 8
# Lines are worked out this many pixels at a time, from these and their neighbours only: products with whole bands of
# 224 pixels take 1.6 times as long, grouped convolutions 1.2 times (6 times at 32 px).
_BLOCK = 32
BILINEAR = "bilinear"


@dataclass(frozen=True)
class Windows:
    """What is cut out of each of B images: a box of the image is scaled to a grid, of which a window is taken.

    Attributes:
        boxes_B4: top, left, height and width of the box in the image, int64.
        grids_B2: height and width of the grid.
        places_B2: top and left of the window in the grid.
        flips_B: whether the window is turned left to right.
        mode: how the box is scaled, antialiased: "bilinear" or "bicubic".
    """

    boxes_B4: NDArray[np.int64]
    grids_B2: NDArray[np.int64]
    places_B2: NDArray[np.int64]
    flips_B: NDArray[np.bool_]
    mode: str = BILINEAR

    def are_equal(self) -> bool:
        """Return True if the same part is cut out of all images, and none is turned."""
        fields = (self.boxes_B4, self.grids_B2, self.places_B2)
        return not self.flips_B.any() and all(bool((field == field[:1]).all()) for field in fields)


@dataclass(frozen=True)
class Ragged:
    """Images of any sizes in one piece of memory, mostly on a GPU.

    Attributes:
        pixels_P3: uint8, all images one after the other.
        starts_B: first pixel of each image.
        sizes_B2: height and width of each image, on the CPU as `starts_B` is.
    """

    pixels_P3: Tensor
    starts_B: NDArray[np.int64]
    sizes_B2: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts_B)

    def __getitem__(self, row: int) -> Tensor:
        """Return an image (H, W, 3)."""
        height, width = map(int, self.sizes_B2[row])
        start = int(self.starts_B[row])
        return self.pixels_P3[start : start + height * width].view(height, width, 3)

    def take(self, rows: NDArray[np.int64]) -> "Ragged":
        """Return some of the images."""
        return Ragged(self.pixels_P3, self.starts_B[rows], self.sizes_B2[rows])

    def boxes(self, boxes_B4: NDArray[np.int64]) -> Tensor:
        """Return a part of each image (B, H, W, 3), padded to the largest by its last lines."""
        device = self.pixels_P3.device
        tops_B, lefts_B, heights_B, widths_B = boxes_B4.T
        numbers = np.stack(
            [self.starts_B + tops_B * self.sizes_B2[:, 1] + lefts_B, self.sizes_B2[:, 1], heights_B, widths_B]
        )
        first_B, wide_B, high_B, broad_B = to_device(torch.from_numpy(numbers), device)
        rows_BH = torch.arange(int(heights_B.max()), device=device).minimum(high_B[:, None] - 1) * wide_B[:, None]
        columns_BW = torch.arange(int(widths_B.max()), device=device).minimum(broad_B[:, None] - 1)
        return self.pixels_P3[first_B[:, None, None] + rows_BH[..., None] + columns_BW[:, None]]


def resize(image_HWC: Tensor, size: tuple[int, int], mode: str = BILINEAR) -> Tensor:
    """Return the image (H, W, 3) at `size`, its new height and width; (3, height, width), channels last in memory.

    The same as torchvision's `resize` of uint8 tensors with antialiasing. At its own size it is returned as it is.
    """
    return resize_alike(image_HWC[None], size, mode)[0]


def resize_alike(images_BHWC: Tensor, size: tuple[int, int], mode: str = BILINEAR) -> Tensor:
    """Return images of one size at another, as `resize` does; (B, 3, height, width)."""
    # The batch is made before the channels are moved: its strides then say "channels last", and interpolate keeps to that.
    # Made after, it takes 1.5 times as long for the same pixels, most of it in moving them about.
    images_BCHW = images_BHWC.permute(0, 3, 1, 2)
    if images_BCHW.shape[2:] == size:
        return images_BCHW
    if images_BCHW.device.type != "cpu":  # Other devices have no whole numbers here.
        scaled_BCHW = interpolate(images_BCHW.float(), size=size, mode=mode, antialias=True)
        return scaled_BCHW.round_().clamp_(0, 255).to(images_BCHW.dtype)
    return interpolate(images_BCHW, size=size, mode=mode, antialias=True)


def resample(
    images: Tensor | Ragged, windows: Windows, size: int, *, exact: bool | None = None, out: Tensor | None = None
) -> Tensor:
    """Return a window of each image at `size`, by antialiased bilinear interpolation; (B, 3, S, S), channels last in memory.

    Args:
        images: (B, H, W, 3), uint8, or of any sizes; on any device.
        exact: give the pixels of `resize`, bit for bit. Otherwise both passes may round to the next number: pixels are at
            most 2 of 255 away, nearly always 0; images that are made smaller by more than three times need no float64. By
            default on processors.
        out: memory for the result, as it is returned.
    """
    pixels = images.pixels_P3 if isinstance(images, Ragged) else images
    device = pixels.device
    exact = device.type == "cpu" if exact is None else exact
    if out is None:
        out = torch.empty(len(images), size, size, 3, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    result_BSSC = out.permute(0, 2, 3, 1)
    step = max(1, len(images))
    if isinstance(images, Ragged) and len(images):
        high, wide = windows.boxes_B4[:, 2:].max(0).tolist()
        step = max(1, _GPU_NUMBERS // (3 * high * wide + size * (high + wide)))
    for some in (slice(start, min(start + step, len(images))) for start in range(0, len(images), step)):
        boxes_B4 = windows.boxes_B4[some]
        if isinstance(images, Ragged):
            part_BHWC = images.take(np.arange(some.start, some.stop)).boxes(boxes_B4)
            boxes_B4 = np.concatenate([np.zeros_like(boxes_B4[:, :2]), boxes_B4[:, 2:]], 1)
        else:
            part_BHWC = images[some]
        grids_B2, places_B2 = windows.grids_B2[some], windows.places_B2[some]
        along = [(boxes_B4[:, axis], boxes_B4[:, axis + 2], grids_B2[:, axis], places_B2[:, axis]) for axis in (0, 1)]
        down = _weights(*along[0], part_BHWC.shape[1], size, device, exact=exact)
        across = _weights(*along[1], part_BHWC.shape[2], size, device, windows.flips_B[some], exact=exact)
        _scale(part_BHWC, down, across, result_BSSC[some])
    return out


def _scale(images_BHWC: Tensor, down: tuple[Tensor, Tensor], across: tuple[Tensor, Tensor], result_BSSC: Tensor) -> None:
    """Write the products of images with the weights of their lines, as `_weights` gives them, into `result_BSSC`."""
    (down_BSH, down_bits_B), (across_BSW, across_bits_B) = down, across
    kind = torch.promote_types(down_BSH.dtype, across_BSW.dtype)
    down_BSH, across_BWS = down_BSH.to(kind), across_BSW.to(kind).mT
    count, height, _, channels = images_BHWC.shape
    size = result_BSSC.shape[1]
    together = _TOGETHER if images_BHWC.device.type == "cpu" else count
    for first in range(0, count, together):
        some = slice(first, first + together)
        pixels_BHCW = images_BHWC[some].permute(0, 1, 3, 2).to(kind, memory_format=torch.contiguous_format)
        lines_BHS = torch.bmm(pixels_BHCW.flatten(1, 2), across_BWS[some])
        _round(lines_BHS, across_bits_B[some])
        scaled_BSS = torch.bmm(down_BSH[some], lines_BHS.view(-1, height, channels * size))
        _round(scaled_BSS, down_bits_B[some])
        # By way of 16 bits: torch's own step from float to 8 bits takes five times as long.
        result_BSSC[some] = scaled_BSS.to(torch.int16).view(-1, size, channels, size).transpose(2, 3)


def _round(sums_BHS: Tensor, bits_B: Tensor) -> None:
    """Divide by 2 ** bits and round half up to 0 … 255, in place."""
    sums_BHS.mul_(torch.exp2(-bits_B.to(sums_BHS.dtype))[:, None, None]).add_(0.5).floor_().clamp_(0, 255)


def _weights(
    starts_B: NDArray[np.int64],
    lengths_B: NDArray[np.int64],
    grids_B: NDArray[np.int64],
    places_B: NDArray[np.int64],
    side: int,
    size: int,
    device: torch.device,
    flips_B: NDArray[np.bool_] | None = None,
    *,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """Return weights (B, size, side) of the pixels of a line for each pixel of the window, times 2 ** bits_B; whole numbers.

    A triangle of half width 1, or that of the scale where the line is made smaller. In the type in which sums are exact.
    """
    longest = max(1.0, float((lengths_B / grids_B).max()))  # here and not on a GPU, which would be waited for
    flips_B = np.zeros(len(starts_B), bool) if flips_B is None else flips_B
    numbers = np.stack([starts_B, lengths_B, grids_B, places_B, flips_B.astype(np.int64)])
    first_B1, length_B1, grid_B1, place_B1, turned_B1 = to_device(torch.from_numpy(numbers), device)[..., None]
    scale_B1 = length_B1.double() / grid_B1
    taps = ceil(2 * longest) + 1
    steps_S = torch.arange(size, device=device) + 0.5
    at_BST, heights_BST = _triangles(
        place_B1 + torch.where(turned_B1 > 0, size - steps_S, steps_S), scale_B1, length_B1, taps
    )
    largest_B = heights_BST.amax((1, 2))
    if exact and (grids_B != size).any():  # It counts for all lines of an image.
        steps_G = torch.arange(int(grids_B.max()), device=device) + 0.5
        largest_B = _triangles(steps_G.minimum(grid_B1 - 0.5), scale_B1, length_B1, taps)[1].amax((1, 2))
    # The most bits after the point, up to 22, that leave the largest weight below 2 ** 15: 14 for a weight of 1.
    steps_T = torch.arange(1, (_MOST_BITS if exact else _FLOAT32_BITS) + 1, device=device)
    bits_B = ((largest_B[:, None] * torch.exp2(steps_T.double()) + 0.5).floor() < 2**15).sum(1)
    whole_BST = (heights_BST * torch.exp2(bits_B.double())[:, None, None] + 0.5).floor_()
    at_BST = (at_BST.long() + first_B1[..., None]).clamp_(max=side - 1)
    kind = torch.float64 if exact and longest > _EXACT_SCALE else torch.float32
    line_BSW = torch.zeros(len(starts_B), size, side, dtype=kind, device=device)
    return line_BSW.scatter_add_(2, at_BST, whole_BST.to(kind)), bits_B


def _triangles(steps_BS: Tensor, scale_B1: Tensor, length_B1: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """Return the pixels (B, S, T) around the places of a grid, and their weights (B, S, T), which sum to 1; float64."""
    reach_B1 = scale_B1.clamp(min=1)
    centres_BS = scale_B1 * steps_BS
    first_BS = (centres_BS - reach_B1 + 0.5).trunc().clamp(min=0)
    end_BS = torch.minimum((centres_BS + reach_B1 + 0.5).trunc(), length_B1.double())
    at_BST = first_BS[..., None] + torch.arange(taps, device=steps_BS.device)
    heights_BST = 1 - ((at_BST - centres_BS[..., None] + 0.5) / reach_B1[..., None]).abs()
    heights_BST = heights_BST.clamp_(min=0).masked_fill_(at_BST >= end_BS[..., None], 0)
    return at_BST, heights_BST.div_(heights_BST.sum(2, keepdim=True))


def blur(images_BCHW: Tensor, sigmas_B: Tensor) -> Tensor:
    """Return images of any float type blurred; pixels beyond an edge are those of the edge.

    Args:
        images_BCHW: on any device.
        sigmas_B: on the CPU, deviation of each image's Gaussian in pixels, above 0; the kernel ends after `REACH` pixels.
    """
    steps_T = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    # On the CPU and in float64, which not every device has.
    taps_BT = torch.exp(-0.5 * (steps_T / sigmas_B.double()[:, None]) ** 2)
    taps_BT = to_device((taps_BT / taps_BT.sum(1, keepdim=True)).to(images_BCHW.dtype), images_BCHW.device)
    count, channels, height, width = images_BCHW.shape
    across_BWW = _bands(taps_BT, width)
    down_BHH = across_BWW if height == width else _bands(taps_BT, height)
    # A copy: the result is written over it.
    lines_BHCW = images_BCHW.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    blurred_BHCW = torch.empty_like(lines_BHCW)
    lines_BLW, blurred_BLW = (lines.view(count, height * channels, width) for lines in (lines_BHCW, blurred_BHCW))
    for block, near in _blocks(width):
        torch.bmm(lines_BLW[..., near], across_BWW[:, block, near].mT, out=blurred_BLW[..., block])
    lines_BHP, blurred_BHP = (lines.view(count, height, channels * width) for lines in (lines_BHCW, blurred_BHCW))
    for block, near in _blocks(height):
        torch.bmm(down_BHH[:, block, near], blurred_BHP[:, near], out=lines_BHP[:, block])
    return lines_BHCW.transpose(1, 2)


def _blocks(side: int) -> list[tuple[slice, slice]]:
    """Return parts of a line, and the pixels that each of them is made from."""
    return [
        (slice(start, min(start + _BLOCK, side)), slice(max(0, start - REACH), start + _BLOCK + REACH))
        for start in range(0, side, _BLOCK)
    ]


def _bands(taps_BT: Tensor, side: int) -> Tensor:
    """Return matrices (B, side, side) that blur a line."""
    pixels_S = torch.arange(side, device=taps_BT.device)
    steps_T1 = torch.arange(-REACH, REACH + 1, device=taps_BT.device)[:, None]
    sources_TS1 = (pixels_S + steps_T1).clamp(0, side - 1)[..., None]
    places_TSS = (sources_TS1 == pixels_S).to(taps_BT)
    return (taps_BT @ places_TSS.flatten(1)).view(-1, side, side)
