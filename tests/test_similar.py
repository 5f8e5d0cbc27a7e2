"""The images most like some: against scikit-learn, as a command, and from Python with images of any kind."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

import deepcluster
from deepcluster import Embeddings, InputError
from deepcluster.cli import main

CPU = {"device": "cpu", "workers": 0}
QUIET = ["--device", "cpu", "--workers", "0"]


def command(*words: object) -> int:
    """Exit status of the command line."""
    return main([*map(str, words)])


@pytest.fixture(scope="module")
def embeddings(trained: Path, images: Path) -> Embeddings:
    return deepcluster.embed(trained, images, **CPU)


@pytest.fixture(scope="module")
def table(trained: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "features.parquet"
    deepcluster.embed(trained, images, out=path, **CPU)
    return path


def expected(embeddings: Embeddings, query: int, count: int) -> tuple[list[str], list[float]]:
    """What scikit-learn finds in float64: names and cosines, without the query."""
    known = [index for index, name in enumerate(embeddings.names) if name not in embeddings.unreadable]
    rows = embeddings.embedding_ND[known].astype(np.float64)
    near = NearestNeighbors(n_neighbors=len(known), metric="cosine", algorithm="brute").fit(rows)
    distance, order = near.kneighbors(embeddings.embedding_ND[[query]].astype(np.float64))
    found = [
        (embeddings.names[known[index]], 1 - far)
        for index, far in zip(order[0].tolist(), distance[0].tolist(), strict=True)
        if known[index] != query
    ]
    return [name for name, _ in found[:count]], [value for _, value in found[:count]]


# What is found


def test_equals_scikit_learn(embeddings: Embeddings) -> None:
    queries = [3, 17, 40]
    found = deepcluster.similar(embeddings, query=[embeddings.names[query] for query in queries], count=12)
    for number, query in enumerate(queries):
        names, values = expected(embeddings, query, 12)
        rows = slice(12 * number, 12 * number + 12)
        assert found.queries[rows] == [embeddings.names[query]] * 12
        assert found.rank_R[rows].tolist() == list(range(1, 13))
        assert found.value_R[rows].tolist() == pytest.approx(values, abs=1e-5)
        assert np.isclose(sorted(values), sorted(values), atol=1e-5).all()
        assert set(found.names[rows][:8]) <= set(names)
    assert found.measure == "similarity"


def test_a_model_its_table_and_its_embeddings_say_the_same(
    trained: Path, images: Path, table: Path, embeddings: Embeddings
) -> None:
    of_table = deepcluster.similar(table, query=embeddings.names[5], count=6)
    assert deepcluster.similar(embeddings, query=embeddings.names[5], count=6).names == of_table.names
    of_model = deepcluster.similar(trained, images, query=images / embeddings.names[5], count=6, **CPU)
    assert of_model.value_R == pytest.approx(of_table.value_R, abs=1e-2)  # Kept features are halved, tables are not.


def test_distance_in_the_space_of_the_clusters(trained: Path, images: Path) -> None:
    model = deepcluster.load(trained)
    found = deepcluster.similar(model, images, query=sorted(images.iterdir())[4], count=59, space="clusters", **CPU)
    assert found.measure == "distance"
    assert (np.diff(found.value_R) >= 0).all()
    features_ND, _ = model.on(**CPU).features(
        deepcluster.data.sources.open_source(images), stage=model.settings.cluster_stage
    )
    points_NP = model.points(features_ND.to(model.on("cpu").machine.feature_dtype))
    index = {path.name: number for number, path in enumerate(sorted(images.iterdir()))}
    far = (points_NP - points_NP[index[found.queries[0]]]).norm(dim=1)
    assert found.value_R.tolist() == pytest.approx([far[index[name]].item() for name in found.names], abs=1e-4)


def test_the_images_of_the_run_are_the_default(trained: Path, images: Path) -> None:
    query = next(images.iterdir())
    found = deepcluster.similar(trained, query=query, count=3, **CPU)
    assert found.to_pandas().equals(deepcluster.similar(trained, images, query=query, count=3, **CPU).to_pandas())


# Queries


def test_one_image_of_any_kind_is_a_query(trained: Path, images: Path, tmp_path: Path) -> None:
    """The same pixels as a file elsewhere, an image of Pillow, an array and a tensor find the image itself first."""
    path = next(path for path in sorted(images.glob("*.png")) if Image.open(path).mode == "RGB")
    pixels = np.array(Image.open(path))
    elsewhere = tmp_path / "other name.png"
    elsewhere.write_bytes(path.read_bytes())
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for query in (elsewhere, Image.open(path), pixels, tensor, [Image.open(path)], pixels[None]):
        found = deepcluster.similar(trained, images, query=query, count=3, **CPU)
        assert found.names[0] == path.name
        assert found.value_R[0] > 0.999
    inside = deepcluster.similar(trained, images, query=path, count=2, **CPU)
    assert path.name not in inside.names
    assert inside.names == found.names[1:]
    assert deepcluster.similar(trained, images, query=path.name, count=2, **CPU).names == inside.names


def test_data_in_memory(trained: Path, images: Path) -> None:
    some = [Image.open(path).convert("RGB") for path in sorted(images.glob("*.png"))[:5]]
    found = deepcluster.similar(trained, some, query=some[2], count=5, **CPU)
    assert found.names[0] == "image-000002"
    assert len(found) == 5
    assert deepcluster.similar(trained, some, query="image-000002", count=5, **CPU).names == found.names[1:]


def test_a_folder_of_queries_in_the_order_of_their_names(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (2, 1, 3):
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"no picture")
    found = deepcluster.similar(trained, images, query=tmp_path, count=1, **CPU)
    assert "4.png is left out" in capsys.readouterr().err
    assert found.queries == [str(tmp_path / f"{number}.png") for number in (1, 2, 3)]


def test_a_table_with_a_limit_still_finds_the_query(table: Path, embeddings: Embeddings) -> None:
    """Rows are numbered among those that are used."""
    known = deepcluster.similar(table, query=embeddings.names[58], count=2, limit=30)
    rows = [embeddings.names[2 * number] for number in range(30)]
    assert set(known.names) <= set(rows) - {embeddings.names[58]}
    cosine = normalize(torch.from_numpy(embeddings.embedding_ND[::2])) @ normalize(
        torch.from_numpy(embeddings.embedding_ND[58]), dim=0
    )
    cosine[29] = -2
    assert known.names[0] == rows[int(cosine.nan_to_num(-2).argmax())]


# Files and pages


def test_the_command(trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = sorted(path.name for path in images.iterdir())[:2]
    words = ["similar", trained, images, "--query", images / queries[0], "--query", queries[1], "--count", 4, *QUIET]
    assert command(*words, "--out", tmp_path / "s.csv", "--page", tmp_path / "s.html") == 0
    shown = capsys.readouterr().out
    with (tmp_path / "s.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["query"] for row in rows] == [queries[0]] * 4 + [queries[1]] * 4
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"] * 2
    printed = [line.split("  ") for line in shown.splitlines() if line.startswith("  ")]
    assert [line[-1] for line in printed] == [row["name"] for row in rows]
    assert f"{queries[0]} (similarity)" in shown
    html = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert html.count('<img src="data:image/') == 10
    for ending in ("parquet", "jsonl"):
        assert command(*words, "--out", tmp_path / f"s.{ending}", "--quiet") == 0
    written = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert written["name"] == [row["name"] for row in rows]
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["similarity"] for line in lines] == pytest.approx([float(row["similarity"]) for row in rows])


def test_the_result_in_python(embeddings: Embeddings) -> None:
    found = deepcluster.similar(embeddings, query=embeddings.names[0], count=1000)
    readable = len(embeddings.names) - len(embeddings.unreadable)
    assert len(found) == readable - 1  # All others.
    frame = found.to_pandas()
    assert list(frame.columns) == ["query", "rank", "name", "similarity"]
    assert "<table" in found._repr_html_()
    assert repr(found) == f"Similar({readable - 1} images for 1 query: .queries, .names, .rank_R, .value_R)"


# Wrong input


def test_wrong_input_is_one_line_and_writes_nothing(
    trained: Path, images: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.jpg").write_text("no picture")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "4.png").write_bytes(b"no picture")
    query = next(images.iterdir()).name
    wrong = {
        "note.jpg can't be read": [trained, images, "--query", tmp_path / "note.jpg"],
        "is neither an image file nor the name of an image of the data": [trained, images, "--query", "nothing.jpg"],
        "there is no query: name a readable image": [trained, images, "--query", tmp_path / "bad"],
        "--count 0 is too small": [trained, images, "--query", query, "--count", 0],
        "should end in .parquet or .csv or .jsonl": [trained, images, "--query", query, "--out", tmp_path / "s.xlsx"],
        "should end in .html or .htm": [trained, images, "--query", query, "--page", tmp_path / "s.pdf"],
        "is not in the table, which has no network": [table, "--query", tmp_path / "note.jpg"],
        "a table of embeddings has no space of clusters": [table, "--query", query, "--space", "clusters"],
        "is no run folder, whose images would be used": ["untrained:alexnet-small", "--query", query],
        "--limit 1 is too small": [trained, images, "--query", query, "--limit", 1],
        "Missing option '--query'": [trained, images],
    }
    for message, words in wrong.items():
        assert command("similar", *words, *QUIET) == 2
        shown = capsys.readouterr()
        assert message in " ".join(shown.err.split())
        assert "Traceback" not in shown.err + shown.out
    assert {path.name for path in tmp_path.iterdir()} == {"note.jpg", "bad"}


def test_images_in_memory_are_no_query_of_a_table(embeddings: Embeddings) -> None:
    with pytest.raises(InputError, match="no network for images in memory"):
        deepcluster.similar(embeddings, query=np.zeros((8, 8, 3), np.uint8))
