"""Many crops at once, as matrix products, are bit for bit the crops that are scaled one by one."""

from collections.abc import Generator
from contextlib import contextmanager

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from deepcluster.data import resample as module
from deepcluster.data.resample import resample, resize

Box = tuple[int, int, int, int]


def noise(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Images (B, H, C, W) of random pixels, of which a third are 0 or 255."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(-50, 306, (count, height, channels, width), generator=generator)
    return pixels.clamp(0, 255).to(torch.uint8)


def one_by_one(images_BHCW: Tensor, boxes_B4: Tensor, size: tuple[int, int], flips_B: Tensor | None = None) -> Tensor:
    """What `resize` makes of each crop; (B, S, C, S)."""
    scaled = []
    for number, (top, left, height, width) in enumerate(boxes_B4.tolist()):
        image_HWC = images_BHCW[number].permute(0, 2, 1).contiguous()
        crop_CHW = resize(image_HWC[top : top + height, left : left + width], size)
        scaled.append(crop_CHW.flip(2) if flips_B is not None and flips_B[number] else crop_CHW)
    return torch.stack(scaled).permute(0, 2, 1, 3)


def equal(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.uint8
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def boxes_in(draw: st.DrawFn, count: int, height: int, width: int) -> Tensor:
    boxes = []
    for _ in range(count):
        tall, wide = draw(st.integers(1, height)), draw(st.integers(1, width))
        boxes.append((draw(st.integers(0, height - tall)), draw(st.integers(0, width - wide)), tall, wide))
    return torch.tensor(boxes)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[int, int], Tensor | None]:
    """Images, boxes, size and flips: small ones, where all sides, up and down, meet."""
    count, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(st.integers(1, 70))
    images_BHCW = noise(count, height, width, draw(st.sampled_from([1, 3])), draw(st.integers(0, 1000)))
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    flips_B = draw(st.none() | arrays.arrays(bool, count).map(torch.from_numpy))
    return images_BHCW, boxes_in(draw, count, height, width), size, flips_B


@settings(max_examples=300, deadline=None)
@given(jobs())
def test_crops_are_those_that_are_scaled_one_by_one(job: tuple[Tensor, Tensor, tuple[int, int], Tensor | None]) -> None:
    equal(resample(*job), one_by_one(*job))


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_crops_are_those_of_torchvision(job: tuple[Tensor, Tensor, tuple[int, int], Tensor | None]) -> None:
    images_BHCW, boxes_B4, size, _ = job
    for image_HCW, box, got_SCS in zip(images_BHCW, boxes_B4.tolist(), resample(images_BHCW, boxes_B4, size), strict=True):
        want = resized_crop(image_HCW.permute(1, 0, 2), *box, list(size), InterpolationMode.BILINEAR, antialias=True)
        equal(got_SCS.permute(1, 0, 2), want)


@pytest.mark.parametrize(
    ("side", "box", "size"),
    [
        ((40, 30), (0, 0, 40, 30), (40, 30)),  # as it is
        ((40, 30), (7, 5, 24, 24), (24, 24)),  # cut and not scaled
        ((40, 30), (7, 5, 24, 12), (24, 24)),  # scaled along one side alone
        ((40, 30), (39, 29, 1, 1), (24, 24)),  # one pixel
        ((40, 30), (0, 0, 40, 1), (1, 50)),
        ((1, 1), (0, 0, 1, 1), (1, 1)),
        ((600, 9), (0, 0, 600, 9), (1, 9)),  # weights of more than 16 bits
        ((9, 2000), (0, 0, 9, 2000), (9, 3)),
        ((400, 400), (1, 2, 399, 398), (32, 32)),
        ((97, 97), (0, 0, 97, 97), (32, 32)),  # just beyond what float32 holds
        ((96, 96), (0, 0, 96, 96), (32, 32)),
        ((5000, 3), (0, 0, 5000, 3), (1, 1)),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_extreme_scales(side: tuple[int, int], box: Box, size: tuple[int, int], flip: bool) -> None:
    images_BHCW, boxes_B4, flips_B = noise(2, *side), torch.tensor([box, box]), torch.tensor([flip, not flip])
    equal(resample(images_BHCW, boxes_B4, size, flips_B), one_by_one(images_BHCW, boxes_B4, size, flips_B))


def test_no_images_give_no_crops() -> None:
    none_B4 = torch.empty(0, 4, dtype=torch.int64)
    assert resample(noise(0, 8, 9), none_B4, (5, 6)).shape == (0, 5, 3, 6)
    assert resample(noise(0, 8, 9), none_B4, (5, 6), torch.empty(0, dtype=torch.bool)).dtype == torch.uint8


@contextmanager
def threads(count: int) -> Generator[None, None, None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_crop_does_not_depend_on_its_batch_nor_on_the_number_of_threads(count: int) -> None:
    """70 images: parts of 32, 32 and 6. One crop is so much larger than its result that all are scaled in float64."""
    images_BHCW = noise(70, 32, 32)
    random = np.random.default_rng(0)
    sides_B2 = random.integers(4, 33, (70, 2))
    boxes_B4 = torch.from_numpy(np.concatenate([random.integers(0, 33 - sides_B2), sides_B2], axis=1))
    flips_B = torch.from_numpy(random.random(70) < 0.5)
    with threads(count):
        for size in ((32, 32), (28, 9), (12, 12), (3, 3)):
            whole = resample(images_BHCW, boxes_B4, size, flips_B)
            equal(whole, one_by_one(images_BHCW, boxes_B4, size, flips_B))
            order = torch.from_numpy(random.permutation(70))
            equal(resample(images_BHCW[order], boxes_B4[order], size, flips_B[order]), whole[order])
            for number in (0, 31, 32, 69):
                one = slice(number, number + 1)
                equal(resample(images_BHCW[one], boxes_B4[one], size, flips_B[one]), whole[one])


def test_images_that_are_a_view_of_others_are_read_as_they_look() -> None:
    images_BHCW = noise(6, 20, 24)
    boxes_B4 = torch.tensor([[1, 2, 15, 16]]).expand(6, 4)
    for strange in (images_BHCW[::2], images_BHCW.flip(0)[:3], images_BHCW[:3].permute(0, 3, 2, 1)):
        equal(resample(strange, boxes_B4[:3], (10, 11)), resample(strange.contiguous(), boxes_B4[:3], (10, 11)))


# Why the sums are exact


def weights_of(length: int, size: int) -> tuple[Tensor, int]:
    """The weights (size, length) of a whole line, as whole numbers, and how many bits they have after the point."""
    line_1SW, bits_1 = module._weights(torch.tensor([0]), torch.tensor([length]), length, size, torch.device("cpu"))
    return line_1SW[0], int(bits_1)


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 300))
def test_the_largest_sum_is_a_whole_number_of_its_type(length: int, size: int) -> None:
    """All products are positive, and the sum of all of them, with the half that is added, below 2 ** 24 or 2 ** 53."""
    line_SW, bits = weights_of(length, size)
    assert bool((line_SW == line_SW.round()).all())
    assert line_SW.min() >= 0
    assert line_SW.max() < 2**15
    largest = int((line_SW.double().sum(1) * 255).max())
    digits = 24 if line_SW.dtype == torch.float32 else 53
    assert largest + 2 ** (bits - 1) <= 2**digits
    assert abs(largest / 255 / 2**bits - 1) < 0.01
    assert line_SW.dtype == (torch.float32 if length <= 3 * size else torch.float64)


def test_float32_is_used_where_it_is_just_enough() -> None:
    """The narrow places: a sum of all white pixels takes all but 0.2 % of the 24 bits that float32 has."""
    worst = max(
        int((line_SW.double().sum(1) * 255).max()) + 2 ** (bits - 1)
        for length, size in [(length, size) for size in range(1, 120) for length in range(2 * size, 3 * size + 1)]
        for line_SW, bits in [weights_of(length, size)]
    )
    assert 0.99 * 2**24 < worst <= 2**24


@pytest.mark.parametrize("scale", [1 / 3, 0.9, 1.0, 1.5, 2.0, 2.9, 3.0, 3.1, 8.0, 40.0])
@pytest.mark.parametrize("pattern", ["white", "black", "columns", "rows", "board", "last"])
def test_the_most_extreme_pixels_are_summed_exactly(scale: float, pattern: str) -> None:
    size = 16
    side = max(1, round(scale * size))
    y_HW, x_HW = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    patterns = {
        "white": torch.ones(side, side),
        "black": torch.zeros(side, side),
        "columns": x_HW % 2,
        "rows": y_HW % 2,
        "board": (x_HW + y_HW) % 2,
        "last": (x_HW == side - 1) | (y_HW == 0),
    }
    image_HW = patterns[pattern].to(torch.uint8) * 255
    images_BHCW = image_HW[None, :, None].expand(3, side, 3, side).clone()
    boxes_B4 = torch.tensor(
        [[0, 0, side, side], [0, 0, side, side], [side // 3, side // 2, side - side // 3, side - side // 2]]
    )
    got = resample(images_BHCW, boxes_B4, (size, size))
    equal(got, one_by_one(images_BHCW, boxes_B4, (size, size)))
    if pattern in ("white", "black"):
        assert bool((got == (255 if pattern == "white" else 0)).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_bits() -> None:
    images_BHCW = noise(70, 96, 80)
    random = np.random.default_rng(1)
    sides_B2 = random.integers(4, (97, 81), (70, 2))
    boxes_B4 = torch.from_numpy(np.concatenate([random.integers(0, np.array([97, 81]) - sides_B2), sides_B2], axis=1))
    flips_B = torch.from_numpy(random.random(70) < 0.5)
    for size in ((64, 64), (32, 48), (7, 7)):
        got = resample(images_BHCW.cuda(), boxes_B4, size, flips_B)
        equal(got.cpu(), one_by_one(images_BHCW, boxes_B4, size, flips_B))
