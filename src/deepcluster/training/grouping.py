"""Step 3 as a run asks for it: which clusterer, and from where a clustering that was stopped goes on.

N images, M of this rank, P components.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepcluster.clustering.assignment import UNASSIGNED, Assignment
from deepcluster.clustering.balance import BalancedKMeans
from deepcluster.clustering.groups import Ranks
from deepcluster.clustering.hierarchical import ROTATIONS, HierarchicalKMeans
from deepcluster.clustering.kmeans import KMeans, LloydState
from deepcluster.clustering.pic import ITERATIONS, PowerIterationClustering
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.distributed import all_reduce, all_reduce_in, exchange_rows, gather_at, new_groups, rank, world_size
from deepcluster.run.settings import Settings


@dataclass
class Grouping:
    """A clustering under way: with it saved, a stop costs neither the look at the images nor the iterations made.

    Attributes:
        points_MP: what is grouped, of this rank's images.
        indices_M: which images these are, ascending.
        whitening: how the points were made of features.
        lloyd: where k-means stands; None before its first iteration, and with other clusterers, which start again.
        quarters_M: by how many quarters each image was turned; None: none was.
    """

    points_MP: Tensor
    indices_M: Tensor
    whitening: Whitening
    lloyd: LloydState | None = None
    quarters_M: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that `from_state_dict` takes, but for what is of this rank alone."""
        state: dict[str, Any] = {"whitening": self.whitening.state_dict(), "lloyd": None}
        if self.lloyd is not None:
            state["lloyd"] = {**vars(self.lloyd), "centroids_KP": self.lloyd.centroids_KP.cpu()}
        return state

    def rows(self) -> dict[str, Tensor]:
        """What is of this rank alone, as a checkpoint keeps it."""
        turned = {} if self.quarters_M is None else {"quarters": self.quarters_M}
        return {"indices": self.indices_M, "rows": self.points_MP.cpu(), **turned}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], rows: dict[str, Tensor], device: torch.device) -> "Grouping":
        """The clustering that `state_dict` was taken of, with the rows that are to be of this rank."""
        lloyd = state["lloyd"]
        if lloyd is not None:
            lloyd = LloydState(**{**lloyd, "history": tuple(lloyd["history"])})
        whitening = Whitening.from_state_dict(state["whitening"])
        return cls(rows["rows"].to(device), rows["indices"], whitening, lloyd, quarters_M=rows.get("quarters"))


def super_classes(settings: Settings) -> int:
    """How many there are: super-clusters, or pairs of a super-cluster and a turn; 0: the clusters are not in any."""
    return settings.super_clusters * (ROTATIONS if settings.rotations else 1)


def most_iterations(settings: Settings) -> int:
    """How many iterations `group_points` tells of, at most."""
    if settings.clustering == "pic":
        return ITERATIONS
    if settings.super_clusters:
        return (settings.kmeans_iterations + 1) * (1 + super_classes(settings))
    return _balanced(settings, 0).most_steps if settings.balance else settings.kmeans_iterations + 1


def group_points(
    grouping: Grouping, settings: Settings, *, n_images: int, seed: int, on_step: Callable[[int], None]
) -> Assignment:
    """The groups of all images on every rank, by the clusterer of the settings.

    Args:
        grouping: the points; follows the iterations of k-means, and is where they go on.
        n_images: N.
        seed: of the start.
        on_step: called often, with the number of iterations made since the last call; may raise to stop.
    """
    points_MP, indices_M = grouping.points_MP, grouping.indices_M
    if settings.clustering == "pic":
        # A graph of neighbours is made of all points at once: each rank makes the same.
        points_NP = gather_at(points_MP, indices_M, n_images, torch.nan)
        return PowerIterationClustering().fit(points_NP, on_iteration=lambda *_: on_step(1), on_rows=lambda rows: on_step(0))

    def follow(state: LloydState) -> None:
        grouping.lloyd = state
        on_step(1)

    if settings.super_clusters:
        assignment = _in_two_steps(grouping, settings, seed=seed, on_step=on_step)
    elif settings.balance:
        assignment = _balanced(settings, seed).fit(points_MP, numbers_N=indices_M, on_iteration=lambda *_: on_step(1))
    else:
        kmeans = KMeans(settings.n_clusters, iterations=settings.kmeans_iterations, seed=seed, all_reduce=all_reduce)
        assignment = kmeans.fit(points_MP, numbers_N=indices_M, resume=grouping.lloyd, on_iteration=follow)
    return over_all_images(assignment, indices_M, n_images)


def over_all_images(assignment: Assignment, indices_M: Tensor, n_images: int) -> Assignment:
    """The assignment of all images, on every rank, of those of this rank's rows."""
    return replace(
        assignment,
        labels_N=gather_at(assignment.labels_N, indices_M, n_images, UNASSIGNED),
        distances_N=gather_at(assignment.distances_N, indices_M, n_images, torch.nan),
    )


def _in_two_steps(grouping: Grouping, settings: Settings, *, seed: int, on_step: Callable[[int], None]) -> Assignment:
    """Clusters within super-clusters; of turned images, within super-clusters of each turn."""
    ranks = Ranks(rank(), world_size(), all_reduce, exchange_rows, new_groups, all_reduce_in)
    kmeans = HierarchicalKMeans(
        settings.n_clusters,
        super_clusters=settings.super_clusters,
        iterations=settings.kmeans_iterations,
        seed=seed,
        ranks=ranks,
    )
    assignment, _ = kmeans.fit(
        grouping.points_MP,
        numbers_M=grouping.indices_M,
        rotations_M=grouping.quarters_M,
        on_iteration=lambda done, total: on_step(1),
    )
    return assignment


def _balanced(settings: Settings, seed: int) -> BalancedKMeans:
    return BalancedKMeans(settings.n_clusters, iterations=settings.kmeans_iterations, seed=seed, all_reduce=all_reduce)
