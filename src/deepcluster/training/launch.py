"""`train`: from a folder of images to a finished run; everything is checked and said before it starts, nothing is lost."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.features import MemoryPlan, least_bytes, plan_memory
from deepcluster.config_checks import size_in_bytes
from deepcluster.data.loader import Loader
from deepcluster.data.sources import fingerprint
from deepcluster.data.storage.addresses import whole_address
from deepcluster.data.storage.retries import ConnectionLost, end_waits
from deepcluster.data.survey import check_unreadable, even_sample
from deepcluster.device import free_memory_bytes
from deepcluster.distributed import barrier, is_restart, joined, my_part, on_main, world_size
from deepcluster.errors import InputError, LostProcess, TrainingError
from deepcluster.inference import image_features, look, stage_width
from deepcluster.interruption import Interruption
from deepcluster.options import plain
from deepcluster.progress import Reporter
from deepcluster.training.batches import even_batches
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.deepcluster_v2 import DeepClusterV2
from deepcluster.training.follower import Follow, Follower, Nobody
from deepcluster.training.forecast import say_plan, say_time_left
from deepcluster.training.loop import Loop
from deepcluster.training.metrics import epoch_line, health
from deepcluster.training.plan import Data, Plan, Planner, say_unreadable
from deepcluster.training.run import RunFolder
from deepcluster.training.space import Space, space_state

# (features_MD, labels_M) → score
Evaluate = Callable[[Tensor, Tensor], float]
Evaluators = Mapping[str, Evaluate]
AnyLoop = Loop[Any, Any]

MEMORY_SHARE = 0.6
EVALUATED_IMAGES = 10_000


def train(
    data: Data,
    *,
    out: Path,
    explicit: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    reporter: Reporter,
    evaluate: Evaluators,
    follow: Follow | None = None,
) -> Path:
    """Train on `data` and return the run folder; `deepcluster.train` says what the arguments are."""
    explicit = {name: plain(value) for name, value in explicit.items()}
    # A server may be waited for: the thread that asks for batches would wait as long.
    interruption = Interruption(on_request=end_waits)
    if is_restart():
        resume, overwrite = True, False
    folder = RunFolder(out)
    with interruption.listening(), _together(interruption), closing(folder.lock), closing(_own(reporter)) as reporter:
        # First of all: to a folder in use, --resume and --overwrite are no way out.
        folder.lock.acquire(reporter.warn, new=False)
        folder.check_free(resume=resume, overwrite=overwrite)
        with Planner(folder, reporter, interruption).plan(data, explicit, resume=resume) as plan:
            try:
                with closing(_follower(plan, follow, reporter)) as follower:
                    _run(plan, reporter, interruption, evaluate, follower, overwrite=overwrite)
            except OSError as fault:
                raise TrainingError(
                    f"could not write into {out}: {fault}. The last good state is kept: mend this, then use --resume"
                ) from fault
    return out


@contextmanager
def _together(interruption: Interruption) -> Iterator[None]:
    """The processes of the run; one that is left alone since all were told to stop says that."""
    try:
        with joined():
            yield
    except LostProcess:
        interruption.check()
        raise


def _own(reporter: Reporter) -> Reporter:
    return reporter if on_main() else Reporter(silent=True)


def _follower(plan: Plan, follow: Follow | None, reporter: Reporter) -> Follower:
    return follow(reporter) if follow and plan.settings.tensorboard and on_main() else Nobody()


def _run(
    plan: Plan,
    reporter: Reporter,
    interruption: Interruption,
    evaluate: Evaluators,
    follower: Follower,
    *,
    overwrite: bool,
) -> None:
    """Write the folder, then epoch after epoch, then the groups of the finished trunk."""
    folder, settings = plan.folder, plan.settings
    method, memory = _method(plan, reporter, interruption)
    if plan.state is not None:
        _take_up(method, plan.state, folder)
        if "final" in plan.state and method.epoch > settings.epochs:
            reporter.say(f"{folder.path} is finished; a larger --epochs would go on from here")
            return
    even_batches(len(plan.loader.images) - len(plan.loader.unreadable), settings.batch_size)
    folder.lock.acquire(reporter.warn)
    if not plan.resumed:  # Another start may have made the folder since this one looked.
        folder.check_free(resume=False, overwrite=overwrite)
    barrier()  # All have read what was there.
    if on_main():
        folder.create(overwrite=overwrite)
        folder.write_config(settings, _changes(plan), _data_facts(plan))
        folder.write_unreadable(_reasons(plan.loader))
        reporter.log_to(folder.log)
        say_plan(plan, memory, reporter)
        if plan.state is not None:
            reporter.say(f"going on with epoch {method.epoch}, batch {method.batch}")
        folder.drop_metrics_from(method.epoch)
        follower.begin(folder.path, method.epoch, folder.read_metrics())
    barrier()
    first = method.epoch
    while method.epoch <= settings.epochs:
        _epoch(plan, method, interruption, evaluate, follower, reporter)
        if method.epoch == first + 1 and on_main():
            say_time_left(folder, settings, reporter)
    _finish(plan, method, follower, reporter)


def _method(plan: Plan, reporter: Reporter, interruption: Interruption) -> tuple[AnyLoop, str]:
    """What the settings name, and in words where its features are kept."""
    parts = (plan.trunk, plan.loader, plan.settings, plan.machine)

    def save() -> None:
        plan.folder.save_checkpoint(_checkpoint(method))

    method: AnyLoop
    told: dict[str, Any] = {"reporter": reporter, "interruption": interruption, "save": save}
    told["known_labels_N"] = plan.source.labels_N
    if plan.settings.method == "deepcluster-v2":
        method = DeepClusterV2(*parts, **told)
        return method, method.describe_memory()
    memory = _memory_plan(plan)
    method = DeepCluster(*parts, **told, memory=memory)
    return method, memory.describe()


def _take_up(method: AnyLoop, state: dict[str, Any], folder: RunFolder) -> None:
    try:
        method.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as fault:
        reason = str(fault).splitlines()[-1].strip()
        raise InputError(f"{folder.last} does not hold the state of this run: {reason}") from None


def _epoch(
    plan: Plan,
    method: AnyLoop,
    interruption: Interruption,
    evaluate: Evaluators,
    follower: Follower,
    reporter: Reporter,
) -> None:
    folder, settings, epoch = plan.folder, plan.settings, method.epoch
    plan.check_unchanged()
    n_unreadable = len(plan.loader.unreadable)
    try:
        metrics = method.run_epoch()
    except ConnectionLost:
        # Other processes are in the middle of a step, and can't save with this one.
        if method.labelled and world_size() == 1:
            method.save_now()
        interruption.check()
        raise
    method.check_finite()
    if on_main():
        _tell_of_epoch(plan, method, metrics, n_unreadable, evaluate, follower, reporter)
    keep = settings.checkpoint_every and epoch % settings.checkpoint_every == 0
    folder.save_checkpoint(_checkpoint(method), keep_as_epoch=epoch if keep or epoch == 1 else None)


def _tell_of_epoch(
    plan: Plan,
    method: AnyLoop,
    metrics: dict[str, Any],
    n_unreadable: int,
    evaluate: Evaluators,
    follower: Follower,
    reporter: Reporter,
) -> None:
    """Write what an epoch gave, and say it."""
    folder, settings, epoch = plan.folder, plan.settings, metrics["epoch"]
    if settings.eval_every and (epoch % settings.eval_every == 0 or epoch == settings.epochs):
        metrics[settings.eval_with] = _score(plan, evaluate[settings.eval_with])
    for trouble in plan.loader.images.troubles():
        reporter.warn(trouble)
    if len(plan.loader.unreadable) > n_unreadable:
        say_unreadable(plan.loader, len(plan.source), reporter)
        folder.write_unreadable(_reasons(plan.loader))
        check_unreadable(plan.loader, len(plan.source))
    folder.append_metrics(metrics)
    method.current.save(folder.assignment(epoch), [plan.source.name(i) for i in range(len(plan.source))])
    reporter.say(epoch_line(metrics, settings.epochs))
    complaint = health(folder.read_metrics(), settings.heads if len(settings.heads) > 1 else None)
    if complaint:
        reporter.warn(complaint)
    follower.after_epoch(metrics, method.current, plan.loader.images)


def _finish(plan: Plan, method: AnyLoop, follower: Follower, reporter: Reporter) -> None:
    """Group the images once more with the finished trunk: these are the clusters that people use."""
    folder, epochs = plan.folder, plan.settings.epochs
    assignment, space = method.cluster_finished_trunk()
    table = folder.assignment(epochs + 1)
    if on_main():
        assignment.save(table, [plan.source.name(i) for i in range(len(plan.source))])
    final = {"assignment": assignment.state_dict(), **space_state(space)}
    folder.save_checkpoint({**_checkpoint(method), "final": final})
    if on_main():
        follower.finish(
            epochs + 1, assignment, plan.loader.images, lambda count: _points_of_sample(plan, assignment, space, count)
        )
    reporter.say(f"done: {folder.path}. Clusters of the finished trunk: {table}")


def _points_of_sample(plan: Plan, assignment: Assignment, space: Space, count: int) -> tuple[Tensor, Tensor]:
    """Indices (M,) of at most `count` clustered images, and their points (M, P) in the space that was clustered."""
    sample = torch.tensor(even_sample(assignment.labels_N.ge(0).nonzero().flatten().tolist(), count))
    stage, image_size = plan.settings.cluster_stage, plan.settings.image_size
    batches = [
        (indices_B, space.transform(rows_BD.to(plan.machine.clustering_device)).cpu())
        for rows_BD, indices_B in look(
            plan.trunk, plan.loader, plan.machine, stage=stage, image_size=image_size, indices=sample
        )
    ]
    indices, points = zip(*batches, strict=True) if batches else ((), ())
    return torch.cat([*indices, sample[:0]]), torch.cat([*points, torch.empty(0, space.n_components)])


def _checkpoint(method: AnyLoop) -> dict[str, Any]:
    return {"settings": method.settings.as_dict(), **method.state_dict()}


def _score(plan: Plan, evaluate: Evaluate) -> float | None:
    """What `evaluate` says of the features of at most 10,000 labelled images; None where no labels are known."""
    if plan.source.labels_N is None:
        return None
    known = torch.tensor(even_sample(np.flatnonzero(plan.source.labels_N >= 0).tolist(), EVALUATED_IMAGES))
    features_ND = image_features(
        plan.trunk,
        plan.loader,
        plan.machine,
        stage=plan.trunk.embed_stage,
        image_size=plan.settings.image_size,
        indices=known,
    )
    known = known[torch.isfinite(features_ND[known]).all(dim=1)]
    return evaluate(features_ND[known], torch.from_numpy(plan.source.labels_N)[known])


def _reasons(loader: Loader) -> dict[str, str]:
    return {loader.images.source.name(index): reason for index, reason in loader.unreadable.items()}


def _changes(plan: Plan) -> dict[str, Any]:
    if plan.resumed:
        return dict(plan.folder.read_config().get("changed_by_recipe", {}))
    return {change.option: {"value": change.value, "reason": change.reason} for change in plan.changes}


def _data_facts(plan: Plan) -> dict[str, Any]:
    source = plan.source
    return {
        "description": source.describe(),
        "images": len(source),
        "classes": source.class_names,
        "fingerprint": fingerprint(source),
        "address": [whole_address(one) for one in ([plan.data] if isinstance(plan.data, str | Path) else plan.data)],
    }


def _memory_plan(plan: Plan) -> MemoryPlan:
    """Where features are kept, within --memory or, of the memory that is free and not set aside for images, a share."""
    settings, images = plan.settings, plan.loader.images
    width = stage_width(plan.trunk, plan.machine, settings.cluster_stage, settings.image_size)
    mine = my_part(len(images))
    n_mine = mine.stop - mine.start
    budget = size_in_bytes("memory", settings.memory)
    if budget is None:
        share = int(MEMORY_SHARE * (free_memory_bytes() - images.free_bytes))
        budget = max(share, least_bytes(n_mine, width, settings.pca))
    return plan_memory(
        n_mine,
        width,
        settings.pca,
        budget_bytes=budget,
        computed=plan.machine.feature_dtype,
        folder=plan.folder.path,
    )
