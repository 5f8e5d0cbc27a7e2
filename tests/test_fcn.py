"""Networks for segmentation: upsampling equals interpolation, cells lie in place, fc6 and fc7 are the trunk's own."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu, unfold

from deepcluster.core.errors import InputError
from deepcluster.evaluation.dense.segmentation.fcn import FCN32s, FCNd8, bilinear_kernel, make_fcn, upsampled
from deepcluster.models.archs import make_trunk
from deepcluster.models.convnets import sobel_layer
from deepcluster.models.geometry import geometry
from deepcluster.models.trunk import Trunk

CLASSES = 5


@cache
def kept_trunk(arch: str, size: int, sobel: bool) -> Trunk:
    return make_trunk(arch, image_size=size, sobel=sobel, seed=2).eval()


def fcn32(arch: str = "alexnet", size: int = 64, sobel: bool = False) -> FCN32s:
    network = make_fcn(deepcopy(kept_trunk(arch, size, sobel)), "fcn32", CLASSES, seed=1).eval()
    assert isinstance(network, FCN32s)
    return network


def images(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stride", [2, 8, 32])
def test_an_odd_kernel_interpolates_with_aligned_corners(stride: int) -> None:
    map_BChw = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    found = upsampled(map_BChw, bilinear_kernel(2 * stride - 1, stride), stride, padding=stride - 1)
    size = [(side - 1) * stride + 1 for side in (4, 6)]
    expected = interpolate(map_BChw, size=size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(found, expected, atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("stride", [2, 8, 32])
def test_an_even_kernel_interpolates_without_in_the_interior(stride: int) -> None:
    map_BChw = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    found = upsampled(map_BChw, bilinear_kernel(2 * stride, stride), stride, padding=stride // 2)
    expected = interpolate(map_BChw, scale_factor=stride, mode="bilinear", align_corners=False)
    inside = (..., slice(stride // 2, -(stride // 2)), slice(stride // 2, -(stride // 2)))
    assert found.shape == expected.shape
    torch.testing.assert_close(found[inside], expected[inside], atol=1e-15, rtol=1e-14)
    assert float((found - expected).abs().max()) > 0.01  # at the border the deconvolution fades out


@pytest.mark.parametrize(
    ("arch", "size", "padding", "side", "crop"),
    [
        # As published: voc-fcn-alexnet and voc-fcn32s.
        ("alexnet", 224, 100, 6, 18),
        ("vgg16", 224, 100, 7, 19),
        # Networks for other sizes.
        ("alexnet", 64, 20, 1, 18),
        ("alexnet", 128, 52, 3, 18),
        ("vgg16", 64, 20, 2, 19),
        ("vgg16-deepercluster", 64, 20, 2, 19),
    ],
)
def test_padding_and_crop(arch: str, size: int, padding: int, side: int, crop: int) -> None:
    with torch.device("meta"):
        trunk = make_trunk(arch, image_size=size, sobel=False)
        network = FCN32s(trunk, CLASSES)
    found = network.trunk.features[0].padding, network.fc6.kernel_size, network.crop, network.stride
    assert found == ((padding, padding), (side, side), crop, 32)
    assert network.kernel_KK.shape == ((63, 63) if arch == "alexnet" else (64, 64))


@pytest.mark.parametrize(("arch", "sobel"), [("alexnet", False), ("alexnet", True), ("vgg16-deepercluster", True)])
def test_a_lit_cell_has_its_peak_where_the_gradient_of_the_cell_is_centred(arch: str, sobel: bool) -> None:
    """Also with a border and the Sobel layer: what is upsampled lies on what was seen."""
    network = fcn32(arch, 64, sobel)
    lit = torch.zeros(1, CLASSES, 4, 5)
    lit[0, 3, 1, 2] = 1
    large_HW = upsampled(lit, network.kernel_KK, network.stride)[0, 3, network.crop :, network.crop :]
    places = (large_HW == large_HW.max()).nonzero().double().mean(dim=0).tolist()
    assert places == ([45, 77] if arch == "alexnet" else [44.5, 76.5])  # (13 + 32 i, 13 + 32 j), and half a pixel less
    # From the geometry of the padded network: pool5, then fc6.
    last = geometry(network.trunk, network.trunk.stages[-2])
    pool, side = network.trunk.features[-1], network.fc6.kernel_size[0]
    first = last.offset + last.stride * (pool.kernel_size - 1) / 2 + 32 * (side - 1) / 2
    assert places == [first + 32, first + 64]


def test_cells_are_those_of_a_trunk_on_windows_of_the_map() -> None:
    """fc6 and fc7 as convolutions equal the trunk's own layers on each window; ReLU follows both."""
    for arch, size in (("alexnet", 128), ("vgg16-deepercluster", 64)):
        trunk = deepcopy(kept_trunk(arch, size, True))
        classifier = trunk.classifier
        network = make_fcn(trunk, "fcn32", CLASSES, seed=1).eval()
        nn.init.normal_(network.score.weight)
        x = images(70, 110)
        with torch.no_grad():
            map_1CHW = network.trunk.features(network.trunk.edges(x))
            side = network.fc6.kernel_size[0]
            windows_LD = unfold(map_1CHW, side)[0].T
            scores_LC = network.score(relu(classifier(windows_LD))[:, :, None, None])[:, :, 0, 0]
            cells_1Chw = network.cells(x)
        torch.testing.assert_close(cells_1Chw.flatten(2)[0].T, scores_LC, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sobel", [False, True])
def test_without_more_padding_the_cell_is_the_feature_of_the_trunk(sobel: bool) -> None:
    trunk = kept_trunk("alexnet", 128, sobel)
    network = fcn32("alexnet", 128, sobel)
    network.trunk.features[0].padding = (2, 2)
    network.score = nn.Identity()  # type: ignore[assignment]
    x = images(128, 128)
    if sobel:  # Zeros at the border, as a trunk has it.
        network.trunk.sobel[-1].padding_mode = "zeros"
    with torch.no_grad():
        torch.testing.assert_close(network.cells(x)[:, :, 0, 0], relu(trunk(x)), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("arch", ["alexnet", "vgg16-deepercluster"])
def test_scores_cover_images_of_all_sizes(arch: str) -> None:
    network = fcn32(arch).to("meta")
    size = len(network.kernel_KK)
    for side in range(1, 100):
        cells = network.cells(torch.empty(1, 3, side, 110 - side, device="meta")).shape[2:]
        for long, count in zip((side, 110 - side), cells, strict=True):
            # A score that is not faded out at the right end: half the kernel beyond the last cell.
            assert 32 * (count - 1) + size - network.crop >= long
            assert 32 * (count - 1) + size // 2 - network.crop >= long - 17
    assert fcn32(arch)(images(1, 77))["out"].shape == (1, CLASSES, 1, 77)


def test_the_border_of_an_image_is_no_edge() -> None:
    """A grey image has no Sobel edges, whatever its brightness, and an image of noise has the usual ones inside."""
    network, usual = fcn32("alexnet", 64, True), sobel_layer()
    assert network.trunk.edges(torch.full((1, 3, 20, 30), 1.7)).abs().max() < 1e-5
    assert usual(torch.full((1, 3, 20, 30), 1.7)).abs().max() > 1
    x = images(20, 30)
    torch.testing.assert_close(network.trunk.edges(x)[..., 1:-1, 1:-1], usual(x)[..., 1:-1, 1:-1])


def test_only_dropout_and_batch_norm_know_of_training_and_all_weights_learn() -> None:
    network = make_fcn(deepcopy(kept_trunk("alexnet", 64, True)), "auto", CLASSES, seed=1).train()
    assert isinstance(network, FCN32s)
    nn.init.normal_(network.score.weight)
    x = images(64, 64, batch=2)
    torch.manual_seed(0)
    one, other = network(x)["out"], network(x)["out"]
    assert not torch.equal(one, other)
    one.square().mean().backward()
    without = [name for name, weight in network.named_parameters() if weight.grad is None]
    assert without == [f"trunk.sobel.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
    assert make_fcn(deepcopy(kept_trunk("alexnet", 64, True)), "fcn32", CLASSES, seed=1)(x)["out"].abs().max() == 0


@pytest.mark.parametrize(
    ("arch", "aux", "widths"),
    [
        ("resnet50", "layer3", (2048, 512, 256)),
        ("resnet18", "layer3", (512, 128, 64)),
        ("resnet18-small", "layer3", (512, 128, 64)),
        ("alexnet-small", "conv2", (256, 64, 64)),
        ("timm:resnet18", "layer3", (512, 128, 64)),
    ],
)
def test_networks_with_dilation(arch: str, aux: str, widths: tuple[int, int, int]) -> None:
    trunk = make_trunk(arch, image_size=32, sobel=True, seed=2)
    state = {name: weight.clone() for name, weight in trunk.state_dict().items()}
    network = make_fcn(trunk, "auto", CLASSES, seed=1)
    assert isinstance(network, FCNd8)
    assert all(torch.equal(weight, state[name]) for name, weight in network.trunk.state_dict().items())
    assert geometry(network.trunk, network.stage).stride == 8
    assert network.aux_stage == aux
    channels, width, aux_width = widths
    shapes = [tuple(layer.weight.shape) for layer in network.head.modules() if isinstance(layer, nn.Conv2d)]
    blocks = [(width, channels, 3, 3), (width, width, 3, 3), (width, channels + width, 3, 3)]
    assert shapes == [*blocks, (CLASSES, width, 1, 1)]
    assert network.aux_head is not None
    assert network.aux_head[0][0].out_channels == aux_width
    found = network.train()(images(40, 56, batch=2))
    assert list(found) == ["out", "aux"]
    if "small" not in arch:  # Their strides are 8 without dilation.
        assert found["out"].shape == found["aux"].shape == (2, CLASSES, 5, 7)
    sum(one.square().sum() for one in found.values()).backward()  # type: ignore[union-attr]
    without = [name for name, weight in network.named_parameters() if weight.grad is None]
    assert all(name.startswith("trunk.sobel.") for name in without)
    with torch.no_grad():
        assert list(network.eval()(images(40, 56))) == ["out"]


def test_the_head_is_that_of_the_settings_by_hand() -> None:
    network = make_fcn(make_trunk("alexnet-small", image_size=32, sobel=False), "fcn-d8", CLASSES, seed=1).double().eval()
    assert isinstance(network, FCNd8)
    x = images(32, 48).double()
    first, second = network.head.convolutions
    with torch.no_grad():
        map_BChw = network.trunk.stage(x, "conv5")
        inner_BChw = relu(second[1](second[0](relu(first[1](first[0](map_BChw))))))
        joined = relu(network.head.joined[1](network.head.joined[0](torch.cat([map_BChw, inner_BChw], 1))))
        torch.testing.assert_close(network(x)["out"], network.head.scores[1](joined))


def test_only_the_seed_fixes_new_weights() -> None:
    def new(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed + 10)
        trunk = make_trunk("alexnet-small", image_size=32, sobel=False, seed=2)
        state = torch.get_rng_state()
        network = make_fcn(trunk, "fcn-d8", CLASSES, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return network.state_dict()

    one, same, other = new(1), new(1), new(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {name for name in one if name.endswith(("head.scores.1.weight", "0.weight")) and "head" in name} | {
        "aux_head.1.1.weight"
    }


def test_recipes_that_do_not_fit_are_refused() -> None:
    trunk = make_trunk("alexnet-small", image_size=32)
    with pytest.raises(InputError, match=r"fcn32 needs fully connected layers.*alexnet-small has none: use fcn-d8$"):
        make_fcn(trunk, "fcn32", CLASSES, seed=1)
    for arch in ("timm:resnet18d", "torchvision:convnext_tiny", "timm:test_vit,patch_size=16"):
        with pytest.raises(InputError, match=rf"{arch} can't (be dilated: its layer|have stride 8 at)"):
            make_fcn(make_trunk(arch, image_size=64), "auto", CLASSES, seed=1)
