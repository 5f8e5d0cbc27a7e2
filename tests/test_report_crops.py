"""What reports, `assign` and `info` make of a run of DeepCluster-v2: numbers of float64, crops that the run drew."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models_helper import write_classes
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from small_runs import checkpoint, train_small
from test_how_it_works import bars, figures_drawn, files_named, text_of, values_of

import deepcluster
from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Work
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Loader
from deepcluster.data.resample import resize
from deepcluster.info import info
from deepcluster.models.trunk import normalise
from deepcluster.run.folder import RunFolder
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report.build import Context
from deepcluster.visualization.report.command import report
from deepcluster.visualization.report.curves import guess_of
from deepcluster.visualization.report.method.explained import Explained
from deepcluster.visualization.report.method.how_it_works import method_section
from deepcluster.visualization.report.method.steps import shares_of_variance
from deepcluster.visualization.report.method.training_views import random_views, training_views
from deepcluster.visualization.report.run import read_run

pytest.importorskip("plotly", reason="the report needs: pip install jinja2 plotly")

EPOCHS, INDEX = 2, 7
CROPS: dict[str, Any] = {
    "method": "deepcluster-v2",
    "recipe": "v2-small-set",
    "look_again": False,
    "whiten": False,
    "clusters": (5, 4),
    "crops": "2x16,2x12",
    "projection": (24, 8),
    "blur": 0.5,
    "grey": 0.5,
    "cluster_stage": "features",
    "epochs": EPOCHS,
    "warmup_epochs": 0.0,
}


@dataclass(frozen=True)
class CropRun:
    """A run of 30 images, and the draws and crops that its last epoch learned, by the image's index."""

    data: Path
    run: Path
    learned: dict[int, tuple[NDArray[np.float64], list[torch.Tensor]]]


def read(run: Path) -> Context:
    return read_run(RunFolder(run), ReportOptions(map_images=100), device="cpu", workers=0, work=Work())


def train_crops(data: Path, run: Path, **options: Any) -> Path:
    train_small(data, run, **{**CROPS, **options})
    return run


@pytest.fixture(scope="module")
def crop_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CropRun]:
    folder = tmp_path_factory.mktemp("crops")
    data = write_classes(folder / "data", 10)
    learned: dict[int, Any] = {}
    training_views = Loader.training_views

    def recorded(self: Loader, *positional: Any, **rest: Any) -> Any:
        for batch in training_views(self, *positional, **rest):
            if rest["epoch"] == EPOCHS:
                count = len(batch.indices_B)
                for row, index in enumerate(batch.indices_B.tolist()):
                    crops = [one for group in batch.crops for one in group[row::count]]
                    learned[index] = (batch.draws_BR[row], crops)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "training_views", recorded)
        run = train_crops(data, folder / "run", checkpoint_every=1)
    yield CropRun(data, run, learned)


@pytest.fixture(scope="module")
def context(crop_run: CropRun) -> Context:
    return read(crop_run.run)


def explained(context: Context) -> Explained:
    assert context.explained is not None
    return context.explained


def projected(run: Path, features_BD: NDArray[np.float64]) -> NDArray[np.float64]:
    """The projection in eval mode, by hand."""
    state = {name: value.double().numpy() for name, value in checkpoint(run)["projection"].items()}
    hidden_BH = features_BD @ state["layers.0.weight"].T + state["layers.0.bias"]
    scale_H = state["layers.1.weight"] / np.sqrt(state["layers.1.running_var"] + 1e-5)
    hidden_BH = np.maximum(0, (hidden_BH - state["layers.1.running_mean"]) * scale_H + state["layers.1.bias"])
    rows_BP = hidden_BH @ state["layers.3.weight"].T + state["layers.3.bias"]
    points_BP: NDArray[np.float64] = rows_BP / np.linalg.norm(rows_BP, axis=1, keepdims=True)
    return points_BP


def image(context: Context, index: int) -> torch.Tensor:
    assert context.collection.images is not None
    return DecodedImages(context.collection.images).get(index)


def test_crops_are_those_that_the_run_learned(crop_run: CropRun, context: Context) -> None:
    run = explained(context)
    changed = set()
    for index in range(30):
        crops = random_views(run, image(context, index), int(run.positions(index)[0]))
        draws_VR, wanted = crop_run.learned[index]
        assert [crop.cut_CHW.shape[-1] for crop in crops] == [16, 16, 12, 12]
        for number, (crop, cut_CHW) in enumerate(zip(crops, wanted, strict=True)):
            assert torch.equal(crop.cut_CHW, cut_CHW)
            given_1CHW = run.colours(cut_CHW[None], draws_VR[number : number + 1])
            assert torch.equal(crop.coloured_CHW, given_1CHW[0])
            top, left, height, width = crop.box_4
            side = cut_CHW.shape[-1]
            boxed_CHW = resize(image(context, index)[top : top + height, left : left + width], (side, side))
            assert torch.equal(boxed_CHW.flip(2) if crop.is_flipped else boxed_CHW, cut_CHW)
            assert crop.is_large == (side == 16)
            # Grey: the same in all colours. Photos of these classes are not.
            assert crop.is_grey == (float(crop.coloured_CHW.std(dim=0).max()) < 1e-3)
            changed.add((crop.is_flipped, crop.is_grey, crop.is_blurred))
    assert len(changed) == 8


def test_losses_and_probabilities_are_those_of_float64(crop_run: CropRun, context: Context) -> None:
    run, state = explained(context), checkpoint(crop_run.run)
    shown = training_views(run, image(context, INDEX), INDEX)
    assert shown is not None
    with torch.no_grad():
        features_VD = torch.cat([run.model.trunk(normalise(view.coloured_CHW[None])) for view in shown.views])
    points_VP = projected(crop_run.run, features_VD.double().numpy())
    np.testing.assert_allclose(shown.rows_VD.numpy(), points_VP, atol=1e-5)
    losses_VG = np.zeros((4, 2))
    for number, one in enumerate([state["assignment"], *state["other_assignments"]]):
        assert torch.equal(state["prototypes"][number], one["centroids_KP"])
        weights_VK = np.exp(points_VP @ one["centroids_KP"].double().numpy().T / 0.1)
        label = int(one["labels_N"][INDEX])
        assert shown.labels[number] == label
        assert shown.sizes[number] == int((one["labels_N"] == label).sum())
        losses_VG[:, number] = -np.log(weights_VK[:, label] / weights_VK.sum(axis=1))
    np.testing.assert_allclose(shown.losses_VG, losses_VG, rtol=1e-3)
    section = method_section(context.collection, run, INDEX)
    assert f"2 clusterings it is {losses_VG.mean():.2f} on average" in text_of(section)
    guess = (np.log(5) + np.log(4)) / 2
    assert f"the mean of ln K over the clusterings = {guess:.2f}" in text_of(section)
    assert guess_of(5, (5, 4)) == (pytest.approx(guess), "mean of ln K")
    assert guess_of(5) == guess_of(5, (5,)) == (pytest.approx(np.log(5)), "ln 5")


def test_the_section_tells_the_second_version(crop_run: CropRun, context: Context) -> None:
    section = method_section(context.collection, explained(context), INDEX)
    html, text = str(section.html), text_of(section)
    assert figures_drawn(section) == set(section.figures)
    assert html.count("<img ") == len(re.findall(r'<img src="data:image/(?:png|webp);base64,[^"]+" alt="[^"]+"', html))
    for words in (
        "Remember the previous epoch",
        "Project onto a sphere",
        "the centroids themselves are the head",
        "cropped 4 times",
    ):
        assert words in text
    assert "hiten each" not in text and "new head" not in text.replace("no new head", "")
    package = Path(deepcluster.__file__).parent
    named = files_named(section)
    assert "training/loop.py" in named and all((package / path).is_file() for path in named)
    state = checkpoint(crop_run.run)["final"]
    own = int(state["assignment"]["labels_N"][INDEX])
    point_P = np.array(values_of(section_figure(section, "method-point")["y"]))
    distances_K = np.linalg.norm(state["assignment"]["centroids_KP"].numpy() - point_P, axis=1)
    assert bars(section, "method-distances") == pytest.approx(dict(enumerate(distances_K)), abs=2e-3)
    assert f"is that of cluster {own}, at a distance of" in text


def section_figure(section: Any, name: str) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(section.figures[name])["data"][0]
    return trace


def test_shares_of_variance_are_those_of_pca() -> None:
    points_SP = np.random.default_rng(0).normal(size=(50, 4)) * [4, 3, 2, 1]
    shares_P = shares_of_variance(points_SP)
    assert shares_P == pytest.approx(PCA().fit(points_SP).explained_variance_ratio_)
    assert shares_of_variance(points_SP[:1]) is None
    assert shares_of_variance(np.ones((5, 4))) is None


def test_the_page_of_a_finished_run_and_of_one_that_goes_on(crop_run: CropRun, tmp_path: Path) -> None:
    page = report(crop_run.run, out=tmp_path / "page.html", reporter=Reporter(quiet=True)).read_text()
    for words in (
        "The run learned 2 clusterings side by side (5, 4 clusters)",
        "Its projection, of 8 numbers",
        "mean of ln K",
    ):
        assert words in page
    going_on = tmp_path / "run"
    shutil.copytree(crop_run.run, going_on)
    (going_on / "checkpoints" / "epoch-0001.pt").replace(going_on / "checkpoints" / "last.pt")
    for epoch in (2, 3):
        (going_on / "assignments" / f"epoch-000{epoch}.parquet").unlink()
    context = read(going_on)
    assert not context.run.finished
    table = pq.read_table(going_on / "assignments" / "epoch-0001.parquet").to_pydict()
    assert context.collection.cluster_N.tolist() == table["cluster"]
    text = text_of(method_section(context.collection, explained(context)))
    assert "made of the points that the crops had in that first pass" in text


def test_assign_gives_the_run_s_last_table_again(crop_run: CropRun) -> None:
    found = deepcluster.assign(crop_run.run, crop_run.data, device="cpu")
    final = pq.read_table(crop_run.run / "assignments" / f"epoch-{EPOCHS + 1:04d}.parquet").to_pydict()
    assert found.names == final["name"]
    assert found.cluster_N.tolist() == final["cluster"]
    np.testing.assert_allclose(found.distance_N, final["distance"], atol=1e-5)
    model = deepcluster.load(crop_run.run)
    features_ND = deepcluster.embed(model, crop_run.data, stage="features", device="cpu").embedding_ND
    points_NP = projected(crop_run.run, features_ND.astype(np.float64))
    np.testing.assert_allclose(np.linalg.norm(model.points(torch.from_numpy(features_ND)), axis=1), 1, atol=1e-6)
    assert model.centroids_KP is not None
    distances_NK = np.linalg.norm(points_NP[:, None] - model.centroids_KP.double().numpy(), axis=2)
    assert distances_NK.argmin(axis=1).tolist() == final["cluster"]
    np.testing.assert_allclose(found.distance_N, distances_NK.min(axis=1), atol=1e-5)


def test_a_run_that_looks_again_and_whitens(crop_run: CropRun, tmp_path: Path) -> None:
    run = train_crops(crop_run.data, tmp_path / "run", epochs=1, look_again=True, whiten=True, pca=6)
    found = deepcluster.assign(run, crop_run.data, device="cpu")
    final = pq.read_table(run / "assignments" / "epoch-0002.parquet").to_pydict()
    assert found.cluster_N.tolist() == final["cluster"]
    np.testing.assert_allclose(found.distance_N, final["distance"], atol=1e-4)
    context = read(run)
    assert context.collection.points_MP.shape == (30, 6)
    text = text_of(method_section(context.collection, explained(context), INDEX))
    for words in (
        "Extract the features of every image",
        "1 Extract the centre view of 30 images",
        "also whitens them, down to 6 components",
        "the means of the clusters on the",
    ):
        assert words in text
    for words in ("memory bank", "Remember", "is remembered", "what was remembered"):
        assert words not in text, "a step that this run did not take"


def test_assign_of_an_earlier_checkpoint_uses_its_own_projection(crop_run: CropRun) -> None:
    path = crop_run.run / "checkpoints" / "epoch-0001.pt"
    early, model = deepcluster.assign(path, crop_run.data, device="cpu"), deepcluster.load(path)
    features_ND = torch.from_numpy(deepcluster.embed(path, crop_run.data, stage="features", device="cpu").embedding_ND)
    assert model.centroids_KP is not None
    distances_NK = torch.cdist(model.points(features_ND).double(), model.centroids_KP.double())
    assert early.cluster_N.tolist() == distances_NK.argmin(dim=1).tolist()
    np.testing.assert_allclose(early.distance_N, distances_NK.amin(dim=1), atol=1e-5)
    untrained = deepcluster.embed(f"untrained:{crop_run.run}", crop_run.data, limit=3, device="cpu")
    assert np.isfinite(untrained.embedding_ND).all()
    with pytest.raises(InputError, match="has no clusters yet"):
        deepcluster.load(f"untrained:{crop_run.run}").points(features_ND)


def test_info(crop_run: CropRun) -> None:
    assert "5 + 4 clusters" in info(str(crop_run.run))
    assert "clusters=5,4" in info(str(crop_run.run))
    assert "5 clusters on a sphere of 8 projected features" in info(str(crop_run.run / "checkpoints" / "last.pt"))
    assert "conv5 (256" in info("alexnet-small")


KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "super-clusters with turns": (
        {"clustering": "hierarchical", "super_clusters": 2, "rotations": True, "clusters": 9},
        (
            "9 clusters in 2 super-clusters",
            "ReLU and linear layers",
            "The probability is that of the super-cluster times",
            "rotates every image",
        ),
    ),
    "balanced": ({"clustering": "balanced"}, ("Balanced k-means", "5 balanced clusters")),
    "pic": ({"clustering": "pic"}, ("Power iteration clustering", "the means of the clusters")),
}


@pytest.mark.parametrize("options, words", KINDS.values(), ids=KINDS)
def test_kinds_of_the_first_version(
    crop_run: CropRun, tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    run = train_small(crop_run.data, tmp_path / "run", epochs=1, **options)
    context = read(run)
    method = explained(context)
    text = text_of(method_section(context.collection, method, INDEX))
    for one in words:
        assert one in text
    view_1CHW = method.cluster_view([image(context, INDEX)])
    (log_BK,) = method.predictions(method.rows(view_1CHW))
    # A super-class may have no cluster.
    assert 0.5 < log_BK.exp().sum() < 1 + 1e-6
    # The run's own loss of that image, whose head may be a hierarchical one.
    with torch.no_grad():
        features_BD = method.model.trunk(normalise(view_1CHW))
        assert method.head is not None
        losses_K = [float(method.head.loss(features_BD, torch.tensor([k]))) for k in range(log_BK.shape[1])]
    np.testing.assert_allclose(-log_BK[0], losses_K, rtol=1e-4, atol=1e-5)
    assert method.guess(0) > 0
