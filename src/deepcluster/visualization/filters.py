"""`visualize filters`: pictures that excite the filters of a trunk, stage by stage.

The folder of a stage holds a file per filter, a grid of all of them, and `filters.json`. B pictures, C channels, N images,
H and W pixels.
"""

import json
import re
from collections.abc import Mapping, Sequence
from math import ceil, isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from deepcluster.core.errors import InputError
from deepcluster.core.files import mark_as_ours, output_path, write_whole
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of
from deepcluster.interop.loading import loaded, new_interruption
from deepcluster.run.model import Model
from deepcluster.visualization.ascent import Responses, Settings, default_batch_size, filter_pictures, settings_of
from deepcluster.visualization.grid import picture_grid
from deepcluster.visualization.options import FilterOptions
from deepcluster.visualization.parametrisation import random_images
from deepcluster.visualization.stages import parse_channels, pictures_folder

JSON_FILE = "filters.json"
OUR_NAMES = re.compile(r"[0-9]{4,}\.png|grid\.png|filters\.json")
# Smaller pictures are enlarged in the grid, and all pictures are reduced where the grid would be wider.
SMALLEST, WIDEST = 96, 8_192


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
        model: whatever `load` opens, or its result.
        out: folder of the pictures, with a folder per stage; RUN/visualization/filters by default.
        device, workers, reporter: where to compute, processes that prepare images, what shows progress (quiet by default).
        options: fields of `deepcluster.visualization.options.FilterOptions`.

    Returns:
        the grid (PNG) of each stage.

    Raises:
        InputError: model, options or folder can't be used; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; the pictures of finished stages are kept.
    """
    checked = FilterOptions.from_dict(options)
    interruption = new_interruption("finished stages are kept: the same command continues with the next one")
    with interruption.listening():
        model = loaded(model, device=device, workers=workers, reporter=reporter, interruption=interruption)
        return show_filters(model, checked, pictures_folder(model, "filters", out))


def show_filters(model: Model, options: FilterOptions, out: Path) -> list[Path]:
    """Write a picture of each chosen filter of each chosen stage to `out`/STAGE; return the grid of each stage.

    A stage that an earlier call finished with the same weights, settings and filters is not computed again.

    Raises:
        InputError: the trunk or the objective has no such stage, channel, size or setting, or the folder has another use.
        Interrupted: a stop was requested; each stage is finished or as it was before.
    """
    settings = settings_of(options, model.image_size)
    stages, trunk = model.stages(options.stage, usual=model.trunk.last_map), model.copy_of_trunk()
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
            size = options.batch_size or default_batch_size(responses)
            folder.write(*_make_pictures(model, responses, settings, channels, size))
    return [folder.grid for _, _, folder in chosen]


def _make_pictures(
    model: Model, responses: Responses, settings: Settings, channels: list[int], size: int
) -> tuple[NDArray[np.uint8], dict[int, dict[str, Any]]]:
    """Return pictures (C, H, W, 3) of these filters of a stage, and what `filters.json` holds of each."""
    stage, reporter = responses.stage, model.work.reporter
    reporter.detail(f"{stage}: {len(channels)} filters in batches of {min(size, len(channels))}")
    images_NCHW = random_images(32, settings.image_size, device=model.machine.device)
    random_C = torch.cat([responses.means(images_BCHW) for images_BCHW in images_NCHW.split(8)]).mean(dim=0).tolist()
    pictures, about, dead_ones = [], {}, []
    with model.work.track(f"filters of {stage}", len(channels) * settings.steps, unit="steps") as advance:
        for first in range(0, len(channels), size):
            batch = channels[first : first + size]
            pictures_BHW3, activations_B = filter_pictures(responses, settings, batch, advance)
            pictures.append(pictures_BHW3)
            for channel, activation in zip(batch, activations_B.tolist(), strict=True):
                at_random = random_C[channel]
                # A filter that outputs a constant, whatever it sees, is dead, too: the values differ by rounding.
                dead = not activation > at_random + 1e-4 * abs(at_random)
                dead_ones += [str(channel)] if dead else []
                known = activation if isfinite(activation) else None
                about[channel] = {"activation": known, "random_images": at_random, "dead": dead}
    if dead_ones:
        numbers = ", ".join(dead_ones[:20]) + (", …" if len(dead_ones) > 20 else "")
        reporter.warn(f"{stage}: no picture excites {count_of(len(dead_ones), 'filter')} ({numbers})")
    return np.concatenate(pictures), about


class StageFolder:
    """Pictures of the filters of one stage, made as `facts` say; `write` creates the folder when all of them are made.

    Raises:
        InputError: the folder can't be written to, or holds files of these names that this program did not write.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.facts, self.grid = path, facts, path / "grid.png"
        output_path(path, "--out", is_folder=True)
        # What an earlier call wrote; nothing if the file is missing, damaged or something else.
        self._content: dict[str, Any] = {}
        try:
            content = json.loads((path / JSON_FILE).read_text(encoding="utf-8"))
            if "stage" in content and all(channel.isdecimal() for channel in content["channels"]):
                self._content = content
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        foreign = sorted(file.name for file in path.glob("*.*") if OUR_NAMES.fullmatch(file.name))
        if foreign and not self._content:
            raise InputError(f"{path} holds a {foreign[0]} of something else; name another folder with --out")

    def is_finished(self, channels: Sequence[int]) -> bool:
        """Return whether the folder holds the pictures of exactly these filters, made as `facts` say."""
        there = self._content.get("channels", {})
        same = self._content == {**self.facts, "channels": there} and [*there] == [*map(str, channels)]
        return same and all(file.is_file() for file in [self.grid, *map(self._file, channels)])

    def write(self, pictures_BHW3: NDArray[np.uint8], about: Mapping[int, dict[str, Any]]) -> None:
        """Replace the pictures of an earlier call by those of the filters in `about`."""
        self.path.mkdir(parents=True, exist_ok=True)
        mark_as_ours(self.path)
        for old in [self.grid, *(self._file(int(channel)) for channel in self._content.get("channels", {}))]:
            old.unlink(missing_ok=True)
        # The list comes first, so that no picture is unknown; a stage without its grid is not finished.
        write_whole(self.path / JSON_FILE, json.dumps({**self.facts, "channels": about}, indent=1) + "\n")
        pictures = [Image.fromarray(picture_HW3) for picture_HW3 in pictures_BHW3]
        for channel, picture in zip(about, pictures, strict=True):
            _save(picture, self._file(channel))
        across, side = ceil(sqrt(len(about))), pictures[0].width
        wanted = min(side * ceil(SMALLEST / side), max(1, WIDEST // across))
        kind = Image.Resampling.BICUBIC if wanted > side else Image.Resampling.LANCZOS
        tiles = [np.asarray(picture.resize((wanted, wanted), kind)) for picture in pictures]
        _save(picture_grid(tiles, across=across, captions=list(map(str, about))), self.grid)

    def _file(self, channel: int) -> Path:
        return self.path / f"{channel:04}.png"


def _save(picture: Image.Image, path: Path) -> None:
    """Write a picture beside and rename it."""
    beside = path.with_name(path.name + ".part")
    picture.save(beside, "PNG")
    beside.replace(path)
