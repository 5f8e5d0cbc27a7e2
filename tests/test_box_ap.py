"""Average precision of boxes: published worked examples, pycocotools, a naive reference, and VOC's own arithmetic."""

import contextlib
import io
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.dense import Detections, Objects
from deepcluster.evaluation.datasets.voc import open_voc
from deepcluster.evaluation.datasets.voc_boxes import CLASS_NAMES, objects_of
from deepcluster.evaluation.measures.boxes import (
    IOUS,
    area_under_envelope,
    box_precisions,
    iou_of,
    precision_at_points,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
NAMES = ("background", "cat", "dog", "cow")
Box = tuple[float, float, float, float]
Pair = tuple[Detections, Objects]


def objects(*rows: tuple[int, Box], difficult: Sequence[int] = ()) -> Objects:
    """Objects of a class and a box; those at the rows `difficult` are so."""
    boxes_M4 = torch.tensor([box for _, box in rows], dtype=torch.float32).reshape(-1, 4)
    difficult_M = torch.tensor([row in difficult for row in range(len(rows))], dtype=torch.bool)
    labels_M = torch.tensor([label for label, _ in rows], dtype=torch.int64)
    return Objects(boxes_M4, labels_M, difficult_M, torch.zeros_like(difficult_M))


def detections(*rows: tuple[int, float, Box]) -> Detections:
    """Detections of a class, a score and a box, by descending score."""
    rows = tuple(sorted(rows, key=lambda row: -row[1]))
    boxes_D4 = torch.tensor([box for *_, box in rows], dtype=torch.float32).reshape(-1, 4)
    scores_D = torch.tensor([score for _, score, _ in rows], dtype=torch.float32)
    return Detections(boxes_D4, scores_D, torch.tensor([label for label, *_ in rows], dtype=torch.int64))


def truth_as_found(truth: Objects, scores_D: torch.Tensor | None = None) -> Detections:
    scores_D = torch.linspace(1, 0.5, len(truth.labels_M)) if scores_D is None else scores_D
    return Detections(truth.boxes_M4, scores_D, truth.labels_M)


def test_two_objects_by_hand() -> None:
    """Scores .9 right, .8 wrong, .7 right: precision 1, 1/2, 2/3; recall 1/2 reaches six of the 11 points."""
    truth = objects((1, (0, 0, 10, 10)), (1, (20, 0, 30, 10)))
    found = detections((1, 0.9, (0, 0, 10, 10)), (1, 0.8, (50, 0, 60, 10)), (1, 0.7, (20, 0, 30, 10)))
    result = box_precisions([(found, truth)], NAMES)
    assert result.ious == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    for iou in (*IOUS, None):
        assert result.mean(iou) == pytest.approx(28 / 33, abs=1e-15)
        assert result.mean(iou, area=True) == pytest.approx(5 / 6, abs=1e-15)
    assert result.by_class(0.5).keys() == {"cat"}
    assert result.left_out == ("dog", "cow")


# Of each image: left, top, width and height of its objects, and of its detections with their scores. The numbers are from
# rafaelpadilla/Object-Detection-Metrics (MIT licence), samples/sample_2; its README works it out. The last pixels belong to
# the boxes, as VOC's.
PUBLISHED: tuple[tuple[str, str], ...] = (
    ("25 16 38 56, 129 123 41 62", ".88 5 67 31 48, .70 119 111 40 67, .80 124 9 49 67"),
    ("123 11 43 55, 38 132 59 45", ".71 64 111 64 58, .54 26 140 60 47, .74 19 18 43 35"),
    (
        "16 14 35 48, 123 30 49 44, 99 139 47 47",
        ".18 109 15 77 39, .67 86 63 46 45, .38 160 62 36 53, .91 105 131 47 47, .44 18 148 40 44",
    ),
    ("53 42 40 52, 154 43 31 34", ".35 83 28 28 26, .78 28 68 42 67, .45 87 89 25 39, .14 10 155 60 26"),
    ("59 31 44 51, 48 128 34 52", ".62 50 38 28 46, .44 95 11 53 28, .95 29 131 72 29, .23 29 163 72 29"),
    ("36 89 52 76, 62 58 44 67", ".45 43 48 74 38, .84 17 155 29 35, .43 95 110 25 42"),
    ("28 31 55 63, 58 67 50 58", ".48 16 20 101 88, .95 33 116 37 49"),
)


def published_pairs() -> list[Pair]:
    def box(left: float, top: float, width: float, height: float) -> Box:
        return left, top, left + width + 1, top + height + 1

    pairs = []
    for truth, found in PUBLISHED:
        numbers = [[float(one) for one in row.split()] for row in found.split(", ")]
        rows = [(1, box(*(float(one) for one in row.split()))) for row in truth.split(", ")]
        pairs.append((detections(*((1, score, box(*rest)) for score, *rest in numbers)), objects(*rows)))
    return pairs


@pytest.mark.parametrize(
    ("iou", "area", "points"),
    [
        # Other programs find 1/3 with 11 points at 0.1, because their 0.6 is 0.6000000000000001, which 9 of 15 don't reach.
        (0.1, 0.3371980676, 0.3689064559),
        (0.3, 0.2456866804, 0.2683982684),
        (0.5, 0.0222222222, 0.0303030303),
        (0.75, 0, 0),
    ],
)
def test_a_published_example(iou: float, area: float, points: float) -> None:
    """7 images, 15 objects, 24 detections: 24.56 % and 26.84 % at 0.3, as its README says."""
    pairs = published_pairs()
    assert sum(len(truth.labels_M) for _, truth in pairs) == 15
    assert sum(len(found.labels_D) for found, _ in pairs) == 24
    result = box_precisions(pairs, NAMES[:2], ious=[iou])
    assert result.mean(iou, area=True) == pytest.approx(area, abs=1e-10)
    assert result.mean(iou) == pytest.approx(points, abs=1e-10)


def test_recalls_are_whole_numbers() -> None:
    """3 of 10 reach 0.3, 6 of 10 reach 0.6, 7 of 10 reach 0.7, which sums of 0.1 are above."""
    for found in range(11):
        assert precision_at_points(np.ones(found, dtype=bool), 10) == pytest.approx((found + 1) / 11 if found else 0)
        assert precision_at_points(np.ones(found, dtype=bool), 10, 101) == pytest.approx(
            (10 * found + 1) / 101 if found else 0
        )


def test_nothing_found() -> None:
    truth, nothing = objects((1, (0, 0, 9, 9))), detections()
    result = box_precisions([(nothing, truth)], NAMES)
    assert result.mean() == result.mean(area=True) == 0
    assert precision_at_points(np.zeros(3, dtype=bool), 2) == area_under_envelope(np.zeros(3, dtype=bool), 2) == 0


def test_one_match_per_object() -> None:
    """The second hit of an object is wrong; so is one of the best object, taken by now, though another is hit, too."""
    truth = objects((1, (0, 0, 10, 10)), (1, (0, 0, 10, 12)))
    found = detections((1, 0.9, (0, 0, 10, 10)), (1, 0.8, (0, 0, 10, 10.5)))
    result = box_precisions([(found, truth)], NAMES, ious=[0.5])
    assert result.mean(0.5, area=True) == 0.5, "COCO would match the second with the other object: 1"
    doubled = detections((1, 0.9, (0, 0, 10, 10)), (1, 0.8, (0, 0, 10, 10)), (1, 0.7, (0, 0, 10, 12)))
    assert box_precisions([(doubled, truth)], NAMES, ious=[0.5]).mean(0.5, area=True) == pytest.approx((1 + 2 / 3) / 2)


def test_difficult_objects_count_neither_way() -> None:
    truth = objects((1, (0, 0, 10, 10)), (1, (20, 0, 30, 10)), (2, (0, 0, 5, 5)), difficult=(1, 2))
    right, on_difficult = (1, 0.5, (0, 0, 10, 10)), (1, 0.9, (20, 0, 30, 10))
    for rows in ([right], [right, on_difficult], [right, on_difficult, on_difficult], [right, (2, 0.9, (0, 0, 5, 5))]):
        result = box_precisions([(detections(*rows), truth)], NAMES)
        assert result.by_class(area=True) == {"cat": 1}
        assert result.left_out == ("dog", "cow"), "all of a class are difficult"
    beside = detections((1, 0.9, (14, 0, 24, 10)), right)
    assert box_precisions([(beside, truth)], NAMES, ious=[0.5]).mean(0.5, area=True) == 0.5, "too far off is wrong"
    crowd = Objects(truth.boxes_M4, truth.labels_M, torch.zeros(3, dtype=torch.bool), truth.difficult_M)
    assert box_precisions([(detections(right, on_difficult), crowd)], NAMES).by_class(area=True) == {"cat": 1}


def test_thresholds_are_reached_exactly() -> None:
    """An IoU of 11/20 reaches 0.55, as any other of the ten does its threshold."""
    assert np.array_equal(np.round(np.array(IOUS) * 20), np.arange(10, 20))
    for number, iou in enumerate(IOUS):
        truth, found = objects((1, (3, 5, 23, 105))), detections((1, 0.9, (3, 5, 13 + number, 105)))
        result = box_precisions([(found, truth)], NAMES)
        assert [result.mean(one) for one in IOUS] == [float(one <= iou) for one in IOUS]


@given(st.lists(st.tuples(*[st.integers(1, 500)] * 4), min_size=2, max_size=2))
def test_iou_is_that_of_voc_for_boxes_in_its_files(boxes: list[tuple[int, int, int, int]]) -> None:
    """Of whole pixels from 1 on, the last included: VOC adds 1 to the sides, we take 1 off left and top."""
    a, b = (tuple(order(one[side], one[side + 2]) for order in (min, max) for side in (0, 1)) for one in boxes)
    across, down = (min(a[2 + side], b[2 + side]) - max(a[side], b[side]) + 1 for side in (0, 1))
    inner = max(across, 0) * max(down, 0)
    areas = [(one[2] - one[0] + 1) * (one[3] - one[1] + 1) for one in (a, b)]
    ours = [np.array([[one[0] - 1, one[1] - 1, one[2], one[3]]], dtype=np.float32) for one in (a, b)]
    assert iou_of(*ours).item() == inner / (sum(areas) - inner)


def test_equal_scores_come_in_the_order_of_the_images() -> None:
    """As a stable sort ranks them, which the devkit's and pycocotools' are."""
    truth = objects((1, (0, 0, 10, 10)))
    right, wrong = detections((1, 0.5, (0, 0, 10, 10))), detections((1, 0.5, (90, 0, 99, 10)))
    areas = [
        box_precisions(pairs, NAMES, ious=[0.5]).mean(0.5, area=True)
        for pairs in ([(right, truth), (wrong, objects())], [(wrong, objects()), (right, truth)])
    ]
    assert areas == [1, 0.5]


def test_wrong_input_is_told() -> None:
    truth = objects((1, (0, 0, 10, 10)), difficult=[0])
    with pytest.raises(InputError, match="none of the 3 classes has an object that counts"):
        box_precisions([(detections(), truth)], NAMES)
    with pytest.raises(InputError, match="there are no images"):
        box_precisions([], NAMES)
    good = (1, 0.9, (0, 0, 10, 10))
    for bad in ((1, float("nan"), (0, 0, 1, 1)), (1, 0.5, (0, 0, float("inf"), 1))):
        with pytest.raises(InputError, match="1 of 2 detections in an image have a score or a box that is no finite number"):
            box_precisions([(detections(good, bad), truth)], NAMES)


def naive(pairs: Sequence[Pair], label: int, iou: float) -> tuple[Fraction, Fraction] | None:
    """Average precision at 11 points and the area, as the devkit computes them, one detection after the other."""
    ranked = [
        (float(score), image, box)
        for image, (found, _) in enumerate(pairs)
        for score, box, one in zip(found.scores_D, found.boxes_D4.tolist(), found.labels_D, strict=True)
        if one == label
    ]
    ranked.sort(key=lambda row: -row[0])
    positives = sum(int(((truth.labels_M == label) & ~truth.difficult_M).sum()) for _, truth in pairs)
    if not positives:
        return None
    taken, curve, right, wrong = set[tuple[int, int]](), [(Fraction(0), Fraction(0))], 0, 0
    for _, image, box in ranked:
        truth, best, at = pairs[image][1], Fraction(-1), -1
        for row, other in enumerate(truth.boxes_M4.tolist()):
            across, down = (min(box[2 + side], other[2 + side]) - max(box[side], other[side]) for side in (0, 1))
            inner = Fraction(max(across, 0)) * Fraction(max(down, 0))
            areas = [Fraction(max(one[2] - one[0], 0)) * Fraction(max(one[3] - one[1], 0)) for one in (box, other)]
            overlap = inner / (sum(areas) - inner)
            if truth.labels_M[row] == label and overlap > best:
                best, at = overlap, row
        if best >= Fraction(iou).limit_denominator(100):
            if truth.difficult_M[at]:
                continue
            right, wrong = (right, wrong + 1) if (image, at) in taken else (right + 1, wrong)
            taken.add((image, at))
        else:
            wrong += 1
        curve.append((Fraction(right, positives), Fraction(right, right + wrong)))
    points = [max((p for r, p in curve if r >= Fraction(tenth, 10)), default=Fraction(0)) for tenth in range(11)]
    steps = [(r - before) * max(p for s, p in curve if s >= r) for (before, _), (r, _) in pairwise(curve)]
    return sum(points, Fraction(0)) / 11, sum(steps, Fraction(0))


sides = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4))
boxes = sides.map(lambda one: (one[0], one[1], one[0] + one[2], one[1] + one[3]))
labels = st.integers(1, 3)
truths = st.lists(st.tuples(labels, boxes, st.booleans()), max_size=4).map(
    lambda rows: objects(*(row[:2] for row in rows), difficult=[at for at, row in enumerate(rows) if row[2]])
)
founds = st.lists(st.tuples(labels, st.integers(1, 4).map(lambda score: score / 4), boxes), max_size=6).map(
    lambda rows: detections(*rows)
)


@given(st.lists(st.tuples(founds, truths), min_size=1, max_size=4), st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.75, 1.0]))
def test_it_equals_a_naive_reference(pairs: list[Pair], iou: float) -> None:
    """Whatever the ties, duplicates, classes without objects, images without objects or detections, difficult objects."""
    expected = {NAMES[label]: naive(pairs, label, iou) for label in (1, 2, 3)}
    known = {name: values for name, values in expected.items() if values is not None}
    if not known:
        with pytest.raises(InputError, match="none of the 3 classes"):
            box_precisions(pairs, NAMES, ious=[iou])
        return
    result = box_precisions(pairs, NAMES, ious=[iou])
    assert result.by_class(iou) == pytest.approx({name: float(points) for name, (points, _) in known.items()}, abs=1e-12)
    assert result.by_class(iou, area=True) == pytest.approx({name: float(a) for name, (_, a) in known.items()}, abs=1e-12)
    assert result.left_out == tuple(name for name in NAMES[1:] if name not in known)


def random_pairs(seed: int, images: int = 12) -> list[Pair]:
    """Objects that do not overlap, and detections near them and elsewhere: there the rules of VOC and COCO agree."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(images):
        cells = rng.permutation(25)[: rng.integers(0, 8)]
        corners_M2 = np.stack([cells % 5, cells // 5], 1) * 40.0 + rng.uniform(0, 10, (len(cells), 2))
        boxes_M4 = np.hstack([corners_M2, corners_M2 + rng.uniform(10, 29, (len(cells), 2))])
        labels_M = rng.integers(1, 4, len(cells))
        truth = objects(*((int(label), tuple(box)) for label, box in zip(labels_M, boxes_M4, strict=True)))
        near = [
            (int(label), float(rng.integers(1, 30) / 30), tuple(box + rng.normal(0, 3, 4)))
            for label, box in zip(labels_M, boxes_M4, strict=True)
            for _ in range(rng.integers(0, 4))
        ]
        far = [(int(rng.integers(1, 4)), float(rng.random()), (x, x, x + 30, x + 20)) for x in rng.uniform(0, 170, 5)]
        pairs.append((detections(*near, *far), truth))
    return pairs


def of_pycocotools(pairs: Sequence[Pair], n_classes: int, points: int) -> np.ndarray[Any, Any]:
    """Average precision (C, T) by pycocotools; -1 for classes without objects."""
    coco, cocoeval = (pytest.importorskip(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    annotations, results = [], []
    for image, (found, truth) in enumerate(pairs):
        for box, label in zip(truth.boxes_M4.double().tolist(), truth.labels_M.tolist(), strict=True):
            xywh = [*box[:2], box[2] - box[0], box[3] - box[1]]
            one = {"bbox": xywh, "area": xywh[2] * xywh[3], "iscrowd": 0, "id": len(annotations) + 1}
            annotations.append({**one, "image_id": image, "category_id": label})
        rows = zip(found.boxes_D4.double().tolist(), found.scores_D.tolist(), found.labels_D.tolist(), strict=True)
        for box, score, label in rows:
            xywh = [*box[:2], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": image, "category_id": label, "bbox": xywh, "score": score})
    truth_of_all = coco.COCO()
    truth_of_all.dataset = {
        "images": [{"id": image} for image in range(len(pairs))],
        "annotations": annotations,
        "categories": [{"id": number} for number in range(1, n_classes + 1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth_of_all.createIndex()
        evaluation = cocoeval.COCOeval(truth_of_all, truth_of_all.loadRes(results), "bbox")
        # A little less, so that 6 of 10 reach 0.6.
        evaluation.params.recThrs = np.linspace(0, 1, points) - 1e-9
        evaluation.params.maxDets = [10_000]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"][..., 0, 0].mean(axis=1).T)  # of (T, R, C, areas, limits)


@pytest.mark.parametrize("points", [11, 101])
@pytest.mark.parametrize("seed", range(4))
def test_it_equals_pycocotools_where_the_rules_agree(seed: int, points: int) -> None:
    pairs = random_pairs(seed)
    result = box_precisions(pairs, NAMES, points=points)
    assert result.classes == NAMES[1:]
    np.testing.assert_allclose(result.points_CT, of_pycocotools(pairs, 3, points), rtol=0, atol=1e-12)
    assert 0 < result.mean() < result.mean(0.5) < 1


def of_devkit(name: str, split: str) -> list[Objects]:
    if not (SHARED / name).is_dir():
        pytest.skip("no shared data")
    data = objects_of(open_voc(SHARED / name), split)
    return [data.read_objects(index, False) for index in range(len(data))]


@pytest.mark.parametrize(("name", "split"), [("voc2012-mini", "trainval"), ("voc-from-coco", "test")])
def test_real_truth_as_detections(name: str, split: str) -> None:
    """All is right; detections of difficult objects and duplicates of less score change nothing; of equal score they do."""
    all_objects = of_devkit(name, split)
    exact = [(truth_as_found(truth), truth) for truth in all_objects]
    result = box_precisions(exact, CLASS_NAMES)
    assert set(result.by_class().values()) == set(result.by_class(area=True).values()) == {1.0}
    assert result.left_out == (() if name == "voc2012-mini" else ("cow", "sheep"))
    assert sum(int(truth.difficult_M.sum()) for truth in all_objects) > 20, "they were among the detections"

    def twice(truth: Objects, scores_2: tuple[float, float]) -> Detections:
        count = len(truth.labels_M)
        scores_D = torch.tensor(scores_2).repeat_interleave(count)
        return Detections(truth.boxes_M4.repeat(2, 1), scores_D, truth.labels_M.repeat(2))

    lower = box_precisions([(twice(truth, (0.9, 0.1)), truth) for truth in all_objects], CLASS_NAMES)
    assert lower.mean() == lower.mean(area=True) == 1
    equal = box_precisions([(twice(truth, (0.9, 0.9)), truth) for truth in all_objects], CLASS_NAMES)
    assert 0.5 < equal.mean(area=True) < 1
    assert equal.mean() < 1


def test_real_objects_against_pycocotools() -> None:
    """Boxes of real objects, those left out that overlap another of their class, found not quite where they are."""
    rng = np.random.default_rng(5)
    pairs = []
    for truth in of_devkit("voc2012-mini", "trainval"):
        boxes_M4, kept = truth.boxes_M4.numpy(), list[int]()
        for row in range(len(boxes_M4)):
            same = [other for other in kept if truth.labels_M[other] == truth.labels_M[row]]
            if not iou_of(boxes_M4[row : row + 1], boxes_M4[same]).any():
                kept.append(row)
        none_M = torch.zeros(len(kept), dtype=torch.bool)
        labels_M = truth.labels_M[kept]
        sides_M2 = truth.boxes_M4[kept, 2:] - truth.boxes_M4[kept, :2]
        shifts_M4 = torch.from_numpy(rng.uniform(-0.2, 0.2, (len(kept), 4)).astype(np.float32))
        moved_M4 = truth.boxes_M4[kept] + shifts_M4 * sides_M2.repeat(1, 2)
        scores_M = torch.from_numpy(rng.random(len(kept)).astype(np.float32))
        order_M = scores_M.argsort(descending=True)
        found = Detections(moved_M4[order_M], scores_M[order_M], labels_M[order_M])
        pairs.append((found, Objects(truth.boxes_M4[kept], labels_M, none_M, none_M)))
    result = box_precisions(pairs, CLASS_NAMES, points=101)
    assert 0.2 < result.mean() < 0.95
    np.testing.assert_allclose(result.points_CT, of_pycocotools(pairs, 20, 101), rtol=0, atol=1e-12)
