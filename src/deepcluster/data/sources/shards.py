"""Images in tar files: one of them, or the many shards of a large collection.

N images. A tar file is read once from front to back to find its images; after that, each is one read at a known place.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.files import digest, locked
from deepcluster.core.text import count_of, distinct, endings_of, printable
from deepcluster.data.sources.class_folders import class_folders
from deepcluster.data.sources.files import IMAGE_ENDINGS
from deepcluster.data.sources.image_source import ImageSource, place_of
from deepcluster.data.sources.tar_index import TarIndex, index_tar
from deepcluster.data.sources.unpacked import UnpackedFile, unpack
from deepcluster.data.storage import LocalFile, StoredFile

_Shard = tuple[StoredFile, TarIndex]  # What the images of a tar file are read from, and where they lie there.
# In 20 µs, the time of opening a file, 64 KiB come from the memory of the system; in 40 ms, that of a request, about
# 4 MiB come over the network. Members below half a piece are not hopped over.
_LOCAL_PIECE = 128 << 10
_REMOTE_PIECE = 8 << 20
_AT_ONCE = 8
_NAMED = 3


class ShardSource(ImageSource):
    """Images in tar files, in the order of the files and of their members."""

    def __init__(self, shards: Sequence[_Shard]) -> None:
        """Take shards with at least one image in all."""
        self._files = [file for file, _ in shards]
        self._names = distinct([printable(file.name) for file in self._files])
        self._ends = list(accumulate(len(index.images) for _, index in shards))
        images = pa.concat_tables([index.images for _, index in shards]).unify_dictionaries().combine_chunks()
        self._inner_names = images["name"].chunk(0)
        self._starts_N, self._lengths_N, self._crcs_N = (images[key].to_numpy() for key in ("start", "length", "crc"))
        labels, label_note = _labels(self._inner_names, images["label"].chunk(0))
        kinds, *notes = _notes(shards)
        self._details = ", ".join([kinds, *label_note, *notes])
        super().__init__(labels)

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        return f"{self._names[place_of(index, self._ends)[0]]}::{self._inner_names[index].as_py()}"

    def read(self, index: int) -> bytes:
        shard, _ = place_of(index, self._ends)
        file = self._files[shard]
        start, length = int(self._starts_N[index]), int(self._lengths_N[index])
        if not length:
            return b""
        try:
            if isinstance(file, UnpackedFile):
                return file.read_checked(start, length, self._crcs_N[index])
            found = file.read(start, length)
        except InputError as error:
            raise UnreadableImage(str(error)) from error
        if len(found) < length:
            held = f"holds {len(found):,} of an image's {length:,} bytes"
            raise UnreadableImage(f"{self._names[shard]} has been cut short: it {held}")
        return found

    def stamp(self, index: int) -> str:
        return f"{self._files[place_of(index, self._ends)[0]].stamp}:{self._starts_N[index]}"

    def holder(self, index: int) -> str:
        return self._files[place_of(index, self._ends)[0]].where()

    def changed(self) -> str | None:
        stamps = [(name, file.stamp, file.now()) for name, file in zip(self._names, self._files, strict=True)]
        changes = [f"{name} {'has changed' if now else 'is gone'}" for name, was, now in stamps if now != was]
        return _first_of(changes) or None

    def details(self) -> str:
        return self._details


def open_shards(
    files: Sequence[StoredFile], *, cache: Path, on_found: Callable[[int], None] = lambda so_far: None
) -> ImageSource:
    """Open the images of tar files, gzip'd or not, in the order of the files and of their members.

    The positions of the images are found once and kept in `cache`, as is what gzip'd files hold. `on_found` gets the number
    of images found so far; it may raise to stop, and what was found by then stays kept.
    Raises InputError where a file is no tar or nothing of it can be read, or where there are no images.
    """
    shards: list[_Shard] = []
    found = 0
    stopped = threading.Event()
    are_local = all(isinstance(file, LocalFile) for file in files)

    def report(more: int) -> None:
        if stopped.is_set():
            raise CancelledError
        if are_local:  # Else several are opened at once, and only whole ones are counted.
            on_found(found + more)

    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        for shard in (map if are_local else pool.map)(lambda file: _open_shard(file, cache, report), files):
            shards.append(shard)
            found += len(shard[1].images)
            on_found(found)
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
    if not found:
        others = sum((index.others for _, index in shards), Counter[str]())
        held = f"found only {endings_of(others)}" if others else "they are empty" if len(files) > 1 else "it is empty"
        where = _first_of([file.where() for file in files]) or "no tar file"
        raise InputError(f"{where}: no images; looked for {endings_of(IMAGE_ENDINGS)}; {held}")
    return ShardSource(shards)


def _open_shard(file: StoredFile, cache: Path, report: Callable[[int], None]) -> _Shard:
    kept = cache / "shards" / digest(file.where())
    index = TarIndex.load(kept, file)
    if index and index.unpacked_bytes is None:
        return file, index
    with locked(kept):
        index = TarIndex.load(kept, file)  # Perhaps another process has just made it.
        content = file
        if index.unpacked_bytes is not None if index else file.size and file.read(0, 2) == b"\x1f\x8b":
            # A copy is trusted only with its index, which holds the checksums.
            content = unpack(file, cache / "unpacked", index.unpacked_bytes if index else None, lambda: report(0))
        if index is None:
            is_unpacked = isinstance(content, UnpackedFile)
            piece = _LOCAL_PIECE if is_unpacked or isinstance(file, LocalFile) else _REMOTE_PIECE
            index = index_tar(content, piece, report, is_unpacked=is_unpacked)
            if isinstance(content, UnpackedFile) and content.problem == "is damaged" and not index.problem:
                index.problem = "is damaged, so some of its images may be spoiled"
            index.save(kept, file)
    return content, index


def _labels(names_N: pa.Array, labels_N: pa.DictionaryArray) -> tuple[np.ndarray | None, list[str]]:
    """Return the class of each image ("" = unknown; None = of all), and a remark for `details`.

    From .cls and .json members where there are any, else from the folders of all shards together.
    """
    if labels_N.null_count < len(labels_N):
        classes = labels_N.dictionary.to_pylist()
        note = f"labels from {count_of(len(classes), 'class')} (.cls or .json members; used for diagnostics only)"
    else:
        labels_N = pc.replace_substring_regex(names_N, r"[^/]*$", "").dictionary_encode()
        class_of = class_folders(labels_N.dictionary.to_pylist())
        if class_of is None:
            return None, []
        classes = list(class_of.values())
        note = f"labels from {count_of(len(set(classes) - {''}), 'class folder')} (used for diagnostics only)"
    return np.array([*classes, ""], object)[labels_N.indices.fill_null(-1).to_numpy()], [note]


def _notes(shards: Sequence[_Shard]) -> list[str]:
    """Return what was found and what was skipped, in words."""
    indexes = [index for _, index in shards]
    endings = sum((index.endings for index in indexes), Counter[str]())
    others = sum((index.others for index in indexes), Counter[str]())
    links = sum(index.links for index in indexes)
    repeated = sum(index.repeated for index in indexes)
    problems = [f"{printable(file.name)} {index.problem}" for file, index in shards if index.problem]
    empty = sum(not len(index.images) for index in indexes)
    temporary = sum(isinstance(file, UnpackedFile) and file.is_temporary for file, _ in shards)
    notes = {
        f"in {count_of(len(shards), 'tar shard')} ({endings_of(endings)})": True,
        f"{count_of(others.total(), 'other member')} skipped ({endings_of(others)})": others,
        f"{count_of(links, 'link')} or special file{'' if links == 1 else 's'} skipped": links,
        f"{count_of(repeated, 'repeated name')} numbered": repeated,
        _first_of(problems): problems,
        f"{count_of(empty, 'shard')} without images": empty,
        f"{count_of(temporary, 'shard')} unpacked for this time only: the cache can't be written to": temporary,
    }
    return [note for note, applies in notes.items() if applies]


def _first_of(texts: Sequence[str]) -> str:
    """Join the first few of many texts."""
    rest = len(texts) - _NAMED
    return ", ".join([*texts[:_NAMED], *[f"and {count_of(rest, 'other')}"] * (rest > 0)])
