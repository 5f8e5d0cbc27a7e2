"""Seconds of a whole epoch: ours beside a plain loop as published, and beside the bare network.

    python benchmarks/epoch.py --data photos/train [--preset alexnet|cifar|cifar-v2|photos-v2] [--images 600] [--rounds 2]
    python benchmarks/epoch.py --data photos/train --preset photos-v2 --device cuda --arch resnet18 --crops 2x96,4x48

An epoch of DeepCluster extracts features, whitens, clusters and trains; an epoch of DeepCluster-v2 clusters the
memory bank and trains on all crops of each image. The network is the same in all (`make_trunk`); in turn, each in its
own process:

- plain: the loop as published (plain.py): ImageFolder, Pillow, torchvision's transforms on each image, a DataLoader
  of processes, contiguous NCHW images; PCA and k-means of faiss if it is installed, else of scikit-learn;
  DeepCluster-v2's own k-means. In float32, and on a GPU also with AMP;
- ours: `run_epoch`, as `train` calls it, in float32 and in the precision of `--precision`; the first epoch (in which
  DeepCluster-v2 also fills its bank) and the second. Before the first one all images are decoded into memory; these seconds
  are on a line of their own. On a GPU also with the images in the machine's memory and not on the GPU ("by workers");
- network: the same number of feature batches and training steps, with head and optimizer, on random float tensors
  (bare_network.py).

Before timing starts, each has run its network on a batch, forward and backward, and the files are in the system's
cache. Prints medians over the rounds. The share of the bare network is given for features and training, for the whole
epoch, and for the epoch's CPU-seconds, which are more reliable on a busy machine. CPU-seconds are those of all
threads and processes. Peak memory is that of the process; for worker processes that of the largest, shared pages
included. About 5 minutes on 2 idle cores.
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
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import sklearn.metrics  # noqa: F401 - used for the NMI in the second epoch: loading takes 2 s, once per run
import torch
from bare_network import BareNetwork, has_feature_pass
from input import copied, cpu_seconds
from plain import epoch_2018, epoch_v2

from deepcluster.core.device import Machine
from deepcluster.core.distributed import ONE_PROCESS
from deepcluster.core.progress import Reporter
from deepcluster.core.text import size
from deepcluster.core.work import Work
from deepcluster.data import cache
from deepcluster.data.cache import CachePlan, decoded_images
from deepcluster.data.loader import Loader
from deepcluster.data.sources import open_source
from deepcluster.models.trunk import Trunk
from deepcluster.run.features import FEATURE_BATCH, make_run_trunk
from deepcluster.run.recipes import RECIPES
from deepcluster.run.settings import Settings
from deepcluster.training.batches import even_batches
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.deepcluster_v2 import DeepClusterV2
from deepcluster.training.loop import STEPS, Loop

_PHOTOS = {"image_size": 96, "crops": "2x96,4x48", "blur": 0.5, "reduce_to": 160}
# As published, and as in the plain loop: memory bank, no whitening.
_PUBLISHED = {"look_again": False, "whiten": False}
PRESETS: dict[str, dict[str, Any]] = {
    "alexnet": {"arch": "alexnet", "image_size": 224, "clusters": 500, "pca": 256, "batch_size": 64, "images": 600},
    "cifar": {"arch": "alexnet-small", "image_size": 32, "clusters": 150, "pca": 64, "batch_size": 64, "images": 6000},
    "cifar-v2": {**RECIPES["v2-small-images"].settings, "image_size": 32, **_PUBLISHED, "images": 6000},
    "photos-v2": {**RECIPES["v2-small-set"].settings, **_PHOTOS, **_PUBLISHED, "images": 600},
}
# Shares of the bare network: AlexNet with Sobel filters is mostly convolutions; a small trunk hides less of the other work.
TARGETS = {"plain": 2.0, "alexnet": 0.9, "cifar": 0.8, "cifar-v2": 0.9, "photos-v2": 0.9}

# Seconds by step, "cpu" seconds of all steps, and if they are known "data_wait_share" and the "fill" seconds before the
# first epoch; by the name of the epoch.
Epochs = dict[str, dict[str, float]]


class Clock:
    """Sums of the seconds of each step, and of CPU-seconds."""

    def __init__(self) -> None:
        self.seconds = {**dict.fromkeys(STEPS, 0.0), "cpu": 0.0}
        self.last, self.cpu_last = time.perf_counter(), cpu_seconds()

    def count(self, step: str) -> None:
        """Count the time since the last call as that of `step`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, cpu = time.perf_counter(), cpu_seconds()
        self.seconds[step] += now - self.last
        self.seconds["cpu"] += cpu - self.cpu_last
        self.last, self.cpu_last = now, cpu


def warm_up(trunk: Trunk, settings: Settings, machine: Machine) -> None:
    """Run the network forward and backward, which builds its kernels; only its running averages change."""
    images_BCHW = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size, device=machine.device)
    if trunk_is_channels_last(trunk):
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
    with machine.autocast():
        with torch.no_grad():
            trunk.eval()(images_BCHW)
        trunk.train()(images_BCHW).float().sum().backward()
    trunk.zero_grad(set_to_none=True)


def trunk_is_channels_last(trunk: Trunk) -> bool:
    """Return True if its filters are in channels-last order."""
    wide = [weight for weight in trunk.parameters() if weight.dim() == 4 and weight.requires_grad]
    return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in wide)


def plain_epoch(data: Path, settings: Settings) -> Epochs:
    """Run the published loop, step by step; in float32, or with AMP if the settings ask for bf16."""
    machine, amp = Machine.choose(settings.device, "fp32"), settings.precision == "bf16"
    trunk = make_run_trunk(settings).to(machine.device)
    warm_up(trunk, settings, machine)
    clock, run = Clock(), epoch_v2 if settings.method == "deepcluster-v2" else epoch_2018
    run(trunk, data, settings, clock.count, amp=amp)
    return {"plain amp" if amp else "plain": clock.seconds}


def our_epochs(data: Path, settings: Settings, *, on_gpu: bool = True) -> Epochs:
    """Fill the cache, then run two epochs of ours.

    Args:
        on_gpu: keep the images on the GPU, if there is one, instead of cropping them by worker processes.
    """
    machine = Machine.choose(settings.device, settings.precision)
    images = decoded_images(open_source(data), CachePlan(0, memory_bytes=sys.maxsize), reduce_to=settings.reduce_to)
    cache.GPU_SHARE = cache.GPU_SHARE if on_gpu else 0.0
    make = DeepClusterV2 if settings.method == "deepcluster-v2" else DeepCluster
    title = f"ours {machine.precision}{'' if on_gpu else ' by workers'}"
    with closing(Loader(images, workers=settings.workers or 0, device=machine.device)) as loader:
        started = time.perf_counter()
        loader.fill(lambda _: None)
        fill = time.perf_counter() - started
        method = make(make_run_trunk(settings), loader, settings, machine, Work(Reporter(quiet=True)))
        loop = Loop(method)
        warm_up(method.trunk, settings, machine)
        epochs = {}
        for name in ("first", "second"):
            before, metrics = cpu_seconds(), loop.run_epoch()
            cost = {"cpu": cpu_seconds() - before, "data_wait_share": metrics["data_wait_share"], "fill": fill}
            epochs[f"{title}, {name} epoch"] = {**metrics["seconds"], **cost}
    return epochs


def bare_epoch(data: Path, settings: Settings) -> Epochs:
    """Run the feature batches, if the method has a feature pass, and training steps of an epoch, without images."""
    machine, n_images = Machine.choose(settings.device, settings.precision), len(open_source(data))
    network = BareNetwork(settings, machine)
    batches = batch_sizes(n_images, network.feature_batch) if has_feature_pass(settings) else []
    steps = [part.stop - part.start for part in even_batches(n_images, settings.batch_size, ONE_PROCESS)]
    # Kernels are built for each batch size, once per run.
    for count in sorted(set(batches)):
        network.extract(count)
    for count in sorted(set(steps)):
        network.train_step(count)
    network.finish()
    clock = Clock()
    for count in batches:
        network.extract(count)
    clock.count("features")
    for count in steps:
        network.train_step(count)
    clock.count("training")
    return {f"network {machine.precision}": clock.seconds}


def batch_sizes(n_images: int, batch: int) -> list[int]:
    """Return the sizes of all batches of a feature pass."""
    return [min(batch, n_images - first) for first in range(0, n_images, batch)]


VARIANTS: dict[str, Callable[[Path, Settings], Epochs]] = {
    "plain": plain_epoch,
    "ours": our_epochs,
    "by workers": partial(our_epochs, on_gpu=False),
    "network": bare_epoch,
}


def peak_bytes(who: int) -> int:
    """Return the peak memory of this process, or of the largest ended child."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_here(variant: str, data: Path, settings: Settings) -> None:
    """Run one variant in this process; print its result as the last line."""
    epochs = VARIANTS[variant](data, settings)
    peaks = [peak_bytes(resource.RUSAGE_SELF), peak_bytes(resource.RUSAGE_CHILDREN)]
    print(json.dumps({"epochs": epochs, "peaks": peaks}))


def run_apart(variant: str, data: Path, settings: Settings) -> dict[str, Any]:
    """Run `run_here` in its own process."""
    one = [variant, str(data), json.dumps(settings.as_dict())]
    done = subprocess.run([sys.executable, __file__, "--one", *one], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(data: Path, settings: Settings, precisions: Sequence[str], rounds: int) -> tuple[Epochs, dict[str, list[int]]]:
    """Return the medians of all variants over the rounds, and their peak memory."""
    plain, quick = (
        Settings.from_dict({**settings.as_dict(), "precision": precision}) for precision in ("fp32", precisions[-1])
    )
    ours = [Settings.from_dict({**settings.as_dict(), "precision": precision}) for precision in precisions]
    on_gpu = Machine.choose(settings.device, "fp32").device.type == "cuda"
    amp = [Settings.from_dict({**settings.as_dict(), "precision": "bf16"})] if on_gpu else []
    by_workers = [("by workers", quick)] if on_gpu else []
    turns = [*(("plain", one) for one in (plain, *amp)), *(("ours", one) for one in ours), *by_workers, ("network", quick)]
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
    """Return the total seconds of some steps."""
    return sum(epoch[step] for step in steps)


def print_table(medians: Epochs, peaks: dict[str, list[int]], n_images: int, preset: str, precision: str) -> None:
    """Print seconds, rates and peaks, then the ratios beside their targets."""
    print(
        f"{'seconds':<36}" + "".join(f"{title:>12}" for title in (*STEPS, "epoch", "images/s", "CPU-s", "data wait", "peak"))
    )
    for name, epoch in medians.items():
        cells = (
            "".join(f"{epoch[step]:>12.2f}" for step in STEPS)
            + f"{total(epoch):>12.2f}{n_images / total(epoch):>12.1f}{epoch['cpu']:>12.2f}"
        )
        wait = f"{epoch['data_wait_share']:>12.1%}" if "data_wait_share" in epoch else f"{'-':>12}"
        own, child = peaks[name]
        workers = f" and {size(child)} per worker" if child and not name.startswith("network") else ""
        print(f"{name:<36}{cells}{wait}{size(own):>12}{workers}")
    fills = [epoch["fill"] for epoch in medians.values() if "fill" in epoch]
    print(f"{'decoding before the first epoch':<36}{statistics.median(fills):>12.2f}")
    best = f"ours {precision}, second epoch"
    for plain in [name for name in medians if name.startswith("plain")]:
        print_ratios(medians, plain, best)
    names = [name for name in medians if name.startswith(f"ours {precision}") and name != best]
    print_shares(medians, f"network {precision}", [*names, best], TARGETS[preset])


def print_ratios(medians: Epochs, plain: str, best: str) -> None:
    """Print the speed of ours as a multiple of a plain loop's."""
    title, slow = f"times as fast as {plain}", medians[plain]
    print(f"\n{title:<36}" + "".join(f"{title:>12}" for title in (*STEPS, "epoch", "CPU-s", "target")))
    for name, epoch in medians.items():
        if name.startswith("ours"):
            cells = "".join(ratio(slow[step], epoch[step]) for step in STEPS)
            aim = f"{TARGETS['plain']:>12.1f}" if name == best and plain == "plain" else ""
            print(f"{name:<36}{cells}{total(slow) / total(epoch):>12.2f}{slow['cpu'] / epoch['cpu']:>12.2f}{aim}")


def print_shares(medians: Epochs, bare: str, names: Sequence[str], target: float) -> None:
    """Print the speed of ours as a share of the bare network's."""
    titles = ("features", "training", "both", "epoch", "CPU-s", "target")
    print(f"\n{'share of the bare network':<36}" + "".join(f"{title:>12}" for title in titles))
    network, work = medians[bare], ("features", "training")
    for name in names:
        epoch = medians[name]
        pairs = [(network[step], epoch[step]) for step in work]
        pairs += [(total(network, work), total(epoch, work)), (total(network, work), total(epoch))]
        pairs += [(network["cpu"], epoch["cpu"])]
        # With a memory bank the bare network extracts no features.
        cells = "".join(f"{above / below:>12.1%}" if above > 1e-3 and below else f"{'-':>12}" for above, below in pairs)
        print(f"{name:<36}{cells}" + (f"{target:>12.0%}" if name == names[-1] else ""))


def ratio(above: float, below: float) -> str:
    """Return a table cell."""
    return f"{above / below:>12.2f}" if above and below else f"{'-':>12}"


def chosen(options: argparse.Namespace) -> tuple[Settings, int]:
    """Return the preset's settings with the given options, and the number of images."""
    values = PRESETS[options.preset]
    asked = {name: getattr(options, name) for name in (*ASKED, "arch", "crops") if getattr(options, name) is not None}
    quick = {"images": 60, "clusters": 20} if options.quick else {}
    if "clusters" in asked or quick:
        several = len(values["clusters"]) if isinstance(values["clusters"], tuple) else 0
        clusters = asked.get("clusters", 20)
        asked["clusters"] = (clusters,) * several if several else clusters
    values = {**values, **quick, **asked, "device": options.device, "workers": options.workers, "compile": options.compile}
    n_images = values.pop("images")
    values["pca"] = min(values.get("pca", n_images - 1), n_images - 1)
    return Settings.from_dict({"recipe": "paper-alexnet", **values}), n_images


ASKED = ("image_size", "clusters", "pca", "batch_size", "images")


def main() -> None:
    """Print the tables; or run one variant and print its result."""
    if sys.argv[1:2] == ["--one"]:
        run_here(sys.argv[2], Path(sys.argv[3]), Settings.from_dict(json.loads(sys.argv[4])))
        return
    options = arguments()
    settings, n_images = chosen(options)
    best = Machine.choose(options.device, options.precision).precision
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        data = copied(options.data, n_images, Path(temporary, "images"), cache=Path(temporary, "cache"))
        n_images = len(open_source(data, cache=Path(temporary, "cache")))
        print(
            f"{settings.method}, {settings.arch}{' with Sobel' if settings.sobel else ''}, {about(settings)}, {n_images:,} "
            f"images, {settings.describe_clusters()}, batch {settings.batch_size}, {settings.workers} workers, "
            f"{Machine.choose(options.device, best).describe()}, torch {torch.__version__}\n"
        )
        precisions = ["fp32"] if best == "fp32" else ["fp32", best]
        medians, peaks = measure(data, settings, precisions, 1 if options.quick else options.rounds)
    print_table(medians, peaks, n_images, options.preset, best)


def about(settings: Settings) -> str:
    """Return a description of the views, and of the clustering."""
    if settings.method == "deepcluster-v2":
        return ", ".join(f"{number} x {side} px" for number, side in settings.crop_groups)
    faiss = "faiss" if importlib.util.find_spec("faiss") else "scikit-learn"
    return (
        f"{settings.image_size} px, PCA {settings.pca}, {FEATURE_BATCH} images per feature batch, {faiss} in the plain loop"
    )


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of images, or a tar of them")
    parser.add_argument("--preset", choices=PRESETS, default="alexnet", help="method, and the defaults of the following")
    parser.add_argument("--arch")
    parser.add_argument("--crops", help="crops of DeepCluster-v2, such as 2x96,4x48")
    for name in ASKED:
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="precision of ours")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for ours and for the bare network")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of the plain loop, and of ours")
    parser.add_argument("--folder", type=Path, help="an existing folder for temporary files")
    parser.add_argument("--quick", action="store_true", help="60 images, 20 clusters, 1 round: only check that it runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
