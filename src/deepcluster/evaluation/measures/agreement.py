"""Agreement of clusters with classes: four measures that do not depend on how the clusters are numbered.

N images, K clusters, C classes.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepcluster.core.errors import InputError

MEASURES = ("nmi", "adjusted_rand", "accuracy", "purity")


def agreement(clusters_N: ArrayLike, labels_N: ArrayLike) -> dict[str, float]:
    """Return all measures of `MEASURES` over the images that have both a cluster and a class (neither is negative).

    - `nmi`: mutual information over the arithmetic mean of both entropies, as in scikit-learn and most papers. (The lines
      of a training run divide by the geometric mean, as in the paper's equation 3.)
    - `adjusted_rand`: share of the pairs of images on which both agree (together or apart), adjusted for chance.
    - `accuracy`: of the best one-to-one matching of clusters and classes (the Hungarian method). With more clusters than
      classes, all images of unmatched clusters are wrong.
    - `purity`: accuracy when each cluster stands for its most frequent class. It tends to grow with the number of clusters.

    Raises:
        InputError: lengths differ, or no image has both.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    clusters, labels = known_to_both(clusters_N, labels_N)
    # Sparse: 10,000 clusters and 1,000 classes share few of the possible pairs.
    overlap_KC = contingency_matrix(clusters, labels, sparse=True, dtype=np.int64).tocsr()
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters, average_method="arithmetic")),
        "adjusted_rand": float(adjusted_rand_score(labels, clusters)),
        "accuracy": matched(overlap_KC) / len(clusters),
        "purity": int(overlap_KC.max(axis=1).sum()) / len(clusters),
    }


def known_to_both(clusters_N: ArrayLike, labels_N: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return clusters and classes of the images that have both."""
    clusters, labels = np.asarray(clusters_N, dtype=np.int64), np.asarray(labels_N, dtype=np.int64)
    if clusters.shape != labels.shape or clusters.ndim != 1:
        raise InputError(f"clusters {clusters.shape} and classes {labels.shape} must be two lists of one length")
    both_N = (clusters >= 0) & (labels >= 0)
    if not both_N.any():
        raise InputError(f"none of the {len(clusters):,} images has both a cluster and a class: there is nothing to compare")
    return clusters[both_N], labels[both_N]


def matched(overlap_KC: Any) -> int:
    """Return the most images that a one-to-one matching of clusters and classes can make right.

    Args:
        overlap_KC: sparse matrix of the number of images that each cluster shares with each class.
    """
    from scipy.optimize import linear_sum_assignment

    table_KC = overlap_KC.toarray()
    rows, columns = linear_sum_assignment(table_KC, maximize=True)
    return int(table_KC[rows, columns].sum())
