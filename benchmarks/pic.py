"""Power iteration clustering and its nearest neighbours against the published procedure and faiss.

    python benchmarks/pic.py [--rows 50000] [--neighbours 5] [--threads 1,2] [--repeats 3] [--features F.npy]

Points are whitened unit rows of 256 numbers: drawn from a mixture, or features of images (`deepcluster embed
untrained:alexnet DATA --stage features --out F.npy`). The search for neighbours is compared with faiss's exact index;
the clustering, on the same neighbours, with a direct implementation of the published formulas: a Python loop over
images where the published code has one. Programs take turns. Prints the median seconds, the ratios, and whether the
clusters are the same. At the published bandwidth of 0.2 the numbers of clusters differ: weights so small vanish in
the rounding of the published arithmetic. faiss is left out if it is not installed. Use an idle machine.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.clustering.pic import PUBLISHED_SIGMA, PowerIterationClustering, auto_sigma
from deepcluster.clustering.whitening import Whitening

COMPONENTS = 256
ALPHA, ITERATIONS = 0.001, 200


def mixture(n_rows: int, *, seed: int = 0) -> Tensor:
    """Return whitened unit rows (N, 256) around N/50 centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(2, n_rows // 50), COMPONENTS, generator=generator)
    rows = torch.randn(n_rows, COMPONENTS, generator=generator)
    rows += centres[torch.randint(len(centres), (n_rows,), generator=generator)]
    return Whitening(COMPONENTS).fit_transform(rows)


def our_neighbours(points_NP: Tensor, k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return our squared distances and row numbers (N, k)."""
    squared, indices = nearest_neighbours(points_NP, points_NP, k=k, metric="sqeuclidean", exclude_self=True)
    return squared.double().numpy(), indices.numpy()


def faiss_neighbours(points_NP: Tensor, k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return those of faiss's `IndexFlatL2`; the first column is taken to be the row itself, as in the published code."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(points_NP.shape[1])
    index.add(points_NP.numpy())
    squared, indices = index.search(points_NP.numpy(), k + 1)
    return squared[:, 1:].astype(np.float64), indices[:, 1:]


def ours(squared_NE: NDArray[np.float64], indices_NE: NDArray[np.int64], sigma: float) -> NDArray[np.int64]:
    """Return our labels."""
    return PowerIterationClustering().partition(squared_NE, indices_NE, sigma=sigma)


def as_published(squared_NE: NDArray[np.float64], indices_NE: NDArray[np.int64], sigma: float) -> NDArray[np.int64]:
    """Return the labels of the published formulas, implemented directly: sparse products, and loops over images."""
    graph, density = _published_density(squared_NE, indices_NE, sigma)
    labels = _published_climb(graph, density)
    members: dict[int, list[int]] = {}
    for image, label in enumerate(labels):
        members.setdefault(label, []).append(image)
    joined = {}
    for label, images in members.items():
        if len(images) == 1:
            others = (labels[other] for other in indices_NE[images[0]] if len(members[labels[other]]) > 1)
            joined[images[0]] = next(others, label)
    for image, label in joined.items():
        labels[image] = label
    return np.array(labels)


def _published_density(squared_NE: NDArray[np.float64], indices_NE: NDArray[np.int64], sigma: float) -> tuple[Any, Any]:
    from scipy.sparse import csr_matrix

    n_images, n_neighbours = indices_NE.shape
    kernel = np.vectorize(lambda distance: np.exp(-distance / sigma**2))
    starts = n_neighbours * np.arange(n_images + 1)
    edges = csr_matrix((kernel(squared_NE).ravel(), indices_NE.ravel(), starts), shape=(n_images, n_images))
    graph = (edges + edges.T).tocsr()
    graph.sort_indices()
    density = np.ones(n_images) / n_images
    for _ in range(ITERATIONS):
        density = ALPHA * graph.T.dot(density) + (1 - ALPHA) / n_images
        density /= density.sum()
    return graph, density


def _published_climb(graph: Any, density: NDArray[np.float64]) -> list[int]:
    pointers = list(range(len(density)))
    for image in range(len(density)):
        best = 0.0
        for place in range(graph.indptr[image], graph.indptr[image + 1]):
            other = graph.indices[place]
            pull = graph.data[place] * (density[other] - density[image])
            if pull > best:
                best, pointers[image] = pull, int(other)
    labels = []
    for image in range(len(density)):
        while pointers[image] != image:
            image = pointers[image]
        labels.append(image)
    return labels


def same_clusters(one: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    """Return True if two partitions are equal up to the numbering of their clusters."""
    pairs = len(np.unique(np.stack([one, other]), axis=1).T)
    return pairs == len(np.unique(one)) == len(np.unique(other))


def in_turns(programs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the median seconds of each program, and its result."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    found: dict[str, Any] = {}
    for _ in range(repeats):
        for name, program in programs.items():
            started = time.perf_counter()
            found[name] = program()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}, found


def measure(points_NP: Tensor, k: int, repeats: int) -> dict[str, float | bool | int]:
    """Return all figures of the table by name: seconds, shares, numbers, or True and False."""
    searches: dict[str, Callable[[], Any]] = {"neighbours, ours": lambda: our_neighbours(points_NP, k)}
    if importlib.util.find_spec("faiss"):
        searches["neighbours, faiss"] = lambda: faiss_neighbours(points_NP, k)
    figures: dict[str, float | bool | int] = {}
    seconds, found = in_turns(searches, repeats)
    figures.update(seconds)
    squared, indices = found["neighbours, ours"]
    if "neighbours, faiss" in found:
        figures["neighbours, faiss / ours"] = seconds["neighbours, faiss"] / seconds["neighbours, ours"]
        figures["share of equal neighbours"] = float((found["neighbours, faiss"][1] == indices).mean())
    sigma = auto_sigma(squared)
    seconds, labels = in_turns(
        {
            "clustering, ours": lambda: ours(squared, indices, sigma),
            "clustering, as published": lambda: as_published(squared, indices, sigma),
        },
        repeats,
    )
    figures.update(seconds)
    figures["clustering, as published / ours"] = seconds["clustering, as published"] / seconds["clustering, ours"]
    figures["same clusters"] = same_clusters(*labels.values())
    figures["clusters"] = int(labels["clustering, ours"].max()) + 1
    figures["clusters at sigma 0.2, ours"] = len(np.unique(ours(squared, indices, PUBLISHED_SIGMA)))
    figures["clusters at sigma 0.2, as published"] = len(np.unique(as_published(squared, indices, PUBLISHED_SIGMA)))
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--neighbours", type=int, default=5)
    parser.add_argument("--threads", default="1,2", help="numbers of threads, in turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--features", type=Path, help=".npy of whitened features, instead of the mixture")
    options = parser.parse_args(arguments)
    points_NP = torch.from_numpy(np.load(options.features)).float() if options.features else mixture(options.rows)
    points_NP = points_NP[: options.rows].contiguous()
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        print(f"{len(points_NP):,} rows of {points_NP.shape[1]} numbers, {options.neighbours} neighbours, {threads} threads")
        for name, figure in measure(points_NP, options.neighbours, options.repeats).items():
            text = f"{figure:12.3f}" if isinstance(figure, float) else f"{figure!s:>12}"
            print(f"  {name:36}{text}")


if __name__ == "__main__":
    main()
