"""`names`: names for the clusters of a run, given one by one or taken from labels of some images. K clusters."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.files import check_file, locked, output_path, read_table, user_path
from deepcluster.core.progress import Reporter
from deepcluster.core.text import are, count_of
from deepcluster.data.sources.text_tables import decode, of_windows, pairs_of, read_text_table
from deepcluster.interop.loading import load
from deepcluster.run.cluster_names import FILE, clean_name, read_names, write_names
from deepcluster.run.folder import RunFolder
from deepcluster.run.settings import Settings


@dataclass(frozen=True)
class NamedClusters:
    """The clusters of a run, with their names.

    Attributes:
        names: by the number of the cluster; the others have none.
        sizes_K: images in each cluster.
        labelled: for names that were just taken from labels: images with this label, and with any, by cluster.
    """

    names: dict[int, str]
    sizes_K: NDArray[np.int64]
    labelled: dict[int, tuple[int, int]]

    def __str__(self) -> str:
        total = max(1, int(self.sizes_K.sum()))
        rows = [("cluster", "images", "share", "name")]
        for cluster, n_images in enumerate(self.sizes_K.tolist()):
            name = self.names.get(cluster, "")
            if cluster in self.labelled:
                same, known = self.labelled[cluster]
                name += f"  ({same:,} of {count_of(known, 'labelled image')})"
            rows.append((str(cluster), f"{n_images:,}", f"{100 * n_images / total:.1f}%", name))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
        lines = [
            "  ".join([*(f"{cell:>{width}}" for cell, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
        ]
        counts = f"{count_of(len(self.sizes_K), 'cluster')}, {sum(k < len(self.sizes_K) for k in self.names):,} with a name"
        return "\n".join([*(line.rstrip() for line in lines), counts])


def name_clusters(
    run: str | Path,
    names: Mapping[int, str] | None = None,
    *,
    labels: str | Path | None = None,
    reporter: Reporter | None = None,
) -> NamedClusters:
    """Name clusters of a run, as `deepcluster names` does, and return all names; without names and labels, change nothing.

    They are written into `names.csv` in the run folder. Tables, folders and the report show them.

    Args:
        run: a run folder.
        names: name of each of some clusters; "" removes it.
        labels: a table of images of the run and their labels (.csv): each cluster with such images gets the label that most
            of them have. `names` go before these.
        reporter: prints what is not used.

    Raises:
        InputError: the run has no clusters, there is no such cluster, or the table has no images of the run.
    """
    folder = RunFolder(user_path(run))
    config = folder.read_config()
    if folder.clustered():  # Perhaps of a table: then there is no network to load.
        sizes_K = np.zeros(Settings.from_saved(config["settings"]).n_clusters, np.int64)
    else:
        sizes_K = load(run).clusters()[1].sizes_K().numpy()
    image_names, cluster_N = _clusters_of(folder)
    if len(cluster_N):
        sizes_K = np.bincount(cluster_N[cluster_N >= 0], minlength=len(sizes_K))
    given = dict(names or {})
    for number, name in given.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or not isinstance(name, str):
            raise InputError(
                f"names={{{number!r}: {name!r}}} should be numbers of clusters with texts, such as {{3: 'dogs'}}"
            )
        if not 0 <= number < len(sizes_K):
            raise InputError(
                f"{folder.path} has no cluster {number}: its clusters are numbered from 0 to {len(sizes_K) - 1}"
            )
    found = dict[int, tuple[str, int, int]]()
    if labels is not None:
        found = _majorities(user_path(labels), image_names, cluster_N, reporter or Reporter(quiet=True))
    new = {**{cluster: label for cluster, (label, _, _) in found.items()}, **given}
    all_names = _with(new, folder.path) if names or labels is not None else read_names(folder.path)
    if strangers := [number for number in all_names if number >= len(sizes_K)]:
        listed = f"{folder.path / FILE} names cluster {strangers[0]}"
        advice = f"clusters are numbered from 0 to {len(sizes_K) - 1}: correct the number, or delete the line"
        (reporter or Reporter(quiet=True)).warn(f"{listed}, which the run does not have; its {advice}")
    labelled = {cluster: counts for cluster, (_, *counts) in found.items() if cluster not in given}
    return NamedClusters(all_names, sizes_K, {cluster: (same, known) for cluster, (same, known) in labelled.items()})


def _with(new: Mapping[int, str], folder: Path) -> dict[int, str]:
    """Add names to those of a run folder, and return all; other processes add theirs before or afterwards."""
    path = output_path(folder / FILE, "names")
    with locked(path):
        names = {cluster: clean_name(name) for cluster, name in sorted({**read_names(folder), **new}.items())}
        names = {cluster: name for cluster, name in names.items() if name}
        write_names(folder, names)
    return names


def _clusters_of(folder: RunFolder) -> tuple[list[str], NDArray[np.int64]]:
    """Return names and clusters of the images of a run; none if it has no table of them, as imported models."""
    table = folder.newest_clusters()
    if table is None:
        return [], np.empty(0, np.int64)
    columns = read_table(table, ["name", "cluster"])
    return columns["name"].to_pylist(), columns["cluster"].to_numpy()


def _majorities(
    path: Path, names: Sequence[str], cluster_N: NDArray[np.int64], reporter: Reporter
) -> dict[int, tuple[str, int, int]]:
    """Return the most frequent label of each cluster, the number of its images that have it, and that have any."""
    check_file(path)
    try:
        table = read_text_table(decode(path.read_bytes(), str(path)), str(path))
    except OSError as fault:
        raise InputError(f"{path} can't be read: {(fault.strerror or str(fault)).lower()}") from None
    pairs, column = pairs_of(table, str(path))
    if not column:
        raise InputError(f"{path} has no column of labels: name one of its columns label")
    places = {name: row for row, name in enumerate(names)}
    bases = Counter(PurePosixPath(name).name for name in names)
    unique = {base: row for row, name in enumerate(names) if bases[base := PurePosixPath(name).name] == 1}
    label_of: dict[int, str] = {}
    strangers = []
    for image, label in pairs:
        row = _row_of(image.replace("\\", "/"), places, unique)
        if row is None:
            strangers.append(image)
        elif text := clean_name(of_windows(str(label if label is not None else ""))):
            label_of[row] = text
    if not label_of:
        raise InputError(f"{path} has no labels of images of this run; its images have names such as {', '.join(names[:2])}")
    if strangers:
        reporter.warn(f"{are(len(strangers), 'row')} of no image of this run, and not used, such as {strangers[0]}")
    counts: dict[int, Counter[str]] = {}
    for row, label in label_of.items():
        if cluster_N[row] >= 0:
            counts.setdefault(int(cluster_N[row]), Counter())[label] += 1
    best = {cluster: min(some.items(), key=lambda item: (-item[1], item[0])) for cluster, some in counts.items()}
    return {cluster: (*best[cluster], some.total()) for cluster, some in counts.items()}


def _row_of(image: str, places: Mapping[str, int], unique: Mapping[str, int]) -> int | None:
    """Return the row of an image by its name, by the end of its path, or by its file's name if no other has it."""
    parts = [part for part in image.split("/") if part != "."]
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((places[end] for end in ends if end in places), unique.get(parts[-1] if parts else ""))
