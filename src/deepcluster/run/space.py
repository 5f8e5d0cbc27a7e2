"""The space in which images are clustered: whitened features (2018), or projections on the sphere (v2).

B rows, D features, P components.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.models.heads import Projection
from deepcluster.run.settings import Settings


@dataclass(frozen=True)
class ProjectedSpace:
    """The sphere of DeepCluster-v2: its projection in eval mode, then whitening with --whiten."""

    projection: Projection
    machine: Machine
    whitening: Whitening | None = None

    @property
    def n_components(self) -> int:
        """Number P of components."""
        return int(self.projection.layers[-1].out_features)  # type: ignore[arg-type]

    @torch.no_grad()
    def transform(self, rows: Tensor) -> Tensor:
        """Return points (B, P) of unit length, float32, of features (B, D), on their device."""
        with self.machine.autocast():
            points_BP: Tensor = self.projection(rows.to(self.machine.device, self.machine.dtype)).float().to(rows.device)
        return points_BP if self.whitening is None else self.whitening.transform(points_BP)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""
        return self.projection.state_dict()


# What takes features to the points that are clustered.
Space = Whitening | ProjectedSpace


def space_state(space: Space) -> dict[str, Any]:
    """Return the space as a checkpoint holds it."""
    if isinstance(space, ProjectedSpace):
        whitened = {} if space.whitening is None else {"whitening": space.whitening.state_dict()}
        return {"projection": space.state_dict(), **whitened}
    return {"whitening": space.state_dict()}


def space_of(state: Mapping[str, Any], settings: Settings, *, dim: int, machine: Machine) -> Space:
    """Return the space of a checkpoint.

    Args:
        state: the whole state, or its "final".
        dim: width D of the features.
        machine: where a projection runs.
    """
    whitening = Whitening.from_state_dict(state["whitening"]) if "whitening" in state else None
    if "projection" not in state and whitening is not None:
        return whitening
    projection = Projection(dim, *settings.projection, seed=0)
    projection.load_state_dict(state["projection"])
    return ProjectedSpace(projection.to(machine.device, machine.dtype).eval(), machine, whitening)
