"""Training of a network with a classifier on it, in small: the network, one step, its scores, an order of the images.

What protocols that fine-tune share. Every random draw is a function of seeds that the caller gives: a stop and a resume
change nothing. N images, B batch, C classes, H and W pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
import torch
from torch import Tensor, nn

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError, TrainingError
from deepcluster.models.heads import ClusterHead
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.run.model import Model

Loss = Callable[[Tensor, Tensor], Tensor]
# A loss is looked at this often: at every step a GPU would be waited for.
LOOK_STEPS = 50


class Classifier(nn.Module):
    """A trunk with a new head, as one network: ReLU, then a linear layer (`ClusterHead`).

    The trunk is trained as it is given: give a copy. The head is made on the trunk's device.

    Args:
        n_classes: C.
        seed: of the head's weights.
    """

    def __init__(self, trunk: Trunk, n_classes: int, *, seed: int) -> None:
        super().__init__()
        self.trunk = trunk
        device = next(trunk.parameters()).device
        self.head = ClusterHead(trunk.dim, n_classes, seed=seed).to(device)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scores (B, C) of normalised images, before any sigmoid or softmax."""
        return self.head(self.trunk(x_BCHW))  # type: ignore[no-any-return]


def crop_size(model: Model, asked: int | None) -> int:
    """Side of the crops in pixels: what is asked for, else that of the model.

    Raises:
        InputError: the trunk can't take images of this size.
    """
    size, trunk = asked or model.image_size, model.trunk
    if size == model.image_size:
        return size
    try:
        with torch.no_grad():
            trunk(torch.zeros(1, 3, size, size, device=model.machine.device))
    except RuntimeError:
        reason = "its fully connected layers are made for that" if fully_connected(trunk) else "smaller maps would be empty"
        raise InputError(
            f"image_size={size} does not fit this {trunk.arch}, which takes images of {model.image_size} px ({reason}); "
            f"leave --image-size out, or use {model.image_size}"
        ) from None
    return size


def fully_connected(trunk: Trunk) -> list[nn.Linear]:
    """The trunk's linear layers after its convolutions; a ResNet has none."""
    frozen = set(trunk.convolutions().modules())
    return [module for module in trunk.modules() if isinstance(module, nn.Linear) and module not in frozen]


def make_anew(layers: Sequence[nn.Linear], *, deviation: float, bias: float, seed: int) -> None:
    """Give linear layers normal weights and equal biases, to be trained; a function of the seed, the same on all devices."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        layer.requires_grad_(True)
        with torch.no_grad():
            layer.weight.copy_(torch.empty(layer.weight.shape).normal_(std=deviation, generator=generator))
            layer.bias.fill_(bias)


def order_of(n: int, seed: int, epoch: int) -> Tensor:
    """The numbers 0 … n - 1 (N,), int64, in an order that is a function of (n, seed, epoch) alone."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


def seed_of(*numbers: int) -> int:
    """A seed for torch that is a function of some numbers, such as (seed, step); near numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of the processor and of `device` start at `seed`; afterwards both go on as if nothing had been.

    (Of MPS, whose state torch does not fork, the generator stays seeded.)
    """
    gpus = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # torch.manual_seed would reset the generators of all GPUs, which fork_rng does not put back.
        torch.default_generator.manual_seed(seed)
        for number in gpus:
            torch.cuda.default_generators[number].manual_seed(seed)
        if device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


def sgd(
    groups: Iterable[nn.Parameter] | Iterable[dict[str, object]],
    machine: Machine,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> torch.optim.SGD:
    """SGD with momentum of weights, or of groups of them with a rate each."""
    return torch.optim.SGD(
        groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=machine.device.type in ("cpu", "cuda")
    )


def step(
    classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    images_BCHW: Tensor,
    target: Tensor,
    loss_function: Loss,
    machine: Machine,
    *,
    seed: int,
    clip: float | None = None,
) -> Tensor:
    """One step of the optimizer; returns the loss before it, a scalar on the device.

    Modules stay in the mode (train or eval) that the caller has put them in. Torch's random state is left as it was.

    Args:
        images_BCHW: uint8.
        target: on the device; what `loss_function` takes with the scores (B, C), which are float32.
        seed: of the dropout masks: make it a function of (seed, step).
        clip: norm that the gradient of all weights together is scaled down to where it is larger; None: never.
    """
    with seeded(seed, machine.device):
        with machine.autocast():
            scores_BC = classifier(normalise(machine.put(images_BCHW)))
        loss = loss_function(scores_BC.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], clip)
    optimizer.step()
    return loss.detach()


def logits_of(classifier: nn.Module, images_BCHW: Tensor, machine: Machine) -> Tensor:
    """Scores (B, C), float32, on the device, of uint8 images; without gradient. Leaves the classifier in eval mode."""
    classifier.eval()
    with torch.no_grad(), machine.autocast():
        scores_BC: Tensor = classifier(normalise(machine.put(images_BCHW)))
    return scores_BC.float()


@dataclass
class RunningLoss:
    """Mean loss of some steps; looks now and then whether it is still a number.

    Attributes:
        total, count: sum of the losses and their number as of the last `settle`; with them it goes on in another process.
    """

    total: float = 0.0
    count: int = 0
    _recent: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor, where: str) -> None:
        """Add the loss of a step; `where` says which, for the message."""
        self._recent.append(loss)
        if len(self._recent) >= LOOK_STEPS:
            self.settle(where)

    def settle(self, where: str) -> float:
        """Sum up what is still on the device; the mean, 0 without any step.

        Raises:
            TrainingError: a loss is not a finite number.
        """
        for value in map(float, self._recent):
            if not isfinite(value):
                raise TrainingError(f"the loss became {value} at {where}; try a lower learning rate, or --precision fp32")
            self.total += value
            self.count += 1
        self._recent.clear()
        return self.total / max(1, self.count)
