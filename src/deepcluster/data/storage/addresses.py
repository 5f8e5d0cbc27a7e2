"""Addresses such as `s3://bucket/part-0.tar`: what is one, its parts, and patterns of addresses and of local paths."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from deepcluster.core.errors import InputError

# `C://` is a drive; `digits.npz::000012` is an image in an array; `zip://a.jpg::s3://...` and `x::s3://...` are chains.
_ADDRESS: Final = re.compile(r"(?:[A-Za-z][\w+.-]+::)*([A-Za-z][\w+.-]+)://")
_LOCAL: Final = re.compile(r"(?:file|local)://(?:localhost(?=/))?", re.IGNORECASE)
_HOSTLESS: Final = frozenset({"memory", "zip", "tar", "libarchive"})
_RANGE: Final = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_MOST_NAMES: Final = 100_000
# What lets its reader in: parameters of signed addresses, and a password before the host.
_SECRETS: Final = re.compile(
    r"((?<=[?&])(?:x-(?:amz|goog)-[\w-]+|sig|signature|[\w-]*token|[\w-]*secret|password|se|st|expires|awsaccesskeyid)=)"
    r"[^&\s'\")]+|(?<=://)[^/@\s:]*:[^/@\s]*@",
    re.IGNORECASE,
)


def is_address(text: str) -> bool:
    """Tell whether `text` is an address (`scheme://...`, or a chain of them) and no local path; `file://` is local."""
    return _ADDRESS.match(text) is not None and _LOCAL.match(text) is None


def shown(text: str) -> str:
    """Return an address, or a message that holds some, without signatures and passwords."""
    return _SECRETS.sub(lambda match: f"{match[1]}..." if match[1] else "...@", text)


def whole_address(data: str | Path) -> str:
    """What finds the data from any folder: an absolute path, or an address without what a log must not have (`shown`)."""
    return shown(str(data)) if "://" in str(data) else os.path.abspath(os.path.expanduser(data))  # noqa: PTH100, PTH111


def scheme_of(address: str) -> str:
    """Return `s3` of `s3://bucket/a.tar`, in lower case; of a chain that of its first link."""
    return address.partition("://")[0].rpartition("::")[2].lower()


def is_web(address: str) -> bool:
    """Tell whether an address is one of HTTP."""
    return scheme_of(address) in ("http", "https")


def host_of(address: str) -> str:
    """Return what all files of one server or bucket have in common: `s3://bucket`, `zip://::https://host/a.zip`."""
    scheme = scheme_of(address)
    link, chained, rest = address.partition("::")
    if chained:
        return f"{scheme}://::{rest}"
    return f"{scheme}://" + ("" if scheme in _HOSTLESS else link.partition("://")[2].partition("/")[0])


def path_of(address: str) -> str:
    """Return the path below the host as people see it: `a b.tar` of `https://host/a%20b.tar?x=1`."""
    link, chained, _ = address.partition("::")
    if is_web(address):
        path = re.split(r"[?#]", link, maxsplit=1)[0].partition("://")[2].partition("/")[2]
        return unquote(path, errors="surrogateescape").strip("/")
    rest = link.partition("://")[2]
    hostless = chained or scheme_of(address) in _HOSTLESS
    return (rest if hostless else rest.partition("/")[2]).strip("/")


def names_below(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the deepest folder that holds all of `paths`, without a slash at its end, and the paths relative to it."""
    common = os.path.commonprefix([path.split("/")[:-1] for path in paths])  # noqa: RUF071 (of lists: whole parts)
    root = "/".join(common)
    return root, [path[len(root) + 1 if root else 0 :] for path in paths]


def pattern_start(address: str) -> int | None:
    """Return where the first `*`, `?` or `[` is, if any; a question mark is none in HTTP, where a query begins with it."""
    match = re.search(r"[*\[]" if is_web(address) else r"[*?\[]", address.partition("::")[0])
    return None if match is None else match.start()


def expand(pattern: str) -> list[str]:
    """Return the local paths that a path with `*`, `?`, `[...]`, `{a,b}` or `{000..127}` stands for, in order.

    A path without these is returned as it is, there or not, and so is one that exists under the very name; `file://` is
    taken away. Raises InputError where a pattern matches nothing.
    """
    if local := _LOCAL.match(pattern):
        pattern = unquote(pattern[local.end() :])
        if re.match(r"/[A-Za-z]:", pattern):  # file:///C:/photos
            pattern = pattern[1:]
    if os.path.lexists(pattern):
        return [pattern]
    found: dict[str, None] = {}
    for each in expand_braces(pattern):
        if not glob.has_magic(each) or os.path.lexists(each):
            found[each] = None
            continue
        matches = sorted(glob.glob(each, recursive=True))  # noqa: PTH207 (the text is kept as it was written)
        if not matches:
            raise InputError(f"nothing matches {each}" + ("" if Path(each).is_absolute() else f" in {Path.cwd()}"))
        found.update(dict.fromkeys(matches))
    return list(found)


def expand_braces(pattern: str) -> list[str]:
    """Return what `part-{000..127}.tar` or `{a,b}` stands for, in the order of a shell; other braces stay as they are."""
    found: list[str] = []
    for each in _without_braces(pattern):
        found.append(each)
        if len(found) > _MOST_NAMES:
            raise InputError(f"{shown(pattern)} stands for more than {_MOST_NAMES:,} names; use a * in their place")
    return found


def _without_braces(text: str) -> Iterator[str]:
    """Expand the first braces that hold a list or a range, and what follows them."""
    for start, stop, parts in _brace_groups(text):
        inner = _RANGE.fullmatch(text, start + 1, stop - 1)
        if inner is None and len(parts) < 2:
            continue
        choices = _numbers(*inner.groups()) if inner else (one for part in parts for one in _without_braces(part))
        for choice in choices:
            for rest in _without_braces(text[stop:]):
                yield text[:start] + choice + rest
        return
    yield text


def _brace_groups(text: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield start and end of each pair of braces, by their starts, and what its commas separate."""
    for start in (place for place, letter in enumerate(text) if letter == "{"):
        depth, parts = 0, [""]
        for place in range(start, len(text)):
            letter = text[place]
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                yield start, place + 1, [parts[0][1:], *parts[1:]]
                break
            if letter == "," and depth == 1:
                parts.append("")
            else:
                parts[-1] += letter


def _numbers(first: str, last: str, step: str | None) -> Iterator[str]:
    """Yield the numbers of a range, up or down, both ends included, as wide as the wider one if that begins with 0."""
    by = max(1, abs(int(step or 1)))
    down = int(first) > int(last)
    padded = any(re.match(r"-?0\d", end) for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    for number in range(int(first), int(last) + (-1 if down else 1), -by if down else by):
        yield f"{number:0{width}d}" if width else str(number)
