"""What a data set looks like to a person: sizes, copies of the same image, and what can't be read."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from deepcluster.core.errors import UnreadableImage
from deepcluster.core.text import count_of
from deepcluster.data.decode import decode
from deepcluster.data.loader import image_threads
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.survey import even_sample

# Looked at in a few seconds; of more images, as many spread evenly.
MOST = 10_000
SHOWN = 5
BAR = 30


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
            for index, (digest, seen) in zip(some, pool.map(partial(_look, source), some), strict=True):
                on_images(1)
                if isinstance(seen, str):
                    found.unreadable[index] = seen
                else:
                    found.sizes[seen] += 1
                if digest is not None:
                    groups.setdefault(digest, []).append(index)
    found.copies = [group for group in groups.values() if len(group) > 1]
    return found


def _look(source: ImageSource, index: int) -> tuple[bytes | None, tuple[int, int] | str]:
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
    yield from _histogram(found.sizes)
    copies = sum(len(group) - 1 for group in found.copies)
    if copies:
        examples = "; ".join(" = ".join(source.name(i) for i in group[:3]) for group in found.copies[:SHOWN])
        yield f"{copies:,} {'copy' if copies == 1 else 'copies'} of other images, byte for byte, e.g. {examples}"
    else:
        yield "no copies of other images, byte for byte"
    if found.unreadable:
        yield f"{count_of(len(found.unreadable), 'image')} can't be read:"
        for reason, indices in _by_reason(found.unreadable)[:SHOWN]:
            yield f"  {reason}: {len(indices):,}, e.g. {source.name(indices[0])}"
    else:
        yield "none that can't be read"


def _histogram(sizes: Counter[tuple[int, int]]) -> Iterator[str]:
    """Sizes themselves where they are few, else the shorter sides by powers of two."""
    if len(sizes) <= SHOWN:
        rows = [(f"{width} × {height}", count) for (width, height), count in sizes.most_common()]
    else:
        sides: Counter[int] = Counter()
        for (width, height), count in sizes.items():
            sides[min(width, height).bit_length()] += count
        rows = [(f"shorter side {1 << bits - 1}–{(1 << bits) - 1}", sides[bits]) for bits in sorted(sides)]
    most, broad = max((count for _, count in rows), default=1), max((len(label) for label, _ in rows), default=0)
    for label, count in rows:
        yield f"  {label:<{broad}}  {'█' * max(1, round(BAR * count / most))} {count:,}"


def _by_reason(unreadable: dict[int, str]) -> list[tuple[str, list[int]]]:
    """Reasons, without the numbers that differ from file to file, the most frequent first, with the indices."""
    groups: dict[str, list[int]] = {}
    for index, reason in sorted(unreadable.items()):
        groups.setdefault(reason.partition(":")[0], []).append(index)
    return sorted(groups.items(), key=lambda item: -len(item[1]))
