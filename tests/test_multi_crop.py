"""Multi-crop: the words of people, draws by crop, and each crop as the training view's of its own numbers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.data.multi_crop import MultiCropView, crop_draws
from deepcluster.data.views import TrainingView, draws
from deepcluster.run.crops import parse_crops

CROPS, SCALES = ((2, 32), (3, 12)), ((0.14, 1.0), (0.05, 0.14))
SIZES = [(40, 90), (33, 31), (1, 1), (60, 45)]


def noise(height: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8))


# Words


@pytest.mark.parametrize(
    ("text", "crops"),
    [
        ("2x224,6x96", ((2, 224), (6, 96))),
        (" 2 X 32 , 4×32 ", ((2, 32), (4, 32))),
        ("1x16,1x8", ((1, 16), (1, 8))),
        ("2x32", ((2, 32),)),
    ],
)
def test_crops_are_read(text: str, crops: tuple[tuple[int, int], ...]) -> None:
    assert parse_crops(text) == crops


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a number and a side; write it as 2x224,6x96"),
        ("224", "'224' is not a number and a side"),
        ("2x224,", "'' is not a number"),
        ("2x-224", "'2x-224' is not"),
        ("2x224 6x96", "is not a number and a side"),
        ("2.5x224", "'2.5x224' is not"),
        ("0x224,2x96", "group of 0 crops: leave it out"),
        ("2x224,2x7", "crops of 7 pixels; use 8 or more"),
        ("1x224", "is one crop"),
        ("2x96,2x224", "first group, of 96 pixels, must be the large one.* another has 224"),
    ],
)
def test_what_is_wrong_with_crops_is_told(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_crops(text)


# Draws


def test_a_crops_numbers_depend_on_its_position_and_its_number_alone() -> None:
    whole = crop_draws(5, 3, 0, 20, 4)
    assert whole.shape[:2] == (20, 4)
    np.testing.assert_array_equal(crop_draws(5, 3, 7, 6, 2), whole[7:13, :2])
    np.testing.assert_array_equal(whole[:, 0], draws(5, 3, 0, 20))
    np.testing.assert_array_equal(whole[:, 3], draws(5, 3, 0, 20, crop=3))
    others = np.concatenate([crop_draws(*key, 0, 300, 4).ravel() for key in ((5, 3), (5, 4), (6, 3))])
    assert len(np.unique(others)) == len(others)
    assert crop_draws(0, 0, 3, 0, 2).shape == (0, 2, whole.shape[2])


def test_crops_of_an_image_are_independent() -> None:
    rows = crop_draws(1, 1, 0, 4000, 3)
    between = np.corrcoef(rows.reshape(len(rows), -1).T) - np.eye(rows[0].size)
    # Correlations of 4,000 independent pairs deviate from 0 by 1/sqrt(4000) = 0.016.
    assert np.abs(between).max() < 5.5 * 0.016


# Views


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("kind", ["photos", "of one size"])
def test_every_crop_is_the_training_views_of_its_numbers(kind: str, flip: bool) -> None:
    images: list[Tensor] | Tensor = (
        [noise(*size) for size in SIZES] if kind == "photos" else torch.stack([noise(20, 20)] * 4)
    )
    count, view = len(images), MultiCropView(CROPS, SCALES, flip=flip)
    rows = crop_draws(2, 1, 0, count, view.n_views)
    groups = view(images, rows)
    assert view.n_views == 5
    assert [group.shape for group in groups] == [(2 * count, 3, 32, 32), (3 * count, 3, 12, 12)]
    first = 0
    for (crops, size), scale, group in zip(CROPS, SCALES, groups, strict=True):
        assert group.dtype == torch.uint8
        assert group.is_contiguous(memory_format=torch.channels_last)
        for crop in range(crops):
            want = TrainingView(size, scale=scale, flip=flip)(images, rows[:, first + crop])
            torch.testing.assert_close(group[crop * count : (crop + 1) * count], want, rtol=0, atol=0)
        first += crops


def test_areas_lie_in_the_range_of_their_group() -> None:
    """On a ramp of rows and columns a crop's corners tell which part it shows."""
    side, count = 200, 300
    down, across = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ramp = torch.stack([down, across, torch.zeros_like(down)], 2).to(torch.uint8)
    groups = MultiCropView(CROPS, SCALES)([ramp] * count, crop_draws(0, 0, 0, count, 5))
    for (_, size), (least, most), group in zip(CROPS, SCALES, groups, strict=True):
        values = group.double()
        # Middles of the outermost pixels are (size - 1) / size of the crop's sides apart.
        heights = (values[:, 0, -1, 0] - values[:, 0, 0, 0]) * size / (size - 1)
        widths = (values[:, 1, 0, -1] - values[:, 1, 0, 0]).abs() * size / (size - 1)
        shares = heights * widths / side**2
        assert shares.min() > 0.85 * least
        assert shares.max() < 1.15 * most
        assert shares.min() < least + 0.1 * (most - least)
        assert shares.max() > most - 0.25 * (most - least)


def test_an_images_crops_do_not_depend_on_its_batch() -> None:
    images, view = [noise(*size) for size in SIZES], MultiCropView(CROPS, SCALES)
    rows = crop_draws(2, 1, 0, 4, 5)
    whole = view(images, rows)
    for number in range(4):
        alone = view(images[number : number + 1], rows[number : number + 1])
        for group, part in zip(whole, alone, strict=True):
            torch.testing.assert_close(group[number::4], part, rtol=0, atol=0)


def test_no_images_and_wrong_ranges() -> None:
    rows = crop_draws(0, 0, 0, 0, 5)
    nothing: list[list[Tensor] | Tensor] = [[], noise(9, 9)[None][:0]]
    for none in nothing:
        assert [len(group) for group in MultiCropView(CROPS, SCALES)(none, rows)] == [0, 0]
    with pytest.raises(InputError, match="1 ranges of areas for 2 groups"):
        MultiCropView(CROPS, SCALES[:1])
    assert MultiCropView(CROPS, SCALES) == MultiCropView(CROPS, SCALES)
    assert hash(MultiCropView(CROPS, SCALES)) == hash(MultiCropView(CROPS, SCALES))
