"""Small square pictures, many in one file: a page of thousands of image elements would not be usable, one of sheets is.

T thumbnails, S pixels a side.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import UnreadableImage
from deepcluster.data.decode import decode
from deepcluster.data.loader import image_threads
from deepcluster.data.sources import ImageSource
from deepcluster.visualization.report.page import Blob

# Thumbnails side by side in a sheet, and in a whole sheet.
ACROSS: Final = 16
A_SHEET: Final = 256
QUALITY: Final = 72
# Of 0 … 6: 4 makes sheets of photos a seventh smaller than 0, in 0.5 ms a thumbnail (0.2 by 0, 1.3 by 6).
METHOD: Final = 4
MEDIA_TYPE: Final = "image/webp"
LEAST_SIDE: Final = 16
# Packed bytes of a thumbnail of photos, by the pixel and by the pixel of its side (imagenette at 16 … 96 pixels): to plan
# with, not to rely on.
BYTES_A_PIXEL, BYTES_A_SIDE = 0.18, 5.0
# Packed bytes that a thumbnail's number takes in the table of the rows, most of which may have none: at most.
NUMBER_BYTES: Final = 8


@dataclass(frozen=True)
class Thumbnails:
    """Sheets of square thumbnails; thumbnail t is tile `t % 256` of sheet `t // 256`, tiles lie line by line.

    Attributes:
        side: of a thumbnail, pixels.
        indices_T: image of each thumbnail, in the order in which they were wanted.
        sheets: WebP files, 16 tiles wide; the last one may be lower.
        unreadable: reason by index, of images that were wanted and could not be read.
    """

    side: int
    indices_T: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    sheets: Sequence[Blob] = ()
    unreadable: dict[int, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """T."""
        return len(self.indices_T)

    @property
    def packed_bytes(self) -> int:
        """What the sheets and the thumbnails' numbers take in the page, at most."""
        return sum(_packed_bytes(sheet.content) for sheet in self.sheets) + NUMBER_BYTES * self.count

    def number_of(self, index: int) -> int:
        """Number of an image's thumbnail, -1 where it has none."""
        return self._numbers.get(index, -1)

    def numbers_of(self, indices_R: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of images' thumbnails, -1 where they have none."""
        return np.fromiter((self._numbers.get(index, -1) for index in indices_R.tolist()), np.int64, len(indices_R))

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {index: number for number, index in enumerate(self.indices_T.tolist())}


def make_thumbnails(
    images: ImageSource,
    indices: NDArray[np.int64],
    *,
    side: int,
    max_bytes: int,
    workers: int,
    on_images: Callable[[int], None] = lambda images: None,
    check: Callable[[], None] = lambda: None,
) -> Thumbnails:
    """Thumbnails of images, in the order of `indices`, as many as fit; memory is that of a sheet and its images.

    The shorter side is brought to `side`, and the centre is cut out. Images that are smaller are enlarged.

    Args:
        indices: of the images, unique, the most important first.
        max_bytes: most bytes of all sheets and of the thumbnails' numbers, as they are in the page (`Blob.packed`).
        on_images: told how many more have been looked at.
        check: called between images; may raise to stop.
    """
    unreadable: dict[int, str] = {}
    made: list[int] = []
    sheets: list[Blob] = []
    left = max_bytes
    with image_threads(max(1, workers)) as pool:

        def tiles() -> Iterator[tuple[int, NDArray[np.uint8]]]:
            for first in range(0, len(indices), A_SHEET):
                some = indices[first : first + A_SHEET].tolist()
                for index, tile in zip(some, pool.map(partial(thumbnail, images, side=side), some), strict=True):
                    check()
                    on_images(1)
                    if isinstance(tile, str):
                        unreadable[index] = tile
                    else:
                        yield index, tile

        following = tiles()
        while len(sheet := list(islice(following, A_SHEET))):
            fitting, content = _fitting_sheet([tile for _, tile in sheet], left)
            if fitting:
                sheets.append(Blob(content, MEDIA_TYPE))
                made += [index for index, _ in sheet[:fitting]]
                left -= _packed_bytes(content) + NUMBER_BYTES * fitting
            if fitting < A_SHEET:
                break
    return Thumbnails(side, np.array(made, dtype=np.int64), sheets, unreadable)


def thumbnail(images: ImageSource, index: int, *, side: int) -> NDArray[np.uint8] | str:
    """The thumbnail (side, side, 3) of an image, or why it can't be read."""
    from PIL import Image

    try:
        image_HWC = decode(images.read(index), shorter_side=side)
    except (UnreadableImage, OSError) as fault:
        return str(fault)
    height, width, _ = image_HWC.shape
    shorter = min(height, width)
    top, left = (height - shorter) // 2, (width - shorter) // 2
    square = image_HWC[top : top + shorter, left : left + shorter]
    if shorter == side:
        return square
    # Pixels of tiny images stay visible as squares; enlarged a little, such squares would be of different sizes.
    way = Image.Resampling.NEAREST if 2 * shorter <= side else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(np.ascontiguousarray(square)).resize((side, side), way))


def fitting_side(side: int, wanted: int, max_bytes: int) -> int:
    """A side of which about `wanted` photos fit: `side`, or half or a quarter of it and so on, not under 16 pixels."""
    while side // 2 >= LEAST_SIDE and wanted * (BYTES_A_PIXEL * side**2 + BYTES_A_SIDE * side + NUMBER_BYTES) > max_bytes:
        side //= 2
    return side


def _fitting_sheet(tiles: Sequence[NDArray[np.uint8]], max_bytes: int) -> tuple[int, bytes]:
    """How many of the first tiles fit, and their sheet."""
    fitting = len(tiles)
    while fitting > 0:
        content = _sheet(tiles[:fitting])
        packed = _packed_bytes(content) + NUMBER_BYTES * fitting
        if packed <= max_bytes:
            return fitting, content
        fitting = min(fitting - 1, int(fitting * max_bytes / packed * 0.98))
    return 0, b""


def _sheet(tiles: Sequence[NDArray[np.uint8]]) -> bytes:
    from PIL import Image

    side = len(tiles[0])
    sheet = np.zeros((-(-len(tiles) // ACROSS) * side, ACROSS * side, 3), np.uint8)
    for number, tile in enumerate(tiles):
        line, column = divmod(number, ACROSS)
        sheet[line * side : (line + 1) * side, column * side : (column + 1) * side] = tile
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "WEBP", quality=QUALITY, method=METHOD)
    return file.getvalue()


def _packed_bytes(content: bytes) -> int:
    return -(-len(content) // 3) * 4
