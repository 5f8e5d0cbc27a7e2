"""Settings: typed, validated, and the same for the command line, Python and config.json."""

import enum
import inspect
import json
import re
import typing
from dataclasses import MISSING, FrozenInstanceError, dataclass, fields
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import deepcluster
from deepcluster.cli import main
from deepcluster.cli.options import with_settings
from deepcluster.core import options
from deepcluster.core.errors import InputError
from deepcluster.core.options import coerce, flag, parts_of, plain_type
from deepcluster.models.archs import ARCHITECTURES
from deepcluster.run import settings as config
from deepcluster.run.recipes import RECIPES
from deepcluster.run.settings import REMOVED, Settings, size_in_bytes

OPTIONS = {option.name: option for option in fields(Settings)}


def complaint(**values: Any) -> str:
    with pytest.raises(InputError) as caught:
        Settings(**values)
    return str(caught.value)


def test_the_keyword_arguments_of_train_are_the_settings() -> None:
    """With types and defaults, as editors and `help` show them; nothing lists them a second time."""
    own = inspect.signature(deepcluster.train).parameters
    hints = typing.get_type_hints(Settings)
    assert list(own)[-len(OPTIONS) :] == list(OPTIONS)
    for name, option in OPTIONS.items():
        assert (own[name].default, own[name].annotation) == (option.default, hints[name])
        assert own[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_defaults_are_those_of_the_paper() -> None:
    usual = Settings()
    assert (usual.arch, usual.sobel, usual.dropout, usual.image_size) == ("alexnet", True, 0.5, 224)
    assert (usual.clusters, usual.pca, usual.kmeans_iterations, usual.reassign_every) == (10_000, 256, 20, 1)
    assert (usual.batch_size, usual.lr, usual.momentum, usual.weight_decay) == (256, 0.05, 0.9, 1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_a_default_a_help_and_a_group(name: str) -> None:
    option = OPTIONS[name]
    assert option.default is not MISSING
    assert len(option.metadata["help"]) > 5
    assert option.metadata["section"] in ("method", "trunk", "clustering", "training", "run")
    assert all(alias.startswith("--") for alias in option.metadata["aliases"])
    assert flag(name).startswith("--") and "_" not in flag(name)


def test_the_names_of_trunks_and_recipes_are_those_that_exist() -> None:
    assert config.ARCHITECTURES == ARCHITECTURES
    assert set(config.RECIPES) == {"auto", *RECIPES}


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"auto"}))
def test_every_recipe_is_valid(name: str) -> None:
    assert Settings.from_dict({"recipe": name, **RECIPES[name].settings}).recipe == name


@pytest.mark.parametrize("name", [name for name in OPTIONS if OPTIONS[name].metadata["at_least"] is not None])
def test_a_value_below_its_range_is_refused(name: str) -> None:
    least = OPTIONS[name].metadata["at_least"]
    wanted, _ = plain_type(Settings, name)
    if wanted is tuple:
        part, count = parts_of(Settings, name)
        count = count or 1
        # Projections are of deepcluster-v2, second cosines of the schedule of that name.
        method = {"method": "deepcluster-v2", "lr_schedule": "cosine"}
        assert getattr(Settings(**method, **{name: (part(least),) * count}), name) == (least,) * count
        assert f"{name}={part(least - 1)} is too small" in complaint(**{name: (part(least - 1),) * count})
        return
    assert getattr(Settings(**{name: wanted(least)}), name) == least
    message = complaint(**{name: wanted(least - 1)})
    assert message == f"{name}={wanted(least - 1)} is too small; use {least:g} or more"


@pytest.mark.parametrize("name", [name for name in OPTIONS if OPTIONS[name].metadata["below"] is not None])
def test_a_value_above_its_range_is_refused(name: str) -> None:
    limit = OPTIONS[name].metadata["below"]
    value = plain_type(Settings, name)[0](limit)
    assert complaint(**{name: value}) == f"{name}={value} is too large; use less than {limit:g}"


@pytest.mark.parametrize("name", [name for name in OPTIONS if OPTIONS[name].metadata["choices"]])
def test_a_choice_that_does_not_exist_names_the_nearest(name: str) -> None:
    for choice in OPTIONS[name].metadata["choices"]:
        beside = {"super_clusters": 4} if choice == "hierarchical" else {}
        assert getattr(Settings(**{name: choice, **beside}), name) == choice
        message = complaint(**{name: choice + "x"})
        assert message.startswith(f"unknown {name} '{choice}x' (did you mean {choice}?): use one of ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory": "8X"}, "memory='8X' is not a size: use auto, or a number with K, M, G or T, such as 8G or 500M"),
        ({"memory": "0"}, "memory='0' is not a size"),
        ({"memory": "-1G"}, "memory='-1G' is not a size"),
        ({"memory": ""}, "memory='' is not a size"),
        ({"memory": 8}, "memory=8 should be of type str"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale=0.5,0.2 must be two shares"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale=0,1 must be two shares"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale=0.5,1.5 must be two shares"),
        ({"grey": 1.5}, "grey=1.5 must lie between 0 and 1"),
        ({"jitter": 2.0}, "jitter=2 must lie between 0 and 1"),
        ({"lr": float("nan")}, "lr=nan must be finite"),
        ({"lr": float("inf")}, "lr=inf must be finite"),
        ({"clusters": 10.5}, "clusters=10.5 should be of type int"),
        ({"clusters": True}, "clusters=True should be of type int"),
        ({"clusters": None}, "clusters=None should be of type int"),
        ({"sobel": 1}, "sobel=1 should be of type bool"),
        ({"lr": "0.05"}, "lr='0.05' should be of type float"),
        ({"arch": 18}, "arch=18 should be of type str"),
        ({"crop_scale": 0.5}, "crop_scale=0.5 should be of type tuple"),
    ],
)
def test_a_wrong_value_is_told_with_its_option(values: dict[str, Any], message: str) -> None:
    assert message in complaint(**values)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("auto", None),
        ("8G", 8 * 10**9),
        ("500M", 5 * 10**8),
        ("1.5 gb", 15 * 10**8),
        ("2T", 2 * 10**12),
        ("1GiB", 1 << 30),
        ("3Ki", 3072),
        ("4096", 4096),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, n_bytes: int | None) -> None:
    assert size_in_bytes("memory", text) == n_bytes
    assert Settings(memory=text).memory == text


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown option 'cluster' \(did you mean clusters\?\)"):
        Settings.from_dict({"cluster": 5})
    with pytest.raises(InputError, match=r"^unknown option 'zzz'$"):
        Settings.from_dict({"zzz": 5})


def test_settings_come_back_from_json() -> None:
    settings = Settings(
        clusters=7, crop_scale=(0.25, 0.5), workers=3, limit=None, sobel=False, lr=1e-3, recipe="small-images"
    )
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings
    assert Settings.from_dict({}) == Settings()


def test_whole_numbers_serve_where_a_fraction_is_wanted() -> None:
    assert isinstance(Settings.from_dict({"lr": 1}).lr, float)
    assert coerce(Settings, "crop_scale", [1, 1]) == (1.0, 1.0)


class Word(enum.StrEnum):
    SGD = "sgd"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(
            (name, kind(0.5), 0.5)
            for name in ("lr", "head_lr")
            for kind in (np.float16, np.float32, np.float64, np.longdouble)
        ),
        *(("clusters", kind(7), 7) for kind in (np.int8, np.uint8, np.int32, np.uint64, np.array, torch.tensor)),
        ("lr", np.int64(1), 1.0),
        ("lr", torch.tensor(0.5), 0.5),
        ("lr", Fraction(1, 2), 0.5),
        ("sobel", np.bool_(False), False),
        ("rotations", np.array(False), False),
        ("arch", np.array(["resnet18"])[0], "resnet18"),
        ("optimizer", Word.SGD, "sgd"),
        ("init", PurePosixPath("runs/one"), "runs/one"),
        ("crop_scale", tuple(np.array([0.25, 1.0])), (0.25, 1.0)),
        ("crop_scale", np.array([0.25, 1.0]), (0.25, 1.0)),
        ("crop_scale", [np.float32(0.25), 1], (0.25, 1.0)),
        ("clusters", [np.int64(4)], 4),
    ],
)
def test_values_are_kept_as_plain_python_types(name: str, value: Any, expected: Any) -> None:
    """By type, not only by value: np.float64 is a float, but no checkpoint that holds one can be loaded."""

    def types_in(values: Any) -> Any:
        return (tuple, *map(type, values)) if isinstance(values, tuple) else type(values)

    for settings in (Settings(**{name: value}), Settings.from_dict({name: value})):
        kept = getattr(settings, name)
        assert kept == expected
        assert types_in(kept) == types_in(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clusters", np.float64(4)),
        ("lr", np.str_("0.1")),
        ("lr", np.array([0.1])),
        ("sobel", np.int64(1)),
        ("clusters", np.True_),
    ],
)
def test_numpy_values_of_another_type_are_refused(name: str, value: Any) -> None:
    assert f"{name}=" in complaint(**{name: value}) and "should be of type" in complaint(**{name: value})


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().clusters = 5  # type: ignore[misc]


# Settings that version 0.1.0 has saved


@pytest.mark.parametrize(
    ("saved", "clustering"),
    [
        ({"clustering": "kmeans", "balance": False, "super_clusters": 0, "look_again": None}, "kmeans"),
        ({"clustering": "kmeans", "balance": True, "super_clusters": 0, "look_again": True}, "balanced"),
        ({"clustering": "kmeans", "balance": False, "super_clusters": 4, "rotations": True}, "hierarchical"),
        ({"clustering": "pic", "balance": False, "head_start": "random"}, "pic"),
        ({"method": "deepcluster-v2", "balance": False, "look_again": None, "whiten": True}, "kmeans"),
    ],
)
def test_settings_of_version_0_1_0_have_new_names(saved: dict[str, Any], clustering: str) -> None:
    settings = Settings.from_saved(saved, resume=True)
    assert settings.clustering == clustering
    assert settings.super_clusters == saved.get("super_clusters", 0)
    assert Settings.from_saved(settings.as_dict(), resume=True) == settings


@pytest.mark.parametrize("saved", [{"head_start": "centroids"}, {"balance": False, "look_again": False}])
def test_a_run_that_depends_on_a_removed_option_can_be_used_but_not_resumed(saved: dict[str, Any]) -> None:
    assert Settings.from_saved(saved) == Settings()
    name = list(saved)[-1]
    with pytest.raises(InputError, match=f"version 0.1.0 with {flag(name)}, which is gone: .* can be used, but not resumed"):
        Settings.from_saved(saved, resume=True)


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_option_says_what_to_use(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=f"option '?{name}'? is gone: {REMOVED[name]}"):
        deepcluster.train("nowhere", **{name: True})
    assert main(["train", "nowhere", flag(name)]) == 2
    assert capsys.readouterr().err == f"deepcluster: {flag(name)} is gone: {REMOVED[name]}\n"


# A new option


@dataclass(frozen=True)
class WithOneMore(Settings):
    sharpness: float = options.option(0.5, "how sharp", section="training", at_least=0, below=1, method="deepcluster-v2")


def test_an_option_is_defined_in_one_place() -> None:
    """Command line, help, bounds, method, saved settings: all are derived from the field."""
    V2: dict[str, Any] = {"method": "deepcluster-v2"}

    @click.command()
    @with_settings(WithOneMore)
    def command(**options: Any) -> dict[str, Any]:
        return options

    given = CliRunner().invoke(command, ["--sharpness", "0.25"], standalone_mode=False).return_value
    assert {name: value for name, value in given.items() if value is not None} == {"sharpness": 0.25}
    assert "how sharp  [0.5]" in CliRunner().invoke(command, ["--help"]).output
    assert WithOneMore.from_dict({**V2, "sharpness": 0.25}).as_dict()["sharpness"] == 0.25
    for values, message in (
        ({**V2, "sharpness": 1.0}, "sharpness=1.0 is too large; use less than 1"),
        ({**V2, "sharpness": "much"}, "sharpness='much' should be of type float"),
        ({"sharpness": 0.25}, "sharpness=0.25 goes only with --method deepcluster-v2"),
        ({**V2, "sharpnes": 0.25}, "unknown option 'sharpnes' (did you mean sharpness?)"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            WithOneMore.from_dict(values)
