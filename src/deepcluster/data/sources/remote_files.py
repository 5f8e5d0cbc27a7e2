"""The text of lists and tables of images; images at addresses of their own: a list of these, and one that lies at one.

N images.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from deepcluster.core.errors import InputError, UnreadableImage, did_you_mean
from deepcluster.core.text import count_of, distinct, endings_of, printable
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.names import PackedNames
from deepcluster.data.storage.addresses import host_of, is_address, is_web, names_below, path_of, shown
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.remote import ask, find_addresses
from deepcluster.data.storage.retries import PATIENT, NotAllowed, NotThere, Patience, Refused

TABLES: Final = (".csv", ".tsv")
_PATH_COLUMNS: Final = ("path", "file", "filename", "file_name", "image", "image_path", "name")
_LABEL_COLUMNS: Final = ("label", "class", "target")


class RemoteImages(ImageSource):
    """Image files at addresses of one server, each fetched whole when it is first read; safe to read from many threads.

    What lies at an address is taken as fixed: neither `stamp` nor `changed` asks the server, and what the block store holds
    is not fetched again.
    """

    def __init__(self, labels: Mapping[str, str], details: str, blocks: BlockStore, patience: Patience) -> None:
        """Take N different addresses with their class names ("" = unknown), and what `details` says after their endings."""
        super().__init__(labels.values() if any(labels.values()) else None)
        paths = [path_of(address) for address in labels]
        self._addresses = PackedNames(labels)
        self._names = PackedNames(distinct([printable(path) for path in names_below(paths)[1]]))
        self._details = f"({endings_of(count_endings(paths))}) {details}"
        self._blocks = blocks
        self._patience = patience

    def __len__(self) -> int:
        return len(self._addresses)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file; ConnectionLost where its server is gone, which is no fault of the image."""
        address = self._addresses[index]
        try:
            content = self._blocks.get(
                f"{shown(address)}\nwhole", lambda: ask(address, lambda site: site.whole(address), self._patience)
            )
        except (NotThere, NotAllowed, Refused) as error:
            raise UnreadableImage(str(error)) from error
        return bytes(content)

    def stamp(self, index: int) -> str:
        return shown(self._addresses[index])

    def details(self) -> str:
        return self._details


def open_remote_list(
    file_name: str, pairs: Sequence[tuple[str, str]], notes: Sequence[str], blocks: BlockStore, patience: Patience = PATIENT
) -> ImageSource:
    """Open the images of a list or table, (address, class name or "") each; nothing is asked of their server yet.

    Names are relative to the deepest folder that holds all. Raises InputError where there are none, or where they are
    not all addresses of one server.
    """
    if not pairs:
        raise InputError(f"{file_name} names no images; write the address of one image a line")
    # A list of several servers or buckets, or of addresses and paths, has no root to which names are relative.
    first: dict[str, str] = {}
    times: Counter[str] = Counter()
    labels: dict[str, str] = {}
    for address, label in pairs:
        host = host_of(address) if is_address(address) else "no address"
        first.setdefault(host, address)
        times[host] += 1
        labels.setdefault(address, label)
    if len(times) > 1 or "no address" in times:
        some = [f"{host} {number:,} (such as {shown(first[host])[:100]})" for host, number in times.most_common(5)]
        more = f", and {len(times) - 5:,} others" if len(times) > 5 else ""
        raise InputError(
            f"the images of one list must lie at one server, but {file_name} names {shown(', '.join(some))}{more}; make "
            "a list for each; they can be given together"
        )
    if len(labels) < len(pairs):
        notes = [*notes, f"{count_of(len(pairs) - len(labels), 'repeated line')} skipped"]
    return RemoteImages(labels, ", ".join([f"listed in {file_name}", *notes]), blocks, patience)


def open_list_at(address: str, blocks: BlockStore, patience: Patience = PATIENT) -> ImageSource:
    """Open the images that a list or table at an address names; what is no address is relative to it.

    Raises InputError where it can't be read, and as `open_remote_list`.
    """
    content = ask(address, lambda site: site.whole(address), patience)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(address)} can't be read as UTF-8 text: {error}") from error
    pairs, notes = parse_pairs(text, path_of(address))
    pairs = [(_join(address, path), label) for path, label in pairs]
    return open_remote_list(shown(address), pairs, notes, blocks, patience)


def open_folder_at(address: str, endings: Sequence[str], blocks: BlockStore, patience: Patience = PATIENT) -> ImageSource:
    """Open all images below a folder at an address, or those that a pattern stands for, by name; without labels.

    Raises InputError where there are none.
    """
    found = [one for one, _ in find_addresses(address, endings, patience=patience)]
    return RemoteImages(dict.fromkeys(found, ""), f"at {shown(address)}", blocks, patience)


def count_endings(paths: Iterable[str]) -> Counter[str]:
    """Return how many of the paths have each ending; "" where the name has none."""
    names = (path.rpartition("/")[2] for path in paths)
    return Counter(name.rpartition(".")[2] if "." in name else "" for name in names)


def _join(base: str, path: str) -> str:
    """Return the address of a line in a list at `base`."""
    if is_address(path):
        return path
    link, chained, rest = base.partition("::")
    scheme, _, place = link.partition("://")
    if is_web(base):
        place = place.partition("?")[0].partition("#")[0]
        path = path.replace("#", "%23")
    host, _, own = place.partition("/")
    if chained or host_of(base).endswith("://"):  # There is no host.
        host, own = "", place
    joined = posixpath.normpath(posixpath.join("/", posixpath.dirname(own), path)).lstrip("/")
    return f"{scheme}://{host}{'/' if host else ''}{joined}{chained}{rest}"


def parse_pairs(text: str, file: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the path and the label ("" = unknown) of each line of a list or table, and notes on what was found in it.

    Raises InputError, which calls the table `file`, where it has no column of paths.
    """
    if not file.lower().endswith(TABLES):
        lines = (line.strip() for line in text.split("\n"))
        return [(line, "") for line in lines if line and not line.startswith("#")], []
    header_line = text.partition("\n")[0]
    delimiter = "\t" if file.lower().endswith(".tsv") else max(",;\t", key=header_line.count)
    rows = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        header = [column.strip() for column in next(rows, [])]
        lower = [column.lower() for column in header]
        path_at, label_at = (
            next((lower.index(column) for column in columns if column in lower), None)
            for columns in (_PATH_COLUMNS, _LABEL_COLUMNS)
        )
        if path_at is None:
            found = f"its first line names {', '.join(header)}" if header else "it is empty"
            hint = next(filter(None, (did_you_mean(column, _PATH_COLUMNS) for column in lower)), "")
            raise InputError(f"{file} has no column of image paths: {found}{hint}; name one of the columns path")
        cells = ((_cell(row, path_at), _cell(row, label_at)) for row in rows)
        pairs = [(path, "" if label == "-1" else label) for path, label in cells if path]
    except csv.Error as error:
        raise InputError(f"{file} can't be read as a table: {error}") from error
    classes = len({label for _, label in pairs if label})
    if label_at is None or not classes:
        return pairs, []
    return pairs, [f"{count_of(classes, 'class')} from column {header[label_at]}"]


def _cell(row: list[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""
