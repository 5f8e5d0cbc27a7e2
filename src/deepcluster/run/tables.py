"""Tables of features and clusters, one row per image: made in parts, and joined without holding all rows in memory."""

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import DeepClusterError
from deepcluster.core.files import written_beside
from deepcluster.core.text import as_line
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource
from deepcluster.run.lock import Lock
from deepcluster.run.model import Model
from deepcluster.run.parts import Parts, join_to_array, named
from deepcluster.run.passes import Pass
from deepcluster.run.table_writers import writer_of

# Bytes of rows that a group of rows of a Parquet table holds.
GROUP_BYTES = 128 << 20


@contextmanager
def parts_of_table(model: Model, one: Pass, source: ImageSource, target: Path, *, are_result: bool) -> Iterator[Parts]:
    """Yield the finished parts of a table; unless they are the result, they lie beside it, and are deleted at the end."""
    folder = target if are_result else target.with_name(f"{target.name}.parts")
    place = target.with_name(f".{target.name}.in-use")
    with closing(Lock(place, model.work.ranks, what=target, doing="written", other="place")) as lock:
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


def join_to_table(parts: Parts, source: ImageSource, target: Path, work: Work, names: Mapping[int, str]) -> None:
    """Write one table (.parquet, .csv or .jsonl) of all parts, a few of them in memory at a time.

    Args:
        names: names of clusters.
    """
    import pyarrow as pa

    track = work.track("joining the parts", parts.n_rows, "rows")
    with written_beside(target, durable=True) as beside, beside.open("wb") as file, track as advance:
        writer, some, some_bytes = None, list[pa.Table](), 0
        try:
            for span, columns in parts.read():
                some.append(pa.table(named(columns, source, span, names), metadata={"deepcluster": "{}"}))
                some_bytes += some[-1].nbytes
                if some_bytes > GROUP_BYTES or span.stop == parts.n_rows:
                    writer = writer or writer_of(target.suffix, file, some[0].schema)
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
