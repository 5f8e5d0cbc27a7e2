"""Features to labels, a library of its own: tensors in, tensors out; no path, no model, no configuration."""

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.balance import BalancedKMeans
from deepcluster.clustering.groups import Ranks
from deepcluster.clustering.hierarchical import HierarchicalKMeans, Hierarchy
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.pic import PowerIterationClustering
from deepcluster.clustering.whitening import Whitening

__all__ = [
    "Assignment",
    "BalancedKMeans",
    "HierarchicalKMeans",
    "Hierarchy",
    "KMeans",
    "PowerIterationClustering",
    "Ranks",
    "Whitening",
]
