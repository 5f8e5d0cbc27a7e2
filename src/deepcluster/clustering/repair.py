"""Empty clusters: what becomes of them during the iterations of k-means, and at their end.

N points on this rank, P components, K clusters, E of them empty. R rows that are looked at, C candidates of all ranks, F of
this one that have no place yet, X columns; tables of S places, D values of a digit.
"""

import torch
from torch import Tensor

from deepcluster.clustering.nearest import first_of_equals
from deepcluster.clustering.reduction import AllReduce
from deepcluster.clustering.starts import DIGIT, rows_of
from deepcluster.core.errors import InputError

# The centroid of an empty cluster lies this share of its spread from the one that it splits.
SPLIT = 1 / 16
# Digits of a distance (31 bits of a float32, which ascend as the distances do) and of a number below 2^44. The last of a
# distance holds two bits of the one before, which are alike where it is looked at.
DISTANCE_SHIFTS = 20, 9, 0
NUMBER_SHIFTS = 33, 22, 11, 0
# Rows find a place of their own in some 5 draws; that one finds none in so many has a chance of 2^-64 for each.
MOST_DRAWS = 64


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
    nor the last of a cluster, nor one that equals another. Of equally far ones the lowest number comes first.

    Only the farthest points of all ranks travel, eight for each empty cluster at most, however many points there are.

    Args:
        distances_N: float32; not NaN.
        numbers_N: numbers of this rank's points among all.

    Raises:
        InputError: two of the farthest points have the same number; on all ranks.
    """
    empty = (sizes_K == 0).nonzero().flatten()
    if not len(empty):
        return 0
    # Twice as many as can be used, as some may be equal; and room for candidates that are the last of their cluster. These
    # are half of all at most: clusters of one are left out, in others each has a farther point, which is no last one.
    count = 2 * len(empty) + min(2 * len(empty), len(sizes_K) - len(empty))
    rows = ((distances_N > 0) & (sizes_K > 1)[labels_N]).nonzero().flatten()
    rows = _farthest_of_all(rows, distances_N, numbers_N, count, all_reduce)
    columns = numbers_N[rows], labels_N[rows], distances_N[rows].view(torch.int32).long()
    numbers_C, labels_C, bits_C = _gather(torch.stack(columns, dim=1), all_reduce).unbind(dim=1)
    order_C = numbers_C.argsort()
    order_C = order_C[bits_C[order_C].argsort(descending=True, stable=True)]
    numbers_C, labels_C = numbers_C[order_C], labels_C[order_C]
    # All farther points of a candidate's cluster are candidates: its place among them is that in its cluster.
    free_C = _place_in_cluster(labels_C, len(sizes_K)) < sizes_K[labels_C] - 1
    rows_EP = rows_of(points_NP, numbers_N, numbers_C[free_C][: 2 * len(empty)], all_reduce)
    rows_EP = rows_EP[first_of_equals(rows_EP)][: len(empty)]
    centroids_KP[empty[: len(rows_EP)]] = rows_EP
    return len(rows_EP)


def _place_in_cluster(labels_C: Tensor, n_clusters: int) -> Tensor:
    """How many with its label are before each."""
    by_cluster = labels_C.argsort(stable=True)
    counts_K = torch.bincount(labels_C, minlength=n_clusters)
    starts_K = counts_K.cumsum(0) - counts_K
    place_C = torch.empty_like(labels_C)
    place_C[by_cluster] = torch.arange(len(labels_C), device=labels_C.device) - starts_K[labels_C[by_cluster]]
    return place_C


def _farthest_of_all(rows_R: Tensor, distances_N: Tensor, numbers_N: Tensor, count: int, all_reduce: AllReduce) -> Tensor:
    """Those of these rows that are among the `count` farthest of all ranks; or among more than that, up to twice as many.

    No row of any rank that is left out comes before one that is returned: the farther comes first, of equals the lower
    number. The cut is found digit by digit, as by a radix sort, of which only the counts of the digits travel.
    """
    keys = [(distances_N.view(torch.int32), shift, 0) for shift in DISTANCE_SHIFTS]
    keys += [(numbers_N, shift, DIGIT - 1) for shift in NUMBER_SHIFTS]
    found, n_found = [], 0
    for key_N, shift, flip in keys:
        digits_R = ((key_N[rows_R] >> shift) & (DIGIT - 1)) ^ flip
        counts_D = all_reduce(torch.bincount(digits_R, minlength=DIGIT))
        reached_D = counts_D.flip(0).cumsum(0).flip(0) + n_found
        cut = max(0, int((reached_D >= count).sum()) - 1)
        found.append(rows_R[digits_R > cut])
        rows_R = rows_R[digits_R == cut]
        n_found = int(reached_D[cut] - counts_D[cut])
        if int(reached_D[cut]) <= 2 * count:
            break
    return torch.cat([*found, rows_R])


def _gather(rows_FX: Tensor, all_reduce: AllReduce) -> Tensor:
    """The rows (C, X) of all ranks, on every rank, in any order; by sums alone, as nobody here knows of the other ranks.

    Each row draws one of S places by its first number, which no other row of any rank has. Those that are alone in theirs
    travel; the others draw again, by another multiplier (multiply-shift: Dietzfelbinger et al., J. Algorithms 25, 1997).
    At the least half of them are alone, on average.

    Args:
        rows_FX: int64.

    Raises:
        InputError: two rows have the same number; on all ranks.
    """
    n_rows = int(all_reduce(torch.tensor(len(rows_FX), device=rows_FX.device)))
    bits = 2 + n_rows.bit_length()
    generator, found = torch.Generator().manual_seed(0), [rows_FX[:0]]
    for _ in range(MOST_DRAWS):
        if not n_rows:
            return torch.cat(found)
        multiplier = 2 * int(torch.randint(1 << 62, (), generator=generator)) + 1
        place_F = ((rows_FX[:, 0] * multiplier) >> (64 - bits)) & ((1 << bits) - 1)
        counts_S = all_reduce(torch.bincount(place_F, minlength=1 << bits).int())
        alone_S = counts_S == 1
        alone_F = alone_S[place_F]
        table = rows_FX.new_zeros(int(alone_S.sum()), rows_FX.shape[1])
        table[alone_S.cumsum(0)[place_F[alone_F]] - 1] = rows_FX[alone_F]
        found.append(all_reduce(table))
        rows_FX, n_rows = rows_FX[~alone_F], n_rows - len(table)
    raise InputError(f"{n_rows} points have numbers that others have as well: give each its own")
