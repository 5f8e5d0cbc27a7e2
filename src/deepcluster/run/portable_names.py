"""Names of files and folders that every system can hold: Windows, macOS, sticks, archives."""

import os
import re
from unicodedata import normalize

from deepcluster.core.text import printable

MOST_BYTES, MOST_BYTES_OF_ENDING = 255, 32
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
# Names of devices on Windows, with any ending.
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\.|$)", re.IGNORECASE)


def portable(text: str) -> str:
    """Return text as (part of) a name: what Windows forbids becomes `_`; no spaces or dots at its end; "" stays."""
    return _FORBIDDEN.sub("_", printable(text)).rstrip(" .")


def entry_name(name: str, *, prefix: str = "", suffix: str = "") -> str:
    """Return the name of a link to an image, or of a copy.

    Args:
        name: path of the image relative to its data; its folders are joined by `__`.
        prefix: what it begins with.
        suffix: goes before the ending. What is left is shortened at the front to what file systems take.
    """
    name = portable(name.replace("::", "__").replace("/", "__")) or "_"
    stem, dot, ending = name.rpartition(".")
    is_ending = stem and len(os.fsencode(ending)) <= MOST_BYTES_OF_ENDING
    stem, ending = (stem + suffix, dot + ending) if is_ending else (name + suffix, "")
    if not prefix and _DEVICES.match(stem + ending):
        stem = f"_{stem}"
    while stem and len(os.fsencode(prefix + stem + ending)) > MOST_BYTES:
        stem = stem[1:]
    return prefix + stem + ending


def folder_name(text: str, most_bytes: int = 120) -> str:
    """Return text as the end of the name of a folder, shortened at its end."""
    text = portable(text)
    while len(os.fsencode(text)) > most_bytes:
        text = text[:-1]
    return text.rstrip(" .")


def looks(name: str) -> str:
    """Return what two names share that are one file on systems which do not tell capital letters, or accents, apart."""
    return normalize("NFC", name).casefold()
