"""Where the cells of a map lie in an image of any size: classes of cells from pixels, values of pixels from cells.

C classes, H and W pixels of the image at its own size, I and J rows and columns of the map.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.evaluation.datasets.dense import IGNORED
from deepcluster.models.geometry import Geometry

# A cell of which a smaller share lies on labelled pixels has no class: rounding, or the corner of a pixel.
LEAST_SHARE = 1e-3
# Rows of pixels that stay in a processor's cache, with the values of some hundred classes.
ROWS = 4


@dataclass(frozen=True)
class Axis:
    """The cells of a map along one axis of an image.

    Attributes:
        geometry: stride and offset of the cells in the scaled image.
        cells: number of cells.
        pixels: of the image at its own size.
        scaled: of the scaled image.
    """

    geometry: Geometry
    cells: int
    pixels: int
    scaled: int

    def overlaps(self) -> Tensor:
        """Return the length of each pixel of the image that lies in the square of each cell (cells, pixels), float64."""
        ratio, stride = self.scaled / self.pixels, self.geometry.stride
        first = self.geometry.offset + 0.5 - stride / 2
        starts_I1 = ((first + stride * torch.arange(self.cells, dtype=torch.float64)) / ratio)[:, None]
        edges_H = torch.arange(self.pixels, dtype=torch.float64)
        return (torch.minimum(starts_I1 + stride / ratio, edges_H + 1) - torch.maximum(starts_I1, edges_H)).clamp_(min=0)

    def positions(self) -> Tensor:
        """Return the position of each pixel in cells (pixels,), float64; those beyond the outermost cells are at these."""
        centres_H = (torch.arange(self.pixels, dtype=torch.float64) + 0.5) * (self.scaled / self.pixels) - 0.5
        return ((centres_H - self.geometry.offset) / self.geometry.stride).clamp_(0, self.cells - 1)


def shares(mask_HW: NDArray[np.uint8], axes: tuple[Axis, Axis], n_classes: int) -> Tensor:
    """Return the share of each class among the labelled pixels of each cell's square (I·J, C), float32.

    The square has the side of the stride, around the centre of the cell; pixels count by their area in it. Rows of cells
    without labelled pixels are zeros.
    """
    down_IH, across_JW = (axis.overlaps() for axis in axes)
    areas_NC = torch.zeros(len(down_IH) * len(across_JW), n_classes, dtype=torch.float64)
    for number in np.unique(mask_HW).tolist():
        if number != IGNORED:
            of_class_HW = torch.from_numpy(mask_HW == number).double()
            areas_NC[:, number] = (down_IH @ of_class_HW @ across_JW.T).flatten()
    totals_N1 = areas_NC.sum(1, keepdim=True)
    whole = 1.0
    for axis in axes:
        whole *= axis.geometry.stride * axis.pixels / axis.scaled
    return torch.where(totals_N1 > LEAST_SHARE * whole, areas_NC / totals_N1, 0).float()


def inside(axes: tuple[Axis, Axis]) -> Tensor:
    """Return whether the square of each cell (I·J,) overlaps the image: cells may lie in the padding."""
    down_I, across_J = (axis.overlaps().sum(1) > LEAST_SHARE for axis in axes)
    return (down_I[:, None] & across_J).flatten()


def upsampled(values_IJC: Tensor, axes: tuple[Axis, Axis]) -> Iterator[Tensor]:
    """Yield values at the pixels of the image, a few rows (rows, W, C) at a time.

    They are linear between the centres of cells and constant beyond the outermost ones.
    """
    (above_H, below_H, weights_H), (left_W, right_W, weights_W) = (_neighbours(axis, values_IJC) for axis in axes)
    step = ROWS if values_IJC.device.type == "cpu" else axes[0].pixels
    for first in range(0, axes[0].pixels, step):
        some = slice(first, first + step)
        upper, lower = values_IJC.index_select(0, above_H[some]), values_IJC.index_select(0, below_H[some])
        lines = torch.lerp(upper, lower, weights_H[some, None, None])
        yield torch.lerp(lines.index_select(1, left_W), lines.index_select(1, right_W), weights_W[:, None])


def _neighbours(axis: Axis, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cell before each pixel, the one after it, and the weight of the latter; on the device of the values."""
    positions = axis.positions()
    lower = positions.floor().long()
    upper = (lower + 1).clamp_(max=axis.cells - 1)
    return lower.to(values.device), upper.to(values.device), (positions - lower).to(values)


def nearest_cells(axes: tuple[Axis, Axis]) -> Tensor:
    """Return the cell (0 … I·J - 1) nearest to each pixel (H, W); the lower one of two equally near."""
    rows_H, columns_W = ((axis.positions() - 0.5).ceil().clamp_(min=0).long() for axis in axes)
    return rows_H[:, None] * axes[1].cells + columns_W
