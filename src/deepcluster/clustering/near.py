"""Sets of rows that are nearly the same, exactly: blocks of float32 products rule out nearly all pairs.

N rows, P components, R rows of a block, C columns of a step, E pairs.

Rows are sorted by their projection on one direction, which never makes a distance longer: a block is compared only with
rows whose projections are near enough. The product of centred rows bounds each pair's -d²/2 from above; the distances of
the few pairs that may be near are computed from the differences, which do not cancel. Memory is that of a copy of the rows.
"""

import threading
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.coarse import FLOAT32_ROUNDING
from deepcluster.clustering.parallel import blocks_of, map_blocks, row_blocks
from deepcluster.core.device import true_float32
from deepcluster.core.errors import InputError
from deepcluster.core.work import Advance, no_advance

# Two images are near-duplicates below this share of the typical distance of two images. Measured with copies of 120 of 1,000
# photos (the same bytes, half the size, saved again with quality 70): with the clusters of a trained run the farthest copy
# lay at 0.025, the two nearest of 5,300 different photos at 0.137; with its embeddings at 0.013 and 0.045; with those of an
# untrained network at 0.054 (112 of 120 below 0.04) and 0.175. With 8 px cut off each side one of 40 lies below 0.04.
NEAR_SHARE: Final = 0.04
# Rows of a block, and columns of a step: their products stay in the processor's cache. A GPU wants more.
BLOCK_ROWS, STEP_COLUMNS, STEP_COLUMNS_GPU = 1024, 2048, 1 << 16
# Blocks per thread and report of progress.
BLOCKS_AT_ONCE = 4
# Pairs whose differences are squared at once, and those that are kept before their sets are joined.
PAIRS_AT_ONCE, MOST_PAIRS = 4096, 1 << 20


def typical_distance(points_MP: NDArray[np.float32]) -> float:
    """Return the root mean squared distance of two points drawn at random: √2 times their spread about the mean."""
    if len(points_MP) == 0:
        return 0.0
    blocks = [points_MP[rows] for rows in blocks_of(slice(0, len(points_MP)), BLOCK_ROWS)]
    mean_P = sum(block.sum(axis=0, dtype=np.float64) for block in blocks) / len(points_MP)
    squared = sum(float(np.square(block - mean_P).sum()) for block in blocks)
    return float(np.sqrt(2 * squared / len(points_MP)))


def near_sets(rows_NP: Tensor, radius: float, *, advance: Advance = no_advance) -> NDArray[np.int64]:
    """Return the number of the set of each row: rows are in one set if steps of at most `radius` lead from one to the other.

    The result is that of comparing all float32 Euclidean distances with `radius`, whatever the blocks and threads.

    Args:
        rows_NP: finite rows of floating numbers.
        radius: largest distance of a step.
        advance: called with the number of rows done since the last call; may raise to stop.

    Returns:
        set_N: numbers from 0, in the order of the first row of each set.

    Raises:
        InputError: not a table, a negative radius, or a value that is not finite or too large to be squared.
    """
    if rows_NP.ndim != 2 or not radius >= 0:
        raise InputError(f"rows {(*rows_NP.shape,)} must be a table, and radius={radius} a distance")
    rows_NP = rows_NP.detach().float()
    for rows in row_blocks(rows_NP):
        bad = (~torch.isfinite((2 * rows_NP[rows]).square_().sum(dim=1))).nonzero()
        if len(bad):
            raise InputError(
                f"row {rows.start + int(bad[0])} is not finite, or too large to be squared; leave such rows out"
            )
    if len(rows_NP) < 2:
        return np.arange(len(rows_NP))
    search, done, counted = _Search(rows_NP, radius), 0, 0
    blocks = blocks_of(slice(0, len(rows_NP)), BLOCK_ROWS)
    sizes = [(search.end_of(block) - block.start) * (block.stop - block.start) for block in blocks]
    at_once = BLOCKS_AT_ONCE * torch.get_num_threads()
    with true_float32():
        for first in range(0, len(blocks), at_once):
            map_blocks(search.compare, blocks[first : first + at_once], rows_NP.device)
            done += sum(sizes[first : first + at_once])
            advance(-counted + (counted := len(rows_NP) * done // sum(sizes)))
    return search.sets()


class _Search:
    """Compares blocks of rows with the rows at and after them, in the order of their projections."""

    def __init__(self, rows_NP: Tensor, radius: float) -> None:
        self.rows_NP, self.radius, size = rows_NP, radius, rows_NP.shape[1]
        centre_P = rows_NP.mean(dim=0)
        along_N = _projections(rows_NP, centre_P)
        self.order_N = along_N.argsort(stable=True)
        self.along_N, self.rank_of = along_N[self.order_N], self.order_N.cpu().numpy()
        self.centred_NP = rows_NP[self.order_N].sub_(centre_P)
        # Share of |x|² + |y|² by which float32 arithmetic may change a bound or a distance; generous.
        error = (2 * size + 32) * FLOAT32_ROUNDING
        squared_N = torch.cat([self.centred_NP[rows].square().sum(dim=1) for rows in row_blocks(rows_NP)])
        self.offsets_N = squared_N * (0.5 - error)
        self.limit = torch.tensor(radius, dtype=torch.float32).square()
        # How far apart projections of near rows may be: those have rounding errors, too.
        self.reach = radius * (1 + error) + float(squared_N.max()) ** 0.5 * 4 * error
        self.step = STEP_COLUMNS_GPU if rows_NP.is_cuda else STEP_COLUMNS
        self._sets = _Sets(len(rows_NP))

    def end_of(self, block: slice) -> int:
        """Return the end of the rows that are compared with those of a block."""
        return int(torch.searchsorted(self.along_N, self.along_N[block.stop - 1] + self.reach, right=True))

    def compare(self, block: slice) -> None:
        """Join the sets of near rows of a block, and of near ones after it."""
        offsets_R = self.offsets_N[block] - self.limit / 2
        for columns in blocks_of(slice(block.start, self.end_of(block)), self.step):
            bounds_RC = torch.addmm(self.offsets_N[columns], self.centred_NP[block], self.centred_NP[columns].T, beta=-1)
            hit = (bounds_RC.amax(dim=1) >= offsets_R).nonzero()[:, 0]
            if not len(hit):
                continue
            row_E, column_E = (bounds_RC[hit] >= offsets_R[hit, None]).nonzero().unbind(dim=1)
            pairs_E2 = torch.stack([hit[row_E] + block.start, column_E + columns.start], dim=1)
            pairs_E2 = pairs_E2[pairs_E2[:, 0] < pairs_E2[:, 1]]
            pairs_E2 = pairs_E2[torch.from_numpy(self._sets.are_apart(pairs_E2.cpu().numpy())).to(pairs_E2.device)]
            for some in pairs_E2.split(PAIRS_AT_ONCE):
                ends = (self.rows_NP[self.order_N[some[:, side]]] for side in (0, 1))
                near = torch.sub(*ends).square_().sum(dim=1) <= self.limit
                self._sets.join(some[near].cpu().numpy())

    def sets(self) -> NDArray[np.int64]:
        """Return the number of the set of each row, in the order of the rows that were given."""
        set_N = np.empty(len(self.rank_of), np.int64)
        set_N[self.rank_of] = self._sets.finished()
        _, first, set_N = np.unique(set_N, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[set_N]


class _Sets:
    """Sets that pairs join, in any order and from several threads; few pairs are kept at a time."""

    def __init__(self, count: int) -> None:
        self._set_N = np.arange(count)
        self._pairs: list[NDArray[np.int64]] = []
        self._kept = 0
        self._lock = threading.Lock()

    def are_apart(self, pairs_E2: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which pairs are not known to be in one set."""
        first_E, second_E = self._set_N[pairs_E2].T
        apart_E: NDArray[np.bool_] = first_E != second_E
        return apart_E

    def join(self, pairs_E2: NDArray[np.int64]) -> None:
        """Join the sets of the ends of each pair."""
        with self._lock:
            self._pairs.append(pairs_E2)
            self._kept += len(pairs_E2)
            if self._kept > MOST_PAIRS:
                self._join()

    def finished(self) -> NDArray[np.int64]:
        """Return the set of each row."""
        self._join()
        return self._set_N

    def _join(self) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        ends = self._set_N[np.concatenate([np.zeros((0, 2), np.int64), *self._pairs])].T
        graph = coo_array((np.ones(ends.shape[1], np.int8), tuple(ends)), shape=(len(self._set_N),) * 2)
        self._set_N = connected_components(graph, directed=False)[1].astype(np.int64)[self._set_N]
        self._pairs, self._kept = [], 0


def _projections(rows_NP: Tensor, centre_P: Tensor) -> Tensor:
    """Return projections (N), float64, of centred rows on the direction of unit length in which they differ most."""
    products_PP = torch.zeros(rows_NP.shape[1], rows_NP.shape[1], dtype=torch.float64, device=rows_NP.device)
    for rows in row_blocks(rows_NP):
        centred = rows_NP[rows].sub(centre_P)
        products_PP += (centred.T @ centred).double()
    direction_P = torch.linalg.eigh(products_PP).eigenvectors[:, -1]
    return torch.cat([rows_NP[rows].sub(centre_P).double() @ direction_P for rows in row_blocks(rows_NP)])
