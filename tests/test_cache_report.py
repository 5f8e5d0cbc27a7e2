"""What lies in the cache folder is shown and deleted, and nothing else is."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from test_pack import COUNT, fill, image, missing, same

from deepcluster.core.errors import InputError
from deepcluster.data.pack import Pack
from deepcluster.run.cache_report import KINDS, clear, kept

ABOUT = "decoded images of /data/photos, shorter side at most 256"
NAME = "0123456789abcdef"


def write(path: Path, content: bytes = b"12345") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def a_cache(folder: Path) -> Path:
    """Something of each kind."""
    name = "0123456789abcdef" * 2
    write(folder / "lists" / f"{name}.npz")
    write(folder / "shards" / name)
    write(folder / "unpacked" / f"{name}-{name}")
    write(folder / "blocks" / "01" / name)
    write(folder / "blocks" / "ff" / name)
    write(folder / "features" / f"{name}.npy")
    write(folder / "unfinished" / f"{name}.pt")
    fill(Pack(folder / "images" / f"{NAME}.pack", COUNT, ABOUT))
    write(folder / "images" / NAME / "layout.json")  # of version 0.1.0
    write(folder / "images" / NAME / "images-000-009.pixels")
    return folder


def test_what_is_kept_is_told(tmp_path: Path) -> None:
    things = kept(a_cache(tmp_path / "cache"))
    assert [thing.kind for thing in things] == [*KINDS, "images"]
    assert [thing.files for thing in things] == [1, 1, 1, 2, 1, 1, 2, 1]
    assert [thing.bytes for thing in things[:7]] == [5, 5, 5, 10, 5, 5, 10]
    pack = things[7]
    assert pack.path == tmp_path / "cache" / "images" / f"{NAME}.pack"
    assert (pack.bytes, pack.about) == (pack.path.stat().st_size, ABOUT)
    assert abs(pack.last_used - time.time()) < 100
    assert pack.describe().startswith(f"images      {pack.bytes / 1000:.0f} kB in 1 file, used 20")
    pack.path.write_bytes(b"spoiled")
    assert kept(tmp_path / "cache")[7].about == "decoded images"
    assert kept(tmp_path / "nothing") == []


def test_the_last_use_of_decoded_images_is_when_a_run_opened_them(tmp_path: Path) -> None:
    path = a_cache(tmp_path) / "images" / f"{NAME}.pack"
    os.utime(path, (1000, 1000))
    assert kept(tmp_path)[-1].last_used == 1000
    Pack(path, COUNT)
    assert abs(kept(tmp_path)[-1].last_used - time.time()) < 100


def test_all_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    folder, outside = a_cache(tmp_path / "cache"), tmp_path / "outside"
    name = "0123456789abcdef" * 2
    abandoned = folder / "blocks" / "aa" / f"{name}.77-140.part"
    write(abandoned)
    os.utime(abandoned, (1, 1))
    others = [
        folder / "notes.txt",
        folder / "lists" / "mine.npz",
        folder / "other" / name,
        folder / "shards" / "deep" / name,
        folder / "blocks" / name,
        folder / "blocks" / "01" / "readme",
        folder / "images" / NAME / "photo.png",
        folder / "images" / "mine" / "layout.json",
        folder / "images" / "mine.pack",
        folder / "images" / f"{NAME}.pack.zip",
        folder / "lists" / f"{name}.npz.77-140.part",  # being written at this moment
        outside / name,
    ]
    for path in others:
        write(path)
    (folder / "shards" / name[::-1]).symlink_to(outside / name)
    (folder / "blocks" / "bb").symlink_to(outside, target_is_directory=True)
    expected = sum(thing.bytes for thing in kept(folder)) - 5
    assert clear(folder) == expected
    assert [thing.kind for thing in kept(folder)] == ["lists"]
    assert all(path.read_bytes() == b"12345" for path in others)
    assert not abandoned.exists()
    assert not (folder / "unpacked").exists()
    assert not (folder / "blocks" / "ff").exists()
    assert clear(folder) == 0
    assert clear(tmp_path / "nothing") == 0


def test_a_subfolder_that_is_a_link_is_left_alone(tmp_path: Path) -> None:
    real = a_cache(tmp_path / "real")
    (tmp_path / "cache").mkdir()
    for kind in KINDS:
        (tmp_path / "cache" / kind).symlink_to(real / kind, target_is_directory=True)
    before = kept(real)
    assert kept(tmp_path / "cache") == []
    assert clear(tmp_path / "cache") == 0
    assert kept(real) == before
    assert (tmp_path / "cache" / "lists").is_symlink()


def test_some_kinds_are_deleted(tmp_path: Path) -> None:
    folder = a_cache(tmp_path)
    assert clear(folder, ["blocks", "lists"]) == 15
    assert [thing.kind for thing in kept(folder)] == ["shards", "unpacked", "features", "unfinished", "images", "images"]
    with pytest.raises(InputError, match=r"nothing called 'image' is kept \(did you mean images\?\); there are lists, "):
        clear(folder, ["shards", "image"])
    assert len(kept(folder)) == 6


def test_a_run_goes_on_while_its_images_are_deleted(tmp_path: Path) -> None:
    """Cleared again and again by another thread; each new run fills the file that is there."""
    path, over = tmp_path / "images" / f"{NAME}.pack", threading.Event()

    def clear_often() -> None:
        while not over.is_set():
            clear(tmp_path)
            time.sleep(0.001)

    with ThreadPoolExecutor(1) as pool:
        clearing = pool.submit(clear_often)
        try:
            for _ in range(40):
                with suppress(FileNotFoundError):  # Deleted between its making and its opening: that run keeps nothing.
                    pack = fill(Pack(path, COUNT))
                    assert (missing(pack), pack.complaint, pack.n_damaged) == ([], "", 0)
        finally:
            over.set()
        clearing.result()
    fill(Pack(path, COUNT))
    assert same(Pack(path, COUNT).get(0), image(0))
