"""Agreement of k-means on frozen features with the classes; for a run, also of its own clusters, epoch by epoch.

N images, S readable images, D features, P components after whitening.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError
from deepcluster.core.files import read_table
from deepcluster.core.text import count_of
from deepcluster.core.work import Work
from deepcluster.evaluation.datasets import labelled
from deepcluster.evaluation.measures.rankings import MEASURES, agreement
from deepcluster.evaluation.options import ClustersOptions
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model

# A run was trained on these images if at least this share of its names is known.
KNOWN_SHARE = 0.9

# Classes by image name, in one or several ways of naming the images.
Names = list[dict[str, int]]
Parts = dict[str, labelled.Labelled]


def evaluate(model: Model, data: Path, options: ClustersOptions) -> Results:
    """Cluster the training images (or all, if there is one part), assign the held-out ones, and compare with the classes.

    Raises:
        InputError: images have no class, or there are fewer of them than clusters.
    """
    parts, names, n_classes, stages, ks, rows = prepare(model, data, options)
    first = next(iter(parts))
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
    found, remarks = agreement_by_epoch(Path(model.name), names, model.work)
    for measure in MEASURES if found else ():
        results[f"{measure} of the run"] = {f"epoch {epoch}": measures[measure] for epoch, measures in found.items()}
    notes = [f"{name}: {note}" for name, part in parts.items() for note in part.notes]
    notes += [
        note for name, one in rows.items() for note in labelled.left_out(name, one.unreadable, parts[name].source.name)
    ]
    counts = {f"{name}_images": len(one.source) for name, one in parts.items()}
    about = {"path": str(data), "classes": n_classes, **counts}
    settings = {**options.as_dict(), "k": list(ks), "stages": list(stages), "image_size": model.image_size}
    return Results("clusters", about, settings, results, ("nmi", headline) if headline else ("nmi",), notes + remarks)


def evaluate_table_run(run: Path, data: Path, options: ClustersOptions, work: Work) -> Results:
    """Compare the clusters of a run that was made of a table of embeddings with the classes of the images of the same names.

    Raises:
        InputError: options are given, which only features have a use for, or the names are not those of the images.
    """
    if options != ClustersOptions():
        raise InputError(
            f"{run} has no network whose features could be clustered; only its own clusters: leave out all options"
        )
    parts, names = _open(data)
    found, remarks = agreement_by_epoch(run, names, work)
    if not found:
        raise InputError(
            "; ".join([f"{run} was made of a table of embeddings, whose names lead to images of {data}", *remarks])
        )
    counts = {f"{name}_images": len(one.source) for name, one in parts.items()}
    classes = max(len(part.class_names) for part in parts.values())
    about = {"path": str(data), "classes": classes, **counts}
    return Results("clusters", about, {}, {name: found[max(found)][name] for name in MEASURES}, ("nmi",), remarks)


def prepare(
    model: Model, data: Path, options: ClustersOptions
) -> tuple[Parts, Names, int, tuple[str, ...], tuple[int, ...], dict[str, labelled.ReadableRows]]:
    """Extract the features of all parts; return the parts, classes by name, their number, stages, all k, and the rows."""
    parts, names = _open(data)
    n_classes = max(len(part.class_names) for part in parts.values())
    stages = model.stages(options.stages, usual=model.trunk.embed_stage)
    ks = tuple(dict.fromkeys(options.k)) or (n_classes,)
    _check_k(ks, len(next(iter(parts.values())).source), f"images of {data}")
    rows = {name: labelled.readable_rows(model, one.source, one.labels_N, stages) for name, one in parts.items()}
    return parts, names, n_classes, stages, ks, rows


def _open(data: Path) -> tuple[Parts, Names]:
    """Return two parts, the first of which is clustered, or one; and classes by image name.

    A run may have named the images from the part's folder, or from the one above: one dict for each way.
    """
    if not labelled.has_train_val(data):
        images = labelled.open_labelled(data)
        return {"all": images}, [_labels_by_name(images)]
    both = labelled.open_train_val(data)
    parts = {"train": both.train, "val": both.val}
    joined: dict[str, int] = {}
    for part, names in (("train", labelled.TRAIN), ("val", labelled.HELD_OUT)):
        path = labelled.find_part(data, names)
        joined |= _labels_by_name(parts[part], "" if path is None else f"{path.name}/")
    return parts, [*map(_labels_by_name, parts.values()), joined]


def _labels_by_name(images: labelled.Labelled, before: str = "") -> dict[str, int]:
    return {before + images.source.name(index): label for index, label in enumerate(images.labels_N.tolist())}


def _check_k(ks: tuple[int, ...], n_images: int, what: str) -> None:
    if max(ks) > n_images:
        raise InputError(f"k={max(ks)} clusters are more than the {n_images:,} {what}; use --k {n_images} or fewer")


def _of_stage(
    model: Model, rows: Mapping[str, labelled.ReadableRows], stage: str, ks: tuple[int, ...], options: ClustersOptions
) -> Iterator[tuple[int, str, dict[str, float]]]:
    """Yield k, the part, and its measures, for all k and parts."""
    points = {name: one.at(stage, model.machine.clustering_device) for name, one in rows.items()}
    first = next(iter(points))
    if options.pca:
        whitening = Whitening(options.pca).fit(points[first])
        points = {name: whitening.transform(rows_SD) for name, rows_SD in points.items()}
    for k in ks:
        kmeans = KMeans(k, init=options.start, max_iter=options.iterations)
        with model.work.track(f"k-means on {stage}, k={k:,}", kmeans.most_steps, "iterations") as advance:
            found = kmeans.cluster(points[first], seed=options.seed, advance=advance)
        for name, points_SP in points.items():
            clusters_S = found.labels_N if name == first else found.predict(points_SP)
            yield k, name, agreement(clusters_S.cpu(), rows[name].labels_S)


def agreement_by_epoch(run: Path, names: Names, work: Work) -> tuple[dict[int, dict[str, float]], list[str]]:
    """Return measures of `agreement`, by epoch, of the clusters that a run was trained on, and remarks on what is missing.

    Args:
        run: its folder, if it is one; tables `assignments/epoch-NNNN.parquet` of name and cluster, -1 = unreadable.
        names: the way of naming that knows most images is used.
        work: shows progress, and is asked for a stop.
    """
    files = (run / "assignments").glob("*.parquet")
    tables = [(int(found[1]), path) for path in files if (found := re.fullmatch(r"epoch-(\d+)\.parquet", path.name))]
    if not tables:
        return {}, []
    measures: dict[int, dict[str, float]] = {}
    remarks: list[str] = []
    # The tables of a run have the same images in the same order: names are looked up once.
    looked_up, labels_N = None, np.empty(0, np.int64)
    with work.track("clusters of the run", len(tables), "epochs") as advance:
        for epoch, path in sorted(tables):
            advance(1)
            table = _read(path)
            if table is None:
                remarks.append(f"{path} can't be read; the run's epoch {epoch} is left out")
                continue
            if looked_up is None or not looked_up.equals(table["name"]):
                looked_up, images = table["name"], table["name"].to_pylist()
                ways = [np.array([labels.get(image, -1) for image in images], np.int64) for labels in names]
                labels_N = max(ways, key=lambda labels_N: int((labels_N >= 0).sum()))
            known = float((labels_N >= 0).mean()) if len(labels_N) else 0.0
            if known < KNOWN_SHARE:
                remarks.append(
                    f"the run's own clusters are left out: of its {count_of(len(labels_N), 'image')}, as {path.name} names "
                    f"them, {known:.0%} are among these; it was trained on others"
                )
                return {}, remarks
            measures[epoch] = agreement(table["cluster"].to_numpy(), labels_N)
    return measures, remarks


def _read(path: Path) -> Any:
    """Return the table's names and clusters, or None if it can't be read."""
    import pyarrow as pa

    try:
        table = read_table(path, ["name", "cluster"])
    except (OSError, pa.ArrowException):
        return None
    return table if table.column_names == ["name", "cluster"] else None
