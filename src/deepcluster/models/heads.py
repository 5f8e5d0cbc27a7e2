"""What is put on a trunk to train it: objects of their own, thrown away and made anew.

B images of a batch, D features, K clusters, S super-classes, R images whose super-classes are this rank's, G of one of them.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from deepcluster.core.distributed import Route, rank, world_size
from deepcluster.core.errors import InputError

T = TypeVar("T")


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

    def forward(self, features_BD: Tensor) -> Tensor:
        """Scores (B, K) of features (B, D)."""
        return self.linear(self.relu(features_BD))  # type: ignore[no-any-return]

    def loss(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Cross-entropy (B) of each image with its cluster, in float32 or wider."""
        return _cross_entropy(self(features_BD), labels_B)


class HierarchicalHead(nn.Module):
    """Features → scores of the super-classes, and of the clusters within the image's own: for very many clusters.

    ReLU, then a linear layer V to the super-classes and a layer W_s to the clusters of each. The loss of an image x of
    super-class y and cluster z is c(V x, y) + c(W_y x, z), c the cross-entropy (DeeperCluster, arXiv 1905.01278, section 3).
    It takes D (S + K/S) multiplications an image where super-classes are of one size, not D K.

    Of several ranks all have V, and each layer W_s is on one of them, its owner: features of images travel to the owner of
    their super-class, losses and gradients back, but no weights. On a rank that is D numbers an image and step, not D K.

    Args:
        dim: D, the width of the features.
        super_of_cluster_K: super-class of each cluster, ascending, as of `Hierarchy`.
        n_supers: S; by default the last of the clusters' and 1. Some may have no cluster.
        seed: of the weights, which are normal with deviation 0.01; biases are zero. The same on any number of ranks.

    Attributes:
        sizes, starts: clusters of each super-class, and the first of them.
        supers: V, with its ReLU, on every rank.
        layers: W_s of the super-classes that are this rank's, by number; those without clusters have none.

    Raises:
        InputError: super-classes that do not ascend or are not from 0 to S - 1.
    """

    super_of_cluster_K: Tensor
    owner_S: Tensor

    def __init__(self, dim: int, super_of_cluster_K: Tensor, n_supers: int | None = None, *, seed: int) -> None:
        super().__init__()
        super_of_cluster_K = super_of_cluster_K.cpu()
        n_supers = int(super_of_cluster_K[-1]) + 1 if n_supers is None else n_supers
        low, high = int(super_of_cluster_K[0]), int(super_of_cluster_K[-1])
        if low < 0 or high >= n_supers or bool((super_of_cluster_K[1:] < super_of_cluster_K[:-1]).any()):
            raise InputError(f"super-classes of the clusters must ascend from 0 to at most {n_supers - 1}")
        self.sizes = torch.bincount(super_of_cluster_K, minlength=n_supers).tolist()
        self.starts = [0, *accumulate(self.sizes)]
        owners = owners_of(self.sizes, world_size())
        self.register_buffer("super_of_cluster_K", super_of_cluster_K.long(), persistent=False)
        self.register_buffer("owner_S", torch.tensor(owners), persistent=False)
        self.supers = ClusterHead(dim, n_supers, seed=seed)
        self.layers = nn.ModuleDict(
            {
                str(number): _linear(dim, size, torch.Generator().manual_seed(seed + 1 + number))
                for number, (size, owner) in enumerate(zip(self.sizes, owners, strict=True))
                if size and owner == rank()
            }
        )

    def forward(self, features_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the super-classes (B, S) and of all clusters (B, K), of features (B, D); on one process."""
        positive_BD = relu(features_BD)
        return self.supers(features_BD), torch.cat([layer(positive_BD) for layer in self.layers.values()], dim=1)

    def loss(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """The sum (B) of both cross-entropies of each image, in float32 or wider; labels are clusters 0 … K-1."""
        return self.supers.loss(features_BD, self.super_of_cluster_K[labels_B]) + self.loss_within(features_BD, labels_B)

    def loss_within(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Cross-entropy (B) of each image with its cluster among those of its super-class; all ranks call it at once."""
        route = Route(self.owner_S[self.super_of_cluster_K[labels_B]])
        return route.back(self._loss_of_own(route.there(relu(features_BD)), route.there(labels_B)))

    def _loss_of_own(self, features_RD: Tensor, labels_R: Tensor) -> Tensor:
        """Cross-entropy (R) of images of super-classes that are this rank's; features are positive."""
        supers_R = self.super_of_cluster_K[labels_R]
        # Images side by side that share a super-class: a product for each, of its layer alone.
        order_R = supers_R.argsort(stable=True)
        counts_S = torch.bincount(supers_R, minlength=len(self.sizes)).tolist()
        numbers = [int(number) for number in self.layers]
        parts = zip(
            numbers,
            features_RD[order_R].split([counts_S[number] for number in numbers]),
            labels_R[order_R].split([counts_S[number] for number in numbers]),
            strict=True,
        )
        # Layers of which there is no image, too: their gradient is zero, not none, as if all were one layer.
        losses = [
            _cross_entropy(self.layers[str(number)](features_GD), labels_G - self.starts[number])
            for number, features_GD, labels_G in parts
        ]
        # A rank without layers has no image here, but the gradients of the others pass by it.
        within_R = torch.cat(losses) if losses else features_RD.sum(dim=1, dtype=_wide(features_RD))
        return within_R[order_R.argsort()]


Head = ClusterHead | HierarchicalHead


def make_head(dim: int, n_clusters: int, super_of_cluster_K: Tensor | None, *, seed: int) -> Head:
    """Return a new head of random weights: hierarchical where the clusters lie in super-classes."""
    if super_of_cluster_K is not None:
        return HierarchicalHead(dim, super_of_cluster_K, seed=seed)
    return ClusterHead(dim, n_clusters, seed=seed)


def is_apart(name: str) -> bool:
    """Whether what a head calls so is on one rank alone."""
    return name.startswith("layers.")


def apart(named: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Of a head's values by name those that all ranks have, and those of layers that are on this rank alone."""
    shared = {name: value for name, value in named.items() if not is_apart(name)}
    return shared, {name: value for name, value in named.items() if is_apart(name)}


def owners_of(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that each super-class's layer is on: the largest first, each to the rank with fewest clusters so far.

    Where layers are fewer than ranks, those that have one lie far apart: on as many machines as can be.
    """
    n_owners = max(1, min(ranks, sum(size > 0 for size in sizes)))
    owners, loads = [0] * len(sizes), [0] * n_owners
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        least = loads.index(min(loads))
        loads[least] += sizes[number]
        owners[number] = least * ranks // n_owners
    return owners


def _linear(dim: int, n_outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer whose weights are normal with deviation 0.01, and biases zero."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, dim, n_outputs)
    with torch.no_grad():
        layer.weight.normal_(std=0.01, generator=generator)
        layer.bias.zero_()
    return layer


def _cross_entropy(scores_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Of each row, in float32 or, where scores are wider, in their own type."""
    return cross_entropy(scores_BK.to(_wide(scores_BK)), labels_B, reduction="none")


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
