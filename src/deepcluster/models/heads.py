"""What is put on a trunk to train it: objects of their own, thrown away and made anew.

B images of a batch, D features, K clusters, S super-classes, R images of one super-class and G clusters of it.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, relu

from deepcluster.errors import InputError

# A head from means is at most as sharp as if clusters were this much narrower than they are apart.
NARROWEST = 1e-4


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
        self.linear = _linear(dim, n_clusters, torch.Generator().manual_seed(seed))

    @classmethod
    def from_means(cls, means_KD: Tensor, spread: float) -> Self:
        """A head whose softmax is that of the nearest mean, -|x - c|² / 2 spread, but for a constant of each image.

        So w = (c - m) / spread and b = -(|c|² - |m|²) / 2 spread: the mean m of the means changes scores of all clusters
        alike, and without it weights stay small. That is the posterior of clusters which are equally likely normal
        distributions of variance `spread` in each component. (Instead of new random weights after each clustering, with
        which the paper's section 3 begins anew.)

        Args:
            means_KD: mean of the features after the ReLU of each cluster's images; rows with NaN: clusters without images,
                whose score is the least that any cluster has at the mean.
            spread: mean squared distance of an image to its cluster's mean (more: softer; divided by the number of
                components in which images spread: as sharp as the distances say). Where it is nearly nothing a
                10,000th of the means' own is taken.

        Raises:
            InputError: a spread that is negative or not finite; no finite mean.
        """
        known_K = means_KD.isfinite().all(dim=1)
        if not spread >= 0 or spread == float("inf") or not bool(known_K.any()):
            raise InputError(f"spread={spread:g} must be a number from 0 on, and at least one of the means finite")
        known_SD = means_KD[known_K].double()
        centre_D = known_SD.mean(dim=0)
        centred_SD = known_SD - centre_D
        squares_S = centred_SD.square().sum(dim=1)
        # 1 where all means are equal: then all weights are zero.
        variance = max(spread, NARROWEST * float(squares_S.mean())) or 1.0
        # |c|² - |m|² = |c - m|² + 2 m (c - m), which cancels no digits.
        bias_S = -(squares_S / 2 + centred_SD @ centre_D) / variance
        head = cls(means_KD.shape[1], len(means_KD), seed=0).to(means_KD.device)
        with torch.no_grad():
            head.linear.weight.zero_()
            head.linear.weight[known_K] = (centred_SD / variance).float()
            # At the centre m the scores are -|c - m|² / 2 variance.
            head.linear.bias.fill_(-float(squares_S.max()) / 2 / variance)
            head.linear.bias[known_K] = bias_S.float()
        return head

    def forward(self, features_BD: Tensor) -> Tensor:
        """Scores (B, K) of features (B, D)."""
        return self.linear(self.relu(features_BD))  # type: ignore[no-any-return]

    def loss(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Cross-entropy (B) of each image with its cluster, in float32 or wider."""
        return _cross_entropy(self(features_BD), labels_B)


class HierarchicalHead(nn.Module):
    """Features → scores of the super-classes, and of the clusters within the image's own: for very many clusters.

    ReLU, then a linear layer V to the super-classes and layers W_s to the clusters of each, kept as one. The loss of an
    image x of super-class y and cluster z is c(V x, y) + c(W_y x, z), c the cross-entropy (DeeperCluster, arXiv 1905.01278,
    section 3). It takes D (S + K/S) multiplications an image where super-classes are of one size, not D K.

    Args:
        dim: D, the width of the features.
        super_of_cluster_K: super-class of each cluster, ascending, as of `Hierarchy`.
        n_supers: S; by default the last of the clusters' and 1. Some may have no cluster.
        seed: of the weights, which are normal with deviation 0.01; biases are zero.

    Raises:
        InputError: super-classes that do not ascend or are not from 0 to S - 1.
    """

    super_of_cluster_K: Tensor

    def __init__(self, dim: int, super_of_cluster_K: Tensor, n_supers: int | None = None, *, seed: int) -> None:
        super().__init__()
        super_of_cluster_K = super_of_cluster_K.cpu()
        n_supers = int(super_of_cluster_K[-1]) + 1 if n_supers is None else n_supers
        low, high = int(super_of_cluster_K[0]), int(super_of_cluster_K[-1])
        if low < 0 or high >= n_supers or bool((super_of_cluster_K[1:] < super_of_cluster_K[:-1]).any()):
            raise InputError(f"super-classes of the clusters must ascend from 0 to at most {n_supers - 1}")
        self.register_buffer("super_of_cluster_K", super_of_cluster_K.long(), persistent=False)
        self.sizes = torch.bincount(super_of_cluster_K, minlength=n_supers).tolist()
        generator = torch.Generator().manual_seed(seed)
        self.supers = _linear(dim, n_supers, generator)
        self.clusters = _linear(dim, len(super_of_cluster_K), generator)

    def forward(self, features_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the super-classes (B, S) and of all clusters (B, K), of features (B, D)."""
        features_BD = relu(features_BD)
        return self.supers(features_BD), self.clusters(features_BD)

    def loss(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """The sum (B) of both cross-entropies of each image, in float32 or wider; labels are clusters 0 … K-1."""
        features_BD = relu(features_BD)
        supers_B = self.super_of_cluster_K[labels_B]
        # Images side by side that share a super-class: a product for each, of its part of the weights alone.
        order_B = supers_B.argsort(stable=True)
        counts = torch.bincount(supers_B, minlength=len(self.sizes)).tolist()
        parts = zip(
            features_BD[order_B].split(counts),
            labels_B[order_B].split(counts),
            # Split, not sliced: the gradient is then put together once, and not added up from S tables of zeros.
            self.clusters.weight.split(self.sizes),
            self.clusters.bias.split(self.sizes),
            strict=True,
        )
        losses, first = [], 0
        for (features_RD, labels_R, weight_GD, bias_G), size in zip(parts, self.sizes, strict=True):
            if len(labels_R):
                losses.append(_cross_entropy(linear(features_RD, weight_GD, bias_G), labels_R - first))
            first += size
        within_B = torch.cat(losses) if losses else features_BD.new_zeros(0)
        return _cross_entropy(self.supers(features_BD), supers_B) + within_B[order_B.argsort()]


def _linear(dim: int, n_outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer whose weights are normal with deviation 0.01, and biases zero."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, dim, n_outputs)
    with torch.no_grad():
        layer.weight.normal_(std=0.01, generator=generator)
        layer.bias.zero_()
    return layer


def _cross_entropy(scores_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Of each row, in float32 or, where scores are wider, in their own type."""
    wide = torch.promote_types(scores_BK.dtype, torch.float32)
    return cross_entropy(scores_BK.to(wide), labels_B, reduction="none")
