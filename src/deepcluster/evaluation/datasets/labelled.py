"""Images with classes: the training and the validation part of a data set, and features of those that can be read.

N images, C classes, S readable images, D features.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.sources.joined import ChosenImages
from deepcluster.data.sources.scan import SYSTEM_NAMES
from deepcluster.run.features import Pooled
from deepcluster.run.kept_features import kept_rows, readable
from deepcluster.run.model import Model

TRAIN = ("train", "training")
HELD_OUT = ("val", "validation", "valid", "test", "testing")
KAGGLE = ("CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # the folders of ImageNet's parts in Kaggle's archive
HOLDERS = (".tar", ".tar.gz", ".tgz", ".parquet", ".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Labelled:
    """Images that all have a class.

    Attributes:
        labels_N: index into `class_names`, int64; none is missing.
        notes: what a reader must know of the labels, such as images that a table beside the folder does not list.
    """

    source: ImageSource
    labels_N: Tensor
    class_names: list[str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainVal:
    """The training part and the held-out part, with the same classes."""

    train: Labelled
    val: Labelled

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the labels of both parts."""
        return [f"{name}: {note}" for name, part in (("train", self.train), ("val", self.val)) for note in part.notes]

    def describe(self) -> dict[str, object]:
        """Return counts, for the results."""
        images = {"train_images": len(self.train.source), "val_images": len(self.val.source)}
        return {**images, "classes": len(self.train.class_names)}


def open_train_val(data: Path) -> TrainVal:
    """Return the two parts of `data`: folders `train` and `val` (or `test`) of class folders, or shards or tables so named.

    Raises:
        InputError: the folder has another layout, images have no class, or the classes of the two differ.
    """
    parts = []
    data = _unwrapped(data)
    for names in (TRAIN, HELD_OUT):
        path = find_part(data, names)
        if path is None:
            lacks = f"{data} has no {names[0]} folder of class folders, and no {names[0]} shards or table"
            raise InputError(f"{lacks}: {contents_of(data)}")
        parts.append(open_labelled(path))
    train, val = parts
    classes, others = (list(map(_identity, part.class_names)) for part in parts)
    missing = sorted(set(classes) ^ set(others))
    if missing:
        where = "val" if missing[0] in classes else "train"
        raise InputError(
            f"{data}: the classes of train ({len(train.class_names)}) and val ({len(val.class_names)}) differ: "
            f"{some(missing, 5)}; {missing[0]} is not in {where}"
        )
    if len(train.class_names) < 2:
        raise InputError(f"{data}: all images are of one class, {train.class_names[0]}: there is nothing to tell apart")
    return TrainVal(train, val)


def _identity(class_name: str) -> str:
    """Return the number of WordNet that stands before a word, as where only one part lies beside a table of words."""
    return match[0] if (match := re.match(r"n\d{8}(?= )", class_name)) else class_name


def _unwrapped(data: Path) -> Path:
    """Return the folder with both parts, if it is the only one in `data` or Kaggle's of ImageNet; else `data`."""
    if has_train_val(data) or not data.is_dir():
        return data
    names = [path.name for path in data.iterdir() if path.is_dir() and not path.name.startswith(".")]
    folders = [data / name for name in names if name.lower() not in SYSTEM_NAMES]
    some = [*folders[: len(folders) == 1], *(data / inner for inner in KAGGLE)]
    return next(filter(has_train_val, some), data)


def has_train_val(data: Path) -> bool:
    """Return whether there are two parts in `data`, judging by their names."""
    return bool(find_part(data, TRAIN) and find_part(data, HELD_OUT))


def find_part(data: Path, names: tuple[str, ...]) -> Path | None:
    """Return what in `data` has one of `names`, or one of them as a word in its name, in small or capital letters.

    A folder of that name comes first, then the only folder with that word, then a table or shards with it.
    """
    if not data.is_dir():
        return None
    entries = sorted(path for path in data.iterdir() if not path.name.startswith("."))
    folders = {path: path.name.lower() for path in entries if path.is_dir()}
    files = {path: path.name.lower() for path in entries if path.name.lower().endswith(HOLDERS) and path.is_file()}
    for name in names:
        if exact := [path for path, lower in folders.items() if lower == name]:
            return exact[0]
    for name in names:
        some = [path for path, lower in folders.items() if name in re.split(r"[^a-z]+", lower)]
        found = some if len(some) == 1 else [path for path, lower in files.items() if name in re.split(r"[^a-z]+", lower)]
        if found:
            return found[0]
    return None


def open_labelled(path: Path) -> Labelled:
    """Return images that all have a class: class folders, a published layout, or shards or a table with labels.

    Where a table beside the folder has the labels, images that it does not list are left out.

    Raises:
        InputError: there are none, or some have no class.
    """
    source = open_source(path)
    notes = source.label_notes
    if source.labels_N is not None and source.is_selection:
        source = ChosenImages(source, np.flatnonzero(source.labels_N >= 0))
    if source.labels_N is None or (source.labels_N < 0).any():
        known = 0 if source.labels_N is None else int((source.labels_N >= 0).sum())
        why = f" ({source.why_no_labels})" if source.why_no_labels else ""
        beside = f", such as {path.name}.csv beside it" if path.is_dir() else ""
        raise InputError(
            f"{path}: {known:,} of {count_of(len(source), 'image')} have a class{why}; use a folder for each class, or a "
            f"table with the columns path,label{beside}"
        )
    return Labelled(source, torch.from_numpy(source.labels_N), source.class_names, notes)


@dataclass(frozen=True)
class ReadableRows:
    """Stages of the readable images, with their labels.

    Attributes:
        rows: (N, D) by stage, on the CPU, possibly in a file; NaN for unreadable images.
        readable_N: which images can be read.
        labels_S: of those; (S, C) where an image has several.
    """

    rows: dict[str, Tensor]
    readable_N: Tensor
    labels_S: Tensor

    def at(self, stage: str, device: torch.device) -> Tensor:
        """Return rows (S, D) of a stage, on a device."""
        rows_ND = self.rows[stage]
        return (rows_ND if bool(self.readable_N.all()) else rows_ND[self.readable_N]).to(device)

    @property
    def unreadable(self) -> dict[int, str]:
        """The indices of the unreadable images, without a reason."""
        return dict.fromkeys((~self.readable_N).nonzero()[:, 0].tolist(), "")


def readable_rows(
    model: Model, source: ImageSource, labels: Tensor, stages: Sequence[str], kind: str = "average"
) -> ReadableRows:
    """Return the stages pooled in one way (`Pooled.kind`), of all images in one pass, with their labels.

    Raises:
        InputError: no image can be read.
    """
    features = kept_rows(model, source, [Pooled(stage, kind) for stage in stages])
    rows = {one.stage: rows_ND for one, rows_ND in features.items()}
    readable_N = readable(rows[stages[0]])
    if not bool(readable_N.any()):
        raise InputError(f"none of the images can be read: {source.describe()}")
    return ReadableRows(rows, readable_N, labels[readable_N])


def contents_of(data: Path) -> str:
    """Return what is in a folder, in a few words for an error message."""
    if not data.is_dir():
        return "it is not a folder" if data.exists() else "it does not exist"
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in data.iterdir())
    return f"there are {some(names, 8)}" if names else "it is empty"


def some(names: Iterable[str], most: int = 3) -> str:
    """Return the first of the names, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def left_out(what: str, unreadable: Mapping[int, str], name: Callable[[int], str]) -> list[str]:
    """Return a note on images that can't be read: why (or nothing) by index; no note if there are none."""
    named = [f"{name(index)} ({why})" if why else name(index) for index, why in sorted(unreadable.items())]
    verb = "is" if len(named) == 1 else "are"
    return [f"{what}: {count_of(len(named), 'image')} can't be read and {verb} left out: {some(named, 5)}"] if named else []
