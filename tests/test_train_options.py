"""`train --config`, `--dry-run`, `--log-to` and `loggers=`: what they take, what they write, and that they change no run."""

import importlib.util
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import SMALL, assert_same_run, checkpoint, flags, metrics, train_small

import deepcluster
from deepcluster.cli import main
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.progress import Reporter
from deepcluster.run.config_files import read_settings, with_config
from deepcluster.run.settings import LOGGER_NAMES, Settings
from deepcluster.training import loggers

QUIET = Reporter(quiet=True)


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of everything in a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


# --config


@pytest.fixture(scope="module")
def other(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose recipe has chosen most settings."""
    out = tmp_path_factory.mktemp("other") / "run"
    options: dict[str, Any] = {"arch": "alexnet-small", "image_size": 16, "epochs": 1, "workers": 0, "device": "cpu"}
    return deepcluster.train(images, out=out, clusters=7, reporter=QUIET, **options)


def test_the_settings_of_a_run_make_that_run_again(images: Path, other: Path, tmp_path: Path) -> None:
    again = deepcluster.train(images, out=tmp_path / "again", config=other, reporter=QUIET)
    assert_same_run(again, other)
    assert checkpoint(again)["settings"] == checkpoint(other)["settings"]
    assert json.loads((again / "config.json").read_text())["changed_by_recipe"] == {}


def test_what_the_recipe_chose_stays_and_the_command_line_wins(images: Path, other: Path, tmp_path: Path) -> None:
    some = tmp_path / "some.txt"  # Of 20 images, auto would choose fewer clusters and other batches.
    some.write_text("\n".join(str(path) for path in sorted(images.iterdir())[:20]) + "\n")
    command = ["train", str(some), "--config", str(other / "config.json"), "--out", str(tmp_path / "run")]
    assert main([*command, "--epochs", "2", "--pca", "10", "--quiet"]) == 0
    made, was = (json.loads((run / "config.json").read_text())["settings"] for run in (tmp_path / "run", other))
    assert made == {**was, "epochs": 2, "pca": 10}


VALUES: dict[str, Any] = {
    "epochs": 3,
    "batch-size": 16,
    "sobel": False,
    "crop_scale": [0.2, 1.0],
    "lr": 1,
    "clustering": "pic",
}


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("ending", [".json", ".toml"])
def test_a_file_of_names_and_values(ending: str, within: bool, tmp_path: Path) -> None:
    file = tmp_path / f"mine{ending}"
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in VALUES.items())
    text = json.dumps({"settings": VALUES} if within else VALUES) if ending == ".json" else "[settings]\n" * within + text
    file.write_text(text)
    names = {name.replace("-", "_"): value for name, value in VALUES.items()}
    assert read_settings(file) == {**names, "crop_scale": (0.2, 1.0), "lr": 1.0}
    assert with_config(file, {"epochs": 9, "seed": 1}) == {**read_settings(file), "epochs": 9, "seed": 1}


@given(st.integers(1, 10**6), st.floats(0, 1e3), st.booleans(), st.sampled_from(["kmeans", "balanced"]))
def test_all_settings_survive_json_and_toml(epochs: int, lr: float, sobel: bool, clustering: str) -> None:
    settings = Settings(epochs=epochs, lr=lr, sobel=sobel, clustering=clustering).as_dict()
    plain = {name: value for name, value in settings.items() if value is not None}
    assert tomllib.loads("".join(f"{name} = {json.dumps(value)}\n" for name, value in plain.items())) == plain
    assert Settings.from_dict(json.loads(json.dumps(settings))).as_dict() == settings


WRONG = {
    "an unknown name": ("a.json", '{"epoch": 3}', ["a.json", "'epoch'", "did you mean epochs"]),
    "a wrong type": ("a.toml", 'epochs = "3"', ["a.toml", "--epochs '3'", "int"]),
    "a removed name": ("a.json", '{"balance": true}', ["use --clustering balanced"]),
    "out of range": ("a.json", '{"epochs": 0}', ["epochs 0 is too small"]),
    "no JSON": ("a.json", "{epochs: 3}", ["a.json is damaged"]),
    "no TOML": ("a.toml", "epochs 3", ["a.toml is damaged"]),
    "another ending": ("a.yaml", "epochs: 3", ["a.yaml should be a run folder, or a file .json or .toml"]),
    "a list": ("a.json", "[1]", ["should hold names and values"]),
    "settings that are a list": ("a.json", '{"settings": [1]}', ["settings should be names and values"]),
    "beside settings": ("a.json", '{"settings": {}, "epochs": 3}', ["beside them epochs"]),
    "not there": ("b.json", "", ["b.json can't be read: no such file"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_in_a_sentence(
    name: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, text, words = WRONG[name]
    if text:
        (tmp_path / file).write_text(text)
    assert main(["train", str(images), "--config", str(tmp_path / file), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


def test_a_recipe_beside_all_settings_is_refused(images: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leaves --recipe small-set none to choose"):
        deepcluster.train(images, out=tmp_path / "run", config=other, recipe="small-set")
    with pytest.raises(InputError, match="not a run folder"):
        deepcluster.train(images, out=tmp_path / "run", config=images)


# --dry-run

V2: dict[str, Any] = {"recipe": "v2-small-set", "cluster_stage": "features", "projection": (16, 8), "pca": 8}
V2["clusters"] = (5, 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"clustering": "hierarchical", "super_clusters": 2}, V2, {**V2, "look_again": False, "whiten": False}],
    ids=["kmeans", "hierarchical", "v2", "v2 with a bank"],
)
def test_a_dry_run_says_what_the_run_then_takes(
    options: dict[str, Any],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {**SMALL, **options, "checkpoint_every": 0, "cache": "auto"}
    cached = files(Path(os.environ["DEEPCLUSTER_CACHE"]))
    out = deepcluster.train(images, out="run", dry_run=True, **options)
    said = capsys.readouterr().out
    assert not [*tmp_path.iterdir()] and files(Path(os.environ["DEEPCLUSTER_CACHE"])) == cached
    assert out == Path("run")
    for words in (
        "60 images",
        "network: ",
        "memory of this process: about",
        "disk: about ",
        "2 checkpoints of",
        "per epoch",
        "for 2 epochs",
        "nothing was",
    ):
        assert words in said, said
    deepcluster.train(images, out="run", reporter=QUIET, **options)
    state = checkpoint(tmp_path / "run")
    networks = [state["trunk"], state["head"] if "head" in state else state["projection"]]
    counts = [
        sum(value.numel() for name, value in one.items() if name.endswith(("weight", "bias")) and "sobel" not in name)
        for one in networks
    ]
    assert f"network: {sum(counts):,} parameters: trunk {counts[0]:,}, " in said
    # Kilobytes or megabytes of a checkpoint, beside those of its file.
    number, unit = said.partition("checkpoints of ")[2].replace(",", " ").split()[:2]
    n_bytes = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert n_bytes == pytest.approx((tmp_path / "run" / "checkpoints" / "last.pt").stat().st_size, rel=0.35)


def test_a_dry_run_refuses_what_the_run_would(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", str(images), "--out", str(tmp_path / "run"), "--dry-run"]
    for wrong in (["--clusters", "61"], ["--cluster-stage", "conv9"], ["--pca", "70"], ["--arch", "alexnett"]):
        assert main([*command, *flags(), *wrong]) == 2
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").touch()
    assert main([*command, *flags()]) == 2
    assert "letter.txt" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="leave out torchrun"):
        train_small(images, tmp_path / "other", dry_run=True)


def test_a_dry_run_of_a_resume_counts_the_epochs_that_are_left(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_small(images, tmp_path / "run", epochs=1)
    before = files(run)
    assert main(["train", str(images), "--out", str(run), "--resume", "--dry-run", *flags(epochs=1)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["train", str(images), "--out", str(run), "--resume", "--dry-run", *flags(epochs=3)]) == 0
    assert "for 2 epochs" in capsys.readouterr().out
    assert files(run) == before


# Loggers


class Book:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.pages: list[Any] = []

    def begin(self, run: Path, settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        self.pages.append((run, settings, [*history]))

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        self.pages.append(dict(metrics))

    def end(self, status: str) -> None:
        self.pages.append(status)


def test_an_own_logger_sees_settings_epochs_and_the_end(images: Path, tmp_path: Path, trained: Path) -> None:
    book = Book()
    run = train_small(images, tmp_path / "run", loggers=[book])
    assert_same_run(run, trained)
    (place, settings, history), *lines, status = book.pages
    assert (place, history, status) == (run, [], "finished")
    assert settings == checkpoint(run)["settings"]
    assert lines == metrics(run)
    book = Book()
    train_small(images, run, epochs=3, resume=True, loggers=[book])
    assert book.pages[0][2] == metrics(run)[:2] and book.pages[1:] == [metrics(run)[2], "finished"]


@pytest.mark.parametrize("where", ["begin", "epoch", "end"])
def test_a_logger_that_fails_is_reported_once_and_the_others_continue(
    where: str, images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Book):
        calls = 0

        def __getattribute__(self, name: str) -> Any:
            if name == where:
                Broken.calls += 1
                raise ConnectionError("the server is away")
            return super().__getattribute__(name)

    Broken.calls, broken, book = -1, Broken(), Book()  # The first is the check that it is a function.
    with pytest.raises(InputError, match="has no function"):
        loggers.check_loggers((), [object()])
    group = loggers.LoggerGroup([broken, book], Reporter(quiet=True))
    with group.ended():
        group.begin(tmp_path, {}, [])
        group.epoch({"epoch": 1})
        group.epoch({"epoch": 2})
    said = capsys.readouterr().err
    assert said.count("Broken could not log (ConnectionError: the server is away)") == 1
    assert Broken.calls == 0 and len(book.pages) == 4


def test_a_stopped_and_a_failed_run_are_told_apart() -> None:
    for fault, status in ((Interrupted("x"), "interrupted"), (KeyboardInterrupt(), "interrupted"), (OSError(), "failed")):
        book = Book()
        group = loggers.LoggerGroup([book], QUIET)
        with pytest.raises(type(fault)), group.ended():
            group.begin(Path(), {}, [])
            raise fault
        assert book.pages[1:] == [status]
        with pytest.raises(type(fault)), loggers.LoggerGroup([book], QUIET).ended():
            raise fault  # Before it has begun, it does not end.
        assert len(book.pages) == 2


def test_names_of_loggers(images: Path, tmp_path: Path) -> None:
    assert (*loggers.LOGGERS,) == LOGGER_NAMES
    assert Settings(log_to="wandb, mlflow", tensorboard=True).loggers == (*LOGGER_NAMES[1:], "tensorboard")
    with pytest.raises(InputError, match=r"unknown logger 'wandbb' \(did you mean wandb\?\)"):
        Settings(log_to="wandbb")
    for name in LOGGER_NAMES:
        if importlib.util.find_spec(name) is None:
            with pytest.raises(InputError, match=f"pip install {name}"):
                train_small(images, tmp_path / "run", log_to=name)
    assert not (tmp_path / "run").exists()


def test_weights_and_biases_without_a_network(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train_small(images, tmp_path / "run", log_to="wandb", epochs=1)
    known = (run / "loggers.json").read_text()
    train_small(images, run, resume=True)
    assert (run / "loggers.json").read_text() == known and json.loads(known)["wandb"]
    assert len([*(run / "wandb").glob("offline-run-*/*.wandb")]) == 2
    train_small(images, run, overwrite=True, epochs=1)
    assert not (run / "wandb").exists()


def test_mlflow_has_every_number_of_every_epoch(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    run = train_small(images, tmp_path / "run", epochs=1)
    for epochs in (2, 3):  # Logged from the second epoch on: the first one is told as well.
        train_small(images, run, resume=True, epochs=epochs, log_to="mlflow")
    name = json.loads((run / "loggers.json").read_text())["mlflow"]
    found = mlflow.MlflowClient().get_run(name)
    assert found.info.status == "FINISHED" and found.data.params["clusters"] == "5"
    history = mlflow.MlflowClient().get_metric_history(name, "loss")
    assert [(one.step, one.value) for one in history] == [(line["epoch"], line["loss"]) for line in metrics(run)]
