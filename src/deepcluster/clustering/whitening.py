"""Step 2: reduce and whiten the features by PCA, then scale each row to unit length (section 3, implementation details).

The rows may come in a stream and be split over ranks. N images on this rank, B rows of a batch, D features, P components.
"""

from typing import Any, NamedTuple, Self, overload

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from deepcluster.clustering.eigen import top_eigenvectors
from deepcluster.clustering.estimator import Estimator, array_like, as_argument_error, check_count
from deepcluster.clustering.frame import check_table
from deepcluster.clustering.parallel import rows_at_once
from deepcluster.clustering.scatter import (
    BLOCK_ROWS,
    NO_ROWS,
    SAFE_FLOAT32,
    TOO_LARGE,
    Scatter,
    add_lower_product,
    mirror_lower,
)
from deepcluster.core.device import true_float32
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError

# A component with less than this share of the largest variance holds rounding errors, not data; so does one whose
# deviation is below the resolution of the features' numbers at the mean.
RANK_TOLERANCE = 1e-6


def working_bytes(dim: int) -> int:
    """Return the peak memory of a whitening of D features while rows are added and while it is finished."""
    return 12 * dim * dim + 8 * dim * max(BLOCK_ROWS, dim)


class _Learned(NamedTuple):
    mean_D: Tensor
    components_DP: Tensor
    variance_P: Tensor
    explained: float


class Whitening(Estimator):
    """PCA and whitening as an estimator of scikit-learn; rows of `transform` have unit length (`unit_rows`).

    If the rank of the data is below `n_components`, the missing components are zero. Rows are passed all at once (`fit`), or
    in batches (`update`, and `finish` at the end); how they are divided does not change a bit of the result.

    Args:
        n_components: P, at most D; None: D.
        unit_rows: scale the rows to unit length; rows of zeros stay zero.

    Attributes (after `fit` or `finish`, tensors, float64 if the features are):
        mean_D, components_DP: `transform(x) = unit(( x - mean_D) @ components_DP)`; the components carry 1/deviation.
        variance_P: variance of each component before whitening, largest first.
        explained: share of the total variance that the components keep.

    Attributes (after `fit`, as arrays of the kind that was passed):
        mean_, explained_variance_, explained_variance_ratio_: as of scikit-learn's `PCA`.
    """

    _learned: "_Learned"
    n_components_: int
    allows_nan = False
    _scatter: "Scatter | None" = None

    def __init__(self, n_components: int | None = None, *, unit_rows: bool = True) -> None:
        self.n_components: Any = n_components
        self.unit_rows = unit_rows

    @property
    def mean_D(self) -> Tensor:
        return self._learned.mean_D

    @property
    def components_DP(self) -> Tensor:
        return self._learned.components_DP

    @property
    def variance_P(self) -> Tensor:
        return self._learned.variance_P

    @property
    def explained(self) -> float:
        return self._learned.explained

    def fit(self, X: Any, y: Any = None, *, ranks: Ranks = ONE_PROCESS) -> Self:
        """Learn mean and components from the rows (N, D) of a tensor or array, and those of the other ranks.

        Raises:
            ArgumentError: as `update` and `finish`.
        """
        self._scatter = None
        features_ND = self._rows(X, reset=True)
        with as_argument_error(features_ND):
            self.update(features_ND)
            self.finish(ranks=ranks)
        self.mean_, self.explained_variance_ = array_like(X, self.mean_D), array_like(X, self.variance_P)
        total = self.variance_P.sum().clamp(min=1e-300)
        self.explained_variance_ratio_ = array_like(X, self.variance_P * (self.explained / total))
        return self

    @true_float32()
    def update(self, rows_BD: Tensor) -> None:
        """Add rows, of any type of numbers, to those that `finish` learns from; only the last block is kept in memory.

        A rank without rows passes an empty tensor once.

        Raises:
            InputError: P exceeds D, D differs from before, or a value is not finite: the row is named by its position among
                all rows of this rank, possibly in a later call or in `finish`.
        """
        rows_BD = check_table(rows_BD)
        dim = rows_BD.shape[1]
        if self._scatter is None:
            check_count("n_components (--pca)", self._n_components(dim), most=dim, of="features")
            self._scatter = Scatter(dim, rows_BD.device, rows_BD.dtype)
        if dim != self._scatter.dim:
            raise InputError(f"rows of {dim} features follow rows of {self._scatter.dim}")
        self._scatter.add(rows_BD)

    def _n_components(self, dim: int) -> int:
        return dim if self.n_components is None else self.n_components

    @true_float32()
    def finish(self, *, ranks: Ranks = ONE_PROCESS) -> Self:
        """Learn mean and components from all rows since the last `finish`; a collective call of all ranks.

        Args:
            ranks: the processes over which the rows are split.

        Raises:
            InputError: there are no rows, or a value is not finite.
        """
        rows, self._scatter = self._scatter, None
        if rows is None or (ranks.size == 1 and not rows.n_rows + rows.n_waiting):
            raise InputError(NO_ROWS)
        n_components = self._n_components(rows.dim)
        if ranks.size == 1 and rows.n_rows == 0 and rows.n_waiting < rows.dim:
            n_images, mean_D, variance_P, vectors_DP, total_variance = _from_few(rows, n_components)
        else:
            n_images, mean_D, scatter_DD = rows.total(ranks)
            scatter_DD.div_(max(1, n_images - 1))
            variance_P, vectors_DP, total_variance = _principal(scatter_DD, n_components)
        variance_P = variance_P.clamp(min=0)
        # The sign of an eigenvector is arbitrary: make its largest entry positive on every machine.
        largest_P = vectors_DP.gather(0, vectors_DP.abs().argmax(dim=0, keepdim=True))
        vectors_DP = vectors_DP * largest_P.sign()
        mean_D = mean_D.to(rows.dtype)
        rounding = len(mean_D) * (torch.finfo(rows.dtype).eps * mean_D.abs().max().double()).square()
        kept_P = variance_P > torch.maximum(RANK_TOLERANCE * variance_P[0], rounding)
        kept_P &= torch.arange(n_components, device=kept_P.device) < n_images - 1
        scale_P = torch.where(kept_P, variance_P, 1).rsqrt() * kept_P
        fits = float(scale_P.max()) < SAFE_FLOAT32
        components_DP = (vectors_DP * scale_P).to(rows.dtype if fits else torch.float64)
        explained = float(variance_P.sum()) / max(total_variance, 1e-300)
        self._learned = _Learned(mean_D, components_DP, variance_P, explained)
        self.n_features_in_, self.n_components_ = rows.dim, n_components
        return self

    @overload
    def transform(self, X: Tensor) -> Tensor: ...
    @overload
    def transform(self, X: Any) -> Any: ...
    @true_float32()
    def transform(self, X: Any) -> Any:
        """Return points (N, P) of features (N, D): a float32 tensor of a tensor; float64 if those of the fit were.

        Rows that are not finite become such points.
        """
        features_ND, components_DP = self._rows(X), self.components_DP.to(X.device if isinstance(X, Tensor) else "cpu")
        mean_D = self.mean_D.to(components_DP.device)
        points_NP = components_DP.new_empty(len(features_ND), components_DP.shape[1])
        at_once = max(BLOCK_ROWS, rows_at_once(features_ND))
        for rows, block in zip(points_NP.split(at_once), features_ND.split(at_once), strict=True):
            projected = (block - mean_D).to(components_DP.dtype) @ components_DP
            rows.copy_(normalize(projected) if self.unit_rows else projected)
        return array_like(X, points_NP)

    @overload
    def fit_transform(self, X: Tensor, y: Any = None) -> Tensor: ...
    @overload
    def fit_transform(self, X: Any, y: Any = None) -> Any: ...
    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """`fit`, then `transform` the same rows."""
        return self.fit(X).transform(X)

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
        whitening.n_features_in_, whitening.n_components_ = state["components"].shape
        mean_D, components_DP, variance_P = state["mean"], state["components"], state["variance"]
        whitening._learned = _Learned(mean_D, components_DP, variance_P, float(state["explained"]))
        return whitening


def _from_few(rows: Scatter, n_components: int) -> tuple[int, Tensor, Tensor, Tensor, float]:
    """Learn from fewer rows than features: the N × N products of the rows are faster and give the same."""
    centred_ND, mean_D, scale = rows.centred_block()
    n_images, n_found = len(centred_ND), min(n_components, len(centred_ND))
    gram_NN = torch.zeros(n_images, n_images, dtype=torch.float64, device=rows.device)
    add_lower_product(gram_NN, centred_ND.T, scale)
    gram_NN = mirror_lower(gram_NN).div_(max(1, n_images - 1))
    variance_P, vectors_NP, total_variance = _principal(gram_NN, n_found)
    vectors_DP = normalize(centred_ND.T @ vectors_NP.float(), dim=0).double()
    missing = (0, n_components - n_found)
    return n_images, mean_D, pad(variance_P, missing), pad(vectors_DP, missing), total_variance


def _principal(covariance_DD: Tensor, n_top: int) -> tuple[Tensor, Tensor, float]:
    """Return the largest eigenvalues, their eigenvectors and the sum of all eigenvalues."""
    trace = covariance_DD.trace()
    if not bool(trace.isfinite()):
        raise InputError(TOO_LARGE)
    return *top_eigenvectors(covariance_DD, n_top), float(trace)
