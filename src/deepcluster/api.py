"""The functions of the command line, for Python: `train`, `embed`, `assign`, with the same names and defaults.

N images, D features.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.addresses import is_address
from deepcluster.core.errors import InputError
from deepcluster.core.files import check_new_folder, output_path, user_path
from deepcluster.core.options import types_of
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of
from deepcluster.core.work import Work, joined_work
from deepcluster.data.sources import ImageSource, name_of, open_source
from deepcluster.data.sources.given import given_data
from deepcluster.evaluation.knn import leave_one_out_accuracy
from deepcluster.evaluation.logistic import probe_accuracy
from deepcluster.interop.loading import load, new_interruption
from deepcluster.run.model import Model
from deepcluster.run.parts import Parts
from deepcluster.run.settings import Settings
from deepcluster.run.tables import join_to_parquet, link_clusters, parts_of_table, result_of, write_array
from deepcluster.training import launch, tensorboard

Data = str | Path | Sequence[str | Path]
# Advice of a stop.
PARTS_KEPT = "the finished parts are kept: the same command continues from there"
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
        data: a folder, list, table or array file of images, or several of these in any collection (docs/data.md).
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
    data = given_data(data)  # Once: a generator gives its paths only once.
    return launch.train(
        data,
        out=user_path(out) if out is not None else default_run(data),
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
    """Return `runs/NAME-OF-DATA`: a link keeps its own name; `..`, `.` and `~` get that of the folder they stand for."""
    some = given_data(data)
    if not some:
        open_source(some)  # It says what may be given.
    first = some[0] if isinstance(some, list) else some
    path, name = user_path(first), name_of(first)
    if not is_address(str(first)) and path.name not in ("", "..") and not str(first).rstrip("/").endswith("/."):
        name = path.stem if path.is_file() else path.name
    return Path("runs") / (re.sub(r"[/:]+", "-", name).strip("-") or "root")


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        images, width = count_of(len(self.embedding_ND), "image"), self.embedding_ND.shape[-1]
        return f"Embeddings({images} of {width:,} numbers{_unreadable(self)}: .names, .embedding_ND, .unreadable)"


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        used = np.unique(self.cluster_N[self.cluster_N != UNASSIGNED])
        counts = f"{count_of(len(self.cluster_N), 'image')} in {count_of(len(used), 'cluster')}"
        return f"Clusters({counts}{_unreadable(self)}: .names, .cluster_N, .distance_N, .unreadable)"


def embed(
    model: str | Path | Model,
    data: Data,
    *,
    out: str | Path | None = None,
    parts: bool = False,
    return_rows: bool = True,
    stage: str | None = None,
    device: str = "auto",
    batch_size: int = 256,
    workers: int | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> Embeddings:
    """Return the features of images, as `deepcluster embed` writes them.

    With `out`, the processes of `torchrun` share the work, and all of them must make the call. Without it, each process that
    makes the call computes all rows by itself.

    Args:
        model: whatever `load` opens, or its result.
        data: any images, not only those of the run.
        out: also write a table (`.parquet`: name, embedding) or an array (`.npy`, with the names beside in `.names.txt`).
        parts: `out` is a folder instead, of numbered Parquet files that are one table.
        return_rows: False returns no rows and no names: `out` may be larger than memory. So it is for several processes.
        stage: stage of the trunk, averaged over its map; `Trunk.embed_stage`, which measured best, by default.
        device, batch_size, workers: how the work is done.
        limit: use only this many images, spread evenly.
        reporter: shows progress.

    Raises:
        InputError: model, data, stage or file can't be used.
        Interrupted: Ctrl-C or SIGTERM while `out` was written; the same call continues.
    """
    target = None if out is None else _target(out, (".parquet", ".npy"), parts=parts)
    with _opened(model, data, limit, reporter, shared=out is not None, device=device, workers=workers) as (model, source):
        one = model.embedding(stage, batch_size)
        if target is None:
            rows, unreadable = model.in_memory(one, source)
            return Embeddings(_names(source), rows["embedding"], _by_name(unreadable, source, model))
        with parts_of_table(model, one, source, target, are_result=parts) as made:
            if model.work.ranks.is_main and not parts:
                if target.suffix == ".npy":
                    write_array(made, one, source, target, model.work)
                else:
                    join_to_parquet(made, source, target, model.work)
            names, rows, unreadable = result_of(made, one, source, model.work.ranks, return_rows=return_rows)
        model.work.reporter.say(
            f"{target}: {count_of(len(source), 'row')} of {count_of(rows['embedding'].shape[1], 'number')}"
        )
        return Embeddings(names, rows["embedding"], _by_name(unreadable, source, model))


def assign(
    model: str | Path | Model,
    data: Data,
    *,
    out: str | Path | None = None,
    folders: str | Path | None = None,
    parts: bool = False,
    return_rows: bool = True,
    device: str = "auto",
    batch_size: int = 256,
    workers: int | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> Clusters:
    """Return the cluster of each image, as `deepcluster assign` writes it: the nearest centroid of the last clustering.

    Several processes as in `embed`, where `out` or `folders` is given.

    Args:
        model: whatever `load` opens, or its result.
        data: any images, not only those of the run.
        out: also write a table (`.parquet`: name, cluster, distance).
        folders: also make a folder of links per cluster in this folder.
        parts, return_rows: as in `embed`.
        device, batch_size, workers: how the work is done.
        limit: use only this many images, spread evenly.
        reporter: shows progress.

    Raises:
        InputError: model, data or file can't be used, or the model has no clusters.
        Interrupted: Ctrl-C or SIGTERM while `out` or `folders` was written; the same call continues.
    """
    target = None if out is None else _target(out, (".parquet",), parts=parts)
    if parts and target is None:
        raise InputError("parts are written into a folder: name one with out")
    model = model if isinstance(model, Model) else load(model)
    _, assignment = model.clusters()
    links = None if folders is None else user_path(folders)
    place = target or links
    if links is not None:
        output_path(links, "--folders", is_folder=True)
    with _opened(model, data, limit, reporter, shared=place is not None, device=device, workers=workers) as (model, source):
        ranks, one = model.work.ranks, model.nearest_clusters(batch_size)
        if place is None:
            rows, unreadable = model.in_memory(one, source)
            return Clusters(_names(source), rows["cluster"], rows["distance"], _by_name(unreadable, source, model))
        if links is not None:
            ranks.from_main(lambda: check_new_folder(links, "--folders"))
            if source.path(0) is None:
                raise InputError(
                    "--folders makes links to image files, and an array has none; the table of --out has all that is known"
                )
        with parts_of_table(model, one, source, place, are_result=parts) as made:
            if ranks.is_main:
                if target is not None and not parts:
                    join_to_parquet(made, source, target, model.work)
                if links is not None:
                    link_clusters(links, source, made, n_clusters=assignment.n_clusters)
                model.work.reporter.say(f"{_counts(made, assignment.n_clusters)}: {place}")
            names, rows, unreadable = result_of(made, one, source, ranks, return_rows=return_rows)
        return Clusters(names, rows["cluster"], rows["distance"], _by_name(unreadable, source, model))


def _counts(made: Parts, n_clusters: int) -> str:
    """Return how many images are in how many clusters, for printed lines."""
    sizes_K = np.zeros(n_clusters + 1, np.int64)  # The first number counts unreadable images.
    for _, some in made.read():
        sizes_K += np.bincount(some["cluster"] - UNASSIGNED, minlength=len(sizes_K))
    return f"{count_of(int(sizes_K[1:].sum()), 'image')} in {count_of(int((sizes_K[1:] > 0).sum()), 'cluster')}"


@contextmanager
def _opened(
    model: str | Path | Model,
    data: Data,
    limit: int | None,
    reporter: Reporter | None,
    *,
    shared: bool,
    device: str,
    workers: int | None,
) -> Iterator[tuple[Model, ImageSource]]:
    """Yield a model on a device, and the images; `shared`: the processes that `torchrun` started work on them together."""
    with joined_work(reporter, new_interruption(PARTS_KEPT)) if shared else nullcontext(Work(reporter)) as work:
        model = model if isinstance(model, Model) else load(model)
        source = open_source(data, limit)
        if model.remark:
            work.reporter.say(f"{model.name}: {model.remark}")
        yield model.on(device, workers=workers, work=work), source


def _unreadable(result: Embeddings | Clusters) -> str:
    return f", {len(result.unreadable):,} unreadable" if result.unreadable else ""


def _names(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def _by_name(unreadable: Mapping[int, str], source: ImageSource, model: Model) -> dict[str, str]:
    """Return the reasons by name, and warn of them."""
    by_name, warn = {source.name(index): why for index, why in unreadable.items()}, model.work.reporter.warn
    for name, why in islice(by_name.items(), 3):
        warn(f"{name} can't be read: {why}")
    if len(by_name) > 3:
        warn(f"… and {len(by_name) - 3:,} more; their rows are empty")
    return by_name


def _target(out: str | Path, endings: tuple[str, ...], *, parts: bool) -> Path:
    """Return the file, or the folder of parts, to write; nothing is made yet."""
    if not parts:
        if user_path(out).is_dir():
            raise InputError(f"--out {out} is a folder: write numbered files into it with --parts, or name a file in it")
        return output_path(out, "--out", endings=endings)
    path = user_path(out)
    if path.is_file():
        raise InputError(f"--out {path} is a file; with --parts name a folder")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"--out {path}: the folder {folder} does not exist or can't be written to")
    return output_path(path, "--out", is_folder=True)
