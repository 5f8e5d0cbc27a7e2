"""Regions of maps, and what is made of a trunk for a detector, against the trunk itself."""

import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, roi_align, roi_pool

from deepcluster.core.errors import InputError
from deepcluster.evaluation.dense.detection.box_heads import parts_of
from deepcluster.evaluation.dense.detection.freezing import keep_frozen_statistics, train_from
from deepcluster.evaluation.dense.detection.parts import FixedAnchors
from deepcluster.evaluation.dense.detection.roi import AlignedPooler, MaxPooler
from deepcluster.models.archs import make_trunk
from deepcluster.models.geometry import Geometry
from deepcluster.models.trunk import Trunk


def trunk_of(arch: str, size: int = 224, **options: object) -> Trunk:
    """A random trunk whose BatchNorm has statistics like those of a trained one."""
    trunk = make_trunk(arch, image_size=size, **options).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    for layer in trunk.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return trunk


def images(count: int = 2, size: int = 224) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def whole(side: float, count: int = 2) -> list[torch.Tensor]:
    return [torch.tensor([[0.0, 0.0, side, side]])] * count


@pytest.mark.parametrize(
    ("arch", "size", "side", "cells"), [("alexnet", 224, 192, 6), ("alexnet", 128, 96, 3), ("vgg16", 224, 208, 7)]
)
@torch.no_grad()
def test_the_pooled_image_is_that_of_the_trunk_and_fc7_is_its_features(
    arch: str, size: int, side: float, cells: int
) -> None:
    trunk, x = trunk_of(arch, size), images(size=size)
    features, maps = trunk(x).relu(), trunk.features(trunk.edges(x))  # type: ignore[operator]
    parts = parts_of(trunk, size, 0)
    parts.head.eval()
    pooled = parts.pooler({"map": trunk.stage(x, parts.stage)}, whole(side), [])
    assert pooled.shape[2:] == (cells, cells)
    assert torch.equal(pooled, maps)
    assert torch.equal(parts.head(pooled), features)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@torch.no_grad()
def test_the_aligned_region_of_the_whole_image_goes_through_layer4_as_in_the_trunk(arch: str) -> None:
    trunk, x = trunk_of(arch), images(1)
    layer3, layer4 = (trunk.stage(x, name) for name in ("layer3", "layer4"))
    parts = parts_of(trunk, 224, 0)
    pooled = AlignedPooler(14, [16], samples=1)({"layer3": layer3}, whole(224, 1), [])
    assert torch.equal(pooled, layer3)
    assert torch.equal(parts.head.layer(pooled), layer4)  # type: ignore[operator]
    assert parts.stage == "layer3" and parts.pooler.size == 14 and parts.pooler.strides == (16,)


def test_poolers_are_torchvisions_functions_at_a_fixed_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 20, 24, generator=generator)
    corners = torch.rand(2, 7, 2, generator=generator) * 150
    boxes = [*torch.cat([corners, corners + 5 + torch.rand(2, 7, 2, generator=generator) * 200], dim=2)]
    assert torch.equal(MaxPooler(6, 16)({"a": maps}, boxes, []), roi_pool(maps, boxes, 6, 1 / 16))
    aligned = roi_align(maps, boxes, 7, 1 / 16, sampling_ratio=0, aligned=True)
    assert torch.equal(AlignedPooler(7, [16])({"a": maps}, boxes, []), aligned)
    none = [torch.zeros(0, 4)] * 2
    assert AlignedPooler(7, [16])({"a": maps}, none, []).shape == (0, 3, 7, 7)
    assert MaxPooler(6, 16)({"a": maps}, none, []).shape == (0, 3, 6, 6)


def test_of_several_maps_each_box_is_taken_from_the_one_that_torchvision_takes_it_from() -> None:
    generator = torch.Generator().manual_seed(1)
    maps = {str(n): torch.full((1, 1, 256 >> n, 256 >> n), float(n)) for n in range(4)} | {"pool": torch.zeros(1, 1, 8, 8)}
    sides = torch.rand(200, 2, generator=generator) * 900 + 1
    boxes = [torch.cat([torch.zeros(200, 2), sides], dim=1)]
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 1, 1)(maps, boxes, [(1024, 1024)])
    ours = AlignedPooler(1, [4, 8, 16, 32])(maps, boxes, [])
    assert torch.equal(ours, theirs.round())
    assert len(ours.unique()) == 4


def test_anchors_lie_on_the_cells() -> None:
    cells = [Geometry(16, 0.0), Geometry(32, 7.5)]
    anchors = FixedAnchors([[64, 128], [256]], cells)
    maps = [torch.zeros(2, 8, 13, 15), torch.zeros(2, 8, 7, 7)]
    first, second = anchors(ImageList(torch.zeros(2, 3, 224, 256), [(224, 256), (200, 100)]), maps)
    assert torch.equal(first, second) and len(first) == 13 * 15 * 6 + 49 * 3
    centres = (first[:, :2] + first[:, 2:]) / 2
    assert torch.equal(
        centres[: 13 * 15 * 6 : 6], torch.tensor([[16.0 * x, 16.0 * y] for y in range(13) for x in range(15)])
    )
    assert torch.equal(
        centres[13 * 15 * 6 :: 3], torch.tensor([[7.5 + 32 * x, 7.5 + 32 * y] for y in range(7) for x in range(7)])
    )
    # Where sizes are whole multiples of the stride, they are torchvision's.
    given = ImageList(torch.zeros(1, 3, 224, 256), [(224, 256)])
    theirs = AnchorGenerator(((64, 128),), ((0.5, 1.0, 2.0),))(given, [torch.zeros(1, 8, 14, 16)])
    assert torch.equal(FixedAnchors([[64, 128]], cells[:1])(given, [torch.zeros(1, 8, 14, 16)])[0], theirs[0])


@pytest.mark.parametrize(
    ("arch", "size", "stage", "shift", "offset", "stride"),
    [
        ("alexnet", 224, "conv5", 15, 0, 16),
        ("vgg16", 64, "conv13", 7, 0.5, 16),
        ("resnet18", 64, "layer3", 0, 0, 16),
        ("alexnet-small", 32, "conv5", 0, 3, 8),
        ("resnet18-small", 32, "layer4", 0, 0, 8),
        ("torchvision:squeezenet1_1", 64, "features.12", 7, None, 16),
    ],
)
def test_cells_after_the_shift(arch: str, size: int, stage: str, shift: int, offset: float | None, stride: int) -> None:
    parts = parts_of(trunk_of(arch, size), size, 0)
    assert (parts.stage, parts.shift, parts.cells.stride) == (stage, shift, stride)
    assert offset is None or parts.cells.offset == offset
    rows = parts.pooler({"map": torch.randn(1, parts.width, 9, 11)}, whole(60, 1), [])
    assert parts.head.eval()(rows).shape == (1, parts.features)


def test_a_network_for_one_size_says_what_works() -> None:
    with pytest.raises(InputError, match=r"torchvision:vit_b_32 takes images of 64 px only.*such as alexnet"):
        parts_of(trunk_of("torchvision:vit_b_32", 64), 64, 0)


@pytest.mark.parametrize("sobel", [True, False])
def test_only_weights_between_two_stages_are_trained(sobel: bool) -> None:
    trunk = trunk_of("alexnet", 64, sobel=sobel)
    train_from(trunk, "conv1", "conv5", 64)
    trained = {name for name, weight in trunk.named_parameters() if weight.requires_grad}
    layers = {int(name.split(".")[1]) for name in trained}
    assert all(name.startswith("features.") for name in trained)
    assert layers == {4, 5, 8, 9, 11, 12, 14, 15}
    trunk.train()
    keep_frozen_statistics(trunk)
    norms = [layer.training for layer in trunk.features if isinstance(layer, nn.BatchNorm2d)]  # type: ignore[union-attr]
    assert norms == [False, True, True, True, True]
    train_from(trunk, "conv5", "conv5", 64)
    assert not any(weight.requires_grad for weight in trunk.parameters())
    train_from(trunk, "", "conv2", 64)
    assert {int(name.split(".")[1]) for name, w in trunk.named_parameters() if w.requires_grad} == {0, 1, 4, 5}
