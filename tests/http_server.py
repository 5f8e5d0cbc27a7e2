"""A real server of HTTP on 127.0.0.1 that behaves as badly as it is told to, and counts what it is asked for."""

import re
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit


class NaughtyServer:
    """Serves `files` (path without a slash in front: content) and pages that list folders.

    Attributes:
        latency: seconds before each answer.
        bytes_per_second: of each answer; None: as fast as it goes.
        ranges: parts of files are given; else each answer is the whole file.
        drop_after: bytes of content after which each connection is cut.
        fail_every: each k-th request is cut before any answer.
        statuses: what the next requests are answered, one each, in place of the file.
        status_of: what requests of a path are always answered.
        short_by: bytes that are left away at the end of each part of more than that; the Content-Length tells what is sent.
        lie_by: the same, but the Content-Length tells what was asked for, and the connection is cut.
        shift: bytes by which parts are another part than was asked for, as their Content-Range tells.
        longer_by: bytes that are sent after the end of each part.
        marks: the headers that tell of changes: "ETag" and "Last-Modified".
        length_known: whole files have a Content-Length.
        requests, sent: number of requests, and bytes of content, by path.
        headers: of the last request.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.latency = 0.0
        self.bytes_per_second: float | None = None
        self.ranges = True
        self.drop_after: int | None = None
        self.fail_every: int | None = None
        self.statuses: list[tuple[int, dict[str, str]]] = []
        self.status_of: dict[str, int] = {}
        self.short_by = self.lie_by = self.shift = self.longer_by = 0
        self.marks = {"ETag", "Last-Modified"}
        self.length_known = True
        self.versions: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.forget()
        self._port = 0
        self.start()

    def forget(self) -> None:
        """Count from 0."""
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.headers: dict[str, str] = {}

    def start(self) -> None:
        """Listen, on the port of the first time."""
        self._server = _Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more, and cut all connections."""
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def at(self, path: str = "") -> str:
        """Return the address of a path."""
        return f"http://127.0.0.1:{self._port}/{path}"

    def change(self, path: str, content: bytes) -> None:
        """Put other content at a path."""
        with self.lock:
            self.files[path] = content
            self.versions[path] += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], owner: NaughtyServer) -> None:
        super().__init__(address, _Handler)
        self.owner = owner
        self.connections: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def cut_all(self) -> None:
        for connection in self.connections:
            _cut(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients that go away are what is tested."""


def _cut(connection: Any) -> None:
    try:
        connection.shutdown(2)
        connection.close()
    except OSError:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        owner, path = self.server.owner, unquote(urlsplit(self.path).path).lstrip("/")
        with owner.lock:
            owner.requests[path] += 1
            owner.headers = dict(self.headers)
            number = owner.requests.total()
            planned = owner.statuses.pop(0) if owner.statuses else None
            content, version = owner.files.get(path), owner.versions[path]
        time.sleep(owner.latency)
        if owner.fail_every and number % owner.fail_every == 0:
            self.close_connection = True
            _cut(self.connection)
        elif planned is not None:
            self._answer(planned[0], b"no", planned[1])
        elif path in owner.status_of:
            self._answer(owner.status_of[path], b"no", {})
        elif content is not None:
            self._give(path, content, version)
        elif path.endswith("/") or not path:
            self._list(path)
        elif any(each.startswith(f"{path}/") for each in owner.files):
            self._answer(301, b"", {"Location": f"/{path}/"})
        else:
            self._answer(404, b"no", {})

    def _list(self, folder: str) -> None:
        inner = {path[len(folder) :] for path in self.server.owner.files if path.startswith(folder)}
        names = sorted({name.partition("/")[0] + ("/" if "/" in name else "") for name in inner})
        if not names:
            return self._answer(404, b"no", {})
        links = "".join(f'<a href="{name.replace(" ", "%20")}">{name}</a>\n' for name in ["../", *names])
        return self._answer(200, links.encode(), {"Content-Type": "text/html"})

    def _give(self, path: str, content: bytes, version: int) -> None:
        owner = self.server.owner
        stamp = {"Last-Modified": formatdate(1.7e9 + version, usegmt=True), "ETag": f'"v{version}"'}
        stamp = {name: value for name, value in stamp.items() if name in owner.marks}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if owner.ranges else None
        if asked is None:
            return self._answer(200, content, stamp, path)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= stop:
            return self._answer(416, b"", {**stamp, "Content-Range": f"bytes */{len(content)}"})
        stop -= owner.short_by if stop - start > owner.short_by else 0
        start, stop = start + owner.shift, stop + owner.shift
        span = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._answer(206, content[start:stop] + bytes(owner.longer_by), {**stamp, "Content-Range": span}, path)

    def _answer(self, status: int, content: bytes, headers: dict[str, str], path: str = "") -> None:
        owner = self.server.owner
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, value)
        if owner.length_known or status != 200:
            self.send_header("Content-Length", str(len(content)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        stop = len(content) - (owner.lie_by if len(content) > owner.lie_by else 0)
        if owner.drop_after is not None and path:
            stop = min(stop, owner.drop_after)
        self._send(content[:stop], path)
        self.close_connection |= stop < len(content)

    def _send(self, content: bytes, path: str) -> None:
        owner = self.server.owner
        pace = owner.bytes_per_second
        step = max(1, int(pace / 50)) if pace else 1 << 20
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            with owner.lock:
                owner.sent[path] += len(content[start : start + step])
            if pace:
                time.sleep(step / pace)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""
