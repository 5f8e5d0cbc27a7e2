"""main.py of 2018: its flags, files and lines, shown by argparse, pickle, torch and torchvision's ImageFolder."""

import csv
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from spoiled_images import write_spoiled_images
from torch import nn
from torchvision.datasets import ImageFolder

from deepcluster.cli import cli
from deepcluster.core.device import Machine
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Loader
from deepcluster.data.sources import open_source
from deepcluster.interop.loading import load
from deepcluster.interop.release2018.__main__ import SCRIPTS
from deepcluster.interop.release2018.__main__ import main as release2018
from deepcluster.interop.release2018.common import weight_decay_of
from deepcluster.interop.release2018.main import parser, training_settings
from deepcluster.interop.release2018.main_lines import Lines
from deepcluster.interop.release2018.main_run import Start
from deepcluster.interop.release2018.shims import shims as shim_files
from deepcluster.interop.release2018_files import (
    release_checkpoint,
)
from deepcluster.models.archs import make_trunk
from deepcluster.run.auto import settings_before_data
from deepcluster.run.settings import Settings
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.loop import Loop

PAGE = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")
N_IMAGES = 20
# Flags of the release, with what they take, and their defaults.
FLAGS: dict[tuple[str, ...], tuple[str, Any]] = {
    ("--arch", "-a"): ("ARCH", "alexnet"),
    ("--sobel",): ("", False),
    ("--clustering",): ("{Kmeans,PIC}", "Kmeans"),
    ("--nmb_cluster", "--k"): ("NMB_CLUSTER", 10000),
    ("--lr",): ("LR", 0.05),
    ("--wd",): ("WD", -5),
    ("--reassign",): ("REASSIGN", 1.0),
    ("--workers",): ("WORKERS", 4),
    ("--epochs",): ("EPOCHS", 200),
    ("--start_epoch",): ("START_EPOCH", 0),
    ("--batch",): ("BATCH", 256),
    ("--momentum",): ("MOMENTUM", 0.9),
    ("--resume",): ("PATH", ""),
    ("--checkpoints",): ("CHECKPOINTS", 25000),
    ("--seed",): ("SEED", 31),
    ("--exp",): ("EXP", ""),
    ("--verbose",): ("", False),
}
CONVOLUTIONS, NORMS, LINEAR = (0, 4, 8, 11, 14), (1, 5, 9, 12, 15), (1, 4)
# The script of someone who changed the paths of the 2018 release's main.sh, and shortened it.
OLD_SCRIPT = """#!/bin/bash
DIR="{data}"
ARCH="alexnet"
LR=0.05
WD=-5
K=4
WORKERS=2
EXP="{exp}"
PYTHON="{python}"

mkdir -p ${{EXP}}

CUDA_VISIBLE_DEVICES=0 ${{PYTHON}} main.py ${{DIR}} --exp ${{EXP}} --arch ${{ARCH}} \\
  --lr ${{LR}} --wd ${{WD}} --k ${{K}} --sobel --verbose --workers ${{WORKERS}} \\
  --epochs 2 --batch 10 --check 3
"""


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((60, 50)).save(path)


def write_classes(root: Path) -> Path:
    """Write three classes whose names sort otherwise than their paths, nested folders, and what is no image of a class."""
    files = ("0.jpg", "1.JPG", "10.png", "2.bmp")
    names = [f"{folder}/{file}" for folder in ("cat", "cat-big", "cat 2") for file in files]
    names += [f"cat/{folder}/{number}.jpeg" for folder in ("sub", "sub-a") for number in range(2)]
    names += ["cat/sub/deeper/0.webp", "cat/sub.jpg", "cat/.hidden.jpg", "cat-big/sub/0.png"]
    assert len(names) == N_IMAGES
    for seed, name in enumerate([*names, "outside.jpg"]):
        write_image(root / name, seed)
    (root / "empty").mkdir()
    (root / "cat" / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("photos") / "train")


@pytest.fixture(scope="module")
def shims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shims") / "deepcluster"
    assert release2018(["shims", str(folder)]) == 0
    return folder


def run_main(*words: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A process of main.py; its images are those of `words`."""
    command = [sys.executable, "-m", "deepcluster.interop.release2018", "main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=check, cwd=cwd)


@pytest.fixture(scope="module")
def old_run(photos: Path, shims: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """What an old main.sh left in EXP, and what it printed: two epochs of two steps."""
    exp = tmp_path_factory.mktemp("exp") / "of 2018".replace(" ", "-")
    script = shims / "old_main.sh"
    script.write_text(OLD_SCRIPT.format(data=photos, exp=exp, python=sys.executable))
    done = subprocess.run(["bash", script.name], capture_output=True, text=True, cwd=shims, check=False)
    assert done.returncode == 0, done.stderr
    yield exp, done.stdout
    shutil.rmtree(exp)  # Two gigabytes.


def log_of(exp: Path) -> list[list[list[int]]]:
    with (exp / "clusters").open("rb") as file:
        epochs: list[list[list[int]]] = pickle.load(file)
    return epochs


def checkpoint_of(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    return state


# Flags


def test_flags_and_defaults_are_those_of_2018(capsys: pytest.CaptureFixture[str]) -> None:
    known = {tuple(one.option_strings): one for one in parser()._actions if one.dest not in ("help", "data")}
    assert {flags: known[flags].default for flags in known} == {flags: default for flags, (_, default) in FLAGS.items()}
    with pytest.raises(SystemExit) as ending:
        release2018(["main.py", "--help"])
    assert ending.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    usage, _, rest = text.partition("positional arguments:")
    assert usage.startswith("usage: main.py [-h] [--arch ARCH] [--sobel] [--clustering {Kmeans,PIC}]")
    assert "[--verbose] DIR" in usage
    for flags, (takes, default) in FLAGS.items():
        assert f"[{flags[0]}{' ' * bool(takes)}{takes}]" in usage
        assert re.search(rf"{flags[0]}( {re.escape(takes)})?(, {flags[-1]})?", rest)
        if takes and default != "":
            assert f"(default: {default:g})" in rest if not isinstance(default, str) else f"(default: {default})" in rest


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--nmb 100", "nmb_cluster", 100),
        ("--k=7", "nmb_cluster", 7),
        ("--check 500", "checkpoints", 500),
        ("-a vgg16", "arch", "vgg16"),
        ("--ar=vgg16", "arch", "vgg16"),
        ("--wd -7", "wd", -7.0),
        ("--clu PIC", "clustering", "PIC"),
        ("--start 3", "start_epoch", 3),
        ("--rea 0.5", "reassign", 0.5),
        ("--resu a/b.pth.tar", "resume", "a/b.pth.tar"),
        ("--verb", "verbose", True),
    ],
)
def test_abbreviations(words: str, name: str, value: object) -> None:
    assert getattr(parser().parse_args(["DIR", *words.split()]), name) == value


@pytest.mark.parametrize(
    "words", [[], ["DIR", "--re", "1"], ["DIR", "--arch", "resnet"], ["DIR", "--clustering", "kmeans"], ["DIR", "--k", "x"]]
)
def test_what_2018_did_not_take(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        release2018(["main", *words])
    assert ending.value.code == 2
    assert "usage: main.py" in capsys.readouterr().err


def test_every_setting_is_that_of_2018() -> None:
    """But for the components of the PCA, which may be more than there are images."""
    fixed = training_settings(parser().parse_args(["DIR"]))
    settings = Settings.from_dict(fixed)
    assert set(Settings().as_dict()) - set(fixed) == {"pca"}
    assert (settings.sobel, settings.sampling, settings.head_momentum) == (False, "as-published", 0.0)
    assert (settings.weight_decay, settings.lr_schedule, settings.dropout) == (1e-5, "constant", 0.5)
    assert (settings.image_size, settings.kmeans_iterations, settings.epoch_length) == (224, 20, 1.0)
    assert (settings.head_norm, settings.head_lr, settings.precision, settings.jitter) == (False, None, "fp32", 0.0)
    words = "DIR -a vgg16 --sobel --clustering PIC --k 1 --wd -3 --reassign 2 --workers 0 --seed 5 --momentum 0.5"
    other = Settings.from_dict(training_settings(parser().parse_args(words.split())))
    assert (other.arch, other.sobel, other.clustering, other.seed) == ("vgg16", True, "pic", 5)
    assert (other.weight_decay, other.epoch_length, other.workers, other.momentum) == (1e-3, 2.0, 0, 0.5)


def test_a_weight_decay_given_as_itself_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for read in (
        lambda wd: training_settings(parser().parse_args(["DIR", "--wd", str(wd)]))["weight_decay"],
        weight_decay_of,
    ):
        assert read(1e-5) == pytest.approx(1.0, rel=1e-4)
        assert "warning: --wd is a power of ten, so --wd 1e-05 is a weight decay of 1.00002" in capsys.readouterr().err
        assert read(-5) == pytest.approx(1e-5) and capsys.readouterr().err == ""


# The run of an old main.sh


def test_the_files_of_2018_are_left(old_run: tuple[Path, str]) -> None:
    exp, _ = old_run
    assert {path.name for path in exp.iterdir()} == {
        *("checkpoint.pth.tar", "checkpoints", "clusters"),
        *("deepcluster-run", "deepcluster-images.csv"),
    }
    assert {path.name for path in (exp / "checkpoints").iterdir()} == {"checkpoint_0.pth.tar", "checkpoint_1.pth.tar"}


def test_the_checkpoint_has_the_keys_of_2018(old_run: tuple[Path, str]) -> None:
    state = checkpoint_of(old_run[0] / "checkpoint.pth.tar")
    assert (list(state), state["epoch"], state["arch"]) == (["epoch", "arch", "state_dict", "optimizer"], 2, "alexnet")
    names = []
    for convolution, norm in zip(CONVOLUTIONS, NORMS, strict=True):
        names += [f"features.module.{convolution}.{part}" for part in ("weight", "bias")]
        names += [f"features.module.{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    names += [f"{layer}.{part}" for layer in ("classifier.1", "classifier.4", "top_layer") for part in ("weight", "bias")]
    names += [f"sobel.{number}.{part}" for number in (0, 1) for part in ("weight", "bias")]
    assert list(state["state_dict"]) == names
    assert state["state_dict"]["top_layer.weight"].shape == (4, 4096)
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in state["state_dict"].values())


def test_the_optimizer_fits_that_of_2018(old_run: tuple[Path, str]) -> None:
    """An SGD of torch over the trained tensors of features and classifier, without the top layer."""
    state = checkpoint_of(old_run[0] / "checkpoint.pth.tar")
    trained = [
        nn.Parameter(value.clone())
        for name, value in state["state_dict"].items()
        if name.startswith(("features", "classifier")) and "running" not in name
    ]
    optimizer = torch.optim.SGD(trained, lr=1.0, momentum=0.5, weight_decay=0.0)
    optimizer.load_state_dict(state["optimizer"])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 1e-5)
    assert set(state["optimizer"]["param_groups"][0]) == {
        *("params", "lr", "momentum", "dampening"),
        *("weight_decay", "nesterov"),
    }
    assert all(optimizer.state[one]["momentum_buffer"].shape == one.shape for one in trained)


def test_checkpoints_are_kept_before_every_third_step(old_run: tuple[Path, str]) -> None:
    """Step 0 of the first epoch, when the weights are random, and step 3, the second one of the second epoch."""
    first, second = (checkpoint_of(old_run[0] / "checkpoints" / f"checkpoint_{number}.pth.tar") for number in (0, 1))
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert list(first) == list(second) == ["epoch", "arch", "state_dict", "optimizer"]
    assert first["optimizer"]["state"] == {}
    assert float(first["state_dict"]["classifier.4.bias"].abs().max()) == 0
    assert float(second["state_dict"]["classifier.4.bias"].abs().max()) > 0
    assert second["optimizer"]["state"]


def test_the_log_of_clusters_numbers_the_images_of_image_folder(old_run: tuple[Path, str], photos: Path) -> None:
    exp, _ = old_run
    images = [Path(path) for path, _ in ImageFolder(photos, allow_empty=True).imgs]
    epochs = log_of(exp)
    assert len(epochs) == 2
    for number, clusters in enumerate(epochs, 1):
        assert len(clusters) == 4
        assert sorted(image for cluster in clusters for image in cluster) == list(range(N_IMAGES))
        assert all(cluster == sorted(cluster) and all(type(image) is int for image in cluster) for cluster in clusters)
        table = pq.read_table(exp / "deepcluster-run" / "assignments" / f"epoch-{number:04d}.parquet").to_pydict()
        source = open_source(exp / "deepcluster-images.csv")
        ours = dict(zip(table["name"], table["cluster"], strict=True))
        paths = {source.path(index): ours[source.name(index)] for index in range(len(source))}
        assert {images[image]: cluster for cluster, some in enumerate(clusters) for image in some} == paths
    with (exp / "deepcluster-images.csv").open(newline="") as file:
        assert [Path(row["path"]) for row in csv.DictReader(file)] == images


def test_the_lines_of_2018_are_printed(old_run: tuple[Path, str]) -> None:
    exp, output = old_run
    number, pair = r"\d+\.\d{3}", r"\d+\.\d{3} \(\d+\.\d{3}\)"
    wanted = ["Architecture: alexnet", r"Load dataset: \d+\.\d\d s"]
    for epoch in (0, 1):
        loss = r"Loss: \d+\.\d{4} \(\d+\.\d{4}\)"
        first = [rf"Epoch: \[{epoch}\]\[0/2\]\tTime: {pair}\tData: {pair}\t{loss}"]
        saved = [rf"Save checkpoint at: {re.escape(str(exp))}/checkpoints/checkpoint_{epoch}\.pth\.tar"]
        wanted += ["Compute features", rf"0 / 2\tTime: {pair}", "Cluster the features"]
        wanted += [r"k-means loss evolution: \[[^\]]+\]", r"k-means time: \d+ s", "Assign pseudo labels"]
        wanted += saved + first if epoch == 0 else first + saved
        wanted += ["", rf"###### Epoch \[{epoch}\] ###### ", rf"Time: {number} s"]
        wanted += [rf"Clustering loss: {number} ", rf"ConvNet loss: {number}"]
        wanted += [rf"NMI against previous assignment: {number}"] * epoch + ["####################### ", ""]
    lines = output.splitlines()
    assert len(lines) == len(wanted), output
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line), line


def test_the_network_of_2018_takes_the_weights_and_computes_the_same(old_run: tuple[Path, str]) -> None:
    """A network written down from the key list, with DataParallel around the convolutions, against our trunk."""
    exp, _ = old_run
    layers: list[nn.Module] = []
    channels = 2
    for width, kernel, stride, padding in ((96, 11, 4, 2), (256, 5, 1, 2), (384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1)):
        layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(3, 2)] if len(layers) in (3, 7, 17) else []
        channels = width
    network = nn.Module()
    network.features = nn.DataParallel(nn.Sequential(*layers))
    classifier = [nn.Dropout(0.5), nn.Linear(256 * 36, 4096), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4096, 4096)]
    network.classifier = nn.Sequential(*classifier)
    network.top_layer = nn.Linear(4096, 4)
    network.sobel = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 3, padding=1))
    state = checkpoint_of(exp / "checkpoint.pth.tar")["state_dict"]
    network.load_state_dict(state)
    network.eval()
    images_BCHW = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = network.classifier(network.features.module(network.sobel(images_BCHW)).flatten(1))
        for model in ("deepcluster-run", "checkpoint.pth.tar"):
            torch.testing.assert_close(load(exp / model).trunk(images_BCHW), theirs, rtol=0, atol=0)


@pytest.mark.slow
def test_resume_continues_without_a_word(old_run: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    """From the first epoch's checkpoint, in the current folder: the clusters of the second epoch are those of before."""
    exp, _ = old_run
    words = ["--sobel", "--k", 4, "--batch", 10, "--workers", 2]
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    (two / "clusters").write_text("of an earlier run")
    (two / "checkpoint.pth.tar").write_text("of an earlier run")
    first = run_main(photos, *map(str, words), "--epochs", "1", "--exp", one, cwd=tmp_path)
    assert (first.stdout, first.stderr) == ("", "")
    done = run_main(photos, *map(str, words), "--epochs", "2", "--resume", one / "checkpoint.pth.tar", cwd=two)
    path = one / "checkpoint.pth.tar"
    assert done.stdout == f"=> loading checkpoint '{path}'\n=> loaded checkpoint '{path}' (epoch 1)\n"
    assert done.stderr == ""
    assert len(log_of(two)) == 1  # It began again, as in 2018.
    as_sets = [{frozenset(cluster) for cluster in clusters} for clusters in (log_of(two)[0], log_of(exp)[1])]
    assert as_sets[0] == as_sets[1]
    assert checkpoint_of(two / "checkpoint.pth.tar")["epoch"] == 2
    shutil.rmtree(one)
    shutil.rmtree(two)


@pytest.mark.slow
def test_pic_and_longer_epochs(photos: Path, tmp_path: Path) -> None:
    options = [
        "--clustering",
        "PIC",
        "--reassign",
        "1.5",
        "--batch",
        "10",
        "--epochs",
        "1",
        "--checkpoints",
        "1",
        "--verbose",
    ]
    done = run_main(photos, *options, "--exp", "e", cwd=tmp_path)
    assert re.search(r"^pic time: \d+ s$", done.stdout, re.MULTILINE) and "k-means" not in done.stdout
    (clusters,) = log_of(tmp_path / "e")
    assert all(clusters) and sorted(image for cluster in clusters for image in cluster) == list(range(N_IMAGES))
    state = checkpoint_of(tmp_path / "e" / "checkpoint.pth.tar")
    assert len(state["state_dict"]["top_layer.bias"]) == len(clusters)
    assert not [name for name in state["state_dict"] if name.startswith("sobel")]
    assert state["state_dict"]["features.module.0.weight"].shape[1] == 3
    # 30 images in batches of 10.
    assert len(list((tmp_path / "e" / "checkpoints").iterdir())) == 3
    shutil.rmtree(tmp_path / "e")


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_there(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deepcluster.interop.release2018", "main", str(photos)]
    options = ["--k", "4", "--batch", "10", "--epochs", "50", "--verbose"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *options], cwd=tmp_path, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if line.startswith("Epoch: [1]"):
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        complaint = process.stderr.read()
    assert process.returncode == 130
    kept = "1 epoch done: --resume checkpoint.pth.tar continues after the last of them"
    assert complaint.splitlines()[-1] == f"deepcluster: stopped by SIGINT; {kept}"
    assert "Traceback" not in complaint
    assert checkpoint_of(tmp_path / "checkpoint.pth.tar")["epoch"] == 1
    assert len(log_of(tmp_path)) == 1
    shutil.rmtree(tmp_path)


# Resume


def as_torch_03(state: dict[str, Any], path: Path) -> Path:
    """A checkpoint as torch 0.3 wrote it: not a zip archive, and weights are named by their places in memory."""
    old = OrderedDict(state)
    if "optimizer" in state:
        place = {number: 140_000_000_000_000 + 72 * number for number in state["optimizer"]["param_groups"][0]["params"]}
        group = {**state["optimizer"]["param_groups"][0], "params": list(place.values())}
        momenta = {place[number]: value for number, value in state["optimizer"]["state"].items()}
        old["optimizer"] = {"state": momenta, "param_groups": [group]}
    torch.save(old, path, _use_new_zipfile_serialization=False)
    return path


def new_loop(photos: Path) -> Loop:
    options = parser().parse_args([str(photos), "--sobel", "--k", "4"])
    settings = Settings.from_dict({**training_settings(options), "pca": 16})
    loader = Loader(DecodedImages(open_source(photos)), workers=0)
    return Loop(DeepCluster(make_trunk("alexnet", sobel=True), loader, settings, Machine.choose("cpu", "fp32")))


def assert_next_step(loop: Loop, momenta: dict[int, Any]) -> None:
    """The optimizer's next step is that of SGD with these momenta, weight by weight."""
    optimizer = loop.method.trunk_optimizer  # type: ignore[attr-defined]
    weights = optimizer.param_groups[0]["params"]
    expected = []
    for number, weight in enumerate(weights):
        weight.grad = torch.randn_like(weight)
        change = weight.grad + 1e-5 * weight.detach()
        expected.append(weight.detach() - 0.05 * (0.9 * momenta[number] + change if number in momenta else change))
    optimizer.step()
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), value)


def test_resume_takes_weights_momentum_and_epoch(
    old_run: tuple[Path, str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file as torch 0.3 wrote it, of one without optimizer as released, and of our own."""
    state = checkpoint_of(old_run[0] / "checkpoint.pth.tar")
    released = {name: value for name, value in state.items() if name != "optimizer"}
    files = {
        as_torch_03(state, tmp_path / "old.pth.tar"): True,
        as_torch_03(released, tmp_path / "released.pth.tar"): False,
        old_run[0] / "deepcluster-run" / "checkpoints" / "last.pt": True,
    }
    for path, has_optimizer in files.items():
        loop = new_loop(photos)
        options = parser().parse_args([str(photos), "--sobel", "--resume", str(path), "--start_epoch", "9"])
        Start.read(options, Lines(verbose=False, batch=16)).apply(loop, loop.method)  # type: ignore[arg-type]
        assert loop.epoch == 3
        written = release_checkpoint(loop.method.trunk, None, epoch=2, optimizer=loop.method.trunk_optimizer.state_dict())  # type: ignore[attr-defined]
        for name, value in written["state_dict"].items():
            assert torch.equal(value, state["state_dict"][name]), name
        wanted = state["optimizer"]["state"] if has_optimizer else {}
        momenta = {number: one["momentum_buffer"] for number, one in written["optimizer"]["state"].items()}
        assert momenta.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[number]["momentum_buffer"]) for number, value in momenta.items())
        assert_next_step(loop, momenta)
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == [f"=> loading checkpoint '{path}'", f"=> loaded checkpoint '{path}' (epoch 2)"]
        assert bool(lines[2:]) != has_optimizer
        path.unlink() if path.parent == tmp_path else None


def test_a_finished_checkpoint_leaves_nothing_to_train(
    old_run: tuple[Path, str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = old_run[0] / "checkpoint.pth.tar"
    exp = tmp_path / "exp"
    assert release2018(["main", str(photos), "--sobel", "--resume", str(path), "--epochs", "2", "--exp", str(exp)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == f"=> loaded checkpoint '{path}' (epoch 2)"
    assert "nothing to train: 2 epochs are done, and --epochs is 2" in err
    assert not exp.exists()


def test_checkpoints_that_do_not_fit(
    old_run: tuple[Path, str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path, *words: str) -> str:
        assert release2018(["main", str(photos), "--resume", str(path), "--exp", str(tmp_path / "e"), *words]) == 2
        assert not (tmp_path / "e").exists()
        return capsys.readouterr().err

    kept = old_run[0] / "checkpoint.pth.tar"
    assert "was trained with Sobel filters: add --sobel" in refused(kept)
    assert "holds alexnet, and --arch is vgg16: use --arch alexnet" in refused(kept, "--sobel", "-a", "vgg16")
    other = tmp_path / "other.pth.tar"
    torch.save({"epoch": 3, "arch": "alexnet"}, other)
    assert "is no checkpoint of main.py: it has no state_dict" in refused(other)
    state = checkpoint_of(kept)
    torch.save({**state, "optimizer": {"state": {}, "param_groups": [{"params": [0, 1]}]}}, other)
    assert "its optimizer is not the SGD of this network" in refused(other, "--sobel", "--k", "4")
    other.write_bytes(b"PK\x03\x04 half a file")
    assert "can't be read" in refused(other)


# The page about migrating


def test_the_command_beside_main_py_has_its_settings() -> None:
    """But for what no result depends on: how many of our own checkpoints are kept."""
    old, new = re.findall(r"`main\.py (DIR --arch.+)` is\n\n```bash\ndeepcluster train (DIR(?:.|\n)+?)\n```", PAGE)[0]
    with cli.commands["train"].make_context("train", shlex.split(new.replace("\\\n", " "))) as context:  # type: ignore[attr-defined]
        given = {name: value for name, value in context.params.items() if value is not None and name in Settings().as_dict()}
    here = settings_before_data(given).as_dict()
    there = training_settings(parser().parse_args(shlex.split(old)))
    assert {name for name in there if there[name] != here[name]} == {"checkpoint_every"}
    assert (context.params["data"], context.params["out"]) == (("DIR",), Path("EXP"))


def test_the_code_that_reads_clusters_names_its_images(old_run: tuple[Path, str], photos: Path) -> None:
    code = re.search(r"\nimport csv, pickle\n(?:.*\n)+?(?=```)", PAGE)
    assert code is not None
    program = code[0].replace("EXP/", f"{old_run[0]}/").replace("[-1][17]", "[-1][3]")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    images = [path for path, _ in ImageFolder(photos, allow_empty=True).imgs]
    assert done.stdout == f"{[images[number] for number in log_of(old_run[0])[-1][3]]}\n"


# Wrong input


def test_wrong_input_is_one_sentence_in_terms_of_2018(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    write_image(flat / "0.jpg", 0)
    (tmp_path / "none" / "class").mkdir(parents=True)
    for number in range(6):
        write_image(tmp_path / "few" / "a" / f"{number}.jpg", number)
    (tmp_path / "spoiled").mkdir()
    write_spoiled_images(tmp_path / "spoiled" / "a", 5)
    cases = {
        (str(tmp_path / "gone"),): "is not there: give a folder that holds class folders",
        (str(flat / "0.jpg"),): "is a file: give a folder that holds class folders",
        (str(flat),): "has no class folders: main.py takes images from DIR/CLASS/ only",
        (str(tmp_path / "none"),): "no images in the 1 class folder of",
        (str(photos),): f"--nmb_cluster 10000 is more than the {N_IMAGES} images of {photos}; use --nmb_cluster {N_IMAGES}",
        (str(photos), "--k", "1"): "nmb_cluster=1 is too small; use 2 or more",
        (str(photos), "--k", "4", "--batch", "1"): "batch=1 is too small; use 2 or more",
        (str(photos), "--k", "4", "--wd", "999"): "--wd 999 is a power of ten that no number holds",
        (str(photos), "--k", "4", "--momentum", "1"): "momentum=1",
        (
            str(photos),
            "--k",
            "4",
            "--reassign",
            "0.01",
        ): "reassign=0.01 of 20 images leaves fewer than 2 per epoch; use --reass",
        (str(photos), "--k", "4", "--checkpoints", "0"): "--checkpoints 0 must be 1 or more",
        (str(photos), "--k", "4", "--seed", "-1"): "seed=-1 is too small",
        (str(tmp_path / "few"), "--k", "9"): "--nmb_cluster 9 is more than the 6 images",
        (str(tmp_path / "spoiled"), "--k", "2"): "0 readable images are too few",
    }
    exp = tmp_path / "exp"
    for words, message in cases.items():
        assert release2018(["main", *words, "--exp", str(exp)]) == 2, words
        out, err = capsys.readouterr()
        assert message in err and "Traceback" not in err and out == "", (words, err)
        assert not exp.exists(), words
    assert release2018(["main", str(photos), "--k", "4", "--exp", str(flat / "0.jpg")]) == 2
    assert "is a file or can't be written to; name another folder" in capsys.readouterr().err


# Shims


def test_shims_call_what_there_is(shims: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = {path.relative_to(shims).as_posix() for path in shims.rglob("*") if path.is_file()} - {"old_main.sh"}
    assert {Path(name).stem for name in written if name.endswith(".py")} == set(SCRIPTS) - {"shims", "download_model"}
    for name in written:
        text = (shims / name).read_text()
        if name.endswith(".py"):
            compile(text, name, "exec")
        else:
            subprocess.run(["sh", "-n", name], cwd=shims, check=True)
            assert os.access(shims / name, os.X_OK)
            assert set(re.findall(r'"\$HERE/([^"]+)"', text)) <= {Path(one).name for one in written}
    helped = subprocess.run(["./main.sh", "--help"], cwd=shims, capture_output=True, text=True, check=True)
    assert helped.stdout.startswith("usage: main.py [-h] [--arch ARCH]")
    assert release2018(["shims", str(shims)]) == 0
    (shims / "eval_linear.py").write_text("of somebody else")
    capsys.readouterr()
    assert release2018(["shims", str(shims)]) == 2
    assert "eval_linear.py is there already and would be lost" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_flags_of_the_shell_scripts_are_those_of_the_scripts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        release2018([name, "--help"])
    assert ending.value.code == 0
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    texts = [text for path, text in shim_files().items() if path.endswith(".sh") and f"/{name}.py" in text]
    for text in texts:
        assert set(re.findall(r" (--\w+)", text)) <= known, name
    assert texts or name in ("shims", "download_model")


def test_unknown_scripts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert release2018(["eval_linaer"]) == 2
    assert "no script 'eval_linaer' (did you mean eval_linear?)" in capsys.readouterr().err
    assert release2018([]) == 2
    assert release2018(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(script in text for script in SCRIPTS)
