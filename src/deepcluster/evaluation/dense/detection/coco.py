"""Detection and segmentation of objects on COCO: Mask R-CNN R50-FPN 1x, box and mask AP on val2017.

All weights are trained for 90,000 steps of 16 images, by detectron2's settings as MoCo uses them (He et al., CVPR 2020; its
authors' words on the pyramid are in facebookresearch/moco, issue 34): BatchNorm of trunk and pyramid over all processes.

It differs in three points: colours are the trunk's own; images are padded by their edges (a Sobel layer would see those of
zeros); and BatchNorm in the test uses its running averages, not statistics of another 200 batches ("precise BN").
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.text import count_of
from deepcluster.evaluation.datasets.coco import (
    CocoFolder,
    check_same_classes,
    crowds,
    image_sizes,
    open_coco,
    read_coco,
    with_objects,
)
from deepcluster.evaluation.datasets.dense import ObjectSet
from deepcluster.evaluation.dense.detection.coco_options import CocoDetectionOptions
from deepcluster.evaluation.dense.detection.freezing import train_from
from deepcluster.evaluation.dense.detection.mask_rcnn import mask_rcnn, pyramid_stages
from deepcluster.evaluation.dense.detection.parts import (
    Detector,
    Targets,
    detect_all,
    detections_of,
    test_view,
    training_view,
)
from deepcluster.evaluation.dense.detection.training import Tested, pictures_of, train_detector, weight_groups
from deepcluster.evaluation.dense.fine_tuning import set_batch_norms
from deepcluster.evaluation.dense.samples import Samples, Target
from deepcluster.evaluation.measures.coco import CocoPrecisions, coco_precisions
from deepcluster.evaluation.results import Measured, Results
from deepcluster.evaluation.trainer import seeded
from deepcluster.run.model import Model

NAME = "coco-detection"


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


def open_sets(folder: CocoFolder, *, masks: bool) -> tuple[ObjectSet, ObjectSet]:
    """Return the images to train on, which have objects, and those to test on.

    Raises:
        InputError: there are no masks, or not the same classes.
    """
    train, test = (read_coco(part, masks=masks) for part in (folder.train, folder.val))
    check_same_classes(train, test)
    for one in (train, test):
        if masks and not one.has_masks:
            raise InputError(f"{one.name}: no object has a mask; --boxes-only trains and tests without masks")
    return with_objects(train), test


def prepare(model: Model, data: Path, options: CocoDetectionOptions) -> Tested:
    """Train a copy of the model on the training images, and find objects in the others; on all ranks.

    Raises:
        InputError: no COCO folder, no masks, or a trunk without the stages of a pyramid.
        TrainingError: the loss is no longer a finite number.
        Interrupted: what is done is kept; the same call continues to exactly the result it would have had.
    """
    folder = open_coco(data)
    stages, masks = [*pyramid_stages(model.trunk)], not options.boxes_only
    train, test = open_sets(folder, masks=masks)
    known = [sha256(part.annotations.read_bytes()).hexdigest() for part in (folder.train, folder.val)]
    model.work.reporter.say(f"training on {count_of(len(train), 'image')}, testing on {len(test):,}")
    detector = make_detector(model, len(train.class_names), options)
    groups = [*weight_groups(detector, options.lr, free_biases=False)]
    targets = SizedTargets(Targets(train, masks), image_sizes(train))
    samples = Samples(train, targets, training_view(options.short_sides, options.long_side))
    batchnorm = chosen_batchnorm(options)
    training, resumable = train_detector(model, NAME, detector, groups, samples, options, batchnorm, [known[0]])
    sides = options.test_short_side, options.test_long_side
    bare = replace(test, coco=None)
    testing = Samples(bare, SizedTargets(Targets(bare, objects=False), image_sizes(test)), test_view(*sides))
    found, unreadable, spans = detect_all(model, detector, testing, detections_of(model, detector), sides, *known)
    about = {"stages": stages, "lr_drops": [*options.drops], "batchnorm": batchnorm}
    return Tested(train, test, found, unreadable, training.unreadable, spans, resumable, about)


def chosen_batchnorm(options: CocoDetectionOptions) -> str:
    """Return the mode of BatchNorm: statistics of all processes, unless the user chose another."""
    return "sync" if options.batchnorm == "auto" else options.batchnorm


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
    set_batch_norms(detector, chosen_batchnorm(options), model.work.ranks)
    return detector


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
    if found["box"].without_objects:
        notes.append(f"classes without objects to test on, left out of the mean: {', '.join(found['box'].without_objects)}")
    notes += tested.train.left_out(tested.untrained) + test.left_out(tested.unreadable)
    counts = {"train_images": len(tested.train), "test_images": len(readable), "classes": len(test.class_names) - 1}
    about = {"train": tested.train.source.describe(), "test": test.source.describe(), **counts, "test_crowds": crowds(test)}
    settings = {**options.as_dict(), **tested.settings}
    pictures = pictures_of(test, tested.detections, readable, masks=not options.boxes_only)
    tested.done()
    return Results(NAME, about, settings, measures, ("box AP",), notes, pictures)


def _named(found: CocoPrecisions) -> dict[str, float]:
    sizes = {"AP small": found.ap_small, "AP medium": found.ap_medium, "AP large": found.ap_large}
    return {"AP": found.ap, "AP50": found.ap50, "AP75": found.ap75, **sizes, "AR100": found.ar100}
