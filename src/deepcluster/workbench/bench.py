"""What evaluation and visualization work with: a trunk, a machine, images, one extraction of features.

N images, B batch, D features, C channels, H and W pixels.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.data.cache_plan import decoded_images, plan_cache
from deepcluster.data.loader import Loader
from deepcluster.data.sources import ImageSource
from deepcluster.data.storage.cache_folder import beside_of
from deepcluster.data.survey import survey
from deepcluster.data.views import ClusterView
from deepcluster.device import Machine, free_disk_bytes
from deepcluster.errors import InputError
from deepcluster.inference import LOOK_BATCH
from deepcluster.interruption import Interruption
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.progress import Reporter, size
from deepcluster.workbench.pooling import Pooled
from deepcluster.workbench.unfinished import Unfinished, weights_hash

FEATURES_FOLDER = "features"
# Left free on the disk of the cache.
DISK_RESERVE = 2 << 30
LARGEST_HALF = 65_504.0


@dataclass(frozen=True)
class Workbench:
    """A model on a machine, and who is told how far the work is.

    Attributes:
        model: as the person named it.
        trunk: in eval mode, on the device, channels last; nobody changes it.
        new_trunk: the same network with random weights that are a function of a seed; on the CPU.
        image_size: side of the images that it was made for, in pixels.
        reduce_to: shorter side to which larger photos are made smaller as they are decoded (0: never).
        workers: threads that prepare images.
        cache: folder of features and of unfinished work.
    """

    model: str
    trunk: Trunk
    new_trunk: Callable[[int], Trunk]
    image_size: int
    reduce_to: int
    machine: Machine
    workers: int
    reporter: Reporter
    interruption: Interruption
    cache: Path

    @cached_property
    def weights(self) -> str:
        """32 hex digits that change with the weights, the network, and the precision of its products."""
        machine = f"{self.machine.device.type} {self.machine.precision}"
        return hashlib.sha256(f"{weights_hash(self.trunk)} {self.trunk.arch} {machine}".encode()).hexdigest()[:32]

    def stages(self, names: str | None, *, usual: str = "all") -> tuple[str, ...]:
        """The stages that an option names: all, or some with commas between; `usual` where it says nothing.

        Raises:
            InputError: the trunk has no such stage.
        """
        names = usual if names is None else names
        if names == "all":
            return self.trunk.stages
        chosen = tuple(name.strip() for name in names.split(",") if name.strip())
        for name in chosen:
            self.trunk.check_stage(name)
        if not chosen:
            raise InputError(f"no stage is named; {self.trunk.arch} has {', '.join(self.trunk.stages)}")
        return chosen

    def copy_of_trunk(self) -> Trunk:
        """A copy to fine-tune, on the device."""
        return deepcopy(self.trunk)

    def unfinished(self, *facts: object) -> Unfinished:
        """The state of long work on this model that depends on these facts too."""
        return Unfinished(self.cache, self.interruption, self.weights, *facts)

    @contextmanager
    def loader(self, source: ImageSource, *, reduce_to: int | None = None) -> Iterator[Loader]:
        """Batches of the images of a source; decoded ones are kept in memory or in files, as `train --cache auto` does.

        Args:
            reduce_to: another one than the model's; 0: photos stay as large as they are.
        """
        reduce_to = self.reduce_to if reduce_to is None else reduce_to
        with self.reporter.track("looking at a sample", None) as progress:
            seen = survey(source, workers=self.workers, on_images=progress, at_least=0)
        plan = plan_cache("auto", None, seen.decoded_bytes(reduce_to), "")
        images = decoded_images(source, plan, reduce_to=reduce_to, data=_place(source), device=self.machine.device)
        with closing(Loader(images, workers=self.workers, device=self.machine.device)) as loader:
            yield loader

    def features(self, source: ImageSource, wanted: Sequence[Pooled]) -> dict[Pooled, Tensor]:
        """Rows of frozen features of the centre view of every image, made in one pass, and kept on disk by content.

        Returns:
            for each of `wanted` rows (N, D), float16 or float32, on the CPU; NaN where an image can't be read. They may lie
            in a file: read them in parts where N × D is large, and do not write to them.
        """
        files = {one: self.cache / FEATURES_FOLDER / f"{self._key(source, one)}.npy" for one in wanted}
        missing = [one for one, file in files.items() if not file.is_file()]
        made = self._extract(source, {one: files[one] for one in missing}) if missing else {}
        return {one: made[one] if one in made else _mapped(files[one]) for one in wanted}

    def _key(self, source: ImageSource, one: Pooled) -> str:
        facts = (self.weights, data_key(source), self.image_size, self.reduce_to, one, "features-1")
        return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:32]

    def _extract(self, source: ImageSource, files: dict[Pooled, Path]) -> dict[Pooled, Tensor]:
        widths = self.widths(list(files))
        total = sum(widths.values()) * len(source) * self.machine.feature_dtype.itemsize
        folder = self.cache / FEATURES_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        on_disk = total + DISK_RESERVE < free_disk_bytes(folder)
        if not on_disk:
            self.reporter.warn(f"features of {size(total)} are not kept: the disk of {folder} has no room for them")
        kind = np.float16 if self.machine.feature_dtype == torch.float16 else np.float32
        rooms = {one: _Room(file if on_disk else None, (len(source), widths[one]), kind) for one, file in files.items()}
        try:
            self._fill(source, {one: room.rows_ND for one, room in rooms.items()})
        except BaseException:
            for room in rooms.values():
                room.drop()
            raise
        return {one: room.keep() for one, room in rooms.items()}

    def widths(self, wanted: Sequence[Pooled]) -> dict[Pooled, int]:
        """D, the width of the rows of each of `wanted`."""
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return {one: rows.shape[1] for one, rows in self.describe(blank, wanted).items()}

    def describe(self, images_BCHW: Tensor, wanted: Sequence[Pooled]) -> dict[Pooled, Tensor]:
        """Rows (B, D) on the device of uint8 images, for each of `wanted`, in one pass and without gradient."""
        with torch.no_grad(), self.machine.autocast():
            stages = tuple(dict.fromkeys(one.stage for one in wanted))
            maps = self.trunk.maps(normalise(self.machine.put(images_BCHW)), stages)
            return {one: one.rows(maps[one.stage]) for one in wanted}

    def _fill(self, source: ImageSource, rows: dict[Pooled, NDArray[Any]]) -> None:
        view, indices_N = ClusterView(self.image_size), torch.arange(len(source))
        with self.loader(source) as loader, self.reporter.track("features", len(source)) as progress:
            for batch in loader.cluster_views(view, indices_N, LOOK_BATCH):
                if len(batch.indices_B):
                    for one, rows_BD in self.describe(batch.images_BCHW, list(rows)).items():
                        bounded = rows_BD.float().clamp(-LARGEST_HALF, LARGEST_HALF).to(self.machine.feature_dtype)
                        rows[one][batch.indices_B.numpy()] = bounded.cpu().numpy()
                progress(len(batch.indices_B))
                self.interruption.check()
            bad = sorted(loader.unreadable)
            for array in rows.values():
                array[bad] = np.nan


class _Room:
    """Rows that are being made: in a file beside the one they will be in, or in memory."""

    def __init__(self, file: Path | None, shape: tuple[int, int], kind: type[Any]) -> None:
        self.file = file
        self.beside = beside_of(file) if file is not None else None
        if self.beside is None:
            self.rows_ND = np.empty(shape, kind)
        else:
            self.rows_ND = np.lib.format.open_memmap(self.beside, "w+", kind, shape)

    def keep(self) -> Tensor:
        """The rows, in their file where they have one."""
        if self.file is None or self.beside is None:
            return torch.from_numpy(self.rows_ND)
        self.rows_ND.flush()  # type: ignore[attr-defined]
        self.beside.replace(self.file)
        return _mapped(self.file)

    def drop(self) -> None:
        """Delete the file."""
        if self.beside is not None:
            self.beside.unlink(missing_ok=True)


def _mapped(file: Path) -> Tensor:
    os.utime(file)  # used today, as `cache info` tells
    return torch.from_numpy(np.load(file, mmap_mode="c"))


def data_key(source: ImageSource) -> str:
    """64 hex digits that change with the names, the order and the content of the images, as their stamps tell it."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in range(len(source)):
        digest.update(f"\0{source.name(index)}\0{source.stamp(index)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _place(source: ImageSource) -> str:
    path = source.path(0)
    return source.describe() if path is None else str(path.parent)


def readable(rows_ND: Tensor) -> Tensor:
    """Which rows (N,) hold numbers: those of images that can be read."""
    return ~rows_ND[:, 0].isnan()
