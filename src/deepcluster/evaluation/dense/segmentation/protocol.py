"""The protocols that fine-tune a network for segmentation: training, test and measures.

C classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.core.work import Advance
from deepcluster.evaluation.dense.segmentation.options import FCN32
from deepcluster.evaluation.dense.segmentation.task import Task, masks_key
from deepcluster.evaluation.dense.segmentation.test import pictures_of, test_span
from deepcluster.evaluation.dense.segmentation.training import train
from deepcluster.evaluation.dense.spans import Spans
from deepcluster.evaluation.measures.confusion import segmentation_scores
from deepcluster.evaluation.results import Results
from deepcluster.evaluation.trainer import Training
from deepcluster.run.model import Model, data_key
from deepcluster.run.resumable import ResumableState


@dataclass(frozen=True)
class Segmentation:
    """A trained network and its test.

    Attributes:
        counts_CC: pixels by true class and predicted class, of all images.
        unreadable: why images to test on can't be read, by index.
    """

    training: Training[nn.Module]
    resumable: ResumableState
    spans: Spans
    counts_CC: Tensor
    unreadable: dict[int, str]

    def done(self) -> None:
        """Delete what is kept."""
        self.spans.done()
        self.resumable.done()


def train_and_test(model: Model, task: Task) -> Segmentation:
    """Fine-tune a copy of the model and test it, or find what an earlier call kept; all ranks together.

    Raises:
        InputError: images, masks or sizes can't be used.
        TrainingError: the loss is no longer a finite number.
        Interrupted: what was done is kept; the same call continues to exactly the result it would have had.
    """
    images = f"{count_of(len(task.parts.train), 'image')}, testing on {len(task.parts.test):,}"
    test = task.parts.test
    # All masks of the test, so that what is wrong with one is known before the training.
    test_masks = masks_key(test, len(test))
    model.work.reporter.say(f"{task.protocol} ({task.recipe}): {count_of(task.options.steps or 0, 'step')} on {images}")
    training, resumable = train(model, task)
    facts = (task.protocol, task.key(), sorted(task.options.as_dict().items()), data_key(task.parts.train.source))
    spans = Spans(model, len(test), *facts, data_key(test.source), test_masks)

    def of_span(span: range, advance: Advance) -> dict[str, Any]:
        return test_span(model, training.network, task, span, advance)

    found = spans.compute("testing", of_span)
    counts_CC = torch.stack([one["counts"] for one in found]).sum(dim=0)
    unreadable = {index: why for one in found for index, why in one["unreadable"].items()}
    return Segmentation(training, resumable, spans, counts_CC, unreadable)


def evaluate_task(model: Model, task: Task) -> Results:
    """Train and test, measure, and delete what was kept.

    Raises:
        InputError: as `train_and_test`, or no pixel of the images to test on has a class.
    """
    made, (train_set, test_set) = train_and_test(model, task), (task.parts.train, task.parts.test)
    if not made.counts_CC.any():
        raise InputError(f"{test_set.name}: no image that can be read has a pixel with a class")
    scores = segmentation_scores(made.counts_CC, test_set.class_names)
    notes = list(task.parts.notes)
    if scores.absent:
        notes.append(f"no image to test on shows {', '.join(scores.absent)}: in the mean, as 0, only where predicted")
    if task.options.finetune == "fc6-8" and task.recipe != FCN32:
        notes.append(f"{task.recipe} has no fully connected layers: only the new layers are trained")
    notes += train_set.left_out(made.training.unreadable) + test_set.left_out(made.unreadable)
    about = {**task.parts.describe(), "test_images": len(test_set) - len(made.unreadable)}
    settings = {**task.options.as_dict(), "recipe": task.recipe, "crop": task.crop}
    results = {"mIoU": scores.miou, "pixel accuracy": scores.pixel_accuracy, "mean accuracy": scores.mean_accuracy}
    pictures = pictures_of(model, made.training.network, task)
    found = Results(task.protocol, about, settings, {**results, "IoU": scores.iou}, ("mIoU",), notes, pictures)
    made.done()
    return found
