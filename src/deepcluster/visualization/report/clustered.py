"""Runs that were clustered without training (`deepcluster cluster`): of images seen by a model, or of a table of embeddings.

N images, M of them in the sample.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError
from deepcluster.core.work import Work
from deepcluster.data.survey import even_sample
from deepcluster.run.embedding_tables import table_of_run
from deepcluster.run.folder import RunFolder
from deepcluster.visualization.report.collection import Collection


def with_points_of_table(
    folder: RunFolder, collection: Collection, state: Mapping[str, Any], sample: int, work: Work
) -> Collection:
    """Return the collection with points of a sample of its images, of the embeddings that the run clustered.

    Args:
        folder: the run.
        state: content of the checkpoint, with the whitening.
        sample: most images of the sample.
    """
    chosen = torch.tensor(even_sample(np.flatnonzero(collection.cluster_N >= 0).tolist(), sample), dtype=torch.int64)
    try:
        table = table_of_run(folder.path, folder.clustered(), folder.clustered().get("limit"))
        if len(table) != len(collection):  # Runs of earlier versions.
            raise InputError(f"it has {len(table):,} rows now, and had {len(collection):,}")
        rows_MD = table.take(chosen)
    except InputError as error:
        work.reporter.warn(f"no map, duplicates and outliers, without the embeddings: {error}")
        return collection
    points_MP = Whitening.from_state_dict(state["final"]["whitening"]).transform(rows_MD)
    return replace(collection, sample_M=chosen.numpy(), points_MP=points_MP.numpy())
