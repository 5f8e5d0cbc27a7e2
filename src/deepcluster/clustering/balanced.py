"""Step 3, variant: clusters of nearly equal size, for data where k-means makes giants.

Labels that send equally many points to every cluster at the least cost solve an optimal transport problem; Sinkhorn and
Knopp's scaling solves it if the plan may be soft (Asano, Rupprecht and Vedaldi, Self-labelling, ICLR 2020, section 3.1).
Here the cost is the squared distance: clusters that attract too many points get a lower price, in turns with averaging. The
soft plan becomes labels by letting every cluster keep the points that would lose most elsewhere.

N points on this rank of T on all, P components, K clusters; R points of this rank that wait for a cluster, X of all ranks;
B points of a block.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from numbers import Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from deepcluster.clustering.assignment import UNASSIGNED, Assignment, cluster_means, member_distances
from deepcluster.clustering.estimator import Clusterer, check_count
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.parallel import row_blocks
from deepcluster.clustering.points import Init, Points, checked_init
from deepcluster.clustering.starts import number_points, place_in_cluster
from deepcluster.core.device import true_float32
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError
from deepcluster.core.work import Advance, no_advance

# Scores of a block of points stay in the processor's cache: never an N × K matrix; a GPU wants larger blocks.
BLOCK_SCORES, BLOCK_SCORES_GPU = 1 << 19, 1 << 26
# Lloyd iterations that find the start.
START_ITERATIONS = 5
# Sinkhorn iterations per move of the centroids, from the last prices; with 1, prices lag and sizes oscillate.
SINKHORN_PASSES = 3
# Softness of the plan, as a share of the spread of the scores: 0.3 (plan too soft) and 0.01 (prices rise too slowly) gave up
# to 13 and 22 % more inertia, on mixtures of 3,000 to 20,000 points.
SOFTNESS = 0.1
# Points on which the spread is measured.
SPREAD_ROWS = 4096
# Rounds of offers before the points that are left (usually copies of one) are dealt in order.
MOST_ROUNDS = 40


class BalancedKMeans(Clusterer):
    """k-means whose clusters hold between (1 - spread) and (1 + spread) times T/K points, rounded down and up.

    No cluster is empty. The result is the same for the same seed; over ranks it is the same up to rounding.

    Args:
        n_clusters: K.
        init: where k-means begins, as in `KMeans`.
        max_iter: iterations of balancing and averaging, after a few of k-means; fewer if no label changes. The best one is
            kept.
        spread: how far sizes may differ from T/K, as a share of it; 0: only by rounding.
        random_state: as in `KMeans`.
    """

    explanation: ClassVar[str] = (
        "Balanced k-means gives all clusters nearly the same number of images: clusters that attract too many get a lower "
        "price, and each keeps the images that would lose most in another one. Centroids are the means of their images."
    )

    def __init__(
        self, n_clusters: int = 8, *, init: Init = "random", max_iter: int = 20, spread: float = 0.1, random_state: Any = 0
    ) -> None:
        self.n_clusters, self.init, self.max_iter = n_clusters, init, max_iter
        self.spread, self.random_state = spread, random_state

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """Build it from a run's settings."""
        return cls(settings.n_clusters, max_iter=settings.kmeans_iterations)

    @classmethod
    def describe(cls, settings: Any) -> str:
        """Return the clusters that these settings ask for in a few words."""
        return f"{settings.n_clusters:,} balanced clusters"

    @property
    def most_steps(self) -> int:
        """Largest number of units that `cluster` passes to `advance`, the k-means of the start included."""
        return START_ITERATIONS + 1 + self.max_iter

    def sizes(self, n_points: int) -> tuple[int, int]:
        """Return the smallest and the largest allowed number of points of a cluster."""
        mean = n_points / self.n_clusters
        return max(1, math.floor((1 - self.spread) * mean)), math.ceil((1 + self.spread) * mean)

    @true_float32()
    def cluster(
        self, points_NP: Tensor, *, seed: int = 0, ranks: Ranks = ONE_PROCESS, advance: Advance = no_advance
    ) -> Assignment:
        """Cluster the points of all ranks; return the assignment of the points of this rank.

        Centroids are the means of their members. A point is not always in the cluster whose centroid is nearest: `predict`
        of the result, which is for new points, does not balance.

        Args:
            points_NP, seed, ranks, advance: see `Clusterer.cluster`.

        Raises:
            InputError: fewer clusters than 1 or more than points; an option out of its range; points as in `Points.of`.
        """
        check_count("max_iter", self.max_iter)
        if not isinstance(self.spread, Real) or not 0 <= self.spread < 1:
            raise InputError(f"spread={self.spread!r} must be from 0 to below 1")
        points = Points.of(points_NP, ranks)
        check_count("clusters", self.n_clusters, most=points.n_all)
        kmeans = KMeans(self.n_clusters, init=checked_init(self.init, self.n_clusters, points), max_iter=START_ITERATIONS)
        start = kmeans.cluster(points.points_FP, seed=seed, ranks=ranks, advance=advance)
        balance = _Balance(points.points_FP, self.n_clusters, ranks)
        least, most = self.sizes(balance.n_points)
        found = best = balance.clusters(start.centroids_KP.float().to(points_NP.device), least, most)
        history = found.inertia_history
        advance(1)
        for _ in range(self.max_iter - 1):
            before, found = found, balance.clusters(found.centroids_KP, least, most)
            if not int(ranks.sum((found.labels_N != before.labels_N).sum())):
                break
            history += found.inertia_history
            advance(1)
            best = found if found.inertia_history < best.inertia_history else best
        return points.assignment(replace(best, inertia_history=history))


class _Balance:
    """Prices of the clusters, and labels by these prices, of the points of all ranks."""

    def __init__(self, points_NP: Tensor, n_clusters: int, ranks: Ranks) -> None:
        self.points_NP, self.ranks = points_NP, ranks
        _, self.n_points = number_points(len(points_NP), ranks)
        total_P = torch.zeros(points_NP.shape[1], dtype=torch.float64, device=points_NP.device)
        for rows in row_blocks(points_NP):
            total_P += points_NP[rows].sum(dim=0, dtype=torch.float64)
        self.mean_P = (ranks.sum(total_P) / self.n_points).float()
        self.prices_K = torch.zeros(n_clusters, device=points_NP.device)

    def clusters(self, centroids_KP: Tensor, least: int, most: int) -> Assignment:
        """Return clusters of `least` to `most` points, over all ranks, around these centroids, with their means."""
        softness = SOFTNESS * self._spread(centroids_KP)
        for _ in range(SINKHORN_PASSES):
            self.sinkhorn_pass(centroids_KP, softness)
        labels_N = self._round(centroids_KP, least, most)
        means_KP = cluster_means(self.points_NP, labels_N, len(centroids_KP), ranks=self.ranks)
        distances_N = member_distances(self.points_NP, labels_N, means_KP)
        inertia = float(self.ranks.sum(distances_N.double().square().sum()))
        return Assignment(labels_N, distances_N, means_KP, inertia_history=(inertia,))

    def sinkhorn_pass(self, centroids_KP: Tensor, softness: float) -> None:
        """Change the prices by one scaling of all rows and columns of the plan exp((price - d²) / softness).

        Rows are scaled to 1 as they are made; the logarithm of a column's scaling, times the softness, is its price. The
        N × K matrix is never stored.
        """
        drawn_K = torch.zeros(len(centroids_KP), dtype=torch.float64, device=centroids_KP.device)
        for scores_BK in self._scores(self.points_NP, centroids_KP, self.prices_K):
            drawn_K += scores_BK.div_(softness).softmax(dim=1).sum(dim=0)
        shares_K = self.ranks.sum(drawn_K) * (len(centroids_KP) / self.n_points)
        # The price of a cluster that attracts nothing at all rises by 69 times the softness.
        self.prices_K = self.prices_K - softness * shares_K.clamp(min=1e-30).log().float()

    def _scores(self, points_MP: Tensor, centroids_KP: Tensor, offsets_K: Tensor) -> Iterator[Tensor]:
        """Yield scores_BK = offset - d² of some points, block by block, up to a constant of each point."""
        centred_KP = centroids_KP - self.mean_P
        offsets_K = offsets_K - centred_KP.square().sum(dim=1)
        scores = BLOCK_SCORES_GPU if points_MP.is_cuda else BLOCK_SCORES
        for block in points_MP.split(max(1, scores // len(centroids_KP))):
            yield torch.addmm(offsets_K, block - self.mean_P, centred_KP.T, alpha=2)

    def _spread(self, centroids_KP: Tensor) -> float:
        """Return the standard deviation of a point's squared distances to the centroids, averaged over some points."""
        step = max(1, len(self.points_NP) // SPREAD_ROWS)
        offsets_K = torch.zeros(len(centroids_KP), device=centroids_KP.device)
        total = torch.zeros(2, dtype=torch.float64, device=centroids_KP.device)
        for scores_BK in self._scores(self.points_NP[::step], centroids_KP, offsets_K):
            total[0] += (scores_BK - scores_BK.mean(dim=1, keepdim=True)).square_().mean(dim=1).sqrt_().sum()
            total[1] += len(scores_BK)
        spread, count = self.ranks.sum(total).tolist()
        return max(float(spread / count), 1e-30)

    def _round(self, centroids_KP: Tensor, least: int, most: int) -> Tensor:
        """Fill clusters to their least, then to their most; each keeps the points that would lose most elsewhere."""
        every = self._scores(self.points_NP, centroids_KP, self.prices_K)
        tops = [scores_BK.topk(min(2, len(centroids_KP)), dim=1) for scores_BK in every]
        favourites_N = torch.cat([top.indices[:, 0] for top in tops])
        top_N2 = torch.cat([top.values for top in tops])
        # A point's first offer goes to its best cluster; its loss is how much worse the second is.
        labels_N = torch.full((len(self.points_NP),), UNASSIGNED, device=centroids_KP.device)
        for limit in (least, most):
            for number in range(MOST_ROUNDS + 1):
                sizes_K = self.ranks.sum(torch.bincount(labels_N[labels_N >= 0], minlength=len(centroids_KP)))
                rooms_K = limit - sizes_K
                waiting = (labels_N < 0).nonzero().flatten()
                if int(sizes_K.sum()) == self.n_points or not bool((rooms_K > 0).any()):
                    break
                if number == MOST_ROUNDS:
                    # Points in the order of their favourites take the rooms in order, so that copies stay together.
                    order_X = self.ranks.gather(favourites_N[waiting]).argsort(stable=True)
                    rooms = torch.arange(len(rooms_K), device=rooms_K.device).repeat_interleave(rooms_K.clamp(min=0))
                    labels_X = torch.full_like(order_X, UNASSIGNED)
                    labels_X[order_X[: len(rooms)]] = rooms[: len(order_X)]
                else:
                    if limit == least and number == 0:
                        offers_R, losses_R = favourites_N[waiting], (top_N2[:, -1] - top_N2[:, 0])[waiting]
                    else:
                        offers_R, best_R = self._best_open(waiting, centroids_KP, rooms_K > 0)
                        losses_R = top_N2[waiting, 0] - best_R
                    labels_X = _accept(self.ranks.gather(offers_R), self.ranks.gather(losses_R), rooms_K)
                first, _ = number_points(len(waiting), self.ranks)
                labels_N[waiting] = labels_X[first : first + len(waiting)]
        return labels_N

    def _best_open(self, waiting: Tensor, centroids_KP: Tensor, open_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best cluster with room of each waiting point, and its score."""
        places = open_K.nonzero().flatten()
        scores = self._scores(self.points_NP[waiting], centroids_KP[places], self.prices_K[places])
        found = [scores_BK.max(dim=1) for scores_BK in scores]
        return places[torch.cat([best.indices for best in found])], torch.cat([best.values for best in found])


def _accept(offers_X: Tensor, losses_X: Tensor, rooms_K: Tensor) -> Tensor:
    """Return labels_X: each cluster accepts the offers of the lowest losses while it has room; of equal ones the first."""
    order_X = losses_X.argsort(stable=True)
    ordered_X = offers_X[order_X]
    accepted_X = place_in_cluster(ordered_X, len(rooms_K)) < rooms_K[ordered_X]
    labels_X = torch.empty_like(offers_X)
    labels_X[order_X] = torch.where(accepted_X, ordered_X, UNASSIGNED)
    return labels_X
