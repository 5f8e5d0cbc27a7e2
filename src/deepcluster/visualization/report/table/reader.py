"""The rows of a table, pass by pass: names, clusters and labels of all, embeddings in batches.

N rows, B rows of a batch, D numbers of an embedding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.data.sources.names import PackedNames
from deepcluster.visualization.report.table.columns import Columns, Numbered, cluster_numbers, names_of
from deepcluster.visualization.report.table.files import TableFile, read_batches


@dataclass(frozen=True)
class Budget:
    """How much of a table is held: bytes of embeddings, and points of the map."""

    memory_bytes: int = 1 << 30
    most_points: int = 20_000


@dataclass(frozen=True)
class Facts:
    """What the small columns say of each row; None where there is no such column."""

    names: PackedNames
    cluster_N: NDArray[np.int64] | None
    distance_N: NDArray[np.float32] | None
    labels: Numbered | None


class TableReader:
    """Reads a table in passes, and tells how far it is."""

    def __init__(
        self,
        table: TableFile,
        columns: Columns,
        reporter: Reporter,
        check: Callable[[], None],
        budget: Budget,
        device: torch.device,
    ) -> None:
        self.table, self.columns, self.budget, self.device = table, columns, budget, device
        self.reporter, self.check = reporter, check
        self.width: int | None = None
        self.first = 0

    def facts(self) -> Facts:
        """All columns but the embeddings."""
        columns, names = self.columns, PackedNames()
        wanted = [column for column in (columns.name, columns.cluster, columns.distance, columns.label) if column]
        parts: dict[str, list[pa.Array]] = {column: [] for column in wanted}
        for start, batch in self._batches(list(dict.fromkeys(wanted)), "reading names") if wanted else ():
            for column in parts:
                if column != columns.name:
                    parts[column].append(batch.column(column))
            names.extend(names_of(batch.column(columns.name) if columns.name else None, start, batch.num_rows))
        if not wanted:
            names.extend(names_of(None, 0, self.table.rows))
        whole = {column: pa.chunked_array(chunks) for column, chunks in parts.items() if chunks}
        return Facts(
            names,
            cluster_numbers(whole[columns.cluster], columns.cluster) if columns.cluster else None,
            _floats(whole[columns.distance]) if columns.distance else None,
            Numbered.of(whole[columns.label]) if columns.label else None,
        )

    def embeddings(self, what: str) -> Iterator[tuple[int, Tensor, NDArray[np.bool_]]]:
        """Number of the first row, points_BD of unit length (NaN where there is none), and which rows have none at all."""
        column = self.columns.embedding
        if column is None:
            raise RuntimeError("the table has no embeddings")
        for start, batch in self._batches([column], what):
            rows_BD, missing_B = self._rows(batch.column(column), start)
            points_BD = torch.from_numpy(rows_BD)
            points_BD[~torch.isfinite(points_BD).all(dim=1)] = torch.nan
            yield start, normalize(points_BD).to(self.device), missing_B

    def _rows(self, lists: pa.Array, start: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Embeddings (B, D), NaN where there is none, and which rows have none."""
        lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
        missing_B = lengths == 0
        if self.width is None:
            if missing_B.all():
                return np.full((len(lengths), 1), np.nan, np.float32), missing_B
            self.first = start + int(np.argmax(~missing_B))
            self.width = int(lengths[~missing_B][0])
        other = np.flatnonzero(~missing_B & (lengths != self.width))
        if len(other):
            raise InputError(
                f"{self.table.path}: the embedding of row {start + int(other[0])} has {lengths[other[0]]:,} numbers, that "
                f"of row {self.first} has {self.width:,}; leave out one kind"
            )
        rows_BD = np.full((len(lengths), self.width), np.nan, np.float32)
        # Null lists have no values here.
        values = lists.flatten().to_numpy(zero_copy_only=False)
        with np.errstate(over="ignore"):
            rows_BD[~missing_B] = values.astype(np.float32).reshape(-1, self.width)
        return rows_BD, missing_B

    def _batches(self, columns: list[str], what: str) -> Iterator[tuple[int, pa.RecordBatch]]:
        start = 0
        with self.reporter.track(what, self.table.rows, "rows") as progress:
            for batch in read_batches(self.table, columns):
                self.check()
                yield start, batch
                start += batch.num_rows
                progress(batch.num_rows)


def _floats(column: pa.ChunkedArray) -> NDArray[np.float32]:
    return np.asarray(column.cast(pa.float64()).to_numpy(), np.float32)
