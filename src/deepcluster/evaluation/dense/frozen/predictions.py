"""Classes of pixels from scores of cells: the test that the frozen protocols of segmentation share.

N cells, D channels of a stage, C classes, H and W pixels of an image at its own size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
from PIL.Image import Image
from torch import Tensor

from deepcluster.core.options import Checked
from deepcluster.core.work import Advance
from deepcluster.data.decode import decode
from deepcluster.data.survey import even_sample
from deepcluster.evaluation.datasets.dense import MaskSet
from deepcluster.evaluation.datasets.masks import MaskParts
from deepcluster.evaluation.dense.frozen.cells import SPAN, CellSample, check_readable
from deepcluster.evaluation.dense.frozen.maps import FrozenMaps, ImageCells
from deepcluster.evaluation.dense.frozen.places import upsampled
from deepcluster.evaluation.dense.pictures.compared import compared
from deepcluster.evaluation.dense.spans import Spans
from deepcluster.evaluation.measures.confusion import confusion, segmentation_scores
from deepcluster.evaluation.results import Measured, Results

# Images of which the predictions are drawn.
PICTURES = 6

# Returns scores (N, C) of the cells (N, D), float32, of a stage.
Score = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Tested:
    """The test of each stage.

    Attributes:
        pixels_CC: number of pixels by stage, class (row) and predicted class (column), int64.
        unreadable: why images can't be read, by index.
        spans: where this is kept.
    """

    pixels_CC: dict[str, Tensor]
    unreadable: dict[int, str]
    spans: Spans


def predictions(images: Sequence[ImageCells], stage: str, score: Score) -> Iterator[Tensor]:
    """Yield the class of each pixel (H, W) of some images: the highest score, interpolated between cells."""
    rows = [image.rows(stage).float() for image in images]
    scores_NC = score(stage, torch.cat(rows))
    for image, some_NC in zip(images, scores_NC.split([len(one) for one in rows]), strict=True):
        down, across = image.axes[stage]
        scores_IJC = some_NC.reshape(down.cells, across.cells, -1)
        yield torch.cat([scores.argmax(2) for scores in upsampled(scores_IJC, (down, across))]).cpu()


def test_stages(frozen: FrozenMaps, data: MaskSet, score: Score, what: str, *facts: object) -> Tested:
    """Compare the predictions of each stage with the masks, at the images' own size; all ranks together.

    Args:
        what: name of the work, for the progress line.
        facts: what the scores depend on, beside the model and the images that are tested.

    Raises:
        InputError: a mask can't be used, or more than 10 % of the images can't be read.
    """
    n_classes = len(data.class_names)
    spans = Spans(frozen.model, len(data), "tested", frozen.key(data), *facts, span=SPAN)

    def make(span: range, advance: Advance) -> dict[str, object]:
        faults: dict[int, str] = {}
        counts = [torch.zeros(n_classes, n_classes, dtype=torch.int64) for _ in frozen.stages]
        with closing(frozen.images(data, span, faults, advance)) as batches:
            for images in batches:
                for counts_CC, stage in zip(counts, frozen.stages if images else (), strict=bool(images)):
                    for image, classes_HW in zip(images, predictions(images, stage, score), strict=True):
                        counts_CC += confusion(image.mask_HW, classes_HW, n_classes)
                    advance(0)
        return {"counts": torch.stack(counts), "unreadable": faults}

    made = spans.compute(what, make)
    unreadable = {index: why for one in made for index, why in one["unreadable"].items()}
    check_readable(data, unreadable)
    total = torch.stack([one["counts"] for one in made]).sum(0)
    return Tested(dict(zip(frozen.stages, total, strict=True)), unreadable, spans)


def results_of(
    protocol: str,
    parts: MaskParts,
    frozen: FrozenMaps,
    options: Checked,
    learned: CellSample,
    tested: Tested,
    score: Score,
) -> Results:
    """Return the scores of each stage; the headline and the pictures are of the one with the highest mIoU.

    Args:
        learned: the cells of the training images.
    """
    names = parts.test.class_names
    scores = {stage: segmentation_scores(pixels_CC, names) for stage, pixels_CC in tested.pixels_CC.items()}
    best = max(scores, key=lambda stage: scores[stage].miou)
    results: dict[str, Measured] = {
        "mIoU": {stage: one.miou for stage, one in scores.items()},
        "pixel accuracy": {stage: one.pixel_accuracy for stage, one in scores.items()},
        "mean accuracy": {stage: one.mean_accuracy for stage, one in scores.items()},
        "IoU": scores[best].iou,
    }
    notes = [*parts.notes, *frozen.notes, *parts.train.left_out(learned.unreadable), *parts.test.left_out(tested.unreadable)]
    notes.append(f"IoU by class is that of {best}, the stage with the highest mIoU")
    unlearned = [name for name, count in zip(names, learned.pixels_C.tolist(), strict=True) if not count]
    notes += missing_classes(unlearned, f"no pixel to train on ({parts.train.name}) shows them")
    notes += missing_classes(
        scores[best].absent,
        f"no pixel to test on ({parts.test.name}) shows them; only where they are predicted are they in the mean, as 0",
    )
    shown = options.as_dict() | frozen.settings()

    def classes_of(images: Sequence[ImageCells]) -> Iterator[Tensor]:
        return predictions(images, best, score)

    pictures = draw(frozen.only(best), parts.test, classes_of)
    return Results(protocol, parts.describe(), shown, results, ("mIoU", best), notes, pictures)


def draw(
    frozen: FrozenMaps, data: MaskSet, classes_of: Callable[[Sequence[ImageCells]], Iterator[Tensor]]
) -> dict[str, Image]:
    """Return pictures of image, truth and prediction of a few images, spread evenly over the set, by name.

    Args:
        frozen: the maps of one stage.
        classes_of: yields the class of each pixel of some images.
    """
    indices = even_sample(range(len(data)), PICTURES)
    found: dict[str, Image] = {}
    with frozen.model.work.track("pictures", len(indices)) as advance:
        for images in frozen.images(data, indices, {}, advance):
            for image, classes_HW in zip(images, classes_of(images) if images else (), strict=True):
                name = data.source.name(image.index)
                panels = {"truth": image.mask_HW.numpy(), f"prediction, {frozen.stages[0]}": classes_HW.byte().numpy()}
                pixels_HWC = decode(data.source.read(image.index))
                found[PurePosixPath(name).stem] = compared(pixels_HWC, panels, data.class_names, title=name)
    return found


def missing_classes(names: Sequence[str], why: str) -> list[str]:
    """Return a note on classes without pixels; none if there are none."""
    return [f"{', '.join(names)}: {why}"] if names else []
