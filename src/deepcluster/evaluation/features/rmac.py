"""R-MAC: a descriptor of an image from the maxima of a map in square regions (Tolias, Sicre and Jégou, ICLR 2016).

N images, R regions, C channels, H and W pixels of the map, P numbers after PCA, L levels.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.whitening import Whitening

# Section 3.2 of the paper: the share that neighbouring regions should have in common; and the authors' program, which tries
# up to this many more regions along the longer side than along the shorter.
OVERLAP = Fraction(2, 5)
MOST_EXTRA = 6


@dataclass(frozen=True)
class Level:
    """Square regions of one side, at every pair of these first rows and first columns."""

    side: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)


@lru_cache(maxsize=4096)
def region_levels(height: int, width: int, levels: int) -> tuple[Level, ...]:
    """Return the regions of a map, level by level.

    At level l regions have the side 2 · min(H, W) / (l + 1), rounded down; l of them lie along the shorter side of the map
    and l + m along the longer, spread evenly from edge to edge. m is 0 for a square map; otherwise the number from 1 to 6
    for which the overlap of two neighbours of level 1 is nearest to 40 % (the smaller of two equally near). A level whose
    side is 0 is left out. There is no region of the whole map, unless it is square.
    """
    shorter, longer = sorted((height, width))
    extra = 0 if height == width else min(range(1, MOST_EXTRA + 1), key=lambda more: _distance(shorter, longer, more))
    found = []
    for level in range(1, levels + 1):
        side = 2 * shorter // (level + 1)
        if side:
            tops = _starts(height, side, level + extra * (height > width))
            lefts = _starts(width, side, level + extra * (width > height))
            found.append(Level(side, tops, lefts))
    return tuple(found)


def _distance(shorter: int, longer: int, extra: int) -> Fraction:
    """Return how far the overlap of `extra` + 1 squares along the longer side is from the desired one."""
    return abs(1 - Fraction(longer - shorter, extra * shorter) - OVERLAP)


def _starts(length: int, side: int, count: int) -> tuple[int, ...]:
    """Return where `count` regions begin along a side: evenly, rounded down; the last ends exactly at the edge."""
    return tuple(number * (length - side) // max(1, count - 1) for number in range(count))


def region_vectors(map_CHW: Tensor, levels: int) -> Tensor:
    """Return the maximum of each channel in each region: rows (R, C) of unit length, float32, level by level, row by row."""
    rows = []
    for level in region_levels(*map_CHW.shape[1:], levels):
        # Regions side by side share the maxima over rows.
        across_TCW = torch.stack([map_CHW[:, top : top + level.side].amax(1) for top in level.tops])
        rows.append(
            torch.stack([across_TCW[:, :, left : left + level.side].amax(2) for left in level.lefts], 1).flatten(0, 1)
        )
    return normalize(torch.cat(rows).float(), dim=1)


def aggregate(rows_RC: Tensor, counts_N: Tensor, whitening: Whitening) -> Tensor:
    """Return descriptors (N, P) of unit length: region vectors whitened, scaled to unit length, and summed per image.

    Args:
        rows_RC: the regions of all images, one image after the other.
        counts_N: number of regions of each image; the descriptor of an image without regions is zero.
        whitening: learned on regions of other images, with `unit_rows`.
    """
    image_R = torch.repeat_interleave(torch.arange(len(counts_N)), counts_N).to(rows_RC.device)
    points_RP = whitening.transform(rows_RC.float())
    sums_NP = torch.zeros(len(counts_N), points_RP.shape[1], device=rows_RC.device)
    return normalize(sums_NP.index_add_(0, image_R, points_RP), dim=1)
