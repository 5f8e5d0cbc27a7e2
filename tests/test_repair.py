"""Filling of empty clusters against a naive loop over all points, on any number of ranks; and how much travels for it."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from thread_ranks import on_ranks
from torch import Tensor

from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.starts import fill_empty
from deepcluster.core.distributed import Ranks

# Distances with many ties, some of which differ in the last of the digits that the cut is searched by.
NEAR = torch.tensor(1.0)
VALUES = torch.tensor(
    [0.0, 1e-45, 1e-38, 1.0, float(NEAR.nextafter(NEAR + 1)), 1 + 2**-20, 1.25, 1.5, 2.0, 2.5, 1e30, math.inf]
)


def naive_fill(
    centroids_KP: Tensor, points_TP: Tensor, labels_T: Tensor, distances_T: Tensor
) -> tuple[int, list[list[float]]]:
    """How many clusters are filled and the centroids then: point by point, the farthest first."""
    centroids = centroids_KP.tolist()
    left = torch.bincount(labels_T, minlength=len(centroids)).tolist()
    empty = [cluster for cluster, size in enumerate(left) if size == 0]
    labels, distances, points = (some.tolist() for some in (labels_T, distances_T, points_TP))
    free = []
    for row in sorted(range(len(points)), key=lambda row: (-distances[row], row)):
        if distances[row] > 0 and left[labels[row]] > 1:
            left[labels[row]] -= 1
            free.append(points[row])
    # Of twice as many as there are empty clusters, those that differ.
    rows: list[list[float]] = []
    for point in free[: 2 * len(empty)]:
        if point not in rows:
            rows.append(point)
    rows = rows[: len(empty)]
    for cluster, point in zip(empty, rows, strict=False):
        centroids[cluster] = point
    return len(rows), centroids


def filled(
    centroids_KP: Tensor,
    points_TP: Tensor,
    labels_T: Tensor,
    distances_T: Tensor,
    shares: Sequence[Tensor],
) -> list[tuple[int, list[list[float]]]]:
    """The same by `fill_empty`, on each rank; rank by rank the rows that it holds."""
    sizes_K = torch.bincount(labels_T, minlength=len(centroids_KP))

    def work(rows: Tensor, ranks: Ranks) -> tuple[int, list[list[float]]]:
        filled_KP = centroids_KP.clone()
        count = fill_empty(filled_KP, sizes_K.clone(), points_TP[rows], labels_T[rows], distances_T[rows], ranks=ranks)
        return count, filled_KP.tolist()

    return on_ranks(shares, work)


def dealt(n_points: int, n_ranks: int, generator: torch.Generator) -> list[Tensor]:
    """Rows of each rank, contiguous; a rank may have none."""
    rank_T = torch.randint(n_ranks, (n_points,), generator=generator).sort().values
    return [(rank_T == rank).nonzero().flatten() for rank in range(n_ranks)]


@settings(max_examples=150, deadline=None)
@example(n_points=0, n_clusters=3, n_used=1, n_values=12, n_places=5, n_ranks=2, seed=0)
@example(n_points=60, n_clusters=60, n_used=30, n_values=12, n_places=9, n_ranks=3, seed=0)
@example(n_points=60, n_clusters=40, n_used=2, n_values=2, n_places=9, n_ranks=4, seed=0)
@given(
    n_points=st.integers(0, 60),
    n_clusters=st.integers(1, 60),
    n_used=st.integers(1, 30),
    n_values=st.integers(1, len(VALUES)),
    n_places=st.sampled_from([1, 3, 9, 10_000]),
    n_ranks=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_fills_with_what_a_naive_loop_takes(
    n_points: int, n_clusters: int, n_used: int, n_values: int, n_places: int, n_ranks: int, seed: int
) -> None:
    """Ties of distances, equal points, clusters of one or two, points on their centroid, ranks without rows."""
    generator = torch.Generator().manual_seed(seed)
    labels_T = torch.randint(min(n_used, n_clusters), (n_points,), generator=generator)
    labels_T = torch.randperm(n_clusters, generator=generator)[labels_T]
    chosen = torch.randperm(len(VALUES), generator=generator)[:n_values]
    distances_T = VALUES[chosen[torch.randint(n_values, (n_points,), generator=generator)]]
    points_TP = torch.randint(n_places, (n_points, 2), generator=generator).float()
    found = -torch.ones(n_clusters, 2), points_TP, labels_T, distances_T
    expected = naive_fill(*found)
    assert filled(*found, dealt(n_points, n_ranks, generator)) == [expected] * n_ranks


def descending(count: int) -> Tensor:
    """Distances that all differ in their first digit (exponent, and three bits of what follows): a cut can be anywhere."""
    steps = torch.arange(count - 1, -1, -1)
    return torch.ldexp(1 + (steps % 8) / 8, steps // 8)


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_last_ones_of_clusters_among_the_farthest_leave_enough_others(n_ranks: int) -> None:
    """By hand: 10 pairs are farthest, each has one to give; of 40 that can be taken, each equals another: 20 are enough.

    So the first 50 points are needed for the 20 empty clusters.
    """
    labels_T = torch.cat([torch.arange(10).repeat_interleave(2), torch.full((280,), 10)])
    points_TP = torch.cat([torch.arange(5).repeat_interleave(4), torch.arange(5, 145).repeat_interleave(2)]).float()
    found = torch.full((31, 1), -1.0), points_TP[:, None], labels_T, descending(300)
    # Of the pairs, 0, 2, …, 18 are taken, which hold each of 0 … 4 twice.
    wanted = [[-1.0]] * 11 + [[float(value)] for value in range(20)]
    shares = dealt(300, n_ranks, torch.Generator().manual_seed(0))
    assert filled(*found, shares) == [(20, wanted)] * n_ranks


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_clusters_of_one_do_not_stand_before_others_however_far_they_are(n_ranks: int) -> None:
    """By hand: 100 of them are farthest, then come the points 100 and 101."""
    labels_T = torch.cat([torch.arange(100), torch.full((200,), 100)])
    found = torch.full((103, 1), -1.0), torch.arange(300.0)[:, None], labels_T, descending(300)
    shares = dealt(300, n_ranks, torch.Generator().manual_seed(0))
    assert filled(*found, shares) == [(2, [[-1.0]] * 101 + [[100.0], [101.0]])] * n_ranks


@pytest.mark.parametrize("distance", [0.5, 3.0, math.inf])
def test_of_many_equally_far_points_the_lowest_numbers_are_taken(distance: float) -> None:
    found = torch.full((4, 1), -1.0), torch.arange(20_000.0)[:, None], torch.zeros(20_000, dtype=torch.int64)
    shares = dealt(20_000, 2, torch.Generator().manual_seed(1))
    assert filled(*found, torch.full((20_000,), distance), shares) == [(3, [[-1.0], [0.0], [1.0], [2.0]])] * 2


def test_distances_that_differ_in_their_last_bits_are_told_apart() -> None:
    """20,000 floats, each the next larger of the one before."""
    distances_T = (torch.tensor(1.5).view(torch.int32) + torch.arange(20_000, dtype=torch.int32)).view(torch.float32)
    found = torch.full((4, 1), -1.0), torch.arange(20_000.0)[:, None], torch.zeros(20_000, dtype=torch.int64)
    shares = dealt(20_000, 2, torch.Generator().manual_seed(1))
    wanted = [[-1.0], [19_999.0], [19_998.0], [19_997.0]]
    assert filled(*found, distances_T, shares) == [(3, wanted)] * 2


def test_nothing_is_sent_if_no_cluster_is_empty() -> None:
    points_NP, labels_N, distances_N = torch.zeros(2, 1), torch.arange(2), torch.ones(2)

    def work(_: None, ranks: Any) -> tuple[int, int]:
        count = fill_empty(torch.zeros(2, 1), torch.ones(2).long(), points_NP, labels_N, distances_N, ranks=ranks)
        return count, ranks.sent

    assert on_ranks([None, None], work) == [(0, 0)] * 2


@pytest.mark.parametrize("ties", [False, True])
def test_what_travels_depends_on_empty_clusters_and_not_on_points(ties: bool) -> None:
    """Bytes of a rank: for each empty cluster at most four candidates of 12, and two rows."""
    n_empty, n_used, dim = 50, 150, 8
    bound = n_empty * (4 * 12 + 2 * 4 * dim) + 100
    for n_points in (1_000, 100_000):
        generator = torch.Generator().manual_seed(0)
        labels_T = torch.arange(n_points) % n_used
        points_TP = torch.randn(n_points, dim, generator=generator)
        distances_T = torch.full((n_points,), 2.0) if ties else torch.rand(n_points, generator=generator)
        sizes_K = torch.bincount(labels_T, minlength=n_used + n_empty)
        found = points_TP, labels_T, distances_T

        def work(rows: slice, ranks: Any, found: tuple[Tensor, ...] = found, sizes_K: Tensor = sizes_K) -> tuple[int, int]:
            own = (some[rows] for some in found)
            count = fill_empty(torch.zeros(n_used + n_empty, dim), sizes_K, *own, ranks=ranks)  # type: ignore[misc]
            return count, ranks.sent

        half = n_points // 2
        for count, sent in on_ranks([slice(0, half), slice(half, n_points)], work):
            assert count == n_empty
            assert sent < bound


def test_unreadable_rows_are_neither_taken_nor_counted() -> None:
    """k-means with one iteration from a start far off: clusters are filled at the end, with readable rows alone."""
    points_NP = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    start_KP = torch.cat([points_NP[:3], points_NP[:9] + 100])
    expected = KMeans(12, max_iter=1, init=start_KP).cluster(points_NP)
    holes_NP = torch.full((600, 4), torch.nan)
    holes_NP[1::2] = points_NP
    bounds = [(0, 2), (2, 250), (250, 250), (250, 600)]  # The first rank has no readable row but one, the third none at all.

    def work(rows: Tensor, ranks: Ranks) -> Any:
        return KMeans(12, max_iter=1, init=start_KP).cluster(holes_NP[rows], ranks=ranks)

    found = on_ranks([torch.arange(first, end) for first, end in bounds], work)
    assert expected.n_repaired > 0
    for assignment in found:
        assert torch.equal(assignment.centroids_KP, expected.centroids_KP)
        assert assignment.n_repaired == expected.n_repaired
    labels_N = torch.cat([assignment.labels_N for assignment in found])
    assert torch.equal(labels_N[1::2], expected.labels_N)
    assert (labels_N[::2] == -1).all()
