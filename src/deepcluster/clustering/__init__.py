"""Points to labels: a library of its own, with the estimators below. It knows no files, no models and no settings of a run.

To add a clusterer, write one module with a subclass of `Clusterer` (estimator.py), and add one entry to `CLUSTERERS`.

Shapes in this package: N points on this rank of T on all ranks, M other points, P components, K clusters. Further letters
are explained in each module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deepcluster.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from deepcluster.clustering.assignment import Assignment as Assignment
    from deepcluster.clustering.balanced import BalancedKMeans as BalancedKMeans
    from deepcluster.clustering.estimator import Clusterer as Clusterer
    from deepcluster.clustering.hierarchical import HierarchicalKMeans as HierarchicalKMeans
    from deepcluster.clustering.kmeans import KMeans as KMeans
    from deepcluster.clustering.pic import PowerIterationClustering as PowerIterationClustering
    from deepcluster.clustering.whitening import Whitening as Whitening

CLUSTERERS = {
    "kmeans": "deepcluster.clustering.kmeans:KMeans",
    "balanced": "deepcluster.clustering.balanced:BalancedKMeans",
    "pic": "deepcluster.clustering.pic:PowerIterationClustering",
    "hierarchical": "deepcluster.clustering.hierarchical:HierarchicalKMeans",
}


# Imported at their first use.
_HOMES = {
    "Assignment": "assignment",
    "BalancedKMeans": "balanced",
    "Clusterer": "estimator",
    "HierarchicalKMeans": "hierarchical",
    "KMeans": "kmeans",
    "PowerIterationClustering": "pic",
    "Whitening": "whitening",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"deepcluster.clustering.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'deepcluster.clustering' has no attribute {name!r}")


def clusterer(name: str) -> "type[Clusterer]":
    """Import and return the class of a clusterer.

    Raises:
        InputError: no clusterer has this name.
    """
    if name not in CLUSTERERS:
        raise InputError(f"unknown clustering {name!r}{did_you_mean(name, CLUSTERERS)}: use one of {', '.join(CLUSTERERS)}")
    module, _, class_name = CLUSTERERS[name].partition(":")
    found: type[Clusterer] = getattr(import_module(module), class_name)
    return found
