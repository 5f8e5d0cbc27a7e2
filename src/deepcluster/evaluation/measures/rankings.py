"""Average precision of a ranking, and agreement of clusters with classes.

N images, C classes, T thresholds, K clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of

RECALLS = 11
MEASURES = ("nmi", "adjusted_rand", "accuracy", "purity")


def agreement(clusters_N: ArrayLike, labels_N: ArrayLike) -> dict[str, float]:
    """Return all of `MEASURES` over the images that have both a cluster and a class (neither is negative).

    None depends on how the clusters are numbered.

    - `nmi`: mutual information over the geometric mean of both entropies, as the paper defines it (equation 3), and as in
      the lines of a training run. scikit-learn's default divides by the arithmetic mean.
    - `adjusted_rand`: share of the pairs of images on which both agree (together or apart), adjusted for chance.
    - `accuracy`: of the best one-to-one matching of clusters and classes (the Hungarian method). With more clusters than
      classes, all images of unmatched clusters are wrong.
    - `purity`: accuracy when each cluster stands for its most frequent class. It tends to grow with the number of clusters.

    Raises:
        InputError: lengths differ, or no image has both.
    """
    clusters, labels = np.asarray(clusters_N, dtype=np.int64), np.asarray(labels_N, dtype=np.int64)
    if clusters.shape != labels.shape or clusters.ndim != 1:
        raise InputError(f"clusters {clusters.shape} and classes {labels.shape} must be two lists of one length")
    both_N = (clusters >= 0) & (labels >= 0)
    if not both_N.any():
        raise InputError(
            f"none of the {count_of(len(clusters), 'image')} has both a cluster and a class: there is nothing to compare"
        )
    clusters, labels = clusters[both_N], labels[both_N]
    overlap_KC = contingency_matrix(clusters, labels, dtype=np.int64)
    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, clusters, average_method="geometric")),
        "adjusted_rand": float(metrics.adjusted_rand_score(labels, clusters)),
        "accuracy": int(overlap_KC[linear_sum_assignment(overlap_KC, maximize=True)].sum()) / len(clusters),
        "purity": int(overlap_KC.max(axis=1).sum()) / len(clusters),
    }


@dataclass(frozen=True)
class AveragePrecisions:
    """Average precision by name of each class that has a positive: as scikit-learn defines it, and as VOC 2007 does.

    No mean includes the classes that are `left_out`, which have no positive.
    """

    by_class: dict[str, float]
    by_class_11_points: dict[str, float]
    left_out: list[str]

    @property
    def mean(self) -> float:
        """mAP by scikit-learn's definition."""
        return float(np.mean(list(self.by_class.values())))

    @property
    def mean_11_points(self) -> float:
        """mAP by VOC 2007's definition."""
        return float(np.mean(list(self.by_class_11_points.values())))


def average_precision(labels_N: Tensor, scores_N: Tensor) -> float:
    """Return the step-wise area under precision by recall, as scikit-learn's `average_precision_score`: no interpolation.

    Images of equal score are one step, so their order does not matter.

    Args:
        labels_N: 1 = positive, -1 = negative, 0 = difficult, which is skipped.
        scores_N: higher = more likely positive.

    Returns:
        a share from 0 to 1; NaN if there is no positive.

    Raises:
        InputError: a score is not finite.
    """
    positive_N, counted_N = _counted(labels_N, scores_N)
    return float(metrics.average_precision_score(positive_N, counted_N)) if positive_N.any() else float("nan")


def average_precision_11_points(labels_N: Tensor, scores_N: Tensor) -> float:
    """Return VOC 2007's: the mean over recall r = 0, 0.1, …, 1 of the highest precision at a recall of at least r.

    Everingham et al., IJCV 2010, section 4.2.1. Images of equal score are one step, as above. Recalls are compared as whole
    numbers: a recall of 3 in 10 reaches 0.3. Arguments, result and errors as `average_precision`.
    """
    positive_N, counted_N = _counted(labels_N, scores_N)
    positives = int(positive_N.sum())
    if not positives:
        return float("nan")
    precision_T, recall_T, _ = metrics.precision_recall_curve(positive_N, counted_N)
    # The last point is added by scikit-learn: precision 1 at recall 0.
    precision_T, found_T = precision_T[:-1], np.rint(recall_T[:-1] * positives).astype(np.int64)
    best = [precision_T[found_T * (RECALLS - 1) >= tenths * positives].max() for tenths in range(RECALLS)]
    return float(np.mean(best))


def mean_average_precision(labels_NC: Tensor, scores_NC: Tensor, classes: Sequence[str]) -> AveragePrecisions:
    """Return both average precisions of each class; classes without a positive are left out and named.

    Raises:
        InputError: no class has a positive, or a score is not finite.
    """
    columns = {name: (labels_NC[:, number], scores_NC[:, number]) for number, name in enumerate(classes)}
    known = {name: column for name, column in columns.items() if (column[0] == 1).any()}
    if not known:
        raise InputError(f"none of the {count_of(len(classes), 'class')} has a positive image: there is nothing to average")
    return AveragePrecisions(
        {name: average_precision(*column) for name, column in known.items()},
        {name: average_precision_11_points(*column) for name, column in known.items()},
        [name for name in classes if name not in known],
    )


def _counted(labels_N: Tensor, scores_N: Tensor) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return which images are positive, and their scores in float64, without difficult ones."""
    labels, scores = labels_N.cpu().numpy(), scores_N.detach().double().cpu().numpy()
    wrong = int((~np.isfinite(scores)).sum())
    if wrong:
        raise InputError(
            f"{wrong:,} of {count_of(len(scores), 'score')} are not finite numbers, so they can't be ranked; the classifier "
            "diverged (use a lower learning rate) or an image could not be read"
        )
    counts = labels != 0
    return labels[counts] == 1, scores[counts]
