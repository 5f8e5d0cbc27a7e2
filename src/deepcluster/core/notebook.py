"""Lines and progress in a notebook: one output that updates in place, instead of a wall of lines.

Lines that begin with blanks are details of the line before, and are folded. Rows of a table are shown as one.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from deepcluster.core.html import FAINT, bar, block, folded, line, safe, table
from deepcluster.core.text import as_row, duration, rate_of
from deepcluster.core.wording import in_python

# Seconds between updates, and before a bar is shown at all: short work shows none.
UPDATE_SECONDS, DELAY_SECONDS = 0.25, 0.3
SHOWN_ROWS, LONGEST_LINE = 12, 160


class NotebookDisplay:
    """What one piece of work has said, as one output of a cell.

    Args:
        shell: the shell of the notebook.
    """

    def __init__(self, shell: Any) -> None:
        self.shell, self.cell = shell, shell.execution_count
        self._parts: list[
            tuple[str, Any]
        ] = []  # ("line", text), ("details", list of text), ("row", cells), ("warning", text)
        self._bar: tuple[str, int, int | None, str, float] | None = None
        self._last = ""  # The last bar, for work that says nothing else.
        self._handle: Any = None
        self._updated = 0.0

    def is_current(self) -> bool:
        """Return whether its cell is still the one that runs."""
        return bool(self.shell.execution_count == self.cell)

    def say(self, text: str) -> None:
        """Show a line."""
        text = in_python(text)
        if text.startswith("  ") and self._parts and self._parts[-1][0] in ("line", "details"):
            if self._parts[-1][0] == "line":
                self._parts.append(("details", []))
            self._parts[-1][1].append(text.strip())
        else:
            self._parts.append(("line", text))
        self.update()

    def row(self, cells: Mapping[str, str]) -> None:
        """Show a row of a table."""
        self._parts.append(("row", dict(cells)))
        self.update()

    def warn(self, text: str) -> None:
        """Show a warning."""
        self._parts.append(("warning", in_python(text)))
        self.update()

    def progress(self, what: str, done: int, total: int | None, unit: str, started: float) -> None:
        """Show how far work is, unless that was shown just now."""
        self._bar, now = (what, done, total, unit, started), time.monotonic()
        if now - max(self._updated + UPDATE_SECONDS - DELAY_SECONDS, started) > DELAY_SECONDS:
            self.update()

    def end_progress(self) -> None:
        """Remove the bar; work that has said nothing leaves a line."""
        if self._bar is not None:
            what, done, _, unit, started = self._bar
            self._last = f"{what}: {done:,} {unit} in {duration(time.monotonic() - started)}"
            self._bar = None
            if self._handle is not None:
                self.update()

    def update(self) -> None:
        """Send the output to the notebook."""
        self._updated = time.monotonic()
        bundle = {"text/html": self.html(), "text/plain": self.text()}
        with suppress(Exception):  # A kernel that is being shut down.
            if self._handle is None:
                self._handle = import_module("IPython.display").display(bundle, raw=True, display_id=True)
            else:
                self._handle.update(bundle, raw=True)

    def html(self) -> str:
        """Return the output as HTML."""
        parts, rows = list[str](), list[dict[str, str]]()
        # The table of rows stands where the last row is, and lines between rows before it.
        last_row = max((number for number, (kind, _) in enumerate(self._parts) if kind == "row"), default=-1)
        for number, (kind, content) in enumerate(self._parts):
            if kind == "row":
                rows.append(content)
                if number == last_row:
                    parts.append(_table(rows))
            elif kind == "details":
                parts[-1] = folded(self._parts[number - 1][1], *(line(f"· {one}", faint=True) for one in content))
            elif kind == "warning":
                parts.append(f'<div style="color:#c60">⚠ {safe(content)}</div>')
            else:
                short = content if len(content) <= LONGEST_LINE else content[:LONGEST_LINE].rsplit(" ", 1)[0] + " …"
                parts.append(line(short) if short == content else folded(short, line(content, faint=True)))
        if self._bar is not None:
            parts.append(_bar(*self._bar))
        elif not parts and self._last:
            parts.append(line(self._last, faint=True))
        return block(*parts)

    def text(self) -> str:
        """Return the output as plain text, for programs that show no HTML."""
        lines = []
        for kind, content in self._parts:
            if kind == "row":
                lines.append(as_row(content))
            elif kind == "details":
                lines += [f"  {one}" for one in content]
            else:
                lines.append(f"warning: {content}" if kind == "warning" else content)
        if self._bar is not None:
            what, done, total, *_ = self._bar
            lines.append(f"{what} {done:,}" + ("" if total is None else f"/{total:,}"))
        elif not lines and self._last:
            lines.append(self._last)
        return "\n".join(lines)


def _table(rows: list[dict[str, str]]) -> str:
    """Return the last rows; all are in `Run.metrics`."""
    hidden = len(rows) - SHOWN_ROWS
    note = f'<div style="{FAINT}">… {hidden:,} earlier</div>' if hidden > 0 else ""
    return note + table(rows[-SHOWN_ROWS:])


def _bar(what: str, done: int, total: int | None, unit: str, started: float) -> str:
    seconds = max(1e-9, time.monotonic() - started)
    rate = done / seconds
    counted = f"{done:,}" if total is None else f"{done:,}/{total:,}"
    left = f", {duration((total - done) / rate)} left" if total is not None and rate else ""
    text = f'<span style="{FAINT}">{safe(f"{counted}, {rate_of(rate, unit)}{left}" if done else counted)}</span>'
    drawn = "" if not total else bar(done / total, width="200px") + " "
    return f'<div style="font-variant-numeric:tabular-nums">{drawn}{safe(what)} {text}</div>'
