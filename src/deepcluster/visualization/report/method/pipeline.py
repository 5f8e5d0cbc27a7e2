"""What a run does to one image, computed as the run does it: its views, features, point, distances, scores.

N images, B batch, C channels, H and W pixels, D features, P components, K clusters, M images of a sample.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.device import Machine
from deepcluster.data.views import LONGEST, ClusterView, Colours
from deepcluster.models.convnets import sobel_layer
from deepcluster.models.trunk import FEATURES, Trunk, normalise
from deepcluster.run.features import extract_stage

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# Images that the network looks at together.
TOGETHER = 32


@dataclass(frozen=True, kw_only=True)
class Pipeline(ABC):
    """A run as far as it got: its networks, its clusters, and the settings that explain them, of every method.

    Attributes:
        version: of the method: 1 or 2.
        trunk: as it is now, in eval mode.
        image_size: side of what the network sees, in pixels.
        reduce_to: shorter side to which larger photos are made smaller as they are decoded (0: never).
        cluster_stage: stage whose features are clustered.
        centroids_KP: of the clusters that are shown, those of the collection.
        clusters_epoch: epoch whose table the clusters are; after the last epoch of a finished run it is one more.
        trained_epoch: the last epoch that was trained, or is.
        stop_reassigning: the last epoch that begins with a clustering (0: none is).
        clusterer: "kmeans", "balanced" or "pic".
        super_clusters: that images are grouped in first (0: none).
        features_MD: features of the collection's sample where they are at hand: they need not be made again.
    """

    version: ClassVar[int]
    trunk: Trunk
    machine: Machine
    image_size: int
    colours: Colours
    centroids_KP: Tensor
    clusters_epoch: int
    trained_epoch: int
    seed: int
    cluster_stage: str = FEATURES
    reduce_to: int = 0
    kmeans_iterations: int = 20
    reassign_every: int = 1
    stop_reassigning: int = 0
    clusterer: str = "kmeans"
    super_clusters: int = 0
    lr: float = 0.05
    batch_size: int = 256
    features_MD: Tensor | None = None

    @property
    def has_trained_since(self) -> bool:
        """Whether the trunk has learned since it made the clusters, so that its points are no longer theirs."""
        return self.trained_epoch >= self.clusters_epoch

    @property
    def labels_epoch(self) -> int:
        """The epoch whose clustering made the labels that were learned last."""
        last = min(self.trained_epoch, self.stop_reassigning or self.trained_epoch)
        return last - (last - 1) % self.reassign_every

    @property
    def n_components(self) -> int:
        """P."""
        return self.centroids_KP.shape[1]

    @cached_property
    def cluster_view(self) -> ClusterView:
        """The view that is clustered."""
        return ClusterView(self.image_size)

    @property
    def has_sobel(self) -> bool:
        """Whether the network sees edges in place of colours."""
        return getattr(self.trunk, "sobel", None) is not None

    @property
    def clustered_quarters_N(self) -> Tensor | None:
        """By how many quarters each image is turned where it is clustered; None: none is."""
        return None

    @abstractmethod
    def unscaled(self, features_BD: Tensor) -> Tensor:
        """Components (B, P) before the rows are scaled to unit length, on the CPU."""

    @abstractmethod
    def points(self, features_BD: Tensor) -> Tensor:
        """Points (B, P) in the space that is clustered, on the CPU."""

    def drawn_positions(self, index: int) -> Integers:
        """Where in its last epoch the run drew this image; empty where it did not."""
        return np.flatnonzero(self.order == index)

    @property
    @abstractmethod
    def order(self) -> Integers:
        """The images in the order in which the last epoch drew them."""

    def edges(self, view_CHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a uint8 view: normalised channels (3, H, W), grey (H, W), and the two edges (2, H, W) of Sobel's filters.

        They are made whether the trunk uses them or not.
        """
        channels_1CHW = normalise(view_CHW[None].cpu())
        grey, filters = sobel_layer()
        with torch.no_grad():
            grey_1CHW = grey(channels_1CHW)
            return channels_1CHW[0], grey_1CHW[0, 0], filters(grey_1CHW)[0]

    def maps(self, view_CHW: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Activations (C, H, W), float32 on the CPU, of stages for one uint8 view."""
        with torch.no_grad(), self.machine.autocast():
            maps = self.ready_trunk.maps(self.seen(view_CHW[None]), names)
        return {name: map_1CHW[0].float().cpu() for name, map_1CHW in maps.items()}

    def features(self, views_BCHW: Tensor, on_batch: Callable[[int], None] = lambda images: None) -> Tensor:
        """Rows (B, D) on the CPU of uint8 views, of the stage that is clustered, as the run keeps them."""
        rows = []
        for some_BCHW in views_BCHW.split(TOGETHER):
            with torch.no_grad():
                rows.append(extract_stage(self.ready_trunk, self.machine, some_BCHW, self.cluster_stage))
            on_batch(len(some_BCHW))
        return torch.cat(rows).to(self.machine.feature_dtype).cpu()

    def distances(self, points_BP: Tensor) -> Floats:
        """Euclidean distances (B, K) of points to all centroids."""
        points, centroids = points_BP.cpu().double(), self.centroids_KP.cpu().double()
        distances: Floats = torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        return distances

    def seen(self, images_BCHW: Tensor) -> Tensor:
        """Images (uint8, or in [0, 1]) as the trunk is given them."""
        return normalise(self.machine.put(images_BCHW)).to(self.machine.dtype)

    @property
    def ready_trunk(self) -> Trunk:
        """The trunk where it runs, in eval mode."""
        return self.trunk.to(self.machine.device, self.machine.dtype).eval()

    def shown_stages(self) -> tuple[str, ...]:
        """The first, the middle and the last stage that has maps; none where none has."""
        stages = [name for name in self.trunk.stages if name != FEATURES]
        if not stages:
            return ()
        return tuple(dict.fromkeys((stages[0], stages[len(stages) // 2], stages[-1])))


def view_frame(view: ClusterView, height: int, width: int) -> tuple[float, float, float, float]:
    """Top, left, height and width, in pixels of an image of that size, of what its cluster view shows."""
    longest = LONGEST * min(height, width)
    middle_top, middle_left = max(0, height - longest) // 2, max(0, width - longest) // 2
    inner = min(height, longest), min(width, longest)
    resized = view.resized_sides(*inner)
    scales = [side / after for side, after in zip(inner, resized, strict=True)]
    starts = [round((side - view.size) / 2) for side in resized]
    return (
        middle_top + starts[0] * scales[0],
        middle_left + starts[1] * scales[1],
        view.size * scales[0],
        view.size * scales[1],
    )
