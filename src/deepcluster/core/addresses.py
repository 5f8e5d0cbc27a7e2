"""Addresses such as `s3://bucket/part-0.tar`: what is one, its parts, and patterns of addresses and of local paths."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from urllib.parse import unquote

from deepcluster.core.errors import InputError

# `C://` is a drive; `digits.npz::000012` is an image in an array; `zip://a.jpg::s3://...` and `x::s3://...` are chains.
_ADDRESS = re.compile(r"(?:[A-Za-z][\w+.-]+::)*([A-Za-z][\w+.-]+)://")
_LOCAL = re.compile(r"(?:file|local)://(?:localhost(?=/))?", re.IGNORECASE)
_HOSTLESS = frozenset({"memory", "zip", "tar", "libarchive"})
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_MOST_NAMES = 100_000
# Secrets: parameters of signed addresses, and a password before the host.
_SECRETS = re.compile(
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
    """Return what finds the data from any folder: an absolute path, or an address without its secrets (`shown`)."""
    return shown(str(data)) if "://" in str(data) else os.path.abspath(os.path.expanduser(data))  # noqa: PTH100, PTH111


def scheme_of(address: str) -> str:
    """Return `s3` of `s3://bucket/a.tar`, in lower case; of a chain that of its first link."""
    return address.partition("://")[0].rpartition("::")[2].lower()


def is_web(address: str) -> bool:
    """Tell whether an address is one of HTTP."""
    return scheme_of(address) in ("http", "https")


def host_of(address: str) -> str:
    """Return what the addresses of one server or bucket share: `s3://bucket`, `zip://::https://host/a.zip`."""
    scheme, (link, chained, rest) = scheme_of(address), address.partition("::")
    host = "" if chained or scheme in _HOSTLESS else link.partition("://")[2].partition("/")[0]
    return f"{scheme}://{host}{chained}{rest}"


def path_of(address: str) -> str:
    """Return the path below the host in plain text: `a b.tar` of `https://host/a%20b.tar?x=1`."""
    link, chained, _ = address.partition("::")
    path = link.partition("://")[2]
    if is_web(address):
        path = re.split(r"[?#]", path, maxsplit=1)[0]
    if not chained and scheme_of(address) not in _HOSTLESS:
        path = path.partition("/")[2]
    return (unquote(path, errors="surrogateescape") if is_web(address) else path).strip("/")


def names_below(paths: Sequence[str]) -> list[str]:
    """Return paths relative to the deepest folder that holds all of them."""
    folder = os.path.commonprefix([path.split("/")[:-1] for path in paths])  # noqa: RUF071 (of lists: whole parts)
    return ["/".join(path.split("/")[len(folder) :]) for path in paths]


def expand(pattern: str) -> list[str]:
    """Return the local paths that a path with `*`, `?`, `[...]`, `{a,b}` or `{000..127}` stands for, in order.

    A path without these is returned as it is, whether it exists or not, and so is one that exists under that very name;
    `file://` is removed.

    Raises:
        InputError: a pattern matches nothing.
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
    found = list(islice(_without_braces(pattern), _MOST_NAMES + 1))
    if len(found) > _MOST_NAMES:
        raise InputError(f"{shown(pattern)} stands for more than {_MOST_NAMES:,} names; use a * instead")
    return found


def _without_braces(text: str) -> Iterator[str]:
    """Expand the first braces that hold a list or a range, and what follows them."""
    for start in (match.start() for match in re.finditer("{", text)):
        depth, cuts = 0, [start]  # The braces, and the commas between them.
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0 or (depth == 1 and text[end] == ","):
                cuts.append(end)
            if depth == 0:
                break
        numbers = _RANGE.fullmatch(text, start + 1, end)
        if depth or (numbers is None and len(cuts) == 2):
            continue
        parts = (text[left + 1 : right] for left, right in pairwise(cuts))
        for choice in _numbers(*numbers.groups()) if numbers else chain.from_iterable(map(_without_braces, parts)):
            for rest in _without_braces(text[end + 1 :]):
                yield text[:start] + choice + rest
        return
    yield text


def _numbers(first: str, last: str, step: str | None) -> Iterator[str]:
    """Yield the numbers of a range, up or down, both ends included, as wide as the wider one if one begins with 0."""
    by = max(1, abs(int(step or 1))) * (-1 if int(first) > int(last) else 1)
    padded = any(re.match(r"-?0\d", end) for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return (f"{number:0{width}}" for number in range(int(first), int(last) + (1 if by > 0 else -1), by))
