"""`deepcluster cluster` of a table of embeddings, beside scikit-learn's MiniBatchKMeans and faiss: seconds and peak memory.

    python benchmarks/cluster.py                                                 # 20,000 rows, K = 200
    python benchmarks/cluster.py --points 1000000 --clusters 1000 --repeats 1    # a table of 2.1 GB, beside temporary files

    --points N, --dim D   rows of the table and their width (20,000 and 512)
    --clusters K          number of clusters (200)
    --iterations I        Lloyd's iterations of ours and of faiss (20); scikit-learn's mini-batches end by themselves
    --repeats R           the programs take turns R times, and the medians are printed (3)
    --threads T           threads of each program (the number of cores). With 1, processor seconds can be compared on a
                          machine that is not idle, too: threads that wait for each other count as busy
    --programs A,B        some of deepcluster, function, scikit-learn, faiss; those that are not installed are left out

Each program is a process of its own that reads the same Parquet table, whitens it to as many components as `cluster` does,
clusters it, and writes the cluster of each row: start, imports, reading and writing count. `function` is the time of
`deepcluster.cluster` alone, after the imports. The inertia is that of the clusters in the whitened space of `cluster`, with
the means of each program's clusters, per point. faiss takes 256 points per cluster by default; here it takes all, as ours.
A process shows at least the 0.6 GB of the process that starts it. One that fails is left out of the table.
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
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from deepcluster.applied.clustering_options import ClusterOptions
from deepcluster.applied.clustering_rows import FeatureRows, make_points, n_components
from deepcluster.clustering.assignment import cluster_means, member_distances
from deepcluster.core.work import Work
from deepcluster.run.embedding_tables import open_table

GROUP_ROWS = 50_000
# What each program needs beside this project.
MODULES = {"deepcluster": "torch", "function": "torch", "scikit-learn": "sklearn", "faiss": "faiss"}
# What the other programs do: read, whiten, cluster, write.
OTHERS = """
import sys, numpy as np, pyarrow as pa, pyarrow.parquet as pq
source, target, width, clusters, iterations, program = *sys.argv[1:3], *map(int, sys.argv[3:6]), sys.argv[6]
column = pq.read_table(source, columns=["embedding"])["embedding"].combine_chunks()
rows_ND = column.flatten().to_numpy().reshape(len(column), -1)
if program == "scikit-learn":
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import PCA
    points_NP = PCA(width, whiten=True, svd_solver="covariance_eigh").fit_transform(rows_ND)
    points_NP /= np.linalg.norm(points_NP, axis=1, keepdims=True)
    labels_N = MiniBatchKMeans(clusters, batch_size=max(1024, 4 * clusters), n_init=1, random_state=0).fit_predict(points_NP)
else:
    import faiss
    whiten = faiss.PCAMatrix(rows_ND.shape[1], width, -0.5)
    whiten.train(rows_ND)
    points_NP = whiten.apply(rows_ND)
    faiss.normalize_L2(points_NP)
    kmeans = faiss.Kmeans(width, clusters, niter=iterations, seed=0, max_points_per_centroid=len(rows_ND))
    kmeans.train(points_NP)
    labels_N = kmeans.index.search(points_NP, 1)[1][:, 0]
pq.write_table(pa.table({"cluster": labels_N}), target)
"""


# Ours, timed without the imports.
FUNCTION = """
import sys, time, deepcluster, torch, sklearn, pyarrow.parquet
from deepcluster.applied import clustering
from deepcluster.core.progress import Reporter
source, run, clusters, iterations = *sys.argv[1:3], *map(int, sys.argv[3:5])
started = time.perf_counter()
deepcluster.cluster(
    source, out=run, clusters=clusters, kmeans_iterations=iterations, overwrite=True, reporter=Reporter(quiet=True)
)
print(time.perf_counter() - started)
"""


def write_table(path: Path, points: int, dim: int) -> None:
    """Write embeddings around 3,000 centres, as far from them as the centres are from the origin."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3000, dim), np.float32)
    schema = pa.schema({"name": pa.string(), "embedding": pa.list_(pa.float32(), dim)})
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, points, GROUP_ROWS):
            count = min(GROUP_ROWS, points - first)
            rows_ND = centres[rng.integers(3000, size=count)] + rng.standard_normal((count, dim), np.float32)
            names = [f"photos/{row:07d}.jpg" for row in range(first, first + count)]
            embeddings = pa.FixedSizeListArray.from_arrays(pa.array(rows_ND.ravel()), dim)
            writer.write_table(pa.table({"name": names, "embedding": embeddings}, schema=schema))


def run(command: list[str], threads: int) -> tuple[float, float, int] | None:
    """Run a process; return its seconds, or those that it prints, seconds of processor, and peak memory in bytes.

    None if it failed.
    """
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        printed = process.stdout.read() if process.stdout else ""
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if status:
        return None
    seconds = float(printed) if FUNCTION in command else seconds
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def whitened(table: Path) -> torch.Tensor:
    """Return the points that `cluster` makes of a table."""
    rows = open_table(table)
    features = FeatureRows(len(rows), rows.dim, rows.read)
    return make_points(features, ClusterOptions(), Work(), torch.device("cpu")).points_FP


def inertia(points_NP: torch.Tensor, labels: Path, clusters: int) -> float:
    """Return the mean squared distance of the points to the mean of their cluster."""
    labels_N = torch.from_numpy(pq.read_table(labels, columns=["cluster"])["cluster"].to_numpy().astype(np.int64))
    means_KP = cluster_means(points_NP, labels_N, clusters)
    return float(member_distances(points_NP, labels_N, means_KP).double().square().mean())


def parsed() -> argparse.Namespace:
    """Return the options; `programs` are those that are installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    values = {"points": 20_000, "dim": 512, "clusters": 200, "iterations": 20, "repeats": 3, "threads": os.cpu_count()}
    for name, value in values.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--programs", default=",".join(MODULES))
    options = parser.parse_args()
    options.programs = [name for name in options.programs.split(",") if importlib.util.find_spec(MODULES[name])]
    return options


def commands_of(options: argparse.Namespace, folder: Path, table: Path, width: int) -> dict[str, tuple[list[str], Path]]:
    """Return the command of each program, and the table of clusters that it writes."""
    clusters, iterations, run = str(options.clusters), str(options.iterations), str(folder / "run")
    words = ["--clusters", clusters, "--kmeans-iterations", iterations, "--overwrite", "--quiet"]
    ours = {
        "deepcluster": [sys.executable, "-m", "deepcluster", "cluster", str(table), "--out", run, *words],
        "function": [sys.executable, "-c", FUNCTION, str(table), run, clusters, iterations],
    }
    found = {}
    for name in options.programs:
        labels = folder / "run" / "clusters.parquet" if name in ours else folder / f"{name}.parquet"
        numbers = [str(width), clusters, iterations]
        found[name] = (ours.get(name) or [sys.executable, "-c", OTHERS, str(table), str(labels), *numbers, name], labels)
    return found


def main() -> None:
    """Print a table: median seconds, processor seconds, peak memory, ratios to the first program, inertia."""
    options = parsed()
    with tempfile.TemporaryDirectory() as folder:
        table, width = Path(folder) / "embeddings.parquet", n_components(options.points, options.dim, ClusterOptions())
        write_table(table, options.points, options.dim)
        commands = commands_of(options, Path(folder), table, width)
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, (command, _labels) in commands.items():
                found[name].extend(filter(None, [run(command, options.threads)]))
        print(
            f"{options.points:,} x {options.dim}, {width} components, K = {options.clusters:,}, threads {options.threads}, "
            f"medians of {options.repeats}"
        )
        print(f"{'program':<14}{'seconds':>9}{'ratio':>7}{'cpu s':>9}{'ratio':>7}{'peak GB':>9}{'inertia':>9}", flush=True)
        found = {name: runs for name, runs in found.items() if runs}
        base = [statistics.median(column) for column in zip(*next(iter(found.values())), strict=True)]
        points_NP = whitened(table)
        for name, runs in found.items():
            seconds, processor, memory = (statistics.median(column) for column in zip(*runs, strict=True))
            shares = f"{seconds / base[0]:>7.2f}{processor:>9.1f}{processor / base[1]:>7.2f}"
            ended = inertia(points_NP, commands[name][1], options.clusters)
            print(f"{name:<14}{seconds:>9.2f}{shares}{memory / 1e9:>9.2f}{ended:>9.4f}")


if __name__ == "__main__":
    main()
