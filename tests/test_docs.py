"""The pages: every command and every line of Python on them is run, or at least checked, or says why not."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest
from snippets import PAGES, ROOT, blocks, check_command, check_python, command_lines
from torch.distributed.run import get_args_parser

from deepcluster.cli import cli

LANGUAGES = {"bash", "python", "text", "bibtex"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_python_of_a_page_exist(page: Path) -> None:
    wrong = []
    for block in blocks(page):
        if block.not_run is not None:
            continue
        if block.language not in LANGUAGES:
            wrong.append(f"{block}: a block in {block.language or 'no language'}; one of {', '.join(sorted(LANGUAGES))}")
        elif block.language == "python":
            wrong += [f"{block}: {fault}" for fault in [check_python(block.text)] if fault]
        elif block.language == "bash":
            for words in command_lines(block.text):
                wrong += [f"{block}: {fault}: {' '.join(words)}" for fault in [check_command(words)] if fault]
        elif any(line.startswith("deepcluster ") for line in block.text.splitlines()):
            wrong.append(f"{block}: a command in a block of text")
    assert not wrong, "\n".join(wrong)


def options_of(group: click.Group) -> Iterator[str]:
    for command in group.commands.values():
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)
        if isinstance(command, click.Group):
            yield from options_of(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_a_page_names_exist(page: Path) -> None:
    """Options in the text, between backticks: ours, or those of the programs that a page is about."""
    if page.name in ("migrating.md", "benchmarks.md"):
        pytest.skip("it names the options of many programs")
    others = {"--help", "--version", "--force-directories", "--signal"}
    launcher = {option for action in get_args_parser()._actions for option in action.option_strings}
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = {option for code in re.findall(r"`([^`]+)`", text) for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
    assert named <= {*options_of(cli), *launcher, *others}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_and_tables_mean_the_same_on_the_site(page: Path) -> None:
    """The site's Markdown nests by four spaces, GitHub's by two; a list or table needs an empty line before it."""
    lines, in_code = page.read_text(encoding="utf-8").splitlines(), False
    for number, (before, line) in enumerate(pairwise(lines), 2):
        where = f"{page.name}:{number}: {line}"
        in_code ^= line.lstrip().startswith("```")
        if in_code and not line.lstrip().startswith("```"):
            continue
        assert not re.match(r" {1,3}(```|[-*] |\d+\. |\|)", line), where
        assert not re.match(r" {1,3}\S", line) or before.strip(), where
        if re.match(r"([-*] |\|)", line) and before.strip():
            assert re.match(r"([-*] |\d+\. |\|| )", before), where
