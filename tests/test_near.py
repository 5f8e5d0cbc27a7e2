"""Sets of near rows against comparing all pairs in float64; whatever the blocks, and with pairs exactly at the radius."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from deepcluster.clustering import near as module
from deepcluster.clustering.near import near_sets, typical_distance
from deepcluster.core.errors import InputError, Interrupted


def naive_sets(table: Tensor, radius: float) -> NDArray[np.int64]:
    """All distances, row by row, in float64; sets in the order of their first rows."""
    rows = table.double()
    near = torch.stack([(rows - row).square().sum(dim=1).sqrt() <= radius for row in rows])
    found: NDArray[np.int64] = connected_components(near.numpy(), directed=False)[1]
    _, first, set_N = np.unique(found, return_index=True, return_inverse=True)
    numbers: NDArray[np.int64] = np.argsort(np.argsort(first))[set_N]
    return numbers


def with_copies(n: int, dim: int, seed: int, *, away: float = 0.0) -> Tensor:
    """Random rows, a third of which are others moved by up to 0.1 in a random direction."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(n, dim))
    copies = rng.permutation(n)[: n // 3]
    moved = rng.normal(size=(len(copies), dim))
    moved *= rng.uniform(0, 0.1, len(copies))[:, None] / np.linalg.norm(moved, axis=1, keepdims=True)
    table[copies] = table[rng.permutation(n)[: len(copies)]] + moved
    return torch.from_numpy(table + away).float()


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many blocks and steps of few rows, several rounds of joining."""
    sizes = {"BLOCK_ROWS": 7, "STEP_COLUMNS": 5, "BLOCKS_AT_ONCE": 2, "PAIRS_AT_ONCE": 3, "MOST_PAIRS": 10}
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    yield


@pytest.mark.parametrize("radius", [0.0, 0.03, 0.07, 3.0, 1e6])
@pytest.mark.parametrize("dim", [1, 3, 64])
@pytest.mark.usefixtures("tiny_blocks")
def test_equals_comparing_all_pairs(dim: int, radius: float) -> None:
    table = with_copies(211, dim, seed=dim)
    assert np.array_equal(near_sets(table, radius), naive_sets(table, radius))


def test_equals_comparing_all_pairs_in_blocks_of_the_usual_size() -> None:
    table = with_copies(2 * module.BLOCK_ROWS + 37, 16, seed=5)
    assert np.array_equal(near_sets(table, 0.05), naive_sets(table, 0.05))


@given(rows=st.lists(st.tuples(*[st.integers(-4, 4)] * 2), min_size=1, max_size=60), squared=st.integers(0, 9))
@settings(max_examples=60)
def test_a_pair_exactly_at_the_radius_is_near(rows: list[tuple[int, int]], squared: int) -> None:
    """On a grid of whole numbers all squared distances are exact, and many are those of the radius."""
    table = torch.tensor(rows, dtype=torch.float32)
    radius = float(np.float32(np.sqrt(squared)))
    exact = (table[:, None] - table[None]).square().sum(dim=2) <= torch.tensor(radius).square()
    expected = connected_components(exact.numpy(), directed=False)[1]
    assert np.array_equal(near_sets(table, radius), expected)


@pytest.mark.usefixtures("tiny_blocks")
def test_a_chain_over_the_borders_of_blocks_is_one_set() -> None:
    """Steps of 1 lead from 0 to 49; the order of the rows does not matter."""
    order = np.random.default_rng(0).permutation(50)
    table = torch.zeros(50, 3)
    table[:, 1] = torch.from_numpy(order).float()
    assert set(near_sets(table, 1.0).tolist()) == {0}
    assert near_sets(table, np.nextafter(np.float32(1), np.float32(0)).item()).tolist() == list(range(50))


def test_rows_far_from_the_origin() -> None:
    """Products of such rows have few correct digits; centred ones do."""
    table = with_copies(300, 8, seed=3, away=1000.0)
    assert np.array_equal(near_sets(table, 0.05), naive_sets(table, 0.05))


def test_copies_of_one_row() -> None:
    assert set(near_sets(torch.full((100, 4), 0.3), 0.0).tolist()) == {0}
    assert near_sets(torch.full((1, 4), 0.3), 0.0).tolist() == [0]
    assert near_sets(torch.zeros(0, 4), 0.0).tolist() == []


@pytest.mark.usefixtures("tiny_blocks")
def test_progress_counts_all_rows_and_may_stop() -> None:
    table, counted = with_copies(100, 3, seed=1), list[int]()
    near_sets(table, 0.1, advance=counted.append)
    assert sum(counted) == 100
    assert len(counted) > 3

    def stop(_: int) -> None:
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        near_sets(table, 0.1, advance=stop)


BAD: dict[str, Callable[[], tuple[Tensor, float]]] = {
    "a table": lambda: (torch.zeros(3), 0.1),
    "a distance": lambda: (torch.zeros(3, 2), -0.1),
    "radius=nan": lambda: (torch.zeros(3, 2), float("nan")),
    "row 1 is not finite": lambda: (torch.tensor([[0.0], [torch.nan]]), 0.1),
    "too large to be squared": lambda: (torch.tensor([[0.0], [1e30]]), 0.1),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_compared_is_refused(message: str) -> None:
    table, radius = BAD[message]()
    with pytest.raises(InputError, match=message):
        near_sets(table, radius)


def test_typical_distance_is_the_root_mean_square_of_all_pairs() -> None:
    table = with_copies(60, 5, seed=2).double()
    pairs = torch.cdist(table, table).square().mean().sqrt()  # With each point and itself: as drawn with replacement.
    assert typical_distance(table.float().numpy()) == pytest.approx(pairs.item(), rel=1e-5)
    assert typical_distance(np.zeros((0, 3), np.float32)) == 0.0
