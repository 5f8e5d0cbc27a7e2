"""The memory bank of DeepCluster-v2: projections of the crops of an epoch, which the next epoch clusters without a pass.

N images, M rows, B batch, V views of an image, P components.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepcluster.core.distributed import ONE_PROCESS, Ranks


class Bank:
    """Rows of the images that this rank has trained on in the current epoch, in half precision.

    Args:
        device: device of the rows.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return sum(len(indices_B) for indices_B, _, _ in self._batches)

    def write(self, indices_B: Tensor, positions_B: Tensor, rows_BVP: Tensor) -> None:
        """Add rows of images. An image may occur more than once.

        Args:
            indices_B: index of each image in its source.
            positions_B: position of each image in the order of the epoch, over all ranks.
            rows_BVP: finite numbers.
        """
        self._batches.append((indices_B, positions_B, rows_BVP.detach().to(self.device, torch.float16)))

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices_M, ascending, positions_M and rows_MVP: for each image the row with the last position."""
        if not self._batches:
            none = torch.empty(0, dtype=torch.int64)
            return none, none, torch.empty(0, 0, 0, dtype=torch.float16, device=self.device)
        indices_M, positions_M, rows_MVP = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        order_M = torch.argsort(positions_M, stable=True)
        order_M = order_M[torch.argsort(indices_M[order_M], stable=True)]
        indices_M = indices_M[order_M]
        is_last_M = torch.ones(len(indices_M), dtype=torch.bool)
        is_last_M[:-1] = indices_M[1:] != indices_M[:-1]
        order_M, indices_M = order_M[is_last_M], indices_M[is_last_M]
        return indices_M, positions_M[order_M], rows_MVP[order_M.to(rows_MVP.device)]

    def at_owners(self, n_images: int, shape: tuple[int, int], ranks: Ranks = ONE_PROCESS) -> Tensor:
        """Return rows (M, V, P) of the images that this rank owns; NaN where no rank has a row. All ranks call it.

        Args:
            n_images: N.
            shape: (V, P).
        """
        indices_M, positions_M, rows_MVP = self.all()
        if ranks.size > 1:
            stops_R = ranks.gather(torch.tensor([ranks.part(n_images).stop]))
            owner_M = torch.searchsorted(stops_R, indices_M, right=True)
            received = Bank(self.device)
            rows = (indices_M, positions_M, rows_MVP.view(len(indices_M), *shape))
            received.write(*(ranks.exchange(values, owner_M) for values in rows))
            indices_M, _, rows_MVP = received.all()
        mine = ranks.part(n_images)
        owned_MVP = rows_MVP.new_full((mine.stop - mine.start, *shape), torch.nan)
        if len(indices_M):
            owned_MVP[(indices_M - mine.start).to(rows_MVP.device)] = rows_MVP
        return owned_MVP

    def clear(self) -> None:
        """Forget all rows."""
        self._batches.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors of M rows each, by name, as a checkpoint keeps the rows of one rank."""
        indices_M, positions_M, rows_MVP = self.all()
        return {"indices": indices_M, "positions": positions_M, "rows": rows_MVP.cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with saved rows."""
        self._batches = []
        if len(state["indices"]):
            self.write(state["indices"], state["positions"], state["rows"])
