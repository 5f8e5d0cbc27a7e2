"""Any table of embeddings, or of clusters, as a report shows it: `deepcluster report FEATURES.parquet`.

Rows are scaled to unit length before they are clustered, as is usual for embeddings of any origin. (On the features of a
small AlexNet of 4,500 Imagenette photos in 50 clusters that gave an NMI to the classes of 0.194; PCA to 64 with whitening,
which training uses, 0.183.)
N rows, D numbers of an embedding, K clusters.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.assignment import UNASSIGNED, cluster_means, member_distances
from deepcluster.clustering.kmeans import KMeans
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.text import count_of, printable
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource
from deepcluster.data.sources.by_name import pictures_by_name
from deepcluster.data.sources.labels import class_names, in_order
from deepcluster.data.sources.text_tables import LABELS, PATHS, keys_of
from deepcluster.data.survey import even_sample
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.table_files import ARRAYS, TEXTS, numbered_columns, read_file, with_vectors

MISSING = "its embedding is missing"
NOT_FINITE = "its embedding holds values that are not finite numbers"
NO_CLUSTER = "the table has it in no cluster"
# Without --clusters: about this many rows per cluster, and as many clusters as a user can look through.
ROWS_PER_CLUSTER, FEWEST_CLUSTERS, MOST_CLUSTERS = 90, 2, 100
CAREFUL_START_CLUSTERS = 1_000  # Above it, a pass over the points for each cluster takes longer than the iterations.
MOST_POINTS = 20_000  # Points that map and odd ones may draw from.
CLUSTERS = ["cluster", "clusterid", "clusterlabel", "clusternumber"]
MOST_NUMBER = 1_000_000  # A larger number of a cluster is the name of something else.


def is_embedding(kind: pa.DataType) -> bool:
    """Return whether a column holds lists of numbers."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and is_number(kind.value_type))


def is_number(kind: pa.DataType) -> bool:
    """Return whether a column holds numbers. Whole numbers among which there are nulls are floating in pandas."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column holds words."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_word(kind: pa.DataType) -> bool:
    """Return whether a column holds words or whole numbers."""
    return bool(is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


# What a column must hold, in a test and in words, and its usual names as `keys_of` has them.
USUAL: dict[str, tuple[Callable[[pa.DataType], bool], str, Sequence[str]]] = {
    "embedding": (is_embedding, "lists of numbers", ["embedding", "vector", "feature", "x", "arr0", "data"]),
    "cluster": (lambda kind: is_number(kind) or is_text(kind), "numbers or words", CLUSTERS),
    "distance": (is_number, "numbers", ["distance"]),
    "label": (lambda kind: not is_embedding(kind) and not pa.types.is_nested(kind), "words or numbers", [*LABELS, "y"]),
    "name": (is_word, "words or numbers", ["name", *PATHS]),
}


def read_table(path: Path, options: ReportOptions, *, images: ImageSource | None = None, work: Work) -> Collection:
    """Return a table as images in clusters: its own clusters, or those of k-means.

    Args:
        path: a Parquet file or a folder of them, a table as text, or NumPy arrays.
        options: `clusters` clusters the embeddings again, whatever clusters the table has; columns that are not named are
            those with usual names.
        images: where pictures are looked up by name.

    Returns:
        what a report shows. Distances are Euclidean, between rows of unit length and the mean of their cluster; those of a
        table without embeddings are its own. Clusters of k-means are numbered from the largest.

    Raises:
        InputError: no such table; a column that is missing or could be one of several (all are listed); embeddings of
            different lengths; more clusters than rows; no name is that of an image.
    """
    columns, table = _read(path, options)
    found = ", ".join(f"{kind} from column {column}" for kind, column in columns.items())
    work.reporter.say(f"{path}: {count_of(len(table), 'row')}; {found}")
    words = table[columns["name"]].cast(pa.large_string()).to_pylist() if "name" in columns else [None] * len(table)
    given_N, given_names = _cluster_numbers(table[columns["cluster"]], work) if "cluster" in columns else (None, {})
    collection = Collection(
        title=path.name,
        names=[f"row {row}" if word is None else word for row, word in enumerate(words)],
        cluster_N=np.full(len(table), UNASSIGNED) if given_N is None else given_N,
        distance_N=np.full(len(table), np.nan, np.float32),
        n_clusters=0 if given_N is None else int(given_N.max(initial=-1)) + 1,
        table="" if given_N is None else path.name,
        cluster_names=given_names,
    )
    if "label" in columns:
        label_N, label_names = _label_numbers(table[columns["label"]])
        collection = replace(collection, label_N=label_N, label_names=label_names)
    if "embedding" in columns:
        collection = _with_embeddings(collection, table[columns["embedding"]], path, options, work)
    else:
        distances = table[columns["distance"]].cast(pa.float32()).to_numpy() if "distance" in columns else np.nan
        distance_N = np.where(collection.cluster_N >= 0, distances, np.nan).astype(np.float32)
        outside = {collection.names[row]: NO_CLUSTER for row in np.flatnonzero(collection.cluster_N < 0).tolist()}
        collection = replace(collection, distance_N=distance_N, unreadable=outside)
    if not (collection.cluster_N >= 0).any():
        raise InputError(f"{path}: no row is in a cluster")
    if images is None:
        return collection
    pictures = pictures_by_name(collection.names, images)
    missing = len(pictures) - pictures.n_found
    if missing:
        work.reporter.warn(f"{missing:,} of {len(pictures):,} names are not among {images.describe()}: they have no picture")
    if collection.label_N is None and pictures.labels_N is not None:
        collection = replace(collection, label_N=pictures.labels_N, label_names=pictures.class_names)
    return replace(collection, images=pictures)


def _read(path: Path, options: ReportOptions) -> tuple[dict[str, str], pa.Table]:
    """Return which column of a table is what, and these columns; dictionaries become plain values."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    is_plain = path.is_file() and path.suffix.lower() in (*TEXTS, *ARRAYS)
    table = read_file(path) if is_plain else _read_parquet(path, options)
    if not len(table):
        raise InputError(f"{path} has no rows")
    table = table.cast(pa.schema([field.with_type(_plain(field.type)) for field in table.schema]))
    columns = _find_columns(path, {field.name: field.type for field in table.schema}, options)
    return columns, table.select(list(dict.fromkeys(columns.values())))


def _read_parquet(path: Path, options: ReportOptions) -> pa.Table:
    """Return the columns of a Parquet file, or of a folder of them, that a report shows."""
    if not path.is_dir() and path.suffix.lower() != ".parquet":
        raise InputError(
            f"{path}: a report takes a run folder, or a table: Parquet (a file or a folder of them), {' '.join(TEXTS)} or "
            f"{' '.join(ARRAYS)}. Convert yours first, such as pandas.read_excel('t.xlsx').to_parquet('t.parquet')"
        )
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} is a folder without Parquet files")
    read = files[0]
    try:
        schema = pq.read_schema(read)
        kinds = {field.name: _plain(field.type) for field in schema}
        if numbered := not any(map(is_embedding, kinds.values())) and numbered_columns(schema):
            wanted = [name for name, kind in kinds.items() if is_word(kind) or is_number(kind)]
        else:
            wanted = list(dict.fromkeys(_find_columns(path, kinds, options).values()))
        read = path
        table = pa.concat_tables([pq.read_table(file, columns=wanted, partitioning=None) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{read} can't be read as a table: {str(error).splitlines()[0]}") from None
    return with_vectors(table) if numbered else table


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _find_columns(path: Path, kinds: dict[str, pa.DataType], options: ReportOptions) -> dict[str, str]:
    """Return which column holds embedding, cluster, distance, label and name, as far as there are any.

    Raises:
        InputError: a named column is not there, or of another kind; there are neither embeddings nor clusters, or several
            columns could be the embeddings.
    """
    listed = ", ".join(f"{printable(name)} ({kind})" for name, kind in kinds.items()) or "no columns"
    chosen = {}
    for what, (fits, wanted, names) in USUAL.items():
        named = getattr(options, f"{what}_column", None)
        if named is not None and named not in kinds:
            near = did_you_mean(named, kinds)
            raise InputError(f"--{what}-column {named}: {path} has no such column{near}; it has {listed}")
        if named is not None and not fits(kinds[named]):
            raise InputError(f"--{what}-column {named} holds {kinds[named]}, not {wanted}; there are {listed}")
        several = [name for name in kinds if fits(kinds[name])]
        fitting = {key: name for name in reversed(several) for key in keys_of(name)}
        usual = next((fitting[name] for name in names if name in fitting), None)
        if what == "embedding" and usual is None and named is None and several:
            if len(several) > 1:
                raise InputError(
                    f"{path}: {', '.join(map(printable, several))} all hold lists of numbers; say which are the embeddings "
                    f"with --embedding-column {printable(several[0])}"
                )
            usual = several[0]
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


def _cluster_numbers(column: pa.ChunkedArray, work: Work) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Return cluster_N, -1 where it is null, not a number or below 0; and names, where clusters are words."""
    if is_text(column.type):
        names = class_names(column.to_pylist())
        known = in_order(set(names) - {""})
        try:
            column = pa.chunked_array([[float(name) if name else None for name in names]], pa.float64())
        except ValueError:
            number = {name: number for number, name in enumerate(known)}
            told = ", ".join(f"{number} = {printable(name)}" for number, name in enumerate(known[:5]))
            work.reporter.say(f"clusters are numbered in the order of their names: {told}{', …' if len(known) > 5 else ''}")
            return np.array([number.get(name, UNASSIGNED) for name in names], np.int64), dict(enumerate(known))
    values_N = np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), np.float64)
    known_N = np.isfinite(values_N) & (values_N >= 0)
    wrong = values_N[known_N & ((values_N != np.floor(values_N)) | (values_N > MOST_NUMBER))]
    if len(wrong):
        raise InputError(f"{wrong[0]:g} is no number of a cluster; these are whole numbers from 0 to {MOST_NUMBER:,}")
    return np.where(known_N, values_N, UNASSIGNED).astype(np.int64), {}


def _label_numbers(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """Return labels as numbers, -1 where they are unknown, and their names, as in images with labels."""
    names = class_names(column.to_pylist())
    known = in_order(set(names) - {""})
    number = {name: number for number, name in enumerate(known)}
    return np.array([number.get(name, UNASSIGNED) for name in names], np.int64), list(map(printable, known))


def _with_embeddings(
    collection: Collection, column: pa.ChunkedArray, path: Path, options: ReportOptions, work: Work
) -> Collection:
    """Return the collection with clusters of its embeddings, or with the centroids of the clusters that it has."""
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
        some, start = there[(there >= start) & (there < start + len(chunk))], start + len(chunk)
        with np.errstate(over="ignore"):  # Null lists have no values here.
            values = chunk.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        rows_ND[some] = values.reshape(-1, rows_ND.shape[1])
    points_ND = torch.from_numpy(rows_ND)
    faulty_N = ~torch.isfinite(points_ND).all(dim=1).numpy()
    faults = np.flatnonzero(faulty_N).tolist()
    if len(faults) == len(points_ND):
        raise InputError(f"{path}: none of the {count_of(len(points_ND), 'row')} of embeddings holds numbers")
    points_ND[faults] = torch.nan
    points_ND = normalize(points_ND)
    if collection.table:
        labels_N = torch.from_numpy(np.where(faulty_N, UNASSIGNED, collection.cluster_N))
        used_N = labels_N >= 0
        centroids_KD = cluster_means(points_ND[used_N], labels_N[used_N], collection.n_clusters)
        distances_N = torch.full((len(labels_N),), torch.nan)
        distances_N[used_N] = member_distances(points_ND[used_N], labels_N[used_N], centroids_KD)
    else:
        labels_N, distances_N, centroids_KD = _cluster(points_ND, len(points_ND) - len(faults), options, work)
    sample = even_sample(np.flatnonzero(labels_N >= 0).tolist(), MOST_POINTS)
    return replace(
        collection,
        cluster_N=labels_N.numpy(),
        distance_N=distances_N.numpy(),
        n_clusters=len(centroids_KD),
        centroids_KP=centroids_KD,
        sample_M=np.array(sample, np.int64),
        points_MP=points_ND[sample].numpy(),
        unreadable={collection.names[row]: MISSING if missing_N[row] else NOT_FINITE for row in faults},
    )


def _cluster(points_ND: Tensor, n_usable: int, options: ReportOptions, work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels (N), distances (N) and centroids (K, D) of k-means, the largest cluster first."""
    usual = max(FEWEST_CLUSTERS, min(MOST_CLUSTERS, round(n_usable / ROWS_PER_CLUSTER)))
    n_clusters = options.clusters or min(usual, n_usable)
    if n_clusters > n_usable:
        raise InputError(f"clusters={n_clusters} must be between 1 and the {count_of(n_usable, 'row')} that hold numbers")
    start = "k-means++" if n_clusters <= CAREFUL_START_CLUSTERS else "random"
    with work.track("clustering", None, "iterations") as advance:
        found = KMeans(n_clusters, init=start).cluster(points_ND, seed=options.seed, advance=advance)
    order = found.sizes_K().argsort(descending=True, stable=True)
    labels_N = torch.where(found.labels_N >= 0, order.argsort()[found.labels_N], UNASSIGNED)
    return labels_N, found.distances_N, found.centroids_KP[order]
