"""Votes of neighbours against a naive float64 loop and scikit-learn."""

from math import exp

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from deepcluster.clustering import neighbours
from deepcluster.errors import InputError
from deepcluster.evaluation import knn as module
from deepcluster.evaluation.knn import knn_accuracy, knn_predict, leave_one_out_accuracy


def data(n: int, dim: int = 6, n_classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes that overlap; rows of very different length."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(n_classes, dim))
    labels = rng.integers(n_classes, size=n)
    rows = (centres[labels] + rng.normal(size=(n, dim))) * rng.uniform(0.1, 50, (n, 1))
    return torch.from_numpy(rows).float(), torch.from_numpy(labels)


def naive_predict(known: Tensor, labels: Tensor, features: Tensor, k: int, *, exclude_self: bool = False) -> list[int]:
    known_rows, rows = known.double().numpy(), features.double().numpy()
    predicted = []
    for number, row in enumerate(rows):
        cosines = [
            (float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)), position)
            for position, other in enumerate(known_rows)
            if not (exclude_self and position == number)
        ]
        votes: dict[int, float] = {}
        for cosine, position in sorted(cosines, reverse=True)[:k]:
            label = int(labels[position])
            votes[label] = votes.get(label, 0) + exp(cosine / 0.07)
        predicted.append(max(sorted(votes), key=lambda label: votes[label]))
    return predicted


@pytest.mark.parametrize("k", [1, 7, 60])
def test_equals_a_naive_loop(k: int) -> None:
    known_ND, labels_N = data(60)
    features_MD, _ = data(40, seed=1)
    assert knn_predict(known_ND, labels_N, features_MD, k=k).tolist() == naive_predict(known_ND, labels_N, features_MD, k)


@pytest.mark.parametrize("k", [1, 20])
def test_equals_scikit_learn(k: int) -> None:
    known_ND, labels_N = data(500)
    features_MD, labels_M = data(300, seed=1)
    oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    oracle.fit(known_ND.double().numpy(), labels_N.numpy())
    predicted_M = knn_predict(known_ND, labels_N, features_MD, k=k)
    assert predicted_M.tolist() == oracle.predict(features_MD.double().numpy()).tolist()
    expected = oracle.score(features_MD.double().numpy(), labels_M.numpy())
    assert knn_accuracy(known_ND, labels_N, features_MD, labels_M, k=k) == pytest.approx(expected)


def test_weights_decide_not_the_number_of_votes() -> None:
    """One neighbour at cosine 1 outweighs two at 0.6: exp(0.4 / 0.07) is 303."""
    known_ND = torch.tensor([[0.6, 0.8], [0.6, -0.8], [2.0, 0.0]])
    assert knn_predict(known_ND, torch.tensor([0, 0, 1]), torch.tensor([[5.0, 0.0]]), k=3).tolist() == [1]


@pytest.mark.parametrize("k", [1, 5])
def test_leave_one_out_equals_a_naive_loop(k: int) -> None:
    features_ND, labels_N = data(80)
    expected = naive_predict(features_ND, labels_N, features_ND, k, exclude_self=True)
    assert knn_predict(features_ND, labels_N, features_ND, k=k, exclude_self=True).tolist() == expected
    share = np.mean(np.array(expected) == labels_N.numpy())
    assert leave_one_out_accuracy(features_ND, labels_N, k=k) == pytest.approx(share)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features_ND, labels_N = data(200)
    expected = knn_predict(features_ND, labels_N, features_ND, k=5, exclude_self=True)
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 40)
    monkeypatch.setattr(neighbours, "SAMPLE_PER_NEIGHBOUR", 2)
    assert torch.equal(knn_predict(features_ND, labels_N, features_ND, k=5, exclude_self=True), expected)


def test_the_order_of_equal_votes_does_not_matter() -> None:
    """Both classes have the same three cosines: the lower wins, in whatever order the images come."""
    known_ND = torch.tensor([[1.0, 0.3], [1.0, 0.1], [1.0, 0.7], [1.0, -0.7], [1.0, -0.3], [1.0, -0.1]])
    for classes in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]):
        assert knn_predict(known_ND, torch.tensor(classes), torch.tensor([[3.0, 0.0]]), k=6).tolist() == [0]


def test_features_of_zeros_are_like_none_and_unlike_none() -> None:
    """Their cosine is 0 to all: they vote behind those that are alike, before those that are opposite."""
    known_ND = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    labels_N = torch.tensor([0, 1, 2])
    assert knn_predict(known_ND, labels_N, torch.tensor([[2.0, 0.0], [0.0, 0.0], [-0.5, 0.0]]), k=1).tolist() == [1, 0, 2]


def test_chance_where_labels_mean_nothing() -> None:
    features_ND, _ = data(1000, dim=20)
    labels_N = torch.from_numpy(np.random.default_rng(5).integers(4, size=1000))
    assert leave_one_out_accuracy(features_ND, labels_N, k=10) == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(("k", "exclude_self"), [(11, False), (10, True)])
def test_more_neighbours_than_images_is_told(k: int, exclude_self: bool) -> None:
    features_ND, labels_N = data(10)
    with pytest.raises(InputError, match=f"k={k} "):
        knn_predict(features_ND, labels_N, features_ND, k=k, exclude_self=exclude_self)
    knn_predict(features_ND, labels_N, features_ND, k=k - 1, exclude_self=exclude_self)
