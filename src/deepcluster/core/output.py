"""Streams for what the user sees: a terminal that is gone, a full disk or a narrow encoding never ends the work."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Output:
    """A text stream that never raises: what can't be written is dropped.

    Args:
        stream: any object with `write`; None where there is no such stream, as in programs without a console.

    Attributes:
        fault: the first error of writing; None if there was none.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.fault: Exception | None = OSError(errno.EBADF, "it is closed") if stream is None else None

    @classmethod
    def of(cls, stream: Any) -> "Output":
        """Return the stream itself if it is one of these, else one around it."""
        return stream if isinstance(stream, cls) else cls(stream)

    @property
    def encoding(self) -> str:
        """Encoding of the stream."""
        return getattr(self.stream, "encoding", None) or "ascii"

    @property
    def errors(self) -> str:
        """How characters are written that the encoding lacks."""
        return "backslashreplace"

    def write(self, text: str) -> int:
        """Write text; characters that the encoding of the stream lacks become backslash escapes."""
        if not isinstance(text, str):
            raise TypeError(f"write() takes text, not {type(text).__name__}")
        if self.stream is not None:
            try:
                try:
                    self.stream.write(text)
                except UnicodeEncodeError:
                    self.stream.write(self._escaped(text))
            except Exception as fault:
                self.fault = self.fault or fault
        return len(text)

    def _escaped(self, text: str) -> str:
        try:
            return text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        except LookupError:  # An encoding of the stream's own.
            return text.encode("ascii", "backslashreplace").decode("ascii")

    def flush(self) -> None:
        """Flush the stream if it can be."""
        try:
            if hasattr(self.stream, "flush"):
                self.stream.flush()
        except Exception as fault:
            self.fault = self.fault or fault

    def line(self, text: str) -> None:
        """Write a line and flush it."""
        self.write(text + "\n")
        self.flush()

    def isatty(self) -> bool:
        """Return True for a terminal."""
        try:
            return bool(self.stream.isatty())
        except Exception:
            return False

    def fileno(self) -> int:
        """Return the handle of the stream; raises OSError if it has none."""
        try:
            return int(self.stream.fileno())
        except Exception:
            raise OSError("this stream has no file") from None

    def writable(self) -> bool:
        """Return True."""
        return True


@contextmanager
def safe_streams() -> Iterator[tuple[Output, Output]]:
    """Replace the standard output and error stream of this process by ones that never raise, and yield them."""
    before = sys.stdout, sys.stderr
    safe = Output.of(sys.stdout), Output.of(sys.stderr)
    sys.stdout, sys.stderr = safe
    try:
        yield safe
    finally:
        for output in safe:
            output.flush()
        sys.stdout, sys.stderr = before


def open_standard_files() -> None:
    """Open those of the handles 0, 1 and 2 that are closed.

    Else the next file that is opened, such as a checkpoint, would have the handle into which libraries print.
    """
    for handle in (0, 1, 2):
        try:
            os.fstat(handle)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # The lowest handle that is free.


def silence(output: Output) -> None:
    """After an error of a stream, let what it still holds go nowhere when Python flushes it at the end."""
    with suppress(OSError):
        if output.fault is not None and output.stream is not None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, output.fileno())
            os.close(null)
