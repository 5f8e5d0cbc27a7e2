"""The space in which images are clustered: whitened features (2018), projections on the sphere (v2), or a head's scores.

B rows, D features, P components, K clusters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad, relu

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


@dataclass(frozen=True)
class PredictionSpace:
    """The sphere on which the cluster that a last layer predicts is the nearest centroid.

    The largest w·x + b over the clusters is the largest product of (x, 1, 0) and (w, b, c), where c makes all of these
    equally long: on the unit sphere, the smallest distance. The layer's input x is the rectified features.

    Attributes:
        dim: D.
    """

    dim: int

    @property
    def n_components(self) -> int:
        """Number P of components."""
        return self.dim + 2

    def transform(self, rows: Tensor) -> Tensor:
        """Return points (B, P) of unit length, float32, of features (B, D), on their device."""
        return normalize(pad(pad(relu(rows.float()), (0, 1), value=1), (0, 1)))

    @staticmethod
    def centroids(weight_KD: Tensor, bias_K: Tensor) -> Tensor:
        """Return the centroids (K, P) of a layer."""
        layer_KE = torch.cat([weight_KD, bias_K[:, None]], dim=1).double()
        squared_K = layer_KE.square().sum(dim=1)
        return normalize(torch.cat([layer_KE, (squared_K.max() - squared_K).sqrt()[:, None]], dim=1)).float()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"dim": self.dim}


# What takes features to the points that are clustered.
Space = Whitening | ProjectedSpace | PredictionSpace


def space_state(space: Space) -> dict[str, Any]:
    """Return the space as a checkpoint holds it."""
    if isinstance(space, ProjectedSpace):
        whitened = {} if space.whitening is None else {"whitening": space.whitening.state_dict()}
        return {"projection": space.state_dict(), **whitened}
    return {"predictions" if isinstance(space, PredictionSpace) else "whitening": space.state_dict()}


def space_of(state: Mapping[str, Any], settings: Settings, *, dim: int, machine: Machine) -> Space:
    """Return the space of a checkpoint.

    Args:
        state: the whole state, or its "final".
        dim: width D of the features.
        machine: where a projection runs.
    """
    if "predictions" in state:
        return PredictionSpace(dim)
    whitening = Whitening.from_state_dict(state["whitening"]) if "whitening" in state else None
    if "projection" not in state and whitening is not None:
        return whitening
    projection = Projection(dim, *settings.projection, seed=0)
    projection.load_state_dict(state["projection"])
    return ProjectedSpace(projection.to(machine.device, machine.dtype).eval(), machine, whitening)
