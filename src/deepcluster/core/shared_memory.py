"""Memory that processes of one machine share, and buffers in it for large answers."""

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Buffers that wait to be used again, and those in use above which answers are copied. Each takes two file handles.
_MOST_FREE, MOST_IN_USE = 32, 40
_ALIGNMENT = 64


class SharedFile:
    """Memory that other processes of this machine open by its path, while this object lives.

    On Linux it has no name in any folder: it needs no room in /dev/shm, and is freed with its processes, however they end.
    Elsewhere it is a temporary file.

    Attributes:
        path: where other processes find it.
    """

    def __init__(self, size: int = 0) -> None:
        process, temporary = os.getpid(), ""
        try:
            number = os.memfd_create("deepcluster")
            self.path = f"/proc/{process}/fd/{number}"
        except (AttributeError, OSError):  # Not Linux, or a container that forbids it.
            self.path = ""
        if not Path(self.path).is_file():
            number, self.path = tempfile.mkstemp(prefix="deepcluster-")
            temporary = self.path
        if temporary and size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(number, 0, size)  # Writing into a file that the disk has no room for would kill the process.
        os.ftruncate(number, size)
        self._close = weakref.finalize(self, _close_file, number, temporary, process)

    def close(self) -> None:
        """Give the memory back, once no process has it mapped."""
        self._close()


def _close_file(number: int, temporary: str, process: int) -> None:
    if os.getpid() == process:
        os.close(number)
        if temporary:
            with suppress(OSError):
                Path(temporary).unlink()


def map_file(path: str) -> NDArray[np.uint8]:
    """Return the memory of a shared file."""
    with Path(path).open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)


@lru_cache(maxsize=MOST_IN_USE)
def mapped_once(path: str, number: int) -> NDArray[np.uint8]:
    """Return the memory of a buffer, mapped once by this process; paths are used again, numbers are not."""
    return map_file(path)


class Buffer:
    """A piece of shared memory for one answer at a time."""

    def __init__(self, size: int, number: int) -> None:
        self.size, self.number = size, number
        self.file = SharedFile(size)
        self.memory = map_file(self.file.path).data


class Buffers:
    """Buffers, each used again once nothing refers to the array that it was taken as."""

    def __init__(self) -> None:
        self._free: list[Buffer] = []
        self._made = 0
        self.in_use = 0

    def take(self, size: int) -> tuple[Buffer, NDArray[np.uint8]]:
        """Return a buffer of at least `size` bytes, and its memory as an array."""
        buffer = next((one for one in self._free if one.size >= size), None)
        if buffer is None:
            self._free = []  # They are too small for what is wanted now.
            self._made += 1
            buffer = Buffer(size, self._made)
        else:
            self._free.remove(buffer)
        self.in_use += 1
        array = np.frombuffer(buffer.memory, np.uint8)
        weakref.finalize(array, self._take_back, buffer).atexit = False
        return buffer, array

    def _take_back(self, buffer: Buffer) -> None:
        self.in_use -= 1
        if len(self._free) < _MOST_FREE:
            self._free.append(buffer)


def bytes_for(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return the size of a buffer for uint8 arrays of these shapes."""
    return sum(-(-int(np.prod(shape)) // _ALIGNMENT) * _ALIGNMENT for shape in shapes)


def arrays_in(memory: NDArray[np.uint8], shapes: Sequence[tuple[int, ...]]) -> list[NDArray[np.uint8]]:
    """Return arrays of these shapes one after the other in a piece of memory, each at the beginning of a cache line."""
    arrays, start = [], 0
    for shape in shapes:
        arrays.append(memory[start : start + int(np.prod(shape))].reshape(shape))
        start += bytes_for([shape])
    return arrays
