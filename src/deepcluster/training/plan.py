"""Before a run begins: the images are looked at, the settings settled, the trunk made, and all of it checked."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from deepcluster.core.device import Machine
from deepcluster.core.distributed import barrier, my_part
from deepcluster.core.errors import InputError
from deepcluster.core.interruption import Interruption
from deepcluster.core.progress import Reporter
from deepcluster.data.cache_plan import CachePlan, decoded_images, name_of, plan_cache
from deepcluster.data.loader import Loader, usual_workers
from deepcluster.data.sources import ImageSource, fingerprint, open_source
from deepcluster.data.sources.folders import difference
from deepcluster.data.survey import SAMPLE, Survey, check_images, survey
from deepcluster.models.trunk import Trunk
from deepcluster.run.features import make_run_trunk, stage_width
from deepcluster.run.folder import RunFolder, check_same_settings, differing_settings, load_checkpoint
from deepcluster.run.recipes import Change, choose_settings, fit_to_trunk, settings_before_data
from deepcluster.run.settings import Settings
from deepcluster.run.settings_checks import size_in_bytes

Data = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Plan:
    """A run that is checked and ready to begin, or to go on."""

    folder: RunFolder
    data: Data
    settings: Settings
    changes: list[Change]
    loader: Loader
    cache: CachePlan
    machine: Machine
    trunk: Trunk
    resumed: bool
    state: dict[str, Any] | None = None

    @property
    def source(self) -> ImageSource:
        """Where the images come from."""
        return self.loader.images.source

    def check_unchanged(self) -> None:
        """Raise `InputError` where images have come or gone since the run was begun."""
        change = self.source.changed()
        if change is not None:
            raise InputError(
                f"the images have changed while the run was under way: {change}. Restore them and use --resume, or start "
                "another run with --out"
            )


class Planner:
    """Makes the plan of a run; nothing is written into its folder yet."""

    def __init__(self, folder: RunFolder, reporter: Reporter, interruption: Interruption) -> None:
        self.folder, self.reporter, self.interruption = folder, reporter, interruption

    @contextmanager
    def plan(self, data: Data, explicit: Mapping[str, Any], *, resume: bool) -> Iterator[Plan]:
        """The plan of a run on `data` with what the person set, or of going on with the one in the folder.

        Raises:
            InputError: data or settings can't be used, or are not those of the run.
        """
        saved = _saved_settings(self.folder, explicit) if resume and self.folder.is_run() else None
        early = saved or settings_before_data(explicit)
        machine = Machine.choose(early.device, early.precision)
        source = self._open_source(data, early)
        if saved is not None:
            _check_same_data(self.folder, source)
        workers = usual_workers() if early.workers is None else early.workers
        with self._counted("looking at a sample", min(SAMPLE, len(source))) as on_images:
            seen = survey(source, workers=workers, on_images=on_images)
        settings = saved or choose_settings(explicit, seen)[0]
        name = name_of(source, reduce_to=settings.reduce_to, data=data)
        needed_bytes = seen.decoded_bytes(settings.reduce_to)
        cache = plan_cache(settings.cache, settings.cache_folder(), needed_bytes, name)
        images = decoded_images(source, cache, reduce_to=settings.reduce_to, data=data, device=machine.device)
        with closing(Loader(images, workers=workers, device=machine.device)) as loader:
            if saved is not None:
                _take_unreadable(self.folder, loader)
                state = _saved_state(self.folder, saved, len(source)) if self.folder.last.is_file() else None
                trunk = make_run_trunk(saved)
                if state is None:
                    self._initialise(trunk, saved)
                yield Plan(self.folder, data, saved, [], loader, cache, machine, trunk, resumed=True, state=state)
            else:
                yield self._new_plan(data, explicit, loader, cache, machine, seen)

    def _open_source(self, data: Data, settings: Settings) -> ImageSource:
        with self._counted("finding images", None) as on_images:
            found = 0

            def on_found(so_far: int) -> None:
                nonlocal found
                on_images(so_far - found)
                found = so_far

            source = open_source(
                data,
                settings.limit,
                cache=settings.cache_folder(),
                cache_bytes=size_in_bytes("cache_size", settings.cache_size),
                on_found=on_found,
                on_trouble=self.reporter.warn,
            )
        self.reporter.say(source.describe())
        return source

    def _new_plan(
        self, data: Data, explicit: Mapping[str, Any], loader: Loader, cache: CachePlan, machine: Machine, seen: Survey
    ) -> Plan:
        with self._counted("reading images", len(loader.images)) as on_images:
            seen = check_images(loader, seen, on_images)
        barrier()
        say_unreadable(loader, seen.looked_at, self.reporter)
        settings, changes = choose_settings(explicit, seen)
        trunk = make_run_trunk(settings)
        width = stage_width(trunk, machine, settings.cluster_stage, settings.image_size)
        settings, more = fit_to_trunk(settings, explicit, width=width, n_images=seen.n_images)
        settings = replace(settings, precision=machine.precision)
        self._initialise(trunk, settings)
        return Plan(self.folder, data, settings, [*changes, *more], loader, cache, machine, trunk, resumed=False)

    def _initialise(self, trunk: Trunk, settings: Settings) -> None:
        """Put the weights into the trunk that the run starts from."""
        if settings.init is not None:
            from deepcluster.models.weights import read_weights, take_weights

            self.reporter.say(take_weights(trunk, read_weights(settings.init), name=settings.init))

    @contextmanager
    def _counted(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Progress that asks at each step whether to stop."""
        with self.reporter.track(what, total) as progress:

            def on_images(done: int) -> None:
                progress(done)
                self.interruption.check()

            yield on_images


def say_unreadable(loader: Loader, looked_at: int, reporter: Reporter) -> None:
    """Say how many images can't be read, and why one of them can't."""
    if loader.unreadable:
        index, reason = min(loader.unreadable.items())
        reporter.say(
            f"{len(loader.unreadable):,} of {looked_at:,} images can't be read and are left out "
            f"(unreadable.csv), e.g. {loader.images.source.name(index)}: {reason}"
        )


def _saved_settings(folder: RunFolder, explicit: Mapping[str, Any]) -> Settings:
    """Settings of the run that is taken up, with what a resume may change."""
    saved = Settings.from_dict(folder.read_config()["settings"])
    # The precision that auto chose at the start is kept, whatever this machine would choose.
    asked = {name: value for name, value in explicit.items() if (name, value) != ("precision", "auto")}
    check_same_settings(asked, saved)
    return Settings.from_dict({**saved.as_dict(), **asked})


def _check_same_data(folder: RunFolder, source: ImageSource) -> None:
    """Refuse to go on with other images."""
    before = folder.read_config()["data"]
    if before["fingerprint"] != fingerprint(source):
        raise InputError(
            f"the images are not those of this run: it has {before['images']:,}, here are {len(source):,}"
            f"{_what_changed(folder, source)}. Restore them, or start another run with --out"
        )


def _what_changed(folder: RunFolder, source: ImageSource) -> str:
    """Which names came or went, where the run has come far enough to have written a table of them."""
    table = next(iter(sorted(folder.assignments.glob("*.parquet"))), None)
    if table is None:
        return ", or their names have changed"
    before = sorted(pq.read_table(table, columns=["name"]).column("name").to_pylist())
    now = sorted(source.name(index) for index in range(len(source)))
    return "; " + (difference(before, now) or "they are the same in another order")


def _take_unreadable(folder: RunFolder, loader: Loader) -> None:
    """Take the list of unreadable images from the run."""
    source = loader.images.source
    if folder.unreadable.is_file():
        index = {source.name(i): i for i in range(len(source))}
        with folder.unreadable.open(newline="", encoding="utf-8") as file:
            loader.unreadable.update({index[row["name"]]: row["reason"] for row in csv.DictReader(file)})


def _saved_state(folder: RunFolder, settings: Settings, n_images: int) -> dict[str, Any]:
    """The run's last checkpoint, which must be of this run and not beyond its epochs; of its rows those of this rank."""
    state = load_checkpoint(folder.last)
    state["rows"], state["parts"] = folder.read_rows(state, my_part(n_images)), folder.read_parts(state)
    others = differing_settings(state["settings"], settings)
    if others:
        raise InputError(f"{folder.last} is the checkpoint of another run: {'; '.join(others)}")
    epoch, begun = state["epoch"], state["labelled"]
    if epoch + begun > settings.epochs + 1:
        raise InputError(
            f"--epochs {settings.epochs} is fewer than this run has begun; use --epochs {epoch - 1 + begun} or more"
        )
    return state
