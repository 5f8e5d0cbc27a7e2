"""Facts of each cluster: its exemplars, size, tightness, labels, neighbours, and what it was in earlier epochs.

N images, K clusters, S exemplars of a kind, T labels, J nearest clusters, E earlier epochs, Q pairs that occur. -1 fills up
rows that are shorter than the others.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.core.work import Advance, no_advance
from deepcluster.visualization.report.collection import Collection, Floats, Integers, evenly, sorted_rows

MOST_LABELS: Final = 4
MOST_NEIGHBOURS: Final = 8
MOST_EPOCHS: Final = 10
# Exemplars of each kind by the number of clusters: a page of 10,000 clusters has to stay small.
EXEMPLARS: Final = ((500, 8), (2_000, 6), (20_000, 4))
LEAST_EXEMPLARS: Final = 2


@dataclass(frozen=True)
class ClusterFacts:
    """What is known of K clusters.

    Attributes:
        sizes_K: number of images.
        tightness_K: mean of the known distances to the centroid; NaN where none is known.
        nearest_KS: images nearest to the centroid, nearest first; ties to the lower index.
        random_KS: images drawn at random, the nearest ones only where there are no others.
        farthest_KS: images farthest from the centroid, farthest first.
        label_KT, label_count_KT: the most frequent labels, and how many images have them; no columns without labels.
        purity_K: share of the most frequent label among the cluster's images whose label is known; NaN where none is.
        neighbours_KJ: clusters that have images, by the distance of their centroids, nearest first.
        past_epochs: earlier epochs, oldest first.
        past_cluster_KE: the cluster that then held most of the cluster's images; the lower number where two did.
        past_share_KE: share of the cluster's images that it held.
    """

    sizes_K: Integers
    tightness_K: Floats
    nearest_KS: Integers
    random_KS: Integers
    farthest_KS: Integers
    label_KT: Integers
    label_count_KT: Integers
    purity_K: Floats
    neighbours_KJ: Integers
    past_epochs: tuple[int, ...]
    past_cluster_KE: Integers
    past_share_KE: Floats

    def exemplars(self) -> list[Integers]:
        """Return images to show, the most important first: one of each cluster, large clusters first, then more."""
        cover_K = np.where(self.nearest_KS[:, 0] < 0, self.random_KS[:, 0], self.nearest_KS[:, 0])
        kinds = (self.nearest_KS, self.farthest_KS, self.random_KS)
        more = [kind_KS[:, columns] for columns in (slice(0, 4), slice(4, None)) for kind_KS in kinds]
        largest = np.argsort(-self.sizes_K, kind="stable")
        parts = [part[largest].T.ravel() for part in (cover_K[:, None], *more)]
        return [part[part >= 0] for part in parts]


def describe_clusters(collection: Collection, *, seed: int, advance: Advance = no_advance) -> ClusterFacts:
    """Return facts of every cluster; of a million images, 10,000 clusters and 20 earlier epochs in some seconds.

    Args:
        seed: seed of the images drawn at random.
        advance: called after each step; may raise to stop.
    """
    count, sizes_K = exemplars_of(collection.n_clusters), collection.sizes_K()
    first_K, step_S = np.cumsum(sizes_K) - sizes_K, np.arange(count)
    known_N = ~np.isnan(collection.distance_N) & (collection.cluster_N >= 0)
    known, distances = collection.cluster_N[known_N], collection.distance_N[known_N]
    known_K = np.bincount(known, minlength=len(sizes_K))
    sums_K = np.bincount(known, weights=distances, minlength=len(sizes_K))
    # By cluster and distance: in each cluster the images of unknown distance come last.
    ordered = sorted_rows(collection, np.flatnonzero(collection.cluster_N >= 0))
    there_KS = step_S < known_K[:, None]
    nearest_KS = _pick(ordered, first_K[:, None] + step_S, there_KS)
    farthest_KS = _pick(ordered, (first_K + known_K - 1)[:, None] - step_S, there_KS)
    advance(1)
    # In random order, but the nearest come after all others.
    cluster = collection.cluster_N[ordered]
    late = np.arange(len(ordered)) - first_K[cluster] < count
    shuffled = ordered[np.lexsort((np.random.default_rng(seed).random(len(ordered)) + late, cluster))]
    label_KT, label_count_KT, purity_K = _labels(collection)
    advance(1)
    epochs, past_cluster_KE, past_share_KE = _past(collection, sizes_K, advance)
    return ClusterFacts(
        sizes_K=sizes_K,
        tightness_K=np.divide(sums_K, known_K, out=np.full(len(sums_K), np.nan), where=known_K > 0),
        nearest_KS=nearest_KS,
        random_KS=_pick(shuffled, first_K[:, None] + step_S, step_S < sizes_K[:, None]),
        farthest_KS=farthest_KS,
        label_KT=label_KT,
        label_count_KT=label_count_KT,
        purity_K=purity_K,
        neighbours_KJ=_neighbours(collection, sizes_K, advance),
        past_epochs=epochs,
        past_cluster_KE=past_cluster_KE,
        past_share_KE=past_share_KE,
    )


def exemplars_of(n_clusters: int) -> int:
    """Return the number of exemplars of each kind: 8 of up to 500 clusters, fewer of more."""
    return next((count for most, count in EXEMPLARS if n_clusters <= most), LEAST_EXEMPLARS)


def _pick(values: Integers, places: Integers, there: NDArray[np.bool_]) -> Integers:
    """Return `values[places]` where something is there, -1 elsewhere."""
    picked = np.full(places.shape, -1, dtype=np.int64)
    picked[there] = values[places[there]]
    return picked


def _labels(collection: Collection) -> tuple[Integers, Integers, Floats]:
    """Return the most frequent labels of each cluster, their counts, and the first one's share."""
    n_clusters = collection.n_clusters
    if collection.label_N is None:
        none = np.zeros((n_clusters, 0), dtype=np.int64)
        return none, none, np.full(n_clusters, np.nan)
    cluster_Q, label_Q, count_Q = _pairs(collection.cluster_N, collection.label_N)
    order = np.lexsort((label_Q, -count_Q, cluster_Q))
    pairs_K = np.bincount(cluster_Q, minlength=n_clusters)
    first_K = np.cumsum(pairs_K) - pairs_K
    step_T = np.arange(MOST_LABELS)
    there_KT, places_KT = step_T < pairs_K[:, None], first_K[:, None] + step_T
    label_KT, count_KT = (_pick(values_Q[order], places_KT, there_KT) for values_Q in (label_Q, count_Q))
    known_K = np.bincount(cluster_Q, weights=count_Q, minlength=n_clusters)
    purity_K = np.divide(count_KT[:, 0], known_K, out=np.full(n_clusters, np.nan), where=known_K > 0)
    return label_KT, count_KT, purity_K


def _neighbours(collection: Collection, sizes_K: Integers, advance: Advance) -> Integers:
    """Return the clusters nearest by centroid; those without images have no neighbours and are none."""
    if collection.centroids_KP is None:
        return np.zeros((len(sizes_K), 0), dtype=np.int64)
    centroids_KP = collection.centroids_KP.float()
    meant = np.flatnonzero((sizes_K > 0) & torch.isfinite(centroids_KP).all(dim=1).numpy())
    neighbours_KJ = np.full((len(sizes_K), max(0, min(MOST_NEIGHBOURS, len(meant) - 1))), -1, dtype=np.int64)
    if neighbours_KJ.shape[1]:
        rows = centroids_KP[torch.from_numpy(meant)]
        _, found = nearest_neighbours(rows, rows, k=neighbours_KJ.shape[1], exclude_self=True, advance=lambda _: advance(0))
        neighbours_KJ[meant] = meant[found.numpy()]
    return neighbours_KJ


def _past(collection: Collection, sizes_K: Integers, advance: Advance) -> tuple[tuple[int, ...], Integers, Floats]:
    """Return the epochs that are shown, the cluster of each that held most of a cluster's images, and the share it held."""
    some = [collection.past[place] for place in evenly(len(collection.past), MOST_EPOCHS)]
    before_KE = np.full((len(sizes_K), len(some)), -1, dtype=np.int64)
    share_KE = np.zeros(before_KE.shape)
    for column, past in enumerate(some):
        advance(1)
        cluster_Q, before_Q, count_Q = _pairs(collection.cluster_N, past.load())
        order = np.lexsort((before_Q, -count_Q, cluster_Q))
        clusters, firsts = np.unique(cluster_Q[order], return_index=True)
        before_KE[clusters, column] = before_Q[order][firsts]
        share_KE[clusters, column] = count_Q[order][firsts] / sizes_K[clusters]
    return tuple(past.epoch for past in some), before_KE, share_KE


def _pairs(cluster_N: Integers, other_N: Integers) -> tuple[Integers, Integers, Integers]:
    """Return the pairs (cluster, other) that occur, and how often; images that lack one of the two are left out."""
    both_N = (cluster_N >= 0) & (other_N >= 0)
    width = int(other_N.max(initial=0)) + 1
    pairs_Q, count_Q = np.unique(cluster_N[both_N] * width + other_N[both_N], return_counts=True)
    cluster_Q, other_Q = np.divmod(pairs_Q, width)
    return cluster_Q, other_Q, count_Q
