"""DeepCluster, the method of 2018: what it does at each of the five steps (section 3, figure 1).

N images, B batch, D features, P components, K clusters.
"""

import sys
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from deepcluster.clustering.assignment import Assignment, draw_as_published, draw_uniform
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.device import Machine
from deepcluster.core.distributed import all_reduce, my_part
from deepcluster.core.progress import Meter
from deepcluster.core.seeds import seed_of
from deepcluster.data.crops import Crops
from deepcluster.data.loader import Batch, Loader, View
from deepcluster.data.views import TrainingView, rotate_quarters
from deepcluster.models.heads import make_head
from deepcluster.models.trunk import Trunk
from deepcluster.run.features import FEATURE_BATCH, feature_batches, stage_width
from deepcluster.run.settings import Settings
from deepcluster.training.batches import part_of_slice
from deepcluster.training.feature_rows import FeatureRows, MemoryPlan, plan_memory
from deepcluster.training.grouping import Grouping, group_points, most_iterations
from deepcluster.training.loop import Around, Loop
from deepcluster.training.optim import (
    Learner,
    TrunkRows,
    head_optimizer,
    not_finite,
    prepared,
    trunk_optimizer,
)
from deepcluster.training.past_features import PastFeatures
from deepcluster.training.pseudo_labels import labels_of

# Of a seed's parts, after (run seed, epoch): what it is for.
_QUARTERS = 4

Batches = Generator[tuple[Tensor, Tensor], None, None]


@dataclass(frozen=True)
class Looked:
    """What step 1 gives: the rows of this rank's images, and the whitening that was fed with those of all ranks."""

    rows: FeatureRows
    whitening: Whitening


class DeepCluster(Loop[Looked, Grouping]):
    """The method of 2018: looks at every image, whitens, groups, and learns the groups with a new head.

    Args are those of `Loop`, and:
        memory: where features are kept; in memory by default.

    Attributes:
        whitening: of the space in which `assignment` was made.
        grouping: the clustering under way, if one is.
        quarters_N: by how many quarters each image is turned until the next clustering; None: none is.
        finishing: whether the finished trunk is grouped: by a look of its own, at upright images.
        past: features that were seen in training, where they are grouped in the place of those of a look.
    """

    def __init__(
        self,
        trunk: Trunk,
        loader: Loader,
        settings: Settings,
        machine: Machine,
        memory: MemoryPlan | None = None,
        **around: Unpack[Around],
    ) -> None:
        super().__init__(trunk, loader, settings, machine, **around)
        self.mine = my_part(len(loader.images))
        self.trunk_optimizer = trunk_optimizer(self.trunk, settings, machine)
        self.network = prepared(TrunkRows(self.trunk, settings.cluster_stage), machine, compiled=settings.compile)
        width = stage_width(trunk, machine, settings.cluster_stage, settings.image_size)
        self.memory = memory or plan_memory(
            self.mine.stop - self.mine.start,
            width,
            settings.pca,
            budget_bytes=sys.maxsize,
            computed=machine.feature_dtype,
        )
        self.whitening: Whitening | None = None
        self.grouping: Grouping | None = None
        self.learner: Learner | None = None
        self.quarters_N: Tensor | None = None
        self.finishing = False
        self.past = None if settings.looks_again else PastFeatures(len(loader.images))

    def look_at_images(self) -> Looked:
        """Step 1: the features of the centre view of every image, in eval mode; or those of the epoch before."""
        if self.settings.rotations and not self.finishing:
            generator = torch.Generator().manual_seed(seed_of(self.settings.seed, self.epoch, _QUARTERS))
            self.quarters_N = torch.randint(4, (len(self.loader.images),), generator=generator, dtype=torch.uint8)
        whitening = Whitening(self.settings.pca, all_reduce=all_reduce)
        rows = FeatureRows(self._rows, self.memory, batch_rows=FEATURE_BATCH)

        def feed(rows_BD: Tensor) -> None:
            with self.timed("whitening"):
                whitening.update(rows_BD.to(self.machine.clustering_device))

        with self.timed("features"):
            rows.fill(feed)
        if rows.n_not_finite:
            raise not_finite(f"the features of {rows.n_not_finite:,} images are over 1e15 or not finite", self.where())
        if rows.n_clamped:
            self.reporter.warn(f"features of {rows.n_clamped:,} images are beyond 65,504, which is kept in their place")
        return Looked(rows, whitening)

    def shorten_and_whiten(self, looked: Looked) -> Grouping:
        """Step 2: points_MP after PCA, whitening and scaling to unit length, ready to be grouped; NaN where no row is."""
        rows, whitening = looked.rows, looked.whitening
        # A second look at the images shows its own progress.
        looks = self.memory.kind == "twice"
        track = nullcontext(Meter()) if looks else self.reporter.track("whitening", self.memory.n_images)
        with rows, self.timed("whitening"), track as progress:

            def on_batch(images: int) -> None:
                progress(images)
                self.interruption.check()

            whitening.finish()
            self.interruption.check()
            device, width = self.machine.clustering_device, self.settings.pca
            points_MP = rows.each(whitening.transform, width=width, device=device, on_batch=on_batch)
        indices_M = torch.arange(self.mine.start, self.mine.stop)
        quarters_M = None if self.turned_N is None else self.turned_N[self.mine]
        return Grouping(points_MP, indices_M, whitening, quarters_M=quarters_M)

    def _rows(self) -> Batches:
        """Rows_BD of this rank's images, and their numbers among these, batch by batch."""
        past = None if self.finishing else self.past
        fills = past is not None and past.is_empty
        for rows_BD, indices_B in self._look() if past is None or fills else past.batches(FEATURE_BATCH):
            # As they are kept: a clustering that is taken up may need them once more.
            kept_BD = past.put(indices_B, rows_BD) if past is not None and fills else rows_BD
            yield kept_BD, indices_B - self.mine.start

    @property
    def turned_N(self) -> Tensor | None:
        """By how many quarters the images are turned that are looked at; None: they are upright."""
        return None if self.finishing else self.quarters_N

    def _look(self) -> Batches:
        """Rows_BD and indices_B of this rank's images; the time that they take is that of step 1, also in step 2."""
        with self.reporter.track("features", self.memory.n_images) as progress:

            def on_batch(images: int) -> None:
                progress(images)
                self.interruption.check()

            indices = torch.arange(self.mine.start, self.mine.stop)
            stage, size = self.settings.cluster_stage, self.settings.image_size
            batches = feature_batches(
                self.trunk,
                self.loader,
                self.machine,
                stage=stage,
                image_size=size,
                indices=indices,
                quarters_N=self.turned_N,
                advance=on_batch,
            )
            while True:
                with self.timed("features"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def points_under_way(self) -> Grouping | None:
        return self.grouping

    def group(self, points: Grouping) -> Sequence[Assignment]:
        """Step 3: k-means (or what the settings name) from a start that depends on (seed, epoch)."""
        with (
            self.timed("clustering"),
            self.reporter.track("clustering", most_iterations(self.settings), "iterations") as progress,
        ):

            def on_step(iterations: int) -> None:
                progress(iterations)
                self._pause()

            self.grouping = points
            progress(points.lloyd.iteration if points.lloyd else 0)
            assignment = group_points(
                points,
                self.settings,
                n_images=len(self.loader.images),
                seed=seed_of(self.settings.seed, self.epoch),
                on_step=on_step,
            )
        self.grouping = None
        if assignment.remark:
            self.reporter.warn(assignment.remark)
        return [assignment]

    def make_labels(self, assignments: Sequence[Assignment], points: Grouping) -> None:
        """Step 4: the groups become labels, numbered as they were before where they overlap; a new head for them."""
        self.take_assignment(assignments[0])
        self.whitening = points.whitening
        self.learner = self._new_learner()

    @property
    def crops(self) -> Crops:
        return ((1, self.settings.image_size),)

    @property
    def view(self) -> View:
        return TrainingView(self.settings.image_size, scale=self.settings.crop_scale, flip=self.settings.flip)

    def draw_images(self) -> Tensor:
        """As many images as there are, drawn evenly over the clusters."""
        draw = draw_uniform if self.settings.sampling == "uniform" else draw_as_published
        labels_N = self.current.labels_N
        return draw(labels_N, n_draws=int((labels_N >= 0).sum()), seed=(self.settings.seed, self.epoch))

    def step(self, batch: Batch, positions: slice, factor: float, seed: int, total: int) -> Tensor:
        images_BCHW = self.seen(batch.images_BCHW, batch.draws_BR)
        if self.quarters_N is not None:
            images_BCHW = rotate_quarters(images_BCHW, self.quarters_N[batch.indices_B])
        labels_B = labels_of(self.current, batch.indices_B).to(self.machine.device)
        if self.learner is None:
            raise RuntimeError("there is no head before the first clustering")
        settings = self.settings
        # The head's rate stays: it is made anew after each clustering, and at a rate near zero it would learn nothing.
        rates = settings.lr * factor, settings.lr if settings.head_lr is None else settings.head_lr
        loss, rows_BC = self.learner.step(images_BCHW, labels_B, rates=rates, seed=seed, total=total)
        if self.past is not None:
            self.past.learned(batch.indices_B, part_of_slice(positions).start, rows_BC)
        return loss

    def epoch_learned(self) -> None:
        if self.past is not None:
            self.past.take_over()

    def finished_groups(self) -> tuple[Assignment, Whitening]:
        self.finishing = True
        try:
            points = self.grouping or self.shorten_and_whiten(self.look_at_images())
            return self.group(points)[0], points.whitening
        finally:
            self.finishing = False

    @property
    def networks(self) -> Sequence[nn.Module]:
        return (self.trunk, *([self.learner.head] if self.learner else []))

    def where(self) -> str:
        rate = self.trunk_optimizer.param_groups[0]["lr"]
        return f"epoch {self.epoch}, batch {self.batch}, learning rate {rate:g}"

    def _new_learner(self) -> Learner:
        seed = seed_of(self.settings.seed, self.epoch)
        head = make_head(self.trunk.dim, self.current.n_clusters, self.current.super_of_cluster_K, seed=seed)
        head = head.to(device=self.machine.device, dtype=self.machine.dtype)
        optimizers = (self.trunk_optimizer, head_optimizer(head, self.settings, self.machine))
        return Learner(self.network, head, optimizers, self.machine, self.settings.clip_gradient)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["trunk_optimizer"] = self.trunk_optimizer.state_dict()
        if self.whitening is not None and self.learner is not None:
            state["whitening"] = self.whitening.state_dict()
            state.update(self.learner.head_state())
        if self.grouping is not None:
            state["grouping"] = self.grouping.state_dict()
            state["rows"]["points"] = self.grouping.rows()
        if self.past is not None:
            state["rows"].update(self.past.rows())
        if self.quarters_N is not None:
            state["quarters"] = self.quarters_N
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.trunk_optimizer.load_state_dict(state["trunk_optimizer"])
        if self.assignment is not None:
            self.whitening = Whitening.from_state_dict(state["whitening"])
            self.learner = self._new_learner()
            self.learner.load_head_state(state)
        if "grouping" in state:
            device = self.machine.clustering_device
            self.grouping = Grouping.from_state_dict(state["grouping"], state["rows"]["points"], device)
        if self.past is not None:
            self.past.load_rows(state["rows"])
        self.quarters_N = state.get("quarters")
