"""Geometry of stages: the gradient of a cell with respect to the image is centred where the cell is said to be."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from deepcluster.core.errors import InputError
from deepcluster.models.archs import make_trunk
from deepcluster.models.geometry import Geometry, geometry
from deepcluster.models.receptive_field import stage_shapes
from deepcluster.models.trunk import Trunk

OWN = {"alexnet": 64, "vgg16": 32, "vgg16-deepercluster": 32, "alexnet-small": 32}
OWN |= {"resnet18": 32, "resnet50": 32, "resnet18-small": 32}


def linear_twin(trunk: Trunk) -> Trunk:
    """Return the network with one channel, constant weights and averages for maxima: the same windows, all of them seen."""
    twin = deepcopy(trunk).double().eval()
    for name, layer in list(twin.named_modules()):
        new: nn.Module | None = None
        if isinstance(layer, nn.Conv2d) and not name.startswith("sobel."):
            channels = layer.in_channels if layer.in_channels < 4 else 1
            windows = layer.stride, layer.padding, layer.dilation
            new = nn.Conv2d(channels, 1, layer.kernel_size, *windows, bias=False).double()  # type: ignore[arg-type]
            nn.init.constant_(new.weight, 1 / new.weight[0].numel())
        elif isinstance(layer, nn.MaxPool2d):
            new = nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding).double()
        elif isinstance(layer, nn.BatchNorm2d | nn.ReLU):
            new = nn.Identity()
        if new is not None:
            parent, _, own = name.rpartition(".")
            setattr(twin.get_submodule(parent), own, new)
    return twin


@cache
def found_in(arch: str, sobel: bool, side: int) -> tuple[dict[str, Geometry], Trunk]:
    trunk = make_trunk(arch, image_size=side, sobel=sobel)
    return {stage: geometry(trunk, stage) for stage in trunk.stages[:-1]}, linear_twin(trunk)


def check_centres(geometries: dict[str, Geometry], twin: Trunk, size: int) -> set[str]:
    """Check the middle cells whose field lies inside an image of this size; returns the names of their stages."""
    image_1CHW = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    checked = set()
    for name, map_1CHW in twin.maps(image_1CHW, twin.stages[:-1]).items():
        found = geometries[name]
        row, column = map_1CHW.shape[2] // 2, (map_1CHW.shape[3] - 1) // 2
        (gradient_1CHW,) = torch.autograd.grad(map_1CHW[0, :, row, column].sum(), image_1CHW, retain_graph=True)
        weight_HW = gradient_1CHW[0].abs().sum(dim=0)
        for axis, cell in enumerate((row, column)):
            profile = weight_HW.sum(dim=1 - axis)
            seen = (profile > 0).nonzero()
            first, last = int(seen.min()), int(seen.max())
            if first == 0 or last == size - 1:
                break  # cut off by the border
            centroid = float((profile * torch.arange(size)).sum() / profile.sum())
            assert (first + last) / 2 == found.centre(cell), name
            # Zeros around the maps inside the network cut off a little of a field that comes near the border.
            assert centroid == pytest.approx(found.centre(cell), abs=1e-3), name
            checked.add(name)
    return checked


@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize("arch", OWN)
def test_gradients_are_centred_at_the_cells_of_every_stage(arch: str, sobel: bool) -> None:
    geometries, twin = found_in(arch, sobel, OWN[arch])
    checked = check_centres(geometries, twin, 224) | check_centres(geometries, twin, 375)
    if arch in ("resnet18", "resnet50"):  # layer4 sees 435 pixels.
        assert checked == {"stem", "layer1", "layer2", "layer3"}
        checked |= check_centres(geometries, twin, 513)
    assert checked == set(geometries)


@pytest.mark.parametrize("arch", ["torchvision:alexnet", "torchvision:resnext50_32x4d", "timm:resnet18"])
def test_gradients_in_networks_of_libraries(arch: str) -> None:
    geometries, twin = found_in(arch, False, 64)
    assert len(check_centres(geometries, twin, 224 if "alexnet" in arch else 513)) == len(geometries)


@pytest.mark.parametrize(
    ("arch", "stage", "expected"),
    [
        ("alexnet", "conv5", Geometry(16, 15)),
        ("vgg16", "conv13", Geometry(16, 7.5)),
        # The border of zeros moves every cell by a pixel.
        ("vgg16-deepercluster", "conv13", Geometry(16, 6.5)),
        ("resnet18-small", "layer4", Geometry(8, 0)),
        # Shuffled channels, squeeze-and-excitation, an average pool before each block.
        ("torchvision:shufflenet_v2_x0_5", "stage4", Geometry(32, 0)),
        ("torchvision:mobilenet_v3_small", "features.12", Geometry(32, 0)),
        ("torchvision:densenet121", "features.denseblock3", Geometry(16, 6)),
        ("timm:regnety_002", "s4", Geometry(32, 0)),
        ("timm:resnetblur50", "layer3", Geometry(16, 0)),
        # TensorFlow's padding, which is at the right and at the bottom.
        ("timm:tf_efficientnet_b0", "blocks.2", Geometry(8, 7)),
        # Patches.
        ("torchvision:convnext_tiny", "features.5", Geometry(16, 7.5)),
        ("torchvision:swin_t", "features.3", Geometry(8, 3.5)),
        ("timm:test_vit,patch_size=4", "blocks.5", Geometry(4, 1.5)),
    ],
)
def test_known_geometry(arch: str, stage: str, expected: Geometry) -> None:
    side = OWN.get(arch, 64)
    for sobel in (False, True):
        trunk = make_trunk(arch, image_size=side, sobel=sobel)
        state = {name: value.clone() for name, value in trunk.state_dict().items()}
        trunk.train()
        next(trunk.children()).eval()
        modes = [layer.training for layer in trunk.modules()]
        assert geometry(trunk, stage) == expected
        assert [layer.training for layer in trunk.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in trunk.state_dict().items())


def bump(size: int, row: float, column: float) -> Tensor:
    """An image of noise that is there near a pixel only."""
    place = torch.arange(size)
    window_HW = torch.exp(-(((place[:, None] - row) ** 2) + (place - column) ** 2) / (2 * 6.0**2))
    return torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)) * window_HW


@pytest.mark.parametrize(
    ("arch", "stage"),
    [
        ("torchvision:mobilenet_v3_small", "features.4"),
        ("timm:regnety_002", "s2"),
        ("torchvision:convnext_tiny", "features.3"),
    ],
)
def test_a_bump_in_the_image_moves_the_map_where_it_is(arch: str, stage: str) -> None:
    """Real networks with gates: the centroid of the change lies at the bump, within half a cell."""
    trunk = make_trunk(arch, image_size=128, sobel=False, seed=4).eval()
    found = geometry(trunk, stage)
    row, column = 71.0, 45.0
    with torch.no_grad():
        blank, changed = (trunk.stage(x, stage) for x in (torch.zeros(1, 3, 128, 128), bump(128, row, column)))
    weight_HW = (changed - blank).square().mean(dim=(0, 1))
    for axis, pixel in enumerate((row, column)):
        profile = weight_HW.sum(dim=1 - axis)
        centroid = float((profile * torch.arange(len(profile))).sum() / profile.sum())
        assert abs(found.centre(centroid) - pixel) < found.stride / 2
        assert found.cell(found.centre(centroid)) == pytest.approx(centroid)


class Pooled(Trunk):
    """A stage without a fixed stride beside one that has it."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.first, self.pool, self.sobel = nn.Conv2d(3, 4, 3, stride=2, padding=1), pool, None
        self.arch, self.stages = "pooled", ("first", "pool", "features")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.maps(x_BCHW, ("features",))["features"].flatten(1)

    def walk(self, x_BCHW):  # type: ignore[no-untyped-def]
        x_BCHW = self.first(x_BCHW)
        yield "first", x_BCHW
        x_BCHW = self.pool(x_BCHW)
        yield "pool", x_BCHW
        yield "features", x_BCHW.mean((2, 3), keepdim=True)

    def convolutions(self) -> nn.Module:
        return self


@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d(8), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((8, 4)), nn.Upsample(50)]
)
def test_a_map_without_a_fixed_stride_is_refused(pool: nn.Module) -> None:
    trunk = Pooled(pool)
    assert geometry(trunk, "first") == Geometry(2, 0)
    for stage in ("pool", "features"):
        with pytest.raises(InputError, match=rf"stage {stage} of pooled has no fixed stride in the image; use first$"):
            geometry(trunk, stage)


def test_other_stages_are_refused() -> None:
    trunk = make_trunk("alexnet-small", image_size=32)
    with pytest.raises(
        InputError, match=r"features of alexnet-small has no fixed stride.*use conv1, conv2, conv3, conv4, conv5"
    ):
        geometry(trunk, "features")
    with pytest.raises(InputError, match="no stage 'conv6'"):
        geometry(trunk, "conv6")


def test_the_whole_field_is_reported_unless_the_direct_path_is_asked_for() -> None:
    trunk = make_trunk("timm:regnety_002", image_size=64, sobel=False)
    assert stage_shapes(trunk, ["s1"], 64)["s1"].field.stride == 0
    assert stage_shapes(trunk, ["s1"], 64, direct=True)["s1"].field.stride == 4
