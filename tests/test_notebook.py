"""Notebooks: examples/quickstart.ipynb runs whole, an interrupt keeps state and kernel, messages speak Python."""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from small_runs import SMALL, assert_same_run, train_small
from test_runs import text_of

from deepcluster.applied.rows import Clusters, Embeddings
from deepcluster.applied.shown import clusters_html
from deepcluster.applied.similar import similar
from deepcluster.core.html import table
from deepcluster.core.wording import in_python
from deepcluster.data.sources import open_source
from deepcluster.evaluation.protocols import Evaluation
from deepcluster.evaluation.results import Results

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
LONG = 600.0


def executed(folder: Path, *smaller: tuple[str, str]) -> Any:
    """Run the notebook in a folder, with some of its numbers replaced; return it with its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for old, new in smaller:
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def shown(notebook: Any, code: str) -> list[Any]:
    """Return the outputs of the cell that has a piece of code."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and code in cell.source)
    return list(cell.outputs)


def check_outputs(notebook: Any, folder: Path) -> None:
    """Each step shows something, as HTML and as text; nothing goes to the streams, where it would be a wall of lines."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type in ("display_data", "execute_result"), output
            assert {"text/html", "text/plain"} <= output.data.keys() or output.data["text/plain"].startswith("{"), output
            assert len(output.data["text/plain"]) < 4_000
    (training,) = shown(notebook, "deepcluster.train(")  # One output, updated in place.
    assert "done: runs/digits" in text_of(training.data["text/html"])
    assert "deepcluster.report(" in training.data["text/plain"] and "--" not in training.data["text/plain"]
    assert shown(notebook, "ten.clusters")[-1].data["text/html"].count("<img ") >= 60
    assert shown(notebook, "deepcluster.similar(")[-1].data["text/html"].count("<img ") == 18
    assert "srcdoc=" in shown(notebook, "run.report()")[-1].data["text/html"]
    assert (folder / "runs" / "digits" / "report.html").is_file()


def test_the_notebook_runs(tmp_path: Path) -> None:
    """On fewer images and epochs; the next test takes it as it is."""
    check_outputs(executed(tmp_path, ("count, digits = 600", "count, digits = 200"), ("epochs=6", "epochs=2")), tmp_path)


@pytest.mark.slow
def test_the_notebook_runs_as_it_is_and_twice(tmp_path: Path) -> None:
    for _ in range(2):
        notebook = executed(tmp_path)
        check_outputs(notebook, tmp_path)


def test_the_notebook_is_stored_without_outputs_and_links_to_files() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    for cell in notebook.cells:
        for target in re.findall(r"\]\(([^)#]+)", cell.source) if cell.cell_type == "markdown" else []:
            assert (NOTEBOOK.parent / target).exists(), target
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=LONG)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def outputs_of(client: BlockingKernelClient, code: str, at: str = "", then: Any = None) -> list[dict[str, Any]]:
    """Run code in the kernel; call `then` once, when an output has the text `at`. Return the contents of all outputs."""
    asked, found, until = client.execute(code), list[dict[str, Any]](), time.monotonic() + LONG
    while time.monotonic() < until:
        message = client.get_iopub_msg(timeout=LONG)
        if message["parent_header"].get("msg_id") != asked:
            continue
        content = message["content"]
        if message["msg_type"] == "status" and content["execution_state"] == "idle":
            client.get_shell_msg(timeout=LONG)
            return found
        if message["msg_type"] not in ("status", "execute_input"):
            found.append({"type": message["msg_type"], **content})
            if then is not None and at in content.get("data", {}).get("text/plain", ""):
                then()
                then = None
    raise TimeoutError(code)


def test_an_interrupt_keeps_state_and_kernel(
    kernel: tuple[KernelManager, BlockingKernelClient], images: Path, tmp_path: Path
) -> None:
    """■ in the second epoch of many; `resume=True` in the same kernel ends as the run that nobody stopped."""
    manager, client = kernel
    options = {**SMALL, "epochs": 4, "batch_size": 2, "workers": 0}
    code = f"import deepcluster\noptions = {options}\nmemory = 7"
    assert not outputs_of(client, code)
    call = f"run = deepcluster.train({str(images)!r}, out='run', {{}}**options)"
    found = outputs_of(client, call.format(""), "epoch 1/4", manager.interrupt_kernel)
    (error,) = (one for one in found if one["type"] == "error")
    sentence = "stopped by SIGINT; the state is saved: the same call with resume=True continues"
    assert error["ename"] == "Interrupted" and error["evalue"] == sentence
    assert error["traceback"] == [f"Interrupted: {sentence}"]  # Nothing of the way it came.
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 1 <= done < 4 and (tmp_path / "run" / "checkpoints" / "last.pt").is_file()
    (alive,) = outputs_of(client, "memory * 6")
    assert alive["data"]["text/plain"] == "42"
    assert not [one for one in outputs_of(client, call.format("resume=True, ")) if one["type"] == "error"]
    (count,) = outputs_of(client, "len(run.metrics), run")
    assert count["data"]["text/plain"].startswith("(4, Run('run'")
    assert_same_run(tmp_path / "run", train_small(images, tmp_path / "whole", **options))


SCRIPT = """
import deepcluster
deepcluster.train({images!r}, out={run!r})
"""


def test_scripts_are_answered_in_python_and_commands_as_typed(images: Path, trained: Path, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(SCRIPT.format(images=str(images), run=str(trained)))
    commands = [
        ([str(script)], "resume=True", "--resume"),
        (["-m", "deepcluster", "train", str(images), "--out", str(trained)], "--resume", "resume=True"),
    ]
    for words, expected, other in commands:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        last = done.stderr.splitlines()[-1]
        assert done.returncode and expected in last and other not in last


@pytest.mark.parametrize(
    ("typed", "called"),
    [
        ("the same command with --resume continues", "the same call with resume=True continues"),
        ("use --epochs 9 or more, or --no-sobel", "use epochs=9 or more, or sobel=False"),
        ("give --out TABLE.csv or --folders DIR", "give out=TABLE.csv or folders=DIR"),
        ("see it: deepcluster report runs/a", 'see it: deepcluster.report("runs/a")'),
        (
            "deepcluster assign r 'my photos' b --folders by; x",
            'deepcluster.assign("r", ["my photos", "b"], folders="by"); x',
        ),
        ("(deepcluster evaluate knn MODEL --data a/b)", '(deepcluster.evaluate("knn", MODEL, data="a/b"))'),
        ("deepcluster embed r a --parts --limit 5", 'deepcluster.embed("r", "a", parts=True, limit=5)'),
        ("into runs/deepcluster train-data", "into runs/deepcluster train-data"),
        ("a -- b, x--y, python -m deepcluster", "a -- b, x--y, python -m deepcluster"),
        ("it can't be: use --out=A.csv; --k=3, --lr 0.1.", "it can't be: use out=A.csv; k=3, lr=0.1."),
        ("runs/a: --resume continues", "runs/a: resume=True continues"),
        # Files, quoted words and other programs are left as they are.
        *(
            (same, same)
            for same in (
                "/data/my --add.jpg can't be read",
                "/photos/run --k 3/x: bad",
                "C:\\my --add photos\\x.jpg: bad",
                "'my --add x' and \"a --add b\"",
                "pip install --force-reinstall pillow",
                "use torchrun --nproc-per-node gpu",
                "`deepcluster download --list` shows it",
                "deepcluster import a/b.pth --out T.parquet",
            )
        ),
    ],
)
def test_options_and_commands_in_python(typed: str, called: str) -> None:
    assert in_python(typed) == called
    assert in_python(called) == called


@pytest.mark.parametrize("name", ["Bob's photos", 'my "best" ones', "it's; a --add b,", "C:\\a b\\c", "a'b'c d", "(x)"])
def test_any_name_becomes_a_call(name: str) -> None:
    said = in_python(f"see it: deepcluster report {shlex.quote(name)} --out r.html; then more")
    call = said.removeprefix("see it: deepcluster.report").removesuffix("; then more")
    assert eval(f"dict{call.replace('(', '(name=', 1)}") == {"name": name, "out": "r.html"}


def test_pictures_belong_to_their_names_in_any_order(images: Path) -> None:
    """A permutation that keeps the first and the last row; rows of some images; repeated ones."""
    source = open_source(images)
    names = [source.name(index) for index in range(len(source))]
    count = len(names)
    rows = Clusters(names, np.arange(count), np.zeros(count, np.float32), {}, images=source)
    pictures = [rows[[index]]._repr_html_().partition('src="')[2].partition('"')[0] for index in range(count)]
    assert len(set(pictures)) == count
    for order in ([0, *range(count - 2, 0, -1), count - 1], [5, 3, 3, 9], list(range(count))):
        html = clusters_html("", {**rows[order].columns(), "cluster": np.arange(len(order))}, {}, lambda: source)
        shown = re.findall(r'<img src="([^"]+)"', html)
        assert shown == [pictures[index] for index in order[: len(shown)]] and len(shown) >= min(12, len(order))


def test_a_row_is_chosen_by_any_whole_number(images: Path) -> None:
    rows = Embeddings(["a", "b", "c", "d"], np.arange(8, dtype=np.float32).reshape(4, 2), {})
    for number in (3, np.int64(3), np.array(3), torch.tensor(3), -1):
        assert rows[number]["name"] == "d" and rows[number]["embedding"].tolist() == [6, 7]
    for some in ([1, 2], np.array([1, 2]), slice(1, 3), [False, True, True, False]):
        assert rows[some].names == ["b", "c"]


def test_similar_images_are_shown(images: Path) -> None:
    """With pictures where they are known, without pandas, and short."""
    names = sorted(path.name for path in images.iterdir())
    rows_ND = np.random.default_rng(0).normal(size=(len(names), 8)).astype(np.float32)
    source = open_source(images)
    rows = Embeddings([source.name(index) for index in range(len(source))], rows_ND, {}, images=source)
    html = similar(rows, query=names[:9], count=30)._repr_html_()
    assert html.count("<img ") == 6 * 9 + 6 and len(html) < 300_000
    assert "and 3 more" in text_of(html) and "and 262 more rows" in text_of(html)
    bare = similar(Embeddings(rows.names, rows_ND, {}), query=names[0], count=3)
    assert "<img" not in bare._repr_html_() and "1 query" in text_of(bare._repr_html_())


def test_an_evaluation_is_shown() -> None:
    results = Results("knn", {}, {}, {"accuracy": {"k=5": 0.5, "k=20": 0.25}}, ("accuracy", "k=5"), ["a <note>"])
    evaluation = Evaluation(results, "run", "photos", 1.0, None)
    assert repr(evaluation) == "Evaluation(knn of run on photos: accuracy k=5 0.5; .results, .path)"
    assert text_of(evaluation._repr_html_()) == "run on photosknnk=5k=20accuracy50.0%25.0%a <note>"


def test_columns_stand_in_the_order_of_the_fullest_row() -> None:
    """The first epoch has no NMI, which stands between others."""
    assert text_of(table([{"a": 1, "c": 3}, {"a": 4, "b": 5, "c": 6}])) == "abc13456"
