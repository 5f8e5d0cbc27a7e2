"""Time of sums, gathers and exchanges between ranks: formulas of ring and tree, and a simulated ring.

W ranks. Pure functions; the speed of a link is in `Link`.
"""

from dataclasses import dataclass
from math import ceil, log2

import numpy as np


@dataclass(frozen=True)
class Link:
    """A connection from one rank to the next.

    Attributes:
        latency: seconds until the first byte arrives.
        bytes_per_second: in one direction.
    """

    latency: float
    bytes_per_second: float

    def seconds(self, n_bytes: float) -> float:
        """Return the seconds of one message."""
        return self.latency + n_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Fabric:
    """Connections between ranks.

    Attributes:
        inside: between neighbours in a machine.
        between: between machines; the total bandwidth of a machine, shared by its ranks.
        ranks_per_machine: number of ranks that share it.
        tree: True if small sums use a tree, as in NCCL; False if they use only the ring, as in gloo.
        overlap: True if gradients travel during the backward pass.
    """

    inside: Link
    between: Link
    ranks_per_machine: int = 8
    tree: bool = True
    overlap: bool = True

    def ring(self, ranks: int) -> list[Link]:
        """Return the link from each rank to the next, in rank order; the last one leads to the first."""
        if ranks <= self.ranks_per_machine:
            return [self.inside] * ranks
        # A ring leaves each machine once, and has its whole bandwidth.
        return [self.between if (rank + 1) % self.ranks_per_machine == 0 else self.inside for rank in range(ranks)]

    def all_reduce_seconds(self, n_bytes: float, ranks: int) -> float:
        """Return the seconds of a sum over all ranks, by the ring or, if faster and available, the tree."""
        if ranks == 1 or not n_bytes:
            return 0.0
        links = self.ring(ranks)
        slow = min(link.bytes_per_second for link in links)
        ring = ring_seconds(n_bytes, ranks, Link(sum(link.latency for link in links) / ranks, slow))
        return min(ring, tree_seconds(n_bytes, ranks, self)) if self.tree else ring

    def gather_seconds(self, n_bytes: float, ranks: int) -> float:
        """Return the seconds until every rank has all `n_bytes`, of which each had a part: half of a sum's."""
        return self.all_reduce_seconds(n_bytes, ranks) / 2

    def exchange_seconds(self, n_bytes: float, ranks: int) -> float:
        """Return the seconds until each rank has sent `n_bytes`, in equal parts to all ranks."""
        if ranks == 1:
            return 0.0
        near = min(ranks, self.ranks_per_machine)
        inside = n_bytes * (near - 1) / ranks / self.inside.bytes_per_second
        share = self.between.bytes_per_second / self.ranks_per_machine
        outside = n_bytes * (ranks - near) / ranks / share
        latency = (near - 1) * self.inside.latency + (ranks - near) * self.between.latency
        return latency + max(inside, outside)


def ring_seconds(n_bytes: float, ranks: int, link: Link) -> float:
    """Return the seconds of a sum by a ring of equal links: 2 (W - 1) consecutive messages of a W-th of the bytes."""
    return 2 * (ranks - 1) * link.seconds(n_bytes / ranks)


def tree_seconds(n_bytes: float, ranks: int, fabric: Fabric) -> float:
    """Return the seconds of a sum up and down a binary tree, all bytes at each level: fast for few bytes."""
    near = min(ranks, fabric.ranks_per_machine)
    inside, between = ceil(log2(near)), ceil(log2(ceil(ranks / near)))
    return 2 * (inside * fabric.inside.seconds(n_bytes) + between * fabric.between.seconds(n_bytes))


def simulated_ring_seconds(n_bytes: float, links: list[Link]) -> float:
    """Return the seconds of a sum by a ring of any links, message by message.

    In each of 2 (W - 1) rounds every rank sends a W-th of the bytes to the next, as soon as it has received the part of the
    previous round and its link is free.
    """
    ranks = len(links)
    if ranks == 1:
        return 0.0
    sending = np.array([n_bytes / ranks / link.bytes_per_second for link in links])
    latency = np.array([link.latency for link in links])
    there, free = np.zeros(ranks), np.zeros(ranks)
    for _ in range(2 * (ranks - 1)):
        free = np.maximum(there, free) + sending
        there = np.roll(free + latency, 1)
    return float(there.max())
