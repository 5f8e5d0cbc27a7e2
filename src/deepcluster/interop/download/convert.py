"""Data sets that `train` and `evaluate` can't read as they are published, made into Parquet tables of PNG images.

N images of H × W pixels, C channels. The pickles of CIFAR are read as data; nothing in them is run.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.pickles import read_plain_pickle
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of

# So few that an image which is read at random decodes little else.
GROUP_ROWS = 256
STL10_SIDE = 96
Rows = Iterator[tuple[NDArray[np.uint8], str, str | None]]  # Image, name, class.


def convert(kind: str, folder: Path, out: Path, reporter: Reporter) -> None:
    """Make `train.parquet`, `test.parquet`, ... in `out` of what an archive of CIFAR or STL-10 holds.

    Raises:
        InputError: the files are not those of the data set.
        OSError: they can't be read, or the tables not be written.
    """
    for name, count, rows in CONVERTERS[kind](folder):
        _write(out / f"{name}.parquet", rows, count, reporter)


def _write(path: Path, rows: Rows, count: int, reporter: Reporter) -> None:
    """Write a table of images (bytes and path, as Hugging Face's) and, unless there are none, of their classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none") as writer, reporter.track(f"write {path.name}", count) as meter:
        group: list[dict[str, Any]] = []
        for number, (image_HWC, name, label) in enumerate(rows, 1):
            group.append({"image": {"bytes": _png(image_HWC), "path": name}, "label": label})
            if len(group) == GROUP_ROWS or number == count:
                writer.write_table(pa.Table.from_pylist(group, schema))
                meter(len(group))
                group = []


def _png(image_HWC: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG", compress_level=1)
    return file.getvalue()


Tables = Iterator[tuple[str, int, Rows]]  # Name of a table, its number of images, and these.


def _cifar(folder: Path) -> Tables:
    """Yield CIFAR-10 (data_batch_1 to 5, test_batch, batches.meta) or CIFAR-100 (train, test, meta; fine labels)."""
    is_hundred = (folder / "meta").is_file()
    key = "fine_labels" if is_hundred else "labels"
    meta = _plain(folder / ("meta" if is_hundred else "batches.meta"))
    classes = [_text(name) for name in meta.get("fine_label_names" if is_hundred else "label_names") or []]
    trains = ["train"] if is_hundred else sorted(path.name for path in folder.glob("data_batch_*"))
    for table, files in (("train", trains), ("test", ["test" if is_hundred else "test_batch"])):
        batches = [_batch(folder / name, key, classes) for name in files]
        if not batches:
            raise InputError(f"{folder} has no data_batch_1: it is not CIFAR as it is published")
        yield table, sum(len(images) for images, _, _ in batches), _cifar_rows(batches, classes)


Batch = tuple[NDArray[np.uint8], list[int], list[str]]


def _batch(path: Path, key: str, classes: Sequence[str]) -> Batch:
    """Return images (N, 32, 32, 3), classes and names of a batch, in which they are rows of 3 × 32 × 32 numbers."""
    content = _plain(path)
    rows, labels, names = content.get("data"), content.get(key), content.get("filenames")
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (3072,):
        rows = None
    if rows is None or not isinstance(labels, list) or len(labels) != len(rows):
        raise InputError(f"{path} is not a batch of CIFAR: it should hold `data` of N x 3072 bytes, and as many `{key}`")
    if not all(type(label) is int and 0 <= label < len(classes) for label in labels):
        raise InputError(f"{path} has {key} that are not numbers from 0 to {len(classes) - 1}")
    if not isinstance(names, list) or len(names) != len(rows):
        names = [f"{path.name}_{number:05}.png" for number in range(len(rows))]
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, [_text(name) for name in names]


def _cifar_rows(batches: Sequence[Batch], classes: Sequence[str]) -> Rows:
    for images_NHWC, labels, names in batches:
        for image_HWC, label, name in zip(images_NHWC, labels, names, strict=True):
            yield np.ascontiguousarray(image_HWC), f"{classes[label]}/{name.rpartition('/')[2]}", classes[label]


def _plain(path: Path) -> dict[str, Any]:
    """Return a pickled dict of plain values; its keys are bytes or text, by the Python that wrote it."""
    if not path.is_file():
        raise InputError(f"{path} is missing: it is not CIFAR as it is published")
    found = read_plain_pickle(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a file of CIFAR: it holds a {type(found).__name__}, not a dict")
    return {_text(key): value for key, value in found.items()}


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _stl10(folder: Path) -> Tables:
    """Yield STL-10's labelled parts and its unlabelled one, whose table has no classes."""
    names = folder / "class_names.txt"
    classes = names.read_text(encoding="utf-8").split() if names.is_file() else []
    if not classes:
        raise InputError(f"{names} is missing or empty: it is not STL-10 as it is published")
    for part in ("train", "test", "unlabeled"):
        path, labels = folder / f"{part}_X.bin", folder / f"{part}_y.bin"
        images_NHWC = _stl10_images(path)
        label_N = np.fromfile(labels, np.uint8) if part != "unlabeled" and labels.is_file() else None
        is_right = label_N is not None and len(label_N) == len(images_NHWC) and set(label_N) <= {*range(1, len(classes) + 1)}
        if part != "unlabeled" and not is_right:
            count = count_of(len(images_NHWC), "number")
            raise InputError(f"{labels} should hold {count} from 1 to {len(classes)}, one per image")
        yield part, len(images_NHWC), _stl10_rows(part, images_NHWC, label_N, classes)


def _stl10_images(path: Path) -> NDArray[np.uint8]:
    """Return images (N, 96, 96, 3) of a file of 3 × 96 × 96 numbers each, column by column; they stay on the disk."""
    values, size = STL10_SIDE * STL10_SIDE * 3, path.stat().st_size if path.is_file() else 0
    if not size or size % values:
        raise InputError(f"{path} is missing or cut short: it has {size:,} bytes, which are no whole images of {values:,}")
    return np.memmap(path, np.uint8, "r").reshape(-1, 3, STL10_SIDE, STL10_SIDE).transpose(0, 3, 2, 1)


def _stl10_rows(
    part: str, images_NHWC: NDArray[np.uint8], label_N: NDArray[np.uint8] | None, classes: Sequence[str]
) -> Rows:
    for number, image_HWC in enumerate(images_NHWC):
        label = None if label_N is None else classes[label_N[number] - 1]
        yield np.ascontiguousarray(image_HWC), f"{label or part}/{number:06}.png", label


CONVERTERS = {"cifar": _cifar, "stl10": _stl10}
