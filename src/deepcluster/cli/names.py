"""`deepcluster names`."""

from pathlib import Path

import click

from deepcluster.cli.options import echo, verbosity_options
from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter


@click.command(short_help="Show and give names for the clusters of a run.")
@click.argument("run")
@click.option("--set", "given", multiple=True, metavar="N=NAME", help='name a cluster: --set 3="dogs"; --set 3= removes it')
@click.option("--from", "labels", type=Path, help="a table of some images and their labels (.csv): take the most frequent")
@verbosity_options
def names(run: str, given: tuple[str, ...], labels: Path | None, quiet: bool, verbose: bool) -> None:
    """Show the clusters of RUN with their sizes and names, and name some of them.

    Names are kept in RUN/names.csv (columns cluster and name), which may also be edited by hand. The tables and folders of
    assign and the report show them.
    """
    from deepcluster.applied.naming import name_clusters

    wanted: dict[int, str] = {}
    for text in given:
        number, equals, name = text.partition("=")
        if not equals or not number.strip().isdecimal():
            raise InputError(f"--set {text}: write the number of a cluster and its name, such as --set 3=dogs")
        if wanted.setdefault(int(number), name) != name:
            raise InputError(f"--set names cluster {int(number)} twice, {wanted[int(number)]!r} and {name!r}: leave one out")
    found = name_clusters(run, wanted, labels=labels, reporter=Reporter(quiet=quiet, verbose=verbose))
    if not quiet:
        echo(str(found))
