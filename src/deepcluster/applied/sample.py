"""`sample`: some images that stand for all, such as those to label first. N images, C chosen ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
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
from deepcluster.applied.vectors import Space, Vectors, vectors_of
from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.clustering.spread import central_points, farthest_first
from deepcluster.core.errors import InputError, did_you_mean
from deepcluster.core.options import whole_number
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource
from deepcluster.run.model import Model
from deepcluster.run.table_writers import ENDINGS

How = Literal["representative", "diverse"]
HOWS: tuple[How, ...] = get_args(How)
WORDS: dict[str, str] = {
    "representative": "the images nearest to the centres of as many k-means clusters, those of large clusters first",
    "diverse": "each image is as far as possible from all before it",
}


@dataclass(frozen=True, repr=False)
class Sample(Found):
    """Images that stand for all, one row per image, in the order in which they were chosen.

    Attributes:
        names: the images.
        stands_for_R: number of images that are nearest to it; what is as near to an image chosen before it counts for that
            one, so that a copy may have 0.
        distance_R: float32; largest distance of these to it.
        paths: files; "" where they are not known.
        how: "representative" or "diverse".
        n_images: M, the readable ones.
    """

    names: list[str]
    stands_for_R: NDArray[np.int64]
    distance_R: NDArray[np.float32]
    paths: list[str]
    how: How
    n_images: int

    def columns(self) -> dict[str, Any]:
        """Return `name`, `stands_for`, `distance` and `path`."""
        return {"name": self.names, "stands_for": self.stands_for_R, "distance": self.distance_R, "path": self.paths}

    def __repr__(self) -> str:
        return f"Sample({len(self):,} of {count_of(self.n_images, 'image')}, {self.how}: .names, .stands_for_R, .distance_R)"


def sample(
    model: str | Path | Model | Embeddings,
    data: Data | None = None,
    *,
    count: int,
    how: How = "representative",
    out: str | Path | None = None,
    page: str | Path | None = None,
    space: Space | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> Sample:
    """Return images that stand for all of `data`, as `deepcluster sample` writes them, such as those to label first.

    Args:
        model: whatever `load` opens, or its result; a table of embeddings, as `embed` writes it, or what it returned.
        data: the images; those of the run, or of the table, by default. With a table only for paths and pictures.
        count: C, the number of images.
        how: "representative": those nearest to the centres of C clusters of k-means, which follow where most images are;
            "diverse": each as far as possible from those before it, which also finds rare ones.
        out: also write a list for DATA (`.txt`), or a table (`.parquet`, `.csv`, `.jsonl`: name, stands_for, …).
        page: also write a page with the pictures (`.html`).
        space: as in `duplicates`.
        seed: of k-means.
        device, workers: how the work is done.
        limit: use only this many images, spread evenly.
        reporter: shows progress.

    Raises:
        InputError: model, data, count or files can't be used; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; finished features are kept.
    """
    if how not in HOWS:
        raise InputError(f"how={how!r} is unknown{did_you_mean(str(how), HOWS)}: use {' or '.join(HOWS)}")
    count = whole_number("count", count, at_least=1)
    target, page_target = checked_outputs(out, page, endings=(LIST, *ENDINGS), inputs=(model, data))

    def before(images: ImageSource | None, names: list[str], work: Work) -> None:
        if count > len(names):
            raise InputError(f"count={count} is more than the {count_of(len(names), 'image')}")
        check_listed(images, target)

    with vectors_of(
        model, data, space=space, before=before, limit=limit, device=device, workers=workers, reporter=reporter
    ) as vectors:
        found = _chosen(vectors, count, how, seed)
        if target is not None:
            if target.suffix == LIST:
                paths = [path or name for path, name in zip(found.paths, found.names, strict=True)]
                write_list(paths, target)
            else:
                write_found(found, target)
            vectors.work.reporter.say(f"{target}: {len(found):,} of {count_of(found.n_images, 'image')}; {WORDS[how]}")
        if page_target is not None:
            _write_page(page_target, found, vectors)
    return found


def _chosen(vectors: Vectors, count: int, how: How, seed: int) -> Sample:
    points_MP, work = vectors.known_MP, vectors.work
    if count > len(points_MP):
        raise InputError(f"count={count} is more than the {count_of(len(points_MP), 'readable image')}")
    if how == "diverse":
        with work.track("choosing", count) as advance:
            chosen_C = farthest_first(points_MP, count, advance=advance)
    else:
        with work.track("clustering", None, "iterations") as advance:
            chosen_C, _ = central_points(points_MP, count, seed=seed, advance=advance)
    with work.track("assigning", len(points_MP)) as advance:
        distance_M1, nearest_M1 = nearest_neighbours(points_MP, points_MP[chosen_C], k=1, advance=advance)
    stands_for = torch.bincount(nearest_M1[:, 0], minlength=count)
    farthest = torch.zeros(count).scatter_reduce_(0, nearest_M1[:, 0], distance_M1[:, 0], "amax")
    indices = vectors.known_M[chosen_C.numpy()].tolist()
    return Sample(
        names=[vectors.names[index] for index in indices],
        stands_for_R=stands_for.numpy(),
        distance_R=farthest.numpy(),
        paths=[vectors.path(index) for index in indices],
        how=how,
        n_images=len(points_MP),
    )


def _write_page(page: Path, found: Sample, vectors: Vectors) -> None:
    index_of = {name: index for index, name in enumerate(vectors.names)}
    pictures = [
        picture(index_of[name], name, f"stands for {count:,}")
        for name, count in zip(found.names, found.stands_for_R.tolist(), strict=True)
    ]
    words = f"{len(found):,} of {count_of(found.n_images, 'image')}: {WORDS[found.how]}."
    group = {"title": f"{found.how.capitalize()} images", "words": "", "pictures": pictures}
    part = {"name": "sample", "title": "Sample", "words": words, "groups": [group]}
    write_page(page, "Sample", [part], vectors.images, workers=vectors.workers, work=vectors.work)
