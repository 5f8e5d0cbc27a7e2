"""Cost of a run on 10,000 to a billion images: memory of a rank, bytes sent, seconds of each step.

    python benchmarks/scaling.py measure --data photos/train --out constants.json [--quick]
    python benchmarks/scaling.py table [--constants constants.json] [--tflops 60] [--cores 12] [--network-gbytes 200]
    python benchmarks/scaling.py check --data cifar10-train.tar.gz --constants constants.json [--images 5000] [--ranks 1,2]

`measure` measures the constants of this machine (scaling_measure.py): operations per second of the network, seconds
per image for decoding, cropping, colours, whitening, clustering, drawing and writing, and sums and exchanges between
2 and 4 processes by gloo, to which the latency and bandwidth of a ring are fitted; it prints the largest error of the
formula.

`table` applies the model (scaling_model.py, scaling_seconds.py, scaling_links.py) to runs of six sizes on machines of
8 GPUs. The speeds of GPUs and networks were not measured: they are assumptions, each with its source in `ASSUMED`,
and can be changed by flags. The simulation of a ring, message by message, is printed beside the formula.

`check` trains on this machine, on 1 and 2 processes, and prints the model's prediction beside the measured time; on a
busy machine also corrected for the share of a core that each process had.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scaling_links import Fabric, Link, ring_seconds, simulated_ring_seconds
from scaling_measure import (
    SIZES,
    WORLDS,
    as_json,
    fitted_link,
    job_of,
    measured_collectives,
    measured_constants,
    network_facts,
)
from scaling_model import Job, Network, files, main_memory, memory, traffic
from scaling_seconds import Constants, gathered_seconds, seconds

from deepcluster.core.device import Machine
from deepcluster.core.text import duration, size
from deepcluster.run.recipes import RECIPES
from deepcluster.run.settings import Settings

# Assumptions that are not measured: value and source. Flags of the same name change them.
ASSUMED: dict[str, tuple[float, str]] = {
    "tflops": (60.0, "ResNet-50 on one A100 in mixed precision: 2,470 images/s (NVIDIA/DeepLearningExamples, resnet50v1.5), "
               "3 x 8.2 GFLOP each. An H100 does more: its memory, which limits ResNet-50, is 1.6 times as fast"),
    "cluster_tflops": (100.0, "products of k-means: a third of the A100's 312 in bf16 (data sheet); an assumption"),
    "exact_tflops": (10.0, "float32 products of whitening: half of the A100's 19.5 (data sheet); an assumption"),
    "cores": (12.0, "cores for each GPU: 96 in a machine of 8"),
    "nvlink_gbytes": (240.0, "of 300 GB/s each way (A100 data sheet), 80 % reached; an assumption"),
    "network_gbytes": (160.0, "a machine of 8 A100 has 8 x 200 Gb/s (DGX A100 data sheet), 80 % reached; an assumption"),
    "latency_us": (10.0, "of a message inside a machine, by NCCL; an assumption"),
    "network_latency_us": (20.0, "of a message between machines; an assumption"),
    "decode_ms": (1.0, "of a core for a photo of 500 x 375 (docs/speed.md)"),
    "disk_mbytes": (1000.0, "written per second; an assumption"),
}  # fmt: skip

_RESNET50: dict[str, Any] = {"arch": "resnet50", "crops": ((2, 224), (6, 96)), "method": "deepcluster-v2"}
_DEEPER: dict[str, Any] = {"arch": "vgg16", "crops": ((1, 224),), "method": "deepercluster", "super_clusters": 4}
# Images, ranks, clusters, batch, P, and other differences.
PLANS: tuple[tuple[float, int, tuple[int, ...], int, int, dict[str, Any]], ...] = (
    (1e4, 1, (100,) * 3, 128, 128, {**_RESNET50, "arch": "resnet18", "crops": ((2, 96), (4, 48))}),
    (1e5, 1, (1000,) * 3, 256, 128, _RESNET50),
    (1e6, 8, (3000,) * 3, 2048, 128, _RESNET50),
    (1e7, 32, (10_000,) * 3, 4096, 128, _RESNET50),
    (1e8, 64, (320_000,), 3072, 256, _DEEPER),
    (1e9, 256, (30_000,) * 3, 16_384, 128, _RESNET50),
)


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "table", "check"))
    parser.add_argument("--data", type=Path, help="a folder of images, or a tar of them")
    parser.add_argument("--recipe", default="v2-small-images", help="recipe whose network is measured")
    parser.add_argument("--constants", type=Path, help="file written by `measure`")
    parser.add_argument("--out", type=Path, help="file for the constants")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
    parser.add_argument("--images", type=int, default=5000, help="for `check`")
    parser.add_argument("--clusters", default="50,50,50", help="for `check`")
    parser.add_argument("--ranks", default="1,2", help="for `check`")
    for name, (value, why) in ASSUMED.items():
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=value, help=why.replace("%", "%%"))
    options = parser.parse_args()
    if options.what in ("measure", "check") and options.data is None:
        parser.error(f"{options.what} needs --data")
    {"measure": measure, "table": table, "check": check}[options.what](options)


def recipe_settings(options: argparse.Namespace) -> Settings:
    """Return the settings of the recipe."""
    return Settings.from_dict({**RECIPES[options.recipe].settings, "recipe": options.recipe, "device": options.device})


def measure(options: argparse.Namespace) -> None:
    """Measure, print and save the constants of this machine."""
    settings, machine = recipe_settings(options), Machine.choose(options.device)
    constants = measured_constants(options.data, settings, machine, cores=0, quick=options.quick)
    sizes = SIZES[: 5 if options.quick else None]
    collectives = measured_collectives(sizes, WORLDS)
    print(f"{settings.arch}, {machine.describe()}\n")
    for name, value in vars(constants).items():
        print(f"{name:<20}{value:>12.4g}")
    links = {}
    for world, times in collectives["all_reduce"].items():
        links[world], worst = fitted_link(sizes, times, world)
        print(f"\n{world} processes by gloo: {describe(links[world])}; largest error of the formula {worst:.0%}")
        print(f"{'bytes':>12}{'all_reduce':>12}{'formula':>12}{'simulated':>12}{'all_to_all':>12}  (ms)")
        for number, n_bytes in enumerate(sizes):
            formula = ring_seconds(n_bytes, world, links[world])
            simulated = simulated_ring_seconds(n_bytes, [links[world]] * world)
            row = (times[number], formula, simulated, collectives["all_to_all"][world][number])
            print(f"{n_bytes:>12,}" + "".join(f"{1000 * value:>12.3f}" for value in row))
    if options.out is not None:
        options.out.write_text(json.dumps(as_json(constants, links, collectives), indent=2) + "\n", encoding="utf-8")


def describe(link: Link) -> str:
    """Return latency and bandwidth in words."""
    return f"latency {1e6 * link.latency:.0f} µs, {link.bytes_per_second / 1e9:.2f} GB/s"


def of_gpu(options: argparse.Namespace, here: Constants) -> Constants:
    """Return the constants of a rank with a GPU, from the assumptions; its CPU is as measured."""
    # A pixel is read and written about ten times as float32, in memory of 2 TB/s.
    return replace(
        here,
        training_flops=1e12 * options.tflops,
        feature_flops=1e12 * options.tflops,
        cores=options.cores,
        decode_seconds=1e-3 * options.decode_ms,
        colour_seconds=3 * 10 * 8 / 2e12,
        whiten_seconds=1.12 / (1e12 * options.exact_tflops),
        eigen_seconds=1e-11,
        # Rows of float32 are read about ten times per iteration, in the same memory; the iteration's own time is Python's.
        row_seconds=10 * 4 / 2e12,
        pair_seconds=2 / (1e12 * options.cluster_tflops),
        disk_bytes=1e6 * options.disk_mbytes,
    )


def fabric_of(options: argparse.Namespace) -> Fabric:
    """Return the network of machines of 8 GPUs."""
    inside = Link(1e-6 * options.latency_us, 1e9 * options.nvlink_gbytes)
    return Fabric(inside, Link(1e-6 * options.network_latency_us, 1e9 * options.network_gbytes))


def read_constants(options: argparse.Namespace) -> tuple[Constants, dict[int, Link]]:
    """Return the constants and links in the file."""
    if options.constants is None:
        raise SystemExit("give --constants FILE, as written by `measure --out FILE`")
    content = json.loads(options.constants.read_text(encoding="utf-8"))
    return Constants(**content["constants"]), {int(world): Link(**link) for world, link in content["links"].items()}


def planned() -> Iterator[Job]:
    """Yield the runs of the table."""
    facts: dict[str, Network] = {}
    for images, ranks, clusters, batch, components, rest in PLANS:
        key = f"{rest['arch']} {rest['crops']}"
        facts.setdefault(key, network_facts(rest["arch"], [side for _, side in rest["crops"]], sobel=False))
        parts = {name: value for name, value in rest.items() if name != "arch"}
        yield Job(
            images=images,
            ranks=ranks,
            network=facts[key],
            clusters=clusters,
            batch=batch,
            components=components,
            iterations=10 if rest["method"] == "deepcluster-v2" else 20,
            **parts,
        )


def table(options: argparse.Namespace) -> None:
    """Print memory, bytes and seconds of all sizes, in Markdown."""
    here, _ = read_constants(options)
    fabric, jobs = fabric_of(options), list(planned())
    print_jobs("runs", jobs, of_gpu(options, here), fabric)
    print_jobs("320,000 clusters of 96 million images", list(very_many(jobs)), of_gpu(options, here), fabric)
    print("\n| sum over ranks | bytes | formula | simulated | by a tree |\n|---|---|---|---|---|")
    for ranks in (8, 64, 512):
        for n_bytes in (1e3, 1e6, 1e8):
            plain = replace(fabric, tree=False)
            found = plain.all_reduce_seconds(n_bytes, ranks), simulated_ring_seconds(n_bytes, fabric.ring(ranks))
            quicker = fabric.all_reduce_seconds(n_bytes, ranks)
            cells = " | ".join(f"{1000 * value:.3f} ms" for value in (*found, quicker))
            print(f"| {ranks} | {size(int(n_bytes))} | {cells} |")


def very_many(jobs: Sequence[Job]) -> Iterator[Job]:
    """Yield the size of DeeperCluster's paper: hierarchical, flat, and with DeepCluster-v2."""
    paper = next(job for job in jobs if job.method == "deepercluster")
    paper = replace(paper, images=96e6)
    yield paper
    yield replace(paper, method="deepcluster", super_clusters=0)
    v2 = next(job for job in jobs if job.is_v2 and job.images == 1e7)
    yield replace(v2, images=96e6, ranks=paper.ranks, clusters=(320_000,))


def print_jobs(title: str, jobs: Sequence[Job], constants: Constants, fabric: Fabric) -> None:
    """Print a column for each run."""
    # Very many images are not kept decoded.
    kept = [replace(constants, kept=1.0 if job.images <= 2e6 else 0.0) for job in jobs]
    print(f"\n| {title} | " + " | ".join(f"{job.images:.3g} images" for job in jobs) + " |\n|" + "---|" * (len(jobs) + 1))
    heads = [
        f"{len(job.clusters)} × {job.clusters[0]:,}" if len(job.clusters) > 1 else f"{job.clusters[0]:,}" for job in jobs
    ]
    print_row("method", [job.method for job in jobs])
    print_row("clusters", heads)
    print_row("ranks", [str(job.ranks) for job in jobs])
    columns = [memory(job) for job in jobs]
    for job, column in zip(jobs, columns, strict=True):
        on_device = sum(value for name, value in column.items() if not name.startswith("host"))
        column["**device, total**"], column["**host, total**"] = on_device, sum(column.values()) - on_device
        column.update({f"rank 0 also: {name[6:]}": value for name, value in main_memory(job).items()})
        column.update({f"file: {name}": value for name, value in files(job).items()})
        column.update({f"sent: {name}": value for name, value in traffic(job).items()})
    print_columns(columns, lambda value: size(int(value)))
    times = [seconds(job, its, fabric) for job, its in zip(jobs, kept, strict=True)]
    print_columns([{**column, "**epoch**": sum(column.values())} for column in times], in_words)


def in_words(value: float) -> str:
    """Return seconds in words."""
    return duration(value) if value >= 60 else f"{value:.2g} s"


def print_columns(columns: Sequence[dict[str, float]], words: Any) -> None:
    """Print a row for each name in any column."""
    for name in dict.fromkeys(name for column in columns for name in column):
        print_row(name, [words(column[name]) if column.get(name) else "–" for column in columns])


def print_row(name: str, cells: Sequence[str]) -> None:
    """Print a row in Markdown."""
    print(f"| {name} | " + " | ".join(cells) + " |")


def check(options: argparse.Namespace) -> None:
    """Train, and compare the second epoch with the model's prediction."""
    constants, links = read_constants(options)
    settings = recipe_settings(options)
    heads = tuple(int(count) for count in options.clusters.split(","))
    settings = replace(settings, clusters=heads if len(heads) > 1 else heads[0])
    print(f"{'ranks':<7}{'step':<22}{'predicted':>12}{'measured':>12}{'ratio':>8}{'own core':>10}")
    for ranks in map(int, options.ranks.split(",")):
        job = job_of(settings, options.images, ranks)
        link = links.get(ranks, next(iter(links.values())))
        fabric = Fabric(link, link, ranks_per_machine=ranks, tree=False, overlap=False)
        predicted = seconds(job, constants, fabric)
        took = trained(options, ranks)
        # A run counts gathering labels as clustering; matching and the order are not timed.
        gathered = gathered_seconds(job, constants, fabric)
        pairs = {
            "features": (predicted["features"], took["features"]),
            "whitening": (predicted["whitening"], took["whitening"]),
            "clustering": (predicted["clustering"] + gathered, took["clustering"]),
            "training": (predicted["training"], took["training"]),
        }
        pairs["epoch"] = tuple(map(sum, zip(*pairs.values(), strict=True)))  # type: ignore[assignment]
        print(f"{ranks:<7}each process had {took['share']:.2f} of a core")
        for step, (before, after) in pairs.items():
            if after:
                ratio = before / after
                print(f"{ranks:<7}{step:<22}{before:>10.2f} s{after:>10.2f} s{ratio:>8.2f}{ratio / took['share']:>10.2f}")


def trained(options: argparse.Namespace, ranks: int) -> dict[str, float]:
    """Return the seconds by step of the second epoch on `ranks` processes of one thread, and their mean share of a core."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["deepcluster", "train", str(options.data), "--recipe", options.recipe, "--limit", str(options.images)]
        words += ["--method", RECIPES[options.recipe].settings.get("method", "deepcluster"), "--clusters", options.clusters]
        words += ["--epochs", "2", "--workers", "0", "--cache", "memory", "--device", options.device, "--quiet"]
        words += ["--out", str(Path(folder, "run"))]
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        began, before = time.perf_counter(), sum(os.times()[2:4])
        subprocess.run([sys.executable, "-m", *start, *words], check=True, env=environment, stdout=subprocess.DEVNULL)
        share = (sum(os.times()[2:4]) - before) / (time.perf_counter() - began) / ranks
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {**json.loads(lines[1])["seconds"], "share": share}


if __name__ == "__main__":
    main()
