"""Batches are the same whatever makes them, bad images are left out of them, and workers that die are replaced."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from spoiled_images import write_good_images, write_spoiled_images
from torch import Tensor

from deepcluster.core import processes
from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import UnreadableImage, WorkerLost
from deepcluster.core.retry import ConnectionLost, end_waits
from deepcluster.core.shared_memory import SharedFile, map_file
from deepcluster.data import loader as module
from deepcluster.data.cache import DecodedImages
from deepcluster.data.decode import decode
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.multi_crop import MultiCropView
from deepcluster.data.pack import Pack
from deepcluster.data.resample import Ragged
from deepcluster.data.sources import open_source
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.views import ClusterView, TenCrops, TrainingView, draws

# pytest puts the filters of warnings back after each test, and with them those that `decode` sets once.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

IMAGE_BYTES = 40 * 48 * 3
ALL = 100 * IMAGE_BYTES
WORKERS = [0, 1, 4]
# None: no pack; one for a part of the images; one for all.
KEPT = [None, 7 * IMAGE_BYTES + 1, ALL]
VIEW = TrainingView(24)


@pytest.fixture(autouse=True)
def processes_for_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_IMAGES", {"fork": 1, "spawn": 1})


class Numbered(ImageSource):
    """Images of one colour, the index; counts what is read by any process; `hurt` is called with each index."""

    def __init__(
        self, count: int, *, unreadable: tuple[int, ...] = (), hurt: Callable[[int], object] = lambda i: None
    ) -> None:
        super().__init__()
        self.count, self.unreadable, self.hurt = count, unreadable, hurt
        self.memory = SharedFile(count)
        self.reads_N = map_file(self.memory.path)

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{index}.png"

    def details(self) -> str:
        return "made up"

    def stamp(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> NDArray[np.uint8]:
        self.reads_N[index] += 1
        self.hurt(index)
        if index in self.unreadable:
            raise UnreadableImage(f"refused {index}")
        return np.full((8, 8, 3), index % 256, np.uint8)


def slow(seconds: float) -> Callable[[int], None]:
    return lambda index: time.sleep(seconds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 good images and 6 spoiled ones, mixed."""
    path = tmp_path_factory.mktemp("photos")
    for name in write_good_images(path, 20) + write_spoiled_images(path, 6):
        (path / name).rename(path / f"{crc32(name.encode()):08x}-{name}")
    return path


def loader_of(source: ImageSource, workers: int, kept: int | None = None, tell: Any = pytest.fail) -> Loader:
    pack = None if kept is None else Pack(SharedFile(), len(source), most_bytes=kept)
    return Loader(DecodedImages(source, pack=pack), workers=workers, tell=tell)


def equal(got: list[Batch], want: list[Batch]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.images_BCHW, other.images_BCHW, rtol=0, atol=0)
        torch.testing.assert_close(one.indices_B, other.indices_B, rtol=0, atol=0)
        np.testing.assert_array_equal(one.draws_BR, other.draws_BR)


def expected(source: ImageSource, order: list[int], batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """The training views, made one by one from nothing but their definition."""
    for start in range(0, len(order), batch_size):
        views, indices, rows = [], [], []
        for position, index in enumerate(order[start : start + batch_size], start):
            row = draws(seed, epoch, position, 1)[0]
            try:
                views.append(VIEW([torch.from_numpy(decode(source.read(index)).copy())], row[None])[0])
            except UnreadableImage:
                continue
            indices.append(index)
            rows.append(row)
        yield Batch((torch.stack(views),), torch.tensor(indices), np.array(rows))


ORDER = [(7 * position) % 26 for position in range(50)]


# The same batches


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("workers", WORKERS)
def test_training_views_are_those_of_their_definition(folder: Path, workers: int, kept: int | None) -> None:
    source = open_source(folder)
    want = list(expected(source, ORDER, 8, seed=3, epoch=2))
    with closing(loader_of(source, workers, kept)) as loader:
        for first in (0, 0, 1, 5, 7):
            views = loader.training_views(VIEW, torch.tensor(ORDER), 8, seed=3, epoch=2, first_batch=first)
            equal(list(views), want[first:])


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("workers", WORKERS)
def test_cluster_views_are_those_of_their_definition(folder: Path, workers: int, kept: int | None) -> None:
    source, view = open_source(folder), ClusterView(24)
    with closing(loader_of(source, workers, kept)) as loader:
        for _ in range(2):
            batches = list(loader.cluster_views(view, torch.arange(26), 8))
            readable = [index for index in range(26) if index not in loader.unreadable]
            assert torch.cat([batch.indices_B for batch in batches]).tolist() == readable
            for batch in batches:
                assert batch.draws_BR.shape == (len(batch.indices_B), 0)
                assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
                for seen, index in zip(batch.images_BCHW, batch.indices_B.tolist(), strict=True):
                    want = view([torch.from_numpy(decode(source.read(index)).copy())])[0]
                    torch.testing.assert_close(seen, want, rtol=0, atol=0)


def test_another_epoch_seed_or_position_gives_another_view() -> None:
    with closing(loader_of(Numbered(3), 0)) as loader:
        rows = [
            batch.draws_BR
            for seed, epoch in [(0, 0), (0, 1), (1, 0)]
            for batch in loader.training_views(VIEW, torch.zeros(4, dtype=torch.int64), 2, seed=seed, epoch=epoch)
        ]
    numbers = np.concatenate(rows).ravel()
    assert len(np.unique(numbers)) == len(numbers)


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_come_in_order_though_the_first_are_the_slowest(workers: int) -> None:
    with closing(loader_of(Numbered(30, hurt=lambda index: time.sleep(max(0, 0.02 * (8 - index)))), workers)) as loader:
        batches = list(loader.cluster_views(ClusterView(8), torch.arange(30), 2))
    assert torch.cat([batch.indices_B for batch in batches]).tolist() == list(range(30))
    for batch in batches:
        assert batch.images_BCHW[:, 0, 0, 0].tolist() == batch.indices_B.tolist()


# Images that can't be read


@pytest.mark.parametrize("workers", WORKERS)
def test_unreadable_images_are_left_out_and_remembered_with_their_reason(folder: Path, workers: int) -> None:
    source = open_source(folder)
    spoiled = [index for index in range(26) if "spoiled" in source.name(index)]
    assert len(spoiled) == 6
    with closing(loader_of(source, workers, ALL)) as loader:
        batches = list(loader.training_views(VIEW, torch.tensor(ORDER), 8, seed=0, epoch=0))
        assert sorted(loader.unreadable) == spoiled
        for index, reason in loader.unreadable.items():
            with pytest.raises(UnreadableImage) as caught:
                decode(source.read(index))
            assert reason == str(caught.value)
    seen = torch.cat([batch.indices_B for batch in batches]).tolist()
    assert seen == [index for index in ORDER if index not in spoiled]
    assert [len(batch.draws_BR) for batch in batches] == [len(batch.images_BCHW) for batch in batches]


@pytest.mark.parametrize("workers", WORKERS)
def test_an_image_that_could_not_be_read_is_not_tried_again(workers: int) -> None:
    source = Numbered(6, unreadable=(2, 4))
    with closing(loader_of(source, workers)) as loader:
        loader.fill(lambda images: None)
        assert loader.unreadable == {2: "refused 2", 4: "refused 4"}
        for epoch in range(3):
            list(loader.training_views(VIEW, torch.arange(6), 3, seed=0, epoch=epoch))
    assert source.reads_N.tolist() == [4, 4, 1, 4, 1, 4]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_batch_without_a_readable_image_is_empty(workers: int) -> None:
    with closing(loader_of(Numbered(6, unreadable=(2, 3)), workers)) as loader:
        trained = list(loader.training_views(VIEW, torch.arange(6), 2, seed=0, epoch=0))
        clustered = list(loader.cluster_views(ClusterView(8), torch.arange(6), 2))
    assert [len(batch.indices_B) for batch in trained] == [2, 0, 2]
    assert trained[1].images_BCHW.shape == (0, 3, 24, 24)
    assert trained[1].draws_BR.shape == (0, trained[0].draws_BR.shape[1])
    assert clustered[1].images_BCHW.shape == (0, 3, 8, 8)
    assert clustered[1].draws_BR.shape == (0, 0)
    for batch in (trained[1], clustered[1]):
        assert batch.images_BCHW.dtype == torch.uint8
        assert batch.indices_B.dtype == torch.int64
        assert batch.indices_B.shape == (0,)


@pytest.mark.parametrize("workers", WORKERS)
def test_no_indices_give_no_batches(workers: int) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    with closing(loader_of(Numbered(3), workers)) as loader:
        assert list(loader.cluster_views(ClusterView(8), nothing, 4)) == []
        assert list(loader.training_views(VIEW, nothing, 4, seed=0, epoch=0)) == []
        assert list(loader.training_views(VIEW, torch.arange(3), 2, seed=0, epoch=0, first_batch=2)) == []


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kept", [None, 10**6])
def test_fill_reads_each_image_once_and_says_how_many_are_done(kept: int | None, workers: int) -> None:
    source, done = Numbered(300, unreadable=(3, 299)), list[int]()
    with closing(loader_of(source, workers, kept)) as loader:
        loader.fill(done.append)
        assert sum(done) == 300
        assert max(done) <= 128
        assert loader.unreadable == {3: "refused 3", 299: "refused 299"}
        assert source.reads_N.tolist() == [1] * 300
        list(loader.cluster_views(ClusterView(8), torch.arange(300), 4))
        assert source.reads_N.max() == (2 if kept is None else 1)


@pytest.mark.parametrize("workers", WORKERS)
def test_what_finds_no_room_is_told_once_and_decoded_in_each_epoch(workers: int) -> None:
    told: list[str] = []
    source = Numbered(300)
    with closing(loader_of(source, workers, 150 * 192, tell=told.append)) as loader:
        loader.fill(lambda images: None)
        assert told == [
            "no more decoded images are kept: the 29 kB of memory for them are full; the others are decoded in each epoch"
        ]
        before = source.reads_N.copy()
        for _ in range(2):
            batches = loader.cluster_views(ClusterView(8), torch.arange(300), 20)
            assert torch.cat([batch.images_BCHW[:, 0, 0, 0] for batch in batches]).tolist() == [i % 256 for i in range(300)]
        read = int((source.reads_N > before).sum())
        assert 150 <= read < 300
        assert source.reads_N.sum() == before.sum() + 2 * read
    assert len(told) == 1


def test_two_loaders_fill_one_pack_together() -> None:
    """As two ranks do: each image is decoded by one of them, and both know which can't be."""
    source = Numbered(2000, unreadable=(5, 1999))
    first = loader_of(source, 2, 10**7)
    second = Loader(DecodedImages(source, pack=pickle.loads(pickle.dumps(first.images.pack))), workers=2)
    ranks = [Ranks(), Ranks()]
    for number, one in enumerate(ranks):
        one.rank, one.size = number, 2
    threads = [
        threading.Thread(target=loader.fill, args=(lambda images: None, one))
        for loader, one in zip((first, second), ranks, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for loader in (first, second):
        assert sorted(loader.unreadable) == [5, 1999]
        loader.close()
    assert set(np.delete(source.reads_N, [5, 1999]).tolist()) == {1}


VIEWS = [ClusterView(8), VIEW, TenCrops(8), MultiCropView(((2, 12), (3, 8)), ((0.14, 1.0), (0.05, 0.14)))]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: type(view).__name__)
def test_images_that_are_resident_give_the_same_batches(view: Any, folder: Path) -> None:
    """As on a GPU; here the memory in which they lie is the processor's."""
    source = open_source(folder)
    with (
        closing(loader_of(source, 0)) as plain,
        closing(loader_of(source, 0, ALL)) as other,
        closing(loader_of(source, 2)) as third,
    ):
        want = list(plain.training_views(view, torch.tensor(ORDER), 8, seed=3, epoch=2))
        other.fill(lambda images: None)
        pack = other.images.pack
        assert pack is not None
        pixels_P3 = torch.from_numpy(pack.pixels).view(-1, 3)
        other.images._resident = Ragged(pixels_P3, pack.starts_N // 3, pack.sizes_N2.astype(np.int64))
        for loader in (other, third):
            got = list(loader.training_views(view, torch.tensor(ORDER), 8, seed=3, epoch=2))
            equal(got, want)
            for one, twin in zip(got, want, strict=True):
                assert len(one.crops) == len(twin.crops)
                for crop, same in zip(one.crops, twin.crops, strict=True):
                    torch.testing.assert_close(crop, same, rtol=0, atol=0)


def test_spawned_workers_give_the_same_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: "spawn")
    source = open_source(folder)
    want = list(expected(source, ORDER, 8, seed=3, epoch=2))
    with closing(loader_of(source, 2, ALL)) as loader:
        loader.fill(lambda images: None)
        equal(list(loader.training_views(VIEW, torch.tensor(ORDER), 8, seed=3, epoch=2)), want)
        assert loader._pool is not None


def test_what_cannot_be_sent_to_workers_is_done_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: "spawn")
    told: list[str] = []
    with closing(loader_of(Numbered(9, hurt=lambda index: None), 2, tell=told.append)) as loader:
        assert len(list(loader.cluster_views(ClusterView(8), torch.arange(9), 3))) == 3
        assert len(list(loader.cluster_views(ClusterView(8), torch.arange(9), 3))) == 3
    (line,) = told
    assert line.startswith("images are prepared without worker processes, which can't be started: ")


def test_a_daemonic_process_which_may_have_no_children_works_by_itself() -> None:
    def work() -> None:
        with closing(loader_of(Numbered(9), 2)) as loader:
            os._exit(len(list(loader.cluster_views(ClusterView(8), torch.arange(9), 3))))

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 3


def test_batches_of_any_size_go_to_and_fro() -> None:
    """Larger than what a pipe holds: 20,000 indices each."""
    order = torch.from_numpy(np.random.default_rng(0).integers(0, 100, 100_000))
    with closing(loader_of(Numbered(100), 1, 10**6)) as loader:
        loader.fill(lambda images: None)
        batches = list(loader.training_views(TrainingView(1), order, 20_000, seed=0, epoch=0))
    assert torch.equal(torch.cat([batch.indices_B for batch in batches]), order)


# Faults and early ends


@pytest.mark.parametrize("workers", WORKERS)
def test_a_defect_in_a_worker_reaches_the_caller_and_the_loader_can_go_on(workers: int) -> None:
    def broken(index: int) -> None:
        if index == 13:
            raise ZeroDivisionError("a defect in the program")

    with closing(loader_of(Numbered(40, hurt=broken), workers)) as loader:
        seen: list[Tensor] = []
        with pytest.raises(ZeroDivisionError, match="a defect in the program"):
            seen.extend(batch.indices_B for batch in loader.cluster_views(ClusterView(8), torch.arange(40), 5))
        assert torch.cat(seen).tolist() == list(range(10))
        assert 13 not in loader.unreadable
        with pytest.raises(ZeroDivisionError):
            loader.fill(lambda images: None)
        assert len(list(loader.cluster_views(ClusterView(8), torch.arange(13), 5))) == 3


@pytest.mark.parametrize("workers", [1, 4])
def test_killed_workers_change_no_batch(workers: int, folder: Path) -> None:
    source, told = open_source(folder), list[str]()
    want = list(expected(source, ORDER, 8, seed=3, epoch=2))
    with closing(loader_of(source, workers, ALL, tell=told.append)) as loader:
        got = []
        for number, batch in enumerate(loader.training_views(VIEW, torch.tensor(ORDER), 8, seed=3, epoch=2)):
            got.append(batch)
            if number in (1, 3):
                assert loader._pool is not None
                for worker in loader._pool._workers:
                    worker.process.kill()
        equal(got, want)
    assert all("a process that prepares images (pid" in line and "another one takes its place" in line for line in told)
    assert told


def test_an_image_that_kills_its_worker_ends_the_loop_with_words() -> None:
    def deadly(index: int) -> None:
        if index == 13:
            os.kill(os.getpid(), signal.SIGKILL)

    with closing(loader_of(Numbered(40, hurt=deadly), 2, tell=lambda line: None)) as loader:  # noqa: SIM117
        with pytest.raises(WorkerLost, match="use fewer --workers, or --workers 0"):
            list(loader.cluster_views(ClusterView(8), torch.arange(40), 5))


@pytest.mark.parametrize("workers", [1, 4])
def test_a_loop_that_is_left_early_leaves_no_work_and_no_processes(workers: int) -> None:
    source = Numbered(200, hurt=slow(0.005))
    loader = loader_of(source, workers)
    batches = loader.cluster_views(ClusterView(8), torch.arange(200), 4)
    next(batches)
    batches.close()
    # Others are begun and dropped as well, one of them unread; the next one has its own batches.
    next(loader.cluster_views(ClusterView(8), torch.arange(200), 2))
    loader.training_views(VIEW, torch.arange(200), 4, seed=0, epoch=0)
    assert next(loader.cluster_views(ClusterView(8), torch.tensor([7, 9]), 2)).indices_B.tolist() == [7, 9]
    assert len(multiprocessing.active_children()) == workers
    loader.close()
    assert multiprocessing.active_children() == []
    assert source.reads_N.sum() < 120
    loader.close()


def test_only_a_few_batches_are_made_ahead() -> None:
    source = Numbered(100)
    with closing(loader_of(source, 2)) as loader:
        batches = loader.cluster_views(ClusterView(8), torch.arange(100), 1)
        next(batches)
        time.sleep(0.1)
        assert source.reads_N.sum() <= 1 + 2 * 2 + 1
        batches.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_does_not_wait_for_images_that_do_not_come(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a worker waits for a server that is away."""
    monkeypatch.setattr(processes, "_PATIENCE_SECONDS", 0.1)
    over = threading.Event()

    def ask() -> None:
        """Again and again: on a busy machine the workers may not have started at the first time."""
        while not over.wait(0.3):
            end_waits()

    with closing(loader_of(Numbered(100, hurt=slow(1000)), workers)) as loader:
        asking = threading.Thread(target=ask)
        asking.start()
        with pytest.raises(ConnectionLost, match="stopped while images were waited for"):
            next(loader.cluster_views(ClusterView(8), torch.arange(100), 4))
        over.set()
        asking.join()


@pytest.mark.parametrize("workers", WORKERS)
def test_the_time_spent_waiting_is_counted_and_the_callers_own_is_not(workers: int) -> None:
    with closing(loader_of(Numbered(8, hurt=slow(0.05)), workers)) as loader:
        started, own = time.perf_counter(), 0.0
        for _ in loader.cluster_views(ClusterView(8), torch.arange(4), 4):
            before = time.perf_counter()
            time.sleep(0.2)
            own += time.perf_counter() - before
        assert 0.19 < loader.wait_seconds <= time.perf_counter() - started - own


def test_threads_for_images_leave_the_callers_number_of_threads_as_it_is(tmp_path: Path) -> None:
    """In processes of their own: torch settles the number when a thread first needs it."""
    alone = """
import torch
print(torch.get_num_threads())
"""
    with_survey = """
import sys, numpy, torch
from deepcluster.data.sources import open_source
from deepcluster.data.survey import looks, survey
numpy.save(sys.argv[1], numpy.zeros((9, 8, 8), numpy.uint8))
source = open_source(sys.argv[1])
done = [].append
assert survey(source, workers=2, on_images=done).n_images == len(list(looks(source, range(9), 2, done, whole=True))) == 9
print(torch.get_num_threads())
"""
    numbers = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "images.npy")], capture_output=True, text=True, check=True
        ).stdout
        for script in (alone, with_survey)
    ]
    assert numbers[0] == numbers[1]
