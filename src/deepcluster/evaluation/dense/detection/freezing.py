"""Which weights of a trunk are trained: those between two stages."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepcluster.models.trunk import Trunk


def train_from(trunk: Trunk, fixed_stage: str, stage: str, image_size: int) -> None:
    """Require gradients of those weights on which the map of `stage` depends, but not that of `fixed_stage`.

    Args:
        fixed_stage: no stage if empty.
        image_size: side of an image that the trunk takes.
    """
    trained = _weights_up_to(trunk, stage, image_size)
    fixed = _weights_up_to(trunk, fixed_stage, image_size) if fixed_stage else []
    trunk.requires_grad_(False)
    for weight in trained:
        weight.requires_grad_(all(weight is not one for one in fixed))


def keep_frozen_statistics(network: nn.Module) -> None:
    """Put those BatchNorm layers into eval mode whose weights are not trained: their statistics do not change."""
    for layer in network.modules():
        if isinstance(layer, _BatchNorm) and not any(weight.requires_grad for weight in layer.parameters(recurse=False)):
            layer.eval()


def _weights_up_to(trunk: Trunk, stage: str, image_size: int) -> list[nn.Parameter]:
    """Return the weights on which the map of a stage depends (it has a gradient), without those of the Sobel layer."""
    fixed = set() if trunk.sobel is None else set(trunk.sobel.parameters())
    weights = [weight for weight in trunk.parameters() if weight not in fixed]
    for weight in weights:
        weight.requires_grad_(True)
    like = weights[0]
    with torch.enable_grad():
        blank = torch.zeros(1, 3, image_size, image_size, device=like.device, dtype=like.dtype)
        gradients = torch.autograd.grad(trunk.stage(blank, stage).sum(), weights, allow_unused=True)
    return [weight for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]
