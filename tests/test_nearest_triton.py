"""The fused kernel against NumPy in float64; what it does with ties and left-out centroids; that it compiles.

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

SIZES = [(n, k, p) for k in (64, 128, 192) for n, p in ((1, 16), (3, 33), (65, 1), (65, 256), (130, 300))]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def problem(n: int, k: int, p: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points, centroids and offsets, of which about a third leave their centroid out."""
    generator = torch.Generator().manual_seed(seed)
    points, centroids = (torch.randn(rows, p, generator=generator).half() for rows in (n, k))
    offsets = centroids.float().square().sum(dim=1) / 2
    offsets[torch.rand(k, generator=generator) < 0.3] = torch.inf
    return points, centroids, offsets


def scores_of(points: Tensor, centroids: Tensor, offsets: Tensor, scale: float = 1.0) -> np.ndarray:
    return scale * (points.double().numpy() @ centroids.double().numpy().T) - offsets.double().numpy()


def check(found: tuple[Tensor, Tensor], scores: np.ndarray, tolerance: float) -> None:
    """Scores to a tolerance; the index is the first of the best, except where others lie within the tolerance."""
    index, second = (tensor.cpu().numpy() for tensor in found)
    assert (index.dtype, second.dtype) == (np.int64, np.float32)
    descending = np.sort(np.concatenate([scores, np.full_like(scores[:, :1], -np.inf)], axis=1), axis=1)[:, ::-1]
    np.testing.assert_allclose(second, descending[:, 1], rtol=0, atol=tolerance)
    rows = np.arange(len(scores))
    assert (scores[rows, index] >= descending[:, 0] - tolerance).all()
    with np.errstate(invalid="ignore"):
        clear = (descending[:, 0] - descending[:, 1] > tolerance) | (tolerance == 0)
    assert (index == scores.argmax(axis=1))[clear].all()


def interpreted_equals_float64() -> None:
    for seed, (n, k, p) in enumerate(SIZES):
        points, centroids, offsets = problem(n, k, p, seed=seed)
        check(best_two(points, centroids, offsets, scale=0.5), scores_of(points, centroids, offsets, 0.5), 1e-3)


@pytest.mark.parametrize("tile", TILES, ids=str)
def interpreted_tiles_agree(tile: module.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """With whole numbers, to the bit."""
    monkeypatch.setattr(module, "TILES", (tile,))
    points, centroids, offsets = ((4 * part).round() for part in problem(150, 192, 70))
    check(best_two(points, centroids, offsets), scores_of(points, centroids, offsets), 0)


def interpreted_ties_go_to_the_lower_number() -> None:
    """Four points of a square; each is a centroid three times over: twice in the first tile, once in the third."""
    points = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]).half()
    centroids = torch.cat([points, points, torch.zeros(130, 2), points, torch.zeros(50, 2)]).half()
    index, second = best_two(points, centroids, torch.zeros(len(centroids)))
    assert (index.tolist(), second.tolist()) == ([0, 1, 2, 3], [1] * 4)
    offsets = torch.full((len(centroids),), 0.5)
    offsets[[0, 1, 2, 7]] = torch.inf  # leaves its centroid out
    index, second = best_two(points, centroids, offsets)
    assert (index.tolist(), second.tolist()) == ([4, 5, 6, 3], [0.5] * 4)
    # The same slot of two tiles, 32 and 64 apart; the later one in the lower slot.
    apart = torch.zeros(128, 2).half()
    apart[[37, 69, 96]] = points[0]
    assert best_two(points[:1], apart, torch.zeros(128))[0].tolist() == [37]


def interpreted_leaves_nothing() -> None:
    points, offsets = torch.ones(2, 3).half(), torch.full((64,), torch.inf)
    centroids = torch.ones(64, 3).half()
    index, second = best_two(points, centroids, offsets)
    assert (index.tolist(), second.tolist()) == ([-1, -1], [-torch.inf] * 2)
    offsets[5] = 0
    index, second = best_two(points, centroids, offsets)
    assert (index.tolist(), second.tolist()) == ([5, 5], [-torch.inf] * 2)
    assert [len(part) for part in best_two(points[:0], centroids, offsets)] == [0, 0]


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
        [sys.executable, "-c", code + "import torch; print(m.available(torch.device('cpu'), 16))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centroids_KP": torch.zeros(64, 5, dtype=torch.float16)}, "points must be"),
        ({"centroids_KP": torch.zeros(0, 4, dtype=torch.float16), "offsets_K": torch.zeros(0)}, "at least one"),
        ({"centroids_KP": torch.zeros(63, 4, dtype=torch.float16), "offsets_K": torch.zeros(63)}, "multiple of 64"),
        ({"offsets_K": torch.zeros(2)}, "offsets must have"),
        ({"points_NP": torch.zeros(2, 4)}, "must be float16"),
        ({"points_NP": torch.zeros(4, 2, dtype=torch.float16).T}, "contiguous"),
        ({"offsets_K": torch.zeros(64, device="meta")}, "on one device"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Tensor], message: str) -> None:
    fitting: dict[str, Any] = {
        "points_NP": torch.zeros(2, 4, dtype=torch.float16),
        "centroids_KP": torch.zeros(64, 4, dtype=torch.float16),
        "offsets_K": torch.zeros(64),
    }
    with pytest.raises(InputError, match=message):
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


def compiled(triton: Any, p: int, tile: module.Tile, capability: int) -> Any:
    """The kernel as a launch would specialise it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = module._kernel()
    constants = {"P": p, "BLOCK_N": tile.rows, "BLOCK_K": tile.centroids, "BLOCK_P": module._block_P(p)}
    types = {"points": "*fp16", "centroids": "*fp16", "offsets": "*fp32", "index": "*i64", "second": "*fp32"}
    types |= {"N": "i32", "K": "i32", "scale": "fp32"}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = [i for i, argument in enumerate(kernel.arg_names) if "*" in signature[argument]]
    return triton.compile(
        ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )


@pytest.mark.parametrize(("p", "tile"), [*((256, tile) for tile in TILES), (304, TILES[0]), (48, TILES[0])])
def test_compiles_for_an_h100(compiler: Any, p: int, tile: module.Tile, tmp_path: Path) -> None:
    """On tensor cores' warp-group instructions, without spilling registers, within the 227 KiB of shared memory."""
    kernel = compiled(compiler, p, tile, 90)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 227 * 1024
    assert spilled_bytes(compiler, kernel, tmp_path) == 0


@pytest.mark.parametrize("capability", [80, 100])
def test_the_first_tile_compiles_for_other_gpus(compiler: Any, capability: int, tmp_path: Path) -> None:
    """For an A100 and a B200, on their tensor cores, within the 99 KiB of shared memory of every GPU from sm_80 on."""
    kernel = compiled(compiler, 256, TILES[0], capability)
    assert "mma" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 99 * 1024
    assert spilled_bytes(compiler, kernel, tmp_path) == 0


def spilled_bytes(triton: Any, kernel: Any, folder: Path) -> int:
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", usage)
    assert found, usage
    return int(found[1])


@needs_gpu
@pytest.mark.parametrize(("n", "k", "p"), [(100_003, 3_008, 256), (20_001, 1_088, 304), (5_003, 10_048, 48), (1, 64, 16)])
def test_on_the_gpu(n: int, k: int, p: int) -> None:
    """Compiled, at large odd sizes, with every tile: within rounding of float64, and the same bits from all tiles."""
    points, centroids, offsets = (part.cuda() for part in problem(n, k, p))
    assert available(points.device, p)
    first = best_two(points, centroids, offsets, scale=0.5)
    scores = 0.5 * (points.double() @ centroids.double().T) - offsets.double()
    check(first, scores.cpu().numpy(), 2e-3)
    for tile in TILES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_tile", lambda *_, tile=tile: tile)
            found = best_two(points, centroids, offsets, scale=0.5)
        assert all(torch.equal(one, other) for one, other in zip(found, first, strict=True)), tile


@needs_gpu
def test_on_the_gpu_beyond_int32() -> None:
    """8.4 million points of 256 are more than 2³¹ values: the last rows are as good as the first."""
    n = (1 << 23) + 4_003
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of the GPU's memory")
    rows, centroids, offsets = problem(2_001, 64, 256)
    points = torch.zeros(n, 256, dtype=torch.float16, device="cuda")
    points[-2_001:] = rows.cuda()
    found = best_two(points, centroids.cuda(), offsets.cuda())
    check((found[0][-2_001:], found[1][-2_001:]), scores_of(rows, centroids, offsets), 2e-3)
    assert len(found[0][:-2_001].unique()) == 1


@needs_gpu
def test_tunes_once_for_a_number_of_components() -> None:
    points, centroids, offsets = (part.cuda() for part in problem(1 << 19, 2_048, 256))
    best_two(points, centroids, offsets)
    tuned = len(module._fastest)
    assert tuned > 0
    for k in (1_984, 1_024):
        best_two(points, centroids[:k], offsets[:k])
    assert len(module._fastest) == tuned
