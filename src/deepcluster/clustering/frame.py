"""The origin and the unit in which any numbers are float32 points: far from the origin, huge and tiny ones, too.

float32 has 24 significant bits, and squares of numbers above 1e19 or below 1e-23 do not fit it. So float64 points are
centred before they are rounded, and points of an unusual size are scaled by a power of two, which rounds nothing. float32
points of a usual size stay as they are, without a copy.

N points on this rank, R rows, P components.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.clustering.parallel import map_blocks, row_blocks
from deepcluster.core.errors import InputError

# Numbers from 2^-20 to 2^20 are points as they are: sums of their fourth powers fit float32 (`BalancedKMeans` makes these).
LEAST_EXPONENT, MOST_EXPONENT = -20, 20
# 2^1000: a float64 scale that the smallest numbers do not exceed.
LARGEST_SCALE_EXPONENT = 1000


@dataclass(frozen=True)
class Frame:
    """What makes rows float32 points: `point = (row - offset_P) · scale`.

    Attributes:
        offset_P: float64; None: zeros.
        scale: a power of two.
    """

    offset_P: Tensor | None = None
    scale: float = 1.0

    @classmethod
    def around(cls, offset_P: Tensor | None, largest: float) -> "Frame":
        """Return the frame of rows that are at most `largest` away from `offset_P`, in each component.

        Raises:
            InputError: not even float64 holds that.
        """
        if not math.isfinite(largest):
            raise InputError("points are too far apart for float64 (over 1e308); scale them down")
        exponent = math.frexp(largest)[1]
        if not largest or LEAST_EXPONENT <= exponent <= MOST_EXPONENT:
            return cls(offset_P)
        return cls(offset_P, 2.0 ** min(MOST_EXPONENT - 1 - exponent, LARGEST_SCALE_EXPONENT))

    @property
    def is_identity(self) -> bool:
        """True where float32 rows are points as they are."""
        return self.offset_P is None and self.scale == 1

    def points(self, rows_RP: Tensor) -> Tensor:
        """Return the rows as float32 points; float32 rows themselves if nothing changes."""
        if self.is_identity:
            return rows_RP.float()
        points_RP = torch.empty(rows_RP.shape, device=rows_RP.device)

        def work(block: slice) -> None:
            centred = rows_RP[block].double() if self.offset_P is None else rows_RP[block] - self.offset_P
            points_RP[block] = centred * self.scale

        map_blocks(work, row_blocks(rows_RP), rows_RP.device)
        return points_RP

    def rows(self, points_RP: Tensor) -> Tensor:
        """Return points as rows, in float64 unless nothing changes."""
        rows_RP = self.lengths(points_RP)
        return rows_RP if self.offset_P is None else rows_RP + self.offset_P.to(rows_RP.device)

    def lengths(self, lengths: Tensor, *, power: int = 1) -> Tensor:
        """Return distances between points, or a power of them, as those between rows."""
        if self.is_identity:
            return lengths
        lengths = lengths.double()
        for _ in range(power):
            lengths = lengths / self.scale
        return lengths


def check_table(rows_NP: Tensor) -> Tensor:
    """Return a table of floating numbers, without gradients: whole numbers become float64.

    Raises:
        InputError: it is something else, or has no columns.
    """
    if not isinstance(rows_NP, Tensor):
        raise InputError(f"points are a {type(rows_NP).__name__}, not a tensor; `fit` takes other arrays, too")
    if rows_NP.layout != torch.strided or rows_NP.is_quantized or rows_NP.is_meta:
        raise InputError("points must be a dense tensor of numbers; sparse ones become so by `to_dense()`")
    if rows_NP.is_complex():
        raise InputError("complex numbers are not taken; their real and imaginary parts, as columns, are")
    shape = (*rows_NP.shape,)
    if rows_NP.dim() != 2:
        raise InputError(
            f"points of shape {shape} are no table of rows and columns: reshape one column to (-1, 1), one row to (1, -1)"
        )
    if not shape[1]:
        raise InputError(f"points of shape {shape} have no columns")
    return rows_NP.detach() if rows_NP.is_floating_point() else rows_NP.detach().double()


def finite_rows(rows_NP: Tensor) -> tuple[Tensor, float]:
    """Return a mask (N) of the rows whose values are all finite, and the largest absolute value of these rows."""
    finite_N = torch.empty(len(rows_NP), dtype=torch.bool, device=rows_NP.device)

    def check(block: slice) -> Tensor:
        largest_B = _wide(rows_NP[block]).abs().amax(dim=1)
        finite_N[block] = torch.isfinite(largest_B)
        return torch.where(finite_N[block], largest_B, 0).amax()

    return finite_N, _largest(map_blocks(check, row_blocks(rows_NP), rows_NP.device))


def largest_value(rows_RP: Tensor, offset_P: Tensor | None = None) -> float:
    """Return the largest absolute value of rows, relative to an offset; values that are not finite do not count."""

    def measure(block: slice) -> Tensor:
        rows = _wide(rows_RP[block])
        away = (rows if offset_P is None else rows - offset_P).abs()
        return torch.where(rows.isfinite(), away, 0).amax()

    return _largest(map_blocks(measure, row_blocks(rows_RP), rows_RP.device))


def _wide(rows_RP: Tensor) -> Tensor:
    return rows_RP if rows_RP.dtype == torch.float64 else rows_RP.float()


def _largest(parts: list[Tensor]) -> float:
    return float(torch.stack(parts).amax()) if parts else 0.0
