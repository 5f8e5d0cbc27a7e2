"""Several crops of each image, of several sizes: multi-crop (SwAV, arXiv 2006.09882, section 3.3).

B batch, V crops of an image in all, R random numbers of a crop, S side of a crop.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.data.views import Draws, Images, Room, TrainingView, cut, draws, new_room, sides_of


def crop_draws(seed: int, epoch: int, start: int, count: int, n_crops: int) -> Draws:
    """Return uniform numbers (count, n_crops, R) of the crops of the positions start … start + count - 1 of an epoch.

    A row is a function of (seed, epoch, position, number of the crop) only: more crops leave the first ones as they are,
    and crop 0 has the numbers of `draws`.
    """
    return np.stack([draws(seed, epoch, start, count, crop=crop) for crop in range(n_crops)], axis=1)


@dataclass(frozen=True)
class MultiCropView:
    """The random views that are learned together: groups of crops, each of one size and one range of areas.

    Args:
        crops: number and side of each group's crops, as `deepcluster.run.crops.parse_crops` gives them.
        scales: least and most share of the image's area, for each group.
        flip: flip half of the crops left to right.

    Raises InputError where there are not as many scales as groups.
    """

    crops: tuple[tuple[int, int], ...]
    scales: tuple[tuple[float, float], ...]
    flip: bool = True
    views: tuple[TrainingView, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.crops) != len(self.scales):
            raise InputError(
                f"{len(self.scales)} ranges of areas for {len(self.crops)} groups of crops: give one for each group, "
                "such as 0.14,1 for the large and 0.05,0.14 for the small ones"
            )
        groups = zip(self.crops, self.scales, strict=True)
        views = tuple(TrainingView(size, scale=scale, flip=self.flip) for (_, size), scale in groups)
        object.__setattr__(self, "views", views)

    @property
    def n_views(self) -> int:
        """V, the crops of an image in all."""
        return sum(count for count, _ in self.crops)

    def __call__(self, images: Images, draws_BVR: Draws, room: Room = new_room) -> tuple[Tensor, ...]:
        """Return the crops of each group: (count * B, 3, S, S), uint8, channels last in memory, on the images' device.

        Crop by crop: rows v * B … (v + 1) * B - 1 are the group's crop v of each image. Numbers of crops run through all
        groups: the first of the second group has the draws [:, count of the first].
        """
        groups, first, sides_B2 = [], 0, sides_of(images)
        for (count, size), view in zip(self.crops, self.views, strict=True):
            draws_CR = draws_BVR[:, first : first + count].swapaxes(0, 1).reshape(-1, draws_BVR.shape[2])
            windows = view.windows(np.tile(sides_B2, (count, 1)), draws_CR)
            groups.append(cut(images, windows, size, np.tile(np.arange(len(images)), count), room=room))
            first += count
        return tuple(groups)
