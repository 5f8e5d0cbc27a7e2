"""Read a Caffe model of AlexNet or VGG-16 by the structure of its network; the names of its layers don't matter."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.files import begin_of, check_file, read_regular
from deepcluster.core.kinds import BEGIN_BYTES, kind_of, stand_in
from deepcluster.core.text import count_of, size
from deepcluster.interop.caffe.messages import Malformed, Message
from deepcluster.interop.caffe.network import Network, network_of
from deepcluster.interop.caffe.preprocessing import Triple, split_preprocessing
from deepcluster.interop.caffe.prototxt import LARGEST_TEXT, parse
from deepcluster.interop.caffe.steps import (
    BATCH_NORM,
    CONVOLUTION,
    FLATTEN,
    LINEAR,
    RELU,
    SCALE,
    Step,
    steps_of,
    trunk_layers,
    uneven_pool,
)
from deepcluster.interop.caffe.wire import decode
from deepcluster.models.archs import make_trunk
from deepcluster.models.convnets import TABLES, ConvNet, sobel_layer
from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD
from deepcluster.models.weights import Undrawn

TEXT, BINARY = ".prototxt", ".caffemodel"
ENDINGS = (BINARY, TEXT)
ARCHITECTURES = ("alexnet", "vgg16")
# Protocol Buffers' own limit.
LARGEST_BINARY = 2 << 30
_USUAL_DESCRIPTIONS = ("deploy", "model")
_USUAL_SIZE = 224
_MOST_SHOWN = 6
_Norm: TypeAlias = dict[str, Step]


@dataclass(frozen=True)
class CaffeModel:
    """A trunk of ours that a Caffe model holds.

    Attributes:
        arch: "alexnet" or "vgg16".
        sobel: whether grey and Sobel layers stand in front.
        tensors: the whole state dict of `make_trunk(arch, image_size=image_size, sobel=sobel)`.
        top_layer: weight (K, D) and bias (K) of the layer that scores K clusters from the features' ReLU; or None.
        image_size: side of the images in pixels.
        mean: R, G and B, which the network subtracts from images in [0, 1]; usually ImageNet's.
        std: by which it divides them afterwards.
        remarks: what was found beyond the usual, and what was left out; sentences without a full stop.
    """

    arch: str
    sobel: bool
    tensors: dict[str, Tensor]
    top_layer: tuple[Tensor, Tensor] | None
    image_size: int
    mean: Triple
    std: Triple
    remarks: tuple[str, ...]


def read_caffe(path: Path) -> CaffeModel:
    """Read a Caffe model: a `.caffemodel` with its `.prototxt` beside it, or the other way round.

    The other file has the same stem, is `deploy.prototxt` or `model.prototxt`, or is the only one in the folder. A
    `.caffemodel` that describes its layers itself needs no text.

    Raises:
        InputError: a file is missing, damaged or something else, or the network is neither AlexNet nor VGG-16.
    """
    check_file(path)
    text, binary = (path, _beside(path, BINARY)) if path.suffix == TEXT else (_beside(path, TEXT), path)
    if binary is None:
        raise InputError(f"{path} describes a network without its weights: put the {BINARY} file beside it")
    weights = _read_binary(binary)
    if text is None and not any(isinstance(layer, dict) and layer.get("bottom") for layer in _layers(weights)):
        raise InputError(
            f"{path} has weights without a description of the network: put its {TEXT} file beside it, as {path.stem}{TEXT}"
        )
    try:
        network = network_of(weights) if text is None else network_of(_read_text(text), weights)
        return model_of(network)
    except Malformed as fault:
        described = f", described by {text.name}," if text is not None and text != path else ""
        raise InputError(f"{path}{described} can't be used: {fault}") from None


def _layers(net: Message) -> list[object]:
    return [*net.get("layer", []), *net.get("layers", [])]


def _beside(path: Path, ending: str) -> Path | None:
    """Return the other file of the model; None where there is none, or none that is clearly the one."""
    for stem in (path.stem, *(_USUAL_DESCRIPTIONS if ending == TEXT else ())):
        other = path.with_name(stem + ending)
        if other.is_file():
            return other
    others = sorted(path.parent.glob(f"*{ending}"))
    return others[0] if len(others) == 1 else None


def _read(path: Path, largest: int) -> bytes:
    check_file(path)
    if instead := stand_in(begin_of(path)):
        raise InputError(f"{path} is not a Caffe model: it is {instead}")
    try:
        n_bytes = path.stat().st_size
        if n_bytes > largest:
            raise InputError(
                f"{path} is not a Caffe model: it has {size(n_bytes)}, more than the {size(largest)} of its format"
            )
        return read_regular(path)
    except OSError as fault:
        raise InputError(f"{path} can't be read: {(fault.strerror or str(fault)).lower()}") from None


def _read_binary(path: Path) -> Message:
    content = _read(path, LARGEST_BINARY)
    try:
        message = decode(memoryview(content), "NetParameter")
    except Malformed as fault:
        known = kind_of(content[:BEGIN_BYTES])
        what = f"it is {known}" if known and "unknown" not in known else f"truncated, damaged or of another kind ({fault})"
        raise InputError(f"{path} is not a Caffe model: {what}") from None
    if not _layers(message):
        raise InputError(f"{path} is not a Caffe model: it holds no layers; it is {kind_of(content[:BEGIN_BYTES])}")
    return message


def _read_text(path: Path) -> Message:
    return parse(_read(path, LARGEST_TEXT).decode("utf-8", "replace"))


def model_of(network: Network) -> CaffeModel:
    """Return the trunk that a network is.

    Raises:
        Malformed: it is another network; the message says at which layer.
    """
    preprocessing, steps = split_preprocessing(steps_of(network.layers))
    mains = list(_with_norms(steps))
    image_size = network.image_size or _USUAL_SIZE
    trunk, rest = _recognise(mains, sobel=preprocessing.sobel, image_size=image_size)
    tensors = _tensors(trunk, mains)
    top_layer = None
    if len(rest) == 2:
        weight, bias = rest[1].arrays
        top_layer = _tensor(weight), _tensor(bias)
    return CaffeModel(
        arch=trunk.arch,
        sobel=preprocessing.sobel,
        tensors=tensors,
        top_layer=top_layer,
        image_size=image_size,
        mean=preprocessing.mean,
        std=preprocessing.std,
        remarks=tuple(_remarks(network, mains, preprocessing.mean, preprocessing.std)),
    )


def _remarks(network: Network, mains: list[tuple[Step, _Norm]], mean: Triple, std: Triple) -> Iterator[str]:
    if (mean, std) != (IMAGENET_MEAN, IMAGENET_STD):
        means, stds = (", ".join(f"{value:.4g}" for value in triple) for triple in (mean, std))
        yield f"its images are normalised by mean {means} and standard deviation {stds}, not ImageNet's"
    if not any(norm for _, norm in mains):
        yield "it has no BatchNorm layers; ours pass on what they get"
    if network.left_out:
        names = ", ".join(network.left_out[:_MOST_SHOWN]) + (", …" if len(network.left_out) > _MOST_SHOWN else "")
        yield f"left out {count_of(len(network.left_out), 'layer')}: {names}"


def _with_norms(steps: list[Step]) -> Iterator[tuple[Step, _Norm]]:
    """Yield each step with the BatchNorm and the scale that follow a convolution; no flattening before a connected layer."""
    position = 0
    while position < len(steps):
        step, norm = steps[position], {}
        position += 1
        if step.kind == FLATTEN and position < len(steps) and steps[position].kind in (FLATTEN, LINEAR):
            continue
        if step.kind == CONVOLUTION:
            for kind in (BATCH_NORM, SCALE):
                if position < len(steps) and steps[position].kind == kind:
                    norm[kind] = steps[position]
                    position += 1
        yield step, norm


def _recognise(mains: list[tuple[Step, _Norm]], *, sobel: bool, image_size: int) -> tuple[ConvNet, list[Step]]:
    """Return a trunk of this structure with other weights, and the steps after its features: ReLU and the top layer."""
    found = [step.text for step, _ in mains]
    neither = "its network is neither alexnet nor vgg16 as DeepCluster has them"
    depths = {arch: sum(row.channels > 0 for row in TABLES[arch].rows) for arch in ARCHITECTURES}
    depth = sum(step.kind == CONVOLUTION for step, _ in mains)
    arch = next((arch for arch in ARCHITECTURES if depths[arch] == depth), None)
    if arch is None:
        shown = "; ".join(found[:_MOST_SHOWN]) + ("; …" if len(found) > _MOST_SHOWN else "")
        known = " and ".join(f"{arch} {depth}" for arch, depth in depths.items())
        raise Malformed(f"{neither}: it has {count_of(depth, 'convolution')} ({known}): {shown}")
    with Undrawn():
        trunk = cast(ConvNet, make_trunk(arch, image_size=image_size, sobel=sobel))
    wanted = [text for _, text in trunk_layers(trunk)]
    for number, text in enumerate(wanted):
        if number < len(found) and found[number] == text:
            continue
        has = f"layer {mains[number][0].name} is {found[number]}" if number < len(found) else "it ends"
        raise Malformed(f"{neither}: {has} where {arch} for images of {image_size} px has {text}")
    rest = [step for step, _ in mains[len(wanted) :]]
    kinds = [step.kind for step in rest]
    if kinds not in ([], [RELU]) and not (kinds == [RELU, LINEAR] and rest[1].arrays[0].shape[1] == trunk.dim):
        raise Malformed(f"{neither}: after its features it has {'; '.join(step.text for step in rest[:_MOST_SHOWN])}")
    if uneven := uneven_pool(trunk, image_size):
        raise Malformed(f"at {image_size} px {uneven}, and Caffe makes one more: no trunk computes that")
    return trunk, rest


def _tensors(trunk: ConvNet, mains: list[tuple[Step, _Norm]]) -> dict[str, Tensor]:
    """Return the state dict of the trunk with the weights of the steps."""
    found: dict[str, Tensor] = {}
    for (name, _), (step, norm) in zip(trunk_layers(trunk), mains, strict=False):
        if not step.arrays:
            continue
        weight, bias = step.arrays
        found[f"{name}.weight"], found[f"{name}.bias"] = _tensor(weight), _tensor(bias)
        if step.kind == CONVOLUTION:
            group, number = name.split(".")
            after = f"{group}.{int(number) + 1}"
            found |= {f"{after}.{key}": value for key, value in _batch_norm(norm, len(bias)).items()}
    fixed = {f"sobel.{key}": value for key, value in sobel_layer().state_dict().items()}
    # What is left are BatchNorm's counters of batches.
    return {key: found[key] if key in found else fixed.get(key, torch.tensor(0)) for key in trunk.state_dict()}


def _batch_norm(norm: _Norm, channels: int) -> dict[str, Tensor]:
    """Return the tensors of a BatchNorm2d, whose epsilon is fixed, that does what BatchNorm and Scale do together."""
    for step in norm.values():
        if step.arrays[0].size not in (1 if step.kind == SCALE else channels, channels):
            raise Malformed(f"its layer {step.name} ({step.kind}) has {step.arrays[0].size} channels, not {channels}")
    usual = np.float32(1e-5)
    mean, variance, epsilon = np.zeros(channels, np.float32), np.full(channels, 1 - usual), usual
    if BATCH_NORM in norm:
        mean, variance, (epsilon,) = norm[BATCH_NORM].arrays
    factors, summands = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    if SCALE in norm:
        factors, summands = (np.broadcast_to(array, channels) for array in norm[SCALE].arrays)
    if epsilon != usual:
        variance = variance + (epsilon - usual)
    arrays = {"weight": factors, "bias": summands, "running_mean": mean, "running_var": variance}
    return {name: _tensor(array) for name, array in arrays.items()}


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32, order="C"))
