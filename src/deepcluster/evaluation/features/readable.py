"""The rows of those images that can be read, with their classes, where neighbours and clusters are looked for.

N images, S images that can be read, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.evaluation.datasets.labelled import Labelled
from deepcluster.run.model import Model, readable
from deepcluster.run.pooling import Pooled


@dataclass(frozen=True)
class ReadableRows:
    """Averaged stages of the images that can be read.

    Attributes:
        rows: (N, D) by stage, on the CPU, maybe in a file; NaN where an image can't be read.
        seen_N: which images can be read.
        labels_S: classes of those.
    """

    rows: dict[str, Tensor]
    seen_N: Tensor
    labels_S: Tensor

    def at(self, stage: str, device: torch.device) -> Tensor:
        """Rows (S, D) of a stage, on a device."""
        rows_ND = self.rows[stage]
        return (rows_ND if bool(self.seen_N.all()) else rows_ND[self.seen_N]).to(device)

    def notes(self, part: str) -> list[str]:
        """What a reader must know of images that are left out."""
        missing = int((~self.seen_N).sum())
        return [f"{part}: {count_of(missing, 'image')} can't be read, and {_is(missing)} left out"] if missing else []


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def readable_rows(model: Model, images: Labelled, stages: Sequence[str]) -> ReadableRows:
    """Averages of the stages over their maps, of all images in one pass.

    Raises:
        InputError: no image can be read.
    """
    wanted = [Pooled(stage) for stage in stages]
    features = model.rows(images.source, wanted)
    seen_N = readable(features[wanted[0]])
    if not bool(seen_N.any()):
        raise InputError(f"none of the images can be read: {images.source.describe()}")
    return ReadableRows({one.stage: features[one] for one in wanted}, seen_N, images.labels_N[seen_N])
