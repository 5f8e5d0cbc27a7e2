"""Names of architectures, the project's own and those that torchvision and timm know; from a name to a random trunk.

The import of this module is a light one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from deepcluster.models.trunk import Trunk

# The project's own; the small ones are for images of 32 to 96 px.
ARCHITECTURES = ("alexnet", "vgg16", "vgg16-deepercluster", "resnet18", "resnet50", "alexnet-small", "resnet18-small")
TORCHVISION = "torchvision:"
TIMM = "timm:"
LIBRARIES = (TORCHVISION, TIMM)


def check_arch(name: str) -> None:
    """Raise `InputError` unless `name` can be an architecture: one of `ARCHITECTURES`, or a library's prefix and a name.

    Whether the library knows that name is checked where the trunk is made, since importing a library takes seconds.
    """
    if name in ARCHITECTURES or any(name.startswith(prefix) and name != prefix for prefix in LIBRARIES):
        return
    raise InputError(
        f"unknown architecture {name!r}{did_you_mean(name, ARCHITECTURES)}: use one of {', '.join(ARCHITECTURES)}, "
        "or torchvision:NAME or timm:NAME for a network of these libraries"
    )


def make_trunk(
    arch: str,
    *,
    image_size: int = 224,
    sobel: bool = True,
    dropout: float = 0.5,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    seed: int = 0,
) -> Trunk:
    """Make the trunk named `arch` with random weights, which are a function of `seed` only.

    Args:
        arch: one of `ARCHITECTURES`, or `torchvision:NAME` or `timm:NAME` for any classifier of these libraries.
        image_size: side of the square images in pixels.
        sobel: put the fixed Sobel layer in front.
        dropout: dropout rate of the fully connected layers, where the trunk has any.
        mean, std: by which the network's images are normalised, one number per channel.
        seed: seed of the random weights.

    Raises:
        InputError: unknown name, or an image size that the trunk can't take.
    """
    check_arch(arch)
    # Only here: settings need the names without torch, and torchvision alone takes three seconds.
    import torch

    from deepcluster.models.convnets import TABLES, ConvNet, ResNet

    trunk: Trunk
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reset the generators of all GPUs, which fork_rng does not restore.
        torch.default_generator.manual_seed(seed)
        if arch in TABLES:
            trunk = ConvNet(arch, image_size=image_size, sobel=sobel, dropout=dropout)
        elif not arch.startswith(LIBRARIES):
            trunk = ResNet(arch, image_size=image_size, sobel=sobel)
        else:
            from deepcluster.models.libraries import TimmTrunk, TorchvisionTrunk

            if arch.startswith(TIMM):
                trunk = TimmTrunk.fitting(arch, image_size=image_size, sobel=sobel)
            else:
                trunk = TorchvisionTrunk.fitting(arch, image_size=image_size, sobel=sobel, dropout=dropout)
    trunk.take_statistics(tuple(mean), tuple(std))
    return trunk
