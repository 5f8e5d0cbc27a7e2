"""What the detection protocols share: a detector of a trunk, its training, its test; and the results on Pascal VOC."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

import torch
from PIL.Image import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepcluster.core.errors import TrainingError
from deepcluster.core.text import count_of
from deepcluster.data.decode import decode
from deepcluster.data.survey import even_sample
from deepcluster.evaluation.datasets.dense import Detections, Objects, ObjectSet
from deepcluster.evaluation.dense.detection.box_heads import LastLayer, Parts
from deepcluster.evaluation.dense.detection.faster_rcnn import BoxHeads, FloatPredictor, GivenProposals, RegionProposals
from deepcluster.evaluation.dense.detection.freezing import keep_frozen_statistics, train_from
from deepcluster.evaluation.dense.detection.options import SgdOptions
from deepcluster.evaluation.dense.detection.parts import (
    Batching,
    Detector,
    FixedAnchors,
    ReadProposals,
    StageMaps,
    Targets,
    detect_all,
    detections_of,
    losses_of,
    test_view,
    training_view,
)
from deepcluster.evaluation.dense.detection.voc_options import DetectionOptions
from deepcluster.evaluation.dense.fine_tuning import Schedule, fine_tune, set_batch_norms
from deepcluster.evaluation.dense.pictures.compared import Pixels, compared
from deepcluster.evaluation.dense.samples import Samples
from deepcluster.evaluation.dense.spans import Spans
from deepcluster.evaluation.measures.boxes import BoxPrecisions, box_precisions
from deepcluster.evaluation.results import Measured, Results
from deepcluster.evaluation.trainer import Diverged, Training, seeded
from deepcluster.run.model import Model
from deepcluster.run.resumable import ResumableState

PICTURES = 8
# Proposals of an image before non-maximum suppression, in training and in the test; and after it, in training.
BEFORE, TRAIN_AFTER = (12_000, 6_000), 2_000
ANCHORS = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Recipe:
    """In what the protocols differ beside their options.

    Attributes:
        batchnorm: what "auto" means.
        fixed_stage: weights up to this stage are not trained; none if empty.
        free_biases: biases learn at twice the rate and do not decay (Fast R-CNN); otherwise BatchNorm does not decay.
        difficult: train on objects that are marked "difficult".
        background_from, beta, scores_from, nms: of `BoxHeads`.
        rpn_beta: as `beta`, of the region proposal network.
    """

    batchnorm: str
    fixed_stage: str
    free_biases: bool
    difficult: bool
    beta: float
    rpn_beta: float
    scores_from: float
    nms: float
    background_from: float = 0.0


@dataclass(frozen=True)
class Tested:
    """A detector after its training and its test.

    Attributes:
        detections: of each image to test on.
        unreadable, untrained: why images to test on, and to train on, can't be read, by index.
        settings: what the user did not choose.
    """

    train: ObjectSet
    test: ObjectSet
    detections: list[Detections]
    unreadable: dict[int, str]
    untrained: dict[int, str]
    spans: Spans
    resumable: ResumableState
    settings: dict[str, Any] = field(default_factory=dict)

    def done(self) -> None:
        """Delete what is kept of the work."""
        self.spans.done()
        self.resumable.done()


def train_and_test(
    model: Model,
    name: str,
    sets: tuple[ObjectSet, ObjectSet],
    parts: Parts,
    recipe: Recipe,
    options: DetectionOptions,
    proposals: tuple[ReadProposals | None, ReadProposals | None] = (None, None),
) -> Tested:
    """Train a detector on a set and find objects in another, or continue where an earlier call was stopped; on all ranks.

    Args:
        name: of the protocol.
        proposals: of both sets; None: a region proposal network is trained along.

    Raises:
        TrainingError: a loss is no longer a finite number.
    """
    train, test = sets
    detector = make_detector(model, parts, recipe, options, given=proposals[0] is not None, classes=len(train.class_names))
    batchnorm = chosen_batchnorm(options, recipe)
    groups = [*weight_groups(detector, options.lr, free_biases=recipe.free_biases)]
    targets = Targets(train, difficult=recipe.difficult, proposals=proposals[0])
    samples = Samples(train, targets, training_view(options.short_sides, options.long_side))
    model.work.reporter.say(f"training on {count_of(len(train), 'image')}, testing on {len(test):,}")
    facts = [recipe, digest_of_targets(targets)]
    training, resumable = train_detector(model, name, detector, groups, samples, options, batchnorm, facts)
    given = Targets(test, proposals=proposals[1], objects=False)
    testing = Samples(test, given, test_view(options.test_short_side, options.test_long_side))
    facts = [options.test_short_side, options.test_long_side, options.test_regions, recipe, digest_of_targets(given)]
    found, unreadable, spans = detect_all(model, detector, testing, detections_of(model, detector), *facts)
    about = {
        "stage": parts.stage,
        "stride": parts.cells.stride,
        "region_cells": parts.pooler.size,
        "box_head": parts.head_name,
        "lr_drops": list(options.drops),
        "batchnorm": batchnorm,
    }
    return Tested(train, test, found, unreadable, training.unreadable, spans, resumable, about)


def train_detector(
    model: Model,
    name: str,
    detector: Detector,
    groups: list[dict[str, object]],
    samples: Samples,
    options: SgdOptions,
    batchnorm: str,
    facts: list[object],
) -> tuple[Training[Any], ResumableState]:
    """Train a detector, or continue where an earlier call was stopped, and put it into eval mode; on all ranks.

    Args:
        name, groups, samples, facts: as in `fine_tune`.
        batchnorm: the mode that was chosen.

    Raises:
        TrainingError: a loss is no longer a finite number.
    """
    drops = options.drops
    schedule = Schedule(
        steps=options.steps,
        rate=lambda step: 0.1 ** sum(step >= drop for drop in drops),
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        warmup=options.warmup,
        clip=options.clip or None,
    )
    losses, known = losses_of(model, detector), {"batch_size": options.batch_size, "seed": options.seed}
    try:
        trained = fine_tune(model, name, detector, groups, samples, losses, schedule, options, facts=facts, **known)
    except Diverged as fault:
        raise TrainingError(explained(fault, batchnorm, options.lr)) from fault
    detector.eval()
    return trained


def make_detector(
    model: Model, parts: Parts, recipe: Recipe, options: DetectionOptions, *, given: bool, classes: int
) -> Detector:
    """Return a detector on the model's device, in the mode in which it is trained; new layers are a function of the seed.

    Args:
        given: whether proposals are given; otherwise it has a region proposal network.
    """
    machine = model.machine
    with seeded(options.seed, torch.device("cpu")):
        anchors = FixedAnchors([ANCHORS], [parts.cells])
        counts = BEFORE, (TRAIN_AFTER, options.test_regions)
        rpn = GivenProposals() if given else RegionProposals(parts.width, anchors, *counts, beta=recipe.rpn_beta)
        heads = BoxHeads(
            parts.pooler,
            parts.head,
            FloatPredictor(parts.features, classes),
            regions=options.regions,
            background_from=recipe.background_from,
            beta=recipe.beta,
            scores_from=recipe.scores_from,
            nms=recipe.nms,
        )
    train_from(parts.trunk, recipe.fixed_stage, parts.stage, model.image_size)
    backbone = StageMaps(parts.trunk, [parts.stage])
    detector = Detector(Batching(parts.shift, machine.dtype), backbone, rpn, heads)
    detector.to(device=machine.device, dtype=machine.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    set_batch_norms(detector, chosen_batchnorm(options, recipe), model.work.ranks)
    keep_frozen_statistics(detector)
    if isinstance(parts.head, LastLayer):  # Its statistics are new: as they are, they would be those of no layer.
        parts.head.norm.train().requires_grad_(True)
    return detector


def chosen_batchnorm(options: DetectionOptions, recipe: Recipe) -> str:
    """Return the mode of BatchNorm that the user or the recipe chose."""
    return recipe.batchnorm if options.batchnorm == "auto" else options.batchnorm


def weight_groups(network: nn.Module, lr: float, *, free_biases: bool) -> Iterator[dict[str, object]]:
    """Yield the weights that are trained, in groups with a learning rate and a weight decay each."""
    usual: list[nn.Parameter] = []
    special: list[nn.Parameter] = []
    for layer in network.modules():
        for name, weight in layer.named_parameters(recurse=False):
            if weight.requires_grad:
                is_special = name == "bias" if free_biases else isinstance(layer, _BatchNorm)
                (special if is_special else usual).append(weight)
    yield {"params": usual, "lr": lr}
    if special:
        yield {"params": special, "lr": lr * (2 if free_biases else 1), "weight_decay": 0.0}


def digest_of_targets(targets: Targets) -> str:
    """Return digits that change with the objects and the proposals of any image."""
    digest = sha256()
    for index in range(len(targets.data)):
        for name, value in sorted(targets(index, 1, 1).items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def results_of(name: str, tested: Tested, options: DetectionOptions, notes: list[str], *, coco_like: bool) -> Results:
    """Return the average precisions of what was found.

    Args:
        coco_like: the headline is AP, the mean over IoU thresholds from 0.5 to 0.95; else AP50.
    """
    test = tested.test
    readable = [index for index in range(len(test)) if index not in tested.unreadable]
    found = box_precisions(
        ((tested.detections[index], test.read_objects(index, False)) for index in readable), test.class_names
    )
    counts = {"train_images": len(tested.train), "test_images": len(readable), "classes": len(found.classes)}
    about = {"train": tested.train.source.describe(), "test": test.source.describe(), **counts}
    if found.left_out:
        notes.append(f"{', '.join(found.left_out)}: no object to test on counts, so they are left out of the mean")
    notes += tested.train.left_out(tested.untrained) + test.left_out(tested.unreadable)
    settings = {**options.as_dict(), **tested.settings}
    every = [*tested.train.notes, *test.notes, *notes]
    pictures = pictures_of(test, tested.detections, readable)
    headline = ("AP" if coco_like else "mAP",)
    return Results(name, about, settings, _measures(found, coco_like=coco_like), headline, every, pictures)


def pictures_of(
    test: ObjectSet, detections: list[Detections], readable: list[int], *, masks: bool = False
) -> dict[str, Image]:
    """Return truth and detections of a few readable images of a set, side by side."""
    pictures = {}
    for index in even_sample(range(len(readable)), PICTURES):
        image = readable[index]
        panels: dict[str, Pixels | Detections | Objects] = {
            "truth": test.read_objects(image, masks),
            "detections": detections[image],
        }
        title = test.source.name(image)
        pixels_HWC = decode(test.source.read(image))
        pictures[PurePosixPath(title).stem] = compared(pixels_HWC, panels, test.class_names, title=title)
    return pictures


def _measures(found: BoxPrecisions, *, coco_like: bool) -> dict[str, Measured]:
    if not coco_like:
        area = {"mAP area": found.mean(0.5, area=True)}
        return {"mAP": found.mean(0.5), **area, "AP": found.by_class(0.5)}
    means: dict[str, Measured] = {"AP": found.mean(), "AP50": found.mean(0.5), "AP75": found.mean(0.75)}
    return {**means, "AP by class": found.by_class(), "AP50 by class": found.by_class(0.5)}


def explained(fault: Diverged, batchnorm: str, lr: float) -> str:
    """Return what to do about a loss that is not finite, in a mode of BatchNorm and at a learning rate."""
    if batchnorm == "frozen":
        return (
            f"{fault}. The statistics of BatchNorm are frozen (--batchnorm frozen), with which a rate of {lr:g} may be too "
            f"high: use --lr {lr / 10:g}, or --batchnorm train"
        )
    return f"{fault}; or clip the gradient (--clip 10)"
