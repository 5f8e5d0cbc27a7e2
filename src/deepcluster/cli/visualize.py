"""`deepcluster visualize` and `deepcluster report`: pictures and a page of what was learned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deepcluster.cli.options import device_options, user_options, verbosity_options, with_settings
from deepcluster.core.progress import Reporter
from deepcluster.visualization.options import FilterOptions, ReportOptions, TopImagesOptions


@click.group("visualize", short_help="Show what the filters of a network have learned.")
def visualize_group() -> None:
    """Show what the filters of a trunk (the network) have learned (docs/visualization.md).

    MODEL is a run folder, a checkpoint, another program's file of weights, untrained:ARCH or untrained:RUN (random
    weights).
    """


def _into(text: str) -> Callable[..., Any]:
    return click.option("--out", type=Path, help=f"folder to write the pictures to  [{text}]")


@visualize_group.command("filters", short_help="Pictures that excite each filter most, by gradient ascent.")
@click.argument("model")
@_into("RUN/visualization/filters")
@device_options
@verbosity_options
@with_settings(FilterOptions)
def filters(model: str, quiet: bool, verbose: bool, **options: Any) -> None:
    """Make pictures that excite each filter of a stage most, by gradient ascent."""
    from deepcluster.visualization import filters as command

    reporter = Reporter(quiet=quiet, verbose=verbose)
    for path in command.filters(model, reporter=reporter, **user_options(options)):
        reporter.say(str(path))


@visualize_group.command("top-images", short_help="The images that excite each filter most.")
@click.argument("model")
@click.option("--data", multiple=True, help="images to search: a folder, list, shards, …  [the images of the run]")
@_into("RUN/visualization/top-images")
@click.option("--copies", type=Path, help="also copy the images to a folder per filter in this folder")
@device_options
@verbosity_options
@with_settings(TopImagesOptions)
def top_images(model: str, data: tuple[str, ...], quiet: bool, verbose: bool, **options: Any) -> None:
    """Find the images, and the patches of them, that excite each filter of a stage most."""
    from deepcluster.visualization import top_images as command

    reporter = Reporter(quiet=quiet, verbose=verbose)
    for path in command.top_images(model, data or None, reporter=reporter, **user_options(options)):
        reporter.say(str(path))


@click.command(short_help="Make one HTML page of a run: clusters, map, how it works.")
@click.argument("path", metavar="RUN")
@click.option("--data", multiple=True, help="where the images are  [where they were when the run was started]")
@click.option("--out", type=Path, help="the page to write  [RUN/report.html, or beside a table]")
@click.option("--new", multiple=True, help="images that are not of the run: show each beside the cluster it falls into")
@click.option("--open", "show", is_flag=True, help="open the page in the browser")
@click.option("--watch", is_flag=True, help="rebuild the page after each epoch until the run ends; it reloads itself")
@device_options
@verbosity_options
@with_settings(ReportOptions)
def report(path: str, quiet: bool, verbose: bool, **options: Any) -> None:
    """Make one self-contained HTML page of a run: its clusters, a map, how it works, duplicates and outliers.

    RUN may also be a table of embeddings or of clusters (Parquet, text or NumPy).
    """
    from deepcluster.visualization.report import command as reports

    reporter = Reporter(quiet=quiet, verbose=verbose)
    data, new = options.pop("data"), options.pop("new")
    reports.report(path, data=data or None, new=new or None, reporter=reporter, **user_options(options))
