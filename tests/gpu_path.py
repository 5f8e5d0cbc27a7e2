"""The way that clustering goes on a GPU, on a machine without one."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepcluster.clustering import nearest_triton, parallel

# Operations without a kernel, and those whose result the CPU waits for.
FREE = {
    *("alias", "as_strided", "detach", "empty", "empty_like", "expand", "lift_fresh", "new_empty", "permute", "reshape"),
    *("select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "_unsafe_view"),
}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "bincount", "masked_select"}


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
    """Let every search take the fused path in large blocks, with plain torch in place of the Triton kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "BLOCK_ROWS", 1 << 20)
        patch.setattr(nearest_triton, "available", lambda device, n_components: True)
        patch.setattr(nearest_triton, "best_two", plain_best_two)
        yield


class Operations(TorchDispatchMode):
    """Counts operations, each of which a GPU's driver would have to start."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(one is not None and one.dtype == torch.bool for one in args[1])
        self.counts["launches"] += name not in FREE
        self.counts["waits"] += name in WAITS or by_mask
        return func(*args, **(kwargs or {}))
