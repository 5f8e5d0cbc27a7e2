"""Readers of masks: each layout on small drawn folders, and on real data against readers that nobody here wrote."""

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from street_images import CAR, EGO_VEHICLE, ROAD, write_streets

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.cityscapes import CLASS_NAMES, NAMES, read_label_ids
from deepcluster.evaluation.datasets.dense import MaskSet
from deepcluster.evaluation.datasets.masks import MaskParts, is_masks, open_masks
from deepcluster.evaluation.datasets.voc_masks import VocMasks, read_sbd_mask, read_voc_mask, voc_palette

DATA = Path(__file__).parents[2] / "shared" / "data"
VOC, COCO = DATA / "voc-from-coco", DATA / "coco-mini"
needs_voc = pytest.mark.skipif(not VOC.is_dir(), reason="no ../shared/data here")
needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason="no ../shared/data here")
SHAPE = (6, 8)


def mask_of(name: str, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """A mask that follows from a name: some class, background, and a row that is ignored."""
    mask = np.zeros(shape, np.uint8)
    mask[1:4, 2:6] = 1 + sum(name.encode()) % 20
    mask[4] = 255
    return mask


def in_palette(mask: np.ndarray, palette: np.ndarray | None = None) -> Image.Image:
    image = Image.fromarray(mask, mode="P")
    image.putpalette((voc_palette() if palette is None else palette).tobytes())
    return image


def save_mask(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    in_palette(mask).save(path)


def save_image(path: Path, shape: tuple[int, int] = SHAPE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", shape[::-1], (90, 120, 150)).save(path)


def write_list(path: Path, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def write_devkit(root: Path, lists: Mapping[str, Sequence[str]], folder: str = "SegmentationClass") -> Path:
    """A devkit with lists of images, and their masks in a folder."""
    for name, images in lists.items():
        write_list(root / "ImageSets" / "Segmentation" / f"{name}.txt", images)
        for image in images:
            save_image(root / "JPEGImages" / f"{image}.jpg")
            save_mask(root / folder / f"{image}.png", mask_of(image))
    return root


def write_sbd(root: Path, lists: Mapping[str, Sequence[str]]) -> Path:
    """SBD: masks as .mat files, without ignored pixels."""
    for name, images in lists.items():
        write_list(root / f"{name}.txt", images)
        (root / "cls").mkdir(exist_ok=True)
        for image in images:
            save_image(root / "img" / f"{image}.jpg")
            mask = mask_of(image)
            mask[mask == 255] = 0
            savemat(root / "cls" / f"{image}.mat", {"GTcls": {"Segmentation": mask, "CategoriesPresent": [[1]]}})
    return root


def stems(masks: MaskSet) -> list[str]:
    return [Path(masks.source.name(index)).stem for index in range(len(masks))]


def read_all(parts: MaskParts) -> None:
    for part in (parts.train, parts.test):
        for index, name in enumerate(stems(part)):
            mask = part.read_mask(index)
            expected = mask_of(name)
            assert mask.dtype == np.uint8
            np.testing.assert_array_equal(mask[:4], expected[:4])
            np.testing.assert_array_equal(mask[5], expected[5])
            path = part.source.path(index)
            assert path is not None
            assert Image.open(path).size == mask.shape[::-1]


# VOC


@pytest.mark.parametrize("inner", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_a_devkit_is_found_and_read(tmp_path: Path, inner: str) -> None:
    write_devkit(tmp_path / inner, {"train": ["a", "b"], "val": ["c"]})
    parts = open_masks(tmp_path)
    assert (stems(parts.train), stems(parts.test), parts.layout) == (["a", "b"], ["c"], "voc")
    assert parts.test.class_names[:3] == ("background", "aeroplane", "bicycle")
    assert len(parts.test.class_names) == 21
    np.testing.assert_array_equal(parts.test.read_mask(0), mask_of("c"))
    read_all(parts)


def test_voc2012_comes_first_and_test_has_trainval(tmp_path: Path) -> None:
    write_devkit(tmp_path / "VOCdevkit" / "VOC2007", {"train": ["a"], "val": ["b"], "trainval": ["a", "b"], "test": ["t"]})
    parts = open_masks(tmp_path, "test")
    assert (stems(parts.train), stems(parts.test)) == (["a", "b"], ["t"])
    assert (parts.train.name, parts.test.name) == ("VOC2007 trainval", "VOC2007 test")
    write_devkit(tmp_path / "VOCdevkit" / "VOC2012", {"train": ["c"], "val": ["d"]})
    assert open_masks(tmp_path).test.name == "VOC2012 val"


def test_without_val_the_test_images_are_used(tmp_path: Path) -> None:
    write_devkit(tmp_path / "VOC2007", {"trainval": ["a", "b"], "test": ["t"]})
    parts = open_masks(tmp_path)
    assert (stems(parts.train), stems(parts.test)) == (["a", "b"], ["t"])


@pytest.mark.parametrize("as_paths", [False, True])
def test_aug_is_added_to_train_and_val_stays_out(tmp_path: Path, as_paths: bool) -> None:
    root = write_devkit(tmp_path / "VOC2012", {"train": ["a", "b"], "val": ["v"]})
    assert "SegmentationClassAug is not there; published results are of 10,582" in open_masks(tmp_path).notes[0]
    write_devkit(root, {"aug": ["x", "y", "v"]}, "SegmentationClassAug")
    if as_paths:  # As in a copy of the list that many use.
        lines = [f"/JPEGImages/{one}.jpg /SegmentationClassAug/{one}.png" for one in "xyv"]
        write_list(root / "ImageSets" / "Segmentation" / "aug.txt", lines)
    parts = open_masks(tmp_path)
    assert (stems(parts.train), stems(parts.test)) == (["a", "b", "x", "y"], ["v"])
    assert (parts.train.name, parts.notes) == ("VOC2012 train+aug", [])
    read_all(parts)
    assert stems(open_masks(tmp_path, more=False).train) == ["a", "b"]


def test_aug_without_a_list_is_all_of_its_folder_but_val(tmp_path: Path) -> None:
    root = write_devkit(tmp_path / "VOC2012", {"train": ["a", "b"], "val": ["v"]})
    write_devkit(root, {"aug": ["a", "x", "y", "v"]}, "SegmentationClassAug")
    (root / "ImageSets" / "Segmentation" / "aug.txt").unlink()
    parts = open_masks(tmp_path)
    assert stems(parts.train) == ["a", "b", "x", "y"]
    assert "has no aug.txt: trained on all masks of SegmentationClassAug but those of val.txt" in parts.notes[0]


def test_trainaug_as_given_has_all_its_masks_of_aug(tmp_path: Path) -> None:
    root = write_devkit(tmp_path / "VOC2012", {"train": ["a"], "val": ["v"]})
    write_devkit(root, {"trainaug": ["a", "x"]}, "SegmentationClassAug")
    other = np.full(SHAPE, 7, np.uint8)
    save_mask(root / "SegmentationClassAug" / "a.png", other)
    given = VocMasks(root).open("trainaug")
    assert stems(given) == ["a", "x"]
    np.testing.assert_array_equal(given.read_mask(0), other)
    train = open_masks(tmp_path).train  # `a` has its mask of VOC here.
    assert stems(train) == ["a", "x"]
    np.testing.assert_array_equal(train.read_mask(0), mask_of("a"))


def test_a_list_of_the_user_is_tested_on_and_left_out_of_training(tmp_path: Path) -> None:
    root = write_devkit(tmp_path / "VOC2012", {"train": ["a", "b", "c"], "val": ["v"]})
    write_list(root / "ImageSets" / "Segmentation" / "mine.txt", ["b", "v"])
    parts = open_masks(tmp_path, "mine")
    assert (stems(parts.train), stems(parts.test)) == (["a", "c"], ["b", "v"])
    assert parts.notes == ["1 image of train left out of training: tested on"]


def test_seg11valid_is_tested_on_after_training_on_sbd(tmp_path: Path) -> None:
    write_devkit(tmp_path / "VOCdevkit" / "VOC2012", {"train": ["a", "b"], "val": ["v", "w"]})
    write_sbd(tmp_path / "benchmark_RELEASE" / "dataset", {"train": ["b", "s"], "val": ["v"]})
    write_list(tmp_path / "seg11valid.txt", ["v", "w"])
    parts = open_masks(tmp_path, "seg11valid")
    assert (stems(parts.train), stems(parts.test)) == (["b", "s"], ["v", "w"])
    read_all(parts)


def test_sbd_beside_a_devkit_takes_the_place_of_aug(tmp_path: Path) -> None:
    write_devkit(tmp_path / "VOCdevkit" / "VOC2012", {"train": ["a", "b"], "val": ["v"]})
    write_sbd(tmp_path / "benchmark_RELEASE" / "dataset", {"train": ["b", "s"], "val": ["v", "u"]})
    parts = open_masks(tmp_path)
    assert stems(parts.train) == ["a", "b", "s", "u"]
    assert parts.train.source.name(0) == "VOC2012/a.jpg"
    read_all(parts)
    assert 255 in parts.train.read_mask(1)  # VOC's own mask of `b`, which has borders.


def test_sbd_alone_is_read_as_by_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import SBDataset

    root = write_sbd(tmp_path / "benchmark_RELEASE" / "dataset", {"train": ["b", "s"], "val": ["v"]})
    parts = open_masks(tmp_path)
    assert (parts.layout, parts.train.name, parts.test.name) == ("sbd", "SBD train", "SBD val")
    for part, image_set in ((parts.train, "train"), (parts.test, "val")):
        theirs = SBDataset(str(root), image_set=image_set, mode="segmentation")
        assert len(theirs) == len(part)
        for index in range(len(part)):
            np.testing.assert_array_equal(part.read_mask(index), np.asarray(theirs[index][1]))
    with pytest.raises(InputError, match="no devkit beside it has seg11valid"):
        open_masks(tmp_path, "seg11valid")


@needs_voc
@pytest.mark.parametrize("lists", ["val", "test"])
def test_voc_from_coco_is_read_as_by_torchvision(lists: str) -> None:
    from torchvision.datasets import VOCSegmentation

    parts = open_masks(VOC, lists)
    theirs = VOCSegmentation(str(VOC), year="2007", image_set=lists)
    assert len(parts.test) == len(theirs)
    assert parts.test.class_names[15] == "person"
    for index, (image, mask) in enumerate(theirs):
        np.testing.assert_array_equal(parts.test.read_mask(index), np.asarray(mask))
        ours = parts.test.source.path(index)
        assert ours is not None
        assert Path(theirs.images[index]).name == ours.name
        assert image.size == parts.test.read_mask(index).shape[::-1]


@needs_voc
def test_real_palettes_are_vocs() -> None:
    file = min((VOC / "VOCdevkit" / "VOC2007" / "SegmentationClass").glob("*.png"))
    with Image.open(file) as image:
        np.testing.assert_array_equal(np.reshape(image.getpalette(), (-1, 3)), voc_palette())


# The PNG itself


def test_palette_by_hand() -> None:
    first = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert voc_palette()[:5].tolist() == [list(one) for one in first]
    assert voc_palette()[[15, 20, 255]].tolist() == [[192, 128, 128], [0, 64, 128], [224, 224, 192]]


FORMS: dict[str, Callable[[np.ndarray], Image.Image]] = {
    "palette": in_palette,
    "another palette": lambda mask: in_palette(mask, voc_palette()[::-1]),
    "grey": lambda mask: Image.fromarray(mask, mode="L"),
    "16 bits": lambda mask: Image.fromarray(mask.astype(np.uint16)),
    "colours": lambda mask: in_palette(mask).convert("RGB"),
    "colours and opacity": lambda mask: in_palette(mask).convert("RGBA"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_is_read_from_each_kind_of_png(tmp_path: Path, form: str) -> None:
    mask = np.array([[*range(21), 255], [255, *range(21)]], np.uint8)
    FORMS[form](mask).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_voc_mask(tmp_path / "a.png"), mask)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (in_palette(np.array([[0, 21, 254]], np.uint8)), "has the value 21, 254 in 2 pixels; a mask of 21"),
        (Image.fromarray(np.array([[0, 300]], np.uint16)), "has the value 300 in 1 pixel"),
        (
            in_palette(mask_of("a")).convert("L"),
            "value 113, 220 in 20 pixels.*VOC's colours turned into grey: use the original",
        ),
        (Image.new("RGB", (2, 2), (10, 20, 30)), r"\(10, 20, 30\) is not in VOC's palette"),
        (Image.new("LA", (2, 2)), "PNG of mode LA"),
    ],
)
def test_a_value_that_is_no_class_is_named(tmp_path: Path, image: Image.Image, message: str) -> None:
    image.save(tmp_path / "odd.png")
    with pytest.raises(InputError, match=f"odd.png.*{message}"):
        read_voc_mask(tmp_path / "odd.png")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", None])
def test_a_damaged_mask_is_an_error_of_input(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        save_mask(tmp_path / "a.png", mask_of("a", (90, 90)))
        content = (tmp_path / "a.png").read_bytes()[:-40]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png"):
        read_voc_mask(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"no matrix" * 40, b"MATLAB 5.0 MAT-file" + bytes(300)])
def test_a_damaged_file_of_sbd_is_an_error_of_input(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.mat can't be read"):
        read_sbd_mask(tmp_path / "a.mat")
    savemat(tmp_path / "b.mat", {"other": 1})
    with pytest.raises(InputError, match=r"b\.mat can't be read"):
        read_sbd_mask(tmp_path / "b.mat")


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    root = write_devkit(tmp_path, {"train": ["a"], "val": ["b"]})
    save_mask(root / "SegmentationClass" / "b.png", mask_of("b", (6, 9)))
    with pytest.raises(InputError, match=r"b\.png is 9 x 6 pixels, its image .*b\.jpg 8 x 6"):
        open_masks(tmp_path).test.read_mask(0)


def test_an_image_that_is_turned_by_its_exif_has_its_upright_size(tmp_path: Path) -> None:
    root = write_devkit(tmp_path, {"train": ["a"], "val": ["b"]})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SHAPE).save(root / "JPEGImages" / "b.jpg", exif=exif)  # Stored 6 wide and 8 high; shown 8 wide.
    np.testing.assert_array_equal(open_masks(tmp_path).test.read_mask(0), mask_of("b"))


def test_an_unreadable_image_does_not_stop_its_mask(tmp_path: Path) -> None:
    root = write_devkit(tmp_path, {"train": ["a"], "val": ["b"]})
    (root / "JPEGImages" / "b.jpg").write_bytes(b"no image")
    np.testing.assert_array_equal(open_masks(tmp_path).test.read_mask(0), mask_of("b"))


def test_sets_go_to_other_processes(tmp_path: Path) -> None:
    write_devkit(tmp_path / "VOCdevkit" / "VOC2012", {"train": ["a", "b"], "val": ["v"]})
    write_sbd(tmp_path / "benchmark_RELEASE" / "dataset", {"train": ["s"], "val": ["v"]})
    train = open_masks(tmp_path).train
    again = pickle.loads(pickle.dumps(train))
    assert stems(again) == ["a", "b", "s"]
    np.testing.assert_array_equal(again.read_mask(2), train.read_mask(2))


# Cityscapes


@pytest.mark.parametrize("train_ids", [False, True])
def test_cityscapes_is_read_as_by_torchvision(tmp_path: Path, train_ids: bool) -> None:
    from torchvision.datasets import Cityscapes

    write_streets(tmp_path / "cityscapes", train=5, val=2, height=32, train_ids=train_ids)
    table = np.full(256, 255, np.uint8)
    for one in Cityscapes.classes:
        table[one.id] = one.train_id if 0 <= one.train_id < 255 else 255
    parts = open_masks(tmp_path / "cityscapes")
    assert (len(parts.train), len(parts.test), parts.layout) == (5, 2, "cityscapes")
    for part, split in ((parts.train, "train"), (parts.test, "val")):
        theirs = Cityscapes(str(tmp_path / "cityscapes"), split=split, mode="fine", target_type="semantic")
        by_name = {Path(image).name: index for index, image in enumerate(theirs.images)}
        for index in range(len(part)):
            path = part.source.path(index)
            assert path is not None
            image, labels = theirs[by_name[path.name]]
            np.testing.assert_array_equal(part.read_mask(index), table[np.asarray(labels)])
            assert image.size == (64, 32)


def test_classes_of_cityscapes_are_torchvisions() -> None:
    from torchvision.datasets import Cityscapes

    counted = sorted((one for one in Cityscapes.classes if 0 <= one.train_id < 255), key=lambda one: one.train_id)
    assert {one.id: one.name for one in counted} == NAMES
    assert tuple(one.name for one in counted) == CLASS_NAMES


def test_training_ids_are_preferred(tmp_path: Path) -> None:
    write_streets(tmp_path, train=1, val=1, height=32, train_ids=True)
    for path in tmp_path.glob("gtFine/*/*/*labelIds.png"):
        path.unlink()
    assert CLASS_NAMES.index("road") in open_masks(tmp_path).test.read_mask(0)


def test_label_ids_by_hand(tmp_path: Path) -> None:
    Image.fromarray(np.array([[ROAD, CAR, EGO_VEHICLE, 255, 0, 33]], np.uint8)).save(tmp_path / "a_labelIds.png")
    assert read_label_ids(tmp_path / "a_labelIds.png").tolist() == [[0, 13, 255, 255, 255, 18]]
    Image.fromarray(np.array([[34, 7]], np.uint8)).save(tmp_path / "b_labelIds.png")
    with pytest.raises(InputError, match=r"b_labelIds\.png has the value 34 in 1 pixel"):
        read_label_ids(tmp_path / "b_labelIds.png")


def test_streets_without_masks_are_named(tmp_path: Path) -> None:
    write_streets(tmp_path, train=1, val=2, height=32)
    with pytest.raises(InputError, match="Cityscapes is tested on val, not on test"):
        open_masks(tmp_path, "test")
    for path in tmp_path.glob("gtFine/val/*/*000001*"):
        path.rename(path.with_name(path.name.replace("labelIds", "instanceIds")))
    with pytest.raises(
        InputError, match=r"val lacks the masks of 1 of 2 images: frankfurt/frankfurt_000001_.*labelIds\.png"
    ):
        open_masks(tmp_path)
    (tmp_path / "leftImg8bit" / "train").rename(tmp_path / "leftImg8bit" / "training")
    with pytest.raises(InputError, match=r"train does not exist; .*there are training/, val/"):
        open_masks(tmp_path)


# COCO

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}, {"id": 200, "name": "rug-merged"}]
# Segments of each drawn image: number, category, whether it is a crowd.
SEGMENTS = [(3_226_956, 200, 0), (255, 1, 0), (256, 90, 0), (65_536, 1, 1)]


def write_panoptic(root: Path, part: str, *, categories: Sequence[object] = CATEGORIES) -> np.ndarray:
    """One image of four segments and of nothing in its last row; returns the mask that is expected."""
    numbers = np.zeros(SHAPE, np.int64)
    for row, (number, _, _) in enumerate(SEGMENTS):
        numbers[row] = number
    colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65_536], axis=2).astype(np.uint8)
    save_image(root / part / "5.jpg")
    save_image(root / part / "6.jpg")
    pictures = root / "annotations" / f"panoptic_{part}"
    pictures.mkdir(parents=True)
    Image.fromarray(colours).save(pictures / "5.png")
    segments = [{"id": number, "category_id": category, "iscrowd": crowd} for number, category, crowd in SEGMENTS]
    content = {
        "images": [{"id": 5, "file_name": "5.jpg"}, {"id": 6, "file_name": "6.jpg"}],
        "annotations": [{"image_id": 5, "file_name": "5.png", "segments_info": segments}],
        "categories": categories,
    }
    (root / "annotations" / f"panoptic_{part}.json").write_text(json.dumps(content))
    expected = np.full(SHAPE, 255, np.uint8)
    expected[:3] = [[2], [0], [1]]
    return expected


def test_panoptic_by_hand(tmp_path: Path) -> None:
    write_panoptic(tmp_path, "train2017")
    expected = write_panoptic(tmp_path, "val2017")
    parts = open_masks(tmp_path)
    assert (parts.layout, parts.train.name, parts.test.name) == ("coco", "COCO train2017", "COCO val2017")
    assert parts.test.class_names == ("person", "toothbrush", "rug-merged")
    np.testing.assert_array_equal(parts.test.read_mask(0), expected)
    assert parts.test.notes == ("1 image of val2017 without annotation left out",)


@needs_coco
@pytest.mark.parametrize("part", ["train", "val"])
def test_coco_mini_has_the_pixels_that_its_annotation_counts(part: str) -> None:
    content = json.loads((COCO / "annotations" / f"panoptic_{part}2017.json").read_text())
    parts = open_masks(COCO)
    masks = {"train": parts.train, "val": parts.test}[part]
    assert len(masks) == 80
    order = [one["id"] for one in content["categories"]]
    assert masks.class_names == tuple(one["name"] for one in content["categories"])
    by_name = {one["file_name"].partition(".")[0]: one for one in content["annotations"]}
    for index, name in enumerate(stems(masks)):
        counts = np.bincount(masks.read_mask(index).ravel(), minlength=256)
        areas = np.zeros(256, np.int64)
        for segment in by_name[name]["segments_info"]:
            areas[255 if segment["iscrowd"] else order.index(segment["category_id"])] += segment["area"]
        areas[255] = counts.sum() - areas[:255].sum()
        np.testing.assert_array_equal(counts, areas)


@needs_coco
def test_things_of_coco_mini_lie_where_pycocotools_has_them() -> None:
    from pycocotools import coco

    instances = coco.COCO(str(COCO / "annotations" / "instances_val2017.json"))
    masks = open_masks(COCO).test
    agree = total = 0
    for index, name in list(enumerate(stems(masks)))[:20]:
        mask = masks.read_mask(index)
        for one in instances.loadAnns(instances.getAnnIds(int(name), iscrowd=False)):
            inside = instances.annToMask(one).astype(bool)
            number = masks.class_names.index(instances.cats[one["category_id"]]["name"])
            agree += int((mask[inside] == number).sum())
            total += int(inside.sum())
    assert agree / total > 0.97  # Polygons: holes are filled, borders half a pixel off.


def test_bad_panoptic_files_are_named(tmp_path: Path) -> None:
    write_panoptic(tmp_path, "train2017")
    write_panoptic(tmp_path, "val2017", categories=[*CATEGORIES[:2], {"id": 200, "name": "carpet"}])
    with pytest.raises(InputError, match="the categories of train2017 and val2017 differ: carpet, rug-merged"):
        open_masks(tmp_path)
    with pytest.raises(InputError, match=r"no panoptic_test\*\.json; there are panoptic_train2017\.json, panoptic_val2017"):
        open_masks(tmp_path, "test")
    file = tmp_path / "annotations" / "panoptic_train2017.json"
    original = file.read_text()
    Image.new("RGB", SHAPE[::-1], (7, 0, 0)).save(file.with_suffix("") / "5.png")
    (tmp_path / "annotations" / "panoptic_val2017.json").write_text(original)
    with pytest.raises(InputError, match=r"5\.png has the segment 7, which its JSON file does not have"):
        open_masks(tmp_path).train.read_mask(0)
    for content, message in (
        (original[:-20], "does not parse as JSON"),
        (original.replace("segments_info", "segments"), "not in COCO's panoptic format .*segments_info"),
        ("[]", "not in COCO's panoptic format"),
        (original.replace('"category_id": 90', '"category_id": 91'), "not in COCO's panoptic format .*91"),
        (original.replace('"5.png"', '"../5.png"'), "lacks 1 of the 1 masks"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            open_masks(tmp_path)


# The door


def test_folders_that_do_not_fit_say_what_was_looked_for(tmp_path: Path) -> None:
    wanted = "Looked for: a VOC devkit with SegmentationClass and ImageSets/Segmentation; SBD .*; Cityscapes .*; COCO"
    (tmp_path / "empty").mkdir()
    (tmp_path / "boxes" / "VOCdevkit" / "VOC2012" / "Annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").write_text("{}")
    (tmp_path / "streets" / "leftImg8bit").mkdir(parents=True)
    for name, message in (
        ("gone", "it does not exist"),
        ("empty", "it is empty"),
        ("boxes", r"VOC2012 is a devkit with boxes \(Annotations\) and without SegmentationClass"),
        ("coco", r"instances_val2017\.json has objects, and panoptic_\*\.json is not beside it"),
        ("streets", "leftImg8bit is there, and gtFine is not"),
    ):
        with pytest.raises(InputError, match=f"{name} has no masks: .*{message}.* {wanted}"):
            open_masks(tmp_path / name)
        assert not is_masks(tmp_path / name)


def test_what_a_devkit_lacks_is_named(tmp_path: Path) -> None:
    root = write_devkit(tmp_path / "VOC2012", {"train": ["a", "b"], "val": ["c"]})
    assert is_masks(tmp_path)
    (root / "SegmentationClass" / "b.png").unlink()
    with pytest.raises(
        InputError, match=r"SegmentationClass lacks 1 of the 2 masks of the images that .*train\.txt.*: b\.png"
    ):
        open_masks(tmp_path)
    save_mask(root / "SegmentationClass" / "b.png", mask_of("b"))
    (root / "JPEGImages" / "c.jpg").unlink()
    with pytest.raises(InputError, match=r"JPEGImages lacks 1 of the 1 images that .*val\.txt lists: c\.jpg"):
        open_masks(tmp_path)
    with pytest.raises(InputError, match=r"test\.txt does not exist; .*Segmentation has train\.txt, val\.txt"):
        open_masks(tmp_path, "test")
    write_list(root / "ImageSets" / "Segmentation" / "val.txt", [])
    with pytest.raises(InputError, match=r"val\.txt names no images"):
        open_masks(tmp_path)
    write_list(root / "ImageSets" / "Segmentation" / "val.txt", ["a", "b"])
    with pytest.raises(InputError, match="all images of train are tested on"):
        open_masks(tmp_path)
    write_list(root / "ImageSets" / "Segmentation" / "aug.txt", ["b"])
    with pytest.raises(InputError, match=r"aug\.txt lists images with masks in SegmentationClassAug, and .* does not exist"):
        VocMasks(root).open("aug")
