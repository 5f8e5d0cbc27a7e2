"""Where Lloyd's iterations start: random rows, or rows far from one another (k-means++).

N points on this rank of T on all ranks, P components, K clusters. Points are numbered over all ranks, and draws depend on
these numbers alone: however the points are spread over ranks, the start is the same. I images, some of which are no points.
"""

import torch
from torch import Tensor

from deepcluster.clustering.nearest import BLOCK_ROWS, squared_distances
from deepcluster.clustering.parallel import blocks_of, map_blocks
from deepcluster.clustering.reduction import AllReduce
from deepcluster.core.errors import InputError

# k-means++ adds up the weights of the points in so many bins first, then looks into one of them.
BINS = 1024
# Numbers that are counted at once, and the base in which the largest is found, digit by digit.
BLOCK_NUMBERS = 1 << 20
DIGIT = 1 << 11


def numbers_among_all(images_N: Tensor | None, seen_N: Tensor, all_reduce: AllReduce) -> tuple[Tensor, int]:
    """Numbers of this rank's points among the T points of all ranks, by the order of their images; and T.

    A byte an image is kept and travels (I + 8 N bytes on a rank).

    Args:
        images_N: number of each row's image, ascending: no two rows of any ranks have the same, and images may have no row.
            By default rows are numbered from 0, which does for one process.
        seen_N: which rows are points; the others are not numbered.
        all_reduce: sums a tensor over the ranks.

    Raises:
        InputError: numbers that are negative, do not ascend, or are those of two rows; on all ranks.
    """
    device = seen_N.device
    images_N = torch.arange(len(seen_N), device=device) if images_N is None else images_N.to(device, torch.int64)
    fits = len(images_N) == len(seen_N)
    fits = fits and not (len(images_N) and int(images_N[0]) < 0) and bool((images_N[1:] > images_N[:-1]).all())
    images_N = images_N[seen_N] if fits else images_N[:0]
    n_points, n_unfit = all_reduce(torch.tensor([len(images_N), not fits], dtype=torch.int64, device=device)).tolist()
    if n_unfit:
        raise InputError("numbers must be one a row, from 0 on, each larger than the one before")
    n_images = _largest(int(images_N[-1]) + 1 if len(images_N) else 0, all_reduce, device)
    present_I = torch.zeros(n_images, dtype=torch.uint8, device=device)
    present_I[images_N] = 1
    present_I = all_reduce(present_I)
    numbers_N, before = torch.empty_like(images_N), 0
    for first in range(0, len(present_I), BLOCK_NUMBERS):
        block = present_I[first : first + BLOCK_NUMBERS]
        start, end = torch.searchsorted(images_N, torch.tensor([first, first + len(block)], device=device)).tolist()
        counts = block.ne(0).cumsum(0)
        numbers_N[start:end] = counts[images_N[start:end] - first] + (before - 1)
        before += int(counts[-1])
    if before != n_points:
        raise InputError(f"{n_points} rows have only {before} numbers: rows of two ranks have the same; give each its own")
    return numbers_N, n_points


def _largest(value: int, all_reduce: AllReduce, device: torch.device) -> int:
    """The largest of the ranks' values in 0 … 2^44 - 1, of sums alone."""
    found = 0
    for place in (DIGIT**3, DIGIT**2, DIGIT, 1):
        digits = torch.zeros(DIGIT, device=device)
        # Ranks whose digits before this one are less than the largest have no say.
        if value // place // DIGIT == found:
            digits[value // place % DIGIT] = 1
        found = found * DIGIT + int(all_reduce(digits).nonzero()[-1])
    return found


def random_rows(
    points_NP: Tensor, numbers_N: Tensor, n_all: int, n_clusters: int, *, seed: int, all_reduce: AllReduce
) -> Tensor:
    """K distinct points, drawn evenly.

    Args:
        points_NP: this rank's points.
        numbers_N: their numbers among all T, ascending.
        n_all: T.
        n_clusters: K; no more than there are points.
        seed: of the draw.
        all_reduce: sums a tensor over the ranks.
    """
    drawn_K = torch.randperm(n_all, generator=torch.Generator().manual_seed(seed))[:n_clusters]
    return rows_of(points_NP, numbers_N, drawn_K, all_reduce)


def plus_plus(
    points_NP: Tensor, numbers_N: Tensor, n_all: int, n_clusters: int, *, seed: int, all_reduce: AllReduce
) -> Tensor:
    """K points, each drawn in proportion to its squared distance to those before (Arthur and Vassilvitskii, SODA 2007).

    Where all points lie on those drawn already, any is drawn. Takes K passes over the points. Arguments as `random_rows`.
    """
    draws_K2 = torch.rand(n_clusters, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    numbers_N = numbers_N.to(points_NP.device)
    weights_N = torch.ones(len(points_NP), dtype=torch.float64, device=points_NP.device)
    centroids = torch.empty(0, points_NP.shape[1], device=points_NP.device)
    for draws in draws_K2:
        number = _draw_number(weights_N, numbers_N, n_all, draws, all_reduce)
        drawn_1P = rows_of(points_NP, numbers_N, torch.tensor([number]), all_reduce)
        distances_N = _squared_distances_to(points_NP, drawn_1P)
        weights_N = torch.minimum(weights_N, distances_N) if len(centroids) else distances_N
        centroids = torch.cat([centroids, drawn_1P])
    return centroids


STARTS = {"random": random_rows, "k-means++": plus_plus}


def _draw_number(weights_N: Tensor, numbers_N: Tensor, n_all: int, draws: list[float], all_reduce: AllReduce) -> int:
    """Number of a point, drawn in proportion to the weights: a bin of numbers first, then one of the bin."""
    bin_N = numbers_N * BINS // n_all
    totals_B = all_reduce(weights_N.new_zeros(BINS).index_add_(0, bin_N, weights_N))
    if not float(totals_B.sum()):
        weights_N = torch.ones_like(weights_N)
        totals_B = all_reduce(weights_N.new_zeros(BINS).index_add_(0, bin_N, weights_N))
    chosen = _draw(totals_B, draws[0])
    first, end = -(-chosen * n_all // BINS), -(-(chosen + 1) * n_all // BINS)
    inside = (bin_N == chosen).nonzero().flatten()
    inside_B = weights_N.new_zeros(end - first).index_add_(0, numbers_N[inside] - first, weights_N[inside])
    return first + _draw(all_reduce(inside_B), draws[1])


def _draw(weights: Tensor, draw: float) -> int:
    """Index drawn in proportion to the weights by a number in [0, 1)."""
    sums = weights.cumsum(0)
    index = int(torch.searchsorted(sums, draw * sums[-1], right=True))
    return min(index, int(weights.nonzero()[-1]))


def rows_of(points_NP: Tensor, numbers_N: Tensor, wanted_K: Tensor, all_reduce: AllReduce) -> Tensor:
    """The points of these numbers, whichever rank holds them."""
    wanted_K, numbers_N = wanted_K.to(points_NP.device), numbers_N.to(points_NP.device)
    place_K = torch.searchsorted(numbers_N, wanted_K).clamp_(max=max(0, len(numbers_N) - 1))
    rows_KP = torch.zeros(len(wanted_K), points_NP.shape[1], device=points_NP.device)
    if len(numbers_N):
        held_K = numbers_N[place_K] == wanted_K
        rows_KP[held_K] = points_NP[place_K[held_K]]
    return all_reduce(rows_KP)


def _squared_distances_to(points_NP: Tensor, centroid_1P: Tensor) -> Tensor:
    blocks = blocks_of(slice(0, len(points_NP)), BLOCK_ROWS)
    parts = map_blocks(lambda block: squared_distances(points_NP[block], centroid_1P), blocks, points_NP.device)
    return torch.cat(parts).double() if parts else points_NP.new_zeros(0, dtype=torch.float64)
