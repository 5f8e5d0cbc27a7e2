"""Reports with new images and a title, with names of clusters, and of runs that were clustered without training."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from models_helper import write_classes
from small_runs import train_small
from test_reports import blob, sections

import deepcluster
from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.visualization.report.command import report

pytest.importorskip("plotly", reason="the report needs: pip install jinja2 plotly")
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 36 images, and 6 other ones, one of which can't be read."""
    place = tmp_path_factory.mktemp("runs")
    train_small(write_classes(place / "photos", 12), place / "run", epochs=1)
    write_classes(place / "new", 2, seed=7)
    (place / "new" / "class0" / "000.png").write_bytes(b"no image")
    return place


def texts(html: str) -> str:
    """Return the text of a piece of HTML, in one line."""
    return " ".join(unescape(re.sub("<[^>]+>", " ", html)).split())


def test_new_images_lie_beside_their_cluster_and_the_most_similar_images(place: Path) -> None:
    (place / "run" / "names.csv").write_text("cluster,name\n0,zeros\n4,fours\n")
    page = report(place / "run", new=place / "new", title="My <photos>", out=place / "new.html", reporter=QUIET).read_text()
    assert "<title>My &lt;photos&gt;</title>" in page
    assert sections(page) == ["run", "clusters", "new", "map", "method", "odd", "filters"]
    assert json.loads(blob(page, "clusters"))["names"] == {"0": "zeros", "4": "fours"}
    section = page.split('<section id="new"')[1].split("</section>")[0]
    assert "5 new images in" in texts(section) and "1 can't be read" in texts(section)

    # The clusters and distances are those of `assign`, the most similar images those of all distances.
    found = deepcluster.assign(place / "run", place / "new", reporter=QUIET).to_pandas().query("cluster >= 0")
    model = deepcluster.load(place / "run")
    rows, new_rows = (deepcluster.embed(place / "run", place / what, reporter=QUIET) for what in ("photos", "new"))
    points_NP = model.points(torch.from_numpy(rows.embedding_ND)).double()
    cards = section.split('<div class="card new-image">')[1:]
    order = found.sort_values(["cluster", "distance"])
    assert len(cards) == len(order) == 5
    for card, image in zip(cards, order.itertuples(), strict=True):
        assert f'href="#cluster={image.cluster}"' in card and image.name in card
        assert f"distance {image.distance:.3g}:" in texts(card)
        row = new_rows.names.index(image.name)
        point_1P = model.points(torch.from_numpy(new_rows.embedding_ND[row : row + 1])).double()
        nearest = torch.cdist(point_1P, points_NP)[0].argsort()[:6].tolist()
        similar = card.split("most similar images of the run")[-1]
        assert re.findall(r'data-row="\d+">(.*?)<', similar) == [rows.names[index] for index in nearest]


def test_new_images_need_a_run_with_its_images(place: Path, tmp_path: Path) -> None:
    table = tmp_path / "clusters.csv"
    deepcluster.assign(place / "run", place / "photos", out=table, reporter=QUIET)
    with pytest.raises(InputError, match="--new needs a model for new images"):
        report(table, new=place / "new", reporter=QUIET)
    with pytest.raises(InputError, match="nowhere does not exist"):
        report(place / "run", new=place / "nowhere", out=tmp_path / "page.html", reporter=QUIET)
    assert not (tmp_path / "page.html").exists()


def test_a_run_that_was_clustered_only(place: Path, tmp_path: Path) -> None:
    run = deepcluster.cluster(
        "untrained:alexnet-small", place / "photos", out=tmp_path / "three", clusters=[2, 3], reporter=QUIET
    )
    page = report(run, reporter=QUIET).read_text()
    assert sections(page) == ["run", "clusters", "map", "method", "odd", "filters"]
    words = texts(page.split('<section id="run"')[1].split("</section>")[0])
    for part in (
        "The features of a model were clustered on",
        "nothing was trained",
        "untrained:",
        "alexnet-small",
        "Numbers of clusters that were compared",
        "Sizes",
    ):
        assert part in words, part
    assert "Over the epochs" not in words and "why the recipe changed some" not in words
    steps = re.findall(r'id="method-step-\d-title">.*?</span>(.*?)</h3>', page)
    assert [step.strip() for step in steps] == [
        "Extract the features of every image",
        "Reduce and whiten",
        "Cluster the points",
        "What comes out",
    ]


def test_a_run_of_a_table_shows_its_map_without_images(place: Path, tmp_path: Path) -> None:
    table = tmp_path / "features.parquet"
    deepcluster.embed("untrained:alexnet-small", place / "photos", out=table, reporter=QUIET)
    run = deepcluster.cluster(table, out=tmp_path / "of-table", clusters=3, reporter=QUIET)
    page = report(run, reporter=QUIET).read_text()
    assert "A table of embeddings was clustered on" in texts(page)
    assert len(blob(page, "map-rows")) == 4 * 36
    assert "no image went through a network here" not in page or "method" in sections(page)
    with_images = report(run, data=place / "photos", out=tmp_path / "seen.html", reporter=QUIET).read_text()
    assert 'id="blob-sheet-0"' in with_images and 'id="blob-sheet-0"' not in page
