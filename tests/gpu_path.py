"""The way that clustering goes on a GPU, on a machine without one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from deepcluster.clustering import nearest_triton


def plain_best_two(
    points_NP: Tensor, centroids_KP: Tensor, offsets_K: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`nearest_triton.best_two` in plain torch."""
    scores_NK = scale * (points_NP.float() @ centroids_KP.float().T) - offsets_K
    best_N, index_N = scores_NK.max(dim=1)
    second_N = scores_NK.scatter(1, index_N[:, None], -torch.inf).amax(dim=1)
    return torch.where(best_N > -torch.inf, index_N, -1), second_N


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let every search take the fused path, with plain torch in place of the Triton kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest_triton, "available", lambda device, n_components: True)
        patch.setattr(nearest_triton, "best_two", plain_best_two)
        yield
