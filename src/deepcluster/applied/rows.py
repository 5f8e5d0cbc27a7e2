"""Results with one row per image. N images, D features."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.text import count_of


@dataclass(frozen=True, repr=False)
class Embeddings:
    """Features, one row per image.

    Attributes:
        names: path of each image relative to the data.
        embedding_ND: float32; rows of NaN for unreadable images.
        unreadable: why images can't be read, by name.
    """

    names: list[str]
    embedding_ND: NDArray[np.float32]
    unreadable: dict[str, str]

    def __repr__(self) -> str:
        images, width = count_of(len(self.embedding_ND), "image"), self.embedding_ND.shape[-1]
        return f"Embeddings({images} of {width:,} numbers{_unreadable(self)}: .names, .embedding_ND, .unreadable)"


@dataclass(frozen=True, repr=False)
class Clusters:
    """Clusters, one row per image.

    Attributes:
        names: path of each image relative to the data.
        cluster_N: int64; -1 for unreadable images.
        distance_N: Euclidean distance to the centroid after whitening, or on deepcluster-v2's sphere; NaN for unreadable
            images.
        unreadable: why images can't be read, by name.
        second_N, second_distance_N: the second nearest cluster, -1 where there is none, and the distance to its centroid.
        confidence_N: 1 - distance / second distance: 0 half-way between two clusters, 1 at a centroid.
        cluster_names: names that were given to clusters, by number.
    """

    names: list[str]
    cluster_N: NDArray[np.int64]
    distance_N: NDArray[np.float32]
    unreadable: dict[str, str]
    second_N: NDArray[np.int64] | None = None
    second_distance_N: NDArray[np.float32] | None = None
    confidence_N: NDArray[np.float32] | None = None
    cluster_names: dict[int, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        used = np.unique(self.cluster_N[self.cluster_N != UNASSIGNED])
        counts = f"{count_of(len(self.cluster_N), 'image')} in {count_of(len(used), 'cluster')}"
        return f"Clusters({counts}{_unreadable(self)}: .names, .cluster_N, .distance_N, .unreadable)"


def _unreadable(result: Embeddings | Clusters) -> str:
    return f", {len(result.unreadable):,} unreadable" if result.unreadable else ""
