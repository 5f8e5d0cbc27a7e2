"""The folder of the pictures of a stage: a file per filter, a grid of all of them, and `filters.json`.

B pictures, H and W pixels.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
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
# Smaller pictures are enlarged in the grid, and all pictures are reduced where the grid would be wider.
SMALLEST, WIDEST = 96, 8_192

# What is known of a filter, for `filters.json`.
About = dict[str, Any]


class StageFolder:
    """Pictures of the filters of one stage, written when all of them are made.

    Args:
        path: the folder; created by `write`.
        facts: how the pictures are made, for `filters.json`.

    Raises:
        InputError: the folder can't be written to, or holds files of these names that this program did not write.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = path, dict(facts)
        parent = next(one for one in (path, *path.absolute().parents) if one.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise InputError(f"{path}: {parent} is a file or can't be written to; name a folder for the pictures")
        self._content = _read(path / JSON_FILE)
        foreign = sorted(file.name for file in path.glob("*.*") if OUR_NAMES.fullmatch(file.name))
        if foreign and not self._content:
            raise InputError(f"{path} holds a {foreign[0]} of something else; name another folder with --out")

    @property
    def grid(self) -> Path:
        """The picture of all pictures."""
        return self.path / GRID_FILE

    def is_finished(self, channels: Sequence[int]) -> bool:
        """Return whether the folder holds the pictures of exactly these filters, made as `facts` say."""
        there = self._content.get("channels", {})
        same = self._content == {**self.facts, "channels": there} and [*there] == [*map(str, channels)]
        return same and all(file.is_file() for file in [self.grid, *map(self._file, channels)])

    def write(self, pictures_BHW3: NDArray[np.uint8], about: Mapping[int, About]) -> None:
        """Replace the pictures of an earlier call by those of the filters in `about`."""
        self.path.mkdir(parents=True, exist_ok=True)
        for old in [self.grid, *(self._file(int(channel)) for channel in self._content.get("channels", {}))]:
            old.unlink(missing_ok=True)
        # The list comes first, so that no picture is unknown; a stage without its grid is not finished.
        write_whole(self.path / JSON_FILE, json.dumps({**self.facts, "channels": about}, indent=1) + "\n")
        for channel, picture in zip(about, pictures_BHW3, strict=True):
            _save(Image.fromarray(picture), self._file(channel))
        across = ceil(sqrt(len(about)))
        pictures = [_resized(Image.fromarray(picture), WIDEST // across) for picture in pictures_BHW3]
        _save(picture_grid(pictures, across=across, captions=list(map(str, about))), self.grid)

    def _file(self, channel: int) -> Path:
        return self.path / f"{channel:04}.png"


def _read(path: Path) -> dict[str, Any]:
    """Return what an earlier call wrote; nothing if the file is missing, damaged or something else."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ours = "stage" in content and all(channel.isdecimal() for channel in content["channels"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return content if ours else {}


def _resized(picture: Image.Image, widest: int) -> NDArray[np.uint8]:
    side = picture.width
    wanted = min(side * ceil(SMALLEST / side), max(1, widest))
    kind = Image.Resampling.BICUBIC if wanted > side else Image.Resampling.LANCZOS
    return np.asarray(picture if wanted == side else picture.resize((wanted, wanted), kind))


def _save(picture: Image.Image, path: Path) -> None:
    """Write a picture beside and rename it."""
    beside = path.with_name(path.name + ".part")
    picture.save(beside, "PNG")
    beside.replace(path)
