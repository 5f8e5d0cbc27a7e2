"""The clusterers and the whitening as estimators of scikit-learn: parameters, `fit`, `predict`, arrays in and out.

They have what scikit-learn asks of an estimator without its base class: to import it takes as long as half of torch, which
every command would wait for. It is imported for arrays that are no tensors, which it checks.

N rows on this rank, M other rows, P components, K clusters.
"""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.frame import check_table
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.work import Advance, no_advance


class ArgumentError(InputError, ValueError):
    """An argument of an estimator can't be used; a ValueError, too, as those of scikit-learn."""


class Estimator:
    """Parameters, and rows from any kind of array, in the manner of scikit-learn.

    A constructor stores its arguments under their names and checks nothing. Results of `fit` have names that end in `_`.
    """

    estimator_type: ClassVar[str | None] = None
    allows_nan: ClassVar[bool] = True

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {name: argument.default for name, argument in inspect.signature(cls).parameters.items()}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by their names; `deep` changes nothing."""
        return {name: getattr(self, name) for name in self._defaults()}

    def set_params(self, **params: Any) -> Self:
        """Set parameters; return the estimator.

        Raises:
            ArgumentError: there is no such parameter.
        """
        known = self._defaults()
        for name, value in params.items():
            if name not in known:
                hint = f"{did_you_mean(name, known)}: use one of {', '.join(known)}"
                raise ArgumentError(f"{type(self).__name__} has no parameter {name!r}{hint}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        changed = [
            (name, value) for name, value in self.get_params().items() if not _is_default(value, self._defaults()[name])
        ]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=self.estimator_type,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=["float64", "float32"]),
            input_tags=InputTags(allow_nan=self.allows_nan),
        )

    def _rows(self, X: Any, *, reset: bool = False) -> Tensor:
        """Return the rows of a tensor, or of whatever scikit-learn takes for an array; `reset`: those of a fit.

        Raises:
            ArgumentError: not a table of numbers, or not with the columns of the fit.
        """
        if not reset and not hasattr(self, "n_features_in_"):
            from sklearn.exceptions import NotFittedError

            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call `fit` first")
        if not isinstance(X, Tensor):
            return self._rows_of_array(X, reset=reset)
        with as_argument_error():
            rows = check_table(X)
        if reset:
            self.n_features_in_ = rows.shape[1]
            self.__dict__.pop("feature_names_in_", None)
        elif rows.shape[1] != self.n_features_in_:
            what = f"X has {rows.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features"
            raise ArgumentError(f"{what} as input")
        return rows

    def _rows_of_array(self, X: Any, *, reset: bool) -> Tensor:
        from sklearn.utils.validation import validate_data

        kinds = [np.float64, np.float32, np.float16]  # Others become float64.
        try:
            array = validate_data(self, X, reset=reset, dtype=kinds, order="C", ensure_all_finite=False)
        except ValueError as fault:
            raise ArgumentError(str(fault)) from None
        with warnings.catch_warnings(action="ignore"):  # Nothing is written into an array that is not writable.
            return torch.from_numpy(array)


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and isinstance(value, int | float | str) and value == default)


def array_like(X: Any, result: Tensor) -> Any:
    """Return a result as what X is: a tensor on its device, or a NumPy array."""
    return result.to(X.device) if isinstance(X, Tensor) else result.numpy()


@contextmanager
def as_argument_error(rows: Tensor | None = None) -> Iterator[None]:
    """Raise an `InputError` as an `ArgumentError` that also gives the shape of the rows."""
    try:
        yield
    except InputError as fault:
        shape = "" if rows is None else f" (n_samples={len(rows)}, n_features={rows.shape[1]})"
        raise ArgumentError(f"{fault}{shape}") from None


def check_count(name: str, value: Any, *, least: int = 1, most: int | None = None, of: str = "points") -> None:
    """Check a parameter that counts something.

    Raises:
        InputError: it is no whole number, or out of its range.
    """
    if not isinstance(value, Integral):
        raise InputError(f"{name}={value!r} must be a whole number")
    if most is not None and not least <= value <= most:  # type: ignore[operator]
        raise InputError(f"{name}={value} must be between {least} and the {most} {of}")
    if value < least:
        raise InputError(f"{name}={value} must be {least} or more")


class Clusterer(Estimator, ABC):
    """What a clusterer offers: `cluster` is the algorithm; the rest of this class makes an estimator of it.

    Attributes (after `fit`, as arrays of the kind that was passed):
        labels_: cluster of each row, int64; -1 for a row that is not finite.
        cluster_centers_: (K, P).
        inertia_: sum of the squared distances to the centroids.
        n_iter_: number of iterations.
        assignment_: the `Assignment`, with measures of the clusters.
        explanation: how it works, in one or two plain sentences.
    """

    explanation: ClassVar[str]
    estimator_type = "clusterer"
    max_iter: int
    random_state: Any = 0

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Any) -> Self:
        """Build it from a run's settings: `n_clusters`, `kmeans_iterations`, `super_clusters`."""

    @classmethod
    @abstractmethod
    def describe(cls, settings: Any) -> str:
        """Return the clusters that these settings ask for in a few words: "10,000 clusters"."""

    @property
    @abstractmethod
    def most_steps(self) -> int:
        """Largest number of units that `cluster` passes to `advance`."""

    @abstractmethod
    def cluster(
        self, points_NP: Tensor, *, seed: int = 0, ranks: Ranks = ONE_PROCESS, advance: Advance = no_advance
    ) -> Assignment:
        """Cluster the points of all ranks; return the assignment of the points of this rank. Nothing is kept.

        Args:
            points_NP: of any type of numbers. Rows that are not finite stay unassigned: label -1, distance NaN.
            seed: fixes the result.
            ranks: the processes over which the rows are split, in the order of the ranks.
            advance: called equally often on all ranks; may raise to stop.
        """

    def fit(self, X: Any, y: Any = None) -> Self:
        """Cluster the rows of a tensor or array (N, P); return the estimator. `y` is not used.

        Raises:
            ArgumentError: not a table of numbers, or a parameter that does not fit it.
        """
        rows_NP, steps = self._rows(X, reset=True), list[int]()
        with as_argument_error(rows_NP):
            found = self.cluster(rows_NP, seed=seed_from(self.random_state), advance=steps.append)
        self.assignment_ = found
        self.labels_, self.cluster_centers_ = array_like(X, found.labels_N), array_like(X, found.centroids_KP)
        self.inertia_, self.n_iter_ = found.inertia, self._iterations(found, sum(steps))
        return self

    def fit_predict(self, X: Any, y: Any = None) -> Any:
        """Cluster the rows; return the cluster (N) of each."""
        return self.fit(X).labels_

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """Cluster the rows; return their distances (N, K) to all centroids."""
        return self.fit(X).transform(X)

    def predict(self, X: Any) -> Any:
        """Return the nearest centroid (M) of each row; -1 where a row is not finite.

        Rows of the fit may be in another cluster (`labels_`) if the clusters are balanced, or those of a graph.
        """
        rows_MP = self._placed(X)
        return array_like(X, self.assignment_.predict(rows_MP))

    def transform(self, X: Any) -> Any:
        """Return the distances (M, K) of each row to all centroids."""
        rows_MP = self._placed(X)
        return array_like(X, self.assignment_.transform(rows_MP))

    def score(self, X: Any, y: Any = None) -> float:
        """Return minus the sum of the squared distances of the rows to their nearest centroids."""
        rows_MP = self._placed(X)
        _, squared_M = self.assignment_.nearest(rows_MP[rows_MP.isfinite().all(dim=1)])
        return -float(squared_M.sum(dtype=torch.float64))

    def _placed(self, X: Any) -> Tensor:
        """Return rows where the centroids are."""
        return self._rows(X)

    def _iterations(self, found: Assignment, steps: int) -> int:
        """Return `n_iter_`, given the result and the units that `advance` got."""
        return min(len(found.inertia_history), self.max_iter)


def seed_from(random_state: Any) -> int:
    """Return a seed, drawn if it is none yet: from NumPy's own generator (None), or from the given one.

    Raises:
        InputError: it is something else, or negative.
    """
    if isinstance(random_state, Integral) and 0 <= int(random_state) < 2**63:
        return int(random_state)
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(2**31))
    if random_state is None or isinstance(random_state, np.random.RandomState):
        return int((random_state or np.random).randint(2**31 - 1))
    raise InputError(f"random_state={random_state!r} must be a whole number from 0, None, or a generator of NumPy")
