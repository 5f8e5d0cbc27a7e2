"""The clusterers and the whitening as estimators: scikit-learn's own checks, arrays of every kind, numbers of every size."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.exceptions import NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks
from thread_ranks import on_ranks

from deepcluster import InputError
from deepcluster.clustering import (
    Assignment,
    BalancedKMeans,
    Clusterer,
    HierarchicalKMeans,
    KMeans,
    PowerIterationClustering,
    Whitening,
)
from deepcluster.core.distributed import Ranks

CLUSTERERS: list[Clusterer] = [
    KMeans(3, max_iter=100, init="k-means++"),
    BalancedKMeans(3, init="k-means++"),
    HierarchicalKMeans(3, super_clusters=2),
    PowerIterationClustering(n_neighbors=15),
]
# Checks of scikit-learn that are left out, with the reason.
LEFT_OUT = {
    Whitening: {"check_estimators_nan_inf": "`transform` passes rows of NaN on: images that could not be read"},
}


def three_blobs(n: int = 60, dim: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return rows in three well separated blobs, and their numbers."""
    rng = np.random.default_rng(seed)
    true = np.repeat(np.arange(3), n)
    return 10 * rng.standard_normal((3, dim))[true] + 0.2 * rng.standard_normal((3 * n, dim)), true


# scikit-learn's checks


with warnings.catch_warnings(action="ignore", category=UserWarning):
    checks = estimator_checks.parametrize_with_checks(
        [KMeans(), BalancedKMeans(), PowerIterationClustering(), Whitening()],
        expected_failed_checks=lambda estimator: LEFT_OUT.get(type(estimator), {}),
    )


@checks
@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.parametrize("estimator", CLUSTERERS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("memmap", [False, True])
def test_scikit_learn_checks_of_clusterers(estimator: Clusterer, memmap: bool) -> None:
    """`parametrize_with_checks` makes these for subclasses of its own mixin only."""
    name = type(estimator).__name__
    estimator_checks.check_clustering(name, clone(estimator), readonly_memmap=memmap)
    estimator_checks.check_clusterer_compute_labels_predict(name, clone(estimator))


# Pipelines, parameters


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["NumPy", "torch"])
def test_a_pipeline_takes_and_returns_arrays_of_one_kind(kind: Callable[[np.ndarray], Any]) -> None:
    rows, true = three_blobs()
    X, pipeline = kind(rows), make_pipeline(Whitening(2, unit_rows=False), KMeans(3, init="k-means++"))
    labels = pipeline.fit_predict(X)
    assert adjusted_rand_score(true, labels) == 1
    kmeans = pipeline[-1]
    results = [labels, pipeline.predict(X), pipeline.transform(X), kmeans.cluster_centers_, pipeline[0].mean_]
    assert {type(result) for result in results} == {type(X)}
    assert (pipeline.predict(X) == labels).all()
    assert pipeline.transform(X).shape == (len(X), 3)
    assert pipeline.score(X) == pytest.approx(-kmeans.inertia_, rel=1e-5)
    assert repr(pipeline).count("KMeans(n_clusters=3, init='k-means++')") == 1


def test_grid_search_finds_the_number_of_clusters_by_score() -> None:
    rows, _ = three_blobs()
    search = GridSearchCV(make_pipeline(Whitening(), BalancedKMeans()), {"balancedkmeans__n_clusters": [1, 2, 3]}, cv=3)
    assert search.fit(np.random.default_rng(0).permutation(rows)).best_params_ == {"balancedkmeans__n_clusters": 3}


@pytest.mark.parametrize("estimator", [*CLUSTERERS, Whitening(2)], ids=lambda one: type(one).__name__)
def test_clones_have_the_parameters_and_no_result(estimator: Any) -> None:
    fitted = clone(estimator).fit(three_blobs()[0])
    again = clone(fitted)
    assert again.get_params() == estimator.get_params() and repr(again) == repr(estimator)
    with pytest.raises(NotFittedError, match="fit"):
        again.transform(three_blobs()[0])
    with pytest.raises(InputError, match=r"no parameter 'seed'.*: use one of"):
        again.set_params(seed=3)
    assert again.fit(torch.from_numpy(three_blobs()[0])).n_features_in_ == 3


def test_results_are_those_of_scikit_learn() -> None:
    rows, _ = three_blobs()
    init = rows[[0, 60, 120]] + 1
    oracle = SklearnKMeans(3, init=init, n_init=1, tol=0).fit(rows)
    found = KMeans(3, init=init, max_iter=300).fit(rows)
    assert found.labels_.tolist() == oracle.labels_.tolist() and found.n_iter_ == oracle.n_iter_
    np.testing.assert_allclose(found.cluster_centers_, oracle.cluster_centers_, rtol=1e-6)
    np.testing.assert_allclose(found.transform(rows[:9]), oracle.transform(rows[:9]), rtol=1e-5)
    assert found.inertia_ == pytest.approx(oracle.inertia_, rel=1e-6)
    assert found.score(rows[::2]) == pytest.approx(oracle.score(rows[::2]), rel=1e-6)
    assert found.cluster_centers_.dtype == found.transform(rows).dtype == np.float64
    assert KMeans(3).fit(rows.astype(np.float32)).cluster_centers_.dtype == np.float32


@pytest.mark.parametrize("random_state", [None, np.random.default_rng(0), np.random.RandomState(0), np.int64(3)], ids=str)
def test_every_random_state_of_numpy_is_taken(random_state: Any) -> None:
    assert KMeans(3, random_state=random_state).fit(three_blobs()[0]).labels_.max() == 2


# Numbers of every size


def far_data() -> dict[str, np.ndarray]:
    """Rows in three groups, which float32 can't tell apart, or whose squares it can't hold."""
    rows = three_blobs()[0]
    nanoseconds = (1_700_000_000_000_000_000 + rows * 1e9).astype(np.int64)
    return {
        "seconds since 1970": 1.7e9 + rows,
        "nanoseconds since 1970": nanoseconds,
        "metres": np.array([5e5, 5.4e6, 300]) + rows / 10,
        "columns of other sizes": np.array([1e30, 1e30, 1]) + rows * np.array([1e20, 1e20, 1]),
        "huge": rows * 1e30,
        "huge float32": (rows * 1e30).astype(np.float32),
        "beyond squares of float64": rows * 1e200,
        "tiny": rows * 1e-30,
        "tiny float32": (rows * 1e-30).astype(np.float32),
        "not normal in float32": (rows * 1e-42).astype(np.float32),
    }


@pytest.mark.parametrize("estimator", CLUSTERERS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("what", far_data())
def test_numbers_of_every_size_are_clustered(what: str, estimator: Clusterer) -> None:
    rows, true = far_data()[what], three_blobs()[1]
    found = clone(estimator).fit(rows)
    assert adjusted_rand_score(true, found.labels_) == 1
    assert adjusted_rand_score(true, found.predict(rows)) == 1
    means = np.array([rows[found.labels_ == label].mean(axis=0, dtype=np.float64) for label in range(3)])
    spread = np.ptp(rows.astype(np.float64), axis=0)
    np.testing.assert_allclose((found.cluster_centers_ - means) / spread, 0, atol=1e-5)
    assert (found.transform(rows[:5]).argmin(axis=1) == found.predict(rows[:5])).all()


def test_an_outlier_does_not_hide_the_others() -> None:
    rows, true = 1.7e9 + three_blobs()[0], three_blobs()[1]
    rows[7] = 0
    labels = KMeans(4, init=rows[[7, 0, 60, 120]]).fit(rows).labels_
    assert (labels == labels[7]).sum() == 1
    assert adjusted_rand_score(np.delete(true, 7), np.delete(labels, 7)) == 1


@pytest.mark.parametrize("what", ["seconds since 1970", "huge float32", "tiny"])
@pytest.mark.parametrize("estimator", CLUSTERERS, ids=lambda one: type(one).__name__)
def test_rows_over_ranks_have_one_frame(what: str, estimator: Clusterer) -> None:
    """As many as one process finds, though a rank has no rows and the others see different ranges."""
    rows = torch.from_numpy(far_data()[what])
    expected = estimator.cluster(rows)

    def work(mine: slice, ranks: Ranks) -> Assignment:
        return estimator.cluster(rows[mine], ranks=ranks)

    found = on_ranks([slice(0, 70), slice(70, 70), slice(70, 180)], work)
    assert torch.equal(torch.cat([part.labels_N for part in found]), expected.labels_N)
    for part in found:
        torch.testing.assert_close(part.centroids_KP, expected.centroids_KP, rtol=1e-9, atol=0)


def test_directions_of_float64_rows_are_taken_before_they_are_rounded() -> None:
    rows, _ = three_blobs()
    for scale in (1e-30, 1e30, 1e200):
        found = KMeans(3, init="k-means++", spherical=True).fit(rows * scale)
        assert found.labels_.tolist() == KMeans(3, init="k-means++", spherical=True).fit(rows).labels_.tolist()
        np.testing.assert_allclose(np.linalg.norm(found.cluster_centers_, axis=1), 1, rtol=1e-5)
        assert (found.predict(rows * scale) == found.labels_).all() and found.transform(rows * scale).max() <= 2.0001


# Arrays of every kind


ROWS = three_blobs(20)[0]
KINDS: dict[str, Callable[[], Any]] = {
    "list": ROWS.tolist,
    "DataFrame": lambda: pd.DataFrame(ROWS, columns=list("abc")),
    "DataFrame of mixed numbers": lambda: pd.DataFrame({"a": ROWS[:, 0], "b": ROWS[:, 1].astype(np.float32), "c": 1}),
    "Fortran order": lambda: np.asfortranarray(ROWS),
    "reversed": lambda: ROWS[::-1, ::-1],
    "other byte order": lambda: ROWS.astype(">f8"),
    "objects": lambda: ROWS.astype(object),
    "float16": lambda: ROWS.astype(np.float16),
    "long double": lambda: ROWS.astype(np.longdouble),
    "booleans": lambda: ROWS > 0,
    "small whole numbers": lambda: (ROWS * 5).astype(np.int8),
    "bfloat16 tensor": lambda: torch.from_numpy(ROWS).bfloat16(),
    "tensor with gradient": lambda: torch.from_numpy(ROWS).requires_grad_(),
    "strided tensor": lambda: torch.from_numpy(np.repeat(ROWS, 2, axis=1))[:, ::2],
    "tensor of whole numbers": lambda: torch.from_numpy((ROWS * 5).astype(np.int64)),
    "boolean tensor": lambda: torch.from_numpy(ROWS > 0),
}
ESTIMATORS: list[Any] = [*CLUSTERERS, Whitening(2)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_every_kind_are_taken(kind: str, estimator: Any) -> None:
    X, one = KINDS[kind](), clone(estimator)
    result = one.fit_transform(X)
    assert len(result) == len(ROWS) and np.isfinite(np.asarray(result)).all()
    assert isinstance(result, torch.Tensor) == isinstance(X, torch.Tensor)
    assert one.n_features_in_ == 3


def test_arrays_that_can_not_be_written_are_left_alone(tmp_path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    with warnings.catch_warnings(action="error"):
        assert KMeans(3).fit(mapped).labels_.tolist() == KMeans(3).fit(ROWS.copy()).labels_.tolist()
    assert (np.load(tmp_path / "rows.npy") == ROWS).all()


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "one row": (lambda: np.ones(5), "Reshape your data"),
    "one row as a tensor": (lambda: torch.ones(5), r"\(5,\) are no table .* reshape"),
    "three dimensions": (lambda: torch.ones(5, 2, 2), "no table"),
    "a number": (lambda: 3.0, "2D array"),
    "nothing": (lambda: None, "nan"),
    "no rows": (lambda: np.ones((0, 3)), r"0 sample\(s\)"),
    "no rows in a tensor": (lambda: torch.ones(0, 3), "no rows"),
    "no columns": (lambda: np.ones((3, 0)), r"0 feature\(s\)"),
    "no columns in a tensor": (lambda: torch.ones(3, 0), "no columns"),
    "complex": (lambda: np.ones((5, 2), dtype=complex), "Complex data not supported"),
    "complex tensor": (lambda: torch.ones(5, 2, dtype=torch.complex64), "complex numbers"),
    "sparse tensor": (lambda: torch.eye(5).to_sparse(), "dense"),
    "words": (lambda: [["a", "b"]] * 9, "convert string|could not convert"),
    "rows of unequal length": (lambda: [[1.0, 2], [3.0]], "inhomogeneous|sequence"),
}


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_table_of_numbers_is_told(fault: str, estimator: Any) -> None:
    make, told = FAULTS[fault]
    with pytest.raises(InputError, match=told) as raised:
        clone(estimator).fit(make())
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("estimator", "told"),
    [
        (KMeans(0), "clusters=0 must be between 1 and the 60 points"),
        (KMeans(61), "clusters=61 .*n_samples=60"),
        (KMeans(2.5), "clusters=2.5 must be a whole number"),  # type: ignore[arg-type]
        (KMeans("3"), "clusters='3' must be a whole number"),  # type: ignore[arg-type]
        (KMeans(3, max_iter=-1), "max_iter=-1 must be 0 or more"),
        (KMeans(3, tol=-1), "tol=-1 must be"),
        (KMeans(3, init="kmeans++"), r"unknown init 'kmeans\+\+' \(did you mean k-means\+\+\?\)"),
        (KMeans(3, init=np.ones((3, 2))), r"init has shape \(3, 2\), not \(3, 3\)"),
        (KMeans(3, init=torch.full((3, 3), torch.nan)), "init holds numbers that are not finite"),
        (KMeans(3, init=len), "init must be one of"),  # type: ignore[arg-type]
        (KMeans(3, random_state=-1), "random_state=-1 must be"),
        (KMeans(3, random_state="now"), "random_state='now' must be"),
        (BalancedKMeans(3, spread=1), "spread=1 must be"),
        (HierarchicalKMeans(3, super_clusters=0), "super_clusters=0 must be 1 or more"),
        (PowerIterationClustering(n_neighbors=60), "at least 61 images"),
        (PowerIterationClustering(sigma="wide"), "sigma='wide' must be above 0"),  # type: ignore[arg-type]
        (Whitening(4), r"n_components .*=4 must be between 1 and the 3 features"),
        (Whitening(1.5), r"n_components .*=1.5 must be a whole number"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_parameters_out_of_range_are_told(estimator: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        estimator.fit(ROWS)


@pytest.mark.parametrize("estimator", CLUSTERERS, ids=lambda one: type(one).__name__)
def test_rows_that_are_not_finite_stay_without_a_cluster(estimator: Clusterer) -> None:
    rows = three_blobs()[0]
    holes = rows.copy()
    holes[[0, 5], [1, 2]] = np.nan, np.inf
    found = clone(estimator).fit(holes)
    assert found.labels_[[0, 5]].tolist() == [-1, -1] and (np.delete(found.labels_, [0, 5]) >= 0).all()
    assert found.predict(holes[:6])[[0, 5]].tolist() == [-1, -1]
    assert np.isfinite(found.score(holes)) and np.isnan(found.transform(holes)[0]).all()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["NumPy", "torch"])
def test_other_columns_than_those_of_the_fit_are_told(estimator: Any, kind: Callable[[np.ndarray], Any]) -> None:
    fitted = clone(estimator).fit(kind(ROWS))
    with pytest.raises(InputError, match=r"X has 2 features, but .* is expecting 3 features as input"):
        fitted.transform(kind(ROWS[:, :2]))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30, -1e-30])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, partial(KMeans, 2, init="k-means++")], ids=str)
def test_equal_rows_make_one_cluster(estimator: Any, value: float) -> None:
    found = (estimator() if callable(estimator) else clone(estimator)).fit(torch.full((40, 4), value))
    if isinstance(found, Clusterer) and not isinstance(found, BalancedKMeans | HierarchicalKMeans):
        assert len(found.labels_.unique()) == 1 and found.inertia_ == 0
