"""Optimizers of a training step, and the learning rate over the run."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from math import cos, pi
from typing import Any

import torch
from torch import nn

from deepcluster.core.device import Machine
from deepcluster.core.errors import TrainingError
from deepcluster.run.settings import Settings
from deepcluster.training.lars import LARS

# Factor of the learning rate where a cosine begins again: what is learned should not be lost (docs/train.md).
RESTART = 1 / 3


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


def learning_factor(settings: Settings, done: float) -> float:
    """Return the factor of the learning rate after `done` epochs: a linear warm-up, then the schedule.

    A cosine falls from 1 to 0 until the first of `lr_restarts`, and from `RESTART` to 0 from each of them to the next, or to
    the end (warm restarts: Loshchilov and Hutter, ICLR 2017, arXiv 1608.03983).
    """
    if settings.lr_schedule == "constant":
        return min(1.0, done / settings.warmup_epochs) if settings.warmup_epochs else 1.0
    starts = (0, *settings.lr_restarts)
    cycle = bisect_right(starts, done) - 1
    length = (*starts, settings.epochs)[cycle + 1] - starts[cycle]
    if cycle:
        return RESTART * 0.5 * (1 + cos(pi * (done - starts[cycle]) / length))
    share, warmup = done / length, settings.warmup_epochs / length
    if share < warmup:
        return share / warmup
    return 0.5 * (1 + cos(pi * (share - warmup) / max(1e-9, 1 - warmup)))


def not_finite(what: str, where: str) -> TrainingError:
    """Return the error of training that has diverged, with what to try."""
    return TrainingError(
        f"{what} at {where}. Try a lower --lr (a third of it), or --precision fp32; the last good state is kept"
    )
