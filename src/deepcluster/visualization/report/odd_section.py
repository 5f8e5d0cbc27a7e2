"""The section of the odd ones: what was found, in words, with what to do. U outliers."""

from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.text import count_of
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.gallery.rows import Listing, shown
from deepcluster.visualization.report.odd import MOST_GROUPS, MOST_OF_GROUP, NEAR_SHARE, NEIGHBOURS, Duplicates, Odd
from deepcluster.visualization.report.page import Section, render

NAME: Final = "odd"
MOST_UNREADABLE: Final = 100
# Clusters named in a sentence.
MOST_CLUSTERS: Final = 40


def odd_section(collection: Collection, odd: Odd, listing: Listing, complaint: str | None = None) -> Section:
    """The section, in words and thumbnails."""
    html = render(
        "odd.html.jinja",
        complaint=complaint,
        scope=_scope(collection, odd),
        clusters=_cluster_sentences(collection, odd),
        unreadable=[(shown(name), shown(why)) for name, why in islice(collection.unreadable.items(), MOST_UNREADABLE)],
        n_unreadable=len(collection.unreadable),
        groups=[_group_words(collection, listing, group) for group in odd.duplicates[:MOST_GROUPS]],
        n_groups=len(odd.duplicates),
        n_copies=sum(len(group.indices) - 1 for group in odd.duplicates),
        near=f"{odd.near:.2g}",
        share=f"{NEAR_SHARE:.0%}",
        compared=odd.n_compared > 1,
        neighbours=min(NEIGHBOURS, max(1, odd.n_compared - 1)),
        lonely=_outliers(collection, listing, odd.lonely_U, odd.loneliness_U),
        strays=_outliers(collection, listing, odd.strays_U, odd.straying_U),
    )
    return Section(NAME, "Odd ones", html)


def _scope(collection: Collection, odd: Odd) -> str:
    if odd.n_compared < 2:
        return "Near-duplicates and outliers need the features of the images, which are not at hand."
    if odd.n_compared == len(collection):
        return f"All {len(collection):,} images were compared with each other, by their features."
    return (
        f"{odd.n_compared:,} of {len(collection):,} images were compared with each other, by their features; duplicates and "
        "outliers among the others are not seen here."
    )


def _cluster_sentences(collection: Collection, odd: Odd) -> list[dict[str, Any]]:
    """Kinds of odd clusters: which, what it means, what to do."""
    kinds = [
        (
            odd.giants,
            f"holds more than half of all {int(collection.sizes_K().sum()):,} images",
            "hold more than half",
            "Look whether its images are alike at all. If not, training has collapsed: try --balance, a lower --lr, or "
            "another --cluster-stage. If they are, the data holds many copies or blank images.",
        ),
        (
            odd.copies,
            "holds copies of one image alone",
            "hold copies of one image alone",
            "Leave the copies out of the data: the network learns to know this picture by heart.",
        ),
        (
            odd.single,
            "holds a single image",
            "hold a single image",
            "Each of these images is like no other, or there are more clusters than the data needs: try fewer --clusters.",
        ),
        (
            odd.empty,
            "is empty",
            "are empty",
            "There are more clusters than different images near them: try fewer --clusters.",
        ),
    ]
    return [
        {
            "words": f"{count_of(len(found), 'cluster')} {one if len(found) == 1 else many}.",
            "advice": advice,
            "clusters": list(found[:MOST_CLUSTERS]),
            "more": max(0, len(found) - MOST_CLUSTERS),
        }
        for found, one, many, advice in kinds
        if found
    ]


def _image(collection: Collection, listing: Listing, index: int) -> dict[str, Any]:
    row = int(listing.row_of(np.array([index]))[0])
    return {"name": shown(collection.names[index]), "row": row, "cluster": int(collection.cluster_N[index])}


def _group_words(collection: Collection, listing: Listing, group: Duplicates) -> dict[str, Any]:
    indices = group.indices
    words = "the same to the network" if group.distance == 0 else f"up to {group.distance:.2g} apart"
    clusters = len(np.unique(collection.cluster_N[indices]))
    words += f", in {count_of(clusters, 'cluster')}" if clusters > 1 else ", all in one cluster"
    if collection.label_N is not None:
        labels = len(np.unique(collection.label_N[indices]))
        words += f", under {labels:,} different labels" if labels > 1 else ", under one label"
    return {
        "count": count_of(len(indices), "image"),
        "words": words,
        "images": [_image(collection, listing, int(index)) for index in indices[:MOST_OF_GROUP]],
        "more": max(0, len(indices) - MOST_OF_GROUP),
    }


def _outliers(
    collection: Collection, listing: Listing, indices_U: NDArray[np.int64], multiples_U: NDArray[np.float64]
) -> list[dict[str, Any]]:
    return [
        {
            **_image(collection, listing, int(index)),
            "times": f"{times:.2f} ×" if np.isfinite(times) else "the others are copies",
        }
        for index, times in zip(indices_U, multiples_U, strict=True)
    ]
