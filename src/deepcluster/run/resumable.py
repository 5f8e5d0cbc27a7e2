"""State of long work, such as an evaluation that trains: kept in the cache folder until it is done; a stop loses nothing."""

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from deepcluster.core.errors import InputError
from deepcluster.core.files import load_tensors, save_tensors
from deepcluster.core.interruption import Interruption

FOLDER = "unfinished"
SAVE_SECONDS = 300.0


class ResumableState:
    """The state of one piece of work, under a name that changes with all that it depends on.

    Args:
        cache: the cache folder.
        interruption: asked at every `check`.
        facts: protocol, weights, options, data, …: what tells this work from all other.
    """

    def __init__(self, cache: Path, interruption: Interruption, *facts: object) -> None:
        self.path = cache / FOLDER / f"{digest_of(*facts)}.pt"
        self._interruption = interruption
        self._saved_at = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state that was kept, or None: there is none, or it can't be used."""
        try:
            return load_tensors(self.path) if self.path.is_file() else None
        except InputError:
            return None

    def check(self, state: Callable[[], dict[str, Any]]) -> None:
        """Keep the state where some minutes have passed; asked to stop, keep it and raise `Interrupted`.

        Args:
            state: tensors and plain values, from which the work goes on to the very result it would have had.
        """
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self._save(state)
        self._interruption.check(lambda: self._save(state))

    def _save(self, state: Callable[[], dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path, state())
        self._saved_at = time.monotonic()

    def done(self) -> None:
        """Forget the state."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def digest_of(*facts: object) -> str:
    """32 hex digits that change with any of the facts."""
    return hashlib.sha256("\n".join(map(repr, facts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def weights_hash(network: torch.nn.Module) -> str:
    """32 hex digits that change with any weight or buffer of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
