"""What a run does to one image, computed as the run does it: its views, features, point, distances, scores.

N images, B batch, C channels, H and W pixels, D features, P components, K clusters, M images of a sample, V views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import draw_as_published, draw_uniform
from deepcluster.clustering.whitening import Whitening
from deepcluster.data.views import CROP_ATTEMPTS, LONGEST, ClusterView, Colours, TrainingView, draws
from deepcluster.device import Machine
from deepcluster.inference import describe
from deepcluster.models.convnets import sobel_layer
from deepcluster.models.heads import ClusterHead
from deepcluster.models.trunk import FEATURES, Trunk, normalise

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
# Images that the network looks at together.
TOGETHER = 32


@dataclass(frozen=True)
class Pipeline:
    """A run as far as it got: its networks, its clusters, and the settings that explain them.

    Attributes:
        trunk: as it is now, in eval mode.
        image_size: side of what the network sees, in pixels.
        reduce_to: shorter side to which larger photos are made smaller as they are decoded (0: never).
        cluster_stage: stage whose features are clustered.
        whitening, centroids_KP: of the clusters that are shown, those of the collection.
        clusters_epoch: epoch whose table the clusters are; after the last epoch of a finished run it is one more.
        trained_epoch: epoch that `head` was trained in last.
        head: None where the run has none (yet).
        head_labels_N: what it was trained on: cluster of every image in that epoch, -1 = unassigned.
        clusterer: "kmeans", "balanced" or "pic".
        sampling: "uniform" or "as-published".
        features_MD: features of the collection's sample where they are at hand: they need not be made again.
    """

    trunk: Trunk
    machine: Machine
    image_size: int
    training_view: TrainingView
    colours: Colours
    cluster_stage: str
    whitening: Whitening
    centroids_KP: Tensor
    clusters_epoch: int
    trained_epoch: int
    head: ClusterHead | None
    head_labels_N: Tensor | None
    seed: int
    reduce_to: int = 0
    clusterer: str = "kmeans"
    sampling: str = "uniform"
    kmeans_iterations: int = 20
    reassign_every: int = 1
    lr: float = 0.05
    batch_size: int = 256
    features_MD: Tensor | None = None

    @property
    def has_trained_since(self) -> bool:
        """Whether the trunk has learned since it made the clusters, so that its points are no longer theirs."""
        return self.trained_epoch >= self.clusters_epoch

    @property
    def labels_epoch(self) -> int:
        """The epoch whose clustering made `head_labels_N`."""
        return self.trained_epoch - (self.trained_epoch - 1) % self.reassign_every

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
            maps = self._trunk.maps(normalise(self.machine.put(view_CHW[None])), names)
        return {name: map_1CHW[0].float().cpu() for name, map_1CHW in maps.items()}

    def features(self, views_BCHW: Tensor, on_batch: Callable[[int], None] = lambda images: None) -> Tensor:
        """Rows (B, D) on the CPU of uint8 views, of the stage that is clustered, as the run keeps them."""
        rows = []
        for some_BCHW in views_BCHW.split(TOGETHER):
            with torch.no_grad():
                rows.append(describe(self._trunk, self.machine, some_BCHW, self.cluster_stage))
            on_batch(len(some_BCHW))
        return torch.cat(rows).to(self.machine.feature_dtype).cpu()

    def whitened(self, features_BD: Tensor) -> Tensor:
        """Components (B, P) after whitening, before the rows are scaled to unit length."""
        state = {name: value.cpu() for name, value in self.whitening.state_dict().items()}
        return Whitening.from_state_dict(state, unit_rows=False).transform(features_BD)

    def points(self, features_BD: Tensor) -> Tensor:
        """Points (B, P) in the space that is clustered."""
        state = {name: value.cpu() for name, value in self.whitening.state_dict().items()}
        return Whitening.from_state_dict(state).transform(features_BD)

    def distances(self, points_BP: Tensor) -> Floats:
        """Euclidean distances (B, K) of points to all centroids."""
        points, centroids = points_BP.cpu().double(), self.centroids_KP.cpu().double()
        distances: Floats = torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        return distances

    def probabilities(self, images_BCHW: Tensor) -> Floats:
        """What the head says of images (uint8, or in [0, 1]): probabilities (B, K) of the clusters it was trained on."""
        if self.head is None:
            raise RuntimeError("the run has no head")
        head = self.head.to(self.machine.device).eval()
        with torch.no_grad(), self.machine.autocast():
            scores_BK = head(self._trunk(normalise(self.machine.put(images_BCHW))))
        probabilities: Floats = scores_BK.cpu().double().softmax(dim=1).numpy()
        return probabilities

    def drawn_positions(self, index: int) -> Integers:
        """Where in its last epoch the run drew this image; empty where it did not."""
        return np.flatnonzero(self._order == index)

    @cached_property
    def _order(self) -> Integers:
        """The images in the order in which the last epoch drew them."""
        if self.head_labels_N is None or not bool((self.head_labels_N >= 0).any()):
            return np.zeros(0, np.int64)
        draw = draw_uniform if self.sampling == "uniform" else draw_as_published
        labels_N = self.head_labels_N.cpu()
        order: Integers = draw(labels_N, n_draws=int((labels_N >= 0).sum()), seed=(self.seed, self.trained_epoch)).numpy()
        return order

    def random_views(self, image_HWC: Tensor, positions_V: Integers) -> "RandomViews":
        """The training views of an image at positions of the last trained epoch."""
        rows = [draws(self.seed, self.trained_epoch, int(position), 1) for position in positions_V]
        draws_VR = np.concatenate(rows)
        heights_V, widths_V = (np.full(len(rows), side) for side in image_HWC.shape[:2])
        cut_VCHW = self.training_view([image_HWC] * len(rows), draws_VR)
        flips_V = (draws_VR[:, 2 * CROP_ATTEMPTS + 2] < 0.5) & self.training_view.flip
        coloured_VCHW = self.colours(self.machine.put(cut_VCHW), draws_VR)
        return RandomViews(cut_VCHW, coloured_VCHW, self.training_view.boxes(draws_VR, heights_V, widths_V), flips_V)

    @property
    def _trunk(self) -> Trunk:
        return self.trunk.to(self.machine.device).eval()

    def shown_stages(self) -> tuple[str, ...]:
        """The first, the middle and the last stage that has maps."""
        stages = [name for name in self.trunk.stages if name != FEATURES]
        return tuple(dict.fromkeys((stages[0], stages[len(stages) // 2], stages[-1])))


@dataclass(frozen=True)
class RandomViews:
    """Views that training drew.

    Attributes:
        cut_VCHW: uint8, before colours change.
        coloured_VCHW: as the network is given them, before it normalises them: uint8, or in [0, 1]; on the device.
        boxes_V4: top, left, height and width of each in its image, pixels.
        flips_V: which are turned left to right.
    """

    cut_VCHW: Tensor
    coloured_VCHW: Tensor
    boxes_V4: Tensor
    flips_V: NDArray[np.bool_]


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
