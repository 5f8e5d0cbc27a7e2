"""Features that the crops of an epoch had as they were learned: what the next epoch groups, without a look of its own.

N images, M rows of this rank, B batch, V views of an image, P components.
"""

from typing import Any

import torch
from torch import Tensor


class MemoryBank:
    """Rows of the images that this rank has learned in the epoch under way; they stay on the rank that made them.

    Kept in half precision, on the device where they were made unless another is named.

    Args:
        device: where rows are kept; None: where they come from.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return sum(len(indices_B) for indices_B, _, _ in self._batches)

    def write(self, indices_B: Tensor, positions_B: Tensor, rows_BVP: Tensor) -> None:
        """Keep rows of images; an image may come again.

        Args:
            indices_B: index of each image in its source.
            positions_B: where it came in the order of the epoch, over all ranks.
            rows_BVP: finite numbers.
        """
        rows_BVP = rows_BVP.detach().to(self.device or rows_BVP.device, torch.float16)
        self._batches.append((indices_B, positions_B, rows_BVP))

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Indices_M ascending, positions_M and rows_MVP; of an image that came several times the last one by position."""
        if not self._batches:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0, 0, 0)
        indices_M, positions_M, rows_MVP = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        order_M = torch.argsort(positions_M, stable=True)
        order_M = order_M[torch.argsort(indices_M[order_M], stable=True)]
        indices_M = indices_M[order_M]
        is_last_M = torch.ones(len(indices_M), dtype=torch.bool)
        is_last_M[:-1] = indices_M[1:] != indices_M[:-1]
        order_M, indices_M = order_M[is_last_M], indices_M[is_last_M]
        return indices_M, positions_M[order_M], rows_MVP[order_M.to(rows_MVP.device)]

    def clear(self) -> None:
        """Forget all rows."""
        self._batches.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors of M rows each, by name, as a checkpoint keeps those that are spread over ranks."""
        indices_M, positions_M, rows_MVP = self.all()
        return {"indices": indices_M, "positions": positions_M, "rows": rows_MVP.cpu()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with saved rows."""
        self._batches = []
        if len(state["indices"]):
            rows_MVP = state["rows"].to(self.device or device)
            self._batches.append((state["indices"], state["positions"], rows_MVP))
