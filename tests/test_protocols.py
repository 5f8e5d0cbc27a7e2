"""`deepcluster evaluate` as a person uses it: one protocol, all of them, runs side by side, and wrong input."""

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from models_helper import write_classes
from small_runs import train_small
from street_images import write_streets

import deepcluster
from deepcluster.cli import cli, main
from deepcluster.cli.evaluate import _protocol_command, evaluate_group
from deepcluster.core.errors import InputError
from deepcluster.evaluation import protocols
from deepcluster.evaluation.layouts import find_data
from deepcluster.evaluation.options import PROTOCOLS, Protocol
from deepcluster.evaluation.protocols import compare

KNN = ["--k", "1,3"]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "colours"
    write_classes(folder / "train", 10)
    write_classes(folder / "val", 4, seed=1)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_protocol_prints_a_table_and_writes_its_file(run: Path, classes: Path) -> None:
    result = evaluate("knn", run, "--data", classes, *KNN)
    assert result.exit_code == 0
    assert f"knn of {run}: " in result.output
    assert "top-1" in result.output
    assert "ublished" not in result.output, "nobody published numbers of these images"
    command = f"deepcluster evaluate knn untrained:{run} --data {classes} --k 1,3 --out baseline"
    assert result.output.endswith(f"A number says little without the untrained network's: {command}\n")
    assert str(run / "evaluation" / "knn.json") in result.output
    found = content(run / "evaluation" / "knn.json")
    assert {"protocol", "model", "data", "settings", "results", "seconds"} <= found.keys()
    assert found["settings"]["k"] == [1, 3]
    assert found["data"]["train_images"] == 30


def test_python_has_the_function_of_the_same_name(run: Path, classes: Path, tmp_path: Path) -> None:
    deepcluster.evaluate("knn", run, classes, k=(1,), out=tmp_path / "here" / "my.json")
    evaluation = deepcluster.evaluate("knn", run, classes, k=(1, 3), out=tmp_path / "here" / "my.json")
    assert evaluation.path == tmp_path / "here" / "my.json"
    assert content(evaluation.path)["results"] == evaluation.results.as_dict()["results"]
    assert not (run / "evaluation").exists()


@pytest.mark.parametrize("form, mark", [("markdown", "| --- |"), ("latex", r"\begin{tabular}")])
def test_tables_for_papers(run: Path, classes: Path, tmp_path: Path, form: str, mark: str) -> None:
    output = evaluate("knn", run, "--data", classes, "--format", form, *KNN).output
    tables = [line for line in output.splitlines() if line.startswith(mark)]
    assert len(tables) == 1
    own = len(list((classes / "train").iterdir()))
    for part, number in product(("train", "val"), range(10)):
        shutil.copytree(classes / part / f"class{number % own}", tmp_path / "cifar_10" / part / f"class{number}")
    network = ["--out", tmp_path / "baseline", "--data", tmp_path / "cifar_10", "--format", form, *KNN]
    output = evaluate("knn", "untrained:resnet18-small", *network).output
    assert sum(line.startswith(mark) for line in output.splitlines()) == 2, "ours, and what others published"
    assert "baseline" not in output.splitlines()[-1].partition(",")[2], "a baseline needs none"


def test_the_baseline_is_not_written_into_the_run(run: Path, classes: Path, tmp_path: Path) -> None:
    result = evaluate("knn", f"untrained:{run}", "--data", classes, *KNN)
    assert "not written (--out" in result.output
    assert not (run / "evaluation").exists()
    evaluate("knn", "untrained:alexnet-small", "--data", classes, "--out", tmp_path / "baseline", *KNN)
    assert content(tmp_path / "baseline" / "knn.json")["model"] == "untrained:alexnet-small"


def test_every_protocol_has_a_command_with_all_its_options() -> None:
    for protocol, known in PROTOCOLS.items():
        owner = known.options
        text = evaluate(protocol, "--help").output
        for name in owner.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in text, protocol
        assert (owner.__doc__ or "").split(" (")[0].split()[0] in evaluate("--help").output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--k", "1,31"], "31"),
        (["--k", "0"], "--k 0 is too small; use 1 or more"),
        (["--k", "1;2"], "numbers separated by commas"),
        (["--stages", "conv9", *KNN], "has no stage 'conv9'"),
        (["--device", "cuda:77", *KNN], "no such device"),
        (["--out", "/dev/null/x", *KNN], "/dev/null is a file or can't be written to"),
    ],
)
def test_wrong_options_end_in_2_and_write_nothing(
    run: Path, classes: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "knn", str(run), "--data", str(classes), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "evaluation").exists()


def test_wrong_data_ends_in_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image")
    for protocol in PROTOCOLS:
        for data, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "texts", "txt")):
            assert main(["evaluate", protocol, str(run), "--data", str(data)]) == 2, protocol
            assert message in capsys.readouterr().err, protocol
    with pytest.raises(InputError, match=r"unknown protocol 'lineal' \(did you mean linear\?\)"):
        deepcluster.evaluate("lineal", run, tmp_path)
    with pytest.raises(InputError, match=r"unknown option 'epoch' \(did you mean epochs\?\)"):
        deepcluster.evaluate("linear", run, tmp_path, epoch=3)


def test_all_runs_what_finds_its_data(run: Path, classes: Path) -> None:
    only = "knn,clusters,linear"
    settings = ["--set", "knn.k=1,3", "--set", "linear.fast=yes", "--only", only]
    result = evaluate("all", run, "--data-root", classes, *settings)
    assert result.exit_code == 0
    assert {path.name for path in (run / "evaluation").iterdir()} == {"knn.json", "clusters.json", "linear.json"}
    *last, hint = result.output.splitlines()[-5:]
    assert hint.endswith(f": deepcluster evaluate all untrained:{run} --data-root {classes} --out baseline")
    assert last[0].split() == ["protocol", "data", "measure", "value"]
    assert [line.split()[:2] for line in last[1:]] == [[name, "colours"] for name in only.split(",")]
    assert content(run / "evaluation" / "linear.json")["settings"]["fast"] is True


def test_all_goes_on_with_what_is_not_there_yet(run: Path, classes: Path) -> None:
    arguments = ["all", run, "--data-root", classes, "--only", "knn,clusters", "--set", "knn.k=1,3"]
    evaluate(*arguments)
    files = [run / "evaluation" / f"{name}.json" for name in ("knn", "clusters")]
    before = [path.stat().st_mtime_ns for path in files]
    files[1].unlink()
    first = evaluate(*arguments).output
    assert files[0].stat().st_mtime_ns == before[0], "judged before, with the same options"
    assert files[1].is_file()
    assert "knn" in first.splitlines()[-3]
    evaluate(*arguments, "--again")
    assert files[0].stat().st_mtime_ns != before[0]
    evaluate(*arguments[:-1], "knn.k=5")
    assert content(files[0])["settings"]["k"] == [5]


def test_all_tells_several_data_sets_apart_and_leaves_out_what_fails(
    run: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    shutil.copytree(classes, root / "colours")
    shutil.copytree(classes, root / "others")
    shutil.rmtree(root / "others" / "val" / "class2")
    result = evaluate("all", run, "--data-root", root, "--only", "knn", "--set", "knn.k=1")
    assert [path.name for path in (run / "evaluation").iterdir()] == ["knn-colours.json"]
    assert "knn is left out: " in result.stderr
    assert "class2 is not in val" in result.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("epochs=3", "write PROTOCOL.OPTION=VALUE, such as linear.epochs=20"),
        ("lineal.epochs=3", r"did you mean linear\?"),
        ("linear.epoch=3", r"unknown option 'epoch' \(did you mean epochs\?\)"),
        ("linear.epochs=many", "epochs=many should be a number"),
        ("linear.fast=perhaps", "fast=perhaps should be yes or no"),
        ("linear.epochs=0", "epochs=0 is too small"),
    ],
)
def test_options_of_all_are_checked_before_it_begins(run: Path, classes: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate("all", run, "--data-root", classes, "--set", text)


def test_all_without_any_data_says_what_was_looked_for(run: Path) -> None:
    with pytest.raises(
        InputError, match=r"no protocol finds its data there .*Looked for: class folders in train/ and val/; "
    ):
        protocols.evaluate_all(run, run)
    with pytest.raises(InputError, match=r"Looked for: class folders in train/ and val/$"):
        protocols.evaluate_all(run, run, only=["knn", "linear"])


def test_that_a_run_can_not_be_written_to_is_said_before_the_work(run: Path, classes: Path) -> None:
    (run / "evaluation").write_text("a file")
    printed = evaluate("knn", run, "--data", classes).stderr
    assert re.search(r"the results in .*evaluation is a file or can't be written to; .*; they will be printed only", printed)


def test_runs_side_by_side(run: Path, classes: Path, tmp_path: Path) -> None:
    evaluate("knn", run, "--data", classes, *KNN)
    evaluate("clusters", run, "--data", classes)
    evaluate("knn", f"untrained:{run}", "--data", classes, "--out", tmp_path / "before", *KNN)
    table, remarks = compare([run, tmp_path / "before"])
    assert list(table.header) == ["", str(run), str(tmp_path / "before")]
    rows = {row[0]: row[1:] for row in table.rows}
    knn = content(run / "evaluation" / "knn.json")["results"]["top-1"]
    name, value = next(iter(knn.items())) if isinstance(knn, dict) else ("", knn)
    assert rows[f"knn top-1 {name}".strip()][0] == f"{value:.1%}"
    assert all(row[1] == "–" for name, row in rows.items() if name.startswith("clusters"))
    assert remarks == []
    everything, _ = compare([run], everything=True)
    assert any("purity" in row[0] for row in everything.rows)
    assert evaluate("compare", run, tmp_path / "before").output.count("\n") == len(table.rows) + 1


def test_results_that_were_not_measured_alike_are_told(run: Path, classes: Path, tmp_path: Path) -> None:
    evaluate("knn", run, "--data", classes, *KNN)
    evaluate("knn", run, "--data", classes, "--k", "1,3", "--temperature", "0.1", "--out", tmp_path / "other")
    _, remarks = compare([run, tmp_path / "other"])
    assert remarks == ["knn: not the same settings (temperature: 0.07 / 0.1)"]


TOY = '''
from dataclasses import dataclass

from deepcluster.core.options import Checked, option
from deepcluster.evaluation.datasets.labelled import open_train_val
from deepcluster.evaluation.results import Results


@dataclass(frozen=True)
class ToyOptions(Checked):
    """Counts images (nobody, 2024)."""

    times: int = option(1, "count each image so many times", at_least=1)


def evaluate(model, data, options):
    count = options.times * len(open_train_val(data).val.source)
    return Results("toy", {}, options.as_dict(), {"clusters": count}, ("clusters",))
'''


def test_a_protocol_is_one_module_and_one_entry(
    run: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python, the command line, `all` and `compare` know a new protocol by its entry only."""
    (tmp_path / "toy_protocol.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    import toy_protocol

    monkeypatch.setitem(PROTOCOLS, "toy", Protocol(toy_protocol.ToyOptions, "toy_protocol", "classes", quick={"times": 3}))
    assert deepcluster.evaluate("toy", run, classes, times=2).results.best() == 24
    assert content(run / "evaluation" / "toy.json")["settings"]["times"] == 2
    monkeypatch.setitem(evaluate_group.commands, "toy", _protocol_command("toy"))
    assert "count each image so many times" in evaluate("toy", "--help").output
    assert "Counts images" in evaluate("--help").output
    assert "clusters" in evaluate("toy", run, "--data", classes, "--times", 5).output
    done = protocols.evaluate_all(run, classes, only=["toy"], quick=True)
    assert [one.results.best() for one in done] == [36]
    assert [row[0] for row in compare([run])[0].rows] == ["toy clusters"]


def test_folders_without_results(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no results of `deepcluster evaluate`"):
        compare([run])
    (tmp_path / "knn.json").write_text('{"protocol": "knn", ')
    with pytest.raises(InputError, match=r"knn.json can't be read"):
        compare([tmp_path])


@pytest.mark.parametrize("way", ["knn", "linear"])
def test_evaluation_on_the_way_changes_nothing_of_a_run(classes: Path, tmp_path: Path, way: str) -> None:
    settings = {"clusters": 3, "sobel": False}
    plain = train_small(classes / "train", tmp_path / "plain", **settings)
    watched = train_small(classes / "train", tmp_path / "watched", eval_every=1, eval_with=way, **settings)
    states = [torch.load(one / "checkpoints" / "last.pt", weights_only=True)["trunk"] for one in (plain, watched)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    lines = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    assert all(0.3 < line[way] <= 1 for line in lines)
    assert all(way not in json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines())
    assert f"{'k-NN' if way == 'knn' else 'linear'} " in (watched / "train.log").read_text()


def test_each_data_set_is_found_once_and_only_as_what_it_is(classes: Path, tmp_path: Path) -> None:
    write_streets(tmp_path / "streets", train=1, val=1)
    devkit = tmp_path / "VOCdevkit" / "VOC2007"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (devkit / part).mkdir(parents=True)
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (tmp_path / "coco" / f"{part}2017").mkdir()
        (tmp_path / "coco" / "annotations" / f"instances_{part}2017.json").write_text("{}")
    (tmp_path / "colours").symlink_to(classes)
    found = {(protocol, folder.name) for protocol, folder, _ in find_data(tmp_path, ())}
    frozen = {(name, "streets") for name in ("segmentation-linear", "segmentation-knn", "segmentation-clusters")}
    labelled = {(name, "colours") for name in ("linear", "knn", "clusters", "semi-supervised")}
    on_voc = {name for name, known in PROTOCOLS.items() if known.layout == "voc"}
    voc = {(name, tmp_path.name) for name in on_voc}
    assert {"voc07-detection", "voc0712-detection"} < on_voc
    assert found == frozen | labelled | voc | {("cityscapes-segmentation", "streets"), ("coco-detection", "coco")}
    assert {folder.name for _, folder, _ in find_data(tmp_path / "streets", ())} == {"streets"}
    files = [name for _, _, name in find_data(tmp_path, ())]
    assert len(files) == len(set(files))
