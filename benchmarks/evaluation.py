"""Cost of the evaluation protocols, as ratios measured in one run.

    python benchmarks/evaluation.py RUN --data imagenette [--images 1000] [--epochs 2] [--repeats 3] [--quick]

RUN is a run folder, a checkpoint or `untrained:ARCH`; DATA has class folders in train/ and val/.

- linear: all stages in one pass over the images, against one run per stage (as in the published code);
- knn: the search for 20 neighbours of 10,000 rows among 50,000, against scikit-learn's brute force and faiss, on the
  same number of threads; for clustered rows, like features, and for rows that are all equally far apart (independent
  normal numbers). Also the share of neighbours that agree;
- features: images per second of feature extraction from files, as a share of the bare network's on tensors in memory,
  in the same precision and batches; and the speed-up with cached features.

Seconds are medians of `--repeats`, in which the variants take turns; ratios are of medians. faiss is left out if it
is not installed (`pip install faiss-cpu`).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.data.sources import open_source
from deepcluster.evaluation import linear
from deepcluster.evaluation.options import LinearOptions
from deepcluster.interop.loading import loaded
from deepcluster.models.trunk import normalise
from deepcluster.run.features import FEATURE_BATCH, Pooled
from deepcluster.run.model import Model

NEIGHBOURS = 20
# Clustered rows: number of clusters, width of the signal, and deviation of the noise.
N_CLUSTERS, TRUE_WIDTH, NOISE = 1000, 48, 0.3


def medians(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each variant; they take turns in every repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def line(what: str, seconds: float, against: str = "", other: float | None = None) -> None:
    """Print a time, and the ratio of another one to it."""
    ratio = "" if other is None else f"{against:>34} {other:>9.3f} s {other / seconds:>8.2f}×"
    print(f"  {what:<38}{seconds:>9.3f} s{ratio}", flush=True)


def subset(data: Path, part: str, count: int, to: Path) -> None:
    """Link `count` images of a part, spread evenly over its class folders."""
    paths = sorted(path for path in (data / part).glob("*/*") if path.is_file())
    if not paths:
        raise SystemExit(f"{data / part} has no class folders with images")
    count = min(count, len(paths))
    for index in range(count):
        path = paths[index * len(paths) // count]
        link = to / part / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())


def compare_linear(model: Model, data: Path, epochs: int, repeats: int) -> None:
    """Compare all stages in one pass with one run per stage."""

    def probe(stages: str) -> Sequence[str]:
        results = linear.evaluate(model, data, LinearOptions(stages=stages, epochs=epochs))
        return list(results.results["top-1"])

    stages = probe("all")  # also warms up
    ways: dict[str, Callable[[], Any]] = {"all": lambda: probe("all")}
    ways |= {stage: lambda stage=stage: probe(stage) for stage in stages}
    seconds = medians(ways, repeats)
    apart = sum(seconds[stage] for stage in stages)
    print(f"\nlinear, {epochs} epochs, {len(stages)} stages: {', '.join(stages)}")
    line("all stages in one pass", seconds["all"], "one run per stage", apart)
    for stage in stages:
        line(f"  only {stage}", seconds[stage])


def clustered_rows(count: int, dim: int, seed: int) -> Tensor:
    """Return unit rows around `N_CLUSTERS` centres in a low-dimensional space, with noise in all dimensions."""
    fixed, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    centres = torch.randn(N_CLUSTERS, TRUE_WIDTH, generator=fixed)
    to_wide = torch.randn(TRUE_WIDTH, dim, generator=fixed) / TRUE_WIDTH**0.5
    near = centres[torch.randint(N_CLUSTERS, (count,), generator=own)] + torch.randn(count, TRUE_WIDTH, generator=own)
    return normalize(near @ to_wide + NOISE * torch.randn(count, dim, generator=own))


def independent_rows(count: int, dim: int, seed: int) -> Tensor:
    """Return unit rows of independent normal numbers, for which no bound excludes anything."""
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def imported_faiss() -> ModuleType | None:
    """Return faiss if it is installed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def searches(known_ND: Tensor, queries_MD: Tensor, threads: int) -> dict[str, Callable[[], Tensor]]:
    """Return functions that find the neighbours (M, K) of unit rows, building the index included."""

    def ours() -> Tensor:
        return nearest_neighbours(queries_MD, known_ND, k=NEIGHBOURS, metric="cosine")[1]

    def scikit_learn() -> Tensor:
        index = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute", metric="cosine").fit(known_ND.numpy())
        return torch.from_numpy(index.kneighbors(queries_MD.numpy(), return_distance=False))

    ways = {"ours": ours, "scikit-learn, brute force": scikit_learn}
    faiss = imported_faiss()
    if faiss is not None:
        faiss.omp_set_num_threads(threads)

        def flat() -> Tensor:
            index = faiss.IndexFlatIP(known_ND.shape[1])
            index.add(known_ND.numpy())
            return torch.from_numpy(index.search(queries_MD.numpy(), NEIGHBOURS)[1])

        ways["faiss, flat inner product"] = flat
    return ways


def overlap(one_MK: Tensor, other_MK: Tensor) -> float:
    """Return the share of the neighbours in one that are also in the other."""
    return float((one_MK[:, :, None] == other_MK[:, None, :]).any(dim=2).double().mean())


def compare_knn(known: int, queries: int, dim: int, repeats: int) -> None:
    """Compare the search with those of the libraries."""
    threads = torch.get_num_threads()
    for about, make in (("clustered", clustered_rows), ("independent", independent_rows)):
        known_ND, queries_MD = make(known, dim, 1), make(queries, dim, 2)
        with threadpool_limits(threads):
            ways = searches(known_ND, queries_MD, threads)
            found = {name: way() for name, way in ways.items()}  # also warms up
            seconds = medians(ways, repeats)
        print(f"\nknn, {NEIGHBOURS} of {known:,} rows for each of {queries:,}, {dim} numbers, {about}, {threads} threads")
        for name in list(ways)[1:]:
            line("ours", seconds["ours"], name, seconds[name])
            print(f"    {overlap(found['ours'], found[name]):.5f} of the neighbours agree with {name.split(',')[0]}")


def bare_network(model: Model, count: int, stage: str) -> Callable[[], None]:
    """Return a function that runs the bare network on random images on the device, in the batches of the extraction."""
    sizes = [FEATURE_BATCH] * (count // FEATURE_BATCH) + ([count % FEATURE_BATCH] if count % FEATURE_BATCH else [])
    shape = (3, model.image_size, model.image_size)
    batch = torch.randint(256, (min(count, FEATURE_BATCH), *shape), dtype=torch.uint8)
    ready_BCHW = normalise(model.machine.put(batch))

    def run() -> None:
        with torch.no_grad(), model.machine.autocast():
            for size in sizes:
                model.trunk.maps(ready_BCHW[:size], (stage,))
        if model.machine.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def compare_features(model: Model, data: Path, folder: Path, repeats: int) -> None:
    """Compare feature extraction with the bare network and with cached features."""
    source, wanted = open_source(data / "train"), [Pooled(model.trunk.embed_stage)]
    cached, number = replace(model, cache=folder / "kept"), iter(range(1 << 20))
    bare = bare_network(model, len(source), model.trunk.embed_stage)

    def read_all(one: Model) -> float:
        return float(one.rows(source, wanted)[wanted[0]].float().sum())

    ways: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "extracted": lambda: read_all(replace(model, cache=folder / f"extracted-{next(number)}")),
        "cached": lambda: read_all(cached),
    }
    for way in ways.values():
        way()  # warms up, and fills the cache
    seconds = medians(ways, repeats)
    count = len(source)
    print(f"\nfeatures, {count:,} images, {model.image_size} px, {model.machine.precision}, batches of {FEATURE_BATCH}")
    print(
        f"  extraction {count / seconds['extracted']:,.0f} images per second, bare network {count / seconds['bare']:,.0f}: ",
        end="",
    )
    print(f"{seconds['bare'] / seconds['extracted']:.2f} of the limit")
    line("from the cache", seconds["cached"], "extracted again", seconds["extracted"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000, help="images of train/; a quarter as many of val/")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of the linear probe")
    parser.add_argument("--known", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=("linear", "knn", "features"), help="only this part")
    parser.add_argument("--folder", type=Path, help="an existing folder for temporary files")
    parser.add_argument("--quick", action="store_true", help="small and once: only check that it runs")
    options = parser.parse_args()
    if options.quick:
        options.images, options.epochs, options.repeats = 60, 1, 1
        options.known, options.queries, options.dim = 2000, 500, 64
    print(f"{options.repeats} repeats, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        data = folder / "data"
        subset(options.data, "train", options.images, data)
        subset(options.data, "val", max(options.images // 4, 1), data)
        model = replace(loaded(options.model, device=options.device), cache=folder / "cache")
        print(f"{model.trunk.arch} of {options.model}, {model.machine.describe()}")
        if options.only in (None, "features"):
            compare_features(model, data, folder, options.repeats)
        if options.only in (None, "linear"):
            compare_linear(model, data, options.epochs, options.repeats)
    if options.only in (None, "knn"):
        compare_knn(options.known, options.queries, options.dim, options.repeats)


if __name__ == "__main__":
    main()
