"""Rows of a stage: the published sizes, and averages by hand."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from deepcluster.models.archs import ARCHITECTURES, make_trunk
from deepcluster.run.features import MOST_NUMBERS, Pooled, pool

# Section 4.2 of the paper: kernel, stride, padding and the numbers that come out, by stage of AlexNet at 224 px.
PUBLISHED = {
    "conv1": (6, 6, 3, 9_600),
    "conv2": (4, 4, 0, 9_216),
    "conv3": (3, 3, 1, 9_600),
    "conv4": (3, 3, 1, 9_600),
    "conv5": (2, 2, 0, 9_216),
}


@cache
def maps_of(arch: str, image_size: int) -> dict[str, Tensor]:
    trunk = make_trunk(arch, image_size=image_size).eval()
    images = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return dict(trunk.walk(images))


def test_alexnet_at_224_is_pooled_as_the_published_probe_does() -> None:
    maps = maps_of("alexnet", 224)
    for stage, (kernel, stride, padding, numbers) in PUBLISHED.items():
        rows = Pooled(stage, "pooled").rows(maps[stage])
        assert rows.shape == (1, numbers), stage
        torch.testing.assert_close(rows, avg_pool2d(maps[stage], kernel, stride, padding).flatten(1), rtol=0, atol=0)


def test_the_zeros_of_the_padding_count() -> None:
    """Ones on 13 × 13, kernel 3, stride 3, padding 1: a corner has 4 ones of 9, an edge 6 of 9."""
    rows = pool(torch.ones(1, 384, 13, 13)).view(384, 5, 5)
    assert rows[0, 0].tolist() == pytest.approx([4 / 9, 6 / 9, 6 / 9, 6 / 9, 4 / 9])
    assert rows[0, 2].tolist() == pytest.approx([6 / 9, 1, 1, 1, 6 / 9])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_stage_of_any_trunk_gives_more_than_9600_numbers(arch: str) -> None:
    for stage, map_BCHW in maps_of(arch, 32 if arch.endswith("-small") else 224).items():
        channels, height = map_BCHW.shape[1:3]
        numbers = Pooled(stage, "pooled").rows(map_BCHW).shape[1]
        assert channels <= numbers <= MOST_NUMBERS, stage
        assert numbers % channels == 0
        side = round((numbers / channels) ** 0.5)
        # One more row and column would be too many numbers, or more than there are.
        assert channels * (side + 1) ** 2 > MOST_NUMBERS or side == height or (arch, stage) == ("alexnet", "conv5"), stage


@pytest.mark.parametrize(("shape", "side"), [((2, 96, 16, 16), 10), ((2, 64, 8, 8), 8), ((2, 9_601, 3, 3), 1)])
def test_other_maps_are_averaged_over_equal_parts(shape: tuple[int, ...], side: int) -> None:
    map_BCHW = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    edges = [(line * shape[2] // side, -(-(line + 1) * shape[2] // side)) for line in range(side)]
    pixels = map_BCHW.double().numpy()
    want = [[pixels[..., top:bottom, left:right].mean((2, 3)) for left, right in edges] for top, bottom in edges]
    got = pool(map_BCHW).view(*shape[:2], side, side)
    np.testing.assert_allclose(got.numpy(), np.array(want).transpose(2, 3, 0, 1), atol=1e-6)


def test_the_average_of_a_map() -> None:
    map_BCHW = torch.arange(24.0).view(1, 2, 3, 4)
    assert Pooled("conv1").rows(map_BCHW).tolist() == [[5.5, 17.5]]
    assert Pooled("conv1") != Pooled("conv1", "pooled")
