"""DeepCluster-v2: what it does at each of the five steps (Caron et al., NeurIPS 2020, arXiv 2006.09882, appendix).

N images, M of this rank, B batch, V large crops of an image, P components, H heads, K clusters of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.features import extract_features
from deepcluster.clustering.kmeans import KMeans
from deepcluster.config import Settings
from deepcluster.crops import Crops
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.multi_crop import MultiCropView
from deepcluster.device import Machine
from deepcluster.distributed import all_reduce, my_part
from deepcluster.inference import look
from deepcluster.interruption import Interruption
from deepcluster.models.projection import CropPoints, Projection, prototype_losses
from deepcluster.models.trunk import FEATURES, Trunk
from deepcluster.progress import Reporter, size
from deepcluster.training.grouping import over_all_images
from deepcluster.training.lars import parameter_groups
from deepcluster.training.loop import Loop, even_batches, part_of_slice, seed_of
from deepcluster.training.memory_bank import MemoryBank
from deepcluster.training.optim import descend, make_optimizer, prepared
from deepcluster.training.pseudo_labels import labels_of
from deepcluster.training.space import ProjectedSpace

# Of a seed's parts, after (run seed, epoch): what it is for.
_PROJECTION, _CLUSTERING, _ORDER = 1, 2, 3


class DeepClusterV2(Loop[MemoryBank, MemoryBank]):
    """DeepCluster-v2: groups what the crops of the epoch before were, and learns several crops of each image.

    Attributes:
        projection: takes features to the sphere on which they are grouped.
        bank: rows of the large crops of the epoch under way, of this rank's images.
        assignments: of each head; the first is `assignment`.
    """

    def __init__(
        self,
        trunk: Trunk,
        loader: Loader,
        settings: Settings,
        machine: Machine,
        *,
        reporter: Reporter,
        interruption: Interruption,
        save: Callable[[], None],
        known_labels_N: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(
            trunk,
            loader,
            settings,
            machine,
            reporter=reporter,
            interruption=interruption,
            save=save,
            known_labels_N=known_labels_N,
        )
        hidden, components = settings.projection
        seed = seed_of(settings.seed, 0, _PROJECTION)
        self.projection: Projection = self.on_device(Projection(trunk.dim, hidden, components, seed=seed))
        points = CropPoints(self.trunk, self.projection)
        self.network = prepared(points, machine, compiled=settings.compile)
        self.optimizer = make_optimizer(
            parameter_groups(points, settings.weight_decay), settings, machine, momentum=settings.momentum
        )
        self.n_large = settings.crop_groups[0][0]
        self.bank = MemoryBank()
        self.assignments: list[Assignment] = []
        self.prototypes: list[Tensor] = []

    def look_at_images(self) -> MemoryBank:
        """Step 1: what the large crops of the epoch before were; only before the first epoch the images are looked at."""
        if self.assignment is None:
            self._fill_bank()
        return self.bank

    def _fill_bank(self) -> None:
        """The crops of an epoch that learns nothing, so that the first epoch has something to group."""
        self.bank.clear()
        self.trunk.train()
        self.projection.train()
        order_N = self.draw_images()
        large = MultiCropView(self.view.crops[:1], self.view.scales[:1], flip=self.view.flip)
        batches = even_batches(len(order_N), self.settings.batch_size)
        with self.timed("features"), torch.no_grad(), self.reporter.track("features", len(order_N)) as progress:
            for _, (batch, positions) in self.learned_batches(order_N, batches, large, epoch=0):
                self.interruption.check()
                batch = batch if len(batch.indices_B) else self.blank_batch()
                self._keep(batch, positions, self._points(CropPoints(self.trunk, self.projection), batch))
                progress(positions.stop - positions.start)

    def shorten_and_whiten(self, looked: MemoryBank) -> MemoryBank:
        """Step 2: nothing is left to do, the projection has made points of unit length."""
        return looked

    def group(self, points: MemoryBank) -> Sequence[Assignment]:
        """Step 3: spherical k-means for each head, on one of the large crops of each image, in turn."""
        indices_M, _, rows_MVP = points.all()
        heads, assignments = self.settings.heads, []
        most = len(heads) * (self.settings.kmeans_iterations + 1)
        with self.timed("clustering"), self.reporter.track("clustering", most, "iterations") as progress:
            for head, n_clusters in enumerate(heads):
                seed = seed_of(self.settings.seed, self.epoch, _CLUSTERING, head)
                rows_MP = rows_MVP[:, head % self.n_large].to(self.machine.clustering_device)
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

    def make_labels(self, assignments: Sequence[Assignment], points: MemoryBank) -> None:
        """Step 4: the groups become labels, their centroids the prototypes; the bank is free for the next epoch."""
        self.assignments = [self.take_assignment(assignments[0]), *assignments[1:]]
        self._take_prototypes()
        self.bank.clear()

    def _take_prototypes(self) -> None:
        self.prototypes = [one.centroids_KP.to(self.machine.device) for one in self.assignments]

    @property
    def crops(self) -> Crops:
        return self.settings.crop_groups

    @property
    def view(self) -> MultiCropView:
        settings, groups = self.settings, self.settings.crop_groups
        scales = (settings.crop_scale, *[settings.small_crop_scale] * (len(groups) - 1))
        return MultiCropView(groups, scales, flip=settings.flip)

    def draw_images(self) -> Tensor:
        """Every image once; those that can't be read are left out of their batches."""
        generator = torch.Generator().manual_seed(seed_of(self.settings.seed, self.epoch, _ORDER))
        return torch.randperm(len(self.loader.images), generator=generator)

    def step(self, batch: Batch, positions: slice, factor: float, seed: int, total: int) -> Tensor:
        torch.manual_seed(seed)
        points_VBP = self._points(self.network, batch)
        labels_HB = torch.stack([labels_of(one, batch.indices_B) for one in self.assignments]).to(points_VBP.device)
        losses_B = prototype_losses(points_VBP, self.prototypes, labels_HB, temperature=self.settings.temperature)
        loss = losses_B.sum() / total
        rate = self.settings.lr * factor
        descend(loss, [self.optimizer], [rate], longest_gradient=self.settings.clip_gradient)
        self._keep(batch, positions, points_VBP)
        return loss.detach()

    def _points(self, network: nn.Module, batch: Batch) -> Tensor:
        """Points (V, B, P) of all crops of a batch."""
        draws_VBR = batch.draws_BR.swapaxes(0, 1)
        crops, first = [], 0
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
        rows_BVP = points_VBP.detach()[: self.n_large].transpose(0, 1)
        if not bool(there_B.all()):
            places_B, rows_BVP = places_B[there_B], rows_BVP[there_B.to(rows_BVP.device)]
        self.bank.write(batch.indices_B[there_B], places_B, rows_BVP)

    def finished_groups(self) -> tuple[Assignment, ProjectedSpace]:
        """Of the centre views, by the first head's number of clusters."""
        mine = my_part(len(self.loader.images))
        space = ProjectedSpace(self.projection.eval(), self.machine)
        with self.timed("features"), self.reporter.track("features", mine.stop - mine.start) as progress:

            def on_batch(images: int) -> None:
                progress(images)
                self.interruption.check()

            indices = torch.arange(mine.start, mine.stop)
            rows = look(
                self.trunk,
                self.loader,
                self.machine,
                stage=FEATURES,
                image_size=self.settings.image_size,
                indices=indices,
                on_batch=on_batch,
            )
            points_MP = extract_features(
                ((space.transform(rows_BD), indices_B - mine.start) for rows_BD, indices_B in rows),
                n_images=len(indices),
                dim=self.settings.projection[1],
            )
        seed = seed_of(self.settings.seed, self.epoch, _CLUSTERING)
        most = self.settings.kmeans_iterations + 1
        with self.timed("clustering"), self.reporter.track("clustering", most, "iterations") as progress:
            points_MP = points_MP.to(self.machine.clustering_device)
            return self._spherical(points_MP, indices, self.settings.n_clusters, seed, progress), space

    def describe_memory(self) -> str:
        """How much memory the bank takes, for the opening lines."""
        mine = my_part(len(self.loader.images))
        n_bytes = (mine.stop - mine.start) * self.n_large * self.settings.projection[1] * 2
        return f"points of the {self.n_large} large crops of each image {size(n_bytes)}"

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
        state["rows"]["bank"] = self.bank.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.projection.load_state_dict(state["projection"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.assignment is not None:
            others = [Assignment.from_state_dict(one) for one in state["other_assignments"]]
            self.assignments = [self.assignment, *others]
            self._take_prototypes()
        self.bank.load_state_dict(state["rows"]["bank"], self.machine.device)
