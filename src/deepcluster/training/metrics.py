"""What is measured during an epoch: the mean loss, seconds per step, peak memory."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from deepcluster.core.distributed import Ranks
from deepcluster.core.work import Clock
from deepcluster.training.optim import not_finite

# Steps whose seconds are counted.
STEPS = ("features", "whitening", "clustering", "training")
# Steps between two checks of the loss: at every step, a GPU would have to be waited for.
CHECK_STEPS = 50


def new_clock() -> Clock:
    """Return a clock for a new epoch."""
    return Clock(dict.fromkeys(STEPS, 0.0))


class LossMeter:
    """Mean loss of an epoch, weighted by images. Checks at intervals that it is finite.

    Attributes:
        total, count: sum of this rank's parts of the losses, and number of images of all ranks, as of the last `settle`.
    """

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self.total, self.count = total, count
        self._recent: list[tuple[Tensor, int]] = []

    def add(self, loss: Tensor, images: int, where: Callable[[], str]) -> None:
        """Add this rank's part of the mean loss of a step.

        Args:
            images: images of all ranks in the step.
            where: names the step in an error.
        """
        self._recent.append((loss, images))
        if len(self._recent) >= CHECK_STEPS or loss.device.type == "cpu":
            self.settle(where)

    def settle(self, where: Callable[[], str]) -> float:
        """Add up what is still on the device, and return the mean so far.

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

    def over_ranks(self, ranks: Ranks) -> tuple[float, int]:
        """Return the total of all ranks, and the number of images; after `settle`."""
        return float(ranks.sum(torch.tensor(self.total, dtype=torch.float64))), self.count


def peak_memory_bytes() -> int:
    """Return the peak memory of this process: on the GPU if one is used, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
