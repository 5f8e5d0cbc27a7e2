"""Step 3': a graph of nearest neighbours, and power iteration clustering on it; it finds the number of clusters itself.

What DeepCluster's authors used beside k-means (the PIC class of their published code; after Lin and Cohen, Power Iteration
Clustering, ICML 2010). A walk on the graph gives every image a density; each image then goes to the neighbour that draws
it most, and so up to a local maximum; a cluster is what ends in one maximum.

N points, P components, K clusters, E edges.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment, cluster_means, member_distances
from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.clustering.parallel import finite_rows
from deepcluster.clustering.starts import number_points
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError
from deepcluster.core.work import Advance, no_advance

# The bandwidth of the published code. On whitened rows of unit length neighbours are at squared distances near 1, so that
# their weights, e^-25 and less, no longer move the density: every image is a cluster of its own.
PUBLISHED_SIGMA = 0.2
ITERATIONS = 200
# Shares above which a result is called degenerate.
GIANT, MANY_SINGLETONS = 0.5, 0.5

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class PowerIterationClustering:
    """Power iteration clustering with the names of scikit-learn; deterministic.

    Args:
        n_neighbours: edges from each image, to its nearest.
        sigma: bandwidth of the kernel exp(-d²/σ²); "auto" takes the median of d² over all edges (copies aside) as σ², so
            that a usual edge weighs 1/e. 0.2 (`PUBLISHED_SIGMA`) in the published code.
        alpha: share of the density that walks along edges at each iteration; the rest is spread over all images.
        iterations: steps of the walk; it ends early where the density rests, which changes nothing.
        distribute_singletons: a cluster of one joins that of its nearest neighbour that is in a larger one.
    """

    explanation: ClassVar[str] = (
        "Power iteration clustering links each image to its nearest neighbours. A random walk along the links gives each "
        "image a density; each image follows its strongest link uphill, and images that reach the same peak form a cluster."
    )

    def __init__(
        self,
        n_neighbours: int = 5,
        sigma: float | Literal["auto"] = "auto",
        alpha: float = 0.001,
        iterations: int = ITERATIONS,
        distribute_singletons: bool = True,
    ) -> None:
        self.n_neighbours = n_neighbours
        self.sigma = sigma
        self.alpha = alpha
        self.iterations = iterations
        self.distribute_singletons = distribute_singletons

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """Build it from a run's settings, of which it needs none."""
        return cls()

    @classmethod
    def describe(cls, settings: Any) -> str:
        """Return the clusters that these settings ask for in a few words."""
        return "clusters by power iteration"

    @property
    def most_steps(self) -> int:
        """Largest number of units that `fit` passes to `advance`: steps of the walk."""
        return self.iterations

    def fit(
        self,
        points_NP: Tensor,
        *,
        seed: int = 0,
        ranks: Ranks = ONE_PROCESS,
        advance: Advance = no_advance,
    ) -> Assignment:
        """Cluster the points of all ranks; return the assignment of the points of this rank.

        Clusters are numbered by size, the largest first; among equal ones by their earliest image. The `remark` of the
        result says so if it is degenerate. Each rank gathers all points and makes the same graph.

        Args:
            points_NP: of any floating type. Rows that are not finite stay unassigned: label -1, distance NaN.
            seed: not used: the result is deterministic.
            ranks: the processes over which the rows are split, in the order of the ranks.
            advance: called with 0 during the search for neighbours, which takes most of the time, and with 1 after each step
                of the walk; may raise to stop.

        Raises:
            InputError: no more points than neighbours; an option out of its range.
        """
        self._check()
        first, _ = number_points(len(points_NP), ranks)
        own = slice(first, first + len(points_NP))
        points_TP = ranks.gather(points_NP)
        finite_T = finite_rows(points_TP)
        points_TP = (points_TP if bool(finite_T.all()) else points_TP[finite_T]).float()
        if len(points_TP) <= self.n_neighbours:
            raise InputError(
                f"{self.n_neighbours} neighbours of each of {len(points_TP)} images can't be found; "
                f"power iteration clustering needs at least {self.n_neighbours + 1} images (k-means works with fewer)"
            )
        squared, indices = nearest_neighbours(
            points_TP,
            points_TP,
            k=self.n_neighbours,
            metric="sqeuclidean",
            exclude_self=True,
            advance=lambda _: advance(0),
        )
        squared_NE, indices_NE = squared.cpu().double().numpy(), indices.cpu().numpy()
        sigma = auto_sigma(squared_NE) if self.sigma == "auto" else self.sigma
        found_T = self.partition(squared_NE, indices_NE, sigma=sigma, advance=advance)
        labels_T = torch.from_numpy(found_T).to(points_TP.device)
        centroids_KP = cluster_means(points_TP, labels_T, int(found_T.max()) + 1)
        distances_T = member_distances(points_TP, labels_T, centroids_KP)
        whole = Assignment.from_finite(
            finite_T,
            labels_T,
            distances_T,
            centroids_KP,
            inertia_history=(float(distances_T.double().square().sum()),),
            remark=_remark(found_T, squared_NE, sigma),
        )
        return replace(whole, labels_N=whole.labels_N[own], distances_N=whole.distances_N[own])

    def _check(self) -> None:
        if self.n_neighbours < 1 or self.iterations < 1:
            raise InputError(f"neighbours={self.n_neighbours} and iterations={self.iterations} must be 1 or more")
        if not 0 < self.alpha < 1:
            raise InputError(f"alpha={self.alpha} must be between 0 and 1 (0.001 in the published code)")
        if self.sigma != "auto" and not self.sigma > 0:
            raise InputError(f"sigma={self.sigma} must be above 0, or 'auto'")

    def partition(
        self,
        squared_NE: Floats,
        indices_NE: Integers,
        *,
        sigma: float,
        advance: Advance = no_advance,
    ) -> Integers:
        """Labels_N of images whose nearest neighbours, and the squared distances to them, are known."""
        graph = neighbour_graph(squared_NE, indices_NE, sigma)
        flow_N = walk(graph, self.alpha, self.iterations, advance)
        maxima_N = climb(graph, flow_N)
        clusters_N = join_copies(maxima_N, squared_NE, indices_NE)
        if self.distribute_singletons:
            clusters_N = without_singletons(clusters_N, indices_NE)
        return number_by_size(clusters_N)


def auto_sigma(squared_NE: Floats) -> float:
    """The bandwidth with which the median edge weighs 1/e; edges between copies, of length 0, do not count."""
    apart = squared_NE[squared_NE > 0]
    return float(np.sqrt(np.median(apart))) if len(apart) else 1.0


def neighbour_graph(squared_NE: Floats, indices_NE: Integers, sigma: float) -> Any:
    """The symmetric graph W = A + Aᵀ (SciPy CSR, N × N), a_ij = exp(-d_ij²/σ²) where j is a neighbour of i."""
    from scipy.sparse import csr_array

    n_images, n_neighbours = indices_NE.shape
    # SciPy drops edges of weight 0 where it adds: they are kept until then.
    least = np.finfo(np.float64).tiny
    weights = np.exp(-squared_NE / sigma**2).clip(min=least).ravel()
    starts = np.arange(0, n_images * n_neighbours + 1, n_neighbours)
    edges = csr_array((weights, indices_NE.ravel(), starts), shape=(n_images, n_images))
    graph = (edges + edges.T).tocsr()
    graph.sort_indices()
    graph.data[graph.data <= 2 * least] = 0
    return graph


def walk(graph: Any, alpha: float, iterations: int, advance: Advance = no_advance) -> Floats:
    """What flows to each image (N) at the last step of v ← L1(alpha W v + (1 - alpha) / N), from v = 1 / N.

    L1 scales to a sum of 1. The flow W v orders the images as the density v does, which is the same number plus a large
    constant: where weights are small, rounding leaves nothing of their differences in v, and all of them in the flow.
    """
    n_images = graph.shape[0]
    density_N: Floats = np.full(n_images, 1 / n_images)
    flow_N: Floats = density_N
    for _ in range(iterations):
        before_N, flow_N = density_N, graph @ density_N
        density_N = alpha * flow_N + (1 - alpha) / n_images
        density_N /= density_N.sum()
        advance(1)
        if np.array_equal(density_N, before_N):
            break
    return flow_N


def climb(graph: Any, flow_N: Floats) -> Integers:
    """The local maximum that each image reaches, from neighbour to neighbour.

    Image i goes to the j of the highest w_ij (flow_j - flow_i) above 0; the lower number where two are equal.
    """
    rows_E = np.repeat(np.arange(len(flow_N)), np.diff(graph.indptr))
    pull_E = graph.data * (flow_N[graph.indices] - flow_N[rows_E])
    strongest_N = np.maximum.reduceat(pull_E, graph.indptr[:-1])
    candidates_E = np.where(pull_E == strongest_N[rows_E], graph.indices, len(flow_N))
    next_N = np.minimum.reduceat(candidates_E, graph.indptr[:-1]).astype(np.int64)
    next_N = np.where(strongest_N > 0, next_N, np.arange(len(flow_N)))
    # The flow rises along every step, so there are no circles; steps are taken two, four, eight at a time.
    while not np.array_equal(next_N, next_N[next_N]):
        next_N = next_N[next_N]
    return next_N


def join_copies(clusters_N: Integers, squared_NE: Floats, indices_NE: Integers) -> Integers:
    """Clusters that share copies of one image (neighbours at distance 0) become one: copies draw each other equally."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    images, places = np.nonzero(squared_NE == 0)
    if not len(images):
        return clusters_N
    one, other = clusters_N[images], clusters_N[indices_NE[images, places]]
    n_images = len(clusters_N)
    links = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(n_images, n_images))
    parts_N: Integers = connected_components(links, directed=False)[1].astype(np.int64)
    return parts_N[clusters_N]


def without_singletons(clusters_N: Integers, indices_NE: Integers) -> Integers:
    """Each cluster of one joins that of its nearest neighbour that is in a larger one; where there is none, it stays."""
    larger_N = np.bincount(clusters_N, minlength=len(clusters_N))[clusters_N] > 1
    alone = np.flatnonzero(~larger_N)
    larger_AE = larger_N[indices_NE[alone]]
    alone, first = alone[larger_AE.any(axis=1)], larger_AE.argmax(axis=1)[larger_AE.any(axis=1)]
    joined_N = clusters_N.copy()
    joined_N[alone] = clusters_N[indices_NE[alone, first]]
    return joined_N


def number_by_size(clusters_N: Integers) -> Integers:
    """Labels 0 … K-1, the largest cluster first; of equal ones, that of the earliest image."""
    _, first_K, inverse_N, sizes_K = np.unique(clusters_N, return_index=True, return_inverse=True, return_counts=True)
    number_K = np.empty(len(sizes_K), dtype=np.int64)
    number_K[np.lexsort((first_K, -sizes_K))] = np.arange(len(sizes_K))
    return number_K[inverse_N]


def _remark(labels_N: Integers, squared_NE: Floats, sigma: float) -> str:
    """What a person should know of a degenerate result; empty where there is nothing."""
    sizes_K = np.bincount(labels_N)
    singletons, largest = int((sizes_K == 1).sum()), int(sizes_K.max())
    usual = auto_sigma(squared_NE)
    advice = f"sigma={sigma:.3g}; neighbours lie {usual:.3g} apart (median), and sigma='auto' would follow that"
    if singletons > MANY_SINGLETONS * len(labels_N):
        weight = np.exp(-((usual / sigma) ** 2))
        what = f"{singletons:,} of {len(labels_N):,} images are clusters of their own"
        return f"{what}: the usual edge weighs {weight:.1g} ({advice})"
    if largest > GIANT * len(labels_N):
        return f"one cluster holds {largest:,} of {len(labels_N):,} images ({advice})"
    return ""
