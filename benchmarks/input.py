"""Images per CPU-second of this package's input and of the 2018 release's, in one run.

    python benchmarks/input.py --data photos/train [--small cifar10-train.tar.gz] [--images 1000] [--rounds 5] [--quick]

Three sets of files: photos of `--data` scaled up to 500 x 375 pixels, as they are, and 32 px (`--small`, or scaled down). On
each, the clustering view (shorter side to 256/224 of the view, centre crop) and the training view (random
resized crop, flip), by

- the published pipeline: torchvision's ImageFolder, Pillow, its transforms on each image, a DataLoader of 0 or 2 processes;
- ours with 0 or 2 threads: decoded each time, from memory, from files, and the last two with photos reduced to 256 px.
  Cached pipelines are measured from the third pass on, when images, and views if they are kept, are cached.

The published pipeline delivers normalised float32 tensors; ours uint8, which the run converts batch by batch: lines "float"
include that. Rates are images per CPU-second of all threads and processes, medians of rounds in which the pipelines
take turns; "both" is the rate for each image once in each view. Processes start before timing does. On Linux; about
5 minutes on 2 idle cores.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from deepcluster.core.device import Machine
from deepcluster.data.cache import DecodedImages
from deepcluster.data.cache_plan import CachePlan, decoded_images
from deepcluster.data.loader import Loader
from deepcluster.data.sources import open_source
from deepcluster.data.views import ClusterView, TrainingView
from deepcluster.models.trunk import IMAGENET_DEVIATION, IMAGENET_MEAN, normalise

BATCH = 256
VIEWS = ("cluster", "training")
LARGE, SMALL = (500, 375), 32
REDUCED = 256
QUALITY = 90
# Number of images that are compared pixel by pixel.
COMPARED = 200


@dataclass(frozen=True)
class Photos:
    """A set of files in class folders, and the side of their views."""

    folder: Path
    view_size: int
    about: str


class Pipeline(Protocol):
    """A pipeline from files to views."""

    name: str
    workers: int
    warm_ups: int

    def batches(self, view: str, number: int) -> Iterator[Tensor]:
        """Yield all images once, in batches; `number` of the round seeds what is random."""

    def to_floats(self, batch: Tensor) -> Tensor:
        """Return a batch as the network takes it."""

    def close(self) -> None:
        """Stop threads and processes."""


def published_transform(view: str, size: int) -> transforms.Compose:
    """Return the 2018 release's transform of a Pillow image."""
    shape = {
        "cluster": [transforms.Resize(ClusterView(size).resized), transforms.CenterCrop(size)],
        "training": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
    }
    return transforms.Compose([*shape[view], transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION)])


class Published:
    """ImageFolder and DataLoader; without pinned memory, which helps only on a GPU."""

    name, warm_ups = "published", 1

    def __init__(self, photos: Photos, workers: int) -> None:
        self.workers = workers
        self._order: list[int] = []
        self._loaders = {view: self._loader(photos, view) for view in VIEWS}

    def _loader(self, photos: Photos, view: str) -> "DataLoader[tuple[Tensor, Tensor]]":
        images = ImageFolder(str(photos.folder), published_transform(view, photos.view_size))
        self._order[:] = range(len(images))
        return DataLoader(
            images,
            BATCH,
            sampler=self._order,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            multiprocessing_context="fork" if self.workers else None,
        )

    def batches(self, view: str, number: int) -> Iterator[Tensor]:
        self._order[:] = _order(len(self._order), view, number).tolist()
        for images_BCHW, _ in self._loaders[view]:
            yield images_BCHW

    def to_floats(self, batch: Tensor) -> Tensor:
        return batch

    def close(self) -> None:
        self._loaders.clear()


class Ours:
    """The Loader of this package."""

    def __init__(self, name: str, images: DecodedImages, size: int, workers: int, *, warm_ups: int) -> None:
        self.name, self.workers, self.warm_ups = name, workers, warm_ups
        self._loader = Loader(images, workers=workers)
        self._cluster_view, self._training_view = ClusterView(size), TrainingView(size)
        self._machine = Machine(torch.device("cpu"), "fp32")

    def batches(self, view: str, number: int) -> Iterator[Tensor]:
        order_N = _order(len(self._loader.images), view, number)
        if view == "cluster":
            found = self._loader.cluster_views(self._cluster_view, order_N, BATCH)
        else:
            found = self._loader.training_views(self._training_view, order_N, BATCH, seed=0, epoch=number)
        for batch in found:
            yield batch.images_BCHW

    def to_floats(self, batch: Tensor) -> Tensor:
        return normalise(self._machine.put(batch))

    def close(self) -> None:
        self._loader.close()


def _order(count: int, view: str, number: int) -> Tensor:
    """Return the order of the images: their own for clustering, a random one for training."""
    if view == "cluster":
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(number))


def ours(photos: Photos, workers: Sequence[int], folder: Path) -> list[Pipeline]:
    """Return our pipelines on a set of photos; `folder` is for files of decoded images."""
    memory, files = CachePlan(0, memory_bytes=sys.maxsize), CachePlan(0, folder=folder)
    plans = {"ours, uncached": (CachePlan(0), 0), "ours, in memory": (memory, 0), "ours, in files": (files, 0)}
    if photos.about.startswith("large"):
        plans |= {"in memory, reduced": (memory, REDUCED), "in files, reduced": (files, REDUCED)}
    made: list[Pipeline] = []
    for name, (plan, reduce_to) in plans.items():
        source = open_source(photos.folder, cache=folder)
        images = decoded_images(source, plan, reduce_to=reduce_to, data=photos.folder)
        warm_ups = 1 if name == "ours, uncached" else 2
        made += [Ours(name, images, photos.view_size, count, warm_ups=warm_ups) for count in workers]
    return made


@dataclass
class Cost:
    """Cost of the passes of a pipeline over a view, one number per round; CPU-seconds include the conversion to floats."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    to_floats: list[float] = field(default_factory=list)


def cpu_seconds() -> float:
    """Return the CPU-seconds of this process and of its living children."""
    # The result of `clock_getcpuclockid` of the C library for a process; `resource` knows only ended children.
    clocks = [(~child.pid << 3) | 2 for child in multiprocessing.active_children() if child.pid is not None]
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def measure(pipeline: Pipeline, view: str, number: int, cost: Cost) -> None:
    """Add one pass to `cost`."""
    to_floats = 0.0
    started, cpu_started = time.perf_counter(), cpu_seconds()
    for batch in pipeline.batches(view, number):
        before = time.thread_time()
        pipeline.to_floats(batch)
        to_floats += time.thread_time() - before
    cost.seconds.append(time.perf_counter() - started)
    cost.cpu_seconds.append(cpu_seconds() - cpu_started)
    cost.to_floats.append(to_floats)


Rates = dict[str, float]  # by view, and "both"; "wall" is both in wall time
Row = tuple[str, str, int]  # pipeline, what it delivers, workers


def rates(costs: dict[str, Cost], images: int, *, floats: bool) -> Rates:
    """Return images per CPU-second, with or without the conversion to floats, and per second of wall time."""
    found = {}
    for view, cost in costs.items():
        spent = zip(cost.cpu_seconds, cost.to_floats, strict=True)
        found[view] = images / statistics.median(cpu - (0 if floats else step) for cpu, step in spent)
    found["both"] = statistics.harmonic_mean(found.values())
    found["wall"] = statistics.harmonic_mean([images / statistics.median(cost.seconds) for cost in costs.values()])
    return found


def compare(photos: Photos, workers: Sequence[int], rounds: int, folder: Path) -> dict[Row, Rates]:
    """Measure all pipelines in turn on a set, print its table, and return it."""
    count = sum(1 for _ in photos.folder.glob("*/*"))
    with ExitStack() as stack:
        pipelines = [*(Published(photos, number) for number in workers), *ours(photos, workers, folder)]
        for pipeline in pipelines:
            stack.enter_context(closing(pipeline))
        costs = [{view: Cost() for view in VIEWS} for _ in pipelines]
        for pipeline in pipelines:
            for number in range(pipeline.warm_ups):
                for view in VIEWS:
                    measure(pipeline, view, rounds + number, Cost())
        for number in range(rounds):
            for pipeline, cost in zip(pipelines, costs, strict=True):
                for view in VIEWS:
                    measure(pipeline, view, number, cost[view])
        difference = mean_difference(pipelines)
    table: dict[Row, Rates] = {}
    for pipeline, cost in zip(pipelines, costs, strict=True):
        if pipeline.name != "published":
            table[pipeline.name, "uint8", pipeline.workers] = rates(cost, count, floats=False)
        table[pipeline.name, "float", pipeline.workers] = rates(cost, count, floats=True)
    print_table(photos, count, table, difference)
    return table


def mean_difference(pipelines: Sequence[Pipeline]) -> dict[str, float]:
    """Return the mean |difference| of our cluster views from the published ones, of 255, by the name of the pipeline."""
    first = {p.name: p for p in pipelines if p.workers == min(p.workers for p in pipelines)}
    views = {name: next(p.batches("cluster", 0))[:COMPARED] for name, p in first.items()}
    deviation, mean = (torch.tensor(three)[:, None, None] for three in (IMAGENET_DEVIATION, IMAGENET_MEAN))
    published = (views.pop("published") * deviation + mean).mul(255).round()
    return {name: float((view.float() - published).abs().mean()) for name, view in views.items()}


def baseline(table: dict[Row, Rates], row: Row) -> Rates:
    """Return the rates of the published pipeline with as many workers."""
    return table["published", "float", row[2]]


def print_table(photos: Photos, count: int, table: dict[Row, Rates], difference: dict[str, float]) -> None:
    """Print rates, and their ratios to the published pipeline with as many workers."""
    print(f"\n{photos.about}: {count:,} files, {facts(photos.folder)}; views of {photos.view_size} px")
    titles = "".join(f"{title:>10}{'×':>7}" for title in ("cluster", "training", "both"))
    print(f"  {'images/CPU-second':<20}{'gives':<7}{'workers':>7}{titles}{'both, images/s':>16}")
    for row, found in table.items():
        name, gives, workers = row
        base = baseline(table, row)
        cells = "".join(f"{found[view]:>10,.0f}{found[view] / base[view]:>7.2f}" for view in (*VIEWS, "both"))
        wall = f"{found['wall']:>16,.0f}" if gives == "float" else ""
        print(f"  {name:<20}{gives:<7}{workers:>7}{cells}{wall}")
    print("  mean |difference| of the cluster views from the published ones, of 255: ", end="")
    print(", ".join(f"{name} {value:.3f}" for name, value in difference.items()), flush=True)


def print_targets(tables: dict[str, dict[Row, Rates]]) -> None:
    """Print the ratios to the published pipeline over both views, the least over all numbers of workers, and targets."""
    print(f"\n{'targets, both views, the least over all workers':<54}{'target':>8}{'uint8':>8}{'float':>8}")
    for about, table in tables.items():
        for name, target in (("ours, uncached", 2), ("ours, in memory", 20 if about.startswith("small") else 10)):
            reached = {
                gives: min(r["both"] / baseline(table, row)["both"] for row, r in table.items() if row[:2] == (name, gives))
                for gives in ("uint8", "float")
            }
            print(f"{about + ', ' + name:<54}{target:>8}" + "".join(f"{ratio:>8.2f}" for ratio in reached.values()))


def facts(folder: Path) -> str:
    """Return the median sides and mean size of the files in words."""
    paths = sorted(folder.glob("*/*"))
    sides = []
    for path in paths:
        with Image.open(path) as image:
            sides.append(image.size)
    width, height = np.median(sides, axis=0)
    return f"{width:.0f} x {height:.0f} pixels, {statistics.mean(path.stat().st_size for path in paths) / 1000:.1f} kB"


def copied(data: Path, limit: int, to: Path, *, cache: Path) -> Path:
    """Copy evenly spread images of a folder or of tar files to class folders in `to`."""
    source = open_source(data, limit, cache=cache)
    for index in range(len(source)):
        encoded, name = source.read(index), PurePosixPath(source.name(index).rpartition("::")[2])
        if not isinstance(encoded, bytes):
            raise SystemExit(f"{data} holds no image files; give a folder or tar of image files")
        path = to / (name.parent.name or "all") / f"{index:06}{name.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    return to


def scaled(folder: Path, to: Path, size: tuple[int, int]) -> Path:
    """Write the images of `folder` as JPEGs of width and height `size`, bicubic."""
    for path in folder.glob("*/*"):
        there = to / path.parent.name / f"{path.stem}.jpg"
        there.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(there, quality=QUALITY)
    return to


def sets(options: argparse.Namespace, folder: Path) -> list[Photos]:
    """Return the three sets of files, written to `folder`."""
    plain = copied(options.data, options.images, folder / "plain", cache=folder)
    large = scaled(plain, folder / "large", LARGE)
    if options.small is not None:
        small, origin = copied(options.small, options.images, folder / "small", cache=folder), "as they are"
    else:
        small, origin = scaled(plain, folder / "small", (SMALL, SMALL)), f"scaled to {SMALL} px"
    return [
        Photos(large, 224, f"large, photos scaled to {LARGE[0]} x {LARGE[1]}"),
        Photos(plain, 224, "photos as they are"),
        Photos(small, SMALL, f"small, {origin}"),
    ]


def main() -> None:
    """Write the files, measure, print, and delete them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photos, or a tar of them")
    parser.add_argument("--small", type=Path, help="a folder of images of 32 px, or a tar of them")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--folder", type=Path, help="an existing folder for temporary files")
    parser.add_argument("--quick", action="store_true", help="100 images, 2 rounds: only check that it runs")
    options = parser.parse_args()
    if options.quick:
        options.images, options.rounds = 100, 2
    torch.set_num_threads(1)  # threads that wait for each other would count as work
    print(
        f"{options.images:,} images, {options.rounds} rounds, batch {BATCH}, torch {torch.__version__}, "
        f"Pillow {version('pillow')}"
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        found = sets(options, folder)
        tables = {photos.about: compare(photos, options.workers, options.rounds, folder / "cache") for photos in found}
    print_targets(tables)


if __name__ == "__main__":
    main()
