"""Views to train and test segmentation on, against naive loops: the mask stays in step with the image."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from deepcluster.evaluation.dense.segmentation.views import PADDING, Scale, TrainingCrop, WholeImage
from deepcluster.models.trunk import normalise

SIDES = st.integers(1, 90)


def photo(mask: Any) -> tuple[tv_tensors.Image, dict[str, Tensor]]:
    """A grey image that is as bright as the number of its classes, and its mask."""
    mask_HW = torch.from_numpy(np.asarray(mask, np.uint8))
    grey_HW = torch.where(mask_HW == 255, 128, 20 + 200 * (mask_HW % 2)).to(torch.uint8)
    return tv_tensors.Image(grey_HW.expand(3, *grey_HW.shape)), {"mask": tv_tensors.Mask(mask_HW)}


def halves(height: int, width: int, split: int) -> np.ndarray[Any, Any]:
    mask = np.zeros((height, width), np.uint8)
    mask[:, split:] = 1
    return mask


def view_of(seed: int, view: Any, mask: Any) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image_CHW, target = view(*photo(mask))
    return image_CHW, target["mask"]


@given(SIDES, SIDES, st.floats(0.5, 2), st.integers(8, 60), st.integers(1, 4))
def test_the_size_is_the_largest_within_both_bounds(height: int, width: int, ratio: float, short: int, times: int) -> None:
    scaled = Scale(short, times * short).size(height, width, ratio)
    least, most = int(short * ratio), int(short * times * ratio)
    assert min(scaled) <= least + 1
    assert max(scaled) <= most + 1
    # One of the bounds is met, up to rounding.
    assert abs(min(scaled) - least) <= 1 or abs(max(scaled) - most) <= 1
    assert abs(scaled[0] * width - scaled[1] * height) <= max(height, width), "the aspect is kept up to half a pixel"
    assert Scale(0, 0).size(height, width, ratio) == (height, width)


def test_sizes_of_the_published_scales() -> None:
    assert Scale(512, 2048).size(375, 500) == (512, 683)
    assert Scale(512, 2048).size(500, 333) == (769, 512)
    assert Scale(1025, 2049).size(1024, 2048) == (1025, 2049)


def naive_view(seed: int, mask: np.ndarray[Any, Any], scale: Scale, crop: int) -> np.ndarray[Any, Any]:
    """The mask that a crop shows, pixel by pixel, with the draws of the same generator in the same order."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        height, width = scale.size(*mask.shape, float(torch.empty(1).uniform_(0.5, 2)))
        rows = [int((row + 0.5) * mask.shape[0] / height) for row in range(height)]
        columns = [int((column + 0.5) * mask.shape[1] / width) for column in range(width)]
        resized = mask[np.ix_(rows, columns)]
        for _ in range(10):
            top = int(torch.randint(max(height - crop, 0) + 1, ()))
            left = int(torch.randint(max(width - crop, 0) + 1, ()))
            part = resized[top : top + crop, left : left + crop]
            counts = [int((part == one).sum()) for one in range(255)]
            if max(counts) / max(1, sum(counts)) < 0.75 and sum(counts):
                break
        part = part[:, ::-1] if torch.rand(1) < 0.5 else part
    shown = np.full((crop, crop), 255, np.uint8)
    shown[: part.shape[0], : part.shape[1]] = part
    return shown


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(12, 60), st.integers(12, 60), st.integers(8, 50), st.integers(8, 50))
def test_the_mask_of_a_crop_is_that_of_a_naive_one(seed: int, height: int, width: int, short: int, crop: int) -> None:
    mask = np.random.default_rng(seed).choice([0, 1, 2, 255], (height // 4 + 1, width // 4 + 1), p=[0.6, 0.2, 0.1, 0.1])
    mask = np.kron(mask, np.ones((4, 4)))[:height, :width].astype(np.uint8)
    scale = Scale(short, 4 * short)
    _, mask_HW = view_of(seed, TrainingCrop(scale, crop), mask)
    assert mask_HW.dtype == torch.uint8
    # At sizes of which torch's float32 and Python's float64 round a pixel's centre to another row, one row may differ.
    assert (mask_HW.numpy() != naive_view(seed, mask, scale, crop)).mean() <= 2 / crop


@pytest.mark.parametrize("seed", range(12))
def test_the_mask_stays_in_step_with_the_image(seed: int) -> None:
    mask = np.kron(np.random.default_rng(seed).integers(0, 2, (4, 5)), np.ones((16, 16))).astype(np.uint8)
    image_CHW, mask_HW = view_of(seed, TrainingCrop(Scale(64, 256), 48), mask)
    assert image_CHW.shape == (3, 48, 48)
    grey_HW = image_CHW.float().mean(dim=0)
    counted_HW = mask_HW != 255
    threshold = (grey_HW[counted_HW].min() + grey_HW[counted_HW].max()) / 2
    right_HW = (grey_HW > threshold) == (mask_HW == 1)
    # Brightness, contrast and saturation keep the order of greys; at borders colours are mixed.
    assert right_HW[counted_HW].float().mean() > 0.95


def test_what_the_image_does_not_fill_is_its_mean_colour_and_counts_nowhere() -> None:
    seen = set()
    for seed in range(20):
        image_CHW, mask_HW = view_of(seed, TrainingCrop(Scale(10, 40), 32), halves(20, 30, 15))
        height, width = (int((mask_HW != 255).any(dim=axis).sum()) for axis in (1, 0))
        outside_HW = torch.ones(32, 32, dtype=torch.bool)
        outside_HW[:height, :width] = False
        assert (mask_HW[outside_HW] == 255).all()
        assert (mask_HW[~outside_HW] < 2).all()
        assert {tuple(pixel) for pixel in image_CHW[:, outside_HW].T.tolist()} == {PADDING}
        seen.add((height, width))
    assert len(seen) > 5, "the scale is random"
    padding_13HW = torch.tensor(PADDING, dtype=torch.uint8)[None, :, None, None]
    assert normalise(padding_13HW).abs().max() < 0.01


def test_crops_of_one_class_are_drawn_again() -> None:
    # A fifth of the image is of another class: single crops show it in less than half of the cases.
    mask, view = halves(64, 320, 256), TrainingCrop(Scale(64, 640), 48)
    shares = [float((view_of(seed, view, mask)[1] == 0).float().mean()) for seed in range(60)]
    assert np.mean([share < 0.75 for share in shares]) > 0.6
    # Where no crop shows two classes, the last one is taken.
    _, only = view_of(0, view, np.zeros((64, 64), np.uint8))
    assert set(only.flatten().tolist()) <= {0, 255}
    _, nothing = view_of(0, view, np.full((64, 64), 255, np.uint8))
    assert (nothing == 255).all()


def test_changes_of_colour_leave_the_channels_in_their_order() -> None:
    mask = halves(40, 40, 20)
    image = tv_tensors.Image(torch.tensor([200, 120, 40], dtype=torch.uint8)[:, None, None].repeat(1, 40, 40))
    colours = set()
    for seed in range(40):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            view_CHW, _ = TrainingCrop(Scale(40, 160), 32)(image, {"mask": tv_tensors.Mask(torch.from_numpy(mask))})
        pixel = view_CHW[:, 0, 0].tolist()
        colours.add(tuple(pixel))
        assert pixel[0] > pixel[2], "orange stays warm: hue turns by a tenth at most"
    assert len(colours) > 25
    assert (200, 120, 40) in colours, "each change is left out in half of the views"


def test_a_whole_image() -> None:
    mask = halves(30, 50, 20)
    image_CHW, own_HW = view_of(0, WholeImage(Scale(60, 240)), mask)
    assert image_CHW.shape == (3, 60, 100)
    assert torch.equal(own_HW, torch.from_numpy(mask)), "the test is at the image's own size"
    assert torch.equal(image_CHW, functional.resize(photo(mask)[0], [60, 100], antialias=True).as_subclass(Tensor))
    _, resized_HW = view_of(0, WholeImage(Scale(60, 240), mask_too=True), mask)
    assert np.array_equal(resized_HW.numpy(), np.kron(mask, np.ones((2, 2))))
    image_CHW, own_HW = view_of(0, WholeImage(Scale(0, 0), mask_too=True), mask)
    assert image_CHW.shape == (3, 30, 50)
    assert own_HW.shape == (30, 50)
