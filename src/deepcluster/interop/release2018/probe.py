"""The linear classifier of `eval_linear.py`: its steps, its tests, its logs and its checkpoints.

B batch, V views of an image, C classes.
"""

import hashlib
import pickle
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepcluster.core.errors import InputError
from deepcluster.core.files import save_tensors, written_beside
from deepcluster.data.loader import Batch
from deepcluster.data.survey import check_unreadable
from deepcluster.data.views import ShiftedView, TenCrops
from deepcluster.evaluation.datasets.labelled import TrainVal
from deepcluster.evaluation.linear import CROPS, LinearHeads, learning_rate
from deepcluster.evaluation.logistic import right_among, top_of
from deepcluster.evaluation.options import LinearOptions
from deepcluster.evaluation.trainer import Diverged, Training, fit_source, sgd
from deepcluster.interop.release2018.common import Meters, say, state_dict_of
from deepcluster.interop.release2018_files import PROTOCOL
from deepcluster.run.features import FEATURE_BATCH, Pooled
from deepcluster.run.model import Model, data_key

LINE_BATCHES = 100
LOSS, PREC1, PREC5 = LOGS = ("loss_log", "prec1", "prec5")
# The centre crop among the ten, whose loss counts.
CENTRE = 4


@dataclass
class Logged(Training[LinearHeads]):
    """A training, and what each test has measured so far."""

    logs: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in LOGS})

    @property
    def tests(self) -> int:
        """Number of epochs after which the classifier was tested."""
        return len(self.logs[LOSS])

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values from which `load` continues."""
        return super().state() | {"logs": {name: list(values) for name, values in self.logs.items()}}

    def load(self, state: Any) -> None:
        """Continue from what `state` returned."""
        super().load(state)
        self.logs = state["logs"]


class Probe:
    """The classifier on one stage of a model, in training.

    Args:
        folder: of the logs and the checkpoints.
        opened: closes the loader of the validation images.
    """

    def __init__(
        self, model: Model, parts: TrainVal, options: LinearOptions, folder: Path, *, verbose: bool, opened: ExitStack
    ) -> None:
        self.model, self.parts, self.options, self.folder, self.verbose = model, parts, options, folder, verbose
        self.input, self.top = Pooled(options.stages, "pooled"), top_of(len(parts.train.class_names))
        self.val_loader = opened.enter_context(model.loader(parts.val.source))
        self.device, self.meters = model.machine.device, Meters()
        heads = LinearHeads(model.widths([self.input]), len(parts.train.class_names), seed=options.seed).to(self.device)
        rules = {"lr": options.lr, "momentum": options.momentum, "weight_decay": options.weight_decay}
        optimizer = sgd(heads.parameters(), model.machine, **rules)
        self.steps_per_epoch = -(-len(parts.train.source) // options.batch_size)
        self.training = Logged(heads, optimizer, options.epochs * self.steps_per_epoch)
        self.weights = state_dict_of(model)
        self.labels = [part.labels_N.to(self.device) for part in (parts.train, parts.val)]
        keys = [(data_key(part.source), _digest(part.labels_N)) for part in (parts.train, parts.val)]
        facts = sorted(options.as_dict().items()), keys, model.image_size, model.settings.reduce_to
        self.resumable = model.resumable("release2018 eval_linear 1", str(folder.resolve()), *facts)

    def run(self) -> None:
        """Take the remaining steps, with a test after each epoch."""
        view, source = ShiftedView(self.model.image_size), self.parts.train.source
        (self.folder / "log").mkdir(exist_ok=True)

        def rates(number: int) -> list[float]:
            return [learning_rate(self.options.lr, self.options.weight_decay, number)]

        def line(means: object) -> str:
            return ""  # The lines of 2018 are printed by the steps.

        reports = self.steps_per_epoch, line
        try:
            fit_source(
                self.model,
                self.training,
                source,
                view,
                self.learn,
                self.options,
                rates=rates,
                resumable=self.resumable,
                reports=reports,
            )
        except Diverged:
            self.resumable.done()
            where = f"{self.training.where} of {self.options.stages}"
            raise InputError(f"the loss is not finite at {where}: use a lower --lr than {self.options.lr:g}") from None
        self.test(self.options.epochs)
        self.resumable.done()

    def learn(self, batch: Batch, number: int) -> dict[str, Tensor]:
        """Take a step on a batch; before the first of an epoch, test the classifier of the one before."""
        epoch, place = divmod(number, self.steps_per_epoch)
        self.test(epoch)
        if place == 0 and epoch:
            self.meters = Meters()
        started = time.perf_counter()
        labels_B = self.labels[0][batch.indices_B.to(self.device)]
        scores_BC = self.training.network(self.rows(batch.images_BCHW))[self.input]
        loss = cross_entropy(scores_BC, labels_B)
        self.training.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.training.optimizer.step()
        self.meters.add(self.measured(loss.detach(), scores_BC.detach(), labels_B), len(labels_B), started=started)
        if self.verbose and place % LINE_BATCHES == 0:
            say(f"Epoch: [{epoch}][{place}/{self.steps_per_epoch}]\t{self.meters.line(data=True)}")
        return {"": loss.detach()}

    def rows(self, images_BCHW: Tensor) -> dict[Pooled, Tensor]:
        """Return rows of the stage, a limited number of images at a time."""
        parts = [self.model.extract(some, [self.input])[self.input] for some in images_BCHW.split(FEATURE_BATCH)]
        return {self.input: torch.cat(parts)}

    def measured(self, loss: Tensor, scores_BC: Tensor, labels_B: Tensor) -> dict[str, "float | Tensor"]:
        """Return what lines show of a batch: the loss, and the shares of right answers in percent."""
        shares = 100 * right_among(scores_BC, labels_B, self.top) / len(labels_B)
        return {"Loss": loss, "Prec@1": shares[0], "Prec@5": shares[-1]}

    def test(self, epochs: int) -> None:
        """Test the classifier unless it was after so many epochs; write the logs and a checkpoint."""
        if self.training.tests >= epochs:
            return
        images, size = self.parts.val.source, max(1, self.options.batch_size // 2)
        all_N, view, n_batches = torch.arange(len(images)), self.model.view, -(-len(images) // size)
        batches = self.val_loader.cluster_views(view, all_N, size)
        if self.options.ten_crops:
            crops = TenCrops(self.model.image_size)
            batches = self.val_loader.training_views(crops, all_N, size, seed=self.options.seed, epoch=0)
        meters = Meters()
        with (
            torch.no_grad(),
            closing(batches),
            self.resumable.track("testing", len(images), state=self.training.state) as advance,
        ):
            for number, batch in enumerate(batches):
                if len(batch.indices_B):
                    labels_B = self.labels[1][batch.indices_B.to(self.device)]
                    meters.add(self.tested(batch.images_BCHW, labels_B), len(labels_B))
                if self.verbose and number % LINE_BATCHES == 0:
                    say(f"Validation: [{number}/{n_batches}]\t{meters.line(data=False)}")
                check_unreadable(self.val_loader, len(images))
                advance(len(batch.indices_B))
        loss, prec1, prec5 = (meters.values[name].mean for name in ("Loss", "Prec@1", "Prec@5"))
        self.write(loss, prec1, prec5)

    def tested(self, images: Tensor, labels_B: Tensor) -> dict[str, "float | Tensor"]:
        """Return the measures of a batch of images (B, 3, H, W), or of their ten crops (B, V, 3, H, W)."""
        if not self.options.ten_crops:
            scores_BC = self.training.network(self.rows(images))[self.input]
            return self.measured(cross_entropy(scores_BC, labels_B), scores_BC, labels_B)
        scores_BVC = self.training.network(self.rows(images.flatten(0, 1)))[self.input].unflatten(0, (-1, CROPS))
        loss = cross_entropy(scores_BVC[:, CENTRE], labels_B)
        return self.measured(loss, scores_BVC.softmax(2).mean(1), labels_B)

    def write(self, loss: float, prec1: float, prec5: float) -> None:
        """Write the logs, and a checkpoint: `model_best.pth.tar` if this epoch is the best, else `checkpoint.pth.tar`."""
        logs = self.training.logs
        best = max(logs[PREC1], default=0.0)
        for name, value in zip(LOGS, (loss, prec1, prec5), strict=True):
            logs[name].append(value)
            with written_beside(self.folder / "log" / name) as beside:
                beside.write_bytes(pickle.dumps(logs[name], PROTOCOL))
        state = {
            "epoch": self.training.tests,
            "arch": "alexnet",
            "state_dict": self.weights,
            "prec5": prec5,
            "best_prec1": max(prec1, best),
            "optimizer": self.training.optimizer.state_dict(),
        }
        save_tensors(self.folder / ("model_best.pth.tar" if prec1 > best else "checkpoint.pth.tar"), state)


def _digest(labels_N: Tensor) -> str:
    return hashlib.sha256(labels_N.numpy().tobytes()).hexdigest()
