"""`train --log-to wandb,mlflow` where they are not installed: modules with their documented functions stand in for them.

Each stand-in has the signatures of the package's reference and its rules, and writes down every call. Where the package is
installed, test_train_options.py runs the real one.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, assert_same_run, metrics, train_small

import deepcluster
from deepcluster.cli import main
from deepcluster.core.errors import Interrupted
from deepcluster.core.progress import Reporter
from deepcluster.run.metrics import scalars

QUIET = Reporter(quiet=True)

NOTES = """
import json, pathlib
BOOK = pathlib.Path(__file__).with_suffix(".jsonl")
def note(call, **values):
    with BOOK.open("a") as file:
        file.write(json.dumps({"call": call, **values}) + "\\n")
"""

WANDB = (
    NOTES
    + """
run = None
class Settings:
    def __init__(self, *, silent=False, mode="online"):
        self.silent = silent
class Run:
    def __init__(self, id):
        self.id, self.step = id, 0
    def log(self, data, step=None, commit=None):
        if step < self.step:
            raise ValueError("Steps must be monotonically increasing")
        self.step = step
        note("log", id=self.id, step=step, data=data)
    def finish(self, exit_code=None):
        global run
        run = None
        note("finish", id=self.id, exit_code=exit_code)
def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None, group=None,
         job_type=None, mode=None, resume=None, settings=None):
    global run
    if resume not in (None, True, "allow", "must", "never", "auto"):
        raise ValueError(resume)
    run = Run(id or "w1")
    note("init", project=project, dir=dir, id=id, name=name, config=config, resume=resume, silent=settings.silent)
    return run
"""
)

MLFLOW = (
    NOTES
    + """
class Info:
    run_id = "m1"
class ActiveRun:
    info = Info()
_active, _params = None, {}
def active_run():
    return _active
def set_experiment(experiment_name=None, experiment_id=None):
    note("set_experiment", name=experiment_name)
def start_run(run_id=None, experiment_id=None, run_name=None, nested=False, parent_run_id=None, tags=None, description=None):
    global _active
    if _active is not None:
        raise Exception("Run is already active")
    _active = ActiveRun()
    note("start_run", run_id=run_id, name=run_name)
    return _active
def log_params(params, synchronous=None, run_id=None):
    for name, value in params.items():
        if _params.setdefault(name, value) != value:
            raise Exception("Changing param values is not allowed")
    note("log_params", params=params)
def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None):
    if not all(isinstance(value, float) for value in metrics.values()):
        raise TypeError(metrics)
    note("log_metrics", run_id=run_id, step=step, metrics=metrics)
def end_run(status="FINISHED"):
    global _active
    if status not in ("RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"):
        raise ValueError(status)
    _active = None
    note("end_run", status=status)
"""
)


class Services:
    """The stand-ins and what they were told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def calls(self, service: str) -> list[dict[str, Any]]:
        """Return the calls since the last time."""
        book = self.folder / f"{service}.jsonl"
        found = [json.loads(line) for line in book.read_text().splitlines()]
        book.unlink()
        return found


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Services:
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, text in (("wandb", WANDB), ("mlflow", MLFLOW)):
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(folder)
    return Services(folder)


def numbers(run: Path, first: int = 1) -> list[tuple[int, dict[str, float]]]:
    """Step and numbers of every epoch from `first` on, as metrics.jsonl has them."""
    return [(line["epoch"], dict(scalars(line))) for line in metrics(run) if line["epoch"] >= first]


class StopAfter(Reporter):
    """Stops the run, as Ctrl-C does, when an epoch is recorded."""

    def row(self, cells: Any) -> None:
        raise Interrupted("stopped")


def test_both_services_get_the_settings_every_number_and_the_end(
    services: Services, images: Path, trained: Path, tmp_path: Path
) -> None:
    run = train_small(images, tmp_path / "run", log_to="wandb,mlflow")
    assert_same_run(run, trained)
    settings = json.loads((run / "config.json").read_text())["settings"]

    begun, *logged, ended = services.calls("wandb")
    assert {name: begun[name] for name in ("call", "project", "name", "id", "resume")} == {
        "call": "init",
        "project": "deepcluster",
        "name": "run",
        "id": None,
        "resume": None,
    }
    assert begun["config"] == settings and begun["dir"] == str(run)
    assert [(one["step"], one["data"]) for one in logged] == numbers(run)
    assert (ended["call"], ended["exit_code"]) == ("finish", 0)

    experiment, begun, params, *logged, ended = services.calls("mlflow")
    assert (experiment["name"], begun["run_id"], begun["name"]) == ("deepcluster", None, "run")
    assert params["params"] == {name: value for name, value in settings.items() if value is not None}
    assert [(one["step"], one["metrics"]) for one in logged] == numbers(run)
    assert ended == {"call": "end_run", "status": "FINISHED"}
    assert json.loads((run / "loggers.json").read_text()) == {"wandb": "w1", "mlflow": "m1"}


def test_a_run_that_is_stopped_and_resumed_is_one_run_of_each_service(
    services: Services, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        deepcluster.train(images, out=tmp_path / "run", log_to="wandb,mlflow", reporter=StopAfter(quiet=True), **SMALL)
    assert services.calls("wandb")[-1]["exit_code"] == 130
    assert services.calls("mlflow")[-1]["status"] == "KILLED"
    run = train_small(images, tmp_path / "run", resume=True, epochs=3)
    begun, *logged, ended = services.calls("wandb")
    assert (begun["id"], begun["resume"], ended["exit_code"]) == ("w1", "allow", 0)
    assert [(one["step"], one["data"]) for one in logged] == numbers(run)
    begun, *logged, ended = services.calls("mlflow")  # No parameters: what was logged once can't be changed.
    assert (begun["call"], begun["run_id"]) == ("start_run", "m1")
    assert [(one["step"], one["metrics"]) for one in logged] == numbers(run)


def test_a_logger_that_comes_later_gets_the_epochs_before(services: Services, images: Path, tmp_path: Path) -> None:
    train_small(images, tmp_path / "run", epochs=1)
    run = train_small(images, tmp_path / "run", resume=True, epochs=2, log_to="wandb,mlflow")
    assert [(one["step"], one["data"]) for one in services.calls("wandb")[1:-1]] == numbers(run)
    assert [(one["step"], one["metrics"]) for one in services.calls("mlflow")[3:-1]] == numbers(run)


def test_runs_that_the_users_program_began_are_used_and_not_ended(
    services: Services, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("WANDB_PROJECT", "photos")
    monkeypatch.setenv("WANDB_NAME", "second try")
    mlflow.start_run()
    train_small(images, tmp_path / "run", epochs=1, log_to="wandb,mlflow")
    assert [one["call"] for one in services.calls("mlflow")] == ["start_run", "log_params", "log_metrics"]
    begun = services.calls("wandb")[0]
    assert (begun["project"], begun["name"]) == ("photos", "second try")


def test_a_service_that_refuses_is_reported_once_and_the_run_is_the_same(
    services: Services, images: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (services.folder / "wandb.py").open("a") as file:
        file.write("def init(**_): raise ConnectionError('no network')\n")
    assert_same_run(train_small(images, tmp_path / "run", log_to="wandb,mlflow"), trained)
    said = capsys.readouterr().err
    assert said.count("WandB could not log (ConnectionError: no network): training continues without it") == 1
    assert services.calls("mlflow")[-1]["status"] == "FINISHED"


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("tensorboard", "tensorboard")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name: str,
    package: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    for more in ([], ["--dry-run"]):
        assert main(["train", str(images), "--out", str(tmp_path / "run"), "--log-to", name, *more]) == 2
        said = capsys.readouterr().err
        assert f"--log-to {name} needs the package {package}" in said and f"pip install {package}" in said
        assert said.count("\n") == 1 and not (tmp_path / "run").exists()
