"""`assign` of rows of a table of embeddings, by a run that `cluster` made of such a table. N rows."""

from pathlib import Path

import numpy as np

from deepcluster.applied.clustering_rows import BLOCK_ROWS
from deepcluster.applied.opening import Data
from deepcluster.applied.rows import Clusters, clusters_of
from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.located import UNLOCATED, located
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError
from deepcluster.core.files import user_path
from deepcluster.core.text import count_of
from deepcluster.core.work import Work
from deepcluster.run.cluster_names import read_names
from deepcluster.run.embedding_tables import NO_NUMBERS, is_table, open_table
from deepcluster.run.features import FEATURE_BATCH
from deepcluster.run.folder import RunFolder, load_checkpoint
from deepcluster.run.table_writers import write_rows


def is_run_of_table(model: object) -> bool:
    """Return whether a model is a run that was made of a table of embeddings, and so has no network."""
    if not isinstance(model, str | Path) or not RunFolder(user_path(model)).is_run():
        return False
    facts = RunFolder(user_path(model)).clustered()
    return bool(facts) and not facts["stage"]


def assign_table(run: str | Path, data: Data, target: Path | None, *, limit: int | None, work: Work) -> Clusters:
    """Return the nearest cluster of each row of a table, and write them.

    Args:
        run: a run of a table.
        data: another table of embeddings of the same kind.
        target: the table to write (.parquet, .csv or .jsonl); None: none.
        limit: only this many rows, spread evenly.

    Raises:
        InputError: `data` is no such table, or of another width.
    """
    folder = RunFolder(user_path(run))
    if not isinstance(data, str | Path) or not is_table(data):
        raise InputError(
            f"{run} has clusters of a table of embeddings, and no network that could see images: give a table of such "
            f"embeddings (.parquet or .npy), made by the same model as {folder.clustered()['model']}"
        )
    table, final = open_table(data), load_checkpoint(folder.last)["final"]
    whitening, assignment = Whitening.from_state_dict(final["whitening"]), Assignment.from_state_dict(final["assignment"])
    if table.dim != len(whitening.mean_D):
        raise InputError(
            f"{data} has embeddings of {table.dim:,} numbers, and {run} was made of {len(whitening.mean_D):,}: they are not "
            "of the same model"
        )
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
    names = table.names()
    if limit is not None and limit < len(names):
        kept = np.arange(limit) * len(names) // limit
        names, columns = [names[index] for index in kept], {name: column[kept] for name, column in columns.items()}
    cluster_N, given = columns["cluster"], read_names(folder.path)
    if target is not None:
        named = {"cluster_name": [given.get(cluster) for cluster in cluster_N.tolist()]} if given else {}
        write_rows({"name": names, **columns, **named}, target)
        known_N = cluster_N[cluster_N >= 0]
        used = count_of(len(np.unique(known_N)), "cluster")
        work.reporter.say(f"{count_of(len(known_N), 'row')} in {used}: {target}")
    unreadable = {names[row]: NO_NUMBERS for row in np.flatnonzero(cluster_N < 0)}
    return clusters_of(names, columns, given, unreadable)
