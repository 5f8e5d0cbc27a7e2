"""Whole pictures of the most important images, for those that are opened: thumbnails are small, and cut to squares."""

import io
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from deepcluster.core.errors import UnreadableImage
from deepcluster.core.work import Advance, no_advance
from deepcluster.data.decode import decode
from deepcluster.data.loader import image_threads
from deepcluster.data.sources import ImageSource
from deepcluster.visualization.report.gallery.thumbnails import MEDIA_TYPE, METHOD, QUALITY
from deepcluster.visualization.report.page import Blob

# Shorter sides in pixels: the first at which all images fit into the page, else the last, for the most important ones.
SIDES: Final = (400, 300)
LONGEST: Final = 2.0  # A panorama's longer side, as a multiple of the shorter.
SAMPLE, AT_ONCE = 9, 64  # Images that are made to see how many bytes they take; and at a time.


def whole_pictures(
    images: ImageSource,
    indices: Sequence[int],
    *,
    above: int,
    most_bytes: float,
    workers: int,
    advance: Advance = no_advance,
) -> dict[int, Blob]:
    """Return pictures by the index of their image, in the order of `indices`, as many as fit into `most_bytes`.

    Args:
        above: images whose shorter side is not above this have none: their thumbnails hold all their pixels.
        advance: called after each image; may raise to stop.
    """
    sample, side = indices[:: max(1, len(indices) // SAMPLE)][:SAMPLE], SIDES[-1]
    for wider in SIDES[:-1]:
        made = [len(blob.content) for index in sample if (blob := whole_picture(images, index, side=wider, above=above))]
        if made and len(indices) * sum(made) / len(made) <= most_bytes:
            side = wider
            break
    found: dict[int, Blob] = {}
    left = most_bytes
    with image_threads(max(1, workers)) as pool:
        for first in range(0, len(indices), AT_ONCE):
            some = indices[first : first + AT_ONCE]
            for index, blob in zip(
                some, pool.map(partial(whole_picture, images, side=side, above=above), some), strict=True
            ):
                advance(1)
                if blob is None:
                    continue
                left -= len(blob.content)
                if left < 0:
                    return found
                found[index] = blob
    return found


def whole_picture(images: ImageSource, index: int, *, side: int, above: int = 0) -> Blob | None:
    """Return a picture of an image, not cut; None where it can't be read, or its shorter side is not above `above`."""
    from PIL import Image

    try:
        image_HWC: Any = decode(images.read(index), shorter_side=side)
    except (UnreadableImage, OSError):
        return None
    if min(image_HWC.shape[:2]) <= above:
        return None
    picture = Image.fromarray(image_HWC)
    picture.thumbnail((round(LONGEST * side), round(LONGEST * side)))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY, method=METHOD)
    return Blob(file.getvalue(), MEDIA_TYPE)
