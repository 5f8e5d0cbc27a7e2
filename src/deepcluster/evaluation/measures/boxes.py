"""Average precision of detections by the rules of PASCAL VOC (Everingham et al., IJCV 2010, section 4.2).

The detections of a class, of all images, are ranked by score; of equal scores, those of earlier images come first. Each is
compared with the object of its class and image that it overlaps most. It is right if their IoU reaches the threshold (as in
the devkit; ports in Python ask for more), and if no detection before it was right about that object; if the object is
difficult, it does not count; else it is wrong. COCO's rule is another: there, a detection whose best object is taken may be
right about the next best.

VOC writes boxes as whole pixels, counted from 1, of which the last one belongs to the box; its IoU adds 1 to widths and
heights. Continuous pixels, as in `Objects` and `Detections`, need no such correction: (left, top, right, bottom) is
(left + 1, top + 1, right, bottom) in VOC's files, for objects and detections alike, so both IoUs are the same number.
Evaluations that go through VOC's files also round boxes to 0.1 pixels and scores to 0.001, which is not done here.

D detections, M objects, C classes that have objects that count, T thresholds of IoU.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.evaluation.datasets.dense import Detections, Objects

# 0.5, 0.55, ..., 0.95, each the closest number: an IoU of 11/20 reaches 0.55.
IOUS = tuple(percent / 100 for percent in range(50, 100, 5))
POINTS = 11


@dataclass(frozen=True)
class BoxPrecisions:
    """Average precisions (shares from 0 to 1) of the classes that have an object that counts.

    Attributes:
        classes: names of the C classes.
        left_out: names of the others, which have no average precision and are in no mean.
        ious: the T thresholds.
        points_CT: mean precision at 11 recalls (or as many as were asked for), as VOC 2007.
        area_CT: area under the envelope of precision by recall, as VOC since 2010.
    """

    classes: tuple[str, ...]
    left_out: tuple[str, ...]
    ious: tuple[float, ...]
    points_CT: NDArray[np.float64]
    area_CT: NDArray[np.float64]

    def by_class(self, iou: float | None = None, *, area: bool = False) -> dict[str, float]:
        """Return the average precision of each class at one threshold, or its mean over all: "AP" of tables with AP50, AP75.

        Args:
            area: under the envelope, instead of at 11 recalls.
        """
        values_CT = self.area_CT if area else self.points_CT
        values_C = values_CT.mean(axis=1) if iou is None else values_CT[:, self.ious.index(iou)]
        return dict(zip(self.classes, values_C.tolist(), strict=True))

    def mean(self, iou: float | None = None, *, area: bool = False) -> float:
        """Return the mean over the classes of `by_class`."""
        return float(np.mean(list(self.by_class(iou, area=area).values())))


def box_precisions(
    found: Iterable[tuple[Detections, Objects]],
    class_names: Sequence[str],
    *,
    ious: Sequence[float] = IOUS,
    points: int = POINTS,
) -> BoxPrecisions:
    """Return the average precisions of what was found in each image, compared with its objects.

    Objects of a crowd count as difficult ones do.

    Args:
        found: detections and objects of each image, in its own pixels.
        class_names: by class number; number 0 is the background.
        points: number of recalls; COCO has 101.

    Raises:
        InputError: no object counts, or a detection has a score or box that is no finite number.
    """
    ranking = _ranking(found)
    positives = np.bincount(ranking.classes_M[ranking.counts_M], minlength=len(class_names))
    known = [number for number in range(1, len(class_names)) if positives[number]]
    if not known:
        raise InputError(
            f"none of the {count_of(len(class_names) - 1, 'class')} has an object that counts: there is nothing to average"
        )
    points_CT, area_CT = np.zeros((2, len(known), len(ious)))
    for row, number in enumerate(known):
        for column, iou in enumerate(ious):
            right_R = ranking.right(number, iou)
            points_CT[row, column] = precision_at_points(right_R, int(positives[number]), points)
            area_CT[row, column] = area_under_envelope(right_R, int(positives[number]))
    return BoxPrecisions(
        tuple(class_names[number] for number in known),
        tuple(name for number, name in enumerate(class_names) if number and number not in known),
        tuple(ious),
        points_CT,
        area_CT,
    )


def precision_at_points(right_R: NDArray[np.bool_], positives: int, points: int = POINTS) -> float:
    """Return the mean, over recalls 0, 1/(points - 1), …, 1, of the highest precision at that recall or more.

    Recalls are compared as whole numbers: 3 objects of 10 reach 0.3.

    Args:
        right_R: whether each of R ranked detections is right.
        positives: number of objects, at least 1.
    """
    found_R, envelope_R = _curve(right_R)
    needed_P = -(-np.arange(points) * positives // (points - 1))  # Rounded up.
    at_P = np.searchsorted(found_R, needed_P)
    return float(np.append(envelope_R, 0.0)[at_P].mean())


def area_under_envelope(right_R: NDArray[np.bool_], positives: int) -> float:
    """Return the area under the highest precision at each recall or more; arguments as `precision_at_points`."""
    _, envelope_R = _curve(right_R)
    return float(envelope_R[right_R].sum() / positives)


def _curve(right_R: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the number of objects found by each rank, and the highest precision from there on."""
    found_R = np.cumsum(right_R, dtype=np.int64)
    precision_R = found_R / np.arange(1, len(right_R) + 1)
    return found_R, np.asarray(np.maximum.accumulate(precision_R[::-1])[::-1], dtype=np.float64)


@dataclass(frozen=True)
class _Ranking:
    """The detections of all images, by class and then by descending score, and their objects.

    Attributes:
        labels_D: class of a detection.
        ious_D: its highest IoU with an object of its class and image; -1 if there is none.
        best_D: that object, a row of M.
        classes_M: class of an object.
        counts_M: it is not difficult.
    """

    labels_D: NDArray[np.int64]
    ious_D: NDArray[np.float64]
    best_D: NDArray[np.int64]
    classes_M: NDArray[np.int64]
    counts_M: NDArray[np.bool_]

    def right(self, number: int, iou: float) -> NDArray[np.bool_]:
        """Return whether each detection of a class that counts is right: the first one that hits an object."""
        rows = slice(*np.searchsorted(self.labels_D, [number, number + 1]))
        best_R, hits = self.best_D[rows], np.flatnonzero(self.ious_D[rows] >= iou)
        right_R, counts_R = np.zeros(len(best_R), dtype=bool), np.ones(len(best_R), dtype=bool)
        right_R[hits[np.unique(best_R[hits], return_index=True)[1]]] = True
        counts_R[hits] = self.counts_M[best_R[hits]]
        return right_R[counts_R]


def _ranking(found: Iterable[tuple[Detections, Objects]]) -> _Ranking:
    scores, labels, ious, best, classes, counts, row = [], [], [], [], [], [], 0
    for detections, objects in found:
        boxes_D4, scores_D, labels_D = (
            one.numpy() for one in (detections.boxes_D4, detections.scores_D, detections.labels_D)
        )
        faults = int((~np.isfinite(boxes_D4).all(axis=1) | ~np.isfinite(scores_D)).sum())
        if faults:
            raise InputError(
                f"{faults:,} of {count_of(len(scores_D), 'detection')} in an image have a score or a box that is no finite "
                "number; the detector diverged: use a lower learning rate"
            )
        classes_M = objects.labels_M.numpy()
        iou_DM = np.where(labels_D[:, None] == classes_M, iou_of(boxes_D4, objects.boxes_M4.numpy()), -1.0)
        best_D = iou_DM.argmax(axis=1) if len(classes_M) else np.zeros(len(labels_D), dtype=np.int64)
        scores.append(scores_D)
        labels.append(labels_D)
        ious.append(iou_DM.max(axis=1, initial=-1.0))
        best.append(best_D + row)
        classes.append(classes_M)
        counts.append(~(objects.difficult_M | objects.crowd_M).numpy())
        row += len(classes_M)
    if not classes:
        raise InputError("there are no images: there is nothing to average")
    labels_D = np.concatenate(labels)
    # A stable sort, which keeps the order of the images.
    order_D = np.lexsort((-np.concatenate(scores), labels_D))
    ranked = [np.concatenate(part)[order_D] for part in (ious, best)]
    return _Ranking(labels_D[order_D], ranked[0], ranked[1], np.concatenate(classes), np.concatenate(counts))


def iou_of(boxes_D4: NDArray[np.float32], boxes_M4: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the intersection of boxes over their union, (D, M), in float64: exact for whole pixels up to the division."""
    one_D14, other_M4 = boxes_D4.astype(np.float64)[:, None], boxes_M4.astype(np.float64)
    sides_DM2 = np.minimum(one_D14[..., 2:], other_M4[..., 2:]) - np.maximum(one_D14[..., :2], other_M4[..., :2])
    inner_DM: NDArray[np.float64] = sides_DM2.clip(0).prod(axis=-1)
    areas_D1, areas_M = ((boxes[..., 2:] - boxes[..., :2]).clip(0).prod(axis=-1) for boxes in (one_D14, other_M4))
    return np.asarray(inner_DM / np.maximum(areas_D1 + areas_M - inner_DM, np.finfo(np.float64).tiny), dtype=np.float64)
