"""The reader of COCO folders and its average precision, against pycocotools, worked cases and what is known of the truth."""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cocos import file_of, write_coco, write_json
from pycocotools import mask as tools
from pycocotools.coco import COCO

from deepcluster.core.errors import InputError
from deepcluster.data.decode import decode
from deepcluster.evaluation.datasets.coco import check_same_classes, is_coco, open_coco, read_coco
from deepcluster.evaluation.datasets.coco_json import _runs
from deepcluster.evaluation.datasets.dense import Detections, ObjectSet
from deepcluster.evaluation.measures.coco import coco_precisions

MINI = Path(__file__).parents[2] / "shared" / "data" / "coco-mini"
needs_mini = pytest.mark.skipif(not MINI.is_dir(), reason="no ../shared/data here")
FOLDERS = [pytest.param("drawn"), pytest.param("mini", marks=needs_mini)]


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco")


def theirs(file: Path) -> Any:
    with redirect_stdout(StringIO()):
        return COCO(str(file))


def changed(folder: Path, change: Callable[[dict[str, Any]], object], part: str = "train2017") -> ObjectSet:
    """The part after a change of its file."""
    content = json.loads(file_of(folder, part).read_text())
    change(content)
    write_json(folder, part, content)
    return read_coco(open_coco(folder).train if part == "train2017" else open_coco(folder).val)


@pytest.mark.parametrize("which", FOLDERS)
def test_objects_are_those_that_pycocotools_reads(tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Boxes, classes, crowds and masks of every image, in the three encodings of masks."""
    folder = open_coco(MINI if which == "mini" else write_coco(tmp_path))
    for part in (folder.train, folder.val):
        data, known = read_coco(part), theirs(part.annotations)
        encodings = {type(one["segmentation"]) for one in known.dataset["annotations"]}
        assert encodings == {list, dict}
        assert data.notes == ()
        for index, image in enumerate(known.dataset["images"][:8]):
            assert data.source.name(index) == image["file_name"]
            assert decode(data.source.read(index)).shape == (image["height"], image["width"], 3)
            found, want = data.read_objects(index, True), known.imgToAnns[image["id"]]
            boxes = np.array([one["bbox"] for one in want], np.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            np.testing.assert_array_equal(found.boxes_M4, boxes)
            assert found.boxes_M4.dtype == torch.float32
            names = [known.cats[one["category_id"]]["name"] for one in want]
            assert [data.class_names[label] for label in found.labels_M.tolist()] == names
            assert found.crowd_M.tolist() == [bool(one["iscrowd"]) for one in want]
            assert not found.difficult_M.any()
            assert found.masks_MHW is not None
            assert found.masks_MHW.shape == (len(want), image["height"], image["width"])
            for mask_HW, one in zip(found.masks_MHW, want, strict=True):
                np.testing.assert_array_equal(mask_HW, known.annToMask(one))
            assert data.read_objects(index, False).masks_MHW is None
    assert not capsys.readouterr().out


def test_categories_with_gaps_are_numbered_by_id(drawn: Path) -> None:
    folder = open_coco(drawn)
    train, val = read_coco(folder.train), read_coco(folder.val)
    assert train.class_names == ("background", "disc", "square", "never")
    assert train.category_ids == (-1, 3, 7, 90)
    assert (train.name, val.name) == ("coco train2017", "coco val2017")
    check_same_classes(train, val)
    assert len(train.read_objects(3, True).labels_M) == 0
    other = changed(drawn, lambda content: content["categories"].append({"id": 4, "name": "star"}), "val2017")
    with pytest.raises(InputError, match="not the same: only one of them has star"):
        check_same_classes(train, other)


def test_a_set_without_masks_or_read_without(tmp_path: Path, drawn: Path) -> None:
    bare, unread = (
        read_coco(open_coco(write_coco(tmp_path / "b", masks=False)).train),
        read_coco(open_coco(drawn).train, masks=False),
    )
    for data in (bare, unread):
        assert not data.has_masks
        assert data.notes == ()
        with pytest.raises(InputError, match="boxes only"):
            data.read_objects(0, True)
    assert (
        unread.read_objects(0, False).labels_M.tolist()
        == read_coco(open_coco(drawn).train).read_objects(0, False).labels_M.tolist()
    )


def test_boxes_are_clipped_and_bad_objects_are_left_out_and_counted(drawn: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        first, image = content["annotations"][0], content["images"][0]
        content["annotations"] = [
            {**first, "bbox": [-5, -6, image["width"] + 50, 10.5]},
            {**first, "bbox": [1, 1, 0, 5]},
            {**first, "bbox": [image["width"] + 1, 1, 5, 5]},
            {**first, "bbox": [1, 1, -3, 5]},
            {**first, "bbox": [1, 1, float("inf"), 5]},
            {**first, "bbox": None},
            {**first, "category_id": 4},
            {**first, "category_id": [3]},
            {**first, "image_id": "none"},
            {**first, "image_id": []},
            {**first, "segmentation": [[1, 1, 2, 2]]},
            {**first, "segmentation": [[1, 1, 2, 2, 1e12, 3]]},
            {**first, "segmentation": {"size": [1, 1], "counts": [1]}},
            {**first, "segmentation": {"size": [image["height"], image["width"]], "counts": [5, -5]}},
            {**first, "segmentation": {"size": [image["height"], image["width"]], "counts": ""}},
            {**first, "segmentation": {"size": [image["height"], image["width"]], "counts": "0" * 9999}},
        ]

    data = changed(drawn, spoil)
    assert len(data) == 4
    found = data.read_objects(0, True)
    assert found.boxes_M4.tolist() == [[0.0, 0.0, data.coco.dataset["images"][0]["width"], 4.5]]
    (note,) = data.notes
    assert note.startswith("coco train2017: 15 objects left out, ")
    assert "3 with an empty box, or one outside of the image" in note
    assert "2 without a box of four numbers" in note
    assert "2 of categories that are not listed" in note
    assert "2 of images that are not listed" in note
    assert "6 without a mask that can be used" in note


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_compressed_masks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask_HW = (rng.random((rng.integers(1, 60), rng.integers(1, 900))) < rng.choice([0.01, 0.5, 1.0])).astype(np.uint8)
    runs = _runs(tools.encode(np.asfortranarray(mask_HW))["counts"].decode())
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    np.testing.assert_array_equal(flat, mask_HW.T.ravel())


def test_missing_fields_are_filled(drawn: Path) -> None:
    """Some exports have no area and no iscrowd, which the test needs."""

    def strip(content: dict[str, Any]) -> None:
        for one in content["annotations"]:
            del one["area"], one["iscrowd"]

    areas = [one["area"] for one in read_coco(open_coco(drawn).train).coco.dataset["annotations"]]
    data = changed(drawn, strip)
    assert [one["area"] for one in data.coco.dataset["annotations"]] == areas
    assert coco_precisions(data, truth(data), masks=True).ap == 1


@pytest.mark.parametrize("layout", ["images", "flat", "year", "plain", "export"])
def test_layouts(tmp_path: Path, drawn: Path, layout: str) -> None:
    root = tmp_path / "other"
    root.mkdir()
    year = "2014" if layout == "year" else "" if layout == "plain" else "2017"
    for part, exported in (("train", "train"), ("val", "valid")):
        file, folder = file_of(drawn, f"{part}2017"), drawn / f"{part}2017"
        inside = {"images": f"images/{part}2017", "flat": "", "year": f"{part}2014", "plain": f"images/{part}"}.get(
            layout, exported
        )
        shutil.copytree(folder, root / inside, dirs_exist_ok=True)
        target = (
            root / exported / "_annotations.coco.json"
            if layout == "export"
            else root / f"annotations/instances_{part}{year}.json"
        )
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    folder = open_coco(root)
    assert is_coco(root)
    assert len(read_coco(folder.train)) == 4
    assert len(read_coco(folder.val).source.read(0)) > 0


def test_of_several_years_2017_is_taken(drawn: Path) -> None:
    for part in ("train", "val"):
        shutil.copy(file_of(drawn, f"{part}2017"), file_of(drawn, f"{part}2018"))
    assert open_coco(drawn).train.annotations.name == "instances_train2017.json"


def test_a_folder_that_is_no_coco_folder(tmp_path: Path, drawn: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"looked for annotations/instances_train2017\.json and .*; it is empty"):
        open_coco(tmp_path / "empty")
    file_of(drawn, "val2017").unlink()
    with pytest.raises(InputError, match=r"only annotations/instances_train2017\.json of two parts"):
        open_coco(drawn)
    assert not is_coco(drawn)
    assert not is_coco(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"does not parse as JSON: it is empty"),
        (b"\x1f\x8b\x08\x00", r"does not parse as JSON: it is"),
        (b'{"images": [', r"does not parse as JSON: .*unpack the annotations again"),
        (b"[" * 100_000, r"does not parse as JSON"),
        (b"[]", r"no list of images and no list of annotations and no list of categories"),
        (b'{"images": [], "annotations": [], "categories": []}', r"the list of images is empty"),
        (b'{"images": [{}], "annotations": [{"caption": "a"}]}', r"no instances of COCO: it has captions"),
        (b'{"images": [{}], "annotations": [{"segments_info": []}], "categories": [{}]}', r"it has panoptic"),
        (b'{"images": [{}], "annotations": [{}], "categories": [{}]}', r"image 1 of the list needs id, file_name"),
        (b'{"images": [1], "annotations": [{}], "categories": [{}]}', r"no list of images"),
    ],
)
def test_files_that_hold_no_instances(drawn: Path, content: bytes, message: str) -> None:
    file_of(drawn, "train2017").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_coco(open_coco(drawn).train)


def test_lists_that_contradict_themselves(drawn: Path) -> None:
    text = file_of(drawn, "train2017").read_text()
    for message, change in {
        "1 image of the list have the id of another: 100": lambda c: c["images"][1].update(id=100),
        "have the file_name of another": lambda c: c["images"][1].update(file_name="000000000000.png"),
        "the name disc is of two categories": lambda c: c["categories"][0].update(name="disc"),
        "category 1 of the list needs a number id": lambda c: c["categories"][0].update(id="a"),
        "no object can be used; coco train2017: 8 objects left out, 8 of images": lambda c: [
            one.update(image_id=-7) for one in c["annotations"]
        ],
    }.items():
        file_of(drawn, "train2017").write_text(text)
        with pytest.raises(InputError, match=message):
            changed(drawn, change)


def test_images_that_are_not_there(drawn: Path) -> None:
    (drawn / "train2017" / "000000000001.png").unlink()
    with pytest.raises(InputError, match=r"train2017 lacks 1 of the 4 images that .*: 000000000001.png; unpack"):
        read_coco(open_coco(drawn).train)
    shutil.rmtree(drawn / "train2017")
    with pytest.raises(InputError, match=r"lacks 4 of the 4 images"):
        read_coco(open_coco(drawn).train)


def test_without_pycocotools(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert is_coco(drawn)
    with pytest.raises(InputError, match=r'pip install "deepcluster\[dense\]"'):
        read_coco(open_coco(drawn).train)


def truth(data: ObjectSet, *, crowd: bool = True, seed: int = 0) -> list[Detections]:
    """The objects themselves as detections, with random scores."""
    random, found = torch.Generator().manual_seed(seed), []
    for index in range(len(data)):
        objects = data.read_objects(index, data.has_masks)
        chosen = ~objects.crowd_M | crowd
        masks = None
        if objects.masks_MHW is not None:
            masks = [tools.encode(np.asfortranarray(mask_HW.numpy())) for mask_HW in objects.masks_MHW[chosen]]
        scores = torch.rand(int(chosen.sum()), generator=random)
        found.append(Detections(objects.boxes_M4[chosen], scores, objects.labels_M[chosen], masks))
    return found


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("crowd", [True, False])
def test_the_truth_as_detections_is_perfect(
    drawn: Path, *, crowd: bool, masks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With detections of crowds, which are ignored, or without."""
    data = read_coco(open_coco(drawn).train)
    found = coco_precisions(data, truth(data, crowd=crowd), masks=masks)
    assert [found.ap, found.ap50, found.ap75, found.ap_small, found.ar100] == pytest.approx([1] * 5)
    assert found.by_class == pytest.approx({"disc": 1, "square": 1})
    assert found.without_objects == ["never"]
    assert np.isnan(found.ap_large)
    assert not capsys.readouterr().out


@needs_mini
@pytest.mark.parametrize("masks", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("crowd", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("part", "recall"), [("train", 0.625), ("val", 0.696)])
def test_the_truth_of_real_images_is_perfect(part: str, recall: float, *, crowd: bool, masks: bool) -> None:
    data = read_coco(getattr(open_coco(MINI), part))
    found = coco_precisions(data, truth(data, crowd=crowd), masks=masks)
    numbers = [found.ap, found.ap50, found.ap75, found.ap_small, found.ap_medium, found.ap_large, found.ar100]
    assert numbers == pytest.approx([1] * 7)
    assert {*found.by_class, *found.without_objects} == {*data.class_names[1:]}
    assert found.ar1 == pytest.approx(recall, abs=5e-4)


def spoiled(data: ObjectSet, seed: int) -> list[Detections]:
    """The truth with shifted boxes, some other classes, and false detections; in order of the scores."""
    rng, found = np.random.default_rng(seed), []
    for one in truth(data, seed=seed):
        boxes, labels = [], []
        for box, label in zip(one.boxes_D4.numpy(), one.labels_D.tolist(), strict=True):
            for _ in range(int(rng.integers(0, 3))):
                boxes.append(box + rng.normal(0, 3, 4))
                labels.append(label if rng.random() < 0.8 else int(rng.integers(1, 4)))
        scores = np.sort(rng.random(len(boxes)))[::-1].astype(np.float32).copy()
        corners = np.array(boxes, np.float32).reshape(-1, 4)
        found.append(
            Detections(torch.from_numpy(corners), torch.from_numpy(scores), torch.tensor(labels, dtype=torch.int64))
        )
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_detections_and_images_changes_nothing(tmp_path: Path, seed: int) -> None:
    data = read_coco(open_coco(write_coco(tmp_path, train=12, seed=seed)).train)
    found = spoiled(data, seed)
    want, rng = coco_precisions(data, found), np.random.default_rng(seed)
    assert 0 < want.ap < 1
    shuffled = []
    for one in found:
        order = torch.from_numpy(rng.permutation(len(one.scores_D)))
        shuffled.append(Detections(one.boxes_D4[order], one.scores_D[order], one.labels_D[order]))
    assert coco_precisions(data, shuffled) == want
    images = rng.permutation(len(data)).tolist()
    assert coco_precisions(data, [found[index] for index in images], images=images) == want


def test_it_is_what_pycocotools_reports_of_the_files(tmp_path: Path) -> None:
    """Its own way: annotations and results from JSON files. (Ids from 1: it never matches an annotation with id 0.)"""
    from pycocotools.cocoeval import COCOeval

    folder = write_coco(tmp_path, train=12)
    data = changed(folder, lambda content: [one.update(id=one["id"] + 1) for one in content["annotations"]])
    found = spoiled(data, 5)
    results = [
        {
            "image_id": data.coco.dataset["images"][index]["id"],
            "category_id": data.category_ids[label],
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        for index, one in enumerate(found)
        for (left, top, right, bottom), score, label in zip(
            one.boxes_D4.tolist(), one.scores_D.tolist(), one.labels_D.tolist(), strict=True
        )
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with redirect_stdout(StringIO()):
        known = theirs(file_of(folder, "train2017"))
        test = COCOeval(known, known.loadRes(str(tmp_path / "results.json")), "bbox")
        test.evaluate()
        test.accumulate()
        test.summarize()
    ours = coco_precisions(data, found)
    assert [ours.ap, ours.ap50, ours.ap75, ours.ap_small] == test.stats[:4].tolist()
    assert [ours.ar1, ours.ar10, ours.ar100] == test.stats[6:9].tolist()


def by_hand(tmp_path: Path, crowd: bool = False) -> ObjectSet:
    """Two squares in one image; as the second a crowd, if asked for."""
    folder = write_coco(tmp_path, train=1, val=1)

    def change(content: dict[str, Any]) -> None:
        content["annotations"] = [
            {"id": 0, "image_id": 100, "category_id": 7, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 1, "image_id": 100, "category_id": 7, "bbox": [30, 30, 20, 20], "area": 400, "iscrowd": int(crowd)},
        ]

    return changed(folder, change)


def detections(*found: tuple[tuple[float, ...], float, int]) -> list[Detections]:
    boxes, scores, labels = zip(*found, strict=True) if found else ([], [], [])
    return [
        Detections(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            torch.tensor(scores, dtype=torch.float32),
            torch.tensor(labels, dtype=torch.int64),
        )
    ]


def test_two_objects_by_hand(tmp_path: Path) -> None:
    """Right, wrong, right: precision 1 up to recall 1/2, then 2/3; of 101 recalls, 0 … 0.5 are 51."""
    data = by_hand(tmp_path)
    a, wrong, b = ((0, 0, 10, 10), 0.9, 2), ((0, 40, 10, 50), 0.8, 2), ((30, 30, 50, 50), 0.7, 2)
    found = coco_precisions(data, detections(a, wrong, b))
    assert [found.ap, found.ap50] == pytest.approx([(51 + 50 * 2 / 3) / 101] * 2)
    assert found.without_objects == ["disc", "never"]
    # An object counts once; the overlap of 6/10 is enough at 0.5, 0.55 and 0.6.
    assert coco_precisions(data, detections(a, a, b)).ap == pytest.approx((51 + 50 * 2 / 3) / 101)
    partly = coco_precisions(data, detections(((0, 0, 10, 6.0), 0.9, 2), b))
    assert partly.ap50 == pytest.approx(1)
    assert partly.ap75 == pytest.approx(51 / 2 / 101)
    assert coco_precisions(data, detections()).ap == 0
    assert coco_precisions(data, detections(((0, 0, 10, 10), 0.9, 1))).ap == 0


def test_detections_inside_a_crowd_are_ignored(tmp_path: Path) -> None:
    data = by_hand(tmp_path, crowd=True)
    a, inside = ((0, 0, 10, 10), 0.5, 2), ((31, 31, 35, 35), 0.9, 2)
    assert coco_precisions(data, detections(a, inside, inside)).ap == pytest.approx(1)
    outside = ((0, 30, 9, 39), 0.9, 2)
    assert coco_precisions(data, detections(a, outside)).ap == pytest.approx(0.5)


def test_masks_of_detections_without_masks(drawn: Path) -> None:
    data = read_coco(open_coco(drawn).train)
    with pytest.raises(InputError, match="have no masks"):
        coco_precisions(data, [Detections(one.boxes_D4, one.scores_D, one.labels_D) for one in truth(data)], masks=True)
