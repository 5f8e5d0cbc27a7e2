"""The space in which images are grouped: features whitened (2018), or projected onto the sphere (v2).

B rows, D features, P components.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.models.projection import Projection
from deepcluster.run.settings import Settings


class Space(Protocol):
    """Takes features to the points that are grouped."""

    @property
    def n_components(self) -> int:
        """P."""

    def transform(self, rows: Tensor) -> Tensor:
        """Points (B, P), float32, of features (B, D), on their device."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""


@dataclass(frozen=True)
class ProjectedSpace:
    """The sphere of DeepCluster-v2, by its projection in eval mode; whitened where a run asks for it."""

    projection: Projection
    machine: Machine
    whitening: Whitening | None = None

    @property
    def n_components(self) -> int:
        """P."""
        return int(self.projection.layers[-1].out_features)  # type: ignore[arg-type]

    @torch.no_grad()
    def transform(self, rows: Tensor) -> Tensor:
        """Points (B, P) of unit length, float32, of features (B, D), on their device."""
        with self.machine.autocast():
            points_BP = self.projection(rows.to(self.machine.device, self.machine.dtype)).float().to(rows.device)
        return points_BP if self.whitening is None else self.whitening.transform(points_BP)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return self.projection.state_dict()


def space_state(space: Space) -> dict[str, Any]:
    """The space as a checkpoint names it."""
    if isinstance(space, ProjectedSpace):
        whitened = {} if space.whitening is None else {"whitening": space.whitening.state_dict()}
        return {"projection": space.state_dict(), **whitened}
    return {"whitening": space.state_dict()}


def space_of(state: Mapping[str, Any], settings: Settings, *, dim: int, machine: Machine) -> Space:
    """The space of a checkpoint.

    Args:
        state: what has an assignment: a whole state, or its "final".
        dim: D.
        machine: where a projection runs.
    """
    whitening = Whitening.from_state_dict(state["whitening"]) if "whitening" in state else None
    if "projection" not in state and whitening is not None:
        return whitening
    projection = Projection(dim, *settings.projection, seed=0)
    projection.load_state_dict(state["projection"])
    return ProjectedSpace(projection.to(machine.device, machine.dtype).eval(), machine, whitening)
