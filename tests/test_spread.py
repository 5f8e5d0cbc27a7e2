"""Points that stand for many, and clusters matched to each other: against naive loops, scikit-learn and SciPy."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import confusion_matrix
from torch import Tensor

from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.matching import match_clusters
from deepcluster.clustering.spread import central_points, farthest_first


def clouds(n_clouds: int, size: int, dim: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    centres = 20 * rng.normal(size=(n_clouds, dim))
    return torch.from_numpy(np.repeat(centres, size, axis=0) + rng.normal(size=(n_clouds * size, dim))).float()


def naive_farthest_first(points: Tensor, count: int) -> list[int]:
    table = points.double()
    chosen = [int((table - table.mean(dim=0)).norm(dim=1).argmin())]
    while len(chosen) < count:
        nearest = torch.stack([(table - table[one]).norm(dim=1) for one in chosen]).amin(dim=0)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


@pytest.mark.parametrize("count", [1, 2, 17, 90])
def test_farthest_first_equals_a_naive_loop(count: int) -> None:
    points = clouds(9, 10, 6, seed=count)
    assert farthest_first(points, count).tolist() == naive_farthest_first(points, count)


def test_farthest_first_takes_one_of_each_cloud_before_a_second_of_any() -> None:
    chosen = farthest_first(clouds(8, 12, 4, seed=1), 8)
    assert sorted((chosen // 12).tolist()) == list(range(8))


def test_farthest_first_chooses_no_point_twice_though_all_are_copies() -> None:
    assert sorted(farthest_first(torch.ones(6, 2), 6).tolist()) == list(range(6))


def test_central_points_are_the_nearest_to_the_centres_of_k_means() -> None:
    points = clouds(7, 15, 5, seed=2)
    found_C, sizes_C = central_points(points, 7, seed=3)
    state = KMeans(7, init="k-means++").cluster(points, seed=3)
    expected = {int((points - centre).norm(dim=1).argmin()) for centre in state.centroids_KP}
    assert set(found_C.tolist()) == expected
    assert sorted((found_C // 15).tolist()) == list(range(7))
    assert sizes_C.tolist() == [15] * 7


def test_central_points_of_copies_are_filled_up() -> None:
    """Two kinds of points make no five clusters; the others follow, in clusters of 0."""
    points = torch.tensor([[0.0]] * 6 + [[1.0]] * 3)
    found_C, sizes_C = central_points(points, 5, seed=0)
    assert len(set(found_C.tolist())) == 5
    assert sizes_C.sum() == 9
    assert sizes_C.tolist() == sorted(sizes_C.tolist(), reverse=True)


@pytest.mark.parametrize(("n_clusters", "n_others"), [(6, 6), (4, 9), (9, 4), (1, 3)])
def test_matched_clusters_share_as_many_images_as_possible(n_clusters: int, n_others: int) -> None:
    rng = np.random.default_rng(n_clusters + 10 * n_others)
    cluster_N, other_N = rng.integers(n_clusters, size=80), rng.integers(n_others, size=80)
    match_K = match_clusters(cluster_N, other_N)
    size = max(n_clusters, n_others)
    table = confusion_matrix(cluster_N, other_N, labels=list(range(size)))
    best = table[linear_sum_assignment(-table)].sum()
    assert (match_K[cluster_N] == other_N).sum() == best
    matched = match_K[match_K >= 0]
    assert len(set(matched.tolist())) == len(matched)


def test_clusters_of_a_renumbered_copy_are_matched_exactly() -> None:
    rng = np.random.default_rng(0)
    cluster_N, number_K = rng.integers(30, size=500), rng.permutation(30)
    assert np.array_equal(match_clusters(cluster_N, number_K[cluster_N])[cluster_N], number_K[cluster_N])
    assert match_clusters(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
