"""Small image files for tests: good ones of many kinds, and spoiled ones of the kinds that real folders hold."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> NDArray[np.uint8]:
    """Return an H x W x 3 uint8 image of smooth colours with a disc and a bar; each seed gives another one."""
    rng = np.random.default_rng(seed)
    width, height = size
    y_HW, x_HW = np.mgrid[:height, :width] / max(size)
    waves = [np.cos(rng.uniform(1, 9) * x_HW + rng.uniform(1, 9) * y_HW + rng.uniform(0, 6)) for _ in range(3)]
    image_HWC = 128 + 90 * np.stack(waves, axis=-1)
    disc_HW = (x_HW - rng.uniform(0.2, 0.8)) ** 2 + (y_HW - rng.uniform(0.2, 0.8)) ** 2 < rng.uniform(0.02, 0.06)
    image_HWC[disc_HW] = rng.uniform(0, 255, 3)
    left = int(rng.integers(0, max(1, width - 4)))
    image_HWC[:, left : left + 4] = rng.uniform(0, 255, 3)
    clipped: NDArray[np.uint8] = np.clip(image_HWC, 0, 255).astype(np.uint8)
    return clipped


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return the bytes of the file that Pillow writes for `image`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _rgba(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)


def _sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def _animation(image: Image.Image) -> bytes:
    return encode(image, "GIF", save_all=True, append_images=[image.rotate(90), image.rotate(180)])


GOOD: dict[str, tuple[str, Callable[[Image.Image], bytes]]] = {
    "rgb-jpeg": (".jpg", lambda image: encode(image, "JPEG", quality=90)),
    "png": (".png", lambda image: encode(image, "PNG")),
    "webp": (".webp", lambda image: encode(image, "WEBP")),
    "grey-jpeg": (".JPEG", lambda image: encode(image.convert("L"), "JPEG")),
    "rgba-png": (".png", lambda image: encode(_rgba(image), "PNG")),
    "palette-png": (".png", lambda image: encode(image.quantize(16), "PNG")),
    "cmyk-jpeg": (".jpg", lambda image: encode(image.convert("CMYK"), "JPEG")),
    "sixteen-bit-png": (".png", lambda image: encode(_sixteen_bits(image), "PNG")),
    "rotated-jpeg": (".jpg", _rotated),
    "progressive-jpeg": (".jpeg", lambda image: encode(image, "JPEG", progressive=True)),
    "animated-gif": (".gif", _animation),
    "bmp": (".bmp", lambda image: encode(image, "BMP")),
    "tiff": (".tif", lambda image: encode(image, "TIFF", compression="tiff_lzw")),
}


def write_good_images(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (48, 40)) -> list[str]:
    """Write `count` images that differ, of all kinds in turn, and return their names.

    Every one decodes to `size` (width, height): the one with an EXIF rotation is stored lying on its side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        kind = list(GOOD)[number % len(GOOD)]
        ending, to_bytes = GOOD[kind]
        names.append(f"good-{number:04}-{kind}{ending}")
        image = Image.fromarray(picture(seed * 1_000_003 + number, size))
        (folder / names[-1]).write_bytes(to_bytes(image))
    return names


def half(encoded: bytes) -> bytes:
    """Cut a file in the middle, as a broken download does."""
    return encoded[: len(encoded) // 2]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of a hundred bytes whose header claims any size."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


SPOILED: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "truncated-jpeg": (".jpg", lambda seed: half(encode(Image.fromarray(picture(seed)), "JPEG"))),
    "truncated-png": (".png", lambda seed: half(encode(Image.fromarray(picture(seed)), "PNG"))),
    "empty": (".jpg", lambda seed: b""),
    "text": (".jpg", lambda seed: f"Notes of day {seed}: nothing to see here.\n".encode()),
    "bomb": (".png", lambda seed: png_header(30_000, 30_000 + seed)),
    "random-bytes": (".png", lambda seed: np.random.default_rng(seed).bytes(500)),
    "html": (".webp", lambda seed: b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "zeros": (".jpeg", lambda seed: bytes(4096)),
    "truncated-webp": (".webp", lambda seed: half(encode(Image.fromarray(picture(seed)), "WEBP"))),
    "truncated-gif": (".gif", lambda seed: half(encode(Image.fromarray(picture(seed)), "GIF"))),
    "git-lfs": (".jpg", lambda seed: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"),
    "header-only": (".jpg", lambda seed: encode(Image.fromarray(picture(seed)), "JPEG")[:4]),
}


def write_spoiled_images(folder: Path, count: int) -> list[str]:
    """Write `count` files that end like images and can't be decoded, of all kinds in turn; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        kind = list(SPOILED)[number % len(SPOILED)]
        ending, to_bytes = SPOILED[kind]
        names.append(f"spoiled-{number:04}-{kind}{ending}")
        (folder / names[-1]).write_bytes(to_bytes(number))
    return names


def spoil(sound: Sequence[bytes], seed: int) -> bytes:
    """Return one of the files `sound` with up to three things wrong with it; each seed gives another file."""
    rng = np.random.default_rng(seed)
    spoiled = bytearray(sound[rng.integers(len(sound))])
    is_png = spoiled.startswith(b"\x89PNG")
    for _ in range(rng.integers(1, 4)):
        _FAULTS[rng.integers(len(_FAULTS))](spoiled, sound, rng)
    if is_png and rng.random() < 0.5:
        _sign(spoiled)
    return bytes(spoiled)


def _some(spoiled: bytearray, rng: np.random.Generator) -> slice:
    """A range of up to 100 bytes; half of the ranges begin where the headers are."""
    start = int(rng.integers(0, len(spoiled) + 1 if rng.random() < 0.5 else min(len(spoiled) + 1, 64)))
    return slice(start, start + int(rng.integers(1, 100)))


def _flip(spoiled: bytearray, sound: Sequence[bytes], rng: np.random.Generator) -> None:
    place = _some(spoiled, rng).start
    spoiled[place : place + 1] = bytes(value ^ 1 << int(rng.integers(8)) for value in spoiled[place : place + 1])


def _extreme(spoiled: bytearray, sound: Sequence[bytes], rng: np.random.Generator) -> None:
    values = (b"\0", b"\xff", b"\0\0", b"\xff\xff", b"\x7f\xff", b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1")
    value = values[rng.integers(len(values))]
    place = _some(spoiled, rng).start
    spoiled[place : place + len(value)] = value


def _cut(spoiled: bytearray, sound: Sequence[bytes], rng: np.random.Generator) -> None:
    del spoiled[int(rng.integers(0, len(spoiled) + 1)) :]


def _delete(spoiled: bytearray, sound: Sequence[bytes], rng: np.random.Generator) -> None:
    del spoiled[_some(spoiled, rng)]


def _insert(spoiled: bytearray, sound: Sequence[bytes], rng: np.random.Generator) -> None:
    place = _some(spoiled, rng).start
    spoiled[place:place] = rng.bytes(int(rng.integers(1, 50)))


def _double(spoiled: bytearray, sound: Sequence[bytes], rng: np.random.Generator) -> None:
    part = _some(spoiled, rng)
    spoiled[part.start : part.start] = spoiled[part]


def _splice(spoiled: bytearray, sound: Sequence[bytes], rng: np.random.Generator) -> None:
    other = sound[rng.integers(len(sound))]
    spoiled[int(rng.integers(0, len(spoiled) + 1)) :] = other[int(rng.integers(0, len(other))) :]


_FAULTS = (_flip, _flip, _extreme, _extreme, _cut, _delete, _insert, _double, _splice)


def _sign(spoiled: bytearray) -> None:
    """Make the checksums of a PNG right, so that its readers come further."""
    at = 8
    while at + 12 <= len(spoiled):
        end = at + 8 + int.from_bytes(spoiled[at : at + 4], "big")
        if end + 4 > len(spoiled):
            return
        spoiled[end : end + 4] = struct.pack(">I", zlib.crc32(spoiled[at + 4 : end]))
        at = end + 4
