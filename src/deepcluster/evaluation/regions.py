"""R-MAC, a descriptor of an image from the maxima of a map in square regions (Tolias, Sicre and Jégou, ICLR 2016).

Region vectors of images of all sizes are extracted image by image and kept on disk by content, in parts.
N images, R regions, C channels, H and W pixels of the image or the map, P numbers after PCA, L levels.
"""

import io
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import free_disk_bytes
from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.files import write_cached
from deepcluster.core.work import Advance
from deepcluster.data.decode import decode
from deepcluster.data.loader import image_threads
from deepcluster.data.resample import resize
from deepcluster.data.sources import ImageSource
from deepcluster.models.statistics import IMAGENET_MEAN
from deepcluster.run.features import Pooled
from deepcluster.run.kept_features import DISK_RESERVE, FEATURES_FOLDER
from deepcluster.run.model import Model
from deepcluster.run.resumable import digest_of

# Images of a part, which a stop loses at most. Their places must be whole numbers in float16, which ends at 2,048.
TOGETHER = 128
LARGEST_SMALLEST = 512
# Section 3.2 of the paper: the share that neighbouring regions should have in common; and the authors' program, which tries
# up to this many more regions along the longer side than along the shorter.
OVERLAP = Fraction(2, 5)
MOST_EXTRA = 6

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Level:
    """Square regions of one side, at every pair of these first rows and first columns."""

    side: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)


@lru_cache(maxsize=4096)
def region_levels(height: int, width: int, levels: int) -> tuple[Level, ...]:
    """Return the regions of a map, level by level.

    At level l regions have the side 2 · min(H, W) / (l + 1), rounded down; l of them lie along the shorter side of the map
    and l + m along the longer, spread evenly from edge to edge. m is 0 for a square map; otherwise the number from 1 to 6
    for which the overlap of two neighbours of level 1 is nearest to 40 % (the smaller of two equally near). A level whose
    side is 0 is left out. There is no region of the whole map, unless it is square.
    """
    shorter, longer = sorted((height, width))

    def distance(more: int) -> Fraction:
        """How far the overlap of `more` + 1 squares along the longer side is from the desired one."""
        return abs(1 - Fraction(longer - shorter, more * shorter) - OVERLAP)

    extra = 0 if height == width else min(range(1, MOST_EXTRA + 1), key=distance)
    found = []
    for level in range(1, levels + 1):
        side = 2 * shorter // (level + 1)
        if side:
            tops = _starts(height, side, level + extra * (height > width))
            lefts = _starts(width, side, level + extra * (width > height))
            found.append(Level(side, tops, lefts))
    return tuple(found)


def _starts(length: int, side: int, count: int) -> tuple[int, ...]:
    """Return where `count` regions begin along a side: evenly, rounded down; the last ends exactly at the edge."""
    return tuple(number * (length - side) // max(1, count - 1) for number in range(count))


def region_vectors(map_CHW: Tensor, levels: int) -> Tensor:
    """Return the maximum of each channel in each region: rows (R, C) of unit length, float32, level by level, row by row."""
    rows = []
    for level in region_levels(*map_CHW.shape[1:], levels):
        # Regions side by side share the maxima over rows.
        across_TCW = torch.stack([map_CHW[:, top : top + level.side].amax(1) for top in level.tops])
        rows_TLC = torch.stack([across_TCW[:, :, left : left + level.side].amax(2) for left in level.lefts], 1)
        rows.append(rows_TLC.flatten(0, 1))
    return normalize(torch.cat(rows).float(), dim=1)


def aggregate(rows_RC: Tensor, counts_N: Tensor, whitening: Whitening) -> Tensor:
    """Return descriptors (N, P) of unit length: region vectors whitened, scaled to unit length, and summed per image.

    Args:
        rows_RC: the regions of all images, one image after the other.
        counts_N: number of regions of each image; the descriptor of an image without regions is zero.
        whitening: learned on regions of other images, with `unit_rows`.
    """
    image_R = torch.repeat_interleave(torch.arange(len(counts_N)), counts_N).to(rows_RC.device)
    points_RP = whitening.transform(rows_RC.float())
    sums_NP = torch.zeros(len(counts_N), points_RP.shape[1], device=rows_RC.device)
    return normalize(sums_NP.index_add_(0, image_R, points_RP), dim=1)


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
            stage = f"{self.stage} of {self.model.trunk.arch}"
            raise InputError(f"--size: images of {size} px are too small for {stage}; use {self.smallest} or more")
        with self.model.work.track(what, len(views)) as advance:
            for first in range(0, len(views), TOGETHER):
                yield self._part(source, views[first : first + TOGETHER], size, advance)

    @cached_property
    def smallest(self) -> int:
        """The smallest side of an image, in pixels, for which the stage has a map."""
        for side in range(1, LARGEST_SMALLEST):
            try:
                self.model.extract(torch.zeros(1, 3, side, side, dtype=torch.uint8), [Pooled(self.stage)])
            except (RuntimeError, InputError):  # A pool or a convolution is wider than its input.
                continue
            return side
        raise InputError(f"{self.stage} of {self.model.trunk.arch} has no map of an image of {LARGEST_SMALLEST} px")

    def _part(self, source: ImageSource, views: Sequence[View], size: int, advance: Advance) -> Part:
        facts = [(source.name(view.index), source.stamp(view.index), view.box) for view in views]
        key = digest_of(self.model.weights, self.stage, self.levels, size, facts, "regions-2")
        file = self.model.cache / FEATURES_FOLDER / f"{key}.npy"
        part = _kept(file, source, views, size)
        if part is not None:
            advance(len(views))
            return part
        # Rows of unit length fit into float16, which NumPy has and which rounds less than bfloat16.
        kind = torch.float16 if self.model.machine.feature_dtype.itemsize == 2 else torch.float32
        rows = list[Tensor]()
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
        rows_RC = torch.cat(rows) if rows else torch.empty(0, 1, dtype=kind)
        # One array: the place of the view in the first column, its regions in the others.
        place_R = torch.repeat_interleave(torch.arange(len(views)), counts_N)
        together = torch.cat([place_R[:, None].to(kind), rows_RC], 1).numpy()
        if together.nbytes + DISK_RESERVE < free_disk_bytes(file.parent):
            content = io.BytesIO()
            np.save(content, together)
            write_cached(file, content.getvalue())
        return Part(rows_RC, counts_N, faults)


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
    left, top, right, bottom = (min(max(0, round(edge * ratio)), end) for edge, end in zip(box, to[::-1] * 2, strict=True))
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


def _kept(file: Path, source: ImageSource, views: Sequence[View], size: int) -> Part | None:
    try:
        together = torch.from_numpy(np.load(file))
        os.utime(file)  # The last use, which `cache info` shows.
    except (OSError, ValueError, EOFError):
        return None
    counts_N, faults = torch.bincount(together[:, 0].long(), minlength=len(views)), {}
    for place in (counts_N == 0).nonzero().flatten().tolist():
        reason = _pixels(source, views[place], size)
        faults[place] = reason if isinstance(reason, str) else "it could not be read before"
    return Part(together[:, 1:].contiguous(), counts_N, faults)
