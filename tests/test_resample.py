"""Many windows at once, as matrix products, are bit for bit the windows that are cut out one by one."""

from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from deepcluster.data import resample as module
from deepcluster.data.resample import Ragged, Windows, resample, resize

Box = tuple[int, int, int, int]


def noise(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images (B, H, W, 3) of random pixels, of which a third are 0 or 255."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-50, 306, (count, height, width, 3), generator=generator).clamp(0, 255).to(torch.uint8)


def whole(boxes_B4: NDArray[np.int64], size: int, flips_B: NDArray[np.bool_] | None = None) -> Windows:
    """Windows that are the whole of a grid of `size`."""
    count = len(boxes_B4)
    flips_B = np.zeros(count, bool) if flips_B is None else flips_B
    return Windows(boxes_B4, np.full((count, 2), size), np.zeros((count, 2), np.int64), flips_B)


def some_of(windows: Windows, rows: NDArray[np.int64] | slice) -> Windows:
    return Windows(windows.boxes_B4[rows], windows.grids_B2[rows], windows.places_B2[rows], windows.flips_B[rows])


def one_by_one(images: Tensor | list[Tensor], windows: Windows, size: int) -> Tensor:
    """What `resize` makes of each box, and the window cut out of that."""
    views = [torch.empty(0, 3, size, size, dtype=torch.uint8)]
    fields = (windows.boxes_B4, windows.grids_B2, windows.places_B2, windows.flips_B)
    for image_HWC, (top, left, height, width), grid, (y, x), flip in zip(
        images, *(one.tolist() for one in fields), strict=True
    ):
        scaled_CHW = resize(image_HWC[top : top + height, left : left + width].contiguous(), tuple(grid))
        window_CHW = scaled_CHW[:, y : y + size, x : x + size]
        views.append((window_CHW.flip(2) if flip else window_CHW)[None])
    return torch.cat(views)


def ragged(images: list[Tensor]) -> Ragged:
    sizes_B2 = np.array([one.shape[:2] for one in images], np.int64)
    starts_B = np.cumsum(sizes_B2.prod(1)) - sizes_B2.prod(1)
    return Ragged(torch.cat([one.reshape(-1, 3) for one in images]), starts_B, sizes_B2)


def equal(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.uint8
    assert not len(got) or got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


Job = tuple[list[Tensor], Windows, int]


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Images of several sizes, windows and their size: small ones, where all sides, up and down, meet."""
    count, size = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    images, boxes, grids, places = [], [], [], []
    for _ in range(count):
        height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
        images.append(noise(1, height, width, draw(st.integers(0, 1000)))[0])
        tall, wide = draw(st.integers(1, height)), draw(st.integers(1, width))
        boxes.append((draw(st.integers(0, height - tall)), draw(st.integers(0, width - wide)), tall, wide))
        grids.append([size + draw(st.integers(0, 30) | st.just(0)) for _ in range(2)])
        places.append([draw(st.integers(0, side - size)) for side in grids[-1]])
    flips_B = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    return images, Windows(np.array(boxes), np.array(grids), np.array(places), flips_B), size


@settings(max_examples=300, deadline=None)
@given(jobs())
def test_windows_are_those_that_are_cut_out_one_by_one(job: Job) -> None:
    images, windows, size = job
    want = one_by_one(images, windows, size)
    equal(resample(ragged(images), windows, size), want)
    got = resample(ragged(images), windows, size, exact=False)
    assert (got.int() - want.int()).abs().max() <= 2  # 1 of each pass
    first = some_of(windows, slice(1))
    equal(
        resample(images[0][None].expand(3, -1, -1, -1), some_of(windows, np.zeros(3, np.int64)), size),
        want[:1].expand(3, -1, -1, -1),
    )
    torch.testing.assert_close(resample(images[0][None], first, size), want[:1], rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_crops_are_those_of_torchvision(job: Job) -> None:
    images, windows, size = job
    got = resample(ragged(images), whole(windows.boxes_B4, size), size)
    for image_HWC, box, got_CSS in zip(images, windows.boxes_B4.tolist(), got, strict=True):
        want = resized_crop(image_HWC.permute(2, 0, 1), *box, [size, size], InterpolationMode.BILINEAR, antialias=True)
        torch.testing.assert_close(got_CSS, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("side", "box", "size"),
    [
        ((40, 30), (7, 5, 24, 24), 24),  # cut and not scaled
        ((40, 30), (7, 5, 24, 12), 24),  # scaled along one side only
        ((40, 30), (39, 29, 1, 1), 24),  # one pixel
        ((40, 30), (0, 0, 40, 1), 50),
        ((1, 1), (0, 0, 1, 1), 1),
        ((600, 9), (0, 0, 600, 9), 9),  # weights of more than 16 bits
        ((9, 2000), (0, 0, 9, 2000), 3),
        ((400, 400), (1, 2, 399, 398), 32),
        ((97, 97), (0, 0, 97, 97), 32),  # just beyond what float32 holds
        ((96, 96), (0, 0, 96, 96), 32),
        ((5000, 3), (0, 0, 5000, 3), 1),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_extreme_scales(side: tuple[int, int], box: Box, size: int, flip: bool) -> None:
    images_BHWC, windows = noise(2, *side), whole(np.array([box, box]), size, np.array([flip, not flip]))
    want = one_by_one(images_BHWC, windows, size)
    for images in (images_BHWC, ragged(list(images_BHWC))):
        equal(resample(images, windows, size), want)
        assert (resample(images, windows, size, exact=False).int() - want.int()).abs().max() <= 1


def test_no_images_give_no_windows() -> None:
    none = whole(np.empty((0, 4), np.int64), 5)
    assert resample(noise(0, 8, 9), none, 5).shape == (0, 3, 5, 5)
    assert resample(ragged([noise(1, 3, 3)[0]]).take(np.empty(0, np.int64)), none, 5).dtype == torch.uint8


def test_batches_that_are_too_large_for_a_gpu_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [noise(1, 20 + 3 * number, 31 - number, number)[0] for number in range(12)]
    windows = whole(np.array([(1, 2, 15, 16)] * 12), 10, np.arange(12) % 2 == 0)
    want = one_by_one(images, windows, 10)
    for numbers in (1, 3000, 1 << 27):
        monkeypatch.setattr(module, "_GPU_NUMBERS", numbers)
        equal(resample(ragged(images), windows, 10), want)


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
    images_BHWC = noise(70, 32, 32)
    random = np.random.default_rng(0)
    sides_B2 = random.integers(4, 33, (70, 2))
    boxes_B4 = np.concatenate([random.integers(0, 33 - sides_B2), sides_B2], axis=1)
    with threads(count):
        for size in (32, 12, 3):
            windows = whole(boxes_B4, size, random.random(70) < 0.5)
            every = resample(images_BHWC, windows, size)
            equal(every, one_by_one(images_BHWC, windows, size))
            order = random.permutation(70)
            equal(resample(images_BHWC[order], some_of(windows, order), size), every[order])
            for number in (0, 31, 32, 69):
                one = slice(number, number + 1)
                equal(resample(images_BHWC[one], some_of(windows, one), size), every[one])


def test_images_that_are_a_view_of_others_are_read_as_they_look() -> None:
    images_BHWC = noise(6, 20, 24)
    windows = whole(np.array([[1, 2, 15, 16]] * 3), 10)
    for strange in (images_BHWC[::2], images_BHWC.flip(0)[:3], images_BHWC[:3].permute(0, 2, 1, 3)):
        equal(resample(strange, windows, 10), resample(strange.contiguous(), windows, 10))


# Why the sums are exact


def weights_of(length: int, size: int) -> tuple[Tensor, int]:
    """The weights (size, length) of a whole line, as whole numbers, and how many bits they have after the point."""
    first, long, grid = (np.array([number]) for number in (0, length, size))
    line_1SW, bits_1 = module._weights(first, long, grid, first, length, size, torch.device("cpu"), exact=True)
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
    images_BHWC = image_HW[None, ..., None].expand(3, side, side, 3).clone()
    part = [side // 3, side // 2, side - side // 3, side - side // 2]
    windows = whole(np.array([[0, 0, side, side], [0, 0, side, side], part]), size)
    got = resample(images_BHWC, windows, size)
    equal(got, one_by_one(images_BHWC, windows, size))
    if pattern in ("white", "black"):
        assert bool((got == (255 if pattern == "white" else 0)).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_bits() -> None:
    images_BHWC = noise(70, 96, 80)
    random = np.random.default_rng(1)
    sides_B2 = random.integers(4, (97, 81), (70, 2))
    boxes_B4 = np.concatenate([random.integers(0, np.array([97, 81]) - sides_B2), sides_B2], axis=1)
    for size in (64, 32, 7):
        windows = whole(boxes_B4, size, random.random(70) < 0.5)
        want = one_by_one(images_BHWC, windows, size)
        kept = ragged(list(images_BHWC))
        for images in (images_BHWC.cuda(), Ragged(kept.pixels_P3.cuda(), kept.starts_B, kept.sizes_B2)):
            equal(resample(images, windows, size, exact=True).cpu(), want)
            assert (resample(images, windows, size).cpu().int() - want.int()).abs().max() <= 2
