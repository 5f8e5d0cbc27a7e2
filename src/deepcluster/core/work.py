"""The context of long work: progress is shown, requests to stop are answered, and seconds are counted per step."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch

from deepcluster.core.distributed import ONE_PROCESS, Ranks, is_passed_on, joined
from deepcluster.core.errors import Interrupted, LostProcess
from deepcluster.core.progress import Reporter
from deepcluster.core.wording import notebook

# Called with the number of units (images, iterations) done since the last call. May raise `Interrupted`.
Advance = Callable[[int], None]


def no_advance(units: int) -> None:
    """Neither show progress nor ask for a stop."""


# A closed terminal (SIGHUP) and the warnings of schedulers are requests to stop, unless the user's program handles them, or
# they are ignored, as under nohup. Windows has none of these.
_WARNINGS = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name)]
# A Ctrl-C this soon after a request belongs to it: terminals and `torchrun` both signal the same process.
_SAME_REQUEST_SECONDS = 1.0

RESUME = "the state is saved: the same command with --resume continues"


class Interruption:
    """A request to stop (Ctrl-C, SIGTERM, a closed terminal, a scheduler's warning), which the loop checks at safe moments.

    A second Ctrl-C stops at once.

    Args:
        on_request: called by the signal handler, to end what the loop may be waiting for.
        advice: what was kept and how to continue, for the message.
    """

    def __init__(
        self,
        *,
        on_request: Callable[[], None] = lambda: None,
        advice: str = RESUME,
    ) -> None:
        self.on_request, self.advice = on_request, advice
        self.requested: str | None = None
        self._requested_at, self._at_once = 0.0, False

    @contextmanager
    def listening(self) -> "Iterator[Interruption]":
        """Handle the signals during the work (only in the main thread: elsewhere Python has none)."""
        previous: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM, *_WARNINGS):
                if number not in _WARNINGS or signal.getsignal(number) == signal.SIG_DFL or is_passed_on(number.name):
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
            if number == signal.SIGINT and time.monotonic() - self._requested_at > _SAME_REQUEST_SECONDS:
                raise KeyboardInterrupt
            return
        self.requested, self._requested_at = signal.Signals(number).name, time.monotonic()
        self.on_request()
        if self._at_once:
            self.check()

    @contextmanager
    def at_once(self) -> "Iterator[None]":
        """Stop at once where a stop is requested inside: for long steps that have nothing to save."""
        self.check()
        before, self._at_once = self._at_once, True
        try:
            yield
        finally:
            self._at_once = before

    def check(self, save: Callable[[], None] | None = None) -> None:
        """Raise `Interrupted` if a stop was requested, after saving the state."""
        if self.requested is not None:
            if save is not None:
                save()
            raise Interrupted(f"stopped by {self.requested}; {self.advice}", self.requested)


class Clock:
    """Seconds spent per step. Within nested steps a second counts for the innermost one.

    Args:
        seconds: seconds counted earlier, by step.
    """

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self._counted: dict[str, float] = dict(seconds or {})
        self._step: str | None = None
        self._since = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each step so far."""
        self._switch(self._step)
        return dict(self._counted)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Count the time inside for `step`."""
        outer = self._switch(step)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, step: str | None) -> str | None:
        """Count for `step` (None: for no step) from now on; return the step that was counted before."""
        before, now = self._step, time.perf_counter()
        if before is not None:
            self._counted[before] = self._counted.get(before, 0.0) + now - self._since
        self._step, self._since = step, now
        return before


class Work:
    """Progress, stop requests and timing of one piece of long work.

    Args:
        reporter: prints lines and progress; by default quiet, but for notebooks.
        interruption: the request to stop; none by default.
        ranks: the processes that do the work together.
    """

    def __init__(
        self, reporter: Reporter | None = None, interruption: Interruption | None = None, ranks: Ranks = ONE_PROCESS
    ) -> None:
        self.reporter = reporter or Reporter(quiet=notebook() is None)
        self.interruption = interruption or Interruption()
        self.ranks = ranks
        self.clock = Clock()

    def check(self, *, together: bool = False) -> None:
        """Raise `Interrupted` if a stop was requested.

        Args:
            together: stop where any rank was asked to. All ranks must call this, the same number of times.
        """
        if together:
            self.agree()
        self.interruption.check()

    def agree(self) -> None:
        """Note a request to stop on all ranks if any has one. All ranks must call this, the same number of times."""
        if self.ranks.size > 1:
            requested = torch.tensor(int(self.interruption.requested is not None))
            if self.ranks.sum(requested):
                self.interruption.requested = self.interruption.requested or "a signal to another process"

    @contextmanager
    def track(
        self, what: str, total: int | None, unit: str = "images", *, step: str | None = None, together: bool = False
    ) -> Iterator[Advance]:
        """Yield a function that counts units done, shows the progress of `what`, and raises if a stop was requested.

        Args:
            what: name of the work, for the progress line.
            total: number of units; None where it is unknown.
            unit: noun of what is counted.
            step: also count the time inside for this step of the clock.
            together: as in `check`.
        """
        timed = nullcontext() if step is None else self.clock.timed(step)
        with timed, self.reporter.track(what, total, unit) as meter:

            def advance(units: int) -> None:
                meter(units)
                self.check(together=together)

            yield advance


@contextmanager
def joined_work(reporter: Reporter | None, interruption: Interruption) -> Iterator[Work]:
    """Join the processes that `torchrun` started, and yield the context of what they do together; one process without it.

    Requests to stop are heard, and only the first process prints. A process left behind because all were stopped reports
    the stop.

    Raises:
        LostProcess: another process has ended, or can't be reached.
    """
    try:
        with interruption.listening(), joined() as ranks:
            yield Work(reporter if ranks.is_main else Reporter(silent=True), interruption, ranks)
    except LostProcess as fault:
        interruption.check()
        raise LostProcess(f"{fault}; {interruption.advice}") from fault
