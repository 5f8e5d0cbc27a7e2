"""What a unit of a map sees of the image, derived from the layers that the image went through.

C channels, H and W pixels. The trunk is run once on a blank image, and each operation that torch does is noted: where its
result depends on a window of its input, the window grows; where it mixes the whole map (an average, a fully connected layer)
or is not known here, the unit sees the whole image. So a residual block has its larger path, and a network that was not
thought of gives no box that is too small.

The arithmetic of sizes, strides and offsets is that of Dumoulin and Visin, "A guide to convolution arithmetic for deep
learning" (arXiv 1603.07285), and Araujo, Norris and Sim, "Computing receptive fields of convolutional neural networks"
(Distill, 2019).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepcluster.models.trunk import Trunk

# What a value at a pixel is made of: that pixel alone, whatever the operation does with its channels.
# (Most of these carry a tag that says so; these do not.)
POSITIONWISE = ("batch_norm", "dropout", "clone", "detach", "alias", "_to_copy", "contiguous", "hardswish", "prelu")
# What looks through a window at each position.
WINDOWS = ("convolution", "max_pool2d_with_indices", "avg_pool2d")


@dataclass(frozen=True)
class ReceptiveField:
    """Unit `i` of a line of the map sees the pixels from `offset + i * stride` on, `size` of them; some lie in the padding.

    A stride of 0: every unit sees the whole image.
    """

    size: int
    stride: int
    offset: int

    def interval(self, cell: int) -> tuple[int, int]:
        """First pixel that unit `cell` sees, and the one after the last."""
        start = self.offset + cell * self.stride
        return start, start + self.size

    def box(self, row: int, column: int, image_size: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of what a unit sees of the image itself; right and bottom are one beyond."""
        (left, right), (top, bottom) = self.interval(column), self.interval(row)
        return max(0, left), max(0, top), min(image_size, right), min(image_size, bottom)


@dataclass(frozen=True)
class StageShape:
    """A stage's map: `channels` of `height` x `width` units, and what each unit sees of the image."""

    channels: int
    height: int
    width: int
    field: ReceptiveField


def stage_shapes(trunk: Trunk, names: Sequence[str], image_size: int) -> dict[str, StageShape]:
    """The maps of the stages `names` for square images of `image_size` pixels a side.

    Raises:
        InputError: the trunk has no such stage.
    """
    for name in names:
        trunk.check_stage(name)
    device = next(trunk.parameters()).device
    blank_1CHW = torch.zeros(1, 3, image_size, image_size, device=device)
    shapes: dict[str, StageShape] = {}
    trunk.eval()
    with torch.no_grad(), _Trace(blank_1CHW) as trace:
        for name, map_1CHW in trunk.walk(blank_1CHW):
            if name in names:
                _, channels, height, width = map_1CHW.shape
                shapes[name] = StageShape(channels, height, width, trace.field(map_1CHW))
            if len(shapes) == len(set(names)):
                break
    return {name: shapes[name] for name in names}


PIXEL = ReceptiveField(size=1, stride=1, offset=0)
# Of the rows and of the columns; None: the whole image.
_Fields = tuple[ReceptiveField, ReceptiveField] | None


class _Trace(TorchDispatchMode):
    """Notes what each tensor that comes from an image sees of it."""

    def __init__(self, image_1CHW: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._image_size = image_1CHW.shape[-1]
        # The tensors are kept, so that no other one gets the id of one that is gone.
        self._seen: dict[int, tuple[Tensor, _Fields]] = {id(image_1CHW): (image_1CHW, (PIXEL, PIXEL))}

    def field(self, tensor: Tensor) -> ReceptiveField:
        """What a unit sees along either side."""
        fields = self._seen[id(tensor)][1] if id(tensor) in self._seen else None
        either = None if fields is None else _union(*fields)
        return ReceptiveField(self._image_size, stride=0, offset=0) if either is None else either

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and id(leaf) in self._seen]
        if sources:
            fields = _fields_after(func, args, kwargs or {}, [self._seen[id(source)][1] for source in sources])
            for made in tree_leaves(result):
                if isinstance(made, Tensor):
                    self._seen[id(made)] = (made, fields)
        return result


def _fields_after(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], sources: list[_Fields]) -> _Fields:
    """What the result of an operation sees."""
    name = func._schema.name.removeprefix("aten::")
    given = {one.name: one.default_value for one in func._schema.arguments}
    given.update(zip(given, args, strict=False), **kwargs)
    if name in WINDOWS:
        return _through_window(sources[0], given) if len(sources) == 1 else None
    joins_channels = name == "cat" and given["dim"] == 1
    if torch.Tag.pointwise in func.tags or joins_channels or any(part in name for part in POSITIONWISE):
        return reduce(_widest, sources)
    return None


def _through_window(fields: _Fields, given: Mapping[str, Any]) -> _Fields:
    """What a convolution or a pooling with these arguments sees of the image."""
    kernel = given["weight"].shape[2:] if "weight" in given else given["kernel_size"]
    if fields is None or given.get("transposed") or len(kernel) > 2:
        return None
    stride, padding, dilation = given["stride"] or kernel, given["padding"], given.get("dilation", (1,))
    rows, columns = (
        ReceptiveField(
            size=field.size + _at(dilation, axis) * (_at(kernel, axis) - 1) * field.stride,
            stride=field.stride * _at(stride, axis),
            offset=field.offset - _at(padding, axis) * field.stride,
        )
        for axis, field in enumerate(fields)
    )
    return rows, columns


def _at(sides: Sequence[int], axis: int) -> int:
    """One number may stand for both sides."""
    return sides[axis] if len(sides) > 1 else sides[0]


def _widest(one: _Fields, other: _Fields) -> _Fields:
    """What is seen by two together, as where a block's paths meet."""
    if one is None or other is None:
        return None
    rows, columns = _union(one[0], other[0]), _union(one[1], other[1])
    return None if rows is None or columns is None else (rows, columns)


def _union(one: ReceptiveField, other: ReceptiveField) -> ReceptiveField | None:
    start = min(one.offset, other.offset)
    end = max(one.offset + one.size, other.offset + other.size)
    return ReceptiveField(end - start, one.stride, start) if one.stride == other.stride else None
