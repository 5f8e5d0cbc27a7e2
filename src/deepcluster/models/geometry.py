"""Where the cells of a stage's map lie in the image, which boxes and masks need."""

from dataclasses import dataclass

from deepcluster.core.errors import InputError
from deepcluster.models.receptive_field import StageShape, stage_shapes
from deepcluster.models.trunk import FEATURES, Trunk

# Enough for every convolutional stage of the project's own networks, whose geometry does not depend on the image.
_OWN_SIZE = 64


def traced_size(trunk: Trunk) -> int:
    """Return the side of images with which a trunk is traced: the size that it was made for, where that matters."""
    return getattr(trunk, "image_size", _OWN_SIZE)


@dataclass(frozen=True)
class Geometry:
    """Along either axis, cell `i` of a map is centred at pixel `offset + stride * i`; pixel 0 is centred at 0.

    The cells of AlexNet's conv5 lie at 15, 31, 47; those of a ResNet's layer4 at 0, 32, 64.
    """

    stride: int
    offset: float

    def centre(self, cell: float) -> float:
        """Return the pixel at the centre of a cell."""
        return self.offset + self.stride * cell

    def cell(self, pixel: float) -> float:
        """Return the position of a pixel in cells: whole at the centre of a cell."""
        return (pixel - self.offset) / self.stride


def geometry(trunk: Trunk, stage: str) -> Geometry:
    """Return the geometry of the maps of a stage: the centres of its receptive fields.

    Where positions can't be traced through the network, as in a transformer, whose units see the whole image, the cells are
    equal squares that cover the image: their stride is the size of the image over that of the map. (For patches this is
    exact; convolutions that overlap, which a few such networks begin with, are centred up to half a cell further up.)

    Raises:
        InputError: there is no such stage, or its map has no fixed stride ("features"); stages that work are named.
    """
    trunk.check_stage(stage)
    found = _geometry(trunk, stage)
    if found is None:
        others = [name for name in trunk.stages if name != stage and _geometry(trunk, name) is not None]
        advice = f"use {', '.join(others)}" if others else "no stage of it has one: choose another architecture"
        raise InputError(f"the map of stage {stage} of {trunk.arch} has no fixed stride in the image; {advice}")
    return found


def _geometry(trunk: Trunk, stage: str) -> Geometry | None:
    if stage == FEATURES:
        return None
    size = traced_size(trunk)
    field = (shape := _shape(trunk, stage, size)).field
    if field.stride:
        return Geometry(field.stride, field.offset + (field.size - 1) / 2)
    stride = _patch(shape, size)
    try:
        # A map of the same size whatever the image has no fixed stride.
        twice = _patch(_shape(trunk, stage, 2 * size), 2 * size)
    except InputError:  # Most transformers take one size only.
        twice = stride
    return Geometry(stride, (stride - 1) / 2) if stride is not None and stride == twice else None


def _shape(trunk: Trunk, stage: str, size: int) -> StageShape:
    return stage_shapes(trunk, [stage], size, direct=True)[stage]


def _patch(shape: StageShape, size: int) -> int | None:
    """Return the side of the squares that cover the image; None where they are no whole squares."""
    whole = shape.height == shape.width and size % shape.width == 0
    return size // shape.width if whole else None
