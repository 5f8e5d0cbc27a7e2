"""The contract of a trunk: images in, features and feature maps out. Its makers are in `models.make`.

B batch, C channels, H and W pixels, D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD

FEATURES = "features"
# Pixels of the images that a processor normalises together, so that they stay in its cache.
_PIXELS_IN_CACHE = 400_000


class Trunk(nn.Module, ABC):
    """A network without its head, which declares its stages; it is never cut or glued.

    Attributes:
        arch: its name for `make_trunk`.
        dim: D, the number of features.
        stages: names from the input side to the output side; the last one, "features", is `forward` itself.
        embed_stage: the stage whose average `embed` returns by default, chosen by measurement (docs/benchmarks.md); it may
            be one that `stages` does not list.
        sobel: the fixed Sobel layer, where it is put in front.
    """

    arch: str
    dim: int
    stages: tuple[str, ...]
    embed_stage: str
    sobel: nn.Module | None
    scale_C11: Tensor | None
    shift_C11: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale_C11", None, persistent=False)
        self.register_buffer("shift_C11", None, persistent=False)

    @abstractmethod
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the features (B, D) of normalised images (B, 3, H, W), before the last ReLU where there is one."""

    @abstractmethod
    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield name and map (B, C, H, W) of each stage, after its ReLU, as the network computes it; "features" last."""

    @abstractmethod
    def convolutions(self) -> nn.Module:
        """Return what is frozen where only fully connected layers are trained; the whole network if it has none."""

    def take_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Set mean and standard deviation of the images that the network takes, where they are not ImageNet's.

        All images are normalised with ImageNet's, outside of the trunk; `edges` goes from these to its own.
        """
        if (mean, std) != (IMAGENET_MEAN, IMAGENET_STD):
            own = torch.tensor([mean, std, IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float64)[..., None, None]
            self.scale_C11, self.shift_C11 = (own[3] / own[1]).float(), ((own[2] - own[0]) / own[1]).float()

    def edges(self, x_BCHW: Tensor) -> Tensor:
        """Return what the network itself takes: the images, with its own statistics, or their Sobel edges."""
        if self.scale_C11 is not None and self.shift_C11 is not None:
            x_BCHW = x_BCHW * self.scale_C11 + self.shift_C11
        return x_BCHW if self.sobel is None else self.sobel(x_BCHW)

    def stage(self, x_BCHW: Tensor, name: str) -> Tensor:
        """Return the map (B, C, H, W) of the stage `name`, or raise `InputError`; "features" are (B, D, 1, 1)."""
        return self.maps(x_BCHW, (name,))[name]

    def maps(self, x_BCHW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the maps (B, C, H, W) of several stages, as `stage` does, from one pass that ends at the last of them."""
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
        """Return one row per image, (B, C): the average of the stage's map over its pixels; "features" as they are."""
        return self.stage(x_BCHW, name).mean(dim=(2, 3))

    @property
    def last_map(self) -> str:
        """The last stage before the features, or raise `InputError` where there is none."""
        if len(self.stages) < 2:
            raise InputError(f"{self.arch} has no maps, only features: choose another network")
        return self.stages[-2]

    def check_stage(self, name: str) -> None:
        """Raise `InputError` unless the trunk has the stage `name`."""
        if name not in self.stages:
            raise InputError(
                f"{self.arch} has no stage {name!r}{did_you_mean(name, self.stages)}; it has {', '.join(self.stages)}"
            )


def has_batch_norm(trunk: Trunk) -> bool:
    """Return True if the trunk has BatchNorm layers, whose weights may have any length: they bear larger steps."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in trunk.modules())


def normalise(images_BCHW: Tensor) -> Tensor:
    """Normalise images by ImageNet's mean and standard deviation, as trunks take them.

    A processor does a few images at a time, so that they stay in its cache (320 µs per image of 224 px, and 1,250 for the
    whole batch at once).

    Args:
        images_BCHW: uint8, or floating-point numbers in [0, 1].

    Returns:
        float32 for uint8, else the type of the images; channels last.
    """
    white, dtype = (255, torch.float32) if images_BCHW.dtype == torch.uint8 else (1, images_BCHW.dtype)
    count, _, height, width = images_BCHW.shape
    result_BCHW = torch.empty_like(images_BCHW, dtype=dtype, memory_format=torch.channels_last)
    together = max(1, _PIXELS_IN_CACHE // (height * width)) if images_BCHW.device.type == "cpu" else max(1, count)
    scale_R, shift_R = _scale_and_shift(white, width, dtype, images_BCHW.device)
    for first in range(0, count, together):
        some_BCHW = result_BCHW[first : first + together].copy_(images_BCHW[first : first + together])
        some_BCHW.permute(0, 2, 3, 1).flatten(2).mul_(scale_R).add_(shift_R)
    return result_BCHW


@lru_cache
def _scale_and_shift(white: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the factors and summands of a row of an image as it lies in memory: pixel by pixel, three channels each."""
    with torch.inference_mode(False):
        deviation_3 = torch.tensor(IMAGENET_STD)
        scale_3, shift_3 = 1 / (white * deviation_3), -torch.tensor(IMAGENET_MEAN) / deviation_3
        return scale_3.repeat(width).to(device, dtype), shift_3.repeat(width).to(device, dtype)
