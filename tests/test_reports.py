"""The report as a user makes it: of a run, of a table, during training, with wrong input."""

import base64
import gzip
import json
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models_helper import write_classes
from small_runs import train_small

import deepcluster
from deepcluster.cli import main
from deepcluster.core.errors import InputError
from deepcluster.core.files import save_tensors
from deepcluster.core.progress import Reporter
from deepcluster.run.folder import load_checkpoint
from deepcluster.visualization.report import build
from deepcluster.visualization.report.build import Context
from deepcluster.visualization.report.command import report
from deepcluster.visualization.report.page import Section, render

pytest.importorskip("plotly", reason="the report needs: pip install jinja2 plotly")
HOSTILE = "<img src=x onerror=window.hacked=1>.png"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 25 images in three class folders, one with a hostile name, one of 25 that can't be read."""
    place = tmp_path_factory.mktemp("report")
    images = write_classes(place / "images", 8)
    (images / "class0" / "000.png").rename(images / "class0" / HOSTILE)
    (images / "class1" / "broken.png").write_bytes(b"no image")
    train_small(images, place / "run", reassign_every=2, epochs=3)
    return place


@pytest.fixture(scope="module")
def page(place: Path) -> str:
    return report(place / "run", out=place / "page.html", reporter=Reporter(quiet=True)).read_text()


def blob(page: str, name: str) -> bytes:
    found = re.search(rf'<script type="text/plain" id="blob-{name}" data-media-type="(.*?)">(.*?)</script>', page)
    assert found, name
    content = base64.b64decode(found[2])
    return content if found[1] else gzip.decompress(content)


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)" aria-labelledby="\1-title"', page)


def make(*words: str | Path) -> int:
    return main([str(word) for word in ("report", *words)])


def test_the_page_of_a_run_has_every_section_and_its_clusters(place: Path, page: str) -> None:
    assert sections(page) == ["run", "clusters", "map", "method", "odd", "filters"]
    table = pq.read_table(place / "run" / "assignments" / "epoch-0004.parquet").to_pydict()
    names = blob(page, "names-0").decode().split("\0")
    clusters = np.frombuffer(blob(page, "row-cluster"), "<i4")
    assert dict(zip(names, clusters.tolist(), strict=True)) == dict(zip(table["name"], table["cluster"], strict=True))
    sizes = json.loads(blob(page, "clusters"))["size"]
    assert sizes == [table["cluster"].count(number) for number in range(len(sizes))]
    assert json.loads(blob(page, "rows"))["labels"] == ["class0", "class1", "class2"]
    assert json.loads(blob(page, "clusters"))["past"]["epochs"] == [1, 3]  # of three, the second was grouped as the first


def test_names_are_text_and_nothing_is_asked_of_the_network(page: str) -> None:
    outside = re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)
    assert HOSTILE not in outside
    assert "broken.png" in outside
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//(?!arxiv)""", outside)


def test_the_metrics_of_the_run_are_drawn(place: Path, page: str) -> None:
    metrics = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    figures = json.loads(blob(page, "figures"))
    drawn = [trace["y"] for figure in figures.values() for trace in figure["data"] if isinstance(trace.get("y"), list)]
    assert [line["loss"] for line in metrics] in drawn


def test_images_that_have_moved_are_named_again_or_left_out(
    place: Path, page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["address"] == [str(place / "images")]
    config["data"]["address"] = [str(tmp_path / "gone")]
    (run / "config.json").write_text(json.dumps(config))
    assert make(run, "--quiet") == 0
    assert "name them with --data" in capsys.readouterr().err
    without = (run / "report.html").read_text()
    assert sections(without) == sections(page)
    assert "are not at hand" in without
    assert blob(without, "names-0") == blob(page, "names-0")
    assert blob(without, "row-label") == blob(page, "row-label")  # from the class folders in the names
    assert make(run, "--data", place / "images", "--quiet") == 0
    again = (run / "report.html").read_text()
    assert "are not at hand" not in again
    assert blob(again, "sheet-0") == blob(page, "sheet-0")


def test_a_run_without_labels_on_the_go(place: Path, tmp_path: Path) -> None:
    """Unlabelled images, stopped after an epoch: the clusters are those that are being learned."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((place / "images").rglob("0*.png"))):
        shutil.copy(path, flat / f"{number}.png")
    train_small(flat, tmp_path / "run", epochs=1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["settings"]["epochs"] = 5
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    del state["final"]
    save_tensors(tmp_path / "run" / "checkpoints" / "last.pt", state)
    text = report(tmp_path / "run", reporter=Reporter(quiet=True)).read_text()
    assert "not finished" in text
    table = pq.read_table(tmp_path / "run" / "assignments" / "epoch-0001.parquet").to_pydict()
    clusters = dict(
        zip(blob(text, "names-0").decode().split("\0"), np.frombuffer(blob(text, "row-cluster"), "<i4"), strict=True)
    )
    assert clusters == dict(zip(table["name"], table["cluster"], strict=True))


def test_a_watched_run_gets_a_new_page_after_each_epoch(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepcluster.visualization.report.command.WATCH_SECONDS", 0.1)
    images, run = place / "images", tmp_path / "run"
    training = threading.Thread(target=train_small, args=(images, run), kwargs={"epochs": 15})
    training.start()
    while not (run / "config.json").is_file():
        assert training.is_alive()
    pages: list[str] = []

    class Listening(Reporter):
        def say(self, line: str) -> None:
            if "made in" in line:
                pages.append((run / "report.html").read_text())

    report(run, watch=True, reporter=Listening(quiet=True))
    training.join()
    assert 'data-refresh-seconds="0"' in pages[-1]
    assert len(pages) > 1
    assert all('data-refresh-seconds="15"' in page for page in pages[:-1])


def test_a_table_of_any_embeddings(place: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(centre, 0.1, (20, 8)) for centre in (-1, 1)])
    table = {"path": [f"{number}.jpg" for number in range(40)], "vector": list(rows)}
    pq.write_table(pa.table(table), tmp_path / "mine.parquet")
    assert make(tmp_path / "mine.parquet", "--clusters", "2", "-q") == 0
    text = (tmp_path / "mine.report.html").read_text()
    assert sections(text) == ["run", "clusters", "map", "odd"]
    assert sorted(json.loads(blob(text, "clusters"))["size"]) == [20, 20]


def test_an_embed_table_with_its_images(place: Path, tmp_path: Path) -> None:
    deepcluster.embed(place / "run", place / "images", out=tmp_path / "e.parquet")
    path = report(tmp_path / "e.parquet", data=place / "images", clusters=3, reporter=Reporter(quiet=True))
    text = path.read_text()
    assert json.loads(blob(text, "rows"))["thumbnails"]["count"] == 24
    assert "broken.png" in blob(text, "names-0").decode()


WRONG: dict[str, tuple[list[Any], str]] = {
    "nothing": (["nowhere"], "nowhere does not exist"),
    "a folder that is no run": (["images"], "neither a run folder"),
    "a page that is none": (["run", "--out", "page.txt"], "should end in .html"),
    "a folder that is not there": (["run", "--out", "no/page.html"], "does not exist or can't be written"),
    "a table to watch": (["table.parquet", "--watch"], "no run folder"),
    "no table": (["images/class0/001.png"], "001.png"),
    "others' images": (["run", "--data", "others"], "none of the"),
    "a table of another kind": (["table.xlsx"], "pandas.read_excel('t.xlsx').to_parquet('t.parquet')"),
    "tiny thumbnails": (["run", "--thumbnail", "1"], "use 16 or more"),
}


@pytest.mark.parametrize("words, message", WRONG.values(), ids=WRONG)
def test_wrong_input(
    place: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    if not Path("others").exists():
        write_classes(Path("others/x"), 1)
        pq.write_table(pa.table({"a": [1]}), "table.parquet")
        Path("table.xlsx").write_text("no table")
    before = sorted(place.rglob("*"))
    assert make(*words) == 2
    assert message in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


def test_a_new_section_is_one_more_entry(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section brings its own HTML, script and style; nothing else knows it."""

    def toy(context: Context) -> Section:
        html = render("pictures.html.jinja", pictures=[], run=f"{len(context.collection)} images")
        return Section("toy", "A toy", html, scripts=("window.toy = 1 < 2;",), styles=("#toy > p { color: red; }",))

    def absent(context: Context) -> None:
        return None

    monkeypatch.setattr(build, "SECTIONS", (*build.SECTIONS, toy, absent))
    text = report(place / "run", out=tmp_path / "page.html", reporter=Reporter(quiet=True)).read_text()
    assert sections(text) == ["run", "clusters", "map", "method", "odd", "filters", "toy"]
    assert '<a href="#toy">A toy</a>' in text and "25 images" in text
    assert "window.toy = 1 < 2;" in text and "#toy > p { color: red; }" in text


def test_a_run_without_clusters_yet(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "run" / "config.json", tmp_path)
    with pytest.raises(InputError, match="no clusters yet"):
        report(tmp_path)


def test_the_extra_is_named(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert make(place / "run") == 2
    assert "pip install jinja2 plotly" in capsys.readouterr().err
