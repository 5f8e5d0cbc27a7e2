"""Step 3 for very many clusters: super-clusters of all points, then clusters within each of them.

DeeperCluster (Caron, Bojanowski, Mairal and Joulin, ICCV 2019, arXiv 1905.01278, section 3).

N points on this rank, P components, K clusters, S super-classes, I iterations.

Multiplications of an iteration: N P times the number of super-clusters, then the sum over super-classes of their points,
P and their clusters: some N P K / S. All ranks work on one super-class after the other, so that no point travels.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.estimator import Clusterer, check_count
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.points import Points
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError
from deepcluster.core.work import Advance, no_advance

# Quarter turns of an image, the second pretext task.
ROTATIONS = 4


class HierarchicalKMeans(Clusterer):
    """k-means into super-clusters, then within each super-class into its share of the clusters.

    A super-class is a super-cluster, or with rotations a pair of super-cluster and rotation (number 4 · super-cluster +
    rotation). Shares are in proportion to the points. The result is the same for the same seed on any number of ranks, bit
    for bit except the last digits of the inertia.

    Args:
        n_clusters: K, over all super-classes.
        super_clusters: number of super-clusters.
        max_iter: Lloyd iterations, for the super-clusters and within each super-class.
        random_state: as in `KMeans`.
    """

    explanation: ClassVar[str] = (
        "k-means first divides all images into a few super-clusters. Each super-cluster is then divided by k-means again, "
        "into a number of clusters in proportion to its images."
    )

    def __init__(self, n_clusters: int, *, super_clusters: int, max_iter: int = 20, random_state: Any = 0) -> None:
        self.n_clusters, self.super_clusters = n_clusters, super_clusters
        self.max_iter, self.random_state = max_iter, random_state

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """Build it from a run's settings."""
        return cls(settings.n_clusters, super_clusters=settings.super_clusters, max_iter=settings.kmeans_iterations)

    @classmethod
    def describe(cls, settings: Any) -> str:
        """Return the clusters that these settings ask for in a few words."""
        return f"{settings.n_clusters:,} clusters in {settings.super_clusters:,} super-clusters"

    @property
    def most_steps(self) -> int:
        """Largest number of units that `cluster` passes to `advance`; the rotations of a super-cluster count together."""
        return (self.max_iter + 1) * (1 + self.super_clusters)

    def cluster(
        self,
        points_NP: Tensor,
        *,
        rotations_N: Tensor | None = None,
        seed: int = 0,
        ranks: Ranks = ONE_PROCESS,
        advance: Advance = no_advance,
    ) -> Assignment:
        """Cluster the points of all ranks; return the assignment of the points of this rank to clusters 0 … K-1.

        Args:
            points_NP, seed, ranks, advance: see `Clusterer.cluster`.
            rotations_N: 0 … 3, the quarter turns of each image; on all ranks, or on none.

        Raises:
            InputError: more clusters than points, fewer than super-classes; rotations that are not 0 … 3.
        """
        points = Points.of(points_NP, ranks)
        self._check(points_NP, rotations_N, ranks)
        turns = 1 if rotations_N is None else ROTATIONS
        kmeans = KMeans(self.super_clusters, max_iter=self.max_iter)
        supers = kmeans.cluster(points.points_FP, seed=seed, ranks=ranks, advance=advance)
        super_F = supers.labels_N * turns
        super_F += 0 if rotations_N is None else rotations_N[points.finite_N.to(rotations_N.device)].cpu()
        sizes_S = ranks.sum(torch.bincount(super_F, minlength=self.super_clusters * turns))
        shares_S = shares_of(self.n_clusters, sizes_S)
        first_S = shares_S.cumsum(0) - shares_S
        labels_F, distances_F = supers.labels_N.clone(), supers.distances_N.clone()
        parts: dict[int, Assignment] = {}
        for number in shares_S.nonzero().flatten().tolist():
            rows = (super_F == number).nonzero().flatten()
            # Of the rotations of a super-cluster only the first counts its iterations, see `most_steps`.
            count = advance if number % turns == 0 else lambda _: advance(0)
            kmeans = KMeans(int(shares_S[number]), max_iter=self.max_iter)
            own_RP = points.points_FP[rows.to(points_NP.device)]
            part = parts[number] = kmeans.cluster(own_RP, seed=seed + 1 + number, ranks=ranks, advance=count)
            labels_F[rows], distances_F[rows] = part.labels_N + first_S[number], part.distances_N.float()
        found = Assignment(
            labels_F,
            distances_F,
            torch.cat([part.centroids_KP.float() for part in parts.values()]),
            inertia_history=_sum_of_histories(parts, len(shares_S)),
            n_repaired=supers.n_repaired + sum(part.n_repaired for part in parts.values()),
            super_of_cluster_K=torch.arange(len(shares_S)).repeat_interleave(shares_S),
            super_centroids_SP=supers.centroids_KP.float().repeat_interleave(turns, dim=0),
        )
        return points.assignment(found)

    def _check(self, points_NP: Tensor, rotations_N: Tensor | None, ranks: Ranks) -> None:
        check_count("clusters", self.n_clusters)
        check_count("super_clusters", self.super_clusters)
        check_count("max_iter", self.max_iter, least=0)
        is_rotated = rotations_N is not None
        fits = rotations_N is None or (len(rotations_N) == len(points_NP) and not (rotations_N // ROTATIONS).any())
        n_unfit, n_rotated, n_points = ranks.sum(torch.tensor([not fits, is_rotated, len(points_NP)]).long()).tolist()
        if n_unfit or n_rotated not in (0, ranks.size):
            raise InputError(f"rotations must be one per row, from 0 to {ROTATIONS - 1}, on all ranks or on none")
        n_supers = self.super_clusters * (ROTATIONS if is_rotated else 1)
        if not n_supers <= self.n_clusters <= n_points:
            raise InputError(
                f"clusters={self.n_clusters} must be between the {n_supers} super-classes, as each needs one, and the "
                f"{n_points} points"
            )


def shares_of(n_clusters: int, sizes_S: Tensor) -> Tensor:
    """Return the number of clusters of each super-class, int64: one each, the rest in proportion to its points but one.

    They sum to K. A super-class without points gets none, and none gets more than it has points. The largest remainders are
    rounded up; among equal ones the first.

    Raises:
        InputError: fewer clusters than super-classes with points, or more than points.
    """
    shares_S = (sizes_S > 0).long()
    rest, weights_S = n_clusters - int(shares_S.sum()), (sizes_S - shares_S).long()
    total = int(weights_S.sum())
    if rest < 0 or rest > total:
        raise InputError(
            f"clusters={n_clusters} must be between {int(shares_S.sum())} (each super-class with points needs one) and the "
            f"{int(sizes_S.sum())} points"
        )
    shares_S += rest * weights_S // max(1, total)
    remainders_S = rest * weights_S % max(1, total)
    left = n_clusters - int(shares_S.sum())
    shares_S[remainders_S.argsort(descending=True, stable=True)[:left]] += 1
    return shares_S


def _sum_of_histories(parts: dict[int, Assignment], n_supers: int) -> tuple[float, ...]:
    """Return the inertia over all super-classes at each iteration; one that ended keeps its last."""
    longest = max(len(part.inertia_history) for part in parts.values())
    history_SI = torch.zeros(n_supers, longest, dtype=torch.float64)
    for number, part in parts.items():
        history = torch.tensor(part.inertia_history, dtype=torch.float64)
        history_SI[number], history_SI[number, : len(history)] = history[-1], history
    return tuple(history_SI.sum(dim=0).tolist())
