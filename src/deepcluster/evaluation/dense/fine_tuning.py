"""Fine-tuning on images of any size with their annotations: one resumable training, on one process or on several.

B batch, S steps.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError
from deepcluster.core.options import Checked
from deepcluster.core.text import count_of, duration
from deepcluster.evaluation.dense.samples import SampleBatch, Samples
from deepcluster.evaluation.trainer import Training, Weights, fit, seed_of, seeded, sgd
from deepcluster.models.synchronised import synchronise_batch_norms
from deepcluster.run.model import Model, data_key
from deepcluster.run.resumable import ResumableState

# Changes with the format of the state: a state of an older version is not continued.
STATE_FORMAT = 1
REPORTS = 20
MOST_UNREADABLE = 0.1
# After so many steps, the time that all of them take is known; where it is longer than this, it is said.
MEASURED_STEPS, LONG_SECONDS = 5, 3 * 3600


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum, and its learning rate: a linear warm-up, then the rate of a step.

    Attributes:
        steps: S.
        rate: the factor of all learning rates at a step from 0.
        warmup, warmup_from: number of steps of the warm-up, and the factor at its start.
        clip: norm to which the gradient of all weights is scaled down where it is larger; None: never.
    """

    steps: int
    rate: Callable[[int], float]
    momentum: float
    weight_decay: float
    warmup: int = 0
    warmup_from: float = 0.001
    clip: float | None = None

    def factor(self, step: int) -> float:
        """Return the factor of all learning rates at a step."""
        rise = 1.0
        if step < self.warmup:
            rise = self.warmup_from + (1 - self.warmup_from) * step / self.warmup
        return rise * self.rate(step)


def fine_tune(
    model: Model,
    protocol: str,
    network: nn.Module,
    groups: Weights,
    samples: Samples,
    losses: Callable[[SampleBatch], Mapping[str, Tensor]],
    schedule: Schedule,
    options: Checked,
    *,
    batch_size: int,
    seed: int,
    at_once: int | None = None,
    facts: Sequence[object] = (),
) -> tuple[Training[Any], ResumableState]:
    """Train a network, or continue where an earlier call was stopped; all ranks together.

    Args:
        protocol: its name, for the file of the state.
        network: in the mode (train or eval, by module) in which it is trained; on the model's device.
        groups: trainable weights, or groups of them with `lr` each; the rate of a step is `lr` times the schedule's factor.
        losses: of a batch, by name; their sum is minimised. Called under autocast, with torch's random generator seeded by
            the step. With several ranks, each has a part of the batch, and gradients are averaged.
        batch_size: B, images of a step over all ranks.
        at_once: number of images that `losses` gets; gradients are the mean over the batch. All by default.
        facts: what the training depends on beside model, options and images (the annotations).

    Raises:
        Diverged: a loss is not finite.
        InputError: more than 10 % of the images can't be read, or there are more ranks than images in a batch.
        Interrupted: the state is kept; the same call continues to exactly the result it would have had.
    """
    ranks, say = model.work.ranks, model.work.reporter.say
    if ranks.size > batch_size:
        raise InputError(
            f"{ranks.size} processes are more than the {count_of(batch_size, 'image')} of a step: raise --batch-size"
        )
    optimizer = sgd(groups, model.machine, lr=0.0, momentum=schedule.momentum, weight_decay=schedule.weight_decay)
    training = Training(network, optimizer, schedule.steps)
    known = (sorted(options.as_dict().items()), data_key(samples.data.source), *facts)
    resumable = model.resumable(protocol, STATE_FORMAT, *known)
    first_rates = [group["lr"] for group in optimizer.param_groups]
    kept = resumable.load()
    if kept is not None:
        training.load(kept)
        if training.step < training.steps:
            say(f"resuming after {training.where}")
    ranks.check_same("options, images or cache folder", f"{resumable.path.stem[:8]} at {training.where}")
    first, started = training.step, time.monotonic()
    step = _Step(model, training, samples, losses, schedule, batch_size, seed, at_once or batch_size)

    def rates(number: int) -> list[float]:
        return [rate * schedule.factor(number) for rate in first_rates]

    def checked(steps: int) -> None:
        if training.step - first == MEASURED_STEPS:
            seconds = (time.monotonic() - started) / MEASURED_STEPS * (training.steps - training.step)
            if seconds > LONG_SECONDS:
                about = f"{training.steps:,} steps of {count_of(batch_size, 'image')} take about {duration(seconds)}"
                say(f"{about} on this machine; --quick is for a first look, --steps sets their number")
        advance(steps)

    left, reports = training.steps - training.step, (ceil(schedule.steps / REPORTS), step.report)
    with resumable.track("training", left, "steps", state=training.state, together=True) as advance:
        one_epoch: dict[str, Any] = {"steps_per_epoch": schedule.steps, "smallest": 0, "reports": reports}
        fit(training, step.batches, step.learn, rates=rates, advance=checked, **one_epoch)
    if left:
        share_state(training, ranks)
        # The test that follows may be stopped, and of several ranks the first one does it alone.
        if ranks.is_main:
            resumable.save(training.state)
        ranks.barrier()
    return training, resumable


@dataclass
class _Step:
    """What a step of `fine_tune` does, whose arguments these are."""

    model: Model
    training: Training[Any]
    samples: Samples
    losses: Callable[[SampleBatch], Mapping[str, Tensor]]
    schedule: Schedule
    batch_size: int
    seed: int
    at_once: int
    faults: list[InputError] = field(default_factory=list)

    def batches(self, epoch: int, first: int) -> Generator[Any, None, None]:
        """Yield the batches from a step on; all steps are one epoch of `fit`."""
        steps = range(first, self.schedule.steps)
        with closing(self.samples.training(self.model, self.batch_size, seed=self.seed, steps=steps)) as rest:
            try:
                yield from rest
            except InputError as fault:
                self.faults.append(fault)
                yield SampleBatch([], {})

    def learn(self, batch: Any, number: int) -> dict[str, Tensor]:
        """Take a step; return the losses by name, none where nothing was learned."""
        self._check_readable(batch)
        ranks, optimizer, machine = self.model.work.ranks, self.training.optimizer, self.model.machine
        numbers = torch.tensor([len(self.faults), not batch.samples, len(batch.samples)], dtype=torch.int64)
        faulty, missing, count = ranks.sum(numbers).tolist()
        if faulty:  # Of any rank: the others would wait for it.
            raise next(one[0] for one in ranks.gather_objects(self.faults) if one)
        # A rank without images would leave the others waiting in a synchronised BatchNorm.
        if missing:
            return {}
        means: dict[str, Tensor] = {}
        optimizer.zero_grad(set_to_none=True)
        with seeded(seed_of(self.seed, number, ranks.rank), machine.device):
            for part in batch.split(self.at_once):
                with machine.autocast():
                    found = self.losses(part)
                share = len(part.samples) / len(batch.samples)
                # Each image counts the same, also where ranks have different numbers of them.
                weight = len(part.samples) * ranks.size / count
                (weight * torch.stack([*found.values()]).sum()).backward()
                for name, value in found.items():
                    means[name] = means.get(name, 0.0) + share * value.detach()
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        average_gradients(weights, ranks)
        if self.schedule.clip is not None:
            nn.utils.clip_grad_norm_(weights, self.schedule.clip)
        optimizer.step()
        return means

    def _check_readable(self, batch: Any) -> None:
        unreadable, source = self.training.unreadable, self.samples.data.source
        unreadable.update(batch.unreadable)
        if len(unreadable) > MOST_UNREADABLE * len(source):
            index, why = next(iter(unreadable.items()))
            about = f"{len(unreadable):,} of {source.describe()} can't be read"
            self.faults.append(InputError(f"{about}, as {source.name(index)}: {why}"))

    def report(self, means: Mapping[str, float]) -> None:
        """Print the mean losses since the last report."""
        parts = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        each = f"  ({parts})" if len(means) > 1 else ""
        rate = self.training.optimizer.param_groups[0]["lr"]
        self.model.work.reporter.say(f"{self.training.where}  loss {sum(means.values()):.3f}{each}  lr {rate:.3g}")


def set_batch_norms(network: nn.Module, mode: str, ranks: Ranks) -> nn.Module:
    """Return the network, in training mode, with its BatchNorm layers as they are to be trained.

    Args:
        mode: "train": statistics of a batch, of this rank's part of it; "sync": of the batches of all ranks; "auto": "sync"
            where there are several ranks; "frozen": the statistics, scales and biases of the model, which do not change.
    """
    network.train()
    if mode == "frozen":
        for layer in network.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval().requires_grad_(False)
        return network
    return network if mode == "train" else synchronise_batch_norms(network, ranks)


def share_state(training: Training[Any], ranks: Ranks) -> None:
    """Give all ranks the network of the first, and the unreadable images of all.

    Statistics of BatchNorm are of a rank's own images where they are not synchronised.
    """
    if ranks.size == 1:
        return
    for value in training.network.state_dict().values():
        ranks.sum(value if ranks.is_main else value.zero_())
    for found in ranks.gather_objects(training.unreadable):
        training.unreadable.update(found)


def average_gradients(weights: Sequence[Tensor], ranks: Ranks) -> None:
    """Replace the gradient of each weight by its mean over the ranks; a rank without one adds zeros."""
    if ranks.size == 1:
        return
    for weight in weights:
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad = ranks.sum(gradient.div_(ranks.size))
