"""The section of the odd ones: what was found, in words, with what to do."""

from itertools import islice
from typing import Any, Final

import numpy as np

from deepcluster.core.text import count_of
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.context import Context
from deepcluster.visualization.report.gallery.rows import Listing
from deepcluster.visualization.report.odd import (
    MOST_OF_SET,
    MOST_SETS,
    NEAR_SHARE,
    NEIGHBOURS,
    Duplicates,
    Odd,
    Outliers,
)
from deepcluster.visualization.report.page import Section, render, shown

MOST_UNREADABLE: Final = 100
# Clusters named in a sentence.
MOST_CLUSTERS: Final = 40


def section(context: Context) -> Section:
    """Return the section of a run or a table."""
    return odd_section(context.collection, context.odd, context.listing, context.run.complaint)


def odd_section(collection: Collection, odd: Odd, listing: Listing, complaint: str | None = None) -> Section:
    """Return the section, in words and thumbnails."""
    html = render(
        "odd.html.jinja",
        complaint=complaint,
        scope=_scope(collection, odd),
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
        outliers=_outliers(collection, listing, odd.outliers),
        cluster_outliers=_outliers(collection, listing, odd.cluster_outliers),
    )
    return Section("odd", "Odd ones", html)


def _scope(collection: Collection, odd: Odd) -> str:
    if odd.n_compared < 2:
        return "Near-duplicates and outliers need the features of the images, which are not at hand."
    if odd.n_compared == len(collection):
        return f"All {len(collection):,} images were compared with each other, by their features."
    return (
        f"{odd.n_compared:,} of {len(collection):,} images were compared with each other, by their features; duplicates and "
        "outliers among the others are not found here."
    )


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


def _outliers(collection: Collection, listing: Listing, outliers: Outliers) -> list[dict[str, Any]]:
    pairs = zip(outliers.indices_U.tolist(), outliers.ratios_U.tolist(), strict=True)
    return [
        {
            **_image(collection, listing, index),
            "times": f"{ratio:.2f} ×" if np.isfinite(ratio) else "the others are copies",
        }
        for index, ratio in pairs
    ]
