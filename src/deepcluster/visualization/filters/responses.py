"""How much each filter of a stage answers to images, with a gradient even where its ReLU is shut.

B pictures, C channels, H and W pixels of a map.
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
    """A stage's activations (B, C, H, W), and what came into its last ReLU; None where the stage ends with none."""

    after_BCHW: Tensor
    before_BCHW: Tensor | None


class Responses:
    """The filters of one stage.

    Args:
        trunk: a copy in eval mode that is ours alone: its weights are frozen.
        size: side of the images in pixels.
        made_for: side of the images that the trunk was made for.

    Raises:
        InputError: no such stage, or images of this size do not get there.
    """

    def __init__(self, trunk: Trunk, stage: str, machine: Machine, *, size: int, made_for: int) -> None:
        trunk.check_stage(stage)
        self.trunk, self.stage, self.machine = trunk.eval().requires_grad_(False), stage, machine
        self.last_relu: nn.ReLU | None = None
        try:
            self.n_channels, self.bytes_an_image = self._look(size)
        except (RuntimeError, ZeroDivisionError):
            text = f"--image-size {size}: {trunk.arch} makes no {stage} of images of {size} px"
            raise InputError(f"{text}; it was made for {made_for} px (left out, that is the size)") from None

    @torch.no_grad()
    def _look(self, size: int) -> tuple[int, int]:
        """Channels, and the bytes of all that is computed of an image on the way; finds the last ReLU."""
        called: list[tuple[nn.ReLU, Tensor]] = []
        counted = [0]

        def note(layer: nn.Module, images: tuple[Tensor], result: Tensor) -> None:
            counted[0] += result.numel() * result.element_size()

        def note_relu(layer: nn.Module, images: tuple[Tensor]) -> None:
            if isinstance(layer, nn.ReLU):
                called.append((layer, images[0].clone()))

        layers = [layer for layer in self.trunk.modules() if not list(layer.children())]
        hooks: list[Any] = [layer.register_forward_hook(note) for layer in layers]
        hooks += [layer.register_forward_pre_hook(note_relu) for layer in layers]
        generator = torch.Generator().manual_seed(0)
        image_BCHW = normalise(torch.rand(1, 3, size, size, generator=generator).to(self.machine.device))
        try:
            map_BCHW = self.trunk.stage(image_BCHW, self.stage)
        finally:
            for hook in hooks:
                hook.remove()
        if called and _ends_with(called[-1][1], map_BCHW):
            self.last_relu = called[-1][0]
        return map_BCHW.shape[1], counted[0]

    def __call__(self, images_BCHW: Tensor) -> Maps:
        """Maps of normalised images."""
        seen: list[Tensor] = []
        hook: Any = None
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        if self.last_relu is not None:
            in_place, self.last_relu.inplace = self.last_relu.inplace, False
            hook = self.last_relu.register_forward_pre_hook(lambda layer, images: seen.append(images[0]))
        try:
            with self.machine.autocast():
                after_BCHW = self.trunk.stage(images_BCHW, self.stage)
        finally:
            if self.last_relu is not None:
                self.last_relu.inplace = in_place
                hook.remove()
        return Maps(after_BCHW, seen[-1] if seen else None)

    @torch.no_grad()
    def means(self, images_BCHW: Tensor) -> Tensor:
        """Mean activation (B, C) of each filter over its map, float32."""
        return self(images_BCHW).after_BCHW.float().mean(dim=(2, 3))


def _ends_with(before_BCHW: Tensor, map_BCHW: Tensor) -> bool:
    """Whether the map is the ReLU of this, or its average."""
    if before_BCHW.ndim != 4 or before_BCHW.shape[1] != map_BCHW.shape[1]:
        return False
    relu_BCHW = before_BCHW.relu()
    if map_BCHW.shape != relu_BCHW.shape:
        relu_BCHW = relu_BCHW.mean(dim=(2, 3), keepdim=True)
    return map_BCHW.shape == relu_BCHW.shape and torch.allclose(map_BCHW, relu_BCHW)


def mean_scores(maps: Maps, channels: Sequence[int]) -> Tensor:
    """Mean (B, C) of each filter over its map; before the ReLU in the pictures to which the own filter gives nothing.

    Args:
        channels: own filter of each picture.
    """
    scores_BC = maps.after_BCHW.float().mean(dim=(2, 3))
    if maps.before_BCHW is None:
        return scores_BC
    shut_B = own(maps.after_BCHW, channels).detach().flatten(1).amax(dim=1) <= 0
    if not shut_B.any():
        return scores_BC
    return torch.where(shut_B[:, None], maps.before_BCHW.float().mean(dim=(2, 3)), scores_BC)


def own_means(maps: Maps, channels: Sequence[int]) -> Tensor:
    """Mean (B,) of each picture's own filter over its map; before the ReLU where that gives nothing."""
    after_BHW = own(maps.after_BCHW, channels).float()
    if maps.before_BCHW is None:
        return after_BHW.mean(dim=(1, 2))
    shut_B = after_BHW.detach().flatten(1).amax(dim=1) <= 0
    before_BHW = own(maps.before_BCHW, channels).float()
    return torch.where(shut_B, before_BHW.mean(dim=(1, 2)), after_BHW.mean(dim=(1, 2)))


def own(map_BCHW: Tensor, channels: Sequence[int]) -> Tensor:
    """The map (B, H, W) of each picture's own filter."""
    numbers_B = torch.tensor(list(channels), device=map_BCHW.device)
    if map_BCHW.ndim == 2:  # not pooled yet
        map_BCHW = map_BCHW[:, :, None, None]
    return map_BCHW[torch.arange(len(numbers_B), device=map_BCHW.device), numbers_B]
