"""The command line: one command per verb, which parses, calls the function of the same name, and prints.

The options of `train` are derived from `run.settings.Settings`. Nothing here imports torch before a command needs it.
"""

import errno
import gc
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from deepcluster import __version__
from deepcluster.cli.cluster import cluster
from deepcluster.cli.download import download
from deepcluster.cli.evaluate import evaluate_group
from deepcluster.cli.export import export
from deepcluster.cli.importing import import_command
from deepcluster.cli.names import names
from deepcluster.cli.options import (
    GroupedCommand,
    as_typed,
    batch_options,
    echo,
    started_ranks,
    user_options,
    verbosity_options,
    with_settings,
)
from deepcluster.cli.similar import COMMANDS as SIMILAR_COMMANDS
from deepcluster.cli.visualize import report, visualize_group
from deepcluster.core.errors import DeepClusterError, InputError, Interrupted, LostProcess
from deepcluster.core.output import Output, open_standard_files, safe_streams, silence
from deepcluster.core.progress import Reporter
from deepcluster.core.text import visible
from deepcluster.core.wording import on_command_line
from deepcluster.run.settings import REMOVED, Settings

# Commands that several processes, which `torchrun` starts, do together.
OVER_RANKS = ("train", "cluster", "embed", "assign", "evaluate")
# Commands that write files. The others have done nothing if their output can't be written.
WRITE_FILES = (
    *("train", "cluster", "embed", "assign", "visualize", "report", "names", "import", "export", "download", "demo"),
)
# Exit status of a program whose output goes into a pipe that is closed, as shells show it.
BROKEN_PIPE = 128 + 13
# Seconds that the processes after the first wait before they report an error.
TURN_SECONDS = 10.0


def _data(paths: tuple[str, ...]) -> str | tuple[str, ...]:
    return paths[0] if len(paths) == 1 else paths


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, package_name="deepcluster")
@click.pass_context
def cli(context: click.Context) -> None:
    """Learn visual features, and clusters, from a folder of images without labels (DeepCluster, ECCV 2018)."""
    if started_ranks() > 1 and context.invoked_subcommand not in OVER_RANKS:
        raise InputError(
            f"{context.invoked_subcommand} runs in one process: leave out torchrun, which is for {', '.join(OVER_RANKS)}"
        )


@cli.command(cls=GroupedCommand, short_help="Learn features and clusters from the images of DATA.")
@click.argument("data", nargs=-1, required=True)
@click.option("--out", "--exp", "out", type=Path, help="the run folder  [runs/NAME-OF-DATA]")
@click.option("--resume", is_flag=True, help="continue the run in --out, or begin it where there is none")
@click.option("--overwrite", is_flag=True, help="delete the run in --out first")
@click.option(
    "--config", type=Path, help="start from the settings of a run, or of a file (.json, .toml); other options override them"
)
@click.option("--dry-run", is_flag=True, help="print the plan, and what time, memory and disk it will take; write nothing")
@verbosity_options
@with_settings(Settings)
def train(data: tuple[str, ...], quiet: bool, verbose: bool, **options: Any) -> None:
    """Learn from the images of DATA: a folder, a list (.txt) or table (.csv) of paths, tar shards, Parquet, arrays, an
    address (https://, s3://, ...) of these, or several of them.

    Defaults are in brackets. [auto; paper: 256]: --recipe auto, the default, chooses the value for your images, prints it
    with its reason, and never changes what you set; 256 is the value of the code published with the paper.
    """
    from deepcluster import api

    reporter = Reporter(quiet=quiet, verbose=verbose)
    api.train(_data(data), reporter=reporter, **user_options(options))


@cli.command(short_help="Write the features of images.")
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("--out", type=Path, required=True, help="the table (.parquet, .csv or .jsonl) or array (.npy) to write")
@click.option("--stage", help="stage of the trunk, averaged over its map (deepcluster info MODEL lists them)")
@click.option("--parts", is_flag=True, help="--out is a folder, for numbered Parquet files that are one table")
@batch_options
@verbosity_options
def embed(model: str, data: tuple[str, ...], quiet: bool, verbose: bool, **options: Any) -> None:
    """Write the features of the images of DATA, one row per image.

    MODEL is a run folder, a checkpoint, another program's file of weights, untrained:ARCH or untrained:RUN (random
    weights).
    """
    from deepcluster.applied import embedding

    reporter = Reporter(quiet=quiet, verbose=verbose)
    embedding.embed(model, _data(data), reporter=reporter, return_rows=False, **options)
    _say_next(reporter, options["out"], data)


def _say_next(reporter: Reporter, table: Path | None, data: tuple[str, ...]) -> None:
    """Print the command that shows a table, where there is one for its format."""
    if table is not None and started_ranks() == 1:
        where = ["--data", data[0]] if len(data) == 1 else []
        reporter.say(f"see it as a page: {shlex.join(['deepcluster', 'report', str(table), *where])}")


@cli.command(short_help="Write the cluster of each image.")
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("--out", type=Path, help="the table to write (.parquet, .csv for spreadsheets, or .jsonl)")
@click.option("--folders", type=Path, help="also make a folder per cluster here, with links to its images")
@click.option("--copy", is_flag=True, help="--folders gets copies instead of links")
@click.option("--hardlink", is_flag=True, help="--folders gets hard links (of one disk; they take no space)")
@click.option("--absolute", is_flag=True, help="--folders gets links with absolute paths")
@click.option("--ranked", is_flag=True, help="names in --folders begin with the rank by distance to the centre: 001_")
@click.option("--add", is_flag=True, help="put the images beside those of an earlier command in --folders, none twice")
@click.option("--overwrite", is_flag=True, help="replace what an earlier command has put into --folders")
@click.option("--parts", is_flag=True, help="--out is a folder, for numbered Parquet files that are one table")
@batch_options
@verbosity_options
def assign(model: str, data: tuple[str, ...], quiet: bool, verbose: bool, **options: Any) -> None:
    """Write the cluster of each image of DATA. The images may be others than those that MODEL was trained on.

    Without --out and --folders, the clusters of up to 20 images are printed.
    """
    from deepcluster.applied import assigning

    reporter = Reporter(quiet=quiet, verbose=verbose)
    if options["out"] is None and options["folders"] is None:
        echo(assigning.few_clusters(model, _data(data), reporter=reporter, **options))
        return
    assigning.assign(model, _data(data), reporter=reporter, return_rows=False, **options)
    _say_next(reporter, options["out"], data)


USING = (cluster, *SIMILAR_COMMANDS, evaluate_group, visualize_group, report, names)
for command in (*USING, import_command, export, download):
    cli.add_command(command)


@cli.command(short_help="Describe a run, a checkpoint, a network or images.")
@click.argument("path")
@click.option("--all", "everything", is_flag=True, help="read all images instead of a sample of 10,000")
@verbosity_options
def info(path: str, everything: bool, quiet: bool, verbose: bool) -> None:
    """Describe a run folder, a checkpoint, untrained:ARCH, or images: sizes, copies, and unreadable files."""
    from deepcluster.info import info as describe

    echo(describe(path, everything=everything, reporter=Reporter(quiet=quiet, verbose=verbose)))


@cli.command(short_help="Show what this machine offers.")
@verbosity_options
def doctor(quiet: bool, verbose: bool) -> None:
    """Show what this machine offers: device, bf16, threads, memory, versions."""
    from deepcluster.info import doctor as examine

    echo(examine())


@cli.command(short_help="Run the whole job on images that are already here.")
@click.option("--out", type=Path, default=Path("runs/demo"), show_default=True, help="folder for images and run")
@verbosity_options
def demo(out: Path, quiet: bool, verbose: bool) -> None:
    """Run the whole job on images that are already here: the 1,797 digits of scikit-learn, without their labels."""
    from deepcluster.demo import demo as show

    echo(show(out, Reporter(quiet=quiet, verbose=verbose)))


@cli.group(short_help="Show or delete what is kept between runs.")
def cache() -> None:
    """Show or delete what is kept between runs: copies of remote data, features, decoded images."""


def _in_folder(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "the cache folder  [$DEEPCLUSTER_CACHE, or ~/.cache/deepcluster]"
    return click.option("--folder", type=Path, help=text)(command)


@cache.command("info")
@_in_folder
@verbosity_options
def cache_info(folder: Path | None, quiet: bool, verbose: bool) -> None:
    """Show what is kept, and how much space it takes."""
    from deepcluster.info import cache_info as describe

    echo(describe(folder))


@cache.command("clear", short_help="Delete what is kept, or some kinds of it.")
@click.argument("kinds", nargs=-1)
@_in_folder
@verbosity_options
def cache_clear(kinds: tuple[str, ...], folder: Path | None, quiet: bool, verbose: bool) -> None:
    """Delete what is kept, or only the KINDS that `cache info` names, such as images."""
    from deepcluster.info import cache_clear as delete

    Reporter(quiet=quiet, verbose=verbose).say(delete(kinds, folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: by default those of this process, which ends with the command.

    Returns:
        the exit status: 0, 2 (wrong input), 1 (anything else), 130 (interrupted), or 141 (output into a closed pipe).
    """
    if arguments is None:
        open_standard_files()
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # `__main__` has set it for the time of the imports.
            signal.signal(signal.SIGINT, signal.default_int_handler)
    words = sys.argv[1:] if arguments is None else list(arguments)
    on_command_line()
    with safe_streams() as outputs:
        try:
            cli.main(words, prog_name="deepcluster", standalone_mode=False)
            status = _check_output(words, outputs[0])
        except (Exception, KeyboardInterrupt) as fault:
            status = _failed(_stop_within(fault), words)
    if arguments is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Nothing is left that could be interrupted.
        gc.freeze()  # Python would look through all that torch has made once more, for seconds on a busy machine.
        for output in outputs:
            silence(output)
    return status


def _stop_within(fault: BaseException) -> BaseException:
    """Return the stop that a second Ctrl-C cut short while it was passed on, which knows how to continue; else the fault."""
    inner: BaseException | None = fault
    while isinstance(inner, click.Abort | KeyboardInterrupt):
        inner = inner.__cause__ or inner.__context__
    return inner if isinstance(inner, Interrupted) else fault


def _failed(fault: BaseException, arguments: list[str]) -> int:
    """Print the error of a command; return the exit status."""
    # True in a process that `torchrun` started and that is not the first.
    is_follower = started_ranks() > 1 and int(os.environ.get("RANK", "0")) > 0
    if is_follower and isinstance(fault, Interrupted | KeyboardInterrupt):
        return 130
    # Once one process has reported its error, `torchrun` ends the others. The first process should report an error that
    # all have; a process that only lost another one knows the least.
    time.sleep(TURN_SECONDS * (2 if isinstance(fault, LostProcess) else int(is_follower)))
    return _report(fault, "--verbose" in arguments or "-v" in arguments)


def _check_output(arguments: list[str], output: Output) -> int:
    """Return the exit status of a command that is done, but whose output could perhaps not be written."""
    output.flush()
    command = next((word for word in arguments if not word.startswith("-")), "")
    if output.fault is None or (command in WRITE_FILES and not {"-h", "--help"} & set(arguments)):
        return 0
    if getattr(output.fault, "errno", None) == errno.EPIPE:
        return BROKEN_PIPE
    reason = getattr(output.fault, "strerror", None) or output.fault
    return _complain(f"the standard output can't be written to: {reason}", 1)


def _report(fault: BaseException, verbose: bool) -> int:
    """Print an error as one plain message; return the exit status."""
    match fault:
        case DeepClusterError():
            if verbose:
                traceback.print_exception(fault)
            return _complain(as_typed(str(fault), cli), fault.exit_status)
        case click.exceptions.NoArgsIsHelpError():
            print(fault.format_message(), file=sys.stderr)
            return fault.exit_code
        case click.NoSuchOption() if (name := fault.option_name.lstrip("-").replace("-", "_")) in REMOVED:
            return _complain(f"{fault.option_name} is gone: {REMOVED[name]}", 2)
        case click.MissingParameter() if fault.ctx is not None:
            return _complain(f"{fault.format_message()} {fault.ctx.get_usage()}; --help lists the options", 2)
        case click.UsageError():
            return _complain(fault.format_message(), 2)
        case click.Abort() | KeyboardInterrupt():
            return _complain("interrupted", 130)
        case OSError() if fault.errno:  # What the system or a disk refuses.
            if verbose:
                traceback.print_exception(fault)
            return _complain(f"{fault.strerror}: {fault.filename}" if fault.filename else str(fault), 1)
    traceback.print_exception(fault)
    name = type(fault).__name__
    return _complain(f"unexpected {name}: {fault}. This is a defect of deepcluster: please report it", 1)


def _complain(message: str, status: int) -> int:
    print(f"deepcluster: {visible(message, lines=True)}", file=sys.stderr)
    return status
