"""Networks fine-tuned one after the other with several learning rates; stopped at any step, they continue exactly.

The views and the schedule are those of SwAV's published script for 1 % and 10 % of ImageNet's labels (facebookresearch/swav,
eval_semisup.py). N images of a loader, M of them, B batch, C classes, T numbers of ranks.
"""

from contextlib import closing
from dataclasses import astuple, dataclass
from math import ceil, inf, isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepcluster.core.work import Advance, no_advance
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.views import TrainingView
from deepcluster.evaluation.classifier import Classifier, logits_of, step
from deepcluster.evaluation.logistic import right_among, top_of
from deepcluster.evaluation.options import SemiSupervisedOptions
from deepcluster.evaluation.trainer import Diverged, Training, fit, seed_of, sgd, shuffled
from deepcluster.run.features import FEATURE_BATCH
from deepcluster.run.model import Model
from deepcluster.run.resumable import ResumableState

# Of 20 epochs, learning rates are multiplied by 0.2 before the 13th and the 17th.
SCALE = (0.08, 1.0)
FALL = 0.2
FALLS_AT_TENTHS = (6, 8)
# With few images an epoch has this many steps, unless its batches would be smaller than this many images.
STEPS_PER_EPOCH, SMALLEST_BATCH = 4, 16


@dataclass(frozen=True)
class Rates:
    """Learning rates at the start."""

    trunk: float
    head: float

    def __str__(self) -> str:
        return f"{self.trunk:g} (trunk) and {self.head:g} (head)"


@dataclass(frozen=True)
class Score:
    """Shares of the images whose class is ranked first, or among the first, and the mean cross-entropy."""

    top_1: float
    top_k: float
    loss: float


DIVERGED = Score(0.0, 0.0, inf)


@dataclass(frozen=True)
class TestSet:
    """Images on which a network is tested: those of a loader at `indices_M`; `labels_N` are of all images of the loader."""

    __test__ = False  # Not a class of tests, whatever pytest makes of its name.
    loader: Loader
    indices_M: Tensor
    labels_N: Tensor


def batches_of(count: int, batch_size: int) -> tuple[int, int]:
    """Return the images per step, and the steps per epoch, for a number of images (2 or more).

    All batches are nearly equally large: a small last batch would have unusual BatchNorm statistics. A last batch of one
    image, which BatchNorm can't take, is left out.
    """
    steps = max(ceil(count / batch_size), min(STEPS_PER_EPOCH, count // SMALLEST_BATCH), 1)
    size = ceil(count / steps)
    return size, count // size + (count % size > 1)


def epochs_of(count: int, options: SemiSupervisedOptions) -> int:
    """Return the passes over a number of images: those of the options, or more where these are fewer than `min_steps`."""
    return max(options.epochs, ceil(options.min_steps / batches_of(count, options.batch_size)[1]))


def steps_of(count: int, options: SemiSupervisedOptions) -> int:
    """Return the number of steps of a training on a number of images."""
    return epochs_of(count, options) * batches_of(count, options.batch_size)[1]


def rate_factor(epoch: int, epochs: int) -> float:
    """Return the factor of the rates in `epoch` (from 0): 1; 0.2 after six tenths of the epochs; 0.04 after eight."""
    return FALL ** sum(10 * epoch >= tenths * epochs for tenths in FALLS_AT_TENTHS)


class Trials:
    """Fine-tunes copies of a network on parts of the labelled images, one after the other, and keeps each one's score.

    Attributes:
        loader, labels_N: of all labelled images.
        finished: score of each finished training, by its name.
        advance: called after each step and each batch of a test; keeps the state.
    """

    def __init__(
        self,
        model: Model,
        options: SemiSupervisedOptions,
        loader: Loader,
        labels_N: Tensor,
        n_classes: int,
        resumable: ResumableState,
    ) -> None:
        self.model, self.options, self.loader, self.n_classes, self.resumable = model, options, loader, n_classes, resumable
        self.labels_N = labels_N.to(model.machine.device)
        kept = resumable.load() or {"finished": {}, "running": None}
        self.finished = {name: Score(*values) for name, values in kept["finished"].items()}
        self.advance: Advance = no_advance
        # The training that was stopped, until it continues (otherwise empty); and the one under way.
        self._stopped: dict[str, Any] = kept["running"] or {}
        self._running: tuple[str, Training[Classifier]] | None = None

    def state(self) -> dict[str, Any]:
        """Return the state from which another process continues."""
        running = {"name": self._running[0], **self._running[1].state()} if self._running else None
        return {"finished": {name: list(astuple(score)) for name, score in self.finished.items()}, "running": running}

    def has_begun(self, name: str) -> bool:
        """Return whether the training `name` is finished, or is the one that was stopped."""
        return name in self.finished or self._stopped.get("name") == name

    def steps_left(self, name: str, count: int) -> int:
        """Return the number of remaining steps of the training `name` on `count` images."""
        done = self._stopped["step"] if self._stopped.get("name") == name else 0
        return 0 if name in self.finished else int(steps_of(count, self.options) - done)

    def score(self, name: str, rates: Rates, indices_M: Tensor, test_set: TestSet, *, scratch: bool) -> Score:
        """Train a network on the labelled images `indices_M` and test it, unless that is done already.

        Args:
            name: of the training, which no other has.
            scratch: from random weights instead of the model's.
        """
        if name not in self.finished:
            training = self.begin(name, rates, len(indices_M), scratch=scratch)
            self._running = name, training
            try:
                self.train(training, rates, indices_M)
                score = self.test(training.network, test_set)
            except Diverged:
                score = DIVERGED
            self.finished[name], self._running, self._stopped = score, None, {}
            if training.step < training.steps:
                self.advance(training.steps - training.step)
        return self.finished[name]

    def begin(self, name: str, rates: Rates, count: int, *, scratch: bool) -> Training[Classifier]:
        """Return a training on `count` images before its first step, or where it was stopped."""
        machine, options = self.model.machine, self.options
        trunk = self.model.new_trunk(options.seed) if scratch else self.model.copy_of_trunk()
        trunk.to(device=machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        classifier = Classifier(trunk, self.n_classes, seed=options.seed)
        groups: list[dict[str, object]] = [
            {"params": [weight for weight in trunk.parameters() if weight.requires_grad], "lr": rates.trunk},
            {"params": list(classifier.head.parameters()), "lr": rates.head},
        ]
        optimizer = sgd(groups, machine, lr=rates.trunk, momentum=options.momentum, weight_decay=options.weight_decay)
        training = Training(classifier, optimizer, steps_of(count, options))
        if self._stopped.get("name") == name:
            training.load(self._stopped)
        return training

    def train(self, training: Training[Classifier], rates: Rates, indices_M: Tensor) -> None:
        """Take the remaining steps.

        Raises:
            Diverged: the loss is not finite.
        """
        options, count = self.options, len(indices_M)
        (size, per_epoch), epochs = batches_of(count, options.batch_size), epochs_of(count, options)
        training.network.train()

        def learn(batch: Batch, number: int) -> dict[str, Tensor]:
            labels_B = self.labels_N[batch.indices_B.to(self.labels_N.device)]
            seed, machine = seed_of(options.seed, *divmod(number, per_epoch)), self.model.machine
            network, optimizer, images = training.network, training.optimizer, batch.images_BCHW
            return {"": step(network, optimizer, images, labels_B, cross_entropy, machine, seed=seed)}

        def rates_at(number: int) -> list[float]:
            factor = rate_factor(number // per_epoch, epochs)
            return [factor * rates.trunk, factor * rates.head]

        view = TrainingView(self.model.image_size, scale=SCALE)
        batches = shuffled(self.loader, view, indices_M, size, seed=options.seed, steps_per_epoch=per_epoch)
        fit(training, batches, learn, steps_per_epoch=per_epoch, rates=rates_at, smallest=2, advance=self.advance)

    def test(self, classifier: Classifier, test_set: TestSet) -> Score:
        """Return the score of a network on the centre crops of a test set."""
        top = top_of(self.n_classes)
        right_T, loss, count = torch.zeros(len(top), dtype=torch.int64), 0.0, 0
        view, labels_N = self.model.view, test_set.labels_N.to(self.model.machine.device)
        with closing(test_set.loader.cluster_views(view, test_set.indices_M, FEATURE_BATCH)) as batches:
            for batch in batches:
                scores_BC = logits_of(classifier, batch.images_BCHW, self.model.machine)
                labels_B = labels_N[batch.indices_B.to(labels_N.device)]
                right_T += right_among(scores_BC, labels_B, top).cpu()
                loss += float(cross_entropy(scores_BC, labels_B, reduction="sum"))
                count += len(labels_B)
                self.advance(0)
        return Score(int(right_T[0]) / count, int(right_T[-1]) / count, loss / count) if isfinite(loss) else DIVERGED
