"""Files with a class per pixel: read as they are, checked against their image and the classes.

H and W pixels.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.names import PackedNames
from deepcluster.core.text import count_of
from deepcluster.data.decode import MAX_PIXELS, decode
from deepcluster.data.sources import ImageSource
from deepcluster.evaluation.datasets.dense import IGNORED
from deepcluster.evaluation.datasets.labelled import some

Mask = NDArray[np.uint8]


@dataclass(frozen=True)
class MaskFiles:
    """Reads the mask of an image: `MaskSet.read_mask`.

    Attributes:
        source: the images.
        paths: of the file with the mask of each image.
        read: returns (H, W), uint8, of a file; raises `InputError`.
    """

    source: ImageSource
    paths: PackedNames
    read: Callable[[Path], Mask]

    def __call__(self, index: int) -> Mask:
        """Return the mask of an image.

        Raises:
            InputError: it can't be read, or has another size than its image.
        """
        mask_HW = self.read(Path(self.paths[index]))
        check_size(self.source, index, mask_HW.shape, self.paths[index])
        return mask_HW


def check_size(source: ImageSource, index: int, shape: tuple[int, ...], mask: str | Path) -> None:
    """Raise InputError where an image has another height and width than its mask.

    An image that can't be read passes: it is left out by those who decode it.
    """
    path = source.path(index)
    try:
        with Image.open(str(path)) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            size = image.size if turned else image.size[::-1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        try:
            size = decode(source.read(index)).shape[:2]
        except UnreadableImage:
            return
    if tuple(size) != tuple(shape):
        raise InputError(
            f"{mask} is {shape[1]} x {shape[0]} pixels, its image {path} {size[1]} x {size[0]}: a mask must have the size "
            "of its image"
        )


def read_png(path: Path) -> tuple[NDArray[Any], str]:
    """Return the numbers in a PNG as they are stored, palette indices or grey values or colours, and its mode.

    Returns:
        (H, W), or (H, W, 3) of mode "RGB"; and "P", "L" (any grey) or "RGB".

    Raises:
        InputError: it can't be read.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{path}: {image.width} x {image.height} pixels is over the limit of {MAX_PIXELS:,} pixels")
            image.load()
            mode = image.mode
            pixels = np.asarray(image.convert("RGB") if mode == "RGBA" else image)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is no PNG; masks are PNG files, which keep the number of each pixel") from None
    # As in `decode`: on damaged files Pillow's readers raise many different types.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} can't be read as a PNG: {error}") from error
    if mode in ("RGB", "RGBA"):
        return pixels, "RGB"
    if mode in ("P", "L", "1", "I", "I;16"):
        return pixels.astype(np.uint8 if mode in ("P", "L", "1") else np.int64), "P" if mode == "P" else "L"
    raise InputError(f"{path} is a PNG of mode {mode}; a mask has a palette, grey values or colours")


def check_classes(numbers_HW: NDArray[Any], classes: int, path: Path, hint: str = "") -> Mask:
    """Return numbers as a mask.

    Raises:
        InputError: one is neither a class nor `IGNORED`.
    """
    wrong_HW = ((numbers_HW < 0) | (numbers_HW >= classes)) & (numbers_HW != IGNORED)
    if wrong_HW.any():
        values = np.unique(numbers_HW[wrong_HW])
        raise InputError(
            f"{path} has the value {some(map(str, values))} in {count_of(int(wrong_HW.sum()), 'pixel')}; a mask of "
            f"{classes} classes has 0 to {classes - 1}, and {IGNORED} where no class counts{hint}"
        )
    return numbers_HW.astype(np.uint8, copy=False)


def packed(colours: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the colours (..., 3) as the numbers R + 256 G + 65,536 B, as COCO numbers its segments."""
    numbers: NDArray[np.int64] = colours @ np.array([1, 256, 65_536])
    return numbers


def decoded_colours(image_HWC: Mask, numbers: Mapping[int, int], path: Path, what: str) -> Mask:
    """Return the number of each pixel's colour.

    Args:
        numbers: by packed colour.
        what: name of the set of colours, for the message.

    Raises:
        InputError: a colour has no number.
    """
    found, inverse = np.unique(packed(image_HWC), return_inverse=True)
    strange = [int(colour) for colour in found if int(colour) not in numbers]
    if strange:
        colours = some(f"({one & 255}, {one >> 8 & 255}, {one >> 16})" for one in strange)
        raise InputError(f"{path} is in colours, and of these {colours} is not in {what}: use masks with class numbers")
    table = np.array([numbers[int(colour)] for colour in found], np.uint8)
    return table[inverse.reshape(image_HWC.shape[:2])]


def check_files(folder: Path, names: Iterable[str], what: str, advice: str) -> None:
    """Raise InputError where a folder lacks files.

    Args:
        what: what the files are, and who names them: "masks of the images that .../train.txt lists".
        advice: how to fix it.
    """
    names = list(names)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [name for name in names if name not in there]
    if missing:
        where = folder if folder.is_dir() else f"{folder}, which does not exist,"
        raise InputError(f"{where} lacks {len(missing):,} of the {len(names):,} {what}: {some(missing)}; {advice}")
