"""Files: read without waiting, complete at every moment (written beside, then renamed); tensors, without running code."""

import errno
import hashlib
import os
import pickle
import shutil
import stat
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.kinds import BEGIN_BYTES, kind_of, stand_in

# Older files that were never renamed belong to processes that were killed.
ABANDONED_SECONDS = 3600.0
# The file in a folder that this program has written.
MARK = ".deepcluster"
# A named pipe is opened without waiting for its writer.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def usual_cache_folder() -> Path:
    """Return `$DEEPCLUSTER_CACHE`, else `deepcluster` in `$XDG_CACHE_HOME` or `~/.cache`; it need not exist."""
    if chosen := os.environ.get("DEEPCLUSTER_CACHE"):
        return Path(chosen).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepcluster"
    except RuntimeError:  # A container whose user has no home.
        return Path(tempfile.gettempdir()) / "deepcluster-cache"


def digest(text: str) -> str:
    """Return 32 hex digits that stand for a text, as in names of files of the cache."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def file_stamp(path: str | Path) -> str:
    """Return size and modification time of a regular file as `10871-1732250000000000000`; "" if there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 (pathlib takes twice as long)
    except (OSError, ValueError):
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""


def check_regular(path: str | Path) -> None:
    """Raise OSError for a named pipe, a socket or a device: opening one may wait forever."""
    mode = os.stat(path).st_mode  # noqa: PTH116
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # Reading a folder fails at once.
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise OSError(f"{kind}, not a regular file")


def check_file(path: str | Path) -> None:
    """Raise InputError where there is nothing, or what `check_regular` refuses."""
    try:
        check_regular(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as fault:
        if fault.errno is not None:
            raise InputError(f"{path} can't be read: {(fault.strerror or str(fault)).lower()}") from None
        raise InputError(f"{path} is {fault}; it may be read more than once, so write what it gives into a file") from None


def read_regular(path: str | Path, start: int = 0, length: int | None = None) -> bytes:
    """Return `length` bytes of a file from `start` on, or all.

    Raises:
        OSError: it can't be read, or is no regular file.
    """
    try:
        handle = os.open(path, _OPEN_FLAGS)
    except OSError:
        check_regular(path)  # A socket can't be opened.
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            check_regular(path)
        left = status.st_size if length is None else length
        if start:
            os.lseek(handle, start, os.SEEK_SET)
        content = os.read(handle, left)
        while len(content) < left and (more := os.read(handle, left - len(content))):  # One call gives 2 GiB at most.
            content += more
        return content
    finally:
        os.close(handle)


def begin_of(path: str | Path) -> bytes:
    """Return the first bytes of a file, as `kind_of` wants them; b"" where it can't be read."""
    try:
        return read_regular(path, 0, BEGIN_BYTES)
    except OSError:
        return b""


def user_path(path: str | Path) -> Path:
    """Return a path with `~` and `~user` as the home folders that a shell makes of them, as it does not in `--out=~/run`."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (of an unknown user it raises nothing)


def takes_files(folder: Path) -> bool:
    """Return whether files can be made in a folder. One is made: /proc and /sys refuse what their permissions allow."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as fault:
        return fault.errno in (errno.ENOSPC, errno.EDQUOT)  # There may be room by then.


def output_path(path: str | Path, option: str, *, endings: tuple[str, ...] = (), is_folder: bool = False) -> Path:
    """Return the path of a file, or a folder, that will be written; nothing is made yet.

    Raises:
        InputError: it can't be written: its ending is another, or there is no folder for it. The message names the option.
    """
    path = user_path(path)
    what = f"{option} {path}"
    if endings and path.suffix not in endings:
        raise InputError(f"{what}: the file should end in {' or '.join(endings)}")
    try:
        if is_folder:
            parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
            if not parent.is_dir() or not takes_files(parent):
                raise InputError(f"{what}: {parent} is a file or can't be written to; name another folder")
            return path
        parent = path.absolute().parent
        if path.is_dir():
            raise InputError(f"{what} is a folder; name a file in it")
        if not parent.is_dir() or not takes_files(parent):
            raise InputError(f"{what}: the folder {parent} does not exist or can't be written to")
        os.lstat(path.with_name(f"{path.name}.parts"))  # The longest name that is written.
    except FileNotFoundError:
        pass
    except OSError as fault:  # Such as a name that is too long.
        raise InputError(f"{what} can't be written: {(fault.strerror or str(fault)).lower()}") from None
    return path


def spare_inputs(out: Path, option: str, *inputs: object) -> None:
    """Raise `InputError` if writing `out` would replace an input: `out` is one, or a folder that holds one.

    Args:
        option: the name of `out`, for the message.
        inputs: paths, names such as `resnet18@FILE`, or lists of these; others are passed over.
    """
    for one in inputs:
        if isinstance(one, list | tuple):
            spare_inputs(out, option, *one)
        elif isinstance(one, str | Path):
            named = (user_path(text) for text in {str(one), str(one).rpartition("@")[2]} if text and os.path.lexists(text))
            if any(path.resolve().is_relative_to(out.resolve()) for path in named):
                raise InputError(f"{option} {out} is or holds an input, {one}, which would be replaced: choose another name")


def check_new_folder(folder: Path, option: str) -> None:
    """Raise `InputError`, which names the option, unless the folder is empty, or can be created."""
    output_path(folder, option, is_folder=True)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{option} {folder} is not an empty folder; name one that does not exist yet")


def mark_as_ours(folder: Path) -> None:
    """Mark a folder that this program has written, so that it is left out where a folder of images is read."""
    (folder / MARK).write_text(
        "Written by deepcluster. A folder with this file is left out when images are looked for in a folder above it.\n",
        encoding="utf-8",
    )


@contextmanager
def written_beside(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield the name of a file that is renamed to `path` at the end, or deleted after an error.

    Args:
        durable: one process writes the file, which survives a power cut as soon as it has its name, and replaces what a
            kill left of it. Otherwise each thread and process writes its own, as in the cache.
    """
    beside = path.with_name(f"{path.name}{'' if durable else f'.{os.getpid()}-{threading.get_ident()}'}.part")
    try:
        yield beside
        if durable:
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other threads and processes out of this context for the same path, where the system and the disk have locks."""
    lock = path.with_name(f"{path.name}.0-0.part")  # What a kill leaves is deleted like files that were being written.
    file = None
    with suppress(ImportError, OSError):
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        while file is None or not _is_at(file.fileno(), lock):
            if file:  # Its owner has deleted it, and others may have made and locked a new one.
                file.close()
            file = lock.open("wb")
            fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file:
            with file, suppress(OSError):
                lock.unlink()


def _is_at(handle: int, path: Path) -> bool:
    """Return True if an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a power cut leaves the old or the new one."""
    with written_beside(path, durable=True) as beside:
        beside.write_text(text, encoding="utf-8")


def write_cached(path: Path, content: bytes) -> bool:
    """Write a file of the cache and its folder; return False if it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as beside:
            beside.write_bytes(content)
    except OSError:
        return False
    return True


def write_table(columns: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a Parquet table of columns by name, with metadata of its schema; its key `deepcluster` marks it as ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with written_beside(path, durable=True) as beside, beside.open("wb") as file:  # Arrow takes no names that are not UTF-8.
        pq.write_table(pa.table(columns, metadata={"deepcluster": "{}", **(metadata or {})}), file)


def read_table(path: Path, columns: list[str] | None = None) -> Any:
    """Return a Parquet table, or some of its columns."""
    import pyarrow.parquet as pq

    with arrow_file(path) as file:
        return pq.read_table(file, columns=columns)


def arrow_file(path: Path) -> Any:
    """Return a file that Arrow opens itself, with any bytes in its name.

    Its threads may still hold a file of Python when the interpreter ends, which aborts the process.

    Raises:
        OSError: it can't be opened.
    """
    import pyarrow as pa

    return pa.OSFile(os.fsencode(path))


def save_tensors(path: Path, state: Mapping[str, Any], *, copy: Path | None = None) -> None:
    """Write tensors and plain values.

    Args:
        copy: also keep the file under this name.

    Raises:
        OSError, RuntimeError: it can't be written; an earlier file stays.
    """
    import torch

    with written_beside(path, durable=True) as beside:
        with beside.open("wb") as file:
            try:
                torch.save(dict(state), file)
            except RuntimeError as fault:
                if isinstance(fault.__context__, KeyboardInterrupt):  # torch's writer complains that it was not finished.
                    raise fault.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())  # before it has any name
        if copy is not None:
            copy.unlink(missing_ok=True)
            try:
                os.link(beside, copy)
            except OSError:  # a file system without hard links
                shutil.copyfile(beside, copy)


def load_tensors(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Return the tensors and plain values of a file; other objects in it are `inert.Inert`. No code is ever run.

    Args:
        mapped: tensors stay in the file, and only the parts that are read come into memory.

    Raises:
        InputError: it is missing, damaged, or holds code.
    """
    from deepcluster.core.inert import read_torch_file
    from deepcluster.core.pickles import Refused

    check_file(path)
    try:
        mapped &= os.fsencode(path) == str(path).encode("utf-8", "replace")  # torch maps no file of another name.
        with warnings.catch_warnings(action="ignore"):
            state = read_torch_file(path, mapped=mapped)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Refused as fault:
        raise InputError(f"{path} holds code ({fault}); it is refused, and nothing in it was run") from None
    except Exception as fault:  # Damaged files raise a dozen types, from zipfile, struct and torch's reader.
        begin = begin_of(path)
        if "TorchScript" in str(fault):
            raise InputError(f"{path} is a program (TorchScript): save the state_dict() of its network instead") from None
        kind = kind_of(begin)
        if isinstance(fault, pickle.UnpicklingError) or stand_in(begin) or not begin or kind == "text":
            raise InputError(f"{path} is not a checkpoint: it is {kind}") from None
        reason = next(iter(str(fault).splitlines()), type(fault).__name__).partition(". ")[0]
        raise InputError(f"{path} can't be read: truncated, damaged or not a checkpoint ({reason})") from None
    return state if isinstance(state, dict) else {}
