"""The page in a real browser: gallery, search, one cluster, one image, keyboard, themes, phone, names that mean harm."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsers import Visit, chromium
from numpy.typing import NDArray
from PIL import Image

from deepcluster.data.sources import ImageSource
from deepcluster.visualization.report.collection import Collection, Past
from deepcluster.visualization.report.gallery.clusters import ClusterFacts, describe_clusters
from deepcluster.visualization.report.gallery.rows import Listing, by_importance, gallery_section, list_rows
from deepcluster.visualization.report.gallery.thumbnails import make_thumbnails
from deepcluster.visualization.report.page import Blob, Section, asset, json_blob, render, write_page

pytest.importorskip("plotly", reason="the report needs: pip install jinja2 plotly")
markupsafe = pytest.importorskip("markupsafe")

CLUSTERS, EMPTY, SHOWN = 30, 29, 24
HARMFUL = [
    "<img src=x onerror=window.hacked=1>.jpg",
    '"><script>window.hacked=1</script>.jpg',
    "a </script><script>window.hacked=1</script>.jpg",
    "it's \"quoted\" & 'so'.jpg",
    "folder/" + "very-long-" * 24 + "name.jpg",
    "猫の写真/三毛猫.jpg",
    "party 🎉👩‍👩‍👧.jpg",
    "\u202egpj.left-from-right.jpg",
    "javascript:window.hacked=1.jpg",
    "Caf\u0065\u0301 PARIS.jpg",
]
LABELS = ["<b onmouseover=window.hacked=1>cats</b>", "dogs", "birds"]


class Painted(ImageSource):
    """Images of one colour each, that tells which image it is."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> NDArray[np.uint8]:
        return np.full((40, 40, 3), colour(index), np.uint8)

    def stamp(self, index: int) -> str:
        return ""

    def details(self) -> str:
        return "painted"


def colour(index: int) -> tuple[int, int, int]:
    return (37 * index % 200 + 30, 91 * index % 200 + 30, 53 * index % 200 + 30)


@dataclass(frozen=True)
class Made:
    """A page, and what it was made of."""

    address: str
    collection: Collection
    facts: ClusterFacts
    listing: Listing

    def names_of(self, indices: Any) -> list[str]:
        return [self.collection.names[index] for index in indices if index >= 0]

    def by(self, key: Callable[[int], float]) -> list[int]:
        return sorted(range(CLUSTERS), key=lambda cluster: (key(cluster), cluster))


def make_collection() -> Collection:
    """900 images in 30 clusters, the last one empty, the first one of 150, and two images in none."""
    rng = np.random.default_rng(5)
    names = HARMFUL + [f"photos/{number:04}.jpg" for number in range(890)]
    cluster_N = np.concatenate([np.zeros(150), 1 + rng.permutation(748) % 28, [-1, -1]]).astype(np.int64)
    distance_N = np.where(cluster_N < 0, np.nan, rng.uniform(0.2, 1, 900) + 0.02 * cluster_N).astype(np.float32)
    past = [Past(2, lambda: np.where(cluster_N == 0, 3, cluster_N)), Past(4, lambda: cluster_N)]
    return Collection(
        title="Cats & <dogs>",
        names=names,
        cluster_N=cluster_N,
        distance_N=distance_N,
        n_clusters=CLUSTERS,
        label_N=rng.integers(-1, 3, 900),
        label_names=LABELS,
        centroids_KP=torch.from_numpy(rng.normal(size=(CLUSTERS, 4)).astype(np.float32)),
        past=past,
        images=Painted(names),
        table="assignments/epoch-0004.parquet",
    )


def figure_section() -> Section:
    html = markupsafe.Markup(
        '<details><summary>Curves</summary><div class="figure" id="curve" role="img" aria-label="loss"></div></details>'
        '<p>An odd one: <span class="thumb" data-row="3">name</span></p>'
        '<div class="table-wrap"><table><tr>' + "<td>a-wide-cell-of-a-table</td>" * 12 + "</tr></table></div>"
    )
    dots = {"type": "scatter", "x": [1, 2, 3], "y": [3, 1, 2], "name": "loss"}
    return Section(
        "run", "The run", html, {}, {"curve": json.dumps({"data": [dots], "layout": {"title": {"text": "Loss"}}})}
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    collection = make_collection()
    facts = describe_clusters(collection, seed=1)
    listing = list_rows(collection, by_importance(collection, facts.exemplars()))
    pictured = np.arange(len(collection) - 5)  # The last ones have no thumbnail.
    assert collection.images is not None
    thumbnails = make_thumbnails(collection.images, pictured, side=32, workers=1)
    sections = [figure_section(), gallery_section(collection, facts, listing, thumbnails)]
    folder = tmp_path_factory.mktemp("page")
    write_page(folder / "page.html", collection.title, sections)
    write_page(folder / "live.html", collection.title, sections, refresh_seconds=1)
    return Made((folder / "page.html").as_uri(), collection, facts, listing)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Any, made: Made) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end nothing may have gone wrong in it."""
    visits: list[Visit] = []

    def open_page(hash_: str = "", address: str = made.address, **options: Any) -> Any:
        visits.append(Visit(browser, address + hash_, **options))
        return visits[-1].page

    yield open_page
    for visit in visits:
        assert visit.complaints == []
        assert visit.page.evaluate("window.hacked") is None
        visit.close()


def cards(page: Any) -> list[int]:
    """Clusters of the cards that are shown, in order."""
    page.wait_for_selector("#gallery .card")
    return [int(word.split()[1]) for word in page.locator("#gallery .card h3").all_inner_texts()]


def heading(page: Any, text: str) -> None:
    """Wait until the view of this heading is open."""
    page.wait_for_function("text => document.getElementById('detail-title')?.textContent === text", arg=text)
    assert page.evaluate("document.activeElement.id") == "detail-title"
    assert page.title().startswith(text)


def focused(page: Any) -> str:
    text: str = page.evaluate("document.activeElement.getAttribute('href') ?? document.activeElement.id")
    return text


def names(group: Any) -> list[str]:
    """Names of the thumbnails of a group, as a screen reader has them."""
    return [thumb.get_attribute("aria-label") for thumb in group.locator(".thumb").all()]


def test_the_page_opens_and_draws_what_comes_into_view(visit: Any) -> None:
    page = visit()
    cards(page)
    assert not page.evaluate("'Plotly' in window")
    page.click("summary")
    page.wait_for_selector("#curve.drawn .main-svg")
    ink = page.evaluate("getComputedStyle(document.querySelector('#curve .gtitle')).fill")
    page.click("#theme")
    page.wait_for_function("ink => getComputedStyle(document.querySelector('#curve .gtitle')).fill !== ink", arg=ink)
    assert page.locator("#run p a.tile").get_attribute("href") == "#image=3"
    assert page.locator("#top nav a").all_inner_texts() == ["The run", "The clusters"]
    assert page.locator("#top nav a[aria-current]").inner_text() == "The run"
    page.click("#top nav a >> nth=1")
    page.wait_for_selector("#top nav a[href='#clusters'][aria-current]")


def test_cards_tell_size_labels_and_show_the_right_images(visit: Any, made: Made) -> None:
    page = visit()
    assert cards(page) == made.by(lambda cluster: -made.facts.sizes_K[cluster])[:SHOWN]
    first = page.locator("#gallery .card").first
    assert "150 images" in first.inner_text()
    assert f"mean distance {made.facts.tightness_K[0]:.3f}" in first.inner_text()
    assert names(first) == made.names_of(made.facts.nearest_KS[0])
    top = made.facts.label_KT[0, 0]
    share = round(100 * made.facts.label_count_KT[0, 0] / 150)
    assert first.locator(".mix").get_attribute("aria-label").startswith(f"labels: {LABELS[top]} {share} %")
    page.get_by_label("all three").check()
    groups = page.locator("#gallery .card").first.locator(".thumbs")
    for group, kind in zip(groups.all(), ("nearest", "random", "farthest"), strict=True):
        assert names(group) == made.names_of(getattr(made.facts, f"{kind}_KS")[0])
        assert group.get_attribute("aria-label") == f"{kind} images of cluster 0"


def test_each_thumbnail_is_of_its_image(visit: Any, made: Made) -> None:
    """From all four sheets, of which the last is lower than the others."""
    page = visit("#cluster=5")
    heading(page, "Cluster 5")
    page.wait_for_function("() => document.querySelectorAll('#detail .images .thumb:not(.seen, .none)').length === 0")
    page.wait_for_timeout(300)  # Rules are there; their pictures are decoded.
    host = page.locator("#detail .images")
    whole = np.asarray(Image.open(io.BytesIO(host.screenshot())).convert("RGB"), np.float64)
    middles = host.evaluate(
        """(host) => [...host.querySelectorAll(".thumb.seen")].map((thumb) => {
          const [all, one] = [host.getBoundingClientRect(), thumb.getBoundingClientRect()];
          return [thumb.ariaLabel, one.top - all.top + one.height / 2, one.left - all.left + one.width / 2];
        })"""
    )
    seen: set[int] = set()
    for name, y, x in middles:
        index = made.collection.names.index(name)
        middle = whole[round(y) - 8 : round(y) + 8, round(x) - 8 : round(x) + 8].mean((0, 1))
        np.testing.assert_allclose(middle, colour(index), atol=12)
        seen.add(index // 256)
    assert {1, 2} <= seen


def test_sort_changes_the_order(visit: Any, made: Made) -> None:
    columns = {"size": made.facts.sizes_K, "tightness": made.facts.tightness_K, "number": np.arange(CLUSTERS)}
    page = visit()
    cards(page)
    for way in ("size-ascending", "tightness-ascending", "tightness-descending", "number-descending"):
        key, direction = way.split("-")
        values = np.nan_to_num(columns[key] * (1.0 if direction == "ascending" else -1.0), nan=np.inf)
        page.select_option("#gallery-sort", way)
        assert cards(page) == made.by(lambda cluster: values[cluster])[:SHOWN], way  # noqa: B023 (called at once)


def test_pages_and_jump(visit: Any, made: Made) -> None:
    page = visit()
    cards(page)
    assert page.locator("#gallery-pages .count").inner_text() == "1 – 24 of 30 clusters"
    assert page.locator("#gallery-pages .previous").is_disabled()
    page.click("#gallery-pages .next")
    assert cards(page) == made.by(lambda cluster: -made.facts.sizes_K[cluster])[SHOWN:]
    assert page.locator("#gallery-pages .next").is_disabled()
    assert "no images" in page.locator("#gallery .card").last.inner_text()
    page.fill("#gallery-jump", "7")
    page.keyboard.press("Enter")
    heading(page, "Cluster 7")


def test_search_finds_names_in_any_case_and_form(visit: Any, made: Made) -> None:
    page = visit()
    cards(page)
    told = page.locator("#gallery-hits [role=status]")

    def sought(words: str) -> list[str]:
        page.fill("#gallery-search", words)
        page.wait_for_function("words => document.getElementById('gallery-hits').dataset.words === words", arg=words)
        found: list[str] = page.locator("#gallery-hits .name").all_inner_texts()
        return found

    assert sought("PHOTOS/012") == [f"photos/{number:04}.jpg" for number in order(made, "photos/012")]
    assert sought("café paris") == [HARMFUL[-1]]
    assert sought("三毛") == ["猫の写真/三毛猫.jpg"]
    assert sought("onerror") == [HARMFUL[0]]
    assert len(sought("photos/")) == 200
    assert told.inner_text() == "890 images found; the first 200 are shown"
    assert (sought("no such name"), told.inner_text()) == ([], "0 images found")
    page.keyboard.press("Escape")
    assert page.locator("#gallery-hits").is_hidden()
    sought("三毛")
    page.click("#gallery-hits li > a:last-child")
    heading(page, "Cluster 0")


def order(made: Made, beginning: str) -> list[int]:
    """Numbers of the photos whose names begin so, in the order of the rows."""
    listed = made.names_of(made.listing.indices_R)
    return [int(name[7:11]) for name in listed if name.startswith(beginning)]


def test_a_cluster_shows_all_its_images_labels_past_and_neighbours(visit: Any, made: Made) -> None:
    page = visit("#cluster=0")
    heading(page, "Cluster 0")
    first, count = 0, 150
    rows = made.names_of(made.listing.indices_R[first : first + count])
    assert names(page.locator("#detail .images")) == rows[:100]
    distances = [float(word) for word in page.locator("#detail .images .tile .soft").all_inner_texts()]
    assert distances == sorted(distances)
    page.get_by_text("farther →").click()
    assert names(page.locator("#detail .images")) == rows[100:]
    assert page.locator("#detail .truth").inner_text() == "150 images, nearest to the centre first."
    assert page.locator(".mix-list li").count() == 4  # Three labels, and those without one.
    past = [words.split("\n") for words in page.locator("ol.past li").all_inner_texts()]
    assert [" ".join(words[:3]) for words in past] == ["epoch 2 cluster 3 held 100 %", "epoch 4 cluster 0 held 100 %"]
    near = [int(words.split()[1]) for words in page.locator("#detail .card h4").all_inner_texts()]
    assert near == [cluster for cluster in made.facts.neighbours_KJ[0].tolist() if cluster >= 0]
    assert page.locator("ol.past a").count() == 0, "the cluster of that number is another one today"
    page.locator("#detail .card h4 a").first.click()
    heading(page, f"Cluster {near[0]}")


def test_back_keeps_the_place_and_the_browsers_buttons_work(visit: Any) -> None:
    page = visit()
    cards(page)
    page.click("#gallery-pages .next")
    link = page.locator("#gallery .card a[data-cluster]").last
    link.scroll_into_view_if_needed()
    before = page.evaluate("scrollY")
    page.keyboard.press("Escape")  # Means nothing here.
    link.click()
    heading(page, f"Cluster {EMPTY}")
    page.keyboard.press("Escape")
    assert (page.evaluate("scrollY"), page.locator("#detail").is_hidden()) == (before, True)
    assert focused(page) == f"#cluster={EMPTY}"
    page.go_back()
    heading(page, f"Cluster {EMPTY}")
    page.go_back()
    page.wait_for_selector("#gallery .card", state="visible")
    assert page.locator("#gallery-pages .count").inner_text() == "25 – 30 of 30 clusters"
    page.wait_for_function("before => Math.abs(scrollY - before) < 2", arg=before)
    page.go_forward()
    heading(page, f"Cluster {EMPTY}")
    page.click("#top nav a[href='#run']")
    page.wait_for_selector("#run-title", state="visible")
    assert page.evaluate("scrollY") < 200
    assert page.title() == "Cats & <dogs>"


def test_what_is_not_there_is_said(visit: Any) -> None:
    page = visit("#cluster=30")
    heading(page, "Not here")
    assert page.locator("#detail .notice").inner_text() == "There is no cluster 30: they are 0 to 29."
    page.evaluate("location.hash = '#image=900'")
    page.wait_for_function("() => document.querySelector('#detail .notice').textContent.includes('no image 900')")
    page.evaluate("location.hash = '#cluster=29'")
    heading(page, "Cluster 29")
    assert "No images" in page.locator("#detail .truth").inner_text()


def test_an_image_tells_its_name_place_and_neighbours(visit: Any, made: Made) -> None:
    row = 160
    index = int(made.listing.indices_R[row])
    cluster = int(made.collection.cluster_N[index])
    page = visit(f"#image={row}")
    heading(page, made.collection.names[index].split("/")[-1])
    assert page.input_value("#image-name") == made.collection.names[index]
    words = page.locator(".image-facts").inner_text()
    size = made.facts.sizes_K[cluster]
    assert f"cluster {cluster}" in words
    assert f"{row - 150 + 1} of {size}" in words
    current = page.locator("#detail .tile[aria-current]")
    assert names(current) == [made.collection.names[index]]
    assert names(page.locator("#detail > .thumbs")) == made.names_of(made.listing.indices_R[150 : 150 + min(25, size)])
    page.keyboard.press("ArrowRight")
    heading(page, made.collection.names[made.listing.indices_R[row + 1]].split("/")[-1])
    page.evaluate("location.hash = '#image=899'")
    page.wait_for_function("() => document.querySelector('.image-facts')?.textContent.includes('clusternone')")
    assert page.locator("#detail > .thumbs .tile").count() == 2
    assert page.locator("#detail .thumb.none").count() == 3  # The large one, and both of those beside.


def test_the_keyboard_alone_is_enough(visit: Any, made: Made) -> None:
    page = visit()
    shown = cards(page)
    page.keyboard.press("/")
    assert focused(page) == "gallery-search"
    page.keyboard.type("?/n")  # Typed words, not commands.
    assert page.input_value("#gallery-search") == "?/n"
    page.keyboard.press("Escape")
    page.locator("#gallery .card a").first.focus()
    assert focused(page) == f"#cluster={shown[0]}"
    assert page.locator("#gallery .thumbs").first.locator("a[tabindex='0']").count() == 1
    rows = made.listing.row_of(made.facts.nearest_KS[shown[0]]).tolist()
    page.keyboard.press("Tab")
    assert focused(page) == f"#image={rows[0]}"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    for key, place in [("ArrowRight", 1), ("ArrowDown", 5), ("ArrowLeft", 4), ("ArrowUp", 0), ("End", 7), ("Home", 0)]:
        page.keyboard.press(key)
        assert focused(page) == f"#image={rows[place]}", key
    page.keyboard.press("Tab")
    assert focused(page) == f"#cluster={shown[1]}"  # A group is one stop.
    page.keyboard.press("Enter")
    heading(page, f"Cluster {shown[1]}")
    page.keyboard.press("n")
    heading(page, f"Cluster {shown[1] + 1}")
    page.keyboard.press("p")
    heading(page, f"Cluster {shown[1]}")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("n")  # Means nothing while the help is open.
    page.keyboard.press("Escape")
    assert page.locator("#keys").is_hidden()
    heading(page, f"Cluster {shown[1]}")
    page.keyboard.press("Escape")
    assert focused(page) == f"#cluster={shown[1]}"


def luminance(value: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(value[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_both_themes_can_be_read_and_the_choice_is_kept(visit: Any) -> None:
    page = visit(color_scheme="dark")
    for theme in ("dark", "light"):
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        read = "name => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
        value = {name: page.evaluate(read, f"--{name}") for name in ("ink", "soft", "accent", "paper", "panel", "tint")}
        for text in ("ink", "soft", "accent"):
            for ground in ("paper", "panel", "tint"):
                assert contrast(value[text], value[ground]) >= 4.5, (theme, text, ground)
        for colour_ in page.evaluate("deepcluster.colours()"):
            assert min(contrast(colour_, value["paper"]), contrast(colour_, value["panel"])) >= 3, (theme, colour_)
        page.click("#theme")
    page.click("#theme")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_nothing_is_wider_than_a_phone(visit: Any, made: Made) -> None:
    page = visit(width=360, height=740, has_touch=True)
    cards(page)
    page.click("summary")
    page.wait_for_selector("#curve.drawn")
    page.fill("#gallery-search", "long")
    page.wait_for_selector("#gallery-hits li")
    long_name = made.listing.row_of(np.array([4]))[0]
    for hash_ in ("", "#clusters", "#cluster=0", "#image=0", f"#image={long_name}"):
        page.evaluate("hash => { location.hash = hash }", hash_)
        page.wait_for_function("hash => !hash.includes('=') || !document.getElementById('detail').hidden", arg=hash_)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), hash_
    mask = "getComputedStyle(document.querySelector('#top nav')).maskImage"
    assert page.evaluate(mask).count("rgba(0, 0, 0, 0)") == 1, "names that are cut off at the right fade"
    page.evaluate("Object.assign(document.querySelector('#top nav').style, { flex: 'none', width: '5rem' })")
    page.evaluate("document.querySelector('#top nav').scrollTo({ left: 40, behavior: 'instant' })")
    page.wait_for_function(f"() => {mask}.split('rgba(0, 0, 0, 0)').length === 3")


def test_everything_has_a_name(visit: Any) -> None:
    """Basics that automatic checks of accessibility look for."""
    page = visit()
    cards(page)
    unnamed = """() => [...document.querySelectorAll(
        'img, [role=img], [role=group], [role=region], nav, dialog, button, a, input, select')]
      .filter((e) => e.offsetParent !== null || e.closest('dialog'))
      .filter((e) => !(e.getAttribute('aria-label') || e.alt || e.textContent.trim() || e.labels?.length
        || e.getAttribute('aria-labelledby') || e.querySelector('[aria-label]')))
      .map((e) => e.outerHTML)"""
    problems = """() => {
      const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
      const heads = [...document.querySelectorAll('h1, h2, h3, h4')].filter((e) => e.offsetParent !== null);
      const levels = heads.map((e) => Number(e.tagName[1]));
      const jumps = levels.filter((level, at) => level > (levels[at - 1] ?? 0) + 1);
      return [ids.filter((id, at) => ids.indexOf(id) !== at), jumps];
    }"""
    for hash_ in ("", "#cluster=0", "#image=0"):
        if hash_:
            page.evaluate("hash => { location.hash = hash }", hash_)
            page.wait_for_function("hash => document.querySelector('#detail h2') && location.hash === hash", arg=hash_)
        assert page.evaluate(unnamed) == []
        assert page.evaluate(problems) == [[], []]
        assert page.locator("h1").count() == 1
        assert page.locator("main").count() == 1
    assert page.evaluate("document.documentElement.lang") == "en"


def test_names_are_text_whatever_they_are(visit: Any, made: Made) -> None:
    page = visit()
    cards(page)
    for index, name in enumerate(HARMFUL):
        row = int(made.listing.row_of(np.array([index]))[0])
        page.evaluate("row => deepcluster.openImage(row)", row)
        heading(page, name.split("/")[-1])
        assert page.input_value("#image-name") == name
        assert page.locator(".thumb.large").get_attribute("aria-label") == name
    page.evaluate("deepcluster.openCluster(0)")
    heading(page, "Cluster 0")
    shown = page.locator(".mix-list bdi").all_inner_texts()
    assert LABELS[0] in shown
    assert page.locator("h1").inner_text() == "Cats & <dogs>"
    assert page.locator("main script, main img, main b").count() == 0


def test_a_live_page_reads_itself_again_and_stays_where_it_was(visit: Any, made: Made) -> None:
    page = visit("#clusters", made.address.replace("page.html", "live.html"))
    cards(page)
    page.evaluate("window.same = true")
    page.locator("#gallery-search").focus()
    page.wait_for_timeout(1300)
    assert page.evaluate("window.same") is True  # Not while somebody types.
    assert page.locator("#live-time").inner_text().startswith("live: refreshed at ")
    press = "document.getElementById('live-pause').click()"
    page.evaluate(press)
    page.select_option("#gallery-sort", "number-descending")
    page.click("#gallery-pages .next")
    page.evaluate("document.activeElement.blur(), scrollTo({ top: 300, behavior: 'instant' })")
    page.wait_for_timeout(1100)
    assert page.evaluate("window.same") is True  # Nor while it is paused.
    page.evaluate(press)
    page.wait_for_function("() => !window.same")
    assert cards(page) == [5, 4, 3, 2, 1, 0]
    page.wait_for_function("() => Math.abs(scrollY - 300) < 2")


def test_a_live_page_holds_its_place_while_pictures_above_it_come(visit: Any, made: Made) -> None:
    page = visit("", made.address.replace("page.html", "live.html"))
    cards(page)
    page.add_init_script(
        """addEventListener("load", () => setTimeout(() => {
            const late = document.createElement("div");
            late.id = "late";
            late.style.height = "500px";
            document.querySelector("main").prepend(late);
        }, 400))"""
    )
    page.evaluate("scrollTo({ top: 300, behavior: 'instant' })")
    page.wait_for_selector("#late", state="attached")
    page.wait_for_function("() => Math.abs(scrollY - 300) < 2")


def test_an_old_browser_is_told_so(browser: Any, made: Made) -> None:
    context = browser.new_context()
    context.add_init_script("delete window.DecompressionStream")
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.goto(made.address)
    assert "Firefox 113" in page.locator("#too-old").inner_text()
    assert faults == []
    context.close()


def large_section(rows: int, clusters: int) -> Section:
    """A million names in 10,000 clusters, half of whose images are listed, without pictures."""
    per = rows // clusters
    first = [per * cluster for cluster in range(clusters)]
    block = 65_536
    blobs = {
        f"names-{number}": Blob(
            "\0".join(f"train/n{row % 1000:08}/photo_{row:07}.JPEG" for row in range(at, min(at + block, rows))).encode()
        )
        for number, at in enumerate(range(0, rows, block))
    }
    blobs["rows"] = json_blob(
        {
            **{"rows": rows, "images": 2 * rows, "clusters": clusters, "block": block, "blocks": len(blobs), "labels": []},
            **{"table": "big.parquet", "thumbnails": {"side": 32, "across": 16, "a_sheet": 256, "count": 0}},
        }
    )
    blobs["row-cluster"] = Blob(np.repeat(np.arange(clusters, dtype="<i4"), per).tobytes())
    blobs["row-distance"] = Blob(np.tile(np.linspace(0.2, 1, per, dtype="<f4"), clusters).tobytes())
    blobs["row-thumbnail"] = Blob(np.full(rows, -1, "<i4").tobytes())
    some = [[at + step for step in range(4)] for at in first]
    blobs["clusters"] = json_blob(
        {
            **{"size": [2 * per] * clusters, "tightness": [0.5 + (k * 7919 % clusters) / clusters for k in range(clusters)]},
            **{"first_row": first, "listed": [per] * clusters, "nearest": some, "random": some, "farthest": some},
            **{"neighbours": [[(k + step) % clusters for step in range(1, 9)] for k in range(clusters)]},
            "past": {"epochs": [1, 2], "cluster": [[k, k] for k in range(clusters)], "share": [[0.5, 0.9]] * clusters},
        }
    )
    values = {"about": "Large.", "left_out": [], "without_pictures": True, "has_labels": False, "has_distances": True}
    scripts = (asset("gallery.js"), asset("detail.js"))
    return Section("clusters", "The clusters", render("gallery.html.jinja", **values), blobs, scripts=scripts)


# Waits until something holds, looking at every frame; gives the milliseconds since the page was begun.
WAIT = """async (holds) => {
  while (!holds()) await new Promise(requestAnimationFrame);
  return performance.now();
}"""


@pytest.mark.slow
def test_a_million_images_in_ten_thousand_clusters(visit: Any, tmp_path: Path, capsys: Any) -> None:
    """What each reaction takes is printed (`-s`), not judged: machines differ."""
    write_page(tmp_path / "large.html", "large", [large_section(1_000_000, 10_000)])
    page = visit("", (tmp_path / "large.html").as_uri())
    took: dict[str, float] = {"first card": page.evaluate(f"({WAIT})(() => document.querySelector('#gallery .card'))")}

    def react(what: str, act: str, until: str) -> None:
        timed = f"const begin = performance.now(); {act}; return await ({WAIT})(() => {until}) - begin;"
        took[what] = page.evaluate(f"async () => {{ {timed} }}")

    sort = "const s = document.getElementById('gallery-sort'); s.value = 'tightness-descending'"
    sort += "; s.dispatchEvent(new Event('change'))"
    react("sort", sort, 'document.querySelector("#gallery h3").textContent !== "Cluster 0"')
    react(
        "next page",
        "document.querySelector('#gallery-pages .next').click()",
        'document.querySelector("#gallery-pages .count").textContent.startsWith("25")',
    )
    for words, found in (("photo_0999999", "1 "), ("photo", "1,000,000 "), ("photo_05", "100,000 ")):
        type_ = (
            f"const s = document.getElementById('gallery-search'); s.value = '{words}'; s.dispatchEvent(new Event('input'))"
        )
        react(
            f"search {words}",
            type_,
            f'document.querySelector("#gallery-hits [role=status]")?.textContent.startsWith("{found}")',
        )
    react(
        "cluster", "deepcluster.openCluster(9999)", 'document.getElementById("detail-title")?.textContent === "Cluster 9999"'
    )
    truth = "200 images, 100 of them are in this page; all are in big.parquet."
    assert page.locator(".truth").inner_text() == truth
    react(
        "image",
        "deepcluster.openImage(999999)",
        'document.getElementById("detail-title")?.textContent === "photo_0999999.JPEG"',
    )
    react("back", "deepcluster.closeDetail()", 'document.getElementById("detail").hidden')
    assert page.locator("*").count() < 3000
    with capsys.disabled():
        print({what: f"{milliseconds:.0f} ms" for what, milliseconds in took.items()})


def test_a_title_with_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    size = write_page(tmp_path / "page.html", "caf\udce9", [])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "caf\\xe9" in text
    assert size == len(text.encode())
