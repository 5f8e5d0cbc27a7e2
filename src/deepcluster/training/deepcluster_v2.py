"""DeepCluster-v2: what it does at each of the five steps (Caron et al., NeurIPS 2020, arXiv 2006.09882, appendix).

N images, M of this rank, B batch, V large crops of an image, P components, H heads, K clusters of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from deepcluster.clustering.assignment import Assignment, cluster_means
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.core.distributed import all_reduce, my_part
from deepcluster.core.seeds import image_order, seed_of
from deepcluster.core.text import size
from deepcluster.data.crops import Crops
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.multi_crop import MultiCropView
from deepcluster.data.views import ClusterView
from deepcluster.models.projection import CropPoints, Projection, prototype_losses
from deepcluster.models.trunk import FEATURES, Trunk
from deepcluster.run.features import feature_batches
from deepcluster.run.settings import Settings
from deepcluster.run.space import ProjectedSpace
from deepcluster.training.batches import even_batches, part_of_slice
from deepcluster.training.feature_rows import extract_features
from deepcluster.training.grouping import over_all_images
from deepcluster.training.lars import parameter_groups
from deepcluster.training.loop import Around, Loop
from deepcluster.training.memory_bank import MemoryBank
from deepcluster.training.optim import descend, make_optimizer, prepared
from deepcluster.training.pseudo_labels import labels_of

# Of a seed's parts, after (run seed, epoch): what it is for.
_PROJECTION, _CLUSTERING = 1, 2


@dataclass(frozen=True)
class BankPoints:
    """What is grouped of this rank's images.

    Attributes:
        indices_M: which images these are, ascending.
        rows_MVP: what their large crops were on the sphere; their centre views (V = 1) where images are looked at.
        whitenings: for each of the V, where rows are whitened before they are grouped.
    """

    indices_M: Tensor
    rows_MVP: Tensor
    whitenings: tuple[Whitening, ...] = ()


class DeepClusterV2(Loop[MemoryBank, BankPoints]):
    """DeepCluster-v2: groups what the crops of the epoch before were, and learns several crops of each image.

    Attributes:
        projection: takes features to the sphere on which they are grouped.
        bank: rows of the large crops of the epoch under way, of this rank's images.
        bank_epoch: the epoch whose clustering has all it needs in the bank.
        assignments: of each head; the first is `assignment`.
        prototypes: of each head, (K, P), on the device.
        whitening: of the first head's rows, where they are whitened.
    """

    def __init__(self, trunk: Trunk, loader: Loader, settings: Settings, machine: Machine, **around: Unpack[Around]) -> None:
        super().__init__(trunk, loader, settings, machine, **around)
        hidden, components = settings.projection
        seed = seed_of(settings.seed, 0, _PROJECTION)
        self.projection: Projection = self.on_device(Projection(trunk.dim, hidden, components, seed=seed))
        points = CropPoints(self.trunk, self.projection)
        self.network = prepared(points, machine, compiled=settings.compile)
        self.optimizer = make_optimizer(
            parameter_groups(points, settings.weight_decay), settings, machine, momentum=settings.momentum
        )
        self.n_grouped = self.crops[0][0]
        self.bank, self.bank_epoch = MemoryBank(), 0
        self.assignments: list[Assignment] = []
        self.prototypes: list[Tensor] = []
        self.whitening: Whitening | None = None

    def look_at_images(self) -> MemoryBank:
        """Step 1: what the large crops of the epoch before were. Before the first epoch, and before each clustering where
        it is asked for, the images are looked at.
        """
        if self.bank_epoch != self.epoch:
            self._fill_bank()
            self.bank_epoch = self.epoch
        return self.bank

    def _fill_bank(self) -> None:
        """The bank of an epoch that learns nothing: of centre views where images are looked at each time, else of crops.

        In train mode, for prototypes must lie where crops will, and before the first epoch there are no running averages.
        """
        self.bank.clear()
        for network in self.networks:
            network.train()
        large = MultiCropView(self.view.crops[:1], self.view.scales[:1], flip=self.view.flip)
        view = ClusterView(self.settings.image_size) if self.settings.looks_again else large
        order_N, network = self.draw_images(), CropPoints(self.trunk, self.projection)
        batches = even_batches(len(order_N), self.settings.batch_size)
        with self.timed("features"), torch.no_grad(), self.reporter.track("features", len(order_N)) as progress:
            for _, (batch, positions) in self.learned_batches(order_N, batches, view, epoch=0):
                self.interruption.check()
                batch = batch if len(batch.indices_B) else self.blank_batch()
                self._keep(batch, positions, self._points(network, batch, plain=self.settings.looks_again))
                progress(positions.stop - positions.start)

    def learn_labels(self) -> None:
        if self.batch == 0:
            self.bank.clear()
        super().learn_labels()
        if not self.settings.looks_again:
            self.bank_epoch = self.epoch + 1

    def shorten_and_whiten(self, looked: MemoryBank) -> BankPoints:
        """Step 2: the projection has made points of unit length; they are whitened where it is asked for."""
        indices_M, _, rows_MVP = looked.all()
        if not len(indices_M):  # a rank that could read none of its images
            n_views = 1 if self.settings.looks_again else self.n_grouped
            rows_MVP = torch.empty(0, n_views, self.settings.projection[1])
        if not self.settings.whiten:
            return BankPoints(indices_M, rows_MVP)
        with self.timed("whitening"):
            whitenings = tuple(self._whitening(rows_MVP[:, crop]) for crop in range(rows_MVP.shape[1]))
        return BankPoints(indices_M, rows_MVP, whitenings)

    def _whitening(self, rows_MP: Tensor) -> Whitening:
        components = min(self.settings.pca, self.settings.projection[1])
        whitening = Whitening(components, all_reduce=all_reduce)
        whitening.update(rows_MP.float().to(self.machine.clustering_device))
        whitening.finish()
        return whitening

    def group(self, points: BankPoints) -> Sequence[Assignment]:
        """Step 3: spherical k-means for each head, on one of the large crops of each image, in turn."""
        indices_M, rows_MVP = points.indices_M, points.rows_MVP
        heads, assignments = self.settings.heads, []
        most = len(heads) * (self.settings.kmeans_iterations + 1)
        with self.timed("clustering"), self.reporter.track("clustering", most, "iterations") as progress:
            for head, n_clusters in enumerate(heads):
                seed = seed_of(self.settings.seed, self.epoch, _CLUSTERING, head)
                crop = head % rows_MVP.shape[1]
                rows_MP = rows_MVP[:, crop].float().to(self.machine.clustering_device)
                rows_MP = points.whitenings[crop].transform(rows_MP) if points.whitenings else rows_MP
                assignments.append(self._spherical(rows_MP, indices_M, n_clusters, seed, progress))
        return assignments

    def _spherical(
        self, rows_MP: Tensor, indices_M: Tensor, n_clusters: int, seed: int, progress: Callable[[int], None]
    ) -> Assignment:
        def on_iteration(state: Any) -> None:
            progress(1)
            self._pause()

        iterations = self.settings.kmeans_iterations
        kmeans = KMeans(n_clusters, iterations=iterations, seed=seed, spherical=True, all_reduce=all_reduce)
        assignment = kmeans.fit(rows_MP, numbers_N=indices_M, on_iteration=on_iteration)
        return over_all_images(assignment, indices_M, len(self.loader.images))

    def make_labels(self, assignments: Sequence[Assignment], points: BankPoints) -> None:
        """Step 4: the groups become labels, their means on the sphere prototypes; the bank is free for the next epoch."""
        self.assignments = [self.take_assignment(assignments[0]), *assignments[1:]]
        self.whitening = points.whitenings[0] if points.whitenings else None
        self.prototypes = [self._prototypes(one, points, head) for head, one in enumerate(self.assignments)]
        self.bank.clear()

    def _prototypes(self, assignment: Assignment, points: BankPoints, head: int) -> Tensor:
        """Prototypes (K, P) of unit length: the centroids; of whitened rows the mean of each cluster's rows as they were."""
        if not points.whitenings:
            return assignment.centroids_KP.to(self.machine.device)
        rows_MP = points.rows_MVP[:, head % points.rows_MVP.shape[1]].float()
        labels_M = assignment.labels_N[points.indices_M].to(rows_MP.device)
        means_KP = cluster_means(
            rows_MP[labels_M >= 0], labels_M[labels_M >= 0], assignment.n_clusters, all_reduce=all_reduce
        )
        return normalize(means_KP).to(self.machine.device)

    @property
    def crops(self) -> Crops:
        return self.settings.crop_groups

    @property
    def view(self) -> MultiCropView:
        settings = self.settings
        scales = (settings.crop_scale, *[settings.small_crop_scale] * (len(self.crops) - 1))
        return MultiCropView(self.crops, scales, flip=settings.flip)

    def draw_images(self) -> Tensor:
        """Every image once; those that can't be read are left out of their batches."""
        return image_order(self.settings.seed, self.epoch, len(self.loader.images))

    def step(self, batch: Batch, positions: slice, factor: float, seed: int, total: int) -> Tensor:
        torch.manual_seed(seed)
        points_VBP = self._points(self.network, batch)
        labels_HB = torch.stack([labels_of(one, batch.indices_B) for one in self.assignments]).to(points_VBP.device)
        losses_B = prototype_losses(points_VBP, self.prototypes, labels_HB, temperature=self.settings.temperature)
        loss = losses_B.sum() / total
        rate = self.settings.lr * factor
        descend(loss, [self.optimizer], [rate], longest_gradient=self.settings.clip_gradient)
        if not self.settings.looks_again:
            self._keep(batch, positions, points_VBP)
        return loss.detach()

    def _points(self, network: nn.Module, batch: Batch, *, plain: bool = False) -> Tensor:
        """Points (V, B, P) of all crops of a batch; `plain`: of one each, whose colours are as they are."""
        if plain:
            with self.machine.autocast():
                return network([self.seen(batch.images_BCHW[: len(batch.indices_B)], None)])[None]  # type: ignore[no-any-return]
        draws_VBR = batch.draws_BR.swapaxes(0, 1)
        crops: list[Tensor] = []
        first = 0
        for images_BCHW in batch.crops:
            count = len(images_BCHW) // max(1, len(batch.indices_B))
            draws_BR = draws_VBR[first : first + count].reshape(-1, draws_VBR.shape[-1])
            crops.append(self.seen(images_BCHW, draws_BR))
            first += count
        with self.machine.autocast():
            points_NP = network(crops)
        return points_NP.view(first, len(batch.indices_B), -1)  # type: ignore[no-any-return]

    def _keep(self, batch: Batch, positions: slice, points_VBP: Tensor) -> None:
        """Write the large crops into the bank; a blank one is of no image."""
        there_B = batch.indices_B >= 0
        places_B = part_of_slice(positions).start + torch.arange(len(batch.indices_B))
        rows_BVP = points_VBP.detach()[: self.n_grouped].transpose(0, 1)
        if not bool(there_B.all()):
            places_B, rows_BVP = places_B[there_B], rows_BVP[there_B.to(rows_BVP.device)]
        self.bank.write(batch.indices_B[there_B], places_B, rows_BVP)

    def finished_groups(self) -> tuple[Assignment, ProjectedSpace]:
        """Of the centre views, by the first head's number of clusters."""
        mine = my_part(len(self.loader.images))
        projected = ProjectedSpace(self.projection.eval(), self.machine)
        with self.timed("features"), self.reporter.track("features", mine.stop - mine.start) as progress:

            def on_batch(images: int) -> None:
                progress(images)
                self.interruption.check()

            indices = torch.arange(mine.start, mine.stop)
            rows = feature_batches(
                self.trunk,
                self.loader,
                self.machine,
                stage=FEATURES,
                image_size=self.settings.image_size,
                indices=indices,
                advance=on_batch,
            )
            points_MP = extract_features(
                ((projected.transform(rows_BD), indices_B - mine.start) for rows_BD, indices_B in rows),
                n_images=len(indices),
                dim=self.settings.projection[1],
            )
        seed = seed_of(self.settings.seed, self.epoch, _CLUSTERING)
        most = self.settings.kmeans_iterations + 1
        with self.timed("clustering"), self.reporter.track("clustering", most, "iterations") as progress:
            points_MP = points_MP.to(self.machine.clustering_device)
            space = projected
            if self.settings.whiten:
                whitening = self._whitening(points_MP[points_MP.isfinite().all(dim=1)])
                space, points_MP = replace(projected, whitening=whitening), whitening.transform(points_MP)
            return self._spherical(points_MP, indices, self.settings.n_clusters, seed, progress), space

    def describe_memory(self) -> str:
        """How much memory the bank takes, for the opening lines."""
        mine = my_part(len(self.loader.images))
        n_views = 1 if self.settings.looks_again else self.n_grouped
        views = "the centre view" if self.settings.looks_again else f"{n_views} crops"
        n_bytes = (mine.stop - mine.start) * n_views * self.settings.projection[1] * 2
        return f"points of {views} of each image {size(n_bytes)}"

    @property
    def networks(self) -> Sequence[nn.Module]:
        return self.trunk, self.projection

    def where(self) -> str:
        rate = self.optimizer.param_groups[0]["lr"]
        return f"epoch {self.epoch}, batch {self.batch}, learning rate {rate:g}"

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
        self.bank_epoch = state["bank_epoch"]
        self.bank.load_state_dict(state["rows"]["bank"], self.machine.device)
