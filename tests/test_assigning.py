"""`assign` of one image, and of tables of embeddings: the same columns and folders as of images."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from spoiled_images import write_good_images, write_spoiled_images

import deepcluster
from deepcluster.cli import main
from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.run.cluster_names import write_names

QUIET: dict[str, Any] = {"device": "cpu", "workers": 0, "reporter": Reporter(quiet=True)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images in two folders, and one that can't be read."""
    folder = tmp_path_factory.mktemp("tables") / "my photos"
    write_good_images(folder / "a b" / "ü", 10, size=(36, 32))
    write_good_images(folder / "c", 6, size=(32, 36))
    write_spoiled_images(folder, 1)
    return folder


@pytest.fixture(scope="module")
def table(trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of the photos, with their paths."""
    path = tmp_path_factory.mktemp("embedded") / "t.parquet"
    deepcluster.embed(trained, photos, out=path, **QUIET)
    return path


@pytest.fixture(scope="module")
def of_table(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made of the table, with a name for a cluster."""
    run = deepcluster.cluster(table, clusters=3, out=tmp_path_factory.mktemp("of_table") / "run", whiten=False)
    write_names(run, {1: "dogs"})
    return Path(run)


def in_folders(by: Path) -> set[tuple[int, str]]:
    """The cluster and the digest of each image in folders of clusters."""
    files = list(by.glob("cluster-*/*"))
    return {(int(path.parent.name.split()[0][8:]), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


# Tables


def test_rows_of_a_table_have_the_columns_and_the_folders_of_images(
    trained: Path, table: Path, of_table: Path, photos: Path, tmp_path: Path
) -> None:
    found = deepcluster.assign(of_table, table, out=tmp_path / "t.csv", folders=tmp_path / "by", copy=True, **QUIET)
    rows = pd.read_csv(tmp_path / "t.csv", encoding="utf-8-sig")
    deepcluster.assign(trained, photos, out=tmp_path / "images.csv", **QUIET)
    of_images = pd.read_csv(tmp_path / "images.csv", encoding="utf-8-sig")
    assert [name for name in rows.columns if name != "cluster_name"] == list(of_images.columns)
    assert rows[["name", "path"]].equals(of_images[["name", "path"]])
    assert rows.cluster_name[rows.cluster == 1].eq("dogs").all() and rows.cluster_name[rows.cluster != 1].isna().all()
    assert rows.cluster.tolist() == found.cluster_N.tolist()
    # The nearest two centroids, of rows of unit length.
    readable = rows[rows.cluster >= 0]
    embedding = pd.read_parquet(table).set_index("name").embedding
    unit = {name: row / np.linalg.norm(row) for name, row in embedding.items()}
    means = np.stack([np.mean([unit[name] for name in some.name], axis=0) for _, some in readable.groupby("cluster")])
    away = np.array([np.linalg.norm(unit[name] - means, axis=1) for name in readable.name])
    assert away.argmin(axis=1).tolist() == readable.cluster.tolist()
    np.testing.assert_allclose(np.sort(away)[:, :2], readable[["distance", "second_distance"]], rtol=1e-3, atol=1e-4)
    wanted = {(row.cluster, hashlib.sha256(Path(row.path).read_bytes()).hexdigest()) for row in readable.itertuples()}
    assert in_folders(tmp_path / "by") == wanted
    assert (tmp_path / "by" / "cluster-1 dogs").is_dir() and len(found.unreadable) == 1
    before = in_folders(tmp_path / "by")
    deepcluster.assign(of_table, table, folders=tmp_path / "by", add=True, **QUIET)
    assert in_folders(tmp_path / "by") == before and len(list((tmp_path / "by").glob("*/*"))) == 16


def test_a_limit_takes_the_rows_that_it_takes_of_images(trained: Path, table: Path, of_table: Path, photos: Path) -> None:
    for limit in (1, 5, 16, 30):
        rows = deepcluster.assign(of_table, table, limit=limit, **QUIET)
        assert rows.names == deepcluster.assign(trained, photos, limit=limit, **QUIET).names


def test_folders_of_rows_without_paths(trained: Path, of_table: Path, photos: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.npy"
    deepcluster.embed(trained, photos, out=bare, **QUIET)
    with pytest.raises(InputError, match="needs image files, and none are known for the rows of") as fault:
        deepcluster.assign(of_table, bare, folders=tmp_path / "by", **QUIET)
    assert "\n" not in str(fault.value) and not (tmp_path / "by").exists()
    run = deepcluster.cluster(bare, photos, clusters=3, out=tmp_path / "run")  # It remembers the images.
    deepcluster.assign(run, bare, folders=tmp_path / "by", ranked=True, **QUIET)
    assert len(in_folders(tmp_path / "by")) == 16
    assert deepcluster.assign(run, bare, **QUIET).source() is not None


def test_rows_are_printed_and_many_are_not(
    table: Path, of_table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["assign", str(of_table), str(table)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 18 and lines[0].split()[:3] == ["name", "cluster", "distance"]
    monkeypatch.setattr("deepcluster.applied.assigning.FEW", 16)
    assert main(["assign", str(of_table), str(table)]) == 2
    assert "17 rows are too many to print (at most 16)" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="leave out torchrun"):
        deepcluster.assign(of_table, table, **QUIET)


def test_the_next_step_after_a_table_is_a_command_that_works(
    table: Path, of_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["assign", str(of_table), str(table), "--out", str(tmp_path / "t.csv")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"see it as a page: deepcluster report {tmp_path / 't.csv'}"


# One image


def test_one_image_in_every_form_is_the_same_row(trained: Path, photos: Path) -> None:
    path = next(path for path in sorted((photos / "c").iterdir()) if path.suffix == ".png")
    [row] = deepcluster.assign(trained, path, **QUIET)
    picture = Image.open(path)
    for one in (str(path), [path], picture, [picture], np.asarray(picture.convert("RGB"))):
        found = deepcluster.assign(trained, one, **QUIET)
        assert len(found) == 1 and {**found[0], "name": row["name"]} == row
    among_others = deepcluster.assign(trained, photos, **QUIET)[f"c/{path.name}"]
    assert among_others.pop("name") == f"c/{row.pop('name')}"
    assert among_others == pytest.approx(row, rel=1e-4)  # The last digits depend on the batch.


def test_what_is_like_one_image(
    trained: Path,
    images: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))  # No features are kept yet.
    path = next(path for path in sorted((photos / "c").iterdir()) if path.suffix == ".png")
    command = ["assign", str(trained), str(path), "--device", "cpu", "--workers", "0"]

    def printed() -> list[str]:
        assert main(command) == 0
        return capsys.readouterr().out.splitlines()

    cluster = int(deepcluster.assign(trained, path, **QUIET).cluster_N[0])
    table = pd.read_parquet(trained / "clusters.parquet")
    typical = table[table.cluster == cluster].sort_values("distance", kind="stable").head(5)
    head = f"images of {trained} nearest to the centre of cluster {cluster}:"
    wanted = [head, *(f"  {away:.3f}  {name}" for away, name in zip(typical.distance, typical.name, strict=True))]
    lines = printed()
    assert lines[2:-1] == wanted
    more = f"more that are like it: deepcluster similar {trained} {images} --query {path}".replace(str(path), f"'{path}'")
    assert lines[-1] == more
    near = deepcluster.similar(trained, images, query=path, count=5, **QUIET)  # Its features are kept: they are used.
    assert printed()[2 + len(wanted) : -1] == [
        "most similar to it (similarity):",
        *(f"  {value:.3f}  {name}" for value, name in zip(near.value_R, near.names, strict=True)),
    ]
    command[2] = str(photos / "no-such.png")
    assert main(command) == 2
