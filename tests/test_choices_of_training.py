"""What may be chosen of the first version's training, shown by small runs; and what does not go together."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import SMALL, assert_same_run, checkpoint, metrics, tables, train_small
from spoiled_images import write_good_images, write_spoiled_images
from test_resume import Stopper
from torch import Tensor

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.interruption import Interruption
from deepcluster.core.progress import Meter, Reporter
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.sources import open_source
from deepcluster.models.heads import ClusterHead, HierarchicalHead
from deepcluster.models.trunk import FEATURES, normalise
from deepcluster.run.features import feature_batches, image_features, make_run_trunk
from deepcluster.run.settings import Settings
from deepcluster.training.deepcluster import DeepCluster

START: dict[str, Any] = {"head_start": "centroids", "cluster_stage": "features", "pca": 8}
TURNED: dict[str, Any] = {"super_clusters": 2, "rotations": True, "clusters": 9}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 good images and three spoiled ones."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    write_good_images(folder, 33, size=(20, 18))
    write_spoiled_images(folder, 3)
    return folder


class Looks(Reporter):
    """Counts how often the images are looked at, by the epochs done before."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.epochs_done, self.looks = 0, [0]

    def say(self, line: str) -> None:
        if line.startswith("epoch "):
            self.looks.append(0)

    @contextmanager
    def track(self, what: str, total: int | None, unit: str = "images") -> Iterator[Meter]:
        self.looks[-1] += what == "features"
        yield Meter()


class Counted(DecodedImages):
    """Counts how often images are asked for."""

    asked = 0

    def get(self, index: int) -> Tensor:
        self.asked += 1
        return super().get(index)


def method_of(photos: Path, **options: Any) -> DeepCluster:
    given = {key: value for key, value in SMALL.items() if key not in ("recipe", "device", "precision", "workers")}
    settings = Settings.from_dict({**given, "sobel": False, "epochs": 4, **options})
    return DeepCluster(
        make_run_trunk(settings),
        Loader(Counted(open_source(photos)), workers=0),
        settings,
        Machine.choose("cpu", "fp32"),
        reporter=Reporter(quiet=True),
        interruption=Interruption(),
        save=lambda: None,
    )


def stopped_everywhere(photos: Path, tmp_path: Path, stops: list[tuple[str, int, str]], **options: Any) -> None:
    """A run that is stopped at each of the places, one after the other, ends as one that is not."""
    whole = train_small(photos, tmp_path / "whole", **options)
    for what, call, after in stops:
        with pytest.raises(Interrupted):
            train_small(photos, tmp_path / "run", resume=True, reporter=Stopper(what, call, after=after), **options)
    train_small(photos, tmp_path / "run", resume=True, **options)
    assert_same_run(tmp_path / "run", whole)


STOPS = [
    ("clustering", 2, ""),
    ("epoch 1", 3, ""),
    ("clustering", 2, ""),
    ("clustering", 2, ""),
]
CHOICES: dict[str, dict[str, Any]] = {
    "features of the epoch before": {"look_again": False, "cluster_stage": "conv3"},
    "heads from centroids": START,
    "both": {"look_again": False, **START},
    "rotations": TURNED,
}


@pytest.mark.parametrize(
    "name", [name if name in ("both", "rotations") else pytest.param(name, marks=pytest.mark.slow) for name in CHOICES]
)
def test_a_stopped_run_ends_as_if_it_had_not_been(name: str, photos: Path, tmp_path: Path) -> None:
    """In both clusterings, in the middle of an epoch, and in the clustering of the finished trunk."""
    stopped_everywhere(photos, tmp_path, STOPS, **CHOICES[name])


# Features of the epoch before


def test_features_of_the_epoch_before_spare_all_looks_but_the_first_and_the_last(photos: Path, tmp_path: Path) -> None:
    reporter = Looks()
    run = train_small(photos, tmp_path / "run", look_again=False, reporter=reporter)
    assert reporter.looks == [1, 0, 1]
    assert all(line["seconds"]["clustering"] > 0 for line in metrics(run))
    assert [-1 in table["cluster"] for table in tables(run).values()] == [True] * 3


def test_no_image_is_read_but_to_be_learned(photos: Path) -> None:
    method, asked = method_of(photos, look_again=False), []
    images = method.loader.images
    assert isinstance(images, Counted)
    for _ in range(3):
        method.run_epoch()
        asked.append(images.asked - sum(asked))
    # Three can't be read, and are tried once.
    assert asked == [33 + 3 + 33, 33, 33]


@pytest.mark.parametrize("stage", ["conv3", "features"])
def test_what_is_grouped_is_what_the_last_crop_of_each_image_was(stage: str, photos: Path) -> None:
    """At a rate of zero: each crop of the epoch, batch by batch in train mode, by the trunk as it was before."""
    method = method_of(photos, look_again=False, cluster_stage=stage, pca=8, lr=0.0, batch_size=12)
    method.run_epoch()
    method.epoch -= 1
    order_N = method.draw_images()
    method.epoch += 1
    expected = {}
    parts = [slice(start, start + 11) for start in (0, 11, 22)]
    views = method.loader.training_views(method.view, order_N, parts, seed=method.settings.seed, epoch=1)
    method.trunk.train()
    for batch in views:
        with torch.no_grad():
            rows_BC = method.trunk.vectors(normalise(batch.images_BCHW), stage)
        expected.update(zip(batch.indices_B.tolist(), rows_BC, strict=True))
    assert method.past is not None
    found = {int(i): row for rows, indices in method.past.batches(7) for i, row in zip(indices, rows, strict=True)}
    assert 15 < len(expected) < 33 and found.keys() == set(range(33))
    for index, row_C in expected.items():
        torch.testing.assert_close(found[index], row_C, rtol=2e-3, atol=2e-3)
    # Images that were not drawn keep what they were at the first look.
    method.trunk.load_state_dict(make_run_trunk(method.settings).state_dict())
    first_ND = image_features(method.trunk, method.loader, method.machine, stage=stage, image_size=16)
    for index in set(found) - set(expected):
        torch.testing.assert_close(found[index], first_ND[index].float(), rtol=2e-3, atol=2e-3)


# Heads from centroids


def test_a_head_from_centroids_scores_the_nearest_mean(photos: Path) -> None:
    """Against a softmax of -|x - c|² / 2 spread in float64, of the features that were grouped."""
    method = method_of(photos, **START)
    method.epoch = 2
    looked = method.look_at_images()
    points = method.shorten_and_whiten(looked)
    rows_ND = torch.cat([rows_BD for _, rows_BD in looked.rows.batches()]).double()
    method.make_labels(method.group(points), points)
    labels_N = method.current.labels_N
    seen_N = labels_N >= 0
    rows_MD, labels_M = rows_ND[seen_N].relu(), labels_N[seen_N]
    means_KD = torch.stack([rows_MD[labels_M == cluster].mean(dim=0) for cluster in range(5)])
    spread = (rows_MD - means_KD[labels_M]).square().sum(dim=1).mean()
    expected_MK = (-(rows_MD[:, None] - means_KD).square().sum(dim=2) / (2 * spread)).log_softmax(dim=1)
    assert method.learner is not None
    head = method.learner.head.double()
    torch.testing.assert_close(head(rows_ND[seen_N]).log_softmax(dim=1), expected_MK, rtol=1e-4, atol=1e-4)

    loss = float(head.loss(rows_ND[seen_N], labels_M).detach().mean())
    random = ClusterHead(256, 5, seed=0).double()
    assert loss < float(random.loss(rows_ND[seen_N], labels_M).detach().mean()) < np.log(5) + 0.1


def test_heads_from_centroids_begin_below_random_ones(photos: Path) -> None:
    """At a rate of zero the loss of an epoch is that of the head's start; of the first epoch it is random in both."""
    losses = {}
    for start in ("random", "centroids"):
        method = method_of(photos, lr=0.0, crop_scale=(0.8, 1.0), batch_size=3, **{**START, "head_start": start})
        losses[start] = [method.run_epoch()["loss"] for _ in range(2)]
    assert losses["centroids"][0] == losses["random"][0]
    assert losses["centroids"][1] < losses["random"][1] - 0.1


# No more clusterings


def test_labels_stay_after_the_last_clustering(photos: Path) -> None:
    """And the head goes on: at a rate of zero it would otherwise be made anew."""
    method, labels, heads, lines = method_of(photos, stop_reassigning=2, lr=0.0), [], [], []
    for _ in range(4):
        lines.append(method.run_epoch())
        labels.append(method.current.labels_N)
        assert method.learner is not None
        heads.append(method.learner.head.linear.weight.detach().clone())  # type: ignore[union-attr]
    assert [line["seconds"]["clustering"] > 0 for line in lines] == [True, True, False, False]
    assert [line["seconds"]["features"] > 0 for line in lines] == [True, True, False, False]
    assert [line["inertia"] for line in lines[1:]] == [lines[1]["inertia"]] * 3
    assert torch.equal(labels[1], labels[2]) and torch.equal(labels[2], labels[3])
    assert not torch.equal(heads[0], heads[1]) and torch.equal(heads[1], heads[3])


# Super-clusters


def test_clusters_lie_within_super_clusters(photos: Path, tmp_path: Path) -> None:
    run = train_small(photos, tmp_path / "run", super_clusters=3, clusters=9)
    state = checkpoint(run)
    assert state["assignment"]["super_of_cluster_K"].tolist() == sorted(state["assignment"]["super_of_cluster_K"].tolist())
    assert {name: value.shape for name, value in state["head"].items()} == {
        "supers.linear.weight": (3, 256),
        "supers.linear.bias": (3,),
    }
    layers = [state["parts"]["head"][f"layers.{number}.weight"] for number in range(3)]
    assert torch.cat(layers).shape == (9, 256) and len(state["parts"]["head"]) == 6
    for table in tables(run).values():
        assert set(table["cluster"]) == {-1, *range(9)}


class Watched(DeepCluster):
    """Keeps what was learned: the images as the network saw them, and of which image each was."""

    def __init__(self, *parts: Any, **told: Any) -> None:
        super().__init__(*parts, **told)
        self.learned: list[tuple[Batch, Tensor]] = []

    def step(self, batch: Batch, positions: slice, factor: float, seed: int, total: int) -> Tensor:
        seen: list[Tensor] = []
        hook = self.network.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        loss = super().step(batch, positions, factor, seed, total)
        hook.remove()
        self.learned.append((batch, seen[0]))
        return loss


def test_turned_images_are_grouped_and_learned_by_the_same_quarters(photos: Path) -> None:
    """Their features are those of turned centre views; the crops are turned alike; super-classes tell the turns apart."""
    method = method_of(photos, **TURNED)
    method.__class__ = Watched
    assert isinstance(method, Watched)
    method.learned = []
    looked = method.look_at_images()
    quarters_N = method.quarters_N
    assert quarters_N is not None and set(quarters_N.tolist()) == {0, 1, 2, 3}
    rows_ND = torch.cat([rows_BD for _, rows_BD in looked.rows.batches()])
    method.trunk.eval()
    upright = torch.cat([batch.images_BCHW for batch in method.loader.cluster_views(_view(), torch.arange(36), 64)])
    readable = [index for index in range(36) if index not in method.loader.unreadable]
    turned = torch.stack(
        [torch.rot90(one, int(quarters_N[index]), (1, 2)) for one, index in zip(upright, readable, strict=True)]
    )
    with torch.no_grad():
        expected_MD = method.trunk.vectors(normalise(turned), "conv5")
    torch.testing.assert_close(rows_ND[readable], expected_MD, rtol=1e-4, atol=1e-5)

    points = method.shorten_and_whiten(looked)
    method.make_labels(method.group(points), points)
    assignment = method.current
    assert assignment.super_of_cluster_K is not None
    supers_M = assignment.super_of_cluster_K[assignment.labels_N[readable]]
    assert torch.equal(supers_M % 4, quarters_N[readable].long())
    assert method.learner is not None and isinstance(method.learner.head, HierarchicalHead)

    method.labelled = True
    method.learn_labels()
    assert sum(len(batch.indices_B) for batch, _ in method.learned) == 33
    for batch, seen_BCHW in method.learned:
        for crop, index, seen in zip(batch.images_BCHW, batch.indices_B.tolist(), seen_BCHW, strict=True):
            expected = normalise(torch.rot90(crop, int(quarters_N[index]), (1, 2))[None])[0]
            torch.testing.assert_close(seen, expected)


def _view() -> Any:
    from deepcluster.data.views import ClusterView

    return ClusterView(16)


def test_the_finished_trunk_groups_upright_images(photos: Path) -> None:
    """With the points' whitening: those of the plain look, whatever the turns of the last epoch were."""
    method = method_of(photos, **TURNED)
    method.run_epoch()
    quarters_N = method.quarters_N
    assert quarters_N is not None
    assignment, whitening = method.cluster_finished_trunk()
    rows = feature_batches(method.trunk, method.loader, method.machine, stage="conv5", image_size=16)
    rows_MD, indices_M = (torch.cat(parts) for parts in zip(*rows, strict=True))
    points_MP = whitening.transform(rows_MD)
    distances_M = (points_MP - assignment.centroids_KP[assignment.labels_N[indices_M]]).norm(dim=1)
    torch.testing.assert_close(distances_M, assignment.distances_N[indices_M], rtol=0, atol=1e-3)
    assert assignment.super_of_cluster_K is not None and int(assignment.super_of_cluster_K.max()) < 2
    assert method.quarters_N is quarters_N


def test_turns_are_drawn_anew_at_each_clustering(photos: Path) -> None:
    method = method_of(photos, reassign_every=2, **TURNED)
    drawn = []
    for _ in range(3):
        method.run_epoch()
        assert method.quarters_N is not None
        drawn.append(method.quarters_N)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


# Other choices


@pytest.fixture(scope="module")
def plain(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(photos, tmp_path_factory.mktemp("plain") / "run", epochs=1)


def test_weights_to_start_from(photos: Path, plain: Path, tmp_path: Path) -> None:
    """From a run, and from a checkpoint: the trunk's weights are those; at a rate of zero they stay, but for BatchNorm's."""
    weights = checkpoint(plain)["trunk"]
    for name, init in (("run", plain), ("file", plain / "checkpoints/epoch-0001.pt")):
        run = train_small(photos, tmp_path / name, epochs=1, lr=0.0, init=str(init), seed=7)
        for key, value in checkpoint(run)["trunk"].items():
            assert torch.equal(value, weights[key]) or "running" in key or "num_batches" in key
    other = make_run_trunk(Settings.from_dict({**checkpoint(plain)["settings"], "seed": 7}))
    assert not torch.equal(other.state_dict()["features.0.weight"], weights["features.0.weight"])


def test_a_file_that_is_none_of_weights_is_told_before_the_run_begins(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.pt"):
        train_small(photos, tmp_path / "run", init=str(tmp_path / "nowhere.pt"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [{"optimizer": "lars", "lr": 1.0}, {"clip_gradient": 0.1}, {"warmup_epochs": 1.0, "lr_schedule": "cosine"}]
)
def test_other_steps_train_and_give_other_weights(
    options: dict[str, Any], photos: Path, plain: Path, tmp_path: Path
) -> None:
    run = train_small(photos, tmp_path / "run", epochs=1, **options)
    one, other = (torch.cat([value.flatten().float() for value in checkpoint(of)["trunk"].values()]) for of in (plain, run))
    assert torch.isfinite(other).all() and not torch.equal(one, other)


def test_a_trunk_of_torchvision_is_trained_by_its_name(photos: Path, tmp_path: Path) -> None:
    options = {"arch": "torchvision:mobilenet_v3_small", "image_size": 32, "cluster_stage": "features", "pca": 8}
    run = train_small(photos, tmp_path / "run", epochs=1, sobel=False, **options)
    assert np.isfinite(metrics(run)[0]["loss"])
    assert checkpoint(run)["settings"]["arch"] == "torchvision:mobilenet_v3_small"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "deepcluster-v2", "recipe": "v2-small-set", "cluster_stage": "features", "projection": (16, 8)}],
    ids=["first version", "v2"],
)
def test_a_compiled_network_learns_the_same(options: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    """To rounding; and its state is that of a network that is not."""
    runs = [
        train_small(photos, tmp_path / str(compiled), epochs=1, compile=compiled, **options) for compiled in (False, True)
    ]
    losses = [metrics(run)[0]["loss"] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert checkpoint(runs[0])["trunk"].keys() == checkpoint(runs[1])["trunk"].keys()


# What does not go together

V2 = {"method": "deepcluster-v2"}
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.0}, "temperature=0 must be more than 0; 0.1 is usual"),
    (
        {**V2, "crops": "2x32", "image_size": 48},
        "crops=2x32 begins with crops of 32 px, and image_size=48.* --image-size 32",
    ),
    ({**V2, "crops": "2x"}, "'2x' is not a number and a side; write it as 2x224,6x96"),
    ({"crops": "1x224"}, "is one crop, and there is no other one to learn from"),
    ({**V2, "clustering": "pic"}, "clustering=pic does not go with method=deepcluster-v2; leave it out"),
    ({**V2, "balance": True}, "balance=True does not go with method=deepcluster-v2"),
    ({**V2, "cluster_stage": "conv5"}, "cluster_stage=conv5 does not go with method=deepcluster-v2"),
    ({**V2, "super_clusters": 4}, "super_clusters=4 does not go with method=deepcluster-v2"),
    ({**V2, "rotations": True}, "rotations=True does not go with method=deepcluster-v2"),
    ({**V2, "head_start": "centroids"}, "head_start=centroids does not go with method=deepcluster-v2"),
    ({**V2, "sampling": "as-published"}, "sampling=as-published does not go with method=deepcluster-v2"),
    ({"clusters": (20, 30)}, "clusters=20,30: several groupings go with --method deepcluster-v2 alone"),
    ({"crops": "2x224"}, "crops=2x224: several crops of an image go with --method deepcluster-v2 alone"),
    ({"super_clusters": 4, "clustering": "pic"}, "super_clusters goes with --clustering kmeans"),
    ({"super_clusters": 4, "balance": True}, "super_clusters goes with --clustering kmeans, without --balance"),
    ({"super_clusters": 4, "head_start": "centroids"}, "super_clusters goes with .* --head-start random"),
    ({"super_clusters": 40, "clusters": 20}, "super_clusters=40 is more than clusters=20"),
    ({"rotations": True}, "rotations are learned with super-clusters: give --super-clusters, such as 4"),
    ({"rotations": True, "super_clusters": 4, "look_again": False}, "rotations go with --look-again"),
    ({"head_start": "centroids", "clustering": "pic"}, "head_start=centroids goes with --clustering kmeans"),
    ({"head_start": "centroids", "cluster_stage": "conv3"}, "goes with --cluster-stage features, which the head sees"),
    ({"crop_scale": (0.5, 0.2)}, "crop_scale=0.5,0.2 must be two shares with 0 < least <= most <= 1"),
    ({"small_crop_scale": (0.0, 0.2)}, "small_crop_scale=0,0.2 must be two shares"),
    ({"blur": 1.5}, "blur=1.5 must lie between 0 and 1"),
]


@pytest.mark.parametrize(("options", "message"), UNFIT, ids=[message[:40] for _, message in UNFIT])
def test_settings_that_do_not_go_together_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings.from_dict(options)


def test_settings_that_do_go_together() -> None:
    settings = Settings.from_dict({**V2, "clusters": [20, 30], "crops": "2x48,4x24", "image_size": 48})
    assert (settings.heads, settings.n_clusters, settings.crop_groups) == ((20, 30), 20, ((2, 48), (4, 24)))
    assert Settings(image_size=64).crop_groups == ((2, 64),)
    assert Settings().cluster_stage == FEATURES
    Settings.from_dict({"super_clusters": 4, "rotations": True})
    Settings.from_dict({"head_start": "centroids", "look_again": False, "stop_reassigning": 3})
