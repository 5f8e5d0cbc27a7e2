"""Fine-tuning on few labels: the schedule, the rates that are chosen and whom they reach, and whole runs that stop."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from models_helper import make_model, write_classes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deepcluster.core.errors import InputError, Interrupted, TrainingError
from deepcluster.core.progress import Meter, Reporter
from deepcluster.core.work import Interruption
from deepcluster.data.sources import open_source
from deepcluster.data.views import TrainingView
from deepcluster.evaluation.datasets.label_choice import choose_labelled
from deepcluster.evaluation.options import SemiSupervisedOptions
from deepcluster.evaluation.semi_supervised import Comparison, evaluate, grid_of, middle_of, rank
from deepcluster.evaluation.trainer import order_of
from deepcluster.evaluation.trials import Rates, Score, TestSet, Trials, batches_of, epochs_of, rate_factor
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.run.model import Model

SMALL: dict[str, Any] = {
    "labels": (0.2, 0.5),
    "trunk_lr": (0.0, 0.02),
    "head_lr_factor": (1.0, 5.0),
    "epochs": 2,
    "min_steps": 0,
    "held_out": 0.3,
}


def options(**changes: Any) -> SemiSupervisedOptions:
    return SemiSupervisedOptions(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes: 20 images of each to learn from, 8 to test on."""
    folder = tmp_path_factory.mktemp("classes")
    write_classes(folder / "train", 20)
    write_classes(folder / "val", 8, seed=1)
    return folder


class TinyTrunk(Trunk):
    """One convolution, BatchNorm and dropout: quick, and with random numbers of its own."""

    arch, dim, stages, embed_stage = "tiny", 8, ("conv1", "features"), "features"

    def __init__(self, seed: int, dropout: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.convolution = nn.Conv2d(3, 8, 4, 4)
        self.rest = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout))

    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        map_BCHW = self.rest(self.convolution(x_BCHW))
        yield "conv1", map_BCHW
        yield "features", map_BCHW.mean(dim=(2, 3), keepdim=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.stage(x_BCHW, "features").flatten(1)

    def convolutions(self) -> nn.Module:
        return self


class TinyModel(Model):
    """A model whose new trunks are tiny, too."""

    def new_trunk(self, seed: int) -> Trunk:
        return TinyTrunk(seed, self.settings.dropout)


def tiny_model(cache: Path, *, seed: int = 3, dropout: float = 0.3, **changes: Any) -> Model:
    # Without workers, reading asks for a stop once per part of the data.
    return TinyModel(**vars(make_model(cache, trunk=TinyTrunk(seed, dropout), dropout=dropout, workers=0, **changes)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(trunk: Trunk) -> dict[str, Tensor]:
    return deepcopy(trunk.state_dict())


# The schedule


def test_rates_fall_as_in_the_published_script() -> None:
    """20 epochs, milestones 12 and 16, factor 0.2."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [12, 16], gamma=0.2)
    for epoch in range(20):
        assert rate_factor(epoch, 20) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("count", [2, 3, 5, 16, 31, 32, 45, 100, 257, 450, 1000])
@pytest.mark.parametrize("batch_size", [2, 7, 256])
def test_batches_are_even_and_none_is_of_one_image(count: int, batch_size: int) -> None:
    size, steps = batches_of(count, batch_size)
    assert 2 <= size <= batch_size
    parts = [len(part) for part in torch.arange(count).split(size)]
    assert steps == sum(part > 1 for part in parts)
    assert count - sum(part for part in parts[:steps]) <= 1
    assert steps >= min(4, count // 16)


def test_few_images_are_passed_more_often() -> None:
    assert batches_of(40, 256) == (20, 2)
    assert epochs_of(40, SemiSupervisedOptions()) == 100
    assert batches_of(12_800, 256) == (256, 50)
    assert epochs_of(12_800, SemiSupervisedOptions()) == 20


# The rates


def test_the_grid_has_each_rate_with_each_multiple() -> None:
    pairs = [(rates.trunk, rates.head) for rates in grid_of(SemiSupervisedOptions())]
    expected = [(0.001 * t, 0.001 * t * f) for t in (1, 10, 100) for f in (1, 10, 100)]
    assert sorted(pairs) == [pytest.approx(pair) for pair in sorted(expected)]
    assert middle_of(SemiSupervisedOptions()) == Rates(0.01, 0.1)
    assert middle_of(options(trunk_lr=(0.1, 0.01), head_lr_factor=(3.0,))) == Rates(0.01, pytest.approx(0.03))


def test_what_diverged_is_last_then_top_1_then_the_loss_decide() -> None:
    best, sure, unsure, wrong = Score(0.9, 1, 2.0), Score(0.8, 1, 0.5), Score(0.8, 1, 0.6), Score(0.0, 0, 9.0)
    diverged = Score(0.0, 0, float("inf"))
    assert sorted([diverged, wrong, unsure, best, sure], key=rank, reverse=True) == [best, sure, unsure, wrong, diverged]


def test_each_rate_reaches_its_weights(tmp_path: Path, data: Path) -> None:
    """A rate of 0 leaves its weights as they were, the other's move; BatchNorm's statistics move with both."""
    model = make_model(tmp_path)
    source = open_source(data / "train")
    labels_N, chosen = torch.from_numpy(source.labels_N), torch.arange(0, 60, 3)
    before = weights(model.trunk)
    with model.loader(source) as loader:
        trials = Trials(model, options(), loader, labels_N, 3, model.resumable("rates"))
        head_before = deepcopy(trials.begin("x", Rates(0, 0), len(chosen), scratch=False).network.head.state_dict())
        for rates in (Rates(0.0, 0.1), Rates(0.01, 0.0), Rates(0.01, 0.1)):
            running = trials.begin("x", rates, len(chosen), scratch=False)
            trials.train(running, rates, chosen)
            trunk, head = running.network.trunk.state_dict(), running.network.head.state_dict()
            learned = [name for name, weight in running.network.trunk.named_parameters() if weight.requires_grad]
            assert learned
            assert all(torch.equal(trunk[name], before[name]) != bool(rates.trunk) for name in learned)
            assert torch.equal(head["linear.weight"], head_before["linear.weight"]) != bool(rates.head)
            statistics = [name for name in trunk if name.endswith("running_mean")]
            assert statistics
            assert not any(torch.equal(trunk[name], before[name]) for name in statistics)
    after = weights(model.trunk)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_steps_are_those_of_sgd(tmp_path: Path, data: Path) -> None:
    """Ten epochs of one step each, with momentum, weight decay and falling rates, against the formula in a loop."""
    model = tiny_model(tmp_path, dropout=0.0)
    source, rates, chosen = open_source(data / "train"), Rates(0.03, 0.2), torch.tensor([0, 5, 21, 25, 41, 45])
    labels_N = torch.from_numpy(source.labels_N)
    settings = options(momentum=0.5, weight_decay=0.01, epochs=10)
    with model.loader(source) as loader:
        trials = Trials(model, settings, loader, labels_N, 3, model.resumable("sgd"))
        running, oracle = (trials.begin("x", rates, len(chosen), scratch=False) for _ in range(2))
        trials.train(running, rates, chosen)
        speeds = {name: torch.zeros_like(weight) for name, weight in oracle.network.named_parameters()}
        oracle.network.train()
        for epoch, fall in enumerate([1.0] * 6 + [0.2] * 2 + [0.04] * 2):
            order = chosen[order_of(6, settings.seed, epoch)]
            views = loader.training_views(TrainingView(16), order, 6, seed=settings.seed, epoch=epoch)
            batch = next(views)
            views.close()
            scores = oracle.network(normalise(batch.images_BCHW))
            oracle.network.zero_grad()
            cross_entropy(scores, labels_N[batch.indices_B]).backward()
            with torch.no_grad():
                for name, weight in oracle.network.named_parameters():
                    rate = rates.head if name.startswith("head") else rates.trunk
                    speeds[name] = settings.momentum * speeds[name] + weight.grad + settings.weight_decay * weight
                    weight -= fall * rate * speeds[name]
    expected = dict(oracle.network.named_parameters())
    for name, weight in running.network.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


# Whole runs


def test_colours_are_learned_and_no_learning_is_never_chosen(tmp_path: Path, data: Path) -> None:
    model = make_model(tmp_path)
    before = weights(model.trunk)
    results = evaluate(
        model, data, options(min_steps=24, scratch=False, labels=(0.5,), trunk_lr=(0.0, 0.02), head_lr_factor=(5.0,))
    )
    assert results.headline == ("top-1", "50%")
    assert results.best() > 0.9
    assert results.results["top-3"] == {"50%": 1.0}
    chosen = results.settings["trained"]["50%"]
    assert chosen["trunk_lr"] == 0.02
    assert (chosen["labelled_images"], chosen["held_images"]) == (30, 9)
    after = weights(model.trunk)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_columns_settings_and_notes(tmp_path: Path, data: Path) -> None:
    results = evaluate(tiny_model(tmp_path), data, options(trunk_lr=(0.01,), head_lr_factor=(2.0,), epochs=1))
    columns = ["20%", "20% from scratch", "50%", "50% from scratch"]
    assert list(results.results["top-1"]) == list(results.results["top-3"]) == columns
    assert all(0 <= value <= 1 for measure in results.results.values() for value in measure.values())
    assert results.headline == ("top-1", "50%")
    assert results.data["labelled_images"] == {"20%": 12, "50%": 30}
    assert results.settings["trained"]["20%"] == {
        "trunk_lr": 0.01,
        "head_lr": 0.02,
        "labelled_images": 12,
        "held_images": 0,
        "batch_size": 12,
        "epochs": 1,
    }
    assert results.settings["image_size"] == 16
    assert [*results.notes] == ["20%: 12 labelled images, 4 of each class.", "50%: 30 labelled images, 10 of each class."]
    json.dumps([results.results, results.settings, results.data])


def test_from_scratch_is_another_network(tmp_path: Path, data: Path) -> None:
    """Of an untrained model whose seed is that of the protocol, the two are the same network, and give the same."""
    short = options(labels=(0.5,), trunk_lr=(0.01,), head_lr_factor=(2.0,), seed=3)
    same = evaluate(tiny_model(tmp_path, seed=3), data, short).results["top-1"]
    assert same["50%"] == same["50% from scratch"]
    losses = []
    for seed in (3, 4):
        model = tiny_model(tmp_path, seed=seed)
        source = open_source(data / "train")
        with model.loader(source) as loader:
            labels_N = torch.from_numpy(source.labels_N)
            trials = Trials(model, short, loader, labels_N, 3, model.resumable("x"))
            test_set = TestSet(loader, torch.arange(60), labels_N)
            for scratch in (False, True):
                score = trials.score(
                    f"{seed} {scratch}", Rates(0.01, 0.02), torch.arange(0, 60, 2), test_set, scratch=scratch
                )
                losses.append(score.loss)
    assert losses[0] == losses[1] == losses[3] != losses[2]


def test_the_rates_are_chosen_on_held_images_alone(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network that is tested on held images was trained on one of them, and no choice sees `val`."""
    calls: list[tuple[str, set[int], TestSet]] = []
    score = Trials.score

    def watched(self: Trials, name: str, rates: Rates, indices_M: Any, test_set: TestSet, *, scratch: bool) -> Score:
        calls.append((name, set(indices_M.tolist()), test_set))
        return score(self, name, rates, indices_M, test_set, scratch=scratch)

    monkeypatch.setattr(Trials, "score", watched)
    evaluate(tiny_model(tmp_path), data, options(labels=(0.5,), epochs=1))
    choices = [call for call in calls if ", choice," in call[0]]
    finals = [call for call in calls if ", final," in call[0]]
    assert (len(choices), len(finals)) == (2 * 3, 2)  # of (0 and 0.02) × (1 and 5) two are (0, 0)
    for _, learned, test_set in choices:
        held = set(test_set.indices_M.tolist())
        assert len(test_set.loader.images) == 30
        assert not learned & held
        assert learned | held == finals[0][1] == set(range(30))
    assert all(len(test_set.loader.images) == 24 for *_, test_set in finals)


def test_a_list_takes_the_place_of_the_shares(tmp_path: Path, data: Path) -> None:
    source = open_source(data / "train")
    chosen = choose_labelled(torch.from_numpy(source.labels_N), 0.5, 31)
    file = tmp_path / "names.txt"
    file.write_text("\n".join(source.name(index) for index in chosen.tolist()))
    short = {"trunk_lr": (0.01,), "head_lr_factor": (2.0,), "scratch": False}
    by_list = evaluate(tiny_model(tmp_path), data, options(label_list=str(file), **short))
    by_share = evaluate(tiny_model(tmp_path), data, options(labels=(0.5,), **short))
    assert by_list.results == by_share.results
    assert by_list.headline == ("top-1", "50%")


def test_a_class_without_labels_is_named(tmp_path: Path, data: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("class0/000.png\nclass2/003.png\nclass0/001.png\n")
    results = evaluate(tiny_model(tmp_path), data, options(label_list=str(file), scratch=False, epochs=1))
    assert "5%: 1 class without any labelled image: class1." in results.notes
    assert "5%: 3 labelled images, 0 to 2 of each class." in results.notes


def test_one_image_a_class_takes_the_middle_of_the_grid(tmp_path: Path, data: Path) -> None:
    results = evaluate(
        tiny_model(tmp_path),
        data,
        options(labels=(0.05,), trunk_lr=(0.1, 0.01, 0.001), head_lr_factor=(1.0, 10.0), scratch=False),
    )
    trained = results.settings["trained"]["5%"]
    assert (trained["labelled_images"], trained["held_images"]) == (3, 0)
    assert (trained["trunk_lr"], trained["head_lr"]) == (0.01, 0.01)
    assert any("with one labelled image per class none can be held out" in note for note in results.notes)


def test_rates_that_diverge_lose(tmp_path: Path, data: Path) -> None:
    results = evaluate(
        tiny_model(tmp_path), data, options(labels=(0.5,), trunk_lr=(1e30, 0.01), head_lr_factor=(1.0,), scratch=False)
    )
    assert results.settings["trained"]["50%"]["trunk_lr"] == 0.01
    with pytest.raises(TrainingError, match=r"did not stay finite with any of the rates 1e\+30 \(trunk\)"):
        evaluate(tiny_model(tmp_path), data, options(labels=(0.5,), trunk_lr=(1e30,), head_lr_factor=(1.0,)))


def test_after_a_divergence_on_all_labels_the_next_best_rates_are_taken(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"choice": {0.1: 0.9, 0.01: 0.7, 0.001: 0.8}, "final": {0.1: None, 0.01: 0.6, 0.001: 0.75}}

    def score(self: Trials, name: str, rates: Rates, *_: Any, **__: Any) -> Score:
        top_1 = scores[name.split(", ")[1]][rates.trunk]
        return Score(0.0, 0.0, float("inf")) if top_1 is None else Score(top_1, 1.0, 1.0)

    monkeypatch.setattr(Trials, "score", score)
    results = evaluate(
        tiny_model(tmp_path), data, options(trunk_lr=(0.1, 0.01, 0.001), head_lr_factor=(1.0,), labels=(0.5,))
    )
    assert results.results["top-1"] == {"50%": 0.75, "50% from scratch": 0.75}
    assert any("50%: with the rates 0.1 (trunk) and 0.1 (head) training on all" in note for note in results.notes)


# A stop


class StopAt(Interruption):
    """Is asked to stop at its n-th question."""

    def __init__(self, call: int) -> None:
        super().__init__(advice="the same command goes on")
        self.left = call

    def check(self, save: Callable[[], None] | None = None) -> None:
        self.left -= 1
        if self.left == 0:
            self.requested = "SIGINT"
        super().check(save)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Score]]:
    """The scores of all trials of each whole run: their losses tell networks apart that get the same images right."""
    scores: list[dict[str, Score]] = []
    run = Comparison.run

    def watched(self: Comparison) -> None:
        run(self)
        scores.append(self.trials.finished)

    monkeypatch.setattr(Comparison, "run", watched)
    return scores


def test_a_stop_at_any_batch_changes_nothing(tmp_path: Path, data: Path, found: list[dict[str, Score]]) -> None:
    """Order, crops, dropout and momentum go on as they were, and what was done is not lost."""
    short = options(trunk_lr=(0.02,), head_lr_factor=(1.0, 5.0), batch_size=9, epochs=3)
    counted = StopAt(-1)
    whole = evaluate(tiny_model(tmp_path / "whole", interruption=counted), data, short)
    total = -1 - counted.left
    assert total > 80
    assert len(found[0]) == 2 * 2 * 3
    assert not list((tmp_path / "whole").rglob("*.pt"))
    for call in (1, 3, 5, 20, total // 2, total // 2 + 1, total - 1, total):
        cache = tmp_path / f"stop{call}"
        with pytest.raises(Interrupted, match="the same command goes on"):
            evaluate(tiny_model(cache, interruption=StopAt(call)), data, short)
        assert evaluate(tiny_model(cache), data, short) == whole
        assert found[-1] == found[0]
        assert not list(cache.rglob("*.pt"))


def test_many_stops_get_to_the_end(tmp_path: Path, data: Path, found: list[dict[str, Score]]) -> None:
    """Six questions after the images are read, each time: what was done is not done again."""
    short = options(labels=(0.5,), trunk_lr=(0.02,), head_lr_factor=(1.0, 5.0), batch_size=9, scratch=False)
    counted, reading = StopAt(-1), 2
    whole = evaluate(tiny_model(tmp_path / "whole", interruption=counted), data, short)
    total, stops, results = -1 - counted.left, 0, None
    while results is None:
        try:
            results = evaluate(tiny_model(tmp_path / "parts", interruption=StopAt(reading + 6)), data, short)
        except Interrupted:
            stops += 1
            assert stops <= total // 5
    assert stops > 1
    assert results == whole
    assert found[-1] == found[0]


def test_a_stop_while_images_are_read_again_keeps_the_state(tmp_path: Path, data: Path) -> None:
    short = options(labels=(0.5,), trunk_lr=(0.02,), head_lr_factor=(1.0, 5.0), batch_size=9, scratch=False)
    with pytest.raises(Interrupted):
        evaluate(tiny_model(tmp_path, interruption=StopAt(12)), data, short)
    (state,) = tmp_path.rglob("*.pt")
    kept = state.read_bytes()
    with pytest.raises(Interrupted):
        evaluate(tiny_model(tmp_path, interruption=StopAt(1)), data, short)
    assert state.read_bytes() == kept


def test_a_stop_of_a_real_network_changes_nothing(tmp_path: Path, data: Path, found: list[dict[str, Score]]) -> None:
    short = options(labels=(0.2,), trunk_lr=(0.02,), head_lr_factor=(1.0, 5.0), scratch=False)
    whole = evaluate(make_model(tmp_path / "whole"), data, short)
    with pytest.raises(Interrupted):
        evaluate(make_model(tmp_path, workers=0, interruption=StopAt(7)), data, short)
    assert list(tmp_path.rglob("*.pt"))
    assert evaluate(make_model(tmp_path), data, short) == whole
    assert found[-1] == found[0]


def test_other_options_do_not_go_on_from_there(tmp_path: Path, data: Path) -> None:
    short = options(labels=(0.5,), trunk_lr=(0.02,), head_lr_factor=(1.0, 5.0), batch_size=9, scratch=False)
    other = options(**{**short.as_dict(), "labels": (0.5,), "trunk_lr": (0.02,), "head_lr_factor": (1.0, 5.0), "seed": 5})
    expected = evaluate(tiny_model(tmp_path / "other"), data, other)
    with pytest.raises(Interrupted):
        evaluate(tiny_model(tmp_path, interruption=StopAt(15)), data, short)
    assert evaluate(tiny_model(tmp_path), data, other) == expected


# Wrong input


def spoil(folder: Path, number: int) -> None:
    for path in sorted(folder.rglob("*.png"))[:number]:
        path.write_bytes(b"no image")


def test_unreadable_images_are_left_out_and_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 20)
    write_classes(tmp_path / "val", 20)
    spoil(tmp_path / "train" / "class1", 1)
    spoil(tmp_path / "val" / "class0", 3)
    short = options(labels=(1.0,), trunk_lr=(0.01,), head_lr_factor=(1.0,), scratch=False, epochs=1)
    results = evaluate(tiny_model(tmp_path / "cache"), tmp_path, short)
    assert results.settings["trained"]["100%"]["labelled_images"] == 59
    assert results.notes[0] == "100%: 59 labelled images, 19 to 20 of each class."
    assert results.notes[1].startswith("labelled: 1 image can't be read and is left out: class1/000.png (")
    assert results.notes[2].startswith("val: 3 images can't be read and are left out: class0/000.png (")
    assert float(results.best() * 57) == pytest.approx(round(results.best() * 57))


@pytest.mark.parametrize("part", ["train", "val"])
def test_many_unreadable_images_end_it_before_the_training(tmp_path: Path, part: str) -> None:
    write_classes(tmp_path / "train", 5)
    write_classes(tmp_path / "val", 5)
    spoil(tmp_path / part, 4)
    with pytest.raises(InputError, match="4 of 15 images can't be read"):
        evaluate(tiny_model(tmp_path / "cache"), tmp_path, options(labels=(1.0,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": (5.0,)}, "labels=5 is not a share of the labels"),
        ({"labels": ()}, "labels is empty"),
        ({"trunk_lr": ()}, "trunk_lr is empty"),
        ({"head_lr_factor": ()}, "head_lr_factor is empty"),
        ({"label_list": "absent.txt"}, "absent.txt can't be read"),
    ],
)
def test_wrong_options_are_told(tmp_path: Path, data: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(tiny_model(tmp_path), data, options(**changes))
    assert not list(tmp_path.rglob("*.pt"))


def test_a_single_class_is_told(tmp_path: Path, data: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("class0/000.png\nclass0/001.png\n")
    with pytest.raises(InputError, match=r"3.3% of the labels: 2 images of a single class can't be learned from"):
        evaluate(tiny_model(tmp_path), data, options(label_list=str(file)))


class Counted(Reporter):
    """Keeps the total of the training that it is told of, and what is done of it."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.total, self.done = 0, 0

    @contextmanager
    def track(self, what: str, total: int | None, unit: str = "images") -> Iterator[Meter]:
        counted = self

        class Counter(Meter):
            def __call__(self, done: int) -> None:
                counted.done += done

        if what == "fine-tuning":
            self.total, self.done = total or 0, 0
            yield Counter()
        else:
            yield Meter()


@pytest.mark.parametrize("stop", [5, 27, 40, 41, 42])
def test_progress_counts_what_is_left(tmp_path: Path, data: Path, stop: int) -> None:
    """The total is what is done in the end: of a run in one go, and of the rest of one that was stopped."""
    short = options(labels=(0.5,), trunk_lr=(0.02,), head_lr_factor=(1.0, 5.0), batch_size=9)
    whole = Counted()
    evaluate(tiny_model(tmp_path / "whole", reporter=whole), data, short)
    assert whole.done == whole.total == 2 * 2 * (2 * 3 + 4)
    first, rest = Counted(), Counted()
    with pytest.raises(Interrupted):
        evaluate(tiny_model(tmp_path / "parts", reporter=first, interruption=StopAt(stop)), data, short)
    evaluate(tiny_model(tmp_path / "parts", reporter=rest), data, short)
    assert first.total == whole.total
    assert rest.total == rest.done == whole.total - first.done


def test_progress_of_what_diverges(tmp_path: Path, data: Path) -> None:
    short = options(labels=(0.5,), trunk_lr=(1e30, 0.01), head_lr_factor=(1.0,), epochs=5)
    counted = Counted()
    evaluate(tiny_model(tmp_path, reporter=counted), data, short)
    assert counted.done == counted.total
