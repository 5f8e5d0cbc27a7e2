"""Requests to servers through fsspec's file systems, one at a time; what fails raises the error of its library.

Everything here may be called from many threads. File systems of fsspec that are asynchronous (HTTP, S3, GCS, Hugging Face)
have one thread with an event loop that runs the requests of all callers at once; of the others, few are made for
threads, so they get one request at a time.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import wait
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, TypeVar

from deepcluster.core.errors import DeepClusterError, InputError, did_you_mean
from deepcluster.data.storage.addresses import host_of, is_web, scheme_of, shown
from deepcluster.data.storage.faults import ShortAnswer
from deepcluster.data.storage.retries import Connection, ConnectionLost, ending

T = TypeVar("T")
# A server that is there answers a greeting within this time, also from the other side of the world.
CONNECT_SECONDS: Final = 15.0
# The longest silence in the middle of an answer, or before it: object stores under load take up to ten seconds.
READ_SECONDS: Final = 30.0
# For a whole request where a library has no such limits: 4 MiB at 14 kB a second.
_REQUEST_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 0.5
# What changes with the content, the surest first; by the names that file systems give it.
_MARKS: Final = (
    "ETag", "etag", "generation", "blob_id", "oid", "md5Hash", "content_md5", "Content-MD5", "checksum", "sha256",
    "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "modified", "created",
)  # fmt: skip


class NoParts(DeepClusterError):
    """A server gives whole files alone; no person sees this."""


@dataclass(frozen=True)
class About:
    """What a server says of a file.

    Attributes:
        size: in bytes; None where it does not say.
        marks: what changes with its content.
        by_parts: whether parts of it can be had.
        page: it is a page of HTML, as servers give for folders.
    """

    size: int | None
    marks: Mapping[str, str] = field(default_factory=dict)
    by_parts: bool = True
    page: bool = False

    @property
    def stamp(self) -> str:
        """Size and the surest mark, as `10871-5f3a`."""
        return "-".join(["?" if self.size is None else str(self.size), *(list(self.marks.values())[:1])])

    def same(self, other: About) -> bool:
        """Tell whether the content is the same, by its size and the surest mark that both have."""
        mark = next((mark for mark in self.marks if mark in other.marks), None)
        return self.size == other.size and (mark is None or self.marks[mark] == other.marks[mark])


class Changed(InputError):
    """The content at an address is not what it was when it was opened."""

    def __init__(self, address: str, before: About, now: About) -> None:
        super().__init__(
            f"{shown(address)} changed while it was in use (it was {before.stamp}, now it is {now.stamp}); "
            "begin anew when nobody writes to it any more"
        )


class Site(ABC):
    """One file system of fsspec, shared by all threads; addresses in, bytes out.

    Attributes:
        connection: what is known of its server.
    """

    def __init__(self, fs: Any) -> None:
        self.connection = Connection()
        self._fs = fs

    @abstractmethod
    def about(self, address: str) -> About:
        """Ask for the size and marks of a file."""

    @abstractmethod
    def part(self, address: str, about: About, start: int, into: bytearray, size: int) -> None:
        """Add bytes to `into` until they are `size`; byte 0 of `into` is byte `start` of the file.

        What came before an error stays there. Raises Changed where the file is not as in `about`, NoParts, ShortAnswer.
        """

    @abstractmethod
    def whole(self, address: str) -> bytes:
        """Return a whole file."""

    @abstractmethod
    def pieces(self, address: str, about: About, size: int) -> Iterator[bytes]:
        """Yield a whole file in pieces of `size` bytes, the last one shorter, without holding more than a few."""

    @abstractmethod
    def below(self, address: str, depth: int | None) -> tuple[dict[str, About | None], list[str]]:
        """Return the addresses of files in a folder, and those of its folders that must be asked one by one.

        Where there is one question for all files below, they are those in `depth` levels of folders (None: any).
        """

    def _wait(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """Return what `work` gives in the event loop; given up when this thread is interrupted or is told to stop."""
        stop, started = ending(), time.monotonic()
        future = asyncio.run_coroutine_threadsafe(work, self._fs.loop)
        try:
            while not future.done():
                wait([future], timeout=_POLL_SECONDS)
                if future.done():
                    break
                if stop.is_set():
                    raise ConnectionLost("stopped while waiting for a server")
                if seconds is not None and time.monotonic() - started > seconds:
                    raise TimeoutError
            return future.result()
        finally:
            future.cancel()


class WebSite(Site):
    """HTTP, through the session of fsspec's file system: its own calls hide the headers that tell what was answered."""

    def about(self, address: str) -> About:
        return self._wait(self._about(address))

    async def _about(self, address: str) -> About:
        # Not HEAD, which signed addresses and some servers refuse: and this one tells at once whether parts can be had.
        async with await self._request(address, {"Range": "bytes=0-0"}) as response:
            if response.status != 416:
                return _about_response(response)
            if response.headers.get("Content-Range", "").replace(" ", "").endswith("*/0"):
                return About(0, _marks(response.headers))
        async with await self._request(address, {}) as response:
            return _about_response(response)

    def part(self, address: str, about: About, start: int, into: bytearray, size: int) -> None:
        self._wait(self._part(address, about, start, into, size))

    async def _part(self, address: str, about: About, start: int, into: bytearray, size: int) -> None:
        first, last = start + len(into), start + size - 1
        async with await self._request(address, {"Range": f"bytes={first}-{last}"}) as response:
            if response.status == 416:  # It is shorter now.
                total = response.headers.get("Content-Range", "").rpartition("/")[2]
                raise Changed(address, about, About(int(total) if total.isdigit() else None, _marks(response.headers)))
            found = _about_response(response)
            if not about.same(found):
                raise Changed(address, about, found)
            if response.status == 200 and (first > 0 or about.size != size):
                raise NoParts
            if response.status == 206 and _range_of(response)[0] != first:
                raise ShortAnswer("the server sent another part than was asked for")
            async for piece in response.content.iter_any():
                if len(into) + len(piece) > size:
                    raise ShortAnswer("the server sent more bytes than were asked for")
                into += piece
        if len(into) < size:
            raise ShortAnswer(f"the server sent {len(into) - (first - start):,} of {last - first + 1:,} bytes")

    def whole(self, address: str) -> bytes:
        return self._wait(self._whole(address))

    async def _whole(self, address: str) -> bytes:
        async with await self._request(address, {}) as response:
            response.raise_for_status()
            content: bytes = await response.read()
            return content

    def pieces(self, address: str, about: About, size: int) -> Iterator[bytes]:
        response = self._wait(self._request(address, {}))
        try:
            response.raise_for_status()
            found = _about_response(response)
            if not about.same(found):
                raise Changed(address, about, found)
            # The loop reads no further ahead than a buffer of 128 kB while nobody asks.
            while piece := self._wait(_read_piece(response, size)):
                yield piece
        finally:
            self._fs.loop.call_soon_threadsafe(response.close)

    def below(self, address: str, depth: int | None) -> tuple[dict[str, About | None], list[str]]:
        entries: list[dict[str, Any]] = self._wait(self._fs._ls(address, detail=True))
        own = address.rstrip("/") + "/"
        entries = [entry for entry in entries if entry["name"].startswith(own) and entry["name"] != own]
        folders = [entry["name"] for entry in entries if entry["type"] == "directory"]
        return {entry["name"]: None for entry in entries if entry["type"] != "directory"}, folders

    async def _request(self, address: str, headers: dict[str, str]) -> Any:
        session = await self._fs.set_session()
        return await session.get(self._fs.encode_url(address), headers=headers, allow_redirects=True)


def _about_response(response: Any) -> About:
    """Read the headers of an answer; raises aiohttp's error where it is none of a file."""
    response.raise_for_status()
    page = response.content_type == "text/html"
    if response.status == 206:
        return About(_range_of(response)[1], _marks(response.headers), page=page)
    return About(response.content_length, _marks(response.headers), by_parts=False, page=page)


def _range_of(response: Any) -> tuple[int | None, int | None]:
    """Return the first byte of a part and the size of the whole, as in `Content-Range: bytes 0-99/1000`."""
    match = re.fullmatch(r"bytes\s+(\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if match is None:
        return None, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


async def _read_piece(response: Any, size: int) -> bytes:
    piece = bytearray()
    while len(piece) < size and (some := await response.content.read(size - len(piece))):
        piece += some
    return bytes(piece)


class OtherSite(Site):
    """Any other file system, through the calls that all of them have."""

    def __init__(self, fs: Any) -> None:
        super().__init__(fs)
        self._at_once = bool(fs.async_impl)
        self._turn = threading.Lock()

    def about(self, address: str) -> About:
        return _about_entry(self._call("info", self._path(address)))

    def part(self, address: str, about: About, start: int, into: bytearray, size: int) -> None:
        first, last = start + len(into), start + size
        found = self._call("cat_file", self._path(address), start=first, end=last)
        # Only a question after the answer tells that it is of the right content.
        now = self.about(address)
        if not about.same(now):
            raise Changed(address, about, now)
        if len(found) > last - first:
            raise ShortAnswer("the server sent more bytes than were asked for")
        into += found
        if len(into) < size:
            raise ShortAnswer(f"the server sent {len(found):,} of {last - first:,} bytes")

    def whole(self, address: str) -> bytes:
        content: bytes = self._call("cat_file", self._path(address))
        return content

    def pieces(self, address: str, about: About, size: int) -> Iterator[bytes]:
        for start in range(0, about.size or 0, size):
            piece = bytearray()
            self.part(address, about, start, piece, min(size, (about.size or 0) - start))
            yield bytes(piece)

    def below(self, address: str, depth: int | None) -> tuple[dict[str, About | None], list[str]]:
        from fsspec import AbstractFileSystem
        from fsspec.asyn import AsyncFileSystem

        # The general search leaves out folders that can't be listed, unless it is told otherwise.
        usual = getattr(type(self._fs), "_find", None) is AsyncFileSystem._find or (
            not self._at_once and type(self._fs).find is AbstractFileSystem.find
        )
        options = {"on_error": "raise"} if usual else {}
        found = self._call("find", self._path(address), seconds=None, maxdepth=depth, detail=True, **options)
        _, chained, rest = address.partition("::")
        address_of = self._fs.unstrip_protocol
        return {f"{address_of(path)}{chained}{rest}": _about_entry(entry) for path, entry in found.items()}, []

    def _call(self, name: str, *args: Any, seconds: float | None = _REQUEST_SECONDS, **options: Any) -> Any:
        if self._at_once:
            return self._wait(getattr(self._fs, f"_{name}")(*args, **options), seconds)
        with self._turn:
            return getattr(self._fs, name)(*args, **options)

    def _path(self, address: str) -> str:
        return str(self._fs._strip_protocol(address.partition("::")[0]))


def _about_entry(entry: Mapping[str, Any]) -> About:
    if entry.get("type") == "directory":
        raise IsADirectoryError
    return About(entry.get("size"), _marks(entry))


def _marks(entry: Mapping[str, Any]) -> dict[str, str]:
    # Times as seconds: the listing of a file system may have them in another form than its answer.
    found = ((mark, entry[mark]) for mark in _MARKS if entry.get(mark))
    return {mark: str(one.timestamp() if isinstance(one, datetime) else one).strip('"') for mark, one in found}


_sites: dict[tuple[int, str], Site] = {}
_sites_lock = threading.Lock()


def site_of(address: str) -> Site:
    """Return the site of an address: one for each server or bucket, shared by all threads of this process.

    Raises InputError for a scheme that nobody knows, and what the file system raises, such as ImportError.
    """
    # The threads of a file system do not live on in a forked process.
    key = (os.getpid(), host_of(address))
    with _sites_lock:
        if key not in _sites:
            _sites[key] = _make_site(address)
        return _sites[key]


def _make_site(address: str) -> Site:
    from fsspec.core import url_to_fs
    from fsspec.registry import get_filesystem_class, known_implementations

    scheme = scheme_of(address)
    if "::" in address and "://" not in address.partition("::")[0]:
        cache = address.partition("::")[0]
        raise InputError(f"leave out {cache}:: of {shown(address)}: parts of remote files are kept anyway")
    try:
        get_filesystem_class(scheme)
    except ValueError as error:
        raise InputError(f"{scheme}:// is no known kind of address{did_you_mean(scheme, known_implementations)}") from error
    fs, _ = url_to_fs(address, use_listings_cache=False, skip_instance_cache=True, **_options(scheme))
    return WebSite(fs) if is_web(address) and "::" not in address else OtherSite(fs)


def _options(scheme: str) -> dict[str, Any]:
    """Return time-outs in the words of a file system, beside what the person set in fsspec's own configuration."""
    from fsspec.config import conf

    def own(name: str) -> dict[str, Any]:
        return dict(conf.get(scheme, {}).get(name, {}))

    if scheme in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        given = own("client_kwargs")
        # Bytes as they are stored: ranges of what is compressed on the way would mean nothing.
        headers = {"Accept-Encoding": "identity", **given.pop("headers", {})}
        return {
            "client_kwargs": {"timeout": limits, "trust_env": True, "auto_decompress": False, "headers": headers, **given}
        }
    if scheme in ("s3", "s3a"):
        limits_s3 = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        return {"config_kwargs": {**limits_s3, **own("config_kwargs")}}
    return {}
