"""Where decoded images are kept from one epoch to the next: in memory, in files, or nowhere."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from deepcluster.core.device import free_disk_bytes, free_memory_bytes
from deepcluster.core.text import size
from deepcluster.data.cache import DecodedImages
from deepcluster.data.image_shards import DISK_RESERVE, FORMAT, ImageShards
from deepcluster.data.sources import fingerprint
from deepcluster.data.sources.image_source import ImageSource
from deepcluster.data.storage import file_stamp, usual_cache_folder
from deepcluster.data.storage.addresses import is_address

# Of the free memory, what decoded images may take: by themselves, and where the person asks for it.
AUTO_SHARE, MEMORY_SHARE = 0.25, 0.5
DISK_SHARE = 0.5
# More than is expected of a sample, by this: images differ in size.
SAFETY = 1.1


@dataclass(frozen=True)
class CachePlan:
    """Where decoded images are kept.

    Attributes:
        needed_bytes: what all of them take, as far as a sample tells.
        memory_bytes: how much of the memory they may take.
        folder: where their files are; None where there are none.
    """

    needed_bytes: int
    memory_bytes: int = 0
    folder: Path | None = None

    def describe(self) -> str:
        """The plan in a few words, for the opening lines."""
        if self.folder is not None:
            return f"{size(self.needed_bytes)} in {self.folder}, filled by the first epoch"
        if self.memory_bytes >= self.needed_bytes:
            return f"{size(self.needed_bytes)} in memory"
        if self.memory_bytes:
            return f"{size(self.memory_bytes)} of {size(self.needed_bytes)} in memory, the others decoded at each visit"
        return "none, all decoded at each visit"


def plan_cache(cache: str, folder: Path | None, needed_bytes: int, name: str = "") -> CachePlan:
    """The plan that `cache` (auto, memory, none, or a folder) asks for; `name` is what `name_of` calls the images.

    auto: memory, where a quarter of what is free is enough; else files in the usual cache folder, where half of its disk's
    free room is; else memory as far as it goes.
    """
    needed_bytes = int(SAFETY * needed_bytes)
    if folder is not None:
        return CachePlan(needed_bytes, folder=folder)
    if cache == "none":
        return CachePlan(needed_bytes)
    memory_bytes = int((AUTO_SHARE if cache == "auto" else MEMORY_SHARE) * free_memory_bytes())
    usual = usual_cache_folder()
    if cache == "auto" and needed_bytes > memory_bytes and needed_bytes <= DISK_SHARE * _room(usual, name) - DISK_RESERVE:
        return CachePlan(needed_bytes, folder=usual)
    return CachePlan(needed_bytes, memory_bytes)


def decoded_images(
    source: ImageSource,
    plan: CachePlan,
    *,
    reduce_to: int,
    data: str | Path | Sequence[str | Path],
    device: torch.device | None = None,
) -> DecodedImages:
    """The images of a source, kept as the plan says.

    Args:
        reduce_to: shorter side to which larger images are made smaller; 0: never.
        data: what the source was opened from.
        device: where views of small images are made.
    """
    shards = None
    if plan.folder is not None:
        about = {"data": _places(data), "images": source.describe(), "reduce_to": reduce_to}
        folder = plan.folder / "images" / name_of(source, reduce_to=reduce_to, data=data)
        shards = ImageShards(folder, source, about, plan.needed_bytes)
    shorter_side = reduce_to or None
    return DecodedImages(source, plan.memory_bytes, shorter_side=shorter_side, shards=shards, device=device)


def name_of(source: ImageSource, *, reduce_to: int, data: str | Path | Sequence[str | Path]) -> str:
    """16 hex digits that change with the images, with their size, and with the version of what decodes them."""
    versions = [version(package) for package in ("pillow", "simplejpeg", "torch")]
    key = "\n".join(map(str, [FORMAT, reduce_to, fingerprint(source), *versions, *_places(data)]))
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _places(data: str | Path | Sequence[str | Path]) -> list[str]:
    where = [str(data)] if isinstance(data, str | Path) else [str(one) for one in data]
    return [one if is_address(one) else str(Path(one).absolute()) for one in where]


def _room(folder: Path, name: str) -> int:
    """Bytes free on the disk of a cache folder, with those that these very images take there already."""
    files = (folder / "images" / name).glob("*") if name else ()
    kept = sum(int(file_stamp(path).partition("-")[0] or 0) for path in files)
    return free_disk_bytes(folder) + kept
