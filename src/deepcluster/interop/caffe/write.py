"""Write AlexNet and VGG-16 as Caffe models, with the layer names of the 2018 release.

Names are the type of PyTorch's backward function of 2017 and a number. The first convolution is always number 5, since
four layers stand before it: two of preprocessing, grey and Sobel; without Sobel four of preprocessing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.core.files import written_beside
from deepcluster.interop.caffe.messages import Message, Word
from deepcluster.interop.caffe.preprocessing import WHITE
from deepcluster.interop.caffe.prototxt import write
from deepcluster.interop.caffe.read import ARCHITECTURES, BINARY, TEXT
from deepcluster.interop.caffe.steps import uneven_pool
from deepcluster.interop.caffe.wire import encode
from deepcluster.models.convnets import ConvNet
from deepcluster.models.trunk import Trunk

_INPUT = "data"
_USUAL_EPSILON = 1e-5


class _Writer:
    """The layers so far: each reads what the one before made."""

    def __init__(self) -> None:
        self.layers: list[Message] = []
        self.number = 0
        self.current = _INPUT

    def add(self, kind: str, function: str, parameters: dict[str, Any], *tensors: Tensor, in_place: bool = False) -> None:
        """Add the next numbered layer; one in place has no name for its output."""
        self.number += 1
        self.put(f"{function}Backward{self.number}", kind, parameters, *tensors, top=self.current if in_place else None)

    def put(self, name: str, kind: str, parameters: dict[str, Any], *tensors: Tensor, top: str | None = None) -> None:
        """Add a layer by its whole name, with one message of parameters and its weights."""
        top = top or name
        self.layers.append(
            {
                "name": [name],
                "type": [kind],
                "bottom": [self.current],
                "top": [top],
                "blobs": [{"data": [_array(tensor)], "shape": [{"dim": list(tensor.shape)}]} for tensor in tensors],
                **{name: [{key: [value] for key, value in values.items()}] for name, values in parameters.items() if values},
            }
        )
        self.current = top

    def convolution(self, weight: Tensor, bias: Tensor, *, stride: int = 1, padding: int = 0) -> None:
        height, width = weight.shape[2:]
        sizes = {"num_output": len(weight), "pad_h": padding, "pad_w": padding, "kernel_h": height, "kernel_w": width}
        self.add("Convolution", "ConvNd", {"convolution_param": {**sizes, "stride": stride}}, weight, bias)

    def per_pixel(self, matrix: Tensor, summands: Tensor) -> None:
        self.convolution(matrix[:, :, None, None], summands)

    def inner_product(self, weight: Tensor, bias: Tensor) -> None:
        self.add("InnerProduct", "Addmm", {"inner_product_param": {"num_output": len(weight)}}, weight, bias)

    def batch_norm(self, layer: nn.BatchNorm2d) -> None:
        mean, variance = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
        self.number += 1
        name = f"BatchNormBackward{self.number}"
        epsilon = {} if layer.eps == _USUAL_EPSILON else {"eps": layer.eps}
        parameters = {"batch_norm_param": {"use_global_stats": True, **epsilon}}
        self.put(f"{name}_bn", "BatchNorm", parameters, mean, variance, torch.ones(1), top=name)
        self.put(f"{name}_scale", "Scale", {"scale_param": {"bias_term": True}}, layer.weight, layer.bias, top=name)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return array


def write_caffe(
    trunk: Trunk,
    out: Path,
    *,
    top_layer: tuple[Tensor, Tensor] | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int = 224,
) -> list[Path]:
    """Write OUT.prototxt and OUT.caffemodel of a network that takes BGR images with values of 0 to 255 as they are.

    Args:
        trunk: AlexNet or VGG-16.
        out: the files' name, with or without one of the two endings.
        top_layer: weight (K, D) and bias (K) of a layer that scores clusters from the features' ReLU.
        mean: that of the run's settings: R, G and B, which are subtracted from images in [0, 1].
        std: that of the settings, by which they are divided then.
        image_size: side of the images in pixels, for which the trunk was made.

    Returns:
        The two files.

    Raises:
        InputError: another architecture, or a size at which Caffe pools maps of other sizes than PyTorch.
    """
    net = describe(trunk, out.name, top_layer=top_layer, mean=mean, std=std, image_size=image_size)
    stem = out.name.removesuffix(TEXT).removesuffix(BINARY)
    text, binary = out.with_name(stem + TEXT), out.with_name(stem + BINARY)
    with written_beside(binary, durable=True) as beside, beside.open("wb") as file:
        file.writelines(encode(net, "NetParameter"))
    layers = [{name: value for name, value in layer.items() if name != "blobs"} for layer in net["layer"]]
    with written_beside(text, durable=True) as beside:
        beside.write_text(write({**net, "layer": list(layers)}), encoding="utf-8")
    return [text, binary]


def describe(
    trunk: Trunk,
    name: str,
    *,
    top_layer: tuple[Tensor, Tensor] | None,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
) -> dict[str, Any]:
    """Return the whole network as Caffe's message, with weights."""
    if not isinstance(trunk, ConvNet) or trunk.arch not in ARCHITECTURES or trunk.classifier is None:
        raise InputError(
            f"{name}: Caffe models are written of {' and '.join(ARCHITECTURES)}, not of {trunk.arch}; use --format onnx"
        )
    if uneven := uneven_pool(trunk, image_size):
        raise InputError(
            f"{name}: at {image_size} px {uneven}, and Caffe would make one more; Caffe models of {trunk.arch} are exact at "
            "224 px, use --format onnx for other sizes"
        )
    writer = _Writer()
    _preprocess(writer, trunk, torch.tensor(mean), torch.tensor(std))
    for layer in (*trunk.features, *trunk.classifier):
        _add(writer, layer)
    # Not in place: the features before and after the ReLU keep names of their own.
    writer.add("ReLU", "Threshold", {})
    if top_layer is not None:
        writer.inner_product(*top_layer)
    return {"name": ["pytorch"], "input": [_INPUT], "input_dim": [1, 3, image_size, image_size], "layer": writer.layers}


def _preprocess(writer: _Writer, trunk: ConvNet, mean_3: Tensor, std_3: Tensor) -> None:
    """Add layers 1 to 4, which make normalised RGB of BGR pixels, or its Sobel edges.

    The normalisation stays apart from the layers that pad with zeros, since these zeros stand for the mean colour.
    """
    swapped, nothing = torch.eye(3).flip(0), torch.zeros(3)
    if trunk.sobel is not None:
        writer.per_pixel(swapped / WHITE, nothing)
        writer.per_pixel(torch.diag(1 / std_3), -mean_3 / std_3)
        grey, edges = trunk.sobel.get_submodule("0"), trunk.sobel.get_submodule("1")
        writer.convolution(grey.get_parameter("weight"), grey.get_parameter("bias"))
        writer.convolution(edges.get_parameter("weight"), edges.get_parameter("bias"), padding=1)
        return
    writer.per_pixel(swapped, nothing)
    writer.per_pixel(torch.eye(3) / WHITE, nothing)
    writer.per_pixel(torch.eye(3), -mean_3)
    writer.per_pixel(torch.diag(1 / std_3), nothing)


def _add(writer: _Writer, layer: nn.Module) -> None:
    match layer:
        case nn.Conv2d():
            bias = layer.get_parameter("bias")
            writer.convolution(layer.weight, bias, stride=layer.stride[0], padding=int(layer.padding[0]))
        case nn.BatchNorm2d():
            writer.batch_norm(layer)
        case nn.ReLU():
            writer.add("ReLU", "Threshold", {}, in_place=True)
        case nn.MaxPool2d():
            kernel, stride = int(layer.kernel_size), int(layer.stride)  # type: ignore[arg-type]
            # Neither round_mode nor ceil_mode: readers disagree about them, and here they change nothing.
            sizes = {"pool": Word("MAX"), "kernel_size": kernel, "stride": stride}
            writer.add("Pooling", "MaxPool2d", {"pooling_param": sizes})
        case nn.Dropout():
            writer.add("Dropout", "Dropout", {"dropout_param": {"dropout_ratio": layer.p}}, in_place=True)
        case nn.Linear():
            writer.inner_product(layer.weight, layer.bias)
