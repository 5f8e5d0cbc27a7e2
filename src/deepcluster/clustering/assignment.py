"""Step 4: groups become labels. What a clusterer returns, what can be said of it, images drawn evenly over clusters.

N images, K clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.errors import InputError

UNASSIGNED = -1
# The exact matching is cubic in K: 2,000 clusters take about a second, 10,000 minutes. Above it, largest overlap first.
EXACT_MATCHING_CLUSTERS = 2000


@dataclass(frozen=True)
class Assignment:
    """Which image is in which cluster.

    Attributes:
        labels_N: cluster of each image, int64; -1 = unassigned (an image that could not be read).
        distances_N: Euclidean distance to the cluster's centroid in the space that was clustered; NaN where unassigned.
        centroids_KP: centroid of each cluster.
        inertia_history: sum of squared distances at each iteration.
        n_repaired: empty clusters that were repaired on the way.
    """

    labels_N: Tensor
    distances_N: Tensor
    centroids_KP: Tensor
    inertia_history: tuple[float, ...] = ()
    n_repaired: int = 0

    @property
    def n_clusters(self) -> int:
        """K, empty clusters included."""
        return len(self.centroids_KP)

    @property
    def inertia(self) -> float:
        """Sum of the squared distances to the centroids."""
        return float(self.distances_N.double().square().nansum())

    def sizes_K(self) -> Tensor:
        """Images of each cluster."""
        return torch.bincount(self.labels_N[self.labels_N >= 0], minlength=self.n_clusters)

    def nmi(self, labels_N: Tensor | NDArray[np.int64]) -> float:
        """Normalised mutual information with other labels, over images that both know (the paper's equation 3).

        1: the one tells the other exactly; 0: it tells nothing. Numbers of clusters may be permuted freely.
        """
        from sklearn.metrics import normalized_mutual_info_score

        ours, others = self.labels_N.numpy(), np.asarray(labels_N)
        known_N = (ours >= 0) & (others >= 0)
        return float(normalized_mutual_info_score(others[known_N], ours[known_N], average_method="geometric"))

    def matched_to(self, previous: "Assignment") -> "Assignment":
        """The same groups, numbered so that as many images as possible keep the number they had in `previous`.

        Exact (Hungarian) up to 2,000 clusters, greedy by overlap above.
        """
        new_number_K = torch.from_numpy(_matching(self, previous))
        labels_N = torch.where(self.labels_N >= 0, new_number_K[self.labels_N], UNASSIGNED)
        centroids_KP = torch.empty_like(self.centroids_KP)
        centroids_KP[new_number_K] = self.centroids_KP
        return replace(self, labels_N=labels_N, centroids_KP=centroids_KP)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that `from_state_dict` takes."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Assignment":
        """The assignment that `state_dict` was taken of."""
        return cls(**{**state, "inertia_history": tuple(state["inertia_history"])})

    def save(self, path: Path, names: Sequence[str]) -> None:
        """Write the table `name, cluster, distance` as Parquet, in the order of the images, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(
            {
                "name": pa.array(names, pa.string()),
                "cluster": self.labels_N.numpy(),
                "distance": self.distances_N.numpy().astype(np.float32),
            }
        )
        beside = path.with_name(path.name + ".part")
        pq.write_table(table, beside)
        beside.replace(path)


def _matching(assignment: Assignment, previous: Assignment) -> NDArray[np.int64]:
    """New number of each cluster of `assignment`: a permutation of K."""
    from scipy.optimize import linear_sum_assignment

    ours, before = assignment.labels_N.numpy(), previous.labels_N.numpy()
    both_N = (ours >= 0) & (before >= 0) & (before < assignment.n_clusters)
    n_clusters = assignment.n_clusters
    if n_clusters <= EXACT_MATCHING_CLUSTERS:
        overlap_KK = np.zeros((n_clusters, n_clusters), dtype=np.int64)
        np.add.at(overlap_KK, (ours[both_N], before[both_N]), 1)
        return linear_sum_assignment(overlap_KK, maximize=True)[1]  # type: ignore[no-any-return]
    return _greedy_matching(ours[both_N], before[both_N], n_clusters)


def _greedy_matching(ours: NDArray[np.int64], before: NDArray[np.int64], n_clusters: int) -> NDArray[np.int64]:
    pairs, overlaps = np.unique(ours * n_clusters + before, return_counts=True)
    new_number_K = np.full(n_clusters, -1, dtype=np.int64)
    taken_K = np.zeros(n_clusters, dtype=bool)
    for pair in pairs[np.argsort(-overlaps, kind="stable")]:
        cluster, number = divmod(int(pair), n_clusters)
        if new_number_K[cluster] < 0 and not taken_K[number]:
            new_number_K[cluster] = number
            taken_K[number] = True
    new_number_K[new_number_K < 0] = np.flatnonzero(~taken_K)
    return new_number_K


def draw_uniform(labels_N: Tensor, *, n_draws: int, seed: Sequence[int]) -> Tensor:
    """Draw images so that every non-empty cluster is drawn equally often (the paper's section 3.4); a shuffled list.

    Counts of clusters differ by at most one, and so do counts of images within a cluster. Unassigned images are never
    drawn.

    Args:
        labels_N: cluster of each image, -1 = unassigned.
        n_draws: length of the list.
        seed: integers that fix the draw.

    Returns:
        indices of images, (n_draws,).

    Raises:
        InputError: no image is in a cluster.
    """
    rng = np.random.default_rng(list(seed))
    labels = labels_N.numpy()
    images = np.flatnonzero(labels >= 0)
    if not len(images):
        raise InputError(f"none of the {len(labels)} images is in a cluster: nothing to draw from")
    images = images[np.argsort(rng.random(len(images)))]
    images = images[np.argsort(labels[images], kind="stable")]
    _, sizes_C = np.unique(labels[images], return_counts=True)
    starts_C = np.cumsum(sizes_C) - sizes_C
    quotas_C = np.full(len(sizes_C), n_draws // len(sizes_C))
    quotas_C[rng.permutation(len(sizes_C))[: n_draws % len(sizes_C)]] += 1
    turn = np.arange(n_draws) - np.repeat(np.cumsum(quotas_C) - quotas_C, quotas_C)
    drawn = images[np.repeat(starts_C, quotas_C) + turn % np.repeat(sizes_C, quotas_C)]
    return torch.from_numpy(rng.permutation(drawn))


def draw_as_published(labels_N: Tensor, *, n_draws: int, seed: Sequence[int]) -> Tensor:
    """Draw as the 2018 code did, for comparisons: numbers of images are used as positions in a list sorted by cluster.

    The sampler drew images evenly over clusters, but the data set had been reordered by cluster, so that other images
    came out: hardly re-balanced. Each keeps the label of its own cluster.
    """
    by_cluster = torch.argsort(torch.where(labels_N >= 0, labels_N, labels_N.max() + 1), stable=True)
    assigned_before_N = torch.cumsum(labels_N >= 0, dim=0) - 1
    return by_cluster[assigned_before_N[draw_uniform(labels_N, n_draws=n_draws, seed=seed)]]
