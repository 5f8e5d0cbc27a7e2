"""How long sums, gathers and exchanges take between ranks: formulas of ring and tree, and a ring message by message.

W ranks. Pure functions; what a link does comes in as `Link`.
"""

from dataclasses import dataclass
from math import ceil, log2

import numpy as np


@dataclass(frozen=True)
class Link:
    """A way from one rank to the next.

    Attributes:
        latency: seconds until the first byte arrives.
        bytes_per_second: in one direction.
    """

    latency: float
    bytes_per_second: float

    def seconds(self, n_bytes: float) -> float:
        """Of one message."""
        return self.latency + n_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Fabric:
    """How ranks are connected.

    Attributes:
        inside: between neighbours of a machine.
        between: from machine to machine: all that a machine can send, and its ranks share.
        ranks_per_machine: how many share it.
        tree: whether small sums go by a tree, as NCCL's do, and not by the ring alone, as gloo's.
        overlap: whether gradients travel while the backward pass goes on.
    """

    inside: Link
    between: Link
    ranks_per_machine: int = 8
    tree: bool = True
    overlap: bool = True

    def ring(self, ranks: int) -> list[Link]:
        """The link from each rank to the next, in the order of the ranks; the last one leads to the first."""
        if ranks <= self.ranks_per_machine:
            return [self.inside] * ranks
        # A ring crosses from machine to machine once, and back; all of its network is its own.
        return [self.between if (rank + 1) % self.ranks_per_machine == 0 else self.inside for rank in range(ranks)]

    def all_reduce_seconds(self, n_bytes: float, ranks: int) -> float:
        """Of a sum over all ranks, by the ring or, where it is quicker and there is one, the tree."""
        if ranks == 1 or not n_bytes:
            return 0.0
        links = self.ring(ranks)
        slow = min(link.bytes_per_second for link in links)
        ring = ring_seconds(n_bytes, ranks, Link(sum(link.latency for link in links) / ranks, slow))
        return min(ring, tree_seconds(n_bytes, ranks, self)) if self.tree else ring

    def gather_seconds(self, n_bytes: float, ranks: int) -> float:
        """Until every rank has all of `n_bytes`, of which each had a part: half of what a sum takes."""
        return self.all_reduce_seconds(n_bytes, ranks) / 2

    def exchange_seconds(self, n_bytes: float, ranks: int) -> float:
        """Until each rank has sent `n_bytes`, in equal parts to all ranks."""
        if ranks == 1:
            return 0.0
        near = min(ranks, self.ranks_per_machine)
        inside = n_bytes * (near - 1) / ranks / self.inside.bytes_per_second
        share = self.between.bytes_per_second / self.ranks_per_machine
        outside = n_bytes * (ranks - near) / ranks / share
        latency = (near - 1) * self.inside.latency + (ranks - near) * self.between.latency
        return latency + max(inside, outside)


def ring_seconds(n_bytes: float, ranks: int, link: Link) -> float:
    """Of a sum by a ring of equal links: 2 (W - 1) messages of a W-th of the bytes, one after the other."""
    return 2 * (ranks - 1) * link.seconds(n_bytes / ranks)


def tree_seconds(n_bytes: float, ranks: int, fabric: Fabric) -> float:
    """Of a sum up a binary tree and down again, all bytes at each level: quick for a few bytes."""
    near = min(ranks, fabric.ranks_per_machine)
    inside, between = ceil(log2(near)), ceil(log2(ceil(ranks / near)))
    return 2 * (inside * fabric.inside.seconds(n_bytes) + between * fabric.between.seconds(n_bytes))


def simulated_ring_seconds(n_bytes: float, links: list[Link]) -> float:
    """The same of any links, message by message.

    In each of 2 (W - 1) rounds every rank hands a W-th of the bytes on to the next, as soon as it has got the part of the
    round before and its link is free again.
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
