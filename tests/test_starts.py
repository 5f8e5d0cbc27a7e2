"""Starts of k-means: what is drawn, how often, and that ranks draw the same.

N points, P components, K centroids.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.cluster import kmeans_plusplus
from test_kmeans import blobs
from thread_ranks import on_ranks
from torch import Tensor

from deepcluster.clustering import starts as module
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.starts import STARTS, number_points, plus_plus, random_rows
from deepcluster.core.distributed import ONE_PROCESS, Ranks

both = pytest.mark.parametrize("start", STARTS)


def draw(start: str, points_NP: Tensor, n_clusters: int, seed: int) -> Tensor:
    return STARTS[start](points_NP, n_clusters, seed=seed, ranks=ONE_PROCESS)


def drawn_numbers(start: str, n: int, n_clusters: int, seed: int, spread: float = 1.0) -> list[int]:
    """Which rows were drawn: the first component is a row's number."""
    points_NP = torch.cat([torch.arange(n)[:, None] * spread, torch.ones(n, 2)], dim=1)
    return (draw(start, points_NP, n_clusters, seed)[:, 0] / spread).round().int().tolist()


# What is drawn


@both
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 3000), share=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_rows_are_distinct_and_of_the_points(start: str, n: int, share: float, seed: int) -> None:
    n_clusters = min(max(1, int(n * share)), 40)
    numbers = drawn_numbers(start, n, n_clusters, seed)
    assert len(set(numbers)) == n_clusters
    assert set(numbers) <= set(range(n))


@both
def test_all_rows_are_drawn_once_where_there_are_as_many_clusters(start: str) -> None:
    points_NP = blobs(60, 5, 4)
    drawn_KP = draw(start, points_NP, 60, 3)
    assert drawn_KP.unique(dim=0).tolist() == points_NP.unique(dim=0).tolist()


@both
def test_the_seed_decides(start: str) -> None:
    points_NP = blobs(300, 5, 8)
    torch.manual_seed(1)
    one = draw(start, points_NP, 10, 5)
    torch.manual_seed(2)
    assert torch.equal(draw(start, points_NP, 10, 5), one)
    assert not torch.equal(draw(start, points_NP, 10, 6), one)


@both
def test_a_fit_starts_there(start: str) -> None:
    """Of the finite rows alone."""
    points_NP = blobs(300, 5, 8)
    holes_NP = torch.cat([torch.full((1, 5), torch.nan), points_NP[:100], torch.full((7, 5), torch.inf), points_NP[100:]])
    for rows_NP in (points_NP, holes_NP):
        assignment = KMeans(10, init=start, max_iter=0).cluster(rows_NP, seed=5)
        assert torch.equal(assignment.centroids_KP, draw(start, points_NP, 10, 5))


@both
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_equal_rows(start: str, value: float) -> None:
    assert draw(start, torch.full((50, 3), value), 7, 0).tolist() == [[value] * 3] * 7


# How often


def test_random_rows_are_drawn_evenly() -> None:
    counts = Counter(number for seed in range(2000) for number in drawn_numbers("random", 20, 3, seed))
    assert chisquare([counts[number] for number in range(20)]).pvalue > 1e-4


PLACES_NP = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [4.0, 0.0], [4.0, 0.5], [0.0, 0.0]])


def sequence_shares(points: np.ndarray, n_clusters: int) -> dict[tuple[int, ...], float]:
    """How likely each sequence of rows is, by the definition: the first evenly, the next by squared distance."""
    squares = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    shares = {(number,): 1 / len(points) for number in range(len(points))}
    for _ in range(n_clusters - 1):
        longer = {}
        for drawn, share in shares.items():
            nearest = squares[list(drawn)].min(axis=0)
            longer.update({(*drawn, i): share * weight / nearest.sum() for i, weight in enumerate(nearest) if weight > 0})
        shares = longer
    return shares


@pytest.mark.parametrize("bins", [4, module.BINS])
def test_plus_plus_draws_by_squared_distance(bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of three of six points, two of them equal: as often as they are likely, however points fall into bins."""
    monkeypatch.setattr(module, "BINS", bins)
    shares = sequence_shares(PLACES_NP.double().numpy(), 3)
    # The third component tells equal points apart, and is too small to count.
    points_NP = torch.cat([PLACES_NP, torch.arange(6.0)[:, None] * 1e-18], dim=1)
    counts: Counter[tuple[int, ...]] = Counter()
    n_draws = 3000
    for seed in range(n_draws):
        counts[tuple((draw("k-means++", points_NP, 3, seed)[:, 2] * 1e18).round().int().tolist())] += 1
    assert set(counts) <= set(shares)
    # Sequences that are expected less than eight times are counted together.
    expected = {drawn: n_draws * share for drawn, share in shares.items()}
    common = [drawn for drawn, number in expected.items() if number >= 8]
    observed_S = [*(counts[drawn] for drawn in common), n_draws - sum(counts[drawn] for drawn in common)]
    expected_S = [*(expected[drawn] for drawn in common), n_draws - sum(expected[drawn] for drawn in common)]
    assert chisquare(observed_S, expected_S).pvalue > 1e-4


def test_what_has_no_weight_is_never_drawn() -> None:
    """By hand: [0, 1) is cut at 1/4 and 3/4; ends belong to the piece that begins there."""
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    draws = [0.0, 0.2, 0.25, 0.7, 0.75, 1 - 2**-53]
    assert [module._draw(weights, draw) for draw in draws] == [1, 1, 3, 3, 4, 4]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 80), values=st.integers(1, 4), dim=st.integers(1, 3), seed=st.integers(0, 10_000))
def test_plus_plus_draws_no_place_twice_while_others_are_left(n: int, values: int, dim: int, seed: int) -> None:
    points_NP = torch.randint(values, (n, dim), generator=torch.Generator().manual_seed(seed)).float()
    n_places = len(points_NP.unique(dim=0))
    drawn_KP = draw("k-means++", points_NP, n, seed)
    assert len(drawn_KP[:n_places].unique(dim=0)) == n_places
    assert len(drawn_KP) == n


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_plus_plus_finds_every_far_blob(offset: float, scale: float) -> None:
    """Ten blobs 1,000 times as far apart as they are wide: one centroid each, whatever the origin and the unit."""
    centres_KP = torch.eye(10)
    noise_NP = 0.001 * torch.randn(500, 10, generator=torch.Generator().manual_seed(0))
    blob_N = torch.arange(500) % 10
    points_NP = (100 * (centres_KP[blob_N] + noise_NP) + offset) * scale
    for seed in range(5):
        drawn_KP = draw("k-means++", points_NP, 10, seed)
        assert sorted(((drawn_KP / scale - offset) / 100).argmax(dim=1).tolist()) == list(range(10))


def test_plus_plus_leads_to_less_inertia() -> None:
    points_NP = blobs(600, 3, 25, spread=0.05)
    inertia = {
        start: [KMeans(25, init=start).cluster(points_NP, seed=seed).inertia for seed in range(15)] for start in STARTS
    }
    assert np.median(inertia["k-means++"]) < 0.7 * np.median(inertia["random"])


def test_several_trials_per_point_leave_what_those_of_scikit_learn_leave() -> None:
    """Mean squared distance to the nearest drawn point, over many seeds; a single trial leaves far more."""
    points_NP = blobs(400, 3, 25, spread=0.05)

    def left(drawn_KP: Tensor) -> float:
        return float(torch.cdist(points_NP, drawn_KP).amin(dim=1).square().sum())

    ours, single = (
        np.mean([left(plus_plus(points_NP, 25, seed=seed, ranks=ONE_PROCESS, trials=trials)) for seed in range(40)])
        for trials in (5, 1)
    )
    drawn = (kmeans_plusplus(points_NP.numpy(), 25, random_state=seed, n_local_trials=5)[0] for seed in range(40))
    theirs = np.mean([left(torch.from_numpy(one)) for one in drawn])
    assert abs(ours - theirs) < 0.1 * theirs
    assert single > 1.3 * ours


def test_the_best_of_the_trials_is_kept() -> None:
    """Of one far point and many near ones: with as many trials as find it, the far point is always drawn second or first."""
    points_NP = torch.cat([torch.zeros(50, 1), torch.ones(50, 1), torch.full((1, 1), 20.0)])
    for seed in range(20):
        drawn_2P = plus_plus(points_NP, 2, seed=seed, ranks=ONE_PROCESS, trials=40)
        assert 20.0 in drawn_2P.flatten().tolist()


# Ranks


@both
@pytest.mark.parametrize("bounds", [[0, 300, 700], [0, 0, 1, 1, 333, 334, 700], [0, 699, 700, 700]])
@pytest.mark.parametrize("dim", [1, 6])
def test_ranks_draw_the_same(start: str, bounds: list[int], dim: int) -> None:
    """Any shares, also without rows; every rank knows the whole start."""
    points_NP = blobs(700, dim, 9)
    points_NP[100:400] = points_NP[0]
    shares = [points_NP[first:end] for first, end in pairwise(bounds)]
    expected_KP = draw(start, points_NP, 60, 8)

    def work(rows_NP: Tensor, ranks: Ranks) -> Tensor:
        return STARTS[start](rows_NP, 60, seed=8, ranks=ranks)

    for drawn_KP in on_ranks(shares, work):
        assert torch.equal(drawn_KP, expected_KP)


def test_arguments_are_not_changed() -> None:
    points_NP = blobs(100, 4, 3)
    before_NP = points_NP.clone()
    for start in (random_rows, plus_plus):
        start(points_NP, 10, seed=0, ranks=ONE_PROCESS).fill_(7)
        assert torch.equal(points_NP, before_NP)


def test_points_are_numbered_in_the_order_of_the_ranks() -> None:
    counts = [3, 0, 5, 2]
    assert on_ranks(counts, number_points) == [(0, 10), (3, 10), (3, 10), (8, 10)]
