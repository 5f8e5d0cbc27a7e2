"""Detection and segmentation of objects on COCO: Mask R-CNN R50-FPN 1x, box and mask AP on val2017.

All weights are trained for 90,000 steps of 16 images, by detectron2's settings as MoCo uses them (He et al., CVPR 2020; its
authors' words on the pyramid are in facebookresearch/moco, issue 34): BatchNorm of trunk and pyramid over all processes.

It differs in three points: colours are the trunk's own; images are padded by their edges (a Sobel layer would see those of
zeros); and BatchNorm in the test uses its running averages, not statistics of another 200 batches ("precise BN").
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepcluster.core.errors import InputError, TrainingError, UnreadableImage
from deepcluster.core.text import count_of
from deepcluster.data.decode import decode
from deepcluster.data.survey import even_sample
from deepcluster.evaluation.datasets.coco import (
    check_same_classes,
    crowds,
    image_sizes,
    open_coco,
    read_coco,
    with_objects,
)
from deepcluster.evaluation.datasets.dense import Detections, Objects, ObjectSet
from deepcluster.evaluation.dense.coco_options import CocoDetectionOptions
from deepcluster.evaluation.dense.detection import (
    Detector,
    Targets,
    detect_all,
    detections_of,
    losses_of,
    test_view,
    training_view,
)
from deepcluster.evaluation.dense.fine_tuning import Schedule, fine_tune, set_batch_norms
from deepcluster.evaluation.dense.freezing import train_from
from deepcluster.evaluation.dense.mask_rcnn import mask_rcnn, pyramid_stages
from deepcluster.evaluation.dense.pictures import Pixels, compared
from deepcluster.evaluation.dense.samples import Samples, Target
from deepcluster.evaluation.dense.spans import Spans
from deepcluster.evaluation.measures.coco import CocoPrecisions, coco_precisions
from deepcluster.evaluation.results import Measured, Results
from deepcluster.evaluation.trainer import Diverged, seeded
from deepcluster.run.model import Model
from deepcluster.run.resumable import ResumableState

NAME = "coco-detection"


@dataclass(frozen=True)
class Tested:
    """A detector after its training and its test.

    Attributes:
        train: images that have objects.
        without: number of images to train on that have none.
        detections: of each image to test on.
        untrained, unreadable: why images to train on, and to test on, can't be read, by index.
    """

    train: ObjectSet
    test: ObjectSet
    without: int
    stages: list[str]
    detections: list[Detections]
    untrained: dict[int, str]
    unreadable: dict[int, str]
    spans: Spans
    resumable: ResumableState


@dataclass(frozen=True)
class SizedTargets:
    """Targets of images whose size is that for which they were annotated."""

    targets: Targets
    sizes_N2: NDArray[np.int64]

    def __call__(self, index: int, height: int, width: int) -> Target:
        """Return the target of an image; raise `UnreadableImage` if the image has another size."""
        wanted = tuple(self.sizes_N2[index].tolist())
        if wanted != (height, width):
            raise UnreadableImage(f"it has {width} x {height} pixels, and was annotated with {wanted[1]} x {wanted[0]}")
        return self.targets(index, height, width)


def prepare(model: Model, data: Path, options: CocoDetectionOptions) -> Tested:
    """Train a copy of the model on the training images, and find objects in the others; on all ranks.

    Raises:
        InputError: no COCO folder, no masks, or a trunk without the stages of a pyramid.
        TrainingError: the loss is no longer a finite number.
        Interrupted: what is done is kept; the same call continues to exactly the result it would have had.
    """
    stages = [*pyramid_stages(model.trunk)]
    folder = open_coco(data)
    masks = not options.boxes_only
    whole, test = (read_coco(part, masks=masks) for part in (folder.train, folder.val))
    check_same_classes(whole, test)
    for one in (whole, test):
        if masks and not one.has_masks:
            raise InputError(f"{one.name}: no object has a mask; --boxes-only trains and tests without masks")
    train = with_objects(whole)
    model.work.reporter.say(f"training on {count_of(len(train), 'image')}, testing on {len(test):,}")
    known = [sha256(part.annotations.read_bytes()).hexdigest() for part in (folder.train, folder.val)]
    detector = make_detector(model, len(train.class_names), options)
    drops = options.drops
    schedule = Schedule(
        options.steps,
        lambda step: 0.1 ** sum(step >= drop for drop in drops),
        options.momentum,
        options.weight_decay,
        warmup=options.warmup,
        clip=options.clip or None,
    )
    samples = Samples(
        train, SizedTargets(Targets(train, masks), image_sizes(train)), training_view(options.short_sides, options.long_side)
    )
    try:
        training, resumable = fine_tune(
            model,
            NAME,
            detector,
            [*weight_groups(detector, options)],
            samples,
            losses_of(model, detector),
            schedule,
            options,
            batch_size=options.batch_size,
            seed=options.seed,
            facts=known[:1],
        )
    except Diverged as fault:
        advice = "or --batchnorm train" if options.batchnorm == "frozen" else "or clip the gradient (--clip 10)"
        raise TrainingError(f"{fault}; {advice}") from fault
    detector.eval()
    sides = options.test_short_side, options.test_long_side
    bare = replace(test, coco=None)
    testing = Samples(bare, SizedTargets(Targets(bare, objects=False), image_sizes(test)), test_view(*sides))
    found, unreadable, spans = detect_all(model, detector, testing, detections_of(model, detector), sides, *known)
    empty = len(whole) - len(train)
    return Tested(train, test, empty, stages, found, training.unreadable, unreadable, spans, resumable)


def make_detector(model: Model, classes: int, options: CocoDetectionOptions) -> Detector:
    """Return a detector on the model's device, in the mode in which it is trained; new layers are a function of the seed."""
    trunk, machine = model.copy_of_trunk(), model.machine
    with seeded(options.seed, torch.device("cpu")):
        detector = mask_rcnn(
            trunk,
            classes,
            masks=not options.boxes_only,
            norm=options.batchnorm != "frozen",
            regions=options.regions,
            dtype=machine.dtype,
        )
    train_from(trunk, "", [*pyramid_stages(trunk)][-1], model.image_size)
    detector.to(device=machine.device, dtype=machine.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    set_batch_norms(detector, "sync" if options.batchnorm == "auto" else options.batchnorm, model.work.ranks)
    return detector


def weight_groups(network: nn.Module, options: CocoDetectionOptions) -> Iterator[dict[str, object]]:
    """Yield the weights that are trained, those of BatchNorm last and without decay."""
    usual: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    for layer in network.modules():
        chosen = norms if isinstance(layer, _BatchNorm) else usual
        chosen += [weight for weight in layer.parameters(recurse=False) if weight.requires_grad]
    yield {"params": usual, "lr": options.lr}
    if norms:
        yield {"params": norms, "lr": options.lr, "weight_decay": 0.0}


def evaluate(model: Model, data: Path, options: CocoDetectionOptions) -> Results:
    """Return the average precisions of boxes and masks after `prepare`, whose work is then deleted.

    Raises:
        InputError, TrainingError, Interrupted: as `prepare`.
    """
    tested = prepare(model, data, options)
    test = tested.test
    readable = [index for index in range(len(test)) if index not in tested.unreadable]
    if not readable:
        raise InputError(f"none of the images can be read: {test.source.describe()}")
    model.work.reporter.say("matching detections with objects")
    detections = [tested.detections[index] for index in readable]
    kinds = ["box"] if options.boxes_only else ["box", "mask"]
    found = {kind: coco_precisions(test, detections, masks=kind == "mask", images=readable) for kind in kinds}
    measures: dict[str, Measured] = {}
    for kind, one in found.items():
        measures |= {f"{kind} {name}": value for name, value in _named(one).items()}
    measures |= {f"{kind} AP by class": one.by_class for kind, one in found.items()}
    notes = [*tested.train.notes, *test.notes]
    if tested.without:
        notes.append(f"{count_of(tested.without, 'training image')} without objects left out, as in the published set-ups")
    if found["box"].without_objects:
        notes.append(f"classes without objects to test on, left out of the mean: {', '.join(found['box'].without_objects)}")
    notes += tested.train.left_out(tested.untrained) + test.left_out(tested.unreadable)
    counts = {"train_images": len(tested.train), "test_images": len(readable), "classes": len(test.class_names) - 1}
    about = {"train": tested.train.source.describe(), "test": test.source.describe(), **counts, "test_crowds": crowds(test)}
    batchnorm = "sync" if options.batchnorm == "auto" else options.batchnorm
    settings = {**options.as_dict(), "lr_drops": [*options.drops], "stages": tested.stages, "batchnorm": batchnorm}
    pictures = drawn(test, tested.detections, even_sample(readable, options.pictures), masks=not options.boxes_only)
    tested.spans.done()
    tested.resumable.done()
    return Results(NAME, about, settings, measures, ("box AP",), notes, pictures)


def drawn(
    data: ObjectSet, detections: Sequence[Detections], images: Sequence[int], *, masks: bool
) -> dict[str, Image.Image]:
    """Return truth and predictions of some images of a set side by side, by name of the image."""
    found = {}
    for index in images:
        panels: dict[str, Pixels | Detections | Objects] = {
            "truth": data.read_objects(index, masks),
            "predictions": detections[index],
        }
        name = data.source.name(index)
        found[Path(name).stem] = compared(decode(data.source.read(index)), panels, data.class_names, title=name)
    return found


def _named(found: CocoPrecisions) -> dict[str, float]:
    sizes = {"AP small": found.ap_small, "AP medium": found.ap_medium, "AP large": found.ap_large}
    return {"AP": found.ap, "AP50": found.ap50, "AP75": found.ap75, **sizes, "AR100": found.ar100}
