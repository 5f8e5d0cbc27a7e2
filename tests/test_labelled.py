"""The training and the validation part of a data set, wherever they lie; and what is said where they don't."""

import tarfile
from pathlib import Path

import pytest
from models_helper import write_classes

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.labelled import has_train_val, open_train_val


def pack(folder: Path, file: Path, *, inside: str) -> None:
    with tarfile.open(file, "w:gz") as tar:
        tar.add(folder, arcname=inside)


@pytest.mark.parametrize("held_out", ["val", "validation", "valid", "test"])
def test_folders_of_class_folders(tmp_path: Path, held_out: str) -> None:
    write_classes(tmp_path / "train", 4)
    write_classes(tmp_path / held_out, 2)
    data = open_train_val(tmp_path)
    assert data.describe() == {"train_images": 12, "val_images": 6, "classes": 3}
    assert data.train.class_names == data.val.class_names == ["class0", "class1", "class2"]
    assert data.val.labels_N.tolist() == [0, 0, 1, 1, 2, 2]


def test_val_comes_before_test(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 1), ("val", 2)):
        write_classes(tmp_path / part, count)
    assert len(open_train_val(tmp_path).val.source) == 6


def test_tar_files_with_the_words_in_their_names(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        pack(write_classes(tmp_path / "made" / part, count), tmp_path / f"small-{part}.tar.gz", inside=part)
    data = open_train_val(tmp_path)
    assert (len(data.train.source), len(data.val.source)) == (9, 6)
    assert data.train.class_names == ["class0", "class1", "class2"]


def test_tables_with_labels(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", 2)
    rows = [f"images/class{number}/00{image}.png,{number}" for number in range(3) for image in range(2)]
    for part, some in (("train", rows[::2]), ("val", rows[1::2])):
        (tmp_path / f"{part}.csv").write_text("path,label\n" + "\n".join(some))
    assert open_train_val(tmp_path).val.labels_N.tolist() == [0, 1, 2]


def test_what_is_missing_is_told_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is empty"):
        open_train_val(tmp_path)
    write_classes(tmp_path / "train", 1)
    (tmp_path / "notes.md").touch()
    assert not has_train_val(tmp_path)
    with pytest.raises(InputError, match=r"no val folder of class folders, .*there are notes.md, train/"):
        open_train_val(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        open_train_val(tmp_path / "nowhere")


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", 1, classes=4)
    write_classes(tmp_path / "val", 1, classes=3)
    with pytest.raises(InputError, match=r"train \(4\) and val \(3\) differ: class3; class3 is not in val"):
        open_train_val(tmp_path)


def test_images_without_a_class_are_counted(tmp_path: Path) -> None:
    write_classes(tmp_path / "val", 1)
    write_classes(tmp_path / "made", 1)
    (tmp_path / "train").mkdir()
    for number in range(3):
        (tmp_path / "made" / f"class{number}" / "000.png").rename(tmp_path / "train" / f"{number}.png")
    with pytest.raises(InputError, match="0 of 3 images have a class; use a folder for each class"):
        open_train_val(tmp_path)
