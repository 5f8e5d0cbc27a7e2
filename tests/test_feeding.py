"""Whole runs are the same wherever the images lie, whatever prepares them, and wherever they are kept."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from http_server import NaughtyServer
from small_runs import assert_same_run, checkpoint, flags, metrics, tables, train_small
from spoiled_images import write_good_images, write_spoiled_images
from test_processes import LONG, alive, until

from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.progress import Reporter
from deepcluster.core.retry import ConnectionLost
from deepcluster.data import cache as caching
from deepcluster.data import loader

OPTIONS: dict[str, Any] = {"reduce_to": 24, "clusters": 4}


@pytest.fixture(autouse=True)
def processes_for_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "LEAST_IMAGES", {"fork": 1})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of images of several sizes; four of the images are spoiled."""
    root = tmp_path_factory.mktemp("feeding") / "photos"
    write_good_images(root / "a", 30, size=(36, 32))
    write_good_images(root / "b", 22, size=(20, 27))
    write_spoiled_images(root / "b", 4)
    return root


@pytest.fixture(scope="module")
def files(photos: Path) -> list[Path]:
    """In the order in which a folder gives them."""
    return sorted(
        (path for path in photos.rglob("*") if path.is_file()), key=lambda path: path.relative_to(photos).as_posix()
    )


@pytest.fixture(scope="module")
def shards(photos: Path, files: list[Path]) -> Path:
    """The same images in two tar shards, one of them compressed."""
    folder = photos.parent / "shards"
    folder.mkdir()
    for name, mode, some in (("0.tar", "w", files[:17]), ("1.tar.gz", "w:gz", files[17:])):
        with tarfile.open(folder / name, mode) as tar:  # type: ignore[call-overload]
            for path in some:
                tar.add(path, path.relative_to(photos).as_posix())
    return folder


@pytest.fixture(scope="module")
def parquet(photos: Path, files: list[Path]) -> Path:
    """The same images in two Parquet files, in row groups of five."""
    folder = photos.parent / "parquet"
    folder.mkdir()
    for number, some in enumerate((files[:30], files[30:])):
        rows = [{"bytes": path.read_bytes(), "path": path.relative_to(photos).as_posix()} for path in some]
        table = pa.table({"image": rows, "label": [path.parent.name for path in some]})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=5)
    return folder


@pytest.fixture(scope="module")
def server(shards: Path) -> Iterator[NaughtyServer]:
    """The shards at an address."""
    with NaughtyServer({path.name: path.read_bytes() for path in shards.iterdir()}) as server:
        yield server


@pytest.fixture(scope="module")
def plain(photos: Path) -> Path:
    """A run on the folder, all images decoded in each epoch, in the caller's process."""
    return train_small(photos, photos.parent / "plain", cache="none", workers=0, **OPTIONS)


def assert_same_but_for_names(run: Path, other: Path) -> None:
    for one, twin in zip(tables(run).values(), tables(other).values(), strict=True):
        assert (one["cluster"], one["distance"]) == (twin["cluster"], twin["distance"])
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(other)]
    assert checkpoint(run)["epoch"] == 3


def test_the_plain_run_has_what_makes_the_comparison_worth_it(plain: Path) -> None:
    last = tables(plain)["epoch-0002.parquet"]
    assert len(set(last["cluster"]) - {-1}) > 1
    assert last["cluster"].count(-1) == 4
    assert len((plain / "unreadable.csv").read_text().splitlines()) == 5


def test_from_tar_shards(shards: Path, plain: Path, tmp_path: Path) -> None:
    run = train_small(shards, tmp_path / "run", **OPTIONS)
    assert_same_but_for_names(run, plain)
    assert tables(run)["epoch-0001.parquet"]["name"][0].startswith("0.tar::a/")
    assert "nmi_labels" in metrics(run)[0]


def test_from_parquet(parquet: Path, plain: Path, tmp_path: Path) -> None:
    run = train_small(parquet, tmp_path / "run", **OPTIONS)
    assert_same_but_for_names(run, plain)
    assert tables(run)["epoch-0001.parquet"]["name"][0].startswith("0.parquet::a/")


def test_from_an_address_of_the_shards(server: NaughtyServer, plain: Path, tmp_path: Path) -> None:
    server.fail_every = 5
    try:
        addresses = [server.at("0.tar"), server.at("1.tar.gz")]
        run = train_small(addresses, tmp_path / "run", **OPTIONS)
    finally:
        server.fail_every = None
    assert_same_but_for_names(run, plain)


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("cache", ["memory", "none", "file"])
def test_whatever_prepares_and_keeps_them(workers: int, cache: str, photos: Path, plain: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):  # The second one finds the file of the first.
        kept = str(tmp_path / "cache") if cache == "file" else cache
        assert_same_run(train_small(photos, tmp_path / name, cache=kept, workers=workers, **OPTIONS), plain)
    assert (cache == "file") == (tmp_path / "cache").exists()


def test_a_damaged_cache_is_made_anew(photos: Path, plain: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    train_small(photos, tmp_path / "first", cache=str(cache), **OPTIONS)
    (path,) = cache.rglob("*.pack")
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content), 20_000):
        content[place] ^= 255
    path.write_bytes(content)
    for name, told in (("second", True), ("third", False)):
        assert_same_run(train_small(photos, tmp_path / name, cache=str(cache), **OPTIONS), plain)
        assert (f"damaged in {path}, and decoded again: " in (tmp_path / name / "train.log").read_text()) == told


def test_a_cache_that_has_no_room_is_done_without(
    photos: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deepcluster.data.pack.DISK_RESERVE", 1 << 60)
    run = train_small(photos, tmp_path / "run", cache=str(tmp_path / "cache"), **OPTIONS)
    assert_same_run(run, plain)
    assert "(the disk is nearly full); the others are decoded in each epoch" in capsys.readouterr().err


def test_a_cache_that_cannot_be_made_is_done_without(
    photos: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert_same_run(train_small(photos, tmp_path / "run", cache=str(tmp_path / "file" / "cache"), **OPTIONS), plain)
    assert "can't be written to (not a directory): all images are decoded in each epoch" in capsys.readouterr().err


def test_auto_keeps_images_in_files_where_memory_is_short(
    photos: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "free_memory_bytes", lambda: 1000)
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "usual"))
    run = train_small(photos, tmp_path / "run", cache="auto", **OPTIONS)
    assert_same_run(run, plain)
    (path,) = (tmp_path / "usual" / "images").iterdir()
    assert f"in {path}" in (run / "train.log").read_text()


# Images that change


def grown(photos: Path, tmp_path: Path) -> Path:
    """A copy of the images, to be changed."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


class ActingReporter(Reporter):
    """Acts when a step begins."""

    def __init__(self, step: str, act: Callable[[], None]) -> None:
        super().__init__(quiet=True)
        self.step, self.act = step, act

    def track(self, what: str, total: int | None, unit: str = "images") -> Any:
        if what == self.step:
            self.act()
        return super().track(what, total, unit)


def test_images_that_come_or_go_between_two_epochs_end_the_run_with_its_state_saved(photos: Path, tmp_path: Path) -> None:
    data = grown(photos, tmp_path)
    gone = sorted((data / "a").iterdir())[3]

    def change() -> None:
        gone.rename(tmp_path / "kept")
        (data / "b" / "new.png").write_bytes((tmp_path / "kept").read_bytes())

    with pytest.raises(InputError) as caught:
        train_small(data, tmp_path / "run", reporter=ActingReporter("epoch 1", change), cache="memory", **OPTIONS)
    assert f"1 image is gone (a/{gone.name}) and 1 is new (b/new.png)" in str(caught.value)
    assert checkpoint(tmp_path / "run")["epoch"] == 2
    with pytest.raises(InputError) as caught:
        train_small(data, tmp_path / "run", resume=True, **OPTIONS)
    assert f"1 image is gone (a/{gone.name}) and 1 is new (b/new.png)" in str(caught.value)
    (data / "b" / "new.png").rename(gone)
    train_small(data, tmp_path / "run", resume=True, **OPTIONS)


def test_photos_that_are_written_anew_are_decoded_anew(photos: Path, tmp_path: Path) -> None:
    data, cache = grown(photos, tmp_path), str(tmp_path / "cache")
    train_small(data, tmp_path / "first", cache=cache, **OPTIONS)
    write_good_images(data / "a", 30, size=(30, 34))
    twin = train_small(data, tmp_path / "twin", cache="none", **OPTIONS)
    assert_same_run(train_small(data, tmp_path / "second", cache=cache, **OPTIONS), twin)
    before, after = (tables(tmp_path / run)["epoch-0001.parquet"]["distance"][:30] for run in ("first", "twin"))
    assert before != after


def png(width: int, height: int) -> bytes:
    from PIL import Image

    with BytesIO() as file:
        Image.new("1", (width, height)).save(file, "PNG")
        return file.getvalue()


def test_an_image_of_30000_pixels_a_side_is_refused_and_the_run_goes_on(photos: Path, tmp_path: Path) -> None:
    data = grown(photos, tmp_path)
    (data / "a" / "huge.png").write_bytes(png(30_000, 30_000))
    run = train_small(data, tmp_path / "run", **OPTIONS)
    assert 'a/huge.png,"900,000,000 pixels is over the limit of' in (run / "unreadable.csv").read_text()


@pytest.mark.slow
def test_a_million_images(tmp_path: Path) -> None:
    """Hard links to 500 files, in 1,000 folders; in a process of its own, whose peak memory is that of the run."""
    write_good_images(tmp_path / "files", 500, size=(8, 8))
    files = sorted((tmp_path / "files").iterdir())
    for folder in range(1000):
        (tmp_path / "photos" / f"{folder:03d}").mkdir(parents=True)
        for number in range(1000):
            path = files[(folder * 7 + number) % 500]
            os.link(path, tmp_path / "photos" / f"{folder:03d}" / f"{number:03d}{path.suffix}")
    words = flags(image_size=8, epochs=1, kmeans_iterations=3, batch_size=1024, clusters=100, precision="auto")
    code = (
        "import resource, sys, time; from deepcluster.cli import main; from deepcluster.data.sources import open_source\n"
        "began = time.monotonic(); count = len(open_source(sys.argv[2])); scan = time.monotonic() - began\n"
        "status = main(sys.argv[1:])\n"
        "print(count, status, round(scan, 1), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", code, "train", str(tmp_path / "photos"), "--out", str(tmp_path / "run"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout)
    count, status, _, peak_mb = (float(word) for word in done.stdout.splitlines()[-1].split())
    assert (count, status) == (1_000_000, 0)
    assert len(tables(tmp_path / "run")["epoch-0002.parquet"]["name"]) == 1_000_000
    assert peak_mb < 5000


CODE = """
import sys
from deepcluster.cli import main
from deepcluster.data import loader
loader.LEAST_IMAGES["fork"] = 1
sys.exit(main(sys.argv[1:]))
"""


def children_of(number: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux tells which processes are whose children")
@pytest.mark.parametrize("how", ["ctrl-c", "kill -INT", "kill -KILL"])
def test_a_run_that_is_stopped_or_killed_leaves_no_process(how: str, photos: Path, tmp_path: Path) -> None:
    words = flags(epochs=100_000, **{**OPTIONS, "workers": 3})
    command = [sys.executable, "-c", CODE, "train", str(photos), "--out", str(tmp_path / "run"), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() or run.poll() is not None)
        workers = children_of(run.pid)
        assert len(workers) == 3
        number = signal.SIGKILL if how == "kill -KILL" else signal.SIGINT
        (os.killpg if how == "ctrl-c" else os.kill)(run.pid, number)
        _, errors = run.communicate(timeout=LONG)
    assert run.returncode == (-number if number == signal.SIGKILL else 130)
    assert "Traceback" not in errors
    assert until(lambda: not any(map(alive, workers)))


def test_a_stop_while_images_are_slow_to_come_is_a_stop(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first epoch, too, it is not taken for a lost server."""
    monkeypatch.setattr("deepcluster.core.processes._PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr("deepcluster.data.loader.fill_part", stopped_and_slow)
    with pytest.raises(Interrupted, match="stopped by SIGINT; training had not begun: the same command with --resume"):
        train_small(photos, tmp_path / "run", **{**OPTIONS, "workers": 1})


def stopped_and_slow(*args: object) -> None:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(1000)


def test_a_server_that_is_lost_ends_the_run_and_a_resume_goes_on(
    photos: Path, files: list[Path], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image is taken for unreadable because its server is away."""
    monkeypatch.setattr("deepcluster.core.retry.ATTEMPTS", 2)
    monkeypatch.setattr("deepcluster.core.retry.FIRST_WAIT", 0.01)
    monkeypatch.setattr("deepcluster.data.survey.SAMPLE", 5)
    monkeypatch.setattr("deepcluster.data.survey.CHECK_ALL", 0)
    options = {**OPTIONS, "cache": "none"}
    names = [path.relative_to(photos).as_posix() for path in files]
    with NaughtyServer({name: path.read_bytes() for name, path in zip(names, files, strict=True)}) as server:
        (tmp_path / "list.txt").write_text("".join(f"{server.at(name)}\n" for name in names))
        with pytest.raises(ConnectionLost, match="--resume"):
            train_small(tmp_path / "list.txt", tmp_path / "run", reporter=ActingReporter("features", server.stop), **options)
        server.start()
        run = train_small(tmp_path / "list.txt", tmp_path / "run", resume=True, **options)
    assert_same_but_for_names(run, plain)
