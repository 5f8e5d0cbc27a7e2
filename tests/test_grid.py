"""Contact sheets: every picture where it belongs, unchanged, with its caption."""

import numpy as np
import pytest
from numpy.typing import NDArray

from deepcluster.visualization.grid import LINE, picture_grid

WHITE = 255


def pictures(count: int, height: int = 20, width: int = 30) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("count", "across", "gap"), [(1, 1, 2), (7, 3, 2), (6, 3, 0), (2, 5, 4)])
def test_pictures_lie_line_by_line_on_white(count: int, across: int, gap: int) -> None:
    given = pictures(count)
    sheet = np.array(picture_grid(given, across=across, gap=gap))
    columns = min(across, count)
    rows = -(-count // columns)
    assert sheet.shape == (gap + rows * (20 + gap), gap + columns * (30 + gap), 3)
    for number, picture in enumerate(given):
        y, x = gap + number // columns * (20 + gap), gap + number % columns * (30 + gap)
        np.testing.assert_array_equal(sheet[y : y + 20, x : x + 30], picture)
        sheet[y : y + 20, x : x + 30] = WHITE
    assert (sheet == WHITE).all()


def test_captions_are_under_their_pictures() -> None:
    given = pictures(4, width=40)
    bare, named = (np.array(picture_grid(given, across=2, captions=c)) for c in (None, ["12", "", "7", "3"]))
    assert named.shape[0] == bare.shape[0] + 2 * LINE
    for number, picture in enumerate(given):
        y, x = 2 + number // 2 * (22 + LINE), 2 + number % 2 * 42
        np.testing.assert_array_equal(named[y : y + 20, x : x + 40], picture)
        ink = named[y + 20 : y + 20 + LINE, x : x + 40] < 128
        assert ink.any() == (number != 1)
        # Centred, to a pixel or two.
        if number != 1:
            columns = np.flatnonzero(ink.any(axis=(0, 2)))
            assert abs(columns.mean() - 19.5) < 2.5


def test_a_long_caption_stays_under_its_picture() -> None:
    sheet = np.array(picture_grid(pictures(2), across=2, gap=6, captions=["a very long file name.jpg\nand more", ""]))
    assert (sheet[26:, :6] == WHITE).all()
    assert (sheet[26:, 36:] == WHITE).all()
    assert (sheet[26:, 6:36] < 128).any()


def test_titles_are_left_of_their_lines() -> None:
    given = pictures(4)
    plain, titled = (np.array(picture_grid(given, across=2, row_titles=t)) for t in (None, ["filter 12", "filter 7"]))
    left = titled.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(titled[:, left:], plain)
    for row in range(2):
        assert (titled[2 + row * 22 : 22 + row * 22, :left] < 128).any()


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="0 pictures"):
        picture_grid([], across=2)
    with pytest.raises(ValueError, match="one size"):
        picture_grid([*pictures(1), *pictures(1, height=21)], across=2)
    with pytest.raises(ValueError, match="3 captions for 2"):
        picture_grid(pictures(2), across=2, captions=["a", "b", "c"])
    with pytest.raises(ValueError, match="1 titles for 2"):
        picture_grid(pictures(4), across=2, row_titles=["a"])
