"""Power iteration clustering against the published formulas, taken down with dense matrices and loops over images."""

from math import exp

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import make_blobs, make_moons
from sklearn.metrics import adjusted_rand_score
from thread_ranks import on_ranks
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.clustering.pic import PUBLISHED_SIGMA, PowerIterationClustering, auto_sigma
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError


def cloud(n: int, dim: int = 4, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, dim))).float()


def blobs(n: int = 400) -> tuple[Tensor, NDArray[np.int64]]:
    points, classes = make_blobs(n, centers=6, n_features=8, random_state=0)
    return torch.from_numpy(points).float(), classes


def whitened(n: int = 800, dim: int = 200) -> tuple[Tensor, NDArray[np.int64]]:
    """Rows of unit length, components of the same variance, as a run clusters them: neighbours lie far apart."""
    rng = np.random.default_rng(0)
    classes = rng.integers(n // 10, size=n)
    features = rng.normal(size=(n, dim)) + 1.5 * rng.normal(size=(n // 10, dim))[classes]
    return Whitening(dim).fit_transform(torch.from_numpy(features).float()), classes


Neighbours = list[list[tuple[float, int]]]


def naive_neighbours(points: Tensor, k: int) -> Neighbours:
    """(squared distance, image) of the k nearest."""
    squared = [[float((one - other).square().sum()) for other in points.double()] for one in points.double()]
    return [sorted((row[j], j) for j in range(len(points)) if j != i)[:k] for i, row in enumerate(squared)]


def naive_climb(near: Neighbours, sigma: float, alpha: float, iterations: int) -> list[int]:
    """The maximum of the density that each image reaches."""
    n = len(near)
    weights = np.zeros((n, n))
    for i in range(n):
        for distance, j in near[i]:
            weights[i, j] += exp(-distance / sigma**2)
            weights[j, i] += exp(-distance / sigma**2)
    v = np.ones(n) / n
    for _ in range(iterations):
        v = alpha * weights.T @ v + (1 - alpha) / n
        v = v / v.sum()
    pointer = list(range(n))
    for i in range(n):
        best = 0.0
        for j in range(n):
            if weights[i, j] * (v[j] - v[i]) > best:
                best, pointer[i] = weights[i, j] * (v[j] - v[i]), j
    labels = []
    for i in range(n):
        while pointer[i] != i:
            i = pointer[i]
        labels.append(i)
    return labels


def naive_partition(
    points: Tensor,
    sigma: float,
    *,
    n_neighbors: int = 5,
    alpha: float = 0.001,
    max_iter: int = 200,
    distribute_singletons: bool = True,
) -> list[int]:
    """The published formulas, image by image; labels are the numbers of images."""
    near = naive_neighbours(points, n_neighbors)
    labels = naive_climb(near, sigma, alpha, max_iter)
    if distribute_singletons:
        before = list(labels)
        for i in range(len(points)):
            if before.count(before[i]) == 1:
                larger = [before[j] for _, j in near[i] if before.count(before[j]) > 1]
                labels[i] = larger[0] if larger else before[i]
    return labels


def same_groups(one: Assignment, labels: list[int] | NDArray[np.int64] | Tensor) -> bool:
    return adjusted_rand_score(one.labels_N.numpy(), np.asarray(labels)) == 1.0


def purity(assignment: Assignment, classes: NDArray[np.int64]) -> float:
    labels = assignment.labels_N.numpy()
    return sum(np.bincount(classes[labels == label]).max() for label in range(assignment.n_clusters)) / len(classes)


# The published procedure


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({"sigma": 0.8}, cloud(90)),
        ({"sigma": 3.0}, cloud(90, seed=1)),
        ({"sigma": 1.0, "alpha": 0.5}, cloud(90, seed=2)),
        ({"sigma": 1.0, "alpha": 0.3, "max_iter": 3}, cloud(90, seed=3)),
        ({"sigma": 0.6, "n_neighbors": 2, "distribute_singletons": False}, cloud(90, seed=4)),
        ({"sigma": 0.2, "n_neighbors": 1}, cloud(90, 2, seed=5)),
        ({"sigma": 1.2}, whitened(120, 20)[0]),
    ],
)
def test_equals_the_published_formulas(options: dict[str, float], points: Tensor) -> None:
    found = PowerIterationClustering(**options).cluster(points)  # type: ignore[arg-type]
    assert same_groups(found, naive_partition(points, **options))  # type: ignore[arg-type]
    assert 1 < found.n_clusters < len(points)


@settings(max_examples=12, deadline=None)
@given(n=st.integers(7, 40), seed=st.integers(0, 999), sigma=st.sampled_from([0.5, 1.0, 4.0]))
def test_equals_the_published_formulas_whatever_the_points(n: int, seed: int, sigma: float) -> None:
    points = cloud(n, 3, seed)
    assert same_groups(PowerIterationClustering(sigma=sigma).cluster(points), naive_partition(points, sigma))


def test_singletons_join_their_nearest_neighbour_that_has_company() -> None:
    """Two images far from a crowd are each alone; joined, they are in clusters of their neighbours, as by the formulas."""
    points = torch.cat([cloud(60, 2), torch.tensor([[90.0, 90.0], [-80.0, 90.0]])])
    alone = PowerIterationClustering(sigma=0.3, distribute_singletons=False).cluster(points)
    sizes_N = alone.sizes_K()[alone.labels_N]
    joined = PowerIterationClustering(sigma=0.3).cluster(points)
    assert (sizes_N == 1).any()
    assert int((joined.sizes_K() == 1).sum()) == 0
    _, near = nearest_neighbours(points, points, k=5, exclude_self=True)
    for image in (sizes_N == 1).nonzero().flatten().tolist():
        first = next(other for other in near[image].tolist() if sizes_N[other] > 1)
        assert joined.labels_N[image] == joined.labels_N[first]
    assert not same_groups(joined, alone.labels_N)


def test_small_weights_are_not_lost_in_rounding() -> None:
    """At the published bandwidth whitened images weigh e^-36, as is usual.

    In the published arithmetic most densities are then the same, to the last digit, and most images are clusters of their
    own; the flow that makes densities differ is not, and groups the images by their classes.
    """
    points, classes = whitened()
    found = PowerIterationClustering(sigma=PUBLISHED_SIGMA).cluster(points)
    squared, indices = nearest_neighbours(points, points, k=5, metric="sqeuclidean", exclude_self=True)
    near = [list(zip(*row, strict=True)) for row in zip(squared.tolist(), indices.tolist(), strict=True)]
    published = naive_climb(near, PUBLISHED_SIGMA, 0.001, 20)
    assert len(set(published)) > 0.5 * len(points)
    assert 80 <= found.n_clusters < 100
    assert purity(found, classes) > 0.95
    assert found.remark == ""


# What it finds


@pytest.mark.parametrize("points_and_classes", [blobs(), whitened()], ids=["blobs", "whitened"])
def test_groups_are_pure(points_and_classes: tuple[Tensor, NDArray[np.int64]]) -> None:
    points, classes = points_and_classes
    found = PowerIterationClustering().cluster(points)
    assert purity(found, classes) > 0.95
    assert 6 <= found.n_clusters < len(points) / 8
    assert int(found.sizes_K().min()) > 1
    assert found.remark == ""


def test_moons_are_not_mixed() -> None:
    points, classes = make_moons(300, noise=0.05, random_state=0)
    found = PowerIterationClustering().cluster(torch.from_numpy(points))
    assert purity(found, classes) == 1
    assert found.n_clusters < 60


def test_the_automatic_bandwidth_follows_the_size_of_the_numbers() -> None:
    points, _ = blobs()
    expected = PowerIterationClustering().cluster(points).labels_N
    for scale in (2.0**-20, 2.0**20):
        assert torch.equal(PowerIterationClustering().cluster(points * scale).labels_N, expected)
    assert auto_sigma(np.array([[0.0, 4.0], [9.0, 16.0]])) == 3
    assert auto_sigma(np.zeros((2, 2))) == 1


# The result


def test_centroids_and_distances_are_those_of_the_members() -> None:
    points, _ = blobs()
    found = PowerIterationClustering().cluster(points)
    for label in range(found.n_clusters):
        members = points[found.labels_N == label].double()
        torch.testing.assert_close(found.centroids_KP[label].double(), members.mean(dim=0), rtol=1e-5, atol=1e-6)
    distances = (points - found.centroids_KP[found.labels_N]).norm(dim=1)
    torch.testing.assert_close(found.distances_N, distances)
    assert found.inertia == pytest.approx(found.inertia_history[-1])


def test_the_largest_cluster_comes_first() -> None:
    found = PowerIterationClustering().cluster(blobs()[0])
    sizes = found.sizes_K().tolist()
    assert sizes == sorted(sizes, reverse=True)
    first = [int((found.labels_N == label).nonzero()[0]) for label in range(found.n_clusters)]
    assert sorted(range(len(sizes)), key=lambda label: (-sizes[label], first[label])) == list(range(len(sizes)))


def test_the_same_at_every_run_and_in_every_order() -> None:
    points, _ = whitened()
    found = PowerIterationClustering().cluster(points)
    assert torch.equal(PowerIterationClustering().cluster(points).labels_N, found.labels_N)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    assert same_groups(PowerIterationClustering().cluster(points[order]), found.labels_N[order])


def test_rows_that_are_not_finite_are_unassigned() -> None:
    points, _ = blobs()
    expected = PowerIterationClustering().cluster(points)
    with_holes = torch.full((len(points) + 2, points.shape[1]), torch.nan)
    with_holes[200, 0] = torch.inf
    rest = torch.tensor([number for number in range(len(with_holes)) if number not in (3, 200)])
    with_holes[rest] = points
    found = PowerIterationClustering().cluster(with_holes)
    assert found.labels_N[[3, 200]].tolist() == [-1, -1]
    assert found.distances_N[[3, 200]].isnan().all()
    assert torch.equal(found.labels_N[rest], expected.labels_N)
    assert torch.equal(found.centroids_KP, expected.centroids_KP)


# Copies


@pytest.mark.parametrize("copies", [2, 5, 60])
def test_copies_are_in_one_cluster(copies: int) -> None:
    points, classes = blobs()
    places = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:copies]
    points[places] = points[places[0]].clone()
    found = PowerIterationClustering().cluster(points)
    assert len(found.labels_N[places].unique()) == 1
    others = [number for number in range(400) if number not in places[1:]]
    assert purity(found, classes) > 0.95 - copies / 400
    assert len(found.labels_N[others].unique()) > 6


def test_nothing_but_copies_is_one_cluster_and_told() -> None:
    found = PowerIterationClustering().cluster(torch.ones(40, 3))
    assert found.labels_N.tolist() == [0] * 40
    assert found.distances_N.tolist() == [0.0] * 40
    assert found.remark.startswith("one cluster holds 40 of 40 images")


# What is told


def test_a_kernel_that_underflows_is_told() -> None:
    found = PowerIterationClustering(sigma=0.02).cluster(whitened()[0])
    assert found.n_clusters == 800
    assert found.remark.startswith("800 of 800 images are clusters of their own: the usual edge weighs 0 (sigma=0.02;")
    assert "'auto'" in found.remark


def test_a_giant_is_told() -> None:
    far = 100 * normalize(cloud(21, 3, 1))
    points = torch.cat([torch.linspace(0, 1, 60)[:, None] ** 2 * torch.ones(1, 3), far])
    found = PowerIterationClustering(n_neighbors=20, sigma=50.0).cluster(points)
    assert found.largest_share > 0.5
    assert "images (sigma=50;" in found.remark and found.remark.startswith("one cluster holds")


def test_it_counts_the_steps_of_the_walk() -> None:
    units: list[int] = []
    clusterer = PowerIterationClustering(max_iter=7, alpha=0.5)
    clusterer.cluster(cloud(90), advance=units.append)
    assert sum(units) == clusterer.most_steps == 7
    assert 0 in units  # the search for neighbours


@pytest.mark.parametrize("unit", [0, 1])
def test_it_may_be_stopped(unit: int) -> None:
    class StopError(Exception): ...

    def stop(done: int) -> None:
        if done == unit:
            raise StopError

    with pytest.raises(StopError):
        PowerIterationClustering().cluster(cloud(90), advance=stop)


def test_each_rank_gets_the_labels_of_its_own_rows() -> None:
    points_TP = cloud(90)
    points_TP[[3, 50]] = torch.nan
    expected = PowerIterationClustering().cluster(points_TP)

    def work(rows: slice, ranks: Ranks) -> Assignment:
        return PowerIterationClustering().cluster(points_TP[rows], ranks=ranks)

    found = on_ranks([slice(0, 20), slice(20, 20), slice(20, 90)], work)
    assert torch.equal(torch.cat([part.labels_N for part in found]), expected.labels_N)
    distances_N = torch.cat([part.distances_N for part in found])
    assert torch.equal(distances_N.nan_to_num(-1), expected.distances_N.nan_to_num(-1))
    for part in found:
        assert torch.equal(part.centroids_KP, expected.centroids_KP)
        assert part.inertia_history == expected.inertia_history


@pytest.mark.parametrize(
    ("options", "points", "told"),
    [
        ({}, cloud(5), "at least 6 images"),
        ({"n_neighbors": 9}, cloud(9), "at least 10 images"),
        ({}, torch.full((20, 2), torch.nan), "no points: none of the 20 rows"),
        ({"n_neighbors": 0}, cloud(9), "n_neighbors=0"),
        ({"max_iter": 0}, cloud(9), "max_iter=0"),
        ({"sigma": 0.0}, cloud(9), "sigma=0.0"),
        ({"alpha": 1.0}, cloud(9), "alpha=1.0"),
    ],
)
def test_faults_are_told(options: dict[str, float], points: Tensor, told: str) -> None:
    with pytest.raises(InputError, match=told):
        PowerIterationClustering(**options).cluster(points)  # type: ignore[arg-type]


def test_as_many_images_as_neighbours_and_one_are_enough() -> None:
    assert PowerIterationClustering().cluster(cloud(6)).n_clusters >= 1
