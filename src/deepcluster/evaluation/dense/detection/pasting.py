"""Masks of detections, from the square in which a network predicts them to the pixels of the image (He et al., ICCV 2017).

D detections, P cells of a side of a predicted mask, H and W pixels.
"""

from collections.abc import Iterator
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.evaluation.datasets.coco_json import coco_tools

THRESHOLD = 0.5


def encoded_masks(probabilities_DPP: Tensor, boxes_D4: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return COCO's run-length encoding of the mask of each detection, with text instead of bytes.

    Args:
        boxes_D4: in pixels of the image, within it.
        size: height and width of the image.
    """
    _, _, tools = coco_tools()
    found = []
    for mask_HW in pasted(probabilities_DPP, boxes_D4, size):
        one = tools.encode(mask_HW)
        found.append({"size": list(one["size"]), "counts": one["counts"].decode("ascii")})
    return found


def pasted(probabilities_DPP: Tensor, boxes_D4: Tensor, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Yield the mask (H, W) of each detection, one at a time; column by column in memory.

    A pixel belongs to the object if its centre is in the box and the probability there, interpolated between the centres of
    the cells, is at least one half. Outside of the square it falls to 0 within a cell.
    """
    height, width = size
    for cells_PP, box_4 in zip(probabilities_DPP.double().cpu(), boxes_D4.double().tolist(), strict=True):
        mask_HW = np.zeros((height, width), np.uint8, order="F")
        left, top, right, bottom = box_4
        rows, columns = _pixels(top, bottom, height), _pixels(left, right, width)
        weights_HP = _weights(rows, top, bottom, len(cells_PP))
        weights_WP = _weights(columns, left, right, len(cells_PP))
        inside_HW = weights_HP @ cells_PP @ weights_WP.T >= THRESHOLD
        mask_HW[rows.start : rows.stop, columns.start : columns.stop] = inside_HW.numpy()
        yield mask_HW


def _pixels(low: float, high: float, count: int) -> range:
    """Return the pixels of an axis whose centres, at 0.5, 1.5, …, are between two positions."""
    first = max(0, ceil(low - 0.5))
    return range(first, max(first, min(count, floor(high - 0.5) + 1)))


def _weights(pixels: range, low: float, high: float, cells: int) -> Tensor:
    """Return the weight of each cell for each pixel (pixels, cells) of linear interpolation."""
    centres = (torch.arange(pixels.start, pixels.stop, dtype=torch.float64) + 0.5 - low) / max(
        high - low, 1e-9
    ) * cells - 0.5
    return (1 - (centres[:, None] - torch.arange(cells)).abs()).clamp(min=0)
