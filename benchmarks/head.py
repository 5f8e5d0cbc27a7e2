"""What a head of very many clusters costs a training step on several processes: whole on each, or spread over them.

    python benchmarks/head.py [--clusters 20000] [--super-clusters 16] [--dim 1024] [--batch 256] [--processes 2]

A step (forward, backward, sums over the processes, SGD) of a trunk that is one small layer, and on it: one head of all
clusters, whose gradient is summed over them; or a head in two steps (DeeperCluster), whose layers are on one process
each, so that features travel. On one process, too, where nothing travels. Medians over steps; an idle machine, please.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn

from deepcluster.core.device import Machine
from deepcluster.core.distributed import data_parallel, my_part
from deepcluster.core.text import size
from deepcluster.models.heads import ClusterHead, Head, HierarchicalHead
from deepcluster.run.settings import Settings
from deepcluster.training.optim import Learner, head_optimizer, make_optimizer

KINDS = ("one head", "spread head")


class Rows(nn.Module):
    """A trunk of one layer, 16 numbers to D: features, and rows that are the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(16, dim)

    def forward(self, images_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D), twice."""
        features_BD = self.layer(images_BC)
        return features_BD, features_BD


def head_of(kind: str, arguments: argparse.Namespace) -> Head:
    """The head of a kind."""
    if kind == "one head":
        return ClusterHead(arguments.dim, arguments.clusters, seed=0)
    super_of_cluster_K = torch.arange(arguments.clusters) * arguments.super_clusters // arguments.clusters
    return HierarchicalHead(arguments.dim, super_of_cluster_K, seed=0)


def measure(number: int, processes: int, folder: Path, arguments: argparse.Namespace) -> None:
    """Seconds of the steps of each kind, and the weights of its head, written down by each process."""
    torch.set_num_threads(1)
    if processes > 1:
        store = dist.FileStore(str(folder / "store"), processes)
        dist.init_process_group("gloo", store=store, rank=number, world_size=processes)
    machine, settings = Machine.choose("cpu", "fp32"), Settings(head_momentum=0.9)
    images_BC, labels_B = torch.randn(arguments.batch, 16), torch.randint(arguments.clusters, (arguments.batch,))
    mine = my_part(arguments.batch)
    found = {}
    for kind in KINDS:
        head, trunk = head_of(kind, arguments), Rows(arguments.dim)
        optimizers = (
            make_optimizer(list(trunk.parameters()), settings, machine, momentum=0.9),
            head_optimizer(head, settings, machine),
        )
        learner = Learner(data_parallel(trunk, machine.device), head, optimizers, machine)
        seconds = []
        for _ in range(arguments.steps + 1):
            started = time.perf_counter()
            learner.step(images_BC[mine], labels_B[mine], rates=(0.01, 0.01), seed=0, total=arguments.batch)
            seconds.append(time.perf_counter() - started)
        found[kind] = (statistics.median(seconds[1:]), sum(weight.nbytes for weight in head.parameters()))
    torch.save(found, folder / f"{number}.pt")
    if processes > 1:
        dist.destroy_process_group()


def table(processes: int, arguments: argparse.Namespace) -> dict[str, tuple[float, int]]:
    """Of each kind the seconds of a step and the bytes of its head's weights, on the slowest and the fullest process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if processes == 1:
            measure(0, 1, folder, arguments)
        else:
            spawn(measure, args=(processes, folder, arguments), nprocs=processes)
        parts = [torch.load(folder / f"{number}.pt") for number in range(processes)]
    return {kind: (max(part[kind][0] for part in parts), max(part[kind][1] for part in parts)) for kind in KINDS}


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("clusters", 20_000), ("super-clusters", 16), ("dim", 1024), ("batch", 256), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=9)
    arguments = parser.parse_args(words)
    print(
        f"{arguments.clusters:,} clusters, {arguments.super_clusters} super-classes, {arguments.dim} features, "
        f"{arguments.batch} images a step; {os.cpu_count()} cores, one thread a process, gloo, fp32"
    )
    print(f"{'processes':<12}{'head':<14}{'a step':>10}{'weights on the fullest':>25}{'ratio of steps':>17}")
    for processes in dict.fromkeys((1, arguments.processes)):
        found = table(processes, arguments)
        for kind, (seconds, weights) in found.items():
            ratio = found["one head"][0] / seconds
            print(f"{processes:<12}{kind:<14}{seconds * 1000:>7.0f} ms{size(weights):>25}{ratio:>16.1f}x")


if __name__ == "__main__":
    main()
