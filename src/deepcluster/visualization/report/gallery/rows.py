"""Which images a page lists, by name, cluster and distance: all of them, or as many as fit, the most important first.

N images, R rows (the images that are listed).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.text import printable
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.gallery.thumbnails import A_SHEET, ACROSS, Thumbnails
from deepcluster.visualization.report.page import Blob, json_blob

# Names that are unpacked at once.
BLOCK: Final = 65_536
# Bits of a distance that are dropped: 11 of its 23 are left, a precision of 1 in 4,000, in half of the bytes.
DROPPED_BITS: Final = 12


@dataclass(frozen=True)
class Listing:
    """The images that a page lists.

    Attributes:
        collection: what they are of.
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
        """Rows of images, of any shape; -1 where they are not listed, and for an index of -1."""
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

    def blobs(self, thumbnails: Thumbnails) -> dict[str, Blob]:
        """What the page's scripts read of the rows: `rows`, `names-0` …, `row-cluster`, `row-distance` …"""
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
        number_R = thumbnails.numbers_of(self.indices_R)
        return {**self._columns, "rows": json_blob(about), "row-thumbnail": Blob(number_R.astype("<i4").tobytes())}

    @cached_property
    def _columns(self) -> dict[str, Blob]:
        """What thumbnails do not change: a million names take seconds to pack, which is done once."""
        collection = self.collection
        blobs = {
            f"names-{number}": Blob(joined(collection.names, self.indices_R[first : first + BLOCK]))
            for number, first in enumerate(range(0, len(self), BLOCK))
        }
        blobs["row-cluster"] = Blob(self.cluster_R.astype("<i4").tobytes())
        blobs["row-distance"] = Blob(rounded(collection.distance_N[self.indices_R]).astype("<f4").tobytes())
        if collection.label_N is not None:
            blobs["row-label"] = Blob(collection.label_N[self.indices_R].astype("<i4").tobytes())
        return blobs


def list_rows(collection: Collection, wanted: Sequence[NDArray[np.int64]], max_bytes: int) -> Listing:
    """List all images where they fit, else as many as do: the wanted ones, then the nearest of each cluster, evenly.

    Args:
        wanted: indices of images, the most important first; -1 and what comes twice is passed over.
        max_bytes: most bytes of `Listing.blobs`, as they are in the page (`Blob.packed`), while no image has a thumbnail;
            thumbnails' numbers count among the bytes of `make_thumbnails`.
    """
    order_N = sorted_rows(collection, np.arange(len(collection)))
    important_N: NDArray[np.int64] | None = None
    count = len(collection) if max_bytes > 0 else 0
    while True:
        if count == len(collection):
            listing = Listing(collection, order_N)
        else:
            important_N = by_importance(collection, wanted, order_N) if important_N is None else important_N
            listing = Listing(collection, sorted_rows(collection, important_N[:count]))
        packed = sum(len(blob.packed()) for blob in listing.blobs(Thumbnails(0)).values()) if count else 0
        if packed <= max_bytes or count == 0:
            return listing
        # The first rows cost a little more than the last ones, which are alike: never quite in proportion.
        count = min(count - 1, int(count * max_bytes / packed * 0.99))


def sorted_rows(collection: Collection, indices_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """The images by cluster (unassigned last), distance (NaN last), index."""
    cluster_R = collection.cluster_N[indices_R]
    cluster_R = np.where(cluster_R < 0, collection.n_clusters, cluster_R)
    return indices_R[np.lexsort((indices_R, collection.distance_N[indices_R], cluster_R))]


def rounded(distance_R: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distances to some four digits, which half as many bytes tell; their order stays."""
    bits_R = np.ascontiguousarray(distance_R, dtype=np.float32).view(np.uint32)
    short_R = (bits_R + np.uint32(1 << (DROPPED_BITS - 1))) & np.uint32(0xFFFFFFFF ^ ((1 << DROPPED_BITS) - 1))
    return np.where(np.isfinite(distance_R), short_R.view(np.float32), distance_R).astype(np.float32)


def shown(name: str) -> str:
    """A name as the page has it: without what is no text, and without the character that parts names."""
    try:
        name = printable(name)
    except UnicodeEncodeError:  # Half of a surrogate pair, as JSON may hold.
        name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return name.replace("\0", "\\x00")


def joined(names: Sequence[str], indices_R: NDArray[np.int64]) -> bytes:
    """Names with NUL between them."""
    some = [names[index] for index in indices_R.tolist()]
    text = "\0".join(some)
    if not text.isascii() or text.count("\0") != max(0, len(some) - 1):
        text = "\0".join(map(shown, some))
    return text.encode()


def by_importance(
    collection: Collection, wanted: Sequence[NDArray[np.int64]], order_N: NDArray[np.int64]
) -> NDArray[np.int64]:
    """All images: the wanted ones in their order, then the nearest of all clusters, the second nearest …, the unassigned."""
    cluster_N = collection.cluster_N[order_N]
    sizes_K = collection.sizes_K()
    first_K = np.cumsum(sizes_K) - sizes_K
    n_assigned = int(sizes_K.sum())
    rank_N = np.full(len(order_N), len(order_N))
    rank_N[:n_assigned] = np.arange(n_assigned) - first_K[cluster_N[:n_assigned]]
    evenly_N = order_N[np.argsort(rank_N, kind="stable")]
    all_ = np.concatenate([*(part.ravel() for part in wanted), evenly_N])
    all_ = all_[all_ >= 0]
    _, firsts = np.unique(all_, return_index=True)
    important_N: NDArray[np.int64] = all_[np.sort(firsts)]
    return important_N
