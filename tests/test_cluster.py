"""`cluster`: clusters of any model or table without training, and the run folder that all commands take."""

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_helper import write_classes
from ranks_helper import At, in_ranks
from sklearn.cluster import KMeans as Reference
from sklearn.datasets import load_digits, make_blobs
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from small_runs import train_small
from spoiled_images import half

import deepcluster
from deepcluster import KMeans, Whitening, cli
from deepcluster.applied import clustering_choice as choice
from deepcluster.applied.clustering import careful_start
from deepcluster.applied.clustering_options import ClusterOptions
from deepcluster.applied.clustering_rows import n_components
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.progress import Reporter
from deepcluster.data.sources import open_source
from deepcluster.info import info
from deepcluster.run.embedding_tables import open_table
from deepcluster.run.folder import load_checkpoint

QUIET: dict[str, Any] = {"workers": 0, "device": "cpu"}


def table_of(run: Path) -> dict[str, list[Any]]:
    return pq.read_table(run / "clusters.parquet").to_pydict()


def write_embeddings(path: Path, rows_ND: np.ndarray, names: list[str] | None = None) -> Path:
    names = names or [f"{row:05d}.jpg" for row in range(len(rows_ND))]
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows_ND.astype(np.float32).ravel()), rows_ND.shape[1])
    pq.write_table(pa.table({"name": names, "embedding": embeddings}), path)
    return path


@pytest.fixture(scope="module")
def photos(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 60 images, one of which is cut in half."""
    folder = tmp_path_factory.mktemp("some") / "photos"
    shutil.copytree(images, folder)
    broken = sorted(folder.iterdir())[7]
    broken.write_bytes(half(broken.read_bytes()))
    return folder


@pytest.fixture(scope="module")
def clustered(trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepcluster.cluster(trained, photos, clusters=4, out=tmp_path_factory.mktemp("clustered") / "run", pca=8, **QUIET)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,797 digits as a table of their pixels."""
    return write_embeddings(tmp_path_factory.mktemp("digits") / "digits.parquet", load_digits().data)


@pytest.fixture(scope="module")
def of_table(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepcluster.cluster(digits, clusters=10, out=tmp_path_factory.mktemp("of_table") / "run", seed=3)


def test_the_whole_is_whitening_and_k_means_of_what_embed_writes(trained: Path, photos: Path, clustered: Path) -> None:
    rows_ND = torch.from_numpy(deepcluster.embed(trained, photos, **QUIET).embedding_ND)
    finite_N = rows_ND.isfinite().all(dim=1)
    points_FP = Whitening(8).fit_transform(rows_ND[finite_N])
    start_KP = careful_start(points_FP, 4, 31)
    expected = KMeans(4, init=start_KP).cluster(points_FP, seed=31)
    found = table_of(clustered)
    labels_N = np.array(found["cluster"])
    assert (labels_N >= 0).tolist() == finite_N.tolist()
    assert adjusted_rand_score(expected.labels_N, labels_N[labels_N >= 0]) == 1
    np.testing.assert_allclose(np.array(found["distance"])[labels_N >= 0], expected.distances_N, rtol=1e-4)
    sizes = np.bincount(labels_N[labels_N >= 0])
    assert sizes.tolist() == sorted(sizes, reverse=True)


def test_the_whole_of_a_table_is_what_scikit_learn_makes(digits: Path, of_table: Path) -> None:
    """From the same start, PCA, whitening, scaling to unit length and Lloyd's algorithm give the same clusters."""
    width = n_components(1797, 64, ClusterOptions())
    points_NP = PCA(width, whiten=True, svd_solver="full").fit_transform(load_digits().data)
    points_NP /= np.linalg.norm(points_NP, axis=1, keepdims=True)
    whitening = Whitening(width).fit(torch.from_numpy(load_digits().data).float())
    ours_NP = whitening.transform(torch.from_numpy(load_digits().data).float())
    np.testing.assert_allclose(ours_NP.abs(), np.abs(points_NP), atol=1e-3)  # Signs of the components are arbitrary.
    start_KP = careful_start(ours_NP, 10, 3) * np.sign((ours_NP.numpy() * points_NP).sum(axis=0))
    reference = Reference(10, init=start_KP, n_init=1, max_iter=20, tol=0, algorithm="lloyd").fit(points_NP)
    found = table_of(of_table)
    assert adjusted_rand_score(reference.labels_, found["cluster"]) > 0.99
    assert math.isclose(reference.inertia_, float(np.square(found["distance"]).sum()), rel_tol=1e-3)


def test_a_table_of_the_same_features_gives_the_same_clusters(
    trained: Path, photos: Path, clustered: Path, tmp_path: Path
) -> None:
    deepcluster.embed(trained, photos, out=tmp_path / "embeddings.parquet", **QUIET)
    run = deepcluster.cluster(tmp_path / "embeddings.parquet", clusters=4, out=tmp_path / "run", pca=8)
    assert table_of(run)["name"] == table_of(clustered)["name"]
    assert table_of(run)["cluster"] == table_of(clustered)["cluster"]
    np.testing.assert_allclose(table_of(run)["distance"], table_of(clustered)["distance"], rtol=1e-4)


def test_whitened_components_are_uncorrelated_and_of_unit_variance(digits: Path, of_table: Path) -> None:
    state = load_checkpoint(of_table / "checkpoints" / "last.pt")["final"]["whitening"]
    rows_ND = open_table(digits).take(torch.arange(1797)).double()
    white_NP = (rows_ND - state["mean"].double()) @ state["components"].double()
    np.testing.assert_allclose(np.cov(white_NP.numpy(), rowvar=False), np.eye(white_NP.shape[1]), atol=2e-3)


def test_the_result_is_a_run(trained: Path, clustered: Path, of_table: Path) -> None:
    assert isinstance(clustered, deepcluster.Run)
    assert repr(clustered) == f"Run({str(clustered)!r}: 60 images of {trained.absolute()} in 4 clusters, not trained)"
    assert clustered.clusters.cluster_N.tolist() == table_of(clustered)["cluster"]
    assert clustered.metrics == []
    assert ".model()" in clustered._repr_html_()
    assert "1,797 embeddings of" in repr(of_table)
    assert ".model()" not in of_table._repr_html_()


def test_assign_puts_the_same_images_into_the_same_clusters(photos: Path, clustered: Path) -> None:
    again = deepcluster.assign(clustered, photos, **QUIET)
    found = table_of(clustered)
    assert again.names == found["name"]
    assert again.cluster_N.tolist() == found["cluster"]
    np.testing.assert_allclose(again.distance_N, np.array(found["distance"], np.float32), rtol=1e-4)


def test_the_run_folder_is_whole(trained: Path, photos: Path, clustered: Path) -> None:
    config = json.loads((clustered / "config.json").read_text())
    assert config["clustered"] == {"model": str(trained.absolute()), "stage": "features", "whitened": True}
    assert {"image_size", "mean", "std", "sobel", "arch"} <= config["settings"].keys()
    assert not {"epochs", "lr", "batch_size"} & config["settings"].keys()
    assert config["data"]["address"] == [str(photos.absolute())]
    with (clustered / "unreadable.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert row["name"] == sorted(photos.iterdir())[7].name
    assert row["reason"]
    first, last = clustered / "assignments" / "epoch-0001.parquet", clustered / "clusters.parquet"
    assert first.read_bytes() == last.read_bytes()
    text = info(str(clustered))
    assert "clustered, not trained: 4 clusters of 8 whitened components" in text
    assert "epochs" not in text
    model, before = deepcluster.load(clustered), deepcluster.load(trained)
    assert all(torch.equal(value, before.trunk.state_dict()[name]) for name, value in model.trunk.state_dict().items())


def test_other_commands_take_the_run(photos: Path, clustered: Path, tmp_path: Path) -> None:
    page = deepcluster.report(clustered, out=tmp_path / "page.html", reporter=Reporter(quiet=True), **QUIET).read_text()
    assert "nothing was trained" in page
    classes = tmp_path / "classes"
    for number, path in enumerate(sorted(photos.iterdir())):
        (classes / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, classes / f"class {number % 2}")
    assert deepcluster.evaluate("clusters", clustered, data=classes, k=[2], reporter=Reporter(quiet=True), **QUIET).results
    deepcluster.export(clustered, format="safetensors", out=tmp_path / "trunk.safetensors", reporter=Reporter(quiet=True))
    started = train_small(photos, tmp_path / "run", init=str(clustered), epochs=1)
    assert (started / "clusters.parquet").is_file()
    with pytest.raises(InputError, match="was clustered, not trained"):
        train_small(photos, clustered, resume=True)
    again = deepcluster.cluster(clustered, clusters=2, out=tmp_path / "again", **QUIET)
    assert set(table_of(again)["cluster"]) == {-1, 0, 1}


def test_a_finished_training_has_its_clusters(trained: Path) -> None:
    last = max((trained / "assignments").iterdir())
    assert pq.read_table(trained / "clusters.parquet").equals(pq.read_table(last))


@pytest.mark.parametrize(
    ("clustering", "options"), [("balanced", {}), ("hierarchical", {"super_clusters": 2}), ("pic", {"clusters": None})]
)
def test_every_clusterer(digits: Path, tmp_path: Path, clustering: str, options: dict[str, Any]) -> None:
    table = open_table(digits)
    few = write_embeddings(tmp_path / "few.parquet", table.take(torch.arange(300)).numpy())
    run = deepcluster.cluster(few, out=tmp_path / "run", **{"clusters": 6, "clustering": clustering, **options})
    labels_N = np.array(table_of(run)["cluster"])
    assert labels_N.min() == 0
    if clustering == "balanced":
        assert np.ptp(np.bincount(labels_N)) <= 12
    assert (deepcluster.assign(run, few).cluster_N == labels_N).mean() > 0.7


def test_tables_of_all_kinds_give_the_same_clusters(digits: Path, of_table: Path, tmp_path: Path) -> None:
    rows_ND = load_digits().data.astype(np.float32)
    np.save(tmp_path / "digits.npy", rows_ND)
    (tmp_path / "digits.names.txt").write_text("".join(f"{row:05d}.jpg\n" for row in range(len(rows_ND))))
    (tmp_path / "parts").mkdir()
    for part, (first, last) in enumerate(((0, 1), (1, 700), (700, 1797))):
        names = [f"{row:05d}.jpg" for row in range(first, last)]
        write_embeddings(tmp_path / "parts" / f"part-{part:05d}.parquet", rows_ND[first:last], names)
    pq.write_table(pa.table({"name": table_of(of_table)["name"], "vector": rows_ND.tolist()}), tmp_path / "lists.parquet")
    for number, source in enumerate(("digits.npy", "parts", "lists.parquet")):
        run = deepcluster.cluster(tmp_path / source, clusters=10, out=tmp_path / f"run {number}", seed=3)
        assert table_of(run) == table_of(of_table), source


@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 40), st.integers(1, 9), st.sets(st.integers(0, 39)))
def test_a_part_of_a_table_in_blocks(
    tmp_path_factory: Any, n_rows: int, start: int, stop: int, at_once: int, empty: Any
) -> None:
    rows_ND = np.arange(n_rows * 2, dtype=np.float32).reshape(-1, 2)
    kept = [None if row in empty and row else rows_ND[row].tolist() for row in range(n_rows)]
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    pq.write_table(pa.table({"embedding": pa.array(kept, pa.list_(pa.float32()))}), path, row_group_size=7)
    part = slice(min(start, n_rows), max(min(start, n_rows), min(stop, n_rows)))
    blocks = list(open_table(path).read(part, at_once))
    assert [len(block) for block in blocks[:-1]] == [at_once] * (len(blocks) - 1)
    expected = [row if row is not None else [math.nan] * 2 for row in kept[part]]
    np.testing.assert_array_equal(
        torch.cat(blocks).numpy() if blocks else np.zeros((0, 2)), np.array(expected).reshape(-1, 2)
    )


def test_a_run_of_a_table(digits: Path, of_table: Path, photos: Path, tmp_path: Path) -> None:
    found = deepcluster.assign(of_table, digits, out=tmp_path / "t.parquet")
    assert found.cluster_N.tolist() == table_of(of_table)["cluster"]
    assigned = pq.read_table(tmp_path / "t.parquet")
    assert assigned["name"].to_pylist() == table_of(of_table)["name"]
    np.testing.assert_allclose(assigned["distance"].to_numpy(), table_of(of_table)["distance"], rtol=1e-4)
    assert "the run has no network" in info(str(of_table))
    assert deepcluster.report(of_table, reporter=Reporter(quiet=True), map_images=200).is_file()
    for call in (
        lambda: deepcluster.embed(of_table, photos),
        lambda: deepcluster.evaluate("knn", of_table, data=photos),
        lambda: deepcluster.assign(of_table, photos),
        lambda: deepcluster.export(of_table, format="safetensors", out=tmp_path / "trunk.safetensors"),
        lambda: train_small(photos, tmp_path / "run", init=str(of_table), epochs=1),
    ):
        with pytest.raises(InputError, match="no network"):
            call()
    with pytest.raises(InputError, match="was clustered, not trained"):
        train_small(photos, of_table, resume=True)
    again = deepcluster.cluster(of_table, clusters=3, out=tmp_path / "again")
    assert set(table_of(again)["cluster"]) == {0, 1, 2}


def test_the_clusters_of_a_table_are_scored_by_the_names_of_labelled_images(tmp_path: Path) -> None:
    write_classes(tmp_path / "classes", 5)
    embedded = deepcluster.embed("untrained:alexnet-small", tmp_path / "classes", out=tmp_path / "e.parquet", **QUIET)
    run = deepcluster.cluster(tmp_path / "e.parquet", clusters=3, out=tmp_path / "run")
    labels = [name.split("/")[0] for name in embedded.names]
    found = deepcluster.evaluate("clusters", run, data=tmp_path / "classes").results.results
    expected = normalized_mutual_info_score(labels, table_of(run)["cluster"], average_method="geometric")
    assert found["nmi"] == pytest.approx(expected)
    assert json.loads((run / "evaluation" / "clusters.json").read_text())["results"]["nmi"] == pytest.approx(expected)
    with pytest.raises(InputError, match="leave out all options"):
        deepcluster.evaluate("clusters", run, data=tmp_path / "classes", k=[4])
    pq.write_table(pa.table({"name": ["a", "b"], "embedding": [[0.0, 1.0], [1.0, 0.0]]}), tmp_path / "other.parquet")
    stranger = deepcluster.cluster(tmp_path / "other.parquet", clusters=2, out=tmp_path / "stranger")
    with pytest.raises(InputError, match="names lead to images of"):
        deepcluster.evaluate("clusters", stranger, data=tmp_path / "classes")


def test_without_whitening_rows_are_scaled_to_unit_length(digits: Path, tmp_path: Path) -> None:
    run = deepcluster.cluster(digits, clusters=10, out=tmp_path / "run", whiten=False)
    points_ND = torch.nn.functional.normalize(open_table(digits).take(torch.arange(1797)))
    expected = KMeans(10, init=careful_start(points_ND, 10, 31)).cluster(points_ND)
    assert adjusted_rand_score(expected.labels_N, table_of(run)["cluster"]) == 1
    assert deepcluster.assign(run, digits).cluster_N.tolist() == table_of(run)["cluster"]


# Numbers of clusters


def test_several_numbers_are_compared(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", str(digits), "--clusters", "5,10,20", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [row["clusters"] for row in rows] == [5, 10, 20]
    [used] = [row["clusters"] for row in rows if row["used"]]
    assert f"{used} clusters are the most stable" in printed
    assert len(set(table_of(tmp_path / "run")["cluster"])) == used
    with (tmp_path / "run" / "comparison.csv").open(newline="") as file:
        assert [float(row["stability"]) for row in csv.DictReader(file)] == [row["stability"] for row in rows]
    assert rows[0]["inertia"] > rows[1]["inertia"] > rows[2]["inertia"]


def fit(points_SP: torch.Tensor, clusters: int, seed: int) -> Any:
    return KMeans(clusters, init="k-means++").cluster(points_SP, seed=seed)


def test_measures_are_those_of_scikit_learn() -> None:
    points_SP = torch.nn.functional.normalize(torch.from_numpy(load_digits().data[:600]).float())
    found = choice.measure(points_SP, 7, fit, seed=1)
    one, other = (fit(points_SP, 7, choice.seed_of(1, number)) for number in (0, 1))
    assert math.isclose(found.silhouette, silhouette_score(points_SP.numpy(), one.labels_N), rel_tol=1e-5)
    expected = normalized_mutual_info_score(one.labels_N, other.labels_N, average_method="geometric")
    assert math.isclose(found.nmi, expected, rel_tol=1e-9)
    assert math.isclose(found.inertia, one.inertia / 600)
    assert math.isclose(found.largest, np.bincount(one.labels_N).max() / 600, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("count", "centres", "width"),
    [(400, 10, 32), *(pytest.param(1500, *one, marks=pytest.mark.slow) for one in ((4, 8), (10, 32), (25, 32)))],
)
def test_auto_finds_the_number_of_blobs(count: int, centres: int, width: int, tmp_path: Path) -> None:
    rows_ND, labels_N = make_blobs(count, width, centers=centres, cluster_std=1.5, center_box=(-5, 5), random_state=centres)
    run = deepcluster.cluster(write_embeddings(tmp_path / "t.parquet", rows_ND), clusters="auto", out=tmp_path / "run")
    found = table_of(run)["cluster"]
    assert len(set(found)) == centres
    assert adjusted_rand_score(labels_N, found) > 0.95


@pytest.mark.slow
def test_auto_finds_about_the_number_of_digits(digits: Path, tmp_path: Path) -> None:
    run = deepcluster.cluster(digits, clusters="auto", out=tmp_path / "run")
    assert 8 <= len(set(table_of(run)["cluster"])) <= 15


def test_no_number_of_clusters_of_noise_is_stable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_ND = np.random.default_rng(0).normal(size=(200, 16))
    table = write_embeddings(tmp_path / "t.parquet", rows_ND)
    assert cli.main(["cluster", str(table), "--clusters", "auto", "--out", str(tmp_path / "run")]) == 0
    assert "none is stable" in capsys.readouterr().out


# Wrong input, stops, several processes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "number of clusters is missing"),
        (["--clusters", "1"], "--clusters 1 is too small"),
        (["--clusters", "ten"], "should be a number, several"),
        (["--clusters", "2000"], "more than the 1,797 images"),
        (["--clusters", "10", "--pca", "65"], "--pca 65 is too wide"),
        (["--clusters", "10", "--no-whiten", "--pca", "8"], "goes with whitening"),
        (["--clusters", "10", "--stage", "conv1"], "a table of embeddings: leave it out"),
        (["--clusters", "10", "--precision", "bf16"], "--precision bf16 is of a network"),
        (["--clusters", "10", "--limit", "0"], "--limit 0 leaves no rows"),
        (["--clusters", "10", "--limit", "1"], "there is one image: nothing to cluster"),
        (["--clusters", "2", "--limit", "1"], "there is one image: nothing to cluster"),
        (["--clusters", "2,3", "--limit", "3"], "--clusters 3 can't be compared: halves of the 3 images are clustered"),
        (["--clusters", "2,10", "--limit", "15"], "have fewer; compare numbers up to 7"),
        (["--clusters", "10", "--clustering", "hierarchical"], "needs the number of super-clusters"),
        (["--clusters", "5,10", "--clustering", "pic"], "finds the number of clusters itself"),
    ],
)
def test_wrong_options(digits: Path, tmp_path: Path, capsys: Any, words: list[str], message: str) -> None:
    assert cli.main(["cluster", str(digits), "--out", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_wrong_models_and_folders(trained: Path, images: Path, of_table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the images"):
        deepcluster.cluster("untrained:alexnet-small", clusters=3, out=tmp_path / "run")
    with pytest.raises(InputError, match="name the model first, then the images"):
        deepcluster.cluster(images, clusters=3, out=tmp_path / "run")
    with pytest.raises(InputError, match="holds a run already"):
        deepcluster.cluster(trained, images, clusters=3, out=of_table)
    with pytest.raises(InputError, match="no stage 'conv9'"):
        deepcluster.cluster(trained, images, clusters=3, out=tmp_path / "run", stage="conv9")
    pq.write_table(pa.table({"name": ["a"], "cluster": [1]}), tmp_path / "none.parquet")
    with pytest.raises(InputError, match="no column holds lists of numbers"):
        deepcluster.cluster(tmp_path / "none.parquet", clusters=3, out=tmp_path / "run")
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match="can't be read as Parquet"):
        deepcluster.cluster(tmp_path / "bad.parquet", clusters=3, out=tmp_path / "run")
    np.save(tmp_path / "bad.npy", np.zeros(3))
    with pytest.raises(InputError, match="an array of 3"):
        deepcluster.cluster(tmp_path / "bad.npy", clusters=3, out=tmp_path / "run")
    write_embeddings(tmp_path / "nan.parquet", np.full((4, 3), np.nan))
    with pytest.raises(InputError, match="nothing to cluster"):
        deepcluster.cluster(tmp_path / "nan.parquet", clusters=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_out_is_no_input(trained: Path, images: Path, tmp_path: Path) -> None:
    """--overwrite deletes neither the model, however it is given, nor tables and images."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    table = write_embeddings(run / "assignments" / "t.parquet", np.eye(6))
    of_table = deepcluster.cluster(table, clusters=2, out=tmp_path / "of_table")
    shutil.copytree(images, run / "evaluation" / "photos")
    (tmp_path / "link").symlink_to(run)
    before = files_of(tmp_path)
    replaced: dict[str, Any] = {"clusters": 3, "out": run, "overwrite": True}
    for model, data in (
        (run, images),
        (tmp_path / "link", images),
        (run / "checkpoints" / "last.pt", images),
        (f"alexnet-small@{run / 'checkpoints' / 'last.pt'}", images),
        (deepcluster.load(run), images),
        (table, None),
        (of_table, None),
        (trained, run / "evaluation" / "photos"),
    ):
        with pytest.raises(InputError, match="is or holds an input"):
            deepcluster.cluster(model, data, **replaced)
    for data, init in ((images, run), (images, run / "checkpoints" / "last.pt"), (run / "evaluation" / "photos", None)):
        with pytest.raises(InputError, match="is or holds an input"):
            train_small(data, run, overwrite=True, init=None if init is None else str(init))
    assert files_of(tmp_path) == before


def test_limit_is_of_the_rows_of_a_table(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    embedded = deepcluster.embed("untrained:alexnet-small", images, out=table, **QUIET)
    run = deepcluster.cluster(table, images, clusters=3, limit=20, out=tmp_path / "run")
    rows = np.arange(20) * 60 // 20
    assert table_of(run)["name"] == [embedded.names[row] for row in rows]
    assert repr(run).startswith(f"Run({str(run)!r}: 20 embeddings of")
    assert run.images() is not None and len(run.images()) == 60
    few = write_embeddings(tmp_path / "few.parquet", embedded.embedding_ND[rows], table_of(run)["name"])
    assert table_of(deepcluster.cluster(few, clusters=3, out=tmp_path / "few")) == table_of(run)
    again = deepcluster.cluster(run, clusters=3, out=tmp_path / "again")
    assert table_of(again) == table_of(run)
    assert deepcluster.assign(run, table, limit=20).cluster_N.tolist() == table_of(run)["cluster"]
    assert len(deepcluster.duplicates(run, limit=7, threshold=2).names) == 7
    said = Lines()
    deepcluster.cluster(table, clusters=2, out=tmp_path / "noted", workers=1, reporter=said)
    assert "--batch-size and --workers do nothing" in said.text


class Lines(Reporter):
    """Keeps the warnings."""

    text = ""

    def warn(self, text: str) -> None:
        self.text += f"{text}\n"


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 60), st.integers(0, 60), st.integers(1, 9))
def test_some_rows_of_a_table(tmp_path_factory: Any, n_rows: int, limit: int, start: int, stop: int, at_once: int) -> None:
    rows_ND = np.arange(n_rows * 2, dtype=np.float32).reshape(-1, 2)
    path = tmp_path_factory.mktemp("table") / "t.npy"
    np.save(path, rows_ND)
    some = open_table(path, limit)
    chosen = np.arange(n_rows) if limit >= n_rows else np.arange(limit) * n_rows // limit
    assert some.names() == [f"row {row}" for row in chosen]
    part = slice(min(start, len(chosen)), max(min(start, len(chosen)), min(stop, len(chosen))))
    blocks = list(some.read(part, at_once))
    assert [len(block) for block in blocks[:-1]] == [at_once] * (len(blocks) - 1)
    np.testing.assert_array_equal(torch.cat([torch.zeros(0, 2), *blocks]), rows_ND[chosen[part]])


def test_a_run_notices_that_its_table_is_another_one(tmp_path: Path) -> None:
    rows_ND = np.random.default_rng(1).normal(size=(40, 6))
    table = write_embeddings(tmp_path / "t.parquet", rows_ND)
    run = deepcluster.cluster(table, clusters=3, out=tmp_path / "run")
    for changed, words in ((rows_ND + 0.5, "holds other 40 rows"), (rows_ND[:30], "30 rows"), (rows_ND[:, :5], "of 5")):
        write_embeddings(table, changed)
        for call in (
            lambda: deepcluster.cluster(run, clusters=3, out=tmp_path / "again"),
            lambda: deepcluster.duplicates(run),
            lambda: deepcluster.similar(run, query="00001.jpg"),
            lambda: deepcluster.sample(run, count=2),
        ):
            with pytest.raises(InputError, match=f"has changed since .* it held 40 rows of 6 numbers, .*{words}"):
                call()
        said = Lines()
        assert deepcluster.report(run, reporter=said).is_file()
        assert "has changed since" in said.text
    write_embeddings(table, rows_ND)
    assert len(deepcluster.similar(run, query="00001.jpg")) == 20


def test_files_of_a_folder_are_one_table(tmp_path: Path) -> None:
    rows_ND = np.eye(4)
    write_embeddings(tmp_path / "a.parquet", rows_ND)
    for columns, missing in (
        ({"name": ["a"], "cluster": [1]}, "embedding"),
        ({"name": ["a"], "embedding": ["text"]}, "embedding"),
        ({"embedding": [[1.0, 2.0, 3.0, 4.0]]}, "name"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "b.parquet")
        with pytest.raises(InputError, match=f"b.parquet has no column {missing} as .*a.parquet has it"):
            deepcluster.cluster(tmp_path, clusters=2, out=tmp_path / "run")
    pq.write_table(pa.table({"embedding": rows_ND.tolist(), "name": list("abcd")}), tmp_path / "b.parquet")
    assert len(open_table(tmp_path)) == 8  # Lists and lists of a fixed size, float64 and float32, in any order.
    assert torch.equal(open_table(tmp_path).take(torch.arange(8)), torch.eye(4).repeat(2, 1))


def test_a_stopped_command_continues(trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"clusters": 3, "batch_size": 4, **QUIET}
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    whole = deepcluster.cluster(trained, images, out=tmp_path / "whole", **options)
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "other"))
    for what in ("features", "whitening", "clustering"):
        with pytest.raises(Interrupted, match="the same command continues"):
            deepcluster.cluster(
                trained, images, out=tmp_path / "run", reporter=At(what, 2 if what == "features" else 1), **options
            )
        assert not (tmp_path / "run" / "config.json").exists()
    run = deepcluster.cluster(trained, images, out=tmp_path / "run", **options)
    assert table_of(run) == table_of(whole)


def cluster_in_ranks(model: Path, photos: Path, digits: Path, folder: Path) -> None:
    deepcluster.cluster(model, photos, clusters=4, out=folder / "images", pca=8, **QUIET)
    deepcluster.cluster(digits, clusters=[5, 10], out=folder / "table", seed=3)


def test_two_processes_make_what_one_makes(
    trained: Path, photos: Path, digits: Path, clustered: Path, tmp_path: Path
) -> None:
    in_ranks(2, tmp_path / "ranks", cluster_in_ranks, trained, photos, digits, tmp_path)
    one = deepcluster.cluster(digits, clusters=[5, 10], out=tmp_path / "one", seed=3)
    for run, twin in ((tmp_path / "images", clustered), (tmp_path / "table", one)):
        assert table_of(run)["name"] == table_of(twin)["name"]
        assert table_of(run)["cluster"] == table_of(twin)["cluster"]
        np.testing.assert_allclose(table_of(run)["distance"], table_of(twin)["distance"], rtol=1e-4)
    compared = [json.loads((run / "comparison.json").read_text()) for run in (tmp_path / "table", one)]
    for row, twin in zip(*compared, strict=True):
        assert row == pytest.approx(twin, rel=1e-4)


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "cluster.py"
    words = ["--points", "600", "--dim", "16", "--clusters", "5", "--repeats", "1", "--threads", "1"]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deepcluster" in done.stdout


def test_the_number_of_images_is_that_of_the_source(photos: Path, clustered: Path) -> None:
    assert len(table_of(clustered)["name"]) == len(open_source(photos))
