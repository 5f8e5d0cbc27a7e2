"""What a report shows: images, their clusters now and in earlier epochs, points of a sample, and facts of the run.

N images, K clusters, M images of the sample, P components.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.data.sources import ImageSource

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Past:
    """The clusters of an earlier epoch; their numbers are those of the current clusters that they overlap with.

    Attributes:
        epoch: the epoch that trained on them.
        load: returns cluster_N, -1 = unassigned. Called when needed: many epochs of many images take much memory.
    """

    epoch: int
    load: Callable[[], NDArray[np.int64]]


@dataclass(frozen=True)
class Collection:
    """N images in K clusters, as gallery, map and odd ones show them.

    Attributes:
        title: what is shown, such as the name of the run folder.
        names: names of the images.
        cluster_N: int64, -1 = unassigned (unreadable).
        distance_N: float32, Euclidean, to the centroid in the space of `centroids_KP`; NaN where unassigned or unknown.
        n_clusters: K; some may be empty.
        label_N: int64, -1 = unknown; None where no labels are known. `label_names` are their names.
        centroids_KP: float32, on the CPU; None where they are not known.
        past: earlier epochs, oldest first.
        images: where the pictures come from: image `i` is `names[i]`; None where they are not at hand.
        sample_M: indices of the images whose points are known, ascending.
        points_MP: float32, their points in the space that was clustered; empty (0, 0) where none are known.
        unreadable: reasons by name, of what the run could not read.
        table: the file that has the cluster of every image, as the user would look for it.
        cluster_names: names that the user gave to clusters.
        names_folder: where `names.csv` is read from, as the user would look for it; empty where it is not.
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
    cluster_names: Mapping[int, str] = field(default_factory=dict)
    names_folder: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def sizes_K(self) -> NDArray[np.int64]:
        """Return the number of images of each cluster."""
        return np.bincount(self.cluster_N[self.cluster_N >= 0], minlength=self.n_clusters)

    def nearest_to_centre(self, cluster: int, count: int, *, without: int = -1) -> list[int]:
        """Return the `count` images of a cluster that are nearest to its centroid, except the image `without`."""
        members = np.flatnonzero(self.cluster_N == cluster)
        members = members[members != without]
        nearest: list[int] = members[np.argsort(self.distance_N[members], kind="stable")][:count].tolist()
        return nearest


def evenly(count: int, most: int) -> list[int]:
    """Return positions of at most `most` of `count` things, spread evenly, the first and the last among them."""
    places: list[int] = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)).tolist()
    return places


def sorted_rows(collection: Collection, indices_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the images by cluster (unassigned last), distance (NaN last), index."""
    cluster_R = collection.cluster_N[indices_R]
    cluster_R = np.where(cluster_R < 0, collection.n_clusters, cluster_R)
    return indices_R[np.lexsort((indices_R, collection.distance_N[indices_R], cluster_R))]


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run, or of a table that is no run (then most of it is empty).

    Attributes:
        title: name of the run.
        folder: the run folder, as the user would type it.
        config: content of `config.json`: settings, changed_by_recipe, data, versions, command.
        metrics: lines of `metrics.jsonl`, one per epoch.
        evaluations: contents of `evaluation/*.json`.
        finished: True if the last epoch is done.
        made_at: when this page was made.
        started, ended: of the training, where known.
        n_images, n_unreadable: number of images, and how many of them could not be read.
        sizes_K: current number of images of each cluster.
        complaint: what looks like a collapse, in a sentence with what to change.
        comparison: measures of the numbers of clusters that were compared, where there were several.
    """

    title: str
    folder: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    finished: bool = True
    made_at: datetime = field(default_factory=datetime.now)
    started: datetime | None = None
    ended: datetime | None = None
    n_images: int | None = None
    n_unreadable: int = 0
    sizes_K: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    complaint: str | None = None
    comparison: Sequence[Mapping[str, Any]] = ()

    def setting(self, name: str) -> Any:
        """Return a setting; None where it is not known."""
        return (self.config.get("settings") or {}).get(name)

    @property
    def clustered(self) -> Mapping[str, Any]:
        """What was clustered without training: model, stage (empty: a table), whitened; empty where it was trained."""
        return self.config.get("clustered") or {}

    @property
    def heads(self) -> tuple[int, ...]:
        """Numbers of clusters of the clusterings that are trained on, by the settings; empty where they are not known."""
        clusters = self.setting("clusters")
        several = clusters if isinstance(clusters, list | tuple) else [clusters]
        return tuple(count for count in several if isinstance(count, int))

    def last(self, name: str) -> Any:
        """Return the last known value of a metric; None where there is none."""
        return next((line[name] for line in reversed(self.metrics) if line.get(name) is not None), None)
