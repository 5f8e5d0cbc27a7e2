"""Linear SVMs against scikit-learn used directly, and whole runs on a devkit that is written here and on shared ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models_helper import make_model
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import LinearSVC
from vocs import write_voc

from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.work import Interruption
from deepcluster.evaluation import svm as numbers
from deepcluster.evaluation.datasets.voc import CLASSES, open_voc
from deepcluster.evaluation.options import VocSvmOptions
from deepcluster.evaluation.results import Results
from deepcluster.evaluation.svm import (
    COSTS,
    FIXED_COST,
    Job,
    Rows,
    choose_cost,
    fit_all,
    fit_job,
    in_own_span,
    train_svm,
    unit_rows,
)
from deepcluster.evaluation.voc07_svm import _Case, evaluate
from deepcluster.run.features import Pooled
from deepcluster.run.kept_features import kept_rows

SHARED = Path(__file__).parents[2] / "shared" / "data"
SHOWN: tuple[list[str], ...] = (["cat"], ["dog"], ["bird"], ["cat", "dog"], ["dog", "bird"], [])


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cats, dogs and birds, one difficult bird; sheep in test only, a cow in training only."""
    train = {f"train{number:02}": SHOWN[number % 6] for number in range(24)} | {"cow": ["cow"], "hard": ["!bird"]}
    val = {f"val{number:02}": SHOWN[number % 6] for number in range(12)}
    test = {f"test{number:02}": SHOWN[number % 6] for number in range(18)} | {"sheep": ["sheep"]}
    return write_voc(tmp_path_factory.mktemp("voc"), {"train": train, "val": val, "trainval": {}, "test": test})


def run(cache: Path, data: Path, **options: object) -> Results:
    return evaluate(make_model(cache), data, VocSvmOptions.from_dict({"stages": "conv3", **options}))


def points(count: int, dim: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Unit rows of two classes that overlap."""
    rng = np.random.default_rng(seed)
    positive = np.arange(count) % 3 == 0
    rows = rng.normal(size=(count, dim)) + 0.8 * positive[:, None] * np.random.default_rng(9).normal(size=dim)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), positive


def measured(results: Results, measure: str) -> dict[str, float]:
    values = results.results[measure]
    assert not isinstance(values, float)
    return dict(values)


def test_the_grid_is_the_published_one() -> None:
    assert len(COSTS) == 26
    assert list(COSTS) == sorted(COSTS)
    assert set(COSTS) == {10.0**power for power in range(-7, 3)} | {0.5**power for power in range(4, 20)}


def test_rows_have_unit_length_and_unreadable_ones_are_left_out() -> None:
    features_ND = torch.tensor([[3.0, 4.0], [float("nan")] * 2, [0.0, 0.0]], dtype=torch.float16)
    rows_ND = unit_rows(features_ND)
    assert rows_ND.dtype == np.float64
    assert rows_ND.tolist() == [pytest.approx([0.6, 0.8], abs=1e-7), [0, 0]]


@pytest.mark.parametrize("dim", [5, 40])
def test_the_svm_is_scikit_learns_and_positives_weigh_twice(dim: int) -> None:
    """A weight of two is each positive twice; in both forms of the problem, which have one solution."""
    rows, positive = points(30, dim)
    twice, labels = np.concatenate([rows, rows[positive]]), np.concatenate([positive, positive[positive]])
    for cost in (0.01, 1.0):
        mine = train_svm(rows, positive, cost, seed=0).decision_function(rows)
        oracle = LinearSVC(C=cost, dual=False, tol=1e-8).fit(twice, labels).decision_function(rows)
        np.testing.assert_allclose(mine, oracle, atol=2e-3)


def test_the_cost_is_that_of_a_grid_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "COSTS", COSTS[::4])
    for seed in range(3):
        rows, positive = points(45, 8, seed)
        search = GridSearchCV(
            LinearSVC(class_weight={True: 2, False: 1}, dual=False, max_iter=2000),
            {"C": list(COSTS[::4])},
            scoring="average_precision",
            cv=StratifiedKFold(3, shuffle=True, random_state=seed),
        ).fit(rows, positive)
        assert choose_cost(rows, positive, seed) == search.best_params_["C"]


def test_few_images_have_a_fixed_cost() -> None:
    rows, _ = points(9, 4)
    for positives in (1, 2, 7):
        assert choose_cost(rows, np.arange(9) < positives, 0) == FIXED_COST


def test_the_span_of_few_rows_gives_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "COSTS", COSTS[::6])
    rows, positive = points(20, 300)
    others, _ = points(12, 300, seed=4)
    short, short_others = in_own_span(rows, others)
    assert short.shape == (20, 20)
    np.testing.assert_allclose(short @ short.T, rows @ rows.T, atol=1e-12)
    np.testing.assert_allclose(short @ short_others.T, rows @ others.T, atol=1e-12)
    mine = fit_job(Job("", np.arange(20), positive, 0), Rows(rows, others))
    oracle = LinearSVC(C=mine.cost, class_weight={True: 2, False: 1}, tol=1e-7, max_iter=100_000).fit(rows, positive)
    np.testing.assert_allclose(mine.scores_M.numpy(), oracle.decision_function(others), atol=1e-3)
    assert in_own_span(rows[:, :39], others[:, :39])[0].shape == (20, 39)


def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, positive = points(24, 6)
    jobs = [Job(str(seed), np.arange(24), np.roll(positive, seed), seed) for seed in range(3)]
    alone = list(fit_all(jobs, lambda: Rows(rows, rows), 2))
    monkeypatch.setattr(numbers, "WORTH_PROCESSES", 1)
    spread = list(fit_all(jobs, lambda: Rows(rows, rows), 2))
    assert [key for key, _ in spread] == [key for key, _ in alone] == ["0", "1", "2"]
    for (_, one), (_, other) in zip(alone, spread, strict=True):
        assert one.cost == other.cost
        torch.testing.assert_close(one.scores_M, other.scores_M, rtol=1e-4, atol=1e-4)


def test_a_draw_has_k_positives_and_nineteen_times_as_many_negatives() -> None:
    labels_N = np.array([1] * 10 + [0] * 5 + [-1] * 100, np.int8)
    case = _Case(7, labels_N)
    assert case.name == "cat"
    for k, expected in ((1, (1, 19)), (4, (4, 76)), (8, (8, 100)), (32, (10, 100))):
        job = case.few("conv1", k, seed=1, draw=0)
        assert (labels_N[job.chosen_n] == 1).tolist() == job.positive_n.tolist()
        assert (int(job.positive_n.sum()), int((~job.positive_n).sum())) == expected
        assert len(set(job.chosen_n.tolist())) == job.chosen_n.size
        assert 0 not in labels_N[job.chosen_n]
    same, other = case.few("conv1", 4, seed=1, draw=0), case.few("conv1", 4, seed=1, draw=1)
    assert same.chosen_n.tolist() == case.few("conv1", 4, seed=1, draw=0).chosen_n.tolist() != other.chosen_n.tolist()
    assert case.job("conv1", 1).chosen_n.tolist() == [*range(10), *range(15, 115)]


def test_a_whole_evaluation(tmp_path: Path, devkit: Path) -> None:
    results = run(tmp_path, devkit, stages="conv1,conv3")
    scores = measured(results, "mAP")
    assert list(scores) == list(measured(results, "mAP 11 points")) == ["conv1", "conv3"]
    # Chance is a third; the colours differ.
    assert max(scores.values()) > 0.85
    assert results.headline == ("mAP", max(scores, key=lambda stage: scores[stage]))
    assert results.best() == max(scores.values())
    assert results.data == {"description": devkit.name, "train_images": 38, "test_images": 19, "classes": 3}
    assert results.settings["split"] == "trainval"
    notes = "\n".join(results.notes)
    assert "no positive image to test on: cow" in notes
    named = next(note for note in results.notes if "to train on" in note)
    assert "sheep" in named
    assert "cat" not in named
    assert f"cost {FIXED_COST:g}, not cross-validated, for fewer than 3 images of a kind: cow" in notes
    assert not list((tmp_path / "unfinished").glob("*"))


def test_map_is_that_of_scikit_learn_by_hand(tmp_path: Path, devkit: Path) -> None:
    """The whole way again for one class: features, unit rows, the images that are not difficult, SVM, AP."""
    results = run(tmp_path, devkit)
    model, kit, bird = make_model(tmp_path), open_voc(devkit), CLASSES.index("bird")
    train, test = kit.split("trainval"), kit.split("test")
    wanted = Pooled("conv3", "pooled")
    train_ND, test_MD = (kept_rows(model, part.source, [wanted])[wanted].double().numpy() for part in (train, test))
    train_ND, test_MD = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train_ND, test_MD))
    labels_N = train.labels_NC[:, bird].numpy()
    kept_N = labels_N != 0
    assert (~kept_N).sum() == 1
    cost = choose_cost(train_ND[kept_N], labels_N[kept_N] == 1, 31)
    svm = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=1e-6, max_iter=20_000).fit(train_ND[kept_N], labels_N[kept_N])
    expected = average_precision_score(test.labels_NC[:, bird].numpy() == 1, svm.decision_function(test_MD))
    assert measured(results, "AP on conv3")["bird"] == pytest.approx(expected, abs=1e-6)


def test_low_shot_is_deterministic_and_grows_with_the_images(
    tmp_path: Path, devkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbers, "COSTS", COSTS[::6])
    first, again = (run(tmp_path / name, devkit, low_shot=True, draws=2) for name in ("a", "b"))
    assert first == again
    means, deviations = measured(first, "low-shot mAP"), measured(first, "low-shot deviation")
    assert list(means) == list(deviations) == ["k=1", "k=2", "k=4", "k=8", "k=16"]
    assert means["k=16"] > 0.85
    assert deviations["k=1"] > 0
    # All draws of 16 positives are the whole data.
    assert means["k=16"] == pytest.approx(first.best(), abs=0.05)
    notes = "\n".join(first.notes)
    assert "low-shot: no class has positives for k = 32, 64, 96" in notes
    assert "low-shot, k=2: fewer positives, all there are, for cow" in notes
    other = run(tmp_path / "a", devkit, low_shot=True, draws=2, seed=5)
    assert measured(other, "low-shot mAP")["k=1"] != means["k=1"]


def test_without_annotated_test_images_it_is_train_and_val(tmp_path: Path, devkit: Path) -> None:
    data = shutil.copytree(devkit, tmp_path / "data")
    (data / "Annotations" / "test00.xml").unlink()
    results = run(tmp_path, data)
    assert results.settings["split"] == "train"
    assert (results.data["train_images"], results.data["test_images"]) == (26, 12)
    assert "trained on train and tested on val" in results.notes[0]
    with pytest.raises(InputError, match=r"lacks 1 of the 19 images .*test00\.xml"):
        run(tmp_path, data, split="trainval")


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, devkit: Path) -> None:
    data = shutil.copytree(devkit, tmp_path / "data")
    (data / "JPEGImages" / "test03.jpg").write_bytes(b"not an image")
    assert "1 image can't be read and is left out: test03" in "\n".join(run(tmp_path, data).notes)


def test_no_class_that_can_be_scored_is_told(tmp_path: Path) -> None:
    data = write_voc(tmp_path / "data", {"train": {"a": ["cat"], "b": []}, "val": {"c": ["dog"], "d": []}})
    with pytest.raises(InputError, match=r"no class can be scored: .* the 2 images to train on"):
        run(tmp_path, data)


def test_an_unknown_stage_is_told(tmp_path: Path, devkit: Path) -> None:
    with pytest.raises(InputError, match="no stage 'conv9'"):
        run(tmp_path, devkit, stages="conv9")


def test_a_stop_loses_nothing_that_was_done(tmp_path: Path, devkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = VocSvmOptions(stages="conv3")
    interruption = Interruption()
    model = make_model(tmp_path, interruption=interruption)
    whole_fit, fitted = numbers.fit_job, []

    def fit_and_stop(job: Job, rows: Rows) -> numbers.Fitted:
        fitted.append(job.key)
        if len(fitted) == 2:
            interruption.requested = "SIGINT"
        return whole_fit(job, rows)

    monkeypatch.setattr(numbers, "fit_job", fit_and_stop)
    with pytest.raises(Interrupted):
        evaluate(model, devkit, options)
    assert len(fitted) == 2
    results = evaluate(make_model(tmp_path), devkit, options)
    assert len(fitted) == len(set(fitted)) == 4
    assert results == evaluate(make_model(tmp_path / "other"), devkit, options)


@pytest.mark.parametrize(("name", "missing"), [("voc-from-coco", "cow, horse, sheep"), ("voc2012-mini", "car")])
def test_real_devkits(tmp_path: Path, name: str, missing: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("no shared data")
    results = run(tmp_path, SHARED / name, stages="conv5")
    assert 0.08 < results.best() < 0.6
    assert f"no positive or no negative image to train on: {missing}" in "\n".join(results.notes)
    assert results.data["classes"] == 20 - len(missing.split(", "))
