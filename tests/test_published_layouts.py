"""Data sets as they are published: Tiny-ImageNet, ImageNet's flat validation set, tables beside folders, and their siblings.

The labels are those of torchvision's ImageFolder on a copy with class folders.
"""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from small_runs import metrics, train_small
from torchvision.datasets import ImageFolder, imagenet

from deepcluster.core.errors import InputError
from deepcluster.core.names import PackedNames
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.evaluation.datasets.labelled import Labelled, open_train_val

WNIDS = ("n02124075", "n01443537", "n04067472")  # not in order, as in wnids.txt
WORDS = {"n01443537": "goldfish", "n02124075": "Egyptian cat", "n04067472": "reel"}
COLOURS = dict(zip(WNIDS, ((200, 40, 40), (40, 200, 40), (40, 40, 200)), strict=True))
VAL = [WNIDS[number] for number in (2, 0, 1, 1, 0, 2)]


def jpeg(path: Path, wnid: str = WNIDS[0], number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(-30, 30, (64, 64, 3))
    Image.fromarray((np.array(COLOURS[wnid]) + noise).astype(np.uint8)).save(path, format="JPEG")


def tiny_imagenet(root: Path) -> Path:
    """As the archive is unpacked, with 3 classes of 4 images, 6 validation and 5 test images."""
    for wnid in WNIDS:
        for number in range(4):
            jpeg(root / f"train/{wnid}/images/{wnid}_{number}.JPEG", wnid, number)
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    for number, wnid in enumerate(VAL):
        jpeg(root / f"val/images/val_{number}.JPEG", wnid, 100 + number)
    for number in range(5):
        jpeg(root / f"test/images/test_{number}.JPEG", number=200 + number)
    rows = (f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n" for number, wnid in enumerate(VAL))
    (root / "val/val_annotations.txt").write_text("".join(rows))
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("n00001740\tentity\n" + "".join(f"{a}\t{b}, other name\n" for a, b in WORDS.items()))
    return root


def imagenet_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}"


def imagenet_layout(root: Path) -> Path:
    """`train/` of class folders, and `val/` without."""
    for wnid in WNIDS:
        for number in range(3):
            jpeg(root / f"train/{wnid}/{wnid}_{number}.JPEG", wnid, number)
    for number, wnid in enumerate(VAL, 1):
        jpeg(root / f"val/{imagenet_name(number)}.JPEG", wnid, 100 + number)
    return root


def devkit(folder: Path) -> Path:
    """ImageNet's development kit, with a class that has children."""
    data = folder / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"), ("children", "O")]
    rows = [(number, wnid, f"{WORDS[wnid]}, x", "a gloss", 0, []) for number, wnid in enumerate(WNIDS, 1)]
    synsets = np.array([*rows, (4, "n00001740", "entity", "a gloss", 2, [1, 2])], dtype=kinds).reshape(-1, 1)
    savemat(data / "meta.mat", {"synsets": synsets})
    lines = (f"{WNIDS.index(wnid) + 1}\n" for wnid in VAL)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines))
    return data.parent


def devkit_tar(folder: Path) -> Path:
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(devkit(folder / "made"), arcname="ILSVRC2012_devkit_t12")
    shutil.rmtree(folder / "made")
    return folder


def kaggle(folder: Path) -> Path:
    """`LOC_val_solution.csv`, in another order than the images', some of which have two boxes."""
    rows = [(imagenet_name(number), f"{wnid} 85 1 499 272 " * (1 + number % 2)) for number, wnid in enumerate(VAL, 1)]
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows[::-1], columns=["ImageId", "PredictionString"]).to_csv(folder / "LOC_val_solution.csv", index=False)
    return folder


def rearranged(images: Iterable[Path], classes: Iterable[str], to: Path) -> ImageFolder:
    for image, name in zip(images, classes, strict=True):
        (to / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, to / name / image.name)
    return ImageFolder(str(to))


def numbers(part: Labelled | ImageSource) -> dict[str, int]:
    """The number of the class of each image, by the name of its file."""
    source = part.source if isinstance(part, Labelled) else part
    assert source.labels_N is not None
    return {source.name(index).rpartition("/")[2]: label for index, label in enumerate(source.labels_N.tolist())}


def of_folder(folder: ImageFolder) -> dict[str, int]:
    return {Path(path).name: label for path, label in folder.samples}


def deepcluster(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepcluster", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_imagenet(tmp_path_factory.mktemp("data") / "tiny-imagenet-200")


# Tiny-ImageNet


def test_tiny_imagenet_has_the_labels_of_a_copy_with_class_folders(tiny: Path, tmp_path: Path) -> None:
    data = open_train_val(tiny)
    assert data.describe() == {"train_images": 12, "val_images": 6, "classes": 3}
    assert data.notes == []
    val = [tiny / f"val/images/val_{number}.JPEG" for number in range(6)]
    assert numbers(data.val) == of_folder(rearranged(val, VAL, tmp_path / "val"))
    assert numbers(data.train) == of_folder(ImageFolder(str(tiny / "train")))
    assert data.val.class_names == data.train.class_names == [f"{wnid} {WORDS[wnid]}" for wnid in sorted(WNIDS)]


def test_any_folder_of_tiny_imagenet_may_be_given(tiny: Path) -> None:
    whole = numbers(open_train_val(tiny).val)
    for folder in ("val", "val/images"):
        assert numbers(open_source(tiny / folder)) == whole
    for folder in (tiny, tiny.parent):
        source = open_source(folder)
        assert {name: label for name, label in numbers(source).items() if name in whole} == whole
        assert not any("test_" in source.name(index) for index in range(len(source)))
        assert len(open_train_val(folder).val.source) == 6
    assert open_source(tiny / "test").labels_N is None


def test_the_root_says_what_is_labelled_and_what_is_left_out(tiny: Path) -> None:
    said = open_source(tiny).describe()
    assert said.startswith("18 images in 4 folders (.JPEG 18), ")
    assert "labels of 3 classes from 3 class folders and val_annotations.txt (used for diagnostics only), " in said
    assert "5 of 23 images left out: those in test/ have no labels, " in said
    assert deepcluster("info", tiny).stdout.startswith(said)


def test_what_is_left_out_is_no_change_of_the_data(tiny: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny, tmp_path / "copy"))
    source = open_source(root)
    assert source.changed() is None
    (root / "test/images/test_0.JPEG").unlink()
    assert source.changed() is None
    (root / "val/images/val_0.JPEG").unlink()
    assert source.changed() == "1 image is gone (val/images/val_0.JPEG)"


def test_commands_take_tiny_imagenet(tiny: Path, tmp_path: Path) -> None:
    """`evaluate` finds the same as on a copy with class folders; `train` sees no test image."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny / "train", copy / "train")
    rearranged([tiny / f"val/images/val_{number}.JPEG" for number in range(6)], VAL, copy / "val")
    results = []
    for data in (tiny, copy):
        out = tmp_path / f"{len(results)}.json"
        done = deepcluster("evaluate", "knn", "untrained:alexnet-small", "--data", data, "--k", 3, "--out", out, "--quiet")
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
    assert results[0]["results"] == results[1]["results"]
    about = {**results[0]["data"], "path": ""}
    assert about == {**results[1]["data"], "path": ""}
    assert about["classes"] == 3
    run = train_small(tiny, tmp_path / "run", epochs=1)
    assert 0 <= metrics(run)[-1]["nmi_labels"] <= 1
    table = pq.read_table(next(iter(sorted((run / "assignments").glob("*.parquet")))))
    assert [name.partition("/")[0] for name in table["name"].to_pylist()] == ["train"] * 12 + ["val"] * 6


VARIANTS: dict[str, Callable[[str], bytes]] = {
    "BOM": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "line ends of Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "blank lines": lambda text: ("\n\n" + text.replace("\n", "\n\n  \n")).encode(),
    "no end": lambda text: text.rstrip("\n").encode(),
    "more columns": lambda text: text.replace("62\n", "62\tok\t\t\n").encode(),
    "no boxes": lambda text: text.replace("\t0\t32\t44\t62", "").encode(),
    "spaces": lambda text: text.replace("\t", "  ").encode(),
    "small letters": lambda text: text.replace("JPEG", "jpeg").encode(),
    "another ending": lambda text: text.replace("JPEG", "png").encode(),
    "another order": lambda text: "\n".join(text.splitlines()[::-1]).encode(),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_annotations_as_other_programs_write_them(tiny: Path, tmp_path: Path, variant: str) -> None:
    val = Path(shutil.copytree(tiny / "val", tmp_path / "val"))
    table = val / "val_annotations.txt"
    table.write_bytes(VARIANTS[variant](table.read_text()))
    source = open_source(val)
    assert source.class_names == sorted(WNIDS)
    assert source.label_notes == ()
    assert numbers(source) == numbers(open_train_val(tiny).val)


def spoil(table: Path, change: Callable[[list[str]], list[str]]) -> None:
    table.write_text("\n".join(change(table.read_text().splitlines())))


FAULTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a line lacks": (
        lambda table: spoil(table, lambda lines: lines[1:]),
        5,
        "1 of 6 images has no class in val_annotations.txt, such as images/val_0.JPEG",
    ),
    "lines can't be read": (
        lambda table: spoil(table, lambda lines: ["val_0.JPEG", "?", *lines[2:]]),
        4,
        "2 lines of val_annotations.txt can't be read, such as val_0.JPEG; 2 of 6 images have no class in",
    ),
    "two classes": (
        lambda table: spoil(table, lambda lines: [*lines, f"val_3.JPEG\t{WNIDS[2]}"]),
        5,
        f"val_annotations.txt gives 1 image two classes, such as val_3.jpeg: {WNIDS[1]} and {WNIDS[2]}",
    ),
    "empty": (lambda table: table.write_text(""), 0, "val_annotations.txt gives no image a class"),
    "of other images": (
        lambda table: spoil(table, lambda lines: [line.replace("val_", "image_") for line in lines]),
        0,
        "val_annotations.txt names none of the images",
    ),
    "a pointer": (
        lambda table: table.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"),
        0,
        "val_annotations.txt is no table: it is a Git LFS pointer; fetch the file itself with `git lfs pull`",
    ),
    "half of UTF-16": (lambda table: table.write_bytes(b"\xff\xfea"), 0, "val_annotations.txt can't be read as text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_annotations_is_said_and_only_evaluation_ends(tiny: Path, tmp_path: Path, fault: str) -> None:
    root = Path(shutil.copytree(tiny, tmp_path / "copy"))
    spoiled, known, words = FAULTS[fault]
    spoiled(root / "val/val_annotations.txt")
    source = open_source(root / "val")
    assert known == (0 if source.labels_N is None else int((source.labels_N >= 0).sum()))
    assert words in source.describe()
    with pytest.raises(InputError) as refused:
        open_train_val(root)
    assert f"{root / 'val'}: {known} of 6 images have a class (" in str(refused.value)
    assert words in str(refused.value)


def test_annotations_of_images_that_are_not_there_are_counted(tiny: Path, tmp_path: Path) -> None:
    """A part of the images is enough for an evaluation, whose result has a note on it."""
    root = Path(shutil.copytree(tiny, tmp_path / "copy"))
    for number in (1, 3):
        (root / f"val/images/val_{number}.JPEG").unlink()
    words = "2 images are in val_annotations.txt but not in the folder, such as val_1.jpeg"
    assert words in open_source(root).describe()
    data = open_train_val(root)
    assert (len(data.val.source), data.notes) == (4, [f"val: {words}"])
    out = tmp_path / "out.json"
    done = deepcluster("evaluate", "knn", "untrained:alexnet-small", "--data", root, "--k", 3, "--out", out)
    assert words in json.loads(out.read_text())["notes"][0]
    assert words in done.stdout.replace("\n", " ") + done.stderr.replace("\n", " ")


def test_validation_images_that_were_moved_into_class_folders(tiny: Path, tmp_path: Path) -> None:
    """With and without the file that is then left over; `test/images/` is no class."""
    root = Path(shutil.copytree(tiny, tmp_path / "copy"))
    want = numbers(open_train_val(root).val)
    for number, wnid in enumerate(VAL):
        (root / f"val/{wnid}/images").mkdir(parents=True, exist_ok=True)
        (root / f"val/images/val_{number}.JPEG").rename(root / f"val/{wnid}/images/val_{number}.JPEG")
    (root / "val/images").rmdir()
    for _ in range(2):
        assert numbers(open_train_val(root).val) == want
        source = open_source(root)
        assert [name.split()[0] for name in source.class_names] == sorted(WNIDS)
        assert "labels from 3 class folders (used for diagnostics only), 5 without a label" in source.describe()
        (root / "val/val_annotations.txt").unlink(missing_ok=True)


# ImageNet


PLACES: dict[str, Callable[[Path], object]] = {
    "devkit beside": devkit,
    "devkit archive beside": devkit_tar,
    "devkit in val": lambda root: devkit(root / "val"),
    "devkit above": lambda root: devkit(root.parent),
    "files of the devkit": lambda root: shutil.move(devkit(root) / "data", root / "devkit"),
    "Kaggle's table beside": kaggle,
    "Kaggle's table in val": lambda root: kaggle(root / "val"),
    "Kaggle's table above": lambda root: kaggle(root.parent),
    "all": lambda root: (devkit(root), devkit_tar(root.parent), kaggle(root)),
}


@pytest.mark.parametrize("place", PLACES)
def test_imagenets_flat_validation_set_has_the_labels_of_a_copy_with_class_folders(tmp_path: Path, place: str) -> None:
    root = imagenet_layout(tmp_path / "data/imagenet")
    PLACES[place](root)
    val = [root / f"val/{imagenet_name(number)}.JPEG" for number in range(1, 7)]
    want = of_folder(rearranged(val, VAL, tmp_path / "copy"))
    data = open_train_val(root)
    assert data.describe() == {"train_images": 9, "val_images": 6, "classes": 3}
    assert (numbers(data.val), data.notes) == (want, [])
    assert numbers(open_source(root / "val")) == want
    whole = open_source(root)
    assert whole.labels_N is not None and (whole.labels_N >= 0).all()
    assert {name: label for name, label in numbers(whole).items() if name in want} == want
    assert "labels of 3 classes from 3 class folders and " in whole.describe()


def test_the_devkit_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose own check of the archive's sum is given that of this archive."""
    root = imagenet_layout(tmp_path)
    archive = devkit_tar(root) / "ILSVRC2012_devkit_t12.tar.gz"
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
    imagenet.parse_devkit_archive(root)
    _, wnids = torch.load(root / "meta.bin", weights_only=True)
    source = open_source(root / "val")
    assert source.labels_N is not None
    assert [source.class_names[label] for label in source.labels_N] == wnids == VAL


def test_kaggles_layout(tmp_path: Path) -> None:
    """With the table and the names of the classes at the top of the archive, and test images beside."""
    top = kaggle(tmp_path / "imagenet-object-localization-challenge")
    inner = imagenet_layout(top / "ILSVRC/Data/CLS-LOC")
    jpeg(inner / "test/ILSVRC2012_test_00000001.JPEG")
    (top / "ILSVRC/Annotations").mkdir()
    (top / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {words}, x\n" for wnid, words in WORDS.items()))
    for folder in (top, top / "ILSVRC", top / "ILSVRC/Data", inner):
        data = open_train_val(folder)
        assert data.describe() == {"train_images": 9, "val_images": 6, "classes": 3}
        assert data.val.class_names == [f"{wnid} {WORDS[wnid]}" for wnid in sorted(WNIDS)]
        assert "1 of 16 images left out: those in " in open_source(folder).describe()
    table = pd.read_csv(top / "LOC_val_solution.csv").set_index("ImageId")["PredictionString"].str.split().str[0]
    source = open_source(inner / "val")
    assert source.labels_N is not None
    for index, label in enumerate(source.labels_N):
        assert source.class_names[label].split()[0] == table[source.name(index).removesuffix(".JPEG")]


def test_a_link_to_the_validation_images_leads_to_their_classes(tmp_path: Path) -> None:
    root = imagenet_layout(tmp_path / "a/imagenet")
    devkit(root)
    other = tmp_path / "b"
    other.mkdir()
    for part in ("train", "val"):
        (other / part).symlink_to(root / part)
    assert numbers(open_train_val(other).val) == numbers(open_train_val(root).val)


def ground_truth(root: Path, change: Callable[[list[str]], list[str]]) -> None:
    spoil(devkit(root) / "data/ILSVRC2012_validation_ground_truth.txt", change)


TRUTH_FAULTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "none": (lambda root: None, 0, "ImageNet's validation images, but neither ILSVRC2012_devkit_t12.tar.gz, "),
    "too few lines": (
        lambda root: ground_truth(root, lambda lines: lines[:4]),
        4,
        "2 of 6 images have no class in ILSVRC2012_validation_ground_truth.txt, such as ILSVRC2012_val_00000005.JPEG",
    ),
    "an unknown class": (
        lambda root: ground_truth(root, lambda lines: ["1005", *lines[1:]]),
        5,
        "1 line of ILSVRC2012_validation_ground_truth.txt can't be read, such as 1005; 1 of 6 images has no class in",
    ),
    "a blank line within": (
        lambda root: ground_truth(root, lambda lines: [lines[0], "", *lines[2:]]),
        5,
        "1 line of ILSVRC2012_validation_ground_truth.txt can't be read, such as a blank line",
    ),
    "no meta.mat": (
        lambda root: (devkit(root) / "data/meta.mat").unlink(),
        0,
        "meta.mat of ImageNet's devkit can't be read: no such file or directory",
    ),
    "half of meta.mat": (
        lambda root: os.truncate(devkit(root) / "data/meta.mat", 200),
        0,
        "meta.mat of ImageNet's devkit can't be read (",
    ),
    "half of the archive": (
        lambda root: os.truncate(devkit_tar(root) / "ILSVRC2012_devkit_t12.tar.gz", 300),
        0,
        "ILSVRC2012_devkit_t12.tar.gz can't be read (",
    ),
    "two that differ": (
        lambda root: (kaggle(root), ground_truth(root, lambda lines: [lines[1], *lines[1:]])),
        0,
        "LOC_val_solution.csv and ILSVRC2012_validation_ground_truth.txt give different classes to 1 image of 6, such as "
        f"ILSVRC2012_val_00000001.JPEG: {WNIDS[2]} and {WNIDS[0]}; remove the wrong file",
    ),
    "lines without a class": (
        lambda root: spoil(kaggle(root) / "LOC_val_solution.csv", lambda lines: [*lines[:3], "ILSVRC2012_val_00000004,"]),
        2,
        "1 line of LOC_val_solution.csv can't be read, such as ILSVRC2012_val_00000004,; 4 of 6 images have no class in",
    ),
}


@pytest.mark.parametrize("fault", TRUTH_FAULTS)
def test_what_is_wrong_with_the_ground_truth_is_said_and_only_evaluation_ends(tmp_path: Path, fault: str) -> None:
    root = imagenet_layout(tmp_path)
    spoiled, known, words = TRUTH_FAULTS[fault]
    spoiled(root)
    source = open_source(root / "val")
    assert known == (0 if source.labels_N is None else int((source.labels_N >= 0).sum()))
    assert words in source.describe()
    with pytest.raises(InputError) as refused:
        open_train_val(root)
    assert f"{known} of 6 images have a class (" in str(refused.value)
    assert words in str(refused.value)


def test_a_good_source_stands_in_for_a_damaged_one(tmp_path: Path) -> None:
    root = kaggle(imagenet_layout(tmp_path))
    os.truncate(devkit_tar(root) / "ILSVRC2012_devkit_t12.tar.gz", 300)
    data = open_train_val(root)
    assert len(data.val.source) == 6
    assert data.notes[0].startswith("val: ILSVRC2012_devkit_t12.tar.gz can't be read (")


# Tables beside folders


def flat(root: Path) -> tuple[Path, dict[str, str]]:
    """`train/` and `val/` without class folders, and the class of each image."""
    classes = {}
    for part in ("train", "val"):
        for number, wnid in enumerate(VAL):
            jpeg(root / f"{part}/{number}.JPG", wnid, number)
            classes[f"{part}/{number}.JPG"] = f"kind {WNIDS.index(wnid)}"
    return root, classes


FORMS: dict[str, tuple[str, Callable[[Path, str, str], str]]] = {
    "from the folder above": (".csv", lambda root, part, name: f"{part}/{name}"),
    "from the folder": (".csv", lambda root, part, name: name),
    "absolute": (".csv", lambda root, part, name: str(root / part / name)),
    "of Windows": (".csv", lambda root, part, name: f"C:\\data\\{part}\\{name.lower()}"),
    "without an ending": (".tsv", lambda root, part, name: name.removesuffix(".JPG")),
    "a list": (".txt", lambda root, part, name: f"./{part}/{name}"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_beside_a_folder_gives_its_labels(tmp_path: Path, form: str) -> None:
    root, classes = flat(tmp_path)
    ending, path = FORMS[form]
    for part in ("train", "val"):
        rows = [(path(root, part, name.split("/")[1]), label) for name, label in classes.items() if name.startswith(part)]
        with (root / f"{part}{ending}").open("w", newline="", encoding="utf-8-sig") as file:
            if ending == ".txt":
                file.writelines(f"{path}\t{label.replace(' ', '_')}\r\n" for path, label in rows)
            else:
                csv.writer(file, dialect="excel-tab" if ending == ".tsv" else "excel").writerows(
                    [("image_id", "label"), *rows]
                )
    copy = tmp_path / "copy"
    data = open_train_val(root)
    for part, found in (("train", data.train), ("val", data.val)):
        images = [root / name for name in classes if name.startswith(part)]
        want = of_folder(rearranged(images, (classes[f"{part}/{one.name}"] for one in images), copy / part))
        assert numbers(found) == want == numbers(open_source(root / part))
    shutil.rmtree(copy)
    assert open_source(root).class_names == data.val.class_names
    assert f"labels of 3 classes from train{ending} and val{ending}" in open_source(root).describe()


def test_images_that_a_table_does_not_list_are_left_out_of_evaluations(tmp_path: Path) -> None:
    root, classes = flat(tmp_path)
    for part in ("train", "val"):
        rows = [f"{name},{label}" for name, label in classes.items() if name.startswith(part)]
        (root / f"{part}.csv").write_text("\n".join(["path,label", *rows[: 5 if part == "train" else 6]]))
    data = open_train_val(root)
    assert (len(data.train.source), len(data.val.source)) == (5, 6)
    assert data.notes == ["train: 1 of 6 images has no class in train.csv, such as 5.JPG"]
    assert len(open_source(root)) == 12


def test_class_folders_come_before_a_table_and_that_is_said(tmp_path: Path) -> None:
    root = tmp_path
    for part in ("train", "val"):
        for number, wnid in enumerate(VAL):
            jpeg(root / f"{part}/{wnid}/{number}.jpg", wnid, number)
    (root / "val.csv").write_text("path,label\nval/n01443537/2.jpg,fish\n")
    data = open_train_val(root)
    assert data.val.class_names == sorted(WNIDS)
    assert data.notes == ["val: val.csv is not read, since val/ has class folders"]


def test_numbers_beside_class_folders_with_names_are_not_mixed_with_them(tmp_path: Path) -> None:
    """Caffe's list of ImageNet's validation images."""
    root = imagenet_layout(tmp_path)
    (root / "val.txt").write_text("".join(f"{imagenet_name(number)}.JPEG {number % 3}\n" for number in range(1, 7)))
    source = open_source(root)
    assert source.class_names == sorted(WNIDS)
    assert (
        "6 without a label, val.txt has other classes than the class folders, such as 0, and is not used"
        in source.describe()
    )
    assert open_source(root / "val").class_names == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"the classes of train \(3\) and val \(3\) differ: 0, 1, 2, n"):
        open_train_val(root)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("path\nval/0.JPG\n", "val.csv has no labels"),
        ("a,b\n1,2\n", "val.csv has no column of image paths: its first line names a, b"),
        ("path,label\nelsewhere/x.jpg,cat\nelsewhere/y.jpg,dog\n", "val.csv names none of the images"),
    ],
)
def test_a_table_that_gives_no_labels_is_named(tmp_path: Path, table: str, words: str) -> None:
    root, _ = flat(tmp_path)
    (root / "val.csv").write_text(table)
    source = open_source(root / "val")
    assert source.labels_N is None
    assert f"no labels ({words}" in source.describe()


# Other layouts that are no class folders


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (["train2017/1.jpg", "val2017/2.jpg", "unlabeled2017/3.jpg"], None),  # COCO
        (["images/1.jpg", "annotations/trimaps/1.png"], None),  # Oxford-IIIT Pet
        (["JPEGImages/1.jpg", "SegmentationClass/1.png", "SegmentationObject/1.png"], None),  # Pascal VOC
        (["images/training/1.jpg", "annotations/training/1.png"], None),  # ADE20K
        (
            ["CUB_200_2011/images/001.Albatross/1.jpg", "CUB_200_2011/images/002.Auklet/2.jpg"],
            ["001.Albatross", "002.Auklet"],
        ),
        (["101_ObjectCategories/ant/1.jpg", "101_ObjectCategories/bass/2.jpg", "Annotations/x.mat"], ["ant", "bass"]),
        (["train/cat/1.jpg", "train/dog/2.jpg", "test/images/3.jpg"], ["cat", "dog"]),
        (["train/cat/1.jpg", "test/images/3.jpg"], None),
    ],
)
def test_folders_that_are_no_classes_are_taken_for_none(tmp_path: Path, files: list[str], classes: list[str] | None) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    source = open_source(tmp_path)
    assert len(source) == sum(not file.endswith(".mat") for file in files)
    assert source.class_names == (classes or [])
    if classes and "test/images/3.jpg" in files:
        assert source.labels_N is not None and source.labels_N.tolist() == [-1, 0, 1]


def test_imagenette_as_unpacked_beside_its_table_of_noisy_labels(tmp_path: Path) -> None:
    root = tmp_path / "imagenette2"
    for part in ("train", "val"):
        for number, wnid in enumerate(VAL):
            jpeg(root / f"{part}/{wnid}/{part}_{number}.JPEG", wnid, number)
    rows = [f"val/{wnid}/val_{number}.JPEG,{wnid},{WNIDS[0]},{WNIDS[1]},True" for number, wnid in enumerate(VAL)]
    (root / "noisy_imagenette.csv").write_text(
        "path,noisy_labels_0,noisy_labels_1,noisy_labels_5,is_valid\n" + "\n".join(rows)
    )
    for folder in (root, tmp_path):
        data = open_train_val(folder)
        assert data.notes == []
        assert numbers(data.val) == of_folder(ImageFolder(str(root / "val")))
        assert "12 images in 6 folders (.JPEG 12), labels from 3 class folders" in open_source(folder).describe()


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 5), (2, 4), (4, 5), (5, 5)])
def test_names_without_some(start: int, stop: int) -> None:
    wanted = ["a", "", "é/x", "\udce9", "last"]
    packed = PackedNames(wanted)
    assert packed.without(start, stop) == PackedNames(wanted[:start] + wanted[stop:])
    assert list(packed) == wanted
