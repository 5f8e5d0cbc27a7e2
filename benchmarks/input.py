"""Images per second of wall time of this package's input, by the number of worker processes, beside torch's DataLoader.

    python benchmarks/input.py --data photos/train [--small cifar10-train.tar.gz] [--workers 0,1,2] [--images 1000] [--quick]

Prints a table for each of three sets of JPEG files: 32 px (`--small`, or the photos of `--data` scaled down), the photos as
they are with views of 224 px, and the photos scaled to 500 x 375. Rows are

- ours: all files decoded for the cluster view (a feature pass without a pack), the pack filled, and cluster and training
  views of images in the pack; uint8, which a run converts to floats on its device;
- DataLoader: ImageFolder with the published transforms of the two views; normalised float32;
- simplejpeg: the same files decoded in one process, without reading them and without a view.

Columns are numbers of processes; 0 is the calling process, with one thread. For the largest number: cores in use
(CPU-seconds of all processes / seconds), the rate relative to 0 processes and to the DataLoader, and by how many seconds
the first pass took longer, which starts the processes and is not counted. Rates are medians of rounds in which the rows take
turns; a pass has at least four batches for each process. Linux only; about 4 minutes on 2 idle cores.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from deepcluster.core.shared_memory import SharedFile
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Loader
from deepcluster.data.pack import Pack
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.views import ClusterView, TrainingView
from deepcluster.models.statistics import IMAGENET_MEAN, IMAGENET_STD

BATCH = 256
VIEWS = ("cluster view", "training view")
LARGE, SMALL = (500, 375), 32
QUALITY = 90
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Photos:
    """A set of JPEG files in class folders, the side of their views, and the images per batch."""

    folder: Path
    view_size: int
    about: str
    batch: int = BATCH


@dataclass
class Row:
    """A way to read images, with one number of processes.

    Attributes:
        make_pass: makes pass number n; returns the number of images.
        prepare: called before each pass, and not timed.
        seconds, cpu_seconds: cost of each pass; the first one starts the processes.
    """

    name: str
    workers: int
    make_pass: Callable[[int], int]
    prepare: Callable[[], None] = lambda: None
    n_images: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def measure(self, number: int) -> None:
        """Make a pass, and note what it costs."""
        self.prepare()
        started, cpu_started = time.perf_counter(), cpu_seconds()
        self.n_images = self.make_pass(number)
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(cpu_seconds() - cpu_started)

    @property
    def rate(self) -> float:
        """Images per second, of all passes but the first."""
        return self.n_images / statistics.median(self.seconds[1:])

    @property
    def cores(self) -> float:
        """Cores in use."""
        pairs = zip(self.cpu_seconds[1:], self.seconds[1:], strict=True)
        return statistics.median(cpu / wall for cpu, wall in pairs)

    @property
    def start_seconds(self) -> float:
        """Seconds by which the first pass took longer."""
        return max(0.0, self.seconds[0] - statistics.median(self.seconds[1:]))


def cpu_seconds() -> float:
    """Return the CPU-seconds of this process and of its children, ended and living."""
    total = time.process_time() + sum(os.times()[2:4])
    for child in multiprocessing.active_children():
        with suppress(OSError):
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def order(count: int, least: int, view: str, number: int) -> Tensor:
    """Return the images of a pass, some repeatedly: in their own order for the cluster view, else in a random one."""
    images_N = torch.arange(max(count, least)) % count
    if view == "cluster view":
        return images_N
    return images_N[torch.randperm(len(images_N), generator=torch.Generator().manual_seed(number))]


def published_transform(view: str, size: int) -> transforms.Compose:
    """Return the 2018 release's transform of a Pillow image."""
    shape = {
        "cluster view": [transforms.Resize(ClusterView(size).resized), transforms.CenterCrop(size)],
        "training view": [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()],
    }
    return transforms.Compose([*shape[view], transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def published(photos: Photos, workers: int, view: str) -> Row:
    """Return the row of ImageFolder and DataLoader."""
    images = ImageFolder(str(photos.folder), published_transform(view, photos.view_size))
    indices: list[int] = []
    processes: dict[str, Any] = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(images, photos.batch, sampler=indices, num_workers=workers, **processes)

    def make_pass(number: int) -> int:
        indices[:] = order(len(images), 4 * workers * photos.batch, view, number).tolist()
        return sum(len(images_BCHW) for images_BCHW, _ in loader)

    return Row(f"DataLoader, {view}", workers, make_pass)


def views_of(name: str, loader: Loader, photos: Photos, view: str) -> Row:
    """Return the row of a view by our loader."""

    def make_pass(number: int) -> int:
        order_N = order(len(loader.images), 4 * loader.workers * photos.batch, view, number)
        if view == "cluster view":
            batches = loader.cluster_views(ClusterView(photos.view_size), order_N, photos.batch)
        else:
            training = TrainingView(photos.view_size)
            batches = loader.training_views(training, order_N, photos.batch, seed=0, epoch=number)
        return sum(len(batch.images_BCHW) for batch in batches)

    return Row(f"{name}, {view}", loader.workers, make_pass)


def filling(source: ImageSource, workers: int, stack: ExitStack) -> Row:
    """Return the row of a pack that is filled; for each pass it is emptied, and the files are marked as changed."""
    pack = Pack(SharedFile(), len(source))
    empty_bytes = pack.path.stat().st_size
    loader = stack.enter_context(closing(Loader(DecodedImages(source, pack=pack), workers=workers)))
    paths = [path for path in map(source.path, range(len(source))) if path is not None]

    def empty() -> None:
        os.truncate(pack.path, empty_bytes)
        for path in paths:
            os.utime(path)

    def make_pass(number: int) -> int:
        loader.fill(lambda _: None)
        return len(source)

    return Row("the pack filled", workers, make_pass, empty)


def ours(photos: Photos, workers: Iterable[int], stack: ExitStack) -> list[Row]:
    """Return the rows of our loader."""
    source = open_source(photos.folder)
    kept = DecodedImages(source, pack=Pack(SharedFile(), len(source)))
    with closing(Loader(kept, workers=os.cpu_count() or 1)) as loader:
        loader.fill(lambda _: None)
    rows = []
    for count in workers:
        decoding, from_pack = (
            stack.enter_context(closing(Loader(images, workers=count))) for images in (DecodedImages(source), kept)
        )
        rows += [views_of("decoded", decoding, photos, "cluster view"), filling(source, count, stack)]
        rows += [views_of("from the pack", from_pack, photos, view) for view in VIEWS]
    return rows


def bare(photos: Photos) -> Row:
    """Return the row of the bare decoder."""
    files = [path.read_bytes() for path in photos.folder.glob("*/*")]
    return Row("simplejpeg", -1, lambda number: sum(simplejpeg.decode_jpeg(one, "RGB").ndim == 3 for one in files))


def measure(
    photos: Photos, workers: Sequence[int], rounds: int, published_workers: Sequence[int] | None = None
) -> list[Row]:
    """Return the measured rows of a set.

    Args:
        published_workers: those of the DataLoader; the same by default.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # 0 processes are one core.
    with ExitStack() as stack:
        rows = ours(photos, workers, stack)
        for view in VIEWS:
            rows += [
                published(photos, count, view) for count in (workers if published_workers is None else published_workers)
            ]
        rows.append(bare(photos))
        for number in range(rounds + 1):
            for row in rows:
                row.measure(number)
    torch.set_num_threads(threads)
    return rows


def print_table(photos: Photos, rows: Sequence[Row], workers: Sequence[int]) -> None:
    """Print the rates."""
    paths, most = list(photos.folder.glob("*/*")), max(workers)
    mean_bytes = statistics.mean(path.stat().st_size for path in paths)
    print(f"\n{photos.about}: {len(paths):,} files of {mean_bytes / 1000:.1f} kB; views of {photos.view_size} px")
    titles = "".join(f"{f'{count} proc.':>10}" for count in workers)
    print(f"  {'images per second':<30}{titles}{'cores':>8}{'x 0 proc.':>11}{'x DataLoader':>14}{'start s':>9}")
    rate = {(row.name, row.workers): row.rate for row in rows}
    for row in rows:
        if row.workers == most:
            cells = "".join(f"{rate[row.name, count]:>10,.0f}" for count in workers)
            one = f"{row.rate / rate[row.name, 0]:.2f}" if 0 in workers else ""
            other = rate.get(("DataLoader, " + row.name.partition(", ")[2], most))
            against = f"{row.rate / other:.2f}" if other else ""
            print(f"  {row.name:<30}{cells}{row.cores:>8.2f}{one:>11}{against:>14}{row.start_seconds:>9.2f}")
    print(f"  {'simplejpeg, one process':<30}{rows[-1].rate:>10,.0f}", flush=True)


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
    batch = 16 if options.quick else BATCH
    plain = copied(options.data, options.images, folder / "plain", cache=folder)
    large = scaled(plain, folder / "large", LARGE)
    if options.small is not None:
        small, origin = copied(options.small, options.small_images, folder / "small", cache=folder), "as they are"
    else:
        small, origin = scaled(plain, folder / "small", (SMALL, SMALL)), f"photos scaled to {SMALL} px"
    return [
        Photos(small, SMALL, f"small, {origin}", batch),
        Photos(plain, 224, "photos as they are", batch),
        Photos(large, 224, f"large, photos scaled to {LARGE[0]} x {LARGE[1]}", batch),
    ]


def counts(text: str) -> list[int]:
    """Return comma-separated numbers of processes."""
    return sorted({int(part) for part in text.split(",")})


def usual_counts() -> list[int]:
    """Return 0, 1, 2, 4, … and the number of cores."""
    cores = os.cpu_count() or 1
    return sorted({0, cores, *(1 << power for power in range(cores.bit_length()) if 1 << power <= cores)})


def main() -> None:
    """Write the files, measure, print, and delete them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of photos, or a tar of them")
    parser.add_argument("--small", type=Path, help="a folder of images of 32 px, or a tar of them")
    parser.add_argument("--images", type=int, default=1000, help="photos of --data")
    parser.add_argument("--small-images", type=int, default=5000, help="images of --small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--workers", type=counts, default=usual_counts(), help="numbers of processes (default: up to all cores)"
    )
    parser.add_argument("--folder", type=Path, help="an existing folder for temporary files")
    parser.add_argument("--quick", action="store_true", help="150 images, 1 round: only check that it runs")
    options = parser.parse_args()
    if options.quick:
        options.images, options.small_images, options.rounds = 150, 150, 1
    print(f"{options.rounds} rounds, batches of {BATCH}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for photos in sets(options, Path(temporary)):
            print_table(photos, measure(photos, options.workers, options.rounds), options.workers)


if __name__ == "__main__":
    main()
