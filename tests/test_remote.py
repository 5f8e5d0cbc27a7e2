"""Remote files: whatever a server does, each byte is the file's or the user gets a message; a real server on 127.0.0.1."""

import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pytest
from http_server import NaughtyServer

from deepcluster.core import retry
from deepcluster.core.addresses import (
    expand,
    expand_braces,
    host_of,
    is_address,
    names_below,
    path_of,
    shown,
    whole_address,
)
from deepcluster.core.errors import DeepClusterError, InputError
from deepcluster.core.retry import ConnectionLost, NotThere, Refused, end_waits, tell_troubles_to
from deepcluster.data.storage import LocalFile, StoredFile, remote
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.remote import BLOCK_BYTES, RemoteFile, find_addresses, open_files

SIZE = 2 * BLOCK_BYTES + 1_234_567
BIG = random.Random(1).randbytes(SIZE)
OTHER = random.Random(2).randbytes(SIZE)
TARS = ["tar", ".tgz"]
ROOM = 1 << 40


@pytest.fixture
def server() -> Iterator[NaughtyServer]:
    with NaughtyServer({"big.tar": BIG}) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> BlockStore:
    return BlockStore(tmp_path / "blocks", ROOM)


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines about servers that are waited for; the waits are short."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.05)
    lines: list[str] = []
    monkeypatch.setattr(retry, "_tell", lines.append)
    return lines


def read_everything(file: RemoteFile, content: bytes, threads: int = 8) -> None:
    """Read random ranges from many threads, which cover the file, and compare each with the content."""
    draw = random.Random(0)
    cuts = sorted({0, len(content), *(draw.randrange(len(content)) for _ in range(40)), BLOCK_BYTES, 2 * BLOCK_BYTES})
    ranges = [*pairwise(cuts), (5, 5), (0, 1), (len(content) - 1, len(content) + 100)]
    draw.shuffle(ranges)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda span: file.read(span[0], span[1] - span[0]), ranges)
        for (start, stop), part in zip(ranges, found, strict=True):
            assert part == content[start:stop], f"{start} to {stop}"


def message(work: Callable[[], object], kind: type[DeepClusterError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Each misbehaviour, and how many bytes the server may send beyond the file for it.


def cut_in_the_middle(server: NaughtyServer) -> None:
    server.drop_after = 1_000_000


def answer_503(server: NaughtyServer) -> None:
    server.statuses += [(503, {"Retry-After": "0.02"})] * 4 + [(429, {"Retry-After": "0"})] * 2 + [(500, {})]


MISBEHAVIOURS: dict[str, Callable[[NaughtyServer], object]] = {
    "none": lambda server: None,
    "latency": lambda server: setattr(server, "latency", 0.05),
    "slow": lambda server: setattr(server, "bytes_per_second", 10e6),
    "cut in the middle": cut_in_the_middle,
    "every third request is cut": lambda server: setattr(server, "fail_every", 3),
    "503 and 429": answer_503,
    "short parts": lambda server: setattr(server, "short_by", 100_000),
    "short parts of a wrong length": lambda server: setattr(server, "lie_by", 100_000),
    "only a time": lambda server: setattr(server, "marks", {"Last-Modified"}),
    "only a size": lambda server: setattr(server, "marks", set()),
}


@pytest.mark.parametrize("kind", MISBEHAVIOURS)
def test_every_byte_is_right_and_is_fetched_once_whatever_the_server_does(
    server: NaughtyServer, tmp_path: Path, kind: str
) -> None:
    MISBEHAVIOURS[kind](server)
    file = RemoteFile(server.at("big.tar"), blocks=BlockStore(tmp_path, ROOM))
    assert (file.name, file.size, file.where()) == ("big.tar", SIZE, server.at("big.tar"))
    read_everything(file, BIG)
    # The question at the opening is for the first byte. What was sent before an answer broke off is not fetched again.
    assert server.sent["big.tar"] == SIZE + 1
    server.forget()
    again = RemoteFile(server.at("big.tar"), blocks=BlockStore(tmp_path, ROOM))
    read_everything(again, BIG)
    assert server.sent["big.tar"] <= 1
    assert again.stamp == file.stamp == file.now()


@pytest.mark.parametrize("content", [BIG, b""])
@pytest.mark.parametrize("length_known", [True, False])
def test_a_server_without_ranges_is_named(
    server: NaughtyServer, store: BlockStore, content: bytes, length_known: bool
) -> None:
    server.ranges, server.length_known, server.files["big.tar"] = False, length_known, content
    if length_known and not content:
        assert RemoteFile(server.at("big.tar"), blocks=store).read(0, 10) == b""
        return
    assert message(lambda: RemoteFile(server.at("big.tar"), blocks=store)) == (
        f"{server.at('big.tar')} can't be read in parts: the server does not support ranges or does not say its size; "
        "download it and give the local file"
    )


def test_a_server_that_stops_giving_parts_is_noticed(server: NaughtyServer, store: BlockStore) -> None:
    file = RemoteFile(server.at("big.tar"), blocks=store)
    assert file.read(10, 5) == BIG[10:15]
    server.ranges = False
    assert "does not support ranges" in message(lambda: file.read(BLOCK_BYTES, 5))
    assert file.read(10, 5) == BIG[10:15]


@pytest.mark.parametrize(("misbehave", "words"), [
    (lambda server: setattr(server, "drop_after", 150_000), "the connection was lost"),
    (lambda server: setattr(server, "shift", 1), "the server sent another part than was asked for"),
    (lambda server: setattr(server, "longer_by", 7), "the server sent 4,194,311 of 4,194,304 bytes"),
])  # fmt: skip
def test_parts_that_are_never_right_end_in_words(
    server: NaughtyServer, store: BlockStore, misbehave: Callable[[NaughtyServer], None], words: str
) -> None:
    file = RemoteFile(server.at("big.tar"), blocks=store)
    misbehave(server)
    told = message(lambda: file.read(0, 1), ConnectionLost)
    assert re.sub(r"after \d+ s", "after N s", told) == (
        f"{server.at('big.tar')} can't be read: {words} (attempt 8, after N s); once it answers, continue with --resume"
    )


def test_sixteen_threads_that_want_one_block_make_one_request(server: NaughtyServer, store: BlockStore) -> None:
    file = RemoteFile(server.at("big.tar"), blocks=store)
    server.latency = 0.1
    server.forget()
    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda number: file.read(number * 1000, 1000), range(16)))
    assert b"".join(parts) == BIG[:16000]
    assert server.requests["big.tar"] == 1


def test_the_bound_on_the_disk_is_kept_while_remote_files_are_read(server: NaughtyServer, tmp_path: Path) -> None:
    bound = 3 * BLOCK_BYTES
    store = BlockStore(tmp_path, bound)
    for number in range(3):
        server.files[f"{number}.tar"] = BIG[number:]
        file = RemoteFile(server.at(f"{number}.tar"), blocks=store)
        read_everything(file, BIG[number:], threads=2)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= bound


# Changes


@pytest.mark.parametrize("marks", [{"ETag"}, {"Last-Modified"}, set()], ids=str)
def test_other_content_is_never_mixed_in(server: NaughtyServer, store: BlockStore, marks: set[str]) -> None:
    server.marks = marks
    file = RemoteFile(server.at("big.tar"), blocks=store)
    assert file.read(0, 10) == BIG[:10]
    other = OTHER if marks else OTHER[:-1]  # by the size alone a change of size can be seen
    server.change("big.tar", other)
    told = message(lambda: file.read(BLOCK_BYTES, 10))
    assert told.startswith(f"{server.at('big.tar')} changed while it was in use (it was {SIZE}")
    assert file.now() not in ("", file.stamp)
    new = RemoteFile(server.at("big.tar"), blocks=store)
    assert new.stamp == file.now()
    read_everything(new, other)


def test_a_change_between_two_parts_of_a_block_is_seen(
    server: NaughtyServer, store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.2)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.2)
    file = RemoteFile(server.at("big.tar"), blocks=store)
    server.drop_after = 1_000_000

    def change() -> None:
        while server.sent["big.tar"] < 1_000_001:
            time.sleep(0.001)
        server.change("big.tar", OTHER)

    changing = threading.Thread(target=change)
    changing.start()
    assert "changed while it was in use" in message(lambda: file.read(0, BLOCK_BYTES))
    changing.join()


def test_a_file_that_became_shorter_is_seen(server: NaughtyServer, store: BlockStore) -> None:
    server.marks = set()
    file = RemoteFile(server.at("big.tar"), blocks=store)
    server.change("big.tar", BIG[:1000])
    assert "changed while it was in use" in message(lambda: file.read(BLOCK_BYTES, 10))


def test_a_file_that_is_gone_is_told(server: NaughtyServer, store: BlockStore) -> None:
    file = RemoteFile(server.at("big.tar"), blocks=store)
    del server.files["big.tar"]
    assert file.now() == ""
    told = message(lambda: file.read(0, 10))
    assert told == f"{server.at('big.tar')} does not exist (the server answered 404 (Not Found))"


# Waiting, and giving up


def test_a_server_that_comes_back_costs_a_wait_and_one_line(
    server: NaughtyServer, store: BlockStore, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(retry, "ATTEMPTS", 200)
    file = RemoteFile(server.at("big.tar"), blocks=store)
    server.bytes_per_second = 20e6

    def restart() -> None:
        while server.sent["big.tar"] < 1_000_000:
            time.sleep(0.001)
        server.stop()
        time.sleep(0.4)
        server.bytes_per_second = None
        server.start()

    restarting = threading.Thread(target=restart)
    restarting.start()
    read_everything(file, BIG)
    restarting.join()
    assert len(told) == 1
    assert told[0].startswith(f"{server.at('big.tar')}: ")
    assert told[0].endswith("; trying again, 200 times at most")


def test_a_server_that_stays_away_ends_in_words_and_is_no_fault_of_the_input(
    store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "ATTEMPTS", 4)
    with NaughtyServer({"big.tar": BIG}) as server:
        file = RemoteFile(server.at("big.tar"), blocks=store)
        server.statuses += [(503, {})] * 100
        told = message(lambda: file.read(0, 1), ConnectionLost)
        assert "the server answered 503 (Service Unavailable) (attempt 4, after" in told
        assert server.requests["big.tar"] == 5
    told = message(lambda: file.read(0, 1), ConnectionLost)
    assert "can't be read: nothing answers there (connection refused) (attempt 4, after" in told
    assert told.endswith("; once it answers, continue with --resume")
    assert not issubclass(ConnectionLost, InputError)  # or readers would take the image for a damaged one


def test_python_warns_of_troubles_unless_they_are_told_elsewhere(
    server: NaughtyServer, store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(retry, "_tell", warnings.warn)
    file = RemoteFile(server.at("big.tar"), blocks=store)
    server.statuses.append((503, {}))
    with pytest.warns(UserWarning, match=r"the server answered 503 \(Service Unavailable\); trying again, 8 times at most"):
        file.read(0, 1)
    lines: list[str] = []
    tell_troubles_to(lines.append)
    server.statuses.append((503, {}))
    file.read(BLOCK_BYTES, 1)
    assert len(lines) == 1


@pytest.mark.parametrize(("status", "words"), [
    (401, "may not be read: the server answered 401 (Unauthorized); use an address that is signed"),
    (403, "may not be read: the server answered 403 (Forbidden); use an address that is signed"),
    (404, "does not exist (the server answered 404 (Not Found))"),
    (410, "does not exist (the server answered 410 (Gone))"),
    (451, "can't be read: the server answered 451 (Unavailable For Legal Reasons)"),
    (499, "can't be read: the server answered 499"),
])  # fmt: skip
def test_what_no_waiting_mends_is_told_at_once(server: NaughtyServer, store: BlockStore, status: int, words: str) -> None:
    server.status_of["big.tar"] = status
    told = message(lambda: RemoteFile(server.at("big.tar"), blocks=store))
    assert told.startswith(f"{server.at('big.tar')} {words}")
    assert server.requests["big.tar"] == 1


def test_a_server_that_never_answered_is_tried_a_few_times(store: BlockStore) -> None:
    with NaughtyServer({}) as server:
        address = server.at("big.tar")
    told = message(lambda: RemoteFile(address, blocks=store))
    assert told == (
        f"{address} can't be reached: nothing answers there (connection refused); check the address and the network"
    )
    told = message(lambda: RemoteFile("http://no.such.host.invalid/a.tar", blocks=store))
    assert "can't be reached: the name of the server can't be resolved; check" in told


def test_a_silent_server_is_left_after_a_while(
    server: NaughtyServer, store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "READ_SECONDS", 0.1)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    server.latency = 1.0
    told = message(lambda: RemoteFile(server.at("big.tar"), blocks=store), ConnectionLost)
    assert "can't be read: no answer within the time allowed (attempt 2" in told


@pytest.mark.parametrize(("address", "words"), [
    ("s4://bucket/a.tar", "s4:// is no known kind of address (did you mean s3?)"),
    ("simplecache::s3://bucket/a.tar", "leave out simplecache:: of simplecache::s3://bucket/a.tar: parts of remote files"),
    ("memory://none/a.tar", "memory://none/a.tar does not exist (nothing was found there)"),
    ("http://127.0.0.1:99999/a.tar", "http://127.0.0.1:99999/a.tar can't be read"),
])  # fmt: skip
def test_addresses_that_lead_nowhere_are_told(store: BlockStore, address: str, words: str) -> None:
    assert message(lambda: RemoteFile(address, blocks=store)).startswith(words)


def test_a_missing_package_is_named(store: BlockStore) -> None:
    extras = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
    for scheme, package in extras.items():
        try:
            __import__(package)
        except ImportError:
            told = message(lambda scheme=scheme: RemoteFile(f"{scheme}://x/a.tar", blocks=store))
            want = f"{scheme}:// addresses need a package that is not installed: pip install {package}"
            assert told == want


def test_waits_double_up_to_the_longest_and_heed_the_server(
    server: NaughtyServer, store: BlockStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = RemoteFile(server.at("big.tar"), blocks=store)
    monkeypatch.undo()
    waits: list[float] = []

    class Hasty(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    monkeypatch.setattr(retry, "ATTEMPTS", 12)
    monkeypatch.setattr(retry, "_endings", {os.getpid(): Hasty()})
    monkeypatch.setattr(retry, "_tell", [].append)
    server.statuses += [(503, {"Retry-After": each}) for each in ("soon", "", "-1", "1e9", "nan", "1.5", "x", "y")]
    server.statuses += [(429, {"Retry-After": each}) for each in ("200", "999999")]
    assert file.read(0, 5) == BIG[:5]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60], strict=False))
    assert waits[8:] == [200.0, 300.0]


@pytest.mark.parametrize("phase", ["waiting", "hanging"])
def test_all_waits_end_at_once_when_someone_says_so(
    server: NaughtyServer, store: BlockStore, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 100.0)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 100.0)
    file = RemoteFile(server.at("big.tar"), blocks=store)
    if phase == "waiting":
        server.statuses += [(503, {})] * 100
    else:
        server.latency = 3.0
    server.forget()
    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(file.read, number * BLOCK_BYTES, 5) for number in range(3)]
        while server.requests["big.tar"] < 3:
            time.sleep(0.01)
        time.sleep(0.1)
        end_waits()
        assert all("stopped while waiting" in message(read.result, ConnectionLost) for read in reads)
    server.statuses.clear()
    server.latency = 0.0
    assert file.read(7, 5) == BIG[7:12]


INTERRUPTED = """
import sys
from pathlib import Path
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.remote import find_addresses, open_files
print("begins", flush=True)
try:
    open_files(find_addresses(sys.argv[1], ["tar"]), BlockStore(Path(sys.argv[2]), 0))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("pattern", ["big.tar", "{a,b,c,d}.tar"])
def test_a_person_can_interrupt_a_server_that_hangs(server: NaughtyServer, tmp_path: Path, pattern: str) -> None:
    server.latency = 100.0
    command = [sys.executable, "-c", INTERRUPTED, server.at(pattern), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not server.requests:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=10)  # far less than the server's 100 seconds, and its reader's 30
    assert output == "begins\ninterrupted\n"
    assert process.returncode == 0


def test_a_pickled_file_reads_the_same_bytes(server: NaughtyServer, store: BlockStore) -> None:
    file = RemoteFile(server.at("big.tar"), blocks=store)
    copy = pickle.loads(pickle.dumps(file))
    assert (copy.name, copy.size, copy.stamp, copy.where()) == (file.name, file.size, file.stamp, file.where())
    read_everything(copy, BIG)
    assert len(pickle.dumps(file)) < 1000


def test_errors_come_back_from_another_process(server: NaughtyServer, store: BlockStore) -> None:
    """A worker process sends what it raises to its parent, with its type and its words."""
    file = RemoteFile(server.at("big.tar"), blocks=store)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(file.read, 5, 5).result() == BIG[5:10]
        server.status_of["big.tar"] = 404
        with pytest.raises(NotThere, match="does not exist"):
            pool.submit(file.read, BLOCK_BYTES, 5).result()
        server.status_of["big.tar"] = 403
        with pytest.raises(Refused, match="may not be read"):
            pool.submit(file.read, BLOCK_BYTES, 5).result()
        server.status_of.clear()
        server.change("big.tar", OTHER)
        with pytest.raises(InputError, match="changed while it was in use"):
            pool.submit(file.read, BLOCK_BYTES, 5).result()
    for kind in (ConnectionLost, NotThere, Refused):
        error = pickle.loads(pickle.dumps(kind("the words")))
        assert (type(error), str(error)) == (kind, "the words")


def test_a_forked_process_reads_on(server: NaughtyServer, tmp_path: Path) -> None:
    """In an interpreter of its own, since this one has threads."""
    run_in_process(use_and_fork, server.at("big.tar"), str(tmp_path))


def use_and_fork(address: str, folder: str) -> None:
    """Fork again and again while threads read; both sides read on, and no lock of a thread hangs the child."""
    file = RemoteFile(address, blocks=BlockStore(Path(folder), 2 * BLOCK_BYTES))
    stop = threading.Event()

    def read_on(seed: int) -> None:
        draw = random.Random(seed)
        while not stop.is_set():
            start = draw.randrange(SIZE - 10)
            assert file.read(start, 10) == BIG[start : start + 10]

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read_on, seed) for seed in range(4)]
        try:
            for _ in range(10):
                child = os.fork()
                if child == 0:
                    signal.alarm(20)
                    right = all(
                        file.read(start, 10) == BIG[start : start + 10] for start in (0, BLOCK_BYTES, 2 * BLOCK_BYTES)
                    )
                    end_waits()
                    os._exit(0 if right else 1)
                assert os.waitpid(child, 0)[1] == 0
        finally:  # The readers would never end.
            stop.set()
        for reader in readers:
            reader.result()


def run_in_process(work: Callable[..., None], *args: object) -> None:
    process = multiprocessing.get_context("spawn").Process(target=work, args=args)
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0


# Finding files


def find_files(pattern: str, store: BlockStore) -> list[StoredFile]:
    return open_files(find_addresses(pattern, TARS), store)


def found(server: NaughtyServer, pattern: str, store: BlockStore) -> list[str]:
    return [file.name for file in find_files(server.at(pattern), store)]


@pytest.mark.parametrize(("pattern", "names"), [
    ("d/", ["a.tar", "b/c.tar", "b/d.TGZ", "b/e/f.tar", "g h.tar"]),
    ("d", ["a.tar", "b/c.tar", "b/d.TGZ", "b/e/f.tar", "g h.tar"]),
    ("d/b/", ["c.tar", "d.TGZ", "e/f.tar"]),
    ("d/*.tar", ["a.tar", "g h.tar"]),
    ("d/*/*.tar", ["c.tar"]),
    ("d/**/*.tar", ["a.tar", "b/c.tar", "b/e/f.tar", "g h.tar"]),
    ("d/b/[c-d].*", ["c.tar", "d.TGZ"]),
    ("d/{g h,a}.tar", ["g h.tar", "a.tar"]),
    ("d/{b/e/f,a}.tar", ["b/e/f.tar", "a.tar"]),
    ("d/b/{d.TGZ,*.tar}", ["d.TGZ", "c.tar"]),
    ("s/part-{08..11}.tar", ["part-08.tar", "part-09.tar", "part-10.tar", "part-11.tar"]),
    ("d/notes.txt", ["notes.txt"]),
    ("d/a.tar?x=1", ["a.tar"]),
    ("d/{a.tar?x=1,a.tar?x=2}", ["a.tar", "a-2.tar"]),
])  # fmt: skip
def test_files_are_found_by_pattern_and_folder(
    server: NaughtyServer, store: BlockStore, pattern: str, names: list[str]
) -> None:
    inner = ["d/a.tar", "d/b/c.tar", "d/b/d.TGZ", "d/b/e/f.tar", "d/g h.tar", "d/notes.txt", "d/b/x.jpg"]
    inner += [f"s/part-{number:02}.tar" for number in range(8, 12)]
    server.files |= {path: path.encode() for path in inner}
    assert found(server, pattern, store) == names


def test_what_is_not_found_is_told(server: NaughtyServer, store: BlockStore) -> None:
    server.files["d/notes.txt"] = b""
    for pattern in ("d/*.tar", "d/", "d"):
        told = message(lambda pattern=pattern: found(server, pattern, store))
        assert told == f"nothing was found at {server.at(pattern)}: looked for .tar .tgz"
    told = message(lambda: found(server, "{big,none}.tar", store))
    assert told == f"{server.at('none.tar')} does not exist (the server answered 404 (Not Found))"


def test_a_listing_that_breaks_off_is_asked_for_again(server: NaughtyServer, store: BlockStore) -> None:
    server.files |= {f"d/{number}/{inner}.tar": b"x" for number in range(5) for inner in range(5)}
    server.fail_every = 3
    assert len(found(server, "d/", store)) == 25


def test_pythons_own_server_is_listed(tmp_path: Path, store: BlockStore) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "a b#c.tar").write_bytes(BIG)
    (tmp_path / "data" / "sub" / "é.tar").write_bytes(b"")
    code = (
        "import http.server as h, functools, sys\n"
        "s = h.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(h.SimpleHTTPRequestHandler, directory=sys.argv[1]))\n"
        "print(s.server_port, flush=True)\ns.serve_forever()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = find_addresses(f"http://127.0.0.1:{int(process.stdout.readline())}/data", TARS)
            assert names_below([path_of(one) for one in found]) == ["a b#c.tar", "sub/é.tar"]
            assert remote.read_whole(found[0]) == BIG
            assert "does not support ranges" in message(lambda: open_files(found, store))
        finally:
            process.terminate()


# Other file systems


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_files_in_memory_are_read_and_found(memory: Any, store: BlockStore) -> None:
    memory.pipe({"/m/big.tar": BIG, "/m/sub/x.tar": b"x", "/m/notes.txt": b""})
    found = find_files("memory://m", store)
    assert [(file.name, file.size, file.where()) for file in found] == [
        ("big.tar", SIZE, "memory:///m/big.tar"),
        ("sub/x.tar", 1, "memory:///m/sub/x.tar"),
    ]
    read_everything(found[0], BIG, threads=16)  # type: ignore[arg-type]
    for pattern, names in {
        "memory://m/*.tar": ["big.tar"],
        "memory://m/?ig.tar": ["big.tar"],
        "memory://m/**/*.tar": ["big.tar", "sub/x.tar"],
        "memory://m/{sub/x,big}.tar": ["sub/x.tar", "big.tar"],
        "memory://m/notes.txt": ["notes.txt"],
    }.items():
        assert [file.name for file in find_files(pattern, store)] == names
    told = message(lambda: find_addresses("memory://m/**.tar", TARS))
    assert told == "memory://m/**.tar is no pattern: Invalid pattern: '**' can only be an entire path component"
    told = message(lambda: find_addresses("memory://m/*.zip", ["zip"]))
    assert told == "nothing was found at memory://m/*.zip: looked for .zip"


def test_a_folder_or_page_is_no_file(memory: Any, server: NaughtyServer, store: BlockStore) -> None:
    memory.pipe("/m/x.tar/y.tar", b"y")
    server.files["x.tar/y.tar"] = b"y"
    for address in ("memory://m/x.tar", server.at("x.tar")):
        told = message(lambda address=address: RemoteFile(address, blocks=store))
        assert told == f"{address} is a folder or a web page, not a file"
        assert [file.name for file in find_files(f"{address}/", store)] == ["y.tar"]


def test_a_change_in_memory_is_seen(memory: Any, store: BlockStore) -> None:
    memory.pipe("/m/big.tar", BIG)
    file = RemoteFile("memory://m/big.tar", blocks=store)
    assert file.read(0, 10) == BIG[:10]
    assert file.now() == file.stamp
    memory.pipe("/m/big.tar", OTHER)
    assert file.now() not in ("", file.stamp)
    assert "changed while it was in use" in message(lambda: file.read(BLOCK_BYTES, 10))
    memory.rm("/m/big.tar")
    assert file.now() == ""


def test_a_file_in_an_archive_is_a_chain(tmp_path: Path, store: BlockStore) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in/big.tar", BIG)
        archive.writestr("in/b.tar", b"b")
    chain = f"zip://in/*.tar::{tmp_path / 'x.zip'}"
    found = find_files(chain, store)
    assert [file.name for file in found] == ["b.tar", "big.tar"]
    read_everything(found[1], BIG)  # type: ignore[arg-type]


def test_a_remote_file_has_a_position_like_a_local_one(server: NaughtyServer, store: BlockStore, tmp_path: Path) -> None:
    (tmp_path / "big.tar").write_bytes(BIG)
    remote = RemoteFile(server.at("big.tar"), blocks=store).as_file()
    local = LocalFile(tmp_path / "big.tar").as_file()
    draw = random.Random(5)
    for _ in range(30):
        place, length = draw.randrange(SIZE + 100), draw.randrange(100_000)
        assert remote.seek(place) == local.seek(place)
        assert remote.read(length) == local.read(length)
        assert remote.tell() == local.tell()
    assert remote.seek(-10, os.SEEK_END) == SIZE - 10
    assert remote.read() == BIG[-10:]


# Addresses and patterns


@pytest.mark.parametrize("text", [
    "s3://bucket/a.tar", "https://host/a", "HTTP://host/a", "gs://b", "hf://datasets/x/y", "zip://a.jpg::s3://b/x.zip",
    "simplecache::s3://b/x", "memory://x", "abfs://c@account/x", "web+x://y",
])  # fmt: skip
def test_these_are_addresses(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize("text", [
    "photos", "/photos", "C:/photos", r"C:\photos", "C://photos", "digits.npz::000012", "a:b", "file:///photos", "local://x",
    "File:///x", "", "://x", "s3:/bucket", "a b://c", r"\\server\share",
])  # fmt: skip
def test_these_are_paths(text: str) -> None:
    assert not is_address(text)


def test_addresses_are_shown_without_what_lets_their_readers_in() -> None:
    signed = "https://me:word@host/a.tar?X-Amz-Credential=AK&X-Amz-Signature=12ab&id=5&sig=z%3D&access_token=t"
    want = "https://...@host/a.tar?X-Amz-Credential=...&X-Amz-Signature=...&id=5&sig=...&access_token=..."
    assert shown(signed) == want
    assert shown(f"(url='{signed}')") == f"(url='{want}')"
    assert shown("s3://bucket/token=1/a@b:c.tar") == "s3://bucket/token=1/a@b:c.tar"


def test_a_run_keeps_an_address_that_finds_its_data_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert whole_address("photos/../other") == whole_address(Path("other")) == str(tmp_path / "other")
    assert whole_address("~/photos") == str(tmp_path / "home" / "photos")
    assert whole_address("https://me:secret@host/a.tar?sig=abc") == "https://...@host/a.tar?sig=..."
    assert whole_address("file:///photos/a.tar") == "file:///photos/a.tar"


def test_parts_of_addresses() -> None:
    assert host_of("S3://bucket/a/b") == "s3://bucket"
    assert host_of("zip://a/b.jpg::https://host/x.zip") == host_of("zip://c.jpg::https://host/x.zip")
    assert path_of("https://host:80/a%20b/c.tar?d=/e#f") == "a b/c.tar"
    assert path_of("s3://bucket/a?b#c%20d") == "a?b#c%20d"
    assert path_of("zip://a/b.jpg::https://host/x.zip") == "a/b.jpg"
    assert names_below(["a/b/c", "a/b-/d", "a/b"]) == ["b/c", "b-/d", "b"]
    assert names_below(["a/b/c"]) == ["c"]


@pytest.mark.parametrize("pattern", [
    "part-{000..003}.tar", "{a,b{1,2}}x{c,d}", "{}x{a}", "{5..1..2}", "x{a,", "a}{b,c}", "{{a,b}}", "{-2..1}", "{08..11}",
    "a{b{1,2}c", "{a..c,d}", "{1..2..0}", "x", "{a,b}{1..2}{,z}k", "{1...2}", "{01..-1}",
])  # fmt: skip
def test_braces_stand_for_what_a_shell_makes_of_them(pattern: str) -> None:
    shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
    assert expand_braces(pattern) == shell.stdout.split()


def test_endless_braces_are_refused() -> None:
    assert message(lambda: expand_braces("s3://b/{0..99999999999}.tar")) == (
        "s3://b/{0..99999999999}.tar stands for more than 100,000 names; use a * instead"
    )


def test_local_patterns_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a1.tar", "a2.tar", "b.tar", "x[1].tar", "{z,y}.tar", "sub/c.tar", "a b.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert expand("a?.tar") == ["a1.tar", "a2.tar"]
    assert expand("{b,a*}.tar") == ["b.tar", "a b.tar", "a1.tar", "a2.tar"]
    assert expand("x[1].tar") == ["x[1].tar"]  # a file of that very name
    assert expand("{z,y}.tar") == ["{z,y}.tar"]
    assert expand("{x[1],b}.tar") == ["x[1].tar", "b.tar"]
    assert expand("**/c.tar") == ["sub/c.tar"]
    assert expand("{b,b}.tar") == ["b.tar"]
    assert expand("not there") == ["not there"]
    assert expand("a{1..3}.tar") == ["a1.tar", "a2.tar", "a3.tar"]  # whoever opens it says that one is missing
    assert expand(f"file://{tmp_path}/a%20b.tar") == [f"{tmp_path}/a b.tar"]
    assert expand(f"file://localhost{tmp_path}/*1.tar") == [f"{tmp_path}/a1.tar"]
    assert message(lambda: expand("*.zip")) == f"nothing matches *.zip in {tmp_path}"
    assert message(lambda: expand(f"{tmp_path}/*.zip")) == f"nothing matches {tmp_path}/*.zip"
