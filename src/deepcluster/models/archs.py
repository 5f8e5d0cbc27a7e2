"""Names of architectures: the project's, those of torchvision and timm, and the user's own; from a name to a random trunk.

The import of this module is a light one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from torch import nn

    from deepcluster.models.trunk import Trunk

# The project's own; the small ones are for images of 32 to 96 px.
ARCHITECTURES = (
    *("alexnet", "vgg16", "vgg16-deepercluster", "resnet18", "resnet50"),
    *("resnet-patches", "alexnet-small", "resnet18-small"),
)
TORCHVISION = "torchvision:"
TIMM = "timm:"
CUSTOM = "custom:"
PREFIXES = (TORCHVISION, TIMM, CUSTOM)
# What makes the user's own networks, by their full names.
_CONSTRUCTORS: dict[str, Callable[[], nn.Module]] = {}


def register(name: str, constructor: Callable[[], nn.Module]) -> str:
    """Name a network of your own `custom:NAME`, for `arch` and for runs that were trained with it (docs/trunks.md).

    The name is known in this process only: register it again before you open such a run in another one.

    Args:
        name: letters, digits, `_`, `-` and `.`.
        constructor: the class, or a function, that returns a new module at each call. The module takes normalised images
            (B, 3, H, W), and returns features (B, D), or a map (B, C, H, W), of which the average is the features.

    Returns:
        `custom:NAME`.

    Raises:
        InputError: name or constructor can't be used.
    """
    arch = custom_name(name)
    if hasattr(constructor, "state_dict") and not isinstance(constructor, type):
        raise InputError(f"{name}: give what makes the module, such as its class; deepcluster.load takes the module itself")
    if not callable(constructor):
        raise InputError(f"{name}: {constructor!r} can't be called; give a function or class that makes the module")
    _CONSTRUCTORS[arch] = constructor
    return arch


def custom_name(name: str) -> str:
    """Return `custom:NAME`, or raise `InputError` if there can't be such a name."""
    arch = CUSTOM + name.removeprefix(CUSTOM)
    if not re.fullmatch(r"[\w.-]+", arch.removeprefix(CUSTOM)):
        raise InputError(f"name={name!r} can't name a network: use letters, digits, '_', '-' and '.'")
    return arch


def check_arch(name: str) -> None:
    """Raise `InputError` unless `name` can be an architecture: one of `ARCHITECTURES`, or a prefix and a name.

    Whether that name is known is checked where the trunk is made, since importing a library takes seconds.
    """
    if name in ARCHITECTURES or any(name.startswith(prefix) and name != prefix for prefix in PREFIXES):
        return
    if CUSTOM + name in _CONSTRUCTORS:
        raise InputError(f"unknown architecture {name!r}: your own network has the name {CUSTOM}{name}")
    raise InputError(
        f"unknown architecture {name!r}{did_you_mean(name, ARCHITECTURES)}: use one of {', '.join(ARCHITECTURES)}, "
        "or torchvision:NAME or timm:NAME for a network of these libraries"
    )


def _constructed(arch: str) -> nn.Module:
    """Return the user's own module.

    Raises:
        InputError: its name is not registered.
    """
    if arch not in _CONSTRUCTORS:
        near, name = did_you_mean(arch, _CONSTRUCTORS), arch.removeprefix(CUSTOM)
        raise InputError(
            f"{arch} is a network of your own that this process does not know{near}: use deepcluster in Python, and call "
            f"deepcluster.register({name!r}, CONSTRUCTOR) first, with the class or function that makes it"
        )
    return _CONSTRUCTORS[arch]()


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
        arch: one of `ARCHITECTURES`; `torchvision:NAME` or `timm:NAME` for any classifier of these libraries; or
            `custom:NAME` for what `register` named.
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
        elif arch == "resnet-patches":
            from deepcluster.models.patches import PatchResNet

            trunk = PatchResNet(image_size=image_size, sobel=sobel)
        elif not arch.startswith(PREFIXES):
            trunk = ResNet(arch, image_size=image_size, sobel=sobel)
        elif arch.startswith(CUSTOM):
            from deepcluster.models.custom import CustomTrunk

            trunk = CustomTrunk.of(arch, _constructed(arch), image_size=image_size, sobel=sobel)
        else:
            from deepcluster.models.libraries import TimmTrunk, TorchvisionTrunk

            if arch.startswith(TIMM):
                trunk = TimmTrunk.fitting(arch, image_size=image_size, sobel=sobel)
            else:
                trunk = TorchvisionTrunk.fitting(arch, image_size=image_size, sobel=sobel, dropout=dropout)
    trunk.take_statistics(tuple(mean), tuple(std))
    return trunk
