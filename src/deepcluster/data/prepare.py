"""What a process does to prepare images: it cuts the views of a batch, or decodes a part of the pack.

B batch, R random numbers of a position.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import UnreadableImage
from deepcluster.core.shared_memory import bytes_for
from deepcluster.data.cache import DecodedImages
from deepcluster.data.multi_crop import crop_draws
from deepcluster.data.views import Draws, View, draws, new_room

# Seed, epoch and first position of the random numbers of a batch; None for a view without any.
Drawn = tuple[int, int, int] | None


@dataclass(frozen=True)
class Part:
    """What a batch is made of: images, some of whose positions may be left out, and the numbers that are drawn for these.

    Attributes:
        rows: positions of these images among all that the batch was to have: those that are not known to be unreadable.
        drawn: seed, epoch and first position of the draws; None for a view without any.
        count: number of positions.
    """

    indices: NDArray[np.int64]
    rows: NDArray[np.int64] | slice
    drawn: Drawn
    count: int

    def draws(self, view: View) -> Draws:
        """Return the numbers of the images of the batch."""
        if self.drawn is None:
            return np.empty((len(self.indices), 0))
        n_views = getattr(view, "n_views", None)
        drawn = draws(*self.drawn, self.count) if n_views is None else crop_draws(*self.drawn, self.count, n_views)
        return drawn[self.rows]


def make_crops(
    images: DecodedImages, view: View, part: Part, memory: NDArray[np.uint8] | None
) -> tuple[list[Any], NDArray[np.int64] | slice, dict[int, str], int]:
    """Return the crops of a batch, or their shapes where they are put into memory; and what was found on the way.

    Returns:
        arrays (…, S, S, 3) or their shapes; rows of the batch that are readable; reasons by index of the others; how many
        kept images were damaged.
    """
    found, rows, unreadable = images.some(part.indices)
    place = 0

    def room(count: int, size: int) -> Tensor:
        nonlocal place
        if memory is None:
            return new_room(count, size)
        first, place = place, place + bytes_for([(count, size, size, 3)])
        return torch.from_numpy(memory[first : first + count * size * size * 3]).view(count, size, size, 3)

    crops = as_tuple(view(found, part.draws(view)[rows], room))
    arrays = [crop.movedim(-3, -1).numpy() for crop in crops]
    n_damaged = 0
    if images.pack is not None:
        n_damaged, images.pack.n_damaged = images.pack.n_damaged, 0
    return arrays if memory is None else [array.shape for array in arrays], rows, unreadable, n_damaged


def fill_part(images: DecodedImages, indices: range, wait: bool, memory: None) -> tuple[bool, dict[int, str], str]:
    """Return whether a part of the pack is filled now, why images of it can't be read, and why there is no more room."""
    unreadable: dict[int, str] = {}

    def decoded(index: int) -> NDArray[np.uint8] | None:
        try:
            return images.decode(index)
        except UnreadableImage as fault:
            unreadable[index] = str(fault)
            return None

    if images.pack is not None and not images.pack.complaint:
        is_done = images.pack.fill(indices, images.source.stamp, decoded, wait=wait)
        return is_done, unreadable, images.pack.complaint
    for index in indices:
        decoded(index)
    return True, unreadable, ""


def bytes_per_image(view: View) -> int:
    """Return the size of the crops of one image."""
    images = [torch.zeros(1, 1, 3, dtype=torch.uint8)]
    crops = as_tuple(view(images, Part(np.zeros(1, np.int64), np.zeros(1, np.int64), (0, 0, 0), 1).draws(view)))
    return bytes_for([tuple(crop.shape) for crop in crops])


def as_tuple(crops: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the crops of a view by size, also where there is one size."""
    return crops if isinstance(crops, tuple) else (crops,)
