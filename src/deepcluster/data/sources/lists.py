"""Lists and tables of images: files on this machine or at addresses, named by a file on this machine or at an address."""

import csv
import io
import os
import posixpath
import re
from pathlib import Path

from deepcluster.core.addresses import host_of, is_address, is_web, path_of, shown
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.files import read_regular
from deepcluster.core.kinds import stand_in
from deepcluster.core.names import PackedNames
from deepcluster.core.text import count_of
from deepcluster.data.sources.files import FileSource, count_endings, describe_files
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.remote_files import RemoteImages
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.remote import read_whole

_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "name")
_LABEL_COLUMNS = ("label", "class", "target")
_CHECK_ALL = 10_000
_CHECK_SAMPLE = 1_000
_MISSING_SHARE = 0.1


def open_list(place: str | Path, blocks: BlockStore) -> ImageSource:
    """Open the images that a list or a table (.csv, .tsv) names, in that order.

    A list has one image per line, and lines that start with # are comments; a table has a header line, and labels if it has
    a column of them. Paths are relative to the folder of the list; nothing is asked of servers of images yet.

    Args:
        place: the path of the list, or its address (str).
        blocks: where remote images are kept.

    Raises:
        InputError: it has no column of paths, names no images or images in several places, or more than a tenth are missing.
    """
    at = place if isinstance(place, str) else None
    file = shown(str(place))
    try:
        content = read_whole(place) if isinstance(place, str) else read_regular(place)
        if found := stand_in(content):
            raise InputError(f"{file} is not a list of images: it is {found}")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file} can't be read: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} can't be read as UTF-8 text: {error}") from error
    pairs, notes = parse_pairs(text, file if at is None else path_of(at))
    if not pairs:
        raise InputError(f"{file} names no images; write the path or address of one image per line")
    paths = [path if at is None else _join(at, path) for path, _ in pairs]
    hosts: dict[str, list[str]] = {}
    for path in paths:
        hosts.setdefault(host_of(path) if "://" in path and is_address(path) else "", []).append(path)
    if len(hosts) > 1:  # These have no root to which names are relative.
        ranked = sorted(hosts.items(), key=lambda item: -len(item[1]))
        some = [f"{host or 'this machine'} {len(one):,} (such as {shown(one[0])[:100]})" for host, one in ranked[:5]]
        more = f", and {len(hosts) - 5:,} others" if len(hosts) > 5 else ""
        raise InputError(
            f"the images of one list must be in one place, but {file} names {shown(', '.join(some))}{more}; "
            "make a list for each; they can be given together"
        )
    root = None
    if "" in hosts:
        root, paths = _below_one_root(Path(place), paths)
    labels: dict[str, str] = {}
    for path, (_, label) in zip(paths, pairs, strict=True):
        labels.setdefault(path, label)
    if len(labels) < len(pairs):
        notes.append(f"{count_of(len(pairs) - len(labels), 'repeated line')} skipped")
    notes.insert(0, f"listed in {file if at else Path(place).name}")
    if root is None:
        return RemoteImages(labels, ", ".join(notes), blocks)
    details = describe_files(len({path.rpartition("/")[0] for path in labels}), count_endings(labels), notes)
    return FileSource(root, PackedNames(labels), labels.values() if any(labels.values()) else None, details)


def _below_one_root(file: Path, paths: list[str]) -> tuple[Path, list[str]]:
    """Return a folder that holds all images, the list's own if it does, and their paths relative to it.

    Raises InputError if more than a tenth of a sample is missing; fewer are reported as they are read.
    """
    base = file.absolute().parent
    full = [os.path.normpath(os.path.join(base, path)) for path in paths]  # noqa: PTH118 (pathlib takes 5 times as long)
    count = len(paths) if len(paths) <= _CHECK_ALL else _CHECK_SAMPLE
    sample = [index * len(paths) // count for index in range(count)]
    # Unlike `Path.exists`, this is False for what can't be a path at all, such as a line of prose.
    missing = [paths[index] for index in sample if not os.path.exists(full[index])]  # noqa: PTH110
    if len(missing) > _MISSING_SHARE * count:
        first = ", ".join(path[:100] for path in missing[:3]) + (", ..." if len(missing) > 3 else "")
        # As in the lists that come with ImageNet: `n01440764/a.JPEG 0`.
        hint = "; put labels in a table (.csv) with the columns path,label" if re.search(r"\s\d+$", missing[0]) else ""
        raise InputError(
            f"{len(missing):,} of the {count:,} paths checked in {file} do not exist: {first}; "
            f"paths must be absolute, or relative to the list's folder {base}{hint}"
        )
    root = os.path.normpath(base)
    inside = root.rstrip(os.sep) + os.sep
    if not all(path.startswith(inside) for path in full):
        try:
            root = os.path.commonpath([os.path.dirname(path) for path in full])  # noqa: PTH120
        except ValueError as error:
            raise InputError(f"the images of one list must lie on one drive ({error}); make a list for each") from error
    skip = len(root.rstrip(os.sep)) + 1
    return Path(root), [path[skip:].replace(os.sep, "/") for path in full]


def _join(base: str, path: str) -> str:
    """Return the address of a line in a list at `base`."""
    if is_address(path):
        return path
    link, chained, rest = base.partition("::")
    scheme, _, place = link.partition("://")
    if is_web(base):
        place = re.split("[?#]", place, maxsplit=1)[0]
        path = path.replace("#", "%23")
    host, _, own = place.partition("/")
    if chained or host_of(base).endswith("://"):  # There is no host.
        host, own = "", place
    joined = posixpath.normpath(posixpath.join("/", posixpath.dirname(own), path)).lstrip("/")
    return f"{scheme}://{host}{'/' if host else ''}{joined}{chained}{rest}"


def parse_pairs(text: str, file: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the path and the label ("" = unknown) of each line of a list or table, and notes on what was found in it.

    Raises:
        InputError: the table, called `file`, has no column of paths.
    """
    lines = io.StringIO(text, newline=None)
    if not file.lower().endswith((".csv", ".tsv")):
        stripped = (line.strip() for line in lines)
        return [(line, "") for line in stripped if line and not line.startswith("#")], []
    header_line = text.partition("\n")[0]
    delimiter = "\t" if file.lower().endswith(".tsv") else max(",;\t", key=header_line.count)
    rows = csv.reader(lines, delimiter=delimiter)
    try:
        header = [column.strip() for column in next(rows, [])]
        lower = [column.lower() for column in header]
        path_at = next((lower.index(name) for name in _PATH_COLUMNS if name in lower), -1)  # -1: there is none.
        label_at = next((lower.index(name) for name in _LABEL_COLUMNS if name in lower), -1)
        if path_at < 0:
            found = f"its first line names {', '.join(header)}" if header else "it is empty"
            hint = next(filter(None, (did_you_mean(column, _PATH_COLUMNS) for column in lower)), "")
            raise InputError(f"{file} has no column of image paths: {found}{hint}; name one of the columns path")
        cells = [["".join(row[at : at + 1]).strip() for at in (path_at, label_at)] for row in rows]
    except csv.Error as error:
        raise InputError(f"{file} can't be read as a table: {error}") from error
    pairs = [(path, "" if label == "-1" else label) for path, label in cells if path]
    classes = len({label for _, label in pairs} - {""})
    notes = [f"{count_of(classes, 'class')} from column {header[label_at]}"] if classes else []
    return pairs, notes
