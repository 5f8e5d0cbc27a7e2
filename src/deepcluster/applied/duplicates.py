"""`duplicates`: all images that are nearly the same, in groups with one to keep. N images, R of them in a group."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final
from unicodedata import combining, normalize

import numpy as np
from numpy.typing import NDArray

from deepcluster.applied.found import (
    LIST,
    Found,
    check_listed,
    checked_outputs,
    picture,
    write_found,
    write_list,
    write_page,
)
from deepcluster.applied.opening import Data
from deepcluster.applied.rows import Embeddings
from deepcluster.applied.vectors import UNIT_LENGTH, Space, Vectors, vectors_of
from deepcluster.clustering.near import NEAR_SHARE, near_sets, typical_distance
from deepcluster.core.errors import InputError, UnreadableImage
from deepcluster.core.files import output_path, spare_inputs
from deepcluster.core.options import plain
from deepcluster.core.progress import Reporter
from deepcluster.core.text import are, count_of, size
from deepcluster.data.decode import size_of
from deepcluster.data.sources import ImageSource
from deepcluster.run.model import Model
from deepcluster.run.table_writers import ENDINGS

# Marks of copies in names, in small letters without accents: "a copy 2", "Kopie von a", "a - Copie", "a (1)".
COPY: Final = re.compile(r"(?<![a-z])(?:copy|kopie|copie|copia)(?![a-z])|\(\d+\)$")
# Share of the typical distance of two images above which a threshold is hardly one of near-duplicates.
MOST_SHARE: Final = 1 / 3
# Among fewer images than these half may well be copies.
FEW: Final = 20


@dataclass(frozen=True, repr=False)
class Duplicates(Found):
    """Near-duplicates, one row per image: group after group, in each the image to keep first, then the nearest to it.

    Attributes:
        names: the images.
        group_R: number of the group, from 1: groups whose images are nearest come first.
        distance_R: float32; distance to the image to keep.
        keep_R: bool; the largest image, of equally large ones that with the largest file, of these the
            first by name, without case and accents, that is not marked as a copy.
        reasons: why it is kept, or could be removed.
        paths: files; "" where they are not known.
        n_bytes: size of the files that could be removed.
        threshold: distance up to which two images are near-duplicates.
        n_images: number of readable images.
    """

    names: list[str]
    group_R: NDArray[np.int64]
    distance_R: NDArray[np.float32]
    keep_R: NDArray[np.bool_]
    reasons: list[str]
    paths: list[str]
    n_bytes: int
    threshold: float
    n_images: int

    def columns(self) -> dict[str, Any]:
        """Return `group`, `name`, `distance`, `keep`, `reason` and `path`."""
        columns = {"group": self.group_R, "name": self.names, "distance": self.distance_R, "keep": self.keep_R}
        return {**columns, "reason": self.reasons, "path": self.paths}

    @property
    def extra(self) -> list[str]:
        """The images that could be removed: their paths, or names where these are not known."""
        rows = np.flatnonzero(~self.keep_R).tolist()
        return [self.paths[row] or self.names[row] for row in rows]

    def summary(self) -> str:
        """Return what was found, in a sentence."""
        scope = f"{self.n_images:,} images at a distance of {self.threshold:.3g} or less"
        if not len(self):
            return f"no near-duplicates among {scope}"
        n_groups, n_extra = int(self.keep_R.sum()), int((~self.keep_R).sum())
        freed = f", which frees {size(self.n_bytes)}" if self.n_bytes else ""
        found = f"{count_of(n_groups, 'group')} of near-duplicates among {scope}"
        return f"{found}: {count_of(n_extra, 'file')} could be removed{freed}"

    def __repr__(self) -> str:
        return f"Duplicates({self.summary()}: .names, .group_R, .distance_R, .keep_R, .reasons, .paths)"


@dataclass(frozen=True, order=True)
class _File:
    """What decides which image of a group is kept: the smallest of these."""

    minus_pixels: int
    minus_bytes: int
    is_copy: bool
    plain_name: str
    name: str
    sides: str = ""
    content: str = ""

    @classmethod
    def of(cls, name: str, images: ImageSource | None, index: int) -> "_File":
        """Read the facts of an image; zeros where it is not at hand."""
        plain = "".join(letter for letter in normalize("NFKD", name.casefold()) if not combining(letter))
        named = (COPY.search(PurePosixPath(plain).stem) is not None, plain, name)
        if images is None:
            return cls(0, 0, *named)
        try:
            content = images.read(index)
            height, width = content.shape[:2] if isinstance(content, np.ndarray) else size_of(content)
        except (UnreadableImage, OSError, ValueError):
            return cls(0, 0, *named)
        raw = content.tobytes() if isinstance(content, np.ndarray) else content
        return cls(-height * width, -len(raw), *named, f"{width} x {height}", hashlib.sha256(raw).hexdigest())

    def reason(self, kept: "_File") -> str:
        """Return why an image could be removed, or, of the kept one, why it is kept."""
        if self is kept:
            return f"kept: {self.sides}" if self.sides else "kept: by its name"
        mark = ", marked as a copy" if self.is_copy and not kept.is_copy else ""
        if self.sides and self.content == kept.content:
            return f"the same file{mark}"
        if self.minus_pixels != kept.minus_pixels:
            return f"smaller: {self.sides or 'unknown size'}"
        if self.minus_bytes != kept.minus_bytes:
            one, other = size(-self.minus_bytes), size(-kept.minus_bytes)
            if one == other:
                one, other = f"{-self.minus_bytes:,}", f"{-kept.minus_bytes:,} bytes"
            return f"smaller file: {one} of {other}"
        return f"as large{mark or ', later by name'}"


def duplicates(
    model: str | Path | Model | Embeddings,
    data: Data | None = None,
    *,
    threshold: float | None = None,
    out: str | Path | None = None,
    page: str | Path | None = None,
    list: str | Path | None = None,
    space: Space | None = None,
    device: str = "auto",
    workers: int | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> Duplicates:
    """Return all groups of near-duplicates, as `deepcluster duplicates` writes them: all pairs are compared, exactly.

    Images no farther apart than `threshold` are in one group, and so are those that a chain of such pairs joins.

    Args:
        model: whatever `load` opens, or its result; a table of embeddings, as `embed` writes it, or what it returned.
        data: the images; those of the run, or of the table, by default. With a table only for sizes and pictures.
        threshold: largest distance of near-duplicates; 4 % of the typical distance of two images by default.
        out: also write a table (`.parquet`, `.csv`, `.jsonl`: group, name, distance, keep, reason, path).
        page: also write a page with the pictures (`.html`).
        list: also write the paths of the images that could be removed, one per line (`.txt`).
        space: "clusters": the space in which the model has its clusters; "embedding": embeddings of unit length. The former
            where the model has clusters by default.
        device, workers, reporter: how the work is done, and what shows progress.
        limit: use only this many images, spread evenly.

    Raises:
        InputError: model, data, threshold or files can't be used; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; finished features are kept.
    """
    threshold = plain(threshold)
    if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold < float("inf")):
        raise InputError(f"threshold={threshold!r} is no distance: use a number of 0 or more")
    target, page_target = checked_outputs(out, page, endings=ENDINGS, inputs=(model, data))
    list_target = None if list is None else output_path(list, "--list", endings=(LIST,))
    if list_target is not None:
        spare_inputs(list_target, "--list", model, data)
    options: dict[str, Any] = {"space": space, "limit": limit, "device": device, "workers": workers, "reporter": reporter}
    with vectors_of(model, data, before=lambda images, *_: check_listed(images, list_target), **options) as vectors:
        say = vectors.work.reporter.say
        if vectors.space == "embedding" and threshold is not None and threshold > 2:
            raise InputError(f"threshold={threshold} is more than 2, the largest distance of {UNIT_LENGTH}")
        typical = typical_distance(vectors.known_MP.numpy())
        if threshold is None:
            threshold = NEAR_SHARE * typical
            say(f"threshold {threshold:.3g}: {NEAR_SHARE:.0%} of {typical:.3g}, the typical {vectors.measure}")
        with vectors.work.track("comparing all images", len(vectors.known_M)) as advance:
            set_M = near_sets(vectors.known_MP, threshold, advance=advance)
        groups = _groups(vectors.known_M, set_M)
        if trouble := _trouble(max(map(len, groups), default=0), len(vectors.known_M), threshold, typical):
            vectors.work.reporter.warn(trouble)
        found = _found(vectors, groups, threshold)
        if target is not None:
            write_found(found, target)
            say(f"{target}: {count_of(len(found), 'row')}")
        if list_target is not None:
            write_list(found.extra, list_target)
            say(f"{list_target}: {are(len(found.extra), 'file')} listed, which could be removed")
        if page_target is not None:
            _write_page(page_target, found, vectors)
    return found


def _trouble(largest: int, n_images: int, threshold: float, typical: float) -> str:
    """Return why the groups are hardly near-duplicates; "" where nothing speaks against them."""
    usual = f"the usual threshold is {NEAR_SHARE * typical:.3g}, {NEAR_SHARE:.0%} of the typical distance of two images"
    if 2 * largest > n_images >= FEW:
        return f"one group holds {largest:,} of {n_images:,} images, so these are hardly near-duplicates: {usual}"
    if threshold > MOST_SHARE * typical and largest:
        share = f"{threshold / typical:.0%} of the typical distance" if typical else "more than the typical distance"
        return f"threshold {threshold:.3g} is {share}, so different images may be in one group: {usual}"
    return ""


def _groups(known_M: NDArray[np.int64], set_M: NDArray[np.int64]) -> list[list[int]]:
    """Return the indices of the images of each set of several, ascending."""
    members = np.flatnonzero(np.bincount(set_M)[set_M] > 1)
    members = members[np.argsort(set_M[members], kind="stable")]
    starts = np.flatnonzero(np.diff(set_M[members], prepend=-1))
    return [known_M[one].tolist() for one in np.split(members, starts[1:]) if len(one)]


def _found(vectors: Vectors, groups: Sequence[Sequence[int]], threshold: float) -> Duplicates:
    """Return the groups as a table, the nearest first, each with the image to keep first."""
    tables, n_bytes = [], 0
    with vectors.work.track("sizes of near-duplicates", sum(map(len, groups))) as advance:
        for group in groups:
            files = {index: _File.of(vectors.names[index], vectors.images, index) for index in group}
            kept = min(group, key=files.__getitem__)
            rows = vectors.rows(np.array([kept, *group]))
            far = (rows[1:] - rows[0]).square().sum(dim=1).sqrt().tolist()
            ordered = sorted(zip(group, far, strict=True), key=lambda row: (row[0] != kept, row[1], row[0]))
            n_bytes -= sum(files[index].minus_bytes for index in group if index != kept)
            tables.append(
                [(index, distance, index == kept, files[index].reason(files[kept])) for index, distance in ordered]
            )
            advance(len(group))
    tables.sort(key=lambda table: (table[-1][1], -len(table), table[0][0]))
    rows_R = [(number, *row) for number, table in enumerate(tables, start=1) for row in table]
    return Duplicates(
        names=[vectors.names[index] for _, index, *_ in rows_R],
        group_R=np.array([row[0] for row in rows_R], np.int64),
        distance_R=np.array([row[2] for row in rows_R], np.float32),
        keep_R=np.array([row[3] for row in rows_R], bool),
        reasons=[row[4] for row in rows_R],
        paths=[vectors.path(index) for _, index, *_ in rows_R],
        n_bytes=n_bytes,
        threshold=threshold,
        n_images=len(vectors.known_M),
    )


def _write_page(page: Path, found: Duplicates, vectors: Vectors) -> None:
    """Write a page with the pictures of each group; the image to keep is marked."""
    index_of = {name: index for index, name in enumerate(vectors.names)}
    groups: dict[int, dict[str, Any]] = {}
    for group, name, distance, keep, reason in zip(
        found.group_R.tolist(), found.names, found.distance_R.tolist(), found.keep_R.tolist(), found.reasons, strict=True
    ):
        one = groups.setdefault(group, {"title": f"Group {group}", "words": "", "pictures": []})
        caption = reason if keep else f"{reason} (distance {distance:.3g})"
        one["pictures"].append(picture(index_of[name], name, caption, marked=keep))
    words = f"{found.summary()}. The image to keep is marked. In parentheses is the distance to it: {vectors.measure}."
    part = {
        "name": "duplicates",
        "title": "Near-duplicates",
        "words": words[0].upper() + words[1:],
        "groups": list(groups.values()),
    }
    write_page(page, "Near-duplicates", [part], vectors.images, workers=vectors.workers, work=vectors.work)
