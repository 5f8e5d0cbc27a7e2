"""What a newcomer meets: kept features are used, a stop is heard at once, wrong arguments and outputs are named first."""

import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spoiled_images import write_good_images, write_spoiled_images

import deepcluster
from deepcluster.cli import main
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.files import output_path
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Interruption, Work
from deepcluster.data.sources import open_source
from deepcluster.interop.loading import load
from deepcluster.run.folder import RunFolder
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report.run import read_run

CPU: dict[str, Any] = {"device": "cpu", "workers": 1}


class Lines(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images, and one that can't be read."""
    folder = tmp_path_factory.mktemp("first") / "photos"
    write_good_images(folder, 30, size=(36, 32))
    write_spoiled_images(folder, 1)
    return folder


@pytest.fixture(scope="module")
def run(trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos in clusters, with the features kept."""
    return Path(deepcluster.cluster(trained, photos, clusters=3, out=tmp_path_factory.mktemp("first") / "run", **CPU))


# Kept features


def test_assign_and_embed_take_kept_features_bit_for_bit(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = ["a.parquet", "e.parquet", "parts"]
    results, said = [], []
    for cache in (None, tmp_path / "empty"):
        if cache is not None:
            monkeypatch.setenv("DEEPCLUSTER_CACHE", str(cache))
        out, lines = tmp_path / ("fresh" if cache else "kept"), Lines()
        out.mkdir()
        found = deepcluster.assign(run, photos, out=out / tables[0], reporter=lines, **CPU)
        rows = deepcluster.embed(run, photos, out=out / tables[1], reporter=lines, **CPU)
        deepcluster.assign(run, photos, out=out / tables[2], parts=True, reporter=lines, **CPU)
        in_memory = deepcluster.embed(run, photos, reporter=lines, **CPU)
        np.testing.assert_array_equal(in_memory.embedding_ND, rows.embedding_ND)
        assert found.unreadable == rows.unreadable == in_memory.unreadable and len(found.unreadable) == 1
        results.append((found, rows))
        said.append(sum("are kept: none is read again" in line for line in lines.said))
    assert said == [4, 0]
    (kept, kept_rows), (fresh, fresh_rows) = results
    assert kept_rows.unreadable == fresh_rows.unreadable
    np.testing.assert_array_equal(kept_rows.embedding_ND, fresh_rows.embedding_ND)
    for column in ("cluster_N", "distance_N", "second_N", "second_distance_N", "confidence_N"):
        np.testing.assert_array_equal(getattr(kept, column), getattr(fresh, column))
    for name in tables[:2]:
        assert (tmp_path / "kept" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_report_takes_kept_features(run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def points(**options: Any) -> Any:
        read = read_run(RunFolder(run), ReportOptions(**options), device="cpu", workers=1, work=Work())
        return read.collection.sample_M, read.collection.points_MP

    with monkeypatch.context() as patched:
        patched.setattr("deepcluster.run.model.feature_batches", None)  # No image goes through the network.
        kept_M, kept_MP = points()
        some_M, some_MP = points(map_images=7)
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path))
    fresh_M, fresh_MP = points()
    np.testing.assert_array_equal(kept_M, fresh_M)
    np.testing.assert_allclose(kept_MP, fresh_MP, atol=1e-5)
    np.testing.assert_array_equal(some_MP, kept_MP[np.searchsorted(kept_M, some_M)])
    assert len(some_M) == 7 and len(kept_M) == 30


# A stop


def test_a_stop_is_heard_inside_a_long_step() -> None:
    interruption = Interruption(advice="nothing was written")
    with interruption.listening():
        with pytest.raises(Interrupted, match="stopped by SIGINT; nothing was written"), interruption.at_once():
            signal.raise_signal(signal.SIGINT)
            time.sleep(60)
        with pytest.raises(Interrupted), interruption.at_once():  # A request is not forgotten.
            raise AssertionError
    interruption = Interruption()
    with interruption.listening():
        with interruption.at_once():
            pass
        signal.raise_signal(signal.SIGINT)  # Outside, the loop chooses the moment.
        assert interruption.requested == "SIGINT"


@pytest.mark.parametrize("place", ["network", "map"])
def test_a_report_stops_in_the_middle_of_its_work(
    place: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal arrives within a batch, and within t-SNE, which end by themselves only after a minute."""

    def stop(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)

    if place == "network":
        monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "empty"))
        monkeypatch.setattr("deepcluster.run.features.extract_stage", stop)
        monkeypatch.setattr("deepcluster.run.features.stage_width", lambda *_: 3)
    else:
        monkeypatch.setattr("sklearn.manifold.TSNE.fit_transform", stop)
    with pytest.raises(Interrupted, match="the last page that was made is whole"):
        deepcluster.report(run, out=tmp_path / "r.html", **CPU)
    assert not list(tmp_path.glob("*.html*"))


# Outputs and arguments


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that refuses files of root")
@pytest.mark.parametrize("is_folder", [False, True])
def test_outputs_that_the_system_refuses_are_found_before_the_work(is_folder: bool, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--out /proc/x.*can't be written to"):
        output_path("/proc/x", "--out", is_folder=is_folder)
    output_path(tmp_path / "x", "--out", is_folder=is_folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that refuses files of root")
def test_commands_with_outputs_that_the_system_refuses(
    trained: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = str(next(photos.iterdir()))
    model, data = str(trained), str(photos)
    commands = {
        "--out /proc/x.csv": ["similar", model, data, "--query", query, "--out"],
        "--page /proc/x.html": ["sample", model, data, "--count", "3", "--page"],
        "--list /proc/x.txt": ["duplicates", model, data, "--list"],
        "--out /proc/x.parquet": ["embed", model, data, "--out"],
        "--folders /proc/x": ["assign", model, data, "--folders"],
        "--out /proc/x.html": ["report", model, "--out"],
    }
    for option, words in commands.items():
        assert main([*words, option.split()[1]]) == 2
        assert f"deepcluster: {option}" in capsys.readouterr().err
    assert main(["cluster", model, data, "--clusters", "3", "--out", "/proc/x"]) == 2
    assert "/proc can't be written to; choose another folder with --out" in " ".join(capsys.readouterr().err.split())


def test_wrong_values_in_python_are_one_sentence(trained: Path, run: Path, photos: Path) -> None:
    with pytest.raises(InputError, match="count='ten' should be a whole number"):
        deepcluster.sample(trained, photos, count="ten")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"count=2.5 should be a whole number"):
        deepcluster.similar(trained, photos, query="x", count=2.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="query is or holds a value of type int"):
        deepcluster.similar(trained, photos, query=3)
    with pytest.raises(InputError, match="threshold='low' is no distance"):
        deepcluster.duplicates(trained, photos, threshold="low")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="limit='all' should be a whole number"):
        open_source(photos, "all")  # type: ignore[arg-type]
    for names in ({"1": "dogs"}, {1: 5}):
        with pytest.raises(InputError, match="should be numbers of clusters with texts, such as"):
            deepcluster.name_clusters(run, names)  # type: ignore[arg-type]


def test_a_table_without_embeddings_is_not_clustered(tmp_path: Path) -> None:
    (tmp_path / "clusters.csv").write_text("name,cluster\na.png,1\n")
    with pytest.raises(InputError, match=r"clusters.csv holds no embeddings"):
        deepcluster.cluster(tmp_path / "clusters.csv", clusters=3, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"nothing.csv does not exist"):
        deepcluster.cluster(tmp_path / "nothing.csv", clusters=3, out=tmp_path / "run")


# What is printed


def test_auto_says_why_there_is_nothing_to_compare(trained: Path, photos: Path, tmp_path: Path) -> None:
    lines = Lines()
    deepcluster.cluster(trained, photos, clusters="auto", out=tmp_path / "run", reporter=lines, **CPU)
    assert "--clusters auto: 2 clusters, and no table: 31 images are too few to compare numbers" in "\n".join(lines.said)


def test_a_dry_run_says_that_it_reads_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deepcluster.data.survey.SAMPLE", 31)
    write_good_images(tmp_path / "many", 40, size=(36, 32))
    write_spoiled_images(tmp_path / "many", 3)
    small = ["--dry-run", "--arch", "alexnet-small", "--image-size", "16", "--device", "cpu"]
    assert main(["train", str(tmp_path / "many"), *small, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    words = r"\d of a sample of 31 of the 43 images can't be read \(training leaves such images out\), e.g. spoiled"
    assert re.search(words, " ".join((shown.out + shown.err).split()))


def test_images_of_which_none_can_be_read(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    assert main(["assign", str(run), str(tmp_path / "notes.jpg"), "--device", "cpu"]) == 2
    shown = capsys.readouterr()
    assert "notes.jpg can't be read" in shown.err and not shown.out
    good = next(path for path in sorted(photos.iterdir()) if path.suffix == ".png")
    assert main(["assign", str(run), str(good), "--device", "cpu"]) == 0
    assert "distance  second  distance of second  confidence" in " ".join(capsys.readouterr().out.split("\n")[:1])


def test_the_tensors_of_a_file_add_up(tmp_path: Path) -> None:
    """Used ones, those left out, and the counters of batch normalisation, which are no weights."""
    torchvision = pytest.importorskip("torchvision")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    remark = load(f"torchvision:resnet18@{tmp_path / 'resnet18.pth'}").remark
    assert "100 of 100 tensors" in remark and "left out: fc.weight, fc.bias" in remark
    assert "(the file holds 122, 20 of them counters of batches, which are not weights)" in remark
