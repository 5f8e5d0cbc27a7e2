"""Several processes do what one does: whole runs, stops and resumes, deaths, wrong input; what a person sees of them."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_helper import V2, Job, complaints, run_job, run_jobs, torchrun
from small_runs import MEASURED, checkpoint, flags, metrics, tables, train_small
from spoiled_images import write_good_images

from deepcluster.core import device as devices
from deepcluster.core.distributed import Ranks, part_of
from deepcluster.core.errors import InputError
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Loader
from deepcluster.data.multi_crop import MultiCropView
from deepcluster.data.sources import open_source
from deepcluster.run.folder import RunFolder
from deepcluster.training.batches import even_batches, part_of_batch

# In fp64 what several processes do differs from one by the order of sums alone.
EXACT: dict[str, Any] = {"precision": "fp64", "workers": 0}
N = 60
METHODS: dict[str, dict[str, Any]] = {
    "kmeans": {},
    "hierarchical": {"clustering": "hierarchical", "super_clusters": 2, "rotations": True, "clusters": 8, "head_norm": True},
    "pic": {"clustering": "pic"},
    "balanced": {"clustering": "balanced", "clusters": 4},
    "features": {"cluster_stage": "features", "pca": 8, "reassign_every": 2, "head_norm": True, "head_lr": 1.0},
    "v2": {**V2, "epochs": 3},
    "v2 that looks": {**V2, "epochs": 2, "look_again": True, "whiten": True, "pca": 6},
}


def options(method: str, **more: Any) -> dict[str, Any]:
    return {**EXACT, **METHODS[method], **more}


def assert_alike(one: Path, other: Path, *, tolerance: float = 1e-9, epochs: int | None = None) -> None:
    """Equal labels of all images at every epoch; losses and the other numbers to a relative error."""
    assert tables(one).keys() == tables(other).keys()
    for name, table in tables(one).items():
        twin = tables(other)[name]
        assert (table["name"], table["cluster"]) == (twin["name"], twin["cluster"]), name
        distances = (np.array(each["distance"], dtype=np.float64) for each in (table, twin))
        # A distance is kept in float32: near zero it has the rounding of the terms that it is the difference of.
        np.testing.assert_allclose(*distances, rtol=1e-4, atol=1e-3, err_msg=name)
    lines = [[{k: v for k, v in line.items() if k not in MEASURED} for line in metrics(run)] for run in (one, other)]
    assert len(lines[0]) == len(lines[1])
    for line, twin in zip(*lines, strict=True):
        known = {key: value for key, value in twin.items() if value is not None}
        assert line.keys() == twin.keys()
        # Points are float32, and inertia is a sum of theirs.
        assert line.pop("inertia") == pytest.approx(known.pop("inertia"), rel=1e-6)
        assert {key: value for key, value in line.items() if value is not None} == pytest.approx(known, rel=tolerance)
    states = [checkpoint(run) for run in (one, other)]
    for name, weight in states[0]["trunk"].items():
        torch.testing.assert_close(weight, states[1]["trunk"][name], rtol=1e3 * tolerance, atol=1e3 * tolerance)


def rows_of(run: Path, world: int = 1) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Rows of the checkpoint of a run that each of `world` ranks would take up."""
    return [RunFolder(run).read_rows(checkpoint(run), part_of(N, rank, world)) for rank in range(world)]


# Ranks by spawn: many runs in one start


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a method in one process, never stopped."""
    folder = tmp_path_factory.mktemp("whole")

    def run(method: str) -> Path:
        if not (folder / method).is_dir():
            train_small(images, folder / method, **options(method))
        return folder / method

    return run


def spoiled_job(folder: Path) -> Job:
    """After the first epoch four images can't be read any more; the second finds out as it learns."""
    names = write_good_images(folder / "photos", N, size=(36, 32))
    paths = [folder / "photos" / names[number] for number in (2, 3, 40, 59)]
    more = {"cache": "none", "reassign_every": 2, "epochs": 3}
    return {
        "data": folder / "photos",
        "out": folder / "run",
        "options": options("v2", **more),
        "spoil": ("say epoch 1/", 1, paths),
    }


def check_ranks(
    world: int, images: Path, whole: Callable[[str], Path], folder: Path, methods: list[str], *, stopped: list[str]
) -> None:
    """Runs on `world` ranks, whole, and stopped and taken up by others, are those of one process."""
    jobs: list[Job] = [{"data": images, "out": folder / method, "options": options(method)} for method in methods]
    for method in stopped:
        job = {"data": images, "options": options(method), "stop": ("epoch 2", 3)}
        run_job({**job, "out": folder / f"{method} of one"})
        jobs.append({**job, "out": folder / f"{method} of many"})
    run_jobs(world, folder / "first start", jobs)
    for method in methods:
        assert_alike(folder / method, whole(method))
        assert not list((folder / method).rglob("*.part"))
        files = sorted(path.name for path in (folder / method / "checkpoints").glob("rows-*"))
        assert files == sorted(checkpoint(folder / method)["rows"].get("files", []))
    for method in stopped:
        one, many = folder / f"{method} of one", folder / f"{method} of many"
        assert (
            (checkpoint(one)["epoch"], checkpoint(one)["batch"])
            == (2, 2)
            == (
                checkpoint(many)["epoch"],
                checkpoint(many)["batch"],
            )
        )
        check_rows(one, many)
        shutil.copytree(many, folder / f"{method} of many again")
    again = [{"data": images, "options": options(method), "resume": True} for method in stopped]
    taken_up = [
        {**job, "out": folder / f"{method} {end}"}
        for method, job in zip(stopped, again, strict=True)
        for end in ("of one", "of many again")
    ]
    run_jobs(world, folder / "second start", taken_up)
    for method, job in zip(stopped, again, strict=True):
        run_job({**job, "out": folder / f"{method} of many"})
        for end in ("of one", "of many", "of many again"):
            assert_alike(folder / f"{method} {end}", whole(method))


def check_unreadable(world: int, folder: Path) -> None:
    """Images that one rank finds unreadable in the middle of a run are left out as they are in one process."""
    run_jobs(world, folder / "third start", [spoiled_job(folder / "spoiled")])
    run_job(spoiled_job(folder / "spoiled in one"))
    for part in ("spoiled/run", "spoiled in one/run"):
        assert len((folder / part / "unreadable.csv").read_text().splitlines()) == 5
    assert_alike(folder / "spoiled/run", folder / "spoiled in one/run")


def check_rows(one: Path, many: Path) -> None:
    """By index the rows that two runs have seen are the same, and each rank takes up those of its images."""
    (expected,), parts = rows_of(one), rows_of(many, 3)
    for rank, part in enumerate(parts):
        mine = part_of(N, rank, 3)
        for rows in part.values():
            assert all(mine.start <= index < mine.stop for index in rows["indices"].tolist())
    for name, rows in expected.items():
        found = {key: torch.cat([part[name][key] for part in parts if len(part[name][key])]) for key in rows}
        assert len(found["indices"]) > 0
        for key, values in (last(found) if "positions" in found else found).items():
            torch.testing.assert_close(values, rows[key], rtol=2e-3, atol=2e-3)


def last(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of an image that two ranks have learned in an epoch, as images drawn twice may be, the row that came last."""
    positions, kept = rows["positions"].tolist(), {}
    for row in sorted(range(len(positions)), key=positions.__getitem__):
        kept[int(rows["indices"][row])] = row
    order = torch.tensor([kept[index] for index in sorted(kept)])
    return {key: values[order] for key, values in rows.items()}


def test_two_ranks_do_what_one_process_does(images: Path, whole: Callable[[str], Path], tmp_path: Path) -> None:
    check_ranks(2, images, whole, tmp_path, ["kmeans", "v2"], stopped=["v2"])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_do_what_one_process_does_by_every_method(
    world: int, images: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    check_ranks(world, images, whole, tmp_path, list(METHODS), stopped=["kmeans", "v2"])
    check_unreadable(world, tmp_path)


# The same images in the same order


def ranks_of(rank: int, world: int) -> Ranks:
    """One of several ranks, which exchanges nothing."""
    ranks = Ranks()
    ranks.rank, ranks.size = rank, world
    return ranks


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """60 images of 9 px."""
    path = tmp_path_factory.mktemp("arrays") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 255, (N, 9, 9, 3), dtype=np.uint8))
    return Loader(DecodedImages(open_source(path)), workers=0)


@settings(deadline=None, max_examples=30)
@given(
    world=st.integers(1, 5),
    batch_size=st.integers(10, 40),
    count=st.integers(10, 100),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_ranks_learn_the_views_of_one_global_order(
    world: int, batch_size: int, count: int, seed: int, data: st.DataObject, loader: Loader
) -> None:
    """Rank after rank, the parts of a batch are its images with their own random numbers."""
    order_N = torch.from_numpy(np.random.default_rng(seed).integers(0, 60, count))
    epoch = data.draw(st.integers(0, 5))
    view = MultiCropView(((2, 8), (1, 8)), ((0.5, 1), (0.1, 0.5)))
    batches = even_batches(count, batch_size, ranks_of(0, world))
    parts = [[part_of_batch(positions, ranks_of(rank, world)) for positions in batches] for rank in range(world)]
    first = data.draw(st.integers(0, len(batches) - 1))
    whole, *by_rank = (
        list(loader.training_views(view, order_N, some, seed=seed, epoch=epoch, first_batch=first))
        for some in (batches, *parts)
    )
    assert [position for batch in batches for position in range(count)[batch]] == list(range(count))
    assert len(whole) == len(batches) - first
    for batch, *shares in zip(whole, *by_rank, strict=True):
        assert torch.equal(torch.cat([share.indices_B for share in shares]), batch.indices_B)
        np.testing.assert_array_equal(np.concatenate([share.draws_BR for share in shares]), batch.draws_BR)
        for group, n_crops in enumerate((2, 1)):
            crops = [share.crops[group].unflatten(0, (n_crops, -1)) for share in shares]
            assert torch.equal(torch.cat(crops, dim=1).flatten(0, 1), batch.crops[group])
        assert max(len(share.indices_B) for share in shares) - min(len(share.indices_B) for share in shares) <= 1


@pytest.mark.parametrize(
    ("count", "batch_size", "world", "message"),
    [
        (60, 3, 4, "a batch of 3 images is too small for 4 processes: use --batch-size 8 or more"),
        (3, 256, 4, "3 images are too few for 4 processes: use 1 or fewer"),
    ],
)
def test_a_batch_has_an_image_for_each_rank(count: int, batch_size: int, world: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        even_batches(count, batch_size, ranks_of(0, world))


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with two GPUs, where three processes were started."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for number in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        for name in ("auto", "cuda"):
            assert devices.Machine.choose(name, "fp32").device == torch.device("cuda", number)
    assert taken == [0, 0, 1, 1]
    assert devices.Machine.choose("cpu", "fp32").device == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"3 processes are more than the 2 GPUs .* torchrun --nproc-per-node gpu"):
        devices.Machine.choose("auto", "fp32")


# torchrun


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of 30 images."""
    folder = tmp_path_factory.mktemp("classes")
    for number in range(2):
        write_good_images(folder / f"class{number}", 30, seed=number, size=(36, 32))
    return folder


WATCHED: dict[str, Any] = {**options("v2"), "eval_every": 1, "tensorboard": True, "checkpoint_minutes": 0}


def words(data: Path, out: Path, **more: Any) -> list[str]:
    """The command line of a run."""
    plain = {key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in more.items()}
    return ["train", str(data), "--out", str(out), *flags(**plain)]


@pytest.fixture(scope="module")
def watched(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that is evaluated on its way."""
    pytest.importorskip("tensorboard")
    return train_small(classes, tmp_path_factory.mktemp("watched") / "run", **WATCHED)


def assert_whole_run_folder(run: Path, other: Path) -> None:
    """It has the files that the run of one process has, and the rows that last.pt names."""

    def names(folder: Path) -> set[str]:
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return {re.sub(r"events.out.tfevents.*", "events", name) for name in found}

    rows = {f"checkpoints/{name}" for name in checkpoint(run)["rows"].get("files", [])}
    assert names(run) - rows == names(other)


@pytest.mark.parametrize("moment", ["kill", pytest.param("kill the first", marks=pytest.mark.slow)])
def test_the_death_of_one_of_two_processes_changes_nothing(
    moment: str, classes: Path, watched: Path, tmp_path: Path
) -> None:
    """kill -9 in the second epoch: torchrun starts both again, and nobody says --resume."""
    result = torchrun(2, *words(classes, tmp_path / "run", **WATCHED), restarts=3, moment=moment)
    assert result.returncode == 0, result.stderr
    assert_alike(tmp_path / "run", watched)
    assert all(line["knn"] > 0 for line in metrics(tmp_path / "run"))
    assert_whole_run_folder(tmp_path / "run", watched)
    said = result.stdout.splitlines()
    assert len([line for line in said if line.startswith("resuming with epoch 2, batch 1")]) == 1, result.stdout
    for epoch in (1, 2, 3):
        assert len([line for line in said if line.startswith(f"epoch {epoch}/3")]) == 1
    assert "2 processes, each on cpu" in result.stdout
    assert not [line for line in complaints(result.stderr) if "cluster" not in line], result.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_the_state_of_two_processes(classes: Path, watched: Path, tmp_path: Path) -> None:
    result = torchrun(2, *words(classes, tmp_path / "run", **{**WATCHED, "checkpoint_minutes": 60}), moment="ctrl-c")
    assert result.returncode != 0
    assert [line for line in complaints(result.stderr) if "stopped" in line] == [
        "deepcluster: stopped by SIGINT; the state is saved: the same command with --resume continues"
    ]
    assert "gloo" not in result.stderr
    train_small(classes, tmp_path / "run", resume=True, **WATCHED)
    assert_alike(tmp_path / "run", watched)
    assert_whole_run_folder(tmp_path / "run", watched)


@pytest.mark.slow
def test_wrong_input_is_told_once(classes: Path, tmp_path: Path) -> None:
    result = torchrun(2, *words(classes, tmp_path / "run", clusters=1000))
    assert result.returncode != 0
    (complaint,) = complaints(result.stderr)
    assert "--clusters 1000 is more than" in complaint
    assert "deepcluster/" not in result.stderr.replace(str(classes), "")
    assert re.search(r"exitcode\s*: 2", result.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "message"), [("fault", "the shared folder is not here"), ("full disk", "could not be written")]
)
def test_what_befalls_one_process_ends_all(moment: str, message: str, classes: Path, tmp_path: Path) -> None:
    """The one that knows says why; the other one waits for nothing."""
    result = torchrun(2, *words(classes, tmp_path / "run", **WATCHED), moment=moment)
    assert result.returncode != 0
    # torchrun ends the other one by SIGTERM, which it may hear before it notices that it is alone, and says so.
    stop = "deepcluster: stopped by SIGTERM; "
    said = [line for line in complaints(result.stderr) if line.startswith("deepcluster: ") and not line.startswith(stop)]
    assert len(said) == 1 and message in said[0], result.stderr
    assert "gloo" not in result.stderr
    train_small(classes, tmp_path / "run", resume=True, **WATCHED)
    assert len(metrics(tmp_path / "run")) == 3


@pytest.mark.slow
def test_other_commands_run_in_one_process(trained: Path, tmp_path: Path) -> None:
    result = torchrun(2, "visualize", "filters", str(trained), "--out", str(tmp_path / "filters.png"))
    assert complaints(result.stderr) == [
        "deepcluster: visualize runs in one process: leave out torchrun, which is for train, embed, assign, evaluate"
    ]
    assert not list(tmp_path.iterdir())
