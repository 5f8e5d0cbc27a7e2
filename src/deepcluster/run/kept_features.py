"""Frozen features of images for evaluation, kept in files of the cache by content.

N images, B batch, D features.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.device import free_disk_bytes
from deepcluster.core.errors import InputError
from deepcluster.core.files import locked, written_beside
from deepcluster.core.text import count_of, size
from deepcluster.data.sources import ImageSource
from deepcluster.run.features import FEATURE_BATCH, Pooled
from deepcluster.run.model import Model, data_key
from deepcluster.run.parts import join_to_array
from deepcluster.run.passes import Pass
from deepcluster.run.resumable import FOLDER as UNFINISHED_FOLDER
from deepcluster.run.resumable import digest_of

FEATURES_FOLDER = "features"
# Bytes left free on the disk of the cache.
DISK_RESERVE = 2 << 30


def kept_rows(
    model: Model, source: ImageSource, wanted: Sequence[Pooled], *, batch_size: int = FEATURE_BATCH
) -> dict[Pooled, Tensor]:
    """Return frozen features of the centre view of each image, extracted in one pass and kept on disk by content.

    Args:
        batch_size: images per batch, on which the last digits depend.

    Returns:
        for each of `wanted` rows (N, D), bfloat16 or float32, on the CPU; NaN for unreadable images. They may lie in a
        file: read them in parts where N × D is large, and do not write to them.
    """
    ranks = model.work.ranks
    keys = ranks.from_main(lambda: _keys(model, source, wanted, batch_size))
    files = {one: model.cache / FEATURES_FOLDER / f"{key}.npy" for one, key in zip(wanted, keys, strict=True)}
    missing = ranks.from_main(lambda: [one for one in files if not files[one].is_file()])
    made = _extract_all(model, source, {one: files[one] for one in missing}, batch_size) if missing else {}
    kept = [file for one, file in files.items() if one not in made]
    seen = ranks.gather_objects(all(file.is_file() for file in kept))
    if not all(seen):
        raise InputError(
            f"process {seen.index(False)} does not see the features in {kept[0].parent}: set DEEPCLUSTER_CACHE to a folder "
            "that all machines share"
        )
    return {one: made[one] if one in made else _mapped(files[one]) for one in wanted}


def are_kept(model: Model, source: ImageSource, wanted: Pooled) -> bool:
    """Return whether features are there already."""
    return rows_if_kept(model, source, wanted) is not None


def rows_if_kept(model: Model, source: ImageSource, wanted: Pooled, *, batch_size: int = FEATURE_BATCH) -> Tensor | None:
    """Return the rows (N, D) of `kept_rows` where an earlier command has kept them, and all processes see them."""
    ranks = model.work.ranks
    [key] = ranks.from_main(lambda: _keys(model, source, [wanted], batch_size))
    file = model.cache / FEATURES_FOLDER / f"{key}.npy"
    return _mapped(file) if all(ranks.gather_objects(file.is_file())) else None


def from_kept(model: Model, one: Pass, source: ImageSource, stage: str) -> Pass:
    """Return a pass over rows of a stage; it takes those that an earlier command has kept, and reads no image then."""
    kept_ND = rows_if_kept(model, source, Pooled(stage), batch_size=one.batch_size)
    if kept_ND is not None:
        model.work.reporter.say(f"the features of these {count_of(len(source), 'image')} are kept: none is read again")
    return replace(one, kept_ND=kept_ND)


def _keys(model: Model, source: ImageSource, wanted: Sequence[Pooled], batch_size: int) -> list[str]:
    batch = () if batch_size == FEATURE_BATCH else (batch_size,)
    facts = (model.weights, data_key(source), model.image_size, model.settings.reduce_to, *batch)
    texts = ("\n".join(map(str, (*facts, one, "features-2"))) for one in wanted)
    return [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]


def _extract_all(model: Model, source: ImageSource, files: dict[Pooled, Path], batch_size: int) -> dict[Pooled, Tensor]:
    """Extract features into files of the cache; return those that are in memory, because the disk has no room."""
    names, ranks = {one: file.stem for one, file in files.items()}, model.work.ranks
    kind = model.machine.feature_dtype
    blank = {one: torch.full((width,), torch.nan, dtype=kind) for one, width in model.widths(list(files)).items()}
    empty = {names[one]: _for_numpy(row_D).numpy() for one, row_D in blank.items()}

    def compute(images_BCHW: Tensor) -> dict[str, Tensor]:
        made = model.extract(images_BCHW, list(files)).items()
        return {names[one]: _for_numpy(rows_BD.to("cpu", kind)) for one, rows_BD in made}

    one = Pass(empty, compute, model.view, batch_size, ("rows", *names.values()))
    total = one.row_bytes * len(source)
    folder = model.cache / FEATURES_FOLDER
    # The parts, and what is made of them.
    if not ranks.from_main(lambda: 2 * total + DISK_RESERVE < free_disk_bytes(folder)):
        room = f"the disk of {folder} has no room for features of {size(total)}, twice for a moment"
        if ranks.size > 1:
            raise InputError(f"{room}: set DEEPCLUSTER_CACHE to a folder on another disk, or use one process")
        model.work.reporter.warn(f"{room}: they are not kept")
        with model.loader(source) as loader:
            rows = one.in_memory(loader, model.work)
        return {pooled: torch.from_numpy(rows[name]).view(kind) for pooled, name in names.items()}
    unfinished = model.cache / UNFINISHED_FOLDER / digest_of(*names.values())
    with locked(unfinished) if ranks.is_main else nullcontext():
        if ranks.from_main(lambda: all(file.is_file() for file in files.values())):
            return {}  # Another evaluation, which this one waited for, has made them.
        parts = model.in_parts(one, source, unfinished, keep=True)
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as written:  # All files are renamed at the end, or deleted after an error.
                for pooled, file in files.items():
                    name = names[pooled]
                    join_to_array(parts, name, written.enter_context(written_beside(file)), empty[name], model.work)
            parts.delete()
        ranks.barrier()
    return {}


def readable(rows_ND: Tensor) -> Tensor:
    """Return which rows (N,) hold numbers: those of readable images."""
    return ~rows_ND[:, 0].isnan()


def _mapped(file: Path) -> Tensor:
    os.utime(file)  # The last use, which `cache info` shows.
    rows_ND = torch.from_numpy(np.load(file, mmap_mode="c"))
    return rows_ND.view(torch.bfloat16) if rows_ND.dtype == torch.int16 else rows_ND


def _for_numpy(rows: Tensor) -> Tensor:
    """Return rows in a type that NumPy has: the bits of bfloat16 as int16."""
    return rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows
