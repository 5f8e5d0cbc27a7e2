"""The trainer that protocols share: it may be stopped after any step, and continues to exactly the result of a whole run.

Every random draw is a function of seeds and of the number of the step, so nothing but the `Training` needs to be kept.
M images to train on.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from deepcluster.core.device import Machine
from deepcluster.core.errors import TrainingError
from deepcluster.core.text import duration
from deepcluster.core.work import Advance, no_advance
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.sources import ImageSource
from deepcluster.data.survey import check_unreadable
from deepcluster.data.views import View
from deepcluster.evaluation.options import LinearOptions, VocClassificationOptions
from deepcluster.run.model import Model
from deepcluster.run.resumable import ResumableState

# Losses are read from the device this often: reading at every step would make a GPU wait.
CHECK_STEPS = 50

# Batches of an epoch, from one of them on.
Batches = Callable[[int, int], Generator[Batch, None, None]]
# One step on a batch, given the number of the step: named values (scalars on the device), none if nothing was learned.
Learn = Callable[[Batch, int], Mapping[str, Tensor]]

# The trainable weights, or groups of them as torch's optimizers take them.
Weights = Iterable[nn.Parameter] | Iterable[dict[str, object]]

Network = TypeVar("Network", bound=nn.Module)


class Diverged(TrainingError):
    """A loss is no longer a finite number.

    Attributes:
        name: of the loss; empty where there is only one.
    """

    def __init__(self, name: str, value: float, where: str) -> None:
        loss = f"the loss of {name}" if name else "the loss"
        super().__init__(f"{loss} became {value} at {where}; try a lower learning rate, or --precision fp32")
        self.name = name


@dataclass
class Means:
    """Means of named values over `count` steps, checked now and then to be finite; `totals` are as of the last `settle`."""

    totals: dict[str, float] = field(default_factory=dict)
    count: int = 0
    _recent: list[Mapping[str, Tensor]] = field(default_factory=list)

    def add(self, values: Mapping[str, Tensor], where: str) -> None:
        """Add the values of a step; `where` names it in the error message."""
        self._recent.append(values)
        if len(self._recent) >= CHECK_STEPS:
            self.settle(where)

    def settle(self, where: str) -> dict[str, float]:
        """Sum the values that are still on the device, and return the mean of each.

        Raises:
            Diverged: a value is not finite.
        """
        recent, self._recent = self._recent, []
        for values in recent:
            for name, value in zip(values, torch.stack([*values.values()]).tolist(), strict=True):
                if not isfinite(value):
                    raise Diverged(name, value, where)
                self.totals[name] = self.totals.get(name, 0.0) + value
            self.count += 1
        return {name: total / self.count for name, total in self.totals.items()}


@dataclass
class Training(Generic[Network]):
    """A network in training: all that its remaining steps depend on.

    Attributes:
        optimizer: of the network's trainable weights.
        steps, step: number of steps in all, and of those taken.
        means: of the values that steps returned since the last report.
        unreadable: why images can't be read, by index.
    """

    network: Network
    optimizer: torch.optim.Optimizer
    steps: int
    step: int = 0
    means: Means = field(default_factory=Means)
    unreadable: dict[int, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The place in the training, for messages."""
        return f"step {self.step:,}/{self.steps:,}"

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load` continues."""
        self.means.settle(self.where)
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "totals": dict(self.means.totals),
            "count": self.means.count,
            "unreadable": dict(self.unreadable),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.unreadable = state["step"], state["unreadable"]
        self.means = Means(state["totals"], state["count"])


def fit(
    training: Training[Any],
    batches: Batches,
    learn: Learn,
    *,
    steps_per_epoch: int,
    rates: Callable[[int], Sequence[float]],
    smallest: int = 1,
    reports: tuple[int, Callable[[Mapping[str, float]], None]] | None = None,
    advance: Advance = no_advance,
) -> None:
    """Take the remaining steps of a training.

    Args:
        batches: yields the batches of an epoch from one of them on; `steps_per_epoch` of them in a whole epoch.
        learn: takes one step on a batch; not called where fewer than `smallest` of its images can be read.
        rates: the learning rate of each parameter group at a step.
        reports: after how many steps to call what, with the means of what `learn` returned since the last call.
        advance: called after each step; may keep the state of the training, and may raise to stop.

    Raises:
        Diverged: a loss is not finite.
    """
    while training.step < training.steps:
        epoch, first = divmod(training.step, steps_per_epoch)
        with closing(batches(epoch, first)) as rest:
            for batch in islice(rest, training.steps - training.step):
                for group, rate in zip(training.optimizer.param_groups, rates(training.step), strict=True):
                    group["lr"] = rate
                values = learn(batch, training.step) if len(batch.indices_B) >= smallest else {}
                training.step += 1
                if values:
                    training.means.add(values, training.where)
                if reports is not None and training.step % reports[0] == 0:
                    reports[1](training.means.settle(training.where))
                    training.means = Means()
                advance(1)
    training.means.settle(training.where)


def fit_source(
    model: Model,
    training: Training[Any],
    source: ImageSource,
    view: View,
    learn: Learn,
    options: LinearOptions | VocClassificationOptions,
    *,
    rates: Callable[[int], Sequence[float]],
    resumable: ResumableState,
    reports: tuple[int, Callable[[Mapping[str, float]], str]],
    reduce_to: int | None = None,
) -> None:
    """Train on random views of all images of a source, or continue where an earlier call was stopped.

    Args:
        options: batch size and seed.
        reports: after how many steps to put their means into what words; printed with the learning rate and the time.
        reduce_to: shorter side to which photos are reduced as they are decoded; that of the run by default.

    Raises:
        Diverged: a loss is not finite.
        InputError: more than 10 % of the images can't be read.
    """
    kept, say = resumable.load(), model.work.reporter.say
    if kept is not None:
        training.load(kept)
        say(f"resuming after {training.where}")
    left, per_epoch = training.steps - training.step, -(-len(source) // options.batch_size)
    if not left:
        return
    with (
        model.loader(source, reduce_to=reduce_to) as loader,
        resumable.track("training", left, "steps", state=training.state) as advance,
    ):
        loader.unreadable.update(training.unreadable)
        training.unreadable = loader.unreadable
        started, waited = time.perf_counter(), loader.wait_seconds

        def report(means: Mapping[str, float]) -> None:
            nonlocal started, waited
            now, rate = time.perf_counter(), training.optimizer.param_groups[0]["lr"]
            wait = (loader.wait_seconds - waited) / max(now - started, 1e-9)
            say(f"{reports[1](means)}  lr {rate:.4g}  {duration(now - started)}  data-wait {wait:.0%}")
            started, waited = now, loader.wait_seconds

        def checked_advance(steps: int) -> None:
            check_unreadable(loader, len(source))
            advance(steps)

        every_N, size, n = torch.arange(len(source)), options.batch_size, per_epoch
        batches = shuffled(loader, view, every_N, size, seed=options.seed, steps_per_epoch=n)
        each = reports[0], report
        fit(training, batches, learn, steps_per_epoch=n, rates=rates, reports=each, advance=checked_advance)


def shuffled(loader: Loader, view: View, indices_M: Tensor, batch_size: int, *, seed: int, steps_per_epoch: int) -> Batches:
    """Return the batches of random views of some images of a loader, in a new order each epoch."""

    def batches(epoch: int, first_batch: int) -> Generator[Batch, None, None]:
        order_M = indices_M[order_of(len(indices_M), seed, epoch)][: batch_size * steps_per_epoch]
        return loader.training_views(view, order_M, batch_size, seed=seed, epoch=epoch, first_batch=first_batch)

    return batches


def order_of(n: int, seed: int, epoch: int) -> Tensor:
    """Return the numbers 0 … n - 1 (N,), int64, in an order that is a function of the arguments."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


def seed_of(*numbers: int) -> int:
    """Return a seed for torch that is a function of numbers such as (seed, step); near numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random generators of the CPU and of `device` inside; restore them afterwards.

    (The generator of MPS, whose state torch does not fork, stays seeded.)
    """
    gpus = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # torch.manual_seed would reset the generators of all GPUs, which fork_rng does not restore.
        torch.default_generator.manual_seed(seed)
        for number in gpus:
            torch.cuda.default_generators[number].manual_seed(seed)
        if device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


def sgd(groups: Weights, machine: Machine, *, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """Return SGD with momentum for weights, or for groups of weights with a learning rate each."""
    fused = machine.device.type in ("cpu", "cuda")
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
