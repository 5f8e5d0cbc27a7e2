"""Votes of neighbours against a naive float64 loop and scikit-learn; whole evaluations on generated images."""

import shutil
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch
from models_helper import make_model, write_classes
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from deepcluster.clustering import neighbours
from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.evaluation import knn as module
from deepcluster.evaluation.datasets.labelled import open_train_val, readable_rows
from deepcluster.evaluation.knn import evaluate, knn_accuracy, knn_predict, leave_one_out_accuracy, ranks_of_truth
from deepcluster.evaluation.options import KnnOptions


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
    monkeypatch.setattr(neighbours, "BLOCK_BOUNDS", 2000)
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


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_several_k_of_one_search_equal_scikit_learn_for_each(temperature: float) -> None:
    """top-1 and top-5 of eight classes, k = 1 … 200, in any order."""
    known_ND, labels_N = data(500, n_classes=8)
    features_MD, labels_M = data(300, n_classes=8, seed=1)
    ks = (20, 1, 200, 5)
    nearest = nearest_neighbours(features_MD, known_ND, k=200, metric="cosine")
    ranks = ranks_of_truth(nearest, labels_N, labels_M, ks=ks, n_classes=8, temperature=temperature)
    assert set(ranks) == set(ks)
    for k in ks:
        oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
        oracle.fit(known_ND.double().numpy(), labels_N.numpy())
        # Of equal votes (none, for the most part) scikit-learn puts the higher class first: numbered the other way round.
        shares_MC = oracle.predict_proba(features_MD.double().numpy())[:, ::-1]
        for top in (1, 5):
            expected = top_k_accuracy_score(7 - labels_M.numpy(), shares_MC, k=top, labels=range(8))
            assert float((ranks[k] < top).double().mean()) == pytest.approx(expected), (k, top)
        if temperature == 0.07:
            assert torch.equal(ranks[k] == 0, knn_predict(known_ND, labels_N, features_MD, k=k) == labels_M)


def test_a_class_that_no_voter_has_comes_after_those_with_votes() -> None:
    """Class 3 has no known image: behind 2 which has the votes, and the lower ones without any."""
    nearest = torch.tensor([[1.0, 0.5]]), torch.tensor([[0, 1]])
    ranks = ranks_of_truth(nearest, torch.tensor([2, 2]), torch.tensor([3]), ks=(2,), n_classes=5)
    assert ranks[2].tolist() == [3]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes, two of which look the same."""
    folder = tmp_path_factory.mktemp("classes")
    for part, count, seed in (("train", 8, 1), ("val", 4, 2)):
        write_classes(folder / part, count, classes=5, seed=seed)
        write_classes(folder / "more", count, classes=1, seed=seed + 10)
        shutil.move(folder / "more" / "class0", folder / part / "class5")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_a_whole_evaluation_equals_scikit_learn(images: Path, cache: Path) -> None:
    model, parts, stage = make_model(cache), open_train_val(images), "conv2"
    found = evaluate(model, images, KnnOptions(stages=stage, k=(1, 20, 5)))
    known, asked = (readable_rows(model, part.source, part.labels_N, (stage,)) for part in (parts.train, parts.val))
    for k in (1, 5, 20):
        oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        oracle.fit(known.rows[stage].double().numpy(), known.labels_S.numpy())
        expected = oracle.score(asked.rows[stage].double().numpy(), asked.labels_S.numpy())
        assert found.results["top-1"][f"k={k}"] == pytest.approx(expected)
    # The classes that look the same are confused, and no others.
    assert 4 / 6 <= found.results["top-1"]["k=1"] < 1 and found.results["top-5"]["k=20"] == 1
    assert found.headline == ("top-1", "k=20") and found.best() == found.results["top-1"]["k=20"]
    assert found.data == {"path": str(images), "train_images": 48, "val_images": 24, "classes": 6}
    assert found.settings["stages"] == [stage] and found.settings["k"] == [1, 20, 5]


def test_stages_have_their_cases_and_five_classes_no_top_5(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_classes(tmp_path / part, 3, classes=5)
    found = evaluate(make_model(tmp_path / "cache"), tmp_path, KnnOptions(stages="conv1,conv2", k=(1, 2)))
    cases = ["conv1 k=1", "conv1 k=2", "conv2 k=1", "conv2 k=2"]
    assert found.results == {"top-1": dict.fromkeys(cases, 1.0)}
    assert found.headline == ("top-1", "conv2 k=1")


def test_k_over_the_number_of_images_is_told(images: Path, cache: Path) -> None:
    with pytest.raises(InputError, match=r"k=200 neighbours are more than the 48 images of .*; use --k 1,5,10,20$"):
        evaluate(make_model(cache), images, KnnOptions(k=(1, 5, 10, 20, 200)))
    with pytest.raises(InputError, match=r"k=49 .* use --k 48$"):
        evaluate(make_model(cache), images, KnnOptions(k=(49,)))
    with pytest.raises(InputError, match="alexnet-small has no stage 'conv9'"):
        evaluate(make_model(cache), images, KnnOptions(stages="conv9", k=(1,)))


def test_the_usual_numbers_of_neighbours_go_as_far_as_there_are_images(images: Path, cache: Path) -> None:
    found = evaluate(make_model(cache), images, KnnOptions())
    assert list(found.results["top-1"]) == ["k=1", "k=5", "k=10", "k=20"]
    assert found.settings["k"] == [1, 5, 10, 20]
    assert found.headline == ("top-1", "k=20")


def test_unreadable_images_are_left_out_and_named(images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(images, tmp_path / "data")
    for name in ("000.png", "003.png"):
        (folder / "train" / "class1" / name).write_bytes(b"no image")
    shutil.rmtree(folder / "val" / "class1")
    (folder / "val" / "class1").mkdir()
    (folder / "val" / "class1" / "bad.png").write_bytes(b"no image")
    model = make_model(tmp_path / "cache")
    found = evaluate(model, folder, KnnOptions(stages="conv1", k=(1,)))
    assert found.notes == [
        "train: 2 images can't be read and are left out: class1/000.png, class1/003.png",
        "val: 1 image can't be read and is left out: class1/bad.png",
    ]
    # The classes that look the same: of the 20 images that are left, 8.
    assert found.results["top-1"]["k=1"] >= 12 / 20
    with pytest.raises(InputError, match=r"k=47 neighbours are more than the 46 images of .* that can be read; use --k 46"):
        evaluate(model, folder, KnnOptions(stages="conv1", k=(47,)))


def test_no_readable_image_is_told(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_classes(tmp_path / part, 2, classes=2)
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the images can be read: 4 images"):
        evaluate(make_model(tmp_path / "cache"), tmp_path, KnnOptions(k=(1,)))


def test_a_stop_between_blocks_is_heard(images: Path, cache: Path) -> None:
    model = make_model(cache)
    evaluate(model, images, KnnOptions(stages="conv1", k=(1,)))
    model.work.interruption.requested = "SIGINT"
    with pytest.raises(Interrupted):
        evaluate(model, images, KnnOptions(stages="conv1", k=(1,)))
