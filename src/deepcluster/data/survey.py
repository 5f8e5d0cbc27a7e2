"""What the images are like: enough to fit settings to them and to find unreadable ones; and an overview for people."""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.text import count_of
from deepcluster.data.decode import decode
from deepcluster.data.loader import Loader, image_threads
from deepcluster.data.sources.image_source import ImageSource

SAMPLE = 512
# Of more images than this only the sample is looked at before the start; the first epoch meets the rest.
CHECK_ALL = 10_000
MOST_UNREADABLE = 0.1
# Whether an image is grey is seen at this size as well.
GREY_SIDE = 64
# Looked at in a few seconds; of more images, as many spread evenly.
MOST = 10_000
SHOWN = 5
BAR = 30


@dataclass(frozen=True)
class Survey:
    """What is known of a set of images before the start.

    Attributes:
        n_images: N, the images known to be unreadable left out.
        shorter_side: median over a sample, in pixels.
        grey_share: share of a sample that has no colour.
        sides_S2: height and width of each readable image of the sample.
        unreadable: of the sample, reasons by index.
        looked_at: how many images are known to be readable or not.
    """

    n_images: int
    shorter_side: int
    grey_share: float
    sides_S2: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    unreadable: Mapping[int, str] = field(default_factory=dict)
    looked_at: int = 0

    def decoded_bytes(self, reduce_to: int = 0) -> int:
        """What all images take decoded, going by the sample; larger ones made smaller to `reduce_to`, if not 0."""
        if not len(self.sides_S2):
            return 0
        shorter_S = self.sides_S2.min(axis=1)
        scale_S = np.minimum(1, reduce_to / shorter_S) if reduce_to else np.ones(len(shorter_S))
        return int(self.n_images * np.mean(self.sides_S2.prod(axis=1) * scale_S**2) * 3)


def survey(source: ImageSource, *, workers: int, on_images: Callable[[int], None], at_least: int = 2) -> Survey:
    """Look at an even sample of up to 512 images; raises InputError where fewer than `at_least` can be read.

    `on_images` is called with the number of images done; it may raise to stop.
    """
    sample = even_sample(range(len(source)), SAMPLE)
    sides, n_grey, unreadable = [], 0, {}
    with image_threads(max(1, workers)) as pool:
        looks = pool.map(partial(_look, source), sample)
        try:
            for index, look in zip(sample, looks, strict=True):
                on_images(1)
                if isinstance(look, str):
                    unreadable[index] = look
                else:
                    sides.append(look[0])
                    n_grey += look[1]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if len(sides) < at_least:
        reasons = "".join(f"; {source.name(index)}: {reason}" for index, reason in list(unreadable.items())[:3])
        raise InputError(f"{len(sides)} readable images are too few to cluster; at least {at_least} are needed{reasons}")
    n_images = len(source) - len(unreadable)
    if not sides:
        return Survey(n_images, 0, 0.0, unreadable=unreadable, looked_at=len(sample))
    sides_S2 = np.array(sides)
    shorter_side = int(np.median(sides_S2.min(axis=1)))
    return Survey(n_images, shorter_side, n_grey / len(sides), sides_S2, unreadable, len(sample))


def _look(source: ImageSource, index: int) -> tuple[tuple[int, int], bool] | str:
    """Height and width of an image, and whether it is grey; or why it can't be read."""
    try:
        encoded = source.read(index)
        small_HWC = decode(encoded, shorter_side=GREY_SIDE)
    except UnreadableImage as fault:
        return str(fault)
    if isinstance(encoded, np.ndarray):
        sides = encoded.shape[:2]
    else:
        with Image.open(io.BytesIO(encoded)) as image:
            sides = image.size[::-1]
    return sides, bool((small_HWC == small_HWC[..., :1]).all())


def check_images(loader: Loader, seen: Survey, on_images: Callable[[int], None], ranks: Ranks = ONE_PROCESS) -> Survey:
    """Decode all images once if they are kept or at most 10,000, which finds the unreadable ones; else the survey counts.

    The loader's `unreadable` is filled.

    Args:
        on_images: called with the number of images done; may raise to stop.
        ranks: all of them call this.

    Raises:
        InputError: more than 10 % are unreadable, or fewer than two are left.
    """
    count = len(loader.images)
    if count <= CHECK_ALL or loader.images.pack is not None:
        loader.fill(on_images, part_of=(ranks.rank, ranks.size))
        seen = replace(seen, n_images=count - len(loader.unreadable), looked_at=count)
    else:
        loader.unreadable.update(seen.unreadable)
    check_unreadable(loader, seen.looked_at)
    if seen.n_images < 2:
        raise InputError(f"{seen.n_images} readable images are too few to cluster; at least 2 are needed")
    return seen


def check_unreadable(loader: Loader, looked_at: int) -> None:
    """Raise `InputError` where more than 10 % of the images looked at are unreadable."""
    bad = len(loader.unreadable)
    if bad > MOST_UNREADABLE * looked_at:
        examples = [f"{loader.images.source.name(i)} ({why})" for i, why in sorted(loader.unreadable.items())[:3]]
        raise InputError(
            f"{bad:,} of {looked_at:,} images can't be read, more than {MOST_UNREADABLE:.0%}: {'; '.join(examples)}. "
            "Is this the right data? Remove or repair these files, or list the good ones in a text file"
        )


def even_sample(items: Sequence[int], count: int) -> list[int]:
    """`count` of the items, spread evenly; all of them where there are no more."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


@dataclass
class Overview:
    """What was found in the images that were looked at.

    Attributes:
        looked_at: how many.
        sizes: number of images by width and height.
        copies: groups of indices of images that are the same byte for byte.
        unreadable: reasons by index.
    """

    looked_at: int
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    copies: list[list[int]] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)


def overview(
    source: ImageSource, *, workers: int, everything: bool = False, on_images: Callable[[int], None] = lambda images: None
) -> Overview:
    """Decode all images, or of more than 10,000 as many spread evenly, unless `everything` is wanted."""
    sample = even_sample(range(len(source)), len(source) if everything else MOST)
    found = Overview(len(sample))
    groups: dict[bytes, list[int]] = {}
    with image_threads(max(1, workers)) as pool:
        for first in range(0, len(sample), MOST):
            some = sample[first : first + MOST]
            for index, (digest, seen) in zip(some, pool.map(partial(_look_closely, source), some), strict=True):
                on_images(1)
                if isinstance(seen, str):
                    found.unreadable[index] = seen
                else:
                    found.sizes[seen] += 1
                if digest is not None:
                    groups.setdefault(digest, []).append(index)
    found.copies = [group for group in groups.values() if len(group) > 1]
    return found


def _look_closely(source: ImageSource, index: int) -> tuple[bytes | None, tuple[int, int] | str]:
    """A digest of the content of an image, None where there is none; and its width and height, or why it can't be read."""
    try:
        content = source.read(index)
        raw = np.ascontiguousarray(content).data if isinstance(content, np.ndarray) else content
        digest = hashlib.blake2b(raw, digest_size=16).digest() if len(content) else None
    except UnreadableImage as fault:
        return None, str(fault)
    try:
        height, width, _ = decode(content).shape
    except UnreadableImage as fault:
        return digest, str(fault)
    return digest, (width, height)


def describe(found: Overview, source: ImageSource) -> Iterator[str]:
    """The lines that `deepcluster info` prints."""
    yield source.describe()
    if found.looked_at < len(source):
        yield f"looked at {found.looked_at:,} of them, spread evenly (--all looks at all):"
    # Sizes themselves where they are few, else the shorter sides by powers of two.
    if len(found.sizes) <= SHOWN:
        rows = [(f"{width} × {height}", count) for (width, height), count in found.sizes.most_common()]
    else:
        sides: Counter[int] = Counter()
        for (width, height), count in found.sizes.items():
            sides[min(width, height).bit_length()] += count
        rows = [(f"shorter side {1 << bits - 1}–{(1 << bits) - 1}", sides[bits]) for bits in sorted(sides)]
    most, broad = max((count for _, count in rows), default=1), max((len(label) for label, _ in rows), default=0)
    for label, count in rows:
        yield f"  {label:<{broad}}  {'█' * max(1, round(BAR * count / most))} {count:,}"
    copies = sum(len(group) - 1 for group in found.copies)
    if copies:
        examples = "; ".join(" = ".join(source.name(i) for i in group[:3]) for group in found.copies[:SHOWN])
        yield f"{copies:,} {'copy' if copies == 1 else 'copies'} of other images, byte for byte, e.g. {examples}"
    else:
        yield "no copies of other images, byte for byte"
    if found.unreadable:
        yield f"{count_of(len(found.unreadable), 'image')} can't be read:"
        # Without the numbers that differ from file to file; the most frequent ones.
        groups: dict[str, list[int]] = {}
        for index, reason in sorted(found.unreadable.items()):
            groups.setdefault(reason.partition(":")[0], []).append(index)
        for reason, indices in sorted(groups.items(), key=lambda item: -len(item[1]))[:SHOWN]:
            yield f"  {reason}: {len(indices):,}, e.g. {source.name(indices[0])}"
    else:
        yield "none that can't be read"
