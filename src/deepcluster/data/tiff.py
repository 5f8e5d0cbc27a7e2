"""TIFFs that Pillow can't open or would spoil: samples of any depth and type, any number of bands, in strips or tiles.

libtiff, as Pillow has it, still unpacks them: it gets the same strips or tiles as a grey image of their bytes, and what the
bytes mean is decided here.

Shapes: H height, W width, T tiles side by side (1 of strips), R bytes of a row of a tile, C bands.
"""

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from deepcluster.core.errors import UnreadableImage
from deepcluster.data.deep import to_8_bits

_TYPES = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}  # of tags
_MOST_TAGS = 4096
_TAGS = (256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339)
(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _OFFSETS, _ORIENTATION, _SAMPLES, _ROWS) = _TAGS[:10]
(_COUNTS, _PLANAR, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _EXTRA, _FORMAT) = _TAGS[10:]
# Those that unpack to the bytes of the samples, and whether they know predictors.
_COMPRESSIONS = {1: False, 32773: False, 5: True, 8: True, 32946: True, 34925: True, 50000: True}
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _CMYK, _LAB = 0, 1, 2, 5, 8
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _CMYK: 4, _LAB: 3}
_SIGNED, _FLOAT = 2, 3
_DEPTHS = {"u": (*range(1, 17), 32, 64), "i": (8, 16, 32, 64), "f": (16, 32, 64)}
_PREMULTIPLIED, _STRAIGHT = 1, 2
_LARGEST_PIXEL = 8  # Bytes of a pixel of an image that has as many pixels as are allowed; others may have more.


@dataclass(frozen=True)
class Layout:
    """What the tags of the first image of a TIFF say."""

    tags: dict[int, list[int]]
    order: str  # of bytes: < or >

    def one(self, tag: int, default: int = 0) -> int:
        return self.tags.get(tag, [default])[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as stored."""
        return self.one(_HEIGHT), self.one(_WIDTH)

    @property
    def orientation(self) -> int:
        """The orientation as in EXIF, 1 = upright."""
        return self.one(_ORIENTATION, 1) if self.one(_ORIENTATION, 1) in range(2, 9) else 1

    @property
    def n_bands(self) -> int:
        return self.one(_SAMPLES, 1)

    @property
    def kind(self) -> str:
        """Letter of NumPy for the type of the samples."""
        return {_SIGNED: "i", _FLOAT: "f"}.get(self.one(_FORMAT, 1), "u")

    @property
    def end(self) -> int:
        """Where the last strip or tile ends in the file."""
        pieces = [(_OFFSETS, _COUNTS), (_TILE_OFFSETS, _TILE_COUNTS)]
        pairs = (zip(self.tags.get(start, ()), self.tags.get(length, ()), strict=False) for start, length in pieces)
        return max((sum(pair) for some in pairs for pair in some), default=0)

    @property
    def is_deep(self) -> bool:
        """Whether the samples are not unsigned integers of up to 8 bits, for which Pillow is asked first.

        Nor if their bands are apart: Pillow mixes up those of grey with transparency, and of more than four bands.
        """
        is_known = self.one(_COMPRESSION, 1) in _COMPRESSIONS and self.one(_PHOTOMETRIC, -1) in _COLOURS
        return (self.one(_PLANAR) == 2 and is_known) or max(self.tags.get(_BITS, [1])) > 8 or self.kind != "u"


def tiff_layout(encoded: bytes) -> Layout | None:
    """Return what the tags of a TIFF say; None for other files and damaged tags."""
    order = {b"II": "<", b"MM": ">"}.get(encoded[:2], "")
    try:
        version = struct.unpack_from(f"{order}H", encoded, 2)[0] if order else 0
        if version not in (42, 43):
            return None
        is_big = version == 43
        (at,) = struct.unpack_from(order + ("Q" if is_big else "I"), encoded, 8 if is_big else 4)
        (count,) = struct.unpack_from(order + ("Q" if is_big else "H"), encoded, at)
        entry = struct.Struct(order + ("HHQ8s" if is_big else "HHI4s"))
        at += 8 if is_big else 2
        tags: dict[int, list[int]] = {}
        for number in range(min(count, _MOST_TAGS)):
            tag, kind, length, inline = entry.unpack_from(encoded, at + number * entry.size)
            if tag not in _TAGS or kind not in _TYPES or not length or tag in tags:
                continue
            size = length * int(_TYPES[kind][1])
            if size > len(inline):
                (place,) = struct.unpack(order + ("Q" if is_big else "I"), inline)
                inline = encoded[place : place + size]
            if len(inline) < size:  # The file is cut off.
                continue
            tags[tag] = np.frombuffer(inline[:size], order + _TYPES[kind]).tolist()
    except (struct.error, ValueError, OverflowError):
        return None
    layout = Layout(tags, order)
    return layout if min(layout.size) > 0 and layout.n_bands > 0 else None


def read_tiff(encoded: bytes, layout: Layout, max_pixels: int) -> Image.Image:
    """Return the first image of a TIFF with 8 bits per sample, as stored: not turned.

    Bands without colours (`BlackIsZero`) are red, green and blue if there are three or more, else the first one is grey.

    Raises:
        UnreadableImage: it is of a kind that is not supported, or larger than `max_pixels`.
    """
    height, width = layout.size
    n_bands, photometric = layout.n_bands, layout.one(_PHOTOMETRIC, _RGB if layout.n_bands > 2 else _BLACK_IS_ZERO)
    bits = _check(layout, photometric)
    if height * width * max(1, n_bands * bits / 8 / _LARGEST_PIXEL) > max_pixels:
        of = f" of {n_bands} x {bits} bits are" if height * width <= max_pixels else " is"
        raise UnreadableImage(f"{width} x {height} pixels{of} over the limit of {max_pixels:,} pixels")
    extras = layout.tags.get(_EXTRA, [])[: n_bands - 1]
    if photometric == _RGB and n_bands == 4 and not extras:
        extras = [_STRAIGHT]  # As Pillow has it: the tag is often forgotten.
    alpha = next((n_bands - len(extras) + at for at, extra in enumerate(extras) if extra in (1, 2, 999)), None)
    n_colours = _COLOURS[photometric]
    if n_colours == 1 and n_bands - (alpha is not None) >= 3:
        n_colours, photometric = 3, _RGB if photometric == _BLACK_IS_ZERO else photometric
    wanted = [*range(n_colours), *([] if alpha is None else [alpha])]
    values_HWC = _samples(encoded, layout, bits, wanted)
    colours_HWC = to_8_bits(values_HWC[..., :n_colours], bits)
    if photometric == _WHITE_IS_ZERO:
        colours_HWC = 255 - colours_HWC
    mode = {_CMYK: "CMYK", _LAB: "LAB"}.get(photometric, "RGB" if n_colours == 3 else "L")
    image = Image.frombytes(mode, (width, height), colours_HWC.tobytes())
    if alpha is None or mode not in ("L", "RGB"):
        return image
    opacity = Image.fromarray(_opacity(values_HWC[..., n_colours], bits))
    rgb = image.convert("RGB")
    if extras[alpha - n_bands + len(extras)] == _PREMULTIPLIED:
        rgba: Image.Image = Image.merge("RGBA", (*rgb.split(), opacity))
        return Image.frombytes("RGBa", rgba.size, rgba.tobytes()).convert("RGBA")
    rgb.putalpha(opacity)
    return rgb


def _check(layout: Layout, photometric: int) -> int:
    """Return the bits of all samples; raises UnreadableImage if these can't be read."""
    bits, formats = layout.tags.get(_BITS, [1]), layout.tags.get(_FORMAT, [1])
    compression = layout.one(_COMPRESSION, 1)
    problem = ""
    if compression not in _COMPRESSIONS:
        problem = f"compression {compression}"
    elif photometric not in _COLOURS or layout.n_bands < _COLOURS[photometric]:
        problem = f"{layout.n_bands} bands of colours {photometric}"
    elif len(set(bits)) > 1 or len(set(formats)) > 1 or formats[0] not in (1, _SIGNED, _FLOAT, 4):
        problem = "samples of several kinds, or complex numbers"
    elif bits[0] not in _DEPTHS[layout.kind]:
        problem = f"samples of {bits[0]} bits"
    elif photometric in (_CMYK, _LAB) and (layout.kind != "u" or bits[0] > 16):
        problem = "CMYK or Lab that is not of 8 or 16 bits"
    if problem:
        raise UnreadableImage(f"not supported: TIFF with {problem}; convert it to RGB of 8 or 16 bits")
    return bits[0]


def _samples(encoded: bytes, layout: Layout, bits: int, wanted: list[int]) -> NDArray[Any]:
    """Return some bands as H x W x C in the byte order of this machine."""
    if layout.one(_PLANAR, 1) != 2 or layout.n_bands == 1:
        return _plane(encoded, layout, bits, layout.n_bands, slice(None))[..., wanted]
    is_tiled = _TILE_OFFSETS in layout.tags
    n_pieces = len(layout.tags.get(_TILE_OFFSETS if is_tiled else _OFFSETS, ())) // layout.n_bands
    planes = [_plane(encoded, layout, bits, 1, slice(band * n_pieces, (band + 1) * n_pieces)) for band in wanted]
    return np.concatenate(planes, axis=2)


def _plane(encoded: bytes, layout: Layout, bits: int, n_bands: int, pieces: slice) -> NDArray[Any]:
    """Return the interleaved bands of some strips or tiles as H x W x C."""
    height, width = layout.size
    is_tiled = _TILE_OFFSETS in layout.tags
    across = layout.one(_TILE_WIDTH) if is_tiled else width
    if across < 1:
        raise UnreadableImage("damaged: TIFF with tiles without a width")
    n_across = -(-width // across)
    raw_HTR = _bytes(encoded, layout, pieces, n_across, -(-across * n_bands * bits // 8))
    has_predictor = _COMPRESSIONS[layout.one(_COMPRESSION, 1)]
    predictor = layout.one(_PREDICTOR, 1) if has_predictor else 1
    if bits % 8:
        bits_HTVB = np.unpackbits(raw_HTR, axis=2)[..., : across * n_bands * bits].reshape(height, n_across, -1, bits)
        values = bits_HTVB @ (1 << np.arange(bits, dtype=np.uint16)[::-1])
    elif predictor == 3:  # Differences of bytes, the upper bytes of all values of a row first.
        n_bytes = raw_HTR.reshape(height, n_across, -1, n_bands)
        planes = np.add.accumulate(n_bytes, axis=2, dtype=np.uint8).reshape(height, n_across, bits // 8, -1)
        values = np.ascontiguousarray(planes.swapaxes(2, 3)).view(f">u{bits // 8}")[..., 0]
    else:
        values = raw_HTR.view(f"{layout.order}u{bits // 8}")
        if predictor == 2:
            pixels = values.reshape(height, n_across, across, n_bands)
            values = np.add.accumulate(pixels, axis=2, dtype=np.dtype(f"u{bits // 8}"))
    values_HWC = values.reshape(height, n_across * across, n_bands)[:, :width]
    if bits % 8 or values.dtype.itemsize == 1:
        return values_HWC.view("i1") if layout.kind == "i" else values_HWC
    return values_HWC.astype(f"=u{bits // 8}").view(f"={layout.kind}{bits // 8}")


def _bytes(encoded: bytes, layout: Layout, pieces: slice, n_across: int, n_row: int) -> NDArray[np.uint8]:
    """Return what some strips or tiles hold, H x T x R: libtiff reads them as those of a grey image of 8 bits."""
    height = layout.size[0]
    tags = {_WIDTH: [n_across * n_row], _HEIGHT: [height], _BITS: [8], _PHOTOMETRIC: [_BLACK_IS_ZERO], _SAMPLES: [1]}
    tags |= {tag: layout.tags[tag][:1] for tag in (_COMPRESSION, _FILL_ORDER, _ROWS, _TILE_HEIGHT) if tag in layout.tags}
    if _TILE_OFFSETS in layout.tags:
        tags[_TILE_WIDTH] = [n_row]
    for tag in (_OFFSETS, _COUNTS, _TILE_OFFSETS, _TILE_COUNTS):
        if tag in layout.tags:
            tags[tag] = layout.tags[tag][pieces]
    start = len(encoded) + len(encoded) % 2
    end = start + 2 + 12 * len(tags) + 4
    entries, long = b"", b""
    for tag, values in sorted(tags.items()):
        place = values[0] if len(values) == 1 else end + len(long)
        entries += struct.pack("<HHII", tag, 4, len(values), place)
        long += struct.pack(f"<{len(values)}I", *values) if len(values) > 1 else b""
    directory = struct.pack("<H", len(tags)) + entries + bytes(4) + long
    file = b"".join([b"II*\0", struct.pack("<I", start), encoded[8:], bytes(len(encoded) % 2), directory])
    with TiffImagePlugin.TiffImageFile(io.BytesIO(file)) as image:  # Not `Image.open`, which would count bytes as pixels.
        return np.asarray(image).reshape(height, n_across, n_row)


def _opacity(values_HW: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return 0 = transparent to 255 = opaque; of wide integers and floats the largest value, or 1, is opaque."""
    if values_HW.dtype.kind == "u" and bits <= 16:
        return to_8_bits(values_HW, bits)
    values = np.nan_to_num(values_HW.astype(np.float64), posinf=0, neginf=0).clip(0)
    return np.rint(values / max(1.0, float(values.max())) * 255).astype(np.uint8)
