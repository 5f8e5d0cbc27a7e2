"""Ctrl-C and SIGTERM, answered at safe moments."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from deepcluster.core.errors import Interrupted


class Interruption:
    """A request to stop by Ctrl-C or SIGTERM, which the loop checks at safe moments. A second Ctrl-C stops at once.

    Args:
        on_request: called by the signal handler, to end what the loop may be waiting for.
        advice: what was kept and how to continue, for the message.
    """

    def __init__(
        self,
        *,
        on_request: Callable[[], None] = lambda: None,
        advice: str = "the state is saved: the same command with --resume continues",
    ) -> None:
        self.on_request, self.advice = on_request, advice
        self.requested: str | None = None

    @contextmanager
    def listening(self) -> "Iterator[Interruption]":
        """Handle the signals during the work (only in the main thread: elsewhere Python has none)."""
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
        """Raise `Interrupted` if a stop was requested, after saving the state."""
        if self.requested is not None:
            if save is not None:
                save()
            raise Interrupted(f"stopped by {self.requested}; {self.advice}")
