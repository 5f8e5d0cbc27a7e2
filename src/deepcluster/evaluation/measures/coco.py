"""COCO's average precision of boxes and masks, by pycocotools (Lin et al., ECCV 2014).

T = 10 thresholds of IoU, R = 101 recalls, C classes, D detections of an image.
"""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.coco_json import coco_tools
from deepcluster.evaluation.datasets.dense import Detections, ObjectSet

# pycocotools' first nine numbers.
_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")


@dataclass(frozen=True)
class CocoPrecisions:
    """Average precisions, shares of 1; NaN where there are no objects.

    Attributes:
        ap: mean over T thresholds 0.5, 0.55 … 0.95 of the IoU, and over the classes that have objects.
        ap50, ap75: at one threshold.
        ap_small, ap_medium, ap_large: of objects under 32² px, up to 96² px, and larger.
        ar1, ar10, ar100: recall with so many detections of an image, averaged in the same way.
        by_class: `ap` of each class that has objects, by name.
        without_objects: names of the other classes.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    by_class: dict[str, float]
    without_objects: list[str]


def coco_precisions(
    data: ObjectSet, detections: Sequence[Detections], *, masks: bool = False, images: Sequence[int] | None = None
) -> CocoPrecisions:
    """Return the average precisions of the detections in each image of a set, by the IoU of boxes, or of masks.

    Args:
        data: from `read_coco`.
        detections: of each of `images`.
        images: indices of the images that count, where some can't be read; all by default.

    Raises:
        InputError: pycocotools is not installed.
    """
    _, cocoeval, _ = coco_tools()
    ids = [one["id"] for one in data.coco.dataset["images"]]
    counted = list(range(len(ids))) if images is None else list(images)
    found = [
        one
        for index, of_image in zip(counted, detections, strict=True)
        for one in _as_results(ids[index], of_image, data.category_ids, masks=masks)
    ]
    with redirect_stdout(StringIO()):
        test = cocoeval.COCOeval(data.coco, _loaded(data.coco, found), "segm" if masks else "bbox")
        test.params.imgIds = [ids[index] for index in counted]
        test.params.catIds = list(data.category_ids[1:])
        test.evaluate()
        test.accumulate()
        test.summarize()
    totals = {name: float(value) if value >= 0 else nan for name, value in zip(_STATS, test.stats, strict=False)}
    # Of objects of all sizes, with 100 detections of an image.
    precision_TRC: NDArray[np.float64] = test.eval["precision"][:, :, :, 0, -1]
    by_class, without = {}, []
    for number, category in enumerate(test.params.catIds):
        name = data.class_names[data.category_ids.index(category)]
        values = precision_TRC[:, :, number]
        if (values >= 0).any():
            by_class[name] = float(values[values >= 0].mean())
        else:
            without.append(name)
    return CocoPrecisions(**totals, by_class=by_class, without_objects=without)


def _as_results(image: Any, found: Detections, categories: Sequence[int], *, masks: bool) -> list[dict[str, Any]]:
    """Return detections in COCO's format of results; of masks without the box, so that their area is that of the mask."""
    if masks and found.masks is None:
        raise InputError("the detections have no masks")
    shapes: list[dict[str, Any]] = [{"segmentation": one} for one in found.masks or []]
    if not masks:
        sides_D4 = found.boxes_D4.double()
        sides_D4[:, 2:] -= sides_D4[:, :2]
        shapes = [{"bbox": box} for box in sides_D4.tolist()]
    facts = zip(shapes, found.scores_D.tolist(), found.labels_D.tolist(), strict=True)
    return [{"image_id": image, "category_id": categories[label], "score": score, **shape} for shape, score, label in facts]


def _loaded(coco: Any, found: list[dict[str, Any]]) -> Any:
    """Return pycocotools' object of results, of which its own function takes at least one."""
    if found:
        return coco.loadRes(found)
    empty = type(coco)()
    empty.dataset = {**coco.dataset, "annotations": []}
    empty.createIndex()
    return empty
