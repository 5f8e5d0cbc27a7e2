"""The head of DeepCluster-v2: a projection onto the unit sphere, and clusters as fixed prototypes (arXiv 2006.09882).

B batch, V crops of an image, D features, P components, H heads, K clusters of a head, N crops of the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from deepcluster.models.trunk import Trunk


class Projection(nn.Module):
    """Features → points of unit length: a linear layer, BatchNorm, ReLU, a linear layer, scaled to the sphere.

    Args:
        dim: D, the width of the features.
        hidden: width of the hidden layer.
        components: P.
        seed: seed of the weights.
    """

    def __init__(self, dim: int, hidden: int, components: int, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, components)
            )

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return points (B, P) of unit length, in float32 or wider."""
        points_BP = self.layers(features_BD)
        return normalize(points_BP.float() if points_BP.itemsize < 4 else points_BP)


class CropPoints(nn.Module):
    """A trunk and a projection: the points of several crops per image, with one pass of the trunk per size of crops."""

    def __init__(self, trunk: Trunk, projection: Projection) -> None:
        super().__init__()
        self.trunk, self.projection = trunk, projection

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Return the points (V · B, P), crop after crop, of normalised crops: a tensor (V' · B, 3, S, S) for each size."""
        return self.projection(torch.cat([self.trunk(crops_BCHW) for crops_BCHW in crops]))  # type: ignore[no-any-return]


def prototype_losses(points_VBP: Tensor, prototypes: Sequence[Tensor], labels_HB: Tensor, *, temperature: float) -> Tensor:
    """Return the loss (B,) of each image: cross-entropy of its crops with its cluster, averaged over crops and heads.

    The logits are the cosines with all prototypes of a head, divided by the temperature (SwAV, section 3.1, equation 2,
    with k-means assignments instead of codes). The clusters are those of the previous epoch, from other crops.

    Args:
        points_VBP: points of unit length.
        prototypes: (K, P) of unit length for each head, fixed.
        labels_HB: cluster of each image in each head; -1: the image is ignored.
    """
    n_views, n_images, _ = points_VBP.shape
    points_NP = points_VBP.flatten(0, 1) / temperature
    losses_B = points_VBP.new_zeros(n_images)
    for prototypes_KP, labels_B in zip(prototypes, labels_HB, strict=True):
        scores_NK = points_NP @ prototypes_KP.to(points_NP.dtype).T
        losses_N = cross_entropy(scores_NK.to(points_VBP.dtype), labels_B.repeat(n_views), ignore_index=-1, reduction="none")
        losses_B = losses_B + losses_N.view(n_views, n_images).mean(dim=0)
    return losses_B / len(prototypes)
