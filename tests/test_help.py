"""The help of the commands: every option with its default, what auto may choose, and no sentence that is cut off."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest

from deepcluster.cli import cli, main
from deepcluster.core.options import flag
from deepcluster.data.survey import Survey
from deepcluster.models.archs import ARCHITECTURES
from deepcluster.run.auto import choose_settings
from deepcluster.run.settings import ADAPTED, METHODS, Settings

SETS = [
    Survey(1_281_167, 375, 0.02),
    Survey(4_500, 224, 0.02),
    Survey(300, 600, 0.0),
    Survey(100_000, 300, 0.0),
    Survey(20_000, 32, 0.0),
    Survey(1_797, 8, 1.0),
]


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*command, "--help"]) == 0
    return " ".join(capsys.readouterr().out.split())


def commands(group: click.Group, *names: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*names, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *names, name)


def in_help(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_every_setting_is_there_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("train", capsys=capsys)
    places = [text.index("Method:")]
    for setting in fields(Settings):  # In their order.
        option = f"{flag(setting.name)}/" if isinstance(setting.default, bool) else f"{flag(setting.name)} "
        places.append(text.index(option, places[-1]))
    places = [*places[1:], len(text)]
    for setting, begin, end in zip(fields(Settings), places[:-1], places[1:], strict=True):
        known = setting.default not in (None, "", ())
        if setting.name in ADAPTED:
            wanted = f"[auto; paper: {in_help(setting.default)}]" if known else "[auto]"
        else:
            wanted = f"[{in_help(setting.default)}]" if known else ""
        assert wanted in text[begin:end], setting.name
        for old in setting.metadata["aliases"]:
            assert f"{old} " not in text


def test_brackets_say_auto_where_auto_chooses() -> None:
    """For every kind of images, method, trunk and device: what auto changes is named, and nothing else."""
    changed = set[str]()
    for sample in SETS:
        for method in METHODS:
            for device in ("cpu", "cuda"):
                for arch in (None, *ARCHITECTURES):
                    user_options = {"method": method, **({"arch": arch} if arch else {})}
                    settings, changes = choose_settings(user_options, sample, device=device)
                    assert {change.option for change in changes} <= ADAPTED
                    changed |= {name for name in ADAPTED if getattr(settings, name) != getattr(Settings(), name)}
    # The paper's own values of DeepCluster-v2 are those that `v2-resnet50` sets.
    assert ADAPTED - changed <= {"projection", "small_crop_scale"}


@pytest.mark.parametrize(
    "path, command", list(commands(cli)), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_lists_of_commands_cut_no_sentence(path: tuple[str, ...], command: click.Command) -> None:
    assert command.short_help or (command.help or "").count("\n") == 0
    assert "..." not in command.get_short_help_str(limit=54)


@pytest.mark.parametrize("width", [80, 120])
def test_the_first_help_fits_lines(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert len(lines) == len(cli.commands) and all(re.match(r"  \w+ +\w[^.]+\.$", line) for line in lines)


def test_choices_are_named_instead_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("train", capsys=capsys)
    assert "--method [deepcluster|deepcluster-v2] " in text
    assert "--optimizer [sgd|lars] " in text
    assert "--recipe NAME " in text and ": auto, paper-alexnet, " in text
    assert "--start [k-means++|random] " in help_of("evaluate", "clusters", capsys=capsys)


@pytest.mark.parametrize("arguments", [["train"], ["embed", "run"], ["evaluate", "knn"], ["visualize", "filters"]])
def test_a_missing_argument_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    names = " ".join(word for word in arguments if word != "run")
    assert "Missing" in said and f"Usage: deepcluster {names} [OPTIONS]" in said and said.count("\n") == 1


def test_a_network_that_is_not_known_names_the_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "untrained:foo"]) == 2
    said = capsys.readouterr().err
    for name in (*ARCHITECTURES, "torchvision:NAME", "timm:NAME", "a run folder"):
        assert name in said


def test_packages_that_messages_advise_are_those_of_the_extras() -> None:
    """No project of our name is on an index: a stranger could take it."""
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    known = {re.split("[>=]", one)[0] for extra in extras.values() for one in extra} | {
        "fiftyone",
        "embedding-atlas",
        "mlflow",
        "wandb",
    }
    advised = set[str]()
    for path in (*(root / "src").rglob("*.py"), *root.glob("*.md"), *(root / "docs").rglob("*.md")):
        if path.name == "CHANGELOG.md":
            continue
        for words in re.findall(r"pip install (?!\{|'?\.|--)([\w\[\]'\- ]+)", path.read_text(encoding="utf-8")):
            advised |= {word.strip("'") for word in words.split(" to read it")[0].split()}
    assert {"timm", "safetensors", "pillow-heif", "plotly", "tensorboard", "fsspec[http]"} <= advised
    assert advised <= known | {"pyarrow", "pillow"}, advised - known
