"""Large folders: the order of the images, the list that is kept of them, what is said of changes, and what it all takes."""

import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepcluster.core.errors import UnreadableImage
from deepcluster.core.names import PackedNames
from deepcluster.data.sources import scan
from deepcluster.data.sources.class_folders import class_folders
from deepcluster.data.sources.folders import difference, open_folder
from deepcluster.data.sources.image_source import ImageSource

# Below "/" and above it, of two to four bytes, and a byte that is not UTF-8: what could upset an order or a format.
ODD = "ab-. 0!'\"\n\\\té\ue000😀\udce9"
ODD_NAMES = st.text(ODD, min_size=1, max_size=4).filter(lambda name: not name.startswith("."))
OLD_NS = 1_700_000_000 * 10**9


def names(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def write(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(file))
    return root


def age(root: Path) -> None:
    """Make the last change of every folder an old one."""
    for name in os.listdir(root):  # noqa: PTH208 (the tests count calls of os.scandir, which pathlib makes)
        if (root / name).is_dir() and not (root / name).is_symlink():
            age(root / name)
    os.utime(root, ns=(OLD_NS, OLD_NS))


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The folders whose entries were asked for."""
    folders: list[Path] = []
    scandir = os.scandir

    def note(folder: Path) -> object:
        folders.append(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", note)
    yield folders


# Names


@given(st.lists(st.text(st.characters(), max_size=9), max_size=40))
def test_packed_names_are_the_names(wanted: list[str]) -> None:
    """Also halves of surrogate pairs, and null characters."""
    packed = PackedNames(wanted)
    assert list(packed) == wanted
    assert [packed[index] for index in range(-len(wanted), len(wanted))] == wanted * 2
    pickled = pickle.dumps(packed)
    assert pickle.loads(pickled) == packed == PackedNames(iter(wanted))
    assert len(pickled) < 400 + 8 * len(wanted) + sum(len(name.encode("utf-8", "surrogatepass")) for name in wanted)
    assert packed != PackedNames([*wanted, ""])
    for beyond in (len(wanted), -len(wanted) - 1):
        with pytest.raises(IndexError):
            _ = packed[beyond]


def test_names_are_packed_over_several_rounds() -> None:
    wanted = [str(number) for number in range(25_001)]
    assert list(PackedNames(wanted)) == wanted


# Order and labels


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(ODD_NAMES, min_size=1, max_size=4), min_size=1, max_size=12))
def test_the_order_is_that_of_the_whole_paths(paths: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        written = set()
        for *folders, name in paths:
            path = Path(temporary, *folders, f"{name}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            written.add("/".join([*folders, f"{name}.jpg"]))
        found = scan.scan(Path(temporary))
        assert list(found.names) == sorted(written)
        assert sum(found.images.values()) == len(written)
        assert set(found.images) == {path[: path.rfind("/") + 1] for path in written}
        assert found.endings == {"jpg": len(written)}


def test_folders_that_are_called_like_images_are_sorted_as_folders(tmp_path: Path) -> None:
    wanted = ["a-.jpg", "a.jpg/x.png", "a.jpg0.png", "a/x.jpg", "a0.jpg"]
    assert names(open_folder(write(tmp_path, *wanted))) == wanted == sorted(wanted)


def plain_labels(paths: list[str], *, below_split: bool = False) -> list[str] | None:
    """What folders say of classes: those of the first level with several, except train and val and such, once."""
    if not all("/" in path for path in paths):
        return None
    tops = [path.split("/")[0] for path in paths]
    are_splits = not below_split and {top.lower() for top in tops} <= {"train", "val"}
    if len(set(tops)) > 1 and not are_splits:
        return tops
    return plain_labels([path.partition("/")[2] for path in paths], below_split=below_split or are_splits)


@given(st.lists(st.lists(st.sampled_from(["a", "a-", "a0", "b", "train", "Val", "é"]), min_size=1, max_size=4), min_size=1))
def test_class_folders_are_the_labels_of_the_paths(parts: list[list[str]]) -> None:
    paths = sorted({"/".join(["train"] * (len(parts) % 2) + part) for part in parts})
    folders = [path[: path.rfind("/") + 1] for path in paths]
    classes = class_folders(folders)
    assert (classes and [classes[folder] for folder in folders]) == plain_labels(paths)


# Odd names


def test_odd_names_can_be_read_kept_and_sent(tmp_path: Path, looked: list[Path]) -> None:
    odd = [
        "new\nline.jpg",
        "quo'te\".jpg",
        " .jpg",
        "-rf.jpg",
        "*?.jpg",
        "back\\slash.jpg",
        "n" * 251 + ".jpg",
        "\udce9.jpg",
    ]
    deep = "/".join(["d" * 200] * 18) + "/x.jpg"
    root = write(tmp_path / "root\udce9\n", *odd, *(f"f {name}/{name}" for name in odd[:-2]), deep)
    age(root)
    source = open_folder(root)
    looked.clear()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(source.read, range(len(source))) == [source.read(index) for index in range(len(source))]
    for one in (source, pickle.loads(pickle.dumps(source))):
        contents = [one.read(index) for index in range(len(one))]
        assert contents == [os.fsencode(file.relative_to(root)) for file in map(one.path, range(len(one))) if file]
        assert len(set(contents)) == 2 * len(odd) - 1
        assert one.changed() is None
    assert looked == []


def test_a_link_to_itself_hides_nothing(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number}/{number}.jpg" for number in range(9)), "5.jpg")
    (tmp_path / "again").symlink_to("again")
    (tmp_path / "again.jpg").symlink_to("again.jpg")
    source = open_folder(tmp_path)
    assert len(source) == 11
    assert "1 other file skipped (no ending 1)" in source.describe()
    with pytest.raises(UnreadableImage, match="symbolic links"):
        source.read(names(source).index("again.jpg"))


# What is told on the way


def test_the_images_found_are_told_on_the_way_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_REPORT_SECONDS", -1)
    monkeypatch.setattr(scan, "_REPORT_ENTRIES", 2)
    write(tmp_path, *(f"{folder}/{number}.jpg" for folder in "abc" for number in range(3)), "a/notes.txt")
    told: list[int] = []
    open_folder(tmp_path, on_found=told.append)
    assert told == sorted(told)
    assert {0, 3, 5, 6, 8, 9} <= set(told)  # 5 and 8 are in the middle of a folder
    assert told[-1] == 9


@pytest.mark.parametrize("kind", [KeyboardInterrupt, BrokenPipeError])
def test_a_search_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked: list[Path], kind: type) -> None:
    """Also by an error that would mean a closed folder if the folder raised it."""
    monkeypatch.setattr(scan, "_REPORT_SECONDS", -1)
    write(tmp_path, *(f"{number}/x.jpg" for number in range(9)))

    def stop(found: int) -> None:
        if found == 4:
            raise kind

    with pytest.raises(kind):
        open_folder(tmp_path, on_found=stop)
    assert len(looked) == 1 + 4


# Changes


def back_in_time(root: Path) -> None:
    """As programs do that copy folders with their times."""
    (root / "b/new.jpg").touch()
    os.utime(root / "b", ns=(OLD_NS, OLD_NS))


def swap_link(root: Path) -> None:
    (root / "linked").unlink()
    (root / "linked").symlink_to(root.parent / "other")
    age(root)


def swap_folder(root: Path) -> None:
    (root / "c").rename(root.parent / "away")
    write(root, "c/other.jpg")
    age(root)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a new image": lambda root: (root / "a/x/new.jpg").touch(),
    "a new image, and the folder's time set back": back_in_time,
    "an image gone": lambda root: (root / "b/1.jpg").unlink(),
    "a new name": lambda root: (root / "b/1.jpg").rename(root / "b/2.jpg"),
    "a folder moved": lambda root: (root / "b").rename(root / "a/b"),
    "a folder gone": lambda root: shutil.rmtree(root / "c"),
    "a folder in the place of another": swap_folder,
    "a new image behind a link": lambda root: (root.parent / "elsewhere/deep/new.jpg").touch(),
    "a link that leads elsewhere": swap_link,
    "a link that led nowhere": lambda root: write(root.parent / "later", "9.jpg"),
    "another kind of file": lambda root: (root / "b/1.jpg").rename(root / "b/1.txt"),
}


def tree(parent: Path) -> Path:
    """A folder with links, in which nothing has changed for long."""
    root = write(parent / "root", "a/x/0.jpg", "b/1.jpg", "b/3.jpg", "c/5.jpg")
    write(parent / "elsewhere", "deep/7.jpg")
    write(parent / "other", "8.jpg")
    (root / "linked").symlink_to(parent / "elsewhere")
    (root / "later").symlink_to(parent / "later")
    age(parent)
    return root


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(tmp_path: Path, looked: list[Path], change: str) -> None:
    """And where there is none, no folder is read again."""
    root = tree(tmp_path / "tree")
    before = open_folder(root)
    count = len(looked)
    assert before.changed() is None
    assert len(looked) == count
    CHANGES[change](root)
    after = open_folder(root)
    assert names(after) != names(before)
    assert before.changed() is not None
    assert after.changed() is None


def test_a_change_within_the_same_step_of_the_clock_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that counts in steps of two seconds, and which has no other time than this."""
    fine = scan._stamp

    def coarse(path: str) -> scan.Stamp | None:
        stamp = fine(path)
        return stamp and (*stamp[:2], stamp[2] - stamp[2] % (2 * 10**9), 0)

    monkeypatch.setattr(scan, "_stamp", coarse)
    root = write(tmp_path / "root", "a/1.jpg", "b/2.jpg")
    age(root)
    os.utime(root / "b")
    source = open_folder(root)
    status = (root / "b").stat()
    (root / "b/new.jpg").touch()
    os.utime(root / "b", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.changed() == "1 image is new (b/new.jpg)"


# What has changed, image by image and on the whole


def test_changes_are_named(tmp_path: Path) -> None:
    root = write(tmp_path / "root", *(f"{number}.jpg" for number in range(9)))
    source = open_folder(root)
    assert source.changed() is None
    (root / "3.jpg").unlink()
    assert source.changed() == "1 image is gone (3.jpg)"
    write(root, "new/a.jpg", "new/b\udce9.jpg", "new/c.jpg", "new/d.jpg", "notes.txt")
    assert source.changed() == "1 image is gone (3.jpg) and 4 are new (new/a.jpg, new/b\\xe9.jpg, new/c.jpg, ...)"
    write(root, "3.jpg")
    shutil.rmtree(root / "new")
    assert source.changed() is None
    shutil.rmtree(root)
    assert source.changed() == "9 images are gone (0.jpg, 1.jpg, 2.jpg, ...)"


def test_a_second_look_at_what_has_not_changed_is_short(tmp_path: Path, looked: list[Path]) -> None:
    root = write(tmp_path / "root", "a/1.jpg")
    source = open_folder(root)
    (root / "a/1.jpg").unlink()
    write(root, "a/1.jpg")
    age(root)
    for _ in range(3):
        assert source.changed() is None
    assert len(looked) == 4  # two folders when it was opened, and once more


@given(st.sets(st.text("ab/", min_size=1, max_size=3)), st.sets(st.text("ab/", min_size=1, max_size=3)))
def test_the_difference_counts_and_names_what_is_gone_and_new(before: set[str], now: set[str]) -> None:
    said = difference(sorted(before), iter(sorted(now)))
    for names, what in ((before - now, "gone"), (now - before, "new")):
        some = ", ".join(sorted(names)[:3]) + ", ..." * (len(names) > 3)
        assert (f"{what} ({some})" in said) == (f"{what} (" in said) == bool(names)
        assert not names or re.search(rf"\b{len(names)} (images? )?(is|are) {what}", said)


def test_a_stamp_follows_the_content_of_a_file(tmp_path: Path) -> None:
    root = write(tmp_path, "a.jpg", "b.jpg")
    os.utime(root / "a.jpg", ns=(OLD_NS, OLD_NS + 7))
    source = open_folder(root)
    assert source.stamp(0) == f"5-{OLD_NS + 7}"
    os.utime(root / "a.jpg", ns=(OLD_NS, OLD_NS))
    assert source.stamp(0) == f"5-{OLD_NS}"
    (root / "a.jpg").write_bytes(b"longer")
    assert source.stamp(0).startswith("6-")
    (root / "a.jpg").unlink()
    assert source.stamp(0) == ""


def test_many_threads_read_one_source(tmp_path: Path) -> None:
    source = open_folder(write(tmp_path, *(f"{number % 7}/{number}.jpg" for number in range(300))))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, [*range(300)] * 3)) == [name.encode() for name in names(source)] * 3


# A million


# Linux keeps the peak of this program alone in VmHWM; the one of getrusage is that of its parent where that was larger.
MEASURE = """
import re, sys
from pathlib import Path
from deepcluster.data.sources.folders import open_folder
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
source = open_folder(Path(sys.argv[1]))
grown = peak() - before
ordered = all(source.name(index) < source.name(index + 1) for index in range(len(source) - 1))
print(len(source), ordered, len(source.class_names), source.name(0), source.name(999_999), grown // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
@pytest.mark.slow
def test_a_million_files_take_little_memory(tmp_path: Path) -> None:
    root = tmp_path / "root"
    try:
        for folder in range(1000):
            (root / f"{folder:03}").mkdir(parents=True)
            for number in range(1000):
                os.close(os.open(f"{root}/{folder:03}/image {number:03}.jpg", os.O_CREAT | os.O_WRONLY))
        age(root)
        command = [sys.executable, "-c", MEASURE, str(root)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        words, _, megabytes = found.rpartition(" ")
        assert words == "1000000 True 1000 000/image 000.jpg 999/image 999.jpg"
        assert 0 < int(megabytes) < 400  # 80 where this was written
        (root / "500/image 500.jpg").unlink()
        assert len(open_folder(root)) == 999_999
    finally:
        shutil.rmtree(root, ignore_errors=True)
