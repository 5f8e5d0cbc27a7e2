"""Where decoded images are kept is planned by what there is room for; wherever it is, they are the same images."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from spoiled_images import encode, picture, write_good_images, write_spoiled_images
from torch import Tensor

from deepcluster.core.device import free_disk_bytes
from deepcluster.core.errors import UnreadableImage
from deepcluster.data import cache_plan as module
from deepcluster.data import image_shards
from deepcluster.data.cache import DecodedImages, KeptViews
from deepcluster.data.cache_plan import (
    AUTO_SHARE,
    DISK_SHARE,
    MEMORY_SHARE,
    SAFETY,
    CachePlan,
    decoded_images,
    plan_cache,
)
from deepcluster.data.decode import decode
from deepcluster.data.image_shards import DISK_RESERVE
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.sources import open_source
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.views import ClusterView, TrainingView

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

NEEDED = 10**9
WITH_SAFETY = int(SAFETY * NEEDED)


# Plans


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    def has(free_memory: float, free_disk: float) -> None:
        monkeypatch.setattr(module, "free_memory_bytes", lambda: int(free_memory))
        monkeypatch.setattr(module, "free_disk_bytes", lambda folder: int(free_disk))

    return has


PLENTY = 10**13
JUST_MEMORY = WITH_SAFETY / AUTO_SHARE + 8
JUST_DISK = (WITH_SAFETY + DISK_RESERVE) / DISK_SHARE


@pytest.mark.parametrize(
    ("free_memory", "free_disk", "where"),
    [
        (PLENTY, PLENTY, "memory"),
        (PLENTY, 0, "memory"),
        (JUST_MEMORY, 0, "memory"),
        (JUST_MEMORY, PLENTY, "memory"),
        (JUST_MEMORY - 100, PLENTY, "folder"),
        (JUST_MEMORY - 100, JUST_DISK, "folder"),
        (JUST_MEMORY - 100, JUST_DISK - 10, "some memory"),
        (JUST_MEMORY - 100, 0, "some memory"),
        (0, PLENTY, "folder"),
        (0, 0, "nothing"),
    ],
)
def test_auto_takes_memory_then_files_then_what_memory_there_is(
    free_memory: float, free_disk: float, where: str, machine: Callable[[float, float], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "not" / "yet"))
    machine(free_memory, free_disk)
    plan = plan_cache("auto", None, NEEDED)
    assert plan.needed_bytes == WITH_SAFETY
    assert plan.folder == (tmp_path / "not" / "yet" if where == "folder" else None)
    assert plan.memory_bytes == (0 if where in ("folder", "nothing") else int(AUTO_SHARE * free_memory))
    assert (plan.memory_bytes >= plan.needed_bytes) == (where == "memory")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("free_memory", [0, 10**8, 10**9, 10**12])
@pytest.mark.parametrize("free_disk", [0, PLENTY])
def test_what_is_asked_for_is_done(
    free_memory: float, free_disk: float, machine: Callable[[float, float], None], tmp_path: Path
) -> None:
    machine(free_memory, free_disk)
    assert plan_cache("memory", None, NEEDED) == CachePlan(WITH_SAFETY, int(MEMORY_SHARE * free_memory))
    assert plan_cache("none", None, NEEDED) == CachePlan(WITH_SAFETY)
    assert plan_cache("anything", tmp_path, NEEDED) == CachePlan(WITH_SAFETY, folder=tmp_path)


def test_the_disk_of_a_folder_that_is_not_there_yet_is_that_of_its_parents(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "a" / "b", tmp_path / "file", tmp_path / "file" / "below"):
        assert free_disk_bytes(folder) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_a_plan_says_in_a_few_words_where_images_are_kept(tmp_path: Path) -> None:
    gigabyte = 10**9
    assert CachePlan(3 * gigabyte, folder=tmp_path).describe() == f"3.0 GB in {tmp_path}, filled by the first epoch"
    assert CachePlan(3 * gigabyte, 4 * gigabyte).describe() == "3.0 GB in memory"
    assert CachePlan(3 * gigabyte, gigabyte).describe() == "1.0 GB of 3.0 GB in memory, the others decoded at each visit"
    assert CachePlan(3 * gigabyte).describe() == "none, all decoded at each visit"


# The folder of a set of images


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of many sizes, shuffled, seven of which can't be read."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, (width, height) in enumerate([(48, 40), (20, 31), (150, 90), (64, 64), (33, 200)]):
        write_good_images(folder / str(number), 10 + number % 2, seed=number, size=(width, height))
        for path in list((folder / str(number)).iterdir()):
            path.rename(folder / f"{crc32(str(path.name).encode()) % 997:03}-{number}-{path.name}")
        (folder / str(number)).rmdir()
    for name in write_spoiled_images(folder, 7):
        (folder / name).rename(folder / f"{crc32(name.encode()) % 997:03}-{name}")
    return folder


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 32 x 32 pixels, PNG and JPEG in turn."""
    folder = tmp_path_factory.mktemp("uniform")
    for number in range(60):
        image = Image.fromarray(picture(number, (32, 32)))
        kind = "JPEG" if number % 2 else "PNG"
        (folder / f"{number:02}.{kind.lower()}").write_bytes(encode(image, kind))
    return folder


def folder_of(source: ImageSource, data: "Path | str | list[Path]", cache: Path, reduce_to: int = 0) -> Path:
    images = decoded_images(source, CachePlan(10**6, folder=cache), reduce_to=reduce_to, data=data)
    assert images.shards is not None
    assert images.shards.folder.parent == cache / "images"
    return images.shards.folder


def test_the_folder_is_that_of_the_data_the_size_and_the_decoders(
    mixed: Path, uniform: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(mixed)
    usual = folder_of(source, mixed, tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(mixed, copy)
    monkeypatch.chdir(mixed.parent)
    assert folder_of(open_source(mixed), mixed, tmp_path) == usual
    assert folder_of(source, str(mixed), tmp_path) == folder_of(source, mixed.name, tmp_path) == usual
    others = [
        folder_of(source, mixed, tmp_path, reduce_to=64),
        folder_of(source, mixed, tmp_path, reduce_to=65),
        folder_of(open_source(mixed, 30), mixed, tmp_path),
        folder_of(open_source(copy), copy, tmp_path),  # the same names elsewhere
        folder_of(open_source(uniform), uniform, tmp_path),
        folder_of(open_source([mixed, uniform]), [mixed, uniform], tmp_path),
        folder_of(open_source([uniform, mixed]), [uniform, mixed], tmp_path),
        folder_of(source, "https://host/mixed", tmp_path),
    ]
    monkeypatch.setattr(module, "version", lambda package: f"{package} of tomorrow")
    others.append(folder_of(source, mixed, tmp_path))
    assert len({usual, *others}) == 1 + len(others)
    assert not (tmp_path / "images").exists()


def test_names_that_are_not_utf8_have_a_folder(uniform: Path, tmp_path: Path) -> None:
    folder_of(open_source(uniform), "photos-\udce9", tmp_path)


def test_what_a_layout_says_is_what_was_opened(uniform: Path, tmp_path: Path) -> None:
    source = open_source(uniform)
    images = decoded_images(source, CachePlan(60 * 3000, folder=tmp_path), reduce_to=16, data=uniform)
    for index in range(60):
        images.get(index)
    (layout,) = tmp_path.glob("images/*/layout.json")
    said = json.loads(layout.read_text())
    assert said["data"] == [str(uniform)]
    assert said["images"] == source.describe()
    assert (said["reduce_to"], said["format"]) == (16, 1)
    assert said["images_in_a_shard"] == min(image_shards.MOST_IN_SHARD, image_shards.SHARD_BYTES // 3000)


# The images


def truth(source: ImageSource, shorter_side: int | None = None) -> "list[Tensor | str]":
    """What is decoded of each image, or why it can't be."""
    found: list[Tensor | str] = []
    for index in range(len(source)):
        try:
            found.append(torch.from_numpy(decode(source.read(index), shorter_side=shorter_side).copy()))
        except UnreadableImage as fault:
            found.append(str(fault))
    return found


def same_images(images: DecodedImages, want: "list[Tensor | str]") -> None:
    for index, one in enumerate(want):
        if isinstance(one, str):
            with pytest.raises(UnreadableImage) as told:
                images.get(index)
            assert str(told.value) == one
        else:
            got = images.get(index)
            assert got.dtype == torch.uint8
            torch.testing.assert_close(got, one, rtol=0, atol=0)


@pytest.mark.parametrize("shorter_side", [None, 24])
@pytest.mark.parametrize("memory_bytes", [0, 100_000, 10**9])
@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("kind", ["mixed", "uniform"])
def test_images_are_those_that_are_decoded(
    kind: str, files: bool, memory_bytes: int, shorter_side: int | None, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(image_shards, "SHARD_BYTES", 30_000)
    data = request.getfixturevalue(kind)
    source = open_source(data)
    want = truth(source, shorter_side)
    plan = CachePlan(3000 * len(source), memory_bytes, tmp_path if files else None)
    for _ in range(2):
        images = decoded_images(source, plan, reduce_to=shorter_side or 0, data=data)
        for _ in range(2):
            same_images(images, want)
        assert images.kept_bytes <= memory_bytes
    if files:
        assert len(list(tmp_path.glob("images/*/*.pixels"))) == 6


def test_images_that_are_in_files_are_not_read_again(uniform: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plan = open_source(uniform), CachePlan(60 * 3072, folder=tmp_path)
    want = truth(source)
    same_images(decoded_images(source, plan, reduce_to=0, data=uniform), want)
    monkeypatch.setattr(source, "read", None)
    same_images(decoded_images(source, plan, reduce_to=0, data=uniform), want)


def test_images_that_could_not_be_read_are_tried_again_by_the_next_run(
    uniform: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike those that can't be decoded: of them the reason is kept."""
    source, plan = open_source(uniform), CachePlan(60 * 3072, folder=tmp_path)
    read = source.read

    def fails(index: int) -> object:
        if index == 5:
            raise UnreadableImage("timed out")
        return b"spoiled" if index == 6 else read(index)

    monkeypatch.setattr(source, "read", fails)
    first = decoded_images(source, plan, reduce_to=0, data=uniform)
    with closing(Loader(first, workers=0)) as loader:
        list(loader.read_all(torch.arange(60)))
        assert loader.unreadable == {5: "timed out", 6: "not an image: text"}
    assert len(list(tmp_path.glob("images/*/*.pixels"))) == 1
    monkeypatch.setattr(source, "read", lambda index: read(index) if index == 5 else None)
    second = decoded_images(source, plan, reduce_to=0, data=uniform)
    assert torch.equal(second.get(5), torch.from_numpy(decode(read(5)).copy()))
    with pytest.raises(UnreadableImage, match="not an image: text"):
        second.get(6)


def test_uniform_small_images_come_together(uniform: Path) -> None:
    source = open_source(uniform)
    images = DecodedImages(source, 60 * 3072)
    rows = torch.tensor([3, 59, 3, 0, 17])
    assert images.together(rows) is None
    for index in rows.tolist():
        images.get(index)
    want = torch.stack([one for one in truth(source) if isinstance(one, Tensor)]).permute(0, 1, 3, 2)
    together = images.together(rows)
    assert together is not None
    torch.testing.assert_close(together, want[rows], rtol=0, atol=0)
    assert images.together(torch.tensor([3, 4])) is None
    assert (images.n_kept, images.kept_bytes, images.free_bytes) == (4, 4 * 3072, 0)
    assert DecodedImages(source, 60 * 3072 - 1).together(rows) is None


def test_a_device_that_makes_no_views_leaves_them_to_the_processor(uniform: Path) -> None:
    images = DecodedImages(open_source(uniform), 10**6, device=torch.device("mps"))
    for index in range(60):
        images.get(index)
    together = images.together(torch.arange(60))
    assert together is not None
    assert together.device.type == "cpu"


def test_images_of_several_sizes_come_together_where_they_are_alike(tmp_path: Path) -> None:
    """The first one's size counts; those of others are kept one by one, as far as there is room."""
    for number, side in enumerate([32, 32, 16, 32, 64, 32]):
        (tmp_path / f"{number}.png").write_bytes(encode(Image.fromarray(picture(number, (side, side))), "PNG"))
    source = open_source(tmp_path)
    images = DecodedImages(source, 6 * 3072 + 1000)
    same_images(images, truth(source))
    same_images(images, truth(source))
    assert images.n_kept == 5  # The one of 64 finds no room.
    assert images.together(torch.tensor([0, 1, 3, 5])) is not None
    assert images.together(torch.tensor([0, 2])) is None
    assert images.together(torch.tensor([0, 4])) is None


@pytest.mark.parametrize("side", [64, 65])
def test_larger_images_are_not_scaled_together_on_a_processor(side: int, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encode(Image.fromarray(picture(number, (side, 40))), "PNG"))
    images = DecodedImages(open_source(tmp_path), 10**6)
    same_images(images, truth(images.source))
    assert (images.together(torch.arange(3)) is not None) == (side == 64)


def test_kept_views_are_those_that_were_put() -> None:
    views = torch.randint(0, 256, (10, 3, 7, 7), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    kept = KeptViews(10, 7)
    assert kept.take(torch.tensor([1])) is None
    kept.put(torch.tensor([4, 1, 9]), views[[4, 1, 9]])
    assert kept.take(torch.tensor([1, 2])) is None
    got = kept.take(torch.tensor([9, 1, 9]))
    assert got is not None
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, views[[9, 1, 9]], rtol=0, atol=0)
    nothing = kept.take(torch.empty(0, dtype=torch.int64))
    assert nothing is not None
    assert nothing.shape == (0, 3, 7, 7)


# The batches


def batches_of(loader: Loader, count: int) -> list[Batch]:
    """Two epochs of both views, the second of which finds what the first has kept."""
    order = torch.from_numpy(np.random.default_rng(0).integers(0, count, 90))
    found: list[Batch] = []
    for epoch in range(2):
        found += loader.cluster_views(ClusterView(28), torch.arange(count), 16)
        found += loader.training_views(TrainingView(24), order, 16, seed=3, epoch=epoch)
    return found


def damage_half(folder: Path) -> None:
    for number, path in enumerate(sorted(folder.glob("images/*/*.pixels"))):
        if number % 2:
            content = bytearray(path.read_bytes())
            content[len(content) // (2 + number)] ^= 255
            path.write_bytes(content[: -50 if number == 3 else None])


@pytest.fixture(scope="module", params=["mixed", "uniform"])
def plain(request: pytest.FixtureRequest) -> tuple[Path, list[Batch]]:
    """A folder, and its batches as they are without a cache or threads."""
    data = request.getfixturevalue(request.param)
    with closing(Loader(DecodedImages(open_source(data)), workers=0)) as loader:
        return data, batches_of(loader, len(loader.images))


@pytest.mark.parametrize("kept", ["nothing", "some memory", "memory", "empty files", "full files", "damaged files"])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_are_the_same_wherever_images_are_kept(
    workers: int, kept: str, plain: tuple[Path, list[Batch]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_shards, "SHARD_BYTES", 30_000)
    data, want = plain
    source = open_source(data)
    memory_bytes = {"memory": 10**9, "some memory": 100_000}.get(kept, 0)
    plan = CachePlan(3000 * len(source), memory_bytes, tmp_path if "files" in kept else None)
    if kept in ("full files", "damaged files"):
        with closing(Loader(decoded_images(source, plan, reduce_to=0, data=data), workers=0)) as filling:
            list(filling.read_all(torch.arange(len(source))))
    if kept == "damaged files":
        damage_half(tmp_path)
    images = decoded_images(source, plan, reduce_to=0, data=data)
    with closing(Loader(images, workers=workers)) as loader:
        got = batches_of(loader, len(source))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.images_BCHW, other.images_BCHW, rtol=0, atol=0)
        torch.testing.assert_close(one.indices_B, other.indices_B, rtol=0, atol=0)
        np.testing.assert_array_equal(one.draws_BR, other.draws_BR)
    if images.shards is not None:
        assert images.shards.n_damaged == (3 if kept == "damaged files" else 0)
        assert images.shards.complaint is None
        # Threads that are far apart can leave a file unfinished, which is let go for others: one pass in order ends it.
        with closing(Loader(images, workers=0)) as loader:
            list(loader.read_all(torch.arange(len(source))))
        assert len(list(tmp_path.glob("images/*/*.pixels"))) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_which_all_are_unreadable_are_empty_though_others_come_together(workers: int, tmp_path: Path) -> None:
    """All good images are small and of one size: they are one tensor, of which such a batch takes nothing."""
    for number in range(12):
        content = b"spoiled" if 4 <= number < 8 else encode(Image.fromarray(picture(number, (32, 32))), "PNG")
        (tmp_path / f"{number:02}.png").write_bytes(content)
    with closing(Loader(DecodedImages(open_source(tmp_path), 10**6), workers=workers)) as loader:
        list(loader.read_all(torch.arange(12)))
        for view in (ClusterView(28), ClusterView(32)):
            for _ in range(2):
                batches = list(loader.cluster_views(view, torch.arange(12), 4))
                assert [tuple(batch.images_BCHW.shape) for batch in batches] == [
                    (count, 3, view.size, view.size) for count in (4, 0, 4)
                ]
        trained = list(loader.training_views(TrainingView(24), torch.arange(12), 4, seed=0, epoch=0))
        assert [len(batch.images_BCHW) for batch in trained] == [4, 0, 4]


def test_room_that_these_images_take_already_counts_as_free(
    machine: Callable[[float, float], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the second run would find too little room left by the files of the first."""
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path))
    for name, kept in (("these", 3 * WITH_SAFETY), ("others", 3 * WITH_SAFETY)):
        (tmp_path / "images" / name).mkdir(parents=True)
        with (tmp_path / "images" / name / "images-0-9.pixels").open("wb") as file:
            file.truncate(kept)
    machine(0, module.DISK_RESERVE)
    assert plan_cache("auto", None, NEEDED, "these").folder == tmp_path
    assert plan_cache("auto", None, NEEDED, "others-still").folder is None
    assert plan_cache("auto", None, NEEDED).folder is None
