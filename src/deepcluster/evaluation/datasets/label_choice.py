"""Which training images keep their label: a balanced share, or a given list; and which of them are held out.

N images, M of them, C classes.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.data.sources import ImageSource

# What a message names of many names.
NAMED = 3


def choose_labelled(labels_N: Tensor, share: float, seed: int) -> Tensor:
    """Indices (M,) in rising order of a balanced part of the images, a function of `share` and `seed` alone.

    Every class gives the same number of images, at least one, or all that it has where these are fewer; the number is the
    one whose total is nearest to `share` of N (the smaller of two that are as near). The images of a class have one order
    for a seed, and the first of them are taken: a smaller share is a part of a larger one.

    Raises:
        InputError: the share is not over 0 and at most 1.
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
    """Split M images into those to learn from and those to choose by: two sets of positions, in rising order.

    Of each class about `share` is held out: at least one image, and never the last one. A class of one image, or of none,
    holds out none; where all are so, the second set is empty.
    """
    kept, held = [], []
    for label, positions in enumerate(_members(labels_M)):
        count = min(max(1, round(share * len(positions))), max(0, len(positions) - 1))
        mixed = _shuffled(positions, seed, label)
        held.append(mixed[:count])
        kept.append(mixed[count:])
    return torch.from_numpy(np.sort(np.concatenate(kept))), torch.from_numpy(np.sort(np.concatenate(held)))


def listed(source: ImageSource, file: Path) -> Tensor:
    """Indices (M,) in rising order of the images that a text file names, one a line.

    A line is a path relative to the source, with or without folders above it, or the bare name of a file where no two
    images share it, as in the lists that SimCLR's repository publishes for ImageNet (1percent.txt, 10percent.txt). Blank
    lines and lines that begin with # are skipped; an image that is named twice counts once.

    Raises:
        InputError: the file can't be read or names nothing, or names images that are not there or can't be told apart.
    """
    lines = _lines(file)
    by_name = {source.name(index): index for index in range(len(source))}
    by_ending: dict[str, list[int]] = {}
    for name, index in by_name.items():
        by_ending.setdefault(_bare(name), []).append(index)
    found: set[int] = set()
    missing: list[str] = []
    unclear: list[str] = []
    for line in lines:
        indices = _indices_of(line, by_name, by_ending)
        if len(indices) == 1:
            found.add(indices[0])
        else:
            (unclear if indices else missing).append(line)
    if missing:
        raise InputError(
            f"{file}: {_of(len(missing), len(lines))} not among the {len(source):,} training images: "
            f"{_some(missing)}; they have names such as {source.name(0)}"
        )
    if unclear:
        raise InputError(
            f"{file}: {_some(unclear)}: several training images have that name; write the folder too, as in {source.name(0)}"
        )
    return torch.tensor(sorted(found), dtype=torch.int64)


def _of(missing: int, total: int) -> str:
    """Write `1 of 12 names is`, `3 of 12 names are`."""
    return f"{missing:,} of {count_of(total, 'name')} {'is' if missing == 1 else 'are'}"


def _members(labels_N: Tensor) -> list[NDArray[np.int64]]:
    """The indices of the images of each class, up to the last one that has any."""
    labels = labels_N.numpy()
    return [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]


def _shuffled(indices: NDArray[np.int64], seed: int, label: int) -> NDArray[np.int64]:
    """The indices in an order of their own for each seed and class."""
    return np.random.default_rng([seed, label]).permutation(indices)


def _lines(file: Path) -> list[str]:
    try:
        # Names that are not UTF-8 come from file systems as surrogates, too.
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as fault:
        raise InputError(f"label_list={file} can't be read: {fault.strerror}") from None
    lines = [line.strip() for line in text.splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise InputError(f"{file} names no images; write the name of one on each line")
    return names


def _bare(name: str) -> str:
    """The name without folders, and without the file of many images that it lies in (`images.tar::000012.jpg`)."""
    return re.split(r"/|::", name)[-1]


def _indices_of(line: str, by_name: dict[str, int], by_ending: dict[str, list[int]]) -> list[int]:
    """The images that a line may mean; none, one, or several."""
    parts = line.replace("\\", "/").split("/")
    for first in range(len(parts)):
        index = by_name.get("/".join(parts[first:]))
        if index is not None:
            return [index]
    return by_ending.get(line, []) if len(parts) == 1 else []


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
