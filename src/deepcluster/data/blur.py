"""Gaussian blur of a batch, each image with a width of its own, as matrix products on any device.

B images, C channels, H and W their sides, T taps of a kernel.
"""

import torch
from torch import Tensor

# Widths of the published blur in pixels, for crops of every size (SwAV, arXiv 2006.09882, blurs 224 and 96 px alike;
# SimCLR, arXiv 2002.05709, appendix A).
SIGMAS = (0.1, 2.0)
# Taps on either side: four times the largest width, where the Gaussian is 1/3000 of its height.
REACH = 8
# Lines are worked out this many pixels at a time, from these and their neighbours alone: products with whole bands of
# 224 pixels take 1.6 times as long, grouped convolutions 1.2 times (6 times at 32 px).
_BLOCK = 32


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
