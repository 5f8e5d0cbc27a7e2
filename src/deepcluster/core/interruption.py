"""Ctrl-C and SIGTERM, answered at safe moments."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from deepcluster.core.errors import Interrupted


class Interruption:
    """Ctrl-C and SIGTERM as a question that the loop asks at safe moments; a second Ctrl-C ends at once.

    Args:
        on_request: called by the signal itself, to end what the loop may be waiting for.
        advice: what was kept and how to go on, for the message.
    """

    def __init__(
        self,
        *,
        on_request: Callable[[], None] = lambda: None,
        advice: str = "the state is saved: the same command with --resume goes on",
    ) -> None:
        self.on_request, self.advice = on_request, advice
        self.requested: str | None = None

    @contextmanager
    def listening(self) -> "Iterator[Interruption]":
        """Listen to the signals while the work goes on (in the main thread alone: elsewhere Python has no signals)."""
        previous: dict[int, Any] = {}
        try:
            for number in (int(signal.SIGINT), int(signal.SIGTERM)):
                previous[number] = signal.signal(number, self._note)
        except ValueError:
            pass
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        self.on_request()

    def check(self, save: Callable[[], None] | None = None) -> None:
        """Raise `Interrupted` if a stop was asked for, after saving the state."""
        if self.requested is not None:
            if save is not None:
                save()
            raise Interrupted(f"stopped by {self.requested}; {self.advice}")
