"""The devkit reader: labels against the devkit's own class lists, and what it says of devkits that are damaged."""

from pathlib import Path

import pytest
import torch
from vocs import write_voc

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.voc import CLASSES, open_voc, splits_for, without_positives

SHARED = Path(__file__).parents[2] / "shared" / "data"
TWO = {"train": {"a": ["cat"], "b": ["dog", "!cat"]}, "val": {"c": ["!dog"], "d": []}}


def column(name: str) -> int:
    return CLASSES.index(name)


def test_labels_of_present_difficult_and_absent_objects(tmp_path: Path) -> None:
    """Of two objects of a class, one difficult, the other decides."""
    write_voc(tmp_path, {"train": {"a": ["cat", "!cat"], "b": ["!cat", "person"], "c": []}})
    split = open_voc(tmp_path).split("train")
    assert split.labels_NC.shape == (3, 20)
    assert split.labels_NC.dtype == torch.int8
    assert split.labels_NC[:, column("cat")].tolist() == [1, 0, -1]
    assert split.labels_NC[:, column("person")].tolist() == [-1, 1, -1]
    assert split.names == ["a", "b", "c"]
    assert [split.source.name(index) for index in range(3)] == ["a.jpg", "b.jpg", "c.jpg"]
    assert split.source.path(1) == tmp_path / "JPEGImages" / "b.jpg"
    assert split.source.labels_N is None
    assert without_positives(split.labels_NC) == [name for name in CLASSES if name not in ("cat", "person")]


@pytest.mark.parametrize("below", ["", "VOC2007", "VOC2012", "VOCdevkit/VOC2007", "VOCdevkit/VOC2010"])
def test_it_is_found_below_the_folder(tmp_path: Path, below: str) -> None:
    write_voc(tmp_path / below, TWO)
    assert open_voc(tmp_path).root == tmp_path / below


def test_of_several_years_2007_is_taken(tmp_path: Path) -> None:
    for year in ("VOC2005", "VOC2007", "VOC2012"):
        write_voc(tmp_path / "VOCdevkit" / year, TWO)
    assert open_voc(tmp_path).name == "VOC2007"


def test_names_of_body_parts_and_a_missing_difficult_tag(tmp_path: Path) -> None:
    write_voc(tmp_path, {"train": {"a": []}})
    text = "<annotation><object><name>person</name><part><name>head</name></part></object></annotation>"
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    split = open_voc(tmp_path).split("train")
    assert split.labels_NC[0, column("person")] == 1
    assert split.notes == ()


def test_lists_with_two_columns_and_repeated_lines(tmp_path: Path) -> None:
    write_voc(tmp_path, TWO)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a  1\r\n\r\nb -1\r\na  1\r\n")
    split = open_voc(tmp_path).split("train")
    assert split.names == ["a", "b"]
    assert split.notes == ("1 repeated line of train.txt skipped",)


def test_objects_of_other_classes_are_noted(tmp_path: Path) -> None:
    write_voc(tmp_path, {"train": {"a": ["zebra", "cat"], "b": ["zebra"]}})
    split = open_voc(tmp_path).split("train")
    assert split.notes == ("objects of other classes than VOC's 20 are left out of train: zebra (2)",)
    assert (split.labels_NC == 1).sum() == 1


def test_splits_for_training_and_testing(tmp_path: Path) -> None:
    write_voc(tmp_path, TWO | {"trainval": {}, "test": {"e": ["cow"]}})
    for split, expected in (("train", (["a", "b"], ["c", "d"])), ("trainval", (["a", "b", "c", "d"], ["e"]))):
        train, test = splits_for(open_voc(tmp_path), split)
        assert (train.names, test.names) == expected


def test_without_a_test_list_what_is_there_is_told(tmp_path: Path) -> None:
    write_voc(tmp_path, TWO | {"trainval": {}})
    devkit = open_voc(tmp_path)
    assert not devkit.has_answers("test")
    assert devkit.has_answers("val")
    with pytest.raises(InputError, match=r"no test\.txt; there are train\.txt, val\.txt, trainval\.txt; use --split train"):
        splits_for(devkit, "trainval")
    with pytest.raises(InputError, match=r"test\.txt does not exist; .* has train\.txt and val\.txt and trainval\.txt"):
        devkit.split("test")
    with pytest.raises(InputError, match=r"unknown split 'trian'.*did you mean train"):
        devkit.split("trian")


def test_a_folder_that_is_no_devkit_is_told(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(InputError, match=r"no VOC devkit: looked for folders Annotations, JPEGImages.*there are cats/"):
        open_voc(tmp_path)
    with pytest.raises(InputError, match="it does not exist"):
        open_voc(tmp_path / "nothing")
    (tmp_path / "VOC2007" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(InputError, match="VOC2007 is not a whole VOC devkit: Annotations and ImageSets/Main not there"):
        open_voc(tmp_path)


def test_missing_images_and_annotations_are_named_and_counted(tmp_path: Path) -> None:
    write_voc(tmp_path, {"train": {name: ["cat"] for name in "abcde"}})
    (tmp_path / "Annotations" / "c.xml").unlink()
    with pytest.raises(InputError, match=r"Annotations lacks 1 of the 5 images that .*train\.txt lists: c\.xml;"):
        open_voc(tmp_path).split("train")
    for name in "abce":
        (tmp_path / "JPEGImages" / f"{name}.jpg").unlink()
    with pytest.raises(
        InputError, match=r"JPEGImages lacks 4 of the 5 images .*: a\.jpg, b\.jpg, c\.jpg, …;".replace("c", "[ce]")
    ):
        open_voc(tmp_path).split("train")


def test_a_path_in_a_list_leads_nowhere_else(tmp_path: Path) -> None:
    write_voc(tmp_path, TWO)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("../JPEGImages/a\n")
    with pytest.raises(InputError, match="lacks 1 of the 1 image "):
        open_voc(tmp_path).split("train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<annotation>\n<object>\n<name>cat</nam>\n", r"b\.xml, line 3 does not parse as XML: mismatched tag"),
        (b"", r"b\.xml, line 1 does not parse as XML: no element found"),
        (b"\xff\xfe\x00 not xml", r"b\.xml, line 1 does not parse"),
        (b'<?xml version="1.0" encoding="nonsense"?>\n<annotation/>', r"b\.xml, line 1 does not parse"),
        (b'<?xml version="1.0"?>\n<!DOCTYPE a [<!ENTITY b "c">]>\n<annotation>&b;</annotation>', r"b\.xml, line 2: .*DOCT"),
        (b"<html></html>", r"b\.xml, line 1: expected <annotation>, found <html>"),
        (b"<annotation><object><name>cat</name><difficult>x</difficult></object></annotation>", r"b\.xml: <difficult> of"),
        (b"<annotation>" + b" " * (5 << 20) + b"</annotation>", r"b\.xml is larger than 4 MiB"),
    ],
)  # fmt: skip
def test_damaged_annotations_are_named_with_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    write_voc(tmp_path, TWO)
    (tmp_path / "Annotations" / "b.xml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_voc(tmp_path).split("train")


def test_empty_and_binary_lists_are_told(tmp_path: Path) -> None:
    write_voc(tmp_path, TWO)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("\n \n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_bytes(b"\xff\x00")
    with pytest.raises(InputError, match=r"train\.txt names no images"):
        open_voc(tmp_path).split("train")
    with pytest.raises(InputError, match=r"val\.txt can't be read as UTF-8"):
        open_voc(tmp_path).split("val")


@pytest.mark.parametrize("name", ["voc-from-coco", "voc2012-mini"])
def test_labels_are_those_of_the_class_lists(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("no shared data")
    devkit = open_voc(SHARED / name)
    for split in devkit.lists():
        found = devkit.split(split)
        for number, class_name in enumerate(CLASSES):
            lines = (devkit.root / "ImageSets" / "Main" / f"{class_name}_{split}.txt").read_text().splitlines()
            flags = {line.split()[0]: int(line.split()[1]) for line in lines}
            assert [flags[image] for image in found.names] == found.labels_NC[:, number].tolist()


def test_what_has_no_positives_in_the_shared_devkit() -> None:
    if not (SHARED / "voc-from-coco").is_dir():
        pytest.skip("no shared data")
    trainval, test = splits_for(open_voc(SHARED / "voc-from-coco"), "trainval")
    assert (len(trainval.source), len(test.source)) == (74, 49)
    assert without_positives(trainval.labels_NC) == ["cow", "horse", "sheep"]
    assert without_positives(test.labels_NC) == ["cow", "sheep"]
