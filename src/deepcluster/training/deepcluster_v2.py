"""DeepCluster-v2: what it does at each of the five steps (Caron et al., NeurIPS 2020, arXiv 2006.09882, appendix).

N images, M of this rank, B batch, V large crops of an image, P components, H heads, K clusters of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from deepcluster.clustering.assignment import Assignment, cluster_means
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.core.seeds import image_order, seed_of
from deepcluster.core.text import size
from deepcluster.core.work import Work
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.multi_crop import MultiCropView
from deepcluster.models.heads import CropPoints, Projection, prototype_losses
from deepcluster.models.trunk import FEATURES, Trunk
from deepcluster.run.features import centre_view, feature_batches
from deepcluster.run.settings import Settings
from deepcluster.run.space import ProjectedSpace
from deepcluster.training.bank import Bank
from deepcluster.training.batches import even_batches, part_of_batch, training_batches
from deepcluster.training.lars import parameter_groups
from deepcluster.training.method import Method, Step, labels_of
from deepcluster.training.optim import Optimizers, make_optimizer

# Parts of a seed, after (run seed, epoch): what it is for.
_PROJECTION, _CLUSTERING = 1, 2


@dataclass(frozen=True)
class Points:
    """What is clustered.

    Attributes:
        rows_MVP: projections of the large crops of this rank's images, or of their centre views (V = 1) with --look-again;
            NaN for unreadable images.
        whitenings: for each of the V, if rows are whitened.
    """

    rows_MVP: Tensor
    whitenings: tuple[Whitening, ...] = ()


@dataclass(frozen=True)
class Clusters:
    """The assignment of all images by each head, and the points that were clustered."""

    assignments: list[Assignment]
    points: Points


class DeepClusterV2(Method):
    """DeepCluster-v2: clusters the projections of the previous epoch's crops, and trains on several crops of each image.

    Attributes:
        projection: takes features to the sphere on which they are clustered.
        bank: projections of the large crops of the current epoch, of the images that this rank trains on.
        bank_epoch: the epoch whose clustering finds all that it needs in the bank.
        assignments: assignments of all heads; the first is `assignment`.
        prototypes: prototypes (K, P) of each head, on the device.
        whitening: whitening of the first head's rows, if they are whitened.
    """

    view: MultiCropView

    def __init__(
        self,
        trunk: Trunk,
        loader: Loader,
        settings: Settings,
        machine: Machine,
        work: Work | None = None,
    ) -> None:
        super().__init__(trunk, loader, settings, machine, work)
        hidden, components = settings.projection
        seed = seed_of(settings.seed, 0, _PROJECTION)
        self.projection: Projection = self.on_device(Projection(trunk.dim, hidden, components, seed=seed))
        points = CropPoints(self.trunk, self.projection)
        self.network = self.prepare(points)
        groups = parameter_groups(points, settings.weight_decay)
        self.optimizer = make_optimizer(groups, settings, machine, momentum=settings.momentum)
        self.optimizers = Optimizers([self.optimizer], settings.clip_gradient)
        self.crops = settings.crop_groups
        scales = (settings.crop_scale, *[settings.small_crop_scale] * (len(self.crops) - 1))
        self.view = MultiCropView(self.crops, scales, flip=settings.flip)
        self.n_views = 1 if settings.look_again else self.crops[0][0]
        self.bank, self.bank_epoch = Bank(machine.device), 0
        self.assignments: list[Assignment] = []
        self.prototypes: list[Tensor] = []
        self.whitening: Whitening | None = None

    def extract_features(self, epoch: int) -> Bank:
        """Step 1: take the projections of the previous epoch's large crops from the bank.

        A pass over the images fills the bank before the first epoch, and with --look-again before each clustering.
        """
        if self.bank_epoch != epoch:
            self._fill_bank(epoch)
            self.bank_epoch = epoch
        return self.bank

    def _fill_bank(self, epoch: int) -> None:
        """Project a view of each image without training: the centre view with --look-again, else the large crops.

        In train mode, since prototypes must lie where crops will, and before the first epoch BatchNorm has no statistics.
        """
        self.bank.clear()
        for network in self.networks:
            network.train()
        again = self.settings.look_again
        large = MultiCropView(self.view.crops[:1], self.view.scales[:1], flip=self.view.flip)
        view = centre_view(self.settings) if again else large
        order_N, network = self.draw_images(epoch), CropPoints(self.trunk, self.projection)
        batches = even_batches(len(order_N), self.settings.batch_size, self.ranks)
        seed = self.settings.seed
        with torch.no_grad(), self.work.track("features", len(order_N), step="features") as advance:
            for _, batch, positions in training_batches(self.loader, view, order_N, batches, self.ranks, seed=seed, epoch=0):
                batch = batch if len(batch.indices_B) else self.blank_batch()
                points_VBP = self._centre_points(network, batch) if again else self._points(network, batch)
                self._keep(batch, positions, points_VBP)
                advance(positions.stop - positions.start)

    def whiten(self, features: Bank) -> Points:
        """Step 2: nothing, since projections are low-dimensional and normalised; PCA and whitening with --whiten."""
        rows_MVP = features.at_owners(len(self.loader.images), (self.n_views, self.settings.projection[1]), self.ranks)
        if not self.settings.whiten:
            return Points(rows_MVP)
        with self.work.clock.timed("whitening"):
            return Points(rows_MVP, tuple(self._whitening(rows_MP) for rows_MP in rows_MVP.unbind(dim=1)))

    def _whitening(self, rows_MP: Tensor) -> Whitening:
        whitening = Whitening(min(self.settings.pca, self.settings.projection[1]))
        finite_MP = rows_MP[rows_MP.isfinite().all(dim=1)]
        whitening.update(finite_MP.float().to(self.machine.clustering_device))
        whitening.finish(ranks=self.ranks)
        return whitening

    def cluster(self, points: Points, epoch: int) -> Clusters:
        """Step 3: spherical k-means for each head, on one of the large crops of each image in turn."""
        heads, assignments = self.settings.heads, []
        most = len(heads) * (self.settings.kmeans_iterations + 1)
        with self.work.track("clustering", most, "iterations", step="clustering", together=True) as advance:
            for head, n_clusters in enumerate(heads):
                crop = head % points.rows_MVP.shape[1]
                rows_MP = points.rows_MVP[:, crop].float().to(self.machine.clustering_device)
                rows_MP = points.whitenings[crop].transform(rows_MP) if points.whitenings else rows_MP
                kmeans = KMeans(n_clusters, max_iter=self.settings.kmeans_iterations, spherical=True)
                seed = seed_of(self.settings.seed, epoch, _CLUSTERING, head)
                assignment = kmeans.cluster(rows_MP, seed=seed, ranks=self.ranks, advance=advance)
                assignments.append(assignment.over_ranks(self.ranks))
        return Clusters(assignments, points)

    def make_labels(self, clusters: Clusters, epoch: int) -> None:
        """Step 4: the clusters become pseudo-labels, their means on the sphere prototypes; the bank is emptied."""
        points = clusters.points
        self.assignments = [self.take_assignment(clusters.assignments[0]), *clusters.assignments[1:]]
        self.whitening = points.whitenings[0] if points.whitenings else None
        self.prototypes = [self._prototypes(one, points, head) for head, one in enumerate(self.assignments)]
        self.bank.clear()

    def _prototypes(self, assignment: Assignment, points: Points, head: int) -> Tensor:
        """Return prototypes (K, P) of unit length: the centroids, or the means of each cluster's rows before whitening."""
        if not points.whitenings:
            return assignment.centroids_KP.to(self.machine.device)
        rows_MP = points.rows_MVP[:, head % points.rows_MVP.shape[1]].float()
        labels_M = assignment.labels_N[self.mine].to(rows_MP.device)
        known_M = labels_M >= 0
        means_KP = cluster_means(rows_MP[known_M], labels_M[known_M], assignment.n_clusters, ranks=self.ranks)
        return normalize(means_KP).to(self.machine.device)

    def draw_images(self, epoch: int) -> Tensor:
        """Return the images of an epoch: each once. Unreadable images are left out of their batches."""
        return image_order(self.settings.seed, epoch, len(self.loader.images))

    def begin_epoch(self, epoch: int) -> None:
        """Empty the bank. Once the epoch is over, it holds what the clustering of the next one needs."""
        self.bank.clear()
        if not self.settings.look_again:
            self.bank_epoch = epoch + 1

    def train_step(self, batch: Batch, step: Step) -> Tensor:
        """Step 5: one step of cross-entropy with the prototypes; returns this rank's part of the mean loss."""
        torch.manual_seed(step.seed)
        points_VBP = self._points(self.network, batch)
        labels_HB = self.machine.put(torch.stack([labels_of(one, batch.indices_B) for one in self.assignments]))
        losses_B = prototype_losses(points_VBP, self.prototypes, labels_HB, temperature=self.settings.temperature)
        loss = losses_B.sum() / step.n_images
        self.optimizers.start([self.settings.lr * step.factor])
        # Gradients are averaged over the ranks, and should be summed.
        (loss * self.ranks.size).backward()
        self.optimizers.step()
        if not self.settings.look_again:
            self._keep(batch, step.positions, points_VBP)
        return loss.detach()

    def _centre_points(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return points (1, B, P) of the centre views of a batch, in their own colours."""
        with self.machine.autocast():
            return network([self.preprocess(batch.images_BCHW[: len(batch.indices_B)], None)])[None]  # type: ignore[no-any-return]

    def _points(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return points (V, B, P) of all crops of a batch, with changed colours."""
        draws_VBR = batch.draws_BR.swapaxes(0, 1)
        crops: list[Tensor] = []
        first = 0
        for images_BCHW in batch.crops:
            count = len(images_BCHW) // max(1, len(batch.indices_B))
            draws_BR = draws_VBR[first : first + count].reshape(-1, draws_VBR.shape[-1])
            crops.append(self.preprocess(images_BCHW, draws_BR))
            first += count
        with self.machine.autocast():
            points_NP = network(crops)
        return points_NP.view(first, len(batch.indices_B), -1)  # type: ignore[no-any-return]

    def _keep(self, batch: Batch, positions: slice, points_VBP: Tensor) -> None:
        """Write the large crops into the bank; those of a blank batch (index -1) are left out."""
        if int(batch.indices_B[0]) >= 0:
            places_B = part_of_batch(positions, self.ranks).start + torch.arange(len(batch.indices_B))
            self.bank.write(batch.indices_B, places_B, points_VBP[: self.n_views].transpose(0, 1))

    def final_clusters(self, epoch: int) -> tuple[Assignment, ProjectedSpace]:
        """Return the clusters of the finished trunk's centre views, and their space. Training state does not change."""
        space = ProjectedSpace(self.projection.eval(), self.machine)
        one_pass = (self.trunk, self.loader, self.machine, FEATURES, centre_view(self.settings))
        mine_M = torch.arange(self.mine.start, self.mine.stop)
        points_MP = torch.full((len(mine_M), self.settings.projection[1]), torch.nan)
        with self.work.track("features", len(mine_M), step="features") as advance:
            for rows_BD, indices_B in feature_batches(*one_pass, indices=mine_M, advance=advance):
                points_MP[indices_B - self.mine.start] = space.transform(rows_BD).cpu()
        points_MP = points_MP.to(self.machine.clustering_device)
        if self.settings.whiten:
            whitening = self._whitening(points_MP)
            space, points_MP = replace(space, whitening=whitening), whitening.transform(points_MP)
        iterations, seed = self.settings.kmeans_iterations, seed_of(self.settings.seed, epoch, _CLUSTERING)
        with self.work.track("clustering", iterations + 1, "iterations", step="clustering", together=True) as advance:
            kmeans = KMeans(self.settings.n_clusters, max_iter=iterations, spherical=True)
            assignment = kmeans.cluster(points_MP, seed=seed, ranks=self.ranks, advance=advance).over_ranks(self.ranks)
        return self.numbered_as_before(assignment), space

    def describe_memory(self) -> str:
        """Return how much memory the bank takes, for the opening lines."""
        views = "the centre view" if self.settings.look_again else f"{self.n_views} crops"
        n_bytes = (self.mine.stop - self.mine.start) * self.n_views * self.settings.projection[1] * 2
        return f"points of {views} of each image {size(n_bytes)}"

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The trained networks."""
        return self.trunk, self.projection

    @property
    def rate(self) -> float:
        """Learning rate at the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["projection"] = self.projection.state_dict()
        state["optimizer"] = self.optimizer.state_dict()
        state["other_assignments"] = [one.state_dict() for one in self.assignments[1:]]
        state["bank_epoch"] = self.bank_epoch
        state["prototypes"] = self.prototypes
        if self.whitening is not None:
            state["whitening"] = self.whitening.state_dict()
        state["rows"]["bank"] = self.bank.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.projection.load_state_dict(state["projection"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.assignment is not None:
            others = [Assignment.from_state_dict(one) for one in state["other_assignments"]]
            self.assignments = [self.assignment, *others]
            self.prototypes = [one.to(self.machine.device) for one in state["prototypes"]]
            if "whitening" in state:
                self.whitening = Whitening.from_state_dict(state["whitening"])
        # Within an epoch the bank is filled for the next one, whatever version 0.1.0 has saved.
        within = state["batch"] > 0 and not self.settings.look_again
        self.bank_epoch = state["epoch"] + 1 if within else state["bank_epoch"]
        self.bank.load_state_dict(state["rows"]["bank"])
