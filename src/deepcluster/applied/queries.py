"""The images that `similar` looks for: files, images of the data, or images in memory. N images, Q queries."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepcluster.applied.opening import Data
from deepcluster.applied.vectors import why_unreadable
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.files import user_path
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.sources.files import IMAGE_ENDINGS, image_files
from deepcluster.data.sources.given import given_data

MOST_GUESSED = 10_000  # Names among which one like a wrong name is looked for.


@dataclass(frozen=True)
class Queries:
    """Q queries.

    Attributes:
        names: those of the images of the data, or the paths that were given.
        index_Q: index of each among the images, -1 for others.
        others: the other images, in their order; None where there are none.
    """

    names: list[str]
    index_Q: NDArray[np.int64]
    others: ImageSource | None


def find_queries(
    query: Data, images: ImageSource | None, names: list[str], *, has_network: bool, warn: Callable[[str], None]
) -> Queries:
    """Return the queries; each is looked for among the images by its file, or by its name.

    Args:
        query: image files, folders or lists of them, names of images, or images in memory.
        images: the images; None for a table without pictures.
        names: their names.
        has_network: whether there can be queries that are not among the images.
        warn: called with a sentence for images of a folder or list that can't be read; these are left out.

    Raises:
        InputError: there is no query, or one can't be read, or is not known.
    """
    query = given_data(query, "query")
    if isinstance(query, ImageSource):
        return _in_memory(query, has_network=has_network)
    given = _given([query] if isinstance(query, str | Path) else query, warn)
    index_by_name = {name: index for index, name in enumerate(names)}
    same = _same_files([path for _, path in given if path is not None], images)
    index_Q = np.full(len(given), -1)
    for number, (name, path) in enumerate(given):
        index = -1 if path is None else same.get(path, -1)
        if index < 0 and (path is None or not has_network):
            index = _named(name, index_by_name)
            if index < 0 and path is None:
                same_base = [at for at, known in enumerate(names) if _base(known) == _base(name)]
                if len(same_base) == 1 and _base(name) == name:
                    index_Q[number] = same_base[0]
                    continue
                near = did_you_mean(name, islice(names, MOST_GUESSED))
                near = f" (did you mean {names[same_base[0]]}?)" if same_base else near
                raise InputError(f"query {name} is neither an image file nor the name of an image of the data{near}")
            if index < 0:
                raise InputError(
                    f"query {name} is not in the table, which has no network for other images: name one that is, such as "
                    f"{names[0]}, or give a model instead of the table"
                )
        index_Q[number] = index
    strangers = [path for (_, path), index in zip(given, index_Q.tolist(), strict=True) if index < 0 and path is not None]
    others = image_files(strangers) if strangers else None
    shown = [names[index] if index >= 0 else name for (name, _), index in zip(given, index_Q.tolist(), strict=True)]
    queries = Queries(shown, index_Q, others)
    for name, source, index in _pictures(queries, images):
        if why := why_unreadable(source, index):
            raise InputError(f"query {name} can't be read: {why}")
    return queries


def _in_memory(images: ImageSource, *, has_network: bool) -> Queries:
    if not has_network:
        raise InputError("a table has no network for images in memory: give the name of one of its images, or a model")
    return Queries([images.name(number) for number in range(len(images))], np.full(len(images), -1), images)


def _given(query: Sequence[str | Path], warn: Callable[[str], None]) -> list[tuple[str, Path | None]]:
    """Return each query as it was given, and its file where there is one."""
    given: list[tuple[str, Path | None]] = []
    for one in query:
        path = user_path(one)
        if not path.is_dir() and not (path.is_file() and path.suffix.lower()[1:] not in IMAGE_ENDINGS):
            given.append((str(one), path if path.is_file() else None))
            continue
        source = open_source(one)
        places = [source.path(index) for index in range(len(source))]
        if None in places:
            raise InputError(f"query {one} holds images inside files; a query is an image file, or the name of an image")
        for index, place in enumerate(places):
            if why := why_unreadable(source, index):
                warn(f"query {place} is left out: {why}")
            else:
                given.append((str(place), place))
    if not given:
        raise InputError("there is no query: name a readable image with --query")
    return given


def _named(name: str, index_by_name: Mapping[str, int]) -> int:
    """Return the index of the image with a name, or with the end of a path as its name; -1 where there is none."""
    parts = os.path.abspath(user_path(name)).replace(os.sep, "/").split("/")  # noqa: PTH100 (links stay)
    ends = ("/".join(parts[first:]) for first in range(len(parts)))
    return next((index_by_name[one] for one in (name, *ends) if one in index_by_name), -1)


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _same_files(paths: list[Path], images: ImageSource | None) -> dict[Path, int]:
    """Return the index of each file that is one of the images, however its path is written."""
    if images is None or not paths:
        return {}
    by_base: dict[str, list[tuple[int, Path]]] = {path.name: [] for path in paths}
    for index in range(len(images)):
        place = images.path(index)
        if place is not None and place.name in by_base:
            by_base[place.name].append((index, place))
    return {path: index for path in paths for index, place in by_base[path.name] if place.exists() and path.samefile(place)}


def _pictures(queries: Queries, images: ImageSource | None) -> Iterator[tuple[str, ImageSource, int]]:
    """Yield the name, the source and the index in it of each query whose picture is at hand."""
    n_others = 0
    for name, index in zip(queries.names, queries.index_Q.tolist(), strict=True):
        if index >= 0 and images is not None and images.stamp(index):
            yield name, images, index
        elif index < 0 and queries.others is not None:
            yield name, queries.others, n_others
            n_others += 1
