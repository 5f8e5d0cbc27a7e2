"""Step 4 as a run asks for it: labels of images, and the head that predicts them.

N images, M of this rank, B batch, D features, K clusters.
"""

import torch
from torch import Tensor

from deepcluster.clustering.assignment import Assignment


def labels_of(assignment: Assignment, indices_B: Tensor) -> Tensor:
    """Labels (B,) of images; -1 where the index is."""
    return torch.where(indices_B < 0, -1, assignment.labels_N[indices_B])
