"""Networks fine-tuned one after the other; stopped at any batch, they go on to the very results they would have had.

N images, M of them, B batch, C classes.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepcluster.core.progress import Meter
from deepcluster.data.loader import Loader
from deepcluster.data.views import ClusterView, TrainingView
from deepcluster.evaluation.learners.fine_tuning import Classifier, logits_of, order_of, seed_of, sgd, step
from deepcluster.evaluation.learners.logistic import right_among
from deepcluster.evaluation.options import SemiSupervisedOptions
from deepcluster.run.features import FEATURE_BATCH
from deepcluster.run.model import Model
from deepcluster.run.resumable import ResumableState

# The views and the schedule of SwAV's published script for 1 % and 10 % of ImageNet's labels (facebookresearch/swav,
# eval_semisup.py): of 20 epochs, rates are multiplied by 0.2 before the 13th and the 17th.
SCALE = (0.08, 1.0)
FALL = 0.2
FALLS_AT_TENTHS = (6, 8)
# Of few images an epoch has this many steps, unless its batches would be smaller than so many images.
STEPS_AN_EPOCH, SMALLEST_BATCH = 4, 16


@dataclass(frozen=True)
class Rates:
    """Learning rates at the start."""

    trunk: float
    head: float


@dataclass(frozen=True)
class Score:
    """Shares of the images whose class is the first, or among the first, and mean cross-entropy; infinite: it diverged."""

    top_1: float
    top_k: float
    loss: float


@dataclass(frozen=True)
class Exam:
    """Images that a network is tested on: those of a loader at `indices_M`.

    Attributes:
        labels_N: of all images of the loader.
    """

    loader: Loader
    indices_M: Tensor
    labels_N: Tensor


def batches_of(count: int, batch_size: int) -> tuple[int, int]:
    """Images a step, and steps an epoch, for so many images (2 or more).

    All batches are nearly as large as each other: a small rest would have odd BatchNorm statistics. A rest of one image,
    of which BatchNorm can't take any, is left out.
    """
    steps = max(ceil(count / batch_size), min(STEPS_AN_EPOCH, count // SMALLEST_BATCH), 1)
    size = ceil(count / steps)
    return size, count // size + (count % size > 1)


def epochs_of(count: int, options: SemiSupervisedOptions) -> int:
    """Passes over so many images: as many as the options say, or more where these are too few steps to learn."""
    return max(options.epochs, ceil(options.min_steps / batches_of(count, options.batch_size)[1]))


def _images_an_epoch(count: int, options: SemiSupervisedOptions) -> int:
    size, steps = batches_of(count, options.batch_size)
    return min(count, size * steps)


def fall_of_rates(epoch: int, epochs: int) -> float:
    """What the rates are multiplied by in `epoch` (from 0): 1; 0.2 after six tenths of the epochs; 0.04 after eight."""
    return FALL ** sum(10 * epoch >= tenths * epochs for tenths in FALLS_AT_TENTHS)


@dataclass
class _Running:
    """A network in training, and the batch that comes next."""

    name: str
    classifier: Classifier
    optimizer: torch.optim.SGD
    epoch: int = 0
    batch: int = 0
    diverged: bool = False

    def state(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "diverged": self.diverged,
        }

    def go_on(self, state: dict[str, Any]) -> None:
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.batch, self.diverged = state["epoch"], state["batch"], state["diverged"]


class Trainings:
    """Trains copies of a network on parts of the labelled images and keeps how well each did.

    Args:
        loader: of the labelled images.
        labels_N: of all of these.
        unfinished: where the state is kept, and where an earlier one may be.

    Attributes:
        finished: what each training gave that is done, by its name.
        progress: told of every image that is trained on.
    """

    def __init__(
        self,
        model: Model,
        options: SemiSupervisedOptions,
        loader: Loader,
        labels_N: Tensor,
        n_classes: int,
        unfinished: ResumableState,
    ) -> None:
        self.model, self.options, self.loader = model, options, loader
        self.labels_N, self.n_classes, self.unfinished = labels_N.to(model.machine.device), n_classes, unfinished
        self.progress = Meter()
        self._earlier: dict[str, Any] = unfinished.load() or {"finished": {}, "running": None}
        self.finished = {name: Score(*values) for name, values in self._earlier["finished"].items()}
        self._running: _Running | None = None

    def state(self) -> dict[str, Any]:
        """From which another process goes on."""
        return {
            "finished": {name: [one.top_1, one.top_k, one.loss] for name, one in self.finished.items()},
            "running": None if self._running is None else self._running.state(),
        }

    def check(self) -> None:
        """Keep the state where it is time; asked to stop, keep it and raise `Interrupted`."""
        self.unfinished.check(self.state)

    def begun(self, name: str) -> bool:
        """Whether the training `name` is done, or is the one that was stopped."""
        earlier = self._earlier["running"]
        return name in self.finished or (earlier is not None and earlier["name"] == name)

    def images_left(self, name: str, count: int) -> int:
        """How many images the training `name` on `count` of them has still to look at."""
        if name in self.finished:
            return 0
        each, size = _images_an_epoch(count, self.options), batches_of(count, self.options.batch_size)[0]
        done = 0
        if self.begun(name):
            done = self._earlier["running"]["epoch"] * each + min(each, self._earlier["running"]["batch"] * size)
        return epochs_of(count, self.options) * each - done

    def score(self, name: str, rates: Rates, indices_M: Tensor, exam: Exam, *, scratch: bool) -> Score:
        """Train a network on the labelled images `indices_M` and test it; what is done already is not done again.

        Args:
            name: of the training: nothing else may have it.
            scratch: from random weights, not from the model's.
        """
        if name not in self.finished:
            self._running = self._begun(name, rates, scratch)
            self._learn(self._running, rates, indices_M)
            score = Score(0.0, 0.0, inf) if self._running.diverged else self._examined(self._running.classifier, exam)
            self.finished[name], self._running, self._earlier["running"] = score, None, None
        return self.finished[name]

    def _begun(self, name: str, rates: Rates, scratch: bool) -> _Running:
        machine, options = self.model.machine, self.options
        trunk = self.model.new_trunk(options.seed) if scratch else self.model.copy_of_trunk()
        trunk.to(device=machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        classifier = Classifier(trunk, self.n_classes, seed=options.seed)
        groups: list[dict[str, object]] = [
            {"params": [weight for weight in trunk.parameters() if weight.requires_grad], "lr": rates.trunk},
            {"params": list(classifier.head.parameters()), "lr": rates.head},
        ]
        optimizer = sgd(groups, machine, lr=rates.trunk, momentum=options.momentum, weight_decay=options.weight_decay)
        running, earlier = _Running(name, classifier, optimizer), self._earlier["running"]
        if earlier is not None and earlier["name"] == name:
            running.go_on(earlier)
        return running

    def _learn(self, running: _Running, rates: Rates, indices_M: Tensor) -> None:
        epochs = epochs_of(len(indices_M), self.options)
        while running.epoch < epochs and not running.diverged:
            fall = fall_of_rates(running.epoch, epochs)
            for group, rate in zip(running.optimizer.param_groups, (rates.trunk, rates.head), strict=True):
                group["lr"] = fall * rate
            running.diverged = not isfinite(self._epoch(running, indices_M))
            running.epoch, running.batch = running.epoch + 1, 0
        if running.diverged:
            self.progress((epochs - running.epoch) * _images_an_epoch(len(indices_M), self.options))

    def _epoch(self, running: _Running, indices_M: Tensor) -> float:
        """The rest of an epoch; the loss of its last step, which is no number once any has not been."""
        seed, epoch = self.options.seed, running.epoch
        view = TrainingView(self.model.image_size, scale=SCALE)
        order_M = indices_M[order_of(len(indices_M), seed, epoch)]
        order_M = order_M[: _images_an_epoch(len(indices_M), self.options)]
        size, _ = batches_of(len(indices_M), self.options.batch_size)
        views = self.loader.training_views(view, order_M, size, seed=seed, epoch=epoch, first_batch=running.batch)
        running.classifier.train()
        loss = torch.zeros(())
        with closing(views) as batches:
            for batch in batches:
                if len(batch.indices_B) > 1:  # an image may have become unreadable
                    loss = step(
                        running.classifier,
                        running.optimizer,
                        batch.images_BCHW,
                        self.labels_N[batch.indices_B.to(self.labels_N.device)],
                        cross_entropy,
                        self.model.machine,
                        seed=seed_of(seed, epoch, running.batch),
                    )
                running.batch += 1
                self.progress(len(batch.indices_B))
                self.check()
        return float(loss)

    def _examined(self, classifier: Classifier, exam: Exam) -> Score:
        top = top_of(self.n_classes)
        right, loss, count = [0] * len(top), 0.0, 0
        view, labels_N = ClusterView(self.model.image_size), exam.labels_N.to(self.model.machine.device)
        with closing(exam.loader.cluster_views(view, exam.indices_M, FEATURE_BATCH)) as batches:
            for batch in batches:
                scores_BC = logits_of(classifier, batch.images_BCHW, self.model.machine)
                labels_B = labels_N[batch.indices_B.to(labels_N.device)]
                right = [sum(both) for both in zip(right, right_among(scores_BC, labels_B, top).tolist(), strict=True)]
                loss += float(cross_entropy(scores_BC, labels_B, reduction="sum"))
                count += len(labels_B)
                self.check()
        if not isfinite(loss):
            return Score(0.0, 0.0, inf)
        return Score(right[0] / count, right[-1] / count, loss / count)


def top_of(n_classes: int) -> Sequence[int]:
    """Among how many of the highest scores the right class is looked for: 1 and 5, or all classes where there are fewer."""
    return sorted({1, min(5, n_classes)})
