"""The section of the clusters: what its script (`assets/gallery.js`) shows, and what was left out, in words.

K clusters, S exemplars of a kind, T labels, J neighbours, E earlier epochs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.text import count_of
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.gallery.clusters import ClusterFacts
from deepcluster.visualization.report.gallery.rows import Listing
from deepcluster.visualization.report.gallery.thumbnails import Thumbnails
from deepcluster.visualization.report.page import Blob, Section, asset, json_blob, render, shown


def gallery_section(collection: Collection, facts: ClusterFacts, listing: Listing, thumbnails: Thumbnails) -> Section:
    """Return the gallery of a collection. `thumbnails` may be empty (`Thumbnails(side)`): names are shown then."""
    blobs: dict[str, Blob] = {"clusters": _columns(collection, facts, listing), **listing.blobs(thumbnails)}
    blobs |= {f"sheet-{number}": sheet for number, sheet in enumerate(thumbnails.sheets)}
    n_empty, n_unassigned = int((facts.sizes_K == 0).sum()), int((collection.cluster_N < 0).sum())
    about = f"{count_of(len(collection) - n_unassigned, 'image')} in {count_of(collection.n_clusters, 'cluster')}"
    about += f", {n_empty:,} of them empty" if n_empty else ""
    about += f"; {count_of(n_unassigned, 'image')} in none." if n_unassigned else "."
    html = render(
        "gallery.html.jinja",
        about=about,
        left_out=_left_out(collection, listing, thumbnails),
        without_pictures=collection.images is None,
        has_labels=collection.label_N is not None,
        has_distances=bool(np.isfinite(facts.tightness_K).any()),
    )
    return Section("clusters", "The clusters", html, blobs, scripts=(asset("gallery.js"), asset("detail.js")))


def _columns(collection: Collection, facts: ClusterFacts, listing: Listing) -> Blob:
    """Return columns of K values each, as `gallery.js` reads them."""
    cluster_R = listing.cluster_R
    listed_K = np.bincount(cluster_R[cluster_R >= 0], minlength=collection.n_clusters)
    columns: dict[str, Any] = {
        "size": facts.sizes_K.tolist(),
        "tightness": [None if np.isnan(value) else float(f"{value:.4g}") for value in facts.tightness_K.tolist()],
        "first_row": (np.cumsum(listed_K) - listed_K).tolist(),
        "listed": listed_K.tolist(),
        **{kind: _filled(listing.row_of(getattr(facts, f"{kind}_KS"))) for kind in ("nearest", "random", "farthest")},
        "neighbours": _filled(facts.neighbours_KJ),
        "past": {
            "epochs": list(facts.past_epochs),
            "cluster": facts.past_cluster_KE.tolist(),
            "share": facts.past_share_KE.round(3).tolist(),
        },
    }
    if collection.label_N is not None:
        columns["purity"] = [None if np.isnan(value) else round(value, 4) for value in facts.purity_K.tolist()]
        columns["labels"] = [
            [[label, count] for label, count in zip(labels, counts, strict=True) if label >= 0]
            for labels, counts in zip(facts.label_KT.tolist(), facts.label_count_KT.tolist(), strict=True)
        ]
    return json_blob(columns)


def _filled(values_KS: NDArray[np.int64]) -> list[list[int]]:
    """Return lists without the -1 that fill them up."""
    return [[value for value in values if value >= 0] for values in values_KS.tolist()]


def _left_out(collection: Collection, listing: Listing, thumbnails: Thumbnails) -> list[str]:
    """Return what the page does not show, and where it is."""
    sentences, total = [], len(collection)
    if not listing.is_complete:
        where = f"; all rows are in {shown(collection.table)}" if collection.table else ""
        sentences.append(f"{len(listing):,} of {total:,} images are listed here, the nearest to each centre first{where}.")
    if collection.images is not None and thumbnails.count + len(thumbnails.unreadable) < total:
        sentences.append(f"{thumbnails.count:,} of {total:,} images have a thumbnail, the nearest to each centre first.")
    if thumbnails.unreadable:
        sentences.append(f"{count_of(len(thumbnails.unreadable), 'image')} could not be read.")
    return sentences
