"""k-means against faiss and scikit-learn from the same start and with the same iterations, and against bare matrix products.

    python benchmarks/kmeans.py [--rows 100000,200000] [--clusters 1000,5000] [--threads 1,2] [--features F.npy]
    python benchmarks/kmeans.py --rows 1280000 --clusters 10000 --threads 2 --iterations 2 --repeats 1 --no-checks
    python benchmarks/kmeans.py --rows 1280000 --clusters 10000 --device cuda --only ours,plain,flash-kmeans,flashlib

Points are unit rows of 256 numbers: drawn from a mixture, and whitened features of images (`deepcluster embed
untrained:alexnet DATA --stage features --out F.npy`). Prints the median seconds of the programs, which take turns, the
ratio to faiss, the inertia that each reaches, and the share of pairs that ours compares. Programs that are not installed
are left out, and so are faiss and scikit-learn on a GPU, flash-kmeans and flashlib on a CPU. `--bounds` also prints what
the bounds of Hamerly (SDM 2010) could have saved at best. Use an idle machine: two threads beside another busy program are
slow.
"""

import argparse
import importlib.util
import itertools
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.kmeans import LloydResult, lloyd
from deepcluster.clustering.nearest import nearest_centroids
from deepcluster.clustering.whitening import Whitening

COMPONENTS = 256
Fit = Callable[[Tensor, Tensor, int, int], Tensor]
# Other programs for GPUs only, and their modules.
FLASH = {"flash-kmeans": "flash_kmeans", "flashlib": "flashlib"}


def mixture(n_rows: int, *, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Return unit rows (N, 256) around 3,000 centres, as far from them as the centres are from the origin."""
    generator = torch.Generator(device).manual_seed(seed)
    centres = torch.randn(3000, COMPONENTS, generator=generator, device=device)
    rows = torch.empty(n_rows, COMPONENTS, device=device)
    for block in rows.split(10_000):
        block.normal_(generator=generator)
        block += centres[torch.randint(3000, (len(block),), generator=generator, device=device)]
    return normalize(rows, out=rows)


def ours(points_NP: Tensor, start_KP: Tensor, iterations: int, threads: int) -> LloydResult:
    """Run this package."""
    torch.set_num_threads(threads)
    return lloyd(points_NP, start_KP, max_iter=iterations)


def faiss_kmeans(points_NP: Tensor, start_KP: Tensor, iterations: int, threads: int) -> Tensor:
    """Run `faiss.Clustering` on all points; return its centroids."""
    import faiss

    faiss.omp_set_num_threads(threads)
    clustering = faiss.Clustering(points_NP.shape[1], len(start_KP))
    clustering.niter = iterations
    clustering.max_points_per_centroid = len(points_NP)
    clustering.min_points_per_centroid = 1
    faiss.copy_array_to_vector(start_KP.numpy().ravel(), clustering.centroids)
    clustering.train(points_NP.numpy(), faiss.IndexFlatL2(points_NP.shape[1]))
    return torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(start_KP.shape))


def scikit_learn(points_NP: Tensor, start_KP: Tensor, iterations: int, threads: int) -> Tensor:
    """Run `sklearn.cluster.KMeans`; return its centroids."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    kmeans = KMeans(len(start_KP), init=start_KP.numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    with threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(kmeans.fit(points_NP.numpy()).cluster_centers_)


def plain_torch(points_NP: Tensor, start_KP: Tensor, iterations: int, threads: int) -> Tensor:
    """Run the obvious implementation, float32 products in blocks, argmax, index_add_; return its centroids."""
    torch.set_num_threads(threads)
    centroids_KP, rows = start_KP, 16_384 if points_NP.is_cuda else 512
    for _ in range(iterations):
        labels_N = torch.cat(
            [(centroids_KP.square().sum(1) / 2 - block @ centroids_KP.T).argmin(1) for block in points_NP.split(rows)]
        )
        sums_KP = torch.zeros_like(centroids_KP).index_add_(0, labels_N, points_NP)
        sizes_K1 = torch.bincount(labels_N, minlength=len(centroids_KP))[:, None]
        centroids_KP = torch.where(sizes_K1 > 0, sums_KP / sizes_K1.clamp(min=1), centroids_KP)
    return centroids_KP


def flash(name: str, points_NP: Tensor, start_KP: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Run flash-kmeans or flashlib on a GPU; return the labels before the last update, and the centroids after it.

    Their products are those of the points' type, of float32 in tf32. Empty clusters keep their centroids.
    """
    module = importlib.import_module(FLASH[name])
    fit = module.batch_kmeans_Euclid if name == "flash-kmeans" else module.flash_kmeans
    start_BKP = start_KP[None].clone()
    labels_BN, centroids_BKP, _ = fit(
        points_NP[None], len(start_KP), max_iters=iterations, tol=0.0, init_centroids=start_BKP
    )
    return labels_BN[0], centroids_BKP[0].float()


def product_seconds(n_rows: int, n_clusters: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds of the bare product of all points with all centroids, in blocks."""
    block_rows = 16_384 if device.type == "cuda" else max(128, (1 << 19) // n_clusters)
    sizes = (block_rows, n_clusters)
    if dtype == torch.int8:
        points, centroids = (torch.randint(-127, 127, (n, COMPONENTS), dtype=dtype, device=device) for n in sizes)
        multiply = torch._int_mm
    else:
        points, centroids = (torch.randn(n, COMPONENTS, device=device).to(dtype) for n in sizes)
        multiply = torch.mm
    seconds = [timed(lambda: multiply(points, centroids.T), device)[0] for _ in range(20)]
    return statistics.median(seconds) * n_rows / block_rows


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds of some work, and its result."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - started, result


def inertia(points_NP: Tensor, centroids_KP: Tensor) -> float:
    """Return the sum of squared distances to the nearest centroids."""
    return float(nearest_centroids(points_NP, centroids_KP)[1].sum(dtype=torch.float64))


def wrong_labels(points_NP: Tensor, centroids_KP: Tensor, labels_N: Tensor) -> int:
    """Return how many labels differ from those of plain float32 products, except for ties up to rounding."""
    wrong, rows = 0, 16_384 if points_NP.is_cuda else 1024
    halves_K = centroids_KP.square().sum(dim=1) / 2
    for block, labels in zip(points_NP.split(rows), labels_N.long().split(rows), strict=True):
        scores = block @ centroids_KP.T - halves_K
        wrong += int((scores.amax(dim=1) - scores.gather(1, labels[:, None])[:, 0] > 1e-6).sum())
    return wrong


def saved_by_bounds(points_NP: Tensor, start_KP: Tensor, iterations: int) -> list[float]:
    """Return the share of points, by iteration, that Hamerly's bounds prove unchanged, if exact before each iteration.

    A point is unchanged if its distance to the second nearest centroid, minus the largest move of any centroid, exceeds its
    distance to the nearest plus the move of that one.
    """
    centroids = [lloyd(points_NP, start_KP, max_iter=count).centroids_KP for count in range(iterations + 1)]
    shares = []
    for before_KP, after_KP in itertools.pairwise(centroids):
        drift_K = (after_KP - before_KP).norm(dim=1)
        stay = 0
        for block in points_NP.split(1024):
            nearest = torch.cdist(block, before_KP).topk(2, dim=1, largest=False)
            stay += int((nearest.values[:, 1] - drift_K.max() > nearest.values[:, 0] + drift_K[nearest.indices[:, 0]]).sum())
        shares.append(stay / len(points_NP))
    return shares


def percent(shares: Sequence[float]) -> str:
    """Return shares as a line of percentages."""
    return " ".join(f"{100 * share:.0f}%" for share in shares)


PROGRAMS: dict[str, Fit] = {
    "ours": lambda *args: ours(*args).centroids_KP,
    "faiss": faiss_kmeans,
    "scikit-learn": scikit_learn,
    "plain": plain_torch,
    **{name: lambda *args, name=name: flash(name, *args[:3])[1] for name in FLASH},  # type: ignore[misc]
}


def compare(name: str, points_NP: Tensor, n_clusters: int, threads: int, options: argparse.Namespace) -> None:
    """Print the table of one set of points."""
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(1)
    start_KP = points_NP[torch.randperm(len(points_NP), generator=generator)[:n_clusters]].to(device)
    points_NP = points_NP.to(device)
    left_out = FLASH if device.type == "cpu" else ("faiss", "scikit-learn")
    programs = [name for name in options.only if name not in left_out]
    seconds: dict[str, list[float]] = {program: [] for program in programs}
    reached = {}
    for _ in range(options.repeats):
        for program, values in seconds.items():
            fit = PROGRAMS[program]
            taken, centroids_KP = timed(lambda: fit(points_NP, start_KP, options.iterations, threads), device)  # noqa: B023
            values.append(taken)
            reached[program] = inertia(points_NP, centroids_KP) if options.checks else float("nan")
    where = f"{threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(
        f"\n{name}: {len(points_NP):,} x {points_NP.shape[1]}, k = {n_clusters:,}, {options.iterations} iterations, {where}"
    )
    medians = {program: statistics.median(values) for program, values in seconds.items()}
    baseline = "faiss" if "faiss" in medians else programs[-1]
    print(f"  {'':16} {'seconds':>8} {'x ' + baseline:>8} {'inertia':>12} {'difference':>11}")
    for program, median in medians.items():
        difference = 100 * (reached[program] / reached[baseline] - 1)
        ratio = medians[baseline] / median
        print(f"  {program:16} {median:8.2f} {ratio:8.2f} {reached[program]:12.2f} {difference:+10.3f}%")
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        product = options.iterations * product_seconds(len(points_NP), n_clusters, dtype, device)
        title = "product " + str(dtype).removeprefix("torch.")
        print(f"  {title:16} {product:8.2f} {medians[baseline] / product:8.2f}   bare products of all iterations")
    if not options.checks:
        return
    result = ours(points_NP, start_KP, options.iterations, threads)
    wrong = wrong_labels(points_NP, result.centroids_KP, result.labels_N)
    print(f"  labels unlike float32's: {wrong}; empty clusters repaired: {result.n_repaired}")
    print("  pairs compared, by assignment: " + percent(result.compared_history))
    if options.bounds:
        print("  points saved by bounds: " + percent(saved_by_bounds(points_NP, start_KP, options.iterations)))


def installed(names: str) -> list[str]:
    """Return the programs that can be run here."""
    needs = {"faiss": "faiss", "scikit-learn": "sklearn", **FLASH}
    return [name for name in names.split(",") if name not in needs or importlib.util.find_spec(needs[name])]


def numbers(text: str) -> list[int]:
    """Return comma-separated integers."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=numbers, default=[100_000, 200_000])
    parser.add_argument("--clusters", type=numbers, default=[1000, 5000])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--features", type=Path, action="append", default=[])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bounds", action="store_true")
    parser.add_argument("--no-checks", action="store_false", dest="checks", help="print only seconds")
    parser.add_argument("--only", type=installed, default=installed(",".join(PROGRAMS)))
    options = parser.parse_args()
    data = [("mixture", mixture(n_rows)) for n_rows in options.rows]
    for path in options.features:
        data.append((path.stem, Whitening(COMPONENTS).fit_transform(torch.from_numpy(np.load(path)))))
    for threads in options.threads:
        for name, points_NP in data:
            for n_clusters in options.clusters:
                compare(name, points_NP, n_clusters, threads, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory of this process {peak:.2f} GiB, the points {sum(p.nbytes for _, p in data) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
