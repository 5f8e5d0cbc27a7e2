"""Folders of `save_to_disk`: found by their state file, read as pyarrow reads them, refused where they are damaged."""

import json
import multiprocessing
import pickle
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.saved_dataset import is_saved_dataset, open_saved_dataset

FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def content(row: int) -> bytes:
    return np.random.default_rng(row).bytes(50 + row % 7)


def rows_of(first: int, end: int) -> pa.Table:
    """Rows of the layout of Hugging Face."""
    images = [{"bytes": content(row), "path": f"{row}.png"} for row in range(first, end)]
    return pa.table(
        {"image": pa.array(images, STRUCT), "label": pa.array([row % 3 for row in range(first, end)], pa.int64())}
    )


def write_stream(path: Path, table: pa.Table, batch: int = 4) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def save(folder: Path, *parts: pa.Table, features: dict[str, Any] | None = FEATURES, batch: int = 4, **state: Any) -> Path:
    """Write a folder as `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"data-{number:05}-of-{len(parts):05}.arrow" for number in range(len(parts))]
    for name, part in zip(files, parts, strict=True):
        write_stream(folder / name, part, batch)
    given = {"_data_files": [{"filename": name} for name in files], "_fingerprint": "0", "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(given))
    if features is not None:
        (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def open_(folder: Path) -> ImageSource:
    return open_saved_dataset(folder)


def names(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def complaint(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_(folder)
    return str(caught.value)


def test_a_folder_is_known_by_its_state(tmp_path: Path) -> None:
    assert not is_saved_dataset(tmp_path)
    (tmp_path / "state.json").write_text('{"_format_type": null}')
    assert not is_saved_dataset(tmp_path)
    (tmp_path / "state.json").write_text("{")
    assert not is_saved_dataset(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert is_saved_dataset(tmp_path)
    assert is_saved_dataset(save(tmp_path / "a", rows_of(0, 3)))
    assert not is_saved_dataset(tmp_path / "nothing")


def test_the_rows_of_all_files(tmp_path: Path) -> None:
    source = open_(save(tmp_path, rows_of(0, 10), rows_of(10, 10), rows_of(10, 13)))
    assert [source.read(index) for index in range(13)] == [content(row) for row in range(13)]
    assert names(source)[9:11] == ["data-00000-of-00003.arrow::9.png", "data-00002-of-00003.arrow::10.png"]
    assert source.labels_N is not None
    assert source.labels_N.tolist() == [row % 3 for row in range(13)]
    assert source.describe() == (
        "13 images in 2 Arrow files of a saved Hugging Face dataset (column image), "
        "labels from 3 classes of column label (used for diagnostics only)"
    )
    assert not (tmp_path / "blocks").exists()
    for index in (-1, 13):
        with pytest.raises(IndexError):
            source.read(index)


def test_the_splits_of_a_dictionary(tmp_path: Path) -> None:
    save(tmp_path / "train", rows_of(0, 4))
    save(tmp_path / "test", rows_of(4, 6))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = open_(tmp_path)
    assert names(source)[3:5] == ["train/data-00000-of-00001.arrow::3.png", "test/data-00000-of-00001.arrow::4.png"]
    assert [source.read(index) for index in range(6)] == [content(row) for row in range(6)]
    (tmp_path / "test/state.json").unlink()
    assert complaint(tmp_path).startswith(f"{tmp_path / 'test/state.json'} is missing or damaged")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.none() | st.binary(max_size=20), min_size=1, max_size=30),
    layout=st.sampled_from(["struct", "binary", "large_binary", "dictionary"]),
    batch=st.integers(1, 30),
    cut=st.integers(0, 30),
)
def test_every_row_is_what_pyarrow_reads(rows: list[bytes | None], layout: str, batch: int, cut: int) -> None:
    if layout == "struct":
        column = pa.array([None if row is None else {"bytes": row, "path": None} for row in rows], STRUCT)
    elif layout == "dictionary":
        column = pa.array(rows, pa.binary()).dictionary_encode()
    else:
        column = pa.array(rows, pa.binary() if layout == "binary" else pa.large_binary())
    table = pa.table({"n": range(len(rows)), "image": column})
    with tempfile.TemporaryDirectory() as folder:
        source = open_(save(Path(folder), table[:cut], table[cut:], features=None, batch=batch))
        assert len(source) == len(rows)
        for index, row in enumerate(rows):
            if row is None:
                with pytest.raises(UnreadableImage, match="holds no image"):
                    source.read(index)
            else:
                assert source.read(index) == row


def test_an_old_dataset_with_an_indices_file(tmp_path: Path) -> None:
    write_stream(tmp_path / "indices.arrow", pa.table({"indices": pa.array([7, 2, 2, 9, 0, 7], pa.uint64())}), 2)
    save(tmp_path, rows_of(0, 5), rows_of(5, 10), _indices_data_files=[{"filename": "/home/other/cache/indices.arrow"}])
    source = open_(tmp_path)
    assert [source.read(index) for index in range(len(source))] == [content(row) for row in (7, 2, 9, 0)]
    assert names(source)[:2] == ["data-00001-of-00002.arrow::7.png", "data-00000-of-00002.arrow::2.png"]
    assert source.labels_N is not None
    assert [source.class_names[label] for label in source.labels_N] == ["dog", "eel", "cat", "cat"]
    assert source.stamp(0).endswith(":2")
    write_stream(tmp_path / "indices.arrow", pa.table({"indices": pa.array([7, 10], pa.uint64())}))
    assert "indices.arrow names row 10, but the dataset has 10 rows" in complaint(tmp_path)
    write_stream(tmp_path / "indices.arrow", pa.table({"rows": [1]}))
    assert """indices.arrow is damaged ('Field "indices" does not exist in schema')""" in complaint(tmp_path)
    save(tmp_path, rows_of(0, 2), _indices_data_files=None)
    assert len(open_(tmp_path)) == 2


def test_splits_with_and_without_indices(tmp_path: Path) -> None:
    save(tmp_path / "train", rows_of(0, 4))
    save(tmp_path / "test", rows_of(4, 8), _indices_data_files=[{"filename": "indices.arrow"}])
    write_stream(tmp_path / "test/indices.arrow", pa.table({"indices": [3, 1]}))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = open_(tmp_path)
    assert [source.read(index) for index in range(6)] == [content(row) for row in (0, 1, 2, 3, 7, 5)]


def test_a_row_may_name_a_file_in_the_folder(tmp_path: Path) -> None:
    images = pa.array([{"bytes": None, "path": "x.png"}, {"bytes": None, "path": "y.png"}], STRUCT)
    save(tmp_path, pa.table({"image": images}))
    (tmp_path / "x.png").write_bytes(b"beside")
    source = open_(tmp_path)
    assert source.read(0) == b"beside"
    with pytest.raises(UnreadableImage, match="no file"):
        source.read(1)


def test_many_threads_read_at_random(tmp_path: Path) -> None:
    source = open_(save(tmp_path, rows_of(0, 200), rows_of(200, 300)))
    order = np.random.default_rng(0).integers(0, 300, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [content(row) for row in order]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_what_was_opened(tmp_path: Path, method: str) -> None:
    source = open_(save(tmp_path, rows_of(0, 200), rows_of(200, 300)))
    assert len(pickle.dumps(source)) < 20_000  # no images
    assert pickle.loads(pickle.dumps(source)).read(250) == content(250)
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        assert list(pool.map(source.read, range(300), chunksize=50)) == [content(row) for row in range(300)]


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    source = open_(save(tmp_path, rows_of(0, 3), rows_of(3, 5)))
    assert source.changed() is None
    cut = tmp_path / "data-00001-of-00002.arrow"
    cut.write_bytes(b"")  # What is mapped is no longer there: to touch it would end the process.
    assert source.changed() == "data-00001-of-00002.arrow has been overwritten"
    assert source.read(2) == content(2)
    with pytest.raises(UnreadableImage, match="has been overwritten, or is gone, since it was opened"):
        source.read(3)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, rows_of(0, 20)) / "data-00000-of-00001.arrow"
    whole = path.read_bytes()

    def told(content: bytes) -> str:
        path.write_bytes(content)
        message = complaint(tmp_path)
        assert message.startswith(f"{path} ")
        return message

    assert "is cut off" in told(whole[:-8])
    assert "can't be read as an Arrow stream" in told(whole[: len(whole) // 2])
    assert "can't be read as an Arrow stream" in told(b"path,label\n" * 30)
    assert "can't be read as an Arrow stream" in told(b"")
    stream = pa.BufferReader(whole)
    pa.ipc.open_stream(stream).read_next_batch()
    between = stream.tell()
    assert "is cut off" in told(whole[:between])  # after the first of five batches
    path.unlink()
    assert complaint(tmp_path) == f"{path} does not exist, or is not a regular file"
    save(tmp_path, rows_of(0, 0))
    assert complaint(tmp_path) == f"{tmp_path} is a saved dataset without rows, and so without images"
    save(tmp_path, rows_of(0, 2).drop_columns("image"))
    assert "has no column of image files: its columns are label (int64)" in complaint(tmp_path)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), flips=st.integers(1, 4))
def test_damage_anywhere_never_ends_the_process(seed: int, flips: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), rows_of(0, 12)) / "data-00000-of-00001.arrow"
        whole = bytearray(path.read_bytes())
        for _ in range(flips):
            whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(whole)
        try:
            source = open_(Path(folder))
        except InputError as fault:
            assert str(path) in str(fault)
            return
        for index in range(len(source)):
            try:
                assert isinstance(source.read(index), bytes)
            except UnreadableImage as fault:
                assert "holds no image" in str(fault)


def test_folders_that_the_datasets_library_has_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {
        "image": [{"bytes": content(row), "path": f"{row}.png"} for row in range(9)],
        "label": [0, 1, -1, None, 1, 0, 0, 0, 1],
    }
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=whole.shuffle(seed=1), test=whole.select([3, 1])).save_to_disk(tmp_path / "two")
    assert is_saved_dataset(tmp_path / "one")
    assert is_saved_dataset(tmp_path / "two")
    source = open_(tmp_path / "one")
    assert [source.read(index) for index in range(9)] == [content(row) for row in range(9)]
    assert source.labels_N is not None
    assert source.labels_N.tolist() == [0, 1, -1, -1, 1, 0, 0, 0, 1]
    both = open_(tmp_path / "two")
    assert sorted(both.read(index) for index in range(9)) == sorted(content(row) for row in range(9))
    assert [both.read(9), both.read(10)] == [content(3), content(1)]
    assert names(both)[9:] == ["test/data-00000-of-00001.arrow::3.png", "test/data-00000-of-00001.arrow::1.png"]
