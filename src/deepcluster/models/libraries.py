"""Any classifier of torchvision or timm as a trunk.

The stages are those that timm declares; torchvision's are found by recording one pass of a blank image.

B batch, C channels, H and W pixels, D features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torchvision
from torch import Tensor, nn

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.models.named import NamedTrunk, check_options, name_and_options
from deepcluster.models.traced import TracedTrunk, blocks_of
from deepcluster.models.trunk import FEATURES

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish)
_CLASSES = 1000
# Transformers get the size of their grid, and where they can they fit their positions to other sizes (the small crops).
_SIZE_OPTIONS: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class TorchvisionTrunk(TracedTrunk):
    """A classifier of torchvision, `torchvision:NAME`, with random weights.

    A stage ends at each block of the network, and at each ReLU outside of blocks. A dropout right before the classifier is
    removed with it; the one between fully connected layers (AlexNet, VGG) has the rate `dropout`.

    Raises:
        InputError: no such classifier, or it can't take images of this size.
    """

    def __init__(self, arch: str, *, image_size: int, sobel: bool, dropout: float = 0.5) -> None:
        backbone, options = _torchvision_network(arch, image_size)
        super().__init__(arch, backbone, options, image_size=image_size, sobel=sobel)
        # The last layer becomes the identity, and a dropout right before it.
        name = [
            name
            for name, layer in self.backbone.named_modules()
            if (isinstance(layer, nn.Linear) and layer.out_features == _CLASSES)
            or (isinstance(layer, nn.Conv2d) and layer.out_channels == _CLASSES)
        ][-1]
        parent = self.backbone.get_submodule(name.rpartition(".")[0])
        children = list(parent.named_children())
        number = children.index((name.rpartition(".")[2], self.backbone.get_submodule(name)))
        for child, layer in children[max(0, number - 1) : number + 1]:
            if isinstance(layer, nn.Dropout) or child == children[number][0]:
                setattr(parent, child, nn.Identity())
        for layer in getattr(self.backbone, "classifier", nn.Identity()).modules():
            if isinstance(layer, nn.Dropout):
                layer.p = dropout
        if sobel:
            # The first convolution keeps the weights that it drew for two of its three channels.
            first = next(layer for layer in self.backbone.modules() if isinstance(layer, nn.Conv2d))
            first.in_channels, first.weight = 2, nn.Parameter(first.weight.detach()[:, :2].clone())
        self.find_stages([name for name, layer in blocks_of(self.backbone) if _is_stage(layer)])

    def _is_map(self, output: Any) -> bool:
        return output.dim() > 2  # type: ignore[no-any-return] # Blocks after the pooling return rows.

    def _as_maps(self, outputs: Mapping[str, Tensor], edges_BCHW: Tensor) -> dict[str, Tensor]:
        if isinstance(self.backbone, torchvision.models.SwinTransformer):  # Channels last.
            return {name: output.permute(0, 3, 1, 2) for name, output in outputs.items()}
        if isinstance(self.backbone, torchvision.models.VisionTransformer):  # Tokens, the first one of the class.
            grid = [side // self.backbone.patch_size for side in edges_BCHW.shape[2:]]
            return {name: output[:, 1:].mT.reshape(len(output), -1, *grid) for name, output in outputs.items()}
        return dict(outputs)


def _torchvision_network(arch: str, image_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return torchvision's own network and the options that made it.

    Raises:
        InputError: torchvision does not know the name, or one of the options.
    """
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
        # In training mode they would return the outputs of their auxiliary classifiers as well.
        own = {"aux_logits": False, "init_weights": True}
    every = {**own, **options}
    try:
        return torchvision.models.get_model(name, weights=None, **every), every
    except TypeError as fault:
        check_options(arch, options, fault)
        raise


def _is_stage(layer: nn.Module) -> bool:
    """Return True for an activation, a layer that ends in one or has nested blocks; False for a convolution or a pool."""
    inner = list(layer.children())
    return isinstance(inner[-1] if inner else layer, ACTIVATIONS) or any(list(child.children()) for child in inner)


class TimmTrunk(NamedTrunk):
    """A classifier of timm, `timm:NAME`, with random weights; its stages are those of timm's `feature_info`.

    Raises:
        InputError: timm is not installed or does not know the name; the network has no stages, or can't take this size.
    """

    def __init__(self, arch: str, *, image_size: int, sobel: bool) -> None:
        backbone, options = _timm_network(arch, image_size, channels=2 if sobel else 3)
        super().__init__(arch, backbone, options, image_size=image_size, sobel=sobel)
        if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "forward_head"):
            raise InputError(f"{arch} can't be a trunk: timm does not return the maps of its stages")
        self.dim = self._blank_features().shape[1]
        known: Any = backbone.feature_info
        # One network (tresnet) leaves the name of its stem empty.
        blocks = [one["module"] or "stem" for one in getattr(known, "info", known)]
        self.stages = (*blocks, FEATURES)

    def _found(self, edges_BCHW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        numbers = [number for number, name in enumerate(self.stages[:-1]) if name in names]
        net: Any = self.backbone
        if not numbers:
            return {FEATURES: net(edges_BCHW)} if FEATURES in names else {}
        if FEATURES in names:
            last, maps = net.forward_intermediates(edges_BCHW, indices=numbers)
        else:
            maps = net.forward_intermediates(edges_BCHW, indices=numbers, stop_early=True, intermediates_only=True)
        found = dict(zip([self.stages[number] for number in numbers], maps, strict=True))
        return found | ({FEATURES: net.forward_head(last)} if FEATURES in names else {})


def _timm_network(arch: str, image_size: int, channels: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return timm's network without its classifier and the options that made it.

    Raises:
        InputError: no timm, or an unknown name or option.
    """
    try:
        import timm
    except ImportError:
        raise InputError(f"{arch} needs timm: pip install timm") from None
    name, options = name_and_options(arch)
    # A tag (NAME.TAG) only names weights, which are not used. `is_model` is False for names that timm would download.
    if not timm.is_model(name):
        known = timm.list_models()
        raise InputError(f"timm has no classifier {name!r}{did_you_mean(name, known)}; timm.list_models() lists them")
    for size in [*({"img_size": image_size, **others} for others in _SIZE_OPTIONS), {}]:
        every: dict[str, Any] = {**size, **options}
        try:
            network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels, **every)
        except TypeError as fault:
            check_options(arch, options, fault)
            if not any(f"'{key}'" in str(fault) for key in size):
                raise
        else:
            return network, every
    raise InputError(f"{arch} can't be made")
