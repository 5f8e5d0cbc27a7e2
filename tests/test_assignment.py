"""What can be said of an assignment, against scikit-learn and by hand; images drawn evenly over clusters; the table."""

from dataclasses import replace
from itertools import permutations
from math import dist, exp, log
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from thread_ranks import on_ranks
from torch import Tensor

from deepcluster.clustering import assignment as module
from deepcluster.clustering.assignment import (
    Assignment,
    cluster_means,
    draw_as_published,
    draw_uniform,
    member_distances,
)
from deepcluster.clustering.points import Points
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError
from deepcluster.run.folder import save_assignment


def assignment_of(labels: list[int] | Tensor, n_clusters: int | None = None) -> Assignment:
    """Distances and centroids are made up: a centroid holds the number of its cluster."""
    labels_N = torch.as_tensor(labels)
    n_clusters = n_clusters or int(labels_N.max()) + 1
    distances_N = torch.where(labels_N >= 0, torch.linspace(0, 1, len(labels_N)), torch.nan)
    return Assignment(labels_N, distances_N, torch.arange(float(n_clusters))[:, None].repeat(1, 3), (3.0, 2.5), 4)


def random_labels(n: int, n_clusters: int, seed: int) -> Tensor:
    """Uneven clusters; some images are in none."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.minimum(rng.geometric(0.3, n), n_clusters) - 1 - 99 * (rng.random(n) < 0.1)).clamp(min=-1)


label_lists = st.lists(st.integers(-1, 6), min_size=1, max_size=60).filter(lambda labels: max(labels) >= 0)


# Draws


@settings(max_examples=60, deadline=None)
@given(labels=label_lists, n_draws=st.integers(0, 200), seed=st.integers(0, 99))
def test_draw_uniform_is_even_over_clusters_and_within_them(labels: list[int], n_draws: int, seed: int) -> None:
    labels_N = torch.tensor(labels)
    drawn = draw_uniform(labels_N, n_draws=n_draws, seed=(seed, 1))
    assert drawn.shape == (n_draws,)
    assert (labels_N[drawn] >= 0).all()
    times_N = torch.bincount(drawn, minlength=len(labels))
    clusters = [times_N[labels_N == cluster] for cluster in labels_N.unique() if cluster >= 0]
    counts = [int(cluster.sum()) for cluster in clusters]
    assert max(counts) - min(counts) <= 1
    assert all(cluster.max() - cluster.min() <= 1 for cluster in clusters)


@pytest.mark.parametrize("draw", [draw_uniform, draw_as_published])
def test_a_draw_is_a_function_of_the_seed(draw) -> None:
    labels_N = random_labels(500, 12, 0)
    one = draw(labels_N, n_draws=400, seed=(3, 4))
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(draw(labels_N, n_draws=400, seed=(3, 4)), one)
    assert not torch.equal(draw(labels_N, n_draws=400, seed=(3, 5)), one)
    assert not torch.equal(draw(labels_N, n_draws=400, seed=(4, 4)), one)


def test_draw_uniform_is_shuffled() -> None:
    """Neither by cluster nor by image: neighbours in the list share a cluster as often as chance says."""
    labels_N = torch.arange(4000) // 1000
    drawn = labels_N[draw_uniform(labels_N, n_draws=4000, seed=[0])]
    assert 0.2 < float((drawn[1:] == drawn[:-1]).double().mean()) < 0.3


def test_fewer_draws_than_clusters_hit_other_clusters_with_another_seed() -> None:
    labels_N = torch.arange(100) % 50
    hit = [set(labels_N[draw_uniform(labels_N, n_draws=20, seed=[seed])].tolist()) for seed in range(20)]
    assert all(len(clusters) == 20 for clusters in hit)
    assert set.union(*hit) == set(range(50))


def test_a_small_cluster_is_repeated_and_a_large_one_is_drawn_from_evenly() -> None:
    """One image of 101 is alone in its cluster: half of the draws are that image. The other 100 have the rest."""
    labels_N = torch.tensor([7] + [2] * 100)
    times_N = torch.bincount(draw_uniform(labels_N, n_draws=200, seed=[0]), minlength=101)
    assert times_N.tolist() == [100] + [1] * 100


def test_other_images_of_a_large_cluster_at_another_seed() -> None:
    labels_N = torch.tensor([0] * 90 + [1] * 10)
    drawn = [set(draw_uniform(labels_N, n_draws=40, seed=[seed]).tolist()) & set(range(90)) for seed in range(30)]
    assert set.union(*drawn) == set(range(90))


def test_a_single_cluster_is_the_whole_list() -> None:
    drawn = draw_uniform(torch.zeros(50, dtype=torch.int64), n_draws=50, seed=[0])
    assert sorted(drawn.tolist()) == list(range(50))


@pytest.mark.parametrize("labels", [[], [-1, -1]])
def test_nothing_to_draw_from_is_told(labels: list[int]) -> None:
    with pytest.raises(InputError, match=f"none of the {len(labels)} images"):
        draw_uniform(torch.tensor(labels, dtype=torch.int64), n_draws=3, seed=[0])


def test_draw_at_the_size_of_imagenet() -> None:
    labels_N = torch.from_numpy(np.random.default_rng(0).integers(10_000, size=1_280_000))
    counts_K = torch.bincount(labels_N[draw_uniform(labels_N, n_draws=1_280_000, seed=[0])], minlength=10_000)
    assert counts_K.tolist() == [128] * 10_000


def as_published_by_lists(labels: list[int], sampled: list[int]) -> list[int]:
    """The 2018 code told in loops: lists of images by cluster, laid end to end, read at the numbers that were sampled."""
    images_lists: list[list[int]] = [[] for _ in range(max(labels) + 1)]
    for image, label in enumerate(labels):
        images_lists[label].append(image)
    reordered = [image for images in images_lists for image in images]
    return [reordered[index] for index in sampled]


@pytest.mark.parametrize("seed", range(4))
def test_draw_as_published_reads_the_reordered_images_at_the_numbers_sampled(seed: int) -> None:
    labels_N = random_labels(300, 9, seed)
    labels_N = labels_N[labels_N >= 0]
    sampled = draw_uniform(labels_N, n_draws=250, seed=[seed])
    drawn = draw_as_published(labels_N, n_draws=250, seed=[seed])
    assert drawn.tolist() == as_published_by_lists(labels_N.tolist(), sampled.tolist())


def test_draw_as_published_does_not_see_unassigned_images() -> None:
    labels_N = random_labels(300, 9, 0)
    seen = (labels_N >= 0).nonzero().flatten()
    assert 0 < len(seen) < 300
    drawn = draw_as_published(labels_N, n_draws=250, seed=[5])
    sampled = draw_uniform(labels_N, n_draws=250, seed=[5])
    position = {image: number for number, image in enumerate(seen.tolist())}
    numbers = [position[image] for image in sampled.tolist()]
    assert seen.tolist() and drawn.tolist() == [
        int(seen[image]) for image in as_published_by_lists(labels_N[seen].tolist(), numbers)
    ]


def test_draw_as_published_hardly_balances() -> None:
    """90 % of the images are in one cluster, anywhere in the folder: uniform gives it half of the draws, 2018 gave 90 %."""
    rng = np.random.default_rng(0)
    labels_N = torch.from_numpy((rng.random(2000) < 0.1).astype(np.int64))
    share = [
        float((labels_N[draw(labels_N, n_draws=2000, seed=[0])] == 0).double().mean())
        for draw in (draw_uniform, draw_as_published)
    ]
    assert share[0] == 0.5
    assert share[1] > 0.8


# Agreement with other labels


@pytest.mark.parametrize(
    ("ours", "others", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 1.0),
        ([0, 0, 1, 1], [5, 5, 2, 2], 1.0),
        ([0, 0, 1, 1], [0, 1, 0, 1], 0.0),
        # Each of four clusters is one half of a class: information 1 bit, entropies 2 bits and 1 bit, 1 / sqrt(2).
        ([0, 1, 2, 3], [0, 0, 1, 1], 0.5**0.5),
        ([0, 0, 1, 1, -1, 0], [0, 0, 1, 1, 1, -1], 1.0),
    ],
)
def test_nmi_by_hand(ours: list[int], others: list[int], expected: float) -> None:
    assert assignment_of(ours).nmi(torch.tensor(others)) == pytest.approx(expected)
    assert assignment_of(ours).nmi(np.array(others)) == pytest.approx(expected)


def test_nmi_equals_scikit_learn_whatever_the_numbers_of_clusters() -> None:
    ours, others = random_labels(800, 10, 0), random_labels(800, 7, 1)
    known = (ours >= 0) & (others >= 0)
    expected = normalized_mutual_info_score(others[known], ours[known], average_method="geometric")
    renumbered = torch.tensor([*np.random.default_rng(2).permutation(10), -1])[ours]
    assert assignment_of(ours, 10).nmi(others) == pytest.approx(expected)
    assert assignment_of(renumbered, 10).nmi(others) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ours", "others", "expected"),
    [
        ([0, 0, 1, 1], [5, 5, 2, 2], 1.0),
        ([0, 0, 0, 0], [0, 0, 0, 0], 1.0),
        # Of six pairs each puts two together, none of them both: 0 against 2/3 by chance, of 2 at best.
        ([0, 0, 1, 1], [0, 1, 0, 1], (0 - 2 / 3) / (2 - 2 / 3)),
        ([0, 0, 1, 1, -1, 0], [3, 3, 1, 1, 1, -1], 1.0),
    ],
)
def test_ari_by_hand(ours: list[int], others: list[int], expected: float) -> None:
    assert assignment_of(ours).ari(torch.tensor(others)) == pytest.approx(expected)
    assert assignment_of(ours).ari(np.array(others)) == pytest.approx(expected)


def test_ari_equals_scikit_learn_over_images_that_both_know() -> None:
    ours, others = random_labels(800, 10, 0), random_labels(800, 7, 1)
    known = (ours >= 0) & (others >= 0)
    assert assignment_of(ours, 10).ari(others) == pytest.approx(adjusted_rand_score(others[known], ours[known]))


def test_labels_of_other_images_are_told() -> None:
    for measure in (assignment_of([0, 1]).nmi, assignment_of([0, 1]).ari):
        with pytest.raises(InputError, match=r"3 labels .* 2 images"):
            measure(torch.tensor([0, 1, 1]))


@pytest.mark.parametrize(
    ("labels", "entropy"),
    [
        ([0, 0, 0], 0.0),
        ([0, 1, 2, 3, -1], log(4)),
        ([3, 3, 0, 0, -1, -1], log(2)),
        ([0, 0, 0, 1], -(0.75 * log(0.75) + 0.25 * log(0.25))),
    ],
)
def test_entropy_by_hand(labels: list[int], entropy: float) -> None:
    assert assignment_of(labels).entropy == pytest.approx(entropy)
    assert assignment_of(labels).effective_clusters == pytest.approx(exp(entropy))


def test_largest_share_is_of_the_assigned_images() -> None:
    assert assignment_of([0, 0, 0, 1, -1, -1]).largest_share == pytest.approx(0.75)


# Other points


def naive_distances(points: Tensor, centroids: Tensor) -> list[list[float]]:
    return [[dist(point, centroid) for centroid in centroids.tolist()] for point in points.tolist()]


def test_predict_and_transform_equal_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    centroids_KP, points_MP = (torch.from_numpy(rng.normal(3, 1, (n, 6))).float() for n in (9, 60))
    assignment = Assignment(torch.zeros(4, dtype=torch.int64), torch.zeros(4), centroids_KP)
    expected = naive_distances(points_MP, centroids_KP)
    assert assignment.predict(points_MP).tolist() == [row.index(min(row)) for row in expected]
    np.testing.assert_allclose(assignment.transform(points_MP).numpy(), expected, rtol=1e-6)


def test_a_point_on_its_centroid_is_at_distance_zero_and_ties_go_to_the_lower_number() -> None:
    centroids_KP = torch.tensor([[1e4, 1.0], [1e4, 3.0], [1e4, 3.0]])
    assignment = Assignment(torch.zeros(1, dtype=torch.int64), torch.zeros(1), centroids_KP)
    points_MP = torch.tensor([[1e4, 3.0], [1e4, 2.0]])
    assert assignment.predict(points_MP).tolist() == [1, 0]
    assert assignment.transform(points_MP).tolist() == [[2.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


def test_points_that_are_not_finite_are_in_no_cluster() -> None:
    assignment = assignment_of([0, 1])
    points_MP = torch.tensor([[0.9] * 3, [torch.nan] * 3, [torch.inf] * 3], dtype=torch.float64)
    assert assignment.predict(points_MP).tolist() == [1, -1, -1]
    assert assignment.predict(points_MP[:0]).shape == (0,)


def test_points_of_another_width_are_told() -> None:
    for method in (assignment_of([0, 1]).predict, assignment_of([0, 1]).transform):
        with pytest.raises(InputError, match=r"points \(5, 2\) .* 3 columns"):
            method(torch.zeros(5, 2))


def test_means_and_distances_of_members() -> None:
    points_NP = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [9.0, 9.0]])
    labels_N = torch.tensor([0, 0, 2, 0])
    means_KP = cluster_means(points_NP, labels_N, 4)
    torch.testing.assert_close(means_KP, torch.tensor([[11 / 3, 3.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]))
    expected = [dist(point, means_KP[label].tolist()) for point, label in zip(points_NP.tolist(), labels_N, strict=True)]
    torch.testing.assert_close(member_distances(points_NP, labels_N, means_KP), torch.tensor(expected))

    def work(rows: slice, ranks: Ranks) -> Tensor:
        return cluster_means(points_NP[rows], labels_N[rows], 4, ranks=ranks)

    for found_KP in on_ranks([slice(0, 1), slice(1, 1), slice(1, 4)], work):
        torch.testing.assert_close(found_KP, means_KP)


def test_over_ranks_gathers_the_images_of_all() -> None:
    whole = assignment_of([1, -1, 0, 1, 2])

    def work(rows: slice, ranks: Ranks) -> Assignment:
        return replace(whole, labels_N=whole.labels_N[rows], distances_N=whole.distances_N[rows]).over_ranks(ranks)

    for found in on_ranks([slice(0, 2), slice(2, 2), slice(2, 5)], work):
        assert torch.equal(found.labels_N, whole.labels_N)
        assert torch.equal(found.distances_N.nan_to_num(-1), whole.distances_N.nan_to_num(-1))


def test_rows_that_are_not_finite_are_unassigned() -> None:
    points = Points.of(torch.tensor([[0.0], [torch.nan], [1.0]]), ONE_PROCESS)
    found = Assignment(torch.tensor([1, 0]), torch.tensor([0.5, 2.0]), torch.zeros(2, 1), remark="why")
    assignment = points.assignment(found)
    assert assignment.labels_N.tolist() == [1, -1, 0]
    torch.testing.assert_close(assignment.distances_N, torch.tensor([0.5, torch.nan, 2.0]), equal_nan=True)
    assert assignment.remark == "why"


# Matching numbers


def overlap(one: Assignment, other: Assignment) -> int:
    return int(((one.labels_N == other.labels_N) & (one.labels_N >= 0)).sum())


@pytest.fixture(params=["exact", "greedy"])
def matching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "EXACT_MATCHING_CLUSTERS", 10**9 if request.param == "exact" else 0)
    return str(request.param)


@pytest.mark.usefixtures("matching")
def test_a_permutation_of_the_numbers_is_undone() -> None:
    previous = assignment_of(random_labels(2000, 15, 0), 15)
    permutation_K = torch.from_numpy(np.random.default_rng(1).permutation(15))
    labels_N = torch.cat([permutation_K, torch.tensor([-1])])[previous.labels_N]
    centroids_KP = torch.empty_like(previous.centroids_KP)
    centroids_KP[permutation_K] = previous.centroids_KP
    matched = Assignment(labels_N, previous.distances_N, centroids_KP, (3.0,), 2).matched_to(previous)
    assert torch.equal(matched.labels_N, previous.labels_N)
    assert torch.equal(matched.centroids_KP, previous.centroids_KP)
    assert (matched.inertia_history, matched.n_repaired) == ((3.0,), 2)


@pytest.mark.usefixtures("matching")
@settings(max_examples=40, deadline=None)
@given(data=st.data(), n_previous=st.integers(1, 12))
def test_matching_only_renumbers(data: st.DataObject, n_previous: int) -> None:
    """Whatever the overlap, empty clusters and another number of clusters before included."""
    n = data.draw(st.integers(1, 40))
    labels = data.draw(st.lists(st.integers(-1, 7), min_size=n, max_size=n))
    before = data.draw(st.lists(st.integers(-1, n_previous - 1), min_size=n, max_size=n))
    assignment = assignment_of(labels, 8)
    matched = assignment.matched_to(assignment_of(before, n_previous))
    old_number_K = matched.centroids_KP[:, 0].long()
    assert sorted(old_number_K.tolist()) == list(range(8))
    finite_N = assignment.labels_N >= 0
    assert torch.equal(old_number_K[matched.labels_N[finite_N]], assignment.labels_N[finite_N])
    assert torch.equal(matched.labels_N >= 0, finite_N)


@pytest.mark.parametrize("seed", range(5))
def test_exact_is_the_best_permutation_and_greedy_no_better(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, before = assignment_of(random_labels(60, 5, seed), 5), assignment_of(random_labels(60, 5, seed + 50), 5)
    candidates = [torch.tensor([*order, -1])[ours.labels_N] for order in permutations(range(5))]
    best = max(overlap(assignment_of(labels_N, 5), before) for labels_N in candidates)
    exact = overlap(ours.matched_to(before), before)
    monkeypatch.setattr(module, "EXACT_MATCHING_CLUSTERS", 0)
    assert exact == best
    assert best / 2 <= overlap(ours.matched_to(before), before) <= exact


@pytest.mark.parametrize(("n_ours", "n_before"), [(6, 3), (3, 6), (5, 1), (1, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_other_numbers_of_clusters_before(n_ours: int, n_before: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact is the best of all permutations of the new numbers, which stay 0 … K-1; greedy is half as good at least."""
    ours, before = random_labels(70, n_ours, seed), assignment_of(random_labels(70, n_before, seed + 50), n_before)
    candidates = [torch.tensor([*order, -1])[ours] for order in permutations(range(n_ours))]
    best = max(overlap(assignment_of(labels_N, n_ours), before) for labels_N in candidates)
    exact = assignment_of(ours, n_ours).matched_to(before)
    monkeypatch.setattr(module, "EXACT_MATCHING_CLUSTERS", 0)
    greedy = assignment_of(ours, n_ours).matched_to(before)
    assert overlap(exact, before) == best
    assert best / 2 <= overlap(greedy, before) <= best
    for matched in (exact, greedy):
        assert sorted(matched.centroids_KP[:, 0].tolist()) == list(range(n_ours))


def greedy_by_hand(ours: Tensor, before: Tensor, n_clusters: int) -> list[int]:
    """New numbers, one pair after the other."""
    overlaps = {
        (-int(((ours == cluster) & (before == number)).sum()), cluster, number)
        for cluster in range(n_clusters)
        for number in range(n_clusters)
    }
    numbers: dict[int, int] = {}
    for count, cluster, number in sorted(overlaps):
        if count and cluster not in numbers and number not in numbers.values():
            numbers[cluster] = number
    free = [number for number in range(n_clusters) if number not in numbers.values()]
    return [numbers[cluster] if cluster in numbers else free.pop(0) for cluster in range(n_clusters)]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_equals_a_naive_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_MATCHING_CLUSTERS", 0)
    ours, before = random_labels(200, 12, seed), random_labels(200, 12, seed + 9)
    matched = assignment_of(ours, 12).matched_to(assignment_of(before, 12))
    number_K = torch.tensor([*greedy_by_hand(ours, before, 12), -1])
    assert torch.equal(matched.labels_N, number_K[ours])


def test_greedy_takes_the_largest_overlap_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_MATCHING_CLUSTERS", 0)
    ours, before = [0] * 6 + [1] * 3, [1] * 4 + [0] * 2 + [1] * 3
    assert assignment_of(ours).matched_to(assignment_of(before)).labels_N.tolist() == [1] * 6 + [0] * 3


# Numbers and files


def test_sizes_and_inertia() -> None:
    assignment = Assignment(torch.tensor([3, 0, -1, 3, 3]), torch.tensor([1.0, 2.0, torch.nan, 0.5, 0.0]), torch.zeros(5, 2))
    assert assignment.n_clusters == 5
    assert assignment.sizes_K().tolist() == [1, 0, 0, 3, 0]
    assert assignment.inertia == 1 + 4 + 0.25


def test_save_writes_one_row_an_image(tmp_path: Path) -> None:
    names = ["b/ü 1.jpg", "a.png", "part-0.tar::000.jpg", "c.jpg"]
    assignment = assignment_of([1, -1, 0, 1])
    save_assignment(tmp_path / "epoch-0001.parquet", names, assignment)
    table = pq.read_table(tmp_path / "epoch-0001.parquet")
    assert table.schema.names == ["name", "cluster", "distance"]
    assert table.schema.types == [pa.string(), pa.int64(), pa.float32()]
    assert table["name"].to_pylist() == names
    assert table["cluster"].to_pylist() == [1, -1, 0, 1]
    np.testing.assert_array_equal(table["distance"].to_numpy(), assignment.distances_N.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001.parquet"]


def test_a_save_that_fails_leaves_the_old_table(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    save_assignment(path, ["x", "y"], assignment_of([0, 1]))
    before = path.read_bytes()
    with pytest.raises(pa.ArrowInvalid):
        save_assignment(path, ["x"], assignment_of([0, 1]))
    assert path.read_bytes() == before
    save_assignment(path, ["x", "y"], assignment_of([1, 0]))
    assert pq.read_table(path)["cluster"].to_pylist() == [1, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_state_round_trip(tmp_path: Path) -> None:
    assignment = assignment_of([1, -1, 0, 1], 3)
    torch.save(assignment.state_dict(), tmp_path / "a.pt")
    again = Assignment.from_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert torch.equal(again.labels_N, assignment.labels_N)
    torch.testing.assert_close(again.distances_N, assignment.distances_N, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(again.centroids_KP, assignment.centroids_KP)
    assert (again.inertia_history, again.n_repaired) == (assignment.inertia_history, assignment.n_repaired)


def test_a_state_of_before_there_were_remarks_loads() -> None:
    state = assignment_of([1, -1, 0, 1], 3).state_dict()
    assert state.pop("remark") == ""
    assert Assignment.from_state_dict(state).remark == ""
    again = Assignment.from_state_dict({**state, "remark": "one cluster holds all"})
    assert again.remark == "one cluster holds all"
    assert again.matched_to(again).remark == "one cluster holds all"


def test_an_assignment_is_frozen() -> None:
    with pytest.raises(AttributeError):
        assignment_of([0, 1]).labels_N = torch.zeros(2)  # type: ignore[misc]
