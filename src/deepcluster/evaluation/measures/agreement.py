"""How well groups agree with classes: four measures, none of which minds how the groups are numbered.

N images, K groups, C classes.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepcluster.core.errors import InputError

MEASURES = ("nmi", "adjusted_rand", "accuracy", "purity")


def agreement(groups_N: ArrayLike, labels_N: ArrayLike) -> dict[str, float]:
    """All measures of `MEASURES`, over the images that have both a group and a class (neither is negative).

    - `nmi`: mutual information over the arithmetic mean of both entropies, as scikit-learn and most papers have it. (The
      lines of a training run divide by the geometric mean, as the paper's equation 3 does.)
    - `adjusted_rand`: share of the pairs of images that both put together or both apart, less what chance would give.
    - `accuracy`: of the images, when each group stands for one class and no class for two groups, chosen so that most
      images are right (the Hungarian method). With more groups than classes the images of the others are all wrong.
    - `purity`: the same when each group stands for its most frequent class. It can only grow with the number of groups.

    Raises:
        InputError: lengths differ, or no image has both.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    groups, labels = known_to_both(groups_N, labels_N)
    # Sparse: 10,000 groups of 1,000 classes share few of the possible pairs.
    overlap_KC = contingency_matrix(groups, labels, sparse=True, dtype=np.int64).tocsr()
    return {
        "nmi": float(normalized_mutual_info_score(labels, groups, average_method="arithmetic")),
        "adjusted_rand": float(adjusted_rand_score(labels, groups)),
        "accuracy": matched(overlap_KC) / len(groups),
        "purity": int(overlap_KC.max(axis=1).sum()) / len(groups),
    }


def known_to_both(groups_N: ArrayLike, labels_N: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Groups and classes of the images that have both."""
    groups, labels = np.asarray(groups_N, dtype=np.int64), np.asarray(labels_N, dtype=np.int64)
    if groups.shape != labels.shape or groups.ndim != 1:
        raise InputError(f"groups {groups.shape} and classes {labels.shape} must be two lists of one length")
    both_N = (groups >= 0) & (labels >= 0)
    if not both_N.any():
        raise InputError(f"none of the {len(groups):,} images has both a group and a class: there is nothing to compare")
    return groups[both_N], labels[both_N]


def matched(overlap_KC: Any) -> int:
    """Most images that a one-to-one matching of groups and classes can make right.

    Args:
        overlap_KC: sparse matrix of the images that each group shares with each class.
    """
    from scipy.optimize import linear_sum_assignment

    table_KC = overlap_KC.toarray()
    rows, columns = linear_sum_assignment(table_KC, maximize=True)
    return int(table_KC[rows, columns].sum())
