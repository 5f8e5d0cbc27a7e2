"""Folders of real life: what systems and this program put between the images of a folder, and how data sets are laid out."""

import csv
import subprocess
import sys
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spoiled_images import write_good_images
from test_sources import complaint, labels, names, touch

import deepcluster
from deepcluster.api import default_run
from deepcluster.core.errors import InputError
from deepcluster.core.files import MARK, output_path
from deepcluster.core.progress import Reporter
from deepcluster.core.text import as_line, of_line
from deepcluster.data.sources import open_source
from deepcluster.evaluation.datasets.labelled import open_train_val
from deepcluster.run.folder import RunFolder

QUIET = Reporter(quiet=True)
SYSTEM = (
    "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/old.jpg", "$Recycle.Bin/$RX1.jpg", ".@__thumb/s1001.jpg",
    "System Volume Information/x.jpg", "lost+found/#12.jpg", "__MACOSX/._1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg",
    ".Trash-1000/files/x.jpg", "@Recently-Snapshot/a/x.jpg", "cat/._1.jpg", ".thumbnails/normal/1.png", "FOUND.000/x.jpg",
)  # fmt: skip
# Names of classes that look like those above.
CLASSES = ("eaDir", "#recycled", "recycle", "$money", "lost+found things", "@home", "thumbnails", "MACOSX", "found.0001")


def test_bins_and_thumbnails_are_neither_images_nor_classes(tmp_path: Path) -> None:
    wanted = [f"{name}/1.jpg" for name in sorted((*CLASSES, "cat"))]
    touch(tmp_path, *wanted, *SYSTEM, "cat/Thumbs.db")
    source = open_source(tmp_path)
    assert names(source) == wanted
    assert source.class_names == sorted((*CLASSES, "cat"))
    assert "12 hidden or system folders left out (" in source.describe()
    assert "1 hidden file left out" in source.describe()
    assert names(open_source(tmp_path / ".thumbnails")) == ["normal/1.png"]  # Asked for, it is data.
    touch(tmp_path / "bins", "#recycle/1.jpg")
    assert "1 hidden or system folder left out (#recycle)" in complaint(tmp_path / "bins")


def test_what_this_program_wrote_into_a_folder_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default run, its pictures, its folders of links, and its tables; a second look and a second run see the same."""
    photos = tmp_path / "photos"
    write_good_images(photos, 12, size=(36, 32))
    wanted = names(open_source(photos))
    monkeypatch.chdir(photos)
    options = {"arch": "alexnet-small", "image_size": 32, "epochs": 1, "clusters": 3, "workers": 0, "device": "cpu"}
    run = deepcluster.train(".", reporter=QUIET, **options)
    assert run == Path("runs/photos")
    assert names(open_source(".")) == wanted
    assert "no images, only 3 tables that deepcluster wrote: " in complaint(run)
    touch(run, "visualization/filters/conv1/0000.png")
    for folder in ("by-cluster", "deep/by-cluster-2"):
        deepcluster.assign(run, ".", folders=folder, device="cpu", workers=0, reporter=QUIET)
        assert sum(path.is_symlink() for path in Path(folder).rglob("*")) == len(wanted)
        assert names(open_source(".")) == wanted
    assert (
        "3 folders that deepcluster wrote left out (by-cluster, deep/by-cluster-2, runs/photos)"
        in open_source(".").describe()
    )
    assert len(names(open_source("by-cluster"))) == len(wanted)  # Asked for, they are data.
    deepcluster.train(".", out=run, resume=True, reporter=QUIET, **options)
    assert "holds no images" in complaint("runs") and "runs/photos" not in complaint("deep")
    # Nor is its table taken for images where these are in Parquet.
    rows = {"image": [path.read_bytes() for path in sorted(photos.glob("*.*"))[:3] if path.is_file()]}
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "parquet/images.parquet")
    deepcluster.embed(run, tmp_path / "parquet", out=tmp_path / "parquet/f.parquet", device="cpu", workers=0, reporter=QUIET)
    source = open_source(tmp_path / "parquet")
    assert len(source) == len(rows["image"])
    assert "1 table that deepcluster wrote left out" in source.describe()
    assert "has no column of image files" in complaint(tmp_path / "parquet/f.parquet")


def test_a_folder_with_a_config_of_its_own_is_no_run(tmp_path: Path) -> None:
    touch(tmp_path, "a/config.json", "a/1.jpg", "b/checkpoints/1.jpg", "b/config.json", "c/assignments/x.jpg")
    assert len(open_source(tmp_path)) == 3
    (tmp_path / "b" / MARK).touch()
    assert names(open_source(tmp_path)) == ["a/1.jpg", "c/assignments/x.jpg"]
    assert open_source(tmp_path).changed() is None


# The default run


@pytest.mark.parametrize(
    "given", ["..", ".", "../", "./", "../../photos/deep/..", "../.", "{root}", "{root}/deep/..", "~", "~/"]
)
def test_the_default_run_is_named_after_the_folder(tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "photos/deep"
    deep.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "photos"))
    monkeypatch.chdir(deep if given.startswith("..") else tmp_path / "photos")
    assert default_run(given.format(root=tmp_path / "photos")) == Path("runs/photos")


def test_the_default_run_of_links_files_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "vol7/a.jpg", "x/list.txt")
    Path("photos").symlink_to("vol7")
    for given, want in {
        "photos": "photos",
        "photos/.": "vol7",
        "x/list.txt": "list",
        "/": "root",
        "https://host/d/a.tar?token=secret": "a.tar",
        "s3://bucket": "s3-bucket",
    }.items():
        assert default_run(given) == Path("runs") / want


# Layouts


@pytest.mark.parametrize(
    "parts", [("Train", "Val"), ("TRAIN", "Test"), ("training", "validation"), ("training_set", "test_set")]
)
@pytest.mark.parametrize("wrapper", ["", "imagenette2/"])
def test_parts_of_a_data_set_by_any_name(tmp_path: Path, parts: tuple[str, str], wrapper: str) -> None:
    touch(tmp_path, *(f"{wrapper}{part}/{kind}/1.jpg" for part in parts for kind in ("cat", "dog")))
    assert open_source(tmp_path).class_names == ["cat", "dog"]
    data = open_train_val(tmp_path)
    assert (len(data.train.source), data.val.class_names) == (2, ["cat", "dog"])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["cats/1.jpg", "cats/2.jpg"], "no labels (all images lie in one folder, cats)"),
        (["cat/1.jpg", "dog/2.jpg", "3.jpg"], "images lie directly in the top folder, beside folders such as cat"),
        (["train/cat/1.jpg", "val/2.jpg"], "images lie directly in val/, beside folders such as cat"),
        (["images/1.jpg", "labels.csv"], "images; labels.csv may have some: give it as DATA to use them), 1 other file"),
        (["images/train/1.jpg", "images/val/2.jpg", "labels/train/1.txt"], "2 images in 2 folders (.jpg 2), 1 other file"),
    ],
)
def test_layouts_without_labels_say_why(tmp_path: Path, files: list[str], words: str) -> None:
    source = open_source(touch(tmp_path, *files))
    assert labels(source) is None
    assert words in source.describe()


def test_one_class_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.jpg", "val/cat/2.jpg")
    with pytest.raises(InputError, match=r"0 of 1 image have a class \(all images lie in one folder, cat\)"):
        open_train_val(tmp_path)
    for part in ("train", "val"):
        (tmp_path / part).rename(tmp_path / f"images {part == 'val'}")
        (tmp_path / f"{part}.csv").write_text(f"path,label\nimages {part == 'val'}/cat/{1 + (part == 'val')}.jpg,cat\n")
    with pytest.raises(InputError, match="all images are of one class, cat: there is nothing to tell apart"):
        open_train_val(tmp_path)


# Names in what is written


@pytest.mark.parametrize(
    "name", ["a.jpg", "a b.jpg", "a\nb.jpg", "a\rb", "a\u2028b", "a\tb", '"a".jpg', " a.jpg", "#a.jpg", "é\\n.jpg"]
)
def test_a_name_is_one_line_and_comes_back(name: str) -> None:
    line = as_line(name)
    assert len(line.splitlines()) == 1
    assert of_line(line) == name
    assert (line == name) == (name in ("a.jpg", "a b.jpg", "é\\n.jpg"))


def test_names_with_line_breaks_in_the_table_of_unreadable_images(tmp_path: Path) -> None:
    reasons = {name: f"of {name!r}" for name in ("a\nb.jpg", "c\rd.jpg", "e\r\nf", 'g"h, i', "j\u2028k", "l.jpg")}
    folder = RunFolder(tmp_path)
    folder.write_unreadable(reasons)
    with folder.unreadable.open(newline="", encoding="utf-8") as file:
        assert {row["name"]: row["reason"] for row in csv.DictReader(file)} == reasons
    assert folder.unreadable.read_bytes().endswith(b"\nl.jpg,of 'l.jpg'\n")


def test_links_differ_on_systems_where_names_that_look_equal_are_equal(trained: Path, images: Path, tmp_path: Path) -> None:
    content = next(path for path in sorted(images.iterdir()) if path.suffix == ".png").read_bytes()
    for name in ("a.png", "A.png", "d/é.png", "d/" + unicodedata.normalize("NFD", "é.png"), "d__É.png", "x\ny.png"):
        (touch(tmp_path / "photos", name) / name).write_bytes(content)
    deepcluster.assign(trained, tmp_path / "photos", folders=tmp_path / "by", device="cpu", workers=0, reporter=QUIET)
    links = [path.name for path in (tmp_path / "by").rglob("*.png")]
    assert len(links) == len({unicodedata.normalize("NFC", name).casefold() for name in links}) == 6


def test_the_names_beside_an_array(trained: Path, images: Path, tmp_path: Path) -> None:
    content = next(path for path in sorted(images.iterdir()) if path.suffix == ".png").read_bytes()
    odd = ["a\nb.png", "c\rd.png", "e\u2028f.png", "g.png", ' "h".png']
    for name in odd:
        (touch(tmp_path / "photos", name) / name).write_bytes(content)
    made = deepcluster.embed(trained, tmp_path / "photos", out=tmp_path / "f.npy", device="cpu", workers=0, reporter=QUIET)
    lines = (tmp_path / "f.names.txt").read_text(encoding="utf-8").splitlines()
    assert [of_line(line) for line in lines] == made.names == sorted(odd)
    (tmp_path / "f.names.txt").rename(tmp_path / "photos/list.txt")
    assert names(open_source(tmp_path / "photos/list.txt")) == made.names


# Where something is to be written


def test_outputs_that_can_not_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, is_folder, words in (
        (tmp_path / "file/x.parquet", False, "does not exist or can't be written to"),
        (tmp_path / "none/x.parquet", False, "does not exist or can't be written to"),
        (tmp_path, False, "is a folder"),
        (tmp_path / ("x" * 300), False, "file name too long"),
        (tmp_path / "file/deep/x", True, "file is a file or can't be written to"),
        (tmp_path / "file", True, "file is a file or can't be written to"),
        (tmp_path / ("x" * 300), True, "file name too long"),
    ):
        with pytest.raises(InputError, match=words):
            output_path(path, "--out", is_folder=is_folder)
    assert output_path(tmp_path / "new/deep", "--out", is_folder=True) == tmp_path / "new/deep"
    assert output_path("~/x.npy", "--out", endings=(".npy",)) == Path.home() / "x.npy"


def test_results_that_can_not_be_written_are_printed_all_the_same(trained: Path, tmp_path: Path) -> None:
    """Of a run whose folder of results is a file: root may write into any folder."""
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir()
    for entry in trained.iterdir():
        (run / entry.name).symlink_to(entry)
    (run / "evaluation").unlink(missing_ok=True)
    (run / "evaluation").touch()
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            write_good_images(data / part / kind, 4, size=(36, 32))
    command = [
        sys.executable,
        "-m",
        "deepcluster",
        "evaluate",
        "knn",
        str(run),
        "--data",
        str(data),
        "--k",
        "2",
        "--device",
        "cpu",
    ]
    done = subprocess.run([*command, "--workers", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "knn of" in done.stdout and "Traceback" not in done.stderr
    assert f"the results can't be written to {run}/evaluation/knn.json" in done.stdout + done.stderr


def test_the_demo_in_a_folder_that_can_not_be_written_to(tmp_path: Path) -> None:
    from deepcluster.demo import demo

    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file or can't be written to"):
        demo(tmp_path / "file/demo", QUIET)
