"""Features to labels: a library of its own. Tensors go in, tensors come out; no path, no model, no configuration.

from deepcluster.clustering import KMeans, Whitening

points = Whitening(256).fit_transform(features)
assignment = KMeans(1000, seed=0).fit(points)
assignment.labels_N, assignment.inertia, assignment.predict(more_points)
"""

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.balance import BalancedKMeans
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.pic import PowerIterationClustering
from deepcluster.clustering.whitening import Whitening

__all__ = ["Assignment", "BalancedKMeans", "KMeans", "PowerIterationClustering", "Whitening"]
