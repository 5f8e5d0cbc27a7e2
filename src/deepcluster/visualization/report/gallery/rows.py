"""Which images a page lists, all or the most important of a large set; and the section of clusters (`assets/gallery.js`).

N images, R rows (the images that are listed), K clusters, S exemplars of a kind, T labels, J neighbours, E earlier epochs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.text import count_of
from deepcluster.visualization.report.collection import Collection, sorted_rows
from deepcluster.visualization.report.gallery.clusters import ClusterFacts
from deepcluster.visualization.report.gallery.thumbnails import A_SHEET, ACROSS, Thumbnails
from deepcluster.visualization.report.page import Blob, Section, asset, json_blob, render, shown

# Images that a page lists at most: of names as ImageNet's these take some 2 MB.
MOST_ROWS: Final = 200_000
BLOCK: Final = 65_536  # Names that are unpacked at once.
# Bits of a distance that are dropped: 11 of its 23 are left, a precision of 1 in 4,000, in half of the bytes.
DROPPED_BITS: Final = 12
# Images that were compared with each other, ascending, and for each the images most similar to it, the nearest first.
Similar = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Listing:
    """The images that a page lists.

    Attributes:
        collection: what they belong to.
        indices_R: image of each row; rows are sorted by cluster (unassigned last), then distance (NaN last), then index.
    """

    collection: Collection
    indices_R: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices_R)

    @property
    def is_complete(self) -> bool:
        """Whether every image is listed."""
        return len(self.indices_R) == len(self.collection)

    def row_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return rows of images, of any shape; -1 where they are not listed, and for an index of -1."""
        return self._row_N[indices]

    @cached_property
    def _row_N(self) -> NDArray[np.int64]:
        row_N = np.full(len(self.collection) + 1, -1, dtype=np.int64)  # One more: what an index of -1 finds.
        row_N[self.indices_R] = np.arange(len(self.indices_R))
        return row_N

    @cached_property
    def cluster_R(self) -> NDArray[np.int64]:
        """Cluster of each row, -1 = unassigned."""
        return self.collection.cluster_N[self.indices_R]

    def blobs(self, thumbnails: Thumbnails, similar: Similar | None = None) -> dict[str, Blob]:
        """Return what the page's scripts read of the rows: `rows`, `names-0` …, `row-cluster`, `row-distance` …"""
        collection = self.collection
        about: dict[str, Any] = {
            "rows": len(self),
            "images": len(collection),
            "clusters": collection.n_clusters,
            "block": BLOCK,
            "blocks": -(-len(self) // BLOCK),
            "labels": [shown(name) for name in collection.label_names] if collection.label_N is not None else [],
            "table": shown(collection.table),
            "thumbnails": {"side": thumbnails.side, "across": ACROSS, "a_sheet": A_SHEET, "count": thumbnails.count},
        }
        columns = {
            "cluster": self.cluster_R.astype("<i4"),
            "distance": rounded(collection.distance_N[self.indices_R]).astype("<f4"),
            "thumbnail": thumbnails.numbers_of(self.indices_R).astype("<i4"),
        }
        if collection.label_N is not None:
            columns["label"] = collection.label_N[self.indices_R].astype("<i4")
        if similar is not None:
            indices_M, similar_MJ = similar
            row_M = self.row_of(indices_M)
            near_RJ = np.full((len(self), similar_MJ.shape[1]), -1, "<i4")
            near_RJ[row_M[row_M >= 0]] = self.row_of(similar_MJ[row_M >= 0])
            columns["similar"], about["similar"] = near_RJ, similar_MJ.shape[1]
        blobs = {"rows": json_blob(about)}
        for number, first in enumerate(range(0, len(self), BLOCK)):
            some = [collection.names[index] for index in self.indices_R[first : first + BLOCK].tolist()]
            text = "\0".join(some)
            if not text.isascii() or text.count("\0") != max(0, len(some) - 1):
                text = "\0".join(map(shown, some))
            blobs[f"names-{number}"] = Blob(text.encode())
        return blobs | {f"row-{name}": Blob(column_R.tobytes()) for name, column_R in columns.items()}


def list_rows(collection: Collection, important_N: NDArray[np.int64], most: int = MOST_ROWS) -> Listing:
    """Return the listing of all images, or of the `most` most important ones of more.

    Args:
        important_N: all images, the most important first (`by_importance`).
    """
    return Listing(collection, sorted_rows(collection, important_N[:most]))


def by_importance(collection: Collection, wanted: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return all images: the wanted ones, then the nearest of all clusters, the second nearest …, the unassigned.

    Args:
        wanted: indices of images, the most important first; -1 and repetitions are ignored.
    """
    order_N = sorted_rows(collection, np.arange(len(collection)))
    cluster_N, sizes_K = collection.cluster_N[order_N], collection.sizes_K()
    first_K = np.cumsum(sizes_K) - sizes_K
    n_assigned = int(sizes_K.sum())
    rank_N = np.full(len(order_N), len(order_N))
    rank_N[:n_assigned] = np.arange(n_assigned) - first_K[cluster_N[:n_assigned]]
    evenly_N = order_N[np.argsort(rank_N, kind="stable")]
    candidates = np.concatenate([*(part.ravel() for part in wanted), evenly_N])
    candidates = candidates[candidates >= 0]
    _, firsts = np.unique(candidates, return_index=True)
    important_N: NDArray[np.int64] = candidates[np.sort(firsts)]
    return important_N


def rounded(distance_R: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return distances to some four digits, which take half as many bytes; their order stays."""
    bits_R = np.ascontiguousarray(distance_R, dtype=np.float32).view(np.uint32)
    short_R = (bits_R + np.uint32(1 << (DROPPED_BITS - 1))) & np.uint32(0xFFFFFFFF ^ ((1 << DROPPED_BITS) - 1))
    return np.where(np.isfinite(distance_R), short_R.view(np.float32), distance_R).astype(np.float32)


def gallery_section(
    collection: Collection,
    facts: ClusterFacts,
    listing: Listing,
    thumbnails: Thumbnails,
    similar: Similar | None = None,
    whole: Mapping[int, Blob] | None = None,
) -> Section:
    """Return the gallery of a collection. `thumbnails` may be empty (`Thumbnails(side)`): names are shown then.

    Args:
        similar: the images most similar to each image.
        whole: whole pictures of some images, by index.
    """
    blobs: dict[str, Blob] = {"clusters": _columns(collection, facts, listing), **listing.blobs(thumbnails, similar)}
    blobs |= {f"sheet-{number}": sheet for number, sheet in enumerate(thumbnails.sheets)}
    rows = listing.row_of(np.fromiter(whole or {}, np.int64)).tolist()
    blobs |= {f"whole-{row}": blob for row, blob in zip(rows, (whole or {}).values(), strict=True)}
    n_empty, n_unassigned = int((facts.sizes_K == 0).sum()), int((collection.cluster_N < 0).sum())
    about = f"{count_of(len(collection) - n_unassigned, 'image')} in {count_of(collection.n_clusters, 'cluster')}"
    about += f", {n_empty:,} of them empty" if n_empty else ""
    about += f"; {count_of(n_unassigned, 'image')} in none." if n_unassigned else "."
    # What the page does not show, and where it is.
    left_out, total = [], len(collection)
    if not listing.is_complete:
        where = f"; all rows are in {shown(collection.table)}" if collection.table else ""
        left_out.append(f"{len(listing):,} of {total:,} images are listed here, the nearest to each centre first{where}.")
    if collection.images is not None and thumbnails.count + len(thumbnails.unreadable) < total:
        left_out.append(f"{thumbnails.count:,} of {total:,} images have a thumbnail, the nearest to each centre first.")
    if thumbnails.unreadable:
        left_out.append(f"{count_of(len(thumbnails.unreadable), 'image')} could not be read.")
    html = render(
        "gallery.html.jinja",
        about=about,
        left_out=left_out,
        without_pictures=collection.images is None,
        names_folder=shown(collection.names_folder),
        has_labels=collection.label_N is not None,
        has_distances=bool(np.isfinite(facts.tightness_K).any()),
    )
    return Section(
        "clusters", "The clusters", html, blobs, scripts=(asset("names.js"), asset("gallery.js"), asset("detail.js"))
    )


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
        "names": {str(cluster): shown(name) for cluster, name in collection.cluster_names.items()},
        # Names that a browser keeps belong to these clusters only.
        "signature": hashlib.sha256(collection.cluster_N.astype("<i8").tobytes()).hexdigest()[:16],
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
