"""`train --dry-run` and `--minutes`: what a run will take, from a short trial of its own steps. Nothing is written.

N images, M images or points of the trial, K clusters, P components.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering import clusterer
from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import free_disk_bytes, free_memory_bytes
from deepcluster.core.errors import InputError
from deepcluster.core.seeds import seed_of
from deepcluster.core.text import count_of, duration, size
from deepcluster.data.survey import even_sample
from deepcluster.run.features import FEATURE_BATCH, centre_view, feature_batches
from deepcluster.run.recipes import Change
from deepcluster.run.settings import V2
from deepcluster.training import deepcluster_v2
from deepcluster.training.batches import even_batches, training_batches
from deepcluster.training.fitting import fit_whitening, learns_from_images
from deepcluster.training.loop import Loop, peak_memory_bytes
from deepcluster.training.method import Method, Step
from deepcluster.training.optim import learning_factor
from deepcluster.training.plan import Plan

# A part of the trial ends after so many steps, or after the first one that ends beyond so many seconds.
STEPS, SECONDS = 4, 4.0
# Images that the trial reads.
TRIED = 4 * FEATURE_BATCH
# Images of a batch of features on a processor, and operations of the clustering that is measured.
CPU_BATCH, OPERATIONS = 64, 2e10
# Bytes of a row of a table of assignments, beside a half of the characters of its name.
TABLE_ROW = 8


@dataclass(frozen=True)
class Costs:
    """Seconds of an epoch by step, of reading all images once, of what follows the last epoch, and bytes of a checkpoint."""

    steps: Mapping[str, float]
    reading: float
    final: float
    checkpoint_bytes: int

    @property
    def epoch(self) -> float:
        """Seconds of an epoch."""
        return sum(self.steps.values())

    def fitted(self, minutes: float) -> Change:
        """Return the number of epochs that fit into a time, at least one."""
        epochs = max(1, int((60 * minutes - self.final) / max(self.epoch, 1e-9)))
        return Change("epochs", epochs, f"--minutes {minutes:g}, and an epoch takes about {duration(self.epoch)}")


def say_dry_run(plan: Plan, loop: Loop) -> None:
    """Print the size of the networks, and an estimate of the time, memory and disk that the run takes."""
    say, settings, n_images = plan.work.reporter.say, plan.settings, len(plan.source)
    costs = measure(plan, loop)
    if settings.minutes:
        chosen = costs.fitted(settings.minutes)
        settings = replace(settings, epochs=chosen.value)
        say(f"  {chosen}: {chosen.reason}")
    networks = [sum(w.numel() for w in one.parameters() if w.requires_grad) for one in loop.method.networks]
    head = "projection" if settings.method == V2 else "head"
    say(f"network: {sum(networks):,} parameters: trunk {networks[0]:,}, {head} {sum(networks[1:]):,}")
    say(_memory(plan))
    tables = (settings.epochs + 1) * sum(TABLE_ROW + len(plan.source.name(i)) / 2 for i in even_sample(range(n_images), 500))
    tables *= n_images / min(n_images, 500)
    kept = 2 + learns_from_images(plan.trunk)
    kept += settings.epochs // settings.checkpoint_every if settings.checkpoint_every else 0
    needed, room = kept * costs.checkpoint_bytes + tables, free_disk_bytes(plan.folder.path)
    say(
        f"disk: about {size(needed)} in {plan.folder.path}, with {size(room)} free: {count_of(kept, 'checkpoint')} of "
        f"{size(costs.checkpoint_bytes)}, and {size(tables)} of tables"
    )
    if needed > room:
        plan.work.reporter.warn("the disk has no room for that: make room, or keep fewer checkpoints (--checkpoint-every 0)")
    left = settings.epochs - loop.epoch + 1
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in costs.steps.items())
    whole = duration(costs.reading + left * costs.epoch + costs.final)
    say(
        f"time, estimated from a few steps: about {duration(costs.epoch)} per epoch ({parts}); about {whole} for "
        f"{count_of(left, 'epoch')}, with {duration(costs.reading)} to read the images once"
    )
    say("dry run: nothing was written; without --dry-run this trains")


def fit_to_minutes(plan: Plan, loop: Loop) -> Plan:
    """Return the plan with as many epochs as fit into `--minutes`; the trial leaves its weights as they are.

    Raises:
        InputError: there are several processes.
    """
    minutes = plan.settings.minutes
    if plan.work.ranks.size > 1:
        raise InputError(
            f"--minutes {minutes:g} measures one process: with several, give --epochs (--dry-run estimates the time)"
        )
    weights = deepcopy(plan.trunk.state_dict())
    chosen = measure(plan, loop).fitted(minutes)
    plan.trunk.load_state_dict(weights)
    changes = [change for change in plan.changes if change.option != "epochs"]
    return replace(plan, settings=replace(plan.settings, epochs=chosen.value, minutes=0.0), changes=[*changes, chosen])


def _memory(plan: Plan) -> str:
    """Return the memory that the trial took, and that a run takes with the images and features that it keeps."""
    peak, device, cache = peak_memory_bytes(), plan.machine.device, plan.cache
    if device.type == "cuda":
        return f"memory of the GPU: {size(peak)} in the trial, {size(torch.cuda.mem_get_info(device)[0])} free"
    kept = min(cache.needed_bytes, cache.memory_bytes) * max(0.0, 1 - TRIED / len(plan.source))
    memory = plan.memory() if plan.settings.method != V2 else None
    kept += memory.features_bytes if memory and memory.folder is None else 0
    return f"memory of this process: about {size(peak + kept)}, with {size(free_memory_bytes())} free"


def measure(plan: Plan, loop: Loop) -> Costs:
    """Run the trial. The weights change; the state of the run on disk does not."""
    settings, method, n_images = plan.settings, loop.method, len(plan.source)
    images = torch.tensor([i for i in even_sample(range(n_images), TRIED) if i not in plan.loader.unreadable])
    reading, features, whitening = _features(plan, images)
    method.make_labels(*_labels(method, n_images))
    batch = min(settings.batch_size, len(images), max(2, int(SECONDS / max(3 * features, 1e-9))))
    training = _training(plan, method, images, batch)
    clustering = sum(_clustering(plan, clusters) for clusters in settings.heads)
    started = time.perf_counter()
    fit_whitening(plan.trunk, plan.loader, plan.machine, settings, plan.work)
    final = time.perf_counter() - started + (features + whitening) * n_images + clustering
    n_bytes = sum(tensor.nbytes for tensor in _tensors(loop.state_dict()))
    is_v2, every = settings.method == V2, settings.reassign_every
    if is_v2 and not settings.look_again:  # Features come from the training steps, whose bank is saved.
        n_bytes += 2 * n_images * settings.crop_groups[0][0] * settings.projection[1]
        features = 0.0
    if is_v2 and not settings.whiten:
        whitening = 0.0
    steps = {
        "features": features * n_images / every,
        "cluster": (whitening * n_images + clustering) / every,
        "train": training * settings.images_per_epoch(n_images),
    }
    return Costs(steps, reading * n_images, final, n_bytes)


def _seconds_each(steps: Iterator[int]) -> float:
    """Return the seconds per image of steps that yield their number of images. The first is to warm up, if it is quick."""
    started, done, seconds = time.perf_counter(), 0, 0.0
    for number, n_images in enumerate(steps):
        now = time.perf_counter()
        if number == 0 and now - started < SECONDS:
            started, first = now, (now - started) / max(1, n_images)
            seconds = first
            continue
        done += n_images
        seconds = (now - started) / max(1, done)
        if number >= STEPS or now - started > SECONDS:
            break
    return seconds


def _features(plan: Plan, images: Tensor) -> tuple[float, float, float]:
    """Return seconds per image to read it for the first time, to extract its features, and to whiten them."""
    settings, machine = plan.settings, plan.machine
    n = CPU_BATCH if machine.device.type == "cpu" else FEATURE_BATCH
    view = centre_view(settings)
    with plan.work.track("reading some images", None) as advance:
        views = plan.loader.cluster_views(view, images, n)
        with closing(views):
            reading = _seconds_each(_counted(views, lambda batch: len(batch.indices_B), advance))
    some = images[: n * (STEPS + 1)]
    stage = "features" if settings.method == V2 else settings.cluster_stage
    rows: list[Tensor] = []

    def keep(batch: tuple[Tensor, Tensor]) -> int:
        rows.append(batch[0].float().cpu())
        return len(batch[1])

    with plan.work.track("extracting some features", None) as advance:
        batches = feature_batches(plan.trunk, plan.loader, machine, stage, view, batch_size=n, indices=some)
        with closing(batches):
            features = _seconds_each(_counted(batches, keep, advance))
    whitening = Whitening(1)
    started, rows_MD = time.perf_counter(), torch.cat(rows).to(machine.clustering_device)
    whitening.update(rows_MD)  # To project them takes as long.
    return reading, features, 2 * (time.perf_counter() - started) / len(rows_MD)


def _counted(batches: Any, n_images: Callable[[Any], int], advance: Callable[[int], None]) -> Iterator[int]:
    for batch in batches:
        done = n_images(batch)
        advance(done)
        yield done


def _labels(method: Method, n_images: int) -> tuple[Any, int]:
    """Return random clusters, as `make_labels` takes them: the head is as large as it will be."""
    settings, generator = method.settings, torch.Generator().manual_seed(seed_of(method.settings.seed, 0))
    width = settings.projection[1] if settings.method == V2 else settings.pca
    assignments = []
    for n_clusters in settings.heads:
        labels_N = torch.randint(n_clusters, (n_images,), generator=generator)
        supers = None
        if settings.super_clusters:
            supers = torch.arange(n_clusters) * settings.super_clusters // n_clusters
        centroids_KP = normalize(torch.randn(n_clusters, width, generator=generator))
        assignments.append(Assignment(labels_N, torch.zeros(n_images), centroids_KP, super_of_cluster_K=supers))
    if settings.method == V2:
        return deepcluster_v2.Clusters(assignments, deepcluster_v2.Points(torch.empty(0))), 1
    return (assignments[0], None), 1


def _training(plan: Plan, method: Method, images: Tensor, batch_size: int) -> float:
    """Return seconds per image of training steps."""
    settings, ranks = plan.settings, plan.work.ranks
    order = images.repeat(-(-batch_size * (STEPS + 1) // len(images)))[: batch_size * (STEPS + 1)]
    batches = even_batches(len(order), batch_size, ranks)
    for network in method.networks:
        network.train()
    with plan.work.track("training some steps", None) as advance:

        def steps() -> Iterator[int]:
            made = training_batches(plan.loader, method.view, order, batches, ranks, seed=settings.seed, epoch=1)
            for number, batch, positions in made:
                n_images = len(batch.indices_B)
                advance(n_images)
                if n_images >= 2:
                    step = Step(1, positions, learning_factor(settings, 0.5), seed_of(settings.seed, number), n_images)
                    float(method.train_step(batch, step))  # A GPU is waited for.
                yield n_images

        return _seconds_each(steps())


def _clustering(plan: Plan, n_clusters: int) -> float:
    """Return seconds of a clustering: of fewer points and as many fewer clusters, scaled by both."""
    settings, n_images, device = plan.settings, len(plan.source), plan.machine.clustering_device
    is_v2 = settings.method == V2
    width = settings.projection[1] if is_v2 and not settings.whiten else settings.pca
    operations = 2.0 * n_images * n_clusters * width * (settings.kmeans_iterations + 1)
    share = min(1.0, (OPERATIONS / operations) ** 0.5)
    n_points = max(min(n_images, 500), int(share * n_images))
    share = n_points / n_images
    clusters = max(2, settings.super_clusters, round(n_clusters * share))
    points_MP = normalize(torch.randn(n_points, width, generator=torch.Generator().manual_seed(0))).to(device)
    with plan.work.track("clustering some points", None, "iterations") as advance:
        if is_v2:
            algorithm: Any = KMeans(clusters, max_iter=settings.kmeans_iterations, spherical=True)
        else:
            algorithm = clusterer(settings.clustering).from_settings(replace(settings, clusters=clusters))
        started = time.perf_counter()
        algorithm.cluster(points_MP, seed=0, ranks=plan.work.ranks, advance=advance)
        return (time.perf_counter() - started) / share * (n_clusters / clusters)


def _tensors(state: Any) -> Iterator[Tensor]:
    """Yield all tensors of a nested state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
