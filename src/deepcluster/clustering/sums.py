"""Sums of the points of each cluster that do not depend on the order of summation.

N points on this rank, R of them, P components, K clusters.
"""

import torch
from torch import Tensor

from deepcluster.clustering.parallel import BLOCK_ROWS, blocks_of, map_blocks
from deepcluster.core.distributed import Ranks


class ExactSums:
    """Sums of the points of each cluster, without any rounding: the order of points, threads and ranks does not matter.

    Points are rounded to a grid so fine (2^-51 of the largest possible sum; some 2^-30 of a number of usual size) that
    sums of its multiples are integers of at most 53 bits. So only points that change their cluster are added.
    """

    def __init__(self, points_NP: Tensor, n_clusters: int, ranks: Ranks) -> None:
        self.points_NP, self.ranks = points_NP, ranks
        blocks, device = blocks_of(slice(0, len(points_NP)), BLOCK_ROWS), points_NP.device
        zeros_P = torch.zeros(points_NP.shape[1], dtype=torch.float64, device=device)
        squares_P = sum(map_blocks(lambda block: points_NP[block].double().square_().sum(dim=0), blocks, device), zeros_P)
        count = torch.tensor(float(len(points_NP)), dtype=torch.float64, device=device)
        # No sum of some of the numbers is larger than this (Cauchy-Schwarz).
        largest_P = (ranks.sum(squares_P) * ranks.sum(count)).sqrt().clamp_(min=1e-300)
        # Adding and subtracting 1.5 · 2^52 grid steps rounds to the grid.
        self.rounder_P = 1.5 * torch.exp2(torch.ceil(torch.log2(largest_P)) + 1)
        self.sums_KP = torch.zeros(n_clusters, points_NP.shape[1], dtype=torch.float64, device=device)
        self.sizes_K = torch.zeros(n_clusters, dtype=torch.int64, device=device)
        self.labels_N: Tensor | None = None

    def update(self, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums_KP (float64) and sizes_K over all ranks, given the present labels of the points."""
        before_N, self.labels_N = self.labels_N, labels_N
        if before_N is None:
            self._add(torch.arange(len(labels_N), device=labels_N.device), labels_N, 1)
        else:
            changed = (labels_N != before_N).nonzero().flatten()
            self._add(changed, before_N[changed], -1)
            self._add(changed, labels_N[changed], 1)
        return self.ranks.sum(self.sums_KP.clone()), self.ranks.sum(self.sizes_K.clone())

    def _add(self, rows_R: Tensor, labels_R: Tensor, sign: int) -> None:
        def work(components: slice) -> None:
            points_NP, rounder_P = self.points_NP[:, components], self.rounder_P[components]
            for rows, labels in zip(rows_R.split(BLOCK_ROWS), labels_R.split(BLOCK_ROWS), strict=True):
                block = points_NP.index_select(0, rows).double().add_(rounder_P).sub_(rounder_P)
                self.sums_KP[:, components].index_add_(0, labels, block, alpha=sign)

        every = slice(0, len(self.rounder_P))
        map_blocks(work, blocks_of(every, -(-every.stop // torch.get_num_threads())), rows_R.device)
        self.sizes_K += sign * torch.bincount(labels_R, minlength=len(self.sizes_K))
