"""Odd ones: files that can't be read, near-duplicates, outliers, and clusters that look like collapse.

N images, K clusters, M images whose points are known, P components, J neighbours, U listed images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.visualization.report.collection import Collection

# Points that are compared, all with all: 20,000 of 256 components took 2.8 s on a core.
MOST_POINTS: Final = 20_000
NEIGHBOURS: Final = 10
# Two images are near-duplicates below this share of the typical distance of two images. Measured on 80 photos of a trained
# run (4,500 of 48 px, 64 whitened components, typical distance 1.41): the same bytes or a PNG of them lie at 0; saved again
# as JPEG (quality 75 or 95) at 0.015 at most, at half the size at 0.021; with 1 % cut off each side at 0.059 (median); the
# two nearest of different photos at 0.159. Here 0.028.
NEAR_SHARE: Final = 0.02
# A cluster needs so many images before one of them can be far from the others.
LEAST_SIZE: Final = 5
GIANT_SHARE: Final = 0.5
# Thumbnails of a group of duplicates, and groups of them.
MOST_OF_GROUP: Final = 8
MOST_GROUPS: Final = 30


@dataclass(frozen=True)
class Duplicates:
    """Images that are nearly the same: each is near to another of the group.

    Attributes:
        indices: of all its images, ascending.
        distance: largest distance from an image to its nearest in the group; 0 for the same pixels.
    """

    indices: NDArray[np.int64]
    distance: float


@dataclass(frozen=True)
class Odd:
    """What was found; indices are of images.

    Attributes:
        n_compared: points that were compared with each other.
        near: distance up to which images are near-duplicates.
        duplicates: groups, the nearest first, and of equals the largest.
        lonely_U, loneliness_U: images farthest from all others, and the mean distance to their nearest ones, as a multiple
            of the median image's.
        strays_U, straying_U: images farthest from the centre of their cluster, as a multiple of its median distance.
        giants, single, empty, copies: clusters that hold more than half of the images, one image, none, copies alone.
    """

    n_compared: int = 0
    near: float = 0.0
    duplicates: Sequence[Duplicates] = ()
    lonely_U: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    loneliness_U: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    strays_U: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    straying_U: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    giants: Sequence[int] = ()
    single: Sequence[int] = ()
    empty: Sequence[int] = ()
    copies: Sequence[int] = ()

    def images(self) -> NDArray[np.int64]:
        """Indices of the images that the section shows; the page should list them."""
        groups = [group.indices[:MOST_OF_GROUP] for group in self.duplicates[:MOST_GROUPS]]
        found: NDArray[np.int64] = np.unique(np.concatenate([self.lonely_U, self.strays_U, *groups])).astype(np.int64)
        return found


def find_odd(collection: Collection, *, most: int = 60, check: Callable[[], None] = lambda: None) -> Odd:
    """Look for what is odd among the images whose points are known, and among the clusters.

    Args:
        most: outliers of each kind, at most.
        check: called while points are compared; may raise to stop.
    """
    indices_M, points_MP = _comparable(collection)
    distances_MJ, neighbours_MJ = _nearest(points_MP, check)
    near = NEAR_SHARE * typical_distance(points_MP)
    groups = _groups(indices_M, distances_MJ, neighbours_MJ, near)
    lonely_U, loneliness_U = _lonely(indices_M, distances_MJ, most)
    strays_U, straying_U = _strays(collection, most)
    sizes_K = collection.sizes_K()
    n_assigned = max(1, int(sizes_K.sum()))
    return Odd(
        n_compared=len(indices_M),
        near=near,
        duplicates=groups,
        lonely_U=lonely_U,
        loneliness_U=loneliness_U,
        strays_U=strays_U,
        straying_U=straying_U,
        giants=np.flatnonzero(sizes_K > GIANT_SHARE * n_assigned).tolist() if collection.n_clusters > 1 else (),
        single=np.flatnonzero(sizes_K == 1).tolist(),
        empty=np.flatnonzero(sizes_K == 0).tolist(),
        copies=_clusters_of_copies(collection, indices_M, groups),
    )


def typical_distance(points_MP: NDArray[np.float32]) -> float:
    """Root of the mean squared distance of two points drawn at random: √2 times their spread about the mean."""
    if len(points_MP) == 0:
        return 0.0
    return float(np.sqrt(2 * np.var(points_MP, axis=0, dtype=np.float64).sum()))


def _comparable(collection: Collection) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Images with finite points, and the points: all, or `MOST_POINTS` spread evenly."""
    if collection.points_MP.size == 0:
        return np.zeros(0, np.int64), np.zeros((0, 1), np.float32)
    finite = np.flatnonzero(np.isfinite(collection.points_MP).all(axis=1))
    if len(finite) > MOST_POINTS:
        finite = finite[np.arange(MOST_POINTS) * len(finite) // MOST_POINTS]
    return collection.sample_M[finite], collection.points_MP[finite]


def _nearest(points_MP: NDArray[np.float32], check: Callable[[], None]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Distances_MJ and places_MJ of each point's nearest others."""
    from torch import from_numpy

    from deepcluster.clustering.neighbours import nearest_neighbours

    k = min(NEIGHBOURS, len(points_MP) - 1)
    if k < 1:
        return np.zeros((len(points_MP), 0), np.float32), np.zeros((len(points_MP), 0), np.int64)
    points = from_numpy(np.ascontiguousarray(points_MP))
    distances, places = nearest_neighbours(points, points, k=k, exclude_self=True, advance=lambda _: check())
    return distances.numpy(), places.numpy()


def _groups(
    indices_M: NDArray[np.int64], distances_MJ: NDArray[np.float32], neighbours_MJ: NDArray[np.int64], near: float
) -> list[Duplicates]:
    """Points joined to their neighbours within `near`; who is joined to one is in its group.

    Exact while a point has no more than J near ones; a larger group could fall apart, and hardly does: of equal distances
    all points choose the same neighbours.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    close_MJ = distances_MJ <= near
    rows, columns = np.nonzero(close_MJ)
    if len(rows) == 0:
        return []
    ends = (rows, neighbours_MJ[rows, columns])
    graph = coo_array((np.ones(len(rows), np.int8), ends), shape=(len(indices_M), len(indices_M)))
    group_M = connected_components(graph, directed=False)[1]
    members = np.flatnonzero(np.bincount(group_M)[group_M] > 1)
    members = members[np.argsort(group_M[members], kind="stable")]
    starts = np.flatnonzero(np.diff(group_M[members], prepend=-1))
    groups = [
        Duplicates(np.sort(indices_M[places]), float(distances_MJ[places, 0].max()))
        for places in np.split(members, starts[1:])
    ]
    return sorted(groups, key=lambda group: (group.distance, -len(group.indices), int(group.indices[0])))


def _lonely(
    indices_M: NDArray[np.int64], distances_MJ: NDArray[np.float32], most: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Images by the mean distance to their nearest others, farthest first: one in twenty at most.

    Several neighbours, so that a copy of an outlier does not hide it.
    """
    if distances_MJ.shape[1] == 0:
        return np.zeros(0, np.int64), np.zeros(0)
    mean_M = distances_MJ.mean(axis=1, dtype=np.float64)
    order = np.argsort(-mean_M, kind="stable")[: min(most, max(1, len(mean_M) // 20))]
    median = float(np.median(mean_M))
    # Of images that are all equally far from each other none is an outlier.
    order = order[mean_M[order] > median * (1 + 1e-6)]
    return indices_M[order], _multiples(mean_M[order], np.full(len(order), median))


def _strays(collection: Collection, most: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Images by distance to their centre, as a multiple of their cluster's median; among all images, not the sample."""
    known = np.flatnonzero((collection.cluster_N >= 0) & np.isfinite(collection.distance_N))
    cluster, distance = collection.cluster_N[known], collection.distance_N[known].astype(np.float64)
    order = np.lexsort((distance, cluster))
    cluster, distance, known = cluster[order], distance[order], known[order]
    sizes_K = np.bincount(cluster, minlength=collection.n_clusters)
    first_K = np.cumsum(sizes_K) - sizes_K
    middle = np.minimum(first_K + sizes_K // 2, max(0, len(distance) - 1))
    median_K = distance[middle] if len(distance) else np.zeros(collection.n_clusters)
    candidates = np.flatnonzero((sizes_K[cluster] >= LEAST_SIZE) & (distance > median_K[cluster] * (1 + 1e-6)))
    multiples = _multiples(distance[candidates], median_K[cluster[candidates]])
    chosen = np.lexsort((known[candidates], -multiples))[: min(most, max(1, len(known) // 20))]
    return known[candidates[chosen]], multiples[chosen]


def _multiples(values: NDArray[np.float64], units: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quotients; infinite where the unit is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(units > 0, values / units, np.inf)


def _clusters_of_copies(collection: Collection, indices_M: NDArray[np.int64], groups: Sequence[Duplicates]) -> list[int]:
    """Clusters of several images, all of them compared and in one group of duplicates."""
    sizes_K = collection.sizes_K()
    found: set[int] = set()
    for group in groups:
        cluster, counts = np.unique(collection.cluster_N[group.indices], return_counts=True)
        whole = (cluster >= 0) & (counts > 1) & (counts == sizes_K[cluster])
        found.update(cluster[whole].tolist())
    return sorted(found)
