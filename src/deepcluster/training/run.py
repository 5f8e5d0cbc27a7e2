"""The run folder: settings, metrics, checkpoints, assignments; written whole or not at all, and taken up again."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepcluster.config import Settings
from deepcluster.distributed import barrier, gather_objects, on_main, rank, world_size
from deepcluster.errors import InputError, TrainingError
from deepcluster.options import flag, types_of
from deepcluster.saving import load_tensors, save_tensors, write_whole
from deepcluster.training.lock import LOCK_NAME, RunLock

CHECKPOINT_FORMAT = "deepcluster-1"
# What a run writes; config.json last, so that a deletion that is cut off leaves a run that can be overwritten.
WRITTEN = (
    "checkpoints",
    "assignments",
    "metrics.jsonl",
    "train.log",
    "unreadable.csv",
    "evaluation",
    "tensorboard",
    "report.html",
    "config.json",
)


class RunFolder:
    """Names and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "train.log"
        self.unreadable = path / "unreadable.csv"
        self.checkpoints = path / "checkpoints"
        self.assignments = path / "assignments"
        self.last = self.checkpoints / "last.pt"
        self.lock = RunLock(path)

    def assignment(self, epoch: int) -> Path:
        """Table of the clustering that epoch `epoch` learns."""
        return self.assignments / f"epoch-{epoch:04d}.parquet"

    def is_run(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file()

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """Raise `InputError` unless a run may be begun, or taken up, here. Changes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; --out takes a folder")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir():
            raise InputError(f"{self.path} can't be made: {parent} is a file; choose another folder with --out")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError(f"{parent} can't be written to; choose another folder with --out")
        if resume and overwrite:
            raise InputError("--resume goes on with a run and --overwrite deletes it: use one of them")
        if self.is_run() and not (resume or overwrite):
            raise InputError(
                f"{self.path} holds a run already: --resume goes on with it, --overwrite starts anew, --out names another"
            )
        strangers = self._strangers()
        if strangers and not self.is_run():
            raise InputError(f"{self.path} holds other files ({', '.join(strangers[:3])}); choose another folder with --out")

    def _strangers(self) -> list[str]:
        """What is in the folder, but for what a run leaves that was killed before it could write its config.json."""
        if not self.path.is_dir():
            return []
        empty = {
            folder.name for folder in (self.checkpoints, self.assignments) if folder.is_dir() and not any(folder.iterdir())
        }
        left = {"config.json.part", LOCK_NAME, *empty}
        return sorted(entry.name for entry in self.path.iterdir() if entry.name not in left)

    def create(self, *, overwrite: bool) -> None:
        """Make the folders; with `overwrite` delete what an earlier run wrote, and nothing else."""
        if overwrite and self.path.is_dir():
            for name in WRITTEN:
                old = self.path / name
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.assignments):
            folder.mkdir(parents=True, exist_ok=True)

    def write_config(self, settings: Settings, changed_by_recipe: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Write config.json."""
        content = {
            "settings": settings.as_dict(),
            "changed_by_recipe": dict(changed_by_recipe),
            "data": dict(data),
            "versions": versions(),
            "command": " ".join(sys.argv),
        }
        write_whole(self.config, json.dumps(content, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """The content of config.json.

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

    def drop_metrics_from(self, epoch: int) -> None:
        """Forget the lines of `epoch` and later: they will be written again."""
        kept = [line for line in self.read_metrics() if line["epoch"] < epoch]
        write_whole(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add an epoch's line."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that was cut off is left out."""
        lines = []
        for text in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def write_unreadable(self, reasons: Mapping[str, str]) -> None:
        """Write unreadable.csv, `name, reason`, where there are any."""
        import csv
        import io

        if not reasons:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("name", "reason"))
        writer.writerows(sorted(reasons.items()))
        write_whole(self.unreadable, text.getvalue())

    def save_checkpoint(self, state: Mapping[str, Any], *, keep_as_epoch: int | None = None) -> None:
        """Write checkpoints/last.pt: beside, flushed, renamed; and keep a copy as epoch-NNNN.pt where asked.

        All ranks call it. What each has for itself, `rows` of images and `parts` of networks, stays apart: each writes its
        own into a file, before the first one writes last.pt, which names them. A copy is for use, not for going on: of
        several processes it has neither.

        Raises:
            TrainingError: it can't be written (a full disk); the one before stays.
        """
        state = {**state, **self._write_own(state)}
        if on_main():
            self._write_last(state, keep_as_epoch)
            self._forget_rows(state["rows"])
        barrier()

    def _write_own(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Rows and parts as last.pt has them: themselves on one process, else the names of the files of all ranks."""
        own = {name: state.get(name, {}) for name in ("rows", "parts")}
        if world_size() == 1 or not (own["rows"] or "parts" in state):
            return own
        name = f"rows-{state['epoch']}-{state['batch']}-{int(state['labelled'])}-{rank()}-of-{world_size()}.pt"
        try:
            save_tensors(self.checkpoints / name, own)
        except (OSError, RuntimeError) as fault:
            raise TrainingError(
                f"{self.checkpoints / name} could not be written ({fault}); the state before it is whole"
            ) from None
        return {"rows": {"files": gather_objects(name)}, "parts": {}}

    def _forget_rows(self, rows: Mapping[str, Any]) -> None:
        kept = set(rows.get("files", ()))
        for path in self.checkpoints.glob("rows-*"):  # a kill leaves halves, too
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def read_rows(self, state: Mapping[str, Any], mine: slice) -> dict[str, dict[str, Tensor]]:
        """Rows of a checkpoint of this run that this rank is to have: those of the images `mine`.

        They may have been saved by another number of processes.
        """
        kept = [{name: _of_images(rows, mine) for name, rows in own["rows"].items()} for own in self._read_own(state)]
        return {name: _together([part[name] for part in kept]) for name in kept[0]}

    def read_parts(self, state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Parts of networks that were on one rank each, of all ranks, by kind and name; they stay in their files."""
        parts: dict[str, dict[str, Any]] = {}
        for own in self._read_own(state):
            for kind, named in own["parts"].items():
                parts.setdefault(kind, {}).update(named)
        return parts

    def _read_own(self, state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Rows and parts of a checkpoint of each rank that saved it; more together than the memory of one may hold."""
        rows = state.get("rows", {})
        if "files" not in rows:
            yield {"rows": rows, "parts": state.get("parts", {})}
        for name in rows.get("files", ()):
            yield load_tensors(self.checkpoints / name, mapped=True)

    def _write_last(self, state: Mapping[str, Any], keep_as_epoch: int | None) -> None:
        try:
            kept = self.checkpoints / f"epoch-{keep_as_epoch:04d}.pt" if keep_as_epoch is not None else None
            save_tensors(self.last, {"format": CHECKPOINT_FORMAT, **state}, copy=kept)
        except (OSError, RuntimeError) as fault:
            raise TrainingError(
                f"{self.last} could not be written ({fault}); the one before it is whole: make room, then use --resume"
            ) from None


def _of_images(rows: Mapping[str, Tensor], mine: slice) -> dict[str, Tensor]:
    """Of rows of a checkpoint those of the images `mine`."""
    wanted_N = (rows["indices"] >= mine.start) & (rows["indices"] < mine.stop)
    return {key: values[wanted_N] for key, values in rows.items()}


def _together(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of several files, by image; a file without rows does not know how wide they are."""
    filled = [part for part in parts if len(part["indices"])] or parts[:1]
    order_N = torch.argsort(torch.cat([part["indices"] for part in filled]), stable=True)
    return {key: torch.cat([part[key] for part in filled])[order_N] for key in filled[0]}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain values; no code in it is ever run.

    Raises:
        InputError: it is missing, damaged, holds code, or is not a checkpoint of this program.
    """
    state = load_tensors(path)
    if state.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{path} is not a checkpoint of deepcluster")
    return state


def check_same_settings(explicit: Mapping[str, Any], saved: Settings) -> None:
    """Raise `InputError` where the person asks a resumed run for other settings than it has, naming each."""
    changed = differing_settings(explicit, saved)
    if changed:
        raise InputError(
            f"a resumed run keeps its settings: {'; '.join(changed)}. Leave them out, or start another run with --out"
        )


def differing_settings(values: Mapping[str, Any], saved: Settings) -> list[str]:
    """In words, which of the values are not those of a run and may not be changed by a resume."""
    now = saved.as_dict()
    resumable = {name for name, option in Settings.__dataclass_fields__.items() if option.metadata["resumable"]}
    if saved.lr_schedule != "constant":
        resumable.discard("epochs")
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return [
        f"{flag(name)} is {now[name]} in this run, not {value}"
        for name, value in plain.items()
        if name in types_of(Settings) and value != now[name] and name not in resumable
    ]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import version

    packages = ("deepcluster", "torch", "torchvision", "numpy", "pillow", "scikit-learn")
    return {"python": sys.version.split()[0], **{name: version(name) for name in packages}}
