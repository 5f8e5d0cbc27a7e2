"""Regions against an independent derivation and hand-worked maps; vectors and sums against naive loops in float64."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from deepcluster.clustering.whitening import Whitening
from deepcluster.evaluation.regions import aggregate, region_levels, region_vectors


def published(height: int, width: int, levels: int) -> list[tuple[int, int, int]]:
    """Top, left and side as in the geometry of the paper, worked out in floating point from centres, region by region."""
    short, long = min(height, width), max(height, width)
    overlaps = [(short - (long - short) / extra) / short for extra in range(1, 7)]
    # Rounded, so that of two that are as near the first is taken, as at 3 × 11.
    extra = 1 + int(np.argmin([round(abs(overlap - 0.4), 9) for overlap in overlaps])) if height != width else 0
    found = []
    for level in range(1, levels + 1):
        side = int(2 * short / (level + 1))
        if side == 0:
            continue
        counts = level + (extra if height > width else 0), level + (extra if width > height else 0)
        # The centre of the first region is half a side from the edge, that of the last as far from the other edge.
        tops, lefts = (
            np.floor(np.linspace(side / 2, length - side / 2, count) - side / 2 + 1e-9) if count > 1 else [0]
            for length, count in zip((height, width), counts, strict=True)
        )
        found += [(int(top), int(left), side) for top, left in product(tops, lefts)]
    return found


def listed(height: int, width: int, levels: int) -> list[tuple[int, int, int]]:
    return [
        (top, left, one.side) for one in region_levels(height, width, levels) for top, left in product(one.tops, one.lefts)
    ]


def test_hand_worked_square() -> None:
    """8 × 8: the whole; four of side 5; nine of side 4."""
    square = listed(8, 8, 3)
    assert square[:5] == [(0, 0, 8), (0, 0, 5), (0, 3, 5), (3, 0, 5), (3, 3, 5)]
    assert square[5:] == [(top, left, 4) for top in (0, 2, 4) for left in (0, 2, 4)]


def test_hand_worked_photo() -> None:
    """A photo of 1,024 × 768 under a stride of 16: 48 × 64. With two squares side by side 32 of 48 columns are shared
    (67 %), with one more 83 %: one extra region is nearest to 40 %; so 2 + 6 + 12 regions."""
    photo = listed(48, 64, 3)
    assert len(photo) == 20
    assert photo[:2] == [(0, 0, 48), (0, 16, 48)]
    assert photo[2:8] == [(top, left, 32) for top in (0, 16) for left in (0, 16, 32)]
    assert photo[8:] == [(top, left, 24) for top in (0, 12, 24) for left in (0, 13, 26, 40)]


@pytest.mark.parametrize(
    ("height", "width", "along"), [(10, 10, 1), (10, 15, 2), (10, 17, 2), (10, 20, 3), (10, 40, 6), (10, 99, 7)]
)
def test_number_along_the_longer_side(height: int, width: int, along: int) -> None:
    """10 × 20: with 2 squares nothing is shared, with 3 a half, which is nearer to 40 %. No more than 7."""
    assert len(region_levels(height, width, 1)[0].lefts) == along
    assert len(region_levels(width, height, 1)[0].tops) == along


def test_equals_the_published_geometry_on_all_aspect_ratios() -> None:
    for height, width in product(range(1, 41), range(1, 41)):
        assert listed(height, width, 3) == published(height, width, 3), (height, width)
    for height, width in ((48, 64), (64, 48), (43, 64), (31, 64), (14, 64), (64, 64), (50, 67)):
        assert listed(height, width, 5) == published(height, width, 5)


def test_regions_lie_in_the_map_and_reach_its_edges() -> None:
    for height, width in product(range(1, 30), range(1, 70, 3)):
        for level in region_levels(height, width, 4):
            for starts, length in ((level.tops, height), (level.lefts, width)):
                assert starts[0] == 0 and list(starts) == sorted(starts)
                assert starts[-1] + level.side <= length
                assert len(starts) == 1 or starts[-1] + level.side == length


def test_overlap_is_the_nearest_to_four_tenths() -> None:
    for width in range(21, 120):
        starts = region_levels(20, width, 1)[0].lefts
        shared = 1 - (width - 20) / (len(starts) - 1) / 20
        others = [1 - (width - 20) / extra / 20 for extra in range(1, 7)]
        assert abs(shared - 0.4) == pytest.approx(min(abs(other - 0.4) for other in others))


def test_turning_the_map_turns_the_regions() -> None:
    for height, width in ((5, 9), (20, 33), (48, 64)):
        assert sorted(listed(width, height, 3)) == sorted((left, top, side) for top, left, side in listed(height, width, 3))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 7), (6, 6), (9, 5), (12, 16)])
def test_vectors_are_unit_maxima(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    map_CHW = rng.normal(size=(5, height, width)).astype(np.float32)
    expected = []
    for top, left, side in listed(height, width, 3):
        maxima = map_CHW[:, top : top + side, left : left + side].max((1, 2)).astype(np.float64)
        expected.append(maxima / np.linalg.norm(maxima))
    np.testing.assert_allclose(region_vectors(torch.from_numpy(map_CHW), 3).numpy(), expected, atol=1e-6)


def test_a_map_of_zeros_gives_zeros() -> None:
    assert not region_vectors(torch.zeros(4, 6, 6), 2).any()


def random_rows(n: int, dim: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, dim))).float()


def test_aggregate_equals_a_naive_loop() -> None:
    whitening = Whitening(4).fit(random_rows(200, 6, seed=1))
    rows_RC, counts = random_rows(9, 6, seed=2), [3, 0, 5, 1]
    found_NP = aggregate(rows_RC, torch.tensor(counts), whitening).double().numpy()
    learned = random_rows(200, 6, seed=1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(learned.T))
    points = (rows_RC.double().numpy() - learned.mean(0)) @ (vectors[:, ::-1][:, :4] / np.sqrt(values[::-1][:4]))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    first, expected = 0, []
    for count in counts:
        total = points[first : first + count].sum(0)
        expected.append(total / np.linalg.norm(total) if count else total)
        first += count
    # The sign of an axis is arbitrary, and changes no cosine.
    np.testing.assert_allclose(found_NP @ found_NP.T, np.array(expected) @ np.array(expected).T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found_NP, axis=1), [1, 0, 1, 1], atol=1e-6)
