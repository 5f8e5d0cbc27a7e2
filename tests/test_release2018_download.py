"""`download_model`: the six files of the release from a mirror, where `wget` put them in 2018."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_server import NaughtyServer

from deepcluster.core.errors import InputError
from deepcluster.interop.download.catalogue import ENTRIES
from deepcluster.interop.release2018.download_model import main

PLACE = "dl.fbaipublicfiles.com/deepcluster"
NAMES = ("checkpoint.pth.tar", "model.prototxt", "model.caffemodel")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[NaughtyServer]:
    files = {f"{PLACE}/{arch}/{name}": f"{arch} {name}".encode() * 999 for arch in ("alexnet", "vgg16") for name in NAMES}
    with NaughtyServer(files) as running:
        monkeypatch.setenv("DEEPCLUSTER_MIRROR", running.at())
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.delenv("MODELROOT", raising=False)
        yield running


def without_published_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The content here is other than the release's."""
    for name in ("deepcluster-alexnet", "deepcluster-vgg16"):
        for file in ENTRIES[name].files:
            monkeypatch.setitem(file.__dict__, "digest", None)


@pytest.mark.parametrize("root", [None, "elsewhere"])
def test_the_files_are_where_they_were_in_2018(
    server: NaughtyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str | None
) -> None:
    without_published_sums(monkeypatch)
    (tmp_path / "home").mkdir()
    folder = tmp_path / "home" / "deepcluster_models"
    if root is not None:
        folder = tmp_path / root
        monkeypatch.setenv("MODELROOT", str(folder))
    main(["--accept-licence"])
    for address, content in server.files.items():
        assert (folder / address.removeprefix(f"{PLACE}/")).read_bytes() == content
    server.forget()
    main(["--accept-licence"])
    assert not server.requests


def test_a_lost_connection_is_continued_as_by_wget(
    server: NaughtyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_published_sums(monkeypatch)
    monkeypatch.setenv("MODELROOT", str(tmp_path))
    server.drop_after = 9_000
    main(["--accept-licence"])
    assert (tmp_path / "vgg16" / "model.caffemodel").read_bytes() == server.files[f"{PLACE}/vgg16/model.caffemodel"]
    assert server.requests[f"{PLACE}/vgg16/model.caffemodel"] == 3


def test_another_file_than_the_published_one_is_not_kept(
    server: NaughtyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELROOT", str(tmp_path / "models"))
    with pytest.raises(InputError, match="3db70837"):
        main(["--accept-licence"])
    assert not (tmp_path / "models" / "alexnet" / "checkpoint.pth.tar").exists()


def test_the_licence_comes_first(
    server: NaughtyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=re.escape("CC BY-NC 4.0: if you accept it, repeat with --accept-licence")):
        main([])
    assert "CC BY-NC 4.0" in capsys.readouterr().out and not server.requests
    assert not (tmp_path / "home").exists()
