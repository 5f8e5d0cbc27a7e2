"""What can be said of each cluster: its exemplars, size, tightness, labels, neighbours, and what it was in earlier epochs.

N images, K clusters, S exemplars of a kind, L labels or groups of an earlier epoch, J nearest clusters, E earlier epochs,
Q pairs that occur. -1 fills up what is shorter than the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.gallery.rows import sorted_rows

MOST_LABELS: Final = 4
MOST_NEIGHBOURS: Final = 8
MOST_EPOCHS: Final = 10
# Exemplars of each kind, of up to so many clusters: a page of 10,000 clusters has to stay small.
EXEMPLARS: Final = ((500, 8), (2_000, 6))
LEAST_EXEMPLARS: Final = 4


@dataclass(frozen=True)
class ClusterFacts:
    """What is known of K clusters.

    Attributes:
        sizes_K: images of each.
        tightness_K: mean distance to the centroid, of those known; NaN where none is.
        nearest_KS: images nearest to the centroid, nearest first; ties to the lower index.
        random_KS: images drawn at random, no nearest ones before all others are drawn.
        farthest_KS: images farthest from the centroid, farthest first.
        label_KT, label_count_KT: the most frequent labels, and how many images have them; no columns without labels.
        purity_K: share of the most frequent label among the cluster's images whose label is known; NaN where none is.
        neighbours_KJ: clusters that have images, by the distance of their centroids, nearest first.
        past_epochs: earlier epochs, oldest first.
        past_cluster_KE: the group that held most of the cluster's images then; the lower number where two did.
        past_share_KE: share of the cluster's images that it held.
    """

    sizes_K: NDArray[np.int64]
    tightness_K: NDArray[np.float64]
    nearest_KS: NDArray[np.int64]
    random_KS: NDArray[np.int64]
    farthest_KS: NDArray[np.int64]
    label_KT: NDArray[np.int64]
    label_count_KT: NDArray[np.int64]
    purity_K: NDArray[np.float64]
    neighbours_KJ: NDArray[np.int64]
    past_epochs: tuple[int, ...]
    past_cluster_KE: NDArray[np.int64]
    past_share_KE: NDArray[np.float64]

    def wanted(self) -> list[NDArray[np.int64]]:
        """Images to list and to show, the most important first: one of each cluster, large clusters first, then more."""
        cover_K = self.nearest_KS[:, 0].copy()
        cover_K = np.where(cover_K < 0, self.random_KS[:, 0], cover_K)
        some = [kind_KS[:, columns] for columns in (slice(0, 4), slice(4, None)) for kind_KS in self._kinds()]
        largest = np.argsort(-self.sizes_K, kind="stable")
        parts = [part[largest].T.ravel() for part in (cover_K[:, None], *some)]
        return [part[part >= 0] for part in parts]

    def _kinds(self) -> tuple[NDArray[np.int64], ...]:
        return self.nearest_KS, self.farthest_KS, self.random_KS


def describe_clusters(collection: Collection, *, seed: int, check: Callable[[], None] = lambda: None) -> ClusterFacts:
    """Facts of every cluster; of a million images, 10,000 clusters and 20 earlier epochs in some seconds.

    Args:
        seed: of the images drawn at random.
        check: called now and then; may raise to stop.
    """
    count = exemplars_of(collection.n_clusters)
    sizes_K = collection.sizes_K()
    ordered = sorted_rows(collection, np.flatnonzero(collection.cluster_N >= 0))
    nearest_KS, farthest_KS = _ends(collection, ordered, sizes_K, count)
    check()
    random_KS = _drawn(collection, ordered, sizes_K, count, seed)
    label_KT, label_count_KT, purity_K = _labels(collection)
    check()
    epochs, past_cluster_KE, past_share_KE = _past(collection, sizes_K, check)
    return ClusterFacts(
        sizes_K=sizes_K,
        tightness_K=_tightness(collection),
        nearest_KS=nearest_KS,
        random_KS=random_KS,
        farthest_KS=farthest_KS,
        label_KT=label_KT,
        label_count_KT=label_count_KT,
        purity_K=purity_K,
        neighbours_KJ=_neighbours(collection, sizes_K, check),
        past_epochs=epochs,
        past_cluster_KE=past_cluster_KE,
        past_share_KE=past_share_KE,
    )


def exemplars_of(n_clusters: int) -> int:
    """Exemplars of each kind: 8 of up to 500 clusters, 6 of up to 2,000, 4 of more."""
    return next((count for most, count in EXEMPLARS if n_clusters <= most), LEAST_EXEMPLARS)


def epochs_shown(count: int) -> list[int]:
    """Positions of at most 10 of `count` earlier epochs, spread evenly, the first and the last among them."""
    places: list[int] = np.unique(np.linspace(0, count - 1, min(count, MOST_EPOCHS)).round().astype(np.int64)).tolist()
    return places


def _ends(
    collection: Collection, ordered: NDArray[np.int64], sizes_K: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first and the last images of each cluster whose distance is known; `ordered` by cluster and distance."""
    first_K = np.cumsum(sizes_K) - sizes_K
    known_N = ~np.isnan(collection.distance_N) & (collection.cluster_N >= 0)
    known_K = np.bincount(collection.cluster_N[known_N], minlength=len(sizes_K))
    step_S = np.arange(count)
    there_KS = step_S < known_K[:, None]
    nearest_KS = _pick(ordered, first_K[:, None] + step_S, there_KS)
    farthest_KS = _pick(ordered, (first_K + known_K - 1)[:, None] - step_S, there_KS)
    return nearest_KS, farthest_KS


def _drawn(
    collection: Collection, ordered: NDArray[np.int64], sizes_K: NDArray[np.int64], count: int, seed: int
) -> NDArray[np.int64]:
    """Random images of each cluster; the nearest come after all others."""
    first_K = np.cumsum(sizes_K) - sizes_K
    cluster = collection.cluster_N[ordered]
    late = np.arange(len(ordered)) - first_K[cluster] < count
    keys = np.random.default_rng(seed).random(len(ordered)) + late
    shuffled = ordered[np.lexsort((keys, cluster))]
    step_S = np.arange(count)
    return _pick(shuffled, first_K[:, None] + step_S, step_S < sizes_K[:, None])


def _pick(values: NDArray[np.int64], places: NDArray[np.int64], there: NDArray[np.bool_]) -> NDArray[np.int64]:
    """`values[places]` where something is there, -1 elsewhere."""
    picked = np.full(places.shape, -1, dtype=np.int64)
    picked[there] = values[places[there]]
    return picked


def _tightness(collection: Collection) -> NDArray[np.float64]:
    known_N = ~np.isnan(collection.distance_N) & (collection.cluster_N >= 0)
    cluster = collection.cluster_N[known_N]
    sums_K = np.bincount(cluster, weights=collection.distance_N[known_N], minlength=collection.n_clusters)
    counts_K = np.bincount(cluster, minlength=collection.n_clusters)
    means_K: NDArray[np.float64] = np.divide(sums_K, counts_K, out=np.full(len(sums_K), np.nan), where=counts_K > 0)
    return means_K


def _labels(collection: Collection) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The most frequent labels of each cluster, their counts, and the first one's share."""
    n_clusters = collection.n_clusters
    if collection.label_N is None:
        none = np.zeros((n_clusters, 0), dtype=np.int64)
        return none, none, np.full(n_clusters, np.nan)
    cluster_Q, label_Q, count_Q = _pairs(collection.cluster_N, collection.label_N)
    order = np.lexsort((label_Q, -count_Q, cluster_Q))
    pairs_K = np.bincount(cluster_Q, minlength=n_clusters)
    first_K = np.cumsum(pairs_K) - pairs_K
    step_T = np.arange(MOST_LABELS)
    there_KT = step_T < pairs_K[:, None]
    places_KT = first_K[:, None] + step_T
    label_KT = _pick(label_Q[order], places_KT, there_KT)
    count_KT = _pick(count_Q[order], places_KT, there_KT)
    known_K = np.bincount(cluster_Q, weights=count_Q, minlength=n_clusters)
    purity_K = np.divide(count_KT[:, 0], known_K, out=np.full(n_clusters, np.nan), where=known_K > 0)
    return label_KT, count_KT, purity_K


def _neighbours(collection: Collection, sizes_K: NDArray[np.int64], check: Callable[[], None]) -> NDArray[np.int64]:
    """Clusters nearest by centroid; those without images have no neighbours, and are none."""
    if collection.centroids_KP is None:
        return np.zeros((len(sizes_K), 0), dtype=np.int64)
    centroids_KP = collection.centroids_KP.float()
    meant = np.flatnonzero((sizes_K > 0) & torch.isfinite(centroids_KP).all(dim=1).numpy())
    neighbours_KJ = np.full((len(sizes_K), max(0, min(MOST_NEIGHBOURS, len(meant) - 1))), -1, dtype=np.int64)
    if neighbours_KJ.shape[1]:
        rows = centroids_KP[torch.from_numpy(meant)]
        _, found = nearest_neighbours(rows, rows, k=neighbours_KJ.shape[1], exclude_self=True, advance=lambda _: check())
        neighbours_KJ[meant] = meant[found.numpy()]
    return neighbours_KJ


def _past(
    collection: Collection, sizes_K: NDArray[np.int64], check: Callable[[], None]
) -> tuple[tuple[int, ...], NDArray[np.int64], NDArray[np.float64]]:
    """The epochs that are shown, the group of each that held most of a cluster's images, and the share that it held."""
    some = [collection.past[place] for place in epochs_shown(len(collection.past))]
    group_KE = np.full((len(sizes_K), len(some)), -1, dtype=np.int64)
    share_KE = np.zeros(group_KE.shape)
    for column, past in enumerate(some):
        check()
        cluster_Q, group_Q, count_Q = _pairs(collection.cluster_N, past.load())
        order = np.lexsort((group_Q, -count_Q, cluster_Q))
        clusters, firsts = np.unique(cluster_Q[order], return_index=True)
        group_KE[clusters, column] = group_Q[order][firsts]
        share_KE[clusters, column] = count_Q[order][firsts] / sizes_K[clusters]
    return tuple(past.epoch for past in some), group_KE, share_KE


def _pairs(
    cluster_N: NDArray[np.int64], other_N: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (cluster, other) that occur, and how often; images that have none of one are left out."""
    both_N = (cluster_N >= 0) & (other_N >= 0)
    width = int(other_N.max(initial=0)) + 1
    pairs_Q, count_Q = np.unique(cluster_N[both_N] * width + other_N[both_N], return_counts=True)
    cluster_Q, other_Q = np.divmod(pairs_Q, width)
    return cluster_Q, other_Q, count_Q
