"""`assign`: the cluster of each image. N images, K clusters."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.applied.assigning_tables import assign_table, is_run_of_table, table_for
from deepcluster.applied.one_image import like_one
from deepcluster.applied.opening import Data, names_of, opened, output_target, reasons_by_name
from deepcluster.applied.rows import Clusters, clusters_of
from deepcluster.applied.vectors import why_unreadable
from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.core.errors import InputError
from deepcluster.core.files import output_path
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of, visible
from deepcluster.data.sources import open_source
from deepcluster.data.sources.given import given_data
from deepcluster.interop.loading import load
from deepcluster.run.cluster_folders import Folders, check_folders, make_folders
from deepcluster.run.cluster_names import names_of_model
from deepcluster.run.kept_features import from_kept
from deepcluster.run.model import Model
from deepcluster.run.parts import Parts
from deepcluster.run.resumable import digest_of
from deepcluster.run.table_writers import ENDINGS
from deepcluster.run.tables import join_to_table, parts_of_table, result_of

# Images whose clusters are printed, where no file is to be written.
FEW = 20
# Characters of the name of a cluster that are printed.
LONGEST = 30


def assign(
    model: str | Path | Model,
    data: Data,
    *,
    out: str | Path | None = None,
    folders: str | Path | None = None,
    copy: bool = False,
    hardlink: bool = False,
    absolute: bool = False,
    ranked: bool = False,
    add: bool = False,
    overwrite: bool = False,
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
        out: also write a table (`.parquet`, `.csv` or `.jsonl`; its columns are in docs/browsing.md).
        folders: also put links to the images into a folder per cluster in this folder (docs/folders.md).
        copy, hardlink, absolute: `folders` gets copies, hard links, or links with absolute paths.
        ranked: names in `folders` begin with the rank by the distance to the centroid.
        add, overwrite: put images beside those of an earlier call in `folders`, or replace these.
        parts, return_rows: as in `embed`.
        device, batch_size, workers: how the work is done.
        limit: use only this many images, spread evenly.
        reporter: shows progress.

    Raises:
        InputError: model, data or file can't be used, or the model has no clusters.
        Interrupted: Ctrl-C or SIGTERM while `out` or `folders` was written; the same call continues.
    """
    target = None if out is None else output_target(out, ENDINGS, parts=parts, inputs=(model, data))
    if parts and target is None:
        raise InputError("parts are written into a folder: name one with out")
    kinds = {"copy": copy, "hardlink": hardlink, "absolute": absolute}
    wanted = _folders(folders, kinds, ranked=ranked, add=add, overwrite=overwrite)
    if is_run_of_table(model):
        if parts:
            raise InputError("--parts needs images, and this run is of a table of embeddings: leave it out")
        return assign_table(model, data, target, wanted, limit=limit, reporter=reporter)  # type: ignore[arg-type]
    model = model if isinstance(model, Model) else load(model)
    _, assignment = model.clusters()
    names = names_of_model(model.name)
    place = target or (wanted.place if wanted else None)
    with opened(model, data, limit, reporter, shared=place is not None, device=device, workers=workers) as (model, source):
        one = from_kept(model, model.nearest_clusters(batch_size), source, model.settings.cluster_stage)
        one = replace(one, names=names)
        if place is None:
            rows, unreadable = model.in_memory(one, source)
            return clusters_of(names_of(source), rows, names, reasons_by_name(unreadable, source, model), source)
        ranks, work = model.work.ranks, model.work
        clusters = digest_of(model.network, *one.facts)
        if wanted:
            ranks.from_main(lambda: check_folders(wanted, source, clusters, work))
        with parts_of_table(model, one, source, place, are_result=parts) as made:
            if ranks.is_main:
                if target is not None and not parts:
                    join_to_table(made, source, target, work, names)
                work.reporter.say(f"{_counts(made, assignment.n_clusters)}{'' if target is None else f': {target}'}")
                if wanted:
                    columns, n_clusters = _nearest_of(made), assignment.n_clusters
                    done = make_folders(wanted, source, *columns, names, clusters, work, n_clusters=n_clusters)
                    work.reporter.say(f"{wanted.given}: {done}")
            image_names, rows, unreadable = result_of(made, one, source, ranks, return_rows=return_rows)
        return clusters_of(image_names, rows, names, reasons_by_name(unreadable, source, model), source)


def few_clusters(model: str | Path | Model, data: Data, *, reporter: Reporter | None = None, **options: Any) -> str:
    """Return the clusters of a few images as lines to print; options as in `assign`.

    Raises:
        InputError: as `assign`, or there are more than `FEW` images.
    """
    if is_run_of_table(model):
        _check_few(len(table_for(model, data, options.get("limit"))), "rows")
        return clusters_table(assign(model, data, reporter=reporter, **options))
    source = open_source(given_data(data), options.get("limit"))
    _check_few(len(source), "images")
    reasons = list(takewhile(bool, (why_unreadable(source, index) for index in range(len(source)))))
    if len(reasons) == len(source):
        raise InputError("; ".join(f"{source.name(index)} can't be read: {why}" for index, why in enumerate(reasons)))
    model = model if isinstance(model, Model) else load(model)
    found = assign(model, source, reporter=reporter, **options)
    lines, image = [clusters_table(found)], source.path(0)
    if len(source) == 1 and image is not None and not found.unreadable:
        lines += like_one(model, image, int(found.cluster_N[0]), device=options.get("device", "auto"))
    return "\n".join(lines)


def _check_few(count: int, what: str) -> None:
    if count > FEW:
        raise InputError(
            f"assign has nothing to write, and {count:,} {what} are too many to print (at most {FEW}): give --out "
            "TABLE.csv, --folders DIR, or both"
        )


def clusters_table(found: Clusters) -> str:
    """Return clusters as lines to print: the nearest and the second nearest of each image, and how clear the choice is."""

    def cluster(number: int) -> str:
        name = found.cluster_names.get(number, "")
        name = f"{name[: LONGEST - 1]}…" if len(name) > LONGEST else name
        return "-" if number == UNASSIGNED else f"{number} {name}".rstrip()

    def number(value: float) -> str:
        return "-" if np.isnan(value) else f"{value:.3f}"

    if found.second_N is None or found.second_distance_N is None or found.confidence_N is None:
        raise InputError("these clusters have no second ones: make them with assign")
    rows = [("name", "cluster", "distance", "second", "distance of second", "confidence")]
    for row, name in enumerate(found.names):
        near, far = (number(column[row]) for column in (found.distance_N, found.second_distance_N))
        one, two = (cluster(int(column[row])) for column in (found.cluster_N, found.second_N))
        rows.append((visible(name), one, near, two, far, number(found.confidence_N[row])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _folders(
    folders: str | Path | None, kinds: Mapping[str, bool], *, ranked: bool, add: bool, overwrite: bool
) -> Folders | None:
    """Return the folders that options name; refuse options that do not go together."""
    chosen = [name for name, is_chosen in kinds.items() if is_chosen]
    options = {**kinds, "ranked": ranked, "add": add, "overwrite": overwrite}
    if folders is None:
        if given := [f"--{name}" for name, is_given in options.items() if is_given]:
            raise InputError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} for --folders DIR: name one")
        return None
    if len(chosen) > 1:
        raise InputError(f"--folders gets links or copies of one kind: choose --{' or --'.join(chosen)}")
    if add and overwrite:
        raise InputError("--add keeps what is in --folders and --overwrite replaces it: use one of them")
    wanted = Folders(Path(folders), kind=chosen[0] if chosen else "link", ranked=ranked, add=add, overwrite=overwrite)
    output_path(wanted.place, "--folders", is_folder=True)
    return wanted.as_there()


def _nearest_of(made: Parts) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the cluster of each image, and the distance to its centroid."""
    cluster_N, distance_N = np.empty(made.n_rows, np.int64), np.empty(made.n_rows, np.float32)
    for span, rows in made.read():
        cluster_N[span.start : span.stop], distance_N[span.start : span.stop] = rows["cluster"], rows["distance"]
    return cluster_N, distance_N


def _counts(made: Parts, n_clusters: int) -> str:
    """Return how many images are in how many clusters, for printed lines."""
    sizes_K = np.zeros(n_clusters + 1, np.int64)  # The first number counts unreadable images.
    for _, some in made.read():
        sizes_K += np.bincount(some["cluster"] - UNASSIGNED, minlength=len(sizes_K))
    return f"{count_of(int(sizes_K[1:].sum()), 'image')} in {count_of(int((sizes_K[1:] > 0).sum()), 'cluster')}"
