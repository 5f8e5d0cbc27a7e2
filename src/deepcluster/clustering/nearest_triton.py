"""The best centroid of each point, and how good the second is, in one Triton kernel: no score leaves the registers.

N points, P components, K centroids; S slots, the positions in a tile of centroids.

A program holds BLOCK_N points and passes over all centroids, BLOCK_K at a time. Each slot keeps the best two scores at its
position, element by element; the slots of a point are reduced once, after the last tile. So a score takes one
multiplication, three minima or maxima, one comparison and one selection. At P = 256 they take an H100 two thirds as long as
the product, beside which they run (counted in the code compiled for it; minima and comparisons go at half rate).

Triton is part of torch's CUDA builds. It is imported at the first call: this module needs neither it nor a GPU.
"""

# triton reads the kernel's annotations as text.
from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepcluster.core.errors import InputError

if TYPE_CHECKING:
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

# Points of up to this many components stay in shared memory for the whole pass; longer ones are read in chunks.
WHOLE, CHUNK, LEAST_COMPONENTS = 256, 64, 16
# The number of centroids must be a multiple of this, so that the loop needs no masks: 8 % fewer instructions.
CENTROIDS_MULTIPLE = 64
# Below this many multiply-adds (some 1 ms on an H100) the first tile is used; above, the fastest is measured on this many
# points, once per process: a second per tile to compile it, which triton keeps on the disk.
TUNE_FROM, TUNE_ROWS = 1 << 38, 1 << 17


@dataclass(frozen=True)
class Tile:
    """Division of the work: points and centroids of a product, warps of a program, stages of the centroids' pipeline."""

    rows: int
    centroids: int
    warps: int
    stages: int


# At 256 components the first takes 96 KiB of shared memory, which any GPU from sm_80 on has: an H100's multiprocessor runs
# two such programs, one of which multiplies while the other compares. The second reads centroids half as often. Neither
# spills registers.
TILES = (Tile(64, 64, 4, 2), Tile(128, 64, 8, 3))


@functools.cache
def available(device: torch.device, n_components: int) -> bool:
    """Return whether `best_two` runs on this device: a CUDA GPU from sm_80 on, triton, and all that it needs to compile.

    The first call tries it on one point and warns, with the reason, if that fails.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0) or importlib.util.find_spec("triton") is None:
        return False
    ones = torch.ones(CENTROIDS_MULTIPLE, n_components, dtype=torch.float16, device=device)
    try:
        return int(best_two(ones[:1], ones, torch.zeros(len(ones), device=device))[0]) == 0
    except Exception as error:  # no C compiler, no headers of Python, a driver too old: triton has a type for none of them
        warnings.warn(f"the fused kernel does not run on {device}: {error!r}", stacklevel=2)
        return False


def best_two(points_NP: Tensor, centroids_KP: Tensor, offsets_K: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return where the highest of score[n, k] = scale · (points_n · centroids_k) - offsets_k is, and the second highest.

    Products are accumulated in float32. The result is the same bits at every run: the order of additions is fixed.

    Args:
        points_NP: float16, contiguous, finite.
        centroids_KP: float16, contiguous, finite; K is a multiple of `CENTROIDS_MULTIPLE`.
        offsets_K: float32; infinity leaves a centroid out.
        scale: factor of the products, applied in float32.

    Returns:
        index_N: int64, the centroid of the highest score, of equally high ones the lower number; -1 if none is left.
        second_N: float32, the highest score of the other centroids, equal to the first if two are equally high; -infinity
            if fewer than two are left.

    Raises:
        InputError: shapes, types or devices that do not match.
    """
    _check(points_NP, centroids_KP, offsets_K)
    index_N = torch.empty(len(points_NP), dtype=torch.int64, device=points_NP.device)
    second_N = torch.empty(len(points_NP), device=points_NP.device)
    tensors = points_NP, centroids_KP, offsets_K, index_N, second_N
    if len(points_NP):
        _launch(_tile(points_NP, centroids_KP, tensors, scale), tensors, len(points_NP), scale)
    return index_N, second_N


def _check(points_NP: Tensor, centroids_KP: Tensor, offsets_K: Tensor) -> None:
    tensors = {"points": points_NP, "centroids": centroids_KP, "offsets": offsets_K}
    shapes = ", ".join(f"{name} {(*tensor.shape,)} {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
    if points_NP.ndim != 2 or centroids_KP.ndim != 2 or points_NP.shape[1] != centroids_KP.shape[1]:
        raise InputError(f"points must be (N, P) and centroids (K, P): {shapes}")
    if len(centroids_KP) < 1 or len(centroids_KP) % CENTROIDS_MULTIPLE or points_NP.shape[1] < 1:
        raise InputError(f"there must be at least one component, and a multiple of {CENTROIDS_MULTIPLE} centroids: {shapes}")
    if offsets_K.shape != centroids_KP.shape[:1]:
        raise InputError(f"offsets must have one value per centroid: {shapes}")
    if [tensor.dtype for tensor in tensors.values()] != [torch.float16, torch.float16, torch.float32]:
        raise InputError(f"points and centroids must be float16, offsets float32: {shapes}")
    if not all(tensor.is_contiguous() for tensor in tensors.values()):
        raise InputError(f"all must be contiguous: {shapes}")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        raise InputError(f"all must be on one device: {shapes}")


_fastest: dict[tuple[Any, ...], Tile] = {}


def _tile(points_NP: Tensor, centroids_KP: Tensor, tensors: tuple[Tensor, ...], scale: float) -> Tile:
    """Return the fastest tile for this number of components."""
    if len(points_NP) * centroids_KP.numel() < TUNE_FROM or not points_NP.is_cuda:
        return TILES[0]
    key = points_NP.device, points_NP.shape[1]
    if key not in _fastest:
        rows = min(len(points_NP), TUNE_ROWS)
        _fastest[key] = min(TILES, key=lambda tile: _milliseconds(tile, tensors, rows, scale))
    return _fastest[key]


def _milliseconds(tile: Tile, tensors: tuple[Tensor, ...], rows: int, scale: float) -> float:
    """Return the time of a launch, after a first one that compiles; infinity if the tile does not fit the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        _launch(tile, tensors, rows, scale)
    except importlib.import_module("triton").OutOfResources:
        return torch.inf
    with torch.cuda.device(tensors[0].device):
        start.record()
        for _ in range(3):
            _launch(tile, tensors, rows, scale)
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 3


def _launch(tile: Tile, tensors: tuple[Tensor, ...], rows: int, scale: float) -> None:
    """Fill the first `rows` of the outputs."""
    points_NP, centroids_KP, *_ = tensors
    # On the CPU triton's interpreter runs the kernel (in tests); there is no device to choose.
    with torch.cuda.device(points_NP.device if points_NP.is_cuda else -1):
        _kernel()[(-(-rows // tile.rows),)](
            *tensors,
            rows,
            len(centroids_KP),
            float(scale),
            P=points_NP.shape[1],
            BLOCK_N=tile.rows,
            BLOCK_K=tile.centroids,
            BLOCK_P=_block_P(points_NP.shape[1]),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _block_P(size: int) -> int:
    """Return how many components are multiplied at once: all, rounded up to a power of two, or a chunk."""
    return CHUNK if size > WHOLE else max(LEAST_COMPONENTS, 1 << (size - 1).bit_length())


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
    index: tl.tensor,
    second: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    scale: tl.tensor,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    # Offsets are int64 wherever they may exceed 2³¹.
    rows_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slots_S = tl.arange(0, BLOCK_K)
    columns_P = tl.arange(0, BLOCK_P)
    real_N = rows_N < N
    points_NP = points + rows_N[:, None] * P + columns_P[None, :]
    centroids_PS = centroids + slots_S[None, :].to(tl.int64) * P + columns_P[:, None]
    if P <= BLOCK_P:
        whole_NP = tl.load(points_NP, mask=real_N[:, None] & (columns_P < P)[None, :], other=0)
    best_NS = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
    second_NS = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
    first_NS = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for first in tl.range(0, K, BLOCK_K):
        tile_PS = centroids_PS + tl.cast(first, tl.int64) * P
        products_NS = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if P == BLOCK_P:
            products_NS = tl.dot(whole_NP, tl.load(tile_PS), products_NS)
        elif P < BLOCK_P:
            products_NS = tl.dot(whole_NP, tl.load(tile_PS, mask=(columns_P < P)[:, None], other=0), products_NS)
        else:
            for column in tl.range(0, P, BLOCK_P):
                real_P = column + columns_P < P
                chunk_NP = tl.load(points_NP + column, mask=real_N[:, None] & real_P[None, :], other=0)
                chunk_PS = tl.load(tile_PS + column, mask=real_P[:, None], other=0)
                products_NS = tl.dot(chunk_NP, chunk_PS, products_NS)
        scores_NS = products_NS * scale - tl.load(offsets + first + slots_S)[None, :]
        first_NS = tl.where(scores_NS > best_NS, first, first_NS)  # the earlier tile where two are equal
        second_NS = tl.maximum(second_NS, tl.minimum(best_NS, scores_NS))
        best_NS = tl.maximum(best_NS, scores_NS)
    best_N = tl.max(best_NS, 1)
    numbers_NS = first_NS + slots_S[None, :]
    index_N = tl.min(tl.where(best_NS == best_N[:, None], numbers_NS, 2147483647), 1)
    second_N = tl.max(tl.where(numbers_NS == index_N[:, None], second_NS, best_NS), 1)
    index_N = tl.where(best_N > float("-inf"), index_N, -1)
    tl.store(index + rows_N, index_N.to(tl.int64), mask=real_N)
    tl.store(second + rows_N, second_N, mask=real_N)
