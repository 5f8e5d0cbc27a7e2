"""The functions of the command line, for Python: `train`, `embed`, `assign`, with the same names and defaults.

N images, D features.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.errors import InputError
from deepcluster.core.files import check_new_folder, write_table, written_beside
from deepcluster.core.options import types_of
from deepcluster.core.progress import Reporter
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.evaluation.knn import leave_one_out_accuracy
from deepcluster.evaluation.logistic import probe_accuracy
from deepcluster.run.model import Model, load
from deepcluster.run.settings import Settings
from deepcluster.training import launch, tensorboard

Data = str | Path | Sequence[str | Path]
F = TypeVar("F", bound=Callable[..., Any])


def _with_settings(function: F) -> F:
    """Give a function's `**options` the names, types and defaults of `Settings`, for `help` and editors."""
    own, types, kind = inspect.signature(function), types_of(Settings), inspect.Parameter.KEYWORD_ONLY
    named = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(one.name, kind, default=one.default, annotation=types[one.name]) for one in fields(Settings)
    ]
    function.__signature__ = own.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function


@_with_settings
def train(
    data: Data,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> Path:
    """Learn features and clusters of the images of `data`, as `deepcluster train` does.

    Args:
        data: a folder, list, table or array of images, or several of these (docs/data.md).
        out: the run folder; `runs/NAME-OF-DATA` by default.
        resume: continue the run in `out`, or begin it where there is none.
        overwrite: delete the run in `out` first.
        reporter: prints lines and progress; to the standard output by default.
        options: the settings of `deepcluster.Settings`. The recipe chooses those left out, so the defaults shown may change.

    Returns:
        the run folder.

    Raises:
        InputError: data, settings or folder can't be used, or `tensorboard` is not installed; nothing was written.
        TrainingError: the loss is not finite, or the disk is full; the last good state is kept.
        Interrupted: Ctrl-C or SIGTERM; the state was saved.
    """
    if options.get("tensorboard"):
        tensorboard.needs_tensorboard_extra()
    return launch.train(
        data,
        out=Path(out) if out is not None else default_run(data),
        user_options=options,
        resume=resume,
        overwrite=overwrite,
        reporter=reporter or Reporter(),
        evaluate={"knn": _knn, "linear": partial(probe_accuracy, seed=0)},
    )


def _knn(features_ND: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Return the leave-one-out k-NN accuracy, with 20 neighbours where there are so many others."""
    return leave_one_out_accuracy(features_ND, labels_N, k=min(20, len(features_ND) - 1))


def default_run(data: Data) -> Path:
    """Return `runs/NAME-OF-DATA`."""
    first = Path(data if isinstance(data, str | Path) else data[0]).absolute()
    return Path("runs") / (first.stem if first.is_file() else first.name)


@dataclass(frozen=True)
class Embeddings:
    """Features, one row per image.

    Attributes:
        names: path of each image relative to the data.
        embedding_ND: float32; rows of NaN for unreadable images.
        unreadable: why images can't be read, by name.
    """

    names: list[str]
    embedding_ND: NDArray[np.float32]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class Clusters:
    """Clusters, one row per image.

    Attributes:
        names: path of each image relative to the data.
        cluster_N: int64; -1 for unreadable images.
        distance_N: Euclidean distance to the centroid after whitening, or on deepcluster-v2's sphere; NaN for unreadable
            images.
        unreadable: why images can't be read, by name.
    """

    names: list[str]
    cluster_N: NDArray[np.int64]
    distance_N: NDArray[np.float32]
    unreadable: dict[str, str]


def embed(
    model: str | Path | Model,
    data: Data,
    *,
    out: str | Path | None = None,
    stage: str | None = None,
    device: str = "auto",
    batch_size: int = 256,
    workers: int | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> Embeddings:
    """Return the features of images, as `deepcluster embed` writes them.

    Args:
        model: a run folder, a checkpoint, `untrained:ARCH`, or what `load` returned.
        data: any images, not only those of the run.
        out: also write a table (`.parquet`: name, embedding) or an array (`.npy`, with the names beside in `.names.txt`).
        stage: stage of the trunk, averaged over its map; `Trunk.embed_stage`, which measured best, by default.
        device, batch_size, workers: how the work is done.
        limit: use only this many images, spread evenly.
        reporter: shows progress.

    Raises:
        InputError: model, data, stage or file can't be used.
    """
    target = _writable(out, (".parquet", ".npy")) if out is not None else None
    model = model if isinstance(model, Model) else load(model)
    source = open_source(data, limit)
    model = model.on(device, workers=workers, work=Work(reporter))
    features_ND, unreadable = model.features(source, stage=stage, batch_size=batch_size)
    names = [source.name(index) for index in range(len(source))]
    result = Embeddings(names, features_ND.numpy(), {names[i]: why for i, why in unreadable.items()})
    if target is not None and target.suffix == ".npy":
        with written_beside(target, durable=True) as beside, beside.open("wb") as file:
            np.save(file, result.embedding_ND)
        target.with_suffix(".names.txt").write_text("".join(name + "\n" for name in result.names), encoding="utf-8")
    elif target is not None:
        import pyarrow as pa

        flat = pa.array(result.embedding_ND.ravel())
        rows = pa.FixedSizeListArray.from_arrays(flat, result.embedding_ND.shape[1])
        write_table({"name": result.names, "embedding": rows}, target)
    return result


def assign(
    model: str | Path | Model,
    data: Data,
    *,
    out: str | Path | None = None,
    folders: str | Path | None = None,
    device: str = "auto",
    batch_size: int = 256,
    workers: int | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> Clusters:
    """Return the cluster of each image, as `deepcluster assign` writes it: the nearest centroid of the last clustering.

    Args:
        model: a run folder, a checkpoint, or what `load` returned.
        data: any images, not only those of the run.
        out: also write a table (`.parquet`: name, cluster, distance).
        folders: also make a folder of links per cluster in this folder.
        device, batch_size, workers: how the work is done.
        limit: use only this many images, spread evenly.
        reporter: shows progress.

    Raises:
        InputError: model, data or file can't be used, or the model has no clusters.
    """
    target = _writable(out, (".parquet",)) if out is not None else None
    model = model if isinstance(model, Model) else load(model)
    _, assignment = model.clusters()
    source = open_source(data, limit)
    if folders is not None:
        check_new_folder(Path(folders), "--folders")
        if source.path(0) is None:
            raise InputError(
                "--folders makes links to image files, and an array has none; the table of --out has all that is known"
            )
    model = model.on(device, workers=workers, work=Work(reporter))
    cluster_N, distance_N, unreadable = model.assign(source, batch_size=batch_size)
    names = [source.name(index) for index in range(len(source))]
    result = Clusters(names, cluster_N, distance_N, {names[i]: why for i, why in unreadable.items()})
    if target is not None:
        write_table({"name": result.names, "cluster": result.cluster_N, "distance": result.distance_N}, target)
    if folders is not None:
        _link(Path(folders), source, result, n_clusters=assignment.n_clusters)
    return result


def _writable(out: str | Path, endings: tuple[str, ...]) -> Path:
    path = Path(out)
    if path.suffix not in endings:
        raise InputError(f"--out {path}: the file should end in {' or '.join(endings)}")
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; name a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--out {path}: the folder {folder} does not exist or can't be written to")
    return path


def _link(folders: Path, source: ImageSource, result: Clusters, *, n_clusters: int) -> None:
    """Make a link for each image, named after its path, in the folder of its cluster."""
    digits = len(str(n_clusters - 1))
    for index, (name, cluster) in enumerate(zip(result.names, result.cluster_N.tolist(), strict=True)):
        path = source.path(index)
        if cluster == UNASSIGNED or path is None:
            continue
        folder = folders / f"cluster-{cluster:0{digits}d}"
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / name.replace("/", "__")
        if link.is_symlink():  # a/b__c.jpg after a__b/c.jpg
            link = link.with_stem(f"{link.stem}-{index}")
        link.symlink_to(path)
