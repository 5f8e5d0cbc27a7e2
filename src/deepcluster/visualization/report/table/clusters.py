"""The rows of a table in clusters: those of k-means, or those that the table has.

N rows, B rows of a batch, D numbers of an embedding, S rows that are kept, U usable ones, M points of the map, K clusters.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import UNASSIGNED, member_distances
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.nearest import nearest_centroids
from deepcluster.core.errors import InputError
from deepcluster.visualization.report.table.reader import Budget, TableReader

# Without --clusters: about so many rows a cluster, and as many clusters as a person can look through.
ROWS_A_CLUSTER, FEWEST_CLUSTERS, MOST_CLUSTERS = 90, 2, 100
# k-means learns its centroids of this many rows, or of more where there are many clusters; all rows are assigned to them.
LEARNED_ROWS, LEARNED_ROWS_A_CLUSTER = 100_000, 256
# Above it, a pass over the points for each cluster takes longer than the iterations.
CAREFUL_START_CLUSTERS = 1_000


@dataclass(frozen=True)
class Held:
    """The rows that are kept in memory.

    Attributes:
        rows_S: their numbers, ascending.
        points_SD: of unit length; NaN where there is none.
        whole: whether these are all rows.
        faults: rows without a point: whether there is no embedding at all.
    """

    rows_S: NDArray[np.int64]
    points_SD: Tensor
    whole: bool
    faults: dict[int, bool]


def hold(reader: TableReader, n_clusters: int, seed: int) -> Held:
    """One pass: all rows where they fit into the budget, else as many of them, drawn, as k-means and map need."""
    n_rows, faults = reader.table.rows, dict[int, bool]()
    rows_S, points_SD = np.zeros(0, np.int64), torch.zeros(0)
    for start, points_BD, missing_B in reader.embeddings("reading embeddings"):
        if reader.width is not None:
            if not len(rows_S):
                rows_S = _drawn(n_rows, reader.width, n_clusters, reader.budget, seed)
                points_SD = torch.full((len(rows_S), reader.width), torch.nan, device=reader.device)
            first, end = np.searchsorted(rows_S, (start, start + len(points_BD)))
            points_SD[first:end] = points_BD[torch.from_numpy(rows_S[first:end] - start).to(reader.device)]
        bad = points_BD[:, 0].isnan().nonzero().flatten().tolist()
        faults.update({start + row: bool(missing_B[row]) for row in bad})
    if len(faults) == n_rows:
        raise InputError(f"{reader.table.path}: none of the {n_rows:,} rows of {reader.columns.embedding} holds numbers")
    return Held(rows_S, points_SD, len(rows_S) == n_rows, faults)


def _drawn(n_rows: int, width: int, n_clusters: int, budget: Budget, seed: int) -> NDArray[np.int64]:
    """Numbers of the rows to keep, ascending."""
    fitting = max(1, budget.memory_bytes // (4 * width))
    if n_rows <= fitting:
        return np.arange(n_rows)
    needed = max(LEARNED_ROWS, LEARNED_ROWS_A_CLUSTER * n_clusters, budget.most_points)
    drawn = np.random.default_rng(seed).choice(n_rows, min(fitting, needed, n_rows), replace=False, shuffle=False)
    return np.sort(drawn)


def _parts(reader: TableReader, held: Held, what: str) -> Iterator[tuple[int, Tensor]]:
    """First row and points of all rows: those that are kept, or a pass over the table."""
    if held.whole:
        yield 0, held.points_SD
        return
    for start, points_BD, _ in reader.embeddings(what):
        yield start, points_BD


def usual_clusters(n_rows: int) -> int:
    return max(FEWEST_CLUSTERS, min(MOST_CLUSTERS, round(n_rows / ROWS_A_CLUSTER)))


def learn(reader: TableReader, held: Held, clusters: int | None, seed: int) -> Tensor:
    """Centroids (K, D) of k-means on the rows that are kept, or on as many of them as are needed."""
    usable = (~held.points_SD[:, 0].isnan()).nonzero().flatten()
    n_rows = reader.table.rows - len(held.faults)
    n_clusters = min(usual_clusters(n_rows), len(usable)) if clusters is None else clusters
    if not 1 <= n_clusters <= len(usable):
        raise InputError(
            f"clusters={n_clusters} must be between 1 and the {len(usable):,} rows that hold numbers"
            f"{'' if held.whole else ' and fit into memory'}"
        )
    most = max(LEARNED_ROWS, LEARNED_ROWS_A_CLUSTER * n_clusters)
    if len(usable) > most:
        chosen = np.random.default_rng(seed).choice(len(usable), most, replace=False)
        usable = usable[torch.from_numpy(np.sort(chosen)).to(usable.device)]
    start = "k-means++" if n_clusters <= CAREFUL_START_CLUSTERS else "random"
    kmeans = KMeans(n_clusters, start=start)
    with reader.reporter.track("clustering", kmeans.most_steps, "iterations") as progress:

        def advance(units: int) -> None:
            progress(units)
            reader.check()

        return kmeans.fit(held.points_SD[usable], seed=seed, advance=advance).centroids_KP


def means(reader: TableReader, held: Held, cluster_N: NDArray[np.int64], n_clusters: int) -> Tensor:
    """Mean (K, D) of the rows of each cluster; zeros where it is empty."""
    sums_KD = torch.zeros(n_clusters, held.points_SD.shape[1], dtype=torch.float64)
    sizes_K = torch.zeros(n_clusters, dtype=torch.int64)
    for start, points_BD in _parts(reader, held, "averaging"):
        labels_B = torch.from_numpy(cluster_N[start : start + len(points_BD)])
        for block_BD, labels in zip(points_BD.split(8192), labels_B.split(8192), strict=True):
            block_BD = block_BD.cpu()
            used = (labels >= 0) & ~block_BD[:, 0].isnan()
            sums_KD.index_add_(0, labels[used], block_BD[used].double())
            sizes_K += torch.bincount(labels[used], minlength=n_clusters)
    return sums_KD.div_(sizes_K.clamp(min=1)[:, None]).float()


def assign(
    reader: TableReader, held: Held, centroids_KD: Tensor, given_N: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Cluster and distance of each row: of the nearest centroid, or of the cluster that is given."""
    n_rows, centroids_KD = reader.table.rows, centroids_KD.to(reader.device)
    cluster_N = np.full(n_rows, UNASSIGNED, np.int64)
    distance_N = np.full(n_rows, np.nan, np.float32)
    for start, points_BD in _parts(reader, held, "assigning"):
        usable_B = ~points_BD[:, 0].isnan().cpu()
        if given_N is not None:
            usable_B &= torch.from_numpy(given_N[start : start + len(points_BD)] >= 0)
        rows = start + usable_B.nonzero().flatten().numpy()
        points_UD = points_BD[usable_B.to(points_BD.device)]
        if given_N is None:
            labels, squares = nearest_centroids(points_UD, centroids_KD)
            cluster_N[rows], distance_N[rows] = labels.cpu().numpy(), squares.sqrt().cpu().numpy()
        else:
            labels = torch.from_numpy(given_N[rows]).to(points_UD.device)
            cluster_N[rows] = given_N[rows]
            distance_N[rows] = member_distances(points_UD, labels, centroids_KD).cpu().numpy()
    return cluster_N, distance_N


def from_the_largest(cluster_N: NDArray[np.int64], centroids_KD: Tensor) -> tuple[NDArray[np.int64], Tensor]:
    """The same clusters, 0 the largest."""
    sizes_K = np.bincount(cluster_N[cluster_N >= 0], minlength=len(centroids_KD))
    order = np.argsort(-sizes_K, kind="stable")
    number_K = np.argsort(order)
    return np.where(cluster_N >= 0, number_K[cluster_N], UNASSIGNED), centroids_KD[torch.from_numpy(order)]


def points(held: Held, cluster_N: NDArray[np.int64], most: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows of the map, ascending, spread evenly over those that are kept and clustered; and their points."""
    usable = np.flatnonzero(cluster_N[held.rows_S] >= 0)
    if len(usable) > most:
        usable = usable[np.arange(most) * len(usable) // most]
    return held.rows_S[usable], held.points_SD[torch.from_numpy(usable).to(held.points_SD.device)].cpu().numpy()
