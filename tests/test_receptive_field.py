"""Receptive fields: known numbers, and bright spots that reach a unit or do not."""

import pytest
import torch
from torch import Tensor, nn

from deepcluster.models.archs import make_trunk
from deepcluster.models.receptive_field import ReceptiveField, StageShape, stage_shapes
from deepcluster.models.trunk import Trunk

# Architecture, with Sobel or not, and the least image that it is made for.
CASES = [("alexnet", False, 64), ("alexnet-small", True, 32), ("vgg16", False, 32), ("resnet18", False, 32)]
CASES += [("alexnet", True, 64), ("resnet18-small", True, 32)]


def of(trunk: Trunk, side: int) -> dict[str, StageShape]:
    return stage_shapes(trunk, trunk.stages[:-1], side)


@pytest.mark.parametrize(
    ("arch", "stage", "expected"),
    [
        # AlexNet's and VGG-16's are in many tables; ResNets' in that of Araujo, Norris and Sim (Distill, 2019).
        ("alexnet", "conv1", ReceptiveField(11, 4, -2)),
        ("alexnet", "conv2", ReceptiveField(51, 8, -18)),
        ("alexnet", "conv5", ReceptiveField(163, 16, -66)),
        ("vgg16", "conv13", ReceptiveField(196, 16, -90)),
        ("resnet18", "stem", ReceptiveField(7, 2, -3)),
        ("resnet18", "layer4", ReceptiveField(435, 32, -217)),
        ("resnet50", "layer4", ReceptiveField(427, 32, -213)),
        ("alexnet-small", "conv1", ReceptiveField(5, 2, -2)),
        # 5, pool 2/2: 7; 3x3 at stride 4: 15; pool: 19; three 3x3 at stride 8: 67.
        ("alexnet-small", "conv5", ReceptiveField(67, 8, -30)),
    ],
)
def test_known_receptive_fields(arch: str, stage: str, expected: ReceptiveField) -> None:
    trunk = make_trunk(arch, image_size=64, sobel=False)
    assert stage_shapes(trunk, [stage], 64)[stage].field == expected
    with_sobel = make_trunk(arch, image_size=64, sobel=True)
    wider = ReceptiveField(expected.size + 2, expected.stride, expected.offset - 1)
    assert stage_shapes(with_sobel, [stage], 64)[stage].field == wider


@pytest.mark.parametrize("arch", ["alexnet", "alexnet-small", "resnet18"])
def test_features_see_the_whole_image(arch: str) -> None:
    shape = stage_shapes(make_trunk(arch, image_size=64), ["features"], 64)["features"]
    assert (shape.height, shape.width, shape.field) == (1, 1, ReceptiveField(64, 0, 0))
    assert shape.field.box(0, 0, 64) == (0, 0, 64, 64)


def test_boxes_are_cut_off_at_the_border() -> None:
    field = ReceptiveField(size=11, stride=4, offset=-2)
    assert field.box(row=0, column=54, image_size=224) == (214, 0, 224, 9)
    assert field.box(row=1, column=2, image_size=224) == (6, 2, 17, 13)


def walk(trunk: Trunk, images_BCHW: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return trunk.maps(images_BCHW, trunk.stages[:-1])


def positive(trunk: Trunk) -> Trunk:
    """Set weights that can't cancel: what reaches a unit raises it, and a black image gives 0."""
    generator = torch.Generator().manual_seed(1)
    for layer in trunk.modules():
        if isinstance(layer, nn.Conv2d):
            inputs = layer.weight[0].numel()
            layer.weight.data.copy_((torch.rand(layer.weight.shape, generator=generator) + 0.5) / inputs**0.5)
            if layer.bias is not None:
                layer.bias.data.zero_()
    return trunk.eval()


def spots(field: ReceptiveField, cell: int) -> Tensor:
    """Return images with one bright pixel at one of two corners of a unit's box, and one that is bright around the box."""
    start, end = field.interval(cell)
    images_3CHW = torch.zeros(3, 3, end + 1, end + 1)
    images_3CHW[0, :, start, start] = images_3CHW[1, :, end - 1, end - 1] = 1
    images_3CHW[2] = 1
    images_3CHW[2, :, start:end, start:end] = 0
    return images_3CHW


@pytest.mark.parametrize(("arch", "sobel", "made_for"), CASES)
def test_a_bright_spot_at_the_edge_of_the_box_is_seen_and_none_beyond(arch: str, sobel: bool, made_for: int) -> None:
    trunk = positive(make_trunk(arch, image_size=made_for, sobel=sobel))
    for name, shape in of(trunk, made_for).items():
        cell = -((shape.field.offset - 1) // shape.field.stride)  # the first one whose field lies inside the image
        with torch.no_grad():
            units_3C = trunk.stage(spots(shape.field, cell), name)[:, :, cell, cell]
        assert units_3C[:2].min() > 0, f"{name}: a corner of the box is not seen"
        assert units_3C[2].max() == 0, f"{name}: something beyond the box is seen"


@pytest.mark.parametrize(
    ("arch", "side"), [("alexnet", 128), ("alexnet-small", 48), ("vgg16", 64), ("resnet18", 128), ("resnet18-small", 48)]
)
def test_what_is_beyond_the_box_changes_nothing(arch: str, side: int) -> None:
    trunk = make_trunk(arch, image_size=side, sobel=True, seed=2).eval()
    generator = torch.Generator().manual_seed(5)
    image_1CHW, other_1CHW = torch.randn(2, 1, 3, side, side, generator=generator)
    before = walk(trunk, image_1CHW)
    for name, shape in of(trunk, side).items():
        for row, column in ((0, 0), (shape.height // 2, shape.width - 1)):
            left, top, right, bottom = shape.field.box(row, column, side)
            changed_1CHW = other_1CHW.clone()
            changed_1CHW[:, :, top:bottom, left:right] = image_1CHW[:, :, top:bottom, left:right]
            with torch.no_grad():
                after_1CHW = trunk.stage(changed_1CHW, name)
            assert torch.equal(after_1CHW[0, :, row, column], before[name][0, :, row, column]), name


class Parts(Trunk):
    """Stages of layers as other networks may have them."""

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(stages)
        self.arch, self.stages = "parts", tuple(f"part{number}" for number in range(len(stages)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        raise NotImplementedError

    def walk(self, x_BCHW):  # type: ignore[no-untyped-def]
        for name, part in zip(self.stages, self.parts, strict=True):
            x_BCHW = part(x_BCHW)
            yield name, x_BCHW

    def convolutions(self) -> nn.Module:
        return self


class Gated(nn.Module):
    """Channels weighted by the average of the map, as squeeze-and-excitation does: every unit sees everything."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * x_BCHW.mean((2, 3), keepdim=True).sigmoid()


class Branches(nn.Module):
    """Paths of several sizes, joined by channels."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            [nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 5, padding=2), nn.Conv2d(4, 2, (1, 7), padding=(0, 3))]
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.cat([path(x_BCHW) for path in self.paths], 1)


def test_other_operations() -> None:
    trunk = Parts(
        nn.Conv2d(3, 4, 3, padding=2, dilation=2, stride=2),
        nn.Sequential(nn.AvgPool2d(2), nn.SiLU(), nn.Hardswish()),
        Branches(),
        nn.Sequential(nn.Conv2d(6, 6, 1), Gated()),
        nn.Conv2d(6, 2, 3),
    )
    fields = {name: shape.field for name, shape in stage_shapes(trunk, trunk.stages, 32).items()}
    whole = ReceptiveField(32, 0, 0)
    assert list(fields.values()) == [
        ReceptiveField(5, 2, -2),
        ReceptiveField(7, 4, -2),
        ReceptiveField(31, 4, -14),
        whole,
        whole,
    ]


def test_flipped_maps_see_the_whole_image_rather_than_too_little() -> None:
    class Turned(nn.Module):
        def forward(self, x_BCHW: Tensor) -> Tensor:
            return x_BCHW.flip(3)

    trunk = Parts(nn.Sequential(nn.Conv2d(3, 4, 3), Turned()))
    assert stage_shapes(trunk, trunk.stages, 16)["part0"].field == ReceptiveField(16, 0, 0)
