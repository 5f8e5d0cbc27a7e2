"""Runs of which files are gone or damaged: a resume says so; what is written is loaded again at once."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import SMALL, assert_same_run, checkpoint, train_small

import deepcluster
from deepcluster.core.errors import InputError, TrainingError
from deepcluster.core.files import load_tensors
from deepcluster.core.progress import Reporter
from deepcluster.run.folder import RunFolder


class Warned(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, line: str) -> None:
        self.warnings.append(line)


def gone(*names: str) -> Callable[[Path], None]:
    def remove(run: Path) -> None:
        for name in names:
            for path in run.glob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "last.pt": (
        gone("checkpoints/last.pt"),
        r"last.pt is gone, but results of 2 epochs are there.*epoch-0001.pt can be",
    ),
    "checkpoints": (
        gone("checkpoints"),
        "last.pt is gone, but results of 2 epochs are there: restore it, start again",
    ),
    "checkpoints and metrics": (gone("checkpoints", "metrics.jsonl"), "results of 3 epochs are there"),
    "tables, metrics and last.pt": (
        gone("checkpoints/last.pt", "metrics.jsonl", "assignments"),
        "results of 1 epoch are there: ",
    ),
    "config.json": (gone("config.json"), "holds a run .checkpoints, assignments, metrics.jsonl. whose config.json is gone"),
    "all but metrics": (gone("config.json", "checkpoints", "assignments"), "holds a run .metrics.jsonl. whose config.json"),
}
WARNED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "metrics": (gone("metrics.jsonl"), ["metrics.jsonl lacks 2 finished epochs"]),
    "a line of the metrics": (
        lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1, "lo' + (run / "metrics.jsonl").read_text()),
        ["metrics.jsonl lacks 1 finished epoch"],
    ),
    "tables": (gone("assignments"), ["assignments/ lacks 2 finished epochs"]),
    "a table and the log": (gone("assignments/epoch-0002.parquet", "train.log"), ["assignments/ lacks 1 finished epoch"]),
    "nothing": (lambda run: None, []),
}  # type: ignore[assignment]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("what", REFUSED)
def test_a_resume_does_not_begin_again_over_what_is_there(what: str, run: Path, images: Path) -> None:
    spoil, message = REFUSED[what]
    spoil(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        train_small(images, run, resume=True, epochs=3)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("what", WARNED)
def test_a_resume_says_which_results_are_gone(what: str, run: Path, images: Path) -> None:
    spoil, lost = WARNED[what]
    spoil(run)
    reporter = Warned()
    train_small(images, run, resume=True, epochs=3, reporter=reporter)
    said = [line.split(": ")[-1].partition(";")[0] for line in reporter.warnings if "lacks" in line]
    assert said == lost
    assert checkpoint(run)["epoch"] == 4


def test_the_results_of_an_epoch_without_its_checkpoint_are_made_again(run: Path, images: Path, trained: Path) -> None:
    """As a kill leaves them, between the two."""
    gone("checkpoints/*", "assignments/epoch-0002.parquet", "assignments/epoch-0003.parquet")(run)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    assert_same_run(train_small(images, run, resume=True), trained)


def test_what_is_written_is_loaded_again_at_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(state: dict[str, Any], *rest: Any, **more: Any) -> None:
        save({**state, "settings": {**state["settings"], "lr": Path("0.1")}}, *rest, **more)

    save = torch.save
    monkeypatch.setattr(torch, "save", spoiled)
    with pytest.raises(TrainingError, match=r"last.pt can't be loaded again .*lr=<pathlib.*please report it"):
        train_small(images, tmp_path / "run", epochs=1000)


@pytest.mark.parametrize("number", [np.float64, np.float32, np.longdouble, np.float16])
def test_a_run_that_kept_numbers_of_numpy_is_opened(number: Any, run: Path, images: Path) -> None:
    """As it was written while options were not made plain."""
    state = checkpoint(run)
    settings = {**state["settings"], "lr": number(state["settings"]["lr"]), "arch": np.str_("alexnet-small")}
    settings |= {
        "crop_scale": [number(one) for one in settings["crop_scale"]],
        "clusters": np.int64(5),
        "flip": np.bool_(True),
    }
    torch.save({**state, "settings": settings}, run / "checkpoints/last.pt")
    model = deepcluster.load(run)
    assert (model.settings.arch, model.settings.clusters) == ("alexnet-small", 5)
    assert type(model.settings.lr) is float
    if number is np.float64:
        train_small(images, run, resume=True, epochs=3)


@pytest.mark.parametrize("value", [np.datetime64("2020-01-01"), np.array([print], object), np.dtype("f4")])
def test_other_things_of_numpy_are_inert(value: Any, tmp_path: Path) -> None:
    torch.save({"a": value, "b": np.zeros(3), "c": np.complex64(1)}, tmp_path / "a.pt")
    found = load_tensors(tmp_path / "a.pt")
    assert not isinstance(found["a"], np.ndarray | np.generic)
    assert (found["b"].tolist(), found["c"]) == ([0.0, 0.0, 0.0], 1)


def test_what_the_system_refuses_is_said_of_the_run_folder_only_where_that_is_true(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault, message in (
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "could not write into .*run: .*No space left"),
        (
            PermissionError(errno.EACCES, "denied", str(tmp_path / "run/metrics.jsonl")),
            "could not write into .*run: .*denied",
        ),
        (
            OSError(errno.EIO, "Input/output error", "/mnt/photos/a.jpg"),
            "^.Errno 5. Input/output error: '/mnt/photos/a.jpg'",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "^.Errno 24. Too many open files. Nothing was saved yet"),
    ):

        def refuse(*_: object, fault: OSError = fault) -> None:
            raise fault

        monkeypatch.setattr(RunFolder, "append_metrics", refuse)
        with pytest.raises(TrainingError, match=message):
            train_small(images, tmp_path / "run", overwrite=True, **{**SMALL, "epochs": 1})


def test_metrics_are_the_lines_that_can_be_read(tmp_path: Path) -> None:
    good = [json.dumps({"epoch": epoch}) for epoch in (1, 3)]
    (tmp_path / "metrics.jsonl").write_bytes(
        "\n".join([good[0], '{"epoch": 2', "[]", "{}", good[1], "\udcff"]).encode("utf-8", "surrogateescape")
    )
    assert RunFolder(tmp_path).read_metrics() == [{"epoch": 1}, {"epoch": 3}]
