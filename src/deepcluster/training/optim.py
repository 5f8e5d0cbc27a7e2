"""Step 5 in small: optimizers, the rate over the run, and one training step.

B batch, D features, K clusters.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from deepcluster.core.device import Machine
from deepcluster.core.distributed import all_reduce, data_parallel, world_size
from deepcluster.core.errors import TrainingError
from deepcluster.models.heads import ClusterHead, Head, HierarchicalHead, apart, is_apart
from deepcluster.models.trunk import FEATURES, Trunk
from deepcluster.run.settings import Settings
from deepcluster.training.lars import LARS

# The loss is looked at this often: at every step a GPU would be waited for.
CHECK_STEPS = 50


def make_optimizer(groups: Iterable[Any], settings: Settings, machine: Machine, *, momentum: float) -> torch.optim.Optimizer:
    """SGD with momentum, or LARS, over weights or groups of them; the rate is set at each step."""
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


def trunk_optimizer(trunk: Trunk, settings: Settings, machine: Machine) -> torch.optim.Optimizer:
    """That of the trunk's trainable weights (the fixed Sobel layer has none)."""
    weights = [weight for weight in trunk.parameters() if weight.requires_grad]
    return make_optimizer(weights, settings, machine, momentum=settings.momentum)


def head_optimizer(head: nn.Module, settings: Settings, machine: Machine) -> torch.optim.Optimizer:
    """That of a new head; without momentum in the 2018 release."""
    return make_optimizer(list(head.parameters()), settings, machine, momentum=settings.head_momentum)


def optimizer_state(optimizer: torch.optim.Optimizer, head: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of a head's optimizer: of weights that all ranks have, as torch saves it, and of the rest, by name."""
    whole, names = optimizer.state_dict(), [name for name, _ in head.named_parameters()]
    own = {names[number]: state for number, state in whole["state"].items() if is_apart(names[number])}
    shared = {number: state for number, state in whole["state"].items() if not is_apart(names[number])}
    return {**whole, "state": shared}, own


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, head: nn.Module, shared: dict[str, Any], own: dict[str, Any]
) -> None:
    """Take up what `optimizer_state` gave: what is of weights that are on this rank now. Those of all ranks come first."""
    names = [name for name, _ in head.named_parameters()]
    here = {number: own[name] for number, name in enumerate(names) if name in own}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {**shared["state"], **here}, "param_groups": groups})


def learning_factor(settings: Settings, share: float) -> float:
    """What the learning rate is multiplied by after a share (0 … 1) of the run: a linear rise, then the schedule."""
    warmup = settings.warmup_epochs / settings.epochs
    if share < warmup:
        return share / warmup
    if settings.lr_schedule == "constant":
        return 1.0
    return 0.5 * (1 + cos(pi * (share - warmup) / max(1e-9, 1 - warmup)))


class TrunkRows(nn.Module):
    """A trunk that gives features, and rows of another stage of the same pass, if one is named."""

    def __init__(self, trunk: Trunk, stage: str = FEATURES) -> None:
        super().__init__()
        self.trunk, self.stage = trunk, stage

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D), and the rows (B, C) of the stage, averaged over its map."""
        if self.stage == FEATURES:
            features_BD = self.trunk(images_BCHW)
            return features_BD, features_BD
        maps = self.trunk.maps(images_BCHW, (self.stage, FEATURES))
        return maps[FEATURES].flatten(1), maps[self.stage].mean(dim=(2, 3))


class HeadLoss(nn.Module):
    """A head that gives the loss of each image, as gradients over ranks need it: by its `forward`."""

    def __init__(self, head: ClusterHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Losses (B,), float32."""
        return self.head.loss(features_BD, labels_B)


def prepared(network: nn.Module, machine: Machine, *, compiled: bool) -> nn.Module:
    """The network as it is trained: compiled where it is asked for, its gradients averaged over the ranks."""
    return data_parallel(torch.compile(network) if compiled else network, machine.device)  # type: ignore[arg-type]


def descend(
    loss: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    rates: Sequence[float],
    *,
    longest_gradient: float = 0.0,
    own: Sequence[Tensor] | None = None,
) -> None:
    """Go down the gradient of a rank's part of the mean loss: with the gradients of all ranks, at these rates.

    Args:
        longest_gradient: the gradient over all weights is scaled down to this length; 0: never.
        own: weights of the optimizers that are on this rank alone, where some rank has such.
    """
    for optimizer, rate in zip(optimizers, rates, strict=True):
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = rate
    # Gradients are averaged over the ranks, and should be added up.
    (loss * world_size()).backward()
    for weight in own or ():
        if weight.grad is not None:  # No average was made of it.
            weight.grad /= world_size()
    if longest_gradient:
        weights = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
        nn.utils.clip_grads_with_norm_(weights, longest_gradient, gradient_length(weights, own))
    for optimizer in optimizers:
        optimizer.step()


def gradient_length(weights: Sequence[Tensor], own: Sequence[Tensor] | None = None) -> Tensor:
    """The length of the gradient over all weights: those that all ranks have, and each rank's own."""
    apart = {id(weight) for weight in own or ()}
    gradients = [weight.grad for weight in weights if weight.grad is not None and id(weight) not in apart]
    length = nn.utils.get_total_norm(gradients)
    if own is None:
        return length
    of_own = nn.utils.get_total_norm([weight.grad for weight in own if weight.grad is not None])
    return (length.square() + all_reduce(of_own.to(length).square())).sqrt()


@dataclass
class Learner:
    """The trunk, a head, and their optimizers: takes batches and pseudo-labels (the method of 2018).

    Attributes:
        network: the trunk as `TrunkRows`, prepared for training.
        longest_gradient: 0: any.
    """

    network: nn.Module
    head: Head
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    machine: Machine
    longest_gradient: float = 0.0

    def __post_init__(self) -> None:
        shared = self.head.supers if isinstance(self.head, HierarchicalHead) else self.head
        self._losses_of_shared = data_parallel(HeadLoss(shared), self.machine.device)

    def step(
        self, images_BCHW: Tensor, labels_B: Tensor, *, rates: tuple[float, float], seed: int, total: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step of cross-entropy.

        Args:
            images_BCHW: normalised, on the device.
            labels_B: pseudo-labels, on the device; -1: the image counts for nothing.
            rates: learning rates of trunk and head at this step.
            seed: of the dropout masks: a function of (run seed, epoch, step), so that a resume draws the same.
            total: images of all ranks; those that are here by default.

        Returns:
            this rank's part of the mean loss, a scalar on the device; and the rows of the network's stage.
        """
        torch.manual_seed(seed)
        with self.machine.autocast():
            features_BD, rows_BC = self.network(images_BCHW)
            losses_B = self._losses(features_BD, labels_B.clamp(min=0))
        loss = (losses_B * (labels_B >= 0)).sum() / (total or len(labels_B))
        descend(loss, self.optimizers, rates, longest_gradient=self.longest_gradient, own=self._own())
        return loss.detach(), rows_BC.detach()

    def _losses(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Of the head that all ranks have, and of its layers that are on one rank each."""
        if not isinstance(self.head, HierarchicalHead):
            return self._losses_of_shared(features_BD, labels_B)  # type: ignore[no-any-return]
        # In this order on all ranks: what they send each other backward is then in one order, too.
        losses_B = self._losses_of_shared(features_BD, self.head.super_of_cluster_K[labels_B])
        return losses_B + self.head.loss_within(features_BD, labels_B)  # type: ignore[no-any-return]

    def head_state(self) -> dict[str, Any]:
        """Head and optimizer as all ranks have them, and as `parts` what is on this one alone."""
        weights, own = apart(self.head.state_dict())
        optimizer, momenta = optimizer_state(self.optimizers[1], self.head)
        parts = {"parts": {"head": own, "head_optimizer": momenta}} if isinstance(self.head, HierarchicalHead) else {}
        return {"head": weights, "head_optimizer": optimizer, **parts}

    def load_head_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `head_state` gave; of the `parts` of all ranks those that are on this one now."""
        parts, here = state.get("parts", {}), self.head.state_dict()
        own = {name: values for name, values in parts.get("head", {}).items() if name in here}
        self.head.load_state_dict({**state["head"], **own})
        load_optimizer_state(self.optimizers[1], self.head, state["head_optimizer"], parts.get("head_optimizer", {}))

    def _own(self) -> list[Tensor] | None:
        return list(self.head.layers.parameters()) if isinstance(self.head, HierarchicalHead) else None


def not_finite(what: str, where: str) -> TrainingError:
    """The error of training that has left the numbers, with what to try."""
    return TrainingError(
        f"{what} at {where}. Try a lower --lr (a third of it), or --precision fp32; the last good state is kept"
    )


class LossMeter:
    """Mean loss of an epoch, weighted by images; looks now and then whether it is still finite.

    Attributes:
        total, count: sum of this rank's parts of the losses, and number of images of all ranks, as of the last `settle`.
    """

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self.total, self.count = total, count
        self._recent: list[tuple[Tensor, int]] = []

    def add(self, loss: Tensor, images: int, where: Callable[[], str]) -> None:
        """Add a rank's part of the mean loss of so many images; `where` says which step it was, for the message."""
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

    def over_ranks(self) -> tuple[float, int]:
        """Total of all ranks, and the number of images; after `settle`."""
        return float(all_reduce(torch.tensor(self.total, dtype=torch.float64))), self.count
