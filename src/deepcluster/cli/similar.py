"""`deepcluster similar`, `duplicates`, `sample` and `compare`: what is done with images that have features or clusters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deepcluster.cli.options import device_options, echo, verbosity_options
from deepcluster.core.progress import Reporter

SPACES = ("embedding", "clusters")
PAGE_TEXT = "also write a page with the pictures (.html)"


def _data(paths: tuple[str, ...]) -> Any:
    return (paths[0] if len(paths) == 1 else paths) or None


def _images_of(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add MODEL, DATA, and how images are compared."""
    command = device_options(verbosity_options(command))
    command = click.option("--limit", type=int, help="use only this many images, spread evenly over the data")(command)
    command = click.option("--page", type=Path, help=PAGE_TEXT)(command)
    return click.argument("model")(click.argument("data", nargs=-1)(command))


@click.command(short_help="Find the images most similar to given ones.")
@click.option("--query", multiple=True, required=True, help="an image file, a folder or list of them, or a name in DATA")
@click.option("--count", type=int, default=20, show_default=True, help="images per query")
@click.option("--space", type=click.Choice(SPACES), default="embedding", show_default=True, help="what is compared")
@click.option("--out", type=Path, help="also write a table (.parquet, .csv, .jsonl: query, rank, name, similarity)")
@_images_of
def similar(model: str, data: tuple[str, ...], quiet: bool, verbose: bool, **options: Any) -> None:
    """Find the images of DATA that are most similar to each --query, which may be given several times. All are compared.

    MODEL is a run folder, whose images are DATA by default; a checkpoint, another program's file of weights or
    untrained:ARCH; or a table of embeddings, as embed writes it: then DATA is only for the pictures of --page. Features are
    kept: the next command is quick.
    """
    from deepcluster.applied import similar as command

    found = command.similar(model, _data(data), reporter=Reporter(quiet=quiet, verbose=verbose), **options)
    if not quiet:
        echo(command.as_text(found))


@click.command(short_help="List all near-duplicates, with one to keep.")
@click.option("--threshold", type=float, help="largest distance of near-duplicates  [4% of the typical distance]")
@click.option("--space", type=click.Choice(SPACES), help="what is compared  [clusters where MODEL has any]")
@click.option(
    "--out", type=Path, help="the table to write (.parquet, .csv, .jsonl: group, name, distance, keep, reason, path)"
)
@click.option("--list", type=Path, help="also write the paths of the images that could be removed, one per line (.txt)")
@_images_of
def duplicates(model: str, data: tuple[str, ...], quiet: bool, verbose: bool, **options: Any) -> None:
    """List all near-duplicates of DATA, in groups with one image to keep. All pairs are compared, exactly.

    Kept is the image with the most pixels; of equally large ones that with the largest file; of these the first by
    name that is not marked as a copy ("copy", "Kopie", "copie", "(1)"). MODEL and DATA are as in similar. Nothing is
    deleted.
    """
    from deepcluster.applied import duplicates as command

    reporter = Reporter(quiet=quiet, verbose=verbose)
    reporter.say(command.duplicates(model, _data(data), reporter=reporter, **options).summary())


@click.command(short_help="Choose images that stand for all, to label first.")
@click.option("--count", type=int, required=True, help="number of images")
@click.option(
    "--how",
    type=click.Choice(("representative", "diverse")),
    default="representative",
    show_default=True,
    help="nearest to the centres of k-means, or as far as possible from each other",
)
@click.option("--space", type=click.Choice(SPACES), help="what is compared  [clusters where MODEL has any]")
@click.option("--seed", type=int, default=0, show_default=True, help="seed of k-means")
@click.option(
    "--out", type=Path, help="the list (.txt) or table (.parquet, .csv, .jsonl: name, stands_for, distance, path) to write"
)
@_images_of
def sample(model: str, data: tuple[str, ...], quiet: bool, verbose: bool, **options: Any) -> None:
    """Choose images of DATA that stand for all, such as those to label first.

    MODEL and DATA are as in similar. A list (.txt) can be used as DATA.
    """
    from deepcluster.applied import sample as command

    reporter = Reporter(quiet=quiet, verbose=verbose)
    found = command.sample(model, _data(data), reporter=reporter, **options)
    if options["out"] is None and not quiet:
        echo("\n".join(found.names))


@click.command(short_help="Compare runs: curves, settings, clusters.")
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--out", type=Path, help="also write the clusters of each image (.parquet, .csv, .jsonl: name, cluster, moved, ...)"
)
@click.option("--page", type=Path, help="also write a page with curves, settings, and images that moved (.html)")
@click.option("--data", multiple=True, help="where the images are  [where they were when the first run was started]")
@verbosity_options
def compare(runs: tuple[str, ...], quiet: bool, verbose: bool, **options: Any) -> None:
    """Compare RUNS, or tables that assign wrote: their curves and settings, and how far their clusters agree.

    Results of evaluate are compared in detail, protocol by protocol, by: deepcluster evaluate compare RUNS
    """
    from deepcluster.applied import comparing as command

    data = options.pop("data") or None
    found = command.compare(runs, data=data, reporter=Reporter(quiet=quiet, verbose=verbose), **options)
    if not quiet:
        from deepcluster.evaluation.results import Table

        for title, (header, rows) in found.tables.items():
            echo(f"{title}\n{Table(header, rows).render()}\n")


COMMANDS = (similar, duplicates, sample, compare)
