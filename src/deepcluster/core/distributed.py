"""Ranks: the processes that `torchrun` starts, and what they exchange.

The only module that imports torch.distributed. M rows of this rank, T rows of all ranks.
"""

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, nn

from deepcluster.core.errors import DeepClusterError, InputError, LostProcess

T = TypeVar("T")

# Longest time that a rank waits for another, which evaluates or writes.
TIMEOUT = timedelta(hours=2)
# Longest time that it waits at the start.
JOIN_TIMEOUT = timedelta(minutes=15)


def started_ranks() -> int:
    """Return the number of processes that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_restart() -> bool:
    """Return True if `torchrun --max-restarts` started this process after another one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_passed_on(signal_name: str) -> bool:
    """Return True if `torchrun` sends a signal on to this process and then waits for its end, also under nohup."""
    passed_on = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP")
    return "TORCHELASTIC_RUN_ID" in os.environ and signal_name in passed_on.split(",")


def local_rank() -> int:
    """Return the number of this process, and so of its GPU, on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_here() -> int:
    """Return how many of the processes run on this machine and share its memory and cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Ranks:
    """The processes of a run and what they exchange. This class is a single process, where each exchange is the identity.

    M rows of this rank, T rows of all ranks.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """True on the process that prints and writes shared files."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return which of `count` consecutive rows belong to this rank: contiguous parts that differ by at most one row."""
        return part_of(count, self.rank, self.size)

    def sum(self, value: Tensor) -> Tensor:
        """Add up `value` over the ranks, in place, and return it."""
        return value

    def gather(self, rows_M: Tensor) -> Tensor:
        """Return the rows (T, …) of all ranks, in the order of the ranks, on every rank; M may differ between ranks."""
        return rows_M

    def exchange(self, rows_MP: Tensor, to_M: Tensor) -> Tensor:
        """Send each row to the rank `to_M` names; return the received rows, ordered by sender, then as they were sent."""
        return rows_MP

    def gather_objects(self, value: Any) -> list[Any]:
        """Return small plain values of all ranks, in the order of the ranks, on every rank."""
        return [value]

    def from_main(self, make: Callable[[], T]) -> T:
        """Return on every rank the small plain value that `make` returns on the first; its errors are raised on all."""
        made: Any = None
        if self.is_main:
            try:
                made = make()
            except (DeepClusterError, OSError) as fault:
                made = fault
        made = self.gather_objects(made)[0]
        if isinstance(made, DeepClusterError | OSError):
            raise made
        return made  # type: ignore[no-any-return]

    def check_same(self, what: str, value: str) -> None:
        """Raise `InputError` on every rank if `value` differs between ranks; `what` names it in the message."""
        values = self.gather_objects(value)
        if other := next((number for number, one in enumerate(values) if one != values[0]), 0):
            raise InputError(
                f"{what} of process {other} differ from those of process 0 ({values[other]}; {values[0]}): all processes "
                "need the same images under the same names, and the same model"
            )

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Return the network wrapped so that its gradients are averaged over the ranks; itself on a single process.

        What it is called with stays on its device.
        """
        return network


ONE_PROCESS = Ranks()


class TorchRanks(Ranks):
    """The ranks of the default process group of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def sum(self, value: Tensor) -> Tensor:
        torch.distributed.all_reduce(value)
        return value

    def gather(self, rows_M: Tensor) -> Tensor:
        counts_W = torch.zeros(self.size, dtype=torch.int64)
        counts_W[self.rank] = len(rows_M)
        self.sum(counts_W)
        padded = rows_M.new_zeros(int(counts_W.max()), *rows_M.shape[1:])
        padded[: len(rows_M)] = rows_M
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts_W.tolist(), strict=True)])

    def exchange(self, rows_MP: Tensor, to_M: Tensor) -> Tensor:
        sent_W = torch.bincount(to_M, minlength=self.size).cpu()
        received_W = torch.empty_like(sent_W)
        torch.distributed.all_to_all_single(received_W, sent_W)
        sent, received = sent_W.tolist(), received_W.tolist()
        given = rows_MP[torch.argsort(to_M, stable=True)].contiguous()
        arrived = given.new_empty(sum(received), *given.shape[1:])
        torch.distributed.all_to_all_single(arrived, given, output_split_sizes=received, input_split_sizes=sent)
        return arrived

    def gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def data_parallel(self, network: nn.Module) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            # BatchNorm is synchronised, so no buffers are sent. The argument is renamed since torch 2.13.
            return DistributedDataParallel(network, broadcast_buffers=False)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, and leave them at the end; `ONE_PROCESS` without torchrun.

    Tensors on a processor go by gloo, those on a GPU by NCCL.

    Raises:
        LostProcess: another process has ended, or can't be reached.
    """
    if started_ranks() == 1 or _is_initialised():
        yield TorchRanks() if _is_initialised() else ONE_PROCESS
        return
    try:
        store, number, count = next(torch.distributed.rendezvous("env://", timeout=JOIN_TIMEOUT))  # type: ignore[attr-defined]
        with group(_fresh_store(store, number, count), number, count) as ranks:
            yield ranks
    except RuntimeError as fault:
        # Only errors of exchanges between processes.
        if not isinstance(fault, torch.distributed.DistError) and not any(word in str(fault) for word in ("gloo", "NCCL")):
            raise
        raise LostProcess(
            f"another of the {started_ranks()} processes has ended, or can't be reached; what it printed says why"
        ) from fault


@contextmanager
def group(store: Any, rank: int, size: int) -> Iterator[Ranks]:
    """Form the group of the processes that meet in a store of torch.distributed, and end it, with its threads.

    This module is first imported within a group by DistributedDataParallel, and keeps that group as a default argument for
    ever (torch 2.14). A thread of gloo that outlives `destroy_process_group` aborts the process now and then, at its exit.
    """
    import torch.distributed.nn  # Takes no time: torch is loaded.

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        yield TorchRanks()
    finally:
        if _is_initialised():  # It ends the waiting of the other processes.
            torch.distributed.destroy_process_group()
            gc.collect()  # Networks in circles of references hold it too.


def _fresh_store(store: Any, number: int, count: int) -> Any:
    """Return a part of the store that no earlier attempt has written into, the same for all processes.

    `torchrun` keeps a store over its restarts (torch 2.14), with the addresses of dead processes, which the first process to
    arrive would take for live ones. Here each process registers under a new name, and the first process answers to it.
    """
    if number > 0:
        name = uuid4().hex
        store.set(f"hello/{number}", name)
        place = store.get(f"answer/{name}").decode()
        store.set(f"{place}/{number}", "here")
        return torch.distributed.PrefixStore(place, store)  # type: ignore[attr-defined]
    place, missing, deadline = uuid4().hex, set(range(1, count)), time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise LostProcess(f"{len(missing)} of {count} processes missing after {JOIN_TIMEOUT}: is the network open?")
        for other in sorted(missing):
            if store.check([f"{place}/{other}"]):
                missing.discard(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", place)
        time.sleep(0.02)
    return torch.distributed.PrefixStore(place, store)  # type: ignore[attr-defined]


def _is_initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def part_of(count: int, number: int, parts: int) -> slice:
    """Return part `number` of `count` items in `parts` contiguous parts."""
    return slice(count * number // parts, count * (number + 1) // parts)
