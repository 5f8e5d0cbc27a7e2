"""The lines that `main.py` of 2018 prints, and its names of options in the messages of today's engine."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deepcluster.core.output import Output
from deepcluster.core.progress import Meter, Reporter
from deepcluster.core.text import visible

# Batches of the feature pass, and training steps, from one line to the next.
LINE_EVERY = 200
# What messages of today's engine call the options of 2018; those that it lacks are left out.
_NAMES = {
    "--head-lr or --lr": "--lr",
    ", or another --cluster-stage": "",
    ", or --precision fp32": "",
    "with --out": "with --exp",
    "--clusters": "--nmb_cluster",
    "--batch-size": "--batch",
    "--epoch-length": "--reassign",
    "clusters=": "nmb_cluster=",
    "batch_size=": "batch=",
    "epoch_length=": "reassign=",
    "weight_decay=": "10**wd=",
}


def in_terms_of_2018(message: str) -> str:
    """Return a message of today's engine with the options of 2018."""
    for ours, theirs in _NAMES.items():
        message = message.replace(ours, theirs)
    return message


class Lines(Reporter):
    """Prints the lines of 2018, and warnings of today, with `--verbose`; nothing without it. The log of the run has all.

    Args:
        verbose: print lines at all.
        batch: images of a batch.
        silent: print nothing, as on all processes but the first.
    """

    def __init__(self, *, verbose: bool, batch: int, silent: bool = False) -> None:
        super().__init__(quiet=True, silent=silent)
        self.talks, self.batch, self.is_final = verbose, batch, False

    def line(self, text: str, *, always: bool = False) -> None:
        """Print a line; `always`: even without `--verbose`."""
        if (self.talks or always) and not self.silent:
            self._output().line(visible(text, lines=True))

    def warn(self, line: str) -> None:
        """Print a warning to the error stream with `--verbose`."""
        self.alert(line, always=False)

    def alert(self, line: str, *, always: bool = True) -> None:
        """Print to the error stream, even without `--verbose`, what would have ended a run in 2018."""
        text = f"warning: {in_terms_of_2018(line)}"
        self._write(text, show=always or self.talks, stream=Output.of(sys.stderr))

    @contextmanager
    def track(self, what: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
        """Print the lines of the steps before training; after the last epoch, 2018 had none of these."""
        if what == "features" and not self.is_final:
            self.line("Compute features")
            yield FeatureMeter(self, total or 0)
            return
        if what == "whitening" and not self.is_final:
            self.line("Cluster the features")
        yield Meter()


class FeatureMeter(Meter):
    """A line every 200 batches of the feature pass."""

    def __init__(self, lines: Lines, total: int) -> None:
        self.lines, self.total = lines, total
        self.done = self.next = self.counted = 0
        self.started = self.printed = time.monotonic()

    def __call__(self, done: int) -> None:
        self.done += done
        size = self.lines.batch
        while self.done >= min((self.next + 1) * size, self.total) and self.next * size < self.total:
            now, batches = time.monotonic(), self.next + 1
            value = (now - self.printed) / (batches - self.counted)
            time_text = f"Time: {value:.3f} ({(now - self.started) / batches:.3f})"
            self.lines.line(f"{self.next} / {-(-self.total // size)}\t{time_text}")
            self.printed, self.counted, self.next = now, batches, self.next + LINE_EVERY
