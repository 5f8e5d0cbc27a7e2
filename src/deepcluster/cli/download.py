"""`deepcluster download`: models and data sets from the net."""

import sys
from pathlib import Path

import click

from deepcluster.cli.options import echo, verbosity_options
from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.interop.download.catalogue import entry_of


@click.command(short_help="Download a released model, or a data set.")
@click.argument("name", required=False)
@click.option("--list", "show", is_flag=True, help="list what can be downloaded: name, size, licence")
@click.option("--out", type=Path, help="folder to write to  [NAME; of a model, models/NAME in the cache folder]")
@click.option("--accept-licence", "--accept-license", is_flag=True, help="accept the licence of weights that ask for it")
@click.option(
    "--mirror",
    metavar="ADDRESS",
    help="get the files from ADDRESS/HOST/PATH instead  [$DEEPCLUSTER_MIRROR]",
)
@click.option("--keep-archives", is_flag=True, help="keep the archives of a data set, in the folder OUT/.download")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="seconds of silence before a connection is tried again",
)
@verbosity_options
def download(
    name: str | None,
    show: bool,
    out: Path | None,
    accept_licence: bool,
    mirror: str | None,
    keep_archives: bool,
    timeout: float,
    quiet: bool,
    verbose: bool,
) -> None:
    """Download the model or data set NAME, check its sum, unpack it, and print the commands that use it.

    Stopped by Ctrl-C, a lost connection or a full disk, the same command continues.
    """
    from deepcluster.interop import download as downloads

    if show:
        echo(downloads.table())
        return
    if name is None:
        raise InputError("give the NAME of a model or data set; `deepcluster download --list` shows them")
    reporter = Reporter(quiet=quiet, verbose=verbose)
    licence = entry_of(name).licence
    if licence.must_be_accepted and not accept_licence and sys.stdin.isatty() and sys.stdout.isatty():
        accept_licence = click.confirm(f"{licence.text}. Do you accept it?", default=False)
    downloads.download(
        name,
        out,
        accept_licence=accept_licence,
        mirror=mirror,
        keep_archives=keep_archives,
        timeout=timeout,
        reporter=reporter,
    )
