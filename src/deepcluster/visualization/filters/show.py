"""`visualize filters`: which filters, batch by batch; stopped, the same call goes on.

N images, B pictures, C channels, H and W pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.core.progress import Meter
from deepcluster.models.trunk import Trunk
from deepcluster.run.model import Model
from deepcluster.run.resumable import ResumableState, digest_of
from deepcluster.visualization.channels import chosen_stages, parse_channels
from deepcluster.visualization.filters.ascent import Ascent, new_ascent
from deepcluster.visualization.filters.parametrisation import random_images
from deepcluster.visualization.filters.responses import Responses
from deepcluster.visualization.filters.saving import StageFolder
from deepcluster.visualization.filters.settings import Settings, settings_of
from deepcluster.visualization.options import FilterOptions

FORMAT = "filters-1"
# Bytes of a batch's maps and their gradients: fixed, not measured, so that a batch is the same again. On a processor larger
# batches are no quicker, and at 224 px conv1 half as quick (benchmarks/visualization.py).
MEMORY = {"cpu": 128 << 20}
DEVICE_MEMORY = 4 << 30
SMALLEST_BATCH, LARGEST_BATCH = 2, 256
RANDOM_IMAGES = 32


@dataclass(frozen=True)
class FilterPictures:
    """Pictures of the filters of a stage.

    Attributes:
        folder: of one file a channel, `filters.json` and `grid.png`.
        grid: the path of the grid.
        channels: that were asked for.
        dead: those of them that answer to nothing the ascent has tried.
    """

    stage: str
    folder: Path
    grid: Path
    channels: tuple[int, ...]
    dead: tuple[int, ...]


def show_filters(model: Model, options: FilterOptions, out: Path) -> list[FilterPictures]:
    """Write, in `out`/STAGE of each stage, a picture of each filter that is asked for.

    Pictures that are there already, of the same weights and settings, stay as they are, and nothing is done for them.

    Raises:
        InputError: a stage, channels, size or setting that the trunk or the objective does not have; the folder is used
            for something else. Nothing was written.
        Interrupted: the person stopped it; the same call goes on.
    """
    settings = settings_of(options, model.image_size)
    stages = chosen_stages(model, options.stage)
    trunk = model.copy_of_trunk()
    chosen = [_Stage.of(model, trunk, stage, options, settings, out) for stage in stages]
    for stage in chosen:
        stage.make(options.batch_size)
    return [stage.pictures() for stage in chosen]


def filter_pictures(
    responses: Responses, settings: Settings, channels: Sequence[int]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pictures (B, H, W, 3) that excite these filters, found at once, and the filters' mean activations (B,) on them."""
    ascent = new_ascent(responses, settings, channels)
    while ascent.done < settings.steps:
        ascent.advance()
    return ascent.pictures(), ascent.activations().cpu().numpy()


def usual_batch_size(responses: Responses) -> int:
    """As many filters as a little memory holds the maps and gradients of."""
    memory = MEMORY.get(responses.machine.device.type, DEVICE_MEMORY)
    return int(min(max(memory // (2 * responses.bytes_an_image), SMALLEST_BATCH), LARGEST_BATCH))


@dataclass
class _Stage:
    """The work on one stage."""

    model: Model
    responses: Responses
    settings: Settings
    channels: tuple[int, ...]
    folder: StageFolder

    @classmethod
    def of(cls, model: Model, trunk: Trunk, stage: str, options: FilterOptions, settings: Settings, out: Path) -> "_Stage":
        responses = Responses(trunk, stage, model.machine, size=settings.image_size, made_for=model.image_size)
        # The default means "at most": a stage may have fewer. So it does where several stages are asked for.
        clip = options.channels == FilterOptions.channels or len(chosen_stages(model, options.stage)) > 1
        channels = parse_channels(options.channels, responses.n_channels, stage=stage, clip=clip)
        facts = {"stage": stage, **settings.as_dict(), "model": model.name, "weights": model.weights}
        key = digest_of(FORMAT, model.weights, stage, settings.as_dict())
        return cls(model, responses, settings, channels, StageFolder(out / stage, key, facts))

    def make(self, batch_size: int | None) -> None:
        """The pictures that are missing."""
        stage, reporter = self.responses.stage, self.model.work.reporter
        missing = [channel for channel in self.channels if channel not in self.folder.channels]
        if not missing:
            reporter.say(f"{stage}: the pictures are there already, of this model and these settings")
            if not self.folder.grid.is_file():
                self.folder.draw_grid()
            return
        unfinished = self.model.resumable(FORMAT, stage, self.settings.as_dict())
        size = batch_size or usual_batch_size(self.responses)
        reporter.detail(f"{stage}: {len(missing)} filters, {min(size, len(missing))} at once")
        random_C = self._random_answers()
        with reporter.track(f"filters of {stage}", len(missing) * self.settings.steps, unit="steps") as progress:
            for ascent in self._ascents(missing, size, unfinished, progress):
                self._climb(ascent, unfinished, progress)
                self._keep(ascent, random_C)
                unfinished.done()
        self.folder.draw_grid()
        dead = self.pictures().dead
        if dead:
            numbers = ", ".join(map(str, dead[:20])) + (", …" if len(dead) > 20 else "")
            reporter.warn(f"{stage}: {len(dead)} filters answer to nothing that was tried ({numbers})")

    def _random_answers(self) -> NDArray[np.float32]:
        """Mean activation (C,) of each filter on images that show nothing."""
        images_NCHW = random_images(RANDOM_IMAGES, self.settings.image_size, device=self.model.machine.device)
        means = [self.responses.means(images_NCHW[first : first + 8]) for first in range(0, RANDOM_IMAGES, 8)]
        result: NDArray[np.float32] = torch.cat(means).mean(dim=0).cpu().numpy()
        return result

    def _ascents(self, missing: list[int], size: int, unfinished: ResumableState, progress: Meter) -> Iterator[Ascent]:
        """Batches of filters; first the one that was under way when an earlier call was stopped."""
        state = unfinished.load()
        if state is not None and set(state["channels"]) <= set(missing):
            ascent = new_ascent(self.responses, self.settings, state["channels"])
            ascent.restore(state)
            progress(ascent.done * len(ascent.channels))
            yield ascent
            missing = [channel for channel in missing if channel not in ascent.channels]
        for first in range(0, len(missing), size):
            yield new_ascent(self.responses, self.settings, missing[first : first + size])

    def _climb(self, ascent: Ascent, unfinished: ResumableState, progress: Meter) -> None:
        while ascent.done < self.settings.steps:
            unfinished.check(ascent.state)
            ascent.advance()
            progress(len(ascent.channels))

    def _keep(self, ascent: Ascent, random_C: NDArray[np.float32]) -> None:
        activations_B = ascent.activations().tolist()
        facts: dict[int, dict[str, Any]] = {}
        for channel, activation in zip(ascent.channels, activations_B, strict=True):
            at_random = float(random_C[channel])
            # To rounding: a filter that gives one number whatever it sees is dead, too.
            dead = not activation > at_random + 1e-4 * abs(at_random)
            known = activation if isfinite(activation) else None
            facts[channel] = {"activation": known, "random_images": at_random, "dead": dead}
        self.folder.add(dict(zip(ascent.channels, ascent.pictures(), strict=True)), facts)

    def pictures(self) -> FilterPictures:
        """What there is now."""
        made = self.folder.channels
        dead = tuple(channel for channel in self.channels if made[channel]["dead"])
        return FilterPictures(self.responses.stage, self.folder.folder, self.folder.grid, self.channels, dead)
