"""Pictures of filters: what they excite, each step against plain arithmetic, and the folder they are saved in."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_helper import make_model
from PIL import Image
from scipy import ndimage
from torch import nn

from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.files import MARK
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Interruption, Work
from deepcluster.models.archs import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, make_trunk
from deepcluster.models.convnets import ConvNet
from deepcluster.models.trunk import Trunk
from deepcluster.run.model import Model
from deepcluster.visualization.ascent import (
    Ascent,
    Responses,
    Settings,
    default_batch_size,
    filter_pictures,
    jitter,
    jittered,
    mean_scores,
    own_means,
    settings_of,
)
from deepcluster.visualization.filters import show_filters
from deepcluster.visualization.options import FilterOptions
from deepcluster.visualization.parametrisation import Pixels, Waves, blur, generator_of, photo_colours, random_images

Array = np.ndarray[Any, Any]
CPU = torch.device("cpu")
OBJECTIVES = ("fourier", "published")
# The least that the deeper trunks take.
SIZES = {"alexnet": 64, "vgg16": 32, "vgg16-deepercluster": 32, "resnet18": 32, "resnet50": 32}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return make_model(tmp_path / "cache")


def settings(size: int = 16, **options: Any) -> Settings:
    return settings_of(FilterOptions(**options), size)


def responses(model: Model, stage: str, size: int = 16) -> Responses:
    return Responses(model.copy_of_trunk(), stage, model.machine, size=size, made_for=model.image_size)


def pictures_in(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARK)
    return {path.name: path.read_bytes() for path in files}


def facts(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "filters.json").read_text())
    return content


class StopAfter(Interruption):
    """Requests a stop after `checks` checks."""

    def __init__(self, checks: int) -> None:
        super().__init__(advice="the same command continues")
        self.left = checks

    def check(self, save: Any = None) -> None:
        self.left -= 1
        if self.left < 0:
            self.requested = "SIGINT"
        super().check(save)


# What is found


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("stage", ["conv1", "conv3", "features"])
def test_pictures_excite_their_filters_far_more_than_random_images(model: Model, stage: str, objective: str) -> None:
    filters, channels = responses(model, stage), list(range(12))
    at_random_BC = filters.means(random_images(64, 16, device=CPU))
    found, activations_B = filter_pictures(filters, settings(objective=objective, steps=60), channels)
    assert found.shape == (12, 16, 16, 3)
    mean_B, highest_B = at_random_BC.mean(dim=0)[:12].numpy(), at_random_BC.amax(dim=0)[:12].numpy()
    assert (activations_B > highest_B).all()
    assert np.median(activations_B / mean_B) > 2
    if objective == "fourier":
        # What is written is what was measured: the pixels themselves, to the rounding to bytes.
        pixels_BCHW = torch.from_numpy(found).permute(0, 3, 1, 2) / 255
        mean_3, deviation_3 = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        seen_BC = filters.means((pixels_BCHW - mean_3) / deviation_3)
        np.testing.assert_allclose(seen_BC[range(12), channels].numpy(), activations_B, rtol=0.02, atol=0.005)


def test_the_published_objective_raises_one_filter_above_the_others(model: Model) -> None:
    filters = responses(model, "conv5")
    ascent = Ascent(filters, settings(objective="published", steps=60), [3, 200])
    before_BC = filters.means(ascent.form.inputs(ascent.parameters)).softmax(dim=1)
    assert len(list(ascent.steps())) == 60
    after_BC = filters.means(ascent.form.inputs(ascent.parameters)).softmax(dim=1)
    assert (after_BC[[0, 1], [3, 200]] > 3 * before_BC[[0, 1], [3, 200]]).all()
    assert after_BC.argmax(dim=1).tolist() == [3, 200]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_picture_does_not_depend_on_the_others_of_its_batch(model: Model, objective: str) -> None:
    filters, wanted = responses(model, "conv4"), settings(objective=objective, steps=6)
    together, activations_B = filter_pictures(filters, wanted, [7, 0, 300, 21])
    for place, channel in enumerate([7, 0, 300, 21]):
        alone, activation_1 = filter_pictures(filters, wanted, [channel])
        np.testing.assert_allclose(alone[0].astype(int), together[place].astype(int), atol=1)
        np.testing.assert_allclose(activation_1[0], activations_B[place], rtol=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_starts_depend_on_seed_stage_and_channel(model: Model, objective: str) -> None:
    def start(stage: str, channel: int, seed: int) -> torch.Tensor:
        wanted = settings(objective=objective, seed=seed)
        return Ascent(responses(model, stage), wanted, [channel]).parameters.detach()

    first = start("conv1", 0, 31)
    assert torch.equal(first, start("conv1", 0, 31))
    for other in (start("conv1", 1, 31), start("conv2", 0, 31), start("conv1", 0, 32)):
        assert not torch.equal(first, other)


def test_trunks_with_sobel_get_pictures_without_colours(tmp_path: Path) -> None:
    trunk = make_trunk("alexnet-small", image_size=16, sobel=True).eval()
    seeing_edges = make_model(tmp_path, trunk=trunk)
    for objective in OBJECTIVES:
        found, _ = filter_pictures(responses(seeing_edges, "conv2"), settings(objective=objective, steps=3), [0, 1])
        assert (found == found[..., :1]).all()


@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize(("arch", "size"), [(arch, SIZES.get(arch, 16)) for arch in ARCHITECTURES])
def test_every_stage_of_every_trunk(arch: str, size: int, sobel: bool, tmp_path: Path) -> None:
    trunk = make_trunk(arch, image_size=size, sobel=sobel).eval()
    stages = trunk.stages
    if sobel and arch not in ("alexnet", "resnet18"):  # slow, and alike
        stages = (stages[0], stages[-1])
    one = make_model(tmp_path, trunk=trunk, image_size=size)
    for stage in stages:
        filters = Responses(trunk, stage, one.machine, size=size, made_for=size)
        # Only where fully connected layers end the trunk is there no ReLU.
        ends_open = stage == "features" and isinstance(trunk, ConvNet) and trunk.classifier is not None
        assert (filters.last_relu is None) == ends_open
        for objective in OBJECTIVES:
            found, activations_B = filter_pictures(filters, settings(size, objective=objective, steps=2), [0, 5])
            assert found.shape == (2, size, size, 3)
            assert np.isfinite(activations_B).all()
            assert found.std(axis=(1, 2, 3)).min() > 0


# The steps


def softmax_step(trunk: ConvNet, image_CHW: Array, channel: int, lr: float, decay: float) -> Array:
    """A step in float64, its gradient written out: up log softmax(means)[channel] - decay |x|²."""
    image = torch.from_numpy(image_CHW)[None].requires_grad_()
    before_1CHW = trunk.features[: trunk._stage_ends["conv2"] - 1](image)
    # Before the ReLU while that lets nothing through.
    shut_ = float(before_1CHW[0, channel].detach().max()) <= 0
    means_C = (before_1CHW if shut_ else before_1CHW.clamp(min=0)).mean(dim=(2, 3))[0]
    shares_C = np.exp(means_C.detach().numpy())
    weights_C = -shares_C / shares_C.sum()
    weights_C[channel] += 1
    gradient = torch.autograd.grad(means_C, image, torch.from_numpy(weights_C))[0][0].numpy() - 2 * decay * image_CHW
    moved: Array = image_CHW + lr * gradient / np.sqrt((gradient**2).sum())
    return moved


def test_a_published_step_equals_plain_arithmetic(model: Model) -> None:
    # Weight decay and blur are large enough to be noticed.
    wanted = settings(objective="published", weight_decay=0.02, sigma=0.8, blur_every=3, lr=2.0)
    filters, channels = responses(model, "conv2"), [4, 90, 11]
    ascent = Ascent(filters, wanted, channels)
    trunk = model.copy_of_trunk().double()
    assert isinstance(trunk, ConvNet)
    expected = ascent.parameters.detach().double().numpy().copy()
    for step, _ in zip(range(5), ascent.steps(), strict=False):
        expected = np.stack(
            [softmax_step(trunk, one, channel, 2.0, 0.02) for one, channel in zip(expected, channels, strict=True)]
        )
        if step in (0, 3):
            expected = ndimage.gaussian_filter(expected, sigma=(0, 0, 0.8, 0.8))
        np.testing.assert_allclose(ascent.parameters.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0, 4.0])
def test_blur_is_scipys(sigma: float) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 9, 12))
    expected = ndimage.gaussian_filter(images, sigma=(0, 0, sigma, sigma))
    np.testing.assert_allclose(blur(torch.from_numpy(images), sigma).numpy(), expected, atol=1e-12)


def test_published_pictures_start_as_pixels_around_grey() -> None:
    start = Pixels(64, grey=False).start([generator_of(1), generator_of(2)]).double().numpy()
    pixels = 255 * (start * np.array(IMAGENET_STD)[:, None, None] + np.array(IMAGENET_MEAN)[:, None, None])
    assert np.allclose(pixels.mean(axis=(2, 3)), 128, atol=2)
    assert np.allclose(pixels.std(axis=(2, 3)), 20, atol=1)


@pytest.mark.parametrize("size", [16, 31, 48])
def test_waves_fall_with_their_frequency_and_are_in_bounds(size: int) -> None:
    form = Waves(size, grey=True, device=CPU)
    parameters = form.start([generator_of(number) for number in range(200)]).requires_grad_()
    images_BCHW = form.images(parameters)
    assert images_BCHW.shape == (200, 3, size, size)
    assert images_BCHW.dtype == torch.float32
    assert (images_BCHW > 0).all()
    assert (images_BCHW < 1).all()
    waves_BHW = images_BCHW.logit()[:, 0].detach().double().numpy()
    np.testing.assert_allclose((waves_BHW**2).mean(axis=(1, 2)), 1, rtol=1e-3)
    # Amplitudes times frequency are alike from the second wave to the last but one along a line.
    amplitudes_F = np.sqrt((np.abs(np.fft.rfft2(waves_BHW)) ** 2).mean(axis=0))[0, 2 : size // 2 - 1]
    even_F = amplitudes_F * np.arange(2, size // 2 - 1)
    np.testing.assert_allclose(even_F, even_F.mean(), rtol=0.35)
    (gradient,) = torch.autograd.grad((images_BCHW[:, :, ::3] ** 2).sum(), parameters)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_colours_vary_together_as_those_of_photos() -> None:
    colours_33 = photo_colours().double().numpy()
    covariance_33 = colours_33 @ colours_33.T
    photos = Path(__file__).parents[2] / "shared" / "data" / "imagenette-mini"
    if not photos.is_dir():
        pytest.skip("imagenette-mini is not here")
    paths = sorted((photos / "train").glob("*/*"))[1::100]
    pixels = np.concatenate([np.asarray(Image.open(p).convert("RGB").resize((32, 32))).reshape(-1, 3) / 255 for p in paths])
    measured_33 = np.cov(pixels.T)
    correlation = [one / np.sqrt(np.outer(np.diag(one), np.diag(one))) for one in (covariance_33, measured_33)]
    np.testing.assert_allclose(correlation[0], correlation[1], atol=0.06)
    np.testing.assert_allclose(covariance_33 / np.trace(covariance_33), measured_33 / np.trace(measured_33), atol=0.03)


def test_jitter_moves_turns_and_zooms() -> None:
    images_BCHW = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(jittered(images_BCHW, np.array([0, 0, 0, 1.0])), images_BCHW, atol=1e-5, rtol=0)
    moved_BCHW = images_BCHW.roll((2, -1), dims=(2, 3))
    torch.testing.assert_close(jittered(images_BCHW, np.array([2.2, -0.9, 0, 1.0])), moved_BCHW, atol=1e-5, rtol=0)
    turned_BCHW = jittered(images_BCHW, np.array([0, 0, np.pi / 2, 1.0]))
    torch.testing.assert_close(turned_BCHW.rot90(-1, (2, 3)), images_BCHW, atol=1e-4, rtol=0)
    draws_S4 = jitter(settings(96, steps=500), "conv1")
    assert np.abs(draws_S4[:, :2]).max() <= 6
    assert np.abs(draws_S4[:, 2]).max() <= 0.1
    assert np.abs(draws_S4[:, 3] - 1).max() <= 0.1
    np.testing.assert_array_equal(draws_S4[:9], jitter(settings(96, steps=9), "conv1"))


# Filters that are shut


def shut(trunk: Trunk, channel: int, bias: float, scale: float) -> None:
    """Scale and lower the input of the ReLU of a filter of conv2."""
    assert isinstance(trunk, ConvNet)
    norm = [layer for layer in trunk.features if isinstance(layer, nn.BatchNorm2d)][1]
    with torch.no_grad():
        norm.weight[channel], norm.bias[channel] = scale, bias


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_shut_filter_is_opened(model: Model, objective: str) -> None:
    trunk = model.copy_of_trunk()
    filters = Responses(trunk, "conv2", model.machine, size=16, made_for=16)
    maps = filters(random_images(64, 16, device=CPU))
    assert maps.before_BCHW is not None
    # Lower than random images ever bring it: the gradient through its ReLU is zero at the start.
    shut(trunk, 5, -1.05 * float(maps.before_BCHW[:, 5].max()), 1.0)
    ascent = Ascent(filters, settings(objective=objective, steps=80), [5, 6])
    start = filters(ascent.form.inputs(ascent.parameters))
    assert start.before_BCHW is not None
    assert float(start.after_BCHW[0, 5].detach().max()) == 0
    # The shut one is scored before its ReLU, the open one after it.
    before_BC, after_BC = (one.detach().mean(dim=(2, 3)) for one in (start.before_BCHW, start.after_BCHW))
    torch.testing.assert_close(mean_scores(start, [5, 6]).detach(), torch.stack([before_BC[0], after_BC[1]]))
    torch.testing.assert_close(own_means(start, [5, 6]).detach(), torch.stack([before_BC[0, 5], after_BC[1, 6]]))
    assert len(list(ascent.steps())) == 80
    assert float(ascent.activations()[0]) > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_dead_filter_is_reported_and_the_others_are_not_harmed(
    tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_model(tmp_path, reporter=Reporter(quiet=True))
    shut(one.trunk, 1, -1.0, 0.0)  # always outputs zero
    shut(one.trunk, 2, 1.0, 0.0)  # outputs a constant, whatever it sees
    options = FilterOptions(stage="conv2", channels="0-3", objective=objective, steps=20)
    (grid,) = show_filters(one, options, tmp_path / "out")
    channels = facts(grid.parent)["channels"]
    assert [about["dead"] for about in channels.values()] == [False, True, True, False]
    assert channels["1"] == {"activation": 0.0, "random_images": 0.0, "dead": True}
    assert "conv2: no picture excites 2 filters (1, 2)" in capsys.readouterr().err
    assert all(np.isfinite(about["activation"]) for about in channels.values())


def test_the_trunk_is_left_as_it_was(model: Model, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    show_filters(model, FilterOptions(stage="conv3", channels="0", steps=2), tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.trunk.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.trunk.parameters())
    assert all(layer.inplace for layer in model.trunk.modules() if isinstance(layer, nn.ReLU))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.trunk.modules())


# The folder


def test_a_folder_for_each_stage(model: Model, tmp_path: Path) -> None:
    grids = show_filters(model, FilterOptions(stage="all", channels="0-2,95", steps=1), tmp_path / "out")
    assert grids == [tmp_path / "out" / stage / "grid.png" for stage in model.trunk.stages]
    for stage, grid in zip(model.trunk.stages, grids, strict=True):
        names = {"0000.png", "0001.png", "0002.png", "0095.png", "filters.json", "grid.png"}
        assert set(pictures_in(grid.parent)) == names
        about = facts(grid.parent)
        assert about["stage"] == stage
        assert (about["objective"], about["steps"], about["lr"], about["image_size"]) == ("fourier", 1, 0.05, 16)
        assert (about["model"], about["weights"]) == (model.name, model.weights)
        assert list(about["channels"]) == ["0", "1", "2", "95"]
        # Pictures of 16 px are enlarged to 96 in the grid, two per row.
        with Image.open(grid) as opened:
            assert opened.width == 2 + 2 * 98


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("checks", [0, 8, 14, 15, 29])
def test_a_stop_keeps_finished_stages_and_nothing_else(tmp_path: Path, objective: str, checks: int) -> None:
    # Two stages, 3 batches each, 5 steps each.
    options = FilterOptions(stage="conv2,conv3", channels="0-4", objective=objective, steps=5, batch_size=2)
    stopped, out = make_model(tmp_path / "cache", interruption=StopAfter(checks)), tmp_path / "stopped"
    with pytest.raises(Interrupted, match="the same command continues"):
        show_filters(stopped, options, out)
    kept = pictures_in(out) if out.exists() else {}
    grids = show_filters(make_model(tmp_path / "cache"), options, tmp_path / "whole")
    assert kept == (pictures_in(grids[0].parent) if checks >= 15 else {})
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    show_filters(make_model(tmp_path / "cache"), options, out)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    for stage in ("conv2", "conv3"):
        assert pictures_in(out / stage) == pictures_in(tmp_path / "whole" / stage)
    # With other settings, a stop leaves the pictures that were there.
    before = pictures_in(out)
    with pytest.raises(Interrupted):
        show_filters(make_model(tmp_path, interruption=StopAfter(min(checks, 14))), replace(options, seed=1), out)
    assert pictures_in(out) == before


def test_a_finished_stage_is_not_computed_again(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = FilterOptions(stage="conv3", channels="0-2", steps=1)
    talking = replace(model, work=Work(Reporter()))
    folder = show_filters(talking, options, tmp_path)[0].parent
    first, there = pictures_in(folder), "the pictures of this model and these settings are already there"
    assert there not in capsys.readouterr().out
    show_filters(talking, options, tmp_path)
    assert there in capsys.readouterr().out
    assert pictures_in(folder) == first
    for missing in ("0001.png", "grid.png"):
        (folder / missing).unlink()
        show_filters(talking, options, tmp_path)
        assert there not in capsys.readouterr().out
        assert pictures_in(folder) == first
    # Other filters or settings replace all pictures; other files stay.
    (folder / "mine.png").write_bytes(b"")
    show_filters(talking, replace(options, channels="1,7"), tmp_path)
    assert set(pictures_in(folder)) == {"0001.png", "0007.png", "filters.json", "grid.png", "mine.png"}
    assert pictures_in(folder)["0001.png"] == first["0001.png"]
    show_filters(talking, replace(options, channels="1", seed=1), tmp_path)
    assert set(pictures_in(folder)) == {"0001.png", "filters.json", "grid.png", "mine.png"}
    assert pictures_in(folder)["0001.png"] != first["0001.png"]


def test_pictures_of_version_0_1_0_are_replaced(model: Model, tmp_path: Path) -> None:
    (tmp_path / "conv3").mkdir()
    old = {"stage": "conv3", "objective": "fourier", "key": "a1", "channels": {"5": {"dead": False}}}
    (tmp_path / "conv3" / "filters.json").write_text(json.dumps(old))
    (tmp_path / "conv3" / "0005.png").write_bytes(b"old")
    (grid,) = show_filters(model, FilterOptions(stage="conv3", channels="0", steps=1), tmp_path)
    assert set(pictures_in(grid.parent)) == {"0000.png", "filters.json", "grid.png"}


def test_files_of_others_are_not_overwritten(model: Model, tmp_path: Path) -> None:
    options = FilterOptions(stage="conv3", channels="0", steps=1)
    for name in ("grid.png", "filters.json", "0000.png"):
        folder = tmp_path / f"with {name}" / "conv3"
        folder.mkdir(parents=True)
        (folder / name).write_text("[]")
        with pytest.raises(InputError, match=f"holds a {name} of something else"):
            show_filters(model, options, folder.parent)
        assert pictures_in(folder) == {name: b"[]"}
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(InputError, match="is a file"):
            show_filters(model, options, place)


# What can't be done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": "0-96", "stage": "conv1"}, "there is no channel 96; conv1 has 96 channels"),
        ({"stage": "conv9"}, "no stage 'conv9'"),
        ({"sigma": 1.0}, "--sigma: --objective fourier has no such setting"),
        ({"weight_decay": 0.0}, "--weight-decay: --objective fourier"),
        ({"stage": "conv5", "image_size": 3}, "too small"),
        ({"objective": "dream"}, "unknown objective"),
    ],
)
def test_wrong_options(model: Model, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        show_filters(model, FilterOptions(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fully_connected_layers_fix_the_size(tmp_path: Path) -> None:
    one = make_model(tmp_path / "cache", arch="alexnet", image_size=64)
    with pytest.raises(InputError, match=r"--image-size 96: .*no features of images of 96 px.*made for 64 px"):
        show_filters(one, FilterOptions(stage="all", image_size=96, steps=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (grid,) = show_filters(one, FilterOptions(stage="conv2", channels="0", image_size=96, steps=1), tmp_path / "out")
    with Image.open(grid.parent / "0000.png") as picture:
        assert picture.size == (96, 96)


def test_default_settings() -> None:
    assert settings(objective="published").as_dict() == {
        "objective": "published",
        "steps": 1000,
        "lr": 3.0,
        "weight_decay": 1e-5,
        "sigma": 0.3,
        "blur_every": 5,
        "seed": 31,
        "image_size": 16,
    }
    assert settings(image_size=40, lr=0.1).as_dict() == {
        "objective": "fourier",
        "steps": 200,
        "lr": 0.1,
        "seed": 31,
        "image_size": 40,
    }


def test_batches_are_bounded_by_memory(tmp_path: Path) -> None:
    small = responses(make_model(tmp_path), "conv1")
    assert small.n_channels == 96
    # A convolution, BatchNorm and ReLU of 96 maps of 8 × 8 float32.
    assert small.bytes_per_image == 3 * 96 * 8 * 8 * 4
    assert default_batch_size(small) == 256
    small.bytes_per_image = 6_000_000
    assert default_batch_size(small) == (128 << 20) // 12_000_000
    small.bytes_per_image = 10**10
    assert default_batch_size(small) == 2
