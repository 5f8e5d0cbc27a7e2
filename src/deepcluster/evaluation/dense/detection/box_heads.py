"""What of a trunk a detector of two stages uses: the stage whose map is pooled, and the layers after it as the box head.

- AlexNet, VGG-16: the last convolutional stage, max-pooled to the size that the network itself has there; fc6 and fc7.
- ResNet-18, ResNet-50: layer3, aligned 14 x 14; layer4, then another BatchNorm (C4, as in MoCo, He et al., CVPR 2020).
- Other convolutional networks: the last stage, aligned 7 x 7; two new fully connected layers of 1,024.

R regions, C channels, P cells of a side, D features.
"""

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from deepcluster.core.errors import InputError
from deepcluster.evaluation.dense.detection.roi import AlignedPooler, MaxPooler
from deepcluster.evaluation.trainer import seeded
from deepcluster.models.convnets import ConvNet, ResNet
from deepcluster.models.geometry import Geometry, geometry
from deepcluster.models.named import MISFITS
from deepcluster.models.trunk import FEATURES, Trunk

C4_STAGE, C4_CELLS = "layer3", 14
NEW_CELLS, NEW_WIDTH = 7, 1024
DROPOUT = 0.5
# Fast R-CNN left so many stages of its networks as they were; those of the others are trained.
FIXED_STAGES = {"alexnet": 1, "vgg16": 4, "vgg16-deepercluster": 4}


class FullyConnected(nn.Module):
    """fc6 and fc7, each with ReLU and dropout; layers of the trunk itself."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.layers = nn.Sequential(first, nn.ReLU(), nn.Dropout(DROPOUT), second, nn.ReLU(), nn.Dropout(DROPOUT))

    def forward(self, x_RCPP: Tensor) -> Tensor:
        """Return the features (R, D) of regions."""
        return self.layers(x_RCPP.flatten(1))  # type: ignore[no-any-return]


class LastLayer(nn.Module):
    """layer4 of a ResNet, BatchNorm, and the mean.

    Args:
        width: D, the channels of the layer.
    """

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.norm = layer, nn.BatchNorm2d(width)

    def forward(self, x_RCPP: Tensor) -> Tensor:
        """Return the features (R, D) of regions."""
        return self.norm(self.layer(x_RCPP)).mean(dim=(2, 3))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Parts:
    """A trunk taken apart for a detector.

    Attributes:
        stage: whose map, of `width` channels, is pooled.
        cells: where the cells of the map are in the image, after it is padded by `shift` pixels at left and top.
        pooler, head: make rows of `features` numbers of regions of the map.
        head_name: what the head is, in a few words.
        fixed_stage: the last stage that Fast R-CNN leaves as it is; none if empty.
    """

    trunk: Trunk
    stage: str
    width: int
    cells: Geometry
    shift: int
    pooler: nn.Module
    head: nn.Module
    features: int
    head_name: str
    fixed_stage: str = ""


def parts_of(trunk: Trunk, image_size: int, seed: int) -> Parts:
    """Return the parts of a trunk, in eval mode and on the CPU or another device; fc6-7 or layer4 move from it to the head.

    Args:
        image_size: side of the images that it was trained on.
        seed: of the weights of new layers.

    Raises:
        InputError: the trunk takes images of one size only, or has no maps.
    """
    is_c4 = isinstance(trunk, ResNet) and trunk.arch in ("resnet18", "resnet50")
    maps = [name for name in trunk.stages if name != FEATURES]
    stage = C4_STAGE if is_c4 else maps[-1] if maps else FEATURES
    width = _width(trunk, stage, image_size)
    cells = geometry(trunk, stage)
    first = FIXED_STAGES.get(trunk.arch, 0)
    fixed_stage = maps[first - 1] if first else ""

    def parts(pooler: nn.Module, head: nn.Module, features: int, name: str, centre: float) -> Parts:
        # With the shift that brings the centre of cell 0 to the pixel where the pooler has it, or just after it.
        shift = max(0, int(cells.offset - centre))
        moved = Geometry(cells.stride, cells.offset - shift)
        return Parts(trunk, stage, width, moved, shift, pooler, head, features, name, fixed_stage)

    centre = (cells.stride - 1) / 2
    if is_c4:
        head = LastLayer(trunk.get_submodule("backbone.layer4"), trunk.dim)
        trunk.set_submodule("backbone.layer4", nn.Identity())
        return parts(AlignedPooler(C4_CELLS, [cells.stride]), head, trunk.dim, "layer4", centre)
    if isinstance(trunk, ConvNet) and trunk.classifier is not None:
        fc6, fc7 = (layer for layer in trunk.classifier if isinstance(layer, nn.Linear))
        trunk.classifier = None
        pooler = MaxPooler(isqrt(fc6.in_features // width), cells.stride)
        return parts(pooler, FullyConnected(fc6, fc7), fc7.out_features, "fc6-7", 0.0)
    with seeded(seed, torch.device("cpu")):
        new = TwoMLPHead(width * NEW_CELLS**2, NEW_WIDTH)
    return parts(AlignedPooler(NEW_CELLS, [cells.stride]), new, NEW_WIDTH, "two new layers", centre)


def _width(trunk: Trunk, stage: str, image_size: int) -> int:
    """Return the channels of a stage, after a look at an image of another size and form."""
    device, dtype = (getattr(next(trunk.parameters()), name) for name in ("device", "dtype"))
    widest = max(64, 32 * -(-image_size // 32))
    try:
        with torch.no_grad():
            map_BCHW = trunk.stage(torch.zeros(1, 3, widest, widest + 64, device=device, dtype=dtype), stage)
    except (InputError, *MISFITS):
        map_BCHW = torch.empty(1, 0, 1, 1)
    if map_BCHW.shape[2] * map_BCHW.shape[3] <= 1:
        raise InputError(
            f"{trunk.arch} takes images of {image_size} px only, or has no maps: a detector needs a convolutional network, "
            "which takes images of all sizes, such as alexnet, vgg16, resnet18, resnet50, or torchvision's and timm's"
        )
    return map_BCHW.shape[1]
