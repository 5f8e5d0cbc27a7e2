"""Loggers: `--log-to` names those below, `train(loggers=[...])` takes others. Only the first process logs.

To add one, write a class with the three functions of `Logger` and a constructor that takes a `Session`, and add one entry to
`LOGGERS` and to `LOGGER_NAMES` of run/settings.py.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from deepcluster.core.errors import DeepClusterError, InputError, Interrupted
from deepcluster.core.files import write_whole
from deepcluster.core.progress import Reporter
from deepcluster.run.folder import LOGGER_IDS
from deepcluster.run.metrics import scalars
from deepcluster.training.tensorboard import Session, TensorBoard

PROJECT = "deepcluster"
_EXIT_CODES = {"finished": 0, "interrupted": 130, "failed": 1}
_MLFLOW_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class Logger(Protocol):
    """What follows a run. An error in it is reported once; the run continues without it."""

    def begin(self, run: Path, settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """A run begins or is resumed.

        Args:
            run: the run folder.
            settings: the settings of the run by name, as plain values.
            history: the lines of metrics.jsonl of the epochs that are done.
        """

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """An epoch is done; `metrics` is its line of metrics.jsonl."""

    def end(self, status: str) -> None:
        """The run ends here: finished, interrupted, or failed."""


class WandB:
    """`--log-to wandb`: Weights & Biases, as its own variables say (WANDB_MODE=offline needs no network)."""

    def __init__(self, session: Session) -> None:
        self.quiet = session.reporter.quiet

    def begin(self, run: Path, settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Continue the run of W&B that this run folder has, or begin one with the epochs so far."""
        wandb: Any = import_module("wandb")

        known = _ids(run).get("wandb")
        self.is_own = wandb.run is None
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.absolute().name),
            dir=os.environ.get("WANDB_DIR", str(run)),
            config=dict(settings),
            id=known,
            resume="allow" if known else None,
            settings=wandb.Settings(silent=self.quiet),
        )
        for metrics in () if known else history:
            self.epoch(metrics)
        _remember(run, "wandb", self.run.id)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of an epoch."""
        self.run.log(dict(scalars(metrics)), step=metrics["epoch"])

    def end(self, status: str) -> None:
        """End the run, unless the user's program began it."""
        if self.is_own:
            self.run.finish(exit_code=_EXIT_CODES[status])


class MLflow:
    """`--log-to mlflow`: MLflow, with the store that its own variables name (MLFLOW_TRACKING_URI), else a local one."""

    def __init__(self, session: Session) -> None:
        del session

    def begin(self, run: Path, settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Continue the run of MLflow that this run folder has, or begin one with the epochs so far."""
        mlflow: Any = import_module("mlflow")

        known = _ids(run).get("mlflow")
        self.is_own = mlflow.active_run() is None
        if self.is_own and known is None and "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(PROJECT)
        active = mlflow.active_run() or mlflow.start_run(run_id=known, run_name=None if known else run.absolute().name)
        self.id = active.info.run_id
        if known is None:  # MLflow refuses to change what was logged once.
            mlflow.log_params({name: value for name, value in settings.items() if value is not None})
            for metrics in history:
                self.epoch(metrics)
        _remember(run, "mlflow", self.id)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Log the numbers of an epoch."""
        mlflow: Any = import_module("mlflow")

        mlflow.log_metrics(dict(scalars(metrics)), step=metrics["epoch"], run_id=self.id)

    def end(self, status: str) -> None:
        """End the run, unless the user's program began it."""
        mlflow: Any = import_module("mlflow")

        if self.is_own:
            mlflow.end_run(_MLFLOW_STATUS[status])


# By name: the module that it needs, what installs it, and what makes it.
LOGGERS: Mapping[str, tuple[str, str, Callable[[Session], Logger]]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", TensorBoard),
    "wandb": ("wandb", "wandb", WandB),
    "mlflow": ("mlflow", "mlflow", MLflow),
}


def check_loggers(names: Sequence[str], own: Sequence[Any] = ()) -> None:
    """Raise `InputError` unless the packages of named loggers are installed, and the user's own are loggers."""
    for name in names:
        module, package, _ = LOGGERS[name]
        try:
            import_module(module)
        except ImportError as fault:
            raise InputError(
                f"--log-to {name} needs the package {package} ({fault}); install it with: pip install {package}"
            ) from None
    for one in own:
        missing = [name for name in ("begin", "epoch", "end") if not callable(getattr(one, name, None))]
        if missing:
            raise InputError(f"loggers: {type(one).__name__} is no logger: it has no function {', '.join(missing)}")


class LoggerGroup:
    """The loggers of a run. One that fails is reported and dropped."""

    def __init__(self, loggers: Sequence[Logger], reporter: Reporter) -> None:
        self._waiting, self._reporter = loggers, reporter
        self._loggers: list[Logger] = []  # Those that have begun.

    def begin(self, run: Path, settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Tell all loggers that the run begins or is resumed."""
        self._loggers = [*self._waiting]
        self._each(lambda one: one.begin(run, settings, history))

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Give all loggers the metrics of an epoch."""
        self._each(lambda one: one.epoch(metrics))

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Tell all loggers how the run ended."""
        try:
            yield
        except BaseException as fault:
            stopped = isinstance(fault, Interrupted | KeyboardInterrupt)
            self._each(lambda one: one.end("interrupted" if stopped else "failed"))
            raise
        self._each(lambda one: one.end("finished"))

    def _each(self, call: Callable[[Logger], None]) -> None:
        for one in [*self._loggers]:
            try:
                call(one)
            except DeepClusterError:  # A stop
                raise
            except Exception as fault:  # Whatever a service or a disk refuses must not end hours of training.
                self._loggers.remove(one)
                self._reporter.warn(
                    f"{type(one).__name__} could not log ({type(fault).__name__}: {fault}): training continues without it"
                )


def _ids(run: Path) -> dict[str, Any]:
    """Return the names under which services know this run."""
    with suppress(OSError, ValueError):
        content = json.loads((run / LOGGER_IDS).read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _remember(run: Path, service: str, name: str) -> None:
    write_whole(run / LOGGER_IDS, json.dumps({**_ids(run), service: name}, indent=2) + "\n")
