"""The Python of docs/browsing.md runs as it stands, on the tables of a small run."""

import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from spoiled_images import write_good_images, write_spoiled_images

import deepcluster
from deepcluster.core.progress import Reporter

TABLE = ["name", "cluster", "distance", "second", "second_distance", "confidence", "path"]
TEXT = (Path(__file__).parents[1] / "docs" / "browsing.md").read_text(encoding="utf-8")


def blocks(title: str) -> list[str]:
    """The Python of a section."""
    section = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.+?)```", section, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands at the top of the page write, of images of which some can't be read."""
    place = tmp_path_factory.mktemp("browsing")
    write_good_images(place / "photos", 30)
    write_spoiled_images(place / "photos", 3)
    quiet = Reporter(quiet=True)
    deepcluster.assign(trained, place / "photos", out=place / "clusters.parquet", device="cpu", reporter=quiet)
    deepcluster.embed(trained, place / "photos", out=place / "features.parquet", device="cpu", reporter=quiet)
    return place


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tables_are_as_the_page_says(folder: Path) -> None:
    assert pq.read_schema(folder / "clusters.parquet").names == TABLE
    assert pq.read_schema(folder / "features.parquet").names == ["name", "embedding", "path"]
    clusters, features = (pq.read_table(folder / f"{name}.parquet").to_pydict() for name in ("clusters", "features"))
    assert clusters["name"] == features["name"]
    unread = [cluster == -1 for cluster in clusters["cluster"]]
    assert sum(unread) == 3
    assert [distance != distance for distance in clusters["distance"]] == unread
    assert [all(number != number for number in row) for row in features["embedding"]] == unread
    lengths = {len(row) for row in features["embedding"]}
    assert len(lengths) == 1


def test_pandas(folder: Path) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    clusters, features = blocks("pandas")
    said = run(f"{clusters}\nassert len(table) == 30 and table.distance.notna().all()", folder)
    assert "count" in said
    run(f"{features}\nassert rows.shape[0] == 30 and rows.dtype == np.float32", folder)


def test_duckdb(folder: Path) -> None:
    pytest.importorskip("duckdb", reason="DuckDB is not installed")
    (code,) = blocks("DuckDB")
    check = "found = nearest.fetchall(); assert len(found) == 10 and abs(found[0][1] - 1) < 1e-5, found"
    assert "images" in run(f"{code}\n{check}", folder)


def test_the_table_for_embedding_atlas(folder: Path) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    (code,) = blocks("Embedding Atlas")
    run(code, folder)
    both = pq.read_table(folder / "both.parquet")
    assert both.num_rows == 30
    assert {"name", "cluster", "distance", "embedding"} <= set(both.column_names)


def test_the_commands_of_the_page_exist() -> None:
    from deepcluster.cli import cli

    named = set(re.findall(r"^    deepcluster (\w+)", TEXT, flags=re.MULTILINE))
    assert named <= set(cli.commands) | {"report"}
