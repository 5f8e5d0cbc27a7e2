"""A trained trunk with its clusters, applied to images. Embedding, assignment, evaluation, pictures and the report use it.

N images, B batch, D features, P components, K clusters.
"""

import hashlib
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import UNASSIGNED, Assignment
from deepcluster.core.device import Machine, free_disk_bytes
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.files import usual_cache_folder, written_beside
from deepcluster.core.options import plain
from deepcluster.core.progress import Reporter
from deepcluster.core.retry import end_waits
from deepcluster.core.text import size
from deepcluster.core.work import Interruption, Work
from deepcluster.data.cache import DecodedImages, decoded_images, plan_cache
from deepcluster.data.loader import Loader, usual_workers
from deepcluster.data.sources import ImageSource
from deepcluster.data.survey import survey
from deepcluster.data.views import ClusterView
from deepcluster.models.archs import ARCHITECTURES, LIBRARIES, check_arch
from deepcluster.models.trunk import Trunk
from deepcluster.run.features import FEATURE_BATCH, Pooled, extract, feature_batches, image_features, make_run_trunk
from deepcluster.run.folder import RunFolder, load_checkpoint
from deepcluster.run.resumable import ResumableState, weights_hash
from deepcluster.run.settings import Settings
from deepcluster.run.space import ProjectedSpace, Space, space_of

UNTRAINED = "untrained:"
# Side in pixels of the images that untrained trunks are made for, where it is not 224.
USUAL_IMAGE_SIZE = {"alexnet-small": 32, "resnet18-small": 32}
FEATURES_FOLDER = "features"
# Bytes left free on the disk of the cache.
DISK_RESERVE = 2 << 30
LARGEST_HALF = 65_504.0


@dataclass(frozen=True)
class Model:
    """A trunk with its clusters, ready to be applied to images.

    Attributes:
        name: what it was loaded from.
        trunk: in eval mode, on the machine's device. Nothing changes it.
        settings: settings of its run.
        machine: device and precision.
        space, assignment: its clusters, and what takes features to the points that were clustered; None without clusters.
        workers: processes that prepare images.
        work: shows progress and answers requests to stop.
        cache: folder of kept features and of unfinished work.
    """

    name: str
    trunk: Trunk
    settings: Settings
    machine: Machine
    space: Space | None = None
    assignment: Assignment | None = None
    workers: int = field(default_factory=usual_workers)
    work: Work = field(default_factory=Work)
    cache: Path = field(default_factory=usual_cache_folder)

    def on(
        self, device: str = "auto", *, precision: str | None = None, workers: int | None = None, work: Work | None = None
    ) -> "Model":
        """Return the model on a device.

        Args:
            precision: "fp32", "bf16" or "fp64"; that of its run by default.
            workers: processes that prepare images; one per core by default.
        """
        machine = Machine.choose(device, precision or self.settings.precision)
        trunk = self.trunk.to(device=machine.device, dtype=machine.dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        space = self.space
        if isinstance(space, ProjectedSpace):
            space = replace(space, projection=space.projection.to(machine.device, machine.dtype).eval(), machine=machine)
        workers = usual_workers() if workers is None else workers
        return replace(self, trunk=trunk, machine=machine, space=space, workers=workers, work=work or self.work)

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the trunk was trained on."""
        return self.settings.image_size

    @property
    def centroids_KP(self) -> Tensor | None:
        """Centroids of its clusters; None without clusters."""
        return None if self.assignment is None else self.assignment.centroids_KP

    @cached_property
    def weights(self) -> str:
        """32 hex digits that change with the weights, the architecture, the device type and the precision."""
        machine = f"{self.machine.device.type} {self.machine.precision}"
        return hashlib.sha256(f"{weights_hash(self.trunk)} {self.trunk.arch} {machine}".encode()).hexdigest()[:32]

    def stages(self, names: str | None, *, usual: str = "all") -> tuple[str, ...]:
        """Return the stages that an option names: "all", or names separated by commas; `usual` for None.

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
        """Return a copy of the trunk to fine-tune, on the device."""
        return deepcopy(self.trunk)

    def new_trunk(self, seed: int) -> Trunk:
        """Return the same network with random weights that are a function of a seed, on the CPU."""
        return make_run_trunk(replace(self.settings, seed=seed))

    def resumable(self, *facts: object) -> ResumableState:
        """Return the state of long work on this model that also depends on these facts."""
        return ResumableState(self.cache, self.work, self.weights, *facts)

    @contextmanager
    def loader(self, source: ImageSource, *, reduce_to: int | None = None, keep: bool = True) -> Iterator[Loader]:
        """Yield a loader of the images of a source.

        Args:
            reduce_to: shorter side to which photos are reduced as they are decoded, 0 for never; that of the run by default.
            keep: keep decoded images in memory or in files, as `train --cache auto` does, for more than one pass.
        """
        reduce_to = self.settings.reduce_to if reduce_to is None else reduce_to
        if keep:
            with self.work.reporter.track("reading a sample", None) as progress:
                sample = survey(source, workers=self.workers, on_images=progress, at_least=0)
            path, needed = source.path(0), sample.decoded_bytes(reduce_to)
            place = source.describe() if path is None else str(path.parent)
            plan = plan_cache("auto", None, needed, source, reduce_to=reduce_to, data=place)
            images = decoded_images(source, plan, reduce_to=reduce_to, tell=self.work.reporter.warn)
        else:
            images = DecodedImages(source, shorter_side=reduce_to or None)
        warn = self.work.reporter.warn
        with closing(Loader(images, workers=self.workers, device=self.machine.device, tell=warn)) as loader:
            yield loader

    def features(
        self, source: ImageSource, *, stage: str | None = None, batch_size: int = FEATURE_BATCH
    ) -> tuple[Tensor, dict[int, str]]:
        """Return rows (N, D), float32 on the CPU, of the images of a source, and why some can't be read (rows of NaN).

        Args:
            stage: stage of the trunk, averaged over its map; `trunk.embed_stage` by default.
        """
        stage = stage or self.trunk.embed_stage
        self.trunk.check_stage(stage)
        with self.loader(source, keep=False) as loader, self.work.track("features", len(source)) as advance:
            features_ND = image_features(
                self.trunk, loader, self.machine, stage, self.image_size, batch_size=plain(batch_size), advance=advance
            )
        return features_ND.float(), loader.unreadable

    def batches(
        self, source: ImageSource, indices: Tensor, *, quarters_N: Tensor | None = None
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield rows_BD of the clustered stage, on the device, and indices_B of some images of a source."""
        stage, size = self.settings.cluster_stage, self.image_size
        with self.loader(source, keep=False) as loader, self.work.track("features", len(indices)) as advance:
            yield from feature_batches(
                self.trunk, loader, self.machine, stage, size, indices=indices, quarters_N=quarters_N, advance=advance
            )

    def points(self, features_ND: Tensor) -> Tensor:
        """Return points (N, P), float32 on the CPU, of rows of `settings.cluster_stage`, in the space of the clusters.

        Raises:
            InputError: the model has no clusters.
        """
        space, _ = self.clusters()
        # As many rows at a time as in training: products of other shapes are rounded differently.
        parts = [space.transform(rows_BD) for rows_BD in features_ND.split(FEATURE_BATCH) if len(rows_BD)]
        return torch.cat(parts) if parts else torch.empty(0, space.n_components)

    def clusters(self) -> tuple[Space, Assignment]:
        """Return the space of the clusters and the assignment of the run's images.

        Raises:
            InputError: the model has no clusters.
        """
        if self.space is None or self.assignment is None:
            raise InputError(f"{self.name} has no clusters yet: train it for an epoch first")
        return self.space, self.assignment

    def assign(
        self, source: ImageSource, *, batch_size: int = FEATURE_BATCH
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], dict[int, str]]:
        """Return clusters (N,), -1 for unreadable images, distances (N,) to the centroids, and why images can't be read.

        Raises:
            InputError: the model has no clusters.
        """
        _, assignment = self.clusters()
        features_ND, unreadable = self.features(source, stage=self.settings.cluster_stage, batch_size=batch_size)
        finite_N = torch.isfinite(features_ND).all(dim=1)
        cluster_N = torch.full((len(source),), UNASSIGNED)
        distance_N = torch.full((len(source),), torch.nan)
        labels, squared = assignment.nearest(self.points(features_ND[finite_N]))
        cluster_N[finite_N], distance_N[finite_N] = labels, squared.sqrt()
        return cluster_N.numpy(), distance_N.numpy(), unreadable

    def rows(self, source: ImageSource, wanted: Sequence[Pooled]) -> dict[Pooled, Tensor]:
        """Return frozen features of the centre view of each image, extracted in one pass and kept on disk by content.

        Returns:
            for each of `wanted` rows (N, D), float16 or float32, on the CPU; NaN for unreadable images. They may lie in a
            file: read them in parts where N × D is large, and do not write to them.
        """
        files = {one: self.cache / FEATURES_FOLDER / f"{self._key(source, one)}.npy" for one in wanted}
        missing = {one: file for one, file in files.items() if not file.is_file()}
        made = self._extract_all(source, missing) if missing else {}
        return {one: made[one] if one in made else _mapped(files[one]) for one in wanted}

    def widths(self, wanted: Sequence[Pooled]) -> dict[Pooled, int]:
        """Return D, the width of the rows of each of `wanted`."""
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return {one: rows.shape[1] for one, rows in self.extract(blank, wanted).items()}

    def extract(self, images_BCHW: Tensor, wanted: Sequence[Pooled]) -> dict[Pooled, Tensor]:
        """Return rows (B, D), on the device, of uint8 images for each of `wanted`, in one pass without gradient."""
        return extract(self.trunk, self.machine, images_BCHW, wanted)

    def _key(self, source: ImageSource, one: Pooled) -> str:
        facts = (self.weights, data_key(source), self.image_size, self.settings.reduce_to, one, "features-1")
        return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:32]

    def _extract_all(self, source: ImageSource, files: dict[Pooled, Path]) -> dict[Pooled, Tensor]:
        widths = self.widths(list(files))
        total = sum(widths.values()) * len(source) * self.machine.feature_dtype.itemsize
        folder = self.cache / FEATURES_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        on_disk = total + DISK_RESERVE < free_disk_bytes(folder)
        if not on_disk:
            self.work.reporter.warn(f"features of {size(total)} are not kept: the disk of {folder} has no room for them")
        kind = np.float16 if self.machine.feature_dtype == torch.float16 else np.float32
        rows: dict[Pooled, NDArray[Any]] = {}
        with ExitStack() as written:  # All files are renamed at the end, or deleted after an error.
            for one, width in widths.items():
                shape = (len(source), width)
                if on_disk:
                    beside = written.enter_context(written_beside(files[one]))
                    rows[one] = np.lib.format.open_memmap(beside, "w+", kind, shape)
                else:
                    rows[one] = np.empty(shape, kind)
            self._fill(source, rows)
            for array in rows.values():
                if isinstance(array, np.memmap):
                    array.flush()
        return {one: _mapped(files[one]) if on_disk else torch.from_numpy(array) for one, array in rows.items()}

    def _fill(self, source: ImageSource, rows: dict[Pooled, NDArray[Any]]) -> None:
        view, indices_N = ClusterView(self.image_size), torch.arange(len(source))
        with self.loader(source) as loader, self.work.track("features", len(source)) as advance:
            for batch in loader.cluster_views(view, indices_N, FEATURE_BATCH):
                if len(batch.indices_B):
                    for one, rows_BD in self.extract(batch.images_BCHW, list(rows)).items():
                        bounded = rows_BD.float().clamp(-LARGEST_HALF, LARGEST_HALF).to(self.machine.feature_dtype)
                        rows[one][batch.indices_B.numpy()] = bounded.cpu().numpy()
                advance(len(batch.indices_B))
            bad = sorted(loader.unreadable)
            for array in rows.values():
                array[bad] = np.nan


def load(model: str | Path) -> Model:
    """Return the model of a run folder, a checkpoint file, or `untrained:ARCH` (random weights); on the CPU.

    `untrained:RUN` is the trunk of a run before its first epoch.

    Raises:
        InputError: there is no such model, or the file can't be used.
    """
    if str(model).startswith(UNTRAINED):
        name = str(model).removeprefix(UNTRAINED)
        if name in ARCHITECTURES or name.startswith(LIBRARIES):
            check_arch(name)
            image_size = USUAL_IMAGE_SIZE.get(name, 224)
            settings = Settings(arch=name, image_size=image_size, sobel=name in ("alexnet", "vgg16"))
        elif Path(name).is_dir():
            settings = Settings.from_saved(RunFolder(Path(name)).read_config()["settings"])
        else:
            raise InputError(
                f"{model}: unknown architecture{did_you_mean(name, ARCHITECTURES)}; use one of "
                f"{', '.join(ARCHITECTURES)}, or a run folder for its trunk before training"
            )
        return Model(str(model), make_run_trunk(settings).eval(), settings, Machine.choose("cpu", settings.precision))
    path = Path(model)
    if not path.exists():
        raise InputError(f"{path} does not exist: a model is a run folder, a checkpoint file or untrained:ARCH")
    if path.is_dir():
        folder = RunFolder(path)
        folder.read_config()
        path = folder.last
        if not path.is_file():
            raise InputError(f"{folder.path} has no checkpoint yet")
    return model_of_checkpoint(load_checkpoint(path), path, name=str(model))


def model_of_checkpoint(state: dict[str, Any], path: Path, *, name: str) -> Model:
    """Return the model that a checkpoint holds, on the CPU.

    Raises:
        InputError: the checkpoint can't be used.
    """
    try:
        settings = Settings.from_saved(state["settings"])
    except (KeyError, InputError) as fault:
        raise InputError(f"{path} was written by another version of deepcluster: {fault}") from None
    machine = Machine.choose("cpu", settings.precision)
    trunk = make_run_trunk(settings).to(machine.dtype)
    try:
        trunk.load_state_dict(state["trunk"])
    except RuntimeError as fault:
        reason = str(fault).splitlines()[-1].strip()
        raise InputError(f"{path} does not hold the weights of {settings.arch}: {reason}") from None
    clusters = state.get("final", state)
    if "assignment" not in clusters:
        return Model(name, trunk.eval(), settings, machine)
    space = space_of(clusters, settings, dim=trunk.dim, machine=machine)
    return Model(name, trunk.eval(), settings, machine, space, Assignment.from_state_dict(clusters["assignment"]))


def loaded(
    model: str | Path | Model,
    *,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    interruption: Interruption | None = None,
) -> Model:
    """Return a model on a device as evaluation and visualization use it: a run of fp64 is applied in fp32."""
    model = model if isinstance(model, Model) else load(model)
    precision = "fp32" if model.settings.precision == "fp64" else model.settings.precision
    return model.on(device, precision=precision, workers=workers, work=Work(reporter, interruption or new_interruption()))


def new_interruption(advice: str = "the state is saved: the same command continues from here") -> Interruption:
    """Return the request to stop for long work; `advice`: what was kept and how to continue."""
    return Interruption(on_request=end_waits, advice=advice)


def data_key(source: ImageSource) -> str:
    """Return 64 hex digits that change with the names, the order and the stamps of the images."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in range(len(source)):
        digest.update(f"\0{source.name(index)}\0{source.stamp(index)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def readable(rows_ND: Tensor) -> Tensor:
    """Return which rows (N,) hold numbers: those of readable images."""
    return ~rows_ND[:, 0].isnan()


def _mapped(file: Path) -> Tensor:
    os.utime(file)  # The last use, which `cache info` shows.
    return torch.from_numpy(np.load(file, mmap_mode="c"))
