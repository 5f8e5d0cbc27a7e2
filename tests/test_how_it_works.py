"""The report's section on the method: every number that it shows is what the run itself would compute."""

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models_helper import make_model, write_classes
from numpy.typing import NDArray
from PIL import Image

import deepcluster
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Loader
from deepcluster.data.sources import open_source
from deepcluster.data.views import ClusterView
from deepcluster.interop.loading import load
from deepcluster.models.heads import ClusterHead
from deepcluster.models.trunk import normalise
from deepcluster.visualization.report.collection import Collection, Past
from deepcluster.visualization.report.method.explained import Explained
from deepcluster.visualization.report.method.how_it_works import method_section
from deepcluster.visualization.report.method.steps import edges, liveliest, view_frame
from deepcluster.visualization.report.method.trace import Trace, cluster_history, features_of_some, trace_image
from deepcluster.visualization.report.method.training_views import VIEWS, training_views
from deepcluster.visualization.report.page import Section
from tests.small_runs import checkpoint, train_small

HARMFUL = "<img src=x onerror=alert(1)>.png"
EPOCHS = 3


@dataclass(frozen=True)
class SmallRun:
    """A trained run, the run as the section takes it, and the order in which its epochs drew images."""

    collection: Collection
    explained: Explained
    drawn: dict[int, NDArray[np.int64]]

    @property
    def images(self) -> DecodedImages:
        assert self.collection.images is not None
        return DecodedImages(self.collection.images)

    def trace(self, index: int) -> Trace:
        return trace_image(self.collection, self.explained, self.images, index)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRun]:
    folder = tmp_path_factory.mktemp("method")
    data, drawn = write_classes(folder / "data", 10), {}
    (data / "class0" / "000.png").rename(data / "class0" / HARMFUL)
    training_views = Loader.training_views

    def recorded(self: Loader, view: Any, order_N: torch.Tensor, batch_size: int, **rest: Any) -> Any:
        drawn[rest["epoch"]] = order_N.numpy()
        return training_views(self, view, order_N, batch_size, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "training_views", recorded)
        run = train_small(data, folder / "run", epochs=EPOCHS, jitter=0.5, grey=0.2)
    yield SmallRun(*read_run(run, data), drawn)


def read_run(run: Path, data: Path) -> tuple[Collection, Explained]:
    model = load(run)
    source = open_source(data)
    tables = sorted((run / "assignments").glob("*.parquet"))
    explained = Explained.of(model, checkpoint(run), clusters_epoch=EPOCHS + 1, trained_epoch=EPOCHS)
    past = [past_of(table) for table in tables[:-1]]
    return collect(source, explained, past=past, table=tables[-1].name), explained


def past_of(table: Path) -> Past:
    return Past(int(table.stem.rpartition("-")[2]), lambda: pq.read_table(table).column("cluster").to_numpy())


def collect(source: Any, run: Explained, **rest: Any) -> Collection:
    assignment = run.model.clusters()[1]
    return Collection(
        title="run",
        names=[source.name(index) for index in range(len(source))],
        cluster_N=assignment.labels_N.numpy(),
        distance_N=assignment.distances_N.float().numpy(),
        n_clusters=assignment.n_clusters,
        centroids_KP=assignment.centroids_KP,
        images=source,
        sample_M=np.arange(len(source)),
        points_MP=run.model.points(features_of(source, run)).numpy(),
        **rest,
    )


def features_of(source: Any, run: Explained) -> torch.Tensor:
    return run.model.features(source, stage=run.settings.cluster_stage)[0]


def untrained(folder: Path, source: Any, arch: str, image_size: int, *, sobel: bool) -> tuple[Collection, Explained]:
    """Clusters of a trunk of random weights, without a head: a run that has only just begun."""
    model = make_model(folder, arch=arch, image_size=image_size, sobel=sobel, clusters=3)
    whitening = Whitening(4)
    points_NP = whitening.fit_transform(model.features(source, stage="features")[0])
    model = replace(model, space=whitening, assignment=KMeans(3).cluster(points_NP))
    run = Explained.of(model, {}, clusters_epoch=1, trained_epoch=0)
    return collect(source, run), run


def with_settings(run: Explained, **settings: Any) -> Explained:
    return replace(run, model=replace(run.model, settings=replace(run.settings, **settings)))


def text_of(section: Section) -> str:
    """The visible text."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", str(section.html))))


def files_named(section: Section) -> set[str]:
    return set(re.findall(r"<code>([a-z0-9_/]+\.py)</code>", str(section.html)))


def bars(section: Section, name: str) -> dict[int, float]:
    """Value by cluster of a chart of bars."""
    found = {}
    for trace in json.loads(section.figures[name])["data"]:
        found.update({int(label.split()[1]): value for label, value in zip(trace["y"], values_of(trace["x"]), strict=True)})
    return found


def values_of(values: Any) -> list[Any]:
    """Plotly writes long lists as bytes."""
    if isinstance(values, dict):
        unpacked: list[Any] = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()
        return unpacked
    return list(values)


def figures_drawn(section: Section) -> set[str]:
    return set(re.findall(r'<div class="figure" id="([^"]+)" role="img" aria-label="[^"]{20,}"', str(section.html)))


def test_the_section_of_a_run(small_run: SmallRun) -> None:
    section = method_section(small_run.collection, small_run.explained)
    html = str(section.html)
    assert figures_drawn(section) == set(section.figures)
    assert len(section.figures) == 7
    assert len(html) + sum(map(len, section.figures.values())) < 400_000
    assert all(alt for alt in re.findall(r'<img [^>]*alt="([^"]*)"', html))
    assert html.count("<img ") == len(re.findall(r'<img src="data:image/(?:png|webp);base64,', html))
    assert re.findall(r"https?://[^\"]+", html) == ["https://arxiv.org/abs/1807.05520"]
    assert str(method_section(small_run.collection, small_run.explained).html) == html


def test_the_pictures_are_those_of_the_image(small_run: SmallRun) -> None:
    index = 12
    html = str(method_section(small_run.collection, small_run.explained, index).html)
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
        for code in re.findall(r'<img src="data:image/png;base64,([^"]+)', html)
    ]
    image_HWC = small_run.images.get(index)
    assert np.array_equal(pictures[0], image_HWC.numpy())
    assert np.array_equal(pictures[1], ClusterView(16)([image_HWC])[0].permute(1, 2, 0).numpy())


def test_every_named_file_exists(small_run: SmallRun) -> None:
    package = Path(deepcluster.__file__).parent
    named = files_named(method_section(small_run.collection, small_run.explained))
    assert "training/loop.py" in named and len(named) > 10
    assert all((package / path).is_file() for path in named)


@pytest.mark.parametrize("index", [3, 17])
def test_distances_and_cluster_are_those_of_float64(small_run: SmallRun, index: int) -> None:
    collection, run = small_run.collection, small_run.explained
    section = method_section(collection, run, index)
    assert run.whitening is not None
    state = run.whitening.state_dict()
    features_D = features_of(collection.images, run)[index].double().numpy()
    projected_P = (features_D - state["mean"].double().numpy()) @ state["components"].double().numpy()
    point_P = projected_P / np.sqrt((projected_P**2).sum())
    distances_K = np.sqrt(((run.centroids_KP.double().numpy() - point_P) ** 2).sum(axis=1))
    shown = bars(section, "method-distances")
    assert shown == pytest.approx(dict(enumerate(distances_K)), rel=1e-3)
    own = int(collection.cluster_N[index])
    assert int(distances_K.argmin()) == own
    assert f"The nearest centroid is that of cluster {own}, at a distance of {distances_K[own]:.3f}" in text_of(section)
    point = values_of(json.loads(section.figures["method-point"])["data"][0]["y"])
    assert point == pytest.approx(point_P, rel=1e-2, abs=1e-4)


def test_what_the_head_says_is_a_softmax_in_float64(small_run: SmallRun) -> None:
    run, index = small_run.explained, 5
    section = method_section(small_run.collection, run, index)
    view_1CHW = ClusterView(16)([small_run.images.get(index)])
    with torch.no_grad():
        features_D = run.model.trunk(normalise(view_1CHW))[0].double().numpy()
    assert isinstance(run.head, ClusterHead)
    layer = run.head.linear
    scores_K = np.maximum(features_D, 0) @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    weights_K = np.exp(scores_K - scores_K.max())
    probabilities_K = weights_K / weights_K.sum()
    assert bars(section, "method-prediction") == pytest.approx(dict(enumerate(probabilities_K)), rel=2e-3)
    of_label = probabilities_K[int(run.labels_GN[0, index])]
    assert f"\N{MINUS SIGN}ln {of_label:.3g} = {-np.log(of_label):.2f}" in text_of(section)
    assert "ln 5 = 1.61" in text_of(section)


def test_training_views_are_those_that_the_run_drew(small_run: SmallRun) -> None:
    run, order_N = small_run.explained, small_run.drawn[EPOCHS]
    loader = Loader(small_run.images, workers=0)
    batches = list(loader.training_views(run.view.views[0], torch.from_numpy(order_N), 16, seed=31, epoch=EPOCHS))
    views_NCHW = torch.cat([run.colours(batch.images_BCHW, batch.draws_BR) for batch in batches])
    counts_N = np.bincount(order_N, minlength=30)
    for index in (int(counts_N.argmax()), int(counts_N.argmin())):
        positions = np.flatnonzero(order_N == index)
        assert np.array_equal(run.positions(index), positions)
        shown = training_views(run, small_run.images.get(index), index)
        assert shown is not None
        assert (shown.times, shown.n_drawn, len(shown.views)) == (len(positions), min(VIEWS, len(positions)), VIEWS)
        for view, wanted_CHW in zip(shown.views, views_NCHW[positions[:VIEWS]], strict=False):
            assert torch.equal(view.coloured_CHW, wanted_CHW)
        times = {0: "0 times", 1: "once", 2: "twice"}.get(len(positions), f"{len(positions)} times")
        assert f"was drawn {times}." in text_of(method_section(small_run.collection, run, index))


def test_whitened_components_have_variance_one(small_run: SmallRun) -> None:
    run = small_run.explained
    features_SD = features_of_some(small_run.collection, run, small_run.images)
    assert len(features_SD) == 30
    section = method_section(small_run.collection, run)
    before_P, whitened_P, points_P = (trace["y"] for trace in json.loads(section.figures["method-spectrum"])["data"])
    assert run.whitening is not None
    assert values_of(before_P) == pytest.approx(run.whitening.variance_P.numpy(), rel=1e-3)
    # All images that PCA learned from: exactly one, except for rounding.
    assert values_of(whitened_P) == pytest.approx(np.ones(16), rel=2e-3)
    points_NP = small_run.collection.points_MP.astype(np.float64)
    assert values_of(points_P) == pytest.approx(points_NP.var(axis=0, ddof=1), rel=1e-3)


def test_edges_are_those_of_the_trunk(small_run: SmallRun) -> None:
    view_CHW = ClusterView(16)([small_run.images.get(0)])[0]
    channels_3HW, grey_HW, edges_2HW = edges(view_CHW)
    sobel = small_run.explained.model.trunk.sobel
    assert isinstance(sobel, torch.nn.Module)
    assert torch.equal(edges_2HW, sobel(normalise(view_CHW[None]))[0])
    assert torch.allclose(grey_HW, channels_3HW.mean(dim=0), atol=1e-6)


def test_names_are_harmless(small_run: SmallRun) -> None:
    index = list(small_run.collection.names).index(f"class0/{HARMFUL}")
    html = str(method_section(small_run.collection, small_run.explained, index).html)
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;.png" in html


@pytest.mark.parametrize(("height", "width"), [(224, 224), (60, 100), (100, 60), (20, 20), (30, 900), (900, 30)])
def test_the_frame_is_what_the_view_shows(height: int, width: int) -> None:
    view = ClusterView(28)
    top, left, frame_height, frame_width = view_frame(view, height, width)
    for axis, start, length, side in ((0, top, frame_height, height), (1, left, frame_width, width)):
        # Pixels that say where they are: the mean of the view is the middle of the frame.
        ramp = np.linspace(0, 255, side).reshape((side, 1) if axis == 0 else (1, side))
        image_HWC = torch.from_numpy(np.broadcast_to(ramp[..., None], (height, width, 3)).round().astype(np.uint8).copy())
        middle = float(view([image_HWC])[0].float().mean()) / 255 * (side - 1) + 0.5
        assert middle == pytest.approx(start + length / 2, abs=0.01 * side + 0.6)
    assert frame_height == pytest.approx(frame_width, rel=0.05)


def test_the_history_by_hand(small_run: SmallRun) -> None:
    cluster_N = np.array([0, 0, 0, 1, -1])
    past = [
        Past(1, lambda: np.array([2, 2, 1, 2, -1])),
        Past(2, lambda: np.array([9] * 5)),
        Past(3, lambda: -np.ones(5, int)),
    ]
    collection = Collection("t", list("abcde"), cluster_N, np.zeros(5, np.float32), 3, past=past)
    history = cluster_history(collection, with_settings(small_run.explained, reassign_every=2), 0)
    # Epoch 2 did not cluster; in epoch 3 the image was in no cluster.
    assert [(one.epoch, one.cluster) for one in history] == [(1, 2), (3, -1)]
    assert history[0].share == 0.5
    assert np.isnan(history[1].share)


def test_liveliest_maps() -> None:
    bump, edge = torch.zeros(4, 4), torch.zeros(4, 4)
    bump[1, 1], edge[:, 2:] = 1, 1
    maps_CHW = torch.stack([3 * edge, 2.9 * edge + 5, 2 * bump, torch.full((4, 4), 9.0)])
    assert liveliest(maps_CHW, 2) == [0, 2]
    assert liveliest(maps_CHW, 4) == [0, 2, 3, 1]


@pytest.mark.parametrize(
    ("arch", "size", "sobel"), [("alexnet", 67, True), ("resnet18-small", 16, False), ("vgg16", 32, True)]
)
def test_every_kind_of_trunk(tmp_path: Path, arch: str, size: int, sobel: bool) -> None:
    source = open_source(write_classes(tmp_path / "images", 3, side=70))
    section = method_section(*untrained(tmp_path, source, arch, size, sobel=sobel))
    text = text_of(section)
    assert figures_drawn(section) == set(section.figures)
    assert ("removes colour, as the paper does: the mean" in text) == sobel
    assert ("(not used)" in text) != sobel
    assert "This run has no trained head" in text
    assert "No earlier clusters are known" in text


def test_tiny_grey_digits_without_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "digits.npy", rng.integers(0, 255, (12, 8, 8), dtype=np.uint8))
    run = untrained(tmp_path, open_source(tmp_path / "digits.npy"), "alexnet-small", 8, sobel=False)
    assert "The file: 8 × 8 pixels" in text_of(method_section(*run))


@pytest.mark.parametrize(
    ("settings", "trained", "reason"),
    [
        ({"clustering": "pic"}, 2, "does not use the nearest mean"),
        ({"clustering": "balanced"}, 2, "where the nearest one is full"),
        ({}, 3, "was trained since the clusters were made"),
        ({}, 2, "is one of rounding"),
    ],
)
def test_a_cluster_that_is_not_the_nearest_is_explained(
    small_run: SmallRun, settings: dict[str, Any], trained: int, reason: str
) -> None:
    moved_N = small_run.collection.cluster_N.copy()
    nearest = int(moved_N[4])
    moved_N[4] = (nearest + 1) % 5
    collection = replace(small_run.collection, cluster_N=moved_N)
    run = replace(with_settings(small_run.explained, **settings), clusters_epoch=3, trained_epoch=trained)
    text = text_of(method_section(collection, run, 4))
    assert reason in text
    assert f"the nearest is that of cluster {nearest}, at" in text


def test_what_can_not_be_shown_is_said(small_run: SmallRun, tmp_path: Path) -> None:
    collection, run = small_run.collection, small_run.explained
    assert "not at hand" in method_section(replace(collection, images=None), run).html
    gone = open_source(write_classes(tmp_path, 10))
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    assert "No image could be read" in method_section(replace(collection, images=gone), run).html
    with pytest.raises(InputError, match="no image 30: use 0 to 29"):
        method_section(collection, run, 30)
    with pytest.raises(InputError, match=r"image 2 .* can't be read"):
        method_section(replace(collection, images=gone), run, 2)
