"""Decoded images in files come back as they were or not at all, whatever happens to the files, and whoever writes them."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.data import image_shards as module
from deepcluster.data import pixel_files
from deepcluster.run.cache_report import KINDS, clear, kept
from deepcluster.data.image_shards import ImageShards
from deepcluster.data.pixel_files import Known
from deepcluster.data.sources.image_source import ImageSource

ABOUT = {"data": ["/data/photos"], "images": "photos", "reduce_to": 256}


class Stamped(ImageSource):
    """So many images, each with a stamp."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.stamps = [f"{index}-1" for index in range(count)]

    def __len__(self) -> int:
        return len(self.stamps)

    def name(self, index: int) -> str:
        return f"{index}.png"

    def details(self) -> str:
        return "made up"

    def stamp(self, index: int) -> str:
        return self.stamps[index]

    def read(self, index: int) -> bytes:
        raise AssertionError("not asked for")


@functools.cache
def known(index: int, seed: int = 0) -> Known:
    """An image of any size from 1 to 40 pixels a side; each 7th can't be decoded."""
    random_ = np.random.default_rng([seed, index])
    if index % 7 == 3:
        return f"damaged: number {index}, näml\udcefch"
    height, width = random_.integers(1, 41, 2)
    return torch.from_numpy(random_.integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(got: Known | None, want: Known | None) -> bool:
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        return got.dtype == torch.uint8 and got.shape == want.shape and bool((got == want).all())
    return type(got) is type(want) and got == want


def fill(shards: ImageShards, order: "list[int] | range | None" = None) -> ImageShards:
    for index in range(len(shards._source)) if order is None else order:
        shards.put(index, known(index))
    return shards


def all_back(shards: ImageShards) -> None:
    for _ in range(2):
        for index in range(len(shards._source)):
            assert same(shards.get(index), known(index)), index


def right_or_nothing(shards: ImageShards) -> int:
    """How many are not there any more; none may be wrong."""
    found = [shards.get(index) for index in range(len(shards._source))]
    assert all(one is None or same(one, known(index)) for index, one in enumerate(found))
    return sum(one is None for one in found)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images of 1,000 bytes make a shard."""
    monkeypatch.setattr(module, "SHARD_BYTES", 10_000)


def shards_of(folder: Path, count: int = 34) -> ImageShards:
    return ImageShards(folder, Stamped(count), ABOUT, expected_bytes=1000 * count)


pytestmark = pytest.mark.usefixtures("small")


# What is put comes back


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 30, 34])
def test_what_is_put_comes_back(count: int, tmp_path: Path) -> None:
    shards = shards_of(tmp_path / "a" / "b", count)
    assert shards.get(0) is None
    all_back(fill(shards))
    all_back(shards_of(tmp_path / "a" / "b", count))
    assert (shards.complaint, shards.n_damaged) == (None, 0)
    files = [f"images-{first:09d}-{min(first + 10, count) - 1:09d}.pixels" for first in range(0, count, 10)]
    assert names(tmp_path / "a" / "b") == [*files, "layout.json"]


def test_what_is_put_comes_back_in_a_new_process(tmp_path: Path) -> None:
    fill(shards_of(tmp_path))
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_image_shards import all_back, shards_of
all_back(shards_of(Path({str(tmp_path)!r})))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_images_that_are_no_block_of_memory_come_back(tmp_path: Path) -> None:
    image_HWC = torch.arange(5 * 7 * 3, dtype=torch.uint8).view(5, 3, 7).permute(0, 2, 1)
    shards = ImageShards(tmp_path, Stamped(1), ABOUT)
    shards.put(0, image_HWC)
    assert same(shards.get(0), image_HWC.contiguous())


def test_nothing_is_there_before_a_shard_is_full(tmp_path: Path) -> None:
    shards = fill(shards_of(tmp_path), range(9))
    assert right_or_nothing(shards) == 34
    shards.put(9, known(9))
    assert right_or_nothing(shards) == 24


@pytest.mark.parametrize("first", ["image", "unreadable"])
def test_without_an_expectation_the_first_image_fixes_the_layout(first: str, tmp_path: Path) -> None:
    shards = ImageShards(tmp_path, Stamped(7), ABOUT)
    if first == "unreadable":
        shards.put(3, "damaged")
        shards.put(0, None)
        assert not list(tmp_path.iterdir())
    shards.put(2, torch.ones(1, 1000, 3, dtype=torch.uint8))
    assert json.loads((tmp_path / "layout.json").read_text()) == {"format": 1, "images_in_a_shard": 3, **ABOUT}
    for index in (0, 1, 4, 5, 6, *([3] if first == "image" else [])):
        shards.put(index, torch.full((2, 3, 3), index, dtype=torch.uint8))
    again = ImageShards(tmp_path, Stamped(7), ABOUT)
    assert same(again.get(6), torch.full((2, 3, 3), 6, dtype=torch.uint8))
    assert same(again.get(3), "damaged" if first == "unreadable" else torch.full((2, 3, 3), 3, dtype=torch.uint8))
    assert len(names(tmp_path)) == 4


def test_shards_of_nothing_but_unreadable_images(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, 12)
    for index in range(12):
        shards.put(index, f"damaged: {index}")
    assert [shards_of(tmp_path, 12).get(index) for index in range(12)] == [f"damaged: {index}" for index in range(12)]


def test_what_could_not_be_read_is_not_known_and_holds_up_nothing(tmp_path: Path) -> None:
    """Reasons of `unreadable` are the loader's: a server that was down, too. Those that were put are of the content."""
    shards = shards_of(tmp_path, 20)
    shards.unreadable = {3: "damaged: number 3", 5: "timed out", 12: "timed out"}
    shards.put(3, "damaged: number 3")
    shards.put(6, None)
    for index in (*range(3), 4, *range(7, 12), *range(13, 20)):
        shards.put(index, torch.full((1, 1, 3), index, dtype=torch.uint8))
    again = shards_of(tmp_path, 20)
    found = [again.get(index) for index in range(20)]
    assert [index for index, one in enumerate(found) if one is None] == [5, 6, 12]
    assert found[3] == "damaged: number 3"
    before = names(tmp_path)
    again.put(5, torch.zeros(1, 1, 3, dtype=torch.uint8))  # It has no place there; nothing is lost.
    assert again._pending == {}
    assert again.get(4) is not None
    assert names(tmp_path) == before


def test_putting_an_image_twice_or_late_changes_nothing(tmp_path: Path) -> None:
    shards = fill(shards_of(tmp_path), [*range(9), 0, 4, 9, 4, *range(10, 34)])
    all_back(shards)
    all_back(fill(shards_of(tmp_path)))


# Many threads, many processes


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_any_order_by_any_number_of_threads(threads: int, tmp_path: Path) -> None:
    shards = shards_of(tmp_path, 100)
    order = [index for index in range(100) for _ in range(2)]
    random.Random(threads).shuffle(order)

    def visit(index: int) -> None:
        found = shards.get(index)
        assert found is None or same(found, known(index))
        if found is None:
            shards.put(index, known(index))

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2):
            list(pool.map(visit, order))
        list(pool.map(visit, range(100)))
    all_back(shards)
    assert shards._pending == {} or all(shards.get(index) is not None for index in range(100))
    assert len(names(tmp_path)) == 11


def start_child(task: Callable[[], object]) -> int:
    """Run `task` in a process of its own, which ends with status 0 if all is well; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        task()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(task: Callable[[], object]) -> None:
    assert status_of(start_child(task)) == 0


processes = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def fill_slowly(folder: Path, count: int, rounds: int) -> None:
    shards = shards_of(folder, count)
    for _ in range(rounds):
        for index in range(count):
            found = shards.get(index)
            assert found is None or same(found, known(index))
            if found is None:
                time.sleep(0.0002)
                shards.put(index, known(index))
    assert (shards.complaint, shards.n_damaged) == (None, 0)


@processes
def test_two_processes_fill_one_folder(tmp_path: Path) -> None:
    children = [start_child(lambda: fill_slowly(tmp_path, 500, rounds=2)) for _ in range(2)]
    assert [status_of(child) for child in children] == [0, 0]
    all_back(shards_of(tmp_path, 500))
    assert len(names(tmp_path)) == 51
    assert not list(tmp_path.glob("*.part"))


def test_of_two_layouts_that_are_written_at_once_one_counts(tmp_path: Path) -> None:
    """Sixteen runs begin at the same moment, each with an image of another size."""
    sources = [ImageShards(tmp_path, Stamped(50), ABOUT) for _ in range(16)]
    together = threading.Barrier(16)

    def begin(number: int) -> None:
        together.wait()
        sources[number].put(number, torch.zeros(10, 10 + number, 3, dtype=torch.uint8))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(begin, range(16)))
    assert len({shards._in_shard for shards in sources}) == 1
    assert {shards._keep_layout(number + 1) for number, shards in enumerate(sources)} == {sources[0]._in_shard}
    assert names(tmp_path) == ["layout.json"]


def test_what_another_run_has_written_meanwhile_is_not_written_again(tmp_path: Path) -> None:
    slow = fill(shards_of(tmp_path), range(9))
    fill(shards_of(tmp_path))
    path = tmp_path / names(tmp_path)[0]
    before = path.stat().st_ino, path.stat().st_mtime_ns
    slow.put(9, known(9))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    all_back(slow)


@processes
def test_a_process_that_is_killed_while_it_writes_leaves_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slowed at each image that it writes, so that the kill falls into one; then another run goes on."""

    def slowly() -> None:
        def slow_checksum(content: bytes) -> int:
            time.sleep(0.002)
            return crc32(content)

        monkeypatch.setattr(pixel_files, "crc32", slow_checksum)
        fill_slowly(tmp_path, 200, rounds=1)

    for attempt in range(30):
        child = start_child(slowly)
        time.sleep(0.03 + 0.007 * attempt)
        os.kill(child, signal.SIGKILL)
        assert status_of(child) in (0, -signal.SIGKILL)
        right_or_nothing(shards_of(tmp_path, 200))
        if list(tmp_path.glob("images*.part")):
            break
    old, fresh = next(tmp_path.glob("images*.part")), tmp_path / "images-000000000-000000009.pixels.1-1.part"
    fresh.write_bytes(b"another run writes this now")
    os.utime(old, (1, 1))
    all_back(fill(shards_of(tmp_path, 200)))
    assert not old.exists()
    assert fresh.exists()


# Damage


def damage(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = chance.choice(["flip", "flip", "flip", "zero", "cut", "more", "noise", "empty", "end", "turn"])
    place = chance.randrange(len(content))
    # Half of the places are in the table at the end, where damage is the most dangerous.
    if chance.random() < 0.5:
        place = max(0, len(content) - 1 - chance.randrange(1500))
    length = chance.choice([1, 8, 64, 1000])
    if kind == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        content[place : place + length] = bytes(len(content[place : place + length]))
    elif kind == "cut":
        del content[place:]
    elif kind == "more":
        content[place:place] = chance.randbytes(length)
    elif kind == "noise":
        content[place : place + length] = chance.randbytes(len(content[place : place + length]))
    elif kind == "empty":
        content = bytearray(chance.choice([0, 1, 15, 16, 17, len(content)]))
    elif kind == "end":
        content[-16:] = chance.randbytes(16)
    else:
        content.reverse()
    path.write_bytes(content)
    return f"{kind} {place} {path.name}"


def damage_many_times(folder: Path, count: int) -> None:
    """Damage a file, read all, fill again, mend it."""
    paths = sorted(folder.iterdir())
    whole = {path: path.read_bytes() for path in paths}
    for seed in range(count):
        chance = random.Random(seed)
        path = chance.choice(paths)
        what = damage(path, chance)
        is_damaged = path.read_bytes() != whole[path]
        shards = shards_of(folder)
        missing = right_or_nothing(shards)
        if path.suffix == ".pixels":
            assert (missing > 0, shards.n_damaged, path.exists()) == (is_damaged, is_damaged, not is_damaged), (seed, what)
        else:
            assert missing in (0, 34), (seed, what)
        if seed % 5 == 0:
            all_back(fill(shards))
        for other in set(folder.iterdir()) - set(paths):
            other.unlink()
        for mended, content in whole.items():
            mended.write_bytes(content)


@processes
def test_a_damaged_file_gives_the_right_image_or_none(tmp_path: Path) -> None:
    """In a process of its own: a crash would be one of its memory."""
    fill(shards_of(tmp_path))
    in_child(lambda: damage_many_times(tmp_path, 400))


def test_each_byte_of_a_file_matters(tmp_path: Path) -> None:
    shards = ImageShards(tmp_path, Stamped(2), ABOUT)
    shards.put(0, torch.arange(12, dtype=torch.uint8).view(2, 2, 3))
    shards.put(1, "damaged")
    path = tmp_path / "images-000000000-000000001.pixels"
    whole = path.read_bytes()
    flipped = [whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :] for place in range(len(whole))]
    longer = [whole[:place] + b"+" + whole[place:] for place in range(len(whole) + 1)]
    for place, content in enumerate(flipped + longer):
        path.write_bytes(content)
        again = ImageShards(tmp_path, Stamped(2), ABOUT)
        assert again.get(0) is None, place
        assert again.n_damaged == 1
        assert not path.exists()


def test_a_damaged_row_drops_its_shard_once(tmp_path: Path) -> None:
    fill(shards_of(tmp_path))
    path = tmp_path / names(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    shards = shards_of(tmp_path)
    assert same(shards.get(1), known(1))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shards.get, [0] * 8)) == [None] * 8
    assert shards.n_damaged == 1
    assert shards.get(1) is None
    assert not path.exists()
    assert same(shards.get(10), known(10))
    all_back(fill(shards, range(10)))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff", b'{"format": 2, "images_in_a_shard": 10}']
    + [
        b'{"format": 1, "images_in_a_shard": %s}' % number for number in (b"0", b"-1", b"true", b"1e9", b'"10"', b"99999999")
    ],
)
def test_a_layout_that_is_damaged_or_of_another_version_is_made_anew(content: bytes, tmp_path: Path) -> None:
    fill(shards_of(tmp_path))
    (tmp_path / "layout.json").write_bytes(content)
    shards = shards_of(tmp_path)
    assert right_or_nothing(shards) == 34
    all_back(fill(shards))
    all_back(shards_of(tmp_path))


def test_a_shard_under_the_name_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    """Though all stamps are the same, as in an array file."""
    source = Stamped(30)
    source.stamps = ["1-1"] * 30
    fill(ImageShards(tmp_path, source, ABOUT, 30_000))
    first, second, *_ = sorted(tmp_path.glob("*.pixels"))
    shutil.copy(second, first)
    shards = ImageShards(tmp_path, source, ABOUT)
    assert right_or_nothing(shards) == 10
    assert shards.n_damaged == 1


# Images, folders and disks that change


def test_images_that_are_written_anew_are_decoded_anew(tmp_path: Path) -> None:
    fill(shards_of(tmp_path))
    shards = shards_of(tmp_path)
    source = shards._source
    assert isinstance(source, Stamped)
    source.stamps[13] = "13-2"
    assert [index for index in range(34) if shards.get(index) is None] == list(range(10, 20))
    assert shards.n_damaged == 0
    for index in range(10, 20):
        shards.put(index, known(index, seed=1))
    again = ImageShards(tmp_path, source, ABOUT)
    assert all(same(again.get(index), known(index, seed=index // 10 == 1)) for index in range(34))


def test_an_image_that_changes_before_its_shard_is_full_makes_it_useless(tmp_path: Path) -> None:
    """The stamp is that of what was decoded, not that of the file when the shard was written."""
    for how in ("now", "given"):
        shards = shards_of(tmp_path / how)
        source = shards._source
        assert isinstance(source, Stamped)
        if how == "given":
            source.stamps[4] = "4-2"
        shards.put(4, known(4), None if how == "now" else "4-1")
        source.stamps[4] = "4-2"
        fill(shards, [0, 1, 2, 3, *range(5, 10)])
        assert len(names(tmp_path / how)) == 2
        assert shards.get(4) is None
        assert shards.get(5) is None


def test_a_shard_that_is_replaced_while_it_is_read_is_opened_anew(tmp_path: Path) -> None:
    """Another run's files are checked again: what was right in the one says nothing of the other."""
    shards = fill(shards_of(tmp_path))
    all_back(shards)
    path = tmp_path / names(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)
    assert [shards.get(0), shards.get(0)] == [None, None]
    assert shards.n_damaged == 1


@processes
def test_a_file_that_is_cut_while_it_is_in_use_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """No run does it, but a failing disk is like it; a mapped file would end the process."""
    shards = fill(shards_of(tmp_path))
    all_back(shards)

    def cut_all() -> None:
        for path in tmp_path.glob("*.pixels"):
            os.truncate(path, 40)
        assert right_or_nothing(shards) >= 29

    in_child(cut_all)


def test_a_folder_that_is_deleted_while_in_use_is_filled_again(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    shards = fill(shards_of(folder))
    all_back(shards)
    shutil.rmtree(folder)
    assert right_or_nothing(shards) >= 29  # The others are known to be unreadable.
    assert not folder.exists()
    all_back(fill(shards))
    all_back(shards_of(folder))
    assert shards.complaint is None


def test_a_folder_that_another_run_divides_anew_is_left_to_it(tmp_path: Path) -> None:
    shards = fill(shards_of(tmp_path), range(5))
    shutil.rmtree(tmp_path)
    other = ImageShards(tmp_path, Stamped(34), ABOUT, expected_bytes=34 * 3000)
    other.put(0, known(0))
    fill(shards)
    assert shards.complaint == f"{tmp_path} was divided in another way meanwhile, by another run"
    all_back(fill(other))
    all_back(shards_of(tmp_path))


@processes
def test_a_folder_that_can_only_be_read_is_read(tmp_path: Path) -> None:
    """And a shard in it that is damaged is looked at but once."""
    fill(shards_of(tmp_path), range(20))
    damaged = tmp_path / "images-000000010-000000019.pixels"
    content = bytearray(damaged.read_bytes())
    content[0] ^= 1
    damaged.write_bytes(content)

    def read_only() -> None:
        if os.geteuid() == 0:  # Who may write everywhere becomes nobody.
            os.setgid(65534)
            os.setuid(65534)
        reading = shards_of(tmp_path)
        for _ in range(2):
            assert right_or_nothing(reading) >= 23
            assert reading.n_damaged == 1
        again, new = fill(shards_of(tmp_path)), fill(shards_of(tmp_path / "new"))
        assert right_or_nothing(again) >= 23
        assert again.complaint == f"{tmp_path} can't be written to (permission denied)"
        assert new.complaint == f"{tmp_path / 'new'} can't be written to (permission denied)"

    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o077 == 0:
            parent.chmod(0o755)
    tmp_path.chmod(0o555)
    try:
        in_child(read_only)
    finally:
        tmp_path.chmod(0o755)


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    shards = fill(shards_of(tmp_path / "file"))
    assert right_or_nothing(shards) == 34
    assert shards.complaint == f"{tmp_path / 'file'} can't be written to (file exists)"


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    shards = fill(shards_of(tmp_path), range(15))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(1 << 40, 0, module.DISK_RESERVE + 100))
    fill(shards, range(15, 34))
    assert shards.complaint == f"the disk of {tmp_path} is nearly full"
    assert shards._pending == {}
    assert right_or_nothing(shards) == 24
    assert len(names(tmp_path)) == 2


@processes
def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path: Path) -> None:
    """No file may grow over 2 kB from the second shard on: as on a full disk, writing fails half-way."""
    import resource

    def fill_disk() -> None:
        shards = fill(shards_of(tmp_path), range(10))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        fill(shards, range(10, 34))
        assert right_or_nothing(shards) == 24
        assert shards.complaint == f"{tmp_path} can't be written to (file too large)"

    in_child(fill_disk)
    assert len(names(tmp_path)) == 2
    all_back(fill(shards_of(tmp_path)))


@processes
def test_a_lack_of_handles_deletes_nothing(tmp_path: Path) -> None:
    import resource

    shards = fill(shards_of(tmp_path))

    def without_handles() -> None:
        assert same(shards.get(0), known(0))
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
        assert shards.get(0) is None
        assert shards.get(30) is None
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))
        assert same(shards.get(0), known(0))
        assert shards.n_damaged == 0

    in_child(without_handles)
    all_back(shards_of(tmp_path))


# Memory


def held_bytes(shards: ImageShards) -> int:
    return sum(row[1].nbytes for rows in shards._pending.values() for row in rows.values() if isinstance(row[1], Tensor))


@pytest.mark.parametrize("side", [18, 100])  # as large as expected, and thirty times that
def test_images_in_no_order_are_not_piled_up(side: int, tmp_path: Path) -> None:
    shards = shards_of(tmp_path, 5000)
    order = list(range(5000))
    random.Random(0).shuffle(order)
    most = 0
    for index in order:
        shards.put(index, torch.zeros(side, side, 3, dtype=torch.uint8))
        most = max(most, held_bytes(shards))
        assert len(shards._pending) <= module.MOST_PENDING
    assert 0 < most <= module.MOST_PENDING * module.SHARD_BYTES
    assert sum(shards._pending_bytes.values()) == held_bytes(shards)


def test_images_much_larger_than_expected_are_not_piled_up(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, 100)
    for index in range(100):
        shards.put(index, torch.zeros(150, 150, 3, dtype=torch.uint8))  # a shard of them is over the bound
        assert held_bytes(shards) <= module.MOST_PENDING * module.SHARD_BYTES
    assert names(tmp_path) == ["layout.json"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is a process's own memory")
def test_reading_a_large_cache_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def own_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    monkeypatch.setattr(module, "SHARD_BYTES", 16 << 20)
    image = torch.arange(600 * 600 * 3).view(600, 600, 3).to(torch.uint8)
    source = Stamped(200)
    shards = ImageShards(tmp_path, source, ABOUT)
    for index in range(200):
        shards.put(index, image)
    shards = ImageShards(tmp_path, source, ABOUT)
    shards.get(0)
    before = own_bytes()
    for index in range(200):
        found = shards.get(index)
        assert isinstance(found, Tensor)
        assert bool((found == image).all())
    assert own_bytes() - before < 0.1 * 200 * image.nbytes


# What is kept, and how it is deleted


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
    fill(shards_of(folder / "images" / "0123456789abcdef"))
    return folder


def test_what_is_kept_is_told(tmp_path: Path) -> None:
    things = kept(a_cache(tmp_path / "cache"))
    assert [thing.kind for thing in things] == list(KINDS)
    assert [thing.files for thing in things] == [1, 1, 1, 2, 1, 1, 5]
    assert [thing.bytes for thing in things[:6]] == [5, 5, 5, 10, 5, 5]
    images = things[6]
    assert images.path == tmp_path / "cache" / "images" / "0123456789abcdef"
    assert images.bytes == sum(path.stat().st_size for path in images.path.iterdir())
    assert images.about == "decoded images of /data/photos, at most 256 pixels on the shorter side"
    assert abs(images.last_used - time.time()) < 100
    assert images.describe().startswith(f"images      {images.bytes / 1000:.0f} kB in 5 files, used 20")
    (images.path / "layout.json").unlink()
    assert kept(tmp_path / "cache")[6].about == "decoded images of unknown data"
    assert kept(tmp_path / "nothing") == []


def test_the_last_use_of_decoded_images_is_when_a_run_opened_them(tmp_path: Path) -> None:
    folder = a_cache(tmp_path) / "images" / "0123456789abcdef"
    for path in folder.iterdir():
        os.utime(path, (1000, 1000))
    assert kept(tmp_path)[-1].last_used == 1000
    shards_of(folder)
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
        folder / "images" / "0123456789abcdef" / "photo.png",
        folder / "images" / "mine" / "layout.json",
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
    assert [thing.kind for thing in kept(folder)] == ["shards", "unpacked", "features", "unfinished", "images"]
    with pytest.raises(InputError, match=r"nothing called 'image' is kept \(did you mean images\?\); there are lists, "):
        clear(folder, ["shards", "image"])
    assert len(kept(folder)) == 5


def test_a_run_goes_on_while_its_images_are_deleted(tmp_path: Path) -> None:
    """Cleared again and again by another thread; at last, left alone, it fills the folder once more."""
    folder = tmp_path / "images" / "0123456789abcdef"
    shards = shards_of(folder, 200)
    over = threading.Event()

    def clear_often() -> None:
        while not over.is_set():
            clear(tmp_path)
            time.sleep(0.003)

    def visit(index: int) -> None:
        found = shards.get(index)
        assert found is None or same(found, known(index))
        if found is None:
            shards.put(index, known(index))

    with ThreadPoolExecutor(3) as pool:
        clearing = pool.submit(clear_often)
        for _ in range(5):
            list(pool.map(visit, range(200)))
        over.set()
        clearing.result()
    assert shards.complaint is None
    assert shards.n_damaged == 0
    for _ in range(2):
        for index in range(200):
            visit(index)
    all_back(shards)
    all_back(shards_of(folder, 200))
