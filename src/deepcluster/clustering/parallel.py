"""Blocks of rows on several threads, each of which computes alone.

torch's own threads meet after every operation, and on a busy machine each meeting waits for the slowest: k-means on two
threads beside one other busy process took 8 times as long as on one thread. Blocks that do not meet have no such wait.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")


def blocks_of(rows: slice, block_rows: int) -> list[slice]:
    """The rows in blocks."""
    return [slice(start, min(start + block_rows, rows.stop)) for start in range(rows.start, rows.stop, block_rows)]


def map_blocks(work: Callable[[slice], Result], blocks: list[slice], device: torch.device) -> list[Result]:
    """`work` of each block, in order; on as many threads as torch may use, on a GPU one after the other."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(blocks) < 2:
        return [work(block) for block in blocks]
    return list(_pool(threads).map(work, blocks))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose torch operations use one thread each."""
    everyone = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="clustering", initializer=_compute_alone)
    # All begin now: the setting of a thread is also that of threads which begin later, and is given back below.
    list(pool.map(lambda _: everyone.wait(), range(threads)))
    torch.set_num_threads(threads)
    return pool


def _compute_alone() -> None:
    torch.set_num_threads(1)
    # A thread takes the setting over at its first operation: now, before the others' is given back.
    torch.get_num_threads()
