"""Average precision of a ranking: scikit-learn's, and VOC 2007's of 11 points. Both skip "difficult" images, as VOC does.

N images, C classes, T thresholds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of

RECALLS = 11


@dataclass(frozen=True)
class AveragePrecisions:
    """Average precision of each class that has a positive.

    Attributes:
        by_class: as scikit-learn defines it, by name of the class.
        by_class_11_points: as VOC 2007 defines it.
        left_out: classes without a positive, which no mean includes.
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
    return float(average_precision_score(positive_N, counted_N)) if positive_N.any() else float("nan")


def average_precision_11_points(labels_N: Tensor, scores_N: Tensor) -> float:
    """Return VOC 2007's: the mean over recall r = 0, 0.1, …, 1 of the highest precision at a recall of at least r.

    Everingham et al., IJCV 2010, section 4.2.1. Images of equal score are one step, as above. Recalls are compared as whole
    numbers: a recall of 3 in 10 reaches 0.3. Arguments, result and errors as `average_precision`.
    """
    positive_N, counted_N = _counted(labels_N, scores_N)
    positives = int(positive_N.sum())
    if not positives:
        return float("nan")
    precision_T, recall_T, _ = precision_recall_curve(positive_N, counted_N)
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
