"""Empty clusters: how they are refilled during the iterations of k-means, and after the last one.

N points on this rank, P components, K clusters, E of them empty; R candidates of this rank, C of all ranks.
"""

import torch
from torch import Tensor

from deepcluster.clustering.nearest import first_of_equals
from deepcluster.clustering.starts import number_points, rows_of
from deepcluster.core.distributed import Ranks

# Distance between the centroid of an empty cluster and the one that it splits, as a share of the latter's spread.
SPLIT = 1 / 16


def split_largest(centroids_KP: Tensor, sizes_K: Tensor, squares_K: Tensor, *, seed: int) -> int:
    """Put each empty cluster beside a large one, in place, to take half of it; return how many were put.

    The largest clusters are split in two once each, clusters whose points coincide never; if there are more empty clusters
    than that, the rest wait for the next iteration. As in the paper (section 3) the large cluster keeps its centroid, so
    that inertia never rises; the new one lies a sixteenth of the cluster's spread away, in a direction that depends on
    `seed`.

    Args:
        sizes_K, squares_K: number of points of each cluster, and sum of their squared distances to the centroid.
    """
    empty = (sizes_K == 0).nonzero().flatten()
    splittable_K = (sizes_K > 1) & (squares_K > 0)
    large = torch.where(splittable_K, sizes_K, 0).argsort(descending=True, stable=True)
    large = large[: min(len(empty), int(splittable_K.sum()))]
    empty = empty[: len(large)]
    shape = len(empty), centroids_KP.shape[1]
    signs_EP = torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).to(centroids_KP.device) * 2 - 1
    # A power of two, so that ranks and threads that sum the squares in another order agree.
    spread_E = torch.exp2(torch.floor(torch.log2(squares_K[large] / sizes_K[large] / shape[1]) / 2))
    centroids_KP[empty] = centroids_KP[large] + (SPLIT * spread_E[:, None] * signs_EP).float()
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
    free = _place_in_cluster(labels_C[farthest], len(sizes_K)) < sizes_K[labels_C[farthest]] - 1
    first, _ = number_points(len(rows_R), ranks)
    rows_EP = rows_of(points_NP[rows_R], first, farthest[free][: 2 * len(empty)], ranks)
    rows_EP = rows_EP[first_of_equals(rows_EP)][: len(empty)]
    centroids_KP[empty[: len(rows_EP)]] = rows_EP
    return len(rows_EP)


def _place_in_cluster(labels_C: Tensor, n_clusters: int) -> Tensor:
    """Return for each label how many equal ones come before it."""
    by_cluster = labels_C.argsort(stable=True)
    counts_K = torch.bincount(labels_C, minlength=n_clusters)
    starts_K = counts_K.cumsum(0) - counts_K
    place_C = torch.empty_like(labels_C)
    place_C[by_cluster] = torch.arange(len(labels_C), device=labels_C.device) - starts_K[labels_C[by_cluster]]
    return place_C
