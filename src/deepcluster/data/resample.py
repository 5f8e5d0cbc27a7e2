"""Images to other sizes, one by one (`resize`) or many crops at once (`resample`), and Gaussian blur of a batch.

The latter two are matrix products: on a processor for small images, on a GPU for any.
The result of `resample` is that of `resize`, bit for bit: both round the weights of a line to whole numbers, and the lines
between the two passes. Products and sums of such numbers are exact in float32, in any order and on any device (float32
products must be real ones, as is torch's default, and not TF32).
B batch, C channels, H and W sides of the images, S sides of the result, T taps of a kernel.
"""

from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import interpolate

# Up to here a line's largest weight is over 1/4, and has 16 bits after the point. With the 8 of a pixel they make the 24 of
# float32; smaller weights have more.
_EXACT_SCALE = 3.0
# Scaled together on a processor: what lies between the passes stays in its cache (32: 19 µs an image of 32 px, 256: 48).
_TOGETHER = 32
_MOST_BITS = 22
# Widths of the published blur in pixels, for crops of every size (SwAV, arXiv 2006.09882, blurs 224 and 96 px alike;
# SimCLR, arXiv 2002.05709, appendix A).
SIGMAS = (0.1, 2.0)
# Taps on either side: four times the largest width, where the Gaussian is 1/3000 of its height.
REACH = 8
# Lines are worked out this many pixels at a time, from these and their neighbours alone: products with whole bands of
# 224 pixels take 1.6 times as long, grouped convolutions 1.2 times (6 times at 32 px).
_BLOCK = 32


def resize(image_HWC: Tensor, size: tuple[int, int]) -> Tensor:
    """The image (H, W, 3) at `size`, its new height and width; (3, height, width), channels last in memory.

    The same as torchvision's `resize` of uint8 tensors with antialiasing. At its own size it is returned as it is.
    """
    # The batch of one is made before the channels are moved: its strides then say "channels last", and interpolate keeps
    # to that. Made after, it takes 1.5 times as long for the same pixels, most of it in moving them about.
    image_1CHW = image_HWC[None].permute(0, 3, 1, 2)
    if image_1CHW.shape[2:] == size:
        return image_1CHW[0]
    return interpolate(image_1CHW, size=size, mode="bilinear", antialias=True)[0]


def resample(images_BHCW: Tensor, boxes_B4: Tensor, size: tuple[int, int], flips_B: Tensor | None = None) -> Tensor:
    """The part of each image that its box names, scaled to `size` by antialiased bilinear interpolation; (B, S, C, S).

    Args:
        images_BHCW: uint8, row by row the planes of a colour, on any device.
        boxes_B4: top, left, height and width of each part, int64.
        size: height and width of the result.
        flips_B: which results are turned left to right; none where it is left out.
    """
    device = images_BHCW.device
    if not len(images_BHCW):
        return torch.empty(0, size[0], images_BHCW.shape[2], size[1], dtype=torch.uint8, device=device)
    top_B, left_B, height_B, width_B = boxes_B4.T
    across_BSW, across_bits_B = _weights(left_B, width_B, images_BHCW.shape[3], size[1], device, flips_B)
    down_BSH, down_bits_B = _weights(top_B, height_B, images_BHCW.shape[1], size[0], device)
    kind = down_BSH.dtype if across_BSW.dtype == torch.float32 else across_BSW.dtype
    across_BWS, down_BSH = across_BSW.to(kind).mT, down_BSH.to(kind)
    n_images, height, channels, width = images_BHCW.shape
    together = min(_TOGETHER, n_images) if device.type == "cpu" else n_images
    pixels_THW = torch.empty(together, height * channels, width, dtype=kind, device=device)
    lines_THS = torch.empty(together, height * channels, size[1], dtype=kind, device=device)
    scaled_TSS = torch.empty(together, size[0], channels * size[1], dtype=kind, device=device)
    result_BSCS = torch.empty(n_images, size[0], channels, size[1], dtype=torch.uint8, device=device)
    for first in range(0, n_images, together):
        some = slice(first, min(first + together, n_images))
        count = some.stop - first
        pixels_THW[:count] = images_BHCW[some].flatten(1, 2)
        torch.bmm(pixels_THW[:count], across_BWS[some], out=lines_THS[:count])
        _round(lines_THS[:count], across_bits_B[some])
        torch.bmm(down_BSH[some], lines_THS[:count].view(count, height, -1), out=scaled_TSS[:count])
        _round(scaled_TSS[:count], down_bits_B[some])
        # By way of 16 bits: torch's own step from float to 8 bits takes five times as long.
        result_BSCS[some] = scaled_TSS[:count].to(torch.int16).view_as(result_BSCS[some])
    return result_BSCS


def _round(sums_BHS: Tensor, bits_B: Tensor) -> None:
    """Divide by 2 ** bits and round half up to 0 … 255, in place."""
    sums_BHS.mul_(torch.exp2(-bits_B.to(sums_BHS.dtype))[:, None, None]).add_(0.5).floor_().clamp_(0, 255)


def _weights(
    starts_B: Tensor, lengths_B: Tensor, side: int, size: int, device: torch.device, flips_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights (B, size, side) of the pixels of a line for each pixel of the result, times 2 ** bits_B; whole numbers.

    A triangle of half width 1, or that of the scale where the line is made smaller. In the type in which sums are exact.
    """
    longest = max(1.0, float(lengths_B.max()) / size)  # here and not on a GPU, which would be waited for
    starts_B, lengths_B = starts_B.to(device), lengths_B.to(device)
    scale_B1 = (lengths_B.double() / size)[:, None]
    reach_B1 = scale_B1.clamp(min=1)
    steps_S = torch.arange(size, device=device) + 0.5
    turned_BS = steps_S if flips_B is None else torch.where(flips_B.to(device)[:, None], size - steps_S, steps_S)
    centres_BS = scale_B1 * turned_BS
    first_BS = (centres_BS - reach_B1 + 0.5).trunc().clamp(min=0)
    end_BS = torch.minimum((centres_BS + reach_B1 + 0.5).trunc(), lengths_B[:, None].double())
    at_BST = first_BS[..., None] + torch.arange(ceil(2 * longest) + 1, device=device)
    heights_BST = 1 - ((at_BST - centres_BS[..., None] + 0.5) / reach_B1[..., None]).abs()
    heights_BST = heights_BST.clamp_(min=0).masked_fill_(at_BST >= end_BS[..., None], 0)
    heights_BST /= heights_BST.sum(2, keepdim=True)
    # The most bits after the point, up to 22, that leave the largest weight below 2 ** 15: 14 for a weight of 1.
    steps_T = torch.arange(1, _MOST_BITS + 1, device=device)
    fits_BT = (heights_BST.amax((1, 2))[:, None] * torch.exp2(steps_T.double()) + 0.5).floor() < 2**15
    bits_B = fits_BT.sum(1)
    whole_BST = (heights_BST * torch.exp2(bits_B.double())[:, None, None] + 0.5).floor_()
    at_BST = (at_BST.long() + starts_B[:, None, None]).clamp_(max=side - 1)
    kind = torch.float32 if longest <= _EXACT_SCALE else torch.float64
    line_BSW = torch.zeros(len(starts_B), size, side, dtype=kind, device=device)
    return line_BSW.scatter_add_(2, at_BST, whole_BST.to(kind)), bits_B


def blur(images_BCHW: Tensor, sigmas_B: Tensor) -> Tensor:
    """The images, of any float type, blurred; pixels beyond an edge are those of the edge.

    Args:
        images_BCHW: on any device.
        sigmas_B: deviation of each image's Gaussian in pixels, above 0; the kernel ends after `REACH` pixels.
    """
    steps_T = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    # On the CPU and in float64, which not every device has.
    taps_BT = torch.exp(-0.5 * (steps_T / sigmas_B.cpu().double()[:, None]) ** 2)
    taps_BT = (taps_BT / taps_BT.sum(1, keepdim=True)).to(images_BCHW)
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
    """Parts of a line, and the pixels that each of them is made from."""
    return [
        (slice(start, min(start + _BLOCK, side)), slice(max(0, start - REACH), start + _BLOCK + REACH))
        for start in range(0, side, _BLOCK)
    ]


def _bands(taps_BT: Tensor, side: int) -> Tensor:
    """Matrices (B, side, side) that blur a line."""
    pixels_S = torch.arange(side, device=taps_BT.device)
    steps_T1 = torch.arange(-REACH, REACH + 1, device=taps_BT.device)[:, None]
    sources_TS1 = (pixels_S + steps_T1).clamp(0, side - 1)[..., None]
    places_TSS = (sources_TS1 == pixels_S).to(taps_BT)
    return (taps_BT @ places_TSS.flatten(1)).view(-1, side, side)
