"""`assign`: the cluster of each image. N images, K clusters."""

from pathlib import Path

import numpy as np

from deepcluster.applied.assigning_tables import assign_table, is_run_of_table
from deepcluster.applied.opening import Data, names_of, opened, output_target, reasons_by_name
from deepcluster.applied.rows import Clusters
from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.errors import InputError
from deepcluster.core.files import check_new_folder, output_path, user_path
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of
from deepcluster.core.work import Work
from deepcluster.interop.loading import load
from deepcluster.run.model import Model
from deepcluster.run.parts import Parts
from deepcluster.run.tables import join_to_parquet, link_clusters, parts_of_table, result_of


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
    target = None if out is None else output_target(out, (".parquet",), parts=parts)
    if parts and target is None:
        raise InputError("parts are written into a folder: name one with out")
    if is_run_of_table(model):
        if folders is not None or parts:
            raise InputError("--folders and --parts need images, and this run is of a table of embeddings: use --out alone")
        return assign_table(model, data, target, limit=limit, work=Work(reporter))  # type: ignore[arg-type]
    model = model if isinstance(model, Model) else load(model)
    _, assignment = model.clusters()
    links = None if folders is None else user_path(folders)
    place = target or links
    if links is not None:
        output_path(links, "--folders", is_folder=True)
    with opened(model, data, limit, reporter, shared=place is not None, device=device, workers=workers) as (model, source):
        ranks, one = model.work.ranks, model.nearest_clusters(batch_size)
        if place is None:
            rows, unreadable = model.in_memory(one, source)
            return Clusters(
                names_of(source), rows["cluster"], rows["distance"], reasons_by_name(unreadable, source, model), source
            )
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
        return Clusters(names, rows["cluster"], rows["distance"], reasons_by_name(unreadable, source, model), source)


def _counts(made: Parts, n_clusters: int) -> str:
    """Return how many images are in how many clusters, for printed lines."""
    sizes_K = np.zeros(n_clusters + 1, np.int64)  # The first number counts unreadable images.
    for _, some in made.read():
        sizes_K += np.bincount(some["cluster"] - UNASSIGNED, minlength=len(sizes_K))
    return f"{count_of(int(sizes_K[1:].sum()), 'image')} in {count_of(int((sizes_K[1:] > 0).sum()), 'cluster')}"
