"""Balanced k-means: the sizes it promises, its scaling against a plan that is written out in float64, and ranks."""

from collections.abc import Callable
from itertools import pairwise
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import on_ranks
from torch import Tensor
from torch.multiprocessing import spawn

from deepcluster.clustering import balanced as module
from deepcluster.clustering import parallel
from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.balanced import BalancedKMeans
from deepcluster.clustering.kmeans import KMeans
from deepcluster.core.distributed import ONE_PROCESS, Ranks, group
from deepcluster.core.errors import InputError


def skewed(n: int = 1500, seed: int = 0) -> Tensor:
    """Half of the points lie so close together that k-means leaves them in one cluster."""
    points = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 8))).float()
    points[: n // 2] *= 0.05
    return points[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] + 3


def assert_sizes(found: Assignment, n_points: int, spread: float = 0.1) -> None:
    mean = n_points / found.n_clusters
    sizes_K = found.sizes_K()
    assert int(sizes_K.sum()) == n_points
    assert max(1, floor((1 - spread) * mean)) <= int(sizes_K.min())
    assert int(sizes_K.max()) <= ceil((1 + spread) * mean)


# Sizes


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
def test_no_giant_where_k_means_makes_one(spread: float) -> None:
    points = skewed()
    usual = KMeans(20).cluster(points, seed=0)
    assert int(usual.sizes_K().max()) > 5 * 1500 / 20
    found = BalancedKMeans(20, spread=spread).cluster(points)
    assert_sizes(found, 1500, spread)
    assert found.effective_clusters > 18
    assert usual.inertia < found.inertia < 2 * usual.inertia


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 60),
    share=st.floats(0, 1),
    values=st.sampled_from([0, 1, 3, 1000]),
    spread=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 99),
)
def test_sizes_whatever_the_points(n: int, share: float, values: int, spread: float, seed: int) -> None:
    """Copies and nothing but copies included; as many clusters as points, too."""
    n_clusters = max(1, round(share * n))
    points = torch.randint(-values, values + 1, (n, 3), generator=torch.Generator().manual_seed(seed)).float()
    assert_sizes(BalancedKMeans(n_clusters, max_iter=3, spread=spread).cluster(points, seed=seed), n, spread)


def test_points_that_no_round_of_offers_placed_are_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROUNDS", 1)
    assert_sizes(BalancedKMeans(20).cluster(skewed()), 1500)


def test_clusters_that_are_balanced_stay_as_k_means_finds_them() -> None:
    """Four clouds of 100 points each, far apart."""
    centres = 50 * torch.eye(4).repeat_interleave(100, dim=0)
    points = centres + torch.from_numpy(np.random.default_rng(0).normal(size=(400, 4))).float()
    found = BalancedKMeans(4, init=50 * torch.eye(4)).cluster(points)
    assert found.labels_N.tolist() == [cloud for cloud in range(4) for _ in range(100)]
    assert len(found.inertia_history) == 1


def test_the_points_that_lose_least_are_moved() -> None:
    """Six points on a line near 0, two near 10: of the six, the two nearest to 10 go."""
    points = torch.tensor([[0.0], [0.1], [0.2], [0.3], [0.4], [0.5], [10.0], [10.1]])
    found = BalancedKMeans(2, spread=0.0, max_iter=1, init=torch.tensor([[0.0], [10.0]])).cluster(points)
    assert found.labels_N.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


# The scaling


def scaled_plan(squared_NK: np.ndarray, softness: float, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """Sinkhorn and Knopp's scaling of the whole matrix, rows to 1 and columns to N/K; the plan and the columns' scaling."""
    kernel = np.exp(-squared_NK / softness)
    v = np.ones(kernel.shape[1])
    for _ in range(passes):
        u = 1 / (kernel @ v)
        v = kernel.shape[0] / kernel.shape[1] / (kernel.T @ u)
    return u[:, None] * kernel * v, v


def prices_after(passes: int, points: Tensor, centroids: Tensor, softness: float) -> Tensor:
    balance = module._Balance(points, len(centroids), ONE_PROCESS)
    for _ in range(passes):
        balance.sinkhorn_pass(centroids, softness)
    return balance.prices_K


@pytest.mark.parametrize("passes", [1, 3, 200])
def test_prices_are_the_columns_scaling(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_SCORES", 12 * 17)
    points, softness = skewed(300), 2.0
    centroids = points[:12].clone()
    squared = torch.cdist(points.double(), centroids.double()).square().numpy()
    plan, v = scaled_plan(squared, softness, passes)
    np.testing.assert_allclose(prices_after(passes, points, centroids, softness).numpy(), softness * np.log(v), atol=1e-4)
    if passes == 200:
        np.testing.assert_allclose(plan.sum(axis=0), 300 / 12, rtol=1e-6)
        np.testing.assert_allclose(plan.sum(axis=1), 1, rtol=1e-3)


def test_a_cluster_that_draws_nothing_gets_a_finite_price() -> None:
    points, centroids = skewed(200), torch.cat([skewed(200)[:3], torch.full((1, 8), 1e4)])
    prices = prices_after(3, points, centroids, 0.1)
    assert prices.isfinite().all()
    assert prices.argmax() == 3


# The result


def test_centroids_and_distances_are_those_of_the_members() -> None:
    points = skewed()
    found = BalancedKMeans(20).cluster(points)
    for label in range(20):
        members = points[found.labels_N == label].double()
        torch.testing.assert_close(found.centroids_KP[label].double(), members.mean(dim=0), rtol=1e-5, atol=1e-5)
    distances = (points - found.centroids_KP[found.labels_N]).norm(dim=1)
    torch.testing.assert_close(found.distances_N, distances)
    assert found.inertia == pytest.approx(min(found.inertia_history))


def test_the_same_for_the_same_seed_whatever_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    points = skewed()
    found = BalancedKMeans(20).cluster(points, seed=4)
    assert torch.equal(BalancedKMeans(20).cluster(points, seed=4).labels_N, found.labels_N)
    assert not torch.equal(BalancedKMeans(20).cluster(points, seed=5).labels_N, found.labels_N)
    monkeypatch.setattr(module, "BLOCK_SCORES", 20 * 33)
    monkeypatch.setattr(parallel, "BLOCK_ROWS", 50)
    other = BalancedKMeans(20).cluster(points, seed=4)
    assert other.ari(found.labels_N) > 0.95 and other.inertia == pytest.approx(found.inertia, rel=0.01)


def test_rows_that_are_not_finite_are_unassigned() -> None:
    points = skewed()
    points[[3, 700]] = torch.tensor([[torch.nan], [torch.inf]])
    found = BalancedKMeans(20).cluster(points)
    assert found.labels_N[[3, 700]].tolist() == [-1, -1]
    assert found.distances_N[[3, 700]].isnan().all()
    assert_sizes(found, 1498)


def test_it_counts_its_iterations_and_may_be_stopped() -> None:
    units: list[int] = []
    clusterer = BalancedKMeans(20, max_iter=4)
    found = clusterer.cluster(skewed(), advance=units.append)
    assert sum(units) == clusterer.most_steps
    assert len(found.inertia_history) == 4

    def stop(unit: int) -> None:
        units.append(unit)
        if len(units) == 8:
            raise InterruptedError

    units.clear()
    with pytest.raises(InterruptedError):
        clusterer.cluster(skewed(), advance=stop)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: BalancedKMeans(0).cluster(skewed(30)), "clusters=0"),
        (lambda: BalancedKMeans(31).cluster(skewed(30)), "clusters=31 .* 30 points"),
        (lambda: BalancedKMeans(3, init=torch.zeros(3, 2)).cluster(skewed(30)), "init has shape"),
        (lambda: BalancedKMeans(3, max_iter=0).cluster(skewed(30)), "max_iter=0"),
        (lambda: BalancedKMeans(3, spread=1.0).cluster(skewed(30)), "spread=1"),
        (lambda: BalancedKMeans(3, spread=-0.1).cluster(skewed(30)), "spread=-0.1"),
    ],
)
def test_faults_are_told(make: Callable[[], object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        make()


# Ranks


def assert_as_one_process(found: list[Assignment], expected: Assignment, n_points: int) -> None:
    labels_N = torch.cat([assignment.labels_N for assignment in found])
    whole = Assignment(labels_N, torch.cat([assignment.distances_N for assignment in found]), found[0].centroids_KP)
    assert_sizes(whole, n_points)
    assert torch.equal(labels_N < 0, expected.labels_N < 0)
    assert float((labels_N == expected.labels_N).double().mean()) > 0.98
    for assignment in found:
        assert torch.equal(assignment.centroids_KP, found[0].centroids_KP)
        np.testing.assert_allclose(assignment.inertia_history, expected.inertia_history, rtol=0.01)


@pytest.mark.parametrize("bounds", [[0, 500, 1500], [0, 0, 1, 900, 1500]])
def test_ranks_find_what_one_process_finds(bounds: list[int]) -> None:
    points = skewed()
    points[[3, 700]] = torch.nan

    def fit(rows: slice, ranks: Ranks) -> Assignment:
        return BalancedKMeans(20, max_iter=5).cluster(points[rows], ranks=ranks)

    shares = [slice(first, end) for first, end in pairwise(bounds)]
    assert_as_one_process(on_ranks(shares, fit), BalancedKMeans(20, max_iter=5).cluster(points), 1498)


def work(rank: int, folder: Path) -> None:
    """The fit of one of two processes, kept in a file."""
    torch.set_num_threads(1)
    with group(dist.FileStore(str(folder / "store"), 2), rank, 2) as ranks:
        own_NP = skewed()[slice(*((0, 400), (400, 1500))[rank])]
        found = BalancedKMeans(20, max_iter=5).cluster(own_NP, ranks=ranks)
        torch.save(found.state_dict(), folder / f"{rank}.pt")


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    spawn(work, args=(tmp_path,), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected = BalancedKMeans(20, max_iter=5).cluster(skewed())
    assert_as_one_process([Assignment.from_state_dict(state) for state in states], expected, 1500)
