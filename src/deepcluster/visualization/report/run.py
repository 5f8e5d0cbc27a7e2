"""Reads a run folder for its report: clusters now and before, points of a sample, facts, and the run to explain.

N images, M of them in the sample.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.clustering.assignment import Assignment
from deepcluster.core.errors import InputError
from deepcluster.core.files import read_table
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.sources.by_name import pictures_by_name
from deepcluster.data.survey import even_sample
from deepcluster.interop.loading import model_of_checkpoint
from deepcluster.run.cluster_names import read_names
from deepcluster.run.features import Pooled
from deepcluster.run.folder import RunFolder, load_checkpoint
from deepcluster.run.kept_features import readable, rows_if_kept
from deepcluster.run.metrics import health
from deepcluster.run.settings import Settings
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report.build import Context
from deepcluster.visualization.report.clustered import with_points_of_table
from deepcluster.visualization.report.collection import Collection, Past, RunFacts
from deepcluster.visualization.report.method.explained import Explained
from deepcluster.visualization.report.pictures import read_json, read_list
from deepcluster.visualization.stages import PICTURES

Data = str | Path | Sequence[str | Path]


def read_run(
    folder: RunFolder,
    options: ReportOptions,
    *,
    data: Data | None = None,
    new: Data | None = None,
    device: str = "auto",
    workers: int,
    work: Work,
) -> Context:
    """Return what the page of a run shows; a run that is being trained can be read again and again.

    Args:
        data: where the images are now; None: where they were when the run was started.
        new: images that are not of the run, to be shown beside its clusters.

    Raises:
        InputError: it is no run, it has no clusters yet, or `data` are not its images.
    """
    config, metrics, tables = folder.read_config(), folder.read_metrics(), folder.cluster_tables()
    if not tables and not config["data"].get("address", True):
        raise InputError(
            f"{folder.path} is an imported model, without images: use deepcluster assign {folder.path} DATA "
            "--out T.parquet, then report T.parquet"
        )
    if not tables:
        raise InputError(f"{folder.path} has no clusters yet: they come at the end of its first epoch")
    try:
        cluster_names = read_names(folder.path)
    except InputError as fault:  # The page is worth having without them.
        work.reporter.warn(f"names of clusters are left out: {fault}")
        cluster_names = {}
    settings, newest = Settings.from_saved(config["settings"]), max(tables)
    names = read_table(tables[newest], ["name"]).column("name").to_pylist()
    state = load_checkpoint(folder.last) if folder.last.is_file() else {}
    # The epoch whose labels were trained on last; a state between two epochs counts the next one.
    trained_epoch = int(state["epoch"]) - (not state["labelled"]) if state else 0
    clustered_only, of_table = bool(config.get("clustered")), "table" in state
    model = model_of_checkpoint(state, folder.last, name=str(folder.path)) if state and not of_table else None
    epochs = 0 if clustered_only else settings.epochs
    epoch, current = _clusters(state, tables, epochs, trained_epoch)
    clustered = {line["epoch"] for line in metrics if line["seconds"]["clustering"] > 0}
    images = _images(config, settings, names, data, work)
    newcomers = None if new is None else open_source(new, on_trouble=work.reporter.warn)
    label_N, label_names = _labels(images, names, config["data"].get("classes") or [])
    collection = Collection(
        title=options.title or _title(folder, config),
        names=names,
        **current,
        label_N=label_N,
        label_names=label_names,
        past=[Past(past, partial(_clusters_of, tables[past])) for past in tables if past < epoch and past in clustered],
        images=images,
        unreadable=folder.read_unreadable(),
        table=_table_of_all(folder, tables.get(epoch, tables[newest]), finished="final" in state),
        cluster_names=cluster_names,
        names_folder=str(folder.path),
    )
    explained = None
    if images is not None and model is not None and model.assignment is not None:
        model = model.on(device, workers=workers, work=work)
        explained = Explained.of(model, state, clusters_epoch=epoch, trained_epoch=trained_epoch)
        explained = replace(explained, clustered=config.get("clustered") or {})
        collection, explained = _with_points(collection, explained, images, options.map_images)
    elif of_table:
        collection = with_points_of_table(folder, collection, state, options.map_images, work)
    if newcomers is not None and explained is None:
        raise InputError(f"--new needs the checkpoint and the images of {folder.path} (--data names these)")
    run = _facts(folder, config, metrics, collection, finished=epoch > epochs)
    return Context(
        collection, run, explained, None if of_table else folder.path / PICTURES, newcomers, options, workers, work
    )


def _table_of_all(folder: RunFolder, newest: Path, *, finished: bool) -> str:
    """Return the file that has the cluster of every image, as the user would look for it in the run folder."""
    is_there = finished and folder.clusters.is_file()
    return folder.clusters.name if is_there else f"assignments/{newest.name}"


def _title(folder: RunFolder, config: dict[str, Any]) -> str:
    """Return the names of the run and of its data."""
    run = folder.path.name if folder.path.is_absolute() else str(folder.path)
    names = [str(one).rstrip("/").rpartition("/")[2] for one in config["data"].get("address") or ()]
    return f"{run}: {', '.join(names)}" if any(names) and run not in names else run


def _clusters(state: dict[str, Any], tables: dict[int, Path], epochs: int, trained_epoch: int) -> tuple[int, dict[str, Any]]:
    """Return the epoch of the current clusters, and the clusters: those of the finished trunk, if it is finished."""
    saved = state.get("final", state)
    if "assignment" in saved:
        found = Assignment.from_state_dict(saved["assignment"])
        return epochs + 1 if "final" in state else trained_epoch, {
            "cluster_N": found.labels_N.numpy(),
            "distance_N": found.distances_N.float().numpy(),
            "n_clusters": found.n_clusters,
            "centroids_KP": found.centroids_KP,
        }
    table = read_table(tables[max(tables)], ["cluster", "distance"])
    cluster_N, distance_N = (column.to_numpy() for column in table.columns)
    n_clusters = int(cluster_N.max(initial=0)) + 1
    return max(tables), {"cluster_N": cluster_N, "distance_N": distance_N, "n_clusters": n_clusters}


def _clusters_of(table: Path) -> NDArray[np.int64]:
    return read_table(table, ["cluster"]).column("cluster").to_numpy()  # type: ignore[no-any-return]


def _images(
    config: dict[str, Any], settings: Settings, names: list[str], data: Data | None, work: Work
) -> ImageSource | None:
    """Return where the pictures are; None, with a warning, where they can't be found."""
    address = config["data"].get("address") if data is None else data
    if not address and config.get("clustered", {}).get("stage") == "":
        work.reporter.say("the embeddings have names only: give their images with --data, to see pictures")
        return None
    if not address:
        work.reporter.warn("the run does not say where its images are: name them with --data, to see pictures")
        return None
    try:
        return pictures_by_name(names, open_source(address, settings.limit, on_trouble=work.reporter.warn))
    except InputError as error:
        if data is not None:
            raise
        work.reporter.warn(f"no pictures: {error}. If the images have moved, name them with --data")
        return None


def _labels(images: ImageSource | None, names: list[str], classes: list[str]) -> tuple[NDArray[np.int64] | None, list[str]]:
    """Return the labels of the images; where these are not at hand, those of the class folders in their names."""
    if images is not None and images.labels_N is not None:
        return images.labels_N, images.class_names
    if images is not None or not classes:
        return None, []
    number = {name: index for index, name in enumerate(classes)}
    folders = (name.split("/")[-2:-1] for name in names)
    return np.array([number.get(folder[0], -1) if folder else -1 for folder in folders], np.int64), classes


def _with_points(
    collection: Collection, explained: Explained, images: ImageSource, sample: int
) -> tuple[Collection, Explained]:
    """Return both with features and points of a sample of the images by the current trunk: kept ones, or extracted."""
    chosen = torch.tensor(even_sample(np.flatnonzero(collection.cluster_N >= 0).tolist(), sample), dtype=torch.int64)
    model, quarters_N = explained.model, explained.clustered_quarters_N
    kept_ND = rows_if_kept(model, images, Pooled(model.settings.cluster_stage)) if quarters_N is None else None
    if kept_ND is not None:
        chosen = chosen[readable(kept_ND[chosen])]
        parts = [(chosen, kept_ND[chosen])] if len(chosen) else []
    else:
        batches = model.batches(images, chosen, quarters_N=quarters_N) if len(chosen) else ()
        parts = [(indices_B, rows_BD.to(model.machine.feature_dtype).cpu()) for rows_BD, indices_B in batches]
    if not parts:
        return collection, explained
    indices_M, features_MD = (torch.cat(part) for part in zip(*parts, strict=True))
    points_MP = model.points(features_MD).numpy()
    collection = replace(collection, sample_M=indices_M.numpy(), points_MP=points_MP)
    return collection, replace(explained, features_MD=features_MD)


def _facts(
    folder: RunFolder, config: dict[str, Any], metrics: list[dict[str, Any]], collection: Collection, *, finished: bool
) -> RunFacts:
    moments = [datetime.fromtimestamp(path.stat().st_mtime) for path in (folder.config, folder.metrics) if path.is_file()]
    with suppress(KeyError, TypeError, ValueError):  # Earlier versions did not write it.
        moments[0] = datetime.fromisoformat(config["started"])
    evaluations = (read_json(path) for path in sorted(folder.path.glob("evaluation/*.json")))
    return RunFacts(
        title=collection.title,
        folder=str(folder.path),
        config=config,
        comparison=read_list(folder.path / "comparison.json"),
        metrics=metrics,
        evaluations=[content for content in evaluations if content],
        finished=finished,
        started=moments[0],
        ended=moments[-1] if metrics else None,
        n_images=len(collection),
        n_unreadable=len(collection.unreadable),
        sizes_K=collection.sizes_K(),
        complaint=health(metrics, config["settings"]) if metrics else None,
    )
