"""`activ-retrieval.py` of 2018: copies of the images that excite each filter of a layer most, by the mean of its map."""

import shutil
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from deepcluster.core.progress import Reporter
from deepcluster.core.work import Work
from deepcluster.interop.release2018.common import check_layer, folder_of, needed, open_model, parser_of, say

if TYPE_CHECKING:
    from pathlib import Path

    from deepcluster.data.sources import ImageSource
    from deepcluster.visualization.best_images import StageImages, TopImages

SCRIPT = "activ-retrieval.py"
BATCH_SIZE, LINE_BATCHES = 256, 100


def parser() -> ArgumentParser:
    """Return the parser of the script."""
    parser, arguments = parser_of(SCRIPT, "Retrieve images with maximal activations")
    arguments.add_argument("--data", help="folder of the images, in class folders")
    arguments.add_argument("--model", help="path of the model")
    arguments.add_argument("--conv", type=int, default=1, help="convolutional layer, counted from 1")
    arguments.add_argument("--exp", default="", help="folder of the copies")
    arguments.add_argument("--count", type=int, default=9, help="images per filter; 0 or less: all of them")
    arguments.add_argument("--workers", type=int, default=4, help="processes that load images (default: 4)")
    return parser


def main(arguments: list[str]) -> None:
    """Copy the best images of every channel to `convN/layerN-channelC/POS_NAME`.

    Raises:
        InputError: the model, the data or an option can't be used.
        Interrupted: the images are searched again by the next call.
    """
    args = parser().parse_args(arguments)
    data = needed(args.data, "--data", "name a folder of images")
    from deepcluster.data.sources import open_source
    from deepcluster.visualization.best_images import find_top_images
    from deepcluster.visualization.options import TopImagesOptions

    advice = "nothing is kept of the search: run the same command again"
    with open_model(args.model, workers=args.workers, advice=advice) as model:
        check_layer(model, args.conv)
        source = open_source(data, on_trouble=model.work.reporter.warn)
        count = min(args.count, len(source)) if args.count > 0 else len(source)
        folder = folder_of(args.exp) / f"conv{args.conv}"
        lines = replace(model, work=Work(BatchLines(), model.work.interruption))
        options = TopImagesOptions(stage=f"conv{args.conv}", count=count, rank="mean")
        copy_images(find_top_images(lines, source, options, batch_size=BATCH_SIZE), folder, args.conv, count)


class BatchLines(Reporter):
    """Prints the number of a batch now and then, and warnings."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    @contextmanager
    def track(self, what: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
        """Yield a function that is called with the number of images of a batch."""
        batch = 0

        def advance(images: int) -> None:
            nonlocal batch
            if total is not None and batch % LINE_BATCHES == 0:
                say(f"{batch}/{-(-total // BATCH_SIZE)}")
            batch += 1

        yield advance


def copy_images(top: "TopImages", folder: "Path", conv: int, count: int) -> None:
    """Copy the best `count` images of each channel."""
    [stage] = top.stages
    bad = len(top.unreadable)
    if bad:
        top.model.work.reporter.warn(f"{bad} of {len(top.source)} images can't be read and are left out")
    for row, channel in enumerate(stage.channels):
        target = folder / f"layer{conv}-channel{channel}"
        target.mkdir(parents=True, exist_ok=True)
        for position, index in enumerate(_ranked(stage, row, top, count)):
            top.model.work.check()
            _copy(top.source, index, target, position)


def _ranked(stage: "StageImages", row: int, top: "TopImages", count: int) -> list[int]:
    """Return the best images of the channel in this row; after those that excite it come others, the last ones first."""
    found: list[int] = stage.indices_SK[row, : len(stage.images(row))].tolist()
    missing, there = count - len(found), {*found, *top.unreadable}
    others = (index for index in reversed(range(len(top.source))) if index not in there)
    return found + [index for _, index in zip(range(missing), others, strict=False)]


def _copy(source: "ImageSource", index: int, target: "Path", position: int) -> None:
    """Copy an image; one that is not a file of its own is saved as PNG."""
    from PIL import Image

    from deepcluster.data.decode import decode

    path, name = source.path(index), source.name(index).rpartition("/")[2]
    if path is not None:
        shutil.copyfile(path, target / f"{position}_{name}")
    else:
        Image.fromarray(decode(source.read(index))).save(target / f"{position}_{name.removesuffix('.png')}.png")
