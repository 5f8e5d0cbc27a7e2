"""Pictures of masks and boxes: their colours where they should be, readable at any size."""

import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.cityscapes import CLASS_NAMES as STREETS
from deepcluster.evaluation.datasets.dense import Detections, Objects
from deepcluster.evaluation.datasets.voc_masks import CLASS_NAMES, voc_palette
from deepcluster.evaluation.dense.pictures.compared import compared, with_boxes, with_mask
from deepcluster.evaluation.dense.pictures.palette import PALETTE, colours_of, font_of, ink_on, shortened

GREY = 100
H, W = 60, 90


def photo(height: int = H, width: int = W) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def has(picture: Image.Image, colour: tuple[int, ...]) -> np.ndarray:
    return (np.asarray(picture) == colour).all(2)


def detections(boxes: list[list[float]], scores: list[float], labels: list[int], masks: Any = None) -> Detections:
    return Detections(
        torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64), masks
    )


def truth(boxes: list[list[float]], labels: list[int], masks: Tensor | None = None, difficult: int = 0) -> Objects:
    count = len(labels)
    hard = torch.arange(count) < difficult
    crowd = torch.zeros(count, dtype=torch.bool)
    return Objects(torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64), hard, crowd, masks)


def test_each_pixel_of_a_mask_has_the_colour_of_its_class() -> None:
    mask = np.zeros((H, W), np.uint8)
    mask[:, 30:60], mask[:, 60:] = 15, 255
    picture = np.asarray(with_mask(photo(), mask, CLASS_NAMES, side=W), int)
    assert picture.shape == (H, W, 3)
    person = 0.35 * (60 + 0.7 * GREY) + 0.65 * np.array(PALETTE[14])
    np.testing.assert_allclose(picture[:, 32:58], np.broadcast_to(person, (H, 26, 3)), atol=1)
    pale = picture[:, :29]
    assert (pale == pale[0, 0]).all()  # The background has no colour of its own,
    assert np.ptp(pale[0, 0]) == 0
    assert GREY < pale[0, 0, 0] < 235  # and is paler than the photo.
    assert len(np.unique(picture[:, 61:])) == 2  # Two kinds of stripes.
    assert (picture[:, 30] == 255).all()  # A white line between classes; none beside ignored pixels.
    assert not (picture[:, 58:62] == 255).all(axis=2).any()


def test_masks_without_background_colour_their_first_class() -> None:
    picture = np.asarray(with_mask(photo(), np.zeros((H, W), np.uint8), STREETS, side=W), int)
    np.testing.assert_allclose(picture[5, 5], 0.35 * (60 + 0.7 * GREY) + 0.65 * np.array(PALETTE[0]), atol=1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(40, 300))
def test_any_image_is_brought_to_the_side(height: int, width: int, side: int) -> None:
    mask = np.random.default_rng(height).integers(0, 21, (height, width)).astype(np.uint8)
    picture = with_mask(photo(height, width), mask, CLASS_NAMES, side=side)
    assert max(picture.size) == side
    assert min(picture.size) == max(1, round(min(height, width) * side / max(height, width)))
    boxes = with_boxes(photo(height, width), detections([[0, 0, width, height]], [0.9], [3]), CLASS_NAMES, side=side)
    assert boxes.size == picture.size


@pytest.mark.parametrize("scale", [1, 3])
def test_a_box_lies_where_it_is_in_the_image(scale: int) -> None:
    found = detections([[20, 25, 70, 50]], [0.93], [15])
    picture = with_boxes(photo(), found, CLASS_NAMES, side=scale * W)
    framed = has(picture, PALETTE[14])
    left, top, right, bottom = (scale * one for one in (20, 25, 70, 50))
    assert framed[bottom - 2 : bottom, left:right].all()  # Two pixels inside the box, from edge to edge,
    assert framed[top:bottom, left : left + 2].all()
    assert framed[top:bottom, right - 2 : right].all()
    assert not framed[bottom:].any()  # and none outside but of the name, which is above it.
    assert not framed[:, right + 60 :].any()
    assert framed[top - 10, left + 1]
    assert (np.asarray(picture)[top + 4 : bottom - 4, left + 4 : right - 4] == GREY).all()


def test_weak_detections_are_not_drawn_and_the_best_are_counted() -> None:
    boxes = [[3.0 * one, 10, 3.0 * one + 20, 40] for one in range(25)]
    plain = with_boxes(photo(), detections([], [], []), CLASS_NAMES)
    weak = with_boxes(photo(), detections(boxes, [0.29] * 25, [1] * 25), CLASS_NAMES)
    assert weak.tobytes() == plain.tobytes()  # Both say that there is nothing.
    assert not has(weak, PALETTE[0]).any()
    scores = [0.9] * 20 + [0.5] * 5
    best = with_boxes(photo(), detections(boxes, scores, [1] * 20 + [7] * 5), CLASS_NAMES)
    assert has(best, PALETTE[0]).any()
    assert not has(best, PALETTE[6]).any()
    all_of_them = with_boxes(photo(), detections(boxes, scores, [1] * 20 + [7] * 5), CLASS_NAMES, most=25)
    assert has(all_of_them, PALETTE[6]).any()


@pytest.mark.parametrize("compressed", [True, False])
def test_masks_of_truth_and_coco_runs_are_drawn_alike(compressed: bool) -> None:
    masks = np.zeros((1, H, W), np.uint8)
    masks[0, 25:50, 30:80], masks[0, 30:35, 40:44] = 1, 0
    boxes = [[30.0, 25, 80, 50]]
    of_truth = with_boxes(photo(), truth(boxes, [15], torch.from_numpy(masks)), CLASS_NAMES, side=W)
    runs = [coco.encode(np.asfortranarray(mask)) for mask in masks]
    if not compressed:
        runs = [{"size": [H, W], "counts": counts_of(mask)} for mask in masks]
    found = with_boxes(photo(), detections(boxes, [0.95], [15], runs), CLASS_NAMES, side=W)
    inner = slice(25, None)  # Below the name.
    np.testing.assert_array_equal(np.asarray(of_truth)[inner], np.asarray(found)[inner])
    expected = 0.55 * GREY + 0.45 * np.array(PALETTE[14])
    np.testing.assert_allclose(np.asarray(found, int)[40, 60], expected, atol=1)


def counts_of(mask: np.ndarray) -> list[int]:
    """COCO's runs: lengths of zeros, ones, zeros, ... down the columns."""
    flat = [0, *mask.T.ravel().tolist()]
    edges = [index for index in range(1, len(flat)) if flat[index] != flat[index - 1]]
    ends = [0, *(edge - 1 for edge in edges), len(flat) - 1]
    return [after - before for before, after in pairwise(ends)]


def test_difficult_objects_have_a_dashed_frame() -> None:
    boxes = [[20.0, 25, 70, 55]]
    whole = has(with_boxes(photo(), truth(boxes, [15]), CLASS_NAMES, side=W), PALETTE[14])
    dashed = has(with_boxes(photo(), truth(boxes, [15], difficult=1), CLASS_NAMES, side=W), PALETTE[14])
    assert whole[54, 20:70].all()
    assert 15 < dashed[54, 20:70].sum() < 40


def test_pictures_side_by_side_share_their_colours_and_a_legend() -> None:
    mask = np.zeros((H, W), np.uint8)
    mask[:, 40:] = 15
    other = np.where(mask == 15, 8, 0).astype(np.uint8)
    sheet = compared(photo(), {"truth": mask, "prediction, mIoU 10.0 %": other}, CLASS_NAMES, title="a.jpg", side=90)
    assert sheet.width == 3 * 90 + 4 * 10
    pixels = np.asarray(sheet)
    below = pixels[22 + H + 10 :]
    for number in (8, 15):
        assert has(Image.fromarray(below), PALETTE[number - 1]).sum() == 13 * 13
    assert (pixels[25:80, 12:98] == GREY).all()  # The image itself comes first, untouched.


def test_many_pictures_go_into_rows() -> None:
    masks: dict[str, Any] = {f"stage {number}": np.zeros((H, W), np.uint8) for number in range(6)}
    assert compared(photo(), masks, CLASS_NAMES, side=W, across=4).size == (4 * W + 5 * 10, 2 * (H + 22) + 10)


def test_a_legend_takes_as_many_lines_as_it_needs() -> None:
    mask = np.arange(H * W).reshape(H, W) % 21
    names = ("background", *(f"a name of a class that is rather long, number {number}" for number in range(20)))
    sheet = compared(photo(), {"truth": mask.astype(np.uint8)}, names, side=W)
    for colour in PALETTE:
        assert has(sheet, colour).sum() >= 13 * 13


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40))
def test_boxes_anywhere_can_be_drawn(seed: int, count: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    boxes = torch.randn((count, 4), generator=rng) * 60 + 40
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)
    labels = torch.randint(1, 21, (count,), generator=rng)
    found = Detections(boxes, torch.rand(count, generator=rng), labels)
    no = torch.zeros(count, dtype=torch.bool)
    sheet = compared(photo(), {"truth": Objects(boxes, labels, no, ~no), "found": found}, CLASS_NAMES, side=120)
    assert sheet.width == 3 * 120 + 4 * 10


def test_masks_without_pycocotools_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [coco.encode(np.asfortranarray(np.ones((H, W), np.uint8)))]
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(InputError, match=r"pip install \"deepcluster\[dense\]\""):
        with_boxes(photo(), detections([[0, 0, 9, 9]], [0.9], [1], runs), CLASS_NAMES)


# Colours


def as_seen(colours: np.ndarray) -> list[np.ndarray]:
    """OKLab of colours as seen by normal, deuteranopic and protanopic eyes (Ottosson 2020; Machado et al. 2009)."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    deuteranopia = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    protanopia = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    seen = (np.eye(3), np.array(deuteranopia), np.array(protanopia))
    return [np.cbrt((linear @ one.T).clip(0, 1) @ np.array(to_cones).T) @ np.array(to_lab).T for one in seen]


def closest(colours: np.ndarray) -> list[float]:
    distances = [np.linalg.norm(lab[:, None] - lab[None], axis=2) for lab in as_seen(colours)]
    return [float(one[~np.eye(len(colours), dtype=bool)].min()) for one in distances]


def test_colours_are_told_apart_by_most_eyes() -> None:
    ours, theirs = closest(np.array(PALETTE)), closest(voc_palette()[1:21])
    assert min(ours) == pytest.approx(0.079, abs=5e-4)
    assert min(theirs) == pytest.approx(0.006, abs=5e-4)


def test_names_contrast_with_their_colour() -> None:
    def light(colour: tuple[int, ...]) -> float:
        share = np.array(colour) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05

    for colour in PALETTE:
        low, high = sorted((light(colour), light(ink_on(colour))))
        assert high / low > 4.5  # WCAG 2, level AA


def test_colours_of_classes_stay_the_same_and_are_distinct() -> None:
    assert colours_of([0, 15, 255], CLASS_NAMES) == {15: PALETTE[14]}
    assert colours_of(range(21), CLASS_NAMES) == {number: PALETTE[number - 1] for number in range(1, 21)}
    assert colours_of([0], STREETS) == {0: PALETTE[0]}
    names = [f"class {number}" for number in range(133)]
    assert len(set(colours_of([0, 20, 40, 60, 61], names).values())) == 5
    assert len(colours_of(range(133), names)) == 133


def test_long_texts_are_cut() -> None:
    font = font_of(13)
    assert shortened("cat", font, 100) == "cat"
    cut = shortened("a very long name of a class\nin two lines", font, 100)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 100
    assert shortened("cat", font, 1) == ""
