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
from deepcluster.core.text import printable
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource
from deepcluster.data.survey import even_sample
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.named_pictures import pictures_by_name

MISSING = "its embedding is missing"
NOT_FINITE = "its embedding holds values that are not finite numbers"
NO_CLUSTER = "the table has it in no cluster"
# Without --clusters: about this many rows per cluster, and as many clusters as a user can look through.
ROWS_PER_CLUSTER, FEWEST_CLUSTERS, MOST_CLUSTERS = 90, 2, 100
# k-means learns its centroids from this many rows, or from more where there are many clusters.
LEARNED_ROWS, LEARNED_ROWS_PER_CLUSTER = 100_000, 256
# Above it, a pass over the points for each cluster takes longer than the iterations.
CAREFUL_START_CLUSTERS = 1_000
# A larger number of a cluster is the name of something else.
MOST_NUMBER = 1_000_000
# Points that map and odd ones may draw from.
MOST_POINTS = 20_000


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


def read_table(path: Path, options: ReportOptions, *, images: ImageSource | None = None, work: Work) -> Collection:
    """Return a table as images in clusters: its own clusters, or those of k-means.

    Args:
        path: a Parquet file, or a folder of them.
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
    files = _files(path)
    columns = _columns(path, files, options)
    table = _read(path, files, list(dict.fromkeys(columns.values())))
    found = ", ".join(f"{kind} from column {column}" for kind, column in columns.items())
    work.reporter.say(f"{path}: {len(table):,} rows; {found}")
    given_N = cluster_numbers(table[columns["cluster"]]) if "cluster" in columns else None
    collection = Collection(
        title=path.name,
        names=_names(table, columns.get("name")),
        cluster_N=np.full(len(table), UNASSIGNED) if given_N is None else given_N,
        distance_N=np.full(len(table), np.nan, np.float32),
        n_clusters=0 if given_N is None else int(given_N.max(initial=-1)) + 1,
        table="" if given_N is None else path.name,
    )
    if "label" in columns:
        label_N, label_names = label_numbers(table[columns["label"]])
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
    return _with_pictures(collection, images, work) if images is not None else collection


def _files(path: Path) -> list[Path]:
    """Return the Parquet files of a table."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise InputError(f"{path} is a folder without Parquet files")
        return files
    if path.suffix.lower() != ".parquet":
        raise InputError(
            f"{path}: a report takes a run folder, or a table in Parquet (a file or a folder of them). Convert yours first: "
            "pandas.read_csv('t.csv').to_parquet('t.parquet'), or for arrays "
            "pandas.DataFrame({'name': names, 'embedding': list(rows)}).to_parquet('t.parquet')"
        )
    return [path]


def _columns(path: Path, files: Sequence[Path], options: ReportOptions) -> dict[str, str]:
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


def _read(path: Path, files: Sequence[Path], columns: list[str]) -> pa.Table:
    """Return columns of all files; dictionaries become plain values."""
    try:
        table = pa.concat_tables([pq.read_table(file, columns=columns, partitioning=None) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} can't be read as a table: {str(error).splitlines()[0]}") from None
    if not len(table):
        raise InputError(f"{path} has no rows")
    plain = [
        field.with_type(getattr(field.type, "value_type", field.type)) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(plain))


def _names(table: pa.Table, column: str | None) -> list[str]:
    """Return the name of each row; `row 12` where it has none."""
    words = [None] * len(table) if column is None else table[column].cast(pa.large_string()).to_pylist()
    return [f"row {row}" if word is None else word for row, word in enumerate(words)]


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


def _with_embeddings(
    collection: Collection, column: pa.ChunkedArray, path: Path, options: ReportOptions, work: Work
) -> Collection:
    """Return the collection with clusters of its embeddings, or with the centroids of the clusters that it has."""
    points_ND, missing_N = embeddings(column, path)
    usable = (~points_ND[:, 0].isnan()).nonzero()[:, 0]
    faults = np.flatnonzero(points_ND[:, 0].isnan().numpy()).tolist()
    unreadable = {collection.names[row]: MISSING if missing_N[row] else NOT_FINITE for row in faults}
    if collection.table:
        usable = usable[torch.from_numpy(collection.cluster_N)[usable] >= 0]
        labels = torch.from_numpy(collection.cluster_N)[usable]
        centroids_KD = cluster_means(points_ND[usable], labels, collection.n_clusters)
    else:
        labels, centroids_KD = cluster(points_ND[usable], options, work)
    cluster_N, distance_N = torch.full((len(points_ND),), UNASSIGNED), torch.full((len(points_ND),), torch.nan)
    cluster_N[usable], distance_N[usable] = labels, member_distances(points_ND[usable], labels, centroids_KD)
    sample = even_sample(usable.tolist(), MOST_POINTS)
    return replace(
        collection,
        cluster_N=cluster_N.numpy(),
        distance_N=distance_N.numpy(),
        n_clusters=len(centroids_KD),
        centroids_KP=centroids_KD,
        sample_M=np.array(sample, np.int64),
        points_MP=points_ND[sample].numpy(),
        unreadable=unreadable,
    )


def cluster(points_ND: Tensor, options: ReportOptions, work: Work) -> tuple[Tensor, Tensor]:
    """Return labels (N) and centroids (K, D) of k-means, the largest cluster first."""
    n_clusters = options.clusters
    if n_clusters is None:
        n_clusters = max(FEWEST_CLUSTERS, min(MOST_CLUSTERS, round(len(points_ND) / ROWS_PER_CLUSTER)))
        n_clusters = min(n_clusters, len(points_ND))
    elif n_clusters > len(points_ND):
        raise InputError(f"clusters={n_clusters} must be between 1 and the {len(points_ND):,} rows that hold numbers")
    learned = even_sample(range(len(points_ND)), max(LEARNED_ROWS, LEARNED_ROWS_PER_CLUSTER * n_clusters))
    start = "k-means++" if n_clusters <= CAREFUL_START_CLUSTERS else "random"
    with work.track("clustering", None, "iterations") as advance:
        assignment = KMeans(n_clusters, start=start).fit(points_ND[learned], seed=options.seed, advance=advance)
    labels_N, _ = assignment.nearest(points_ND)
    order = torch.bincount(labels_N, minlength=n_clusters).argsort(descending=True, stable=True)
    return order.argsort()[labels_N], assignment.centroids_KP[order]


def _with_pictures(collection: Collection, images: ImageSource, work: Work) -> Collection:
    """Return the collection with the pictures of these images, and their labels where the table has none."""
    pictures = pictures_by_name(collection.names, images)
    missing = len(pictures) - pictures.n_found
    if missing:
        work.reporter.warn(f"{missing:,} of {len(pictures):,} names are not among {images.describe()}: they have no picture")
    if collection.label_N is None and pictures.labels_N is not None:
        collection = replace(collection, label_N=pictures.labels_N, label_names=pictures.class_names)
    return replace(collection, images=pictures)
