"""Images in memory, as Python code has them: arrays, tensors, Pillow's images. N images, H height, W width, C channels."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.text import distinct, printable
from deepcluster.data.sources.image_source import ImageSource

CHANNELS = (1, 3, 4)
Pixels = NDArray[np.uint8]


class MemoryImages(ImageSource):
    """Images in memory."""

    def __init__(self, images: Sequence[Pixels] | Pixels, names: Sequence[str]) -> None:
        """Take images as H x W x C, of one size or several, with a name for each."""
        super().__init__()
        self._images, self._names = images, distinct(list(names))

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> Pixels:
        return np.array(self._images[index], order="C")

    def stamp(self, index: int) -> str:
        image_HWC = self.read(index)
        return hashlib.sha256(f"{image_HWC.shape}".encode() + image_HWC.tobytes()).hexdigest()[:16]

    def content(self) -> str:
        return hashlib.sha256(" ".join(map(self.stamp, range(len(self)))).encode()).hexdigest()[:16]

    def details(self) -> str:
        sizes = sorted({image_HWC.shape[:2] for image_HWC in self._images})
        (height, width), (most_high, most_wide) = sizes[0], sizes[-1]
        same = f"of {width} x {height} pixels"
        return f"{same if len(sizes) == 1 else f'{same} to {most_wide} x {most_high} pixels'} in memory"


def is_image(data: Any) -> bool:
    """Return whether data is an image of Pillow, an array of numbers or a tensor; it may be one of a wrong shape."""
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(data, pillow.Image):
        return True
    return getattr(data, "shape", ()) != () and _kind(data) in "buif"


def memory_image(data: Any) -> MemoryImages:
    """Return the images of one array, tensor or image of Pillow.

    Arrays are H x W, H x W x C, N x H x W, N x H x W x C or N x C x H x W; tensors also C x H x W; of uint8, or numbers
    from 0 to 1.

    Raises:
        InputError: it has another shape, is ambiguous, or holds other numbers.
    """
    if not hasattr(data, "shape"):
        return memory_images([data])
    array, is_tensor = _array(data)
    images_NHWC = _scaled(_as_NHWC(array, is_tensor=is_tensor))
    if len(images_NHWC) == 1:
        return MemoryImages(images_NHWC, ["image"])
    return MemoryImages(images_NHWC, _numbered(len(images_NHWC)))


def memory_images(data: Sequence[Any]) -> MemoryImages:
    """Return images, each of which is an array (H x W or H x W x C), a tensor or an image of Pillow.

    Raises:
        InputError: one of them is something else.
    """
    images, names = [], _numbered(len(data)) if len(data) > 1 else ["image"]
    for number, one in enumerate(data):
        if not is_image(one):
            raise InputError(
                f"data holds images, and at place {number} a value of type {type(one).__name__}: give images only, or paths"
            )
        if hasattr(one, "shape"):
            array, _ = _array(one)
            images.append(_scaled(_as_HWC(array, number)))
            continue
        from deepcluster.data.decode import pixels_of  # Not at the start of the program.

        images.append(pixels_of(one))
        if isinstance(file := getattr(one, "filename", None), str | PurePath) and str(file):
            names[number] = printable(PurePath(file).name)
    return MemoryImages(images, names)


def _kind(data: Any) -> str:
    """Return the kind of numbers in terms of NumPy; "?" for none."""
    dtype: Any = getattr(data, "dtype", None)
    if type(dtype).__module__ == "torch":
        return "f" if dtype.is_floating_point else "?" if dtype.is_complex else "i"
    return str(getattr(dtype, "kind", "?"))


def _array(data: Any) -> tuple[NDArray[Any], bool]:
    """Return an array, and whether it was a tensor of torch, whose images are C x H x W by convention."""
    if type(getattr(data, "dtype", None)).__module__ == "torch":
        data = data.detach().cpu()
        return np.asarray(data.float() if data.dtype.is_floating_point else data), True
    return np.asarray(data), False


def _numbered(count: int) -> list[str]:
    return [f"image-{number:0{max(6, len(str(count - 1)))}}" for number in range(count)]


def _shape(array: NDArray[Any]) -> str:
    return " x ".join(map(str, array.shape)) or "no"


def _as_HWC(array: NDArray[Any], number: int) -> NDArray[Any]:
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim == 3 and array.size:
        if array.shape[2] in CHANNELS:
            return array
        if array.shape[0] in CHANNELS:
            return array.transpose(1, 2, 0)
    raise InputError(
        f"image {number} is an array of {_shape(array)} numbers; each image of a list should be height x width, or height x "
        "width x 1, 3 or 4 channels"
    )


def _as_NHWC(array: NDArray[Any], *, is_tensor: bool) -> NDArray[Any]:
    is_first = array.ndim > 2 and array.shape[-3] in CHANNELS
    is_last = array.ndim > 2 and array.shape[-1] in CHANNELS
    match array.ndim if array.size else 0:
        case 2:
            return array[None, :, :, None]
        case 3 if is_first and (is_tensor or array.shape[0] == 1) and not (is_last and not is_tensor):
            return array.transpose(1, 2, 0)[None]
        case 3 if is_last:
            return array[None]
        case 3 if is_first:
            count = array.shape[0]
            raise InputError(
                f"data is an array of {_shape(array)} numbers: is it one image of {count} channels, or {count} grey images? "
                "Give array.transpose(1, 2, 0) for one image, array[..., None] for grey ones"
            )
        case 3:
            return array[..., None]
        case 4 if is_last and not (is_tensor and is_first):
            return array
        case 4 if is_first:
            return array.transpose(0, 2, 3, 1)
    raise InputError(
        f"data is an array of {_shape(array)} numbers, which are no images: give height x width, height x width x "
        "channels, or a batch (number x height x width x channels) with 1, 3 or 4 channels"
    )


def _scaled(array: NDArray[Any]) -> Pixels:
    """Return uint8 of numbers from 0 to 1, or the same array of uint8."""
    if array.dtype == np.uint8:
        return array
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if array.dtype.kind in "bf" and low >= 0 and high <= 1:  # False for NaN.
        return (array.astype(np.float32) * 255).round().astype(np.uint8)
    if low >= 0 and high <= 255:
        advice = "array.astype('uint8') if 255 is full brightness, array / array.max() if the largest value is"
    else:
        advice = "(array - array.min()) / (array.max() - array.min()), for example"
    raise InputError(
        f"data is an array of {array.dtype} from {low:g} to {high:g}; images are uint8 from 0 (black) to 255, or "
        f"floating-point numbers from 0 to 1: give {advice}"
    )
