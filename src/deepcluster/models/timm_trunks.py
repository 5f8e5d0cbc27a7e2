"""Any classifier of timm as a trunk, by timm's own account of its stages.

B batch, C channels, H and W pixels, D features.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.models.named import MISFITS, NamedTrunk, check_options, misfit, name_and_options
from deepcluster.models.trunk import FEATURES

# Transformers get the size of their grid, and fit their positions to images of other sizes (the small crops) where they can.
_SIZE_OPTIONS: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class TimmTrunk(NamedTrunk):
    """A classifier of timm, `timm:NAME`, with random weights; its stages are those that timm's `feature_info` names.

    Raises:
        InputError: timm is not installed or does not know the name; the network has no stages, or can't take this size.
    """

    def __init__(self, arch: str, *, image_size: int, sobel: bool) -> None:
        backbone = _classifier(arch, image_size, channels=2 if sobel else 3)
        super().__init__(arch, backbone, image_size=image_size, sobel=sobel)
        if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "forward_head"):
            raise InputError(f"{arch} can't be a trunk: timm does not give the maps of its stages")
        self.dim = self._try_out().shape[1]
        known: Any = backbone.feature_info
        # One network (tresnet) leaves the name of its stem empty.
        blocks = [one["module"] or "stem" for one in getattr(known, "info", known)]
        self.stages = (*blocks, FEATURES)

    def _found(self, edges_BCHW: Tensor, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        numbers = [number for number, name in enumerate(self.stages[:-1]) if name in names]
        net: Any = self.backbone
        if not numbers:
            if FEATURES in names:
                yield FEATURES, net(edges_BCHW)
            return
        if FEATURES in names:
            last, maps = net.forward_intermediates(edges_BCHW, indices=numbers)
        else:
            maps = net.forward_intermediates(edges_BCHW, indices=numbers, stop_early=True, intermediates_only=True)
        yield from zip([self.stages[number] for number in numbers], maps, strict=True)
        if FEATURES in names:
            yield FEATURES, net.forward_head(last)


def timm_trunk(arch: str, *, image_size: int, sobel: bool) -> TimmTrunk:
    """Make the trunk, or tell which sizes it can take.

    Raises:
        InputError: as `TimmTrunk`.
    """
    make = partial(TimmTrunk, arch, sobel=sobel)
    try:
        return make(image_size=image_size)
    except MISFITS as fault:
        raise misfit(arch, image_size, fault, lambda size: make(image_size=size), sobel=sobel) from fault


def _classifier(arch: str, image_size: int, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise InputError(f"{arch} needs timm: pip install 'deepcluster[timm]'") from None
    name, options = name_and_options(arch)
    # A tag (NAME.TAG) only says which weights, which are not wanted here. Names that timm would fetch are unknown to it.
    if not timm.is_model(name):
        known = timm.list_models()
        raise InputError(f"timm has no classifier {name!r}{did_you_mean(name, known)}; timm.list_models() lists them")
    make: Any = partial(timm.create_model, name, pretrained=False, num_classes=0, in_chans=channels)
    sizes: list[dict[str, Any]] = [{"img_size": image_size, **others} for others in _SIZE_OPTIONS] + [{}]
    for size in sizes:
        try:
            network: nn.Module = make(**size, **options)
        except TypeError as fault:
            check_options(arch, options, fault)
            if not any(f"'{key}'" in str(fault) for key in size):
                raise
        else:
            return network
    raise InputError(f"{arch} can't be made")
