"""One file over HTTP: continued after any interruption, checked by its sum, complete from the moment it has its name.

Beside the file NAME lie, while it is incomplete, NAME.part (its beginning) and NAME.part.json (what the server said of it),
and, where nobody has published its sum, NAME.sha256 (the sum of the first download, in the format of `sha256sum`).
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPResponse, responses
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request

from deepcluster.core.addresses import is_web, shown
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.files import locked, write_whole
from deepcluster.core.kinds import BEGIN_BYTES, kind_of, stand_in
from deepcluster.core.progress import Reporter
from deepcluster.core.retry import Refused, retry
from deepcluster.core.text import size
from deepcluster.interop.download.disk import check_room, disk_fault
from deepcluster.interop.download.sums import Sum, WrongSum, check_sum
from deepcluster.interop.download.web import opener_of_web

# To connect, and for each silence of the server.
TIMEOUT_SECONDS = 30.0
# After as many new bytes a lost connection is no failed attempt.
PROGRESS_BYTES = 1 << 20
# After as many restarts a server is given up that seems to have another file each time.
MOST_RESTARTS = 4
_PIECE_BYTES = 1 << 18
_AGAIN = "the same command continues"


def fetch(
    url: str,
    path: str | Path,
    *,
    digest: str | None = None,
    reporter: Reporter | None = None,
    room: int = 0,
    timeout: float = TIMEOUT_SECONDS,
    sums: Path | None = None,
) -> Path:
    """Download a file, continuing where an earlier call was stopped; a file that is there is only checked.

    Args:
        url: an address of HTTP or HTTPS. The proxies of the environment (`https_proxy`, `no_proxy`, ...) are used.
        path: the file to write; its folder is made.
        digest: its published sum: `md5:HEX` or `sha256:HEX`, all digits or the first ones. Without all digits, the SHA-256
            of the first download is kept in a file NAME.sha256, and later downloads are compared with it.
        reporter: shows the progress; quiet by default.
        room: bytes that must be free besides the file's own, such as for what is in it.
        timeout: seconds to connect, and of silence, before the connection is tried again.
        sums: folder of NAME.sha256 (by default that of the file).

    Returns:
        the path.

    Raises:
        WrongSum: it has another sum, and is not kept.
        InputError: there is no such file, or the server sends something else, or can't be reached.
        NoRoom: the disk is full; what has come so far is kept.
        ConnectionLost: the server answers no more; what has come so far is kept.
        Interrupted: Ctrl-C; what has come so far is kept.
    """
    path = Path(path)
    job = _Download(url, path, None if digest is None else Sum.of(digest), reporter or Reporter(quiet=True), room, timeout)
    note = (sums or path.parent) / f"{path.name}.sha256"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if path.is_file():
                check_sum(path, url, job.wanted, note, job.reporter)
            else:
                job.run(note)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {job.progress()}: {_AGAIN}") from None
    except OSError as fault:
        raise disk_fault(fault, f"{path} can't be written", f"{job.progress()}: make room, then {_AGAIN}") from fault
    return path


@dataclass
class _About:
    """What a server says of a file; kept beside its beginning."""

    url: str
    etag: str = ""
    modified: str = ""
    bytes: int | None = None

    @classmethod
    def of(cls, url: str, headers: Any, total: int | None) -> "_About":
        return cls(url, headers.get("ETag", ""), headers.get("Last-Modified", ""), total)

    def is_same(self, other: "_About") -> bool:
        """Whether nothing says that it is another file."""
        pairs = ((self.etag, other.etag), (self.modified, other.modified), (self.bytes, other.bytes))
        return all(not one or not two or one == two for one, two in pairs)


class _Download:
    """The download of one file into NAME.part."""

    def __init__(self, url: str, path: Path, wanted: Sum | None, reporter: Reporter, room: int, timeout: float) -> None:
        if not is_web(url) or not urlsplit(url).hostname:
            raise InputError(f"{shown(url)} is not an address of HTTP or HTTPS: it should begin with https://")
        self.url, self.path, self.wanted, self.reporter, self.room = url, path, wanted, reporter, room
        self.part, self.kept = (path.with_name(f"{path.name}{ending}") for ending in (".part", ".part.json"))
        self.timeout = timeout
        self.opener = opener_of_web(is_checked=wanted is not None and wanted.is_whole)
        self.about = self._kept_about()
        self.is_continued, self.restarts = False, 0

    def _kept_about(self) -> _About | None:
        with suppress(OSError, ValueError, TypeError):
            about = _About(**json.loads(self.kept.read_text(encoding="utf-8")))
            return about if about.url == self.url else None
        return None

    @property
    def have(self) -> int:
        """Bytes of the beginning."""
        try:
            return self.part.stat().st_size
        except OSError:
            return 0

    def progress(self) -> str:
        """Return what is kept, in words."""
        if self.path.is_file():
            return f"{self.path} is whole"
        total = f" of {size(self.about.bytes)}" if self.about and self.about.bytes else ""
        return (
            f"{size(self.have)}{total} are kept in {self.part}" if self.have else f"nothing of {self.path.name} is there yet"
        )

    def run(self, note: Path) -> None:
        """Download to the end, check the sum, and give the file its name."""
        while True:
            self.is_continued = self.have > 0
            while not retry(self.url, self._once, then=_AGAIN):
                pass
            try:
                check_sum(self.part, self.url, self.wanted, note, self.reporter)
            except WrongSum:
                was_continued = self.is_continued
                self.forget()
                if not was_continued:
                    raise
                self.reporter.warn(
                    f"the parts of {self.path.name} do not make the right file; downloading it from its start"
                )
            else:
                self.part.replace(self.path)
                self.kept.unlink(missing_ok=True)
                return

    def _can_continue(self) -> bool:
        """Whether what comes would be known to belong to the beginning."""
        if self.about is None or not self.have:
            return False
        return bool(self.about.etag or self.about.modified or (self.wanted and self.wanted.is_whole))

    def forget(self) -> None:
        """Delete the beginning."""
        self.about, self.is_continued = None, False
        for path in (self.part, self.kept):
            path.unlink(missing_ok=True)

    def _restart(self, why: str) -> None:
        """Delete the beginning, which is not of what the server has now; raise after several times."""
        self.restarts += 1
        if self.restarts > MOST_RESTARTS:
            raise Refused(f"{shown(self.url)} can't be read: {why}, {self.restarts} times; try again later, or a mirror")
        self.reporter.say(f"{why}; starting again")
        self.forget()

    def _once(self) -> bool:
        """Ask for what is missing, and append it; return whether nothing is missing any more."""
        have, about = self.have, self.about
        if about is not None and have and have == about.bytes:
            return True
        if not self._can_continue():
            self.forget()
            have = 0
        try:
            with self.opener.open(self._request(have), timeout=self.timeout) as answer:
                return self._take(answer, have)
        except HTTPError as fault:
            fault.close()
            if fault.code == 416 and have:  # There is nothing after the beginning: it is another file, or a shorter one.
                self._restart(f"{self.path.name} has become shorter on its server")
                return False
            if fault.code in (401, 403, 407):
                what = f"{fault.code} ({responses.get(fault.code, fault.reason)})"
                raise Refused(f"{shown(self.url)} may not be read: the server answered {what}") from fault
            raise
        except (HTTPException, OSError) as fault:
            if isinstance(fault, HTTPException) and not isinstance(fault, OSError):  # Such as chunks that are cut short.
                fault = OSError(f"the answer of the server can't be understood ({type(fault).__name__})")
            if self.have - have >= PROGRESS_BYTES and self._can_continue():
                self.reporter.detail(f"{shown(self.url)}: the connection was lost after {size(self.have)}")
                return False
            raise fault from None

    def _request(self, have: int) -> Request:
        from deepcluster import __version__

        # Bytes as they are stored: ranges of what is compressed on the way would mean nothing.
        request = Request(self.url, headers={"User-Agent": f"deepcluster/{__version__}", "Accept-Encoding": "identity"})
        if have and self.about is not None:
            request.add_header("Range", f"bytes={have}-")
            mark = self.about.etag if not self.about.etag.startswith("W/") else ""
            if mark or self.about.modified:
                request.add_header("If-Range", mark or self.about.modified)
        return request

    def _take(self, answer: HTTPResponse, have: int) -> bool:
        """Append the content of an answer; return whether the file is complete."""
        span = re.fullmatch(r"bytes\s+(\d+)-\d+/(\d+)", answer.headers.get("Content-Range", "").strip())
        length = answer.headers.get("Content-Length", "")
        if answer.status == 206:
            about = _About.of(self.url, answer.headers, int(span[2]) if span else None)
            if span is None or int(span[1]) != have or self.about is None or not self.about.is_same(about):
                self._restart(f"{self.path.name} has changed on its server")
                return False
            self.is_continued = True
            self.reporter.say(f"continuing {self.path.name} at {size(have)} of {size(int(span[2]))}")
        elif answer.status == 200:
            if have:
                self._restart(f"{self.path.name} has changed on its server, or can't be had in parts")
            have, self.about = 0, _About.of(self.url, answer.headers, int(length) if length.isdecimal() else None)
        else:
            raise Refused(f"{shown(self.url)} can't be read: the server answered {answer.status} without the file")
        first = answer.read(BEGIN_BYTES)
        if not have:
            self._check_begin(first, answer)
        total = self.about.bytes if self.about else None
        check_room(self.path, (total or 0) - have, self.room)
        if not have and self.about is not None:
            write_whole(self.kept, json.dumps(asdict(self.about)))
        return self._append(answer, first, have, total)

    def _check_begin(self, first: bytes, answer: HTTPResponse) -> None:
        """Raise Refused where a page or a message comes in place of the file."""
        kind = stand_in(first)
        if kind is None and answer.headers.get_content_type() == "text/html" and kind_of(first) == "text":
            kind = "text that is marked as a web page"
        if kind is not None or not first:
            raise Refused(f"{shown(self.url)} does not give the file: it is {kind or kind_of(first)}")

    def _append(self, answer: HTTPResponse, first: bytes, have: int, total: int | None) -> bool:
        missing = None if total is None else total - have
        done = 0
        with (
            self.part.open("ab" if have else "wb", buffering=0) as file,
            self.reporter.track(self.path.name, None if missing is None else -(-missing // 1000), "kB") as meter,
        ):
            piece = first
            while piece:
                piece = piece if missing is None else piece[: missing - done]
                try:
                    _write(file, piece)
                except OSError as fault:
                    place = f"{self.part} can't be written"
                    raise disk_fault(fault, place, f"{self.progress()}: make room, then {_AGAIN}") from fault
                meter((done + len(piece)) // 1000 - done // 1000)
                done += len(piece)
                if done == missing:
                    break
                piece = answer.read1(_PIECE_BYTES)
            os.fsync(file.fileno())
        if missing is not None and done < missing:
            raise OSError(f"the connection was lost after {have + done:,} of {total:,} bytes")
        return True


def _write(file: Any, piece: bytes) -> None:
    """Write all of it: the system may take a part, as where the disk is almost full."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]
