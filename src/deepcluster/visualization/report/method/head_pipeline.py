"""What a run of the first version does to one image: whitening, a new head, random views (ECCV 2018, section 3).

N images, B batch, C channels, H and W pixels, D features, P components, K clusters, V views.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import log_softmax

from deepcluster.clustering.assignment import draw_as_published, draw_uniform
from deepcluster.clustering.whitening import Whitening
from deepcluster.data.views import CROP_ATTEMPTS, TrainingView, draws, rotate_quarters
from deepcluster.models.heads import ClusterHead, HierarchicalHead
from deepcluster.visualization.report.method.pipeline import Floats, Integers, Pipeline


@dataclass(frozen=True, kw_only=True)
class HeadPipeline(Pipeline):
    """A run of the first version.

    Attributes:
        whitening: of the clusters that are shown.
        head: trained in `trained_epoch` last; None where the run has none (yet).
        head_labels_N: what it was trained on: cluster of every image in that epoch, -1 = unassigned.
        sampling: "uniform" or "as-published".
        looks_again: whether images are looked at before each clustering.
        quarters_N: by how many quarters `trained_epoch` turned each image; None: none was.
    """

    version: ClassVar[int] = 1
    training_view: TrainingView
    whitening: Whitening
    head: ClusterHead | HierarchicalHead | None
    head_labels_N: Tensor | None
    sampling: str = "uniform"
    looks_again: bool = True
    quarters_N: Tensor | None = None

    @property
    def clustered_quarters_N(self) -> Tensor | None:
        """Of clusters that are still learned those of their epoch; the finished trunk looks at images as they are."""
        return self.quarters_N if self.has_trained_since else None

    def unscaled(self, features_BD: Tensor) -> Tensor:
        """Components (B, P) after whitening, before the rows are scaled to unit length."""
        return Whitening.from_state_dict(self._whitening_state(), unit_rows=False).transform(features_BD)

    def points(self, features_BD: Tensor) -> Tensor:
        """Points (B, P) in the space that is clustered."""
        return Whitening.from_state_dict(self._whitening_state()).transform(features_BD)

    def _whitening_state(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self.whitening.state_dict().items()}

    def probabilities(self, images_BCHW: Tensor) -> Floats:
        """What the head says of images (uint8, or in [0, 1]): probabilities (B, K) of the clusters it was trained on.

        Of a head in two steps that of the super-class times that of the cluster within it.
        """
        if self.head is None:
            raise RuntimeError("the run has no head")
        head = self.head.to(self.machine.device, self.machine.dtype).eval()
        with torch.no_grad(), self.machine.autocast():
            scores = head(self.ready_trunk(self.seen(images_BCHW)))
        if isinstance(head, HierarchicalHead):
            supers_BS, clusters_BK = (part.cpu().double() for part in scores)
            parts = clusters_BK.split(head.sizes, dim=1)
            within_BK = torch.cat([log_softmax(part_BG, dim=1) for part_BG in parts], dim=1)
            return (log_softmax(supers_BS, dim=1)[:, head.super_of_cluster_K.cpu()] + within_BK).exp().numpy()
        probabilities: Floats = scores.cpu().double().softmax(dim=1).numpy()
        return probabilities

    def guess(self, label: int) -> float:
        """What blind guessing costs an image of a label, in nats; of a head in two steps the guesses of both."""
        if isinstance(self.head, HierarchicalHead):
            n_supers = len(self.head.sizes)
            return float(np.log(n_supers) + np.log(self.head.sizes[int(self.head.super_of_cluster_K[max(0, label)])]))
        return float(np.log(self.head.linear.out_features)) if self.head is not None else 0.0

    @cached_property
    def order(self) -> Integers:
        """The images in the order in which the last epoch drew them."""
        if self.head_labels_N is None or not bool((self.head_labels_N >= 0).any()):
            return np.zeros(0, np.int64)
        draw = draw_uniform if self.sampling == "uniform" else draw_as_published
        labels_N = self.head_labels_N.cpu()
        order: Integers = draw(labels_N, n_draws=int((labels_N >= 0).sum()), seed=(self.seed, self.trained_epoch)).numpy()
        return order

    def random_views(self, image_HWC: Tensor, positions_V: Integers, quarters: int = 0) -> "RandomViews":
        """The training views of an image at positions of the last trained epoch, turned by quarters."""
        rows = [draws(self.seed, self.trained_epoch, int(position), 1) for position in positions_V]
        draws_VR = np.concatenate(rows)
        heights_V, widths_V = (np.full(len(rows), side) for side in image_HWC.shape[:2])
        cut_VCHW = self.training_view([image_HWC] * len(rows), draws_VR)
        flips_V = (draws_VR[:, 2 * CROP_ATTEMPTS + 2] < 0.5) & self.training_view.flip
        coloured_VCHW = self.colours(self.machine.put(cut_VCHW), draws_VR)
        if quarters:
            coloured_VCHW = rotate_quarters(coloured_VCHW, torch.full((len(rows),), quarters))
        return RandomViews(cut_VCHW, coloured_VCHW, self.training_view.boxes(draws_VR, heights_V, widths_V), flips_V)

    def quarters_of(self, index: int) -> int:
        """By how many quarters the last epoch turned an image."""
        return 0 if self.quarters_N is None else int(self.quarters_N[index])


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
