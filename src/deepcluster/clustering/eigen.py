"""The largest eigenvalues and eigenvectors of a covariance: exact if it is small, by Krylov steps if it is wide.

D rows and columns, P eigenvalues, B columns per step, K columns of the basis.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

# From this width on, and this multiple of P, Krylov steps are faster: 4,096 → 256 takes 1.6 CPU-seconds instead of 7
# (LAPACK's evr, only the largest) or 21 (all, by torch.linalg.eigh).
KRYLOV_DIM, KRYLOV_RATIO = 1024, 12
FEWEST_COLUMNS = 16
# Steps after which the result is checked, and the share of the variance that it may miss.
CHECKED_STEPS = (16, 24)
TOLERANCE, HOPELESS = 2e-7, 1e-3
# A block of B columns finds only B vectors of a multiple eigenvalue: if B are this close together there may be more.
CROWDED = 0.01
NOISE = 1e-12


def top_eigenvectors(matrix_DD: Tensor, n_top: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues_P of a positive semi-definite matrix, largest first, and their vectors_DP; float64.

    The sum of the values is exact up to a share of `TOLERANCE`, and the products of the vectors with the matrix are
    orthogonal up to the rounding of float64, whatever the spectrum: if Krylov steps can't guarantee this, the exact method
    is used. The result is the same at every run.

    Args:
        matrix_DD: float64; may be overwritten.
        n_top: P.
    """
    if len(matrix_DD) >= max(KRYLOV_DIM, KRYLOV_RATIO * n_top):
        found = _by_krylov(matrix_DD, n_top)
        if found is not None:
            return found
    return _exact(matrix_DD, n_top)


def _exact(matrix_DD: Tensor, n_top: int) -> tuple[Tensor, Tensor]:
    if matrix_DD.device.type == "cpu":
        import scipy.linalg

        dim = len(matrix_DD)
        # The transpose is in LAPACK's own order: no copy is made.
        values, vectors = scipy.linalg.eigh(
            matrix_DD.numpy().T, subset_by_index=(dim - n_top, dim - 1), driver="evr", overwrite_a=True
        )
        return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    return values_D[-n_top:].flip(0), vectors_DD[:, -n_top:].flip(1)


def _by_krylov(matrix_DD: Tensor, n_top: int) -> tuple[Tensor, Tensor] | None:
    """Search the span of random columns and their images under powers of the matrix; return None if it is too small.

    Steps are float32, the last projection float64. Block Lanczos with full orthogonalisation (Golub & Van Loan, 10.3).
    """
    dim, width = len(matrix_DD), max(FEWEST_COLUMNS, -(-n_top // 4))
    scale = matrix_DD.diagonal().max().clamp(min=torch.finfo(torch.float64).tiny)
    single_DD = torch.div(matrix_DD, scale, out=matrix_DD.new_empty(dim, dim, dtype=torch.float32))
    generator = torch.Generator().manual_seed(0)
    basis_DK = single_DD.new_empty(dim, CHECKED_STEPS[-1] * width)
    projected_KK = single_DD.new_zeros(basis_DK.shape[1], basis_DK.shape[1])
    image_DB = torch.zeros_like(basis_DK[:, :width])
    for step in range(CHECKED_STEPS[-1]):
        new, end = step * width, (step + 1) * width
        # Only rounding remains of an image that lies in the basis already: noise makes it a new random start.
        image_DB += NOISE * torch.randn(dim, width, generator=generator).to(image_DB.device)
        for _ in range(2):  # Twice is enough for columns orthogonal to the basis.
            inside_DB = basis_DK[:, :new] @ (basis_DK[:, :new].T @ image_DB)
            image_DB = _orthonormal(image_DB - inside_DB)
        basis_DK[:, new:end] = image_DB
        image_DB = single_DD @ basis_DK[:, new:end]
        projected_KK[:end, new:end] = basis_DK[:, :end].T @ image_DB
        if step + 1 in CHECKED_STEPS:
            values_P, vectors_DP, missing = _ritz(matrix_DD, basis_DK[:, :end], projected_KK[:end, :end], n_top)
            # `width` values that matter lie so close together that further ones may have been missed.
            first, last = values_P[: max(0, n_top - width + 1)], values_P[width - 1 :]
            crowded = (first - last <= CROWDED * first) & (first > 1e-9 * values_P.sum())
            if bool(crowded.any()) or missing > HOPELESS:
                return None
            if missing <= TOLERANCE:
                return values_P, vectors_DP
    return None


def _orthonormal(columns_DB: Tensor) -> Tensor:
    """Return orthonormal columns with the same span."""
    return _by_cholesky(columns_DB) if columns_DB.is_cuda else torch.linalg.qr(columns_DB).Q


def _by_cholesky(columns_DB: Tensor) -> Tensor:
    """Return orthonormal columns by Cholesky steps: products, where a GPU's QR goes column by column.

    Two steps suffice for columns of a condition below about 1e8 (float64); more follow while a step still found dependent
    columns. Those that are too dependent for that go to QR.
    """
    found_DB: Tensor = normalize(columns_DB, dim=0)
    for step in range(4):
        lower_BB, failed = torch.linalg.cholesky_ex(found_DB.T @ found_DB)
        if int(failed):
            break
        found_DB = torch.linalg.solve_triangular(lower_BB, found_DB.T, upper=False).T
        if step > 0 and float(lower_BB.diagonal().min()) > 0.5:
            return found_DB
    return torch.linalg.qr(columns_DB).Q  # type: ignore[no-any-return]


def _ritz(matrix_DD: Tensor, basis_DK: Tensor, projected_KK: Tensor, n_top: int) -> tuple[Tensor, Tensor, float]:
    """Return the best values_P and vectors_DP of the basis, in float64, and the share of the sum that they may miss.

    A vector's residual r bounds the error of its value: at most |r|, and at most |r|² over the distance to the values
    outside (Parlett, The Symmetric Eigenvalue Problem, chapter 11), for which the spare values beyond P stand. If the values
    fall steeply, the small ones are lost in the float32 rounding of the large ones: one power step finds them.
    """
    n_kept = n_top + -(-n_top // 4)
    _, turn_KK = torch.linalg.eigh(projected_KK, UPLO="U")
    images = (basis_DK @ turn_KK[:, -n_kept:]).double()
    tiny = torch.finfo(torch.float64).tiny
    for _ in range(2):
        vectors = _orthonormal(images)
        images = matrix_DD @ vectors
        values, turn = torch.linalg.eigh(vectors.T @ images)
        vectors, images = vectors @ turn, images @ turn
        residual_P = (images - vectors * values)[:, -n_top:].norm(dim=0)
        distance_P = (values[-n_top:] - values[0]).clamp(min=tiny)
        missing = torch.minimum(residual_P, residual_P.square() / distance_P).sum()
        missing_share = float(missing / values[-n_top:].sum().clamp(min=tiny))
        if not TOLERANCE < missing_share <= HOPELESS:
            break
    return values[-n_top:].flip(0), vectors[:, -n_top:].flip(1), missing_share
