"""Errors shown to the user: what is wrong, the values involved, how to fix it.

Every error that a user can cause or fix is a `DeepClusterError`. The command line prints only its message, without a
traceback, and ends with its `exit_status`.
"""

import difflib
from collections.abc import Iterable

from deepcluster.core.wording import for_user


class DeepClusterError(Exception):
    """An error with a message for the user."""

    exit_status = 1

    def __str__(self) -> str:
        """Return the message in the words of the user: options as they are typed, or as Python has them."""
        return for_user(super().__str__())

    def _render_traceback_(self) -> list[str]:
        """Return what notebooks and IPython show: the message without the way it came."""
        return [f"{type(self).__name__}: {self}"]


class InputError(DeepClusterError):
    """The input can't be used: data, option, file or folder."""

    exit_status = 2


class TrainingError(DeepClusterError):
    """Training can't continue (a loss that is not finite, a full disk); the last good state is kept."""


class Interrupted(DeepClusterError):
    """The user or the machine stopped the work; the state was saved."""

    exit_status = 130


class LostProcess(DeepClusterError):
    """Another process of the run has ended; that process reports why."""


class WorkerLost(DeepClusterError):
    """Worker processes die again and again, for want of memory or by a fault of a library."""


class UnreadableImage(Exception):
    """An image that can't be decoded. It never ends a run: it is left out, counted, and listed with this reason."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the known word nearest to `word`, or an empty string where none is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
