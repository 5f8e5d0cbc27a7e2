"""What embed, assign and evaluate write, in one process or in each of several; imports little, for processes that start."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ranks_helper import At

import deepcluster
from deepcluster.core.distributed import joined
from deepcluster.core.errors import InputError
from deepcluster.evaluation import protocols
from deepcluster.run import parts as parts_module

# 15 parts of the 60 images, whatever the number of processes.
BATCH: dict[str, Any] = {"batch_size": 4, "device": "cpu", "workers": 0}


def write_all(model: Path, data: Path, out: Path, **options: Any) -> None:
    """Everything that embed and assign write, into a folder."""
    out.mkdir(exist_ok=True)
    options = {**BATCH, **options}
    unreadable = [
        deepcluster.embed(model, data, out=out / "e.parquet", **options).unreadable,
        deepcluster.embed(model, data, out=out / "e.npy", stage="conv1", **options).unreadable,
        deepcluster.embed(model, data, out=out / "e", parts=True, **options).unreadable,
        deepcluster.assign(model, data, out=out / "c.parquet", folders=out / "links", **options).unreadable,
        deepcluster.assign(model, data, out=out / "c", parts=True, **options).unreadable,
        deepcluster.embed(model, data, out=out / "few.parquet", limit=1, **options).unreadable,
    ]
    if any(unreadable):
        (out / "unreadable.json").write_text(json.dumps(unreadable[0]))
        assert all(one == unreadable[0] for one in unreadable[:-1])


def contents(folder: Path) -> dict[str, bytes]:
    """What files, and the targets of links, below a folder are."""
    found = {path: str(path.readlink()).encode() if path.is_symlink() else path.read_bytes() for path in files(folder)}
    return {path.relative_to(folder).as_posix(): content for path, content in found.items()}


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink())


def work_of_ranks(model: Path, data: Path, classes: Path, folder: Path) -> None:
    """What each of several processes does in a test: it writes all, extracts features, and is refused twice."""
    write_all(model, data, folder / "out")
    if protocols.prepare_all(model, classes, only=["knn", "clusters"], device="cpu", workers=0):
        (folder / "extracted").touch()
    with joined() as ranks:
        rank = ranks.rank
    # A folder of its own, as on machines that share nothing; then other images.
    parts_module.SEEN_SECONDS = 0.2
    own = folder / str(rank)
    own.mkdir()
    shutil.copy(sorted(data.iterdir())[rank], own)
    for number, (images, out) in enumerate(((data, own / "e.parquet"), (own, folder / "e.parquet"))):
        try:
            deepcluster.embed(model, images, out=out, **BATCH)
        except InputError as fault:
            (folder / f"refusal {number} of {rank}").write_text(str(fault))


def die_in_the_third_part(model: Path, data: Path, out: Path) -> None:
    """Begin a table, until the first of several processes dies."""

    class Dying(At):
        def act(self) -> None:
            os._exit(9)

    # The other processes print nothing.
    deepcluster.embed(model, data, out=out, reporter=Dying("features", 3), **BATCH)
