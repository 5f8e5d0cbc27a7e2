"""Ranks: the processes that `torchrun` starts, and what they exchange; the identity on one process.

The only place that knows torch.distributed. M rows of this rank, T rows of all ranks.
"""

import functools
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from deepcluster.core.errors import LostProcess

# A rank may wait this long for another, which evaluates or writes.
PATIENCE = timedelta(hours=2)
# And this long at the start.
JOINING = timedelta(minutes=15)


def started_ranks() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_restart() -> bool:
    """Whether `torchrun --max-restarts` has started this process after another one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_rank() -> int:
    """Number of this process among those of its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_here() -> int:
    """How many of the processes run on this machine, and share its memory and its cores."""
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

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def data_parallel(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Return the network wrapped so that its gradients are averaged over the ranks; itself on a single process."""
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

    def data_parallel(self, network: nn.Module, device: torch.device) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            # BatchNorm is synchronised, so no buffers are sent. The argument is renamed since torch 2.13.
            return DistributedDataParallel(
                network, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
            )


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that `torchrun` started, and leave them at the end; `ONE_PROCESS` without torchrun.

    Tensors on a processor go by gloo, those on a GPU by NCCL.

    Raises:
        LostProcess: another one has ended, or can't be reached.
    """
    if started_ranks() == 1 or _many():
        yield TorchRanks() if _many() else ONE_PROCESS
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, number, count = next(torch.distributed.rendezvous("env://", timeout=JOINING))  # type: ignore[attr-defined]
        place = _fresh_place(store, number, count)
        torch.distributed.init_process_group(backend, store=place, rank=number, world_size=count, timeout=PATIENCE)
        yield TorchRanks()
    except RuntimeError as fault:
        if not _is_of_another(fault):
            raise
        raise LostProcess(
            f"another of the {started_ranks()} processes has ended, or can't be reached; what it printed says why. The last "
            "good state is kept: the same command with --resume goes on"
        ) from fault
    finally:
        _group.cache_clear()
        if _many():  # The others learn by this that they wait for nothing.
            torch.distributed.destroy_process_group()


def _fresh_place(store: Any, number: int, count: int) -> Any:
    """A part of the store that no earlier attempt has written into, the same for all processes.

    `torchrun` keeps a store over its restarts (torch 2.14): with it the addresses of dead processes, which the first to
    arrive would take for those of the living. Here each says hello by a new name, and the first process answers to it.
    """
    if number > 0:
        name = uuid4().hex
        store.set(f"hello/{number}", name)
        place = store.get(f"answer/{name}").decode()
        store.set(f"{place}/{number}", "here")
        return torch.distributed.PrefixStore(place, store)  # type: ignore[attr-defined]
    place, missing, deadline = uuid4().hex, set(range(1, count)), time.monotonic() + JOINING.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise LostProcess(f"of {count} processes {len(missing)} did not come within {JOINING}: is the network open?")
        for other in sorted(missing):
            if store.check([f"{place}/{other}"]):
                missing.discard(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", place)
        time.sleep(0.02)
    return torch.distributed.PrefixStore(place, store)  # type: ignore[attr-defined]


def _is_of_another(fault: RuntimeError) -> bool:
    """Whether an error came of an exchange between processes."""
    return isinstance(fault, torch.distributed.DistError) or any(word in str(fault) for word in ("gloo", "NCCL"))


def _many() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Number of this process among all, from 0."""
    return torch.distributed.get_rank() if _many() else 0


def world_size() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _many() else 1


def on_main() -> bool:
    """Whether this process prints and writes the shared files."""
    return rank() == 0


def my_part(count: int) -> slice:
    """Which of `count` rows in a row are this rank's: parts that differ by one row at most, in the order of the ranks."""
    return part_of(count, rank(), world_size())


def part_of(count: int, number: int, parts: int) -> slice:
    """The part `number` of `count` things in `parts` parts."""
    return slice(count * number // parts, count * (number + 1) // parts)


def barrier() -> None:
    """Wait until all ranks are here."""
    if _many():
        all_reduce(torch.zeros(1))


def all_reduce(value: Tensor) -> Tensor:
    """The sum of `value` over the ranks, in its place."""
    if _many():
        torch.distributed.all_reduce(value)
    return value


def gather_rows(rows_M: Tensor) -> Tensor:
    """The rows (T, …) of all ranks, in the order of the ranks, on every rank; ranks may have different numbers of them."""
    if not _many():
        return rows_M
    counts_W = torch.zeros(world_size(), dtype=torch.int64)
    counts_W[rank()] = len(rows_M)
    all_reduce(counts_W)
    most = int(counts_W.max())
    padded = rows_M.new_zeros(most, *rows_M.shape[1:])
    padded[: len(rows_M)] = rows_M
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts_W.tolist(), strict=True)])


def gather_at(values_M: Tensor, indices_M: Tensor, count: int, fill: float) -> Tensor:
    """Values (count, …) of all ranks at their indices, on every rank; `fill` where no rank has one."""
    whole = values_M.new_full((count, *values_M.shape[1:]), fill)
    whole[gather_rows(indices_M)] = gather_rows(values_M)
    return whole


def gather_objects(value: Any) -> list[Any]:
    """Small plain values of all ranks, in the order of the ranks, on every rank."""
    if not _many():
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def data_parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, whose gradients are averaged over the ranks as they are made; itself on one process."""
    if not _many():
        return network
    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        # BatchNorm is the same on all ranks: nothing is to be sent. The argument has another name since torch 2.13.
        return DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
        )


def new_groups(groups: Sequence[Sequence[int]]) -> list[Any]:
    """A group of ranks for each list of their numbers, which every rank must ask for alike; None on one process."""
    return [_group(tuple(ranks)) if _many() else None for ranks in groups]


@functools.cache
def _group(ranks: tuple[int, ...]) -> Any:
    return torch.distributed.new_group(list(ranks))


def all_reduce_in(group: Any, value: Tensor) -> Tensor:
    """The sum of `value` over the ranks of a group of `new_groups`, in its place."""
    if group is not None:
        torch.distributed.all_reduce(value, group=group)
    return value


class Route:
    """A way of this rank's rows to other ranks and back, which their gradients take, too; one process keeps its rows.

    Args:
        to_M: number of the rank that each row is sent to, int64. All ranks make a route at once, and take it alike often.
    """

    def __init__(self, to_M: Tensor) -> None:
        if not _many():
            return
        self.order_M = torch.argsort(to_M, stable=True)
        sent_W = torch.bincount(to_M, minlength=world_size()).cpu()
        received_W = torch.empty_like(sent_W)
        torch.distributed.all_to_all_single(received_W, sent_W)
        self.sent, self.received = sent_W.tolist(), received_W.tolist()

    def there(self, rows_MP: Tensor) -> Tensor:
        """Rows (R, …) that are sent to this rank, in the order of the ranks and, of each, of its rows."""
        return _Travel.apply(rows_MP, self, True) if _many() else rows_MP

    def back(self, rows_RP: Tensor) -> Tensor:
        """Rows (M, …) of what came `there`, as they are now, where they set out from and in their order."""
        return _Travel.apply(rows_RP, self, False) if _many() else rows_RP

    def send(self, rows: Tensor, *, forth: bool) -> Tensor:
        """The rows at the other end of the way, without their history."""
        send, receive = (self.sent, self.received) if forth else (self.received, self.sent)
        given = (rows[self.order_M] if forth else rows).contiguous()
        arrived = given.new_empty(sum(receive), *given.shape[1:])
        torch.distributed.all_to_all_single(arrived, given, output_split_sizes=receive, input_split_sizes=send)
        if forth:
            return arrived
        ordered = torch.empty_like(arrived)
        ordered[self.order_M] = arrived
        return ordered


class _Travel(torch.autograd.Function):
    """Rows go one way, their gradients the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route, forth: bool) -> Tensor:
        ctx.route, ctx.forth = route, forth
        return route.send(rows, forth=forth)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.route.send(gradients[0], forth=not ctx.forth), None, None


def exchange_rows(rows_MP: Tensor, to_M: Tensor) -> Tensor:
    """The rows that the ranks send to this one: those of `Route.there`, once."""
    return Route(to_M).there(rows_MP)
