"""A Caffe network: its layers in the test phase, each with the weights of the layer of its name in the binary file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from deepcluster.interop.caffe.messages import Malformed, Message

Number = TypeVar("Number", int, float, bool, str)
# Types of layers in old files, which have names of an enumeration for them.
OLD_TYPES = {
    "CONVOLUTION": "Convolution",
    "INNER_PRODUCT": "InnerProduct",
    "RELU": "ReLU",
    "POOLING": "Pooling",
    "DROPOUT": "Dropout",
    "FLATTEN": "Flatten",
    "POWER": "Power",
    "SPLIT": "Split",
    "SILENCE": "Silence",
    "SOFTMAX": "Softmax",
    "SOFTMAX_LOSS": "SoftmaxWithLoss",
    "ACCURACY": "Accuracy",
    "ARGMAX": "ArgMax",
}
# Layers that only look at the network's result; loss functions too.
RESULTS = ("Softmax", "Accuracy", "ArgMax", "Silence", "Sigmoid")
MOST_AXES = 8
# In pixels. At larger sizes VGG-16's first fully connected layer would have a billion weights.
LARGEST_SIDE = 512


@dataclass(frozen=True)
class Blob:
    """Weights of a layer in the order of memory; the shape as the file gives it, perhaps with ones in front."""

    shape: tuple[int, ...]
    values: NDArray[np.float32]

    @classmethod
    def of(cls, message: Message) -> "Blob":
        """Make the blob of a message; an old one has four named sides."""
        arrays = [value for name in ("data", "double_data") for value in message.get(name, [])]
        values = next((value for value in arrays if isinstance(value, np.ndarray)), np.zeros(0, np.float32))
        if "shape" in message:
            shape = tuple(many(last(message, "shape", {}), "dim", int))
        else:
            shape = tuple(get(message, side, 0) for side in ("num", "channels", "height", "width"))
        if len(shape) > MOST_AXES or min(shape, default=0) < 0 or prod(shape) != values.size:
            raise Malformed(f"weights of the shape {shown(shape[:MOST_AXES])} have {values.size} values")
        with np.errstate(over="ignore"):  # Infinite weights are refused where they are used.
            return cls(shape, values.astype(np.float32, copy=False))


@dataclass(frozen=True)
class Layer:
    """A layer with its parameters as in the file; bottoms are its inputs, tops its outputs."""

    name: str
    type: str
    bottoms: tuple[str, ...] = ()
    tops: tuple[str, ...] = ()
    message: Message = field(default_factory=dict)
    blobs: tuple[Blob, ...] = ()

    @classmethod
    def of(cls, message: Message) -> "Layer":
        """Make the layer of a message in the present or in the old form."""
        if isinstance(message.get("layer", [None])[0], dict):
            raise Malformed("its layers have the form of 2013 (V0); convert it with Caffe's upgrade_net_proto_text")
        kind = get(message, "type", "")
        return cls(
            get(message, "name", ""),
            OLD_TYPES.get(kind, kind),
            tuple(many(message, "bottom", str)),
            tuple(many(message, "top", str)),
            message,
            tuple(Blob.of(blob) for blob in messages(message, "blobs")),
        )

    def parameters(self, name: str) -> Message:
        """Return the parameters of the layer's type, such as `convolution_param`; an empty message where there are none."""
        return last(self.message, name, {})

    @property
    def gives_result(self) -> bool:
        """True if the layer only looks at the result."""
        return self.type in RESULTS or self.type.endswith("Loss")

    @property
    def in_test(self) -> bool:
        """True unless the layer is for training only."""
        included, excluded = messages(self.message, "include"), messages(self.message, "exclude")
        if included:
            return any(get(rule, "phase", "TEST") != "TRAIN" for rule in included)
        return not any(get(rule, "phase", "") == "TEST" for rule in excluded)


@dataclass(frozen=True)
class Network:
    """The layers between images and result, one after the other.

    Attributes:
        layers: those that change the image's map; no layer is left out that could.
        image_size: side of the square images; None: the file does not tell.
        left_out: names of the layers after the result, and of those that the binary has beyond the description.
    """

    layers: tuple[Layer, ...]
    image_size: int | None
    left_out: tuple[str, ...]


def network_of(description: Message, weights: Message | None = None) -> Network:
    """Return the network that a text describes, with the weights of a binary's message; without: with its own.

    Raises:
        Malformed: it is not one chain of layers, or a layer's weights are missing.
    """
    layers = _layers(description)
    beyond: list[str] = []
    if weights is not None:
        blobs = {layer.name: layer.blobs for layer in _layers(weights) if layer.blobs}
        names = {layer.name for layer in layers}
        beyond = [name for name in blobs if name not in names]
        layers = [_with(layer, blobs) for layer in layers]
    start, image_size = _input(description, layers)
    chained, results = _chain([layer for layer in layers if layer.in_test], start)
    return Network(tuple(chained), image_size, (*results, *beyond))


def _with(layer: Layer, blobs: Mapping[str, tuple[Blob, ...]]) -> Layer:
    return Layer(layer.name, layer.type, layer.bottoms, layer.tops, layer.message, blobs.get(layer.name, ()))


def _layers(net: Message) -> list[Layer]:
    found = [Layer.of(message) for name in ("layer", "layers") for message in messages(net, name)]
    if not found:
        raise Malformed("it has no layers")
    return found


def _input(net: Message, layers: list[Layer]) -> tuple[str, int | None]:
    """Return the name of the images' blob and their side."""
    inputs = many(net, "input", str)
    if inputs:
        shape = many(net, "input_dim", int)[:4]
        if not shape and (shapes := messages(net, "input_shape")):
            shape = many(shapes[0], "dim", int)
    else:
        sources = [layer for layer in layers if not layer.bottoms and layer.tops]
        source = next((layer for layer in sources if layer.in_test), sources[0] if sources else None)
        if source is None:
            raise Malformed("it has no input for images")
        change = source.parameters("transform_param")
        if {"mean_file", "mean_value", "scale"} & change.keys():
            raise Malformed(
                f"its layer {source.name} changes the images (transform_param); "
                "put the description for use, deploy.prototxt, in its place"
            )
        inputs = [source.tops[0]]
        shapes = messages(source.parameters("input_param"), "shape")
        crop = get(change, "crop_size", 0)
        shape = many(shapes[0], "dim", int) if shapes else [1, 3, crop, crop] if crop else []
    if not shape:
        return inputs[0], None
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not 0 < shape[2] <= LARGEST_SIDE:
        raise Malformed(f"its input is {shown(shape)}, not square images of 3 channels and at most {LARGEST_SIDE} px")
    return inputs[0], shape[2]


def _chain(layers: list[Layer], start: str) -> tuple[list[Layer], list[str]]:
    """Return the layers from the images on, each reading what the one before made, and the names of those after the result.

    Raises:
        Malformed: the layers branch.
    """
    path: list[Layer] = []
    results: list[str] = []
    current, made = {start}, {start}
    for layer in layers:
        read = made & set(layer.bottoms)
        if not read:
            continue
        if layer.gives_result:
            results.append(layer.name)
        elif layer.type == "Split":
            current = set(layer.tops) if read <= current else current
        elif len(layer.bottoms) > 1 or not read <= current:
            raise Malformed(f"its layers branch: {layer.name} ({layer.type}) reads {', '.join(layer.bottoms)}")
        else:
            path.append(layer)
            current = {layer.tops[0]} if layer.tops else current
        made |= set(layer.tops)
    return path, results


def many(message: Message, name: str, kind: type[Number]) -> list[Number]:
    """Return all values of a field, or raise Malformed where one has another type."""
    values: list[Number] = []
    for value in message.get(name, []):
        if kind is float and isinstance(value, int):
            value = float(value)
        if kind is bool and value in (0, 1):
            value = bool(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            found = "a message" if isinstance(value, dict) else repr(value)
            raise Malformed(f"{name} is {found}, not {'text' if kind is str else 'a number'}")
        values.append(value)
    return values


def get(message: Message, name: str, default: Number) -> Number:
    """Return the value of a field, or the default; it has the default's type."""
    values: list[Number] = many(message, name, type(default))
    return values[-1] if values else default


def messages(message: Message, name: str) -> list[Message]:
    """Return the messages of a field."""
    for value in message.get(name, []):
        if not isinstance(value, dict):
            raise Malformed(f"{name} is {value!r}, not {{ ... }}")
    return [value for value in message.get(name, []) if isinstance(value, dict)]


def last(message: Message, name: str, default: Message) -> Message:
    """Return the message of a field, or the default."""
    return (messages(message, name) or [default])[-1]


def shown(shape: tuple[int, ...] | list[int]) -> str:
    """Write a shape as 96×3×11×11."""
    return "×".join(map(str, shape))
