"""DeepCluster-v2: one step against formulas in float64, and whole small runs."""

import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import assert_same_run, checkpoint, metrics, tables, train_small
from spoiled_images import write_good_images, write_spoiled_images
from test_resume import Recorder, Stopper
from torch import Tensor, nn

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError, Interrupted, TrainingError
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.multi_crop import crop_draws
from deepcluster.data.sources import open_source
from deepcluster.data.views import DRAWS_ALIGNED
from deepcluster.interop.loading import load
from deepcluster.models.trunk import FEATURES, Trunk, normalise
from deepcluster.run.features import make_run_trunk
from deepcluster.run.folder import RunFolder
from deepcluster.run.settings import Settings
from deepcluster.training.deepcluster_v2 import Clusters, DeepClusterV2, Points
from deepcluster.training.loop import Loop
from deepcluster.training.method import Step

N, PLAIN = 9, {"jitter": 0.0, "grey": 0.0, "blur": 0.0}


# A step against formulas


class TinyTrunk(Trunk):
    """Averages of the quarters of each colour, a linear layer and BatchNorm: 4 features."""

    arch, dim, stages, embed_stage = "tiny", 4, (FEATURES,), FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 4), nn.BatchNorm1d(4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        rows: Tensor = self.norm(self.linear(nn.functional.adaptive_avg_pool2d(x_BCHW, 2).flatten(1)))
        return rows

    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield FEATURES, self(x_BCHW)[:, :, None, None]

    def convolutions(self) -> nn.Module:
        return self


class Reference:
    """Weights, statistics and buffers by name in float64; points, loss, gradients and a step from the paper's formulas."""

    def __init__(self, method: DeepClusterV2) -> None:
        named = {
            "w1": method.trunk.linear.weight, "b1": method.trunk.linear.bias,
            "s1": method.trunk.norm.weight, "t1": method.trunk.norm.bias,
            "w2": method.projection.layers[0].weight, "b2": method.projection.layers[0].bias,
            "s2": method.projection.layers[1].weight, "t2": method.projection.layers[1].bias,
            "w3": method.projection.layers[3].weight, "b3": method.projection.layers[3].bias,
        }  # fmt: skip
        self.weights = {name: weight.detach().clone().requires_grad_() for name, weight in named.items()}  # type: ignore[union-attr]
        self.momenta = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.mean = {"1": torch.zeros(4).double(), "2": torch.zeros(6).double()}
        self.var = {"1": torch.ones(4).double(), "2": torch.ones(6).double()}

    def _normed(self, x_NC: Tensor, name: str) -> Tensor:
        """BatchNorm over the rows; the running variance is the one of samples, over n - 1."""
        mean_C, n = x_NC.mean(dim=0), len(x_NC)
        var_C = ((x_NC - mean_C) ** 2).sum(dim=0) / n
        self.mean[name] = 0.9 * self.mean[name] + 0.1 * mean_C.detach()
        self.var[name] = 0.9 * self.var[name] + 0.1 * var_C.detach() * n / (n - 1)
        return (x_NC - mean_C) / (var_C + 1e-5).sqrt() * self.weights[f"s{name}"] + self.weights[f"t{name}"]

    def points(self, crops: Sequence[Tensor]) -> Tensor:
        """Points (V · B, P): the trunk size by size, the projection over all crops."""
        w, features = self.weights, []
        for x_NCHW in crops:
            half = x_NCHW.shape[2] // 2
            quarters = [x_NCHW[:, :, i : i + half, j : j + half].mean(dim=(2, 3)) for i in (0, half) for j in (0, half)]
            rows_ND = torch.stack(quarters, dim=2).flatten(1)
            features.append(self._normed(rows_ND @ w["w1"].T + w["b1"], "1"))
        hidden_NH = self._normed(torch.cat(features) @ w["w2"].T + w["b2"], "2").clamp(min=0)
        points_NP = hidden_NH @ w["w3"].T + w["b3"]
        return points_NP / (points_NP**2).sum(dim=1, keepdim=True).sqrt()

    def loss(self, points_NP: Tensor, prototypes: Sequence[Tensor], labels_HB: Tensor, total: int) -> Tensor:
        """The mean over images, heads and crops of the cross-entropy at temperature 0.1."""
        n_images, losses = labels_HB.shape[1], []
        for prototypes_KP, labels_B in zip(prototypes, labels_HB.tolist(), strict=True):
            for row, point_P in enumerate(points_NP):
                label = labels_B[row % n_images]
                if label >= 0:
                    scores_K = prototypes_KP @ point_P / 0.1
                    losses.append(scores_K.exp().sum().log() - scores_K[label])
        return torch.stack(losses).sum() / (total * len(prototypes) * len(points_NP) / n_images)

    def step(self, loss: Tensor, rate: float, settings: Settings) -> None:
        """SGD with momentum, or LARS; norms and biases neither decay nor have a rate of their own."""
        slopes = dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values())), strict=True))
        length = float(sum((slope**2).sum() for slope in slopes.values())) ** 0.5
        scale = min(1.0, settings.clip_gradient / (length + 1e-6)) if settings.clip_gradient else 1.0
        with torch.no_grad():
            for name, weight in self.weights.items():
                slope, is_layer = scale * slopes[name], name.startswith("w")
                local = 1.0
                if is_layer and settings.optimizer == "lars":
                    local = 0.001 * weight.norm() / (slope.norm() + settings.weight_decay * weight.norm())
                if is_layer:
                    slope = slope + settings.weight_decay * weight
                if settings.optimizer == "lars":
                    self.momenta[name] = 0.9 * self.momenta[name] + rate * local * slope
                    weight -= self.momenta[name]
                else:
                    self.momenta[name] = 0.9 * self.momenta[name] + slope
                    weight -= rate * self.momenta[name]


def small_method(black: Path, **options: Any) -> DeepClusterV2:
    """A method on nine images that are never read, with labels of two heads; the image 3 is in no cluster of the first."""
    torch.manual_seed(0)
    given = {
        "image_size": 16,
        "crops": "2x16,3x8",
        "clusters": (4, 3),
        "projection": (6, 5),
        "sobel": False,
        "look_again": False,
        **PLAIN,
    }
    settings = Settings.from_dict({"method": "deepcluster-v2", "momentum": 0.9, "weight_decay": 0.01, **given, **options})
    method = DeepClusterV2(
        TinyTrunk(),
        Loader(DecodedImages(open_source(black)), workers=0),
        settings,
        Machine.choose("cpu", "fp64"),
    )
    labels_HN = torch.stack([torch.randint(0, count, (N,)) for count in settings.heads])
    labels_HN[0, 3] = -1
    centroids = [nn.functional.normalize(torch.randn(count, 5)) for count in settings.heads]
    groups = [Assignment(labels_N, torch.zeros(N), one) for labels_N, one in zip(labels_HN, centroids, strict=True)]
    method.make_labels(Clusters(groups, Points(torch.zeros(N, 2, 5))), epoch=1)
    for network in method.networks:
        network.train()
    return method


@pytest.fixture(scope="module")
def black(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of nine images that are never looked at."""
    path = tmp_path_factory.mktemp("arrays") / "black.npy"
    np.save(path, np.zeros((N, 16, 16, 3), np.uint8))
    return path


def batch_of(indices: list[int], seed: int, crops: Sequence[tuple[int, int]]) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = tuple(
        torch.randint(0, 256, (count * len(indices), 3, size, size), generator=generator, dtype=torch.uint8)
        for count, size in crops
    )
    n_views = sum(count for count, _ in crops)
    return Batch(images, torch.tensor(indices), np.full((len(indices), n_views, DRAWS_ALIGNED), 0.5))


STEPS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "lars": {"optimizer": "lars", "lr": 3.0},
    "clipped": {"clip_gradient": 0.1},
    "one size, one head": {"crops": "2x16", "clusters": 4},
}


@pytest.mark.parametrize("name", STEPS)
def test_three_steps_are_those_of_the_paper(name: str, black: Path) -> None:
    """Loss, all weights and statistics; the points of the large crops in the bank; prototypes stay as they are."""
    method = small_method(black, **STEPS[name])
    settings, reference = method.settings, Reference(method)
    prototypes = [one.clone() for one in method.prototypes]
    crops = settings.crop_groups
    for number, indices in enumerate(([5, 3, 0, 8], [1, 7, 2], [4, 6])):
        batch, factor = batch_of(indices, number, crops), 1 / (1 + number)
        labels_HB = torch.stack([one.labels_N[batch.indices_B] for one in method.assignments])
        points_NP = reference.points([normalise(crop).double() for crop in batch.crops])
        # Seven images on all ranks: this rank's part of the mean.
        expected = reference.loss(points_NP, [one.double() for one in prototypes], labels_HB, 7)
        found = method.train_step(batch, Step(1, slice(4 * number, 4 * number + len(indices)), factor, 0, 7))
        assert float(found) == pytest.approx(float(expected.detach()), rel=1e-12)
        reference.step(expected, settings.lr * factor, settings)

        rows = {int(index): row_VP for index, row_VP in zip(method.bank.all()[0], method.bank.all()[2], strict=True)}
        large = settings.crop_groups[0][0]
        points_VBP = points_NP.detach().view(-1, len(indices), 5)[:large]
        for place, index in enumerate(indices):
            torch.testing.assert_close(rows[index].double(), points_VBP[:, place], rtol=2**-11, atol=1e-7)
    for weight, wanted in zip(method.network.parameters(), reference.weights.values(), strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), wanted.detach().numpy(), rtol=1e-9, atol=1e-11)
    for norm, key in ((method.trunk.norm, "1"), (method.projection.layers[1], "2")):
        np.testing.assert_allclose(norm.running_mean.numpy(), reference.mean[key].numpy(), rtol=1e-10)  # type: ignore[union-attr, operator]
        np.testing.assert_allclose(norm.running_var.numpy(), reference.var[key].numpy(), rtol=1e-10)  # type: ignore[union-attr, operator]
    for one, before in zip(method.prototypes, prototypes, strict=True):
        assert torch.equal(one, before) and not one.requires_grad
    assert sorted(method.bank.all()[0].tolist()) == list(range(N))


def test_a_batch_without_an_image_writes_nothing_and_learns_nothing(black: Path) -> None:
    """What a rank does that could read none of its images, while others wait."""
    method = small_method(black, weight_decay=0.0)
    before = [weight.detach().clone() for weight in method.network.parameters()]
    batch = method.blank_batch()
    assert method.train_step(batch, Step(1, slice(0, 1), 1.0, 0, 5)) == 0
    assert len(method.bank) == 0
    for weight, old in zip(method.network.parameters(), before, strict=True):
        assert torch.equal(weight, old)


def test_heads_are_made_of_the_large_crops_in_turn(black: Path) -> None:
    """Of three heads the first and the third group the first crop, the second head the second one."""
    method = small_method(black, clusters=(3, 3, 3))
    first_N, second_N = torch.arange(N) % 3, torch.arange(N) // 3
    corners = torch.eye(5)
    rows_NVP = torch.stack([corners[first_N], corners[second_N]], dim=1)
    method.bank.write(torch.arange(N), torch.arange(N), rows_NVP)
    found = method.cluster(method.whiten(method.bank), epoch=1).assignments
    assert [one.nmi(first_N) for one in found] == pytest.approx([1, found[1].nmi(first_N), 1])
    assert found[1].nmi(second_N) == pytest.approx(1)
    for one in found:
        torch.testing.assert_close(one.centroids_KP.norm(dim=1), torch.ones(3))
        assert one.inertia == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("whiten", [False, True])
def test_prototypes_are_the_means_of_clusters_on_the_sphere(whiten: bool, black: Path) -> None:
    """Of the crop of each head, in float64; whitened rows have means as they were before."""
    method = small_method(black, clusters=(3, 2), whiten=whiten, kmeans_iterations=50)
    rows_NVP = nn.functional.normalize(torch.randn(N, 2, 5), dim=2)
    method.bank.write(torch.arange(N), torch.arange(N), rows_NVP)
    method.make_labels(method.cluster(method.whiten(method.bank), epoch=1), epoch=1)
    for head, (one, prototypes_KP) in enumerate(zip(method.assignments, method.prototypes, strict=True)):
        rows_NP = rows_NVP[:, head].half().double().numpy()
        if not whiten:  # k-means on the sphere takes directions alone
            rows_NP = rows_NP / np.linalg.norm(rows_NP, axis=1, keepdims=True)
        for cluster, prototype_P in enumerate(prototypes_KP.numpy()):
            mean_P = rows_NP[one.labels_N.numpy() == cluster].mean(axis=0)
            np.testing.assert_allclose(prototype_P, mean_P / np.linalg.norm(mean_P), atol=1e-5)
    assert len(method.bank) == 0


# Whole runs

V2: dict[str, Any] = {
    "method": "deepcluster-v2",
    "recipe": "v2-small-set",
    "look_again": False,
    "whiten": False,
    "clusters": (5, 4),
    "crops": "2x16,1x8",
    "projection": (16, 8),
    "cluster_stage": "features",
    "dropout": 0.0,
    "epochs": 2,
    "lr": 0.05,
}


def train_v2(data: Any, out: Path, **options: Any) -> Path:
    return train_small(data, out, **{**V2, **options})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 good images and three spoiled ones."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    write_good_images(folder, 33, size=(20, 18))
    write_spoiled_images(folder, 3)
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_v2(photos, tmp_path_factory.mktemp("runs") / "whole")


def test_the_run_folder_is_as_that_of_the_first_version(photos: Path, whole: Path, trained: Path) -> None:
    assert metrics(whole)[0].keys() == metrics(trained)[0].keys()
    assert json.loads((whole / "config.json").read_text())["settings"]["clusters"] == [5, 4]
    names = sorted(path.name for path in photos.iterdir())
    assert list(tables(whole)) == ["epoch-0001.parquet", "epoch-0002.parquet", "epoch-0003.parquet"]
    for table in tables(whole).values():
        assert table["name"] == names
        spoiled = [name.startswith("spoiled") for name in names]
        assert [cluster == -1 for cluster in table["cluster"]] == spoiled
        assert [distance is None for distance in table["distance"]] == spoiled
        # Points and centroids have unit length.
        assert all(0 <= distance <= 2 for distance in table["distance"] if distance is not None)
    for line in metrics(whole):
        table = tables(whole)[f"epoch-{line['epoch']:04d}.parquet"]
        sizes = np.bincount([cluster for cluster in table["cluster"] if cluster >= 0], minlength=5)
        assert line["clusters"] == 5 and line["clusters_nonempty"] == (sizes > 0).sum()
        assert line["largest_cluster_share"] == pytest.approx(sizes.max() / 33)
        squares = np.square([distance for distance in table["distance"] if distance is not None])
        assert line["inertia"] == pytest.approx(squares.sum(), rel=1e-5)
    assert metrics(whole)[0]["nmi_previous"] is None and 0 <= metrics(whole)[1]["nmi_previous"] <= 1


def test_the_checkpoint_holds_all_that_is_needed(whole: Path) -> None:
    for path in (whole / "checkpoints").iterdir():
        state = torch.load(path, weights_only=True)
        assert state["format"] == "deepcluster-1"
        assert len(state["other_assignments"]) == 1
        assert state["rows"]["bank"]["rows"].shape == (33, 2, 8)
        assert len(state["rows"]["bank"]["indices"].unique()) == 33
    assert checkpoint(whole)["final"]["assignment"]["centroids_KP"].shape == (5, 8)


def test_the_final_clusters_are_those_that_the_model_assigns(photos: Path, whole: Path) -> None:
    """The centre views' features, projected with the statistics of training, are nearest to the cluster's centroid."""
    model = load(whole)
    features_ND, unreadable = model.features(open_source(photos), stage=FEATURES)
    assert len(unreadable) == 3 and model.space is not None and model.centroids_KP is not None
    seen_N = torch.isfinite(features_ND).all(dim=1)
    points_MP = model.space.transform(features_ND[seen_N])
    final = checkpoint(whole)["final"]["assignment"]
    distances_MK = torch.cdist(points_MP.double(), model.centroids_KP.double())
    torch.testing.assert_close(distances_MK.min(dim=1).values.float(), final["distances_N"][seen_N], rtol=0, atol=1e-5)
    assert (final["labels_N"][seen_N] == distances_MK.argmin(dim=1)).float().mean() > 0.95


def test_neither_workers_nor_the_cache_nor_another_start_change_a_run(photos: Path, whole: Path, tmp_path: Path) -> None:
    assert_same_run(train_v2(photos, tmp_path / "run", workers=0, cache="none"), whole)


def test_the_last_rate_is_that_of_the_schedule(whole: Path) -> None:
    """Of 2 epochs of 3 batches, with a warm-up of one epoch: the last step is at 1 + 2/3."""
    rates = [group["lr"] for group in checkpoint(whole)["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.05 * 0.5 * (1 + np.cos(np.pi * 2 / 3))] * 2)


# Each a kind of place where a run may stop, with the line after which.
STOPS = {
    "in the fill": ("features", 2, ""),
    "in the first clustering": ("clustering", 1, ""),
    "in the clustering of the second head": ("clustering", 6, ""),
    "in the middle of the first epoch": ("epoch 1", 3, ""),
    "between epochs": ("say epoch 1/2", 1, ""),
    "in the second clustering": ("clustering", 2, ""),
    "in the middle of the second epoch": ("epoch 2", 3, ""),
    "in the look of the finished trunk": ("features", 1, ""),
    "in the clustering of the finished trunk": ("clustering", 2, ""),
}


def test_a_run_that_is_stopped_everywhere_ends_as_if_it_had_not_been(photos: Path, whole: Path, tmp_path: Path) -> None:
    """A stop inside steps 1 to 3 repeats them; in mid-epoch the bank is saved, and continues."""
    sizes = []
    for what, call, after in STOPS.values():
        with pytest.raises(Interrupted):
            train_v2(photos, tmp_path / "run", resume=True, reporter=Stopper(what, call, after=after))
        if (tmp_path / "run/checkpoints/last.pt").is_file():
            state = checkpoint(tmp_path / "run")
            sizes.append((state["epoch"], state["labelled"], len(state["rows"]["bank"]["indices"])))
    epoch, labelled, n_rows = sizes[0]
    assert (epoch, labelled) == (1, True) and 0 < n_rows < 33
    assert len(sizes) == len(STOPS) - 3
    train_v2(photos, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_with_a_pass_before_each_clustering(photos: Path, tmp_path: Path) -> None:
    """The bank holds centre views until they are clustered; a stop in a clustering repeats the pass."""
    reporter = Recorder()
    run = train_v2(photos, tmp_path / "whole", look_again=True, reporter=reporter)
    done = [what for what, _ in reporter.done if what in ("features", "clustering") or what.startswith("epoch")]
    order = [what for what, _ in groupby(done)]
    assert order == ["features", "clustering", "epoch 1", "features", "clustering", "epoch 2", "features", "clustering"]
    assert len(checkpoint(run)["rows"]["bank"]["indices"]) == 0
    for what, call, after in (("clustering", 2, ""), ("epoch 1", 3, ""), ("clustering", 2, "")):
        with pytest.raises(Interrupted):
            train_v2(photos, tmp_path / "run", look_again=True, resume=True, reporter=Stopper(what, call, after=after))
    reporter = Recorder()
    train_v2(photos, tmp_path / "run", look_again=True, resume=True, reporter=reporter)
    done = [what for what, _ in reporter.done if what in ("features", "clustering") or what.startswith("epoch")]
    assert [what for what, _ in groupby(done)] == ["features", "clustering", "epoch 2", "features", "clustering"]
    assert_same_run(tmp_path / "run", run)


def test_a_finished_run_is_extended_by_a_second_cosine(photos: Path, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    train_v2(photos, run, epochs=3, resume=True)
    assert_same_run(run, train_v2(photos, tmp_path / "at-once", epochs=3, lr_restarts=(2,)))
    with pytest.raises(InputError, match="holds a run already"):
        train_v2(photos, whole)


def test_a_constant_rate_goes_on_and_overwrite_begins_anew(photos: Path, whole: Path, tmp_path: Path) -> None:
    """The third epoch of a run that was asked for two, and then for three, groups what the bank kept."""
    run = shutil.copytree(whole, tmp_path / "run")
    options: dict[str, Any] = {"lr_schedule": "constant", "batch_size": 36}
    train_v2(photos, run, overwrite=True, epochs=1, **options)
    assert len(metrics(run)) == 1 and len(tables(run)) == 2
    train_v2(photos, run, resume=True, epochs=2, **options)
    # The warm-up is of one epoch whatever the run's length.
    assert_same_run(run, train_v2(photos, tmp_path / "at-once", epochs=2, **options))


def test_empty_clusters_are_repaired(tmp_path: Path) -> None:
    """Of 12 images ten are the same: of ten clusters most would be empty."""
    folder = tmp_path / "photos"
    names = write_good_images(folder, 12, size=(20, 18))
    for name in names[3:]:
        (folder / name).unlink()
        shutil.copy(folder / names[0], folder / f"{Path(name).stem}{Path(names[0]).suffix}")
    run = train_v2(folder, tmp_path / "run", clusters=(10, 8), epochs=1, batch_size=6, pca=4)
    assert metrics(run)[0]["clusters_nonempty"] == 10


def test_a_rate_that_is_too_high_is_told(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite|became nan.*Try a lower --lr"):
        train_v2(photos, tmp_path / "run", lr=1e38, warmup_epochs=0.0)
    assert not (tmp_path / "run/checkpoints/last.pt").exists()


class Counted(DecodedImages):
    """Counts how often images are asked for."""

    asked = 0

    def pixels(self, index: int) -> Any:
        self.asked += 1
        return super().pixels(index)


def counted_loop(photos: Path, **options: Any) -> tuple[Loop, DeepClusterV2, Counted]:
    given = {key: value for key, value in V2.items() if key != "recipe"}
    small = {"arch": "alexnet-small", "image_size": 16, "sobel": False, "batch_size": 16}
    settings = Settings.from_dict({**small, **given, "epochs": 4, **options})
    images = Counted(open_source(photos))
    method = DeepClusterV2(
        make_run_trunk(settings),
        Loader(images, workers=0),
        settings,
        Machine.choose("cpu", "fp32"),
    )
    return Loop(method), method, images


def test_no_epoch_but_the_first_has_a_pass_of_its_own(photos: Path) -> None:
    """33 images can be read, and three are tried once: the first epoch fills the bank and learns, others learn alone."""
    loop, _, images = counted_loop(photos)
    asked, lines = [], []
    for _ in range(3):
        lines.append(loop.run_epoch())
        asked.append(images.asked - sum(asked))
    assert asked == [33 + 33 + 3, 33, 33]
    assert lines[0]["seconds"]["features"] > 0
    assert [line["seconds"]["features"] for line in lines[1:]] == [0, 0]
    assert all(line["seconds"]["clustering"] > 0 for line in lines)


@pytest.mark.parametrize("options", [{"stop_reassigning": 1}, {"reassign_every": 3}], ids=str)
def test_without_a_clustering_labels_stay_and_the_bank_keeps_one_epoch(options: dict[str, Any], photos: Path) -> None:
    loop, method, _ = counted_loop(photos, **options)
    loop.run_epoch()
    labels_N, prototypes = method.current.labels_N.clone(), [one.clone() for one in method.prototypes]
    first_MVP = method.bank.all()[2]
    line = loop.run_epoch()
    assert line["seconds"]["clustering"] == 0
    assert torch.equal(method.current.labels_N, labels_N)
    assert all(torch.equal(one, before) for one, before in zip(method.prototypes, prototypes, strict=True))
    assert len(method.bank) == 33
    assert not torch.equal(method.bank.all()[2], first_MVP)
    loop.run_epoch()
    assert (loop.run_epoch()["seconds"]["clustering"] > 0) == ("reassign_every" in options)


def test_the_rows_of_the_bank_are_of_the_right_images(photos: Path) -> None:
    """Against crops that are cut image by image: at a rate of zero, in one batch, so that the order means nothing."""
    loop, method, images = counted_loop(photos, crops="2x16", lr=0.0, batch_size=64)
    order_N = method.draw_images(epoch=1)
    loop.run_epoch()
    indices_M, _, rows_MVP = method.bank.all()
    assert len(indices_M) == 33 and not set(method.loader.unreadable) & set(indices_M.tolist())
    place = {index: position for position, index in enumerate(order_N.tolist())}
    crops = [
        method.view([images.get(index)], crop_draws(method.settings.seed, 1, place[index], 1, 2))[0]
        for index in indices_M.tolist()
    ]
    crops_NCHW = torch.stack(crops, dim=1).flatten(0, 1)
    with torch.no_grad():
        points_NP = method.projection.train()(method.trunk.train()(normalise(crops_NCHW)))
    torch.testing.assert_close(rows_MVP.float(), points_NP.view(2, 33, 8).transpose(0, 1), rtol=0, atol=2e-3)


def test_weights_to_start_from_are_those_of_the_first_fill(photos: Path, whole: Path, tmp_path: Path) -> None:
    """With a rate of zero the trunk stays what it began as, but for the statistics of BatchNorm."""
    run = train_v2(photos, tmp_path / "run", init=str(whole), lr=0.0, epochs=1)
    weights, given = checkpoint(run)["trunk"], checkpoint(whole)["trunk"]
    assert weights.keys() == given.keys()
    for name, value in weights.items():
        assert torch.equal(value, given[name]) or "running" in name or "num_batches" in name
    assert str(whole) in (run / "train.log").read_text()
    assert RunFolder(run).read_config()["settings"]["init"] == str(whole)
