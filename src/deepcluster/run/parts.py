"""Numbered parts of a table that several processes make, or several starts. A part is complete once it has its name.

N rows, D numbers of a row.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError
from deepcluster.core.files import load_tensors, read_table, save_tensors, write_table
from deepcluster.core.text import printable
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource

# Rows by the name of their column: (N, D), or (N,).
Columns = Mapping[str, NDArray[Any]]

MOST_ROWS = 16_384
MOST_BYTES = 128 << 20
# As many parts are made of few rows, so that each process has about the same number.
FEW_PARTS = 64
# How long a network file system may take to show a new file to the other machines.
SEEN_SECONDS = 10.0


def spans_of(n_rows: int, row_bytes: int, batch_size: int) -> list[range]:
    """Return the rows of each part: whole batches, whatever the number of processes, so that batches are those of one.

    A part has at most 16,384 rows and 128 MiB, unless one batch has more.
    """
    wanted = min(MOST_ROWS, MOST_BYTES // max(1, row_bytes), n_rows // FEW_PARTS)
    step = max(1, wanted // batch_size) * batch_size
    return [range(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


class Parts:
    """Parts as files of tensors in a folder of their own, kept until a table is made of them.

    Args:
        folder: where they lie. It is made by the first rank, and only files of this class are in it.
        key: changes with everything that the rows depend on. Parts of another key are never used.
        spans: the rows of each part.
    """

    ending = ".pt"

    def __init__(self, folder: Path, key: str, spans: Sequence[range]) -> None:
        self.folder, self.key, self.spans = folder, key, spans

    @property
    def n_rows(self) -> int:
        """N, the number of rows of all parts."""
        return self.spans[-1].stop if self.spans else 0

    def path(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{number:05d}{self.ending}"

    def missing(self) -> list[int]:
        """Return the numbers of the parts to be made, and make the folder. Parts of another key are deleted."""
        there = self._there()
        for path in set(there) - {path for path, key in there.items() if key == self.key}:
            path.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        return [number for number in range(len(self.spans)) if there.get(self.path(number)) != self.key]

    def _there(self) -> dict[Path, str]:
        """Return the key of each part in the folder; "" of a damaged one."""
        # What is not there yet is not asked for by name: a network file system would remember that it is missing.
        found = sorted(self.folder.glob(f"part-*{self.ending}")) if self.folder.is_dir() else []
        return {path: self._facts(path).get("key", "") for path in found}

    def _facts(self, path: Path) -> Mapping[str, Any]:
        with suppress(InputError):
            return load_tensors(path, mapped=True)
        return {}

    def write(self, number: int, columns: Columns, unreadable: dict[int, str]) -> None:
        """Write a part, and why images in it can't be read, by index."""
        rows = {name: torch.from_numpy(values) for name, values in columns.items()}
        try:
            save_tensors(self.path(number), {"key": self.key, "unreadable": unreadable, "rows": rows})
        except RuntimeError as fault:  # Of torch, for a full disk.
            raise OSError(str(fault)) from fault

    def unreadable(self) -> dict[int, str]:
        """Return why images can't be read, by index, of all parts."""
        known: dict[int, str] = {}
        for number in range(len(self.spans)):
            known |= {int(index): why for index, why in self._facts(self.path(number)).get("unreadable", {}).items()}
        return known

    def read(self) -> Iterator[tuple[range, Columns]]:
        """Yield the rows of each part, in order; they may lie in a file.

        Raises:
            InputError: a part has been deleted meanwhile.
        """
        for number, span in enumerate(self.spans):
            try:
                yield span, self._columns(self.path(number))
            except (InputError, OSError) as fault:
                raise InputError(
                    f"part {number} of {self.folder} is gone or damaged ({fault}): repeat the command"
                ) from None

    def _columns(self, path: Path) -> Columns:
        return {name: rows.numpy() for name, rows in load_tensors(path, mapped=True)["rows"].items()}

    def delete(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


class ParquetParts(Parts):
    """Parts as Parquet files that together are the table; they stay.

    Args:
        source: has the name of each row.
        names: names of clusters.
    """

    ending = ".parquet"

    def __init__(
        self, folder: Path, key: str, spans: Sequence[range], source: ImageSource, names: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(folder, key, spans)
        self.source, self.names = source, names

    def missing(self) -> list[int]:
        """Return the numbers of the parts to be made, and make the folder.

        Raises:
            InputError: there is something else in the folder.
        """
        there = self._there()
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        if stranger := next((name for name in names if not name.startswith((".", "part-"))), None):
            raise InputError(f"--out {self.folder}: {stranger} is no part of a table; name a new or empty folder")
        if other := next((path for path, key in there.items() if key not in ("", self.key)), None):
            raise InputError(
                f"--out {self.folder} has parts of another model, other images or other options ({other.name}); delete "
                "them, or name another folder"
            )
        return super().missing()

    def _facts(self, path: Path) -> Mapping[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with suppress(pa.ArrowException, OSError, ValueError), path.open("rb") as file:
            metadata = pq.read_schema(file).metadata or {}
            return json.loads(metadata.get(b"deepcluster", b"{}"))  # type: ignore[no-any-return]
        return {}

    def write(self, number: int, columns: Columns, unreadable: dict[int, str]) -> None:
        facts = json.dumps({"key": self.key, "unreadable": unreadable})
        write_table(named(columns, self.source, self.spans[number], self.names), self.path(number), {"deepcluster": facts})

    def _columns(self, path: Path) -> Columns:
        table, columns = read_table(path), dict[str, NDArray[Any]]()
        for name in set(table.column_names) - {"name", "cluster_name", "path"}:
            rows, width = table[name].combine_chunks(), getattr(table[name].type, "list_size", None)
            columns[name] = rows.to_numpy() if width is None else rows.flatten().to_numpy().reshape(-1, width)
        return columns


def named(columns: Columns, source: ImageSource, span: range, names: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Return the columns of a table of some rows: names of the images, the columns, names of their clusters, paths.

    A path is absolute; null for an image that is not a file of its own.
    """
    import pyarrow as pa

    def column(rows: NDArray[Any]) -> Any:
        return pa.array(rows) if rows.ndim == 1 else pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])

    table = {"name": [source.name(index) for index in span]} | {name: column(rows) for name, rows in columns.items()}
    if names:
        table["cluster_name"] = pa.array([names.get(cluster) for cluster in columns["cluster"].tolist()], pa.string())
    paths = (source.path(index) for index in span)
    return table | {"path": pa.array([None if path is None else printable(str(path)) for path in paths], pa.string())}


def join_to_array(parts: Parts, name: str, beside: Path, row: NDArray[Any], work: Work) -> None:
    """Write a column of all parts into an .npy file; `row` has the shape and the type of a row."""
    array = np.lib.format.open_memmap(beside, "w+", row.dtype, (parts.n_rows, *row.shape))
    with work.track("joining the parts", parts.n_rows, "rows") as advance:
        for span, columns in parts.read():
            array[span.start : span.stop] = columns[name]
            advance(len(span))
    array.flush()


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise `InputError` on all ranks unless all see what the first one writes into a folder that it has made."""
    if ranks.size == 1:
        return

    def write() -> tuple[str, str]:
        probe = folder / f".{uuid4().hex}"  # No reader of Parquet folders reads such names.
        probe.touch()
        return probe.name, str(folder.absolute())

    name, theirs = ranks.from_main(write)
    probe, deadline = folder / name, time.monotonic() + SEEN_SECONDS
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = ranks.gather_objects(probe.exists())
    if ranks.is_main:
        probe.unlink(missing_ok=True)
    if not all(seen):
        raise InputError(
            f"process {seen.index(False)} does not see the files that process 0 writes into {theirs}: it must be on a file "
            "system that all machines share"
        )
