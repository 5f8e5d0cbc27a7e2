"""k-nearest-neighbour accuracy of frozen features: no training, one number (cosine, weighted votes; Wu et al., CVPR 2018).

N known images, M images to classify, D features, K votes, C classes.
"""

import torch
from torch import Tensor

from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.errors import InputError

TEMPERATURE = 0.07
BLOCK_ROWS = 1024
# Votes are counted in these parts of the nearest one's: sums of integers do not depend on their order.
PARTS = 2.0**40


def knn_predict(
    known_ND: Tensor, labels_N: Tensor, features_MD: Tensor, *, k: int = 20, exclude_self: bool = False
) -> Tensor:
    """Labels (M,) by the votes of the k nearest known images, each weighted with exp(cosine / 0.07).

    Equal votes go to the lower class; of images that are equally near, the first ones vote.

    Args:
        known_ND, labels_N: features and labels (0 … C-1) to vote.
        features_MD: what to classify.
        k: number of votes.
        exclude_self: `features_MD` are `known_ND`; an image does not vote for itself.

    Raises:
        InputError: k is under 1 or over the number of images that can vote.
    """
    voters = len(known_ND) - exclude_self
    if not 1 <= k <= voters:
        raise InputError(f"k={k} neighbours must be between 1 and the {voters} images that can vote")
    cosines_MK, voters_MK = nearest_neighbours(features_MD, known_ND, k=k, metric="cosine", exclude_self=exclude_self)
    predicted_M = torch.empty(len(features_MD), dtype=labels_N.dtype, device=labels_N.device)
    n_classes = int(labels_N.max()) + 1
    for out, cosines_BK, voters_BK in zip(
        *(part.split(BLOCK_ROWS) for part in (predicted_M, cosines_MK, voters_MK)), strict=True
    ):
        weights_BK = ((cosines_BK - cosines_BK[:, :1]) / TEMPERATURE).exp()
        votes_BC = torch.zeros(len(out), n_classes, dtype=torch.int64, device=out.device)
        votes_BC.scatter_add_(1, labels_N[voters_BK], (weights_BK * PARTS).long())
        out.copy_(votes_BC.argmax(dim=1))
    return predicted_M


def knn_accuracy(known_ND: Tensor, known_labels_N: Tensor, features_MD: Tensor, labels_M: Tensor, *, k: int = 20) -> float:
    """Share of the M images that `knn_predict` labels rightly (top-1)."""
    return float((knn_predict(known_ND, known_labels_N, features_MD, k=k) == labels_M).double().mean())


def leave_one_out_accuracy(features_ND: Tensor, labels_N: Tensor, *, k: int = 20) -> float:
    """`knn_accuracy` of each image by all the others."""
    return float((knn_predict(features_ND, labels_N, features_ND, k=k, exclude_self=True) == labels_N).double().mean())
