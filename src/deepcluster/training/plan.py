"""Before a run begins: the images are surveyed, the settings chosen, the trunk made, and all of it checked."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepcluster.core.device import Machine, free_memory_bytes
from deepcluster.core.errors import InputError
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of, duration, size
from deepcluster.core.work import Work
from deepcluster.data.cache import CachePlan, decoded_images, plan_cache
from deepcluster.data.loader import Loader, usual_workers
from deepcluster.data.sources import ImageSource, fingerprint, open_source
from deepcluster.data.sources.given import Data as Given
from deepcluster.data.sources.given import addresses_of
from deepcluster.data.survey import SAMPLE, check_images, survey
from deepcluster.models.trunk import Trunk, has_batch_norm
from deepcluster.run.auto import choose_settings, fit_to_trunk, hints, settings_before_data
from deepcluster.run.features import make_run_trunk, stage_width
from deepcluster.run.folder import RunFolder
from deepcluster.run.metrics import legend
from deepcluster.run.recipes import Change, by_reason
from deepcluster.run.settings import Settings, size_in_bytes
from deepcluster.training.feature_rows import MemoryPlan, least_bytes, plan_memory
from deepcluster.training.fitting import begin_trunk
from deepcluster.training.initial import InitialWeights, initial_weights
from deepcluster.training.resuming import check_same_data, saved_settings, saved_state

Data = Given | Sequence[str | Path]

# Share of the free memory that features may take by default.
MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Plan:
    """A run that is checked and ready to begin, or to resume.

    Attributes:
        changes: what the recipe changed.
        advice: hints on the settings, for the opening lines.
        state: the checkpoint to resume from; None at the start.
        initial: the weights that it starts from, where they are not random.
    """

    folder: RunFolder
    data: Data
    settings: Settings
    changes: list[Change]
    loader: Loader
    cache: CachePlan
    machine: Machine
    trunk: Trunk
    work: Work
    resumed: bool
    advice: Sequence[str] = ()
    state: dict[str, Any] | None = None
    initial: InitialWeights | None = None

    @property
    def source(self) -> ImageSource:
        """Where the images come from."""
        return self.loader.images.source

    def names(self) -> list[str]:
        """Return the name of each image."""
        return [self.source.name(index) for index in range(len(self.source))]

    def unreadable_by_name(self) -> dict[str, str]:
        """Return why images can't be read, by name."""
        return {self.source.name(index): reason for index, reason in self.loader.unreadable.items()}

    def write_config(self) -> None:
        """Write config.json: settings, what the recipe changed, and the images."""
        changed = {change.option: {"value": change.value, "reason": change.reason} for change in self.changes}
        if self.resumed:
            changed = self.folder.read_config().get("changed_by_recipe", {})
        facts = {
            "description": self.source.describe(),
            "images": len(self.source),
            "classes": self.source.class_names,
            "fingerprint": fingerprint(self.source),
            "address": addresses_of(self.data),
        }
        self.folder.write_config(self.settings, changed, facts, weights=self.initial.about if self.initial else "")

    def check_unchanged(self) -> None:
        """Raise `InputError` if images have appeared or disappeared since the run began."""
        change = self.source.changed()
        if change is not None:
            raise InputError(
                f"the images have changed during the run: {change}. Restore them and use --resume, or start another run "
                "with --out"
            )

    def memory(self) -> MemoryPlan:
        """Return where features are kept: within --memory, or within a share of the memory not reserved for images."""
        settings = self.settings
        width = stage_width(self.trunk, self.machine, settings.cluster_stage, settings.image_size)
        mine = self.work.ranks.part(len(self.source))
        n_mine = mine.stop - mine.start
        budget = size_in_bytes("memory", settings.memory)
        if budget is None:
            share = int(MEMORY_SHARE * free_memory_bytes())
            budget = max(share, least_bytes(n_mine, width, settings.pca))
        computed = self.machine.feature_dtype
        return plan_memory(n_mine, width, settings.pca, budget_bytes=budget, computed=computed, folder=self.folder.path)


@contextmanager
def plan_run(
    folder: RunFolder, data: Data, user_options: Mapping[str, Any], work: Work, *, resume: bool, dry_run: bool = False
) -> Iterator[Plan]:
    """Yield the plan of a run on `data`, or of resuming the one in the folder. Nothing is written.

    Args:
        user_options: the settings that the user chose.
        dry_run: read only a sample of the images, and keep those in memory.

    Raises:
        InputError: data or settings can't be used, or are not those of the run.
    """
    saved = saved_settings(folder, user_options) if resume and folder.is_run() else None
    early = saved or settings_before_data(user_options)
    machine = Machine.choose(early.device, early.precision)
    initial = initial_weights(saved.as_dict() if saved else user_options)
    fixed = initial.fetched(work.ranks) if initial and not saved else []
    source = _open_source(data, early, work)
    if saved is not None:
        check_same_data(folder, source)
    workers = usual_workers() if early.workers is None else early.workers
    with work.track("reading a sample", min(SAMPLE, len(source))) as advance:
        sample = survey(source, workers=workers, on_images=advance)
    settings = saved or choose_settings(user_options, sample, weights=fixed)[0]
    needed, reduce_to = sample.decoded_bytes(settings.reduce_to), settings.reduce_to
    cache = plan_cache(settings.cache, settings.cache_folder(), needed, source, reduce_to=reduce_to, data=data)
    warn = work.reporter.warn
    place = replace(cache, file=None, memory_bytes=cache.memory_bytes or needed) if dry_run and cache.is_kept else cache
    images = decoded_images(source, place, reduce_to=reduce_to, ranks=work.ranks, tell=warn)
    if images.pack is None:  # None is wanted, or its place can't be written to.
        cache = CachePlan(cache.needed_bytes)
    with closing(Loader(images, workers=workers, device=machine.device, tell=warn)) as loader:
        changes: list[Change] = []
        advice, state = list[str](), None
        with work.track("reading images", len(images)) as advance:
            sample = check_images(loader, sample, advance, work.ranks, everything=not dry_run)
        work.ranks.barrier()
        if saved is None:
            say_unreadable(loader, sample.looked_at, work.reporter)
            settings, changes = choose_settings(user_options, sample, weights=fixed)
            advice = hints(user_options, settings, sample)
            trunk = make_run_trunk(settings)
            width = stage_width(trunk, machine, settings.cluster_stage, settings.image_size)
            settings, more = fit_to_trunk(
                settings, user_options, width=width, n_images=sample.n_images, batch_norm=has_batch_norm(trunk)
            )
            kept = [change for change in changes if change.option not in {other.option for other in more}]
            settings, changes = replace(settings, precision=machine.precision), [*kept, *more]
        else:
            if unreadable := folder.read_unreadable():  # It stays out, even if it can be read now.
                index = {source.name(i): i for i in range(len(source))}
                loader.unreadable.update({index[name]: reason for name, reason in unreadable.items()})
            folder.check_state()
            state = saved_state(folder, saved, len(source)) if folder.last.is_file() else None
            trunk = make_run_trunk(saved)
        if state is None:
            if initial is None:
                begin_trunk(trunk, loader, machine, settings, work)
            else:  # Start from these weights instead of random ones.
                work.reporter.say(initial.into(trunk))
        resumed = saved is not None
        where = (loader, cache, machine, trunk, work)
        yield Plan(folder, data, settings, changes, *where, resumed=resumed, advice=advice, state=state, initial=initial)


def _open_source(data: Data, settings: Settings, work: Work) -> ImageSource:
    found = 0
    with work.track("finding images", None) as advance:

        def on_found(so_far: int) -> None:
            nonlocal found
            advance(so_far - found)
            found = so_far

        source = open_source(
            data,
            settings.limit,
            cache=settings.cache_folder(),
            cache_bytes=size_in_bytes("cache_size", settings.cache_size),
            on_found=on_found,
            on_trouble=work.reporter.warn,
        )
    work.reporter.say(source.describe())
    return source


def say_unreadable(loader: Loader, n_read: int, reporter: Reporter) -> None:
    """Print how many images can't be read, and why one of them can't."""
    if loader.unreadable:
        index, reason = min(loader.unreadable.items())
        n_images = len(loader.images)
        of, where = f"{n_read:,} images", "left out, see unreadable.csv"
        if n_read < n_images:
            of, where = f"a sample of {n_read:,} of the {n_images:,} images", "training leaves such images out"
        reporter.say(
            f"{len(loader.unreadable):,} of {of} can't be read ({where}), e.g. {loader.images.source.name(index)}: {reason}"
        )


def say_plan(plan: Plan, memory: str, *, dry_run: bool = False) -> None:
    """Print the opening lines: what will be done, with what, and how much memory it takes."""
    settings, say, n_ranks = plan.settings, plan.work.reporter.say, plan.work.ranks.size
    processes = f"{n_ranks} processes, each on " if n_ranks > 1 else ""
    say(
        f"{settings.arch}{' with Sobel' if settings.sobel else ''} at {settings.image_size} px, "
        f"{settings.describe_clusters()}, {count_of(settings.epochs, 'epoch')}; {processes}{plan.machine.describe()}; "
        f"into {plan.folder.path}"
    )
    if plan.changes:
        device = " and this GPU" if plan.machine.device.type == "cuda" else ""
        say(f"recipe {settings.recipe}: fitted to these images{device} (the paper's settings are for 1.28 million photos)")
        for line in by_reason(plan.changes):
            say(f"  {line}")
    for hint in plan.advice:
        say(hint)
    weights = sum(weight.nbytes for weight in plan.trunk.parameters()) + 4 * plan.trunk.dim * settings.n_clusters
    say(f"memory: {memory}, weights, gradients and momentum {size(3 * weights)}; decoded images: {plan.cache.describe()}")
    if not dry_run:
        say(legend(settings, has_labels=plan.source.labels_N is not None))


def say_finished(plan: Plan) -> None:
    """Print that there is nothing left to do, and how to train further."""
    path, settings = plan.folder.path, plan.settings
    again = "" if settings.lr_schedule == "constant" else ", with a second cosine from a third of --lr"
    plan.work.reporter.say(f"{path} is finished; --resume with more --epochs than {settings.epochs} continues it{again}")


def say_done(plan: Plan) -> None:
    """Print what the finished run has, and the commands that use it."""
    run, say = plan.folder.path, plan.work.reporter.say
    say(f"done: {run}. The cluster of each image: {plan.folder.clusters}")
    if isinstance(plan.data, ImageSource):  # No command can name them.
        return
    data = [plan.data] if isinstance(plan.data, str | Path) else plan.data
    assign = shlex.join(["deepcluster", "assign", str(run), *map(str, data), "--folders", "by-cluster"])
    say(f"see them: {shlex.join(['deepcluster', 'report', str(run)])}; as folders of links: {assign}")


def say_time_left(folder: RunFolder, settings: Settings, reporter: Reporter) -> None:
    """Print how long the remaining epochs will take if they are like the last one."""
    last = folder.read_metrics()[-1]
    left = settings.epochs - last["epoch"]
    if left:
        seconds = sum(last["seconds"].values())
        reporter.say(
            f"an epoch takes {duration(seconds)}: about {duration(seconds * left)} for {count_of(left, 'more epoch')}"
        )
