"""Who reads the messages: users of the command line, or of a notebook, where options are arguments."""

import re
import sys
from typing import Any

# Options that are switches on the command line.
_SWITCHES = ("resume", "overwrite", "parts", "watch", "show", "fast", "copy", "add")
_FLAG = re.compile(r"(?<![\w-])--(no-)?([a-z][a-z0-9-]*)(?:[ =](\d[\d.,]*(?!\w)|[A-Z][A-Z0-9_]*\b))?")


def notebook() -> Any:
    """Return the shell of the notebook that shows the standard output of this process; None where there is none."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    # Output that is captured, as by `%%capture` or `redirect_stdout`, is wanted as text.
    is_shown = type(sys.stdout).__module__.startswith(("ipykernel", "pyodide_kernel", "google.colab"))
    return shell if is_shown and getattr(shell, "kernel", None) is not None else None


def in_python(text: str) -> str:
    """Return a message with options as Python has them: `resume=True` for `--resume`, `epochs=9` for `--epochs 9`."""

    def argument(match: re.Match[str]) -> str:
        negative, name, value = match[1], match[2].replace("-", "_"), match[3]
        if negative:
            return f"{name}=False" + (f" {value}" if value else "")
        if name in _SWITCHES:
            return f"{name}=True" + (f" {value}" if value else "")
        return f"{name}={value}" if value else name

    return _FLAG.sub(argument, text).replace("the same command", "the same call")
