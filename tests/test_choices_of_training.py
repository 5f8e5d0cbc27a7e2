"""What may be chosen of the first version's training, shown by small runs; and what does not go together."""

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
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.sources import open_source
from deepcluster.data.views import ClusterView
from deepcluster.models.heads import ClusterHead, HierarchicalHead
from deepcluster.models.trunk import FEATURES, normalise
from deepcluster.run.features import feature_batches, make_run_trunk
from deepcluster.run.settings import Settings
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.loop import Loop
from deepcluster.training.method import Step

ROTATED: dict[str, Any] = {"clustering": "hierarchical", "super_clusters": 2, "rotations": True, "clusters": 9}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 good images and three spoiled ones."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    write_good_images(folder, 33, size=(20, 18))
    write_spoiled_images(folder, 3)
    return folder


def method_of(photos: Path, kind: type[DeepCluster] = DeepCluster, **options: Any) -> DeepCluster:
    given = {key: value for key, value in SMALL.items() if key not in ("recipe", "device", "precision", "workers")}
    settings = Settings.from_dict({**given, "sobel": False, "epochs": 4, **options})
    loader = Loader(DecodedImages(open_source(photos)), workers=0)
    return kind(make_run_trunk(settings), loader, settings, Machine.choose("cpu", "fp32"))


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


def test_a_stopped_run_with_rotations_ends_as_if_it_had_not_been(photos: Path, tmp_path: Path) -> None:
    """In both clusterings, in the middle of an epoch, and in the clustering of the finished trunk."""
    stopped_everywhere(photos, tmp_path, STOPS, **ROTATED)


# Longer and shorter epochs


@pytest.mark.parametrize(("length", "draws"), [(0.5, 16), (1.0, 33), (2.0, 66), (0.29, 9)])
@pytest.mark.parametrize("sampling", ["uniform", "as-published"])
def test_an_epoch_draws_a_multiple_of_the_images(length: float, draws: int, sampling: str, photos: Path) -> None:
    """Of the 33 readable ones, rounded down as in the 2018 code, in as many steps."""
    method = method_of(photos, epoch_length=length, sampling=sampling)
    steps, train_step = [], method.train_step

    def counted(batch: Batch, step: Step) -> Tensor:
        steps.append(step.n_images)
        return train_step(batch, step)

    method.train_step = counted  # type: ignore[method-assign]
    Loop(method).run_epoch()
    assert (sum(steps), len(steps)) == (draws, -(-draws // 16))
    assert set(method.draw_images(1).tolist()) <= set(range(len(method.loader.images))) - set(method.loader.unreadable)


def test_a_stopped_run_of_long_epochs_ends_as_if_it_had_not_been(photos: Path, tmp_path: Path) -> None:
    stopped_everywhere(photos, tmp_path, [("epoch 1", 4, "")], epoch_length=2.0)


def test_an_epoch_without_images_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"epoch_length=0.01 of 33 images leaves fewer than 2 per epoch; .* 0.061 or more"):
        train_small(photos, tmp_path / "run", epoch_length=0.01)
    assert not (tmp_path / "run").exists()


# No more clusterings


def test_labels_stay_after_the_last_clustering(photos: Path) -> None:
    """And so does the head: at a rate of zero it would otherwise be new."""
    method, labels, heads, lines = method_of(photos, stop_reassigning=2, lr=0.0), [], [], []
    loop = Loop(method)
    for _ in range(4):
        lines.append(loop.run_epoch())
        labels.append(method.current.labels_N)
        assert isinstance(method.head, ClusterHead)
        heads.append(method.head.linear.weight.detach().clone())
    assert [line["seconds"]["clustering"] > 0 for line in lines] == [True, True, False, False]
    assert [line["seconds"]["features"] > 0 for line in lines] == [True, True, False, False]
    assert [line["inertia"] for line in lines[1:]] == [lines[1]["inertia"]] * 3
    assert torch.equal(labels[1], labels[2]) and torch.equal(labels[2], labels[3])
    assert not torch.equal(heads[0], heads[1]) and torch.equal(heads[1], heads[3])


# Super-clusters


def test_clusters_lie_within_super_clusters(photos: Path, tmp_path: Path) -> None:
    run = train_small(photos, tmp_path / "run", clustering="hierarchical", super_clusters=3, clusters=9)
    state = checkpoint(run)
    assert state["assignment"]["super_of_cluster_K"].tolist() == sorted(state["assignment"]["super_of_cluster_K"].tolist())
    assert state["head"]["supers.linear.weight"].shape == (3, 256)
    assert torch.cat([state["head"][f"layers.{number}.weight"] for number in range(3)]).shape == (9, 256)
    for table in tables(run).values():
        assert set(table["cluster"]) == {-1, *range(9)}


class Watched(DeepCluster):
    """Keeps what was trained on: the images as the network saw them, and of which image each was."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.trained: list[tuple[Batch, Tensor]] = []

    def train_step(self, batch: Batch, step: Step) -> Tensor:
        seen: list[Tensor] = []
        hook = self.network.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        loss = super().train_step(batch, step)
        hook.remove()
        self.trained.append((batch, seen[0]))
        return loss


def test_images_are_clustered_and_trained_on_with_the_same_rotations(photos: Path) -> None:
    """Features are those of rotated centre views; crops are rotated alike; super-classes tell the rotations apart."""
    method = method_of(photos, Watched, **ROTATED)
    assert isinstance(method, Watched)
    features = method.extract_features(epoch=1)
    quarters_N = method.quarters_N
    assert quarters_N is not None and set(quarters_N.tolist()) == {0, 1, 2, 3}
    method.trunk.eval()
    upright = torch.cat([batch.images_BCHW for batch in method.loader.cluster_views(_view(), torch.arange(36), 64)])
    readable = [index for index in range(36) if index not in method.loader.unreadable]
    rotated = torch.stack(
        [torch.rot90(one, int(quarters_N[index]), (1, 2)) for one, index in zip(upright, readable, strict=True)]
    )
    with torch.no_grad():
        expected_MD = method.trunk.vectors(normalise(rotated), "conv5")
    torch.testing.assert_close(features[0][readable], expected_MD, rtol=1e-4, atol=1e-5)

    method.make_labels(method.cluster(method.whiten(features), epoch=1), epoch=1)
    assignment = method.current
    assert assignment.super_of_cluster_K is not None
    supers_M = assignment.super_of_cluster_K[assignment.labels_N[readable]]
    assert torch.equal(supers_M % 4, quarters_N[readable].long())
    assert isinstance(method.head, HierarchicalHead)

    Loop(method).train_epoch()
    assert sum(len(batch.indices_B) for batch, _ in method.trained) == 33
    for batch, seen_BCHW in method.trained:
        for crop, index, seen in zip(batch.images_BCHW, batch.indices_B.tolist(), seen_BCHW, strict=True):
            expected = normalise(torch.rot90(crop, int(quarters_N[index]), (1, 2))[None])[0]
            torch.testing.assert_close(seen, expected)


def _view() -> Any:
    return ClusterView(16)


def test_the_finished_trunk_groups_upright_images(photos: Path) -> None:
    """With the points' whitening: those of the plain look, whatever the turns of the last epoch were."""
    method = method_of(photos, **ROTATED)
    Loop(method).run_epoch()
    quarters_N = method.quarters_N
    assert quarters_N is not None
    assignment, whitening = method.final_clusters(epoch=2)
    rows = feature_batches(method.trunk, method.loader, method.machine, "conv5", ClusterView(16))
    rows_MD, indices_M = (torch.cat(parts) for parts in zip(*rows, strict=True))
    points_MP = whitening.transform(rows_MD)
    distances_M = (points_MP - assignment.centroids_KP[assignment.labels_N[indices_M]]).norm(dim=1)
    torch.testing.assert_close(distances_M, assignment.distances_N[indices_M], rtol=0, atol=1e-3)
    assert assignment.super_of_cluster_K is not None and int(assignment.super_of_cluster_K.max()) < 2
    assert method.quarters_N is quarters_N


def test_rotations_are_drawn_again_at_each_clustering(photos: Path) -> None:
    method = method_of(photos, reassign_every=2, **ROTATED)
    loop, drawn = Loop(method), []
    for _ in range(3):
        loop.run_epoch()
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
        {**V2, "crops": "2x64", "image_size": 48},
        "crops=2x64 begins with crops of 64 px, more than image_size=48.* --image-size 64 or more",
    ),
    ({**V2, "crops": "2x"}, "'2x' is not a number and a side; write it as 2x224,6x96"),
    ({"crops": "1x224"}, "is one crop, and there is no other one to learn from"),
    (
        {**V2, "clustering": "pic"},
        "clustering=pic goes only with --method deepcluster, not with deepcluster-v2; leave it out",
    ),
    ({**V2, "cluster_stage": "conv5"}, "cluster_stage=conv5 goes only with --method deepcluster"),
    ({**V2, "super_clusters": 4}, "super_clusters=4 goes only with --method deepcluster"),
    ({**V2, "rotations": True}, "rotations=True goes only with --method deepcluster"),
    ({**V2, "sampling": "as-published"}, "sampling=as-published goes only with --method deepcluster"),
    ({**V2, "epoch_length": 2.0}, "epoch_length=2.0 goes only with --method deepcluster, not with deepcluster-v2"),
    ({"clusters": (20, 30)}, "clusters=20,30: several clusterings go only with --method deepcluster-v2"),
    ({"crops": "2x224"}, "crops=2x224 goes only with --method deepcluster-v2"),
    ({"look_again": True}, "look_again=True goes only with --method deepcluster-v2"),
    ({"super_clusters": 4, "clustering": "pic"}, "use --clustering hierarchical --super-clusters 4"),
    ({"super_clusters": 4}, "super_clusters=4 goes with --clustering hierarchical, not kmeans"),
    ({"clustering": "hierarchical"}, "clustering=hierarchical needs the number of super-clusters: give --super-clusters"),
    ({"clustering": "hierarchical", "super_clusters": 40, "clusters": 20}, "super_clusters=40 is more than clusters=20"),
    ({"rotations": True}, "rotations are learned with --clustering hierarchical and --super-clusters"),
    ({"crop_scale": (0.5, 0.2)}, "crop_scale=0.5,0.2 must be two shares with 0 < least <= largest <= 1"),
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
    Settings.from_dict({"clustering": "hierarchical", "super_clusters": 4, "rotations": True, "stop_reassigning": 3})
