"""Step 2: reduce and whiten the features by PCA, then scale each row to unit length (section 3, implementation details).

The rows may come in a stream and be split over ranks. N images on this rank, B rows of a batch, D features, P components.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from deepcluster.clustering.eigen import top_eigenvectors
from deepcluster.clustering.parallel import rows_at_once
from deepcluster.core.device import true_float32
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError

# Rows summed or transformed at once.
BLOCK_ROWS = 2048
# Columns per product: only panels at and below the diagonal are computed, 0.56 of 4,096 × 4,096.
PANEL = 512
# A component with less than this share of the largest variance holds rounding errors, not data; so does one whose
# deviation is below the resolution of float32 at the mean.
RANK_TOLERANCE = 1e-6
FLOAT32_EPSILON = 2.0**-23
NO_ROWS = "there are no rows to whiten"
TOO_LARGE = "features are too large to be squared in float32 (above 1e19); scale them down"


def working_bytes(dim: int) -> int:
    """Return the peak memory of a whitening of D features while rows are added and while it is finished."""
    return 12 * dim * dim + 8 * dim * max(BLOCK_ROWS, dim)


class Whitening:
    """PCA to `n_components` with whitening; rows of `transform` have unit length (`unit_rows`).

    If the rank of the data is below `n_components`, the missing components are zero. Rows are passed all at once (`fit`), or
    in batches (`update`, and `finish` at the end); how they are divided does not change a bit of the result.

    Args:
        n_components: P; at most D.
        unit_rows: scale the rows to unit length; rows of zeros stay zero.
        ranks: the processes over which the rows are split.

    Attributes (after `fit` or `finish`):
        mean_D, components_DP: `transform(x) = unit(( x - mean_D) @ components_DP)`; the components carry 1/deviation.
        variance_P: variance of each component before whitening, largest first.
        explained: share of the total variance that the components keep.
    """

    mean_D: Tensor
    components_DP: Tensor
    variance_P: Tensor
    explained: float

    def __init__(self, n_components: int, *, unit_rows: bool = True, ranks: Ranks = ONE_PROCESS) -> None:
        self.n_components, self.unit_rows, self.ranks = n_components, unit_rows, ranks
        self._rows: Scatter | None = None

    def fit(self, features_ND: Tensor) -> "Whitening":
        """Learn mean and components from these rows, and those of the other ranks; raises as `update` and `finish` do."""
        self._rows = None
        self.update(features_ND)
        return self.finish()

    @true_float32()
    def update(self, rows_BD: Tensor) -> None:
        """Add rows, of any floating type, to those that `finish` learns from; only the last block is kept in memory.

        A rank without rows passes an empty tensor once.

        Raises:
            InputError: P exceeds D, D differs from before, or a value is not finite: the row is named by its position among
                all rows of this rank, possibly in a later call or in `finish`.
        """
        dim = rows_BD.shape[1]
        if self._rows is None:
            if not 1 <= self.n_components <= dim:
                raise InputError(f"pca={self.n_components} must be between 1 and the {dim} features")
            self._rows = Scatter(dim, rows_BD.device)
        if dim != self._rows.dim:
            raise InputError(f"rows of {dim} features follow rows of {self._rows.dim}")
        self._rows.add(rows_BD.detach())

    @true_float32()
    def finish(self) -> "Whitening":
        """Learn mean and components from all rows since the last `finish`; a collective call of all ranks.

        Raises:
            InputError: there are no rows, or a value is not finite.
        """
        rows, self._rows = self._rows, None
        if rows is None or (self.ranks.size == 1 and not rows.n_rows + rows.n_waiting):
            raise InputError(NO_ROWS)
        if self.ranks.size == 1 and rows.n_rows == 0 and rows.n_waiting < rows.dim:
            n_images, mean_D, variance_P, vectors_DP, total_variance = self._from_few(rows)
        else:
            n_images, mean_D, scatter_DD = rows.total(self.ranks)
            scatter_DD.div_(max(1, n_images - 1))
            variance_P, vectors_DP, total_variance = _principal(scatter_DD, self.n_components)
        self.mean_D = mean_D.float()
        variance_P = variance_P.clamp(min=0)
        # The sign of an eigenvector is arbitrary: make its largest entry positive on every machine.
        largest_P = vectors_DP.gather(0, vectors_DP.abs().argmax(dim=0, keepdim=True))
        vectors_DP = vectors_DP * largest_P.sign()
        rounding = len(mean_D) * (FLOAT32_EPSILON * self.mean_D.abs().max().double()).square()
        kept_P = variance_P > torch.maximum(RANK_TOLERANCE * variance_P[0], rounding)
        kept_P &= torch.arange(self.n_components, device=kept_P.device) < n_images - 1
        scale_P = torch.where(kept_P, variance_P, 1).rsqrt() * kept_P
        self.components_DP = (vectors_DP * scale_P).float()
        self.variance_P = variance_P
        self.explained = float(variance_P.sum()) / max(total_variance, 1e-300)
        return self

    def _from_few(self, rows: "Scatter") -> tuple[int, Tensor, Tensor, Tensor, float]:
        """Learn from fewer rows than features: the N × N products of the rows are faster and give the same."""
        centred_ND, mean_D = rows.centred_block()
        n_images, n_found = len(centred_ND), min(self.n_components, len(centred_ND))
        gram_NN = torch.zeros(n_images, n_images, dtype=torch.float64, device=rows.device)
        _add_lower_product(gram_NN, centred_ND.T)
        gram_NN = _mirror_lower(gram_NN).div_(max(1, n_images - 1))
        variance_P, vectors_NP, total_variance = _principal(gram_NN, n_found)
        vectors_DP = normalize(centred_ND.T @ vectors_NP.float(), dim=0).double()
        missing = (0, self.n_components - n_found)
        return n_images, mean_D, pad(variance_P, missing), pad(vectors_DP, missing), total_variance

    @true_float32()
    def transform(self, features_ND: Tensor) -> Tensor:
        """Return points (N, P), float32, of features (N, D) of any floating type."""
        points_NP = torch.empty(len(features_ND), self.n_components, device=features_ND.device)
        at_once = max(BLOCK_ROWS, rows_at_once(features_ND))
        for rows, block in zip(points_NP.split(at_once), features_ND.split(at_once), strict=True):
            projected = (block - self.mean_D).float() @ self.components_DP
            rows.copy_(normalize(projected) if self.unit_rows else projected)
        return points_NP

    def fit_transform(self, features_ND: Tensor) -> Tensor:
        """`fit`, then `transform` the same rows."""
        return self.fit(features_ND).transform(features_ND)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that `from_state_dict` needs."""
        return {
            "mean": self.mean_D,
            "components": self.components_DP,
            "variance": self.variance_P,
            "explained": torch.tensor(self.explained, dtype=torch.float64),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], *, unit_rows: bool = True) -> "Whitening":
        """Restore a whitening from its `state_dict`."""
        whitening = cls(state["components"].shape[1], unit_rows=unit_rows)
        whitening.mean_D, whitening.components_DP = state["mean"], state["components"]
        whitening.variance_P, whitening.explained = state["variance"], float(state["explained"])
        return whitening


class Scatter:
    """Number, mean and scatter matrix, the sum of (x - mean)(x - mean)ᵀ, of rows in a stream.

    Rows wait in a float32 buffer until a block of `max(BLOCK_ROWS, D)` is full. A block is centred, multiplied in float32
    and added to the float64 totals by the formula for the union of two sets (Chan, Golub & LeVeque 1979), so that neither
    a large common offset nor a drift of the rows cancels digits.

    Attributes:
        n_rows: number of rows in the totals.
        n_waiting: number of rows in the buffer.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.dim, self.device = dim, device
        self.n_rows = self.n_waiting = 0
        self._mean_D = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter_DD: Tensor | None = None
        self._waiting = torch.empty(0, dim, device=device)

    def add(self, rows_BD: Tensor) -> None:
        """Add rows to the buffer, and the buffer to the totals whenever it is full."""
        block_rows = max(BLOCK_ROWS, self.dim)
        for part in rows_BD.split(BLOCK_ROWS):
            while len(part):
                taken = part[: block_rows - self.n_waiting]
                end = self.n_waiting + len(taken)
                if end > len(self._waiting):
                    room = min(block_rows, max(end, 2 * len(self._waiting)))
                    longer = torch.empty(room, self.dim, device=self.device)
                    longer[: self.n_waiting] = self._waiting[: self.n_waiting]
                    self._waiting = longer
                self._waiting[self.n_waiting : end] = taken
                self.n_waiting, part = end, part[len(taken) :]
                if end == block_rows:
                    self._add_block()

    def centred_block(self) -> tuple[Tensor, Tensor]:
        """Subtract the mean from the waiting rows, in place; return them, and the mean in float64.

        Raises:
            InputError: a value is not finite.
        """
        block_BD = self._waiting[: self.n_waiting]
        mean_D = torch.zeros_like(self._mean_D)
        # Twice: with a large offset the first mean is rounded; the second is the mean of small numbers.
        for _ in range(2 if self.n_waiting else 0):
            shift_D = block_BD.mean(dim=0)
            if not bool(shift_D.isfinite().all()):
                bad = (~block_BD.isfinite().all(dim=1)).nonzero()
                if not len(bad):
                    raise InputError(TOO_LARGE)
                row = f"row {self.n_rows + int(bad[0])} are not finite ({len(bad)} such rows in its block)"
                raise InputError(f"features of {row}; leave them out")
            block_BD -= shift_D
            mean_D += shift_D
        return block_BD, mean_D

    def _add_block(self) -> Tensor:
        """Add the buffer to the totals; return the scatter matrix, at and below the diagonal."""
        block_BD, mean_D = self.centred_block()
        if self._scatter_DD is None:
            self._scatter_DD = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)
        n_all = self.n_rows + len(block_BD)
        drift_D = mean_D - self._mean_D
        _add_lower_product(self._scatter_DD, block_BD)
        self._scatter_DD.addr_(drift_D, drift_D, alpha=self.n_rows * len(block_BD) / max(1, n_all))
        self._mean_D += drift_D * (len(block_BD) / max(1, n_all))
        self.n_rows, self.n_waiting = n_all, 0
        return self._scatter_DD

    def total(self, ranks: Ranks) -> tuple[int, Tensor, Tensor]:
        """Return number, mean_D and scatter_DD (both float64) of the rows of all ranks, and end the stream.

        Raises:
            InputError: there are no rows, or a value is not finite.
        """
        scatter_DD = self._add_block()
        self._waiting = self._waiting[:0].clone()
        n_images = int(ranks.sum(torch.tensor([self.n_rows], device=self.device)))
        if n_images == 0:
            raise InputError(NO_ROWS)
        mean_D = ranks.sum(self._mean_D * self.n_rows) / n_images
        drift_D = self._mean_D - mean_D
        scatter_DD.addr_(drift_D, drift_D, alpha=self.n_rows)
        return n_images, mean_D, _mirror_lower(ranks.sum(scatter_DD))


def _add_lower_product(total_DD: Tensor, block_BD: Tensor) -> None:
    """Add block_BDᵀ block_BD, computed in float32, to the panels of a float64 total at and below the diagonal."""
    for first in range(0, len(total_DD), PANEL):
        end = min(first + PANEL, len(total_DD))
        total_DD[first:end, :end] += block_BD[:, first:end].T @ block_BD[:, :end]


def _mirror_lower(total_DD: Tensor) -> Tensor:
    """Mirror the part below the diagonal to the part above, in place, and return the matrix."""
    for first in range(0, len(total_DD), PANEL):
        end = min(first + PANEL, len(total_DD))
        square = total_DD[first:end, first:end]
        square.copy_(square.tril() + square.tril(-1).T)
        total_DD[:first, first:end] = total_DD[first:end, :first].T
    return total_DD


def _principal(covariance_DD: Tensor, n_top: int) -> tuple[Tensor, Tensor, float]:
    """Return the largest eigenvalues, their eigenvectors and the sum of all eigenvalues."""
    trace = covariance_DD.trace()
    if not bool(trace.isfinite()):
        raise InputError(TOO_LARGE)
    return *top_eigenvectors(covariance_DD, n_top), float(trace)
