"""A small ResNet that starts from patches of the images, and gives whitened features of all its maps.

Filters that are random patches, whitened, and the averages of their maps over the quadrants of an image tell images apart
before any training (Coates, Ng and Lee, AISTATS 2011; Thiry et al., ICLR 2021). Training makes the layers behind them.

B batch, C channels, H and W pixels, N images, D numbers of the averages, P components of the features.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, normalize

from deepcluster.core.errors import InputError
from deepcluster.models.convnets import SMALLEST_IMAGE, sobel_layer
from deepcluster.models.trunk import FEATURES, Trunk

# The stage after the features: what `embed` gives.
WHITENED = "whitened"
PATCH, FILTERS = 6, 64
WIDTHS = (64, 128, 256)
COMPONENTS = 512
PATCHES = 50_000
# What is added to the variances of patches before they are whitened, as a share of their mean.
SHRINKAGE = 0.1


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNorm, and a shortcut: averaged where the map shrinks (ResNet-D, arXiv 1812.01187)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.stride = stride
        self.shortcut: nn.Module | None = None
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the map (B, width, H / stride, W / stride), after its ReLU."""
        y_BCHW = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x_BCHW)))))
        if self.shortcut is not None:
            x_BCHW = avg_pool2d(x_BCHW, self.stride, ceil_mode=True) if self.stride > 1 else x_BCHW
            x_BCHW = self.shortcut(x_BCHW)
        return self.relu2(y_BCHW + x_BCHW)  # type: ignore[no-any-return]


class PatchResNet(Trunk):
    """Filters that are patches, then three residual blocks; "features" are the average of the last map.

    `whitened`, what `embed` gives, is made of the averages of all maps over the four quadrants of the image. It is a random
    projection of them until `mean_D` and `components_DP` are those of images.

    Raises:
        InputError: images under 8 px.
    """

    def __init__(self, *, image_size: int, sobel: bool) -> None:
        super().__init__()
        if image_size < SMALLEST_IMAGE:
            raise InputError(f"image_size={image_size} is too small for resnet-patches; use {SMALLEST_IMAGE} or more")
        self.sobel = sobel_layer() if sobel else None
        self.body = nn.Sequential(nn.Conv2d(2 if sobel else 3, FILTERS, PATCH, stride=2, padding=2, bias=False))
        self.body.append(nn.BatchNorm2d(FILTERS)).append(nn.ReLU())
        channels = FILTERS
        for number, width in enumerate(WIDTHS):
            self.body.append(Block(channels, width, 2 if number else 1))
            channels = width
        for layer in self.body.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        n_averages = 4 * (FILTERS + sum(WIDTHS))
        self.register_buffer("mean_D", torch.zeros(n_averages))
        self.register_buffer("components_DP", torch.randn(n_averages, COMPONENTS) * COMPONENTS**-0.5)
        self.arch, self.dim = "resnet-patches", channels
        self.stages = ("patches", *(f"block{number + 1}" for number in range(len(WIDTHS))), FEATURES)
        self.embed_stage = WHITENED

    mean_D: Tensor
    components_DP: Tensor

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.body(self.edges(x_BCHW)).mean(dim=(2, 3))  # type: ignore[no-any-return]

    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        map_BCHW = self.edges(x_BCHW)
        for name, layers in zip(self.stages, (self.body[:3], *self.body[3:]), strict=False):
            map_BCHW = layers(map_BCHW)
            yield name, map_BCHW
        yield FEATURES, map_BCHW.mean(dim=(2, 3), keepdim=True)

    def maps(self, x_BCHW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        if WHITENED not in names:
            return super().maps(x_BCHW, names)
        found = super().maps(x_BCHW, self.stages)
        with torch.autocast(x_BCHW.device.type, enabled=False):  # Small differences of large numbers.
            averages_BD = _averages(found[name] for name in self.stages[:-1]).to(self.components_DP.dtype)
            found[WHITENED] = ((averages_BD - self.mean_D) @ self.components_DP)[:, :, None, None]
        return {name: found[name] for name in names}

    def check_stage(self, name: str) -> None:
        if name != WHITENED:
            super().check_stage(name)

    def convolutions(self) -> nn.Module:
        return self.body

    @torch.no_grad()
    def begin(self, images: Iterable[Tensor], *, seed: int) -> None:
        """Take the first filters from normalised images (B, 3, H, W), and the statistics of the BatchNorm layers.

        Args:
            images: batches of a sample; read twice.
            seed: seed of the patches.
        """
        weight = self.body[0].get_parameter("weight")
        patches_ND = torch.cat([_patches(self.edges(x_BCHW).float(), seed + i) for i, x_BCHW in enumerate(images)])
        weight.copy_(_filters(patches_ND, FILTERS).view_as(weight))
        norms = [layer for layer in self.body.modules() if isinstance(layer, nn.BatchNorm2d)]
        usual = [layer.momentum for layer in norms]
        for layer in norms:
            layer.reset_running_stats()
            layer.momentum = None  # The average over all batches.
        self.train()
        for x_BCHW in images:
            self(x_BCHW)
        for layer, momentum in zip(norms, usual, strict=True):
            layer.momentum = momentum

    @torch.no_grad()
    def averages(self, x_BCHW: Tensor) -> Tensor:
        """Return what `whitened` is made of: the averages (B, D) of all maps of normalised images over their quadrants."""
        return _averages(self.maps(x_BCHW, self.stages[:-1]).values())


def _averages(maps: Iterable[Tensor]) -> Tensor:
    """Return the averages (B, D) of maps (B, C, H, W) over the four quadrants of the image, in float32 or wider."""
    wide = (map_BCHW.float() if map_BCHW.itemsize < 4 else map_BCHW for map_BCHW in maps)
    return torch.cat([adaptive_avg_pool2d(map_BCHW, 2).flatten(1) for map_BCHW in wide], dim=1)


def _patches(images_BCHW: Tensor, seed: int) -> Tensor:
    """Return random patches of images as rows, as many of each image."""
    generator = torch.Generator().manual_seed(seed)
    count, _, height, width = images_BCHW.shape
    windows = images_BCHW.unfold(2, PATCH, 1).unfold(3, PATCH, 1)
    places = torch.arange(count).repeat_interleave(25)
    tops, lefts = (torch.randint(side - PATCH + 1, (len(places),), generator=generator) for side in (height, width))
    return windows[places, :, tops, lefts].flatten(1).cpu()


def _filters(patches_ND: Tensor, count: int) -> Tensor:
    """Return filters (count, D): patches, whitened, as linear maps of patches that are not."""
    centred_ND = patches_ND - patches_ND.mean(dim=0)
    values_D, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))
    whiten_DD: Tensor = (vectors_DD * (values_D + SHRINKAGE * values_D.mean() + 1e-12).rsqrt()) @ vectors_DD.T
    chosen = torch.linspace(0, len(centred_ND) - 1, count).long()
    filters_KD: Tensor = normalize(centred_ND[chosen] @ whiten_DD) @ whiten_DD
    return filters_KD
