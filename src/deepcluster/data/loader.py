"""Batches in a given order, made ahead by threads: the decoders and resizers release Python's lock.

Next to a GPU, batches are pinned and copied on a stream of their own while the one before is worked on; images that are
kept on the GPU are cut there.
B batch, R random numbers of a position.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.distributed import ranks_here
from deepcluster.core.errors import UnreadableImage
from deepcluster.data.cache import DecodedImages, KeptViews
from deepcluster.data.multi_crop import crop_draws
from deepcluster.data.storage.remote import end_waits
from deepcluster.data.views import ClusterView, Images, draws

T = TypeVar("T")
View = Callable[[Images, NDArray[np.float64]], Tensor | tuple[Tensor, ...]]
MOST_WORKERS = 16


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
    draws_BR: NDArray[np.float64]

    @property
    def images_BCHW(self) -> Tensor:
        """The images, where there is one crop of each."""
        return self.crops[0]


def usual_workers() -> int:
    """Threads that prepare images where nothing else is asked for: one a core, at most 16; of several processes a share."""
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // ranks_here()))


class Loader:
    """Makes batches with `workers` threads; 0 makes them in the caller's thread, one at a time.

    An image that can't be read is left out of its batch and remembered in `unreadable`.

    Attributes:
        unreadable: reason by index, of all images met so far.
        wait_seconds: how long the caller has waited for batches, in all (of a GPU: as far as it had nothing to do).
    """

    def __init__(self, images: DecodedImages, *, workers: int, device: torch.device | None = None) -> None:
        self.images = images
        self.workers = workers
        self.device = device or torch.device("cpu")
        self.unreadable: dict[int, str] = {}
        self.wait_seconds = 0.0
        self._lock = Lock()
        self._views: dict[ClusterView, KeptViews] = {}
        if images is not None and images.shards is not None:
            images.shards.unreadable = self.unreadable
        self._pool = image_threads(workers) if workers else None

    def close(self) -> None:
        """Stop the threads, and what they may be waiting for."""
        end_waits()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def cluster_views(self, view: ClusterView, indices_N: Tensor, batch_size: int) -> Generator[Batch, None, None]:
        """The cluster view of the images `indices_N`, in that order."""
        parts = _split(indices_N, batch_size)
        kept = self._kept_views(view)

        def make(number: int) -> Batch:
            rows = [row for row, index in enumerate(parts[number].tolist()) if index not in self.unreadable]
            indices_B = parts[number] if len(rows) == len(parts[number]) else parts[number][rows]
            views = kept.take(indices_B) if kept is not None else None
            if views is not None:
                return Batch((views,), indices_B, np.empty((len(indices_B), 0)))
            batch = self._batch(indices_B, view, np.empty((len(indices_B), 0)))
            if kept is not None:
                kept.put(batch.indices_B, batch.images_BCHW)
            return batch

        return self._delivered(make, 0, len(parts))

    def training_views(
        self, view: View, order_N: Tensor, batches: int | Sequence[slice], *, seed: int, epoch: int, first_batch: int = 0
    ) -> Generator[Batch, None, None]:
        """Random views of the images `order_N` (an image may come twice), from batch number `first_batch` on.

        `batches` is the number of images of a batch, or the positions in `order_N` of those of each batch.
        """
        if isinstance(batches, int):
            batches = [slice(start, start + batches) for start in range(0, len(order_N), batches)]
        parts, n_views = batches, getattr(view, "n_views", None)

        def make(number: int) -> Batch:
            part = order_N[parts[number]]
            where = seed, epoch, parts[number].start, len(part)
            return self._batch(part, view, draws(*where) if n_views is None else crop_draws(*where, n_views))

        return self._delivered(make, first_batch, len(parts))

    def read_all(self, indices_N: Tensor, chunk: int = 64) -> Generator[int, None, None]:
        """Decode images once, which fills the cache and finds the unreadable ones; yields how many are done."""
        parts = _split(indices_N, chunk)

        def read(number: int) -> int:
            for index in parts[number].tolist():
                self._image(index)
            return len(parts[number])

        return self._ahead(read, 0, len(parts))

    def _image(self, index: int) -> Tensor | None:
        if index in self.unreadable:
            return None
        try:
            return self.images.get(index)
        except UnreadableImage as fault:
            with self._lock:
                self.unreadable[index] = str(fault)
            return None

    def _batch(self, indices_B: Tensor, view: View, draws_BR: NDArray[np.float64]) -> Batch:
        together = self.images.together(indices_B)
        if together is not None:
            return Batch(_crops(view(together, draws_BR)), indices_B, draws_BR)
        found = [(row, self._image(index)) for row, index in enumerate(indices_B.tolist())]
        images = [image_HWC for _, image_HWC in found if image_HWC is not None]
        kept = [row for row, image_HWC in found if image_HWC is not None]
        return Batch(_crops(view(images, draws_BR[kept])), indices_B[kept], draws_BR[kept])

    def _kept_views(self, view: ClusterView) -> KeptViews | None:
        """Room for the views of all images, where these are in memory and the views are more than parts of them."""
        images = self.images
        if self.device.type != "cpu" or images.n_kept + len(self.unreadable) < len(images) or not images.n_kept:
            return None
        with self._lock:
            if view not in self._views:
                needed = len(images) * view.size**2 * 3
                index = next(index for index in range(len(images)) if index not in self.unreadable)
                if needed > images.free_bytes or min(images.get(index).shape[:2]) == view.resized:
                    return None
                images.free_bytes -= needed
                self._views[view] = KeptViews(len(images), view.size)
            return self._views[view]

    def _delivered(self, make: Callable[[int], Batch], first: int, end: int) -> Generator[Batch, None, None]:
        """Batches on the device; on a GPU the next one is copied while the caller works on one."""
        if self.device.type != "cuda":
            yield from self._ahead(make, first, end)
            return
        stream = torch.cuda.Stream(self.device)
        upcoming: deque[tuple[Batch, torch.cuda.Event]] = deque()

        def pinned(number: int) -> Batch:  # In memory that a GPU can copy from on its own.
            batch = make(number)
            return replace(batch, crops=tuple(crop if crop.is_cuda else crop.pin_memory() for crop in batch.crops))

        with closing(self._ahead(pinned, first, end)) as batches:
            for batch in batches:
                with torch.cuda.stream(stream):
                    crops = tuple(crop.to(self.device, non_blocking=True) for crop in batch.crops)
                    upcoming.append((replace(batch, crops=crops), stream.record_event()))
                if len(upcoming) > 1:
                    yield _handed_over(*upcoming.popleft())
            while upcoming:
                yield _handed_over(*upcoming.popleft())

    def _waited(self, started: float) -> None:
        """Count the time since `started`, unless a GPU was busy with earlier work all the while."""
        if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
            self.wait_seconds += time.perf_counter() - started

    def _ahead(self, make: Callable[[int], T], first: int, end: int) -> Generator[T, None, None]:
        """`make(first)` … `make(end - 1)` in order, a few of them ahead of the caller."""
        if self._pool is None:
            for number in range(first, end):
                started = time.perf_counter()
                made = make(number)
                self._waited(started)
                yield made
            return
        pending: deque[Future[T]] = deque()
        upcoming = iter(range(first, end))
        try:
            for number in upcoming:
                pending.append(self._pool.submit(make, number))
                if len(pending) > self.workers + 1:
                    break
            while pending:
                started = time.perf_counter()
                made = pending.popleft().result()
                self._waited(started)
                following = next(upcoming, None)
                if following is not None:
                    pending.append(self._pool.submit(make, following))
                yield made
        finally:
            for future in pending:
                future.cancel()


def _split(indices_N: Tensor, size: int) -> tuple[Tensor, ...]:
    """Parts of `size` indices, the last one shorter; none of none, where torch gives an empty part."""
    return indices_N.split(size) if len(indices_N) else ()


def image_threads(workers: int) -> ThreadPoolExecutor:
    """Threads for work on images, each of which keeps torch's operations to itself: a team each would slow the network."""
    # The number of threads is settled when a thread first asks: the caller's must not become that of these.
    torch.get_num_threads()
    return ThreadPoolExecutor(workers, "loader", initializer=partial(torch.set_num_threads, 1))


def _crops(views: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return views if isinstance(views, tuple) else (views,)


def _handed_over(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, safe to use on the caller's stream."""
    stream = torch.cuda.current_stream(batch.crops[0].device)
    stream.wait_event(copied)
    for crop in batch.crops:
        crop.record_stream(stream)
    return batch
