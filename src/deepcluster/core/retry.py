"""The one retry policy of requests to servers: what an error means, whether waiting may help, and in which words it ends."""

import errno
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable
from http.client import responses
from typing import Any, TypeVar

from deepcluster.core.addresses import host_of, scheme_of, shown
from deepcluster.core.errors import DeepClusterError, InputError

T = TypeVar("T")
# Eight attempts within one to two minutes, besides time-outs; each wait is twice the last one. If a server
# never answered, its address may be wrong.
ATTEMPTS, FIRST_ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 8, 3, 1.0, 60.0
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf", "http": "remote", "https": "remote"}
_PACKAGES = {"s3": "s3fs", "gcs": "gcsfs", "hf": "huggingface_hub", "remote": "'fsspec[http]'"}
_LOG_IN = {
    "s3": "log in (`aws configure`, or AWS_PROFILE); for a public bucket set FSSPEC_S3_ANON=true",
    "gcs": "log in (`gcloud auth application-default login`); for a public bucket set FSSPEC_GCS_TOKEN=anon",
    "hf": "log in (`hf auth login`, or HF_TOKEN), and accept the conditions of the data on their page",
    "remote": "use an address that is signed, or set headers in ~/.config/fsspec/conf.json",
}
# What an error means, by its HTTP status or the names of its types; in which words, if not in its own.
_FAULTS = (
    ("HTTP (404|410)", "gone", ""),
    ("HTTP (401|403|407)", "denied", ""),
    ("HTTP (408|425|429|5(?!01|05))", "wait", ""),
    ("HTTP", "refused", ""),
    ("PermissionError|Credential|RefreshError|GatedRepo", "denied", ""),
    ("Certificate|CertVerification", "refused", "its certificate is not valid"),
    ("gaierror|DNSError", "unreachable", "the name of the server can't be resolved"),
    ("ConnectionRefused|ECONNREFUSED", "unreachable", "nothing answers there (connection refused)"),
    ("ENETUNREACH|EHOSTUNREACH|ConnectorError|EndpointConnectionError|ConnectError", "unreachable", ""),
    ("Timeout", "wait", "no answer within the time allowed"),
    ("ConnectionError|ServerDisconnected|ClientPayload|ClientOSError", "wait", "the connection was lost"),
    ("ImportError", "no package", ""),
    ("InvalidU", "refused", ""),
    ("FileNotFound|IsADirectory|NotADirectory", "gone", "nothing was found there"),
    ("^(aiohttp|botocore|aiobotocore|urllib3|requests|httpx|httpcore|gcsfs|google|azure) ", "wait", ""),
    ("OSError .*(EIO|EBUSY|EPIPE|ETIMEDOUT|ENETDOWN|ENETRESET|none)$", "wait", ""),
)


class ConnectionLost(DeepClusterError):
    """A server answers no more, or only with faults, after all attempts: the input is not to blame."""


class Refused(InputError):
    """A server refuses a file for a reason that waiting does not fix."""


class NotThere(Refused):
    """There is nothing at an address (404, 410)."""


# By process: when it forks, other threads may hold locks.
_endings: dict[int, threading.Event] = {}
_answered: set[str] = set()
_in_trouble: dict[str, object] = {}
_tell: Callable[[str], object] = warnings.warn


def tell_troubles_to(tell: Callable[[str], object]) -> None:
    """Call `tell` with a line when the waiting for a server begins, instead of a Python warning."""
    global _tell
    _tell = tell


def end_waits() -> None:
    """End all present waits for servers, in all threads, with ConnectionLost; what is requested later waits again."""
    _endings.pop(os.getpid(), threading.Event()).set()


def waiting_ends() -> threading.Event:
    """Return the event that the next `end_waits` of this process sets."""
    return _endings.setdefault(os.getpid(), threading.Event())


def retry(address: str, once: Callable[[], T], *, answered: bool = False, then: str = "continue with --resume") -> T:
    """Return what `once` gets from the server of an address; try again while waiting may help.

    `answered` tells whether the server has answered another process, so that its address is right; `then` is the advice to
    the user once the server answers again.

    Raises:
        ConnectionLost: the server is gone.
        Refused: the file can't be had; NotThere if there is none.
        InputError: the server can't be reached, or a package is missing.
    """
    ending = waiting_ends()
    host, started, attempt = host_of(address), time.monotonic(), 0
    while True:
        attempt += 1
        try:
            result = once()
            _answered.add(host)
            _in_trouble.pop(host, None)
            return result
        except DeepClusterError:
            raise
        except Exception as error:  # Each library has its own.
            fault, words, asked = _judge(error)
            new = fault == "unreachable" and not answered and host not in _answered
            if fault not in ("wait", "unreachable") or attempt >= (FIRST_ATTEMPTS if new else ATTEMPTS):
                tried = f"(attempt {attempt}, after {time.monotonic() - started:.0f} s)"
                raise _plain_error(address, "new" if new else fault, words, tried, then) from error
            mine = object()
            if not new and _in_trouble.setdefault(host, mine) is mine:  # One line for all threads.
                _tell(f"{shown(address)}: {words}; trying again, {ATTEMPTS} times at most")
            # The draw keeps the requests of many threads and machines apart; no result depends on it.
            seconds = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            if ending.wait(max(seconds, asked)):
                raise ConnectionLost(f"{shown(address)}: stopped while waiting for the server ({words})") from error


def _plain_error(address: str, fault: str, words: str, tried: str, then: str) -> DeepClusterError:
    """Return the error that says what is wrong, and how to fix it."""
    what, scheme = shown(address), scheme_of(address)
    extra = _EXTRAS.get(scheme, "")
    package = f"pip install {_PACKAGES[extra]}" if extra else words
    kind, text = {
        "gone": (NotThere, f"{what} does not exist ({words})"),
        "denied": (Refused, f"{what} may not be read: {words}; {_LOG_IN.get(extra, 'check the credentials')}"),
        "refused": (Refused, f"{what} can't be read: {words}"),
        "no package": (InputError, f"{scheme}:// addresses need a package that is not installed: {package}"),
        "new": (InputError, f"{what} can't be reached: {words}; check the address and the network"),
    }.get(fault, (ConnectionLost, f"{what} can't be read: {words} {tried}; once it answers, {then}"))
    return kind(text)


def _judge(error: BaseException) -> tuple[str, str, float]:
    """Return what an error or one of its causes means, its words, and the seconds that the server asks to wait."""
    found: list[tuple[str, str, float]] = []
    cause: BaseException | None = error
    while cause is not None and len(found) < 20:
        status, asked = _status(cause)
        if status:
            phrase = f" ({responses[status]})" if status in responses else ""
            found.append((f"HTTP {status}", f"the server answered {status}{phrase}", asked))
        else:
            text = shown(" ".join(str(getattr(cause, "strerror", None) or cause).split()))[:200]
            names = [type(cause).__module__.partition(".")[0], *(kind.__name__ for kind in type(cause).__mro__)]
            code = errno.errorcode.get(getattr(cause, "errno", 0) or 0, "none")
            found.append((" ".join([*names, code]), text if " " in text else f"{text} ({type(cause).__name__})", 0.0))
        cause = cause.__cause__ or cause.__context__
    for pattern, fault, words in _FAULTS:
        for text, own, asked in found:
            if re.search(pattern, text):
                return fault, words or own, asked
    return "refused", found[0][1], 0.0


def _status(error: Any) -> tuple[int, float]:
    """Return the HTTP status of an error of aiohttp, gcsfs, requests, httpx or botocore, else 0; and its Retry-After."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), 0.0
    # Of aiohttp only answers have a `status`; its `code` is that of an answer that can't be understood.
    own = "status" if type(error).__module__.startswith("aiohttp") else "code"
    found = (getattr(error, own, 0), getattr(response, "status_code", 0))
    headers = getattr(error, "headers", None) or getattr(response, "headers", None) or {}
    asked = str(headers.get("Retry-After", "")) if hasattr(headers, "get") else ""
    status = next((one for one in found if isinstance(one, int) and 400 <= one < 600), 0)
    return status, min(300.0, float(asked)) if asked.isdecimal() else 0.0
