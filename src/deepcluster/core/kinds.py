"""What a file really is, by how it begins: for messages about files that are not what their names say."""

import re
import zlib

BEGIN_BYTES = 1024
"""As many bytes of a file are enough for `kind_of`."""

_LFS = "a Git LFS pointer; fetch the file itself with `git lfs pull`"
_XML = rb"(?:\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--((?!-->).)*-->\s*)*"
# What a file may hold instead of its content, whatever its name: patterns of the first bytes. A text that is wanted may
# begin with a brace, so only errors of servers with their usual words are recognised.
_STAND_INS = (
    (rb"version https://(git-lfs|hawser)\.github\.com/spec", _LFS),
    (rb"[./]*(git/)?annex/objects/", "a git-annex pointer; fetch the file itself with `git annex get`"),
    (rb"(outs:|md5: \w+\s+outs:)\s", "a DVC pointer; fetch the file itself with `dvc pull`"),
    (_XML + rb"<(?i:!doctype html|html|head|body)", "HTML, perhaps the error page of a download"),
    (_XML + rb"<(\w+:)?(?i:error)\b", "XML, the error message of a download"),
    (rb'\s*\{\s*"(error|errors|message|detail|Message)"\s*:', "JSON, the error message of a download"),
    (rb"\x00\x05\x16[\x00\x07]", "a companion file of macOS (AppleDouble), which holds no data"),
    (rb"L\x00\x00\x00\x01\x14\x02\x00", "a Windows shortcut; name the file that it leads to"),
    (rb"\s*\[(InternetShortcut|Desktop Entry)\]", "a shortcut; name the file that it leads to"),
    (rb"book\x00\x00\x00\x00mark", "a macOS alias; name the file that it leads to"),
    (rb"!<symlink>", "a link of Cygwin; name the file that it leads to"),
)
_FORMATS = (
    (rb"\xff\xd8\xff", "a JPEG image"),
    (rb"\x89PNG", "a PNG image"),
    (rb"GIF8", "a GIF image"),
    (rb"RIFF....WEBP", "a WebP image"),
    (rb"....ftypavi[fs]", "an AVIF image"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "a HEIC image"),
    (rb"....ftyp", "a video"),
    (rb"II[*+]\x00|MM\x00[*+]", "a TIFF image"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (rb"8BPS", "a Photoshop file"),
    (_XML + rb"(<!DOCTYPE svg[^>]*>\s*)?<svg", "an SVG drawing"),
    (rb"%PDF", "a PDF"),
    (rb"%!PS", "PostScript"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"BZh[1-9]", "compressed with bzip2"),
    (rb"\xfd7zXZ", "compressed with xz"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (rb"7z\xbc\xaf", "a 7-Zip archive"),
    (rb"Rar!", "a RAR archive"),
    (rb".{257}ustar", "a tar archive"),
    (rb"PAR[1E]", "a Parquet file"),
    (rb"ARROW1", "an Arrow file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"SQLite format 3", "an SQLite database"),
    (rb"\x80[\x02-\x05]", "a Python pickle"),
    (rb".{7}\x00\{\"", "a safetensors file"),
)


def stand_in(begin: bytes) -> str | None:
    """Return what a file holds instead of its content, such as `a Git LFS pointer; fetch ...`; None if nothing is known.

    Args:
        begin: the first `BEGIN_BYTES` of the file, or the whole of it.
    """
    if begin and not begin.strip(b"\0"):
        return "only zero bytes"
    if begin.startswith(b"\x1f\x8b"):
        packed = stand_in(_inflated(begin))
        return packed and f"gzip'd: {packed}"
    return _match(_STAND_INS, begin)


def kind_of(begin: bytes) -> str:
    """Return what a file is, to follow "it is", as far as its first `BEGIN_BYTES` tell; never an empty text."""
    if not begin:
        return "empty (0 bytes)"
    known = stand_in(begin) or _match(_FORMATS, begin)
    if known:
        return known
    if begin.startswith(b"\x1f\x8b"):
        return "a gzip archive"
    # The last character may be cut in two.
    text = begin[:512].decode("utf-8", "replace").removesuffix("\ufffd").removeprefix("\ufeff")
    if text and "\ufffd" not in text and all(character.isprintable() or character.isspace() for character in text):
        return "text"
    return f"of an unknown format (starts with {begin[:4].hex(' ')})"


def _match(patterns: tuple[tuple[bytes, str], ...], begin: bytes) -> str | None:
    return next((kind for pattern, kind in patterns if re.match(pattern, begin[:BEGIN_BYTES], re.DOTALL)), None)


def _inflated(packed: bytes) -> bytes:
    """Return the beginning of what a gzip'd file holds; b"" where it is damaged."""
    try:
        return zlib.decompressobj(31).decompress(packed, BEGIN_BYTES)
    except zlib.error:
        return b""
