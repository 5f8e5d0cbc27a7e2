"""A sample that stands for all: its rows against naive loops, lists and tables that can be used, wrong input."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import deepcluster
from deepcluster import Embeddings
from deepcluster.cli import main
from deepcluster.clustering.spread import central_points, farthest_first
from deepcluster.data.sources import open_source

CPU = {"device": "cpu", "workers": 0}
QUIET = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def clouds() -> Embeddings:
    """Four directions with 40, 20, 10 and 2 rows around them."""
    rng = np.random.default_rng(0)
    rows_ND = np.repeat(np.eye(4, 12), [40, 20, 10, 2], axis=0) + 0.05 * rng.normal(size=(72, 12))
    return Embeddings([f"{number:02}.png" for number in range(72)], rows_ND.astype(np.float32), {})


def test_one_image_of_each_cloud(clouds: Embeddings) -> None:
    found = deepcluster.sample(clouds, count=4, how="diverse")
    numbers = [int(name[:2]) for name in found.names]
    assert sorted(np.searchsorted([40, 60, 70], numbers, side="right").tolist()) == [0, 1, 2, 3]
    assert sorted(found.stands_for_R.tolist()) == [2, 10, 20, 40]


def test_representative_images_follow_where_most_images_are(clouds: Embeddings) -> None:
    """Most of them are of the largest cloud; those that k-means chose, the largest of its clusters first."""
    found = deepcluster.sample(clouds, count=12, seed=3)
    indices_C, sizes_C = central_points(normalize(torch.from_numpy(clouds.embedding_ND)), 12, seed=3)
    assert found.names == [clouds.names[index] for index in indices_C.tolist()]
    assert found.stands_for_R.sum() == sizes_C.sum() == 72
    assert sum(int(name[:2]) < 40 for name in found.names) > 4


def test_what_an_image_stands_for(clouds: Embeddings) -> None:
    """Images that are nearest to it, and the farthest of them, by all distances in float64."""
    found = deepcluster.sample(clouds, count=9, how="diverse")
    rows = normalize(torch.from_numpy(clouds.embedding_ND))
    chosen = farthest_first(rows, 9)
    assert found.names == [clouds.names[index] for index in chosen.tolist()]
    distance_NC = torch.cdist(rows.double(), rows[chosen].double())
    nearest = distance_NC.argmin(dim=1)
    assert found.stands_for_R.tolist() == torch.bincount(nearest, minlength=9).tolist()
    farthest = [distance_NC[nearest == one, one].max().item() for one in range(9)]
    assert found.distance_R.tolist() == pytest.approx(farthest, abs=1e-5)


def test_all_images_are_a_sample(clouds: Embeddings) -> None:
    assert sorted(deepcluster.sample(clouds, count=72, how="diverse").names) == clouds.names
    assert sorted(deepcluster.sample(clouds, count=72).names) == clouds.names


@pytest.mark.parametrize("how", ["representative", "diverse"])
def test_copies_stand_for_nothing_that_counts_already(how: Any) -> None:
    rows = Embeddings([f"{number}" for number in range(12)], np.repeat(np.eye(2, dtype=np.float32), 6, axis=0), {})
    found = deepcluster.sample(rows, count=4, how=how)
    assert found.stands_for_R.tolist() == [6, 6, 0, 0]


def test_a_list_is_data_and_tables_name_files(trained: Path, images: Path, tmp_path: Path) -> None:
    words = ["sample", str(trained), str(images), "--count", "7", *QUIET]
    assert main([*words, "--out", str(tmp_path / "label.txt"), "--page", str(tmp_path / "label.html")]) == 0
    listed = open_source(tmp_path / "label.txt")
    assert len(listed) == 7
    assert main([*words, "--out", str(tmp_path / "label.csv"), "--quiet"]) == 0
    with (tmp_path / "label.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == (tmp_path / "label.txt").read_text().splitlines()
    assert all(Path(row["path"]).is_file() for row in rows)
    assert sum(int(row["stands_for"]) for row in rows) == len(open_source(images))
    assert (tmp_path / "label.html").read_text(encoding="utf-8").count("stands for ") >= 7


def test_names_are_printed_where_nothing_is_written(trained: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", str(trained), str(images), "--count", "5", "--how", "diverse", *QUIET]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()[-5:]
    assert printed == deepcluster.sample(trained, images, count=5, how="diverse", **CPU).names


def test_the_seed_decides(clouds: Embeddings) -> None:
    assert deepcluster.sample(clouds, count=9, seed=1).names == deepcluster.sample(clouds, count=9, seed=1).names


def test_wrong_input(trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "--count 0 is too small": ["--count", "0"],
        "--count 61 is more than the 60 images": ["--count", "61"],
        "should end in .txt or .parquet or .csv or .jsonl": ["--count", "2", "--out", str(tmp_path / "s.doc")],
        "Missing option '--count'": [],
        "'nearest' is not one of": ["--count", "2", "--how", "nearest"],
    }
    for message, words in wrong.items():
        assert main(["sample", str(trained), str(images), *words, *QUIET]) == 2, message
        assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
