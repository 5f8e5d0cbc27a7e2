"""Lloyd's algorithm against scikit-learn and a naive loop; what it promises about inertia, order, repairs and memory."""

import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering import kmeans as module
from deepcluster.clustering.kmeans import KMeans, cluster_sums, lloyd, nearest_centroids, split_largest
from deepcluster.errors import InputError


def blobs(n: int, dim: int, n_clusters: int, *, seed: int = 0, spread: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_clusters, dim, generator=generator)
    which = torch.randint(n_clusters, (n,), generator=generator)
    return centres[which] + spread * torch.randn(n, dim, generator=generator)


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
    result = lloyd(points_NP, points_NP[[0, 2]], iterations=5)
    assert result.labels_N.tolist() == [0, 0, 1, 1]
    assert result.centroids_KP.tolist() == [[0, 1], [10, 1]]
    assert result.distances_N.tolist() == [1, 1, 1, 1]
    assert result.inertia_history == (8, 4)  # it ends early: the second assignment changes no label
    assert result.n_repaired == 0


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_equals_a_naive_loop(iterations: int) -> None:
    points_NP = blobs(150, 5, 6)
    labels, centroids, history = naive_lloyd(points_NP.double().numpy(), points_NP[:6].double().numpy(), iterations)
    result = lloyd(points_NP, points_NP[:6], iterations=iterations)
    assert result.labels_N.tolist() == labels.tolist()
    np.testing.assert_allclose(result.centroids_KP, centroids, atol=1e-5)
    np.testing.assert_allclose(result.inertia_history, history[: len(result.inertia_history)], rtol=1e-5)
    np.testing.assert_allclose(result.distances_N.sum(), history[-1], rtol=1e-5)


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_equals_scikit_learn(iterations: int) -> None:
    """`max_iter` of scikit-learn counts moves of the centroids, and a last assignment follows: as here."""
    points_NP = blobs(2000, 8, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = SklearnKMeans(20, init=points_NP[:20].numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=iterations)
        oracle.fit(points_NP.numpy())
    ours = KMeans(20, iterations=iterations).fit(points_NP, start_KP=points_NP[:20])
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
    history = np.array(lloyd(points_NP, start_KP, iterations=15).inertia_history)
    assert (np.diff(history) <= 1e-5 * history[0] + 1e-9).all()


def test_permuted_rows_give_permuted_labels() -> None:
    points_NP = blobs(500, 6, 8)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    start_KP = points_NP[:8]
    labels_N = KMeans(8).fit(points_NP, start_KP=start_KP).labels_N
    assert torch.equal(KMeans(8).fit(points_NP[order], start_KP=start_KP).labels_N, labels_N[order])


def test_the_start_is_not_changed() -> None:
    points_NP = blobs(100, 3, 4)
    start_KP = points_NP[:4].clone()
    lloyd(points_NP, start_KP, iterations=3)
    assert torch.equal(start_KP, points_NP[:4])


# Empty clusters, duplicates, extremes


def test_empty_clusters_are_repaired() -> None:
    points_NP = blobs(600, 4, 6, spread=0.3)
    far_KP = torch.full((8, 4), 1e3) + torch.arange(8.0)[:, None]
    assignment = KMeans(12, iterations=20).fit(points_NP, start_KP=torch.cat([points_NP[:4], far_KP]))
    assert assignment.n_repaired >= 8
    assert assignment.sizes_K().min() > 0


def test_split_takes_the_largest_clusters_and_leaves_their_centroids() -> None:
    centroids_KP = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0], [5.0, 6.0], [9.0, 9.0]])
    before_KP = centroids_KP.clone()
    assert split_largest(centroids_KP, torch.tensor([5, 1, 0, 8, 0])) == 2
    assert torch.equal(centroids_KP[[0, 1, 3]], before_KP[[0, 1, 3]])
    torch.testing.assert_close(centroids_KP[2], torch.tensor([5 * (1 + 1 / 1024), 6 * (1 - 1 / 1024)]))
    torch.testing.assert_close(centroids_KP[4], torch.tensor([1 * (1 + 1 / 1024), 2 * (1 - 1 / 1024)]))


def test_clusters_of_one_are_never_split() -> None:
    centroids_KP = torch.tensor([[1.0], [2.0], [7.0], [8.0]])
    assert split_largest(centroids_KP, torch.tensor([1, 2, 0, 0])) == 1
    assert centroids_KP.flatten().tolist() == [1.0, 2.0, 2 * (1 + 1 / 1024), 8.0]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
def test_equal_rows_end_in_one_cluster_without_inertia(value: float) -> None:
    assignment = KMeans(3).fit(torch.full((50, 4), value))
    assert assignment.sizes_K().max() == 50
    assert assignment.inertia == pytest.approx(0, abs=1e-9)
    assert assignment.centroids_KP.isfinite().all()


def test_many_duplicates() -> None:
    """Three places, 100 rows each: three clusters are enough, the other four are free to be empty."""
    places = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    assignment = KMeans(7, seed=3).fit(places.repeat(100, 1))
    assert assignment.inertia == pytest.approx(0, abs=1e-6)
    of_place = assignment.labels_N.reshape(100, 3)
    assert all(len(of_place[:, place].unique()) == 1 for place in range(3))
    assert len(of_place[0].unique()) == 3


def test_rows_of_zeros_are_points_like_others() -> None:
    points_NP = torch.cat([normalize(blobs(90, 4, 3)), torch.zeros(10, 4)])
    assignment = KMeans(4, seed=1).fit(points_NP)
    assert (assignment.labels_N >= 0).all()
    assert len(assignment.labels_N[90:].unique()) == 1
    assert assignment.distances_N.isfinite().all()


def test_one_cluster_is_the_mean() -> None:
    points_NP = blobs(100, 5, 3)
    assignment = KMeans(1).fit(points_NP)
    torch.testing.assert_close(assignment.centroids_KP[0], points_NP.double().mean(dim=0).float())
    assert assignment.inertia == pytest.approx(float(points_NP.double().var(dim=0, correction=0).sum()) * 100, rel=1e-5)


def test_as_many_clusters_as_points() -> None:
    assignment = KMeans(40).fit(blobs(40, 5, 3) + 100)
    assert sorted(assignment.labels_N.tolist()) == list(range(40))
    assert assignment.distances_N.tolist() == [0] * 40


@pytest.mark.parametrize("n_clusters", [0, 8, 10])
def test_too_many_clusters_is_told_with_the_values(n_clusters: int) -> None:
    """Rows that are not finite do not count."""
    points_NP = torch.randn(8, 2)
    points_NP[3] = torch.nan
    with pytest.raises(InputError, match=f"clusters={n_clusters} .* 7 points"):
        KMeans(n_clusters).fit(points_NP)


@pytest.mark.parametrize("shape", [(3, 2), (4, 3)])
def test_a_start_of_another_shape_is_told(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"not \(4, 2\)"):
        KMeans(4).fit(torch.randn(10, 2), start_KP=torch.zeros(shape))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_stay_unassigned(bad: float) -> None:
    points_NP = blobs(100, 4, 3)
    holes_NP = points_NP.clone()
    holes_NP[[0, 50], [1, 2]] = bad
    seen_N = torch.ones(100, dtype=torch.bool)
    seen_N[[0, 50]] = False
    assignment = KMeans(3).fit(holes_NP)
    assert assignment.labels_N[~seen_N].tolist() == [-1, -1]
    assert assignment.distances_N[~seen_N].isnan().all()
    assert torch.equal(assignment.labels_N[seen_N], KMeans(3).fit(points_NP[seen_N]).labels_N)
    assert assignment.sizes_K().sum() == 98


def test_the_seed_alone_decides() -> None:
    points_NP = blobs(300, 4, 10)
    torch.manual_seed(5)
    one = KMeans(10, seed=7, iterations=2).fit(points_NP)
    torch.manual_seed(6)
    two = KMeans(10, seed=7, iterations=2).fit(points_NP)
    assert torch.equal(one.labels_N, two.labels_N)
    assert torch.equal(one.centroids_KP, two.centroids_KP)
    assert not torch.equal(one.centroids_KP, KMeans(10, seed=8, iterations=2).fit(points_NP).centroids_KP)


def test_on_iteration_sees_each_inertia_and_may_stop() -> None:
    points_NP = blobs(200, 4, 6)
    seen: list[tuple[int, float]] = []
    result = lloyd(points_NP, points_NP[:6], iterations=4, on_iteration=lambda *args: seen.append(args))
    assert seen == list(enumerate(result.inertia_history))

    def stop(iteration: int, inertia: float) -> None:
        if iteration == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lloyd(points_NP, points_NP[:6], iterations=4, on_iteration=stop)


# The parts


def test_ties_go_to_the_lower_number() -> None:
    """Whole numbers, so that scores are exact: (0, 0) is as near to all four, and two centroids are the same."""
    centroids_KP = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    points_NP = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-5.0, 0.0]]).repeat(300, 1)
    labels_N, distances_N = nearest_centroids(points_NP, centroids_KP)
    assert labels_N.reshape(300, 4).unique(dim=0).tolist() == [[1, 1, 0, 3]]
    assert distances_N.reshape(300, 4).unique(dim=0).tolist() == [[1, 0, 1, 16]]


def test_distances_do_not_cancel_far_from_the_origin() -> None:
    points_NP = 1000 + blobs(300, 4, 5)
    labels_N, distances_N = nearest_centroids(points_NP, points_NP[:5])
    exact_N = (points_NP.double() - points_NP[:5].double()[labels_N]).square().sum(dim=1)
    np.testing.assert_allclose(distances_N, exact_N, rtol=1e-5)
    assert distances_N[:5].tolist() == [0] * 5


@pytest.mark.parametrize("scores", [1, 1 << 10, 1 << 26])
def test_size_of_blocks_changes_nothing(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points_NP = blobs(3000, 6, 8)
    expected = lloyd(points_NP, points_NP[:8], iterations=5)
    monkeypatch.setattr(module, "BLOCK_SCORES", scores)
    monkeypatch.setattr(module, "BLOCK_ROWS", 100)
    result = lloyd(points_NP, points_NP[:8], iterations=5)
    assert torch.equal(result.labels_N, expected.labels_N)
    torch.testing.assert_close(result.centroids_KP, expected.centroids_KP)
    torch.testing.assert_close(result.distances_N, expected.distances_N)


def test_cluster_sums_equal_a_naive_loop() -> None:
    """float64 throughout: where values of 1e4 and 1e-4 are added, float32 would lose the small ones."""
    points_NP = blobs(5000, 3, 4) * torch.logspace(-4, 4, 5000)[:, None]
    labels_N = torch.randint(6, (5000,), generator=torch.Generator().manual_seed(0))
    labels_N[labels_N == 2] = 3
    naive_KP, sizes = np.zeros((7, 3)), [0] * 7
    for point, label in zip(points_NP.double().numpy(), labels_N.tolist(), strict=True):
        naive_KP[label] += point
        sizes[label] += 1
    sums_KP, sizes_K = cluster_sums(points_NP, labels_N, 7)
    assert sums_KP.dtype == torch.float64
    np.testing.assert_allclose(sums_KP, naive_KP, rtol=1e-13)
    assert sizes_K.tolist() == sizes
    assert torch.equal(sums_KP, cluster_sums(points_NP, labels_N, 7)[0])


def test_rows_spread_over_ranks_give_the_same() -> None:
    """Two threads stand for two ranks, with 200 and 300 rows; one sum over both is all they share."""
    points_NP = blobs(500, 4, 6)
    start_KP = torch.cat([points_NP[:6], torch.full((2, 4), 50.0)])
    expected = lloyd(points_NP, start_KP, iterations=6)
    barrier, slots, results = threading.Barrier(2, timeout=30), [torch.empty(0)] * 2, {}

    def work(rank: int, rows: Tensor) -> None:
        def all_reduce(value: Tensor) -> Tensor:
            slots[rank] = value
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        results[rank] = lloyd(rows, start_KP, iterations=6, all_reduce=all_reduce)

    threads = [threading.Thread(target=work, args=item) for item in enumerate((points_NP[:200], points_NP[200:]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat([results[0].labels_N, results[1].labels_N]), expected.labels_N)
    for rank in (0, 1):
        torch.testing.assert_close(results[rank].centroids_KP, expected.centroids_KP)
        np.testing.assert_allclose(results[rank].inertia_history, expected.inertia_history, rtol=1e-6)
        assert results[rank].n_repaired == expected.n_repaired


MEMORY = """
import resource, torch
from deepcluster.clustering.kmeans import KMeans
torch.set_num_threads(1)
points = torch.randn(100_000, 256)
KMeans(10, iterations=1).fit(points[:1000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
KMeans(1000, iterations=2).fit(points)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_stays_far_below_a_matrix_of_all_distances() -> None:
    """100,000 × 1,000 scores would take 400 MB, a float64 copy of the points 205 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6
