"""Step 3 for very many clusters: super-clusters of all points, then clusters within each, side by side on groups of ranks.

DeeperCluster (Caron, Bojanowski, Mairal and Joulin, ICCV 2019, arXiv 1905.01278, section 3). N points of P components, M of
them on this rank, R worked on here; K clusters of which G are of one super-class, S super-classes, W ranks, I images.

Memory of a rank, in bytes, beside its own points (4 M P) and what `KMeans` takes: while points travel, a copy of those that
leave and one of those that come, (4 P + 24) (M + R); then a copy of those that came, by super-class, in place of the first;
centroids, 4 K P, twice; a byte an image, I. R is about N / W where super-classes divide evenly, and else at least the
largest super-class over the ranks of its group. On one rank there is the sorted copy alone, (4 P + 24) N.

Bytes that a rank gives to others: its points once, (4 P + 24) M; labels and distances back, 20 R. Sums over all ranks: a
byte an image, 8 (P + 1) a super-cluster in each Lloyd iteration, 4 K P for the centroids. Sums over the ranks of a group: a
byte an image for each of its super-classes, 4 G P for a start, 8 (P + 1) G in each iteration. A group of one rank sends
nothing while it works. Multiplications of an iteration: N P times super-clusters, then Σ_s N_s P G_s: some N P K / S.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.clustering.assignment import UNASSIGNED, Assignment
from deepcluster.clustering.groups import GroupWork, Ranks, plan_groups, shares_of
from deepcluster.clustering.kmeans import KMeans
from deepcluster.core.errors import InputError

# Rotations by a quarter turn: the second pretext.
ROTATIONS = 4


@dataclass(frozen=True)
class Hierarchy:
    """Which clusters belong to which super-class.

    Attributes:
        super_of_cluster_K: super-class of each cluster, int64, ascending: clusters of one super-class are in a row.
        n_supers: S. Some may have no cluster, as no point is in them.
    """

    super_of_cluster_K: Tensor
    n_supers: int

    @property
    def sizes_S(self) -> Tensor:
        """Clusters of each super-class."""
        return torch.bincount(self.super_of_cluster_K, minlength=self.n_supers)


class HierarchicalKMeans:
    """k-means into super-clusters, then within each super-class into its share of the clusters.

    A super-class is a super-cluster, or with rotations a pair of super-cluster and rotation (number 4 · super-cluster +
    rotation). Shares are in proportion to the points. The same result for the same seed on any number of ranks, bit for bit
    (but for the inertia's last digits).

    Args:
        n_clusters: K, over all super-classes.
        super_clusters: how many the points are put into first.
        iterations: of Lloyd, for the super-clusters and within each super-class.
        seed: of the starts.
        ranks: the other ranks; none by default.

    Raises:
        InputError: a number that makes no sense.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        super_clusters: int,
        iterations: int = 20,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        if super_clusters < 1 or iterations < 0:
            raise InputError(f"super_clusters={super_clusters} must be 1 or more, iterations={iterations} not negative")
        self.n_clusters = n_clusters
        self.super_clusters = super_clusters
        self.iterations = iterations
        self.seed = seed
        self.ranks = ranks or Ranks()

    def fit(
        self,
        points_MP: Tensor,
        *,
        numbers_M: Tensor | None = None,
        rotations_M: Tensor | None = None,
        on_iteration: Callable[[int, int], None] | None = None,
    ) -> tuple[Assignment, Hierarchy]:
        """Group the points; rows that are not finite stay unassigned (label -1, distance NaN).

        Args:
            points_MP: this rank's, of any floating type.
            numbers_M: number of each row's image among all, ascending, as `KMeans.fit` takes them.
            rotations_M: 0 … 3, how often each image was turned; all ranks give them, or none.
            on_iteration: called with the steps done and those there are, equally often on all ranks, so that it may wait
                for the others; may raise to stop, on all ranks at once.

        Returns:
            The assignment of this rank's rows to clusters 0 … K-1 (with all centroids, on every rank), and their hierarchy.

        Raises:
            InputError: more clusters than points, fewer than super-classes that have points; rotations that are not 0 … 3.
        """
        n_supers = self.super_clusters * (1 if rotations_M is None else ROTATIONS)
        self._check(points_MP, rotations_M, n_supers)
        steps = _Steps(self.iterations, 1 + n_supers, on_iteration)
        every = self.ranks.all_reduce
        supers = KMeans(self.super_clusters, iterations=self.iterations, seed=self.seed, all_reduce=every)
        with_supers = supers.fit(points_MP, numbers_N=numbers_M, on_iteration=steps.step)
        steps.finish_round()
        supers_M = with_supers.labels_N.to(points_MP.device)
        seen = (supers_M >= 0).nonzero().flatten()
        if rotations_M is not None:
            supers_M = supers_M * ROTATIONS + rotations_M.to(supers_M)
        sizes_S = every(torch.bincount(supers_M[seen], minlength=n_supers)).cpu()
        shares_S = shares_of(self.n_clusters, sizes_S)
        work = GroupWork(points_MP, seen, supers_M[seen], numbers_M, self.ranks, plan_groups(sizes_S, self.ranks.world_size))
        found = self._within(work, shares_S, steps)
        labels_R, distances_R = work.back(found.labels_R, found.distances_R)
        labels_M = torch.full((len(points_MP),), UNASSIGNED, device=points_MP.device)
        distances_M = torch.full((len(points_MP),), torch.nan, device=points_MP.device)
        labels_M[seen], distances_M[seen] = labels_R, distances_R
        hierarchy = Hierarchy(torch.arange(n_supers).repeat_interleave(shares_S), n_supers)
        assignment = Assignment(
            labels_M.cpu(),
            distances_M.cpu(),
            found.centroids_KP.cpu(),
            inertia_history=found.history,
            n_repaired=found.n_repaired + with_supers.n_repaired,
            super_of_cluster_K=hierarchy.super_of_cluster_K,
            super_centroids_SP=with_supers.centroids_KP.repeat_interleave(n_supers // self.super_clusters, dim=0),
        )
        return assignment, hierarchy

    def _check(self, points_MP: Tensor, rotations_M: Tensor | None, n_supers: int) -> None:
        fits = rotations_M is None or len(rotations_M) == len(points_MP)
        fits = fits and not (rotations_M is not None and bool(((rotations_M < 0) | (rotations_M >= ROTATIONS)).any()))
        facts = torch.tensor([not fits, rotations_M is not None, len(points_MP)], dtype=torch.int64)
        n_unfit, n_rotated, n_points = self.ranks.all_reduce(facts.to(points_MP.device)).tolist()
        if n_unfit or n_rotated not in (0, self.ranks.world_size):
            raise InputError(f"rotations must be one a row, from 0 to {ROTATIONS - 1}, on all ranks or on none")
        if not n_supers <= self.n_clusters <= n_points:
            raise InputError(
                f"clusters={self.n_clusters} must be between the {n_supers} super-classes, as each needs one, and the "
                f"{n_points} points"
            )

    def _within(self, work: GroupWork, shares_S: Tensor, steps: "_Steps") -> "_Found":
        """Clusters within the super-classes that this rank works on; centroids and history of all."""
        first_S = (shares_S.cumsum(0) - shares_S).tolist()
        found = _Found(work, self.n_clusters)
        steps.begin_rounds(work.n_rounds)
        for turn in range(work.n_rounds):
            if turn < len(work.supers):
                number = work.supers[turn]
                rows = work.rows_of(turn)
                kmeans = KMeans(
                    int(shares_S[number]),
                    iterations=self.iterations,
                    seed=self.seed + 1 + number,
                    all_reduce=work.all_reduce,
                )
                part = kmeans.fit(work.points_RP[rows], numbers_N=work.numbers_R[rows], on_iteration=steps.step)
                found.add(part, rows, number, first_S[number])
            steps.finish_round()
        found.share(len(shares_S))
        return found


class _Steps:
    """Tells of iterations equally often on all ranks, however early some of them are done."""

    def __init__(self, iterations: int, rounds: int, tell: Callable[[int, int], None] | None) -> None:
        self.of_round, self.total, self.tell = iterations + 1, (iterations + 1) * rounds, tell
        self.done, self.end = 0, iterations + 1

    def begin_rounds(self, rounds: int) -> None:
        """From now on there are so many rounds to go."""
        self.total = self.done + self.of_round * rounds

    def step(self, state: object) -> None:
        """An iteration more; those beyond the round's, where empty clusters are filled at its end, are not told."""
        if self.done < self.end:
            self.done += 1
            if self.tell is not None:
                self.tell(self.done, self.total)

    def finish_round(self) -> None:
        """Tell of the iterations that were not needed."""
        while self.done < self.end:
            self.step(None)
        self.end += self.of_round


class _Found:
    """What the rounds find, put together."""

    def __init__(self, work: GroupWork, n_clusters: int) -> None:
        self.work = work
        points_RP = work.points_RP
        self.labels_R = torch.empty(len(points_RP), dtype=torch.int64, device=points_RP.device)
        self.distances_R = torch.empty(len(points_RP), device=points_RP.device)
        self.centroids_KP = torch.zeros(n_clusters, points_RP.shape[1], device=points_RP.device)
        self.parts: dict[int, Assignment] = {}
        self.history: tuple[float, ...] = ()
        self.n_repaired = 0

    def add(self, part: Assignment, rows: slice, number: int, first: int) -> None:
        """The clusters of a super-class, the first of which has this number."""
        self.labels_R[rows] = part.labels_N.to(self.labels_R) + first
        self.distances_R[rows] = part.distances_N.to(self.distances_R)
        if self.work.is_first:
            self.centroids_KP[first : first + part.n_clusters] = part.centroids_KP.to(self.centroids_KP)
            self.parts[number] = part

    def share(self, n_supers: int) -> None:
        """Give every rank the centroids and the sums over super-classes; each rests where its own iterations ended."""
        every, device = self.work.ranks.all_reduce, self.centroids_KP.device
        self.centroids_KP = every(self.centroids_KP)
        facts_S2 = torch.zeros(n_supers, 2, dtype=torch.int64, device=device)
        for number, part in self.parts.items():
            facts_S2[number] = torch.tensor([len(part.inertia_history), part.n_repaired])
        facts_S2 = every(facts_S2)
        self.n_repaired = int(facts_S2[:, 1].sum())
        history_SL = torch.zeros(n_supers, int(facts_S2[:, 0].max()), dtype=torch.float64, device=device)
        for number, part in self.parts.items():
            known = torch.tensor(part.inertia_history, dtype=torch.float64)
            history_SL[number], history_SL[number, : len(known)] = known[-1], known
        self.history = tuple(every(history_SL).sum(dim=0).tolist())
