"""Features that were seen in training, grouped in the place of those of a second pass over the images.

M images of this rank, B batch, C features.
"""

from collections.abc import Generator, Mapping

import torch
from torch import Tensor

from deepcluster.core.distributed import exchange_rows, my_part, world_size
from deepcluster.training.memory_bank import MemoryBank


class PastFeatures:
    """The latest row of each image: of its last random crop, in train mode; of a first look until there is one.

    Each rank keeps the rows of its part of the images: those that other ranks have learned are sent to it once an epoch.

    Args:
        n_images: N.
    """

    def __init__(self, n_images: int) -> None:
        self.n_images, self.mine = n_images, my_part(n_images)
        self.rows_MC: Tensor | None = None
        self.recent = MemoryBank(torch.device("cpu"))

    @property
    def is_empty(self) -> bool:
        """Whether no row is there, and the images must be looked at."""
        return self.rows_MC is None

    def put(self, indices_B: Tensor, rows_BC: Tensor) -> Tensor:
        """Take rows of images of this rank's part; an image may come once. Returns the rows, float32, as they are kept."""
        if self.rows_MC is None:
            self.rows_MC = torch.full((self.mine.stop - self.mine.start, rows_BC.shape[1]), torch.nan, dtype=torch.float16)
        kept_BC = _halves(rows_BC.cpu())
        self.rows_MC[indices_B - self.mine.start] = kept_BC
        return kept_BC.float()

    def batches(self, batch_rows: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Rows_BC, float32, and indices_B of the images that have one; batch i of those from i * batch_rows on."""
        if self.rows_MC is None:
            return
        for start in range(0, len(self.rows_MC), batch_rows):
            rows_BC = self.rows_MC[start : start + batch_rows]
            there = torch.isfinite(rows_BC).all(dim=1).nonzero().flatten()
            yield rows_BC[there].float(), self.mine.start + start + there

    def learned(self, indices_B: Tensor, first_position: int, rows_BC: Tensor) -> None:
        """Take rows of images that this rank has learned, the first of which is at a position of the epoch's order.

        An index of -1 is of no image.
        """
        positions_B = torch.arange(first_position, first_position + len(indices_B))
        there_B = indices_B >= 0
        if not bool(there_B.all()):
            indices_B, positions_B, rows_BC = indices_B[there_B], positions_B[there_B], rows_BC[there_B.to(rows_BC.device)]
        self.recent.write(indices_B, positions_B, _halves(rows_BC)[:, None])

    def take_over(self) -> None:
        """At the end of an epoch: give the rows that were learned to the ranks that keep them."""
        indices_M, positions_M, rows_MVC = self.recent.all()
        self.recent.clear()
        bounds = torch.tensor([self.n_images * (rank + 1) // world_size() for rank in range(world_size())])
        to_M = torch.searchsorted(bounds, indices_M, right=True)
        arrived = MemoryBank()
        arrived.write(*(exchange_rows(values, to_M) for values in (indices_M, positions_M, rows_MVC)))
        indices_M, _, rows_MVC = arrived.all()
        if len(indices_M):
            self.put(indices_M, rows_MVC[:, 0])

    def rows(self) -> dict[str, dict[str, Tensor]]:
        """This rank's rows by name, as a checkpoint keeps them."""
        kept = {} if self.rows_MC is None else {"past": self._kept(self.rows_MC)}
        return {**kept, "recent": self.recent.state_dict()}

    def _kept(self, rows_MC: Tensor) -> dict[str, Tensor]:
        return {"indices": torch.arange(self.mine.start, self.mine.stop), "rows": rows_MC}

    def load_rows(self, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on with saved rows."""
        if "past" in rows:
            self.rows_MC = None
            self.put(rows["past"]["indices"], rows["past"]["rows"])
        self.recent.load_state_dict(dict(rows["recent"]), torch.device("cpu"))


def _halves(rows_BC: Tensor) -> Tensor:
    """Rows in half precision, values beyond its range at its end: infinite ones would leave the image out."""
    most = torch.finfo(torch.float16).max
    return rows_BC.float().clamp(-most, most).half()
