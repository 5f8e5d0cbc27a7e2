"""The contract that every architecture keeps, and each network against plain layers or torchvision's own."""

import re
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn
from trunk_contract import TrunkContract, images, size_of, trunk_of

from deepcluster.core.errors import InputError
from deepcluster.models.archs import ARCHITECTURES, make_trunk
from deepcluster.models.convnets import sobel_layer
from deepcluster.models.trunk import FEATURES, normalise


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Maps are small here: several threads wait for one another, three times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("arch", ARCHITECTURES)
class TestEveryTrunk(TrunkContract):
    def test_maps_are_after_their_relu(self, arch: str) -> None:
        trunk = trunk_of(arch)
        with torch.no_grad():
            for name, maps_BCHW in trunk.walk(images(size_of(arch))):
                assert name == FEATURES or maps_BCHW.min() >= 0

    @pytest.mark.parametrize("size", [32, 64, 96, 128, 224])
    @pytest.mark.parametrize("sobel", [True, False])
    def test_usual_sizes_work_or_are_reported(self, arch: str, size: int, sobel: bool) -> None:
        """On the meta device, where only shapes are computed. Only AlexNet can't take 32 px."""
        with torch.device("meta"):
            if arch == "alexnet" and size == 32:
                with pytest.raises(InputError, match=r"image_size=32 .*alexnet-small"):
                    make_trunk(arch, image_size=size, sobel=sobel)
                return
            trunk = make_trunk(arch, image_size=size, sobel=sobel)
            assert trunk(torch.empty(2, 3, size, size)).shape == (2, trunk.dim)

    def test_the_smallest_size_that_is_named_works(self, arch: str) -> None:
        with pytest.raises(InputError, match=f"image_size=1 is too small for {arch}") as raised:
            make_trunk(arch, image_size=1)
        smallest = int(re.search(r"use (\d+) or more", str(raised.value))[1])
        with pytest.raises(InputError, match=f"use {smallest} or more"):
            make_trunk(arch, image_size=smallest - 1)
        trunk = make_trunk(arch, image_size=smallest).eval()
        with torch.no_grad():
            assert trunk(images(smallest, batch=1)).isfinite().all()


def test_an_unknown_architecture_is_reported_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'alexnett'.*did you mean alexnet\?.*resnet50"):
        make_trunk("alexnett")


# Sobel


def sobel_by_hand(x_BCHW: Tensor) -> Tensor:
    """Differences of grey neighbours, weighted 1-2-1 across; outside of the image is 0."""
    grey = torch.zeros(len(x_BCHW), x_BCHW.shape[2] + 2, x_BCHW.shape[3] + 2)
    grey[:, 1:-1, 1:-1] = (x_BCHW[:, 0] + x_BCHW[:, 1] + x_BCHW[:, 2]) / 3
    rows = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    columns = grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    return torch.stack([rows[:, :, :-2] - rows[:, :, 2:], columns[:, :-2] - columns[:, 2:]], dim=1)


def test_sobel_equals_differences_by_hand() -> None:
    torch.testing.assert_close(sobel_layer()(images(17)), sobel_by_hand(images(17)))


def test_sobel_of_an_even_image_is_zero_inside() -> None:
    assert sobel_layer()(torch.ones(1, 3, 8, 8))[:, :, 1:-1, 1:-1].abs().max() < 1e-6


# The paper's networks


def plain_alexnet(channels: int) -> nn.Sequential:
    """Section 3.3 of the paper: five convolutions of 96, 256, 384, 384 and 256 filters, BatchNorm, two layers of 4,096."""
    return nn.Sequential(
        nn.Conv2d(channels, 96, 11, stride=4, padding=2), nn.BatchNorm2d(96), nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2), nn.BatchNorm2d(256), nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.BatchNorm2d(384), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1), nn.BatchNorm2d(384), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Flatten(), nn.Dropout(), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("sobel", [True, False])
def test_alexnet_equals_plain_layers_with_the_same_weights(sobel: bool) -> None:
    trunk = make_trunk("alexnet", image_size=224, sobel=sobel).eval()
    plain = plain_alexnet(2 if sobel else 3)
    ours = [value for name, value in trunk.state_dict().items() if not name.startswith("sobel")]
    plain.load_state_dict(dict(zip(plain.state_dict(), ours, strict=True)))
    x = images(224)
    with torch.no_grad():
        torch.testing.assert_close(trunk(x), plain(sobel_by_hand(x) if sobel else x), atol=1e-5, rtol=1e-5)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def released_shapes(
    convolutions: list[tuple[int, int, int]], linear: tuple[int, int], flat: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the 2018 release. Convolutions: number of the layer, filters, kernel; BatchNorm is the next."""
    expected: dict[str, tuple[int, ...]] = {
        "sobel.0.weight": (1, 3, 1, 1),
        "sobel.0.bias": (1,),
        "sobel.1.weight": (2, 1, 3, 3),
        "sobel.1.bias": (2,),
    }
    channels = 2
    for number, filters, kernel in convolutions:
        expected[f"features.{number}.weight"] = (filters, channels, kernel, kernel)
        expected[f"features.{number}.bias"] = (filters,)
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"features.{number + 1}.{name}"] = (filters,)
        expected[f"features.{number + 1}.num_batches_tracked"] = ()
        channels = filters
    for number, width in zip(linear, (flat, 4096), strict=True):
        expected[f"classifier.{number}.weight"] = (4096, width)
        expected[f"classifier.{number}.bias"] = (4096,)
    return expected


def test_alexnet_has_the_names_of_the_2018_release() -> None:
    """The classifier was Dropout, Linear, ReLU, Dropout, Linear."""
    with torch.device("meta"):
        trunk = make_trunk("alexnet")
    convolutions = [(0, 96, 11), (4, 256, 5), (8, 384, 3), (11, 384, 3), (14, 256, 3)]
    assert shapes(trunk) == released_shapes(convolutions, (1, 4), 256 * 6 * 6)


def test_vgg16_has_the_names_of_the_2018_release() -> None:
    """The classifier was Linear, ReLU, Dropout, Linear: no dropout in front, unlike AlexNet."""
    with torch.device("meta"):
        trunk = make_trunk("vgg16")
    numbers = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    filters = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = [(number, count, 3) for number, count in zip(numbers, filters, strict=True)]
    assert shapes(trunk) == released_shapes(convolutions, (0, 3), 512 * 7 * 7)


def test_vgg16_has_the_convolutions_of_torchvision() -> None:
    with torch.device("meta"):
        ours, oracle = make_trunk("vgg16", sobel=False).features, torchvision.models.vgg16_bn().features
    assert shapes(ours) == shapes(oracle)
    assert sum(weights.numel() for weights in ours.parameters()) == 14_723_136
    assert [type(layer) for layer in ours] == [type(layer) for layer in oracle]


def test_vgg16_gives_the_maps_of_torchvision_with_the_same_weights() -> None:
    trunk = trunk_of("vgg16", False)
    with torch.device("meta"):
        oracle = torchvision.models.vgg16_bn().features.eval()
    oracle.load_state_dict(trunk.features.state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(trunk.features(images(32)), oracle(images(32)))
        # Stage conv13 is the last ReLU, before the last pool.
        torch.testing.assert_close(trunk.stage(images(32), "conv13"), oracle[:-1](images(32)))


@pytest.mark.parametrize("arch", ["alexnet", "vgg16"])
def test_weights_start_as_in_the_2018_release(arch: str) -> None:
    """Normal: deviation sqrt(2 / (kernel² · filters)) for convolutions, 0.01 for the linear layers; biases zero."""
    trunk = make_trunk(arch, image_size=size_of(arch))
    for layer in (*trunk.features, *trunk.classifier):
        if isinstance(layer, nn.Conv2d):
            deviation = (2 / (layer.kernel_size[0] ** 2 * layer.out_channels)) ** 0.5
        elif isinstance(layer, nn.Linear):
            deviation = 0.01
        else:
            continue
        tolerance = 5 / layer.weight.numel() ** 0.5
        assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=tolerance)
        assert not layer.bias.detach().any()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet_equals_torchvision_without_its_classifier(arch: str) -> None:
    trunk = trunk_of(arch, False)
    oracle = getattr(torchvision.models, arch)().eval()
    oracle.fc = nn.Identity()
    ours = {name.removeprefix("backbone."): value for name, value in trunk.state_dict().items()}
    oracle.load_state_dict(ours, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(trunk(images(64)), oracle(images(64)))


def test_small_resnet_has_the_stem_of_small_images() -> None:
    """3×3, stride 1, no pooling: the first stages keep all pixels, the last is 1/8."""
    trunk = trunk_of("resnet18-small")
    sides = [trunk.stage(images(32), name).shape[2] for name in trunk.stages]
    assert sides == [32, 32, 16, 8, 4, 1]


def test_dropout_is_what_is_asked_for() -> None:
    with torch.device("meta"):
        rates = {
            arch: [layer.p for layer in make_trunk(arch, dropout=0.3).modules() if isinstance(layer, nn.Dropout)]
            for arch in ("alexnet", "vgg16")
        }
    assert rates == {"alexnet": [0.3, 0.3], "vgg16": [0.3]}


def test_normalise_is_that_of_imagenet() -> None:
    x = torch.rand(2, 3, 4, 4)
    expected = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(x)
    torch.testing.assert_close(normalise(x), expected)
    assert normalise(x.to(torch.bfloat16)).dtype == torch.bfloat16
    for count, height, width in ((0, 5, 4), (1, 5, 4), (70, 90, 81), (3, 700, 650)):
        pixels = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
        for given in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(normalise(given), normalise(pixels.float() / 255), rtol=0, atol=1e-5)
            assert normalise(given).is_contiguous(memory_format=torch.channels_last)
