"""What the images are like: enough to fit settings to them, and to find the ones that can't be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepcluster.data.loader import Loader
from deepcluster.errors import InputError

SAMPLE = 512
# Of more images than this only a sample is decoded before the start; the first epoch meets the rest.
CHECK_ALL = 100_000
CHECK_SAMPLE = 10_000
MOST_UNREADABLE = 0.1


@dataclass(frozen=True)
class Survey:
    """What is known of a set of images before the start.

    Attributes:
        n_images: N, the unreadable ones left out.
        shorter_side: median over a sample, in pixels.
        grey_share: share of a sample that has no colour.
    """

    n_images: int
    shorter_side: int
    grey_share: float


def check_images(loader: Loader, on_images: Callable[[int], None]) -> int:
    """Decode the images once, which fills the cache and finds the unreadable ones; return how many were looked at.

    All of them up to 100,000, an even sample of 10,000 of more.

    Args:
        loader: its `unreadable` is filled.
        on_images: called with the number of images done; may raise to stop.

    Raises:
        InputError: more than 10 % are unreadable.
    """
    n_images = len(loader.images)
    count = n_images if n_images <= CHECK_ALL else CHECK_SAMPLE
    indices = torch.arange(count) * n_images // count
    for done in loader.read_all(indices):
        on_images(done)
    check_unreadable(loader, count)
    return count


def check_unreadable(loader: Loader, looked_at: int) -> None:
    """Raise `InputError` where more than 10 % of the images looked at are unreadable."""
    bad = len(loader.unreadable)
    if bad > MOST_UNREADABLE * looked_at:
        examples = [f"{loader.images.source.name(i)} ({why})" for i, why in sorted(loader.unreadable.items())[:3]]
        raise InputError(
            f"{bad:,} of {looked_at:,} images can't be read, more than {MOST_UNREADABLE:.0%}: {'; '.join(examples)}. "
            "Is this the right data? Remove or repair these files, or list the good ones in a text file"
        )


def survey(loader: Loader) -> Survey:
    """Look at an even sample of the readable images.

    Raises:
        InputError: none is left.
    """
    readable = [index for index in range(len(loader.images)) if index not in loader.unreadable]
    if len(readable) < 2:
        raise InputError(f"{len(readable)} readable images are too few to cluster; at least 2 are needed")
    sample = even_sample(readable, SAMPLE)
    shorter: list[int] = []
    grey = 0
    for _ in loader.read_all(torch.tensor(sample)):
        pass
    for index in sample:
        if index in loader.unreadable:
            continue
        image_HWC = loader.images.get(index)
        shorter.append(min(image_HWC.shape[:2]))
        grey += bool((image_HWC[..., 0] == image_HWC[..., 1]).all() and (image_HWC[..., 1] == image_HWC[..., 2]).all())
    return Survey(len(readable), int(np.median(shorter)), grey / len(shorter))


def even_sample(items: Sequence[int], count: int) -> list[int]:
    """`count` of the items, spread evenly; all of them where there are no more."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)
