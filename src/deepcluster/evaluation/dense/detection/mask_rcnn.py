"""Mask R-CNN with a feature pyramid (He et al., ICCV 2017; Lin et al., CVPR 2017) on a trunk, of torchvision's parts.

The maps of strides 4, 8, 16 and 32 become P2 to P5, and every other cell of P5 is P6. The settings are detectron2's "R50-FPN
1x" as MoCo uses it: all weights are trained, and BatchNorm is in the trunk and the pyramid, but not in the heads.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from deepcluster.core.errors import InputError
from deepcluster.evaluation.dense.detection.faster_rcnn import BoxHeads, FloatPredictor, RegionProposals
from deepcluster.evaluation.dense.detection.parts import Batching, Detector, FixedAnchors, at_least_float32
from deepcluster.evaluation.dense.detection.roi import AlignedPooler
from deepcluster.models.geometry import Geometry, geometry
from deepcluster.models.trunk import FEATURES, Trunk

STRIDES = (4, 8, 16, 32)
# Of P2 to P6; each in three forms.
ANCHORS = (32, 64, 128, 256, 512)
WIDTH, HIDDEN = 256, 1024
BOX_CELLS, MASK_CELLS = 7, 14
# Proposals before, for each map, and after non-maximum suppression, in training and in the test.
BEFORE, AFTER = (2_000, 1_000), (1_000, 1_000)


def pyramid_stages(trunk: Trunk) -> dict[str, Geometry]:
    """Return the last stage of each of the strides 4, 8, 16 and 32, and where its cells are.

    Raises:
        InputError: the trunk has no such four stages.
    """
    found: dict[int, tuple[str, Geometry]] = {}
    for stage in trunk.stages:
        if stage == FEATURES:
            continue
        try:
            cells = geometry(trunk, stage)
        except InputError:
            continue
        found[cells.stride] = stage, cells
    if any(stride not in found for stride in STRIDES):
        there = f"maps of strides {', '.join(map(str, sorted(found)))}" if found else "no maps of fixed strides"
        raise InputError(
            f"a feature pyramid needs maps of strides 4, 8, 16 and 32, and {trunk.arch} has {there}: use resnet18, resnet50 "
            "or a convolutional network of torchvision or timm with such stages (docs/trunks.md)"
        )
    return dict(found[stride] for stride in STRIDES)


class Pyramid(nn.Module):
    """A feature pyramid on stages of a trunk; its maps are float32 also under autocast.

    Args:
        stages: the channels of each.
        norm: with BatchNorm.
    """

    def __init__(self, trunk: Trunk, stages: Mapping[str, int], *, norm: bool) -> None:
        super().__init__()
        self.trunk, self.stages = trunk, tuple(stages)
        layer = nn.BatchNorm2d if norm else None
        self.pyramid = FeaturePyramidNetwork([*stages.values()], WIDTH, LastLevelMaxPool(), norm_layer=layer)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Return P2 to P5 by the name of their stage, and P6 as "pool"."""
        maps = self.trunk.maps(x_BCHW, self.stages)
        pyramid = self.pyramid({name: maps[name] for name in self.stages})
        return {name: at_least_float32(map_BCHW) for name, map_BCHW in pyramid.items()}


def mask_rcnn(
    trunk: Trunk, classes: int, *, masks: bool, norm: bool, regions: int, dtype: torch.dtype = torch.float32
) -> Detector:
    """Return a detector with new heads, drawn from torch's random generator; it trains the trunk up to the last stage.

    Args:
        trunk: in eval mode.
        classes: with the background.
        masks: with a head for masks.
        norm: with BatchNorm in the pyramid.
        regions: of an image on which the heads are trained.
        dtype: of the weights.

    Raises:
        InputError: the trunk has no stages of the strides of a pyramid.
    """
    cells = pyramid_stages(trunk)
    first = next(trunk.parameters())
    with torch.no_grad():
        maps = trunk.maps(torch.zeros(1, 3, 64, 96, device=first.device, dtype=first.dtype), [*cells])
    backbone = Pyramid(trunk, {stage: maps[stage].shape[1] for stage in cells}, norm=norm)
    coarsest = Geometry(2 * STRIDES[-1], [*cells.values()][-1].offset)
    anchors = FixedAnchors([[side] for side in ANCHORS], [*cells.values(), coarsest])
    mask_parts = (
        AlignedPooler(MASK_CELLS, STRIDES),
        MaskRCNNHeads(WIDTH, (WIDTH,) * 4, 1),
        MaskRCNNPredictor(WIDTH, WIDTH, classes),
    )
    heads = BoxHeads(
        AlignedPooler(BOX_CELLS, STRIDES),
        TwoMLPHead(WIDTH * BOX_CELLS**2, HIDDEN),
        FloatPredictor(HIDDEN, classes),
        regions=regions,
        beta=0.0,
        masks=mask_parts if masks else None,
    )
    rpn = RegionProposals(WIDTH, anchors, before=BEFORE, after=AFTER, beta=0.0)
    return Detector(Batching(dtype=dtype), backbone, rpn, heads)
