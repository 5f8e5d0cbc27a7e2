"""What a run does to an image, computed by its model as the run does it: views, features, point, distances, predictions.

N images, B batch, D features, P components, K clusters, M images of a sample, G clusterings side by side (1 in version 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from deepcluster.clustering.assignment import Assignment, draw_as_published, draw_uniform
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.seeds import image_order
from deepcluster.data.multi_crop import MultiCropView
from deepcluster.data.views import ClusterView, Colours, rotate_quarters
from deepcluster.models.heads import Head, HierarchicalHead, Projection, make_head
from deepcluster.models.trunk import normalise
from deepcluster.run.features import centre_view, extract_stage
from deepcluster.run.model import Model
from deepcluster.run.settings import Settings
from deepcluster.run.space import ProjectedSpace
from deepcluster.visualization.report.collection import Floats, Integers

# Images that go through the network together.
BATCH = 32


@dataclass(frozen=True)
class Explained:
    """A run of either version as its checkpoint has it: its model, and what its last epoch trained on.

    Attributes:
        model: on its device, with the clusters that are shown.
        clusters_epoch: epoch of these clusters; after the last epoch of a finished run it is one more.
        trained_epoch: the epoch that was trained last, or is being trained.
        labels_GN: cluster of every image in each clustering that it trained on, -1 = unassigned; no rows where unknown.
        head: of the first version, trained on them; None where the run has none (yet).
        prototypes: of DeepCluster-v2, (K, P) for each clustering, of unit length.
        quarters_N: number of quarter turns of each image in that epoch; None: images stayed upright.
        features_MD: features of the collection's sample, where they are known.
        clustered: what `deepcluster cluster` notes of clusters that were made without training; empty otherwise.
    """

    model: Model
    clusters_epoch: int
    trained_epoch: int
    labels_GN: Tensor
    head: Head | None = None
    prototypes: tuple[Tensor, ...] = ()
    quarters_N: Tensor | None = None
    features_MD: Tensor | None = None
    clustered: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, state: Mapping[str, Any], *, clusters_epoch: int, trained_epoch: int) -> "Explained":
        """Return what a checkpoint knows of the run of `model`.

        Args:
            state: content of the checkpoint; "parts" may hold layers of the head that were saved in files of their own.
        """
        saved = [state["assignment"]] if "assignment" in state else []
        assignments = [Assignment.from_state_dict(one) for one in (*saved, *state.get("other_assignments", ()))]
        head: Head | None = None
        if model.settings.method != "deepcluster-v2" and assignments:
            n_clusters, supers_K = assignments[0].n_clusters, assignments[0].super_of_cluster_K
            head = make_head(model.trunk.dim, n_clusters, supers_K, norm=model.settings.head_norm, seed=0)
            weights = {**state.get("head", {}), **state.get("parts", {}).get("head", {})}
            if set(head.state_dict()) <= set(weights):
                head.load_state_dict(weights)
                head = head.to(model.machine.device, model.machine.dtype).eval()
            else:  # The checkpoint has no head, or not all of its layers (any more).
                head, assignments = None, []
        labels = [one.labels_N for one in assignments]
        return cls(
            model,
            clusters_epoch,
            trained_epoch,
            torch.stack(labels) if labels else torch.zeros(0, 0, dtype=torch.int64),
            head,
            tuple(one.cpu() for one in state.get("prototypes", ())),
            state.get("quarters"),
        )

    @property
    def settings(self) -> Settings:
        """Settings of the run."""
        return self.model.settings

    @property
    def version(self) -> int:
        """Version of the method, 1 or 2."""
        return 2 if self.settings.method == "deepcluster-v2" else 1

    @property
    def projection(self) -> Projection | None:
        """DeepCluster-v2's projection; None in the first version."""
        return self.model.space.projection if isinstance(self.model.space, ProjectedSpace) else None

    @property
    def whitening(self) -> Whitening | None:
        """The whitening of the points that are clustered; None where DeepCluster-v2 clusters them as they are."""
        space = self.model.space.whitening if isinstance(self.model.space, ProjectedSpace) else self.model.space
        return space if isinstance(space, Whitening) else None

    @property
    def has_trained_since(self) -> bool:
        """Whether the trunk was trained after it made the clusters, so that its points are no longer theirs."""
        return self.trained_epoch >= self.clusters_epoch

    @property
    def labels_epoch(self) -> int:
        """The epoch whose clustering made the labels that were trained on last."""
        last = min(self.trained_epoch, self.settings.stop_reassigning or self.trained_epoch)
        return last - (last - 1) % self.settings.reassign_every

    @property
    def centroids_KP(self) -> Tensor:
        """Centroids of the clusters that are shown."""
        return self.model.clusters()[1].centroids_KP

    @property
    def n_components(self) -> int:
        """P."""
        return self.centroids_KP.shape[1]

    @property
    def has_sobel(self) -> bool:
        """Whether the network sees edges instead of colours."""
        return getattr(self.model.trunk, "sobel", None) is not None

    @property
    def cluster_view(self) -> ClusterView:
        """The view that is clustered."""
        return centre_view(self.settings)

    @cached_property
    def view(self) -> MultiCropView:
        """The random views that are trained on: several crops, or one in the first version."""
        settings = self.settings
        crops = settings.crop_groups if self.version == 2 else ((1, settings.image_size),)
        scales = (settings.crop_scale, *[settings.small_crop_scale] * (len(crops) - 1))
        return MultiCropView(crops, scales, flip=settings.flip)

    @property
    def colours(self) -> Colours:
        """Random changes of colours, and blur."""
        settings = self.settings
        return Colours(settings.jitter, settings.grey, share=settings.jitter_share, blur=settings.blur)

    @property
    def clustered_quarters_N(self) -> Tensor | None:
        """Number of quarter turns of each image where it is clustered; None: the finished trunk clusters upright images."""
        return self.quarters_N if self.has_trained_since else None

    @cached_property
    def order(self) -> Integers:
        """The images in the order in which the last epoch drew them; empty where it is not known."""
        seed, epoch = self.settings.seed, self.trained_epoch
        if self.version == 2:
            return image_order(seed, epoch, self.labels_GN.shape[1]).numpy()
        n_assigned = int((self.labels_GN >= 0).sum())
        if n_assigned == 0:
            return np.zeros(0, np.int64)
        draw = draw_uniform if self.settings.sampling == "uniform" else draw_as_published
        n_draws = self.settings.images_per_epoch(n_assigned)
        return draw(self.labels_GN[0], n_draws=n_draws, seed=(seed, epoch)).numpy()

    def positions(self, index: int) -> Integers:
        """Return the positions at which the last epoch drew an image; none where it did not."""
        return np.flatnonzero(self.order == index)

    def quarters(self, index: int) -> int:
        """Return the number of quarter turns by which the last epoch rotated an image."""
        return 0 if self.quarters_N is None else int(self.quarters_N[index])

    def clustered_view(self, image_HWC: Tensor, index: int) -> Tensor:
        """Return the view (3, S, S), uint8, of an image that is clustered, rotated where the run rotates it."""
        view_1CHW, quarters_N = self.cluster_view([image_HWC]), self.clustered_quarters_N
        return (view_1CHW if quarters_N is None else rotate_quarters(view_1CHW, quarters_N[[index]]))[0]

    def features(self, views_BCHW: Tensor) -> Tensor:
        """Return rows (B, D) on the CPU of uint8 views, of the stage that is clustered, as the run keeps them."""
        model, stage = self.model, self.settings.cluster_stage
        rows = [extract_stage(model.trunk, model.machine, some, stage) for some in views_BCHW.split(BATCH)]
        return torch.cat(rows).to(model.machine.feature_dtype).cpu()

    @torch.no_grad()
    def unscaled(self, features_BD: Tensor) -> Tensor:
        """Return components (B, P) before the rows are scaled to unit length, on the CPU; before v2's whitening."""
        machine, projection = self.model.machine, self.projection
        if projection is None:
            space, _ = self.model.clusters()
            return Whitening.from_state_dict(space.state_dict(), unit_rows=False).transform(features_BD)
        with machine.autocast():
            rows_BP: Tensor = projection.layers(features_BD.to(machine.device, machine.dtype))
        return rows_BP.float().cpu()

    def distances(self, points_BP: Tensor) -> Floats:
        """Return Euclidean distances (B, K) of points to all centroids."""
        points, centroids = points_BP.cpu().double(), self.centroids_KP.cpu().double()
        return torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist").numpy()

    @torch.no_grad()
    def rows(self, images_BCHW: Tensor) -> Tensor:
        """Return what predictions are made from, of images (uint8, or in [0, 1]): features, or v2's points on the sphere."""
        model = self.model
        with model.machine.autocast():
            features_BD: Tensor = model.trunk(normalise(model.machine.put(images_BCHW)).to(model.machine.dtype))
            return features_BD if self.projection is None else self.projection(features_BD).float()

    @torch.no_grad()
    def predictions(self, rows_BD: Tensor) -> list[Tensor]:
        """Return log-probabilities (B, K), float64 on the CPU, of the clusters of each clustering that was trained on.

        In a hierarchical head the probability is that of the super-class times that of the cluster within it.
        """
        if self.head is None:
            rows_BP = rows_BD.cpu().double() / self.settings.temperature
            return [log_softmax(rows_BP @ prototypes_KP.double().T, dim=1) for prototypes_KP in self.prototypes]
        with self.model.machine.autocast():
            scores = self.head(rows_BD)
        if not isinstance(self.head, HierarchicalHead):
            return [log_softmax(scores.cpu().double(), dim=1)]
        supers_BS, clusters_BK = (part.cpu().double() for part in scores)
        within_BK = torch.cat([log_softmax(part_BG, dim=1) for part_BG in clusters_BK.split(self.head.sizes, dim=1)], dim=1)
        return [log_softmax(supers_BS, dim=1)[:, self.head.super_of_cluster_K.cpu()] + within_BK]

    def guess(self, label: int) -> float:
        """Return the cost of blind guessing in nats, the mean over clusterings; for a hierarchical head of both guesses.

        Args:
            label: of the image in the first clustering.
        """
        if isinstance(self.head, HierarchicalHead):
            sizes = self.head.sizes
            return float(np.log(len(sizes)) + np.log(sizes[int(self.head.super_of_cluster_K[max(0, label)])]))
        counts = [self.head.linear.out_features] if self.head is not None else [len(one) for one in self.prototypes]
        return float(np.mean(np.log(counts)))
