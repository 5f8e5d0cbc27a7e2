"""What is put on a trunk to train it: the heads of DeepCluster, new after each clustering, and that of DeepCluster-v2.

The latter is a projection onto the unit sphere, with clusters as fixed prototypes (arXiv 2006.09882).
B images of a batch, D features, K clusters (of a head), S super-classes; V crops of an image, P components, H heads,
N crops of the batch.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, relu

from deepcluster.core.device import to_device
from deepcluster.core.errors import InputError
from deepcluster.models.trunk import Trunk


class HeadInput(nn.Module):
    """What a head does first: a ReLU, and a BatchNorm without weights if requested; its rows have an expected length of 1.

    Args:
        dim: D, the width of the features.
        norm: standardise over the batch.
    """

    def __init__(self, dim: int, *, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False) if norm else None

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return the input (B, D) of the linear layers."""
        positive_BD = relu(features_BD)
        if self.norm is None:
            return positive_BD
        wide_BD = positive_BD.float() if positive_BD.itemsize < 4 else positive_BD
        return self.norm(wide_BD) * wide_BD.shape[1] ** -0.5  # type: ignore[no-any-return]


class ClusterHead(nn.Module):
    """Features → scores of the clusters: a ReLU, a BatchNorm if requested, then a linear layer.

    The ReLU is the last one of the paper's networks, whose features are taken before it. Weights are normal with standard
    deviation 0.01, biases zero (section 3, implementation details, and the 2018 release).

    How large a learning rate of the linear layer can be depends on the length of its input, which differs by a factor of
    2,500 between networks. With a BatchNorm the expected length is 1, and there are no biases.

    Args:
        dim: D, the width of the features.
        n_clusters: K.
        norm: standardise the input over the batch.
        seed: seed of the weights.
    """

    def __init__(self, dim: int, n_clusters: int, *, norm: bool = False, seed: int) -> None:
        super().__init__()
        self.input = HeadInput(dim, norm=norm)
        self.linear = _linear(dim, n_clusters, bias=not norm, seed=seed)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Return the scores (B, K) of features (B, D)."""
        return self.linear(self.input(features_BD))  # type: ignore[no-any-return]

    def loss(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the cross-entropy (B,) of each image with its cluster, in float32 or wider. Labels are on any device."""
        return _cross_entropy(self(features_BD), to_device(labels_B, features_BD.device))


class HierarchicalHead(nn.Module):
    """Features → scores of the super-classes, and of the clusters within the image's own: for very many clusters.

    A ReLU, then a linear layer V to the super-classes, and for each super-class s a layer W_s to its clusters. The loss of
    an image x of super-class y and cluster z is c(V x, y) + c(W_y x, z), c the cross-entropy (DeeperCluster, arXiv
    1905.01278, section 3). It takes D (S + K/S) multiplications per image where super-classes are of equal size, instead of
    D K.

    Args:
        dim: D, the width of the features.
        super_of_cluster_K: super-class of each cluster, ascending.
        n_supers: S; by default the super-class of the last cluster, plus 1. A super-class may have no cluster.
        norm: standardise the input over the batch.
        seed: seed of the weights, which are normal with standard deviation 0.01; biases are zero.

    Attributes:
        super_of_cluster_K: on the CPU.
        sizes, starts: number of clusters of each super-class, and the first of them.
        supers: V with the input of all layers.
        layers: W_s by the super-class's number; a super-class without clusters has none.

    Raises:
        InputError: super-classes do not ascend or are not from 0 to S - 1.
    """

    def __init__(
        self, dim: int, super_of_cluster_K: Tensor, n_supers: int | None = None, *, norm: bool = False, seed: int
    ) -> None:
        super().__init__()
        super_of_cluster_K = super_of_cluster_K.cpu().long()
        low, high = int(super_of_cluster_K[0]), int(super_of_cluster_K[-1])
        n_supers = high + 1 if n_supers is None else n_supers
        if low < 0 or high >= n_supers or bool((super_of_cluster_K[1:] < super_of_cluster_K[:-1]).any()):
            raise InputError(f"super-classes of the clusters must ascend from 0 to at most {n_supers - 1}")
        self.sizes = torch.bincount(super_of_cluster_K, minlength=n_supers).tolist()
        self.starts = [0, *accumulate(self.sizes)]
        self.super_of_cluster_K = super_of_cluster_K
        self.supers = ClusterHead(dim, n_supers, norm=norm, seed=seed)
        self.layers = nn.ModuleDict(
            {
                str(number): _linear(dim, size, bias=not norm, seed=seed + 1 + number)
                for number, size in enumerate(self.sizes)
                if size
            }
        )

    def forward(self, features_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of the super-classes (B, S) and of all clusters (B, K), of features (B, D)."""
        input_BD = self.supers.input(features_BD)
        return self.supers.linear(input_BD), torch.cat([layer(input_BD) for layer in self.layers.values()], dim=1)

    def loss(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the sum (B,) of both cross-entropies of each image, in float32 or wider.

        Args:
            features_BD: on any device.
            labels_B: clusters 0 … K-1, best on the CPU: on a GPU they would be waited for, as images are sorted by them.
        """
        labels_B = labels_B.cpu()
        supers_B = self.super_of_cluster_K[labels_B]
        within_B = labels_B - torch.tensor(self.starts)[supers_B]
        order_B = supers_B.argsort(stable=True)
        counts_S = torch.bincount(supers_B, minlength=len(self.sizes)).tolist()
        numbers_4B = torch.stack([supers_B, order_B, order_B.argsort(), within_B[order_B]])
        supers_B, order_B, places_B, within_B = to_device(numbers_4B, features_BD.device)
        input_BD = self.supers.input(features_BD)
        super_losses_B = _cross_entropy(self.supers.linear(input_BD), supers_B)
        # Within super-classes, images sorted by them: one matrix product per super-class, of its own layer.
        images_S, labels_S = input_BD.index_select(0, order_B).split(counts_S), within_B.split(counts_S)
        # Layers without images take part as well: their gradient is zero, not None, as DistributedDataParallel needs it.
        losses = [
            _cross_entropy(layer(images_S[number]), labels_S[number])
            for number, layer in ((int(name), layer) for name, layer in self.layers.items())
        ]
        return super_losses_B + torch.cat(losses).index_select(0, places_B)


Head = ClusterHead | HierarchicalHead


class HeadLoss(nn.Module):
    """A head whose `forward` is its loss, so that DistributedDataParallel and torch.compile can wrap it."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the loss (B,) of each image, in float32 or wider."""
        return self.head.loss(features_BD, labels_B)


def make_head(dim: int, n_clusters: int, super_of_cluster_K: Tensor | None, *, norm: bool = False, seed: int) -> Head:
    """Return a new head with random weights: hierarchical where the clusters belong to super-classes."""
    if super_of_cluster_K is not None:
        return HierarchicalHead(dim, super_of_cluster_K, norm=norm, seed=seed)
    return ClusterHead(dim, n_clusters, norm=norm, seed=seed)


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
    for prototypes_KP, labels_N in zip(prototypes, labels_HB.repeat(1, n_views), strict=True):
        scores_NK = points_NP @ prototypes_KP.to(points_NP.dtype).T
        losses_N = cross_entropy(scores_NK.to(points_VBP.dtype), labels_N, ignore_index=-1, reduction="none")
        losses_B = losses_B + losses_N.view(n_views, n_images).mean(dim=0)
    return losses_B / len(prototypes)


def _linear(dim: int, n_outputs: int, *, bias: bool = True, seed: int) -> nn.Linear:
    """Return a linear layer whose weights are normal with standard deviation 0.01, and biases zero."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, dim, n_outputs, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        if bias:
            layer.bias.zero_()
    return layer


def _cross_entropy(scores_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Return the cross-entropy (B,) of each row, in float32 or, where the scores are wider, in their type."""
    wide = torch.promote_types(scores_BK.dtype, torch.float32)
    return cross_entropy(scores_BK.to(wide), labels_B, reduction="none")
