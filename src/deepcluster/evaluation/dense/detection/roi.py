"""Regions of a feature map as maps of one size, with a fixed scale: that of the network.

`torchvision.ops.MultiScaleRoIAlign` infers the scale from the sizes of image and map, which a network without padding gets
wrong, and its regions are half a cell off (`aligned=False`).
R regions, C channels, P cells of a side of the result.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align, roi_pool


class MaxPooler(nn.Module):
    """The largest value of each of P x P parts (Girshick, Fast R-CNN, ICCV 2015, section 2.1).

    Cell i of the map is centred at pixel stride * i.
    """

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, maps: Mapping[str, Tensor], boxes: list[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return (R, C, P, P) for boxes in pixels, a tensor for each image; the regions of an image follow each other."""
        (map_BCHW,) = maps.values()
        return cast(Tensor, roi_pool(map_BCHW, boxes, self.size, 1 / self.stride))


class AlignedPooler(nn.Module):
    """Means of interpolated values (He et al., Mask R-CNN, ICCV 2017, section 3).

    Cell i of the map covers the pixels from stride * i to stride * (i + 1).
    Of several maps, each region is taken from the one that suits its size (Lin et al., FPN, CVPR 2017, equation 1).

    Args:
        strides: of each map, in pixels; rising.
        samples: interpolated values along each side of a cell; 0: as many as the region has cells of the map there.
    """

    def __init__(self, size: int, strides: Sequence[int], samples: int = 0) -> None:
        super().__init__()
        self.size, self.strides, self.samples = size, tuple(strides), samples

    def forward(self, maps: Mapping[str, Tensor], boxes: list[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return (R, C, P, P), as `MaxPooler`; of more maps than strides, the first ones are used."""
        maps_L = list(maps.values())[: len(self.strides)]
        image_R = torch.cat([one.new_full((len(one), 1), number) for number, one in enumerate(boxes)])
        regions_R5 = torch.cat([image_R, torch.cat(boxes)], dim=1)
        if len(maps_L) == 1:
            return self._aligned(maps_L[0], regions_R5, self.strides[0])
        level_R = self.levels(regions_R5[:, 1:])
        result_RCPP = maps_L[0].new_zeros(len(regions_R5), maps_L[0].shape[1], self.size, self.size)
        for level, (map_BCHW, stride) in enumerate(zip(maps_L, self.strides, strict=True)):
            rows = torch.where(level_R == level)[0]
            part = self._aligned(map_BCHW, regions_R5[rows], stride)
            result_RCPP = result_RCPP.index_put((rows,), part.to(result_RCPP.dtype))
        return result_RCPP

    def _aligned(self, map_BCHW: Tensor, regions_R5: Tensor, stride: int) -> Tensor:
        return cast(Tensor, roi_align(map_BCHW, regions_R5, self.size, 1 / stride, self.samples, aligned=True))

    def levels(self, boxes_R4: Tensor) -> Tensor:
        """Return which map each box is taken from: a box of 224 pixels from that of stride 16, half the side one finer."""
        width_R, height_R = (boxes_R4[:, 2:] - boxes_R4[:, :2]).clamp(min=0).unbind(1)
        side_R = (width_R * height_R).sqrt()
        first = self.strides[0].bit_length() - 1
        level_R = torch.floor(4 + torch.log2(side_R / 224 + 1e-8)) - first
        return level_R.clamp(0, len(self.strides) - 1).long()
