"""`similar`: the images most like each of some images, exactly. N images, Q queries, K images for each, P components."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepcluster.applied.found import Found, checked_outputs, picture, write_found, write_page
from deepcluster.applied.opening import Data
from deepcluster.applied.queries import Queries, find_queries
from deepcluster.applied.rows import Embeddings
from deepcluster.applied.shown import PictureRows
from deepcluster.applied.vectors import Space, Vectors, is_rows, vectors_of
from deepcluster.clustering.near import typical_distance
from deepcluster.clustering.neighbours import Metric, nearest_neighbours
from deepcluster.core.errors import InputError
from deepcluster.core.options import whole_number
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of
from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource, JoinedSource
from deepcluster.run.model import Model
from deepcluster.run.table_writers import ENDINGS

# How images are compared, in words.
ALIKE = 0.95  # Images that are more similar than this on average differ too little for a value to say much.
MEASURES = {"embedding": "cosine of embeddings", "clusters": "Euclidean distance in the space of the clusters"}


@dataclass(frozen=True, repr=False)
class Similar(Found):
    """The nearest images of each query, one row per pair: query after query, the nearest first.

    Attributes:
        queries, names: the query and the image of each row.
        rank_R: from 1.
        value_R: float32; cosine similarity, highest first, or distance, lowest first.
        measure: "similarity" or "distance".
        pictures: for notebooks.
    """

    queries: list[str]
    names: list[str]
    rank_R: NDArray[np.int64]
    value_R: NDArray[np.float32]
    measure: str
    pictures: PictureRows | None = None

    def columns(self) -> dict[str, Any]:
        """Return `query`, `rank`, `name`, and `similarity` or `distance`."""
        return {"query": self.queries, "rank": self.rank_R, "name": self.names, self.measure: self.value_R}

    def __repr__(self) -> str:
        queries = len(set(self.queries))
        asked = "1 query" if queries == 1 else f"{queries:,} queries"
        return f"Similar({count_of(len(self), 'image')} for {asked}: .queries, .names, .rank_R, .value_R)"


def similar(
    model: str | Path | Model | Embeddings,
    data: Data | None = None,
    *,
    query: Data,
    count: int = 20,
    out: str | Path | None = None,
    page: str | Path | None = None,
    space: Space = "embedding",
    device: str = "auto",
    workers: int | None = None,
    limit: int | None = None,
    reporter: Reporter | None = None,
) -> Similar:
    """Return the images of `data` most similar to each query, as `deepcluster similar` prints them; all are compared.

    Args:
        model: whatever `load` opens, or its result; a table of embeddings, as `embed` writes it, or what it returned.
        data: the images; those of the run, or of the table, by default. With a table only for pictures.
        query: image files, a folder or list of them, or names of images of `data`, which are not their own neighbours; or
            images in memory (arrays, tensors, images of Pillow).
        count: number of images for each query.
        out: also write a table (`.parquet`, `.csv`, `.jsonl`: query, rank, name, similarity).
        page: also write a page with the pictures (`.html`).
        space: "embedding": by cosine similarity; "clusters": by distance in the space in which the model has its clusters.
        device, workers: how the work is done.
        limit: use only this many images, spread evenly.
        reporter: shows progress.

    Raises:
        InputError: model, data, query or files can't be used; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; finished features are kept.
    """
    count = whole_number("count", count, at_least=1)
    target, page_target = checked_outputs(out, page, endings=ENDINGS, inputs=(model, data, query))
    found: list[Queries] = []

    def before(images: ImageSource | None, names: list[str], work: Work) -> None:
        found.append(find_queries(query, images, names, has_network=not is_rows(model), warn=work.reporter.warn))

    opened = vectors_of(
        model, data, space=space, before=before, limit=limit, device=device, workers=workers, reporter=reporter
    )
    with opened as vectors:
        [queries] = found
        result, index_QK = _nearest(vectors, queries, min(count, len(vectors.known_M)))
        average = 1 - typical_distance(vectors.known_MP.numpy()) ** 2 / 2  # The mean cosine of two rows of unit length.
        if vectors.space == "embedding" and average > ALIKE:
            whitened = "" if is_rows(model) else "; where the model has clusters, try --space clusters, which is whitened"
            vectors.work.reporter.say(
                f"all images are about equally similar: two have a similarity of {average:.3f} on average{whitened}"
            )
        if target is not None:
            write_found(result, target)
            vectors.work.reporter.say(f"{target}: {count_of(len(result), 'row')}")
        if page_target is not None:
            _write_page(page_target, vectors, queries, result, index_QK)
    return result


def _nearest(vectors: Vectors, queries: Queries, count: int) -> tuple[Similar, NDArray[np.int64]]:
    """Return the nearest images of each query, and their indices (Q, K), -1 at the end where an image is not its own."""
    rows_QP = vectors.rows(queries.index_Q)
    if queries.others is not None and vectors.rows_of is not None:
        rows_QP[queries.index_Q < 0] = vectors.rows_of(queries.others)
    for number in (~rows_QP.isfinite().all(dim=1)).nonzero()[:, 0].tolist():
        name = queries.names[number]
        raise InputError(f"query {name} has no features: {vectors.unreadable.get(name, 'they are not finite numbers')}")
    of_all = len(vectors.known_M)
    metric: Metric = "cosine" if vectors.space == "embedding" else "euclidean"
    with vectors.work.track("searching", len(rows_QP), "queries") as advance:
        # One more, since a query among the images is its own neighbour.
        value_QK, row_QK = nearest_neighbours(
            rows_QP, vectors.known_MP, k=min(count + 1, of_all), metric=metric, advance=advance
        )
    chosen: list[tuple[int, int, int, float]] = []
    index_QK = np.full((len(rows_QP), count), -1)
    for number, (values, rows) in enumerate(zip(value_QK.tolist(), vectors.known_M[row_QK.numpy()].tolist(), strict=True)):
        others = [(index, value) for index, value in zip(rows, values, strict=True) if index != queries.index_Q[number]]
        index_QK[number, : len(others[:count])] = [index for index, _ in others[:count]]
        chosen += [(number, rank, index, value) for rank, (index, value) in enumerate(others[:count], start=1)]
    numbers, ranks, indices, values = zip(*chosen, strict=True)
    images, places = _with_queries(vectors.images, queries, len(vectors))
    shown = [[(place, name, "query")] for place, name in zip(places.tolist(), queries.names, strict=True)]
    for number, _, index, value in chosen:
        shown[number].append((index, vectors.names[index], f"{value:.3f}"))
    return Similar(
        queries=[queries.names[number] for number in numbers],
        names=[vectors.names[index] for index in indices],
        rank_R=np.array(ranks, np.int64),
        value_R=np.array(values, np.float32),
        measure="similarity" if metric == "cosine" else "distance",
        pictures=None if images is None else PictureRows(images, shown),
    ), index_QK


def _with_queries(
    images: ImageSource | None, queries: Queries, n_images: int
) -> tuple[ImageSource | None, NDArray[np.int64]]:
    """Return the images and the queries that are not among them as one source, and the index of each query in it."""
    parts = [("data", images)] if images is not None else []
    if queries.others is not None:
        parts.append(("queries", queries.others))
    places = queries.index_Q.copy()
    others = np.flatnonzero(places < 0)
    places[others] = (0 if images is None else n_images) + np.arange(len(others))
    return JoinedSource(parts) if parts else None, places


def _write_page(page: Path, vectors: Vectors, queries: Queries, found: Similar, index_QK: NDArray[np.int64]) -> None:
    """Write a page with a row of pictures for each query, its own first."""
    images, places = _with_queries(vectors.images, queries, len(vectors))
    values, groups = iter(found.value_R.tolist()), []
    for number, name in enumerate(queries.names):
        near = [index for index in index_QK[number].tolist() if index >= 0]
        pictures = [picture(int(places[number]), name, "query", marked=True)]
        pictures += [picture(index, vectors.names[index], f"{next(values):.3f}") for index in near]
        groups.append({"title": name, "words": "", "pictures": pictures})
    searched = count_of(len(vectors.known_M), "image")
    words = f"The nearest of {searched}. Below each is its {found.measure} to the query: {MEASURES[vectors.space]}."
    part = {"name": "similar", "title": "Similar images", "words": words, "groups": groups}
    write_page(page, "Similar images", [part], images, workers=vectors.workers, work=vectors.work)


def as_text(found: Similar) -> str:
    """Return the result as printed lines."""
    lines, digits = list[str](), len(str(found.rank_R.max()))
    for query, rank, name, value in zip(
        found.queries, found.rank_R.tolist(), found.names, found.value_R.tolist(), strict=True
    ):
        lines += [f"{query} ({found.measure})"] if rank == 1 else []
        lines.append(f"  {rank:{digits}}  {value:.3f}  {name}")
    return "\n".join(lines)
