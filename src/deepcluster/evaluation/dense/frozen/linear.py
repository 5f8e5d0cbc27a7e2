"""`segmentation-linear`: a linear classifier of the cells of each frozen stage, tested on the pixels of whole images.

The classifier is a 1×1 convolution on standardised channels, fitted by L-BFGS to cells of the training images and the share
of each class among the pixels of a cell. In the test scores are interpolated to the image's own size. The penalty is weak
and fixed: the one of the least cross-entropy on other images would leave little but background in small sets.
N cells, D channels of a stage, C classes.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from deepcluster.core.work import Advance
from deepcluster.evaluation.datasets.masks import MaskParts, open_masks
from deepcluster.evaluation.dense.frozen.cells import CellSample, sample_cells
from deepcluster.evaluation.dense.frozen.maps import FrozenMaps, frozen_maps
from deepcluster.evaluation.dense.frozen.options import SegmentationLinearOptions
from deepcluster.evaluation.dense.frozen.predictions import Score, Tested, results_of, test_stages
from deepcluster.evaluation.dense.spans import Spans
from deepcluster.evaluation.logistic import Logistic, fit_logistic
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model

NAME = "segmentation-linear"


@dataclass(frozen=True)
class Made:
    """What `prepare` makes: the classifiers, as `score`, and their test."""

    parts: MaskParts
    frozen: FrozenMaps
    learned: CellSample
    score: Score
    tested: Tested
    fits: Spans


def prepare(model: Model, data: Path, options: SegmentationLinearOptions) -> Made:
    """Fit a classifier to the cells of each stage, and test it; all ranks together.

    Raises:
        InputError: no masks, the trunk has no such stage or takes no such images, or more than 10 % can't be read.
        Interrupted: what is done is kept; the same call continues.
    """
    parts, device = open_masks(data, options.lists), model.machine.clustering_device
    frozen = frozen_maps(model, options.stages, options.side)
    learned = sample_cells(frozen, parts.train, options.cells, seed=options.seed, what="cells to train on")
    facts = NAME, frozen.key(parts.train), options.cells, options.l2, options.seed
    fits = Spans(model, len(frozen.stages), *facts, span=1)

    def fit(span: range, advance: Advance) -> dict[str, object]:
        cells = learned.at(frozen.stages[span.start])
        n_classes = len(parts.train.class_names)
        found = fit_logistic(
            cells.rows_ND,
            cells.shares_NC,
            n_classes,
            seed=options.seed,
            l2=options.l2,
            device=device,
            advance=lambda _: advance(0),
        )
        advance(1)
        return {"weight": found.weight_CD.cpu(), "bias": found.bias_C.cpu(), "loss": found.loss}

    classifiers = {}
    for stage, kept in zip(frozen.stages, fits.compute("fitting", fit, unit="stages"), strict=True):
        classifiers[stage] = Logistic(kept["weight"].to(device), kept["bias"].to(device), options.l2, kept["loss"])

    def score(stage: str, rows_ND: Tensor) -> Tensor:
        return classifiers[stage].scores(rows_ND.to(device))

    tested = test_stages(frozen, parts.test, score, "testing", *facts)
    return Made(parts, frozen, learned, score, tested, fits)


def evaluate(model: Model, data: Path, options: SegmentationLinearOptions) -> Results:
    """Return mIoU of a linear classifier of each stage; see `prepare` for what is raised."""
    made = prepare(model, data, options)
    results = results_of(NAME, made.parts, made.frozen, options, made.learned, made.tested, made.score)
    for spans in (made.learned.spans, made.fits, made.tested.spans):
        spans.done()
    return results
