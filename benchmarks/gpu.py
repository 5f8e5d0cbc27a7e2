"""Every GPU measurement of the project in one command of at most 6 minutes, from a source checkout that is not installed.

    python benchmarks/gpu.py [--data PHOTOS] [--small cifar10-train.tar.gz] [--out FOLDER] [--only input,views] [--minutes 6]
    python benchmarks/gpu.py --device cpu --quick

Prints a table with the rows of these parts:

- environment: the machine, and its rates of bf16 products and of copies;
- data: files of `--data` (photos of some 224 px) and `--small` (32 px) that the others read; without these, random JPEGs;
- input: images per second by the number of worker processes (input.py), decoded and from the pack, at 32 and 224 px;
- views: images per second of crops, colours and blur on the device; whether they make the CPU wait for the GPU; the largest
  difference of their pixels from the CPU's, of 255;
- clustering: k-means of 1.28 million rows in 10,000 clusters beside a plain loop and the bare products (kmeans.py);
  DeepCluster-v2's three clusterings of 20,000 rows;
- train: `deepcluster.train` on a small set, two epochs;
- triton: the fused kernel of the nearest centroids beside plain products, by type;
- alexnet, cifar, resnet50: the bare network's seconds as a share of a whole epoch's (epoch.py), with images on the GPU
  and by workers. AlexNet at 224 px; DeepCluster-v2 with ResNet-18 on 2x32 px, batches of 512, and with ResNet-50 on
  2x224 + 6x96 px. The sets are small, so clustering and whitening take more of an epoch than in a long run.

Each part runs in a process of its own with a time limit, and keeps the rows that it has printed when it fails. `--out`
gets the table (gpu.txt), its rows as lines of JSON (gpu.jsonl) and what the parts wrote to stderr (gpu.log). Needs the
packages of pyproject.toml. `--quick` only checks that all parts run: tiny sizes, 2 minutes on 2 CPU cores.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Most seconds of each part, where all have 6 minutes together; those that matter less come last.
LIMITS = {
    "environment": 30,
    "data": 50,
    "input": 75,
    "views": 40,
    "clustering": 50,
    "train": 40,
    "triton": 50,
    "alexnet": 60,
    "cifar": 60,
    "resnet50": 65,
}
SIDES = {"photos": 224, "small": 32}
WORKERS = (0, 1, 2, 4, 8, 16)
# Images per cluster, as in the paper.
PER_CLUSTER = 128


@dataclass(frozen=True)
class Job:
    """What a part is given: where to measure, and the folders of images that the part `data` writes."""

    device: str
    quick: bool
    folder: str
    data: str = ""
    small: str = ""

    def images(self, kind: str, count: int, quick: int = 60) -> Path:
        """Return a folder of `count` images of a kind, "photos" or "small": links to the files that are there."""
        count = quick if self.quick else count
        to, paths = Path(self.folder, f"{kind}-{count}"), sorted(Path(self.folder, kind).glob("*/*"))
        for number in range(0 if to.exists() else count):
            path = paths[number % len(paths) if count > len(paths) else number * len(paths) // count]
            link = to / path.parent.name / f"{number:06}{path.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(path)
        return to


def report(what: str, **values: Any) -> None:
    """Print a row of the table as a line of JSON."""
    print(json.dumps({"what": what, **values}), flush=True)


def seconds_of(work: Callable[[], Any], repeats: int, device: str) -> float:
    """Return the median seconds of some work, after a first time."""
    import statistics

    import torch
    from kmeans import timed

    timed(work, torch.device(device))
    return statistics.median(timed(work, torch.device(device))[0] for _ in range(repeats))


def environment(job: Job) -> None:
    """Describe the machine, and measure its ceilings."""
    import importlib.util
    import platform

    import torch

    from deepcluster.clustering import nearest_triton

    report("python, torch", python=platform.python_version(), torch=torch.__version__, cuda=str(torch.version.cuda))
    report("cores", cores=os.cpu_count(), usable=len(os.sched_getaffinity(0)))
    triton = __import__("triton").__version__ if importlib.util.find_spec("triton") else "none"
    report("triton", version=triton, kernel_runs=nearest_triton.available(job.device))
    if job.device != "cpu":
        facts = torch.cuda.get_device_properties(job.device)
        report("GPU", name=facts.name, GiB=facts.total_memory / 2**30, sm=f"{facts.major}.{facts.minor}")
    side, n_bytes = (256, 1 << 20) if job.quick else (8192, 1 << 32)
    one, other = (torch.randn(side, side, device=job.device, dtype=torch.bfloat16) for _ in range(2))
    report("bf16 product", TFLOP_per_s=2 * side**3 / 1e12 / seconds_of(lambda: one @ other, 10, job.device))
    block = torch.ones(n_bytes, dtype=torch.uint8, device=job.device)
    report("copy, read and written", GB_per_s=2 * n_bytes / 1e9 / seconds_of(block.clone, 10, job.device))


def data(job: Job) -> None:
    """Write the folders of images."""
    from input import copied

    for kind, given, most in (("photos", job.data, 2000), ("small", job.small, 8000)):
        to, count = Path(job.folder, kind), 60 if job.quick else most
        if given:
            copied(Path(given), count, to, cache=Path(job.folder, "cache"))
        else:
            make_images(to, count, SIDES[kind])
        paths = list(to.glob("*/*"))
        kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1000
        report(kind, files=len(paths), kB=kilobytes, origin=Path(given).name if given else "random")


def make_images(to: Path, count: int, side: int) -> None:
    """Write random JPEGs of about the size of photos: coarse noise, made smooth."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for number in range(count):
        path = to / f"class{number % 4}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_HWC = draw.integers(0, 256, (max(4, side // 6), max(4, side // 6), 3), dtype=np.uint8)
        Image.fromarray(noise_HWC).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def input_rates(job: Job) -> None:
    """Measure the input by the number of processes; the DataLoader only with the most."""
    from input import Photos, measure

    workers = [0, 2] if job.quick else [count for count in WORKERS if count <= (os.cpu_count() or 1)]
    for kind, count in (("small", 8000), ("photos", 2000)):
        photos = Photos(job.images(kind, count, 160), SIDES[kind], kind, 16 if job.quick else 256)
        rows = measure(photos, workers, 1 if job.quick else 2, workers[-1:])
        for name in dict.fromkeys(row.name for row in rows):
            same = [row for row in rows if row.name == name]
            by_workers = {f"{max(0, row.workers)} proc.": row.rate for row in same}
            report(f"{SIDES[kind]} px, {name}, images/s", **by_workers, cores=same[-1].cores, start_s=same[-1].start_seconds)


def views(job: Job) -> None:
    """Measure and check the views of images that are on the device."""
    import numpy as np
    import torch

    from deepcluster.data.decode import decode
    from deepcluster.data.multi_crop import MultiCropView, crop_draws
    from deepcluster.data.resample import Ragged, resize
    from deepcluster.data.views import ClusterView, Colours, TrainingView
    from deepcluster.models.trunk import normalise

    def ragged(kind: str, count: int, device: str) -> Ragged:
        paths = sorted(job.images(kind, count, 16).glob("*/*"))
        images = [torch.from_numpy(decode(path.read_bytes()).copy()) for path in paths]
        if kind == "photos":  # Every other one has the shape of ImageNet's.
            images[::2] = [resize(image_HWC, (375, 500)).permute(1, 2, 0) for image_HWC in images[::2]]
        sizes_B2 = np.array([image_HWC.shape[:2] for image_HWC in images])
        starts_B = np.cumsum(sizes_B2.prod(1)) - sizes_B2.prod(1)
        return Ragged(torch.cat([image_HWC.reshape(-1, 3) for image_HWC in images]).to(device), starts_B, sizes_B2)

    colours, multi = Colours(1.0, 0.2, share=0.8, blur=0.5), MultiCropView(((2, 224), (6, 96)), ((0.14, 1.0), (0.05, 0.14)))
    cases = [
        ("cluster view, 224 px", "photos", ClusterView(224), 1),
        ("training view, 224 px", "photos", TrainingView(224), 1),
        ("2x224 + 6x96 px", "photos", multi, 8),
        ("2x32 px", "small", MultiCropView(((2, 32),), ((0.2, 1.0),)), 2),
    ]
    for name, kind, view, n_views in cases:
        count = 256 if kind == "photos" else 512
        images, draws_BVR = ragged(kind, count, job.device), crop_draws(0, 0, 0, 16 if job.quick else count, n_views)

        def cut(images: Ragged = images, view: Any = view, draws: Any = draws_BVR) -> tuple[torch.Tensor, ...]:
            found = view(images, draws if isinstance(view, MultiCropView) else draws[:, 0])
            return found if isinstance(found, tuple) else (found,)

        def step(cut: Callable[[], Any] = cut, draws: Any = draws_BVR) -> None:
            first = 0
            for crops in cut():
                last = first + len(crops) // len(draws)
                normalise(colours(crops, draws[:, first:last].swapaxes(0, 1).reshape(len(crops), -1)))
                first = last

        rates = {what: len(images) / seconds_of(work, 10, job.device) for what, work in (("crops", cut), ("all", step))}
        some = np.arange(min(32, len(images)))
        found = [cut(ragged(kind, count, device).take(some), draws=draws_BVR[: len(some)]) for device in (job.device, "cpu")]
        differences = [(one.cpu().int() - other.int()).abs() for one, other in zip(*found, strict=True)]
        report(
            f"{name}, images/s",
            **{"crops": rates["crops"], "and colours, blur": rates["all"]},
            waits="-" if job.device == "cpu" else waits(step),
            largest_difference=max(int(one.max()) for one in differences),
            unequal=float(np.mean([float((one > 0).float().mean()) for one in differences])),
        )


def waits(work: Callable[[], Any]) -> str:
    """Return "no", or what makes the CPU wait for the GPU."""
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as fault:
        frame = traceback.extract_tb(fault.__traceback__)[-1]
        return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}: {fault}".splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def epoch_settings(name: str, job: Job) -> tuple[Any, int]:
    """Return the settings of a whole epoch, and its number of images."""
    from deepcluster.core.device import Machine
    from deepcluster.run.recipes import RECIPES
    from deepcluster.run.settings import Settings

    published = {"look_again": False, "whiten": False}
    small = {**RECIPES["v2-small-images"].settings, **published, "arch": "resnet18-small", "batch_size": 512, "lr": 0.1}
    large = {**RECIPES["v2-resnet50"].settings, **published, "batch_size": 256}
    count, values = {"alexnet": (24_000, {"batch_size": 256}), "cifar": (40_000, small), "resnet50": (3_000, large)}[name]
    if job.quick:
        count, pca = 140, {"pca": 16} if name == "alexnet" else {}
        crops = "2x32,2x16" if name == "resnet50" else ""
        values = {**values, **pca, "arch": "alexnet-small", "image_size": 32, "crops": crops, "batch_size": 32}
    clusters = max(2, count // PER_CLUSTER)
    values |= {"clusters": clusters if name == "alexnet" else (clusters,) * 3, "workers": 2 if job.quick else os.cpu_count()}
    values |= {"device": job.device, "precision": Machine.choose(job.device, "auto").precision}
    return Settings.from_dict({"recipe": "paper-alexnet", **values}), count


def whole_epochs(name: str, job: Job) -> None:
    """Compare a whole epoch with the bare network."""
    import gc

    import torch
    from epoch import bare_epoch, our_epochs, total

    from deepcluster.training.loop import STEPS

    settings, count = epoch_settings(name, job)
    folder, work = job.images("small" if name == "cifar" else "photos", count, count), ("features", "training")
    bare: dict[str, float] = {}
    runs: list[Callable[..., Any]] = [bare_epoch, our_epochs]
    if job.device != "cpu":
        runs.append(partial(our_epochs, on_gpu=False))
    for run in runs:
        gc.collect()
        if job.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for title, epoch in run(folder, settings).items():
            bare = bare or epoch
            peak = torch.cuda.max_memory_allocated() / 2**30 if job.device != "cpu" else 0.0
            values = {step: round(epoch[step], 3) for step in STEPS} | {"peak_GiB": peak}
            if epoch is not bare:
                values |= {
                    "share": total(bare, work) / total(epoch),
                    "share_of_network": total(bare, work) / total(epoch, work),
                }
                values |= {"data_wait": epoch["data_wait_share"], "fill_s": epoch["fill"]}
            report(f"{count:,} images, {title}", images_per_s=count / total(epoch), **values)


def clustering(job: Job) -> None:
    """Measure k-means, the first time in this process and again, beside others."""
    import torch
    from kmeans import mixture, ours, plain_torch, product_seconds, timed
    from torch.nn.functional import normalize

    from deepcluster.clustering.kmeans import KMeans

    n_rows, n_clusters, iterations = (5000, 50, 2) if job.quick else (1_280_000, 10_000, 20)
    device, threads = torch.device(job.device), torch.get_num_threads()
    points_NP = mixture(n_rows, device=device)
    start_KP = points_NP[torch.randperm(n_rows, generator=torch.Generator().manual_seed(1))[:n_clusters].to(device)]
    name = f"{n_rows:,} x 256, k = {n_clusters:,}"
    report(f"{name}, 1 iteration, the first time", seconds=timed(lambda: ours(points_NP, start_KP, 1, threads), device)[0])
    report(f"{name}, 1 iteration, again", seconds=timed(lambda: ours(points_NP, start_KP, 1, threads), device)[0])
    seconds, found = timed(lambda: ours(points_NP, start_KP, iterations, threads), device)
    report(f"{name}, {iterations} iterations", seconds=seconds, inertia=float(found.squared_N.sum(dtype=torch.float64)))
    slow, _ = timed(lambda: plain_torch(points_NP, start_KP, iterations, threads), device)
    report("  a plain loop in float32", seconds=slow, times_as_slow=slow / seconds)
    for dtype in (torch.bfloat16, torch.float32):
        bare = iterations * product_seconds(n_rows, n_clusters, dtype, device)
        report(f"  bare products of {str(dtype).removeprefix('torch.')}", seconds=bare, share=bare / seconds)
    rows, heads = (500, (10, 10, 10)) if job.quick else (20_000, (150, 150, 150))
    rows_NP = normalize(torch.randn(rows, 128, device=device))

    def cluster() -> None:
        for head, count in enumerate(heads):
            KMeans(count, iterations=10, spherical=True).fit(rows_NP, seed=head)

    report(f"three heads of {heads[0]}, {rows:,} rows of 128", seconds=seconds_of(cluster, 3, job.device))


def train(job: Job) -> None:
    """Train two epochs by the API, as a user does."""
    import deepcluster
    from deepcluster.core.progress import Reporter

    options: dict[str, Any] = {"recipe": "small-images", "epochs": 2, "device": job.device, "workers": 2}
    options |= {"clusters": 5, "pca": 16} if job.quick else {}
    started = time.perf_counter()
    run = deepcluster.train(
        job.images("small", 5000, 140), out=Path(job.folder, "run"), reporter=Reporter(quiet=True), **options
    )
    report("two epochs and the final clusters", seconds=time.perf_counter() - started)
    for line in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        peak = line["peak_memory_bytes"] / 2**30
        report(f"epoch {line['epoch']}", **line["seconds"], loss=line["loss"], clusters=line["clusters"], peak_GiB=peak)


def triton(job: Job) -> None:
    """Compare the fused kernel with plain products, by type; on a CPU triton's interpreter runs it."""
    import torch

    from deepcluster.clustering.nearest_triton import best_two

    rows, clusters, width = (70, 40, 32) if job.quick else (1 << 16, 10_000, 256)
    points_NP, centroids_KP = (torch.randn(count, width, device=job.device) for count in (rows, clusters))
    kinds = [torch.float32, torch.float16, torch.int8]
    if job.device != "cpu":  # The interpreter does not multiply bfloat16.
        kinds.append(torch.bfloat16)
    for kind in kinds:
        scaled = [40 * one if kind == torch.int8 else one for one in (points_NP, centroids_KP)]
        points, centroids = (one.round().clamp(-127, 127).to(kind) if kind == torch.int8 else one.to(kind) for one in scaled)
        offsets_K = centroids.float().square().sum(1) / 2

        def plain(points: Any = points, centroids: Any = centroids, offsets_K: Any = offsets_K) -> Any:
            return [(part.float() @ centroids.float().T - offsets_K).topk(2) for part in points.split(1 << 14)]

        def product(points: Any = points, centroids: Any = centroids) -> None:
            for part in points.split(1 << 14):
                torch._int_mm(part, centroids.T) if part.dtype == torch.int8 else part @ centroids.T

        def fused(points: Any = points, centroids: Any = centroids, offsets_K: Any = offsets_K) -> Any:
            return best_two(points, centroids, offsets_K)

        name = str(kind).removeprefix("torch.")
        try:
            best_N, index_N, second_N = fused()
            first, again = (torch.cat([getattr(one, part) for one in plain()]) for part in ("values", "indices"))
            error = (torch.stack([best_N, second_N], 1) - first).abs().max() / first.abs().max()
            same = (index_N == again[:, 0]).float().mean()
            times = {"fused_ms": fused, "plain_ms": plain, "product_ms": product}
            ms = {title: 1000 * seconds_of(work, 1 if job.quick else 5, job.device) for title, work in times.items()}
            report(f"{rows:,} x {width}, k = {clusters:,}, {name}", **ms, error=float(error), same_index=float(same))
        except Exception as fault:  # One type may not compile.
            report(f"{name}: failed", error=f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}")


PARTS: dict[str, Callable[[Job], None]] = {
    "environment": environment,
    "data": data,
    "input": input_rates,
    "views": views,
    "clustering": clustering,
    "train": train,
    "triton": triton,
    **{name: partial(whole_epochs, name) for name in ("alexnet", "cifar", "resnet50")},
}


def run_apart(part: str, job: Job, limit: float, log: Path) -> Iterator[dict[str, Any]]:
    """Run a part in a process of its own; yield its rows, and one that says how it failed, if it did."""
    env = {**os.environ, "DEEPCLUSTER_CACHE": str(Path(job.folder, "cache"))}
    env |= {"TRITON_INTERPRET": "1"} if part == "triton" and job.device == "cpu" else {}
    command = [sys.executable, __file__, "--part", part, json.dumps(asdict(job))]
    rows = Path(job.folder, f"{part}.jsonl")
    before = log.stat().st_size
    with log.open("a", encoding="utf-8") as errors, rows.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=env, start_new_session=True)
        try:
            code = process.wait(limit)
            fault = f"ended with status {code}" if code else ""
        except subprocess.TimeoutExpired:
            fault = f"stopped after its {limit:.0f} seconds"
        finally:  # Its own processes end with it.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    yield from (json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines() if line.startswith('{"what"'))
    if fault:
        said = log.read_bytes()[before:].decode("utf-8", "replace").strip().splitlines()
        yield {"what": "FAILED", "why": fault, "last_line": said[-1][:200] if said else ""}


def line_of(part: str, row: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = []
    for name, value in row.items():
        if name != "what":
            is_large = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= 1000
            text = f"{value:,.0f}" if is_large else f"{value:.3g}" if isinstance(value, float) else str(value)
            cells.append(f"{name.replace('_', ' ')} {text}")
    return f"{part:<12}{row['what']:<50} {'; '.join(cells)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print the table; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of photos of some 224 px, or a tar of them")
    parser.add_argument("--small", type=Path, help="a folder of images of 32 px, or a tar of them")
    parser.add_argument("--out", type=Path, help="folder for gpu.txt, gpu.jsonl and gpu.log")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help="only these parts, and data")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all parts; limits of single parts are shares of it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only check that all parts run")
    options = parser.parse_args(arguments)
    started, n_failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary, "out")
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.log").write_text("", encoding="utf-8")
        given = [str(path.resolve()) if path else "" for path in (options.data, options.small)]
        job = Job(options.device, options.quick, temporary, *given)
        with (
            (out / "gpu.txt").open("w", encoding="utf-8") as table,
            (out / "gpu.jsonl").open("w", encoding="utf-8") as lines,
        ):
            for part in (name for name in PARTS if name in options.only or name == "data"):
                begun = time.monotonic()
                left = 60 * options.minutes - (begun - started)
                rows = list(run_apart(part, job, min(LIMITS[part] * options.minutes / 6, max(1.0, left)), out / "gpu.log"))
                n_failed += any(row["what"] == "FAILED" for row in rows)
                rows.append({"what": "(whole part)", "seconds": round(time.monotonic() - begun, 1)})
                for row in rows:
                    for file, line in ((lines, json.dumps({"part": part, **row})), (table, line_of(part, row))):
                        print(line, file=file, flush=True)
                    print(line_of(part, row), flush=True)
    return n_failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))
        PARTS[sys.argv[2]](Job(**json.loads(sys.argv[3])))
    else:
        sys.exit(main())
