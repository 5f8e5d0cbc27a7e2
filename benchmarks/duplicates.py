"""`deepcluster duplicates`: groups of near rows among all pairs, beside faiss and scikit-learn: seconds and peak memory.

    python benchmarks/duplicates.py [--points 50000] [--dim 256] [--copies 0.05] [--spread 30] [--repeats 3]

Each program is a process of its own that reads the same .npy array of rows of unit length, finds all pairs within the same
distance, and makes groups of them; start, imports and reading count. Rows lie around `--spread` centres, as those of a
trained network do, and a share of them are copies of others, moved by up to 0.9 of the distance. Programs take turns. The
groups must be the same, but for pairs within rounding of the distance. Programs that are not installed are left out. Use an
idle machine, or compare the seconds of processor.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# Each reads `source`, and writes the set of each row to `target`.
BEGIN = "import sys, numpy as np\nsource, target, radius = sys.argv[1], sys.argv[2], float(sys.argv[3])\n"
SETS = """
from scipy.sparse.csgraph import connected_components
np.save(target, connected_components(graph, directed=False)[1])
"""
PROGRAMS = {
    "deepcluster": """
import torch
from deepcluster.clustering.near import near_sets
np.save(target, near_sets(torch.from_numpy(np.load(source)), radius))
""",
    "faiss": """
import faiss
from scipy.sparse import csr_array
rows_ND = np.load(source)
index = faiss.IndexFlatL2(rows_ND.shape[1])
index.add(rows_ND)
starts, squared, near = index.range_search(rows_ND, radius**2)
graph = csr_array((np.ones(len(near), np.int8), near, starts), shape=(len(rows_ND),) * 2)
"""
    + SETS,
    "scikit-learn": """
from sklearn.neighbors import NearestNeighbors
rows_ND = np.load(source)
graph = NearestNeighbors(radius=radius, algorithm="brute").fit(rows_ND).radius_neighbors_graph(rows_ND)
"""
    + SETS,
}
PACKAGES = {"deepcluster": "deepcluster", "faiss": "faiss", "scikit-learn": "sklearn"}
# Distance of near rows as a share of the typical one, as of `duplicates`.
SHARE = 0.04


def rows_with_copies(points: int, dim: int, copies: float, spread: int) -> tuple[np.ndarray, float]:
    """Return rows of unit length, some of which are others moved a little, and the distance of near rows."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((spread, dim), np.float32)
    rows_ND = centres[rng.integers(spread, size=points)] + rng.standard_normal((points, dim), np.float32)
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    radius = SHARE * float(np.sqrt(2 * rows_ND.var(axis=0, dtype=np.float64).sum()))
    chosen = rng.permutation(points)
    count = int(copies * points)
    moved = rng.standard_normal((count, dim), np.float32)
    moved *= rng.uniform(0, 0.9 * radius, (count, 1)).astype(np.float32) / np.linalg.norm(moved, axis=1, keepdims=True)
    rows_ND[chosen[:count]] = rows_ND[chosen[count : 2 * count]] + moved
    return rows_ND, radius


def run(command: list[str]) -> tuple[float, float, int]:
    """Run a process; return its seconds, seconds of processor, and peak memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:2])} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--copies", type=float, default=0.05, help="share of rows that are copies of others, at most 0.5")
    parser.add_argument("--spread", type=int, default=30, help="number of centres")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    programs = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]
    with tempfile.TemporaryDirectory() as folder:
        rows_ND, radius = rows_with_copies(options.points, options.dim, options.copies, options.spread)
        source = str(Path(folder) / "rows.npy")
        np.save(source, rows_ND)
        print(f"{options.points:,} x {options.dim}, distance {radius:.3g}, {os.cpu_count()} cores")
        measured: dict[str, list[tuple[float, float, int]]] = {name: [] for name in programs}
        n_sets = {}
        for _ in range(options.repeats):
            for name in programs:
                target = str(Path(folder) / f"{name}.npy")
                measured[name].append(run([sys.executable, "-c", BEGIN + PROGRAMS[name], source, target, str(radius)]))
                n_sets[name] = len(np.unique(np.load(target)))
    first = [statistics.median(one[column] for one in measured["deepcluster"]) for column in range(3)]
    print(
        "| | seconds | of processor | peak memory | ratio of seconds | of processor | of memory | groups and single rows |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in programs:
        wall, cpu, memory = (statistics.median(one[column] for one in measured[name]) for column in range(3))
        ratios = " | ".join(f"{value / own:.2f}" for value, own in zip((wall, cpu, memory), first, strict=True))
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {memory / 1e9:.2f} GB | {ratios} | {n_sets[name]:,} |")


if __name__ == "__main__":
    main()
