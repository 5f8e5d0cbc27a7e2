"""Objects of devkits: pixels by hand, a plain parser as oracle, joined years, and annotations that don't fit their image."""

import pickle
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vocs import write_voc

from deepcluster.core.errors import InputError
from deepcluster.data.decode import decode
from deepcluster.evaluation.datasets.voc import CLASSES, Devkit, open_voc, open_vocs
from deepcluster.evaluation.datasets.voc_boxes import CLASS_NAMES, joined_objects, objects_of, splits_for

SHARED = Path(__file__).parents[2] / "shared" / "data"
WIDTH, HEIGHT = 40, 30
Row = tuple[str, Sequence[object]]


def described(objects: Sequence[Row], size: tuple[int, int] | None = (WIDTH, HEIGHT)) -> str:
    """An annotation of objects; `!cat` is a difficult one."""
    text = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    for name, box in objects:
        sides = "".join(
            f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        text += f"<object><name>{name.lstrip('!')}</name><difficult>{int(name[0] == '!')}</difficult>"
        text += f"<bndbox>{sides}</bndbox></object>"
    return f"<annotation>{text}</annotation>"


def write(root: Path, images: Mapping[str, str], split: str = "train") -> Devkit:
    """A devkit in `root` of images of 40 × 30 pixels with these annotations."""
    write_voc(root, {split: {name: [] for name in images}})
    for name, text in images.items():
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(text)
    return Devkit(root, root.name)


def test_pixels_by_hand(tmp_path: Path) -> None:
    """The first pixel is 1, the last belongs to the box; 2012 has fractions, and parts of persons with own boxes."""
    head = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    rows = [("cat", (1, 1, WIDTH, HEIGHT)), ("!person", (5, 6, 5, 6)), ("dog", ("10.5", " 2 ", "20.25", "1e1"))]
    text = described(rows).replace("<object><name>person</name>", f"<object>{head}<name>person</name>")
    data = objects_of(write(tmp_path / "VOC2012", {"a": text, "b": described([]), "c": described(rows[:1])}), "train")
    assert (data.name, len(data), data.notes, data.has_masks) == ("VOC2012 train", 3, (), False)
    assert data.class_names == ("background", *CLASSES)
    found = data.read_objects(0, False)
    assert found.boxes_M4.tolist() == [[0, 0, 40, 30], [4, 5, 5, 6], [9.5, 1, 20.25, 10]]
    assert [data.class_names[label] for label in found.labels_M] == ["cat", "person", "dog"]
    assert found.difficult_M.tolist() == [False, True, False]
    assert found.crowd_M.tolist() == [False] * 3 and found.masks_MHW is None
    kinds = [found.boxes_M4.dtype, found.labels_M.dtype, found.difficult_M.dtype, found.crowd_M.dtype]
    assert kinds == [torch.float32, torch.int64, torch.bool, torch.bool]
    assert data.read_objects(1, False).boxes_M4.shape == (0, 4)
    assert data.read_objects(2, False).boxes_M4.tolist() == [[0, 0, 40, 30]]
    assert data.source.name(2) == "c.jpg"


def test_without_any_object(tmp_path: Path) -> None:
    data = objects_of(write(tmp_path, {"a": described([]), "b": described([])}), "train")
    assert data.read_objects(1, False).boxes_M4.shape == (0, 4)
    assert data.read_objects(1, False).labels_M.dtype == torch.int64


def test_it_goes_to_worker_processes(tmp_path: Path) -> None:
    one = write(tmp_path / "VOC2007", {"a": described([("cat", (1, 2, 3, 4))])})
    other = write(tmp_path / "VOC2012", {"a": described([("dog", (2, 2, 3, 4))])})
    data = pickle.loads(pickle.dumps(joined_objects([one, other], "train")))
    assert data.read_objects(1, False).boxes_M4.tolist() == [[1, 1, 3, 4]]


def test_boxes_that_stick_out_are_clipped_and_counted(tmp_path: Path) -> None:
    """As of tools that count from 0, or that draw over the border."""
    rows = [("cat", (0, 5, 10, 10)), ("dog", (30, 20, 45, 31)), ("cow", (1, 1, WIDTH, HEIGHT)), ("cat", (-5, -5, 99, 99))]
    data = objects_of(write(tmp_path / "VOC2007", {"a": described(rows)}), "train")
    assert data.read_objects(0, False).boxes_M4.tolist() == [
        [0, 4, 10, 10],
        [29, 19, 40, 30],
        [0, 0, 40, 30],
        [0, 0, 40, 30],
    ]
    assert data.notes == (
        "VOC2007 train: 3 boxes stick out of their images and are clipped: a.xml (cat 0, 5, 10, 10), "
        "a.xml (dog 30, 20, 45, 31), a.xml (cat -5, -5, 99, 99)",
    )


def test_boxes_that_are_empty_or_outside_are_left_out_and_named(tmp_path: Path) -> None:
    rows = [("cat", (9, 9, 8, 20)), ("cat", (41, 1, 50, 9)), ("dog", (3, -9, 9, 0)), ("!cow", (20, 20, 10, 10))]
    images = {"a": described([*rows, ("horse", (3, 3, 4, 4))]), "b": described(rows[:1])}
    data = objects_of(write(tmp_path / "VOC2007", images), "train")
    assert data.read_objects(0, False).boxes_M4.tolist() == [[2, 2, 4, 4]]
    assert data.read_objects(1, False).boxes_M4.shape == (0, 4)
    assert data.notes == (
        "VOC2007 train: 5 boxes are empty or outside the image, and left out: a.xml (cat 9, 9, 8, 20), "
        "a.xml (cat 41, 1, 50, 9), a.xml (dog 3, -9, 9, 0), …",
    )


@pytest.mark.parametrize("size", [None, (0, 0), (20, 10), (HEIGHT, WIDTH)])
def test_where_the_stated_size_is_missing_or_wrong_the_image_decides(tmp_path: Path, size: tuple[int, int] | None) -> None:
    images = {"a": described([("cat", (1, 1, WIDTH, HEIGHT))], size), "b": described([("cat", (1, 1, 99, 99))], size)}
    data = objects_of(write(tmp_path / "VOC2007", images), "train")
    assert [data.read_objects(index, False).boxes_M4.tolist() for index in range(2)] == [[[0, 0, 40, 30]]] * 2
    assert data.notes == ("VOC2007 train: 1 box sticks out of its image and is clipped: b.xml (cat 1, 1, 99, 99)",)


def test_a_turned_photo_and_one_that_is_damaged(tmp_path: Path) -> None:
    """The boxes are in the upright image, as `decode` returns it; of a damaged one only the loader tells."""
    devkit = write(tmp_path, {name: described([("cat", (1, 1, HEIGHT, WIDTH))], None) for name in ("a", "b")})
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "JPEGImages" / "a.jpg"
    Image.new("RGB", (WIDTH, HEIGHT)).save(path, exif=exif)
    assert decode(path.read_bytes()).shape[:2] == (WIDTH, HEIGHT)
    (tmp_path / "JPEGImages" / "b.jpg").write_bytes(b"no image")
    data = objects_of(devkit, "train")
    assert [data.read_objects(index, False).boxes_M4.tolist() for index in range(2)] == [[[0, 0, HEIGHT, WIDTH]]] * 2
    assert data.notes == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<xmax>3</xmax>", "", r"b\.xml: a cat has no <xmax> in a <bndbox>; VOC's boxes have xmin, ymin, xmax, ymax"),
        ("bndbox", "polygon", r"b\.xml: a cat has no <xmin> in a <bndbox>"),
        (">3<", ">wide<", r"b\.xml: <xmax> of a cat is 'wide', which is no number of pixels"),
        (">3<", ">nan<", "'nan', which is no number"),
        (">3<", ">1e999<", "'1e999', which is no number"),
        (">3<", "><", "<xmax> of a cat is ''"),
        ("<difficult>0", "<difficult>maybe", "<difficult> of a cat is 'maybe'"),
        ("</object>", "", "line 1 does not parse as XML"),
    ],
)
def test_what_can_t_be_read_is_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    good = described([("cat", (1, 2, 3, 4))])
    devkit = write(tmp_path, {"a": good, "b": good.replace(old, new)})
    with pytest.raises(InputError, match=message):
        objects_of(devkit, "train")


def test_other_classes_are_noted(tmp_path: Path) -> None:
    devkit = write(tmp_path / "VOC2007", {"a": described([("zebra", (1, 1, 2, 2)), ("cat", (1, 1, 2, 2))])})
    data = objects_of(devkit, "train")
    assert data.notes == ("objects of other classes than VOC's 20 are left out of VOC2007 train: zebra (1)",)
    assert data.read_objects(0, False).labels_M.tolist() == [CLASS_NAMES.index("cat")]


def two_years(folder: Path) -> Path:
    """VOC2007 with all lists, and VOC2012 without annotations of its test images; an image has one name in both."""
    cat, dog = described([("cat", (1, 1, 9, 9))]), described([("dog", (2, 2, 9, 9)), ("cow", (0, 1, 2, 2))])
    for split, images in (("trainval", {"1": cat, "2": dog}), ("test", {"3": cat})):
        write(folder / "VOC2007", images, split)
    for split, images in (("trainval", {"1": dog, "2008_1": cat}), ("test", {"2008_9": cat})):
        write(folder / "VOC2012", images, split)
    (folder / "VOC2012" / "Annotations" / "2008_9.xml").unlink()
    return folder


def test_two_years_as_one(tmp_path: Path) -> None:
    devkits = open_vocs(two_years(tmp_path / "VOCdevkit").parent)
    assert [devkit.name for devkit in devkits] == ["VOC2007", "VOC2012"]
    train, test = splits_for(devkits, "trainval")
    assert train.name == "VOC2007 trainval + VOC2012 trainval" and test.name == "VOC2007 test"
    names = [train.source.name(index) for index in range(len(train))]
    assert names == ["VOC2007/1.jpg", "VOC2007/2.jpg", "VOC2012/1.jpg", "VOC2012/2008_1.jpg"]
    parts = [objects_of(devkit, "trainval") for devkit in devkits]
    alone = [part.read_objects(index, False) for part in parts for index in range(2)]
    for index, one in enumerate(alone):
        joined = train.read_objects(index, False)
        assert torch.equal(joined.boxes_M4, one.boxes_M4) and torch.equal(joined.labels_M, one.labels_M)
        path = train.source.path(index)
        assert path is not None and train.source.read(index) == path.read_bytes()
    assert [note.split(":")[0] for note in train.notes] == ["VOC2007 trainval", "VOC2012 trainval"]
    assert [note.split(":")[0] for note in test.notes] == []
    with pytest.raises(IndexError):
        train.read_objects(4, False)


def test_which_devkits_are_joined(tmp_path: Path) -> None:
    """Each year since 2009 has the images of 2008 on, so only the last is taken; a devkit that was named comes alone."""
    for year in (2007, 2008, 2010, 2012):
        write(tmp_path / "VOCdevkit" / f"VOC{year}", {"a": described([])})
    assert [one.name for one in open_vocs(tmp_path)] == ["VOC2007", "VOC2012"]
    assert [one.name for one in open_vocs(tmp_path / "VOCdevkit")] == ["VOC2007", "VOC2012"]
    assert [one.name for one in open_vocs(tmp_path / "VOCdevkit" / "VOC2010")] == ["VOC2010"]
    assert open_vocs(tmp_path)[0] == open_voc(tmp_path)
    annotations = tmp_path / "VOCdevkit" / "VOC2012" / "Annotations"
    for file in annotations.iterdir():
        file.unlink()
    annotations.rmdir()
    with pytest.raises(InputError, match=r"VOC2012 is not a whole VOC devkit.*: Annotations not there; unpack it again, or"):
        open_vocs(tmp_path)
    with pytest.raises(InputError, match="is no VOC devkit: looked for folders Annotations, JPEGImages"):
        open_vocs(annotations.parent / "JPEGImages")


def test_which_lists_are_used(tmp_path: Path) -> None:
    images = {"a": described([("cat", (1, 1, 2, 2))])}
    for split in ("train", "val"):
        devkit = write(tmp_path / "VOC2012", images, split)
    assert [part.name for part in splits_for([devkit], "auto")] == ["VOC2012 train", "VOC2012 val"]
    assert [part.name for part in splits_for([devkit], "train")] == ["VOC2012 train", "VOC2012 val"]
    with pytest.raises(InputError, match=r"has no trainval\.txt and no test\.txt; .*; use --split train"):
        splits_for([devkit], "trainval")
    for split in ("trainval", "test"):
        write(tmp_path / "VOC2012", images, split)
    assert [part.name for part in splits_for([devkit], "auto")] == ["VOC2012 trainval", "VOC2012 test"]
    other = write(tmp_path / "VOC2007", images, "test")
    with pytest.raises(InputError, match=r"VOC2007.*has no trainval\.txt; there are test\.txt"):
        splits_for([other, devkit], "auto")


@pytest.mark.parametrize("name", ["voc-from-coco", "voc2012-mini"])
def test_real_annotations_against_a_plain_parser(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("no shared data")
    devkit = open_voc(SHARED / name)
    for split in devkit.lists():
        data = objects_of(devkit, split)
        assert data.notes == (), "no box of these sets sticks out"
        listed = (devkit.root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
        for index, image in enumerate(listed):
            found = data.read_objects(index, False)
            objects = ElementTree.parse(devkit.root / "Annotations" / f"{image}.xml").getroot().findall("object")
            sides = ("xmin", "ymin", "xmax", "ymax")
            boxes = [[float(one.findtext(f"bndbox/{side}", "")) for side in sides] for one in objects]
            expected_M4 = np.asarray(boxes, dtype=np.float32).reshape(-1, 4) - np.float32([1, 1, 0, 0])
            assert np.array_equal(found.boxes_M4.numpy(), expected_M4)
            assert [data.class_names[label] for label in found.labels_M] == [one.findtext("name") for one in objects]
            assert found.difficult_M.tolist() == [one.findtext("difficult") == "1" for one in objects]
            assert data.source.name(index) == f"{image}.jpg"


def test_the_mini_set_as_counted() -> None:
    """195 objects in 70 images, 27 of them difficult, of all 20 classes (the set's README)."""
    if not (SHARED / "voc2012-mini").is_dir():
        pytest.skip("no shared data")
    data = objects_of(open_voc(SHARED / "voc2012-mini"), "trainval")
    found = [data.read_objects(index, False) for index in range(len(data))]
    assert len(found) == 70
    assert sum(len(one.labels_M) for one in found) == 195
    assert sum(int(one.difficult_M.sum()) for one in found) == 27
    assert set(torch.cat([one.labels_M for one in found]).tolist()) == set(range(1, 21))
