"""A trunk with a linear classifier on it, fine-tuned as one network: the module, one step, and its scores.

B batch, C classes, H and W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepcluster.core.device import Machine
from deepcluster.evaluation.trainer import seeded
from deepcluster.models.heads import ClusterHead
from deepcluster.models.trunk import Trunk, normalise


class Classifier(nn.Module):
    """A trunk with a new head for C classes, as one network: ReLU, then a linear layer (`ClusterHead`) on its device.

    The trunk itself is trained: pass a copy. `seed` is that of the head's weights.
    """

    def __init__(self, trunk: Trunk, n_classes: int, *, seed: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ClusterHead(trunk.dim, n_classes, seed=seed).to(next(trunk.parameters()).device)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return scores (B, C) of normalised images, before any sigmoid or softmax."""
        return self.head(self.trunk(x_BCHW))  # type: ignore[no-any-return]


def step(
    classifier: nn.Module,
    optimizer: torch.optim.Optimizer,
    images_BCHW: Tensor,
    target: Tensor,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    machine: Machine,
    *,
    seed: int,
    clip: float | None = None,
) -> Tensor:
    """Take one step of the optimizer and return the loss before it, a scalar on the device.

    Modules stay in the mode (train or eval) that the caller has put them in. Torch's random state is left as it was.

    Args:
        images_BCHW: uint8.
        target: on the device; second argument of `loss_function`, whose first are the scores (B, C) in float32.
        seed: of the dropout masks: make it a function of (seed, step).
        clip: norm to which the gradient of all weights together is scaled down where it is larger; None: never.
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
    """Return scores (B, C), float32, on the device, of uint8 images, without gradient; leave the classifier in eval mode."""
    classifier.eval()
    with torch.no_grad(), machine.autocast():
        scores_BC: Tensor = classifier(normalise(machine.put(images_BCHW)))
    return scores_BC.float()
