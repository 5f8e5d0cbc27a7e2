"""Fully convolutional networks for segmentation on a copy of a trunk: FCN-32s and FCN with dilation.

FCN-32s (Long, Shelhamer and Darrell, CVPR 2015; the settings of fcn.berkeleyvision.org: voc-fcn-alexnet, voc-fcn32s) is for
trunks with fully connected layers, FCN with dilation 8 (OpenMMLab, fcn_r50-d8) for all that can be dilated.

B batch, C classes, H and W pixels, h and w cells.
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, dropout, relu

from deepcluster.core.errors import InputError
from deepcluster.evaluation.trainer import seeded
from deepcluster.models.convnets import ConvNet
from deepcluster.models.dilation import dilated
from deepcluster.models.geometry import geometry, traced_size
from deepcluster.models.receptive_field import stage_shapes
from deepcluster.models.trunk import FEATURES, Trunk

RECIPES = ("fcn32", "fcn-d8")
OUT, AUX = "out", "aux"
STRIDE = 8
# The pixel at which the first cell of fc7 is centred: 12.5, or 13 where cells are centred at pixels. The published padding
# of 100 gives these to networks for 224 px.
_FIRST_CENTRE = 12.5


def make_fcn(trunk: Trunk, recipe: str, classes: int, *, seed: int) -> nn.Module:
    """Make the network on a trunk, which is changed and becomes its attribute `trunk`; on the trunk's device.

    It takes normalised images (B, 3, H, W) and returns scores (logits) by name: "out", and while training with dilation also
    "aux", whose loss has the weight 0.4. Those of FCN-32s are (B, C, H, W), those with dilation (B, C, h, w), to be resized
    to the image by bilinear interpolation.

    Args:
        trunk: a copy: its paddings or strides are changed, and its fully connected layers move into the network.
        recipe: "fcn32", "fcn-d8", or "auto": the first of these that fits the trunk.
        classes: C.
        seed: of the weights of new layers.

    Raises:
        InputError: the recipe does not fit the trunk.
    """
    has_layers = isinstance(trunk, ConvNet) and trunk.classifier is not None
    if recipe == "auto":
        recipe = "fcn32" if has_layers else "fcn-d8"
    if recipe == "fcn32" and not has_layers:
        raise InputError(
            f"fcn32 needs fully connected layers, which alexnet and vgg16 have; {trunk.arch} has none: use fcn-d8"
        )
    weight = next(trunk.parameters())
    with seeded(seed, torch.device("cpu")):
        network = FCN32s(trunk, classes) if recipe == "fcn32" else FCNd8(trunk, classes)
    return network.to(weight.device, weight.dtype)


class FCN32s(nn.Module):
    """AlexNet or VGG-16 with fc6 and fc7 as convolutions, a new layer of scores, and fixed bilinear upsampling.

    The first convolution has so much more padding that the cells of fc7 cover the image (100 pixels in a network for images
    of 224 px), and pools keep the rest of a map, as Caffe's do. A Sobel layer sees the image continued by its outermost
    pixels; what is padded are its edges, with zeros: the border of the image is no edge.

    Attributes:
        crop: pixels that are cut off the upsampled scores at left and top (18 for AlexNet, 19 for VGG-16, as published).
    """

    kernel_KK: Tensor

    def __init__(self, trunk: Any, classes: int) -> None:
        super().__init__()
        first, pool = trunk.features[0], trunk.features[-1]
        fc6, fc7 = (layer for layer in trunk.classifier if isinstance(layer, nn.Linear))
        stage = trunk.last_map
        channels = stage_shapes(trunk, [stage], traced_size(trunk))[stage].channels
        side = isqrt(fc6.in_features // channels)
        last = geometry(trunk, stage)
        self.stride = last.stride * pool.stride
        centre = last.offset + last.stride * (pool.kernel_size - 1) / 2 + self.stride * (side - 1) / 2
        more = int(centre - _FIRST_CENTRE)
        first.padding = tuple(one + more for one in first.padding)
        for layer in trunk.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
        if trunk.sobel is not None:
            trunk.sobel[-1].padding_mode = "replicate"
        # Odd where cells are centred at pixels, even where between them.
        size = 2 * self.stride - (1 if centre == int(centre) else 0)
        self.crop = int((size - 1) / 2 - (centre - more))
        self.register_buffer("kernel_KK", bilinear_kernel(size, self.stride), persistent=False)
        trunk.classifier = None
        self.trunk = trunk
        self.fc6, self.fc7 = _convolution(fc6, side), _convolution(fc7, 1)
        self.score = nn.Conv2d(fc7.out_features, classes, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.get_parameter("bias"))

    def cells(self, x_BCHW: Tensor) -> Tensor:
        """Return the scores (B, C, h, w) of the cells of fc7."""
        x = self.trunk.features(self.trunk.edges(x_BCHW))
        x = dropout(relu(self.fc6(x)), 0.5, self.training)
        x = dropout(relu(self.fc7(x)), 0.5, self.training)
        return self.score(x)  # type: ignore[no-any-return]

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the scores (B, C, H, W) of the pixels."""
        scores_BCHW = upsampled(self.cells(x_BCHW), self.kernel_KK, self.stride)
        height, width = x_BCHW.shape[2:]
        return {OUT: scores_BCHW[:, :, self.crop : self.crop + height, self.crop : self.crop + width]}


class FCNd8(nn.Module):
    """A trunk with stride 8 by dilation, a head of convolutions, and an auxiliary head on the stage before.

    The heads have a quarter of the channels of their input (512 on the 2048 of a ResNet-50's layer4, 256 on layer3). The
    auxiliary stage is the last one before the last stride of the network; without one there is no such head.
    """

    def __init__(self, trunk: Trunk, classes: int) -> None:
        super().__init__()
        stages = [name for name in trunk.stages if name != FEATURES]
        strides = {name: geometry(trunk, name).stride for name in stages}
        self.stage = stages[-1]
        before = [name for name in stages if strides[name] < strides[self.stage]]
        self.aux_stage = before[-1] if before else None
        self.trunk = dilated(trunk, self.stage, min(STRIDE, strides[self.stage]))
        widths = {name: shape.channels for name, shape in stage_shapes(trunk, stages, traced_size(trunk)).items()}
        self.head = ConvolutionalHead(widths[self.stage], classes)
        self.aux_head = None if self.aux_stage is None else _auxiliary_head(widths[self.aux_stage], classes)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the scores (B, C, h, w) of the cells, eight pixels apart."""
        if self.aux_head is None or self.aux_stage is None or not self.training:
            return {OUT: self.head(self.trunk.stage(x_BCHW, self.stage))}
        maps = self.trunk.maps(x_BCHW, (self.aux_stage, self.stage))
        return {OUT: self.head(maps[self.stage]), AUX: self.aux_head(maps[self.aux_stage])}


class ConvolutionalHead(nn.Module):
    """Two 3 x 3 convolutions, a third on their output beside the input, and scores; BatchNorm and ReLU after each."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        width = _width_of(channels)
        self.convolutions = nn.Sequential(_block(channels, width), _block(width, width))
        self.joined = _block(channels + width, width)
        self.scores = _scores(width, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the scores of the cells."""
        joined_BCHW = self.joined(torch.cat([x_BCHW, self.convolutions(x_BCHW)], dim=1))
        return self.scores(joined_BCHW)  # type: ignore[no-any-return]


def _width_of(channels: int) -> int:
    return max(1, channels // 4)


def _auxiliary_head(channels: int, classes: int) -> nn.Sequential:
    width = _width_of(channels)
    return nn.Sequential(_block(channels, width), _scores(width, classes))


def _block(channels: int, width: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def _scores(width: int, classes: int) -> nn.Sequential:
    """Return dropout of whole channels, and the layer of scores."""
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.get_parameter("bias"))
    return nn.Sequential(nn.Dropout2d(0.1), layer)


def _convolution(layer: nn.Linear, side: int) -> nn.Conv2d:
    """Return a fully connected layer on maps of `side` x `side` cells as a convolution, with the same weights."""
    channels = layer.in_features // side**2
    with torch.device("meta"):
        convolution = nn.Conv2d(channels, layer.out_features, side)
    convolution.weight = nn.Parameter(layer.weight.detach().view(-1, channels, side, side))
    convolution.bias = nn.Parameter(layer.bias.detach())
    return convolution


def bilinear_kernel(size: int, stride: int) -> Tensor:
    """Return the weights (size, size) of a deconvolution that interpolates between cells `stride` pixels apart."""
    line = 1 - (torch.arange(size, dtype=torch.float64) - (size - 1) / 2).abs() / stride
    return line[:, None] * line


def upsampled(map_BChw: Tensor, kernel_KK: Tensor, stride: int, padding: int = 0) -> Tensor:
    """Return maps after a fixed deconvolution, each channel by itself, in float32 or more."""
    dtype = torch.promote_types(map_BChw.dtype, torch.float32)
    with torch.autocast(map_BChw.device.type, enabled=False):
        rows = map_BChw.flatten(0, 1)[:, None].to(dtype)
        large = conv_transpose2d(rows, kernel_KK[None, None].to(dtype), stride=stride, padding=padding)
    return large.view(*map_BChw.shape[:2], *large.shape[2:])
