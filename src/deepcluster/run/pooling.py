"""A stage's map as one row of numbers: its average, or pooled to at most 9,600 numbers, as linear probes and SVMs use it.

B batch, C channels, D features, G side of the pooled map, H and W pixels.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

# Section 4.2 of the paper and its published script: how many numbers of a stage a linear classifier is given.
MOST_NUMBERS = 9_600
# Kernel, stride and padding by channels and side of AlexNet's maps at 224 px: 9,600, 9,216, 9,600 and 9,216 numbers.
PUBLISHED = {(96, 55): (6, 6, 3), (256, 27): (4, 4, 0), (384, 13): (3, 3, 1), (256, 13): (2, 2, 0)}
KINDS = ("average", "pooled")


@dataclass(frozen=True)
class Pooled:
    """A stage, and how its map becomes a row: `average` over its pixels, or `pooled` to at most 9,600 numbers."""

    stage: str
    kind: str = "average"

    def rows(self, map_BCHW: Tensor) -> Tensor:
        """Return rows (B, D) of maps."""
        return pool(map_BCHW) if self.kind == "pooled" else map_BCHW.mean(dim=(2, 3))


def pool(map_BCHW: Tensor) -> Tensor:
    """Return rows (B, C·G·G) of at most 9,600 numbers, with the largest such G; above 9,600 channels G is 1.

    AlexNet's maps at 224 px are pooled as by the published script, which counts the zeros of the padding.
    """
    _, channels, height, width = map_BCHW.shape
    if height == width and (channels, height) in PUBLISHED:
        kernel, stride, padding = PUBLISHED[channels, height]
        return avg_pool2d(map_BCHW, kernel, stride, padding).flatten(1)
    side = max(1, int((MOST_NUMBERS / channels) ** 0.5))
    return adaptive_avg_pool2d(map_BCHW, (min(side, height), min(side, width))).flatten(1)
