"""What a trunk is: images in, activations out. Names become trunks here.

B batch, C channels, H and W pixels, D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.models.archs import ARCHITECTURES as ARCHITECTURES
from deepcluster.models.archs import TIMM, TORCHVISION, check_arch

FEATURES = "features"
# Of all images that are normalised together.
_NORMALISED_PIXELS = 400_000
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


class Trunk(nn.Module, ABC):
    """A network without its head. It declares what it gives; it is never cut or glued.

    Attributes:
        arch: the name that `make_trunk` knows it by.
        dim: D, the width of `forward`'s rows.
        stages: names from the input side to the output side; the last one, "features", is `forward` itself.
        embed_stage: the stage whose average `embed` gives by default, chosen by measurement (docs/benchmarks.md).
    """

    arch: str
    dim: int
    stages: tuple[str, ...]
    embed_stage: str

    @abstractmethod
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features (B, D) of normalised images (B, 3, H, W), before the last ReLU where there is one."""

    @abstractmethod
    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and activations (B, C, H, W) of each stage, after its ReLU, as the network gets there; "features" last."""

    @abstractmethod
    def convolutions(self) -> nn.Module:
        """What is frozen where the fully connected layers alone are trained; all of a network that has none."""

    def stage(self, x_BCHW: Tensor, name: str) -> Tensor:
        """Activations (B, C, H, W) of the stage `name`; "features" are (B, D, 1, 1).

        Raises:
            InputError: the trunk has no such stage.
        """
        return self.maps(x_BCHW, (name,))[name]

    def maps(self, x_BCHW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Activations (B, C, H, W) of several stages in one pass, which ends at the last of them; as `stage` gives each.

        Raises:
            InputError: the trunk has no such stage.
        """
        for name in names:
            self.check_stage(name)
        found: dict[str, Tensor] = {}
        for name, map_BCHW in self.walk(x_BCHW):
            if name in names:
                found[name] = map_BCHW
            if len(found) == len(set(names)):
                break
        return found

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
        arch: one of `ARCHITECTURES`, or `torchvision:NAME` or `timm:NAME` for any classifier of these libraries.
        image_size: side of the square images in pixels.
        sobel: put the fixed Sobel layer in front.
        dropout: rate in the fully connected layers, where the trunk has any.
        seed: of the random weights.

    Raises:
        InputError: an unknown name, or an image size that the trunk can't take.
    """
    from deepcluster.models.convnets import TABLES, ConvNet

    check_arch(arch)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reset the generators of all GPUs too, which fork_rng does not put back.
        torch.default_generator.manual_seed(seed)
        if arch in TABLES:
            return ConvNet(arch, image_size=image_size, sobel=sobel, dropout=dropout)
        if arch.startswith(TORCHVISION):
            from deepcluster.models.torchvision_trunks import torchvision_trunk

            return torchvision_trunk(arch, image_size=image_size, sobel=sobel, dropout=dropout)
        if arch.startswith(TIMM):
            from deepcluster.models.timm_trunks import timm_trunk

            return timm_trunk(arch, image_size=image_size, sobel=sobel)
        from deepcluster.models.resnets import ResNet  # torchvision takes three seconds

        return ResNet(arch, image_size=image_size, sobel=sobel)


def normalise(images_BCHW: Tensor) -> Tensor:
    """Images of uint8, or in [0, 1] → what trunks take: less ImageNet's mean, over its deviation; channels last.

    A few images at a time on a processor, so that all is done while they are in its cache (320 µs an image of 224 px, and
    1,250 batch by batch).
    """
    white, kind = (255, torch.float32) if images_BCHW.dtype == torch.uint8 else (1, images_BCHW.dtype)
    scale_3 = 1 / (white * torch.tensor(IMAGENET_DEVIATION))
    shift_3 = -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_DEVIATION)
    count, _, height, width = images_BCHW.shape
    result_BCHW = torch.empty_like(images_BCHW, dtype=kind, memory_format=torch.channels_last)
    together = max(1, _NORMALISED_PIXELS // (height * width)) if images_BCHW.device.type == "cpu" else max(1, count)
    scale_R, shift_R = (factor_3.repeat(width).to(result_BCHW) for factor_3 in (scale_3, shift_3))
    for first in range(0, count, together):
        some_BCHW = result_BCHW[first : first + together].copy_(images_BCHW[first : first + together])
        some_BCHW.permute(0, 2, 3, 1).flatten(2).mul_(scale_R).add_(shift_R)
    return result_BCHW
