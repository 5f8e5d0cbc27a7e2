"""The k nearest rows against sorting all distances in float64, scikit-learn, and float32 distances where there are ties."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering import neighbours as module
from deepcluster.clustering.neighbours import Metric, nearest_neighbours
from deepcluster.core.errors import InputError


def rows(n: int, dim: int, seed: int, *, scale: float = 1.0, away: float = 0.0) -> Tensor:
    """A mixture of normal clouds, so that some neighbours are near."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, n // 20), dim))
    table = centres[rng.integers(len(centres), size=n)] + 0.5 * rng.normal(size=(n, dim))
    return torch.from_numpy(scale * table + away).float()


def sorted_distances(queries: Tensor, table: Tensor, k: int, *, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """Of float32 differences, squared and added as the search does it, ties by number: what the search must give exactly."""
    squared = torch.stack([(query - table).square().sum(dim=1) for query in queries])
    if exclude_self:
        squared.fill_diagonal_(torch.inf)
    values, order = squared.sort(dim=1, stable=True)
    return values[:, :k], order[:, :k]


def assert_exact(queries: Tensor, table: Tensor, k: int, *, exclude_self: bool = False) -> None:
    squared_MK, indices_MK = nearest_neighbours(queries, table, k=k, metric="sqeuclidean", exclude_self=exclude_self)
    expected, order = sorted_distances(queries, table, k, exclude_self=exclude_self)
    assert torch.equal(indices_MK, order)
    assert torch.equal(squared_MK, expected)


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many blocks of few rows, and groups that are not whole."""
    for name, value in {"BLOCK_BOUNDS": 2000, "BLOCK_DIFFERENCES": 500, "BLOCKS_AT_ONCE": 3, "GROUP": 4}.items():
        monkeypatch.setattr(module, name, value)
    yield


# Exactness


@pytest.mark.parametrize(("shape", "k"), [((400, 40), 1), ((400, 40), 5), ((200, 17), 40)])
@pytest.mark.usefixtures("tiny_blocks")
def test_equals_sorting_all_distances(shape: tuple[int, int], k: int) -> None:
    table, queries = rows(*shape, 0), rows(90, shape[1], 1)
    assert_exact(queries, table, k)
    assert_exact(table, table, k)
    assert_exact(table, table, k, exclude_self=True)


@pytest.mark.parametrize(("scale", "away"), [(1e-6, 0.0), (1e6, 0.0), (1.0, 30.0), (1.0, -3000.0)])
@pytest.mark.usefixtures("tiny_blocks")
def test_neither_size_nor_place_matters(scale: float, away: float) -> None:
    assert_exact(table := rows(160, 24, 0, scale=scale, away=away), table, 6, exclude_self=True)


@pytest.mark.usefixtures("tiny_blocks")
def test_rows_of_very_different_length() -> None:
    """The error of a bound is in proportion to its own row, not to the longest."""
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.normal(size=(200, 20)) * 10.0 ** rng.uniform(-3, 3, (200, 1))).float()
    table[rng.integers(200, size=15), rng.integers(20, size=15)] = 1e4
    assert_exact(table, table, 8, exclude_self=True)
    assert_exact(rows(50, 20, 1), table, 8)


@pytest.mark.parametrize("k", [1, 5, 30])
def test_float64_agrees(k: int) -> None:
    table, queries = rows(1500, 32, 0), rows(200, 32, 1)
    distances_MK, indices_MK = nearest_neighbours(queries, table, k=k)
    exact_MN = torch.cdist(queries.double(), table.double())
    values, order = exact_MN.sort(dim=1)
    # float32 takes some neighbours that are as near but for the last digit in another order.
    torch.testing.assert_close(exact_MN.gather(1, indices_MK), values[:, :k], rtol=1e-6, atol=0)
    torch.testing.assert_close(distances_MK.double(), values[:, :k], rtol=1e-6, atol=0)
    assert (indices_MK == order[:, :k]).double().mean() > 0.999


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_scikit_learn_agrees(metric: Metric) -> None:
    table, queries = rows(1500, 20, 0), rows(200, 20, 1)
    oracle = NearestNeighbors(n_neighbors=7, metric=metric, algorithm="brute").fit(table.double().numpy())
    expected, order = oracle.kneighbors(queries.double().numpy())
    values_MK, indices_MK = nearest_neighbours(queries, table, k=7, metric=metric)
    assert torch.equal(indices_MK, torch.from_numpy(order))
    values = 1 - expected if metric == "cosine" else expected
    np.testing.assert_allclose(values_MK.numpy(), values, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("tiny_blocks")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_rows(data: st.DataObject) -> None:
    """Few small integers, so that ties and copies abound."""
    n, dim = data.draw(st.integers(2, 90)), data.draw(st.sampled_from([1, 2, 19]))
    seed, most = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0, 1, 2, 5]))
    table = torch.randint(-most, most + 1, (n, dim), generator=torch.Generator().manual_seed(seed)).float()
    k = data.draw(st.integers(1, n - 1))
    assert_exact(table, table, k, exclude_self=True)
    assert_exact(table[: n // 2], table, k)


# Ties and copies


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("copies", [3, 40, 200])
def test_copies_are_at_distance_zero_and_the_first_ones_win(copies: int) -> None:
    table = rows(200, 24, 0)
    table[torch.randperm(200, generator=torch.Generator().manual_seed(1))[:copies]] = table[7].clone()
    assert_exact(table, table, 5)
    assert_exact(table, table, 5, exclude_self=True)


def test_a_row_is_excluded_by_its_number_not_by_its_distance() -> None:
    table = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    distances_MK, indices_MK = nearest_neighbours(table, table, k=1, exclude_self=True)
    assert indices_MK.flatten().tolist() == [1, 0, 0]
    assert distances_MK.flatten().tolist() == [0.0, 0.0, 2.0]


def test_cosine_of_rows_of_zeros_is_zero() -> None:
    table = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    similarities_MK, indices_MK = nearest_neighbours(table, table, k=4, metric="cosine")
    assert indices_MK.tolist() == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 0, 3, 1], [0, 1, 2, 3]]
    torch.testing.assert_close(similarities_MK[1], torch.tensor([1.0, 0.0, 0.0, -1.0]))
    assert similarities_MK[0].tolist() == [0.0] * 4


# What does not matter


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows(1500, 20, 0)
    expected = nearest_neighbours(table, table, k=5, exclude_self=True)
    for name, value in {"BLOCK_BOUNDS": 50_000, "BLOCK_DIFFERENCES": 11, "BLOCKS_AT_ONCE": 2, "GROUP": 7}.items():
        monkeypatch.setattr(module, name, value)
        for one, other in zip(nearest_neighbours(table, table, k=5, exclude_self=True), expected, strict=True):
            assert torch.equal(one, other)


def test_one_table_is_searched_as_two_are() -> None:
    table = rows(1200, 20, 0)
    for one, other in zip(nearest_neighbours(table, table, k=5), nearest_neighbours(table.clone(), table, k=5), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type(dtype: torch.dtype) -> None:
    table = rows(200, 8, 0).to(dtype)
    for one, other in zip(
        nearest_neighbours(table, table, k=3), nearest_neighbours(table.float(), table.float(), k=3), strict=True
    ):
        assert torch.equal(one, other)


def test_hardly_any_pair_is_compared_by_its_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    table = normalize(torch.from_numpy(np.random.default_rng(0).normal(size=(1000, 64))).float())
    compared, original = [], module._Search._squared

    def counted(self: module._Search, queries_BP: Tensor, candidates_BC: Tensor) -> Tensor:
        compared.append(candidates_BC.numel())
        return original(self, queries_BP, candidates_BC)

    monkeypatch.setattr(module._Search, "_squared", counted)
    assert_exact(table, table, 3, exclude_self=True)
    assert sum(compared) <= 0.011 * 1000 * 1000


def test_any_number_of_threads() -> None:
    table, before = rows(1500, 20, 0), torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(nearest_neighbours(table, table, k=5, exclude_self=True))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_counts_the_queries_and_may_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BOUNDS", 3008 * 125)
    table, units = rows(3000, 16, 0), []
    nearest_neighbours(table, table, k=3, advance=units.append)
    assert units == [1000, 1000, 1000]

    def stop(_: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        nearest_neighbours(table, table, k=3, advance=stop)


# Faults


@pytest.mark.parametrize(
    ("queries", "table", "k", "exclude_self", "told"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 2), 5, False, "k=5 .* 4 rows"),
        (torch.zeros(4, 2), torch.zeros(4, 2), 4, True, "k=4 .* 3 rows"),
        (torch.zeros(4, 2), torch.zeros(4, 2), 0, False, "k=0 "),
        (torch.zeros(4, 2), torch.zeros(4, 3), 1, False, r"queries \(4, 2\) and rows \(4, 3\)"),
        (torch.zeros(4), torch.zeros(4, 3), 1, False, "columns"),
        (torch.zeros(3, 2), torch.zeros(4, 2), 1, True, "same rows"),
        (torch.zeros(3, 2), torch.tensor([[0.0, 1], [0, torch.nan]]), 1, False, "row 1 of the rows"),
        (torch.tensor([[0.0, torch.inf]]), torch.zeros(4, 2), 1, False, "row 0 of the queries"),
        (torch.tensor([[0.0, 1e30]]), torch.zeros(4, 2), 1, False, "too large"),
    ],
)
def test_faults_are_told(queries: Tensor, table: Tensor, k: int, exclude_self: bool, told: str) -> None:
    with pytest.raises(InputError, match=told):
        nearest_neighbours(queries, table, k=k, exclude_self=exclude_self)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same() -> None:
    table = rows(20_000, 32, 0)
    distances_MK, indices_MK = nearest_neighbours(table.cuda(), table.cuda(), k=5)
    expected, order = nearest_neighbours(table, table, k=5)
    torch.testing.assert_close(distances_MK.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert (indices_MK.cpu() == order).double().mean() > 0.9999


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_no_queries_have_no_neighbours(metric: Metric) -> None:
    distances_MK, indices_MK = nearest_neighbours(torch.empty(0, 16), torch.randn(50, 16), k=3, metric=metric)
    assert distances_MK.shape == indices_MK.shape == (0, 3)
