"""Sliding windows, and whole runs on drawn streets."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_helper import make_model
from street_images import write_streets
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.evaluation import protocols
from deepcluster.evaluation.dense.segmentation.cityscapes import NAME
from deepcluster.evaluation.dense.segmentation.test import slide, windows


@given(st.integers(1, 4_000), st.integers(1, 1_000))
def test_windows_cover_every_pixel(length: int, side: int) -> None:
    found = windows(length, side)
    assert all(0 <= one.start < one.stop <= length and one.stop - one.start == min(side, length) for one in found)
    assert (found[0].start, found[-1].stop) == (0, length)
    # Each begins before the one before it ends; none is superfluous.
    assert all(before.start < after.start <= before.stop for before, after in pairwise(found))
    assert len(found) <= max(1, -(-(length - min(side, length)) // max(1, round(min(side, length) * 513 / 769))) + 1)


def test_windows_of_cityscapes() -> None:
    assert [one.start for one in windows(2049, 769)] == [0, 513, 1026, 1280]
    assert [one.start for one in windows(1025, 769)] == [0, 256]
    assert [one.start for one in windows(769, 769)] == [0]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45))
def test_windows_give_what_the_whole_image_does_where_each_pixel_counts_alone(height: int, width: int, side: int) -> None:
    generator = torch.Generator().manual_seed(height * 100 + width)
    image_1CHW = torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)

    def scores(images_BCHW: Tensor) -> Tensor:
        return torch.cat([images_BCHW.float(), images_BCHW.float().square()], dim=1)

    assert torch.allclose(slide(scores, image_1CHW, side), scores(image_1CHW), atol=0.02)


def test_scores_of_windows_that_overlap_are_averaged() -> None:
    calls: list[int] = []

    def scores(images_BCHW: Tensor) -> Tensor:
        calls.append(len(calls))
        return torch.full((1, 1, *images_BCHW.shape[-2:]), float(calls[-1]))

    # Windows at 0, 2 and 4 of three pixels each.
    found = slide(scores, torch.zeros(1, 3, 1, 7, dtype=torch.uint8), 3)
    assert found.flatten().tolist() == [0, 0, 0.5, 1, 1.5, 2, 2]


TINY: dict[str, Any] = {"short_side": 48, "batch_size": 2, "steps": 6}


def test_a_whole_run(tmp_path: Path) -> None:
    streets = write_streets(tmp_path / "streets", train=4, val=2, height=48)
    model = make_model(tmp_path / "cache", workers=0)
    found = protocols.evaluate(NAME, model, streets, out=tmp_path / "out", **TINY).results
    assert (found.settings["crop"], found.settings["steps"], found.data["classes"]) == (36, 6, 19)
    ious: Any = found.results["IoU"]
    assert {"road", "building", "sky"} <= ious.keys()
    assert found.best() == pytest.approx(sum(ious.values()) / len(ious))
    content = json.loads((tmp_path / "out" / f"{NAME}.json").read_text())
    assert content["results"]["mIoU"] == found.best()
    assert len([*(tmp_path / "out" / NAME).glob("frankfurt_*.png")]) == 2


def test_other_data_is_refused(tmp_path: Path) -> None:
    streets = write_streets(tmp_path / "streets", train=2, val=1, height=24)
    model = make_model(tmp_path / "cache", workers=0)
    with pytest.raises(
        InputError, match=r"has masks of another data set .*; looked for a VOC devkit with SegmentationClass"
    ):
        protocols.evaluate("voc12-segmentation", model, streets)
    with pytest.raises(InputError, match="has no masks"):
        protocols.evaluate(NAME, model, streets / "leftImg8bit")
