"""What is put on a trunk to train it: objects of their own, thrown away and made anew."""

import torch
from torch import Tensor, nn


class ClusterHead(nn.Module):
    """Features → scores of the clusters: ReLU, then a linear layer; made anew after each clustering.

    The ReLU is the last one of the paper's networks, whose features are taken before it. Weights are normal with
    deviation 0.01, biases zero (section 3, implementation details, and the 2018 release).

    Args:
        dim: D, the width of the features.
        n_clusters: K.
        seed: of the weights.
    """

    def __init__(self, dim: int, n_clusters: int, *, seed: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.linear = nn.utils.skip_init(nn.Linear, dim, n_clusters)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.normal_(std=0.01, generator=generator)
            self.linear.bias.zero_()

    def forward(self, features_BD: Tensor) -> Tensor:
        """Scores (B, K) of features (B, D)."""
        return self.linear(self.relu(features_BD))  # type: ignore[no-any-return]
