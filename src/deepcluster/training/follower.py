"""Who is told how a run goes on: what the layer above may bring, such as a tracker.

M images of a sample, P components.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.progress import Reporter
from deepcluster.data.cache import DecodedImages

# A number of images → indices_M of no more than these, and their points_MP in the space that was clustered.
Points = Callable[[int], tuple[Tensor, Tensor]]


class Follower(Protocol):
    """Follows a run. It changes nothing of it, and a fault of its own does not end it."""

    def begin(self, folder: Path, epoch: int, history: Sequence[Mapping[str, Any]]) -> None:
        """The run in `folder` goes on with `epoch`; `history` holds the metrics of the epochs before."""

    def after_epoch(self, metrics: Mapping[str, Any], assignment: Assignment, images: DecodedImages) -> None:
        """An epoch has ended; it learned the labels of `assignment`."""

    def finish(self, epoch: int, assignment: Assignment, images: DecodedImages, points: Points) -> None:
        """The run has ended; `assignment` has the clusters of the finished trunk, which are those of the epoch after."""

    def close(self) -> None:
        """Nothing more comes, be it that the run was stopped."""


class Nobody:
    """Follows no run."""

    def begin(self, folder: Path, epoch: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def after_epoch(self, metrics: Mapping[str, Any], assignment: Assignment, images: DecodedImages) -> None:
        """Nothing."""

    def finish(self, epoch: int, assignment: Assignment, images: DecodedImages, points: Points) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


Follow = Callable[[Reporter], Follower]
