"""Points that stand for many: those nearest to the centres of k-means, or each as far as possible from those before it.

N points, P components, C chosen ones.
"""

import numpy as np
import torch
from torch import Tensor

from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.parallel import row_blocks
from deepcluster.core.work import Advance, no_advance

# Above it, a pass over the points for each cluster, as k-means++ makes, takes longer than the iterations.
CAREFUL_START_CLUSTERS = 1_000


def farthest_first(points_NP: Tensor, count: int, *, chosen: Tensor | None = None, advance: Advance = no_advance) -> Tensor:
    """Return indices of `count` points: each is the farthest from all before it, ties to the lower number (k-center greedy).

    The first is the point nearest to the mean. The largest distance of a point to its nearest chosen one is at most twice
    the smallest possible (Gonzalez, Clustering to minimize the maximum intercluster distance, 1985).

    Args:
        points_NP: finite float32 points.
        count: C, at most N.
        chosen: indices of points that are chosen already; they come first.
        advance: called with the number of points chosen since the last call; may raise to stop.
    """
    found = [] if chosen is None else chosen.tolist()
    if not found:
        sums = [points_NP[rows].double().sum(dim=0) for rows in row_blocks(points_NP)]
        mean_P = torch.stack(sums).sum(dim=0) / len(points_NP)
        found = [int(squared_distances(points_NP, mean_P.float()).argmin())]
    nearest_N = torch.full((len(points_NP),), torch.inf)
    for number in range(count):
        if number == len(found):
            found.append(int(nearest_N.argmax()))
        torch.minimum(nearest_N, squared_distances(points_NP, points_NP[found[number]]), out=nearest_N)
        nearest_N[found[number]] = -1  # A copy of a chosen point may be chosen, the point itself not again.
        advance(1)
    return torch.tensor(found[:count])


def central_points(points_NP: Tensor, count: int, *, seed: int, advance: Advance = no_advance) -> tuple[Tensor, Tensor]:
    """Return the point nearest to each centre of k-means, and the number of points of its cluster; largest clusters first.

    Clusters that stay empty, where points are copies, are replaced by points that are far from the others, in clusters of 0.

    Args:
        points_NP: finite float32 points.
        count: C, the number of clusters, at most N.
        seed: of k-means.
        advance: called after each iteration; may raise to stop.

    Returns:
        indices_C, and sizes_C.
    """
    start = "k-means++" if count <= CAREFUL_START_CLUSTERS else "random"
    found = KMeans(count, init=start).cluster(points_NP, seed=seed, advance=advance)
    order_N = torch.from_numpy(np.lexsort((found.distances_N.numpy(), found.labels_N.numpy())))
    labels_N = found.labels_N[order_N]
    is_first_N = torch.ones(len(labels_N), dtype=torch.bool)
    is_first_N[1:] = labels_N[1:] != labels_N[:-1]
    indices, sizes = order_N[is_first_N], found.sizes_K()[labels_N[is_first_N]]
    by_size = sizes.argsort(descending=True, stable=True)
    indices, sizes = indices[by_size], sizes[by_size]
    if len(indices) < count:
        indices = farthest_first(points_NP, count, chosen=indices)
        sizes = torch.cat([sizes, sizes.new_zeros(count - len(sizes))])
    return indices, sizes


def squared_distances(points_NP: Tensor, point_P: Tensor) -> Tensor:
    """Return the squared distance of each point to one, from the differences."""
    squared_N = torch.empty(len(points_NP))
    for rows in row_blocks(points_NP):
        torch.sum((points_NP[rows] - point_P).square_(), dim=1, out=squared_N[rows])
    return squared_N
