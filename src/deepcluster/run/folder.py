"""The run folder: settings, metrics, checkpoints, assignments. Files are complete at every moment."""

import csv
import io
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepcluster import __version__
from deepcluster.clustering.assignment import Assignment
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError, TrainingError
from deepcluster.core.files import load_tensors, save_tensors, takes_files, write_table, write_whole
from deepcluster.core.options import flag, types_of
from deepcluster.core.text import count_of
from deepcluster.run.settings import Settings

CHECKPOINT_FORMAT = "deepcluster-1"
# What a run writes. config.json is last, so that an interrupted deletion leaves a run that can be overwritten.
WRITTEN_FOLDERS = ("checkpoints", "assignments", "evaluation", "tensorboard", "wandb")
# The names under which services of `--log-to` know the run.
LOGGER_IDS = "loggers.json"
WRITTEN_FILES = (
    *("metrics.jsonl", "train.log", "unreadable.csv", "clusters.parquet", "comparison.csv", "comparison.json"),
    *("names.csv", "report.html", LOGGER_IDS, "config.json"),
)
# The file of the lock of a run that is being trained.
IN_USE = "in-use.json"


class RunFolder:
    """Names, writes and reads the files of one run.

    Args:
        path: the folder.
        ranks: the processes that write into it.
    """

    def __init__(self, path: Path, ranks: Ranks = ONE_PROCESS) -> None:
        self.path, self.ranks = path, ranks
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "train.log"
        self.unreadable = path / "unreadable.csv"
        self.checkpoints = path / "checkpoints"
        self.assignments = path / "assignments"
        self.clusters = path / "clusters.parquet"
        self.last = self.checkpoints / "last.pt"
        self._has_loaded = False  # A checkpoint of this object has been loaded again.

    def epoch_checkpoint(self, epoch: int) -> Path:
        """Return the checkpoint of the end of an epoch; 0: of the trunk before training, where it depends on the images."""
        return self.checkpoints / f"epoch-{epoch:04d}.pt"

    def assignment(self, epoch: int) -> Path:
        """Return the table of the clustering that an epoch trains on."""
        return self.assignments / f"epoch-{epoch:04d}.parquet"

    def cluster_tables(self) -> dict[int, Path]:
        """Return the tables of clusters by the epoch that trained on them, oldest first; the last may be of the end."""
        named = [(path.stem.partition("-")[2], path) for path in self.assignments.glob("epoch-*.parquet")]
        return dict(sorted((int(number), path) for number, path in named if number.isdecimal()))

    def newest_clusters(self) -> Path | None:
        """Return the table of the newest clusters; None if there is none."""
        if self.clusters.is_file():
            return self.clusters
        return next(reversed(self.cluster_tables().values()), None)

    def is_run(self) -> bool:
        """Return True if a run was begun here."""
        return self.config.is_file()

    def check_free(self, *, resume: bool | None, overwrite: bool) -> None:
        """Raise `InputError` unless a run may be begun, or resumed, here. Changes nothing.

        Args:
            resume: whether a run is to be resumed; None where the command can't.
            overwrite: whether a run is to be deleted.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; --out takes a folder")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir():
            raise InputError(f"{self.path} can't be made: {parent} is a file; choose another folder with --out")
        if not takes_files(parent):
            raise InputError(f"{parent} can't be written to; choose another folder with --out")
        if resume and overwrite:
            raise InputError("--resume continues a run and --overwrite deletes it: use one of them")
        if self.is_run() and not (resume or overwrite):
            ways = "--overwrite deletes it first" if resume is None else "--resume continues it, --overwrite starts again"
            raise InputError(f"{self.path} holds a run already: {ways}, --out names another")
        if resume and self.is_run() and self.clustered():
            start = f"use --init {self.path} and another --out" if self.clustered()["stage"] else "start one with --out"
            raise InputError(f"{self.path} was clustered, not trained: there is no training to resume; {start}")
        if resume and self.is_run() and not self.read_config()["data"].get("address", True):
            raise InputError(
                f"{self.path} is an imported model, without training to resume: use --init {self.path} and another --out"
            )
        if self.is_run() or not self.path.is_dir():
            return
        # A run that was killed before it wrote its config.json leaves no more than these.
        left = {path.name for path in (self.checkpoints, self.assignments) if path.is_dir() and not any(path.iterdir())}
        parts = [one.name for one in (self.checkpoints, self.assignments, self.metrics) if one.exists()]
        if self.last.is_file() or self.metrics.is_file():
            raise InputError(
                f"{self.path} holds a run ({', '.join(parts)}) whose config.json is gone: restore it, or choose another "
                "folder with --out"
            )
        strangers = sorted(
            entry.name for entry in self.path.iterdir() if entry.name not in {"config.json.part", IN_USE, *left}
        )
        if strangers:
            raise InputError(f"{self.path} holds other files ({', '.join(strangers[:3])}); choose another folder with --out")

    def create(self, *, overwrite: bool) -> None:
        """Make the folders. With `overwrite`, first delete what an earlier run wrote, and nothing else.

        The clusters of a finished run that is resumed are in `assignments`, too: clusters.parquet waits for the new end.
        """
        self.clusters.unlink(missing_ok=True)
        if overwrite and self.path.is_dir():
            for name in (*WRITTEN_FOLDERS, *WRITTEN_FILES):
                old = self.path / name
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.assignments):
            folder.mkdir(parents=True, exist_ok=True)

    def write_config(
        self,
        settings: Settings | Mapping[str, Any],
        changed_by_recipe: Mapping[str, Any],
        data: Mapping[str, Any],
        *,
        clustered: Mapping[str, Any] | None = None,
        weights: str = "",
    ) -> None:
        """Write config.json; when a run is resumed, the time of its start and the commands so far are kept.

        Args:
            settings: all settings, or those that apply.
            changed_by_recipe: values and reasons by option.
            data: the images.
            clustered: of a run that was clustered without training: its model, and how it was clustered.
            weights: the published weights that the run starts from, with their licence.
        """
        before = self.read_config() if self.is_run() else {}
        commands = [*before.get("earlier_commands", ()), *([before["command"]] if "command" in before else ())]
        content = {
            "settings": settings.as_dict() if isinstance(settings, Settings) else dict(settings),
            **({} if clustered is None else {"clustered": dict(clustered)}),
            "changed_by_recipe": dict(changed_by_recipe),
            "data": dict(data),
            **({"weights": weights} if weights else {}),
            "versions": versions(),
            "started": before.get("started") if before else datetime.now().isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "earlier_commands": commands,
            "process": f"process {os.getpid()} on {platform.node()}",
        }
        write_whole(self.config, json.dumps(content, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Return the content of config.json.

        Raises:
            InputError: there is none, or it is damaged.
        """
        try:
            content = json.loads(self.config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{self.path} is not a run folder: it has no config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as fault:
            raise InputError(f"{self.config} is damaged: {fault}") from None
        if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in ("settings", "data")):
            raise InputError(f"{self.config} is not a run's config.json: it has no settings, or no data")
        return content

    def clustered(self) -> dict[str, Any]:
        """Return what `deepcluster cluster` noted of the run: model, stage, options; empty if the run was trained.

        A run of a table of embeddings has the table as its model, and no stage.
        """
        facts = self.read_config().get("clustered")
        return facts if isinstance(facts, dict) else {}

    def is_of_table(self) -> bool:
        """Return whether this is a run that was made of a table of embeddings, and so has no network."""
        facts = self.clustered() if self.is_run() else {}
        return bool(facts) and not facts["stage"]

    def check_state(self) -> None:
        """Raise `InputError` if the run has no checkpoint, although it must have had one."""
        kept = sorted(self.checkpoints.glob("epoch-*.pt"))
        epochs = len(self.read_metrics()) or len(list(self.assignments.glob("*.parquet")))
        if not self.last.is_file() and (kept or epochs > 1):  # A kill may leave the results of one epoch without it.
            usable = f" ({kept[-1].name} can be used, but not resumed)" if kept else ""
            done = count_of(max(1, epochs), "epoch")
            raise InputError(
                f"{self.last} is gone, but results of {done} are there: restore it{usable}, start again with "
                "--overwrite, or choose another folder with --out"
            )

    def lost_results(self, epochs: int) -> list[str]:
        """Return in words which results of the first `epochs` epochs are gone; they are not made again."""
        known = {line["epoch"] for line in self.read_metrics()}
        found = {
            self.metrics.name: {epoch for epoch in range(1, epochs + 1) if epoch not in known},
            f"{self.assignments.name}/": {e for e in range(1, epochs + 1) if not self.assignment(e).is_file()},
        }
        return [f"{name} lacks {count_of(len(lost), 'finished epoch')}" for name, lost in found.items() if lost]

    def drop_metrics_from(self, epoch: int) -> None:
        """Remove the lines of `epoch` and later, which will be written again."""
        kept = [line for line in self.read_metrics() if line["epoch"] < epoch]
        write_whole(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add the line of an epoch."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, without damaged ones."""
        lines = []
        text = self.metrics.read_text(encoding="utf-8", errors="replace") if self.metrics.is_file() else ""
        for one in text.splitlines():
            with suppress(json.JSONDecodeError):
                line = json.loads(one)
                if isinstance(line, dict) and "epoch" in line:
                    lines.append(line)
        return lines

    def write_clusters(self, names: Sequence[str], assignment: Assignment) -> None:
        """Write clusters.parquet, the clusters of a finished run: `name, cluster, distance`."""
        save_assignment(self.clusters, names, assignment)

    def write_unreadable(self, reasons: Mapping[str, str]) -> None:
        """Write unreadable.csv, `name, reason`, if there are any."""
        if reasons:
            text = io.StringIO()
            for row in [("name", "reason"), *sorted(reasons.items())]:
                ends = "\r\n" if "\r" in "".join(row) else "\n"  # Python 3.11 quotes a carriage return only if lines end so.
                csv.writer(text, lineterminator=ends).writerow(row)
            write_whole(self.unreadable, text.getvalue())

    def read_unreadable(self) -> dict[str, str]:
        """Return why images could not be read, by name."""
        if not self.unreadable.is_file():
            return {}
        with self.unreadable.open(newline="", encoding="utf-8") as file:
            return {row["name"]: row["reason"] for row in csv.DictReader(file)}

    def save_checkpoint(self, state: Mapping[str, Any], *, keep_as_epoch: int | None = None) -> None:
        """Write checkpoints/last.pt beside, flush and rename it; also keep it as epoch-NNNN.pt on request.

        All ranks call this. If there are several, each writes its `rows` into a file of its own, before the first one writes
        last.pt, which names these files. `epoch-NNNN.pt` can be loaded for inference but not resumed: it omits those rows.

        Raises:
            TrainingError: it can't be written (a full disk); the checkpoint before stays.
        """
        state = {**state, "rows": self._write_rows(state)}
        if self.ranks.is_main:
            try:
                kept = self.epoch_checkpoint(keep_as_epoch) if keep_as_epoch is not None else None
                save_tensors(self.last, {"format": CHECKPOINT_FORMAT, **state}, copy=kept)
            except (OSError, RuntimeError) as fault:
                before = "; the one before it is whole: make room, then use --resume"
                before = before if self.last.is_file() else ", and there is none before it: make room, then start again"
                raise TrainingError(f"{self.last} could not be written ({fault}){before}") from None
            if not self._has_loaded:  # Better now than when the run has ended.
                self._check_loads()
            for path in self.checkpoints.glob("rows-*"):  # Earlier ones, and those of a killed process.
                if path.name not in state["rows"].get("files", ()):
                    path.unlink(missing_ok=True)
        self.ranks.barrier()

    def _check_loads(self) -> None:
        """Load last.pt as all commands do, without reading its tensors."""
        try:
            Settings.from_saved(load_tensors(self.last, mapped=True)["settings"])
        except (InputError, KeyError) as fault:
            raise TrainingError(
                f"{self.last} can't be loaded again ({fault}). This is a defect of deepcluster: please report it"
            ) from None
        self._has_loaded = True

    def _write_rows(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the rows as last.pt has them: themselves on one process, else the names of the files of all ranks."""
        rows: dict[str, Any] = state.get("rows", {})
        if self.ranks.size == 1 or not rows:
            return rows
        moment = f"{state['epoch']}-{state['batch']}-{int(state['labelled'])}"
        name = f"rows-{moment}-{self.ranks.rank}-of-{self.ranks.size}.pt"
        try:
            save_tensors(self.checkpoints / name, {"rows": rows})
        except (OSError, RuntimeError) as fault:
            raise TrainingError(
                f"{self.checkpoints / name} could not be written ({fault}); the state before it is whole"
            ) from None
        return {"files": self.ranks.gather_objects(name)}

    def read_rows(self, state: Mapping[str, Any], mine: slice) -> dict[str, dict[str, Tensor]]:
        """Return the rows of a checkpoint of this run for the images `mine`, whatever number of ranks saved it."""
        rows = state.get("rows", {})
        files = rows.get("files", ())
        # Only what is read of a mapped file comes into memory: all files together may be more than it holds.
        saved = [load_tensors(self.checkpoints / name, mapped=True)["rows"] for name in files] if files else [rows]
        found = {}
        for name in saved[0]:
            wanted = [(one[name]["indices"] >= mine.start) & (one[name]["indices"] < mine.stop) for one in saved]
            # A file without rows does not know how wide they are.
            filled = [number for number, wanted_N in enumerate(wanted) if wanted_N.any()] or [0]
            joined = {key: torch.cat([saved[n][name][key][wanted[n]] for n in filled]) for key in saved[0][name]}
            order_N = torch.argsort(joined["indices"], stable=True)
            found[name] = {key: rows[order_N] for key, rows in joined.items()}
        return found


def save_assignment(path: Path, names: Sequence[str], assignment: Assignment) -> None:
    """Write a table of `name, cluster, distance` as Parquet."""
    columns = {"name": names, "cluster": assignment.labels_N.numpy(), "distance": assignment.distances_N.float().numpy()}
    write_table(columns, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint: tensors and plain values. No code in it is ever run.

    Raises:
        InputError: it is missing, damaged, holds code, or is not a checkpoint of this program.
    """
    return checkpoint_of(load_tensors(path), path)


def is_checkpoint(state: Mapping[str, Any]) -> bool:
    """Return whether the content of a file is a checkpoint of this program."""
    return state.get("format") == CHECKPOINT_FORMAT


def checkpoint_of(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a checkpoint of the content of its file.

    Raises:
        InputError: it is not one of this program.
    """
    if not is_checkpoint(state):
        raise InputError(f"{path} is not a checkpoint of deepcluster")
    _join_parts(state, path.parent)
    return state


def _join_parts(state: dict[str, Any], folder: Path) -> None:
    """Join a hierarchical head with the layers that version 0.1.0 has saved apart, one file per rank or in `state`."""
    saved = [state.pop("parts", {})]
    for name in state.get("rows", {}).get("files", ()):
        with suppress(InputError):  # A run that is being trained may have replaced the file.
            saved.append(load_tensors(folder / name, mapped=True).get("parts", {}))
    layers = {name: value for parts in saved for name, value in parts.get("head", {}).items()}
    if layers:
        layers = {name: layers[name] for name in sorted(layers, key=lambda name: int(name.split(".")[1]))}
        names = [*state["head"], *layers]
        momenta = {name: one for parts in saved for name, one in parts.get("head_optimizer", {}).items()}
        state["head"] = {**state["head"], **layers}
        state["head_optimizer"]["state"].update({names.index(name): one for name, one in momenta.items()})


def differing_settings(values: Mapping[str, Any], saved: Settings) -> list[str]:
    """Return in words which values differ from those of a run and may not be changed by a resume."""
    now = saved.as_dict()
    resumable = {one.name for one in fields(Settings) if one.metadata["resumable"]}
    if saved.lr_schedule != "constant":
        resumable.discard("epochs")
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    differing = []
    for name, value in plain.items():
        if name in types_of(Settings) and value != now[name] and name not in resumable:
            why = f" (its --lr-schedule {saved.lr_schedule} ends there)" if name == "epochs" else ""
            differing.append(f"{flag(name)} is {now[name]} in this run{why}, not {value}")
    return differing


def versions() -> dict[str, str]:
    """Return the versions of what the results depend on."""
    from importlib.metadata import version

    packages = ("torch", "torchvision", "numpy", "pillow", "scikit-learn")
    own = {"python": sys.version.split()[0], "deepcluster": __version__}
    return {**own, **{name: version(name) for name in packages}}
