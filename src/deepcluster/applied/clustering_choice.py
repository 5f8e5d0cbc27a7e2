"""How many clusters: one number, several that are compared, or `auto`. K clusters, S points of a sample, P components."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.starts import number_points, rows_of
from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError
from deepcluster.core.options import plain
from deepcluster.core.seeds import seed_of
from deepcluster.core.work import Work

AUTO = "auto"
# Numbers of clusters that `auto` compares, as far as there are this many images per cluster.
LADDER = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100, 140, 200)
IMAGES_PER_CLUSTER = 20
# Points that are compared: at least so many, and so many per cluster.
SAMPLE, SAMPLE_PER_CLUSTER = 10_000, 20
SILHOUETTE_POINTS = 3_000
# Pairs of halves that are clustered for the stability.
PAIRS = 2

# Clusters of some points, given K and a seed.
Fit = Callable[[Tensor, int, int], Assignment]


@dataclass(frozen=True)
class Measures:
    """Measures of one number of clusters, on a sample.

    Attributes:
        clusters: K.
        inertia: mean squared distance to the centroid.
        silhouette: mean over images, -1 to 1: how much nearer the own cluster is than the next one.
        nmi: agreement of the clusters of two seeds. It grows with K.
        stability: agreement of the clusters of two halves of the images on all of them, corrected for chance (adjusted Rand
            index): 1 the same, 0 chance.
        largest: share of the images in the largest cluster.
        empty: number of clusters without an image.
    """

    clusters: int
    inertia: float
    silhouette: float
    nmi: float
    stability: float
    largest: float
    empty: int


def parse_clusters(clusters: Any) -> tuple[int, ...] | str | None:
    """Return numbers of clusters, ascending, or "auto"; None if none are given.

    Raises:
        InputError: it is something else, or a number below 2.
    """
    clusters = plain(clusters)
    if clusters is None or clusters == AUTO:
        return clusters  # type: ignore[no-any-return]
    parts = (
        clusters.split(",") if isinstance(clusters, str) else clusters if isinstance(clusters, list | tuple) else [clusters]
    )
    try:
        if any(isinstance(part, bool | float) for part in parts):
            raise ValueError
        numbers = sorted({int(part) for part in parts})
    except (TypeError, ValueError):
        numbers = []
    if not numbers:
        raise InputError(f"clusters={clusters!r} should be a number, several to compare such as 10,20,50, or auto")
    if numbers[0] < 2:
        raise InputError(f"clusters={numbers[0]} is too small; use 2 or more")
    return tuple(numbers)


def candidates(n_points: int) -> tuple[int, ...]:
    """Return the numbers of clusters that `auto` compares."""
    return tuple(k for k in LADDER if k * IMAGES_PER_CLUSTER <= n_points) or (2,)


def sample_of(points_FP: Tensor, most_clusters: int, ranks: Ranks) -> Tensor:
    """Return points (S, P) spread evenly over those of all ranks, on all ranks."""
    first, n_all = number_points(len(points_FP), ranks)
    count = min(n_all, max(SAMPLE, SAMPLE_PER_CLUSTER * most_clusters))
    if count == n_all and ranks.size == 1:
        return points_FP
    return rows_of(points_FP, first, torch.arange(count) * n_all // count, ranks)


def measure(points_SP: Tensor, clusters: int, fit: Fit, *, seed: int) -> Measures:
    """Return the measures of a number of clusters."""
    from sklearn.metrics import silhouette_score

    one, other = (fit(points_SP, clusters, seed_of(seed, number)) for number in (0, 1))
    labels_S = one.labels_N.numpy()
    chosen = np.arange(min(len(labels_S), SILHOUETTE_POINTS)) * len(labels_S) // min(len(labels_S), SILHOUETTE_POINTS)
    n_seen = len(np.unique(labels_S[chosen]))
    apart = 1 < n_seen < len(chosen)
    silhouette = float(silhouette_score(points_SP[chosen].cpu().numpy(), labels_S[chosen])) if apart else math.nan
    sizes_K = one.sizes_K()
    return Measures(
        clusters=one.n_clusters,
        inertia=one.inertia / len(labels_S),
        silhouette=silhouette,
        nmi=one.nmi(other.labels_N),
        stability=stability(points_SP, clusters, fit, seed=seed),
        largest=one.largest_share,
        empty=int((sizes_K == 0).sum()),
    )


def stability(points_SP: Tensor, clusters: int, fit: Fit, *, seed: int) -> float:
    """Return how well the clusters of two random halves of the points agree on all points, corrected for chance.

    Two seeds on the same points agree too easily: with few clusters both find the same poor solution, and NMI grows with K
    (Lange et al., "Stability-based validation of clustering solutions", 2004; Hubert and Arabie, "Comparing partitions").
    """
    from sklearn.metrics import adjusted_rand_score

    scores = []
    for pair in range(PAIRS):
        order_S = torch.randperm(len(points_SP), generator=torch.Generator().manual_seed(seed_of(seed, 2, pair)))
        labels: list[NDArray[np.int64]] = []
        for number, half in enumerate(order_S.tensor_split(2)):
            some = points_SP[half.to(points_SP.device)]
            found = fit(some, clusters, seed_of(seed, 3, pair, number))
            labels.append(found.predict(points_SP).cpu().numpy())
        scores.append(adjusted_rand_score(*labels))
    return float(np.mean(scores))


def compare(points_SP: Tensor, clusters: Sequence[int], fit: Fit, *, seed: int, work: Work) -> list[Measures]:
    """Return the measures of each number of clusters."""
    with work.track("comparing numbers of clusters", len(clusters), "numbers") as advance:
        found = []
        for number in clusters:
            found.append(measure(points_SP, number, fit, seed=seed))
            advance(1)
    return found


def most_stable(measures: Sequence[Measures]) -> Measures:
    """Return the number of clusters of the highest stability; of equal ones the larger number."""
    return max(measures, key=lambda one: (round(one.stability, 2), one.clusters))


def as_text(measures: Sequence[Measures], chosen: Measures, n_sample: int, n_all: int) -> list[str]:
    """Return the table, and how to read it, as lines."""
    lines = ["clusters   inertia  silhouette  nmi of 2 seeds  stability  largest  empty"]
    for one in measures:
        silhouette = "–" if math.isnan(one.silhouette) else f"{one.silhouette:.3f}"
        lines.append(
            f"{one.clusters:>8,}  {one.inertia:>8.3f}  {silhouette:>10}  {one.nmi:>14.3f}  {one.stability:>9.3f}  "
            f"{one.largest:>7.1%}  {one.empty:>5,}{'  ← used' if one is chosen else ''}"
        )
    of = f" Measured on {n_sample:,} of {n_all:,} images, spread evenly." if n_sample < n_all else ""
    lines += [
        "stability: how well the clusters of two halves of the images agree, 0 chance to 1 the same, whatever K: the best "
        f"single guide.{of}",
        "silhouette: higher is better, near 0 clusters touch. inertia only falls and nmi rises with K: look for bends, not "
        "for the best value.",
        f"{chosen.clusters:,} clusters are the most stable"
        + (
            "."
            if chosen.stability > WEAK
            else ", but none is stable: the images form no clear groups, so choose K by what "
            "you need, such as images per folder."
        ),
    ]
    return lines


# Below this stability, the images do not fall into groups by themselves.
WEAK = 0.6


def rows_of_table(measures: Sequence[Measures], chosen: Measures) -> list[dict[str, Any]]:
    """Return the measures as plain values; None for what could not be measured."""
    return [
        {name: None if value != value else value for name, value in asdict(one).items()} | {"used": one is chosen}
        for one in measures
    ]
