"""`train`, with the names and defaults of the command."""

import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from deepcluster.applied.opening import Data
from deepcluster.core.addresses import is_address
from deepcluster.core.files import user_path
from deepcluster.core.options import types_of
from deepcluster.core.progress import Reporter
from deepcluster.core.wording import in_python
from deepcluster.data.sources import ImageSource, name_of, open_source
from deepcluster.data.sources.given import given_data
from deepcluster.evaluation.knn import leave_one_out_accuracy
from deepcluster.evaluation.logistic import probe_accuracy
from deepcluster.run.config_files import with_config
from deepcluster.run.runs import Run
from deepcluster.run.settings import Settings
from deepcluster.training import launch
from deepcluster.training.loggers import Logger, check_loggers

F = TypeVar("F", bound=Callable[..., Any])


def _with_settings(function: F) -> F:
    """Give a function's `**options` the names, types and defaults of `Settings`, for `help` and editors."""
    own, types, kind = inspect.signature(function), types_of(Settings), inspect.Parameter.KEYWORD_ONLY
    named = [one for one in own.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(one.name, kind, default=one.default, annotation=types[one.name]) for one in fields(Settings)
    ]
    texts = []
    for one in fields(Settings):
        choices = f" ({', '.join(one.metadata['choices'])})" if one.metadata["choices"] else ""
        text = f"{one.name}: {in_python(one.metadata['help'])}{choices}"
        texts.append(textwrap.fill(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 12))
    described = "\n".join(["\n\n    Options:", *texts])
    function.__doc__ = (function.__doc__ or "").rstrip() + described + "\n"
    function.__signature__ = own.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function


@_with_settings
def train(
    data: Data,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    config: str | Path | None = None,
    dry_run: bool = False,
    loggers: Sequence[Logger] = (),
    reporter: Reporter | None = None,
    **options: Any,
) -> Run:
    """Learn features and clusters of the images of `data`, as `deepcluster train` does.

    Args:
        data: a folder, list, table or array file of images, or several of these in any collection (docs/data.md).
        out: the run folder; `runs/NAME-OF-DATA` by default.
        resume: continue the run in `out`, or begin it where there is none.
        overwrite: delete the run in `out` first.
        config: settings to start from: a run folder, its config.json, or a file .json or .toml; `options` win.
        dry_run: print the plan, and an estimate of what the run takes, and write nothing.
        loggers: objects that follow the run (`deepcluster.training.loggers.Logger`), besides those of `log_to`.
        reporter: prints lines and progress; to the standard output by default.
        options: the settings of `deepcluster.Settings`. The recipe chooses those left out, so the defaults shown may change.

    Returns:
        the run: a path, with `.metrics`, `.clusters`, `.settings`, `.model()` and `.report()`; a plain path
            after a dry run.

    Raises:
        InputError: data, settings or folder can't be used, or the package of a logger is missing; nothing was written.
        TrainingError: the loss is not finite, or the disk is full; the last good state is kept.
        Interrupted: Ctrl-C or SIGTERM; the state was saved.
    """
    options = with_config(config, options)
    named: dict[str, Any] = {name: value for name, value in options.items() if name in ("log_to", "tensorboard")}
    check_loggers(Settings.from_dict(named).loggers, loggers)
    data = given_data(data)  # Once: a generator gives its paths only once.
    run = launch.train(
        data,
        out=user_path(out) if out is not None else default_run(data),
        user_options=options,
        resume=resume,
        overwrite=overwrite,
        loggers=loggers,
        dry_run=dry_run,
        reporter=reporter or Reporter(),
        evaluate={"knn": _knn, "linear": partial(probe_accuracy, seed=0)},
    )
    return cast(Run, run) if dry_run else Run(run)


def _knn(features_ND: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Return the leave-one-out k-NN accuracy, with 20 neighbours where there are so many others."""
    return leave_one_out_accuracy(features_ND, labels_N, k=min(20, len(features_ND) - 1))


def default_run(data: Data) -> Path:
    """Return `runs/NAME-OF-DATA`: a link keeps its own name; `..`, `.` and `~` get that of the folder they stand for."""
    some = given_data(data)
    if isinstance(some, ImageSource):
        return Path("runs") / "images"
    if not some:
        open_source(some)  # It says what may be given.
    first = some[0] if isinstance(some, list) else some
    path, name = user_path(first), name_of(first)
    if not is_address(str(first)) and path.name not in ("", "..") and not str(first).rstrip("/").endswith("/."):
        name = path.stem if path.is_file() else path.name
    return Path("runs") / (re.sub(r"[/:]+", "-", name).strip("-") or "root")
