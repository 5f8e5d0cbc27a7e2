"""`cityscapes-segmentation`: fine-tuning for semantic segmentation on Cityscapes, tested by sliding windows.

The network is an FCN with dilation 8, with the settings of OpenMMLab's self-supervised benchmark: crops of 769 px, 40,000
steps of 8; windows of 769 px, 513 px apart, whose scores are averaged.
"""

from dataclasses import replace
from pathlib import Path

from deepcluster.evaluation.dense.segmentation.options import CITYSCAPES, FCN_D8, CityscapesSegmentationOptions
from deepcluster.evaluation.dense.segmentation.protocol import Segmentation, evaluate_task, train_and_test
from deepcluster.evaluation.dense.segmentation.task import Task, open_layout
from deepcluster.evaluation.dense.segmentation.views import Scale
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model

NAME = "cityscapes-segmentation"
# Of images of 2048 x 1024 pixels.
CROP, SHORT, LONG = 769, 1025, 2049


def prepare(model: Model, data: Path, options: CityscapesSegmentationOptions) -> Segmentation:
    """Fine-tune a copy of the model and test it; all ranks together.

    Raises:
        InputError: no masks, or images, masks or sizes can't be used.
        TrainingError: the loss is no longer a finite number.
        Interrupted: what was done is kept; the same call continues to exactly the result it would have had.
    """
    return train_and_test(model, task_of(model, data, options))


def evaluate(model: Model, data: Path, options: CityscapesSegmentationOptions) -> Results:
    """Fine-tune a copy of the model, and return the mIoU of its predictions; see `prepare` for what is raised."""
    return evaluate_task(model, task_of(model, data, options))


def task_of(model: Model, data: Path, options: CityscapesSegmentationOptions) -> Task:
    """Return what is trained, and how."""
    options = options.completed(CITYSCAPES)
    short = options.short_side or SHORT
    options = replace(options, crop=options.crop or round(short * CROP / SHORT))
    scale = Scale(short, round(short * LONG / SHORT))
    return Task(NAME, open_layout(data, ("cityscapes",)), options, FCN_D8, scale, slides=True, align_corners=True)
