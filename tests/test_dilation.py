"""Dilated trunks: the strided network's cells are found again in the denser maps."""

import pytest
import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.archs import make_trunk
from deepcluster.models.dilation import dilated
from deepcluster.models.geometry import Geometry, geometry
from deepcluster.models.receptive_field import stage_shapes
from deepcluster.models.trunk import Trunk


def trunk_of(arch: str, size: int, sobel: bool = False) -> Trunk:
    """In float64 and eval mode, with weights of BatchNorm as training leaves them."""
    trunk = make_trunk(arch, image_size=size, sobel=sobel, seed=3).double().eval()
    generator = torch.Generator().manual_seed(0)
    for layer in trunk.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(std=0.2, generator=generator)
    return trunk


def maps(trunk: Trunk, height: int, width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return trunk.maps(torch.randn(1, 3, height, width, dtype=torch.float64, generator=generator), trunk.stages[:-1])


def check(trunk: Trunk, stage: str, stride: int, sizes: list[tuple[int, int]]) -> None:
    """Compare all stages of the strided network and the dilated one, for images of several sizes."""
    state = {name: value.clone() for name, value in trunk.state_dict().items()}
    before = {name: shape.field for name, shape in stage_shapes(trunk, trunk.stages[:-1], 64, direct=True).items()}
    offset = geometry(trunk, stage).offset
    strided = [maps(trunk, *size) for size in sizes]
    assert dilated(trunk, stage, stride) is trunk
    for size, expected in zip(sizes, strided, strict=True):
        for name, map_BCHW in maps(trunk, *size).items():
            factor = max(1, before[name].stride // stride)
            thinned_BCHW = map_BCHW[:, :, ::factor, ::factor]
            torch.testing.assert_close(thinned_BCHW, expected[name], atol=1e-12, rtol=1e-12)
    assert geometry(trunk, stage) == Geometry(stride, offset)
    after = trunk.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.parametrize(("arch", "stride"), [("resnet50", 8), ("resnet18", 8), ("resnet18", 16)])
def test_resnets(arch: str, stride: int) -> None:
    check(trunk_of(arch, 64), "layer4", stride, [(67, 41)])


@pytest.mark.parametrize(
    ("arch", "stage", "stride", "made_for"),
    [
        ("resnet18-small", "layer4", 4, 32),
        ("alexnet-small", "conv5", 4, 32),
        ("alexnet-small", "conv3", 2, 32),
        ("torchvision:shufflenet_v2_x0_5", "stage4", 8, 64),
        ("timm:resnet18", "layer4", 8, 64),
    ],
)
def test_other_networks(arch: str, stage: str, stride: int, made_for: int) -> None:
    check(trunk_of(arch, made_for, sobel=True), stage, stride, [(35, 26) if made_for == 32 else (67, 41)])


@pytest.mark.parametrize(("arch", "stage", "stride", "made_for"), [("alexnet", "conv5", 8, 64), ("vgg16", "conv13", 8, 32)])
def test_networks_with_pools(arch: str, stage: str, stride: int, made_for: int) -> None:
    check(trunk_of(arch, made_for, sobel=True), stage, stride, [(70, 49)])


def test_a_resnet_has_the_dilations_of_the_published_d8() -> None:
    """Those of torchvision's own option: the first 3x3 of a stage keeps the dilation of the stage before."""
    import torchvision

    options = {"replace_stride_with_dilation": [False, True, True]}
    theirs = torchvision.models.resnet50(weights=None, **options)
    ours = dilated(make_trunk("resnet50", image_size=64, sobel=False), "layer4", 8)

    def convolutions(network: nn.Module) -> list[tuple[object, ...]]:
        found = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        return [(one.kernel_size, one.stride, one.padding, one.dilation) for one in found]

    assert convolutions(ours.backbone) == convolutions(theirs)  # type: ignore[arg-type]


def test_nothing_changes_at_the_stride_that_it_has_and_twice_is_once() -> None:
    trunk = make_trunk("resnet18-small", image_size=32, sobel=False, seed=3).eval()
    before = repr(trunk)
    assert repr(dilated(trunk, "layer4", 8)) == before
    once = repr(dilated(trunk, "layer4", 2))
    again = dilated(
        dilated(make_trunk("resnet18-small", image_size=32, sobel=False, seed=3).eval(), "layer4", 4), "layer4", 2
    )
    assert once == repr(again) != before


def test_gates_average_a_denser_map() -> None:
    trunk = trunk_of("timm:seresnet50", 64)
    before = maps(trunk, 64, 64)["layer3"]
    after = maps(dilated(trunk, "layer4", 8), 64, 64)["layer3"][:, :, ::2, ::2]
    assert float((after - before).norm() / before.norm()) < 0.2


@pytest.mark.parametrize(
    ("arch", "stage", "stride", "message"),
    [
        ("resnet18", "layer4", 12, "stage layer4 of resnet18 has stride 32, which can't become 12; use 1, 2, 4, 8, 16, 32$"),
        ("resnet18", "layer2", 16, "stage layer2 of resnet18 has stride 8, which can't become 16; use 1, 2, 4, 8$"),
        ("resnet18", "features", 8, "features of resnet18 has no fixed stride"),
        ("resnet18", "layer4", 1, "resnet18 can't have stride 1 at layer4; plain convolutions"),
        (
            "timm:resnet18d",
            "layer4",
            8,
            r"timm:resnet18d can't be dilated: its layer \S+downsample.0 \(AvgPool2d\) can't; plain",
        ),
        ("timm:resnetblur50", "layer4", 8, "timm:resnetblur50 can't have stride 8 at layer4; plain convolutions"),
        ("timm:tf_efficientnet_b0", "blocks.6", 8, "can't have stride 8 at blocks.6; plain convolutions"),
        ("timm:test_vit,patch_size=4", "blocks.5", 2, "can't have stride 2 at blocks.5; plain convolutions"),
    ],
)
def test_what_can_not_be_dilated_is_refused_and_left_as_it_was(arch: str, stage: str, stride: int, message: str) -> None:
    trunk = make_trunk(arch, image_size=64, sobel=False)
    before = repr(trunk)
    with pytest.raises(InputError, match=message):
        dilated(trunk, stage, stride)
    assert repr(trunk) == before
