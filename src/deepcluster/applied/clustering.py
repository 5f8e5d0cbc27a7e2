"""`cluster`: clusters of images by a model as it is, or of a table of embeddings, as a run folder. Nothing is trained.

N rows of all ranks, F finite ones of this rank, K clusters, P components.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepcluster.applied import clustering_choice as choice
from deepcluster.applied.clustering_options import ClusterOptions
from deepcluster.applied.clustering_rows import PointRows, make_points, n_components
from deepcluster.applied.clustering_runs import write_run
from deepcluster.applied.clustering_subject import BATCH_SIZE, Subject, open_subject
from deepcluster.applied.opening import Data
from deepcluster.clustering import clusterer
from deepcluster.clustering.assignment import UNASSIGNED, Assignment
from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.starts import plus_plus
from deepcluster.core.distributed import ONE_PROCESS, Ranks
from deepcluster.core.errors import InputError
from deepcluster.core.files import spare_inputs, user_path
from deepcluster.core.progress import Reporter
from deepcluster.core.seeds import seed_of
from deepcluster.core.work import Advance, Work, joined_work
from deepcluster.interop.loading import new_interruption
from deepcluster.run.folder import RunFolder
from deepcluster.run.lock import RunLock
from deepcluster.run.model import Model
from deepcluster.run.runs import Run
from deepcluster.run.settings import Settings

FEATURES_KEPT = "the finished features are kept: the same command continues from there"
# Above it, a careful start, a pass over the points for each cluster, takes longer than the iterations.
CAREFUL_START_CLUSTERS = 1_000
# With few clusters a start decides more, and costs little: so many are tried for some iterations on the sample.
FEW_CLUSTERS, TRIED_STARTS, TRIED_ITERATIONS = 100, 3, 5


def cluster(
    model: str | Path | Model,
    data: Data | None = None,
    *,
    out: str | Path,
    clusters: int | str | Sequence[int] | None = None,
    overwrite: bool = False,
    stage: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Run:
    """Cluster images by the features of a model, without training, and write a run folder (docs/cluster.md).

    The processes of `torchrun` share the work, and all of them must make the call.

    Args:
        model: whatever `load` opens, or its result; or a table of embeddings, as `embed` writes it (.parquet, .npy).
        data: any images; those of the run by default. Of a table they are only remembered, for `report`.
        out: the run folder.
        clusters: K; several numbers, which are compared, and the most stable is used; or "auto", which also chooses them.
        overwrite: delete the run in `out` first.
        stage: stage of the trunk, averaged over its map; `Trunk.embed_stage` by default.
        device, batch_size, workers: how the work is done.
        limit: use only this many images, or rows of a table, spread evenly.
        reporter: shows progress.
        options: `deepcluster.applied.clustering_options.ClusterOptions`.

    Returns:
        the run: a path, with `.clusters`, `.settings`, `.model()` and `.report()`; if several numbers of clusters were
            compared, the measures are in its `comparison.csv`.

    Raises:
        InputError: model, data, options or `out` can't be used; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; finished features are kept, and the same call continues.
    """
    checked, wanted, path = ClusterOptions.from_dict(options), choice.parse_clusters(clusters), user_path(out)
    spare_inputs(path, "--out", model.name if isinstance(model, Model) else model, data)
    how: dict[str, Any] = {"device": device, "batch_size": batch_size, "workers": workers, "limit": limit}
    with (
        joined_work(reporter, new_interruption(FEATURES_KEPT)) as work,
        closing(RunLock(folder := RunFolder(path, work.ranks), "clustered")) as lock,
    ):
        lock.acquire(work.reporter.warn, new=False)
        folder.check_free(resume=None, overwrite=overwrite)
        subject = open_subject(model, data, stage=stage, precision=checked.precision, **how, work=work)
        spare_inputs(path, "--out", subject.made_of["model"], list(subject.address))
        numbers = _numbers(wanted, subject, checked, work)
        work.reporter.say(subject.describe())
        points = make_points(subject.rows(), checked, work, subject.device)
        of_run = _Fit(subject, checked, points.points_FP.shape[1])
        n_clusters, comparison = _chosen(numbers, points, of_run, work)
        settings = of_run.settings(n_clusters)
        with work.track("clustering", of_run.most_steps(n_clusters), "iterations", together=True) as advance:
            found = of_run.cluster(points.points_FP, n_clusters, checked.seed, ranks=work.ranks, advance=advance)
        if found.remark:
            work.reporter.warn(found.remark)
        assignment = _of_all_rows(found, points, work.ranks)
        settings = replace(settings, clusters=max(2, assignment.n_clusters))
        lock.acquire(work.reporter.warn)
        folder.check_free(resume=None, overwrite=overwrite)
        work.ranks.barrier()
        if work.ranks.is_main:
            write_run(
                *(folder, subject, settings, points.whitening, assignment),
                comparison=comparison,
                overwrite=overwrite,
                work=work,
            )
        work.ranks.barrier()
    return Run(path)


class _Fit:
    """The clusterer of the options, for any number of clusters."""

    def __init__(self, subject: Subject, options: ClusterOptions, width: int) -> None:
        self.subject, self.options, self.width = subject, options, width

    def settings(self, clusters: int) -> Settings:
        """Return the settings of a run with so many clusters, checked."""
        return self.subject.settings(self.options, clusters=clusters, pca=self.width)

    def _algorithm(self, clusters: int) -> Any:
        return clusterer(self.options.clustering).from_settings(self.settings(clusters))

    def most_steps(self, clusters: int) -> int:
        """Return the number of units of progress."""
        return int(self._algorithm(clusters).most_steps)

    def cluster(
        self, points_FP: Tensor, clusters: int, seed: int, *, ranks: Ranks = ONE_PROCESS, advance: Advance
    ) -> Assignment:
        """Return the clusters of points; k-means starts from centroids of a sample, which is the same for all ranks."""
        algorithm = self._algorithm(clusters)
        if clusters <= CAREFUL_START_CLUSTERS and "init" in algorithm.get_params():
            algorithm.set_params(init=careful_start(choice.sample_of(points_FP, clusters, ranks), clusters, seed))
        found: Assignment = algorithm.cluster(points_FP, seed=seed, ranks=ranks, advance=advance)
        return found


def careful_start(sample_SP: Tensor, clusters: int, seed: int) -> Tensor:
    """Return centroids by k-means++; with few clusters the best of several starts, after some iterations of k-means."""
    starts = range(TRIED_STARTS if clusters <= FEW_CLUSTERS else 1)
    trials = 2 + int(math.log(clusters)) if len(starts) > 1 else 1  # As in scikit-learn.
    drawn = [
        plus_plus(sample_SP, clusters, seed=seed_of(seed, number), ranks=ONE_PROCESS, trials=trials) for number in starts
    ]
    if len(drawn) == 1:
        return drawn[0]
    tried = (KMeans(clusters, init=start_KP, max_iter=TRIED_ITERATIONS).cluster(sample_SP) for start_KP in drawn)
    return min(tried, key=lambda found: found.inertia).centroids_KP


def _numbers(wanted: tuple[int, ...] | str | None, subject: Subject, options: ClusterOptions, work: Work) -> tuple[int, ...]:
    """Return the numbers of clusters to compare, or the one to use; check all that is known before the features are."""
    n_rows = len(subject)
    if options.clustering == "pic":
        if (isinstance(wanted, tuple) and len(wanted) > 1) or wanted == choice.AUTO:
            raise InputError("--clustering pic finds the number of clusters itself: leave out --clusters")
        wanted = wanted or (2,)
    if wanted is None:
        raise InputError(
            "the number of clusters is missing: give --clusters with a number, several to compare such as 10,20,50, or auto"
        )
    numbers = choice.candidates(n_rows) if isinstance(wanted, str) else wanted
    _check_enough(numbers, n_rows, "")
    n_components(n_rows, n_rows, options)
    for number in numbers:
        subject.settings(options, clusters=number, pca=options.pca or 1)
    if wanted == choice.AUTO and len(numbers) == 1:
        work.reporter.say(
            f"--clusters auto: {numbers[0]} clusters, and no table: {n_rows:,} images are too few to compare numbers, which "
            f"takes {choice.IMAGES_PER_CLUSTER} images per cluster"
        )
    return numbers


def _check_enough(numbers: Sequence[int], n_rows: int, which: str) -> None:
    """Raise `InputError` if there are too few images for clusters, or for comparing these numbers of clusters."""
    most = max(numbers)
    if n_rows < 2:
        raise InputError(f"there is one image{which}: nothing to cluster")
    if most > n_rows:
        raise InputError(f"clusters={most} is more than the {n_rows:,} images{which}; use --clusters {n_rows} or fewer")
    if len(numbers) > 1 and 2 * most > n_rows:
        fits = f"compare numbers up to {n_rows // 2}" if n_rows >= 6 else "give one number"
        raise InputError(
            f"clusters={most} can't be compared: halves of the {n_rows:,} images{which} are clustered, and have fewer; "
            f"{fits}"
        )


def _chosen(numbers: Sequence[int], points: PointRows, of_run: _Fit, work: Work) -> tuple[int, list[dict[str, Any]]]:
    """Return K, and the measures of the numbers that were compared, as plain values; all ranks together."""
    ranks = work.ranks
    n_all = int(ranks.sum(torch.tensor(len(points.points_FP))))
    _check_enough(numbers, n_all, " that can be read")
    if len(numbers) == 1:
        return numbers[0], []
    sample_SP = choice.sample_of(points.points_FP, max(numbers), ranks)

    def fit(points_SP: Tensor, clusters: int, seed: int) -> Assignment:
        return of_run.cluster(points_SP, clusters, seed, advance=lambda _: work.check())

    def measured() -> tuple[int, list[dict[str, Any]]]:
        found = choice.compare(sample_SP, numbers, fit, seed=of_run.options.seed, work=work)
        chosen = choice.most_stable(found)
        for line in choice.as_text(found, chosen, len(sample_SP), n_all):
            work.reporter.say(line)
        return chosen.clusters, choice.rows_of_table(found, chosen)

    return ranks.from_main(measured)


def _of_all_rows(found: Assignment, points: PointRows, ranks: Ranks) -> Assignment:
    """Return the assignment of the rows of all ranks, on all ranks; the largest cluster is number 0."""
    labels_M, distances_M = torch.full(points.finite_M.shape, UNASSIGNED), torch.full(points.finite_M.shape, torch.nan)
    labels_M[points.finite_M], distances_M[points.finite_M] = found.labels_N.cpu(), found.distances_N.cpu().float()
    found = replace(found, labels_N=labels_M, distances_N=distances_M).over_ranks(ranks)
    if found.super_of_cluster_K is not None:  # Its clusters are numbered by super-cluster.
        return found
    order_K = found.sizes_K().argsort(descending=True, stable=True)
    labels_N = torch.where(found.labels_N >= 0, order_K.argsort()[found.labels_N], UNASSIGNED)
    return replace(found, labels_N=labels_N, centroids_KP=found.centroids_KP.cpu()[order_K])
