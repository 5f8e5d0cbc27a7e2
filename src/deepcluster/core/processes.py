"""Worker processes that answer calls.

Every worker keeps one object. A call is a function of that object and small arguments; its answer is small as well, or is
written into a shared buffer. There are no queues, threads or locks: each worker has a pipe, so that nothing can hang when a
worker is killed, and a worker ends by itself when its parent is gone.
"""

import gc
import multiprocessing
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.core.errors import DeepClusterError, WorkerLost
from deepcluster.core.shared_memory import MOST_IN_USE, Buffers, arrays_in, mapped_once

Say = Callable[[str], None]

# A call whose worker died so many times is given up; so is the replacement of workers that die at once.
MOST_DEATHS = 3
# How often a caller that waits for an answer looks whether it should stop, and how long it waits for the answer after that.
_POLL_SECONDS, _PATIENCE_SECONDS = 0.25, 5.0
# Of calls that a worker has not begun, what its pipe takes surely.
_PIPE_BYTES = 32 << 10


def start_method() -> str:
    """Return how workers are started: as the user set it for `multiprocessing`, else fork on Linux and spawn elsewhere."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or ("fork" if sys.platform == "linux" else "spawn")


class Call:
    """Work that a worker was asked for.

    Attributes:
        memory: shared with the worker, for an answer that is large; None where none was asked for.
    """

    def __init__(self, workers: "Workers", function: Callable[..., Any], args: tuple[Any, ...], buffer_bytes: int) -> None:
        buffer, self.memory = workers.buffers.take(buffer_bytes) if buffer_bytes else (None, None)  # type: ignore[var-annotated]
        self.request = pickle.dumps((function, args, buffer and (buffer.file.path, buffer.number)))
        self.deaths = 0
        self.answer: tuple[bool, Any] | None = None
        self._workers = workers

    def result(self, stopped: Callable[[], bool] = lambda: False) -> Any:
        """Return the answer, waiting for it; raise what the function raised.

        Args:
            stopped: asked now and then; once it is true, the answer is waited for a few seconds more at most.

        Raises:
            WorkerLost: workers that did this died again and again.
            TimeoutError: no answer came in time after a stop.
        """
        give_up = None
        while self.answer is None:
            if stopped():
                give_up = give_up or time.monotonic() + _PATIENCE_SECONDS
                if time.monotonic() > give_up:
                    raise TimeoutError
            self._workers.receive()
        succeeded, value = self.answer
        if not succeeded:
            raise value
        return value

    def arrays(self, shapes: Sequence[tuple[int, ...]]) -> list[NDArray[np.uint8]]:
        """Return the arrays that were put into the memory of this call, one after the other; it is theirs until they go."""
        if self.memory is None:
            raise ValueError("this call has no buffer")
        few = self._workers.buffers.in_use <= MOST_IN_USE
        return arrays_in(self.memory if few else self.memory.copy(), shapes)


class _Worker:
    """A process, the pipe to it, and the calls that it has not answered yet, the oldest first."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe
        self.calls: deque[Call] = deque()
        self.n_sent = 0
        self.has_answered = False

    def send(self) -> None:
        """Send calls as far as the pipe has room for them: a parent that waited for room could not take answers."""
        while self.n_sent < len(self.calls):
            request = self.calls[self.n_sent].request
            waiting = sum(len(self.calls[number].request) for number in range(self.n_sent))
            if self.n_sent and waiting + len(request) > _PIPE_BYTES:
                return
            self.n_sent += 1
            with suppress(BrokenPipeError, ConnectionResetError):  # `receive` will meet its end, and replace it.
                self.pipe.send_bytes(request)


class Workers:
    """Processes that answer calls.

    A worker that is killed is replaced, and its calls are sent again: functions must not mind being called twice.

    Args:
        kept: what each worker keeps and passes to functions as their first argument.
        count: number of processes.
        role: what a worker is, for messages.
        begin: called in each worker at its start with `say`, which passes a line to the parent.
        tell: is given such lines, and those about workers that died.
    """

    def __init__(
        self,
        kept: Any,
        count: int,
        *,
        role: str = "worker process",
        begin: Callable[[Say], None] | None = None,
        tell: Say = warnings.warn,
    ) -> None:
        self._kept, self._role, self._begin, self._tell = kept, role, begin, tell
        self.buffers = Buffers()
        self._deaths_at_start = 0
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def submit(self, function: Callable[..., Any], *args: Any, buffer_bytes: int = 0) -> Call:
        """Send a call to the least busy worker. The function is called with what is kept, `args`, and the buffer's memory.

        Args:
            buffer_bytes: size of the buffer that is wanted; 0 for none (then None is passed for it).
        """
        call = Call(self, function, args, buffer_bytes)
        worker = min(self._workers, key=lambda worker: len(worker.calls))
        worker.calls.append(call)
        worker.send()
        return call

    def receive(self, seconds: float = _POLL_SECONDS) -> None:
        """Take the answers that are there, waiting for one for some time; replace workers that have died."""
        by_pipe = {worker.pipe: worker for worker in self._workers if worker.calls}
        if not by_pipe:
            raise ValueError("the workers are closed")
        for pipe in wait(list(by_pipe), seconds):
            worker = by_pipe[pipe]  # type: ignore[index]
            try:
                kind, value = worker.pipe.recv()
            except (EOFError, OSError):
                self._replace(worker)
                continue
            worker.has_answered = True
            if kind == "said":
                self._tell(value)
                continue
            call = worker.calls.popleft()
            call.answer = kind == "done", value
            worker.n_sent -= 1
            worker.send()

    def close(self) -> None:
        """End the workers, whatever they do."""
        for worker in self._workers:
            worker.process.terminate()
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(1.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def _start(self) -> _Worker:
        context = multiprocessing.get_context(start_method())
        mine, theirs = context.Pipe()
        # In a forked process the pipes of the others are open as well: it could not see that its parent is gone.
        to_close = [mine, *(worker.pipe for worker in self._workers)] if start_method() == "fork" else []
        process = context.Process(  # type: ignore[attr-defined]
            target=_serve, args=(theirs, to_close, self._kept, self._begin), name="deepcluster-worker", daemon=True
        )
        with _main_module_hidden():
            process.start()
        theirs.close()
        return _Worker(process, mine)

    def _replace(self, dead: _Worker) -> None:
        """Start a worker for one that has died, and send it the calls that are not answered."""
        dead.process.join(_PATIENCE_SECONDS)
        code = dead.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
        what = f"a {self._role} (pid {dead.process.pid}) {how}"
        if code == -signal.SIGKILL:
            what += ", perhaps because memory is short"
        dead.pipe.close()
        self._deaths_at_start += not dead.has_answered
        if dead.calls:
            dead.calls[0].deaths += 1
        if self._deaths_at_start >= MOST_DEATHS or (dead.calls and dead.calls[0].deaths >= MOST_DEATHS):
            raise WorkerLost(f"{what}, like {MOST_DEATHS - 1} before it: use fewer --workers, or --workers 0 for none")
        self._tell(f"{what}; another one takes its place")
        place = self._workers.index(dead)
        del self._workers[place]
        new = self._start()
        self._workers.insert(place, new)
        new.calls = dead.calls
        new.send()


class _main_module_hidden:
    """Keep a spawned process from importing the user's script or notebook, which would start the work a second time."""

    def __enter__(self) -> None:
        self._main = sys.modules["__main__"]
        if start_method() != "fork":
            sys.modules["__main__"] = ModuleType("__main__")

    def __exit__(self, *fault: object) -> None:
        sys.modules["__main__"] = self._main


def _serve(pipe: Connection, to_close: list[Connection], kept: Any, begin: Callable[[Say], None] | None) -> None:
    """Answer calls until the parent closes the pipe or is gone."""
    leave_signals_to_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in to_close:
        other.close()
    gc.freeze()  # What was forked is left where it is, shared with the parent.
    torch.set_num_threads(1)

    def say(line: str) -> None:
        pipe.send(("said", line))

    if begin is not None:
        begin(say)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            request = pipe.recv_bytes()
            try:
                function, args, buffer = pickle.loads(request)
                answer = pickle.dumps(("done", function(kept, *args, None if buffer is None else mapped_once(*buffer))))
            except Exception as fault:
                answer = pickle.dumps(("failed", _sendable(fault)))
            pipe.send_bytes(answer)


def leave_signals_to_parent() -> None:
    """Ignore Ctrl-C, a closed terminal and a scheduler's warning: they reach all processes, and the parent decides."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _sendable(fault: Exception) -> Exception:
    """Return the fault if it can be sent, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(fault))
    except Exception:
        fault = DeepClusterError("".join(traceback.format_exception(fault)))
    return fault
