"""Centroids from points: a start (random rows, or rows far from one another: k-means++), and new ones for empty clusters.

N points on this rank of T on all ranks, P components, K clusters, V of them empty, W ranks, B bins; R rows of this rank and
C of all ranks that are candidates. Points are numbered over all ranks, in the order of the ranks, and draws depend on these
numbers only: however the points are split, the start is the same.
"""

import torch
from torch import Tensor

from deepcluster.clustering.nearest import first_of_equals, squared_distances
from deepcluster.clustering.parallel import map_blocks, row_blocks
from deepcluster.core.distributed import Ranks

# k-means++ sums the weights of the points in bins first, then searches one of them.
BINS = 1024
# Distance between the centroid of an empty cluster and the one that it splits, as a share of the latter's spread.
SPLIT = 1 / 16


def number_points(n_points: int, ranks: Ranks) -> tuple[int, int]:
    """Return the number of this rank's first point among the points of all ranks, and T."""
    counts_W = ranks.gather(torch.tensor([n_points]))
    return int(counts_W[: ranks.rank].sum()), int(counts_W.sum())


def random_rows(points_NP: Tensor, n_clusters: int, *, seed: int, ranks: Ranks) -> Tensor:
    """Draw K distinct points uniformly; K is at most T."""
    first, n_all = number_points(len(points_NP), ranks)
    drawn_K = torch.randperm(n_all, generator=torch.Generator().manual_seed(seed))[:n_clusters]
    return rows_of(points_NP, first, drawn_K, ranks)


def plus_plus(points_NP: Tensor, n_clusters: int, *, seed: int, ranks: Ranks, trials: int = 1) -> Tensor:
    """Draw K points, each in proportion to its squared distance to those before (Arthur and Vassilvitskii, SODA 2007).

    Once all points coincide with drawn ones, any is drawn. Takes K passes over the points for each trial.

    Args:
        trials: draw each point so often, and keep the one that leaves the lowest sum of squared distances ("greedy"
            k-means++, as in the authors' experiments).
    """
    generator = torch.Generator().manual_seed(seed)
    draws_KT2 = torch.rand(n_clusters, trials, 2, dtype=torch.float64, generator=generator).tolist()
    first, n_all = number_points(len(points_NP), ranks)
    weights_N = torch.ones(len(points_NP), dtype=torch.float64, device=points_NP.device)
    centroids = torch.empty(0, points_NP.shape[1], device=points_NP.device)
    for draws_T2 in draws_KT2:
        tried: list[tuple[float, Tensor, Tensor]] = []
        for draws in draws_T2:
            number = _draw_number(weights_N, first, n_all, draws, ranks)
            drawn_1P = rows_of(points_NP, first, torch.tensor([number]), ranks)
            distances_N = _squared_distances_to(points_NP, drawn_1P)
            left_N = torch.minimum(weights_N, distances_N) if len(centroids) else distances_N
            tried.append((float(ranks.sum(left_N.sum())) if trials > 1 else 0.0, left_N, drawn_1P))
        _, weights_N, drawn_1P = min(tried, key=lambda one: one[0])
        centroids = torch.cat([centroids, drawn_1P])
    return centroids


STARTS = {"random": random_rows, "k-means++": plus_plus}


def rows_of(points_NP: Tensor, first: int, wanted_K: Tensor, ranks: Ranks) -> Tensor:
    """Return the points with these numbers, whichever rank holds them; `first` is the number of this rank's first point."""
    place_K = wanted_K.to(points_NP.device) - first
    held_K = (place_K >= 0) & (place_K < len(points_NP))
    rows_KP = points_NP.new_zeros(len(wanted_K), points_NP.shape[1])
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
    parts = map_blocks(
        lambda block: squared_distances(points_NP[block], centroid_1P), row_blocks(points_NP), points_NP.device
    )
    return torch.cat(parts).double() if parts else points_NP.new_zeros(0, dtype=torch.float64)


def split_largest(centroids_KP: Tensor, sizes_K: Tensor, squares_K: Tensor, *, seed: int) -> int:
    """Put each empty cluster beside a large one, in place, to take half of it; return how many were put.

    The largest clusters are split in two once each, clusters whose points coincide never; if there are more empty clusters
    than that, the rest wait for the next iteration. As in the paper (section 3) the large cluster keeps its centroid, so
    that inertia never rises; the new one lies 1/16 of its spread away, in a direction that depends on `seed`.

    Args:
        sizes_K, squares_K: number of points of each cluster, and sum of their squared distances to the centroid.
    """
    empty = (sizes_K == 0).nonzero().flatten()
    splittable_K = (sizes_K > 1) & (squares_K > 0)
    large = torch.where(splittable_K, sizes_K, 0).argsort(descending=True, stable=True)
    large = large[: min(len(empty), int(splittable_K.sum()))]
    empty = empty[: len(large)]
    shape = len(empty), centroids_KP.shape[1]
    signs_VP = torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).to(centroids_KP.device) * 2 - 1
    # A power of two, so that ranks and threads that sum the squares in another order agree.
    spread_V = torch.exp2(torch.floor(torch.log2(squares_K[large] / sizes_K[large] / shape[1]) / 2))
    centroids_KP[empty] = centroids_KP[large] + (SPLIT * spread_V[:, None] * signs_VP).float()
    return len(empty)


def fill_empty(
    centroids_KP: Tensor, sizes_K: Tensor, points_NP: Tensor, labels_N: Tensor, distances_N: Tensor, *, ranks: Ranks
) -> int:
    """Give each empty cluster the point that is farthest from its centroid, in place; return how many got one.

    This is for the end, where no iteration follows in which a split could settle. A point that lies on its centroid is not
    taken, nor the last one of a cluster, nor one that equals another. Of equally far points the lowest number comes first.

    Each rank sends only its farthest points, at most four per empty cluster.

    Args:
        sizes_K: number of points of each cluster, on all ranks.
        distances_N: float32, of each point to its centroid, squared or not; not NaN.
    """
    empty = (sizes_K == 0).nonzero().flatten()
    if not len(empty):
        return 0
    # Twice as many as can be used, as some may be equal, plus room for candidates that are the last of their cluster. The
    # latter are at most half of all: clusters of one are left out, and in others each has a farther point that is not last.
    count = 2 * len(empty) + min(2 * len(empty), len(sizes_K) - len(empty))
    rows_R = ((distances_N > 0) & (sizes_K > 1)[labels_N]).nonzero().flatten()
    rows_R = rows_R[distances_N[rows_R].argsort(descending=True, stable=True)[:count]]
    labels_C, distances_C = ranks.gather(labels_N[rows_R]), ranks.gather(distances_N[rows_R])
    farthest = distances_C.argsort(descending=True, stable=True)[:count]
    # All farther points of a candidate's cluster are candidates: its place among them is its place in its cluster.
    free = place_in_cluster(labels_C[farthest], len(sizes_K)) < sizes_K[labels_C[farthest]] - 1
    first, _ = number_points(len(rows_R), ranks)
    rows_VP = rows_of(points_NP[rows_R], first, farthest[free][: 2 * len(empty)], ranks)
    rows_VP = rows_VP[first_of_equals(rows_VP)][: len(empty)]
    centroids_KP[empty[: len(rows_VP)]] = rows_VP
    return len(rows_VP)


def place_in_cluster(labels_C: Tensor, n_clusters: int) -> Tensor:
    """Return for each label how many equal ones come before it."""
    by_cluster = labels_C.argsort(stable=True)
    counts_K = torch.bincount(labels_C, minlength=n_clusters)
    starts_K = counts_K.cumsum(0) - counts_K
    place_C = torch.empty_like(labels_C)
    place_C[by_cluster] = torch.arange(len(labels_C), device=labels_C.device) - starts_K[labels_C[by_cluster]]
    return place_C
