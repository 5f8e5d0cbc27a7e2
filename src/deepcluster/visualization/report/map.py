"""The map: images in two dimensions, by PCA and by t-SNE, so that images with similar features lie close.

M images whose points are known or that are drawn, P components, K clusters.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.work import Advance, no_advance
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.gallery.rows import Listing
from deepcluster.visualization.report.page import Blob, Section, asset, render

# t-SNE gets this many principal components of wider points, as scikit-learn advises.
MOST_COMPONENTS: Final = 50
PERPLEXITY: Final = 30.0  # The default of scikit-learn; fewer images allow a third of their number.
LEAST_FOR_TSNE: Final = 5  # Fewer images have no neighbourhoods to keep.
# Clusters in the table that describes the map in words, and how many of the nearest ones it names.
MOST_DESCRIBED: Final = 200
NEAREST_NAMED: Final = 3


@dataclass(frozen=True)
class Layout:
    """Images with their places.

    Attributes:
        indices_M: indices of the images, ascending.
        pca_M2: float32, the first two principal components of the points.
        tsne_M2: float32; None where the images are too few, or all alike.
        kept: share of the variance that the two principal components hold.
        n_known: number of images whose points are known, from which these were drawn.
    """

    indices_M: NDArray[np.int64]
    pca_M2: NDArray[np.float32]
    tsne_M2: NDArray[np.float32] | None
    kept: float
    n_known: int


def lay_out(collection: Collection, *, images: int, seed: int, advance: Advance = no_advance) -> Layout | None:
    """Return places of at most `images` images, drawn at random from those whose points are known and finite.

    Every image is drawn with the same probability, so that a cluster's share of the map is its share of the images.

    Args:
        advance: called after each of the two steps; may raise to stop.

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
    components_MP, shares = _principal(points_MP, seed)
    advance(1)
    tsne_M2 = _tsne(components_MP if points_MP.shape[1] > MOST_COMPONENTS else points_MP, seed)
    advance(1)
    pca_M2 = np.zeros((len(points_MP), 2), np.float32)  # Zeros for components that are missing.
    pca_M2[:, : components_MP.shape[1]] = components_MP[:, :2]
    return Layout(collection.sample_M[drawn], pca_M2, tsne_M2, float(shares[:2].sum()), len(known))


def _principal(points_MP: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return at most `MOST_COMPONENTS` principal components, and the share of the variance of each (0 without any)."""
    from sklearn.decomposition import PCA

    n_components = min(MOST_COMPONENTS, *points_MP.shape)
    if np.ptp(points_MP, axis=0).max() == 0:
        return np.zeros((len(points_MP), n_components), np.float32), np.zeros(n_components)
    pca = PCA(n_components, random_state=seed)
    return pca.fit_transform(points_MP).astype(np.float32), pca.explained_variance_ratio_


def _tsne(points_MP: NDArray[np.float32], seed: int) -> NDArray[np.float32] | None:
    from sklearn.manifold import TSNE

    if len(points_MP) < LEAST_FOR_TSNE or points_MP.shape[1] < 2 or np.ptp(points_MP, axis=0).max() == 0:
        return None
    perplexity = min(PERPLEXITY, (len(points_MP) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed, n_jobs=-1)
    places_M2: NDArray[np.float32] = tsne.fit_transform(points_MP).astype(np.float32)
    return places_M2 if np.isfinite(places_M2).all() else None


def map_section(collection: Collection, layout: Layout | None, listing: Listing) -> Section:
    """Return the section, with what its script (`assets/map.js`) draws. Images that the page does not list are left out."""
    if layout is None:
        return Section("map", "Map", render("map.html.jinja", layout=None))
    rows_M = listing.row_of(layout.indices_M)
    here = rows_M >= 0
    values = {"rows": rows_M[here].astype("<i4"), "pca": layout.pca_M2[here].astype("<f4")}
    if layout.tsne_M2 is not None:
        values["tsne"] = layout.tsne_M2[here].astype("<f4")
    blobs = {f"map-{name}": Blob(column.tobytes()) for name, column in values.items()}
    count = int(here.sum())
    scope = f"{count:,} of {len(collection):,} images, one dot each"
    if count in (len(collection), int(collection.sizes_K().sum())):
        scope = f"All {count:,} images{'' if count == len(collection) else ' that could be read'}, one dot each."
    elif count == layout.n_known:
        scope += ": those whose features are known."
    else:
        scope += ", drawn at random: a large cluster has more of them."
    html = render(
        "map.html.jinja",
        layout=layout,
        scope=scope,
        kept=f"{layout.kept:.0%}",
        n_clusters=collection.n_clusters,
        has_labels=collection.label_N is not None,
        in_words=_in_words(collection, layout),
    )
    return Section("map", "Map", html, blobs, scripts=(asset("map.js"),))


def _in_words(collection: Collection, layout: Layout) -> list[dict[str, Any]]:
    """Return the clusters with most images on the map, with the clusters nearest to each by their mean points."""
    place = np.searchsorted(collection.sample_M, layout.indices_M)
    cluster_M = collection.cluster_N[layout.indices_M]
    sizes_K = np.bincount(cluster_M[cluster_M >= 0], minlength=collection.n_clusters)
    described = np.argsort(-sizes_K, kind="stable")[:MOST_DESCRIBED]
    described = described[sizes_K[described] > 0]
    means = [collection.points_MP[place[cluster_M == cluster]].mean(axis=0, dtype=np.float64) for cluster in described]
    rows = []
    for number, cluster in enumerate(described.tolist()):
        distances = np.linalg.norm(np.array(means) - means[number], axis=1)
        distances[number] = np.inf
        nearest = described[np.argsort(distances, kind="stable")[: min(NEAREST_NAMED, len(described) - 1)]]
        rows.append({"cluster": cluster, "count": int(sizes_K[cluster]), "nearest": nearest.tolist()})
    return rows
