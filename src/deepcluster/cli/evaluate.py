"""`deepcluster evaluate`: one command per protocol, all protocols at once, and a comparison of runs."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from deepcluster.cli.options import (
    GroupedCommand,
    device_options,
    echo,
    started_ranks,
    user_options,
    verbosity_options,
    with_settings,
)
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.options import flag, parse
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of, duration
from deepcluster.evaluation.options import FORMATS, PROTOCOLS


@click.group("evaluate", short_help="Evaluate a model by the protocols of the field.")
def evaluate_group() -> None:
    """Evaluate a model by the protocols of the field. Each prints a table and writes a file of its results.

    MODEL is a run folder, a checkpoint, another program's file of weights, untrained:ARCH or untrained:RUN (random
    weights: the baseline).
    """


_form = click.option(
    "--format", "form", type=click.Choice(FORMATS), default="text", show_default=True, help="format of the tables"
)


_quick = click.option("--quick", is_flag=True, help="shorter settings, for a first look; other options override them")


def _protocol_command(protocol: str) -> click.Command:
    @click.argument("model")
    @click.option("--data", type=Path, required=True, help="folder of the data set (docs/evaluation.md)")
    @click.option("--out", type=Path, help="file (.json) or folder of the results  [RUN/evaluation]")
    @_form
    @device_options
    @verbosity_options
    @with_settings(PROTOCOLS[protocol].options)
    def command(model: str, data: Path, form: str, quiet: bool, verbose: bool, quick: bool = False, **options: Any) -> None:
        from deepcluster.evaluation import protocols

        reporter = Reporter(quiet=quiet, verbose=verbose)
        arguments = {"reporter": reporter, "quick": quick, **user_options(options)}
        if started_ranks() == 1 or protocols.prepare(protocol, model, data, **arguments):
            _show(protocols.evaluate(protocol, model, data, **arguments), form)
            given = [word for name, value in user_options(options).items() for word in _words(name, value)]
            _show_baseline(reporter, model, protocol, "--data", str(data), *["--quick"] * quick, *given)

    text = PROTOCOLS[protocol].options.__doc__ or ""
    made = click.command(protocol, cls=GroupedCommand, help=text, short_help=re.split(r" \(|[.,;]", text)[0])(command)
    return _quick(made) if PROTOCOLS[protocol].quick else made


for _protocol in PROTOCOLS:
    evaluate_group.add_command(_protocol_command(_protocol))


@evaluate_group.command("all", short_help="Every protocol that finds its data in a folder.")
@click.argument("model")
@click.option("--data-root", type=Path, required=True, help="a data set, or a folder of several")
@click.option("--only", help="only these protocols, separated by commas")
@_quick
@click.option("--again", is_flag=True, help="repeat evaluations whose results exist for the same model, data and options")
@click.option("--set", "assigned", multiple=True, metavar="PROTOCOL.OPTION=VALUE", help="an option of a protocol")
@click.option("--out", type=Path, help="folder of the results  [RUN/evaluation]")
@_form
@device_options
@verbosity_options
def evaluate_all(
    model: str,
    data_root: Path,
    only: str | None,
    assigned: tuple[str, ...],
    form: str,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Run every protocol that finds its data in a folder, and print one table of all."""
    from deepcluster.evaluation import protocols

    options["only"] = [name.strip() for name in only.split(",")] if only else []
    options["options"] = _assigned(assigned)
    options["reporter"] = Reporter(quiet=quiet, verbose=verbose)

    def on_result(evaluation: Any) -> None:
        _show(evaluation, form)
        echo("")

    if started_ranks() == 1 or protocols.prepare_all(model, data_root, **options):
        done = protocols.evaluate_all(model, data_root, on_result=on_result, **options)
        echo(protocols.summary(done).render(form))
        _show_baseline(options["reporter"], model, "all", "--data-root", str(data_root))


@evaluate_group.command("compare", short_help="Results of several runs side by side.")
@click.argument("runs", nargs=-1, required=True)
@click.option("--all", "everything", is_flag=True, help="all measures instead of the main one of each protocol")
@_form
@verbosity_options
def evaluate_compare(runs: tuple[str, ...], everything: bool, form: str, quiet: bool, verbose: bool) -> None:
    """Compare the results of several RUNS (or folders of results), side by side."""
    from deepcluster.evaluation.protocols import compare

    if started_ranks() > 1:
        raise InputError("evaluate compare runs in one process: leave out torchrun")
    table, remarks = compare(runs, everything=everything)
    echo(table.render(form))
    for remark in remarks:
        Reporter(quiet=quiet, verbose=verbose).warn(remark)


def _assigned(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return options such as `linear.epochs=20`, by protocol."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        protocol, dot, option = name.partition(".")
        if not equals or not dot or protocol not in PROTOCOLS:
            near = did_you_mean(protocol, PROTOCOLS)
            raise InputError(f"--set {text}: write PROTOCOL.OPTION=VALUE, such as linear.epochs=20{near}")
        option = option.replace("-", "_")
        found.setdefault(protocol, {})[option] = parse(PROTOCOLS[protocol].options, option, value)
    return found


def _show(evaluation: Any, form: str) -> None:
    """Print the tables of a protocol, its notes, and published numbers of the same data set and network."""
    from deepcluster.evaluation.published import comparable_table
    from deepcluster.evaluation.results import tables_of

    results = evaluation.results
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results.data.items())
    echo(f"{results.protocol} of {evaluation.model}: {facts}")
    echo("\n\n".join(table.render(form) for table in tables_of(results.results)))
    for note in results.notes:
        echo(f"note: {note}")
    # Published numbers: rows of a table, or lines that fit a terminal.
    data_name = Path(evaluation.data).resolve().name
    table = comparable_table(results.protocol, data_name, str(results.settings["arch"]), results.data)
    if table is not None:
        lines = [
            f"- {system}; {network}, {where}: {numbers} ({source})" for system, where, network, numbers, source in table.rows
        ]
        echo("\nPublished, same protocol, data and network, in percent:")
        echo("\n".join(lines) if form == "text" else table.render(form))
    if results.pictures:
        folder = evaluation.path and evaluation.path.with_suffix("")
        echo(f"\npictures of {count_of(len(results.pictures), 'image')}: {folder or 'not written'}")
    where = f"{evaluation.path}, " if evaluation.path else "not written (--out names a file or folder), "
    echo(f"\n{where}{duration(evaluation.seconds)}")


def _words(name: str, value: Any) -> list[str]:
    """Return an option as it is typed; nothing for those that do not belong to the protocol."""
    if name in ("out", "device", "workers"):
        return []
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    return [flag(name), ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]


def _show_baseline(reporter: Reporter, model: str, *arguments: str) -> None:
    """Print how to measure the untrained network of a run, without which a number says little."""
    from deepcluster.interop.loading import UNTRAINED

    if not model.startswith(UNTRAINED) and Path(model).is_dir():
        protocol, *rest = arguments
        command = shlex.join(["deepcluster", "evaluate", protocol, UNTRAINED + model, *rest, "--out", "baseline"])
        reporter.say(f"A number says little without the untrained network's: {command}")
