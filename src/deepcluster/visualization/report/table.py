"""Any table of embeddings, or of clusters, as a report shows it: `deepcluster report FEATURES.parquet`.

Rows are scaled to unit length before they are clustered, as is usual for embeddings of any origin. (On the features of a
small AlexNet of 4,500 Imagenette photos in 50 clusters that gave an NMI to the classes of 0.194; PCA to 64 with whitening,
which training uses, 0.183.)
N rows, D numbers of an embedding, K clusters.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from deepcluster.clustering.assignment import UNASSIGNED, cluster_means, member_distances
from deepcluster.clustering.kmeans import KMeans
from deepcluster.core.errors import InputError
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource
from deepcluster.data.survey import even_sample
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.named_pictures import pictures_by_name
from deepcluster.visualization.report.table_columns import cluster_numbers, embeddings, find_columns, label_numbers

MISSING = "its embedding is missing"
NOT_FINITE = "its embedding holds values that are not finite numbers"
NO_CLUSTER = "the table has it in no cluster"
# Without --clusters: about this many rows per cluster, and as many clusters as a user can look through.
ROWS_PER_CLUSTER, FEWEST_CLUSTERS, MOST_CLUSTERS = 90, 2, 100
# Above it, a pass over the points for each cluster takes longer than the iterations.
CAREFUL_START_CLUSTERS = 1_000
# Points that map and odd ones may draw from.
MOST_POINTS = 20_000


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
    columns = find_columns(path, files, options)
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


def _with_embeddings(
    collection: Collection, column: pa.ChunkedArray, path: Path, options: ReportOptions, work: Work
) -> Collection:
    """Return the collection with clusters of its embeddings, or with the centroids of the clusters that it has."""
    points_ND, missing_N = embeddings(column, path)
    faulty_N = points_ND[:, 0].isnan().numpy()
    faults = np.flatnonzero(faulty_N).tolist()
    unreadable = {collection.names[row]: MISSING if missing_N[row] else NOT_FINITE for row in faults}
    if collection.table:
        labels_N = torch.from_numpy(np.where(faulty_N, UNASSIGNED, collection.cluster_N))
        used_N = labels_N >= 0
        centroids_KD = cluster_means(points_ND[used_N], labels_N[used_N], collection.n_clusters)
        distances_N = torch.full((len(labels_N),), torch.nan)
        distances_N[used_N] = member_distances(points_ND[used_N], labels_N[used_N], centroids_KD)
    else:
        labels_N, distances_N, centroids_KD = cluster(points_ND, options, work)
    sample = even_sample(np.flatnonzero(labels_N >= 0).tolist(), MOST_POINTS)
    return replace(
        collection,
        cluster_N=labels_N.numpy(),
        distance_N=distances_N.numpy(),
        n_clusters=len(centroids_KD),
        centroids_KP=centroids_KD,
        sample_M=np.array(sample, np.int64),
        points_MP=points_ND[sample].numpy(),
        unreadable=unreadable,
    )


def cluster(points_ND: Tensor, options: ReportOptions, work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels (N), distances (N) and centroids (K, D) of k-means, the largest cluster first."""
    n_usable = int((~points_ND[:, 0].isnan()).sum())
    usual = max(FEWEST_CLUSTERS, min(MOST_CLUSTERS, round(n_usable / ROWS_PER_CLUSTER)))
    n_clusters = options.clusters or min(usual, n_usable)
    if n_clusters > n_usable:
        raise InputError(f"clusters={n_clusters} must be between 1 and the {n_usable:,} rows that hold numbers")
    start = "k-means++" if n_clusters <= CAREFUL_START_CLUSTERS else "random"
    with work.track("clustering", None, "iterations") as advance:
        found = KMeans(n_clusters, start=start).fit(points_ND, seed=options.seed, advance=advance)
    order = found.sizes_K().argsort(descending=True, stable=True)
    labels_N = torch.where(found.labels_N >= 0, order.argsort()[found.labels_N], UNASSIGNED)
    return labels_N, found.distances_N, found.centroids_KP[order]


def _with_pictures(collection: Collection, images: ImageSource, work: Work) -> Collection:
    """Return the collection with the pictures of these images, and their labels where the table has none."""
    pictures = pictures_by_name(collection.names, images)
    missing = len(pictures) - pictures.n_found
    if missing:
        work.reporter.warn(f"{missing:,} of {len(pictures):,} names are not among {images.describe()}: they have no picture")
    if collection.label_N is None and pictures.labels_N is not None:
        collection = replace(collection, label_N=pictures.labels_N, label_names=pictures.class_names)
    return replace(collection, images=pictures)
