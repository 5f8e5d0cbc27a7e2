"""Constants of this machine for the model of scaling.py, each measured in a few seconds.

N images, D features, P components, K clusters.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare_network import BareNetwork
from scaling_links import Link, ring_seconds
from scaling_model import Job, Network
from scaling_seconds import Constants
from torch.multiprocessing.spawn import spawn
from torch.utils.flop_counter import FlopCounterMode

from deepcluster.clustering.assignment import Assignment, draw_uniform
from deepcluster.clustering.eigen import top_eigenvectors
from deepcluster.clustering.kmeans import KMeans, lloyd
from deepcluster.clustering.starts import random_rows
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.core.distributed import ONE_PROCESS
from deepcluster.core.files import save_tensors
from deepcluster.data.decode import decode
from deepcluster.data.sources import open_source
from deepcluster.data.views import Colours, TrainingView, draws
from deepcluster.models.archs import make_trunk
from deepcluster.models.trunk import normalise
from deepcluster.run.folder import save_assignment
from deepcluster.run.settings import Settings

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
WORLDS = (2, 4)


def quickest(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the seconds of the quickest of several repeats; the others were slowed by other programs.

    With one thread these are CPU-seconds, which do not depend on other programs.
    """
    clock = time.perf_counter if torch.cuda.is_available() or torch.get_num_threads() > 1 else time.process_time
    found = []
    for _ in range(repeats):
        started = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(clock() - started)
    return min(found)


def network_facts(arch: str, sides: Sequence[int], *, sobel: bool) -> Network:
    """Return the number of weights, layers and operations of a trunk, counted in a forward pass."""
    flops = {}
    for side in sides:
        trunk = make_trunk(arch, image_size=side, sobel=sobel).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            trunk(torch.zeros(1, 3, side, side))
        flops[side] = float(counter.get_total_flops())
    norms = [module for module in trunk.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    weights = sum(weight.numel() for weight in trunk.parameters() if weight.requires_grad)
    return Network(weights, trunk.dim, len(norms), sum(norm.num_features for norm in norms), flops)


def job_of(settings: Settings, images: int, ranks: int) -> Job:
    """Return the model's description of a run with these settings."""
    method = settings.method
    if method == "deepcluster" and settings.super_clusters:
        method = "deepercluster"
    v2 = method == "deepcluster-v2"
    crops = settings.crop_groups if v2 else ((1, settings.image_size),)
    return Job(
        method=method,
        images=images,
        ranks=ranks,
        network=network_facts(settings.arch, [side for _, side in crops], sobel=settings.sobel),
        clusters=settings.heads,
        crops=crops,
        batch=settings.batch_size,
        components=settings.projection[1] if v2 else settings.pca,
        iterations=settings.kmeans_iterations,
        super_clusters=settings.super_clusters,
        hidden=settings.projection[0],
        look_again=v2 and settings.look_again,
        whitened=min(settings.pca, settings.projection[1]) if v2 and settings.whiten else 0,
        number_bytes=4 if settings.precision == "fp32" else 2,
    )


def measured_constants(data: Path, settings: Settings, machine: Machine, *, cores: int, quick: bool) -> Constants:
    """Measure all constants for the network of the settings; images are assumed to be kept decoded."""
    found = {
        **network_speed(settings, machine),
        **input_speed(data, settings, machine),
        **whitening_speed(machine, 256 if quick else 1024),
        **kmeans_speed(machine, 20_000 if quick else 100_000),
        **label_speed(100_000 if quick else 1_000_000),
        **file_speed(20_000 if quick else 200_000),
    }
    return Constants(cores=cores, kept=1.0, **found)


def network_speed(settings: Settings, machine: Machine) -> dict[str, float]:
    """Return the operations per second of a feature pass and of a training step, head and optimizer included."""
    network, job = BareNetwork(settings, machine), job_of(settings, settings.batch_size, 1)
    network.train_step(settings.batch_size)
    step = quickest(lambda: (network.train_step(settings.batch_size), network.finish()), 5)
    features = quickest(lambda: (network.extract(settings.batch_size), network.finish()), 5)
    flops = settings.batch_size * job.network.flops[job.crops[0][1]]
    return {"training_flops": 3 * job.step_flops / step, "feature_flops": flops / features}


def input_speed(data: Path, settings: Settings, machine: Machine) -> dict[str, float]:
    """Return the seconds per decoded image, per crop and pixel of it on one core, and per pixel of colour augmentation."""
    source = open_source(data, 64)
    encoded = [source.read(index) for index in range(len(source))]
    side = settings.image_size
    reduced = settings.reduce_to or None
    images = [torch.from_numpy(decode(one, shorter_side=reduced).copy()) for one in encoded]
    decoding = quickest(lambda: [decode(one, shorter_side=reduced) for one in encoded])
    if len({one.shape for one in images}) == 1 and max(images[0].shape) <= 64:
        # Small images of one size are kept and cropped together.
        images = torch.stack(images).to(machine.device)  # type: ignore[assignment]
    draws_BR, sides = draws(0, 0, 0, len(images)), (side, 4 * side)
    views = [TrainingView(one, scale=settings.crop_scale) for one in sides]
    cutting = [quickest(lambda view=view: view(images, draws_BR)) / len(images) for view in views]
    pixel_seconds = max(0.0, cutting[1] - cutting[0]) / (sides[1] ** 2 - sides[0] ** 2)
    colours = Colours(settings.jitter, settings.grey, share=settings.jitter_share, blur=settings.blur)
    crops_BCHW = machine.put(views[0](images, draws_BR))
    colouring = quickest(lambda: normalise(colours(crops_BCHW, draws_BR)))
    return {
        "decode_seconds": decoding / len(images),
        "crop_seconds": max(0.0, cutting[0] - side**2 * pixel_seconds),
        "pixel_seconds": pixel_seconds,
        "colour_seconds": colouring / len(images) / side**2,
    }


def whitening_speed(machine: Machine, dim: int) -> dict[str, float]:
    """Return the seconds per row and of the eigenvectors, over D² and D³."""
    device = machine.clustering_device
    rows_ND = torch.randn(max(4096, 2 * dim), dim, device=device)
    whitening = Whitening(min(64, dim))
    adding = quickest(lambda: whitening.update(rows_ND))
    scatter_DD = (rows_ND.T @ rows_ND).double()
    finding = quickest(lambda: top_eigenvectors(scatter_DD, whitening.n_components))
    return {"whiten_seconds": adding / len(rows_ND) / dim**2, "eigen_seconds": finding / dim**3}


def kmeans_speed(machine: Machine, n_points: int) -> dict[str, float]:
    """Return the seconds of an iteration of few points, per row, and per compared pair; and the share of compared pairs."""
    dim, few, some, more = 128, (500, 50), (n_points, 50), (n_points, 200)
    found = {size: _kmeans_seconds(machine, *size, dim) for size in (few, some, more)}
    iteration_seconds = found[few].seconds / found[few].rounds
    # Two equations for two unknowns: seconds per row, and per compared pair.
    rows = [n_points * dim * found[size].rounds for size in (some, more)]
    pairs = [n_points * dim * size[1] * found[size].compared for size in (some, more)]
    taken = [max(0.0, found[size].seconds - found[size].rounds * iteration_seconds) for size in (some, more)]
    (row_seconds, pair_seconds), *_ = np.linalg.lstsq(np.stack([rows, pairs], axis=1), np.array(taken), rcond=None)
    return {
        "iteration_seconds": iteration_seconds,
        "row_seconds": max(0.0, float(row_seconds)),
        "pair_seconds": max(0.0, float(pair_seconds)),
        "compared": (found[more].compared - 1) / (found[more].rounds - 1),
    }


@dataclass(frozen=True)
class _Clustered:
    """Seconds of a clustering, its number of assignments, and the sum of their shares of compared pairs."""

    seconds: float
    rounds: int
    compared: float


def _kmeans_seconds(machine: Machine, n_points: int, n_clusters: int, dim: int) -> _Clustered:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n_clusters, dim, generator=generator)
    points_NP = centres[torch.randint(n_clusters, (n_points,), generator=generator)]
    points_NP = torch.nn.functional.normalize(points_NP + 2 * torch.randn(n_points, dim, generator=generator))
    points_NP = points_NP.to(machine.clustering_device)
    start_KP = random_rows(points_NP, n_clusters, seed=0, ranks=ONE_PROCESS)
    kmeans = KMeans(n_clusters, init=start_KP, max_iter=10, spherical=True)
    taken = quickest(lambda: kmeans.cluster(points_NP))
    compared_history = lloyd(points_NP, start_KP, max_iter=10, spherical=True).compared_history
    return _Clustered(taken, len(compared_history), sum(compared_history))


def label_speed(n_images: int, n_clusters: int = 1000) -> dict[str, float]:
    """Return the seconds per image of a uniform draw, a random order, gathering, and matching with NMI."""
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randint(n_clusters, (n_images,), generator=generator) for _ in range(2))
    after = torch.where(torch.rand(n_images, generator=generator) < 0.7, before, after)
    centroids_KP = torch.zeros(n_clusters, 2)
    one, other = (Assignment(labels_N, torch.zeros(n_images), centroids_KP) for labels_N in (before, after))

    def gather() -> None:
        for rows in (other.labels_N, other.distances_N):
            torch.cat([part.clone() for part in rows.split(n_images // 8)])

    def match() -> None:
        other.nmi(one.labels_N)
        other.matched_to(one)

    return {
        "draw_seconds": quickest(lambda: draw_uniform(before, n_draws=n_images, seed=(0,))) / n_images,
        "order_seconds": quickest(lambda: torch.randperm(n_images, generator=generator)) / n_images,
        "gather_seconds": quickest(gather) / n_images,
        "match_seconds": quickest(match, 2) / n_images,
    }


def file_speed(n_images: int) -> dict[str, float]:
    """Return the seconds per image of a table, and the bytes per second of a checkpoint."""
    assignment = Assignment(torch.zeros(n_images, dtype=torch.int64), torch.zeros(n_images), torch.zeros(2, 2))
    state = {"values": torch.zeros(16_000_000)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        table = quickest(
            lambda: save_assignment(path / "t", [f"train/n01440764/{i:08}.JPEG" for i in range(n_images)], assignment), 2
        )
        started = time.perf_counter()
        save_tensors(path / "s", state)
        disk = time.perf_counter() - started
    return {"table_seconds": table / n_images, "disk_bytes": state["values"].nbytes / disk}


def measured_collectives(sizes: Sequence[int], worlds: Sequence[int]) -> dict[str, dict[int, list[float]]]:
    """Return the seconds of sums and exchanges of these sizes between processes of this machine, by gloo."""
    found: dict[str, dict[int, list[float]]] = {"all_reduce": {}, "all_to_all": {}}
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_collectives, args=(world, folder, tuple(sizes)), nprocs=world)
            times = torch.load(Path(folder, "times.pt"), weights_only=True)
        for name in found:
            found[name][world] = times[name]
    return found


def _collectives(rank: int, world: int, folder: str, sizes: Sequence[int]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    times: dict[str, list[float]] = {"all_reduce": [], "all_to_all": []}
    for n_bytes in sizes:
        value = torch.zeros(n_bytes // 4 // world * world)
        other, repeats = torch.empty_like(value), 30 if n_bytes <= 1_000_000 else 5
        for name, work in (
            ("all_reduce", lambda value=value: dist.all_reduce(value)),
            ("all_to_all", lambda value=value, other=other: dist.all_to_all_single(other, value)),
        ):
            work()
            seconds = []
            for _ in range(repeats):
                dist.barrier()
                started = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - started)
            times[name].append(float(np.median(seconds)))
    if rank == 0:
        torch.save(times, Path(folder, "times.pt"))
    dist.destroy_process_group()


def fitted_link(sizes: Sequence[int], times: Sequence[float], ranks: int) -> tuple[Link, float]:
    """Fit a ring's latency and bandwidth to these times; return the link and the largest relative error.

    Relative errors are minimised, so that messages of all sizes count equally.
    """
    rounds, times_S = 2 * (ranks - 1), np.array(times)
    terms_S2 = np.stack([np.full(len(sizes), float(rounds)), rounds / ranks * np.array(sizes)], axis=1)
    (latency, slowness), *_ = np.linalg.lstsq(terms_S2 / times_S[:, None], np.ones(len(sizes)), rcond=None)
    link = Link(max(1e-7, float(latency)), 1 / max(1e-12, float(slowness)))
    predicted = np.array([ring_seconds(size, ranks, link) for size in sizes])
    return link, float(np.abs(predicted / times_S - 1).max())


def as_json(constants: Constants, links: dict[int, Link], collectives: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """Return the content of the constants file."""
    times = {name: {str(world): seconds for world, seconds in rows.items()} for name, rows in collectives.items()}
    return {
        "constants": asdict(constants),
        "links": {str(world): asdict(link) for world, link in links.items()},
        "collectives": {"bytes": list(islice(SIZES, len(next(iter(times["all_reduce"].values()))))), **times},
    }
