"""Strides that become dilations, for denser maps with the same weights: the algorithm "à trous".

Where the maps before a layer have become `r` times as dense, its kernel reads every `r`-th cell (dilation and padding times
`r`), so that every cell of the old map is found in the new one. Holschneider et al., "A real-time algorithm for signal
analysis with the help of the wavelet transform" (1989); Chen et al., "DeepLab" (arXiv 1606.00915, section 3.1).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.geometry import Geometry, geometry, traced_size
from deepcluster.models.receptive_field import Trace, in_eval_mode
from deepcluster.models.trunk import Trunk

_WORKS = "plain convolutions and max pools can (docs/dense.md): alexnet, vgg16, resnet18, resnet50, most of torchvision"


def dilated(trunk: Trunk, stage: str, stride: int) -> Trunk:
    """Turn strides of a trunk into dilations, in place, so that the map of a stage has the given stride; return the trunk.

    Every n-th cell of the new map is that of the old one, at the borders too, in eval mode. (Gates, as those of
    squeeze-and-excitation, average a denser map: with them it is nearly that one.) Weights are not touched. Later stages
    have the same stride, earlier ones theirs up to it. Fully connected layers no longer fit: "features" of AlexNet and
    VGG-16 are lost, those of a ResNet are averages of a denser map.

    Raises:
        InputError: no such stage, a stride that it can't have, or a network that can't be dilated, which is left as it was.
    """
    now = geometry(trunk, stage)
    if stride < 1 or now.stride % stride:
        smaller = [str(one) for one in range(1, now.stride + 1) if now.stride % one == 0]
        raise InputError(
            f"stage {stage} of {trunk.arch} has stride {now.stride}, which can't become {stride}; use {', '.join(smaller)}"
        )
    if stride == now.stride:
        return trunk
    changes = [_change(trunk, name, before, stride) for name, before in _strides_before(trunk).items()]
    old = [{key: getattr(one.layer, key) for key in one.settings} for one in changes]
    for one in changes:
        one.apply(one.settings)
    try:
        fits = geometry(trunk, stage) == Geometry(stride, now.offset)
    except (InputError, RuntimeError):  # Maps of different sizes meet, or a pool gets more padding than torch allows.
        fits = False
    if not fits:
        for one, settings in zip(changes, old, strict=True):
            one.apply(settings)
        raise InputError(f"{trunk.arch} can't have stride {stride} at {stage}; {_WORKS}")
    return trunk


@dataclass(frozen=True)
class _Change:
    """New strides, dilations and paddings of a layer; none where it stays as it is."""

    layer: nn.Module
    settings: dict[str, Any]

    def apply(self, settings: dict[str, Any]) -> None:
        for key, value in settings.items():
            setattr(self.layer, key, value)


def _strides_before(trunk: Trunk) -> dict[str, int]:
    """Return the stride of the map that each convolution and pool takes, by name; 0 where it has none."""
    found: dict[str, int] = {}
    size = traced_size(trunk)
    image_1CHW = next(trunk.parameters()).new_zeros(1, 3, size, size)
    with in_eval_mode(trunk), torch.no_grad(), Trace(image_1CHW, direct=True) as trace:

        def hook_of(name: str) -> Any:
            def note(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
                found[name] = trace.field(given[0]).stride

            return note

        windows = nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d
        layers = [(name, layer) for name, layer in trunk.named_modules() if isinstance(layer, windows)]
        hooks = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers]
        try:
            trunk.maps(image_1CHW, trunk.stages[:-1])
        finally:
            for hook in hooks:
                hook.remove()
    return found


def _change(trunk: Trunk, name: str, before: int, target: int) -> _Change:
    """Return the change of a layer whose input had the stride `before`.

    Raises:
        InputError: it can't be dilated.
    """
    layer: Any = trunk.get_submodule(name)
    strides, kernel = _pair(layer.stride), _pair(layer.kernel_size)
    if strides == kernel == (1, 1) or 0 < before * max(strides) <= target:
        return _Change(layer, {})
    # How much denser its input becomes.
    wide, dense = before // min(before, target) if before else 0, min(before, target)
    whole = before > 0 and before % dense == 0 and all(min(before * step, target) % dense == 0 for step in strides)
    plain = getattr(layer, "padding_mode", "zeros") == "zeros" and not getattr(layer, "ceil_mode", False)
    if not whole or not plain or (isinstance(layer, nn.AvgPool2d) and wide > 1):
        raise InputError(f"{trunk.arch} can't be dilated: its layer {name} ({type(layer).__name__}) can't; {_WORKS}")
    after = [min(before * step, target) for step in strides]
    settings: dict[str, Any] = {"stride": tuple(one // dense for one in after)}
    if wide > 1 and kernel != (1, 1):
        settings["dilation"] = tuple(wide * one for one in _pair(layer.dilation))
        if not isinstance(layer.padding, str):  # "same" depends on the dilation.
            settings["padding"] = tuple(wide * one for one in _pair(layer.padding))
    return _Change(layer, settings)


def _pair(number: Any) -> tuple[int, int]:
    return (number, number) if isinstance(number, int) else tuple(number)
