"""From the bytes of an image file to an RGB array, whatever the file: decoded, or refused with a plain reason.

Shapes: H height, W width. Every image comes out as H x W x 3 uint8, upright, in the colours that a person would see in
a viewer. Safe to call from many threads at once.
"""

from __future__ import annotations

import codecs
import functools
import io
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import UnreadableImage
from deepcluster.data.jpeg import decode_jpeg, read_header

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]
MAX_PIXELS: Final = 178_956_970
"""Where Pillow too refuses a file as a decompression bomb: 512 MiB of RGB, or 13,377 pixels square."""

# Only these are tried: Pillow also knows formats that start other programs (EPS starts Ghostscript) or that take nearly
# any bytes for a picture.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

# Who gives the pixels of a format in Pillow's place: as they are stored, H x W x 3, and the same as Pillow's, bit for bit.
# Pillow decides where such a decoder raises, and keeps all other formats and JPEG's rarer colours (CMYK). MPO is a JPEG
# that others follow in the same file.
_QUICK: Final[Mapping[str, Callable[[bytes], NDArray[np.uint8]]]] = {"JPEG": decode_jpeg, "MPO": decode_jpeg}
_QUICK_MODES: Final = ("L", "RGB")

_ORIENTATION_TAG: Final = 0x0112
# What undoes an orientation, as Pillow calls it.
_TURNS: Final = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
_SIDEWAYS: Final = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
_EXIF_KEYS: Final = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})

# What people really have under the name of an image, by how it begins.
_NOT_IMAGES: Final = (
    (rb"version https://git-lfs", "a Git LFS pointer; fetch the images with `git lfs pull`"),
    (rb"\s*<(!doctype html|html|head|body)", "not an image: HTML, perhaps the error page of a download"),
    (rb"\s*(<\?xml.*)?<svg", "not supported: SVG drawing"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "not supported: HEIC; convert it to JPEG"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "not supported: JPEG 2000"),
    (rb"%PDF", "not an image: PDF"),
    (rb"%!PS", "not an image: PostScript"),
    (rb"PK\x03\x04", "not an image: ZIP archive"),
    (rb"\x1f\x8b", "not an image: gzip archive"),
    (rb"\xff\xd8", "damaged: it starts like a JPEG, but has no header that can be read"),
    (rb"\x89PNG", "damaged: it starts like a PNG, but has no header that can be read"),
    (rb"GIF8", "damaged: it starts like a GIF, but has no header that can be read"),
    (rb"RIFF....WEBP", "damaged: it starts like a WebP, but has no header that can be read"),
)


def decode(encoded: bytes | Pixels, max_pixels: int = MAX_PIXELS, *, shorter_side: int | None = None) -> Pixels:
    """Return the image in `encoded` as a C-contiguous H x W x 3 uint8 array, which may be read-only.

    Grey, palette, CMYK, Lab and 16-bit images become RGB; what is transparent is laid over white; the EXIF orientation
    is applied; of an animation the first frame is taken; colour profiles are ignored. An array (H x W, or H x W x 1, 3
    or 4) is taken as already decoded.

    With `shorter_side`, an image whose shorter side is longer than that is reduced to it by antialiased bilinear
    interpolation (`resize`); the longer side becomes `longer * shorter_side // shorter`. A JPEG of at least twice the
    size is decoded at a half, a quarter or an eighth before: up to four times as fast, and 0.3 to 1.3 of 255 away from
    the reduction of all its pixels, on average over a photo's channels.

    Raises UnreadableImage, with the reason, for anything that isn't a whole image: empty, cut short, damaged, not an
    image, of size zero, or of more pixels than `max_pixels`. Pillow's own limit (twice `PIL.Image.MAX_IMAGE_PIXELS`)
    holds too.
    """
    if isinstance(encoded, np.ndarray):
        return _reduce(_decode_array(encoded), shorter_side)
    if not encoded:
        raise UnreadableImage("empty file")
    try:
        return _decode_file(encoded, max_pixels, shorter_side)
    except UnreadableImage:
        raise
    # Not a list of types: on spoiled bytes Pillow's readers were seen to raise some fifteen different ones.
    except Exception as error:
        raise UnreadableImage(_reason(encoded, error)) from error


def _decode_file(encoded: bytes, max_pixels: int, shorter_side: int | None) -> NDArray[np.uint8]:
    from PIL import Image

    formats = _prepare_pillow()
    header = read_header(encoded)
    # As many as the caller and Pillow allow.
    allowed = max_pixels if Image.MAX_IMAGE_PIXELS is None else min(max_pixels, 2 * Image.MAX_IMAGE_PIXELS)
    is_plain = header is not None and header.plain and header.size[0] * header.size[1] <= allowed
    if header and is_plain and not _halves(header.size, shorter_side):
        image_HWC = _quick("JPEG", encoded, header.size)
        if image_HWC is not None:
            return _reduce(image_HWC, shorter_side)
        header = None
    with Image.open(io.BytesIO(encoded), formats=formats) as image:
        width, height = image.size
        if not width or not height:
            raise UnreadableImage(f"no pixels: {width} x {height}")
        if width * height > max_pixels:
            raise UnreadableImage(f"{width} x {height} pixels is over the limit of {max_pixels:,} pixels")
        return _decode_opened(image, encoded, shorter_side, sound=header is not None)


def _decode_opened(image: Image.Image, encoded: bytes, shorter_side: int | None, *, sound: bool) -> NDArray[np.uint8]:
    """Decode what Pillow has opened; where the header is sound, by the quick decoder of its format."""
    from PIL.Image import Transpose, fromarray

    stored = image.height, image.width
    if shorter_side and _halves(stored, shorter_side):
        # Of our formats JPEG alone does it, at the least of 1/2, 1/4 and 1/8 that is still as large as asked for.
        image.draft(None, (shorter_side, shorter_side))
    drafted = (image.height, image.width) != stored
    quick_HWC = None
    if sound and not drafted and image.mode in _QUICK_MODES:
        quick_HWC = _quick(image.format, encoded, stored)
    if quick_HWC is None:
        image.load()
    orientation = _orientation(image)  # In a PNG it may stand after the pixels.
    if quick_HWC is not None and orientation == 1:
        return _reduce(quick_HWC, shorter_side)
    turned: Image.Image = image if quick_HWC is None else fromarray(quick_HWC)
    if orientation != 1:
        turned = turned.transpose(Transpose[(_TURNS | _SIDEWAYS)[orientation]])
    image_HWC = _to_rgb(turned)
    if not drafted:
        return _reduce(image_HWC, shorter_side)
    return _reduce(image_HWC, shorter_side, stored[::-1] if orientation in _SIDEWAYS else stored)


def _quick(kind: str | None, encoded: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """Pixels by the quick decoder of a format; None where there is none, or where Pillow has to decide."""
    decoder = _QUICK.get(kind or "")
    if decoder is None:
        return None
    try:
        image_HWC = decoder(encoded)
    except Exception:  # Whatever it is, Pillow says why.
        return None
    return image_HWC if image_HWC.shape == (*size, 3) else None


def _halves(size: tuple[int, int], shorter_side: int | None) -> bool:
    """Whether half the image is still as large as asked for."""
    return shorter_side is not None and min(size) >= 2 * shorter_side


def _reduce(image_HWC: Pixels, shorter_side: int | None, whole: tuple[int, int] | None = None) -> Pixels:
    """Bring the shorter side down to `shorter_side`; `whole` is the height and width where they aren't the array's."""
    height, width = whole or image_HWC.shape[:2]
    shorter = min(height, width)
    if shorter_side is None or shorter <= shorter_side:
        return image_HWC
    import torch

    from deepcluster.data.resample import resize

    writable = image_HWC if image_HWC.flags.writeable else image_HWC.copy()  # torch warns of any other
    size = height * shorter_side // shorter, width * shorter_side // shorter
    reduced: NDArray[np.uint8] = resize(torch.from_numpy(writable), size).permute(1, 2, 0).contiguous().numpy()
    return reduced


@functools.cache
def _prepare_pillow() -> tuple[str, ...]:
    """Load Pillow's readers once, quieten it, and return the formats that this Pillow can read."""
    from PIL import Image

    # Here and not at the first odd file: readers that are being registered by one thread may be missed by another.
    Image.init()
    # `warnings.catch_warnings` around each file would not be safe between threads, and `Image.MAX_IMAGE_PIXELS = None`
    # would take the protection from the rest of the process, and from the tiles and frames that Pillow checks as it
    # reads. Its warnings have no use here: a file is decoded or refused.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none (Pillow applies it itself for TIFF and AVIF)."""
    if _EXIF_KEYS.isdisjoint(image.info):
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # A spoiled EXIF block says nothing about the pixels, and viewers ignore it.
        return 1
    return orientation if orientation in range(2, 9) else 1


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey_to_rgb(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        return np.asarray(_over_white(image))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _over_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _to_8_bits(values_HW: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Bring 16-bit, 32-bit and float grey values to 0..255.

    16 bits keep the upper eight. Wider ones have no agreed white: floats within 0..1 are multiplied by 255, values
    within 0..255 stay, and any others are stretched from their least to their greatest value.
    """
    if values_HW.dtype.kind == "u":
        return (values_HW.astype(np.uint16) >> 8).astype(np.uint8)
    finite = values_HW[np.isfinite(values_HW)]
    if not finite.size:
        raise UnreadableImage("no pixel holds a finite number")
    low, high = float(finite.min()), float(finite.max())
    values = np.nan_to_num(values_HW.astype(np.float64), nan=low, posinf=high, neginf=low)
    if values_HW.dtype.kind == "f" and low >= 0 and high <= 1:
        values *= 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low) if high > low else 0.0)
    return np.rint(values).astype(np.uint8)


def _grey_to_rgb(grey_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey_HW[:, :, None], 3, axis=2)


def _decode_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        shape = " x ".join(map(str, array.shape))
        raise UnreadableImage(f"an array of {shape} {array.dtype}; wanted H x W, or H x W x 1, 3 or 4, of uint8")
    if channels == 1:
        return _grey_to_rgb(array.reshape(array.shape[:2]))
    if channels == 3:
        return np.ascontiguousarray(array)
    from PIL import Image

    return np.asarray(_over_white(Image.fromarray(array)))


def _reason(encoded: bytes, error: Exception) -> str:
    """Say in a few words why `encoded` could not be decoded."""
    from PIL import Image, UnidentifiedImageError

    message = " ".join(str(error).split()).rstrip(".")[:160]
    if isinstance(error, Image.DecompressionBombError):
        counts = [f"{int(count):,}" for count in re.findall(r"\d+", message)]
        return f"{counts[0]} pixels is over the limit of {counts[1]} pixels" if len(counts) == 2 else message
    # Python's, Pillow's or torch's, which has no type for it.
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "DefaultCPUAllocator" in str(error):
        what = "it"
        with suppress(Exception), Image.open(io.BytesIO(encoded), formats=_prepare_pillow()) as image:
            what = f"{image.width} x {image.height} pixels"
        return f"not enough memory to decode {what}"
    if re.match(rb"RIFF....WEBP", encoded, re.DOTALL):
        is_cut_short = int.from_bytes(encoded[4:8], "little") + 8 > len(encoded)
    else:
        is_cut_short = isinstance(error, EOFError) or "truncated" in str(error).lower()
    if is_cut_short:
        return f"truncated: the file ends after {len(encoded):,} bytes, before the image does"
    if isinstance(error, UnidentifiedImageError):
        return _what_it_is(encoded)
    return f"damaged: {message or type(error).__name__}"


def _what_it_is(encoded: bytes) -> str:
    """Name what was found where no image was."""
    if encoded.count(0) == len(encoded):
        return "not an image: only zero bytes"
    start = encoded[:512]
    for pattern, reason in _NOT_IMAGES:
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            return reason
    try:
        # Incremental, since the last character of `start` may be cut in two.
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        text = "\0"
    if all(character.isprintable() or character.isspace() for character in text):
        return "not an image: text"
    return f"not an image: unknown format (starts with {start[:4].hex(' ')})"
