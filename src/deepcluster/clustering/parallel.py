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

# Rows of floats that are handled at once where there is no matrix product.
BLOCK_ROWS = 1024


def blocks_of(rows: slice, block_rows: int) -> list[slice]:
    """Split the rows into blocks."""
    return [slice(start, min(start + block_rows, rows.stop)) for start in range(rows.start, rows.stop, block_rows)]


def map_blocks(work: Callable[[slice], Result], blocks: list[slice], device: torch.device) -> list[Result]:
    """Return `work` of each block, in order; on the CPU by as many threads as torch may use, on a GPU one by one."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(blocks) < 2:
        return [work(block) for block in blocks]
    return list(_pool(threads).map(work, blocks))


def finite_rows(points_NP: Tensor) -> Tensor:
    """Return a mask (N) of the rows whose values are all finite as float32."""
    finite_N = torch.empty(len(points_NP), dtype=torch.bool, device=points_NP.device)

    def check(block: slice) -> None:
        finite_N[block] = torch.isfinite(points_NP[block].float()).all(dim=1)

    map_blocks(check, blocks_of(slice(0, len(points_NP)), BLOCK_ROWS), points_NP.device)
    return finite_N


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
