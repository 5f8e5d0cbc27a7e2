"""Activations of the filters of a stage, with a gradient even where the last ReLU outputs only zeros.

B pictures, C channels, H and W pixels of a feature map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.models.trunk import Trunk, normalise


@dataclass(frozen=True)
class Maps:
    """Activations (B, C, H, W) of a stage, and the input of its last ReLU; None if the stage does not end with a ReLU."""

    after_BCHW: Tensor
    before_BCHW: Tensor | None


class Responses:
    """The filters of one stage.

    Args:
        trunk: a copy used for nothing else: it is put into eval mode, and its weights are frozen.
        size: side of the images in pixels.
        made_for: side of the images that the trunk was made for.

    Attributes:
        last_relu: the ReLU that the stage ends with, or None.
        n_channels: number of filters.
        bytes_per_image: bytes of all activations up to the stage, per image.

    Raises:
        InputError: no such stage, or the trunk can't process images of this size.
    """

    def __init__(self, trunk: Trunk, stage: str, machine: Machine, *, size: int, made_for: int) -> None:
        trunk.check_stage(stage)
        self.trunk, self.stage, self.machine = trunk.eval().requires_grad_(False), stage, machine
        self.last_relu: nn.ReLU | None = None
        self.bytes_per_image = 0
        try:
            self.n_channels = self._inspect(size)
        except (RuntimeError, ZeroDivisionError):
            text = f"--image-size {size}: {trunk.arch} makes no {stage} of images of {size} px"
            raise InputError(f"{text}; it was made for {made_for} px, the default") from None

    @torch.no_grad()
    def _inspect(self, size: int) -> int:
        """Find the last ReLU and count the bytes of the activations of one image; return the number of channels."""
        inputs: list[tuple[nn.ReLU, Tensor]] = []

        def note_input(layer: nn.Module, images: tuple[Tensor]) -> None:
            if isinstance(layer, nn.ReLU):
                inputs.append((layer, images[0].clone()))

        def count_bytes(layer: nn.Module, images: tuple[Tensor], result: Tensor) -> None:
            self.bytes_per_image += result.numel() * result.element_size()

        layers = [layer for layer in self.trunk.modules() if not list(layer.children())]
        hooks: list[Any] = [layer.register_forward_pre_hook(note_input) for layer in layers]
        hooks += [layer.register_forward_hook(count_bytes) for layer in layers]
        image_1CHW = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            map_1CHW = self.trunk.stage(normalise(image_1CHW.to(self.machine.device)), self.stage)
        finally:
            for hook in hooks:
                hook.remove()
        # The stage ends with the last ReLU if its map is the result of that, or the average over the positions.
        if inputs and inputs[-1][1].ndim == 4:
            relu_1CHW = inputs[-1][1].relu()
            for one in (relu_1CHW, relu_1CHW.mean(dim=(2, 3), keepdim=True)):
                if map_1CHW.shape == one.shape and torch.allclose(map_1CHW, one):
                    self.last_relu = inputs[-1][0]
        return map_1CHW.shape[1]

    def __call__(self, images_BCHW: Tensor) -> Maps:
        """Return the maps of normalised images."""
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        before: list[Tensor | None] = [None]
        # A stage without a last ReLU leaves this one unused.
        relu = self.last_relu or nn.ReLU()
        hook = relu.register_forward_pre_hook(lambda layer, images: before.append(images[0]))
        in_place, relu.inplace = relu.inplace, False
        try:
            with self.machine.autocast():
                return Maps(self.trunk.stage(images_BCHW, self.stage), before[-1])
        finally:
            relu.inplace = in_place
            hook.remove()

    @torch.no_grad()
    def means(self, images_BCHW: Tensor) -> Tensor:
        """Return the mean activation (B, C) of each filter over its map, float32."""
        return self(images_BCHW).after_BCHW.float().mean(dim=(2, 3))


def mean_scores(maps: Maps, channels: Sequence[int]) -> Tensor:
    """Return the mean (B, C) of each filter over its map; before the ReLU for pictures whose own filter is all zero.

    Args:
        channels: the filter of each picture.
    """
    scores_BC = maps.after_BCHW.float().mean(dim=(2, 3))
    if maps.before_BCHW is None:
        return scores_BC
    zero_B = own_maps(maps.after_BCHW, channels).detach().flatten(1).amax(dim=1) <= 0
    if not zero_B.any():
        return scores_BC
    return torch.where(zero_B[:, None], maps.before_BCHW.float().mean(dim=(2, 3)), scores_BC)


def own_means(maps: Maps, channels: Sequence[int]) -> Tensor:
    """Return the mean (B,) of each picture's own filter over its map; before the ReLU where the map is all zero."""
    after_BHW = own_maps(maps.after_BCHW, channels).float()
    if maps.before_BCHW is None:
        return after_BHW.mean(dim=(1, 2))
    zero_B = after_BHW.detach().flatten(1).amax(dim=1) <= 0
    before_BHW = own_maps(maps.before_BCHW, channels).float()
    return torch.where(zero_B, before_BHW.mean(dim=(1, 2)), after_BHW.mean(dim=(1, 2)))


def own_maps(maps_BCHW: Tensor, channels: Sequence[int]) -> Tensor:
    """Return the map (B, H, W) of each picture's own filter."""
    return maps_BCHW[range(len(channels)), list(channels)]
