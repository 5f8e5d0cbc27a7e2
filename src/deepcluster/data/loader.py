"""Batches in a given order, prepared by worker processes.

A batch is a function of the images, the view and (seed, epoch, position) only: the number of workers, a stop and a resume
change nothing. Beside a GPU, batches are pinned and copied on a stream of their own while the one before is worked on;
images that are kept on the GPU are cut there. B batch, R random numbers of a position.
"""

import pickle
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import current_process
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.device import to_device
from deepcluster.core.distributed import ONE_PROCESS, Ranks, ranks_here
from deepcluster.core.limits import usable_cores
from deepcluster.core.processes import Call, Workers, start_method
from deepcluster.core.retry import ConnectionLost, tell_troubles_to, waiting_ends
from deepcluster.core.text import count_of
from deepcluster.data.cache import DecodedImages
from deepcluster.data.prepare import Drawn, Part, as_tuple, bytes_per_image, fill_part, make_crops
from deepcluster.data.views import Draws, View

MOST_WORKERS = 16
# Passes over fewer images are made without workers, where these would still be starting.
LEAST_IMAGES = {"fork": 128, "spawn": 4096, "forkserver": 4096}
# Of batches that are prepared ahead, unless that is fewer than one for each worker.
_AHEAD_BYTES = 4 << 30
# Decoded by one call that fills the pack.
_MOST_IN_PART = 128


@dataclass(frozen=True)
class Batch:
    """Images as the network sees them, before colours.

    Attributes:
        crops: one tensor (B, 3, S, S) of uint8, channels last in memory, on the loader's device; of several crops an image
            one tensor for each size, (V · B, 3, S, S), crop after crop.
        indices_B: index of each image in its source.
        draws_BR: random numbers of each position; empty for the cluster view; (B, V, R) of several crops.
    """

    crops: tuple[Tensor, ...]
    indices_B: Tensor
    draws_BR: Draws

    @property
    def images_BCHW(self) -> Tensor:
        """The images, where there is one crop of each."""
        return self.crops[0]


def usual_workers() -> int:
    """Return the usual number of processes that prepare images: one per core, at most 16; shared among several ranks."""
    return max(1, min(MOST_WORKERS, usable_cores() // ranks_here()))


class Loader:
    """Makes batches with `workers` processes; 0 makes them in the caller's process, one at a time.

    An image that can't be read is left out of its batch and remembered in `unreadable`.

    Args:
        tell: is given a sentence when a worker has died, a server is waited for, or kept images are damaged.

    Attributes:
        unreadable: reason by index, of all images met so far.
        wait_seconds: how long the caller has waited for batches, in all (of a GPU: as far as it had nothing to do).
    """

    def __init__(
        self,
        images: DecodedImages,
        *,
        workers: int,
        device: torch.device | None = None,
        tell: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.images, self.workers = images, workers
        self.device = device or torch.device("cpu")
        self.unreadable: dict[int, str] = {}
        self.wait_seconds = 0.0
        self._tell = tell
        self._pool: Workers | None = None

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def cluster_views(self, view: View, indices_N: Tensor, batch_size: int) -> Generator[Batch, None, None]:
        """Yield the cluster view of the images `indices_N`, in that order."""
        parts = [indices_N[start : start + batch_size].numpy() for start in range(0, len(indices_N), batch_size)]
        return self._delivered(view, [(part, None) for part in parts])

    def training_views(
        self, view: View, order_N: Tensor, batches: int | Sequence[slice], *, seed: int, epoch: int, first_batch: int = 0
    ) -> Generator[Batch, None, None]:
        """Yield random views of the images `order_N` (an image may come twice), from batch number `first_batch` on.

        `batches` is the number of images of a batch, or the positions in `order_N` of those of each batch.
        """
        if isinstance(batches, int):
            batches = [slice(start, start + batches) for start in range(0, len(order_N), batches)]
        parts = [(order_N[part].numpy(), (seed, epoch, part.start)) for part in batches[first_batch:]]
        return self._delivered(view, parts)

    def fill(self, advance: Callable[[int], None], ranks: Ranks = ONE_PROCESS) -> None:
        """Decode all images once: the readable ones are kept where there is room, reasons of the others in `unreadable`.

        Args:
            advance: called with the number of images done; may raise to stop.
            ranks: the processes that fill the same pack at once; each begins elsewhere.
        """
        count, pack, is_told = len(self.images), self.images.pack, False
        step = max(1, min(_MOST_IN_PART, -(-count // max(1, 4 * self.workers))))
        parts = [range(start, min(start + step, count)) for start in range(0, count, step)]
        first = ranks.part(len(parts)).start
        busy: list[range] = []
        try:
            for wait, some in ((False, parts[first:] + parts[:first]), (True, busy)):
                calls = [(fill_part, (part, wait), 0) for part in some]
                for part, (_, answer) in zip(list(some), self._in_order(calls, count), strict=True):
                    is_done, unreadable, complaint = answer
                    if not is_done:  # Another process fills it.
                        busy.append(part)
                        continue
                    self.unreadable.update(unreadable)
                    advance(len(part))
                    if complaint and pack is not None and not is_told:
                        pack.complaint, is_told = complaint, True
                        self._tell(f"no more decoded images are kept: {complaint}; the others are decoded in each epoch")
        except ConnectionLost:
            advance(0)  # The stop that ended the waiting, if there was one, is what is reported.
            raise

    def _delivered(self, view: View, parts: Sequence[tuple[NDArray[np.int64], Drawn]]) -> Generator[Batch, None, None]:
        """Yield batches on the device; on a GPU the next ones are made and copied while the caller works on one."""
        on_gpu = self.device.type == "cuda"
        with closing(self._batches(view, parts)) as batches, closing(self._made_ahead(batches)) as ahead:
            while True:
                started = time.perf_counter()
                batch = next(ahead if on_gpu else batches, None)
                # Beside a GPU that is still busy with earlier work, nothing was waited for.
                if not on_gpu or torch.cuda.current_stream(self.device).query():
                    self.wait_seconds += time.perf_counter() - started
                if batch is None:
                    return
                yield batch

    def _batches(self, view: View, parts: Sequence[tuple[NDArray[np.int64], Drawn]]) -> Generator[Batch, None, None]:
        wanted: deque[Part] = deque()
        resident, n_bytes = self.images.resident(self.device, self.unreadable), bytes_per_image(view)

        def calls() -> Iterator[tuple[Callable[..., Any], tuple[Any, ...], int]]:
            for indices, drawn in parts:
                rows: NDArray[np.int64] | slice = slice(None)
                if not self.unreadable.keys().isdisjoint(indices.tolist()):
                    rows = np.array(
                        [row for row, one in enumerate(indices.tolist()) if one not in self.unreadable], np.int64
                    )
                wanted.append(Part(indices[rows], rows, drawn, len(indices)))
                yield make_crops, (view, wanted[-1]), n_bytes * len(indices)

        if resident is not None:
            for _ in calls():
                part = wanted.popleft()
                crops = view(resident.take(part.indices), part.draws(view))
                yield Batch(as_tuple(crops), torch.from_numpy(part.indices), part.draws(view))
            return
        for call, (arrays, rows, unreadable, n_damaged) in self._in_order(calls(), sum(len(part) for part, _ in parts)):
            part = wanted.popleft()
            self.unreadable.update(unreadable)
            if n_damaged and self.images.pack is not None:
                self._tell(f"damaged in {self.images.pack.path}, and decoded again: {count_of(n_damaged, 'image')}")
            crops = tuple(torch.from_numpy(one).movedim(-1, -3) for one in (call.arrays(arrays) if call else arrays))
            yield Batch(crops, torch.from_numpy(part.indices[rows]), part.draws(view)[rows])

    def _in_order(
        self, calls: Iterable[tuple[Callable[..., Any], tuple[Any, ...], int]], n_images: int
    ) -> Generator[tuple[Call | None, Any], None, None]:
        """Yield the answers to calls (function, arguments, bytes of a buffer) in order, asked for ahead of the caller."""
        pool, stop = self._processes(n_images), waiting_ends()
        calls = iter(calls)
        if pool is None:
            for function, args, _ in calls:
                yield None, function(self.images, *args, None)
            return
        pending: deque[Call] = deque()
        ahead_bytes = 0
        while True:
            while len(pending) <= self.workers or (len(pending) <= 2 * self.workers and ahead_bytes < _AHEAD_BYTES):
                if (asked := next(calls, None)) is None:
                    break
                pending.append(pool.submit(asked[0], *asked[1], buffer_bytes=asked[2]))
                ahead_bytes = len(pending) * asked[2]
            if not pending:
                return
            call = pending.popleft()
            try:
                yield call, call.result(stop.is_set)
            except TimeoutError:
                raise ConnectionLost("stopped while images were waited for") from None

    def _processes(self, n_images: int) -> Workers | None:
        """Return the workers, started if there is enough to do for them; None where the caller works by itself."""
        if self._pool is None and self.workers and n_images >= LEAST_IMAGES[start_method()] and not current_process().daemon:
            try:
                self._pool = Workers(
                    self.images, self.workers, role="process that prepares images", begin=tell_troubles_to, tell=self._tell
                )
            except (pickle.PicklingError, AttributeError, TypeError, OSError) as fault:
                self._tell(f"images are prepared without worker processes, which can't be started: {fault}")
                self.workers = 0
        return self._pool

    def _made_ahead(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """Yield batches on the GPU: a thread takes them, pins them, and copies them on a stream of its own."""
        stream = torch.cuda.Stream(self.device)

        def take() -> tuple[Batch, torch.cuda.Event] | None:
            with torch.cuda.stream(stream):
                batch = next(batches, None)
                if batch is None:
                    return None
                crops = tuple(to_device(crop, self.device) for crop in batch.crops)
                return replace(batch, crops=crops), stream.record_event()

        with ThreadPoolExecutor(1, "loader") as thread:
            pending = deque(thread.submit(take) for _ in range(2))
            try:
                while (made := pending.popleft().result()) is not None:
                    pending.append(thread.submit(take))
                    batch, copied = made
                    current = torch.cuda.current_stream(self.device)
                    current.wait_event(copied)
                    for crop in batch.crops:
                        crop.record_stream(current)
                    yield batch
            finally:
                thread.shutdown(wait=True, cancel_futures=True)


def image_threads(workers: int) -> ThreadPoolExecutor:
    """Return threads for work on a few images, each of which keeps torch's operations to itself."""
    # The number of threads is settled when a thread first asks: the caller's must not become that of these.
    torch.get_num_threads()
    return ThreadPoolExecutor(workers, "images", initializer=partial(torch.set_num_threads, 1))
