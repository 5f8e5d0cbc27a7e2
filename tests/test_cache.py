"""Where decoded images are kept is planned by what there is room for; wherever it is, they are the same images."""

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from spoiled_images import encode, picture, write_good_images, write_spoiled_images
from thread_ranks import on_ranks
from torch import Tensor

from deepcluster.core.device import free_disk_bytes
from deepcluster.core.errors import UnreadableImage
from deepcluster.data import cache as module
from deepcluster.data import loader as loading
from deepcluster.data.cache import (
    AUTO_SHARE,
    DISK_SHARE,
    MEMORY_SHARE,
    SAFETY,
    CachePlan,
    DecodedImages,
    decoded_images,
    plan_cache,
)
from deepcluster.data.decode import decode
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.pack import DISK_RESERVE, about_pack
from deepcluster.data.sources import open_source
from deepcluster.data.sources.arrays import ArraySource
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.views import ClusterView, TrainingView

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

NEEDED = 10**9
WITH_SAFETY = int(SAFETY * NEEDED)


# Plans


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    path = tmp_path_factory.mktemp("array") / "images.npy"
    np.save(path, np.zeros((3, 4, 4), np.uint8))
    return ArraySource(path)


def plan_of(source: ImageSource, cache: str = "auto", folder: Path | None = None, **other: Any) -> CachePlan:
    return plan_cache(cache, folder, NEEDED, source, **{"reduce_to": 0, "data": "/data/photos", **other})


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
    monkeypatch: pytest.MonkeyPatch, array: ImageSource,
) -> None:  # fmt: skip
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "not" / "yet"))
    machine(free_memory, free_disk)
    plan = plan_of(array)
    assert plan.needed_bytes == WITH_SAFETY
    assert (plan.file is not None) == (where == "folder")
    if plan.file is not None:
        assert plan.file.parent == tmp_path / "not" / "yet" / "images"
    assert plan.memory_bytes == (0 if where in ("folder", "nothing") else int(AUTO_SHARE * free_memory))
    assert (plan.memory_bytes >= plan.needed_bytes) == (where == "memory")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("free_memory", [0, 10**8, 10**9, 10**12])
@pytest.mark.parametrize("free_disk", [0, PLENTY])
def test_what_is_asked_for_is_done(
    free_memory: float, free_disk: float, machine: Callable[[float, float], None], tmp_path: Path, array: ImageSource
) -> None:
    machine(free_memory, free_disk)
    assert plan_of(array, "memory") == CachePlan(WITH_SAFETY, int(MEMORY_SHARE * free_memory))
    assert plan_of(array, "none") == CachePlan(WITH_SAFETY)
    plan = plan_of(array, "anything", tmp_path)
    assert plan.file is not None
    assert plan.file.parent == tmp_path / "images"
    assert (plan.memory_bytes, plan.needed_bytes) == (0, WITH_SAFETY)


def test_the_disk_of_a_folder_that_is_not_there_yet_is_that_of_its_parents(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "a" / "b", tmp_path / "file", tmp_path / "file" / "below"):
        assert free_disk_bytes(folder) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_a_plan_says_in_a_few_words_where_images_are_kept(tmp_path: Path) -> None:
    gigabyte, file = 10**9, tmp_path / "a.pack"
    assert CachePlan(3 * gigabyte, file=file).describe() == f"3.0 GB in {file}"
    assert CachePlan(3 * gigabyte, 4 * gigabyte).describe() == "3.0 GB in memory"
    some = "1.0 GB of 3.0 GB in memory, the others decoded in each epoch"
    assert CachePlan(3 * gigabyte, gigabyte).describe() == some
    assert CachePlan(3 * gigabyte).describe() == "none, all images are decoded in each epoch"


def test_room_that_these_images_take_already_counts_as_free(
    machine: Callable[[float, float], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: ImageSource
) -> None:
    """Else the second run would find too little room left by the file of the first."""
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path))
    machine(0, PLENTY)
    file = plan_of(array).file
    assert file is not None
    machine(0, DISK_RESERVE)
    assert plan_of(array).file is None
    file.parent.mkdir()
    with file.open("wb") as opened:
        opened.truncate(3 * WITH_SAFETY)
    assert plan_of(array).file == file
    assert plan_of(array, reduce_to=8).file is None


# The file of a set of images


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


def file_of(source: ImageSource, data: "Path | str | list[Path]", reduce_to: int = 0) -> Path:
    plan = plan_cache("", Path("/cache"), NEEDED, source, reduce_to=reduce_to, data=data)
    assert plan.file is not None
    return plan.file


def test_the_file_is_that_of_the_data_the_size_and_the_decoders(
    mixed: Path, uniform: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(mixed)
    usual = file_of(source, mixed)
    copy = tmp_path / "copy"
    shutil.copytree(mixed, copy)
    monkeypatch.chdir(mixed.parent)
    assert file_of(open_source(mixed), mixed) == usual
    assert file_of(source, str(mixed)) == file_of(source, mixed.name) == usual
    others = [
        file_of(source, mixed, reduce_to=64),
        file_of(source, mixed, reduce_to=65),
        file_of(open_source(mixed, 30), mixed),
        file_of(open_source(copy), copy),  # the same names elsewhere
        file_of(open_source(uniform), uniform),
        file_of(open_source([mixed, uniform]), [mixed, uniform]),
        file_of(open_source([uniform, mixed]), [uniform, mixed]),
        file_of(source, "https://host/mixed"),
    ]
    monkeypatch.setattr(module, "version", lambda package: f"{package} of tomorrow")
    others.append(file_of(source, mixed))
    assert len({usual, *others}) == 1 + len(others)


def test_names_that_are_not_utf8_have_a_folder(uniform: Path) -> None:
    file_of(open_source(uniform), "photos-\udce9")


def test_what_a_pack_says_is_what_was_opened(uniform: Path, tmp_path: Path) -> None:
    source = open_source(uniform)
    plan = plan_cache("", tmp_path, NEEDED, source, reduce_to=16, data=[uniform, "https://host/photos?token=secret"])
    decoded_images(source, plan, reduce_to=16)
    assert plan.file is not None
    about = about_pack(plan.file)
    assert about.startswith(f"decoded images of {uniform}, https://host/photos")
    assert about.endswith(", shorter side at most 16")
    assert "secret" not in about


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


def plan_in(source: ImageSource, folder: Path | None, memory_bytes: int = 0, reduce_to: int = 0) -> CachePlan:
    if folder is None:
        return CachePlan(NEEDED, memory_bytes)
    return plan_cache("", folder, NEEDED, source, reduce_to=reduce_to, data="photos")


def filled(source: ImageSource, plan: CachePlan, reduce_to: int = 0, **other: Any) -> DecodedImages:
    images = decoded_images(source, plan, reduce_to=reduce_to, **other)
    with closing(Loader(images, workers=0, tell=lambda line: None)) as loader:
        loader.fill(lambda images: None)
    return images


@pytest.mark.parametrize("shorter_side", [None, 24])
@pytest.mark.parametrize("where", ["nowhere", "some memory", "memory", "file"])
@pytest.mark.parametrize("kind", ["mixed", "uniform"])
@pytest.mark.parametrize("is_filled", [True, False])
def test_images_are_those_that_are_decoded(
    is_filled: bool, kind: str, where: str, shorter_side: int | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = open_source(request.getfixturevalue(kind))
    want, reduce_to = truth(source, shorter_side), shorter_side or 0
    memory_bytes = {"some memory": 100_000, "memory": 10**9}.get(where, 0)
    plan = plan_in(source, tmp_path if where == "file" else None, memory_bytes, reduce_to)
    for _ in range(2):
        images = (filled if is_filled else decoded_images)(source, plan, reduce_to=reduce_to)
        for _ in range(2):
            same_images(images, want)
    assert (images.pack is None) == (where == "nowhere")


@pytest.mark.parametrize("how", ["filled", "visited"])
def test_images_that_are_in_a_file_are_not_read_again(
    how: str, uniform: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(uniform)
    want, plan = truth(source), plan_in(source, tmp_path)
    if how == "filled":
        filled(source, plan)
    else:
        same_images(decoded_images(source, plan, reduce_to=0), want)
    monkeypatch.setattr(source, "read", None)
    same_images(filled(source, plan), want)


def test_photos_that_have_changed_since_are_not_taken_from_the_file_though_nothing_fills_it(
    uniform: Path, tmp_path: Path
) -> None:
    """As an evaluation does, which reads the images as it comes to them."""
    photos = Path(shutil.copytree(uniform, tmp_path / "photos"))
    source = open_source(photos)
    plan = plan_in(source, tmp_path)
    filled(source, plan)
    changed = photos / "07.jpeg"
    changed.write_bytes(encode(Image.fromarray(picture(1007, (30, 31))), "JPEG"))
    images, indices_B = decoded_images(source, plan, reduce_to=0), np.arange(60)
    found, _, _ = images.some(indices_B)
    for got, want in zip(found, truth(source), strict=True):
        assert isinstance(want, Tensor)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_images_that_could_not_be_read_are_tried_again_by_the_next_run(
    uniform: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(uniform)
    plan, read, asked = plan_in(source, tmp_path), source.read, list[int]()

    def fails(index: int) -> object:
        asked.append(index)
        if index == 5:
            raise UnreadableImage("timed out")
        return b"spoiled" if index == 6 else read(index)

    monkeypatch.setattr(source, "read", fails)
    with closing(Loader(decoded_images(source, plan, reduce_to=0), workers=0)) as loader:
        loader.fill(lambda images: None)
        assert loader.unreadable == {5: "timed out", 6: "not an image: text"}
    asked.clear()
    with closing(Loader(decoded_images(source, plan, reduce_to=0), workers=0)) as loader:
        loader.fill(lambda images: None)
    assert asked == [5, 6]


def test_uniform_small_images_come_together(uniform: Path) -> None:
    source = open_source(uniform)
    want_NHWC = torch.stack([one for one in truth(source) if isinstance(one, Tensor)])
    indices_B = np.array([3, 59, 3, 0, 17])
    for images in (DecodedImages(source), filled(source, CachePlan(NEEDED, 10**6))):
        together, rows, unreadable = images.some(indices_B)
        assert isinstance(together, Tensor)
        torch.testing.assert_close(together, want_NHWC[indices_B], rtol=0, atol=0)
        assert (np.arange(5)[rows].tolist(), unreadable) == ([0, 1, 2, 3, 4], {})


@pytest.mark.parametrize("side", [64, 65])
def test_larger_images_and_images_of_several_sizes_do_not_come_together(side: int, tmp_path: Path) -> None:
    for number, height in enumerate([side, side, 20, side]):
        (tmp_path / f"{number}.png").write_bytes(encode(Image.fromarray(picture(number, (40, height))), "PNG"))
    source = open_source(tmp_path)
    for images in (DecodedImages(source), filled(source, CachePlan(NEEDED, 10**6))):
        assert isinstance(images.some(np.array([0, 1, 3]))[0], Tensor) == (side == 64)
        assert isinstance(images.some(np.array([0, 1, 2]))[0], list)


def test_the_ranks_of_a_machine_keep_images_once(uniform: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plan = open_source(uniform), CachePlan(NEEDED, 10**6)
    want = truth(source)
    shared = on_ranks([0, 1, 2], lambda share, ranks: decoded_images(source, plan, reduce_to=0, ranks=ranks))
    assert len({images.pack.path for images in shared}) == 1
    same_images(shared[1], want)
    monkeypatch.setattr(source, "read", None)
    same_images(shared[2], want)
    names = iter(["one", "other", "one"])
    monkeypatch.setattr(module, "_machine", lambda: next(names))
    apart = on_ranks([0, 1, 2], lambda share, ranks: decoded_images(source, plan, reduce_to=0, ranks=ranks))
    assert len({images.pack.path for images in apart}) == 2


def test_a_folder_that_cannot_be_written_to_is_told_and_done_without(uniform: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    source, told = open_source(uniform), list[str]()
    plan = plan_in(source, tmp_path / "file")
    images = decoded_images(source, plan, reduce_to=0, tell=told.append)
    assert images.pack is None
    assert told == [f"{plan.file} can't be written to (not a directory): all images are decoded in each epoch"]


# The batches


def batches_of(loader: Loader, count: int) -> list[Batch]:
    """Two epochs of both views, the second of which finds what the first has kept."""
    order = torch.from_numpy(np.random.default_rng(0).integers(0, count, 90))
    found: list[Batch] = []
    for epoch in range(2):
        found += loader.cluster_views(ClusterView(28), torch.arange(count), 16)
        found += loader.training_views(TrainingView(24), order, 16, seed=3, epoch=epoch)
    return found


@pytest.fixture(scope="module", params=["mixed", "uniform"])
def plain(request: pytest.FixtureRequest) -> tuple[Path, list[Batch]]:
    """A folder, and its batches as they are without a cache or threads."""
    data = request.getfixturevalue(request.param)
    with closing(Loader(DecodedImages(open_source(data)), workers=0)) as loader:
        return data, batches_of(loader, len(loader.images))


@pytest.mark.parametrize("kept", ["nothing", "some memory", "memory", "empty file", "full file", "damaged file", "cut file"])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_are_the_same_wherever_images_are_kept(
    workers: int, kept: str, plain: tuple[Path, list[Batch]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LEAST_IMAGES", {"fork": 1})
    data, want = plain
    source, told = open_source(data), list[str]()
    memory_bytes = {"memory": 10**9, "some memory": 100_000}.get(kept, 0)
    plan = plan_in(source, tmp_path if "file" in kept else None, memory_bytes)
    if kept in ("full file", "damaged file", "cut file"):
        pack = filled(source, plan).pack
        assert pack is not None
        content = bytearray(pack.path.read_bytes())
        if kept == "damaged file":
            for start in pack._rows["start"][5::10].tolist():
                content[start + 1] ^= 16 * (start > 0)
        pack.path.write_bytes(content[: -5000 if kept == "cut file" else None])
    images = decoded_images(source, plan, reduce_to=0)
    with closing(Loader(images, workers=workers, tell=told.append)) as loader:
        if kept != "empty file":
            loader.fill(lambda images: None)
        got = batches_of(loader, len(source))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.images_BCHW, other.images_BCHW, rtol=0, atol=0)
        torch.testing.assert_close(one.indices_B, other.indices_B, rtol=0, atol=0)
        np.testing.assert_array_equal(one.draws_BR, other.draws_BR)
    if kept in ("damaged file", "cut file"):
        assert told
        assert all("damaged in" in line and "decoded again" in line and str(plan.file) in line for line in told)
        again = decoded_images(source, plan, reduce_to=0).pack
        assert again is not None
        assert sum(again.get(index) is not None for index in range(len(source))) == len(source) - len(loader.unreadable)
        assert again.n_damaged == 0
    elif kept == "some memory":
        assert len(told) == 1
    else:
        assert told == []


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_which_all_are_unreadable_are_empty_though_others_come_together(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All good images are small and of one size: they are one tensor, of which such a batch takes nothing."""
    monkeypatch.setattr(loading, "LEAST_IMAGES", {"fork": 1})
    for number in range(12):
        content = b"spoiled" if 4 <= number < 8 else encode(Image.fromarray(picture(number, (32, 32))), "PNG")
        (tmp_path / f"{number:02}.png").write_bytes(content)
    images = decoded_images(open_source(tmp_path), CachePlan(NEEDED, 10**6), reduce_to=0)
    with closing(Loader(images, workers=workers)) as loader:
        loader.fill(lambda images: None)
        for view in (ClusterView(28), ClusterView(32)):
            batches = list(loader.cluster_views(view, torch.arange(12), 4))
            assert [tuple(batch.images_BCHW.shape) for batch in batches] == [
                (count, 3, view.size, view.size) for count in (4, 0, 4)
            ]
        trained = list(loader.training_views(TrainingView(24), torch.arange(12), 4, seed=0, epoch=0))
        assert [len(batch.images_BCHW) for batch in trained] == [4, 0, 4]
