"""`deepcluster import`: a run folder of another program's model, or a table of the clusters that the 2018 release kept.

N images.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.files import check_file, output_path, save_tensors, user_path, write_table
from deepcluster.core.pickles import read_plain_pickle
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of, size
from deepcluster.interop.loading import load
from deepcluster.interop.release2018_files import image_folder
from deepcluster.run.folder import CHECKPOINT_FORMAT, RunFolder
from deepcluster.run.runs import Run
from deepcluster.run.space import space_state

TABLE = ".parquet"
MOST_BYTES = 4 << 30


def import_file(
    file: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    epoch: int | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Make a run folder of another program's model, or a table (`name`, `cluster`) of clusters of the 2018 release.

    Args:
        file: a file or folder that `load` opens; or, for a table, the log `clusters` of the 2018 code, or a list of (path,
            cluster) as published with the release.
        out: the run folder; or the table (.parquet).
        data: folder of class folders that the clusters are of. The log holds numbers of images in ImageFolder's order.
        epoch: epoch of the log, counted from 1; the last one by default.
        overwrite: delete the run in `out` first.
        reporter: prints what was made.

    Returns:
        the run (a path with what is in it), or the path of the table.

    Raises:
        InputError: the file, the data or `out` can't be used.
    """
    reporter = reporter or Reporter()
    if user_path(out).suffix == TABLE:
        table = output_path(out, "--out", endings=(TABLE,))
        names, clusters_N = _clusters_of(user_path(file), None if data is None else user_path(data), epoch)
        write_table({"name": names, "cluster": clusters_N}, table)
        used = np.unique(clusters_N[clusters_N >= 0])
        reporter.say(f"{table}: {count_of(len(names), 'image')} in {count_of(len(used), 'cluster')}")
        return table
    if data is not None or epoch is not None:
        raise InputError(
            f"--data and --epoch are for tables of clusters: name one with --out {Path(out).name or 'T'}.parquet"
        )
    return _import_model(str(file), RunFolder(user_path(out)), overwrite=overwrite, reporter=reporter)


def _import_model(name: str, folder: RunFolder, *, overwrite: bool, reporter: Reporter) -> Path:
    folder.check_free(resume=None, overwrite=overwrite)
    model = load(name)
    folder.create(overwrite=overwrite)
    about = f"{Path(name).name}, imported" + (f": {model.remark}" if model.remark else "")
    folder.write_config(model.settings, {}, {"description": about, "images": 0, "address": []})
    state: dict[str, Any] = {"settings": model.settings.as_dict(), "trunk": model.trunk.state_dict()}
    if not model.trained:
        state["imported"] = True
    if model.space is not None and model.assignment is not None:
        state["final"] = {"assignment": model.assignment.state_dict(), **space_state(model.space)}
    save_tensors(folder.last, {"format": CHECKPOINT_FORMAT, **state})
    reporter.say(f"{folder.path}: {about}")
    return Run(folder.path)


def _clusters_of(file: Path, data: Path | None, epoch: int | None) -> tuple[list[str], NDArray[np.int64]]:
    """Return names and clusters of a file of the release."""
    check_file(file)
    if file.stat().st_size > MOST_BYTES:  # The features that were published with the release have 21 GB.
        raise InputError(f"{file} has {size(file.stat().st_size)}: clusters take less than {size(MOST_BYTES)}")
    content = read_plain_pickle(file)
    if isinstance(content, list) and content and all(_is_pair(row) for row in content):
        if epoch is not None:
            raise InputError(f"{file} is a list of (path, cluster), of one epoch: leave out --epoch")
        names, clusters_N = [str(path) for path, _ in content], np.array([int(cluster) for _, cluster in content])
        return (names, clusters_N) if data is None else _under(data, names, clusters_N, file)
    if not _is_log(content):
        raise InputError(
            f"{file} holds no clusters: looked for a list of (path, cluster), or for the log `clusters`, a list of epochs, "
            "each a list of the images of each cluster"
        )
    if data is None:
        raise InputError(f"{file} holds numbers of images: give the folder of class folders they are of with --data")
    chosen = len(content) if epoch is None else epoch
    if not 1 <= chosen <= len(content):
        raise InputError(f"--epoch {chosen}: {file} has {count_of(len(content), 'epoch')}")
    names = _images_of(data)
    clusters_N = np.full(len(names), -1)
    for cluster, images in enumerate(content[chosen - 1]):
        if images and not 0 <= min(images) <= max(images) < len(names):
            raise InputError(
                f"{file} names image number {max(images)}, and {data} has {count_of(len(names), 'image')}: the clusters "
                "are of other data"
            )
        clusters_N[images] = cluster
    return names, clusters_N


def _images_of(data: Path) -> list[str]:
    """Return the images of a folder of class folders."""
    names, _ = image_folder(data)
    if not names:
        raise InputError(
            f"{data} has no class folders with images: --data is the folder of class folders that was trained on"
        )
    return names


def _is_pair(row: Any) -> bool:
    return isinstance(row, tuple | list) and len(row) == 2 and isinstance(row[0], str) and _is_number(row[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_log(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(epoch, list) for epoch in content)
        and all(isinstance(images, list) and all(map(_is_number, images)) for epoch in content for images in epoch)
    )


def _under(data: Path, names: list[str], clusters_N: NDArray[np.int64], file: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Return the images of a folder with their clusters, found by class folder and file name, whatever stands before."""
    known = {
        tuple(name.replace("\\", "/").split("/")[-2:]): cluster for name, cluster in zip(names, clusters_N, strict=True)
    }
    here = _images_of(data)
    found = np.array([known.get(tuple(name.split("/")[-2:]), -1) for name in here], np.int64)
    if not (found >= 0).any():
        raise InputError(f"none of the {len(here):,} images of {data} is in {file}, which names {names[0]}")
    return here, found
