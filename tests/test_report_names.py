"""Names of clusters on the page in a real browser: shown, given, searched, saved as `names.csv`; a table of duplicates."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsers import Visit, chromium

from deepcluster.run.cluster_names import FILE, read_names
from deepcluster.visualization.report.collection import Collection, RunFacts
from deepcluster.visualization.report.gallery.clusters import describe_clusters
from deepcluster.visualization.report.gallery.rows import by_importance, gallery_section, list_rows
from deepcluster.visualization.report.gallery.thumbnails import Thumbnails
from deepcluster.visualization.report.glance import glance_section
from deepcluster.visualization.report.map import lay_out, map_section
from deepcluster.visualization.report.odd import find_odd, odd_section
from deepcluster.visualization.report.page import write_page

pytest.importorskip("plotly", reason="the report needs: pip install jinja2 plotly")

GIVEN = {0: "cats, large", 1: "<img src=x onerror=window.hacked=1>"}
LONG = "a long name " * 9
GROUPS, COUNT = 4, 64


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of 64 names in 4 clusters, two of which are named; images 0 and 4 are copies."""
    rng = np.random.default_rng(3)
    cluster_N = np.arange(COUNT) % GROUPS
    points_NP = (rng.normal(0, 5, (GROUPS, 6))[cluster_N] + rng.normal(size=(COUNT, 6))).astype(np.float32)
    points_NP[4] = points_NP[0]
    collection = Collection(
        title="Named",
        names=[f"photos/Kühe {number:02}.jpg" for number in range(COUNT)],
        cluster_N=cluster_N,
        distance_N=rng.uniform(0.2, 1, COUNT).astype(np.float32),
        n_clusters=GROUPS,
        centroids_KP=torch.from_numpy(rng.normal(size=(GROUPS, 6)).astype(np.float32)),
        sample_M=np.arange(COUNT),
        points_MP=points_NP,
        cluster_names=GIVEN,
        names_folder="runs/named",
    )
    facts, odd = describe_clusters(collection, seed=1), find_odd(collection)
    listing = list_rows(collection, by_importance(collection, facts.exemplars()))
    about = RunFacts(collection.title, "named.parquet", n_images=COUNT, sizes_K=collection.sizes_K())
    sections = [
        glance_section(about),
        gallery_section(collection, facts, listing, Thumbnails(0)),
        map_section(collection, lay_out(collection, images=COUNT, seed=0), listing),
        odd_section(collection, odd, listing),
    ]
    path = tmp_path_factory.mktemp("named") / "page.html"
    write_page(path, collection.title, sections)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    visit = Visit(browser, address)
    visit.page.wait_for_selector("#gallery .card")
    yield visit.page
    assert visit.complaints == []
    assert visit.page.evaluate("window.hacked") is None
    visit.close()


def titles(page: Any) -> list[str]:
    """Headings of the cards by the number of their cluster."""
    heads = {link.get_attribute("data-cluster"): link.inner_text() for link in page.locator("#gallery h3 a").all()}
    return [heads[str(cluster)] for cluster in range(GROUPS)]


def rename(page: Any, cluster: int, name: str, key: str = "Enter") -> None:
    card = page.locator("#gallery .card").filter(has=page.locator(f'h3 a[data-cluster="{cluster}"]'))
    card.hover()
    card.locator(".rename").click()
    page.fill(".name-field", name)
    page.keyboard.press(key)


def test_given_names_are_shown_with_their_numbers(page: Any) -> None:
    assert titles(page) == [GIVEN[0], GIVEN[1], "Cluster 2", "Cluster 3"]
    numbers = [number.inner_text() for number in page.locator("#gallery .cluster-number").all() if number.is_visible()]
    assert sorted(numbers) == ["cluster 0", "cluster 1"]
    assert page.locator("#names-bar").is_hidden()
    page.locator("#odd a[data-cluster='0']").first.scroll_into_view_if_needed()
    assert page.locator("#odd a[data-cluster='0']").first.inner_text() == GIVEN[0]


def test_a_name_is_kept_saved_and_read_by_every_command(page: Any, tmp_path: Path) -> None:
    rename(page, 2, '  dogs, "small"  ')
    rename(page, 3, "never", key="Escape")
    rename(page, 1, "")
    assert titles(page) == [GIVEN[0], "Cluster 1", 'dogs, "small"', "Cluster 3"]
    assert "2 names are kept by this browser only. Save names.csv into runs/named" in page.locator("#names-bar").inner_text()
    page.reload()
    page.wait_for_selector("#gallery .card")
    assert titles(page)[2] == 'dogs, "small"', "the browser keeps it"
    with page.expect_download() as waiting:
        page.click("#names-bar .save")
    assert waiting.value.suggested_filename == FILE
    waiting.value.save_as(tmp_path / FILE)
    assert (tmp_path / FILE).read_bytes().startswith(b"\xef\xbb\xbf")  # For spreadsheets.
    assert read_names(tmp_path) == {0: GIVEN[0], 2: 'dogs, "small"'}
    page.click("#names-bar .discard")
    assert titles(page) == [GIVEN[0], GIVEN[1], "Cluster 2", "Cluster 3"]
    assert page.locator("#names-bar").is_hidden()


def test_a_long_name_is_kept_whole_and_leaving_its_field_changes_nothing(page: Any) -> None:
    rename(page, 2, LONG)
    assert titles(page)[2] == LONG.strip()
    page.locator("#gallery .card").filter(has=page.locator('h3 a[data-cluster="2"]')).locator(".rename").click()
    page.keyboard.press("Enter")
    assert titles(page)[2] == LONG.strip()
    page.click("#names-bar .discard")
    page.locator("#gallery .card").filter(has=page.locator('h3 a[data-cluster="0"]')).locator(".rename").click()
    page.locator(".name-field").blur()
    assert titles(page)[0] == GIVEN[0] and page.locator("#names-bar").is_hidden()


def test_a_cluster_is_found_by_its_name(page: Any) -> None:
    page.fill("#gallery-search", "CATS")
    page.wait_for_selector("#gallery-hits [data-cluster]")
    assert page.locator("#gallery-hits [data-cluster]").all_inner_texts() == [GIVEN[0]]
    page.click("#gallery-hits [data-cluster]")
    page.wait_for_function("words => document.getElementById('detail-title')?.textContent === words", arg=GIVEN[0])
    assert page.locator(".truth").inner_text().startswith("cluster 0")


def test_the_map_highlights_by_name_or_number(page: Any) -> None:
    page.locator("#map-plot").scroll_into_view_if_needed()
    page.wait_for_selector('#map-plot[data-drawn="tsne cluster -1"]')
    for words, cluster in {"cats": 0, "3": 3, "onerror": 1, "cluster": -1, "2": 2, "": -1}.items():
        page.fill("#map-highlight", words)
        page.wait_for_selector(f'#map-plot[data-drawn="tsne cluster {cluster}"]')


def test_near_duplicates_are_saved_as_a_table(page: Any, tmp_path: Path) -> None:
    with page.expect_download() as waiting:
        page.click("#duplicates-save")
    waiting.value.save_as(tmp_path / "near.csv")
    rows = list(csv.DictReader((tmp_path / "near.csv").open(encoding="utf-8-sig", newline="")))
    assert [(row["group"], row["name"], float(row["distance"]), row["keep"]) for row in rows] == [
        ("0", "photos/Kühe 00.jpg", 0.0, "yes"),
        ("0", "photos/Kühe 04.jpg", 0.0, "no"),
    ]
