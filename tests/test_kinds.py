"""What lies in the place of a file is named, whatever the name and the kind of file that was wanted."""

import gzip
import io
import json
import os
import pickle
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.files import load_tensors
from deepcluster.core.kinds import kind_of, stand_in
from deepcluster.data.decode import decode
from deepcluster.data.sources import open_source
from deepcluster.interop.loading import load
from deepcluster.interop.weight_files import read_weights

STAND_INS = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 146946961\n",
    "git-annex pointer": b"/annex/objects/SHA256E-s31390--f50d7ac4c6b9.tar\n",
    "git-annex link": b"../.git/annex/objects/pX/ZJ/SHA256E-s31390--f50d7a/SHA256E-s31390--f50d7a\n",
    "DVC pointer": b"outs:\n- md5: a304afb96060aad90176268345e10355\n  size: 37891850\n  path: data.tar\n",
    "HTML": b"<!DOCTYPE html><html><head><title>404</title></head></html>\n",
    "XHTML": b'<?xml version="1.0"?>\n<!-- a --><!-- b -->\n<!DOCTYPE html PUBLIC "x"><html></html>',
    "HTML after a mark": b"\xef\xbb\xbf\n<HTML lang=en><body>Not found</body></HTML>",
    "XML of S3": b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
    "JSON error": b'{"error":"Repository not found"}',
    "JSON message": b'{\n  "message": "Not Found", "status": "404"}',
    "HTML, gzip'd": gzip.compress(b"<html><body>" + os.urandom(3000).hex().encode(), mtime=0),
    "AppleDouble": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(100),
    "Windows shortcut": b"L\x00\x00\x00\x01\x14\x02\x00\x00\x00\x00\x00\xc0\x00\x00\x00" + bytes(60),
    "Internet shortcut": b"[InternetShortcut]\r\nURL=https://example.org/train.tar\r\n",
    "zeros": bytes(5000),
}
WORDS = {
    "Git LFS pointer": "git lfs pull", "git-annex pointer": "git annex get", "git-annex link": "git annex get",
    "DVC pointer": "dvc pull", "HTML": "HTML", "XHTML": "HTML", "HTML after a mark": "HTML", "XML of S3": "XML",
    "JSON error": "JSON", "JSON message": "JSON", "HTML, gzip'd": "HTML", "AppleDouble": "AppleDouble",
    "Windows shortcut": "Windows shortcut", "Internet shortcut": "shortcut", "zeros": "zero bytes",
}  # fmt: skip


def opened(path: Path) -> object:
    return open_source(path, cache=path.parent / "cache")


def first_image(path: Path) -> object:
    return decode(path.read_bytes())


READERS: dict[str, Callable[[Path], object]] = {
    **dict.fromkeys(("part-000.tar", "part-000.tar.gz", "rows.parquet", "digits.npz", "digits.npy"), opened),
    **dict.fromkeys(("images.csv", "images.tsv", "list.txt"), opened),
    **dict.fromkeys(("model.safetensors", "pytorch_model.bin", "weights.pth", "old.pth.tar"), read_weights),
    **dict.fromkeys(("last.pt", "model.ckpt"), load),
    **dict.fromkeys(("a.jpg", "b.png", "c.tif", "d.heic"), first_image),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", STAND_INS)
def test_what_lies_in_the_place_of_a_file_is_named(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "zeros" and name.endswith((".tar", ".tar.gz")) and "pth" not in name:
        return  # 10 kB of zeros are an empty tar.
    (tmp_path / name).write_bytes(STAND_INS[kind])
    with pytest.raises((InputError, UnreadableImage)) as caught:
        READERS[name](tmp_path / name)
    message = str(caught.value)
    assert WORDS[kind] in message, message
    assert name in message or READERS[name] is first_image
    assert "\n" not in message and len(message) < len(str(tmp_path)) + 250


def test_an_arrow_file_of_a_saved_data_set_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    (tmp_path / "data-0.arrow").write_bytes(STAND_INS["Git LFS pointer"])
    with pytest.raises(InputError, match=r"data-0\.arrow is not an Arrow file: it is a Git LFS pointer; .*git lfs pull"):
        open_source(tmp_path)


def test_a_pointer_in_a_tar_and_in_a_table_is_an_unreadable_image(tmp_path: Path) -> None:
    pointer = STAND_INS["Git LFS pointer"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("0.jpg")
        member.size = len(pointer)
        tar.addfile(member, io.BytesIO(pointer))
    pq.write_table(pa.table({"image": [pointer]}), tmp_path / "a.parquet")
    for name in ("a.tar", "a.parquet"):
        content = open_source(tmp_path / name, cache=tmp_path / "cache").read(0)
        with pytest.raises(UnreadableImage, match=r"^a Git LFS pointer; fetch the file itself with `git lfs pull`$"):
            decode(content)


def sound_files() -> Iterator[tuple[str, bytes]]:
    """Files that are what they say, as their own programs write them."""
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF"):
        buffer = io.BytesIO()
        Image.new("RGB", (9, 9)).save(buffer, kind)
        yield kind, buffer.getvalue()
    for kind, write in {
        "NumPy": lambda file: np.save(file, np.arange(9)),
        "ZIP": lambda file: zipfile.ZipFile(file, "w").writestr("a", "b"),
        "tar": lambda file: tarfile.open(fileobj=file, mode="w").addfile(tarfile.TarInfo("a")),  # noqa: SIM115
        "Parquet": lambda file: pq.write_table(pa.table({"a": [1]}), file),
        "pickle": lambda file: pickle.dump([1], file),
        "bzip2": lambda file: tarfile.open(fileobj=file, mode="w:bz2").close(),
        "xz": lambda file: tarfile.open(fileobj=file, mode="w:xz").close(),
    }.items():
        buffer = io.BytesIO()
        write(buffer)
        yield kind, buffer.getvalue()
    yield "gzip", gzip.compress(b"some words", mtime=0)
    yield "text", b"path,label\na.jpg,html\n"
    yield "text", b"# version https://git-lfs.github.com/spec/v1\nerrors/a.jpg\n"
    yield "text", b'{"label": 3, "error": 0.1}'
    yield "text", "Stra\u00dfe\n".encode()
    yield "empty", b""
    yield "unknown", bytes(range(200, 256))
    yield "SVG", b"<?xml version='1.0'?><!-- Error --><svg xmlns='x'/>"


@pytest.mark.parametrize(("kind", "content"), list(sound_files()))
def test_a_file_that_is_what_it_says_stands_in_for_nothing(kind: str, content: bytes) -> None:
    assert stand_in(content) is None
    assert kind in kind_of(content) or kind in ("WEBP",)


def test_no_text_takes_long_to_look_at() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("a pattern takes exponential time"))
    signal.alarm(20)
    for text in (b"<!-- a -->" * 10_000, b"<?xml " * 10_000, b"<!--" * 10_000, b" " * 10**6):
        assert kind_of(text) == "text"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("read", [load_tensors, load, read_weights])
@pytest.mark.parametrize("name", ["last.pt", "model.safetensors"])
def test_weights_in_a_pipe_or_a_device_are_refused_without_waiting(
    read: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    def too_late(*_: object) -> None:
        raise TimeoutError("waits for a pipe")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(20)
    os.mkfifo(tmp_path / name)
    (tmp_path / f"link-{name}").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / name, "pipe"), (tmp_path / f"link-{name}", "device")):
        with pytest.raises(InputError, match=f"{path} is a {kind}, not a regular file; .* write what it gives into a file"):
            read(path)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_sound_file_of_weights_is_read(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth")["a"].tolist() == [1, 1]
