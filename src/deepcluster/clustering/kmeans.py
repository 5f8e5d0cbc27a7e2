"""Step 3: cluster the points. `lloyd` is the algorithm; `KMeans` checks its input, draws the start and calls it.

N points on this rank, R of them, P components, K clusters; C centroids of a search.
"""

from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.estimator import Clusterer, check_count
from deepcluster.clustering.nearest import NearestSearch
from deepcluster.clustering.parallel import blocks_of, map_blocks, row_blocks, rows_at_once
from deepcluster.clustering.points import Init, Points, checked_init
from deepcluster.clustering.starts import STARTS, fill_empty, split_largest
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError
from deepcluster.core.work import Advance, no_advance

# Above this share of moved centroids all points are compared with all centroids.
MOST_MOVED = 0.8


@dataclass(frozen=True)
class LloydResult:
    """Result of `lloyd`.

    Attributes:
        centroids_KP: the centroids that the labels belong to.
        labels_N: the nearest centroid of each point; the lower number where two are equally near.
        squared_N: squared distance to it.
        inertia_history: sum of the squared distances at each assignment, the last one included.
        n_repaired: number of empty clusters that were put beside a large one, over all iterations.
        compared_history: share of all pairs of a point and a centroid that were compared at each assignment.
    """

    centroids_KP: Tensor
    labels_N: Tensor
    squared_N: Tensor
    inertia_history: tuple[float, ...]
    n_repaired: int
    compared_history: tuple[float, ...] = ()


class _Labels:
    """Labels of the points, updated from iteration to iteration without needless comparisons.

    A centroid whose points stay the same does not move, bit for bit. A point whose own centroid has not moved can only be
    won by one that has. A point whose own centroid moved away is compared with all, unless it is still nearer than the
    nearest of the others was. On a GPU all points are compared with all centroids, which is faster than to find out.
    """

    def __init__(self, points_NP: Tensor) -> None:
        self.search = NearestSearch(points_NP)
        self.centroids_KP: Tensor | None = None

    def update(self, centroids_KP: Tensor) -> float:
        """Assign the points to these centroids; return the share of all pairs that were compared."""
        before_KP, self.centroids_KP = self.centroids_KP, centroids_KP
        first_before_K = self.search.first_K
        self.search.use(centroids_KP)
        if before_KP is None or self.search.best_two is not None:
            found = self.search.search()
            self.labels_N, self.squared_N, self.others_N = found.labels_R, found.squared_R, found.others_R
            return 1.0
        # A centroid that had an equal before it was not compared: it counts as moved once it has none.
        moved_K = (centroids_KP != before_KP).any(dim=1) | (self.search.first_K != first_before_K)
        moved = float(moved_K.float().mean())
        self.labels_N = self.labels_N.clone()
        if moved > MOST_MOVED:
            self.squared_N = self.search.squared_distances(slice(None), self.labels_N)
            self._search(None, None)
            return 1.0
        own_moved_N = moved_K[self.labels_N]
        rows = own_moved_N.nonzero().flatten()
        self.squared_N[rows] = self.search.squared_distances(rows, self.labels_N[rows])
        lost_N = own_moved_N & (self.squared_N >= self.others_N)
        self._search(lost_N.nonzero().flatten(), None)
        self._search((~lost_N).nonzero().flatten(), moved_K.nonzero().flatten())
        lost = float(lost_N.float().mean()) if len(lost_N) else 0.0
        return lost + (1 - lost) * moved

    def _search(self, rows_R: Tensor | None, columns_C: Tensor | None) -> None:
        rows = slice(None) if rows_R is None else rows_R
        found = self.search.search(rows_R, columns_C, (self.labels_N[rows], self.squared_N[rows]))
        others_R = found.others_R if columns_C is None else torch.minimum(found.others_R, self.others_N[rows])
        self.labels_N[rows], self.squared_N[rows], self.others_N[rows] = found.labels_R, found.squared_R, others_R


class ExactSums:
    """Sums of the points of each cluster, without any rounding: the order of points, threads and ranks does not matter.

    Points are rounded to a grid so fine (2^-51 of the largest possible sum; some 2^-30 of a number of usual size) that
    sums of its multiples are integers of at most 53 bits. So only points that change their cluster are added.
    """

    def __init__(self, points_NP: Tensor, n_clusters: int, ranks: Ranks) -> None:
        self.points_NP, self.ranks = points_NP, ranks
        blocks, device = row_blocks(points_NP), points_NP.device
        zeros_P = torch.zeros(points_NP.shape[1], dtype=torch.float64, device=device)
        squares_P = sum(map_blocks(lambda block: points_NP[block].double().square_().sum(dim=0), blocks, device), zeros_P)
        count = torch.tensor(float(len(points_NP)), dtype=torch.float64, device=device)
        # No sum of some of the numbers is larger than this (Cauchy-Schwarz).
        largest_P = (ranks.sum(squares_P) * ranks.sum(count)).sqrt().clamp_(min=1e-300)
        # Adding and subtracting 1.5 · 2^52 grid steps rounds to the grid.
        self.rounder_P = 1.5 * torch.exp2(torch.ceil(torch.log2(largest_P)) + 1)
        self.sums_KP = torch.zeros(n_clusters, points_NP.shape[1], dtype=torch.float64, device=device)
        self.sizes_K = torch.zeros(n_clusters, dtype=torch.int64, device=device)
        self.labels_N: Tensor | None = None

    def update(self, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums_KP (float64) and sizes_K over all ranks, given the present labels of the points."""
        before_N, self.labels_N = self.labels_N, labels_N
        if before_N is None:
            self._add(torch.arange(len(labels_N), device=labels_N.device), labels_N, 1)
        else:
            changed = (labels_N != before_N).nonzero().flatten()
            self._add(changed, before_N[changed], -1)
            self._add(changed, labels_N[changed], 1)
        return self.ranks.sum(self.sums_KP.clone()), self.ranks.sum(self.sizes_K.clone())

    def _add(self, rows_R: Tensor, labels_R: Tensor, sign: int) -> None:
        at_once = rows_at_once(self.points_NP)

        def work(components: slice) -> None:
            points_NP, rounder_P = self.points_NP[:, components], self.rounder_P[components]
            for rows, labels in zip(rows_R.split(at_once), labels_R.split(at_once), strict=True):
                block = points_NP.index_select(0, rows).double().add_(rounder_P).sub_(rounder_P)
                self.sums_KP[:, components].index_add_(0, labels, block, alpha=sign)

        every = slice(0, len(self.rounder_P))
        parts = torch.get_num_threads() if rows_R.device.type == "cpu" else 1
        map_blocks(work, blocks_of(every, -(-every.stop // parts)), rows_R.device)
        self.sizes_K.index_add_(0, labels_R, torch.ones_like(labels_R), alpha=sign)


def lloyd(
    points_NP: Tensor,
    centroids_KP: Tensor,
    *,
    max_iter: int,
    tol: float = 0.0,
    spherical: bool = False,
    ranks: Ranks = ONE_PROCESS,
    advance: Advance = no_advance,
) -> LloydResult:
    """Lloyd's algorithm from given centroids: assign, average, repeat; then a last assignment to the final centroids.

    Args:
        points_NP: float32, the points of this rank.
        centroids_KP: where to start; not changed.
        max_iter: number of times the centroids are moved; fewer if they no longer move. Clusters that are empty then are
            filled, with one more assignment for each round of that.
        tol: stop once the inertia falls by less than this share.
        spherical: scale the centroids to unit length; the points should have it, too.
        ranks: the processes over which the points are split.
        advance: called with 1 after each of the `max_iter + 1` assignments, with 0 after further ones; may raise to stop.
    """
    found, sums = _Labels(points_NP), ExactSums(points_NP, len(centroids_KP), ranks)
    centroids_KP = centroids_KP.to(points_NP.device)
    history: list[float] = []
    shares: list[float] = []
    n_repaired = 0
    while True:
        shares.append(found.update(centroids_KP))
        iteration = len(history)
        history.append(float(ranks.sum(found.squared_N.sum(dtype=torch.float64))))
        advance(int(iteration <= max_iter))
        sums_KP, sizes_K = sums.update(found.labels_N)
        moved_KP, repaired = centroids_KP, 0
        settled = tol > 0 and iteration > 0 and history[-2] - history[-1] <= tol * history[-2]
        if iteration < max_iter and not settled:
            moved_KP = _averages(centroids_KP, sums_KP, sizes_K, spherical=spherical)
            if int(sizes_K.min()) == 0:
                squares_K = torch.zeros(len(sizes_K), dtype=torch.float64, device=sizes_K.device)
                squares_K.index_add_(0, found.labels_N, found.squared_N.double())
                repaired = split_largest(moved_KP, sizes_K, ranks.sum(squares_K), seed=iteration)
                moved_KP = normalize(moved_KP) if spherical and repaired else moved_KP
        if moved_KP is centroids_KP or torch.equal(moved_KP, centroids_KP):
            moved_KP, repaired = centroids_KP.clone(), 0
            if max_iter > 0:
                repaired = fill_empty(moved_KP, sizes_K, points_NP, found.labels_N, found.squared_N, ranks=ranks)
            if not repaired:
                return LloydResult(centroids_KP, found.labels_N, found.squared_N, tuple(history), n_repaired, tuple(shares))
        centroids_KP, n_repaired = moved_KP, n_repaired + repaired


def _averages(centroids_KP: Tensor, sums_KP: Tensor, sizes_K: Tensor, *, spherical: bool) -> Tensor:
    """Return the mean of each cluster; an empty one keeps its centroid."""
    means_KP = sums_KP / sizes_K.clamp(min=1)[:, None]
    kept_K1 = (sizes_K > 0)[:, None]
    if spherical:
        means_KP = normalize(means_KP)
        kept_K1 = kept_K1 & (means_KP != 0).any(dim=1, keepdim=True)
    return torch.where(kept_K1, means_KP.float(), centroids_KP)


class KMeans(Clusterer):
    """k-means as an estimator of scikit-learn: exact Lloyd iterations, the same result for the same seed.

    Labels are those of float32 arithmetic whatever precision the machine multiplies in (see nearest.py), and sums of points
    are exact: threads, blocks and ranks change nothing but the last digits of the inertia.

    Args:
        n_clusters: K.
        init: `random` rows, `k-means++` (slower: a pass over the points for each cluster), or centroids (K, P).
        max_iter: Lloyd iterations; 20 in the paper. Fewer are made if the centroids no longer move.
        tol: stop once an iteration lowers the inertia by less than this share; 0: never.
        spherical: scale points and centroids to unit length: the nearest centroid has the largest cosine.
        random_state: what `fit` draws the start from: a seed, None, or a generator of NumPy.
    """

    explanation: ClassVar[str] = (
        "k-means starts from random images and repeats two steps: each image joins the cluster with the nearest centroid, "
        "and each centroid moves to the mean of its images. A cluster that becomes empty takes half of a large one."
    )

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Init = "random",
        max_iter: int = 20,
        tol: float = 0,
        spherical: bool = False,
        random_state: Any = 0,
    ) -> None:
        self.n_clusters, self.init, self.max_iter, self.tol = n_clusters, init, max_iter, tol
        self.spherical, self.random_state = spherical, random_state

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """Build it from a run's settings."""
        return cls(settings.n_clusters, max_iter=settings.kmeans_iterations)

    @classmethod
    def describe(cls, settings: Any) -> str:
        """Return the clusters that these settings ask for in a few words."""
        return f"{settings.n_clusters:,} clusters"

    @property
    def most_steps(self) -> int:
        """Largest number of units that `cluster` passes to `advance`."""
        return self.max_iter + 1

    def cluster(
        self, points_NP: Tensor, *, seed: int = 0, ranks: Ranks = ONE_PROCESS, advance: Advance = no_advance
    ) -> Assignment:
        """Cluster the points of all ranks; return the assignment of the points of this rank.

        Args:
            points_NP, seed, ranks, advance: see `Clusterer.cluster`; however the rows are split, the result is the same.

        Raises:
            InputError: fewer clusters than 1 or more than points; an option out of its range; points as in `Points.of`.
        """
        check_count("max_iter", self.max_iter, least=0)
        if not isinstance(self.tol, Real) or not self.tol >= 0:
            raise InputError(f"tol={self.tol!r} must be 0 or more")
        points = Points.of(points_NP, ranks, unit_rows=self.spherical)
        check_count("clusters", self.n_clusters, most=points.n_all)
        start_KP = checked_init(self.init, self.n_clusters, points)
        if isinstance(start_KP, str):
            start_KP = STARTS[start_KP](points.points_FP, self.n_clusters, seed=seed, ranks=ranks)
        elif self.spherical:
            start_KP = normalize(start_KP)
        found = lloyd(
            points.points_FP,
            start_KP,
            max_iter=self.max_iter,
            tol=self.tol,
            spherical=self.spherical,
            ranks=ranks,
            advance=advance,
        )
        labels_F, distances_F, history = found.labels_N, found.squared_N.sqrt(), found.inertia_history
        return points.assignment(Assignment(labels_F, distances_F, found.centroids_KP, history, found.n_repaired))

    def _placed(self, X: Any) -> Tensor:
        rows_MP = self._rows(X)
        if not self.spherical:
            return rows_MP
        largest_M1 = rows_MP.double().abs().amax(dim=1, keepdim=True)
        return normalize(rows_MP / largest_M1.clamp(min=1e-300))
