"""Mean and scatter matrix of rows in a stream, whatever their offset and size.

B rows of a block, D features.
"""

import math

import torch
from torch import Tensor

from deepcluster.clustering.frame import Frame
from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError

# Rows summed or transformed at once.
BLOCK_ROWS = 2048
# Columns per product: only panels at and below the diagonal are computed, 0.56 of 4,096 × 4,096.
PANEL = 512
# float32 numbers that are far below this are added and subtracted without overflow.
SAFE_FLOAT32 = 1e37
NO_ROWS = "there are no rows to whiten"
TOO_LARGE = "features are too large to be squared in float64 (above 1e150), or at the end of float32; scale them down"


class Scatter:
    """Number, mean and scatter matrix, the sum of (x - mean)(x - mean)ᵀ, of rows in a stream.

    Rows wait in a buffer, float64 for such rows and float32 for others, until a block of `max(BLOCK_ROWS, D)` is full. A
    block is centred, multiplied in float32 and added to the float64 totals by the formula for the union of two sets (Chan,
    Golub & LeVeque 1979), so that neither a large common offset nor a drift of the rows cancels digits.

    Attributes:
        dtype: float64 or float32.
        n_rows: number of rows in the totals.
        n_waiting: number of rows in the buffer.
    """

    def __init__(self, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self.dim, self.device = dim, device
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.n_rows = self.n_waiting = 0
        self._mean_D = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter_DD: Tensor | None = None
        self._waiting = torch.empty(0, dim, device=device, dtype=self.dtype)

    def add(self, rows_BD: Tensor) -> None:
        """Add rows to the buffer, and the buffer to the totals whenever it is full."""
        block_rows = max(BLOCK_ROWS, self.dim)
        for part in rows_BD.split(BLOCK_ROWS):
            while len(part):
                taken = part[: block_rows - self.n_waiting]
                end = self.n_waiting + len(taken)
                if end > len(self._waiting):
                    room = min(block_rows, max(end, 2 * len(self._waiting)))
                    longer = self._waiting.new_empty(room, self.dim)
                    longer[: self.n_waiting] = self._waiting[: self.n_waiting]
                    self._waiting = longer
                self._waiting[self.n_waiting : end] = taken
                self.n_waiting, part = end, part[len(taken) :]
                if end == block_rows:
                    self._add_block()

    def centred_block(self) -> tuple[Tensor, Tensor, float]:
        """Subtract the mean from the waiting rows; return them as float32 times a scale, the mean in float64, and the scale.

        The scale is a power of two, 1 unless the rows are huge or tiny.

        Raises:
            InputError: a value is not finite.
        """
        block_BD = self._waiting[: self.n_waiting]
        mean_D = torch.zeros_like(self._mean_D)
        # Twice: with a large offset the first mean is rounded; the second is the mean of small numbers.
        for _ in range(2 if self.n_waiting else 0):
            shift_D = block_BD.mean(dim=0)
            if not bool((shift_D.abs() < SAFE_FLOAT32).all()):
                bad = (~block_BD.isfinite().all(dim=1)).nonzero()
                if len(bad):
                    row = f"row {self.n_rows + int(bad[0])} are not finite ({len(bad)} such rows in its block)"
                    raise InputError(f"features of {row}; leave them out")
                block_BD = block_BD.double()
                shift_D = block_BD.mean(dim=0)
            block_BD -= shift_D
            mean_D += shift_D
        largest = max(abs(float(end)) for end in block_BD.aminmax()) if self.n_waiting else 0.0
        if not math.isfinite(largest):
            raise InputError(TOO_LARGE)
        scale = Frame.around(None, largest).scale
        return (block_BD if scale == 1 else block_BD.double() * scale).float(), mean_D, scale

    def _add_block(self) -> Tensor:
        """Add the buffer to the totals; return the scatter matrix, at and below the diagonal."""
        block_BD, mean_D, scale = self.centred_block()
        if self._scatter_DD is None:
            self._scatter_DD = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.device)
        n_all = self.n_rows + len(block_BD)
        drift_D = mean_D - self._mean_D
        add_lower_product(self._scatter_DD, block_BD, scale)
        self._scatter_DD.addr_(drift_D, drift_D, alpha=self.n_rows * len(block_BD) / max(1, n_all))
        self._mean_D += drift_D * (len(block_BD) / max(1, n_all))
        self.n_rows, self.n_waiting = n_all, 0
        return self._scatter_DD

    def total(self, ranks: Ranks) -> tuple[int, Tensor, Tensor]:
        """Return number, mean_D and scatter_DD (both float64) of the rows of all ranks, and end the stream.

        Raises:
            InputError: there are no rows, or a value is not finite.
        """
        scatter_DD = self._add_block()
        self._waiting = self._waiting[:0].clone()
        n_images = int(ranks.sum(torch.tensor([self.n_rows], device=self.device)))
        if n_images == 0:
            raise InputError(NO_ROWS)
        mean_D = ranks.sum(self._mean_D * self.n_rows) / n_images
        drift_D = self._mean_D - mean_D
        scatter_DD.addr_(drift_D, drift_D, alpha=self.n_rows)
        return n_images, mean_D, mirror_lower(ranks.sum(scatter_DD))


def add_lower_product(total_DD: Tensor, block_BD: Tensor, scale: float) -> None:
    """Add block_BDᵀ block_BD / scale², computed in float32, to the panels of a float64 total at and below the diagonal."""
    for first in range(0, len(total_DD), PANEL):
        end = min(first + PANEL, len(total_DD))
        product = block_BD[:, first:end].T @ block_BD[:, :end]
        total_DD[first:end, :end] += product if scale == 1 else product.double() / scale / scale


def mirror_lower(total_DD: Tensor) -> Tensor:
    """Mirror the part below the diagonal to the part above, in place, and return the matrix."""
    for first in range(0, len(total_DD), PANEL):
        end = min(first + PANEL, len(total_DD))
        square = total_DD[first:end, first:end]
        square.copy_(square.tril() + square.tril(-1).T)
        total_DD[:first, first:end] = total_DD[first:end, :first].T
    return total_DD
