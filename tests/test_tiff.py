"""TIFFs of scanners, microscopes and satellites: whatever the samples and their layout, the picture that was written."""

import io
import itertools
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from spoiled_images import encode, picture

from deepcluster.core.errors import UnreadableImage
from deepcluster.data.decode import decode, size_of

SCENE = picture(3, (70, 50))
BANDS = np.concatenate([SCENE, 255 - SCENE[..., ::-1]], axis=2)  # six, all different
BLACK_IS_ZERO, RGB, CMYK, LAB = 1, 2, 5, 8
NONE, LZW, DEFLATE = 1, 5, 8


def lzw(content: bytes) -> bytes:
    """Compress with codes of 9 bits, cleared before there are more."""
    codes = [256]
    for number, byte in enumerate(content):
        codes += [256, byte] if number % 250 == 249 else [byte]
    text = "".join(f"{code:09b}" for code in [*codes, 257])
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def predicted(piece_HWC: NDArray[Any], predictor: int, order: str) -> bytes:
    """Write a strip or tile as differences, as the specification and its technical note 3 say."""
    size = piece_HWC.dtype.itemsize
    if predictor == 3:
        height = len(piece_HWC)
        values = piece_HWC.astype(piece_HWC.dtype.newbyteorder(">")).reshape(height, -1)
        planes = values.view(np.uint8).reshape(height, -1, size).swapaxes(1, 2).reshape(height, -1, piece_HWC.shape[2])
        return np.diff(planes, axis=1, prepend=np.zeros_like(planes[:, :1])).tobytes()
    words = np.ascontiguousarray(piece_HWC).view(f"u{size}")
    if predictor == 2:
        words = np.diff(words, axis=1, prepend=np.zeros_like(words[:, :1]))
    return words.astype(f"{order}u{size}").tobytes()


def tiff(
    values: NDArray[Any],
    photometric: int,
    *,
    order: str = "<",
    big: bool = False,
    planar: bool = False,
    tile: tuple[int, int] | None = None,
    compression: int = NONE,
    predictor: int = 1,
    extra: tuple[int, ...] = (),
    more: dict[int, tuple[int, ...]] | None = None,
) -> bytes:
    """Return a TIFF of H x W x C values of any type; `more` are further tags."""
    height, width, n_bands = values.shape
    rows, across = tile or (17, width)
    planes = [values[..., [band]] for band in range(n_bands)] if planar else [values]
    pieces = []
    for plane, top, left in itertools.product(planes, range(0, height, rows), range(0, width, across)):
        piece = plane[top : top + rows, left : left + across]
        if tile:
            piece = np.pad(piece, [(0, rows - piece.shape[0]), (0, across - piece.shape[1]), (0, 0)], mode="edge")
        content = predicted(piece, predictor, order)
        pieces.append({NONE: bytes, LZW: lzw, DEFLATE: zlib.compress}[compression](content))
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags: dict[int, tuple[int, ...]] = {256: (width,), 257: (height,), 258: (8 * values.dtype.itemsize,) * n_bands}
    tags |= {259: (compression,), 262: (photometric,), 277: (n_bands,), 284: (1 + planar,), 317: (predictor,)}
    tags |= {338: extra} if extra else {}
    tags |= {339: (kind,) * n_bands}
    places, counts = (324, 325) if tile else (273, 279)
    tags |= {322: (across,), 323: (rows,)} if tile else {278: (rows,)}
    start = 16
    tags[places] = tuple(start + sum(map(len, pieces[:number])) for number in range(len(pieces)))
    tags[counts] = tuple(map(len, pieces))
    tags |= more or {}
    body = b"".join(pieces)
    at = start + len(body) + len(body) % 2
    head = {"<": b"II", ">": b"MM"}[order]
    word, long, code = ("Q", 8, 16) if big else ("I", 4, 4)
    after = at + (8 if big else 2) + len(tags) * (20 if big else 12) + long
    entries, rest = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}{word}", *numbers)
        inline = packed if len(packed) <= long else struct.pack(order + word, after + len(rest))
        rest += packed if len(packed) > long else b""
        entries += struct.pack(f"{order}HH{word}", tag, code, len(numbers)) + inline
    header = head + (struct.pack(order + "HHHQ", 43, 8, 0, at) if big else struct.pack(order + "HI", 42, at))
    directory = struct.pack(order + ("Q" if big else "H"), len(tags)) + entries + bytes(long) + rest
    return header.ljust(start, b"\0") + body + bytes(len(body) % 2) + directory


def reason(encoded: bytes, **options: int) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(encoded, **options)
    return str(caught.value)


def as_type(values: NDArray[np.uint8], kind: str) -> NDArray[Any]:
    """Return values whose 8 bits by the rules are `values`, where these go from 0 to 255."""
    if kind[0] == "f":
        return (values / 255).astype(kind)
    scale = {"u1": 1, "u2": 257, "u4": 257 << 12, "u8": 257 << 40, "i1": 1, "i2": 200, "i4": 257 << 10, "i8": 257 << 40}[
        kind
    ]
    shift = {"i1": 128, "i2": 20_000, "i4": 5, "i8": 7}.get(kind, 0)
    return (values.astype(np.int64) * scale - shift).astype(kind)


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"order": ">"},
    {"big": True},
    {"big": True, "order": ">"},
    {"planar": True},
    {"tile": (32, 16)},
    {"tile": (16, 32), "planar": True, "order": ">"},
    {"compression": LZW},
    {"compression": LZW, "predictor": 2},
    {"compression": LZW, "predictor": 2, "order": ">", "tile": (32, 32)},
    {"compression": DEFLATE, "predictor": 2, "planar": True},
    {"compression": DEFLATE, "order": ">", "planar": True, "big": True},
]


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize("n_bands", [1, 2, 3, 4, 6])
def test_every_type_and_number_of_bands_in_every_layout(kind: str, n_bands: int) -> None:
    bands = BANDS[..., :n_bands].copy()
    n_shown = 3 if n_bands >= 3 else 1
    bands[0, 0], bands[0, 1] = 0, 255  # so that stretching changes nothing
    want = np.broadcast_to(bands[..., :n_shown], SCENE.shape)
    values = as_type(bands, kind)
    for layout in LAYOUTS + [
        {"compression": DEFLATE, "predictor": 3},
        {"compression": LZW, "predictor": 3, "tile": (16, 16)},
    ]:
        if layout.get("predictor") == 3 and kind[0] != "f":
            continue
        photometric = RGB if n_bands in (3, 6) else BLACK_IS_ZERO
        encoded = tiff(values, photometric, extra=(0,) * (n_bands - (3 if photometric == RGB else 1)), **layout)
        np.testing.assert_array_equal(decode(encoded), want, err_msg=str(layout))
        assert size_of(encoded) == want.shape[:2]


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
@pytest.mark.parametrize("n_bands", [2, 4])
@pytest.mark.parametrize("planar", [False, True])
def test_transparency_becomes_white_as_with_eight_bits(kind: str, n_bands: int, planar: bool) -> None:
    bands = BANDS[..., :n_bands].copy()
    bands[:10, :, -1], bands[10:20, :, -1], bands[20:, :, -1] = 0, 51, 255
    want = decode(encode(Image.fromarray(bands), "PNG"))
    found = decode(tiff(as_type(bands, kind), RGB if n_bands == 4 else BLACK_IS_ZERO, extra=(2,), planar=planar))
    np.testing.assert_array_equal(found, want)
    opacity = bands[..., -1:] / 255
    multiplied = np.concatenate([(bands[..., :-1] * opacity).astype(np.uint8), bands[..., -1:]], axis=2)
    found = decode(tiff(as_type(multiplied, kind), RGB if n_bands == 4 else BLACK_IS_ZERO, extra=(1,), planar=planar))
    assert np.abs(found.astype(int) - want).max() <= 3  # An opacity of 51 leaves a fifth of the steps.


def test_sixteen_bits_keep_the_upper_eight_as_pillow_does() -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (50, 70, 4)).astype(np.uint16)
    for photometric, n_bands, extra in ((RGB, 3, ()), (RGB, 4, ()), (RGB, 4, (0,)), (RGB, 4, (2,)), (CMYK, 4, ())):
        for order in "<>":
            encoded = tiff(values[..., :n_bands], photometric, extra=extra, order=order)
            with Image.open(io.BytesIO(encoded)) as image:
                eight = encode(image, "TIFF")
            np.testing.assert_array_equal(decode(encoded), decode(eight), err_msg=f"{photometric} {n_bands} {extra}")
    np.testing.assert_array_equal(decode(tiff(values[..., :3], RGB)), values[..., :3] >> 8)


def test_lab_of_sixteen_bits_is_that_of_eight() -> None:
    lab = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode(tiff(lab.astype(np.uint16) * 256, LAB)), decode(tiff(lab, LAB)))


def test_white_is_zero_is_inverted() -> None:
    for kind in ("u1", "u2", "f4"):
        bands = SCENE[..., :1].copy()
        bands[0, 0], bands[0, 1] = 0, 255
        np.testing.assert_array_equal(decode(tiff(as_type(bands, kind), 0))[..., :1], 255 - bands)


@pytest.mark.parametrize("bits", [2, 4, 10, 12, 14])
def test_packed_samples_of_odd_depths(bits: int) -> None:
    """By hand: the bits of a row one after the other, each row filled up to bytes."""
    rows = []
    values = SCENE.astype(int) << bits >> 8
    for row in values.reshape(50, -1):
        text = "".join(f"{value:0{bits}b}" for value in row)
        rows.append(int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big"))
    content = np.frombuffer(b"".join(rows), np.uint8).reshape(50, -1, 1)
    encoded = tiff(content, RGB, more={256: (70,), 258: (bits,) * 3, 277: (3,), 339: (1,) * 3})
    want = values * 255 // (2**bits - 1) if bits < 8 else values >> (bits - 8)
    np.testing.assert_array_equal(decode(encoded), want)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_undone(orientation: int) -> None:
    found = decode(tiff(SCENE.astype(np.uint16) * 257, RGB, more={274: (orientation,)}))
    np.testing.assert_array_equal(found, decode(tiff(SCENE, RGB, more={274: (orientation,)})))
    assert found.shape[:2] == ((50, 70) if orientation < 5 else (70, 50))


def test_bands_of_floats_are_stretched_together() -> None:
    values = np.zeros((2, 2, 3), np.float64)
    values[0, 0], values[1, 1] = (-100, 0, 100), (300, np.nan, np.inf)
    found = decode(tiff(values, RGB))
    assert found[0, 0].tolist() == [0, 64, 128]
    assert found[1, 1].tolist() == [255, 0, 255]
    huge = np.array([[[-1.7e308], [0], [1.7e308]]])
    assert decode(tiff(huge, BLACK_IS_ZERO))[0, :, 0].tolist() == [0, 128, 255]


def test_what_can_not_be_read_says_what_it_is() -> None:
    deep = SCENE.astype(np.uint16)
    assert reason(tiff(deep, RGB, more={259: (34712,)})).startswith("not supported: TIFF with compression 34712; convert")
    assert "complex" in reason(tiff(deep, RGB, more={339: (6, 6, 6)}))
    assert "24 bits" in reason(tiff(deep, RGB, more={258: (24, 24, 24)}))
    assert "3 bands of colours 6" in reason(tiff(deep, 6))
    for compression in (NONE, LZW, DEFLATE):
        encoded = tiff(deep, RGB, compression=compression)
        assert reason(encoded[: len(encoded) // 2]).startswith("not supported: TIFF of this kind, or damaged")
        beyond = reason(tiff(deep, RGB, compression=compression, more={273: (len(encoded) + 500,) * 3}))
        assert beyond.startswith("truncated: the file ends after")
    assert reason(tiff(deep, RGB), max_pixels=3499) == "70 x 50 pixels is over the limit of 3,499 pixels"
    many = np.zeros((50, 70, 9), np.uint16)
    assert "70 x 50 pixels of 9 x 16 bits are over the limit" in reason(tiff(many, BLACK_IS_ZERO), max_pixels=3500)
    assert decode(tiff(many, BLACK_IS_ZERO), max_pixels=3500 * 18 // 8 + 1).max() == 0


@pytest.mark.parametrize("kind", ["P5", "P6", "P2", "P3"])
@pytest.mark.parametrize("most", [65535, 4095, 1023, 256])
def test_a_pnm_of_sixteen_bits_keeps_the_upper_eight(kind: str, most: int) -> None:
    values = np.random.default_rng(0).integers(0, most + 1, (5, 7, 3 if kind in ("P3", "P6") else 1))
    header = f"{kind}\n# by hand\n7 5 {most}\n".encode()
    body = values.astype(">u2").tobytes() if kind in ("P5", "P6") else " ".join(map(str, values.ravel())).encode()
    want = np.broadcast_to((values * 65535 // most) >> 8, (5, 7, 3))
    np.testing.assert_array_equal(decode(header + body), want)
    assert reason(header + body[: len(body) // 2]).startswith("truncated: ")
    assert "over the limit" in reason(header + body, max_pixels=34)
    with Image.open(io.BytesIO(header + body)) as image:
        pillow = np.asarray(image)
    scaled = pillow / (257 if pillow.dtype != np.uint8 else 1)
    assert np.abs(scaled.reshape(5, 7, -1) - want[..., : values.shape[2]]).max() <= 1


@pytest.mark.parametrize("grey", [False, True])
def test_a_png_of_sixteen_bits_with_a_transparent_colour(grey: bool) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    values = np.random.default_rng(0).integers(0, 1 << 16, (50, 70, 1 if grey else 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 70, 50, 16, 0 if grey else 2, 0, 0, 0)
    hidden = chunk(b"tRNS", values[1, 1].tobytes())
    encoded = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + hidden + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    want = np.broadcast_to(values >> 8, SCENE.shape).copy()
    want[(values == values[1, 1]).all(axis=2)] = 255
    np.testing.assert_array_equal(decode(encoded), want)
