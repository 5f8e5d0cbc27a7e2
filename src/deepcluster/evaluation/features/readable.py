"""Averaged stages of the readable images of a data set, with their classes; kNN and clustering compare them.

N images, S readable images, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.labelled import Labelled
from deepcluster.run.model import Model, readable
from deepcluster.run.pooling import Pooled


@dataclass(frozen=True)
class ReadableRows:
    """Averaged stages of the readable images.

    Attributes:
        images: all images, with their classes.
        rows: (N, D) by stage, on the CPU, possibly in a file; NaN for unreadable images.
        readable_N: which images can be read.
        labels_S: classes of those.
    """

    images: Labelled
    rows: dict[str, Tensor]
    readable_N: Tensor
    labels_S: Tensor

    def at(self, stage: str, device: torch.device) -> Tensor:
        """Return rows (S, D) of a stage, on a device."""
        rows_ND = self.rows[stage]
        return (rows_ND if bool(self.readable_N.all()) else rows_ND[self.readable_N]).to(device)

    def notes(self, part: str) -> list[str]:
        """Return a note on the images of a part that are left out."""
        return self.images.left_out(part, dict.fromkeys((~self.readable_N).nonzero()[:, 0].tolist(), ""))


def readable_rows(model: Model, images: Labelled, stages: Sequence[str]) -> ReadableRows:
    """Return the stages averaged over their maps, of all images in one pass.

    Raises:
        InputError: no image can be read.
    """
    features = model.rows(images.source, [Pooled(stage) for stage in stages])
    readable_N = readable(features[Pooled(stages[0])])
    if not bool(readable_N.any()):
        raise InputError(f"none of the images can be read: {images.source.describe()}")
    rows = {one.stage: rows_ND for one, rows_ND in features.items()}
    return ReadableRows(images, rows, readable_N, images.labels_N[readable_N])
