"""Whole runs on small real images: what the run folder holds, what changes a result and what does not."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_runs import SMALL, assert_equal, assert_same_run, checkpoint, flags, metrics, tables, train_small
from spoiled_images import picture, write_good_images, write_spoiled_images

import deepcluster
from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError, TrainingError
from deepcluster.core.progress import Reporter
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Loader
from deepcluster.data.sources import open_source
from deepcluster.interop.loading import load
from deepcluster.run.features import make_run_trunk
from deepcluster.run.metrics import health
from deepcluster.training import feature_rows
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.loop import Loop

CONTRACTED = {
    "epoch", "loss", "inertia", "nmi_previous", "nmi_labels", "clusters_nonempty", "largest_cluster_share",
    "images_per_second", "data_wait_share", "seconds", "peak_memory_bytes",
}  # fmt: skip


def unreadable(run: Path) -> dict[str, str]:
    with (run / "unreadable.csv").open(newline="", encoding="utf-8") as file:
        return {row["name"]: row["reason"] for row in csv.DictReader(file)}


def trunk_weights(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = checkpoint(run)["trunk"]
    return weights


def differ(one: Path, other: Path) -> bool:
    pairs = zip(trunk_weights(one).values(), trunk_weights(other).values(), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


def with_classes(folder: Path) -> Path:
    """60 images in three folders of one class each, which differ in colour."""
    for number, shade in enumerate(("dark", "middle", "light")):
        names = write_good_images(folder / shade, 20, seed=number, size=(36, 32))
        assert len(names) == 20
    return folder


# The run folder


def test_the_run_folder_is_as_contracted(images: Path, trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config.keys() == {
        "settings",
        "changed_by_recipe",
        "data",
        "versions",
        "command",
        "process",
        "started",
        "earlier_commands",
    }
    assert {name: config["settings"][name] for name in SMALL} == SMALL
    assert config["data"]["images"] == 60
    assert config["versions"]["torch"] == torch.__version__.split("+")[0] or config["versions"]["torch"] == torch.__version__

    lines = metrics(trained)
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert line.keys() >= CONTRACTED
        assert line["seconds"].keys() == {"features", "whitening", "clustering", "training"}
        assert 1 <= line["clusters_nonempty"] <= 5
        assert 0 < line["largest_cluster_share"] <= 1
        assert 0 <= line["data_wait_share"] <= 1
        assert line["images_per_second"] > 0 and line["peak_memory_bytes"] > 1e6
        assert line["nmi_labels"] is None
    assert lines[0]["nmi_previous"] is None
    assert 0 <= lines[1]["nmi_previous"] <= 1

    names = sorted(path.name for path in images.iterdir())
    assert list(tables(trained)) == ["epoch-0001.parquet", "epoch-0002.parquet", "epoch-0003.parquet"]
    for table in tables(trained).values():
        assert list(table) == ["name", "cluster", "distance"]
        assert table["name"] == names
        assert set(table["cluster"]) <= set(range(5))
        assert all(distance >= 0 for distance in table["distance"])

    assert checkpoint(trained)["format"] == "deepcluster-1"
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["epoch-0001.pt", "last.pt"]
    log = (trained / "train.log").read_text().splitlines()
    assert "60 images in 1 folder" in log[0]
    assert [line for line in log if "epoch 2/2" in line]
    assert not list(trained.rglob("*.part"))
    assert not (trained / "unreadable.csv").exists()


def test_the_metrics_are_those_of_the_tables(trained: Path) -> None:
    for line in metrics(trained):
        table = tables(trained)[f"epoch-{line['epoch']:04d}.parquet"]
        sizes = np.bincount(table["cluster"], minlength=5)
        assert line["clusters_nonempty"] == (sizes > 0).sum()
        assert line["largest_cluster_share"] == pytest.approx(sizes.max() / 60)
        assert line["inertia"] == pytest.approx(np.square(table["distance"]).sum(), rel=1e-5)


def test_the_final_table_is_of_the_finished_trunk(trained: Path) -> None:
    final = checkpoint(trained)["final"]["assignment"]
    table = pq.read_table(trained / "assignments" / "epoch-0003.parquet")
    assert table["cluster"].to_pylist() == final["labels_N"].tolist()


def test_checkpoints_are_kept_at_intervals(images: Path, tmp_path: Path) -> None:
    run = train_small(images, tmp_path / "run", epochs=5, checkpoint_every=2)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["epoch-0001.pt", "epoch-0002.pt", "epoch-0004.pt", "last.pt"]
    assert load(run / "checkpoints" / "epoch-0002.pt").centroids_KP is not None


# What is spoiled


def test_spoiled_files_are_left_out_and_listed(tmp_path: Path) -> None:
    good = write_good_images(tmp_path / "mixed", 40)
    spoiled = write_spoiled_images(tmp_path / "mixed", 4)
    run = train_small(tmp_path / "mixed", tmp_path / "run")
    assert list(unreadable(run)) == sorted(spoiled)
    assert all(unreadable(run).values())
    for table in tables(run).values():
        clusters = dict(zip(table["name"], table["cluster"], strict=True))
        assert {name for name, cluster in clusters.items() if cluster == -1} == set(spoiled)
        assert clusters.keys() == {*good, *spoiled}


def test_thirty_spoiled_files_among_three_hundred(tmp_path: Path) -> None:
    write_good_images(tmp_path / "mixed", 300)
    spoiled = write_spoiled_images(tmp_path / "mixed", 30)
    run = train_small(tmp_path / "mixed", tmp_path / "run", clusters=10, batch_size=64)
    assert list(unreadable(run)) == sorted(spoiled)


def test_spoiled_files_change_nothing_of_the_rest(images: Path, trained: Path, tmp_path: Path) -> None:
    """They come last by name, so that the indices of the others stay the same."""
    shutil.copytree(images, tmp_path / "mixed")
    write_spoiled_images(tmp_path / "mixed", 4)
    assert not differ(train_small(tmp_path / "mixed", tmp_path / "run"), trained)


def test_a_named_pipe_never_holds_up_a_run(tmp_path: Path) -> None:
    """In processes of their own, which can be ended if they wait for the pipe."""
    images = write_good_images(tmp_path / "photos", 40)
    os.mkfifo(tmp_path / "photos" / "camera.jpg")
    (tmp_path / "list.txt").write_text("".join(f"photos/{name}\n" for name in [*images, "camera.jpg"]))
    for data, found in (("photos", "1 special file skipped"), ("list.txt", "a pipe, not a regular file")):
        run = tmp_path / f"run of {data}"
        for words in (["info"], ["train", *flags(epochs=1), "--out", str(run)]):
            command = [sys.executable, "-m", "deepcluster", words[0], str(tmp_path / data), *words[1:]]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
            assert done.returncode == 0, done.stderr
            assert found in done.stdout + done.stderr
    assert not (tmp_path / "run of photos" / "unreadable.csv").exists()
    assert unreadable(tmp_path / "run of list.txt") == {"photos/camera.jpg": "a pipe, not a regular file"}


def test_too_many_spoiled_files_are_an_error(tmp_path: Path) -> None:
    write_good_images(tmp_path / "mixed", 40)
    write_spoiled_images(tmp_path / "mixed", 5)
    with pytest.raises(InputError, match="5 of 45 images can't be read, more than 10%"):
        train_small(tmp_path / "mixed", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_that_breaks_during_the_run_is_left_out_from_then_on(tmp_path: Path) -> None:
    names = write_good_images(tmp_path / "photos", 40)
    spoil = tmp_path / "photos" / names[7]

    class Spoiler(Reporter):
        def say(self, line: str) -> None:
            if line.startswith("epoch 1/2"):
                spoil.write_bytes(b"")
            super().say(line)

    run = train_small(tmp_path / "photos", tmp_path / "run", cache="none", reporter=Spoiler(quiet=True))
    assert list(unreadable(run)) == [names[7]]
    place = sorted(names).index(names[7])
    clusters = [table["cluster"][place] for table in tables(run).values()]
    assert clusters[0] >= 0 and clusters[1:] == [-1, -1]


# What changes the result, and what does not


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"workers": 1, "cache": "none"}, {"workers": 3, "cache": "memory"}], ids=str
)
def test_workers_and_cache_change_nothing(options: dict[str, Any], images: Path, trained: Path, tmp_path: Path) -> None:
    assert_same_run(train_small(images, tmp_path / "run", **options), trained)


def memory_of_small() -> str:
    """A size with which the features of 60 images go to a file: one byte too small to hold them."""
    return str(feature_rows.least_bytes(0, 256, 16) + 60 * (4 * 16 + 4 * 256) - 1)


def test_features_in_a_file_change_nothing(images: Path, trained: Path, tmp_path: Path) -> None:
    spoiled = shutil.copytree(images, tmp_path / "mixed")
    write_spoiled_images(spoiled, 4)
    run = train_small(spoiled, tmp_path / "run", memory=memory_of_small())
    assert not differ(run, trained)
    assert f"in a temporary file in {run}" in (run / "train.log").read_text()
    assert "whitening" in metrics(run)[0]["seconds"] and min(metrics(run)[0]["seconds"].values()) >= 0


def test_a_resume_may_have_another_memory(images: Path, trained: Path, tmp_path: Path) -> None:
    train_small(images, tmp_path / "run", epochs=1, memory=memory_of_small())
    train_small(images, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", trained)


def test_another_seed_gives_another_run(images: Path, trained: Path, tmp_path: Path) -> None:
    assert_same_run(train_small(images, tmp_path / "same"), trained)
    assert differ(train_small(images, tmp_path / "other", seed=32), trained)


def test_labels_never_reach_training(tmp_path: Path) -> None:
    """The same images with the right labels, with wrong ones and with none."""
    source = open_source(with_classes(tmp_path / "photos"))
    rows = [(f"photos/{source.name(i)}", source.name(i).partition("/")[0]) for i in range(len(source))]
    shuffled = np.random.default_rng(0).permutation([label for _, label in rows])
    runs = []
    for name, labels in (("right", [label for _, label in rows]), ("wrong", shuffled), ("none", None)):
        lines = [path if labels is None else f"{path},{labels[i]}" for i, (path, _) in enumerate(rows)]
        header = "path" if labels is None else "path,label"
        (tmp_path / f"{name}.csv").write_text("\n".join([header, *lines]) + "\n")
        runs.append(train_small(tmp_path / f"{name}.csv", tmp_path / name))
    right, wrong, none = runs
    for other in (wrong, none):
        assert tables(other) == tables(right)
        assert not differ(other, right)
    known = [line["nmi_labels"] for run in runs for line in metrics(run)]
    assert all(0 <= value <= 1 for value in known[:4])
    assert known[:2] != known[2:4]
    assert known[4:] == [None, None]


def test_evaluation_on_the_way_changes_nothing(tmp_path: Path) -> None:
    folder = with_classes(tmp_path / "photos")
    without = train_small(folder, tmp_path / "without")
    run = train_small(folder, tmp_path / "with", eval_every=1)
    assert tables(run) == tables(without)
    assert not differ(run, without)
    assert [line.pop("knn") is not None for line in metrics(run)] == [True, True]
    assert all(0 <= line["knn"] <= 1 for line in metrics(run))
    assert "knn" not in metrics(without)[0]


def test_evaluation_of_very_few_images(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        write_good_images(tmp_path / "photos" / name, 4, seed=number)
    run = train_small(tmp_path / "photos", tmp_path / "run", clusters=2, pca=4, eval_every=1, epochs=1)
    assert 0 <= metrics(run)[0]["knn"] <= 1


def test_clusterings_can_be_spaced(images: Path, tmp_path: Path) -> None:
    run = train_small(images, tmp_path / "run", epochs=3, reassign_every=2)
    first, second, third, _ = tables(run).values()
    assert second == first
    assert third["distance"] != first["distance"]
    # Only a clustering brings a new head: with another start, the head of epoch 2 comes from that of epoch 1.
    one = train_small(images, tmp_path / "one", epochs=1, reassign_every=2)
    two = train_small(images, tmp_path / "one", epochs=2, reassign_every=2, resume=True)
    assert checkpoint(two)["head"].keys() == checkpoint(one)["head"].keys()
    assert tables(two)["epoch-0002.parquet"] == first


def test_a_new_head_comes_with_each_clustering_alone(images: Path, tmp_path: Path) -> None:
    """With a rate of zero a head stays what it was made as."""
    heads = {}
    for epochs, every in ((1, 2), (2, 2), (2, 1)):
        run = train_small(images, tmp_path / f"{epochs}-{every}", epochs=epochs, reassign_every=every, lr=0.0)
        heads[epochs, every] = torch.cat([value.flatten() for value in checkpoint(run)["head"].values()])
    assert torch.equal(heads[1, 2], heads[2, 2])
    assert not torch.equal(heads[1, 2], heads[2, 1])


def test_sampling_as_published(images: Path, trained: Path, tmp_path: Path) -> None:
    run = train_small(images, tmp_path / "run", sampling="as-published")
    assert tables(run)["epoch-0001.parquet"] == tables(trained)["epoch-0001.parquet"]
    assert differ(run, trained)


def test_the_rate_falls_to_zero_with_cosine(images: Path, trained: Path, tmp_path: Path) -> None:
    run = train_small(images, tmp_path / "run", lr_schedule="cosine")
    assert differ(run, trained)
    assert 0 < checkpoint(run)["trunk_optimizer"]["param_groups"][0]["lr"] < 0.2 * SMALL["lr"]


def test_a_limit_takes_images_evenly(images: Path, tmp_path: Path) -> None:
    run = train_small(images, tmp_path / "run", limit=30, epochs=1)
    assert tables(run)["epoch-0001.parquet"]["name"] == sorted(path.name for path in images.iterdir())[::2]


def test_arrays_are_trained_on(tmp_path: Path) -> None:
    images_NHWC = np.stack([picture(seed, (20, 20)) for seed in range(40)])
    np.savez(tmp_path / "images.npz", images=images_NHWC, labels=np.arange(40) % 4)
    run = train_small(tmp_path / "images.npz", tmp_path / "run")
    assert tables(run)["epoch-0001.parquet"]["name"][:2] == ["images.npz::000000", "images.npz::000001"]
    assert 0 <= metrics(run)[0]["nmi_labels"] <= 1


def test_several_sources_are_trained_on(images: Path, tmp_path: Path) -> None:
    write_good_images(tmp_path / "more", 10)
    run = train_small([images, tmp_path / "more"], tmp_path / "run", epochs=1)
    names = tables(run)["epoch-0001.parquet"]["name"]
    assert len(names) == 70
    assert names[0].startswith("photos/") and names[-1].startswith("more/")


# Trouble


def test_a_rate_that_is_too_high_is_told(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"at epoch 1, batch \d+, learning rate 1e\+30\. Try a lower --lr"):
        train_small(images, tmp_path / "run", lr=1e30)
    assert not list(tmp_path.rglob("*.pt*"))


@pytest.mark.parametrize(("lr", "n_kept"), [(1e25, 2), (1e39, 0)])
def test_only_finite_states_are_kept(lr: float, n_kept: int, images: Path, tmp_path: Path) -> None:
    """One step an epoch: the loss of the step is finite, and the fault shows in the weights, or in the next features."""
    with pytest.raises(TrainingError, match=rf"not finite at epoch \d, batch \d, learning rate {re.escape(f'{lr:g}')}\."):
        train_small(images, tmp_path / "run", lr=lr, batch_size=60, epochs=5)
    kept = list((tmp_path / "run").rglob("*.pt"))
    assert len(kept) == n_kept
    for path in kept:
        for value in torch.load(path, weights_only=True)["trunk"].values():
            assert torch.isfinite(value).all()


def test_a_last_batch_of_one_image(images: Path, tmp_path: Path) -> None:
    """At 32 px the last maps of a ResNet are one pixel: BatchNorm can't take a single image."""
    options = {"arch": "resnet18", "image_size": 32, "cluster_stage": "features"}
    run = train_small(images, tmp_path / "run", limit=17, epochs=1, clusters=2, pca=8, **options)
    assert metrics(run)[0]["loss"] > 0


def history_of(*losses: float, largest: float = 0.1, nonempty: int = 10, clusters: int = 10) -> list[dict[str, Any]]:
    sizes = {"largest_cluster_share": largest, "clusters_nonempty": nonempty, "clusters": clusters}
    return [{"epoch": number, "loss": loss, **sizes} for number, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (history_of(1.0), None),
        (history_of(1.0, largest=0.51), None),  # Of the untrained network.
        (history_of(1.0, 1.0, largest=0.51), "one cluster holds 51% of the images"),
        ([*history_of(1.0, 1.0, largest=0.51), *history_of(1.0, 1.0, 1.0)[2:]], None),
        (history_of(1.0, 1.0, largest=0.6, clusters=3, nonempty=3), None),
        (history_of(13.5), "the loss, 13.50, is far above ln K = 2.30"),
        (history_of(3.4, 3.4), None),
        (history_of(2.31, 2.31), None),
        (history_of(2.31, 2.31, 2.31), "ln K = 2.30, or higher for 3 epochs: .* a higher --lr"),
        (history_of(2.5, 2.6, 2.5), "ln K = 2.30, or higher .* Try a lower --head-lr or --lr"),
        (history_of(2.295, 2.295, 2.295), None),  # Below, if only just.
        (history_of(2.8, 2.6, 2.4), None),  # Still falling.
        (history_of(2.31, 2.2, 2.31), None),
        (history_of(0.7, 0.7, 0.7, nonempty=2), "ln K = 0.69"),
    ],
)
def test_a_run_that_fails_says_so_and_another_does_not(history: list[dict[str, Any]], words: str | None) -> None:
    settings = {"method": "deepcluster", "clusters": 10, "epochs": 8}
    complaint = health(history, settings)
    assert (complaint is None) == (words is None)
    assert complaint is None or (re.search(str(words), complaint) and "Try " in complaint)
    # In the first quarter of a long run only a loss far above ln K is worth a word.
    early = health(history, {**settings, "epochs": 40})
    assert early is None or "far above" in early or "one cluster" in early


def test_the_loss_of_a_guess_is_the_mean_over_the_heads_of_deepcluster_v2() -> None:
    settings = {"method": "deepcluster-v2", "clusters": [10, 1000], "epochs": 3}
    assert health(history_of(4.5, 4.5, 4.5), settings) is None
    complaint = health(history_of(4.8, 4.8, 4.8), settings)
    assert complaint is not None and "ln K = 4.61" in complaint and "--head-lr" not in complaint


def test_a_run_that_learns_nothing_says_so_once(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_small(images, tmp_path / "run", lr=0.0, epochs=5)
    warning = "warning: the loss is that of a guess, ln K = 1.61, or higher for 3 epochs"
    assert capsys.readouterr().err.count(warning) == 1
    assert (run / "train.log").read_text().count(warning) == 1


# Trunks


@pytest.mark.parametrize(
    ("arch", "image_size"),
    [
        ("alexnet-small", 32),
        ("resnet18-small", 32),
        ("resnet18", 32),
        ("alexnet", 96),
        pytest.param("vgg16", 32, marks=pytest.mark.slow),
        pytest.param("resnet50", 64, marks=pytest.mark.slow),
        pytest.param("alexnet", 224, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("sobel", [True, False])
def test_every_trunk_takes_a_step(arch: str, image_size: int, sobel: bool, images: Path) -> None:
    settings = deepcluster.Settings(
        arch=arch,
        image_size=image_size,
        sobel=sobel,
        clusters=3,
        pca=4,
        batch_size=8,
        lr=0.01,
        epochs=1,
        kmeans_iterations=2,
    )
    trunk = make_run_trunk(settings)
    # Whitening of 4,096 features takes half a minute here; that of a pooled map does not.
    settings = replace(settings, cluster_stage=trunk.embed_stage)
    loader = Loader(DecodedImages(open_source(images, 8)), workers=2)
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    line = Loop(DeepCluster(trunk, loader, settings, Machine.choose("cpu", "fp32"))).run_epoch()
    loader.close()
    assert np.isfinite(line["loss"])
    after = trunk.state_dict()
    fixed = {name for name in before if torch.equal(before[name], after[name])}
    learned = {name for name, weight in trunk.named_parameters() if weight.requires_grad}
    assert not fixed & learned
    assert {name for name in fixed if not name.startswith("sobel.")} == set()


def test_bf16_runs(images: Path, trained: Path, tmp_path: Path) -> None:
    run = train_small(images, tmp_path / "run", precision="bf16", epochs=1)
    assert differ(run, trained)
    assert np.isfinite(metrics(run)[0]["loss"])
    assert_equal(checkpoint(run)["settings"]["precision"], "bf16")
