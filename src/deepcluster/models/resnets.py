"""ResNets of torchvision as trunks, also with the 3×3 stem of the CIFAR literature for small images.

B batch, C channels, H and W pixels.
"""

from collections.abc import Iterator

import torchvision
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.convnets import sobel_layer
from deepcluster.models.trunk import FEATURES, Trunk

LAYERS = ("layer1", "layer2", "layer3", "layer4")
SMALLEST_IMAGE = 8


class ResNet(Trunk):
    """ResNet-18 or ResNet-50 of torchvision without its classifier; "features" are the average-pooled last stage.

    `resnet18-small` has the stem for images of 32 to 96 px: a 3×3 convolution of stride 1 and no pooling.

    Raises:
        InputError: images under 8 px.
    """

    def __init__(self, arch: str, *, image_size: int, sobel: bool) -> None:
        super().__init__()
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
        self.stages = ("stem", *LAYERS, FEATURES)
        self.embed_stage = FEATURES

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.maps(x_BCHW, (FEATURES,))[FEATURES].flatten(1)

    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        net = self.backbone
        x = net.relu(net.bn1(net.conv1(self.edges(x_BCHW))))
        yield "stem", x
        x = net.maxpool(x)
        for layer in LAYERS:
            x = getattr(net, layer)(x)
            yield layer, x
        yield FEATURES, x.mean(dim=(2, 3), keepdim=True)

    def convolutions(self) -> nn.Module:
        return self.backbone  # type: ignore[no-any-return]
