"""Seeds: every draw is a function of the run's seed and of what the draw is for."""

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.distributed import Ranks

# The part of a seed, after (run seed, epoch), that stands for the order of the images.
ORDER = 3


def seed_of(*parts: int) -> int:
    """Return one 63-bit seed made of several numbers, the same on every rank. Trailing zeros have no effect."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_of_rank(ranks: Ranks, *parts: int) -> int:
    """Return one 63-bit seed made of several numbers, different on each rank; rank 0 has the seed of a single process."""
    return seed_of(*parts, *([ranks.rank] if ranks.size > 1 else []))


def image_order(seed: int, epoch: int, n_images: int) -> Tensor:
    """Return the indices of all images in the order in which DeepCluster-v2 trains on them in an epoch."""
    return torch.randperm(n_images, generator=torch.Generator().manual_seed(seed_of(seed, epoch, ORDER)))
