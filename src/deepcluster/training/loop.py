"""The loop that all methods share: an epoch reads as the five steps of the paper (section 3, figure 1).

What a method does at each step is in `deepcluster.py` and `deepcluster_v2.py`; here is what they have in common: the order
of the steps, batches over ranks, clocks, stops and saved states. N images, B batch.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, NotRequired, TypedDict, TypeVar, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.device import Machine
from deepcluster.core.distributed import all_reduce, gather_objects, on_main, world_size
from deepcluster.core.interruption import Interruption
from deepcluster.core.progress import Reporter
from deepcluster.core.seeds import seed_of_rank
from deepcluster.data.crops import Crops
from deepcluster.data.loader import Batch, Loader, View
from deepcluster.data.views import DRAWS_ALIGNED, Colours
from deepcluster.models.synchronised import synchronise_batch_norms
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.run.settings import Settings
from deepcluster.run.space import Space
from deepcluster.training.batches import even_batches, part_of_slice
from deepcluster.training.clock import Clock
from deepcluster.training.metrics import epoch_metrics
from deepcluster.training.optim import LossMeter, learning_factor, not_finite

Looked = TypeVar("Looked")
Points = TypeVar("Points")


class Around(TypedDict):
    """What is around a loop, by keyword.

    Attributes:
        reporter: told how far the work is.
        interruption: asked at every batch whether to stop.
        save: writes the state; called inside long epochs, too, by all ranks.
        known_labels_N: labels for diagnostics alone, -1 = unknown; training never reads them.
    """

    reporter: Reporter
    interruption: Interruption
    save: Callable[[], None]
    known_labels_N: NotRequired[NDArray[np.int64] | None]


class Loop(ABC, Generic[Looked, Points]):
    """Trains a trunk on pseudo-labels of its own making, epoch by epoch; its state can be saved at any batch.

    Args:
        trunk: random weights, or those to go on from.
        loader: gives the views of the images; images in its `unreadable` are left out of clustering and sampling.
        settings, machine: what the run is and where.
        around: see `Around`.

    Attributes:
        epoch, batch: the epoch under way, from 1, and the batch of it that comes next.
        labelled: whether steps 1 to 4 of the epoch under way are done.
        assignment: the labels that are learned, of all images on every rank.
    """

    def __init__(
        self,
        trunk: Trunk,
        loader: Loader,
        settings: Settings,
        machine: Machine,
        **around: Unpack[Around],
    ) -> None:
        self.settings, self.machine, self.loader = settings, machine, loader
        self.reporter, self.interruption, self.save = around["reporter"], around["interruption"], around["save"]
        self.known_labels_N = around.get("known_labels_N")
        self.trunk: Trunk = self.on_device(trunk)
        self.colours = Colours(settings.jitter, settings.grey, share=settings.jitter_share, blur=settings.blur)
        self.epoch, self.batch, self.labelled = 1, 0, False
        self.assignment: Assignment | None = None
        self.nmi_previous: float | None = None
        self.losses = LossMeter()
        self.clock = Clock()
        self.saved_at = time.monotonic()

    def run_epoch(self) -> dict[str, Any]:
        """One epoch of the method from where the state stands; returns its metrics."""
        self.share_unreadable()
        if not self.labelled:
            self.clock, self.loader.wait_seconds = Clock(), 0.0
            if self.is_due():
                points = self.points_under_way() or self.shorten_and_whiten(self.look_at_images())
                assignments = self.group(points)
                self.make_labels(assignments, points)
            self.labelled = True
            self._pause()
        self.learn_labels()
        self.share_unreadable()
        metrics = epoch_metrics(self)
        self.epoch, self.batch, self.labelled = self.epoch + 1, 0, False
        self.losses = LossMeter()
        return metrics

    def share_unreadable(self) -> None:
        """All ranks learn which images one of them could not read."""
        for unreadable in gather_objects(self.loader.unreadable):
            self.loader.unreadable.update(unreadable)

    def is_due(self) -> bool:
        """Whether the epoch begins with a clustering."""
        last = self.settings.stop_reassigning or self.settings.epochs
        return self.assignment is None or (self.epoch <= last and (self.epoch - 1) % self.settings.reassign_every == 0)

    def points_under_way(self) -> Points | None:
        """Points whose clustering was stopped; None where none was."""
        return None

    @abstractmethod
    def look_at_images(self) -> Looked:
        """Step 1: features of all images."""

    @abstractmethod
    def shorten_and_whiten(self, looked: Looked) -> Points:
        """Step 2: the points that are grouped."""

    @abstractmethod
    def group(self, points: Points) -> Sequence[Assignment]:
        """Step 3: the groups, of all images on every rank; the first are those that people see."""

    @abstractmethod
    def make_labels(self, assignments: Sequence[Assignment], points: Points) -> None:
        """Step 4: the groups become labels, and what predicts them is made ready."""

    def learn_labels(self) -> None:
        """Step 5: one epoch over the images in a random order, from the batch where the state stands."""
        settings, order_N = self.settings, self.draw_images()
        for network in self.networks:
            network.train()
        with self.timed("training"), self.reporter.track(f"epoch {self.epoch}", len(order_N)) as progress:
            batches = even_batches(len(order_N), settings.batch_size)
            progress(batches[self.batch].start if self.batch < len(batches) else len(order_N))
            for number, (batch, positions) in self.learned_batches(order_N, batches):
                total = self._pause(len(batch.indices_B))
                # BatchNorm needs two images.
                if total >= 2:
                    share = (self.epoch - 1 + number / len(batches)) / settings.epochs
                    seed = seed_of_rank(settings.seed, self.epoch, number)
                    batch = batch if len(batch.indices_B) else self.blank_batch()
                    loss = self.step(batch, positions, learning_factor(settings, share), seed, total)
                    self.losses.add(loss, total, self.where)
                self.batch = number + 1
                progress(positions.stop - positions.start)
            self._pause()
            self.losses.settle(self.where)
        self.epoch_learned()

    def learned_batches(
        self, order_N: Tensor, batches: Sequence[slice], view: View | None = None, *, epoch: int | None = None
    ) -> Iterator[tuple[int, tuple[Batch, slice]]]:
        """Number, this rank's part and the positions of each batch of the epoch, from the one where the state stands."""
        parts = [part_of_slice(positions) for positions in batches]
        views = self.loader.training_views(
            view or self.view,
            order_N,
            parts,
            seed=self.settings.seed,
            epoch=self.epoch if epoch is None else epoch,
            first_batch=self.batch,
        )
        yield from zip(range(self.batch, len(batches)), zip(views, batches[self.batch :], strict=True), strict=True)

    @property
    @abstractmethod
    def view(self) -> View:
        """What is learned of an image."""

    @abstractmethod
    def draw_images(self) -> Tensor:
        """Indices of the images of the epoch, in its order, the same on every rank."""

    @abstractmethod
    def step(self, batch: Batch, positions: slice, factor: float, seed: int, total: int) -> Tensor:
        """One step of learning; returns this rank's part of the mean loss, a scalar on the device.

        Args:
            batch: this rank's part, colours still to be changed; an image without a label has the index -1.
            positions: of the whole batch in the epoch's order.
            factor: of the learning rate.
            seed: of what is random in the network.
            total: images of all ranks.
        """

    @property
    @abstractmethod
    def crops(self) -> Crops:
        """How many crops of an image are learned, and of which side."""

    def blank_batch(self) -> Batch:
        """What a rank learns that could read none of its images, while others wait for it: nothing, of a black one."""
        crops = tuple(
            torch.zeros(count, 3, size, size, dtype=torch.uint8, device=self.machine.device) for count, size in self.crops
        )
        views = sum(count for count, _ in self.crops)
        draws_BR = np.full((1, DRAWS_ALIGNED) if views == 1 else (1, views, DRAWS_ALIGNED), 0.5)
        return Batch(crops, torch.tensor([-1]), draws_BR)

    def epoch_learned(self) -> None:
        """Called after the last step of an epoch."""

    def on_device(self, network: Any) -> Any:
        """The network where it is trained, with BatchNorm over all ranks."""
        network = network.to(device=self.machine.device, dtype=self.machine.dtype, memory_format=torch.channels_last)
        return synchronise_batch_norms(network, all_reduce) if world_size() > 1 else network

    def seen(self, images_BCHW: Tensor, draws_BR: NDArray[np.float64] | None) -> Tensor:
        """Crops as the network sees them: on the device, their colours changed (None: as they are), normalised."""
        images_BCHW = self.machine.put(images_BCHW)
        return normalise(images_BCHW if draws_BR is None else self.colours(images_BCHW, draws_BR)).to(self.machine.dtype)

    @property
    @abstractmethod
    def networks(self) -> Sequence[nn.Module]:
        """What is trained, as far as it is there."""

    @property
    def current(self) -> Assignment:
        """The assignment that is being learned."""
        if self.assignment is None:
            raise RuntimeError("there is no assignment before the first clustering")
        return self.assignment

    def take_assignment(self, assignment: Assignment) -> Assignment:
        """The groups that people see, numbered as they were before where they overlap."""
        if self.assignment is not None:
            self.nmi_previous = assignment.nmi(self.assignment.labels_N)
            assignment = assignment.matched_to(self.assignment)
        self.assignment = assignment
        return assignment

    def cluster_finished_trunk(self) -> tuple[Assignment, Space]:
        """Steps 1 to 3 with the trunk as it stands, for the groups that people use; the state does not change."""
        assignment, space = self.finished_groups()
        if self.assignment is not None:
            assignment = assignment.matched_to(self.assignment)
        self.clock = Clock()
        return assignment, space

    @abstractmethod
    def finished_groups(self) -> tuple[Assignment, Space]:
        """The groups of all images by the trunk as it stands, and the space in which they were made."""

    def _pause(self, count: int = 0) -> int:
        """A moment at which all ranks are at the same place: save if it is time, stop if it was asked for.

        Args:
            count: images of this rank's next step.

        Returns:
            those of all ranks.
        """
        due = on_main() and time.monotonic() - self.saved_at > 60 * self.settings.checkpoint_minutes
        wanted = torch.tensor([count, int(due), int(self.interruption.requested is not None)])
        total, is_due, is_stopped = all_reduce(wanted).tolist()
        if is_due or is_stopped:
            self.save_now()
        if is_stopped:
            self.interruption.requested = self.interruption.requested or "a signal to another process"
            self.interruption.check()
        return int(total)

    def save_now(self) -> None:
        """Save the state as it stands, which must be between two batches; on all ranks."""
        self.losses.settle(self.where)
        self.check_finite()
        self.save()
        self.saved_at = time.monotonic()

    def check_finite(self) -> None:
        """Raise `TrainingError` unless every weight is a finite number: only such a state is saved."""
        for network in self.networks:
            for name, value in network.state_dict().items():
                if not torch.isfinite(value).all():
                    raise not_finite(f"{name} is not finite", self.where())

    @abstractmethod
    def where(self) -> str:
        """Epoch, batch and learning rate, for messages."""

    def timed(self, step: str) -> AbstractContextManager[None]:
        """Count the time inside to a step."""
        return self.clock.timed(step)

    @property
    def seconds(self) -> dict[str, float]:
        """What each step of the epoch has taken."""
        return self.clock.seconds

    def state_dict(self) -> dict[str, Any]:
        """The whole state as tensors and plain values; `rows` are those of this rank, by name, the rest of all."""
        total, count = self.losses.over_ranks()
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "batch": self.batch,
            "labelled": self.labelled,
            "trunk": self.trunk.state_dict(),
            "nmi_previous": self.nmi_previous,
            "loss": {"total": total, "count": count},
            "seconds": self.seconds,
            "wait_seconds": self.loader.wait_seconds,
            "rows": {},
        }
        if self.assignment is not None:
            state["assignment"] = self.assignment.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; of its `rows` those that this rank is to have."""
        self.epoch, self.batch, self.labelled = state["epoch"], state["batch"], state["labelled"]
        self.trunk.load_state_dict(state["trunk"])
        self.nmi_previous = state["nmi_previous"]
        self.losses = LossMeter(**state["loss"]) if on_main() else LossMeter(0.0, state["loss"]["count"])
        self.clock, self.loader.wait_seconds = Clock(state["seconds"]), state["wait_seconds"]
        if "assignment" in state:
            self.assignment = Assignment.from_state_dict(state["assignment"])
