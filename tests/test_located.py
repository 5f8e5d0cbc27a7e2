"""The nearest and the second nearest centroid of each point, against plain loops in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.located import UNLOCATED, located


def assignment_of(centroids_KP: np.ndarray, supers: list[int] | None = None) -> Assignment:
    super_K = None if supers is None else torch.tensor(supers)
    super_SP = None
    if super_K is not None:
        groups = [[k for k, one in enumerate(supers or []) if one == number] for number in sorted(set(supers or []))]
        super_SP = torch.from_numpy(np.stack([centroids_KP[group].mean(axis=0) for group in groups])).float()
    empty = torch.zeros(0)
    return Assignment(
        empty.long(), empty, torch.from_numpy(centroids_KP).float(), super_of_cluster_K=super_K, super_centroids_SP=super_SP
    )


def naive(points: np.ndarray, centroids: np.ndarray) -> list[list[tuple[float, int]]]:
    """Distance and number of all centroids, the nearest first, in float64."""
    points, centroids = points.astype(np.float64), centroids.astype(np.float64)
    return [sorted((math.dist(point, centroid), k) for k, centroid in enumerate(centroids)) for point in points]


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(2, 12), st.integers(1, 6), st.sampled_from([1e-6, 1.0, 1e4]), st.integers(0, 99))
def test_the_two_nearest_are_those_of_plain_loops(m: int, k: int, p: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, centroids = (scale * rng.normal(size=(rows, p)).astype(np.float32) for rows in (m, k))
    found = {name: column.numpy() for name, column in located(assignment_of(centroids), torch.from_numpy(points)).items()}
    assert {name: (column.dtype, column.shape) for name, column in found.items()} == {
        name: (empty.dtype, (m,)) for name, empty in UNLOCATED.items()
    }
    for row, order in enumerate(naive(points, centroids)):
        (first, _), (second, number) = order[:2]
        assert found["distance"][row] == pytest.approx(first, rel=1e-4, abs=1e-5 * scale)
        assert found["second_distance"][row] == pytest.approx(second, rel=1e-4, abs=1e-5 * scale)
        assert found["confidence"][row] == pytest.approx(1 - first / second, abs=1e-3)
        if second - first > 1e-4 * scale and (k == 2 or order[2][0] - second > 1e-9 * scale):
            assert found["second"][row] == number
        assert found["second"][row] != found["cluster"][row]
        assert 0 <= found["confidence"][row] <= 1
        assert found["distance"][row] <= found["second_distance"][row]


def test_more_points_than_one_block() -> None:
    rng = np.random.default_rng(0)
    points, centroids = rng.normal(size=(2500, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    squared = ((points[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2)
    order = np.argsort(squared, axis=1)
    found = located(assignment_of(centroids), torch.from_numpy(points))
    assert np.array_equal(found["cluster"], order[:, 0]) and np.array_equal(found["second"], order[:, 1])


def test_a_single_cluster_has_no_second() -> None:
    found = located(assignment_of(np.zeros((1, 2))), torch.tensor([[3.0, 4.0]]))
    assert (found["cluster"].item(), found["distance"].item(), found["second"].item()) == (0, 5, -1)
    assert math.isnan(found["second_distance"].item()) and math.isnan(found["confidence"].item())


def test_points_at_two_equal_centroids_are_of_no_confidence() -> None:
    found = located(assignment_of(np.ones((2, 2))), torch.tensor([[1.0, 1.0], [2.0, 1.0]]))
    assert found["confidence"].tolist() == [0, 0]
    assert sorted([found["cluster"][0].item(), found["second"][0].item()]) == [0, 1]
    assert located(assignment_of(np.ones((2, 2))), torch.empty(0, 2))["second"].shape == (0,)


def test_with_super_classes_the_second_is_of_the_same() -> None:
    """The nearest centroid of all may be of another super-class."""
    centroids = np.array([[0.0, 0], [10, 0], [9, 4], [20, 4], [30, 30]])
    found = located(assignment_of(centroids, [0, 0, 1, 1, 2]), torch.tensor([[4.0, 0.0], [29.0, 30.0]]))
    assert (found["cluster"].tolist(), found["second"].tolist()) == ([0, 4], [1, -1])
    assert found["confidence"][0] == pytest.approx(1 - 4 / 6)
