"""Vectors in fewer bits: products two to five times as fast as those of float32, with bounded error.

R rows, P components.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

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
    """Return the fastest product of this machine; not 8 bits for the `first` search, where too many candidates remain."""
    if device.type == "cuda":
        return torch.bfloat16
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
    """Round rows to `kind`; 8-bit integers cover the range up to `reach`, by default the largest number."""
    if kind == torch.float32:
        return Coarse(rows_RP, 1.0, rows_RP.new_zeros(len(rows_RP)), rows_RP.norm(dim=1))
    if kind == torch.int8:
        reach = (float(rows_RP.abs().amax()) if rows_RP.numel() else 0.0) if reach is None else reach
        step = max(reach / 127, LEAST_STEP)
        near_RP = (rows_RP / step).round_().clamp_(-127, 127)
        rounded_RP = near_RP.to(kind)
        near_RP.mul_(step)
    else:
        step, rounded_RP = 1.0, rows_RP.to(kind)
        near_RP = rounded_RP.float()
    length_R = near_RP.norm(dim=1)
    return Coarse(rounded_RP, step, near_RP.sub_(rows_RP).norm(dim=1), length_R)
