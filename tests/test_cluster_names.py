"""Names for clusters: what spreadsheets make of `names.csv`, what is refused, and what the commands do with it."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepcluster
from deepcluster.cli import main
from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.info import info
from deepcluster.run.cluster_names import FILE, clean_name, read_names, write_names
from deepcluster.run.table_writers import write_rows

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
        b"cluster;name\n3,0;dogs\n4,00;cats\n5.;birds\n": {3: "dogs", 4: "cats", 5: "birds"},
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
        ('cluster,name\n"1,000",dogs\n', "'1,000' is not the number of a cluster"),
        ("cluster;name\n1.000;dogs\n", "'1.000' is not the number of a cluster"),
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


# The command


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The run, into which names can be written."""
    folder = tmp_path / "run"
    folder.mkdir()
    for entry in trained.iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


def clusters_of(run: Path) -> pd.DataFrame:
    return pd.read_parquet(sorted((run / "assignments").glob("*.parquet"))[-1])


def test_names_are_set_shown_and_removed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = clusters_of(run).cluster.value_counts().reindex(range(5), fill_value=0)

    def shown(*arguments: str) -> list[list[str]]:
        assert main(["names", str(run), *arguments]) == 0
        return [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]

    lines = shown()
    assert lines[0] == ["cluster", "images", "share", "name"] and not (run / FILE).exists()
    assert [[int(line[0]), int(line[1])] for line in lines[1:-1]] == [[k, size] for k, size in enumerate(sizes)]
    lines = shown("--set", "3=dogs, large", "--set", "0= cats ")
    assert lines[1][3] == "cats" and lines[4][3] == "dogs, large" and lines[-1] == ["5", "clusters,", "2", "with a name"]
    shown("--set", "3=")
    assert read_names(run) == {0: "cats"}
    assert main(["names", str(run), "--set", "0=", "--quiet"]) == 0
    assert not capsys.readouterr().out and not (run / FILE).exists()


@pytest.mark.slow
def test_names_that_processes_give_at_once_are_all_kept(run: Path) -> None:
    code = (
        "import sys; import deepcluster\n"
        "print(flush=True); sys.stdin.readline()\n"
        "for turn in range(5): deepcluster.name_clusters(sys.argv[1], {int(sys.argv[2]): f'turn {turn}'})"
    )
    words = [[sys.executable, "-c", code, str(run), str(number)] for number in range(3)]
    all_of_them = [subprocess.Popen(some, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for some in words]
    for process in all_of_them:
        assert process.stdout is not None and process.stdout.readline() == "\n"
    for process in all_of_them:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.close()
    assert [process.wait(100) for process in all_of_them] == [0, 0, 0]
    assert read_names(run) == dict.fromkeys(range(3), "turn 4")
    assert [path.name for path in run.glob(f"{FILE}*")] == [FILE]


def test_the_most_frequent_label_becomes_the_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = clusters_of(run)
    labels = table.assign(label=[f"kind {number % 3}" for number in range(len(table))])[["name", "label"]].iloc[::2]
    joined = labels.merge(table, on="name").groupby("cluster").label.value_counts().reset_index(name="n")
    wanted = {k: min(some.label[some.n == some.n.max()]) for k, some in joined.groupby("cluster")}
    prefixed = labels.assign(name="/elsewhere/photos/" + labels.name)
    strangers = pd.concat([labels, pd.DataFrame({"name": ["no-such.jpg"], "label": ["x"]})])
    for frame in (labels, prefixed, strangers):
        frame.to_csv(tmp_path / "labels.csv", index=False, sep=";")
        assert main(["names", str(run), "--from", str(tmp_path / "labels.csv"), "--set", "4=by hand"]) == 0
        assert read_names(run) == {**wanted, 4: "by hand"}
    said = capsys.readouterr()
    assert "1 row is of no image of this run, and not used, such as no-such.jpg" in said.err
    counts = joined[joined.cluster == 0].n
    assert f"{wanted[0]}  ({counts.max()} of {counts.sum()} labelled image" in said.out


def test_names_that_can_not_be_given_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.csv").write_text("name,label\na.jpg,x\n")
    (tmp_path / "bare.csv").write_text("name\na.jpg\n")
    for arguments, words in (
        (["--set", "5=x"], "has no cluster 5: its clusters are numbered from 0 to 4"),
        (["--set", "dogs"], "write the number of a cluster and its name"),
        (["--set", "x=dogs"], "write the number of a cluster and its name"),
        (["--from", str(tmp_path / "other.csv")], "has no labels of images of this run; its images have names such as"),
        (["--from", str(tmp_path / "bare.csv")], "has no column of labels"),
        (["--from", str(tmp_path / "none.csv")], "does not exist"),
    ):
        assert main(["names", str(run), *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
    assert not (run / FILE).exists()
    assert main(["names", str(tmp_path)]) == 2 and "is not a run folder" in capsys.readouterr().err


def test_a_run_that_is_overwritten_loses_its_names(images: Path, tmp_path: Path) -> None:
    from small_runs import train_small

    run = train_small(images, tmp_path / "run", epochs=1)
    assert deepcluster.name_clusters(run, {1: "dogs"}).names == {1: "dogs"}
    assert deepcluster.assign(run, images, reporter=Reporter(quiet=True)).cluster_names == {1: "dogs"}
    last = run / "checkpoints" / "last.pt"
    assert deepcluster.assign(last, images, reporter=Reporter(quiet=True)).cluster_names == {1: "dogs"}
    train_small(images, run, epochs=2, resume=True)
    assert read_names(run) == {1: "dogs"}
    described = info(str(run)).splitlines()
    assert sum(line.startswith(("command 1 of 2: ", "command 2 of 2: ")) for line in described) == 2
    assert any(re.match(r"started \d{4}-.*; last line of its log \d{4}-", line) for line in described)
    assert f"1 cluster with a name: deepcluster names {run} shows them" in described
    train_small(images, run, epochs=1, overwrite=True)
    assert read_names(run) == {}


def test_names_like_formulas_come_back_out_of_tables(tmp_path: Path) -> None:
    names = ["=HYPERLINK(1)", "+1", "-2", "@x", "a,b", '"']
    write_rows({"name": names}, tmp_path / "t.csv")
    assert pd.read_csv(tmp_path / "t.csv", dtype=str)["name"].tolist() == names
    write_names(tmp_path, dict(enumerate(names)))
    assert read_names(tmp_path) == dict(enumerate(names))
