"""A run that is stopped, killed or out of disk goes on from its last whole state, and ends as if nothing had happened."""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, assert_equal, assert_same_run, checkpoint, flags, metrics, train_small
from spoiled_images import write_spoiled_images

import deepcluster
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.progress import Meter, Reporter
from deepcluster.core.work import Interruption
from deepcluster.run.folder import RunFolder
from deepcluster.run.lock import RunLock
from deepcluster.run.settings import Settings

OPTIONS = {"epochs": 3, "head_norm": True}


class Stopper(Reporter):
    """Sends this process a signal at the n-th sign of progress of a kind of work, or at a line that begins so.

    Counted are those after the line that begins with `after`.
    """

    def __init__(self, what: str, call: int, number: int = signal.SIGINT, *, after: str = "") -> None:
        super().__init__(quiet=True)
        self.what, self.left, self.number, self.after = what, call, number, after

    def met(self, what: str) -> None:
        if self.after:
            if what.startswith(f"say {self.after}"):
                self.after = ""
        elif what.startswith(self.what):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)

    def say(self, line: str) -> None:
        self.met(f"say {line}")
        super().say(line)

    @contextmanager
    def track(self, what: str, total: int | None, unit: str = "images") -> Iterator[Meter]:
        stopper = self

        class Watched(Meter):
            def __call__(self, done: int) -> None:
                stopper.met(what)

        yield Watched()


@pytest.fixture(scope="module")
def mixed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 good images and 3 spoiled ones."""
    folder = tmp_path_factory.mktemp("mixed") / "mixed"
    folder.mkdir()
    for path in images.iterdir():
        os.link(path, folder / path.name)
    write_spoiled_images(folder, 3)
    return folder


@pytest.fixture(scope="module")
def whole(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is never interrupted: 4 batches an epoch, 3 epochs."""
    return train_small(mixed, tmp_path_factory.mktemp("whole") / "run", **OPTIONS)


# What is stopped, at which of its signs of progress, after which line.
STOPS = {
    "reading": ("reading images", 1, ""),
    "first features": ("features", 1, ""),
    "first clustering": ("clustering", 2, ""),
    "first batch": ("epoch 1", 2, ""),
    "middle of an epoch": ("epoch 2", 3, ""),
    "last batch of an epoch": ("epoch 2", 5, ""),
    "between epochs": ("say epoch 1/3", 1, ""),
    "features of the second epoch": ("features", 1, "epoch 1/3"),
    "clustering of the second epoch": ("clustering", 2, "epoch 1/3"),
    "last batch": ("epoch 3", 5, ""),
    "after the last epoch": ("say epoch 3/3", 1, ""),
    "features of the finished trunk": ("features", 1, "epoch 3/3"),
    "clustering of the finished trunk": ("clustering", 2, "epoch 3/3"),
}
# A stop inside steps 1 to 3 repeats them.
BEFORE_THE_FIRST_STATE = {"reading", "first features", "first clustering"}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_run_ends_as_if_it_had_not_been(stop: str, mixed: Path, whole: Path, tmp_path: Path) -> None:
    what, call, after = STOPS[stop]
    kept = "training had not begun" if stop in BEFORE_THE_FIRST_STATE else "the state is saved"
    with pytest.raises(Interrupted, match=f"stopped by SIGINT; {kept}: the same command with --resume continues"):
        train_small(mixed, tmp_path / "run", reporter=Stopper(what, call, after=after), **OPTIONS)
    train_small(mixed, tmp_path / "run", resume=True, **OPTIONS)
    assert_same_run(tmp_path / "run", whole)
    assert all(0 <= line["data_wait_share"] <= 1 for line in metrics(tmp_path / "run"))
    assert ("resuming with" in (tmp_path / "run/train.log").read_text()) == (stop not in BEFORE_THE_FIRST_STATE)
    assert (tmp_path / "run/unreadable.csv").read_bytes() == (whole / "unreadable.csv").read_bytes()
    assert not list((tmp_path / "run").rglob("*.part"))


class Recorder(Reporter):
    """Keeps what was done, in order, and how far each had come."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.done: list[tuple[str, int]] = []

    @contextmanager
    def track(self, what: str, total: int | None, unit: str = "images") -> Iterator[Meter]:
        recorder = self

        class Counted(Meter):
            def __call__(self, done: int) -> None:
                recorder.done.append((what, done))

        yield Counted()


@pytest.mark.parametrize("clustering", ["balanced", "pic"])
@pytest.mark.parametrize("epoch", ["", "epoch 1/2", "epoch 2/2"], ids=["first", "second", "finished"])
def test_a_stop_inside_clustering_repeats_it(epoch: str, clustering: str, mixed: Path, tmp_path: Path) -> None:
    """With the features, from the state before the epoch; it is deterministic."""
    options: dict[str, Any] = {"epochs": 2, "clustering": clustering}
    whole = train_small(mixed, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        train_small(mixed, tmp_path / "run", reporter=Stopper("clustering", 3, after=epoch), **options)
    recorder = Recorder()
    train_small(mixed, tmp_path / "run", resume=True, reporter=recorder, **options)
    steps = [what for what, _ in recorder.done if what in ("features", "clustering") or what.startswith("epoch")]
    assert steps[0] == "features"
    assert_same_run(tmp_path / "run", whole)


def test_a_run_that_is_stopped_again_and_again(mixed: Path, whole: Path, tmp_path: Path) -> None:
    """SIGTERM at every second batch: each start does two batches, whatever the workers and the checkpoints between.

    Of the 12 batches one start does one: the end of an epoch and the start of the next one are signs of progress, too. The
    eighth start finds an epoch that has no batch left.
    """
    starts = 0
    while True:
        reporter = Stopper("epoch ", 3, signal.SIGTERM)
        starts += 1
        try:
            train_small(
                mixed,
                tmp_path / "run",
                resume=True,
                reporter=reporter,
                checkpoint_minutes=0.0,
                **{**OPTIONS, "workers": starts % 3},
            )
            break
        except Interrupted as stop:
            assert "SIGTERM" in str(stop)
    assert starts == 8
    assert_same_run(tmp_path / "run", whole)


def test_dropout_masks_do_not_depend_on_a_stop(mixed: Path, tmp_path: Path) -> None:
    """Of the small trunks none has dropout."""
    options = {"arch": "alexnet", "image_size": 64, "limit": 24, "clusters": 3, "pca": 4, "batch_size": 8, "epochs": 1}
    whole = train_small(mixed, tmp_path / "whole", dropout=0.5, **options)
    with pytest.raises(Interrupted):
        train_small(mixed, tmp_path / "run", dropout=0.5, reporter=Stopper("epoch 1", 3), **options)
    train_small(mixed, tmp_path / "run", resume=True, **options)
    assert_same_run(tmp_path / "run", whole)


def test_signals_are_given_back(mixed: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train_small(mixed, tmp_path / "run", reporter=Stopper("epoch 1", 2), **OPTIONS)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@contextmanager
def default_handlers() -> Iterator[None]:
    """Start processes as from a terminal: these tests may run under nohup, or in the background of a script."""
    before = {name: signal.signal(name, signal.SIG_DFL) for name in (signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


REQUESTS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_of_terminals_and_schedulers_are_heard_once(name: str) -> None:
    """A closed terminal sends SIGHUP more than once; `torchrun` repeats what the terminal has sent."""
    number = signal.Signals[name]
    with default_handlers():
        check_heard_once(name, number)


def check_heard_once(name: str, number: int) -> None:
    before = signal.getsignal(number)
    with Interruption().listening() as interruption:
        for again in (number, number, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(again)
        with pytest.raises(Interrupted, match=f"stopped by {name}; the state is saved"):
            interruption.check()
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepcluster.core.work._SAME_REQUEST_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt), Interruption().listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_that_is_ignored_or_handled_by_the_program_stays_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    number = signal.Signals[name]
    before = signal.getsignal(number)
    try:
        for handler in (signal.SIG_IGN, lambda number, frame: heard.append(number)):
            signal.signal(number, handler)
            with Interruption().listening() as interruption:
                signal.raise_signal(number)
            assert interruption.requested is None
            assert signal.getsignal(number) == handler
        assert heard == [number]
        # Under nohup, too, `torchrun` ends at SIGHUP, sends it on, and kills its processes after 30 seconds.
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        signal.signal(number, signal.SIG_IGN)
        with Interruption().listening() as interruption:
            signal.raise_signal(number)
        assert interruption.requested == ("SIGHUP" if name == "SIGHUP" else None)
        monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT")
        with Interruption().listening() as interruption:
            signal.raise_signal(number)
        assert interruption.requested is None
    finally:
        signal.signal(number, before)


def test_a_finished_run_is_left_as_it_is(mixed: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert train_small(mixed, whole, resume=True, **OPTIONS) == whole
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_resume_begins_a_run_where_there_is_none(mixed: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert_same_run(train_small(mixed, tmp_path / "run", resume=True, **OPTIONS), whole)


@pytest.mark.parametrize("epochs", [1, 2])
def test_more_epochs_are_as_if_they_had_been_asked_for(epochs: int, mixed: Path, whole: Path, tmp_path: Path) -> None:
    train_small(mixed, tmp_path / "run", **{**OPTIONS, "epochs": epochs})
    before = results(tmp_path / "run", epochs)
    train_small(mixed, tmp_path / "run", **OPTIONS, resume=True)
    assert_same_run(tmp_path / "run", whole)
    assert results(tmp_path / "run", epochs) == before


def results(run: Path, epochs: int) -> list[Any]:
    """What a finished run of so many epochs has of each: lines of metrics, tables, and the checkpoint that is kept."""
    kept = [*(run / "assignments" / f"epoch-{epoch:04}.parquet" for epoch in range(1, epochs + 1))]
    kept.append(run / "checkpoints" / "epoch-0001.pt")
    return [*metrics(run)[:epochs], *(path.read_bytes() for path in kept)]


def test_epochs_belong_to_a_falling_rate_until_it_has_ended(mixed: Path, tmp_path: Path) -> None:
    """Then the cosine begins again: as in a run that was begun so, also if the extension is stopped and resumed."""
    run, options = tmp_path / "run", {"lr_schedule": "cosine", "head_norm": True}
    with pytest.raises(Interrupted):
        train_small(mixed, run, epochs=1, reporter=Stopper("epoch 1", 3), **options)
    with pytest.raises(
        InputError, match=r"--epochs is 1 in this run \(its --lr-schedule cosine ends there\).*finish it first"
    ):
        train_small(mixed, run, epochs=3, resume=True, **options)
    said = io.StringIO()
    for _ in range(2):
        train_small(mixed, run, epochs=1, resume=True, reporter=Reporter(stream=said), **options)
    assert f"{run} is finished; --resume with more --epochs than 1 continues it, with a second cosine" in said.getvalue()
    before = results(run, 1)
    for what, call in (("say resuming", 1), ("epoch 2", 3)):  # Before a state of the extension is saved, and after.
        with pytest.raises(Interrupted):
            train_small(mixed, run, epochs=3, resume=True, reporter=Stopper(what, call), **options)
    train_small(mixed, run, epochs=3, resume=True, **options)
    at_once = train_small(mixed, tmp_path / "at-once", epochs=3, lr_restarts=(1,), **options)
    assert_same_run(run, at_once)
    assert results(run, 1) == before
    assert checkpoint(run)["settings"] == checkpoint(at_once)["settings"]
    with pytest.raises(InputError, match="--epochs is 3 in this run"):
        train_small(mixed, run, epochs=2, resume=True, **options)


def test_fewer_epochs_than_begun_are_refused(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train_small(mixed, tmp_path / "run", reporter=Stopper("epoch 2", 3), **OPTIONS)
    with pytest.raises(InputError, match="use --epochs 2 or more"):
        train_small(mixed, tmp_path / "run", epochs=1, resume=True)
    train_small(mixed, tmp_path / "run", epochs=2, resume=True)
    assert len(metrics(tmp_path / "run")) == 2


def test_the_automatic_precision_may_be_asked_for_again(mixed: Path, tmp_path: Path) -> None:
    train_small(mixed, tmp_path / "run", epochs=1, precision="auto")
    chosen = checkpoint(tmp_path / "run")["settings"]["precision"]
    assert chosen in ("fp32", "bf16")
    train_small(mixed, tmp_path / "run", epochs=2, precision="auto", resume=True)
    assert checkpoint(tmp_path / "run")["settings"]["precision"] == chosen


def test_a_line_of_metrics_that_was_cut_off_is_written_again(mixed: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train_small(mixed, tmp_path / "run", reporter=Stopper("epoch 2", 3), **OPTIONS)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "loss": 1.')
    train_small(mixed, tmp_path / "run", resume=True, **OPTIONS)
    assert_same_run(tmp_path / "run", whole)


def test_what_a_kill_leaves_before_the_settings_were_written(mixed: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json.part").write_text('{"settings": {')
    assert_same_run(train_small(mixed, tmp_path / "run", **OPTIONS), whole)
    assert not list((tmp_path / "run").rglob("*.part"))


# Processes


def command(data: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "deepcluster", "train", str(data), "--out", str(out), *flags(**OPTIONS), *more]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_all_processes_ends_with_130_and_a_kept_state(name: str, mixed: Path, tmp_path: Path) -> None:
    """Ctrl-C, a closed terminal, and a warning of Slurm reach the worker processes as well."""
    out, pipe = tmp_path / "run", subprocess.PIPE
    words = command(mixed, out, "--epochs", "10000")
    with default_handlers():
        process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    wait_for((out / "checkpoints/last.pt").is_file, process)
    os.killpg(process.pid, signal.Signals[name])
    said, complaint = process.communicate(timeout=120)
    assert process.returncode == 130
    assert complaint.splitlines()[-1] == (
        f"deepcluster: stopped by {name}; the state is saved: the same command with --resume continues"
    )
    assert "takes its place" not in complaint  # No worker has died.
    assert "Traceback" not in complaint + said
    assert checkpoint(out)["epoch"] >= 2


def test_kill_9_at_random_moments(mixed: Path, whole: Path, tmp_path: Path) -> None:
    """benchmarks/kill.py does this 20 times, from the first moment of the process on."""
    out, draw = tmp_path / "run", random.Random(0)
    log = out / "train.log"

    def log_has(n_bytes: int) -> bool:
        return log.is_file() and log.stat().st_size > n_bytes

    killed = 0
    for _ in range(3):
        words = command(mixed, out, "--resume", "--checkpoint-minutes", "0")
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(partial(log_has, log.stat().st_size if log.exists() else 0), process)
        try:
            process.wait(draw.uniform(0, 0.7))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.communicate()
        if "done: " in log.read_text():
            break
    assert killed
    train_small(mixed, out, resume=True, **OPTIONS)
    assert_same_run(out, whole)
    assert not list(out.rglob("*.part"))


def test_a_folder_that_is_trained_in_refuses_a_second_start_until_its_process_is_gone(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    endless = command(mixed, out, "--epochs", "10000")
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((out / "checkpoints/last.pt").is_file, process)
    config = out / "config.json"
    before = config.read_bytes(), config.stat().st_mtime_ns
    for more in ((), ("--resume",), ("--overwrite",)):
        second = subprocess.run([*endless, *more], capture_output=True, text=True, check=False, timeout=120)
        assert second.returncode == 2
        assert second.stdout == ""
        owner = f"process {process.pid} on {socket.gethostname()}"
        assert second.stderr == (
            f"deepcluster: {out} is being trained by {owner}: wait for it or stop it, or choose another folder with --out\n"
        )
    assert (config.read_bytes(), config.stat().st_mtime_ns) == before
    assert process.poll() is None
    process.kill()
    process.communicate()
    train_small(mixed, out, resume=True, **{**OPTIONS, "epochs": checkpoint(out)["epoch"] + 1})


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_of_two_starts_at_once_one_trains(more: tuple[str, ...], mixed: Path, whole: Path, tmp_path: Path) -> None:
    """The other ends with a plain message, or finds a finished run where it comes late."""
    out = tmp_path / "run"
    words = command(mixed, out, *more)
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.communicate(timeout=200), process.returncode) for process in both]
    refused = [complaint for (_, complaint), code in ends if code]
    assert {code for _, code in ends} <= {0, 2}, ends
    assert len(refused) == 1 or (more and any("is finished" in said for (said, _), _ in ends)), ends
    for complaint in refused:
        assert "is being trained by " in complaint or "holds a run already" in complaint
        assert "Traceback" not in complaint
    assert_same_run(out, whole)


def test_two_threads_of_a_process_do_not_train_in_one_folder(tmp_path: Path) -> None:
    one, other = (RunLock(RunFolder(tmp_path / "run")) for _ in range(2))
    other.acquire(pytest.fail, new=False)
    assert not (tmp_path / "run").exists()
    one.acquire(pytest.fail)
    one.acquire(pytest.fail)
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(InputError, match=f"is being trained by {owner}: wait for it or stop it"):
        other.acquire(pytest.fail)
    other.close()
    one.close()
    other.acquire(pytest.fail)
    other.close()
    assert not list((tmp_path / "run").iterdir())


# Runs of version 0.1.0

V2_SMALL: dict[str, Any] = {
    "method": "deepcluster-v2",
    "recipe": "v2-small-set",
    "look_again": False,
    "whiten": False,
    "clusters": (5, 4),
    "crops": "2x16,1x8",
    "projection": (16, 8),
    "cluster_stage": "features",
}
OLD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kmeans": ({}, {"look_again": None}),
    "balanced": ({"clustering": "balanced"}, {"clustering": "kmeans", "balance": True, "look_again": None}),
    "hierarchical": (
        {"clustering": "hierarchical", "super_clusters": 2, "clusters": 9, "head_momentum": 0.9},
        {"clustering": "kmeans", "look_again": True},
    ),
    "v2": (V2_SMALL, {"look_again": False}),
}


def make_old(run: Path, settings: dict[str, Any]) -> None:
    """Write the run as version 0.1.0 did: settings, layers of a hierarchical head apart, epoch of the bank."""
    config = json.loads((run / "config.json").read_text())
    config["settings"].update({"balance": False, "head_start": "random", **settings})
    (run / "config.json").write_text(json.dumps(config))
    state = checkpoint(run)
    state["settings"] = config["settings"]
    state["parts"] = {}
    if any(name.startswith("layers.") for name in state.get("head", {})):
        names, momenta = list(state["head"]), state["head_optimizer"]["state"]
        own = [name for name in names if name.startswith("layers.")]
        assert momenta.keys() == set(range(len(names)))
        state["parts"] = {
            "head": {name: state["head"].pop(name) for name in own},
            "head_optimizer": {name: momenta.pop(names.index(name)) for name in own},
        }
    if "bank_epoch" in state:
        state["bank_epoch"] = state["epoch"]
    torch.save(state, run / "checkpoints" / "last.pt")


@pytest.mark.parametrize("name", OLD)
def test_a_run_of_version_0_1_0_is_used_and_resumed(name: str, mixed: Path, tmp_path: Path) -> None:
    options, settings = OLD[name]
    whole = train_small(mixed, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        train_small(mixed, tmp_path / "run", reporter=Stopper("epoch 2", 3), **options)
    make_old(tmp_path / "run", settings)
    assert deepcluster.assign(tmp_path / "run", mixed, device="cpu").cluster_N.max() > 0
    train_small(mixed, tmp_path / "run", resume=True, **options)
    assert_same_run(tmp_path / "run", whole)


FULL_DISK = """
import resource, signal, sys
from deepcluster import cli
from deepcluster.core import progress

class Reporter(progress.Reporter):
    def track(self, what, *others):
        if what == "epoch 2":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return super().track(what, *others)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cli.Reporter = Reporter
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on the size of files here")
def test_a_full_disk_loses_nothing(mixed: Path, whole: Path, tmp_path: Path) -> None:
    """In the second epoch no file may grow over 100 kB: as on a full disk, writing a checkpoint fails half-way."""
    out = tmp_path / "run"
    arguments = command(mixed, out)[3:]
    result = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("deepcluster: ")
    assert "last.pt could not be written" in lines[0] and "make room, then use --resume" in lines[0]
    assert checkpoint(out)["epoch"] == 2
    assert not list(out.rglob("*.part"))
    train_small(mixed, out, resume=True, **OPTIONS)
    assert_same_run(out, whole)


def test_a_checkpoint_is_whole_at_every_moment(tmp_path: Path) -> None:
    """A state that can't be written leaves the one before."""
    folder = RunFolder(tmp_path)
    folder.create(overwrite=False)
    settings = Settings().as_dict()
    folder.save_checkpoint({"epoch": 1, "settings": settings, "trunk": {"weight": torch.arange(3.0)}}, keep_as_epoch=1)
    (tmp_path / "checkpoints" / "last.pt.part").write_bytes(b"half of a file that a kill left")
    assert_equal(checkpoint(tmp_path)["trunk"]["weight"], torch.arange(3.0))
    folder.save_checkpoint({"epoch": 2, "settings": settings})
    assert checkpoint(tmp_path)["epoch"] == 2
    assert torch.load(tmp_path / "checkpoints/epoch-0001.pt", weights_only=True)["epoch"] == 1
    assert SMALL["precision"] == "fp32"
