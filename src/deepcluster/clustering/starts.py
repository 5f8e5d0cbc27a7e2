"""Initial centroids of Lloyd's iterations: random rows, or rows far from one another (k-means++).

N points on this rank of T on all ranks, P components, K clusters; B bins. Points are numbered over all ranks, in the order
of the ranks, and draws depend on these numbers only: however the points are split over ranks, the start is the same.
"""

import torch
from torch import Tensor

from deepcluster.clustering.nearest import squared_distances
from deepcluster.clustering.parallel import BLOCK_ROWS, blocks_of, map_blocks
from deepcluster.core.distributed import Ranks

# k-means++ sums the weights of the points in bins first, then searches one of them.
BINS = 1024


def number_points(n_points: int, ranks: Ranks) -> tuple[int, int]:
    """Return the number of this rank's first point among the points of all ranks, and T."""
    counts_W = ranks.gather(torch.tensor([n_points]))
    return int(counts_W[: ranks.rank].sum()), int(counts_W.sum())


def random_rows(points_NP: Tensor, n_clusters: int, *, seed: int, ranks: Ranks) -> Tensor:
    """Draw K distinct points uniformly; K is at most T."""
    first, n_all = number_points(len(points_NP), ranks)
    drawn_K = torch.randperm(n_all, generator=torch.Generator().manual_seed(seed))[:n_clusters]
    return rows_of(points_NP, first, drawn_K, ranks)


def plus_plus(points_NP: Tensor, n_clusters: int, *, seed: int, ranks: Ranks) -> Tensor:
    """Draw K points, each in proportion to its squared distance to those before (Arthur and Vassilvitskii, SODA 2007).

    Once all points coincide with drawn ones, any is drawn. Takes K passes over the points.
    """
    draws_K2 = torch.rand(n_clusters, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    first, n_all = number_points(len(points_NP), ranks)
    weights_N = torch.ones(len(points_NP), dtype=torch.float64, device=points_NP.device)
    centroids = torch.empty(0, points_NP.shape[1], device=points_NP.device)
    for draws in draws_K2:
        number = _draw_number(weights_N, first, n_all, draws, ranks)
        drawn_1P = rows_of(points_NP, first, torch.tensor([number]), ranks)
        distances_N = _squared_distances_to(points_NP, drawn_1P)
        weights_N = torch.minimum(weights_N, distances_N) if len(centroids) else distances_N
        centroids = torch.cat([centroids, drawn_1P])
    return centroids


STARTS = {"random": random_rows, "k-means++": plus_plus}


def rows_of(points_NP: Tensor, first: int, wanted_K: Tensor, ranks: Ranks) -> Tensor:
    """Return the points with these numbers, whichever rank holds them; `first` is the number of this rank's first point."""
    place_K = wanted_K.to(points_NP.device) - first
    held_K = (place_K >= 0) & (place_K < len(points_NP))
    rows_KP = torch.zeros(len(wanted_K), points_NP.shape[1], device=points_NP.device)
    rows_KP[held_K] = points_NP[place_K[held_K]]
    return ranks.sum(rows_KP)


def _draw_number(weights_N: Tensor, first: int, n_all: int, draws: list[float], ranks: Ranks) -> int:
    """Draw the number of a point in proportion to the weights: first a bin of numbers, then one inside it."""
    bin_N = torch.arange(first, first + len(weights_N), device=weights_N.device) * BINS // n_all
    totals_B = ranks.sum(weights_N.new_zeros(BINS).index_add_(0, bin_N, weights_N))
    if not float(totals_B.sum()):
        weights_N = torch.ones_like(weights_N)
        totals_B = ranks.sum(weights_N.new_zeros(BINS).index_add_(0, bin_N, weights_N))
    chosen = _draw(totals_B, draws[0])
    return -(-chosen * n_all // BINS) + _draw(ranks.gather(weights_N[bin_N == chosen]), draws[1])


def _draw(weights: Tensor, draw: float) -> int:
    """Return an index drawn in proportion to the weights by a number in [0, 1)."""
    sums = weights.cumsum(0)
    index = int(torch.searchsorted(sums, draw * sums[-1], right=True))
    return min(index, int(weights.nonzero()[-1]))


def _squared_distances_to(points_NP: Tensor, centroid_1P: Tensor) -> Tensor:
    blocks = blocks_of(slice(0, len(points_NP)), BLOCK_ROWS)
    parts = map_blocks(lambda block: squared_distances(points_NP[block], centroid_1P), blocks, points_NP.device)
    return torch.cat(parts).double() if parts else points_NP.new_zeros(0, dtype=torch.float64)
