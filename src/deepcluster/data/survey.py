"""What the images are like: enough to fit settings to them and to find unreadable ones.

S images of a sample.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.text import are, count_of
from deepcluster.data.decode import decode, size_of
from deepcluster.data.loader import Loader, image_threads
from deepcluster.data.sources.image_source import ImageSource

SAMPLE = 512
# More images than this are not all read before the start, unless they are kept; the first epoch meets the rest.
CHECK_ALL = 10_000
MOST_UNREADABLE = 0.1
# Whether an image is grey is seen at this size as well.
GREY_SIDE = 64
_TOGETHER = 10_000


@dataclass(frozen=True)
class Survey:
    """What is known of a set of images before the start.

    Attributes:
        n_images: N, without the images known to be unreadable.
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
        """Return what all images take decoded, going by the sample; larger ones are reduced to `reduce_to`, if not 0."""
        if not len(self.sides_S2):
            return 0
        shorter_S = self.sides_S2.min(axis=1)
        scale_S = np.minimum(1, reduce_to / shorter_S) if reduce_to else np.ones(len(shorter_S))
        return int(self.n_images * np.mean(self.sides_S2.prod(axis=1) * scale_S**2) * 3)


class Look(NamedTuple):
    """What is found in one image: why it can't be read, or height and width; whether it is grey; a digest of its content."""

    reason: str | None
    sides: tuple[int, int] = (0, 0)
    is_grey: bool = False
    digest: bytes | None = None


def survey(source: ImageSource, *, workers: int, on_images: Callable[[int], None], at_least: int = 2) -> Survey:
    """Read an even sample of up to 512 images.

    Args:
        on_images: called with the number of images done; may raise to stop.

    Raises:
        InputError: fewer than `at_least` can be read.
    """
    sample = even_sample(range(len(source)), SAMPLE)
    found = list(looks(source, sample, workers, on_images, whole=False))
    unreadable = {index: look.reason for index, look in found if look.reason is not None}
    seen = [look for _, look in found if look.reason is None]
    if len(seen) < at_least:
        reasons = "".join(f"; {source.name(index)}: {reason}" for index, reason in list(unreadable.items())[:3])
        raise InputError(f"{are(len(seen), 'readable image')} too few to cluster; at least {at_least} are needed{reasons}")
    sides_S2 = np.array([look.sides for look in seen], np.int64).reshape(-1, 2)
    shorter_side = int(np.median(sides_S2.min(axis=1))) if seen else 0
    grey_share = sum(look.is_grey for look in seen) / max(1, len(seen))
    return Survey(len(source) - len(unreadable), shorter_side, grey_share, sides_S2, unreadable, len(sample))


def looks(
    source: ImageSource, sample: Sequence[int], workers: int, on_images: Callable[[int], None], *, whole: bool
) -> Iterator[tuple[int, Look]]:
    """Yield index and look of some images, read by threads.

    Args:
        on_images: called with the number of images done; may raise to stop.
        whole: decode all pixels of an image and take a digest of its file.
    """
    with image_threads(max(1, workers)) as pool:
        try:
            for first in range(0, len(sample), _TOGETHER):
                some = sample[first : first + _TOGETHER]
                for found in zip(some, pool.map(partial(_look, source, whole), some), strict=True):
                    on_images(1)
                    yield found
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _look(source: ImageSource, whole: bool, index: int) -> Look:
    """Read an image; as a whole, with a digest of its content, or as small as is enough to see its colours."""
    digest = None
    try:
        content = source.read(index)
        if whole and len(content):
            raw = np.ascontiguousarray(content).data if isinstance(content, np.ndarray) else content
            digest = hashlib.blake2b(raw, digest_size=16).digest()
        image_HWC = decode(content, shorter_side=None if whole else GREY_SIDE)
    except UnreadableImage as fault:
        return Look(str(fault), digest=digest)
    sides = (content if isinstance(content, np.ndarray) else image_HWC).shape[:2]
    if not whole and not isinstance(content, np.ndarray):
        sides = size_of(content)
    return Look(None, sides, bool((image_HWC == image_HWC[..., :1]).all()), digest)


def check_images(
    loader: Loader,
    seen: Survey,
    on_images: Callable[[int], None],
    ranks: Ranks = ONE_PROCESS,
    *,
    everything: bool = True,
) -> Survey:
    """Decode all images once if they are kept or at most 10,000, which finds the unreadable ones; else the survey counts.

    The loader's `unreadable` is filled.

    Args:
        on_images: called with the number of images done; may raise to stop.
        ranks: all of them call this.
        everything: if False, the survey counts whatever the number of images.

    Raises:
        InputError: more than 10 % are unreadable, or fewer than two are left.
    """
    count = len(loader.images)
    if everything and (count <= CHECK_ALL or loader.images.pack is not None):
        loader.fill(on_images, ranks)
        seen = replace(seen, n_images=count - len(loader.unreadable), looked_at=count)
    else:
        loader.unreadable.update(seen.unreadable)
    check_unreadable(loader, seen.looked_at)
    if seen.n_images < 2:
        raise InputError(f"{are(seen.n_images, 'readable image')} too few to cluster; at least 2 are needed")
    return seen


def check_unreadable(loader: Loader, looked_at: int) -> None:
    """Raise `InputError` if more than 10 % of the images looked at are unreadable."""
    bad = len(loader.unreadable)
    if bad > MOST_UNREADABLE * looked_at:
        examples = [f"{loader.images.source.name(i)} ({why})" for i, why in sorted(loader.unreadable.items())[:3]]
        raise InputError(
            f"{bad:,} of {count_of(looked_at, 'image')} can't be read, more than {MOST_UNREADABLE:.0%}: "
            f"{'; '.join(examples)}. Is this the right data? Remove or repair these files, or list the good "
            "ones in a text file"
        )


def even_sample(items: Sequence[int], count: int) -> list[int]:
    """Return `count` of the items, spread evenly; all of them where there are no more."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)
