"""What the layers of a Caffe network do, as far as networks of convolutions do it; the same words for a trunk's layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import nn

from deepcluster.interop.caffe.messages import Malformed, Message
from deepcluster.interop.caffe.network import Blob, Layer, get, many, shown
from deepcluster.models.convnets import ConvNet

Array = NDArray[np.float32]
CONVOLUTION, BATCH_NORM, SCALE, LINEAR, FLATTEN = "convolution", "batch norm", "scale", "fully connected", "flatten"
RELU = "ReLU"


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        kind: one of the words above; of other operations the words of `text`.
        text: the operation with its sizes, as `step_text` writes that of a trunk's layer.
        name: name of the layer.
        arrays: weight and bias; of BatchNorm mean, variance and epsilon; of a scale factors and summands.
    """

    kind: str
    text: str
    name: str
    arrays: tuple[Array, ...] = ()


def convolution_text(shape: tuple[int, ...], stride: int, padding: int) -> str:
    """Write a convolution with a weight of this shape."""
    return f"{CONVOLUTION} {shown(shape)}, stride {stride}, padding {padding}"


def pooling_text(kernel: int, stride: int, padding: int) -> str:
    """Write a max pooling."""
    return f"max pooling {kernel}×{kernel}, stride {stride}, padding {padding}"


def trunk_layers(trunk: ConvNet) -> Iterator[tuple[str, str]]:
    """Yield name and text of the layers of a trunk, without BatchNorm and dropout."""
    for group in ("features", "classifier"):
        for number, layer in getattr(trunk, group).named_children():
            name = f"{group}.{number}"
            if isinstance(layer, nn.Conv2d):
                yield name, convolution_text(tuple(layer.weight.shape), layer.stride[0], int(layer.padding[0]))
            elif isinstance(layer, nn.MaxPool2d):
                yield name, pooling_text(int(layer.kernel_size), int(layer.stride), int(layer.padding))  # type: ignore[arg-type]
            elif isinstance(layer, nn.Linear):
                yield name, f"{LINEAR} {shown(tuple(layer.weight.shape))}"
            elif isinstance(layer, nn.ReLU):
                yield name, RELU


def uneven_pool(trunk: ConvNet, image_size: int) -> str | None:
    """Return what the first pooling is at which Caffe rounds the size of the map up and PyTorch down; None: both agree."""
    size = image_size
    for layer in trunk.features:
        if isinstance(layer, nn.Conv2d):
            size = (size + 2 * int(layer.padding[0]) - layer.kernel_size[0]) // layer.stride[0] + 1
        elif isinstance(layer, nn.MaxPool2d):
            kernel, stride = int(layer.kernel_size), int(layer.stride)  # type: ignore[arg-type]
            pooled = (size - kernel) // stride + 1
            if (size - kernel) % stride:
                return f"its pooling {kernel}×{kernel} of stride {stride} makes {pooled} of {size} pixels"
            size = pooled
    return None


def steps_of(layers: tuple[Layer, ...]) -> list[Step]:
    """Return what the layers do; those that change nothing in use, such as dropout, are left out.

    Raises:
        Malformed: a layer of another kind, or without its weights.
    """
    steps: list[Step] = []
    for layer in layers:
        match layer.type:
            case "Convolution":
                steps.append(_convolution(layer))
            case "InnerProduct":
                steps.append(_inner_product(layer))
            case "BatchNorm":
                steps.append(_batch_norm(layer))
            case "Scale":
                steps.append(_scale(layer))
            case "Power":
                steps.append(_power(layer))
            case "Pooling":
                text = _pooling(layer.parameters("pooling_param"))
                steps.append(Step(text, text, layer.name))
            case "ReLU":
                slope = get(layer.parameters("relu_param"), "negative_slope", 0.0)
                text = f"{RELU} of negative slope {slope:g}" if slope else RELU
                steps.append(Step(text, text, layer.name))
            case "Flatten" | "Reshape":
                steps.append(Step(FLATTEN, FLATTEN, layer.name))
            case "Dropout":
                pass
            case other:
                raise Malformed(
                    f"its layer {layer.name} is of the type {other or '(none)'}, which AlexNet and VGG-16 don't have"
                )
    return steps


def _weights(layer: Layer, *sizes: int | None, may_lack: int = 0) -> list[Array]:
    """Return a layer's arrays of these sizes (None: any); the last `may_lack` may be missing."""
    blobs: tuple[Blob, ...] = layer.blobs
    if not blobs:
        raise Malformed(f"its layer {layer.name} ({layer.type}) has no weights in the binary file")
    if not len(sizes) - may_lack <= len(blobs) <= len(sizes):
        raise Malformed(f"its layer {layer.name} ({layer.type}) has {len(blobs)} arrays of weights, not {len(sizes)}")
    for blob, size in zip(blobs, sizes, strict=False):
        if not blob.values.size or (size is not None and blob.values.size != size):
            should = "" if size is None else f", where {size} numbers fit its description"
            raise Malformed(f"its layer {layer.name} ({layer.type}) has weights of the shape {shown(blob.shape)}{should}")
        if not np.isfinite(blob.values).all():
            raise Malformed(f"the weights of its layer {layer.name} are not finite")
    return [blob.values for blob in blobs]


def _matrix(layer: Layer, parameters: Message, *kernel: int) -> tuple[Array, Array]:
    """Return weight (outputs, inputs, *kernel) and bias of a convolution or a fully connected layer."""
    outputs = get(parameters, "num_output", 0)
    has_bias = get(parameters, "bias_term", True)
    weight, *rest = _weights(layer, None, *([outputs] if has_bias else []))
    area = outputs * prod(kernel)
    given = layer.blobs[0].shape
    shape = (outputs, weight.size // area if area > 0 else 0, *kernel)
    transposed = get(parameters, "transpose", False)
    stored = shape[::-1] if transposed else shape
    if min(shape) < 1 or prod(shape) != weight.size or _without_ones(given) != _without_ones(stored):
        text = shown((outputs, *kernel)) if kernel else str(outputs)
        raise Malformed(
            f"its layer {layer.name} ({layer.type}) has weights of the shape {shown(given)}, described as {text}"
        )
    matrix = weight.reshape(stored)
    return matrix.T if transposed else matrix, rest[0] if rest else np.zeros(outputs, np.float32)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)


def _pair(parameters: Message, name: str, sides: str, default: int) -> tuple[int, int]:
    """Return height and width of a window's measure: one number, two, or a field for each."""
    values = many(parameters, name, int)
    if not values:
        values = [get(parameters, f"{sides}_h", default), get(parameters, f"{sides}_w", default)]
    return values[0], values[-1]


def _window(parameters: Message) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    kernel, stride = _pair(parameters, "kernel_size", "kernel", 0), _pair(parameters, "stride", "stride", 1)
    return kernel, stride, _pair(parameters, "pad", "pad", 0)


def _convolution(layer: Layer) -> Step:
    parameters = layer.parameters("convolution_param")
    kernel, stride, padding = _window(parameters)
    weight, bias = _matrix(layer, parameters, *kernel)
    groups = get(parameters, "group", 1)
    dilation = many(parameters, "dilation", int) or [1]
    text = convolution_text(weight.shape, stride[0], padding[0])
    text += "" if stride[0] == stride[1] and padding[0] == padding[1] else f" (width {stride[1]} and {padding[1]})"
    text += "" if groups == 1 else f", {groups} groups"
    text += "" if set(dilation) == {1} else f", dilation {dilation[0]}"
    return Step(CONVOLUTION, text, layer.name, (weight, bias))


def _inner_product(layer: Layer) -> Step:
    parameters = layer.parameters("inner_product_param")
    weight, bias = _matrix(layer, parameters)
    axis = get(parameters, "axis", 1)
    text = f"{LINEAR} {shown(weight.shape)}" + ("" if axis == 1 else f", axis {axis}")
    return Step(LINEAR, text, layer.name, (weight, bias))


def _batch_norm(layer: Layer) -> Step:
    """Return BatchNorm by mean and variance, which the file may hold as sums with the factor to divide them by."""
    channels = layer.blobs[0].values.size if layer.blobs else 0
    mean, variance, factor = _weights(layer, channels, channels, 1)
    with np.errstate(all="ignore"):  # What overflows is refused below.
        if factor[0] != 1:
            scale = np.float32(0 if factor[0] == 0 else 1 / np.float64(factor[0]))
            mean, variance = mean * scale, variance * scale
        epsilon = np.array([get(layer.parameters("batch_norm_param"), "eps", 1e-5)], np.float32)
        good = np.isfinite(mean) & (variance + epsilon > 0) & np.isfinite(variance + epsilon)
    if not good.all():
        raise Malformed(f"its layer {layer.name} (BatchNorm) has statistics that are not finite, or a negative variance")
    return Step(BATCH_NORM, BATCH_NORM, layer.name, (mean, variance, epsilon))


def _scale(layer: Layer) -> Step:
    parameters = layer.parameters("scale_param")
    if get(parameters, "axis", 1) != 1 or get(parameters, "num_axes", 1) != 1:
        raise Malformed(f"its layer {layer.name} (Scale) scales other axes than the channels")
    channels = layer.blobs[0].values.size if layer.blobs else 0
    factors, *rest = _weights(layer, channels, *([channels] if get(parameters, "bias_term", False) else []))
    return Step(SCALE, SCALE, layer.name, (factors, rest[0] if rest else np.zeros_like(factors)))


def _power(layer: Layer) -> Step:
    parameters = layer.parameters("power_param")
    power, scale, shift = (
        get(parameters, name, default) for name, default in (("power", 1.0), ("scale", 1.0), ("shift", 0.0))
    )
    if power != 1 or not np.isfinite([scale, shift]).all():
        raise Malformed(f"its layer {layer.name} (Power) is more than a scale and a shift")
    return Step(SCALE, SCALE, layer.name, (np.array([scale], np.float32), np.array([shift], np.float32)))


def _pooling(parameters: Message) -> str:
    kernel, stride, padding = _window(parameters)
    method = get(parameters, "pool", "MAX")
    if get(parameters, "global_pooling", False):
        return f"global pooling ({method})"
    text = pooling_text(kernel[0], stride[0], padding[0])
    text += "" if (kernel[0], stride[0], padding[0]) == (kernel[1], stride[1], padding[1]) else f" (width {kernel[1]})"
    return text if method == "MAX" else text.replace("max", method.lower())
