"""What is done when a request over the network fails: try again, wait, or say in plain words what is wrong."""

from __future__ import annotations

import random
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from deepcluster.core.errors import DeepClusterError, InputError
from deepcluster.data.storage.addresses import scheme_of, shown
from deepcluster.data.storage.faults import Fault, Kind, judge

T = TypeVar("T")
# A server may ask for hours; by then a person had better know.
_LONGEST_ASKED: Final = 300.0
# Progress of this size makes the attempts count anew: a connection that always breaks gives the file in the end.
_PROGRESS_BYTES: Final = 64 << 10
_EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf", "http": "remote", "https": "remote"}
_LOG_IN: Final = {
    "s3": "log in (`aws configure`, or AWS_PROFILE); for a public bucket set FSSPEC_S3_ANON=true",
    "gcs": "log in (`gcloud auth application-default login`); for a public bucket set FSSPEC_GCS_TOKEN=anon",
    "hf": "log in (`hf auth login`, or HF_TOKEN), and accept the conditions of the data on their page",
    "remote": "use an address that is signed, or set headers in ~/.config/fsspec/conf.json",
}


class ConnectionLost(DeepClusterError):
    """A server that had answered does so no more, or only with faults, after all attempts: nobody's input is wrong."""


class NotThere(InputError):
    """There is nothing at an address (404, 410)."""


class NotAllowed(InputError):
    """What lies at an address may not be read by this person (401, 403, no credentials)."""


class Refused(InputError):
    """A server refused for another reason that no waiting mends."""


@dataclass(frozen=True)
class Patience:
    """How long a connection that fails is tried: by default eight times within one to two minutes, beside time-outs.

    Attributes:
        attempts: requests in all, without one that brings 64 KiB or more.
        quick_attempts: as many where a server that never answered can't be reached: the address may be wrong.
        first_wait: seconds before the second attempt; doubled each time, times a draw between 0.5 and 1.
        longest_wait: seconds, at most; a server that asks for more (Retry-After) gets up to five minutes.
        on_trouble: told in one line when the waiting begins, once for all threads.
    """

    attempts: int = 8
    quick_attempts: int = 3
    first_wait: float = 1.0
    longest_wait: float = 60.0
    on_trouble: Callable[[str], None] | None = None

    def wait(self, failures: int, asked: float | None) -> float:
        """Return the seconds to wait after so many failures in a row."""
        # The draw keeps the requests of many threads and machines apart; no result depends on it.
        own = min(self.longest_wait, self.first_wait * 2.0 ** min(failures - 1, 60)) * random.uniform(0.5, 1.0)
        return max(own, min(asked or 0.0, _LONGEST_ASKED))

    def tell(self, line: str) -> None:
        """Give the person a line."""
        if self.on_trouble is None:
            warnings.warn(line, stacklevel=2)
        else:
            self.on_trouble(line)


PATIENT: Final = Patience()
# Ends the waits of all threads.
_ending: Final = [threading.Event()]


class Connection:
    """What is known of one server; shared by all threads.

    Attributes:
        has_answered: it was reached at least once, so its address is right.
    """

    def __init__(self) -> None:
        self.has_answered = False
        self._in_trouble = False
        self._lock = threading.Lock()

    def went_well(self) -> None:
        """Note an answer."""
        self.has_answered, self._in_trouble = True, False

    def trouble_begins(self) -> bool:
        """Note a failure; True for the first one since the last answer."""
        with self._lock:
            begins = not self._in_trouble
            self._in_trouble = True
        return begins


def end_waits() -> None:
    """End what waits for a server at this moment, in all threads, with ConnectionLost; what is asked later waits again.

    For whoever is told to stop: a thread that waits would otherwise hold up the end of the program for minutes.
    """
    _ending[0].set()
    _ending[0] = threading.Event()


def ending() -> threading.Event:
    """Return the event that the next `end_waits` sets."""
    return _ending[0]


def insist(
    connection: Connection, address: str, once: Callable[[], T], patience: Patience, progress: Callable[[], int] = lambda: 0
) -> T:
    """Return what `once` does, tried again while there is hope.

    `progress` counts the bytes that are there so far: an attempt that brings some counts as the first. Raises
    ConnectionLost, NotThere, NotAllowed, Refused or InputError; a DeepClusterError of `once` is passed on.
    """
    failures, reached, started, stop = 0, progress(), time.monotonic(), ending()
    while True:
        try:
            result = once()
        except DeepClusterError:
            raise
        except Exception as error:
            fault, cause = judge(error), error
        else:
            connection.went_well()
            return result
        if progress() - reached >= _PROGRESS_BYTES:
            failures, reached = 0, progress()
        failures += 1
        new = fault.kind is Kind.UNREACHABLE and not connection.has_answered
        hopeless = fault.kind not in (Kind.WAIT, Kind.UNREACHABLE)
        if fault.kind in (Kind.GONE, Kind.DENIED):
            connection.went_well()
        if hopeless or failures >= (patience.quick_attempts if new else patience.attempts):
            raise plain_error(address, fault, failures, time.monotonic() - started, new) from cause
        if not new and connection.trouble_begins():
            patience.tell(f"{shown(address)}: {fault.words}; trying again, {patience.attempts} times at most")
        if stop.wait(patience.wait(failures, fault.retry_after)):
            raise ConnectionLost(f"{shown(address)}: stopped while waiting for the server ({fault.words})") from cause


def plain_error(address: str, fault: Fault, attempts: int, seconds: float, new: bool) -> DeepClusterError:
    """Return the error that tells a person of a fault that could not be mended."""
    what, words, scheme = shown(address), shown(fault.words), scheme_of(address)
    extra = _EXTRAS.get(scheme, "")
    if fault.kind is Kind.GONE:
        return NotThere(f"{what} does not exist ({words})")
    if fault.kind is Kind.DENIED:
        return NotAllowed(f"{what} may not be read: {words}; {_LOG_IN.get(extra, 'check the credentials')}")
    if fault.kind is Kind.NO_PACKAGE:
        hint = f"pip install 'deepcluster[{extra}]'" if extra else words
        return InputError(f"{scheme}:// addresses need a package that is not installed: {hint}")
    if fault.kind is Kind.REFUSED:
        return Refused(f"{what} can't be read: {words}")
    if new:
        tried = f"tried {attempts} times" if attempts > 1 else "tried once"
        return InputError(f"{what} can't be reached: {words} ({tried}); check the address, and the network")
    return ConnectionLost(
        f"{what} can't be read: {words} (attempt {attempts}, after {seconds:.0f} s); "
        "when the connection is back, go on with --resume"
    )
