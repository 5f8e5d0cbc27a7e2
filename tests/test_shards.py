"""Tar shards: the same images as `tarfile` finds, whatever made the tar; found once; never half an image."""

from __future__ import annotations

import gc
import gzip
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from http_server import NaughtyServer
from hypothesis import given, settings
from hypothesis import strategies as st

from deepcluster.core.errors import InputError, Interrupted, UnreadableImage
from deepcluster.core.retry import ConnectionLost
from deepcluster.data.decode import decode
from deepcluster.data.sources.files import IMAGE_ENDINGS
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.shards import ShardSource, open_shards
from deepcluster.data.storage import LocalFile, StoredFile
from deepcluster.data.storage.blocks import BlockStore
from deepcluster.data.storage.remote import RemoteFile

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
CIFAR10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
Members = Iterable[tuple[str, bytes]]


def content(name: str, size: int = 700) -> bytes:
    return random.Random(name).randbytes(size)


def images_of(*names: str) -> list[tuple[str, bytes]]:
    return [(name, content(name)) for name in names]


def write_tar(path: Path, members: Members, form: str = "pax", mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=FORMATS[form]) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def opened(*files: Path | StoredFile, on_found: Callable[[int], None] = lambda so_far: None) -> ImageSource:
    """Open with a cache beside the first of them, so that it is the same one each time."""
    stored = [LocalFile(file) if isinstance(file, Path) else file for file in files]
    cache = Path(stored[0].where()).parent / "cache"
    return open_shards(stored, cache=cache, on_found=on_found)


def held(source: ImageSource) -> dict[str, bytes]:
    found = {source.name(index): bytes(source.read(index)) for index in range(len(source))}
    assert len(found) == len(source)
    return found


def labels(source: ImageSource) -> dict[str, str] | None:
    if source.labels_N is None:
        return None
    return {
        source.name(index).partition("::")[2]: source.class_names[label] if label >= 0 else ""
        for index, label in enumerate(source.labels_N.tolist())
    }


def complaint(*files: Path | StoredFile) -> str:
    with pytest.raises(InputError) as caught:
        opened(*files)
    return str(caught.value)


def reference(path: Path) -> dict[str, bytes]:
    """What `tarfile` finds."""
    found = {}
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        for member in tar:
            if member.isreg() and member.name.rpartition(".")[2].lower() in IMAGE_ENDINGS:
                stream = tar.extractfile(member)
                assert stream is not None
                name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                found[f"{path.name}::{name.removeprefix('./').lstrip('/')}"] = stream.read()
    return found


# Layouts


@pytest.mark.parametrize("form", FORMATS)
def test_images_are_those_that_tarfile_finds(tmp_path: Path, form: str) -> None:
    long = "/".join(["deep" * 5] * 7) + "/" + "n" * 90 + ".png"  # Over 100 bytes, but for `ustar` in two parts below 155.
    names = ["b.jpg", "./a/1.JPEG", "a/ü – 猫.webp", "/rooted.gif", "a/notes.txt", long, "a/last.tiff"]
    names += [] if form == "ustar" else ["/".join(["deeper" * 20] * 5) + ".bmp", "ü" * 200 + ".jpg"]
    sizes = [0, 1, 511, 512, 513, 1024, 200_000, 300_000, 70_000]
    tar = write_tar(
        tmp_path / "a.tar", [(name, content(name, size)) for name, size in zip(names, sizes, strict=False)], form
    )
    source = opened(tar)
    assert held(source) == reference(tar)
    assert list(held(source)) == list(reference(tar)), "the order of the tar"
    assert source.name(1) == "a.tar::a/1.JPEG"
    assert source.path(0) is None
    assert "1 other member skipped (.txt 1)" in source.describe()


def test_names_in_old_encodings_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("é/ñ.jpg"))
    assert opened(path).name(0) == r"a.tar::\xe9/\xf1.jpg"
    assert held(opened(path)) == reference(path)


def test_what_is_no_image_file_is_skipped(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", images_of("a.jpg", ".a.jpg", "x/._b.jpg", "__MACOSX/c.jpg", ".x/d.jpg", "jpg", ".jpg")
    )
    with tarfile.open(path, "a") as tar:
        for name, kind in [
            ("l.jpg", tarfile.LNKTYPE), ("s.jpg", tarfile.SYMTYPE), ("d.jpg", tarfile.DIRTYPE), ("f.jpg", tarfile.FIFOTYPE),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("../../out.jpg"))
    source = opened(path)
    assert list(held(source)) == ["a.tar::a.jpg", "a.tar::out.jpg"]
    assert source.describe() == (
        "2 images in 1 tar shard (.jpg 2), 1 other member skipped (no ending 1), 3 links or special files skipped"
    )


@pytest.mark.skipif(not shutil.which("tar"), reason="no program tar")
@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_tars_of_the_program_tar(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    for name, data in images_of("cat/1.jpg", "cat/2.jpg", "dog/3.jpg", "dog/4.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with (folder / "dog/0.jpg").open("wb") as file:
        file.truncate(10_000_000)  # A hole, which --sparse leaves out.
    sparse = ["--sparse"] if form not in ("v7", "ustar") else ["--exclude=0.jpg"]
    path = tmp_path / "a.tar"
    result = subprocess.run(
        ["tar", f"--format={form}", *sparse, "-cf", path, "-C", folder, "."], capture_output=True, check=False
    )
    if result.returncode:
        pytest.skip(f"another tar: {result.stderr.decode()}")
    source = opened(path)
    want = {f"a.tar::{name}": content(name) for name in ("cat/1.jpg", "cat/2.jpg", "dog/3.jpg")}
    assert held(source) == want
    assert labels(source) == {"cat/1.jpg": "cat", "cat/2.jpg": "cat", "dog/3.jpg": "dog"}
    assert ("1 link or special file skipped" in source.describe()) == (sparse == ["--sparse"])


def test_tars_one_behind_the_other_are_all_read(tmp_path: Path) -> None:
    first, second = (write_tar(tmp_path / f"{name}.tar", images_of(f"{name}.jpg")) for name in "ab")
    both = tmp_path / "both.tar"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert held(opened(both)) == {f"both.tar::{name}": content(name) for name in ("a.jpg", "b.jpg")}
    both.write_bytes(first.read_bytes() + b"\0" * 1_000_000)
    assert opened(both).describe() == "1 image in 1 tar shard (.jpg 1)"


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/."), min_size=1, max_size=120),
            st.integers(0, 3000),
        ),
        min_size=1,
        max_size=12,
        unique_by=lambda member: member[0],
    ),
    form=st.sampled_from(["gnu", "pax"]),
)
def test_any_names_and_sizes(tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, int]], form: str) -> None:
    tar = tmp_path_factory.mktemp("any") / "a.tar"
    write_tar(tar, [(f"{name}.jpg", content(name, size)) for name, size in members], form)
    want = [(f"a.tar::{name}.jpg", content(name, size)) for name, size in members]
    for _ in range(2):  # Found, and taken from the cache.
        source = opened(tar)
        assert [(source.name(index), source.read(index)) for index in range(len(source))] == want


# Labels


def test_labels_lie_beside_images_as_webdataset_has_them(tmp_path: Path) -> None:
    members = [
        ("x/000.jpg", b"1"), ("x/000.cls", b"7\n"), ("x/000.json", b'{"label": 3}'),
        ("x/001.cls", b"dog"), ("x/001.left.jpg", b"2"), ("x/001.right.png", b"3"),
        ("x/002.json", json.dumps({"caption": "a label", "label": None, "class": "cat"}).encode()), ("x/002.jpg", b"4"),
        ("x/003.jpg", b"5"), ("x/003.cls", b"-1"),
        ("x/004.jpg", b"6"), ("x/004.json", b'{"target": 12'),
        ("x/005.jpg", b"7"), ("x/005.json", b'{"target": 12}'), ("x/005.cls", b"\xff\xfe"),
        ("x/006.b.cls", b"4"), ("x/006.jpg", b"8"),
        ("y/000.JPG", b"9"), ("y/000.CLS", b"8"),
        ("z.v1/000.jpg", b"10"), ("z.v1/000.json", b'{"label": [1, 2], "class": {}, "target": "eel"}'),
        ("x/008.jpg", b"11"), ("x/008.json", b"[" * 60_000), ("x/009.cls", b"5" * 2000), ("x/009.jpg", b"12"),
        ("x/010.jpg", b"13"), ("x/010.json", b'{"label": "\\ud800"}'),
        ("x/011.jpg", b"14"), ("x/011.json", b'{"label": 12.0}'), ("x/012.jpg", b"15"), ("x/012.json", b'{"label": [7]}'),
        ("x/013.jpg", b"16"), ("x/013.json", b'{"label": NaN}'), ("x/014.jpg", b"17"), ("x/014.json", b'{"label": true}'),
    ]  # fmt: skip
    want = {
        "x/000.jpg": "7", "x/001.left.jpg": "dog", "x/001.right.png": "dog", "x/002.jpg": "cat", "x/003.jpg": "",
        "x/004.jpg": "", "x/005.jpg": "12", "x/006.jpg": "", "y/000.JPG": "8", "z.v1/000.jpg": "eel", "x/008.jpg": "",
        "x/009.jpg": "", "x/010.jpg": "\\ud800", "x/011.jpg": "12", "x/012.jpg": "7", "x/013.jpg": "",
        "x/014.jpg": "True",
    }  # fmt: skip
    one = write_tar(tmp_path / "a.tar", members)
    assert labels(opened(one)) == labels(opened(one)) == want
    random.Random(0).shuffle(members)  # As `tar c *.jpg *.cls` has them: not side by side.
    other = write_tar(tmp_path / "b.tar", members)
    assert labels(opened(other)) == labels(opened(other)) == want
    note = "labels from 8 classes (.cls or .json members; used for diagnostics only)"
    assert note in opened(one).describe()


def test_the_same_keys_twice_in_a_tar_keep_their_own_labels(tmp_path: Path) -> None:
    first, second = (
        write_tar(
            tmp_path / f"{name}.tar",
            [member for key in "01" for member in ((f"{key}.jpg", b""), (f"{key}.cls", (name + key).encode()))],
        ).read_bytes()
        for name in "ab"
    )
    (tmp_path / "both.tar").write_bytes(first + second)
    assert labels(opened(tmp_path / "both.tar")) == {"0.jpg": "a0", "1.jpg": "a1", "0-2.jpg": "b0", "1-2.jpg": "b1"}


def test_labels_of_folders_show_in_all_shards_together(tmp_path: Path) -> None:
    train = write_tar(tmp_path / "train.tar", images_of("./train/cat/1.jpg", "./train/dog/2.jpg"))
    val = write_tar(tmp_path / "val.tar", images_of("val/dog/more/1.jpg", "val/eel/2.jpg"))
    source = opened(train, val)
    want = {"train/cat/1.jpg": "cat", "train/dog/2.jpg": "dog", "val/dog/more/1.jpg": "dog", "val/eel/2.jpg": "eel"}
    assert labels(source) == want
    assert source.details() == "in 2 tar shards (.jpg 4), labels from 3 class folders (used for diagnostics only)"
    assert labels(opened(train, write_tar(tmp_path / "b.tar", images_of("3.jpg")))) is None
    assert labels(opened(val, train)) == want


def test_numbers_as_classes_are_sorted_as_numbers_over_all_shards(tmp_path: Path) -> None:
    tars = [
        write_tar(tmp_path / f"{name}.tar", [(f"{key}.jpg", b""), (f"{key}.cls", key.encode())])
        for name, key in (("a", "10"), ("b", "9"), ("c", "0"))
    ]
    source = opened(*tars, write_tar(tmp_path / "d.tar", [("x.jpg", b"")]))
    assert source.class_names == ["0", "9", "10"]
    assert source.labels_N is not None and source.labels_N.tolist() == [2, 1, 0, -1]


# Names


def test_names_are_distinct(tmp_path: Path) -> None:
    members = [("a/1.jpg", b"1"), ("a/1-2.jpg", b"2"), ("./a/1.jpg", b"3"), ("a/1.jpg", b"4"), ("b/1.jpg", b"5")]
    one = write_tar(tmp_path / "x" / "s.tar", members)
    two = write_tar(tmp_path / "y" / "s.tar", members[:1])
    source = opened(one, two)
    assert held(source) == {
        "s.tar::a/1.jpg": b"1", "s.tar::a/1-2.jpg": b"2", "s.tar::a/1-3.jpg": b"3", "s.tar::a/1-4.jpg": b"4",
        "s.tar::b/1.jpg": b"5", "s-2.tar::a/1.jpg": b"1",
    }  # fmt: skip
    assert source.describe().endswith("2 repeated names numbered")


def test_an_index_out_of_range_is_refused(tmp_path: Path) -> None:
    source = opened(write_tar(tmp_path / "a.tar", images_of("1.jpg")))
    for index in (-1, 1):
        with pytest.raises(IndexError):
            source.read(index)


# The index


class Counted(LocalFile):
    """A file on this machine that counts what is read of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, length: int) -> bytes:
        self.reads.append((start, length))
        return super().read(start, length)


def test_opened_again_nothing_is_read_but_the_images_asked_for(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", images_of(*(f"{number % 5}/{number}.jpg" for number in range(500))))
    first = Counted(path)
    want = opened(first)
    # The members are small, so all of it is read, in few pieces; the first bytes show that it is no gzip.
    assert sum(length for _, length in first.reads) < 1.05 * path.stat().st_size
    assert len(first.reads) < 10
    again = Counted(path)
    source = opened(again)
    assert again.reads == []
    assert source.describe() == want.describe()
    assert held(source) == held(want) == reference(path)
    assert labels(source) == labels(want)
    assert [length for _, length in again.reads] == [700] * 500, "one read an image"


def test_large_members_are_hopped_over(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", content(str(number), 1_000_000)) for number in range(20)])
    file = Counted(path)
    source = opened(file)
    assert sum(length for _, length in file.reads) < 0.02 * path.stat().st_size
    assert held(source) == reference(path)


def test_another_file_of_the_same_name_gets_an_index_of_its_own(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", images_of("1.jpg", "2.jpg"))
    before = opened(path)
    write_tar(path, images_of("2.jpg", "1.jpg", "3.jpg"))
    os.utime(path, ns=(1, 1))
    after = opened(path)
    assert list(held(after)) == ["a.tar::2.jpg", "a.tar::1.jpg", "a.tar::3.jpg"]
    assert before.stamp(0) != after.stamp(1)
    assert len({after.stamp(index) for index in range(3)}) == 3
    assert len(list((tmp_path / "cache/shards").iterdir())) == 1


def test_a_spoiled_index_is_made_anew(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [("0.jpg", b"0"), ("0.cls", b"cat"), *images_of(*(f"{n}.jpg" for n in range(1, 9)))]
    )
    want = opened(path)
    (index,) = (tmp_path / "cache/shards").iterdir()
    whole = index.read_bytes()
    draw = random.Random(0)
    spoiled = [b"", whole[:3], whole[:-1], whole[: len(whole) // 2], b"\0" * len(whole), whole + b"x"]
    for _ in range(60):
        place = draw.randrange(len(whole))
        spoiled.append(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
    for content_now in spoiled:
        index.write_bytes(content_now)
        source = opened(path)
        assert (held(source), labels(source), source.describe()) == (held(want), labels(want), want.describe())
        assert index.read_bytes() == whole
    index.unlink()
    index.mkdir()
    assert held(opened(path)) == held(want)


def test_the_index_of_another_file_is_not_taken(tmp_path: Path) -> None:
    """Two paths never have the same key; but a folder of the cache may be copied."""
    one, two = (write_tar(tmp_path / f"{name}.tar", images_of(f"{name}.jpg")) for name in "ab")
    os.utime(two, ns=(one.stat().st_mtime_ns,) * 2)
    opened(one)
    (first,) = (tmp_path / "cache/shards").iterdir()
    opened(two)
    (second,) = set((tmp_path / "cache/shards").iterdir()) - {first}
    shutil.copy(first, second)
    assert list(held(opened(two))) == ["b.tar::b.jpg"]


def test_without_a_cache_folder_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where the folder should be")
    plain = write_tar(tmp_path / "a.tar", images_of("1.jpg", "2.jpg"))
    packed = write_tar(tmp_path / "b.tar.gz", images_of("3.jpg", "4.jpg"), mode="w:gz")
    source = opened(plain, packed)
    assert held(source) == reference(plain) | reference(packed)
    assert source.describe().endswith("1 shard unpacked for this time only: the cache can't be written to")
    with ThreadPoolExecutor(8) as pool:
        order = [random.Random(0).randrange(4) for _ in range(400)]
        assert list(pool.map(source.read, order)) == [content(f"{index + 1}.jpg") for index in order]


def test_what_was_found_is_told_and_kept_when_stopped(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{name}.tar", [(f"{n}.jpg", b"") for n in range(1500)]) for name in "abc"]
    told: list[int] = []
    opened(*tars, on_found=told.append)
    assert told == sorted(told) and told[0] == 1000 and told[-1] == 4500

    def stop(found: int) -> None:
        if found > 2000:
            raise Interrupted("stopped")

    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(Interrupted):
        opened(*tars, on_found=stop)
    files = [Counted(tar) for tar in tars]
    opened(*files)
    assert [bool(file.reads) for file in files] == [False, True, True]


BUILD = """
import sys
from pathlib import Path
from deepcluster.data.sources.shards import open_shards
from deepcluster.data.storage import LocalFile
cache = Path(sys.argv[1])
for _ in range(5):
    source = open_shards([LocalFile(Path(path)) for path in sys.argv[2:]], cache=cache)
    print([(source.name(index), bytes(source.read(index)).hex()) for index in range(len(source))])
    for kept in cache.glob("*/*"):
        kept.unlink(missing_ok=True)
"""


def test_two_processes_find_the_same_at_the_same_time(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", images_of(*(f"{n}.jpg" for n in range(50))))
    packed = write_tar(tmp_path / "b.tgz", images_of(*(f"{n}.png" for n in range(50))), mode="w:gz")
    command = [sys.executable, "-c", BUILD, str(tmp_path / "cache"), str(plain)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    want = str([(name, data.hex()) for name, data in reference(plain).items()])
    for process in started:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert out.splitlines() == [want] * 5
    with ThreadPoolExecutor(4) as pool:
        for source in pool.map(lambda _: opened(packed), range(8)):
            assert held(source) == reference(packed)
    assert not list(tmp_path.rglob("*.part"))


# Damage


def test_of_a_tar_that_is_cut_short_the_whole_images_are_kept(tmp_path: Path) -> None:
    members = images_of("1.jpg", "2.jpg", "a" * 150 + ".jpg", "4.jpg")
    whole = write_tar(tmp_path / "whole.tar", members, "pax").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [member.offset_data + member.size for member in tar]
    end_mark = ends[-1] + -ends[-1] % 512
    path = tmp_path / "a.tar"
    for cut in sorted({place + more for place in range(0, len(whole), 512) for more in (0, 1, 188, 511)}):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        if not kept:
            told = complaint(path)
            assert str(path) in told
            assert ("cut short" in told) == (cut >= 512), "of less than a header, nothing can be said"
            continue
        source = opened(path)
        assert list(held(source).values()) == [data for _, data in members[:kept]]
        assert ("cut short" in source.details()) == (cut <= end_mark)
    path.write_bytes(whole[: ends[3] - 1])
    assert opened(path).details() == "in 1 tar shard (.jpg 3), a.tar is cut short after 3 images"
    path.write_bytes(whole[: ends[1] + -ends[1] % 512])
    assert opened(path).details().endswith("a.tar has no end mark, so it may be cut short after 2 images")
    assert opened(path).details() == opened(path).details(), "also of one whose index was kept"


def test_of_a_tar_with_a_damaged_header_the_images_before_are_kept(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", images_of("1.jpg", "2.jpg", "3.jpg"), "ustar")
    whole = bytearray(path.read_bytes())
    whole[2 * 1536 + 7] ^= 1
    path.write_bytes(whole)
    source = opened(path)
    assert list(held(source)) == ["a.tar::1.jpg", "a.tar::2.jpg"]
    assert source.details().endswith("a.tar is damaged after 2 images")


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    form=st.sampled_from(sorted(FORMATS)),
    changes=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=4),
    mend=st.booleans(),
)
def test_no_spoiled_header_leads_astray(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    form: str,
    changes: Sequence[tuple[int, int]],
    mend: bool,
) -> None:
    """Also with a right checksum over wrong fields: sizes without end, below zero, of other types."""
    path = tmp_path_factory.mktemp("spoiled") / "a.tar"
    long = "d" * 90 + "/" + "n" * 60 + ".jpg"
    whole = bytearray(write_tar(path, [("1.jpg", b"1" * 400), (long, b"2" * 400), ("ü.jpg", b"3" * 400)], form).read_bytes())
    block = 512 * data.draw(st.integers(0, len(whole) // 512 - 1))
    for place, value in changes:
        whole[block + place] = value
    if mend:
        header = whole[block : block + 512]
        header[148:156] = b" " * 8
        whole[block + 148 : block + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(whole)
    try:
        source = opened(path)
    except InputError as error:
        assert str(path) in str(error)
        return
    for index in range(len(source)):
        assert source.name(index)
        assert bytes(source.read(index)) in whole


def test_a_header_that_leads_back_does_not_go_round_in_circles(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", images_of("1.jpg", "2.jpg"), "gnu")
    whole = bytearray(path.read_bytes())
    header = whole[1536:2048]
    header[124:136] = (256**12 - 2048).to_bytes(12, "big")  # -2048 bytes, as large and negative numbers are written.
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole[1536:2048] = header
    path.write_bytes(whole)
    assert opened(path).details().endswith("a.tar is damaged after 1 image")


def test_long_names_without_end_are_damage(tmp_path: Path) -> None:
    """`tarfile` reads each of them by a call inside the call for the one before."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 0
    path = write_tar(tmp_path / "a.tar", images_of("1.jpg"))
    path.write_bytes(path.read_bytes()[:1536] + info.tobuf(tarfile.GNU_FORMAT) * 5000)
    assert opened(path).details().endswith("a.tar is damaged after 1 image")


@pytest.mark.parametrize(
    ("begin", "told"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"<!DOCTYPE html><html>Not found", "is not a tar file: it is HTML, perhaps the error page of a download"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 5000, "is not a tar file: it is a PNG image; give its folder"),
        (b"PK\x03\x04" + b"x" * 5000, "is not a tar file: it is a ZIP archive; unpack it"),
        (
            b"BZh9" + b"x" * 5000,
            "is not a tar file: it is compressed with bzip2, which is not supported; unpack it with bunzip2",
        ),
        (b"\xfd7zXZ\0" + b"x" * 5000, "is not a tar file: it is compressed with xz"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 5000, "is not a tar file: it is compressed with zstd"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is not a tar file: it is a Git LFS pointer; fetch the file itself with `git lfs pull`",
        ),
        (b"x" * 5000, "is no tar file, or damaged where it begins"),
        (b"x", "is no tar file"),
        (b"\0" * 10240, "no images; looked for .*; it is empty"),
        (b"\0" * 1024 + b"x" * 5000, "is damaged before the end of its first image"),
        (b"\x1f\x8b", "is cut short: nothing of it can be unpacked"),
        (b"\x1f\x8bxxxxxxxxx", "is damaged: nothing of it can be unpacked"),
        (gzip.compress(b"hello", mtime=0), "is no tar file"),
        (gzip.compress(b"<html>404</html>", mtime=0), "is not a tar file: it is HTML"),
    ],
)
def test_what_is_no_tar_is_refused_by_name(tmp_path: Path, begin: bytes, told: str) -> None:
    good = write_tar(tmp_path / "0.tar", images_of("1.jpg"))
    path = tmp_path / "train-003.tar"
    path.write_bytes(begin)
    with pytest.raises(InputError, match=f"^{path}:? {told}"):
        opened(path)
    if begin[:1] != b"\0" or b"x" in begin:
        assert str(path) in complaint(good, path)
    else:
        assert opened(good, path).details().endswith("1 shard without images")


def test_tars_without_images_are_refused(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", images_of("a.txt", "b.txt")) for n in range(5)]
    assert complaint(tars[0]).startswith(f"{tars[0]}: no images; looked for .avif .bmp")
    assert complaint(tars[0]).endswith("found only .txt 2")
    told = complaint(*tars)
    assert f"{tars[2]}, and 2 others: no images" in told and told.endswith("found only .txt 10")


def test_what_changes_is_told_and_never_read_as_an_image(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"train-{n}.tar", images_of(f"{n}.jpg")) for n in range(6)]
    source = opened(*tars)
    assert source.changed() is None
    tars[1].write_bytes(tars[1].read_bytes()[:600])
    with pytest.raises(UnreadableImage, match=r"train-1.tar has been cut short: it holds 88 of an image's 700 bytes"):
        source.read(1)
    tars[3].unlink()
    with pytest.raises(UnreadableImage, match="no such file"):
        source.read(3)
    assert source.changed() == "train-1.tar has changed, train-3.tar is gone"
    for tar in tars[4:]:
        tar.unlink()
    assert source.changed() == "train-1.tar has changed, train-3.tar is gone, train-4.tar is gone, and 1 other"
    assert source.read(0) == content("0.jpg")


# Gzip


def test_gzipped_tars_hold_the_same(tmp_path: Path) -> None:
    members = [(f"{name}/{number}.jpg", content(f"{number}", 5000)) for name in ("cat", "dog") for number in range(200)]
    plain = write_tar(tmp_path / "a.tar", members)
    packed = write_tar(tmp_path / "b.tar.gz", members, mode="w:gz")
    raw = plain.read_bytes()
    parts = tmp_path / "c.tgz"  # As from programs that compress part by part; and zeros that fill up a tape.
    parts.write_bytes(
        b"".join(gzip.compress(raw[start : start + 99_999]) for start in range(0, len(raw), 99_999)) + b"\0" * 999
    )
    misnamed = tmp_path / "d.tar"
    misnamed.write_bytes(packed.read_bytes())
    want = list(reference(plain).values())
    for path in (packed, parts, misnamed):
        for _ in range(2):
            file = Counted(path)
            source = opened(file)
            assert list(held(source).values()) == want
            assert set((labels(source) or {}).values()) == {"cat", "dog"}
            assert source.stamp(0).startswith(file.stamp + ":")
        assert file.reads == [], "unpacked once"


def test_a_spoiled_copy_of_what_a_gzip_holds_is_made_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tgz", images_of("1.jpg", "2.jpg"), mode="w:gz")
    want = held(opened(path))
    (copy,) = (tmp_path / "cache/unpacked").iterdir()
    whole = copy.read_bytes()
    for spoiled in (
        b"",
        b"x",
        whole[:-1],
        whole[:5000],
        whole[:1000] + b"x" + whole[1001:],
        b"\xff" * 9000,
        whole + b"\0\0\0\2{}",
    ):
        copy.write_bytes(spoiled)
        assert held(opened(path)) == want
        assert copy.read_bytes() == whole
    os.utime(path, ns=(1, 1))
    left = copy.with_name(copy.name + ".1-1.part")
    left.write_bytes(b"what a kill left an hour ago")
    os.utime(left, (1, 1))
    assert held(opened(path)) == want
    (other,) = (tmp_path / "cache/unpacked").iterdir()
    assert other != copy, "what was unpacked of the file as it was is gone"


def test_of_a_gzip_that_is_cut_short_or_damaged_the_images_before_are_kept(tmp_path: Path) -> None:
    members = [(f"{number}.jpg", content(f"{number}", 3000)) for number in range(100)]
    path = write_tar(tmp_path / "a.tar.gz", members, mode="w:gz")
    whole = path.read_bytes()
    seen = set()
    for cut in (300, 4000, 100_000, len(whole) // 2, len(whole) - 100, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:cut])
        if cut == 300:
            assert "cut short" in complaint(path)
            continue
        source = opened(path)
        seen.add(len(source))
        assert list(held(source).values()) == [data for _, data in members[: len(source)]]
        assert len(source) >= 100 * cut / len(whole) - 2
        assert ("is cut short" in source.details()) == (len(source) < 100)
    assert len(seen) > 3
    path.write_bytes(whole[:200_000] + bytes(64) + whole[200_064:])
    source = opened(path)
    assert held(source)
    assert "a.tar.gz is " in source.details()
    path.write_bytes(whole[:-8] + b"xxxx" + whole[-4:])
    assert opened(path).details().endswith("a.tar.gz is damaged, so some of its images may be spoiled")


def test_a_copy_that_is_damaged_or_gone_is_made_again_once(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tgz", images_of("1.jpg", "2.jpg"), mode="w:gz")
    source = opened(path)
    (copy,) = (tmp_path / "cache/unpacked").iterdir()
    whole = copy.read_bytes()
    copy.write_bytes(whole[:1000] + b"x" + whole[1001:])
    assert source.read(1) == content("2.jpg"), "what is whole is read from a damaged copy"
    assert copy.read_bytes() != whole
    assert source.read(0) == content("1.jpg")
    assert copy.read_bytes() == whole
    copy.unlink()
    with pytest.raises(UnreadableImage, match=f"what was unpacked of {path} into {copy} is damaged; delete that file"):
        source.read(0)
    source = opened(path)
    copy.unlink()
    assert source.read(0) == content("1.jpg")
    copy.unlink()
    source, _ = opened(path), os.utime(path, ns=(1, 1))
    copy.unlink()
    with pytest.raises(UnreadableImage, match="is damaged"):
        source.read(0)
    assert not copy.exists(), "another file is not unpacked in the place of the one that was opened"


def read_all(source: ImageSource) -> list[bytes]:
    return [bytes(source.read(index)) for index in range(len(source))]


@pytest.mark.parametrize(
    ("is_kept", "method"),
    [(True, "fork"), (False, "fork"), (True, "spawn"), pytest.param(False, "spawn", marks=pytest.mark.slow)],
)
def test_other_processes_read_the_same(tmp_path: Path, method: str, is_kept: bool) -> None:
    """Also from a temporary file, which ends with the source in the process that opened it, and in no other."""
    if not is_kept:
        (tmp_path / "cache").write_text("a file, where the folder should be")
    plain = write_tar(tmp_path / "a.tar", images_of("1.jpg", "2.jpg"))
    packed = write_tar(tmp_path / "b.tar.gz", images_of("3.jpg", "4.jpg"), mode="w:gz")
    source = opened(plain, packed)
    want = read_all(source)
    assert read_all(pickle.loads(pickle.dumps(source))) == want
    for _ in range(2):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(read_all, [source] * 4, chunksize=1) == [want] * 4
            pool.close()
            pool.join()
    assert read_all(source) == want
    temporary = Path(source._files[1]._copy.path)  # type: ignore[attr-defined]
    del source, pool
    gc.collect()
    assert temporary.exists() == temporary.parent.exists() == is_kept


UNPACK = """
import sys, threading
from pathlib import Path
from deepcluster.data.sources.shards import open_shards
from deepcluster.data.storage import LocalFile
class Counted(LocalFile):
    reads = 0
    def read(self, start, length):
        self.reads += start > 0
        return super().read(start, length)
file = Counted(Path(sys.argv[1]))
print("ready", flush=True)
input()
open_shards([file], cache=Path(sys.argv[2]))
print(file.reads)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks between processes")
def test_of_several_processes_one_unpacks(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tgz", [(f"{n}.jpg", content(str(n), 5_000_000)) for n in range(8)], mode="w:gz")
    command = [sys.executable, "-c", UNPACK, str(path), str(tmp_path / "cache")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert all(process.stdout and process.stdout.readline() == "ready\n" for process in started)
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    reads = [process.communicate(timeout=120)[0] for process in started]
    assert sorted(int(number) > 0 for number in reads) == [False, False, True]
    assert len(list((tmp_path / "cache").rglob("*"))) == 4, "one index and one copy in their folders"


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from deepcluster.data.sources.shards import open_shards
from deepcluster.data.storage import LocalFile
from deepcluster.core.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
cache = Path(sys.argv[1])
try:
    open_shards([LocalFile(Path(sys.argv[2]))], cache=cache)
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on the size of files here")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """No file may grow over 100 kB: as on a full disk, writing what was unpacked fails half-way."""
    path = write_tar(tmp_path / "a.tar.gz", [("1.jpg", content("1", 60_000_000))], mode="w:gz")
    cache = tmp_path / "cache"
    result = subprocess.run([sys.executable, "-c", FULL_DISK, cache, path], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"{path} must be unpacked, and there is no room for about 0.1 GB: {cache}/unpacked: ")
    assert result.stdout.endswith("or name a folder that has it in the environment variable DEEPCLUSTER_CACHE\n")
    assert [file for file in cache.rglob("*") if file.is_file()] == [], "nothing half written is left"


def test_unpacking_can_be_stopped(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", [("1.jpg", b"1" * 20_000_000)], mode="w:gz")

    def stop(found: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(path, on_found=stop)
    assert [file for file in (tmp_path / "cache").rglob("*") if file.is_file()] == []


# Remote files


class Remote(StoredFile):
    """What lies elsewhere: each read is a request, and is counted."""

    def __init__(self, path: Path) -> None:
        self._file = LocalFile(path)
        self.name, self.size, self.stamp = self._file.name, self._file.size, self._file.stamp
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, length: int) -> bytes:
        assert 0 <= start < self.size and length > 0, "a server refuses such a range"
        self.reads.append((start, length))
        return self._file.read(start, length)

    def where(self) -> str:
        return self._file.where()

    def now(self) -> str:
        return self._file.now()


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 MB of images of 20 kB, and one larger than what is read at once."""
    sizes = [20_000] * 400 + [5_000_000] + [20_000] * 300 + [1, 0]
    members = [(f"{number:04}.jpg", content(str(number), size)) for number, size in enumerate(sizes)]
    return write_tar(tmp_path_factory.mktemp("far") / "far.tar", members)


def test_remote_shards_take_few_requests(far: Path, tmp_path: Path) -> None:
    file = Remote(far)
    source = open_shards([file], cache=tmp_path)
    assert len(file.reads) <= 4
    file.reads.clear()
    assert held(source) == reference(far)
    assert len(file.reads) == len(source) - 1, "one an image, none for the empty one"


def test_a_lost_connection_is_not_taken_for_a_damaged_tar(far: Path, tmp_path: Path) -> None:
    class Lost(Remote):
        lost_from = 0

        def read(self, start: int, length: int) -> bytes:
            if start >= self.lost_from:
                raise ConnectionLost("the server is gone")
            return super().read(start, length)

    file = Lost(far)
    for place in (0, 1_000_000, 16_000_000):
        file.lost_from = place
        with pytest.raises(ConnectionLost):
            open_shards([file], cache=tmp_path)
    file.lost_from = file.size
    source = open_shards([file], cache=tmp_path)
    assert held(source) == reference(far)
    file.lost_from = 0
    with pytest.raises(ConnectionLost):
        source.read(5)


def test_shards_on_a_server_are_loaded_once(far: Path, tmp_path: Path) -> None:
    packed = write_tar(tmp_path / "b.tgz", images_of("1.jpg", "2.jpg"), mode="w:gz")
    with NaughtyServer({"far.tar": far.read_bytes(), "b.tgz": packed.read_bytes()}) as server:
        for again in (False, True):
            server.forget()
            blocks = BlockStore(tmp_path / "blocks")
            files = [RemoteFile(server.at(name), blocks=blocks) for name in ("far.tar", "b.tgz")]
            opening = server.requests.total()
            source = open_shards(files, cache=tmp_path / "cache")
            with ThreadPoolExecutor(8) as pool:
                contents = list(pool.map(source.read, range(len(source))))
            assert contents == list((reference(far) | reference(packed)).values())
            assert source.name(0) == "far.tar::0000.jpg"
            assert (server.requests.total() == opening) == again
            assert source.changed() is None
        del server.files["far.tar"]
        assert source.changed() == "far.tar is gone"


def test_remote_shards_of_all_kinds_at_once(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", images_of(f"{n}/a.jpg", f"{n}/b.jpg")) for n in range(20)]
    tars.append(write_tar(tmp_path / "z.tgz", images_of("z/a.jpg"), mode="w:gz"))
    told: list[int] = []
    source = opened(*map(Remote, tars), on_found=told.append)
    assert list(held(source)) == [name for tar in tars for name in reference(tar)], "in the order given"
    assert told[-1] == 41 and told == sorted(told)

    def stop(found: int) -> None:
        raise Interrupted("stopped")

    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(Interrupted):
        opened(*map(Remote, tars), on_found=stop)
    tars[7].write_bytes(b"<html>")
    assert str(tars[7]) in complaint(*map(Remote, tars))


# Real data


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="no ../shared/data/cifar10")
def test_cifar10(tmp_path: Path) -> None:
    path = Path(shutil.copy2(CIFAR10 / "cifar10-test.tar.gz", tmp_path))
    source = opened(path)
    assert isinstance(source, ShardSource)
    assert held(source) == reference(path)
    assert source.describe() == (
        "5,000 images in 1 tar shard (.jpg 5,000), labels from 10 class folders (used for diagnostics only)"
    )
    assert source.labels_N is not None
    assert [(source.labels_N == label).sum() for label in range(10)] == [500] * 10
    assert decode(source.read(1234)).shape == (32, 32, 3)
