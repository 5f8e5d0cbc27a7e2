"""Odd ones: files that can't be read, near-duplicates, outliers, clusters that look like collapse; and what to do.

N images, K clusters, M images whose points are known, P components, J neighbours, U outliers.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import from_numpy

from deepcluster.clustering.near import NEAR_SHARE, typical_distance
from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.core.text import count_of
from deepcluster.core.work import Advance, no_advance
from deepcluster.visualization.report.collection import Collection, Floats, Integers
from deepcluster.visualization.report.gallery.rows import Listing, Similar
from deepcluster.visualization.report.page import Blob, Section, asset, render, shown

# Points that are compared, all with all: 20,000 of 256 components took 2.8 s on a core.
MOST_POINTS: Final = 20_000
NEIGHBOURS: Final = 10
# A cluster needs this many images before one of them can be far from the others.
LEAST_SIZE: Final = 5
GIANT_SHARE: Final = 0.5
# What is shown: thumbnails of a set of duplicates, sets, names of files, clusters in a sentence.
MOST_OF_SET, MOST_SETS, MOST_UNREADABLE, MOST_CLUSTERS = 8, 30, 100, 40


@dataclass(frozen=True)
class Duplicates:
    """Images that are nearly the same: each is near to another of the set.

    Attributes:
        indices: all its images, ascending.
        distances: of each to its nearest in the set; 0 for the same pixels.
    """

    indices: Integers
    distances: Floats

    @property
    def distance(self) -> float:
        """The largest of the distances."""
        return float(self.distances.max())


@dataclass(frozen=True)
class Outliers:
    """Images that are far away, the farthest first.

    Attributes:
        indices_U: the images.
        ratios_U: distance of each, as a multiple of what is usual.
    """

    indices_U: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    ratios_U: Floats = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Odd:
    """What was found; indices are of images.

    Attributes:
        n_compared: number of points that were compared with each other.
        near: distance up to which images are near-duplicates.
        duplicates: sets, the nearest first, and of equally near ones the largest.
        outliers: images farthest from all others, by the mean distance to their nearest ones.
        cluster_outliers: images farthest from the centre of their cluster.
        similar: the images that were compared, and for each its nearest ones (indices of images); None of fewer than two.
        giants, singletons, empty, copies: clusters with more than half of the images, one image, none, only copies.
    """

    n_compared: int = 0
    near: float = 0.0
    duplicates: Sequence[Duplicates] = ()
    outliers: Outliers = field(default_factory=Outliers)
    cluster_outliers: Outliers = field(default_factory=Outliers)
    similar: Similar | None = None
    giants: Sequence[int] = ()
    singletons: Sequence[int] = ()
    empty: Sequence[int] = ()
    copies: Sequence[int] = ()

    def images(self) -> Integers:
        """Return the images that the section shows; the page should list them."""
        sets = [one.indices[:MOST_OF_SET] for one in self.duplicates[:MOST_SETS]]
        found = np.concatenate([self.outliers.indices_U, self.cluster_outliers.indices_U, *sets])
        return np.unique(found).astype(np.int64)


def find_odd(collection: Collection, *, most: int = 60, advance: Advance = no_advance) -> Odd:
    """Find what is odd among the images whose points are known, and among the clusters.

    Args:
        most: largest number of outliers of each kind.
        advance: called with the number of images that have been compared; may raise to stop.
    """
    indices_M, points_MP = np.zeros(0, np.int64), np.zeros((0, 1), np.float32)
    if collection.points_MP.size:
        finite = np.flatnonzero(np.isfinite(collection.points_MP).all(axis=1))
        if len(finite) > MOST_POINTS:
            finite = finite[np.arange(MOST_POINTS) * len(finite) // MOST_POINTS]
        indices_M, points_MP = collection.sample_M[finite], collection.points_MP[finite]
    distances_MJ, neighbours_MJ = np.zeros((len(points_MP), 0), np.float32), np.zeros((len(points_MP), 0), np.int64)
    if len(points_MP) > 1:
        points, k = from_numpy(np.ascontiguousarray(points_MP)), min(NEIGHBOURS, len(points_MP) - 1)
        nearest = nearest_neighbours(points, points, k=k, exclude_self=True, advance=advance)
        distances_MJ, neighbours_MJ = (one.numpy() for one in nearest)
    near = NEAR_SHARE * typical_distance(points_MP)
    duplicates = _duplicates(indices_M, distances_MJ, neighbours_MJ, near)
    sizes_K = collection.sizes_K()
    is_giant_K = sizes_K > GIANT_SHARE * max(1, int(sizes_K.sum()))
    # Clusters of several images, all of which were compared and are in one set of duplicates.
    copies: list[int] = []
    for one in duplicates:
        cluster, counts = np.unique(collection.cluster_N[one.indices], return_counts=True)
        copies += cluster[(cluster >= 0) & (counts > 1) & (counts == sizes_K[cluster])].tolist()
    return Odd(
        n_compared=len(indices_M),
        near=near,
        duplicates=duplicates,
        outliers=_outliers(indices_M, distances_MJ, most),
        cluster_outliers=_cluster_outliers(collection, most),
        similar=(indices_M, indices_M[neighbours_MJ]) if neighbours_MJ.size else None,
        giants=np.flatnonzero(is_giant_K).tolist() if collection.n_clusters > 1 else (),
        singletons=np.flatnonzero(sizes_K == 1).tolist(),
        empty=np.flatnonzero(sizes_K == 0).tolist(),
        copies=sorted(copies),
    )


def _duplicates(
    indices_M: Integers, distances_MJ: NDArray[np.float32], neighbours_MJ: Integers, near: float
) -> list[Duplicates]:
    """Return the sets of points that are connected by neighbours within `near`.

    Exact while a point has at most J near ones; a larger set could fall apart, but hardly does: of equal distances all
    points choose the same neighbours.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, columns = np.nonzero(distances_MJ <= near)
    if len(rows) == 0:
        return []
    ends = (rows, neighbours_MJ[rows, columns])
    graph = coo_array((np.ones(len(rows), np.int8), ends), shape=(len(indices_M), len(indices_M)))
    set_M = connected_components(graph, directed=False)[1]
    members = np.flatnonzero(np.bincount(set_M)[set_M] > 1)
    members = members[np.argsort(set_M[members], kind="stable")]
    starts = np.flatnonzero(np.diff(set_M[members], prepend=-1))
    sets = np.split(members, starts[1:])
    # Indices ascend, and the order of a set's members is kept (stable).
    found = [Duplicates(indices_M[one], distances_MJ[one, 0].astype(np.float64)) for one in sets]
    return sorted(found, key=lambda one: (one.distance, -len(one.indices), int(one.indices[0])))


def _outliers(indices_M: Integers, distances_MJ: NDArray[np.float32], most: int) -> Outliers:
    """Return images by the mean distance to their nearest others, farthest first: at most one in twenty.

    Several neighbours, so that a copy of an outlier does not hide it.
    """
    if distances_MJ.shape[1] == 0:
        return Outliers()
    mean_M = distances_MJ.mean(axis=1, dtype=np.float64)
    order = np.argsort(-mean_M, kind="stable")[: min(most, max(1, len(mean_M) // 20))]
    median = float(np.median(mean_M))
    # None is an outlier where all images are equally far from each other.
    order = order[mean_M[order] > median * (1 + 1e-6)]
    return Outliers(indices_M[order], _ratios(mean_M[order], np.full(len(order), median)))


def _cluster_outliers(collection: Collection, most: int) -> Outliers:
    """Return images by distance to their centre, as a multiple of their cluster's median; of all images, not the sample."""
    known = np.flatnonzero((collection.cluster_N >= 0) & np.isfinite(collection.distance_N))
    cluster, distance = collection.cluster_N[known], collection.distance_N[known].astype(np.float64)
    order = np.lexsort((distance, cluster))
    cluster, distance, known = cluster[order], distance[order], known[order]
    sizes_K = np.bincount(cluster, minlength=collection.n_clusters)
    first_K = np.cumsum(sizes_K) - sizes_K
    middle = np.minimum(first_K + sizes_K // 2, max(0, len(distance) - 1))
    median_K = distance[middle] if len(distance) else np.zeros(collection.n_clusters)
    candidates = np.flatnonzero((sizes_K[cluster] >= LEAST_SIZE) & (distance > median_K[cluster] * (1 + 1e-6)))
    ratios = _ratios(distance[candidates], median_K[cluster[candidates]])
    chosen = np.lexsort((known[candidates], -ratios))[: min(most, max(1, len(known) // 20))]
    return Outliers(known[candidates[chosen]], ratios[chosen])


def _ratios(values: Floats, units: Floats) -> Floats:
    """Return quotients; infinite where the unit is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(units > 0, values / units, np.inf)


def odd_section(collection: Collection, odd: Odd, listing: Listing, complaint: str | None = None) -> Section:
    """Return the section, in words and thumbnails."""
    if odd.n_compared < 2:
        scope = "Near-duplicates and outliers need the features of the images, which are not at hand."
    elif odd.n_compared == int(collection.sizes_K().sum()):
        scope = f"All {odd.n_compared:,} images that could be read were compared with each other, by their features."
        if odd.n_compared == len(collection):
            scope = f"All {odd.n_compared:,} images were compared with each other, by their features."
    else:
        scope = (
            f"{odd.n_compared:,} of {len(collection):,} images were compared with each other, by their features; duplicates "
            "and outliers among the others are not found here."
        )
    blobs = {"duplicates": Blob(duplicates_table(collection, odd).encode())} if odd.duplicates else {}
    html = render(
        "odd.html.jinja",
        complaint=complaint,
        scope=scope,
        odd=odd,
        most_clusters=MOST_CLUSTERS,
        n_assigned=int(collection.sizes_K().sum()),
        unreadable=[(shown(name), shown(why)) for name, why in islice(collection.unreadable.items(), MOST_UNREADABLE)],
        n_unreadable=len(collection.unreadable),
        duplicates=[_set_of_duplicates(collection, listing, one) for one in odd.duplicates[:MOST_SETS]],
        n_sets=len(odd.duplicates),
        n_copies=sum(len(one.indices) - 1 for one in odd.duplicates),
        near=f"{odd.near:.2g}",
        share=f"{NEAR_SHARE:.0%}",
        compared=odd.n_compared > 1,
        neighbours=min(NEIGHBOURS, max(1, odd.n_compared - 1)),
        outliers=_shown_outliers(collection, listing, odd.outliers),
        cluster_outliers=_shown_outliers(collection, listing, odd.cluster_outliers),
    )
    return Section("odd", "Odd ones", html, blobs, scripts=(asset("odd.js"),))


def duplicates_table(collection: Collection, odd: Odd) -> str:
    """Return all near-duplicates as CSV: group, name, distance to the nearest of the group, and one of each to keep."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("group", "name", "distance", "keep"))
    for group, one in enumerate(odd.duplicates, start=1):
        for place, (index, distance) in enumerate(zip(one.indices.tolist(), one.distances.tolist(), strict=True)):
            table.writerow((group, shown(collection.names[index]), f"{distance:.6g}", "no" if place else "yes"))
    return text.getvalue()


def _image(collection: Collection, listing: Listing, index: int) -> dict[str, Any]:
    row = int(listing.row_of(np.array([index]))[0])
    return {"name": shown(collection.names[index]), "row": row, "cluster": int(collection.cluster_N[index])}


def _set_of_duplicates(collection: Collection, listing: Listing, one: Duplicates) -> dict[str, Any]:
    words = "the same to the network" if one.distance == 0 else f"up to {one.distance:.2g} apart"
    clusters = len(np.unique(collection.cluster_N[one.indices]))
    words += f", in {count_of(clusters, 'cluster')}" if clusters > 1 else ", all in one cluster"
    if collection.label_N is not None:
        labels = len(np.unique(collection.label_N[one.indices]))
        words += f", under {labels:,} different labels" if labels > 1 else ", under one label"
    return {
        "count": count_of(len(one.indices), "image"),
        "words": words,
        "images": [_image(collection, listing, int(index)) for index in one.indices[:MOST_OF_SET]],
        "more": max(0, len(one.indices) - MOST_OF_SET),
    }


def _shown_outliers(collection: Collection, listing: Listing, outliers: Outliers) -> list[dict[str, Any]]:
    ratios = [f"{ratio:.2f} ×" if np.isfinite(ratio) else "the others are copies" for ratio in outliers.ratios_U.tolist()]
    images = [_image(collection, listing, index) for index in outliers.indices_U.tolist()]
    return [{**image, "times": ratio} for image, ratio in zip(images, ratios, strict=True)]
