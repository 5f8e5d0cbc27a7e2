"""The command line: what a person sees, and one plain sentence for wrong input, with nothing written or lost."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import SMALL, assert_same_run, flags, train_small
from spoiled_images import write_good_images, write_spoiled_images

from deepcluster.cli import main
from deepcluster.core.errors import Interrupted
from deepcluster.core.work import RESUME
from deepcluster.run.settings import Settings


def run(*arguments: str | Path) -> int:
    """Exit status of the command line."""
    return main([str(argument) for argument in arguments])


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def copy_of(run: Path, name: str) -> Path:
    """The files of a run that a resume needs, in the working folder."""
    (Path(name) / "checkpoints").mkdir(parents=True)
    for file in ("config.json", "metrics.jsonl", "checkpoints/last.pt"):
        shutil.copy(run / file, Path(name) / file)
    return Path(name)


def change_checkpoint(run: Path, **changes: object) -> Path:
    path = run / "checkpoints" / "last.pt"
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


class Trap:
    """Unpickling this makes a file: whoever does so runs code of a stranger."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return Path.touch, (Path("trap-was-run"),)


def trap(path: Path, *, as_torch: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if as_torch:
        torch.save({"format": "deepcluster-1", "trunk": Trap()}, path)
    else:
        path.write_bytes(pickle.dumps(Trap()))
    return path


def folder_of(name: str, *files: str) -> str:
    Path(name).mkdir()
    for file in files:
        (Path(name) / file).write_text("hello\n")
    return name


def list_of_missing() -> str:
    Path("list.txt").write_text("".join(f"gone/{number}.jpg\n" for number in range(7)))
    return "list.txt"


def array(name: str, value: object) -> str:
    np.save(name, value, allow_pickle=True)
    return name


def mostly_spoiled() -> str:
    write_good_images(Path("mostly"), 20)
    write_spoiled_images(Path("mostly"), 5)
    return "mostly"


Arguments = list[str | Path]
# What is typed, given a folder of 60 good images and a finished run on it, and what the answer says.
BAD_INPUT: dict[str, tuple[Callable[[Path, Path], Arguments], tuple[str, ...]]] = {
    # DATA
    "missing data": (lambda i, r: ["train", "nothing-here"], ("nothing-here does not exist",)),
    "no data": (lambda i, r: ["train"], ("DATA",)),
    "empty folder": (lambda i, r: ["train", folder_of("empty")], ("empty holds no images", "it is empty")),
    "no images": (
        lambda i, r: ["train", folder_of("notes", "a.doc", "b.doc", "c.xyz")],
        ("notes holds no images", ".jpg", "found only .doc 2, .xyz 1"),
    ),
    "list of missing": (lambda i, r: ["train", list_of_missing()], ("7", "gone/0.jpg", "gone/2.jpg")),
    "mostly spoiled": (lambda i, r: ["train", mostly_spoiled()], ("5 of 25 images can't be read, more than 10%",)),
    "a single image": (lambda i, r: ["train", next(i.iterdir())], ("1 readable image is too few",)),
    "array of floats": (lambda i, r: ["train", array("a.npy", np.zeros((9, 8, 8)))], ("float64", "uint8")),
    "array of rows": (lambda i, r: ["train", array("a.npy", np.zeros((9, 64), np.uint8))], ("9 x 64", "uint8")),
    "array of objects": (lambda i, r: ["train", array("a.npy", np.array([Trap()]))], ("Python objects",)),
    # settings
    "one cluster": (lambda i, r: ["train", i, "--clusters", "1"], ("--clusters 1 is too small; use 2 or more",)),
    "more clusters than images": (
        lambda i, r: ["train", i, "--clusters", "61"],
        ("--clusters 61 is more than the 60 images", "--clusters 60"),
    ),
    "wide pca": (lambda i, r: ["train", i, *flags(pca=60)], ("--pca 60 is too wide", "--pca 59")),
    "small image size": (
        lambda i, r: ["train", i, "--arch", "alexnet", "--image-size", "32", "--clusters", "5"],
        ("--image-size 32 is too small for alexnet", "use 63 or more"),
    ),
    "tiny image size": (lambda i, r: ["train", i, "--image-size", "4"], ("--image-size 4 is too small",)),
    "memory that is no size": (lambda i, r: ["train", i, "--memory", "lots"], ("--memory 'lots' is not", "such as 8G")),
    "too little memory": (
        lambda i, r: ["train", i, *flags(memory="1M")],
        ("--memory 1 MB is too small: the points of 60 images", "use --memory "),
    ),
    "unknown arch": (lambda i, r: ["train", i, "--arch", "alexnett"], ("'alexnett' (did you mean alexnet?)",)),
    "unknown recipe": (lambda i, r: ["train", i, "--recipe", "small-image"], ("(did you mean small-images?)",)),
    "unknown stage": (lambda i, r: ["train", i, *flags(cluster_stage="conv6")], ("no stage 'conv6'", "conv5")),
    "unknown sampling": (lambda i, r: ["train", i, "--sampling", "as-publish"], ("did you mean as-published?",)),
    "unknown precision": (lambda i, r: ["train", i, "--precision", "bf32"], ("use one of auto, fp32, bf16",)),
    "unknown device": (lambda i, r: ["train", i, "--device", "gpu"], ("unknown device 'gpu'", "cuda")),
    "unknown option": (lambda i, r: ["train", i, "--epoch", "3"], ("--epoch", "Did you mean", "--epochs")),
    "unknown command": (lambda i, r: ["trian", i], ("'trian'", "Did you mean 'train'")),
    "not a number": (lambda i, r: ["train", i, "--clusters", "ten"], ("'--clusters'", "'ten'")),
    "not a fraction": (lambda i, r: ["train", i, "--lr", "nan"], ("--lr nan",)),
    "negative decay": (lambda i, r: ["train", i, "--wd", "-5"], ("--weight-decay -5.0 is too small",)),
    "half a crop": (lambda i, r: ["train", i, "--crop-scale", "0.5"], ("'0.5' should be two numbers",)),
    "negative workers": (lambda i, r: ["train", i, "--workers", "-1"], ("--workers -1",)),
    "no images left": (lambda i, r: ["train", i, "--limit", "0"], ("--limit 0",)),
    # the run folder
    "run is a file": (lambda i, r: ["train", i, "--out", array("a.npy", [1])], ("a.npy is a file",)),
    "run below a file": (lambda i, r: ["train", i, "--out", array("a.npy", [1]) + "/run"], ("a.npy is a file",)),
    "another run": (lambda i, r: ["train", i, "--out", r], ("holds a run already", "--resume", "--overwrite")),
    "other files": (lambda i, r: ["train", i, "--out", folder_of("mine", "thesis.tex")], ("thesis.tex",)),
    "resume among other files": (
        lambda i, r: ["train", i, "--resume", "--out", folder_of("mine", "thesis.tex")],
        ("mine holds other files (thesis.tex)",),
    ),
    "overwrite other files": (
        lambda i, r: ["train", i, "--overwrite", "--out", folder_of("mine", "thesis.tex")],
        ("mine holds other files (thesis.tex)",),
    ),
    "resume and overwrite": (lambda i, r: ["train", i, "--out", r, "--resume", "--overwrite"], ("use one of them",)),
    "changed settings": (
        lambda i, r: ["train", i, "--out", r, "--resume", *flags(clusters=6, lr=0.3, epochs=3)],
        ("--clusters is 5 in this run, not 6", "--lr is 0.01 in this run, not 0.3"),
    ),
    "fewer epochs": (lambda i, r: ["train", i, "--out", r, "--resume", "--epochs", "1"], ("--epochs 1 is fewer",)),
    "other images": (
        lambda i, r: ["train", write_some("others", 59), "--out", r, "--resume"],
        ("the images are not those of this run: it has 60, here are 59",),
    ),
    "resume a truncated checkpoint": (
        lambda i, r: ["train", i, "--resume", "--out", cut(copy_of(r, "run") / "checkpoints/last.pt").parents[1]],
        ("last.pt can't be read: truncated, damaged",),
    ),
    "resume another trunk": (
        lambda i, r: ["train", i, "--resume", "--out", another_trunk(r).parents[1]],
        ("last.pt is the checkpoint of another run: --arch is alexnet-small in this run, not resnet18-small",),
    ),
    "resume other weights": (
        lambda i, r: ["train", i, "--resume", "--out", change_checkpoint(copy_of(r, "run"), trunk={}).parents[1]],
        ("last.pt does not hold the state of this run",),
    ),
    "resume a trap": (
        lambda i, r: ["train", i, "--resume", "--out", trapped_copy(r)],
        ("it is refused",),
    ),
    "damaged config": (
        lambda i, r: ["train", i, "--resume", "--out", cut(copy_of(r, "run") / "config.json").parent],
        ("config.json is damaged",),
    ),
    # MODEL
    "no model": (lambda i, r: ["embed", "nothing-here", i, "--out", "e.npy"], ("nothing-here does not exist",)),
    "no run": (lambda i, r: ["embed", i, i, "--out", "e.npy"], ("is not a run folder",)),
    "truncated checkpoint": (
        lambda i, r: ["embed", cut(copy_of(r, "run") / "checkpoints/last.pt"), i, "--out", "e.npy"],
        ("last.pt can't be read: truncated, damaged",),
    ),
    "checkpoint of another trunk": (
        lambda i, r: ["embed", another_trunk(r), i, "--out", "e.npy"],
        ("last.pt does not hold the weights of resnet18-small",),
    ),
    "trap": (lambda i, r: ["embed", trap(Path("m.pt"), as_torch=True), i, "--out", "e.npy"], ("it is refused",)),
    "bare trap": (lambda i, r: ["embed", trap(Path("m.pt"), as_torch=False), i, "--out", "e.npy"], ("it is refused",)),
    "text as a model": (lambda i, r: ["info", Path(folder_of("d", "m.pt")) / "m.pt"], ("not a checkpoint: it is text",)),
    "tensor as a model": (lambda i, r: ["info", saved(torch.zeros(3))], ("holds no weights of a network",)),
    "unknown untrained": (
        lambda i, r: ["embed", "untrained:alexnet-smal", i, "--out", "e.npy"],
        ("unknown architecture (did you mean alexnet-small?)",),
    ),
    # embed, assign, info
    "embed an unknown stage": (
        lambda i, r: ["embed", r, i, "--stage", "conv55", "--out", "e.npy"],
        ("no stage 'conv55' (did you mean conv5?)",),
    ),
    "embed to an unknown ending": (lambda i, r: ["embed", r, i, "--out", "e.txt"], (".parquet or .csv or .jsonl or .npy",)),
    "embed to nowhere": (lambda i, r: ["embed", r, i, "--out", "no/e.npy"], ("does not exist",)),
    "embed to a folder": (lambda i, r: ["embed", r, i, "--out", folder_of("e.npy")], ("e.npy is a folder",)),
    "embed without out": (lambda i, r: ["embed", r, i], ("--out",)),
    "embed an empty folder": (lambda i, r: ["embed", r, folder_of("empty"), "--out", "e.npy"], ("empty holds no images",)),
    "assign with nothing to write": (lambda i, r: ["assign", r, i], ("nothing to write", "--folders")),
    "assign to an unknown ending": (lambda i, r: ["assign", r, i, "--out", "e.npy"], ("should end in .parquet",)),
    "assign without clusters": (lambda i, r: ["assign", f"untrained:{r}", i, "--out", "e.parquet"], ("no clusters",)),
    "assign to a full folder": (lambda i, r: ["assign", r, i, "--folders", folder_of("full", "x")], ("not an empty",)),
    "assign below a file": (
        lambda i, r: ["assign", r, i, "--folders", array("a.npy", [1]) + "/groups"],
        ("a.npy is a file",),
    ),
    "folders of an array": (
        lambda i, r: ["assign", r, array("a.npy", np.zeros((9, 8, 8), np.uint8)), "--folders", "groups"],
        ("these images are none: --copy writes files",),
    ),
    "negative workers of embed": (lambda i, r: ["embed", r, i, "--out", "e.npy", "--workers", "-1"], ("--workers",)),
    "info of nothing": (lambda i, r: ["info", "nothing-here"], ("nothing-here does not exist",)),
}  # fmt: skip


def write_some(name: str, count: int) -> str:
    write_good_images(Path(name), count)
    return name


def another_trunk(run: Path) -> Path:
    settings = {**torch.load(run / "checkpoints/last.pt", weights_only=True)["settings"], "arch": "resnet18-small"}
    return change_checkpoint(copy_of(run, "run"), settings=settings)


def trapped_copy(run: Path) -> Path:
    return trap(copy_of(run, "run") / "checkpoints/last.pt", as_torch=True).parents[1]


def saved(value: object) -> str:
    torch.save(value, "m.pt")
    return "m.pt"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(
    case: str,
    images: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make, fragments = BAD_INPUT[case]
    arguments = make(images, trained)
    before = listing(tmp_path), listing(trained), listing(images)
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("deepcluster: ")
    for fragment in fragments:
        assert fragment in lines[0]
    assert (listing(tmp_path), listing(trained), listing(images)) == before
    assert not Path("trap-was-run").exists()


def test_the_trap_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would see code that is run."""
    monkeypatch.chdir(tmp_path)
    torch.load(trap(Path("m.pt"), as_torch=True), weights_only=False)
    assert Path("trap-was-run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", images, "--out", tmp_path / "run", "--device", "cuda") == 2
    assert "--device cuda: this machine has no such device; use --device cpu" in capsys.readouterr().err
    assert not listing(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_closed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert run("train", images, "--out", tmp_path / "run") == 2
    assert "can't be written to" in capsys.readouterr().err


def test_the_same_run_as_in_python(images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", images, "--out", tmp_path / "run", *flags()) == 0
    assert_same_run(tmp_path / "run", trained)
    said = capsys.readouterr()
    assert not said.err
    lines = said.out.splitlines()
    assert lines[0].startswith("60 images in 1 folder")
    assert any(re.match(r"epoch 2/2  loss \d\.\d{3}  nmi\(prev\) 0\.\d{3}  clusters 5/5  largest ", line) for line in lines)
    assert lines[-2].startswith("done: ")
    report, assign = (
        f"deepcluster {command}" for command in (f"report {tmp_path / 'run'}", f"assign {tmp_path / 'run'} {images}")
    )
    assert lines[-1] == f"see them: {report}; as folders of links: {assign} --folders by-cluster"


def test_old_names_of_options(images: Path, tmp_path: Path) -> None:
    arguments = flags()
    for new, old in (("--clusters", "--k"), ("--weight-decay", "--wd"), ("--batch-size", "--batch")):
        arguments = [old if word == new else word for word in arguments]
    assert "--k" in arguments and "--batch" in arguments
    assert run("train", images, "--exp", tmp_path / "run", *arguments, "--wd", "0.25", "--reassign", "2", "--quiet") == 0
    settings = Settings.from_dict(torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["settings"])
    assert (settings.clusters, settings.weight_decay, settings.batch_size) == (5, 0.25, SMALL["batch_size"])
    assert settings.reassign_every == 2
    # The other old name of --clusters.
    assert run("train", images, "--exp", tmp_path / "run", "--resume", "--nmb-cluster", "5", "--quiet") == 0


def test_quiet_says_nothing(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("train", images, "--out", out, *flags(epochs=1), "--quiet") == 0
    assert run("embed", out, images, "--out", tmp_path / "e.npy", "-q") == 0
    assert run("assign", out, images, "--out", tmp_path / "c.parquet", "--quiet") == 0
    said = capsys.readouterr()
    assert not said.out
    assert not said.err


def test_embed_and_assign_say_what_was_written(
    images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("embed", trained, images, "--out", tmp_path / "e.parquet") == 0
    written, advice = capsys.readouterr().out.splitlines()[-2:]
    assert re.search(r"e\.parquet: 60 rows of \d+ numbers$", written)
    assert advice == f"see it as a page: deepcluster report {tmp_path / 'e.parquet'} --data {images}"
    assert run("assign", trained, images, "--out", tmp_path / "c.parquet") == 0
    written, advice = capsys.readouterr().out.splitlines()[-2:]
    assert written == f"60 images in 5 clusters: {tmp_path / 'c.parquet'}"
    assert advice == f"see it as a page: deepcluster report {tmp_path / 'c.parquet'} --data {images}"


def test_overwrite_deletes_the_run_and_nothing_else(images: Path, trained: Path, tmp_path: Path) -> None:
    out = train_small(images, tmp_path / "run", clusters=7, epochs=3)
    (out / "my-notes.txt").write_text("keep me")
    assert run("train", images, "--out", out, "--overwrite", *flags(), "--quiet") == 0
    assert_same_run(out, trained)
    assert (out / "my-notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("command", ["train", "embed", "assign", "info", "doctor", "demo"])
def test_every_command_has_help_quiet_and_verbose(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    for word in ("--quiet", "--verbose", "--help"):
        assert word in text


def test_no_command_gives_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert capsys.readouterr().err.startswith("Usage: deepcluster")


def test_verbose_shows_where_an_error_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", tmp_path / "nothing", "--verbose") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("deepcluster: ")


@pytest.mark.parametrize("method", ["deepcluster", "deepcluster-v2"])
def test_there_are_at_most_seven_frames_from_the_command_to_backward(
    method: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[list[str]] = []
    backward = torch.Tensor.backward

    def noted(loss: torch.Tensor) -> None:
        stack = [frame for frame in traceback.extract_stack() if "/deepcluster/" in frame.filename]
        stacks.append([f"{Path(frame.filename).stem}.{frame.name}" for frame in stack])
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", noted)
    words = ["--method", method, "--epochs", "1", "--clusters", "4", "--workers", "0", "--quiet"]
    assert run("train", images, "--out", tmp_path / "run", *words) == 0
    assert stacks and max(map(len, stacks)) <= 7, stacks[0]


def test_ctrl_c_while_a_stop_is_passed_on_still_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        try:
            raise Interrupted(f"stopped by SIGINT; {RESUME}")
        finally:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("deepcluster.api.train", stopped)
    assert main(["train", "photos"]) == 130
    assert capsys.readouterr().err.strip() == f"deepcluster: stopped by SIGINT; {RESUME}"


@pytest.mark.slow
def test_a_stopped_demo_does_not_promise_an_option_that_it_lacks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deepcluster", "demo", "--out", str(tmp_path / "demo")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    told = next(line for line in process.stdout if "epoch  1/" in line)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait() == 130, told + rest
    assert rest.splitlines()[-1] == "deepcluster: the demo was stopped; the same command starts it from the beginning"
