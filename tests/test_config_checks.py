"""Options that a method has no use for are refused by name; all others are taken by both."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import deepcluster
from deepcluster.cli import main
from deepcluster.core.errors import InputError
from deepcluster.core.options import flag
from deepcluster.run.settings import METHODS, Settings

FIRST, V2 = METHODS
# By hand, of what the code of each method reads.
OF_ONE = {
    **dict.fromkeys(("clustering", "cluster_stage", "super_clusters", "rotations"), FIRST),
    **dict.fromkeys(("sampling", "head_lr", "head_norm", "head_momentum", "memory", "epoch_length"), FIRST),
    **dict.fromkeys(("crops", "small_crop_scale", "projection", "temperature", "look_again"), V2),
}
# Another value than the default, where that is not any other choice, the other of two, or a number that is a little more.
OTHERS: dict[str, Any] = {
    "arch": "resnet18",
    "init": "weights.pth",
    "reduce_to": 300,
    "cluster_stage": "conv4",
    "look_again": True,
    "dropout": 0.25,
    "momentum": 0.5,
    "jitter_share": 0.5,
    "crop_scale": (0.2, 1.0),
    "crops": "2x224,2x96",
    "small_crop_scale": (0.1, 0.3),
    "projection": (512, 128),
    "device": "cpu",
    "workers": 3,
    "cache": "none",
    "cache_size": "5G",
    "memory": "8G",
    "limit": 100,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.2, 0.2, 0.2),
    "lr_restarts": (100,),
    "log_to": "wandb,mlflow",
}
# What an option needs beside it.
BESIDE: dict[str, dict[str, Any]] = {
    "rotations": {"clustering": "hierarchical", "super_clusters": 4},
    "super_clusters": {"clustering": "hierarchical"},
    "lr_restarts": {"lr_schedule": "cosine"},
}
NAMES = [one.name for one in fields(Settings) if one.name != "method"]


def other_value(name: str) -> Any:
    option = Settings.__dataclass_fields__[name]
    if name in OTHERS:
        return OTHERS[name]
    if option.metadata["choices"]:
        return next(choice for choice in option.metadata["choices"] if choice != option.default)
    if isinstance(option.default, bool):
        return not option.default
    return (option.default or 0) + (0.125 if "float" in str(option.type) else 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_an_option_is_taken_by_both_methods_or_refused_by_the_other(name: str, method: str) -> None:
    value = other_value(name)
    assert value != Settings.__dataclass_fields__[name].default
    if OF_ONE.get(name, method) == method:
        settings = Settings.from_dict({"method": method, name: value, **BESIDE.get(name, {})})
        assert getattr(settings, name) == value
        return
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    with pytest.raises(InputError) as told:
        Settings.from_dict({"method": method, name: value})
    assert str(told.value).startswith(f"{name}={shown}")
    assert V2 in str(told.value) and "\n" not in str(told.value)


def test_the_message_says_what_to_do() -> None:
    cases = {
        "head_lr=0.3 goes only with --method deepcluster, not with deepcluster-v2; leave it out": {
            "method": V2,
            "head_lr": 0.3,
        },
        "projection=512,128 goes only with --method deepcluster-v2, not with deepcluster; leave it out": {
            "projection": (512, 128)
        },
        "clusters=2000000,30: several clusterings go only with --method deepcluster-v2; give one number": {
            "clusters": (2_000_000, 30)
        },
        "super_clusters=4 goes with --clustering hierarchical, not balanced: "
        "use --clustering hierarchical --super-clusters 4": {
            "clustering": "balanced",
            "super_clusters": 4,
        },
        "reduce_to=100 is less than image_size=224, what the network sees; use 0 (never), or 224 or more": {
            "reduce_to": 100
        },
    }
    for message, values in cases.items():
        with pytest.raises(InputError) as told:
            Settings.from_dict(values)
        assert str(told.value) == message


@pytest.mark.parametrize("method", METHODS)
def test_a_run_comes_back_with_all_options_in_its_config(method: str) -> None:
    settings = Settings(method=method)
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_whether_an_option_does_nothing_is_said_in_its_help_where_it_is_not_refused() -> None:
    helps = {name: Settings.__dataclass_fields__[name].metadata["help"] for name in ("pca", "whiten")}
    assert "deepcluster-v2: with --whiten" in helps["pca"]
    assert "deepcluster always whitens" in helps["whiten"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": V2, "head_lr": 0.3}, "head_lr=0.3 goes only with --method deepcluster"),
    ({"recipe": "v2-small-set", "head_momentum": 0.9}, "head_momentum=0.9 goes only with --method deepcluster"),
    ({"method": V2, "memory": "8G"}, "memory=8G goes only with --method deepcluster"),
    ({"temperature": 0.2}, "temperature=0.2 goes only with --method deepcluster-v2"),
    (
        {"recipe": "v2-small-set", "method": FIRST},
        "recipe=v2-small-set does not go with method=deepcluster; use --recipe auto",
    ),
    ({"recipe": "small-set", "method": V2}, "recipe=small-set does not go with method=deepcluster-v2; use --recipe auto"),
    ({"recipe": "paper-vgg16", "method": "deepcluter"}, "unknown method 'deepcluter' (did you mean deepcluster?)"),
    ({"recipe": "v2-small", "method": FIRST}, "unknown recipe 'v2-small'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_the_command_line_and_python_say_the_same_in_their_words_before_they_look_at_an_image(
    options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, out = tmp_path / "missing", tmp_path / "run"
    with pytest.raises(InputError) as told:
        deepcluster.train(missing, out=out, **options)
    assert message in str(told.value)
    words = [word for name, value in options.items() for word in (flag(name), str(value))]
    assert main(["train", str(missing), "--out", str(out), *words]) == 2
    typed = re.sub(r"\b(\w+)=", lambda option: f"{flag(option[1])} ", str(told.value))
    assert capsys.readouterr().err == f"deepcluster: {typed}\n"
    assert not out.exists()
