"""The measurements of gpu.py: each part is a function of a `Job`, and prints its rows as lines of JSON."""

import json
import os
import statistics
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SIDES = {"photos": 224, "small": 32}
WORKERS = (0, 1, 2, 4, 8, 16)
# Images per cluster, as in the paper.
PER_CLUSTER = 128
# Most images that the part `data` copies.
MOST = {"photos": 2000, "small": 50_000}
RANDOM = {"photos": 2000, "small": 8000}
MOMENTS = (60.0, 120.0, 240.0)


@dataclass(frozen=True)
class Job:
    """What a part is given.

    Attributes:
        device: where to measure.
        quick: only check that the part runs.
        folder: for files; the part `data` writes folders of images there.
        data, small: where the photos and the small images are.
        seconds: the time limit.
    """

    device: str
    quick: bool
    folder: str
    data: str = ""
    small: str = ""
    seconds: float = 60.0

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
    import torch
    from kmeans import timed

    timed(work, torch.device(device))
    return statistics.median(timed(work, torch.device(device))[0] for _ in range(repeats))


def peak_GiB(device: str) -> float:
    """Return the most memory of the GPU that was in use since the last call; 0 on a CPU."""
    import torch

    if device == "cpu":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def environment(job: Job) -> None:
    """Describe the machine, and measure its ceilings."""
    import importlib.util
    import platform

    import torch

    from deepcluster.clustering import nearest_triton

    report("python, torch", python=platform.python_version(), torch=torch.__version__, cuda=str(torch.version.cuda))
    report("cores", cores=os.cpu_count(), usable=len(os.sched_getaffinity(0)))
    triton = __import__("triton").__version__ if importlib.util.find_spec("triton") else "none"
    report("triton", version=triton, kernel_runs=nearest_triton.available(torch.device(job.device), 256))
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

    for kind, given in (("photos", job.data), ("small", job.small)):
        to, count = Path(job.folder, kind), 60 if job.quick else MOST[kind] if given else RANDOM[kind]
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
        peak_GiB(job.device)
        for title, epoch in run(folder, settings).items():
            bare = bare or epoch
            values = {step: round(epoch[step], 3) for step in STEPS} | {"peak_GiB": peak_GiB(job.device)}
            if epoch is not bare:
                values |= {
                    "share": total(bare, work) / total(epoch),
                    "share_of_network": total(bare, work) / total(epoch, work),
                }
                values |= {"data_wait": epoch["data_wait_share"], "fill_s": epoch["fill"]}
            report(f"{count:,} images, {title}", images_per_s=count / total(epoch), **values)


def clustering(job: Job) -> None:
    """Measure k-means, the first time in this process and again, beside others; whitening, and neighbours."""
    import torch
    from kmeans import mixture, ours, product_seconds, timed, wrong_labels
    from torch.nn.functional import normalize

    from deepcluster.clustering.kmeans import KMeans
    from deepcluster.clustering.neighbours import nearest_neighbours
    from deepcluster.clustering.whitening import Whitening

    n_rows, n_clusters, iterations = (5000, 50, 2) if job.quick else (1_280_000, 10_000, 20)
    device, threads = torch.device(job.device), torch.get_num_threads()
    points_NP = mixture(n_rows, device=device)
    start_KP = points_NP[torch.randperm(n_rows, generator=torch.Generator().manual_seed(1))[:n_clusters].to(device)]
    name = f"{n_rows:,} x 256, k = {n_clusters:,}"
    peak_GiB(job.device)
    report(f"{name}, 1 iteration, the first time", seconds=timed(lambda: ours(points_NP, start_KP, 1, threads), device)[0])
    report(f"{name}, 1 iteration, again", seconds=timed(lambda: ours(points_NP, start_KP, 1, threads), device)[0])
    seconds, found = timed(lambda: ours(points_NP, start_KP, iterations, threads), device)
    peak, inertia = peak_GiB(job.device), float(found.squared_N.sum(dtype=torch.float64))
    wrong = wrong_labels(points_NP, found.centroids_KP, found.labels_N)
    report(f"{name}, {iterations} iterations", seconds=seconds, peak_GiB=peak, inertia=inertia, wrong_labels=wrong)
    compare_kmeans(points_NP, start_KP, iterations, seconds, inertia)
    for dtype in (torch.bfloat16, torch.float32):
        bare = iterations * product_seconds(n_rows, n_clusters, dtype, device)
        report(f"  bare products of {str(dtype).removeprefix('torch.')}", seconds=bare, share=bare / seconds)

    rows, heads = (500, (10, 10, 10)) if job.quick else (20_000, (150, 150, 150))
    for width in (64, 128):
        rows_NP = normalize(torch.randn(rows, width, device=device))

        def cluster(rows_NP: torch.Tensor = rows_NP) -> None:
            for head, count in enumerate(heads):
                KMeans(count, max_iter=10, spherical=True).cluster(rows_NP, seed=head)

        title = f"three heads of {heads[0]}, {rows:,} rows of {width}, 10 iterations"
        report(title, seconds=seconds_of(cluster, 3, job.device))

    rows, width, components = (500, 64, 16) if job.quick else (50_000, 4096, 256)
    rows_ND = torch.randn(rows, width, device=device)
    peak_GiB(job.device)
    taken = seconds_of(lambda: Whitening(components).fit(rows_ND), 3, job.device)
    peak, product = peak_GiB(job.device), seconds_of(lambda: rows_ND.T @ rows_ND, 3, job.device)
    title = f"whitening learned, {rows:,} x {width:,} to {components}"
    report(title, seconds=taken, product_s=product, share=product / taken, peak_GiB=peak)
    rows_NP = normalize(rows_ND[:, :components].contiguous())
    taken = seconds_of(lambda: nearest_neighbours(rows_NP, rows_NP, k=5, exclude_self=True), 1, job.device)
    product = rows / 500 * seconds_of(lambda: rows_NP[:500] @ rows_NP.T, 3, job.device)
    title = f"5 neighbours of {rows:,} rows of {components}"
    report(title, seconds=taken, product_s=product, share=product / taken, peak_GiB=peak_GiB(job.device))


def compare_kmeans(points_NP: Any, start_KP: Any, iterations: int, seconds: float, inertia: float) -> None:
    """Report other programs' k-means from the same start: a plain loop, flash-kmeans and flashlib.

    Args:
        seconds, inertia: ours.
    """
    import kmeans
    import torch

    def row(title: str, fit: Callable[[int], Any], labels_N: Any = None) -> None:
        peak_GiB(points_NP.device.type)
        taken, centroids_KP = kmeans.timed(lambda: fit(iterations), points_NP.device)
        peak, reached = peak_GiB(points_NP.device.type), kmeans.inertia(points_NP, centroids_KP) / inertia
        wrong = {} if labels_N is None else {"wrong_labels": kmeans.wrong_labels(points_NP, start_KP, labels_N)}
        report(f"  {title}", seconds=taken, times_as_slow=taken / seconds, inertia=reached, **wrong, peak_GiB=peak)

    row("a plain loop in float32", lambda count: kmeans.plain_torch(points_NP, start_KP, count, torch.get_num_threads()))
    for name in kmeans.FLASH:
        there = bool(kmeans.installed(name))
        if not there or not points_NP.is_cuda:
            report(f"  {name}", state="needs a GPU" if there else "not installed")
            continue
        for dtype, products in ((torch.float32, "tf32"), (torch.float16, "float16")):
            points, start = points_NP.to(dtype), start_KP.to(dtype)
            try:
                labels_N, _ = kmeans.flash(name, points, start, 1)  # Compiles, and gives labels of the start.
                fit = partial(lambda *args: kmeans.flash(*args)[1], name, points, start)
                row(f"{name}, products of {products}", fit, labels_N)
            except Exception as fault:  # Another program's.
                report(f"  {name}, {products}: failed", error=f"{type(fault).__name__}: {fault}"[:200])


def minutes(job: Job) -> None:
    """Learn the small images by DeepCluster-v2; k-NN and linear top-1 on a held-out tenth on the way (recipes.py)."""
    from recipes import learn, split

    folders = split(Path(job.folder, "small"), MOST["small"], Path(job.folder, "learned"))
    # Starting and evaluating may take 35 seconds.
    share = min(1.0, max(0.1 * job.seconds, job.seconds - 35) / MOMENTS[-1])
    moments = [0.5, 1.0, 2.0] if job.quick else [share * moment for moment in MOMENTS]

    def tell(title: str, row: dict[str, float]) -> None:
        report(title, **row, peak_GiB=peak_GiB(job.device))

    learn(folders, {"device": job.device, **({"workers": 0, "clusters": (5, 5, 5)} if job.quick else {})}, moments, tell)


def triton(job: Job) -> None:
    """Compare the fused kernel with plain products; on a CPU triton's interpreter runs it."""
    import torch
    from kmeans import timed

    from deepcluster.clustering.nearest_triton import best_two

    rows, clusters, width = (70, 64, 32) if job.quick else (1 << 17, 10_048, 256)
    points_NP, centroids_KP = (torch.randn(count, width, device=job.device).half() for count in (rows, clusters))
    offsets_K = centroids_KP.float().square().sum(1) / 2

    def fused() -> Any:
        return best_two(points_NP, centroids_KP, offsets_K)

    def plain() -> Any:
        scores = [(part.float() @ centroids_KP.float().T - offsets_K).topk(2) for part in points_NP.split(1 << 14)]
        return [torch.cat(parts) for parts in zip(*scores, strict=True)]

    def product() -> None:
        for part in points_NP.split(1 << 14):
            part @ centroids_KP.T

    started, (index_N, second_N) = timed(fused, torch.device(job.device))
    best_N2, indices_N2 = plain()
    error = (second_N - best_N2[:, 1]).abs().max() / best_N2.abs().max()
    same = (index_N == indices_N2[:, 0]).float().mean()
    times = {"fused_ms": fused, "plain_ms": plain, "product_ms": product}
    ms = {title: 1000 * seconds_of(work, 1 if job.quick else 5, job.device) for title, work in times.items()}
    title = f"{rows:,} x {width}, k = {clusters:,}, float16"
    report(title, first_call_s=started, **ms, error=float(error), same_index=float(same))
