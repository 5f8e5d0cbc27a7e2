"""The clock of a run: how long each step of an epoch takes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STEPS = ("features", "whitening", "clustering", "training")


class Clock:
    """Adds up the seconds of each step; of steps inside one another, a second is that of the innermost.

    Args:
        seconds: what was counted before, by step.
    """

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self._counted = {**dict.fromkeys(STEPS, 0.0), **(seconds or {})}
        self._step: str | None = None
        self._since = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Of each step, up to now."""
        self._turn_to(self._step)
        return dict(self._counted)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Count the time inside to `step`, one of `STEPS`."""
        around = self._turn_to(step)
        try:
            yield
        finally:
            self._turn_to(around)

    def _turn_to(self, step: str | None) -> str | None:
        """From now on the time is that of `step` (None: of none); what it was that of before."""
        before, now = self._step, time.perf_counter()
        if before is not None:
            self._counted[before] += now - self._since
        self._step, self._since = step, now
        return before
