"""Step 3 as a run asks for it: which clusterer, and from where a clustering that was stopped goes on.

N points, P components.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.balance import BalancedKMeans
from deepcluster.clustering.kmeans import KMeans, LloydState
from deepcluster.clustering.pic import ITERATIONS, PowerIterationClustering
from deepcluster.clustering.whitening import Whitening
from deepcluster.config import Settings
from deepcluster.distributed import all_reduce


@dataclass
class Grouping:
    """A clustering under way: with it saved, a stop costs neither the look at the images nor the iterations made.

    Attributes:
        points_NP: what is grouped.
        whitening: how the points were made of features.
        lloyd: where k-means stands; None before its first iteration, and with other clusterers, which start again.
    """

    points_NP: Tensor
    whitening: Whitening
    lloyd: LloydState | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that `from_state_dict` takes."""
        state = {"points": self.points_NP.cpu(), "whitening": self.whitening.state_dict(), "lloyd": None}
        if self.lloyd is not None:
            state["lloyd"] = {**vars(self.lloyd), "centroids_KP": self.lloyd.centroids_KP.cpu()}
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Grouping":
        """The clustering that `state_dict` was taken of."""
        lloyd = state["lloyd"]
        if lloyd is not None:
            lloyd = LloydState(**{**lloyd, "history": tuple(lloyd["history"])})
        return cls(state["points"], Whitening.from_state_dict(state["whitening"]), lloyd)


def most_iterations(settings: Settings) -> int:
    """How many iterations `group_points` tells of, at most."""
    if settings.clustering == "pic":
        return ITERATIONS
    return _balanced(settings, 0).most_steps if settings.balance else settings.kmeans_iterations + 1


def group_points(grouping: Grouping, settings: Settings, *, seed: int, on_step: Callable[[int], None]) -> Assignment:
    """The groups of the points, by the clusterer of the settings.

    Args:
        grouping: the points; follows the iterations of k-means, and is where they go on.
        seed: of the start.
        on_step: called often, with the number of iterations made since the last call; may raise to stop.
    """
    points_NP = grouping.points_NP
    if settings.clustering == "pic":
        return PowerIterationClustering().fit(points_NP, on_iteration=lambda *_: on_step(1), on_rows=lambda rows: on_step(0))
    if settings.balance:
        return _balanced(settings, seed).fit(points_NP, on_iteration=lambda *_: on_step(1))

    def follow(state: LloydState) -> None:
        grouping.lloyd = state
        on_step(1)

    kmeans = KMeans(settings.clusters, iterations=settings.kmeans_iterations, seed=seed, all_reduce=all_reduce)
    return kmeans.fit(points_NP, resume=grouping.lloyd, on_iteration=follow)


def _balanced(settings: Settings, seed: int) -> BalancedKMeans:
    return BalancedKMeans(settings.clusters, iterations=settings.kmeans_iterations, seed=seed, all_reduce=all_reduce)
