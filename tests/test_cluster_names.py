"""Names for clusters: what spreadsheets make of `names.csv`, what is refused, and what the commands do with it."""

import csv
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepcluster.core.errors import InputError
from deepcluster.run.cluster_names import FILE, clean_name, read_names, write_names

NAMES = {0: "dogs, large", 3: 'a "quoted" one', 12: "Kühe; 牛"}


def test_no_file_is_no_names(tmp_path: Path) -> None:
    assert read_names(tmp_path) == {}
    assert write_names(tmp_path, {}) == tmp_path / FILE
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_what_spreadsheets_write(tmp_path: Path, encoding: str, separator: str) -> None:
    table = pd.DataFrame({"Name": list(NAMES.values()), "Cluster": list(NAMES), "remark": ""})
    for frame in (table, table[["Cluster", "Name"]], table.astype({"Cluster": float})):
        frame.to_csv(tmp_path / FILE, index=False, sep=separator, encoding=encoding)
        assert read_names(tmp_path) == NAMES


def test_files_typed_by_hand(tmp_path: Path) -> None:
    for content, names in {
        b"3,dogs\n7,cats\n": {3: "dogs", 7: "cats"},
        b"cluster,name\r\n3, dogs \r\n4,\r\n\r\n": {3: "dogs"},
        b"sep=;\r\ncluster;name\r\n3;K\xfche\r\n": {3: "Kühe"},  # Windows-1252
        b"cluster,name\n": {},
        b"\xef\xbb\xbf\r\n": {},
        b"": {},
    }.items():
        (tmp_path / FILE).write_bytes(content)
        assert read_names(tmp_path) == names, content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cluster,name\nthree,dogs\n", "'three' is not the number of a cluster"),
        ("cluster,name\n-1,dogs\n", "'-1' is not the number of a cluster"),
        ("cluster,name\n3,dogs\n3,cats\n", "names cluster 3 twice, 'dogs' and 'cats'"),
        ("number,word,more\n3,dogs,x\n", "has no columns cluster and name: its first line is number, word, more"),
    ],
)
def test_what_can_not_be_understood_is_one_sentence(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(InputError) as fault:
        read_names(tmp_path)
    assert words in str(fault.value) and "\n" not in str(fault.value)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(InputError):
        read_names(tmp_path)


@given(st.dictionaries(st.integers(0, 10**6), st.text(max_size=30), max_size=8))
def test_names_come_back(tmp_path_factory: pytest.TempPathFactory, names: dict[int, str]) -> None:
    folder = tmp_path_factory.getbasetemp() / "names"
    folder.mkdir(exist_ok=True)
    path = write_names(folder, names)
    kept = {number: clean_name(name) for number, name in names.items() if clean_name(name)}
    assert read_names(folder) == kept
    assert path.exists() == bool(kept)
    if kept:
        with path.open(encoding="utf-8-sig", newline="") as file:
            assert {int(row["cluster"]): row["name"] for row in csv.DictReader(file)} == kept
