"""Region vectors of images of all sizes, extracted image by image and kept on disk by content, in parts.

N images of a part, R regions of all of them, C channels, H and W pixels.
"""

import io
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.device import free_disk_bytes
from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.work import Advance
from deepcluster.data.decode import decode
from deepcluster.data.loader import image_threads
from deepcluster.data.resample import resize
from deepcluster.data.sources import ImageSource
from deepcluster.data.storage import write_whole
from deepcluster.evaluation.features.rmac import region_vectors
from deepcluster.models.trunk import IMAGENET_MEAN
from deepcluster.run.model import DISK_RESERVE, FEATURES_FOLDER, Model
from deepcluster.run.pooling import Pooled
from deepcluster.run.resumable import digest_of

# Images of a part, which a stop loses at most. Their places must be whole numbers in float16, which ends at 2,048.
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
        counts_N: number of regions of each view; 0 for unreadable images.
        faults: why images can't be read, by place in the part.
    """

    rows_RC: Tensor
    counts_N: Tensor
    faults: dict[int, str]


@dataclass(frozen=True)
class Regions(Pooled):
    """The maxima of a stage's map in its R-MAC regions, as rows (R, C); for one image at a time."""

    levels: int = 3

    def rows(self, map_BCHW: Tensor) -> Tensor:
        """Return rows (R, C) of the map of one image."""
        return region_vectors(map_BCHW[0], self.levels)


@dataclass(frozen=True)
class RegionReader:
    """Extracts regions from one stage of a trunk.

    Raises (when it is used):
        InputError: images of the requested size are too small for the trunk, or a box is not in its image.
    """

    model: Model
    stage: str
    levels: int

    def parts(self, source: ImageSource, views: Sequence[View], size: int, what: str) -> Iterator[Part]:
        """Yield parts of up to `TOGETHER` views, in order, from disk if they are kept there.

        Args:
            size: length in pixels to which the longer side of the whole image is scaled. A box is cut from the scaled
                image, at its scale, as in the 2018 release.
            what: name of the work, for the progress line.
        """
        if size < self.smallest:
            raise InputError(
                f"--size: images of {size} px are too small for {self.stage} of {self.model.trunk.arch}; "
                f"use {self.smallest} or more"
            )
        with self.model.work.track(what, len(views)) as advance:
            for first in range(0, len(views), TOGETHER):
                yield self._part(source, views[first : first + TOGETHER], size, advance)

    @cached_property
    def smallest(self) -> int:
        """The smallest side of an image, in pixels, for which the stage has a map."""
        for side in range(1, LARGEST_SMALLEST):
            try:
                self.model.extract(torch.zeros(1, 3, side, side, dtype=torch.uint8), [Pooled(self.stage)])
            except RuntimeError:  # A pool or a convolution is wider than its input.
                continue
            return side
        raise InputError(f"{self.stage} of {self.model.trunk.arch} has no map of an image of {LARGEST_SMALLEST} px")

    def _part(self, source: ImageSource, views: Sequence[View], size: int, advance: Advance) -> Part:
        facts = [(source.name(view.index), source.stamp(view.index), view.box) for view in views]
        key = digest_of(self.model.weights, self.stage, self.levels, size, facts, "regions-2")
        file = self.model.cache / FEATURES_FOLDER / f"{key}.npy"
        part = _kept(file, source, views)
        if part is not None:
            advance(len(views))
            return part
        kind, rows = self.model.machine.feature_dtype, list[Tensor]()
        wanted = Regions(self.stage, levels=self.levels)
        counts_N, faults = torch.zeros(len(views), dtype=torch.int64), dict[int, str]()
        with closing(_prefetched(source, views, size, self.model.workers)) as pixels:
            for place, view_CHW in enumerate(pixels):
                if isinstance(view_CHW, str):
                    faults[place] = view_CHW
                else:
                    made = self.model.extract(padded(view_CHW, self.smallest)[None], [wanted])
                    rows.append(made[wanted].to("cpu", kind))
                    counts_N[place] = len(rows[-1])
                advance(1)
        part = Part(torch.cat(rows) if rows else torch.empty(0, 1, dtype=kind), counts_N, faults)
        _keep(file, part)
        return part


def padded(view_CHW: Tensor, smallest: int) -> Tensor:
    """Return a view with sides of at least `smallest` pixels: a narrower one is placed on the mean colour."""
    channels, height, width = view_CHW.shape
    if min(height, width) >= smallest:
        return view_CHW
    colour_C11 = (255 * torch.tensor(IMAGENET_MEAN)).round().to(torch.uint8)[:, None, None]
    wide_CHW = colour_C11.repeat(1, max(height, smallest), max(width, smallest))
    wide_CHW[:channels, :height, :width] = view_CHW
    return wide_CHW


def scaled(image_HWC: Tensor, size: int, box: Box | None = None) -> Tensor:
    """Return the image (3, H, W) with its longer side at `size`, or the box of it at that scale; uint8.

    Raises:
        InputError: the box does not overlap the image.
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


def _pixels(source: ImageSource, view: View, size: int) -> Tensor | str:
    """Return the pixels, or why the image can't be read."""
    try:
        image_HWC = decode(source.read(view.index))
    except UnreadableImage as fault:
        return str(fault)
    try:
        writable = image_HWC if image_HWC.flags.writeable else image_HWC.copy()  # torch warns of any other
        return scaled(torch.from_numpy(writable), size, view.box)
    except InputError as fault:
        raise InputError(f"{source.name(view.index)}: its {fault}") from None


def _prefetched(source: ImageSource, views: Sequence[View], size: int, workers: int) -> Generator[Tensor | str, None, None]:
    """Yield the pixels of the views in order, with a few of them prepared ahead of the caller."""
    pool = image_threads(max(1, workers))
    pending: deque[Future[Tensor | str]] = deque()
    try:
        for view in views:
            pending.append(pool.submit(_pixels, source, view, size))
            if len(pending) > workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _keep(file: Path, part: Part) -> None:
    """Write one array: the place of the view in the first column, its regions in the others."""
    place_R = torch.repeat_interleave(torch.arange(len(part.counts_N)), part.counts_N)
    together = torch.cat([place_R[:, None].to(part.rows_RC.dtype), part.rows_RC], 1).numpy()
    if together.nbytes + DISK_RESERVE < free_disk_bytes(file.parent):
        content = io.BytesIO()
        np.save(content, together)
        write_whole(file, content.getvalue())


def _kept(file: Path, source: ImageSource, views: Sequence[View]) -> Part | None:
    try:
        together = torch.from_numpy(np.load(file))
        os.utime(file)  # The last use, which `cache info` shows.
    except (OSError, ValueError, EOFError):
        return None
    counts_N = torch.bincount(together[:, 0].long(), minlength=len(views))
    missing = (counts_N == 0).nonzero().flatten().tolist()
    return Part(together[:, 1:].contiguous(), counts_N, {place: _fault(source, views[place]) for place in missing})


def _fault(source: ImageSource, view: View) -> str:
    try:
        decode(source.read(view.index))
    except UnreadableImage as fault:
        return str(fault)
    return "it could not be read before"
