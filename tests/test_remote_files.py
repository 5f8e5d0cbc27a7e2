"""Lists of addresses: names, labels, content, what is kept, and what is told; a real server on 127.0.0.1."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from http_server import NaughtyServer

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.remote_files import open_folder_at, open_list_at, open_remote_list
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.remote import ConnectionLost, Patience

HASTY = Patience(attempts=5, first_wait=0.01, longest_wait=0.05, on_trouble=lambda line: None)
IMAGES = ["p/cat/1.jpg", "p/cat/2.JPG", "p/dog/a b.png", "p/dog/é#1.png"]


@pytest.fixture
def server() -> Iterator[NaughtyServer]:
    with NaughtyServer({name: f"content of {name}".encode() * 100 for name in IMAGES}) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> BlockStore:
    return BlockStore(tmp_path / "blocks", 1 << 40)


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
    pairs = [(address, "") for address in addresses(server)]
    source = open_remote_list("list.txt", [*pairs, pairs[1]], ["a note"], BlockStore(tmp_path, 1 << 40), HASTY)
    assert names(source) == ["cat/1.jpg", "cat/2.JPG", "dog/a b.png", "dog/é#1.png"]
    assert source.describe() == ("4 images (.png 2, .JPG 1, .jpg 1) listed in list.txt, a note, 1 repeated line skipped")
    assert labels(source) is None
    assert [source.stamp(index) for index in range(4)] == addresses(server)
    assert source.changed() is None
    assert source.path(0) is None
    assert not server.requests  # nothing is asked before an image is read
    assert contents(source) == [server.files[name] for name in IMAGES]
    assert set(server.requests.values()) == {1}
    server.forget()
    again = open_remote_list("list.txt", pairs, [], BlockStore(tmp_path, 1 << 40), HASTY)
    assert contents(again) == contents(source)
    assert not server.requests


def test_labels_are_those_of_the_first_line_of_an_image(server: NaughtyServer, store: BlockStore) -> None:
    given = zip(addresses(server), ["cat", "", "dog", "dog"], strict=True)
    source = open_remote_list("t.csv", [*given, (addresses(server)[1], "late")], [], store)
    assert labels(source) == ["cat", None, "dog", "dog"]


def test_images_of_equal_names_are_numbered(store: BlockStore) -> None:
    pairs = [(f"https://host/show.php?id={number}", "") for number in range(3)]
    assert names(open_remote_list("l.txt", pairs, [], store)) == ["show.php", "show-2.php", "show-3.php"]


@pytest.mark.parametrize("fault", ["drop", "503", "fail"])
def test_a_bad_connection_costs_a_wait(server: NaughtyServer, store: BlockStore, fault: str) -> None:
    source = open_remote_list("l.txt", [(address, "") for address in addresses(server)], [], store, HASTY)
    if fault == "drop":
        server.fail_every = 2
    elif fault == "503":
        server.statuses += [(503, {"Retry-After": "0.01"}), (429, {}), (502, {})]
    else:
        server.fail_every = 3
    assert contents(source) == [server.files[name] for name in IMAGES]


@pytest.mark.parametrize("status", [403, 404, 410, 451])
def test_one_image_that_is_refused_is_an_unreadable_one(server: NaughtyServer, store: BlockStore, status: int) -> None:
    source = open_remote_list("l.txt", [(address, "") for address in addresses(server)], [], store, HASTY)
    server.status_of[IMAGES[1]] = status
    with pytest.raises(UnreadableImage, match=f"the server answered {status}"):
        source.read(1)
    assert server.requests[IMAGES[1]] == 1
    assert source.read(0) == server.files[IMAGES[0]]


def test_a_short_answer_is_no_image(server: NaughtyServer, store: BlockStore) -> None:
    server.lie_by = 100
    source = open_remote_list("l.txt", [(address, "") for address in addresses(server)], [], store, HASTY)
    with pytest.raises(ConnectionLost):
        source.read(0)
    server.lie_by = 0
    assert source.read(0) == server.files[IMAGES[0]]


def test_a_server_that_is_gone_is_no_fault_of_an_image(server: NaughtyServer, store: BlockStore) -> None:
    source = open_remote_list("l.txt", [(address, "") for address in addresses(server)], [], store, HASTY)
    source.read(0)
    server.stop()
    with pytest.raises(ConnectionLost, match=r"go on with --resume"):
        source.read(1)
    assert source.read(0) == server.files[IMAGES[0]]
    server.start()
    assert source.read(1) == server.files[IMAGES[1]]


def refusal(pairs: list[str], store: BlockStore) -> str:
    with pytest.raises(InputError) as caught:
        open_remote_list("list.txt", [(path, "") for path in pairs], [], store)
    return str(caught.value)


def test_one_list_has_one_server(store: BlockStore) -> None:
    told = refusal(["https://a.org/1.jpg", "https://a.org/2.jpg", "s3://a.org/3.jpg", "b/4.jpg"], store)
    assert told == (
        "the images of one list must lie at one server, but list.txt names https://a.org 2 (such as https://a.org/1.jpg), "
        "s3://a.org 1 (such as s3://a.org/3.jpg), no address 1 (such as b/4.jpg); make a list for each; they can be given "
        "together"
    )
    assert "and 2 others; make a list" in refusal([f"https://{host}.org/1.jpg" for host in "abcdefg"], store)
    assert refusal([], store) == "list.txt names no images; write the address of one image a line"


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
    source = open_list_at(server.at("p/list.txt?v=1"), store, HASTY)
    assert names(source) == ["cat/1.jpg", "cat/2.JPG", "dog/a b.png", "dog/é#1.png"]
    assert contents(source) == [server.files[name] for name in IMAGES]
    assert source.describe() == f"4 images (.png 2, .JPG 1, .jpg 1) listed in {server.at('p/list.txt?v=1')}"


def test_a_table_at_an_address_has_labels(server: NaughtyServer, store: BlockStore) -> None:
    server.files["p/t.csv"] = b"path;label\ncat/1.jpg;cat\ndog/a b.png;dog\n"
    source = open_list_at(server.at("p/t.csv"), store, HASTY)
    assert labels(source) == ["cat", "dog"]
    assert contents(source) == [server.files[IMAGES[0]], server.files[IMAGES[2]]]
    server.files["p/t.csv"] = b"x;y\n1;2\n"
    with pytest.raises(InputError, match=r"p/t\.csv has no column of image paths"):
        open_list_at(server.at("p/t.csv"), store, HASTY)


def test_a_list_at_an_address_that_is_none_is_told(server: NaughtyServer, store: BlockStore) -> None:
    server.files["x.txt"] = b"\xff\xfe\xff"
    with pytest.raises(InputError, match=r"x\.txt can't be read as UTF-8 text"):
        open_list_at(server.at("x.txt"), store, HASTY)
    with pytest.raises(InputError, match=r"none\.txt does not exist"):
        open_list_at(server.at("none.txt"), store, HASTY)


def test_a_list_in_memory_names_images_beside_it(store: BlockStore) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/m/list.txt": b"a.jpg\nsub/b.jpg\n../c.jpg\n", "/m/a.jpg": b"a", "/m/sub/b.jpg": b"b", "/c.jpg": b"c"})
    try:
        source = open_list_at("memory://m/list.txt", store, HASTY)
        assert names(source) == ["m/a.jpg", "m/sub/b.jpg", "c.jpg"]
        assert contents(source) == [b"a", b"b", b"c"]
    finally:
        memory.store.clear()


def test_a_folder_of_images_at_an_address(server: NaughtyServer, store: BlockStore) -> None:
    server.files["p/notes.txt"] = b""
    source = open_folder_at(server.at("p"), ["jpg", "png"], store, HASTY)
    assert sorted(names(source)) == ["cat/1.jpg", "cat/2.JPG", "dog/a b.png"]  # a page with `#` in a link leads elsewhere
    assert source.read(0) == server.files[IMAGES[0]]
