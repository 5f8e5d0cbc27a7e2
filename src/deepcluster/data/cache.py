"""Decoded once, read every epoch: images in memory as far as they fit, or in files, the rest decoded at each visit.

N images, B of them, H height, W width.
"""

import threading

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.errors import UnreadableImage
from deepcluster.data.decode import decode
from deepcluster.data.image_shards import ImageShards
from deepcluster.data.sources import ImageSource

# Images of one size up to this many pixels a side are kept as one tensor and scaled together (`resample`); above, a
# processor is quicker with one image after the other. A GPU takes any.
SMALL_SIDE = 64
GPU_SIDE = 512
GPU_SHARE = 0.25


class DecodedImages:
    """The images of a source as uint8 tensors, safe to read from many threads.

    Args:
        source: where the encoded images come from.
        memory_bytes: how much of the memory may hold decoded images; 0 keeps none.
        shorter_side: larger images are made smaller to this, as they are decoded; None keeps them as they are.
        shards: files of decoded images, read before anything is decoded and filled with what is.
        device: where views are made of images that are all of one size.
    """

    def __init__(
        self,
        source: ImageSource,
        memory_bytes: int = 0,
        *,
        shorter_side: int | None = None,
        shards: ImageShards | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.source = source
        self.shorter_side = shorter_side
        self.shards = shards
        self.free_bytes = memory_bytes
        self.n_kept, self.kept_bytes = 0, 0
        self._told_damaged, self._told_complaint = 0, False
        # Views are made on GPUs of NVIDIA and AMD alone: others have no float64.
        self._device = device if device is not None and device.type == "cuda" else torch.device("cpu")
        self._kept: dict[int, Tensor] = {}
        self._planes_NHCW: Tensor | None = None
        self._has_plane_N = np.zeros(len(source), dtype=bool)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def get(self, index: int) -> Tensor:
        """Image (H, W, 3), uint8; raises UnreadableImage where it can't be read or decoded."""
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        if self._planes_NHCW is not None and self._has_plane_N[index]:
            return self._planes_NHCW[index].cpu().permute(0, 2, 1)
        image_HWC = None if self.shards is None else self.shards.get(index)
        if isinstance(image_HWC, str):
            raise UnreadableImage(image_HWC)
        if image_HWC is None:
            image_HWC = self._decoded(index)
        with self._lock:
            self._keep(index, image_HWC)
        return image_HWC

    def together(self, indices_B: Tensor) -> Tensor | None:
        """The images (B, H, 3, W) where they are all kept and of one small size, on the device; else None."""
        if self._planes_NHCW is None or not self._has_plane_N[indices_B.numpy()].all():
            return None
        if self._planes_NHCW.device.type != self._device.type:
            self._move_planes()
        planes_NHCW = self._planes_NHCW
        if planes_NHCW.device.type == "cpu" and max(planes_NHCW.shape[1:]) > SMALL_SIDE:
            return None
        return planes_NHCW.index_select(0, indices_B.to(planes_NHCW.device))

    def troubles(self) -> list[str]:
        """What went wrong with the files since the last call, in sentences."""
        shards, told = self.shards, []
        if shards is None:
            return []
        if shards.n_damaged > self._told_damaged:
            more = shards.n_damaged - self._told_damaged
            told.append(f"{more} damaged files of decoded images in {shards.folder} are rebuilt")
            self._told_damaged = shards.n_damaged
        if shards.complaint is not None and not self._told_complaint:
            told.append(f"no more decoded images are kept: {shards.complaint}; the others are decoded at each visit")
            self._told_complaint = True
        return told

    def _decoded(self, index: int) -> Tensor:
        stamp = self.source.stamp(index) if self.shards is not None else ""  # before it is read: it may change meanwhile
        is_read = False  # Else its server may be down, say: the next run may read it.
        try:
            encoded = self.source.read(index)
            is_read = True
            pixels_HWC = decode(encoded, shorter_side=self.shorter_side)
        except UnreadableImage as fault:
            if self.shards is not None:
                self.shards.put(index, str(fault) if is_read else None, stamp)
            raise
        image_HWC = torch.from_numpy(pixels_HWC if pixels_HWC.flags.writeable else pixels_HWC.copy())
        if self.shards is not None:
            self.shards.put(index, image_HWC, stamp)
        return image_HWC

    def _keep(self, index: int, image_HWC: Tensor) -> None:
        """Keep an image if there is room for it; called with the lock."""
        if index in self._kept or (self._planes_NHCW is not None and bool(self._has_plane_N[index])):
            return
        height, width, _ = image_HWC.shape
        # If all images fit into memory at the size of the first one, and it is small: one tensor for all of that size.
        needed = len(self.source) * height * width * 3
        most_side = SMALL_SIDE if self._device.type == "cpu" else GPU_SIDE
        if self.n_kept == 0 and max(height, width) <= most_side and needed <= self.free_bytes:
            # Untouched, it takes no memory.
            self._planes_NHCW = torch.empty(len(self.source), height, 3, width, dtype=torch.uint8)
            self.free_bytes -= needed
        if self._planes_NHCW is not None and self._planes_NHCW.shape[1:] == (height, 3, width):
            self._planes_NHCW[index] = image_HWC.permute(0, 2, 1)
            self._has_plane_N[index] = True
        elif image_HWC.nbytes <= self.free_bytes:
            self.free_bytes -= image_HWC.nbytes
            self._kept[index] = image_HWC
        else:
            return
        self.n_kept, self.kept_bytes = self.n_kept + 1, self.kept_bytes + image_HWC.nbytes

    def _move_planes(self) -> None:
        """To the GPU, once they are complete, if they take no more than a quarter of what is free there."""
        with self._lock:
            planes_NHCW = self._planes_NHCW
            if planes_NHCW is None or planes_NHCW.device.type == self._device.type or not bool(self._has_plane_N.all()):
                return
            free_bytes, _ = torch.cuda.mem_get_info(self._device)
            if planes_NHCW.nbytes <= GPU_SHARE * free_bytes:
                self._planes_NHCW = planes_NHCW.to(self._device)


class KeptViews:
    """Views that are the same every time, of images that are all in memory: made once."""

    def __init__(self, count: int, size: int) -> None:
        # Untouched, it takes no memory.
        self._views_NSSC = torch.empty(count, size, size, 3, dtype=torch.uint8)
        self._there_N = torch.zeros(count, dtype=torch.bool)

    def take(self, indices_B: Tensor) -> Tensor | None:
        """The views (B, 3, size, size), channels last in memory, where all of them have been made."""
        if not bool(self._there_N[indices_B].all()):
            return None
        return self._views_NSSC.index_select(0, indices_B).permute(0, 3, 1, 2)

    def put(self, indices_B: Tensor, views_BCHW: Tensor) -> None:
        """Keep views."""
        self._views_NSSC[indices_B] = views_BCHW.permute(0, 2, 3, 1)
        self._there_N[indices_B] = True
