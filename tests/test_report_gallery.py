"""What the report's page holds of clusters, rows and thumbnails, against naive loops; limits; names that are no text."""

import base64
import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_helper import write_classes
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from deepcluster.core.errors import Interrupted
from deepcluster.data.sources import open_source
from deepcluster.visualization.report.collection import Collection, Past, evenly, sorted_rows
from deepcluster.visualization.report.gallery.clusters import describe_clusters, exemplars_of
from deepcluster.visualization.report.gallery.rows import BLOCK, Listing, by_importance, gallery_section, list_rows, rounded
from deepcluster.visualization.report.gallery.thumbnails import (
    Thumbnails,
    make_thumbnails,
    most_thumbnails,
    sharpest_side,
    thumbnail_side,
)
from deepcluster.visualization.report.odd import find_odd
from deepcluster.visualization.report.page import Blob

pytest.importorskip("jinja2", reason="the report needs: pip install jinja2 plotly")
SIDE = 16
HOSTILE = [
    "a\nb.jpg",
    'say "no".jpg',
    "<img onerror=alert(1)>.jpg",
    "caf\udce9.jpg",
    "\ud800.jpg",
    "nul\0.jpg",
    "größe/ß.jpg",
    "",
]


def collection_of(n_images: int, n_clusters: int, seed: int = 0, **changes: Any) -> Collection:
    """Random clusters, the last one empty where there are several; some unassigned, some of unknown distance, some equal."""
    rng = np.random.default_rng(seed)
    cluster_N = rng.integers(-1, max(1, n_clusters - 1), n_images)
    distance_N = rng.integers(1, 30, n_images).astype(np.float32) / 8  # Ties.
    distance_N[rng.random(n_images) < 0.1] = np.nan
    distance_N[cluster_N < 0] = np.nan
    parts: dict[str, Any] = {
        "title": "made up",
        "names": [f"n{rng.integers(1000):08}/ILSVRC_{image:06}.JPEG" for image in range(n_images)],
        "cluster_N": cluster_N,
        "distance_N": distance_N,
        "n_clusters": n_clusters,
        "label_N": rng.integers(-1, 6, n_images),
        "label_names": [f"label {label}" for label in range(6)],
        "centroids_KP": torch.from_numpy(rng.normal(size=(n_clusters, 5)).astype(np.float32)),
        "table": "assignments/epoch-0045.parquet",
    }
    return Collection(**{**parts, **changes})


def members(collection: Collection, cluster: int, *, known: bool = False) -> list[int]:
    """Images of a cluster by (distance, index), those of unknown distance last or left out."""
    distances = collection.distance_N.tolist()
    images = [image for image, of in enumerate(collection.cluster_N.tolist()) if of == cluster]
    images = [image for image in images if not known or distances[image] == distances[image]]
    return sorted(images, key=lambda image: (distances[image] != distances[image], distances[image], image))


def there(values: NDArray[np.int64]) -> list[int]:
    return [value for value in values.tolist() if value >= 0]


def unpacked(blob: Blob) -> bytes:
    """As the browser unpacks it."""
    content = base64.b64decode(blob.packed())
    return content if blob.media_type else gzip.decompress(content)


def columns(blobs: dict[str, Blob]) -> dict[str, Any]:
    """Rows as the scripts read them."""
    about = json.loads(unpacked(blobs["rows"]))
    names: list[str] = []
    for block in range(about["blocks"]):
        names += unpacked(blobs[f"names-{block}"]).decode().split("\0")
    integers = {name: np.frombuffer(unpacked(blobs[f"row-{name}"]), "<i4") for name in ("cluster", "thumbnail")}
    return {"about": about, "name": names, "distance": np.frombuffer(unpacked(blobs["row-distance"]), "<f4"), **integers}


def listed(collection: Collection, most: int = 10**9) -> Listing:
    return list_rows(collection, by_importance(collection, []), most)


def packed_bytes(blobs: Any) -> int:
    return sum(len(blob.packed()) for blob in blobs)


def test_exemplars_are_those_of_sorted_lists() -> None:
    collection = collection_of(700, 9)
    facts = describe_clusters(collection, seed=1)
    count = exemplars_of(9)
    assert facts.sizes_K.tolist() == [len(members(collection, cluster)) for cluster in range(9)]
    assert facts.sizes_K[8] == 0
    for cluster in range(9):
        known, all_ = members(collection, cluster, known=True), members(collection, cluster)
        assert there(facts.nearest_KS[cluster]) == known[:count]
        assert there(facts.farthest_KS[cluster]) == known[::-1][:count]
        drawn = there(facts.random_KS[cluster])
        assert len(set(drawn)) == len(drawn) == min(count, len(all_))
        assert set(drawn) <= set(all_[count:])
        mean = np.mean(collection.distance_N[known].astype(np.float64)) if known else np.nan
        np.testing.assert_allclose(facts.tightness_K[cluster], mean, rtol=1e-12)


def test_random_images_are_a_function_of_the_seed_and_take_every_place() -> None:
    collection = collection_of(40, 2, cluster_N=np.zeros(40, dtype=np.int64))
    one, same, other = (describe_clusters(collection, seed=seed).random_KS[0].tolist() for seed in (5, 5, 6))
    assert one == same != other
    seen = {image for seed in range(200) for image in describe_clusters(collection, seed=seed).random_KS[0].tolist()}
    assert seen == set(members(collection, 0)[exemplars_of(2) :])


def test_small_clusters_draw_their_nearest_images_last() -> None:
    collection = collection_of(10, 1, cluster_N=np.zeros(10, dtype=np.int64), distance_N=np.arange(10, dtype=np.float32))
    drawn = describe_clusters(collection, seed=3).random_KS[0].tolist()
    assert set(drawn[:2]) == {8, 9}
    assert set(drawn[2:]) < set(range(8))


def test_label_mix_is_a_counter() -> None:
    collection = collection_of(400, 7)
    facts = describe_clusters(collection, seed=1)
    assert collection.label_N is not None
    for cluster in range(7):
        labels = collection.label_N[members(collection, cluster)].tolist()
        counts = Counter(label for label in labels if label >= 0)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:4]
        assert list(zip(there(facts.label_KT[cluster]), there(facts.label_count_KT[cluster]), strict=True)) == ranked
        purity = ranked[0][1] / counts.total() if ranked else np.nan
        np.testing.assert_allclose(facts.purity_K[cluster], purity)


def test_neighbours_are_those_of_all_distances_without_empty_clusters() -> None:
    collection = collection_of(2_000, 40)
    facts = describe_clusters(collection, seed=1)
    assert collection.centroids_KP is not None
    centroids_KP = collection.centroids_KP.double().numpy()
    distances_KK = cdist(centroids_KP, centroids_KP)
    distances_KK[:, facts.sizes_K == 0] = np.inf
    np.fill_diagonal(distances_KK, np.inf)
    expected = np.argsort(distances_KK, axis=1)[:, :8]
    expected[facts.sizes_K == 0] = -1
    assert facts.neighbours_KJ.tolist() == expected.tolist()


def test_neighbours_pass_over_centroids_that_are_no_numbers() -> None:
    collection = collection_of(200, 4)
    assert collection.centroids_KP is not None
    collection.centroids_KP[1] = torch.nan
    facts = describe_clusters(collection, seed=1)
    assert [sorted(there(near)) for near in facts.neighbours_KJ] == [[2], [], [0], []]


def test_past_is_counted_by_a_dictionary() -> None:
    rng = np.random.default_rng(4)
    collection = collection_of(900, 12, past=[])
    before = [rng.integers(-1, n_groups, 900) for n_groups in rng.integers(3, 30, 23).tolist()]
    before[0][:] = -1  # No image was in a cluster then.
    past = [Past(epoch + 1, lambda groups=groups: groups) for epoch, groups in enumerate(before)]
    facts = describe_clusters(collection_of(900, 12, past=past), seed=1)
    assert len(facts.past_epochs) == 10
    assert (facts.past_epochs[0], facts.past_epochs[-1]) == (1, 23)
    for cluster in range(12):
        images = members(collection, cluster)
        for column, epoch in enumerate(facts.past_epochs):
            groups = Counter(group for group in before[epoch - 1][images].tolist() if group >= 0)
            group, count = min(groups.items(), key=lambda item: (-item[1], item[0])) if groups else (-1, 0)
            assert facts.past_cluster_KE[cluster, column] == group
            assert facts.past_share_KE[cluster, column] == pytest.approx(count / len(images) if images else 0)


@pytest.mark.parametrize(("count", "places"), [(0, []), (1, [0]), (2, [0, 1]), (10, list(range(10)))])
def test_few_epochs_are_all_shown(count: int, places: list[int]) -> None:
    assert evenly(count, 10) == places


def test_rows_are_sorted_and_come_back() -> None:
    collection = collection_of(500, 8)
    listing = listed(collection)
    expected = [image for cluster in [*range(8), -1] for image in members(collection, cluster)]
    assert listing.is_complete
    assert listing.indices_R.tolist() == expected
    assert listing.row_of(listing.indices_R).tolist() == list(range(500))
    read = columns(listing.blobs(Thumbnails(SIDE)))
    assert read["name"] == [collection.names[image] for image in expected]
    assert read["cluster"].tolist() == collection.cluster_N[expected].tolist()
    np.testing.assert_allclose(read["distance"], collection.distance_N[expected], rtol=1 / 4000)
    assert set(read["thumbnail"].tolist()) == {-1}
    assert {key: read["about"][key] for key in ("rows", "images", "clusters", "blocks")} == {
        "rows": 500, "images": 500, "clusters": 8, "blocks": 1
    }  # fmt: skip


def test_names_of_many_blocks_come_back() -> None:
    collection = collection_of(BLOCK + 7, 3)
    listing = listed(collection)
    blobs = listing.blobs(Thumbnails(SIDE))
    assert len(unpacked(blobs["names-0"]).split(b"\0")) == BLOCK
    assert columns(blobs)["name"] == [collection.names[image] for image in listing.indices_R.tolist()]


def test_names_that_are_no_text_do_no_harm() -> None:
    n_images = len(HOSTILE)
    zeros = np.zeros(n_images, np.int64)
    collection = collection_of(n_images, 1, names=HOSTILE, cluster_N=zeros, distance_N=np.arange(n_images, dtype=np.float32))
    names = columns(listed(collection).blobs(Thumbnails(SIDE)))["name"]
    assert names[:3] == HOSTILE[:3]
    assert names[3:6] == [r"caf\xe9.jpg", r"\ud800.jpg", r"nul\x00.jpg"]
    assert names[6:] == HOSTILE[6:]


def test_short_distances_keep_their_order() -> None:
    distance_R = np.sort(np.random.default_rng(0).lognormal(0, 8, 5_000).astype(np.float32))
    assert (np.diff(rounded(distance_R)) >= 0).all()
    np.testing.assert_allclose(rounded(distance_R), distance_R, rtol=1 / 4000)
    odd = np.array([0, np.nan, np.inf], np.float32)
    np.testing.assert_array_equal(rounded(odd), odd)


@pytest.mark.parametrize("most", [0, 1, 300, 2_999, 3_000, 5_000])
def test_the_limit_of_rows_is_kept_and_used(most: int) -> None:
    collection = collection_of(3_000, 20)
    listing = listed(collection, most)
    assert len(listing) == min(most, 3_000)
    assert listing.is_complete == (most >= 3_000)
    assert listing.indices_R.tolist() == sorted_rows(collection, listing.indices_R).tolist()


def test_a_listing_of_the_largest_size_stays_small() -> None:
    """200,000 rows of a million images, with names as ImageNet's: some megabytes."""
    rng = np.random.default_rng(0)
    names = [f"n{rng.integers(1000):08}/ILSVRC_{image:07}.JPEG" for image in range(250_000)]
    collection = collection_of(250_000, 1_000, names=names)
    listing = list_rows(collection, by_importance(collection, []))
    assert len(listing) == 200_000
    assert packed_bytes(listing.blobs(Thumbnails(SIDE)).values()) < 4.5e6


def test_wanted_rows_come_first_then_the_nearest_of_each_cluster() -> None:
    collection = collection_of(3_000, 20)
    wanted = np.random.default_rng(2).permutation(3_000)[:50]
    listing = list_rows(collection, by_importance(collection, [wanted, wanted, np.array([-1])]), 600)
    rows_listed = set(listing.indices_R.tolist())
    assert set(wanted.tolist()) <= rows_listed
    assert (listing.row_of(wanted) >= 0).all()
    assert listing.indices_R[listing.row_of(wanted)].tolist() == wanted.tolist()
    others = [image for image in range(3_000) if image not in rows_listed]
    assert (listing.row_of(np.array(others)) == -1).all()
    # Besides the wanted ones, clusters list their first images, as many in each but for one.
    rows = [[image in rows_listed for image in members(collection, cluster)] for cluster in range(19)]
    depth = [next(place for place, here in enumerate(cluster) if not here) for cluster in rows]
    beyond = [sum(cluster[first:]) for cluster, first in zip(rows, depth, strict=True)]
    assert sum(beyond) <= 50
    ranks = {image: rank for cluster in range(19) for rank, image in enumerate(members(collection, cluster))}
    evenly = [ranks[image] for image in by_importance(collection, []).tolist() if image in ranks]
    assert evenly == sorted(evenly)
    assert collection.cluster_N[by_importance(collection, [])[len(ranks) :]].tolist() == [-1] * (3_000 - len(ranks))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images: three classes of one colour each; some are not readable."""
    folder = write_classes(tmp_path_factory.mktemp("photos"), 100, side=24)
    for number in (3, 50):
        (folder / "class1" / f"{number:03}.png").write_bytes(b"no image")
    return folder


def tile_of(thumbnails: Thumbnails, number: int) -> NDArray[np.uint8]:
    """As the script cuts it out."""
    sheet, place = divmod(number, 256)
    line, column = divmod(place, 16)
    with Image.open(io.BytesIO(unpacked(thumbnails.sheets[sheet]))) as image:
        assert image.width == 16 * thumbnails.side
        left, top = column * thumbnails.side, line * thumbnails.side
        return np.asarray(image.convert("RGB").crop((left, top, left + thumbnails.side, top + thumbnails.side)))


@pytest.mark.parametrize("side", [16, 40])
def test_every_image_has_the_tile_of_its_own_colour(photos: Path, side: int) -> None:
    source = open_source(photos)
    order = np.random.default_rng(0).permutation(300)
    seen: list[int] = []
    thumbnails = make_thumbnails(source, order, side=side, workers=2, advance=seen.append)
    bad = {i for i in range(300) if source.name(i) in ("class1/003.png", "class1/050.png")}
    assert set(thumbnails.unreadable) == bad
    assert all("not an image" in reason for reason in thumbnails.unreadable.values())
    assert thumbnails.indices_T.tolist() == [index for index in order.tolist() if index not in bad]
    assert (sum(seen), len(thumbnails.sheets), thumbnails.side) == (300, 2, side)
    assert thumbnails.numbers_of(order[:1]).tolist() == [0]
    assert set(thumbnails.numbers_of(np.array(sorted(bad))).tolist()) == {-1}
    colours = {"class0": [200, 40, 40], "class1": [40, 200, 40], "class2": [40, 40, 200]}
    for index in order[::7].tolist():
        if index not in bad:
            tile = tile_of(thumbnails, int(thumbnails.numbers_of(np.array([index]))[0]))
            np.testing.assert_allclose(tile.mean(axis=(0, 1)), colours[source.name(index)[:6]], atol=20)


def test_the_centre_is_cut_out_and_tiny_pixels_stay_squares(tmp_path: Path) -> None:
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200, 0] = 255
    tiny = np.zeros((4, 4, 3), np.uint8)
    tiny[::2, ::2] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(tiny).save(tmp_path / "b.png")
    thumbnails = make_thumbnails(open_source(tmp_path), np.arange(2), side=32, workers=1)
    assert tile_of(thumbnails, 0)[4:28, 4:28].mean(axis=(0, 1)) == pytest.approx([255, 0, 0], abs=12)
    checks = np.kron(tiny, np.ones((8, 8, 1)))
    assert np.abs(tile_of(thumbnails, 1) - checks).mean() < 12


def test_thumbnail_numbers_are_those_of_the_rows() -> None:
    collection = collection_of(5_000, 50, names=[""] * 5_000)
    listing = listed(collection)
    some = np.random.default_rng(0).permutation(5_000)[:600]
    number_R = columns(listing.blobs(Thumbnails(SIDE, some)))["thumbnail"]
    assert number_R[listing.row_of(some)].tolist() == list(range(600))
    assert (number_R >= 0).sum() == 600


def test_nothing_readable_gives_only_names(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"<html>")
    source = open_source(tmp_path)
    thumbnails = make_thumbnails(source, np.arange(5), side=SIDE, workers=1)
    assert (thumbnails.count, len(thumbnails.sheets), len(thumbnails.unreadable)) == (0, 0, 5)
    names = [source.name(index) for index in range(5)]
    nowhere, unknown = np.full(5, -1), np.full(5, np.nan, np.float32)
    collection = collection_of(5, 3, names=names, cluster_N=nowhere, distance_N=unknown, images=source)
    facts = describe_clusters(collection, seed=1)
    assert all(len(part) == 0 for part in facts.exemplars())
    section = gallery_section(collection, facts, listed(collection), thumbnails)
    assert "5 images could not be read" in section.html
    clusters = json.loads(unpacked(section.blobs["clusters"]))
    assert clusters["size"] == [0, 0, 0]
    assert clusters["tightness"] == clusters["purity"] == [None] * 3


def test_a_stop_is_heard(photos: Path) -> None:
    def stop(images: int) -> None:
        raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        make_thumbnails(open_source(photos), np.arange(20), side=SIDE, workers=2, advance=stop)


def test_every_cluster_may_have_a_thumbnail_within_fixed_limits() -> None:
    assert [thumbnail_side(n_clusters) for n_clusters in (1, 5_000, 5_001, 15_000, 15_001, 10**6)] == [
        64,
        64,
        32,
        32,
        16,
        16,
    ]
    for n_clusters in (5_000, 15_000, 45_000):
        assert most_thumbnails(thumbnail_side(n_clusters)) >= n_clusters
    assert most_thumbnails(512) < most_thumbnails(64) < most_thumbnails(16) < 50_000


def test_thumbnails_are_as_large_as_page_and_images_allow(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side in (40, 100, 300):
        folder = tmp_path / str(side)
        folder.mkdir()
        for number in range(3):
            pixels = rng.integers(0, 256, (side, side + 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    sources = {side: open_source(tmp_path / str(side)) for side in (40, 100, 300)}
    few = np.arange(3)
    assert {side: sharpest_side(64, source, few) for side, source in sources.items()} == {40: 64, 100: 96, 300: 128}
    for side in (96, 128):  # Every image of the set has a thumbnail.
        many = np.zeros(most_thumbnails(side), np.int64)
        assert sharpest_side(64, sources[300], many) == side
        assert sharpest_side(64, sources[300], np.append(many, 0)) < side
    assert sharpest_side(16, sources[300], np.zeros(20_000, np.int64)) == 16
    (tmp_path / "40" / "0.png").write_bytes(b"spoiled")
    assert sharpest_side(64, sources[40], few[:1]) == 64


def test_images_most_similar_to_each_are_listed() -> None:
    """Rows of the page against scikit-learn's neighbours."""
    collection = collection_of(
        40, 3, points_MP=np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32), sample_M=np.arange(40)
    )
    odd = find_odd(collection)
    listing = list_rows(collection, np.arange(40))
    assert odd.similar is not None
    blob = listing.blobs(Thumbnails(64), odd.similar)
    about = json.loads(blob["rows"].content)
    near_RJ = np.frombuffer(blob["row-similar"].content, "<i4").reshape(40, about["similar"])
    wanted = NearestNeighbors(n_neighbors=11).fit(collection.points_MP).kneighbors(return_distance=False)
    for row, index in enumerate(listing.indices_R.tolist()):
        assert listing.indices_R[near_RJ[row]].tolist() == wanted[index][:10].tolist()
    assert "row-similar" not in listing.blobs(Thumbnails(64))


def test_the_section_says_what_each_cluster_holds(photos: Path) -> None:
    source = open_source(photos)
    past = [Past(1, lambda: np.zeros(300, dtype=np.int64))]
    names = [source.name(index) for index in range(300)]
    collection = collection_of(300, 6, names=names, images=source, past=past)
    facts = describe_clusters(collection, seed=1)
    important_N = by_importance(collection, facts.exemplars())
    listing = list_rows(collection, important_N, 120)
    thumbnails = make_thumbnails(source, important_N[:90], side=SIDE, workers=2)
    section = gallery_section(collection, facts, listing, thumbnails)
    again = gallery_section(collection, describe_clusters(collection, seed=1), listing, thumbnails)
    assert {name: blob.packed() for name, blob in section.blobs.items()} == {n: b.packed() for n, b in again.blobs.items()}
    clusters, rows = json.loads(unpacked(section.blobs["clusters"])), columns(dict(section.blobs))
    for cluster in range(6):
        first, listed = clusters["first_row"][cluster], clusters["listed"][cluster]
        assert rows["cluster"][first : first + listed].tolist() == [cluster] * listed
        shown = [collection.names[image] for image in there(facts.nearest_KS[cluster]) if listing.row_of(image) >= 0]
        assert [rows["name"][row] for row in clusters["nearest"][cluster]] == shown
    assert sum(clusters["listed"]) == (rows["cluster"] >= 0).sum()
    assert clusters["past"] == {"epochs": [1], "cluster": [[0]] * 5 + [[-1]], "share": [[1.0]] * 5 + [[0.0]]}
    assert f"{len(listing)} of 300 images are listed" in section.html
    assert "all rows are in assignments/epoch-0045.parquet" in section.html
    assert f"{thumbnails.count} of 300 images have a thumbnail" in section.html
    assert [name for name in section.blobs if name.startswith("sheet-")] == [
        f"sheet-{i}" for i in range(len(thumbnails.sheets))
    ]


@pytest.mark.parametrize(("n_images", "n_clusters"), [(1, 1), (2, 1), (2, 2), (30, 1)])
def test_the_smallest_collections_without_pictures_and_labels(n_images: int, n_clusters: int) -> None:
    collection = collection_of(n_images, n_clusters, label_N=None, label_names=(), centroids_KP=None, table="<b>.parquet")
    facts = describe_clusters(collection, seed=1)
    listing = listed(collection)
    section = gallery_section(collection, facts, listing, Thumbnails(SIDE))
    clusters = json.loads(unpacked(section.blobs["clusters"]))
    assert clusters["neighbours"] == [[]] * n_clusters
    assert "labels" not in clusters
    assert "row-label" not in section.blobs
    assert "--data FOLDER" in section.html
    assert "purity" not in section.html
    assert "<b>" not in section.html
