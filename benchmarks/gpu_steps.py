"""A part of gpu.py: training steps on images that are on the device, beside the bare network's; compiled ones."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from bare_network import BareNetwork
from gpu_parts import Job, epoch_settings, peak_GiB, report, waits
from kmeans import timed

from deepcluster.core.device import Machine
from deepcluster.core.distributed import ONE_PROCESS
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Work
from deepcluster.data.cache import CachePlan, decoded_images
from deepcluster.data.loader import Loader
from deepcluster.data.sources import open_source
from deepcluster.run.features import make_run_trunk
from deepcluster.run.settings import Settings
from deepcluster.training.batches import even_batches, training_batches
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.deepcluster_v2 import DeepClusterV2
from deepcluster.training.method import Step

# Batches, and options that are compared with them, by network.
CASES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "cifar": [
        (512, {}),
        (128, {}),
        (64, {}),
        (512, {"optimizer": "lars", "clip_gradient": 1.0}),
    ],
    "alexnet": [(256, {})],
    "resnet50": [(256, {"optimizer": "lars"})],
}
# Network, batch, and arguments of torch.compile.
COMPILED: list[tuple[str, int, dict[str, Any]]] = [
    ("cifar", 512, {}),
    ("cifar", 64, {"mode": "reduce-overhead", "dynamic": False}),
    ("alexnet", 256, {}),
]
WARM_UP, MEASURED = 5, 20
# Seconds that must be left to begin with a compiled network.
TO_COMPILE = 60


def steps(job: Job) -> None:
    """Measure the steps of each network; compiled ones if time is left."""
    started = time.monotonic()
    warm_up, measured = (1, 2) if job.quick else (WARM_UP, MEASURED)
    for name, cases in CASES.items():
        for batch, options in cases:
            settings = step_settings(name, batch, options, job)
            n_steps = warm_up + (measured if name != "resnet50" else measured // 2)
            seconds, first, wait = our_steps(name, settings, n_steps, warm_up, job)
            bare = bare_steps(settings, n_steps, warm_up)
            title = f"{name}, batch {settings.batch_size}" + "".join(f", {key} {value}" for key, value in options.items())
            row = {"step_ms": 1000 * seconds, "bare_ms": 1000 * bare, "share": bare / seconds, "first_steps_s": first}
            report(title, **row, waits=wait, peak_GiB=peak_GiB(job.device))
    for name, batch, options in COMPILED:
        if job.quick or job.seconds - (time.monotonic() - started) < TO_COMPILE:
            report(f"{name}, batch {batch}, compiled", state="no time left")
            continue
        settings = step_settings(name, batch, {"compile": True}, job)
        with mock.patch("torch.compile", partial(torch.compile, **options)):
            seconds, first, _ = our_steps(name, settings, WARM_UP + MEASURED, WARM_UP, job)
        title = f"{name}, batch {batch}, compiled" + "".join(f", {key} {value}" for key, value in options.items())
        report(title, step_ms=1000 * seconds, first_steps_s=first, peak_GiB=peak_GiB(job.device))


def step_settings(name: str, batch: int, options: dict[str, Any], job: Job) -> Settings:
    """Return the settings of a network with a batch size and options; small batches with --quick."""
    settings, _ = epoch_settings(name, job)
    return replace(settings, batch_size=16 if job.quick else batch, **options)


def our_steps(name: str, settings: Settings, n_steps: int, warm_up: int, job: Job) -> tuple[float, float, str]:
    """Return the seconds of a step after the first ones, the seconds of those, and whether a step waits for the GPU.

    Batch sizes alternate by one, as in an epoch whose images do not divide.
    """
    gc.collect()
    peak_GiB(job.device)
    machine = Machine.choose(settings.device, settings.precision)
    n_images = (n_steps + 3) * settings.batch_size - 1
    source = open_source(job.images("small" if name == "cifar" else "photos", n_images, n_images))
    images = decoded_images(source, CachePlan(0, memory_bytes=1 << 40), reduce_to=settings.reduce_to)
    make = DeepClusterV2 if settings.method == "deepcluster-v2" else DeepCluster
    with closing(Loader(images, workers=settings.workers or 0, device=machine.device)) as loader:
        loader.fill(lambda _: None)
        method = make(make_run_trunk(settings), loader, settings, machine, Work(Reporter(quiet=True)))
        method.make_labels(method.cluster(method.whiten(method.extract_features(1)), 1), 1)
        method.begin_epoch(1)
        for network in method.networks:
            network.train()
        work = _each_step(method, loader)
        first = _seconds(lambda: [next(work)() for _ in range(warm_up)], machine)
        wait = "-" if machine.device.type == "cpu" or settings.compile else waits(next(work))
        seconds = _seconds(lambda: [next(work)() for _ in range(n_steps - warm_up)], machine)
    return seconds / (n_steps - warm_up), first, wait


def _each_step(method: DeepCluster | DeepClusterV2, loader: Loader) -> Iterator[Callable[[], Any]]:
    """Yield the training steps of an epoch, as functions; their batches have been cut already."""
    order_N = method.draw_images(1)
    batches = even_batches(len(order_N), method.settings.batch_size, ONE_PROCESS)
    views = training_batches(loader, method.view, order_N, batches, ONE_PROCESS, seed=method.settings.seed, epoch=1)
    for number, batch, positions in views:
        yield partial(method.train_step, batch, Step(1, positions, 1.0, number, len(batch.indices_B)))


def bare_steps(settings: Settings, n_steps: int, warm_up: int) -> float:
    """Return the seconds of a step of the bare network."""
    machine = Machine.choose(settings.device, settings.precision)
    network = BareNetwork(settings, machine)

    def work(count: int) -> None:
        for _ in range(count):
            network.train_step(settings.batch_size)

    work(warm_up)
    return _seconds(lambda: work(n_steps - warm_up), machine) / (n_steps - warm_up)


def _seconds(work: Callable[[], Any], machine: Machine) -> float:
    """Return the seconds of some work, until the device has finished it."""
    return timed(work, machine.device)[0]
