"""One process at a time trains in a run folder or writes a table: an advisory lock, which ends with its process.

The lock is a file that names its owner. Within a machine, and where a network file system has locks, the system knows if the
owner lives. For other cases the owner touches the file every few seconds, and another start watches it for some time.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepcluster.core.distributed import ONE_PROCESS, Ranks, is_restart
from deepcluster.core.errors import InputError
from deepcluster.run.folder import IN_USE, RunFolder

# How often the owner touches the file, and how long a file of another machine is watched for that.
BEAT_SECONDS, WATCH_SECONDS = 5.0, 20.0
# How long to wait for a lock whose owner is dead (its worker processes end a moment later), or is ending as Slurm or
# `torchrun` restarts it.
DEAD_SECONDS, RESTART_SECONDS = 10.0, 60.0


class Lock:
    """A lock that the first rank holds from `acquire` to `close`, or to the end of its process.

    Args:
        path: the file of the lock.
        what: what it keeps others out of.
        doing: past participle for what its owner does, such as `trained`: the message to others says "is being trained".
        other: what else may be chosen.
    """

    def __init__(self, path: Path, ranks: Ranks = ONE_PROCESS, *, what: object, doing: str, other: str) -> None:
        self.path, self.ranks, self.what, self.doing, self.other = path, ranks, what, doing, other
        self._handle: int | None = None
        self._closing = threading.Event()

    def acquire(self, tell: Callable[[str], object]) -> None:
        """Take the lock, unless this object has it already; all ranks call it.

        Args:
            tell: is given a line if the lock of another machine has to be watched.

        Raises:
            InputError: another process has it.
        """
        wanted = self.ranks.is_main and self._handle is None
        refusal = self.ranks.gather_objects(self._acquire(tell) if wanted else None)[0]
        if refusal is not None:
            raise InputError(refusal)

    def _acquire(self, tell: Callable[[str], object]) -> str | None:
        """Return why the lock can't be taken; None if it is, or if its file can't be made: then nothing can be written."""
        started, is_restarted = time.monotonic(), is_restart() or "SLURM_RESTART_COUNT" in os.environ
        while True:
            try:
                handle, is_new = self._open()
            except OSError:
                return None
            is_locked = _lock(handle)
            owner = {} if is_new else _owner(handle)
            is_known = is_locked and owner.get("machine", _machine()) == _machine()
            is_free = is_locked is not False and (is_new or is_known or not self._beats(owner, tell))
            if is_free and _is_at(handle, self.path):
                self._take(handle)
                return None
            os.close(handle)
            if is_free:  # The owner has just deleted the file.
                continue
            patience = RESTART_SECONDS if is_restarted else DEAD_SECONDS if _is_dead(owner) else 0.0
            if time.monotonic() - started > patience:
                doing, name = owner.get("doing", self.doing), owner.get("process", "another process")
                return f"{self.what} is being {doing} by {name}: wait for it or stop it, or choose another {self.other}"
            time.sleep(0.2)

    def _open(self) -> tuple[int, bool]:
        """Open the file; return whether it is new."""
        with suppress(FileExistsError):
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        return os.open(self.path, os.O_RDWR), False

    def _beats(self, owner: Mapping[str, Any], tell: Callable[[str], object]) -> bool:
        """Watch the file; return True if its owner, which the system knows nothing of, touches it."""
        before, deadline = _status(self.path), time.monotonic() + WATCH_SECONDS
        tell(
            f"{self.path} was left by {owner.get('process', 'another process')}, or is in use: watching it for some seconds"
        )
        while before is not None and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 10)
            now = _status(self.path)
            if now is None or now.st_mtime_ns != before.st_mtime_ns:
                return now is not None
        return False

    def _take(self, handle: int) -> None:
        name = f"process {os.getpid()} on {platform.node()}"
        facts = {"process": name, "pid": os.getpid(), "machine": _machine(), "doing": self.doing}
        with suppress(OSError):  # A full disk
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(facts).encode())
        self._handle = handle
        self._closing.clear()
        threading.Thread(target=self._beat, args=(handle,), name="lock", daemon=True).start()

    def _beat(self, handle: int) -> None:
        while not self._closing.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(handle if os.utime in os.supports_fd else self.path)

    def close(self) -> None:
        """Release the lock."""
        if self._handle is not None:
            self._closing.set()
            if os.name == "nt":  # Windows deletes no open files.
                os.close(self._handle)
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            if os.name != "nt":  # Last: once it is closed, the next start may make a file of its own.
                os.close(self._handle)
            self._handle = None


class RunLock(Lock):
    """The lock of a run folder."""

    def __init__(self, folder: RunFolder, doing: str = "trained") -> None:
        path = folder.path
        super().__init__(path / IN_USE, folder.ranks, what=path, doing=doing, other="folder with --out")
        self.folder = folder
        self._unchanged: os.stat_result | None = None  # What the folder was before the lock, until the training begins.

    def acquire(self, tell: Callable[[str], object], *, new: bool = True) -> None:
        """Lock the folder, as `Lock.acquire`; `new`: make it if there is none, else leave what is no run as it is."""
        if self.ranks.is_main and new:
            self.folder.path.mkdir(parents=True, exist_ok=True)
        elif self.ranks.is_main:
            with suppress(OSError):
                self._unchanged = self.folder.path.stat()
        if new:
            self._unchanged = None
        is_there = self.ranks.is_main and (new or self.folder.is_run() or self.path.exists())
        if self.ranks.from_main(lambda: is_there):
            super().acquire(tell)

    def close(self) -> None:
        """Release the lock; a folder in which nothing was begun is as it was."""
        had_lock = self._handle is not None
        super().close()
        if had_lock and self._unchanged is not None:
            with suppress(OSError):
                os.utime(self.folder.path, ns=(self._unchanged.st_atime_ns, self._unchanged.st_mtime_ns))


def _lock(handle: int) -> bool | None:
    """Return True if the file could be locked, False if another process has locked it, None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, and some network file systems
        return None
    return True


def _owner(handle: int) -> dict[str, Any]:
    """Return what the file says of its owner, which may just be writing it."""
    for pause in (0.1, 0.4, 0.0):
        with suppress(OSError, ValueError):
            os.lseek(handle, 0, os.SEEK_SET)
            facts = json.loads(os.read(handle, 1 << 12))
            return facts if isinstance(facts, dict) else {}
        time.sleep(pause)
    return {}


def _is_at(handle: int, path: Path) -> bool:
    """Return True if an open file still has its name."""
    status = _status(path)
    return status is not None and os.path.samestat(os.fstat(handle), status)


def _status(path: Path) -> os.stat_result | None:
    """Return the status of a file as its server knows it: an open file is not answered from a cache."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return os.fstat(handle)
    finally:
        os.close(handle)


def _machine() -> str:
    """Return what tells machines apart that may have one name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return platform.node()


def _is_dead(owner: Mapping[str, Any]) -> bool:
    """Return True if the owner was a process of this machine that is gone."""
    if owner.get("machine") != _machine() or os.name == "nt":  # where this would end a process
        return False
    try:
        os.kill(int(owner.get("pid", 0)), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False
