"""Region vectors of images of all sizes, one image at a time, made once and kept on disk by content in parts.

N images of a part, R regions of all of them, C channels, H and W pixels.
"""

import io
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from deepcluster.core.device import free_disk_bytes
from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.data.decode import decode
from deepcluster.data.loader import image_threads
from deepcluster.data.resize import resize
from deepcluster.data.sources import ImageSource
from deepcluster.data.storage.cache_folder import write_whole
from deepcluster.evaluation.features.rmac import region_vectors
from deepcluster.models.trunk import normalise
from deepcluster.run.model import DISK_RESERVE, FEATURES_FOLDER, Model
from deepcluster.run.resumable import digest_of

# Images of a part: what a stop loses at most. Their places must be whole numbers in float16, which ends at 2,048.
TOGETHER = 128
LARGEST_SMALLEST = 512

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """An image of a source, or a region of it: left, top, right and bottom in its own pixels."""

    index: int
    box: Box | None = None


@dataclass(frozen=True)
class Part:
    """Regions of some views, in their order.

    Attributes:
        rows_RC: of unit length, on the CPU, float16 or float32; those of a view follow each other.
        counts_N: how many regions each view has; 0: its image can't be read.
        faults: why, by place in the part.
    """

    rows_RC: Tensor
    counts_N: Tensor
    faults: dict[int, str]


@dataclass(frozen=True)
class RegionReader:
    """Looks at images through one stage of a trunk.

    Raises (when it is used):
        InputError: images of the size asked for are too small for the trunk, or a box is not in its image.
    """

    model: Model
    stage: str
    levels: int

    def parts(self, source: ImageSource, views: Sequence[View], size: int, what: str) -> Iterator[Part]:
        """Parts of up to `TOGETHER` views, in order, from disk where they are kept.

        Args:
            size: what the larger side of the whole image is scaled to. A box is cut from the scaled image, at its scale, as
                the 2018 release does.
            what: is being done, for the person who waits.
        """
        if size < self.smallest:
            raise InputError(
                f"--size: images of {size} px are too small for {self.stage} of {self.model.trunk.arch}; "
                f"use {self.smallest} or more"
            )
        with self.model.work.reporter.track(what, len(views)) as progress:
            for first in range(0, len(views), TOGETHER):
                yield self._part(source, views[first : first + TOGETHER], size, progress)

    @cached_property
    def smallest(self) -> int:
        """The least side of an image, in pixels, of which the stage has a map."""
        for side in range(1, LARGEST_SMALLEST):
            try:
                self._map(torch.zeros(3, side, side, dtype=torch.uint8), side)
            except RuntimeError:  # A pool or a convolution that is wider than what it is given.
                continue
            return side
        raise InputError(f"{self.stage} of {self.model.trunk.arch} has no map of an image of {LARGEST_SMALLEST} px")

    def _map(self, view_CHW: Tensor, smallest: int) -> Tensor:
        """The stage's map (C, H, W) of a uint8 view; a view narrower than the trunk takes stands on the mean colour."""
        model = self.model
        missing = [max(0, smallest - side) for side in view_CHW.shape[1:]]
        with torch.no_grad(), model.machine.autocast():
            x_1CHW = normalise(model.machine.put(view_CHW[None]))
            if any(missing):
                x_1CHW = pad(x_1CHW, (0, missing[1], 0, missing[0]))
            map_CHW: Tensor = model.trunk.maps(x_1CHW, (self.stage,))[self.stage][0]
            return map_CHW

    def _part(self, source: ImageSource, views: Sequence[View], size: int, progress: Callable[[int], None]) -> Part:
        facts = [(source.name(view.index), source.stamp(view.index), view.box) for view in views]
        key = digest_of(self.model.weights, self.stage, self.levels, size, facts, "regions-1")
        file = self.model.cache / FEATURES_FOLDER / f"{key}.npy"
        part = _kept(file, source, views)
        if part is None:
            part = self._made(source, views, size, progress)
            _keep(file, part)
        else:
            progress(len(views))
        return part

    def _made(self, source: ImageSource, views: Sequence[View], size: int, progress: Callable[[int], None]) -> Part:
        rows: list[Tensor] = []
        counts_N, faults = torch.zeros(len(views), dtype=torch.int64), {}
        with closing(_ahead(source, views, size, self.model.workers)) as made:
            for place, view_CHW in enumerate(made):
                if isinstance(view_CHW, str):
                    faults[place] = view_CHW
                else:
                    vectors_RC = region_vectors(self._map(view_CHW, self.smallest), self.levels)
                    counts_N[place] = len(vectors_RC)
                    rows.append(vectors_RC.to(self.model.machine.feature_dtype).cpu())
                progress(1)
                self.model.work.interruption.check()
        rows_RC = torch.cat(rows) if rows else torch.empty(0, 1, dtype=self.model.machine.feature_dtype)
        return Part(rows_RC, counts_N, faults)


def scaled(image_HWC: Tensor, size: int, box: Box | None = None) -> Tensor:
    """The image (3, H, W) with its larger side at `size`, or the box of it at that scale; uint8.

    Raises:
        InputError: nothing of the box is in the image.
    """
    height, width = image_HWC.shape[:2]
    ratio = size / max(height, width)
    to = max(1, round(height * ratio)), max(1, round(width * ratio))
    view_CHW = resize(image_HWC, to)
    if box is None:
        return view_CHW
    left, top, right, bottom = (
        min(max(0, round(edge * ratio)), end) for edge, end in zip(box, (to[1], to[0]) * 2, strict=True)
    )
    if left >= right or top >= bottom:
        edges = " ".join(f"{edge:g}" for edge in box)
        raise InputError(f"region {edges} (left, top, right, bottom) is not in the image of {width} x {height} pixels")
    return view_CHW[:, top:bottom, left:right]


def _view(source: ImageSource, view: View, size: int) -> Tensor | str:
    """The pixels, or why the image can't be read."""
    try:
        image_HWC = decode(source.read(view.index))
    except UnreadableImage as fault:
        return str(fault)
    try:
        writable = image_HWC if image_HWC.flags.writeable else image_HWC.copy()  # torch warns of any other
        return scaled(torch.from_numpy(writable), size, view.box)
    except InputError as fault:
        raise InputError(f"{source.name(view.index)}: its {fault}") from None


def _ahead(source: ImageSource, views: Sequence[View], size: int, workers: int) -> Generator[Tensor | str, None, None]:
    """The pixels of the views in order, a few of them ahead of the caller."""
    pool = image_threads(max(1, workers))
    pending: deque[Future[Tensor | str]] = deque()
    try:
        for view in views:
            pending.append(pool.submit(_view, source, view, size))
            if len(pending) > workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _keep(file: Path, part: Part) -> None:
    """One array: the place of the view in the first column, its regions in the others."""
    place_R = torch.repeat_interleave(torch.arange(len(part.counts_N)), part.counts_N)
    together = np.concatenate([place_R.numpy()[:, None].astype(part.rows_RC.numpy().dtype), part.rows_RC.numpy()], 1)
    if together.nbytes + DISK_RESERVE < free_disk_bytes(file.parent):
        content = io.BytesIO()
        np.save(content, together)
        write_whole(file, content.getvalue())


def _kept(file: Path, source: ImageSource, views: Sequence[View]) -> Part | None:
    try:
        together = np.load(file)
        os.utime(file)  # used today, as `cache info` tells
    except (OSError, ValueError, EOFError):
        return None
    counts_N = torch.from_numpy(np.bincount(together[:, 0].astype(np.int64), minlength=len(views)))
    missing = (counts_N == 0).nonzero().flatten().tolist()
    return Part(
        torch.from_numpy(together[:, 1:].copy()), counts_N, {place: _fault(source, views[place]) for place in missing}
    )


def _fault(source: ImageSource, view: View) -> str:
    try:
        decode(source.read(view.index))
    except UnreadableImage as fault:
        return str(fault)
    return "it could not be read before"
