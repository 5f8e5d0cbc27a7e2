"""Clusters that other programs keep beside their networks: a last layer that predicts them, or prototypes on a sphere.

K clusters, D features, P components.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.models.weights import without_wrappers

# The last layer: of the 2018 release, and of mmselfsup's DeepCluster and ODC.
TOP_LAYERS = ("top_layer", "head.fc_cls")
# Four layers, of which the third is a ReLU without weights; the first may have no bias (lightly).
_PROJECTION = ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight", "3.bias")
# SwAV, DeepCluster-v2, solo-learn, lightly: one matrix, or one per head.
_PROTOTYPES = re.compile(r"(?:^|\.)prototypes(?:\.?(?:prototypes|heads\.)?(\d+))?\.weight(?:_v)?$")


@dataclass(frozen=True)
class TopLayer:
    """A linear layer on the rectified features: the cluster of an image is the one with the largest score."""

    weight_KD: Tensor
    bias_K: Tensor
    used: tuple[str, ...]


@dataclass(frozen=True)
class Prototypes:
    """A projection, and the clusters as unit vectors in its space, per head.

    Attributes:
        projection: state of `models.heads.Projection`.
    """

    projection: Mapping[str, Tensor]
    prototypes: tuple[Tensor, ...]
    used: tuple[str, ...]


def top_layer(tensors: Mapping[str, Tensor], dim: int) -> TopLayer | None:
    """Return the last layer of a file, if it takes D features."""
    for key, weight_KD in tensors.items():
        name = without_wrappers(key)
        layer = name.removesuffix(".weight")
        if name == layer or not any(layer == one or layer.endswith(f".{one}") for one in TOP_LAYERS):
            continue
        if weight_KD.dim() == 2 and weight_KD.shape[1] == dim and len(weight_KD) > 1 and weight_KD.isfinite().all():
            bias = key.removesuffix("weight") + "bias"
            found = tensors.get(bias)
            bias_K = torch.zeros(len(weight_KD)) if found is None else found.float()
            return TopLayer(weight_KD.float(), bias_K, (key, *([] if found is None else [bias])))
    return None


def prototypes(tensors: Mapping[str, Tensor], dim: int) -> Prototypes | None:
    """Return projection and prototypes of a file, if there are both and they fit each other and D features."""
    heads = sorted((int(match[1] or 0), key) for key in tensors if (match := _PROTOTYPES.search(key)))
    for first in tensors:
        prefix = first.removesuffix("0.weight")
        if (
            first == prefix
            or (prefix and not prefix.endswith("."))
            or not all(prefix + name in tensors for name in _PROJECTION)
        ):
            continue
        hidden, last = tensors[first], tensors[f"{prefix}3.weight"]
        if hidden.dim() != 2 or last.dim() != 2 or hidden.shape[1] != dim or last.shape[1] != len(hidden):
            continue
        keys = [key for _, key in heads if tensors[key].dim() == 2 and tensors[key].shape[1] == len(last)]
        if keys:
            own = {key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)}
            kept = {name: own[name] for name in (*_PROJECTION, "0.bias") if name in own}
            state = {"0.bias": torch.zeros(len(hidden)), "1.num_batches_tracked": torch.tensor(0), **kept}
            vectors = tuple(normalize(tensors[key].float(), dim=1) for key in keys)
            used = (*(prefix + name for name in own), *keys)
            return Prototypes({f"layers.{name}": value for name, value in state.items()}, vectors, used)
    return None
