"""`train`: from a folder of images to a finished run. Everything is checked before it starts, and nothing is lost."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.distributed import is_restart, started_ranks
from deepcluster.core.errors import InputError, TrainingError
from deepcluster.core.files import spare_inputs
from deepcluster.core.options import plain
from deepcluster.core.progress import Reporter
from deepcluster.core.retry import ConnectionLost, end_waits
from deepcluster.core.work import RESUME, Interruption, joined_work
from deepcluster.data.survey import check_unreadable, even_sample
from deepcluster.run.features import centre_view, feature_batches, image_features
from deepcluster.run.folder import RunFolder, save_assignment
from deepcluster.run.lock import RunLock
from deepcluster.run.metrics import epoch_cells, health
from deepcluster.run.space import Space, space_state
from deepcluster.training.batches import even_batches
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.deepcluster_v2 import DeepClusterV2
from deepcluster.training.dry_run import fit_to_minutes, say_dry_run
from deepcluster.training.fitting import fit_whitening, learns_from_images
from deepcluster.training.loggers import LOGGERS, Logger, LoggerGroup
from deepcluster.training.loop import Loop, Observer
from deepcluster.training.method import Method
from deepcluster.training.optim import RESTART
from deepcluster.training.plan import Data, Plan, plan_run, say_done, say_finished, say_plan, say_time_left, say_unreadable
from deepcluster.training.tensorboard import Session

# (features_MD, labels_M) → score, by the name that `--eval-with` gives
Evaluate = Mapping[str, Callable[[Tensor, Tensor], float]]

EVALUATED_IMAGES = 10_000
# Errors of a file that is being written, which do not name it.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def train(
    data: Data,
    *,
    out: Path,
    user_options: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    reporter: Reporter,
    evaluate: Evaluate,
    loggers: Sequence[Logger] = (),
    dry_run: bool = False,
    observer: Observer | None = None,
) -> Path:
    """Train on `data` and return the run folder. `deepcluster.train` documents the arguments.

    Args:
        user_options: the settings that the user chose.
        evaluate: functions for `--eval-every`, by name.
        observer: is called at the events of the run.
    """
    user_options = {name: plain(value) for name, value in user_options.items()}
    if overwrite:
        spare_inputs(out, "--out", data, user_options.get("init"))
    if dry_run:
        return _dry_run(RunFolder(out), data, user_options, resume=resume, overwrite=overwrite, reporter=reporter)
    # While a server is waited for, the thread that asks for batches would wait as long.
    interruption = Interruption(
        on_request=end_waits, advice="training had not begun: the same command with --resume continues"
    )
    if is_restart():
        resume, overwrite = True, False
    with (
        joined_work(reporter, interruption) as work,
        closing(work.reporter) as reporter,
        closing(RunLock(folder := RunFolder(out, work.ranks))) as lock,
    ):
        lock.acquire(reporter.warn, new=False)  # First of all: for a folder in use, neither --resume nor --overwrite helps.
        folder.check_free(resume=resume, overwrite=overwrite)
        is_main = work.ranks.is_main
        with plan_run(folder, data, user_options, work, resume=resume) as plan, _disk_errors(folder):
            if plan.settings.minutes:
                plan = fit_to_minutes(plan, _loop(plan, None))
            loop = _loop(plan, observer)
            if plan.state is not None and "final" in plan.state and loop.epoch > plan.settings.epochs:
                say_finished(plan)
                return out
            loop.observer.begin(loop)
            session = Session(reporter, loop.epoch, plan.loader.images, lambda: loop.method.current)
            named = [LOGGERS[name][-1](session) for name in plan.settings.loggers]
            log = LoggerGroup([*named, *loggers] if is_main else [], reporter)
            with log.ended():
                _begin(plan, loop, lock, log, overwrite=overwrite)
                first = loop.epoch
                while loop.epoch <= plan.settings.epochs:
                    n_unreadable = len(plan.loader.unreadable)
                    plan.check_unchanged()
                    with _saved_when_offline(loop):
                        metrics = loop.run_epoch()
                    _record_epoch(plan, loop, metrics, n_unreadable, evaluate, log)
                    loop.observer.after_epoch(loop, metrics)
                    if loop.epoch == first + 1 and is_main:
                        say_time_left(folder, plan.settings, reporter)
                _finish(plan, loop, session)
            say_done(plan)
    return out


def _dry_run(
    folder: RunFolder,
    data: Data,
    user_options: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    reporter: Reporter,
) -> Path:
    """Print the plan of a run, and what it will take; write nothing."""
    if started_ranks() > 1:
        raise InputError("--dry-run measures one process: leave out torchrun; N processes take about an N-th of the time")
    interruption = Interruption(on_request=end_waits, advice="nothing was written")
    with joined_work(reporter, interruption) as work:
        folder.check_free(resume=resume, overwrite=overwrite)
        with plan_run(folder, data, user_options, work, resume=resume, dry_run=True) as plan:
            loop = _loop(plan, None)
            if plan.state is not None and "final" in plan.state and loop.epoch > plan.settings.epochs:
                say_finished(plan)
                return folder.path
            interruption.advice = "nothing was written"
            say_plan(plan, loop.method.describe_memory(), dry_run=True)
            say_dry_run(plan, loop)
    return folder.path


@contextmanager
def _disk_errors(folder: RunFolder) -> Iterator[None]:
    """Say what the system refused, and whether that was in the run folder."""
    try:
        yield
    except OSError as fault:
        named = [
            Path(os.fsdecode(name)).absolute() for name in (fault.filename, fault.filename2) if isinstance(name, str | bytes)
        ]
        is_own = any(path.is_relative_to(folder.path.absolute()) for path in named)
        is_own |= not named and fault.errno in FULL
        where = f"could not write into {folder.path}: " if is_own else ""
        kept = "The last good state is kept: fix this" if folder.last.is_file() else "Nothing was saved yet: fix this"
        raise TrainingError(f"{where}{fault}. {kept}, then use --resume") from fault


@contextmanager
def _saved_when_offline(loop: Loop) -> Iterator[None]:
    """Save the state before a lost connection ends the run."""
    try:
        yield
    except ConnectionLost:
        # Other processes are in the middle of a step, and can't save together with this one.
        if loop.labelled and loop.ranks.size == 1:
            loop.save_now()
        loop.work.check()
        raise


def _loop(plan: Plan, observer: Observer | None) -> Loop:
    """Return the loop over the method that the settings name, in the state from which it resumes."""
    parts = (plan.trunk, plan.loader, plan.settings, plan.machine, plan.work)
    is_v2 = plan.settings.method == "deepcluster-v2"
    method: Method = DeepClusterV2(*parts) if is_v2 else DeepCluster(*parts, plan.memory())
    loop = Loop(method, lambda: _save(plan, loop), plan.source.labels_N, observer)
    try:
        if plan.state is not None:
            loop.load_state_dict(plan.state)
            plan.work.interruption.advice = RESUME
    except (RuntimeError, ValueError, KeyError, TypeError) as fault:
        reason = str(fault).splitlines()[-1].strip()
        raise InputError(f"{plan.folder.last} does not hold the state of this run: {reason}") from None
    return loop


def _begin(plan: Plan, loop: Loop, lock: RunLock, log: LoggerGroup, *, overwrite: bool) -> None:
    """Write the run folder, and print what will be done."""
    folder, ranks, reporter = plan.folder, plan.work.ranks, plan.work.reporter
    n_readable = len(plan.loader.images) - len(plan.loader.unreadable)
    even_batches(plan.settings.images_per_epoch(n_readable), plan.settings.batch_size, ranks)
    lock.acquire(reporter.warn)
    if not plan.resumed:  # Another start may have made the folder meanwhile.
        folder.check_free(resume=False, overwrite=overwrite)
    ranks.barrier()  # All ranks have read what was there.
    if ranks.is_main:
        folder.create(overwrite=overwrite)
        plan.write_config()
        folder.write_unreadable(plan.unreadable_by_name())
        reporter.log_to(folder.log)
        say_plan(plan, loop.method.describe_memory())
        if plan.state is not None:
            again = f": the cosine begins again, at a rate of {plan.settings.lr * RESTART:.3g}"
            again = again if loop.epoch - 1 in plan.settings.lr_restarts else ""
            reporter.say(f"resuming with epoch {loop.epoch}, batch {loop.batch}{again}")
            for lost in folder.lost_results(loop.epoch - 1):
                reporter.warn(f"{folder.path}: {lost}; weights and clusters are whole, and the run continues")
        folder.drop_metrics_from(loop.epoch)
        log.begin(folder.path, plan.settings.as_dict(), folder.read_metrics())
    ranks.barrier()
    if plan.state is None and plan.initial is None and learns_from_images(plan.trunk):
        _save(plan, loop, keep_as_epoch=0)  # Its weights can't be made again without the images.


def _record_epoch(
    plan: Plan, loop: Loop, metrics: dict[str, Any], n_unreadable: int, evaluate: Evaluate, log: LoggerGroup
) -> None:
    """Evaluate an epoch if due, write and print its results, and save the state."""
    settings, folder, reporter, epoch = plan.settings, plan.folder, plan.work.reporter, metrics["epoch"]
    loop.check_finite()
    keep = epoch == 1 or (settings.checkpoint_every and epoch % settings.checkpoint_every == 0)
    is_due = settings.eval_every and (epoch % settings.eval_every == 0 or epoch == settings.epochs)
    if keep or is_due:
        fit_whitening(plan.trunk, plan.loader, plan.machine, settings, plan.work)
    if plan.work.ranks.is_main:
        if is_due:
            metrics[settings.eval_with] = _score(plan, evaluate)
        if len(plan.loader.unreadable) > n_unreadable:
            say_unreadable(plan.loader, len(plan.source), reporter)
            folder.write_unreadable(plan.unreadable_by_name())
            check_unreadable(plan.loader, len(plan.source))
        folder.append_metrics(metrics)
        save_assignment(folder.assignment(epoch), plan.names(), loop.method.current)
        reporter.row(epoch_cells(metrics, settings.epochs))
        history = folder.read_metrics()
        complaint = health(history, settings.as_dict())
        if complaint and (len(history) == 1 or not health(history[:-1], settings.as_dict())):  # Once.
            reporter.warn(complaint)
        log.epoch(metrics)
    _save(plan, loop, keep_as_epoch=epoch if keep else None)


def _finish(plan: Plan, loop: Loop, session: Session) -> None:
    """Cluster once more with the finished trunk: these are the clusters for use."""
    folder = plan.folder
    fit_whitening(plan.trunk, plan.loader, plan.machine, plan.settings, plan.work)
    assignment, space = loop.final_clusters()
    if plan.work.ranks.is_main:
        save_assignment(folder.assignment(plan.settings.epochs + 1), plan.names(), assignment)
        folder.write_clusters(plan.names(), assignment)
    final = {"assignment": assignment.state_dict(), **space_state(space)}
    folder.save_checkpoint({**_checkpoint(loop), "final": final})
    clustered = assignment.labels_N.ge(0).nonzero().flatten().tolist()
    session.assignment = lambda: assignment
    session.points = lambda count: _points(plan, space, even_sample(clustered, count))


def _points(plan: Plan, space: Space, images: list[int]) -> tuple[Tensor, Tensor]:
    """Return indices_M of the readable ones of some images, and their points (M, P) in the space that was clustered."""
    sample, stage = torch.tensor(images), plan.settings.cluster_stage
    view = centre_view(plan.settings)
    indices, points = [sample[:0]], [torch.empty(0, space.n_components)]
    for rows_BD, indices_B in feature_batches(plan.trunk, plan.loader, plan.machine, stage, view, indices=sample):
        indices.append(indices_B)
        points.append(space.transform(rows_BD.to(plan.machine.clustering_device)).cpu())
    return torch.cat(indices), torch.cat(points)


def _save(plan: Plan, loop: Loop, *, keep_as_epoch: int | None = None) -> None:
    plan.folder.save_checkpoint(_checkpoint(loop), keep_as_epoch=keep_as_epoch)
    plan.work.interruption.advice = RESUME  # There is a state now.


def _checkpoint(loop: Loop) -> dict[str, Any]:
    return {"settings": loop.settings.as_dict(), **loop.state_dict()}


def _score(plan: Plan, evaluate: Evaluate) -> float | None:
    """Return the score of the features of at most 10,000 labelled images; None where no labels are known."""
    if plan.source.labels_N is None:
        return None
    known = torch.tensor(even_sample(np.flatnonzero(plan.source.labels_N >= 0).tolist(), EVALUATED_IMAGES))
    stage, view = plan.trunk.embed_stage, centre_view(plan.settings)
    features_ND = image_features(plan.trunk, plan.loader, plan.machine, stage, view, indices=known)
    known = known[torch.isfinite(features_ND[known]).all(dim=1)]
    return evaluate[plan.settings.eval_with](features_ND[known].float(), torch.from_numpy(plan.source.labels_N)[known])
