"""A pack gives an image as it was, or nothing, whatever happens to its file and whoever fills it."""

import errno
import fcntl
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deepcluster.core.shared_memory import SharedFile
from deepcluster.data import pack as module
from deepcluster.data.pack import ROW, Pack, about_pack

Pixels = NDArray[np.uint8]
COUNT = 34


def image(index: int, version: int = 0) -> Pixels | None:
    """An image of 1 to 40 pixels a side; each 7th can't be decoded."""
    random_ = np.random.default_rng([index, version])
    if index % 7 == 3:
        return None
    return random_.integers(0, 256, (*random_.integers(1, 41, 2), 3), dtype=np.uint8)


def same(got: Pixels | None, want: Pixels | None) -> bool:
    return got is want is None or (got is not None and want is not None and np.array_equal(got, want))


def fill(pack: Pack, decode: Callable[[int], Pixels | None] = image, step: int = 5, version: str = "1") -> Pack:
    for start in range(0, len(pack), step):
        assert pack.fill(range(start, min(start + step, len(pack))), lambda index: f"{index}-{version}", decode)
    return pack


def missing(pack: Pack, version: int = 0) -> list[int]:
    """Which of the readable images are not there; the others must be right."""
    found = [pack.get(index) for index in range(len(pack))]
    assert all(one is None or same(one, image(index, version)) for index, one in enumerate(found))
    return [index for index, one in enumerate(found) if one is None and image(index) is not None]


class Counted:
    """Decodes and remembers what it was asked for."""

    def __init__(self, version: int = 0) -> None:
        self.version, self.asked = version, list[int]()

    def __call__(self, index: int) -> Pixels | None:
        self.asked.append(index)
        return image(index, self.version)


BAD = [index for index in range(COUNT) if image(index) is None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images" / "0123456789abcdef.pack"


# What is put comes back


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), in_memory=st.booleans())
def test_a_pack_is_a_dict_of_arrays(data: st.DataObject, in_memory: bool, tmp_path: Path) -> None:
    """Any parts, in any order, by any of three handles; images come, change, and can't be decoded for a while."""
    count = data.draw(st.integers(1, 12))
    path = Path(tempfile.mkdtemp(dir=tmp_path)) / "pack"
    first = Pack(SharedFile() if in_memory else path, count)
    packs = [first, pickle.loads(pickle.dumps(first)), first if in_memory else Pack(path, count)]
    want: dict[int, tuple[int, Pixels]] = {}
    versions = [0] * count
    for _ in range(data.draw(st.integers(1, 12))):
        pack = data.draw(st.sampled_from(packs))
        start = data.draw(st.integers(0, count - 1))
        part = range(start, data.draw(st.integers(start + 1, count)))
        for index in data.draw(st.sets(st.sampled_from(part))):
            versions[index] += 1
        refused = data.draw(st.sets(st.sampled_from(part)))
        made: dict[int, Pixels] = {}

        def decode(index: int, refused: set[int] = refused, made: dict[int, Pixels] = made) -> Pixels | None:
            if index in refused:
                return None
            height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
            made[index] = np.full((height, width, 3), versions[index], np.uint8)
            made[index][0, 0, 0] = index
            return made[index]

        assert pack.fill(part, lambda index: str(versions[index]), decode)
        current = {index for index in part if index in want and want[index][0] == versions[index]}
        assert made.keys() == set(part) - current - refused
        want = {index: one for index, one in want.items() if index not in part or index in current}
        want |= {index: (versions[index], pixels) for index, pixels in made.items()}
        for other in packs:
            assert {index for index in range(count) if other.get(index) is not None} == want.keys()
            assert all(same(other.get(index), pixels) for index, (_, pixels) in want.items())
    assert [pack.complaint for pack in packs] == [""] * 3
    assert sum(pack.n_damaged for pack in packs) == 0


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_full_pack_is_decoded_no_more_by_any_process(in_memory: bool, path: Path) -> None:
    pack = fill(Pack(SharedFile() if in_memory else path, COUNT, "photos – ünï"))
    assert about_pack(pack.path) == ("photos – ünï" if not in_memory else about_pack(pack.path))
    assert missing(pack) == []
    counted = Counted()
    fill(pack if in_memory else Pack(path, COUNT), counted)
    assert counted.asked == BAD

    def other() -> None:
        again = pickle.loads(pickle.dumps(pack))
        fill(again, counted)
        assert (missing(again), again.complaint) == ([], "")

    in_child(other)
    assert pack.get(0).flags.writeable  # type: ignore[union-attr]  # As torch wants it; the file is not written to.
    pack.get(0)[:] = 0  # type: ignore[index]
    if not in_memory:
        assert same(Pack(path, COUNT).get(0), image(0))


def test_images_that_are_no_block_of_memory_come_back(path: Path) -> None:
    odd = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 3, 7).transpose(0, 2, 1)
    pack = fill(Pack(path, 1), lambda index: odd)
    assert same(pack.get(0), odd)


def test_pixels_starts_and_sizes_are_all_that_is_kept(path: Path) -> None:
    pack = fill(Pack(path, COUNT))
    for index, (start, (height, width)) in enumerate(zip(pack.starts_N, pack.sizes_N2.tolist(), strict=True)):
        want = image(index)
        assert (want is None) == (height == 0)
        if want is not None:
            assert same(pack.pixels[start : start + height * width * 3].reshape(height, width, 3), want)


@pytest.mark.parametrize("mixed", [False, True])
def test_gathered_images_are_copies_in_the_order_asked_for(mixed: bool, path: Path) -> None:
    def decode(index: int) -> Pixels:
        side = (8, 6) if not mixed or index % 3 else (9, 7)
        return np.random.default_rng(index).integers(0, 256, (*side, 3), np.uint8)

    pack = fill(Pack(path, 30), decode)
    indices_B = np.array([28, 1, 4, 1, 13])
    got = Pack(path, 30).gather(indices_B, 8)
    assert got is not None
    np.testing.assert_array_equal(got, np.stack([decode(index) for index in indices_B.tolist()]))
    got[:] = 0
    assert same(pack.get(1), decode(1))
    assert pack.gather(indices_B, 7) is None
    assert pack.gather(indices_B[:0], 8) is None
    assert (pack.gather(np.array([1, 3]), 99) is None) == mixed
    assert Pack(path.with_name("other"), 30).gather(indices_B, 8) is None


# Several processes


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


class Noted:
    """Decodes slowly, and notes each image in a file of many processes."""

    def __init__(self, notes: Path, seconds: float = 0.001) -> None:
        self.notes, self.seconds = notes, seconds

    def __call__(self, index: int) -> Pixels | None:
        time.sleep(self.seconds)
        with self.notes.open("a") as file:
            file.write(f"{index}\n")
        return image(index)


def fill_as_a_run_does(path: Path, notes: Path, step: int) -> None:
    """First what no other process fills, then the rest."""
    pack, count, decode = Pack(path, 200), 200, Noted(notes)
    parts = [range(start, min(start + step, count)) for start in range(0, count, step)]
    busy = [part for part in parts if not pack.fill(part, str, decode, wait=False)]
    assert all(pack.fill(part, str, decode) for part in busy)
    assert (missing(pack), pack.complaint, pack.n_damaged) == ([], "", 0)


def test_processes_that_fill_one_pack_decode_each_image_once(path: Path, tmp_path: Path) -> None:
    """Four begin at the same moment, where no file is, with parts of different sizes."""
    notes = tmp_path / "notes"
    children = [start_child(lambda step=step: fill_as_a_run_does(path, notes, step)) for step in (7, 7, 10, 50)]  # type: ignore[misc]
    assert [status_of(child) for child in children] == [0] * 4
    asked = [int(line) for line in notes.read_text().split()]
    readable = [index for index in asked if image(index) is not None]
    assert sorted(readable) == [index for index in range(200) if image(index) is not None]
    assert missing(Pack(path, 200)) == []


def test_a_pack_that_is_created_by_many_at_once_is_one_file(path: Path) -> None:

    def add(number: int) -> None:
        Pack(path, 8).fill(range(number, number + 1), str, lambda index: np.full((3, 3, 3), index, np.uint8))

    for _ in range(6):
        path.unlink(missing_ok=True)
        children = [start_child(lambda number=number: add(number)) for number in range(8)]  # type: ignore[misc]
        assert [status_of(child) for child in children] == [0] * 8
        assert [int(Pack(path, 8).get(index)[0, 0, 0]) for index in range(8)] == list(range(8))  # type: ignore[index]


def test_a_part_that_another_process_fills_is_left_to_it_or_waited_for(path: Path, tmp_path: Path) -> None:
    pack, begun, go = Pack(path, COUNT), tmp_path / "begun", tmp_path / "go"

    def slowly(index: int) -> Pixels | None:
        begun.touch()
        while not go.exists():
            time.sleep(0.002)
        return image(index)

    child = start_child(lambda: pack.fill(range(5), str, slowly))
    while not begun.exists():
        time.sleep(0.002)
    counted = Counted()
    assert not pack.fill(range(4, 9), str, counted, wait=False)
    assert pack.fill(range(5, 9), str, counted, wait=False)
    assert counted.asked == [5, 6, 7, 8]
    go.touch()
    assert pack.fill(range(5), str, counted)
    assert counted.asked == [5, 6, 7, 8, 3]
    assert status_of(child) == 0


def test_a_filler_that_is_killed_leaves_nothing_wrong(path: Path, tmp_path: Path) -> None:
    """At any moment: it holds locks, has enlarged the file, has written half of an image or of its rows."""
    for attempt in range(15):

        def filling() -> None:
            fill(Pack(path, COUNT), Noted(tmp_path / "notes", 0.0005), step=3)

        child = start_child(filling)
        time.sleep(0.004 * attempt)
        os.kill(child, signal.SIGKILL)
        assert status_of(child) in (0, -signal.SIGKILL)
        pack = Pack(path, COUNT)
        missing(pack)
        assert pack.n_damaged == 0
        if attempt % 5 == 4:
            assert missing(fill(pack)) == []
            path.unlink()


@pytest.mark.parametrize("place", ["pixels", "rows"])
def test_a_write_that_is_torn_by_a_kill_is_noticed(place: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(Pack(path, COUNT), step=17)
    first = Pack(path, COUNT)._first
    write = os.pwrite

    def torn(file: int, content: Any, start: int) -> int:
        if (start >= first) == (place == "pixels"):
            write(file, bytes(content)[: len(content) // 2 + 5], start)
            os._exit(0)
        return write(file, content, start)

    def filling() -> None:
        monkeypatch.setattr(os, "pwrite", torn)
        fill(Pack(path, COUNT), Counted(1), step=17, version="2")

    assert status_of(start_child(filling)) == 0
    pack = Pack(path, COUNT)
    for index in range(COUNT):
        assert any(same(pack.get(index), one) for one in (None, image(index), image(index, 1))), index
    assert missing(fill(pack, Counted(1), version="2"), version=1) == []


def test_a_disk_without_locks_gives_no_wrong_image(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes write over each other; what they spoil is noticed, and decoded again."""
    one, other, fstat = Pack(path, COUNT), Pack(path, COUNT), os.fstat

    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    def fstat_and_another_run(file: int) -> os.stat_result:
        status = fstat(file)
        monkeypatch.setattr(os, "fstat", fstat)
        fill(other)
        return status

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(os, "fstat", fstat_and_another_run)
    assert one.fill(range(7, 14), lambda index: f"{index}-1", image)
    gone = missing(other)
    assert gone
    assert gone == missing(one) == missing(Pack(path, COUNT))
    for _ in range(2):
        assert missing(fill(one)) == missing(other) == []


# Damage


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_bit_flipped_anywhere_is_noticed_and_made_good(path: Path) -> None:
    pack = fill(Pack(path, COUNT))
    rows, end, whole = module._HEADER.itemsize, pack._place_of(COUNT), path.read_bytes()
    chance = random.Random(0)
    places = [*range(rows, rows + 2 * ROW.itemsize), *(chance.randrange(rows, end) for _ in range(200))]
    places += [chance.randrange(pack._first, len(whole)) for _ in range(200)]
    for place in places:
        path.write_bytes(whole)
        flip(path, place, chance.randrange(8))
        again, counted = Pack(path, COUNT), Counted()
        gone, offset = missing(again), (place - rows) % ROW.itemsize
        if place >= pack._first:
            assert (len(gone), again.n_damaged) == (1, 1), place
        else:
            index = (place - rows) // ROW.itemsize
            is_plain = offset >= ROW.fields["spare"][1] or ROW.fields["stamp"][1] <= offset < ROW.fields["sum"][1]  # type: ignore[index]
            assert gone in ([], [index]), place
            assert (gone == [index]) == (not is_plain and index not in BAD), place
        fill(again, counted)
        assert set(gone) <= set(counted.asked) <= {*gone, *BAD, (place - rows) // ROW.itemsize}
        assert missing(again) == missing(Pack(path, COUNT)) == []


def test_damage_is_noticed_once_and_by_gathering_too(path: Path) -> None:
    pack = fill(Pack(path, 8), lambda index: np.full((4, 4, 3), index, np.uint8))
    flip(path, pack._first + 48 * 3 + 7, 2)
    again = Pack(path, 8)
    assert again.gather(np.arange(8), 64) is None
    assert [again.get(3), again.get(3), again.n_damaged] == [None, None, 1]
    assert again.gather(np.array([1, 2, 4]), 64) is not None


@pytest.mark.parametrize("left", [0, 1, 15, 16, 4095, 4097, -5000, -1000, -1])
def test_a_file_that_was_cut_is_filled_again(left: int, path: Path) -> None:
    first = fill(Pack(path, COUNT))._first
    os.truncate(path, left if left >= 0 else path.stat().st_size + left)
    pack = Pack(path, COUNT)
    assert missing(pack)
    assert missing(fill(pack)) == missing(Pack(path, COUNT)) == []
    readable_N = pack.sizes_N2[:, 0] > 0
    assert not (pack.starts_N[readable_N] % 3).any()  # GPUs count in pixels.
    assert len(pack.pixels) % 3 == 0
    assert pack._first == first


@pytest.mark.parametrize(
    "content", [b"", b"not a pack at all", bytes(10_000), b"DCPACK1\0" + (33).to_bytes(8, "little") + bytes(9000)]
)
def test_a_file_that_is_no_pack_of_these_images_is_made_again(content: bytes, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    pack = Pack(path, COUNT, "photos")
    assert len(missing(pack)) == COUNT - len(BAD)
    assert missing(fill(pack)) == missing(Pack(path, COUNT)) == []
    assert about_pack(path) == "photos"


def test_what_another_file_or_none_is_about_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"DCPAC" * 2000)
    assert [about_pack(tmp_path / name) for name in ("file", "none", ".")] == ["", "", ""]
    Pack(tmp_path / "pack", 1, "long " * 5000)
    assert about_pack(tmp_path / "pack").startswith("long long")


# Images, files and disks that change


def test_images_that_change_are_decoded_again_even_by_a_run_that_knew_them(path: Path) -> None:
    running = fill(Pack(path, COUNT))
    assert missing(running) == []
    counted = Counted(1)
    other = Pack(path, COUNT)
    assert other.fill(range(10, 20), lambda index: f"{index}-{2 if index in (13, 17) else 1}", counted)
    assert counted.asked == [10, 13, 17]
    for pack in (running, other):
        assert all(same(pack.get(index), image(index, int(index == 13))) for index in range(COUNT) if index not in BAD)
        assert pack.n_damaged == 0
    flip(path, int(other._rows[13]["start"]), 0)  # What was right in the old pixels says nothing of the new ones.
    assert Pack(path, COUNT).get(13) is None
    assert running.get(13) is None


def test_an_image_that_changes_into_one_that_cannot_be_read_is_gone(path: Path) -> None:
    pack = fill(Pack(path, COUNT))
    assert pack.fill(range(4, 6), lambda index: f"{index}-{2 if index == 4 else 1}", lambda index: None)
    assert missing(pack) == missing(Pack(path, COUNT)) == [4]


def test_an_image_that_changed_since_an_earlier_run_is_not_taken_for_the_new_one(path: Path) -> None:
    fill(Pack(path, COUNT))
    pack, asked = Pack(path, COUNT), list[int]()

    def stamp(index: int) -> str:
        asked.append(index)
        return f"{index}-{2 if index == 4 else 1}"

    for _ in range(2):
        assert pack.get(4, stamp) is None
        assert same(pack.get(5, stamp), image(5))
    assert asked.count(5) == 1
    assert pack.n_damaged == 0


def test_a_row_that_changes_while_it_is_read_gives_the_old_or_the_new_image(path: Path) -> None:
    def change() -> None:
        pack = Pack(path, 1)
        for version in range(300):
            pack.fill(range(1), lambda index, version=version: str(version), lambda index: image_of(version))  # type: ignore[misc]  # noqa: B023

    def image_of(version: int) -> Pixels:
        return np.full((1 + version % 7, 1 + version % 5, 3), version % 256, np.uint8)

    reading = fill(Pack(path, 1), lambda index: image_of(0))
    child = start_child(change)
    while not os.waitpid(child, os.WNOHANG)[0]:
        found = reading.get(0)
        if found is not None:
            assert any(np.array_equal(found, image_of(version)) for version in range(int(found[0, 0, 0]), 300, 256))


def test_a_file_that_is_deleted_while_in_use_stays_good(path: Path) -> None:
    pack = fill(Pack(path, COUNT), lambda index: image(index) if index < 20 else None)
    path.unlink()
    assert missing(fill(pack)) == []
    assert missing(fill(Pack(path, COUNT))) == []


def test_memory_that_is_full_takes_no_more(path: Path) -> None:
    pack = Pack(SharedFile(), 10, most_bytes=1000)
    assert pack.fill(range(3), str, lambda index: np.full((10, 10, 3), index, np.uint8))
    assert pack.complaint == ""
    assert pack.fill(range(3, 6), str, lambda index: np.full((10, 10, 3), index, np.uint8))
    assert pack.complaint == "the 1 kB of memory for them are full"
    assert [pack.get(index) is not None for index in range(10)] == [True] * 3 + [False] * 7
    assert pack.path.stat().st_size <= pack._first + 1000


def test_a_disk_that_is_nearly_full_is_left_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = fill(Pack(path, COUNT), lambda index: image(index) if index < 10 else None)
    before = path.stat().st_size
    monkeypatch.setattr(os, "fstatvfs", lambda file: SimpleNamespace(f_bavail=module.DISK_RESERVE // 512, f_frsize=512))
    assert missing(fill(pack)) == [index for index in range(10, COUNT) if index not in BAD]
    assert pack.complaint == f"{path} can't be written to (the disk is nearly full)"
    assert path.stat().st_size == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_written(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISK_RESERVE", -(1 << 40))
    pack = Pack(small_disk / "a.pack", 40)

    def decode(index: int) -> Pixels:
        return np.full((31, 31, 3), index, np.uint8)

    fill(pack, decode, step=3)
    assert pack.complaint == f"{pack.path} can't be written to (no space left on device)"
    for again in (pack, Pack(pack.path, 40)):
        found = [again.get(index) for index in range(40)]
        assert 10 < sum(one is not None for one in found) < 22
        assert all(one is None or same(one, decode(index)) for index, one in enumerate(found))
        assert again.n_damaged == 0


def test_a_limit_of_file_sizes_is_a_full_disk(path: Path) -> None:
    import resource

    def filling() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        pack = fill(Pack(path, COUNT))
        assert 0 < len(missing(pack)) < COUNT - len(BAD)
        assert pack.complaint == f"{path} can't be written to (file too large)"

    in_child(filling)
    assert missing(fill(Pack(path, COUNT))) == []


def as_nobody(task: Callable[[], object]) -> None:
    """Run a task as a user who may write nowhere here."""

    def run() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        task()

    in_child(run)


@pytest.mark.parametrize("is_full", [True, False])
def test_a_pack_that_can_only_be_read_is_read(is_full: bool, path: Path) -> None:
    """A full one is no reason to complain, nor to decode anything but what could not be read."""
    fill(Pack(path, COUNT), image if is_full else lambda index: image(index) if index < 20 else None)
    for parent in path.parents:
        with suppress(OSError):
            parent.chmod(parent.stat().st_mode | 0o055)
    path.parent.chmod(0o555)
    path.chmod(0o444)

    def reading() -> None:
        pack, counted = Pack(path, COUNT), Counted()
        assert pack.complaint == ""
        fill(pack, counted)
        wanted = [index for index in range(20, COUNT) if index not in BAD] * (not is_full)
        assert (counted.asked, missing(pack)) == (sorted([*BAD, *wanted]), wanted)
        assert pack.complaint == ("" if is_full else f"{path} can't be written to (permission denied)")
        with pytest.raises(PermissionError):
            Pack(path.with_name("new.pack"), COUNT)
        with pytest.raises(PermissionError):
            Pack(path, COUNT + 1)

    as_nobody(reading)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is a process's own memory")
def test_reading_a_pack_takes_no_memory(path: Path) -> None:
    def own_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    large = np.arange(600 * 600 * 3).reshape(600, 600, 3).astype(np.uint8)
    pack = fill(Pack(path, 100), lambda index: large)
    before = own_bytes()
    assert all(same(pack.get(index), large) for index in range(100))
    assert own_bytes() - before < 0.1 * 100 * large.nbytes


def test_a_spawned_process_reads_and_fills_the_memory_of_its_parent() -> None:
    pack = Pack(SharedFile(), COUNT)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import pickle, test_pack as me; me.fill(pickle.loads(sys.stdin.buffer.read()))"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(pack), check=True)
    assert missing(pack) == []
