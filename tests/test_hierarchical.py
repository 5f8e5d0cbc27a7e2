"""Clusters within super-clusters: against k-means of each super-class by itself, shares, groups, and real processes.

N points, P components, K clusters, S super-classes, W ranks.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepcluster.clustering.groups import Ranks, _destinations, plan_groups, shares_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing import spawn

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.hierarchical import HierarchicalKMeans, Hierarchy
from deepcluster.clustering.kmeans import KMeans
from deepcluster.core import distributed
from deepcluster.core.errors import InputError

N = 501
Found = tuple[Assignment, Hierarchy]


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


def assert_same(found: Found, expected: Found) -> None:
    """Bit for bit, the last digits of the inertia aside."""
    assert torch.equal(found[0].labels_N, expected[0].labels_N)
    assert torch.equal(found[0].distances_N.nan_to_num(-1), expected[0].distances_N.nan_to_num(-1))
    assert torch.equal(found[0].centroids_KP, expected[0].centroids_KP)
    assert found[0].n_repaired == expected[0].n_repaired
    np.testing.assert_allclose(found[0].inertia_history, expected[0].inertia_history, rtol=1e-12)
    assert torch.equal(found[1].super_of_cluster_K, expected[1].super_of_cluster_K)
    assert found[1].n_supers == expected[1].n_supers


# One process


@pytest.mark.parametrize("rotated", [False, True])
def test_it_is_k_means_of_each_super_class(rotated: bool) -> None:
    """Super-clusters are those of k-means; within a super-class, clusters are those of k-means of its rows alone."""
    points_NP, n_supers = points(), 3 * (4 if rotated else 1)
    rotations_N = rotations() if rotated else None
    found, hierarchy = HierarchicalKMeans(40, super_clusters=3, seed=5).fit(points_NP, rotations_M=rotations_N)
    supers_N = KMeans(3, seed=5).fit(points_NP).labels_N
    if rotations_N is not None:
        supers_N = torch.where(supers_N < 0, -1, supers_N * 4 + rotations_N)
    assert hierarchy.n_supers == n_supers
    assert found.super_of_cluster_K is hierarchy.super_of_cluster_K
    assert int(hierarchy.sizes_S.sum()) == 40
    assert torch.equal(hierarchy.super_of_cluster_K, hierarchy.super_of_cluster_K.sort().values)
    inertia = 0.0
    for number, (first, end) in enumerate(pairwise([0, *hierarchy.sizes_S.cumsum(0).tolist()])):
        rows = (supers_N == number).nonzero().flatten()
        if not len(rows):
            assert first == end
            continue
        part = KMeans(end - first, seed=6 + number).fit(points_NP[rows])
        assert torch.equal(found.labels_N[rows], part.labels_N + first)
        assert torch.equal(found.distances_N[rows], part.distances_N)
        assert torch.equal(found.centroids_KP[first:end], part.centroids_KP)
        inertia += part.inertia_history[-1]
    assert found.labels_N[[7, 400]].tolist() == [-1, -1] and found.distances_N[[7, 400]].isnan().all()
    assert found.inertia_history[-1] == pytest.approx(inertia, rel=1e-12)
    assert found.inertia == pytest.approx(inertia, rel=1e-5)
    assert list(found.inertia_history) == sorted(found.inertia_history, reverse=True)


def test_one_super_cluster_is_plain_k_means() -> None:
    found, hierarchy = HierarchicalKMeans(20, super_clusters=1, seed=2).fit(points())
    expected = KMeans(20, seed=3).fit(points())
    assert torch.equal(found.labels_N, expected.labels_N) and torch.equal(found.centroids_KP, expected.centroids_KP)
    assert hierarchy.super_of_cluster_K.tolist() == [0] * 20


@pytest.mark.parametrize(("n", "clusters"), [(5, 5), (9, 4), (30, 30), (33, 29)])
def test_few_rows_and_nearly_as_many_clusters(n: int, clusters: int) -> None:
    points_NP = points(500)[100 : 100 + n]
    found, hierarchy = HierarchicalKMeans(clusters, super_clusters=4, iterations=3).fit(points_NP)
    assert len(found.centroids_KP) == len(hierarchy.super_of_cluster_K) == clusters
    assert int(found.labels_N.min()) >= 0 and int(found.labels_N.max()) < clusters


def test_all_points_equal_are_one_super_class_and_the_others_have_no_cluster() -> None:
    found, hierarchy = HierarchicalKMeans(6, super_clusters=3).fit(torch.ones(50, 4))
    assert sorted(hierarchy.sizes_S.tolist()) == [0, 0, 6]
    assert found.inertia == 0 and len(found.labels_N.unique()) == 1


def test_it_tells_its_steps_to_the_end_and_may_be_stopped() -> None:
    told: list[tuple[int, int]] = []
    HierarchicalKMeans(20, super_clusters=3, iterations=4).fit(points(), on_iteration=lambda *step: told.append(step))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert told[-1] == (20, 20)
    # Points that are all equal rest at once: the iterations that are not needed are told all the same.
    told.clear()
    HierarchicalKMeans(6, super_clusters=3, iterations=4).fit(
        torch.ones(50, 4), on_iteration=lambda *step: told.append(step)
    )
    assert [done for done, _ in told] == list(range(1, 11)) and told[-1] == (10, 10)

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        HierarchicalKMeans(20, super_clusters=3, iterations=4).fit(points(), on_iteration=stop)


@pytest.mark.parametrize(
    ("clusters", "super_clusters", "rotations_N", "told"),
    [
        (20, 0, None, "super_clusters=0"),
        (3, 4, None, "clusters=3 must be between the 4 super-classes"),
        (15, 4, rotations(), "clusters=15 must be between the 16 super-classes"),
        (N + 1, 4, None, f"and the {N} points"),
        (N - 1, 4, None, f"and the {N - 2} points"),
        (40, 2, rotations() + 1, "from 0 to 3"),
        (40, 2, rotations()[1:], "one a row"),
    ],
)
def test_faults_are_told(clusters: int, super_clusters: int, rotations_N: Tensor | None, told: str) -> None:
    with pytest.raises(InputError, match=told):
        HierarchicalKMeans(clusters, super_clusters=super_clusters).fit(points(), rotations_M=rotations_N)


# Shares and groups


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


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any), world=st.integers(1, 20))
def test_groups_divide_ranks_and_super_classes(sizes: list[int], world: int) -> None:
    groups = plan_groups(torch.tensor(sizes), world)
    assert [rank for members, _ in groups for rank in members] == list(range(world))
    assert sorted(number for _, some in groups for number in some) == [number for number, size in enumerate(sizes) if size]
    assert all(len(members) and some for members, some in groups)
    busiest = max(sum(sizes[number] for number in some) / len(members) for members, some in groups)
    assert busiest <= 1.25 * sum(sizes) / world + 1e-9


@pytest.mark.parametrize(
    ("sizes", "world", "expected"),
    [
        ([10, 10, 10, 10], 4, [([0], [0]), ([1], [1]), ([2], [2]), ([3], [3])]),
        ([10, 10, 10, 10], 2, [([0], [0, 2]), ([1], [1, 3])]),
        ([10, 30], 4, [([0, 1, 2], [1]), ([3], [0])]),
        ([0, 90, 4, 3, 3], 4, [([0, 1, 2], [1]), ([3], [2, 3, 4])]),
        ([100, 3], 4, [([0, 1, 2, 3], [0, 1])]),
    ],
)
def test_groups_by_hand(sizes: list[int], world: int, expected: list[tuple[list[int], list[int]]]) -> None:
    """A super-class a rank; two a rank; three ranks for the larger one, or a giant; one for all the
    small ones; none can be spared from a giant."""
    assert [(list(members), some) for members, some in plan_groups(torch.tensor(sizes), world)] == expected


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=9).filter(any), world=st.integers(2, 9), seed=st.integers(0, 99)
)
def test_points_go_to_the_group_of_their_super_class_and_evenly_within_it(sizes: list[int], world: int, seed: int) -> None:
    groups = plan_groups(torch.tensor(sizes), world)
    supers_N = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    supers_N = supers_N[torch.randperm(len(supers_N), generator=torch.Generator().manual_seed(seed))]
    to_N = torch.cat([_destinations(part, groups, rank) for rank, part in enumerate(supers_N.chunk(world))])
    for members, some in groups:
        sent = to_N[torch.isin(supers_N, torch.tensor(some))]
        counts = torch.bincount(sent, minlength=world)
        assert int(counts.sum()) == int(counts[members.start : members.stop].sum())
        # Of each sender no rank gets more than one point more than another.
        assert int(counts[members.start : members.stop].max() - counts[members.start : members.stop].min()) <= world


# Real processes

FITS = {
    "four": {"super_clusters": 4},
    "three": {"super_clusters": 3},
    "two": {"super_clusters": 2},
    "one": {"super_clusters": 1},
    "rotated": {"super_clusters": 2},
    "one point less": {"super_clusters": 5},
}


def fit(name: str, numbers_N: Tensor, ranks: Ranks | None = None, told: list[tuple[int, int]] | None = None) -> Found:
    def tell(done: int, total: int) -> None:
        # All ranks are told equally often, so this sum does not wait for ever.
        assert ranks is None or int(ranks.all_reduce(torch.ones(1))) == ranks.world_size
        if told is not None:
            told.append((done, total))

    clusters = N - 3 if name == "one point less" else 45
    clusterer = HierarchicalKMeans(clusters, iterations=6, seed=3, ranks=ranks, **FITS[name])
    rotations_M = rotations()[numbers_N] if name == "rotated" else None
    return clusterer.fit(points()[numbers_N], numbers_M=numbers_N, rotations_M=rotations_M, on_iteration=tell)


def shares(world: int) -> list[Tensor]:
    """Rows dealt unevenly and not in a row; the last rank of four has none."""
    rank_N = torch.randint(min(world, 3), (N,), generator=torch.Generator().manual_seed(world))
    return [(rank_N == rank).nonzero().flatten() for rank in range(world)]


def work(rank: int, folder: Path) -> None:
    """All fits of one rank of four, the first two of which work as two before; kept in files."""
    torch.set_num_threads(1)
    for world in (2, 4):
        if rank >= world:
            continue
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / f"{world}"), world), rank=rank, world_size=world)
        ranks = Ranks(
            rank,
            world,
            distributed.all_reduce,
            distributed.exchange_rows,
            distributed.new_groups,
            distributed.all_reduce_in,
        )
        found = {}
        for name in FITS:
            told: list[tuple[int, int]] = []
            found[name] = (*fit(name, shares(world)[rank], ranks, told), told)
        with pytest.raises(InputError, match="on all ranks or on none"):
            rotations_M = rotations()[shares(world)[rank]] if rank else None
            HierarchicalKMeans(45, super_clusters=2, ranks=ranks).fit(points()[shares(world)[rank]], rotations_M=rotations_M)
        torch.save(found, folder / f"{world}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks' finds lie."""
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, args=(folder,), nprocs=4)
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    return {name: fit(name, torch.arange(N)) for name in FITS}


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_finds_the_same(world: int, of_ranks: Path, alone: dict[str, Found]) -> None:
    results = [torch.load(of_ranks / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
    order_N = torch.cat(shares(world)).argsort()
    for name in FITS:
        for assignment, hierarchy, told in (result[name] for result in results):
            whole = Assignment(
                torch.cat([result[name][0].labels_N for result in results])[order_N],
                torch.cat([result[name][0].distances_N for result in results])[order_N],
                assignment.centroids_KP,
                assignment.inertia_history,
                assignment.n_repaired,
            )
            assert_same((whole, hierarchy), alone[name])
            assert told == results[0][name][2]
            assert told[-1][0] == told[-1][1]
