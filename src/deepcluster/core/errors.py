"""What is told to the person: the fault, the values, what to do.

Every error that a person can cause or mend is a `DeepClusterError`; the command line prints its message alone, without a
traceback, and ends with its `exit_status`.
"""

import difflib
from collections.abc import Iterable


class DeepClusterError(Exception):
    """An error with a message for the person who runs the program."""

    exit_status = 1


class InputError(DeepClusterError):
    """What the person gave can't be used: data, option, file or folder."""

    exit_status = 2


class TrainingError(DeepClusterError):
    """Training can't go on (a loss that is not finite, a disk that is full); the last good state is kept."""


class Interrupted(DeepClusterError):
    """The person or the machine stopped the work; the state was saved."""

    exit_status = 130


class LostProcess(DeepClusterError):
    """Another of the processes of a run has ended: it knows why, not this one."""


class UnreadableImage(Exception):
    """An image that can't be decoded. Never ends a run: it is left out, counted, and listed with this reason."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the known word nearest to `word`, or an empty string where none is near."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]}?)" if nearest else ""
