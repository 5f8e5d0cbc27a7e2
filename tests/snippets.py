"""The blocks of code on the pages, and checks of commands and Python that do not run them."""

import ast
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import click
from torch.distributed.run import get_args_parser

import deepcluster
from deepcluster.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("deepcluster", "python", "pip", "torchrun", "make", ".venv/bin/python")
_FENCE = re.compile(r"^( *)```([\w-]*)$")
_MARK = re.compile(r"^ *<!-- not run: (\S.*) -->$")


@dataclass(frozen=True)
class Block:
    """A block of code: its page, first line, language, text, and why it is not run, if the page says so."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page: between fences, and those indented by four spaces outside of lists."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, number = [], 0
    while number < len(lines):
        begin = number
        if fence := _FENCE.match(lines[begin]):
            number += 1
            while lines[number].strip() != "```":
                number += 1
            text = [line.removeprefix(fence[1]) for line in lines[begin + 1 : number]]
            found.append(Block(page, begin + 1, fence[2], "\n".join(text), _mark(lines, begin)))
        elif lines[begin].startswith("    ") and not _in_list(lines, begin) and not (begin and lines[begin - 1].strip()):
            while number + 1 < len(lines) and (lines[number + 1].startswith("    ") or not lines[number + 1].strip()):
                number += 1
            text = [line.removeprefix("    ") for line in lines[begin : number + 1]]
            language = "bash" if text[0].split()[0] in SHELL else "text"
            found.append(Block(page, begin + 1, language, "\n".join(text).rstrip(), _mark(lines, begin)))
        number += 1
    return found


def _mark(lines: list[str], begin: int) -> str | None:
    before = next((line for line in reversed(lines[:begin]) if line.strip()), "")
    found = _MARK.match(before)
    return found[1] if found else None


def _in_list(lines: list[str], number: int) -> bool:
    outer = next((line for line in reversed(lines[:number]) if line.strip() and not line.startswith("  ")), "")
    return re.match(r"[-*] |\d+\. |: {3}|!!!|\?\?\?|===", outer) is not None


def command_lines(text: str) -> Iterator[list[str]]:
    """Give the words of each command of a shell block, without comments, `&` and variables before it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and (re.fullmatch(r"\w+=\S*", words[0]) or words[-1] == "&"):
            words = words[1:] if re.fullmatch(r"\w+=\S*", words[0]) else words[:-1]
        if words:
            yield words


def check_command(words: list[str]) -> str | None:
    """Return what is wrong with a command, or None."""
    match words:
        case ["deepcluster", *rest]:
            return _check_click(rest)
        case ["torchrun", *rest]:
            try:
                parsed = get_args_parser().parse_args(rest)
            except SystemExit:
                return "torchrun does not take these options"
            return check_command(
                ["python", *(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args]
            )
        case [("python" | ".venv/bin/python"), "-m", "deepcluster", *rest]:
            return _check_click(rest)
        case [("python" | ".venv/bin/python"), "-m", module, *rest]:
            return _check_module(module, rest)
        case ["python", script, *rest] if (ROOT / script).is_file():
            return _named_in((ROOT / script).parent, script, rest)
        case ["make", *rest]:
            targets = [word for word in rest if "=" not in word]
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            return next((f"no target {one}" for one in targets if not re.search(rf"^{one}:", makefile, re.MULTILINE)), None)
        case ["pip", "install", *packages]:
            return next((f"no extra of {one}" for one in packages if not _is_package(one)), None)
        case ["git", "clone", *_] | ["cd", _] | ["pre-commit", *_]:
            return None
    return f"neither a command that is known here nor marked as not run: {words[0]}"


def _check_click(words: list[str]) -> str | None:
    """Parse a command line of ours as the command would, without running it."""
    command: click.Command = cli
    try:
        while isinstance(command, click.Group):
            context = command.make_context("deepcluster", words)
            name, below, words = command.resolve_command(context, context._protected_args + context.args)
            assert below is not None and name is not None
            command = below
        command.make_context(command.name, words)
    except click.exceptions.Exit:  # --help and --version are all there is to do.
        return None
    except click.ClickException as fault:
        return fault.format_message()
    return None


def _check_module(module: str, words: list[str]) -> str | None:
    if module == "pytest":
        files = [word for word in words if word.endswith(".py")]
        return next((f"no file {one}" for one in files if not (ROOT / one).is_file()), None)
    found = import_module(module)
    folder = Path(str(found.__file__)).parent
    return _named_in(folder, module, words)


def _named_in(folder: Path, name: str, words: list[str]) -> str | None:
    """Return which option of a script no Python file beside it names, or None."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    return next((f"{name} has no {one}" for one in options if one not in source), None)


def _is_package(word: str) -> bool:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found = re.fullmatch(r"(?:\.|deepcluster|dist/\S+)\[([\w,-]+)\]", word)
    return set(found[1].split(",")) <= set(extras) if found else not word.startswith("-") or word in ("--editable", "-e")


def check_python(code: str) -> str | None:
    """Return what is wrong with Python: its grammar, names of ours that do not exist, arguments they do not take."""
    try:
        tree = ast.parse(code)
    except SyntaxError as fault:
        return str(fault)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepcluster":
            module = import_module(str(node.module))
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            if missing:
                return f"{node.module} has no {', '.join(missing)}"
        if isinstance(node, ast.Attribute) and _is_ours(node) and not hasattr(deepcluster, node.attr):
            return f"deepcluster has no {node.attr}"
        if isinstance(node, ast.Call) and _is_ours(node.func) and (wrong := _wrong_argument(node)):
            return wrong
    return None


def _is_ours(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "deepcluster"


def _wrong_argument(call: ast.Call) -> str | None:
    assert isinstance(call.func, ast.Attribute)
    takes = inspect.signature(getattr(deepcluster, call.func.attr)).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values()):
        return None
    known = {*takes, *(one.name for one in fields(deepcluster.Settings) if call.func.attr == "train")}
    unknown = [word.arg for word in call.keywords if word.arg and word.arg not in known]
    return f"deepcluster.{call.func.attr} takes no {', '.join(unknown)}" if unknown else None
