"""What a trunk is: images in, activations out. Names become trunks here.

B batch, C channels, H and W pixels, D features.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from deepcluster.errors import InputError, did_you_mean

FEATURES = "features"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
ARCHITECTURES = ("alexnet", "vgg16", "resnet18", "resnet50", "alexnet-small", "resnet18-small")


class Trunk(nn.Module, ABC):
    """A network without its head. It declares what it gives; it is never cut or glued.

    Attributes:
        arch: the name that `make_trunk` knows it by.
        dim: D, the width of `forward`'s rows.
        stages: names from the input side to the output side; the last one, "features", is `forward` itself.
        embed_stage: the stage whose average `embed` gives by default, chosen by measurement (docs/results.md).
    """

    arch: str
    dim: int
    stages: tuple[str, ...]
    embed_stage: str

    @abstractmethod
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D) of normalised images (B, 3, H, W), before the last ReLU where there is one."""

    @abstractmethod
    def _stage(self, x_BCHW: Tensor, name: str) -> Tensor:
        """Activations of an inner stage, after its ReLU."""

    def stage(self, x_BCHW: Tensor, name: str) -> Tensor:
        """Activations (B, C, H, W) of the stage `name`; "features" are (B, D, 1, 1).

        Raises:
            InputError: the trunk has no such stage.
        """
        self.check_stage(name)
        if name == FEATURES:
            return self(x_BCHW)[:, :, None, None]  # type: ignore[no-any-return]
        return self._stage(x_BCHW, name)

    def vectors(self, x_BCHW: Tensor, name: str) -> Tensor:
        """One row an image, (B, C): the average of the stage's map over its pixels; "features" as they are."""
        return self.stage(x_BCHW, name).mean(dim=(2, 3))

    def check_stage(self, name: str) -> None:
        """Raise `InputError` unless the trunk has the stage `name`."""
        if name not in self.stages:
            raise InputError(
                f"{self.arch} has no stage {name!r}{did_you_mean(name, self.stages)}; it has {', '.join(self.stages)}"
            )


def make_trunk(arch: str, *, image_size: int = 224, sobel: bool = True, dropout: float = 0.5, seed: int = 0) -> Trunk:
    """Make the trunk named `arch` with random weights that are a function of `seed` alone.

    Args:
        arch: one of `ARCHITECTURES`.
        image_size: side of the square images in pixels.
        sobel: put the fixed Sobel layer in front.
        dropout: rate in the fully connected layers, where the trunk has any.
        seed: of the random weights.

    Raises:
        InputError: an unknown name, or an image size that the trunk can't take.
    """
    from deepcluster.models.convnets import TABLES, ConvNet
    from deepcluster.models.resnets import ResNet

    if arch not in ARCHITECTURES:
        raise InputError(
            f"unknown architecture {arch!r}{did_you_mean(arch, ARCHITECTURES)}: use one of {', '.join(ARCHITECTURES)}"
        )
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reset the generators of all GPUs too, which fork_rng does not put back.
        torch.default_generator.manual_seed(seed)
        if arch in TABLES:
            return ConvNet(arch, image_size=image_size, sobel=sobel, dropout=dropout)
        return ResNet(arch, image_size=image_size, sobel=sobel)


def normalise(images_BCHW: Tensor) -> Tensor:
    """Images in [0, 1] → what trunks take: less ImageNet's mean, over its deviation."""
    mean = torch.tensor(IMAGENET_MEAN).to(images_BCHW)[:, None, None]
    deviation = torch.tensor(IMAGENET_DEVIATION).to(images_BCHW)[:, None, None]
    return (images_BCHW - mean) / deviation
