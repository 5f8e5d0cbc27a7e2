"""The two best centroids of each point in one Triton kernel: the N × K products never leave the registers.

N points, P components, K centroids; S slots, the positions in a tile of centroids.

A program holds BLOCK_N points and passes over all centroids, BLOCK_K at a time. Each slot keeps the best two bounds at its
position, element by element; the slots of a point are reduced once, after the last tile. Reducing each tile instead takes
10 instructions per bound that compare or select, not 7 (9 with own centroids); at P = 256 these 7 take an H100 about as long
as the product itself (counted in the code compiled for it).

Triton is part of torch's CUDA builds. It is imported at the first call: this module needs neither it nor a GPU.
"""

# triton reads the kernel's annotations as text.
from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepcluster.core.errors import InputError

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

Precision = Literal["ieee", "tf32x3", "tf32"]

DTYPES = (torch.bfloat16, torch.float16, torch.int8, torch.float32)
# Points of up to this many bytes stay in shared memory for the whole pass; longer ones, and float32, are read in chunks.
WHOLE_BYTES = 512
# Centroids are padded to a multiple of this, so that the loop needs no masks: 8 % fewer instructions.
LARGEST_BLOCK_K = 64
# Below this many multiply-adds (some 0.1 ms on an H100) the first tile is used; above, the fastest is measured, on at most
# this many rows and centroids.
TUNE_FROM = 1 << 34
TUNE_ROWS, TUNE_CENTROIDS = 1 << 16, 1 << 14


@dataclass(frozen=True)
class Tile:
    """Division of the work: points and centroids of a product, warps of a program, stages of the centroids' pipeline."""

    rows: int
    centroids: int
    warps: int
    stages: int


# The first needs 96 KiB of shared memory for points of 512 bytes, which any GPU from sm_80 on has. An H100's multiprocessor
# runs two programs of the first two tiles, one of which multiplies while the other compares. The third is for float32, whose
# products, without tensor cores, need registers too. None spills registers at 256 components of bfloat16 or int8.
TILES = (Tile(128, 32, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3))


@dataclass(frozen=True)
class _Problem:
    """Arguments of the kernel; `centroids_KP` is padded with zeros, `offsets_K` with infinity."""

    points_NP: Tensor
    centroids_KP: Tensor
    offsets_K: Tensor
    own_N: Tensor | None
    scale: float
    precision: Precision
    n_centroids: int
    outputs: tuple[Tensor, Tensor, Tensor]


@functools.cache
def available(device: torch.device | str) -> bool:
    """Return whether `best_two` runs on this device: a CUDA GPU from sm_80 on, triton, and all that it needs to compile.

    The first call for a device tries it on one point and warns, with the reason, if that fails.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0) or importlib.util.find_spec("triton") is None:
        return False
    one_11 = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    try:
        return int(best_two(one_11, one_11, torch.zeros(1, device=device))[1]) == 0
    except Exception as error:  # no C compiler, no headers of Python, a driver too old: triton has a type for none of them
        warnings.warn(f"the fused kernel does not run on {device}: {error!r}", stacklevel=2)
        return False


def best_two(
    points_NP: Tensor,
    centroids_KP: Tensor,
    offsets_K: Tensor,
    *,
    scale: float = 1.0,
    own_N: Tensor | None = None,
    precision: Precision = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two highest of bound[n, k] = scale · (points_n · centroids_k) - offsets_k over k ≠ own_n.

    The result is the same bits at every run: the order of additions is fixed. Values must be finite, except that an offset
    of infinity leaves its centroid out.

    Args:
        points_NP: bfloat16, float16, int8 or float32, with any strides.
        centroids_KP: of the same type. Products are accumulated in float32, those of int8 exactly in int32.
        offsets_K: float32.
        scale: factor of the products, applied in float32.
        own_N: int32 or int64; the centroid that a point leaves out, -1 for none.
        precision: of float32 products: "ieee", or on tensor cores "tf32x3" (three passes, nearly as exact) or "tf32" (one
            pass, 11 bits). Other types ignore it.

    Returns:
        best_N: float32, the highest bound; -infinity if none is left.
        index_N: int64, its centroid, of equally high ones the lower number; -1 if none is left.
        second_N: float32, the highest bound of the other centroids, equal to best if two are equally high; -infinity if
            fewer than two are left.

    Raises:
        InputError: shapes, types or devices that do not match.
    """
    _check(points_NP, centroids_KP, offsets_K, own_N)
    rows, device = len(points_NP), points_NP.device
    best_N, second_N = (torch.empty(rows, device=device) for _ in range(2))
    index_N = torch.empty(rows, dtype=torch.int64, device=device)
    # Padded by zeros after the last component and the last centroid, so that no tile exceeds the tensor.
    n_centroids, size = centroids_KP.shape
    missing = -n_centroids % LARGEST_BLOCK_K
    more = 0, -size % _block_P(centroids_KP.dtype, size), 0, missing
    centroids_KP = pad(centroids_KP, more).contiguous() if any(more) else centroids_KP.contiguous()
    offsets_K = pad(offsets_K, (0, missing), value=torch.inf)
    own_N = None if own_N is None else own_N.contiguous()
    outputs = best_N, index_N, second_N
    problem = _Problem(points_NP, centroids_KP, offsets_K, own_N, float(scale), precision, n_centroids, outputs)
    if rows > 0:
        _launch(problem, _tile(problem), rows, n_centroids)
    return outputs


def _check(points_NP: Tensor, centroids_KP: Tensor, offsets_K: Tensor, own_N: Tensor | None) -> None:
    tensors = {"points": points_NP, "centroids": centroids_KP, "offsets": offsets_K}
    if own_N is not None:
        tensors["own"] = own_N
    shapes = ", ".join(f"{name} {(*tensor.shape,)} {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
    if points_NP.ndim != 2 or centroids_KP.ndim != 2 or points_NP.shape[1] != centroids_KP.shape[1]:
        raise InputError(f"points must be (N, P) and centroids (K, P): {shapes}")
    if len(centroids_KP) < 1 or points_NP.shape[1] < 1:
        raise InputError(f"there must be at least one centroid and one component: {shapes}")
    if offsets_K.shape != centroids_KP.shape[:1] or (own_N is not None and own_N.shape != points_NP.shape[:1]):
        raise InputError(f"offsets must have one value per centroid, own one per point: {shapes}")
    if points_NP.dtype not in DTYPES or centroids_KP.dtype != points_NP.dtype or offsets_K.dtype != torch.float32:
        raise InputError(f"points and centroids must both be one of {DTYPES}, offsets float32: {shapes}")
    if own_N is not None and own_N.dtype not in (torch.int32, torch.int64):
        raise InputError(f"own must be int32 or int64: {shapes}")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        raise InputError(f"all must be on one device: {shapes}")


def _block_P(dtype: torch.dtype, size: int) -> int:
    """Return how many components are multiplied at once: all, rounded up to a power of two, or a chunk."""
    if dtype == torch.float32 or size * dtype.itemsize > WHOLE_BYTES:
        return 32 if dtype == torch.float32 else 64
    return max(32, 1 << (size - 1).bit_length())


_fastest: dict[tuple[Any, ...], Tile] = {}


def _tile(problem: _Problem) -> Tile:
    """Return the fastest tile for problems of about this size; measured once per process, on a part of this one."""
    points_NP = problem.points_NP
    rows, centroids = min(len(points_NP), TUNE_ROWS), min(problem.n_centroids, TUNE_CENTROIDS)
    if len(points_NP) * problem.centroids_KP.numel() < TUNE_FROM or not points_NP.is_cuda:
        return TILES[0]
    # Powers of two: small changes of the number of centroids from call to call do not tune again.
    sizes = points_NP.shape[1], rows.bit_length(), centroids.bit_length()
    key = points_NP.device, points_NP.dtype, problem.own_N is None, problem.precision, *sizes
    if key not in _fastest:
        _fastest[key] = min(TILES, key=lambda tile: _milliseconds(problem, tile, rows, centroids))
    return _fastest[key]


def _milliseconds(problem: _Problem, tile: Tile, rows: int, centroids: int) -> float:
    """Return the time of a launch, after a first one that compiles; infinity if the tile does not fit the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        _launch(problem, tile, rows, centroids)
    except importlib.import_module("triton").OutOfResources:
        return torch.inf
    with torch.cuda.device(problem.points_NP.device):
        start.record()
        for _ in range(3):
            _launch(problem, tile, rows, centroids)
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 3


def _launch(problem: _Problem, tile: Tile, rows: int, centroids: int) -> None:
    """Fill the first `rows` of the outputs from the first `centroids`."""
    points_NP = problem.points_NP
    tensors = points_NP, problem.centroids_KP, problem.offsets_K, problem.own_N, *problem.outputs
    numbers = rows, centroids, *points_NP.stride(), problem.scale
    # On the CPU triton's interpreter runs the kernel (in tests); there is no device to choose.
    with torch.cuda.device(points_NP.device if points_NP.is_cuda else -1):
        _kernel()[(-(-rows // tile.rows),)](
            *tensors,
            *numbers,
            P=points_NP.shape[1],
            ROW=problem.centroids_KP.shape[1],
            HAS_OWN=problem.own_N is not None,
            PRECISION=problem.precision,
            BLOCK_N=tile.rows,
            BLOCK_K=tile.centroids,
            BLOCK_P=_block_P(points_NP.dtype, points_NP.shape[1]),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


@functools.cache
def _kernel() -> Any:
    """Return the kernel, ready for launch; `tl` becomes a name of this module, where triton looks for it."""
    globals()["tl"] = importlib.import_module("triton.language")
    # N and K change from call to call; one compiled kernel serves them all.
    return importlib.import_module("triton").jit(_best_two, do_not_specialize=["N", "K"])


def _best_two(
    points: tl.tensor,
    centroids: tl.tensor,
    offsets: tl.tensor,
    own: tl.tensor,
    best: tl.tensor,
    index: tl.tensor,
    second: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    scale: tl.tensor,
    P: tl.constexpr,  # components of a point
    ROW: tl.constexpr,  # of a padded centroid
    HAS_OWN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    # Offsets are int64 wherever they may exceed 2³¹.
    rows_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slots_S = tl.arange(0, BLOCK_K)
    columns_P = tl.arange(0, BLOCK_P)
    real_N = rows_N < N
    points_NP = points + rows_N[:, None] * row_stride + columns_P[None, :].to(tl.int64) * column_stride
    centroids_PS = centroids + slots_S[None, :].to(tl.int64) * ROW + columns_P[:, None]
    if ROW == BLOCK_P:
        whole_NP = tl.load(points_NP, mask=real_N[:, None] & (columns_P < P)[None, :], other=0)
    if HAS_OWN:
        own_N = tl.load(own + rows_N, mask=real_N, other=-1).to(tl.int32)
    best_NS = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
    second_NS = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
    first_NS = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for first in tl.range(0, K, BLOCK_K):
        tile_PS = centroids_PS + tl.cast(first, tl.int64) * ROW
        products_NS = tl.zeros((BLOCK_N, BLOCK_K), tl.int32 if points.dtype.element_ty == tl.int8 else tl.float32)
        if ROW == BLOCK_P:
            products_NS = tl.dot(whole_NP, tl.load(tile_PS), products_NS, input_precision=PRECISION)
        else:
            for column in tl.range(0, ROW, BLOCK_P):
                real_NP = real_N[:, None] & (column + columns_P < P)[None, :]
                chunk_NP = tl.load(points_NP + tl.cast(column, tl.int64) * column_stride, mask=real_NP, other=0)
                products_NS = tl.dot(chunk_NP, tl.load(tile_PS + column), products_NS, input_precision=PRECISION)
        bounds_NS = products_NS.to(tl.float32) * scale - tl.load(offsets + first + slots_S)[None, :]
        if HAS_OWN:
            bounds_NS = tl.where(slots_S[None, :] == (own_N - first)[:, None], float("-inf"), bounds_NS)
        first_NS = tl.where(bounds_NS > best_NS, first, first_NS)  # the earlier tile where two are equal
        second_NS = tl.maximum(second_NS, tl.minimum(best_NS, bounds_NS))
        best_NS = tl.maximum(best_NS, bounds_NS)
    best_N = tl.max(best_NS, 1)
    numbers_NS = first_NS + slots_S[None, :]
    index_N = tl.min(tl.where(best_NS == best_N[:, None], numbers_NS, 2147483647), 1)
    second_N = tl.max(tl.where(numbers_NS == index_N[:, None], second_NS, best_NS), 1)
    index_N = tl.where(best_N > float("-inf"), index_N, -1)
    tl.store(best + rows_N, best_N, mask=real_N)
    tl.store(index + rows_N, index_N.to(tl.int64), mask=real_N)
    tl.store(second + rows_N, second_N, mask=real_N)
