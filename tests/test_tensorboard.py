"""`train --tensorboard`: what TensorBoard reads from a run, and that the run is the same with and without it."""

import csv
import io
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_helper import write_classes
from PIL import Image
from small_runs import assert_same_run, metrics, train_small

import deepcluster
from deepcluster.clustering.assignment import Assignment
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.progress import Reporter
from deepcluster.data.cache import DecodedImages
from deepcluster.data.sources import open_source
from deepcluster.run.metrics import scalars

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs the extra")

from deepcluster.training import tensorboard as follower  # noqa: E402
from deepcluster.training.loggers import LoggerGroup  # noqa: E402

OPTIONS: dict[str, Any] = {"epochs": 3, "reassign_every": 2}


class StopIn(Reporter):
    """Sends this process SIGTERM at the second sign of progress of a kind of work."""

    def __init__(self, what: str) -> None:
        super().__init__(quiet=True)
        self.what, self.left = what, 2

    @contextmanager
    def track(self, what: str, total: int | None, unit: str = "images") -> Iterator[Any]:
        def meter(done: int) -> None:
            if what.startswith(self.what):
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGTERM)

        yield meter


def events(run: Path) -> Any:
    return accumulator.EventAccumulator(
        str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "histograms": 0}
    ).Reload()


def steps(found: list[Any]) -> list[int]:
    return [event.step for event in found]


def assert_scalars_are_the_metrics(run: Path) -> None:
    """Every number of every line of metrics.jsonl, once, and nothing else."""
    held = events(run)
    wanted: dict[str, list[tuple[int, float]]] = {}
    for line in metrics(run):
        for tag, value in scalars(line):
            wanted.setdefault(tag, []).append((line["epoch"], value))
    assert set(held.Tags()["scalars"]) == set(wanted)
    for tag, values in wanted.items():
        shown = [(event.step, event.value) for event in held.Scalars(tag)]
        assert [step for step, _ in shown] == [step for step, _ in values], tag
        np.testing.assert_allclose([value for _, value in shown], [value for _, value in values], rtol=1e-6)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("photos"), 20)


@pytest.fixture(scope="module")
def followed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(photos, tmp_path_factory.mktemp("runs") / "followed", tensorboard=True, **OPTIONS)


def test_a_run_is_the_same_with_and_without(photos: Path, followed: Path, tmp_path: Path) -> None:
    alone = train_small(photos, tmp_path / "alone", **OPTIONS)
    assert_same_run(alone, followed)
    assert not (alone / "tensorboard").exists()


def test_every_number_is_shown_by_epoch(followed: Path) -> None:
    assert_scalars_are_the_metrics(followed)
    tags = events(followed).Tags()["scalars"]
    assert {"loss", "nmi/previous", "nmi/labels", "clusters/nonempty", "seconds/features", "speed/images_per_second"} <= {
        *tags
    }


def test_new_clusterings_have_sizes_and_a_gallery(followed: Path) -> None:
    held = events(followed)
    # Epoch 2 learns the labels of epoch 1; 4 stands for the finished trunk.
    assert steps(held.Images("clusters/gallery")) == steps(held.Histograms("clusters/sizes")) == [1, 3, 4]
    sizes = held.Histograms("clusters/sizes")[0].histogram_value
    assert (sizes.num, sizes.sum) == (5, 60)
    picture = Image.open(io.BytesIO(held.Images("clusters/gallery")[0].encoded_image_string))
    assert picture.size == (8 * 66, 5 * 66)


def test_the_projector_has_points_names_and_pictures_in_one_order(photos: Path, followed: Path) -> None:
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    folder = followed / "tensorboard"
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (one,) = config.embeddings
    points = np.loadtxt(folder / one.tensor_path, delimiter="\t")
    assert points.shape == (60, 16)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-4)
    with (folder / one.metadata_path).open(newline="") as file:
        names = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    clusters = deepcluster.assign(followed, photos, device="cpu", reporter=Reporter(quiet=True))
    assert [row["name"] for row in names] == clusters.names
    assert [int(row["cluster"]) for row in names] == clusters.cluster_N.tolist()
    assert [row["label"] for row in names] == [name.split("/")[0] for name in clusters.names]
    sprite = np.asarray(Image.open(folder / one.sprite.image_path))
    side = one.sprite.single_image_dim[0]
    assert sprite.shape == (8 * side, 8 * side, 3)
    # The classes are colours: red, green, blue.
    for number in (0, 20, 40, 59):
        top, left = number // 8 * side, number % 8 * side
        assert sprite[top : top + side, left : left + side].mean((0, 1)).argmax() == number // 20


def test_an_interrupted_and_resumed_run_shows_each_epoch_once(photos: Path, followed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train_small(photos, run, tensorboard=True, reporter=StopIn("epoch 2"), **OPTIONS)
    # As if it had been killed between the events of an epoch and its checkpoint.
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_scalar("loss", 99.0, 2)
    train_small(photos, run, resume=True, **OPTIONS)
    assert_same_run(followed, run)
    assert_scalars_are_the_metrics(run)


def test_a_run_resumed_with_tensorboard_shows_its_past(photos: Path, tmp_path: Path) -> None:
    run = train_small(photos, tmp_path / "run", epochs=1)
    train_small(photos, run, resume=True, tensorboard=True, epochs=2)
    assert_scalars_are_the_metrics(run)
    assert steps(events(run).Images("clusters/gallery")) == [2, 3]
    train_small(photos, run, overwrite=True, epochs=1)
    assert not (run / "tensorboard").exists()


def test_an_error_of_writing_is_reported_and_loses_nothing(
    photos: Path, followed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_histogram", full)
    run = train_small(photos, tmp_path / "run", tensorboard=True, **OPTIONS)
    assert_same_run(followed, run)
    said = capsys.readouterr().err
    assert said.count("TensorBoard could not log") == 1 and "No space left" in said


def test_without_the_extra_nothing_begins(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install tensorboard"):
        train_small(photos, tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
    train_small(photos, tmp_path / "run", epochs=1)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(InputError, match="pip install"):
        train_small(photos, tmp_path / "run", resume=True, tensorboard=True, epochs=2)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_names_make_no_columns_and_unreadable_images_are_grey(tmp_path: Path) -> None:
    for name in ("a\tb\n<c>.png", "gone.png"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / name)
    images = DecodedImages(open_source(tmp_path))
    (tmp_path / "gone.png").unlink()
    assignment = Assignment(torch.tensor([0, 0]), torch.tensor([0.1, 0.2]), torch.zeros(1, 4))
    follower.write_projector(tmp_path, torch.arange(2), torch.eye(2, 4), assignment, images)
    assert (tmp_path / "projector" / "names.tsv").read_text() == "name\tcluster\na b <c>.png\t0\ngone.png\t0\n"
    sheet = follower.gallery(images, [[0, 1]])
    assert (sheet[32, 32] == [255, 0, 0]).all() and (sheet[32, 66 + 32] == 128).all()


def test_a_folder_that_cannot_be_written_to_is_reported(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    assignment = Assignment(torch.tensor([0]), torch.tensor([0.1]), torch.zeros(1, 4))
    reporter = Reporter(quiet=True)
    session = follower.Session(reporter, 1, DecodedImages(open_source(photos)), lambda: assignment)
    board = LoggerGroup([follower.TensorBoard(session)], reporter)
    with board.ended():
        board.begin(tmp_path, {"epochs": 1}, [])
        assert str(tmp_path / "tensorboard") in capsys.readouterr().err
        board.epoch({"epoch": 1})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("count", [1, 2, 4_999, 5_000, 70_000])
def test_a_sprite_is_no_larger_than_it_may_be(count: int) -> None:
    side = follower.tile_side(count)
    assert 1 <= side <= 32 and side * math.ceil(math.sqrt(count)) <= 8192


def test_the_projector_of_the_second_version_is_on_the_sphere(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "recipe": "v2-small-set",
        "look_again": False,
        "whiten": False,
        "method": "deepcluster-v2",
        "cluster_stage": "features",
        "projection": (16, 8),
    }
    run = train_small(photos, tmp_path / "run", tensorboard=True, epochs=1, clusters=(5, 4), **options)
    assert_scalars_are_the_metrics(run)
    points_MP = np.loadtxt(run / "tensorboard" / "projector" / "points.tsv", delimiter="\t")
    assert points_MP.shape == (60, 8)
    np.testing.assert_allclose(np.linalg.norm(points_MP, axis=1), 1, rtol=1e-5)
    model = deepcluster.load(run)
    assert model.centroids_KP is not None
    nearest_M = np.linalg.norm(points_MP[:, None] - model.centroids_KP.numpy(), axis=2).argmin(axis=1)
    with (run / "tensorboard" / "projector" / "names.tsv").open(newline="") as file:
        assert [int(row["cluster"]) for row in csv.DictReader(file, delimiter="\t")] == nearest_M.tolist()
