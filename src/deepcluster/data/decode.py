"""Decode image files to RGB arrays, or say why a file can't be decoded; in any number of threads and processes.

Shapes: H height, W width. Every image becomes H x W x 3 uint8, upright, in the colours that a viewer shows.
"""

import functools
import io
import re
import warnings
import zlib
from contextlib import suppress

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from deepcluster.core.errors import UnreadableImage
from deepcluster.core.kinds import kind_of
from deepcluster.data.deep import read_pnm, to_8_bits
from deepcluster.data.resample import resize
from deepcluster.data.tiff import read_tiff, tiff_layout

Pixels = NDArray[np.uint8]
_Decoded = tuple[Pixels, tuple[int, int], int]  # pixels, height and width of the whole image, EXIF orientation
MAX_PIXELS = 178_956_970
"""The default limit of Pillow's check for decompression bombs: 512 MiB of RGB, or 13,377 pixels square."""

# The only formats tried: Pillow also knows formats that start other programs (EPS starts Ghostscript) or that accept nearly
# any bytes as an image. HEIF needs the package pillow-heif, AVIF a Pillow built with it.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")

# How to undo the EXIF orientations from 2 on.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()  # noqa: SIM905
# The marker of the segments in which a JPEG has its EXIF and XMP; on a header, twice as fast as `in`.
_find_app1 = re.compile(rb"\xff\xe1").search

# Formats that are read, by how `kind_of` describes them, and what to do where a reader is missing.
_NAMES = {f"a {name} image": name for name in ("JPEG", "PNG", "GIF", "WebP", "TIFF")}
_NAMES |= {"an AVIF image": "AVIF", "a HEIC image": "HEIF"}
_FIX = {
    "AVIF": "AVIF, which this Pillow was built without; pip install --force-reinstall pillow",
    "HEIF": "HEIC; pip install pillow-heif to read it",
}


def decode(encoded: bytes | Pixels, max_pixels: int = MAX_PIXELS, *, shorter_side: int | None = None) -> Pixels:
    """Return an image as a C-contiguous H x W x 3 uint8 array, which may be read-only.

    Grey, palette, CMYK, Lab and 16-bit images are converted to RGB; transparent pixels are composited over white; the EXIF
    orientation is applied; of an animation the first frame is taken; colour profiles are ignored.

    Args:
        encoded: the bytes of an image file, or an array of decoded pixels: H x W, or H x W x 1, 3 or 4.
        max_pixels: larger images are refused. Pillow's own limit (twice `PIL.Image.MAX_IMAGE_PIXELS`) applies too.
        shorter_side: if the shorter side is longer than this, reduce it to this by antialiased bilinear interpolation
            (`resize`); the longer side becomes `longer * shorter_side // shorter`. A JPEG of at least twice the size is
            first decoded at 1/2, 1/4 or 1/8, which is quicker and not quite the same (docs/speed.md).

    Raises:
        UnreadableImage: with the reason, for anything that isn't a whole image within the limits.
    """
    if isinstance(encoded, np.ndarray):
        return _reduce(_decode_array(encoded), encoded.shape[:2], shorter_side)
    try:
        image_HWC, size, orientation = _decode_jpeg(encoded, max_pixels, shorter_side) or _decode_any(encoded, max_pixels)
        return _upright(_reduce(image_HWC, size, shorter_side), orientation)
    except UnreadableImage:
        raise
    # Not a list of types: on damaged files Pillow's readers raise some fifteen different ones.
    except Exception as error:
        raise UnreadableImage(_reason(encoded, error)) from error


def pixels_of(image: Image.Image) -> Pixels:
    """Return the pixels (H, W, 3) of an image of Pillow, as `decode` gives them of its file."""
    _prepare_pillow()
    image.load()
    return _upright(_to_rgb(image), _orientation(image))


def _upright(image_HWC: Pixels, orientation: int) -> Pixels:
    """Return an image turned as its EXIF orientation says."""
    if orientation == 1:
        return image_HWC
    return np.asarray(Image.fromarray(image_HWC).transpose(Image.Transpose[_TURNS[orientation - 2]]))


def _decode_jpeg(encoded: bytes, max_pixels: int, shorter_side: int | None) -> _Decoded | None:
    """Decode a sound grey or RGB JPEG, to Pillow's pixels bit for bit; return None if Pillow has to decide.

    The pixels may be those of a half, a quarter or an eighth of the size, if that is still as large as `shorter_side`.
    """
    if not encoded.startswith(b"\xff\xd8\xff"):
        return None
    try:
        header, (height, width, colours, _) = _jpeg_header(encoded)
        pixels = height * width
        if colours not in ("YCbCr", "Gray", "RGB") or pixels > min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or pixels)):
            return None
        scaled = {}
        for factor in (2, 4, 8):  # Not 3/8, which is no faster than 1/2 and less accurate.
            if shorter_side and min(height, width) >= factor * shorter_side:
                scaled = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        image_HWC = simplejpeg.decode_jpeg(encoded, "RGB", **scaled)  # raises where libjpeg would only warn
    except (ValueError, KeyError, MemoryError, RuntimeError):
        return None
    if not _find_app1(header):
        return image_HWC, (height, width), 1
    with Image.open(io.BytesIO(encoded), formats=_prepare_pillow()) as image:
        return image_HWC, (height, width), _orientation(image)


def _jpeg_header(encoded: bytes) -> tuple[bytes, tuple[int, int, str, str]]:
    """Return the first bytes of a JPEG, at least up to its pixels, and its height, width, colour space and subsampling.

    libjpeg warns if the bytes end before the pixels begin, which is an error here: success proves that the first bytes
    hold the whole header.
    """
    size = 1024
    while size < len(encoded):
        with suppress(ValueError):
            return encoded[:size], simplejpeg.decode_jpeg_header(encoded[:size])
        size *= 16
    return encoded, simplejpeg.decode_jpeg_header(encoded)


def _decode_any(encoded: bytes, max_pixels: int) -> _Decoded:
    _prepare_pillow()
    layout = tiff_layout(encoded)
    if layout is not None and layout.is_deep:
        return _to_rgb(read_tiff(encoded, layout, max_pixels)), layout.size, layout.orientation
    if (deep := read_pnm(encoded, max_pixels)) is not None:
        return _to_rgb(deep), (deep.height, deep.width), 1
    try:
        return _decode_by_pillow(encoded, max_pixels)
    except UnidentifiedImageError:
        if layout is None:
            raise
        return _to_rgb(read_tiff(encoded, layout, max_pixels)), layout.size, layout.orientation


def _decode_by_pillow(encoded: bytes, max_pixels: int) -> _Decoded:
    try:
        with Image.open(io.BytesIO(encoded), formats=_prepare_pillow()) as image:
            width, height = image.size
            if not width or not height:
                raise UnreadableImage(f"no pixels: {width} x {height}")
            if width * height > max_pixels:
                raise UnreadableImage(f"{width} x {height} pixels is over the limit of {max_pixels:,} pixels")
            image.load()
            if isinstance(image.info.get("transparency"), tuple) and image.format == "PNG" and encoded[24] == 16:
                image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
            # The orientation after the pixels, where it may be in a PNG; the size again, since a TIFF may be turned by now.
            return _to_rgb(image), (image.height, image.width), _orientation(image)
    except (UnreadableImage, MemoryError, Image.DecompressionBombError):
        raise
    except Exception:  # As in `decode`.
        # Pillow accepts 1 MiB of a text or a colour profile and 64 MiB in all, and refuses one that is damaged.
        pixels = _without_texts(encoded)
        if len(pixels) == len(encoded):
            raise
    return _decode_by_pillow(pixels, max_pixels)


def _without_texts(png: bytes) -> bytes:
    """Return a PNG without what says nothing of its pixels or their orientation; any other file as it is."""
    if not png.startswith(b"\x89PNG"):
        return png
    kept, at = [png[:8]], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        kind, is_sound = png[at + 4 : at + 8], zlib.crc32(png[at + 4 : end - 4]).to_bytes(4, "big") == png[end - 4 : end]
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND") or (kind == b"eXIf" and is_sound):
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def size_of(encoded: bytes) -> tuple[int, int]:
    """Return height and width, as stored, of an image that `decode` reads."""
    layout = tiff_layout(encoded)
    if layout is not None:
        return layout.size
    with Image.open(io.BytesIO(encoded), formats=_prepare_pillow()) as image:
        return image.height, image.width


def _reduce(image_HWC: Pixels, size: tuple[int, int], shorter_side: int | None) -> Pixels:
    """Reduce the shorter side of an image of `size` (H, W) to `shorter_side`; its array may already be smaller."""
    shorter = min(size)
    if shorter_side is None or shorter <= shorter_side:
        return image_HWC
    writable = image_HWC if image_HWC.flags.writeable else image_HWC.copy()  # torch warns of any other
    target = size[0] * shorter_side // shorter, size[1] * shorter_side // shorter
    reduced: Pixels = resize(torch.from_numpy(writable), target).permute(1, 2, 0).contiguous().numpy()
    return reduced


@functools.cache
def _prepare_pillow() -> tuple[str, ...]:
    """Load Pillow's readers, silence its warnings, and return the formats that can be read."""
    # Not at the first odd file: readers that one thread is registering may be missed by another.
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    # Once, since `warnings.catch_warnings` around each file is not safe between threads.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) if there is none. Pillow itself turns TIFF, and pillow-heif HEIC."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # A damaged EXIF block says nothing about the pixels, and viewers ignore it.
        return 1
    return orientation if orientation in range(2, 9) else 1


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode == "F" or image.mode.startswith("I"):
        values_HW = np.asarray(image)
        grey_HW = to_8_bits(values_HW)
        if isinstance(hidden := image.info.get("transparency"), int):
            grey_HW = np.where(values_HW == hidden, np.uint8(255), grey_HW)
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    if image.mode == "La":  # The only one with transparency that Pillow does not convert to RGBA.
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _decode_array(array: Pixels) -> Pixels:
    shape = array.shape if array.ndim == 3 else (*array.shape, 1)
    if array.dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3, 4) or not array.size:
        found = " x ".join(map(str, array.shape))
        raise UnreadableImage(f"an array of {found} {array.dtype}; wanted H x W, or H x W x 1, 3 or 4, of uint8")
    if shape[2] == 4:
        return _to_rgb(Image.fromarray(array))
    return np.ascontiguousarray(array) if shape[2] == 3 else np.repeat(array.reshape(shape), 3, axis=2)


def _reason(encoded: bytes, error: Exception) -> str:
    """Return in a few words why `encoded` could not be decoded."""
    message = " ".join(str(error).split()).rstrip(".")[:160]
    if isinstance(error, Image.DecompressionBombError):
        counts = [f"{int(count):,}" for count in re.findall(r"\d+", message)]
        return f"{counts[0]} pixels is over the limit of {counts[1]} pixels" if len(counts) == 2 else message
    # Python's, Pillow's or torch's, which has no type for it.
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "DefaultCPUAllocator" in str(error):
        what = "it"
        with suppress(Exception):
            height, width = size_of(encoded)
            what = f"{width} x {height} pixels"
        return f"not enough memory to decode {what}"
    if _claimed_size(encoded) > len(encoded) or isinstance(error, EOFError) or "truncated" in message.lower():
        return f"truncated: the file ends after {len(encoded):,} bytes, before the image does"
    if isinstance(error, UnidentifiedImageError):
        return _kind_of(encoded)
    return f"damaged: {message or type(error).__name__}"


def _claimed_size(encoded: bytes) -> int:
    """Return the size that a TIFF, WebP, AVIF or HEIC file says that it has, 0 for other files."""
    if layout := tiff_layout(encoded):
        return layout.end
    if re.match(rb"RIFF....WEBP", encoded, re.DOTALL):
        return int.from_bytes(encoded[4:8], "little") + 8
    end, box = 0, 8 if encoded[4:8] == b"ftyp" else 0
    while box >= 8 and end < len(encoded):  # 0: up to the end of the file; 1: over 4 GB
        box = int.from_bytes(encoded[end : end + 4], "big")
        end += box
    return end


def _kind_of(encoded: bytes) -> str:
    """Name what was found in place of an image."""
    kind = kind_of(encoded)
    name = _NAMES.get(kind, "")
    if not encoded:
        return "empty file"
    if name == "TIFF":
        return "not supported: TIFF of this kind, or damaged; convert it to RGB of 8 or 16 bits"
    if name.upper() in _prepare_pillow():
        return f"damaged: it starts like a {name} file, but has no header that can be read"
    if name:
        return f"not supported: {_FIX[name]}"
    return kind if " pointer; " in kind else f"not an image: {kind}"
