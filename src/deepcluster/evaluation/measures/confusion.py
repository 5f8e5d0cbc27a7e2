"""Segmentation measured by one confusion matrix over the pixels of all images.

C classes; rows are the truth, columns the prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.evaluation.datasets.dense import IGNORED


def confusion(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Count the pixels of each class of the truth by predicted class.

    Args:
        truth: class of each pixel, any shape and type of integers, on any device; pixels of `IGNORED` are not counted.
        prediction: of the same shape and device; what it is where the truth is `IGNORED` does not matter.
        classes: C.

    Returns:
        (C, C), int64, on the same device; matrices of several images are added.

    Raises:
        ValueError: the shapes differ, or a number is no class.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"the prediction has the shape {tuple(prediction.shape)}, the truth {tuple(truth.shape)}")
    counted = truth != IGNORED
    truth_N, prediction_N = truth[counted].long(), prediction[counted].long()
    for name, numbers_N in (("truth", truth_N), ("prediction", prediction_N)):
        low, high = map(int, torch.aminmax(numbers_N)) if numbers_N.numel() else (0, 0)
        if low < 0 or high >= classes:
            raise ValueError(f"the {name} has numbers from {low} to {high}; the classes are 0 to {classes - 1}")
    return torch.bincount(classes * truth_N + prediction_N, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class SegmentationScores:
    """What a confusion matrix says of a segmentation; shares from 0 to 1.

    Attributes:
        miou: mean of `iou` over the classes that have one.
        iou: intersection over union by name of each class that occurs in the truth or in the prediction.
        pixel_accuracy: share of the pixels whose class is right.
        mean_accuracy: mean, over the classes in the truth, of the share of their pixels that is right.
        absent: names of the classes of which the truth has no pixel. Where the prediction has some, their IoU is 0, and it
            is in the mean.
    """

    miou: float
    iou: Mapping[str, float]
    pixel_accuracy: float
    mean_accuracy: float
    absent: tuple[str, ...]


def segmentation_scores(matrix_CC: Tensor, class_names: Sequence[str]) -> SegmentationScores:
    """Return the scores of a confusion matrix, as FCN and most others define them (Long et al., CVPR 2015).

    Raises:
        ValueError: the matrix has another size than (C, C), or counts no pixel.
    """
    if matrix_CC.shape != (len(class_names), len(class_names)):
        raise ValueError(f"a matrix of {tuple(matrix_CC.shape)} for {len(class_names)} classes")
    counts_CC = matrix_CC.cpu().double()
    right_C, truth_C, predicted_C = counts_CC.diag(), counts_CC.sum(1), counts_CC.sum(0)
    if not truth_C.any():
        raise ValueError("no pixel of the truth has a class")
    union_C = truth_C + predicted_C - right_C
    iou = {
        name: float(right / union)
        for name, right, union in zip(class_names, right_C.tolist(), union_C.tolist(), strict=True)
        if union > 0
    }
    there_C = truth_C > 0
    return SegmentationScores(
        miou=sum(iou.values()) / len(iou),
        iou=iou,
        pixel_accuracy=float(right_C.sum() / truth_C.sum()),
        mean_accuracy=float((right_C[there_C] / truth_C[there_C]).mean()),
        absent=tuple(name for name, count in zip(class_names, truth_C.tolist(), strict=True) if count == 0),
    )
