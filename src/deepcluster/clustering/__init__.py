"""Points to labels: a library of its own. Tensors in, tensors out; it knows no files, no models and no settings of a run.

To add a clusterer, write one module with one class, as `Clusterer` describes it, and add one entry to `CLUSTERERS`.

Shapes in this package: N points on this rank of T on all ranks, M other points, P components, K clusters. Further letters
are explained in each module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, cast

from deepcluster.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from deepcluster.clustering.assignment import Assignment
    from deepcluster.core.distributed import Ranks
    from deepcluster.core.work import Advance

CLUSTERERS = {
    "kmeans": "deepcluster.clustering.kmeans:KMeans",
    "balanced": "deepcluster.clustering.balanced:BalancedKMeans",
    "pic": "deepcluster.clustering.pic:PowerIterationClustering",
    "hierarchical": "deepcluster.clustering.hierarchical:HierarchicalKMeans",
}


class Clusterer(Protocol):
    """What a clusterer offers. Its constructor only stores options.

    Attributes:
        explanation: how it works, in one or two plain sentences.
    """

    explanation: ClassVar[str]

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """Build it from a run's settings: `n_clusters`, `kmeans_iterations`, `super_clusters`."""

    @classmethod
    def describe(cls, settings: Any) -> str:
        """Return the clusters that these settings ask for in a few words: "10,000 clusters"."""

    @property
    def most_steps(self) -> int:
        """Largest number of units that `fit` passes to `advance`."""

    def fit(self, points_NP: "Tensor", *, seed: int, ranks: "Ranks", advance: "Advance") -> "Assignment":
        """Cluster the points of all ranks; return the assignment of the points of this rank.

        Args:
            points_NP: of any floating type. Rows that are not finite stay unassigned: label -1, distance NaN.
            seed: fixes the result.
            ranks: the processes over which the rows are split, in the order of the ranks.
            advance: called equally often on all ranks; may raise to stop.
        """


def clusterer(name: str) -> type[Clusterer]:
    """Import and return the class of a clusterer.

    Raises:
        InputError: no clusterer has this name.
    """
    if name not in CLUSTERERS:
        raise InputError(f"unknown clustering {name!r}{did_you_mean(name, CLUSTERERS)}: use one of {', '.join(CLUSTERERS)}")
    module, _, class_name = CLUSTERERS[name].partition(":")
    return cast(type[Clusterer], getattr(import_module(module), class_name))
