"""k-nearest-neighbour accuracy of frozen features: no training, one number (cosine, weighted votes; Wu et al., CVPR 2018).

N known images, M images to classify, D features, C classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from deepcluster.errors import InputError

TEMPERATURE = 0.07
BLOCK_ROWS = 1024


def knn_predict(
    known_ND: Tensor, labels_N: Tensor, features_MD: Tensor, *, k: int = 20, exclude_self: bool = False
) -> Tensor:
    """Labels (M,) by the votes of the k nearest known images, each weighted with exp(cosine / 0.07).

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
    known_ND = normalize(known_ND.float())
    votes_NC = one_hot(labels_N).float()
    predicted = []
    for start in range(0, len(features_MD), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        cosine_RN = normalize(features_MD[rows].float()) @ known_ND.T
        if exclude_self:
            own = torch.arange(start, start + len(cosine_RN))
            cosine_RN[own - start, own] = -torch.inf
        nearest_RK, index_RK = cosine_RN.topk(k, dim=1)
        weights_RK = (nearest_RK / TEMPERATURE).exp()
        predicted.append((weights_RK[:, :, None] * votes_NC[index_RK]).sum(dim=1).argmax(dim=1))
    return torch.cat(predicted)


def knn_accuracy(known_ND: Tensor, known_labels_N: Tensor, features_MD: Tensor, labels_M: Tensor, *, k: int = 20) -> float:
    """Share of the M images that `knn_predict` labels rightly (top-1)."""
    return float((knn_predict(known_ND, known_labels_N, features_MD, k=k) == labels_M).double().mean())


def leave_one_out_accuracy(features_ND: Tensor, labels_N: Tensor, *, k: int = 20) -> float:
    """`knn_accuracy` of each image by all the others."""
    return float((knn_predict(features_ND, labels_N, features_ND, k=k, exclude_self=True) == labels_N).double().mean())
