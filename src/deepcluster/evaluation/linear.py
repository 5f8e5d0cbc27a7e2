"""Linear classifiers on frozen stages (the paper's section 4.2 and table 1): all stages in one pass over the images.

A trunk that does not change gives every stage on the way to the last one, so each batch goes through it once, and each
stage's rows go to a classifier of their own. The classifiers share nothing: the sum of their losses has for each the
gradient of its own loss.

B batch, V views of an image, D features, C classes.
"""

import hashlib
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of, duration
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.survey import MOST_UNREADABLE, check_unreadable
from deepcluster.data.views import ClusterView, ShiftedView, TenCrops
from deepcluster.evaluation.datasets.labelled import Labelled, TrainVal, open_train_val
from deepcluster.evaluation.learners.linear_heads import LinearHeads, learning_rate
from deepcluster.evaluation.learners.logistic import fit_logistic, right_among
from deepcluster.evaluation.options import LinearOptions
from deepcluster.evaluation.results import Measured, Results
from deepcluster.run.model import Model, data_key, readable
from deepcluster.run.pooling import Pooled
from deepcluster.run.resumable import ResumableState

KINDS = {"pooled": "pooled", "avgpool": "average"}
CROPS = 10
TOP = 5


def evaluate(model: Model, data: Path, options: LinearOptions) -> Results:
    """Top-1 and top-5 accuracy on `val` of a linear classifier of each stage, learned on `train`.

    Raises:
        InputError: the data are not laid out so, the trunk has no such stage, more than 10 % of the images can't be read,
            or the loss became infinite.
    """
    wanted = [Pooled(stage, KINDS[options.head]) for stage in dict.fromkeys(model.stages(options.stages))]
    parts = open_train_val(data)
    top = sorted({1, min(TOP, len(parts.train.class_names))})
    shares, notes = (_fast if options.fast else _trained)(model, parts, options, wanted, top)
    results: dict[str, Measured] = {
        f"top-{most}": {one.stage: shares[one][number] for one in wanted} for number, most in enumerate(top)
    }
    best = max(wanted, key=lambda one: shares[one][0])
    settings = {
        **options.as_dict(),
        "stages": [one.stage for one in wanted],
        "numbers": {one.stage: width for one, width in model.widths(wanted).items()},
        "image_size": model.image_size,
    }
    return Results("linear", parts.describe(), settings, results, ("top-1", best.stage), notes)


class _Training:
    """The passes over the training images, from wherever a stopped one had come to."""

    def __init__(self, model: Model, train: Labelled, options: LinearOptions, wanted: Sequence[Pooled]) -> None:
        self.model, self.train, self.options, self.wanted = model, train, options, wanted
        device = model.machine.device
        self.labels_N = train.labels_N.to(device)
        self.heads = LinearHeads(model.widths(wanted), len(train.class_names), options, device)
        self.batches = -(-len(train.source) // options.batch_size)
        self.epoch = self.batch = self.seen = 0
        self.sums_2S = torch.zeros(2, len(wanted), device=device)  # losses, and right answers, of this epoch
        self.unreadable: dict[int, str] = {}
        self.unfinished = self._open()

    def _open(self) -> ResumableState:
        """The state that was kept of this very training, taken up if there is one."""
        ignored = ("ten_crops", "fast", "stages")
        facts = {name: value for name, value in self.options.as_dict().items() if name not in ignored}
        labels = hashlib.sha256(self.train.labels_N.numpy().tobytes()).hexdigest()
        where = (data_key(self.train.source), labels, self.model.image_size, self.model.settings.reduce_to)
        unfinished = self.model.resumable("linear-1", sorted(facts.items()), self.wanted, *where)
        state = unfinished.load()
        if state is not None:
            self.heads.load(state["heads"])
            self.epoch, self.batch, self.seen = state["epoch"], state["batch"], state["seen"]
            self.sums_2S.copy_(state["sums"])
            self.unreadable.update(state["unreadable"])
            place = f"epoch {self.epoch + 1}, batch {self.batch:,} of {self.batches:,}"
            self.model.work.reporter.say(f"going on from {'the test' if self.epoch == self.options.epochs else place}")
        return unfinished

    def state(self) -> dict[str, Any]:
        """All that the rest depends on."""
        return {
            "heads": self.heads.state(),
            "epoch": self.epoch,
            "batch": self.batch,
            "seen": self.seen,
            "sums": self.sums_2S.cpu(),
            "unreadable": dict(self.unreadable),
        }

    def check(self) -> None:
        """Keep the state now and then, and where a stop is asked for."""
        self.unfinished.check(self.state)

    def run(self) -> None:
        """All epochs that are left."""
        if self.epoch == self.options.epochs:
            return
        with self.model.loader(self.train.source) as loader:
            loader.unreadable.update(self.unreadable)
            self.unreadable = loader.unreadable
            while self.epoch < self.options.epochs:
                self._epoch(loader)

    def _epoch(self, loader: Loader) -> None:
        started, waited, options = time.perf_counter(), loader.wait_seconds, self.options
        first = self.batch
        with self.model.work.reporter.track(f"epoch {self.epoch + 1}", len(self.train.source)) as progress:
            progress(min(first * options.batch_size, len(self.train.source)))
            with closing(self._batches(loader)) as batches:
                for batch in batches:
                    self._learn(batch)
                    progress(len(batch.indices_B))
                    check_unreadable(loader, len(self.train.source))
                    self.check()
        self._report(time.perf_counter() - started, loader.wait_seconds - waited)
        self.epoch, self.batch, self.seen = self.epoch + 1, 0, 0
        self.sums_2S.zero_()

    def _batches(self, loader: Loader) -> Generator[Batch, None, None]:
        options, count = self.options, len(self.train.source)
        order_N = torch.from_numpy(np.random.default_rng([options.seed, self.epoch]).permutation(count))
        return loader.training_views(
            ShiftedView(self.model.image_size),
            order_N,
            options.batch_size,
            seed=options.seed,
            epoch=self.epoch,
            first_batch=self.batch,
        )

    def _learn(self, batch: Batch) -> None:
        if len(batch.indices_B):
            rows = self.model.extract(batch.images_BCHW, self.wanted)
            labels_B = self.labels_N[batch.indices_B.to(self.labels_N.device)]
            self.sums_2S += self.heads.step(rows, labels_B, self.epoch * self.batches + self.batch)
            self.seen += len(labels_B)
        self.batch += 1

    def _report(self, seconds: float, waited: float) -> None:
        losses_S, right_S = (self.sums_2S / max(1, self.seen)).tolist()
        for one, loss in zip(self.wanted, losses_S, strict=True):
            if not isfinite(loss):
                self.unfinished.done()
                raise InputError(
                    f"the loss of {one.stage} is not finite after epoch {self.epoch + 1}: use a lower --lr than "
                    f"{self.options.lr:g}, or leave this stage out with --stages"
                )
        best = max(range(len(self.wanted)), key=right_S.__getitem__)
        rate = learning_rate(self.options.lr, self.options.weight_decay, (self.epoch + 1) * self.batches - 1)
        self.model.work.reporter.say(
            f"epoch {self.epoch + 1:>3}/{self.options.epochs}  {self.wanted[best].stage}: loss {losses_S[best]:.3f}, "
            f"train top-1 {100 * right_S[best]:.1f}%  lr {rate:.4g}  {duration(seconds)}  "
            f"data-wait {waited / max(seconds, 1e-9):.0%}"
        )


Shares = dict[Pooled, list[float]]


def _trained(
    model: Model, parts: TrainVal, options: LinearOptions, wanted: Sequence[Pooled], top: Sequence[int]
) -> tuple[Shares, list[str]]:
    """Shares by SGD on random crops, as the paper does it."""
    training = _Training(model, parts.train, options, wanted)
    training.run()
    shares, bad = _test(training, parts.val, top)
    training.unfinished.done()
    return shares, [*_left_out("train", parts.train, training.unreadable), *_left_out("val", parts.val, bad)]


def _test(training: _Training, val: Labelled, top: Sequence[int]) -> tuple[Shares, dict[int, str]]:
    """Shares of the images that each classifier ranks among its `top` classes, and the images that can't be read."""
    model, n_views = training.model, CROPS if training.options.ten_crops else 1
    right = {one: torch.zeros(len(top), dtype=torch.int64) for one in training.wanted}
    seen = 0
    with (
        model.loader(val.source) as loader,
        model.work.reporter.track("testing", len(val.source)) as progress,
        closing(_test_batches(loader, model.image_size, training.options)) as batches,
    ):
        for batch in batches:
            if len(batch.indices_B):
                images = batch.images_BCHW.flatten(0, 1) if n_views > 1 else batch.images_BCHW
                probabilities = training.heads.probabilities(model.extract(images, training.wanted), n_views)
                labels_B = val.labels_N[batch.indices_B].to(model.machine.device)
                for one, probabilities_BC in probabilities.items():
                    right[one] += right_among(probabilities_BC, labels_B, top).cpu()
            seen += len(batch.indices_B)
            progress(len(batch.indices_B))
            check_unreadable(loader, len(val.source))
            training.check()
        return {one: [int(n) / seen for n in right_T] for one, right_T in right.items()}, dict(loader.unreadable)


def _test_batches(loader: Loader, image_size: int, options: LinearOptions) -> Generator[Batch, None, None]:
    """The centre crop of each image, or its ten crops: (B, V, 3, S, S)."""
    everything_N = torch.arange(len(loader.images))
    if not options.ten_crops:
        return loader.cluster_views(ClusterView(image_size), everything_N, options.batch_size)
    return loader.training_views(
        TenCrops(image_size), everything_N, -(-options.batch_size // CROPS), seed=options.seed, epoch=0
    )


def _fast(
    model: Model, parts: TrainVal, options: LinearOptions, wanted: Sequence[Pooled], top: Sequence[int]
) -> tuple[Shares, list[str]]:
    """Shares by L-BFGS on the features of centre crops, which are kept on disk."""
    (train_rows, train_labels_N, train_notes), (val_rows, val_labels_N, val_notes) = (
        _frozen(model, name, labelled, wanted) for name, labelled in (("train", parts.train), ("val", parts.val))
    )
    shares: Shares = {}
    for one in wanted:
        started = time.perf_counter()
        with model.work.reporter.track(f"fitting {one.stage}", None, "passes") as progress:
            fitted = fit_logistic(
                train_rows[one],
                train_labels_N,
                len(parts.train.class_names),
                seed=options.seed,
                device=model.machine.clustering_device,
                on_pass=partial(_passed, model, progress),
            )
        shares[one] = fitted.accuracy(val_rows[one], val_labels_N, top=top)
        model.work.reporter.say(
            f"{one.stage}: top-1 {100 * shares[one][0]:.1f}%  l2 {fitted.l2:g}  {duration(time.perf_counter() - started)}"
        )
    return shares, [*train_notes, *val_notes]


def _passed(model: Model, progress: Any) -> None:
    progress(1)
    model.work.interruption.check()


def _frozen(
    model: Model, part: str, labelled: Labelled, wanted: Sequence[Pooled]
) -> tuple[dict[Pooled, Tensor], Tensor, list[str]]:
    """Rows of each stage; labels, -1 where an image can't be read; and a note of these."""
    rows = model.rows(labelled.source, wanted)
    reads_N = readable(rows[wanted[0]])
    bad = (~reads_N).nonzero()[:, 0].tolist()
    if len(bad) > MOST_UNREADABLE * len(reads_N):
        raise InputError(f"{labelled.source.describe()}: {len(bad):,} of {len(reads_N):,} images can't be read")
    notes = _left_out(part, labelled, dict.fromkeys(bad, ""))
    return rows, torch.where(reads_N, labelled.labels_N, -1), notes


def _left_out(part: str, labelled: Labelled, unreadable: dict[int, str]) -> list[str]:
    """A sentence on the images of a part that can't be read."""
    if not unreadable:
        return []
    names = [labelled.source.name(index) for index in sorted(unreadable)]
    some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return [
        f"{count_of(len(names), 'image')} of {part} can't be read and {'is' if len(names) == 1 else 'are'} left out: {some}"
    ]
