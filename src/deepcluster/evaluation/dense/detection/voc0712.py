"""Faster R-CNN on Pascal VOC 2007 and 2012, tested on VOC 2007: the detector C4 with MoCo's settings (He et al., CVPR 2020).

Trained are all weights, for 24,000 steps of 16 images, also on objects that are marked "difficult". Of a ResNet, layer1 to
layer3 make the map of the image, and layer4 with another BatchNorm is the head of each region. AP is the mean of the average
precisions at IoU 0.5, 0.55, … 0.95, each with 11 points; beside it are AP50 and AP75.

It differs in two points: the running statistics of BatchNorm are used in the test as they are, where MoCo computes them
again on 200 batches ("precise BN"); and boxes and scores are not rounded before they are measured.
"""

from pathlib import Path

from deepcluster.evaluation.datasets.voc import open_vocs
from deepcluster.evaluation.datasets.voc_boxes import splits_for
from deepcluster.evaluation.dense.detection.box_heads import parts_of
from deepcluster.evaluation.dense.detection.training import Recipe, Tested, results_of, train_and_test
from deepcluster.evaluation.dense.detection.voc_options import Voc0712DetectionOptions
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model

NAME = "voc0712-detection"
SCORES_FROM = 0.05
NMS = 0.5


def prepare(model: Model, data: Path, options: Voc0712DetectionOptions) -> Tested:
    """Train a detector on one split of all VOC devkits in a folder, and find objects in the other; on all ranks.

    Raises:
        InputError: no devkit, no such lists, a damaged annotation, or a trunk that takes images of one size only.
        TrainingError: a loss is no longer a finite number.
        Interrupted: the state is kept; the same call continues to exactly the result it would have had.
    """
    sets = splits_for(open_vocs(data), options.split)
    parts = parts_of(model.copy_of_trunk(), model.image_size, options.seed)
    recipe = Recipe(
        batchnorm="sync",  # Over one process as any other.
        fixed_stage=parts.stage if options.freeze == "body" else "",
        free_biases=False,
        difficult=True,
        beta=0.0,
        rpn_beta=0.0,
        scores_from=SCORES_FROM,
        nms=NMS,
    )
    return train_and_test(model, NAME, sets, parts, recipe, options)


def evaluate(model: Model, data: Path, options: Voc0712DetectionOptions) -> Results:
    """Return AP, AP50 and AP75, with 11 points, of a detector that is trained as `prepare` does."""
    tested = prepare(model, data, options)
    notes = [f"trained on {tested.train.name}, tested on {tested.test.name}"]
    if tested.settings["box_head"] != "layer4":
        notes.append(f"the box head of {model.trunk.arch} is {tested.settings['box_head']}, where a ResNet has layer4")
    results = results_of(NAME, tested, options, notes, coco_like=True)
    tested.done()
    return results
