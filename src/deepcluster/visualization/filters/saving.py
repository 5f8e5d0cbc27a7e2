"""The folder of the pictures of a stage: one file a channel, a grid of them all, and `filters.json`."""

import json
import os
import re
from collections.abc import Mapping
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepcluster.core.errors import InputError
from deepcluster.core.files import write_whole
from deepcluster.visualization.grid import picture_grid

JSON_FILE, GRID_FILE = "filters.json", "grid.png"
OUR_NAMES = re.compile(r"[0-9]{4,}\.png|grid\.png|filters\.json")
# Pictures of the grid: smaller ones are enlarged, and all are made smaller where the grid were wider than this.
SMALLEST, WIDEST = 96, 8_192


class StageFolder:
    """Pictures of the filters of one stage.

    Those made before with the same settings and weights are kept, and new ones are put beside them; those made otherwise
    are deleted as soon as there is a new one.

    Args:
        folder: of the stage; made when there is something to write.
        key: changes with all that the pictures depend on.
        facts: how they are made, for `filters.json`.

    Raises:
        InputError: it can't be written to, or holds files of such names that this program did not write.
    """

    def __init__(self, folder: Path, key: str, facts: Mapping[str, Any]) -> None:
        self.folder, self.key, self.facts = folder, key, dict(facts)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise InputError(f"{folder}: {there} is a file or can't be written to; name a folder for the pictures")
        content = _content(folder / JSON_FILE)
        theirs = [] if content else sorted(path.name for path in folder.glob("*.*") if OUR_NAMES.fullmatch(path.name))
        if theirs:
            raise InputError(f"{folder} holds a {theirs[0]} of something else; name another folder with --out")
        same = content.get("key") == key
        named = [int(channel) for channel in content.get("channels", {})]
        self._old = [] if same else named
        self.channels: dict[int, dict[str, Any]] = {
            channel: content["channels"][str(channel)] for channel in named if same and self.path(channel).is_file()
        }

    @property
    def grid(self) -> Path:
        """The picture of all pictures."""
        return self.folder / GRID_FILE

    def path(self, channel: int) -> Path:
        """The picture of a channel."""
        return self.folder / f"{channel:04}.png"

    def add(self, pictures: Mapping[int, NDArray[np.uint8]], facts: Mapping[int, dict[str, Any]]) -> None:
        """Write the picture (H, W, 3) of each channel, and what is known of it; each file is whole at every moment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self._old:
            self.path(old).unlink(missing_ok=True)
        if self._old:
            self.grid.unlink(missing_ok=True)
        self._old = []
        # The list goes first: what it names and is not there will be made again, and what is there is known to be ours.
        self.channels = dict(sorted({**self.channels, **facts}.items()))
        channels = {str(channel): about for channel, about in self.channels.items()}
        content = {**self.facts, "key": self.key, "channels": channels}
        write_whole(self.folder / JSON_FILE, json.dumps(content, indent=1) + "\n")
        for channel, picture in pictures.items():
            _save(Image.fromarray(picture), self.path(channel))

    def draw_grid(self) -> None:
        """Write the grid of all channels."""
        across = ceil(sqrt(len(self.channels)))
        pictures = []
        for channel in self.channels:
            with Image.open(self.path(channel)) as opened:
                pictures.append(_resized(opened.convert("RGB"), WIDEST // across))
        _save(picture_grid(pictures, across=across, captions=list(map(str, self.channels))), self.grid)


def _content(path: Path) -> dict[str, Any]:
    """What an earlier call wrote; nothing where it is missing, spoiled or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ours = isinstance(content["key"], str) and all(channel.isdecimal() for channel in content["channels"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return content if ours else {}


def _resized(picture: Image.Image, widest: int) -> NDArray[np.uint8]:
    side = picture.width
    wanted = min(side * ceil(SMALLEST / side), max(1, widest))
    kind = Image.Resampling.BICUBIC if wanted > side else Image.Resampling.LANCZOS
    return np.asarray(picture if wanted == side else picture.resize((wanted, wanted), kind))


def _save(picture: Image.Image, path: Path) -> None:
    beside = path.with_name(path.name + ".part")
    picture.save(beside, "PNG")
    beside.replace(path)
