"""Step 5 in small: optimizers, the rate over the run, and one training step.

B batch, K clusters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deepcluster.config import Settings
from deepcluster.device import Machine
from deepcluster.errors import TrainingError
from deepcluster.models.heads import ClusterHead
from deepcluster.models.trunk import Trunk

# The loss is looked at this often: at every step a GPU would be waited for.
CHECK_STEPS = 50


def trunk_optimizer(trunk: Trunk, settings: Settings, machine: Machine) -> torch.optim.SGD:
    """SGD with momentum over the trunk's trainable weights (the fixed Sobel layer has none)."""
    weights = [weight for weight in trunk.parameters() if weight.requires_grad]
    return _sgd(weights, settings, machine, momentum=settings.momentum)


def head_optimizer(head: ClusterHead, settings: Settings, machine: Machine) -> torch.optim.SGD:
    """SGD of its own for a new head; without momentum in the 2018 release."""
    return _sgd(list(head.parameters()), settings, machine, momentum=settings.head_momentum)


def _sgd(weights: list[nn.Parameter], settings: Settings, machine: Machine, *, momentum: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        weights,
        lr=settings.lr,
        momentum=momentum,
        weight_decay=settings.weight_decay,
        fused=machine.device.type in ("cpu", "cuda"),
    )


def learning_rates(settings: Settings, progress: float) -> tuple[float, float]:
    """The rates of trunk and head after the share `progress` (0 … 1) of the run.

    The head's stays: it is made anew after each clustering, and at a rate near zero it would learn nothing of its labels.
    """
    factor = 0.5 * (1 + cos(pi * progress)) if settings.lr_schedule == "cosine" else 1.0
    return settings.lr * factor, settings.lr if settings.head_lr is None else settings.head_lr


@dataclass
class Learner:
    """The trunk, a head, and their optimizers: takes batches and pseudo-labels."""

    trunk: Trunk
    head: ClusterHead
    optimizers: tuple[torch.optim.SGD, torch.optim.SGD]
    machine: Machine

    def step(self, images_BCHW: Tensor, labels_B: Tensor, *, rates: tuple[float, float], seed: int) -> Tensor:
        """One step of cross-entropy; returns the loss, a scalar on the device.

        Args:
            images_BCHW: normalised, on the device.
            labels_B: pseudo-labels, on the device.
            rates: learning rates of trunk and head at this step.
            seed: of the dropout masks: a function of (run seed, epoch, step), so that a resume draws the same.
        """
        torch.manual_seed(seed)
        with self.machine.autocast():
            scores_BK = self.head(self.trunk(images_BCHW))
        loss = cross_entropy(scores_BK.float(), labels_B)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()


def not_finite(what: str, where: str) -> TrainingError:
    """The error of training that has left the numbers, with what to try."""
    return TrainingError(
        f"{what} at {where}. Try a lower --lr (a third of it), or --precision fp32; the last good state is kept"
    )


class LossMeter:
    """Mean loss of an epoch, weighted by images; looks now and then whether it is still finite.

    Attributes:
        total, count: sum of the losses and number of images, float64 on the CPU as of the last `settle`.
    """

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self.total, self.count = total, count
        self._recent: list[tuple[Tensor, int]] = []

    def add(self, loss: Tensor, images: int, where: Callable[[], str]) -> None:
        """Add a step's loss of so many images; `where` says which step it was, for the message."""
        self._recent.append((loss, images))
        if len(self._recent) >= CHECK_STEPS or loss.device.type == "cpu":
            self.settle(where)

    def settle(self, where: Callable[[], str]) -> float:
        """Sum up what is still on the device; the mean so far.

        Raises:
            TrainingError: a loss is not a finite number.
        """
        for loss, images in self._recent:
            value = float(loss)
            if value - value != 0:
                raise not_finite(f"the loss became {value}", where())
            self.total += value * images
            self.count += images
        self._recent.clear()
        return self.total / max(1, self.count)
