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
from models_helper import write_classes
from numpy.typing import NDArray
from PIL import Image

import deepcluster
from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Loader
from deepcluster.data.sources import open_source
from deepcluster.data.views import ClusterView, Colours, TrainingView
from deepcluster.models.heads import ClusterHead
from deepcluster.models.make import make_trunk
from deepcluster.models.trunk import normalise
from deepcluster.run.features import image_features, make_run_trunk
from deepcluster.run.settings import Settings
from deepcluster.visualization.report.collection import Collection, Past
from deepcluster.visualization.report.method.follow import (
    VIEWS,
    Followed,
    companions,
    follow_image,
    last_lesson,
    measure_spectrum,
)
from deepcluster.visualization.report.method.head_pipeline import HeadPipeline
from deepcluster.visualization.report.method.how_it_works import FILES, method_section
from deepcluster.visualization.report.method.pipeline import view_frame
from deepcluster.visualization.report.method.steps import liveliest
from deepcluster.visualization.report.page import Section
from tests.small_runs import checkpoint, train_small

HARMFUL = "<img src=x onerror=alert(1)>.png"
EPOCHS = 3


@dataclass(frozen=True)
class SmallRun:
    """A trained run, what the section is told of it, and the order in which its epochs drew images."""

    collection: Collection
    pipeline: HeadPipeline
    drawn: dict[int, NDArray[np.int64]]

    @property
    def images(self) -> DecodedImages:
        assert self.collection.images is not None
        return DecodedImages(self.collection.images)

    def follow(self, index: int) -> Followed:
        return follow_image(self.collection, self.pipeline, self.images, index, lambda _: None)


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
    collection, pipeline = read_run(run, data)
    yield SmallRun(collection, pipeline, drawn)


def read_run(run: Path, data: Path) -> tuple[Collection, HeadPipeline]:
    state = checkpoint(run)
    settings = Settings.from_dict(state["settings"])
    trunk = make_run_trunk(settings)
    trunk.load_state_dict(state["trunk"])
    head = ClusterHead(trunk.dim, settings.clusters, seed=0)
    head.load_state_dict(state["head"])
    final = Assignment.from_state_dict(state["final"]["assignment"])
    source = open_source(data)
    tables = sorted((run / "assignments").glob("*.parquet"))
    pipeline = HeadPipeline(
        trunk=trunk.eval(),
        machine=Machine.choose("cpu", "fp32"),
        image_size=settings.image_size,
        training_view=TrainingView(settings.image_size, scale=settings.crop_scale, flip=settings.flip),
        colours=Colours(settings.jitter, settings.grey),
        cluster_stage=settings.cluster_stage,
        whitening=Whitening.from_state_dict(state["final"]["whitening"]),
        centroids_KP=final.centroids_KP,
        clusters_epoch=EPOCHS + 1,
        trained_epoch=EPOCHS,
        head=head,
        head_labels_N=Assignment.from_state_dict(state["assignment"]).labels_N,
        seed=settings.seed,
        lr=settings.lr,
        batch_size=settings.batch_size,
    )
    collection = collect(source, final, pipeline, past=[past_of(table) for table in tables[:-1]], table=tables[-1].name)
    return collection, pipeline


def past_of(table: Path) -> Past:
    return Past(int(table.stem.rpartition("-")[2]), lambda: pq.read_table(table).column("cluster").to_numpy())


def collect(source: Any, assignment: Assignment, pipeline: HeadPipeline, **rest: Any) -> Collection:
    return Collection(
        title="run",
        names=[source.name(index) for index in range(len(source))],
        cluster_N=assignment.labels_N.numpy(),
        distance_N=assignment.distances_N.float().numpy(),
        n_clusters=assignment.n_clusters,
        centroids_KP=assignment.centroids_KP,
        images=source,
        sample_M=np.arange(len(source)),
        points_MP=pipeline.whitening.transform(features_of(source, pipeline)).numpy(),
        **rest,
    )


def features_of(source: Any, pipeline: HeadPipeline) -> torch.Tensor:
    loader = Loader(DecodedImages(source), workers=0)
    stage, size = pipeline.cluster_stage, pipeline.image_size
    return image_features(pipeline.trunk, loader, pipeline.machine, stage=stage, image_size=size)


def untrained(source: Any, arch: str, image_size: int, *, sobel: bool, clusters: int = 3) -> tuple[Collection, HeadPipeline]:
    """Clusters of a trunk of random weights, without a head: a run that has only just begun."""
    trunk = make_trunk(arch, image_size=image_size, sobel=sobel).eval()
    machine, nothing = Machine.choose("cpu", "fp32"), torch.zeros(clusters, 4)
    pipeline = HeadPipeline(
        trunk=trunk,
        machine=machine,
        image_size=image_size,
        training_view=TrainingView(image_size),
        colours=Colours(),
        whitening=Whitening(4),
        centroids_KP=nothing,
        clusters_epoch=1,
        trained_epoch=0,
        head=None,
        head_labels_N=None,
        seed=1,
    )
    points_NP = pipeline.whitening.fit_transform(features_of(source, pipeline))
    assignment = KMeans(clusters).fit(points_NP, seed=1)
    pipeline = replace(pipeline, centroids_KP=assignment.centroids_KP)
    return collect(source, assignment, pipeline), pipeline


def text_of(section: Section) -> str:
    """What a person reads."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", str(section.html))))


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
    section = method_section(small_run.collection, small_run.pipeline)
    html = str(section.html)
    assert figures_drawn(section) == set(section.figures)
    assert len(section.figures) == 7
    assert len(html) + sum(map(len, section.figures.values())) < 400_000
    assert all(alt for alt in re.findall(r'<img [^>]*alt="([^"]*)"', html))
    assert html.count("<img ") == len(re.findall(r'<img src="data:image/(?:png|webp);base64,', html))
    assert re.findall(r"https?://[^\"]+", html) == ["https://arxiv.org/abs/1807.05520"]
    assert str(method_section(small_run.collection, small_run.pipeline).html) == html


def test_the_pictures_are_those_of_the_image(small_run: SmallRun) -> None:
    index = 12
    html = str(method_section(small_run.collection, small_run.pipeline, index).html)
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
        for code in re.findall(r'<img src="data:image/png;base64,([^"]+)', html)
    ]
    image_HWC = small_run.images.get(index)
    assert np.array_equal(pictures[0], image_HWC.numpy())
    assert np.array_equal(pictures[1], ClusterView(16)([image_HWC])[0].permute(1, 2, 0).numpy())


def test_every_named_file_exists(small_run: SmallRun) -> None:
    package = Path(deepcluster.__file__).parent
    named = {path for files in FILES.values() for path, _ in files}
    assert all((package / path).is_file() for path in named)
    html = str(method_section(small_run.collection, small_run.pipeline).html)
    assert named == set(re.findall(r"<code>([a-z_/]+\.py)</code>", html))


@pytest.mark.parametrize("index", [3, 17])
def test_distances_and_cluster_are_those_of_float64(small_run: SmallRun, index: int) -> None:
    collection, pipeline = small_run.collection, small_run.pipeline
    section = method_section(collection, pipeline, index)
    state = pipeline.whitening.state_dict()
    features_D = features_of(collection.images, pipeline)[index].double().numpy()
    projected_P = (features_D - state["mean"].double().numpy()) @ state["components"].double().numpy()
    point_P = projected_P / np.sqrt((projected_P**2).sum())
    distances_K = np.sqrt(((pipeline.centroids_KP.double().numpy() - point_P) ** 2).sum(axis=1))
    shown = bars(section, "method-distances")
    assert shown == pytest.approx(dict(enumerate(distances_K)), rel=1e-3)
    own = int(collection.cluster_N[index])
    assert int(distances_K.argmin()) == own
    assert f"The nearest centroid is that of cluster {own}, at a distance of {distances_K[own]:.3f}" in text_of(section)
    point = values_of(json.loads(section.figures["method-point"])["data"][0]["y"])
    assert point == pytest.approx(point_P, rel=1e-2, abs=1e-4)


def test_what_the_head_says_is_a_softmax_in_float64(small_run: SmallRun) -> None:
    pipeline, index = small_run.pipeline, 5
    section = method_section(small_run.collection, pipeline, index)
    view_1CHW = ClusterView(16)([small_run.images.get(index)])
    assert pipeline.head_labels_N is not None
    with torch.no_grad():
        features_D = pipeline.trunk(normalise(view_1CHW))[0].double().numpy()
    assert isinstance(pipeline.head, ClusterHead)
    layer = pipeline.head.linear
    scores_K = np.maximum(features_D, 0) @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    weights_K = np.exp(scores_K - scores_K.max())
    probabilities_K = weights_K / weights_K.sum()
    assert bars(section, "method-prediction") == pytest.approx(dict(enumerate(probabilities_K)), rel=2e-3)
    of_label = probabilities_K[int(pipeline.head_labels_N[index])]
    assert f"\N{MINUS SIGN}ln {of_label:.3g} = {-np.log(of_label):.2f}" in text_of(section)
    assert "ln 5 = 1.61" in text_of(section)


def test_training_views_are_those_that_the_run_drew(small_run: SmallRun) -> None:
    pipeline, order_N = small_run.pipeline, small_run.drawn[EPOCHS]
    loader = Loader(small_run.images, workers=0)
    batches = list(loader.training_views(pipeline.training_view, torch.from_numpy(order_N), 16, seed=31, epoch=EPOCHS))
    views_NCHW = torch.cat([pipeline.colours(batch.images_BCHW, batch.draws_BR) for batch in batches])
    counts_N = np.bincount(order_N, minlength=30)
    for index in (int(counts_N.argmax()), int(counts_N.argmin())):
        positions = np.flatnonzero(order_N == index)
        assert np.array_equal(pipeline.drawn_positions(index), positions)
        lesson = last_lesson(pipeline, small_run.follow(index))
        assert lesson is not None
        assert lesson.n_seen == min(VIEWS, len(positions))
        assert len(lesson.views.coloured_VCHW) == VIEWS
        seen = slice(0, lesson.n_seen)
        assert torch.equal(lesson.views.coloured_VCHW[seen], views_NCHW[positions[:VIEWS]])
        times = {0: "0 times", 1: "once", 2: "twice"}.get(len(positions), f"{len(positions)} times")
        assert f"was drawn {times}." in text_of(method_section(small_run.collection, pipeline, index))


def test_whitened_components_have_variance_one(small_run: SmallRun) -> None:
    spectrum = measure_spectrum(small_run.collection, small_run.pipeline, small_run.images, lambda _: None)
    assert spectrum.n_measured == 30
    assert np.array_equal(spectrum.before_P, small_run.pipeline.whitening.variance_P.numpy())
    # All images that PCA learned from: exactly one, but for rounding.
    assert spectrum.whitened_P == pytest.approx(np.ones(16), rel=1e-3)
    points_NP = small_run.collection.points_MP.astype(np.float64)
    assert spectrum.points_P == pytest.approx(points_NP.var(axis=0, ddof=1), rel=1e-3)


def test_edges_are_those_of_the_trunk(small_run: SmallRun) -> None:
    view_CHW = ClusterView(16)([small_run.images.get(0)])[0]
    channels_3HW, grey_HW, edges_2HW = small_run.pipeline.edges(view_CHW)
    sobel = small_run.pipeline.trunk.sobel
    assert isinstance(sobel, torch.nn.Module)
    assert torch.equal(edges_2HW, sobel(normalise(view_CHW[None]))[0])
    assert torch.allclose(grey_HW, channels_3HW.mean(dim=0), atol=1e-6)


def test_names_are_harmless(small_run: SmallRun) -> None:
    index = list(small_run.collection.names).index(f"class0/{HARMFUL}")
    html = str(method_section(small_run.collection, small_run.pipeline, index).html)
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


def test_companions_by_hand(small_run: SmallRun) -> None:
    cluster_N = np.array([0, 0, 0, 1, -1])
    past = [
        Past(1, lambda: np.array([2, 2, 1, 2, -1])),
        Past(2, lambda: np.array([9] * 5)),
        Past(3, lambda: -np.ones(5, int)),
    ]
    collection = Collection("t", list("abcde"), cluster_N, np.zeros(5, np.float32), 3, past=past)
    told = companions(collection, replace(small_run.pipeline, reassign_every=2), 0, lambda _: None)
    # Epoch 2 made no groups of its own; in epoch 3 the image was in none.
    assert [(one.epoch, one.cluster) for one in told] == [(1, 2), (3, -1)]
    assert told[0].share == 0.5
    assert np.isnan(told[1].share)


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
    source = open_source(write_classes(tmp_path, 3, side=70))
    collection, pipeline = untrained(source, arch, size, sobel=sobel)
    section = method_section(collection, pipeline)
    text = text_of(section)
    assert figures_drawn(section) == set(section.figures)
    assert ("takes colour away, as the paper does: the mean" in text) == sobel
    assert ("(not used)" in text) != sobel
    assert "This run has no head to ask" in text
    assert "No earlier clusters are known" in text


def test_tiny_grey_digits_without_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "digits.npy", rng.integers(0, 255, (12, 8, 8), dtype=np.uint8))
    collection, pipeline = untrained(open_source(tmp_path / "digits.npy"), "alexnet-small", 8, sobel=False)
    assert "The file: 8 × 8 pixels" in text_of(method_section(collection, pipeline))


@pytest.mark.parametrize(
    ("clusterer", "trained", "reason"),
    [
        ("pic", 2, "does not ask for the nearest mean"),
        ("balanced", 2, "where the nearest one is full"),
        ("kmeans", 3, "has learned since the clusters were made"),
        ("kmeans", 2, "is one of rounding"),
    ],
)
def test_a_cluster_that_is_not_the_nearest_is_explained(
    small_run: SmallRun, clusterer: str, trained: int, reason: str
) -> None:
    moved_N = small_run.collection.cluster_N.copy()
    nearest = int(moved_N[4])
    moved_N[4] = (nearest + 1) % 5
    collection = replace(small_run.collection, cluster_N=moved_N)
    pipeline = replace(small_run.pipeline, clusterer=clusterer, clusters_epoch=3, trained_epoch=trained)
    text = text_of(method_section(collection, pipeline, 4))
    assert reason in text
    assert f"the nearest is that of cluster {nearest}, at" in text


def test_what_can_not_be_shown_is_said(small_run: SmallRun, tmp_path: Path) -> None:
    collection, pipeline = small_run.collection, small_run.pipeline
    assert "not at hand" in method_section(replace(collection, images=None), pipeline).html
    gone = open_source(write_classes(tmp_path, 10))
    for file in tmp_path.rglob("*.png"):
        file.unlink()
    assert "No image could be read" in method_section(replace(collection, images=gone), pipeline).html
    with pytest.raises(InputError, match="no image 30: use 0 to 29"):
        method_section(collection, pipeline, 30)
    with pytest.raises(InputError, match=r"image 2 .* can't be read"):
        method_section(replace(collection, images=gone), pipeline, 2)
