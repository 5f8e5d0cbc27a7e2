"""Reports of tables of other programs: text of any kind, NumPy arrays, and embeddings over many columns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from test_report_tables import complaint, read, rows_of

from deepcluster.core.progress import Reporter
from deepcluster.core.text import as_line
from deepcluster.core.work import Work
from deepcluster.run.table_writers import ENDINGS, write_rows

ROWS, KINDS = rows_of(40)
NAMES = [f"a/{number}.jpg" for number in range(40)]


def points(path: Path) -> Any:
    """The rows of a table, of unit length, as the report has them."""
    collection = read(path, clusters=4)
    assert list(collection.names) == NAMES
    return collection.points_MP


def test_embeddings_of_any_layout_are_the_same_points(tmp_path: Path) -> None:
    """Those of pandas: lists in Parquet, in JSON lines and in text, and a column per number."""
    lists = pd.DataFrame({"name": NAMES, "embedding": list(ROWS)})
    wide = pd.DataFrame(ROWS[:, ::-1], columns=[f"emb_{number}" for number in reversed(range(12))])  # 11 before 10.
    wide.insert(3, "file name", NAMES)
    wide["score_1"] = 7.0
    bare = pd.DataFrame(ROWS).assign(filename=NAMES)
    as_json = lists.assign(embedding=[json.dumps(row.tolist()) for row in ROWS])
    lists.to_parquet(tmp_path / "lists.parquet")
    lists.to_json(tmp_path / "lists.jsonl", orient="records", lines=True, double_precision=15)
    as_json.to_csv(tmp_path / "json.csv", sep=";", encoding="utf-16")
    lists.assign(embedding=[np.array2string(row, max_line_width=40, floatmode="unique") for row in ROWS]).to_csv(
        tmp_path / "printed.csv"
    )
    wide.to_csv(tmp_path / "wide.tsv", sep="\t", index=False, encoding="utf-8-sig")
    wide.to_parquet(tmp_path / "wide.parquet")
    bare.to_csv(tmp_path / "bare.txt")
    np.savez(tmp_path / "both.npz", features=ROWS, names=np.array(NAMES))
    np.save(tmp_path / "rows.npy", ROWS)
    (tmp_path / "rows.names.txt").write_text("".join(f"{as_line(name)}\n" for name in NAMES))
    files = [path for path in sorted(tmp_path.iterdir()) if path.name != "rows.names.txt"]
    assert len(files) == 9
    for path in files:
        np.testing.assert_allclose(points(path), ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True), atol=1e-5)


def test_clusters_of_any_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = pd.DataFrame({"File": NAMES, "Cluster": KINDS, "Labels": KINDS + 8})
    for frame, file in (
        (numbers, "int.csv"),
        (numbers.astype({"Cluster": float, "Labels": float}), "float.csv"),
        (numbers.assign(Cluster=[f"c{kind}" for kind in KINDS]), "words.csv"),
        (numbers.astype({"Cluster": str, "Labels": str}), "text.jsonl"),
    ):
        if file.endswith(".csv"):
            frame.to_csv(tmp_path / file, index=False)
        else:
            frame.to_json(tmp_path / file, orient="records", lines=True)
        collection = read(tmp_path / file, work=Work(Reporter()))
        np.testing.assert_array_equal(collection.cluster_N, KINDS)
        assert collection.label_N is not None
        assert collection.label_names == [str(kind + 8) for kind in range(4)]
        np.testing.assert_array_equal(collection.label_N, KINDS)
    assert "clusters are numbered in the order of their names: 0 = c0, 1 = c1, 2 = c2, 3 = c3" in capsys.readouterr().out


def test_infinite_values_are_null_in_json(tmp_path: Path) -> None:
    rows_ND = np.array([[1, np.inf], [-np.inf, 0.1], [np.nan, 2]], np.float32)
    columns = {"name": list("abc"), "embedding": pa.FixedSizeListArray.from_arrays(pa.array(rows_ND.ravel()), 2)}
    for ending in ENDINGS:
        write_rows({**columns, "distance": rows_ND[:, 1]}, tmp_path / f"t{ending}")
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [line["embedding"] for line in lines] == [[1, None], [None, 0.1], [None, 2]]
    assert [line["distance"] for line in lines] == [None, 0.1, 2]
    np.testing.assert_array_equal(np.stack(pd.read_parquet(tmp_path / "t.parquet")["embedding"]), rows_ND)
    np.testing.assert_allclose(pd.read_csv(tmp_path / "t.csv")[["embedding_0", "embedding_1"]], rows_ND)


def test_two_numbered_columns_may_be_anything(tmp_path: Path) -> None:
    boxes = pd.DataFrame({"name": NAMES, "cluster": KINDS, "x1": 0.0, "x2": 1.0, "y1": 0.0, "y2": 1.0})
    boxes.to_csv(tmp_path / "t.csv", index=False)
    boxes.to_parquet(tmp_path / "t.parquet")
    for file in ("t.csv", "t.parquet"):
        assert read(tmp_path / file).points_MP.shape == (0, 0)


def test_missing_values_of_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,emb_0,emb_1,label\na,1,2,x\nb,nan,3,\nc,,4,NaN\nd,5,6,y\n")
    collection = read(tmp_path / "t.csv", clusters=1)
    assert sorted(collection.unreadable) == ["b", "c"]
    assert collection.label_N is not None and collection.label_N.tolist() == [0, -1, -1, 1]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("t.csv", "name,embedding\na,[1 2 ... 3]\n", "holds shortened lists such as"),
        ("t.csv", 'name,embedding\na,"[1, x]"\n', "holds lists that are not all of numbers"),
        ("t.csv", "name,size\na,1\n", "has no column of embeddings"),
        ("t.csv", "", "has no rows: it is empty"),
        ("t.csv", "name,cluster\n", "has no rows"),
        ("t.jsonl", "[1, 2]\n", "line 1 is no JSON object"),
        ("t.jsonl", '{"name": "a", "x": 1}\n{"name": "b", "x": "c"}\n', "holds values of several types"),
        ("t.npy", "no array", "t.npy holds Python objects"),
    ],
)
def test_tables_that_can_not_be_used_say_why(tmp_path: Path, file: str, content: str, words: str) -> None:
    (tmp_path / file).write_text(content)
    assert words in complaint(tmp_path / file)


def test_arrays_that_can_not_be_used_say_why(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array(["a", None], dtype=object))
    assert "Python objects" in complaint(tmp_path / "t.npy")
    np.save(tmp_path / "t.npy", np.zeros((2, 3, 4)))
    assert "wanted one row of numbers per image" in complaint(tmp_path / "t.npy")
    np.save(tmp_path / "t.npy", np.eye(3))
    (tmp_path / "t.names.txt").write_text("a\nb\n")
    assert "t.names.txt has 2 lines, but" in complaint(tmp_path / "t.npy")
    np.savez(tmp_path / "t.npz", image=np.zeros((2, 3, 4)))
    assert "no array of embeddings" in complaint(tmp_path / "t.npz")
