"""Any table of embeddings, or of clusters, as a report shows it: `deepcluster report FEATURES.parquet`.

Rows are scaled to unit length before they are grouped, as is usual for embeddings of any origin. (On the features of a
small AlexNet of 4,500 Imagenette photos in 50 clusters that gave an NMI to the classes of 0.194; PCA to 64 with whitening,
which training uses, 0.183.)
N rows, D numbers of an embedding, M points of the map, K clusters.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.data.sources import ImageSource
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.table import clusters as table_clusters
from deepcluster.visualization.report.table.columns import find_columns
from deepcluster.visualization.report.table.files import open_table
from deepcluster.visualization.report.table.pictures import pictures_by_name
from deepcluster.visualization.report.table.reader import Budget, Facts, TableReader

MISSING = "its embedding is missing"
NO_CLUSTER = "the table has it in no cluster"
NOT_FINITE = "its embedding holds values that are not finite numbers"


def read_table(
    path: Path,
    *,
    clusters: int | None = None,
    embedding_column: str | None = None,
    cluster_column: str | None = None,
    label_column: str | None = None,
    name_column: str | None = None,
    images: ImageSource | None = None,
    seed: int = 31,
    reporter: Reporter,
    check: Callable[[], None] = lambda: None,
    budget: Budget | None = None,
    device: torch.device | None = None,
) -> Collection:
    """A table as images in clusters: with the clusters that it has, or else with those of k-means.

    Args:
        path: a Parquet file or a folder of them; .npz, or .npy with the names beside as `embed` writes them; or a .csv or
            .tsv of clusters.
        clusters: group the embeddings into so many, whatever clusters the table has; by default as many as it has, or about
            one for 90 rows, 2 to 100.
        embedding_column, cluster_column, label_column, name_column: by default those with usual names.
        images: where pictures are looked for, by name.
        check: called now and then; may raise to stop.
        budget: of memory; a larger table is read twice.
        device: where rows are compared; the processor by default.

    Returns:
        what a report shows. Distances are Euclidean, between rows of unit length and the mean of their cluster; those of a
        table without embeddings are its own. Clusters of k-means are numbered from the largest.

    Raises:
        InputError: no such table; a column that is missing or could be one of several (all are listed); embeddings of
            different lengths; more clusters than rows; none of the names is an image's.
    """
    table = open_table(path)
    columns = find_columns(
        table,
        embedding=embedding_column,
        cluster=cluster_column,
        label=label_column,
        name=name_column,
        regroup=clusters is not None,
    )
    reporter.say(f"{path}: {table.rows:,} rows; {columns.describe()}")
    reader = TableReader(table, columns, reporter, check, budget or Budget(), device or torch.device("cpu"))
    found = reader.facts()
    if columns.embedding is None:
        collection = _without_embeddings(found, path)
    else:
        collection = _with_embeddings(reader, found, path, clusters, seed)
    return _with_pictures(collection, images, reporter) if images is not None else collection


def _without_embeddings(found: Facts, path: Path) -> Collection:
    if found.cluster_N is None:
        raise RuntimeError("a table needs embeddings or clusters")
    distance_N = np.full(len(found.names), np.nan, np.float32) if found.distance_N is None else found.distance_N
    distance_N = np.where(found.cluster_N >= 0, distance_N, np.nan).astype(np.float32)
    n_clusters = int(found.cluster_N.max(initial=-1)) + 1
    outside = {found.names[row]: NO_CLUSTER for row in np.flatnonzero(found.cluster_N < 0).tolist()}
    collection = _collection(found, path, found.cluster_N, distance_N, n_clusters, table=path.name)
    return replace(collection, unreadable=outside)


def _with_embeddings(reader: TableReader, found: Facts, path: Path, clusters: int | None, seed: int) -> Collection:
    held = table_clusters.hold(reader, clusters or table_clusters.usual_clusters(len(found.names)), seed)
    unreadable = {found.names[row]: MISSING if missing else NOT_FINITE for row, missing in held.faults.items()}
    if found.cluster_N is not None:
        n_clusters = int(found.cluster_N.max(initial=-1)) + 1
        centroids_KD = table_clusters.means(reader, held, found.cluster_N, n_clusters)
        given_N: NDArray[np.int64] | None = found.cluster_N
    else:
        centroids_KD = table_clusters.learn(reader, held, clusters, seed)
        given_N = None
    cluster_N, distance_N = table_clusters.assign(reader, held, centroids_KD, given_N)
    if given_N is None:
        cluster_N, centroids_KD = table_clusters.from_the_largest(cluster_N, centroids_KD)
    sample_M, points_MD = table_clusters.points(held, cluster_N, reader.budget.most_points)
    collection = _collection(
        found, path, cluster_N, distance_N, len(centroids_KD), table=path.name if given_N is not None else ""
    )
    return replace(
        collection,
        centroids_KP=centroids_KD.cpu(),
        sample_M=sample_M,
        points_MP=points_MD,
        unreadable=unreadable,
    )


def _collection(
    found: Facts, path: Path, cluster_N: NDArray[np.int64], distance_N: NDArray[np.float32], n_clusters: int, *, table: str
) -> Collection:
    if not (cluster_N >= 0).any():
        raise InputError(f"{path}: no row is in a cluster")
    return Collection(
        title=path.name,
        names=found.names,
        cluster_N=cluster_N,
        distance_N=distance_N,
        n_clusters=n_clusters,
        label_N=found.labels.number_N if found.labels else None,
        label_names=found.labels.names if found.labels else (),
        table=table,
    )


def _with_pictures(collection: Collection, images: ImageSource, reporter: Reporter) -> Collection:
    """The collection with the pictures of these images, and their labels where the table has none."""
    pictures = pictures_by_name(collection.names, images)
    missing = len(pictures) - pictures.n_found
    if missing:
        reporter.warn(f"{missing:,} of {len(pictures):,} names are not among {images.describe()}: they have no picture")
    collection = replace(collection, images=pictures)
    if collection.label_N is None and pictures.labels_N is not None:
        collection = replace(collection, label_N=pictures.labels_N, label_names=pictures.class_names)
    return collection
