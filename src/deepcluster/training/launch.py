"""`train`: from a folder of images to a finished run; everything is checked and said before it starts, nothing is lost."""

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepcluster.clustering.features import MemoryPlan, least_bytes, plan_memory
from deepcluster.config import Settings, size_in_bytes
from deepcluster.data.cache import DecodedImages
from deepcluster.data.loader import Loader, usual_workers
from deepcluster.data.sources import ImageSource, fingerprint, open_source
from deepcluster.data.survey import check_images, check_unreadable, even_sample, survey
from deepcluster.device import Machine, free_memory_bytes
from deepcluster.errors import InputError, TrainingError
from deepcluster.inference import image_features, stage_width
from deepcluster.models.trunk import Trunk, make_trunk
from deepcluster.progress import Reporter, duration, size
from deepcluster.recipes import Change, choose_settings, fit_to_trunk
from deepcluster.training.deepcluster import DeepCluster
from deepcluster.training.metrics import epoch_line, health
from deepcluster.training.run import Interruption, RunFolder, check_same_settings, differing_settings, load_checkpoint

Data = str | Path | Sequence[str | Path]
# (features_MD, labels_M) → score
Evaluate = Callable[[Tensor, Tensor], float]

MEMORY_SHARE = 0.6
CACHE_SHARE = {"auto": 0.25, "memory": 0.5, "none": 0.0}
EVALUATED_IMAGES = 10_000


@dataclass(frozen=True)
class Plan:
    """A run that is checked and ready to begin, or to go on."""

    folder: RunFolder
    settings: Settings
    changes: list[Change]
    loader: Loader
    machine: Machine
    trunk: Trunk
    resumed: bool
    state: dict[str, Any] | None = None

    @property
    def source(self) -> ImageSource:
        """Where the images come from."""
        return self.loader.images.source


def train(
    data: Data,
    *,
    out: Path,
    explicit: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    reporter: Reporter,
    evaluate: Evaluate,
) -> Path:
    """Train on `data` and return the run folder; `deepcluster.train` says what the arguments are."""
    folder = RunFolder(out)
    folder.check_free(resume=resume, overwrite=overwrite)
    interruption = Interruption()
    with interruption.listening(), closing(reporter):
        saved = _saved_settings(folder, explicit) if resume and folder.is_run() else None
        early = saved or Settings.from_dict(explicit)
        machine = Machine.choose(early.device, early.precision)
        with closing(_open_images(data, early)) as loader:
            reporter.say(loader.images.source.describe())
            plan = _prepare(folder, loader, machine, saved, explicit, reporter, interruption)
            try:
                _run(plan, reporter, interruption, evaluate, overwrite=overwrite)
            except OSError as fault:
                raise TrainingError(
                    f"could not write into {out}: {fault}. The last good state is kept: mend this, then use --resume"
                ) from fault
    return out


def _saved_settings(folder: RunFolder, explicit: Mapping[str, Any]) -> Settings:
    """Settings of the run that is taken up, with what a resume may change."""
    saved = Settings.from_dict(folder.read_config()["settings"])
    # The precision that auto chose at the start is kept, whatever this machine would choose.
    asked = {name: value for name, value in explicit.items() if (name, value) != ("precision", "auto")}
    check_same_settings(asked, saved)
    return Settings.from_dict({**saved.as_dict(), **asked})


def _open_images(data: Data, settings: Settings) -> Loader:
    source = open_source(data, settings.limit)
    images = DecodedImages(source, int(CACHE_SHARE[settings.cache] * free_memory_bytes()))
    return Loader(images, workers=usual_workers() if settings.workers is None else settings.workers)


def _prepare(
    folder: RunFolder,
    loader: Loader,
    machine: Machine,
    saved: Settings | None,
    explicit: Mapping[str, Any],
    reporter: Reporter,
    interruption: Interruption,
) -> Plan:
    """Look at the images, settle the settings, make the trunk; nothing is written yet."""
    if saved is not None:
        _check_same_data(folder, loader)
        state = _saved_state(folder, saved) if folder.last.is_file() else None
        return Plan(folder, saved, [], loader, machine, trunk_of(saved), resumed=True, state=state)
    with reporter.track("reading images", len(loader.images)) as progress:

        def on_images(done: int) -> None:
            progress(done)
            interruption.check()

        looked_at = check_images(loader, on_images)
    _say_unreadable(loader, looked_at, reporter)
    seen = survey(loader)
    settings, changes = choose_settings(explicit, seen)
    trunk = trunk_of(settings)
    width = stage_width(trunk, machine, settings.cluster_stage, settings.image_size)
    settings, more = fit_to_trunk(settings, explicit, width=width, n_images=seen.n_images)
    settings = replace(settings, precision=machine.precision)
    return Plan(folder, settings, [*changes, *more], loader, machine, trunk, resumed=False)


def trunk_of(settings: Settings) -> Trunk:
    """The trunk of a run, with the random weights that it starts from."""
    return make_trunk(
        settings.arch,
        image_size=settings.image_size,
        sobel=settings.sobel,
        dropout=settings.dropout,
        seed=settings.seed,
    )


def _check_same_data(folder: RunFolder, loader: Loader) -> None:
    """Refuse to go on with other images; take the list of unreadable ones from the run."""
    before, source = folder.read_config()["data"], loader.images.source
    if before["fingerprint"] != fingerprint(source):
        raise InputError(
            f"the images are not those of this run: it has {before['images']:,}, here are {len(source):,}, "
            "or their names have changed. Restore them, or start another run with --out"
        )
    if folder.unreadable.is_file():
        index = {source.name(i): i for i in range(len(source))}
        with folder.unreadable.open(newline="", encoding="utf-8") as file:
            loader.unreadable.update({index[row["name"]]: row["reason"] for row in csv.DictReader(file)})


def _saved_state(folder: RunFolder, settings: Settings) -> dict[str, Any]:
    """The run's last checkpoint, which must be of this run and not beyond its epochs."""
    state = load_checkpoint(folder.last)
    others = differing_settings(state["settings"], settings)
    if others:
        raise InputError(f"{folder.last} is the checkpoint of another run: {'; '.join(others)}")
    epoch, begun = state["epoch"], state["labelled"]
    if epoch + begun > settings.epochs + 1:
        raise InputError(
            f"--epochs {settings.epochs} is fewer than this run has begun; use --epochs {epoch - 1 + begun} or more"
        )
    return state


def _run(plan: Plan, reporter: Reporter, interruption: Interruption, evaluate: Evaluate, *, overwrite: bool) -> None:
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
    first = method.epoch
    while method.epoch <= settings.epochs:
        _epoch(plan, method, evaluate, reporter)
        if method.epoch == first + 1:
            _say_time_left(folder, settings, reporter)
    _finish(plan, method, reporter)


def _take_up(method: DeepCluster, state: dict[str, Any], folder: RunFolder) -> None:
    try:
        method.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as fault:
        reason = str(fault).splitlines()[-1].strip()
        raise InputError(f"{folder.last} does not hold the state of this run: {reason}") from None


def _epoch(plan: Plan, method: DeepCluster, evaluate: Evaluate, reporter: Reporter) -> None:
    folder, settings, epoch = plan.folder, plan.settings, method.epoch
    n_unreadable = len(plan.loader.unreadable)
    metrics = method.run_epoch()
    method.check_finite()
    if settings.eval_every and (epoch % settings.eval_every == 0 or epoch == settings.epochs):
        metrics["knn"] = _score(plan, evaluate)
    if len(plan.loader.unreadable) > n_unreadable:
        _say_unreadable(plan.loader, len(plan.source), reporter)
        folder.write_unreadable(_reasons(plan.loader))
        check_unreadable(plan.loader, len(plan.source))
    folder.append_metrics(metrics)
    method.current.save(folder.assignment(epoch), [plan.source.name(i) for i in range(len(plan.source))])
    reporter.say(epoch_line(metrics, settings.epochs))
    complaint = health(folder.read_metrics())
    if complaint:
        reporter.warn(complaint)
    keep = settings.checkpoint_every and epoch % settings.checkpoint_every == 0
    folder.save_checkpoint(_checkpoint(method), keep_as_epoch=epoch if keep or epoch == 1 else None)


def _finish(plan: Plan, method: DeepCluster, reporter: Reporter) -> None:
    """Group the images once more with the finished trunk: these are the clusters that people use."""
    folder, epochs = plan.folder, plan.settings.epochs
    assignment, whitening = method.cluster_finished_trunk()
    table = folder.assignment(epochs + 1)
    assignment.save(table, [plan.source.name(i) for i in range(len(plan.source))])
    final = {"assignment": assignment.state_dict(), "whitening": whitening.state_dict()}
    folder.save_checkpoint({**_checkpoint(method), "final": final})
    reporter.say(f"done: {folder.path}. Clusters of the finished trunk: {table}")


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
    }


def _say_unreadable(loader: Loader, looked_at: int, reporter: Reporter) -> None:
    if loader.unreadable:
        index, reason = min(loader.unreadable.items())
        reporter.say(
            f"{len(loader.unreadable):,} of {looked_at:,} images can't be read and are left out "
            f"(unreadable.csv), e.g. {loader.images.source.name(index)}: {reason}"
        )


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
    settings, n_images = plan.settings, len(plan.source)
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
        f"memory: {memory.describe()}, weights, gradients and momentum {size(3 * weights)}, "
        f"images kept decoded {size(plan.loader.images.kept_bytes)} ({plan.loader.images.n_kept:,} of {n_images:,})"
    )


def _say_time_left(folder: RunFolder, settings: Settings, reporter: Reporter) -> None:
    last = folder.read_metrics()[-1]
    left = settings.epochs - last["epoch"]
    if left:
        seconds = sum(last["seconds"].values())
        reporter.say(f"an epoch takes {duration(seconds)}: about {duration(seconds * left)} for the {left} that are left")
