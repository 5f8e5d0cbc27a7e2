"""Step 2: shorten and whiten the features, then scale each row to unit length (the paper's section 3.3).

N images, D features, P components after PCA.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.errors import InputError

BLOCK_ROWS = 8192
# A component whose variance is below this share of the largest holds rounding errors, not data; so does one whose
# deviation is below what float32 resolves at the mean.
RANK_TOLERANCE = 1e-6
FLOAT32_EPSILON = 2.0**-23


class Whitening:
    """PCA to `n_components` with whitening; rows of `transform` have unit length (`unit_rows`).

    Data of a lower rank than `n_components` give that many rows less: the missing components are zero.

    Args:
        n_components: P; no more than D.
        unit_rows: scale the rows to unit length; rows of zeros stay zero.

    Attributes (after `fit`):
        mean_D, components_DP: `transform(x) = unit(( x - mean_D) @ components_DP)`; the components carry 1/deviation.
        variance_P: variance of each component before whitening, largest first.
        explained: share of the total variance that the components keep.
    """

    mean_D: Tensor
    components_DP: Tensor
    variance_P: Tensor
    explained: float

    def __init__(self, n_components: int, *, unit_rows: bool = True) -> None:
        self.n_components = n_components
        self.unit_rows = unit_rows

    def fit(self, features_ND: Tensor) -> "Whitening":
        """Learn mean and components, in blocks of rows; sums are float64.

        Raises:
            InputError: P is over D, or a value is not finite (the row is named).
        """
        n_images, dim = features_ND.shape
        if not 1 <= self.n_components <= dim:
            raise InputError(f"pca={self.n_components} must be between 1 and the {dim} features")
        self._check_finite(features_ND)
        device = features_ND.device
        total_D = torch.zeros(dim, dtype=torch.float64, device=device)
        for block in features_ND.split(BLOCK_ROWS):
            total_D += block.float().sum(dim=0, dtype=torch.float64)
        mean_D = total_D / n_images
        scatter_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        for block in features_ND.split(BLOCK_ROWS):
            centred = block.float() - mean_D.float()
            scatter_DD += centred.T @ centred
        self.mean_D = mean_D.float()
        self._decompose(scatter_DD / max(1, n_images - 1))
        return self

    @staticmethod
    def _check_finite(features_ND: Tensor) -> None:
        for start, block in enumerate(features_ND.split(BLOCK_ROWS)):
            bad = (~torch.isfinite(block).all(dim=1)).nonzero()
            if len(bad):
                row = start * BLOCK_ROWS + int(bad[0])
                raise InputError(f"features of row {row} are not finite ({len(bad)} such rows in its block); leave them out")

    def _decompose(self, covariance_DD: Tensor) -> None:
        variance_D, vectors_DD = torch.linalg.eigh(covariance_DD)
        variance_P = variance_D.flip(0)[: self.n_components].clamp(min=0)
        vectors_DP = vectors_DD.flip(1)[:, : self.n_components]
        # The sign of an eigenvector is arbitrary: make its largest entry positive, so that every machine agrees.
        largest_P = vectors_DP.gather(0, vectors_DP.abs().argmax(dim=0, keepdim=True))
        vectors_DP = vectors_DP * largest_P.sign()
        rounding = len(variance_D) * (FLOAT32_EPSILON * self.mean_D.abs().max().double()).square()
        kept_P = variance_P > torch.maximum(RANK_TOLERANCE * variance_P[0], rounding)
        scale_P = torch.where(kept_P, variance_P, 1).rsqrt() * kept_P
        self.components_DP = (vectors_DP * scale_P).float()
        self.variance_P = variance_P
        self.explained = float(variance_P.sum() / variance_D.clamp(min=0).sum().clamp(min=1e-300))

    def transform(self, features_ND: Tensor) -> Tensor:
        """Points (N, P), float32, of features (N, D) of any floating type."""
        points_NP = torch.empty(len(features_ND), self.n_components, device=features_ND.device)
        for rows, block in zip(points_NP.split(BLOCK_ROWS), features_ND.split(BLOCK_ROWS), strict=True):
            projected = (block.float() - self.mean_D) @ self.components_DP
            rows.copy_(normalize(projected) if self.unit_rows else projected)
        return points_NP

    def fit_transform(self, features_ND: Tensor) -> Tensor:
        """`fit`, then `transform` of the same rows."""
        return self.fit(features_ND).transform(features_ND)

    def state_dict(self) -> dict[str, Tensor]:
        """What `from_state_dict` needs, as tensors."""
        return {
            "mean": self.mean_D,
            "components": self.components_DP,
            "variance": self.variance_P,
            "explained": torch.tensor(self.explained, dtype=torch.float64),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], *, unit_rows: bool = True) -> "Whitening":
        """The whitening that `state_dict` was taken of."""
        whitening = cls(state["components"].shape[1], unit_rows=unit_rows)
        whitening.mean_D, whitening.components_DP = state["mean"], state["components"]
        whitening.variance_P, whitening.explained = state["variance"], float(state["explained"])
        return whitening
