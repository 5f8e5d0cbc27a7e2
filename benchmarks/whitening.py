"""Time and memory of whitening. Each method gets the same rows, in its own process.

    python benchmarks/whitening.py [--rows 2000,50000,500000] [--dim 4096] [--components 256] [--threads 1]

Prints seconds, CPU-seconds, faiss's CPU-seconds over the method's, the explained share of the variance, and the peak memory
of the process minus that of the loaded libraries, including the rows if a method needs them all at once. Generating the rows
is not timed: normal numbers of variance 1/i, mirrored eight times so that no feature equals a component, and an offset;
generated block by block from a seed. Methods: ours (a stream of batches, never all rows),
faiss.PCAMatrix (optional), scikit-learn's PCA (randomised; from the covariance), and plain torch: the covariance and all its
eigenvectors in float32. A method whose rows would take more than 80 % of the free memory is left out.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import free_memory_bytes
from deepcluster.core.text import size

BLOCK = 2000
BATCH = 256
MIRRORS = 8
# Copies of all rows that a method holds: as given, and centred.
COPIES = {"ours": 0.0, "torch": 2.0, "faiss": 2.0, "sklearn-randomized": 2.2, "sklearn-covariance": 2.2}
FREE_SHARE = 0.8

Result = dict[str, Any]
# Rows_ND → directions_PD, not necessarily of unit length.
Method = Callable[[NDArray[np.float32], int], NDArray[np.floating[Any]]]


def blocks(n_rows: int, dim: int, seed: int) -> Iterator[Tensor]:
    """Yield the rows, BLOCK at a time, the same at every call."""
    mirrors_MD = torch.randn(MIRRORS, dim, generator=torch.Generator().manual_seed(seed))
    mirrors_MD /= mirrors_MD.norm(dim=1, keepdim=True)
    deviation_D = torch.arange(1, dim + 1) ** -0.5
    for first in range(0, n_rows, BLOCK):
        generator = torch.Generator().manual_seed(seed + 1 + first)
        block = torch.randn(min(BLOCK, n_rows - first), dim, generator=generator) * deviation_D
        for mirror_D in mirrors_MD:
            block.addr_(block @ mirror_D, mirror_D, alpha=-2)
        yield block.add_(mirrors_MD[0], alpha=10)


def all_rows(n_rows: int, dim: int, seed: int) -> NDArray[np.float32]:
    """Return all rows in one array."""
    rows_ND = np.empty((n_rows, dim), np.float32)
    for number, block in enumerate(blocks(n_rows, dim, seed)):
        rows_ND[number * BLOCK : number * BLOCK + len(block)] = block.numpy()
    return rows_ND


def by_torch(rows_ND: NDArray[np.float32], n_components: int) -> NDArray[np.floating[Any]]:
    """Return the directions of the obvious implementation: centre, multiply, decompose."""
    features_ND = torch.from_numpy(rows_ND)
    centred_ND = features_ND - features_ND.mean(dim=0)
    _, vectors_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / (len(rows_ND) - 1))
    return vectors_DD.T[-n_components:].numpy()


def by_faiss(rows_ND: NDArray[np.float32], n_components: int) -> NDArray[np.floating[Any]]:
    """Return the directions of PCA with whitening as in the 2018 code."""
    import faiss

    matrix = faiss.PCAMatrix(rows_ND.shape[1], n_components, -0.5)
    matrix.train(rows_ND)
    return faiss.vector_to_array(matrix.A).reshape(n_components, -1)


def by_sklearn(solver: str) -> Method:
    """Return PCA with one of scikit-learn's solvers."""

    def fit(rows_ND: NDArray[np.float32], n_components: int) -> NDArray[np.floating[Any]]:
        from sklearn.decomposition import PCA

        return PCA(n_components, whiten=True, svd_solver=solver, copy=False, random_state=0).fit(rows_ND).components_

    return fit


METHODS: dict[str, Method] = {
    "torch": by_torch,
    "faiss": by_faiss,
    "sklearn-randomized": by_sklearn("randomized"),
    "sklearn-covariance": by_sklearn("covariance_eigh"),
}


class Clock:
    """Sums of seconds and CPU-seconds spent inside `with`."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def __exit__(self, *fault: object) -> None:
        self.seconds += time.perf_counter() - self.started[0]
        self.cpu_seconds += time.process_time() - self.started[1]


def by_ours(n_rows: int, dim: int, n_components: int, seed: int, clock: Clock) -> NDArray[np.floating[Any]]:
    """Return our directions; rows come in batches as from a network, in half precision as they are kept."""
    whitening = Whitening(n_components)
    for block in blocks(n_rows, dim, seed):
        for batch in block.half().split(BATCH):
            with clock:
                whitening.update(batch)
    with clock:
        whitening.finish()
    return whitening.components_DP.T.numpy()


def explained(directions_PD: NDArray[np.floating[Any]], n_rows: int, dim: int, seed: int) -> float:
    """Return the share of the variance of the first rows, at most 4 × D, that lies in the directions."""
    sample_ND = torch.from_numpy(all_rows(min(n_rows, 4 * dim), dim, seed)).double()
    sample_ND -= sample_ND.mean(dim=0)
    # Directions are orthogonal up to rounding; those of missing components are zero.
    kept_PD = torch.from_numpy(np.asarray(directions_PD, np.float64))
    basis_DP = torch.linalg.qr(torch.nn.functional.normalize(kept_PD[kept_PD.norm(dim=1) > 0], dim=1).T).Q
    return float((sample_ND @ basis_DP).square().sum() / sample_ND.square().sum())


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(method: str, n_rows: int, dim: int, n_components: int, threads: int, seed: int) -> Result:
    """Measure one method in this process: seconds, CPU-seconds, explained variance, peak bytes minus the libraries'."""
    torch.set_num_threads(threads)
    if method == "ours":
        by_ours(100, 16, 2, seed, Clock())
    else:
        METHODS[method](all_rows(100, 16, seed), 2)
    clock, loaded = Clock(), peak_bytes()
    if method == "ours":
        directions_PD = by_ours(n_rows, dim, n_components, seed, clock)
    else:
        rows_ND = all_rows(n_rows, dim, seed)
        with clock:
            directions_PD = METHODS[method](rows_ND, n_components)
        del rows_ND
    peak = peak_bytes() - loaded
    return {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "explained": explained(directions_PD, n_rows, dim, seed),
        "peak_bytes": peak,
    }


def measure_apart(method: str, n_rows: int, dim: int, n_components: int, threads: int, seed: int) -> Result:
    """Return the result of `measure` in its own process, or the reason why it was left out."""
    if method == "faiss":
        try:
            import faiss  # noqa: F401
        except ImportError:
            return {"left_out": "faiss is not installed"}
    needed = COPIES[method] * 4 * n_rows * dim
    if needed > FREE_SHARE * free_memory_bytes():
        return {"left_out": f"needs {size(needed)} for the rows and a centred copy, {size(free_memory_bytes())} are free"}
    one = [method, *map(str, (n_rows, dim, n_components, threads, seed))]
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    done = subprocess.run(
        [sys.executable, __file__, "--one", *one], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"left_out": f"ended with {done.returncode}: {lines[-1] if lines else 'no message'}"}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def table(
    rows: Sequence[int] = (2000, 50_000, 500_000),
    *,
    dim: int = 4096,
    n_components: int = 256,
    threads: int = 1,
    seed: int = 0,
    methods: Sequence[str] = tuple(COPIES),
    on_line: Callable[[Result], None] = lambda line: None,
) -> list[Result]:
    """Return a line per number of rows and method: rows, method, and the result of `measure` or the reason `left_out`.

    `times_faiss` is faiss's CPU-seconds over the method's, if both are known; `on_line` is called with each line at once.
    """
    lines = []
    for n_rows in rows:
        faiss_seconds = None
        for method in sorted(methods, key=lambda method: method != "faiss"):
            line = {"rows": n_rows, "method": method, "times_faiss": None}
            line |= measure_apart(method, n_rows, dim, n_components, threads, seed)
            if method == "faiss":
                faiss_seconds = line.get("cpu_seconds")
            if faiss_seconds is not None and "cpu_seconds" in line:
                line["times_faiss"] = faiss_seconds / max(1e-9, line["cpu_seconds"])
            lines.append(line)
            on_line(line)
    return lines


def in_words(line: Result) -> str:
    """Return a line of the table as printed."""
    start = f"{line['rows']:>9,}  {line['method']:<20}"
    if "left_out" in line:
        return f"{start}left out: {line['left_out']}"
    times = f"{line['times_faiss']:.2f}" if line["times_faiss"] is not None else "-"
    return (
        f"{start}{line['seconds']:>10.2f}{line['cpu_seconds']:>10.2f}{times:>9}{line['explained']:>12.6f}"
        f"{size(line['peak_bytes']):>12}"
    )


def numbers(text: str) -> list[int]:
    """Return comma-separated integers."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=numbers, default=[2000, 50_000, 500_000])
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--components", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(COPIES), help=", ".join(COPIES))
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        method, *sizes = arguments.one
        print(json.dumps(measure(method, *map(int, sizes))))
        return
    print(f"{arguments.dim:,} → {arguments.components} features, {arguments.threads} thread(s), torch {torch.__version__}")
    print(f"{'rows':>9}  {'method':<20}{'seconds':>10}{'CPU-s':>10}{'× faiss':>9}{'explained':>12}{'peak':>12}")
    table(
        arguments.rows,
        dim=arguments.dim,
        n_components=arguments.components,
        threads=arguments.threads,
        seed=arguments.seed,
        methods=arguments.methods.split(","),
        on_line=lambda line: print(in_words(line), flush=True),
    )


if __name__ == "__main__":
    main()
