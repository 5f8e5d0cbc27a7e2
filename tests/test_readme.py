"""The README's commands and Python run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from click.testing import CliRunner
from models_helper import write_classes
from spoiled_images import write_good_images
from test_foreign import release_names

from deepcluster.cli import cli
from deepcluster.models.archs import make_trunk

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICK = [
    "--epochs",
    "1",
    "--clusters",
    "5",
    "--batch-size",
    "16",
    "--image-size",
    "32",
    "--arch",
    "alexnet-small",
    "--pca",
    "8",
]


def commands() -> list[list[str]]:
    lines = re.findall(r"^    deepcluster (.+)$", README, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "other-photos"):
        write_good_images(tmp_path / name, 60)
    next((tmp_path / "photos").glob("*.png")).rename(tmp_path / "photos" / "0003.png")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    weights = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "torch" / "hub" / "checkpoints" / weights)
    write_classes(tmp_path / "labelled" / "train", 10)
    write_classes(tmp_path / "labelled" / "val", 4, seed=1)
    return tmp_path


def test_the_commands_run_in_their_order(photos: Path) -> None:
    use = ["assign", "cluster", "embed", "similar", "duplicates", "sample"]
    others = ["train", "compare", "download", "assign", "export"]
    seen = ["report", "visualize", "visualize", *["evaluate"] * 3]
    assert [command[0] for command in commands()] == ["cluster", "report", "train", "report", *use, *others, *seen]
    released = release_names(make_trunk("alexnet", image_size=64, sobel=True), 7)
    torch.save({"epoch": 9, "arch": "alexnet", "state_dict": released}, "checkpoint.pth.tar")
    quick = {"train": QUICK, "filters": ["--channels", "0-3", "--steps", "2"], "top-images": ["--channels", "0-3"]}
    for command in commands():
        has_device = "compare" not in command[:2] and command[0] not in ("download", "export")
        extra = ["--device", "cpu", *quick.get(command[0], []), *quick.get(command[1], [])] if has_device else []
        result = CliRunner().invoke(cli, [*command, *extra])
        assert result.exit_code == 0, result.output
    assert (photos / "clusters.csv").is_file()
    assert (photos / "clustered" / "report.html").is_file()
    assert len((photos / "to-label.txt").read_text().splitlines()) == 10
    assert (photos / "features.parquet").is_file()
    assert set(pq.read_table(photos / "clusters-2018.parquet")["cluster"].to_pylist()) <= set(range(7))
    assert (photos / "model.onnx").is_file()
    assert (photos / "run" / "evaluation" / "linear.json").is_file()
    assert (photos / "run" / "report.html").is_file()
    assert len(list((photos / "run" / "visualization").glob("*/*/*.json"))) == 2
    assert (photos / "baseline" / "linear.json").is_file()
    links = [path for path in (photos / "by-cluster").rglob("*") if path.is_symlink()]
    assert len(links) == 60
    assert all(link.resolve().is_file() for link in links)


def test_the_python_runs(photos: Path) -> None:
    """That of the other pages is run by tests/test_docs.py."""
    (code,) = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)
    quick = code.replace("epochs=20", "epochs=1, clusters=5, batch_size=16, image_size=32, arch='alexnet-small', pca=8")
    assert quick != code
    check = "assert len(clusters.names) == len(features.embedding_ND) == 60 and model.trunk.stages"
    done = subprocess.run([sys.executable, "-c", f"{quick}\n{check}"], cwd=photos, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_links_of_all_pages_lead_somewhere() -> None:
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))):
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{page.name}: {target}#{anchor}"


def test_pages_name_no_file_of_ours_that_is_missing() -> None:
    """A page that names `training/loop.py` or `benchmarks/kmeans.py` names a file that exists."""
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))):
        if page.name in ("CHANGELOG.md", "benchmarks.md"):
            continue  # They also name files that were removed.
        for name in re.findall(r"`((?:\w+/)+\w+\.py)[`:]", page.read_text(encoding="utf-8")):
            assert any((ROOT / base / name).exists() for base in (".", "src/deepcluster", "tests")), f"{page.name}: {name}"


def test_the_two_make_targets_are_the_first_commands() -> None:
    first = re.findall(r"^    (\S.+)$", README, flags=re.MULTILINE)[:2]
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:", makefile, flags=re.MULTILINE)
    assert re.search(r"^test:", makefile, flags=re.MULTILINE)


def test_the_python_of_the_clustering_page_runs() -> None:
    page = (ROOT / "docs/clustering.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.+?)```", page, flags=re.DOTALL):
        exec(code, names)
    assert names["clusters"].sizes_K().sum() == len(names["features"])
    assert (names["kmeans"].predict(names["whitening"].transform(names["features"])) == names["labels"]).all()
