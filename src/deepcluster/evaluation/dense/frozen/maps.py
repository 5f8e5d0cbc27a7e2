"""Maps of whole images of any size from a frozen trunk, as the frozen protocols of segmentation use them.

A cell is a position of the map of a stage. Images go through the trunk one at a time: in a batch they would need padding,
which changes their maps.
D channels of a stage, H and W pixels, I and J rows and columns of a map.
"""

from bisect import bisect_left
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import resize

from deepcluster.core.errors import InputError
from deepcluster.core.work import Advance
from deepcluster.data.survey import even_sample
from deepcluster.evaluation.datasets.dense import MaskSet
from deepcluster.evaluation.dense.frozen.options import LAST
from deepcluster.evaluation.dense.frozen.places import Axis
from deepcluster.evaluation.dense.samples import MASK, ReadMask, Samples, Target
from deepcluster.evaluation.regions import padded
from deepcluster.models.geometry import Geometry, geometry
from deepcluster.models.trunk import FEATURES
from deepcluster.run.features import Pooled
from deepcluster.run.model import Model, data_key
from deepcluster.run.resumable import digest_of

# Images whose cells are worked on at once.
TOGETHER = 8
# Masks by which a data set is known, beside the names and times of its images.
COMPARED_MASKS = 16
USUAL_SCALE = 2


@dataclass(frozen=True)
class Map(Pooled):
    """The whole map of a stage."""

    def rows(self, map_BCHW: Tensor) -> Tensor:
        """Return the map itself."""
        return map_BCHW


@dataclass(frozen=True)
class Scaling:
    """How images are scaled for a trunk.

    Attributes:
        side: pixels of the longer side.
        step: sides are multiples of this; 0: all images become squares of `side`, as the network takes no others.
        smallest: narrower images get a margin.
    """

    side: int
    step: int
    smallest: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of an image once it is scaled, without margins."""
        if not self.step:
            return self.side, self.side
        ratio = self.side / max(height, width)
        return self._whole(height * ratio), self._whole(width * ratio)

    def _whole(self, pixels: float) -> int:
        return max(self.step, round(pixels / self.step) * self.step)

    def __call__(self, image_CHW: tv_tensors.Image, target: Target) -> tuple[Tensor, Target]:
        """Return the scaled image, and the target as it is."""
        scaled_CHW = resize(image_CHW, [*self.size(*image_CHW.shape[1:])], antialias=True)
        return padded(scaled_CHW, self.smallest), target


@dataclass(frozen=True)
class ImageCells:
    """The maps of an image, and its mask (H, W).

    Attributes:
        maps: (D, I, J) by stage, on the device.
        axes: rows and columns of the map by stage.
    """

    index: int
    mask_HW: Tensor
    maps: dict[str, Tensor]
    axes: dict[str, tuple[Axis, Axis]]

    def rows(self, stage: str) -> Tensor:
        """Return the cells of a stage (I·J, D), row by row."""
        return self.maps[stage].flatten(1).T


@dataclass(frozen=True)
class FrozenMaps:
    """Maps of some stages of a model's trunk.

    Attributes:
        geometries: by stage, from the input to the output.
    """

    model: Model
    geometries: Mapping[str, Geometry]
    scaling: Scaling

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages."""
        return tuple(self.geometries)

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers must know."""
        if self.scaling.step:
            return []
        side = self.scaling.side
        return [f"{self.model.trunk.arch} takes images of {side} px only: they are scaled to {side} x {side} px"]

    def settings(self) -> dict[str, object]:
        """Return settings that the numbers depend on, for the results."""
        strides = {stage: one.stride for stage, one in self.geometries.items()}
        return {"stages": [*self.stages], "strides": strides, "side": self.scaling.side, "image_size": self.model.image_size}

    def key(self, data: MaskSet) -> str:
        """Return digits that change with the images, their masks (of which a few are read), the stages and the scaling."""
        masks = (data.read_mask(index).tobytes() for index in even_sample(range(len(data)), COMPARED_MASKS))
        about = [sha256(mask).hexdigest() for mask in masks], data.class_names, self.geometries, self.scaling
        return digest_of(data_key(data.source), *about, "cells-1")

    def images(
        self, data: MaskSet, indices: Sequence[int], faults: dict[int, str], advance: Advance
    ) -> Generator[list[ImageCells], None, None]:
        """Yield the cells of some images, a few images at a time; add why images can't be read to `faults`, by index."""
        samples = Samples(data, ReadMask(data), self.scaling)
        wanted = [Map(stage) for stage in self.stages]
        with closing(samples.in_order(self.model, indices, TOGETHER)) as batches:
            for batch in batches:
                found = []
                for one in batch.samples:
                    maps = {of.stage: x[0] for of, x in self.model.extract(one.image_CHW[None], wanted).items()}
                    scaled = self.scaling.size(*one.size)
                    axes = {
                        stage: (
                            Axis(place, maps[stage].shape[1], one.size[0], scaled[0]),
                            Axis(place, maps[stage].shape[2], one.size[1], scaled[1]),
                        )
                        for stage, place in self.geometries.items()
                    }
                    found.append(ImageCells(one.index, one.target[MASK], maps, axes))
                faults.update(batch.unreadable)
                yield found
                advance(len(batch.samples) + len(batch.unreadable))

    def only(self, stage: str) -> "FrozenMaps":
        """Return the maps of one of the stages."""
        return replace(self, geometries={stage: self.geometries[stage]})


def frozen_maps(model: Model, stages: str | None, side: int | None) -> FrozenMaps:
    """Return the maps of the stages that options name, of images at the side that they name.

    Args:
        stages: names separated by commas, or all that have a map; None: the last three of them.

    Raises:
        InputError: no stage has a map, or not the named one, or the trunk can't take images of this size.
    """
    if stages is not None and stages != "all":
        chosen = {name: geometry(model.trunk, name) for name in model.trunk.stages if name in model.stages(stages)}
    else:
        chosen = _with_maps(model)
        chosen = chosen if stages == "all" else dict([*chosen.items()][-LAST:])
    return FrozenMaps(model, chosen, _scaling(model, chosen, side))


def _with_maps(model: Model) -> dict[str, Geometry]:
    found = {}
    for name in model.trunk.stages:
        try:
            found[name] = geometry(model.trunk, name)
        except InputError:
            continue
    if not found:
        arch = model.trunk.arch
        raise InputError(
            f"no stage of {arch} has a map ({FEATURES} is one row for the whole image), which segmentation needs"
        )
    return found


def _scaling(model: Model, geometries: Mapping[str, Geometry], side: int | None) -> Scaling:
    """Return the scaling for a side in pixels, after finding out which sizes of images the trunk takes."""
    wanted, own, arch = [Map(stage) for stage in geometries], model.image_size, model.trunk.arch

    def takes(height: int, width: int) -> bool:
        try:
            model.extract(torch.zeros(1, 3, height, width, dtype=torch.uint8), wanted)
        except torch.OutOfMemoryError:
            raise
        except (InputError, RuntimeError):  # A pool or a convolution is wider than its input.
            return False
        return True

    stride = max(one.stride for one in geometries.values())
    step = next((step for step in (1, stride) if takes(own, own + step)), 0)
    if not step:
        if side not in (None, own):
            raise InputError(f"--side {side}: {arch} takes images of {own} px only; omit --side")
        return Scaling(own, 0, own)
    smallest = step * (1 + bisect_left(range(step, own, step), True, key=lambda one: takes(one, one)))
    side = USUAL_SCALE * own if side is None else side
    if side < smallest:
        raise InputError(f"--side {side}: images of this size are too small for {arch}; use {smallest} or more")
    return Scaling(side, step, smallest)
