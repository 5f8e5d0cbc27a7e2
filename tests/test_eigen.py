"""The largest eigenvalues against LAPACK's, for spectra that are steep, flat, of low rank or with values that repeat."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepcluster.clustering import eigen
from deepcluster.clustering.eigen import top_eigenvectors

DIM = 384
PLACE = torch.arange(1, DIM + 1).double()
SPECTRA: dict[str, Tensor] = {
    "1/i": PLACE**-1,
    "1/i²": PLACE**-2,
    "1/i⁴": PLACE**-4,
    "nearly flat": PLACE**-0.1,
    "exponential": torch.exp(-PLACE / 4),
    "rank 5": torch.where(PLACE <= 5, 1 / PLACE, 0.0),
    "rank 1": torch.where(PLACE <= 1, 1.0, 0.0),
    "all equal": torch.ones(DIM),
    "all zero": torch.zeros(DIM),
    "forty equal on top": torch.where(PLACE <= 40, 9.0, 1.0),
    "forty equal below": torch.where(PLACE <= 8, 9.0, torch.where(PLACE <= 48, 5.0, 1.0)),
    "tiny": PLACE**-1 * 1e-30,
    "huge": PLACE**-1 * 1e30,
}


def with_spectrum(values_D: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(len(values_D), len(values_D), generator=generator, dtype=torch.float64)).Q
    matrix = (turn * values_D) @ turn.T
    return (matrix + matrix.T) / 2


@pytest.fixture(params=["exact", "krylov", "krylov as on a GPU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(eigen, "KRYLOV_DIM", DIM + 1 if request.param == "exact" else DIM)
    monkeypatch.setattr(eigen, "KRYLOV_RATIO", 1)
    if request.param == "krylov as on a GPU":
        monkeypatch.setattr(eigen, "_orthonormal", eigen._by_cholesky)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1, 1e3, 1e6, 1e9, 1e30])
def test_columns_by_cholesky_are_orthonormal_with_the_same_span(condition: float, dtype: torch.dtype) -> None:
    """Whatever their condition and their lengths: columns too dependent for it go to QR."""
    generator = torch.Generator().manual_seed(0)
    turns = [torch.linalg.qr(torch.randn(rows, 20, generator=generator, dtype=torch.float64)).Q for rows in (400, 20)]
    lengths = torch.logspace(0, 20, 20, dtype=torch.float64)
    columns = ((turns[0] * torch.logspace(0, -math.log10(condition), 20)) @ turns[1].T * lengths).to(dtype)
    found = eigen._by_cholesky(columns)
    rounding = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.T @ found, torch.eye(20, dtype=dtype), atol=rounding, rtol=0)
    unit = torch.nn.functional.normalize(columns, dim=0)
    assert (unit - found @ (found.T @ unit)).norm() < 10 * rounding


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("n_top", [1, 12, 20])
@pytest.mark.parametrize("name", SPECTRA)
def test_values_and_vectors_are_the_largest(name: str, n_top: int) -> None:
    values_D = SPECTRA[name].double()
    matrix_DD = with_spectrum(values_D)
    values_P, vectors_DP = top_eigenvectors(matrix_DD.clone(), n_top)
    assert values_P.dtype == vectors_DP.dtype == torch.float64
    total, scale = float(values_D[:n_top].sum()), float(values_D[0])
    assert float(values_P.sum()) == pytest.approx(total, rel=1e-6, abs=1e-12 * scale)
    assert (values_P.diff() <= 1e-12 * scale).all()
    unit_PP = torch.eye(n_top, dtype=torch.float64)
    torch.testing.assert_close(vectors_DP.T @ vectors_DP, unit_PP, atol=1e-10, rtol=0)
    torch.testing.assert_close(vectors_DP.T @ matrix_DD @ vectors_DP, torch.diag(values_P), atol=1e-10 * scale, rtol=0)


@pytest.mark.usefixtures("way")
def test_the_same_at_every_run() -> None:
    results = [top_eigenvectors(with_spectrum(SPECTRA["1/i"]), 12) for _ in range(2)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_krylov_steps_serve_where_they_can_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {name for name, values in SPECTRA.items() if eigen._by_krylov(with_spectrum(values.double()), 20) is not None}
    assert served >= {"1/i", "1/i²", "1/i⁴", "exponential", "rank 5"}
    assert not served & {"all equal", "forty equal on top"}

    def refuse(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(eigen, "_exact", refuse)
    matrix_DD = with_spectrum(torch.arange(1, 1025).double() ** -1)
    assert len(top_eigenvectors(matrix_DD, 64)[0]) == 64


def test_a_diagonal_matrix_and_one_of_zeros_but_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of the first columns are exactly zero then, or lie in the basis."""
    monkeypatch.setattr(eigen, "KRYLOV_DIM", 1)
    monkeypatch.setattr(eigen, "KRYLOV_RATIO", 1)
    spectra: list[Callable[[], Tensor]] = [lambda: torch.diag(1 / PLACE), lambda: torch.diag((PLACE == 7).double() * 3)]
    for make in spectra:
        values_P, vectors_DP = top_eigenvectors(make(), 4)
        expected = make().diagonal().sort(descending=True).values[:4]
        torch.testing.assert_close(values_P, expected, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(vectors_DP.T @ vectors_DP, torch.eye(4).double(), atol=1e-10, rtol=0)
