"""Step 3, variant: power iteration clustering on a graph of nearest neighbours; it finds the number of clusters itself.

DeepCluster's authors used it besides k-means (the PIC class of their published code; after Lin and Cohen, Power Iteration
Clustering, ICML 2010). A random walk on the graph gives every image a density; each image then moves to the neighbour that
attracts it most, and so up to a local maximum; the images that end in one maximum are a cluster.

N points on this rank, T finite points of all ranks, P components, K clusters; J neighbours of each point, E edges, O
images in clusters of one.
"""

from numbers import Real
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment, cluster_means, member_distances
from deepcluster.clustering.estimator import Clusterer, check_count
from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.clustering.points import Points
from deepcluster.clustering.starts import number_points
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError
from deepcluster.core.work import Advance, no_advance

# The bandwidth of the published code. On whitened rows of unit length, squared distances of neighbours are near 1, so that
# their weights, at most e^-25, no longer move the density: every image is a cluster of its own.
PUBLISHED_SIGMA = 0.2
ITERATIONS = 200
# Shares above which a result is called degenerate.
GIANT, MANY_SINGLETONS = 0.5, 0.5

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class PowerIterationClustering(Clusterer):
    """Power iteration clustering as an estimator of scikit-learn; deterministic.

    Args:
        n_neighbors: number of edges from each image, to its nearest neighbours.
        sigma: bandwidth of the kernel exp(-d²/σ²); "auto" takes the median of d² over all edges (except between copies) as
            σ², so that a usual edge weighs 1/e. 0.2 (`PUBLISHED_SIGMA`) in the published code.
        alpha: share of the density that walks along edges in each iteration; the rest is spread over all images.
        max_iter: steps of the walk; fewer once the density no longer changes, with the same result.
        distribute_singletons: let a cluster of one join the cluster of its nearest neighbour that is in a larger one.
    """

    explanation: ClassVar[str] = (
        "Power iteration clustering links each image to its nearest neighbours. A random walk along the links gives each "
        "image a density; each image follows its strongest link uphill, and images that reach the same peak form a cluster."
    )

    def __init__(
        self,
        *,
        n_neighbors: int = 5,
        sigma: float | Literal["auto"] = "auto",
        alpha: float = 0.001,
        max_iter: int = ITERATIONS,
        distribute_singletons: bool = True,
    ) -> None:
        self.n_neighbors, self.sigma, self.alpha = n_neighbors, sigma, alpha
        self.max_iter, self.distribute_singletons = max_iter, distribute_singletons

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
        """Largest number of units that `cluster` passes to `advance`: steps of the walk."""
        return self.max_iter

    def cluster(
        self, points_NP: Tensor, *, seed: int = 0, ranks: Ranks = ONE_PROCESS, advance: Advance = no_advance
    ) -> Assignment:
        """Cluster the points of all ranks; return the assignment of the points of this rank.

        Clusters are numbered by size, the largest first; among equal ones by their earliest image. The `remark` of the
        result says so if it is degenerate. Each rank gathers all points and makes the same graph.

        Args:
            points_NP, ranks: see `Clusterer.cluster`.
            seed: not used: the result is deterministic.
            advance: called with 0 during the search for neighbours, which takes most of the time, and with 1 after each step
                of the walk; may raise to stop.

        Raises:
            InputError: no more points than neighbours; an option out of its range.
        """
        self._check()
        points = Points.of(points_NP, ranks)
        n_own, points_TP = len(points.points_FP), ranks.gather(points.points_FP)
        first, _ = number_points(n_own, ranks)
        if len(points_TP) <= self.n_neighbors:
            raise InputError(
                f"{self.n_neighbors} neighbours of each of {len(points_TP)} images can't be found; "
                f"power iteration clustering needs at least {self.n_neighbors + 1} images (k-means works with fewer)"
            )
        squared, indices = nearest_neighbours(
            points_TP, points_TP, k=self.n_neighbors, metric="sqeuclidean", exclude_self=True, advance=lambda _: advance(0)
        )
        squared_TJ, indices_TJ = squared.cpu().double().numpy(), indices.cpu().numpy()
        sigma = auto_sigma(squared_TJ) if self.sigma == "auto" else self.sigma * points.frame.scale
        found_T = self.partition(squared_TJ, indices_TJ, sigma=sigma, advance=advance)
        labels_T = torch.from_numpy(found_T).to(points_TP.device)
        centroids_KP = cluster_means(points_TP, labels_T, int(found_T.max()) + 1)
        distances_T = member_distances(points_TP, labels_T, centroids_KP)
        inertia, remark = float(distances_T.double().square().sum()), _remark(found_T, squared_TJ, sigma, points.frame.scale)
        own = slice(first, first + n_own)
        found = Assignment(labels_T[own], distances_T[own], centroids_KP, inertia_history=(inertia,), remark=remark)
        return points.assignment(found)

    def _check(self) -> None:
        check_count("n_neighbors", self.n_neighbors)
        check_count("max_iter", self.max_iter)
        if not isinstance(self.alpha, Real) or not 0 < self.alpha < 1:
            raise InputError(f"alpha={self.alpha!r} must be between 0 and 1 (0.001 in the published code)")
        if self.sigma != "auto" and not (isinstance(self.sigma, Real) and self.sigma > 0):
            raise InputError(f"sigma={self.sigma!r} must be above 0, or 'auto'")

    def _iterations(self, found: Assignment, steps: int) -> int:
        return steps

    def partition(
        self, squared_TJ: Floats, indices_TJ: Integers, *, sigma: float, advance: Advance = no_advance
    ) -> Integers:
        """Return labels_T, given the nearest neighbours of each image and the squared distances to them.

        Labels are 0 … K-1, the largest cluster first; of equal ones the one with the earliest image.
        """
        graph = neighbour_graph(squared_TJ, indices_TJ, sigma)
        flow_T = walk(graph, self.alpha, self.max_iter, advance)
        clusters_T = join_copies(climb(graph, flow_T), squared_TJ, indices_TJ)
        if self.distribute_singletons:
            clusters_T = without_singletons(clusters_T, indices_TJ)
        _, first_K, inverse_T, sizes_K = np.unique(clusters_T, return_index=True, return_inverse=True, return_counts=True)
        number_K = np.empty(len(sizes_K), dtype=np.int64)
        number_K[np.lexsort((first_K, -sizes_K))] = np.arange(len(sizes_K))
        return number_K[inverse_T]


def auto_sigma(squared_TJ: Floats) -> float:
    """Return the bandwidth with which the median edge weighs 1/e; edges between copies, of length 0, do not count."""
    apart = squared_TJ[squared_TJ > 0]
    return float(np.sqrt(np.median(apart))) if len(apart) else 1.0


def neighbour_graph(squared_TJ: Floats, indices_TJ: Integers, sigma: float) -> Any:
    """Return the symmetric graph W = A + Aᵀ (SciPy CSR, T × T), a_ij = exp(-d_ij²/σ²) if j is a neighbour of i."""
    from scipy.sparse import csr_array

    n_images, n_neighbours = indices_TJ.shape
    # SciPy drops edges of weight 0 in the addition: they are kept until then.
    least = np.finfo(np.float64).tiny
    weights = np.exp(-squared_TJ / sigma**2).clip(min=least).ravel()
    starts = np.arange(0, n_images * n_neighbours + 1, n_neighbours)
    edges = csr_array((weights, indices_TJ.ravel(), starts), shape=(n_images, n_images))
    graph = (edges + edges.T).tocsr()
    graph.sort_indices()
    graph.data[graph.data <= 2 * least] = 0
    return graph


def walk(graph: Any, alpha: float, iterations: int, advance: Advance = no_advance) -> Floats:
    """Return what flows to each image (T) at the last step of v ← L1(alpha W v + (1 - alpha) / T), from v = 1 / T.

    L1 scales to a sum of 1. The flow W v orders the images as the density v does, which is the same number plus a large
    constant: where weights are small, rounding leaves nothing of their differences in v, and all of them in the flow.
    """
    n_images = graph.shape[0]
    density_T: Floats = np.full(n_images, 1 / n_images)
    flow_T: Floats = density_T
    for _ in range(iterations):
        before_T, flow_T = density_T, graph @ density_T
        density_T = alpha * flow_T + (1 - alpha) / n_images
        density_T /= density_T.sum()
        advance(1)
        if np.array_equal(density_T, before_T):
            break
    return flow_T


def climb(graph: Any, flow_T: Floats) -> Integers:
    """Return the local maximum that each image reaches, from neighbour to neighbour.

    Image i moves to the j with the highest w_ij (flow_j - flow_i) above 0; of equal ones to the lower number.
    """
    rows_E = np.repeat(np.arange(len(flow_T)), np.diff(graph.indptr))
    pull_E = graph.data * (flow_T[graph.indices] - flow_T[rows_E])
    strongest_T = np.maximum.reduceat(pull_E, graph.indptr[:-1])
    candidates_E = np.where(pull_E == strongest_T[rows_E], graph.indices, len(flow_T))
    next_T = np.minimum.reduceat(candidates_E, graph.indptr[:-1]).astype(np.int64)
    next_T = np.where(strongest_T > 0, next_T, np.arange(len(flow_T)))
    # The flow rises along every step, so there are no cycles; steps are taken two, four, eight at a time.
    while not np.array_equal(next_T, next_T[next_T]):
        next_T = next_T[next_T]
    return next_T


def join_copies(clusters_T: Integers, squared_TJ: Floats, indices_TJ: Integers) -> Integers:
    """Merge clusters that share copies of one image (neighbours at distance 0): copies attract each other equally."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    images, places = np.nonzero(squared_TJ == 0)
    if not len(images):
        return clusters_T
    one, other = clusters_T[images], clusters_T[indices_TJ[images, places]]
    n_images = len(clusters_T)
    links = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(n_images, n_images))
    parts_T: Integers = connected_components(links, directed=False)[1].astype(np.int64)
    return parts_T[clusters_T]


def without_singletons(clusters_T: Integers, indices_TJ: Integers) -> Integers:
    """Let each cluster of one join the cluster of its nearest neighbour that is in a larger one, if there is any."""
    larger_T = np.bincount(clusters_T, minlength=len(clusters_T))[clusters_T] > 1
    singles_O = np.flatnonzero(~larger_T)
    larger_OJ = larger_T[indices_TJ[singles_O]]
    singles_O, first_O = singles_O[larger_OJ.any(axis=1)], larger_OJ.argmax(axis=1)[larger_OJ.any(axis=1)]
    joined_T = clusters_T.copy()
    joined_T[singles_O] = clusters_T[indices_TJ[singles_O, first_O]]
    return joined_T


def _remark(labels_T: Integers, squared_TJ: Floats, sigma: float, scale: float) -> str:
    """Return what the user should know about a degenerate result; empty if it is not."""
    sizes_K = np.bincount(labels_T)
    singletons, largest = int((sizes_K == 1).sum()), int(sizes_K.max())
    usual = auto_sigma(squared_TJ)
    advice = (
        f"sigma={sigma / scale:.3g}; neighbours lie {usual / scale:.3g} apart (median), and sigma='auto' would follow that"
    )
    if singletons > MANY_SINGLETONS * len(labels_T):
        weight = np.exp(-((usual / sigma) ** 2))
        what = f"{singletons:,} of {len(labels_T):,} images are clusters of their own"
        return f"{what}: the usual edge weighs {weight:.1g} ({advice})"
    if largest > GIANT * len(labels_T):
        return f"one cluster holds {largest:,} of {len(labels_T):,} images ({advice})"
    return ""
