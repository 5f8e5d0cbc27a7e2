"""Files of the best images: pages of pictures, a JSON file with names, scores and boxes, and copies of the images.

H and W pixels.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.files import write_whole
from deepcluster.core.text import count_of, printable
from deepcluster.data.decode import decode
from deepcluster.data.loader import image_threads
from deepcluster.data.sources import ImageSource
from deepcluster.run.model import Model
from deepcluster.visualization.top_images.pages import ACROSS, ROWS_PER_PAGE, image_tile, page_of
from deepcluster.visualization.top_images.photos import Box, photo_box
from deepcluster.visualization.top_images.search import StageImages, TopImages

JSON_FILE, PAGE = "top-images.json", "pairs"
LONGEST_NAME = 200
NOT_IN_NAMES = str.maketrans({**dict.fromkeys('<>:"\\|?*', "_"), **dict.fromkeys(map(chr, range(32)), "_"), "/": "__"})


def save_top_images(
    top: TopImages, source: ImageSource, folder: Path, model: Model, *, data: str, copies: Path | None = None
) -> list[Path]:
    """Write `pairs-1.png`, … and finally `top-images.json` to `folder`/STAGE of each stage.

    Args:
        source: the images that were searched.
        data: the source as the user named it.
        copies: a new or empty folder for copies of the images: STAGE/channel-CHANNEL/RANK-NAME.

    Returns:
        the JSON file of each stage, which names the pages.

    Raises:
        InputError: `folder` is a file, or `copies` can't be used.
        Interrupted: a stop was requested.
    """
    if copies is not None:
        check_copies_folder(copies)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the pictures")
    written = []
    for stage in top.stages:
        written.append(_save_stage(stage, top, source, folder / stage.stage, model, data))
        if copies is not None:
            _copy(stage, source, copies / stage.stage, model)
    return written


def check_copies_folder(folder: Path) -> None:
    """Raise `InputError` unless the folder is empty, or can be created."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--copies {folder} is not an empty folder; name one that does not exist yet")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--copies {folder}: {parent} is a file or can't be written to")


def _save_stage(stage: StageImages, top: TopImages, source: ImageSource, folder: Path, model: Model, data: str) -> Path:
    """Write the pages and the JSON file of a stage; return the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / JSON_FILE
    # Version 0.1.0 also wrote pages called blocks.
    for old in (file, *folder.glob(f"{PAGE}-*.png"), *folder.glob("blocks-*.png")):
        old.unlink(missing_ok=True)
    dead_S = dict(zip(stage.channels, stage.dead_S.tolist(), strict=True))
    rows = [row for row, channel in enumerate(stage.channels) if not dead_S[channel]]
    pages, channels = _write_pages(stage, rows, source, folder, model, count=top.options.count)
    facts = {
        "stage": stage.stage,
        "model": model.name,
        "weights": model.weights,
        "data": data,
        "images": len(source) - len(top.unreadable),
        "unreadable": len(top.unreadable),
        "count": top.options.count,
        "rank": top.options.rank,
        "image_size": stage.image_size,
        "receptive_field": {"size": stage.field.size, "stride": stage.field.stride, "offset": stage.field.offset},
        "pages": pages,
        "dead": [channel for channel, dead in dead_S.items() if dead],
        "channels": channels,
    }
    write_whole(file, json.dumps(facts, indent=1) + "\n")
    return file


def _write_pages(
    stage: StageImages, rows: Sequence[int], source: ImageSource, folder: Path, model: Model, *, count: int
) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, Any]]]]:
    """Write the pages of these rows; return what the JSON file holds of each page, and of the images of each channel."""
    size = max(1, ROWS_PER_PAGE // ceil(count / ACROSS))
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    pages: list[dict[str, Any]] = []
    channels: dict[int, list[dict[str, Any]]] = {}
    with model.work.track(f"pictures of {stage.stage}", len(rows), unit="channels") as advance:
        for number, part in enumerate(parts, 1):
            drawn = _draw_images(stage, part, source, model)
            numbers, images = [stage.channels[row] for row in part], [drawn[row] for row in part]
            name = f"{PAGE}-{number:0{len(str(len(parts)))}d}.png"
            tiles, captions = ([[getattr(one, what) for one in row] for row in images] for what in ("tile", "caption"))
            page_of(numbers, tiles, captions).save(folder / name)
            pages.append({"channels": numbers, PAGE: name})
            channels |= {channel: [one.entry for one in row] for channel, row in zip(numbers, images, strict=True)}
            advance(len(part))
    return pages, channels


@dataclass(frozen=True)
class _Drawn:
    """An image of a channel: its entry in the JSON file, its picture and its caption."""

    entry: dict[str, Any]
    tile: NDArray[np.uint8]
    caption: str


def _draw_images(stage: StageImages, rows: Sequence[int], source: ImageSource, model: Model) -> dict[int, list[_Drawn]]:
    """Return the images of each row, best first. Each photo is decoded once, and dropped when its pictures are made."""
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row in rows:
        for rank in stage.images(row):
            places[int(stage.indices_SK[row, rank])].append((row, rank))

    def draw(index: int) -> list[_Drawn]:
        photo_HWC, name = _photo(source, index), source.name(index)
        return [_draw(stage, row, rank, photo_HWC, name, model.settings.reduce_to) for row, rank in places[index]]

    drawn: dict[tuple[int, int], _Drawn] = {}
    with image_threads(max(1, model.workers)) as pool:
        for index, made in zip(sorted(places), pool.map(draw, sorted(places)), strict=True):
            drawn.update(zip(places[index], made, strict=True))
    return {row: [drawn[row, rank] for rank in stage.images(row)] for row in rows}


def _photo(source: ImageSource, index: int) -> NDArray[np.uint8] | None:
    """Return the photo, or None if it can't be read any more."""
    try:
        return decode(source.read(index))
    except UnreadableImage:
        return None


def _draw(stage: StageImages, row: int, rank: int, photo_HWC: NDArray[np.uint8] | None, name: str, reduce_to: int) -> _Drawn:
    """Draw the image at this rank of the channel in this row."""
    size, score, view_box = stage.image_size, float(stage.scores_SK[row, rank]), stage.view_box(row, rank)
    view: Box = (0, 0, size, size)
    part: Box = view_box
    box = None
    if photo_HWC is not None:
        height, width = photo_HWC.shape[:2]
        view, part = (photo_box(one, size, height, width, reduce_to=reduce_to) for one in (view, part))
        box = whole_pixels(part, height, width)
    # A receptive field as wide as the view omits a strip at most: the patch would show the whole image again.
    tile = image_tile(photo_HWC, view, part, patch=stage.field.size < size)
    number = f"{score:.2f}" if abs(score) >= 1 else f"{score:.3g}"
    entry = {"name": name, "score": score, "box": box, "view_box": list(view_box)}
    return _Drawn(entry, tile, f"{number} · {printable(name).rpartition('/')[2]}")


def whole_pixels(box: Box, height: int, width: int) -> list[int]:
    """Return the pixels of a photo that a box touches: left, top, right, bottom."""
    left, top, right, bottom = box
    return [max(0, floor(left)), max(0, floor(top)), min(width, ceil(right)), min(height, ceil(bottom))]


def _copy(stage: StageImages, source: ImageSource, folder: Path, model: Model) -> None:
    """Copy the images into a folder per channel; images that are not files of their own are saved as PNG."""
    digits, missing = len(str(max(stage.channels))), 0
    for row, channel in enumerate(stage.channels):
        ranks = range(0) if stage.dead_S[row] else stage.images(row)
        for rank in ranks:
            model.work.check()
            target = folder / f"channel-{channel:0{digits}d}"
            target.mkdir(parents=True, exist_ok=True)
            prefix = f"{rank + 1:0{len(str(len(ranks)))}d}-"
            missing += not _copy_image(source, int(stage.indices_SK[row, rank]), target, prefix)
    if missing:
        model.work.reporter.warn(f"{count_of(missing, 'image')} of {stage.stage} can't be read any more and was not copied")


def _copy_image(source: ImageSource, index: int, folder: Path, prefix: str) -> bool:
    """Copy an image; return whether it could be read."""
    path, name = source.path(index), file_name(source.name(index))
    try:
        if path is not None:
            shutil.copyfile(path, folder / f"{prefix}{name}")
        else:
            Image.fromarray(decode(source.read(index))).save(folder / f"{prefix}{name.removesuffix('.png')}.png")
    except (FileNotFoundError, UnreadableImage):
        return False
    return True


def file_name(name: str) -> str:
    """Return the name of an image as a file name: folders joined by `__`, without characters that file systems refuse."""
    name = printable(name).translate(NOT_IN_NAMES)
    while len(name.encode()) > LONGEST_NAME:
        name = name[1:]
    return name
