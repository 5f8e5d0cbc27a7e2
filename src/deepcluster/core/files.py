"""Files that are complete at every moment (written beside, flushed, renamed); tensors read without running code."""

import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepcluster.core.errors import InputError


def check_new_folder(folder: Path, option: str) -> None:
    """Raise `InputError`, which names the option, unless the folder is empty, or can be created."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{option} {folder} is not an empty folder; name one that does not exist yet")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{option} {folder}: {parent} is a file or can't be written to")


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: beside its place, flushed, then renamed."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_table(columns: Mapping[str, Any], path: Path) -> None:
    """Write a Parquet table of columns by name: beside its place, then renamed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    beside = path.with_name(path.name + ".part")
    pq.write_table(pa.table(columns), beside)
    beside.replace(path)


def save_tensors(path: Path, state: Mapping[str, Any], *, copy: Path | None = None) -> None:
    """Write tensors and plain values atomically: beside their place, flushed, then renamed.

    Args:
        copy: also keep the file under this name.

    Raises:
        OSError, RuntimeError: it can't be written; an earlier file stays.
    """
    import torch

    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        if copy is not None:
            copy.unlink(missing_ok=True)
            try:
                os.link(beside, copy)
            except OSError:  # a file system without hard links
                shutil.copyfile(beside, copy)
        beside.replace(path)
    except (OSError, RuntimeError):
        beside.unlink(missing_ok=True)
        raise


def load_tensors(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Return the tensors and plain values of a file. No code in it is ever run.

    Args:
        mapped: tensors stay in the file, and only the parts that are read come into memory.

    Raises:
        InputError: it is missing, damaged, or holds code.
    """
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except pickle.UnpicklingError:
        if zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80":
            raise InputError(
                f"{path} holds more than tensors and plain values (pickled code); it is refused, not run"
            ) from None
        raise InputError(f"{path} is not a checkpoint") from None
    # Damaged files raise a dozen types, from zipfile, struct and torch's reader.
    except Exception as fault:
        reason = next(iter(str(fault).splitlines()), type(fault).__name__)
        raise InputError(f"{path} can't be read: truncated, damaged or not a checkpoint ({reason})") from None
    return state if isinstance(state, dict) else {}
