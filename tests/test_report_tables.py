"""Tables of embeddings and of clusters, of many origins, as a report takes them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from spoiled_images import write_good_images, write_spoiled_images

import deepcluster
from deepcluster.core.errors import InputError, Interrupted, UnreadableImage
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Work
from deepcluster.data.sources import open_source
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report import table as tables
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.table import MISSING, MOST_NUMBER, NOT_FINITE, read_table

QUIET = Reporter(quiet=True)


def rows_of(count: int, *, kinds: int = 4, width: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around `kinds` directions that are far apart, and which is around which."""
    rng = np.random.default_rng(seed)
    kind_N = rng.integers(kinds, size=count)
    rows = 8 * np.eye(kinds, width)[kind_N] + rng.normal(0, 0.3, (count, width))
    return rows.astype(np.float32), kind_N


def read(path: Path, *, images: Any = None, work: Work | None = None, **options: Any) -> Collection:
    return read_table(path, ReportOptions(**options), images=images, work=work or Work())


def complaint(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **options)
    return str(caught.value)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)


def assert_distances(collection: Collection, rows: np.ndarray) -> None:
    """Distances are those of rows of unit length to the centroids; the centroids of k-means are the nearest ones."""
    assert collection.centroids_KP is not None
    centroids = collection.centroids_KP.double().numpy()
    seen = collection.cluster_N >= 0
    wanted = np.linalg.norm(unit(rows[seen]) - centroids[collection.cluster_N[seen]], axis=1)
    np.testing.assert_allclose(collection.distance_N[seen], wanted, atol=2e-4)
    assert np.isnan(collection.distance_N[~seen]).all()


# Tables of our own


def test_what_embed_writes(images: Path, trained: Path, tmp_path: Path) -> None:
    made = deepcluster.embed(trained, images, out=tmp_path / "features.parquet", device="cpu", reporter=QUIET)
    collection = read(tmp_path / "features.parquet", clusters=5)
    assert collection.title == "features.parquet"
    assert list(collection.names) == made.names
    assert collection.n_clusters == 5 and collection.sizes_K().sum() == 60
    assert (np.diff(collection.sizes_K()) <= 0).all(), "0 is the largest"
    assert_distances(collection, made.embedding_ND)
    np.testing.assert_array_equal(collection.sample_M, np.arange(60))
    np.testing.assert_allclose(collection.points_MP, unit(made.embedding_ND), atol=1e-6)


def test_what_assign_writes_has_a_gallery_without_a_map(trained: Path, tmp_path: Path) -> None:
    write_good_images(tmp_path / "photos", 20)
    write_spoiled_images(tmp_path / "photos", 3)
    made = deepcluster.assign(trained, tmp_path / "photos", out=tmp_path / "clusters.parquet", device="cpu", reporter=QUIET)
    collection = read(tmp_path / "clusters.parquet", images=open_source(tmp_path / "photos"))
    np.testing.assert_array_equal(collection.cluster_N, made.cluster_N)
    np.testing.assert_array_equal(collection.distance_N, made.distance_N)
    assert (made.cluster_N == -1).any() and made.unreadable
    assert collection.points_MP.shape == (0, 0) and collection.centroids_KP is None
    assert collection.table == "clusters.parquet"
    assert collection.images is not None
    assert [collection.images.name(i) for i in range(len(collection))] == made.names
    assert collection.images.read(0) == (tmp_path / "photos" / made.names[0]).read_bytes()


# Tables of others


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_lists_of_pandas_of_any_kind_of_number(tmp_path: Path, dtype: str) -> None:
    rows, kind_N = rows_of(150)
    rows = (rows * 10).round().astype(dtype)
    frame = pd.DataFrame({"File_Name": [f"{i}.jpg" for i in range(150)], "v": list(rows), "bright": np.arange(150.0)})
    frame.to_parquet(tmp_path / "t.parquet")
    collection = read(tmp_path / "t.parquet", clusters=4)
    assert adjusted_rand_score(kind_N, collection.cluster_N) == 1
    assert list(collection.names[:2]) == ["0.jpg", "1.jpg"]
    assert_distances(collection, rows)


def test_the_number_of_clusters_follows_the_rows(tmp_path: Path) -> None:
    for count, wanted in ((3, 2), (450, 5)):
        pq.write_table(pa.table({"rows": list(rows_of(count)[0])}), tmp_path / "t.parquet")
        collection = read(tmp_path / "t.parquet")
        assert collection.n_clusters == wanted
        assert collection.names[2] == "row 2"


def test_clusters_of_the_table_are_kept_and_their_means_are_the_centroids(tmp_path: Path) -> None:
    rows, kind_N = rows_of(90)
    cluster = [None if i == 7 else int(kind) * 2 for i, kind in enumerate(kind_N)]
    frame = pd.DataFrame({"id": np.arange(90), "embedding": list(rows), "cluster": cluster, "label": kind_N})
    frame.to_parquet(tmp_path / "t.parquet")
    collection = read(tmp_path / "t.parquet")
    np.testing.assert_array_equal(collection.cluster_N, [-1 if i == 7 else kind * 2 for i, kind in enumerate(kind_N)])
    assert collection.n_clusters == 7 and collection.names[3] == "3" and 7 not in collection.sample_M
    assert collection.centroids_KP is not None and collection.unreadable == {}
    for kind in range(4):
        members = unit(rows)[(kind_N == kind) & (np.arange(90) != 7)]
        np.testing.assert_allclose(collection.centroids_KP[2 * kind].numpy(), members.mean(0), atol=1e-6)
    assert_distances(collection, rows)
    # Asked for, other clusters are made.
    assert read(tmp_path / "t.parquet", clusters=3).n_clusters == 3


def test_labels_are_words_numbers_or_unknown(tmp_path: Path) -> None:
    columns = {"path": ["a", "b", "c", None], "cluster": [0, 0, 1, 1]}
    for labels, numbers, names in (
        (["dog", "cat", None, ""], [1, 0, -1, -1], ["cat", "dog"]),
        ([10, 9, -1, 9], [1, 0, -1, 0], ["9", "10"]),
    ):
        pq.write_table(pa.table({**columns, "label": pa.array(labels)}), tmp_path / "t.parquet")
        collection = read(tmp_path / "t.parquet")
        assert collection.label_N is not None
        assert (collection.label_N.tolist(), list(collection.label_names)) == (numbers, names)
        assert list(collection.names) == ["a", "b", "c", "row 3"]


def test_rows_without_numbers_are_not_assigned_and_say_why(tmp_path: Path) -> None:
    rows, _ = rows_of(40)
    lists: list[Any] = [row.tolist() for row in rows]
    lists[0], lists[5], lists[6], lists[39] = None, [*lists[5][:-1], float("nan")], [], [None, *lists[39][1:]]
    lists[8] = [*lists[8][:-1], float("inf")]
    for kind in (pa.list_(pa.float32()), pa.large_list(pa.float64())):
        table = pa.table({"name": [f"n{i}" for i in range(40)], "embedding": pa.array(lists, kind)})
        pq.write_table(table, tmp_path / "t.parquet")
        collection = read(tmp_path / "t.parquet", clusters=4)
        assert collection.unreadable == {"n0": MISSING, "n6": MISSING, "n5": NOT_FINITE, "n8": NOT_FINITE, "n39": NOT_FINITE}
        assert np.flatnonzero(collection.cluster_N < 0).tolist() == [0, 5, 6, 8, 39]
        assert len(collection.sample_M) == 35 and np.isfinite(collection.points_MP).all()
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 12, mask=pa.array([i == 3 for i in range(40)]))
    pq.write_table(pa.table({"embedding": fixed}), tmp_path / "t.parquet")
    collection = read(tmp_path / "t.parquet", clusters=4)
    assert collection.unreadable == {"row 3": MISSING}
    assert_distances(collection, rows)


def test_a_folder_of_parts_is_one_table_in_the_order_of_their_names(tmp_path: Path) -> None:
    rows, kind_N = rows_of(100)
    for part in range(4):
        piece = slice(25 * part, 25 * part + 25)
        frame = pd.DataFrame({"name": [f"{i}" for i in range(100)][piece], "embedding": list(rows[piece])})
        frame.to_parquet(tmp_path / f"part-{part}.parquet")
    collection = read(tmp_path, clusters=4)
    assert list(collection.names) == [f"{i}" for i in range(100)]
    assert adjusted_rand_score(kind_N, collection.cluster_N) == 1
    pd.DataFrame({"name": ["x"], "other": [1]}).to_parquet(tmp_path / "part-4.parquet")
    assert "can't be read as a table" in complaint(tmp_path)


def test_dictionaries_are_plain_values(tmp_path: Path) -> None:
    rows, kind_N = rows_of(40)
    names = pa.array([f"{i}.png" for i in range(40)]).dictionary_encode()
    label = pa.array([f"kind {kind}" for kind in kind_N]).dictionary_encode()
    pq.write_table(pa.table({"name": names, "label": label, "embedding": list(rows)}), tmp_path / "t.parquet")
    collection = read(tmp_path / "t.parquet", clusters=4)
    assert collection.names[39] == "39.png" and collection.label_N is not None
    assert [collection.label_names[label] for label in collection.label_N] == [f"kind {kind}" for kind in kind_N]


@pytest.mark.parametrize("name", ["t.json", "t.xlsx", "t.feather"])
def test_other_formats_are_refused_with_a_way_to_convert_them(tmp_path: Path, name: str) -> None:
    rows, _ = rows_of(4)
    (tmp_path / name).touch()
    assert "to_parquet('t.parquet')" in complaint(tmp_path / name)
    # What the message advises is read.
    pd.DataFrame({"name": list("abcd"), "embedding": list(rows)}).to_parquet(tmp_path / "t.parquet")
    assert list(read(tmp_path / "t.parquet", clusters=1).names) == list("abcd")


def test_rows_of_several_groups_and_a_sample_of_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_POINTS", 300)
    rows, kind_N = rows_of(5000)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 12, mask=pa.array(np.arange(5000) < 1500))
    pq.write_table(pa.table({"embedding": fixed, "cluster": pa.array(kind_N)}), tmp_path / "t.parquet", row_group_size=2000)
    for options in ({"clusters": 4}, {}):
        collection = read(tmp_path / "t.parquet", **options)
        seen = collection.cluster_N >= 0
        assert (~seen[:1500]).all() and seen[1500:].all()
        assert adjusted_rand_score(kind_N[1500:], collection.cluster_N[1500:]) == 1
        assert len(collection.unreadable) == 1500
        assert_distances(collection, rows)
        assert len(collection.sample_M) == 300
        np.testing.assert_allclose(collection.points_MP, unit(rows)[collection.sample_M], atol=1e-6)
    one, same = (read(tmp_path / "t.parquet", clusters=4, seed=5) for _ in range(2))
    assert one.centroids_KP is not None and same.centroids_KP is not None
    assert torch.equal(one.centroids_KP, same.centroids_KP)


def test_a_stop_is_heard(tmp_path: Path) -> None:
    pq.write_table(pa.table({"rows": list(rows_of(10)[0])}), tmp_path / "t.parquet")
    work = Work()
    work.interruption.requested = "SIGINT"
    with pytest.raises(Interrupted):
        read(tmp_path / "t.parquet", work=work)


# Pictures


def test_pictures_are_found_by_name(images: Path, tmp_path: Path) -> None:
    source = open_source(images)
    names = [source.name(i) for i in (3, 1)]
    for start in ("", "/home/somebody/photos/"):
        pq.write_table(
            pa.table({"name": [start + n for n in [*names, "gone.jpg"]], "cluster": [0, 1, 0]}), tmp_path / "t.parquet"
        )
        collection = read(tmp_path / "t.parquet", images=source)
        pictures = collection.images
        assert pictures is not None and len(pictures) == 3
        assert pictures.read(0) == source.read(3) and pictures.path(1) == source.path(1)
        with pytest.raises(UnreadableImage):
            pictures.read(2)
    pq.write_table(pa.table({"name": ["x.jpg"], "cluster": [0]}), tmp_path / "t.parquet")
    assert "none of the table's 1 names, such as x.jpg, is that of an image" in complaint(
        tmp_path / "t.parquet", images=source
    )


def test_folders_of_other_classes_are_not_taken_for_a_start(images: Path, tmp_path: Path) -> None:
    source = open_source(images)
    name = source.name(0)
    pq.write_table(pa.table({"name": [f"a/{name}", f"b/{name}"], "cluster": [0, 1]}), tmp_path / "t.parquet")
    pictures = read(tmp_path / "t.parquet", images=source).images
    assert pictures is not None and pictures.path(0) == source.path(0) and pictures.path(1) is None


# What can't be used


def test_a_table_that_can_not_be_used_says_why(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    rows = [[1.0, 2.0]] * 3
    for columns, options, said in (
        ({"a": [1, 2], "b": ["x", "y"]}, {}, r"no column of embeddings .* it has a \(int64\), b \(string\)\. Name one"),
        ({"a": rows, "b": rows}, {}, r"a, b all hold lists of numbers; say .* --embedding-column a$"),
        ({"a": rows}, {"embedding_column": "A"}, r"has no such column; it has a \(list|no such column \(did you mean a\?\)"),
        ({"a": rows, "n": [1, 2, 3]}, {"embedding_column": "n"}, r"--embedding-column n holds int64, not lists of numbers"),
        ({"a": rows, "n": [True] * 3}, {"cluster_column": "n"}, r"--cluster-column n holds bool, not numbers or words"),
        ({"a": [*rows, [1.0]]}, {}, r"embedding of row 3 has 1 numbers, that of row 0 has 2"),
        ({"a": rows}, {"clusters": 4}, r"clusters=4 must be between 1 and the 3 rows that hold numbers$"),
        ({"a": pa.array([None, None], pa.list_(pa.float32()))}, {}, r"none of the 2 rows of embeddings holds numbers"),
        ({"cluster": [0.5, 1.0]}, {}, r"0.5 is no number of a cluster"),
        ({"cluster": [0, MOST_NUMBER + 1]}, {}, r"is no number of a cluster"),
        ({"cluster": [-1, -1]}, {}, r"no row is in a cluster"),
        ({"cluster": [0, 1]}, {"clusters": 2}, r"no column of embeddings \(lists of numbers\) to cluster"),
        ({"a": pa.array([], pa.list_(pa.float32()))}, {}, r"has no rows"),
    ):  # fmt: skip
        pq.write_table(pa.table(columns), path)
        assert re.search(said, complaint(path, **options)), (said, complaint(path, **options))


def test_the_usual_name_decides_between_several(tmp_path: Path) -> None:
    rows, kind_N = rows_of(30)
    pd.DataFrame({"box": [[0, 0, 1, 1]] * 30, "Embedding": list(rows)}).to_parquet(tmp_path / "t.parquet")
    collection = read(tmp_path / "t.parquet", clusters=4)
    assert adjusted_rand_score(kind_N, collection.cluster_N) == 1


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    assert "can't be read as a table" in complaint(tmp_path / "t.parquet")
    (tmp_path / "empty").mkdir()
    assert "is a folder without Parquet files" in complaint(tmp_path / "empty")
    assert "does not exist" in complaint(tmp_path / "gone.parquet")
