"""Files of other programs as models: a trunk, and clusters where the file keeps some."""

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.interop.cluster_files import NAME as CLUSTERS
from deepcluster.interop.cluster_files import read_clusters
from deepcluster.interop.cluster_heads import Prototypes, TopLayer, prototypes, top_layer
from deepcluster.interop.recognise import recognise
from deepcluster.interop.renaming import usual_names
from deepcluster.interop.weight_files import IN_FOLDERS, WeightFile
from deepcluster.models.heads import Projection
from deepcluster.models.trunk import Trunk
from deepcluster.models.weights import Match, Undrawn, some_of, take_weights, without_wrappers
from deepcluster.run.features import make_run_trunk
from deepcluster.run.model import Model
from deepcluster.run.settings import Settings
from deepcluster.run.space import PredictionSpace, ProjectedSpace, Space

# Deviation of red in the augmentations of SwAV and DeepCluster-v2 (swav, multicropdataset.py).
SWAV_STD = (0.228, 0.224, 0.225)
# What a hub's config.json of one of our exports has.
OWN_SETTINGS = "deepcluster_settings"


def model_of_file(file: WeightFile, *, name: str, arch: str | None = None) -> Model:
    """Return the model of another program's file, on the CPU.

    Args:
        name: for messages.
        arch: the network, where the user named it.

    Raises:
        InputError: the network is not known, or the weights do not fit it.
    """
    tensors = usual_names(file.tensors)
    settings, trained = _own_settings(file) if arch is None else (None, False)
    if settings is None:
        network = recognise(file, tensors, arch)
        settings = Settings.from_dict({**asdict(network), **_statistics(file), "precision": "fp32"})
    with Undrawn():
        trunk = make_run_trunk(settings)
    match = Match.of(trunk, tensors)
    if match.missing:  # These stay random.
        trunk = make_run_trunk(settings)
        match = Match.of(trunk, tensors)
    take_weights(trunk, tensors, name=name)
    _take_sobel(trunk, tensors)
    machine = Machine.choose("cpu", "fp32")
    clusters = file.path.with_name(CLUSTERS)
    if OWN_SETTINGS in file.facts and file.path.name == IN_FOLDERS[1] and clusters.is_file():
        space, assignment = read_clusters(clusters, settings, dim=trunk.dim, machine=machine)
        return Model(name, trunk.eval(), settings, machine, space, assignment, remark=_remark(match, file), trained=trained)
    head = prototypes(tensors, trunk.dim) or top_layer(tensors, trunk.dim)
    if head is None:
        return Model(name, trunk.eval(), settings, machine, remark=_remark(match, file), trained=trained)
    settings, space, assignment = _clusters(head, settings, trunk.dim, machine)
    remark = _remark(match, file, head.used, assignment.n_clusters)
    return Model(name, trunk.eval(), settings, machine, space, assignment, remark=remark, trained=trained)


def _own_settings(file: WeightFile) -> tuple[Settings | None, bool]:
    """Return the settings of a model that was exported with them, and whether it was trained with them."""
    kept = file.facts.get(OWN_SETTINGS)
    try:
        kept = json.loads(kept) if isinstance(kept, str) else kept
        if not isinstance(kept, dict):
            return None, False
        return Settings.from_saved({name: kept[name] for name in kept if name != "trained"}), kept.get("trained", True)
    except (ValueError, InputError) as fault:
        raise InputError(f"{file.path} was exported by another version of deepcluster: {fault}") from None


def _statistics(file: WeightFile) -> dict[str, Any]:
    """Return mean and deviation by which the images of a file's network are normalised, where they are not ImageNet's."""
    config = file.facts.get("pretrained_cfg")
    given = config if isinstance(config, dict) else {}
    found = {
        name: tuple(map(float, given[name]))
        for name in ("mean", "std")
        if isinstance(given.get(name), list | tuple) and len(given[name]) == 3
    }
    # The files of SwAV's repository hold a bare network in DataParallel.
    is_swav = any(key.startswith("module.prototypes") for key in file.tensors)
    return {"std": SWAV_STD, **found} if is_swav else found


def _take_sobel(trunk: Trunk, tensors: dict[str, Tensor]) -> None:
    """Copy the file's own Sobel layer, if it has one of the same shape."""
    if trunk.sobel is not None:
        for name, value in trunk.sobel.state_dict().items():
            given = next((one for key, one in tensors.items() if f".{key}".endswith(f".sobel.{name}")), None)
            if given is not None and given.shape == value.shape:
                value.copy_(given)


def _clusters(
    head: Prototypes | TopLayer, settings: Settings, dim: int, machine: Machine
) -> tuple[Settings, Space, Assignment]:
    """Return the settings, the space and the clusters of a head; no image is assigned yet."""
    values, labels, distances = settings.as_dict(), torch.empty(0, dtype=torch.int64), torch.empty(0)
    if isinstance(head, TopLayer):
        centroids_KP = PredictionSpace.centroids(head.weight_KD, head.bias_K)
        values |= {"clusters": len(centroids_KP)}
        return Settings.from_dict(values), PredictionSpace(dim), Assignment(labels, distances, centroids_KP)
    widths = (len(head.projection["layers.0.weight"]), len(head.projection["layers.3.weight"]))
    projection = Projection(dim, *widths, seed=0)
    projection.load_state_dict(dict(head.projection))
    counts = [len(one) for one in head.prototypes]
    values |= {"method": "deepcluster-v2", "clusters": counts, "projection": widths, "temperature": 0.1}
    space = ProjectedSpace(projection.eval(), machine)
    return Settings.from_dict(values), space, Assignment(labels, distances, head.prototypes[0])


def _remark(match: Match, file: WeightFile, used: tuple[str, ...] = (), n_clusters: int = 0) -> str:
    """Say how many of the file's tensors were used, what is random, and what was left out."""
    heads = {without_wrappers(key) for key in used}
    left = [key for key in match.left if key not in heads]
    clusters = f", and {len(used)} more that give {n_clusters:,} clusters" if n_clusters else ""
    n_counters = sum(key.endswith("num_batches_tracked") for key in file.tensors)
    counters = f", {n_counters} of them counters of batches, which are not weights" if n_counters else ""
    parts = [f"{match.share} tensors of {match.arch}{clusters} (the file holds {len(file.tensors)}{counters})"]
    if match.others:
        parts.append(match.copies)
    if match.missing:
        parts.append(f"random, as the file lacks them: {some_of(match.missing)}")
    if left:
        parts.append(f"left out: {some_of(left)}")
    return "; ".join([*parts, *file.remarks])
