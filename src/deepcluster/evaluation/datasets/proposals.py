"""Regions that may show objects, found beforehand by another program, such as selective search (Uijlings et al., IJCV 2013).

Three kinds of files are read:

- `.mat`, as the selective search of Fast R-CNN was published in 2014: `boxes` is a cell array with the boxes (P, 4) of each
  image, as (ymin, xmin, ymax, xmax), in pixels counted from 1 of which the last ones belong to the box; `images` is a cell
  array of the names. Without `images`, the boxes are of the images of the list, in its order.
- `.npz`: boxes (P, 4) by the name of the image.
- `.csv` and `.parquet`: a row per box, with the columns image, left, top, right, bottom.

The last two are in continuous pixels, as `Objects` are. Names may be with or without folders and ending. P proposals.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.files import begin_of, read_table
from deepcluster.core.text import count_of
from deepcluster.data.sources.files import IMAGE_ENDINGS
from deepcluster.evaluation.datasets.dense import DenseSet
from deepcluster.evaluation.datasets.labelled import contents_of, some

COLUMNS = ("image", "left", "top", "right", "bottom")
SMALLEST_SIDE = 2.0
HDF5 = (b"MATLAB 7.3", b"\x89HDF")


@dataclass(frozen=True)
class Proposals:
    """The proposals of N images, each once and none with a side below 2 pixels; of image i from row starts_N[i] on.

    Called with the index of an image, it returns (P, 4), float32, as `Objects.boxes_M4`.
    """

    starts_N: Tensor
    boxes_P4: Tensor

    def __call__(self, index: int) -> Tensor:
        return self.boxes_P4[int(self.starts_N[index]) : int(self.starts_N[index + 1])]


@dataclass(frozen=True)
class _File:
    """The boxes in a file as they are there, by number; `names` of the images, None where it has none."""

    names: list[str] | None
    boxes: Sequence[NDArray[Any]]


def read_proposals(path: Path, data: DenseSet) -> Proposals:
    """Return the proposals of each image of a set.

    Args:
        path: a file, or a folder of files, such as one for each list of images.

    Raises:
        InputError: no such file, it can't be read, it has boxes of another form, or none of some images.
    """
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS) if path.is_dir() else [path]
    if not files or (path.suffix.lower() not in READERS and not path.is_dir()):
        where = f"a folder without them: {contents_of(path)}" if path.is_dir() else "not one of them"
        raise InputError(f"proposals are read from files {', '.join(READERS)}; {path} is {where}")
    index_of, found = _indices(data), dict[int, NDArray[np.float32]]()
    for file in files:
        content = _read(file)
        if content.names is None and len(content.boxes) != len(data) and not path.is_dir():
            raise InputError(
                f"{file} has boxes of {count_of(len(content.boxes), 'image')} without their names, but {data.name} has "
                f"{len(data):,}: give the file that was made for this list, or a folder with a file for each list"
            )
        if content.names is None:
            places: list[int | None] = [*range(len(data))] if len(content.boxes) == len(data) else []
        else:
            places = [_place(name, index_of) for name in content.names]
        for number, index in enumerate(places):
            if index is not None and index not in found:
                label = content.names[number] if content.names else data.source.name(index)
                found[index] = _usable(content.boxes[number], f"{file}: the boxes of {label}")
    missing = [data.source.name(index) for index in range(len(data)) if index not in found]
    if missing:
        raise InputError(
            f"{path} has no boxes of {len(missing):,} of the {count_of(len(data), 'image')} of {data.name}: {some(missing)}"
        )
    boxes = [found[index] for index in range(len(data))]
    starts_N = np.cumsum([0, *map(len, boxes)])
    return Proposals(torch.from_numpy(starts_N), torch.from_numpy(np.concatenate(boxes)))


def _indices(data: DenseSet) -> dict[str, int]:
    """Return the index of each image by its name without ending, and by that without folders where it is unique."""
    keys = [_key(data.source.name(index)) for index in range(len(data))]
    bases = Counter(PurePosixPath(key).name for key in keys)
    short = {PurePosixPath(key).name: index for index, key in enumerate(keys) if bases[PurePosixPath(key).name] == 1}
    return short | {key: index for index, key in enumerate(keys)}


def _place(name: str, index_of: dict[str, int]) -> int | None:
    key = _key(name)
    return index_of.get(key, index_of.get(PurePosixPath(key).name))


def _key(name: str) -> str:
    """Return a name without the ending of an image file."""
    head, _, ending = name.replace("\\", "/").rpartition(".")
    return head if head and ending.lower() in IMAGE_ENDINGS else name.replace("\\", "/")


def _usable(boxes: NDArray[Any], what: str) -> NDArray[np.float32]:
    """Return boxes (P, 4) in their order without small ones, and without those that are there before."""
    if boxes.size == 0:
        return np.zeros((0, 4), np.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.issubdtype(boxes.dtype, np.number) or np.iscomplexobj(boxes):
        raise InputError(f"{what} are {boxes.dtype} of shape {boxes.shape}; they must be rows of four numbers")
    boxes_P4 = np.ascontiguousarray(boxes, dtype=np.float32) + np.float32(0)  # -0 becomes 0.
    if not np.isfinite(boxes_P4).all():
        raise InputError(f"{what} have numbers that are not finite")
    boxes_P4 = boxes_P4[(boxes_P4[:, 2:] - boxes_P4[:, :2] >= SMALLEST_SIDE).all(axis=1)]
    # A row as one value of 16 bytes: five times as fast as unique rows.
    _, first = np.unique(boxes_P4.view("V16").ravel(), return_index=True)
    return boxes_P4[np.sort(first)]


def _read(file: Path) -> _File:
    if not file.is_file():
        raise InputError(f"proposals are read from a file; {file}: {contents_of(file)}")
    try:
        return READERS[file.suffix.lower()](file)
    except InputError:
        raise
    except Exception as error:  # Damaged files raise a dozen types, from scipy, zlib, struct, NumPy and Arrow.
        reason = (str(error) or type(error).__name__).partition("\n")[0][:200]
        raise InputError(f"{file} can't be read as proposals: {reason}") from error


def _of_mat(file: Path) -> _File:
    from scipy.io import loadmat  # Rarely needed.

    if begin_of(file).startswith(HDF5):
        raise InputError(
            f"{file} is of MATLAB 7.3 (HDF5), which is not read. In MATLAB, write: save(file, 'boxes', 'images', '-v7')"
        )
    content = loadmat(file, variable_names=["boxes", "images"])
    boxes = content.get("boxes")
    if boxes is None or boxes.dtype != object:
        kind = "no variable boxes" if boxes is None else f"boxes of {boxes.dtype}"
        raise InputError(f"{file} has {kind}; expected a cell array boxes, with a matrix of each image")
    cells = [np.asarray(one) for one in boxes.ravel()]
    # From (ymin, xmin, ymax, xmax), counted from 1, the last pixel included.
    shift_4 = np.array([1, 1, 0, 0], np.float32)
    usual = [one[:, [1, 0, 3, 2]] - shift_4 if one.ndim == 2 and one.shape[1] == 4 else one for one in cells]
    if "images" not in content:
        return _File(None, usual)
    names = [str(np.ravel(one)[0]).strip() if np.size(one) else "" for one in content["images"].ravel()]
    if len(names) != len(cells):
        raise InputError(
            f"{file} has boxes of {count_of(len(cells), 'image')}, but {count_of(len(names), 'name')} in images"
        )
    return _File(names, usual)


def _of_npz(file: Path) -> _File:
    with np.load(file, allow_pickle=False) as arrays:
        names = list(arrays.files)
        return _File(names, [arrays[name] for name in names])


def _of_table(file: Path) -> _File:
    import pyarrow as pa
    from pyarrow import csv

    if file.suffix.lower() == ".csv":
        # Names such as 000005 stay texts.
        table = csv.read_csv(file, convert_options=csv.ConvertOptions(column_types={COLUMNS[0]: pa.string()}))
    else:
        table = read_table(file)
    if lacks := [name for name in COLUMNS if name not in table.column_names]:
        listed = ", ".join(table.column_names)
        raise InputError(f"{file} has the columns {listed}, but not {', '.join(lacks)}; proposals have {', '.join(COLUMNS)}")
    images = table.column(COLUMNS[0]).combine_chunks()
    kind = images.type.value_type if pa.types.is_dictionary(images.type) else images.type
    if (not pa.types.is_string(kind) and not pa.types.is_large_string(kind)) or images.null_count:
        raise InputError(f"{file}: its column image must have the name of an image in each row; it is {images.type}")
    coded = images if pa.types.is_dictionary(images.type) else images.dictionary_encode()
    codes_P = coded.indices.to_numpy()
    boxes_P4 = np.stack([table.column(name).cast(pa.float64()).to_numpy() for name in COLUMNS[1:]], axis=1)
    order_P = np.argsort(codes_P, kind="stable")
    names = coded.dictionary.to_pylist()
    ends = np.searchsorted(codes_P[order_P], np.arange(1, len(names)))
    return _File(names, np.split(boxes_P4[order_P].astype(np.float32), ends))


READERS: dict[str, Callable[[Path], _File]] = {
    ".mat": _of_mat,
    ".npz": _of_npz,
    ".csv": _of_table,
    ".parquet": _of_table,
}
