"""`deepcluster cluster` of a table of embeddings, beside scikit-learn's MiniBatchKMeans and faiss: seconds and peak memory.

    python benchmarks/cluster.py [--points 20000] [--dim 512] [--clusters 200] [--iterations 20] [--repeats 3]
    python benchmarks/cluster.py --points 1000000 --clusters 1000 --repeats 1

Each program is a process of its own that reads the same Parquet table, whitens it to as many components as `cluster` does,
clusters it, and writes the cluster of each row: start, imports, reading and writing count. Programs take turns. The inertia
is that of the clusters in the whitened space of `cluster`, with the means of each program's clusters, per point. Programs
that are not installed are left out. Use an idle machine.
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


def run(command: list[str]) -> tuple[float, float, int]:
    """Run a process; return its seconds, seconds of processor, and peak memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command[:4])} failed")
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def inertia(table: Path, labels: Path, clusters: int) -> float:
    """Return the mean squared distance of the points to the mean of their cluster."""
    rows = open_table(table)
    points_NP = make_points(
        FeatureRows(len(rows), rows.dim, rows.read), ClusterOptions(), Work(), torch.device("cpu")
    ).points_FP
    labels_N = torch.from_numpy(pq.read_table(labels, columns=["cluster"])["cluster"].to_numpy().astype(np.int64))
    means_KP = cluster_means(points_NP, labels_N, clusters)
    return float(member_distances(points_NP, labels_N, means_KP).double().square().mean())


def main() -> None:
    """Print a table: median seconds, processor seconds, peak memory, ratios to ours, inertia."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, value in (("points", 20_000), ("dim", 512), ("clusters", 200), ("iterations", 20), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    installed = {"scikit-learn": "sklearn", "faiss": "faiss"}
    others = [name for name, module in installed.items() if importlib.util.find_spec(module)]
    with tempfile.TemporaryDirectory() as folder:
        table, width = Path(folder) / "embeddings.parquet", n_components(options.points, options.dim, ClusterOptions())
        write_table(table, options.points, options.dim)
        labels = {name: Path(folder) / f"{name}.parquet" for name in others}
        labels["deepcluster"] = Path(folder) / "run" / "clusters.parquet"
        numbers = list(map(str, (width, options.clusters, options.iterations)))
        commands = {name: [sys.executable, "-c", OTHERS, str(table), str(labels[name]), *numbers, name] for name in others}
        words = ["--clusters", str(options.clusters), "--kmeans-iterations", str(options.iterations), "--overwrite"]
        ours = [sys.executable, "-m", "deepcluster", "cluster", str(table), "--out", str(Path(folder) / "run"), *words]
        commands = {"deepcluster": ours, **commands}
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, command in commands.items():
                found[name].append(run(command))
        print(
            f"{options.points:,} x {options.dim}, {width} components, K = {options.clusters:,}, medians of {options.repeats}"
        )
        print(f"{'program':<14}{'seconds':>9}{'ratio':>7}{'cpu s':>8}{'ratio':>7}{'peak GB':>9}{'inertia':>9}")
        base = [statistics.median(column) for column in zip(*found["deepcluster"], strict=True)]
        for name, runs in found.items():
            seconds, processor, memory = (statistics.median(column) for column in zip(*runs, strict=True))
            shares = f"{seconds / base[0]:>7.2f}{processor:>8.1f}{processor / base[1]:>7.2f}"
            ended = inertia(table, labels[name], options.clusters)
            print(f"{name:<14}{seconds:>9.2f}{shares}{memory / 1e9:>9.2f}{ended:>9.4f}")


if __name__ == "__main__":
    main()
