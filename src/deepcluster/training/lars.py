"""LARS: layer-wise adaptive rates, for batches of thousands (You, Gitman, Ginsburg 2017, arXiv 1708.03888).

N weights (tensors) of a group.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step in each layer is proportional to the norm of the layer's weights (algorithm 1).

    For weights w of two dimensions or more, with gradient g and buffer v:

        local = trust |w| / (|g| + weight_decay |w|), or 1 where |w| or |g| is 0
        v = momentum v + lr local (g + weight_decay w)
        w = w - v

    Other weights, and groups with `adapt` False, have local = 1: plain SGD. No step waits for the GPU.

    Args:
        params: weights, or groups of them, as for other optimizers.
        lr: global rate, the paper's gamma.
        momentum: factor of the last step.
        weight_decay: beta in the paper.
        trust: eta in the paper, the share of its norm by which a layer changes in a step of rate 1.
        adapt: True to adapt the rate of each layer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": adapt}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; return the loss of `closure`, which recomputes the gradients, if there is one."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            layers = [weight for weight in weights if group["adapt"] and weight.ndim > 1]
            others = [weight for weight in weights if not (group["adapt"] and weight.ndim > 1)]
            if layers:
                self._move(layers, group, _local_rates(layers, group["trust"], group["weight_decay"]))
            if others:
                self._move(others, group, None)
        return loss

    def _move(self, weights: list[Tensor], group: dict[str, Any], local_N: Tensor | None) -> None:
        """Update the weights and their buffers."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        steps = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        torch._foreach_mul_(steps, group["lr"])
        if local_N is not None:
            torch._foreach_mul_(steps, list(local_N.unbind()))
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, steps)
        torch._foreach_sub_(weights, buffers)


def _local_rates(layers: list[Tensor], trust: float, weight_decay: float) -> Tensor:
    """Return the factor (N,) of each layer's rate, on its device."""
    lengths_N = torch.stack(torch._foreach_norm(layers))
    steep_N = torch.stack(torch._foreach_norm([layer.grad for layer in layers if layer.grad is not None]))
    local_N = trust * lengths_N / (steep_N + weight_decay * lengths_N)
    return torch.where((lengths_N > 0) & (steep_N > 0), local_N, 1)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable weights in two groups, in the order of the network: those that decay, and those that do not.

    Weights of norms, biases, and other one-dimensional weights (layer scales in ViTs and ConvNeXts) do not decay, and have
    no adapted rate in `LARS`. Other optimizers do not have `adapt`.
    """
    free = {
        id(weight)
        for module in network.modules()
        for name, weight in module.named_parameters(recurse=False)
        if name == "bias" or weight.ndim < 2 or isinstance(module, NORMS)
    }
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    return [
        {"params": [weight for weight in weights if id(weight) not in free], "weight_decay": weight_decay, "adapt": True},
        {"params": [weight for weight in weights if id(weight) in free], "weight_decay": 0.0, "adapt": False},
    ]
