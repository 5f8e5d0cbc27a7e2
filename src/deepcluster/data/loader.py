"""Batches in a given order, made ahead by threads: the decoders and resizers release Python's lock.

B batch, R random numbers of a position.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.data.cache import DecodedImages
from deepcluster.data.views import ClusterView, TrainingView, draws
from deepcluster.errors import UnreadableImage

T = TypeVar("T")
MOST_WORKERS = 16


@dataclass(frozen=True)
class Batch:
    """Images as the network sees them, before colours.

    Attributes:
        images_BCHW: uint8, channels last in memory.
        indices_B: index of each image in its source.
        draws_BR: random numbers of each position; empty for the cluster view.
    """

    images_BCHW: Tensor
    indices_B: Tensor
    draws_BR: NDArray[np.float64]


def usual_workers() -> int:
    """Threads that prepare images where nothing else is asked for: one a core, at most 16."""
    return min(MOST_WORKERS, os.cpu_count() or 1)


class Loader:
    """Makes batches with `workers` threads; 0 makes them in the caller's thread, one at a time.

    An image that can't be read is left out of its batch and remembered in `unreadable`.

    Attributes:
        unreadable: reason by index, of all images met so far.
        wait_seconds: how long the caller has waited for batches, in all.
    """

    def __init__(self, images: DecodedImages, *, workers: int) -> None:
        self.images = images
        self.workers = workers
        self.unreadable: dict[int, str] = {}
        self.wait_seconds = 0.0
        self._lock = Lock()
        # The number of threads is settled when a thread first asks: the caller's must not become that of `_one_thread`.
        torch.get_num_threads()
        self._pool = ThreadPoolExecutor(workers, "loader", initializer=_one_thread) if workers else None

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def cluster_views(self, view: ClusterView, indices_N: Tensor, batch_size: int) -> Generator[Batch, None, None]:
        """The cluster view of the images `indices_N`, in that order."""
        parts = _split(indices_N, batch_size)

        def make(number: int) -> Batch:
            no_draws = np.empty((len(parts[number]), 0))
            return self._batch(parts[number], lambda image, _: view(image), view.size, no_draws)

        return self._ahead(make, 0, len(parts))

    def training_views(
        self, view: TrainingView, order_N: Tensor, batch_size: int, *, seed: int, epoch: int, first_batch: int = 0
    ) -> Generator[Batch, None, None]:
        """Random views of the images `order_N` (an image may come twice), from batch number `first_batch` on."""
        parts = _split(order_N, batch_size)

        def make(number: int) -> Batch:
            part = parts[number]
            return self._batch(part, view, view.size, draws(seed, epoch, number * batch_size, len(part)))

        return self._ahead(make, first_batch, len(parts))

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

    def _batch(
        self,
        indices_B: Tensor,
        view: Callable[[Tensor, NDArray[np.float64]], Tensor],
        size: int,
        draws_BR: NDArray[np.float64],
    ) -> Batch:
        views, kept = [], []
        for row, index in enumerate(indices_B.tolist()):
            image_HWC = self._image(index)
            if image_HWC is not None:
                views.append(view(image_HWC, draws_BR[row]))
                kept.append(row)
        images_BCHW = torch.stack(views) if views else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return Batch(images_BCHW.contiguous(memory_format=torch.channels_last), indices_B[kept], draws_BR[kept])

    def _ahead(self, make: Callable[[int], T], first: int, end: int) -> Generator[T, None, None]:
        """`make(first)` … `make(end - 1)` in order, a few of them ahead of the caller."""
        if self._pool is None:
            for number in range(first, end):
                started = time.perf_counter()
                made = make(number)
                self.wait_seconds += time.perf_counter() - started
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
                self.wait_seconds += time.perf_counter() - started
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


def _one_thread() -> None:
    """Keep torch's operations on an image within the loader's thread: a team of threads each would slow the network."""
    torch.set_num_threads(1)
