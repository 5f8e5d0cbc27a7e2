"""Whole runs of the scripts of 2018 on small data: the files that they leave, the lines that they print, the numbers."""

import io
import pickle
import re
import stat
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from buildings_helper import PLACES, write_city
from models_helper import make_model, write_classes
from PIL import Image
from test_linear import StoppedAfter
from test_release2018_scripts import run
from torchvision.transforms.v2.functional import pil_to_tensor
from vocs import write_voc

import deepcluster
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.pickles import read_plain_pickle
from deepcluster.data.sources import open_source
from deepcluster.evaluation.datasets.labelled import open_train_val
from deepcluster.evaluation.options import LinearOptions
from deepcluster.evaluation.protocols import evaluate
from deepcluster.interop.loading import load
from deepcluster.interop.release2018.probe import Probe
from deepcluster.interop.release2018_files import release_checkpoint
from deepcluster.models.trunk import normalise
from deepcluster.run.model import Model
from deepcluster.visualization.filters import filters

SMALL = "untrained:alexnet-small"
LOADED = ["=> loading checkpoint '{}'", "Loaded"]
NUMBER = r"\d+\.\d{3} \(\d+\.\d{3}\)"
TIMES = rf"Time {NUMBER}\tData {NUMBER}"
SHARES = rf"Loss \d+\.\d{{4}} \(\d+\.\d{{4}}\)\tPrec@1 {NUMBER}\tPrec@5 {NUMBER}"


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def assert_lines(found: list[str], patterns: list[str]) -> None:
    assert len(found) == len(patterns), found
    for line, pattern in zip(found, patterns, strict=True):
        assert re.fullmatch(pattern, line), (pattern, line)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release2018") / "classes"
    write_classes(folder / "train", 4, side=40)
    write_classes(folder / "val", 3, side=40, seed=1)
    return folder


# eval_linear.py


def logs(exp: Path) -> dict[str, list[float]]:
    return {path.name: pickle.loads(path.read_bytes()) for path in sorted((exp / "log").iterdir())}


def release_keys() -> list[str]:
    """The names of an AlexNet with Sobel filters in the released file, once its `module.` is gone."""
    batch_norm = ("weight", "bias", "running_mean", "running_var")
    layers = [(f"features.{n + norm}", norm) for n in (0, 4, 8, 11, 14) for norm in (0, 1)]
    names = [f"{layer}.{part}" for layer, norm in layers for part in (batch_norm if norm else batch_norm[:2])]
    others = ("classifier.1", "classifier.4", "top_layer", "sobel.0", "sobel.1")
    return names + [f"{layer}.{part}" for layer in others for part in batch_norm[:2]]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AlexNet as the release has it: without `optimizer`, its convolutions in DataParallel, in torch's old format."""
    file, trunk = tmp_path_factory.mktemp("released") / "checkpoint.pth.tar", load("untrained:alexnet").trunk
    state = release_checkpoint(trunk, None, epoch=500)
    generator = torch.Generator().manual_seed(0)
    state["state_dict"]["top_layer.weight"] = torch.randn(7, 4096, generator=generator)
    state["state_dict"]["top_layer.bias"] = torch.randn(7, generator=generator)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file


def test_eval_linear_on_a_released_file(
    released: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files and lines of two epochs; the last test is that of our own protocol with the same settings."""
    exp, model = tmp_path / "exp", str(released)
    words = ["--model", model, "--data", classes, "--conv", 1, "--lr", 0.005, "--wd", -7, "--exp", exp, "--workers", 1]
    run("eval_linear", *words, "--epochs", 2, "--batch", 6, "--verb")
    steps = [rf"Epoch: \[{epoch}\]\[0/2\]\t{TIMES}\t{SHARES}" for epoch in (0, 1)]
    test = rf"Validation: \[0/3\]\tTime {NUMBER}\t{SHARES}"
    loaded = [re.escape(line.format(model)) for line in LOADED]
    assert_lines(lines_of(capsys), [*loaded, steps[0], test, steps[1], test])
    found = logs(exp)
    assert list(found) == ["loss_log", "prec1", "prec5"]
    assert all(len(values) == 2 and {type(one) for one in values} == {float} for values in found.values())
    options = {"stages": "conv1", "epochs": 2, "batch_size": 6, "lr": 0.005, "weight_decay": 1e-7}
    ours = evaluate("linear", model, classes, device="auto", workers=1, **options).results.results
    assert isinstance(ours["top-1"], dict) and found["prec1"][-1] == pytest.approx(100 * ours["top-1"]["conv1"])
    assert found["prec5"] == [100.0, 100.0]  # Of three classes.
    rose = [found["prec1"][0] > 0, found["prec1"][1] > found["prec1"][0]]
    files = {"model_best.pth.tar" if rises else "checkpoint.pth.tar" for rises in rose}
    assert {path.name for path in exp.iterdir()} == files | {"log"}
    state = torch.load(exp / ("model_best.pth.tar" if rose[1] else "checkpoint.pth.tar"), weights_only=True, mmap=True)
    assert list(state) == ["epoch", "arch", "state_dict", "prec5", "best_prec1", "optimizer"]
    assert (state["epoch"], state["arch"], state["prec5"]) == (2, "alexnet", 100.0)
    assert state["best_prec1"] == max(found["prec1"])
    assert list(state["state_dict"]) == release_keys()
    given = torch.load(released, weights_only=True)["state_dict"]
    given = {name.replace(".module", ""): value for name, value in given.items()}
    assert all(torch.equal(given[name], value) for name, value in state["state_dict"].items())
    [group] = state["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], len(group["params"])) == (0.9, 1e-7, 2)
    assert state["optimizer"]["state"][0]["momentum_buffer"].shape == (3, 9600)


def test_eval_linear_prints_nothing_but_the_loader_s_lines(
    released: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without --exp the files are in the current folder. What was used of the file goes to the error stream."""
    monkeypatch.chdir(tmp_path)
    run("eval_linear", "--model", released, "--data", classes, "--conv", 1, "--epochs", 1, "--wo", 0)
    out, err = capsys.readouterr()
    assert out.splitlines() == [line.format(released) for line in LOADED]
    assert re.fullmatch(rf"{re.escape(str(released))}: 34 of 34 tensors of alexnet.*\n", err)
    assert (tmp_path / "log" / "prec1").is_file()


QUICK = LinearOptions(stages="conv2", epochs=3, batch_size=4, lr=0.002)


def probe(model: Model, data: Path, exp: Path, options: LinearOptions = QUICK) -> dict[str, list[float]]:
    exp.mkdir(exist_ok=True)
    with ExitStack() as opened:
        Probe(model, open_train_val(data), options, exp, verbose=False, opened=opened).run()
    return logs(exp)


# Batches of 4: 3 steps and 5 batches of tests in each of 3 epochs.
@pytest.mark.parametrize("count", [1, 3, 5, 8, 9, 23, 24])
def test_a_stop_of_eval_linear_changes_no_log(classes: Path, tmp_path: Path, count: int) -> None:
    whole = probe(make_model(tmp_path / "whole"), classes, tmp_path / "a")
    reporter = StoppedAfter(count)
    model = reporter.model = make_model(tmp_path / "stopped", reporter=reporter)
    with pytest.raises(Interrupted):
        probe(model, classes, tmp_path / "b")
    again = probe(make_model(tmp_path / "stopped"), classes, tmp_path / "b")
    assert again == whole and all(len(values) == 3 for values in whole.values())


def test_ten_crops_are_those_of_our_protocol(classes: Path, tmp_path: Path) -> None:
    options = replace(QUICK, ten_crops=True, lr=0.0005)
    found = probe(make_model(tmp_path / "a"), classes, tmp_path / "exp", options)
    data = {name: value for name, value in options.as_dict().items() if name != "stages"}
    ours = evaluate("linear", make_model(tmp_path / "b"), classes, stages="conv2", **data).results.results["top-1"]
    assert isinstance(ours, dict) and found["prec1"][-1] == pytest.approx(100 * ours["conv2"])
    assert found["loss_log"][-1] > 0


def test_a_loss_that_is_not_finite(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use a lower --lr than 1e"):
        probe(make_model(tmp_path / "a"), classes, tmp_path / "exp", replace(QUICK, lr=1e30, epochs=40))


# eval_voc_classif.py


def images_of(prefix: str, count: int) -> dict[str, list[str]]:
    kinds = [["cat"], ["dog"], ["bird"], ["cat", "!dog"]]
    return {f"{prefix}{number:03}": kinds[number % 4] for number in range(count)}


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": images_of("a", 9), "val": images_of("b", 11)}
    return write_voc(
        tmp_path_factory.mktemp("voc") / "VOC2007", {**splits, "trainval": {}, "test": images_of("c", 10)}, side=48
    )


@pytest.mark.parametrize(("crops", "split"), [(1, "train"), (0, "trainval")])
def test_eval_voc_classif(devkit: Path, crops: int, split: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines, and the numbers of our own protocol with the same settings."""
    words = ["--split", split, "--nit", 30, "--steps", 20, "--lr", 0.004, "--eval", crops, "--min", 0.2]
    run("eval_voc_classif", "--voc", devkit, "--model", SMALL, *words)
    steps = [rf"Iteration\[{number}\]\t{TIMES}\tLoss \d+\.\d{{4}} \(\d+\.\d{{4}}\)\t" for number in (0, 25)]
    value = rf"(\d+\.\d+)    ((?:nan|\d\.\d\d)(?: nan| \d\.\d\d){{{19}}})"
    found = lines_of(capsys)
    names = r"vocdir=.*, split='.*', model=.*, nit=30, fc6_8=1, train_batchnorm=0, eval_random_crops=\d, stepsize=20"
    assert_lines(
        found,
        [
            rf"Namespace\({names}, lr=0\.004, wd=1e-06, min_scale=0\.2, max_scale=0\.5, seed=31\)",
            *(re.escape(line.format(SMALL)) for line in LOADED),
            f"PASCAL VOC 2007 {split} dataset loaded",
            "Start training",
            steps[0],
            r"iter 20 learning rate is 0\.002",
            steps[1],
            "Evaluation",
            "Train set",
            value,
            "Test set",
            value,
        ],
    )
    options = {"finetune": "fc6-8", "split": split, "iterations": 30, "halve_every": 20, "lr": 0.004}
    more = {"crop_scale": (0.2, 0.5), "test_crops": "random" if crops else "fixed", "train_set": True}
    ours: Any = evaluate("voc07-classification", SMALL, devkit, **options, **more).results.results
    assert float(found[-3].split()[0]) == pytest.approx(ours["train mAP"])
    assert float(found[-1].split()[0]) == pytest.approx(ours["mAP"])
    aps = found[-1].split()[1:]
    assert [aps[place] for place in (2, 7, 11)] == [f"{ours['AP'][name]:.2f}" for name in ("bird", "cat", "dog")]
    assert aps.count("nan") == 17


def test_what_eval_voc_classif_trains(devkit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--fc6_8 0` trains the convolutions, `--train_batchnorm 1` their scales: the numbers are those of our protocol."""
    for words, options in (
        (["--fc6_8", 0], {"finetune": "all"}),
        (["--train_batchnorm", 1], {"finetune": "fc6-8", "train_batchnorm": True}),
    ):
        run("eval_voc_classif", "--vocdir", devkit, "--model", SMALL, "--nit", 3, "--split", "train", "--wd", 0.01, *words)
        same: Any = {"iterations": 3, "split": "train", "weight_decay": 0.01, **options}
        ours = evaluate("voc07-classification", SMALL, devkit, **same).results.results
        assert float(lines_of(capsys)[-1].split()[0]) == pytest.approx(ours["mAP"])


# eval_retrieval.py


@pytest.fixture(scope="module")
def cities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cities")
    write_city(folder / "Oxford", "oxford", prefix="oxc1_")
    write_city(folder / "Paris", "paris", seed=1000)
    return folder


def stage(cities: Path, temp: object, name: str, city: str, *more: object, binary: object = "nowhere/compute_ap") -> None:
    words = ["--S", 64, "--n_pca", 24, "--model", SMALL, "--dataset", cities / city, "--dataset_name", city]
    run("eval_retrieval", *words, "--eval_binary", binary, "--temp_dir", temp, "--stage", name, *more)


BEFORE_EVAL = (("extract_train", "Oxford"), ("train_pca", "Oxford"), ("q_features", "Paris"), ("db_features", "Paris"))


@pytest.fixture(scope="module")
def temp(cities: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval") / "temp"
    for name, city in BEFORE_EVAL:
        stage(cities, folder, name, city)
    return folder


def test_the_files_of_four_stages(temp: Path) -> None:
    folders = {path.name: sorted(one.name for one in path.iterdir()) for path in temp.iterdir() if path.is_dir()}
    every = sorted(f"{number}.npy" for number in range(17))
    numbered = {"Oxford_S64_L3_regions": every, "Paris_S64_L3_db": every, "Paris_S64_L3_q": every[:1] + ["1.npy", "2.npy"]}
    assert folders == numbered and (temp / "Oxford_S64_PCA.pickle").is_file()
    regions = np.load(temp / "Oxford_S64_L3_regions" / "0.npy")
    assert regions.shape == (1, 20, 256) and regions.dtype == np.float32  # A 4 x 3 map has 2 + 6 + 12 regions.
    np.testing.assert_allclose(np.linalg.norm(regions[0], axis=1), 1, rtol=1e-3)
    for kind in ("db", "q"):
        row = np.load(temp / f"Paris_S64_L3_{kind}" / "2.npy")
        assert row.shape == (1, 24) and np.linalg.norm(row) == pytest.approx(1, rel=1e-5)


def test_the_pca_is_plain_and_whitens(temp: Path) -> None:
    """Against the eigenvalues of the covariance, by NumPy: whitened regions have the identity as covariance."""
    content = read_plain_pickle(temp / "Oxford_S64_PCA.pickle")
    assert set(content) == {"n_components", "mean", "DVt"} and content["n_components"] == 24
    rows = np.concatenate([np.load(path)[0] for path in (temp / "Oxford_S64_L3_regions").iterdir()]).astype(float)
    np.testing.assert_allclose(content["mean"][0], rows.mean(0), atol=1e-5)
    points = (rows - content["mean"]) @ content["DVt"].T
    np.testing.assert_allclose(np.cov(points.T), np.eye(24), atol=1e-2)
    _, vectors = np.linalg.eigh(np.cov(rows.T))
    directions = content["DVt"] / np.linalg.norm(content["DVt"], axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(directions @ vectors[:, -24:], axis=1), 1, atol=1e-3)


def test_eval_gives_the_numbers_of_our_protocol(cities: Path, temp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage(cities, temp, "eval", "Paris")
    found = lines_of(capsys)
    head = ["Prepare the dataset from  .*Paris", "load query features", r"  size \(3, 24\)", "load database features"]
    said = "--eval_binary nowhere/compute_ap can't be run: average precision is computed here, by the same rule"
    each = [rf"{place}_1: \d+\.\d\d" for place in sorted(PLACES)]
    assert_lines(found, [*head, r"  size \(17, 24\)", re.escape(said), *each, "-" * 20, r"Mean: \d+\.\d\d"])
    options: Any = {"size": 64, "pca": 24, "whiten_on": str(cities / "Oxford")}
    ours = evaluate("retrieval", SMALL, cities / "Paris", **options).results
    assert float(found[-1].split()[1]) == pytest.approx(100 * ours.best(), abs=0.006)
    for place in PLACES:
        ranking = (temp / f"{place}_1.rnk").read_text()
        assert ranking.endswith("\n") and len(set(ranking.splitlines())) == 17
        assert sorted(ranking.splitlines()) == sorted(path.stem for path in (cities / "Paris" / "jpg").iterdir())


PROGRAM = """#!{python}
import sys
lists, ranking = sys.argv[1:]
read = lambda kind: open(lists + "_" + kind + ".txt").read().split()
right, junk = set(read("good") + read("ok")), set(read("junk"))
kept = [name for name in open(ranking).read().split() if name not in junk]
points = [(0.0, 1.0)]
for count in range(1, len(kept) + 1):
    found = len(right.intersection(kept[:count]))
    points.append((found / len(right), found / count))
print(sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(points, points[1:])))
"""


def test_the_program_of_eval_binary_is_called(
    cities: Path, temp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program of another rule's words, trapezoids over all ranks, gives what is computed without one."""
    stage(cities, temp, "eval", "Paris")
    ours = lines_of(capsys)
    program = tmp_path / "compute ap"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    stage(cities, temp, "eval", "Paris", binary=program)
    assert lines_of(capsys) == [line for line in ours if "can't be run" not in line]
    program.write_text("#!/bin/sh\necho no such file\n")
    with pytest.raises(InputError, match=r"--eval_binary .* printed no number for .*bridge_1"):
        stage(cities, temp, "eval", "Paris", binary=program)


def test_the_lines_of_the_stages(cities: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """In the current folder, which an empty --temp_dir means."""
    monkeypatch.chdir(tmp_path)
    loaded, numbers = [line.format(SMALL) for line in LOADED], " ".join(map(str, range(17)))
    stage(cities, "", "extract_train", "Oxford")
    prepare = f"Prepare the dataset from  {cities / 'Oxford'}"
    assert lines_of(capsys) == [prepare, *loaded, "extract regions for training", f"{numbers} "]
    stage(cities, "", "train_pca", "Oxford")
    energy = r"keeping \d+\.\d\d % of the energy"
    writing = "writing .*Oxford_S64_PCA.pickle"
    assert_lines(lines_of(capsys), [prepare, "loaded 17 train vectors", r"   size \(340, 256\)", energy, writing])
    stage(cities, "", "q_features", "Paris", "--multires", "--aqe", 5)
    out, err = capsys.readouterr()
    expected = [f"Prepare the dataset from  {cities / 'Paris'}", *loaded, "loading PCA from Oxford_S64_PCA.pickle"]
    assert out.splitlines() == [*expected, "Compute features", "0 1 2 "]
    assert err.startswith("warning: --multires, --aqe and --dbe had no effect in 2018")
    assert {path.name for path in tmp_path.iterdir()} == {"Oxford_S64_L3_regions", "Oxford_S64_PCA.pickle", "Paris_S64_L3_q"}


def test_stages_in_the_wrong_order_and_damaged_files(cities: Path, temp: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Oxford_S64_PCA\.pickle is not there: --stage extract_train and train_pca"):
        stage(cities, tmp_path, "db_features", "Paris")
    with pytest.raises(InputError, match=r"0\.npy is not there: --stage extract_train"):
        stage(cities, tmp_path, "train_pca", "Oxford")
    with pytest.raises(InputError, match=r"_q/0\.npy is not there: --stage q_features"):
        stage(cities, tmp_path, "eval", "Paris")
    with pytest.raises(InputError, match=r"--S 1 is too small"):
        stage(cities, tmp_path, "extract_train", "Paris", "--S", 1)
    pca = tmp_path / "Oxford_S64_PCA.pickle"
    pca.write_bytes(b"c__main__\nPCA\n(tR.")
    with pytest.raises(InputError, match=r"asks for __main__\.PCA"):
        stage(cities, tmp_path, "db_features", "Paris")
    pca.write_bytes(pickle.dumps({"mean": np.zeros((1, 8)), "DVt": np.zeros((3, 9))}))
    with pytest.raises(InputError, match="holds no PCA of --stage train_pca: mean and DVt do not fit"):
        stage(cities, tmp_path, "db_features", "Paris")
    pca.write_bytes(pickle.dumps({"mean": np.zeros((1, 9)), "DVt": np.zeros((3, 9))}))
    with pytest.raises(InputError, match="was learned on 9 channels, and conv5 of alexnet-small has 256"):
        stage(cities, tmp_path, "db_features", "Paris")
    (tmp_path / "Oxford_S64_L3_regions").mkdir(exist_ok=True)
    (tmp_path / "Oxford_S64_L3_regions" / "0.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"0\.npy can't be read"):
        stage(cities, tmp_path, "train_pca", "Oxford")


def test_more_numbers_than_channels(cities: Path, temp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An AlexNet has 256 channels, and 512 numbers were the default; the script of 2018 broke on it."""
    (tmp_path / "Oxford_S64_L3_regions").symlink_to(temp / "Oxford_S64_L3_regions")
    stage(cities, tmp_path, "train_pca", "Oxford", "--n_pca", 512)
    assert "--n_pca 512: the regions have only 256 channels, as many numbers are kept" in capsys.readouterr().err
    assert read_plain_pickle(tmp_path / "Oxford_S64_PCA.pickle")["DVt"].shape == (256, 256)


def test_pretrained_without_torchvision_s_weights(cities: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"--model pretrained is torchvision's VGG-16, and .*vgg16_bn-6c64b313\.pth is not"):
        stage(cities, tmp_path, "extract_train", "Oxford", "--model", "pretrained")


@pytest.mark.slow
def test_the_regions_of_torchvision_s_vgg16(cities: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--model pretrained`: maxima over the map before the last pool, by torchvision itself."""
    network = torchvision.models.vgg16_bn().eval()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "vgg16_bn-6c64b313.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    stage(cities, tmp_path / "temp", "extract_train", "Oxford", "--model", "pretrained")
    image = Image.open(cities / "Oxford" / "jpg" / "oxford_bridge_000000.jpg").convert("RGB")
    ratio = 64 / max(image.size)
    pixels = pil_to_tensor(image.resize(tuple(round(side * ratio) for side in image.size), Image.Resampling.BILINEAR))
    with torch.no_grad():
        map_CHW = network.features[:-1](normalise(pixels[None]))[0]
    side = min(map_CHW.shape[1:])
    expected = torch.nn.functional.normalize(map_CHW[:, :side, :side].amax((1, 2)), dim=0)
    found = np.load(tmp_path / "temp" / "Oxford_S64_L3_regions" / "0.npy")[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-3)


# gradient_ascent.py


def test_gradient_ascent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A JPEG of every channel, of the picture that our own command makes."""
    settings = ["--niter", 4, "--idim", 24, "--lr", 5, "--wd", 1e-4, "--sig", 0.5, "--step", 2]
    run("gradient_ascent", "--model", SMALL, "--exp", tmp_path, *settings)
    found = lines_of(capsys)
    assert found == [*(line.format(SMALL) for line in LOADED), "".join(f"{number} " for number in range(96))]
    [folder] = tmp_path.iterdir()
    names = {path.name for path in folder.iterdir()}
    assert folder.name == "conv1" and names == {f"layer1-channel{number}.jpeg" for number in range(96)}
    ours: Any = {"objective": "published", "stage": "conv1", "channels": "all", "steps": 4, "image_size": 24, "lr": 5.0}
    more: Any = {"weight_decay": 1e-4, "sigma": 0.5, "blur_every": 2}
    filters(SMALL, out=tmp_path / "ours", **ours, **more)
    for channel in range(96):
        packed = io.BytesIO()
        with Image.open(tmp_path / "ours" / "conv1" / f"{channel:04}.png") as twin:
            twin.save(packed, "JPEG")
        with Image.open(folder / f"layer1-channel{channel}.jpeg") as picture, Image.open(packed) as expected:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (24, 24))
            assert np.array_equal(picture, expected)


# activ-retrieval.py


def test_activ_retrieval(classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The copies, in the order of the means of the maps over their pixels."""
    data = tmp_path / "data"
    for number, path in enumerate(sorted((classes / "train").rglob("*.png"))):
        (data / path.parent.name).mkdir(parents=True, exist_ok=True)
        (data / path.parent.name / f"photo {number}.png").write_bytes(path.read_bytes())
    run("activ_retrieval", "--data", data, "--model", SMALL, "--conv", 3, "--exp", tmp_path, "--count", 4)
    assert lines_of(capsys) == [*(line.format(SMALL) for line in LOADED), "0/1"]
    folders = {path.name for path in (tmp_path / "conv3").iterdir()}
    source = open_source(data)
    scores_NC = load(SMALL).features(source, stage="conv3")[0].numpy()
    n_channels = scores_NC.shape[1]
    assert folders == {f"layer3-channel{number}" for number in range(n_channels)}
    for channel in range(0, n_channels, 7):
        copies = sorted((tmp_path / "conv3" / f"layer3-channel{channel}").iterdir())
        assert [path.name.partition("_")[0] for path in copies] == ["0", "1", "2", "3"]
        scores = {Path(source.name(index)).name: scores_NC[index, channel] for index in range(len(source))}
        got = [scores[path.name.partition("_")[2]] for path in copies]
        np.testing.assert_allclose(got, sorted(scores.values(), reverse=True)[:4], rtol=1e-2, atol=1e-6)
        original = data / next(folder.name for folder in data.iterdir() if (folder / copies[0].name[2:]).exists())
        assert copies[0].read_bytes() == (original / copies[0].name[2:]).read_bytes()


@pytest.mark.parametrize(("count", "expected"), [(-1, 9), (20, 9), (2, 2)])
def test_as_many_copies_as_in_2018(classes: Path, tmp_path: Path, count: int, expected: int) -> None:
    """Of every channel, also of one that no image excites."""
    run("activ_retrieval", "--data", classes / "val", "--model", SMALL, "--exp", tmp_path, "--count", count)
    folders = list((tmp_path / "conv1").iterdir())
    assert len(folders) == load(SMALL).trunk.stage(torch.zeros(1, 3, 32, 32), "conv1").shape[1]
    for folder in folders:
        assert sorted(int(path.name.partition("_")[0]) for path in folder.iterdir()) == [*range(expected)]


def test_a_model_that_deepcluster_trained(trained: Path, classes: Path, tmp_path: Path) -> None:
    """A run folder, and its checkpoint, in the place of a released file."""
    for number, model in enumerate((trained, trained / "checkpoints" / "last.pt")):
        exp = tmp_path / str(number)
        run("activ_retrieval", "--data", classes / "val", "--model", model, "--exp", exp, "--count", 1)
        assert len([*exp.rglob("0_*.png")]) == 96
    assert deepcluster.load(trained).settings.arch == "alexnet-small"
