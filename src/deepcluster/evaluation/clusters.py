"""k-means on frozen features against the classes; for a run, its own clusters too, epoch by epoch.

N images, D features, P components after whitening, K clusters.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.evaluation.datasets.labelled import (
    HELD_OUT,
    TRAIN,
    Labelled,
    find_part,
    has_train_val,
    open_labelled,
    open_train_val,
)
from deepcluster.evaluation.features.readable import ReadableRows, readable_rows
from deepcluster.evaluation.measures.agreement import MEASURES, agreement
from deepcluster.evaluation.options import ClustersOptions
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model

# A run's images are these where so many of their names are known.
KNOWN_SHARE = 0.9
OF_THE_RUN = "of the run"


@dataclass(frozen=True)
class _Data:
    """Images with classes: two parts, of which the first is clustered, or one.

    Attributes:
        names: classes by the names that a run may have the images under: from the part's folder, or from the one above.
    """

    parts: dict[str, Labelled]
    names: list[dict[str, int]]


def evaluate(model: Model, data: Path, options: ClustersOptions) -> Results:
    """Cluster the training images (or all, where there is one part), give the held-out ones their nearest centroid, compare.

    Raises:
        InputError: images have no class, or there are fewer of them than clusters.
    """
    found = _open(data)
    (first, images), n_classes = next(iter(found.parts.items())), _n_classes(found)
    stages = model.stages(options.stages, usual=model.trunk.embed_stage)
    ks = tuple(dict.fromkeys(options.k)) or (n_classes,)
    _check_k(ks, len(images.source), f"images of {data}")
    rows = {name: readable_rows(model, part, stages) for name, part in found.parts.items()}
    _check_k(ks, len(rows[first].labels_S), f"images of {data} that can be read")
    cases: dict[str, dict[str, float]] = {}
    for stage in stages:
        for k, part, measures in _of_stage(model, rows, stage, ks, options):
            varying = {stage: len(stages) > 1, f"k={k}": len(ks) > 1, part: len(rows) > 1}
            cases[" ".join(word for word, varies in varying.items() if varies)] = measures
    headline = list(cases)[(len(stages) - 1) * len(ks) * len(rows)]
    results: dict[str, Any] = {
        measure: {case: measures[measure] for case, measures in cases.items()} if headline else cases[""][measure]
        for measure in MEASURES
    }
    by_epoch, remarks = _of_run(model, found.names)
    return Results(
        protocol="clusters",
        data={
            "path": str(data),
            "classes": n_classes,
            **{f"{name}_images": len(one.source) for name, one in found.parts.items()},
        },
        settings={**options.as_dict(), "k": list(ks), "stages": list(stages), "image_size": model.image_size},
        results={**results, **by_epoch},
        headline=("nmi", headline) if headline else ("nmi",),
        notes=[note for name, one in rows.items() for note in one.notes(name)] + remarks,
    )


def _open(data: Path) -> _Data:
    if not has_train_val(data):
        images = open_labelled(data)
        return _Data({"all": images}, [_labels_by_name(images)])
    both = open_train_val(data)
    parts = {"train": both.train, "val": both.val}
    joined = {}
    for part, names in (("train", TRAIN), ("val", HELD_OUT)):
        path = find_part(data, names)
        joined.update(_labels_by_name(parts[part], "" if path is None else f"{path.name}/"))
    return _Data(parts, [*map(_labels_by_name, parts.values()), joined])


def _labels_by_name(images: Labelled, before: str = "") -> dict[str, int]:
    return {before + images.source.name(index): label for index, label in enumerate(images.labels_N.tolist())}


def _n_classes(found: _Data) -> int:
    return max(len(part.class_names) for part in found.parts.values())


def _check_k(ks: tuple[int, ...], n_images: int, what: str) -> None:
    if max(ks) > n_images:
        raise InputError(f"k={max(ks)} clusters are more than the {n_images:,} {what}; use --k {n_images} or fewer")


def _of_stage(
    model: Model, rows: Mapping[str, ReadableRows], stage: str, ks: tuple[int, ...], options: ClustersOptions
) -> Iterator[tuple[int, str, dict[str, float]]]:
    """k, the part, and its measures, for all k and parts."""
    points = {name: one.at(stage, model.machine.clustering_device) for name, one in rows.items()}
    first = next(iter(points))
    if options.pca:
        whitening = Whitening(options.pca).fit(points[first])
        points = {name: whitening.transform(rows_SD) for name, rows_SD in points.items()}
    for k in ks:
        found = _cluster(model, points[first], k, options, stage)
        for name, points_SP in points.items():
            groups_S = found.labels_N if name == first else found.predict(points_SP)
            yield k, name, agreement(groups_S.cpu(), rows[name].labels_S)


def _cluster(model: Model, points_SP: Tensor, k: int, options: ClustersOptions, stage: str) -> Assignment:
    kmeans = KMeans(k, iterations=options.iterations, start=options.start)
    with model.work.track(f"k-means on {stage}, k={k:,}", kmeans.most_steps, "iterations") as advance:
        return kmeans.fit(points_SP, seed=options.seed, advance=advance)


def _of_run(model: Model, names: list[dict[str, int]]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Measures of the run's own clusters by epoch, where the model is a run; and what is to be said of them."""
    run = Path(model.name)
    if not (run / "assignments").is_dir():
        return {}, []
    found, remarks = agreement_by_epoch(run, names, model)
    by_epoch = {
        f"{measure} {OF_THE_RUN}": {f"epoch {epoch}": measures[measure] for epoch, measures in found.items()}
        for measure in MEASURES
        if found
    }
    return by_epoch, remarks


def agreement_by_epoch(
    run: Path, names: list[dict[str, int]], model: Model
) -> tuple[dict[int, dict[str, float]], list[str]]:
    """Measures of `agreement` by epoch, of the clusters that a run learned from, and remarks on what could not be compared.

    Args:
        run: its folder; tables `assignments/epoch-NNNN.parquet` of name and cluster, -1 = unreadable.
        names: classes by image name, in one or several ways of naming the images; the one that knows most is used.
        model: who is told, and asked whether to stop.
    """
    tables = sorted((int(found[1]), path) for path in (run / "assignments").iterdir() if (found := _EPOCH.search(path.name)))
    measures: dict[int, dict[str, float]] = {}
    remarks: list[str] = []
    labels = _LabelsOfRun(names)
    with model.work.reporter.track("clusters of the run", len(tables), "epochs") as progress:
        for epoch, path in tables:
            model.work.interruption.check()
            progress(1)
            table = _read(path)
            if table is None:
                remarks.append(f"{path} can't be read; the run's epoch {epoch} is left out")
                continue
            labels_N = labels.of(table)
            known = float((labels_N >= 0).mean()) if len(labels_N) else 0.0
            if known < KNOWN_SHARE:
                remarks.append(
                    f"the run's own clusters are left out: of its {count_of(len(labels_N), 'image')}, as {path.name} names "
                    f"them, {known:.0%} are among these; it was trained on others"
                )
                return {}, remarks
            measures[epoch] = agreement(table["cluster"].to_numpy(), labels_N)
    return measures, remarks


_EPOCH = re.compile(r"^epoch-(\d+)\.parquet$")


def _read(path: Path) -> Any:
    """The table's names and clusters, or None where it can't be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["name", "cluster"])
    except (OSError, pa.ArrowException):
        return None
    return table if table.column_names == ["name", "cluster"] else None


class _LabelsOfRun:
    """Classes of the images of a run's tables, which have the same order in all: names are looked up once."""

    def __init__(self, names: list[dict[str, int]]) -> None:
        self._names = names
        self._seen: Any = None
        self._labels_N: NDArray[np.int64] = np.empty(0, np.int64)

    def of(self, table: Any) -> NDArray[np.int64]:
        """Classes (N,), -1 where the name is not known; by the way of naming that knows most."""
        if self._seen is None or not self._seen.equals(table["name"]):
            self._seen = table["name"]
            asked = self._seen.to_pylist()
            ways = [np.array([labels.get(name, -1) for name in asked], np.int64) for labels in self._names]
            self._labels_N = max(ways, key=lambda labels_N: int((labels_N >= 0).sum()))
        return self._labels_N
