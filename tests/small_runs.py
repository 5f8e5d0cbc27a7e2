"""Whole runs that take a second or two, and what two equal runs have in common."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

import deepcluster
from deepcluster.core.progress import Reporter

SMALL: dict[str, Any] = {
    "recipe": "paper-alexnet",
    "arch": "alexnet-small",
    "image_size": 16,
    "clusters": 5,
    "pca": 16,
    "cluster_stage": "conv5",
    "epochs": 2,
    "batch_size": 16,
    "lr": 0.01,
    "device": "cpu",
    "precision": "fp32",
    "workers": 2,
}
# What depends on the clock and the machine.
MEASURED = {"seconds", "images_per_second", "data_wait_share", "peak_memory_bytes"}


def train_small(
    data: Any, out: Path, *, resume: bool = False, overwrite: bool = False, reporter: Reporter | None = None, **options: Any
) -> Path:
    """`deepcluster.train` with the settings of `SMALL` and those given."""
    reporter = reporter or Reporter(quiet=True)
    return deepcluster.train(data, out=out, resume=resume, overwrite=overwrite, reporter=reporter, **{**SMALL, **options})


def flags(**options: Any) -> list[str]:
    """`SMALL` with the options given, as the command line takes them."""
    words = []
    for name, value in {**SMALL, **options}.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def checkpoint(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    return state


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tables(run: Path) -> dict[str, dict[str, list[Any]]]:
    """Columns of every table of assignments, by file name; None for a distance that is not a number."""
    columns = {path.name: pq.read_table(path).to_pydict() for path in sorted((run / "assignments").iterdir())}
    for table in columns.values():
        table["distance"] = [None if distance != distance else distance for distance in table["distance"]]
    return columns


def assert_equal(one: Any, other: Any, where: str = "state") -> None:
    """Nested values and tensors are the same, bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), where
    else:
        assert one == other or one != one, where


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizers, clusters, tables and metrics of two runs are equal, but for what the clock measured."""
    assert tables(one) == tables(other)
    for line, twin in zip(metrics(one), metrics(other), strict=True):
        assert {k: v for k, v in line.items() if k not in MEASURED} == {k: v for k, v in twin.items() if k not in MEASURED}
    states = [checkpoint(run) for run in (one, other)]
    for state in states:
        for name in ("seconds", "wait_seconds", "settings"):
            state.pop(name)
    assert_equal(*states)
