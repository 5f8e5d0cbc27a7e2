"""k-means on features against classes: whole evaluations on generated images, and a run's own clusters by epoch."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models_helper import make_model, write_classes
from sklearn.cluster import KMeans as Oracle
from small_runs import train_small

from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError
from deepcluster.evaluation.clusters import evaluate
from deepcluster.evaluation.datasets.labelled import open_labelled, readable_rows
from deepcluster.evaluation.measures.rankings import MEASURES, agreement
from deepcluster.evaluation.options import ClustersOptions

CLASSES = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    write_classes(folder / "train", 12, seed=1)
    write_classes(folder / "val", 5, seed=2)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on the training images, and one image that is none."""
    train = shutil.copytree(data / "train", tmp_path_factory.mktemp("copy") / "train")
    (train / "class0" / "bad.png").write_bytes(b"no image")
    return train_small(train, tmp_path_factory.mktemp("runs") / "of-classes")


def test_colours_are_found_again(data: Path, cache: Path) -> None:
    """Twelve images of each colour: k-means by the number of classes finds the classes, seen or held out."""
    model = make_model(cache)
    found = evaluate(model, data, ClustersOptions(stages="conv1"))
    assert found.results == {measure: {"train": 1.0, "val": 1.0} for measure in MEASURES}
    assert found.headline == ("nmi", "train") and found.best() == 1.0
    assert found.settings["k"] == [CLASSES] and found.settings["stages"] == ["conv1"]
    assert found.data == {"path": str(data), "classes": CLASSES, "train_images": 36, "val_images": 15}
    assert not found.notes


def test_one_part_and_one_k_give_plain_numbers(data: Path, cache: Path) -> None:
    found = evaluate(make_model(cache), data / "val", ClustersOptions(stages="conv1"))
    assert found.results == dict.fromkeys(MEASURES, 1.0)
    assert found.headline == ("nmi",) and found.best() == 1.0
    assert found.data["all_images"] == 15


def test_stages_and_numbers_of_clusters_have_their_cases(data: Path, cache: Path) -> None:
    found = evaluate(make_model(cache), data / "train", ClustersOptions(stages="conv1,conv2", k=(3, 9, 3)))
    cases = ["conv1 k=3", "conv1 k=9", "conv2 k=3", "conv2 k=9"]
    assert all(list(found.results[measure]) == cases for measure in MEASURES)
    # Nine clusters of three classes: pure, and at most a third of the clusters can be right.
    assert found.results["purity"]["conv1 k=9"] == 1 and found.results["accuracy"]["conv1 k=9"] < 1
    assert found.headline == ("nmi", "conv2 k=3")


@pytest.mark.parametrize("pca", [0, 4])
def test_the_measures_are_those_of_scikit_learns_groups(data: Path, cache: Path, pca: int) -> None:
    """Both reach the same optimum on these images, so all measures are the same."""
    model, images = make_model(cache), open_labelled(data / "train")
    rows = readable_rows(model, images.source, images.labels_N, ("conv2",))
    points = rows.at("conv2", model.machine.device)
    points = Whitening(pca).fit_transform(points) if pca else points
    groups = Oracle(CLASSES, n_init=10, random_state=0).fit_predict(points.numpy())
    found = evaluate(model, data / "train", ClustersOptions(stages="conv2", pca=pca))
    assert found.results == pytest.approx(agreement(groups, images.labels_N))


def test_more_clusters_than_images_is_told(data: Path, cache: Path) -> None:
    with pytest.raises(InputError, match=r"k=37 clusters are more than the 36 images of .*; use --k 36 or fewer"):
        evaluate(make_model(cache), data, ClustersOptions(k=(3, 37)))


def test_unreadable_images_are_left_out_and_named(data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    for part in ("train", "val"):
        (folder / part / "class1" / "000.png").write_bytes(b"no image")
    found = evaluate(make_model(tmp_path / "cache"), folder, ClustersOptions(stages="conv1"))
    assert found.results["accuracy"] == {"train": 1.0, "val": 1.0}
    assert found.notes == [f"{part}: 1 image can't be read and is left out: class1/000.png" for part in ("train", "val")]
    with pytest.raises(InputError, match=r"k=36 clusters are more than the 35 images of .* that can be read"):
        evaluate(make_model(tmp_path / "cache"), folder, ClustersOptions(k=(36,)))


def test_images_without_a_class_are_told(tmp_path: Path, images: Path) -> None:
    with pytest.raises(InputError, match="0 of 60 images have a class"):
        evaluate(make_model(tmp_path), images, ClustersOptions())


@pytest.mark.parametrize("where", ["", "train"])
def test_a_runs_own_clusters_by_epoch(data: Path, cache: Path, run: Path, where: str) -> None:
    """The names of the run start in the training folder, whether this one is given or the one above."""
    found = evaluate(replace(make_model(cache), name=str(run)), data / where, ClustersOptions(stages="conv1"))
    tables = [pq.read_table(run / "assignments" / f"epoch-000{epoch}.parquet").to_pydict() for epoch in (1, 2)]
    assert -1 in tables[0]["cluster"]
    for epoch, table in enumerate(tables, start=1):
        labels = [-1 if "bad" in name else int(name[len("class")]) for name in table["name"]]
        expected = agreement(table["cluster"], labels)
        assert {measure: found.results[f"{measure} of the run"][f"epoch {epoch}"] for measure in MEASURES} == expected
    assert not found.notes and found.best() == 1.0


def test_a_run_on_both_parts_is_known_by_the_folders_names(data: Path, cache: Path, tmp_path: Path) -> None:
    run = train_small(data, tmp_path / "run", epochs=1)
    found = evaluate(replace(make_model(cache), name=str(run)), data, ClustersOptions(stages="conv1"))
    assert next(iter(found.results["nmi of the run"])) == "epoch 1"
    assert found.results["purity of the run"]["epoch 1"] > 1 / CLASSES


def test_a_run_on_other_images_is_noted(data: Path, cache: Path, trained: Path) -> None:
    found = evaluate(replace(make_model(cache), name=str(trained)), data, ClustersOptions(stages="conv1"))
    assert set(found.results) == set(MEASURES)
    assert len(found.notes) == 1 and "0% are among these; it was trained on others" in found.notes[0]


def test_damaged_tables_are_left_out_and_named(data: Path, cache: Path, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "assignments" / "epoch-0001.parquet").write_bytes(b"PAR1 cut off")
    pq.write_table(pa.table({"other": [1]}), copy / "assignments" / "epoch-0003.parquet")
    found = evaluate(replace(make_model(cache), name=str(copy)), data, ClustersOptions(stages="conv1"))
    assert list(found.results["nmi of the run"]) == ["epoch 2"]
    assert [note.partition(";")[2] for note in found.notes] == [f" the run's epoch {n} is left out" for n in (1, 3)]


def test_no_tables_is_no_measure(data: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "assignments").mkdir()
    found = evaluate(replace(make_model(cache), name=str(tmp_path)), data, ClustersOptions(stages="conv1"))
    assert set(found.results) == set(MEASURES) and not found.notes
