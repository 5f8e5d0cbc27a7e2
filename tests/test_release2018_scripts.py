"""The arguments of the scripts of 2018: flags, defaults, abbreviations, help; what they refuse; the shell scripts."""

import importlib
import os
import re
import subprocess
from argparse import Action, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest

from deepcluster.cli import main
from deepcluster.core.errors import InputError
from deepcluster.interop.release2018.front_ends import FRONT_ENDS
from deepcluster.interop.release2018.shims import shims

NAMES = ("eval_linear", "eval_voc_classif", "eval_retrieval", "gradient_ascent", "activ_retrieval")
# Of each script the flags with their types and defaults, in order; and what the usage line of 2018 shows of them.
FLAGS: dict[str, dict[str, tuple[Any, Any]]] = {
    "eval_linear": {
        "--data": (None, None),
        "--model": (None, None),
        "--conv": (int, None),
        "--tencrops": (bool, False),
        "--exp": (None, ""),
        "--workers": (int, 4),
        "--epochs": (int, 90),
        "--batch_size": (int, 256),
        "--lr": (float, 0.01),
        "--momentum": (float, 0.9),
        "--weight_decay --wd": (float, -4),
        "--seed": (int, 31),
        "--verbose": (bool, False),
    },
    "eval_voc_classif": {
        "--vocdir": (None, ""),
        "--split": (None, "train"),
        "--model": (None, ""),
        "--nit": (int, 80000),
        "--fc6_8": (int, 1),
        "--train_batchnorm": (int, 0),
        "--eval_random_crops": (int, 1),
        "--stepsize": (int, 5000),
        "--lr": (float, 0.003),
        "--wd": (float, 1e-6),
        "--min_scale": (float, 0.1),
        "--max_scale": (float, 0.5),
        "--seed": (int, 31),
    },
    "eval_retrieval": {
        "--S": (int, 1024),
        "--L": (int, 3),
        "--n_pca": (int, 512),
        "--model": (None, "pretrained"),
        "--dataset": (None, None),
        "--dataset_name": (None, "Oxford"),
        "--stage": (None, "extract_train"),
        "--eval_binary": (None, None),
        "--temp_dir": (None, ""),
        "--multires": (bool, False),
        "--aqe": (int, None),
        "--dbe": (int, None),
    },
    "gradient_ascent": {
        "--model": (None, None),
        "--arch": (None, "alexnet"),
        "--conv": (int, 1),
        "--exp": (None, ""),
        "--lr": (float, 3),
        "--wd": (float, 1e-5),
        "--sig": (float, 0.3),
        "--step": (int, 5),
        "--niter": (int, 1000),
        "--idim": (int, 224),
    },
    "activ_retrieval": {
        "--data": (None, None),
        "--model": (None, None),
        "--conv": (int, 1),
        "--exp": (None, ""),
        "--count": (int, 9),
        "--workers": (int, 4),
    },
}
CHOICES = {
    ("eval_linear", "--conv"): [1, 2, 3, 4, 5],
    ("eval_voc_classif", "--split"): ["train", "trainval"],
    ("eval_retrieval", "--dataset_name"): ["Oxford", "Paris"],
    ("eval_retrieval", "--stage"): ["extract_train", "train_pca", "db_features", "q_features", "eval"],
    ("gradient_ascent", "--arch"): ["alexnet", "vgg16"],
}
# As the README of the release prints them, without line breaks.
USAGE = {
    "eval_linear": "usage: eval_linear.py [-h] [--data DATA] [--model MODEL] [--conv {1,2,3,4,5}] [--tencrops] [--exp EXP] "
    "[--workers WORKERS] [--epochs EPOCHS] [--batch_size BATCH_SIZE] [--lr LR] [--momentum MOMENTUM] "
    "[--weight_decay WEIGHT_DECAY] [--seed SEED] [--verbose]",
    "gradient_ascent": "usage: gradient_ascent.py [-h] [--model MODEL] [--arch {alexnet,vgg16}] [--conv CONV] [--exp EXP] "
    "[--lr LR] [--wd WD] [--sig SIG] [--step STEP] [--niter NITER] [--idim IDIM]",
}
REQUIRED = {"eval_retrieval": ["--dataset", "--eval_binary"]}


def parser(name: str) -> ArgumentParser:
    found: ArgumentParser = importlib.import_module(f"deepcluster.interop.release2018.{name}").parser()
    return found


def run(name: str, *arguments: object) -> None:
    importlib.import_module(f"deepcluster.interop.release2018.{name}").main([str(one) for one in arguments])


def actions(name: str) -> dict[str, Action]:
    return {" ".join(one.option_strings): one for one in parser(name)._actions if one.dest != "help"}


@pytest.mark.parametrize("name", NAMES)
def test_the_flags_their_types_defaults_and_choices(name: str) -> None:
    found = actions(name)
    assert list(found) == list(FLAGS[name])
    for flag, (kind, default) in FLAGS[name].items():
        one = found[flag]
        assert one.default == default and type(one.default) is type(default), flag
        assert one.type is (None if kind is bool else kind) and (one.nargs == 0) is (kind is bool), flag
        assert one.choices == CHOICES.get((name, flag)), flag
        assert one.required is (flag in REQUIRED.get(name, [])), flag


@pytest.mark.parametrize("name", USAGE)
def test_the_usage_line_of_2018(name: str) -> None:
    assert " ".join(parser(name).format_usage().split()) == USAGE[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert re.search(r"^optional arguments:\n  -h, --help +show this help message and exit$", text, re.MULTILINE)
    assert all(re.search(rf"^  (-\S+ \S+, )?{flag.split()[0]}\b", text, re.MULTILINE) for flag in FLAGS[name])


def test_flags_may_be_shortened_and_joined_with_a_sign() -> None:
    linear = parser("eval_linear").parse_args(["--da", "D", "--ten", "--batch", "8", "--weight=-7", "--ver"])
    assert (linear.data, linear.tencrops, linear.batch_size, linear.weight_decay, linear.verbose) == ("D", True, 8, -7, True)
    assert parser("eval_linear").parse_args(["--wd", "-7"]).weight_decay == -7
    assert parser("eval_voc_classif").parse_args(["--fc", "0", "--min=0.2", "--voc", "V"]).min_scale == 0.2
    assert parser("eval_retrieval").parse_args(["--dataset", "D", "--eval", "b", "--n", "9"]).n_pca == 9


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("eval_linear", "--conv 6"),
        ("eval_voc_classif", "--split val"),
        ("eval_retrieval", "--dataset D"),
        ("eval_linear", "--w 3"),  # --workers, --weight_decay or --wd
        ("gradient_ascent", "--arch resnet50"),
    ],
)
def test_argparse_refuses(name: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, *arguments.split())
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


SMALL = "untrained:alexnet-small"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("eval_linear", "--conv 1 --model M", "--data is missing"),
        ("eval_linear", "--data D --model M", "--conv is missing"),
        ("eval_linear", "--data D --conv 1", "--model is missing"),
        ("eval_linear", "--data D --conv 1 --model M --epochs 0", "epochs=0 is too small"),
        (
            "eval_linear",
            f"--data D --conv 1 --model {SMALL}",
            "eval_linear.py is made for AlexNet: use `deepcluster evaluate",
        ),
        ("eval_voc_classif", "", "--model is missing"),
        ("eval_voc_classif", "--model M --min_scale 0.5 --max_scale 0.1", "crop_scale=0.5,0.1 must be two shares"),
        ("eval_voc_classif", f"--model {SMALL} --vocdir D", "D is no VOC devkit"),
        ("eval_retrieval", "--dataset D --eval_binary b", "--dataset D: .*jpg/ and lab/"),
        ("eval_retrieval", "--dataset D --eval_binary b --S -1", "--S -1: the own size of the images is not supported"),
        ("gradient_ascent", f"--model {SMALL} --arch vgg16", "--arch vgg16: .* holds alexnet-small; name its own"),
        ("gradient_ascent", f"--model {SMALL} --conv 6", "--conv 6: alexnet-small has the convolutional layers 1 to 5"),
        ("gradient_ascent", f"--model {SMALL} --niter 0", "steps=0 is too small"),
        ("activ_retrieval", f"--model {SMALL}", "--data is missing"),
        ("activ_retrieval", f"--model {SMALL} --data D --conv 0", "--conv 0: alexnet-small has"),
        ("activ_retrieval", "--model untrained:resnet18-small --data D", "has no stages conv1, conv2"),
    ],
)
def test_what_can_not_work_is_refused_in_a_sentence(
    name: str, arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run(name, *arguments.split())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "eval_retrieval"])  # Which opens its data first.
def test_a_model_that_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loader of 2018 printed this line; then the script broke."""
    monkeypatch.chdir(tmp_path)
    more = {
        "eval_linear": "--data D --conv 1",
        "activ_retrieval": "--data D",
        "eval_retrieval": "--eval_binary b --dataset .",
    }
    for part in ("jpg", "lab"):
        (tmp_path / part).mkdir()
    if name == "eval_retrieval":
        pytest.skip("its data set is opened first; see test_release2018_runs.py")
    with pytest.raises(InputError, match=r"nowhere\.pth\.tar does not exist"):
        run(name, "--model", "nowhere.pth.tar", *more.get(name, "").split())
    assert "=> no checkpoint found at 'nowhere.pth.tar'\n" in capsys.readouterr().out


# The shell scripts


def commands(name: str, home: Path, **variables: str) -> list[list[str]]:
    """What a shell script would call, as words: the program in the place of Python prints its arguments."""
    recorder = home / "recorder"
    recorder.write_text("#!/bin/sh\nprintf '%s\\t' \"$@\"\necho\n")
    recorder.chmod(0o755)
    known = {key: value for key, value in os.environ.items() if key not in FRONT_ENDS[name][0]}
    environment = {**known, "PYTHON": str(recorder), "HOME": str(home), **variables}
    done = subprocess.run(["sh", "-c", shims()[name], name], env=environment, capture_output=True, text=True, check=True)
    assert not done.stderr
    return [line.split("\t")[:-1] for line in done.stdout.splitlines()]


def parsed(name: str, home: Path, **variables: str) -> list[Namespace]:
    """The arguments with which a shell script would call its script."""
    script, found = Path(name).stem, commands(name, home, **variables)
    assert {Path(words[0]).name for words in found} == {f"{script}.py"}
    return [parser(script.replace("-", "_")).parse_args(words[1:]) for words in found]


def test_every_script_has_its_front_end() -> None:
    assert set(FRONT_ENDS) == {
        *("eval_linear.sh", "eval_retrieval.sh", "download_model.sh", "visu/gradient_ascent.sh", "visu/activ-retrieval.sh"),
        *("eval_voc_classif.sh", "eval_voc_classif_all.sh", "eval_voc_classif_fc6_8.sh"),
    }


def test_the_calls_of_the_front_ends(tmp_path: Path) -> None:
    [linear] = parsed("eval_linear.sh", tmp_path, CONV="5", DATA="/my data")
    assert (linear.conv, linear.lr, linear.weight_decay, linear.tencrops, linear.verbose) == (5, 0.01, -7, True, True)
    assert linear.data == "/my data" and linear.model == f"{tmp_path}/deepcluster_models/alexnet/checkpoint.pth.tar"
    voc = parsed("eval_voc_classif.sh", tmp_path)
    assert [(one.split, one.fc6_8, one.train_batchnorm) for one in voc] == [("trainval", 1, 1), ("trainval", 1, 0)]
    stages = parsed("eval_retrieval.sh", tmp_path, DATASETS="/d")
    assert [(one.stage, one.dataset_name) for one in stages] == [
        *(("extract_train", "Oxford"), ("train_pca", "Oxford")),
        *(("q_features", "Paris"), ("db_features", "Paris"), ("eval", "Paris")),
    ]
    assert all(one.dataset == f"/d/{one.dataset_name}" for one in stages)
    assert {one.eval_binary for one in stages} == {"/d/evaluation/compute_ap"}
    [filters], [images] = parsed("visu/gradient_ascent.sh", tmp_path), parsed("visu/activ-retrieval.sh", tmp_path)
    assert (filters.arch, filters.conv) == ("alexnet", 5) and "alexnet" in filters.model and "vgg16" in images.model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eval_voc_classif_all.sh", "--finetune all --iterations 150000 --halve-every 20000 --lr 0.001 --batch-size 16"),
        ("eval_voc_classif_fc6_8.sh", "--finetune fc6-8 --iterations 150000 --halve-every 5000 --lr 0.003 --batch-size 16"),
    ],
)
def test_the_caffe_scripts_fine_tune_without_caffe(name: str, expected: str, tmp_path: Path) -> None:
    [words] = commands(name, tmp_path)
    assert words[:4] == ["-m", "deepcluster", "evaluate", "voc07-classification"] and expected in " ".join(words)
    written = tmp_path / "deepcluster_exp" / ("pascal_all" if "all" in name else "pascal_fc6_8") / "output.txt"
    assert written.read_text().split() == words
    # Our own command knows these options.
    refused = main(["evaluate", "voc07-classification", str(tmp_path / "none"), "--data", "none", *words[8:]])
    assert refused == 2


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_modelroot_of_the_environment_counts(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": "echo", "HOME": str(tmp_path), "MODELROOT": "/else where"}
    text = shims()[name] + 'echo "$MODELROOT" "$MODEL"\n'
    done = subprocess.run(["sh", "-c", text, name], env=environment, capture_output=True, text=True, check=True)
    assert "/else where" in done.stdout.splitlines()[-1]
