"""Crops of many images at once, scaled as matrix products: on a processor for small images, on a GPU for any.

The result is that of `resize`, bit for bit: both round the weights of a line to whole numbers, and the lines between the two
passes. Products and sums of such numbers are exact in float32, in any order and on any device (float32 products must be
real ones, as is torch's default, and not TF32).
B batch, C channels, H and W sides of the images, S sides of the result.
"""

from math import ceil

import torch
from torch import Tensor

# Up to here a line's largest weight is over 1/4, and has 16 bits after the point. With the 8 of a pixel they make the 24 of
# float32; smaller weights have more.
_EXACT_SCALE = 3.0
# Scaled together on a processor: what lies between the passes stays in its cache (32: 19 µs an image of 32 px, 256: 48).
_TOGETHER = 32
_MOST_BITS = 22


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
    centres_BS = scale_B1 * (
        steps_S if flips_B is None else torch.where(flips_B.to(device)[:, None], size - steps_S, steps_S)
    )
    first_BS = (centres_BS - reach_B1 + 0.5).trunc().clamp(min=0)
    end_BS = torch.minimum((centres_BS + reach_B1 + 0.5).trunc(), lengths_B[:, None].double())
    at_BST = first_BS[..., None] + torch.arange(ceil(2 * longest) + 1, device=device)
    heights_BST = 1 - ((at_BST - centres_BS[..., None] + 0.5) / reach_B1[..., None]).abs()
    heights_BST = heights_BST.clamp_(min=0).masked_fill_(at_BST >= end_BS[..., None], 0)
    heights_BST /= heights_BST.sum(2, keepdim=True)
    bits_B = _bits(heights_BST.amax((1, 2)))
    whole_BST = (heights_BST * torch.exp2(bits_B.double())[:, None, None] + 0.5).floor_()
    at_BST = (at_BST.long() + starts_B[:, None, None]).clamp_(max=side - 1)
    kind = torch.float32 if longest <= _EXACT_SCALE else torch.float64
    line_BSW = torch.zeros(len(starts_B), size, side, dtype=kind, device=device)
    return line_BSW.scatter_add_(2, at_BST, whole_BST.to(kind)), bits_B


def _bits(largest_B: Tensor) -> Tensor:
    """The most bits after the point, up to 22, that leave the largest weight below 2 ** 15: 14 for a weight of 1."""
    steps_T = torch.arange(1, _MOST_BITS + 1, device=largest_B.device)
    fits_BT = (largest_B[:, None] * torch.exp2(steps_T.double()) + 0.5).floor() < 2**15
    return fits_BT.sum(1)
