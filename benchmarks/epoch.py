"""Seconds of a whole epoch: ours beside a plain loop as published, and beside the network alone.

    python benchmarks/epoch.py --data photos/train [--preset alexnet|cifar] [--images 600] [--rounds 2] [--quick]
    python benchmarks/epoch.py --data photos/train --arch alexnet --image-size 224 --clusters 500 --images 600 --rounds 2

An epoch looks at every image, whitens the features, groups them, and learns the groups. The network is the same in all
(`make_trunk`, with Sobel filters and dropout); in turn, each in a process of its own:

- plain: the loop of the 2018 release: ImageFolder, Pillow, a DataLoader of processes, float32, images as planes; PCA and
  k-means of faiss where it is installed, else of scikit-learn;
- ours: `DeepCluster.run_epoch`, as `train` calls it, in float32 and in the precision of `--precision`; the first epoch,
  which decodes the images, and the second, which finds them in memory;
- network: as many batches of features, and as many steps of training with head and SGD, on one random float tensor.

Before the clock starts, each has run its network on a batch, forward and backward, and the files are in the system's memory.
Prints medians over the rounds. The share of the network alone is that of features and training, whose work the network
is; whitening and clustering are printed beside. CPU-seconds are those of all threads and processes. Peak memory is that of
the process; of worker processes it is the largest one's, pages included that it shares with the others. About 5 minutes on
2 idle cores.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from input import copied, published_transform
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from deepcluster.config import Settings
from deepcluster.data.cache_plan import CachePlan, decoded_images
from deepcluster.data.loader import Loader
from deepcluster.data.sources import open_source
from deepcluster.device import Machine
from deepcluster.inference import LOOK_BATCH
from deepcluster.interruption import Interruption
from deepcluster.models.heads import ClusterHead
from deepcluster.models.trunk import Trunk
from deepcluster.progress import Reporter, size
from deepcluster.training.deepcluster import STEPS, DeepCluster
from deepcluster.training.optim import Learner, head_optimizer, trunk_optimizer
from deepcluster.training.plan import trunk_of

PRESETS: dict[str, dict[str, Any]] = {
    "alexnet": {"arch": "alexnet", "image_size": 224, "clusters": 500, "pca": 256, "batch_size": 64, "images": 600},
    "cifar": {"arch": "alexnet-small", "image_size": 32, "clusters": 150, "pca": 64, "batch_size": 64, "images": 6000},
}
TARGETS = {"plain": 2.0, "alexnet": 0.9, "alexnet-small": 0.8}

# Seconds by step, "cpu" seconds of all, and "data_wait_share" where it is known; by the name of the epoch.
Epochs = dict[str, dict[str, float]]


def cpu_seconds() -> float:
    """Of this process and of its children that have ended, as a DataLoader's do at its end."""
    return sum(os.times()[:4])


class Clock:
    """Adds up the seconds of each step, and CPU-seconds."""

    def __init__(self) -> None:
        self.seconds = {**dict.fromkeys(STEPS, 0.0), "cpu": 0.0}
        self.last, self.cpu_last = time.perf_counter(), cpu_seconds()

    def count(self, step: str) -> None:
        """The time since the last call was that of `step`."""
        now, cpu = time.perf_counter(), cpu_seconds()
        self.seconds[step] += now - self.last
        self.seconds["cpu"] += cpu - self.cpu_last
        self.last, self.cpu_last = now, cpu


def warm_up(trunk: Trunk, settings: Settings, machine: Machine) -> None:
    """Run the network once each way, which makes its kernels; its running averages alone are changed."""
    images_BCHW = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size)
    if trunk_is_channels_last(trunk):
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    with machine.autocast():
        with torch.no_grad():
            trunk.eval()(images_BCHW)
        trunk.train()(images_BCHW).float().sum().backward()
    trunk.zero_grad(set_to_none=True)


def trunk_is_channels_last(trunk: Trunk) -> bool:
    """Whether its filters lie so in memory."""
    wide = [weight for weight in trunk.parameters() if weight.dim() == 4 and weight.requires_grad]
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in wide)


def plain_epoch(data: Path, settings: Settings) -> Epochs:
    """The published loop, step by step."""
    trunk = trunk_of(settings)
    optimizer = torch.optim.SGD(
        [weight for weight in trunk.parameters() if weight.requires_grad],
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    warm_up(trunk, settings, Machine(torch.device("cpu"), "fp32"))
    clock = Clock()
    features_ND = plain_features(trunk, data, settings)
    clock.count("features")
    points_NP = plain_whitening(features_ND, settings.pca)
    clock.count("whitening")
    labels_N = plain_kmeans(points_NP, settings)
    clock.count("clustering")
    plain_training(trunk, optimizer, data, labels_N, settings)
    clock.count("training")
    return {"plain": clock.seconds}


def plain_loader(data: Path, settings: Settings, view: str, batch: int, order: Sequence[int] | None) -> Iterator[Any]:
    """Batches of images and their labels in a given order; None: as they are."""
    images = ImageFolder(str(data), published_transform(view, settings.image_size))
    return iter(DataLoader(images, batch, sampler=order, num_workers=settings.workers or 0))


def plain_features(trunk: Trunk, data: Path, settings: Settings) -> NDArray[np.float32]:
    """Step 1."""
    trunk.eval()
    rows = []
    with torch.no_grad():
        for images_BCHW, _ in plain_loader(data, settings, "cluster", LOOK_BATCH, None):
            rows.append(trunk(images_BCHW).numpy())
    return np.concatenate(rows)


def plain_whitening(features_ND: NDArray[np.float32], n_components: int) -> NDArray[np.float32]:
    """Step 2: PCA, whitening, unit rows."""
    if importlib.util.find_spec("faiss"):
        import faiss  # type: ignore[import-untyped,unused-ignore]

        matrix = faiss.PCAMatrix(features_ND.shape[1], n_components, -0.5)
        matrix.train(features_ND)
        points_NP: NDArray[np.float32] = matrix.apply(features_ND)
    else:
        from sklearn.decomposition import PCA

        points_NP = PCA(n_components, whiten=True).fit_transform(features_ND)
    points_NP /= np.linalg.norm(points_NP, axis=1, keepdims=True)
    return points_NP


def plain_kmeans(points_NP: NDArray[np.float32], settings: Settings) -> NDArray[np.int64]:
    """Step 3."""
    if not importlib.util.find_spec("faiss"):
        from sklearn.cluster import KMeans

        kmeans = KMeans(settings.clusters, init="random", n_init=1, max_iter=settings.kmeans_iterations, tol=0)
        labels_N: NDArray[np.int64] = kmeans.fit_predict(points_NP).astype(np.int64)
        return labels_N
    import faiss

    clustering = faiss.Clustering(points_NP.shape[1], settings.clusters)
    clustering.niter, clustering.seed = settings.kmeans_iterations, settings.seed
    clustering.max_points_per_centroid, clustering.min_points_per_centroid = 10_000_000, 1
    index = faiss.IndexFlatL2(points_NP.shape[1])
    clustering.train(points_NP, index)
    _, nearest_N1 = index.search(points_NP, 1)
    return np.asarray(nearest_N1, np.int64)[:, 0]


def plain_sample(labels_N: NDArray[np.int64]) -> list[int]:
    """Step 4: as many images as there are, drawn evenly over the clusters."""
    draw, groups = np.random.default_rng(0), [np.flatnonzero(labels_N == label) for label in np.unique(labels_N)]
    each = len(labels_N) // len(groups) + 1
    drawn = np.concatenate([draw.choice(group, each, replace=len(group) <= each) for group in groups])
    order: list[int] = draw.permutation(drawn)[: len(labels_N)].tolist()
    return order


def plain_training(
    trunk: Trunk, optimizer: torch.optim.SGD, data: Path, labels_N: NDArray[np.int64], settings: Settings
) -> None:
    """Step 5: a new last layer, and SGD over the sample."""
    last = nn.Linear(trunk.dim, settings.clusters)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    head = nn.Sequential(nn.ReLU(), last)
    head_optimizer = torch.optim.SGD(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    order = plain_sample(labels_N)
    trunk.train()
    first = 0
    for images_BCHW, _ in plain_loader(data, settings, "training", settings.batch_size, order):
        labels_B = torch.from_numpy(labels_N[order[first : first + len(images_BCHW)]])
        first += len(images_BCHW)
        loss = cross_entropy(head(trunk(images_BCHW)), labels_B)
        optimizer.zero_grad()
        head_optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        head_optimizer.step()


def our_epochs(data: Path, settings: Settings) -> Epochs:
    """Two epochs of a run."""
    machine = Machine.choose("cpu", settings.precision)
    images = decoded_images(open_source(data), CachePlan(0, memory_bytes=sys.maxsize), reduce_to=0, data=data)
    with closing(Loader(images, workers=settings.workers or 0)) as loader:
        reporter, interruption = Reporter(quiet=True), Interruption()
        method = DeepCluster(
            trunk_of(settings),
            loader,
            settings,
            machine,
            reporter=reporter,
            interruption=interruption,
            save=lambda: None,
        )
        warm_up(method.trunk, settings, machine)
        epochs = {}
        for name in ("first", "second"):
            before, metrics = cpu_seconds(), method.run_epoch()
            cost = {"cpu": cpu_seconds() - before, "data_wait_share": metrics["data_wait_share"]}
            epochs[f"ours {machine.precision}, {name} epoch"] = {**metrics["seconds"], **cost}
    return epochs


def network_alone(data: Path, settings: Settings) -> Epochs:
    """Features and steps of an epoch without any images."""
    machine, n_images = Machine.choose("cpu", settings.precision), len(open_source(data))
    trunk = trunk_of(settings).to(memory_format=torch.channels_last)
    head = ClusterHead(trunk.dim, settings.clusters, seed=0)
    optimizers = trunk_optimizer(trunk, settings, machine), head_optimizer(head, settings, machine)
    learner = Learner(trunk, head, optimizers, machine)
    images_BCHW = torch.randn(max(LOOK_BATCH, settings.batch_size), 3, settings.image_size, settings.image_size)
    images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    labels_B = torch.randint(settings.clusters, (settings.batch_size,))
    warm_up(trunk, settings, machine)
    clock = Clock()
    trunk.eval()
    for count in batch_sizes(n_images, LOOK_BATCH):
        with torch.no_grad(), machine.autocast():
            trunk(images_BCHW[:count])
    clock.count("features")
    trunk.train()
    for count in batch_sizes(n_images, settings.batch_size):
        learner.step(images_BCHW[:count], labels_B[:count], rates=(settings.lr, settings.lr), seed=0)
    clock.count("training")
    return {f"network {machine.precision}": clock.seconds}


def batch_sizes(n_images: int, batch: int) -> list[int]:
    """Of all batches; a last one of a single image is left out of training, and matters to neither."""
    sizes = [min(batch, n_images - first) for first in range(0, n_images, batch)]
    return [count for count in sizes if count > 1]


VARIANTS: dict[str, Callable[[Path, Settings], Epochs]] = {
    "plain": plain_epoch,
    "ours": our_epochs,
    "network": network_alone,
}


def peak_bytes(who: int) -> int:
    """Most memory of this process, or of the largest child that has ended."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_here(variant: str, data: Path, settings: Settings) -> None:
    """One variant in this process; its result is the last line."""
    epochs = VARIANTS[variant](data, settings)
    peaks = [peak_bytes(resource.RUSAGE_SELF), peak_bytes(resource.RUSAGE_CHILDREN)]
    print(json.dumps({"epochs": epochs, "peaks": peaks}))


def run_apart(variant: str, data: Path, settings: Settings) -> dict[str, Any]:
    """`run_here` in a process of its own."""
    one = [variant, str(data), json.dumps(settings.as_dict())]
    done = subprocess.run([sys.executable, __file__, "--one", *one], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(data: Path, settings: Settings, precisions: Sequence[str], rounds: int) -> tuple[Epochs, dict[str, list[int]]]:
    """Medians of all variants over the rounds, and their peak memory."""
    plain, quick = (
        Settings.from_dict({**settings.as_dict(), "precision": precision}) for precision in ("fp32", precisions[-1])
    )
    ours = [Settings.from_dict({**settings.as_dict(), "precision": precision}) for precision in precisions]
    turns = [("plain", plain), *(("ours", one) for one in ours), ("network", quick)]
    runs: dict[str, list[dict[str, float]]] = {}
    peaks: dict[str, list[int]] = {}
    for _ in range(rounds):
        for variant, its_settings in turns:
            result = run_apart(variant, data, its_settings)
            for name, epoch in result["epochs"].items():
                runs.setdefault(name, []).append(epoch)
                peaks[name] = [max(pair) for pair in zip(peaks.get(name, [0, 0]), result["peaks"], strict=True)]
    medians = {
        name: {key: statistics.median(epoch[key] for epoch in epochs) for key in epochs[0]} for name, epochs in runs.items()
    }
    return medians, peaks


def total(epoch: dict[str, float], steps: Sequence[str] = STEPS) -> float:
    """Seconds of some steps together."""
    return sum(epoch[step] for step in steps)


def print_table(medians: Epochs, peaks: dict[str, list[int]], n_images: int, arch: str, precision: str) -> None:
    """Seconds, rates, peaks, and then the ratios and whether they are the aim."""
    print(
        f"{'seconds':<26}" + "".join(f"{title:>12}" for title in (*STEPS, "epoch", "images/s", "CPU-s", "data wait", "peak"))
    )
    for name, epoch in medians.items():
        cells = (
            "".join(f"{epoch[step]:>12.2f}" for step in STEPS)
            + f"{total(epoch):>12.2f}{n_images / total(epoch):>12.1f}{epoch['cpu']:>12.2f}"
        )
        wait = f"{epoch['data_wait_share']:>12.1%}" if "data_wait_share" in epoch else f"{'-':>12}"
        own, child = peaks[name]
        print(f"{name:<26}{cells}{wait}{size(own):>12}" + (f" and {size(child)} a worker" if name == "plain" else ""))
    best, plain, network = f"ours {precision}, second epoch", medians["plain"], medians[f"network {precision}"]
    print(f"\n{'times as fast as plain':<26}" + "".join(f"{title:>12}" for title in (*STEPS, "epoch", "CPU-s", "target")))
    for name, epoch in medians.items():
        if name.startswith("ours"):
            cells = "".join(f"{plain[step] / max(1e-9, epoch[step]):>12.2f}" for step in STEPS)
            aim = f"{TARGETS['plain']:>12.1f}" if name == best else ""
            print(f"{name:<26}{cells}{total(plain) / total(epoch):>12.2f}{plain['cpu'] / epoch['cpu']:>12.2f}{aim}")
    print(
        f"\n{'share of the network alone':<26}"
        + "".join(f"{t:>12}" for t in ("features", "training", "both", "epoch", "target"))
    )
    for name in (f"ours {precision}, first epoch", best):
        epoch, work = medians[name], ("features", "training")
        shares = [network[step] / epoch[step] for step in work]
        shares += [total(network, work) / total(epoch, work), total(network, work) / total(epoch)]
        aim = f"{TARGETS[arch]:>12.0%}" if name == best and arch in TARGETS else ""
        print(f"{name:<26}" + "".join(f"{share:>12.1%}" for share in shares) + aim)


def chosen(options: argparse.Namespace) -> tuple[Settings, int]:
    """Settings of the preset with what was asked for, and the number of images."""
    values = PRESETS[options.preset]
    asked = {name: getattr(options, name) for name in values if getattr(options, name) is not None}
    values = {**values, **({"images": 60, "clusters": 20} if options.quick else {}), **asked}
    n_images = values.pop("images")
    values["pca"] = min(values["pca"], n_images - 1)
    return Settings.from_dict({"recipe": "paper-alexnet", "workers": options.workers, **values}), n_images


def main() -> None:
    """Print the tables; or run one variant and print its result."""
    if sys.argv[1:2] == ["--one"]:
        run_here(sys.argv[2], Path(sys.argv[3]), Settings.from_dict(json.loads(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of images, or a tar of them")
    parser.add_argument("--preset", choices=PRESETS, default="alexnet", help="what the following are by default")
    parser.add_argument("--arch")
    for name in ("image_size", "clusters", "pca", "batch_size", "images"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="ours at its best")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the plain loop, threads of ours")
    parser.add_argument("--folder", type=Path, help="an existing folder for temporary files")
    parser.add_argument("--quick", action="store_true", help="60 images, 20 clusters, 1 round: a look whether it runs")
    options = parser.parse_args()
    settings, n_images = chosen(options)
    best = Machine.choose("cpu", options.precision).precision
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        data = copied(options.data, n_images, Path(temporary, "images"), cache=Path(temporary, "cache"))
        n_images = len(open_source(data, cache=Path(temporary, "cache")))
        print(
            f"{settings.arch} with Sobel at {settings.image_size} px, {n_images:,} images, {settings.clusters:,} clusters, "
            f"PCA {settings.pca}, batch {settings.batch_size} ({LOOK_BATCH} for features), {settings.workers} workers, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"{'faiss' if importlib.util.find_spec('faiss') else 'scikit-learn'} in the plain loop\n"
        )
        precisions = ["fp32"] if best == "fp32" else ["fp32", best]
        medians, peaks = measure(data, settings, precisions, 1 if options.quick else options.rounds)
    print_table(medians, peaks, n_images, settings.arch, best)


if __name__ == "__main__":
    main()
