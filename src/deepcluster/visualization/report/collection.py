"""What a report shows: images, their clusters now and before, and points of a sample.

N images, K clusters, M images of the sample, P components.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.data.sources import ImageSource


@dataclass(frozen=True)
class Past:
    """The clusters of an earlier epoch; numbers of clusters are those of now where the groups overlap.

    Attributes:
        epoch: that learned them.
        load: gives its cluster_N, -1 = unassigned. It is read when it is needed: many epochs of many images are large.
    """

    epoch: int
    load: Callable[[], NDArray[np.int64]]


@dataclass(frozen=True)
class Collection:
    """N images in K clusters: what gallery, map and odd ones are made of.

    Attributes:
        title: what is shown, such as the name of the run folder.
        names: of the images.
        cluster_N: int64, -1 = unassigned (unreadable).
        distance_N: float32, Euclidean, to the centroid in the space of `centroids_KP`; NaN where unassigned or unknown.
        n_clusters: K; some may be empty.
        label_N: int64, -1 = unknown; None where no labels are known. `label_names` are their names.
        centroids_KP: float32, on the CPU; None where they are not known.
        past: earlier epochs, oldest first.
        images: where the pictures come from: image `i` is `names[i]`; None where they are not at hand.
        sample_M: indices of the images whose points are known, ascending.
        points_MP: float32, their points in the space that was clustered; empty (0, 0) where none are known.
        unreadable: reason by name, of what the run could not read.
        table: the file that has every image's cluster, as a person would look for it.
    """

    title: str
    names: Sequence[str]
    cluster_N: NDArray[np.int64]
    distance_N: NDArray[np.float32]
    n_clusters: int
    label_N: NDArray[np.int64] | None = None
    label_names: Sequence[str] = ()
    centroids_KP: Tensor | None = None
    past: Sequence[Past] = ()
    images: ImageSource | None = None
    sample_M: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    points_MP: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    unreadable: Mapping[str, str] = field(default_factory=dict)
    table: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def sizes_K(self) -> NDArray[np.int64]:
        """Images of each cluster."""
        return np.bincount(self.cluster_N[self.cluster_N >= 0], minlength=self.n_clusters)
