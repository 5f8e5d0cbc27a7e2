"""One image on its way through a run: which one, and what each step makes of it.

C channels, H and W pixels, D features, P components, K clusters, S images of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.work import Advance, no_advance
from deepcluster.data.cache import DecodedImages
from deepcluster.visualization.report.collection import Collection, Floats, evenly
from deepcluster.visualization.report.method.explained import Explained
from deepcluster.visualization.report.method.figures import ClusterHistory, scatter

# Clusters of medium size, from each of which this many images near its centre may be chosen.
CANDIDATE_CLUSTERS, CANDIDATES_PER_CLUSTER = 16, 2
MEASURED = 256  # Images whose spread is measured.
MOST_PAST = 24  # Earlier epochs that are shown, spread evenly.


@dataclass(frozen=True)
class Trace:
    """The image and what the first three steps make of it.

    Attributes:
        index: index of the image in its collection; `image_HWC` and `view_CHW` are uint8.
        features_D: features of the network.
        unscaled_P, point_P: components before and after scaling to unit length.
        distances_K: Euclidean, of the point to every centroid.
    """

    index: int
    image_HWC: Tensor
    view_CHW: Tensor
    features_D: Tensor
    unscaled_P: Tensor
    point_P: Tensor
    distances_K: Floats

    @property
    def nearest(self) -> int:
        """The cluster of the nearest centroid."""
        return int(self.distances_K.argmin())


def choose_image(collection: Collection, run: Explained, images: DecodedImages, advance: Advance) -> Trace | None:
    """Return the trace of an image that shows the method well: near the centre of a medium cluster, rich in contrast.

    Images that the last epoch drew are preferred. None where no candidate can be read.
    """
    sizes_K = collection.sizes_K()
    clusters = np.flatnonzero(sizes_K)
    median = np.median(sizes_K[clusters]) if len(clusters) else 0
    medium = clusters[np.argsort(np.abs(sizes_K[clusters] - median), kind="stable")][:CANDIDATE_CLUSTERS]
    indices = [one for cluster in medium.tolist() for one in collection.nearest_to_centre(cluster, CANDIDATES_PER_CLUSTER)]

    def value(trace: Trace) -> tuple[bool, bool, float]:
        own = int(collection.cluster_N[trace.index])
        others = np.delete(trace.distances_K, own)
        margin = float(others.min() - trace.distances_K[own]) if len(others) else 0.0
        contrast = min(0.2, float(trace.view_CHW.float().std()) / 255)
        return trace.nearest == own, len(run.positions(trace.index)) > 0, margin * contrast

    traces = [_trace(index, run, images, advance) for index in indices]
    return max((trace for trace in traces if trace is not None), key=value, default=None)


def trace_image(
    collection: Collection, run: Explained, images: DecodedImages, index: int, advance: Advance = no_advance
) -> Trace:
    """Return the trace of a given image.

    Raises:
        InputError: there is no such image, it is in no cluster, or it can't be read.
    """
    if not 0 <= index < len(collection):
        raise InputError(f"there is no image {index}: use 0 to {len(collection) - 1}")
    trace = _trace(index, run, images, advance) if collection.cluster_N[index] >= 0 else None
    if trace is None:
        raise InputError(f"image {index} ({collection.names[index]}) can't be read or is in no cluster; choose another")
    return trace


def _trace(index: int, run: Explained, images: DecodedImages, advance: Advance) -> Trace | None:
    if (image_HWC := _read_image(images, index, advance)) is None:
        return None
    view_CHW = run.clustered_view(image_HWC, index)
    features_1D = run.features(view_CHW[None])
    point_1P = run.model.points(features_1D)
    unscaled_1P, distances_1K = run.unscaled(features_1D), run.distances(point_1P)
    return Trace(index, image_HWC, view_CHW, features_1D[0], unscaled_1P[0], point_1P[0], distances_1K[0])


def _read_image(images: DecodedImages, index: int, advance: Advance) -> Tensor | None:
    """Return the image (H, W, 3), uint8; None where it can't be read (any more)."""
    try:
        return images.get(index)
    except (UnreadableImage, OSError):
        return None
    finally:
        advance(1)


def features_of_some(collection: Collection, run: Explained, images: DecodedImages, advance: Advance = no_advance) -> Tensor:
    """Return features (S, D) of the collection's sample, or where unknown of at most `MEASURED` of its images."""
    if run.features_MD is not None and len(run.features_MD) >= 2:
        return run.features_MD
    pool = collection.sample_M if len(collection.sample_M) else np.flatnonzero(collection.cluster_N >= 0)
    chosen = pool[evenly(len(pool), MEASURED)]
    read = ((index, _read_image(images, index, advance)) for index in chosen.tolist())
    return run.features(torch.stack([run.clustered_view(image, index) for index, image in read if image is not None]))


def cluster_history(
    collection: Collection, run: Explained, index: int, advance: Advance = no_advance
) -> list[ClusterHistory]:
    """Return the image's clusters in earlier epochs that clustered, oldest first, at most `MOST_PAST`."""
    mates = np.flatnonzero(collection.cluster_N == collection.cluster_N[index])
    mates = mates[mates != index]
    clustered = [past for past in collection.past if (past.epoch - 1) % run.settings.reassign_every == 0]
    history = []
    for past in [clustered[number] for number in evenly(len(clustered), MOST_PAST)]:
        cluster_N = past.load()
        advance(0)
        own = int(cluster_N[index])
        share = float((cluster_N[mates] == own).mean()) if len(mates) and own >= 0 else float("nan")
        history.append(ClusterHistory(past.epoch, own, share))
    return history


def neighbourhood(
    collection: Collection, run: Explained, trace: Trace, clusters: Sequence[int], most: int = 150
) -> tuple[str, float] | None:
    """Return a chart of points of some clusters, the first its own, in the two directions in which they vary most.

    Args:
        most: largest number of points per cluster.

    Returns:
        the chart, and the share of the variance that it keeps; None where fewer than three points are known.
    """
    cluster_M = collection.cluster_N[collection.sample_M]
    rows = {cluster: np.flatnonzero(cluster_M == cluster)[:most] for cluster in clusters}
    if sum(map(len, rows.values())) < 3 or collection.points_MP.shape[1:] != trace.point_P.shape:
        return None
    points_SP = collection.points_MP[np.concatenate(list(rows.values()))].astype(np.float64)
    mean_P = points_SP.mean(axis=0)
    _, singular, axes = np.linalg.svd(points_SP - mean_P, full_matrices=False)
    axes_P2 = axes[:2].T
    if axes_P2.shape[1] < 2:
        return None
    places = {cluster: (collection.points_MP[some] - mean_P) @ axes_P2 for cluster, some in rows.items()}
    centroids = (run.centroids_KP[list(clusters)].cpu().double().numpy() - mean_P) @ axes_P2
    star = (trace.point_P[None].double().numpy() - mean_P) @ axes_P2
    kept = float((singular[:2] ** 2).sum() / max((singular**2).sum(), 1e-300))
    return scatter(places, centroids, star, clusters[0]), kept
