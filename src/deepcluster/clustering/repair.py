"""Empty clusters: what becomes of them during the iterations of k-means, and at their end.

N points on this rank of T on all ranks, P components, K clusters, E of them empty.
"""

import torch
from torch import Tensor

from deepcluster.clustering.nearest import first_of_equals
from deepcluster.clustering.reduction import AllReduce
from deepcluster.clustering.starts import rows_of

# The centroid of an empty cluster lies this share of its spread from the one that it splits.
SPLIT = 1 / 16


def split_largest(centroids_KP: Tensor, sizes_K: Tensor, squares_K: Tensor, *, seed: int) -> int:
    """Put each empty cluster beside a large one, in place, to take half of it; return how many there were.

    The largest clusters are each split in two once, clusters of one place never; where there are more empty clusters
    than that, the rest wait for the next iteration. As in the paper (section 3) the large cluster keeps its centroid,
    so that inertia never rises; the new one lies a sixteenth of the cluster's spread away, in a direction that depends on
    `seed`.

    Args:
        sizes_K, squares_K: points of each cluster, and the sum of their squared distances to the centroid.
    """
    empty = (sizes_K == 0).nonzero().flatten()
    splittable_K = (sizes_K > 1) & (squares_K > 0)
    large = torch.where(splittable_K, sizes_K, 0).argsort(descending=True, stable=True)
    large = large[: min(len(empty), int(splittable_K.sum()))]
    empty = empty[: len(large)]
    shape = len(empty), centroids_KP.shape[1]
    signs_EP = torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)).to(centroids_KP.device) * 2 - 1
    # A power of two, so that ranks and threads which add up the squares in other orders agree.
    spread_E = torch.exp2(torch.floor(torch.log2(squares_K[large] / sizes_K[large] / shape[1]) / 2))
    centroids_KP[empty] = centroids_KP[large] + (SPLIT * spread_E[:, None] * signs_EP).float()
    return len(empty)


def fill_empty(
    centroids_KP: Tensor,
    sizes_K: Tensor,
    points_NP: Tensor,
    labels_N: Tensor,
    distances_N: Tensor,
    *,
    numbers_N: Tensor,
    all_reduce: AllReduce,
) -> int:
    """Give each empty cluster the point that is farthest from its centroid, in place; return how many got one.

    At the end, where no iteration follows that a split could settle in. A point that lies on its centroid is not taken,
    nor the last of a cluster, nor one that equals another.

    Args:
        numbers_N: numbers of this rank's points among all.
    """
    empty = (sizes_K == 0).nonzero().flatten()
    if not len(empty):
        return 0
    total = int(all_reduce(torch.tensor(len(points_NP), device=points_NP.device)))
    distances_T = all_reduce(distances_N.new_zeros(total).index_copy_(0, numbers_N, distances_N))
    labels_T = all_reduce(labels_N.new_zeros(total).index_copy_(0, numbers_N, labels_N))
    by_cluster_T = distances_T.argsort(descending=True, stable=True)
    by_cluster_T = by_cluster_T[labels_T[by_cluster_T].argsort(stable=True)]
    starts_K = sizes_K.cumsum(0) - sizes_K
    place_T = torch.empty_like(labels_T)
    place_T[by_cluster_T] = torch.arange(total, device=labels_T.device) - starts_K[labels_T[by_cluster_T]]
    free_T = (distances_T > 0) & (place_T < sizes_K[labels_T] - 1)
    taken = distances_T.argsort(descending=True, stable=True)
    taken = taken[free_T[taken]][: 2 * len(empty)]
    rows_EP = rows_of(points_NP, numbers_N, taken, all_reduce)
    rows_EP = rows_EP[first_of_equals(rows_EP)][: len(empty)]
    centroids_KP[empty[: len(rows_EP)]] = rows_EP
    return len(rows_EP)
