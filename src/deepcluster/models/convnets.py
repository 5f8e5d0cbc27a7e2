"""The convolutional networks of the paper as tables for one class; the fixed Sobel layer.

B batch, C channels, H and W pixels, D features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.trunk import FEATURES, Trunk


@dataclass(frozen=True)
class Convolution:
    """One row of a table: convolution (with bias), BatchNorm, ReLU."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class Pool:
    """One row of a table: max pooling."""

    kernel: int
    stride: int


@dataclass(frozen=True)
class Table:
    """A whole network: its convolutions, then two fully connected layers.

    Attributes:
        hidden: width of the fully connected layers; None: there are none, the features are the average of the last map.
        embed_stage: as in `Trunk`.
        input_dropout: dropout also before the first fully connected layer, not only between the two.
    """

    rows: tuple[Convolution | Pool, ...]
    hidden: int | None
    embed_stage: str
    input_dropout: bool = True


ALEXNET = Table(
    rows=(
        Convolution(96, kernel=11, stride=4, padding=2),
        Pool(3, 2),
        Convolution(256, kernel=5, padding=2),
        Pool(3, 2),
        Convolution(384, kernel=3),
        Convolution(384, kernel=3),
        Convolution(256, kernel=3),
        Pool(3, 2),
    ),
    hidden=4096,
    embed_stage="conv5",
)


def _vgg_block(channels: int, convolutions: int) -> tuple[Convolution | Pool, ...]:
    return (*[Convolution(channels, kernel=3)] * convolutions, Pool(2, 2))


# Configuration D of Simonyan and Zisserman (arXiv 1409.1556, table 1), with BatchNorm.
VGG16 = Table(
    rows=(*_vgg_block(64, 2), *_vgg_block(128, 2), *_vgg_block(256, 3), *_vgg_block(512, 3), *_vgg_block(512, 3)),
    hidden=4096,
    embed_stage="conv13",
    input_dropout=False,
)

# The paper's filters with small strides, for images of 32 to 96 px: at 32 px the maps are 16, 8 and 4 wide.
ALEXNET_SMALL = Table(
    rows=(
        Convolution(96, kernel=5, stride=2, padding=2),
        Pool(2, 2),
        Convolution(256, kernel=3),
        Pool(2, 2),
        Convolution(384, kernel=3),
        Convolution(384, kernel=3),
        Convolution(256, kernel=3),
    ),
    hidden=None,
    embed_stage=FEATURES,
)

TABLES = {"alexnet": ALEXNET, "vgg16": VGG16, "alexnet-small": ALEXNET_SMALL}


def sobel_layer() -> nn.Sequential:
    """Return the fixed layer of the paper (section 3): grey as the mean of RGB, then two Sobel filters; never trained."""
    grey = nn.Conv2d(3, 1, kernel_size=1)
    edges = nn.Conv2d(1, 2, kernel_size=3, padding=1)
    horizontal = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    with torch.no_grad():
        grey.weight.fill_(1 / 3)
        edges.weight.copy_(torch.stack([horizontal, horizontal.T])[:, None])
        for layer in (grey, edges):
            if layer.bias is not None:
                layer.bias.zero_()
    return nn.Sequential(grey, edges).requires_grad_(False)


def _map_size(rows: Sequence[Convolution | Pool], image_size: int) -> int:
    """Return the width of the last map for a square image, 0 where the image is too small."""
    size = image_size
    for row in rows:
        padding = row.padding if isinstance(row, Convolution) else 0
        size = (size + 2 * padding - row.kernel) // row.stride + 1
        if size < 1:
            return 0
    return size


def _convolutions(rows: Sequence[Convolution | Pool], channels: int) -> tuple[nn.Sequential, dict[str, int]]:
    """Return the layers, and for each stage the number of layers up to its ReLU, which is included."""
    layers: list[nn.Module] = []
    stage_ends: dict[str, int] = {}
    for row in rows:
        if isinstance(row, Pool):
            layers.append(nn.MaxPool2d(row.kernel, row.stride))
            continue
        layers += [
            nn.Conv2d(channels, row.channels, row.kernel, row.stride, row.padding),
            nn.BatchNorm2d(row.channels),
            nn.ReLU(inplace=True),
        ]
        channels = row.channels
        stage_ends[f"conv{len(stage_ends) + 1}"] = len(layers)
    return nn.Sequential(*layers), stage_ends


def _fully_connected(table: Table, inputs: int, dropout: float) -> nn.Sequential | None:
    """Return the two layers with their dropout, where the table has them."""
    if table.hidden is None:
        return None
    return nn.Sequential(
        *([nn.Dropout(dropout)] if table.input_dropout else []),
        nn.Linear(inputs, table.hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(table.hidden, table.hidden),
    )


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
        size = _map_size(table.rows, image_size)
        if size < 1:
            smallest = next(s for s in range(1, 1024) if _map_size(table.rows, s) >= 1)
            raise InputError(
                f"image_size={image_size} is too small for {arch}; use {smallest} or more"
                + (", or an architecture for small images (alexnet-small, resnet18-small)" if smallest > 32 else "")
            )
        self.sobel = sobel_layer() if sobel else None
        self.features, self._stage_ends = _convolutions(table.rows, channels=2 if sobel else 3)
        channels = next(row.channels for row in reversed(table.rows) if isinstance(row, Convolution))
        self.classifier = _fully_connected(table, channels * size * size, dropout)
        self.arch = arch
        self.dim = table.hidden or channels
        self.stages = (*self._stage_ends, FEATURES)
        self.embed_stage = table.embed_stage
        self._initialise()

    def _initialise(self) -> None:
        """Draw normal weights as in the 2018 release: deviation sqrt(2 / fan-out) for convolutions, else 0.01; biases 0."""
        for layer in (*self.features, *(self.classifier or ())):
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
                nn.init.normal_(layer.weight, std=sqrt(2.0 / fan_out))
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
            else:
                continue
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

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
