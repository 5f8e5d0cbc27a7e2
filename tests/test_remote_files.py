"""Lists of addresses: names, labels, content, what is kept, and messages; a real server on 127.0.0.1."""

import multiprocessing
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from http_server import NaughtyServer

from deepcluster.core import retry
from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.retry import ConnectionLost
from deepcluster.data.sources import open_source
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.lists import open_list
from deepcluster.data.storage.blocks import BlockStore

IMAGES = ["p/cat/1.jpg", "p/cat/2.JPG", "p/dog/a b.png", "p/dog/é#1.png"]


@pytest.fixture
def server() -> Iterator[NaughtyServer]:
    with NaughtyServer({name: f"content of {name}".encode() * 100 for name in IMAGES}) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> BlockStore:
    return BlockStore(tmp_path / "blocks", 1 << 40)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five attempts after short waits."""
    for name, value in {"ATTEMPTS": 5, "FIRST_WAIT": 0.01, "LONGEST_WAIT": 0.05, "_tell": lambda line: None}.items():
        monkeypatch.setattr(retry, name, value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def listed(folder: Path, places: Sequence[str], store: BlockStore, name: str = "list.txt") -> ImageSource:
    (folder / name).write_text("".join(f"{place}\n" for place in places), encoding="utf-8")
    return open_list(folder / name, store)


def addresses(server: NaughtyServer) -> list[str]:
    return [server.at(name.replace("#", "%23")) for name in IMAGES]


def names(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def contents(source: ImageSource) -> list[object]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(source.read, range(len(source))))


def labels(source: ImageSource) -> list[str | None] | None:
    if source.labels_N is None:
        return None
    return [source.class_names[label] if label >= 0 else None for label in source.labels_N]


def test_a_list_of_addresses_is_read_once(server: NaughtyServer, tmp_path: Path) -> None:
    places = addresses(server)
    source = listed(tmp_path, [*places, places[1]], BlockStore(tmp_path, 1 << 40))
    assert names(source) == ["cat/1.jpg", "cat/2.JPG", "dog/a b.png", "dog/é#1.png"]
    assert source.describe() == ("4 images (.png 2, .JPG 1, .jpg 1) listed in list.txt, 1 repeated line skipped")
    assert labels(source) is None
    assert [source.stamp(index) for index in range(4)] == addresses(server)
    assert source.changed() is None
    assert source.path(0) is None
    assert not server.requests  # nothing is asked before an image is read
    assert contents(source) == [server.files[name] for name in IMAGES]
    assert set(server.requests.values()) == {1}
    server.forget()
    again = listed(tmp_path, places, BlockStore(tmp_path, 1 << 40))
    assert contents(again) == contents(source)
    assert not server.requests


def test_labels_are_those_of_the_first_line_of_an_image(server: NaughtyServer, store: BlockStore, folder: Path) -> None:
    given = [*zip(addresses(server), ["cat", "", "dog", "-1"], strict=True), (addresses(server)[1], "late")]
    source = listed(folder, ["path,label", *(f"{address},{label}" for address, label in given)], store, "t.csv")
    assert labels(source) == ["cat", None, "dog", None]
    assert source.describe().endswith(
        " listed in t.csv, 3 classes from column label, 2 without a label, 1 repeated line skipped"
    )


def test_images_of_equal_names_are_numbered(store: BlockStore, folder: Path) -> None:
    places = [f"https://host/show.php?id={number}" for number in range(3)]
    assert names(listed(folder, places, store)) == ["show.php", "show-2.php", "show-3.php"]


@pytest.mark.parametrize("fault", ["drop", "503", "fail"])
def test_a_bad_connection_costs_a_wait(server: NaughtyServer, store: BlockStore, folder: Path, fault: str) -> None:
    source = listed(folder, addresses(server), store)
    if fault == "drop":
        server.fail_every = 2
    elif fault == "503":
        server.statuses += [(503, {"Retry-After": "0.01"}), (429, {}), (502, {})]
    else:
        server.fail_every = 3
    assert contents(source) == [server.files[name] for name in IMAGES]


@pytest.mark.parametrize(("status", "words"), [
    (403, "the server answered 403"), (404, "does not exist"), (410, "the server answered 410"), (451, "answered 451"),
])  # fmt: skip
def test_one_image_that_is_refused_is_an_unreadable_one(
    server: NaughtyServer, store: BlockStore, folder: Path, status: int, words: str
) -> None:
    source = listed(folder, addresses(server), store)
    server.status_of[IMAGES[1]] = status
    with pytest.raises(UnreadableImage, match=words):
        source.read(1)
    assert server.requests[IMAGES[1]] == 1
    assert source.read(0) == server.files[IMAGES[0]]


def test_a_short_answer_is_no_image(server: NaughtyServer, store: BlockStore, folder: Path) -> None:
    server.lie_by = 100
    source = listed(folder, addresses(server), store)
    with pytest.raises(ConnectionLost):
        source.read(0)
    server.lie_by = 0
    assert source.read(0) == server.files[IMAGES[0]]


def test_a_server_that_is_gone_is_no_fault_of_an_image(server: NaughtyServer, store: BlockStore, folder: Path) -> None:
    source = listed(folder, addresses(server), store)
    source.read(0)
    server.stop()
    with pytest.raises(ConnectionLost, match=r"continue with --resume"):
        source.read(1)
    assert source.read(0) == server.files[IMAGES[0]]
    server.start()
    assert source.read(1) == server.files[IMAGES[1]]


def test_a_server_that_never_answered_may_be_a_wrong_address(store: BlockStore, folder: Path) -> None:
    with NaughtyServer({}) as server:
        address = server.at("a.jpg")
    with pytest.raises(InputError, match=r"can't be reached: .*; check the address and the network"):
        listed(folder, [address], store).read(0)


def test_a_pickled_list_reads_the_same_images(server: NaughtyServer, store: BlockStore, folder: Path) -> None:
    source = listed(folder, addresses(server), store)
    copy = pickle.loads(pickle.dumps(source))
    assert (names(copy), contents(copy)) == (names(source), contents(source))
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
            assert list(pool.map(source.read, range(4))) == contents(source)
    server.stop()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool, pytest.raises(ConnectionLost):
        pool.submit(far_away, source, server.at("p/other.jpg")).result()
    server.start()


def far_away(source: ImageSource, address: str) -> bytes:
    """Read an image that is not kept, in a process that has just begun: that its server has answered is known."""
    for name, value in {"ATTEMPTS": 2, "FIRST_WAIT": 0.01, "_tell": lambda line: None}.items():
        setattr(retry, name, value)
    source._addresses = [address]  # type: ignore[attr-defined]
    found = source.read(0)
    assert isinstance(found, bytes)
    return found


def refusal(places: list[str], store: BlockStore, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        listed(folder, places, store)
    return str(caught.value)


def test_one_list_has_one_server(store: BlockStore, folder: Path) -> None:
    told = refusal(["https://a.org/1.jpg", "https://a.org/2.jpg", "s3://a.org/3.jpg", "b/4.jpg"], store, folder)
    assert told == (
        f"the images of one list must be in one place, but {folder}/list.txt names https://a.org 2 (such as "
        "https://a.org/1.jpg), s3://a.org 1 (such as s3://a.org/3.jpg), this machine 1 (such as b/4.jpg); make a list for "
        "each; they can be given together"
    )
    assert "and 2 others; make a list" in refusal([f"https://{host}.org/1.jpg" for host in "abcdefg"], store, folder)


LIST = """# images
cat/1.jpg
./cat/2.JPG
dog/../dog/a b.png
/p/dog/é#1.png
"""


@pytest.mark.parametrize("absolute", [False, True])
def test_a_list_at_an_address_names_images_beside_it(server: NaughtyServer, store: BlockStore, absolute: bool) -> None:
    text = "\n".join(addresses(server)) if absolute else LIST
    server.files["p/list.txt"] = b"\xef\xbb\xbf" + text.encode()
    source = open_list(server.at("p/list.txt?v=1"), store)
    assert names(source) == ["cat/1.jpg", "cat/2.JPG", "dog/a b.png", "dog/é#1.png"]
    assert contents(source) == [server.files[name] for name in IMAGES]
    assert source.describe() == f"4 images (.png 2, .JPG 1, .jpg 1) listed in {server.at('p/list.txt?v=1')}"


def test_a_table_at_an_address_has_labels(server: NaughtyServer, store: BlockStore) -> None:
    server.files["p/t.csv"] = b"path;label\ncat/1.jpg;cat\ndog/a b.png;dog\n"
    source = open_list(server.at("p/t.csv"), store)
    assert labels(source) == ["cat", "dog"]
    assert contents(source) == [server.files[IMAGES[0]], server.files[IMAGES[2]]]
    server.files["p/t.csv"] = b"x;y\n1;2\n"
    with pytest.raises(InputError, match=r"p/t\.csv has no column of image paths"):
        open_list(server.at("p/t.csv"), store)


def test_a_list_at_an_address_that_is_none_is_told(server: NaughtyServer, store: BlockStore) -> None:
    server.files["x.txt"] = b"\xff\xfe\xff"
    with pytest.raises(InputError, match=r"x\.txt can't be read as text"):
        open_list(server.at("x.txt"), store)
    with pytest.raises(InputError, match=r"none\.txt does not exist"):
        open_list(server.at("none.txt"), store)


def test_a_list_in_memory_names_images_beside_it(store: BlockStore) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/m/list.txt": b"a.jpg\nsub/b.jpg\n../c.jpg\n", "/m/a.jpg": b"a", "/m/sub/b.jpg": b"b", "/c.jpg": b"c"})
    try:
        source = open_list("memory://m/list.txt", store)
        assert names(source) == ["m/a.jpg", "m/sub/b.jpg", "c.jpg"]
        assert contents(source) == [b"a", b"b", b"c"]
    finally:
        memory.store.clear()


@pytest.mark.parametrize("place", ["p", "p/", "p/**/*.[pj]*g", "p/{cat/*.*,dog/a b.png}"])
def test_a_folder_of_images_at_an_address(server: NaughtyServer, folder: Path, place: str) -> None:
    server.files["p/notes.txt"] = b""
    source = open_source(server.at(place), cache=folder)
    # A page with `#` in a link leads elsewhere; glob patterns mind the case of letters.
    assert names(source) == ["cat/1.jpg", *(["cat/2.JPG"] if "[" not in place else []), "dog/a b.png"]
    assert source.read(0) == server.files[IMAGES[0]]
    assert source.describe().endswith(f" at {server.at(place)}")


def test_troubles_are_told_to_the_one_who_opened(server: NaughtyServer, folder: Path) -> None:
    lines: list[str] = []
    (folder / "list.txt").write_text("\n".join(addresses(server)), encoding="utf-8")
    source = open_source(folder / "list.txt", cache=folder, on_trouble=lines.append)
    pickle.dumps(source)
    server.statuses += [(503, {})] * 3
    assert source.read(0) == server.files[IMAGES[0]]
    assert len(lines) == 1
    assert lines[0].endswith(": the server answered 503 (Service Unavailable); trying again, 5 times at most")
