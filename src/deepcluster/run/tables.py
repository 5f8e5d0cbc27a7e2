"""Tables of features and clusters, one row per image: made in parts, and joined without holding all rows in memory."""

import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import DeepClusterError
from deepcluster.core.files import mark_as_ours, written_beside
from deepcluster.core.text import as_line
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource
from deepcluster.run.lock import Lock
from deepcluster.run.model import Model
from deepcluster.run.parts import Parts, join_to_array, named
from deepcluster.run.passes import Pass

# Bytes of rows that a group of rows of a Parquet table holds.
GROUP_BYTES = 128 << 20
MOST_BYTES_OF_NAME = 255


@contextmanager
def parts_of_table(model: Model, one: Pass, source: ImageSource, target: Path, *, are_result: bool) -> Iterator[Parts]:
    """Yield the finished parts of a table; unless they are the result, they lie beside it, and are deleted at the end."""
    folder = target if are_result else target.with_name(f"{target.name}.parts")
    place = target.with_name(f".{target.name}.in-use")
    with closing(Lock(place, model.work.ranks, doing=f"{target} is being written", other="place")) as lock:
        lock.acquire(model.work.reporter.warn)
        made = model.in_parts(one, source, folder, parquet=are_result)
        try:
            yield made
        except OSError as fault:
            raise DeepClusterError(f"could not write {target}: {fault}; {model.work.interruption.advice}") from fault
        if not are_result and model.work.ranks.is_main:
            made.delete()


def result_of(
    made: Parts, one: Pass, source: ImageSource, ranks: Ranks, *, return_rows: bool
) -> tuple[list[str], dict[str, NDArray[Any]], dict[int, str]]:
    """Return names, rows and why images can't be read; no rows if so asked, or if there are several processes."""
    n_rows = made.n_rows if return_rows and ranks.size == 1 else 0
    rows = {name: np.empty((n_rows, *row.shape), row.dtype) for name, row in one.empty.items()}
    for span, some in made.read() if n_rows else ():
        for name, values in some.items():
            rows[name][span.start : span.stop] = values
    return [source.name(index) for index in range(n_rows)], rows, made.unreadable() if ranks.is_main else {}


def join_to_parquet(parts: Parts, source: ImageSource, target: Path, work: Work) -> None:
    """Write one Parquet table of all parts, a few of them in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    track = work.track("joining the parts", parts.n_rows, "rows")
    with written_beside(target, durable=True) as beside, beside.open("wb") as file, track as advance:
        writer, some, some_bytes = None, list[pa.Table](), 0
        try:
            for span, columns in parts.read():
                some.append(pa.table(named(columns, source, span), metadata={"deepcluster": "{}"}))
                some_bytes += some[-1].nbytes
                if some_bytes > GROUP_BYTES or span.stop == parts.n_rows:
                    writer = writer or pq.ParquetWriter(file, some[0].schema)
                    writer.write_table(pa.concat_tables(some))
                    some, some_bytes = [], 0
                advance(len(span))
        finally:
            if writer is not None:
                writer.close()


def write_array(made: Parts, one: Pass, source: ImageSource, target: Path, work: Work) -> None:
    """Write the embeddings of all parts into an .npy file, and the names of the images beside it."""
    with written_beside(target, durable=True) as beside:
        join_to_array(made, "embedding", beside, one.empty["embedding"], work)
    with written_beside(target.with_suffix(".names.txt")) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(f"{as_line(source.name(index))}\n" for index in range(len(source)))


def link_clusters(folders: Path, source: ImageSource, made: Parts, *, n_clusters: int) -> None:
    """Make a link for each image, named after its path, in the folder of its cluster.

    The names of two links differ in more than their capital letters, so that any other system can hold them, too.
    """
    digits, unfinished = len(str(n_clusters - 1)), folders.with_name(f"{folders.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    mark_as_ours(unfinished)
    taken = set[int]()  # As hashes, which take a third of the memory.
    for span, rows in made.read():
        for index, cluster in zip(span, rows["cluster"].tolist(), strict=True):
            path = source.path(index)
            if cluster == UNASSIGNED or path is None:
                continue
            folder = unfinished / f"cluster-{cluster:0{digits}d}"
            folder.mkdir(exist_ok=True)
            names = (_link_name(source.name(index), suffix) for suffix in chain([""], (f"-{n}" for n in count(index))))
            keys = ((hash((cluster, normalize("NFC", name).casefold())), name) for name in names)
            key, name = next((key, name) for key, name in keys if key not in taken)  # a/b__c.jpg after a__b/c.jpg
            taken.add(key)
            (folder / name).symlink_to(path)
    if folders.exists():
        folders.rmdir()
    unfinished.rename(folders)


def _link_name(name: str, suffix: str) -> str:
    """Return the name of a link to an image: folders joined by `__`, shortened at the front to what file systems take."""
    stem, dot, ending = name.replace("/", "__").rpartition(".")
    stem, ending = (stem or ending) + suffix, dot + ending if stem else ""
    while stem and len(os.fsencode(stem + ending)) > MOST_BYTES_OF_NAME:
        stem = stem[1:]
    return stem + ending
