"""Where images come from: folders, lists, tables, arrays, tar shards, Parquet, here or at an address, as one collection.

N images. Another kind of data is a module with an opener, and a line in `_Opener._files`.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from deepcluster.core.addresses import expand, host_of, is_address, path_of, shown
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.files import check_file, user_path, usual_cache_folder
from deepcluster.core.names import PackedNames
from deepcluster.core.options import whole_number
from deepcluster.core.retry import tell_troubles_to
from deepcluster.data.sources.arrays import ArraySource
from deepcluster.data.sources.files import IMAGE_ENDINGS, FileSource, count_endings, describe_files
from deepcluster.data.sources.folders import NoImages, open_folder
from deepcluster.data.sources.given import IN_MEMORY, given_data
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.joined import JoinedSource, LimitedSource
from deepcluster.data.sources.lists import open_list
from deepcluster.data.sources.parquet import open_parquet
from deepcluster.data.sources.remote_files import RemoteImages
from deepcluster.data.sources.saved_dataset import is_saved_dataset, open_saved_dataset
from deepcluster.data.sources.scan import HOLDERS, TABLES
from deepcluster.data.sources.shards import open_shards
from deepcluster.data.storage import LocalFile, StoredFile
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.remote import find_addresses, open_files

__all__ = ["ImageSource", "JoinedSource", "LimitedSource", "fingerprint", "name_of", "open_source"]

SUPPORTED = (
    "a folder of images, tar shards or Parquet files, a list (.txt, .lst) or table (.csv, .tsv, .jsonl) of paths, shards "
    "(.tar, .tar.gz), Parquet (.parquet), an array (.npz, .npy), a saved Hugging Face data set, or an address of any but "
    "arrays"
)
LISTS = (".txt", ".lst", *TABLES)
ARRAYS = (".npz", ".npy")
TARS = (".tar", ".tar.gz", ".tgz")
F = TypeVar("F", Path, StoredFile)


def open_source(
    data: Any,
    limit: int | None = None,
    *,
    cache: Path | None = None,
    cache_bytes: int | None = None,
    on_found: Callable[[int], None] = lambda so_far: None,
    on_trouble: Callable[[str], object] | None = None,
) -> ImageSource:
    """Open images, wherever they are (`SUPPORTED`, or several of these), and take `limit` of them spread evenly.

    No image is opened.

    Args:
        data: a path, an address, a pattern of either, or several of these; an image or several in memory (`given_data`).
        limit: number of images; None: all.
        cache: folder for lists, indexes and copies of remote and compressed parts; None: the usual one.
        cache_bytes: bound on these copies; None: 20 GiB, or a quarter of what is free on that disk if that is less.
        on_found: gets the number of images found so far; may raise to stop.
        on_trouble: from now on gets a line when a server does not answer and is tried again; None: as before.

    Raises:
        InputError: nothing is there, nothing is in it, or nothing of a known kind.
    """
    cache = cache or usual_cache_folder()
    if on_trouble is not None:
        tell_troubles_to(on_trouble)
    opener = _Opener(cache, BlockStore(cache / "blocks", cache_bytes), on_found)
    given = given_data(data)
    if isinstance(given, ImageSource):
        source = given
    else:
        some = given if isinstance(given, list) else [given]
        if not some:
            raise InputError(f"no data given; give {SUPPORTED}")
        files = [one for one in some if _is_image_file(one)]
        others = [one for one in some if one not in files] if files else some
        images = [opener.images(files)] if files else []
        source = _joined([*images, *((name_of(one), opener.open(one)) for one in others)])
    if limit is None or whole_number("limit", limit) >= len(source):
        return source
    return LimitedSource(source, int(limit))


def fingerprint(source: ImageSource) -> str:
    """Return 16 hex digits that change with the number, the names and the order of the images."""
    digest = hashlib.sha256(f"{len(source)}{source.content()}".encode())
    names = map(source.name, range(len(source)))
    while some := list(islice(names, 10_000)):
        digest.update(("\0" + "\0".join(some)).encode())
    return digest.hexdigest()[:16]


def name_of(data: str | Path) -> str:
    """Return the name of the folder or file that data is, also where it is given as `..`, `.` or `~`."""
    if is_address(str(data)):
        return path_of(str(data)).rpartition("/")[2] or host_of(str(data))
    return user_path(data).resolve().name or "root"


def _joined(sources: Sequence[tuple[str, ImageSource]]) -> ImageSource:
    return sources[0][1] if len(sources) == 1 else JoinedSource(sources)


@dataclass(frozen=True)
class _Opener:
    """Opens one kind of data after the other, with what they share."""

    cache: Path
    blocks: BlockStore
    on_found: Callable[[int], None]

    def open(self, data: str | Path) -> ImageSource:
        text = str(data)
        if text == IN_MEMORY:
            raise InputError("the images were in the memory of another process: give them again as data")
        if isinstance(data, Path) and not data.exists():  # which makes one slash of the two in an address
            text = re.sub(r"^([A-Za-z][\w+.-]+):/(?!/)", r"\1://", text)
        if is_address(text):
            return self._address(text)
        try:
            paths = [Path(one) for one in expand(os.path.expanduser(text))]  # noqa: PTH111 (it may hold braces)
            if len(paths) == 1:
                return self._path(text, paths[0])
            if any(path.is_dir() for path in paths):
                return _joined([(name_of(path), self._path(str(path), path)) for path in paths])
            return self._files(text, paths)
        except OSError as error:  # No permission on the way there, or a name that is too long.
            raise InputError(f"{data} can't be opened: {(error.strerror or str(error)).lower()}") from error

    def images(self, files: Sequence[str | Path]) -> tuple[str, ImageSource]:
        """Return image files as one source, in their order, with the name of their folder."""
        paths = [os.path.abspath(user_path(one)) for one in files]  # noqa: PTH100 (links keep their names)
        root = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise InputError(f"{twice} is given twice: give each image once")
        for path in paths:
            if not os.path.exists(path):  # noqa: PTH110
                self._path(path, Path(path))  # It says so.
        names = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
        folders = len({os.path.dirname(path) for path in paths})  # noqa: PTH120
        details = describe_files(folders, count_endings(names), [])
        return os.path.basename(root) or "root", FileSource(Path(root), PackedNames(names), None, details)  # noqa: PTH119

    def _path(self, data: str, path: Path) -> ImageSource:
        if path.is_dir():
            if is_saved_dataset(path):
                return open_saved_dataset(path)
            try:
                return open_folder(path, on_found=self.on_found)
            except NoImages as nothing:  # Perhaps there are shards or Parquet files.
                holders = sorted(one for one in map(path.joinpath, nothing.holders) if one.is_file())
                if not holders:
                    raise InputError(str(nothing)) from None
                return self._files(str(path), holders, below=path)
        if not path.exists():
            near = ""
            with suppress(OSError):
                near = did_you_mean(path.name, (other.name for other in islice(path.parent.iterdir(), 1000)))
            raise InputError(f"{data} does not exist{near}; looked in {path.absolute().parent}")
        check_file(path)
        return self._files(data, [path])

    def _files(self, data: str, paths: Sequence[Path], below: Path | None = None) -> ImageSource:
        """Open files: shards of one kind together, each list and each array by itself."""
        images = [path for path in paths if _is_image_file(path)]
        sources: list[tuple[str, ImageSource]] = [self.images(images)] if images else []
        paths = [path for path in paths if not _is_image_file(path)] if images else paths
        for kind, some in _by_kind(paths).items():
            if kind in HOLDERS:
                top = (below or Path(os.path.commonpath([path.absolute().parent for path in some]))).absolute()
                files = [LocalFile(path, path.absolute().relative_to(top).as_posix()) for path in some]
                sources.append((name_of(some[0].parent), self._holders(kind, files, without_ours=below is not None)))
            elif kind in LISTS:
                sources += [(name_of(path), open_list(path, self.blocks)) for path in some]
            elif kind in ARRAYS:
                sources += [(name_of(path), ArraySource(path)) for path in some]
            else:
                raise InputError(f"{data}: files ending in {kind or 'nothing'} are not known as data; give {SUPPORTED}")
        return _joined(sources)

    def _address(self, address: str) -> ImageSource:
        name = path_of(address).lower()
        if name.endswith(LISTS):
            return open_list(address, self.blocks)
        if name.endswith(ARRAYS):
            raise InputError(f"{address}: arrays are read from this machine only; copy the file here")
        found = find_addresses(address, [*HOLDERS, *IMAGE_ENDINGS])
        holders = [one for one in found if path_of(one).lower().rpartition(".")[2] not in IMAGE_ENDINGS]
        if not holders:
            return RemoteImages(dict.fromkeys(found, ""), f"at {shown(address)}", self.blocks)
        kinds = sorted(_by_kind(open_files(holders, self.blocks)).items())
        return _joined([(name_of(address), self._holders(kind, files)) for kind, files in kinds])

    def _holders(self, kind: str, files: Sequence[StoredFile], *, without_ours: bool = False) -> ImageSource:
        if kind == ".parquet":
            return open_parquet(files, on_found=self.on_found, without_ours=without_ours)
        return open_shards(files, cache=self.cache, on_found=self.on_found)


def _is_image_file(one: str | Path) -> bool:
    """Return whether this names one image file on this machine, which may be missing."""
    path = user_path(one)
    if path.suffix.lower()[1:] not in IMAGE_ENDINGS or is_address(str(one)) or path.is_dir():
        return False
    return path.is_file() or not set("*?[{") & set(str(one))


def _by_kind(files: Iterable[F]) -> dict[str, list[F]]:
    """Group files by their endings; `.tar` stands for all kinds of tar."""
    kinds: dict[str, list[F]] = {}
    for file in files:
        name = file.name.lower()
        kinds.setdefault(".tar" if name.endswith(TARS) else os.path.splitext(name)[1], []).append(file)  # noqa: PTH122
    return kinds
