"""Any classifier of timm as a trunk, with the stages that timm declares.

B batch, C channels, H and W pixels, D features.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.models.named import NamedTrunk, check_options, name_and_options
from deepcluster.models.trunk import FEATURES

# Transformers get the size of their grid, and where they can they fit their positions to other sizes (the small crops).
_SIZE_OPTIONS: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class TimmTrunk(NamedTrunk):
    """A classifier of timm, `timm:NAME`, with random weights; its stages are those of timm's `feature_info`.

    Raises:
        InputError: timm is not installed or does not know the name; the network has no stages, or can't take this size.
    """

    def __init__(self, arch: str, *, image_size: int, sobel: bool) -> None:
        backbone = _classifier(arch, image_size, channels=2 if sobel else 3)
        super().__init__(arch, backbone, image_size=image_size, sobel=sobel)
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


def _classifier(arch: str, image_size: int, channels: int) -> nn.Module:
    """Return timm's own network, without its classifier.

    Raises:
        InputError: timm is not installed, or does not know the name or one of the options.
    """
    try:
        import timm
    except ImportError:
        raise InputError(f"{arch} needs timm: pip install 'deepcluster[timm]'") from None
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
            return network
    raise InputError(f"{arch} can't be made")
