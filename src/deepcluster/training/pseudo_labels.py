"""Step 4 as a run asks for it: labels of images, and the head that predicts them.

N images, M of this rank, B batch, D features, K clusters.
"""

import torch
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.features import FeatureRows
from deepcluster.distributed import all_reduce
from deepcluster.models.heads import ClusterHead, Head, HierarchicalHead


def labels_of(assignment: Assignment, indices_B: Tensor) -> Tensor:
    """Labels (B,) of images; -1 where the index is."""
    return torch.where(indices_B < 0, -1, assignment.labels_N[indices_B])


def make_head(dim: int, assignment: Assignment, *, seed: int, means: tuple[Tensor, float] | None = None) -> Head:
    """A new head for the labels of an assignment: of random weights, or started from means of the clusters.

    Args:
        dim: D.
        means: what `means_of_clusters` gives.
    """
    if assignment.super_of_cluster_K is not None:
        return HierarchicalHead(dim, assignment.super_of_cluster_K, seed=seed)
    if means is not None:
        return ClusterHead.from_means(*means)
    return ClusterHead(dim, assignment.n_clusters, seed=seed)


def means_of_clusters(rows: FeatureRows, assignment: Assignment, *, mine: slice) -> tuple[Tensor, float]:
    """Mean (K, D) of what the head sees of each cluster's images, and their mean squared distance to it.

    Args:
        rows: features of this rank's images.
        mine: which of all images these are.
    """
    labels_M = assignment.labels_N[mine]
    sums_KD = torch.zeros(assignment.n_clusters, rows.plan.dim, dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for first, rows_BD in rows.batches():
        labels_B = labels_M[first : first + len(rows_BD)]
        there_B = (labels_B >= 0) & ~rows_BD[:, 0].cpu().isnan()
        seen_BD = rows_BD.cpu()[there_B].double().relu()
        sums_KD.index_add_(0, labels_B[there_B], seen_BD)
        squares += seen_BD.square().sum()
    sizes_K = assignment.sizes_K().double().clamp(min=1)
    means_KD = all_reduce(sums_KD) / sizes_K[:, None]
    # The mean of |x - c|² is that of |x|² less that of |c|².
    within = (all_reduce(squares) - (sizes_K * means_KD.square().sum(dim=1)).sum()) / sizes_K.sum()
    return means_KD.float(), float(within)
