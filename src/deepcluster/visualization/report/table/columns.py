"""Which column of a table is what, and what its values mean.

N rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.text import printable
from deepcluster.visualization.report.table.files import TableFile, is_embedding

EMBEDDING_NAMES = ("embedding", "embeddings", "vector", "vectors", "feature", "features")
NAME_NAMES = (
    "name", "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image", "image_id", "id", "key",
)  # fmt: skip
CLUSTER_NAMES = ("cluster", "cluster_id", "clusters", "cluster_label")
LABEL_NAMES = ("label", "labels", "class", "class_name", "target", "category")
DISTANCE_NAMES = ("distance",)
# Numbers of clusters above it are names of something else.
MOST_NUMBER = 1_000_000


@dataclass(frozen=True)
class Columns:
    """Names of the columns; None where there is none."""

    embedding: str | None
    cluster: str | None
    distance: str | None
    label: str | None
    name: str | None

    def describe(self) -> str:
        """For the line that says what is read."""
        kinds = ("embedding", "cluster", "label", "name")
        named = [f"{kind} from column {getattr(self, kind)}" for kind in kinds if getattr(self, kind)]
        return ", ".join(named + ([] if self.name else ["rows have no names but their numbers"]))


def find_columns(
    table: TableFile,
    *,
    embedding: str | None,
    cluster: str | None,
    label: str | None,
    name: str | None,
    regroup: bool,
) -> Columns:
    """The columns that the person named, or those with usual names.

    Args:
        regroup: clusters that the table has are not asked for.

    Raises:
        InputError: a column that was named is not there, or of another kind; there are neither embeddings nor clusters, or
            several columns could be the embeddings.
    """
    finder = _Finder(table)
    rows = finder.named("embedding", embedding, is_embedding, "lists of numbers") or finder.embedding()
    groups = finder.named("cluster", cluster, _is_number, "whole numbers")
    if groups is None and not regroup:
        groups = finder.usual(CLUSTER_NAMES, _is_number)
    if rows is None and (groups is None or regroup):
        wanted = "to group" if regroup else "and none of clusters"
        raise InputError(
            f"{table.path} has no column of embeddings (lists of numbers) {wanted}; it has {finder.listed()}. "
            "Name one with --embedding-column or --cluster-column"
        )
    return Columns(
        embedding=rows,
        cluster=groups,
        distance=finder.usual(DISTANCE_NAMES, _is_real) if groups is not None else None,
        label=finder.named("label", label, _is_word_or_number, "words or numbers")
        or finder.usual(LABEL_NAMES, _is_word_or_number),
        name=finder.named("name", name, _is_word_or_number, "words or numbers")
        or finder.usual(NAME_NAMES, _is_word_or_number),
    )


class _Finder:
    def __init__(self, table: TableFile) -> None:
        self.table = table
        self.kinds = {field.name: field.type for field in table.schema}

    def listed(self) -> str:
        return ", ".join(f"{printable(name)} ({kind})" for name, kind in self.kinds.items()) or "no columns"

    def named(self, what: str, column: str | None, fits: Callable[[pa.DataType], bool], wanted: str) -> str | None:
        """The column that the person named."""
        if column is None:
            return None
        if column not in self.kinds:
            near = did_you_mean(column, self.kinds)
            raise InputError(f"--{what}-column {column}: {self.table.path} has no such column{near}; it has {self.listed()}")
        if not fits(self.kinds[column]):
            raise InputError(f"--{what}-column {column} holds {self.kinds[column]}, not {wanted}; there are {self.listed()}")
        return column

    def usual(self, names: Sequence[str], fits: Callable[[pa.DataType], bool]) -> str | None:
        """The first of the usual names, in upper or lower case."""
        lower = {name.lower(): name for name in reversed(self.kinds)}
        return next((lower[name] for name in names if name in lower and fits(self.kinds[lower[name]])), None)

    def embedding(self) -> str | None:
        """The only column of lists of numbers, or that of a usual name."""
        candidates = [name for name, kind in self.kinds.items() if is_embedding(kind)]
        if len(candidates) > 1:
            usual = self.usual(EMBEDDING_NAMES, is_embedding)
            if usual is None:
                raise InputError(
                    f"{self.table.path}: {', '.join(map(printable, candidates))} all hold lists of numbers; say which are "
                    f"the embeddings with --embedding-column {printable(candidates[0])}"
                )
            return usual
        return candidates[0] if candidates else None


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_word(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(_plain(kind)) or pa.types.is_large_string(_plain(kind)))


def _is_number(kind: pa.DataType) -> bool:
    # Whole numbers among which there are nulls are floating in pandas.
    return bool(pa.types.is_integer(_plain(kind)) or pa.types.is_floating(_plain(kind)))


def _is_real(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind))


def _is_word_or_number(kind: pa.DataType) -> bool:
    return _is_word(kind) or bool(pa.types.is_integer(_plain(kind)) or pa.types.is_boolean(kind))


def _decoded(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def names_of(column: pa.Array | None, start: int, count: int) -> Iterator[str]:
    """The name of each row, from number `start` on; `row 12` where it has none."""
    if column is None:
        yield from (f"row {start + row}" for row in range(count))
        return
    for row, name in enumerate(_decoded(column).cast(pa.large_string()).to_pylist()):
        yield f"row {start + row}" if name is None else name


def cluster_numbers(column: pa.ChunkedArray, name: str) -> NDArray[np.int64]:
    """Number of the cluster of each row; -1 where it is null, not a number, or below 0.

    Raises:
        InputError: a value that is no whole number, or is over a million.
    """
    values_N = np.asarray(_decoded(column).cast(pa.float64(), safe=False).to_numpy(), np.float64)
    known_N = np.isfinite(values_N) & (values_N >= 0)
    wrong = values_N[known_N & ((values_N != np.floor(values_N)) | (values_N > MOST_NUMBER))]
    if len(wrong):
        raise InputError(
            f"column {name}: {wrong[0]:g} is no number of a cluster; these are whole numbers from 0 to {MOST_NUMBER:,}"
        )
    return np.where(known_N, values_N, UNASSIGNED).astype(np.int64)


@dataclass(frozen=True)
class Numbered:
    """Labels of rows as numbers.

    Attributes:
        number_N: int64, -1 = unknown.
        names: of the numbers; sorted, whole numbers by their size.
    """

    number_N: NDArray[np.int64]
    names: list[str]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "Numbered":
        """The labels of a column; null, "" and -1 are unknown."""
        words = pc.dictionary_encode(_decoded(column).cast(pa.large_string())).combine_chunks()
        held = [printable(word) for word in words.dictionary.to_pylist()]
        known = sorted(set(held) - {"", "-1"})
        if all(word.isdecimal() for word in known):
            known.sort(key=int)
        number = {word: number for number, word in enumerate(known)}
        number_W = np.array([number.get(word, UNASSIGNED) for word in held] + [UNASSIGNED], np.int64)
        codes_N = np.asarray(pc.fill_null(words.indices, len(held)), np.int64)
        return cls(number_W[codes_N], known)
