"""The convolutional networks of the paper as tables for one class, ResNets of torchvision; the fixed Sobel layer.

B batch, C channels, H and W pixels, D features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.trunk import FEATURES, Trunk


@dataclass(frozen=True)
class Row:
    """One row of a table: convolution (with bias), BatchNorm, ReLU; without channels: max pooling."""

    kernel: int
    stride: int = 1
    padding: int = 0
    channels: int = 0


@dataclass(frozen=True)
class Table:
    """A whole network: its convolutions, then two fully connected layers.

    Attributes:
        hidden: width of the fully connected layers; None: there are none, the features are the average of the last map.
        embed_stage: as in `Trunk`.
        input_dropout: dropout also before the first fully connected layer, not only between the two.
        border: pixels of zeros by which the image is larger on each side.
    """

    rows: tuple[Row, ...]
    hidden: int | None
    embed_stage: str
    input_dropout: bool = True
    border: int = 0


ALEXNET = Table(
    rows=(
        Row(11, stride=4, padding=2, channels=96),
        Row(3, stride=2),
        Row(5, padding=2, channels=256),
        Row(3, stride=2),
        Row(3, padding=1, channels=384),
        Row(3, padding=1, channels=384),
        Row(3, padding=1, channels=256),
        Row(3, stride=2),
    ),
    hidden=4096,
    embed_stage="conv5",
)

# Configuration D of Simonyan and Zisserman (arXiv 1409.1556, table 1), with BatchNorm.
VGG16 = Table(
    rows=tuple(
        row
        for channels, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
        for row in (*[Row(3, padding=1, channels=channels)] * depth, Row(2, stride=2))
    ),
    hidden=4096,
    embed_stage="conv13",
    input_dropout=False,
)

# The paper's filters with small strides, for images of 32 to 96 px: at 32 px the maps are 16, 8 and 4 wide.
ALEXNET_SMALL = Table(
    rows=(
        Row(5, stride=2, padding=2, channels=96),
        Row(2, stride=2),
        Row(3, padding=1, channels=256),
        Row(2, stride=2),
        Row(3, padding=1, channels=384),
        Row(3, padding=1, channels=384),
        Row(3, padding=1, channels=256),
    ),
    hidden=None,
    embed_stage=FEATURES,
)

TABLES = {
    "alexnet": ALEXNET,
    "vgg16": VGG16,
    # The models released with DeeperCluster see a border of zeros around the image.
    "vgg16-deepercluster": replace(VGG16, border=1),
    "alexnet-small": ALEXNET_SMALL,
}
RESNET_LAYERS = ("layer1", "layer2", "layer3", "layer4")
SMALLEST_IMAGE = 8


def sobel_layer(padding: int = 1) -> nn.Sequential:
    """Return the fixed layer of the paper (section 3): grey as the mean of RGB, then two Sobel filters; never trained."""
    layers = nn.Sequential(nn.Conv2d(3, 1, kernel_size=1), nn.Conv2d(1, 2, kernel_size=3, padding=padding))
    horizontal = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    weights = {"0.weight": torch.full((1, 3, 1, 1), 1 / 3), "1.weight": torch.stack([horizontal, horizontal.T])[:, None]}
    layers.load_state_dict({**weights, "0.bias": torch.zeros(1), "1.bias": torch.zeros(2)})
    return layers.requires_grad_(False)


def _map_size(rows: Sequence[Row], image_size: int) -> int:
    """Return the width of the last map for a square image, below 1 where the image is too small."""
    for row in rows:
        image_size = (image_size + 2 * row.padding - row.kernel) // row.stride + 1
    return image_size


class ConvNet(Trunk):
    """AlexNet, VGG-16 and the small AlexNet, with the parameter names of the 2018 release.

    `features.N` are the convolutions, `classifier.N` the two fully connected layers, `sobel.N` the fixed layer where it
    is used. The features are taken before the last ReLU, which belongs to the head.

    Args:
        arch: a name in `TABLES`.
        image_size: side of the square images in pixels; fixes the width of the first fully connected layer.
        sobel: put the fixed Sobel layer in front.
        dropout: dropout rate before the fully connected layers (in VGG-16 only before the second); 0.5 in the paper.

    Raises:
        InputError: the image is too small for the pools and strides.
    """

    def __init__(self, arch: str, *, image_size: int, sobel: bool, dropout: float = 0.5) -> None:
        super().__init__()
        table = TABLES[arch]
        size = _map_size(table.rows, image_size + 2 * table.border)
        if size < 1:
            smallest = next(s for s in range(1, 1024) if _map_size(table.rows, s + 2 * table.border) >= 1)
            raise InputError(
                f"image_size={image_size} is too small for {arch}; use {smallest} or more"
                + (", or an architecture for small images (alexnet-small, resnet18-small)" if smallest > 32 else "")
            )
        self.sobel = sobel_layer(1 + table.border) if sobel else None
        # Of a network without Sobel, whose first convolution gets the border.
        border = 0 if sobel else table.border
        layers: list[nn.Module] = []
        # For each stage the number of layers up to its ReLU, which is included.
        self._stage_ends: dict[str, int] = {}
        channels = 2 if sobel else 3
        for row in table.rows:
            if not row.channels:
                layers.append(nn.MaxPool2d(row.kernel, row.stride))
                continue
            layers.append(nn.Conv2d(channels, row.channels, row.kernel, row.stride, row.padding + border))
            border = 0
            layers += [nn.BatchNorm2d(row.channels), nn.ReLU(inplace=True)]
            channels = row.channels
            self._stage_ends[f"conv{len(self._stage_ends) + 1}"] = len(layers)
        self.features = nn.Sequential(*layers)
        self.classifier: nn.Sequential | None = None
        if table.hidden is not None:
            self.classifier = nn.Sequential(
                *([nn.Dropout(dropout)] if table.input_dropout else []),
                nn.Linear(channels * size * size, table.hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                nn.Linear(table.hidden, table.hidden),
            )
        self.arch = arch
        self.dim = table.hidden or channels
        self.stages = (*self._stage_ends, FEATURES)
        self.embed_stage = table.embed_stage
        # Normal weights as in the 2018 release: deviation sqrt(2 / fan-out) for convolutions, else 0.01; biases 0.
        for layer in (*self.features, *(self.classifier or ())):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fan_out = layer.weight.numel() // layer.weight.shape[1]
                nn.init.normal_(layer.weight, std=sqrt(2.0 / fan_out) if isinstance(layer, nn.Conv2d) else 0.01)
                nn.init.constant_(layer.get_parameter("bias"), 0)

    def _features_of(self, maps_BCHW: Tensor) -> Tensor:
        if self.classifier is None:
            return maps_BCHW.mean(dim=(2, 3))
        return self.classifier(maps_BCHW.flatten(1))  # type: ignore[no-any-return]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self._features_of(self.features(self.edges(x_BCHW)))

    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        map_BCHW, first = self.edges(x_BCHW), 0
        for name, end in self._stage_ends.items():
            map_BCHW, first = self.features[first:end](map_BCHW), end
            yield name, map_BCHW
        yield FEATURES, self._features_of(self.features[first:](map_BCHW))[:, :, None, None]

    def convolutions(self) -> nn.Module:
        return self.features


class ResNet(Trunk):
    """ResNet-18 or ResNet-50 of torchvision without its classifier; "features" are the average-pooled last stage.

    `resnet18-small` has the stem for images of 32 to 96 px: a 3×3 convolution of stride 1 and no pooling.

    Raises:
        InputError: images under 8 px.
    """

    def __init__(self, arch: str, *, image_size: int, sobel: bool) -> None:
        super().__init__()
        import torchvision  # Takes three seconds.

        if image_size < SMALLEST_IMAGE:
            raise InputError(f"image_size={image_size} is too small for {arch}; use {SMALLEST_IMAGE} or more")
        name, _, small = arch.partition("-")
        self.backbone = getattr(torchvision.models, name)(weights=None)
        self.dim = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.sobel = sobel_layer() if sobel else None
        if small or sobel:
            kernel, stride = (3, 1) if small else (7, 2)
            stem = nn.Conv2d(2 if sobel else 3, 64, kernel, stride, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
            self.backbone.conv1 = stem
        if small:
            self.backbone.maxpool = nn.Identity()
        self.arch = arch
        self.stages = ("stem", *RESNET_LAYERS, FEATURES)
        self.embed_stage = FEATURES

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.maps(x_BCHW, (FEATURES,))[FEATURES].flatten(1)

    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        net = self.backbone
        x = net.relu(net.bn1(net.conv1(self.edges(x_BCHW))))
        yield "stem", x
        x = net.maxpool(x)
        for layer in RESNET_LAYERS:
            x = getattr(net, layer)(x)
            yield layer, x
        yield FEATURES, x.mean(dim=(2, 3), keepdim=True)

    def convolutions(self) -> nn.Module:
        return self.backbone  # type: ignore[no-any-return]
