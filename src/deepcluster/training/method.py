"""What DeepCluster and DeepCluster-v2 share: the trunk on its device, images as the network sees them, the assignment.

N images, B batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.device import Machine
from deepcluster.core.work import Work
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.views import DRAWS_ALIGNED, Colours, View
from deepcluster.models.synchronised import synchronise_batch_norms
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.run.crops import Crops
from deepcluster.run.settings import Settings
from deepcluster.run.space import Space


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        epoch: number of the epoch, from 1.
        positions: positions of the whole batch, over all ranks, in the order of the epoch.
        factor: factor of the learning rate.
        seed: seed of what is random in the network.
        n_images: images of all ranks.
    """

    epoch: int
    positions: slice
    factor: float
    seed: int
    n_images: int


class Method:
    """A trunk that is clustered and trained: what DeepCluster and DeepCluster-v2 share. They add the five steps.

    Args:
        trunk: random weights, or those to start from.
        loader: gives the views of the images. Images in its `unreadable` are neither clustered nor sampled.
        settings, machine: settings of the run, and where it runs.
        work: shows progress, answers requests to stop, and knows the processes of the run.

    Attributes:
        assignment: the pseudo-labels of all images, on every rank; None before the first clustering.
        nmi_previous: agreement of the assignment with the one before.
        crops: number and side in pixels of the crops that are trained on, per size.
        view: what the network sees of an image in training, before colours change.
    """

    crops: Crops
    view: View
    # Steps 1 to 4, of an epoch: what one returns is what the next one takes.
    extract_features: Callable[[int], Any]
    whiten: Callable[[Any], Any]
    cluster: Callable[[Any, int], Any]
    make_labels: Callable[[Any, int], None]
    # Indices of the images of an epoch in its order, the same on every rank.
    draw_images: Callable[[int], Tensor]
    # Step 5, on this rank's part of a batch (index -1: a blank image): returns its part of the mean loss.
    train_step: Callable[[Batch, Step], Tensor]
    # Clusters of all images by the trunk as it stands, and their space. Training state does not change.
    final_clusters: Callable[[int], tuple[Assignment, Space]]
    describe_memory: Callable[[], str]

    def __init__(
        self,
        trunk: Trunk,
        loader: Loader,
        settings: Settings,
        machine: Machine,
        work: Work | None = None,
    ) -> None:
        self.loader, self.settings, self.machine = loader, settings, machine
        self.work = work or Work()
        self.ranks = self.work.ranks
        self.trunk: Trunk = self.on_device(trunk)
        self.mine = self.ranks.part(len(loader.images))
        self.colours = Colours(settings.jitter, settings.grey, share=settings.jitter_share, blur=settings.blur)
        self.assignment: Assignment | None = None
        self.nmi_previous: float | None = None

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The trained networks that exist so far."""
        raise NotImplementedError

    @property
    def rate(self) -> float:
        """Learning rate of the trunk at the last step."""
        raise NotImplementedError

    def begin_epoch(self, epoch: int) -> None:
        """Prepare for the first training step of an epoch."""

    def on_device(self, network: Any) -> Any:
        """Return the network where it is trained, with BatchNorm over all ranks."""
        network = network.to(device=self.machine.device, dtype=self.machine.dtype, memory_format=torch.channels_last)
        return synchronise_batch_norms(network, self.ranks) if self.ranks.size > 1 else network

    def prepare(self, network: nn.Module) -> nn.Module:
        """Return the network as it is trained: compiled if requested, its gradients averaged over the ranks."""
        compiled = torch.compile(network) if self.settings.compile else network
        return self.ranks.data_parallel(compiled)  # type: ignore[arg-type]

    def preprocess(self, images_BCHW: Tensor, draws_BR: NDArray[np.float64] | None) -> Tensor:
        """Return crops as the network sees them: on the device, with colours changed (None: unchanged), normalised."""
        images_BCHW = self.machine.put(images_BCHW)
        return normalise(images_BCHW if draws_BR is None else self.colours(images_BCHW, draws_BR)).to(self.machine.dtype)

    def blank_batch(self) -> Batch:
        """Return a dummy batch for a rank with no readable image, so that collectives still match."""
        crops = tuple(
            torch.zeros(count, 3, size, size, dtype=torch.uint8, device=self.machine.device) for count, size in self.crops
        )
        views = sum(count for count, _ in self.crops)
        draws_BR = np.full((1, DRAWS_ALIGNED) if views == 1 else (1, views, DRAWS_ALIGNED), 0.5)
        return Batch(crops, torch.tensor([-1]), draws_BR)

    @property
    def current(self) -> Assignment:
        """The pseudo-labels that are trained on."""
        if self.assignment is None:
            raise RuntimeError("there is no assignment before the first clustering")
        return self.assignment

    def take_assignment(self, assignment: Assignment) -> Assignment:
        """Replace the assignment. Clusters keep the numbers of the earlier clusters that they overlap with."""
        if self.assignment is not None:
            self.nmi_previous = assignment.nmi(self.assignment.labels_N)
        self.assignment = self.numbered_as_before(assignment)
        return self.assignment

    def numbered_as_before(self, assignment: Assignment) -> Assignment:
        """Return an assignment whose clusters have the numbers of the current clusters that they overlap with."""
        return assignment if self.assignment is None else assignment.matched_to(self.assignment)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values. `rows` are those of this rank, by name; the rest is of all ranks."""
        state: dict[str, Any] = {"trunk": self.trunk.state_dict(), "nmi_previous": self.nmi_previous, "rows": {}}
        if self.assignment is not None:
            state["assignment"] = self.assignment.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, whose `rows` are those of this rank."""
        self.trunk.load_state_dict(state["trunk"])
        self.nmi_previous = state["nmi_previous"]
        if "assignment" in state:
            self.assignment = Assignment.from_state_dict(state["assignment"])


def labels_of(assignment: Assignment, indices_B: Tensor) -> Tensor:
    """Return the pseudo-labels (B,) of images; -1 where the index is -1."""
    return torch.where(indices_B < 0, -1, assignment.labels_N[indices_B])
