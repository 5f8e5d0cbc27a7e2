"""A training step does not wait for a GPU, and starts no more kernels than it did: proved without one (`pretended_gpu`)."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from pretended_gpu import GPU, PretendedGPU
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.device import Machine, to_device
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.multi_crop import MultiCropView
from deepcluster.data.resample import Ragged
from deepcluster.data.sources import open_source
from deepcluster.data.views import DRAWS_ALIGNED, ClusterView, TrainingView
from deepcluster.run.features import make_run_trunk
from deepcluster.run.settings import Settings
from deepcluster.training import deepcluster_v2
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.deepcluster_v2 import Clusters, DeepClusterV2, Points
from deepcluster.training.loop import LossMeter
from deepcluster.training.method import Step

N, B, P = 12, 8, 16

# The pretended GPU


HERE = torch.arange(4.0)
WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).all()),
    "if": lambda x: 1 if x.isfinite().all() else 0,
    "nonzero": lambda x: x.nonzero(),
    "a boolean index": lambda x: x[x > 0],
    "an assignment to a boolean index": lambda x: x.index_put_((x > 0,), x.new_zeros(())),
    "a slice up to a number of the GPU": lambda x: x[: x.long()[0]],
    "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu", non_blocking=True),
    "into memory of the CPU": lambda x: torch.zeros(4).copy_(x),
    "to the GPU": lambda x: HERE.to(x.device),
    "from pageable memory": lambda x: HERE.to(x.device, non_blocking=True),
    "blocking, from pinned memory": lambda x: HERE.pin_memory().to(x.device),
    "into memory of the GPU": lambda x: x.copy_(HERE),
    "numbers": lambda x: torch.tensor([1, 2], device=x.device),
    "an index of the CPU": lambda x: x[torch.tensor([1, 2])],
    "arithmetic of both": lambda x: x + HERE,
}
NO_WAITS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x + 1).clamp(min=2).sum() / 3,
    "a number of the CPU": lambda x: x * torch.tensor(2.0),
    "new tensors": lambda x: (torch.zeros(3, device=x.device), x.new_ones(2), torch.arange(4, device=x.device)),
    "where": lambda x: torch.where(x > 0, x, 0),
    "an index": lambda x: x[torch.arange(2, device=x.device)],
    "from pinned memory": lambda x: HERE.pin_memory().to(x.device, non_blocking=True),
    "to_device": lambda x: to_device(HERE, x.device),
    "its device and type": lambda x: x.to(x.device).to(x.device, torch.float32),
    "on the CPU": lambda x: HERE[HERE > 0].tolist(),
}


@pytest.mark.parametrize("name", [*WAITS, *NO_WAITS])
def test_waits_are_found(name: str) -> None:
    gpu = PretendedGPU()
    with gpu.running():
        x = torch.zeros(4, device=GPU)
        with suppress(*([] if name in NO_WAITS else [Exception])):  # There is no number to go on with.
            {**WAITS, **NO_WAITS}[name](x)
    assert bool(gpu.waits) == (name in WAITS), gpu.waits


def test_kernels_are_counted_by_part() -> None:
    """Views and empty memory need none, a convolution's gradients one each, and autocast one for each weight."""
    gpu, layer = PretendedGPU(), torch.nn.Conv2d(3, 2, 3, bias=False)
    with gpu.running():
        layer.to(GPU)
        x = torch.zeros(4, 3, 8, 8, device=GPU)
        gpu.kernels.clear()
        y = gpu.part("forward", lambda: layer(x.flip(3)[:2].transpose(2, 3)))()
        gpu.part("backward", lambda: y.mean().backward())()
        assert layer.weight.grad is not None and layer.weight.grad.shape == (2, 3, 3, 3)
        with torch.autocast("cuda", torch.bfloat16):
            z = gpu.part("bf16", lambda: layer(x) + layer(x))()
    assert z.dtype == torch.bfloat16
    assert gpu.kernels["forward", "flip"] == gpu.kernels["forward", "convolution"] == 1
    assert gpu.kernels["backward", "convolution_backward"] == 1  # The images need no gradient.
    assert gpu.by_part()["forward"] == 2
    assert (gpu.kernels["bf16", "_to_copy"], gpu.kernels["bf16", "convolution"]) == (3, 2)


# Training steps


COLOURS = {"jitter": 0.5, "grey": 0.2, "blur": 0.5}
V2 = {
    "method": "deepcluster-v2", "arch": "resnet18-small", "image_size": 32, "sobel": False, "crops": "2x32",
    "clusters": (15, 15, 15), "projection": (32, P), "look_again": False, **COLOURS,
}  # fmt: skip
# Settings, and kernels of a step: the most in all, and of what the bare network (forward, backward, optimizer) does not do.
STEPS: dict[str, tuple[dict[str, Any], int, int]] = {
    "alexnet": ({"arch": "alexnet", "image_size": 64, "clusters": 50}, 150, 18),
    "resnet, rotations": (
        {"arch": "resnet18", "image_size": 32, "sobel": False, "clusters": 24, "clustering": "hierarchical",
         "super_clusters": 2, "rotations": True, **COLOURS}, 400, 116,
    ),
    "v2": (V2, 400, 94),
    "v2, lars, multi-crop": ({**V2, "crops": "2x32,4x16", "optimizer": "lars", "clip_gradient": 1.0}, 730, 162),
    "v2, look again": ({**V2, "arch": "alexnet-small", "look_again": True, "sobel": True, "precision": "fp32"}, 220, 94),
}  # fmt: skip


@pytest.fixture(scope="module")
def black(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of images that are never read."""
    path = tmp_path_factory.mktemp("arrays") / "black.npy"
    np.save(path, np.zeros((N, 32, 32, 3), np.uint8))
    return path


def method_on_gpu(black: Path, **options: Any) -> DeepCluster | DeepClusterV2:
    """A method whose network is on the GPU, with labels of all images."""
    settings = Settings.from_dict({"pca": P, "precision": "bf16", **options})
    machine, loader = Machine(GPU, settings.precision), Loader(DecodedImages(open_source(black)), workers=0)
    supers_K = torch.arange(24) // 12 if settings.super_clusters else None

    def labelled(count: int) -> Assignment:
        rows_KP = normalize(torch.randn(count, P))
        return Assignment(torch.arange(N) % count, torch.zeros(N), rows_KP, super_of_cluster_K=supers_K)

    if settings.method == "deepcluster-v2":
        v2 = DeepClusterV2(make_run_trunk(settings), loader, settings, machine)
        v2.make_labels(Clusters([labelled(count) for count in settings.heads], Points(torch.zeros(N, 2, P))), 1)
        return v2
    method = DeepCluster(make_run_trunk(settings), loader, settings, machine)
    method.quarters_N = torch.arange(N) % 4 if settings.rotations else None
    method.make_labels((labelled(settings.n_clusters), None), 1)  # type: ignore[arg-type]
    return method


def batch_on_gpu(method: DeepCluster | DeepClusterV2) -> Batch:
    """A batch as the loader gives it: crops on the GPU, indices and draws on the CPU."""
    crops = tuple(
        torch.empty(count * B, 3, side, side, dtype=torch.uint8, device=GPU, memory_format=torch.channels_last)
        for count, side in method.crops
    )
    n_views = sum(count for count, _ in method.crops)
    draws_BVR = np.random.default_rng(0).random((B, n_views, DRAWS_ALIGNED))
    return Batch(crops, torch.arange(B), draws_BVR[:, 0] if isinstance(method, DeepCluster) else draws_BVR)


def divide_into_parts(method: DeepCluster | DeepClusterV2, gpu: PretendedGPU) -> None:
    """Count the kernels of the parts of a step."""
    places = [(method, "preprocess", "colours"), (method.network, "forward", "forward")]
    places += [(method.optimizers, "start", "optimizer"), (method.optimizers, "step", "optimizer")]
    own = (method.bank, "write", "bank") if isinstance(method, DeepClusterV2) else (method.head_losses, "forward", "loss")
    for owner, name, part in [*places, own]:
        setattr(owner, name, gpu.part(part, getattr(owner, name)))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait(name: str, black: Path) -> None:
    """The second step, since the first one makes what is kept."""
    options, most, most_beside = STEPS[name]
    gpu = PretendedGPU()
    with (
        gpu.running(),
        mock.patch.object(Tensor, "backward", gpu.part("backward", Tensor.backward)),
        mock.patch.object(deepcluster_v2, "prototype_losses", gpu.part("loss", deepcluster_v2.prototype_losses)),
    ):
        method = method_on_gpu(black, **options)
        for network in method.networks:
            network.train()
        divide_into_parts(method, gpu)
        batch, step = batch_on_gpu(method), Step(1, slice(0, B), 1.0, 0, B)
        method.train_step(batch, step)
        gpu.kernels.clear()
        gpu.waits.clear()
        method.train_step(batch, step)
        kernels = gpu.by_part()
        assert method.settings.optimizer == "sgd" or kernels["optimizer"] < 60
    print(name, kernels, sum(kernels.values()))
    assert gpu.waits == []
    assert sum(kernels.values()) <= most
    assert sum(kernels.get(part, 0) for part in ("other", "colours", "loss", "bank")) <= most_beside


@pytest.mark.parametrize("name", ["alexnet", "v2, look again"])
def test_a_step_without_images_does_not_wait(name: str, black: Path) -> None:
    """As of a rank that could read none of its images. BatchNorm over ranks is proved elsewhere."""
    gpu = PretendedGPU()
    with gpu.running():
        method = method_on_gpu(black, **{**STEPS[name][0], "look_again": False, "batch_size": B})
        for network in method.networks:
            network.eval()
        method.train_step(method.blank_batch(), Step(1, slice(0, 1), 1.0, 0, B))
        gpu.waits.clear()
        method.train_step(method.blank_batch(), Step(1, slice(0, 1), 1.0, 0, B))
    assert gpu.waits == []


def test_losses_are_read_together() -> None:
    gpu, losses = PretendedGPU(), LossMeter()
    with gpu.running():
        for number in range(49):
            losses.add(torch.full((), float(number), device=GPU), 2, str)
        assert gpu.waits == []
        with suppress(Exception):
            losses.settle(str)
    assert len(gpu.waits) == 1 and gpu.kernels["other", "stack"] + gpu.kernels["other", "cat"] == 1


# Views, which a thread cuts while the step before runs


@pytest.mark.parametrize("name", ["cluster", "training", "multi-crop"])
def test_views_are_cut_on_the_gpu_without_waiting(name: str) -> None:
    views = {"cluster": ClusterView(16), "training": TrainingView(16)}
    view = views.get(name, MultiCropView(((2, 16), (3, 8)), ((0.2, 1), (0.1, 0.2))))
    draws_BVR = np.random.default_rng(0).random((3, 5, DRAWS_ALIGNED))
    sizes_B2 = np.array([[20, 30], [50, 18], [33, 33]])
    starts_B = np.concatenate([[0], sizes_B2.prod(1).cumsum()[:-1]])
    gpu = PretendedGPU()
    with gpu.running():
        images = Ragged(torch.zeros(int(sizes_B2.prod(1).sum()), 3, dtype=torch.uint8, device=GPU), starts_B, sizes_B2)
        crops = view(images, draws_BVR if name == "multi-crop" else draws_BVR[:, 0])
        for one in crops if isinstance(crops, tuple) else [crops]:
            assert one.device == GPU and one.is_contiguous(memory_format=torch.channels_last)
    assert gpu.waits == []
    assert gpu.by_part()["other"] <= (280 if name == "multi-crop" else 140)
