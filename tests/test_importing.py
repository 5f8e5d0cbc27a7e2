"""`deepcluster import`: run folders of released models, and tables of the clusters that the 2018 code kept."""

import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from models_helper import write_classes
from test_foreign import release_names, stirred
from torchvision.datasets import ImageFolder

import deepcluster
from deepcluster.cli import main
from deepcluster.core.errors import InputError
from deepcluster.models.archs import make_trunk


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("released") / "checkpoint.pth.tar"
    trunk = stirred(make_trunk("vgg16", image_size=32, sobel=True, seed=1))
    torch.save({"epoch": 9, "arch": "vgg16", "state_dict": release_names(trunk, 7)}, file)
    return file


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("images"), 5)


def test_every_command_takes_a_released_file(
    released: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same file as MODEL, and imported: the same rows and clusters."""
    run = tmp_path / "run"
    assert main(["import", str(released), "--out", str(run)]) == 0
    assert (
        "checkpoint.pth.tar, imported: 82 of 82 tensors of vgg16, and 2 more that give 7 clusters (the file holds 88)"
        in capsys.readouterr().out
    )
    assert main(["import", str(released), "--out", str(run)]) == 2
    refused = capsys.readouterr().err
    assert "holds a run already: --overwrite deletes it first, --out names another" in refused
    for name, model in (("file", released), ("run", run)):
        quiet = ["--workers", "0", "--quiet"]
        assert main(["embed", str(model), str(images), "--out", str(tmp_path / f"{name}-rows.parquet"), *quiet]) == 0
        assert main(["assign", str(model), str(images), "--out", str(tmp_path / f"{name}.parquet"), *quiet]) == 0
    for name in ("rows.parquet", "parquet"):
        separator = "-" if name.startswith("rows") else "."
        one, other = (pq.read_table(tmp_path / f"{origin}{separator}{name}") for origin in ("file", "run"))
        assert one.equals(other)
    assert pq.read_table(tmp_path / "run.parquet")["cluster"].to_pylist()[0] in range(7)
    capsys.readouterr()
    assert main(["info", str(released)]) == 0
    assert "7 clusters that the last layer predicts\nused 82 of 82 tensors" in capsys.readouterr().out
    assert main(["info", str(run)]) == 0
    about = capsys.readouterr().out
    assert "imported: 82 of 82" in about and "\nvgg16" in about and "epochs" not in about and "paper" not in about
    data = tmp_path / "data"
    for part in ("train", "val"):
        write_classes(data / part, 4)
    assert main(["evaluate", "knn", str(released), "--data", str(data), "--k", "1", "--workers", "0"]) == 0
    assert "82 of 82 tensors of vgg16" in capsys.readouterr().out
    assert main(["evaluate", "clusters", str(run), "--data", str(data), "--workers", "0"]) == 0
    capsys.readouterr()
    assert main(["train", str(images), "--out", str(run), "--resume"]) == 2
    assert "imported" in capsys.readouterr().err
    assert main(["report", str(run)]) == 2
    assert "is an imported model, without images: use deepcluster assign" in capsys.readouterr().err
    assert main(["import", str(released), "--out", str(run)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_the_log_of_2018_becomes_a_table(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for name in ("cat", "cat 2", "cat-big"):
        write_classes(data / name, 2, classes=2)
    oracle = ImageFolder(str(data))
    paths = [Path(path).relative_to(data).as_posix() for path, _ in oracle.imgs]
    first, last = [list(range(len(paths))), []], [[3, 5], [], [0, 1, 2, 4, *range(6, len(paths))]]
    log = tmp_path / "clusters"
    log.write_bytes(pickle.dumps([first, last], -1))
    out = tmp_path / "clusters.parquet"
    assert main(["import", str(log), "--data", str(data), "--out", str(out)]) == 0
    table = pq.read_table(out)
    assert table["name"].to_pylist() == paths
    assert table["cluster"].to_pylist() == [0 if number in (3, 5) else 2 for number in range(len(paths))]
    assert main(["import", str(log), "--data", str(data), "--epoch", "1", "--out", str(out)]) == 0
    assert set(pq.read_table(out)["cluster"].to_pylist()) == {0}
    capsys.readouterr()
    flat = next(path for path in data.rglob("*") if path.is_file()).parent
    write_classes(tmp_path / "few", 1)
    for more, said in (
        (["--data", str(data), "--epoch", "3"], "has 2 epochs"),
        (["--data", str(tmp_path / "few")], "the clusters are of other data"),
        (["--data", str(flat)], "has no class folders with images"),
        ([], "give the folder of class folders they are of with --data"),
    ):
        assert main(["import", str(log), *more, "--out", str(out)]) == 2
        assert said in capsys.readouterr().err


def test_published_clusters_become_a_table(images: Path, tmp_path: Path) -> None:
    paths = [f"/datasets01/train/{path.parent.name}/{path.name}" for path in sorted(images.rglob("*.png"))]
    file = tmp_path / "alexnet_cluster_assignment.pickle"
    file.write_bytes(pickle.dumps([(path, number % 3) for number, path in enumerate(paths)], 2))
    table = pq.read_table(deepcluster.import_file(file, out=tmp_path / "a.parquet"))
    assert (table["name"].to_pylist(), table["cluster"].to_pylist()[:4]) == (paths, [0, 1, 2, 0])
    table = pq.read_table(deepcluster.import_file(file, out=tmp_path / "b.parquet", data=images))
    assert table["name"].to_pylist() == [path.removeprefix("/datasets01/train/") for path in paths]
    assert table["cluster"].to_pylist() == [number % 3 for number in range(len(paths))]


def test_what_can_not_be_imported_is_said(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "odd.pickle"
    for content, said in (({"a": 1}, "holds no clusters"), ([1, 2], "holds no clusters"), ([], "holds no clusters")):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=said):
            deepcluster.import_file(file, out=tmp_path / "a.parquet", data=images)
    with pytest.raises(InputError, match="does not exist"):
        deepcluster.import_file(tmp_path / "none", out=tmp_path / "run")
    with pytest.raises(InputError, match="--data and --epoch are for tables"):
        deepcluster.import_file(file, out=tmp_path / "run", data=images)
    assert not (tmp_path / "run").exists()
