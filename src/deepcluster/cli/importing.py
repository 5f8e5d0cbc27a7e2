"""`deepcluster import`."""

from pathlib import Path

import click

from deepcluster.cli.options import verbosity_options
from deepcluster.core.progress import Reporter


@click.command("import", short_help="Make a run folder of another program's model.")
@click.argument("file")
@click.option("--out", type=Path, required=True, help="the run folder; for clusters of 2018 the table (.parquet)")
@click.option("--data", type=Path, help="for clusters of 2018: the folder of class folders that they are of")
@click.option("--epoch", type=click.IntRange(min=1), help="for the log `clusters` of 2018: an epoch, from 1  [the last]")
@click.option("--overwrite", is_flag=True, help="delete the run in --out first")
@verbosity_options
def import_command(
    file: str, out: Path, data: Path | None, epoch: int | None, overwrite: bool, quiet: bool, verbose: bool
) -> None:
    """Make a run folder of FILE: a released model of 2018, DeeperCluster, DeepCluster-v2, SwAV, mmselfsup, solo-learn,
    lightly, VISSL, torchvision, timm or Caffe. Every command also takes such a file itself as MODEL.

    ARCH@FILE names the network of a file that does not show it: timm:vit_small_patch16_224@weights.pth.

    With --out TABLE.parquet, FILE holds clusters: the log `clusters` of the 2018 code (with --data), or its published list
    of (path, cluster).
    """
    from deepcluster.interop.importing import import_file

    import_file(file, out=out, data=data, epoch=epoch, overwrite=overwrite, reporter=Reporter(quiet=quiet, verbose=verbose))
