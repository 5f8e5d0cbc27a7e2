"""The section of the map, and the map in words. M images on the map, K clusters."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.context import Context
from deepcluster.visualization.report.gallery.rows import Listing
from deepcluster.visualization.report.layout import Layout
from deepcluster.visualization.report.page import Blob, Section, asset, render

NAME: Final = "map"
# Clusters in the table that describes the map in words, and how many of the nearest ones it names.
MOST_DESCRIBED: Final = 200
NEAREST_NAMED: Final = 3


def section(context: Context) -> Section:
    """Return the section of a run or a table."""
    return map_section(context.collection, context.layout, context.listing)


def map_section(collection: Collection, layout: Layout | None, listing: Listing) -> Section:
    """Return the section, with what its script (`assets/map.js`) draws. Images that the page does not list are left out."""
    if layout is None:
        return Section(NAME, "Map", render("map.html.jinja", layout=None))
    rows_M = listing.row_of(layout.indices_M)
    here = rows_M >= 0
    blobs = {"map-rows": _packed(rows_M[here], "<i4"), "map-pca": _packed(layout.pca_M2[here], "<f4")}
    if layout.tsne_M2 is not None:
        blobs["map-tsne"] = _packed(layout.tsne_M2[here], "<f4")
    html = render(
        "map.html.jinja",
        layout=layout,
        scope=_scope(collection, layout, int(here.sum())),
        kept=f"{layout.kept:.0%}",
        has_labels=collection.label_N is not None,
        in_words=_in_words(collection, layout),
    )
    return Section(NAME, "Map", html, blobs, scripts=(asset("map.js"),))


def _packed(values: NDArray[Any], kind: str) -> Blob:
    return Blob(np.ascontiguousarray(values.astype(kind)).tobytes())


def _scope(collection: Collection, layout: Layout, count: int) -> str:
    if count == len(collection):
        return f"All {count:,} images, one dot each."
    some = f"{count:,} of {len(collection):,} images, one dot each"
    if count == layout.n_known:
        return f"{some}: those whose features are known."
    return f"{some}, drawn at random: a large cluster has more of them."


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
