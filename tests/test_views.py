"""What the network sees: crops and pixels as torchvision's, colours as a plain per-image reference, draws by position."""

from collections.abc import Callable
from functools import partial
from math import cos, pi, sin

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp, kstest
from spoiled_images import picture
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as torchvision

from deepcluster.data import views as views_module
from deepcluster.data.multi_crop import MultiCropView, crop_draws
from deepcluster.data.resample import REACH, Ragged, blur, resample
from deepcluster.data.views import (
    CROP_ATTEMPTS,
    DRAWS,
    LONGEST,
    LUMA,
    ClusterView,
    Colours,
    ShiftedView,
    TenCrops,
    TrainingView,
    draws,
    rotate_quarters,
)

FLIP = 2 * CROP_ATTEMPTS + 2
COLOURS = FLIP + 1
SIZES = [(40, 90), (90, 40), (64, 64), (33, 31), (300, 451), (1, 1), (2, 30), (224, 224)]


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(picture(seed, (width, height)))


def noise(height: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8))


def farthest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


# Draws


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (31, 1), (2**64 - 1, 500)])
def test_draws_are_those_of_their_position_however_they_are_split(seed: int, epoch: int) -> None:
    whole = draws(seed, epoch, 0, 100)
    assert whole.shape[0] == 100
    assert whole.shape[1] >= DRAWS
    np.testing.assert_array_equal(whole[40:60], draws(seed, epoch, 40, 20))
    for size in (1, 7, 32, 100):
        parts = [draws(seed, epoch, start, min(size, 100 - start)) for start in range(0, 100, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert draws(seed, epoch, 5, 0).shape == (0, whole.shape[1])


def test_draws_differ_between_seeds_epochs_and_positions() -> None:
    some = [draws(seed, epoch, 0, 50) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 2)]]
    numbers = np.concatenate(some).ravel()
    assert len(np.unique(numbers)) == len(numbers)


def test_draws_are_uniform_and_independent() -> None:
    numbers = draws(3, 7, 0, 4000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert kstest(numbers.ravel(), "uniform").pvalue > 0.001
    columns = [kstest(column, "uniform").pvalue for column in numbers.T]
    assert min(columns) > 0.001 / len(columns)
    # Correlations of 4,000 independent pairs deviate from 0 by 1/sqrt(4000) = 0.016.
    between = np.corrcoef(np.hstack([numbers[:-1], numbers[1:]]).T) - np.eye(2 * numbers.shape[1])
    assert np.abs(between).max() < 5.5 * 0.016


# The cluster view


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_cluster_view_is_torchvisions_resize_and_centre_crop(height: int, width: int, size: int) -> None:
    for original in (image(height, width), noise(height, width)):
        resized = torchvision.resize(original.permute(2, 0, 1), [round(size * 256 / 224)], antialias=True)
        want = torchvision.center_crop(resized, [size, size])
        view = ClusterView(size)([original])[0]
        assert view.dtype == torch.uint8
        assert view.shape == (3, size, size)
        assert farthest(view, want) <= 1


def test_the_cluster_view_at_224_scales_the_shorter_side_to_256() -> None:
    assert ClusterView(224).resized == 256
    assert ClusterView(32).resized == 37
    exact = noise(256, 256)
    torch.testing.assert_close(ClusterView(224)([exact])[0], exact[16:240, 16:240].permute(2, 0, 1), rtol=0, atol=0)


@pytest.mark.parametrize(("short", "long"), [(49, 98), (98, 147), (103, 206), (55, 110)])
def test_the_longer_side_of_the_cluster_view_loses_no_pixel_to_rounding(short: int, long: int) -> None:
    """256 / 49 * 98 is 511.99... in floating point: a column less, and the view shifts by half a pixel."""
    original = noise(short, long)
    want = torchvision.center_crop(torchvision.resize(original.permute(2, 0, 1), [256], antialias=True), [224, 224])
    assert farthest(ClusterView(224)([original])[0], want) <= 1
    assert farthest(ClusterView(224)([original.transpose(0, 1)])[0], want.transpose(1, 2)) <= 1


def test_of_a_very_long_strip_the_middle_is_seen() -> None:
    height, width = 10, 10 * LONGEST + 400
    strip = image(height, width)
    want = torchvision.center_crop(torchvision.resize(strip.permute(2, 0, 1), [37], antialias=True), [32, 32])
    assert farthest(ClusterView(32)([strip])[0], want) <= 1
    # Scaled as a whole, it would take 390 TB.
    endless = torch.full((1, 1, 3), 200, dtype=torch.uint8).expand(1, 2_000_000_000, 3)
    for view in (ClusterView(224)([endless])[0], ClusterView(224)([endless.transpose(0, 1)])[0]):
        assert view.shape == (3, 224, 224)
        assert bool((view == 200).all())


# The training view


def boxes_of(view: TrainingView, height: int, width: int, count: int) -> NDArray[np.int64]:
    return crops(view, draws(11, 0, 0, count), height, width)


def crops(view: TrainingView, rows: NDArray[np.float64], height: int, width: int) -> NDArray[np.int64]:
    return view.windows(np.tile([height, width], (len(rows), 1)), rows).boxes_B4


@pytest.mark.parametrize(("height", "width"), [(100, 80), (20, 200), (200, 20)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.3, 0.6)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    count = 4000
    ours = boxes_of(TrainingView(32, scale=scale), height, width, count)
    torch.manual_seed(5)
    blank = torch.zeros(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])

    def measures(boxes: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        top, left, h, w = boxes.T
        return {"area": h * w / (height * width), "ratio": np.log(w / h), "y": top + h / 2, "x": left + w / 2}

    for name, values in measures(ours).items():
        assert ks_2samp(values, measures(theirs)[name]).pvalue > 0.001, name


@pytest.mark.parametrize(("height", "width"), [*SIZES, (100, 80), (20, 200), (1, 500)])
def test_crops_lie_in_the_image(height: int, width: int) -> None:
    top, left, h, w = boxes_of(TrainingView(32), height, width, 300).T
    assert min(top.min(), left.min()) >= 0
    assert min(h.min(), w.min()) >= 1
    assert (top + h).max() <= height
    assert (left + w).max() <= width


@pytest.mark.parametrize("edge", [0.0, np.nextafter(1.0, 0.0)])
def test_crops_of_the_least_and_the_greatest_draws_lie_in_the_image(edge: float) -> None:
    for height, width in SIZES:
        for attempt in np.linspace(0, 1, 7, endpoint=False):
            row = np.full(DRAWS, attempt)
            row[2 * CROP_ATTEMPTS :] = edge
            top, left, h, w = crops(TrainingView(32), row[None], height, width)[0]
            assert 0 <= top <= height - h
            assert 0 <= left <= width - w


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize(("height", "width"), [(100, 80), (20, 200), (33, 31), (1, 1), (300, 451)])
def test_the_pixels_of_the_training_view_are_torchvisions(height: int, width: int, size: int) -> None:
    original, view = noise(height, width), TrainingView(size, flip=False)
    for row in draws(1, 2, 0, 20):
        top, left, h, w = crops(view, row[None], height, width)[0].tolist()
        want = torchvision.resized_crop(
            original.permute(2, 0, 1), top, left, h, w, [size, size], InterpolationMode.BILINEAR, antialias=True
        )
        assert view([original], row[None]).dtype == torch.uint8
        torch.testing.assert_close(view([original], row[None])[0], want, rtol=0, atol=0)


def test_half_of_the_training_views_are_flipped() -> None:
    original, rows = noise(50, 60), draws(4, 0, 0, 1000)
    flipped = rows[:, FLIP] < 0.5
    assert 450 < flipped.sum() < 550
    for row, turned in zip(rows[:50], flipped, strict=False):
        plain = TrainingView(32, flip=False)([original], row[None])[0]
        torch.testing.assert_close(
            TrainingView(32)([original], row[None])[0], plain.flip(2) if turned else plain, rtol=0, atol=0
        )


def test_views_leave_the_image_as_it_is() -> None:
    original = noise(32, 32)
    before = original.clone()
    ClusterView(28)([original])[0]
    view = TrainingView(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)([original], draws(0, 0, 0, 1))[0]
    torch.testing.assert_close(view, original.permute(2, 0, 1), rtol=0, atol=0)
    torch.testing.assert_close(original, before, rtol=0, atol=0)


# Colours


def batch(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    images = torch.stack([image(24, 20, seed) for seed in range(count)]).permute(0, 3, 1, 2)
    return images.to(dtype) / 255


def reference(pixels_CHW: NDArray[np.float64], row: NDArray[np.float64], jitter: float, grey: float) -> Tensor:
    """One step after the other, one pixel after the other, on one image."""
    strength_of = [1 + 0.8 * jitter * (2 * row[COLOURS + number] - 1) for number in range(3)]
    brightness, contrast, saturation = (max(0, strength) for strength in strength_of)
    angle = 2 * pi * 0.2 * jitter * (2 * row[COLOURS + 3] - 1)
    if row[COLOURS + 4] < grey:
        saturation = 0
    red, green, blue = LUMA
    bright = [pixel * brightness for pixel in pixels_CHW.reshape(3, -1).T]
    mean = sum(red * r + green * g + blue * b for r, g, b in bright) / len(bright)
    result = []
    for pixel in bright:
        r, g, b = mean + contrast * (pixel - mean)
        y = red * r + green * g + blue * b
        i, q = 0.596 * r - 0.274 * g - 0.322 * b, 0.211 * r - 0.523 * g + 0.312 * b
        i, q = saturation * (cos(angle) * i - sin(angle) * q), saturation * (sin(angle) * i + cos(angle) * q)
        yiq = [[red, green, blue], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
        result.append(np.linalg.solve(np.array(yiq), np.array([y, i, q])))
    return torch.from_numpy(np.clip(np.array(result).T.reshape(pixels_CHW.shape), 0, 1))


@pytest.mark.parametrize(("jitter", "grey"), [(0.5, 0.0), (0.5, 0.2), (1.0, 0.2), (1.5, 0.5), (0.0, 0.5)])
def test_colours_are_those_of_the_reference(jitter: float, grey: float) -> None:
    images, rows = batch(8), draws(2, 1, 0, 8)
    got = Colours(jitter, grey)(images, rows)
    assert got.dtype == torch.float32
    for number in range(8):
        want = reference(images[number].double().numpy(), rows[number], jitter, grey)
        assert farthest(got[number], want) < 2e-6


@pytest.mark.parametrize("which", ["brightness", "contrast", "saturation", "hue"])
def test_each_of_the_four_changes_is_the_one_that_it_is_called(which: str) -> None:
    images = batch(3, torch.float64) * 0.4 + 0.3
    rows = np.full((3, DRAWS), 0.5)  # no change
    rows[:, COLOURS + ["brightness", "contrast", "saturation", "hue"].index(which)] = 0.75
    got = Colours(jitter=0.5)(images, rows)

    def luma(pixels_BCHW: Tensor) -> Tensor:
        return torch.einsum("bchw,c->bhw", pixels_BCHW, torch.tensor(LUMA, dtype=torch.float64))[:, None]

    mean = luma(images).mean(dim=(1, 2, 3), keepdim=True)
    if which == "brightness":
        torch.testing.assert_close(got, 1.2 * images)
    elif which == "contrast":
        torch.testing.assert_close(got, mean + 1.2 * (images - mean))
    elif which == "saturation":
        torch.testing.assert_close(got, luma(images) + 1.2 * (images - luma(images)))
    else:
        torch.testing.assert_close(luma(got), luma(images))
        assert farthest(got, images) > 0.02


def test_no_change_is_asked_for_and_none_is_made() -> None:
    images = batch(4)
    assert Colours()(images, draws(0, 0, 0, 4)) is images
    torch.testing.assert_close(Colours(jitter=1e-9)(images, draws(0, 0, 0, 4)), images, rtol=0, atol=2e-6)


@pytest.mark.parametrize("jitter", [0.0, 0.5])
def test_grey_images_have_three_equal_channels(jitter: float) -> None:
    got = Colours(jitter, grey=1.0)(batch(6), draws(0, 0, 0, 6))
    assert (got.amax(dim=1) - got.amin(dim=1)).max() < 2e-6
    assert got.std() > 0.1


def test_the_share_of_grey_images_is_the_one_asked_for() -> None:
    images = batch(1)[:, :, :4, :4].expand(1000, 3, 4, 4)
    got = Colours(grey=0.2)(images, draws(0, 3, 0, 1000))
    lost = (got.amax(dim=1) - got.amin(dim=1)).amax(dim=(1, 2)) < 1e-5
    assert 160 < int(lost.sum()) < 240
    assert farthest(got[~lost], images[~lost]) < 2e-6


@pytest.mark.parametrize("jitter", [0.3, 1.0, 2.0])
def test_colours_stay_between_0_and_1(jitter: float) -> None:
    images = torch.cat([batch(30), torch.zeros(1, 3, 24, 20), torch.ones(1, 3, 24, 20)])
    got = Colours(jitter, grey=0.2)(images, draws(0, 0, 0, 32))
    assert bool(torch.isfinite(got).all())
    assert got.min() >= 0
    assert got.max() <= 1
    assert farthest(got, images) > 0.1


def test_the_colours_of_an_image_do_not_depend_on_its_batch() -> None:
    images, rows, colours = batch(6), draws(0, 0, 0, 6), Colours(0.8, 0.3)
    before = images.clone()
    whole = colours(images, rows)
    for number in range(6):
        alone = colours(images[number : number + 1], rows[number : number + 1])
        torch.testing.assert_close(alone[0], whole[number], rtol=0, atol=1e-6)
    torch.testing.assert_close(images, before, rtol=0, atol=0)
    kept = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(colours(kept, rows), whole, rtol=0, atol=1e-6)
    assert colours(images[:0], rows[:0]).shape == (0, 3, 24, 20)


def test_the_share_of_images_that_is_jittered_is_the_one_asked_for() -> None:
    images, rows = batch(1)[:, :, :4, :4].expand(1000, 3, 4, 4), draws(0, 3, 0, 1000)
    some, every = Colours(0.5, grey=0.2, share=0.8)(images, rows), Colours(0.5, grey=0.2)(images, rows)
    chosen = torch.from_numpy(rows[:, COLOURS + 5] < 0.8)
    assert 760 < int(chosen.sum()) < 840
    torch.testing.assert_close(some[chosen], every[chosen], rtol=0, atol=1e-6)
    # The others may lose their colour, and change in nothing else.
    torch.testing.assert_close(some[~chosen], Colours(grey=0.2)(images, rows)[~chosen], rtol=0, atol=2e-6)


# Blur


def gaussian(pixels_CHW: Tensor, sigma: float) -> Tensor:
    """SciPy's, ending after 8 pixels, with the edge's pixels beyond it."""
    planes = [gaussian_filter(plane.double().numpy(), sigma, mode="nearest", radius=REACH) for plane in pixels_CHW]
    return torch.from_numpy(np.array(planes))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (32, 32), (40, 71), (8, 8), (33, 1), (1, 9), (224, 30)])
def test_blur_is_scipys(height: int, width: int, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, height, width, generator=generator).contiguous(memory_format=layout)
    sigmas = torch.tensor([0.1, 0.5, 1.3, 2.0], dtype=torch.float64)
    before = images.clone()
    got = blur(images, sigmas)
    torch.testing.assert_close(images, before, rtol=0, atol=0)
    for number, sigma in enumerate(sigmas.tolist()):
        assert farthest(got[number], gaussian(images[number], sigma)) < 1e-6
        assert farthest(blur(images[number : number + 1], sigmas[number : number + 1])[0], got[number]) < 1e-6
    exact = blur(images.double(), sigmas)
    assert exact.dtype == torch.float64
    assert farthest(exact[3], gaussian(images[3], 2.0)) < 1e-13


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_torchvisions_away_from_the_edges(sigma: float) -> None:
    images = torch.rand(2, 3, 50, 40, generator=torch.Generator().manual_seed(1))
    want = torchvision.gaussian_blur(images, [2 * REACH + 1, 2 * REACH + 1], [sigma, sigma])
    got = blur(images, torch.full((2,), sigma))
    assert farthest(got[..., REACH:-REACH, REACH:-REACH], want[..., REACH:-REACH, REACH:-REACH]) < 1e-6


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_the_share_of_images_that_is_blurred_and_their_widths_are_as_asked_for(kind: torch.dtype) -> None:
    images = (batch(1)[:, :, :10, :10] * (255 if kind == torch.uint8 else 1)).to(kind).expand(1000, 3, 10, 10)
    rows = draws(1, 3, 0, 1000)
    before = images.clone()
    got, scaled = Colours(blur=0.5)(images, rows), images.float() / (255 if kind == torch.uint8 else 1)
    torch.testing.assert_close(images, before, rtol=0, atol=0)
    changed = (got != scaled).flatten(1).any(1)
    numbers = rows[:, COLOURS + 6]
    assert 450 < (numbers < 0.5).sum() < 550
    assert not bool(changed[numbers >= 0.5].any())
    for number in range(30):
        want = gaussian(scaled[number], 0.1 + 1.9 * 2 * numbers[number]) if numbers[number] < 0.5 else scaled[number]
        assert farthest(got[number], want) < 1e-6
    every = Colours(blur=1.0)(images[:20], rows[:20])
    for number in range(20):
        assert farthest(every[number], gaussian(scaled[number], 0.1 + 1.9 * numbers[number])) < 1e-6


def test_blur_comes_after_the_colours() -> None:
    images, rows = batch(6), draws(0, 4, 0, 6)
    coloured = Colours(0.5, 0.2, share=0.8)(images, rows)
    got, only = Colours(0.5, 0.2, share=0.8, blur=0.5)(images, rows), Colours(blur=0.5)(coloured, rows)
    torch.testing.assert_close(got, only, rtol=0, atol=1e-6)
    assert farthest(got, coloured) > 0.01
    assert got.min() >= 0
    assert got.max() <= 1 + 1e-6
    assert Colours(0.5, blur=0.5)(images[:0], rows[:0]).shape == (0, 3, 24, 20)


# Turns


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_quarter_turns_are_numpys(layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 5, 5), generator=generator, dtype=torch.uint8).contiguous(memory_format=layout)
    quarters = torch.tensor([0, 1, 2, 3, 3, 2, 1, 1, 0])
    before = images.clone()
    got = rotate_quarters(images, quarters)
    for image_CHW, turned_CHW, number in zip(images.numpy(), got.numpy(), quarters.tolist(), strict=True):
        np.testing.assert_array_equal(turned_CHW, np.rot90(image_CHW, number, axes=(1, 2)))
    assert got.is_contiguous(memory_format=layout)
    torch.testing.assert_close(images, before, rtol=0, atol=0)
    assert rotate_quarters(images[:0], quarters[:0]).shape == (0, 3, 5, 5)


# The views of the linear probe


def shifted_by_torchvision(original: Tensor, size: int, row: NDArray[np.float64]) -> Tensor:
    square = round(size * 256 / 224)
    whole = torchvision.resize(original.permute(2, 0, 1), [square], antialias=True)
    top, left = (int(place * (square - size + 1)) for place in row[2 * CROP_ATTEMPTS :][:2])
    crop = torchvision.crop(torchvision.center_crop(whole, [square, square]), top, left, size, size)
    return torchvision.horizontal_flip(crop) if row[FLIP] < 0.5 else crop


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_shifted_view_is_torchvisions_steps(height: int, width: int, size: int) -> None:
    rows, originals = draws(9, 1, 0, 6), [noise(height, width), image(height, width)] * 3
    got = ShiftedView(size)(originals, rows)
    assert got.dtype == torch.uint8
    assert got.is_contiguous(memory_format=torch.channels_last)
    for view, original, row in zip(got, originals, rows, strict=True):
        torch.testing.assert_close(view, shifted_by_torchvision(original, size, row), rtol=0, atol=0)
    many = ShiftedView(size)(torch.stack(originals), rows)
    assert many.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(many, got, rtol=0, atol=0)


def test_places_of_the_shifted_view_are_uniform_from_edge_to_edge() -> None:
    square = np.full((3300, 2), 256)
    windows = ShiftedView(224).windows(square, draws(2, 5, 0, 3300))
    assert windows.places_B2.min() == 0
    assert windows.places_B2.max() == 32  # 256 - 224
    for column in windows.places_B2.T:
        counts = np.bincount(column, minlength=33)
        # Of 33 places 100 times each: 32 degrees of freedom, 62.5 is passed once in a thousand.
        assert ((counts - 100) ** 2 / 100).sum() < 62.5
    assert 1550 < int(windows.flips_B.sum()) < 1750
    assert not ShiftedView(224, flip=False).windows(square[:100], draws(2, 5, 0, 100)).flips_B.any()
    row = np.full((1, DRAWS), np.nextafter(1.0, 0.0))
    assert ShiftedView(224).windows(square[:1], row).places_B2.tolist() == [[32, 32]]


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_ten_crops_are_torchvisions(height: int, width: int, size: int) -> None:
    originals = [noise(height, width), image(height, width)]
    got = TenCrops(size)(originals)
    assert got.shape == (2, 10, 3, size, size)
    assert got.dtype == torch.uint8
    assert got.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    for views, original in zip(got, originals, strict=True):
        whole = torchvision.resize(original.permute(2, 0, 1), [round(size * 256 / 224)], antialias=True)
        want = torch.stack(torchvision.ten_crop(whole, [size, size]))
        torch.testing.assert_close(views, want, rtol=0, atol=0)
    torch.testing.assert_close(TenCrops(size)(torch.stack(originals)), got, rtol=0, atol=0)


def test_the_views_of_the_probe_bear_no_images_and_long_strips() -> None:
    rows = draws(0, 0, 0, 1)
    nothing: list[list[Tensor] | Tensor] = [[], torch.empty(0, 8, 9, 3, dtype=torch.uint8)]
    for none in nothing:
        assert ShiftedView(16)(none, rows[:0]).shape == (0, 3, 16, 16)
        assert TenCrops(16)(none).shape == (0, 10, 3, 16, 16)
    endless = torch.full((1, 1, 3), 200, dtype=torch.uint8).expand(1, 2_000_000_000, 3)
    assert bool((ShiftedView(32)([endless], rows) == 200).all())
    assert bool((TenCrops(32)([endless]) == 200).all())


# Images of any sizes in one piece of memory, as on a GPU


def ragged(images: list[Tensor], gap: int = 5) -> Ragged:
    """Images one after the other, with pixels between them that must not be seen."""
    starts, pixels, place = [], [], 0
    for one in images:
        pixels += [torch.full((gap, 3), 77, dtype=torch.uint8), one.reshape(-1, 3)]
        starts.append(place + gap)
        place += gap + one.shape[0] * one.shape[1]
    sizes = np.array([one.shape[:2] for one in images], np.int64).reshape(-1, 2)
    return Ragged(torch.cat([torch.empty(0, 3, dtype=torch.uint8), *pixels]), np.array(starts, np.int64), sizes)


VIEWS = [
    ClusterView(32), TrainingView(32), TrainingView(96, scale=(0.3, 0.6), flip=False), ShiftedView(32), TenCrops(32),
    MultiCropView(((2, 32), (3, 12)), ((0.14, 1.0), (0.05, 0.14))),
]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: type(view).__name__)
def test_views_of_ragged_images_are_those_of_each(view: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
    """Bit for bit on a processor; where float64 is not wanted, as on a GPU, at most 1 of 255 away."""
    images = [noise(height, width) for height, width in [*SIZES, (500, 333), (7, 400)]]
    rows = crop_draws(3, 1, 0, len(images), 5) if isinstance(view, MultiCropView) else draws(3, 1, 0, len(images))
    want, kept = view(images, rows), ragged(images)

    def groups(views: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
        return list(views) if isinstance(views, tuple) else [views]

    for got, one in zip(groups(view(kept, rows)), groups(want), strict=True):
        assert got.flatten(0, -4).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, one, rtol=0, atol=0)
    some = np.array([9, 2, 2, 0])
    for got, one in zip(groups(view(kept.take(some), rows[some])), groups(view([images[k] for k in some], rows[some]))):  # noqa: B905
        torch.testing.assert_close(got, one, rtol=0, atol=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views_module, "resample", partial(resample, exact=False))
        for got, one in zip(groups(view(kept, rows)), groups(want), strict=True):
            assert farthest(got, one) <= 1
    none = ragged([])
    assert [len(group) for group in groups(view(none, rows[:0]))] == [0] * len(groups(want))
