"""From pixels of the view that the network sees to those of the photo it was made of.

A box is left, top, right, bottom: edges of pixels, so that (0, 0, 1, 1) is the first pixel.
"""

from deepcluster.data.views import LONGEST, ClusterView

Box = tuple[float, float, float, float]


def photo_box(view_box: Box, image_size: int, height: int, width: int, *, reduce_to: int = 0) -> Box:
    """Return the box in a photo of `height` x `width` pixels that corresponds to a box in its centre view.

    Args:
        image_size: side of the view.
        reduce_to: shorter side to which a larger photo was reduced before the view was made; 0: not reduced.
    """
    across = _Axis(width, height, image_size, reduce_to)
    down = _Axis(height, width, image_size, reduce_to)
    left, top, right, bottom = view_box
    return across.place(left), down.place(top), across.place(right), down.place(bottom)


class _Axis:
    """One axis of a photo on its way to the view (`decode`, then `ClusterView`): reduced, resized, cropped."""

    def __init__(self, side: int, other: int, image_size: int, reduce_to: int) -> None:
        shorter = min(side, other)
        small, small_other = side, other
        if 0 < reduce_to < shorter:
            small, small_other = side * reduce_to // shorter, other * reduce_to // shorter
        longest = LONGEST * min(small, small_other)
        self.reduction = side / small
        self.middle = max(0, small - longest) // 2
        part, part_other = min(small, longest), min(small_other, longest)
        resized, _ = ClusterView(image_size).resized_sides(part, part_other)
        self.scale = part / resized
        self.crop = round((resized - image_size) / 2)

    def place(self, view: float) -> float:
        return ((view + self.crop) * self.scale + self.middle) * self.reduction
