"""`segmentation-knn`: classes of cells by the votes of the nearest cells of the training images; nothing is trained.

Balazevic et al. (NeurIPS 2023, "Towards in-context scene understanding"): a memory of cells of unit length, with the share
of each class in them; a cell of a test image gets the mean of the shares of its 30 nearest, weighted by the softmax of
cosine / 0.02 (the temperature is from memory), which is interpolated to the image's own size. There the memory prefers
cells of rare classes and is filled from augmented views; here each image gives the same number of cells, drawn at random
from one view.
N cells, M cells of the memory, D channels of a stage, C classes, K neighbours, B cells of a block.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.masks import MaskParts, open_masks
from deepcluster.evaluation.dense.frozen.cells import CellSample, sample_cells
from deepcluster.evaluation.dense.frozen.maps import FrozenMaps, frozen_maps
from deepcluster.evaluation.dense.frozen.options import SegmentationKnnOptions
from deepcluster.evaluation.dense.frozen.predictions import Score, Tested, results_of, test_stages
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model

NAME = "segmentation-knn"
# Shares of neighbours that are averaged at once, B·K·C numbers.
BLOCK_NUMBERS = 1 << 24


def vote(rows_ND: Tensor, memory_MD: Tensor, shares_MC: Tensor, *, k: int, temperature: float) -> Tensor:
    """Return the mean of the class shares of the k nearest cells of the memory (N, C), weighted by softmax(cosine / t)."""
    cosines_NK, nearest_NK = nearest_neighbours(rows_ND, memory_MD, k=k, metric="cosine")
    weights_NK = (cosines_NK / temperature).softmax(1)
    step = max(1, BLOCK_NUMBERS // (k * shares_MC.shape[1]))
    blocks = zip(weights_NK.split(step), nearest_NK.split(step), strict=True)
    return torch.cat([torch.bmm(weights_BK[:, None], shares_MC[near_BK])[:, 0] for weights_BK, near_BK in blocks])


@dataclass(frozen=True)
class Made:
    """What `prepare` makes: the memory, and its test."""

    parts: MaskParts
    frozen: FrozenMaps
    memory: CellSample
    score: Score
    tested: Tested


def prepare(model: Model, data: Path, options: SegmentationKnnOptions) -> Made:
    """Fill the memory, and let it vote on the cells of the test images; all ranks together.

    Raises:
        InputError: no masks, the trunk has no such stage or takes no such images, k is over the number of cells, or more
            than 10 % of the images can't be read.
        Interrupted: what is done is kept; the same call continues.
    """
    parts, device = open_masks(data, options.lists), model.machine.clustering_device
    frozen = frozen_maps(model, options.stages, options.side)
    memory = sample_cells(frozen, parts.train, options.memory, seed=options.seed, what="cells of the memory")
    found = {stage: memory.at(stage) for stage in frozen.stages}
    fewest = min(found, key=lambda stage: len(found[stage].rows_ND))
    if options.k > (count := len(found[fewest].rows_ND)):
        raise InputError(
            f"k={options.k} neighbours are more than the {count:,} cells of {fewest}; use --k {count} or less, a larger "
            "--memory or a larger --side"
        )
    known = {stage: (cells.rows_ND.to(device), cells.shares_NC.to(device)) for stage, cells in found.items()}

    def score(stage: str, rows_ND: Tensor) -> Tensor:
        return vote(rows_ND.to(device), *known[stage], k=options.k, temperature=options.temperature)

    facts = NAME, frozen.key(parts.train), options.memory, options.k, options.temperature, options.seed
    return Made(parts, frozen, memory, score, test_stages(frozen, parts.test, score, "testing", *facts))


def evaluate(model: Model, data: Path, options: SegmentationKnnOptions) -> Results:
    """Return mIoU of the votes in each stage; see `prepare` for what is raised."""
    made = prepare(model, data, options)
    results = results_of(NAME, made.parts, made.frozen, options, made.memory, made.tested, made.score)
    for spans in (made.memory.spans, made.tested.spans):
        spans.done()
    return results
