"""Files of the best images: pages of pictures, a JSON file with names, scores and boxes, and copies of the images.

H and W pixels.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from deepcluster.visualization.top_images.pages import ACROSS, CHANNELS_A_PAGE, Shown, blocks_page, pairs_page, show
from deepcluster.visualization.top_images.photos import Box, photo_box
from deepcluster.visualization.top_images.search import StageImages, TopImages

JSON_FILE = "top-images.json"
# What a page is called: each image with its patch, and squares of images.
PAIRS, BLOCKS = "pairs", "blocks"
LONGEST_NAME = 200
NOT_IN_NAMES = str.maketrans({**dict.fromkeys('<>:"\\|?*', "_"), **dict.fromkeys(map(chr, range(32)), "_"), "/": "__"})


def save_top_images(
    top: TopImages, source: ImageSource, folder: Path, model: Model, *, data: str, copies: Path | None = None
) -> list[Path]:
    """Write, in `folder`/STAGE of each stage, `pairs-1.png`, `blocks-1.png`, … and last of all `top-images.json`.

    Args:
        source: the images that were searched.
        data: as the person named them.
        copies: a new or empty folder for copies of the images: STAGE/channel-CHANNEL/RANK-NAME.

    Returns:
        the JSON file of each stage; it names the pages.

    Raises:
        InputError: `folder` is a file, or `copies` can't be used.
        Interrupted: the person stopped it.
    """
    if copies is not None:
        check_copies_folder(copies)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the pictures")
    written = []
    for stage in top.stages:
        there = folder / stage.stage
        there.mkdir(parents=True, exist_ok=True)
        written.append(_save_stage(stage, top, source, there, model, data))
        if copies is not None:
            _copy(stage, source, copies / stage.stage, model)
    return written


def check_copies_folder(folder: Path) -> None:
    """Raise `InputError` unless the folder is empty, or can be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--copies {folder} is not an empty folder; name one that does not exist yet")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--copies {folder}: {parent} is a file or can't be written to")


def _save_stage(stage: StageImages, top: TopImages, source: ImageSource, folder: Path, model: Model, data: str) -> Path:
    for old in (folder / JSON_FILE, *folder.glob(f"{PAIRS}-*.png"), *folder.glob(f"{BLOCKS}-*.png")):
        old.unlink(missing_ok=True)
    rows = [row for row, dead in enumerate(stage.dead_S.tolist()) if not dead]
    channels: dict[str, list[dict[str, Any]]] = {}
    pages = []
    most = max(1, CHANNELS_A_PAGE // ceil(top.count / ACROSS))
    parts = [rows[first : first + most] for first in range(0, len(rows), most)]
    with model.work.reporter.track(f"pictures of {stage.stage}", len(rows), unit="channels") as progress:
        for number, part in enumerate(parts, 1):
            model.work.interruption.check()
            entries, shown = _page(stage, part, source, top.reduce_to, model.workers)
            channels |= {str(stage.channels[row]): list(entries[row]) for row in part}
            files = {kind: f"{kind}-{number:0{len(str(len(parts)))}d}.png" for kind in (PAIRS, BLOCKS)}
            _draw(stage, part, shown, folder / files[PAIRS], folder / files[BLOCKS])
            pages.append({"channels": [stage.channels[row] for row in part], **files})
            progress(len(part))
    facts = {
        "stage": stage.stage,
        "model": model.name,
        "weights": model.weights,
        "data": data,
        "images": len(source) - len(top.unreadable),
        "unreadable": len(top.unreadable),
        "count": top.count,
        "rank": top.rank,
        "image_size": stage.image_size,
        "receptive_field": {"size": stage.field.size, "stride": stage.field.stride, "offset": stage.field.offset},
        "pages": pages,
        "dead": [channel for channel, dead in zip(stage.channels, stage.dead_S.tolist(), strict=True) if dead],
        "channels": channels,
    }
    file = folder / JSON_FILE
    write_whole(file, json.dumps(facts, indent=1) + "\n")
    return file


@dataclass(frozen=True)
class _Use:
    """That an image is number `rank` of the channel in `row`."""

    row: int
    rank: int
    view_box: tuple[int, int, int, int]
    score: float


def _page(
    stage: StageImages, rows: Sequence[int], source: ImageSource, reduce_to: int, workers: int
) -> tuple[dict[int, list[dict[str, Any]]], dict[int, list[Shown]]]:
    """Entries of the JSON file and pictures, by row; each image is decoded once, and let go with its pictures made."""
    uses: dict[int, list[_Use]] = defaultdict(list)
    for row in rows:
        for rank in stage.images(row):
            use = _Use(row, rank, stage.view_box(row, rank), float(stage.scores_SK[row, rank]))
            uses[int(stage.indices_SK[row, rank])].append(use)
    entries: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    shown: dict[int, dict[int, Shown]] = defaultdict(dict)
    with image_threads(max(1, workers)) as pool:
        make = partial(_uses_of_image, source, stage.image_size, reduce_to)
        for made in pool.map(make, sorted(uses), [uses[index] for index in sorted(uses)]):
            for use, entry, one in made:
                entries[use.row][use.rank], shown[use.row][use.rank] = entry, one
    return (
        {row: [entries[row][rank] for rank in stage.images(row)] for row in rows},
        {row: [shown[row][rank] for rank in stage.images(row)] for row in rows},
    )


def _uses_of_image(
    source: ImageSource, image_size: int, reduce_to: int, index: int, uses: Sequence[_Use]
) -> list[tuple[_Use, dict[str, Any], Shown]]:
    photo_HWC = _photo(source, index)
    name = source.name(index)
    made = []
    for use in uses:
        view: Box = (0, 0, image_size, image_size)
        part: Box = use.view_box
        box = None
        if photo_HWC is not None:
            height, width = photo_HWC.shape[:2]
            view, part = (photo_box(one, image_size, height, width, reduce_to=reduce_to) for one in (view, part))
            box = whole_pixels(part, height, width)
        caption = f"{_number(use.score)} · {printable(name).rpartition('/')[2]}"
        entry = {"name": name, "score": use.score, "box": box, "view_box": list(use.view_box)}
        made.append((use, entry, show(photo_HWC, view, part, caption)))
    return made


def _photo(source: ImageSource, index: int) -> NDArray[np.uint8] | None:
    try:
        return decode(source.read(index))
    except UnreadableImage:  # it was readable before
        return None


def whole_pixels(box: Box, height: int, width: int) -> list[int]:
    """The pixels of a photo that a box touches: left, top, right, bottom."""
    left, top, right, bottom = box
    return [max(0, floor(left)), max(0, floor(top)), min(width, ceil(right)), min(height, ceil(bottom))]


def _draw(stage: StageImages, rows: Sequence[int], shown: dict[int, list[Shown]], pairs: Path, blocks: Path) -> None:
    numbers, images = [stage.channels[row] for row in rows], [shown[row] for row in rows]
    # A field as wide as the view leaves out a strip at most: the patch would be the whole image again.
    patches = stage.field.size < stage.image_size
    pairs_page(numbers, images, patches=patches).save(pairs)
    blocks_page(images, [_score_range(stage, row) for row in rows]).save(blocks)


def _score_range(stage: StageImages, row: int) -> str:
    last = stage.images(row)[-1]
    first, least = (_number(float(stage.scores_SK[row, rank])) for rank in (0, last))
    return f"channel {stage.channels[row]} · {first} to {least}"


def _number(score: float) -> str:
    return f"{score:.2f}" if abs(score) >= 1 else f"{score:.3g}"


def _copy(stage: StageImages, source: ImageSource, folder: Path, model: Model) -> None:
    """Copies of the images in a folder for each channel; images that are not files of their own are written as PNG."""
    digits = len(str(max(stage.channels)))
    gone = 0
    for row, channel, rank, index in _ranked(stage):
        model.work.interruption.check()
        there = folder / f"channel-{channel:0{digits}d}"
        there.mkdir(parents=True, exist_ok=True)
        beginning = f"{rank + 1:0{len(str(len(stage.images(row))))}d}-"
        gone += not _copy_image(source, index, there, beginning)
    if gone:
        model.work.reporter.warn(
            f"{count_of(gone, 'image')} of {stage.stage} can't be read any more: there is no copy of them"
        )


def _ranked(stage: StageImages) -> Iterator[tuple[int, int, int, int]]:
    """Row, channel, rank and index of every image that is shown."""
    for row, channel in enumerate(stage.channels):
        if not stage.dead_S[row]:
            for rank in stage.images(row):
                yield row, channel, rank, int(stage.indices_SK[row, rank])


def _copy_image(source: ImageSource, index: int, folder: Path, beginning: str) -> bool:
    """Whether the image could be copied."""
    path, name = source.path(index), file_name(source.name(index))
    try:
        if path is not None:
            shutil.copyfile(path, folder / f"{beginning}{name}")
        else:
            photo_HWC = decode(source.read(index))
            Image.fromarray(photo_HWC).save(folder / f"{beginning}{name.removesuffix('.png')}.png")
    except (FileNotFoundError, UnreadableImage):
        return False
    return True


def file_name(name: str) -> str:
    """The name of an image as that of a file: its folders joined by `__`, without what file systems refuse."""
    name = printable(name).translate(NOT_IN_NAMES)
    while len(name.encode()) > LONGEST_NAME:
        name = name[1:]
    return name
