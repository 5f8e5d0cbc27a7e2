"""Downloads from a real server that behaves badly: what is kept, what is asked for again, and what is never kept."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import NaughtyServer

from deepcluster.core import retry
from deepcluster.core.errors import DeepClusterError, InputError
from deepcluster.core.progress import Reporter
from deepcluster.core.retry import ConnectionLost, NotThere, Refused
from deepcluster.interop.download.disk import NoRoom
from deepcluster.interop.download.fetch import fetch
from deepcluster.interop.download.sums import WrongSum

CONTENT = bytes(range(256)) * 2000
MD5, SHA256 = hashlib.md5(CONTENT).hexdigest(), hashlib.sha256(CONTENT).hexdigest()
OTHER = b"other" + CONTENT


class Lines:
    """A stream that keeps what is printed."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(retry, "_tell", lambda line: None)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[NaughtyServer]:
    with NaughtyServer({"a/file.bin": CONTENT}) as one:
        yield one


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("digest", [None, f"md5:{MD5}", f"sha256:{SHA256}", f"sha256:{SHA256[:8]}"])
def test_a_file_comes_whole_and_is_checked(server: NaughtyServer, tmp_path: Path, digest: str | None) -> None:
    lines = Lines()
    path = tmp_path / "new" / "file.bin"
    assert fetch(server.at("a/file.bin"), path, digest=digest, reporter=Reporter(stream=lines)) == path
    assert path.read_bytes() == CONTENT
    is_whole = digest is not None and len(digest) > 20
    assert left(path.parent) == {"file.bin"} | (set() if is_whole else {"file.bin.sha256"})
    assert is_whole or SHA256 in lines.text
    if not is_whole:  # As `sha256sum -c` reads it.
        assert (path.parent / "file.bin.sha256").read_text() == f"{SHA256}  file.bin\n"
    server.forget()
    assert fetch(server.at("a/file.bin"), path, digest=digest) == path
    assert not server.requests, "it is there"


def test_a_cut_connection_is_continued_by_ranges(server: NaughtyServer, tmp_path: Path) -> None:
    server.drop_after = 200_000
    fetch(server.at("a/file.bin"), tmp_path / "file.bin", digest=f"md5:{MD5}")
    assert server.requests["a/file.bin"] == 3
    assert server.headers["Range"] == "bytes=400000-" and server.headers["If-Range"] == '"v0"'
    assert server.sent["a/file.bin"] == len(CONTENT), "no byte came twice"


def test_what_a_dead_server_gave_is_kept_and_continued(server: NaughtyServer, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    server.drop_after, server.fail_every = 1000, None
    server.lie_by = 0
    with pytest.raises(ConnectionLost, match=r"8 kB of 512 kB|once it answers, the same command continues"):
        fetch(server.at("a/file.bin"), path)
    kept = path.with_name("file.bin.part").stat().st_size
    assert kept == 8000 and not path.exists(), "1,000 bytes at each of 8 attempts"
    server.drop_after = None
    server.forget()
    fetch(server.at("a/file.bin"), path)
    assert path.read_bytes() == CONTENT and server.headers["Range"] == "bytes=8000-"
    assert server.sent["a/file.bin"] == len(CONTENT) - 8000
    assert left(tmp_path) == {"file.bin", "file.bin.sha256"}


def begin(server: NaughtyServer, path: Path, **options: str) -> None:
    """Download a part of the file, until the server is gone."""
    server.drop_after = 10_000
    with pytest.raises(ConnectionLost):
        fetch(server.at("a/file.bin"), path, **options)  # type: ignore[arg-type]
    server.drop_after = None
    server.forget()


def test_a_file_that_changed_meanwhile_begins_again(server: NaughtyServer, tmp_path: Path) -> None:
    path, lines = tmp_path / "file.bin", Lines()
    begin(server, path)
    server.change("a/file.bin", OTHER)
    fetch(server.at("a/file.bin"), path, reporter=Reporter(stream=lines))
    assert path.read_bytes() == OTHER and "has changed on its server; starting again" in lines.text


def test_a_file_that_became_shorter_begins_again(server: NaughtyServer, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    begin(server, path)
    server.change("a/file.bin", b"short")
    fetch(server.at("a/file.bin"), path)
    assert path.read_bytes() == b"short"


def test_a_server_without_ranges_begins_again(server: NaughtyServer, tmp_path: Path) -> None:
    path, lines = tmp_path / "file.bin", Lines()
    begin(server, path)
    server.ranges = False
    fetch(server.at("a/file.bin"), path, reporter=Reporter(stream=lines))
    assert path.read_bytes() == CONTENT and "can't be had in parts; starting again" in lines.text


def test_without_marks_only_a_known_sum_lets_a_file_continue(server: NaughtyServer, tmp_path: Path) -> None:
    server.marks = set()
    begin(server, tmp_path / "plain")
    fetch(server.at("a/file.bin"), tmp_path / "plain")
    assert "Range" not in server.headers
    begin(server, tmp_path / "known", digest=f"md5:{MD5}")
    fetch(server.at("a/file.bin"), tmp_path / "known", digest=f"md5:{MD5}")
    assert "Range" in server.headers and (tmp_path / "known").read_bytes() == CONTENT


def test_a_wrong_continuation_is_downloaded_once_more(server: NaughtyServer, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    begin(server, path, digest=f"md5:{MD5}")
    part = path.with_name("file.bin.part")
    part.write_bytes(b"x" * part.stat().st_size)  # As after a power cut.
    fetch(server.at("a/file.bin"), path, digest=f"md5:{MD5}")
    assert path.read_bytes() == CONTENT and server.requests["a/file.bin"] == 2


@pytest.mark.parametrize("digest", [f"md5:{'0' * 32}", f"sha256:{'0' * 8}"])
def test_a_wrong_sum_is_not_kept_and_both_are_named(server: NaughtyServer, tmp_path: Path, digest: str) -> None:
    kind, _, digits = digest.partition(":")
    found = hashlib.new(kind, CONTENT).hexdigest()
    with pytest.raises(WrongSum, match=rf"gives another file.*{found}, not .*{digits}; it is not kept"):
        fetch(server.at("a/file.bin"), tmp_path / "file.bin", digest=digest)
    assert not left(tmp_path)


def test_the_sum_of_the_first_download_is_compared(server: NaughtyServer, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    fetch(server.at("a/file.bin"), path)
    path.unlink()
    server.change("a/file.bin", OTHER)
    with pytest.raises(WrongSum, match=rf"{hashlib.sha256(OTHER).hexdigest()}, not {SHA256}.*it is not kept.*delete"):
        fetch(server.at("a/file.bin"), path)
    assert left(tmp_path) == {"file.bin.sha256"}
    (tmp_path / "file.bin.sha256").unlink()
    fetch(server.at("a/file.bin"), path)
    path.write_bytes(b"damaged")
    with pytest.raises(WrongSum, match="delete it to download it again"):
        fetch(server.at("a/file.bin"), path)


def test_redirects_are_followed_and_circles_named(server: NaughtyServer, tmp_path: Path) -> None:
    server.statuses = [(301, {"Location": "/b"}), (302, {"Location": server.at("a/file.bin")})]
    fetch(server.at("start"), tmp_path / "file.bin", digest=f"md5:{MD5}")
    assert server.requests.keys() == {"start", "b", "a/file.bin"}
    server.statuses = [(301, {"Location": path}) for path in ("/b", "/c", "/b")]
    circle = re.escape(" → ".join(server.at(path) for path in ("start", "b", "c", "b")))
    with pytest.raises(Refused, match=f"goes in a circle: {circle}"):
        fetch(server.at("start"), tmp_path / "other")
    server.statuses = [(302, {"Location": f"/{number}"}) for number in range(30)]
    with pytest.raises(Refused, match="more than 10 steps"):
        fetch(server.at("start"), tmp_path / "other")
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/a"):
        server.statuses = [(302, {"Location": target})]
        with pytest.raises(Refused):
            fetch(server.at("start"), tmp_path / "other")
    assert left(tmp_path) == {"file.bin"}


def test_a_redirect_is_continued_too(server: NaughtyServer, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    begin(server, path)
    server.statuses = [(302, {"Location": "/b/file.bin"})]
    server.files["b/file.bin"] = CONTENT
    fetch(server.at("a/file.bin"), path)
    assert path.read_bytes() == CONTENT and server.requests["b/file.bin"] == 1
    assert re.fullmatch(r"bytes=\d+0000-", server.headers["Range"])


def test_no_page_is_kept_in_place_of_the_file(server: NaughtyServer, tmp_path: Path) -> None:
    page = b"<!DOCTYPE html><html><title>Log in</title></html>"
    server.files |= {"page": page, "empty": b"", "xml": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"}
    for path, words in (("page", "HTML"), ("empty", "empty"), ("xml", "XML")):
        with pytest.raises(Refused, match=words):
            fetch(server.at(path), tmp_path / "file.bin")
    with pytest.raises(NotThere, match=r"does not exist .the server answered 404"):
        fetch(server.at("nowhere"), tmp_path / "file.bin")
    for status in (401, 403):
        server.status_of["secret"] = status
        with pytest.raises(Refused, match=f"may not be read: the server answered {status}"):
            fetch(server.at("secret"), tmp_path / "file.bin")
    assert not left(tmp_path)


def test_only_http_is_opened(tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"x")
    for address in (f"file://{tmp_path}/here", "ftp://127.0.0.1/a", "data:,x", "here", "http://"):
        with pytest.raises(InputError, match="not an address of HTTP"):
            fetch(address, tmp_path / "file.bin")


def test_a_busy_server_is_asked_again(server: NaughtyServer, tmp_path: Path) -> None:
    server.statuses = [(503, {"Retry-After": "0"}), (429, {})]
    server.fail_every = 4
    fetch(server.at("a/file.bin"), tmp_path / "file.bin", digest=f"md5:{MD5}")


def test_nobody_there_is_said_in_words(server: NaughtyServer, tmp_path: Path) -> None:
    address = server.at("a/file.bin").replace("127.0.0.1", "127.0.0.2")
    server.stop()
    try:
        with pytest.raises(InputError, match="can't be reached: nothing answers there"):
            fetch(address, tmp_path / "file.bin")
    finally:
        server.start()


def test_a_silent_server_is_given_up(server: NaughtyServer, tmp_path: Path) -> None:
    server.latency = 2.0
    with pytest.raises(DeepClusterError, match="no answer within the time allowed"):
        fetch(server.at("a/file.bin"), tmp_path / "file.bin", timeout=0.02)


def test_sizes_that_nobody_tells_and_bytes_too_many(server: NaughtyServer, tmp_path: Path) -> None:
    server.length_known = False
    fetch(server.at("a/file.bin"), tmp_path / "unknown", digest=f"md5:{MD5}")
    server.length_known, server.longer_by = True, 10
    begin(server, tmp_path / "longer")
    fetch(server.at("a/file.bin"), tmp_path / "longer")
    assert (tmp_path / "longer").read_bytes() == CONTENT


def test_a_proxy_of_the_environment_is_used(server: NaughtyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server plays the proxy: it is asked for the whole address of a host that does not exist."""
    monkeypatch.setenv("http_proxy", server.at())
    fetch("http://nowhere.invalid/a/file.bin", tmp_path / "file.bin", digest=f"md5:{MD5}")
    assert server.headers["Host"] == "nowhere.invalid"


CODE = """
import sys
from pathlib import Path
from deepcluster.core.errors import DeepClusterError
from deepcluster.interop.download.fetch import fetch
try:
    fetch(sys.argv[1], Path(sys.argv[2]))
except DeepClusterError as fault:
    print(type(fault).__name__, fault, fault.exit_status)
"""


def start(server: NaughtyServer, path: Path, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, server.at("a/file.bin"), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_a_full_disk_keeps_what_came(server: NaughtyServer, tmp_path: Path) -> None:
    """A limit of the size of files stands for a disk that fills up."""
    path = tmp_path / "file.bin"
    process = start(server, path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    said = process.communicate(timeout=60)[0]
    assert said.startswith("NoRoom") and "100 kB of 512 kB are kept" in said and "the same command continues" in said
    assert path.with_name("file.bin.part").stat().st_size == 100_000
    server.forget()
    fetch(server.at("a/file.bin"), path)
    assert path.read_bytes() == CONTENT and server.headers["Range"] == "bytes=100000-"


class _Huge(bytes):
    """Content whose length is said to be 100 TB."""

    def __len__(self) -> int:
        return 10**14


def test_too_large_a_file_is_refused_before_it_comes(server: NaughtyServer, tmp_path: Path) -> None:
    server.files["huge"] = _Huge(CONTENT)
    with pytest.raises(NoRoom, match=r"huge needs 100000.0 GB but the disk of .* has only .* left; make room"):
        fetch(server.at("huge"), tmp_path / "huge")
    assert not left(tmp_path)
    with pytest.raises(NoRoom, match=r"and 100000\.0 GB to unpack it, but"):
        fetch(server.at("a/file.bin"), tmp_path / "file.bin", room=10**14)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_processes_continue(server: NaughtyServer, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "file.bin"
    part = path.with_name("file.bin.part")
    server.bytes_per_second = 200_000
    process = start(server, path)
    while not part.is_file() or part.stat().st_size < 20_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert number == signal.SIGKILL or re.match(r"Interrupted stopped; \d+ kB of 512 kB are kept in .* 130", said)
    assert part.stat().st_size >= 20_000 and not path.exists()
    assert json.loads((tmp_path / "file.bin.part.json").read_text())["bytes"] == len(CONTENT)
    server.bytes_per_second = None
    server.forget()
    fetch(server.at("a/file.bin"), path)
    assert path.read_bytes() == CONTENT and int(re.findall(r"\d+", server.headers["Range"])[0]) >= 20_000
    assert os.access(path, os.R_OK)


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NaughtyServer]:
    """A server of HTTPS, whose certificate is trusted."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with NaughtyServer({"file.bin": CONTENT}) as one:
        one._server.socket = context.wrap_socket(one._server.socket, server_side=True)
        yield one


def test_https_leads_to_plain_http_only_where_the_whole_sum_is_known(
    secure: NaughtyServer, server: NaughtyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = secure.at("file.bin").replace("http:", "https:")
    path = tmp_path / "file.bin"
    fetch(address, path).unlink()
    down = [(302, {"Location": server.at("a/file.bin")})]
    for digest in (None, f"sha256:{SHA256[:8]}"):
        secure.statuses = list(down)
        with pytest.raises(Refused, match=r"redirected from https to plain http, where the file could be replaced"):
            fetch(address, path, digest=digest)
    assert not server.requests and not path.exists()
    secure.statuses = list(down)
    assert fetch(address, path, digest=f"sha256:{SHA256}").read_bytes() == CONTENT
    up = tmp_path / "up"
    server.statuses = [(301, {"Location": address})]
    assert fetch(server.at("start"), up).read_bytes() == CONTENT
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    with pytest.raises(Refused, match="its certificate is not valid"):
        fetch(address, tmp_path / "other")


def test_two_processes_download_it_once(server: NaughtyServer, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    server.bytes_per_second = 500_000
    process = start(server, path)
    while not path.with_name("file.bin.part").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    fetch(server.at("a/file.bin"), path)
    assert process.wait(timeout=60) == 0 and path.read_bytes() == CONTENT
    assert server.requests["a/file.bin"] == 1
