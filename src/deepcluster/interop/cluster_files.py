"""Clusters in a safetensors file, beside the weights in a folder of the Hugging Face hub's layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.run.settings import Settings
from deepcluster.run.space import Space, space_of, space_state

NAME = "clusters.safetensors"


def save_safetensors(tensors: Mapping[str, Tensor], out: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and texts.

    Raises:
        InputError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise InputError("writing safetensors needs safetensors: pip install safetensors") from None
    # `save_file` makes files that only their owner can read.
    out.write_bytes(save(dict(tensors), metadata={"format": "pt", **metadata}))


def write_clusters(space: Space, assignment: Assignment, out: Path) -> None:
    """Write the clusters of a model: what takes features to points, the centroids, and the cluster of each image."""
    values = {**_flat(space_state(space)), **_flat({"assignment": assignment.state_dict()})}
    tensors = {key: value.contiguous().clone() for key, value in values.items() if isinstance(value, Tensor)}
    plain = {key: json.dumps(value) for key, value in values.items() if not isinstance(value, Tensor)}
    save_safetensors(tensors, out, plain)


def read_clusters(path: Path, settings: Settings, *, dim: int, machine: Machine) -> tuple[Space, Assignment]:
    """Return the clusters in a file of `write_clusters`.

    Args:
        settings: settings of the run.
        dim: width D of the features.
        machine: where a projection runs.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        plain = {key: json.loads(text) for key, text in (file.metadata() or {}).items() if key != "format"}
        values: dict[str, Any] = {**plain, **{key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118
    state: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        part, _, name = key.partition(".")
        state.setdefault(part, {})[name] = value
    space = space_of(state, settings, dim=dim, machine=machine)
    return space, Assignment.from_state_dict(state["assignment"])


def _flat(state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{part}.{name}": value for part, values in state.items() for name, value in values.items()}
