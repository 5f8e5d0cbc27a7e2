"""The report's sections on the run, the map, odd ones and pictures: against loops, scikit-learn, and a real browser."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import chromium
from PIL import Image
from sklearn.decomposition import PCA

from deepcluster.core.errors import Interrupted
from deepcluster.visualization.report.collection import Collection, RunFacts
from deepcluster.visualization.report.curves import curves_of
from deepcluster.visualization.report.gallery.rows import Listing, by_importance, list_rows
from deepcluster.visualization.report.gallery.thumbnails import Thumbnails
from deepcluster.visualization.report.glance import glance_section
from deepcluster.visualization.report.map import Layout, lay_out, map_section
from deepcluster.visualization.report.odd import NEIGHBOURS, find_odd, odd_section, typical_distance
from deepcluster.visualization.report.page import Section, write_page
from deepcluster.visualization.report.pictures import find_pictures, pictures_section

EVIL = '<img src=x onerror="document.title=`harmed`">'


def collection_of(points_MP: Any, cluster_N: Any = None, **changes: Any) -> Collection:
    points_MP = np.asarray(points_MP, np.float32)
    n_images = len(points_MP)
    cluster_N = np.zeros(n_images, np.int64) if cluster_N is None else np.asarray(cluster_N)
    parts: dict[str, Any] = {
        "title": "a run",
        "names": [f"class{index % 2}/{index:03}.png" for index in range(n_images)],
        "cluster_N": cluster_N,
        "distance_N": np.full(n_images, 0.5, np.float32),
        "n_clusters": int(cluster_N.max(initial=0)) + 1,
        "sample_M": np.arange(n_images),
        "points_MP": points_MP,
    }
    return Collection(**{**parts, **changes})


def blobs_of_points(count: int = 60, groups: int = 3, *, seed: int = 0, width: int = 6) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    group_N = np.arange(count) % groups
    return rng.normal(0, 5, (groups, width))[group_N] + rng.normal(size=(count, width)), group_N


def all_listed(collection: Collection) -> Listing:
    return list_rows(collection, by_importance(collection, []))


# Odd ones


def naive_groups(points_MP: Any, near: float) -> list[set[int]]:
    groups: list[set[int]] = []
    for one in range(len(points_MP)):
        for other in range(one):
            if math.dist(points_MP[one], points_MP[other]) <= near:
                joined = [group for group in groups if one in group or other in group]
                groups = [group for group in groups if group not in joined] + [{one, other}.union(*joined)]
    return groups


def test_near_duplicates_are_those_of_a_double_loop() -> None:
    points_MP, cluster_N = blobs_of_points(80)
    rng = np.random.default_rng(1)
    points_MP[20] = points_MP[7]
    points_MP[50:54] = points_MP[49] + rng.normal(0, 1e-3, (4, 6))  # A chain of near ones.
    points_MP[71] = points_MP[70] + 0.3  # Near, but not so near.
    collection = collection_of(points_MP, cluster_N)
    odd = find_odd(collection)
    expected = naive_groups(collection.points_MP.astype(np.float64), odd.near)
    assert {frozenset(group.indices.tolist()) for group in odd.duplicates} == {frozenset(group) for group in expected}
    assert [group.indices.tolist() for group in odd.duplicates] == [[7, 20], [49, 50, 51, 52, 53]]
    assert odd.duplicates[0].distance == 0 < odd.duplicates[1].distance < odd.near


def test_a_group_of_more_copies_than_neighbours_stays_one() -> None:
    points_MP, _ = blobs_of_points(60)
    points_MP[10 : 10 + 3 * NEIGHBOURS] = points_MP[10]
    (group,) = find_odd(collection_of(points_MP)).duplicates
    assert group.indices.tolist() == list(range(10, 10 + 3 * NEIGHBOURS))


def test_the_typical_distance_is_that_of_all_pairs() -> None:
    points_MP, _ = blobs_of_points(50)
    squared = [math.dist(one, other) ** 2 for one in points_MP for other in points_MP]
    assert typical_distance(points_MP.astype(np.float32)) == pytest.approx(math.sqrt(np.mean(squared)), rel=1e-5)


def test_outliers_are_those_of_the_full_matrix() -> None:
    points_MP, cluster_N = blobs_of_points(100)
    points_MP[33] += 40
    distances_MM = np.linalg.norm(points_MP[:, None] - points_MP[None], axis=2)
    np.fill_diagonal(distances_MM, np.inf)
    mean_M = np.sort(distances_MM, axis=1)[:, :NEIGHBOURS].mean(axis=1)
    odd = find_odd(collection_of(points_MP, cluster_N), most=4)
    assert odd.outliers.indices_U.tolist() == np.argsort(-mean_M)[:4].tolist()
    assert odd.outliers.indices_U[0] == 33
    np.testing.assert_allclose(odd.outliers.ratios_U, mean_M[odd.outliers.indices_U] / np.median(mean_M), rtol=1e-4)


def test_cluster_outliers_are_the_farthest_relative_to_their_cluster() -> None:
    distance_N = np.concatenate([np.full(9, 1.0), [3.0], np.full(9, 10.0), [20.0], [1, 99], [np.nan]]).astype(np.float32)
    cluster_N = np.array([0] * 10 + [1] * 10 + [2] * 2 + [-1])
    collection = replace(
        collection_of(np.zeros((23, 2)), cluster_N),
        distance_N=distance_N,
        n_clusters=3,
        points_MP=np.zeros((0, 0), np.float32),
    )
    odd = find_odd(collection, most=2)
    # Image 21 is farther still, but its cluster of two has no middle.
    assert odd.cluster_outliers.indices_U.tolist() == [9]
    assert (
        find_odd(replace(collection, cluster_N=np.where(cluster_N == 2, 1, cluster_N))).cluster_outliers.indices_U[0] == 21
    )
    np.testing.assert_allclose(odd.cluster_outliers.ratios_U, [3])


def test_clusters_that_look_like_collapse() -> None:
    points_MP, _ = blobs_of_points(20)
    points_MP[16:19] = points_MP[16]
    cluster_N = np.array([0] * 14 + [1, 1, 2, 2, 2, 3])
    collection = replace(collection_of(points_MP, cluster_N), n_clusters=6)
    odd = find_odd(collection)
    assert (list(odd.giants), list(odd.singletons), list(odd.empty), list(odd.copies)) == ([0], [3], [4, 5], [2])
    html = odd_section(collection, odd, all_listed(collection), "the loss has stayed at ln K").html
    for words in (
        "1 cluster holds more than half",
        "1 cluster holds a single image",
        "2 clusters are empty",
        "1 cluster holds only copies of one",
    ):
        assert words in html
    assert "the loss has stayed at ln K" in html
    # One cluster of the two copies, and one image elsewhere: not only copies.
    cluster_N[15] = 2
    assert list(find_odd(replace(collection, cluster_N=cluster_N)).copies) == []


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_few_images_and_equal_images(count: int) -> None:
    for points_MP in (np.zeros((count, 3)), np.arange(3.0 * count).reshape(count, 3)):
        collection = collection_of(points_MP, np.zeros(count, np.int64))
        odd = find_odd(collection)
        assert len(odd.duplicates) == (count > 1 and not points_MP.any())
        assert "Odd" in odd_section(collection, odd, all_listed(collection)).title


def test_rows_that_are_not_finite_and_a_sample_are_told() -> None:
    points_MP, _ = blobs_of_points(40)
    points_MP[3] = np.nan
    collection = replace(
        collection_of(np.zeros((400, 6))), sample_M=np.arange(0, 400, 10), points_MP=points_MP.astype(np.float32)
    )
    odd = find_odd(collection)
    assert odd.n_compared == 39
    assert set(odd.outliers.indices_U) <= set(range(0, 400, 10)) - {30}
    assert "39 of 400 images were compared" in odd_section(collection, odd, all_listed(collection)).html


def test_the_search_can_be_stopped() -> None:
    def stop(units: int) -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        find_odd(collection_of(blobs_of_points()[0]), advance=stop)
    with pytest.raises(Interrupted):
        lay_out(collection_of(blobs_of_points()[0]), images=10, seed=0, advance=stop)


# The map


def test_pca_is_that_of_scikit_learn() -> None:
    points_MP, _ = blobs_of_points(70, width=60)  # Wider than t-SNE is given.
    layout = lay_out(collection_of(points_MP), images=100, seed=3)
    assert layout is not None and layout.tsne_M2 is not None
    oracle = PCA(2, svd_solver="full").fit(points_MP)
    expected_M2 = oracle.transform(points_MP)
    expected_M2 *= np.sign((expected_M2 * layout.pca_M2).sum(axis=0))
    np.testing.assert_allclose(layout.pca_M2, expected_M2, atol=1e-3)
    assert layout.kept == pytest.approx(oracle.explained_variance_ratio_.sum(), rel=1e-4)


def test_the_same_seed_gives_the_same_map_with_neighbours_kept() -> None:
    points_MP, group_N = blobs_of_points(90)
    points_MP[5] = np.nan
    collection = collection_of(points_MP, group_N)
    one, other = (lay_out(collection, images=60, seed=3) for _ in range(2))
    assert one is not None and other is not None and one.tsne_M2 is not None and other.tsne_M2 is not None
    np.testing.assert_array_equal(one.indices_M, other.indices_M)
    np.testing.assert_array_equal(one.tsne_M2, other.tsne_M2)
    assert len(one.indices_M) == 60 == len(set(one.indices_M)) and 5 not in one.indices_M and one.n_known == 89
    another = lay_out(collection, images=60, seed=4)
    assert another is not None and another.indices_M.tolist() != one.indices_M.tolist()
    distances = np.linalg.norm(one.tsne_M2[:, None] - one.tsne_M2[None], axis=2) + np.diag(np.full(60, np.inf))
    assert (group_N[one.indices_M][distances.argmin(axis=1)] == group_N[one.indices_M]).mean() > 0.9


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_maps_of_few_images(count: int) -> None:
    points_MP, _ = blobs_of_points(count)
    layout = lay_out(collection_of(points_MP), images=10, seed=0)
    assert layout is not None and layout.pca_M2.shape == (count, 2) and (layout.tsne_M2 is None) == (count < 5)
    assert np.isfinite(layout.pca_M2).all() and 0 <= layout.kept <= 1.001


def test_maps_of_equal_and_of_narrow_points() -> None:
    for points_MP, kept in ((np.ones((20, 3)), 0), (np.arange(20.0)[:, None], 1)):
        layout = lay_out(collection_of(points_MP), images=20, seed=0)
        assert layout is not None and layout.tsne_M2 is None and layout.kept == pytest.approx(kept)
    for points_MP, images in ((np.zeros((0, 0)), 5), (np.full((4, 2), np.nan), 5), (np.ones((4, 2)), 0)):
        assert lay_out(collection_of(points_MP), images=images, seed=0) is None


def test_the_section_has_the_listed_images_and_nearest_clusters() -> None:
    points_MP = np.array([[0.0, 0], [0, 1], [10, 0], [10, 1], [13, 0], [40, 0]])
    collection = collection_of(points_MP, [0, 0, 1, 1, 2, -1])
    layout = Layout(np.arange(6), points_MP.astype(np.float32), None, 0.5, 6)
    listing = Listing(collection, np.array([1, 2, 3, 5]))
    section = map_section(collection, layout, listing)
    assert np.frombuffer(section.blobs["map-rows"].content, "<i4").tolist() == [0, 1, 2, 3]
    assert np.frombuffer(section.blobs["map-pca"].content, "<f4").reshape(-1, 2).tolist() == points_MP[[1, 2, 3, 5]].tolist()
    assert "map-tsne" not in section.blobs and "t-SNE" not in section.html and "4 of 6 images" in section.html
    words = section.html[section.html.index("nearest clusters") :]
    assert [words.index(f'data-cluster="{cluster}"') for cluster in (0, 1, 2)] == sorted(
        words.index(f'data-cluster="{cluster}"') for cluster in (0, 1, 2)
    )
    assert "not at hand" in map_section(collection, None, listing).html


# The run at a glance


def metrics_line(epoch: int, **changes: Any) -> dict[str, Any]:
    seconds = {"features": 1.0, "whitening": 0.1, "clustering": 0.2, "training": 3.0}
    return {
        "epoch": epoch,
        "loss": 4.0 - epoch / 10,
        "nmi_previous": None if epoch == 1 else epoch / 10,
        "nmi_labels": 0.1,
        "clusters": 8,
        "clusters_nonempty": 8,
        "clusters_repaired": 0,
        "largest_cluster_share": 0.2,
        "data_wait_share": 0.01,
        "seconds": seconds,
        **changes,
    }


def facts_of(metrics: list[dict[str, Any]], **changes: Any) -> RunFacts:
    config = {"settings": {"epochs": 9, "arch": "alexnet-small", "reassign_every": 2}, "data": {"images": 40}}
    return RunFacts("a run", "runs/a", config, metrics, [], False, datetime(2026, 11, 22, 10, 30), **changes)


def figures_of(about: RunFacts) -> dict[str, Any]:
    return {name: json.loads(figure) for name, figure in glance_section(about).figures.items()}


def test_figures_hold_the_metrics() -> None:
    still = {"features": 0.0, "whitening": 0.0, "clustering": 0.0, "training": 3.0}
    lines = [
        metrics_line(epoch) if epoch % 2 else metrics_line(epoch, seconds=still, nmi_previous=9) for epoch in range(1, 7)
    ]
    lines[3]["knn"] = 0.5
    figures = figures_of(facts_of(lines, sizes_K=np.array([3, 9, 0, 5])))
    assert figures["run-loss"]["data"][0]["x"] == [1, 2, 3, 4, 5, 6]
    assert figures["run-loss"]["data"][0]["y"] == [line["loss"] for line in lines]
    assert set(figures["run-loss"]["data"][1]["y"]) == {math.log(8)}
    # Only the clusterings: the lines between repeat values (here 9, to be seen if they were drawn).
    assert [(trace["x"], trace["y"]) for trace in figures["run-nmi"]["data"]] == [
        ([3, 5], [0.3, 0.5]),
        ([1, 3, 5], [0.1, 0.1, 0.1]),
    ]
    assert [(trace["x"], trace["y"]) for trace in figures["run-probes"]["data"]] == [([4], [0.5])]
    assert figures["run-sizes"]["data"][0]["y"] == [9, 5, 3, 0]
    bars = {trace["name"]: trace["y"] for trace in figures["run-seconds"]["data"]}
    assert bars == {step: [line["seconds"][step] for line in lines] for step in still}
    for figure in figures.values():
        assert not {"paper_bgcolor", "plot_bgcolor", "font"} & figure["layout"].keys()
        assert not figure["layout"].get("template")


def test_labels_are_explained_only_where_there_are_any() -> None:
    words = {
        labels: next(
            curve.words
            for curve in curves_of([metrics_line(1, nmi_labels=labels), metrics_line(2, nmi_labels=labels)], None)
            if curve.name == "run-nmi"
        )
        for labels in (None, 0.2)
    }
    assert "your labels" not in words[None] and "To your labels: depends on K too" in words[0.2]


def test_one_epoch_missing_values_and_no_run_at_all() -> None:
    one = figures_of(facts_of([metrics_line(1)]))
    assert one["run-nmi"]["data"][0]["x"] == [1] and "run-probes" not in one
    bare = facts_of([{"epoch": 1, "loss": None, "nmi_previous": None, "seconds": {}}])
    assert figures_of(bare) == {}
    assert curves_of([], None) == []
    html = glance_section(RunFacts("t", "", made_at=datetime(2026, 11, 22), n_images=7)).html
    assert ">7<" in html and "This page was made on 2026-11-22" in html


def test_the_glance_tells_what_when_and_what_is_wrong() -> None:
    lines = [metrics_line(1), metrics_line(2, nmi_labels=0.4, knn=0.25)]
    evaluations: list[dict[str, Any]] = [
        {
            "protocol": "linear",
            "results": {"top-1": {"conv3": 0.5, "conv4": 0.4}},
            "headline": ["top-1", "conv3"],
            "notes": [],
        },
        {"protocol": "clusters", "results": {"nmi": {"val": 0.25}}, "headline": ["nmi", "val"], "data_folder": EVIL},
        {"protocol": "odd", "results": {}, "headline": ["nothing", "here"]},
    ]
    about = replace(facts_of(lines, complaint="one cluster holds 97% of the images"), evaluations=evaluations)
    html = glance_section(about).html
    for words in (
        "2 of 9",
        "0.400",
        "25.0%",
        "one cluster holds 97% of the images",
        "50.0%",
        "0.250",
        "Not finished",
        "ln K = 2.08",
    ):
        assert words in html, words
    finished = glance_section(replace(about, finished=True, ended=datetime(2026, 11, 22, 9, 5), complaint=None)).html
    assert "Finished 2026-11-22 09:05" in finished and "needs attention" not in finished


# Filters and top images


def write_grids(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in (
        "filters/conv10/grid.png",
        "filters/conv2/grid.png",
        "top-images/conv5/pairs-2.png",
        "top-images/conv5/pairs-10.png",
        "top-images/conv5/other-1.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (300, 1500, 3), dtype=np.uint8)).save(folder / name)
    about = {"stage": "conv2", "objective": "fourier", "data": EVIL, "channels": {"0": {}}}
    (folder / "filters" / "conv2" / "filters.json").write_text(json.dumps(about))
    (folder / "filters" / "conv10" / "filters.json").write_text("[spoiled")
    (folder / "top-images" / "conv5" / "top-images.json").write_text(json.dumps({"data": "/home/me/photos/", "count": 9}))
    return folder


def test_pictures_are_found_in_order_and_kept_within_bytes(tmp_path: Path) -> None:
    folder = write_grids(tmp_path)
    titles = [picture.title for picture in find_pictures(folder)]
    assert titles[:2] == ["Filters of conv2", "Filters of conv10"]
    assert titles[2:] == ["Images that excite conv5 (page 1 of 2)"]
    html = pictures_section(folder, max_bytes=400_000).html
    assert html.count("data:image/webp;base64,") == 3 and "Made with --objective fourier." in html
    assert "<code>visualization/filters/conv2/grid.png</code>".replace("visualization", folder.name) in html
    assert str(folder) not in html and "/home/me" not in html, "the page may be mailed"
    assert "Searched: photos. Images per filter: 9." in html
    assert 100_000 < len(html) < 400_000 + 4_000
    assert 'width="1200"' in pictures_section(folder, max_bytes=40_000_000).html
    nothing_fits = pictures_section(folder, max_bytes=1_000).html
    assert nothing_fits.count("does not fit") == 3 and "base64" not in nothing_fits


def test_without_pictures_the_commands_are_told(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        html = pictures_section(folder, run="runs/<b>").html
        assert "deepcluster visualize filters runs/&lt;b&gt;" in html and "visualize top-images" in html
    (tmp_path / "filters" / "conv1").mkdir(parents=True)
    (tmp_path / "filters" / "conv1" / "grid.png").write_bytes(b"no picture")
    assert "can't be read" in pictures_section(tmp_path).html.replace("&#39;", "'")


# All of them, in a browser


def evil_sections(folder: Path) -> list[Section]:
    points_MP, cluster_N = blobs_of_points(60)
    points_MP[1] = points_MP[0]
    collection = replace(
        collection_of(points_MP, cluster_N),
        names=[f"{EVIL}/{index:03}.png" for index in range(60)],
        label_N=np.arange(60) % 2,
        label_names=[EVIL, "second"],
        unreadable={f"{EVIL}.jpg": EVIL},
    )
    listing, odd = all_listed(collection), find_odd(collection)
    layout = lay_out(collection, images=60, seed=0)
    config = {
        "settings": {"arch": EVIL, "lr": 0.1},
        "changed_by_recipe": {"lr": {"value": 0.1, "reason": EVIL}},
        "data": {"description": EVIL, "classes": [EVIL]},
        "command": EVIL,
    }
    about = replace(facts_of([metrics_line(1), metrics_line(2)]), config=config, complaint=EVIL, folder=EVIL)
    rows = Section("rows", "Rows", pictures_section(folder / "none").html, listing.blobs(Thumbnails(0)))
    return [
        glance_section(about),
        map_section(collection, layout, listing),
        odd_section(collection, odd, listing, EVIL),
        pictures_section(write_grids(folder), max_bytes=200_000, run=EVIL),
        rows,
    ]


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    for section in evil_sections(tmp_path):
        assert "<img src=x" not in section.html, section.name
        assert "onerror=&#34;" in section.html or section.name in ("map", "rows"), section.name


@pytest.fixture(scope="module")
def browser_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A page of these sections in a real browser, with the messages of its console."""
    folder = tmp_path_factory.mktemp("page")
    write_page(folder / "report.html", "a run", evil_sections(folder / "pictures"))
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(10_000)
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda fault: page.said.append(str(fault)))
        page.goto((folder / "report.html").as_uri())
        page.locator("#map-plot").evaluate("plot => plot.scrollIntoView({behavior: 'instant', block: 'center'})")
        page.wait_for_selector("#map-plot[data-drawn]")
        yield page
        assert page.said == []
        assert page.title() == "a run"


def drawn(page: Any, what: str) -> None:
    page.wait_for_selector(f'#map-plot[data-drawn="{what}"]')


def test_charts_offer_no_upload(browser_page: Any) -> None:
    drawn(browser_page, "tsne cluster -1")
    browser_page.locator(".figure").first.scroll_into_view_if_needed()
    browser_page.wait_for_selector(".figure .modebar-btn", state="attached")
    titles = {button.get_attribute("data-title") for button in browser_page.locator(".modebar-btn").all()}
    assert titles == {"Download plot as a PNG", "Reset axes"}
    browser_page.locator("#map-plot").evaluate("plot => plot.scrollIntoView({behavior: 'instant', block: 'center'})")


def test_the_map_switches_places_and_colours(browser_page: Any) -> None:
    drawn(browser_page, "tsne cluster -1")
    browser_page.check("input[value=pca]")
    drawn(browser_page, "pca cluster -1")
    assert browser_page.locator("#map-legend button").count() == 3
    browser_page.check("input[value=label]")
    drawn(browser_page, "pca label -1")
    assert browser_page.locator("#map-legend button").all_inner_texts() == [EVIL, "second"]
    browser_page.fill("#map-highlight", "second")
    drawn(browser_page, "pca label 1")
    assert browser_page.evaluate("document.getElementById('map-plot').data.map(t => t.x.length)") == [30, 30]
    browser_page.evaluate("dispatchEvent(new CustomEvent('deepcluster:cluster', {detail: 2}))")
    drawn(browser_page, "pca cluster 2")
    assert browser_page.evaluate("document.getElementById('map-plot').data.map(t => t.x.length)") == [40, 20]


def test_hovering_and_clicking_a_dot_shows_its_image(browser_page: Any) -> None:
    place = browser_page.evaluate(
        """(() => {
          const plot = document.getElementById("map-plot"), { xaxis, yaxis } = plot._fullLayout, dots = plot.data.at(-1);
          plot.scrollIntoView({ behavior: "instant", block: "center" });
          const box = plot.getBoundingClientRect();
          return [box.left + xaxis._offset + xaxis.d2p(dots.x[0]), box.top + yaxis._offset + yaxis.d2p(dots.y[0])];
        })()"""
    )
    browser_page.mouse.move(place[0] + 30, place[1] + 30)
    browser_page.mouse.move(place[0], place[1], steps=3)
    panel = browser_page.locator("#map-hover")
    panel.wait_for(state="visible")
    assert EVIL in panel.inner_text() and panel.locator("[role=img]").count() == 1
    browser_page.mouse.click(place[0], place[1])
    held = browser_page.locator("#map-held")
    held.wait_for(state="visible")
    assert EVIL in held.inner_text() and held.locator("a[data-cluster]").count() == 1


def test_the_keyboard_walks_over_the_map(browser_page: Any) -> None:
    plot = browser_page.locator("#map-plot")
    plot.focus()
    browser_page.keyboard.press("Escape")
    browser_page.locator("#map-held").wait_for(state="hidden")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp"):
        browser_page.keyboard.press(key)
        seen.append(browser_page.locator("#map-held a").first.get_attribute("href"))
    assert seen[0] != seen[1] and len(set(seen)) >= 3
    assert EVIL in browser_page.locator("#said").inner_text()
    full = browser_page.evaluate("document.getElementById('map-plot')._fullLayout.xaxis.range")
    browser_page.keyboard.press("+")
    nearer = browser_page.evaluate("document.getElementById('map-plot')._fullLayout.xaxis.range")
    assert nearer[1] - nearer[0] == pytest.approx((full[1] - full[0]) / 2)
    browser_page.evaluate("deepcluster.openImage = row => { window.opened = row; }")
    browser_page.keyboard.press("Enter")
    assert browser_page.evaluate("`#image=${window.opened}`") == seen[-1]


def test_curves_are_drawn_and_names_do_nothing(browser_page: Any) -> None:
    browser_page.locator("#run-loss").scroll_into_view_if_needed()
    browser_page.wait_for_selector("#run-loss .scatterlayer .trace")
    assert "Loss" in (browser_page.locator("#run-loss").get_attribute("aria-label") or "")
    assert browser_page.locator("img[src=x]").count() == 0
