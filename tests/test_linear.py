"""The linear probe: its steps against plain PyTorch, whole runs on small images, stops, and --fast against scikit-learn."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_helper import make_model, write_classes
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms.v2 import functional as torchvision

from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.progress import Meter, Reporter
from deepcluster.evaluation import logistic
from deepcluster.evaluation.datasets.labelled import open_train_val
from deepcluster.evaluation.linear import LinearHeads, evaluate, learning_rate, score_heads, train_heads, train_step
from deepcluster.evaluation.logistic import fit_logistic, probe_accuracy, right_among
from deepcluster.evaluation.options import LinearOptions
from deepcluster.evaluation.results import Results
from deepcluster.evaluation.trainer import Training
from deepcluster.models.trunk import normalise
from deepcluster.run.features import Pooled
from deepcluster.run.model import Model

QUICK = LinearOptions(epochs=3, batch_size=8, lr=0.05)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that are easy to tell apart: 30 images to learn, 15 to test."""
    folder = tmp_path_factory.mktemp("linear") / "colours"
    write_classes(folder / "train", 10)
    write_classes(folder / "val", 5, seed=1)
    return folder


# The steps


def test_the_rate_of_every_step() -> None:
    """0.01 / sqrt(1 + 0.01 · 0.0001 · t): after 90 epochs of ImageNet in batches of 256 it is 0.00830."""
    assert learning_rate(0.01, 1e-4, 0) == 0.01
    assert learning_rate(0.01, 1e-4, 450_450) == pytest.approx(0.01 / 1.45045**0.5)
    assert learning_rate(0.5, 2.0, 8) == pytest.approx(0.5 / 3)
    assert learning_rate(0.3, 0.0, 10**6) == 0.3


def some_rows(widths: dict[Pooled, int], seed: int) -> tuple[dict[Pooled, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = {one: torch.randn(8, width, generator=generator) for one, width in widths.items()}
    return rows, torch.randint(3, (8,), generator=generator)


def new_training(widths: dict[Pooled, int], seed: int = 31) -> Training[LinearHeads]:
    heads = LinearHeads(widths, 3, seed=seed)
    return Training(heads, torch.optim.SGD(heads.parameters(), 0.3, 0.9, weight_decay=0.7), steps=6)


def test_classifiers_side_by_side_are_those_of_plain_pytorch_one_by_one() -> None:
    widths = {Pooled("conv1"): 5, Pooled("conv2"): 9, Pooled("conv3"): 2}
    training = new_training(widths)
    layers = dict(zip(widths, training.network.layers, strict=True))
    plain = {one: nn.Linear(width, 3) for one, width in widths.items()}
    for one, head in plain.items():
        head.load_state_dict(layers[one].state_dict())
    sgd = {one: torch.optim.SGD(head.parameters(), 0.3, 0.9, weight_decay=0.7) for one, head in plain.items()}
    for step in range(6):
        rows, labels_B = some_rows(widths, step)
        values = train_step(training, rows, labels_B)
        for one, head in plain.items():
            scores_BC = head(rows[one])
            loss = cross_entropy(scores_BC, labels_B)
            sgd[one].zero_grad()
            loss.backward()
            sgd[one].step()
            assert values[one.stage].item() == pytest.approx(loss.item(), rel=1e-6)
            right = int((scores_BC.argmax(1) == labels_B).sum())
            assert values[f"top-1 {one.stage}"].item() == pytest.approx(right / 8)
    for one, head in plain.items():
        torch.testing.assert_close(layers[one].weight, head.weight, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(layers[one].bias, head.bias, rtol=1e-6, atol=1e-7)


def test_a_stage_learns_the_same_bits_alone_as_with_others() -> None:
    widths = {Pooled("conv1"): 50, Pooled("conv2"): 700, Pooled("conv3"): 20}
    alone_of = {one: new_training({one: width}) for one, width in widths.items()}
    together = new_training(widths)
    for step in range(5):
        rows, labels_B = some_rows(widths, step)
        train_step(together, rows, labels_B)
        for one, alone in alone_of.items():
            train_step(alone, {one: rows[one]}, labels_B)
    for layer, alone in zip(together.network.layers, alone_of.values(), strict=True):
        torch.testing.assert_close(alone.network.layers[0].weight, layer.weight, rtol=0, atol=0)


def test_the_first_weights_are_a_function_of_the_seed_as_wide_as_those_of_pytorch() -> None:
    weights = [LinearHeads({Pooled("conv1"): 400}, 30, seed=seed).layers[0].weight.detach() for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    assert weights[0].std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.03)


# Whole runs


@pytest.mark.parametrize("head", ["pooled", "avgpool"])
def test_classes_that_are_separable_are_told_apart(colours: Path, tmp_path: Path, head: str) -> None:
    results = evaluate(make_model(tmp_path), colours, replace(QUICK, head=head, epochs=8))
    stages = ["conv1", "conv2", "conv3", "conv4", "conv5", "features"]
    assert results.results["top-1"] == dict.fromkeys(stages, 1.0)
    assert results.results["top-3"] == dict.fromkeys(stages, 1.0)
    assert results.best() == 1.0
    assert results.data == {"train_images": 30, "val_images": 15, "classes": 3}
    assert results.settings["stages"] == stages
    # Maps of 8, 4 and 2 pixels a side at 16 px: all of them fit into 9,600 numbers.
    sides = {"pooled": (8, 4, 2, 2, 2, 1), "avgpool": (1,) * 6}[head]
    channels = (96, 256, 384, 384, 256, 256)
    want = [width * side**2 for width, side in zip(channels, sides, strict=True)]
    assert list(results.settings["numbers"].values()) == want
    assert not (tmp_path / "unfinished").exists() or not list((tmp_path / "unfinished").iterdir())


@pytest.mark.parametrize("fast", [False, True])
def test_labels_that_mean_nothing_give_chance(tmp_path: Path, fast: bool) -> None:
    rng = np.random.default_rng(7)
    for part, count in (("train", 24), ("val", 80)):
        for image in range(3 * count):
            file = tmp_path / part / f"class{image % 3}" / f"{image}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    options = replace(QUICK, stages="conv1,features", fast=fast)
    results = evaluate(make_model(tmp_path / "cache"), tmp_path, options)
    # Of 240 images a third, and three deviations of sqrt(1/3 · 2/3 / 240) = 0.03.
    for share in results.results["top-1"].values():  # type: ignore[union-attr]
        assert abs(share - 1 / 3) < 0.1


def test_one_pass_over_all_stages_gives_what_a_pass_for_each_gives(colours: Path, tmp_path: Path) -> None:
    options = replace(QUICK, epochs=1, lr=0.002)
    together = evaluate(make_model(tmp_path), colours, options).results["top-1"]
    for stage in ("conv1", "conv3", "features"):
        alone = evaluate(make_model(tmp_path), colours, replace(options, stages=stage)).results["top-1"]
        assert alone == {stage: together[stage]}  # type: ignore[index]


def weights_after(model: Model, data: Path, options: LinearOptions) -> tuple[Training[LinearHeads], Tensor]:
    wanted = [Pooled("conv2", "pooled"), Pooled("features", "pooled")]
    training, _ = train_heads(model, open_train_val(data).train, options, wanted)
    return training, torch.cat([layer.weight.flatten() for layer in training.network.layers])


def test_the_seed_and_nothing_else_decides(colours: Path, tmp_path: Path) -> None:
    first = weights_after(make_model(tmp_path), colours, QUICK)[1]
    torch.rand(5)
    assert torch.equal(first, weights_after(make_model(tmp_path, workers=0), colours, QUICK)[1])
    assert not torch.equal(first, weights_after(make_model(tmp_path), colours, replace(QUICK, seed=1))[1])


def test_the_trunk_stays_as_it_is(colours: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    evaluate(model, colours, replace(QUICK, epochs=1))
    for name, value in model.trunk.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("ten_crops", [False, True])
def test_the_test_is_torchvisions_crops_image_by_image(colours: Path, tmp_path: Path, ten_crops: bool) -> None:
    """Images of 20 px: resized to 18, of which the centre, or ten crops, of 16 are seen."""
    model, parts = make_model(tmp_path), open_train_val(colours)
    options = replace(QUICK, epochs=1, lr=0.001, ten_crops=ten_crops)
    training, _ = weights_after(model, colours, options)
    shares, bad = score_heads(model, training, parts.val, options, [1, 2], model.resumable("test"))
    assert bad == {}
    for one, head in zip(training.network.wanted, training.network.layers, strict=True):
        ranks = []
        for index, label in enumerate(parts.val.labels_N.tolist()):
            with Image.open(str(parts.val.source.path(index))) as image:
                whole = torchvision.resize(torchvision.pil_to_tensor(image), [18], antialias=True)
            crops = torchvision.ten_crop(whole, [16, 16]) if ten_crops else [torchvision.center_crop(whole, [16, 16])]
            with torch.no_grad():
                maps = model.trunk.stage(normalise(torch.stack(list(crops))), one.stage)
                probabilities_C = head(maps.flatten(1)).double().softmax(1).mean(0)
            ranks.append(int((probabilities_C > probabilities_C[label]).sum()))
        assert shares[one] == [np.mean([rank < most for rank in ranks]) for most in (1, 2)]
    assert shares[Pooled("conv2", "pooled")][0] < 1  # the shares can tell the two tests from others


def test_ten_crops_average_the_probabilities() -> None:
    widths = {Pooled("conv1"): 4}
    heads = LinearHeads(widths, 3, seed=31)
    rows, _ = some_rows(widths, 0)
    got = heads.probabilities(rows, 4)[Pooled("conv1")]
    each = heads.layers[0](rows[Pooled("conv1")]).softmax(1)
    torch.testing.assert_close(got, torch.stack([each[:4].mean(0), each[4:].mean(0)]))


def test_a_line_an_epoch_tells_the_best_stage(colours: Path, tmp_path: Path) -> None:
    stream = StringIO()
    evaluate(make_model(tmp_path, reporter=Reporter(stream=stream)), colours, QUICK)
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    assert lines[2].startswith("epoch   3/3")
    assert "loss" in lines[2]
    assert "train top-1 100.0%" in lines[2]


# Stops


class StoppedAfter(Reporter):
    """Asks for a stop at the `count`-th batch that is learned or tested."""

    def __init__(self, count: int) -> None:
        super().__init__(stream=StringIO())
        self.left = count
        self.model: Model | None = None

    @contextmanager
    def track(self, what: str, total: int | None, unit: str = "images") -> Iterator[Meter]:
        yield _Stop(self) if what in ("training", "testing") else Meter()


class _Stop(Meter):
    def __init__(self, reporter: StoppedAfter) -> None:
        self.reporter = reporter

    def __call__(self, done: int) -> None:
        self.reporter.left -= done > 0
        if self.reporter.left == 0 and self.reporter.model is not None:
            self.reporter.model.work.interruption.requested = "SIGINT"
            self.reporter.left = -1


def stopped(cache: Path, data: Path, options: LinearOptions, count: int) -> tuple[Results, str]:
    """The results of an evaluation that was stopped once and went on, and what it said."""
    reporter = StoppedAfter(count)
    model = reporter.model = make_model(cache, reporter=reporter)
    with pytest.raises(Interrupted):
        evaluate(model, data, options)
    assert len(list((cache / "unfinished").iterdir())) == 1
    model = make_model(cache, reporter=reporter)
    results = evaluate(model, data, options)
    assert list((cache / "unfinished").iterdir()) == []
    return results, reporter.stream.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `colours`, in noise that leaves some doubt; one image of 42 and one of 15 can't be read."""
    folder = tmp_path_factory.mktemp("linear") / "spoiled"
    write_classes(folder / "train", 14)
    write_classes(folder / "val", 5, seed=1)
    (folder / "train" / "class1" / "003.png").write_bytes(b"no image")
    (folder / "val" / "class2" / "004.png").write_bytes(b"no image")
    return folder


UNSURE = replace(QUICK, lr=0.002, stages="conv1,conv5")


@pytest.fixture(scope="module")
def never_stopped(spoiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return evaluate(make_model(tmp_path_factory.mktemp("whole")), spoiled, UNSURE)


# Batches of 8: 6 an epoch, the last one of two; 3 epochs; then two batches of tests.
@pytest.mark.parametrize("count", [1, 5, 6, 7, 16, 18, 19, 20])
def test_a_stop_at_any_batch_changes_nothing(spoiled: Path, tmp_path: Path, never_stopped: Results, count: int) -> None:
    got, said = stopped(tmp_path, spoiled, UNSURE, count)
    assert got == never_stopped
    assert f"resuming after step {min(count, 18)}/18" in said


def test_a_stop_leaves_the_very_weights(spoiled: Path, tmp_path: Path) -> None:
    want = weights_after(make_model(tmp_path / "whole"), spoiled, QUICK)[1]
    reporter = StoppedAfter(9)
    model = reporter.model = make_model(tmp_path / "stopped", reporter=reporter)
    with pytest.raises(Interrupted):
        weights_after(model, spoiled, QUICK)
    assert torch.equal(weights_after(make_model(tmp_path / "stopped"), spoiled, QUICK)[1], want)


def test_other_options_do_not_go_on_from_this_state(spoiled: Path, tmp_path: Path) -> None:
    reporter = StoppedAfter(3)
    model = reporter.model = make_model(tmp_path, reporter=reporter)
    with pytest.raises(Interrupted):
        evaluate(model, spoiled, QUICK)
    for other in (replace(QUICK, lr=0.1), replace(QUICK, stages="conv1"), replace(QUICK, head="avgpool")):
        stream = StringIO()
        evaluate(make_model(tmp_path, reporter=Reporter(stream=stream)), spoiled, replace(other, epochs=1))
        assert "resuming" not in stream.getvalue()


# Wrong input


@pytest.mark.parametrize("fast", [False, True])
def test_an_image_that_cannot_be_read_is_left_out_and_named(spoiled: Path, tmp_path: Path, fast: bool) -> None:
    results = evaluate(make_model(tmp_path), spoiled, replace(QUICK, stages="conv1", fast=fast, epochs=8))
    assert len(results.notes) == 2
    assert "train: 1 image can't be read and is left out: " in results.notes[0]
    assert "class1/003.png" in results.notes[0]
    assert "class2/004.png" in results.notes[1]
    assert results.best() == 1.0  # of the 14 that can be read


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("fast", [False, True])
def test_too_many_images_that_cannot_be_read_end_it(tmp_path: Path, part: str, fast: bool) -> None:
    write_classes(tmp_path / "train", 6)
    write_classes(tmp_path / "val", 6)
    for number in range(2):
        (tmp_path / part / "class1" / f"00{number}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="2 of 18 images can't be read"):
        evaluate(make_model(tmp_path / "cache"), tmp_path, replace(QUICK, fast=fast))


def test_what_a_person_can_get_wrong_is_told(colours: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    with pytest.raises(InputError, match=r"no stage 'conv9' \(did you mean conv5\?\)|no stage 'conv9'"):
        evaluate(model, colours, replace(QUICK, stages="conv1,conv9"))
    with pytest.raises(InputError, match="has no train folder"):
        evaluate(model, colours / "train", QUICK)
    with pytest.raises(InputError, match=r"the loss of conv1 is not finite at step 4/12: use a lower --lr than 1e\+30"):
        evaluate(model, colours, replace(QUICK, lr=1e30))
    with pytest.raises(InputError, match="unknown head 'average'"):
        LinearOptions(head="average")
    assert not (tmp_path / "unfinished").exists()


def test_a_stage_that_is_named_twice_is_one(colours: Path, tmp_path: Path) -> None:
    results = evaluate(make_model(tmp_path), colours, replace(QUICK, stages="conv2,conv1,conv2", epochs=1))
    assert results.settings["stages"] == ["conv2", "conv1"]


# --fast


def test_the_second_fast_evaluation_looks_at_no_image(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(QUICK, fast=True)
    first = evaluate(make_model(tmp_path), colours, options)
    assert first.results["top-1"] == dict.fromkeys(first.settings["stages"], 1.0)
    monkeypatch.setattr(Model, "loader", None)
    assert evaluate(make_model(tmp_path), colours, options) == first


def test_a_stop_is_heard_while_fitting(colours: Path, tmp_path: Path) -> None:
    evaluate(make_model(tmp_path), colours, replace(QUICK, fast=True))
    model = make_model(tmp_path)
    model.work.interruption.requested = "SIGTERM"
    with pytest.raises(Interrupted):
        evaluate(model, colours, replace(QUICK, fast=True))


def overlapping(n: int, dim: int = 12, n_classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes that overlap; features of very different size, one without any change."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(n_classes, size=n)
    centres = np.random.default_rng(99).normal(size=(n_classes, dim))
    rows_ND = (centres[labels_N] + 1.5 * rng.normal(size=(n, dim))) * np.geomspace(0.5, 20, dim) + 3
    rows_ND[:, 4] = 7
    return torch.from_numpy(rows_ND).float(), torch.from_numpy(labels_N)


def of_like_size(rows_ND: Tensor) -> NDArray[np.float64]:
    rows = rows_ND.double().numpy()
    floor = 0.1 * np.sqrt(rows.var(0).mean())
    return (rows - rows.mean(0)) / np.maximum(rows.std(0), floor)


def loss_of(scores: NDArray[np.float64], labels_N: Tensor) -> float:
    highest = scores.max(1)
    log_sums = highest + np.log(np.exp(scores - highest[:, None]).sum(1))
    return float((log_sums - scores[np.arange(len(scores)), labels_N.numpy()]).mean())


@pytest.mark.parametrize("l2", [1.0, 0.01, 1e-4])
def test_the_optimum_is_that_of_scikit_learn(l2: float) -> None:
    rows_ND, labels_N = overlapping(400)
    fitted = fit_logistic(rows_ND, labels_N, 4, seed=0, l2=l2, tolerance=1e-6, max_iterations=1000)
    scaled = of_like_size(rows_ND)
    oracle = LogisticRegression(C=1 / (l2 * 400), tol=1e-8, max_iter=10_000).fit(scaled, labels_N.numpy())
    want = oracle.decision_function(scaled)
    least = loss_of(want, labels_N) + l2 / 2 * float((oracle.coef_**2).sum())
    assert fitted.loss == pytest.approx(least, abs=2e-6)
    got = fitted.scores(rows_ND).double().numpy()
    assert loss_of(got, labels_N) == pytest.approx(loss_of(want, labels_N), abs=1e-4)
    np.testing.assert_allclose(torch.from_numpy(got).softmax(1).numpy(), oracle.predict_proba(scaled), atol=3e-3)
    usual = fit_logistic(rows_ND, labels_N, 4, seed=0, l2=l2)
    assert usual.loss == pytest.approx(least, rel=1e-3)


def test_mapped_halves_in_small_blocks_give_what_memory_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_ND, labels_N = overlapping(300)
    file = tmp_path / "rows.npy"
    np.save(file, rows_ND.half().numpy())
    mapped_ND = torch.from_numpy(np.load(file, mmap_mode="c"))
    want = fit_logistic(rows_ND.half().float(), labels_N, 4, seed=0, l2=0.1)
    got = fit_logistic(mapped_ND, labels_N, 4, seed=0, l2=0.1)
    assert torch.equal(got.weight_CD, want.weight_CD)
    monkeypatch.setattr(logistic, "BLOCK_BYTES", 7 * 4 * rows_ND.shape[1])
    small = fit_logistic(mapped_ND, labels_N, 4, seed=0, l2=0.1)
    torch.testing.assert_close(small.weight_CD, want.weight_CD, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(logistic, "_room", lambda device: 0)
    read_each_time = fit_logistic(mapped_ND, labels_N, 4, seed=0, l2=0.1)
    assert torch.equal(read_each_time.weight_CD, small.weight_CD)


@pytest.mark.parametrize("l2", [None, 0.1])
def test_rows_without_a_label_are_as_if_they_were_not_there(l2: float | None) -> None:
    rows_ND, labels_N = overlapping(200)
    is_there_N = torch.arange(200) % 3 > 0
    want = fit_logistic(rows_ND[is_there_N], labels_N[is_there_N], 4, seed=5, l2=l2)
    holes_ND = torch.where(is_there_N[:, None], rows_ND, torch.nan)
    holes_N = torch.where(is_there_N, labels_N, -1)
    got = fit_logistic(holes_ND, holes_N, 4, seed=5, l2=l2)
    assert torch.equal(got.weight_CD, want.weight_CD)
    assert got.accuracy(holes_ND, holes_N) == want.accuracy(rows_ND[is_there_N], labels_N[is_there_N])


def test_a_feature_that_hardly_ever_changes_stays_small() -> None:
    """One that fires once in 400 rows, a little: over its own deviation it would be 20 there, and more elsewhere."""
    rows_ND, labels_N = overlapping(400)
    rows_ND[:, 4] = 0
    rows_ND[17, 4] = 0.01
    fitted = fit_logistic(rows_ND, labels_N, 4, seed=0, l2=1e-3)
    assert fitted.weight_CD[:, 4].abs().max() < 0.01
    constant = fit_logistic(torch.full((30, 2), 5.0), torch.arange(30) % 3, 3, seed=0)
    assert constant.weight_CD.abs().max() < 1e-6
    torch.testing.assert_close(constant.bias_C.softmax(0), torch.full((3,), 1 / 3), rtol=0, atol=1e-3)


def test_noise_asks_for_a_strong_penalty_and_clear_classes_for_a_weak_one() -> None:
    rows_ND, labels_N = overlapping(400)
    noise_N = torch.from_numpy(np.random.default_rng(3).integers(4, size=400))
    strong = fit_logistic(rows_ND, noise_N, 4, seed=0).l2
    weak = fit_logistic(rows_ND, labels_N, 4, seed=0).l2
    assert {strong, weak} <= set(logistic.STRENGTHS)
    assert strong >= 1
    assert weak <= 0.01
    assert fit_logistic(rows_ND[:10], labels_N[:10], 4, seed=0).l2 == logistic.USUAL_STRENGTH


def test_the_chosen_strength_has_the_least_loss_on_rows_that_were_not_learned() -> None:
    rows_ND, labels_N = overlapping(240, seed=2)
    order = np.random.default_rng([6, 20]).permutation(240)
    scaled, labels = of_like_size(rows_ND), labels_N.numpy()
    held, learned = order[:48], order[48:]
    losses = {}
    for l2 in logistic.STRENGTHS:
        oracle = LogisticRegression(C=1 / (l2 * 192), tol=1e-6, max_iter=10_000).fit(scaled[learned], labels[learned])
        losses[l2] = loss_of(oracle.decision_function(scaled[held]), labels_N[held])
    assert fit_logistic(rows_ND, labels_N, 4, seed=6).l2 == min(losses, key=losses.__getitem__)


def test_ranks_by_hand() -> None:
    scores_BC = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    assert right_among(scores_BC, torch.tensor([2, 0, 0]), (1, 2, 3)).tolist() == [1, 2, 3]


# The probe in the midst of training


def test_the_probe_tests_rows_that_it_did_not_learn() -> None:
    """With more features than rows any labels can be learned by heart; of others it knows nothing."""
    rng = np.random.default_rng(0)
    features_ND = torch.from_numpy(rng.normal(size=(400, 600))).float()
    labels_N = torch.from_numpy(rng.integers(4, size=400))
    assert probe_accuracy(features_ND, labels_N, 0) < 0.45
    clear_ND = features_ND + torch.nn.functional.one_hot(labels_N, 4).repeat_interleave(150, 1)
    assert probe_accuracy(clear_ND, labels_N, 0) == 1.0


def test_the_probe_draws_from_no_generator_but_its_own() -> None:
    features_ND, labels_N = overlapping(300)
    before: tuple[Any, ...] = torch.get_rng_state(), np.random.get_state()[1]
    first = probe_accuracy(features_ND, labels_N, 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # type: ignore[arg-type]
    torch.rand(3)
    assert probe_accuracy(features_ND, labels_N, 1) == first
    assert len({probe_accuracy(features_ND, labels_N, seed) for seed in range(6)}) > 1


def test_the_probe_leaves_out_what_has_no_label_or_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    features_ND, labels_N = overlapping(300)
    clear_ND = torch.nn.functional.one_hot(labels_N, 4).float()
    spoiled_ND, spoiled_N = clear_ND.clone(), labels_N.clone()
    spoiled_ND[:100] = torch.nan
    spoiled_N[200:] = -1
    assert probe_accuracy(spoiled_ND, spoiled_N, 0) == 1.0
    assert np.isnan(probe_accuracy(spoiled_ND[:100], spoiled_N[:100], 0))
    monkeypatch.setattr(logistic, "MOST_PROBED", 50)
    assert round(probe_accuracy(features_ND, labels_N, 0) * 10) == pytest.approx(
        probe_accuracy(features_ND, labels_N, 0) * 10
    )  # of ten rows
