"""Step 3: group the points. `lloyd` is the algorithm, `KMeans` checks, starts and calls it.

N points, P components, K clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.clustering.assignment import UNASSIGNED, Assignment
from deepcluster.errors import InputError

# Scores are made in blocks of rows so that a block stays in the cache: never an N × K matrix.
BLOCK_SCORES = 1 << 20
# Rows that are checked, and added up as float64, at once: never another copy of all points.
BLOCK_ROWS = 1024
# The centroid of an empty cluster differs from the one it splits by this share, in alternating signs.
SPLIT = 1 / 1024


@dataclass(frozen=True)
class LloydResult:
    """What `lloyd` found.

    Attributes:
        centroids_KP: the centroids that the labels belong to.
        labels_N: the nearest centroid of each point; the lower number where two are equally near.
        distances_N: squared distance to it.
        inertia_history: sum of the squared distances at each iteration's assignment, the last one included.
        n_repaired: how often an empty cluster was put beside a large one, over all iterations.
    """

    centroids_KP: Tensor
    labels_N: Tensor
    distances_N: Tensor
    inertia_history: tuple[float, ...]
    n_repaired: int


def _identity(value: Tensor) -> Tensor:
    return value


def nearest_centroids(points_NP: Tensor, centroids_KP: Tensor) -> tuple[Tensor, Tensor]:
    """Labels_N and squared distances_N of each point's nearest centroid, exact in float32; ties go to the lower number.

    Scores of a block are one matrix product; the distance is then taken from the difference itself, which does not
    cancel: a point on its centroid has distance 0.
    """
    half_norms_K = centroids_KP.square().sum(dim=1) / 2
    labels_N = torch.empty(len(points_NP), dtype=torch.int64, device=points_NP.device)
    distances_N = torch.empty(len(points_NP), device=points_NP.device)
    block_rows = max(256, BLOCK_SCORES // max(centroids_KP.shape))
    for block, labels, distances in zip(
        points_NP.split(block_rows), labels_N.split(block_rows), distances_N.split(block_rows), strict=True
    ):
        torch.argmax(torch.addmm(half_norms_K, block, centroids_KP.T, beta=-1), dim=1, out=labels)
        torch.sum((block - centroids_KP[labels]).square_(), dim=1, out=distances)
    return labels_N, distances_N


def cluster_sums(points_NP: Tensor, labels_N: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Sums_KP (float64) and sizes_K of the points of each cluster: the same at every run."""
    sums_KP = torch.zeros(n_clusters, points_NP.shape[1], dtype=torch.float64, device=points_NP.device)
    for block, labels in zip(points_NP.split(BLOCK_ROWS), labels_N.split(BLOCK_ROWS), strict=True):
        if points_NP.is_cuda:
            # index_add_ is atomic there, another sum at every run; index_put_ sorts first.
            sums_KP.index_put_((labels,), block.double(), accumulate=True)
        else:
            sums_KP.index_add_(0, labels, block.double())
    return sums_KP, torch.bincount(labels_N, minlength=n_clusters)


def split_largest(centroids_KP: Tensor, sizes_K: Tensor) -> int:
    """Put each empty cluster beside a large one, in place, to take half of it; return how many there were.

    The largest clusters are each split in two once, a cluster of one never; where there are more empty clusters than
    that, the rest wait for the next iteration. As in the paper (section 3.3) the large cluster keeps its centroid, so
    that inertia never rises; the new one lies ±1/1024 of it away, in alternating signs.
    """
    empty = (sizes_K == 0).nonzero().flatten()
    large = sizes_K.argsort(descending=True, stable=True)[: len(empty)]
    large = large[sizes_K[large] > 1]
    empty = empty[: len(large)]
    signs_P = torch.ones(centroids_KP.shape[1], device=centroids_KP.device)
    signs_P[1::2] = -1
    centroids_KP[empty] = centroids_KP[large] * (1 + SPLIT * signs_P)
    return len(empty)


def lloyd(
    points_NP: Tensor,
    centroids_KP: Tensor,
    *,
    iterations: int,
    all_reduce: Callable[[Tensor], Tensor] = _identity,
    on_iteration: Callable[[int, float], None] | None = None,
) -> LloydResult:
    """Lloyd's algorithm from given centroids: assign, average, repeat; then a last assignment to the final centroids.

    Args:
        points_NP: float32; may be this rank's share of the rows.
        centroids_KP: the start; not changed.
        iterations: how often the centroids are moved; ends early where no label changes any more.
        all_reduce: sums a tensor over the ranks; the identity on one process.
        on_iteration: called with the iteration and the inertia; may raise to stop.
    """
    centroids_KP = centroids_KP.clone()
    history: list[float] = []
    repaired = 0
    previous_N = torch.full((len(points_NP),), UNASSIGNED, device=points_NP.device)
    for iteration in range(iterations + 1):
        labels_N, distances_N = nearest_centroids(points_NP, centroids_KP)
        history.append(float(all_reduce(distances_N.sum(dtype=torch.float64))))
        if on_iteration is not None:
            on_iteration(iteration, history[-1])
        moved = all_reduce((labels_N != previous_N).sum())
        if iteration == iterations or int(moved) == 0:
            break
        previous_N = labels_N
        sums_KP, sizes_K = (all_reduce(part) for part in cluster_sums(points_NP, labels_N, len(centroids_KP)))
        filled_K1 = (sizes_K > 0)[:, None]
        centroids_KP = torch.where(filled_K1, sums_KP / sizes_K.clamp(min=1)[:, None], centroids_KP).float()
        repaired += split_largest(centroids_KP, sizes_K)
    return LloydResult(centroids_KP, labels_N, distances_N, tuple(history), repaired)


class KMeans:
    """k-means with the names of scikit-learn: exact Lloyd iterations in float32, the same result for the same seed.

    Args:
        n_clusters: K.
        iterations: Lloyd iterations; 20 in the paper.
        seed: of the random rows that the centroids start from.
        all_reduce: sums a tensor over the ranks; the identity on one process.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        iterations: int = 20,
        seed: int = 0,
        all_reduce: Callable[[Tensor], Tensor] = _identity,
    ) -> None:
        self.n_clusters = n_clusters
        self.iterations = iterations
        self.seed = seed
        self.all_reduce = all_reduce

    def fit(
        self,
        points_NP: Tensor,
        *,
        start_KP: Tensor | None = None,
        on_iteration: Callable[[int, float], None] | None = None,
    ) -> Assignment:
        """Group the points; rows that are not finite stay unassigned (label -1, distance NaN).

        Args:
            points_NP: any floating type.
            start_KP: centroids to start from; distinct random rows by default.
            on_iteration: called with the iteration and the inertia.

        Raises:
            InputError: fewer clusters than 1 or more than points; a start that is not (K, P).
        """
        seen_N = torch.cat([torch.isfinite(block).all(dim=1) for block in points_NP.split(BLOCK_ROWS)])
        seen_NP = (points_NP if bool(seen_N.all()) else points_NP[seen_N]).float()
        if not 1 <= self.n_clusters <= len(seen_NP):
            raise InputError(f"clusters={self.n_clusters} must be between 1 and the {len(seen_NP)} points")
        if start_KP is None:
            generator = torch.Generator().manual_seed(self.seed)
            rows = torch.randperm(len(seen_NP), generator=generator)[: self.n_clusters]
            start_KP = seen_NP[rows.to(seen_NP.device)]
        if start_KP.shape != (self.n_clusters, points_NP.shape[1]):
            raise InputError(f"start has shape {(*start_KP.shape,)}, not {(self.n_clusters, points_NP.shape[1])}")
        result = lloyd(
            seen_NP,
            start_KP.float(),
            iterations=self.iterations,
            all_reduce=self.all_reduce,
            on_iteration=on_iteration,
        )
        labels_N = torch.full((len(points_NP),), UNASSIGNED)
        distances_N = torch.full((len(points_NP),), torch.nan)
        labels_N[seen_N.cpu()] = result.labels_N.cpu()
        distances_N[seen_N.cpu()] = result.distances_N.sqrt().cpu()
        return Assignment(
            labels_N=labels_N,
            distances_N=distances_N,
            centroids_KP=result.centroids_KP.cpu(),
            inertia_history=result.inertia_history,
            n_repaired=result.n_repaired,
        )
