"""Files are complete at every moment: written beside their place, then renamed."""

import os
import threading
from pathlib import Path

import pytest
import torch

from deepcluster.core.files import (
    load_tensors,
    read_table,
    save_tensors,
    write_cached,
    write_table,
    write_whole,
    written_beside,
)


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


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """As of old disks; Arrow, and torch for files that it maps, take no such names."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    save_tensors(folder / "a.pt", {"rows": torch.ones(3), "from": str(folder)})
    for mapped in (False, True):
        assert load_tensors(folder / "a.pt", mapped=mapped)["from"] == str(folder)
    write_table({"name": ["a"], "cluster": [1]}, folder / os.fsdecode(b"\xe8.parquet"))
    assert read_table(folder / os.fsdecode(b"\xe8.parquet"), ["cluster"]).to_pydict() == {"cluster": [1]}


def test_the_cache_is_written_where_it_can_be(tmp_path: Path) -> None:
    assert write_cached(tmp_path / "deep" / "a", b"content")
    assert (tmp_path / "deep" / "a").read_bytes() == b"content"
    assert not write_cached(tmp_path / "deep" / "a" / "b", b"content")
