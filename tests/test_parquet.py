"""Parquet tables as image sources: every row as pyarrow reads it whole, in any layout, in any order, by many at once."""

import base64
import json
import math
import multiprocessing
import pickle
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.data.sources import parquet
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.parquet import open_parquet
from deepcluster.data.storage import LocalFile, StoredFile

FILES = st.binary(max_size=40)


class Counting(LocalFile):
    """A file that notes which of its bytes are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.lengths: list[int] = []

    def read(self, start: int, length: int) -> bytes:
        found = super().read(start, length)
        self.lengths.append(len(found))
        return found


class Elsewhere(StoredFile):
    """A file that is not on this machine, as far as anyone can tell; until the network goes."""

    def __init__(self, path: Path) -> None:
        self._file = LocalFile(path)
        self.name, self.size, self.stamp = path.name, self._file.size, "etag"
        self.gone = False

    def read(self, start: int, length: int) -> bytes:
        if self.gone:
            raise InputError("the server does not answer")
        return self._file.read(start, length)

    def where(self) -> str:
        return f"https://example.org{self._file.path}"

    def now(self) -> str:
        return self.stamp


@pytest.fixture
def large_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold at most 5,000 bytes of a row group."""
    monkeypatch.setattr(parquet, "GROUP_BYTES", 5000)
    monkeypatch.setattr(parquet, "MEMORY_BYTES", 20_000)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 2000)
    monkeypatch.setattr(parquet, "READ_BYTES", 1000)


def content(number: int, size: int = 100) -> bytes:
    """What can't be compressed, and tells which row it is."""
    return np.random.default_rng(number).bytes(size)


def structs(count: int, size: int = 100) -> pa.Array:
    return pa.array([{"bytes": content(row, size), "path": f"{row}.png"} for row in range(count)])


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, **options: Any) -> Path:
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def names(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def labels(source: ImageSource) -> list[str | None] | None:
    if source.labels_N is None:
        return None
    return [source.class_names[label] if label >= 0 else None for label in source.labels_N]


def read_or_reason(source: ImageSource, index: int) -> Any:
    try:
        return source.read(index)
    except UnreadableImage as fault:
        return str(fault)


def complaint(*paths: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_parquet([LocalFile(path) for path in paths])
    return str(caught.value)


# What is in the rows

LAYOUTS: dict[str, Callable[[list[bytes | None]], pa.Array]] = {
    "struct": lambda rows: pa.array([None if row is None else {"bytes": row, "path": None} for row in rows], pa.struct(
        [("bytes", pa.binary()), ("path", pa.string())])),
    "bytes alone": lambda rows: pa.array([{"bytes": row} for row in rows], pa.struct([("bytes", pa.large_binary())])),
    "binary": lambda rows: pa.array(rows, pa.binary()),
    "large_binary": lambda rows: pa.array(rows, pa.large_binary()),
    "dictionary": lambda rows: pa.array(rows, pa.binary()).dictionary_encode(),
    "binary_view": lambda rows: pa.array(rows, pa.binary_view()),
}  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.none() | FILES, min_size=1, max_size=60),
    layout=st.sampled_from(sorted(LAYOUTS)),
    group=st.integers(1, 70),
    options=st.fixed_dictionaries(
        {
            "compression": st.sampled_from(["snappy", "zstd", "gzip", "none"]),
            "data_page_version": st.sampled_from(["1.0", "2.0"]),
            "data_page_size": st.sampled_from([1, 100, 1 << 20]),
            "use_dictionary": st.booleans(),
            "write_statistics": st.booleans(),
            "write_page_checksum": st.booleans(),
        }
    ),
    group_bytes=st.sampled_from([1, 60, 400, 32 << 20]),
    seed=st.integers(0, 1000),
)
@example([None], "dictionary", 1, {}, 1, 0)
@example([b""], "binary", 1, {}, 1, 0)
def test_every_row_is_what_pyarrow_reads(
    rows: list[bytes | None], layout: str, group: int, options: dict[str, Any], group_bytes: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "GROUP_BYTES", group_bytes)
        patch.setattr(parquet, "BATCH_BYTES", group_bytes // 4)
        path = write(
            Path(folder, "a.parquet"),
            {"n": range(len(rows)), "image": LAYOUTS[layout](rows)},
            row_group_size=group,
            **options,
        )
        want = pq.read_table(path)["image"].to_pylist()
        want = [row["bytes"] if isinstance(row, dict) else row for row in want]
        assert want == rows
        source = open_parquet([LocalFile(path)])
        assert len(source) == len(rows)
        order = list(range(len(rows))) * 2
        random.Random(seed).shuffle(order)
        for index in order:
            expected = "its row holds no image" if rows[index] is None else rows[index]
            assert read_or_reason(source, index) == expected


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_is_refused(tmp_path: Path, index: int) -> None:
    source = open_parquet([LocalFile(write(tmp_path / "a.parquet", {"image": structs(5)}))])
    for ask in (source.name, source.read, source.stamp):
        with pytest.raises(IndexError):
            ask(index)


# Which column


BYTES = pa.array([b"x", b"y"])
STRUCT = structs(2)


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"photo": STRUCT, "n": [1, 2]}, "photo"),
        ({"mask": STRUCT, "image": STRUCT}, "image"),
        ({"jpg": STRUCT, "img": STRUCT}, "img"),
        ({"mask": STRUCT, "Image": STRUCT}, "Image"),
        ({"image": BYTES, "photo": STRUCT}, "photo"),
        ({"thumbnail": BYTES}, "thumbnail"),
        ({"png": BYTES, "mask": BYTES, "data": BYTES}, "png"),
        ({"content": BYTES, "bytes": BYTES}, "bytes"),
        ({"image.bytes": BYTES, "image": STRUCT}, "image"),
        ({"image.bytes": BYTES}, "image.bytes"),
        ({"image": ["a.png", "b.png"], "raw": BYTES}, "raw"),
    ],
)
def test_the_column_of_images_is_found(tmp_path: Path, columns: dict[str, Any], chosen: str) -> None:
    source = open_parquet([LocalFile(write(tmp_path / "a.parquet", columns))])
    assert source.describe() == f"2 images in 1 Parquet file (column {chosen})"
    want = columns[chosen].to_pylist()
    assert [source.read(0), source.read(1)] == [row["bytes"] if isinstance(row, dict) else row for row in want]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"front": STRUCT, "back": STRUCT},
            "2 columns that may hold the images: front, back; rename the right one to image",
        ),
        ({"a": BYTES, "b": BYTES, "c": BYTES}, "3 columns that may hold the images: a, b, c;"),
        ({"a": [1, 2], "b": ["x", "y"]}, "no column of image files: its columns are a (int64), b (string); store"),
        ({"image": pa.array([[1], [2]], pa.list_(pa.uint8()))}, "image (list<element: uint8>)"),
        ({"image": pa.array([b"abc", b"def"], pa.binary(3))}, "image (fixed_size_binary[3])"),
        ({"image": pa.array([[{"bytes": b"x"}], []])}, "image (list<element: struct<bytes: binary>>)"),
        ({"row": pa.array([{"image": {"bytes": b"x", "path": "p"}}] * 2)}, "row (struct<image: struct<"),
        ({"image": pa.array([{"bytes": b"x", "path": 1}] * 2)}, "image (struct<bytes: binary, path: int64>)"),
    ],
)
def test_a_table_without_one_column_of_images_is_refused(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "a.parquet", columns)
    message = complaint(path)
    assert str(path) in message
    assert words in message


def test_hugging_face_says_which_structs_are_sounds(tmp_path: Path) -> None:
    features = {"sound": {"_type": "Audio"}, "scan": {"_type": "Image"}}
    path = write(tmp_path / "a.parquet", {"sound": STRUCT, "scan": STRUCT}, features)
    assert "(column scan)" in open_parquet([LocalFile(path)]).describe()


@pytest.mark.parametrize(
    "said", [b"", b"{", b"[]", b'{"info": 1}', b'{"info": {"features": [1]}}', b'{"features": {"image": 3}}']
)
def test_what_hugging_face_says_may_be_damaged(tmp_path: Path, said: bytes) -> None:
    pq.write_table(
        pa.table({"image": STRUCT, "label": [0, 1]}).replace_schema_metadata({"huggingface": said}), tmp_path / "a.parquet"
    )
    assert labels(open_parquet([LocalFile(tmp_path / "a.parquet")])) == ["0", "1"]


def test_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", {"image": STRUCT})
    other = write(tmp_path / "b.parquet", {"photo": STRUCT})
    plain = write(tmp_path / "c.parquet", {"image": BYTES})
    message = complaint(first, first, other)
    assert message.startswith(
        f"{other} has its images in column photo (a struct of bytes and path), but {first} in column image"
    )
    assert "c.parquet has its images in column image (plain bytes)" in complaint(first, plain)


# Names and labels


def test_names_are_paths_where_every_row_has_one(tmp_path: Path) -> None:
    paths = ["x/a.png", "x\\b.png", "x/a.png", "ä.jpg", "x/a-2.png", "x/a.png", "plain", "plain", ".png", ".png"]
    rows = pa.array([{"bytes": b"", "path": path} for path in paths])
    source = open_parquet([LocalFile(write(tmp_path / "a.parquet", {"image": rows}), "sub/a.parquet")])
    assert [name.removeprefix("sub/a.parquet::") for name in names(source)] == [
        "x/a.png", "x/b.png", "x/a-3.png", "ä.jpg", "x/a-2.png", "x/a-4.png", "plain", "plain-2", ".png", ".png-2",
    ]  # fmt: skip
    assert source.details() == "in 1 Parquet file (column image), 4 repeated names numbered"


@given(st.lists(st.sampled_from(["a", "a-2", "a-3", "a-2-2", "b/a", "b.c/a", "a.x", "a-2.x"]), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_names_are_unique_and_firsts_keep_theirs(paths: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = pa.array([{"bytes": b"", "path": path} for path in paths])
        file = LocalFile(write(Path(folder, "a.parquet"), {"image": rows}))
        found = names(open_parquet([file]))
    assert len(set(found)) == len(paths)
    for first in {paths.index(path) for path in paths}:
        assert found[first] == f"a.parquet::{paths[first]}"


@pytest.mark.parametrize("paths", [["a", None], ["a", ""], [None, None]])
def test_names_are_row_numbers_otherwise(tmp_path: Path, paths: list[str | None]) -> None:
    rows = pa.array([{"bytes": b"x", "path": path} for path in paths], STRUCT.type)
    source = open_parquet([LocalFile(write(tmp_path / "a.parquet", {"image": rows}))])
    assert names(source) == ["a.parquet::000000", "a.parquet::000001"]


def test_paths_that_are_not_utf8_can_be_printed(tmp_path: Path) -> None:
    paths = pa.array([b"caf\xe9.png", b"ok.png"]).view(pa.string())
    rows = pa.StructArray.from_arrays([BYTES, paths], ["bytes", "path"])
    path = write(tmp_path / "a.parquet", {"image": rows, "label": pa.array([b"\xe9", b"b"]).view(pa.string())})
    source = open_parquet([LocalFile(path)])
    assert names(source) == ["a.parquet::caf\\xe9.png", "a.parquet::ok.png"]
    assert labels(source) == ["\\xe9", "b"]


@pytest.mark.parametrize(
    ("columns", "want"),
    [
        ({"label": [3, None, -1, 10]}, ["3", None, None, "10"]),
        ({"label": pa.array([3, 0, 1, 2], pa.uint8())}, ["3", "0", "1", "2"]),
        ({"target": ["cat", "", None, "-1"]}, ["cat", None, None, None]),
        ({"labels": pa.array(["cat", "dog", None, "cat"]).dictionary_encode()}, ["cat", "dog", None, "cat"]),
        ({"Class": pa.array(["b", "a", "b", "a"], pa.large_string()), "target": [1, 2, 3, 4]}, ["b", "a", "b", "a"]),
        ({"label": [None, None, -1, None]}, None),
        ({"label": [[1], [2], [], [3]]}, ["1", "2", None, "3"]),
        ({"label": [[1], [2], [], [3, 4]]}, None),
        ({"label": [0.5, 1.5, 10.5, 3.5]}, ["0.5", "1.5", "10.5", "3.5"]),
        ({"label": [10.0, None, math.nan, -1.0]}, ["10", None, None, None]),
        ({"label": [True, False, None, True]}, ["True", "False", None, "True"]),
        ({"label": pa.array([b"\x89PNG"] * 4, pa.binary()), "class": [1, 1, 2, 2]}, ["1", "1", "2", "2"]),
    ],
)
def test_labels_of_all_kinds(tmp_path: Path, columns: dict[str, Any], want: list[str | None] | None) -> None:
    source = open_parquet([LocalFile(write(tmp_path / "a.parquet", {"image": structs(4), **columns}))])
    assert labels(source) == want


@pytest.mark.parametrize("column", ["label", "fine_label"])
def test_class_labels_of_hugging_face_have_names(tmp_path: Path, column: str) -> None:
    features = {column: {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    path = write(tmp_path / "a.parquet", {"image": structs(5), column: [1, 0, -1, 2, None]}, features)
    source = open_parquet([LocalFile(path)])
    assert labels(source) == ["dog", "cat", None, None, None]
    want = f"in 1 Parquet file (column image), labels from 2 classes of column {column} (used for diagnostics only)"
    assert source.details() == f"{want}, 3 without a label"


def test_several_files_are_one_source(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{part}.parquet", {"image": structs(3), "label": [part] * 3}) for part in range(3)]
    write(tmp_path / "none.parquet", {"image": structs(1)[:0], "label": pa.array([], pa.int64())})
    found: list[int] = []
    files = [LocalFile(path) for path in [paths[0], tmp_path / "none.parquet", *paths[1:]]]
    source = open_parquet(files, on_found=found.append)
    assert found == [3, 3, 6, 9]
    assert names(source)[2:4] == ["0.parquet::2.png", "1.parquet::0.png"]
    assert labels(source) == ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    assert [source.read(index) for index in range(9)] == [content(row) for row in (0, 1, 2)] * 3
    want = "9 images in 3 Parquet files (column image), labels from 3 classes of column label (used for diagnostics only)"
    assert source.describe() == want


def test_opening_can_be_stopped(tmp_path: Path) -> None:
    def stop(found: int) -> None:
        raise KeyboardInterrupt

    files = [LocalFile(write(tmp_path / "a.parquet", {"image": structs(3)}))] * 50
    with pytest.raises(KeyboardInterrupt):
        open_parquet(files, on_found=stop)


# What is read of the file


def test_opening_reads_no_images(tmp_path: Path) -> None:
    rows = {"image": structs(400, 20_000), "label": list(range(400)), "caption": ["words " * 200] * 400}
    file = Counting(write(tmp_path / "a.parquet", rows, row_group_size=50, use_dictionary=False, compression="none"))
    source = open_parquet([file])
    assert len(source) == 400
    assert sum(file.lengths) < 0.02 * file.size
    assert len(file.lengths) <= 2 + 8  # the end of the file, and the paths and labels of each row group


def in_order(source: ImageSource, threads: int) -> list[bytes]:
    """Read all rows with threads that take a row each of as many neighbours."""
    with ThreadPoolExecutor(threads) as pool:
        near = (range(first, min(first + threads, len(source))) for first in range(0, len(source), threads))
        return [bytes(found) for rows in near for found in pool.map(source.read, rows)]


@pytest.mark.parametrize("group", [10, 100, 600])
@pytest.mark.usefixtures("large_groups")
def test_reading_in_order_decodes_each_row_group_once(tmp_path: Path, group: int) -> None:
    file = Counting(write(tmp_path / "a.parquet", {"image": structs(600)}, row_group_size=group))
    source = open_parquet([file])
    file.lengths.clear()
    assert in_order(source, 4) == [content(row) for row in range(600)]
    assert sum(file.lengths) <= file.size
    random_rows = np.random.default_rng(0).permutation(600).tolist()
    assert [source.read(row) for row in random_rows] == [content(row) for row in random_rows]


@pytest.mark.usefixtures("large_groups")
def test_a_large_row_group_is_read_piece_by_piece(tmp_path: Path) -> None:
    options = {"use_dictionary": False, "data_page_size": 5000, "write_batch_size": 4}
    file = Counting(write(tmp_path / "a.parquet", {"image": structs(300, 5000)}, **options))
    source = open_parquet([file])
    file.lengths.clear()
    assert source.read(0) == content(0, 5000)
    assert 0 < sum(file.lengths) < 0.1 * file.size
    assert in_order(source, 1) == [content(row, 5000) for row in range(300)]
    assert max(file.lengths) < 40_000


def test_the_row_groups_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MEMORY_BYTES", 30_000)
    path = write(tmp_path / "a.parquet", {"image": structs(500)}, row_group_size=20)
    source = open_parquet([LocalFile(path)])
    for row in np.random.default_rng(0).permutation(500).tolist():
        assert source.read(row) == content(row)
        assert sum(group.n_bytes for group in parquet._recent.values()) <= 30_000


# Many at once


@pytest.mark.usefixtures("large_groups")
def test_many_threads_read_at_random(tmp_path: Path) -> None:
    files = [
        LocalFile(write(tmp_path / f"{group}.parquet", {"image": structs(200)}, row_group_size=group))
        for group in (3, 40, 200)
    ]
    source = open_parquet(files)
    order = np.random.default_rng(1).integers(0, 600, 1000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [content(row % 200) for row in order]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_what_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, large: bool
) -> None:
    """Also after this process has read some, and while another of its threads reads at the moment of the fork."""
    monkeypatch.setattr(parquet, "GROUP_BYTES", 500 if large else 32 << 20)
    source = open_parquet([LocalFile(write(tmp_path / "a.parquet", {"image": structs(60)}, row_group_size=20))])
    again = pickle.loads(pickle.dumps(source))
    assert in_order(again, 2) == in_order(source, 2) == [content(row) for row in range(60)]
    assert len(pickle.dumps(source)) < 20_000  # no images
    group = next(iter(parquet._recent.values()), parquet._RowGroup(0))
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool, group._lock:
        found = list(pool.map(source.read, range(60)))
    assert found == [content(row) for row in range(60)]


# Changes and damages


def test_a_file_that_is_overwritten_is_decoded_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": structs(20)}, row_group_size=10)
    source = open_parquet([LocalFile(path)])
    stamps = [source.stamp(index) for index in range(20)]
    assert stamps == [f"{LocalFile(path).stamp}:{row}" for row in range(20)]
    assert source.changed() is None
    assert source.read(0) == content(0)
    write(path, {"image": structs(40)[20:]}, row_group_size=10)
    assert source.changed() == "a.parquet has been overwritten"
    assert read_or_reason(source, 15) == "a.parquet has been overwritten, or is gone, since it was opened"
    again = open_parquet([LocalFile(path)])
    assert in_order(again, 1) == [content(row) for row in range(20, 40)]
    assert not set(stamps) & {again.stamp(index) for index in range(20)}
    path.unlink()
    assert again.changed() == "a.parquet is gone"


def spoil(path: Path, at: int, count: int = 40) -> None:
    whole = bytearray(path.read_bytes())
    whole[at : at + count] = bytes(byte ^ 0xFF for byte in whole[at : at + count])
    path.write_bytes(whole)


@pytest.mark.usefixtures("large_groups")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_damaged_row_group_makes_its_rows_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, large: bool
) -> None:
    monkeypatch.setattr(parquet, "GROUP_BYTES", 5000 if large else 32 << 20)
    options = {"use_dictionary": False, "data_page_size": 500, "write_batch_size": 4, "write_page_checksum": True}
    path = write(tmp_path / "a.parquet", {"image": structs(300)}, row_group_size=100, compression=compression, **options)
    column = pq.read_metadata(path).row_group(1).column(0)
    spoil(path, column.data_page_offset + column.total_compressed_size // 2)
    file = Counting(path)
    source = open_parquet([file])
    file.lengths.clear()
    rows = [read_or_reason(source, index) for index in range(300)]
    good = [row for row in rows if isinstance(row, bytes)]
    assert rows[:100] == [content(row) for row in range(100)]
    assert rows[200:] == [content(row) for row in range(200, 300)]
    assert 200 < len(good) < 250  # those before the damage in the group can be read
    assert good[100:-100] == [content(row) for row in range(100, 100 + len(good) - 200)]
    reasons = {row for row in rows if isinstance(row, str)}
    assert len(reasons) == 1
    assert reasons.pop().startswith(f"damaged: rows {len(good) - 100} to 199 of a.parquet can't be decoded (")
    assert sum(file.lengths) < 1.5 * file.size  # not again for each of its rows


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), compression=st.sampled_from(["none", "snappy"]), flips=st.integers(1, 6))
def test_damage_anywhere_is_told_in_a_sentence(seed: int, compression: str, flips: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = write(
            Path(folder, "a.parquet"),
            {"image": structs(30, 20), "label": [1] * 30},
            row_group_size=10,
            compression=compression,
        )
        for _ in range(flips):
            spoil(path, draw.randrange(path.stat().st_size), 1)
        try:
            source = open_parquet([LocalFile(path)])
        except InputError as fault:
            assert str(path) in str(fault)
            return
        for index in range(len(source)):
            assert isinstance(read_or_reason(source, index), bytes | str)


has_read = pytest.mark.skipif(int(pa.__version__.split(".")[0]) < 26, reason="pyarrow 21 to 24 have read the rows by then")


@pytest.mark.parametrize("group_bytes", [1, pytest.param(32 << 20, marks=has_read)])
def test_rows_are_unreadable_while_the_network_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    monkeypatch.setattr(parquet, "GROUP_BYTES", group_bytes)
    file = Elsewhere(write(tmp_path / "a.parquet", {"image": structs(4)}))
    source = open_parquet([file])
    file.gone = True
    assert read_or_reason(source, 1) == "the server does not answer"
    file.gone = False
    assert source.read(1) == content(1)


class Keys(pe.KmsClient):  # type: ignore[misc]
    """The least that pyarrow wants to encrypt a file."""

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64decode(key)


def encrypt(path: Path, plaintext_footer: bool) -> None:
    settings = pe.EncryptionConfiguration(
        footer_key="k",
        column_keys={"k": ["image.bytes", "label"]},
        plaintext_footer=plaintext_footer,
    )
    properties = pe.CryptoFactory(lambda _: Keys()).file_encryption_properties(pe.KmsConnectionConfig(), settings)
    write(path, {"image": structs(3), "label": [1, 2, 3]}, encryption_properties=properties)


@pytest.mark.parametrize("plaintext_footer", [False, True])
def test_an_encrypted_file_is_refused(tmp_path: Path, plaintext_footer: bool) -> None:
    encrypt(tmp_path / "a.parquet", plaintext_footer)
    message = complaint(tmp_path / "a.parquet")
    assert message == f"{tmp_path / 'a.parquet'} is encrypted; write it without encryption"


def test_files_that_are_no_parquet_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": structs(50)})
    whole = path.read_bytes()

    def told(content: bytes) -> str:
        path.write_bytes(content)
        message = complaint(path)
        assert message.startswith(f"{path} ")
        return message

    assert "is empty" in told(b"")
    assert "is not a Parquet file: it is text" in told(b"path,label\na.jpg,1\n" * 9)
    assert "is cut off" in told(whole[:-1])
    assert "is cut off" in told(whole[: len(whole) // 2])
    assert "is cut off" in told(b"PAR1" + bytes(20))
    assert "is damaged" in told(whole[:-200] + bytes(192) + whole[-8:])
    assert "git lfs pull" in told(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    write(path, {"image": structs(1)[:0]})
    assert complaint(path) == f"{path} has no rows, and so no images"


# Rows that name a file


def test_a_row_without_bytes_may_name_a_file_beside(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/x.png").write_bytes(b"beside")
    given = [
        (None, "more/x.png"),
        (b"held", "more/x.png"),
        (None, "more/gone.png"),
        (None, None),
        (None, "more"),
        (None, "a\0b"),
    ]
    rows = pa.array([{"bytes": held, "path": path} for held, path in given], STRUCT.type)
    path = write(tmp_path / "a.parquet", {"image": rows})
    source = open_parquet([LocalFile(path)])
    assert source.read(0) == b"beside"
    assert source.read(1) == b"held"
    assert [read_or_reason(source, index) for index in (2, 3, 4)] == [
        f"its row holds no image but the path more/gone.png, and there is no file {tmp_path / 'more/gone.png'}",
        "its row holds no image",
        f"its row holds no image but the path more, and there is no file {tmp_path / 'more'}",
    ]
    assert read_or_reason(source, 5).startswith("its row holds no image but the path a\0b")
    before = [source.stamp(index) for index in range(6)]
    (tmp_path / "more/x.png").write_bytes(b"another")
    after = [source.stamp(index) for index in range(6)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True, True, True, True]


def test_a_file_beside_a_table_elsewhere_is_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"not mine")
    path = write(tmp_path / "a.parquet", {"image": pa.array([{"bytes": None, "path": "x.png"}], STRUCT.type)})
    source = open_parquet([Elsewhere(path)])
    assert read_or_reason(source, 0).startswith(
        "its row holds no image but the path x.png, which is looked up only for tables on this machine"
    )
    assert source.stamp(0) == "etag:0"


# A library of others


def test_a_table_of_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": content(row), "path": f"{row}.png"} for row in range(4)], "label": [0, 1, -1, None]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = open_parquet([LocalFile(tmp_path / "a.parquet")])
    assert in_order(source, 1) == [content(row) for row in range(4)]
    assert labels(source) == ["cat", "dog", None, None]
    assert names(source)[3] == "a.parquet::3.png"
