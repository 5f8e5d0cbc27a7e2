"""One training at a time in a run folder: a lock on RUN/.lock, which ends with the process that holds it."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError

LOCK_NAME = ".lock"
# The holder writes who it is right after it has locked the file; a start in the same moment waits this long for it.
OWNER_SECONDS = 1.0


class RunLock:
    """The lock of a run folder, held by the first rank from `acquire` to `close`.

    The file is removed at the end. A killed process leaves it behind, unlocked: the next start takes it over.

    Args:
        folder: the run folder.
        ranks: the processes of the run.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.path, self.ranks = folder / LOCK_NAME, ranks
        self._file: TextIO | None = None
        self._tried = False

    def acquire(self, warn: Callable[[str], None], *, new: bool = True) -> None:
        """Lock the folder, unless this training has locked it already; all ranks call it.

        Args:
            warn: called with a sentence where the file system has no locks.
            new: also lock a folder that holds no run yet, and make it.

        Raises:
            InputError: another training holds the lock; the message names its process and host.
        """
        refusal = self._acquire(warn, new) if self.ranks.is_main and not self._tried else None
        refusal = self.ranks.gather_objects(refusal)[0]
        if refusal is not None:
            raise InputError(refusal)

    def close(self) -> None:
        """Release the lock."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None
        self._tried = False

    def _acquire(self, warn: Callable[[str], None], new: bool) -> str | None:
        """Return why the folder can't be locked; None if it is, or can't be."""
        folder = self.path.parent
        if new:
            folder.mkdir(parents=True, exist_ok=True)
        elif not (self.path.exists() or (folder / "config.json").is_file()):
            return None
        self._tried = True
        try:
            import fcntl
        except ImportError:  # Windows
            warn(f"{folder} can't be locked on this system: do not start a second training in it")
            return None
        while self._file is None:
            try:
                file = self.path.open("a+", encoding="utf-8")
            except PermissionError:
                if new:
                    raise
                return None  # A folder that can't be written to is refused by `RunFolder.check_free`.
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    return self._refusal(file)
            except OSError as fault:  # Some network file systems have no locks.
                file.close()
                self.path.unlink(missing_ok=True)
                warn(f"{folder} can't be locked ({fault}): do not start a second training in it")
                return None
            if self._is_at_path(file):
                self._file = file
            else:
                file.close()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return None

    def _is_at_path(self, file: TextIO) -> bool:
        """Return True if the file is still there: its last holder may have removed it before it was locked here."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        return False

    def _refusal(self, file: TextIO) -> str:
        deadline = time.monotonic() + OWNER_SECONDS
        owner = ""
        while not owner and time.monotonic() < deadline:
            file.seek(0)
            owner = file.read().strip()
            time.sleep(0 if owner else 0.02)
        return (
            f"{self.path.parent} is being trained by {owner or 'another process'}: wait for it or stop it, "
            "or choose another folder with --out"
        )
