"""From the name of an architecture to a trunk with random weights."""

import torch

from deepcluster.models.archs import TIMM, TORCHVISION, check_arch
from deepcluster.models.convnets import TABLES, ConvNet
from deepcluster.models.trunk import Trunk


def make_trunk(arch: str, *, image_size: int = 224, sobel: bool = True, dropout: float = 0.5, seed: int = 0) -> Trunk:
    """Make the trunk named `arch` with random weights, which are a function of `seed` only.

    Args:
        arch: one of `ARCHITECTURES`, or `torchvision:NAME` or `timm:NAME` for any classifier of these libraries.
        image_size: side of the square images in pixels.
        sobel: put the fixed Sobel layer in front.
        dropout: dropout rate of the fully connected layers, where the trunk has any.
        seed: seed of the random weights.

    Raises:
        InputError: unknown name, or an image size that the trunk can't take.
    """
    check_arch(arch)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reset the generators of all GPUs, which fork_rng does not restore.
        torch.default_generator.manual_seed(seed)
        if arch in TABLES:
            return ConvNet(arch, image_size=image_size, sobel=sobel, dropout=dropout)
        # The libraries are imported only where they are used: torchvision takes three seconds.
        if arch.startswith(TORCHVISION):
            from deepcluster.models.torchvision_trunks import TorchvisionTrunk

            return TorchvisionTrunk.fitting(arch, image_size=image_size, sobel=sobel, dropout=dropout)
        if arch.startswith(TIMM):
            from deepcluster.models.timm_trunks import TimmTrunk

            return TimmTrunk.fitting(arch, image_size=image_size, sobel=sobel)
        from deepcluster.models.resnets import ResNet

        return ResNet(arch, image_size=image_size, sobel=sobel)
