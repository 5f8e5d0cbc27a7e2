"""State of long work, such as an evaluation that trains, kept in the cache folder until the work is done."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from deepcluster.core.errors import InputError
from deepcluster.core.files import load_tensors, save_tensors
from deepcluster.core.work import Advance, Work

FOLDER = "unfinished"
SAVE_SECONDS = 300.0

# Tensors and plain values from which the work continues to the result it would have had without the stop.
MakeState = Callable[[], dict[str, Any]]


class ResumableState:
    """The state of one piece of work, in a file whose name changes with everything that the work depends on.

    Args:
        cache: the cache folder.
        work: asked for a stop at every `check`; shows progress.
        facts: protocol, weights, options, data, …: what distinguishes this work from all other.
    """

    def __init__(self, cache: Path, work: Work, *facts: object) -> None:
        self.path = cache / FOLDER / f"{digest_of(*facts)}.pt"
        self._work = work
        self._saved_at = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the state that was kept; None if there is none or it can't be used."""
        try:
            return load_tensors(self.path) if self.path.is_file() else None
        except InputError:
            return None

    def check(self, state: MakeState, *, together: bool = False) -> None:
        """Save the state every few minutes; if a stop is requested, save it and raise `Interrupted`.

        Args:
            together: all ranks have this state and call this the same number of times; the first one saves it, all stop.
        """
        if together:
            self._work.agree()
        is_writer = self._work.ranks.is_main or not together
        if is_writer and time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save(state)
        self._work.interruption.check((lambda: self.save(state)) if is_writer else None)

    @contextmanager
    def track(
        self, what: str, total: int | None, unit: str = "images", *, state: MakeState, together: bool = False
    ) -> Iterator[Advance]:
        """Yield a function that counts units done and shows the progress of `what`, as `Work.track`, and calls `check`."""
        with self._work.reporter.track(what, total, unit) as meter:

            def advance(units: int) -> None:
                meter(units)
                self.check(state, together=together)

            yield advance

    def save(self, state: MakeState) -> None:
        """Save the state now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path, state())
        self._saved_at = time.monotonic()

    def done(self) -> None:
        """Delete the state."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def digest_of(*facts: object) -> str:
    """Return 32 hex digits that change with any of the facts."""
    return hashlib.sha256("\n".join(map(repr, facts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def weights_hash(network: torch.nn.Module) -> str:
    """Return 32 hex digits that change with any weight or buffer of a network."""
    return state_hash(network.state_dict())


def state_hash(state: Mapping[str, Any]) -> str:
    """Return 32 hex digits that change with any tensor or plain value of a state, which may be nested."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {state_hash(value) if isinstance(value, Mapping) else repr(value)}".encode())
    return digest.hexdigest()[:32]
