"""Samples of more than 8 bits: brought to 8 bits, and read from PNM files, which Pillow would round.

Shapes: H height, W width, C bands.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepcluster.core.errors import UnreadableImage

# Comments may stand between the numbers: kind, width, height, largest value.
_PNM = re.compile(rb"P([2356])" + rb"(?:\s|#[^\n]*\n)+(\d{1,9})" * 3 + rb"\s")


def to_8_bits(values: NDArray[Any], bits: int = 16) -> NDArray[np.uint8]:
    """Convert values of more or less than 8 bits to 0..255.

    Unsigned integers of up to 16 bits keep the upper eight; fewer than eight bits are widened. Others have no agreed white:
    floats within 0..1 are multiplied by 255, values within 0..255 stay, and any others are stretched from minimum to
    maximum, over all bands.
    """
    if values.dtype.kind == "u" and bits <= 16:
        if bits < 8:
            values = values * (255 // ((1 << bits) - 1)) if 8 % bits == 0 else values << (8 - bits)
        return (values >> max(0, bits - 8)).astype(np.uint8)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise UnreadableImage("no pixel holds a finite number")
    low, high = float(finite.min()), float(finite.max())
    found = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        found *= 255
    elif low < 0 or high > 255:
        span = high / 2 - low / 2  # Halves: the difference of two finite numbers may be none.
        found = (found / 2 - low / 2) / span * 255 if span > 0 else np.zeros(found.shape)
    return np.rint(found).astype(np.uint8)


def read_pnm(encoded: bytes, max_pixels: int) -> Image.Image | None:
    """Return a PPM or PGM of more than 8 bits per sample with the upper eight; None for any other file."""
    header = _PNM.match(encoded)
    if header is None or not 255 < (most := int(header[4])) < 1 << 16:
        return None
    width, height, n_bands = int(header[2]), int(header[3]), 3 if header[1] in b"36" else 1
    if not 0 < width * height <= max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels is over the limit of {max_pixels:,} pixels")
    count, body = width * height * n_bands, encoded[header.end() :]
    if header[1] in b"56":
        values = np.frombuffer(body[: min(len(body) // 2, count) * 2], ">u2")
    else:
        numbers = re.sub(rb"#[^\n]*", b"", body).split(None, count)[:count]
        values = np.array(numbers, "S6").astype(np.uint32)
    if len(values) < count:
        raise UnreadableImage(f"truncated: the file ends after {len(encoded):,} bytes, before the image does")
    scaled = values.astype(np.uint32).clip(0, most) * 65535 // most
    image_HWC = to_8_bits(scaled).reshape(height, width, n_bands)
    return Image.fromarray(image_HWC if n_bands == 3 else image_HWC[..., 0])
