"""Worker processes answer every call in order, whatever happens to them, and none of them outlives its parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepcluster.core import processes as module
from deepcluster.core.errors import DeepClusterError, UnreadableImage, WorkerLost
from deepcluster.core.processes import Workers
from deepcluster.core.shared_memory import MOST_IN_USE, SharedFile, arrays_in, bytes_for, map_file

Memory = Any
LONG = 120.0  # Only against hanging.


def echo(kept: Any, value: Any, memory: Memory) -> Any:
    return kept, value


def pid(kept: Any, memory: Memory) -> int:
    return os.getpid()


def write(kept: Any, number: int, shapes: Sequence[tuple[int, ...]], memory: Memory) -> bool:
    """Fill arrays with numbers that follow from `number`; return whether there is room for them."""
    fits = bytes_for(shapes) <= len(memory)
    for place, array in zip(arrays_in(memory, shapes) if fits else [], numbers(number, shapes), strict=fits):
        np.copyto(place, array)
    return fits


def numbers(number: int, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    return [np.random.default_rng([number, k]).integers(0, 256, shape, np.uint8) for k, shape in enumerate(shapes)]


def die(kept: Path, number: int, memory: Memory) -> str:
    """End by SIGKILL, until the folder has as many files as the number says."""
    (kept / f"{os.getpid()}").touch()
    if len(list(kept.iterdir())) <= number:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def wait_for(kept: Path, memory: Memory) -> str:
    while not kept.exists():
        time.sleep(0.005)
    return "done"


class Sealed(Exception):
    """It can be pickled, but not be read again."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def fail(kept: Any, how: str, memory: Memory) -> Any:
    if how == "plain":
        raise UnreadableImage("as it is")
    if how == "sealed":
        raise Sealed(3, 4)
    if how == "local":
        raise type("Local", (Exception,), {})("of no module")
    return lambda: "not to be sent"


def alive(number: int | None) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition; False if it does not come."""
    end = time.monotonic() + LONG
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture(params=["fork", "spawn"])
def started(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: request.param)
    return str(request.param)


# Answers


def test_each_call_has_its_own_answer(started: str) -> None:
    with closing(Workers("kept", 2)) as workers:
        calls = [workers.submit(echo, value) for value in range(20)]
        assert [call.result() for call in reversed(calls)] == [("kept", value) for value in reversed(range(20))]
        calls = [workers.submit(pid) for _ in range(8)]
        assert len({call.result() for call in calls} - {os.getpid()}) == 2
        shapes = [(3, 5, 2), (0, 4), (130,)]
        call = workers.submit(write, 7, shapes, buffer_bytes=bytes_for(shapes))
        assert call.result() is True
        for got, want in zip(call.arrays(shapes), numbers(7, shapes), strict=True):
            np.testing.assert_array_equal(got, want)
        with pytest.raises(UnreadableImage, match="as it is"):
            workers.submit(fail, "plain").result()


@pytest.mark.parametrize(("how", "words"), [("sealed", "3 and 4"), ("local", "of no module"), ("answer", "local object")])
def test_a_fault_or_an_answer_that_cannot_be_sent_is_told_in_words(how: str, words: str) -> None:
    with closing(Workers(None, 1)) as workers:
        first, second = workers.submit(fail, how), workers.submit(echo, 1)
        with pytest.raises(Exception, match=words) as caught:
            first.result()
        assert not isinstance(caught.value, WorkerLost)
        assert isinstance(caught.value, DeepClusterError) or how == "answer"
        assert second.result() == (None, 1)


def test_a_call_that_cannot_be_sent_leaves_no_trace() -> None:
    with closing(Workers(None, 1)) as workers:
        with pytest.raises(Exception, match="local object"):
            workers.submit(echo, lambda: 0)
        assert [workers.submit(echo, value).result() for value in range(3)] == [(None, value) for value in range(3)]


def test_calls_and_answers_larger_than_a_pipe_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that waits for room for a call, and a worker that waits for room for an answer, would wait for ever."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(int(LONG))
    try:
        with closing(Workers(None, 2)) as workers:
            values = [bytes([number]) * (1 << 20 if number % 3 else 100) for number in range(30)]
            calls = [workers.submit(echo, value) for value in values]
            assert [call.result()[1] for call in calls] == values
    finally:
        signal.alarm(0)


def test_small_calls_wait_in_the_pipe_of_a_busy_worker(tmp_path: Path) -> None:
    """So that it never waits for its parent."""
    with closing(Workers(tmp_path / "go", 1)) as workers:
        calls = [workers.submit(wait_for), *(workers.submit(echo, value) for value in range(5))]
        assert workers._workers[0].n_sent == 6
        (tmp_path / "go").touch()
        assert [call.result() for call in calls][1:] == [(tmp_path / "go", value) for value in range(5)]


def test_closed_workers_answer_nothing_and_nobody_waits(tmp_path: Path) -> None:
    workers = Workers(tmp_path / "never", 1)
    call, (number,) = workers.submit(wait_for), [worker.process.pid for worker in workers._workers]
    workers.close()
    assert not alive(number)
    with pytest.raises(ValueError, match="closed"):
        call.result()
    workers.close()


def test_a_stop_ends_the_waiting_but_lets_a_quick_answer_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.3)
    with closing(Workers(tmp_path / "go", 1)) as workers:
        call = workers.submit(wait_for)
        with pytest.raises(TimeoutError):
            call.result(lambda: True)
        (tmp_path / "go").touch()
        monkeypatch.setattr(module, "_PATIENCE_SECONDS", LONG)
        assert call.result(lambda: True) == "done"


def test_lines_of_workers_reach_the_parent() -> None:
    told: list[str] = []
    with closing(Workers(None, 2, begin=lambda say: say("begun"), tell=told.append)) as workers:
        for call in [workers.submit(echo, value) for value in range(4)]:
            call.result()
    assert told == ["begun", "begun"]


# Deaths


def test_a_killed_worker_is_replaced_and_every_call_is_answered(tmp_path: Path) -> None:
    told: list[str] = []
    with closing(Workers(tmp_path, 2, role="helper", tell=told.append)) as workers:
        deadly = workers.submit(die, 2)
        calls = [workers.submit(echo, value) for value in range(10)]
        assert deadly.result() == "done"
        assert [call.result()[1] for call in calls] == list(range(10))
        idle = workers._workers[0].process
        idle.kill()
        idle.join()
        assert [workers.submit(echo, value).result()[1] for value in range(4)] == list(range(4))
        assert len(workers._workers) == 2
    assert len(told) == 3
    assert all(
        line.startswith("a helper (pid ") and "was killed by SIGKILL, perhaps because memory" in line for line in told
    )


def test_a_call_that_kills_three_workers_is_given_up(tmp_path: Path) -> None:
    with closing(Workers(tmp_path, 2, tell=lambda line: None)) as workers:
        workers.submit(echo, 0).result()
        workers.submit(echo, 0).result()
        with pytest.raises(WorkerLost, match=r"SIGKILL.*like 2 before it: use fewer --workers, or --workers 0"):
            workers.submit(die, 100).result()


def test_workers_that_cannot_begin_are_given_up() -> None:
    def begin(say: object) -> None:
        os._exit(3)

    with closing(Workers(None, 1, begin=begin, tell=lambda line: None)) as workers:  # noqa: SIM117
        with pytest.raises(WorkerLost, match="ended with status 3"):
            workers.submit(echo, 0).result()


PARENT = """
import os, sys, time
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from deepcluster.core.processes import Workers
import test_processes as me
def start():
    return [Workers(Path(sys.argv[1]), 2) for _ in range(2)]
pools = ThreadPoolExecutor(1).submit(start).result() if "thread" in sys.argv else start()
calls = [pool.submit(me.wait_for) for pool in pools for _ in range(3)]
print(*[worker.process.pid for pool in pools for worker in pool._workers], flush=True)
if "interrupt" in sys.argv:
    calls[0].result()
time.sleep(1000)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Callable[..., "tuple[subprocess.Popen[str], list[int]]"]]:
    """Starts a process with two pools of workers that wait for the file `go`; returns it and the workers' numbers."""
    begun: list[subprocess.Popen[str]] = []

    def start(*words: str) -> "tuple[subprocess.Popen[str], list[int]]":
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(tmp_path / "go"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        begun.append(process)
        assert process.stdout is not None
        return process, [int(word) for word in process.stdout.readline().split()]

    yield start
    for process in begun:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("words", [(), ("thread",)])
def test_workers_end_silently_when_their_parent_is_killed(words: tuple[str, ...], parent: Any, tmp_path: Path) -> None:
    process, workers = parent(*words)
    assert len(workers) == 4
    os.kill(process.pid, signal.SIGKILL)
    (tmp_path / "go").touch()
    assert until(lambda: not any(map(alive, workers)))
    assert process.communicate(timeout=LONG)[1] == ""


@pytest.mark.parametrize("group", [False, True])
def test_ctrl_c_ends_all(group: bool, parent: Any) -> None:
    """Of a terminal it reaches all processes, of `kill` only the parent; workers never print a traceback."""
    process, workers = parent("interrupt")
    time.sleep(0.2)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=LONG)
    assert errors.count("KeyboardInterrupt") == errors.count("Traceback") == 1
    assert until(lambda: not any(map(alive, workers)))


# Shared memory


def test_memory_is_shared_by_its_path_and_ends_with_its_file() -> None:
    file = SharedFile(10)
    map_file(file.path)[3] = 7
    code = f"print(*open({file.path!r}, 'rb').read())"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["0", "0", "0", "7"] + ["0"] * 6
    path = file.path
    del file
    assert not Path(path).exists()


def test_without_memfd_a_temporary_file_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with closing(Workers(None, 1)) as workers:
        shapes = [(50, 3)]
        call = workers.submit(write, 1, shapes, buffer_bytes=bytes_for(shapes))
        call.result()
        np.testing.assert_array_equal(call.arrays(shapes)[0], numbers(1, shapes)[0])
        assert list(tmp_path.iterdir())
        del call
    del workers
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux has memory without a name")
def test_nothing_lies_in_dev_shm() -> None:
    """Where docker gives 64 MB: 200 MB of answers are held at once, all in memory that is in no folder."""
    with closing(Workers(None, 2)) as workers:
        calls = [workers.submit(write, number, [(8,)], buffer_bytes=20 << 20) for number in range(10)]
        held = [(call.result(), call.arrays([(8,)])) for call in calls]
        assert len(held) == 10
        for process in (os.getpid(), *(worker.process.pid for worker in workers._workers)):
            mapped = Path(f"/proc/{process}/maps").read_text()
            # Semaphores of scikit-learn's processes may be there, from other tests.
            assert not [line for line in mapped.splitlines() if "/dev/shm" in line and "/dev/shm/sem." not in line]
            assert mapped.count("memfd:deepcluster") >= 5


def answered(workers: Workers, number: int, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    call = workers.submit(write, number, shapes, buffer_bytes=bytes_for(shapes))
    assert call.result()
    return call.arrays(shapes)


def test_a_buffer_is_used_again_and_never_while_an_array_of_it_lives() -> None:
    random = np.random.default_rng(0)
    with closing(Workers(None, 3)) as workers:
        kept: list[tuple[Any, Any]] = []
        for number in range(300):
            shapes = [tuple(random.integers(1, 20, 3)) for _ in range(random.integers(1, 4))]
            which, first = int(random.integers(len(shapes))), int(random.integers(2))  # A part of one array is enough.
            arrays = answered(workers, number, shapes)
            kept.append((arrays[which][first:], numbers(number, shapes)[which][first:]))
            del arrays
            while len(kept) > random.integers(1, 12):
                kept.pop(int(random.integers(len(kept))))
            for got, want in kept:
                np.testing.assert_array_equal(got, want)
        assert workers.buffers._made < 100
        kept.clear()
        assert workers.buffers.in_use <= 1


def test_answers_that_are_hoarded_are_copied_so_that_handles_do_not_run_out() -> None:
    with closing(Workers(None, 2)) as workers:
        shapes = [(1000,)]
        hoard = [answered(workers, number, shapes)[0] for number in range(400)]
        for number, array in enumerate(hoard):
            np.testing.assert_array_equal(array, numbers(number, shapes)[0])
        assert workers.buffers.in_use <= MOST_IN_USE + 1


def test_sixteen_workers_and_a_hoard_need_fewer_than_256_handles(tmp_path: Path) -> None:
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import test_processes as me
workers = me.Workers(None, 16)
shapes, hoard = [(1000,)], []
for _ in range(3):
    calls = [workers.submit(me.write, number, shapes, buffer_bytes=1024) for number in range(33)]
    for number in range(33, 300):
        calls[0].result()
        hoard.append(calls.pop(0).arrays(shapes))
        calls.append(workers.submit(me.write, number, shapes, buffer_bytes=1024 + number))
    for call in calls:
        hoard.append((call.result(), call.arrays(shapes))[1])
    calls.clear()
    assert all((array == me.numbers(number % 300, shapes)[0]).all() for number, (array,) in enumerate(hoard))
    hoard = hoard if _ == 0 else []
workers.close()
print("done")
"""
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=LONG)
    assert (seen.stdout, seen.stderr) == ("done\n", "")


def test_what_a_dropped_pool_gave_stays_whole() -> None:
    workers = Workers(None, 1)
    (array,) = answered(workers, 5, [(100, 3)])
    workers.close()
    del workers
    np.testing.assert_array_equal(array, numbers(5, [(100, 3)])[0])


# Without a guard


@pytest.mark.parametrize("way", ["script", pytest.param("-c", marks=pytest.mark.slow)])
def test_spawned_workers_do_not_run_the_users_program_again(way: str, tmp_path: Path) -> None:
    code = f"""
import multiprocessing, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
multiprocessing.set_start_method("spawn", force=True)
import test_processes as me
print("begun")
workers = me.Workers("kept", 1)
print(workers.submit(me.echo, 3).result())
workers.close()
"""
    (tmp_path / "script.py").write_text(code)
    words = [str(tmp_path / "script.py")] if way == "script" else ["-c", code]
    seen = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=LONG)
    assert (seen.stdout, seen.stderr) == ("begun\n('kept', 3)\n", "")
