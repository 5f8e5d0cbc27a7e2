"""Decoded once, read every epoch: images in memory as far as they fit, the rest decoded at each visit."""

import threading

import torch
from torch import Tensor

from deepcluster.data.decode import decode
from deepcluster.data.sources import ImageSource


class DecodedImages:
    """The images of a source as uint8 tensors, safe to read from many threads.

    Args:
        source: where the encoded images come from.
        memory_bytes: how much of the memory may hold decoded images; 0 keeps none.
    """

    def __init__(self, source: ImageSource, memory_bytes: int = 0) -> None:
        self.source = source
        self.free_bytes = memory_bytes
        self._kept: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def n_kept(self) -> int:
        """How many images are in memory."""
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Memory that they take."""
        return sum(image.nbytes for image in list(self._kept.values()))

    def get(self, index: int) -> Tensor:
        """Image (H, W, 3), uint8.

        Raises:
            UnreadableImage: it can't be read or decoded.
        """
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        image_HWC = torch.from_numpy(decode(self.source.read(index)).copy())
        with self._lock:
            if index not in self._kept and image_HWC.nbytes <= self.free_bytes:
                self.free_bytes -= image_HWC.nbytes
                self._kept[index] = image_HWC
        return image_HWC
