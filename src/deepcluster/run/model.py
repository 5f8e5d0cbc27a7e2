"""A trained trunk with its clusters, applied to images. Embedding, assignment, evaluation, pictures and the report use it.

N images, B batch, D features, P components, K clusters.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.located import UNLOCATED, located
from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.core.files import usual_cache_folder
from deepcluster.core.options import plain
from deepcluster.core.work import Work
from deepcluster.data.cache import CachePlan, DecodedImages, decoded_images, plan_cache
from deepcluster.data.loader import Loader, usual_workers
from deepcluster.data.sources import ImageSource
from deepcluster.data.survey import even_sample, survey
from deepcluster.data.views import ClusterView
from deepcluster.models.custom import CustomTrunk
from deepcluster.models.trunk import Trunk
from deepcluster.run.features import (
    FEATURE_BATCH,
    Pooled,
    centre_view,
    extract,
    extract_stage,
    feature_batches,
    make_run_trunk,
    stage_width,
)
from deepcluster.run.parts import Columns, ParquetParts, Parts, spans_of
from deepcluster.run.passes import Pass
from deepcluster.run.resumable import ResumableState, digest_of, state_hash, weights_hash
from deepcluster.run.settings import Settings
from deepcluster.run.space import ProjectedSpace, Space, space_state

# Of so many images the names are compared between processes.
COMPARED_NAMES = 1_000
# Settings of the form of a network's images, beside their size.
FORM = ("mean", "std", "interpolation", "crop_pct")


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
        remark: what was used of a file of another program; empty for our own.
        trained: whether it was trained with these settings, unlike files of other programs and random weights.
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
    remark: str = ""
    trained: bool = True

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
    def view(self) -> ClusterView:
        """The view of an image of which features are made."""
        return centre_view(self.settings)

    @property
    def centroids_KP(self) -> Tensor | None:
        """Centroids of its clusters; None without clusters."""
        return None if self.assignment is None else self.assignment.centroids_KP

    @property
    def weights(self) -> str:
        """32 hex digits that change with `network`, device type and precision: with each bit of the features."""
        return digest_of(self.network, self.machine.device.type, self.machine.precision)

    @cached_property
    def network(self) -> str:
        """32 hex digits that change with the weights, the network and the form of the images, on any device."""
        facts = [weights_hash(self.trunk), self.trunk.arch]
        usual, mine = Settings(), self.settings
        if isinstance(self.trunk, CustomTrunk):
            facts.append(self.trunk.fingerprint())
        form = [f"{name}={getattr(mine, name)}" for name in FORM if getattr(mine, name) != getattr(usual, name)]
        return hashlib.sha256(" ".join([*facts, *form]).encode()).hexdigest()[:32]

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

    def export(self, *, format: str, out: str | Path, **options: Any) -> Path:
        """Write the model for another program, as `deepcluster.export` does; returns `out`."""
        # The formats live on a higher floor.
        exported: Path = import_module("deepcluster.interop.exports").export(self, format=format, out=out, **options)
        return exported

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

            def plan() -> CachePlan:
                with self.work.reporter.track("reading a sample", None) as progress:
                    sample = survey(source, workers=self.workers, on_images=progress, at_least=0)
                path, needed = source.path(0), sample.decoded_bytes(reduce_to)
                place = source.describe() if path is None else str(path.parent)
                return plan_cache("auto", None, needed, source, reduce_to=reduce_to, data=place)

            tell, ranks = self.work.reporter.warn, self.work.ranks
            images = decoded_images(source, ranks.from_main(plan), reduce_to=reduce_to, ranks=ranks, tell=tell)
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
        rows, unreadable = self.in_memory(self.embedding(stage, batch_size), source)
        return torch.from_numpy(rows["embedding"]), unreadable

    def embedding(self, stage: str | None = None, batch_size: int = FEATURE_BATCH) -> Pass:
        """Return the pass that makes the column `embedding`, float32: a stage averaged over its map.

        Raises:
            InputError: the trunk has no such stage.
        """
        stage = stage or self.trunk.embed_stage
        empty = np.full(stage_width(self.trunk, self.machine, stage, self.image_size), np.nan, np.float32)

        def of_features(rows_BD: Tensor) -> dict[str, Tensor]:
            return {"embedding": rows_BD}

        return self._pass_of_features({"embedding": empty}, of_features, stage, batch_size, ("embedding", stage))

    def _pass_of_features(
        self,
        empty: Columns,
        of_features: Callable[[Tensor], dict[str, Tensor]],
        stage: str,
        batch_size: int,
        facts: tuple[object, ...],
    ) -> Pass:
        """Return the pass that makes columns of the features (B, D), float32, of a stage averaged over its map."""

        def compute(images_BCHW: Tensor) -> dict[str, Tensor]:
            return of_features(self._stage_rows(images_BCHW, stage))

        return Pass(empty, compute, self.view, plain(batch_size), facts, of_features=of_features)

    def _stage_rows(self, images_BCHW: Tensor, stage: str) -> Tensor:
        rows_BD = extract_stage(self.trunk, self.machine, images_BCHW, stage)
        return rows_BD.to("cpu", self.machine.feature_dtype).float()

    def batches(
        self, source: ImageSource, indices: Tensor, *, quarters_N: Tensor | None = None
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Yield rows_BD of the clustered stage, on the device, and indices_B of some images of a source."""
        stage, view = self.settings.cluster_stage, self.view
        with self.loader(source, keep=False) as loader, self.work.track("features", len(indices)) as advance:
            yield from feature_batches(
                self.trunk, loader, self.machine, stage, view, indices=indices, quarters_N=quarters_N, advance=advance
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
            advice = "train an epoch first"
            if isinstance(self.trunk, CustomTrunk):
                advice = "deepcluster.cluster(MODEL, DATA) makes a run with clusters"
            elif self.remark:
                advice = f"holds a network only: train from it with --init {self.name}"
            raise InputError(f"{self.name} has no clusters{'' if self.remark else ' yet'}: {advice}")
        return self.space, self.assignment

    def nearest_clusters(self, batch_size: int = FEATURE_BATCH) -> Pass:
        """Return the pass that makes the columns of `located`: cluster, distance, second cluster, confidence.

        Raises:
            InputError: the model has no clusters.
        """
        space, assignment = self.clusters()
        stage = self.settings.cluster_stage

        def nearest(rows_BD: Tensor) -> dict[str, Tensor]:
            finite_B = torch.isfinite(rows_BD).all(dim=1)
            rows = {name: torch.from_numpy(np.full(len(rows_BD), empty)) for name, empty in UNLOCATED.items()}
            for name, values in located(assignment, self.points(rows_BD[finite_B])).items():
                rows[name][finite_B] = values
            return rows

        clusters = {"centroids": assignment.centroids_KP, "supers": assignment.super_of_cluster_K}
        facts = ("clusters and second ones", stage, state_hash({**clusters, **space_state(space)}))
        return self._pass_of_features(UNLOCATED, nearest, stage, batch_size, facts)

    def in_memory(self, one: Pass, source: ImageSource) -> tuple[dict[str, NDArray[Any]], dict[int, str]]:
        """Return what a pass makes of all images, by column, and why some can't be read. One process makes all."""
        with self.loader(source, keep=False) as loader:
            return one.in_memory(loader, self.work), loader.unreadable

    def in_parts(self, one: Pass, source: ImageSource, folder: Path, *, parquet: bool = False, keep: bool = False) -> Parts:
        """Return the parts in a folder that hold what a pass makes of the images, after making those that are missing.

        Each rank makes some of them. Parts that were made before a stop, or the death of a process, are kept.

        Args:
            parquet: Parquet parts; otherwise files to make one table of.
            keep: as in `loader`.

        Raises:
            InputError: the folder can't be used, or the processes do not see it or the same images.
        """
        ranks, count = self.work.ranks, len(source)
        names = digest_of(*(source.name(index) for index in even_sample(range(count), COMPARED_NAMES)))
        ranks.check_same("the model and the images", f"{self.weights[:8]}, {count:,} images {names[:8]}")
        facts = (self.weights, self.image_size, self.settings.reduce_to, one.batch_size, one.facts, parquet and one.names)
        key = ranks.from_main(lambda: digest_of(data_key(source), *facts))
        spans = spans_of(count, one.row_bytes, one.batch_size)
        parts = ParquetParts(folder, key, spans, source, one.names) if parquet else Parts(folder, key, spans)
        one.into(parts, lambda: self.loader(source, keep=keep), self.work)
        return parts

    def widths(self, wanted: Sequence[Pooled]) -> dict[Pooled, int]:
        """Return D, the width of the rows of each of `wanted`."""
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return {one: rows.shape[1] for one, rows in self.extract(blank, wanted).items()}

    def extract(self, images_BCHW: Tensor, wanted: Sequence[Pooled]) -> dict[Pooled, Tensor]:
        """Return rows (B, D), on the device, of uint8 images for each of `wanted`, in one pass without gradient."""
        return extract(self.trunk, self.machine, images_BCHW, wanted)


def data_key(source: ImageSource) -> str:
    """Return 64 hex digits that change with the names, the order and the stamps of the images."""
    digest = hashlib.sha256(str(len(source)).encode())
    for index in range(len(source)):
        digest.update(f"\0{source.name(index)}\0{source.stamp(index)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
