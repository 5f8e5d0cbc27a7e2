"""The folder of what is slow to make again: lists of files, indexes, copies of remote parts, decoded images."""

import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

VARIABLE = "DEEPCLUSTER_CACHE"


def usual_cache_folder() -> Path:
    """`$DEEPCLUSTER_CACHE`, else `deepcluster` in `$XDG_CACHE_HOME`, else `~/.cache/deepcluster`; it need not exist."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepcluster"
    except RuntimeError:  # A container whose user has no home.
        return Path(tempfile.gettempdir()) / "deepcluster-cache"


def write_whole(path: Path, content: bytes) -> bool:
    """Write a file of the cache beside and rename it, so that other processes see all of it or nothing.

    Returns False where that is impossible (a full disk, a folder that is read-only): then the work goes on without it.
    """
    beside = beside_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        return False
    return True


def beside_of(path: Path) -> Path:
    """The name under which this thread writes what will be renamed to `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
