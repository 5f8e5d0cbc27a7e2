"""The fused kernel against NumPy in float64; what it does with ties, own centroids and strides; that it compiles.

Triton's interpreter runs the kernel on the CPU, but only in a process where TRITON_INTERPRET is set before triton is
imported: functions called `interpreted_...` are tests that `test_in_the_interpreter` runs in such a process.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepcluster.clustering import nearest_triton as module
from deepcluster.clustering.nearest_triton import TILES, available, best_two
from deepcluster.core.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
SIZES = [(n, k, p) for k in (1, 2, 37, 130) for n, p in ((1, 33), (3, 5), (65, 1), (65, 256), (65, 300))]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def problem(n: int, k: int, p: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, centroids, offsets and own (-1 for about a third); those of int8 have integer offsets."""
    generator = torch.Generator().manual_seed(seed)
    points, centroids = (torch.randn(rows, p, generator=generator) for rows in (n, k))
    offsets = centroids.square().sum(dim=1) / 2
    if dtype == torch.int8:
        points, centroids, offsets = ((40 * values).round().clamp(-127, 127) for values in (points, centroids, 20 * offsets))
    own = torch.randint(-max(1, k // 2), k, (n,), generator=generator).clamp(min=-1)
    return points.to(dtype), centroids.to(dtype), offsets, own


def bounds_of(points: Tensor, centroids: Tensor, offsets: Tensor, scale: float, own: Tensor | None) -> np.ndarray:
    bounds = scale * (points.double().numpy() @ centroids.double().numpy().T) - offsets.double().numpy()
    if own is not None:
        mine = own.numpy() >= 0
        bounds[mine, own.numpy()[mine]] = -np.inf
    return bounds


def check(found: tuple[Tensor, Tensor, Tensor], bounds: np.ndarray, tolerance: float) -> None:
    """Bounds to a tolerance; the index is the first of the best, except where others lie within the tolerance."""
    best, index, second = (tensor.cpu().numpy() for tensor in found)
    assert (best.dtype, index.dtype, second.dtype) == (np.float32, np.int64, np.float32)
    descending = np.sort(np.concatenate([bounds, np.full_like(bounds[:, :1], -np.inf)], axis=1), axis=1)[:, ::-1]
    np.testing.assert_allclose(best, descending[:, 0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(second, descending[:, 1], rtol=0, atol=tolerance)
    none = np.isneginf(descending[:, 0])
    assert (index[none] == -1).all()
    rows = np.arange(len(bounds))[~none]
    assert (bounds[rows, index[rows]] >= descending[rows, 0] - tolerance).all()
    with np.errstate(invalid="ignore"):
        clear = (descending[:, 0] - descending[:, 1] > tolerance) | (tolerance == 0)
    assert (index == bounds.argmax(axis=1))[clear & ~none].all()


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of triton 3.8 multiplies the bits of bfloat16 as integers: make them float32 there."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype != interpreter.tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def interpreted_equals_float64(dtype: torch.dtype) -> None:
    for seed, (n, k, p) in enumerate(SIZES):
        points, centroids, offsets, own = problem(n, k, p, dtype, seed=seed)
        for skipped in (None, own.int() if seed % 2 else own):
            found = best_two(points, centroids, offsets, scale=0.5, own_N=skipped)
            bounds = bounds_of(points, centroids, offsets, 0.5, skipped)
            check(found, bounds, 0 if dtype == torch.int8 else 1e-3)


@pytest.mark.parametrize("tile", TILES, ids=str)
def interpreted_tiles_agree(tile: module.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILES", (tile,))
    points, centroids, offsets, own = problem(150, 130, 70, torch.int8)
    found = best_two(points, centroids, offsets, own_N=own)
    check(found, bounds_of(points, centroids, offsets, 1, own), 0)


def interpreted_ties_go_to_the_lower_number() -> None:
    """Four points of a square; each is a centroid three times over: twice in the first tile, once in the third."""
    points = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    centroids = torch.cat([points, points, torch.zeros(70, 2), points])
    best, index, second = best_two(points, centroids, torch.zeros(len(centroids)))
    assert (best.tolist(), index.tolist(), second.tolist()) == ([1] * 4, [0, 1, 2, 3], [1] * 4)
    best, index, second = best_two(points, centroids, torch.zeros(len(centroids)), own_N=torch.arange(4))
    assert (best.tolist(), index.tolist(), second.tolist()) == ([1] * 4, [4, 5, 6, 7], [1] * 4)
    offsets = torch.full((len(centroids),), 0.5)
    offsets[:4] = torch.inf  # leaves its centroid out
    best, index, second = best_two(points, centroids[:78], offsets[:78], own_N=torch.arange(4) + 4)
    assert (best.tolist(), index.tolist(), second.tolist()) == ([-0.5] * 4, [5, 4, 5, 4], [-0.5] * 4)
    # The same slot of two tiles, 32 and 64 apart; the later one in the lower slot.
    apart = torch.zeros(130, 2)
    apart[[37, 69, 96]] = points[0]
    assert best_two(points[:1], apart, torch.zeros(130))[1].tolist() == [37]
    assert best_two(points[:1], apart, torch.zeros(130), own_N=torch.tensor([37]))[1].tolist() == [69]


def interpreted_leaves_nothing() -> None:
    one = torch.ones(2, 3)
    best, index, second = best_two(one, one[:1], torch.zeros(1), own_N=torch.tensor([0, -1]))
    assert (best.tolist(), index.tolist(), second.tolist()) == ([-torch.inf, 3], [-1, 0], [-torch.inf] * 2)
    best, index, second = best_two(one, one, torch.zeros(2), own_N=torch.tensor([0, 1]))
    assert (best.tolist(), index.tolist(), second.tolist()) == ([3, 3], [1, 0], [-torch.inf] * 2)
    assert [len(part) for part in best_two(one[:0], one, torch.zeros(2))] == [0, 0, 0]


def interpreted_takes_any_strides() -> None:
    points, centroids, offsets, own = problem(40, 37, 33, torch.float32)
    bounds = bounds_of(points, centroids, offsets, 1, own)
    wide, tall = torch.zeros(80, 66), torch.zeros(33, 37)
    wide[::2, 1::2] = points
    tall.copy_(centroids.T)
    spread = torch.stack([offsets, own[:37].float()], dim=1)[:, 0]
    found = best_two(wide[::2, 1::2], tall.T, spread, own_N=own.repeat_interleave(2)[::2])
    check(found, bounds, 1e-3)
    check(best_two(points.T.contiguous().T, centroids, offsets, own_N=own), bounds, 1e-3)
    check(
        best_two(points[:1].expand(40, 33), centroids, offsets),
        bounds_of(points, centroids, offsets, 1, None)[[0] * 40],
        1e-3,
    )


def interpreted_reaches_beyond_int32() -> None:
    """Rows, then components, that lie 2³⁰ values apart, in memory of which only the pages used are ever real."""
    points, centroids, offsets, _ = problem(3, 5, 3, torch.int8)
    bounds = bounds_of(points, centroids, offsets, 1, None)
    for strides in ((1 << 30, 1), (1, 1 << 30)):
        far = torch.empty((1 << 31) + 4, dtype=torch.int8).as_strided((3, 3), strides)
        far.copy_(points)
        check(best_two(far, centroids, offsets), bounds, 0)


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "python_functions=interpreted_*", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_needs_neither_triton_nor_a_gpu_to_be_imported() -> None:
    code = "import sys; sys.modules['triton'] = None; from deepcluster.clustering import nearest_triton as m; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(m.available('cpu'))"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"centroids_KP": torch.zeros(3, 5)}, "points must be"),
        ({"centroids_KP": torch.zeros(0, 4), "offsets_K": torch.zeros(0)}, "at least one"),
        ({"offsets_K": torch.zeros(2)}, "offsets must have"),
        ({"own_N": torch.zeros(3, dtype=torch.int64)}, "own one per point"),
        ({"own_N": torch.zeros(2)}, "own must be int32"),
        ({"points_NP": torch.zeros(2, 4, dtype=torch.float64)}, "must both be one of"),
        ({"centroids_KP": torch.zeros(3, 4, dtype=torch.bfloat16)}, "must both be one of"),
        ({"offsets_K": torch.zeros(3, device="meta")}, "on one device"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Tensor], told: str) -> None:
    fitting: dict[str, Any] = {
        "points_NP": torch.zeros(2, 4),
        "centroids_KP": torch.zeros(3, 4),
        "offsets_K": torch.zeros(3),
    }
    with pytest.raises(InputError, match=told):
        best_two(**{**fitting, **change})


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """triton, with its compiler for NVIDIA and an empty cache."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("triton interprets here")
    try:
        _ = triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"no compiler for NVIDIA GPUs: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield triton


def compiled(triton: Any, name: str, dtype: torch.dtype, p: int, tile: module.Tile) -> Any:
    """The kernel for contiguous points on sm_90, as a launch would specialise it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, block_p = module._kernel(), module._block_P(dtype, p)
    constants = {"column_stride": 1, "P": p, "ROW": -(-p // block_p) * block_p, "HAS_OWN": True, "PRECISION": "ieee"}
    constants |= {"BLOCK_N": tile.rows, "BLOCK_K": tile.centroids, "BLOCK_P": block_p}
    types = {"points": f"*{name}", "centroids": f"*{name}", "offsets": "*fp32", "own": "*i64", "best": "*fp32"}
    types |= {"index": "*i64", "second": "*fp32", "N": "i32", "K": "i32", "row_stride": "i32", "scale": "fp32"}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = [i for i, argument in enumerate(kernel.arg_names) if "*" in signature[argument] or argument == "row_stride"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )


@pytest.mark.parametrize(
    ("name", "dtype", "p", "tile"),
    [
        ("bf16", torch.bfloat16, 256, TILES[0]),
        ("bf16", torch.bfloat16, 256, TILES[-1]),
        ("i8", torch.int8, 256, TILES[0]),
        ("bf16", torch.bfloat16, 300, TILES[0]),
        ("fp32", torch.float32, 256, TILES[2]),
    ],
)
def test_compiles_for_an_h100(
    compiler: Any, name: str, dtype: torch.dtype, p: int, tile: module.Tile, tmp_path: Path
) -> None:
    """On tensor cores' warp-group instructions, without spilling registers, within the 227 KiB of shared memory."""
    kernel = compiled(compiler, name, dtype, p, tile)
    assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (dtype != torch.float32)
    assert kernel.metadata.shared <= 227 * 1024
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [compiler.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"STACK:(\d+)", usage)[1] == "0", usage


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "p"), [(100_003, 3_001, 256), (20_001, 1_037, 300), (5_003, 10_007, 33), (1, 1, 1)])
def test_on_the_gpu(n: int, k: int, p: int, dtype: torch.dtype) -> None:
    """Compiled, at large odd sizes, with every tile: within rounding of float64, and the same bits from all tiles."""
    points, centroids, offsets, own = (part.cuda() for part in problem(n, k, p, dtype))
    assert available("cuda")
    bounds = 0.5 * (points.double() @ centroids.double().T) - offsets.double()
    bounds[own >= 0] = bounds[own >= 0].scatter(1, own[own >= 0, None], -torch.inf)
    first = best_two(points, centroids, offsets, scale=0.5, own_N=own)
    check(first, bounds.cpu().numpy(), 0 if dtype == torch.int8 else 2e-3)
    for tile in TILES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_tile", lambda problem, tile=tile: tile)
            found = best_two(points, centroids, offsets, scale=0.5, own_N=own)
        assert all(torch.equal(one, other) for one, other in zip(found, first, strict=True)), tile


@needs_gpu
def test_on_the_gpu_beyond_int32() -> None:
    """8.4 million points of 256 are more than 2³¹ values: the last rows are as good as the first."""
    n = (1 << 23) + 4_003
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of the GPU's memory")
    rows, centroids, offsets, _ = problem(2_001, 37, 256, torch.bfloat16)
    points = torch.zeros(n, 256, dtype=torch.bfloat16, device="cuda")
    points[-2_001:] = rows.cuda()
    found = best_two(points, centroids.cuda(), offsets.cuda())
    check(tuple(part[-2_001:] for part in found), bounds_of(rows, centroids, offsets, 1, None), 2e-3)
    assert len(found[1][:-2_001].unique()) == 1


@needs_gpu
def test_tunes_once_for_similar_sizes() -> None:
    points, centroids, offsets, _ = (part.cuda() for part in problem(70_001, 2_000, 256, torch.bfloat16))
    best_two(points, centroids, offsets)
    tuned = len(module._fastest)
    assert tuned > 0
    for k in (1_999, 1_500, 1_025):
        best_two(points[: 66_000 + k], centroids[:k], offsets[:k])
    assert len(module._fastest) == tuned
