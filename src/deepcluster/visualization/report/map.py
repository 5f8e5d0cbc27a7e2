"""A map: images in two dimensions, by PCA and by t-SNE, such that images with like features lie near each other.

M images whose points are known or that are drawn, P components, K clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.progress import Reporter
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.gallery.rows import Listing
from deepcluster.visualization.report.page import Blob, Section, render

NAME: Final = "map"
# t-SNE is given so many principal components of wider points, as scikit-learn advises.
MOST_COMPONENTS: Final = 50
# The default of scikit-learn; fewer images allow a third of theirs.
PERPLEXITY: Final = 30.0
# Fewer images than this have no neighbourhoods to keep.
LEAST_FOR_TSNE: Final = 5
# Clusters of the table that says the map in words, and how many of the nearest it names.
MOST_TOLD: Final = 200
NEAREST_TOLD: Final = 3


@dataclass(frozen=True)
class Spots:
    """Images with their places.

    Attributes:
        indices_M: of the images, ascending.
        pca_M2: float32, the first two principal components of the points.
        tsne_M2: float32; None where the images are too few, or all alike.
        kept: share of the variance that the two principal components hold.
        n_known: images whose points are known, of which these were drawn.
    """

    indices_M: NDArray[np.int64]
    pca_M2: NDArray[np.float32]
    tsne_M2: NDArray[np.float32] | None
    kept: float
    n_known: int


def map_points(
    collection: Collection,
    *,
    images: int,
    seed: int,
    reporter: Reporter,
    check: Callable[[], None] = lambda: None,
) -> Spots | None:
    """Places of at most `images` images, drawn at random from those whose points are known and finite.

    Every image is as likely as any other, so that a cluster's share of the map is its share of the images.

    Args:
        check: called between the steps; may raise to stop.

    Returns:
        None where no image has a point, or none is asked for.
    """
    if images == 0 or collection.points_MP.size == 0:
        return None
    known = np.flatnonzero(np.isfinite(collection.points_MP).all(axis=1))
    if len(known) == 0:
        return None
    drawn = known
    if len(known) > images:
        drawn = np.sort(np.random.default_rng(seed).choice(known, size=images, replace=False))
    points_MP = collection.points_MP[drawn].astype(np.float32, copy=False)
    with reporter.track("map", 2, "steps") as progress:
        check()
        components_MP, shares = _principal(points_MP, seed)
        progress(1)
        check()
        tsne_M2 = _tsne(components_MP if points_MP.shape[1] > MOST_COMPONENTS else points_MP, seed)
        progress(1)
        check()
    return Spots(collection.sample_M[drawn], _two(components_MP), tsne_M2, float(shares[:2].sum()), len(known))


def _principal(points_MP: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Principal components, `MOST_COMPONENTS` at most, and the share of the variance that each holds (0 without any)."""
    from sklearn.decomposition import PCA

    n_components = min(MOST_COMPONENTS, *points_MP.shape)
    if np.ptp(points_MP, axis=0).max() == 0:
        return np.zeros((len(points_MP), n_components), np.float32), np.zeros(n_components)
    pca = PCA(n_components, random_state=seed)
    return pca.fit_transform(points_MP).astype(np.float32), pca.explained_variance_ratio_


def _two(components_MP: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first two columns; zeros for what is missing."""
    two_M2 = np.zeros((len(components_MP), 2), np.float32)
    two_M2[:, : components_MP.shape[1]] = components_MP[:, :2]
    return two_M2


def _tsne(points_MP: NDArray[np.float32], seed: int) -> NDArray[np.float32] | None:
    from sklearn.manifold import TSNE

    if len(points_MP) < LEAST_FOR_TSNE or points_MP.shape[1] < 2 or np.ptp(points_MP, axis=0).max() == 0:
        return None
    perplexity = min(PERPLEXITY, (len(points_MP) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed, n_jobs=-1)
    places_M2: NDArray[np.float32] = tsne.fit_transform(points_MP).astype(np.float32)
    return places_M2 if np.isfinite(places_M2).all() else None


def map_section(collection: Collection, spots: Spots | None, listing: Listing) -> Section:
    """The section, with what its script (`assets/map.js`) draws. Images that the page does not list are left out."""
    if spots is None:
        return Section(NAME, "Map", render("map.html.jinja", spots=None))
    rows_M = listing.row_of(spots.indices_M)
    here = rows_M >= 0
    blobs = {"map-rows": _packed(rows_M[here], "<i4"), "map-pca": _packed(spots.pca_M2[here], "<f4")}
    if spots.tsne_M2 is not None:
        blobs["map-tsne"] = _packed(spots.tsne_M2[here], "<f4")
    html = render(
        "map.html.jinja",
        spots=spots,
        scope=_scope(collection, spots, int(here.sum())),
        kept=f"{spots.kept:.0%}",
        has_labels=collection.label_N is not None,
        told=_told(collection, spots),
    )
    return Section(NAME, "Map", html, blobs)


def _packed(values: NDArray[Any], kind: str) -> Blob:
    return Blob(np.ascontiguousarray(values.astype(kind)).tobytes())


def _scope(collection: Collection, spots: Spots, count: int) -> str:
    if count == len(collection):
        return f"All {count:,} images, each a dot."
    if count == spots.n_known:
        return f"{count:,} of {len(collection):,} images, each a dot: those whose features are known."
    return f"{count:,} of {len(collection):,} images, each a dot, drawn at random: a large cluster has more of them."


def _told(collection: Collection, spots: Spots) -> list[dict[str, Any]]:
    """The map in words: the clusters with most images on it, and the clusters nearest to each by their mean points."""
    place = np.searchsorted(collection.sample_M, spots.indices_M)
    cluster_M = collection.cluster_N[spots.indices_M]
    sizes_K = np.bincount(cluster_M[cluster_M >= 0], minlength=collection.n_clusters)
    told = np.argsort(-sizes_K, kind="stable")[:MOST_TOLD]
    told = told[sizes_K[told] > 0]
    means = np.array([collection.points_MP[place[cluster_M == cluster]].mean(axis=0, dtype=np.float64) for cluster in told])
    rows = []
    for number, cluster in enumerate(told.tolist()):
        distances = np.linalg.norm(means - means[number], axis=1)
        distances[number] = np.inf
        nearest = told[np.argsort(distances, kind="stable")[: min(NEAREST_TOLD, len(told) - 1)]]
        rows.append({"cluster": cluster, "count": int(sizes_K[cluster]), "nearest": nearest.tolist()})
    return rows
