"""A sample of the cells of frozen maps, with their classes: what the frozen protocols of segmentation learn from.

N cells, D channels of a stage, C classes.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.work import Advance
from deepcluster.data.survey import MOST_UNREADABLE
from deepcluster.evaluation.datasets.dense import IGNORED, MaskSet
from deepcluster.evaluation.dense.frozen.maps import FrozenMaps
from deepcluster.evaluation.dense.frozen.places import inside, shares
from deepcluster.evaluation.dense.spans import Spans
from deepcluster.evaluation.trainer import seed_of

# Images of which a stop loses the work.
SPAN = 16


@dataclass(frozen=True)
class Cells:
    """Some cells of the images of a set.

    Attributes:
        rows_ND: on the CPU, in the type in which features are kept.
        shares_NC: share of each class, float32; zeros where no pixel of the cell has a class.
        image_N: index of the image.
    """

    rows_ND: Tensor
    shares_NC: Tensor
    image_N: Tensor


@dataclass(frozen=True)
class CellSample:
    """Cells by stage, the same number from each image that has so many.

    Attributes:
        pixels_C: number of pixels of each class in all images.
        unreadable: why images can't be read, by index.
        spans: where this is kept.
    """

    frozen: FrozenMaps
    data: MaskSet
    parts: list[dict[str, Tensor]]
    pixels_C: Tensor
    unreadable: dict[int, str]
    spans: Spans

    def at(self, stage: str) -> Cells:
        """Return the cells of a stage.

        Raises:
            InputError: there is none.
        """
        number = self.frozen.stages.index(stage)
        rows, shares_, image = (
            torch.cat([part[f"{number}-{name}"] for part in self.parts]) for name in ("rows", "shares", "image")
        )
        if not len(rows):
            raise InputError(f"no cell of {stage} lies on a pixel with a class in {self.data.name}: use a larger --side")
        return Cells(rows, shares_, image)


def sample_cells(frozen: FrozenMaps, data: MaskSet, most: int, *, seed: int, what: str, labelled: bool = True) -> CellSample:
    """Return cells of each stage, drawn at random, the same number from each image; all ranks together.

    An image with fewer cells gives all that it has.

    Args:
        most: number of cells in all; of more images than that one cell each.
        what: name of the work, for the progress line.
        labelled: only cells with labelled pixels; otherwise all that are in the image.

    Raises:
        InputError: a mask can't be used, or more than 10 % of the images can't be read.
    """
    quota, kind = max(1, most // len(data)), frozen.model.machine.feature_dtype
    spans = Spans(frozen.model, len(data), "cells", frozen.key(data), quota, seed, labelled, span=SPAN)

    def make(span: range, advance: Advance) -> dict[str, object]:
        faults: dict[int, str] = {}
        found: dict[str, list[Tensor]] = {}
        pixels_C = torch.zeros(len(data.class_names), dtype=torch.int64)
        with closing(frozen.images(data, span, faults, advance)) as images:
            for image in (one for some in images for one in some):
                pixels_C += torch.bincount(image.mask_HW.flatten(), minlength=IGNORED + 1)[: len(pixels_C)]
                for number, stage in enumerate(frozen.stages):
                    rows_ND, axes = image.rows(stage), image.axes[stage]
                    shares_NC = shares(image.mask_HW.numpy(), axes, len(data.class_names))
                    usable = ((shares_NC.sum(1) > 0) if labelled else inside(axes)).nonzero()[:, 0]
                    generator = torch.Generator().manual_seed(seed_of(seed, image.index, number))
                    chosen = usable[torch.randperm(len(usable), generator=generator)[:quota].sort().values]
                    made = {
                        "rows": rows_ND[chosen.to(rows_ND.device)].to("cpu", kind),
                        "shares": shares_NC[chosen],
                        "image": torch.full((len(chosen),), image.index),
                    }
                    for name, value in made.items():
                        found.setdefault(f"{number}-{name}", []).append(value)
        return {
            "unreadable": faults,
            "pixels": pixels_C,
            "cells": {name: torch.cat(values) for name, values in found.items()},
        }

    made = spans.compute(what, make)
    unreadable = {index: why for one in made for index, why in one["unreadable"].items()}
    check_readable(data, unreadable)
    pixels_C = torch.stack([one["pixels"] for one in made]).sum(0)
    if not pixels_C.any():
        raise InputError(f"{data.name}: no mask of {data.source.describe()} has a pixel with a class")
    return CellSample(frozen, data, [one["cells"] for one in made if one["cells"]], pixels_C, unreadable, spans)


def check_readable(data: MaskSet, unreadable: Mapping[int, str]) -> None:
    """Raise InputError if more than 10 % of the images can't be read."""
    if len(unreadable) > MOST_UNREADABLE * len(data):
        index, why = min(unreadable.items())
        images = f"{len(unreadable):,} of {data.source.describe()} can't be read"
        raise InputError(f"{images}, such as {data.source.name(index)}: {why}")
