"""Average precision against rankings worked out by hand, scikit-learn, and naive loops."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.evaluation.measures.rankings import (
    average_precision,
    average_precision_11_points,
    mean_average_precision,
)


def ranked(*labels: int) -> tuple[Tensor, Tensor]:
    """Labels in the order of their scores, the best first."""
    return torch.tensor(labels, dtype=torch.int8), torch.arange(len(labels), 0, -1).float()


def random_ranking(seed: int, count: int = 60, *, levels: int = 1000) -> tuple[Tensor, Tensor]:
    """Labels -1, 0 and 1, and scores of which some are equal where there are few levels."""
    rng = np.random.default_rng(seed)
    labels_N = torch.from_numpy(rng.choice([-1, 0, 1], p=[0.6, 0.1, 0.3], size=count).astype(np.int8))
    return labels_N, torch.from_numpy(rng.integers(levels, size=count) / 7)


def naive_points(labels_N: Tensor, scores_N: Tensor) -> list[tuple[Fraction, Fraction]]:
    """Recall and precision, exact, of all images from each score upwards."""
    pairs = [(score, label) for score, label in zip(scores_N.tolist(), labels_N.tolist(), strict=True) if label != 0]
    positives = sum(label == 1 for _, label in pairs)
    points = []
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        chosen = [label for score, label in pairs if score >= threshold]
        right = sum(label == 1 for label in chosen)
        points.append((Fraction(right, positives), Fraction(right, len(chosen))))
    return points


def naive_11_points(labels_N: Tensor, scores_N: Tensor) -> float:
    points = naive_points(labels_N, scores_N)
    best = [max(p for recall, p in points if recall >= Fraction(tenth, 10)) for tenth in range(11)]
    return float(sum(best) / 11)


def naive_area(labels_N: Tensor, scores_N: Tensor) -> float:
    area, before = Fraction(0), Fraction(0)
    for recall, precision in naive_points(labels_N, scores_N):
        area += (recall - before) * precision
        before = recall
    return float(area)


def test_by_hand() -> None:
    """Precision 1, 1/2, 2/3, 2/4, 3/5 at the five ranks; positives at ranks 1, 3 and 5."""
    ranking = ranked(1, -1, 1, -1, 1)
    assert average_precision(*ranking) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # Recall 1/3 reaches 0 to 0.3 (4 points), 2/3 reaches 0.4 to 0.6 (3), 1 the rest (4).
    assert average_precision_11_points(*ranking) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)


def test_a_later_precision_that_is_higher_counts_for_lower_recalls() -> None:
    """Ranks -1, 1, 1: precision 0, 1/2, 2/3; interpolated it is 2/3 everywhere."""
    ranking = ranked(-1, 1, 1)
    assert average_precision_11_points(*ranking) == pytest.approx(2 / 3)
    assert average_precision(*ranking) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_best_and_worst_ranking() -> None:
    assert average_precision(*ranked(1, 1, -1, -1)) == average_precision_11_points(*ranked(1, 1, -1, -1)) == 1
    assert average_precision(*ranked(-1, -1, -1, 1)) == average_precision_11_points(*ranked(-1, -1, -1, 1)) == 0.25


def test_recalls_are_compared_exactly() -> None:
    """3 of 10 reach 0.3, which 0.1 added up in floating point is above: ten positives at ranks 1 to 3 and 5 to 11."""
    ranking = ranked(1, 1, 1, -1, *[1] * 7)
    assert average_precision_11_points(*ranking) == pytest.approx((4 * 1 + 7 * 10 / 11) / 11)


def test_difficult_images_are_as_if_they_were_not_there() -> None:
    labels_N, scores_N = ranked(0, 1, 0, -1, 1, 0)
    kept_N = labels_N != 0
    for measure in (average_precision, average_precision_11_points):
        assert measure(labels_N, scores_N) == measure(labels_N[kept_N], scores_N[kept_N])
    assert average_precision(labels_N, scores_N) == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("levels", [1000, 9])
def test_equal_naive_loops_and_scikit_learn(levels: int) -> None:
    for seed in range(20):
        labels_N, scores_N = random_ranking(seed, levels=levels)
        kept_N = labels_N != 0
        assert average_precision(labels_N, scores_N) == pytest.approx(naive_area(labels_N, scores_N))
        expected = average_precision_score(labels_N[kept_N].numpy() == 1, scores_N[kept_N].numpy())
        assert average_precision(labels_N, scores_N) == pytest.approx(expected)
        assert average_precision_11_points(labels_N, scores_N) == pytest.approx(naive_11_points(labels_N, scores_N))


def test_the_order_of_images_and_the_scale_of_scores_do_not_matter() -> None:
    """Also where scores are equal: these images are one step."""
    labels_N, scores_N = random_ranking(3, levels=6)
    order_N = torch.from_numpy(np.random.default_rng(0).permutation(len(labels_N)))
    for measure in (average_precision, average_precision_11_points):
        assert measure(labels_N[order_N], scores_N[order_N]) == measure(labels_N, scores_N)
        assert measure(labels_N, 5 * scores_N - 100) == measure(labels_N, scores_N)
    assert average_precision(torch.tensor([1, -1, -1, -1]), torch.zeros(4)) == 0.25


def test_without_positives_there_is_none() -> None:
    assert np.isnan(average_precision(*ranked(-1, 0, -1)))
    assert np.isnan(average_precision_11_points(*ranked(0, 0)))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_told(wrong: float) -> None:
    labels_N, scores_N = ranked(1, -1, 1)
    scores_N[1] = wrong
    for measure in (average_precision, average_precision_11_points):
        with pytest.raises(InputError, match="1 of 3 scores are not finite"):
            measure(labels_N, scores_N)


def test_a_class_without_positives_is_named_and_in_no_mean() -> None:
    cat, (_, scores_N) = ranked(1, -1, 1, -1, 1)[0], ranked(1, -1, 1, -1, 1)
    cow, dog = torch.tensor([0, -1, -1, -1, 0], dtype=torch.int8), ranked(1, 1, -1, 0, -1)[0]
    found = mean_average_precision(torch.stack([cat, cow, dog], 1), scores_N[:, None].expand(5, 3), ["cat", "cow", "dog"])
    assert found.left_out == ["cow"]
    assert list(found.by_class) == list(found.by_class_11_points) == ["cat", "dog"]
    assert found.by_class["dog"] == 1
    assert found.mean == pytest.approx(((1 + 2 / 3 + 3 / 5) / 3 + 1) / 2)
    assert found.mean_11_points == pytest.approx((average_precision_11_points(cat, scores_N) + 1) / 2)


def test_no_class_with_positives_is_told() -> None:
    with pytest.raises(InputError, match="none of the 2 classes has a positive"):
        mean_average_precision(torch.full((3, 2), -1), torch.zeros(3, 2), ["a", "b"])
