"""The search for nearest centroids against NumPy: each kind of product, unkind data, subsets, ties, bounds, block sizes.

N points, P components, K centroids, C of them in a search. Two oracles: all distances in float64, and all distances in
float32, one centroid at a time, which the labels have to follow bit for bit, whatever the coarse product was.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from gpu_path import as_on_a_gpu, plain_best_two
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering import nearest as module
from deepcluster.clustering import parallel
from deepcluster.clustering.nearest import (
    Nearest,
    NearestSearch,
    first_of_equals,
    nearest_centroids,
    round_rows,
    squared_distances,
)

KINDS = [torch.int8, torch.bfloat16, torch.float32]


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


def whole(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=g).float()


def one_hot(g: torch.Generator, n: int, dim: int) -> Tensor:
    return torch.eye(dim)[torch.randint(dim, (n,), generator=g)]


def drawn(g: torch.Generator, rows_NP: Tensor, n: int) -> Tensor:
    return rows_NP[torch.randint(len(rows_NP), (n,), generator=g)]


def outliers(g: torch.Generator, n: int, dim: int) -> Tensor:
    """One row in fifty is a thousand times as long."""
    return normal(g, n, dim) * torch.where(torch.rand(n, 1, generator=g) < 0.02, 1e3, 1.0)


def families(g: torch.Generator, centroids_KP: Tensor, share: float) -> Tensor:
    """Centroids in families of about five that differ by this share of their length."""
    parents_KP = drawn(g, centroids_KP[: -(-len(centroids_KP) // 5)], len(centroids_KP))
    return parents_KP * (1 + share * normal(g, *parents_KP.shape))


def far_one(g: torch.Generator, centroids_KP: Tensor) -> Tensor:
    centroids_KP[len(centroids_KP) // 2] *= 1e5
    return centroids_KP


def along(g: torch.Generator, n: int, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Numbers that bf16 holds exactly, centroids along the points: the product's rounding is the whole error."""
    points_NP = normal(g, -(-n // 2), dim).bfloat16().float()
    centroids_KP = points_NP[torch.arange(k) % len(points_NP)] * (1 + 0.01 * normal(g, k, 1))
    return torch.cat([points_NP, -points_NP])[:n], centroids_KP.bfloat16().float()


Data = Callable[[torch.Generator, int, int, int], tuple[Tensor, Tensor]]
DATA: dict[str, Data] = {
    "normal": lambda g, n, k, dim: (normal(g, n, dim), normal(g, k, dim)),
    "offset 1e3": lambda g, n, k, dim: (normal(g, n, dim) + 1e3, normal(g, k, dim) + 1e3),
    "offset 1e4": lambda g, n, k, dim: (normal(g, n, dim) + 1e4, normal(g, k, dim) + 1e4),
    "scale 1e-6": lambda g, n, k, dim: (normal(g, n, dim) * 1e-6, normal(g, k, dim) * 1e-6),
    "scale 1e6": lambda g, n, k, dim: (normal(g, n, dim) * 1e6, normal(g, k, dim) * 1e6),
    "outliers": lambda g, n, k, dim: (outliers(g, n, dim), outliers(g, k, dim)),
    "unequal lengths": lambda g, n, k, dim: (normal(g, n, dim) * torch.logspace(-3, 3, n)[:, None], normal(g, k, dim)),
    "unit rows": lambda g, n, k, dim: (normalize(normal(g, n, dim)), normalize(normal(g, k, dim))),
    "one-hot": lambda g, n, k, dim: (one_hot(g, n, dim), one_hot(g, k, dim)),
    "whole numbers": lambda g, n, k, dim: (whole(g, n, dim), whole(g, k, dim)),
    "two values": lambda g, n, k, dim: (normal(g, n, dim).sign(), 0.5 * normal(g, k, dim).sign()),
    "all rows equal": lambda g, n, k, dim: (normal(g, 1, dim).repeat(n, 1), normal(g, k, dim)),
    "all zeros": lambda g, n, k, dim: (torch.zeros(n, dim), torch.zeros(k, dim)),
    "zeros, then centroids": lambda g, n, k, dim: (torch.zeros(n, dim), normal(g, k, dim)),
    "far centroids": lambda g, n, k, dim: (normal(g, n, dim), normal(g, k, dim) + 1e4),
    "one far centroid": lambda g, n, k, dim: (normal(g, n, dim), far_one(g, normal(g, k, dim))),
    "beside far centroids": lambda g, n, k, dim: (
        (c := 1e3 * normal(g, k, dim))[torch.arange(n) % k] + normal(g, n, dim),
        c,
    ),
    "close families 1e-3": lambda g, n, k, dim: (normal(g, n, dim), families(g, normal(g, k, dim), 1e-3)),
    "close families 1e-5": lambda g, n, k, dim: (normal(g, n, dim), families(g, normal(g, k, dim), 1e-5)),
    "equal centroids": lambda g, n, k, dim: (normal(g, n, dim), families(g, normal(g, k, dim), 0.0)),
    "points are centroids": lambda g, n, k, dim: ((rows := normal(g, n, dim)), drawn(g, rows, k)),
    "along, exact in bf16": along,
}


@dataclass(frozen=True)
class Case:
    """Points, centroids and all distances between them: in float32, each bit as it must be, and in float64."""

    points_NP: Tensor
    centroids_KP: Tensor
    single_NK: np.ndarray
    double_NK: np.ndarray

    def known(self, which: str) -> Tensor:
        """Labels to start a search from: the nearest, the farthest or any centroid of each point."""
        if which == "best":
            return torch.from_numpy(self.single_NK.argmin(axis=1))
        if which == "worst":
            return torch.from_numpy(self.single_NK.argmax(axis=1))
        return torch.randint(self.single_NK.shape[1], (len(self.points_NP),), generator=torch.Generator().manual_seed(3))

    def search(self, kind: torch.dtype) -> NearestSearch:
        search = NearestSearch(self.points_NP, kind=kind)
        search.use(self.centroids_KP)
        return search


@cache
def case(name: str, n: int, k: int, dim: int, seed: int = 0) -> Case:
    points_NP, centroids_KP = DATA[name](torch.Generator().manual_seed(seed), n, k, dim)
    single = [squared_distances(points_NP, centroid_P.expand_as(points_NP)).numpy() for centroid_P in centroids_KP]
    points, centroids = points_NP.double().numpy(), centroids_KP.double().numpy()
    double = [((points - centroid) ** 2).sum(axis=1) for centroid in centroids]
    return Case(points_NP, centroids_KP, np.stack(single, axis=1), np.stack(double, axis=1))


def check(found: Nearest, case: Case, allowed_NK: np.ndarray | None = None) -> None:
    """The nearest among those allowed, the lower number where two are equally near; bounds below all the others."""
    single_NK, double_NK = case.single_NK, case.double_NK
    if allowed_NK is not None:
        single_NK, double_NK = (np.where(allowed_NK, squares, np.inf) for squares in (single_NK, double_NK))
    labels, every = found.labels_R.numpy(), np.arange(len(single_NK))
    np.testing.assert_array_equal(labels, single_NK.argmin(axis=1))
    np.testing.assert_array_equal(found.squared_R, single_NK.min(axis=1))
    # A last digit or two is all that float32 may lose: where the second is further off than that, it can't be the label.
    np.testing.assert_allclose(found.squared_R, double_NK[every, labels], rtol=1e-5)
    assert (double_NK[every, labels] <= double_NK.min(axis=1) * (1 + 1e-5)).all()
    # A centroid that equals one before it is not searched, and has no part in the bound.
    others_NK = np.where(naive_first_of_equals(case.centroids_KP), single_NK, np.inf)
    others_NK[every, labels] = np.inf
    assert (found.others_R.numpy() <= others_NK.min(axis=1)).all()


def known_search(case: Case, kind: torch.dtype, labels_N: Tensor, columns_C: Tensor | None = None) -> Nearest:
    search = case.search(kind)
    return search.search(None, columns_C, (labels_N, search.squared_distances(slice(None), labels_N)))


def allowed(case: Case, labels_N: Tensor, columns_C: Tensor) -> np.ndarray:
    allowed_NK = np.zeros(case.single_NK.shape, dtype=bool)
    allowed_NK[:, columns_C] = True
    allowed_NK[np.arange(len(labels_N)), labels_N] = True
    return allowed_NK


# Against the oracles


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", DATA)
def test_unkind_data(name: str, kind: torch.dtype) -> None:
    """From nothing, and from the nearest, the farthest and any centroid."""
    data = case(name, 300, 100, 32)
    check(data.search(kind).search(), data)
    for which in ("best", "worst", "any"):
        check(known_search(data, kind, data.known(which)), data)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "dim"),
    [(1, 1, 16), (1, 70, 17), (50, 1, 16), (40, 64, 17), (40, 65, 16), (20, 200, 16), (150, 130, 256), (60, 90, 1000)],
)
def test_shapes(n: int, k: int, dim: int, kind: torch.dtype) -> None:
    """One point, one centroid, groups of 64 that are full and not, more centroids than points."""
    for name in ("normal", "whole numbers", "outliers", "close families 1e-5", "along, exact in bf16"):
        data = case(name, n, k, dim)
        check(data.search(kind).search(), data)
        check(known_search(data, kind, data.known("any")), data)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(DATA)),
    n=st.integers(1, 40),
    k=st.integers(1, 140),
    dim=st.integers(16, 48),
    seed=st.integers(0, 10_000),
    which=st.sampled_from(["best", "worst", "any"]),
)
def test_any_shape_any_data(name: str, n: int, k: int, dim: int, seed: int, which: str) -> None:
    data = case.__wrapped__(name, n, k, dim, seed)
    for kind in KINDS:
        check(data.search(kind).search(), data)
        check(known_search(data, kind, data.known(which)), data)
    check(Fused(data.points_NP, data.centroids_KP).search(), data)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(1, 80), dim=st.integers(1, 15), seed=st.integers(0, 10_000))
@example(n=400, k=128, dim=2, seed=0)
def test_few_components(n: int, k: int, dim: int, seed: int) -> None:
    """Where 8-bit products are not made."""
    for name in ("normal", "whole numbers", "along, exact in bf16"):
        data = case.__wrapped__(name, n, k, dim, seed)
        for kind in KINDS[1:]:
            check(data.search(kind).search(), data)
        check(Fused(data.points_NP, data.centroids_KP).search(), data)


def test_ties_go_to_the_lower_number_by_hand() -> None:
    """Whole numbers, so that scores are exact: (0, 0) is as near to four centroids, and two of them are the same."""
    centroids_KP = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    points_NP = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-5.0, 0.0]]).repeat(300, 1)
    labels_N, squared_N = nearest_centroids(points_NP, centroids_KP)
    assert labels_N.reshape(300, 4).unique(dim=0).tolist() == [[1, 1, 0, 3]]
    assert squared_N.reshape(300, 4).unique(dim=0).tolist() == [[1, 0, 1, 16]]


# The fused path, which a GPU takes, with plain torch in place of the Triton kernel


class Fused(NearestSearch):
    """Counts the points that are searched again."""

    def __init__(self, points_NP: Tensor, centroids_KP: Tensor) -> None:
        super().__init__(points_NP, best_two=plain_best_two)
        self.use(centroids_KP)
        self.n_again = 0

    def _settle_in_float32(self, found: Nearest, rows: slice | Tensor, some: Tensor) -> None:
        self.n_again += len(some)
        super()._settle_in_float32(found, rows, some)


@pytest.mark.parametrize("name", DATA)
def test_the_fused_path_on_unkind_data(name: str) -> None:
    data = case(name, 300, 100, 32)
    check(Fused(data.points_NP, data.centroids_KP).search(), data)


@pytest.mark.parametrize(("n", "k", "dim"), [(1, 1, 1), (1, 70, 33), (2, 63, 33), (65, 1, 300), (65, 129, 300)])
def test_the_fused_path_on_odd_shapes(n: int, k: int, dim: int) -> None:
    """One point, one centroid, fewer centroids than a tile, components that fill no group of 16."""
    data = case("normal", n, k, dim)
    check(Fused(data.points_NP, data.centroids_KP).search(), data)


def test_the_fused_path_where_no_point_is_contested() -> None:
    """As at the end of every k-means: no point needs a second look, and none is given one."""
    data = case("beside far centroids", 300, 100, 32)
    search = Fused(data.points_NP, data.centroids_KP)
    check(search.search(), data)
    assert search.n_again == 0


def test_the_fused_path_where_all_points_are_contested() -> None:
    """Centroids that 16 bits can't tell apart: every point is searched again."""
    data = case("close families 1e-5", 300, 100, 32)
    search = Fused(data.points_NP, data.centroids_KP)
    check(search.search(), data)
    assert search.n_again == 300


def test_few_points_are_contested_in_16_bits() -> None:
    """Random unit rows, to which centroids are as equally near as they get."""
    data = case("unit rows", 2000, 500, 256)
    search = Fused(data.points_NP, data.centroids_KP)
    check(search.search(), data)
    assert 0 < search.n_again < 0.05 * 2000


def test_the_fused_path_is_the_one_of_a_gpu() -> None:
    with as_on_a_gpu():
        assert NearestSearch(torch.randn(5, 3)).best_two is plain_best_two
        assert NearestSearch(torch.randn(5, 3), kind=torch.float32).best_two is None


def test_the_fused_path_for_some_rows() -> None:
    data = case("unit rows", 300, 100, 32)
    rows = torch.arange(0, 300, 7)
    found, every = (Fused(data.points_NP, data.centroids_KP).search(part) for part in (rows, None))
    assert torch.equal(found.labels_R, every.labels_R[rows])
    assert torch.equal(found.squared_R, every.squared_R[rows])


@pytest.mark.parametrize("best_two", [None, plain_best_two])
def test_no_rows(best_two: module.BestTwo | None) -> None:
    """No points, none of the points, and a block without any: nothing is found, and nothing fails."""
    for points_NP in (torch.empty(0, 16), torch.randn(20, 16)):
        search = NearestSearch(points_NP, best_two=best_two)
        search.use(torch.randn(5, 16))
        none = torch.empty(0, dtype=torch.int64)
        assert len(search.search(none).labels_R) == 0
        assert len(search.search(none, None, (none, torch.empty(0))).labels_R) == 0
        for known in (None, (none, torch.empty(0))):
            part = module._Columns(search, None, torch.bfloat16).search(none, known)
            assert part is not None
            assert len(part.labels_R) == len(part.squared_R) == len(part.others_R) == 0


# Some of the rows, some of the centroids


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "name", ["normal", "whole numbers", "one far centroid", "outliers", "close families 1e-5", "one-hot"]
)
def test_some_centroids(name: str, kind: torch.dtype) -> None:
    """With and without a point's own centroid; of equal centroids the first is always among them."""
    data = case(name, 200, 100, 32)
    first_K = naive_first_of_equals(data.centroids_KP)
    labels_N = data.known("any")
    for n_columns in (1, 10, 64, 99):
        some = torch.randperm(100, generator=torch.Generator().manual_seed(n_columns))[:n_columns]
        columns_C = some[torch.tensor(first_K)[some]].sort().values
        check(known_search(data, kind, labels_N, columns_C), data, allowed(data, labels_N, columns_C))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ["normal", "equal centroids", "whole numbers", "all zeros"])
@pytest.mark.parametrize("n_moved", [1, 30, 99])
def test_centroids_that_moved_against_the_nearest_of_the_rest(name: str, kind: torch.dtype, n_moved: int) -> None:
    """As Lloyd does it: the nearest among those that rest is known; comparing it with the others finds the nearest."""
    data = case(name, 200, 100, 32)
    moved_K = np.zeros(100, dtype=bool)
    moved_K[torch.randperm(100, generator=torch.Generator().manual_seed(n_moved))[:n_moved]] = True
    labels_N = torch.from_numpy(np.where(moved_K, np.inf, data.single_NK).argmin(axis=1))
    columns_C = torch.from_numpy(moved_K.nonzero()[0])
    found = known_search(data, kind, labels_N, columns_C)
    rest_NK = np.where(moved_K, np.inf, data.single_NK)
    rest_NK[np.arange(200), labels_N] = np.inf
    rest_N = torch.from_numpy(rest_NK.min(axis=1).astype(np.float32))
    check(replace(found, others_R=torch.minimum(found.others_R, rest_N)), data)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_some_rows(kind: torch.dtype) -> None:
    data = case("normal", 300, 100, 32)
    search, labels_N = data.search(kind), data.known("any")
    whole = search.search()
    for n_rows in (0, 1, 7, 299):
        rows_R = torch.randperm(300, generator=torch.Generator().manual_seed(n_rows))[:n_rows].sort().values
        known = labels_N[rows_R], search.squared_distances(rows_R, labels_N[rows_R])
        for found in (search.search(rows_R), search.search(rows_R, None, known)):
            assert torch.equal(found.labels_R, whole.labels_R[rows_R])
            assert torch.equal(found.squared_R, whole.squared_R[rows_R])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_centroids_leave_what_is_known(kind: torch.dtype) -> None:
    """Nor does one that equals a lower number's: it can't win, and none is left to search."""
    data = case("all zeros", 50, 20, 16)
    labels_N, squared_N = torch.arange(50) % 20, torch.linspace(0, 1, 50)
    for columns_C in (torch.empty(0, dtype=torch.int64), torch.tensor([3, 5])):
        found = data.search(kind).search(None, columns_C, (labels_N, squared_N))
        assert torch.equal(found.labels_R, labels_N)
        assert torch.equal(found.squared_R, squared_N)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_points(kind: torch.dtype) -> None:
    search = NearestSearch(torch.empty(0, 16), kind=kind)
    search.use(torch.randn(5, 16))
    assert len(search.search().labels_R) == 0


def test_another_set_of_centroids_forgets_the_first() -> None:
    data, other = case("normal", 300, 100, 32), case("normal", 300, 70, 32, 5)
    for kind in KINDS:
        search = data.search(kind)
        search.search()
        search.use(other.centroids_KP)
        fresh = NearestSearch(data.points_NP, kind=kind)
        fresh.use(other.centroids_KP)
        assert torch.equal(search.search().labels_R, fresh.search().labels_R)


# Nothing but speed depends on the blocks, or on how the points lie in memory


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ["normal", "outliers", "whole numbers", "unequal lengths"])
def test_size_of_blocks_changes_nothing(name: str, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    data = case(name, 90, 70, 32)
    first, again = data.search(kind).search(), known_search(data, kind, data.known("any"))
    for scores, least, rows in ((1, 1, 1), (1, 3, 7), (1 << 10, 1, 64), (1 << 30, 128, 1 << 20)):
        monkeypatch.setattr(module, "BLOCK_SCORES", scores)
        monkeypatch.setattr(module, "LEAST_BLOCK_ROWS", least)
        monkeypatch.setattr(parallel, "BLOCK_ROWS", rows)
        for found, expected in ((data.search(kind).search(), first), (known_search(data, kind, data.known("any")), again)):
            assert torch.equal(found.labels_R, expected.labels_R)
            assert torch.equal(found.squared_R, expected.squared_R)
            check(found, data)


@pytest.mark.parametrize("dim", [3, 33, 256])
def test_rows_need_not_be_contiguous(dim: int) -> None:
    data = case("normal", 300, 50, dim)
    labels_N, squared_N = nearest_centroids(data.points_NP, data.centroids_KP)
    for points_NP in (data.points_NP.T.contiguous().T, torch.cat([data.points_NP] * 2, dim=1)[:, dim:]):
        assert not points_NP.is_contiguous()
        found = nearest_centroids(points_NP, data.centroids_KP.T.contiguous().T)
        assert torch.equal(found[0], labels_N)
        assert torch.equal(found[1], squared_N)


# The parts


def naive_first_of_equals(rows_KP: Tensor) -> list[bool]:
    seen: set[tuple[float, ...]] = set()
    first = []
    for row in map(tuple, rows_KP.tolist()):
        first.append(row not in seen)
        seen.add(row)
    return first


@settings(max_examples=100, deadline=None)
@given(k=st.integers(1, 60), dim=st.integers(1, 5), values=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_first_of_equals(k: int, dim: int, values: int, seed: int) -> None:
    """Small whole numbers give many rows of the same sum; -0.0 equals 0.0."""
    generator = torch.Generator().manual_seed(seed)
    rows_KP = torch.randint(values, (k, dim), generator=generator).float() * torch.tensor([1.0, -1.0])[torch.arange(dim) % 2]
    assert first_of_equals(rows_KP).tolist() == naive_first_of_equals(rows_KP)


@pytest.mark.parametrize("name", ["normal", "equal centroids", "all zeros", "points are centroids", "one-hot"])
def test_first_of_equals_of_many(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    centroids_KP = case(name, 300, 100, 32).centroids_KP
    assert first_of_equals(centroids_KP).tolist() == naive_first_of_equals(centroids_KP)
    monkeypatch.setattr(parallel, "BLOCK_ROWS", 7)
    assert first_of_equals(centroids_KP).tolist() == naive_first_of_equals(centroids_KP)


@pytest.mark.parametrize("reach", [None, 1.0])
@pytest.mark.parametrize("kind", [*KINDS, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["normal", "outliers", "scale 1e-6", "scale 1e6", "all zeros", "unequal lengths"])
def test_residuals_are_the_lengths_of_what_is_rounded_off(name: str, kind: torch.dtype, reach: float | None) -> None:
    """Numbers beyond the reach of 8 bits are cut, and their rows' residuals know. 16 bits reach as far as they must."""
    rows_RP = case(name, 300, 100, 32).points_NP
    reach = None if kind == torch.float16 else reach
    coarse = round_rows(rows_RP, kind, reach)
    assert coarse.rounded_RP.dtype == kind
    near_RP = coarse.rounded_RP[:, : rows_RP.shape[1]].double() * coarse.step
    rounding = 1e-6 * rows_RP.double().norm(dim=1)
    assert ((near_RP - rows_RP.double()).norm(dim=1) - coarse.residual_R.double()).abs().le(rounding).all()
    assert (near_RP.norm(dim=1) - coarse.length_R.double()).abs().le(rounding + 1e-6 * near_RP.norm(dim=1)).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", DATA)
def test_bounds_hold(name: str, kind: torch.dtype) -> None:
    """What all rests on: no score (x·c - |c|²/2 from the points' mean, in float64) is above its coarse bound."""
    data = case(name, 300, 100, 32)
    search = data.search(kind)
    among = module._Columns(search, None, kind)
    mean_P = search.mean_P.double()
    points_NP, centroids_CP = (rows.double() - mean_P for rows in (data.points_NP, data.centroids_KP[among.columns_C]))
    scores_NC = points_NP @ centroids_CP.T - centroids_CP.square().sum(dim=1) / 2
    for rows in (slice(0, 300), slice(0, 1), torch.tensor([3, 77, 299])):
        bounds = among.centroids.bounds(search.coarse(rows, kind), search.half_norms_N[rows])
        slack_N = search.half_norms_N[rows].double() - bounds.base_B.double()
        bounds_NC = bounds.bounds_BC[:, : len(among.columns_C)].double() * bounds.unit + slack_N[:, None]
        assert (scores_NC[rows] <= bounds_NC).all()


def test_a_row_far_beyond_the_reach_of_8_bits() -> None:
    """As one outlier among 6,000 rows of zeros with 8,192 components: its residual is 211,080 steps long."""
    row_P = 1e3 * torch.randn(1024, generator=torch.Generator().manual_seed(0)).sign()
    search = NearestSearch(torch.stack([row_P, -row_P]), kind=torch.int8)
    search.reach = 0.5
    search.use(torch.stack([0 * row_P, 2e-3 * row_P]))
    known = torch.tensor([0]), search.squared_distances(torch.tensor([0]), torch.tensor([0]))
    assert search.search(torch.tensor([0]), None, known).labels_R.tolist() == [1]
