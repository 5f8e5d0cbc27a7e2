"""The linear classifiers of several frozen stages, trained side by side: what one learns does not touch another.

B batch, V views of an image, D features, C classes, S classifiers.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deepcluster.evaluation.options import LinearOptions
from deepcluster.run.pooling import Pooled


def learning_rate(lr: float, weight_decay: float, step: int) -> float:
    """The rate after `step` steps: lr / √(1 + lr · weight decay · step), as the published script's."""
    return lr / sqrt(1 + lr * weight_decay * step)


class LinearHeads:
    """A linear classifier for each stage, and the SGD that trains it.

    Args:
        widths: D of the rows of each.
        options: rate, momentum, weight decay; and the seed of the first weights, which are uniform within ± 1/√D, as are
            those of `nn.Linear`.
    """

    def __init__(self, widths: dict[Pooled, int], n_classes: int, options: LinearOptions, device: torch.device) -> None:
        self.options = options
        self.heads = {one: _head(width, n_classes, options.seed).to(device) for one, width in widths.items()}
        self._sgd = torch.optim.SGD(
            [value for head in self.heads.values() for value in head.parameters()],
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            fused=device.type == "cuda",
        )

    def step(self, rows: dict[Pooled, Tensor], labels_B: Tensor, step: int) -> Tensor:
        """Learn a batch at the rate of that step; (2, S): of each classifier the sum of losses, and how many are right."""
        for group in self._sgd.param_groups:
            group["lr"] = learning_rate(self.options.lr, self.options.weight_decay, step)
        scores = {one: head(rows[one].float()) for one, head in self.heads.items()}
        losses_S = torch.stack([cross_entropy(scores_BC, labels_B) for scores_BC in scores.values()])
        self._sgd.zero_grad(set_to_none=True)
        losses_S.sum().backward()
        self._sgd.step()
        right_S = torch.stack([(scores_BC.detach().argmax(1) == labels_B).sum() for scores_BC in scores.values()])
        return torch.stack([losses_S.detach() * len(labels_B), right_S.to(losses_S)])

    def probabilities(self, rows: dict[Pooled, Tensor], n_views: int) -> dict[Pooled, Tensor]:
        """Probabilities (B, C) of each classifier for rows (B·V, D), averaged over the views of an image."""
        with torch.no_grad():
            return {
                one: head(rows[one].float()).softmax(1).unflatten(0, (-1, n_views)).mean(1)
                for one, head in self.heads.items()
            }

    def state(self) -> dict[str, Any]:
        """Weights and momentum."""
        return {"heads": [head.state_dict() for head in self.heads.values()], "sgd": self._sgd.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        for head, weights in zip(self.heads.values(), state["heads"], strict=True):
            head.load_state_dict(weights)
        self._sgd.load_state_dict(state["sgd"])


def _head(width: int, n_classes: int, seed: int) -> nn.Linear:
    head: nn.Linear = nn.utils.skip_init(nn.Linear, width, n_classes)
    generator, bound = torch.Generator().manual_seed(seed), 1 / sqrt(width)
    with torch.no_grad():
        for value in head.parameters():
            value.uniform_(-bound, bound, generator=generator)
    return head
