"""DeepCluster (2018): what it does at each of the five steps (section 3, figure 1).

N images, M of this rank, B batch, D features, P components.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepcluster.clustering import clusterer
from deepcluster.clustering.assignment import Assignment, draw_as_published, draw_uniform
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.core.seeds import seed_of
from deepcluster.core.text import count_of
from deepcluster.core.work import Work
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.views import TrainingView, rotate_quarters
from deepcluster.models.heads import Head, HeadLoss, make_head
from deepcluster.models.trunk import Trunk
from deepcluster.run.features import FEATURE_BATCH, centre_view, feature_batches, stage_width
from deepcluster.run.settings import Settings
from deepcluster.training.feature_rows import MemoryPlan, as_kept, plan_memory
from deepcluster.training.method import Method, Step, labels_of
from deepcluster.training.optim import Optimizers, make_optimizer, not_finite

# The part of a seed, after (run seed, epoch), that stands for the rotations.
_ROTATIONS = 4


# What steps 1 to 3 return: features rows_MD of this rank's images (NaN for unreadable ones), with a whitening that was fed
# with those of all ranks; whitened points_MP of the same images; the assignment of all images.
Features = tuple[Tensor, Whitening]
Points = tuple[Tensor, Whitening]
Clusters = tuple[Assignment, Whitening]


class DeepCluster(Method):
    """The method of 2018: extract features, whiten, cluster, and train on the clusters with a new head.

    Args are those of `Method`, and:
        memory: where features are kept; in memory by default.

    Attributes:
        whitening: whitening of the space in which `assignment` was made.
        head: predicts the pseudo-labels.
        quarters_N: number of quarter turns of each image until the next clustering; None: images stay upright.
    """

    def __init__(
        self,
        trunk: Trunk,
        loader: Loader,
        settings: Settings,
        machine: Machine,
        work: Work | None = None,
        memory: MemoryPlan | None = None,
    ) -> None:
        super().__init__(trunk, loader, settings, machine, work)
        width = stage_width(trunk, machine, settings.cluster_stage, settings.image_size)
        n_mine, kept = self.mine.stop - self.mine.start, machine.feature_dtype
        self.memory = memory or plan_memory(n_mine, width, settings.pca, budget_bytes=sys.maxsize, computed=kept)
        self.crops = ((1, settings.image_size),)
        self.view = TrainingView(settings.image_size, scale=settings.crop_scale, flip=settings.flip)
        self.network = self.prepare(self.trunk)
        weights = [weight for weight in self.trunk.parameters() if weight.requires_grad]  # The Sobel layer is fixed.
        self.trunk_optimizer = make_optimizer(weights, settings, machine, momentum=settings.momentum)
        self.whitening: Whitening | None = None
        self.head: Head | None = None
        self.quarters_N: Tensor | None = None

    def extract_features(self, epoch: int) -> Features:
        """Step 1: extract the features of the centre view of every image, in eval mode."""
        if self.settings.rotations:
            generator = torch.Generator().manual_seed(seed_of(self.settings.seed, epoch, _ROTATIONS))
            self.quarters_N = torch.randint(4, (len(self.loader.images),), generator=generator, dtype=torch.uint8)
        return self._extract(epoch, self.quarters_N)

    def _extract(self, epoch: int, quarters_N: Tensor | None) -> Features:
        rows_MD, whitening = self.memory.allocate(), Whitening(self.settings.pca)
        seen_M = torch.zeros(len(rows_MD), dtype=torch.bool)
        n_bad = 0
        one_pass = (self.trunk, self.loader, self.machine, self.settings.cluster_stage, centre_view(self.settings))
        mine_M = torch.arange(self.mine.start, self.mine.stop)
        with self.work.track("features", len(rows_MD), step="features") as advance:
            for rows_BD, indices_B in feature_batches(*one_pass, indices=mine_M, quarters_N=quarters_N, advance=advance):
                rows_BD, bad = as_kept(rows_BD, rows_MD.dtype)
                n_bad += bad
                places_B = indices_B - self.mine.start
                rows_MD[places_B], seen_M[places_B] = rows_BD.cpu(), True
                with self.work.clock.timed("whitening"):
                    whitening.update(rows_BD[~rows_BD[:, 0].isnan()].to(self.machine.clustering_device))
        rows_MD[~seen_M] = torch.nan
        if n_bad:
            where = f"epoch {epoch}, batch 0, learning rate {self.rate:g}"
            raise not_finite(f"the features of {count_of(n_bad, 'image')} are over 1e15 or not finite", where)
        return rows_MD, whitening

    def whiten(self, features: Features) -> Points:
        """Step 2: PCA, whitening and scaling to unit length."""
        rows_MD, whitening = features
        with self.work.track("whitening", len(rows_MD), step="whitening") as advance:
            whitening.finish(ranks=self.ranks)
            device = self.machine.clustering_device
            points_MP = torch.full((len(rows_MD), self.settings.pca), torch.nan, device=device)
            for first in range(0, len(rows_MD), FEATURE_BATCH):
                rows_BD = rows_MD[first : first + FEATURE_BATCH].to(device)
                points_MP[first : first + len(rows_BD)] = whitening.transform(rows_BD)
                advance(len(rows_BD))
        return points_MP, whitening

    def cluster(self, points: Points, epoch: int) -> Clusters:
        """Step 3: k-means, or the clusterer of the settings, from a start that depends on (seed, epoch)."""
        return self._cluster(points, epoch, self.quarters_N)

    def _cluster(self, points: Points, epoch: int, quarters_N: Tensor | None) -> Clusters:
        (points_MP, whitening), seed = points, seed_of(self.settings.seed, epoch)
        algorithm = clusterer(self.settings.clustering).from_settings(self.settings)
        rotations = {} if quarters_N is None else {"rotations_N": quarters_N[self.mine]}
        with self.work.track("clustering", algorithm.most_steps, "iterations", step="clustering", together=True) as advance:
            assignment = algorithm.cluster(points_MP, seed=seed, ranks=self.ranks, advance=advance, **rotations)
            assignment = assignment.over_ranks(self.ranks)
        if assignment.remark:
            self.work.reporter.warn(assignment.remark)
        return assignment, whitening

    def make_labels(self, clusters: Clusters, epoch: int) -> None:
        """Step 4: the clusters become pseudo-labels, with a new head that predicts them."""
        assignment, self.whitening = clusters
        self.take_assignment(assignment)
        self._new_head(epoch)

    def _new_head(self, epoch: int) -> None:
        seed, assignment = seed_of(self.settings.seed, epoch), self.current
        head = make_head(
            self.trunk.dim,
            assignment.n_clusters,
            assignment.super_of_cluster_K,
            norm=self.settings.head_norm,
            seed=seed,
        )
        self.head = self.on_device(head)
        weights, momentum = list(self.head.parameters()), self.settings.head_momentum
        self.head_optimizer = make_optimizer(weights, self.settings, self.machine, momentum=momentum)
        self.head_losses = self.ranks.data_parallel(HeadLoss(self.head))
        self.optimizers = Optimizers([self.trunk_optimizer, self.head_optimizer], self.settings.clip_gradient)

    def draw_images(self, epoch: int) -> Tensor:
        """Return the images of an epoch, drawn uniformly over the clusters: as many as there are, times `epoch_length`."""
        draw = draw_uniform if self.settings.sampling == "uniform" else draw_as_published
        labels_N = self.current.labels_N
        return draw(
            labels_N, n_draws=self.settings.images_per_epoch(int((labels_N >= 0).sum())), seed=(self.settings.seed, epoch)
        )

    def train_step(self, batch: Batch, step: Step) -> Tensor:
        """Step 5: one step of cross-entropy on the pseudo-labels; returns this rank's part of the mean loss."""
        images_BCHW = self.preprocess(batch.images_BCHW, batch.draws_BR)
        if self.quarters_N is not None:
            images_BCHW = rotate_quarters(images_BCHW, self.quarters_N[batch.indices_B])
        labels_B = labels_of(self.current, batch.indices_B)
        known_B = self.machine.put(labels_B >= 0)
        torch.manual_seed(step.seed)
        with self.machine.autocast():
            losses_B: Tensor = self.head_losses(self.network(images_BCHW), labels_B.clamp(min=0))
        loss = (losses_B * known_B).sum() / step.n_images
        lr = self.settings.lr
        # The head's rate is constant: the head is new after each clustering, and would not learn at a rate near zero.
        self.optimizers.start([lr * step.factor, lr if self.settings.head_lr is None else self.settings.head_lr])
        # Gradients are averaged over the ranks, and should be summed.
        (loss * self.ranks.size).backward()
        self.optimizers.step()
        return loss.detach()

    def final_clusters(self, epoch: int) -> tuple[Assignment, Whitening]:
        """Return the clusters of the finished trunk, of upright images, and their space. Training state does not change."""
        assignment, whitening = self._cluster(self.whiten(self._extract(epoch, None)), epoch, None)
        return self.numbered_as_before(assignment), whitening

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The trained networks that exist so far."""
        return (self.trunk, *([self.head] if self.head else []))

    @property
    def rate(self) -> float:
        """Learning rate of the trunk at the last step."""
        return float(self.trunk_optimizer.param_groups[0]["lr"])

    def describe_memory(self) -> str:
        """Return where features are kept, for the opening lines."""
        return self.memory.describe()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["trunk_optimizer"] = self.trunk_optimizer.state_dict()
        if self.whitening is not None and self.head is not None:
            state["whitening"] = self.whitening.state_dict()
            state["head"] = self.head.state_dict()
            state["head_optimizer"] = self.head_optimizer.state_dict()
        if self.quarters_N is not None:
            state["quarters"] = self.quarters_N
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.trunk_optimizer.load_state_dict(state["trunk_optimizer"])
        if self.assignment is not None:
            self.whitening = Whitening.from_state_dict(state["whitening"])
            self._new_head(state["epoch"])
            if self.head is not None:
                self.head.load_state_dict(state["head"])
            self.head_optimizer.load_state_dict(state["head_optimizer"])
        self.quarters_N = state.get("quarters")
