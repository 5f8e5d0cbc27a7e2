"""What a run folder knows, as its report takes it: clusters now and before, points of a sample, the parts of the method.

N images, M of them in the sample, D features, P components.
"""

import csv
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError
from deepcluster.core.interruption import Interruption
from deepcluster.core.progress import Reporter
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Loader
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.survey import even_sample
from deepcluster.run.features import feature_batches
from deepcluster.run.folder import RunFolder, load_checkpoint
from deepcluster.run.settings import Settings
from deepcluster.visualization.report.collection import Collection, Past
from deepcluster.visualization.report.method.pipeline import Pipeline
from deepcluster.visualization.report.method.pipelines import pipeline_of
from deepcluster.visualization.report.table.pictures import pictures_by_name


@dataclass(frozen=True)
class Record:
    """A run, as its sections take it.

    Attributes:
        config, metrics: contents of config.json and of the lines of metrics.jsonl.
        pipeline: None where the run has no checkpoint with clusters, or its images are not at hand.
        finished: whether no epoch is to come.
    """

    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    collection: Collection
    pipeline: Pipeline | None
    finished: bool


@dataclass(frozen=True)
class RunReader:
    """Reads a run folder, again and again while training goes on.

    Args:
        data: where the images are now; None: where they were when the run was begun.
        sample: so many images are looked at again, for the map, near-duplicates and outliers.
    """

    folder: RunFolder
    data: Any
    sample: int
    device: str
    workers: int
    reporter: Reporter
    interruption: Interruption

    def tables(self) -> dict[int, Path]:
        """Tables of the clusters by the epoch that learned them, oldest first."""
        return {int(path.stem.rpartition("-")[2]): path for path in sorted(self.folder.assignments.glob("epoch-*.parquet"))}

    def read(self) -> Record:
        """All that is there now.

        Raises:
            InputError: it is no run, it has no clusters yet, or `data` are not its images.
        """
        config, metrics = self.folder.read_config(), self.folder.read_metrics()
        settings, tables = Settings.from_dict(config["settings"]), self.tables()
        if not tables:
            raise InputError(f"{self.folder.path} has no clusters yet: they come at the end of its first epoch")
        names = pq.read_table(tables[max(tables)], columns=["name"]).column("name").to_pylist()
        state = self._state() if self.folder.last.is_file() else {}
        clusters = _current(state, tables, settings)
        images = self._images(config, settings, names)
        collection = self._collection(config, metrics, names, clusters, tables, images)
        pipeline = None
        if images is not None and clusters.centroids_KP is not None:
            machine = Machine.choose(self.device, settings.precision)
            pipeline = pipeline_of(
                settings, state, machine, clusters_epoch=clusters.epoch, trained_epoch=_trained_epoch(state)
            )
            collection, pipeline = self._with_points(collection, pipeline)
        finished = clusters.epoch > settings.epochs
        return Record(config, metrics, collection, pipeline, finished)

    def _state(self) -> dict[str, Any]:
        """The last state, with the parts of networks that ranks have for themselves."""
        state = load_checkpoint(self.folder.last)
        with suppress(InputError):  # A run that goes on has written the next ones meanwhile.
            return {**state, "parts": self.folder.read_parts(state)}
        return {**state, "parts": {}}

    def _images(self, config: dict[str, Any], settings: Settings, names: list[str]) -> ImageSource | None:
        """Where the pictures are; None, with a warning, where they are not to be found."""
        address = config["data"].get("address") if self.data is None else self.data
        if not address:
            self.reporter.warn("the run does not say where its images are: name them with --data, to see pictures")
            return None
        try:
            source = open_source(address, settings.limit, on_trouble=self.reporter.warn)
            return pictures_by_name(names, source)
        except InputError as fault:
            if self.data is not None:
                raise
            self.reporter.warn(f"no pictures: {fault}. Where the images have moved, name them with --data")
            return None

    def _collection(
        self,
        config: dict[str, Any],
        metrics: list[dict[str, Any]],
        names: list[str],
        clusters: "_Clusters",
        tables: dict[int, Path],
        images: ImageSource | None,
    ) -> Collection:
        label_N, label_names = _labels(images, names, config["data"].get("classes") or [])
        grouped = {line["epoch"] for line in metrics if line["seconds"]["clustering"] > 0}
        past = [
            Past(epoch, partial(_clusters_of, path))
            for epoch, path in tables.items()
            if epoch < clusters.epoch and epoch in grouped
        ]
        return Collection(
            title=self.folder.path.name if self.folder.path.is_absolute() else str(self.folder.path),
            names=names,
            cluster_N=clusters.cluster_N,
            distance_N=clusters.distance_N,
            n_clusters=clusters.n_clusters,
            label_N=label_N,
            label_names=label_names,
            centroids_KP=clusters.centroids_KP,
            past=past,
            images=images,
            unreadable=_unreadable(self.folder.unreadable),
            table=f"assignments/{tables.get(clusters.epoch, tables[max(tables)]).name}",
        )

    def _with_points(self, collection: Collection, pipeline: Pipeline) -> tuple[Collection, Pipeline]:
        """With features and points of the sample, made by the trunk as it is now."""
        seen = np.flatnonzero(collection.cluster_N >= 0)
        chosen = torch.tensor(even_sample(seen.tolist(), self.sample), dtype=torch.int64)
        if collection.images is None or not len(chosen):
            return collection, pipeline
        images = DecodedImages(collection.images, shorter_side=pipeline.reduce_to or None)
        machine, parts = pipeline.machine, []
        with (
            closing(Loader(images, workers=self.workers, device=machine.device)) as loader,
            self.reporter.track("features", len(chosen)) as progress,
        ):
            for rows_BD, indices_B in feature_batches(
                pipeline.trunk,
                loader,
                machine,
                stage=pipeline.cluster_stage,
                image_size=pipeline.image_size,
                indices=chosen,
                quarters_N=pipeline.clustered_quarters_N,
                advance=progress,
            ):
                parts.append((indices_B, rows_BD.to(machine.feature_dtype).cpu()))
                self.interruption.check()
        if not parts:
            return collection, pipeline
        indices_M, features_MD = (torch.cat(part) for part in zip(*parts, strict=True))
        return (
            replace(collection, sample_M=indices_M.numpy(), points_MP=pipeline.points(features_MD).numpy()),
            replace(pipeline, features_MD=features_MD),
        )


@dataclass(frozen=True)
class _Clusters:
    """The clusters that are shown; centroids are known where a checkpoint has them."""

    epoch: int
    cluster_N: NDArray[np.int64]
    distance_N: NDArray[np.float32]
    n_clusters: int
    centroids_KP: Tensor | None = None


def _current(state: dict[str, Any], tables: dict[int, Path], settings: Settings) -> _Clusters:
    """Those of the finished trunk; of a run that goes on, those that are learned now."""
    groups = state.get("final", state)
    if "assignment" not in groups:
        table = pq.read_table(tables[max(tables)], columns=["cluster", "distance"])
        cluster_N, distance_N = (column.to_numpy() for column in table.columns)
        return _Clusters(max(tables), cluster_N, distance_N, int(cluster_N.max(initial=0)) + 1)
    assignment = Assignment.from_state_dict(groups["assignment"])
    return _Clusters(
        epoch=settings.epochs + 1 if "final" in state else _trained_epoch(state),
        cluster_N=assignment.labels_N.numpy(),
        distance_N=assignment.distances_N.float().numpy(),
        n_clusters=assignment.n_clusters,
        centroids_KP=assignment.centroids_KP,
    )


def _trained_epoch(state: dict[str, Any]) -> int:
    """The epoch whose labels were learned last; a state between two epochs counts the next one."""
    return int(state["epoch"]) - (not state["labelled"])


def _clusters_of(table: Path) -> NDArray[np.int64]:
    return pq.read_table(table, columns=["cluster"]).column("cluster").to_numpy()  # type: ignore[no-any-return]


def _labels(images: ImageSource | None, names: list[str], classes: list[str]) -> tuple[NDArray[np.int64] | None, list[str]]:
    """Labels as the images have them; where they are not at hand, those of the class folders in their names."""
    if images is not None and images.labels_N is not None:
        return images.labels_N, images.class_names
    if images is not None or not classes:
        return None, []
    number = {name: index for index, name in enumerate(classes)}
    folders = (name.split("/")[-2:-1] for name in names)
    return np.array([number.get(folder[0], -1) if folder else -1 for folder in folders], np.int64), classes


def _unreadable(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["name"]: row["reason"] for row in csv.DictReader(file)}
