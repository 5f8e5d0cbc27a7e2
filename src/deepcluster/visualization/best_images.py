"""The images of a data set that excite each channel of a stage most, in one pass that keeps only the best so far.

N images, B batch, C channels, S of them chosen, K images per channel, P pixels of a map. The paper shows nine images of each
of a few channels (section 4.1, figures 5 and 7).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import InputError, TrainingError
from deepcluster.data.sources import ImageSource
from deepcluster.models.receptive_field import ReceptiveField, StageShape, stage_shapes
from deepcluster.models.trunk import normalise
from deepcluster.run.features import FEATURE_BATCH
from deepcluster.run.model import Model
from deepcluster.visualization.options import TopImagesOptions
from deepcluster.visualization.stages import parse_channels

NONE = -1


@dataclass(frozen=True)
class StageImages:
    """The best images of some channels of a stage, best first; ties in the order of the data.

    Attributes:
        stage, channels: the stage, and S of its channels.
        scores_SK: float32; -inf where a channel has fewer than K images. Images with score 0 where no score is lower, as
            after a ReLU, do not excite the channel and are left out.
        indices_SK: int64, image in the source; -1 where there is none.
        cells_SK2: row and column of the unit of the map with the highest activation; -1 where there is no image.
        dead_S: channels that give all images the same score, usually 0.
        field: receptive field of a unit in the view.
        image_size: side of the view in pixels.
    """

    stage: str
    channels: tuple[int, ...]
    scores_SK: NDArray[np.float32]
    indices_SK: NDArray[np.int64]
    cells_SK2: NDArray[np.int64]
    dead_S: NDArray[np.bool_]
    field: ReceptiveField
    image_size: int

    def images(self, row: int) -> range:
        """Return the ranks of the images of the channel in this row."""
        return range(int((self.indices_SK[row] != NONE).sum()))


@dataclass(frozen=True)
class TopImages:
    """The best images of the channels of one or more stages, in the requested order.

    Attributes:
        model, source, options: what was searched, and how.
        unreadable: reason by index.
    """

    stages: tuple[StageImages, ...]
    model: Model
    source: ImageSource
    options: TopImagesOptions
    unreadable: dict[int, str]


def find_top_images(
    model: Model, source: ImageSource, options: TopImagesOptions, *, batch_size: int = FEATURE_BATCH
) -> TopImages:
    """Return the images of a source that excite each channel most, for all stages of `options.stage` in one pass.

    The score of an image is the highest activation of the channel's map in the centre view, or the mean (`options.rank`).

    Raises:
        InputError: no such stage or channel, or no readable image.
        Interrupted: a stop was requested.
        TrainingError: activations are not finite.
    """
    stages = model.stages(options.stage, usual=model.trunk.last_map)
    shapes = stage_shapes(model.trunk, stages, model.image_size)
    wanted, clip = options.channels, len(shapes) > 1
    channels = {name: parse_channels(wanted, one.channels, stage=name, clip=clip) for name, one in shapes.items()}
    best = {name: Best.none(shape.channels, options.count, model.machine.device) for name, shape in shapes.items()}
    deepest, indices_N = max(shapes, key=model.trunk.stages.index), torch.arange(len(source))
    with model.loader(source) as loader, model.work.track("top images", len(source)) as advance:
        for batch in loader.cluster_views(model.view, indices_N, batch_size):
            with torch.no_grad(), model.machine.autocast():
                images_BCHW = normalise(model.machine.put(batch.images_BCHW))
                # Stage by stage, so that the maps of only one are in memory.
                for name, map_BCHW in model.trunk.walk(images_BCHW) if len(images_BCHW) else ():
                    if name in best:
                        best[name] = best[name].merge(map_BCHW, batch.indices_B, options.rank)
                    if name == deepest:
                        break
            advance(len(batch.indices_B))
        unreadable = dict(loader.unreadable)
    n_readable = len(source) - len(unreadable)
    if not n_readable:
        first, reason = min(unreadable.items())
        raise InputError(f"none of the images can be read; {source.name(first)}: {reason}")
    found = tuple(_result(model, name, shapes[name], best[name], channels[name], n_readable) for name in shapes)
    return TopImages(found, model, source, options, unreadable)


@dataclass(frozen=True)
class Best:
    """The best K images of C channels so far, best first; on the device.

    Attributes:
        scores_CK: float32, -inf where there is no image yet.
        indices_CK: int64, image; -1 where there is none.
        cells_CK: int64, unit of the map with the highest activation, counted row by row.
        lowest_C: float32, lowest score of all images so far.
    """

    scores_CK: Tensor
    indices_CK: Tensor
    cells_CK: Tensor
    lowest_C: Tensor

    @classmethod
    def none(cls, n_channels: int, count: int, device: torch.device) -> "Best":
        """Return the best of no images."""
        indices_CK = torch.full((n_channels, count), NONE, device=device)
        scores_CK = torch.full((n_channels, count), -torch.inf, device=device)
        return cls(scores_CK, indices_CK, indices_CK.clone(), -scores_CK[:, 0])

    def merge(self, map_BCHW: Tensor, indices_B: Tensor, rank: str) -> "Best":
        """Return the best of these and of the images of a batch, which come later in the data."""
        map_BCP = map_BCHW.flatten(2)
        peak_BC, cell_BC = map_BCP.max(2)
        score_BC = peak_BC if rank == "peak" else map_BCP.mean(2, dtype=torch.float32)
        scores = torch.cat([self.scores_CK, score_BC.T.float()], 1)
        # A stable order: the earlier of two images with equal scores is first, whatever the batches.
        order_CK = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.scores_CK.shape[1]]
        indices = torch.cat([self.indices_CK, indices_B.to(scores.device).expand(len(scores), -1)], 1)
        cells = torch.cat([self.cells_CK, cell_BC.T], 1)
        scores_CK, indices_CK, cells_CK = (values.gather(1, order_CK) for values in (scores, indices, cells))
        return Best(scores_CK, indices_CK, cells_CK, self.lowest_C.minimum(score_BC.amin(0).float()))


def _result(model: Model, name: str, shape: StageShape, best: Best, channels: tuple[int, ...], n_images: int) -> StageImages:
    """Return the best of `n_images` images for these channels of a stage."""
    values = (best.scores_CK, best.indices_CK, best.cells_CK, best.lowest_C)
    scores_SK, indices_SK, cells_SK, lowest_S = (one.cpu()[list(channels)] for one in values)
    # Activations of -inf would be taken for missing images.
    if not scores_SK[indices_SK != NONE].isfinite().all():
        raise TrainingError(f"{name} of {model.name} gives activations that are not finite numbers")
    idle_SK = (scores_SK == 0) & (lowest_S[:, None] == 0)
    cells_SK2 = torch.stack([cells_SK.div(shape.width, rounding_mode="floor"), cells_SK % shape.width], 2)
    cells_SK2[idle_SK | (indices_SK == NONE)] = NONE
    return StageImages(
        stage=name,
        channels=channels,
        scores_SK=scores_SK.masked_fill(idle_SK, -torch.inf).numpy(),
        indices_SK=indices_SK.masked_fill(idle_SK, NONE).numpy(),
        cells_SK2=cells_SK2.numpy(),
        dead_S=(scores_SK[:, 0] == (0 if n_images == 1 else lowest_S)).numpy(),
        field=shape.field,
        image_size=model.image_size,
    )
