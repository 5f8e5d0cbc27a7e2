"""What a run does to an image, made of its settings and its checkpoint.

N images, K clusters, G groupings.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.core.seeds import image_order
from deepcluster.data.multi_crop import MultiCropView
from deepcluster.data.views import Colours, TrainingView
from deepcluster.models.heads import make_head
from deepcluster.models.projection import Projection
from deepcluster.run.features import make_run_trunk
from deepcluster.run.settings import Settings
from deepcluster.visualization.report.method.crop_pipeline import CropPipeline
from deepcluster.visualization.report.method.head_pipeline import HeadPipeline
from deepcluster.visualization.report.method.pipeline import Pipeline

State = Mapping[str, Any]


def pipeline_of(settings: Settings, state: State, machine: Machine, *, clusters_epoch: int, trained_epoch: int) -> Pipeline:
    """What the run of a checkpoint that has clusters does to an image.

    Args:
        clusters_epoch: of the clusters that are shown: those of the finished trunk where the checkpoint has them.
        trained_epoch: the epoch whose labels were learned last.
    """
    trunk = make_run_trunk(settings).to(machine.dtype)
    trunk.load_state_dict(state["trunk"])
    trunk.to(device=machine.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    groups = state.get("final", state)
    shared: dict[str, Any] = {
        "trunk": trunk,
        "machine": machine,
        "image_size": settings.image_size,
        "colours": Colours(settings.jitter, settings.grey, share=settings.jitter_share, blur=settings.blur),
        "cluster_stage": settings.cluster_stage,
        "centroids_KP": groups["assignment"]["centroids_KP"],
        "clusters_epoch": clusters_epoch,
        "trained_epoch": trained_epoch,
        "seed": settings.seed,
        "reduce_to": settings.reduce_to,
        "clusterer": "balanced" if settings.balance else settings.clustering,
        "super_clusters": settings.super_clusters,
        "kmeans_iterations": settings.kmeans_iterations,
        "reassign_every": settings.reassign_every,
        "stop_reassigning": settings.stop_reassigning,
        "lr": settings.lr,
        "batch_size": settings.batch_size,
    }
    if settings.method == "deepcluster-v2":
        return CropPipeline(**shared, **_of_crops(settings, state, groups, trained_epoch))
    return HeadPipeline(**shared, **_of_head(settings, state, groups, trunk.dim))


def _of_head(settings: Settings, state: State, groups: State, dim: int) -> dict[str, Any]:
    """What is of the first version alone."""
    head, labels_N = None, None
    if "head" in state:
        assignment = Assignment.from_state_dict(state["assignment"])
        weights = {**state["head"], **state.get("parts", {}).get("head", {})}
        whole = make_head(dim, assignment.n_clusters, assignment.super_of_cluster_K, seed=0)
        # While a run goes on, its parts may be gone when they are read.
        if set(whole.state_dict()) <= set(weights):
            labels_N, head = assignment.labels_N, whole
            head.load_state_dict(weights)
    return {
        "training_view": TrainingView(settings.image_size, scale=settings.crop_scale, flip=settings.flip),
        "whitening": Whitening.from_state_dict(groups["whitening"]),
        "head": head,
        "head_labels_N": labels_N,
        "sampling": settings.sampling,
        "looks_again": settings.looks_again,
        "quarters_N": state.get("quarters"),
    }


def _of_crops(settings: Settings, state: State, groups: State, trained_epoch: int) -> dict[str, Any]:
    """What is of DeepCluster-v2 alone."""
    projection = Projection(len(groups["projection"]["layers.0.weight"].T), *settings.projection, seed=0)
    projection.load_state_dict(groups["projection"])
    assignments = [state["assignment"], *state["other_assignments"]]
    labels_GN = torch.stack([one["labels_N"] for one in assignments])
    scales = (settings.crop_scale, *[settings.small_crop_scale] * (len(settings.crop_groups) - 1))
    return {
        "projection": projection,
        "view": MultiCropView(settings.crop_groups, scales, flip=settings.flip),
        "prototypes": tuple(state["prototypes"]),
        "whitening": Whitening.from_state_dict(groups["whitening"]) if "whitening" in groups else None,
        "looks_again": settings.looks_again,
        "labels_GN": labels_GN,
        "order_N": _crop_order(settings, labels_GN[0], trained_epoch),
        "temperature": settings.temperature,
        "optimizer": settings.optimizer,
    }


def _crop_order(settings: Settings, labels_N: Tensor, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch of DeepCluster-v2: every image once."""
    order_N: NDArray[np.int64] = image_order(settings.seed, epoch, len(labels_N)).numpy()
    return order_N
