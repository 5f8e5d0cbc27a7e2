"""Numbered parts: what one process and several write is the same table; stops, deaths, wrong folders."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models_helper import write_classes
from parts_helper import BATCH, contents, die_in_the_third_part, files, work_of_ranks, write_all
from ranks_helper import At, complaints, in_ranks, torchrun
from small_runs import train_small
from spoiled_images import write_good_images, write_spoiled_images
from torch.multiprocessing import ProcessExitedException

import deepcluster
from deepcluster.core.errors import DeepClusterError, InputError, Interrupted
from deepcluster.core.work import Work
from deepcluster.data.sources import open_source
from deepcluster.evaluation import protocols
from deepcluster.run import tables
from deepcluster.run.parts import MOST_BYTES, MOST_ROWS, Parts, spans_of


@given(n_rows=st.integers(1, 3_000_000), row_bytes=st.integers(1, 10**6), batch_size=st.integers(1, 20_000))
def test_parts_are_whole_batches(n_rows: int, row_bytes: int, batch_size: int) -> None:
    spans = spans_of(n_rows, row_bytes, batch_size)
    assert [spans[0].start, *(span.stop for span in spans)] == [*(span.start for span in spans), n_rows]
    assert all(len(span) % batch_size == 0 for span in spans[:-1])
    largest = max(map(len, spans))
    assert largest <= max(batch_size, MOST_ROWS)
    assert largest <= batch_size or largest * row_bytes <= MOST_BYTES
    assert len(spans) >= min(64, n_rows // batch_size), "each of several processes has something to do"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """55 images of all kinds, and 5 that can't be read."""
    folder = tmp_path_factory.mktemp("mixed") / "photos"
    write_good_images(folder, 55, size=(36, 32))
    write_spoiled_images(folder, 5)
    return folder


@pytest.fixture(scope="module")
def whole(trained: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    write_all(trained, mixed, folder)
    return folder


# In one process


def test_parts_are_the_table_that_is_returned_and_joined(trained: Path, mixed: Path, whole: Path) -> None:
    rows, groups = deepcluster.embed(trained, mixed, **BATCH), deepcluster.assign(trained, mixed, **BATCH)
    assert len(rows.unreadable) == 5
    for table in (pq.read_table(whole / "e.parquet"), ds.dataset(whole / "e").to_table()):
        assert table.column_names == ["name", "embedding", "path"]
        assert table["name"].to_pylist() == rows.names
        embedding_ND = np.array(table["embedding"].to_pylist(), np.float32)
        assert np.array_equal(embedding_ND, rows.embedding_ND, equal_nan=True)
    found = deepcluster.embed(trained, mixed, stage="conv1", **BATCH)
    assert np.array_equal(np.load(whole / "e.npy"), found.embedding_ND, equal_nan=True)
    assert (whole / "e.names.txt").read_text().splitlines() == rows.names
    for table in (pq.read_table(whole / "c.parquet"), pd.read_parquet(whole / "c")):
        assert list(table["name"].to_pylist() if isinstance(table, pa.Table) else table["name"]) == rows.names
        assert np.array_equal(np.array(table["cluster"]), groups.cluster_N)
        assert np.array_equal(np.array(table["distance"]), groups.distance_N, equal_nan=True)
    assert [path.name for path in files(whole / "e")] == [f"part-{number:05d}.parquet" for number in range(15)]
    assert not [path for path in files(whole) if path.suffix == ".part"] + list(whole.glob("*.parts"))


def test_duckdb_reads_parts_as_one_table(whole: Path) -> None:
    count, rows, width = duckdb.sql(
        f"select count(distinct name), count(*), min(len(embedding)) from '{whole}/e/*.parquet'"
    ).fetchall()[0]
    assert (count, rows) == (60, 60)
    assert width == pq.read_schema(whole / "e.parquet").field("embedding").type.list_size
    sizes = duckdb.sql(f"select cluster, count(*) from '{whole}/c/*.parquet' group by cluster").fetchall()
    assert dict(sizes)[-1] == 5


def test_rows_that_are_not_asked_for_are_not_returned(trained: Path, images: Path, tmp_path: Path) -> None:
    found = deepcluster.embed(trained, images, out=tmp_path / "e.parquet", return_rows=False, **BATCH)
    assert (found.names, len(found.embedding_ND)) == ([], 0)
    groups = deepcluster.assign(trained, images, out=tmp_path / "c", parts=True, return_rows=False, **BATCH)
    assert (groups.names, len(groups.cluster_N), len(groups.distance_N)) == ([], 0, 0)
    assert pq.read_table(tmp_path / "e.parquet").num_rows == pq.read_table(tmp_path / "c").num_rows == 60


@pytest.mark.parametrize("parts", [False, True])
def test_a_stopped_table_goes_on(parts: bool, trained: Path, images: Path, tmp_path: Path) -> None:
    """What was finished is not made again, and the table is the one of an uninterrupted call."""
    out = tmp_path / ("e" if parts else "e.parquet")
    with pytest.raises(Interrupted, match="stopped by SIGINT; the finished parts are kept: the same command continues"):
        deepcluster.embed(trained, images, out=out, parts=parts, reporter=At("features", 6), **BATCH)
    made = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    assert len(made) == 5
    assert out.exists() == parts
    lines = Lines()
    found = deepcluster.embed(trained, images, out=out, parts=parts, reporter=lines, **BATCH)
    assert "20 of 60 images are done: continuing from there" in lines.said
    if parts:
        assert made == {path: path.stat().st_mtime_ns for path in made}
    else:
        assert [path.name for path in files(tmp_path)] == ["e.parquet"]
    assert np.array_equal(found.embedding_ND, deepcluster.embed(trained, images, **BATCH).embedding_ND)


class Lines(At):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__("", 0)
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


Change = Callable[[Path, Path, dict[str, Any]], tuple[Path, Path, dict[str, Any]]]


def of_another_model(model: Path, images: Path, options: dict[str, Any]) -> tuple[Path, Path, dict[str, Any]]:
    return model / "checkpoints" / "epoch-0001.pt", images, options


def with_another_batch(model: Path, images: Path, options: dict[str, Any]) -> tuple[Path, Path, dict[str, Any]]:
    return model, images, {**options, "batch_size": 5}


def with_a_changed_image(model: Path, images: Path, options: dict[str, Any]) -> tuple[Path, Path, dict[str, Any]]:
    os.utime(next(images.iterdir()), (1, 1))
    return model, images, options


@pytest.mark.parametrize("change", [of_another_model, with_another_batch, with_a_changed_image])
def test_parts_of_something_else_are_not_used(change: Change, trained: Path, images: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(images, tmp_path / "photos")
    for parts in (True, False):
        out = tmp_path / ("e" if parts else "e.parquet")
        with pytest.raises(Interrupted):
            deepcluster.assign(trained, photos, out=out, parts=parts, reporter=At("features", 6), **BATCH)
        model, data, options = change(trained, photos, BATCH)
        if parts:
            before = contents(out)
            with pytest.raises(InputError, match="has parts of another model, other images or other options"):
                deepcluster.assign(model, data, out=out, parts=True, **options)
            assert contents(out) == before
        else:
            found = deepcluster.assign(model, data, out=out, **options)
            assert np.array_equal(found.distance_N, deepcluster.assign(model, data, **options).distance_N)
        os.utime(photos / next(photos.iterdir()).name, (2, 2))


def test_a_damaged_part_is_made_again(trained: Path, images: Path, tmp_path: Path) -> None:
    for out, parts, place in ((tmp_path / "e", True, "e"), (tmp_path / "e.npy", False, "e.npy.parts")):
        with pytest.raises(Interrupted):
            deepcluster.embed(trained, images, out=out, parts=parts, reporter=At("features", 6), **BATCH)
        damaged = sorted((tmp_path / place).iterdir())[2]
        damaged.write_bytes(damaged.read_bytes()[:100])
        found = deepcluster.embed(trained, images, out=out, parts=parts, **BATCH)
        assert np.array_equal(found.embedding_ND, deepcluster.embed(trained, images, **BATCH).embedding_ND)


@pytest.mark.parametrize(("out", "folder"), [("e.npy", "e.npy.parts"), ("e", "e")])
def test_a_full_disk_keeps_finished_parts(out: str, folder: str, trained: Path, images: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Filling(At):
        def act(self) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    try:
        with pytest.raises(DeepClusterError, match=r"could not write into .*large.*the finished parts are kept"):
            deepcluster.embed(
                trained, images, out=tmp_path / out, parts=out == "e", reporter=Filling("features", 3), **BATCH
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.stem for path in files(tmp_path / folder)] == ["part-00000", "part-00001"]
    found = deepcluster.embed(trained, images, out=tmp_path / out, parts=out == "e", **BATCH)
    assert np.array_equal(found.embedding_ND, deepcluster.embed(trained, images, **BATCH).embedding_ND)


def test_wrong_places_for_parts(trained: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; with --parts name a folder"):
        deepcluster.embed(trained, images, out=tmp_path / "file", parts=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    with pytest.raises(InputError, match=r"dear.txt is no part of a table; name a new or empty folder"):
        deepcluster.embed(trained, images, out=tmp_path / "letters", parts=True)
    (tmp_path / "e.npy").mkdir()
    with pytest.raises(InputError, match="write numbered files into it with --parts"):
        deepcluster.embed(trained, images, out=tmp_path / "e.npy")
    with pytest.raises(InputError, match="does not exist or can't be written to"):
        deepcluster.assign(trained, images, out=tmp_path / "no" / "parts", parts=True)
    with pytest.raises(InputError, match="name one with out"):
        deepcluster.assign(trained, images, folders=tmp_path / "links", parts=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["dear.txt", "e.npy", "file", "letters"]


def test_tables_are_joined_without_holding_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 parts of 1 MiB: Arrow holds a few of them at once."""
    np.save(tmp_path / "images.npy", np.zeros((64, 2, 2, 3), np.uint8))
    source, spans = open_source(tmp_path / "images.npy"), [range(number, number + 1) for number in range(64)]
    made = Parts(tmp_path / "parts", "key", spans)
    assert made.missing() == list(range(64))
    for number in range(64):
        made.write(number, {"embedding": np.full((1, 1 << 18), number, np.float32)}, {})
    assert made.missing() == []
    monkeypatch.setattr(tables, "GROUP_BYTES", 4 << 20)
    before = pa.total_allocated_bytes()
    peaks = []
    read = made.read

    def watched() -> Iterator[tuple[range, Any]]:
        for item in read():
            peaks.append(pa.total_allocated_bytes() - before)
            yield item

    monkeypatch.setattr(made, "read", watched)
    tables.join_to_table(made, source, tmp_path / "e.parquet", Work(), {})
    assert max(peaks) < 16 << 20
    file = pq.ParquetFile(tmp_path / "e.parquet")
    assert (file.metadata.num_rows, file.num_row_groups) == (64, 16)
    assert [rows["embedding"][0].as_py()[0] for rows in map(file.read_row_group, range(3))] == [0, 4, 8]


# In several processes


def check_ranks(world: int, trained: Path, mixed: Path, whole: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = folder / "classes"
    for number, part in enumerate(("train", "val")):
        write_classes(classes / part, 9, seed=number)
    (classes / "train" / "class0" / "bad.png").write_bytes(b"nothing")
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(folder / "cache"))
    in_ranks(world, folder / "store", work_of_ranks, trained, mixed, classes, folder)
    assert contents(folder / "out") == contents(whole)
    assert (folder / "extracted").exists()
    # The features of the ranks are those that one process would extract.
    made = contents(folder / "cache" / "features")
    assert len(made) > 2
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(folder / "other cache"))
    [knn, _] = protocols.evaluate_all(trained, classes, only=["knn", "clusters"], device="cpu", workers=0, out=folder)
    assert contents(folder / "other cache" / "features") == made
    assert "bad.png" in str(knn.results.notes)
    assert not [path for name in ("cache", "other cache") for path in files(folder / name / "unfinished")]
    for number, message in enumerate(
        ("process 1 does not see the files that process 0 writes", "images of process 1 differ")
    ):
        refusals = {(folder / f"refusal {number} of {rank}").read_text() for rank in range(world)}
        assert len(refusals) == 1, refusals
        assert message in refusals.pop()


def test_two_ranks_write_what_one_process_writes(
    trained: Path, mixed: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_ranks(2, trained, mixed, whole, tmp_path, monkeypatch)


@pytest.mark.slow
def test_four_ranks_write_what_one_process_writes(
    trained: Path, mixed: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_ranks(4, trained, mixed, whole, tmp_path, monkeypatch)


def test_ranks_go_on_after_a_death(trained: Path, mixed: Path, whole: Path, tmp_path: Path) -> None:
    """The first of two processes dies in its third part; two begin again, with what is there."""
    with pytest.raises(ProcessExitedException):
        in_ranks(2, tmp_path / "first", die_in_the_third_part, trained, mixed, tmp_path / "e.parquet")
    made = {path: path.stat().st_ino for path in (tmp_path / "e.parquet.parts").glob("*.pt")}
    assert {f"part-{number:05d}.pt" for number in (0, 1)} <= {path.name for path in made}
    assert "part-00002.pt" not in {path.name for path in made}
    assert not (tmp_path / "e.parquet").exists()
    lines = Lines()
    embed_with = deepcluster.embed(trained, mixed, out=tmp_path / "e.parquet", reporter=lines, **BATCH)
    assert f"{4 * len(made)} of 60 images are done: continuing from there" in lines.said
    assert len(embed_with.unreadable) == 5
    assert (tmp_path / "e.parquet").read_bytes() == (whole / "e.parquet").read_bytes()


# By torchrun, as users do


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["embed", str(model), str(data), "--out", str(out), "--batch-size", "4", "--workers", "0", *more]


@pytest.mark.slow
@pytest.mark.parametrize("parts", [False, True])
def test_torchrun_restarts_a_killed_process(parts: bool, trained: Path, mixed: Path, whole: Path, tmp_path: Path) -> None:
    name = "e" if parts else "e.parquet"
    words = command(trained, mixed, tmp_path / name, *["--parts"] * parts)
    result = torchrun(2, *words, restarts=1, moment="kill")
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert len([line for line in said if "images are done: continuing from there" in line]) == 1, result.stdout
    assert len([line for line in said if "60 rows of" in line]) == 1
    assert len([line for line in complaints(result.stderr) if "can't be read" in line]) == 3
    found = tmp_path / name
    assert contents(tmp_path) == (
        {f"e/{key}": value for key, value in contents(whole / "e").items()} if parts else {name: (whole / name).read_bytes()}
    )
    assert found.exists()


@pytest.mark.slow
def test_ctrl_c_of_torchrun_keeps_parts(trained: Path, mixed: Path, whole: Path, tmp_path: Path) -> None:
    words = command(trained, mixed, tmp_path / "e.parquet")
    result = torchrun(2, *words, moment="ctrl-c")
    assert result.returncode != 0
    assert complaints(result.stderr) == [
        "deepcluster: stopped by SIGINT; the finished parts are kept: the same command continues from there"
    ]
    assert [path for path in files(tmp_path) if path.suffix == ".pt"]
    again = torchrun(2, *words)
    assert "images are done: continuing from there" in again.stdout
    assert contents(tmp_path) == {"e.parquet": (whole / "e.parquet").read_bytes()}


@pytest.mark.slow
def test_wrong_input_of_several_processes_is_printed_once(trained: Path, images: Path, tmp_path: Path) -> None:
    for words, message in (
        (command(trained, tmp_path / "nothing", tmp_path / "e.npy"), "nothing"),
        (["evaluate", "knn", str(trained), "--data", str(images)], "train"),
    ):
        result = torchrun(2, *words)
        assert result.returncode != 0
        (complaint,) = complaints(result.stderr)
        assert message in complaint
        assert "exitcode  : 2" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_torchrun_evaluates(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, and what is printed, are those of one process."""
    run = train_small(images, tmp_path / "run", epochs=1)
    for number, part in enumerate(("train", "val")):
        write_classes(tmp_path / "classes" / part, 9, seed=number)
    words = ["evaluate", "all", str(run), "--data-root", str(tmp_path / "classes"), "--quick", "--device", "cpu"]
    words += ["--only", "knn,linear", "--workers", "0"]
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    result = torchrun(2, *words, "--out", str(tmp_path / "two"))
    assert result.returncode == 0, result.stderr
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "other"))
    one = torchrun(1, *words, "--out", str(tmp_path / "one"))
    for name in ("knn.json", "linear.json"):
        results = [pd.read_json(tmp_path / folder / name, typ="series")["results"] for folder in ("one", "two")]
        assert results[0] == results[1]
    assert contents(tmp_path / "cache" / "features") == contents(tmp_path / "other" / "features")
    tables_of = [
        [line for line in each.stdout.splitlines() if line.startswith(("top-", "knn", "linear"))] for each in (one, result)
    ]
    assert tables_of[0] == tables_of[1]
