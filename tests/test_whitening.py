"""Whitening against NumPy in float64 and scikit-learn; streams and ranks; data of lower rank, faults that are told."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from thread_ranks import on_ranks
from torch import Tensor

from deepcluster.clustering import scatter
from deepcluster.clustering import whitening as module
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError


def correlated(n: int, dim: int, *, rank: int | None = None, seed: int = 0, mean: float = 3.0) -> Tensor:
    """Rows whose variances differ by a factor of 100 and whose mean is not zero."""
    rng = np.random.default_rng(seed)
    rank = dim if rank is None else rank
    directions, _ = np.linalg.qr(rng.normal(size=(dim, rank)))
    return torch.from_numpy(rng.normal(size=(n, rank)) * np.geomspace(10, 1, rank) @ directions.T + mean).float()


def numpy_whitening(features_ND: Tensor, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and variances by singular values in float64."""
    x = features_ND.double().numpy()
    centred = x - x.mean(axis=0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    deviation = singular / np.sqrt(len(x) - 1)
    return centred @ rows[:n_components].T / deviation[:n_components], deviation[:n_components] ** 2


@pytest.mark.parametrize("n_components", [1, 5, 24])
def test_equals_numpy_up_to_sign(n_components: int) -> None:
    features_ND = correlated(400, 24)
    whitening = Whitening(n_components, unit_rows=False)
    points_NP = whitening.fit_transform(features_ND).double().numpy()
    expected_NP, variance_P = numpy_whitening(features_ND, n_components)
    signs_P = np.sign((points_NP * expected_NP).sum(axis=0))
    np.testing.assert_allclose(points_NP, expected_NP * signs_P, atol=1e-3)
    np.testing.assert_allclose(whitening.variance_P.numpy(), variance_P, rtol=1e-4)


def test_whitened_covariance_is_the_identity() -> None:
    points_NP = Whitening(10, unit_rows=False).fit_transform(correlated(500, 24)).double()
    covariance_PP = np.cov(points_NP.numpy().T)
    np.testing.assert_allclose(covariance_PP, np.eye(10), atol=1e-4)


def test_unit_rows_are_the_whitened_rows_over_their_length() -> None:
    features_ND = correlated(300, 16)
    rows_NP = Whitening(8, unit_rows=False).fit_transform(features_ND)
    unit_NP = Whitening(8).fit_transform(features_ND)
    torch.testing.assert_close(unit_NP.norm(dim=1), torch.ones(300))
    torch.testing.assert_close(unit_NP, rows_NP / rows_NP.norm(dim=1, keepdim=True))


def test_explained_is_that_of_scikit_learn() -> None:
    features_ND = correlated(300, 16)
    expected = PCA(5).fit(features_ND.numpy()).explained_variance_ratio_.sum()
    assert Whitening(5).fit(features_ND).explained == pytest.approx(expected, rel=1e-5)
    assert Whitening(16).fit(features_ND).explained == pytest.approx(1)


@pytest.mark.parametrize(("n", "rank", "kept"), [(6, 16, 5), (200, 4, 4), (1, 16, 0)])
def test_missing_components_are_zero(n: int, rank: int, kept: int) -> None:
    """N rows span N - 1 dimensions at most; nothing is made of the rounding errors beyond."""
    points_NP = Whitening(10, unit_rows=False).fit_transform(correlated(n, 16, rank=rank))
    assert points_NP.isfinite().all()
    assert points_NP[:, kept:].abs().max() == 0
    if kept:
        np.testing.assert_allclose(np.cov(points_NP[:, :kept].T.double()).reshape(kept, kept), np.eye(kept), atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, -123.456, 1e4])
def test_equal_rows_hold_no_component(value: float) -> None:
    points_NP = Whitening(4).fit_transform(torch.full((1000, 8), value))
    assert torch.equal(points_NP, torch.zeros(1000, 4))


def test_constant_features_change_nothing() -> None:
    features_ND = correlated(200, 6)
    wider_ND = torch.cat([features_ND, torch.full((200, 3), 7.0)], dim=1)
    torch.testing.assert_close(
        Whitening(5).fit_transform(wider_ND), Whitening(5).fit_transform(features_ND), atol=1e-4, rtol=1e-4
    )


def test_rows_of_zeros_are_rows_like_others_and_a_row_at_the_mean_stays_zero() -> None:
    features_ND = correlated(200, 6, mean=0.0)
    features_ND = torch.cat([features_ND, -features_ND, torch.zeros(3, 6)])
    points_NP = Whitening(6).fit_transform(features_ND)
    assert points_NP.isfinite().all()
    exact = Whitening(6)
    exact.fit(features_ND)
    assert torch.equal(exact.transform(exact.mean_D[None]), torch.zeros(1, 6))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.1), (torch.float64, 1e-4)], ids=str
)
def test_other_number_types(dtype: torch.dtype, tolerance: float) -> None:
    features_ND = correlated(300, 8)
    points_NP = Whitening(4).fit_transform(features_ND.to(dtype))
    assert points_NP.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(points_NP.float(), Whitening(4).fit_transform(features_ND), atol=tolerance, rtol=0)


def test_half_precision_loses_nothing_beyond_the_rounding_of_its_rows() -> None:
    """Sums of float16 rows would overflow at 65,504: they are not taken in float16."""
    halves_ND = correlated(5000, 8, mean=500.0).half()
    torch.testing.assert_close(Whitening(4).fit_transform(halves_ND), Whitening(4).fit_transform(halves_ND.float()))


def test_rows_need_not_lie_side_by_side_in_memory() -> None:
    features_ND = correlated(300, 8)
    strided_ND = torch.stack([features_ND, torch.full_like(features_ND, 9.0)], dim=2)[:, :, 0]
    transposed_ND = features_ND.T.contiguous().T
    assert not strided_ND.is_contiguous()
    expected = Whitening(4).fit_transform(features_ND)
    torch.testing.assert_close(Whitening(4).fit_transform(strided_ND), expected)
    torch.testing.assert_close(Whitening(4).fit_transform(transposed_ND), expected, atol=1e-5, rtol=1e-5)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features_ND = correlated(300, 8)
    expected = Whitening(4).fit_transform(features_ND)
    monkeypatch.setattr(scatter, "BLOCK_ROWS", 7)
    monkeypatch.setattr(module, "BLOCK_ROWS", 7)
    monkeypatch.setattr(scatter, "PANEL", 3)
    torch.testing.assert_close(Whitening(4).fit_transform(features_ND), expected, atol=1e-5, rtol=1e-5)


def assert_same(one: Whitening, other: Whitening, **tolerance: float) -> None:
    for name, value in one.state_dict().items():
        if tolerance:
            torch.testing.assert_close(value, other.state_dict()[name], **tolerance)
        else:
            assert torch.equal(value, other.state_dict()[name]), name


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=12), block=st.sampled_from([5, 16, 64, 2048]))
def test_a_stream_in_any_batches_is_one_fit_bit_for_bit(sizes: list[int], block: int) -> None:
    features_ND = correlated(max(2, sum(sizes)), 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ROWS", block)
        streamed = Whitening(5)
        for batch in features_ND.split([*sizes, len(features_ND) - sum(sizes)]):
            streamed.update(batch)
        assert_same(streamed.finish(), Whitening(5).fit(features_ND))


def test_a_whitening_can_be_fed_again_after_it_is_finished() -> None:
    whitening = Whitening(4)
    for seed in (1, 2):
        whitening.update(correlated(100, 8, seed=seed))
        whitening.finish()
    assert_same(whitening, Whitening(4).fit(correlated(100, 8, seed=2)))


@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_a_large_offset_does_not_cancel(offset: float) -> None:
    """In float64 of the same float32 rows; the spread is 1 to 10, of which float32 keeps 1e-3 (0.06) at the offset."""
    features_ND = correlated(5000, 12, mean=offset)
    whitening = Whitening(8, unit_rows=False).fit(features_ND)
    _, variance_P = numpy_whitening(features_ND, 8)
    np.testing.assert_allclose(whitening.variance_P.numpy(), variance_P, rtol=1e-5)
    np.testing.assert_allclose(whitening.mean_D.numpy(), features_ND.double().mean(dim=0), rtol=1e-7)


def test_rows_that_drift_far_away_do_not_cancel() -> None:
    """Sorted rows: the mean of each block is far from that of the one before."""
    features_ND = torch.cat([correlated(2048, 12, mean=float(mean), seed=abs(mean)) for mean in (0, 10_000, -30_000)])
    whitening = Whitening(8).fit(features_ND)
    _, variance_P = numpy_whitening(features_ND, 8)
    np.testing.assert_allclose(whitening.variance_P.numpy(), variance_P, rtol=1e-5)


@pytest.mark.parametrize("n", [20, 39, 40, 41, 80])
def test_fewer_rows_than_features(n: int) -> None:
    """The products of the rows, below 40 rows, and of the features give the same, and that is NumPy's."""
    features_ND = correlated(n, 40)
    whitening = Whitening(10, unit_rows=False)
    points_NP = whitening.fit_transform(features_ND).double().numpy()
    expected_NP, variance_P = numpy_whitening(features_ND, 10)
    np.testing.assert_allclose(whitening.variance_P.numpy(), variance_P, rtol=1e-4)
    np.testing.assert_allclose(np.abs(points_NP.T @ expected_NP) / (n - 1), np.eye(10), atol=2e-3)
    np.testing.assert_allclose(np.cov(points_NP.T), np.eye(10), atol=1e-4)
    expected = PCA(10).fit(features_ND.numpy()).explained_variance_ratio_.sum()
    assert whitening.explained == pytest.approx(expected, rel=1e-5)


def test_wide_rows_equal_whitened_pca_of_scikit_learn() -> None:
    """1,536 features: wide enough for Krylov steps."""
    features_ND = correlated(2500, 1536)
    whitening = Whitening(32, unit_rows=False)
    points_NP = whitening.fit_transform(features_ND).numpy()
    reference = PCA(32, whiten=True, svd_solver="covariance_eigh").fit(features_ND.double().numpy())
    expected_NP = reference.transform(features_ND.double().numpy())
    assert whitening.explained == pytest.approx(reference.explained_variance_ratio_.sum(), rel=1e-6)
    np.testing.assert_allclose(whitening.variance_P.numpy(), reference.explained_variance_, rtol=1e-5)
    np.testing.assert_allclose(np.cov(points_NP.T.astype(np.float64)), np.eye(32), atol=1e-4)
    signs_P = np.sign((points_NP * expected_NP).sum(axis=0))
    np.testing.assert_allclose(points_NP, expected_NP * signs_P, atol=0.02)


def test_no_rows_are_told() -> None:
    with pytest.raises(InputError, match="no rows"):
        Whitening(2).fit(torch.zeros(0, 4))
    with pytest.raises(InputError, match="no rows"):
        Whitening(2).finish()


def test_rows_of_another_width_are_told() -> None:
    whitening = Whitening(2)
    whitening.update(torch.zeros(3, 4))
    with pytest.raises(InputError, match="rows of 1 features follow rows of 4"):
        whitening.update(torch.zeros(3, 1))


@pytest.mark.parametrize("n", [5, 50, 5000])
@pytest.mark.parametrize("exponent", [-130, -90, 90, 120])
def test_the_squares_of_features_need_not_fit_float32(n: int, exponent: int) -> None:
    features_ND = correlated(n, 8)
    scaled = Whitening(2).fit_transform(features_ND * 2.0**exponent)
    torch.testing.assert_close(scaled.float(), Whitening(2).fit_transform(features_ND), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [5, 50])
def test_features_whose_squares_overflow_are_told(n: int) -> None:
    with pytest.raises(InputError, match="too large to be squared"):
        Whitening(2).fit(correlated(n, 8).double() * 1e200)


@pytest.mark.parametrize("n", [9, 500])
@pytest.mark.parametrize("offset", [1e6, 1.7e9, 1e12])
def test_float64_features_far_from_the_origin_lose_nothing(n: int, offset: float) -> None:
    """As scikit-learn's PCA, which centres in float64; float32 holds none of the differences at 1.7e9."""
    features_ND = correlated(n, 24)[:, :12].double()
    found = Whitening(4, unit_rows=False).fit(features_ND + offset)
    expected = PCA(4, whiten=True, svd_solver="full").fit_transform((features_ND + offset).numpy())
    points_NP = found.transform(features_ND + offset).numpy()
    signs_P = np.sign((points_NP * expected).sum(axis=0))
    np.testing.assert_allclose(points_NP, expected * signs_P, atol=2e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-3, 1.0, 1e3]), shift=st.floats(-5, 5))
def test_scale_and_shift_of_the_features_change_nothing(seed: int, scale: float, shift: float) -> None:
    features_ND = correlated(100, 6, seed=seed)
    moved_ND = features_ND * scale + shift * scale
    expected = Whitening(3).fit_transform(features_ND)
    torch.testing.assert_close(Whitening(3).fit_transform(moved_ND), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_named(bad: float) -> None:
    features_ND = torch.zeros(module.BLOCK_ROWS + 20, 4)
    features_ND[module.BLOCK_ROWS + 17, 2] = bad
    with pytest.raises(InputError, match=f"row {module.BLOCK_ROWS + 17} "):
        Whitening(2).fit(features_ND)
    streamed = Whitening(2)
    with pytest.raises(InputError, match=f"row {module.BLOCK_ROWS + 17} "):
        for batch in features_ND.split(100):
            streamed.update(batch)
        streamed.finish()


def test_a_row_that_is_not_finite_among_few_is_named() -> None:
    features_ND = torch.zeros(10, 40)
    features_ND[7, 39] = torch.nan
    with pytest.raises(InputError, match="row 7 "):
        Whitening(2).fit(features_ND)


@pytest.mark.parametrize("n_components", [0, 9])
def test_more_components_than_features_is_told_with_the_values(n_components: int) -> None:
    with pytest.raises(InputError, match=rf"n_components \(--pca\)={n_components} .* 8 features"):
        Whitening(n_components).fit(torch.zeros(20, 8))


def test_rows_that_are_not_finite_pass_through_transform_as_nan() -> None:
    features_ND = correlated(100, 4)
    whitening = Whitening(2).fit(features_ND)
    features_ND[5] = torch.nan
    points_NP = whitening.transform(features_ND)
    assert points_NP[5].isnan().all()
    assert points_NP.isnan().any(dim=1).sum() == 1


@pytest.mark.parametrize("unit_rows", [True, False])
def test_state_round_trip(tmp_path, unit_rows: bool) -> None:
    features_ND = correlated(100, 6)
    whitening = Whitening(3, unit_rows=unit_rows).fit(features_ND)
    torch.save(whitening.state_dict(), tmp_path / "w.pt")
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    again = Whitening.from_state_dict(state, unit_rows=unit_rows)
    assert torch.equal(again.transform(features_ND), whitening.transform(features_ND))
    assert (again.n_components, again.explained) == (3, whitening.explained)
    assert again.state_dict().keys() == whitening.state_dict().keys()


# Ranks


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["even", "few", "one"])
def test_rows_split_over_ranks_give_what_one_process_gives(name: str, size: int) -> None:
    """Evenly split; fewer rows than features; all on one rank and none on the others."""
    features_ND = correlated(4500, 12, mean=100.0)
    rows_ND = features_ND[:9] if name == "few" else features_ND
    shares = [rows_ND[rank::size] for rank in range(size)]
    if name == "one":
        shares = [rows_ND if rank == 1 else rows_ND[:0] for rank in range(size)]

    def work(share_ND: Tensor, ranks: Ranks) -> Whitening:
        return Whitening(6).fit(share_ND, ranks=ranks)

    found = on_ranks(shares, work)
    assert_same(found[0], Whitening(6).fit(rows_ND), rtol=2e-4, atol=2e-5)
    for other in found[1:]:
        assert_same(other, found[0])


STREAM = """
    import resource, sys
    import torch
    from deepcluster.clustering.whitening import Whitening

    n_images, dim, n_components, batch_rows = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    generator = torch.Generator().manual_seed(0)
    rows_BD = (torch.randn(batch_rows, dim, generator=generator) * torch.arange(1, dim + 1) ** -0.5).half()
    Whitening(2).fit(torch.randn(300, 64))
    before = peak()
    whitening = Whitening(n_components)
    for start in range(0, n_images, batch_rows):
        whitening.update(rows_BD[: n_images - start])
    whitening.finish()
    print(peak() - before)
"""


def memory_of_a_stream(n_images: int, dim: int, n_components: int, batch_rows: int) -> int:
    """Bytes over those of the interpreter and of a batch."""
    command = [sys.executable, "-c", textwrap.dedent(STREAM), *map(str, (n_images, dim, n_components, batch_rows))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_the_memory_of_a_stream_does_not_grow_with_its_rows() -> None:
    """200,000 × 1,024 would be 410 MB in half precision, 819 MB in float32."""
    assert memory_of_a_stream(200_000, 1024, 64, 2000) < module.working_bytes(1024) + 20e6 < 60e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_all_of_imagenet_at_4096_features_passes_through() -> None:
    """1.28 million rows, 21 GB in float32; about 5 minutes of a core."""
    assert memory_of_a_stream(1_281_167, 4096, 256, 256) < module.working_bytes(4096) + 50e6 < 0.5e9
