"""Pages of the command line's reference, made from the commands themselves."""

import re
from collections.abc import Iterator
from pathlib import Path

import click

from deepcluster.cli import cli

DOCS = Path(__file__).resolve().parents[1]
# A page that a text names.
PAGE = re.compile(r"\bdocs/(\w[\w-]*)\.md\b")


def command_pages() -> dict[str, str]:
    """Return the Markdown of a page for each command, by file name, and of the list of all (`index.md`)."""
    context = click.Context(cli, info_name="deepcluster")
    rows = [f"| [`deepcluster {name}`]({name}.md) | {_escape(one.get_short_help_str(200))} |" for name, one in _sorted(cli)]
    intro = [
        "# Commands",
        _prose(cli.help),
        "\n".join(["| command | what it does |", "|---|---|", *rows]),
        "`deepcluster COMMAND --help` prints the same in a terminal. Exit status: 0, 1 (an error), 2 (wrong input), or 128 "
        "+ the number of a signal: 130 (Ctrl-C), 143 (SIGTERM), 129 (a closed terminal), 141 (the output is a closed pipe).",
        "## Options of deepcluster",
        "\n\n".join(_options(cli, context, "deepcluster", None)),
    ]
    pages = {"index.md": "\n\n".join(intro)}
    for name, command in _sorted(cli):
        pages[f"{name}.md"] = "\n\n".join(_page(command, click.Context(command, context, info_name=name)))
    return {name: f"{text}\n" for name, text in pages.items()}


def option_anchor(command: str, option: str) -> str:
    """Return the anchor of an option: `train`, `--epochs` → `train--epochs`."""
    return f"{command.replace(' ', '-')}{option}"


def _page(command: click.Command, context: click.Context, level: int = 1) -> Iterator[str]:
    path = context.command_path
    yield f"{'#' * level} {path}"
    yield _prose(command.help)
    if isinstance(command, click.Group):
        below = list(_sorted(command))
        yield "\n".join(
            [
                "| command | what it does |",
                "|---|---|",
                *(
                    f"| [`{path} {name}`](#{_slug(path, name)}) | {_escape(one.get_short_help_str(200))} |"
                    for name, one in below
                ),
            ]
        )
        for name, one in below:
            yield from _page(one, click.Context(one, context, info_name=name), level + 1)
        return
    yield f"```text\n{path} {' '.join(command.collect_usage_pieces(context))}\n```"
    yield from _options(command, context, path.removeprefix("deepcluster "), level + 1 if level == 1 else None)


def _options(command: click.Command, context: click.Context, anchor: str, level: int | None) -> Iterator[str]:
    """Give a list of definitions for each section of the options, as `GroupedCommand` prints them.

    Their titles are headings of the level, or bold.
    """
    sections: dict[str, list[str]] = {}
    for option in command.get_params(context):
        record = option.get_help_record(context)
        if record is None or not isinstance(option, click.Option):
            continue
        names, text = record
        spelled = next(name for name in option.opts if name.startswith("--"))
        entry = f"`{names}`{{ #{option_anchor(anchor, spelled)} }}"
        sections.setdefault(getattr(option, "section", "Options"), []).append(f"{entry}\n:   {_help(text)}")
    for title, entries in sections.items():
        if len(sections) > 1:
            yield f"**{title}**" if level is None else f"{'#' * level} {title}"
        yield "\n\n".join(entries)


def _sorted(group: click.Group) -> list[tuple[str, click.Command]]:
    return list(group.commands.items())


def _slug(*words: str) -> str:
    return " ".join(words).replace(" ", "-")


def _help(text: str) -> str:
    """Return the help of an option; other options in it, and its default in brackets at the end, as code."""
    text = _options_as_code(text)
    found = re.fullmatch(r"(.*?)\s*(?<!\])\[([^\[\]]+)\]", text, flags=re.DOTALL)
    return f"{_escape(found[1])} `[{found[2]}]`".strip() if found else _escape(text) or "–"


def _prose(text: str | None) -> str:
    return "\n\n".join(_escape(_options_as_code(" ".join(part.split()))) for part in (text or "").split("\n\n"))


def _options_as_code(text: str) -> str:
    return re.sub(r"(?<![\w`-])(--[a-z][\w-]*)(?![^\[]*\]$)", r"`\1`", text)


def _escape(text: str) -> str:
    """Return text as Markdown: words in backticks stay code, pages become links."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [part if part.startswith("`") else re.sub(r"([\\*_{}\[\]<>#|])", r"\\\1", part) for part in parts]
    return re.sub(
        PAGE,
        lambda page: f"[{page[1]}](../../{page[1]}.md)" if (DOCS / f"{page[1]}.md").exists() else page[1],
        "".join(plain),
    )
