"""`compare`: curves, settings and clusters of several runs side by side. N images that two runs share, K clusters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.applied.compared_runs import CURVES, ComparedRun, read_run, run_tables
from deepcluster.applied.found import Found, checked_outputs, picture, write_found, write_page
from deepcluster.applied.opening import Data
from deepcluster.clustering.assignment import UNASSIGNED
from deepcluster.clustering.matching import match_clusters
from deepcluster.core.errors import InputError
from deepcluster.core.files import user_path
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of
from deepcluster.core.work import Interruption, Work
from deepcluster.data.loader import usual_workers
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.sources.by_name import pictures_by_name
from deepcluster.run.table_writers import ENDINGS

# The adjustment for chance takes a step for each pair of clusters: a minute for more pairs than this.
MOST_PAIRS = 4_000_000
AGREEMENT = "Agreement of the clusters"
AGREEMENT_WORDS = (
    "NMI, ARI and AMI say how far two clusterings agree: 1 is the same clusters, whatever their numbers; ARI and AMI are 0 "
    "for clusters drawn at random. Moved images are in another cluster, after matching clusters so that the fewest are."
)
# Moves from one cluster to another that the page shows, and pictures of each.
MOST_MOVES, PICTURES_OF_MOVE = 20, 12


@dataclass(frozen=True)
class Agreement:
    """How far the clusters of two runs agree on the images that both have.

    Attributes:
        run, other: their names.
        n_images: N.
        nmi: normalised mutual information, geometric mean, as in training.
        ari, ami: Rand index and mutual information, adjusted for chance; the latter NaN where there are too many clusters.
        n_moved: images that are in another cluster, after matching clusters so that as few as possible are.
    """

    run: str
    other: str
    n_images: int
    nmi: float
    ari: float
    ami: float
    n_moved: int


@dataclass(frozen=True, repr=False)
class Comparison(Found):
    """Runs compared; one row per image that all of them have.

    Attributes:
        runs: their names.
        names: the images.
        cluster_RN: int64, their cluster in each run, -1 = unassigned.
        matched_RN: the same in the numbers of the first run's clusters; -1 where a cluster has no counterpart.
        agreements: of each pair of runs that share images.
        tables: what is printed, by title: a header, and rows.
    """

    runs: list[str]
    names: list[str]
    cluster_RN: NDArray[np.int64]
    matched_RN: NDArray[np.int64]
    agreements: list[Agreement]
    tables: dict[str, tuple[list[str], list[list[str]]]]

    @property
    def moved_RN(self) -> NDArray[np.bool_]:
        """Whether an image is in another cluster than in the first run; not where it is unassigned in one of both."""
        known_RN = (self.cluster_RN != UNASSIGNED) & (self.cluster_RN[:1] != UNASSIGNED)
        moved_RN: NDArray[np.bool_] = known_RN & (self.matched_RN != self.cluster_RN[:1])
        return moved_RN

    def columns(self) -> dict[str, Any]:
        """Return `name`, `cluster_1`, and of each further run `cluster_2`, `matched_2` and `moved_2`, …"""
        columns: dict[str, Any] = {"name": self.names}
        for number, cluster_N in enumerate(self.cluster_RN, start=1):
            columns[f"cluster_{number}"] = cluster_N
            if number > 1:
                columns[f"matched_{number}"] = self.matched_RN[number - 1]
                columns[f"moved_{number}"] = self.moved_RN[number - 1]
        return columns

    def __repr__(self) -> str:
        shared = count_of(len(self.names), "image")
        return f"Comparison({', '.join(self.runs)}; {shared} in all: .agreements, .tables, .names, .cluster_RN, .matched_RN)"


def compare(
    runs: Sequence[str | Path],
    *,
    data: Data | None = None,
    out: str | Path | None = None,
    page: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Compare runs as `deepcluster compare` prints it: curves, settings, and the clusters of the images that they share.

    Args:
        runs: two or more run folders, or tables that `assign` wrote. Images are the same if their names are.
        data: where the images are, for the pictures of `page`; by default where they were when the first run was started.
        out: also write a table of the images that all have (`.parquet`, `.csv`, `.jsonl`: name, cluster_1, cluster_2, …).
        page: also write a page with curves, and with pictures of images that moved (`.html`).
        reporter: shows progress.

    Raises:
        InputError: there are fewer than two runs, one can't be read, or files can't be written.
        Interrupted: Ctrl-C or SIGTERM.
    """
    paths = [user_path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if len(paths) < 2:
        raise InputError(f"{' '.join(map(str, paths)) or 'nothing'} can't be compared alone: name two runs or more")
    target, page_target = checked_outputs(out, page, endings=ENDINGS, inputs=(*paths, data))
    work = Work(reporter, Interruption(advice="nothing was written"))
    with work.interruption.listening():
        read = [read_run(path, str(path)) for path in paths]
        with work.track("comparing clusters", None, "pairs") as advance:
            agreements = []
            for one, other in combinations(read, 2):
                if (agreement := _agreement(one, other)) is not None:
                    agreements.append(agreement)
                elif one.names and other.names:
                    work.reporter.warn(f"no image has a cluster in both {one.name} and {other.name}, by its name")
                advance(1)
        found = _comparison(read, agreements)
        if target is not None:
            if not len(found.names):
                raise InputError(f"no image is in the clusters of all runs: {target} would be empty")
            write_found(found, target)
            work.reporter.say(f"{target}: {count_of(len(found), 'row')}")
        if page_target is not None:
            _write_page(page_target, found, read, data, work)
    return found


def _shared(one: ComparedRun, other: ComparedRun) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the clusters in both runs of the images that are in a cluster of both."""
    index = {name: number for number, name in enumerate(other.names)}
    places = np.array([index.get(name, -1) for name in one.names], np.int64)
    ours, theirs = one.cluster_N[places >= 0], other.cluster_N[places[places >= 0]]
    known = (ours != UNASSIGNED) & (theirs != UNASSIGNED)
    return ours[known], theirs[known]


def _agreement(one: ComparedRun, other: ComparedRun) -> Agreement | None:
    from sklearn import metrics

    ours, theirs = _shared(one, other)
    if not len(ours):
        return None
    pairs = len(np.unique(ours)) * len(np.unique(theirs))
    return Agreement(
        one.name,
        other.name,
        len(ours),
        nmi=float(metrics.normalized_mutual_info_score(ours, theirs, average_method="geometric")),
        ari=float(metrics.adjusted_rand_score(ours, theirs)),
        ami=float(metrics.adjusted_mutual_info_score(ours, theirs)) if pairs <= MOST_PAIRS else float("nan"),
        n_moved=int((match_clusters(theirs, ours)[theirs] != ours).sum()),
    )


def _comparison(read: Sequence[ComparedRun], agreements: list[Agreement]) -> Comparison:
    indices = [{name: number for number, name in enumerate(run.names)} for run in read]
    names = [name for name in read[0].names if all(name in index for index in indices)]
    places = [[index[name] for name in names] for index in indices]
    cluster_RN = np.stack([run.cluster_N[place] for run, place in zip(read, places, strict=True)])
    matched_RN = cluster_RN.copy()
    for cluster_N, matched_N in zip(cluster_RN[1:], matched_RN[1:], strict=True):
        known = (cluster_N != UNASSIGNED) & (cluster_RN[0] != UNASSIGNED)
        number_K = np.full(int(cluster_N.max(initial=-1)) + 1, -1)
        found_K = match_clusters(cluster_N[known], cluster_RN[0][known])
        number_K[: len(found_K)] = found_K
        matched_N[:] = np.where(cluster_N != UNASSIGNED, number_K[cluster_N] if len(number_K) else -1, -1)
    tables = run_tables(read)
    if agreements:
        header = ["clusters of", "and of", "images", "NMI", "ARI", "AMI", "moved"]
        tables[AGREEMENT] = header, [_row(one) for one in agreements]
    return Comparison([run.name for run in read], names, cluster_RN, matched_RN, agreements, tables)


def _row(one: Agreement) -> list[str]:
    values = ["–" if value != value else f"{value:.3f}" for value in (one.nmi, one.ari, one.ami)]
    return [one.run, one.other, f"{one.n_images:,}", *values, f"{one.n_moved:,} ({one.n_moved / one.n_images:.0%})"]


def _write_page(page: Path, found: Comparison, read: Sequence[ComparedRun], data: Data | None, work: Work) -> None:
    tables = {title: {"header": header, "rows": rows} for title, (header, rows) in found.tables.items()}
    tables.pop("Epochs", None)  # The curves show all.
    both = [tables.pop(title) for title in ("Runs", AGREEMENT) if title in tables]
    words = AGREEMENT_WORDS if found.agreements else ""
    parts: list[dict[str, Any]] = [{"name": "runs", "title": "Runs", "words": words, "tables": both}]
    if curves := _curves(read):
        parts.append({"name": "curves", "title": "Curves", "curves": curves})
    for number, (title, table) in enumerate(tables.items()):
        parts.append({"name": f"table-{number}", "title": title, "tables": [table]})
    moves = [move for number in range(1, len(read)) for move in _moves(found, number)]
    images = _images(read[0], found.names, data, work) if moves else None
    if moves:
        words = (
            f"Clusters are matched to those of {found.runs[0]} so that as few images as possible move. The largest moves:"
        )
        part = {"name": "moved", "title": "Images that moved", "words": words, "groups": moves}
        parts.append(part)
    write_page(page, " and ".join(found.runs), parts, images, workers=usual_workers(), work=work)


def _moves(found: Comparison, number: int) -> list[dict[str, Any]]:
    """Return the largest groups of images that left one cluster of the first run for the same other one."""
    rows = np.flatnonzero(found.moved_RN[number])
    ends = np.stack([found.cluster_RN[0][rows], found.cluster_RN[number][rows]], axis=1)
    pairs, pair_of, counts = np.unique(ends, axis=0, return_inverse=True, return_counts=True)
    groups = []
    for pair in np.argsort(-counts, kind="stable")[:MOST_MOVES].tolist():
        before, after = pairs[pair].tolist()
        members = rows[pair_of.reshape(-1) == pair].tolist()
        partner = found.matched_RN[number][members[0]]
        as_first = f" (the match of {partner})" if partner >= 0 else " (which has no match)"
        title = f"{found.runs[0]}: cluster {before} → {found.runs[number]}: cluster {after}{as_first}"
        shown = members[:PICTURES_OF_MOVE]
        words = count_of(len(members), "image") + (f", the first {len(shown)}" if len(shown) < len(members) else "")
        groups.append({"title": title, "words": words, "pictures": [picture(row, found.names[row], "") for row in shown]})
    return groups


def _images(run: ComparedRun, names: list[str], data: Data | None, work: Work) -> ImageSource | None:
    """Return the images; None, with a warning, where they are not at hand."""
    address = data or run.config.get("data", {}).get("address")
    if not address:
        work.reporter.warn(f"{run.name} does not say where its images are: name them with --data, to see pictures")
        return None
    try:
        return pictures_by_name(names, open_source(address, on_trouble=work.reporter.warn))
    except InputError as fault:
        if data is not None:
            raise
        work.reporter.warn(f"no pictures: {fault}. If the images have moved, name them with --data")
        return None


def _curves(read: Sequence[ComparedRun]) -> list[Mapping[str, Any]]:
    curves = list[Mapping[str, Any]]()
    for metric, title in CURVES.items():
        lines = {run.name: run.values(metric) for run in read if run.values(metric)[0]}
        if lines:
            curves.append({"title": title, "y": title, "lines": lines})
    return curves
