"""What a clusterer works on: the finite rows of all ranks as float32 points, and the way back to the rows of the user.

N rows on this rank, F of them finite, T finite rows of all W ranks, P components, K clusters.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.assignment import UNASSIGNED, Assignment
from deepcluster.clustering.frame import Frame, check_table, finite_rows, largest_value
from deepcluster.clustering.starts import STARTS, number_points, rows_of
from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError, did_you_mean

# The offset of float64 rows is the median of this many: like the rows, and not moved by a few outliers.
SAMPLED_ROWS = 1024
NO_ROWS = "there are no points: the table has no rows"


# The name of a start, or centroids (K, P) as a tensor or array.
Init = str | Tensor | NDArray[Any] | list[list[float]]


@dataclass(frozen=True)
class Points:
    """The points of one clustering.

    Attributes:
        points_FP: float32, contiguous, finite.
        finite_N: the rows that they are.
        n_all: T.
        frame: what made them points; the same on all ranks.
    """

    points_FP: Tensor
    finite_N: Tensor
    n_all: int
    frame: Frame

    @classmethod
    def of(cls, rows_NP: Tensor, ranks: Ranks, *, unit_rows: bool = False) -> "Points":
        """Return the points of the rows of all ranks; how the rows are split changes nothing.

        Args:
            rows_NP: of any type of numbers. Rows that are not finite are left out.
            ranks: the processes over which the rows are split.
            unit_rows: scale the points to unit length; then they have no frame.

        Raises:
            InputError: not a table of numbers with a column; no finite row on any rank.
        """
        rows_NP = check_table(rows_NP)
        finite_N, largest = finite_rows(rows_NP)
        together_W2 = ranks.gather(torch.tensor([[int(finite_N.sum()), largest]], dtype=torch.float64))
        n_all, largest = int(together_W2[:, 0].sum()), float(together_W2[:, 1].max())
        if not n_all:
            raise InputError(
                f"there are no points: none of the {len(rows_NP):,} rows is finite" if len(rows_NP) else NO_ROWS
            )
        rows_FP = rows_NP if bool(finite_N.all()) else rows_NP[finite_N]
        offset_P = None
        if rows_FP.dtype == torch.float64 and not unit_rows:
            offset_P = _median(rows_FP, ranks)
            own = torch.tensor([largest_value(rows_FP, offset_P)], dtype=torch.float64)
            largest = float(ranks.gather(own).max())
        frame = Frame.around(offset_P, largest)
        if not unit_rows:
            return cls(frame.points(rows_FP).contiguous(), finite_N, n_all, frame)
        if rows_FP.dtype == torch.float64:
            return cls(normalize(rows_FP * frame.scale).float().contiguous(), finite_N, n_all, Frame())
        return cls(normalize(frame.points(rows_FP).contiguous()), finite_N, n_all, Frame())

    def assignment(self, found: Assignment) -> Assignment:
        """Return the assignment of all N rows, in their own numbers, given that of the F points; on the CPU."""
        finite_N, frame = self.finite_N.cpu(), self.frame
        distances_F = frame.lengths(found.distances_N.cpu())
        labels_N, distances_N = torch.full(finite_N.shape, UNASSIGNED), distances_F.new_full(finite_N.shape, torch.nan)
        labels_N[finite_N], distances_N[finite_N] = found.labels_N.cpu(), distances_F
        supers_SP = found.super_centroids_SP
        return replace(
            found,
            labels_N=labels_N,
            distances_N=distances_N,
            centroids_KP=frame.rows(found.centroids_KP.cpu()),
            inertia_history=tuple(inertia / frame.scale / frame.scale for inertia in found.inertia_history),
            super_centroids_SP=None if supers_SP is None else frame.rows(supers_SP.cpu()),
        )


def checked_init(init: Init, n_clusters: int, points: Points) -> str | Tensor:
    """Return the name of a start, or the centroids to start from, in the frame of the points.

    Raises:
        InputError: an unknown name, or no table of K finite rows with the columns of the points.
    """
    if isinstance(init, str):
        if init not in STARTS:
            hint = did_you_mean(init, STARTS)
            raise InputError(f"unknown init {init!r}{hint}: use one of {', '.join(STARTS)}, or an array of centroids")
        return init
    try:
        start_KP = init if isinstance(init, Tensor) else torch.from_numpy(np.array(init))
    except (TypeError, ValueError):
        raise InputError(f"init must be one of {', '.join(STARTS)}, or an array of centroids") from None
    shape = n_clusters, points.points_FP.shape[1]
    if start_KP.shape != shape:
        raise InputError(f"init has shape {(*start_KP.shape,)}, not {shape}")
    start_KP = check_table(start_KP).to(points.points_FP.device)
    if not bool(start_KP.isfinite().all()):
        raise InputError("init holds numbers that are not finite")
    return points.frame.points(start_KP)


def _median(rows_FP: Tensor, ranks: Ranks) -> Tensor:
    """Return the median of some rows, evenly spaced over those of all ranks: the same however they are split."""
    first, n_all = number_points(len(rows_FP), ranks)
    count = min(n_all, SAMPLED_ROWS)
    return rows_of(rows_FP, first, torch.arange(count) * n_all // count, ranks).median(dim=0).values
