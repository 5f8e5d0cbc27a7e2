"""`segmentation-linear`: a linear classifier of the cells of each frozen stage, tested on the pixels of whole images.

The classifier is a 1×1 convolution on standardised channels, fitted by L-BFGS to cells of the training images and the
share of each class among the pixels of a cell. The strength of the penalty is chosen on the cells of a fifth of the
images. In the test scores are interpolated to the image's own size.
N cells, D channels of a stage, C classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.work import Advance
from deepcluster.evaluation.datasets.masks import MaskParts, open_masks
from deepcluster.evaluation.dense.cells import Cells, CellSample, sample_cells
from deepcluster.evaluation.dense.frozen_maps import FrozenMaps, frozen_maps
from deepcluster.evaluation.dense.frozen_options import SegmentationLinearOptions
from deepcluster.evaluation.dense.predictions import Score, Tested, results_of, test_stages
from deepcluster.evaluation.dense.spans import Spans
from deepcluster.evaluation.logistic import HELD_OUT, Logistic, fit_logistic
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model

NAME = "segmentation-linear"
# Fewer images than this are not divided: the strength is chosen on cells of images that are also learned.
FEWEST_IMAGES = 5


def fit_cells(cells: Cells, n_classes: int, *, seed: int, device: torch.device, advance: Advance) -> Logistic:
    """Return the classifier of cells."""
    images = cells.image_N.unique()
    held_N = None
    if len(images) >= FEWEST_IMAGES:
        order = torch.from_numpy(np.random.default_rng([seed, 40]).permutation(len(images)))
        held_N = torch.isin(cells.image_N, images[order[: round(HELD_OUT * len(images))]])
    return fit_logistic(cells.rows_ND, cells.shares_NC, n_classes, seed=seed, held_N=held_N, device=device, advance=advance)


@dataclass(frozen=True)
class Made:
    """What `prepare` makes: the classifiers by stage, and their test."""

    parts: MaskParts
    frozen: FrozenMaps
    learned: CellSample
    classifiers: dict[str, Logistic]
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
    facts = NAME, frozen.key(parts.train), options.cells, options.seed
    fits = Spans(model, len(frozen.stages), *facts, span=1)

    def fit(span: range, advance: Advance) -> dict[str, object]:
        cells = learned.at(frozen.stages[span.start])
        n_classes = len(parts.train.class_names)
        found = fit_cells(cells, n_classes, seed=options.seed, device=device, advance=lambda _: advance(0))
        advance(1)
        return {"weight": found.weight_CD.cpu(), "bias": found.bias_C.cpu(), "l2": found.l2, "loss": found.loss}

    classifiers = {}
    for stage, kept in zip(frozen.stages, fits.compute("fitting", fit, unit="stages"), strict=True):
        classifiers[stage] = Logistic(kept["weight"].to(device), kept["bias"].to(device), kept["l2"], kept["loss"])

    def score(stage: str, rows_ND: Tensor) -> Tensor:
        return classifiers[stage].scores(rows_ND.to(device))

    tested = test_stages(frozen, parts.test, score, "testing", *facts)
    return Made(parts, frozen, learned, classifiers, score, tested, fits)


def evaluate(model: Model, data: Path, options: SegmentationLinearOptions) -> Results:
    """Return mIoU of a linear classifier of each stage; see `prepare` for what is raised."""
    made = prepare(model, data, options)
    settings = {"l2": {stage: one.l2 for stage, one in made.classifiers.items()}}
    results = results_of(NAME, made.parts, made.frozen, options, made.learned, made.tested, made.score, settings)
    for spans in (made.learned.spans, made.fits, made.tested.spans):
        spans.done()
    return results
