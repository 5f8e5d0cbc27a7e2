"""Seconds, memory and bytes of the report's page, of a made-up run as large as ImageNet's.

    python benchmarks/report.py [--images 1000000] [--clusters 10000] [--epochs 20] [--out page.html]

Images of 16 x 16 pixels in one array, names as ImageNet's, a label and a distance for each; centroids and the points of a
sample in 64 dimensions; earlier epochs in Parquet, each of which moves a tenth of the images to another cluster. The page is
made by `build_report`, as `deepcluster report` makes it, without the parts that need a trained network. Seconds are those of
the parts as they are called; some are called twice. Memory is the peak of the process that makes the page (Linux), of which
some 0.4 GB are Python with its libraries; the run is made up by another. Some 2 minutes on 2 idle cores.
"""

import argparse
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from deepcluster.data.loader import usual_workers
from deepcluster.data.sources import open_source
from deepcluster.visualization.report import build
from deepcluster.visualization.report.collection import Collection, Past, RunFacts

DIM, SIDE, CLASSES, SAMPLE = 64, 16, 1_000, 20_000
PARTS = ("describe_clusters", "find_odd", "lay_out", "by_importance", "list_rows", "make_thumbnails", "write_page")


def make_up(folder: Path, n_images: int, n_clusters: int, n_epochs: int) -> None:
    """Write images, tables of all epochs, centroids and points of a sample."""
    rng = np.random.default_rng(0)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (n_images, SIDE, SIDE, 3))
    for first in range(0, n_images, 10_000):
        # A colour each, and as much detail as makes a thumbnail about as large as a photo's.
        part = images[first : first + 10_000]
        colours = rng.normal(128, 50, (len(part), 1, 1, 3))
        part[:] = np.clip(colours + rng.normal(0, 20, (len(part), SIDE, SIDE, 1)), 0, 255)
    images.flush()
    cluster_N = rng.integers(0, n_clusters, n_images)
    for epoch in range(1, n_epochs + 2):
        moved_N = rng.random(n_images) < 0.1
        cluster_N = np.where(moved_N, rng.integers(0, n_clusters, n_images), cluster_N)
        distance_N = rng.gamma(20, 0.04, n_images).astype(np.float32)
        pq.write_table(pa.table({"cluster": cluster_N, "distance": distance_N}), folder / f"epoch-{epoch:04}.parquet")
    centroids_KP = rng.normal(size=(n_clusters, DIM)).astype(np.float32)
    sample_M = np.sort(rng.choice(n_images, min(SAMPLE, n_images), replace=False))
    points_MP = centroids_KP[cluster_N[sample_M]] + rng.normal(0, 0.5, (len(sample_M), DIM)).astype(np.float32)
    label_N = rng.integers(0, CLASSES, n_images)
    np.savez(folder / "rest.npz", centroids_KP=centroids_KP, sample_M=sample_M, points_MP=points_MP, label_N=label_N)


def read(folder: Path, n_clusters: int) -> Collection:
    """The collection, as it is read of a run."""
    tables = sorted(folder.glob("epoch-*.parquet"))
    last, rest = pq.read_table(tables[-1]), np.load(folder / "rest.npz")
    label_N = rest["label_N"]

    def clusters_of(table: Path) -> Callable[[], Any]:
        return lambda: pq.read_table(table, columns=["cluster"])["cluster"].to_numpy()

    return Collection(
        title="a made-up run",
        names=[f"n{label:08}/ILSVRC_{image:07}.JPEG" for image, label in enumerate(label_N.tolist())],
        cluster_N=last["cluster"].to_numpy(),
        distance_N=last["distance"].to_numpy(),
        n_clusters=n_clusters,
        label_N=label_N,
        label_names=[f"n{label:08}" for label in range(CLASSES)],
        centroids_KP=torch.from_numpy(rest["centroids_KP"]),
        past=[Past(epoch, clusters_of(table)) for epoch, table in enumerate(tables[:-1], 1)],
        images=open_source(folder / "images.npy"),
        sample_M=rest["sample_M"],
        points_MP=rest["points_MP"],
        table=f"assignments/{tables[-1].name}",
    )


def timed_parts() -> dict[str, list[float]]:
    """From now on, the seconds of each call of a part of `build_report`, by its name."""
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return part(*values, **named)
            finally:
                seconds[name].append(time.perf_counter() - started)

        return call

    for name in PARTS:
        setattr(build, name, timed(name, getattr(build, name)))
    return seconds


def main() -> None:
    """Make up a run, make its page, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--clusters", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=20, help="earlier epochs")
    parser.add_argument("--out", type=Path, help="keep the page here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maker = get_context("spawn").Process(target=make_up, args=(folder, args.images, args.clusters, args.epochs))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the run could not be made up")
        seconds, began = timed_parts(), time.perf_counter()
        collection = read(folder, args.clusters)
        seconds["reading tables"].append(time.perf_counter() - began)
        about = RunFacts("a made-up run", str(folder))
        n_bytes = build.build_report(
            args.out or folder / "page.html", build.Context(collection, about, workers=usual_workers())
        )
        whole = time.perf_counter() - began
    print(f"{args.images:,} images, {args.clusters:,} clusters, {args.epochs} earlier epochs")
    for part, calls in seconds.items():
        print(f"  {part:<18} {sum(calls):6.1f} s" + (f"  ({len(calls)} calls)" if len(calls) > 1 else ""))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{whole:.1f} s, peak {peak / 1e9:.2f} GB, page {n_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
