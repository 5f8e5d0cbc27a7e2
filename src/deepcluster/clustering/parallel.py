"""Blocks of rows on several threads, each computed independently.

torch's own threads synchronise after every operation, and on a busy machine each synchronisation waits for the slowest:
k-means on two threads beside one other busy process took 8 times as long as on one thread. Independent blocks do not wait.

N points, P components.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# Rows of floats that are handled at once where there is no matrix product. On a GPU, where each operation takes 5 µs to
# start, as many rows as hold this many numbers.
BLOCK_ROWS, BLOCK_NUMBERS_GPU = 1024, 1 << 25


def blocks_of(rows: slice, block_rows: int) -> list[slice]:
    """Split the rows into blocks."""
    return [slice(start, min(start + block_rows, rows.stop)) for start in range(rows.start, rows.stop, block_rows)]


def row_blocks(rows_NP: Tensor) -> list[slice]:
    """Return the blocks in which all rows are handled where there is no matrix product."""
    return blocks_of(slice(0, len(rows_NP)), rows_at_once(rows_NP))


def rows_at_once(rows_NP: Tensor) -> int:
    """Return the number of rows of a block."""
    return max(BLOCK_ROWS, BLOCK_NUMBERS_GPU // max(1, rows_NP[:1].numel())) if rows_NP.is_cuda else BLOCK_ROWS


def map_blocks(work: Callable[[slice], Result], blocks: list[slice], device: torch.device) -> list[Result]:
    """Return `work` of each block, in order; on the CPU by as many threads as torch may use, on a GPU one by one."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(blocks) < 2:
        return [work(block) for block in blocks]
    return list(_pool(threads).map(work, blocks))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads whose torch operations use one thread each."""

    def use_one_thread() -> None:
        torch.set_num_threads(1)
        # A thread adopts the setting at its first operation: trigger it before the setting of the others is restored.
        torch.get_num_threads()

    all_started = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="clustering", initializer=use_one_thread)
    # All start now: a thread's setting also applies to threads that start later, and is restored below.
    list(pool.map(lambda _: all_started.wait(), range(threads)))
    torch.set_num_threads(threads)
    return pool
