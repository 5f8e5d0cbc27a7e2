"""Fast R-CNN on Pascal VOC 2007: table 2 of the paper, columns "Detection fc6-8" and "all".

The paper fine-tuned with Caffe's Fast R-CNN (Girshick, ICCV 2015), by the settings of Krähenbühl et al. (ICLR 2016): 150,000
steps of 2 images, short sides of 480 to 1,200 pixels in training and 600 in the test. From Fast R-CNN are the regions of a
step (128 of an image, a quarter of objects, the background of IoU 0.1 to 0.5), the rates and decays of weights and biases,
the fixed first layers, the loss, and the non-maximum suppression.

It differs in three points: the regions are those of a region proposal network, trained along (Ren et al., NeurIPS 2015),
unless a file of others is given, and the background of these starts at IoU 0; BatchNorm stays in the network, with its
statistics and scales frozen, where the paper's weights had absorbed it; and colours are the trunk's own.
"""

from pathlib import Path

from deepcluster.core.files import user_path
from deepcluster.evaluation.datasets.proposals import read_proposals
from deepcluster.evaluation.datasets.voc import open_voc
from deepcluster.evaluation.datasets.voc_boxes import splits_for
from deepcluster.evaluation.dense.detection.box_heads import parts_of
from deepcluster.evaluation.dense.detection.faster_rcnn import BETA
from deepcluster.evaluation.dense.detection.training import Recipe, Tested, results_of, train_and_test
from deepcluster.evaluation.dense.detection.voc_options import Voc07DetectionOptions
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model

NAME = "voc07-detection"
SCORES_FROM = 0.001
NMS = 0.3
BACKGROUND_FROM = 0.1


def prepare(model: Model, data: Path, options: Voc07DetectionOptions) -> Tested:
    """Train a detector on one split of a VOC devkit, and find objects in the other; on all ranks.

    Raises:
        InputError: no devkit, no such lists, a damaged annotation, a trunk that takes images of one size only, or no
            proposals of an image in the file.
        TrainingError: a loss is no longer a finite number.
        Interrupted: the state is kept; the same call continues to exactly the result it would have had.
    """
    sets = splits_for([open_voc(data)], options.split)
    parts = parts_of(model.copy_of_trunk(), model.image_size, options.seed)
    file = options.proposals
    train, test = sets
    given = (None, None) if file is None else (read_proposals(user_path(file), train), read_proposals(user_path(file), test))
    recipe = Recipe(
        batchnorm="frozen",
        fixed_stage=parts.stage if options.finetune == "fc6-8" else parts.fixed_stage,
        free_biases=True,
        difficult=False,
        beta=1.0,
        rpn_beta=BETA,
        scores_from=SCORES_FROM,
        nms=NMS,
        background_from=0.0 if file is None else BACKGROUND_FROM,
    )
    return train_and_test(model, NAME, sets, parts, recipe, options, given)


def evaluate(model: Model, data: Path, options: Voc07DetectionOptions) -> Results:
    """Return mAP at IoU 0.5 with 11 points, as VOC 2007, of a detector that is trained as `prepare` does."""
    tested = prepare(model, data, options)
    notes = []
    if options.proposals is None:
        notes.append("the regions are those of a region proposal network, trained along; the paper used selective search")
    if tested.settings["box_head"] != "fc6-7":
        notes.append(f"{model.trunk.arch} has no fully connected layers: the box head is {tested.settings['box_head']}")
    results = results_of(NAME, tested, options, notes, coco_like=False)
    tested.done()
    return results
