"""Clusters within super-clusters: against k-means of each super-class by itself, shares, and real processes.

N points, P components, K clusters, S super-classes, W ranks.
"""

from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing import spawn

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.hierarchical import HierarchicalKMeans, shares_of
from deepcluster.clustering.kmeans import KMeans
from deepcluster.core.distributed import ONE_PROCESS, Ranks, group
from deepcluster.core.errors import InputError

N = 501


def points(n: int = N) -> Tensor:
    """Blobs of unequal sizes, many rows equal, some not finite."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(12, 7, generator=generator)
    which_N = (torch.rand(n, generator=generator).square() * 12).long()
    points_NP = centres[which_N] + torch.randn(n, 7, generator=generator)
    points_NP[::9] = points_NP[0]
    points_NP[[7, 400]] = torch.nan
    return points_NP


def rotations(n: int = N) -> Tensor:
    return torch.randint(4, (n,), generator=torch.Generator().manual_seed(1)) // torch.tensor([1, 2])[torch.arange(n) % 2]


def assert_same(found: Assignment, expected: Assignment) -> None:
    """Bit for bit, except the last digits of the inertia."""
    assert torch.equal(found.labels_N, expected.labels_N)
    assert torch.equal(found.distances_N.nan_to_num(-1), expected.distances_N.nan_to_num(-1))
    assert torch.equal(found.centroids_KP, expected.centroids_KP)
    assert found.n_repaired == expected.n_repaired
    np.testing.assert_allclose(found.inertia_history, expected.inertia_history, rtol=1e-12)
    for name in ("super_of_cluster_K", "super_centroids_SP"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def clusters_of_supers(found: Assignment) -> list[int]:
    """Number of clusters of each super-class."""
    assert found.super_of_cluster_K is not None and found.super_centroids_SP is not None
    return torch.bincount(found.super_of_cluster_K, minlength=len(found.super_centroids_SP)).tolist()


# One process


@pytest.mark.parametrize("rotated", [False, True])
def test_it_is_k_means_of_each_super_class(rotated: bool) -> None:
    """Super-clusters are those of k-means; within a super-class, clusters are those of k-means of its rows alone."""
    points_NP, n_supers = points(), 3 * (4 if rotated else 1)
    rotations_N = rotations() if rotated else None
    found = HierarchicalKMeans(40, super_clusters=3).cluster(points_NP, rotations_N=rotations_N, seed=5)
    supers = KMeans(3).cluster(points_NP, seed=5)
    supers_N = supers.labels_N
    if rotations_N is not None:
        supers_N = torch.where(supers_N < 0, -1, supers_N * 4 + rotations_N)
    assert found.super_of_cluster_K is not None and found.super_centroids_SP is not None
    assert torch.equal(found.super_centroids_SP, supers.centroids_KP.repeat_interleave(n_supers // 3, dim=0))
    assert found.super_of_cluster_K.tolist() == sorted(found.super_of_cluster_K.tolist())
    sizes = clusters_of_supers(found)
    assert sum(sizes) == 40
    inertia = 0.0
    for number, (first, end) in enumerate(pairwise(accumulate(sizes, initial=0))):
        rows = (supers_N == number).nonzero().flatten()
        if not len(rows):
            assert first == end
            continue
        part = KMeans(end - first).cluster(points_NP[rows], seed=6 + number)
        assert torch.equal(found.labels_N[rows], part.labels_N + first)
        assert torch.equal(found.distances_N[rows], part.distances_N)
        assert torch.equal(found.centroids_KP[first:end], part.centroids_KP)
        inertia += part.inertia_history[-1]
    assert found.labels_N[[7, 400]].tolist() == [-1, -1] and found.distances_N[[7, 400]].isnan().all()
    assert found.inertia_history[-1] == pytest.approx(inertia, rel=1e-12)
    assert found.inertia == pytest.approx(inertia, rel=1e-5)
    assert list(found.inertia_history) == sorted(found.inertia_history, reverse=True)


def test_one_super_cluster_is_plain_k_means() -> None:
    found = HierarchicalKMeans(20, super_clusters=1).cluster(points(), seed=2)
    expected = KMeans(20).cluster(points(), seed=3)
    assert torch.equal(found.labels_N, expected.labels_N) and torch.equal(found.centroids_KP, expected.centroids_KP)
    assert clusters_of_supers(found) == [20]


@pytest.mark.parametrize(("n", "clusters"), [(5, 5), (9, 4), (30, 30), (33, 29)])
def test_few_rows_and_nearly_as_many_clusters(n: int, clusters: int) -> None:
    points_NP = points(500)[100 : 100 + n]
    found = HierarchicalKMeans(clusters, super_clusters=4, max_iter=3).cluster(points_NP)
    assert len(found.centroids_KP) == sum(clusters_of_supers(found)) == clusters
    assert int(found.labels_N.min()) >= 0 and int(found.labels_N.max()) < clusters


def test_all_points_equal_are_one_super_class_and_the_others_have_no_cluster() -> None:
    found = HierarchicalKMeans(6, super_clusters=3).cluster(torch.ones(50, 4))
    assert sorted(clusters_of_supers(found)) == [0, 0, 6]
    assert found.inertia == 0 and len(found.labels_N.unique()) == 1


@pytest.mark.parametrize("rotated", [False, True])
def test_it_counts_its_iterations_and_may_be_stopped(rotated: bool) -> None:
    """Those of a super-cluster's rotations count together."""
    clusterer = HierarchicalKMeans(20, super_clusters=3, max_iter=4)
    units: list[int] = []
    clusterer.cluster(points(), rotations_N=rotations() if rotated else None, advance=units.append)
    assert set(units) <= {0, 1}
    assert 2 / 3 * clusterer.most_steps < sum(units) <= clusterer.most_steps == 20

    def stop(unit: int) -> None:
        units.append(unit)
        if len(units) == 7:
            raise InterruptedError

    units.clear()
    with pytest.raises(InterruptedError):
        clusterer.cluster(points(), advance=stop)


@pytest.mark.parametrize(
    ("clusters", "super_clusters", "rotations_N", "told"),
    [
        (20, 0, None, "super_clusters=0"),
        (3, 4, None, "clusters=3 must be between the 4 super-classes"),
        (15, 4, rotations(), "clusters=15 must be between the 16 super-classes"),
        (N + 1, 4, None, f"and the {N} points"),
        (N - 1, 4, None, f"and the {N - 2} points"),
        (40, 2, rotations() + 1, "from 0 to 3"),
        (40, 2, rotations()[1:], "one per row"),
    ],
)
def test_faults_are_told(clusters: int, super_clusters: int, rotations_N: Tensor | None, told: str) -> None:
    with pytest.raises(InputError, match=told):
        HierarchicalKMeans(clusters, super_clusters=super_clusters).cluster(points(), rotations_N=rotations_N)


# Shares


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 10**9) | st.integers(0, 9), min_size=1, max_size=20), share=st.floats(0, 1))
def test_shares_add_up_and_fit(sizes: list[int], share: float) -> None:
    """Each within one of its exact part of what is left when every super-class has one."""
    some, n_points = sum(size > 0 for size in sizes), sum(sizes)
    n_clusters = some + int(share * (min(n_points, 400_000) - some))
    shares = shares_of(n_clusters, torch.tensor(sizes)).tolist()
    assert sum(shares) == n_clusters
    for size, clusters in zip(sizes, shares, strict=True):
        assert min(1, size) <= clusters <= size
        if size:
            exact = 1 + (n_clusters - some) * (size - 1) / max(1, n_points - some)
            assert abs(clusters - exact) < 1


def test_shares_by_hand() -> None:
    """10 clusters of which 3 are given at once; 7 for weights 59, 29 and 9: 4.26, 2.09, 0.65, the last rounded up."""
    assert shares_of(10, torch.tensor([60, 0, 30, 10])).tolist() == [5, 0, 3, 2]


# Real processes

FITS = {
    "four": {"super_clusters": 4},
    "three": {"super_clusters": 3},
    "two": {"super_clusters": 2},
    "one": {"super_clusters": 1},
    "rotated": {"super_clusters": 2},
    "one point less": {"super_clusters": 5},
}


def fit(name: str, rows: slice, ranks: Ranks = ONE_PROCESS, units: list[int] | None = None) -> Assignment:
    def advance(unit: int) -> None:
        # All ranks call it equally often, so this sum does not wait for ever.
        assert int(ranks.sum(torch.ones(1))) == ranks.size
        if units is not None:
            units.append(unit)

    clusters = N - 3 if name == "one point less" else 45
    clusterer = HierarchicalKMeans(clusters, max_iter=6, **FITS[name])
    rotations_N = rotations()[rows] if name == "rotated" else None
    return clusterer.cluster(points()[rows], rotations_N=rotations_N, seed=3, ranks=ranks, advance=advance)


# Where the rows of each rank begin and end.
BOUNDS = {2: [0, 190, N], 4: [0, 3, 250, N, N]}


def work(rank: int, folder: Path) -> None:
    """All fits of one rank of four, the first two of which work as two before; kept in files."""
    torch.set_num_threads(1)
    for world, bounds in BOUNDS.items():
        if rank >= world:
            continue
        with group(dist.FileStore(str(folder / f"{world}"), world), rank, world) as ranks:
            found, rows = {}, slice(*bounds[rank : rank + 2])
            for name in FITS:
                units: list[int] = []
                found[name] = fit(name, rows, ranks, units), units
            with pytest.raises(InputError, match="on all ranks or on none"):
                rotations_N = rotations()[rows] if rank else None
                HierarchicalKMeans(45, super_clusters=2).cluster(points()[rows], rotations_N=rotations_N, ranks=ranks)
            torch.save(found, folder / f"{world}-{rank}.pt")


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the results of the ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, args=(folder,), nprocs=4)
    return folder


@pytest.fixture(scope="module")
def of_one_process() -> dict[str, Assignment]:
    return {name: fit(name, slice(0, N)) for name in FITS}


@pytest.mark.parametrize("world", BOUNDS)
def test_any_number_of_processes_finds_the_same(world: int, of_ranks: Path, of_one_process: dict[str, Assignment]) -> None:
    results = [torch.load(of_ranks / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
    for name in FITS:
        labels_N = torch.cat([result[name][0].labels_N for result in results])
        distances_N = torch.cat([result[name][0].distances_N for result in results])
        for assignment, units in (result[name] for result in results):
            assert_same(replace(assignment, labels_N=labels_N, distances_N=distances_N), of_one_process[name])
            assert units == results[0][name][1]
