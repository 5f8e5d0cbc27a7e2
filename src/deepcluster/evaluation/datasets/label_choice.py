"""Images that keep their label where few do: a balanced share, or a given list; and which of them are held out.

N images, M of them, C classes.
"""

import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of, of_line
from deepcluster.data.sources import ImageSource
from deepcluster.evaluation.datasets.labelled import some


def choose_labelled(labels_N: Tensor, share: float, seed: int) -> Tensor:
    """Return indices (M,), ascending, of a balanced part of the images: a function of `labels_N`, `share` and `seed`.

    Every class contributes the same number of images, at least one, or all it has if these are fewer; the number is the
    one whose total is nearest to `share` of N (the smaller of two equally near). The images of a class have one order per
    seed, and the first of them are taken: a smaller share is a subset of a larger one.

    Raises:
        InputError: the share is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise InputError(f"labels={share:g} is not a share of the labels: use 0.01 for 1 %, and at most 1")
    members = _members(labels_N)
    sizes_C = np.array([len(indices) for indices in members])
    totals = np.array([np.minimum(sizes_C, number).sum() for number in range(1, sizes_C.max() + 1)])
    number = int(np.abs(totals - share * len(labels_N)).argmin()) + 1
    taken = [_shuffled(indices, seed, label)[:number] for label, indices in enumerate(members)]
    return torch.from_numpy(np.sort(np.concatenate(taken)))


def hold_out(labels_M: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split M images into those to train on and those to choose by: two sets of positions, ascending.

    About `share` of each class is held out: at least one image, but never all. A class of one image, or of none, holds
    out none; if all classes are so, the second set is empty.
    """
    kept, held = [], []
    for label, positions in enumerate(_members(labels_M)):
        count = min(max(1, round(share * len(positions))), max(0, len(positions) - 1))
        mixed = _shuffled(positions, seed, label)
        held.append(mixed[:count])
        kept.append(mixed[count:])
    return torch.from_numpy(np.sort(np.concatenate(kept))), torch.from_numpy(np.sort(np.concatenate(held)))


def listed(source: ImageSource, file: Path) -> Tensor:
    """Return indices (M,), ascending, of the images that a text file names, one per line.

    A line is a path relative to the source, with or without folders above it, or the bare name of a file where no two
    images share it, as in the lists that SimCLR's repository publishes for ImageNet (1percent.txt, 10percent.txt). Blank
    lines and lines that begin with # are skipped; an image that is named twice counts once.

    Raises:
        InputError: the file can't be read or names nothing, or names images that are missing or ambiguous.
    """
    try:
        # File systems also return names that are not UTF-8 as surrogates.
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as fault:
        raise InputError(f"label_list={file} can't be read: {fault.strerror}") from None
    stripped = map(str.strip, re.split(r"\r\n|\r|\n", text))
    lines = [of_line(line) for line in stripped if line and not line.startswith("#")]
    if not lines:
        raise InputError(f"{file} names no images; write the name of one on each line")
    by_name = {source.name(index): index for index in range(len(source))}
    by_ending: dict[str, list[int]] = {}
    for name, index in by_name.items():
        # Without folders, and without the archive that contains it (`images.tar::000012.jpg`).
        by_ending.setdefault(re.split(r"/|::", name)[-1], []).append(index)
    found, missing, unclear = set[int](), list[str](), list[str]()
    for line in lines:
        parts = line.replace("\\", "/").split("/")
        # The image of that name, with as many of its folders as there are; or all files of that bare name.
        whole = (by_name.get("/".join(parts[first:])) for first in range(len(parts)))
        known = next((index for index in whole if index is not None), None)
        indices = [known] if known is not None else by_ending.get(line, []) if len(parts) == 1 else []
        if len(indices) == 1:
            found.add(indices[0])
        else:
            (unclear if indices else missing).append(line)
    if missing:
        these = f"{len(missing):,} of {count_of(len(lines), 'name')} {'is' if len(missing) == 1 else 'are'}"
        raise InputError(
            f"{file}: {these} not among the {len(source):,} training images: "
            f"{some(missing)}; they have names such as {source.name(0)}"
        )
    if unclear:
        raise InputError(
            f"{file}: {some(unclear)}: several training images have that name; write the folder too, as in {source.name(0)}"
        )
    return torch.tensor(sorted(found), dtype=torch.int64)


def _members(labels_N: Tensor) -> list[NDArray[np.int64]]:
    """Return the indices of the images of each class, up to the last one that has any."""
    labels = labels_N.numpy()
    return [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]


def _shuffled(indices: NDArray[np.int64], seed: int, label: int) -> NDArray[np.int64]:
    """Return the indices in an order that is a function of seed and class."""
    return np.random.default_rng([seed, label]).permutation(indices)
