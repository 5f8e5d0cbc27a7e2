"""Optimizers of a training step, and the learning rate over the run."""

from collections.abc import Iterable, Sequence
from math import cos, pi
from typing import Any

import torch
from torch import nn

from deepcluster.core.device import Machine
from deepcluster.core.errors import TrainingError
from deepcluster.run.settings import Settings
from deepcluster.training.lars import LARS


def make_optimizer(groups: Iterable[Any], settings: Settings, machine: Machine, *, momentum: float) -> torch.optim.Optimizer:
    """Return SGD with momentum, or LARS, over weights or groups of them. The rate is set at each step."""
    if settings.optimizer == "lars":
        return LARS(groups, lr=settings.lr, momentum=momentum, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        [
            {name: value for name, value in group.items() if name != "adapt"} if isinstance(group, dict) else group
            for group in groups
        ],
        lr=settings.lr,
        momentum=momentum,
        weight_decay=settings.weight_decay,
        fused=machine.device.type in ("cpu", "cuda"),
    )


class Optimizers:
    """The optimizers of a training step, around its backward pass.

    Args:
        optimizers: all optimizers of the step.
        clip_gradient: the gradient over all weights is scaled down to this norm; 0: never.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], clip_gradient: float = 0.0) -> None:
        self.optimizers, self.clip_gradient = optimizers, clip_gradient

    def start(self, rates: Sequence[float]) -> None:
        """Forget old gradients, and set the learning rate of each optimizer."""
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate

    def step(self) -> None:
        """Clip the gradients if requested, and update the weights."""
        if self.clip_gradient:
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            nn.utils.clip_grad_norm_([weight for group in groups for weight in group["params"]], self.clip_gradient)
        for optimizer in self.optimizers:
            optimizer.step()


def learning_factor(settings: Settings, share: float) -> float:
    """Return the factor of the learning rate after a share (0 … 1) of the run: a linear warm-up, then the schedule."""
    warmup = settings.warmup_epochs / settings.epochs
    if share < warmup:
        return share / warmup
    if settings.lr_schedule == "constant":
        return 1.0
    return 0.5 * (1 + cos(pi * (share - warmup) / max(1e-9, 1 - warmup)))


def not_finite(what: str, where: str) -> TrainingError:
    """Return the error of training that has diverged, with what to try."""
    return TrainingError(
        f"{what} at {where}. Try a lower --lr (a third of it), or --precision fp32; the last good state is kept"
    )
