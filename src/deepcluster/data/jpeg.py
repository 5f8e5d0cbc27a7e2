"""Plain JPEG files read by a quicker library than Pillow, to the same pixels, bit for bit.

Both use libjpeg-turbo; what Pillow costs more is its detour over four bytes a pixel (benchmarks/decode.py). Whatever
isn't plain, and whatever the quick library doesn't take, is left to Pillow.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

_START_OF_SCAN: Final = 0xDA
_FRAMES: Final = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive; the others are hardly ever met
_QUANTIZATION, _JFIF, _ICC, _ADOBE = 0xDB, 0xE0, 0xE2, 0xEE
# Huffman tables, restart interval, comment: Pillow takes these as they are, so they can't make it refuse a file.
_HARMLESS: Final = (0xC4, 0xDD, 0xFE)


class Header(NamedTuple):
    """What the header of a sound JPEG says.

    Attributes:
        size: height and width, as stored.
        plain: it holds nothing that Pillow would have to judge, and the image is upright.
    """

    size: tuple[int, int]
    plain: bool


def read_header(encoded: bytes) -> Header | None:
    """Read a JPEG's header; None where it isn't of 8 bits and one or three channels, or anything in it is odd.

    Takes some 8 microseconds, where Pillow's reader takes 20 of the 190 that a photo of 224 px takes in all.
    """
    size, plain, at, end = None, True, 2, len(encoded)
    if encoded[:2] != b"\xff\xd8":
        return None
    while at + 4 <= end and encoded[at] == 0xFF:
        marker, start = encoded[at + 1], at + 4
        at += 2 + (encoded[at + 2] << 8 | encoded[at + 3])
        if at < start or at > end:
            return None
        if marker == _START_OF_SCAN:
            return Header(size, plain) if size else None
        if marker in _FRAMES and size is None:
            size = _frame_size(encoded[start:at])
            if size is None:
                return None
        elif marker == _QUANTIZATION or 0xE0 <= marker <= 0xEF:
            body = encoded[start:at]
            if marker == _JFIF and body[:4] == b"JFIF" and body[5:6] != b"\1":
                return None  # libjpeg warns of other versions
            plain = plain and _is_plain(marker, body)
        elif marker not in _HARMLESS:
            return None
    return None


def _frame_size(body: bytes) -> tuple[int, int] | None:
    """Height and width of a frame header of 8 bits and one or three channels."""
    if len(body) < 6 or body[0] != 8 or body[5] not in (1, 3) or len(body) != 6 + 3 * body[5]:
        return None
    height, width = body[1] << 8 | body[2], body[3] << 8 | body[4]
    return (height, width) if height and width else None


def _is_plain(marker: int, body: bytes) -> bool:
    """Whether Pillow's reader accepts this segment, and takes nothing from it that changes the picture."""
    if marker == _QUANTIZATION:
        return len(body) % 65 == 0 and max(body[::65], default=0) < 16  # whole tables of 8 bits
    if marker == _ICC:
        return len(body) >= 14 and body.startswith(b"ICC_PROFILE\0")
    return (marker == _JFIF and len(body) >= 14) or (marker == _ADOBE and len(body) == 12)


def decode_jpeg(encoded: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a JPEG of one or three channels as H x W x 3, as they are stored (not turned upright).

    Raises ValueError where they can't be had, or where libjpeg would only warn of what it meets: it writes its warnings to
    the process's stderr, while Pillow decides in silence.
    """
    import simplejpeg

    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB")
    return pixels
