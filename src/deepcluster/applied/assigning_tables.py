"""`assign` of rows of a table of embeddings, by a run that `cluster` made of such a table. N rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.applied.clustering_rows import BLOCK_ROWS
from deepcluster.applied.opening import Data, warn_of_unreadable
from deepcluster.applied.rows import Clusters, clusters_of
from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.located import UNLOCATED, located
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.distributed import started_ranks
from deepcluster.core.errors import InputError
from deepcluster.core.files import user_path
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.sources.by_name import NamedPictures, pictures_by_name
from deepcluster.data.sources.files import image_files
from deepcluster.interop.loading import new_interruption
from deepcluster.run.cluster_folders import Folders, check_folders, make_folders
from deepcluster.run.cluster_names import read_names
from deepcluster.run.embedding_tables import NO_NUMBERS, EmbeddingTable, is_table, open_table
from deepcluster.run.features import FEATURE_BATCH
from deepcluster.run.folder import RunFolder, load_checkpoint
from deepcluster.run.resumable import digest_of, state_hash
from deepcluster.run.table_writers import write_rows


def is_run_of_table(model: object) -> bool:
    """Return whether a model is a run that was made of a table of embeddings, and so has no network."""
    return isinstance(model, str | Path) and RunFolder(user_path(model)).is_of_table()


def table_for(run: object, data: Data, limit: int | None = None) -> EmbeddingTable:
    """Return the table that `data` is, or `limit` of its rows.

    Raises:
        InputError: it is none.
    """
    if isinstance(data, str | Path) and is_table(data):
        return open_table(data, limit)
    of_model = RunFolder(user_path(str(run))).clustered()["model"]
    raise InputError(
        f"{run} has clusters of a table of embeddings, and no network that could see images: give a table of such "
        f"embeddings (.parquet or .npy), made by the same model as {of_model}"
    )


def assign_table(
    run: str | Path,
    data: Data,
    target: Path | None,
    folders: Folders | None,
    *,
    limit: int | None,
    reporter: Reporter | None,
) -> Clusters:
    """Return the nearest cluster of each row of a table, and write them.

    Args:
        run: a run of a table.
        data: another table of embeddings of the same kind.
        target: the table to write (.parquet, .csv or .jsonl); None: none.
        folders: also put the images into these, where the table names files.
        limit: only this many rows, spread evenly.

    Raises:
        InputError: `data` is no such table, or of another width; or there are no images for `folders`.
    """
    if started_ranks() > 1:
        raise InputError("the rows of a table are assigned in one process: leave out torchrun")
    folder, table = RunFolder(user_path(run)), table_for(run, data, limit)
    final = load_checkpoint(folder.last)["final"]
    whitening, assignment = Whitening.from_state_dict(final["whitening"]), Assignment.from_state_dict(final["assignment"])
    if table.dim != len(whitening.mean_D):
        raise InputError(
            f"{data} has embeddings of {table.dim:,} numbers, and {run} was made of {len(whitening.mean_D):,}: they are not "
            "of the same model"
        )
    names, paths = table.names(), table.paths()
    given, clusters = read_names(folder.path), digest_of(state_hash(final["whitening"]), state_hash(final["assignment"]))
    interruption = new_interruption("the same command continues" if folders else "nothing was written")
    with interruption.listening():
        work = Work(reporter, interruption)
        pictures = None if folders is None else _pictures_for(folders, data, names, paths, folder)
        if folders and pictures:
            check_folders(folders, pictures, clusters, work)
        columns = _located_rows(table, whitening, assignment, work)
        cluster_N = columns["cluster"]
        if target is not None:
            named = {"cluster_name": [given.get(cluster) for cluster in cluster_N.tolist()]} if given else {}
            write_rows({"name": names, **columns, **named, **({} if paths is None else {"path": paths})}, target)
        if target is not None or folders is not None:
            known_N = cluster_N[cluster_N >= 0]
            used = count_of(len(np.unique(known_N)), "cluster")
            where = "" if target is None else f": {target}"
            work.reporter.say(f"{count_of(len(known_N), 'row')} in {used}{where}")
        if folders and pictures:
            pair, n_clusters = (cluster_N, columns["distance"]), assignment.n_clusters
            done = make_folders(folders, pictures, *pair, given, clusters, work, n_clusters=n_clusters)
            work.reporter.say(f"{folders.given}: {done}")
    unreadable = {names[row]: NO_NUMBERS for row in np.flatnonzero(cluster_N < 0)}
    warn_of_unreadable(unreadable, work.reporter)
    return clusters_of(names, columns, given, unreadable, lambda: known_pictures(names, paths, folder))


def _located_rows(
    table: EmbeddingTable, whitening: Whitening, assignment: Assignment, work: Work
) -> Mapping[str, NDArray[Any]]:
    """Return the columns of `located` of all rows."""
    columns = {name: np.full(len(table), empty) for name, empty in UNLOCATED.items()}
    first = 0
    with work.track("rows", len(table), "rows") as advance:
        for block_BD in table.read(slice(0, len(table)), BLOCK_ROWS):
            for rows_BD in block_BD.split(FEATURE_BATCH):
                finite_B = rows_BD.isfinite().all(dim=1)
                rows = first + finite_B.nonzero().flatten().numpy()
                for name, values in located(assignment, whitening.transform(rows_BD[finite_B])).items():
                    columns[name][rows] = values.numpy()
                first += len(rows_BD)
                advance(len(rows_BD))
    return columns


def known_pictures(names: Sequence[str], paths: Sequence[str | None] | None, folder: RunFolder | None) -> ImageSource | None:
    """Return the images of rows: the files that the table names by their paths, or images that its run remembers."""
    there = [(row, Path(path)) for row, path in enumerate(paths or ()) if path and Path(path).is_file()]
    if there:
        index_N = np.full(len(names), -1)
        index_N[[row for row, _ in there]] = np.arange(len(there))
        return NamedPictures(names, image_files([path for _, path in there]), index_N)
    address = folder.read_config()["data"].get("address") if folder else None
    try:
        return pictures_by_name(names, open_source(address)) if address else None
    except InputError:
        return None


def _pictures_for(
    wanted: Folders, data: Data, names: Sequence[str], paths: Sequence[str | None] | None, folder: RunFolder
) -> ImageSource:
    pictures = known_pictures(names, paths, folder)
    if pictures is None:
        raise InputError(
            f"--folders {wanted.given} needs image files, and none are known for the rows of {data}: it has no column path "
            "of files that are here, as embed writes it into .parquet, and "
            f"{folder.path} remembers no images of these names (cluster TABLE DATA does). Use --out"
        )
    return pictures
