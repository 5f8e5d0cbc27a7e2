"""One process at a time: locks of this machine, of others, and where the file system has none."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import deepcluster
from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.run import lock as locks
from deepcluster.run.folder import RunFolder
from deepcluster.run.lock import Lock, RunLock

OTHER = {"process": "process 7 on node9", "pid": 7, "machine": "another one"}
HOLDER = """
import sys, time
from pathlib import Path
from deepcluster.run.lock import Lock
lock = Lock(Path(sys.argv[1]), what="it", doing="written", other="place")
lock.acquire(print)
print("locked", flush=True)
time.sleep(1000)
"""


def lock_at(path: Path) -> Lock:
    return Lock(path, what="it", doing="written", other="place")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.5)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems, which answer like this."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@contextmanager
def touched(path: Path) -> Iterator[None]:
    """Touch a file again and again, as its owner on another machine does."""
    done, moments = threading.Event(), iter(range(1, 1 << 30))

    def touch() -> None:
        while not done.wait(0.01):
            os.utime(path, ns=(0, next(moments)))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_lock_of_a_live_process_is_refused_and_one_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    words = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(InputError, match=f"it is being written by process {holder.pid} on "):
            lock_at(path).acquire(pytest.fail)
        holder.kill()
    assert path.is_file()
    with closing(lock_at(path)) as mine:
        mine.acquire(pytest.fail)
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_lock_of_another_machine_holds_while_it_is_touched(tmp_path: Path, quick: None) -> None:
    path, told = tmp_path / "lock", list[str]()
    path.write_text(json.dumps(OTHER))
    with touched(path), pytest.raises(InputError, match="it is being written by process 7 on node9: wait for it or stop it"):
        lock_at(path).acquire(told.append)
    assert json.loads(path.read_text()) == OTHER
    with closing(lock_at(path)) as mine:
        mine.acquire(told.append)
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert told == [f"{path} was left by process 7 on node9, or is in use: watching it for some seconds"] * 2


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "x"}', "\0\0\0"])
def test_a_damaged_file_is_no_obstacle(content: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(content)
    with closing(lock_at(tmp_path / "lock")) as mine:
        mine.acquire(pytest.fail)


def test_without_locks_of_the_system_a_live_owner_is_seen(tmp_path: Path, quick: None, without_locks: None) -> None:
    path = tmp_path / "lock"
    with closing(lock_at(path)) as mine, pytest.raises(InputError, match=f"by process {os.getpid()} on "):
        mine.acquire(pytest.fail)
        lock_at(path).acquire(lambda line: None)
    assert not path.exists()
    path.write_text(json.dumps({**OTHER, "machine": locks._machine()}))
    with closing(lock_at(path)) as mine:  # What a killed process has left.
        mine.acquire(lambda line: None)


def test_the_file_of_the_next_start_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made as soon as the lock is free."""
    lock, path, close = lock_at(tmp_path / "lock"), tmp_path / "lock", os.close
    lock.acquire(print)
    monkeypatch.setattr(locks.os, "close", lambda handle: (close(handle), path.touch()))
    lock.close()
    assert path.exists()


def test_where_nothing_can_be_written_nothing_is_locked(tmp_path: Path) -> None:
    lock_at(tmp_path / "missing" / "lock").acquire(pytest.fail)


def test_a_slurm_job_that_is_requeued_waits_for_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    old = lock_at(path)
    old.acquire(pytest.fail)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: old.close())
    with closing(lock_at(path)) as mine:
        mine.acquire(pytest.fail)


def test_others_are_told_what_the_owner_does(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with closing(RunLock(run, "clustered")) as mine:
        mine.acquire(pytest.fail)
        with pytest.raises(InputError, match=r"run is being clustered by process .*, or choose another folder with --out"):
            RunLock(run).acquire(pytest.fail)


def test_two_tables_of_one_name_do_not_meet(images: Path, trained: Path, tmp_path: Path) -> None:
    out, quiet = tmp_path / "clusters.parquet", Reporter(quiet=True)
    other = lock_at(tmp_path / ".clusters.parquet.in-use")
    other.acquire(pytest.fail)
    with pytest.raises(InputError, match=r"clusters.parquet is being written by process \d+ on .*: wait for it or stop it"):
        deepcluster.assign(trained, images, out=out, workers=0, reporter=quiet)
    assert not out.exists()
    other.close()
    deepcluster.assign(trained, images, out=out, workers=0, reporter=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["clusters.parquet"]
