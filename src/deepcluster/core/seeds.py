"""Seeds: every draw is a function of the run's seed and of what the draw is for."""

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.distributed import rank, world_size

# The part of a seed, after (run seed, epoch), that stands for the order of the images.
ORDER = 3


def seed_of(*parts: int) -> int:
    """One 63-bit seed of several numbers, the same on every rank; zeros at their end count for nothing."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_of_rank(*parts: int) -> int:
    """One 63-bit seed of several numbers, another one on each rank; that of the first is that of one process."""
    return seed_of(*parts, *([rank()] if world_size() > 1 else []))


def image_order(seed: int, epoch: int, n_images: int) -> Tensor:
    """Indices of all images in the order in which an epoch learns them."""
    return torch.randperm(n_images, generator=torch.Generator().manual_seed(seed_of(seed, epoch, ORDER)))
