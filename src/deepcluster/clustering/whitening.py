"""Step 2: shorten and whiten the features, then scale each row to unit length (section 3, implementation details).

The rows may come in a stream, and be spread over ranks. N images, B rows of a batch, D features, P components after PCA.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from deepcluster.clustering.eigen import top_eigenvectors
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError

# Rows that are added up, or transformed, at once.
BLOCK_ROWS = 2048
# Columns of a product: only those at and below the diagonal are made, 0.56 of 4,096 × 4,096.
PANEL = 512
# A component whose variance is below this share of the largest holds rounding errors, not data; so does one whose
# deviation is below what float32 resolves at the mean.
RANK_TOLERANCE = 1e-6
FLOAT32_EPSILON = 2.0**-23


def working_bytes(dim: int) -> int:
    """Most memory that a whitening of D features takes while rows are added to it and while it is finished."""
    return 12 * dim * dim + 8 * dim * max(BLOCK_ROWS, dim)


class Whitening:
    """PCA to `n_components` with whitening; rows of `transform` have unit length (`unit_rows`).

    Data of a lower rank than `n_components` give that many rows less: the missing components are zero. Rows are given all
    at once, `fit`, or as they are made, `update` and at the end `finish`; how they are divided changes nothing, bit for bit.

    Args:
        n_components: P; no more than D.
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
        self.n_components = n_components
        self.unit_rows = unit_rows
        self.ranks = ranks
        self._rows: Scatter | None = None

    def fit(self, features_ND: Tensor) -> "Whitening":
        """Learn mean and components of these rows (of this rank's share of them).

        Raises:
            InputError: P is over D, there are no rows, or a value is not finite (the row is named).
        """
        self._rows = None
        self.update(features_ND)
        return self.finish()

    def update(self, rows_BD: Tensor) -> None:
        """Add rows, of any floating type, to those that `finish` will learn from; none is kept but of the last block.

        A rank that has no rows gives an empty tensor, once.

        Raises:
            InputError: P is over D, another D than before, or a value is not finite; the row is named by its place among
                all rows of this rank, and may be told by a later call, or by `finish`.
        """
        dim = rows_BD.shape[1]
        if self._rows is None:
            if not 1 <= self.n_components <= dim:
                raise InputError(f"pca={self.n_components} must be between 1 and the {dim} features")
            self._rows = Scatter(dim, rows_BD.device)
        if dim != self._rows.dim:
            raise InputError(f"rows of {dim} features come after rows of {self._rows.dim}")
        self._rows.add(rows_BD.detach())

    def finish(self) -> "Whitening":
        """Learn mean and components of all rows since the last `finish`; over ranks a collective call.

        Raises:
            InputError: there are no rows, or a value is not finite.
        """
        rows, self._rows = self._rows, None
        if rows is None:
            raise InputError("there are no rows to whiten")
        if self.ranks.size == 1 and rows.n_rows == 0 and rows.n_waiting < rows.dim:
            self._learn_from_few(rows)
        else:
            self._learn_from_covariance(rows)
        return self

    def _learn_from_covariance(self, rows: "Scatter") -> None:
        n_images, mean_D, scatter_DD = rows.total(self.ranks)
        covariance_DD = scatter_DD.div_(max(1, n_images - 1))
        total_variance = _finite(covariance_DD.trace())
        variance_P, vectors_DP = top_eigenvectors(covariance_DD, self.n_components)
        self._keep(n_images, mean_D, variance_P, vectors_DP, total_variance)

    def _learn_from_few(self, rows: "Scatter") -> None:
        """Of fewer rows than features: the same by the N × N products of the rows, which is quicker."""
        centred_ND, mean_D = rows.centred_block()
        n_images, n_found = len(centred_ND), min(self.n_components, len(centred_ND))
        if n_images == 0:
            raise InputError("there are no rows to whiten")
        gram_NN = torch.zeros(n_images, n_images, dtype=torch.float64, device=rows.device)
        _add_lower_product(gram_NN, centred_ND.T)
        gram_NN = _mirror_lower(gram_NN).div_(max(1, n_images - 1))
        total_variance = _finite(gram_NN.trace())
        variance_P, vectors_NP = top_eigenvectors(gram_NN, n_found)
        vectors_DP = normalize(centred_ND.T @ vectors_NP.float(), dim=0).double()
        missing = (0, self.n_components - n_found)
        self._keep(n_images, mean_D, pad(variance_P, missing), pad(vectors_DP, missing), total_variance)

    def _keep(self, n_images: int, mean_D: Tensor, variance_P: Tensor, vectors_DP: Tensor, total_variance: float) -> None:
        self.mean_D = mean_D.float()
        variance_P = variance_P.clamp(min=0)
        # The sign of an eigenvector is arbitrary: make its largest entry positive, so that every machine agrees.
        largest_P = vectors_DP.gather(0, vectors_DP.abs().argmax(dim=0, keepdim=True))
        vectors_DP = vectors_DP * largest_P.sign()
        rounding = len(mean_D) * (FLOAT32_EPSILON * self.mean_D.abs().max().double()).square()
        kept_P = variance_P > torch.maximum(RANK_TOLERANCE * variance_P[0], rounding)
        kept_P &= torch.arange(self.n_components, device=kept_P.device) < n_images - 1
        scale_P = torch.where(kept_P, variance_P, 1).rsqrt() * kept_P
        self.components_DP = (vectors_DP * scale_P).float()
        self.variance_P = variance_P
        self.explained = float(variance_P.sum()) / max(total_variance, 1e-300)

    def transform(self, features_ND: Tensor) -> Tensor:
        """Points (N, P), float32, of features (N, D) of any floating type."""
        points_NP = torch.empty(len(features_ND), self.n_components, device=features_ND.device)
        for rows, block in zip(points_NP.split(BLOCK_ROWS), features_ND.split(BLOCK_ROWS), strict=True):
            projected = (block - self.mean_D).float() @ self.components_DP
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


class Scatter:
    """Number, mean and scatter matrix of rows in a stream: the sum of (x - mean)(x - mean)ᵀ.

    Rows wait in a float32 buffer until a block of `max(BLOCK_ROWS, D)` is full. A block is centred, multiplied in float32
    and added to the float64 totals by the formula for the union of two sets (Chan, Golub & LeVeque 1979), so that neither
    a large common offset nor a drift of the rows cancels digits.

    Attributes:
        n_rows: of the full blocks.
        n_waiting: rows in the buffer.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.dim, self.device = dim, device
        self.n_rows = 0
        self.n_waiting = 0
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
                self._make_room(end, block_rows)
                self._waiting[self.n_waiting : end] = taken
                self.n_waiting, part = end, part[len(taken) :]
                if end == block_rows:
                    self._add_block()

    def _make_room(self, n_rows: int, at_most: int) -> None:
        if n_rows > len(self._waiting):
            longer = torch.empty(min(at_most, max(n_rows, 2 * len(self._waiting))), self.dim, device=self.device)
            longer[: self.n_waiting] = self._waiting[: self.n_waiting]
            self._waiting = longer

    def centred_block(self) -> tuple[Tensor, Tensor]:
        """The waiting rows less their mean, in place, and the mean in float64.

        Raises:
            InputError: a value is not finite.
        """
        block_BD = self._waiting[: self.n_waiting]
        mean_D = torch.zeros_like(self._mean_D)
        # Twice: at a large offset the first mean is rounded, and the second is that of small numbers.
        for _ in range(2 if self.n_waiting else 0):
            shift_D = block_BD.mean(dim=0)
            if not bool(shift_D.isfinite().all()):
                raise self._not_finite(block_BD)
            block_BD -= shift_D
            mean_D += shift_D
        return block_BD, mean_D

    def _not_finite(self, block_BD: Tensor) -> InputError:
        bad = (~block_BD.isfinite().all(dim=1)).nonzero()
        if not len(bad):
            return _too_large()
        row = self.n_rows + int(bad[0])
        return InputError(f"features of row {row} are not finite ({len(bad)} such rows in its block); leave them out")

    def _add_block(self) -> None:
        block_BD, mean_D = self.centred_block()
        if self._scatter_DD is None:
            self._scatter_DD = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)
        n_all = self.n_rows + len(block_BD)
        drift_D = mean_D - self._mean_D
        _add_lower_product(self._scatter_DD, block_BD)
        self._scatter_DD.addr_(drift_D, drift_D, alpha=self.n_rows * len(block_BD) / max(1, n_all))
        self._mean_D += drift_D * (len(block_BD) / max(1, n_all))
        self.n_rows, self.n_waiting = n_all, 0

    def total(self, ranks: Ranks) -> tuple[int, Tensor, Tensor]:
        """Number, mean_D and scatter_DD (both float64) of the rows of all ranks; the stream ends here.

        Raises:
            InputError: there are no rows, or a value is not finite.
        """
        self._add_block()
        self._waiting = self._waiting[:0].clone()
        if self._scatter_DD is None:
            raise RuntimeError("no block was added")
        n_images = int(ranks.sum(torch.tensor([self.n_rows], device=self.device)))
        if n_images == 0:
            raise InputError("there are no rows to whiten")
        mean_D = ranks.sum(self._mean_D * self.n_rows) / n_images
        drift_D = self._mean_D - mean_D
        self._scatter_DD.addr_(drift_D, drift_D, alpha=self.n_rows)
        return n_images, mean_D, _mirror_lower(ranks.sum(self._scatter_DD))


def _add_lower_product(total_DD: Tensor, block_BD: Tensor) -> None:
    """Add block_BDᵀ block_BD, made in float32, to the panels of a float64 total at and below the diagonal."""
    for first in range(0, len(total_DD), PANEL):
        end = min(first + PANEL, len(total_DD))
        total_DD[first:end, :end] += block_BD[:, first:end].T @ block_BD[:, :end]


def _mirror_lower(total_DD: Tensor) -> Tensor:
    """The symmetric matrix of what is at and below the diagonal, in place."""
    for first in range(0, len(total_DD), PANEL):
        end = min(first + PANEL, len(total_DD))
        square = total_DD[first:end, first:end]
        square.copy_(square.tril() + square.tril(-1).T)
        total_DD[:first, first:end] = total_DD[first:end, :first].T
    return total_DD


def _finite(variance: Tensor) -> float:
    if not bool(variance.isfinite()):
        raise _too_large()
    return float(variance)


def _too_large() -> InputError:
    return InputError("features are so large that their squares are no float32 numbers (over 1e19); scale them down")
