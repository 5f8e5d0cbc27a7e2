"""Remote files: found by address or pattern, and read in blocks that are kept on the disk."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

import pyarrow as pa

from deepcluster.core.errors import DeepClusterError, InputError
from deepcluster.core.text import distinct, endings_of, printable
from deepcluster.data.storage import StoredFile
from deepcluster.data.storage.addresses import expand, expand_braces, is_address, names_below, path_of, pattern_start, shown
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.faults import ShortAnswer, judge
from deepcluster.data.storage.retries import PATIENT, ConnectionLost, NotThere, Patience, end_waits, insist, plain_error
from deepcluster.data.storage.transfers import About, NoParts, Site, site_of

__all__ = ["ConnectionLost", "Patience", "RemoteFile", "end_waits", "expand", "find_addresses", "find_files", "is_address"]

T = TypeVar("T")
Q = TypeVar("Q")
# A request takes some 50 ms before the first byte comes, and a connection gives 50 to 100 MB/s after that: at 4 MiB about as
# long for the bytes as for the wait, and threads hide the rest. Twice as large would waste twice as much where images are
# read here and there in a large file, and only gain a quarter in speed.
BLOCK_BYTES: Final = 4 << 20
_QUESTIONS_AT_ONCE: Final = 16
_DEEPEST: Final = 32


class RemoteFile(StoredFile):
    """One file at an address, read in blocks of 4 MiB that a BlockStore keeps; safe to read from many threads.

    Each block is fetched once, whoever wants it. Of a server that gives no parts of files the whole file is fetched, in
    blocks, when the first one is wanted. Reading raises InputError where the file is gone or changed, and
    ConnectionLost where the server is gone.
    """

    def __init__(
        self,
        address: str,
        name: str | None = None,
        *,
        blocks: BlockStore,
        patience: Patience = PATIENT,
        about: About | None = None,
    ) -> None:
        """Take its address, its name for people, and what is known of it, else its server is asked.

        Raises InputError where there is no such file, and ConnectionLost.
        """
        self.address = address
        self.name = printable(path_of(address).rpartition("/")[2]) if name is None else name
        self._blocks = blocks
        self._patience = patience
        self._about = about or ask(address, lambda site: site.about(address), self._patience)
        if self._about.size is None:
            raise InputError(
                f"{shown(address)} can't be read in parts: its server does not say how large it is; download it, and give "
                "the local file"
            )
        self.size = self._about.size
        self.stamp = self._about.stamp
        self._by_parts = self._about.by_parts
        self._whole_lock = threading.Lock()

    def read(self, start: int, length: int) -> bytes:
        stop = min(start + length, self.size)
        parts = []
        for number in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            first = number * BLOCK_BYTES
            parts.append(self._part(number, max(start - first, 0), min(stop - first, BLOCK_BYTES)))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def where(self) -> str:
        return shown(self.address)

    def now(self) -> str:
        try:
            about = ask(self.address, lambda site: site.about(self.address), self._patience)
        except NotThere:
            return ""
        return self.stamp if self._about.same(about) else about.stamp

    def _key(self, number: int) -> str:
        return f"{self.where()}\n{self.stamp}\n{BLOCK_BYTES}\n{number}"

    def _part(self, number: int, start: int, stop: int) -> bytes:
        if self._by_parts:
            try:
                return self._blocks.part(self._key(number), start, stop, partial(self._fetch, number))
            except NoParts:
                self._by_parts = False
        return memoryview(self._block_of_whole(number))[start:stop].tobytes()

    def _fetch(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        size = min(BLOCK_BYTES, self.size - start)
        content = bytearray()

        def once(site: Site) -> None:
            if len(content) < size:
                site.part(self.address, self._about, start, content, size)

        ask(self.address, once, self._patience, lambda: len(content))
        return bytes(content)

    def _block_of_whole(self, number: int) -> pa.Buffer:
        """Return a block of a file that can only be fetched whole, and keep the others."""
        found = self._blocks.find(self._key(number))
        if found is None:
            with self._whole_lock:
                found = self._blocks.find(self._key(number))
                if found is None:
                    # The blocks used longest ago go when seven eighths of the bound are full.
                    if self.size > self._blocks.room // 4 * 3:
                        held = f"the cache in {self._blocks.folder} may hold {self._blocks.room:,} bytes"
                        raise InputError(
                            f"{self.where()} has {self.size:,} bytes and must be fetched whole: its server gives no parts; "
                            f"{self._blocks.complaint or held}; "
                            "download it and give the local file, or set DEEPCLUSTER_CACHE to a folder with more room"
                        )
                    found = ask(self.address, partial(self._fetch_whole, number), self._patience)
        return found

    def _fetch_whole(self, wanted: int, site: Site) -> pa.Buffer:
        found, arrived = None, 0
        for number, piece in enumerate(site.pieces(self.address, self._about, BLOCK_BYTES)):
            arrived += len(piece)
            if len(piece) < min(BLOCK_BYTES, self.size - number * BLOCK_BYTES) or arrived > self.size:
                break
            block = self._blocks.get(self._key(number), partial(bytes, piece))
            found = block if number == wanted else found
        if arrived != self.size or found is None:
            raise ShortAnswer(f"the server sent {arrived:,} of {self.size:,} bytes")
        return found


def ask(address: str, once: Callable[[Site], T], patience: Patience, progress: Callable[[], int] = lambda: 0) -> T:
    """Return what `once` gets from the site of `address`; tried again as `retries.insist` does."""
    try:
        site = site_of(address)
    except DeepClusterError:
        raise
    except Exception as error:
        raise plain_error(address, judge(error), 1, 0.0, new=True) from error
    return insist(site.connection, address, partial(once, site), patience, progress)


def find_files(
    address: str, endings: Sequence[str], *, blocks: BlockStore, patience: Patience = PATIENT
) -> list[StoredFile]:
    """Open the file at an address, those that a pattern stands for, or all below a folder that have one of `endings`.

    A pattern has braces (`part-{000..127}.tar`, `{a,b}`), `*`, `**`, `[...]` and, but in HTTP, `?`. The files of braces
    are in that order, others in that of their names; names are relative to the deepest folder that holds all. Raises
    InputError where nothing is found, or where a file that is named is not there.
    """
    found = find_addresses(address, endings, patience=patience)
    names = distinct([printable(name) for name in names_below([path_of(each) for each, _ in found])[1]])

    def open_one(each: tuple[tuple[str, About | None], str]) -> StoredFile:
        (one, about), name = each
        return RemoteFile(one, name or shown(one), blocks=blocks, patience=patience, about=about)

    return _at_once(open_one, zip(found, names, strict=True))


def find_addresses(address: str, endings: Sequence[str], *, patience: Patience = PATIENT) -> list[tuple[str, About | None]]:
    """Return the addresses that `find_files` opens, with what the listing says of each."""
    wanted = tuple(f".{ending.lower().lstrip('.')}" for ending in endings)
    found: dict[str, About | None] = {}
    parts = _at_once(lambda one: _find_one(one, wanted, patience), expand_braces(address))
    for part in parts:
        found.update(part)
    if not found:
        raise InputError(f"nothing was found at {shown(address)}: looked for {endings_of(end[1:] for end in wanted)}")
    return list(found.items())


def _find_one(address: str, wanted: tuple[str, ...], patience: Patience) -> dict[str, About | None]:
    """Find the files of one address or pattern without braces."""
    if pattern_start(address) is not None:
        found = _matches(address, patience)
    elif address.endswith("/"):
        found = _below(address, None, patience)
    else:

        def about_file(site: Site) -> About | None:
            with suppress(IsADirectoryError):
                return site.about(address)
            return None

        about = ask(address, about_file, patience)
        # Servers show a page for a folder; and a file that is named by itself may be called as it likes.
        if about is not None and not (about.page and not path_of(address).lower().endswith(wanted)):
            return {address: about}
        return _find_one(address + "/", wanted, patience)
    return {one: about for one, about in sorted(found.items()) if path_of(one).lower().endswith(wanted)}


def _below(address: str, depth: int | None, patience: Patience) -> dict[str, About | None]:
    """Find all files in a folder and in `depth` levels of folders in all; a web server is asked page by page."""
    found, folders = ask(address, lambda site: site.below(address, depth), patience)
    left = (_DEEPEST if depth is None else depth) - 1  # A link to a folder above is a round in circles.
    for folder in folders if left > 0 else ():
        found |= _below(folder, left, patience)
    return found


def _matches(pattern: str, patience: Patience) -> dict[str, About | None]:
    from fsspec.utils import glob_translate

    link, chained, rest = pattern.partition("::")
    folder = link[: link.rindex("/", 0, pattern_start(pattern)) + 1]
    inner = link[len(folder) :]
    depth = None if "**" in inner else inner.count("/") + 1
    below = f"{folder}{chained}{rest}"
    found = _below(below, depth, patience)
    try:
        fits = re.compile(glob_translate(path_of(pattern)))
    except (ValueError, re.error) as error:
        raise InputError(f"{shown(pattern)} is no pattern: {error}") from error
    return {one: about for one, about in found.items() if fits.match(path_of(one))}


def _at_once(work: Callable[[Q], T], items: Iterable[Q]) -> list[T]:
    """Return `work` of each item in order; a question to a server is mostly waiting."""
    pool = ThreadPoolExecutor(_QUESTIONS_AT_ONCE, "questions")
    try:
        return list(pool.map(work, items))
    except KeyboardInterrupt:
        end_waits()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# TEMPORARY until the storage branch is merged.
def waiting_ends() -> threading.Event:
    from deepcluster.data.storage.retries import ending

    return ending()


def tell_troubles_to(tell: Callable[[str], None]) -> None:
    pass
