"""Step 3: group the points. `lloyd` is the algorithm, `KMeans` checks, starts and calls it.

N points, P components, K clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.nearest import BLOCK_ROWS, NearestSearch, nearest_centroids
from deepcluster.clustering.parallel import blocks_of, map_blocks
from deepcluster.clustering.reduction import AllReduce, alone
from deepcluster.clustering.repair import fill_empty, split_largest
from deepcluster.clustering.starts import STARTS, numbers_among_all
from deepcluster.clustering.sums import ExactSums
from deepcluster.core.errors import InputError, did_you_mean

__all__ = ["KMeans", "LloydResult", "LloydState", "lloyd", "nearest_centroids"]

# Where more than this share of the centroids moves, all points are compared with all of them.
MOST_MOVED = 0.8


@dataclass(frozen=True)
class LloydState:
    """Where the iterations stand: `lloyd` goes on from here to the very result that it would have had.

    Attributes:
        centroids_KP: to which the points were assigned last.
        history: sum of the squared distances at each assignment so far.
        n_repaired: how often an empty cluster was put beside a large one so far.
    """

    centroids_KP: Tensor
    history: tuple[float, ...] = ()
    n_repaired: int = 0

    @property
    def iteration(self) -> int:
        """Number of the last assignment, from 0."""
        return len(self.history) - 1

    @property
    def inertia(self) -> float:
        """Sum of the squared distances at the last assignment."""
        return self.history[-1]


@dataclass(frozen=True)
class LloydResult:
    """What `lloyd` found.

    Attributes:
        centroids_KP: the centroids that the labels belong to.
        labels_N: the nearest centroid of each point; the lower number where two are equally near.
        distances_N: squared distance to it.
        inertia_history: sum of the squared distances at each iteration's assignment, the last one included.
        n_repaired: how often an empty cluster was put beside a large one, over all iterations.
        compared_history: share of all pairs of a point and a centroid that were compared at each assignment.
    """

    centroids_KP: Tensor
    labels_N: Tensor
    distances_N: Tensor
    inertia_history: tuple[float, ...]
    n_repaired: int
    compared_history: tuple[float, ...] = ()


class _Assigned:
    """Labels of the points that follow the centroids from iteration to iteration, without needless comparisons.

    A centroid whose points stay the same rests, bit for bit. A point whose own centroid rests can only be won by one that
    moved. A point whose own centroid moved away is compared with all, unless it is still nearer than the nearest of the
    others was.
    """

    def __init__(self, points_NP: Tensor) -> None:
        self.engine = NearestSearch(points_NP)
        self.centroids_KP: Tensor | None = None

    def follow(self, centroids_KP: Tensor) -> float:
        """Assign the points to these centroids; returns the share of all pairs that were compared."""
        before_KP, self.centroids_KP = self.centroids_KP, centroids_KP
        first_before_K = self.engine.first_K
        self.engine.use(centroids_KP)
        if before_KP is None:
            found = self.engine.search()
            self.labels_N, self.distances_N, self.others_N = found.labels_R, found.distances_R, found.others_R
            return 1.0
        # A centroid that had an equal before it was not compared: it counts as moved once it has none.
        moved_K = (centroids_KP != before_KP).any(dim=1) | (self.engine.first_K != first_before_K)
        moved = float(moved_K.float().mean())
        self.labels_N = self.labels_N.clone()
        if moved > MOST_MOVED:
            self.distances_N = self.engine.distances(slice(None), self.labels_N)
            self._search(None, None)
            return 1.0
        own_moved_N = moved_K[self.labels_N]
        rows = own_moved_N.nonzero().flatten()
        self.distances_N[rows] = self.engine.distances(rows, self.labels_N[rows])
        lost_N = own_moved_N & (self.distances_N >= self.others_N)
        self._search(lost_N.nonzero().flatten(), None)
        self._search((~lost_N).nonzero().flatten(), moved_K.nonzero().flatten())
        lost = float(lost_N.float().mean()) if len(lost_N) else 0.0
        return lost + (1 - lost) * moved

    def _search(self, rows_R: Tensor | None, columns_C: Tensor | None) -> None:
        rows = slice(None) if rows_R is None else rows_R
        found = self.engine.search(rows_R, columns_C, self.labels_N[rows], self.distances_N[rows])
        others_R = found.others_R if columns_C is None else torch.minimum(found.others_R, self.others_N[rows])
        self.labels_N[rows], self.distances_N[rows], self.others_N[rows] = found.labels_R, found.distances_R, others_R


def lloyd(
    points_NP: Tensor,
    start: Tensor | LloydState,
    *,
    iterations: int,
    tolerance: float = 0.0,
    spherical: bool = False,
    all_reduce: AllReduce = alone,
    numbers_N: Tensor | None = None,
    on_iteration: Callable[[LloydState], None] | None = None,
) -> LloydResult:
    """Lloyd's algorithm from given centroids: assign, average, repeat; then a last assignment to the final centroids.

    Args:
        points_NP: float32; may be this rank's share of the rows.
        start: centroids (K, P), not changed; or a state to go on from.
        iterations: how often the centroids are moved; ends early where they rest. Clusters that are empty then are filled,
            with an assignment more for each round of that.
        tolerance: ends early where the inertia falls by less than this share.
        spherical: centroids are scaled to unit length; the points should be, too.
        all_reduce: sums a tensor over the ranks; the identity on one process.
        numbers_N: numbers of this rank's points among all, ascending; from 0 by default.
        on_iteration: called after each assignment with the state; may raise to stop.
    """
    # The last assignment of a state is made once more: its labels are not kept.
    state = LloydState(start) if isinstance(start, Tensor) else replace(start, history=start.history[:-1])
    state = replace(state, centroids_KP=state.centroids_KP.to(points_NP.device))
    assigned = _Assigned(points_NP)
    sums = ExactSums(points_NP, len(state.centroids_KP), all_reduce)
    compared: list[float] = []
    numbers_N = torch.arange(len(points_NP), device=points_NP.device) if numbers_N is None else numbers_N
    while True:
        compared.append(assigned.follow(state.centroids_KP))
        inertia = float(all_reduce(assigned.distances_N.sum(dtype=torch.float64)))
        state = replace(state, history=(*state.history, inertia))
        if on_iteration is not None:
            on_iteration(state)
        sums_KP, sizes_K = sums.follow(assigned.labels_N)
        centroids_KP, repaired = state.centroids_KP, 0
        if state.iteration < iterations and not _settled(state.history, tolerance):
            centroids_KP = _averages(centroids_KP, sums_KP, sizes_K, spherical=spherical)
            repaired = _split(centroids_KP, sizes_K, assigned, state.iteration, all_reduce)
            centroids_KP = normalize(centroids_KP) if spherical and repaired else centroids_KP
        if torch.equal(centroids_KP, state.centroids_KP):
            centroids_KP = centroids_KP.clone()
            found = (points_NP, assigned.labels_N, assigned.distances_N)
            if iterations > 0:
                repaired = fill_empty(centroids_KP, sizes_K, *found, numbers_N=numbers_N, all_reduce=all_reduce)
            if not repaired:
                break
        state = LloydState(centroids_KP, state.history, state.n_repaired + repaired)
    return LloydResult(
        state.centroids_KP, assigned.labels_N, assigned.distances_N, state.history, state.n_repaired, tuple(compared)
    )


def _settled(history: tuple[float, ...], tolerance: float) -> bool:
    return tolerance > 0 and len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-2]


def _averages(centroids_KP: Tensor, sums_KP: Tensor, sizes_K: Tensor, *, spherical: bool) -> Tensor:
    """The mean of each cluster; an empty one stays where it is."""
    means_KP = sums_KP / sizes_K.clamp(min=1)[:, None]
    kept_K1 = (sizes_K > 0)[:, None]
    if spherical:
        means_KP = normalize(means_KP)
        kept_K1 = kept_K1 & (means_KP != 0).any(dim=1, keepdim=True)
    return torch.where(kept_K1, means_KP.float(), centroids_KP)


def _split(centroids_KP: Tensor, sizes_K: Tensor, assigned: _Assigned, iteration: int, all_reduce: AllReduce) -> int:
    """Put empty clusters beside large ones, in place; returns how many there were."""
    if int(sizes_K.min()) > 0:
        return 0
    squares_K = torch.zeros(len(sizes_K), dtype=torch.float64, device=sizes_K.device)
    squares_K = all_reduce(squares_K.index_add_(0, assigned.labels_N, assigned.distances_N.double()))
    return split_largest(centroids_KP, sizes_K, squares_K, seed=iteration)


class KMeans:
    """k-means with the names of scikit-learn: exact Lloyd iterations, the same result for the same seed.

    Labels are those of float32 arithmetic whatever the machine multiplies in (see nearest.py), sums of points are made
    without rounding: threads, blocks and ranks change nothing but the last digit of the inertia.

    Args:
        n_clusters: K.
        iterations: Lloyd iterations; 20 in the paper. Fewer are made where the centroids rest before.
        start: `random` rows, or `k-means++` (slower: a pass over the points for each cluster).
        seed: of the start.
        tolerance: ends where an iteration lowers the inertia by less than this share; 0 goes on to the end.
        spherical: points and centroids are scaled to unit length: the nearest is that of the largest cosine.
        all_reduce: sums a tensor over the ranks; the identity on one process.

    Raises:
        InputError: an unknown start, or a negative number.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        iterations: int = 20,
        start: str = "random",
        seed: int = 0,
        tolerance: float = 0.0,
        spherical: bool = False,
        all_reduce: AllReduce = alone,
    ) -> None:
        if start not in STARTS:
            raise InputError(f"unknown start {start!r}{did_you_mean(start, STARTS)}: use one of {', '.join(STARTS)}")
        if iterations < 0 or tolerance < 0:
            raise InputError(f"iterations={iterations} and tolerance={tolerance:g} must not be negative")
        self.n_clusters = n_clusters
        self.iterations = iterations
        self.start = start
        self.seed = seed
        self.tolerance = tolerance
        self.spherical = spherical
        self.all_reduce = all_reduce

    def fit(
        self,
        points_NP: Tensor,
        *,
        numbers_N: Tensor | None = None,
        start_KP: Tensor | None = None,
        resume: LloydState | None = None,
        on_iteration: Callable[[LloydState], None] | None = None,
    ) -> Assignment:
        """Group the points; rows that are not finite stay unassigned (label -1, distance NaN).

        Args:
            points_NP: any floating type; may be this rank's share of the rows. The result is that of these rows.
            numbers_N: number of each row's image among all, ascending, where rows are spread over ranks: start and ties go
                by these, not by the rank. Images may have no row. On one process rows are numbered from 0 by default.
            start_KP: centroids to start from, instead of drawn ones.
            resume: a state that `on_iteration` was given, to go on from.
            on_iteration: called after each assignment; may raise to stop.

        Raises:
            InputError: fewer clusters than 1 or more than points; a start that is not (K, P); numbers that do not ascend,
                or that two rows have.
        """
        # Checked as float32: a float64 beyond its range is not finite here.
        seen_N = torch.empty(len(points_NP), dtype=torch.bool, device=points_NP.device)

        def look(block: slice) -> None:
            seen_N[block] = torch.isfinite(points_NP[block].float()).all(dim=1)

        map_blocks(look, blocks_of(slice(0, len(points_NP)), BLOCK_ROWS), points_NP.device)
        seen_NP = (points_NP if bool(seen_N.all()) else points_NP[seen_N]).float().contiguous()
        if self.spherical:
            seen_NP = normalize(seen_NP)
        numbers_N, n_all = numbers_among_all(numbers_N, seen_N, self.all_reduce)
        if not 1 <= self.n_clusters <= n_all:
            raise InputError(f"clusters={self.n_clusters} must be between 1 and the {n_all} points")
        result = lloyd(
            seen_NP,
            resume or self._start(seen_NP, numbers_N, n_all, start_KP),
            iterations=self.iterations,
            tolerance=self.tolerance,
            spherical=self.spherical,
            all_reduce=self.all_reduce,
            numbers_N=numbers_N,
            on_iteration=on_iteration,
        )
        return Assignment.over_rows(
            seen_N,
            result.labels_N,
            result.distances_N.sqrt(),
            result.centroids_KP,
            inertia_history=result.inertia_history,
            n_repaired=result.n_repaired,
        )

    def _start(self, seen_NP: Tensor, numbers_N: Tensor, n_all: int, start_KP: Tensor | None) -> Tensor:
        if start_KP is None:
            return STARTS[self.start](seen_NP, numbers_N, n_all, self.n_clusters, seed=self.seed, all_reduce=self.all_reduce)
        wanted = self.n_clusters, seen_NP.shape[1]
        if start_KP.shape != wanted:
            raise InputError(f"start has shape {(*start_KP.shape,)}, not {wanted}")
        start_KP = start_KP.to(seen_NP.device, torch.float32)
        return normalize(start_KP) if self.spherical else start_KP
