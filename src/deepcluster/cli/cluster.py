"""`deepcluster cluster`: clusters of any images by any model, without training."""

from pathlib import Path
from typing import Any

import click

from deepcluster.applied.clustering_options import ClusterOptions
from deepcluster.cli.options import batch_options, user_options, verbosity_options, with_settings
from deepcluster.core.progress import Reporter


@click.command(short_help="Cluster images by a model as it is, without training.")
@click.argument("model")
@click.argument("data", nargs=-1)
@click.option("--out", type=Path, required=True, help="the run folder to write")
@click.option(
    "--clusters",
    "--k",
    "clusters",
    metavar="K",
    help="number of clusters; several, such as 10,20,50, are compared, and the most stable is used; auto also chooses these",
)
@click.option("--overwrite", is_flag=True, help="delete the run in --out first")
@click.option("--stage", help="stage of the trunk, averaged over its map (deepcluster info MODEL lists them)")
@batch_options
@verbosity_options
@with_settings(ClusterOptions)
def cluster(model: str, data: tuple[str, ...], quiet: bool, verbose: bool, **options: Any) -> None:
    """Cluster the images of DATA by the features of MODEL, and write a run folder. Nothing is trained.

    MODEL is a run folder, a checkpoint, another program's file of weights, untrained:ARCH, or a table of embeddings
    (.parquet or .npy, as embed writes it). DATA may be left out for a run, which remembers its images, and for a table.

    The result is used as a run that was trained: report, assign, info, evaluate clusters, train --init.
    """
    from deepcluster.applied import clustering

    given = data[0] if len(data) == 1 else list(data) or None
    clustering.cluster(model, given, reporter=Reporter(quiet=quiet, verbose=verbose), **user_options(options))
