"""Ranks that are threads of this process: tests of what is split over ranks, without processes."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepcluster.core.distributed import Ranks


class ThreadRanks(Ranks):
    """One of several threads that exchange tensors through shared slots.

    Attributes:
        sent: bytes that this rank has passed to `sum` and `gather`.
    """

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(slots)
        self.slots, self.everyone = slots, barrier
        self.sent = 0

    def gather_objects(self, value: Any) -> list[Any]:
        self.everyone.wait()
        self.slots[self.rank] = value
        self.everyone.wait()
        return list(self.slots)

    def sum(self, value: Tensor) -> Tensor:
        self.sent += value.nbytes
        parts = self.gather_objects(value.clone())
        return value.copy_(sum(parts[1:], start=parts[0]))

    def gather(self, rows_M: Tensor) -> Tensor:
        self.sent += rows_M.nbytes
        return torch.cat(self.gather_objects(rows_M.clone()))

    def exchange(self, rows_MP: Tensor, to_M: Tensor) -> Tensor:
        return torch.cat([rows[to == self.rank] for rows, to in self.gather_objects((rows_MP.clone(), to_M))])

    def barrier(self) -> None:
        self.everyone.wait()


def on_ranks(shares: Sequence[Any], work: Callable[[Any, Ranks], Any]) -> list[Any]:
    """Return what `work(share, ranks)` returns on each rank; an error of one rank is raised here."""
    barrier, slots = threading.Barrier(len(shares), timeout=60), [None] * len(shares)
    results: dict[int, Any] = {}
    errors: list[Exception] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(shares[rank], ThreadRanks(rank, slots, barrier))
        except threading.BrokenBarrierError:
            pass  # Another rank has failed.
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(len(shares))]
