"""Lists and tables of other programs and systems, and labels of any type: understood, or said what is wrong."""

import json
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_sources import complaint, labels, names, touch

from deepcluster.data.sources import open_source
from deepcluster.data.sources.labels import NoLabels, class_names, in_order

FILES = ("cats/a, b.jpg", "cats/Köter.jpg", "dogs/c.jpg")
KINDS = ["cats", "cats", "dogs"]


def rows(head: str, sep: str = ",", end: str = "\r\n") -> str:
    cells = [f'"{file}"' if sep in file else file for file in FILES]
    return head + end + "".join(f"{cell}{sep}{kind}{end}" for cell, kind in zip(cells, KINDS, strict=True))


# Encodings and delimiters


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        (rows("path,label").encode("utf-16"), "csv"),
        (rows("path,label").encode("utf-16-le"), "csv"),  # Without its mark.
        (rows("path,label").encode("utf-16-be"), "csv"),
        (rows("path,label").encode("utf-32"), "csv"),
        (rows("path,label").encode("utf-8-sig"), "csv"),
        (rows("path,label").encode("cp1252"), "csv"),
        (("sep=;\r\n" + rows("path;label", ";")).encode("utf-8-sig"), "csv"),
        (("SEP=\t\n" + rows("path\tlabel", "\t", "\n")).encode("utf-16"), "csv"),
        (('"sep=|"\n' + rows("path|label", "|", "\n")).encode(), "csv"),
        (rows("path|label", "|").encode(), "csv"),
        (rows("path\tlabel", "\t", "\r").encode(), "tsv"),
        (("\n \r\n\n" + rows("path,label")).encode(), "csv"),
        (rows("path,label").replace('"', "").encode(), "csv"),  # A comma in a name that is not quoted.
        (rows("path,label,").replace("\r\n", ",\r\n").replace(",,", ",").encode(), "csv"),  # A delimiter at the end.
        (rows("path;label", ";").encode(), "txt"),  # A table under the name of a list.
    ],
)
def test_tables_in_any_encoding_and_with_any_delimiter(tmp_path: Path, content: bytes, ending: str) -> None:
    touch(tmp_path, *FILES)
    (tmp_path / f"t.{ending}").write_bytes(content)
    source = open_source(tmp_path / f"t.{ending}")
    assert (names(source), labels(source)) == ([*FILES], KINDS)
    assert "2 classes from column label" in source.describe()


def test_what_pandas_writes(tmp_path: Path) -> None:
    """With its index, and the floating numbers that come with missing labels."""
    touch(tmp_path, *FILES)
    frame = pd.DataFrame({"file_path": FILES, "label": pd.Series([10, None, 9])})
    frame.to_csv(tmp_path / "t.csv")
    source = open_source(tmp_path / "t.csv")
    assert (labels(source), source.class_names) == (["10", None, "9"], ["9", "10"])
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    assert (names(open_source(tmp_path / "t.jsonl")), labels(open_source(tmp_path / "t.jsonl"))) == (
        [*FILES], ["10", None, "9"],
    )  # fmt: skip


def test_what_r_writes_has_no_name_for_the_numbers_of_rows(tmp_path: Path) -> None:
    touch(tmp_path, *FILES)
    body = "".join(f'"{n}","{file}","{kind}"\n' for n, (file, kind) in enumerate(zip(FILES, KINDS, strict=True), 1))
    (tmp_path / "t.csv").write_text('"Image.Name","label"\n' + body)
    assert (names(open_source(tmp_path / "t.csv")), labels(open_source(tmp_path / "t.csv"))) == ([*FILES], KINDS)


# Columns


@pytest.mark.parametrize(
    "head",
    [
        "filepaths,labels",
        "Image Index,Finding Labels",
        "IMG_PATH,target",
        "Image-ID,Category",
        "id,class_name",
        "bild,Label",
    ],
)
def test_columns_of_common_exports(tmp_path: Path, head: str) -> None:
    touch(tmp_path, *FILES)
    (tmp_path / "t.csv").write_text(rows(head), encoding="utf-8")
    assert (names(open_source(tmp_path / "t.csv")), labels(open_source(tmp_path / "t.csv"))) == ([*FILES], KINDS)


def test_the_column_that_holds_paths_counts_more_than_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    for head, row in (("name,filepath", "A cat,{}"), ("image,foto", "7,{}"), ("id,url,fname", "1,https://x/1,{}")):
        (tmp_path / "t.csv").write_text(f"{head}\n{row.format('a.jpg')}\n{row.format('b.jpg')}\n")
        assert names(open_source(tmp_path / "t.csv")) == ["a.jpg", "b.jpg"]
    (tmp_path / "t.csv").write_text("left,right\na.jpg,b.jpg\n")
    assert "has several columns of image paths: left, right; name the right one path" in complaint(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("a.jpg,cat\nb.jpg,dog\n")
    source = open_source(tmp_path / "t.csv")
    assert (names(source), labels(source)) == (["a.jpg", "b.jpg"], ["cat", "dog"])
    assert "no line names the columns" in source.describe()


# Lists with labels


@pytest.mark.parametrize("line", ["{} {}", "{}\t{}", "{},{}", "{}  ;  {}", '"{}" {}', "'{}',\"{}\""])
def test_lists_of_paths_with_labels(tmp_path: Path, line: str) -> None:
    touch(tmp_path, "n01/a.JPEG", "n01/b c.JPEG", "n02/d.JPEG")
    lines = [line.format(path, kind) for path, kind in (("n01/a.JPEG", 10), ("n01/b c.JPEG", 10), ("n02/d.JPEG", 9))]
    (tmp_path / "l.txt").write_text("# caffe\n" + "\n".join(lines))
    source = open_source(tmp_path / "l.txt")
    assert (names(source), labels(source)) == (["n01/a.JPEG", "n01/b c.JPEG", "n02/d.JPEG"], ["10", "10", "9"])
    assert source.class_names == ["9", "10"]


def test_several_labels_after_a_path_are_said_and_not_used(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "attributes.txt").write_text("1.jpg -1 1 1\n2.jpg 1 -1 1\n")
    source = open_source(tmp_path / "attributes.txt")
    assert (names(source), labels(source)) == (["1.jpg", "2.jpg"], None)
    assert "what follows the paths is no single label, and not used" in source.describe()


# Paths


def test_separators_of_windows_unless_the_file_itself_has_a_backslash(tmp_path: Path) -> None:
    touch(tmp_path, "cats/a.jpg", "dogs/b.jpg", "odd\\c.jpg", "odd/c.jpg")
    for file, text in (
        ("l.txt", "cats\\a.jpg\n.\\dogs\\b.jpg\nodd\\c.jpg\n"),
        ("t.csv", "path\ncats\\a.jpg\ndogs\\b.jpg\nodd\\c.jpg"),
    ):
        (tmp_path / file).write_text(text)
        assert names(open_source(tmp_path / file)) == ["cats/a.jpg", "dogs/b.jpg", "odd\\c.jpg"]
    (tmp_path / "l.txt").write_text("D:\\photos\\a.jpg\n\\\\server\\b.jpg\n")
    assert "these are paths of a Windows computer: make them relative to the list's folder" in complaint(tmp_path / "l.txt")


def test_names_without_folders_or_endings_are_looked_up_below_the_folder(tmp_path: Path) -> None:
    touch(tmp_path, "train/images/001.jpg", "train/images/002.JPG", "test/003.png", "test/same.jpg", "train/same.jpg")
    for cells in (["001", "002", "003"], ["001.jpg", "002.jpg", "003.PNG"], ["images/001", "images/002", "test/003"]):
        (tmp_path / "labels.csv").write_text("image_id,label\n" + "".join(f"{cell},x\n" for cell in cells))
        source = open_source(tmp_path / "labels.csv")
        assert names(source) == ["train/images/001.jpg", "train/images/002.JPG", "test/003.png"]
        assert "3 found by name below the folder of the list" in source.describe()
    (tmp_path / "labels.csv").write_text("image_id,label\nsame,1\n")
    assert "several images below that folder have the same name" in complaint(tmp_path / "labels.csv")


def test_names_that_look_equal(tmp_path: Path) -> None:
    file = touch(tmp_path, unicodedata.normalize("NFD", "Zoë/é.jpg")) / "l.txt"
    file.write_text(unicodedata.normalize("NFC", "Zoë/é.jpg"), encoding="utf-8")
    assert open_source(file).read(0) == unicodedata.normalize("NFD", "Zoë/é.jpg").encode()


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg", "deep/l.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "deep/l.txt").write_text("~/a.jpg")
    assert open_source("~/deep/l.txt").read(0) == b"a.jpg"


def test_names_with_line_breaks_as_json_strings(tmp_path: Path) -> None:
    odd = ["a\nb.jpg", "c\rd.jpg", "e\u2028f.jpg", ' "g".jpg', "#h.jpg"]
    touch(tmp_path, *odd)
    (tmp_path / "l.txt").write_text("\n".join(map(json.dumps, odd)))
    assert names(open_source(tmp_path / "l.txt")) == odd


# Labels


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([3, 0, -1, None], ["3", "0", "", ""]),
        ([3.0, float("nan"), -1.0, np.float32(10)], ["3", "", "", "10"]),
        (["3.0", "nan", "-1.0", "10", "", "None"], ["3", "", "", "10", "", ""]),
        (["007", "7", " 7 "], ["007", "7", "7"]),
        (["7.00", "007"], ["7", "7"]),
        (["0.5", "1.0", "1"], ["0.5", "1", "1"]),
        (["cat", "NaN", "-1", "None", "<NA>", "null", "NA"], ["cat", "", "", "None", "", "", "NA"]),
        ([True, False, np.True_], ["True", "False", "True"]),
        ([Decimal("2.00"), Decimal("2.5"), Decimal(-1)], ["2", "2.5", ""]),
        ([[1], (2,), np.array([3]), []], ["1", "2", "3", ""]),
        ([b"caf\xe9", np.str_("dog"), "1e3"], ["caf\\xe9", "dog", "1e3"]),
        (pd.array([1, None, 2], dtype="Int64").tolist(), ["1", "", "2"]),
    ],
)  # fmt: skip
def test_labels_of_any_type(values: list[Any], want: list[str]) -> None:
    assert class_names(values) == want


def test_lists_of_several_labels_and_structures_are_no_labels(tmp_path: Path) -> None:
    for value, words in (([1, 2], "lists of several labels, such as [1, 2]"), ({"x": 1}, "structures")):
        with pytest.raises(NoLabels, match=words.replace("[", r"\[")):
            class_names([None, value])
    touch(tmp_path, "a.jpg")
    (tmp_path / "t.jsonl").write_text('{"file_name": "a.jpg", "label": [4, 7]}\n')
    source = open_source(tmp_path / "t.jsonl")
    assert source.labels_N is None
    assert "column label holds lists of several labels, such as [4, 7], and is not used" in source.describe()


def test_the_order_of_classes_is_that_of_numbers_where_all_are_numbers() -> None:
    assert in_order(["10", "9", "0.5", "-3"]) == ["-3", "0.5", "9", "10"]
    assert in_order(["10", "9", "a"]) == ["10", "9", "a"]


def test_labels_of_arrays(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 4), np.uint8)
    for array, want in (
        (np.array([10.0, np.nan, 9]), ["10", None, "9"]),
        (np.array([True, False, True]), ["True", "False", "True"]),
    ):
        np.savez(tmp_path / "a.npz", images=images, labels=array)
        assert labels(open_source(tmp_path / "a.npz")) == want
