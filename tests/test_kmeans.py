"""Lloyd's algorithm against scikit-learn and naive loops; what it promises about skipping, sums, order, repairs, memory."""

import math
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from gpu_path import Operations, as_on_a_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans
from thread_ranks import on_ranks
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering import kmeans as module
from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.kmeans import ExactSums, KMeans, LloydResult, lloyd
from deepcluster.clustering.nearest import nearest_centroids
from deepcluster.clustering.starts import fill_empty, split_largest
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError


def blobs(n: int, dim: int, n_clusters: int, *, seed: int = 0, spread: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_clusters, dim, generator=generator)
    which = torch.randint(n_clusters, (n,), generator=generator)
    return centres[which] + spread * torch.randn(n, dim, generator=generator)


def assert_same(one: LloydResult, two: LloydResult) -> None:
    """Bit for bit."""
    assert torch.equal(one.labels_N, two.labels_N)
    assert torch.equal(one.centroids_KP, two.centroids_KP)
    assert torch.equal(one.squared_N, two.squared_N)
    assert one.inertia_history == two.inertia_history
    assert one.n_repaired == two.n_repaired


def naive_lloyd(points: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """In float64, one distance at a time; clusters must not become empty."""
    centroids, history = centroids.copy(), []
    for iteration in range(iterations + 1):
        squares = np.array([[((point - centroid) ** 2).sum() for centroid in centroids] for point in points])
        labels = squares.argmin(axis=1)
        history.append(squares.min(axis=1).sum())
        if iteration < iterations:
            centroids = np.array([points[labels == cluster].mean(axis=0) for cluster in range(len(centroids))])
    return labels, centroids, history


def test_four_points_by_hand() -> None:
    """From (0, 0) and (10, 0): pairs at x = 0 and x = 10, means half-way up; 4 × 1² = 4 is left."""
    points_NP = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])
    result = lloyd(points_NP, points_NP[[0, 2]], max_iter=5)
    assert result.labels_N.tolist() == [0, 0, 1, 1]
    assert result.centroids_KP.tolist() == [[0, 1], [10, 1]]
    assert result.squared_N.tolist() == [1, 1, 1, 1]
    assert result.inertia_history == (8, 4)  # it ends early: the second assignment changes no label
    assert result.n_repaired == 0


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_equals_a_naive_loop(iterations: int) -> None:
    points_NP = blobs(150, 5, 6)
    labels, centroids, history = naive_lloyd(points_NP.double().numpy(), points_NP[:6].double().numpy(), iterations)
    result = lloyd(points_NP, points_NP[:6], max_iter=iterations)
    assert result.labels_N.tolist() == labels.tolist()
    np.testing.assert_allclose(result.centroids_KP, centroids, atol=1e-5)
    np.testing.assert_allclose(result.inertia_history, history[: len(result.inertia_history)], rtol=1e-5)
    np.testing.assert_allclose(result.squared_N.sum(), history[-1], rtol=1e-5)


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_equals_scikit_learn(iterations: int) -> None:
    """`max_iter` of scikit-learn counts moves of the centroids, and a last assignment follows: as here."""
    points_NP = blobs(2000, 8, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = SklearnKMeans(20, init=points_NP[:20].numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=iterations)
        oracle.fit(points_NP.numpy())
    ours = KMeans(20, max_iter=iterations, init=points_NP[:20]).cluster(points_NP)
    assert ours.n_repaired == 0
    assert ours.labels_N.tolist() == oracle.labels_.tolist()
    np.testing.assert_allclose(ours.centroids_KP, oracle.cluster_centers_, atol=1e-5)
    assert ours.inertia == pytest.approx(oracle.inertia_, rel=1e-5)
    assert ours.inertia == pytest.approx(ours.inertia_history[-1], rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    dim=st.integers(1, 5),
    n_clusters=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    grid=st.booleans(),
)
def test_inertia_never_rises(n: int, dim: int, n_clusters: int, seed: int, grid: bool) -> None:
    """Nor does it where clusters become empty and are repaired; points on a grid make many duplicates and ties."""
    generator = torch.Generator().manual_seed(seed)
    points_NP = torch.randn(n, dim, generator=generator)
    if grid:
        points_NP = points_NP.round()
    start_KP = 2 * torch.randn(n_clusters, dim, generator=generator)
    history = np.array(lloyd(points_NP, start_KP, max_iter=15).inertia_history)
    assert (np.diff(history) <= 1e-5 * history[0] + 1e-9).all()


def test_permuted_rows_give_permuted_labels() -> None:
    points_NP = blobs(500, 6, 8)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    start_KP = points_NP[:8]
    labels_N = KMeans(8, init=start_KP).cluster(points_NP).labels_N
    assert torch.equal(KMeans(8, init=start_KP).cluster(points_NP[order]).labels_N, labels_N[order])


def test_the_start_is_not_changed() -> None:
    points_NP = blobs(100, 3, 4)
    start_KP = points_NP[:4].clone()
    lloyd(points_NP, start_KP, max_iter=3)
    assert torch.equal(start_KP, points_NP[:4])


# Empty clusters, duplicates, extremes


def test_empty_clusters_are_repaired() -> None:
    points_NP = blobs(600, 4, 6, spread=0.3)
    far_KP = torch.full((8, 4), 1e3) + torch.arange(8.0)[:, None]
    assignment = KMeans(12, max_iter=20, init=torch.cat([points_NP[:4], far_KP])).cluster(points_NP)
    assert assignment.n_repaired >= 8
    assert assignment.sizes_K().min() > 0


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(2, 60),
    dim=st.integers(1, 20),
    n_clusters=st.integers(1, 60),
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e4]),
    kind=st.sampled_from(["far", "equal", "drawn twice"]),
    iterations=st.integers(1, 12),
    spherical=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_no_cluster_is_empty(
    n: int, dim: int, n_clusters: int, offset: float, kind: str, iterations: int, spherical: bool, seed: int
) -> None:
    """Where there are as many distinct points as clusters, however few the iterations and wherever the points are."""
    generator = torch.Generator().manual_seed(seed)
    points_NP = offset + torch.randn(n, dim, generator=generator)
    if spherical:
        points_NP = normalize(points_NP)
    n_clusters = min(len(points_NP.unique(dim=0)), n_clusters)
    start_KP = {
        "far": offset + 50 + torch.rand(n_clusters, dim, generator=generator),
        "equal": points_NP[:1].repeat(n_clusters, 1),
        "drawn twice": points_NP[torch.randint(n, (n_clusters,), generator=generator)],
    }[kind]
    start_KP = normalize(start_KP) if spherical else start_KP
    result = lloyd(points_NP, start_KP, max_iter=iterations, spherical=spherical)
    assert torch.bincount(result.labels_N, minlength=n_clusters).min() > 0
    history = np.array(result.inertia_history)
    assert (np.diff(history) <= 1e-5 * history[0] + 1e-9).all()
    labels_N, squared_N = nearest_centroids(points_NP, result.centroids_KP)
    assert torch.equal(result.labels_N, labels_N)
    assert torch.equal(result.squared_N, squared_N)


def test_no_cluster_is_empty_where_the_largest_holds_one_image_many_times() -> None:
    """A third of the rows are the same: that cluster is the largest at every iteration, and can't be split."""
    points_NP = torch.cat([torch.full((300, 16), 8.0), torch.randn(700, 16, generator=torch.Generator().manual_seed(0))])
    for seed in range(5):
        assignment = KMeans(10, max_iter=20).cluster(points_NP, seed=seed)
        assert assignment.sizes_K().min() > 0


SQUARES_K = torch.tensor([10.0, 0.0, 0.0, 64.0, 0.0], dtype=torch.float64)


def test_split_takes_the_largest_clusters_and_leaves_their_centroids() -> None:
    """By hand: 64 / (8 points × 2 components) = 2², 10 / (5 × 2) = 1²; a sixteenth of it away along each component."""
    centroids_KP = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0], [5.0, 6.0], [9.0, 9.0]])
    before_KP = centroids_KP.clone()
    assert split_largest(centroids_KP, torch.tensor([5, 1, 0, 8, 0]), SQUARES_K, seed=0) == 2
    assert torch.equal(centroids_KP[[0, 1, 3]], before_KP[[0, 1, 3]])
    assert (centroids_KP[2] - before_KP[3]).abs().tolist() == [2 / 16] * 2
    assert (centroids_KP[4] - before_KP[0]).abs().tolist() == [1 / 16] * 2


def test_split_goes_another_way_at_each_iteration() -> None:
    """Else a cluster that has no width in that one direction would never be split."""
    steps = set()
    for seed in range(40):
        centroids_KP = torch.zeros(5, 2)
        split_largest(centroids_KP, torch.tensor([5, 1, 0, 8, 0]), SQUARES_K, seed=seed)
        steps.add(tuple(centroids_KP[2].sign().tolist()))
    assert steps == {(1, 1), (1, -1), (-1, 1), (-1, -1)}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_points_on_a_line_are_split_whatever_its_direction(sign: float) -> None:
    """Half and half after three iterations: the empty cluster began in the middle, not at the end of the line."""
    points_NP = torch.arange(101.0)[:, None] * torch.tensor([1.0, sign])
    result = lloyd(points_NP, points_NP[50:51].repeat(2, 1), max_iter=3)
    assert torch.bincount(result.labels_N).min() >= 49


def test_clusters_of_one_or_without_width_are_never_split() -> None:
    centroids_KP = torch.tensor([[1.0], [2.0], [7.0], [8.0], [9.0]])
    squares_K = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert split_largest(centroids_KP, torch.tensor([1, 2, 0, 0, 1]), squares_K, seed=0) == 1
    assert centroids_KP[[0, 1, 3, 4]].flatten().tolist() == [1.0, 2.0, 8.0, 9.0]
    assert abs(float(centroids_KP[2, 0]) - 2) == 1 / 16


def test_clusters_of_equal_points_do_not_stand_in_the_way_of_others() -> None:
    """The largest has no width: the next one is split."""
    centroids_KP = torch.tensor([[1.0], [2.0], [7.0]])
    squares_K = torch.tensor([0.0, 8.0, 0.0], dtype=torch.float64)
    assert split_largest(centroids_KP, torch.tensor([9, 2, 0]), squares_K, seed=0) == 1
    assert abs(float(centroids_KP[2, 0]) - 2) == 2 / 16


@pytest.mark.parametrize("bounds", [[0, 7], [0, 0, 3, 7], [0, 5, 7]])
def test_empty_clusters_are_filled_with_the_farthest_points(bounds: list[int]) -> None:
    """By hand: (9), then (-6); (9) again, an equal, is passed over, and so is the only point of its cluster, (100)."""
    points_NP = torch.tensor([[0.0], [9.0], [1.0], [-6.0], [9.0], [100.0], [0.5]])
    labels_N, distances_N = torch.tensor([0, 0, 0, 0, 0, 4, 0]), torch.tensor([0, 81.0, 1, 36, 81, 400, 0.25])
    centroids_KP = torch.tensor([[0.0], [50.0], [60.0], [70.0], [80.0]])
    sizes_K = torch.tensor([6, 0, 0, 0, 1])

    def work(rows: Tensor, ranks: Ranks) -> tuple[int, list[float]]:
        filled_KP = centroids_KP.clone()
        n_filled = fill_empty(filled_KP, sizes_K, points_NP[rows], labels_N[rows], distances_N[rows], ranks=ranks)
        return n_filled, filled_KP.flatten().tolist()

    shares = [torch.arange(first, end) for first, end in pairwise(bounds)]
    assert on_ranks(shares, work) == [(3, [0, 9, -6, 1, 80])] * len(shares)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
def test_equal_rows_end_in_one_cluster_without_inertia(value: float) -> None:
    assignment = KMeans(3).cluster(torch.full((50, 4), value))
    assert assignment.sizes_K().max() == 50
    assert assignment.inertia == pytest.approx(0, abs=1e-9)
    assert assignment.centroids_KP.isfinite().all()


def test_many_duplicates() -> None:
    """Three places, 100 rows each: three clusters are enough, the other four are free to be empty."""
    places = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    assignment = KMeans(7).cluster(places.repeat(100, 1), seed=3)
    assert assignment.inertia == pytest.approx(0, abs=1e-6)
    of_place = assignment.labels_N.reshape(100, 3)
    assert all(len(of_place[:, place].unique()) == 1 for place in range(3))
    assert len(of_place[0].unique()) == 3


def test_rows_of_zeros_are_points_like_others() -> None:
    points_NP = torch.cat([normalize(blobs(90, 4, 3)), torch.zeros(10, 4)])
    assignment = KMeans(4).cluster(points_NP, seed=1)
    assert (assignment.labels_N >= 0).all()
    assert len(assignment.labels_N[90:].unique()) == 1
    assert assignment.distances_N.isfinite().all()


def test_one_cluster_is_the_mean() -> None:
    points_NP = blobs(100, 5, 3)
    assignment = KMeans(1).cluster(points_NP)
    torch.testing.assert_close(assignment.centroids_KP[0], points_NP.double().mean(dim=0).float())
    assert assignment.inertia == pytest.approx(float(points_NP.double().var(dim=0, correction=0).sum()) * 100, rel=1e-5)


def test_as_many_clusters_as_points() -> None:
    assignment = KMeans(40).cluster(blobs(40, 5, 3) + 100)
    assert sorted(assignment.labels_N.tolist()) == list(range(40))
    assert assignment.distances_N.tolist() == [0] * 40


@pytest.mark.parametrize("n_clusters", [0, 8, 10])
def test_too_many_clusters_is_told_with_the_values(n_clusters: int) -> None:
    """Rows that are not finite do not count."""
    points_NP = torch.randn(8, 2)
    points_NP[3] = torch.nan
    with pytest.raises(InputError, match=f"clusters={n_clusters} .* 7 points"):
        KMeans(n_clusters).cluster(points_NP)


@pytest.mark.parametrize("shape", [(3, 2), (4, 3)])
def test_a_start_of_another_shape_is_told(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"not \(4, 2\)"):
        KMeans(4, init=torch.zeros(shape)).cluster(torch.randn(10, 2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_stay_unassigned(bad: float) -> None:
    points_NP = blobs(100, 4, 3)
    holes_NP = points_NP.clone()
    holes_NP[[0, 50], [1, 2]] = bad
    seen_N = torch.ones(100, dtype=torch.bool)
    seen_N[[0, 50]] = False
    assignment = KMeans(3).cluster(holes_NP)
    assert assignment.labels_N[~seen_N].tolist() == [-1, -1]
    assert assignment.distances_N[~seen_N].isnan().all()
    assert torch.equal(assignment.labels_N[seen_N], KMeans(3).cluster(points_NP[seen_N]).labels_N)
    assert assignment.sizes_K().sum() == 98


def test_the_seed_alone_decides() -> None:
    points_NP = blobs(300, 4, 10)
    torch.manual_seed(5)
    one = KMeans(10, max_iter=2).cluster(points_NP, seed=7)
    torch.manual_seed(6)
    two = KMeans(10, max_iter=2).cluster(points_NP, seed=7)
    assert torch.equal(one.labels_N, two.labels_N)
    assert torch.equal(one.centroids_KP, two.centroids_KP)
    assert not torch.equal(one.centroids_KP, KMeans(10, max_iter=2).cluster(points_NP, seed=8).centroids_KP)


def test_advance_is_called_after_each_assignment_and_may_stop() -> None:
    points_NP = blobs(200, 4, 6)
    units: list[int] = []
    clusterer = KMeans(6, init=points_NP[:6], max_iter=4)
    result = clusterer.cluster(points_NP, advance=units.append)
    assert units == [1] * len(result.inertia_history)
    assert sum(units) == clusterer.most_steps

    def stop(unit: int) -> None:
        units.append(unit)
        if len(units) == 2:
            raise KeyboardInterrupt

    units.clear()
    with pytest.raises(KeyboardInterrupt):
        lloyd(points_NP, points_NP[:6], max_iter=4, advance=stop)


def test_assignments_that_fill_empty_clusters_are_no_units() -> None:
    points_NP = blobs(600, 4, 6, spread=0.3)
    start_KP = torch.cat([points_NP[:4], torch.full((8, 4), 1e3) + torch.arange(8.0)[:, None]])
    units: list[int] = []
    result = lloyd(points_NP, start_KP, max_iter=1, advance=units.append)
    assert len(units) == len(result.inertia_history) > 2
    assert sum(units) == 2


# Skipping what can't change


def whitened(n: int, dim: int) -> Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(0)))


def grid(n: int, dim: int, values: int) -> Tensor:
    return torch.randint(values, (n, dim), generator=torch.Generator().manual_seed(0)).float()


def starts() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Points, centroids: with clusters that become empty, ties, equal centroids and equal points among them."""
    mixture_NP, unit_NP, grid_NP, coarse_NP = blobs(3000, 16, 40), whitened(2000, 32), grid(1000, 3, 6), grid(400, 16, 2)
    far_KP = torch.cat([mixture_NP[:30], 50 + blobs(30, 16, 5)])
    yield "mixture", mixture_NP, mixture_NP[:60]
    yield "mixture, few components", blobs(2000, 5, 30), blobs(2000, 5, 30)[:40]
    yield "mixture off the origin", mixture_NP + 100, mixture_NP[:60] + 100
    yield "unit rows", unit_NP, unit_NP[:50]
    yield "ties", grid_NP, grid_NP[:50].unique(dim=0)
    yield "ties, equal centroids", grid_NP, grid_NP[:150]
    yield "ties, whole numbers", coarse_NP, coarse_NP[:100]
    yield "many become empty", mixture_NP, far_KP
    yield "all centroids equal", mixture_NP, mixture_NP[:1].repeat(40, 1)
    yield "all centroids equal, few points", mixture_NP[:30], mixture_NP[:1].repeat(20, 1)
    yield "half of the centroids equal", mixture_NP[:100], torch.cat([mixture_NP[:40], mixture_NP[:1].repeat(40, 1)])
    yield "more centroids than places", grid(300, 2, 3), grid(300, 2, 3)[:100] + 0.25
    yield "nearly as many centroids as points", mixture_NP[:300], mixture_NP[:250]
    yield "equal points", torch.ones(50, 16), mixture_NP[:5]
    yield "zeros", torch.zeros(50, 16), torch.zeros(5, 16)


STARTING = {name: (points_NP, start_KP) for name, points_NP, start_KP in starts()}


def starting(name: str, spherical: bool) -> tuple[Tensor, Tensor]:
    points_NP, start_KP = STARTING[name]
    return (normalize(points_NP), normalize(start_KP)) if spherical else (points_NP, start_KP)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("name", STARTING)
def test_what_is_skipped_changes_nothing(name: str, spherical: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against comparing every point with every centroid at every iteration."""
    points_NP, start_KP = starting(name, spherical)
    skipping = lloyd(points_NP, start_KP, max_iter=20, spherical=spherical)
    monkeypatch.setattr(module, "MOST_MOVED", -1.0)
    whole = lloyd(points_NP, start_KP, max_iter=20, spherical=spherical)
    assert_same(skipping, whole)
    assert set(whole.compared_history) == {1.0}
    labels_N, squared_N = nearest_centroids(points_NP, whole.centroids_KP)
    assert torch.equal(whole.labels_N, labels_N)
    assert torch.equal(whole.squared_N, squared_N)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 80),
    dim=st.integers(1, 20),
    n_clusters=st.integers(1, 40),
    values=st.sampled_from([0, 2, 3, 10]),
    seed=st.integers(0, 10_000),
)
def test_what_is_skipped_never_changes_anything(n: int, dim: int, n_clusters: int, values: int, seed: int) -> None:
    """On a grid of few values (0: none) many centroids are equal and many clusters empty."""
    generator = torch.Generator().manual_seed(seed)
    points_NP = torch.randn(n, dim, generator=generator)
    if values:
        points_NP = torch.randint(values, (n, dim), generator=generator).float()
    start_KP = points_NP[torch.randint(n, (n_clusters,), generator=generator)]
    skipping = lloyd(points_NP, start_KP, max_iter=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_MOVED", -1.0)
        assert_same(skipping, lloyd(points_NP, start_KP, max_iter=12))


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("name", STARTING)
def test_a_gpu_goes_another_way_to_the_same(name: str, spherical: bool) -> None:
    points_NP, start_KP = starting(name, spherical)
    with as_on_a_gpu():
        found = lloyd(points_NP, start_KP, max_iter=20, spherical=spherical)
    assert_same(lloyd(points_NP, start_KP, max_iter=20, spherical=spherical), found)


def test_an_iteration_on_a_gpu_starts_few_kernels() -> None:
    """At 6 µs each they take longer than the products where points are few: DeepCluster-v2's heads on small sets."""
    points_NP, counts = whitened(3000, 64), []
    for iterations in (3, 9):
        with as_on_a_gpu(), Operations() as operations:
            found = lloyd(points_NP, points_NP[:150], max_iter=iterations, spherical=True)
        assert len(found.inertia_history) == iterations + 1
        counts.append(operations.counts)
    assert (counts[1]["launches"] - counts[0]["launches"]) / 6 < 170
    assert (counts[1]["waits"] - counts[0]["waits"]) / 6 < 12


def test_little_is_compared_where_little_moves() -> None:
    points_NP = blobs(3000, 16, 40, spread=0.3)
    compared = lloyd(points_NP, points_NP[:60], max_iter=40).compared_history
    assert compared[0] == 1
    assert compared[-1] < 0.1


def test_centroids_left_behind_are_found_again() -> None:
    """By hand: five centroids at 0; the mean of the points moves away, one goes along, three stay, and win (0, 0)."""
    points_NP = torch.tensor([[0.0, 0.0], [4.0, 4.0], [8.0, 8.0]])
    result = lloyd(points_NP, torch.zeros(5, 2), max_iter=1)
    assert result.centroids_KP[2:].tolist() == [[0, 0]] * 3
    assert result.labels_N[0] == 2


# Sums


def sums_of(points_NP: Tensor, labels_N: Tensor, n_clusters: int) -> Tensor:
    return ExactSums(points_NP, n_clusters, ONE_PROCESS).update(labels_N)[0]


def heavy(n: int, dim: int) -> Tensor:
    """Numbers of so many sizes that float64 could not add them without rounding."""
    sizes_N = 10 * torch.rand(n, 1, generator=torch.Generator().manual_seed(2)) - 5
    return blobs(n, dim, 10) * 10**sizes_N + torch.linspace(0, 100, dim)


def test_sums_are_those_of_fsum() -> None:
    points_NP, labels_N = heavy(3000, 8), torch.randint(20, (3000,), generator=torch.Generator().manual_seed(0))
    labels_N[labels_N == 7] = 8
    sums_KP, sizes_K = ExactSums(points_NP, 20, ONE_PROCESS).update(labels_N)
    for cluster in range(20):
        rows = points_NP[labels_N == cluster].double().tolist()
        exact_P = [math.fsum(column) for column in zip(*rows, strict=True)] if rows else [0.0] * 8
        np.testing.assert_allclose(sums_KP[cluster], exact_P, rtol=1e-12, atol=1e-12 * float(sums_KP.abs().max()))
    assert torch.equal(sizes_K, torch.bincount(labels_N, minlength=20))


@pytest.mark.parametrize("points_NP", [heavy(3000, 8), whitened(2000, 32), grid(1000, 3, 6), torch.zeros(10, 3)])
def test_sums_are_the_same_in_any_order_and_by_any_way(points_NP: Tensor) -> None:
    """Points permuted; labels that change in steps; shares of ranks: not a bit differs."""
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(12, (len(points_NP),), generator=generator) for _ in range(4)]
    labels.append(torch.where(torch.rand(len(points_NP), generator=generator) < 0.03, 5, labels[-1]))
    expected_KP = sums_of(points_NP, labels[-1], 12)
    order_N = torch.randperm(len(points_NP), generator=generator)
    assert torch.equal(sums_of(points_NP[order_N], labels[-1][order_N], 12), expected_KP)

    def work(rows: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        sums = ExactSums(points_NP[rows], 12, ranks)
        return [sums.update(labels_N[rows]) for labels_N in labels][-1]

    n = len(points_NP)
    every_N = torch.arange(n)
    for shares in ([every_N], [every_N[: n // 3], every_N[n // 3 :]], [order_N[:1], order_N[:0], order_N[1:]]):
        for sums_KP, sizes_K in on_ranks(shares, work):
            assert torch.equal(sums_KP, expected_KP)
            assert torch.equal(sizes_K, torch.bincount(labels[-1], minlength=12))


# Ending early


@pytest.mark.parametrize("tolerance", [0.2, 0.01, 0.001])
def test_tolerance_ends_where_the_inertia_falls_by_less_than_that_share(tolerance: float) -> None:
    points_NP = blobs(1000, 6, 30)
    history = lloyd(points_NP, points_NP[:30], max_iter=30).inertia_history
    end = next(i for i in range(1, len(history)) if history[i - 1] - history[i] <= tolerance * history[i - 1])
    result = lloyd(points_NP, points_NP[:30], max_iter=30, tol=tolerance)
    assert result.inertia_history == history[: end + 1]
    assert torch.equal(result.centroids_KP, lloyd(points_NP, points_NP[:30], max_iter=end).centroids_KP)
    assert end < len(history) - 1


# Spherical


def naive_spherical(points: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """In float64, by cosines; clusters must not become empty."""
    points, centroids = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (points, centroids))
    for _ in range(iterations):
        labels = (points @ centroids.T).argmax(axis=1)
        sums = np.array([points[labels == cluster].sum(axis=0) for cluster in range(len(centroids))])
        centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return (points @ centroids.T).argmax(axis=1), centroids


@pytest.mark.parametrize("iterations", [0, 1, 8])
def test_spherical_equals_a_naive_loop(iterations: int) -> None:
    """Rows of many lengths: only their directions count."""
    points_NP = blobs(400, 6, 8) * torch.logspace(-2, 2, 400)[:, None]
    labels, centroids = naive_spherical(points_NP.double().numpy(), points_NP[:8].double().numpy(), iterations)
    assignment = KMeans(8, max_iter=iterations, spherical=True, init=points_NP[:8]).cluster(points_NP)
    assert assignment.labels_N.tolist() == labels.tolist()
    np.testing.assert_allclose(assignment.centroids_KP, centroids, atol=1e-5)
    assert assignment.n_repaired == 0


def test_spherical_centroids_have_unit_length_where_clusters_were_empty_and_rows_are_zeros() -> None:
    points_NP = blobs(600, 6, 8)
    points_NP[5::60] = 0
    start_KP = torch.cat([points_NP[:5], points_NP[:1].repeat(5, 1), -torch.ones(2, 6)])
    assignment = KMeans(12, spherical=True, init=start_KP).cluster(points_NP)
    assert assignment.n_repaired > 0
    assert assignment.sizes_K().min() > 0
    torch.testing.assert_close(assignment.centroids_KP.norm(dim=1), torch.ones(12), atol=1e-6, rtol=0)
    torch.testing.assert_close(assignment.distances_N[5::60], torch.ones(10), atol=1e-6, rtol=0)


# Inputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_any_floating_type_is_as_its_float32(dtype: torch.dtype, start: str) -> None:
    points_NP = blobs(400, 6, 8).to(dtype)
    one, two = (KMeans(10, init=start).cluster(rows) for rows in (points_NP, points_NP.float()))
    assert torch.equal(one.labels_N, two.labels_N)
    assert torch.equal(one.centroids_KP, two.centroids_KP)
    assert one.centroids_KP.dtype == one.distances_N.dtype == torch.float32


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("start", ["random", "k-means++"])
@pytest.mark.parametrize("dim", [3, 40])
def test_rows_need_not_be_contiguous(dim: int, start: str, spherical: bool) -> None:
    points_NP = blobs(500, dim, 8)
    expected = KMeans(20, init=start, spherical=spherical).cluster(points_NP)
    for rows_NP in (points_NP.T.contiguous().T, torch.cat([points_NP] * 2, dim=1)[:, dim:], points_NP.repeat(2, 1)[500:]):
        found = KMeans(20, init=start, spherical=spherical).cluster(rows_NP)
        assert torch.equal(found.labels_N, expected.labels_N)
        assert torch.equal(found.centroids_KP, expected.centroids_KP)
        assert torch.equal(found.distances_N, expected.distances_N)


def test_a_float64_row_beyond_float32_is_a_point_like_others() -> None:
    points_NP = blobs(50, 4, 3).double()
    points_NP[7] = 1e39
    assignment = KMeans(2).cluster(points_NP)
    assert (assignment.labels_N == assignment.labels_N[7]).sum() == 1
    assert assignment.centroids_KP[assignment.labels_N[7]].tolist() == pytest.approx([1e39] * 4)


def test_number_of_threads_changes_nothing() -> None:
    points_NP = blobs(6000, 40, 30)
    threads, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(KMeans(90, init="k-means++", max_iter=8).cluster(points_NP))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result.labels_N, results[0].labels_N)
        assert torch.equal(result.centroids_KP, results[0].centroids_KP)
        assert torch.equal(result.distances_N, results[0].distances_N)
        np.testing.assert_allclose(result.inertia_history, results[0].inertia_history, rtol=1e-12)


def test_equals_scikit_learn_in_256_components() -> None:
    points_NP = blobs(3000, 256, 50, spread=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = SklearnKMeans(50, init=points_NP[:50].numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=10)
        oracle.fit(points_NP.numpy())
    ours = KMeans(50, max_iter=10, init=points_NP[:50]).cluster(points_NP)
    assert ours.n_repaired == 0
    assert ours.labels_N.tolist() == oracle.labels_.tolist()
    np.testing.assert_allclose(ours.centroids_KP, oracle.cluster_centers_, atol=1e-5)


# Ranks


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("iterations", [1, 6])
def test_rows_spread_over_ranks_give_the_same(iterations: int, spherical: bool) -> None:
    """Three ranks with 200, 0 and 300 rows."""
    points_NP = normalize(blobs(500, 4, 6)) if spherical else blobs(500, 4, 6)
    start_KP = torch.cat([points_NP[:6], torch.full((14, 4), 50.0)])
    expected = lloyd(points_NP, start_KP, max_iter=iterations, spherical=spherical)

    def work(rows_NP: Tensor, ranks: Ranks) -> LloydResult:
        return lloyd(rows_NP, start_KP, max_iter=iterations, spherical=spherical, ranks=ranks)

    results = on_ranks(points_NP.split([200, 0, 300]), work)
    assert torch.equal(torch.cat([result.labels_N for result in results]), expected.labels_N)
    for result in results:
        assert torch.equal(result.centroids_KP, expected.centroids_KP)
        np.testing.assert_allclose(result.inertia_history, expected.inertia_history, rtol=1e-12)
        assert result.n_repaired == expected.n_repaired > 0
        assert all(0 <= share <= 1 for share in result.compared_history)
    with as_on_a_gpu():
        fused = on_ranks(points_NP.split([200, 0, 300]), work)
    for result, again in zip(results, fused, strict=True):
        assert_same(result, again)


@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_a_fit_spread_over_ranks_is_the_same(start: str) -> None:
    """Uneven shares, a rank without rows, one with none that are finite."""
    points_NP = blobs(500, 4, 6)
    points_NP[[0, 130, 131, 132, 499]] = torch.nan
    bounds = [0, 130, 133, 133, 340, 500]
    shares = [points_NP[first:end] for first, end in pairwise(bounds)]

    def work(rows_NP: Tensor, ranks: Ranks) -> Assignment:
        return KMeans(30, init=start).cluster(rows_NP, seed=4, ranks=ranks)

    results = on_ranks(shares, work)
    expected = KMeans(30, init=start).cluster(points_NP, seed=4)
    assert torch.equal(torch.cat([result.labels_N for result in results]), expected.labels_N)
    assert all(torch.equal(result.centroids_KP, expected.centroids_KP) for result in results)


MEMORY = """
import resource, torch
from deepcluster.clustering.kmeans import KMeans
torch.set_num_threads(1)
points = torch.randn(100_000, 256)
KMeans(10, max_iter=1).cluster(points[:1000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
KMeans(1000, max_iter=2).cluster(points)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_stays_far_below_a_matrix_of_all_distances() -> None:
    """100,000 × 1,000 scores would take 400 MB, a float64 copy of the points 205 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6


def test_nearly_as_many_clusters_as_points_are_quick() -> None:
    points_NP = blobs(21_000, 16, 300)
    begun = time.perf_counter()
    assignment = KMeans(20_000, max_iter=3).cluster(points_NP)
    assert time.perf_counter() - begun < 30
    assert assignment.sizes_K().min() > 0
    assert sorted(assignment.inertia_history, reverse=True) == list(assignment.inertia_history)


@pytest.mark.slow
def test_a_hundred_thousand_clusters() -> None:
    points_NP = blobs(150_000, 32, 2000)
    assignment = KMeans(100_000, max_iter=2).cluster(points_NP)
    assert assignment.sizes_K().min() > 0
    some = torch.randperm(150_000, generator=torch.Generator().manual_seed(0))[:200]
    exact = torch.cdist(
        points_NP[some].double(), assignment.centroids_KP.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    torch.testing.assert_close(assignment.distances_N[some].double(), exact.min(dim=1).values, rtol=1e-5, atol=0)
