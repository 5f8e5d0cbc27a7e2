"""Ranks and sums over them; the identity on one process. The only place that knows torch.distributed."""

import torch
from torch import Tensor


def _many() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Number of this process among all, from 0."""
    return torch.distributed.get_rank() if _many() else 0


def on_main() -> bool:
    """Whether this process prints and writes the shared files."""
    return rank() == 0


def all_reduce(value: Tensor) -> Tensor:
    """The sum of `value` over the ranks."""
    if _many():
        torch.distributed.all_reduce(value)
    return value
