"""What the user sees during long work: lines, and a bar with rate and time left; in a notebook one output that updates."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from deepcluster.core.notebook import NotebookDisplay
from deepcluster.core.output import Output
from deepcluster.core.text import as_row, duration, rate_of, visible
from deepcluster.core.wording import for_user, notebook

# Without a terminal, a line at this interval shows that work continues, without filling a log.
PLAIN_LINE_SECONDS = 30.0


class Reporter:
    """Prints lines and progress, and copies the lines to a log file once there is one. Warnings go to the error stream.

    Nothing here raises: what a stream or a full disk does not take is dropped. Control characters are escaped.

    Args:
        quiet: print only warnings.
        verbose: also print what `detail` is given.
        silent: print nothing, as on all processes but the first.
        stream: destination of lines, any object with `write`; by default what the standard output is at the time.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, silent: bool = False, stream: Any = None) -> None:
        self.quiet, self.silent, self.verbose, self.stream = quiet or silent, silent, verbose, stream
        self._log: BinaryIO | None = None
        self._early: list[str] = []
        self._bar: Any = None
        self._display: NotebookDisplay | None = None

    def log_to(self, path: Path) -> None:
        """Append all lines, including earlier ones, to a file from now on.

        Raises:
            OSError: it can't be opened.
        """
        self._log = path.open("ab", buffering=0)
        for line in self._early:
            self._write_log(line)
        self._early.clear()

    def close(self) -> None:
        """Close the log file."""
        if self._log is not None:
            with suppress(OSError):
                self._log.close()
            self._log = None

    def say(self, line: str) -> None:
        """Print a line."""
        self._write(line, show=not self.quiet)

    def row(self, cells: Mapping[str, str]) -> None:
        """Print the cells of a row, by title, as a line; in a notebook the rows are a table."""
        if self._notebook() is None:
            self.say(as_row(cells))
        else:
            self._write(as_row(cells), show=not self.quiet, cells=cells)

    def detail(self, line: str) -> None:
        """Print a line with `--verbose`; the log always has it."""
        self._write(line, show=self.verbose)

    def warn(self, line: str) -> None:
        """Print a warning, even with `--quiet`."""
        self._write(f"warning: {line}", show=True, stream=Output.of(sys.stderr))

    def _write(self, line: str, *, show: bool, stream: Any = None, cells: Mapping[str, str] | None = None) -> None:
        line = visible(line)
        stamped = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}"
        if self._log is None:
            self._early.append(stamped)
        else:
            self._write_log(stamped)
        if not show or self.silent:
            return
        if (display := self._notebook()) is not None:
            if cells is not None:
                display.row(cells)
            elif stream is not None:
                display.warn(line.removeprefix("warning: "))
            else:
                display.say(line)
        elif self._bar is not None:
            self._bar.console.print(for_user(line), markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            self._output(stream).line(for_user(line))

    def _write_log(self, line: str) -> None:
        if self._log is not None:
            with suppress(OSError):  # A full disk: the next checkpoint, which matters, will meet it as well.
                self._log.write(line.encode() + b"\n")

    def _output(self, stream: Any = None) -> Output:
        return Output.of(stream or (sys.stdout if self.stream is None else self.stream))

    def _notebook(self) -> NotebookDisplay | None:
        """Return the output of the cell that runs, in a notebook; None elsewhere, and where a stream was chosen."""
        shell = notebook() if self.stream is None and not self.silent else None
        if shell is None:
            return None
        if self._display is None or not self._display.is_current():
            self._display = NotebookDisplay(shell)
        return self._display

    @contextmanager
    def track(self, what: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
        """Yield a meter, called with the number of units done, that shows the progress of `what`. `total` None: unknown."""
        if self.quiet:
            yield Meter()
        elif (display := self._notebook()) is not None:
            try:
                yield NotebookMeter(display, what, total, unit)
            finally:
                display.end_progress()
        elif self._output().isatty():
            yield from self._bar_meter(what, total, unit)
        else:
            yield PlainMeter(self, what, total, unit)

    def _bar_meter(self, what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        what_column, rate_column = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[rate]}"))
        columns = (what_column, BarColumn(), MofNCompleteColumn(), rate_column, TimeRemainingColumn())
        console = Console(file=cast(TextIO, self._output()))
        with Progress(*columns, console=console, transient=True) as bar:
            self._bar, task = bar, bar.add_task(what, total=total, rate="")

            def advance(done: int) -> None:
                speed = bar.tasks[0].speed
                bar.update(task, advance=done, rate=rate_of(speed, unit) if speed else "")

            try:
                yield advance
            finally:
                self._bar = None


class Meter:
    """Counts units done. This one shows nothing."""

    def __call__(self, done: int) -> None:
        """Count `done` more units."""


class NotebookMeter(Meter):
    """A bar in the output of a cell."""

    def __init__(self, display: NotebookDisplay, what: str, total: int | None, unit: str) -> None:
        self.display, self.what, self.total, self.unit = display, what, total, unit
        self.done, self.started = 0, time.monotonic()

    def __call__(self, done: int) -> None:
        self.done += done
        self.display.progress(self.what, self.done, self.total, self.unit, self.started)


class PlainMeter(Meter):
    """A line at intervals, where there is no terminal."""

    def __init__(self, reporter: Reporter, what: str, total: int | None, unit: str) -> None:
        self.reporter, self.what, self.total, self.unit = reporter, what, total, unit
        self.done = 0
        self.started = self.printed = time.monotonic()

    def __call__(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.printed < PLAIN_LINE_SECONDS or self.done == self.total:
            return
        self.printed = now
        rate = self.done / (now - self.started)
        if self.total is None:
            self.reporter.say(f"  {self.what} {self.done:,}, {rate_of(rate, self.unit)}")
            return
        left = duration((self.total - self.done) / rate) if rate else "?"
        self.reporter.say(f"  {self.what} {self.done:,}/{self.total:,}, {rate_of(rate, self.unit)}, {left} left")
