"""One training at a time in a run folder: an advisory lock on the folder, which ends with the process that holds it."""

import os
from collections.abc import Callable
from contextlib import suppress

from deepcluster.core.errors import InputError
from deepcluster.run.folder import RunFolder


class RunLock:
    """The lock of a run folder, held by the first rank from `acquire` to `close`, or to the end of its process."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._handle: int | None = None
        self._tried = False

    def acquire(self, warn: Callable[[str], None], *, new: bool = True) -> None:
        """Lock the folder, unless this training has locked it already; all ranks call it.

        Args:
            warn: called with a sentence where the file system has no locks.
            new: make the folder if there is none.

        Raises:
            InputError: another training holds the lock.
        """
        ranks = self.folder.ranks
        refusal = ranks.gather_objects(self._acquire(warn, new) if ranks.is_main and not self._tried else None)[0]
        if refusal is not None:
            raise InputError(refusal)

    def _acquire(self, warn: Callable[[str], None], new: bool) -> str | None:
        """Return why the folder can't be locked; None if it is, or if there are no locks."""
        path = self.folder.path
        if new:
            path.mkdir(parents=True, exist_ok=True)
        elif not path.is_dir():
            return None
        self._tried = True
        try:
            import fcntl

            self._handle = os.open(path, os.O_RDONLY)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            owner = "another process"
            with suppress(InputError):  # Its config.json may not be written yet.
                owner = self.folder.read_config().get("process", owner)
            return f"{path} is being trained by {owner}: wait for it or stop it, or choose another folder with --out"
        except (ImportError, OSError) as fault:  # Windows, and some network file systems, have no such locks.
            warn(f"{path} can't be locked ({fault}): do not start a second training in it")
        return None

    def close(self) -> None:
        """Release the lock."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
