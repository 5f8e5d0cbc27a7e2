"""Fine-tuning on Pascal VOC 2007's 20 classes, and mAP: table 2 of the paper, columns "Classification fc6-8" and "all".

It follows the 2018 release's PyTorch script for this protocol, for which the release's README reports 70.4 mAP with fc6-8
(the paper's 72.0 had the scales of BatchNorm trained: `--train-batchnorm`). From that script are:

- the fully connected layers are re-initialised with fc6-8 *and* with all; weights of deviation 0.01, biases 0.1;
- BatchNorm of the convolutions keeps its statistics in both; its scales are frozen with fc6-8, trained with all;
- the loss is the sum over classes of the binary cross-entropy, averaged over the images of a step; a class of which an
  image has only "difficult" objects counts neither in the loss nor in the test of that image;
- the scores (logits, not probabilities) of ten crops are averaged; training and test draw their crops in the same way;
- crops, learning rate, momentum, weight decay, norm of clipping, number of steps and their halvings (the defaults).

It differs from the script in three points: the images come in a new order each epoch (there in one order, drawn once); the
new head's weights are normal (there uniform, of deviation 0.009); and with all, the convolutions start from the model's
weights, which a first version of the script re-initialised by mistake (issue 16 of its repository). The paper's own numbers
came from Caffe: 150,000 steps, with all at a rate of 0.001 that was cut every 20,000 steps.

N images, B batch, C classes, V crops of an image, X crops of a batch.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from hashlib import sha256
from math import ceil, sqrt
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.core.work import Advance, no_advance
from deepcluster.data.loader import Batch
from deepcluster.data.sources import ImageSource
from deepcluster.data.views import TenCrops, TrainingView, View
from deepcluster.evaluation.classifier import Classifier, logits_of, step
from deepcluster.evaluation.datasets import voc
from deepcluster.evaluation.measures.rankings import AveragePrecisions, mean_average_precision
from deepcluster.evaluation.options import VocClassificationOptions
from deepcluster.evaluation.results import Measured, Results
from deepcluster.evaluation.trainer import Training, fit_source, seed_of, sgd
from deepcluster.models.trunk import Trunk
from deepcluster.run.model import Model, data_key
from deepcluster.run.resumable import ResumableState

NAME = "voc07-classification"
RATIO = (1.0, 1.0)
CLIP = 10.0
NEW_DEVIATION, NEW_BIAS = 0.01, 0.1
CROPS = 10
# No training gets to this epoch: the crops of the test have random numbers of their own.
TEST_EPOCH = 1 << 40
TEST_BATCH = 16
REPORT_STEPS = 1_000
# Changes with the format of the state: a state of an older version is not continued.
STATE_FORMAT = 2

# Called after a step with its number, its loss on the device, and the time at which its batch was there.
Watch = Callable[[int, Tensor, float], None]


def evaluate(model: Model, data: Path, options: VocClassificationOptions) -> Results:
    """Fine-tune a copy of the model on one split of a VOC devkit, and return mAP on the other.

    Raises:
        InputError: no devkit, no such lists, nothing to test, or an image size that the trunk can't take.
        TrainingError: the loss is no longer a finite number.
        Interrupted: the state is kept; the same call continues to exactly the result it would have had.
    """
    size = crop_size(model, options.image_size)
    devkit = voc.open_voc(data)
    train, test = voc.splits_for(devkit, options.split)
    if len(voc.without_positives(test.labels_NC)) == len(voc.CLASSES):
        raise InputError(f"{devkit.root}: none of {test.source.describe()} has an object of VOC's classes that counts")
    images = f"{count_of(len(train.names), 'image')}, testing on {len(test.names):,}"
    model.work.reporter.say(f"training {'all' if options.finetune == 'all' else 'after the convolutions'} on {images}")
    classifier = make_classifier(model.copy_of_trunk(), options)
    training, resumable = fine_tune(model, classifier, train, size, options)
    again = test_on(train, "testing on train", model, training, resumable, size, options)[0] if options.train_set else None
    found, unreadable = test_on(test, "testing", model, training, resumable, size, options)
    resumable.done()
    notes = [*train.notes, *test.notes]
    for classes, why in (
        (found.left_out, "no image to test on shows them, so they are left out of the mean"),
        (voc.without_positives(train.labels_NC), "no image to train on shows them"),
    ):
        notes += [f"{', '.join(classes)}: {why}"] if classes else []
    if options.finetune == "fc6-8" and not fully_connected(classifier.trunk):
        notes.append(f"{classifier.trunk.arch} has no fully connected layers: only the linear classifier is trained")
    tested = len(test.names) - len(unreadable)
    counts = {"train_images": len(train.names), "test_images": tested, "classes": len(found.by_class)}
    about = {"train": train.source.describe(), "test": test.source.describe(), **counts}
    settings = options.as_dict() | {"image_size": size, "clip": CLIP}
    results: dict[str, Measured] = {"mAP": found.mean, "mAP 11 points": found.mean_11_points}
    results |= {"AP": found.by_class, "AP 11 points": found.by_class_11_points}
    if again is not None:
        results |= {"train mAP": again.mean, "train AP": again.by_class}
    notes += train.left_out(training.unreadable) + test.left_out(unreadable)
    return Results(NAME, about, settings, results, ("mAP",), notes)


def test_on(
    split: voc.VocSplit,
    what: str,
    model: Model,
    training: Training[Classifier],
    resumable: ResumableState,
    size: int,
    options: VocClassificationOptions,
) -> tuple[AveragePrecisions, dict[int, str]]:
    """Return the average precisions of the trained network on a split, and why images of it can't be read, by index."""
    with resumable.track(what, len(split.source) * CROPS, "crops", state=training.state) as advance:
        scores_NC, unreadable = score(model, training.network, split.source, size, options, advance=advance)
    readable_N = torch.ones(len(split.names), dtype=torch.bool)
    readable_N[sorted(unreadable)] = False
    return mean_average_precision(split.labels_NC[readable_N], scores_NC[readable_N], voc.CLASSES), unreadable


def crop_size(model: Model, asked: int | None) -> int:
    """Return the side of the crops in pixels: the one asked for, or that of the model.

    Raises:
        InputError: the trunk can't take images of this size.
    """
    size, trunk = asked or model.image_size, model.trunk
    if size == model.image_size:
        return size
    try:
        with torch.no_grad():
            trunk(torch.zeros(1, 3, size, size, device=model.machine.device))
    except RuntimeError:
        reason = "its fully connected layers are made for that" if fully_connected(trunk) else "smaller maps would be empty"
        raise InputError(
            f"image_size={size} does not fit this {trunk.arch}, which takes images of {model.image_size} px ({reason}); "
            f"omit --image-size, or use {model.image_size}"
        ) from None
    return size


def fully_connected(trunk: Trunk) -> list[nn.Linear]:
    """Return the trunk's linear layers after its convolutions; a ResNet has none."""
    convolutional = set(trunk.convolutions().modules())
    return [module for module in trunk.modules() if isinstance(module, nn.Linear) and module not in convolutional]


def make_classifier(trunk: Trunk, options: VocClassificationOptions) -> Classifier:
    """Return the network to train: new linear layers, and gradients for the weights that `finetune` trains."""
    classifier = Classifier(trunk, len(voc.CLASSES), seed=options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    for layer in [*fully_connected(trunk), classifier.head.linear]:
        layer.requires_grad_(True)
        with torch.no_grad():
            layer.weight.copy_(torch.empty(layer.weight.shape).normal_(std=NEW_DEVIATION, generator=generator))
            layer.bias.fill_(NEW_BIAS)
    convolutions = trunk.convolutions()
    convolutions.requires_grad_(options.finetune == "all")
    for module in convolutions.modules():
        if options.train_batchnorm and isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(True)
    return classifier


def loss_of(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """Return the binary cross-entropy, summed over classes and averaged over images; "difficult" labels (0) do not count."""
    present_BC, counts_BC = (labels_BC == voc.PRESENT).float(), (labels_BC != voc.DIFFICULT).float()
    return binary_cross_entropy_with_logits(logits_BC, present_BC, counts_BC, reduction="sum") / len(labels_BC)


def rate(options: VocClassificationOptions, iteration: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    return options.lr * 0.5 ** (iteration // options.halve_every)


def fine_tune(
    model: Model,
    classifier: Classifier,
    split: voc.VocSplit,
    size: int,
    options: VocClassificationOptions,
    watch: Watch = lambda number, loss, started: None,
) -> tuple[Training[Classifier], ResumableState]:
    """Train on a split, or continue where an earlier call was stopped.

    Raises:
        InputError: more than 10 % of the images can't be read.
    """
    weights, machine = [weight for weight in classifier.parameters() if weight.requires_grad], model.machine
    optimizer = sgd(weights, machine, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    training = Training(classifier, optimizer, options.iterations)
    labels = sha256(split.labels_NC.numpy().tobytes()).hexdigest()
    # The training does not depend on what is tested.
    chosen = {name: value for name, value in options.as_dict().items() if name != "train_set"}
    facts = (sorted(chosen.items()), size, data_key(split.source), labels)
    resumable = model.resumable(NAME, STATE_FORMAT, *facts)

    def learn(batch: Batch, number: int) -> dict[str, Tensor]:
        started, labels_BC = time.perf_counter(), split.labels_NC[batch.indices_B].to(machine.device)
        images, seed = batch.images_BCHW, seed_of(options.seed, number)
        loss = step(classifier, optimizer, images, labels_BC, loss_of, machine, seed=seed, clip=CLIP)
        watch(number, loss, started)
        return {"": loss}

    def rates(number: int) -> list[float]:
        return [rate(options, number)]

    def line(means: Mapping[str, float]) -> str:
        return f"{training.where}  loss {means.get('', 0.0):.3f}"

    # Dropout is on; BatchNorm of the convolutions uses its statistics and keeps them.
    classifier.train()
    classifier.trunk.convolutions().eval()
    images, view, least = split.source, TrainingView(size, options.crop_scale, RATIO), reduced(size, options)
    reports = min(REPORT_STEPS, ceil(options.iterations / 10)), line
    fit_source(
        model, training, images, view, learn, options, rates=rates, resumable=resumable, reports=reports, reduce_to=least
    )
    return training, resumable


def score(
    model: Model,
    classifier: Classifier,
    source: ImageSource,
    size: int,
    options: VocClassificationOptions,
    *,
    advance: Advance = no_advance,
) -> tuple[Tensor, dict[int, str]]:
    """Return scores (N, C), float64, CPU: the mean over ten crops of each image; and why images can't be read, by index.

    The rows of unreadable images are NaN.

    Args:
        options: `test_crops` are random (as in training) or fixed (centre and corners, and their mirror images).
        advance: called with the number of crops after each batch.
    """
    order_X = torch.arange(len(source))
    sums_NC = torch.zeros(len(source), len(voc.CLASSES), dtype=torch.float64)
    counts_N1 = torch.zeros(len(source), 1, dtype=torch.float64)
    # One crop after the other, or all of an image together as (V, 3, H, W).
    view: View = TenCrops(size)
    if options.test_crops == "random":
        view, order_X = TrainingView(size, options.crop_scale, RATIO), order_X.repeat_interleave(CROPS)
    together = TEST_BATCH * len(order_X) // max(1, len(source))
    with (
        model.loader(source, reduce_to=reduced(size, options)) as loader,
        closing(loader.training_views(view, order_X, together, seed=options.seed, epoch=TEST_EPOCH)) as batches,
    ):
        for batch in batches:
            indices_X = batch.indices_B
            if len(indices_X):
                # Nothing is joined of (B, 3, H, W), the first two axes of (B, V, 3, H, W).
                crops_XCHW = batch.images_BCHW.flatten(0, -4)
                indices_X = indices_X.repeat_interleave(len(crops_XCHW) // len(indices_X))
                sums_NC.index_add_(0, indices_X, logits_of(classifier, crops_XCHW, model.machine).cpu().double())
                counts_N1.index_add_(0, indices_X, torch.ones(len(indices_X), 1, dtype=torch.float64))
            advance(len(indices_X))
        return sums_NC / counts_N1, dict(loader.unreadable)


def reduced(size: int, options: VocClassificationOptions) -> int:
    """Return the shorter side to which larger photos are reduced: the smallest crop then still has `size` pixels."""
    return ceil(size / sqrt(options.crop_scale[0]))
