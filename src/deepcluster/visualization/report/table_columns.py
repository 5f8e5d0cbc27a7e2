"""Which column of a table is what, and what its values mean. N rows, D numbers of an embedding."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.text import printable
from deepcluster.visualization.options import ReportOptions

# A larger number of a cluster is the name of something else.
MOST_NUMBER = 1_000_000


def is_embedding(kind: pa.DataType) -> bool:
    """Return whether a column holds lists of numbers."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and is_number(kind.value_type))


def is_number(kind: pa.DataType) -> bool:
    """Return whether a column holds numbers. Whole numbers among which there are nulls are floating in pandas."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def is_word(kind: pa.DataType) -> bool:
    """Return whether a column holds words or whole numbers."""
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


# What a column must hold, in a test and in words, and its usual names in lower case.
USUAL: dict[str, tuple[Callable[[pa.DataType], bool], str, tuple[str, ...]]] = {
    "embedding": (
        is_embedding,
        "lists of numbers",
        ("embedding", "embeddings", "vector", "vectors", "feature", "features"),
    ),
    "cluster": (is_number, "whole numbers", ("cluster", "cluster_id", "clusters", "cluster_label")),
    "distance": (is_number, "numbers", ("distance",)),
    "label": (is_word, "words or numbers", ("label", "labels", "class", "class_name", "target", "category")),
    "name": (
        is_word,
        "words or numbers",
        (
            "name", "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image", "image_id",
            "id", "key",
        ),
    ),
}  # fmt: skip


def find_columns(path: Path, files: Sequence[Path], options: ReportOptions) -> dict[str, str]:
    """Return which column holds embedding, cluster, distance, label and name, as far as there are any.

    Raises:
        InputError: a named column is not there, or of another kind; there are neither embeddings nor clusters, or several
            columns could be the embeddings.
    """
    try:
        schema = pq.read_schema(files[0])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{files[0]} can't be read as a table: {str(error).splitlines()[0]}") from None
    types = [field.type.value_type if pa.types.is_dictionary(field.type) else field.type for field in schema]
    kinds = dict(zip(schema.names, types, strict=True))
    listed = ", ".join(f"{printable(name)} ({kind})" for name, kind in kinds.items()) or "no columns"
    chosen = {}
    for what, (fits, wanted, names) in USUAL.items():
        named = getattr(options, f"{what}_column", None)
        if named is not None and named not in kinds:
            near = did_you_mean(named, kinds)
            raise InputError(f"--{what}-column {named}: {path} has no such column{near}; it has {listed}")
        if named is not None and not fits(kinds[named]):
            raise InputError(f"--{what}-column {named} holds {kinds[named]}, not {wanted}; there are {listed}")
        fitting = {name.lower(): name for name in reversed(kinds) if fits(kinds[name])}
        usual = next((fitting[name] for name in names if name in fitting), None)
        if what == "embedding" and usual is None and named is None and fitting:
            if len(fitting) > 1:
                several = [name for name in kinds if fits(kinds[name])]
                raise InputError(
                    f"{path}: {', '.join(map(printable, several))} all hold lists of numbers; say which are the embeddings "
                    f"with --embedding-column {printable(several[0])}"
                )
            usual = next(iter(fitting.values()))
        column = named or usual
        if column is not None and not (what == "cluster" and options.clusters is not None):
            chosen[what] = column
    if "embedding" not in chosen and "cluster" not in chosen:
        wanted = "to cluster" if options.clusters is not None else "and none of clusters"
        raise InputError(
            f"{path} has no column of embeddings (lists of numbers) {wanted}; it has {listed}. "
            "Name one with --embedding-column or --cluster-column"
        )
    return chosen


def cluster_numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the number of the cluster of each row; -1 where it is null, not a number, or below 0.

    Raises:
        InputError: a value that is no whole number, or is over a million.
    """
    values_N = np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), np.float64)
    known_N = np.isfinite(values_N) & (values_N >= 0)
    wrong = values_N[known_N & ((values_N != np.floor(values_N)) | (values_N > MOST_NUMBER))]
    if len(wrong):
        raise InputError(f"{wrong[0]:g} is no number of a cluster; these are whole numbers from 0 to {MOST_NUMBER:,}")
    return np.where(known_N, values_N, UNASSIGNED).astype(np.int64)


def label_numbers(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """Return labels as numbers, -1 for null, "" and -1, and their names: whole numbers by size, then words."""
    words = ["" if word is None else printable(word) for word in column.cast(pa.large_string()).to_pylist()]
    known = sorted(
        set(words) - {"", "-1"}, key=lambda word: (not word.isdecimal(), int(word) if word.isdecimal() else 0, word)
    )
    number = {word: number for number, word in enumerate(known)}
    return np.array([number.get(word, UNASSIGNED) for word in words], np.int64), known


def embeddings(column: pa.ChunkedArray, path: Path) -> tuple[Tensor, NDArray[np.bool_]]:
    """Return rows (N, D) of unit length, NaN where one is missing or not finite, and which are missing.

    Raises:
        InputError: embeddings of different lengths, or none at all.
    """
    lengths_N = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
    missing_N = lengths_N == 0
    there = np.flatnonzero(~missing_N)
    first = int(there[0]) if len(there) else 0
    other = there[lengths_N[there] != lengths_N[first]]
    if len(other):
        raise InputError(
            f"{path}: the embedding of row {other[0]} has {lengths_N[other[0]]:,} numbers, that of row {first} has "
            f"{lengths_N[first]:,}; leave out one kind"
        )
    rows_ND = np.full((len(lengths_N), max(1, int(lengths_N[first]))), np.nan, np.float32)
    start = 0
    for chunk in column.chunks:
        part_BD, missing_B = rows_ND[start : start + len(chunk)], missing_N[start : start + len(chunk)]
        with np.errstate(over="ignore"):  # Null lists have no values here.
            values = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        part_BD[~missing_B] = values.reshape(-1, part_BD.shape[1])
        start += len(chunk)
    points_ND = torch.from_numpy(rows_ND)
    points_ND[~torch.isfinite(points_ND).all(dim=1)] = torch.nan
    if bool(points_ND.isnan().all()):
        raise InputError(f"{path}: none of the {len(points_ND):,} rows of embeddings holds numbers")
    return normalize(points_ND), missing_N
