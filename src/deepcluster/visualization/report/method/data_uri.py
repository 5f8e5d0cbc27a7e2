"""Pictures inside the HTML: small ones without loss, shown as squares; larger ones as WebP.

H and W pixels.
"""

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Up to this side a picture keeps every pixel; it is enlarged by whole pixels.
LOSSLESS = 64
QUALITY = 76


@dataclass(frozen=True)
class Picture:
    """A picture for an `img` element.

    Attributes:
        uri: its content, as an address.
        width, height: of what it shows, in pixels, before it was made smaller for the page.
        is_small: each pixel is to stay a square.
    """

    uri: str
    width: int
    height: int
    is_small: bool


def picture(pixels: NDArray[np.uint8] | Tensor, most: int = 192, *, lossless: int = LOSSLESS) -> Picture:
    """A picture of uint8 pixels, (H, W, 3) or grey (H, W).

    Args:
        most: the longer side of a larger one, in pixels of the page's file.
        lossless: longer side up to which every pixel is kept.
    """
    from PIL import Image

    array = np.ascontiguousarray(pixels.cpu().numpy() if isinstance(pixels, Tensor) else pixels)
    height, width = array.shape[:2]
    image, file = Image.fromarray(array), io.BytesIO()
    is_small = max(height, width) <= lossless
    if is_small:
        image.save(file, "PNG", optimize=True)
    else:
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
        image.save(file, "WEBP", quality=QUALITY, method=6)
    kind = "png" if is_small else "webp"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}", width, height, is_small)


def view_pixels(view_CHW: Tensor) -> Tensor:
    """Pixels (H, W, 3), uint8, of a view of uint8 or in [0, 1]."""
    view_CHW = view_CHW.detach().cpu()
    bytes_CHW = view_CHW if not view_CHW.is_floating_point() else (view_CHW.clamp(0, 1) * 255).round().byte()
    return bytes_CHW.permute(1, 2, 0)


def signed_grey(values_HW: Tensor) -> Tensor:
    """Numbers as greys: 0 is middle grey, the largest size of a number black or white."""
    return (127.5 * (1 + values_HW / values_HW.abs().max().clamp(min=1e-12))).round().byte()


def ranged_grey(values_HW: Tensor) -> Tensor:
    """Numbers as greys: the least is black, the largest white; all alike are black."""
    low, high = values_HW.min(), values_HW.max()
    return (255 * (values_HW - low) / (high - low).clamp(min=1e-12)).round().byte()
