"""Options of the commands: derived from the fields of dataclasses, or shared by several commands."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import click

from deepcluster.core.options import flag, parts_of, plain_type, takes_several
from deepcluster.core.text import visible

SECTION_TITLES = {
    "method": "Method",
    "trunk": "Trunk",
    "clustering": "Clustering (steps 1 to 4)",
    "training": "Training (step 5)",
    "run": "Run",
}

# Choices of more letters are listed in the help of their option.
LONGEST_METAVAR = 40


class Numbers(click.ParamType[tuple[Any, ...]]):
    """Numbers separated by commas: `count` of them, or any number; `or_one`: a single one stays a number."""

    def __init__(self, part: type, count: int | None, *, or_one: bool = False) -> None:
        self.part, self.count, self.or_one = part, count, or_one
        self.name = "LOW,HIGH" if count == 2 else "NUMBERS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`0.2,1` → (0.2, 1.0)."""
        try:
            numbers = tuple(self.part(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or len(numbers) != (self.count or len(numbers)):
            pair = "two numbers separated by a comma, such as 0.2,1"
            what = pair if self.count == 2 else f"{self.count or ''} numbers separated by commas".lstrip()
            self.fail(f"{value!r} should be {what}")
        return numbers[0] if self.or_one and len(numbers) == 1 else numbers


class GroupedCommand(click.Command):
    """A command whose help shows the options of each section of the settings under a title."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options section by section, in the order of the settings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            row = option.get_help_record(ctx)
            if row is not None and isinstance(option, click.Option):
                sections.setdefault(getattr(option, "section", "Options"), []).append(row)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class SettingOption(click.Option):
    """An option derived from a field of a dataclass. Its old names work and are not shown."""

    def __init__(self, owner: type, setting: Any) -> None:
        wanted, _ = plain_type(owner, setting.name)
        name, text, metavar = flag(setting.name), setting.metadata["help"], None
        if choices := setting.metadata["choices"]:
            metavar = f"[{'|'.join(choices)}]"
            if len(metavar) > LONGEST_METAVAR:
                text, metavar = f"{text}: {', '.join(choices)}", "NAME"
        default = None if setting.default in (None, (), "") else _shown(setting.default)
        if setting.name in getattr(owner, "adapted", ()):
            text += f"  [auto{f'; paper: {default}' if default else ''}]"
        elif default:
            text += f"  [{default}]"
        is_flag = wanted is bool
        spelled = f"{name}/--no-{name[2:]}" if is_flag else name
        kind: Any = None if is_flag else wanted
        if wanted is tuple:
            kind = Numbers(*parts_of(owner, setting.name))
        elif takes_several(owner, setting.name):
            kind = Numbers(wanted, None, or_one=True)
        names = [setting.name, spelled, *setting.metadata["aliases"]]
        super().__init__(names, type=kind, default=None, help=text, metavar=metavar)
        self.section = SECTION_TITLES.get(setting.metadata["section"], "Protocol")
        self.shown_name = spelled

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the name, without the old ones, and the help."""
        metavar = "" if self.is_flag else f" {self.make_metavar(ctx)}"
        return self.shown_name + metavar, self.help or ""


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def with_settings(owner: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add an option for each field of a dataclass of options."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        options = [SettingOption(owner, setting) for setting in fields(owner)]
        command.__click_params__ = [*reversed(options), *getattr(command, "__click_params__", [])]  # type: ignore[attr-defined]
        return command

    return add


def as_typed(message: str, command: click.Command) -> str:
    """Return a message with options as they are typed, `--name value` for the `name=value` of Python."""
    names = {parameter.name for one in _all_commands(command) for parameter in one.params if parameter.name}
    return re.sub(
        r"(?<!\S)([a-z][a-z0-9_]*)=(?=\S)",
        lambda found: f"{flag(found[1])} " if found[1] in names else found[0],
        message,
    )


def _all_commands(command: click.Command) -> Iterator[click.Command]:
    yield command
    for one in command.commands.values() if isinstance(command, click.Group) else ():
        yield from _all_commands(one)


def user_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return what the user set."""
    return {name: value for name, value in options.items() if value is not None}


def started_ranks() -> int:
    """Return the number of processes that `torchrun` started, as `core.distributed` does, without torch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def echo(text: str) -> None:
    """Print lines; control characters of names in them are escaped."""
    click.echo(visible(text, lines=True))


def verbosity_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--quiet` and `--verbose`, which every command has."""
    quiet = click.option("-q", "--quiet", is_flag=True, help="print only warnings and errors")
    return quiet(click.option("-v", "--verbose", is_flag=True, help="print more, and the traceback of an error")(command))


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the device, and the number of threads."""
    text = "processes that prepare images (default: one per core, at most 16)"
    command = click.option("--workers", type=click.IntRange(min=0), help=text)(command)
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps")(command)


def batch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add how images are read, the same in `embed` and `assign`."""
    command = click.option("--limit", type=int, help="use only this many images, spread evenly over the data")(command)
    text = "images per batch"
    command = click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help=text)(command)
    return device_options(command)
