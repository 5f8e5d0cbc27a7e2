"""Ranks that share out work: groups of them, super-classes for each, points that travel there and labels that travel back.

N points of P components, M of them on this rank, V of these to be sent, R worked on here; S super-classes, K clusters.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepcluster.clustering.reduction import AllReduce, alone
from deepcluster.core.errors import InputError

# The busiest rank may hold so many times the points that ranks hold on average.
MOST_OVER_MEAN = 1.25


def _stay(rows_MP: Tensor, to_M: Tensor) -> Tensor:
    """The exchange of one process."""
    return rows_MP


def _no_groups(groups: Sequence[Sequence[int]]) -> list[Any]:
    """The groups of one process."""
    return [None for _ in groups]


def _alone_in(group: Any, value: Tensor) -> Tensor:
    """The sum over the group of one process."""
    return value


@dataclass(frozen=True)
class Ranks:
    """What a clusterer needs of the other ranks; by default there are none. As in `deepcluster.core.distributed`.

    Attributes:
        rank: number of this one.
        world_size: how many there are.
        all_reduce: sums a tensor over all ranks.
        exchange_rows: sends each row to the rank of a number; gives those sent here, by rank and then in their order.
        new_groups: a group for each list of ranks; called on all ranks with the same lists.
        all_reduce_in: sums a tensor over the ranks of a group.
    """

    rank: int = 0
    world_size: int = 1
    all_reduce: AllReduce = alone
    exchange_rows: Callable[[Tensor, Tensor], Tensor] = _stay
    new_groups: Callable[[Sequence[Sequence[int]]], Sequence[Any]] = _no_groups
    all_reduce_in: Callable[[Any, Tensor], Tensor] = _alone_in


def shares_of(n_clusters: int, sizes_S: Tensor) -> Tensor:
    """Clusters of each super-class, int64 and K in all: one each, the rest in proportion to its points but one.

    None where there are no points, and never more than points. Largest remainders are rounded up; of equal ones the first.

    Raises:
        InputError: fewer clusters than super-classes with points, or more than points.
    """
    shares_S = (sizes_S > 0).long()
    rest, weights_S = n_clusters - int(shares_S.sum()), (sizes_S - shares_S).long()
    total = int(weights_S.sum())
    if rest < 0 or rest > total:
        raise InputError(
            f"clusters={n_clusters} must be between {int(shares_S.sum())} (a super-class with points each has one) and the "
            f"{int(sizes_S.sum())} points"
        )
    shares_S += rest * weights_S // max(1, total)
    remainders_S = rest * weights_S % max(1, total)
    left = n_clusters - int(shares_S.sum())
    shares_S[remainders_S.argsort(descending=True, stable=True)[:left]] += 1
    return shares_S


def plan_groups(sizes_S: Tensor, world_size: int) -> list[tuple[range, list[int]]]:
    """Groups of ranks, and the super-classes of each, largest first, so that ranks hold nearly as many points each.

    For each number of groups, super-classes are dealt to them, the largest first and each to the group with least, and ranks
    are given in proportion. The most groups are taken with which the busiest rank has little more than the mean: the fewer
    ranks a group has, the less travels in each iteration. All ranks in one group, the last resort, hold the mean.

    Args:
        sizes_S: points of each super-class over all ranks; those without points are in no group.
        world_size: W.
    """
    order = [number for number in sizes_S.argsort(descending=True, stable=True).tolist() if sizes_S[number]]
    most = MOST_OVER_MEAN * int(sizes_S.sum()) / world_size
    for n_groups in range(min(world_size, len(order)), 0, -1):
        members: list[list[int]] = [[] for _ in range(n_groups)]
        queue = [(0, group) for group in range(n_groups)]
        for number in order:
            load, group = heapq.heappop(queue)
            members[group].append(number)
            heapq.heappush(queue, (load + int(sizes_S[number]), group))
        loads = [load for load, _ in sorted(queue, key=lambda pair: pair[1])]
        # Shares are of points, and there may be more ranks than points.
        ranks = shares_of(world_size, torch.tensor(loads) * world_size).tolist()
        if n_groups == 1 or max(load / count for load, count in zip(loads, ranks, strict=True)) <= most:
            break
    ends = torch.tensor(ranks).cumsum(0).tolist()
    return [(range(end - count, end), some) for end, count, some in zip(ends, ranks, members, strict=True)]


class GroupWork:
    """The points that this rank works on, by super-class and then by number; and the way of their labels back.

    Attributes:
        supers: super-classes of this rank's group.
        n_rounds: most super-classes of any group.
        all_reduce: sums over the group.
        points_RP, numbers_R: sorted by super-class, in the order of `supers`, and by number.
    """

    def __init__(
        self,
        points_MP: Tensor,
        seen: Tensor,
        supers_V: Tensor,
        numbers_M: Tensor | None,
        ranks: Ranks,
        groups: list[tuple[range, list[int]]],
    ) -> None:
        self.ranks = ranks
        mine = next(number for number, (members, _) in enumerate(groups) if ranks.rank in members)
        self.members, self.supers = groups[mine]
        self.n_rounds = max(len(supers) for _, supers in groups)
        self.all_reduce = self._sum_over_group(groups, mine)
        device = points_MP.device
        numbers_V = seen if numbers_M is None else numbers_M.to(device, torch.int64)[seen]
        self.sent_V = numbers_V
        # One process keeps its points where they are: no copy but the sorted one.
        points_VP = points_MP if len(seen) == len(points_MP) else points_MP[seen]
        facts_V3 = torch.stack([supers_V, numbers_V, torch.full_like(seen, ranks.rank)], dim=1)
        if ranks.world_size > 1:
            to_V = _destinations(supers_V, groups, ranks.rank)
            points_VP, facts_V3 = ranks.exchange_rows(points_VP, to_V), ranks.exchange_rows(facts_V3, to_V)
        turn_S = torch.zeros(1 + max(number for _, supers in groups for number in supers), dtype=torch.int64)
        turn_S[self.supers] = torch.arange(len(self.supers))
        order_R = facts_V3[:, 1].argsort()
        order_R = order_R[turn_S.to(device)[facts_V3[order_R, 0]].argsort(stable=True)]
        facts_R3 = facts_V3[order_R]
        self.points_RP, self.numbers_R, self.from_R = points_VP[order_R], facts_R3[:, 1].contiguous(), facts_R3[:, 2]
        counts = torch.bincount(turn_S.to(device)[facts_R3[:, 0]], minlength=len(self.supers))
        self.ends = counts.cumsum(0).tolist()

    def _sum_over_group(self, groups: list[tuple[range, list[int]]], mine: int) -> AllReduce:
        """Only groups of several ranks, but not of all, are made."""
        shared = [number for number, (members, _) in enumerate(groups) if 1 < len(members) < self.ranks.world_size]
        made = dict(zip(shared, self.ranks.new_groups([tuple(groups[number][0]) for number in shared]), strict=True))
        if mine in made:
            return partial(self.ranks.all_reduce_in, made[mine])
        return self.ranks.all_reduce if len(groups) == 1 else alone

    @property
    def is_first(self) -> bool:
        """Whether this rank tells what its group found."""
        return self.ranks.rank == self.members[0]

    def rows_of(self, turn: int) -> slice:
        """Rows of the super-class that is worked on in this turn."""
        return slice(self.ends[turn - 1] if turn else 0, self.ends[turn])

    def back(self, labels_R: Tensor, distances_R: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and distances of the points that this rank has sent, in their order."""
        exchange = self.ranks.exchange_rows
        pairs_V2 = exchange(torch.stack([self.numbers_R, labels_R], dim=1), self.from_R)
        distances_V = exchange(distances_R, self.from_R)
        place_V = torch.searchsorted(self.sent_V, pairs_V2[:, 0].contiguous())
        labels_V, ordered_V = torch.empty_like(pairs_V2[:, 1]), torch.empty_like(distances_V)
        labels_V[place_V], ordered_V[place_V] = pairs_V2[:, 1], distances_V
        return labels_V, ordered_V


def _destinations(supers_V: Tensor, groups: list[tuple[range, list[int]]], rank: int) -> Tensor:
    """The rank that works on each point: those of a group take turns, and each sender begins with another one."""
    to_V = torch.empty_like(supers_V)
    for members, supers in groups:
        rows = torch.isin(supers_V, torch.tensor(supers, device=supers_V.device)).nonzero().flatten()
        to_V[rows] = members.start + (torch.arange(len(rows), device=rows.device) + rank) % len(members)
    return to_V
