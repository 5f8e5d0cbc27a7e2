"""What a run says of itself is true: what a resume can do, which commands follow, its stages, where its images are."""

import html
import json
import shlex
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import torch
from small_runs import flags, metrics, train_small

import deepcluster
from deepcluster.cli import main
from deepcluster.core.progress import Reporter
from deepcluster.models.archs import make_trunk


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


@pytest.fixture(scope="module")
def cosine(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(images, tmp_path_factory.mktemp("runs") / "cosine", lr_schedule="cosine")


def said(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == status
    found = capsys.readouterr()
    return (found.err if status else found.out).strip()


def test_a_finished_run_continues_where_it_says_so(
    images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(trained, tmp_path)
    again = ["train", str(images), "--out", str(run), "--resume"]
    assert said(again, 0, capsys).endswith(f"{run} is finished; --resume with more --epochs than 2 continues it")
    said([*again, "--epochs", "3"], 0, capsys)
    assert [line["epoch"] for line in metrics(run)] == [1, 2, 3]


def test_a_finished_schedule_continues_with_another(
    images: Path, cosine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(cosine, tmp_path)
    again = ["train", str(images), "--out", str(run), "--resume"]
    last = said(again, 0, capsys).splitlines()[-1]
    assert last == (
        f"{run} is finished; --resume with more --epochs than 2 continues it, with a second cosine from a third of --lr"
    )
    said([*again, "--epochs", "3"], 0, capsys)
    assert [line["epoch"] for line in metrics(run)] == [1, 2, 3]
    further = ["train", str(images), "--out", str(tmp_path / "further"), "--init", str(run), *flags(epochs=1)]
    assert "initialised" in said(further, 0, capsys)


def test_another_setting_is_refused_without_that_advice(
    images: Path, cosine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(cosine, tmp_path)
    refusal = said(["train", str(images), "--out", str(run), "--resume", "--clusters", "7"], 2, capsys)
    assert "--clusters is 5 in this run, not 7" in refusal and "--init" not in refusal


def test_the_last_line_names_commands_that_work(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "my photos"))
    monkeypatch.chdir(tmp_path)
    lines = said(["train", str(data), "--out", "a run", *flags(epochs=1)], 0, capsys).splitlines()
    assert lines[-1].startswith("see them: deepcluster report 'a run'; as folders of links: deepcluster assign ")
    command = shlex.split(lines[-1].rpartition(": ")[2])
    assert command == ["deepcluster", "assign", "a run", str(data), "--folders", "by-cluster"]
    said(command[1:], 0, capsys)
    assert sum(1 for path in Path("by-cluster").rglob("*") if path.is_symlink()) == 60


@pytest.mark.parametrize("options, named", [({}, "the head is new"), ({"reassign_every": 2}, "every 2 epochs")])
def test_the_lines_of_the_epochs_are_explained(
    images: Path, tmp_path: Path, options: dict[str, int], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(["train", str(images), "--out", str(tmp_path / "run"), *flags(**options)], 0, capsys).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("epoch 1/2"))
    legend, epoch = lines[first - 1], lines[first]
    assert named in legend and "nmi(labels)" not in legend, "there are no labels"
    for word in ("loss", "nmi(prev)", "largest", "features", "cluster", "train", "data-wait"):
        assert word in legend and (word in epoch or word == "nmi(prev)")


def test_info_lists_the_stages_of_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["info", str(trained)], 0, capsys)
    (line,) = (line for line in text.splitlines() if line.startswith("stages"))
    assert line in said(["info", str(trained / "checkpoints" / "last.pt")], 0, capsys)
    trunk = make_trunk("alexnet-small", image_size=16)
    for name in trunk.stages:
        assert f"{name} {tuple(trunk.eval().stage(torch.zeros(1, 3, 16, 16), name).shape[1:])}" in line


def test_top_images_of_a_run_are_searched_where_its_images_are(
    images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {}
    for name, more in (("named", ["--data", str(images)]), ("known", [])):
        out = ["--out", str(tmp_path / name), "--channels", "0-3", "--stage", "conv3"]
        said(["visualize", "top-images", str(trained), *out, *more], 0, capsys)
        made[name] = (tmp_path / name / "conv3" / "top-images.json").read_text()
    assert made["named"] == made["known"]
    bare = ["visualize", "top-images", "untrained:alexnet-small", "--out", str(tmp_path / "x")]
    assert "untrained:alexnet-small is not a run folder" in said(bare, 2, capsys)


def test_errors_that_the_documentation_names_can_be_caught() -> None:
    for name in ("InputError", "TrainingError", "Interrupted"):
        assert issubclass(getattr(deepcluster, name), deepcluster.DeepClusterError)


def test_results_in_a_notebook_are_short(
    images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "photos"))
    for number in range(5):
        (data / f"spoiled-{number}.png").write_bytes(b"")
    clusters = deepcluster.assign(trained, data)
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 4 and "spoiled-0.png can't be read: empty file" in warned[0] and "2 more" in warned[3]
    columns = ".names, .cluster_N, .distance_N, .unreadable, .second_N, .second_distance_N, .confidence_N"
    assert repr(clusters) == f"Clusters(65 images in 5 clusters, 5 unreadable: {columns})"
    features = deepcluster.embed(trained, images)
    assert not capsys.readouterr().err
    width = features.embedding_ND.shape[1]
    assert repr(features) == f"Embeddings(60 images of {width} numbers: .names, .embedding_ND, .unreadable)"


def test_a_resumed_run_keeps_its_start_and_all_commands(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, arguments in enumerate(
        (["a run", "--epochs", "1"], ["a run", "--resume"], ["a run", "--resume", "--epochs", "3"])
    ):
        monkeypatch.setattr("sys.argv", ["deepcluster", "train", *arguments])
        train_small(images, tmp_path / "run", resume=number > 0, epochs=number + 1)
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        if number == 0:
            started = config["started"]
            assert config["earlier_commands"] == []
            config["started"] = "2026-01-02T03:04:05"
            (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert datetime.fromisoformat(started).year >= 2026
    assert config["started"] == "2026-01-02T03:04:05"
    assert config["earlier_commands"] == ["deepcluster train 'a run' --epochs 1", "deepcluster train 'a run' --resume"]
    assert config["command"] == "deepcluster train 'a run' --resume --epochs 3"
    pytest.importorskip("jinja2")
    page = deepcluster.report(tmp_path / "run", reporter=Reporter(quiet=True)).read_text(encoding="utf-8")
    assert "Started 2026-01-02 03:04;" in page
    for command in (*config["earlier_commands"], config["command"]):
        assert command in html.unescape(page)
    assert f"<title>run: {images.name}</title>" in page
