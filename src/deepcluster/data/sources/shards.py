"""Images in tar files: one of them, or the many shards of a large collection.

N images. A tar file is read once from front to back to find its images; after that, each is one read at a known place.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.text import count_of, distinct, endings_of, printable
from deepcluster.data.sources.files import IMAGE_ENDINGS
from deepcluster.data.sources.folders import class_runs
from deepcluster.data.sources.image_source import ImageSource, place_of
from deepcluster.data.sources.tar_index import TarIndex, index_tar
from deepcluster.data.sources.unpacked import UnpackedFile, unpack
from deepcluster.data.storage import LocalFile, StoredFile, digest

# In 20 µs, the time of opening a file, 64 KiB come from the memory of the system; in 40 ms, that of a request, about
# 4 MiB come over the network. Members below half a piece are not hopped over.
_LOCAL_PIECE: Final = 128 << 10
_REMOTE_PIECE: Final = 8 << 20
_AT_ONCE: Final = 8
_NAMED: Final = 3


@dataclass(frozen=True)
class _Shard:
    """A tar file: as it was given, and what its images are read from."""

    file: StoredFile
    content: StoredFile
    index: TarIndex


class ShardSource(ImageSource):
    """Images in tar files, in the order of the files and of their members."""

    def __init__(self, shards: Sequence[_Shard]) -> None:
        """Take shards with at least one image in all."""
        self._files = [shard.file for shard in shards]
        self._contents = [shard.content for shard in shards]
        self._names = distinct([printable(file.name) for file in self._files])
        self._ends = list(accumulate(len(shard.index.images) for shard in shards))
        images = pa.concat_tables([shard.index.images for shard in shards])
        self._inner_names = _one_piece(images["name"])
        self._starts_N, self._lengths_N = (_one_piece(images[column]).to_numpy() for column in ("start", "length"))
        labels, self._label_note = _labels(shards, images["name"])
        self._notes = _notes(shards)
        super().__init__(labels)

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        return f"{self._names[place_of(index, self._ends)[0]]}::{self._inner_names[index].as_py()}"

    def read(self, index: int) -> bytes:
        shard, _ = place_of(index, self._ends)
        start, length = int(self._starts_N[index]), int(self._lengths_N[index])
        if not length:
            return b""
        try:
            content = self._contents[shard].read(start, length)
        except InputError as error:
            raise UnreadableImage(str(error)) from error
        if len(content) < length:
            raise UnreadableImage(
                f"{self._names[shard]} has been cut short: it holds {len(content):,} of an image's {length:,} bytes"
            )
        return content

    def stamp(self, index: int) -> str:
        return f"{self._files[place_of(index, self._ends)[0]].stamp}:{self._starts_N[index]}"

    def changed(self) -> str | None:
        changes = []
        for name, file in zip(self._names, self._files, strict=True):
            now = file.now()
            if now != file.stamp:
                changes.append(f"{name} has changed" if now else f"{name} is gone")
        return _first_of(changes) or None

    def details(self) -> str:
        return ", ".join(note for note in (self._notes[0], self._label_note, *self._notes[1:]) if note)


def open_shards(files: Sequence[StoredFile], *, cache: Path, on_found: Callable[[int], None] | None = None) -> ImageSource:
    """Open the images of tar files, gzip'd or not, in the order of the files and of their members.

    Where the images lie is found once and kept in `cache`, as is what gzip'd files hold. `on_found` gets the number of
    images found so far; it may raise to stop, and what was found by then stays kept.
    Raises InputError where a file is no tar or nothing of it can be read, or where there are no images.
    """
    shards: list[_Shard] = []
    found = 0

    def tell(more: int) -> None:
        if on_found:
            on_found(found + more)

    with closing(_opened(files, cache, tell)) as opened:
        for shard in opened:
            shards.append(shard)
            found += len(shard.index.images)
            tell(0)
    if not found:
        others = sum((shard.index.others for shard in shards), Counter[str]())
        held = f"found only {endings_of(others)}" if others else "they are empty" if len(files) > 1 else "it is empty"
        where = _first_of([file.where() for file in files]) or "no tar file"
        raise InputError(f"{where}: no images; looked for {endings_of(IMAGE_ENDINGS)}; {held}")
    return ShardSource(shards)


def _opened(files: Sequence[StoredFile], cache: Path, tell: Callable[[int], None]) -> Generator[_Shard, None, None]:
    """Open one file after the other, remote ones several at once; `tell` gets the number of images in the present one."""
    if all(isinstance(file, LocalFile) for file in files):
        yield from (_open_shard(file, cache, tell) for file in files)
        return
    stopped = threading.Event()

    def stop_if_told(more: int) -> None:
        if stopped.is_set():
            raise CancelledError

    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield from pool.map(lambda file: _open_shard(file, cache, stop_if_told), files)
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _open_shard(file: StoredFile, cache: Path, tell: Callable[[int], None]) -> _Shard:
    path = cache / "shards" / digest(file.where())
    index = TarIndex.kept(path, file)
    is_packed = index.packed if index else file.size > 1 and file.read(0, 2) == b"\x1f\x8b"
    content = unpack(file, cache, lambda: tell(0)) if is_packed else file
    if index is None:
        if isinstance(content, UnpackedFile) and content.problem and not content.size:
            raise InputError(f"{content.where()} {content.problem}: nothing of it can be unpacked; download it again")
        is_local = isinstance(content, LocalFile | UnpackedFile)
        index = index_tar(content, _LOCAL_PIECE if is_local else _REMOTE_PIECE, tell)
        index.packed = isinstance(content, UnpackedFile)
        if isinstance(content, UnpackedFile) and content.problem == "is damaged" and not index.problem:
            index.problem = "is damaged, so some of its images may be spoiled"
        index.keep(path, file)
    return _Shard(file, content, index)


def _one_piece(column: pa.ChunkedArray) -> pa.Array:
    """Return a column in one piece of memory, where a place in it is found at once."""
    pieces = column.combine_chunks()
    return pieces if isinstance(pieces, pa.Array) else pa.concat_arrays(pieces.chunks)


def _labels(shards: Sequence[_Shard], names: pa.ChunkedArray) -> tuple[Iterable[str] | None, str]:
    """Return the class of each image ("" = unknown; None = of all), and a remark for `details`.

    From .cls and .json members where there are any, else from folders in all shards together.
    """
    classes = {name for shard in shards for name in shard.index.classes}
    if classes:
        note = f"labels from {count_of(len(classes), 'class')} (.cls or .json members; used for diagnostics only)"
        # -1, unknown, is the last one.
        named = ((np.array([*each.index.classes, ""], object), each.index.images["label"]) for each in shards)
        return chain.from_iterable(names[labels.to_numpy()].tolist() for names, labels in named), note
    # The rule for folders goes by sorted names; of the images in one folder, one stands for all.
    folders = pc.replace_substring_regex(names, r"[^/]*$", "x").dictionary_encode().unify_dictionaries()
    distinct = folders.chunk(0).dictionary.to_pylist()
    runs = class_runs(sorted(distinct))
    if runs is None:
        return None, ""
    class_of = dict(zip(sorted(distinct), (label for label, count in runs for _ in range(count)), strict=True))
    by_number = [class_of[folder] for folder in distinct]
    note = f"labels from {count_of(len(set(by_number)), 'class folder')} (used for diagnostics only)"
    return (by_number[place] for chunk in folders.chunks for place in chunk.indices.to_numpy().tolist()), note


def _notes(shards: Sequence[_Shard]) -> list[str]:
    """Say what was found and what was skipped."""
    indexes = [shard.index for shard in shards]
    endings, others = Counter[str](), Counter[str]()
    for index in indexes:
        endings.update(index.endings)
        others.update(index.others)
    notes = [f"in {count_of(len(shards), 'tar shard')} ({endings_of(endings)})"]
    if others:
        notes.append(f"{count_of(others.total(), 'other member')} skipped ({endings_of(others)})")
    if links := sum(index.links for index in indexes):
        notes.append(f"{count_of(links, 'link')} or special file{'' if links == 1 else 's'} skipped")
    if repeated := sum(index.repeated for index in indexes):
        notes.append(f"{count_of(repeated, 'repeated name')} numbered")
    named = list(zip(indexes, (printable(shard.file.name) for shard in shards), strict=True))
    notes.append(_first_of([f"{name} {index.problem}" for index, name in named if index.problem]))
    if empty := sum(not len(index.images) for index in indexes):
        notes.append(f"{count_of(empty, 'shard')} without images")
    temporary = [shard for shard in shards if isinstance(shard.content, UnpackedFile) and shard.content.is_temporary]
    if temporary:
        notes.append(f"{count_of(len(temporary), 'shard')} unpacked for this time only: the cache can't be written to")
    return notes


def _first_of(texts: Sequence[str]) -> str:
    """Join the first few of many texts."""
    rest = len(texts) - _NAMED
    return ", ".join([*texts[:_NAMED], *repeat(f"and {count_of(rest, 'other')}", rest > 0)])
