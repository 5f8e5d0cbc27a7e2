"""Proposals in files that scipy, NumPy, pyarrow and pandas wrote; and what is said of files that don't fit."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy.io import savemat
from vocs import write_voc

from deepcluster.core.errors import InputError
from deepcluster.evaluation.datasets.dense import ObjectSet
from deepcluster.evaluation.datasets.proposals import SMALLEST_SIDE, _usable, read_proposals
from deepcluster.evaluation.datasets.voc import Devkit
from deepcluster.evaluation.datasets.voc_boxes import joined_objects, objects_of

NAMES = ("000005", "000007", "000009")
# In continuous pixels: left, top, right, bottom.
BOXES = {
    "000005": [[0, 0, 20, 10], [3, 4, 7, 9]],
    "000007": [[1, 1, 5, 5]],
    "000009": [[2, 0, 24, 24], [0, 0, 2, 2], [5, 6, 17, 18]],
}
Boxes = Mapping[str, Sequence[Sequence[float]]]


@pytest.fixture
def data(tmp_path: Path) -> ObjectSet:
    """The three images."""
    root = write_voc(tmp_path / "VOC2007", {"test": {name: [] for name in NAMES}})
    return objects_of(Devkit(root, "VOC2007"), "test")


def cells(values: Sequence[object]) -> NDArray[np.object_]:
    """A cell array, as MATLAB's."""
    found = np.empty((1, len(values)), dtype=object)
    for number, value in enumerate(values):
        found[0, number] = value
    return found


def write_mat(file: Path, boxes: Boxes, *, names: bool = True, dtype: type = float) -> Path:
    """A file as of 2014: (ymin, xmin, ymax, xmax), counted from 1, the last pixel included."""
    matrices = [np.array([[t + 1, l + 1, b, r] for l, t, r, b in some], dtype).reshape(-1, 4) for some in boxes.values()]  # noqa: E741
    savemat(file, {"boxes": cells(matrices)} | ({"images": cells(list(boxes)).T} if names else {}), do_compression=True)
    return file


def write_npz(file: Path, boxes: Boxes) -> Path:
    np.savez(file, **{name: np.array(some, dtype=np.float64).reshape(-1, 4) for name, some in boxes.items()})
    return file


def frame(boxes: Boxes) -> pd.DataFrame:
    rows = [[name, *box] for name, some in boxes.items() for box in some]
    return pd.DataFrame(rows, columns=["image", "left", "top", "right", "bottom"])


def write_csv(file: Path, boxes: Boxes) -> Path:
    frame(boxes).to_csv(file, index=False)
    return file


def write_parquet(file: Path, boxes: Boxes) -> Path:
    frame(boxes).to_parquet(file)
    return file


WRITERS: dict[str, Callable[[Path, Boxes], Path]] = {
    "a.mat": write_mat,
    "a.npz": write_npz,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
    "A.MAT": write_mat,
}


def found_in(path: Path, data: ObjectSet) -> list[list[list[float]]]:
    proposals = read_proposals(path, data)
    assert all(proposals(index).dtype == torch.float32 for index in range(len(data)))
    return [proposals(index).tolist() for index in range(len(data))]


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_boxes_of_all_kinds_of_files(tmp_path: Path, data: ObjectSet, name: str) -> None:
    """Whatever the order in the file, and the images that are in no list of ours."""
    others = {"000009": BOXES["000009"], "000004": [[0, 0, 9, 9]], "000007": BOXES["000007"], "000005": BOXES["000005"]}
    assert found_in(WRITERS[name](tmp_path / name, others), data) == list(BOXES.values())


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_without_names_the_boxes_are_in_the_order_of_the_list(tmp_path: Path, data: ObjectSet, dtype: type) -> None:
    assert found_in(write_mat(tmp_path / "a.mat", BOXES, names=False, dtype=dtype), data) == list(BOXES.values())
    two = {name: BOXES[name] for name in NAMES[:2]}
    with pytest.raises(
        InputError, match=r"boxes of 2 images without their names, but VOC2007 test has 3: give the file that"
    ):
        read_proposals(write_mat(tmp_path / "a.mat", two, names=False), data)


@pytest.mark.parametrize("form", ["{}.jpg", "JPEGImages/{}.jpg", "VOC2007\\JPEGImages\\{}.JPG", "/data/VOC2007/{}"])
def test_names_with_folders_and_endings(tmp_path: Path, data: ObjectSet, form: str) -> None:
    renamed = {form.format(name): boxes for name, boxes in BOXES.items()}
    assert found_in(write_csv(tmp_path / "a.csv", renamed), data) == list(BOXES.values())


def test_two_devkits_with_images_of_the_same_name(tmp_path: Path) -> None:
    """The folder tells them apart; a name that is in both is not guessed."""
    devkits = []
    for year in ("VOC2007", "VOC2012"):
        devkits.append(Devkit(write_voc(tmp_path / year, {"train": {"1": [], year: []}}), year))
    joined = joined_objects(devkits, "train")
    boxes = {"VOC2007/1": [[0, 0, 5, 5]], "VOC2007": [[0, 0, 6, 6]], "VOC2012/1": [[0, 0, 7, 7]], "VOC2012": [[0, 0, 8, 8]]}
    assert found_in(write_csv(tmp_path / "a.csv", boxes), joined) == list(boxes.values())
    bare = {name.replace("VOC2012/1", "1"): some for name, some in boxes.items()}
    with pytest.raises(InputError, match=r"no boxes of 1 of the 4 images of VOC2007 train \+ VOC2012 train: VOC2012/1\.jpg"):
        read_proposals(write_csv(tmp_path / "a.csv", bare), joined)


def test_small_and_repeated_boxes_are_left_out(tmp_path: Path, data: ObjectSet) -> None:
    """A side of two pixels is kept, one of less is not; the first of equal ones keeps its place."""
    some = [[5, 5, 9, 9], [0, 0, 2, 2], [0, 0, 1, 9], [3, 3, 9, 4.5], [5, 5, 9, 9], [9, 9, 5, 5], [0, 0, 2, 2], [1, 1, 4, 4]]
    boxes = dict.fromkeys(NAMES, some)
    assert found_in(write_npz(tmp_path / "a.npz", boxes), data) == [[[5, 5, 9, 9], [0, 0, 2, 2], [1, 1, 4, 4]]] * 3


@given(arrays.arrays(np.float32, st.tuples(st.integers(0, 30), st.just(4)), elements=st.integers(-3, 5).map(float)))
def test_what_is_kept_equals_a_naive_loop(boxes_P4: NDArray[np.float32]) -> None:
    boxes_P4 = np.where(boxes_P4 == 1, np.float32(-0.0), boxes_P4)
    kept: list[list[float]] = []
    for box in boxes_P4.tolist():
        if box not in kept and min(box[2] - box[0], box[3] - box[1]) >= SMALLEST_SIDE:
            kept.append(box)
    assert _usable(boxes_P4, "").tolist() == kept


def test_an_image_without_boxes(tmp_path: Path, data: ObjectSet) -> None:
    """It is there, with an empty matrix, which MATLAB writes as 0 × 0."""
    boxes = BOXES | {"000007": []}
    assert found_in(write_npz(tmp_path / "a.npz", boxes), data)[1] == []
    empty = {"boxes": cells([np.zeros((0, 0))] * 3), "images": cells(NAMES)}
    savemat(tmp_path / "a.mat", empty)
    assert found_in(tmp_path / "a.mat", data) == [[], [], []]
    with pytest.raises(InputError, match=r"a\.csv has no boxes of 1 of the 3 images of VOC2007 test: 000007\.jpg"):
        read_proposals(write_csv(tmp_path / "a.csv", boxes), data)


def test_a_folder_with_a_file_for_each_list(tmp_path: Path, data: ObjectSet) -> None:
    """As the archive of 2014; files of other lists don't matter, named or not."""
    folder = tmp_path / "selective_search_data"
    folder.mkdir()
    write_mat(folder / "voc_2007_test.mat", BOXES, names=False)
    write_mat(folder / "voc_2007_train.mat", {"000001": [[0, 0, 5, 5]]}, names=False)
    write_mat(folder / "voc_2007_val.mat", {"000002": [[0, 0, 5, 5]]})
    (folder / "README.txt").write_text("of 2014")
    assert found_in(folder, data) == list(BOXES.values())
    (folder / "voc_2007_test.mat").unlink()
    with pytest.raises(InputError, match=r"selective_search_data has no boxes of 3 of the 3 images"):
        read_proposals(folder, data)


def test_what_does_not_fit_is_told(tmp_path: Path, data: ObjectSet) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_proposals(tmp_path / name, data)

    refused("none.mat", "none.mat: it does not exist")
    refused("none.txt", r"proposals are read from files \.mat, \.npz, \.csv, \.parquet; .* is not one of them")
    (tmp_path / "empty").mkdir()
    refused("empty", r"empty is a folder without them: it is empty")
    for ending in ("mat", "npz", "parquet"):
        (tmp_path / f"damaged.{ending}").write_bytes(b"\x00\x01 nothing of the kind")
        refused(f"damaged.{ending}", rf"damaged\.{ending} can't be read as proposals: \S")
    (tmp_path / "new.mat").write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    refused("new.mat", r"new\.mat is of MATLAB 7\.3 \(HDF5\), which is not read\. In MATLAB, write: save\(.*'-v7'\)")
    (tmp_path / "h5py.mat").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))
    refused("h5py.mat", "which is not read")
    savemat(tmp_path / "other.mat", {"regions": np.ones((3, 4))})
    refused("other.mat", "has no variable boxes; expected a cell array")
    savemat(tmp_path / "matrix.mat", {"boxes": np.ones((3, 4))})
    refused("matrix.mat", "has boxes of float64; expected a cell array")
    savemat(tmp_path / "names.mat", {"boxes": cells([np.ones((1, 4))] * 3), "images": cells(NAMES[:2])})
    refused("names.mat", r"has boxes of 3 images, but 2 names in images")
    savemat(tmp_path / "five.mat", {"boxes": cells([np.ones((3, 5))] * 3), "images": cells(NAMES)})
    refused("five.mat", r"the boxes of 000005 are float64 of shape \(3, 5\); they must be rows of four numbers")
    np.savez(tmp_path / "pickled.npz", **{"000005": np.array([{}], dtype=object)})
    refused("pickled.npz", "can't be read as proposals")
    write_csv(tmp_path / "finite.csv", {"000005": [[0, 0, float("inf"), 4]]})
    refused("finite.csv", "the boxes of 000005 have numbers that are not finite")
    frame(BOXES).rename(columns={"left": "x"}).to_csv(tmp_path / "columns.csv", index=False)
    refused("columns.csv", r"has the columns image, x, top, right, bottom, but not left; proposals have image, left, top")
    (tmp_path / "words.csv").write_text("image,left,top,right,bottom\n000005,a,b,c,d\n")
    refused("words.csv", "can't be read as proposals")
    frame(BOXES).astype({"image": int}).to_parquet(tmp_path / "numbers.parquet")
    refused("numbers.parquet", "its column image must have the name of an image in each row; it is int64")


def test_a_table_with_categories_in_several_groups(tmp_path: Path, data: ObjectSet) -> None:
    table = pa.Table.from_pandas(frame(BOXES).astype({"image": "category"}).sample(frac=1, random_state=3))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = found_in(tmp_path / "a.parquet", data)
    assert [sorted(some) for some in found] == [sorted(some) for some in BOXES.values()]
