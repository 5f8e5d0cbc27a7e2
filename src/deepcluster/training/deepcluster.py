"""DeepCluster: the paper's loop, which reads as its five steps (section 3, figure 1).

N images, B batch, D features, P components, K clusters.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment, draw_as_published, draw_uniform
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.whitening import Whitening
from deepcluster.config import Settings
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.views import Colours, TrainingView
from deepcluster.device import Machine
from deepcluster.distributed import all_reduce
from deepcluster.inference import image_features
from deepcluster.models.heads import ClusterHead
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.progress import Reporter
from deepcluster.training.metrics import epoch_metrics
from deepcluster.training.optim import Learner, LossMeter, head_optimizer, learning_rates, not_finite, trunk_optimizer
from deepcluster.training.run import Interruption

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

    Attributes:
        epoch, batch: the epoch under way, from 1, and the batch of it that comes next.
        labelled: whether steps 1 to 4 of the epoch under way are done.
        assignment, whitening: what the labels come from.
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
        self.settings, self.machine, self.loader = settings, machine, loader
        self.reporter, self.interruption, self.save = reporter, interruption, save
        self.known_labels_N = known_labels_N
        self.trunk = trunk.to(device=machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trunk_optimizer = trunk_optimizer(trunk, settings, machine)
        self.training_view = TrainingView(settings.image_size, scale=settings.crop_scale, flip=settings.flip)
        self.colours = Colours(settings.jitter, settings.grey)
        self.epoch, self.batch, self.labelled = 1, 0, False
        self.assignment: Assignment | None = None
        self.whitening: Whitening | None = None
        self.learner: Learner | None = None
        self.nmi_previous: float | None = None
        self.losses = LossMeter()
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self.saved_at = time.monotonic()

    def run_epoch(self) -> dict[str, Any]:
        """One epoch of the method from where the state stands; returns its metrics."""
        if not self.labelled:
            self.seconds, self.loader.wait_seconds = dict.fromkeys(STEPS, 0.0), 0.0
            if (self.epoch - 1) % self.settings.reassign_every == 0:
                features_ND = self.look_at_images()
                points_NP, whitening = self.shorten_and_whiten(features_ND)
                assignment = self.group(points_NP)
                self.make_labels(assignment, whitening)
            self.labelled = True
            self._save_if_due()
        self.learn_labels()
        metrics = epoch_metrics(self)
        self.epoch, self.batch, self.labelled = self.epoch + 1, 0, False
        self.losses = LossMeter()
        return metrics

    def cluster_finished_trunk(self) -> tuple[Assignment, Whitening]:
        """Steps 1 to 3 with the trunk as it stands, for the groups that people use; the state does not change."""
        points_NP, whitening = self.shorten_and_whiten(self.look_at_images())
        assignment = self.group(points_NP)
        if self.assignment is not None:
            assignment = assignment.matched_to(self.assignment)
        self.seconds = dict.fromkeys(STEPS, 0.0)
        return assignment, whitening

    def look_at_images(self) -> Tensor:
        """Step 1: features_ND of the centre view of every image, in eval mode; rows of unreadable images are NaN."""
        with self._timed("features"), self.reporter.track("features", len(self.loader.images)) as progress:

            def on_batch(images: int) -> None:
                progress(images)
                self.interruption.check()

            return image_features(
                self.trunk,
                self.loader,
                self.machine,
                stage=self.settings.cluster_stage,
                image_size=self.settings.image_size,
                on_batch=on_batch,
            )

    def shorten_and_whiten(self, features_ND: Tensor) -> tuple[Tensor, Whitening]:
        """Step 2: points_NP after PCA, whitening and scaling to unit length; and the whitening itself."""
        with self._timed("whitening"):
            seen_N = torch.isfinite(features_ND).all(dim=1)
            lost = len(seen_N) - int(seen_N.sum()) - len(self.loader.unreadable)
            if lost > 0:
                raise not_finite(f"the features of {lost:,} images are not finite", self._where())
            features_ND = features_ND.to(self.machine.clustering_device)
            whitening = Whitening(self.settings.pca).fit(features_ND if bool(seen_N.all()) else features_ND[seen_N])
            self.interruption.check()
            return whitening.transform(features_ND), whitening

    def group(self, points_NP: Tensor) -> Assignment:
        """Step 3: k-means from random rows that depend on (seed, epoch)."""
        settings = self.settings
        with (
            self._timed("clustering"),
            self.reporter.track("clustering", settings.kmeans_iterations + 1, "iterations") as progress,
        ):
            kmeans = KMeans(
                settings.clusters,
                iterations=settings.kmeans_iterations,
                seed=_seed(settings.seed, self.epoch),
                all_reduce=all_reduce,
            )

            def on_iteration(iteration: int, inertia: float) -> None:
                progress(1)
                self.interruption.check()

            return kmeans.fit(points_NP, on_iteration=on_iteration)

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
                self.interruption.check(self._save_inside_epoch)
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
            self._save_inside_epoch()

    def _save_inside_epoch(self) -> None:
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
        head = ClusterHead(self.trunk.dim, self.settings.clusters, seed=_seed(self.settings.seed, self.epoch))
        head.to(self.machine.device)
        optimizers = (self.trunk_optimizer, head_optimizer(head, self.settings, self.machine))
        return Learner(self.trunk, head, optimizers, self.machine)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - started

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
            "seconds": dict(self.seconds),
            "wait_seconds": self.loader.wait_seconds,
        }
        if self.assignment is not None and self.whitening is not None and self.learner is not None:
            state["assignment"] = self.assignment.state_dict()
            state["whitening"] = self.whitening.state_dict()
            state["head"] = self.learner.head.state_dict()
            state["head_optimizer"] = self.learner.optimizers[1].state_dict()
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


def _seed(*parts: int) -> int:
    """One 63-bit seed of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
