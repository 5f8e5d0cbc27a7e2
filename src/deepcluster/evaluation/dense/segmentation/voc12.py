"""`voc12-segmentation`: fine-tuning for semantic segmentation on Pascal VOC 2012, table 2 of the paper.

Networks with fully connected layers become an FCN-32s (Long, Shelhamer and Darrell, CVPR 2015) with the settings of its
authors' AlexNet: whole images at their own size, one after the other, 20 to a step, a constant rate. The 2018 paper used
that code; with which schedule is not known. Other networks become an FCN with dilation 8, with the settings of OpenMMLab's
self-supervised benchmark.
"""

from pathlib import Path

from deepcluster.evaluation.dense.segmentation.options import FCN32, FCN_D8, VOC12, Voc12SegmentationOptions, check_recipe
from deepcluster.evaluation.dense.segmentation.protocol import Segmentation, evaluate_task, train_and_test
from deepcluster.evaluation.dense.segmentation.task import Task, open_layout
from deepcluster.evaluation.dense.segmentation.views import Scale
from deepcluster.evaluation.results import Results
from deepcluster.evaluation.voc07_classification import fully_connected
from deepcluster.run.model import Model

NAME = "voc12-segmentation"
# The longer side of an image is at most so many times the shorter one: 2,048 for 512 px.
LONGEST = 4


def prepare(model: Model, data: Path, options: Voc12SegmentationOptions) -> Segmentation:
    """Fine-tune a copy of the model and test it; all ranks together.

    Raises:
        InputError: no masks, or images, masks or sizes can't be used.
        TrainingError: the loss is no longer a finite number.
        Interrupted: what was done is kept; the same call continues to exactly the result it would have had.
    """
    return train_and_test(model, task_of(model, data, options))


def evaluate(model: Model, data: Path, options: Voc12SegmentationOptions) -> Results:
    """Fine-tune a copy of the model, and return the mIoU of its predictions; see `prepare` for what is raised."""
    return evaluate_task(model, task_of(model, data, options))


def task_of(model: Model, data: Path, options: Voc12SegmentationOptions) -> Task:
    """Return what is trained, and how."""
    recipe = options.recipe
    if recipe == "auto":
        recipe = FCN32 if fully_connected(model.trunk) else FCN_D8
    options = options.completed(VOC12[recipe])
    check_recipe(options, recipe)
    short = options.short_side or 0
    return Task(NAME, open_layout(data, ("voc", "sbd"), options.lists), options, recipe, Scale(short, LONGEST * short))
