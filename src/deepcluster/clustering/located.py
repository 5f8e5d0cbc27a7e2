"""Where points lie among centroids: the nearest, the second nearest, and how clear the choice is.

M points, P components, K clusters.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepcluster.clustering.assignment import UNASSIGNED, Assignment
from deepcluster.clustering.parallel import row_blocks

# The columns of `located`, as they are for an unreadable image.
UNLOCATED: dict[str, Any] = {
    "cluster": np.array(UNASSIGNED, np.int64),
    "distance": np.array(np.nan, np.float32),
    "second": np.array(UNASSIGNED, np.int64),
    "second_distance": np.array(np.nan, np.float32),
    "confidence": np.array(np.nan, np.float32),
}


def located(assignment: Assignment, points_MP: Tensor) -> dict[str, Tensor]:
    """Return where finite points lie among the centroids, by column (M each).

    `cluster` and `distance` are those of `Assignment.nearest`; `second` and `second_distance` are of the nearest other
    centroid, -1 and NaN where there is none; `confidence` is 1 - distance / second_distance: 0 half-way between the two, 1
    at the centroid. With super-classes, both centroids are of one super-class.
    """
    labels_M, squared_M = assignment.nearest(points_MP)
    distances_M, points_MP = squared_M.double().sqrt(), points_MP.double()
    centroids_KP = assignment.centroids_KP.to(points_MP.device).double()
    lengths_K, supers_K = centroids_KP.square().sum(dim=1), assignment.super_of_cluster_K
    seconds_M, apart_M = torch.full_like(labels_M, UNASSIGNED), torch.full_like(distances_M, torch.nan)
    for rows in row_blocks(points_MP):
        points, labels = points_MP[rows], labels_M[rows, None]
        others = torch.addmm(lengths_K, points, centroids_KP.T, alpha=-2)  # Without the squared lengths of the points.
        others.scatter_(1, labels, torch.inf)
        if supers_K is not None:
            others[supers_K != supers_K[labels]] = torch.inf
        least, nearest = others.min(dim=1)
        found = least.isfinite()
        seconds_M[rows][found] = nearest[found]
        apart_M[rows][found] = (points[found] - centroids_KP[nearest[found]]).square().sum(dim=1).sqrt()
    apart_M = torch.maximum(apart_M, distances_M)  # `nearest` has rounded to float32.
    confidence_M = torch.where(apart_M == 0, 0, 1 - distances_M / apart_M)
    columns = {"distance": distances_M, "second_distance": apart_M, "confidence": confidence_M}
    return {"cluster": labels_M, "second": seconds_M, **{name: column.float() for name, column in columns.items()}}
