"""`main.py` of the 2018 release: DeepCluster on the images of a folder of class folders.

What it leaves in EXP (`--exp`, by default the current folder), as in 2018; old files are replaced:

    checkpoint.pth.tar                  the network after the last epoch: epoch, arch, state_dict, optimizer
    checkpoints/checkpoint_J.pth.tar    the same before training step J x CHECKPOINTS
    clusters                            a pickled list of epochs, each a list of K lists of numbers of images

and, of today's engine:

    deepcluster-images.csv              path and class of each image: line n + 2 is the image with number n in `clusters`
    deepcluster-run/                    a run folder, for `deepcluster report`, `assign`, `embed`, `evaluate` and `visualize`
"""

import argparse
import csv
import io
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepcluster.core.errors import DeepClusterError, InputError, Interrupted
from deepcluster.core.text import count_of

RUN, IMAGES, CHECKPOINT = "deepcluster-run", "deepcluster-images.csv", "checkpoint.pth.tar"
CLUSTERINGS = {"Kmeans": "kmeans", "PIC": "pic"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of 2018: its flags, abbreviations and defaults."""
    made = argparse.ArgumentParser(prog="main.py", description="PyTorch Implementation of DeepCluster")
    add = made.add_argument
    add("data", metavar="DIR", help="folder with a folder of images for each class")
    arch = "network to train (default: alexnet)"
    add("--arch", "-a", metavar="ARCH", choices=["alexnet", "vgg16"], default="alexnet", help=arch)
    add("--sobel", action="store_true", help="put fixed Sobel filters in front of the network")
    add("--clustering", choices=list(CLUSTERINGS), default="Kmeans", help="algorithm of the clusters (default: Kmeans)")
    add("--nmb_cluster", "--k", type=int, default=10000, help="number of clusters of Kmeans (default: 10000)")
    add("--lr", type=float, default=0.05, help="learning rate (default: 0.05)")
    add("--wd", type=float, default=-5, help="weight decay as a power of ten (default: -5)")
    length = "images per epoch, from one clustering to the next, as a multiple of their number (default: 1)"
    add("--reassign", type=float, default=1.0, help=length)
    add("--workers", type=int, default=4, help="processes that read images (default: 4)")
    add("--epochs", type=int, default=200, help="number of epochs (default: 200)")
    add("--start_epoch", type=int, default=0, help="number of the first epoch, from 0 (default: 0)")
    add("--batch", type=int, default=256, help="images per training step (default: 256)")
    add("--momentum", type=float, default=0.9, help="momentum of the network's SGD (default: 0.9)")
    add("--resume", metavar="PATH", default="", help="checkpoint to continue from (default: none)")
    add("--checkpoints", type=int, default=25000, help="training steps between two kept checkpoints (default: 25000)")
    add("--seed", type=int, default=31, help="random seed (default: 31)")
    add("--exp", default="", help="folder for what is written (default: the current one)")
    add("--verbose", action="store_true", help="print what is done")
    return made


def main(words: Sequence[str]) -> None:
    """Train as `main.py` does.

    Raises:
        InputError: a value, the images or the checkpoint can't be used.
        TrainingError: the loss is not finite, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM.
    """
    options = parser().parse_args(words)
    if options.checkpoints < 1 or options.start_epoch < 0:
        raise InputError(
            f"--checkpoints {options.checkpoints} must be 1 or more, and --start_epoch {options.start_epoch} 0 or more"
        )
    from deepcluster.interop.release2018.main_lines import in_terms_of_2018

    try:
        _train(options)
    except DeepClusterError as fault:
        resume = f"use --resume {Path(options.exp) / CHECKPOINT}"
        fault.args = (in_terms_of_2018(str(fault)).replace("use --resume", resume), *fault.args[1:])
        raise


def _train(options: argparse.Namespace) -> None:
    from deepcluster.core.files import output_path
    from deepcluster.interop.release2018.main_lines import Lines
    from deepcluster.interop.release2018.main_run import Release2018, Start
    from deepcluster.training import launch

    settings = training_settings(options)
    lines = Lines(verbose=options.verbose, batch=options.batch, silent=int(os.environ.get("RANK", "0")) > 0)
    lines.line(f"Architecture: {options.arch}")
    start = Start.read(options, lines)
    if start.epoch >= options.epochs:
        lines.alert(f"nothing to train: {start.epoch} epochs are done, and --epochs is {options.epochs}")
        return
    begun, exp = time.monotonic(), output_path(options.exp or ".", "--exp", is_folder=True)
    listing, is_new_folder, is_new = exp / IMAGES, not exp.exists(), not (exp / IMAGES).exists()
    _list_images(Path(options.data), options, listing)
    lines.line(f"Load dataset: {time.monotonic() - begun:.2f} s")
    observer = Release2018(exp, options, lines, start)
    try:
        launch.train(
            listing,
            out=exp / RUN,
            user_options=settings,
            resume=False,
            overwrite=True,
            reporter=lines,
            evaluate={},
            observer=observer,
        )
    except Interrupted as fault:
        kept = f"--resume {exp / CHECKPOINT} continues after the last of them"
        done = f"{count_of(observer.epochs_done, 'epoch')} done" + (f": {kept}" if observer.epochs_done else "")
        raise Interrupted(f"{str(fault).partition(';')[0]}; {done}", fault.by) from fault
    except InputError:
        if is_new and not observer.has_begun:  # Nothing is left behind.
            listing.unlink(missing_ok=True)
            if is_new_folder:
                with suppress(OSError):
                    exp.rmdir()
        raise


def training_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was fixed or chosen in 2018 as settings, each of them, so that nothing is adapted to the images.

    Of the 256 components of the PCA as many are used as there are images for.

    Raises:
        InputError: a value is out of range.
    """
    from deepcluster.interop.release2018.common import weight_decay_of
    from deepcluster.run.settings import Settings

    chosen = Settings(
        recipe=f"paper-{options.arch}",
        arch=options.arch,
        sobel=options.sobel,
        clustering=CLUSTERINGS[options.clustering],
        # PIC finds the number itself.
        clusters=Settings.clusters if options.clustering == "PIC" else options.nmb_cluster,
        lr=options.lr,
        weight_decay=weight_decay_of(options.wd),
        epoch_length=options.reassign,
        workers=options.workers,
        epochs=max(1, options.epochs),
        batch_size=options.batch,
        momentum=options.momentum,
        seed=options.seed,
        sampling="as-published",
        precision="fp32",
        checkpoint_every=0,
    )
    return {name: value for name, value in chosen.as_dict().items() if name != "pca"}


def _list_images(root: Path, options: argparse.Namespace, listing: Path) -> None:
    """Write the table of the images in the order of their numbers in `clusters`.

    Raises:
        InputError: there are no class folders, no images in them, or too few for the clusters.
    """
    from deepcluster.core.files import written_beside
    from deepcluster.interop.release2018_files import IMAGE_FOLDER_ENDINGS, image_folder

    paths, classes = image_folder(root)
    if not classes:
        raise InputError(
            f"{root} has no class folders: main.py takes images from DIR/CLASS/ only; put them into one folder in it (any "
            f"name), or use `deepcluster train {root}`"
        )
    if not paths:
        raise InputError(
            f"no images in the {count_of(len(classes), 'class folder')} of {root}; looked for "
            f"{', '.join(IMAGE_FOLDER_ENDINGS)}"
        )
    if options.clustering == "Kmeans" and options.nmb_cluster > len(paths):
        raise InputError(
            f"--nmb_cluster {options.nmb_cluster} is more than the {count_of(len(paths), 'image')} of {root}; "
            f"use --nmb_cluster {len(paths)} or fewer"
        )
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("path", "label"))
    table.writerows((str(root.absolute() / path), path.partition("/")[0]) for path in paths)
    listing.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(listing) as beside:  # Each process that `torchrun` starts writes the same.
        beside.write_text(text.getvalue(), encoding="utf-8")
