"""Decoded once, read every epoch: where decoded images are kept, and how they are read.

N images, B of them, H height, W width.
"""

import hashlib
import socket
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.addresses import whole_address
from deepcluster.core.device import free_disk_bytes, free_memory_bytes
from deepcluster.core.distributed import ONE_PROCESS, Ranks, ranks_here
from deepcluster.core.errors import UnreadableImage
from deepcluster.core.files import usual_cache_folder
from deepcluster.core.shared_memory import SharedFile
from deepcluster.core.text import size
from deepcluster.data.decode import decode
from deepcluster.data.pack import DISK_RESERVE, Pack
from deepcluster.data.resample import Ragged
from deepcluster.data.sources import ImageSource, fingerprint

# Of the free memory, what decoded images may take: by default, and where the user asks for it. Of a disk, by default.
AUTO_SHARE, MEMORY_SHARE, DISK_SHARE = 0.25, 0.5, 0.5
# More than is expected of a sample, by this: images differ in size.
SAFETY = 1.1
# Of a GPU's free memory, what images that are kept there may take.
GPU_SHARE = 0.5
# Images of one size up to this many pixels a side are scaled together on a processor; above, one after the other is quicker.
SMALL_SIDE = 64
ENDING = ".pack"


@dataclass(frozen=True)
class CachePlan:
    """Where decoded images are kept.

    Attributes:
        needed_bytes: what all of them take, as far as a sample tells.
        memory_bytes: how much memory of the machine they may take.
        file: the pack on a disk; None where there is none.
        about: what it holds, in words.
    """

    needed_bytes: int
    memory_bytes: int = 0
    file: Path | None = None
    about: str = ""

    @property
    def is_kept(self) -> bool:
        """True if any images are kept."""
        return self.file is not None or self.memory_bytes > 0

    def describe(self) -> str:
        """Return the plan in a few words, for the opening lines."""
        if self.file is not None:
            return f"{size(self.needed_bytes)} in {self.file}"
        if self.memory_bytes >= self.needed_bytes:
            return f"{size(self.needed_bytes)} in memory"
        if self.memory_bytes:
            return f"{size(self.memory_bytes)} of {size(self.needed_bytes)} in memory, the others decoded in each epoch"
        return "none, all images are decoded in each epoch"


def plan_cache(
    cache: str,
    folder: Path | None,
    needed_bytes: int,
    source: ImageSource,
    *,
    reduce_to: int,
    data: str | Path | Sequence[str | Path],
) -> CachePlan:
    """Return where `cache` (auto, memory, none, or a folder) keeps decoded images.

    auto: memory, if a quarter of what is free is enough; else a file in the usual cache folder, if half of its disk's free
    room is; else memory as far as it goes.

    Args:
        folder: the folder that `cache` names; None for the other values.
        reduce_to: shorter side to which larger images are reduced; 0: never.
        data: what the source was opened from.
    """
    needed_bytes = int(SAFETY * needed_bytes)
    places = [whole_address(one) for one in ([data] if isinstance(data, str | Path) else data)]
    about = f"decoded images of {', '.join(places)}" + (f", shorter side at most {reduce_to}" if reduce_to else "")
    name = f"images/{_name_of(source, about)}{ENDING}"
    if folder is not None:
        return CachePlan(needed_bytes, file=folder / name, about=about)
    if cache == "none":
        return CachePlan(needed_bytes)
    # The ranks of a machine share them.
    memory_bytes = int((AUTO_SHARE if cache == "auto" else MEMORY_SHARE) * free_memory_bytes()) * ranks_here()
    file = usual_cache_folder() / name
    there = 0
    with suppress(OSError):
        there = file.stat().st_size
    room = free_disk_bytes(file.parent) + there
    if cache == "auto" and needed_bytes > memory_bytes and needed_bytes <= DISK_SHARE * room - DISK_RESERVE:
        return CachePlan(needed_bytes, file=file, about=about)
    return CachePlan(needed_bytes, memory_bytes)


def _name_of(source: ImageSource, about: str) -> str:
    """Return 16 hex digits that change with the images, with what is kept of them, and with the version of the decoders."""
    versions = [version(package) for package in ("pillow", "simplejpeg", "torch")]
    key = "\n".join(["pack-1", fingerprint(source), *versions, about])
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]


class DecodedImages:
    """The images of a source as uint8 tensors; may be sent to other processes.

    Args:
        source: where encoded images come from.
        shorter_side: larger images are reduced to this as they are decoded; None keeps them as they are.
        pack: where decoded images are kept; None keeps none.
    """

    def __init__(self, source: ImageSource, *, shorter_side: int | None = None, pack: Pack | None = None) -> None:
        self.source, self.shorter_side, self.pack = source, shorter_side, pack
        self._resident: Ragged | None = None

    def __len__(self) -> int:
        return len(self.source)

    def get(self, index: int) -> Tensor:
        """Return an image (H, W, 3) as a tensor.

        Raises:
            UnreadableImage: it can't be read or decoded.
        """
        return _tensor(self.pixels(index))

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """Return an image (H, W, 3), which may be read-only; raise UnreadableImage as `get` does."""
        pixels_HWC = self.pack.get(index, self.source.stamp) if self.pack is not None else None
        if pixels_HWC is None:
            pixels_HWC = self.decode(index)
            if self.pack is not None and not self.pack.complaint:
                self.pack.fill(range(index, index + 1), self.source.stamp, lambda _: pixels_HWC, wait=False)
        return pixels_HWC

    def decode(self, index: int) -> NDArray[np.uint8]:
        """Return an image (H, W, 3) of the source, whatever is kept.

        Raises:
            UnreadableImage: it can't be read or decoded.
        """
        return decode(self.source.read(index), shorter_side=self.shorter_side)

    def some(self, indices_B: NDArray[np.int64]) -> tuple[list[Tensor] | Tensor, NDArray[np.int64] | slice, dict[int, str]]:
        """Return the readable ones of some images, their places in `indices_B`, and by index why others can't be read.

        Images are one tensor (B, H, W, 3) if they are all small and of one size.
        """
        together = self.pack.gather(indices_B, SMALL_SIDE, self.source.stamp) if self.pack is not None else None
        if together is not None:
            return torch.from_numpy(together), slice(None), {}
        images: list[NDArray[np.uint8]] = []
        rows: list[int] = []
        unreadable = {}
        for row, index in enumerate(indices_B.tolist()):
            try:
                images.append(self.pixels(index))
                rows.append(row)
            except UnreadableImage as fault:
                unreadable[index] = str(fault)
        if images and max(images[0].shape) <= SMALL_SIDE and all(image.shape == images[0].shape for image in images):
            together = np.stack(images)
        kept = np.array(rows, np.int64) if unreadable else slice(None)
        return list(map(_tensor, images)) if together is None else torch.from_numpy(together), kept, unreadable

    def resident(self, device: torch.device, unreadable: dict[int, str]) -> Ragged | None:
        """Return all readable images on a GPU, if they are kept and take no more than half of its free memory."""
        if self._resident is None and self.pack is not None and device.type == "cuda":
            sizes_N2, pixels = self.pack.sizes_N2.astype(np.int64), self.pack.pixels
            missing = set(np.flatnonzero(sizes_N2[:, 0] == 0).tolist())
            if pixels.nbytes > GPU_SHARE * torch.cuda.mem_get_info(device)[0] or missing - unreadable.keys():
                return None
            if any(self.pack.get(index) is None for index in set(range(len(self))) - missing):
                return None  # Damaged: it is decoded again on the way.
            pixels_P3 = torch.from_numpy(pixels).view(-1, 3).to(device)
            torch.cuda.synchronize(device)  # Other streams will read it.
            self._resident = Ragged(pixels_P3, self.pack.starts_N // 3, sizes_N2)
        return self._resident


def _tensor(pixels_HWC: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels_HWC if pixels_HWC.flags.writeable else pixels_HWC.copy())


def decoded_images(
    source: ImageSource,
    plan: CachePlan,
    *,
    reduce_to: int,
    ranks: Ranks = ONE_PROCESS,
    tell: Callable[[str], None] = warnings.warn,
) -> DecodedImages:
    """Return the images of a source, kept as the plan says; the ranks of a machine keep them once.

    Args:
        reduce_to: shorter side to which larger images are reduced; 0: never.
        ranks: all of them call this.
        tell: is given a sentence if nothing can be kept.
    """
    pack = None
    if plan.file is not None:
        try:
            pack = Pack(plan.file, len(source), plan.about)
        except OSError as fault:
            reason = (fault.strerror or str(fault)).lower()
            tell(f"{plan.file} can't be written to ({reason}): all images are decoded in each epoch")
    elif plan.memory_bytes:
        mine = SharedFile()
        here = _machine()
        first = next(path for there, path in ranks.gather_objects((here, mine.path)) if there == here)
        pack = Pack(mine, len(source), most_bytes=plan.memory_bytes)
        ranks.barrier()
        pack = pack if first == mine.path else Pack(Path(first), len(source), most_bytes=plan.memory_bytes)
    return DecodedImages(source, shorter_side=reduce_to or None, pack=pack)


def _machine() -> str:
    """Return what the processes that can open each other's memory have in common; containers may share a host's name."""
    known = [socket.gethostname()]
    with suppress(OSError):
        known += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return " ".join(known)
