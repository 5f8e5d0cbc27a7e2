"""Files are complete at every moment: written beside their place, then renamed."""

import os
import threading
from pathlib import Path

import pytest

from deepcluster.core.files import write_cached, write_whole, written_beside


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_the_old_or_the_new_one_and_an_error_leaves_nothing_beside_it(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.txt"
    for text in ("old", "new"):
        with written_beside(path, durable=durable) as beside:
            beside.write_text(text)
            assert path.exists() == (text == "new")
        assert path.read_text() == text
    with pytest.raises(KeyboardInterrupt), written_beside(path, durable=durable) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "new"


def test_each_thread_writes_its_own_file_of_the_cache_and_a_run_replaces_what_a_kill_left(tmp_path: Path) -> None:
    with written_beside(tmp_path / "a") as beside:
        beside.touch()
        assert beside.name == f"a.{os.getpid()}-{threading.get_ident()}.part"
    (tmp_path / "b.part").write_text("half of what a kill left")
    write_whole(tmp_path / "b", "ü\n")
    assert (tmp_path / "b").read_bytes() == b"\xc3\xbc\n"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "b"]


def test_the_cache_is_written_where_it_can_be(tmp_path: Path) -> None:
    assert write_cached(tmp_path / "deep" / "a", b"content")
    assert (tmp_path / "deep" / "a").read_bytes() == b"content"
    assert not write_cached(tmp_path / "deep" / "a" / "b", b"content")
