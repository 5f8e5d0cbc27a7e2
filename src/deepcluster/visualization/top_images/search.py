"""The images of a data set that excite each channel of a stage most, in one pass that keeps only the best so far.

N images, B batch, C channels, S of them chosen, K images of each, P pixels of a map. The paper shows nine images of each
of a few channels (section 4.1, figures 5 and 7).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import InputError, TrainingError
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.sources import ImageSource
from deepcluster.data.views import ClusterView
from deepcluster.models.trunk import normalise
from deepcluster.run.features import FEATURE_BATCH
from deepcluster.run.model import Model, data_key
from deepcluster.visualization.channels import chosen_stages, parse_channels
from deepcluster.visualization.options import TopImagesOptions
from deepcluster.visualization.receptive_field import ReceptiveField, StageShape, stage_shapes

# Changes with what the kept state means.
STATE = "top-images-1"
NONE = -1


@dataclass(frozen=True)
class StageImages:
    """The best images of some channels of a stage, the best first; equal ones in the order of the data.

    Attributes:
        stage, channels: S of them.
        scores_SK: float32; -inf where a channel has fewer than K images. Those with score 0 where no score is less, as
            after a ReLU, do not excite it and are left out.
        indices_SK: int64, of the images in the source; -1 where there is none.
        cells_SK2: row and column of the unit of the map where the activation is highest; -1 where there is no image.
        dead_S: channels that tell no image from another: all have the same score, mostly 0.
        field: what a unit sees of the view.
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
        """Ranks of the images that the channel in this row has."""
        return range(int((self.indices_SK[row] != NONE).sum()))

    def view_box(self, row: int, rank: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the receptive field in the view, in pixels, cut off at its border."""
        down, across = self.cells_SK2[row, rank].tolist()
        return self.field.box(down, across, self.image_size)


@dataclass(frozen=True)
class TopImages:
    """The best images of the channels of one or more stages.

    Attributes:
        stages: in the order in which they were asked for.
        count: K.
        rank: what images were ranked by: `peak` or `mean` of the map.
        image_size: side of the view in pixels.
        reduce_to: shorter side of a larger photo before the view was made; 0: never made smaller.
        unreadable: reason by index.
    """

    stages: tuple[StageImages, ...]
    count: int
    rank: str
    image_size: int
    reduce_to: int
    unreadable: dict[int, str]


def find_top_images(
    model: Model, source: ImageSource, options: TopImagesOptions, *, batch_size: int = FEATURE_BATCH
) -> TopImages:
    """The images of a source that excite each channel most, of the stages that `options.stage` names, in one pass.

    A channel's score of an image is the highest activation of its map in the centre view, or the mean (`options.rank`).
    Stopped, it goes on where it was at the next call.

    Raises:
        InputError: no such stage or channel, or no image can be read.
        Interrupted: the person stopped it.
        TrainingError: activations are not numbers.
    """
    shapes = stage_shapes(model.trunk, chosen_stages(model, options.stage), model.image_size)
    chosen = {
        name: parse_channels(options.channels, shape.channels, stage=name, clip=len(shapes) > 1)
        for name, shape in shapes.items()
    }
    search = _Search(model, shapes, options)
    search.run(source, batch_size)
    n_readable = len(source) - len(search.unreadable)
    if not n_readable:
        first, reason = min(search.unreadable.items())
        raise InputError(f"none of the {len(source):,} images can be read; {source.name(first)}: {reason}")
    return TopImages(
        stages=tuple(search.result(name, channels, alone=n_readable == 1) for name, channels in chosen.items()),
        count=options.count,
        rank=options.rank,
        image_size=model.image_size,
        reduce_to=model.settings.reduce_to,
        unreadable=search.unreadable,
    )


@dataclass(frozen=True)
class Best:
    """The best K images of C channels so far, the best first; on the device.

    Attributes:
        scores_CK: float32, -inf where there is no image yet.
        indices_CK: int64 of the images, -1 where there is none.
        cells_CK: int64, which unit of the map is highest, counted line by line.
        lowest_C: float32, the least score of all images so far.
    """

    scores_CK: Tensor
    indices_CK: Tensor
    cells_CK: Tensor
    lowest_C: Tensor

    @classmethod
    def none(cls, n_channels: int, count: int, device: torch.device) -> "Best":
        """No image yet."""
        indices_CK = torch.full((n_channels, count), NONE, device=device)
        scores_CK = torch.full((n_channels, count), -torch.inf, device=device)
        return cls(scores_CK, indices_CK, indices_CK.clone(), -scores_CK[:, 0])

    def merge(self, map_BCHW: Tensor, indices_B: Tensor, rank: str) -> "Best":
        """The best of these and of a batch's images, which come after all of these in the data."""
        map_BCP = map_BCHW.flatten(2)
        peak_BC, cell_BC = map_BCP.max(2)
        score_BC = peak_BC if rank == "peak" else map_BCP.mean(2, dtype=torch.float32)
        scores = torch.cat([self.scores_CK, score_BC.T.float()], 1)
        # A stable order: of equal scores the earlier image is first, whatever the batches.
        order_CK = scores.sort(dim=1, descending=True, stable=True).indices[:, : self.scores_CK.shape[1]]
        indices = torch.cat([self.indices_CK, indices_B.to(scores.device).expand(len(scores), -1)], 1)
        cells = torch.cat([self.cells_CK, cell_BC.T], 1)
        scores_CK, indices_CK, cells_CK = (values.gather(1, order_CK) for values in (scores, indices, cells))
        return Best(scores_CK, indices_CK, cells_CK, self.lowest_C.minimum(score_BC.amin(0).float()))

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the fields."""
        return self.scores_CK, self.indices_CK, self.cells_CK, self.lowest_C


class _Search:
    """One pass over the data; `best` by stage, and how far it is, can be kept and taken up again."""

    def __init__(self, model: Model, shapes: dict[str, StageShape], options: TopImagesOptions) -> None:
        self.model, self.shapes, self.options = model, shapes, options
        device = model.machine.device
        self.best = {name: Best.none(shape.channels, options.count, device) for name, shape in shapes.items()}
        self.done = 0
        self.unreadable: dict[int, str] = {}

    def run(self, source: ImageSource, batch_size: int) -> None:
        model, options = self.model, self.options
        stages = tuple(self.shapes)
        facts = (
            STATE,
            data_key(source),
            model.image_size,
            model.settings.reduce_to,
            stages,
            options.count,
            options.rank,
            batch_size,
        )
        unfinished = model.resumable(*facts)
        kept = unfinished.load()
        if kept is not None:
            self._take_up(kept)
        with model.loader(source) as loader, model.work.reporter.track("top images", len(source)) as progress:
            progress(self.done)
            left_N = torch.arange(self.done, len(source))
            for batch in loader.cluster_views(ClusterView(model.image_size), left_N, batch_size):
                self._look(batch)
                n_images = min(batch_size, len(source) - self.done)
                self.done += n_images
                progress(n_images)
                unfinished.check(lambda: self._state(loader))
            self.unreadable |= loader.unreadable
        unfinished.done()

    def _look(self, batch: Batch) -> None:
        """Take the batch's images in, stage by stage: the maps of one stage at a time are in memory."""
        if not len(batch.indices_B):
            return
        wanted = set(self.best)
        with torch.no_grad(), self.model.machine.autocast():
            for name, map_BCHW in self.model.trunk.walk(normalise(self.model.machine.put(batch.images_BCHW))):
                if name in wanted:
                    self.best[name] = self.best[name].merge(map_BCHW, batch.indices_B, self.options.rank)
                    wanted.remove(name)
                if not wanted:
                    break

    def _state(self, loader: Loader) -> dict[str, Any]:
        # The loader is ahead: what it has found unreadable beyond `done` is found again.
        unreadable = {index: reason for index, reason in loader.unreadable.items() if index < self.done}
        best = {name: best.tensors() for name, best in self.best.items()}
        return {"done": self.done, "unreadable": self.unreadable | unreadable, "best": best}

    def _take_up(self, state: dict[str, Any]) -> None:
        self.done, self.unreadable = state["done"], state["unreadable"]
        device = self.model.machine.device
        self.best = {name: Best(*(values.to(device) for values in best)) for name, best in state["best"].items()}

    def result(self, name: str, channels: tuple[int, ...], *, alone: bool) -> StageImages:
        """The best images of these channels of a stage; `alone`: there was one image."""
        best, shape = self.best[name], self.shapes[name]
        kept = Best(*(values.cpu()[list(channels)] for values in best.tensors()))
        # The images' own -inf would be no number either.
        if not kept.scores_CK[kept.indices_CK != NONE].isfinite().all():
            raise TrainingError(f"{name} of {self.model.name} gives activations that are not finite numbers")
        dead_S = kept.scores_CK[:, 0] == (0 if alone else kept.lowest_C)
        idle_SK = (kept.scores_CK == 0) & (kept.lowest_C[:, None] == 0)
        cells_SK2 = torch.stack([kept.cells_CK.div(shape.width, rounding_mode="floor"), kept.cells_CK % shape.width], 2)
        cells_SK2[idle_SK | (kept.indices_CK == NONE)] = NONE
        return StageImages(
            stage=name,
            channels=channels,
            scores_SK=kept.scores_CK.masked_fill(idle_SK, -torch.inf).numpy(),
            indices_SK=kept.indices_CK.masked_fill(idle_SK, NONE).numpy(),
            cells_SK2=cells_SK2.numpy(),
            dead_S=dead_S.numpy(),
            field=shape.field,
            image_size=self.model.image_size,
        )
