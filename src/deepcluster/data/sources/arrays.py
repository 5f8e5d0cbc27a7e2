"""Decoded images in a NumPy file, with or without labels: N images, H height, W width, C channels."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.files import begin_of, check_regular, file_stamp
from deepcluster.core.kinds import kind_of
from deepcluster.core.text import count_of, printable
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.sources.labels import NoLabels, class_names, notes_on

_IMAGE_KEYS = ("images", "x", "data", "arr_0", "x_train")
_LABEL_KEYS = ("labels", "y", "y_train")


class ArraySource(ImageSource):
    """The images in a `.npy` or `.npz` file."""

    def __init__(self, file: Path) -> None:
        """Open `file`; raises InputError if it holds no uint8 images of a known shape."""
        images, labels = _read_arrays(file)
        self._file, self._opened = file.absolute(), file_stamp(file)
        self._images_NHWC = _as_NHWC(images, file)
        names = [] if labels is None else _array_labels(labels, len(images), file)
        super().__init__(names if any(names) else None)
        self._notes = notes_on(names, "")

    def __reduce__(self) -> tuple[type["ArraySource"], tuple[Path]]:
        """Pickle the path only: a pickled memory map would contain all images."""
        return ArraySource, (self._file,)

    def __len__(self) -> int:
        return len(self._images_NHWC)

    def name(self, index: int) -> str:
        return f"{printable(self._file.name)}::{index:0{max(6, len(str(len(self) - 1)))}}"

    def read(self, index: int) -> NDArray[np.uint8]:
        return np.array(self._images_NHWC[index], order="C")

    def stamp(self, index: int) -> str:
        return self._opened

    def holder(self, index: int) -> str:
        return str(self._file)

    def changed(self) -> str | None:
        return None if file_stamp(self._file) == self._opened else f"{printable(self._file.name)} has been overwritten"

    def details(self) -> str:
        _, height, width, *_ = self._images_NHWC.shape
        parts = [f"of {width} x {height} pixels in {printable(self._file.name)}", *self._notes]
        return ", ".join(parts)


def _read_arrays(file: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Return the arrays of images and of labels in `file`."""
    try:
        check_regular(file)
        if file.suffix.lower() == ".npy":
            return np.load(file, mmap_mode="r", allow_pickle=False), None
        with np.load(file, allow_pickle=False) as arrays:
            found, lower = ", ".join(arrays.files) or "nothing", {key.lower(): key for key in arrays.files}
            images = next((arrays[lower[key]] for key in _IMAGE_KEYS if key in lower), None)
            labels = next((arrays[lower[key]] for key in _LABEL_KEYS if key in lower), None)
    except Exception as error:  # Damaged archives raise a dozen types, from zipfile, zlib, struct and NumPy.
        begin = begin_of(file)
        if begin and not begin.startswith((b"\x93NUMPY", b"PK", b"\x80")):
            raise InputError(f"{file} is not a NumPy file: it is {kind_of(begin)}") from error
        if "allow_pickle" in str(error) or "pickled" in str(error):
            raise InputError(
                f"{file} holds Python objects, which could run code when loaded; save the images as one uint8 array"
            ) from error
        raise InputError(f"{file} can't be read as a NumPy file: {error}") from error
    if images is None:
        raise InputError(f"{file} has no array named {' or '.join(_IMAGE_KEYS)}: it holds {found}")
    return images, labels


def _as_NHWC(images: NDArray[Any], file: Path) -> NDArray[np.uint8]:
    """Check the images of `file`; N x C x H x W is viewed as N x H x W x C if it can't be anything else."""
    wanted = "wanted N x H x W, or N x H x W x 1, 3 or 4, of uint8"
    if images.dtype != np.uint8:
        raise InputError(f"{file} holds images of {images.dtype}; {wanted} (0 = black, 255 = full)")
    channels_first = images.ndim == 4 and images.shape[3] not in (1, 3, 4) and images.shape[1] in (1, 3, 4)
    images_NHWC = images.transpose(0, 2, 3, 1) if channels_first else images
    if not images.size or not (images.ndim == 3 or (images.ndim == 4 and images_NHWC.shape[3] in (1, 3, 4))):
        raise InputError(f"{file} holds an array of shape {' x '.join(map(str, images.shape)) or 'none'}; {wanted}")
    return images_NHWC


def _array_labels(labels: NDArray[Any], count: int, file: Path) -> list[str]:
    if labels.shape not in ((count,), (count, 1)):
        shape = " x ".join(map(str, labels.shape)) or "none"
        raise InputError(f"{file} holds {count_of(count, 'image')}, but labels of shape {shape}; wanted one label per image")
    try:
        return class_names(labels.ravel())
    except NoLabels as error:
        raise InputError(f"{file} holds {error} as labels; wanted one number (-1 = unknown) or text per image") from error
