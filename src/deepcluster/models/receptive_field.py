"""Receptive fields of the units of a feature map, by arithmetic over the operations of the network.

C channels, H and W pixels. The trunk processes one blank image, and each torch operation is noted. Convolutions and pools
widen the field; operations on single positions keep it; where paths meet, as in a residual block, it is the union of both.
After any other operation, such as an average of the whole map or attention, a unit sees the whole image: a field may be too
large, never too small. `models.geometry` asks for the direct path only, on which gates and residual attention are passed by.

The arithmetic of sizes, strides and offsets: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning"
(arXiv 1603.07285); Araujo, Norris and Sim, "Computing receptive fields of convolutional neural networks" (Distill, 2019).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepcluster.models.trunk import Trunk

# Operations on single positions that lack torch's tag `pointwise`.
POINTWISE = ("batch_norm", "dropout", "clone", "detach", "alias", "_to_copy", "contiguous", "hardswish", "prelu")
WINDOWS = ("convolution", "max_pool2d_with_indices", "avg_pool2d")
PADS = ("constant_pad_nd", "reflection_pad2d", "replication_pad2d")
# Views that may leave rows and columns as they are: channels that are split or shuffled.
VIEWS = ("view", "_unsafe_view", "transpose", "slice", "split", "split_with_sizes")


@dataclass(frozen=True)
class ReceptiveField:
    """Along either axis, unit `i` sees `size` pixels from `offset + i * stride` on, some of them in the padding.

    A stride of 0: every unit sees the whole image.
    """

    size: int
    stride: int
    offset: int

    def interval(self, cell: int) -> tuple[int, int]:
        """Return the first pixel that unit `cell` sees, and the one after the last."""
        start = self.offset + cell * self.stride
        return start, start + self.size

    def box(self, row: int, column: int, image_size: int) -> tuple[int, int, int, int]:
        """Return left, top, right, bottom of the pixels that a unit sees, clipped to the image."""
        (left, right), (top, bottom) = self.interval(column), self.interval(row)
        return max(0, left), max(0, top), min(image_size, right), min(image_size, bottom)


@dataclass(frozen=True)
class StageShape:
    """Shape of the map of a stage: `channels` of `height` x `width` units, and the receptive field of each unit."""

    channels: int
    height: int
    width: int
    field: ReceptiveField


def stage_shapes(trunk: Trunk, names: Sequence[str], image_size: int, *, direct: bool = False) -> dict[str, StageShape]:
    """Return the shapes of the stages `names` for square images of `image_size` pixels a side.

    Args:
        direct: follow the path on which positions are kept where it meets one that sees the whole image (a gate, as
            squeeze-and-excitation has, or attention beside a residual): fields are then those of convolutions and pools.

    Raises:
        InputError: the trunk has no such stage.
    """
    blank_1CHW = next(trunk.parameters()).new_zeros(1, 3, image_size, image_size)
    with in_eval_mode(trunk), torch.no_grad(), Trace(blank_1CHW, direct=direct) as trace:
        maps = trunk.maps(blank_1CHW, names)
    found = ((name, maps[name].shape, trace.field(maps[name])) for name in names)
    return {name: StageShape(shape[1], shape[2], shape[3], field) for name, shape, field in found}


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a network in eval mode, and each of its layers back afterwards."""
    training = [layer for layer in network.modules() if layer.training]
    network.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


class Trace(TorchDispatchMode):
    """Notes the receptive field of each tensor that is computed from an image; None: the whole image."""

    def __init__(self, image_1CHW: Tensor, *, direct: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._direct = direct
        self._image_size = image_1CHW.shape[-1]
        pixel = ReceptiveField(size=1, stride=1, offset=0)
        # Holding the tensors prevents their ids from being used again.
        self._traced: dict[int, tuple[Tensor, ReceptiveField | None]] = {id(image_1CHW): (image_1CHW, pixel)}

    def field(self, tensor: Tensor) -> ReceptiveField:
        """Return the field of the units of a tensor."""
        _, field = self._traced.get(id(tensor), (tensor, None))
        return field or ReceptiveField(self._image_size, stride=0, offset=0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and id(leaf) in self._traced]
        if not inputs:
            return result
        fields = [self._traced[id(one)][1] for one in inputs]
        name = func._schema.name.removeprefix("aten::")
        given = {one.name: one.default_value for one in func._schema.arguments}
        given.update(zip(given, args, strict=False), **(kwargs or {}))
        joins_channels = name == "cat" and given["dim"] == 1
        field = None
        if name in WINDOWS:
            field = _through_window(fields[0], given) if len(fields) == 1 else None
        elif name in PADS and self._direct:
            field = _padded(fields[0], given)
        elif torch.Tag.pointwise in func.tags or joins_channels or any(part in name for part in POINTWISE):
            known = [one for one in fields if one is not None] if self._direct else []
            field = reduce(_union, known or fields)
        elif name in VIEWS and _keeps_positions(inputs[0], result, given):
            field = fields[0]
        self._traced |= {id(one): (one, field) for one in tree_leaves(result) if isinstance(one, Tensor)}
        return result


def _through_window(field: ReceptiveField | None, given: Mapping[str, Any]) -> ReceptiveField | None:
    """Return the field after a convolution or a pool with these arguments: the union of those along rows and columns."""
    kernel = given["weight"].shape[2:] if "weight" in given else given["kernel_size"]
    if field is None or given.get("transposed") or len(kernel) > 2:
        return None
    arguments = kernel, given["stride"] or kernel, given["padding"], given.get("dilation", (1,))
    # A single number stands for both axes.
    kernel, stride, padding, dilation = (tuple(one) * (2 // len(one)) for one in arguments)
    rows, columns = (
        ReceptiveField(field.size + wide * (long - 1) * field.stride, field.stride * step, field.offset - pad * field.stride)
        for long, step, pad, wide in zip(kernel, stride, padding, dilation, strict=True)
    )
    return _union(rows, columns)


def _padded(field: ReceptiveField | None, given: Mapping[str, Any]) -> ReceptiveField | None:
    """Return the field after a padding; None where rows and columns, or other axes, are padded differently."""
    left, _, top, *_ = given.get("pad", given.get("padding"))
    if field is None or left != top:
        return None
    return replace(field, offset=field.offset - left * field.stride)


def _keeps_positions(given: Tensor, result: Any, arguments: Mapping[str, Any]) -> bool:
    """Return True if a view leaves the last two axes, rows and columns, as they are."""
    axes = [arguments[name] % given.ndim for name in ("dim", "dim0", "dim1") if name in arguments]
    parts = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
    return all(axis < given.ndim - 2 for axis in axes) and all(one.shape[-2:] == given.shape[-2:] for one in parts)


def _union(one: ReceptiveField | None, other: ReceptiveField | None) -> ReceptiveField | None:
    """Return the field that spans both, as after a sum; None where their strides differ."""
    if one is None or other is None or one.stride != other.stride:
        return None
    start, end = min(one.offset, other.offset), max(one.offset + one.size, other.offset + other.size)
    return ReceptiveField(end - start, one.stride, start)
