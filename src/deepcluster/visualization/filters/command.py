"""`visualize filters`: pictures that excite the filters of a trunk, stage by stage.

B pictures, C channels, N images, H and W pixels.
"""

from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of
from deepcluster.run.model import Model, load, loaded, new_interruption
from deepcluster.visualization.channels import chosen_stages, parse_channels
from deepcluster.visualization.filters.ascent import Settings, default_batch_size, filter_pictures, settings_of
from deepcluster.visualization.filters.parametrisation import random_images
from deepcluster.visualization.filters.responses import Responses
from deepcluster.visualization.filters.saving import About, StageFolder
from deepcluster.visualization.folder import pictures_folder
from deepcluster.visualization.options import FilterOptions

RANDOM_IMAGES = 32


def filters(
    model: str | Path | Model,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> list[Path]:
    """Make pictures that excite each filter most, as `deepcluster visualize filters` does.

    Args:
        model: a run folder, a checkpoint, `untrained:ARCH`, `untrained:RUN`, or the result of `load`.
        out: folder of the pictures, with a folder per stage; RUN/visualization/filters by default.
        device: device to compute on.
        workers: threads that prepare images.
        reporter: shows progress; quiet by default.
        options: fields of `deepcluster.visualization.options.FilterOptions`.

    Returns:
        the grid (PNG) of each stage.

    Raises:
        InputError: model, options or folder can't be used; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; the pictures of finished stages are kept.
    """
    checked, model = FilterOptions.from_dict(options), model if isinstance(model, Model) else load(model)
    folder = pictures_folder(model, "filters", out)
    interruption = new_interruption("finished stages are kept: the same command continues with the next one")
    with interruption.listening():
        model = loaded(model, device=device, workers=workers, reporter=reporter, interruption=interruption)
        return show_filters(model, checked, folder)


def show_filters(model: Model, options: FilterOptions, out: Path) -> list[Path]:
    """Write a picture of each chosen filter of each chosen stage to `out`/STAGE; return the grid of each stage.

    A stage that an earlier call finished with the same weights, settings and filters is not computed again.

    Raises:
        InputError: a stage, channel, size or setting that the trunk or the objective does not have, or the folder is used
            for something else. Nothing was written.
        Interrupted: a stop was requested; each stage is finished or as it was before.
    """
    settings = settings_of(options, model.image_size)
    stages, trunk = chosen_stages(model, options.stage), model.copy_of_trunk()
    # By default, and where several stages are chosen, a range of channels may exceed those of a stage.
    clip = options.channels == FilterOptions.channels or len(stages) > 1
    chosen = []
    for stage in stages:
        responses = Responses(trunk, stage, model.machine, size=settings.image_size, made_for=model.image_size)
        channels = sorted(parse_channels(options.channels, responses.n_channels, stage=stage, clip=clip))
        facts = {"stage": stage, **settings.as_dict(), "model": model.name, "weights": model.weights}
        chosen.append((responses, channels, StageFolder(out / stage, facts)))
    for responses, channels, folder in chosen:
        if folder.is_finished(channels):
            model.work.reporter.say(f"{responses.stage}: the pictures of this model and these settings are already there")
        else:
            folder.write(*_make_pictures(model, responses, settings, channels, options.batch_size))
    return [folder.grid for _, _, folder in chosen]


def _make_pictures(
    model: Model, responses: Responses, settings: Settings, channels: list[int], batch_size: int | None
) -> tuple[NDArray[np.uint8], dict[int, About]]:
    """Return pictures (C, H, W, 3) of these filters of a stage, and what `filters.json` holds of each."""
    stage, reporter = responses.stage, model.work.reporter
    size = batch_size or default_batch_size(responses)
    reporter.detail(f"{stage}: {len(channels)} filters in batches of {min(size, len(channels))}")
    images_NCHW = random_images(RANDOM_IMAGES, settings.image_size, device=model.machine.device)
    random_C = torch.cat([responses.means(images_BCHW) for images_BCHW in images_NCHW.split(8)]).mean(dim=0).tolist()
    pictures, about = [], {}
    with model.work.track(f"filters of {stage}", len(channels) * settings.steps, unit="steps") as advance:
        for first in range(0, len(channels), size):
            batch = channels[first : first + size]
            pictures_BHW3, activations_B = filter_pictures(responses, settings, batch, advance)
            pictures.append(pictures_BHW3)
            for channel, activation in zip(batch, activations_B.tolist(), strict=True):
                at_random = random_C[channel]
                # A filter that outputs a constant, whatever it sees, is dead, too: the values differ by rounding.
                dead = not activation > at_random + 1e-4 * abs(at_random)
                known = activation if isfinite(activation) else None
                about[channel] = {"activation": known, "random_images": at_random, "dead": dead}
    dead_ones = [str(channel) for channel in channels if about[channel]["dead"]]
    if dead_ones:
        numbers = ", ".join(dead_ones[:20]) + (", …" if len(dead_ones) > 20 else "")
        reporter.warn(f"{stage}: no picture excites {count_of(len(dead_ones), 'filter')} ({numbers})")
    return np.concatenate(pictures), about
