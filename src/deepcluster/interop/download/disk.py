"""Room on the disk: asked for before the first byte, and said in words where it ends."""

import errno
import shutil
from pathlib import Path

from deepcluster.core.errors import DeepClusterError, InputError
from deepcluster.core.text import size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoom(DeepClusterError):
    """The disk is full, or its quota used up."""


def check_room(path: Path, needed: int, more: int = 0) -> None:
    """Raise NoRoom unless the disk has `needed` bytes for a file that is written, and `more` for what is made of it."""
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if max(0, needed) + more > free:
        purpose = f", and {size(more)} to unpack it," if more else ""
        raise NoRoom(
            f"{path.name} needs {size(max(0, needed))}{purpose} but the disk of {there} has only {size(free)} left; "
            "make room, or name a folder on another disk with --out"
        )


def disk_fault(fault: OSError, what: str, advice: str) -> DeepClusterError:
    """Return the error that says why a file can't be written, with `advice` where the disk is full."""
    words = (fault.strerror or str(fault)).lower()
    return NoRoom(f"{what}: {words}; {advice}") if fault.errno in _FULL else InputError(f"{what}: {words}")
