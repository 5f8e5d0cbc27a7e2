"""Who reads the messages: users of the command line, or of Python, for whom options are arguments and commands are calls."""

import json
import re
import shlex
import sys
from typing import Any

# Options that are switches on the command line.
_SWITCHES = ("resume", "overwrite", "parts", "watch", "show", "fast", "copy", "add", "dry_run", "fold_sobel")
# Quoted words stay as they are, and so do flags after the name of a program or a file: they are of that.
_KEPT = r"""(?<!\w)'[^']*'(?!\w)|"[^"]*"|`[^`]*`|(?:pip install|torchrun|deepcluster [a-z-]+|\S*[/\\]\S*[^\s:;,]) --\S+"""
_END = r"(?=[\s,;:)\]]|\.(?:\s|$)|$)"
_FLAG = re.compile(
    rf"{_KEPT}|(?<![\w-])--(no-)?([a-z][a-z0-9-]*)(?:(?:[ =](\d[\d.,]*|[A-Z][A-Z0-9_]*(?:\.\w+)?))?{_END}|(?==))"
)
# Commands that are functions, and how many arguments without a name they take; the last one takes a list, too.
_CALLS = {"assign": 2, "cluster": 2, "embed": 2, "evaluate": 2, "report": 1, "train": 1}
_WORD = r"""(?:'[^']*'|"[^"]*"|[^\s'"\\])+?(?=[;,)]?(?:\s|$))"""
_COMMAND = re.compile(rf"(?<![\w/.-])deepcluster ({'|'.join(_CALLS)})((?: {_WORD})+)")

_command_line = False


def notebook() -> Any:
    """Return the shell of the notebook that shows the standard output of this process; None where there is none."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    # Output that is captured, as by `%%capture` or `redirect_stdout`, is wanted as text.
    is_shown = type(sys.stdout).__module__.startswith(("ipykernel", "pyodide_kernel", "google.colab"))
    return shell if is_shown and getattr(shell, "kernel", None) is not None else None


def on_command_line() -> None:
    """Note that this process is a command: its messages name options as they are typed."""
    global _command_line
    _command_line = True


def writes_python() -> bool:
    """Return whether the user writes Python: in a notebook, at a prompt, or as a script `NAME.py`."""
    if hasattr(sys, "ps1"):  # Python's own prompt, that of IPython, and notebooks.
        return True
    program = sys.modules.get("__main__")
    is_script = str(getattr(program, "__file__", "")).endswith(".py") and getattr(program, "__spec__", None) is None
    return is_script and not _command_line


def for_user(text: str) -> str:
    """Return a message in the words of whoever reads it."""
    return in_python(text) if writes_python() else text


def in_python(text: str) -> str:
    """Return a message in Python: `resume=True` for `--resume`, `deepcluster.report("run")` for `deepcluster report run`."""

    def argument(match: re.Match[str]) -> str:
        if match[2] is None:
            return match[0]
        negative, name, value = match[1], match[2].replace("-", "_"), match[3]
        if negative:
            return f"{name}=False" + (f" {value}" if value else "")
        if name in _SWITCHES:
            return f"{name}=True" + (f" {value}" if value else "")
        return f"{name}={value}" if value else name

    text = _COMMAND.sub(lambda match: _call(match[1], shlex.split(match[2])), text)
    return _FLAG.sub(argument, text).replace("the same command", "the same call")


def _call(name: str, words: list[str]) -> str:
    """Return the call that does what a command does."""
    given, options, most = list[str](), list[str](), _CALLS[name]
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            given.append(_value(word))
        elif words and not words[0].startswith("--"):
            options.append(f"{word[2:].replace('-', '_')}={_value(words.pop(0))}")
        else:
            options.append(f"{word[2:].replace('-', '_')}=True")
    if len(given) > most:
        given[most - 1 :] = [f"[{', '.join(given[most - 1 :])}]"]
    return f"deepcluster.{name}({', '.join([*given, *options])})"


def _value(word: str) -> str:
    """Return a word of a command in Python; words in capital letters stand for something."""
    return word if re.fullmatch(r"[A-Z][A-Z0-9_]*|\d+", word) else json.dumps(word, ensure_ascii=False)
