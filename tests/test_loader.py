"""Batches are the same whatever makes them, bad images are left out of them, and the cache keeps to its bytes."""

import gc
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from spoiled_images import write_good_images, write_spoiled_images
from torch import Tensor

from deepcluster.core.errors import UnreadableImage
from deepcluster.data.cache import DecodedImages
from deepcluster.data.decode import decode
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.sources import open_source
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.views import ClusterView, TrainingView, draws

# pytest puts the filters of warnings back after each test, and with them those that `decode` sets once.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

IMAGE_BYTES = 40 * 48 * 3
ALL = 100 * IMAGE_BYTES
WORKERS = [0, 1, 4]
MEMORY = [0, 7 * IMAGE_BYTES + 1, ALL]
VIEW = TrainingView(24)


class Numbered(ImageSource):
    """Images of one colour, the index; counts what is read, can refuse some, fail at one and be slow at another."""

    def __init__(
        self, count: int, *, unreadable: tuple[int, ...] = (), broken: int = -1, slow: dict[int, float] | None = None
    ) -> None:
        super().__init__()
        self.count, self.unreadable, self.broken, self.slow = count, unreadable, broken, slow or {}
        self.reads: Counter[int] = Counter()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{index}.png"

    def details(self) -> str:
        return "made up"

    def stamp(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> NDArray[np.uint8]:
        with self.lock:
            self.reads[index] += 1
        time.sleep(self.slow.get(index, 0))
        if index in self.unreadable:
            raise UnreadableImage(f"refused {index}")
        if index == self.broken:
            raise ZeroDivisionError("a defect in the program")
        return np.full((8, 8, 3), index, np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 good images and 6 spoiled ones, mixed."""
    path = tmp_path_factory.mktemp("photos")
    for name in write_good_images(path, 20) + write_spoiled_images(path, 6):
        (path / name).rename(path / f"{crc32(name.encode()):08x}-{name}")
    return path


def loader_of(source: ImageSource, workers: int, memory_bytes: int = 0) -> Loader:
    return Loader(DecodedImages(source, memory_bytes), workers=workers)


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


@pytest.mark.parametrize("memory_bytes", MEMORY)
@pytest.mark.parametrize("workers", WORKERS)
def test_training_views_are_those_of_their_definition(folder: Path, workers: int, memory_bytes: int) -> None:
    source = open_source(folder)
    want = list(expected(source, ORDER, 8, seed=3, epoch=2))
    with closing(loader_of(source, workers, memory_bytes)) as loader:
        for first in (0, 0, 1, 5, 7):
            views = loader.training_views(VIEW, torch.tensor(ORDER), 8, seed=3, epoch=2, first_batch=first)
            equal(list(views), want[first:])


@pytest.mark.parametrize("memory_bytes", MEMORY)
@pytest.mark.parametrize("workers", WORKERS)
def test_cluster_views_are_those_of_their_definition(folder: Path, workers: int, memory_bytes: int) -> None:
    source, view = open_source(folder), ClusterView(24)
    with closing(loader_of(source, workers, memory_bytes)) as loader:
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
    slow = {index: 0.02 * (8 - index) for index in range(0, 8, 2)}
    with closing(loader_of(Numbered(30, slow=slow), workers)) as loader:
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
        assert loader.images.n_kept == 20
    seen = torch.cat([batch.indices_B for batch in batches]).tolist()
    assert seen == [index for index in ORDER if index not in spoiled]
    assert [len(batch.draws_BR) for batch in batches] == [len(batch.images_BCHW) for batch in batches]


@pytest.mark.parametrize("workers", WORKERS)
def test_an_image_that_could_not_be_read_is_not_tried_again(workers: int) -> None:
    source = Numbered(6, unreadable=(2, 4))
    with closing(loader_of(source, workers)) as loader:
        list(loader.read_all(torch.arange(6)))
        assert loader.unreadable == {2: "refused 2", 4: "refused 4"}
        for epoch in range(3):
            list(loader.training_views(VIEW, torch.arange(6), 3, seed=0, epoch=epoch))
    assert source.reads == {0: 4, 1: 4, 2: 1, 3: 4, 4: 1, 5: 4}


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
        assert list(loader.read_all(nothing)) == []


# The cache


@pytest.mark.parametrize("workers", WORKERS)
def test_read_all_fills_the_cache_and_says_how_many_are_done(workers: int) -> None:
    source = Numbered(10, unreadable=(3,))
    with closing(loader_of(source, workers, ALL)) as loader:
        assert list(loader.read_all(torch.arange(10), chunk=4)) == [4, 4, 2]
        assert loader.unreadable == {3: "refused 3"}
        assert loader.images.n_kept == 9
        list(loader.cluster_views(ClusterView(8), torch.arange(10), 4))
    assert source.reads == dict.fromkeys(range(10), 1)


def kept_bytes(images: DecodedImages) -> int:
    """What is really held, and what is set aside for the rest of a tensor of all images."""
    planes = images._planes_NHCW
    return sum(image.untyped_storage().nbytes() for image in images._kept.values()) + (
        0 if planes is None else planes.nbytes
    )


@pytest.mark.parametrize("memory_bytes", [0, 1, 191, 192, 1000, 64 * 192 - 1, 64 * 192, 10**9])
def test_the_cache_keeps_to_its_bytes(memory_bytes: int) -> None:
    images = DecodedImages(Numbered(64), memory_bytes)
    order = np.random.default_rng(0).integers(0, 64, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for index, image_HWC in zip(order, pool.map(images.get, order), strict=True):
            assert bool((image_HWC == index).all())
            assert kept_bytes(images) <= memory_bytes
    assert images.n_kept == min(memory_bytes // 192, 64)
    assert kept_bytes(images) + images.free_bytes == memory_bytes


def test_an_image_that_is_fetched_twice_at_once_is_counted_once() -> None:
    images = DecodedImages(Numbered(1, slow={0: 0.05}), 1000)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(images.get, [0] * 4))
    assert images.n_kept == 1
    assert images.kept_bytes == 192
    assert images.free_bytes == 1000 - 192


def test_smaller_images_take_the_room_that_larger_ones_leave(tmp_path: Path) -> None:
    write_good_images(tmp_path / "a", 3, size=(48, 40))
    write_good_images(tmp_path / "b", 3, size=(10, 10))
    images = DecodedImages(open_source([tmp_path / "a", tmp_path / "b"]), IMAGE_BYTES + 650)
    for index in range(6):
        images.get(index)
    assert sorted(images._kept) == [0, 3, 4]
    assert len(images) == 6


# Faults and early ends


@pytest.mark.parametrize("workers", WORKERS)
def test_a_defect_in_a_worker_reaches_the_caller_and_the_loader_can_go_on(workers: int) -> None:
    with closing(loader_of(Numbered(40, broken=13), workers)) as loader:
        seen: list[Tensor] = []
        with pytest.raises(ZeroDivisionError, match="a defect in the program"):
            seen.extend(batch.indices_B for batch in loader.cluster_views(ClusterView(8), torch.arange(40), 5))
        assert torch.cat(seen).tolist() == list(range(10))
        assert 13 not in loader.unreadable
        with pytest.raises(ZeroDivisionError):
            list(loader.read_all(torch.arange(40)))
        assert len(list(loader.cluster_views(ClusterView(8), torch.arange(13), 5))) == 3


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_loop_that_is_left_early_leaves_no_work_and_no_threads(workers: int) -> None:
    gc.collect()
    before = set(loader_threads())
    source = Numbered(200, slow=dict.fromkeys(range(200), 0.005))
    loader = loader_of(source, workers)
    batches = loader.cluster_views(ClusterView(8), torch.arange(200), 4)
    next(batches)
    batches.close()
    # Two others are begun and dropped as well, one of them unread.
    for _ in loader.read_all(torch.arange(200), chunk=2):
        break
    loader.training_views(VIEW, torch.arange(200), 4, seed=0, epoch=0)
    assert set(loader_threads()) - before
    started = time.perf_counter()
    loader.close()
    assert time.perf_counter() - started < 5
    assert set(loader_threads()) <= before
    assert source.reads.total() < 100
    loader.close()


def test_batches_that_are_no_longer_wanted_are_not_made() -> None:
    source = Numbered(40, slow=dict.fromkeys(range(40), 0.05))
    with closing(loader_of(source, 1)) as loader:
        batches = loader.cluster_views(ClusterView(8), torch.arange(40), 1)
        next(batches)
        batches.close()
        # The next batch of another loop waits for the one being made, not for those that lay ahead of it.
        next(loader.cluster_views(ClusterView(8), torch.tensor([39]), 1))
    assert source.reads.total() <= 3


def test_only_a_few_batches_are_made_ahead() -> None:
    source = Numbered(100)
    with closing(loader_of(source, 2)) as loader:
        batches = loader.cluster_views(ClusterView(8), torch.arange(100), 1)
        next(batches)
        time.sleep(0.1)
        assert source.reads.total() <= 1 + 2 + 2
        batches.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_the_time_spent_waiting_is_counted_and_the_callers_own_is_not(workers: int) -> None:
    with closing(loader_of(Numbered(4, slow=dict.fromkeys(range(4), 0.05)), workers)) as loader:
        started = time.perf_counter()
        for _ in loader.cluster_views(ClusterView(8), torch.arange(4), 4):
            waited = time.perf_counter() - started
            time.sleep(0.2)
        assert 0.19 < loader.wait_seconds < waited + 0.1


def test_threads_for_images_leave_the_callers_number_of_threads_as_it_is(tmp_path: Path) -> None:
    """In processes of their own: torch settles the number when a thread first needs it."""
    alone = """
import torch
print(torch.get_num_threads())
"""
    with_loader = """
import torch
from deepcluster.data.loader import Loader
loader = Loader(None, workers=2)
assert loader._pool.submit(torch.get_num_threads).result() == 1
print(torch.get_num_threads())
loader.close()
"""
    with_survey = """
import sys, numpy, torch
from deepcluster.data.survey import overview
from deepcluster.data.sources import open_source
from deepcluster.data.survey import survey
numpy.save(sys.argv[1], numpy.zeros((9, 8, 8), numpy.uint8))
source = open_source(sys.argv[1])
assert survey(source, workers=2, on_images=lambda images: None).n_images == overview(source, workers=2).looked_at == 9
print(torch.get_num_threads())
"""
    numbers = [
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "images.npy")], capture_output=True, text=True, check=True
        ).stdout
        for script in (alone, with_loader, with_survey)
    ]
    assert numbers[0] == numbers[1] == numbers[2]
