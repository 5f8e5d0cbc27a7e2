"""Confusion matrix and mIoU: worked by hand, against scikit-learn, and as properties."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score
from torch import Tensor

from deepcluster.evaluation.measures.confusion import confusion, segmentation_scores

NAMES = ("background", "cat", "dog", "unseen")
C = len(NAMES)
IMAGES = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.sampled_from([0, 1, 2, 255]))


def pair(draw_seed: int, shape: tuple[int, ...], classes: int = C) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(draw_seed)
    truth = rng.choice([*range(classes - 1), 255], shape).astype(np.uint8)
    return torch.from_numpy(truth), torch.from_numpy(rng.integers(0, classes - 1, shape))


def test_two_images_by_hand() -> None:
    # First image: 4 background right; cat: 2 right, 1 called dog; 1 ignored.
    first = confusion(torch.tensor([[0, 0, 0, 0], [1, 1, 1, 255]]), torch.tensor([[0, 0, 0, 0], [1, 1, 2, 1]]), C)
    # Second: background 1 right, 1 called cat; dog: 1 right, 1 called background.
    second = confusion(torch.tensor([[0, 0], [2, 2]]), torch.tensor([[0, 1], [2, 0]]), C)
    assert (first + second).tolist() == [[5, 1, 0, 0], [0, 2, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    scores = segmentation_scores(first + second, NAMES)
    # Unions: background 6 + 6 - 5, cat 3 + 3 - 2, dog 2 + 2 - 1.
    assert scores.iou == pytest.approx({"background": 5 / 7, "cat": 2 / 4, "dog": 1 / 3})
    assert scores.miou == pytest.approx((5 / 7 + 1 / 2 + 1 / 3) / 3)
    assert scores.pixel_accuracy == pytest.approx(8 / 11)
    assert scores.mean_accuracy == pytest.approx((5 / 6 + 2 / 3 + 1 / 2) / 3)
    assert scores.absent == ("unseen",)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), hnp.array_shapes(min_dims=1, max_dims=3, max_side=9))
def test_equals_scikit_learn(seed: int, shape: tuple[int, ...]) -> None:
    truth, prediction = pair(seed, shape)
    counted = (truth != 255).numpy()
    if not counted.any():
        return
    right, said = truth.numpy()[counted], prediction.numpy()[counted]
    matrix = confusion(truth, prediction, C)
    np.testing.assert_array_equal(matrix.numpy(), confusion_matrix(right, said, labels=range(C)))
    scores = segmentation_scores(matrix, NAMES)
    there = sorted({*right.tolist(), *said.tolist()})
    each = jaccard_score(right, said, labels=there, average=None)
    assert list(scores.iou.items()) == [(NAMES[one], pytest.approx(value)) for one, value in zip(there, each, strict=True)]
    assert scores.miou == pytest.approx(jaccard_score(right, said, labels=there, average="macro"))
    assert scores.pixel_accuracy == pytest.approx(accuracy_score(right, said))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are only in the prediction
        assert scores.mean_accuracy == pytest.approx(balanced_accuracy_score(right, said))


@settings(max_examples=50, deadline=None)
@given(IMAGES, st.integers(0, 10_000), st.integers(0, 255))
def test_the_prediction_of_ignored_pixels_does_not_matter(truth: np.ndarray, seed: int, other: int) -> None:
    truth_HW = torch.from_numpy(truth)
    prediction = torch.randint(0, C, truth_HW.shape, generator=torch.Generator().manual_seed(seed))
    matrix = confusion(truth_HW, prediction, C)
    assert torch.equal(matrix, confusion(truth_HW, torch.where(truth_HW == 255, other, prediction), C))
    assert matrix.dtype == torch.int64
    assert int(matrix.sum()) == int((truth != 255).sum())
    # More ignored pixels around the image.
    wide = torch.nn.functional.pad(truth_HW, (2, 1, 0, 3), value=255)
    assert torch.equal(matrix, confusion(wide, torch.nn.functional.pad(prediction, (2, 1, 0, 3), value=1), C))


def test_prediction_equal_to_truth_has_one_everywhere() -> None:
    truth, _ = pair(1, (9, 8))
    scores = segmentation_scores(confusion(truth, truth, C), NAMES)
    assert (scores.miou, scores.pixel_accuracy, scores.mean_accuracy) == (1, 1, 1)
    assert scores.iou == {"background": 1, "cat": 1, "dog": 1}


def test_all_background_has_its_share_over_the_classes() -> None:
    truth = torch.tensor([0] * 70 + [1] * 20 + [2] * 10 + [255] * 9)
    scores = segmentation_scores(confusion(truth, torch.zeros_like(truth), C), NAMES)
    assert scores.miou == pytest.approx(0.7 / 3)
    assert scores.pixel_accuracy == pytest.approx(0.7)
    assert scores.mean_accuracy == pytest.approx(1 / 3)


def test_a_class_that_is_only_predicted_counts_as_zero_and_is_named() -> None:
    scores = segmentation_scores(confusion(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 3, 1, 1]), C), NAMES)
    assert scores.iou == {"background": 0.5, "cat": 1, "unseen": 0}
    assert scores.miou == pytest.approx(0.5)
    assert scores.absent == ("dog", "unseen")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10_000), hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)), min_size=1, max_size=5)
)
def test_parts_add_up_to_the_whole(parts: list[tuple[int, tuple[int, ...]]]) -> None:
    pairs = [pair(seed, shape) for seed, shape in parts]
    whole = confusion(torch.cat([t.flatten() for t, _ in pairs]), torch.cat([p.flatten() for _, p in pairs]), C)
    assert torch.equal(whole, torch.stack([confusion(t, p, C) for t, p in pairs]).sum(0))


def test_uint8_does_not_overflow_with_many_classes() -> None:
    numbers = torch.arange(133, dtype=torch.uint8)
    assert torch.equal(confusion(numbers, numbers.flip(0), 133), torch.eye(133, dtype=torch.int64).flip(1))


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        ([0, 4], [0, 0], "truth has numbers from 0 to 4; the classes are 0 to 3"),
        ([0, 1], [0, 255], "prediction has numbers from 0 to 255"),
        ([0, 1], [-1, 1], "prediction has numbers from -1 to 1"),
        ([0, 1], [0], "shape"),
    ],
)
def test_numbers_that_are_no_classes_are_refused(truth: list[int], prediction: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confusion(torch.tensor(truth), torch.tensor(prediction), C)


def test_no_pixel_has_no_score() -> None:
    with pytest.raises(ValueError, match="no pixel"):
        segmentation_scores(confusion(torch.tensor([255]), torch.tensor([0]), C), NAMES)
