"""Any classifier of torchvision as a trunk: its blocks are found by watching an image go through.

B batch, C channels, H and W pixels, T tokens, D features.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torchvision
from torch import Tensor, nn

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.models.named import MISFITS, NamedTrunk, check_options, misfit, name_and_options
from deepcluster.models.trunk import FEATURES

# Where networks keep their blocks; what is elsewhere is a block itself.
CONTAINERS = ("features", "layers", "blocks", "trunk_output", "encoder", "encoder.layers")
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish)
_CLASSES = 1000


class _AllSeen(Exception):
    """The last map that is wanted is there."""


class TorchvisionTrunk(NamedTrunk):
    """A classifier of torchvision, `torchvision:NAME`, with random weights.

    A stage ends at each block of the network, and at each ReLU that stands outside of blocks. Dropout right before the
    classifier goes with it; that between fully connected layers (AlexNet, VGG) has the rate `dropout`.

    Raises:
        InputError: no such classifier, or it can't take images of this size.
    """

    def __init__(self, arch: str, *, image_size: int, sobel: bool, dropout: float = 0.5) -> None:
        super().__init__(arch, _classifier(arch, image_size), image_size=image_size, sobel=sobel)
        _remove_classifier(self.backbone)
        for layer in getattr(self.backbone, "classifier", nn.Identity()).modules():
            if isinstance(layer, nn.Dropout):
                layer.p = dropout
        if sobel:
            _look_at_two_channels(self.backbone)
        self.stages = tuple(name for name, layer in _blocks(self.backbone) if _is_stage(layer))
        shapes: dict[str, Tensor] = {}
        hooks = [
            self.backbone.get_submodule(name).register_forward_hook(partial(_note, shapes, name, 0)) for name in self.stages
        ]
        try:
            self.dim = self._try_out().shape[1]
        finally:
            for hook in hooks:
                hook.remove()
        # What comes after the pooling gives rows.
        self.stages = (*(name for name, map_1CHW in shapes.items() if map_1CHW.dim() > 2), FEATURES)

    def _found(self, edges_BCHW: Tensor, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        blocks = [name for name in self.stages if name in names and name != FEATURES]
        seen: dict[str, Tensor] = {}
        last = 0 if FEATURES in names else len(blocks)
        hooks = [
            self.backbone.get_submodule(name).register_forward_hook(partial(_note, seen, name, last)) for name in blocks
        ]
        try:
            features_BD = self.backbone(edges_BCHW)
        except _AllSeen:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        for name, activations in seen.items():
            yield name, self._as_map(activations, edges_BCHW)
        if FEATURES in names:
            yield FEATURES, features_BD

    def _as_map(self, activations: Tensor, edges_BCHW: Tensor) -> Tensor:
        """Channels first; tokens on their grid, without the class token."""
        if isinstance(self.backbone, torchvision.models.SwinTransformer):
            return activations.permute(0, 3, 1, 2)
        if isinstance(self.backbone, torchvision.models.VisionTransformer):
            rows, columns = (side // self.backbone.patch_size for side in edges_BCHW.shape[2:])
            return activations[:, 1:].transpose(1, 2).reshape(len(activations), -1, rows, columns)
        return activations


def torchvision_trunk(arch: str, *, image_size: int, sobel: bool, dropout: float) -> TorchvisionTrunk:
    """Make the trunk, or tell which sizes it can take.

    Raises:
        InputError: as `TorchvisionTrunk`.
    """
    make = partial(TorchvisionTrunk, arch, sobel=sobel, dropout=dropout)
    try:
        return make(image_size=image_size)
    except MISFITS as fault:
        raise misfit(arch, image_size, fault, lambda size: make(image_size=size), sobel=sobel) from fault


def _classifier(arch: str, image_size: int) -> nn.Module:
    name, options = name_and_options(arch)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise InputError(
            f"torchvision has no classifier {name!r}{did_you_mean(name, known)}; "
            "torchvision.models.list_models(module=torchvision.models) lists them"
        )
    own: dict[str, Any] = {}
    if name.startswith("vit_"):
        own = {"image_size": image_size}
    elif name.startswith("maxvit"):
        own = {"input_size": (image_size, image_size)}
    elif name in ("googlenet", "inception_v3"):
        # Their second classifiers would come out beside the features while training.
        own = {"aux_logits": False, "init_weights": True}
    try:
        return torchvision.models.get_model(name, weights=None, **own, **options)  # type: ignore[no-any-return]
    except TypeError as fault:
        check_options(arch, options, fault)
        raise


def _remove_classifier(backbone: nn.Module) -> None:
    """Put the identity in the place of the last layer, and of a dropout right before it."""
    name = [
        name
        for name, layer in backbone.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == _CLASSES)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == _CLASSES)
    ][-1]
    owner, _, last = name.rpartition(".")
    parent = backbone.get_submodule(owner)
    before = list(parent.named_children())[: [child for child, _ in parent.named_children()].index(last)]
    setattr(parent, last, nn.Identity())
    if before and isinstance(before[-1][1], nn.Dropout):
        setattr(parent, before[-1][0], nn.Identity())


def _look_at_two_channels(backbone: nn.Module) -> None:
    """The first convolution keeps the weights that it drew for two of its three channels."""
    first = next(layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d))
    first.in_channels = 2
    first.weight = nn.Parameter(first.weight.detach()[:, :2].clone())


def _blocks(backbone: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, layer in backbone.named_children():
        if prefix + name in CONTAINERS:
            yield from _blocks(layer, f"{prefix}{name}.")
        else:
            yield prefix + name, layer


def _is_stage(layer: nn.Module) -> bool:
    """A ReLU, what ends in one, or what has blocks of its own; a convolution, a pool or a downsampling is on the way."""
    inner = list(layer.children())
    return isinstance(inner[-1] if inner else layer, ACTIVATIONS) or any(list(child.children()) for child in inner)


def _note(seen: dict[str, Tensor], name: str, last: int, layer: nn.Module, images: Any, result: Tensor) -> None:
    seen[name] = result
    if len(seen) == last:
        raise _AllSeen
