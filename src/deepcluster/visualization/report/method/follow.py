"""One image on its way through a run: which one, and what becomes of it at each step.

N images, C channels, H and W pixels, D features, P components, K clusters, S images looked at, V views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.data.cache import DecodedImages
from deepcluster.data.views import rotate_quarters
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.method.head_pipeline import HeadPipeline, RandomViews
from deepcluster.visualization.report.method.pipeline import Floats, Integers, Pipeline

# Clusters of middling size, from each of which this many images near its centre may be chosen.
CANDIDATE_CLUSTERS, CANDIDATES_A_CLUSTER = 16, 2
# Images that the spectrum is measured on.
MEASURED = 256
VIEWS = 6
# Earlier epochs that are shown, spread evenly.
MOST_PAST = 24
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Followed:
    """The image and what the first three steps make of it.

    Attributes:
        index: of the image in its collection; `image_HWC` and `view_CHW` are uint8.
        features_D: of the network.
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


@dataclass(frozen=True)
class Spectrum:
    """Variance of each component over images: before whitening (all that were clustered), after it, and of points."""

    before_P: Floats
    whitened_P: Floats
    points_P: Floats
    n_measured: int


@dataclass(frozen=True)
class Lesson:
    """The last trained epoch, for one image.

    Attributes:
        label: its cluster in that epoch, -1 = none.
        positions: where the epoch drew it; the first `n_seen` of the views are these, the others might have been.
        views: random views.
        probabilities_VK: of the head, for the centre view (row 0) and for each random view.
    """

    label: int
    positions: Integers
    n_seen: int
    views: RandomViews
    probabilities_VK: Floats


@dataclass(frozen=True)
class Companionship:
    """Where the image was in an earlier epoch, and which share of its companions of now was there with it."""

    epoch: int
    cluster: int
    share: float


def choose_image(collection: Collection, pipeline: Pipeline, images: DecodedImages, tick: Tick) -> Followed | None:
    """An image that shows the method well: near the centre of a middling cluster, clearly its own, rich in contrast.

    Images that the last epoch drew go first. None where no candidate can be read.
    """
    found = [one for one in (_follow(index, pipeline, images, tick) for index in _candidates(collection)) if one]
    if not found:
        return None

    def worth(one: Followed) -> tuple[bool, bool, float]:
        own = int(collection.cluster_N[one.index])
        others = np.delete(one.distances_K, own)
        margin = float(others.min() - one.distances_K[own]) if len(others) else 0.0
        contrast = min(0.2, float(one.view_CHW.float().std()) / 255)
        return one.nearest == own, len(pipeline.drawn_positions(one.index)) > 0, margin * contrast

    return max(found, key=worth)


def follow_image(collection: Collection, pipeline: Pipeline, images: DecodedImages, index: int, tick: Tick) -> Followed:
    """A chosen image through the first three steps.

    Raises:
        InputError: there is no such image, it is in no cluster, or it can't be read.
    """
    if not 0 <= index < len(collection):
        raise InputError(f"there is no image {index}: use 0 to {len(collection) - 1}")
    followed = _follow(index, pipeline, images, tick) if collection.cluster_N[index] >= 0 else None
    if followed is None:
        raise InputError(f"image {index} ({collection.names[index]}) can't be read or is in no cluster; choose another")
    return followed


def _follow(index: int, pipeline: Pipeline, images: DecodedImages, tick: Tick) -> Followed | None:
    image_HWC = read_image(images, index)
    tick(1)
    if image_HWC is None:
        return None
    view_CHW = clustered_view(pipeline, image_HWC, index)
    features_1D = pipeline.features(view_CHW[None])
    point_1P = pipeline.points(features_1D)
    unscaled_P, distances_K = pipeline.unscaled(features_1D)[0], pipeline.distances(point_1P)[0]
    return Followed(index, image_HWC, view_CHW, features_1D[0], unscaled_P, point_1P[0], distances_K)


def clustered_view(pipeline: Pipeline, image_HWC: Tensor, index: int) -> Tensor:
    """The view (3, S, S), uint8, of an image that is clustered, turned where the run turns it."""
    view_1CHW = pipeline.cluster_view([image_HWC])
    quarters_N = pipeline.clustered_quarters_N
    return (view_1CHW if quarters_N is None else rotate_quarters(view_1CHW, quarters_N[[index]]))[0]


def read_image(images: DecodedImages, index: int) -> Tensor | None:
    """The image (H, W, 3), uint8, or None: it can't be read any more."""
    try:
        return images.get(index)
    except (UnreadableImage, OSError):
        return None


def _candidates(collection: Collection) -> Sequence[int]:
    """Images nearest to the centres of the clusters whose sizes are the most usual."""
    sizes_K = collection.sizes_K()
    clusters = np.flatnonzero(sizes_K)
    median = np.median(sizes_K[clusters]) if len(clusters) else 0
    middling = clusters[np.argsort(np.abs(sizes_K[clusters] - median), kind="stable")][:CANDIDATE_CLUSTERS]
    return [index for cluster in middling.tolist() for index in nearest_of(collection, cluster, CANDIDATES_A_CLUSTER)]


def nearest_of(collection: Collection, cluster: int, count: int, *, but: int = -1) -> list[int]:
    """The `count` images of a cluster that are nearest to its centroid, without the image `but`."""
    members = np.flatnonzero(collection.cluster_N == cluster)
    members = members[members != but]
    order = np.argsort(collection.distance_N[members], kind="stable")
    nearest: list[int] = members[order][:count].tolist()
    return nearest


def measure_spectrum(collection: Collection, pipeline: HeadPipeline, images: DecodedImages, tick: Tick) -> Spectrum:
    """The variance of the components over some images, as the trunk sees these now."""
    features_SD = features_of_some(collection, pipeline, images, tick)
    whitened_SP, points_SP = pipeline.unscaled(features_SD), pipeline.points(features_SD)
    before_P = pipeline.whitening.variance_P.cpu().double().numpy()
    return Spectrum(before_P, _variance(whitened_SP), _variance(points_SP), len(features_SD))


def features_of_some(collection: Collection, pipeline: Pipeline, images: DecodedImages, tick: Tick) -> Tensor:
    """Features (S, D) of the collection's sample, or where they are not at hand of at most `MEASURED` of its images."""
    if pipeline.features_MD is not None and len(pipeline.features_MD) >= 2:
        return pipeline.features_MD
    pool = collection.sample_M if len(collection.sample_M) else np.flatnonzero(collection.cluster_N >= 0)
    chosen = pool[np.unique(np.linspace(0, len(pool) - 1, min(MEASURED, len(pool))).round().astype(int))]
    views = []
    for index in chosen.tolist():
        image_HWC = read_image(images, index)
        tick(1)
        if image_HWC is not None:
            views.append(clustered_view(pipeline, image_HWC, index)[None])
    return pipeline.features(torch.cat(views), lambda _: tick(0))


def _variance(rows_SP: Tensor) -> Floats:
    finite_SP = rows_SP[torch.isfinite(rows_SP).all(dim=1)].double()
    variance_P: Floats = finite_SP.var(dim=0, correction=1 if len(finite_SP) > 1 else 0).numpy()
    return variance_P


def last_lesson(pipeline: HeadPipeline, followed: Followed) -> Lesson | None:
    """What the last trained epoch showed of the image, and what the head says of it now; None where there is no head."""
    if pipeline.head is None or pipeline.head_labels_N is None:
        return None
    seen = pipeline.drawn_positions(followed.index)[:VIEWS]
    others = np.setdiff1d(np.arange(2 * VIEWS), seen)[: VIEWS - len(seen)]
    positions = np.concatenate([seen, others])
    quarters = pipeline.quarters_of(followed.index)
    views = pipeline.random_views(followed.image_HWC, positions, quarters)
    centre_1CHW = rotate_quarters(pipeline.cluster_view([followed.image_HWC]), torch.tensor([quarters]))
    centre_1K = pipeline.probabilities(centre_1CHW)
    probabilities_VK = np.concatenate([centre_1K, pipeline.probabilities(views.coloured_VCHW)])
    label = int(pipeline.head_labels_N[followed.index])
    return Lesson(label, positions, len(seen), views, probabilities_VK)


def companions(collection: Collection, pipeline: Pipeline, index: int, tick: Tick) -> list[Companionship]:
    """The image's clusters in earlier epochs, oldest first: those that grouped the images anew, at most `MOST_PAST`."""
    mates = np.flatnonzero(collection.cluster_N == collection.cluster_N[index])
    mates = mates[mates != index]
    anew = [past for past in collection.past if (past.epoch - 1) % pipeline.reassign_every == 0]
    chosen = np.unique(np.linspace(0, len(anew) - 1, min(MOST_PAST, len(anew))).round().astype(int))
    story = []
    for number in chosen.tolist():
        cluster_N = anew[number].load()
        tick(0)
        own = int(cluster_N[index])
        share = float((cluster_N[mates] == own).mean()) if len(mates) and own >= 0 else float("nan")
        story.append(Companionship(anew[number].epoch, own, share))
    return story


def neighbourhood(
    collection: Collection, pipeline: Pipeline, followed: Followed, clusters: Sequence[int], most: int = 150
) -> tuple[dict[int, NDArray[np.float64]], NDArray[np.float64], NDArray[np.float64], float] | None:
    """Points of some clusters, flattened to the two directions in which they vary most.

    Returns:
        two coordinates of the sampled points of each cluster; of the centroids; of the image; and the share of the
        variance that the two directions keep. None where fewer than three points are known.
    """
    cluster_M = collection.cluster_N[collection.sample_M]
    rows = {cluster: np.flatnonzero(cluster_M == cluster)[:most] for cluster in clusters}
    count = sum(map(len, rows.values()))
    if count < 3 or collection.points_MP.shape[1:] != followed.point_P.shape:
        return None
    points_SP = collection.points_MP[np.concatenate(list(rows.values()))].astype(np.float64)
    mean_P = points_SP.mean(axis=0)
    _, singular, axes = np.linalg.svd(points_SP - mean_P, full_matrices=False)
    axes_P2 = axes[:2].T
    if axes_P2.shape[1] < 2:
        return None

    def flat(rows_SP: NDArray[np.floating]) -> NDArray[np.float64]:
        coordinates: NDArray[np.float64] = (rows_SP - mean_P) @ axes_P2
        return coordinates

    places = {cluster: flat(collection.points_MP[some]) for cluster, some in rows.items()}
    centroids = flat(pipeline.centroids_KP[list(clusters)].cpu().double().numpy())
    kept = float((singular[:2] ** 2).sum() / max((singular**2).sum(), 1e-300))
    return places, centroids, flat(followed.point_P[None].double().numpy())[0], kept
