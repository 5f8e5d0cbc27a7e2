"""Archives that were made to do harm, or that are damaged: nothing is written outside the folder, and the fault is named."""

import gzip
import io
import random
import shutil
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepcluster.core.errors import InputError
from deepcluster.interop.download.unpack import Limits, UnsafeArchive, into, unpack_archive, without_top

LIMITS = Limits(bytes=1 << 20, files=100)
FILES = {"top/a.txt": b"a" * 1000, "top/inner/b.txt": b"", "top/c d/ü.txt": b"c" * 70_000}


def tar_of(
    path: Path, files: dict[str, bytes], *more: tarfile.TarInfo, mode: str = "w", kind: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, mode, format=kind) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o6777
            tar.addfile(info, io.BytesIO(content))
        for info in more:
            tar.addfile(info)
    return path


def zip_of(path: Path, files: dict[str, bytes], **modes: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = modes.get(name, 0) << 16
            zipped.writestr(info, content, zipfile.ZIP_DEFLATED)
    return path


def tgz_of(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    return tar_of(path, files, *more, mode="w:gz")


def found(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MAKERS: dict[str, Callable[..., Path]] = {"tar": tar_of, "tgz": tgz_of, "zip": zip_of}


@pytest.fixture(params=list(MAKERS))
def make(request: pytest.FixtureRequest) -> Callable[..., Path]:
    return MAKERS[request.param]


def test_files_are_unpacked_with_plain_permissions(make: Callable[..., Path], tmp_path: Path) -> None:
    archive, out = make(tmp_path / "archive", FILES), tmp_path / "out"
    assert unpack_archive(archive, out, LIMITS) == 3
    assert found(out) == FILES
    assert not any(path.stat().st_mode & (stat.S_ISUID | stat.S_IXUSR) for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_kinds_of_tar_with_long_names(kind: int, tmp_path: Path) -> None:
    files = {f"{'d' * 90}/{'e' * 90}": b"long", "last": b"x"}
    unpack_archive(tar_of(tmp_path / "archive", files, kind=kind), tmp_path / "out", LIMITS)
    assert found(tmp_path / "out") == files


def test_places(make: Callable[..., Path], tmp_path: Path) -> None:
    archive = make(tmp_path / "archive", {**FILES, "top/__MACOSX/x": b"x", "top/._a.txt": b"x", "top/.DS_Store": b"x"})
    unpack_archive(archive, tmp_path / "inner", LIMITS, place=without_top)
    assert found(tmp_path / "inner") == {name.removeprefix("top/"): content for name, content in FILES.items()}
    unpack_archive(archive, tmp_path / "flat", LIMITS, place=into("jpg", "a.txt", "b.txt"))
    assert found(tmp_path / "flat").keys() == {"jpg/a.txt", "jpg/b.txt"}


def test_a_second_archive_may_repeat_files_but_not_change_them(make: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    unpack_archive(make(tmp_path / "1", FILES), out, LIMITS)
    unpack_archive(make(tmp_path / "2", {**FILES, "more": b"more"}), out, LIMITS)
    assert found(out) == {**FILES, "more": b"more"}
    for changed in (b"b" * 1000, b"a" * 999, b"a" * 1001, b""):
        with pytest.raises(UnsafeArchive, match=r"two different files top/a\.txt"):
            unpack_archive(make(tmp_path / "3", {"top/a.txt": changed}), out, LIMITS)
    assert found(out) == {**FILES, "more": b"more"}


@pytest.mark.parametrize(
    "name, words",
    [
        ("../evil", "leads out of its folder"),
        ("a/../../evil", "leads out of its folder"),
        ("/evil", "leads out of its folder"),
        ("//evil", "leads out of its folder"),
        ("C:/evil", "leads out of its folder"),
        ("c:evil", "leads out of its folder"),
        ("..\\evil", "leads out of its folder"),
        ("a\nb", "control characters"),
        ("a\x1b[2Jb", "control characters"),
        ("n" * 256, "too long"),
        ("ü" * 200, "too long"),
        ("/".join("x" * 40), "too long"),
        ("/".join(["x" * 200] * 6), "too long"),
    ],
)
def test_names_that_lead_elsewhere(make: Callable[..., Path], name: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er" / "out"
    with pytest.raises(UnsafeArchive, match=words):
        unpack_archive(make(tmp_path / "archive", {name: b"evil"}), folder, LIMITS)
    assert found(tmp_path).keys() == {"archive"}


def test_an_inner_dot_is_no_harm(make: Callable[..., Path], tmp_path: Path) -> None:
    unpack_archive(make(tmp_path / "archive", {"./a": b"1", "b/./c": b"2", "d//e": b"3"}), tmp_path / "out", LIMITS)
    assert found(tmp_path / "out") == {"a": b"1", "b/c": b"2", "d/e": b"3"}


@pytest.mark.parametrize(
    "kind, words",
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (b"Z", "no regular file"),
    ],
)
@pytest.mark.parametrize("maker", [tar_of, tgz_of])
def test_links_and_devices_in_tars(maker: Callable[..., Path], kind: bytes, words: str, tmp_path: Path) -> None:
    info = tarfile.TarInfo("link")
    info.type, info.linkname = kind, "/etc/passwd"
    archive = maker(tmp_path / "archive", {}, info)
    with pytest.raises(UnsafeArchive, match=f"link is {words}"):
        unpack_archive(archive, tmp_path / "out", LIMITS)
    assert found(tmp_path).keys() == {"archive"}


@pytest.mark.parametrize(
    "mode, words",
    [(stat.S_IFLNK, "a symbolic link"), (stat.S_IFCHR, "a device"), (stat.S_IFIFO, "a pipe"), (stat.S_IFSOCK, "no regular")],
)
def test_links_and_devices_in_zips(mode: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeArchive, match=f"link is {words}"):
        unpack_archive(zip_of(tmp_path / "archive", {"link": b"/etc/passwd"}, link=mode | 0o777), tmp_path / "out", LIMITS)
    assert found(tmp_path).keys() == {"archive"}


def test_a_file_through_a_link_of_the_same_archive(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    archive = tmp_path / "archive"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(link)
        info = tarfile.TarInfo("a/evil")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(UnsafeArchive):
        unpack_archive(archive, tmp_path / "out", LIMITS)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_bombs(make: Callable[..., Path], tmp_path: Path) -> None:
    zeros = bytes(30 << 20)
    bomb = make(tmp_path / "bomb", {"zeros": zeros})
    with pytest.raises(UnsafeArchive, match="more than the 1 MB that are expected"):
        unpack_archive(bomb, tmp_path / "1", LIMITS)
    if bomb.stat().st_size < 1 << 20:
        with pytest.raises(UnsafeArchive, match="more than the"):  # By the ratio.
            unpack_archive(bomb, tmp_path / "2", Limits(bytes=1 << 40, files=10))
    many = make(tmp_path / "many", {str(number): b"" for number in range(101)})
    with pytest.raises(UnsafeArchive, match="more than the 100 files that are expected"):
        unpack_archive(many, tmp_path / "3", LIMITS)
    assert sum(map(len, [*found(tmp_path / "1").values()] if (tmp_path / "1").exists() else [])) <= 1 << 20


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """Return the block of a tar's entry whose size is written as it is given."""
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    block += b" " * 8 + kind + b"\0" * 100 + b"ustar\x0000"
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def test_headers_that_lie_about_sizes(tmp_path: Path) -> None:
    huge = b"\x80" + (10**15).to_bytes(11, "big")
    negative = b"\xff" * 9 + (2**24 - 1024).to_bytes(3, "big")
    cases = {
        "huge": (header(b"a", huge), "more than the"),
        "negative": (header(b"a", negative), "more than the|leads back|damaged|claims"),
        "pax": (header(b"x", b"77777777777\0", b"x"), "claims"),
        "longname": (header(b"x", b"77777777777\0", b"L"), "claims"),
        "sparse": (header(b"x", b"00000000000\0", b"S"), "sparse|damaged"),
    }
    for name, (block, words) in cases.items():
        for packed in (False, True):
            archive = tmp_path / f"{name}{packed}"
            content = block + bytes(1 << 16)
            archive.write_bytes(gzip.compress(content) if packed else content)
            with pytest.raises(InputError, match=words):
                unpack_archive(archive, tmp_path / "out", LIMITS)
    assert not (tmp_path / "out").exists() or not any(found(tmp_path / "out").values())


def test_a_zip_that_lies_about_its_sizes(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "archive", {"zeros": bytes(20 << 20)})
    content = archive.read_bytes().replace(struct.pack("<I", 20 << 20), struct.pack("<I", 100))
    archive.write_bytes(content)
    with pytest.raises(InputError):
        unpack_archive(archive, tmp_path / "out", LIMITS)
    assert len(found(tmp_path / "out").get("zeros", b"")) <= 100


def test_an_encrypted_zip(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "archive", {"a": b"secret"})
    content = bytearray(archive.read_bytes())
    for place in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
        content[place] |= 1
    archive.write_bytes(content)
    with pytest.raises(UnsafeArchive, match="a is encrypted"):
        unpack_archive(archive, tmp_path / "out", LIMITS)


@pytest.mark.parametrize("names", [("A/x", "a/y"), ("x.JPG", "x.jpg"), ("ü", "u\u0308")])
def test_names_that_are_the_same_on_many_disks(make: Callable[..., Path], names: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UnsafeArchive, match="are the same file on many disks"):
        unpack_archive(make(tmp_path / "archive", dict.fromkeys(names, b"x")), tmp_path / "out", LIMITS)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice(make: Callable[..., Path], tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    if make is zip_of:
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr("a", b"1")
            zipped.writestr("a", b"2")
    else:
        with tarfile.open(archive, "w:gz" if make is tgz_of else "w") as tar:
            for content in (b"1", b"2"):
                info = tarfile.TarInfo("a")
                info.size = 1
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UnsafeArchive, match="two different files a"):
        unpack_archive(archive, tmp_path / "out", LIMITS)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_file_that_is_also_a_folder(make: Callable[..., Path], names: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UnsafeArchive, match=r"folder"):
        unpack_archive(make(tmp_path / "archive", dict.fromkeys(names, b"x")), tmp_path / "out", LIMITS)


def test_damaged_archives(make: Callable[..., Path], tmp_path: Path) -> None:
    whole = make(
        tmp_path / "whole", {str(number): random.Random(number).randbytes(5000) for number in range(20)}
    ).read_bytes()
    for length in (len(whole) // 2, len(whole) * 9 // 10 // 512 * 512, 1000):
        part = tmp_path / "part"
        part.write_bytes(whole[:length])
        with pytest.raises(InputError, match="damaged or cut short"):
            unpack_archive(part, tmp_path / f"out{length}", LIMITS)


@pytest.mark.parametrize("content, words", [(b"<html>no</html>", "HTML"), (b"", "empty"), (b"hello\n" * 200, "text")])
def test_what_is_no_archive(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(InputError, match=f"is no archive: it is {words}"):
        unpack_archive(tmp_path / "archive", tmp_path / "out", LIMITS)


def test_unpacked_as_the_standard_library_does(make: Callable[..., Path], tmp_path: Path) -> None:
    """The same files as `shutil.unpack_archive` gives."""
    names = {tar_of: "tar", tgz_of: "gztar", zip_of: "zip"}
    archive = make(tmp_path / "archive", FILES)
    options: dict[str, Any] = {} if make is zip_of else {"filter": "data"}
    shutil.unpack_archive(archive, tmp_path / "theirs", names[make], **options)
    unpack_archive(archive, tmp_path / "ours", LIMITS)
    assert found(tmp_path / "ours") == found(tmp_path / "theirs")
