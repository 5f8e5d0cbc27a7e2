"""Step 3'': groups of nearly equal size, for data where k-means makes giants.

Labels that send equally many points to every cluster at the least cost are an optimal transport problem; Sinkhorn and
Knopp's scaling solves it where the plan may be soft (Asano, Rupprecht and Vedaldi, Self-labelling, ICLR 2020, section 3.1).
Here the cost is the squared distance: clusters that draw too many points get a lower price, in turns with averaging. The
soft plan becomes labels by letting every cluster keep the points that would lose most elsewhere.

N points on this rank of T on all, P components, K clusters, W points that wait for a cluster, B of a block.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.clustering.assignment import UNASSIGNED, Assignment, cluster_means, member_distances
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.reduction import AllReduce, alone
from deepcluster.clustering.starts import numbers_among_all
from deepcluster.core.errors import InputError

# Scores of a block of points stay in the processor's cache: never an N × K matrix; a GPU wants larger blocks.
BLOCK_SCORES = 1 << 19
BLOCK_SCORES_GPU = 1 << 26
BLOCK_ROWS = 8192
# Lloyd iterations before the balance: they find the start.
START_ITERATIONS = 5
# Sinkhorn iterations for each move of the centroids, from the prices of the last; with 1, prices lag and sizes swing.
SINKHORN_PASSES = 3
# The plan is as soft as this share of the scores' spread: 0.3 and 0.01 gave up to 13 and 22 % more inertia (mixtures of
# 3,000 to 20,000 points), the one for its plan is too soft, the other for its prices rise too slowly.
SOFTNESS = 0.1
# Points that the spread is measured on.
SPREAD_ROWS = 4096
# Rounds of offers before the points that are left (copies of one, as a rule) are dealt in order.
MOST_ROUNDS = 40


class BalancedKMeans:
    """k-means whose clusters hold between (1 - spread) and (1 + spread) times N/K points, rounded down and up.

    No cluster is empty. The same result for the same seed; over ranks the same to rounding.

    Args:
        n_clusters: K.
        iterations: of balancing and averaging, after a few of k-means; ends early where no label changes. The best is kept.
        spread: how far sizes may differ from N/K, as a share of it; 0 = not at all (but for rounding).
        seed: of the start.
        all_reduce: sums a tensor over the ranks; the identity on one process.

    Raises:
        InputError: a setting that makes no sense.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        iterations: int = 20,
        spread: float = 0.1,
        seed: int = 0,
        all_reduce: AllReduce = alone,
    ) -> None:
        if iterations < 1 or not 0 <= spread < 1:
            raise InputError(f"iterations={iterations} must be 1 or more, and spread={spread:g} from 0 to below 1")
        self.n_clusters = n_clusters
        self.iterations = iterations
        self.spread = spread
        self.seed = seed
        self.all_reduce = all_reduce

    @property
    def most_steps(self) -> int:
        """How often `fit` calls `on_iteration`, at most; k-means at the start included."""
        return START_ITERATIONS + 1 + self.iterations

    def sizes(self, n_points: int) -> tuple[int, int]:
        """The least and the most points of a cluster."""
        mean = n_points / self.n_clusters
        return max(1, math.floor((1 - self.spread) * mean)), math.ceil((1 + self.spread) * mean)

    def fit(
        self,
        points_NP: Tensor,
        *,
        numbers_N: Tensor | None = None,
        start_KP: Tensor | None = None,
        on_iteration: Callable[[int, float], None] | None = None,
    ) -> Assignment:
        """Group the points; rows that are not finite stay unassigned (label -1, distance NaN).

        Centroids are the means of their members. A point is not always in the cluster whose centroid is nearest:
        `predict` of the result, which is for new points, does not balance.

        Args:
            points_NP: any floating type; may be this rank's share of the rows. The result is that of these rows.
            numbers_N: number of each row's image among all, as `KMeans.fit` takes them.
            start_KP: centroids to start from, instead of drawn ones.
            on_iteration: called with the number of the step and the inertia after it; may raise to stop.

        Raises:
            InputError: fewer clusters than 1 or more than points; a start that is not (K, P).
        """
        steps: list[float] = []

        def tell(inertia: float) -> None:
            steps.append(inertia)
            if on_iteration is not None:
                on_iteration(len(steps) - 1, inertia)

        kmeans = KMeans(self.n_clusters, iterations=START_ITERATIONS, seed=self.seed, all_reduce=self.all_reduce)
        start = kmeans.fit(points_NP, numbers_N=numbers_N, start_KP=start_KP, on_iteration=lambda state: tell(state.inertia))
        seen_N = (start.labels_N >= 0).to(points_NP.device)
        seen_NP = (points_NP if bool(seen_N.all()) else points_NP[seen_N]).float()
        balance = _Balance(seen_NP, *numbers_among_all(numbers_N, seen_N, self.all_reduce), self.all_reduce)
        best, history = self._alternate(balance, start.centroids_KP.to(seen_NP.device), tell)
        return Assignment.over_rows(
            seen_N, best.labels_N, best.distances_N, best.centroids_KP, inertia_history=tuple(history)
        )

    def _alternate(
        self, balance: "_Balance", centroids_KP: Tensor, tell: Callable[[float], None]
    ) -> tuple["_Groups", list[float]]:
        """The best of all iterations, and the inertia of each."""
        least, most = self.sizes(balance.n_points)
        found = best = balance.groups(centroids_KP, least, most)
        history = [found.inertia]
        tell(found.inertia)
        for _ in range(self.iterations - 1):
            before, found = found, balance.groups(found.centroids_KP, least, most)
            if not int(self.all_reduce((found.labels_N != before.labels_N).sum())):
                break
            history.append(found.inertia)
            tell(found.inertia)
            best = found if found.inertia < best.inertia else best
        return best, history


def scores_by_block(points_NP: Tensor, centroids_KP: Tensor, mean_P: Tensor, offsets_K: Tensor) -> Iterator[Tensor]:
    """Scores_BK = offset - d² of all points, block by block, but for a constant of each point."""
    centred_KP = centroids_KP - mean_P
    offsets_K = offsets_K - centred_KP.square().sum(dim=1)
    scores = BLOCK_SCORES_GPU if points_NP.is_cuda else BLOCK_SCORES
    for block in points_NP.split(max(1, scores // len(centroids_KP))):
        yield torch.addmm(offsets_K, block - mean_P, centred_KP.T, alpha=2)


def sinkhorn_pass(
    points_NP: Tensor,
    centroids_KP: Tensor,
    mean_P: Tensor,
    prices_K: Tensor,
    *,
    softness: float,
    n_points: int,
    all_reduce: AllReduce = alone,
) -> Tensor:
    """Prices_K after one scaling of all rows and columns of the plan exp((price - d²) / softness).

    Rows are scaled to 1 where they are made; the logarithm of a column's scaling, times the softness, is its price. N × K
    numbers are never kept.
    """
    drawn_K = torch.zeros(len(centroids_KP), dtype=torch.float64, device=points_NP.device)
    for scores_BK in scores_by_block(points_NP, centroids_KP, mean_P, prices_K):
        drawn_K += scores_BK.div_(softness).softmax(dim=1).sum(dim=0)
    shares_K = all_reduce(drawn_K) * (len(centroids_KP) / n_points)
    # A cluster that draws nothing at all rises by 69 times the softness.
    return prices_K - softness * shares_K.clamp(min=1e-30).log().float()


@dataclass(frozen=True)
class _Groups:
    """Labels of points, the means of the groups, distances to them and the sum of their squares over all ranks."""

    labels_N: Tensor
    centroids_KP: Tensor
    distances_N: Tensor
    inertia: float


class _Balance:
    """Prices of the clusters, and labels by them, of the points of all ranks."""

    def __init__(self, points_NP: Tensor, numbers_N: Tensor, n_points: int, all_reduce: AllReduce) -> None:
        self.points_NP, self.numbers_N, self.n_points, self.all_reduce = points_NP, numbers_N, n_points, all_reduce
        total_P = torch.zeros(points_NP.shape[1], dtype=torch.float64, device=points_NP.device)
        for block in points_NP.split(BLOCK_ROWS):
            total_P += block.sum(dim=0, dtype=torch.float64)
        self.mean_P = (all_reduce(total_P) / self.n_points).float()
        self.prices_K: Tensor | None = None

    def groups(self, centroids_KP: Tensor, least: int, most: int) -> _Groups:
        """Groups of `least` to `most` points, over all ranks, around these centroids; they are then averaged."""
        if self.prices_K is None:
            self.prices_K = torch.zeros(len(centroids_KP), device=centroids_KP.device)
        softness = SOFTNESS * self._spread(centroids_KP)
        for _ in range(SINKHORN_PASSES):
            self.prices_K = sinkhorn_pass(
                self.points_NP,
                centroids_KP,
                self.mean_P,
                self.prices_K,
                softness=softness,
                n_points=self.n_points,
                all_reduce=self.all_reduce,
            )
        labels_N = self._round(centroids_KP, self.prices_K, least, most)
        means_KP = cluster_means(self.points_NP, labels_N, len(centroids_KP), all_reduce=self.all_reduce)
        distances_N = member_distances(self.points_NP, labels_N, means_KP)
        inertia = float(self.all_reduce(distances_N.double().square().sum()))
        return _Groups(labels_N, means_KP, distances_N, inertia)

    def _spread(self, centroids_KP: Tensor) -> float:
        """Standard deviation of a point's squared distances to the centroids, the mean over some points."""
        step = max(1, len(self.points_NP) // SPREAD_ROWS)
        offsets_K = torch.zeros(len(centroids_KP), device=centroids_KP.device)
        total = torch.zeros(2, dtype=torch.float64, device=centroids_KP.device)
        for scores_BK in scores_by_block(self.points_NP[::step], centroids_KP, self.mean_P, offsets_K):
            total[0] += (scores_BK - scores_BK.mean(dim=1, keepdim=True)).square_().mean(dim=1).sqrt_().sum()
            total[1] += len(scores_BK)
        spread, count = self.all_reduce(total).tolist()
        return max(float(spread / count), 1e-30)

    def _round(self, centroids_KP: Tensor, prices_K: Tensor, least: int, most: int) -> Tensor:
        """Every cluster gets its least first, then up to its most; each keeps those who would lose most elsewhere."""
        favourites_N, scores_N, margins_N = self._favourites(centroids_KP, prices_K)
        labels_T = torch.full((self.n_points,), UNASSIGNED, device=centroids_KP.device)
        for limit in (least, most):
            for number in range(MOST_ROUNDS + 1):
                rooms_K = limit - torch.bincount(labels_T[labels_T >= 0], minlength=len(prices_K))
                waiting = (labels_T[self.numbers_N] < 0).nonzero().flatten()
                n_waiting = self.n_points - int((labels_T >= 0).sum())
                if not n_waiting or not bool((rooms_K > 0).any()):
                    break
                if number == MOST_ROUNDS:
                    offers_T, _ = self._gather(waiting, favourites_N[waiting], scores_N[waiting])
                    _deal(labels_T, offers_T, rooms_K)
                    break
                if limit == least and number == 0:
                    offers_W, losses_W = favourites_N[waiting], -margins_N[waiting]
                else:
                    offers_W, best_W = self._best_open(waiting, centroids_KP, prices_K, rooms_K > 0)
                    losses_W = scores_N[waiting] - best_W
                _accept(labels_T, *self._gather(waiting, offers_W, losses_W), rooms_K)
        return labels_T[self.numbers_N]

    def _favourites(self, centroids_KP: Tensor, prices_K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each point's best cluster, its score, and how much worse the second is."""
        tops, places = [], []
        for scores_BK in scores_by_block(self.points_NP, centroids_KP, self.mean_P, prices_K):
            top = scores_BK.topk(min(2, len(prices_K)), dim=1)
            tops.append(top.values)
            places.append(top.indices[:, 0])
        top_N2 = torch.cat(tops)
        return torch.cat(places), top_N2[:, 0], top_N2[:, 0] - top_N2[:, -1]

    def _best_open(self, waiting: Tensor, centroids_KP: Tensor, prices_K: Tensor, open_K: Tensor) -> tuple[Tensor, Tensor]:
        """Best cluster that has room, and its score, of each point that waits."""
        places = open_K.nonzero().flatten()
        found = [
            scores_BK.max(dim=1)
            for scores_BK in scores_by_block(self.points_NP[waiting], centroids_KP[places], self.mean_P, prices_K[places])
        ]
        return places[torch.cat([best.indices for best in found])], torch.cat([best.values for best in found])

    def _gather(self, waiting: Tensor, offers_W: Tensor, losses_W: Tensor) -> tuple[Tensor, Tensor]:
        """Offers_T and losses_T of all ranks' points; an offer of -1 is none."""
        numbers_W = self.numbers_N[waiting]
        offers_T = offers_W.new_zeros(self.n_points).index_copy_(0, numbers_W, offers_W + 1)
        losses_T = losses_W.new_zeros(self.n_points).index_copy_(0, numbers_W, losses_W)
        return self.all_reduce(offers_T) - 1, self.all_reduce(losses_T)


def _accept(labels_T: Tensor, offers_T: Tensor, losses_T: Tensor, rooms_K: Tensor) -> None:
    """Every cluster takes the offers of the lowest losses while it has room, in place; of equal ones the first."""
    offered = (offers_T >= 0).nonzero().flatten()
    offered = offered[losses_T[offered].argsort(stable=True)]
    offered = offered[offers_T[offered].argsort(stable=True)]
    offers = offers_T[offered]
    counts_K = torch.bincount(offers, minlength=len(rooms_K))
    place = torch.arange(len(offers), device=offers.device) - (counts_K.cumsum(0) - counts_K)[offers]
    taken = place < rooms_K[offers]
    labels_T[offered[taken]] = offers[taken]


def _deal(labels_T: Tensor, favourites_T: Tensor, rooms_K: Tensor) -> None:
    """Give the points that have a favourite, in its order, to what room there is, in place: copies stay together."""
    waiting = (favourites_T >= 0).nonzero().flatten()
    waiting = waiting[favourites_T[waiting].argsort(stable=True)]
    rooms = torch.arange(len(rooms_K), device=rooms_K.device).repeat_interleave(rooms_K.clamp(min=0))
    labels_T[waiting[: len(rooms)]] = rooms[: len(waiting)]
