"""Step 4: clusters become labels. The result of a clusterer, measures of it, and images drawn evenly over clusters.

N images on this rank, F of them finite, M other points, P components, K clusters, U of them not empty, S super-classes; L
clusters of a previous assignment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.frame import Frame, check_table, finite_rows, largest_value
from deepcluster.clustering.nearest import nearest_centroids
from deepcluster.clustering.parallel import row_blocks
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError

UNASSIGNED = -1
# Exact matching is cubic: it takes about a second for 2,000 clusters each, minutes for 10,000. Above, matching is greedy.
EXACT_MATCHING_CLUSTERS = 2000


@dataclass(frozen=True)
class Assignment:
    """The cluster of each image.

    Attributes:
        labels_N: cluster of each image, int64; -1 = unassigned (an image that could not be read).
        distances_N: Euclidean distance to the cluster's centroid in the clustered space; NaN where unassigned.
        centroids_KP: centroid of each cluster; they and the distances are float64 if the points are, or are huge or tiny.
        inertia_history: sum of squared distances at each iteration.
        n_repaired: number of empty clusters that were repaired.
        remark: what the user should know if the result is of little use, in plain words; empty otherwise.
        super_of_cluster_K: super-class of each cluster, ascending, if clusters were made within super-classes.
        super_centroids_SP: centroid of each super-class; equal for all rotations of a super-cluster.
    """

    labels_N: Tensor
    distances_N: Tensor
    centroids_KP: Tensor
    inertia_history: tuple[float, ...] = ()
    n_repaired: int = 0
    remark: str = ""
    super_of_cluster_K: Tensor | None = None
    super_centroids_SP: Tensor | None = None

    def over_ranks(self, ranks: Ranks) -> "Assignment":
        """Return the assignment of the points of all ranks, in the order of the ranks, on every rank."""
        return replace(self, labels_N=ranks.gather(self.labels_N), distances_N=ranks.gather(self.distances_N))

    @property
    def n_clusters(self) -> int:
        """K, including empty clusters."""
        return len(self.centroids_KP)

    @property
    def inertia(self) -> float:
        """Sum of squared distances to the centroids."""
        return float(self.distances_N.double().square().nansum())

    def sizes_K(self) -> Tensor:
        """Return the number of images of each cluster."""
        return torch.bincount(self.labels_N[self.labels_N >= 0], minlength=self.n_clusters)

    @property
    def entropy(self) -> float:
        """Entropy of the cluster sizes, in nats: log K if all are equal, 0 if one cluster holds all images."""
        shares_K = self.sizes_K().double()
        shares_K /= shares_K.sum().clamp(min=1)
        return float(torch.special.entr(shares_K).sum())

    @property
    def effective_clusters(self) -> float:
        """exp(entropy): the number of clusters of equal size with the same entropy."""
        return float(np.exp(self.entropy))

    @property
    def largest_share(self) -> float:
        """Share of the assigned images in the largest cluster."""
        sizes_K = self.sizes_K()
        return float(sizes_K.max() / sizes_K.sum().clamp(min=1))

    def nmi(self, labels_N: Tensor | NDArray[np.int64]) -> float:
        """Return the normalised mutual information with other labels, over images that both label (equation 3).

        1: each determines the other; 0: independent. Numbers of clusters may be permuted freely.
        """
        from sklearn.metrics import normalized_mutual_info_score

        ours, others = self._known(labels_N)
        return float(normalized_mutual_info_score(others, ours, average_method="geometric"))

    def ari(self, labels_N: Tensor | NDArray[np.int64]) -> float:
        """Return the adjusted Rand index with other labels, over images that both label: the share of pairs of images that
        both put together or both keep apart, corrected for chance. 1: the same clusters; 0: chance.
        """
        from sklearn.metrics import adjusted_rand_score

        ours, others = self._known(labels_N)
        return float(adjusted_rand_score(others, ours))

    def _known(self, labels_N: Tensor | NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ours, others = self.labels_N.numpy(), np.asarray(labels_N)
        if ours.shape != others.shape:
            raise InputError(f"{len(others)} labels can't be compared with the {len(ours)} images of the assignment")
        known_N = (ours >= 0) & (others >= 0)
        return ours[known_N], others[known_N]

    def predict(self, points_MP: Tensor) -> Tensor:
        """Return labels (M) of the nearest centroids, for points in the clustered space; -1 where not finite.

        For the clustered images these are not always `labels_N`: balanced clusters and those of a graph do not consist of
        the points nearest to their centroids.
        """
        points_MP = self._checked(points_MP)
        finite_M, _ = finite_rows(points_MP)
        labels_M = torch.full((len(points_MP),), UNASSIGNED, device=points_MP.device)
        labels_M[finite_M] = self.nearest(points_MP[finite_M])[0]
        return labels_M

    def nearest(self, points_MP: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels (M) and squared distances (M) of the nearest centroids of finite points.

        With super-classes, centroids of the nearest super-class that has clusters are searched (with rotations, the one of
        upright images).
        """
        frame = self._frame(points_MP)
        centroids_KP = frame.points(self.centroids_KP.to(points_MP.device))
        points_MP = frame.points(points_MP)
        if self.super_of_cluster_K is None or self.super_centroids_SP is None:
            labels_M, squared_M = nearest_centroids(points_MP, centroids_KP)
            return labels_M, frame.lengths(squared_M, power=2)
        supers_K = self.super_of_cluster_K.to(points_MP.device)
        used = supers_K.unique()
        supers_SP = frame.points(self.super_centroids_SP.to(points_MP.device)[used])
        supers_M = used[nearest_centroids(points_MP, supers_SP)[0]]
        labels_M = torch.empty(len(points_MP), dtype=torch.int64, device=points_MP.device)
        squared_M = torch.empty(len(points_MP), device=points_MP.device)
        for number in supers_M.unique():
            rows, clusters = (supers_M == number).nonzero()[:, 0], (supers_K == number).nonzero()[:, 0]
            found, squared_M[rows] = nearest_centroids(points_MP[rows], centroids_KP[clusters])
            labels_M[rows] = clusters[found]
        return labels_M, frame.lengths(squared_M, power=2)

    def _frame(self, points_MP: Tensor) -> Frame:
        """Return a frame in which the centroids and these points are float32 points."""
        centroids_KP = self.centroids_KP.to(points_MP.device)
        offset_P = centroids_KP.median(dim=0).values if centroids_KP.dtype == torch.float64 else None
        return Frame.around(offset_P, max(largest_value(centroids_KP, offset_P), largest_value(points_MP, offset_P)))

    def transform(self, points_MP: Tensor) -> Tensor:
        """Return Euclidean distances (M, K) of points to every centroid, as scikit-learn's `KMeans.transform`."""
        points_MP = self._checked(points_MP)
        frame = self._frame(points_MP)
        points_MP, centroids_KP = frame.points(points_MP), frame.points(self.centroids_KP.to(points_MP.device))
        return frame.lengths(torch.cdist(points_MP, centroids_KP, compute_mode="donot_use_mm_for_euclid_dist"))

    def _checked(self, points_MP: Tensor) -> Tensor:
        shape, columns = (*points_MP.shape,), self.centroids_KP.shape[1]
        if len(shape) != 2 or shape[1] != columns:
            raise InputError(f"points {shape} must be a table of {columns} columns, as the clustered ones")
        return check_table(points_MP)

    def matched_to(self, previous: "Assignment") -> "Assignment":
        """Return the same clusters, renumbered so that as many images as possible keep their number of `previous`.

        K and L may differ; numbers stay 0 … K-1. Exact (Hungarian) for up to 2,000 clusters each, or as many pairs; greedy
        by overlap above. Clusters of super-classes keep their numbers, which determine their super-class.
        """
        if self.super_of_cluster_K is not None:
            return self
        new_number_K = torch.from_numpy(_matching(self, previous))
        labels_N = torch.where(self.labels_N >= 0, new_number_K[self.labels_N], UNASSIGNED)
        centroids_KP = torch.empty_like(self.centroids_KP)
        centroids_KP[new_number_K] = self.centroids_KP
        return replace(self, labels_N=labels_N, centroids_KP=centroids_KP)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values for `from_state_dict`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """Restore an assignment from its `state_dict`."""
        return cls(**{**state, "inertia_history": tuple(state["inertia_history"])})


def cluster_means(points_NP: Tensor, labels_N: Tensor, n_clusters: int, *, ranks: Ranks = ONE_PROCESS) -> Tensor:
    """Return the mean (K, P) of the points of each cluster, over all ranks; zeros for an empty one. Sums are float64."""
    sums_KP = torch.zeros(n_clusters, points_NP.shape[1], dtype=torch.float64, device=points_NP.device)
    for rows in row_blocks(points_NP):
        if points_NP.is_cuda:
            # index_add_ uses atomics on a GPU, so that sums vary between runs; index_put_ sorts first.
            sums_KP.index_put_((labels_N[rows],), points_NP[rows].double(), accumulate=True)
        else:
            sums_KP.index_add_(0, labels_N[rows], points_NP[rows].double())
    sizes_K = ranks.sum(torch.bincount(labels_N, minlength=n_clusters))
    return ranks.sum(sums_KP).div_(sizes_K.clamp(min=1)[:, None]).float()


def member_distances(points_NP: Tensor, labels_N: Tensor, centroids_KP: Tensor) -> Tensor:
    """Return the Euclidean distance (N) of each point to the centroid of its cluster."""
    distances_N = torch.empty(len(points_NP), device=points_NP.device)
    for rows in row_blocks(points_NP):
        torch.sum((points_NP[rows] - centroids_KP[labels_N[rows]]).square_(), dim=1, out=distances_N[rows])
    return distances_N.sqrt_()


def _matching(assignment: Assignment, previous: Assignment) -> NDArray[np.int64]:
    """Return the new number of each cluster of `assignment`: a permutation of K."""
    from scipy.optimize import linear_sum_assignment

    ours, before = assignment.labels_N.numpy(), previous.labels_N.numpy()
    n_clusters, n_numbers = assignment.n_clusters, min(assignment.n_clusters, previous.n_clusters)
    # Only numbers below K can be kept.
    both_N = (ours >= 0) & (before >= 0) & (before < n_numbers)
    pairs, overlaps = np.unique(ours[both_N] * n_numbers + before[both_N], return_counts=True)
    clusters, numbers = np.divmod(pairs, max(1, n_numbers))
    kept_K = np.full(n_clusters, -1)
    if n_clusters * n_numbers <= EXACT_MATCHING_CLUSTERS**2:
        overlap_KL = np.zeros((n_clusters, n_numbers), dtype=np.int64)
        overlap_KL[clusters, numbers] = overlaps
        matched, kept = linear_sum_assignment(overlap_KL, maximize=True)
        kept_K[matched] = kept
    else:
        # The largest overlap first, of equal ones the lower numbers: at least half as good.
        order = np.argsort(-overlaps, kind="stable")
        number_K, free_L = kept_K.tolist(), [True] * n_numbers
        # Lists are faster than arrays here: 0.1 s for a million pairs.
        for cluster, number in zip(clusters[order].tolist(), numbers[order].tolist(), strict=True):
            if free_L[number] and number_K[cluster] < 0:
                number_K[cluster], free_L[number] = number, False
        kept_K = np.array(number_K)
    taken_K = np.zeros(n_clusters, dtype=bool)
    taken_K[kept_K[kept_K >= 0]] = True
    kept_K[kept_K < 0] = np.flatnonzero(~taken_K)
    return kept_K


def draw_uniform(labels_N: Tensor, *, n_draws: int, seed: Sequence[int]) -> Tensor:
    """Draw images so that every non-empty cluster is drawn equally often (section 3: trivial solutions).

    Counts of clusters, and those of the images within one, differ by at most one. Unassigned images are never drawn.

    Args:
        labels_N: cluster of each image, -1 = unassigned.
        n_draws: length of the list.
        seed: integers that fix the draw.

    Returns:
        indices of images (n_draws), shuffled.

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
    _, sizes_U = np.unique(labels[images], return_counts=True)
    starts_U = np.cumsum(sizes_U) - sizes_U
    quotas_U = np.full(len(sizes_U), n_draws // len(sizes_U))
    quotas_U[rng.permutation(len(sizes_U))[: n_draws % len(sizes_U)]] += 1
    turn = np.arange(n_draws) - np.repeat(np.cumsum(quotas_U) - quotas_U, quotas_U)
    drawn = images[np.repeat(starts_U, quotas_U) + turn % np.repeat(sizes_U, quotas_U)]
    return torch.from_numpy(rng.permutation(drawn))


def draw_as_published(labels_N: Tensor, *, n_draws: int, seed: Sequence[int]) -> Tensor:
    """Draw as the 2018 code did, for comparisons: image numbers are used as positions in a list sorted by cluster.

    The sampler drew images evenly over clusters, but the data set had been reordered by cluster, so that it returned other
    images: hardly balanced. Each image keeps the label of its own cluster.
    """
    by_cluster = torch.argsort(torch.where(labels_N >= 0, labels_N, labels_N.max() + 1), stable=True)
    assigned_before_N = torch.cumsum(labels_N >= 0, dim=0) - 1
    return by_cluster[assigned_before_N[draw_uniform(labels_N, n_draws=n_draws, seed=seed)]]
