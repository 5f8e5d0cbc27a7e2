"""Blocks on the disk: every block is right, made once, and within the bound, whoever disturbs."""

import hashlib
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from deepcluster.data.storage.blocks import MEMORY_BYTES, MOST_BYTES, BlockStore

WITHOUT_ROOM = 1 << 40


def content(key: str, size: int = 1000) -> bytes:
    """The one right content of a key."""
    return random.Random(key).randbytes(size)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if path.is_file()]


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def never() -> bytes:
    raise AssertionError("made again")


def is_kept(store: BlockStore, key: str) -> bool:
    try:
        store.get(key, never)
    except AssertionError:
        return False
    return True


def test_a_block_is_made_once_and_found_by_the_next_store(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "deep" / "blocks", WITHOUT_ROOM)
    assert not is_kept(store, "a")
    assert store.get("a", lambda: content("a")) == content("a")
    assert store.get("a", never) == content("a")
    again = BlockStore(store.folder, WITHOUT_ROOM)
    assert again.get("a", never) == content("a")
    assert store.complaint is None


def test_empty_blocks_and_odd_keys_are_blocks_too(tmp_path: Path) -> None:
    keys = ["", "a" * 5000, "x/../y\n", "\udce9.jpg", "ü", "\ud83d"]
    for each in keys:
        BlockStore(tmp_path, WITHOUT_ROOM).get(each, lambda: b"")
    store = BlockStore(tmp_path, WITHOUT_ROOM)
    assert [store.get(each, never) for each in keys] == [b""] * len(keys)


def test_parts_of_a_block_are_its_slices(tmp_path: Path) -> None:
    whole = content("a", 3 << 20)
    BlockStore(tmp_path, WITHOUT_ROOM).get("a", lambda: whole)
    store = BlockStore(tmp_path, WITHOUT_ROOM)
    for start, stop in [(0, 10), (5, 5), (1000, 3 << 20), (0, 3 << 20), (7, 8)]:
        assert store.part("a", start, stop, never) == whole[start:stop]


def test_parts_are_read_from_the_file_once_the_block_was_checked(tmp_path: Path) -> None:
    size = MEMORY_BYTES // 8
    store = BlockStore(tmp_path, WITHOUT_ROOM)
    for number in range(12):  # more than the memory holds
        store.get(str(number), lambda number=number: bytes([number]) * size)
    for number in range(12):
        assert store.part(str(number), size - 5, size, never) == bytes([number]) * 5
    for path in files(tmp_path):
        path.unlink()
    assert store.part("0", 3, 5, lambda: b"new bytes") == b" b"  # gone: made again


def test_what_make_raises_is_raised_and_the_next_one_tries_again(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, WITHOUT_ROOM)

    def fail() -> bytes:
        raise ValueError("no network")

    with pytest.raises(ValueError, match="no network"):
        store.get("a", fail)
    assert store.get("a", lambda: content("a")) == content("a")


def test_of_many_threads_one_makes_the_block(tmp_path: Path) -> None:
    store, made, barrier = BlockStore(tmp_path, WITHOUT_ROOM), list[int](), threading.Barrier(16)

    def make() -> bytes:
        made.append(1)
        time.sleep(0.05)
        return content("a")

    def want(_: int) -> bytes:
        barrier.wait()
        return store.get("a", make)

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(want, range(16))) == {content("a")}
    assert len(made) == 1


def test_threads_that_wait_share_the_error(tmp_path: Path) -> None:
    store, tries, begun, go_on = BlockStore(tmp_path, WITHOUT_ROOM), list[int](), threading.Event(), threading.Event()

    def fail() -> bytes:
        tries.append(1)
        begun.set()
        go_on.wait()
        raise ValueError("no network")

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(store.get, "a", fail)
        begun.wait()
        others = [pool.submit(store.get, "a", fail) for _ in range(7)]
        while any(not other.running() for other in others):
            time.sleep(0.01)
        time.sleep(0.1)  # now all of them wait
        go_on.set()
        assert all(isinstance(each.exception(), ValueError) for each in [first, *others])
    assert len(tries) == 1


def test_when_a_maker_is_interrupted_a_thread_that_waits_makes_the_block(tmp_path: Path) -> None:
    store, begun, go_on = BlockStore(tmp_path, WITHOUT_ROOM), threading.Event(), threading.Event()

    def interrupted() -> bytes:
        begun.set()
        go_on.wait()
        raise KeyboardInterrupt

    def first() -> str:
        try:
            store.get("a", interrupted)
        except KeyboardInterrupt:
            return "interrupted"
        return "not interrupted"

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        begun.wait()
        other = pool.submit(store.get, "a", lambda: content("a"))
        time.sleep(0.05)
        go_on.set()
        assert one.result() == "interrupted"
        assert other.result() == content("a")


def test_making_a_block_may_ask_for_others(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, WITHOUT_ROOM)
    both = store.get("ab", lambda: store.get("a", lambda: b"a") + store.get("b", lambda: b"b"))
    assert both == b"ab"


@pytest.mark.parametrize("damage", ["flip", "end", "zeros", "four zeros", "empty", "longer", "other block"])
def test_damaged_blocks_are_made_again(tmp_path: Path, damage: str) -> None:
    BlockStore(tmp_path, WITHOUT_ROOM).get("a", lambda: content("a"))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    BlockStore(tmp_path, WITHOUT_ROOM).get("b", lambda: content("b"))
    other = next(each for each in files(tmp_path) if each != path)
    path.write_bytes({
        "flip": whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], "end": whole[:-1], "zeros": bytes(len(whole)),
        "four zeros": bytes(4), "empty": b"", "longer": whole + b"x", "other block": other.read_bytes(),
    }[damage])  # fmt: skip
    assert not is_kept(BlockStore(tmp_path, WITHOUT_ROOM), "a")
    assert BlockStore(tmp_path, WITHOUT_ROOM).get("a", lambda: content("a")) == content("a")
    assert path.read_bytes() == whole


def test_the_bound_is_kept_after_every_block(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, 50_000)
    for number in range(200):
        key = str(number)
        assert store.get(key, lambda key=key: content(key, 100 + int(key) * 10)) == content(key, 100 + number * 10)
        assert stored_bytes(tmp_path) <= 50_000
    assert stored_bytes(tmp_path) > 25_000


def test_the_blocks_used_longest_ago_go_first(tmp_path: Path) -> None:
    BlockStore(tmp_path, 100_000).get("old but used", lambda: content("u"))
    for number in range(90):
        BlockStore(tmp_path, 100_000).get(str(number), lambda number=number: content(str(number)))
    for age, path in enumerate(sorted(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, ns=(0, (1000 + age) * 10**9))
    BlockStore(tmp_path, 100_000).get("old but used", never)  # read from the disk: used now
    store = BlockStore(tmp_path, 60_000)
    store.get("new", lambda: content("new"))
    left = {key for key in ["old but used", "new", *map(str, range(90))] if is_kept(BlockStore(tmp_path), key)}
    kept = len(left) - 2
    assert left == {"old but used", "new"} | {str(number) for number in range(90 - kept, 90)}
    assert 30 < kept < 60


@pytest.mark.parametrize("part", [False, True])
def test_use_counts_once_a_minute(tmp_path: Path, part: bool) -> None:
    store = BlockStore(tmp_path, WITHOUT_ROOM)
    use = (lambda: store.part("a", 5, 9, never)) if part else (lambda: store.get("a", never))
    store.part("a", 0, 1, lambda: content("a"))
    (path,) = files(tmp_path)
    for age, used in [(30, False), (90, True)]:
        before = int(time.time() - age)
        os.utime(path, (before, before))
        use()
        assert (path.stat().st_mtime > before) == used


def test_nothing_is_written_without_room(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "none", 0)
    assert store.get("a", lambda: content("a")) == content("a")
    assert store.get("a", never) == content("a")  # in memory
    assert not (tmp_path / "none").exists()
    assert store.complaint is None
    small = BlockStore(tmp_path, 500)
    small.get("small", lambda: bytes(100))
    small.get("large", lambda: content("large"))
    assert len(files(tmp_path)) == 1


def test_memory_is_bounded(tmp_path: Path) -> None:
    store, size = BlockStore(tmp_path, 0), MEMORY_BYTES // 4
    for number in range(6):
        store.get(str(number), lambda: bytes(size))
    for number in (2, 3, 4, 5):
        store.get(str(number), never)
    with pytest.raises(AssertionError, match="made again"):
        store.get("1", never)
    assert len(store.get("larger than all", lambda: bytes(MEMORY_BYTES + 1))) == MEMORY_BYTES + 1


def test_a_folder_that_cannot_be_written_to_is_told_and_memory_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = BlockStore(tmp_path / "file" / "blocks", WITHOUT_ROOM)
    assert store.get("a", lambda: content("a")) == content("a")
    assert store.get("a", never) == content("a")
    assert store.complaint == f"{store.folder} can't be written to (not a directory)"
    (tmp_path / "file").unlink()
    store.get("b", lambda: content("b"))
    assert not store.folder.exists()  # it is not tried for each block


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_only_be_read_serves_what_it_has(tmp_path: Path) -> None:
    BlockStore(tmp_path, WITHOUT_ROOM).get("a", lambda: content("a"))
    folders = [tmp_path, *(path.parent for path in files(tmp_path))]
    for folder in folders:
        folder.chmod(0o500)
    try:
        store = BlockStore(tmp_path, WITHOUT_ROOM)
        assert store.get("a", never) == content("a")
        assert store.get("b", lambda: content("b")) == content("b")
        assert store.complaint == f"{tmp_path} can't be written to (permission denied)"
    finally:
        for folder in folders:
            folder.chmod(0o700)


def fill_a_full_disk(folder: Path) -> None:
    """In a process of its own, whose files may not pass 100 kB: large blocks fail while they are written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store = BlockStore(folder, WITHOUT_ROOM)
    for key, size in [("large", 300_000), ("small", 1000), ("larger", 400_000)]:
        assert store.get(key, lambda key=key, size=size: content(key, size)) == content(key, size)
        assert store.get(key, never) == content(key, size)
    assert store.complaint == f"{folder} can't be written to (file too large)"
    assert not files(folder)


def test_writing_that_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    run_in_process(fill_a_full_disk, tmp_path)


FULL_DISK = """
import shutil, sys; sys.path[:0] = {path!r}
from pathlib import Path
from test_blocks import content, files
from deepcluster.data.storage.blocks import BlockStore
folder = Path({folder!r})
store = BlockStore(folder, 1 << 40)
for key in map(str, range(20)):
    assert store.get(key, lambda: content(key, 200_000)) == content(key, 200_000)
    assert store.complaint is None, store.complaint
assert 2 <= len(files(folder)) <= 5
(folder / "other").write_bytes(bytes(shutil.disk_usage(folder).free))
assert store.get("x", lambda: content("x", 900_000)) == content("x", 900_000)
assert store.complaint == f"{{folder}} can't be written to (no space left on device)"
print("done")
"""


def test_a_full_disk_costs_older_blocks_and_then_memory(tmp_path: Path) -> None:
    """On a disk of 1 MB in a name space of its own, where the system allows that."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    script = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$0" "$@"'
    if shutil.which("unshare") is None or subprocess.run([*mount, script, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    code = FULL_DISK.format(path=[str(Path(__file__).parent), *sys.path], folder=str(tmp_path))
    result = subprocess.run([*mount, script, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "done\n", result.stderr


def test_files_of_a_process_that_was_killed_are_deleted_and_those_of_others_left(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, WITHOUT_ROOM)
    store.get("a", lambda: content("a"))
    folder = files(tmp_path)[0].parent
    abandoned, fresh = folder / "x.1-2.part", folder / "y.1-2.part"
    abandoned.write_bytes(b"x")
    fresh.write_bytes(b"y")
    os.utime(abandoned, (time.time() - 7200, time.time() - 7200))
    BlockStore(tmp_path, 2000).get("b", lambda: content("b"))
    assert not abandoned.exists()
    assert fresh.exists()


def test_a_folder_that_is_deleted_meanwhile_is_made_again(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "blocks", WITHOUT_ROOM)
    for key in map(str, range(50)):
        assert store.get(key, lambda key=key: content(key)) == content(key)
        assert len(files(store.folder)) == 1
        shutil.rmtree(store.folder)
    assert store.complaint is None


def test_the_usual_bound_fits_the_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    bound = BlockStore(tmp_path / "not" / "there").most_bytes
    assert 0 <= bound <= MOST_BYTES
    if free < 4 * MOST_BYTES:
        assert abs(bound - free // 4) < 1 << 30
    else:
        assert bound == MOST_BYTES


LOOKS: list[str] = []


def test_the_folder_is_not_looked_through_for_every_block(tmp_path: Path) -> None:
    """Python tells each listing of a folder; with 4 times the bound written, all is listed at most some 150 times."""
    listening = [True]

    def listen(event: str, args: tuple[object, ...]) -> None:
        if listening and event == "os.scandir" and str(args[0]) == str(tmp_path):
            LOOKS.append(event)

    sys.addaudithook(listen)
    store = BlockStore(tmp_path, 500_000)
    for number in range(2000):
        store.get(str(number), lambda: bytes(996))
    listening.clear()
    assert 4 <= len(LOOKS) <= 160
    assert stored_bytes(tmp_path) <= 500_000


def work_with_others(folder: Path, seed: int = 0, bound: int = 200_000) -> None:
    """Ask for random blocks out of a few, and check each."""
    draw, store = random.Random(seed), BlockStore(folder, bound)
    for _ in range(400):
        key = str(draw.randrange(60))
        size = 1000 + 100 * int(key)
        if draw.random() < 0.5:
            start = draw.randrange(size)
            assert store.part(key, start, size, lambda key=key, size=size: content(key, size)) == content(key, size)[start:]
        else:
            assert store.get(key, lambda key=key, size=size: content(key, size)) == content(key, size)
        if draw.random() < 0.02:
            store = BlockStore(folder, bound)  # nothing in memory
        if draw.random() < 0.02:
            for path in [path for path in files(folder) if path.suffix != ".part"][:1]:
                path.write_bytes(hashlib.sha256(str(seed).encode()).digest())
    assert store.complaint is None


def test_a_pickled_store_is_its_folder_and_bound(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, 50_000)
    store.get("a", lambda: content("a"))
    sent = pickle.dumps(store)
    copy = pickle.loads(sent)
    assert (copy.folder, copy.most_bytes, len(sent) < 500) == (tmp_path, 50_000, True)
    assert copy.get("a", never) == content("a")


def fork_while_threads_work(folder: Path) -> None:
    """Fork while other threads hold the locks and make the very blocks that the child wants."""
    store, stop = BlockStore(folder, 0), threading.Event()

    def make(key: str) -> bytes:
        time.sleep(0.001)
        return content(key)

    def work(seed: int) -> None:
        while not stop.is_set():
            for key in map(str, range(seed, seed + 40)):
                assert store.get(key, lambda key=key: make(key)) == content(key)

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work, seed) for seed in range(4)]
        for number in range(30):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                right = all(store.get(key, lambda key=key: content(key)) == content(key) for key in map(str, range(50)))
                os._exit(0 if right else 1)
            assert os.waitpid(child, 0)[1] == 0, number
        stop.set()
        for worker in workers:
            worker.result()


def test_a_forked_process_waits_for_no_thread_of_its_parent(tmp_path: Path) -> None:
    run_in_process(fork_while_threads_work, tmp_path)


def run_in_process(work: object, *args: object) -> None:
    process = multiprocessing.get_context("spawn").Process(target=work, args=args)  # type: ignore[arg-type]
    process.start()
    process.join()
    assert process.exitcode == 0


def test_processes_and_threads_that_share_a_folder_read_right_blocks(tmp_path: Path) -> None:
    def one(seed: int) -> None:
        if seed < 3:
            run_in_process(work_with_others, tmp_path, seed)
        else:
            work_with_others(tmp_path, seed)

    with ThreadPoolExecutor(6) as pool:
        results: list[Future[None]] = [pool.submit(one, seed) for seed in range(6)]
        for result in results:
            result.result()
    assert stored_bytes(tmp_path) <= 200_000 * (1 + 6 / 32)
    assert not [path for path in files(tmp_path) if path.suffix == ".part"]
