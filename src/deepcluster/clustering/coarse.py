"""Vectors in fewer bits: products two to five times as fast as those of float32, with bounded error.

R rows, P components; B points of a block, Q of them; C centroids in G groups of H.
Scores are x·c - |c|²/2 with x and c relative to the mean of the points: the nearest centroid has the highest score.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

# 8-bit integers reach to four root mean squares: one normal number in 16,000 is clipped, which its row's residual includes.
INT8_REACH = 4.0
# Error of float32 arithmetic over a few hundred components, as a share of the squared lengths; generous.
FLOAT32_SLACK = 2.0**-18
# Largest relative error of one rounding.
FLOAT32_ROUNDING = 2.0**-24
BF16_ROUNDING = 2.0**-8
# 8-bit products: the largest sum (of at most MOST_INT8 components), the largest offset, an offset beyond all bounds.
INT_SUM, INT_OFFSET, INT_NOWHERE = 2**28, 2**29, 2**30 + 2**29
# Components of 8-bit rows. Fewer gain nothing; with one, products of torch 2.14 are wrong.
FEWEST_INT8, MOST_INT8 = 16, INT_SUM // 127**2
# The product of two steps is still a normal float32 number.
LEAST_STEP = 1e-15
# 16-bit floats: the longest row is scaled to between 2^14 and 2^15, so that 2^29 lies between the largest and the smallest
# number of full precision. The fused kernel reads whole groups of components.
HALF_REACH, HALF_GROUP = 15, 16
# Centroids in a group: bounds are first reduced to the largest of each group, 0.05 ns per score; its position takes 0.9.
GROUP = 64
# The next finer product.
FINER = {torch.int8: torch.bfloat16, torch.bfloat16: torch.float32}


@dataclass(frozen=True)
class Coarse:
    """Rows in fewer bits: `step · rounded` differs from the true rows by vectors of length `residual`."""

    rounded_RP: Tensor
    step: float
    residual_R: Tensor
    length_R: Tensor

    def take(self, rows: slice | Tensor) -> "Coarse":
        """Return some of the rows."""
        rounded_RP = self.rounded_RP[rows] if isinstance(rows, slice) else self.rounded_RP.index_select(0, rows)
        return Coarse(rounded_RP, self.step, self.residual_R[rows], self.length_R[rows])


def coarse_kind(device: torch.device, n_components: int, *, first: bool = False) -> torch.dtype:
    """Return the fastest product of this machine; not 8 bits for the `first` search, where too many candidates remain.

    On a GPU it serves only the points that the fused search has left open.
    """
    if device.type == "cuda":
        return torch.float32
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = has.get("avx512_vnni") or has.get("amx_int8")
    if fast and not first and FEWEST_INT8 <= n_components <= MOST_INT8 and _int8_is_right():
        return torch.int8
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


@cache
def _int8_is_right() -> bool:
    """Return whether torch multiplies 8-bit integers correctly here: the function is not public."""
    one = torch.arange(-127, 127, dtype=torch.int8).repeat(67)[: 3 * 5 * 77 * 14].view(-1, 77)
    other = one[:64].flip(0)
    try:
        product = torch._int_mm(one, other.T)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(product.long(), one.long() @ other.long().T)


def round_rows(rows_RP: Tensor, kind: torch.dtype, reach: float | None = None) -> Coarse:
    """Round rows to `kind`.

    Args:
        rows_RP: float32.
        reach: largest number that 8-bit integers cover, by default the largest of the rows; length that 16-bit floats cover,
            by default that of the longest row.
    """
    if kind == torch.float32:
        return Coarse(rows_RP, 1.0, rows_RP.new_zeros(len(rows_RP)), rows_RP.norm(dim=1))
    if kind == torch.int8:
        reach = (float(rows_RP.abs().amax()) if rows_RP.numel() else 0.0) if reach is None else reach
        step = max(reach / 127, LEAST_STEP)
        near_RP = (rows_RP / step).round_().clamp_(-127, 127)
        rounded_RP = near_RP.to(kind)
        near_RP.mul_(step)
    elif kind == torch.float16:
        reach = (float(rows_RP.norm(dim=1).amax()) if rows_RP.numel() else 0.0) if reach is None else reach
        step = 2.0 ** math.ceil(math.log2(max(reach, LEAST_STEP * 2**HALF_REACH)) - HALF_REACH)
        rounded_RP = (rows_RP / step).to(kind)
        near_RP = rounded_RP.float().mul_(step)
        rounded_RP = pad(rounded_RP, (0, -rows_RP.shape[1] % HALF_GROUP))
    else:
        step, rounded_RP = 1.0, rows_RP.to(kind)
        near_RP = rounded_RP.float()
    length_R = near_RP.norm(dim=1)
    return Coarse(rounded_RP, step, near_RP.sub_(rows_RP).norm(dim=1), length_R)


class Bounds:
    """Upper bounds of scores: the squared distance of a point and a centroid is at least 2 (base - bound · unit)."""

    groups_BG: Tensor

    def __init__(self, bounds_BC: Tensor, base_B: Tensor, unit: float = 1.0) -> None:
        self.bounds_BC, self.base_B, self.unit = bounds_BC, base_B, unit
        self.is_float = bounds_BC.is_floating_point()

    def group(self) -> None:
        """Find the largest bound of each group of centroids."""
        self.groups_BG = self.bounds_BC.unflatten(1, (-1, GROUP)).amax(dim=2)

    def leave_out(self, column_B: Tensor) -> None:
        """Set one bound of each row to the lowest number, in place; none if the column is -1. Then group them."""
        place_B1 = column_B[:, None]
        lowest = -torch.inf if self.is_float else torch.iinfo(self.bounds_BC.dtype).min
        self.bounds_BC.scatter_(1, place_B1.clamp(min=0), torch.where(place_B1 >= 0, lowest, self.bounds_BC[:, :1]))
        self.group()

    def take(self, points_Q: Tensor) -> "Bounds":
        """Return a copy of the bounds of some points."""
        some = Bounds(self.bounds_BC.index_select(0, points_Q), self.base_B[points_Q], self.unit)
        some.groups_BG = self.groups_BG.index_select(0, points_Q)
        return some

    def least_squares(self) -> Tensor:
        """Return the squared distances (B) of the largest bounds; infinity if a row has none left."""
        largest_B = self.groups_BG.amax(dim=1)
        squares_B = 2 * (self.base_B - largest_B * self.unit)
        return squares_B if self.is_float else squares_B.masked_fill_(largest_B <= -INT_NOWHERE, torch.inf)

    def best_columns(self) -> Tensor:
        """Return the column of each row's largest bound: first the group, then the position inside."""
        group_B = self.groups_BG.argmax(dim=1)
        first_B = torch.arange(len(group_B), device=group_B.device) * self.groups_BG.shape[1]
        return group_B * GROUP + self.bounds_BC.view(-1, GROUP).index_select(0, first_B + group_B).argmax(dim=1)

    def candidates(self, still: Tensor, squared_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and columns of all bounds of the rows `still` with which a centroid may be as near as `squared_B`."""
        least_B = (self.base_B - squared_B / 2) / self.unit
        if not self.is_float:
            least_B = (least_B.floor_() - 1).clamp_(-INT_OFFSET - INT_SUM, INT_OFFSET).int()
        which, group = (self.groups_BG.index_select(0, still) >= least_B[still, None]).nonzero(as_tuple=True)
        points = still[which]
        inside_QH = self.bounds_BC.view(-1, GROUP).index_select(0, points * self.groups_BG.shape[1] + group)
        which, inside = (inside_QH >= least_B[points, None]).nonzero(as_tuple=True)
        return points[which], group[which] * GROUP + inside


class CoarseCentroids:
    """Centroids relative to the mean of the points, in fewer bits and padded to whole groups, for bounds of their scores."""

    def __init__(self, centred_CP: Tensor, half_norms_C: Tensor, kind: torch.dtype) -> None:
        self.kind, self.n_real = kind, len(centred_CP)
        missing = -self.n_real % GROUP
        self.rows = round_rows(pad(centred_CP, (0, 0, 0, missing)), kind)
        self.half_norms_C = pad(half_norms_C, (0, missing), value=torch.inf)
        self.lengths_C = pad((2 * half_norms_C).sqrt(), (0, missing))
        rounding = BF16_ROUNDING * (kind == torch.bfloat16) + centred_CP.shape[1] * FLOAT32_ROUNDING * (kind != torch.int8)
        rounding *= 1 + (kind == torch.float16)  # A GPU may cut sums off instead of rounding them.
        self.residual_C = self.rows.residual_R + rounding * self.rows.length_R
        none = half_norms_C.new_zeros(())
        self.longest = self.lengths_C.max() if self.n_real else none
        self.largest_residual = self.residual_C.max() if self.n_real else none

    def offsets(self, points: Coarse, half_norms_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return offset_C, base_B: a squared distance is at least 2 (base - (coarse product - offset))."""
        residual, length = points.residual_R.mean(), points.length_R.mean()
        if self.kind == torch.int8:
            # Offsets must fit 32 bits; the excess goes into the slack.
            most = INT_OFFSET / 2 * points.step * self.rows.step
            residual = residual.clamp(max=most / self.longest.clamp(min=LEAST_STEP))
            length = length.clamp(max=most / self.largest_residual.clamp(min=LEAST_STEP))
        slack_B = (points.residual_R - residual).clamp_(min=0) * self.longest
        slack_B += (points.length_R - length).clamp_(min=0) * self.largest_residual
        slack_B += FLOAT32_SLACK * (half_norms_B + self.longest**2 / 2)
        return self.half_norms_C - residual * self.lengths_C - length * self.residual_C, half_norms_B - slack_B

    def bounds(self, points: Coarse, half_norms_B: Tensor) -> Bounds:
        """Return bounds of the scores of a block of points and all centroids."""
        offset_C, base_B = self.offsets(points, half_norms_B)
        points_BP, columns_PC = points.rounded_RP, self.rows.rounded_RP.T
        if self.kind == torch.int8:
            unit = points.step * self.rows.step
            offset_C = (offset_C / unit).floor_().clamp_(max=INT_OFFSET).int()
            offset_C[self.n_real :] = INT_NOWHERE
            return Bounds(torch._int_mm(points_BP, columns_PC).sub_(offset_C), base_B, unit)
        if self.kind == torch.float32:
            return Bounds(torch.addmm(offset_C, points_BP, columns_PC, beta=-1), base_B)
        return Bounds(torch.mm(points_BP, columns_PC).float().sub_(offset_C), base_B)
