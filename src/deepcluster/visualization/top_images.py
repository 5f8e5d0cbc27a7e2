"""`visualize top-images`: the images of a data set that excite the filters of a trunk most.

The folder of a stage holds pages of pictures, and a JSON file with names, scores and boxes. H and W pixels.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.files import check_new_folder, mark_as_ours, user_path, write_whole
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of, printable
from deepcluster.data.decode import decode
from deepcluster.data.loader import image_threads
from deepcluster.data.sources import open_source
from deepcluster.interop.loading import loaded, new_interruption
from deepcluster.run.folder import RunFolder
from deepcluster.run.model import Model
from deepcluster.visualization.best_images import StageImages, TopImages, find_top_images
from deepcluster.visualization.grid import ACROSS, Box, image_tile, page_of, photo_box
from deepcluster.visualization.options import TopImagesOptions
from deepcluster.visualization.stages import pictures_folder

PAGE, ROWS_PER_PAGE = "pairs", 32
NOT_IN_NAMES = str.maketrans({**dict.fromkeys('<>:"\\|?*', "_"), **dict.fromkeys(map(chr, range(32)), "_"), "/": "__"})
# An image of a channel: its entry in the JSON file, its picture and its caption.
Drawn = tuple[dict[str, Any], NDArray[np.uint8], str]


def top_images(
    model: str | Path | Model,
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    out: str | Path | None = None,
    copies: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> list[Path]:
    """Find the images that excite each filter most, as `deepcluster visualize top-images` does.

    Args:
        model: whatever `load` opens, or its result.
        data: the images to search; by default those of the run.
        out: folder of the pictures, with a folder per stage; RUN/visualization/top-images by default.
        copies: a new or empty folder for copies of the images, with a folder per filter.
        device, workers, reporter: where to compute, processes that prepare images, what shows progress (quiet by default).
        options: fields of `deepcluster.visualization.options.TopImagesOptions`.

    Returns:
        the `top-images.json` of each stage, which names its pictures.

    Raises:
        InputError: model, data, options or folder can't be used.
        Interrupted: Ctrl-C or SIGTERM; the images are searched again by the next call.
    """
    checked, reporter = TopImagesOptions.from_dict(options), reporter or Reporter(quiet=True)
    if copies is not None:
        copies = user_path(copies)
        check_new_folder(copies, "--copies")
    interruption = new_interruption("nothing is kept of the search: run the same command again")
    with interruption.listening():
        model = loaded(model, device=device, workers=workers, reporter=reporter, interruption=interruption)
        folder = pictures_folder(model, "top-images", out)
        data, limit = (data, None) if data is not None else (_images_of_run(model), model.settings.limit)
        top = find_top_images(model, open_source(data, limit, on_trouble=reporter.warn), checked)
        name = ", ".join(map(str, [data] if isinstance(data, str | Path) else data))
        return save_top_images(top, folder, data=name, copies=copies)


def _images_of_run(model: Model) -> list[str]:
    """Return where the images of a run were when it was started."""
    folder = RunFolder(Path(model.name))
    if not folder.is_run():
        raise InputError(f"{model.name} is not a run folder, whose images would be searched: name images with --data")
    address: list[str] = folder.read_config()["data"].get("address") or []
    if not address:
        raise InputError(f"{folder.config} does not say where the images are: name them with --data")
    return address


def save_top_images(top: TopImages, folder: Path, *, data: str, copies: Path | None = None) -> list[Path]:
    """Write `pairs-1.png`, … and finally `top-images.json` to `folder`/STAGE of each stage; return the JSON files.

    Args:
        data: the source as the user named it.
        copies: a new or empty folder for copies of the images: STAGE/channel-CHANNEL/RANK-NAME.

    Raises:
        InputError: `folder` is a file, or `copies` can't be used.
    """
    if copies is not None:
        check_new_folder(copies, "--copies")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the pictures")
    written = []
    for stage in top.stages:
        written.append(_save_stage(top, stage, folder / stage.stage, data))
        if copies is not None:
            copies.mkdir(parents=True, exist_ok=True)
            mark_as_ours(copies)
            _copy(top, stage, copies / stage.stage)
    return written


def _save_stage(top: TopImages, stage: StageImages, folder: Path, data: str) -> Path:
    """Write the pages and the JSON file of a stage; return the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    mark_as_ours(folder)
    file = folder / "top-images.json"
    # Version 0.1.0 also wrote pages called blocks.
    for old in (file, *folder.glob(f"{PAGE}-*.png"), *folder.glob("blocks-*.png")):
        old.unlink(missing_ok=True)
    rows, size = np.flatnonzero(~stage.dead_S).tolist(), max(1, ROWS_PER_PAGE // ceil(top.options.count / ACROSS))
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    pages: list[dict[str, Any]] = []
    channels: dict[int, list[dict[str, Any]]] = {}
    with top.model.work.track(f"pictures of {stage.stage}", len(rows), unit="channels") as advance:
        for number, part in enumerate(parts, 1):
            drawn = _draw_images(top, stage, part)
            name = f"{PAGE}-{number:0{len(str(len(parts)))}d}.png"
            page_of({channel: [one[1:] for one in images] for channel, images in drawn.items()}).save(folder / name)
            pages.append({"channels": list(drawn), PAGE: name})
            channels |= {channel: [entry for entry, _, _ in images] for channel, images in drawn.items()}
            advance(len(part))
    facts = {
        "stage": stage.stage,
        "model": top.model.name,
        "weights": top.model.weights,
        "data": data,
        "images": len(top.source) - len(top.unreadable),
        "unreadable": len(top.unreadable),
        "count": top.options.count,
        "rank": top.options.rank,
        "image_size": stage.image_size,
        "receptive_field": {"size": stage.field.size, "stride": stage.field.stride, "offset": stage.field.offset},
        "pages": pages,
        "dead": [channel for channel, dead in zip(stage.channels, stage.dead_S, strict=True) if dead],
        "channels": channels,
    }
    write_whole(file, json.dumps(facts, indent=1) + "\n")
    return file


def _draw_images(top: TopImages, stage: StageImages, rows: Sequence[int]) -> dict[int, list[Drawn]]:
    """Return the images of the channel in each row, best first. Each photo is decoded once, and soon dropped."""
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for row in rows:
        for rank in stage.images(row):
            places[int(stage.indices_SK[row, rank])].append((row, rank))

    def draw(index: int) -> dict[tuple[int, int], Drawn]:
        try:
            photo_HWC = decode(top.source.read(index))
        except UnreadableImage:
            photo_HWC = None
        return {place: _draw(top, stage, *place, photo_HWC) for place in places[index]}

    drawn: dict[tuple[int, int], Drawn] = {}
    with image_threads(max(1, top.model.workers)) as pool:
        for made in pool.map(draw, sorted(places)):
            drawn |= made
    return {stage.channels[row]: [drawn[row, rank] for rank in stage.images(row)] for row in rows}


def _draw(top: TopImages, stage: StageImages, row: int, rank: int, photo_HWC: NDArray[np.uint8] | None) -> Drawn:
    """Draw the image at this rank of the channel in this row; `photo_HWC` is None if it can't be read any more."""
    size, score = stage.image_size, float(stage.scores_SK[row, rank])
    name = top.source.name(int(stage.indices_SK[row, rank]))
    down, across = stage.cells_SK2[row, rank].tolist()
    view_box, box = stage.field.box(down, across, size), None
    view: Box = (0, 0, size, size)
    part: Box = view_box
    if photo_HWC is not None:
        height, width = photo_HWC.shape[:2]
        reduce_to = top.model.settings.reduce_to
        view, part = (photo_box(one, top.model.view, height, width, reduce_to=reduce_to) for one in (view, part))
        # The pixels that the receptive field touches.
        box = [max(0, floor(part[0])), max(0, floor(part[1])), min(width, ceil(part[2])), min(height, ceil(part[3]))]
    # A receptive field as wide as the view omits a strip at most: the patch would show the whole image again.
    tile = image_tile(photo_HWC, view, part, patch=stage.field.size < size)
    number = f"{score:.2f}" if abs(score) >= 1 else f"{score:.3g}"
    entry = {"name": name, "score": score, "box": box, "view_box": list(view_box)}
    return entry, tile, f"{number} · {printable(name).rpartition('/')[2]}"


def _copy(top: TopImages, stage: StageImages, folder: Path) -> None:
    """Copy the images into a folder per channel; images that are not files of their own are saved as PNG."""
    digits, missing = len(str(max(stage.channels))), 0
    for row, channel in enumerate(stage.channels):
        target = folder / f"channel-{channel:0{digits}d}"
        indices = [] if stage.dead_S[row] else stage.indices_SK[row, : len(stage.images(row))].tolist()
        for rank, index in enumerate(indices, 1):
            top.model.work.check()
            target.mkdir(parents=True, exist_ok=True)
            path, name = top.source.path(index), f"{rank:0{len(str(len(indices)))}d}-{file_name(top.source.name(index))}"
            try:
                if path is not None:
                    shutil.copyfile(path, target / name)
                else:
                    Image.fromarray(decode(top.source.read(index))).save(target / f"{name.removesuffix('.png')}.png")
            except (FileNotFoundError, UnreadableImage):
                missing += 1
    if missing:
        gone = f"{count_of(missing, 'image')} of {stage.stage}"
        top.model.work.reporter.warn(f"{gone} can't be read any more and was not copied")


def file_name(name: str) -> str:
    """Return the name of an image as a file name: folders joined by `__`, without characters that file systems refuse."""
    name = printable(name).translate(NOT_IN_NAMES)
    while len(name.encode()) > 200:
        name = name[1:]
    return name
