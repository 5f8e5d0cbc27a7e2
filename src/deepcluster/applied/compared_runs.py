"""What is read of a run to compare it with others: settings, metrics, evaluations, and the clusters of its images."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.files import read_table
from deepcluster.core.options import flag
from deepcluster.data.survey import even_sample
from deepcluster.run.folder import RunFolder
from deepcluster.run.table_writers import ENDINGS

# What changes over the epochs, by its name in metrics.jsonl.
CURVES = {
    "loss": "loss",
    "nmi_previous": "nmi(prev)",
    "nmi_labels": "nmi(labels)",
    "knn": "k-NN",
    "linear": "linear",
    "largest_cluster_share": "largest",
}
# Of these only epochs that clustered count; others repeat the value before (--reassign-every).
OF_CLUSTERS = ("nmi_previous", "nmi_labels", "largest_cluster_share")
# Epochs that are printed; the page shows all.
MOST_EPOCHS = 12
Tables = dict[str, tuple[list[str], list[list[str]]]]


@dataclass(frozen=True)
class ComparedRun:
    """A run, or a table of clusters, which has no more than these.

    Attributes:
        name: as the user gave it.
        names, cluster_N: images and their clusters, int64, -1 = unassigned; empty before the first epoch.
        config: config.json.
        metrics: lines of metrics.jsonl.
        evaluations: contents of evaluation/*.json, by the name of the file.
    """

    name: str
    names: Sequence[str] = ()
    cluster_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def values(self, metric: str) -> tuple[list[int], list[float]]:
        """Return the epochs that have a metric, and its values."""
        known = [line for line in self.metrics if line.get(metric) is not None]
        if metric in OF_CLUSTERS:
            known = [line for line in known if (line.get("seconds") or {}).get("clustering", 1) > 0]
        return [line["epoch"] for line in known], [line[metric] for line in known]


def read_run(path: Path, name: str) -> ComparedRun:
    """Return a run, or a table of clusters.

    Raises:
        InputError: it is neither, or damaged.
    """
    if not path.is_dir():
        if path.suffix not in ENDINGS or not path.is_file():
            raise InputError(f"{path} is no run folder, and no table of clusters ({', '.join(ENDINGS)}) as assign writes it")
        return ComparedRun(name, *_clusters(path))
    folder = RunFolder(path)
    config = folder.read_config()
    newest = folder.newest_clusters()
    names, cluster_N = _clusters(newest) if newest else ([], np.zeros(0, np.int64))
    evaluations = {}
    for file in sorted(path.glob("evaluation/*.json")):
        with suppress(OSError, ValueError):
            content = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(content, dict) and {"results", "headline"} <= content.keys():
                evaluations[file.stem] = content
    return ComparedRun(name, names, cluster_N, config, folder.read_metrics(), evaluations)


def _clusters(table: Path) -> tuple[list[str], NDArray[np.int64]]:
    try:
        columns = _read(table)
        cluster_N: NDArray[np.int64] = columns["cluster"].to_numpy().astype(np.int64)
        return list(map(str, columns["name"].to_pylist())), cluster_N
    except Exception as fault:  # Arrow raises several types for damaged files and missing columns.
        raise InputError(f"{table} can't be read as a table of clusters: {str(fault).splitlines()[0]}") from None


def _read(table: Path) -> Any:
    """Return the columns `name` and `cluster` of a table of any of the kinds that `assign` writes."""
    if table.suffix == ".csv":
        from pyarrow import csv

        with table.open("rb") as file:
            types = {"name": "string", "cluster": "int64"}
            return csv.read_csv(file, convert_options=csv.ConvertOptions(column_types=types, include_columns=list(types)))
    if table.suffix == ".jsonl":
        from pyarrow import json as lines

        with table.open("rb") as file:
            return lines.read_json(file).select(["name", "cluster"])
    return read_table(table, ["name", "cluster"])


def run_tables(runs: Sequence[ComparedRun]) -> Tables:
    """Return what is printed of the runs themselves, by title: settings that differ, epochs, evaluations."""
    with_config = [run for run in runs if run.config]
    header = ["", *(run.name for run in with_config)]
    tables: Tables = {
        "Runs": (["", "epochs", "images", "clusters"], [_row(number, run) for number, run in enumerate(runs, 1)])
    }
    if rows := differing([_facts(run) for run in with_config]):
        tables["Settings that differ"] = header, rows
    if len((epochs := _epochs(runs))[1]):
        tables["Epochs"] = epochs
    if rows := _evaluations(with_config):
        tables["Evaluations"] = header, rows
    return tables


def _row(number: int, run: ComparedRun) -> list[str]:
    n_clusters = len(np.unique(run.cluster_N[run.cluster_N >= 0]))
    return [
        f"{number}  {run.name}",
        f"{len(run.metrics):,}" if run.config else "–",
        f"{len(run.names):,}",
        f"{n_clusters:,}",
    ]


def _facts(run: ComparedRun) -> dict[str, Any]:
    """Return the settings of a run as they are typed, and its data."""
    settings = run.config.get("settings") or {}
    address = run.config.get("data", {}).get("address")
    data = ", ".join(map(str, address)) if isinstance(address, list) else address
    return {
        "DATA": data,
        "images": run.config.get("data", {}).get("images"),
        **{flag(key): settings[key] for key in settings},
    }


def differing(facts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row for each fact that is not the same in all: its name, and its values."""
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = [[name, *(_text(one.get(name)) for one in facts)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _text(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _epochs(runs: Sequence[ComparedRun]) -> tuple[list[str], list[list[str]]]:
    """Return a row for some epochs, evenly spread, the last one among them; the metrics of the runs stand side by side."""
    header, columns = ["epoch"], list[dict[int, float]]()
    for metric, title in CURVES.items():
        for number, run in enumerate(runs, start=1):
            if run.config and any(one.values(metric)[0] for one in runs):
                header.append(f"{title} {number}")
                columns.append(dict(zip(*run.values(metric), strict=True)))
    epochs = sorted({epoch for column in columns for epoch in column})
    if len(epochs) > MOST_EPOCHS:
        epochs = sorted({*(epochs[place] for place in even_sample(range(len(epochs)), MOST_EPOCHS - 1)), epochs[-1]})
    rows = [[str(epoch), *(f"{one[epoch]:.3f}" if epoch in one else "–" for one in columns)] for epoch in epochs]
    return header, rows


def _evaluations(runs: Sequence[ComparedRun]) -> list[list[str]]:
    """Return a row for each evaluation: its headline, and its value in each run."""
    rows = []
    for name in sorted({name for run in runs for name in run.evaluations}):
        headline = next(tuple(run.evaluations[name]["headline"]) for run in runs if name in run.evaluations)
        values = [_value(run.evaluations.get(name), headline) for run in runs]
        rows.append([" ".join((name, *headline)), *("–" if value is None else f"{value:.4f}" for value in values)])
    return rows


def _value(evaluation: Mapping[str, Any] | None, headline: Sequence[str]) -> float | None:
    value: Any = None if evaluation is None else evaluation["results"]
    for part in headline:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) else None
