"""Lists and tables of images: files on this machine or at addresses, named by a file on this machine or at an address."""

import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from unicodedata import normalize

from deepcluster.core.addresses import host_of, is_address, is_web, path_of, shown
from deepcluster.core.errors import InputError
from deepcluster.core.files import read_regular
from deepcluster.core.kinds import stand_in
from deepcluster.core.names import PackedNames
from deepcluster.core.text import count_of
from deepcluster.data.sources.files import FileSource, count_endings, describe_files
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.labels import NoLabels, class_names, notes_on
from deepcluster.data.sources.remote_files import RemoteImages
from deepcluster.data.sources.scan import TABLES, scan
from deepcluster.data.sources.text_tables import (
    PATHS,
    decode,
    labelled_lines,
    of_windows,
    pairs_of,
    read_text_table,
)
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.remote import read_whole

_CHECK_ALL = 10_000
_CHECK_SAMPLE = 1_000
_MISSING_SHARE = 0.1
_OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def open_list(place: str | Path, blocks: BlockStore) -> ImageSource:
    """Open the images that a list or a table (.csv, .tsv, .jsonl) names, in that order.

    A list has one image per line, perhaps with a label, and lines that start with # are comments; a table has a line of
    names, and labels if it has a column of them. Paths are relative to the folder of the list; nothing is asked of servers
    of images yet.

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
        text = decode(content, file)
    except OSError as error:
        raise InputError(f"{file} can't be read: {(error.strerror or str(error)).lower()}") from error
    pairs, notes = parse_pairs(text, file if at is None else path_of(at))
    if not pairs:
        raise InputError(f"{file} names no images; write the path or address of one image per line")
    paths = [path if at is None else _join(at, list(_spellings(path))[-1]) for path, _ in pairs]
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
        root, paths, n_found = _below_one_root(Path(place), paths)
        notes += [f"{n_found:,} found by name below the folder of the list"] * bool(n_found)
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


def _below_one_root(file: Path, paths: list[str]) -> tuple[Path, list[str], int]:
    """Return a folder that holds all images, the list's own if it does, and their paths relative to it.

    The last number is that of paths that lack folders or an ending, and were found by name below the folder of the list.
    Raises InputError if more than a tenth of a sample is missing; fewer are reported as they are read.
    """
    base = file.absolute().parent
    count = len(paths) if len(paths) <= _CHECK_ALL else _CHECK_SAMPLE
    sample = [paths[index * len(paths) // count] for index in range(count)]
    places, n_found = _Places(base), 0
    full = [places.of(path) for path in paths]
    # Unlike `Path.exists`, this is False for what can't be a path at all, such as a line of prose.
    missing = [path for path in sample if not os.path.exists(places.of(path))]  # noqa: PTH110
    if missing:
        missing = [path for path in missing if places.spelled(path) is None]
        if len(missing) > _MISSING_SHARE * count:
            missing = [path for path in missing if places.nearby(path) is None]
            if len(missing) > _MISSING_SHARE * count:
                raise InputError(_complaint(file, base, missing, count, places))
            n_found = len(paths)
        for number, path in enumerate(paths):
            there = places.spelled(path)
            if there is None and n_found:
                there = places.nearby(path)
            full[number] = there or full[number]
        n_found = len(places.found)
    root = os.path.normpath(base)
    inside = root.rstrip(os.sep) + os.sep
    if not all(path.startswith(inside) for path in full):
        try:
            root = os.path.commonpath([os.path.dirname(path) for path in full])  # noqa: PTH120
        except ValueError as error:
            raise InputError(f"the images of one list must lie on one drive ({error}); make a list for each") from error
    skip = len(root.rstrip(os.sep)) + 1
    return Path(root), [path[skip:].replace(os.sep, "/") for path in full], n_found


class _Places:
    """Where the files are that a list in the folder `base` names."""

    def __init__(self, base: Path) -> None:
        self.base, self.found, self.is_unclear = base, set[str](), False

    def of(self, path: str) -> str:
        """Return the whole path of a line as it stands."""
        return os.path.normpath(os.path.join(self.base, path))  # noqa: PTH118 (pathlib takes 5 times as long)

    def spelled(self, path: str) -> str | None:
        """Return the whole path of the file that a line names in one of its spellings; None if there is none."""
        places = map(self.of, _spellings(path))
        return next((place for place in places if os.path.exists(place)), None)  # noqa: PTH110

    def nearby(self, path: str) -> str | None:
        """Return the one image below the folder whose path ends like that of a line, which may lack its ending, too."""
        *folders, last = _folded(list(_spellings(path))[-1]).removeprefix("./").split("/")
        depth = -len(folders) - 1
        ends = [name for name in self._by_name.get(last, ()) if _folded(name).split("/")[depth:-1] == folders]
        exact = [name for name in ends if name.rpartition("/")[2] == path.rpartition("/")[2]]
        if len(ends := exact or ends) > 1:
            self.is_unclear = True
        if len(ends) != 1:
            return None
        self.found.add(path)
        return self.of(ends[0])

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """The images below the folder by their names, with and without their endings."""
        found: dict[str, list[str]] = {}
        for path in scan(self.base).names:
            name = _folded(path.rpartition("/")[2])
            found.setdefault(name, []).append(path)
            found.setdefault(name.rpartition(".")[0], []).append(path)
        return found


def _folded(path: str) -> str:
    """Return a path so that those are equal which look equal, or differ in capital letters only."""
    return path.casefold() if path.isascii() else normalize("NFC", path).casefold()


def _spellings(path: str) -> Iterator[str]:
    """Yield a path as it stands, and as other programs and systems write it, with less and less of their habits."""
    yield path
    if len(path) > 1 and path[0] == path[-1] and path[0] in "\"'":
        unquoted = path[1:-1]
        with suppress(ValueError):  # As names with line breaks are written.
            unquoted = json.loads(path)
        yield (path := unquoted)
    if path != (read := of_windows(path)):
        yield (path := read)
    if not path.isascii():
        yield from (normalize(form, path) for form in ("NFC", "NFD"))
    if path.startswith("~"):
        yield (path := os.path.expanduser(path))  # noqa: PTH111 (of an unknown user it raises nothing)
    if "\\" in path:
        path = path.replace("\\", "/")
    yield path


def _complaint(file: Path, base: Path, missing: Sequence[str], count: int, places: _Places) -> str:
    """Return what is wrong with a list of files that are not there."""
    first = ", ".join(of_windows(path)[:100] for path in missing[:3]) + (", ..." if len(missing) > 3 else "")
    where, hint = f"paths must be absolute, or relative to the list's folder {base}", ""
    if _OF_WINDOWS.match(missing[0]) and os.sep == "/":
        where = f"these are paths of a Windows computer: make them relative to the list's folder {base}"
    elif places.is_unclear:
        hint = "; several images below that folder have the same name: write their folders too"
    elif re.search(r"\s\d+$", missing[0]):
        hint = "; put labels in a table (.csv) with the columns path,label"
    elif of_windows(missing[0]) != missing[0]:
        hint = "; the list is not UTF-8, and was read as Windows-1252: save it as UTF-8"
    return f"{len(missing):,} of the {count:,} paths checked in {file} do not exist: {first}; {where}{hint}"


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
        InputError: the table, called `file`, has no column of paths, or can't be read.
    """
    all_lines = (line.strip() for line in re.split(r"\r\n|\r|\n", text.lstrip("\ufeff")))
    lines = [line for line in all_lines if line and not line.startswith("#")]
    if file.lower().endswith(TABLES) or (lines and _names_columns(lines[0])):
        table = read_text_table(text, file)
        pairs, column = pairs_of(table, file)
        origin = f"from column {column}" if table.has_names else "after the paths (no line names the columns)"
        if not column:
            return pairs, []
    else:
        pairs, notes = labelled_lines(lines)
        column, origin = "", "after the paths"
        if notes or not any(label for _, label in pairs):
            return pairs, notes
    try:
        labels = class_names(of_windows(label) if isinstance(label, str) else label for _, label in pairs)
    except NoLabels as error:
        return [(path, "") for path, _ in pairs], [f"column {column} holds {error}, and is not used"]
    return [(path, label) for (path, _), label in zip(pairs, labels, strict=True)], notes_on(labels, origin)


def _names_columns(line: str) -> bool:
    """Return whether the first line of a list names the columns of a table, one of them that of the paths."""
    table = read_text_table(line[:1000], "")
    return len(table.columns) > 1 and table.has_names and table.find(PATHS) is not None
