"""What an error of a network library means, in a few kinds and in words for a person."""

from __future__ import annotations

import errno
import http
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, Final

_STATUS_WAIT: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529})
_STATUS_DENIED: Final = frozenset({401, 403, 407})
_STATUS_GONE: Final = frozenset({404, 410})
_ERRNO_WAIT: Final = (errno.EIO, errno.EBUSY, errno.EPIPE, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETRESET, 0, None)
_ERRNO_UNREACHABLE: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH})
# Libraries of which an error that says nothing else is one of the connection.
_NETWORK: Final = (
    "aiohttp",
    "botocore",
    "aiobotocore",
    "urllib3",
    "requests",
    "httpx",
    "httpcore",
    "gcsfs",
    "google",
    "azure",
)


class ShortAnswer(Exception):
    """An answer had fewer bytes than were asked for, or others."""


class Kind(Enum):
    """What a fault asks for."""

    WAIT = "wait"
    UNREACHABLE = "unreachable"
    DENIED = "denied"
    GONE = "gone"
    REFUSED = "refused"
    NO_PACKAGE = "no package"


@dataclass(frozen=True)
class Fault:
    """An error of a library, judged: what to do, in words what it was, and the seconds that the server asks to wait."""

    kind: Kind
    words: str
    retry_after: float | None = None


def judge(error: BaseException) -> Fault:
    """Return what the error of a library means: by its HTTP status first, then by its type, through all its causes."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for each in chain:
        status = _status(each)
        if status is not None and 400 <= status < 600:
            words = f"the server answered {status}"
            with suppress(ValueError):
                words += f" ({http.HTTPStatus(status).phrase})"
            if status in _STATUS_WAIT:
                return Fault(Kind.WAIT, words, _retry_after(each))
            denied = Kind.DENIED if status in _STATUS_DENIED else Kind.REFUSED
            return Fault(Kind.GONE if status in _STATUS_GONE else denied, words)
    for look in (_judge_type, _judge_loosely):
        for each in chain:
            fault = look(each)
            if fault is not None:
                return fault
    return Fault(Kind.REFUSED, _words(error))


def _status(error: Any) -> int | None:
    """Return the HTTP status of an error of aiohttp, gcsfs, requests, httpx or botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(response.get("Error", {}).get("Code", ""))
        if code in ("RequestTimeout", "SlowDown", "InternalError"):
            return 503
        return 403 if code.startswith("ExpiredToken") else found
    # Of aiohttp only answers have a `status`; its `code` is that of an answer that can't be understood.
    own = "status" if type(error).__module__.startswith("aiohttp") else "code"
    for found in (getattr(error, own, None), getattr(response, "status_code", None)):
        if isinstance(found, int) and not isinstance(found, bool):
            return int(found)
    return None


def _retry_after(error: Any) -> float | None:
    """Return the seconds of a Retry-After header, which are given as such or as a date."""
    headers: Any = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None)
    value = str(headers.get("Retry-After", "")) if hasattr(headers, "get") else ""
    for read in (float, lambda date: parsedate_to_datetime(date).timestamp() - time.time()):
        with suppress(TypeError, ValueError):
            return max(0.0, read(value))
    return None


def _judge_type(error: BaseException) -> Fault | None:
    """Judge an error by a type that leaves no doubt."""
    name, number = type(error).__name__, getattr(error, "errno", None)
    if isinstance(error, ShortAnswer):
        return Fault(Kind.WAIT, str(error))
    if isinstance(error, (ImportError, PermissionError)):
        return Fault(Kind.NO_PACKAGE if isinstance(error, ImportError) else Kind.DENIED, _words(error))
    if "Credential" in name or name in ("RefreshError", "GatedRepoError"):
        return Fault(Kind.DENIED, _words(error))
    if "Certificate" in name or "CertVerification" in name:
        return Fault(Kind.REFUSED, f"its certificate is not valid: {_words(error)}")
    if isinstance(error, socket.gaierror) or "DNSError" in name:
        return Fault(Kind.UNREACHABLE, "no server of this name is known (the name can't be resolved)")
    if isinstance(error, ConnectionRefusedError) or number == errno.ECONNREFUSED:
        return Fault(Kind.UNREACHABLE, "nothing answers there (connection refused)")
    if number in _ERRNO_UNREACHABLE or name in ("ClientConnectorError", "EndpointConnectionError", "ConnectError"):
        return Fault(Kind.UNREACHABLE, _words(error))
    if isinstance(error, TimeoutError) or "Timeout" in name:
        return Fault(Kind.WAIT, "no answer within the time allowed")
    if isinstance(error, ConnectionError) or name in ("ServerDisconnectedError", "ClientPayloadError", "ClientOSError"):
        return Fault(Kind.WAIT, "the connection was lost")
    return None


def _judge_loosely(error: BaseException) -> Fault | None:
    """Judge an error by a type that libraries also use where they hide what it was."""
    if "InvalidU" in type(error).__name__:  # InvalidURL, InvalidUrlClientError
        return Fault(Kind.REFUSED, f"that is no valid address: {_words(error)}")
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return Fault(Kind.GONE, "nothing was found there")
    if type(error).__module__.partition(".")[0] in _NETWORK:
        return Fault(Kind.WAIT, _words(error))
    return Fault(Kind.WAIT, _words(error)) if isinstance(error, OSError) and error.errno in _ERRNO_WAIT else None


def _words(error: BaseException) -> str:
    """Return type and text of an error in one line that is not too long."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    return f"{text} ({type(error).__name__})" if text else type(error).__name__
