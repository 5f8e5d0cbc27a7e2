"""Remote files through fsspec: found by address or pattern, and read in blocks that are kept on disk."""

import asyncio
import os
import re
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from deepcluster.core.addresses import expand_braces, host_of, is_web, names_below, path_of, scheme_of, shown
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.retry import ConnectionLost, NotThere, end_waits, retry, waiting_ends
from deepcluster.core.text import distinct, endings_of, printable
from deepcluster.data.storage import StoredFile
from deepcluster.data.storage.blocks import BlockStore

T = TypeVar("T")
Q = TypeVar("Q")
# At 50 ms before the first byte and 50 to 100 MB/s after it, about as long for the bytes as for the wait.
BLOCK_BYTES = 4 << 20
# To connect to a distant server takes less; busy object stores are silent for ten seconds; 4 MiB at 14 kB per second.
CONNECT_SECONDS, READ_SECONDS, REQUEST_SECONDS = 15.0, 30.0, 300.0
_DEEPEST = 32  # A link to a folder above leads in circles.
# What changes with the content, the surest first; by the names that file systems give it.
_MARKS = (
    "ETag", "etag", "generation", "blob_id", "oid", "md5Hash", "content_md5", "Content-MD5", "checksum", "sha256",
    "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "modified", "created",
)  # fmt: skip


class About(NamedTuple):
    """Size in bytes (None: it can't be read in parts), stamp as `10871-5f3a`; whether it is a folder or a page of HTML."""

    size: int | None
    stamp: str
    is_folder: bool


# By process: when it forks other threads may hold locks, and event loops do not live on in its child. The file systems of a
# parent are kept there, since to close them would disturb its connections.
_turns: dict[int, threading.Lock] = {}
_file_systems: dict[tuple[int, str], Any] = {}


def _request(address: str, once: Callable[[Any], T], *, answered: bool = False) -> T:
    """Return what `once` gets from the file system of an address, by the retry policy; raises as `retry`."""
    return retry(address, lambda: once(_file_system(address)), answered=answered)


def _file_system(address: str) -> Any:
    """Return the file system of a server or bucket, shared by all threads of this process."""
    key = (os.getpid(), host_of(address))
    if key not in _file_systems:
        from fsspec.config import conf
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations, registry

        scheme, first = scheme_of(address), address.partition("::")[0]
        if "::" in address and "://" not in first:
            raise InputError(f"leave out {first}:: of {shown(address)}: parts of remote files are kept anyway")
        known = {*known_implementations, *registry}
        if scheme not in known:
            raise InputError(f"{scheme}:// is no known kind of address{did_you_mean(scheme, known)}")
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        if is_web(address):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
            given = dict(conf.get(scheme, {}).get("client_kwargs", {}))  # The user's.
            # Bytes as they are stored: ranges of what is compressed on the way would mean nothing.
            headers = {"Accept-Encoding": "identity", **given.pop("headers", {})}
            usual = {"timeout": limits, "trust_env": True, "auto_decompress": False, "headers": headers}
            options["client_kwargs"] = {**usual, **given}
        _file_systems.setdefault(key, url_to_fs(address, **options)[0])
    return _file_systems[key]


def _finish(fs: Any, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` gives in the event loop of `fs`, unless this thread is interrupted or `end_waits` is called."""
    ending = waiting_ends()
    future = asyncio.run_coroutine_threadsafe(work, fs.loop)
    try:
        while not future.done():
            if ending.is_set():
                raise ConnectionLost("stopped while waiting for a server")
            wait([future], timeout=0.5)
        return future.result()
    finally:
        future.cancel()


def _call(fs: Any, name: str, address: str, **options: Any) -> Any:
    """Call a method of a file system; of those that are not asynchronous few are made for threads."""
    path = address if is_web(address) else fs._strip_protocol(address.partition("::")[0])
    if fs.async_impl:
        return _finish(fs, asyncio.wait_for(getattr(fs, f"_{name}")(path, **options), REQUEST_SECONDS))
    with _turns.setdefault(os.getpid(), threading.Lock()):
        return getattr(fs, name)(path, **options)


def _stamp(size: int | None, fields: Mapping[str, Any]) -> str:
    marks = [str(fields[mark]).strip('"') for mark in _MARKS if fields.get(mark)]
    return "-".join([str(size), *marks[:1]])


def _ask(address: str, fs: Any) -> About:
    """Return what a server says of a file."""
    if is_web(address):
        return _finish(fs, _web_part(fs, address, 0, 1, None, bytearray()))
    entry = _call(fs, "info", address)
    return About(entry.get("size"), _stamp(entry.get("size"), entry), entry.get("type") == "directory")


async def _web_part(fs: Any, address: str, first: int, stop: int, stamp: str | None, into: bytearray) -> About:
    """Append bytes of a file that has this stamp to `into`, if any is given; return what its server says of the file.

    By fsspec's session: its own calls hide the headers, and take 403 and 503 for a missing file.
    """
    session = await fs.set_session()
    async with session.get(fs.encode_url(address), headers={"Range": f"bytes={first}-{stop - 1}"}) as response:
        span = re.fullmatch(r"bytes\s+(?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", "").strip())
        if response.status != 416:  # There are no such bytes: it is empty, or shorter now.
            response.raise_for_status()
        empty = response.status == 416 or response.content_length == 0
        size = int(span[2]) if span is not None else 0 if empty else None
        about = About(size, _stamp(size, response.headers), response.content_type == "text/html")
        if stamp is None:
            return about
        _check(address, stamp, about)
        if span is None or span[1] != str(first):
            raise OSError("the server sent another part than was asked for")
        async for piece in response.content.iter_any():  # What comes before an error is kept.
            into += piece
        return about


def _check(address: str, stamp: str, about: About) -> None:
    """Raise InputError unless this is a file of that stamp of which parts can be read."""
    if about.is_folder:
        raise NotThere(f"{shown(address)} is a folder or a web page, not a file")
    if about.size is None:
        raise InputError(
            f"{shown(address)} can't be read in parts: the server does not support ranges or does not say its size; "
            "download it and give the local file"
        )
    if about.stamp != stamp:
        raise InputError(
            f"{shown(address)} changed while it was in use (it was {stamp}, now it is {about.stamp}); start again when "
            "nothing writes to it any more"
        )


def read_whole(address: str, *, answered: bool = False) -> bytes:
    """Return a whole file; raises as `retry`."""
    content: bytes = _request(address, lambda fs: _call(fs, "cat_file", address), answered=answered)
    return content


class RemoteFile(StoredFile):
    """A file at an address, read in blocks of 4 MiB that a BlockStore keeps; each is fetched once by a process."""

    def __init__(self, address: str, name: str | None = None, *, blocks: BlockStore) -> None:
        """Ask the server about the file; raises as `retry`, and InputError where it can't be read in parts."""
        self.address, self._blocks = address, blocks
        self.name = printable(path_of(address).rpartition("/")[2]) if name is None else name
        about = _request(address, partial(_ask, address))
        _check(address, about.stamp, about)
        self.size, self.stamp = about.size or 0, about.stamp

    def read(self, start: int, length: int) -> bytes:
        """Return bytes as any StoredFile; raises ConnectionLost where the server is gone."""
        stop = min(start + length, self.size)
        parts = []
        for number in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            first = number * BLOCK_BYTES
            key = f"{self.where()}\n{self.stamp}\n{BLOCK_BYTES}\n{number}"
            span = max(start - first, 0), min(stop - first, BLOCK_BYTES)
            parts.append(self._blocks.part(key, *span, partial(self._fetch, first, min(first + BLOCK_BYTES, self.size))))
        return b"".join(parts)

    def where(self) -> str:
        return shown(self.address)

    def now(self) -> str:
        try:
            return _request(self.address, partial(_ask, self.address), answered=True).stamp
        except NotThere:
            return ""

    def _fetch(self, first: int, stop: int) -> bytes:
        content = bytearray()

        def once(fs: Any) -> None:
            begin = first + len(content)
            if is_web(self.address):
                _finish(fs, _web_part(fs, self.address, begin, stop, self.stamp, content))
            else:
                content.extend(_call(fs, "cat_file", self.address, start=begin, end=stop))
                _check(self.address, self.stamp, _ask(self.address, fs))  # Now it is known what these bytes are of.
            if (size := len(content)) != stop - first:
                del content[: 0 if size < stop - first else size]
                raise OSError(f"the server sent {size:,} of {stop - first:,} bytes")

        _request(self.address, once, answered=True)
        return bytes(content)


def open_files(found: Sequence[str], blocks: BlockStore) -> list[StoredFile]:
    """Open the files at addresses; their names are relative to the deepest folder that holds all."""
    names = distinct([printable(name) for name in names_below([path_of(one) for one in found])])
    named = zip(found, names, strict=True)
    return _at_once(lambda pair: RemoteFile(pair[0], pair[1] or shown(pair[0]), blocks=blocks), named)


def find_addresses(address: str, endings: Iterable[str]) -> list[str]:
    """Return the address itself of a file, or those that a pattern or a folder stands for that have one of `endings`.

    A pattern has braces (`part-{000..127}.tar`, `{a,b}`), `*`, `**`, `[...]` and, but in HTTP, `?`. Files of braces are in
    that order, others in that of their names. A folder stands for all files below it.

    Raises:
        InputError: nothing is found.
    """
    wanted = tuple(f".{ending.lower().lstrip('.')}" for ending in endings)
    parts = _at_once(lambda one: _find_one(one, wanted), expand_braces(address))
    found = list(dict.fromkeys(chain.from_iterable(parts)))
    if not found:
        raise InputError(f"nothing was found at {shown(address)}: looked for {endings_of(end[1:] for end in wanted)}")
    return found


def _find_one(address: str, wanted: tuple[str, ...]) -> list[str]:
    """Find the files of one address or pattern without braces."""
    from fsspec.utils import glob_translate

    link, chained, rest = address.partition("::")
    magic = re.search(r"[*\[]" if is_web(address) else r"[*?\[]", link)  # In HTTP, `?` begins a query.
    if magic is None and not link.endswith("/"):
        # A file that is named by itself may be called as it likes.
        if path_of(address).lower().endswith(wanted) or not _request(address, partial(_ask, address)).is_folder:
            return [address]
        link += "/"
    end = link.rindex("/", 0, magic.start() if magic else None) + 1
    pattern = link[end:] or "**"
    try:
        fits = re.compile(glob_translate(path_of(address)) if magic else "")
    except (ValueError, re.error) as error:
        raise InputError(f"{shown(address)} is no pattern: {error}") from error
    found, folders = list[str](), [link[:end] + chained + rest]
    for _ in range(_DEEPEST if "**" in pattern else pattern.count("/") + 1):
        entries = list(chain.from_iterable(_at_once(lambda one: _request(one, partial(_list, one)), folders)))
        found += [one for one, is_folder in entries if not is_folder]
        folders = [one for one, is_folder in entries if is_folder]
    return sorted(one for one in found if fits.match(path_of(one)) and path_of(one).lower().endswith(wanted))


def _list(folder: str, fs: Any) -> list[tuple[str, bool]]:
    """Return the addresses in a folder, and whether each is a folder itself."""
    link, chained, rest = folder.partition("::")
    address_of = str if is_web(folder) else fs.unstrip_protocol
    own = address_of(link if is_web(folder) else fs._strip_protocol(link)).rstrip("/") + "/"
    entries = [(address_of(entry["name"]), entry["type"] == "directory") for entry in _call(fs, "ls", folder, detail=True)]
    return [(one + chained + rest, is_folder) for one, is_folder in entries if one.startswith(own) and one != own]


def _at_once(work: Callable[[Q], T], items: Iterable[Q]) -> list[T]:
    """Return `work` of each item in order; a question to a server is mostly waiting."""
    pool = ThreadPoolExecutor(16, "questions")
    try:
        return list(pool.map(work, items))
    except KeyboardInterrupt:
        end_waits()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
