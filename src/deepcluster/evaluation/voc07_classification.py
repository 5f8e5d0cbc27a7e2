"""Fine-tuning on Pascal VOC 2007's 20 classes, and mAP: table 2 of the paper, columns "Classification fc6-8" and "all".

As the 2018 release's PyTorch script for this protocol, with which the release's README gives 70.4 mAP for fc6-8 (the
paper's 72.0 had the scales of BatchNorm trained: `--train-batchnorm`). From that script are:

- the fully connected layers are made anew with fc6-8 *and* with all; weights of deviation 0.01, biases 0.1;
- BatchNorm of the convolutions keeps its statistics in both; its scales are frozen with fc6-8, trained with all;
- the loss is the sum over classes of the binary cross-entropy, averaged over the images of a step; a class of which an
  image has "difficult" objects alone counts neither in the loss nor in the test of that image;
- the scores (logits, not probabilities) of ten crops are averaged; the crops are drawn anew for training and test;
- crops, rate, momentum, weight decay, norm of clipping, number of steps and their halvings (the defaults of the options).

Unlike there: the images come in a new order each epoch (there in one order, drawn once); the new head's weights are normal
(there uniform, of deviation 0.009); and the convolutions start from the model's weights with all, which a first version of
the script drew anew by mistake (issue 16 of its repository). The paper's own numbers came from Caffe: 150,000 steps, with
all at a rate of 0.001 that was cut every 20,000 steps.

N images, B batch, C classes, V crops of an image.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from deepcluster.core.errors import InputError
from deepcluster.core.progress import Meter
from deepcluster.core.text import count_of
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.sources import ImageSource
from deepcluster.data.views import TenCrops, TrainingView
from deepcluster.evaluation.datasets.voc import (
    CLASSES,
    DIFFICULT,
    PRESENT,
    VocSplit,
    open_voc,
    splits_for,
    without_positives,
)
from deepcluster.evaluation.learners.fine_tuning import (
    Classifier,
    RunningLoss,
    crop_size,
    fully_connected,
    logits_of,
    make_anew,
    order_of,
    seed_of,
    sgd,
    step,
)
from deepcluster.evaluation.measures.average_precision import mean_average_precision
from deepcluster.evaluation.options import VocClassificationOptions
from deepcluster.evaluation.results import Results
from deepcluster.models.trunk import Trunk
from deepcluster.run.model import Model, data_key

NAME = "voc07-classification"
SCALE, RATIO = (0.1, 0.5), (1.0, 1.0)
CLIP = 10.0
NEW_DEVIATION, NEW_BIAS = 0.01, 0.1
CROPS = 10
# No training gets to this epoch: the crops of the test have random numbers of their own.
TEST_EPOCH = 1 << 40
TEST_BATCH = 16
SAY_STEPS = 1_000
# A state of an older program is not gone on with.
STATE_FORMAT = 1


def evaluate(model: Model, data: Path, options: VocClassificationOptions) -> Results:
    """Fine-tune a copy of the model on one split of a VOC devkit; mAP on the other.

    Raises:
        InputError: no devkit, no such lists, nothing to test, or an image size that the trunk can't take.
        TrainingError: the loss is no finite number any more.
        Interrupted: the state is kept; the same call goes on to the very result it would have had.
    """
    size = crop_size(model, options.image_size)
    devkit = open_voc(data)
    train, test = splits_for(devkit, options.split)
    if len(without_positives(test.labels_NC)) == len(CLASSES):
        raise InputError(f"{devkit.root}: none of {test.source.describe()} has an object of VOC's classes that counts")
    classifier = make_classifier(model.copy_of_trunk(), options)
    training = Training(model, classifier, train, size, options)
    images = f"{count_of(len(train.names), 'image')}, testing on {len(test.names):,}"
    model.work.reporter.say(f"training {'all' if options.finetune == 'all' else 'after the convolutions'} on {images}")
    training.run()
    scores_NC, unreadable = score(
        model,
        classifier,
        test.source,
        size,
        test_crops=options.test_crops,
        seed=options.seed,
        on_batch=lambda: training.unfinished.check(training.state),
    )
    tested_N = torch.ones(len(test.names), dtype=torch.bool)
    tested_N[sorted(unreadable)] = False
    found = mean_average_precision(test.labels_NC[tested_N], scores_NC[tested_N], CLASSES)
    training.unfinished.done()
    return Results(
        protocol=NAME,
        data={
            "train": train.source.describe(),
            "test": test.source.describe(),
            "train_images": len(train.names),
            "test_images": int(tested_N.sum()),
            "classes": len(found.by_class),
        },
        settings=options.as_dict() | {"image_size": size, "crop_scale": list(SCALE), "clip": CLIP},
        results={
            "mAP": found.mean,
            "mAP 11 points": found.mean_11_points,
            "AP": found.by_class,
            "AP 11 points": found.by_class_11_points,
        },
        headline=("mAP",),
        notes=(
            *train.notes,
            *test.notes,
            *_notes(classifier, options, train, found.left_out),
            *_unreadable(train, training.unreadable),
            *_unreadable(test, unreadable),
        ),
    )


def make_classifier(trunk: Trunk, options: VocClassificationOptions) -> Classifier:
    """The network to train: all linear layers made anew, and the gradients asked for that `finetune` trains."""
    classifier = Classifier(trunk, len(CLASSES), seed=options.seed)
    make_anew([*fully_connected(trunk), classifier.head.linear], deviation=NEW_DEVIATION, bias=NEW_BIAS, seed=options.seed)
    convolutions = trunk.convolutions()
    convolutions.requires_grad_(options.finetune == "all")
    if options.train_batchnorm:
        for module in convolutions.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(True)
    return classifier


def training_mode(classifier: Classifier) -> None:
    """Dropout is on; BatchNorm of the convolutions goes by its statistics and leaves them as they are."""
    classifier.train()
    classifier.trunk.convolutions().eval()


def loss_of(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """Binary cross-entropy, summed over classes and averaged over images; "difficult" labels (0) count nothing."""
    present_BC, counts_BC = (labels_BC == PRESENT).float(), (labels_BC != DIFFICULT).float()
    return binary_cross_entropy_with_logits(logits_BC, present_BC, counts_BC, reduction="sum") / len(labels_BC)


def rate(options: VocClassificationOptions, iteration: int) -> float:
    """The learning rate at a step; the first is 0."""
    return options.lr * 0.5 ** (iteration // options.halve_every)


@dataclass
class Training:
    """The steps of SGD, from where an earlier call stopped.

    Attributes:
        classifier: what is trained.
        size: side of the crops in pixels.
        iteration: steps done.
        losses: since the last line that told them.
        unreadable: why images could not be read, by index.
    """

    model: Model
    classifier: Classifier
    split: VocSplit
    size: int
    options: VocClassificationOptions
    iteration: int = 0
    losses: RunningLoss = field(default_factory=RunningLoss)
    unreadable: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.optimizer = sgd(
            [weight for weight in self.classifier.parameters() if weight.requires_grad],
            self.model.machine,
            lr=self.options.lr,
            momentum=self.options.momentum,
            weight_decay=self.options.weight_decay,
        )
        labels = sha256(self.split.labels_NC.numpy().tobytes()).hexdigest()
        facts = (sorted(self.options.as_dict().items()), self.size, data_key(self.split.source), labels)
        self.unfinished = self.model.resumable(NAME, STATE_FORMAT, *facts)
        kept = self.unfinished.load()
        if kept is not None:
            self.classifier.load_state_dict(kept["classifier"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.iteration, self.losses = kept["iteration"], RunningLoss(*kept["loss"])
            self.unreadable = kept["unreadable"]
            self.model.work.reporter.say(f"going on after {self._where()}")

    def state(self) -> dict[str, Any]:
        """From which the training goes on."""
        self.losses.settle(self._where())
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "loss": (self.losses.total, self.losses.count),
            "unreadable": dict(self.unreadable),
        }

    def run(self) -> None:
        """Train to the last iteration."""
        source, left = self.split.source, self.options.iterations - self.iteration
        if not left:
            return
        with (
            self.model.loader(source, reduce_to=reduced(self.size)) as loader,
            self.model.work.reporter.track("training", left, "iterations") as progress,
        ):
            while self.iteration < self.options.iterations:
                self._epoch(loader, progress)
                if len(self.unreadable) == len(source):
                    raise InputError(f"none of {source.describe()} can be read: {self.unreadable[0]}")

    def _epoch(self, loader: Loader, progress: Meter) -> None:
        """The rest of an epoch, or of the iterations."""
        options, n_images, view = self.options, len(self.split.source), TrainingView(self.size, SCALE, RATIO)
        epoch, first_batch = divmod(self.iteration, ceil(n_images / options.batch_size))
        order_N = order_of(n_images, options.seed, epoch)
        batches = loader.training_views(
            view, order_N, options.batch_size, seed=options.seed, epoch=epoch, first_batch=first_batch
        )
        training_mode(self.classifier)
        with closing(batches):
            for batch in batches:
                self._step(batch)
                progress(1)
                self.unreadable |= loader.unreadable
                self.unfinished.check(self.state)
                if self.iteration == options.iterations:
                    return

    def _step(self, batch: Batch) -> None:
        options, machine = self.options, self.model.machine
        for group in self.optimizer.param_groups:
            group["lr"] = rate(options, self.iteration)
        if len(batch.indices_B):
            labels_BC = self.split.labels_NC[batch.indices_B].to(machine.device)
            seed = seed_of(options.seed, self.iteration)
            images_BCHW = batch.images_BCHW
            loss = step(self.classifier, self.optimizer, images_BCHW, labels_BC, loss_of, machine, seed=seed, clip=CLIP)
            self.losses.add(loss, self._where())
        self.iteration += 1
        if self.iteration % min(SAY_STEPS, ceil(options.iterations / 10)) == 0:
            mean, now = self.losses.settle(self._where()), self.optimizer.param_groups[0]["lr"]
            self.model.work.reporter.say(f"{self._where()}  loss {mean:.3f}  rate {now:.3g}")
            self.losses = RunningLoss()

    def _where(self) -> str:
        return f"iteration {self.iteration:,}/{self.options.iterations:,}"


def score(
    model: Model,
    classifier: Classifier,
    source: ImageSource,
    size: int,
    *,
    test_crops: str = "random",
    seed: int = 0,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[Tensor, dict[int, str]]:
    """Scores (N, C), float64, CPU: the mean over ten crops of each image; and why some images can't be read, by index.

    The rows of those are NaN.

    Args:
        test_crops: random (as in training) or fixed (centre and corners, and their mirror images).
        on_batch: called after each batch; may raise to stop.
    """
    n_images = len(source)
    sums_NC = torch.zeros(n_images, len(CLASSES), dtype=torch.float64)
    counts_N1 = torch.zeros(n_images, 1, dtype=torch.float64)
    with model.loader(source, reduce_to=reduced(size)) as loader:
        batches = _test_batches(loader, n_images, size, test_crops, seed)
        with model.work.reporter.track("testing", n_images * CROPS, "crops") as progress, closing(batches):
            for batch in batches:
                if len(batch.indices_B):
                    # Of (B, 3, H, W) nothing is joined, of (B, V, 3, H, W) the first two.
                    crops_XCHW = batch.images_BCHW.flatten(0, -4)
                    indices_X = batch.indices_B.repeat_interleave(len(crops_XCHW) // len(batch.indices_B))
                    sums_NC.index_add_(0, indices_X, logits_of(classifier, crops_XCHW, model.machine).cpu().double())
                    counts_N1.index_add_(0, indices_X, torch.ones(len(indices_X), 1, dtype=torch.float64))
                    progress(len(crops_XCHW))
                on_batch()
        return sums_NC / counts_N1, dict(loader.unreadable)


def _test_batches(loader: Loader, n_images: int, size: int, test_crops: str, seed: int) -> Generator[Batch, None, None]:
    """Ten crops of each image: its ten crops one after the other, or together as (B, V, 3, H, W)."""
    all_N = torch.arange(n_images)
    if test_crops == "fixed":
        return loader.training_views(TenCrops(size), all_N, TEST_BATCH, seed=seed, epoch=TEST_EPOCH)
    view, order_X = TrainingView(size, SCALE, RATIO), all_N.repeat_interleave(CROPS)
    return loader.training_views(view, order_X, TEST_BATCH * CROPS, seed=seed, epoch=TEST_EPOCH)


def reduced(size: int) -> int:
    """Shorter side that larger photos are made smaller to: the smallest crop then still has `size` pixels."""
    return ceil(size / sqrt(SCALE[0]))


def _notes(classifier: Classifier, options: VocClassificationOptions, train: VocSplit, left_out: list[str]) -> list[str]:
    """What a reader must know of classes and layers."""
    notes = []
    for classes, why in (
        (left_out, "no image to test on shows them, so they are left out of the mean"),
        (without_positives(train.labels_NC), "no image to train on shows them"),
    ):
        if classes:
            notes.append(f"{', '.join(classes)}: {why}")
    if options.finetune == "fc6-8" and not fully_connected(classifier.trunk):
        notes.append(f"{classifier.trunk.arch} has no fully connected layers: the linear classifier alone is trained")
    return notes


def _unreadable(split: VocSplit, reasons: dict[int, str]) -> list[str]:
    """A note on images that can't be read."""
    if not reasons:
        return []
    first = min(reasons)
    some = f"{split.names[first]}: {reasons[first]}"
    return [f"{len(reasons):,} of {split.source.describe()} can't be read and are left out ({some})"]
