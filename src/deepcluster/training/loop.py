"""The training loop: an epoch reads as the five steps of the paper (section 3, figure 1).

What each step does is in `deepcluster.py` and `deepcluster_v2.py`. Here is the order of the steps, and what they have in
common: batches over ranks, the learning rate, seconds per step, stops and saved states. N images.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.distributed import Ranks
from deepcluster.core.seeds import seed_of_rank
from deepcluster.core.work import Clock
from deepcluster.run.space import Space
from deepcluster.training.batches import even_batches, training_batches
from deepcluster.training.method import Method, Step
from deepcluster.training.optim import learning_factor, not_finite

# Steps whose seconds are counted.
STEPS = ("features", "whitening", "clustering", "training")
# Steps between two checks of the loss: at every step, a GPU would have to be waited for.
CHECK_STEPS = 50


class Observer:
    """Is called at the events of a run, by all ranks, and may write files or print. This one does nothing."""

    def begin(self, loop: "Loop") -> None:
        """Prepare before the first epoch, when everything is checked and nothing is written; may load other weights."""

    def after_clustering(self, loop: "Loop") -> None:
        """Steps 1 to 4 of an epoch are done."""

    def before_step(self, loop: "Loop", step: int, n_steps: int) -> None:
        """Training step `step`, from 0, of `n_steps` in the epoch comes next."""

    def after_step(self, loop: "Loop", step: int, n_steps: int, loss: Tensor) -> None:
        """A training step is done; `loss` is this rank's part of the mean loss."""

    def after_epoch(self, loop: "Loop", metrics: dict[str, Any]) -> None:
        """An epoch is recorded and its state saved; `loop.epoch` is the next one."""


class Loop:
    """Trains a trunk on pseudo-labels of its own making, epoch by epoch. The state can be saved between any two batches.

    Args:
        method: does the five steps.
        save: writes the state; called by all ranks, also inside long epochs.
        known_labels_N: labels for diagnostics, -1 = unknown. Training never reads them.
        observer: is called at the events of the run.

    Attributes:
        epoch, batch: the current epoch, from 1, and its next batch.
        labelled: True if steps 1 to 4 of the current epoch are done.
    """

    def __init__(
        self,
        method: Method,
        save: Callable[[], None] = lambda: None,
        known_labels_N: NDArray[np.int64] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.method, self.save, self.known_labels_N = method, save, known_labels_N
        self.observer = observer or Observer()
        self.settings, self.loader, self.work, self.ranks = method.settings, method.loader, method.work, method.ranks
        self.epoch, self.batch, self.labelled = 1, 0, False
        self.work.clock, self.losses = new_clock(), LossMeter()
        self.saved_at = time.monotonic()

    def run_epoch(self) -> dict[str, Any]:
        """Run one epoch from where the state stands: extract features, whiten, cluster, make labels, train (section 3).

        Returns:
            the line of metrics.jsonl.
        """
        self.share_unreadable()
        if not self.labelled:
            self.work.clock, self.loader.wait_seconds = new_clock(), 0.0
            if self.needs_clusters():
                features = self.method.extract_features(self.epoch)
                points = self.method.whiten(features)
                clusters = self.method.cluster(points, self.epoch)
                self.method.make_labels(clusters, self.epoch)
                self.observer.after_clustering(self)
            self.labelled = True
            self.synchronise()
        self.train_epoch()
        self.share_unreadable()
        metrics = self.metrics()
        self.epoch, self.batch, self.labelled, self.losses = self.epoch + 1, 0, False, LossMeter()
        return metrics

    def needs_clusters(self) -> bool:
        """Return True if the epoch begins with a clustering."""
        last = self.settings.stop_reassigning or self.settings.epochs
        is_due = self.epoch <= last and (self.epoch - 1) % self.settings.reassign_every == 0
        return self.method.assignment is None or is_due

    def train_epoch(self) -> None:
        """Step 5: train for one epoch over the images in a random order, from the batch where the state stands."""
        settings, method, ranks, epoch = self.settings, self.method, self.ranks, self.epoch
        order_N = method.draw_images(epoch)
        batches = even_batches(len(order_N), settings.batch_size, ranks)
        if self.batch == 0:
            method.begin_epoch(epoch)
        for network in method.networks:
            network.train()
        with self.work.clock.timed("training"), self.work.reporter.track(f"epoch {epoch}", len(order_N)) as progress:
            progress(batches[self.batch].start if self.batch < len(batches) else len(order_N))
            for number, batch, positions in training_batches(
                self.loader, method.view, order_N, batches, ranks, seed=settings.seed, epoch=epoch, first=self.batch
            ):
                n_images = self.synchronise(len(batch.indices_B))
                self.observer.before_step(self, number, len(batches))
                if n_images >= 2:  # BatchNorm needs two images.
                    factor = learning_factor(settings, epoch - 1 + number / len(batches))
                    step = Step(epoch, positions, factor, seed_of_rank(ranks, settings.seed, epoch, number), n_images)
                    loss = method.train_step(batch if len(batch.indices_B) else method.blank_batch(), step)
                    self.losses.add(loss, n_images, self.where)
                    self.observer.after_step(self, number, len(batches), loss)
                self.batch = number + 1
                progress(positions.stop - positions.start)
            self.synchronise()
            self.losses.settle(self.where)

    def metrics(self) -> dict[str, Any]:
        """Return the line of metrics.jsonl of the epoch that has ended."""
        (total, count), assignment, known_N = self.losses.over_ranks(self.ranks), self.method.current, self.known_labels_N
        sizes_K, seconds = assignment.sizes_K(), self.work.clock.seconds
        return {
            "epoch": self.epoch,
            "loss": total / max(1, count),
            "inertia": assignment.inertia,
            "nmi_previous": self.method.nmi_previous,
            "nmi_labels": None if known_N is None else assignment.nmi(known_N),
            "clusters": assignment.n_clusters,
            "clusters_nonempty": int((sizes_K > 0).sum()),
            "clusters_repaired": assignment.n_repaired,
            "largest_cluster_share": float(sizes_K.max() / sizes_K.sum()),
            "images_per_second": count / max(1e-9, sum(seconds.values())),
            "data_wait_share": self.loader.wait_seconds / max(1e-9, seconds["features"] + seconds["training"]),
            "seconds": {step: round(value, 3) for step, value in seconds.items()},
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def final_clusters(self) -> tuple[Assignment, Space]:
        """Return the clusters of the finished trunk, for use, and the space they lie in. The state does not change."""
        assignment, space = self.method.final_clusters(self.epoch)
        self.work.clock = new_clock()
        return assignment, space

    def share_unreadable(self) -> None:
        """Share between ranks which images could not be read."""
        for unreadable in self.ranks.gather_objects(self.loader.unreadable):
            self.loader.unreadable.update(unreadable)

    def synchronise(self, n_images: int = 0) -> int:
        """Synchronise ranks between batches: save if due, stop if requested.

        Args:
            n_images: images of this rank's next step.

        Returns:
            images of all ranks.
        """
        interruption = self.work.interruption
        due = self.ranks.is_main and time.monotonic() - self.saved_at > 60 * self.settings.checkpoint_minutes
        total, is_due, is_stopped = self.ranks.sum(
            torch.tensor([n_images, int(due), int(interruption.requested is not None)])
        ).tolist()
        if is_due or is_stopped:
            self.save_now()
        if is_stopped:
            interruption.requested = interruption.requested or "a signal to another process"
            interruption.check()
        return int(total)

    def save_now(self) -> None:
        """Save the state between two batches; called by all ranks."""
        self.losses.settle(self.where)
        self.check_finite()
        self.save()
        self.saved_at = time.monotonic()

    def check_finite(self) -> None:
        """Raise `TrainingError` unless every weight is a finite number: only such a state is saved."""
        for network in self.method.networks:
            for name, value in network.state_dict().items():
                if not torch.isfinite(value).all():
                    raise not_finite(f"{name} is not finite", self.where())

    def where(self) -> str:
        """Return epoch, batch and learning rate, for messages."""
        return f"epoch {self.epoch}, batch {self.batch}, learning rate {self.method.rate:g}"

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as tensors and plain values. `rows` are those of this rank, by name; the rest is of all."""
        total, count = self.losses.over_ranks(self.ranks)
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "labelled": self.labelled,
            "loss": {"total": total, "count": count},
            "seconds": self.work.clock.seconds,
            "wait_seconds": self.loader.wait_seconds,
            **self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, whose `rows` are those of this rank."""
        self.epoch, self.batch, self.labelled = state["epoch"], state["batch"], state["labelled"]
        loss = state["loss"]
        self.losses = LossMeter(loss["total"] if self.ranks.is_main else 0.0, loss["count"])
        self.work.clock, self.loader.wait_seconds = Clock(state["seconds"]), state["wait_seconds"]
        self.method.load_state_dict(state)


def new_clock() -> Clock:
    """Return a clock for a new epoch."""
    return Clock(dict.fromkeys(STEPS, 0.0))


class LossMeter:
    """Mean loss of an epoch, weighted by images. Checks at intervals that it is finite.

    Attributes:
        total, count: sum of this rank's parts of the losses, and number of images of all ranks, as of the last `settle`.
    """

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self.total, self.count = total, count
        self._recent: list[tuple[Tensor, int]] = []

    def add(self, loss: Tensor, images: int, where: Callable[[], str]) -> None:
        """Add this rank's part of the mean loss of a step.

        Args:
            images: images of all ranks in the step.
            where: names the step in an error.
        """
        self._recent.append((loss, images))
        if len(self._recent) >= CHECK_STEPS or loss.device.type == "cpu":
            self.settle(where)

    def settle(self, where: Callable[[], str]) -> float:
        """Add up what is still on the device, and return the mean so far.

        Raises:
            TrainingError: a loss is not a finite number.
        """
        losses = [loss for loss, _ in self._recent]
        values = torch.stack(losses).tolist() if losses else []  # One transfer for all of them.
        for value, (_, images) in zip(values, self._recent, strict=True):
            if value - value != 0:
                raise not_finite(f"the loss became {value}", where())
            self.total += value * images
            self.count += images
        self._recent.clear()
        return self.total / max(1, self.count)

    def over_ranks(self, ranks: Ranks) -> tuple[float, int]:
        """Return the total of all ranks, and the number of images; after `settle`."""
        return float(ranks.sum(torch.tensor(self.total, dtype=torch.float64))), self.count


def peak_memory_bytes() -> int:
    """Return the peak memory of this process: on the GPU if one is used, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
