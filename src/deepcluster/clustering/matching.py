"""The clusters of two clusterings matched to each other, so that as many images as possible keep theirs.

N images, K clusters of one, L of the other.
"""

import numpy as np
from numpy.typing import NDArray


def match_clusters(cluster_N: NDArray[np.int64], other_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each cluster (K) its counterpart, -1 where it has none: the one-to-one matching of the largest overlap.

    Only pairs of clusters that share images are looked at (Jonker and Volgenant's algorithm for sparse problems), so that
    tens of thousands of clusters are no table of K x L.

    Args:
        cluster_N, other_N: clusters of the same images, from 0.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_clusters, n_others = int(cluster_N.max(initial=-1)) + 1, int(other_N.max(initial=-1)) + 1
    match_K = np.full(n_clusters, -1)
    if not n_clusters:
        return match_K
    pairs, overlaps = np.unique(cluster_N * n_others + other_N, return_counts=True)
    clusters, others = np.divmod(pairs, n_others)
    # Every cluster may also be matched to nothing, a column of its own, at the cost of an overlap of 0.
    nothing, most = np.arange(n_clusters), int(overlaps.max()) + 1
    rows, columns = np.concatenate([clusters, nothing]), np.concatenate([others, n_others + nothing])
    costs = np.concatenate([most - overlaps, np.full(n_clusters, most)]).astype(np.float64)
    table = coo_array((costs, (rows, columns)), shape=(n_clusters, n_others + n_clusters))
    matched, found = min_weight_full_bipartite_matching(table.tocsr())
    match_K[matched] = np.where(found < n_others, found, -1)
    return match_K
