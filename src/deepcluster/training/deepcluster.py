"""DeepCluster: the paper's loop, which reads as its five steps (section 3, figure 1).

N images, B batch, D features, P components, K clusters.
"""

import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment, draw_as_published, draw_uniform
from deepcluster.clustering.features import FeatureRows, MemoryPlan, plan_memory
from deepcluster.clustering.whitening import Whitening
from deepcluster.config import Settings
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.views import Colours, TrainingView
from deepcluster.device import Machine
from deepcluster.distributed import all_reduce
from deepcluster.inference import LOOK_BATCH, look, stage_width
from deepcluster.interruption import Interruption
from deepcluster.models.heads import ClusterHead
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.progress import Meter, Reporter
from deepcluster.training.grouping import Grouping, group_points, most_iterations
from deepcluster.training.metrics import epoch_metrics
from deepcluster.training.optim import Learner, LossMeter, head_optimizer, learning_rates, not_finite, trunk_optimizer

STEPS = ("features", "whitening", "clustering", "training")


class DeepCluster:
    """Trains a trunk on pseudo-labels of its own making, epoch by epoch; its state can be saved at any batch.

    Args:
        trunk: random weights, or those to go on from.
        loader: gives the views of the images; images in its `unreadable` are left out of clustering and sampling.
        settings, machine: what the run is and where.
        reporter: told how far the work is.
        interruption: asked at every batch whether to stop.
        save: writes the state; called inside long epochs, too.
        known_labels_N: labels for diagnostics alone, -1 = unknown; training never reads them.
        memory: where features are kept; in memory by default.

    Attributes:
        epoch, batch: the epoch under way, from 1, and the batch of it that comes next.
        labelled: whether steps 1 to 4 of the epoch under way are done.
        assignment, whitening: what the labels come from.
        grouping: the clustering under way, if one is.
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
        memory: MemoryPlan | None = None,
    ) -> None:
        self.settings, self.machine, self.loader = settings, machine, loader
        self.reporter, self.interruption, self.save = reporter, interruption, save
        self.known_labels_N = known_labels_N
        self.trunk = trunk.to(device=machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trunk_optimizer = trunk_optimizer(trunk, settings, machine)
        self.training_view = TrainingView(settings.image_size, scale=settings.crop_scale, flip=settings.flip)
        self.colours = Colours(settings.jitter, settings.grey)
        width = stage_width(trunk, machine, settings.cluster_stage, settings.image_size)
        self.memory = memory or plan_memory(
            len(loader.images), width, settings.pca, budget_bytes=sys.maxsize, computed=machine.feature_dtype
        )
        self.epoch, self.batch, self.labelled = 1, 0, False
        self.assignment: Assignment | None = None
        self.whitening: Whitening | None = None
        self.grouping: Grouping | None = None
        self.learner: Learner | None = None
        self.nmi_previous: float | None = None
        self.losses = LossMeter()
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self.running: tuple[str, float, float] | None = None
        self.saved_at = time.monotonic()

    def run_epoch(self) -> dict[str, Any]:
        """One epoch of the method from where the state stands; returns its metrics."""
        if not self.labelled:
            self.seconds, self.loader.wait_seconds = dict.fromkeys(STEPS, 0.0), 0.0
            if (self.epoch - 1) % self.settings.reassign_every == 0:
                grouping = self.grouping or self.shorten_and_whiten(*self.look_at_images())
                assignment = self.group(grouping)
                self.make_labels(assignment, grouping.whitening)
            self.grouping = None
            self.labelled = True
            self._save_if_due()
        self.learn_labels()
        metrics = epoch_metrics(self)
        self.epoch, self.batch, self.labelled = self.epoch + 1, 0, False
        self.losses = LossMeter()
        return metrics

    def cluster_finished_trunk(self) -> tuple[Assignment, Whitening]:
        """Steps 1 to 3 with the trunk as it stands, for the groups that people use; the state does not change."""
        grouping = self.grouping or self.shorten_and_whiten(*self.look_at_images())
        assignment = self.group(grouping)
        if self.assignment is not None:
            assignment = assignment.matched_to(self.assignment)
        self.seconds = dict.fromkeys(STEPS, 0.0)
        return assignment, grouping.whitening

    def look_at_images(self) -> tuple[FeatureRows, Whitening]:
        """Step 1: the features of the centre view of every image, in eval mode, and the whitening that was fed with them."""
        whitening = Whitening(self.settings.pca, all_reduce=all_reduce)
        rows = FeatureRows(self._look, self.memory, batch_rows=LOOK_BATCH)

        def feed(rows_BD: Tensor) -> None:
            with self._timed("whitening"):
                whitening.update(rows_BD.to(self.machine.clustering_device))

        with self._timed("features"):
            rows.fill(feed)
        if rows.n_not_finite:
            raise not_finite(f"the features of {rows.n_not_finite:,} images are over 1e15 or not finite", self._where())
        if rows.n_clamped:
            self.reporter.warn(f"features of {rows.n_clamped:,} images are beyond 65,504, which is kept in their place")
        return rows, whitening

    def shorten_and_whiten(self, rows: FeatureRows, whitening: Whitening) -> Grouping:
        """Step 2: points_NP after PCA, whitening and scaling to unit length, ready to be grouped; NaN where no row is."""
        # A second look at the images shows its own progress.
        looks = self.memory.kind == "twice"
        track = nullcontext(Meter()) if looks else self.reporter.track("whitening", len(self.loader.images))
        with rows, self._timed("whitening"), track as progress:

            def on_batch(images: int) -> None:
                progress(images)
                self.interruption.check()

            whitening.finish()
            self.interruption.check()
            device, width = self.machine.clustering_device, self.settings.pca
            return Grouping(rows.each(whitening.transform, width=width, device=device, on_batch=on_batch), whitening)

    def _look(self) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Rows_BD and indices_B of all images, batch by batch; the time that they take is that of step 1, also in step 2."""
        with self.reporter.track("features", len(self.loader.images)) as progress:

            def on_batch(images: int) -> None:
                progress(images)
                self.interruption.check()

            stage, size = self.settings.cluster_stage, self.settings.image_size
            batches = look(self.trunk, self.loader, self.machine, stage=stage, image_size=size, on_batch=on_batch)
            while True:
                with self._timed("features"):
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def group(self, grouping: Grouping) -> Assignment:
        """Step 3: k-means (or what the settings name) from a start that depends on (seed, epoch)."""
        with (
            self._timed("clustering"),
            self.reporter.track("clustering", most_iterations(self.settings), "iterations") as progress,
        ):

            def on_step(iterations: int) -> None:
                progress(iterations)
                self._save_if_due()
                self.interruption.check(self.save_now)

            self.grouping = grouping
            progress(grouping.lloyd.iteration if grouping.lloyd else 0)
            seed = _seed(self.settings.seed, self.epoch)
            assignment = group_points(grouping, self.settings, seed=seed, on_step=on_step)
        self.grouping = None
        if assignment.remark:
            self.reporter.warn(assignment.remark)
        return assignment

    def make_labels(self, assignment: Assignment, whitening: Whitening) -> None:
        """Step 4: the groups become labels, numbered as they were before where they overlap; a new head for them."""
        if self.assignment is not None:
            self.nmi_previous = assignment.nmi(self.assignment.labels_N)
            assignment = assignment.matched_to(self.assignment)
        self.assignment, self.whitening = assignment, whitening
        self.learner = self._new_learner()

    def learn_labels(self) -> None:
        """Step 5: one epoch over images drawn evenly over the clusters, from the batch where the state stands."""
        settings, order_N = self.settings, self._draw_images()
        n_batches = -(-len(order_N) // settings.batch_size)
        first = self.batch
        batches = self.loader.training_views(
            self.training_view, order_N, settings.batch_size, seed=settings.seed, epoch=self.epoch, first_batch=first
        )
        self.trunk.train()
        with self._timed("training"), self.reporter.track(f"epoch {self.epoch}", len(order_N)) as progress:
            progress(first * settings.batch_size)
            for number, batch in enumerate(batches, first):
                self._step(batch, rates=learning_rates(settings, (self.epoch - 1 + number / n_batches) / settings.epochs))
                self.batch = number + 1
                progress(len(batch.indices_B))
                self._save_if_due()
                self.interruption.check(self.save_now)
            self.losses.settle(self._where)

    def _draw_images(self) -> Tensor:
        draw = draw_uniform if self.settings.sampling == "uniform" else draw_as_published
        labels_N = self.current.labels_N
        return draw(labels_N, n_draws=int((labels_N >= 0).sum()), seed=(self.settings.seed, self.epoch))

    def _step(self, batch: Batch, *, rates: tuple[float, float]) -> None:
        # A last batch of one image is left out: BatchNorm needs two.
        if self.learner is None or len(batch.indices_B) < 2:
            return
        images_BCHW = normalise(self.colours(self.machine.put(batch.images_BCHW), batch.draws_BR))
        labels_B = self.current.labels_N[batch.indices_B].to(self.machine.device)
        loss = self.learner.step(
            images_BCHW,
            labels_B,
            rates=rates,
            seed=_seed(self.settings.seed, self.epoch, self.batch),
        )
        self.losses.add(loss, len(labels_B), self._where)

    def _save_if_due(self) -> None:
        if time.monotonic() - self.saved_at > 60 * self.settings.checkpoint_minutes:
            self.save_now()

    def save_now(self) -> None:
        """Save the state as it stands, which must be between two batches."""
        self.losses.settle(self._where)
        self.check_finite()
        self.save()
        self.saved_at = time.monotonic()

    def check_finite(self) -> None:
        """Raise `TrainingError` unless every weight is a finite number: only such a state is saved."""
        for network in (self.trunk, *([self.learner.head] if self.learner else [])):
            for name, value in network.state_dict().items():
                if not torch.isfinite(value).all():
                    raise not_finite(f"{name} is not finite", self._where())

    def _where(self) -> str:
        rate = self.trunk_optimizer.param_groups[0]["lr"]
        return f"epoch {self.epoch}, batch {self.batch}, learning rate {rate:g}"

    @property
    def current(self) -> Assignment:
        """The assignment that is being learned."""
        if self.assignment is None:
            raise RuntimeError("there is no assignment before the first clustering")
        return self.assignment

    def _new_learner(self) -> Learner:
        head = ClusterHead(self.trunk.dim, self.current.n_clusters, seed=_seed(self.settings.seed, self.epoch))
        head.to(self.machine.device)
        optimizers = (self.trunk_optimizer, head_optimizer(head, self.settings, self.machine))
        return Learner(self.trunk, head, optimizers, self.machine)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Count the time to a step, but for what is counted to steps inside it."""
        around, self.running = self.running, (step, time.perf_counter(), sum(self.seconds.values()))
        try:
            yield
        finally:
            self.seconds = self._seconds_so_far()
            self.running = around

    def _seconds_so_far(self) -> dict[str, float]:
        """`seconds`, with those of the step that is running."""
        seconds = dict(self.seconds)
        if self.running is not None:
            step, started, counted = self.running
            seconds[step] += time.perf_counter() - started - (sum(self.seconds.values()) - counted)
        return seconds

    def state_dict(self) -> dict[str, Any]:
        """The whole state as tensors and plain values."""
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "batch": self.batch,
            "labelled": self.labelled,
            "trunk": self.trunk.state_dict(),
            "trunk_optimizer": self.trunk_optimizer.state_dict(),
            "nmi_previous": self.nmi_previous,
            "loss": {"total": self.losses.total, "count": self.losses.count},
            "seconds": self._seconds_so_far(),
            "wait_seconds": self.loader.wait_seconds,
        }
        if self.assignment is not None and self.whitening is not None and self.learner is not None:
            state["assignment"] = self.assignment.state_dict()
            state["whitening"] = self.whitening.state_dict()
            state["head"] = self.learner.head.state_dict()
            state["head_optimizer"] = self.learner.optimizers[1].state_dict()
        if self.grouping is not None:
            state["grouping"] = self.grouping.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.epoch, self.batch, self.labelled = state["epoch"], state["batch"], state["labelled"]
        self.trunk.load_state_dict(state["trunk"])
        self.trunk_optimizer.load_state_dict(state["trunk_optimizer"])
        self.nmi_previous = state["nmi_previous"]
        self.losses = LossMeter(**state["loss"])
        self.seconds, self.loader.wait_seconds = dict(state["seconds"]), state["wait_seconds"]
        if "assignment" in state:
            self.assignment = Assignment.from_state_dict(state["assignment"])
            self.whitening = Whitening.from_state_dict(state["whitening"])
            self.learner = self._new_learner()
            self.learner.head.load_state_dict(state["head"])
            self.learner.optimizers[1].load_state_dict(state["head_optimizer"])
        if "grouping" in state:
            self.grouping = Grouping.from_state_dict(state["grouping"])
            self.grouping.points_NP = self.grouping.points_NP.to(self.machine.clustering_device)


def _seed(*parts: int) -> int:
    """One 63-bit seed of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
