"""`train`: from a folder of images to a finished run; everything is checked and said before it starts, nothing is lost."""

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepcluster.clustering.assignment import Assignment
from deepcluster.clustering.features import MemoryPlan, least_bytes, plan_memory
from deepcluster.clustering.whitening import Whitening
from deepcluster.config import Settings, size_in_bytes
from deepcluster.data.loader import Loader
from deepcluster.data.sources import fingerprint
from deepcluster.data.storage.addresses import whole_address
from deepcluster.data.storage.retries import ConnectionLost, end_waits
from deepcluster.data.survey import check_unreadable, even_sample
from deepcluster.device import free_memory_bytes
from deepcluster.errors import InputError, TrainingError
from deepcluster.inference import image_features, look, stage_width
from deepcluster.interruption import Interruption
from deepcluster.progress import Reporter, duration, size
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.follower import Follow, Follower, Nobody
from deepcluster.training.metrics import epoch_line, health
from deepcluster.training.plan import Data, Plan, Planner, say_unreadable
from deepcluster.training.run import RunFolder

# (features_MD, labels_M) → score
Evaluate = Callable[[Tensor, Tensor], float]
Evaluators = Mapping[str, Evaluate]

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
    folder = RunFolder(out)
    folder.check_free(resume=resume, overwrite=overwrite)
    # A server may be waited for: the thread that asks for batches would wait as long.
    interruption = Interruption(on_request=end_waits)
    planner = Planner(folder, reporter, interruption)
    with interruption.listening(), closing(reporter), planner.plan(data, explicit, resume=resume) as plan:
        try:
            with closing(follow(reporter) if follow and plan.settings.tensorboard else Nobody()) as follower:
                _run(plan, reporter, interruption, evaluate, follower, overwrite=overwrite)
        except OSError as fault:
            raise TrainingError(
                f"could not write into {out}: {fault}. The last good state is kept: mend this, then use --resume"
            ) from fault
    return out


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
    memory = _memory_plan(plan)
    method = DeepCluster(
        plan.trunk,
        plan.loader,
        settings,
        plan.machine,
        reporter=reporter,
        interruption=interruption,
        save=lambda: folder.save_checkpoint(_checkpoint(method)),
        known_labels_N=plan.source.labels_N,
        memory=memory,
    )
    if plan.state is not None:
        _take_up(method, plan.state, folder)
        if "final" in plan.state and method.epoch > settings.epochs:
            reporter.say(f"{folder.path} is finished; a larger --epochs would go on from here")
            return
    folder.create(overwrite=overwrite)
    folder.write_config(settings, _changes(plan), _data_facts(plan))
    folder.write_unreadable(_reasons(plan.loader))
    reporter.log_to(folder.log)
    _say_plan(plan, memory, reporter)
    if plan.state is not None:
        reporter.say(f"going on with epoch {method.epoch}, batch {method.batch}")
    folder.drop_metrics_from(method.epoch)
    follower.begin(folder.path, method.epoch, folder.read_metrics())
    first = method.epoch
    while method.epoch <= settings.epochs:
        _epoch(plan, method, interruption, evaluate, follower, reporter)
        if method.epoch == first + 1:
            _say_time_left(folder, settings, reporter)
    _finish(plan, method, follower, reporter)


def _take_up(method: DeepCluster, state: dict[str, Any], folder: RunFolder) -> None:
    try:
        method.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as fault:
        reason = str(fault).splitlines()[-1].strip()
        raise InputError(f"{folder.last} does not hold the state of this run: {reason}") from None


def _epoch(
    plan: Plan,
    method: DeepCluster,
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
        if method.labelled:
            method.save_now()
        interruption.check()
        raise
    method.check_finite()
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
    complaint = health(folder.read_metrics())
    if complaint:
        reporter.warn(complaint)
    follower.after_epoch(metrics, method.current, plan.loader.images)
    keep = settings.checkpoint_every and epoch % settings.checkpoint_every == 0
    folder.save_checkpoint(_checkpoint(method), keep_as_epoch=epoch if keep or epoch == 1 else None)


def _finish(plan: Plan, method: DeepCluster, follower: Follower, reporter: Reporter) -> None:
    """Group the images once more with the finished trunk: these are the clusters that people use."""
    folder, epochs = plan.folder, plan.settings.epochs
    assignment, whitening = method.cluster_finished_trunk()
    table = folder.assignment(epochs + 1)
    assignment.save(table, [plan.source.name(i) for i in range(len(plan.source))])
    final = {"assignment": assignment.state_dict(), "whitening": whitening.state_dict()}
    folder.save_checkpoint({**_checkpoint(method), "final": final})
    follower.finish(
        epochs + 1, assignment, plan.loader.images, lambda count: _points_of_sample(plan, assignment, whitening, count)
    )
    reporter.say(f"done: {folder.path}. Clusters of the finished trunk: {table}")


def _points_of_sample(plan: Plan, assignment: Assignment, whitening: Whitening, count: int) -> tuple[Tensor, Tensor]:
    """Indices (M,) of at most `count` clustered images, and their points (M, P) in the space that was clustered."""
    sample = torch.tensor(even_sample(assignment.labels_N.ge(0).nonzero().flatten().tolist(), count))
    stage, image_size = plan.settings.cluster_stage, plan.settings.image_size
    batches = [
        (indices_B, whitening.transform(rows_BD.to(plan.machine.clustering_device)).cpu())
        for rows_BD, indices_B in look(
            plan.trunk, plan.loader, plan.machine, stage=stage, image_size=image_size, indices=sample
        )
    ]
    indices, points = zip(*batches, strict=True) if batches else ((), ())
    return torch.cat([*indices, sample[:0]]), torch.cat([*points, torch.empty(0, whitening.n_components)])


def _checkpoint(method: DeepCluster) -> dict[str, Any]:
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
    budget = size_in_bytes("memory", settings.memory)
    if budget is None:
        share = int(MEMORY_SHARE * (free_memory_bytes() - images.free_bytes))
        budget = max(share, least_bytes(len(images), width, settings.pca))
    return plan_memory(
        len(images),
        width,
        settings.pca,
        budget_bytes=budget,
        computed=plan.machine.feature_dtype,
        folder=plan.folder.path,
    )


def _say_plan(plan: Plan, memory: MemoryPlan, reporter: Reporter) -> None:
    """The opening lines: what will be done, with what, and how much memory it takes."""
    settings = plan.settings
    reporter.say(
        f"{settings.arch}{' with Sobel' if settings.sobel else ''} at {settings.image_size} px, "
        f"{settings.describe_clusters()}, {settings.epochs} epochs; {plan.machine.describe()}; into {plan.folder.path}"
    )
    if plan.changes:
        reporter.say(f"recipe {settings.recipe}: fitted to these images (the paper's settings are for 1.28 million photos)")
        for change in plan.changes:
            reporter.say(f"  {change}")
    weights = sum(weight.nbytes for weight in plan.trunk.parameters()) + 4 * plan.trunk.dim * settings.clusters
    reporter.say(
        f"memory: {memory.describe()}, weights, gradients and momentum {size(3 * weights)}; "
        f"decoded images: {plan.cache.describe()}"
    )


def _say_time_left(folder: RunFolder, settings: Settings, reporter: Reporter) -> None:
    last = folder.read_metrics()[-1]
    left = settings.epochs - last["epoch"]
    if left:
        seconds = sum(last["seconds"].values())
        reporter.say(f"an epoch takes {duration(seconds)}: about {duration(seconds * left)} for the {left} that are left")
