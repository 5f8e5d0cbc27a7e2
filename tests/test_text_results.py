"""Tables of `assign` and `embed` as CSV and JSON lines, against pandas, DuckDB and Python; few images printed."""

import csv
import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spoiled_images import write_good_images, write_spoiled_images
from test_report_tables import read

import deepcluster
from deepcluster.applied.assigning import few_clusters
from deepcluster.cli import main
from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.data.sources import open_source
from deepcluster.run import tables
from deepcluster.run.cluster_names import write_names
from deepcluster.run.table_writers import writer_of

QUIET: dict[str, Any] = {"device": "cpu", "workers": 0, "reporter": Reporter(quiet=True)}
CLUSTERS = ["name", "cluster", "distance", "second", "second_distance", "confidence", "path"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "photos"
    write_good_images(folder, 18, size=(36, 32))
    write_spoiled_images(folder, 2)
    for path, name in zip(sorted(folder.glob("*.png")), ('a,"b;\n.png', "ü é 牛.png", "=1+1.png"), strict=False):
        path.rename(folder / name)
    return folder


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named") / "run"
    folder.mkdir()
    for entry in trained.iterdir():
        (folder / entry.name).symlink_to(entry)
    write_names(folder, {1: 'dogs, "big"', 4: "Kühe"})
    return folder


@pytest.fixture(scope="module")
def written(run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for ending in ("parquet", "csv", "jsonl"):
        deepcluster.assign(run, photos, out=folder / f"c.{ending}", **QUIET)
        deepcluster.embed(run, photos, out=folder / f"e.{ending}", **QUIET)
    deepcluster.assign(run, photos, out=folder / "c", parts=True, **QUIET)
    return folder


def test_parquet_has_all_that_is_returned(run: Path, photos: Path, written: Path) -> None:
    found = deepcluster.assign(run, photos, **QUIET)
    for path in (written / "c.parquet", written / "c"):
        table = pq.read_table(path).to_pydict()
        assert list(table) == [*CLUSTERS[:-1], "cluster_name", "path"]
        assert table["name"] == found.names
        for name, column in {
            "cluster": found.cluster_N,
            "distance": found.distance_N,
            "second": found.second_N,
            "second_distance": found.second_distance_N,
            "confidence": found.confidence_N,
        }.items():
            assert np.array_equal(np.array(table[name]), column, equal_nan=True), name
        assert table["path"] == [str(photos / name) for name in found.names]
        assert all(Path(path).is_file() for path in table["path"])
        assert table["cluster_name"] == [found.cluster_names.get(cluster) for cluster in table["cluster"]]
    unread = found.cluster_N == -1
    assert unread.sum() == 2 and (found.second_N[unread] == -1).all() and np.isnan(found.confidence_N[unread]).all()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.confidence_N, 1 - found.distance_N / found.second_distance_N, atol=1e-6)


def assert_same_columns(frame: pd.DataFrame, table: dict[str, list[Any]]) -> None:
    assert list(frame.columns) == list(table)
    for name, column in table.items():
        if isinstance(column[0], float):
            got = frame[name].to_numpy(np.float64).astype(np.float32)
            assert np.array_equal(got, np.array(column, np.float32), equal_nan=True), name
        else:
            assert [None if pd.isna(one) else one for one in frame[name]] == column, name


def test_csv_is_the_same_table_to_every_reader(written: Path) -> None:
    table = pq.read_table(written / "c.parquet").to_pydict()
    assert_same_columns(pd.read_csv(written / "c.csv"), table)
    assert_same_columns(duckdb.sql(f"select * from read_csv('{written}/c.csv')").df(), table)
    with (written / "c.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == table["name"]
    assert [row["distance"] for row in rows if row["cluster"] == "-1"] == ["", ""]
    assert (written / "c.csv").read_bytes().startswith(b"\xef\xbb\xbf"), "so that Excel takes it for UTF-8"


def test_json_lines_are_the_same_table(written: Path) -> None:
    table = pq.read_table(written / "c.parquet").to_pydict()
    assert_same_columns(pd.read_json(written / "c.jsonl", lines=True, precise_float=True), table)
    lines = (written / "c.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in lines] == table["name"]
    assert all(len(word) < 13 for line in lines for word in str(json.loads(line)["distance"]).split()), "short numbers"


def test_features_have_a_column_per_number_in_csv(written: Path) -> None:
    table = pq.read_table(written / "e.parquet")
    embedding_ND = np.array(table["embedding"].to_pylist(), np.float32)
    frame = pd.read_csv(written / "e.csv")
    assert list(frame.columns) == ["name", *(f"embedding_{n}" for n in range(embedding_ND.shape[1])), "path"]
    assert np.array_equal(frame.iloc[:, 1:-1].to_numpy(np.float64).astype(np.float32), embedding_ND, equal_nan=True)
    rows = [json.loads(line) for line in (written / "e.jsonl").read_text(encoding="utf-8").splitlines()]
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), embedding_ND, equal_nan=True)
    assert [row["path"] for row in rows] == table["path"].to_pylist() == frame["path"].tolist()


def test_a_table_is_data_and_a_report(written: Path, photos: Path) -> None:
    """The paths lead to the images, and the report takes every format."""
    source = open_source(written / "c.csv")
    assert {source.path(index) for index in range(len(source))} == set(photos.iterdir())
    table = pq.read_table(written / "c.parquet").to_pydict()
    for name in ("c.csv", "c.jsonl", "c.parquet", "e.csv", "e.jsonl", "e.parquet"):
        collection = read(written / name, **({"clusters": 3} if name.startswith("e") else {}))
        assert list(collection.names) == table["name"]
        if name.startswith("c"):
            assert np.array_equal(collection.cluster_N, table["cluster"])


def test_images_without_a_file_have_no_path(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 9, 9, 3), np.uint8))
    for ending in ("parquet", "csv"):
        deepcluster.assign(run, tmp_path / "a.npy", out=tmp_path / f"c.{ending}", **QUIET)
    assert pq.read_table(tmp_path / "c.parquet")["path"].null_count == 3
    assert pd.read_csv(tmp_path / "c.csv")["path"].isna().all()


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(width=32)), min_size=1, max_size=6
    )
)
def test_any_names_and_numbers_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, float]]) -> None:
    names, numbers = [name for name, _ in rows], np.array([number for _, number in rows], np.float32)
    path = tmp_path_factory.getbasetemp() / "any"
    table = pa.table(
        {"name": names, "number": pa.array(numbers), "embedding": pa.FixedSizeListArray.from_arrays(numbers, 1)}
    )
    for ending in (".csv", ".jsonl"):
        if ending == ".jsonl" and np.isinf(numbers).any():
            continue  # JSON has no infinity.
        with path.open("wb") as file:
            writer = writer_of(ending, file, table.schema)
            for start in range(0, len(names), 2):
                writer.write_table(table.slice(start, 2))
            writer.close()
        if ending == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                read = list(csv.DictReader(file))
            got = np.array([float(row["number"] or "nan") for row in read], np.float32)
            wide = np.array([float(row["embedding_0"] or "nan") for row in read], np.float32)
        else:
            read = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
            got = np.array([row["number"] for row in read], np.float32)
            wide = np.array([row["embedding"][0] for row in read], np.float32)
        assert [row["name"] for row in read] == names
        assert np.array_equal(got, numbers, equal_nan=True) and np.array_equal(wide, numbers, equal_nan=True)


def test_text_is_written_in_groups(written: Path, run: Path, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tables, "GROUP_BYTES", 1)
    for name in ("c.csv", "c.jsonl"):
        deepcluster.assign(run, photos, out=tmp_path / name, batch_size=3, **QUIET)
        frames = [
            pd.read_csv(folder / name) if name.endswith("csv") else pd.read_json(folder / name, lines=True)
            for folder in (tmp_path, written)
        ]
        pd.testing.assert_frame_equal(*frames, atol=1e-5)


# Few images, printed


def test_few_images_are_printed(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = deepcluster.assign(run, photos, **QUIET)
    assert main(["assign", str(run), str(photos), "--workers", "0", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split("  ")[-1].strip() and lines[0].split() == [
        "name",
        "cluster",
        "distance",
        "second",
        "distance",
        "of",
        "second",
        "confidence",
    ]
    assert len(lines) == 21 and "can't be read" in said.err
    for row, line in enumerate(lines[1:]):
        cluster = int(found.cluster_N[row])
        if cluster < 0:
            assert line.split()[-5:] == ["-"] * 5
            continue
        name = f"{cluster} {found.cluster_names.get(cluster, '')}".strip()
        assert f"  {name}  " in line and line.endswith(f"{found.confidence_N[row]:.3f}")
        assert f"{found.distance_N[row]:.3f}" in line and f"{found.second_distance_N[row]:.3f}" in line


def test_many_images_are_not_printed(run: Path, images: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to write, and 60 images are too many to print \(at most 20\)"):
        few_clusters(run, images, **QUIET)
    assert few_clusters(run, images, limit=2, **QUIET).count("\n") == 2


def test_the_next_step_is_printed_and_works(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my table.csv"
    for command in (
        ["assign", str(run), str(photos), "--out", str(out)],
        ["embed", str(run), str(photos), "--out", str(out)],
    ):
        assert main([*command, "--device", "cpu", "--workers", "0"]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == f"see it as a page: deepcluster report '{out}' --data {photos}"
        assert main([*command, "--device", "cpu", "--workers", "0", "--quiet"]) == 0
        assert not capsys.readouterr().out
