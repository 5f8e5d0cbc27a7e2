"""What images are compared by: one row of numbers each, extracted and kept, or read from a table of embeddings.

N images, M of them known, P components.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.applied.assigning_tables import is_run_of_table, known_pictures
from deepcluster.applied.clustering_rows import BLOCK_ROWS, FeatureRows
from deepcluster.applied.opening import Data, names_of, opened, reasons_by_name
from deepcluster.applied.rows import Embeddings
from deepcluster.core.device import free_memory_bytes
from deepcluster.core.errors import InputError, UnreadableImage, did_you_mean
from deepcluster.core.files import user_path
from deepcluster.core.options import whole_number
from deepcluster.core.progress import Reporter
from deepcluster.core.text import are, size
from deepcluster.core.work import Work, joined_work
from deepcluster.data.decode import decode
from deepcluster.data.loader import usual_workers
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.sources.by_name import pictures_by_name
from deepcluster.data.survey import even_sample
from deepcluster.interop.loading import load, new_interruption
from deepcluster.run.embedding_tables import is_table, open_table, table_of_run
from deepcluster.run.features import Pooled
from deepcluster.run.folder import RunFolder
from deepcluster.run.kept_features import kept_rows, readable
from deepcluster.run.model import Model

# Rows of unit length, whose Euclidean distance is √(2 - 2 cosine); or points in the space in which MODEL has its clusters.
Space = Literal["embedding", "clusters"]
SPACES: tuple[Space, ...] = get_args(Space)
UNIT_LENGTH = "embeddings of unit length"
# What a command takes: the rows, a copy that is centred and one of unit length, and some numbers per row.
COPIES, BYTES_PER_ROW = 3, 100
AGAIN = "nothing was written"
NO_ROW = "its features are not finite numbers"


@dataclass(frozen=True)
class Vectors:
    """Images as rows of numbers.

    Attributes:
        names: names of all N images.
        known_M: indices of the images that have a row, ascending.
        known_MP: their rows, float32, on the CPU.
        space: what the rows are.
        images: where the pictures are; None where they are not at hand.
        unreadable: why images have no row, by name.
        work: shows progress and answers requests to stop.
        workers: threads that read pictures.
        rows_of: takes other images to their rows; None for a table.
    """

    names: list[str]
    known_M: NDArray[np.int64]
    known_MP: Tensor
    space: Space
    images: ImageSource | None
    unreadable: dict[str, str]
    work: Work
    workers: int
    rows_of: Callable[[ImageSource], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, index_Q: NDArray[np.int64]) -> Tensor:
        """Return the rows (Q, P) of some images; NaN for those that have none."""
        place_Q = np.searchsorted(self.known_M, index_Q).clip(max=len(self.known_M) - 1)
        rows_QP = self.known_MP[torch.from_numpy(place_Q)]
        rows_QP[torch.from_numpy(self.known_M[place_Q] != index_Q)] = torch.nan
        return rows_QP

    @property
    def measure(self) -> str:
        """What is measured between two rows, in words."""
        if self.space == "embedding":
            return f"distance of {UNIT_LENGTH}"
        return "distance in the space of the clusters"

    def path(self, index: int) -> str:
        """Return the path of the file of an image; "" where it is none, or not known."""
        path = None if self.images is None else self.images.path(index)
        return "" if path is None else str(path)


def is_rows(model: object) -> bool:
    """Return whether a model is a table of embeddings, what `embed` returned, or a run of a table: it has no network."""
    return isinstance(model, Embeddings) or is_table(model) or is_run_of_table(model)


@contextmanager
def vectors_of(
    model: str | Path | Model | Embeddings,
    data: Data | None,
    *,
    space: Space | None,
    before: Callable[[ImageSource | None, list[str], Work], None] = lambda images, names, work: None,
    limit: int | None = None,
    device: str = "auto",
    workers: int | None = None,
    reporter: Reporter | None = None,
) -> Iterator[Vectors]:
    """Yield the rows of images by a model, which are kept on disk for the next command; or those of a table of embeddings.

    Args:
        model: whatever `load` opens, or its result; a table of embeddings (.parquet, .npy), or what `embed` returned.
        data: the images; those of the run, or of the table, by default. With a table they are looked up by name.
        space: None: that of the clusters where the model has any.
        before: called with images and names before any long work, to check the input against them.
        limit, device, workers, reporter: as in `embed`.

    Raises:
        InputError: model, data or space can't be used, or fewer than two images have a row.
    """
    if space is not None and space not in SPACES:
        raise InputError(f"space={space!r} is unknown{did_you_mean(str(space), SPACES)}: use {' or '.join(SPACES)}")
    limit = None if limit is None else whole_number("limit", limit, at_least=2)
    if isinstance(model, Embeddings) or is_rows(model):
        if space == "clusters":
            raise InputError("a table of embeddings has no space of clusters: leave out --space clusters, or give the model")
        with joined_work(reporter, new_interruption(AGAIN)) as work:
            yield _checked(_of_table(model, data, before, limit, usual_workers() if workers is None else workers, work))
        return
    model = model if isinstance(model, Model) else load(model)
    if data is None:
        data, limit = images_of_run(model), model.settings.limit if limit is None else limit
    if space == "clusters" or (space is None and model.assignment is not None):
        model.clusters()
        space = "clusters"
    with opened(model, data, limit, reporter, shared=True, device=device, workers=workers) as (model, images):
        before(images, names_of(images), model.work)
        yield _checked(_of_model(model, images, space or "embedding"))


def _of_model(model: Model, images: ImageSource, space: Space) -> Vectors:
    stage = model.settings.cluster_stage if space == "clusters" else model.trunk.embed_stage

    def points(features_ND: Tensor) -> Tensor:
        known_N = readable(features_ND)
        found_MP = model.points(features_ND[known_N]) if space == "clusters" else normalize(features_ND[known_N].float())
        rows_NP = torch.full((len(features_ND), found_MP.shape[1]), torch.nan)
        rows_NP[known_N] = found_MP
        return rows_NP

    def rows_of(others: ImageSource) -> Tensor:
        return points(model.features(others, stage=stage)[0].to(model.machine.feature_dtype))

    wanted = Pooled(stage)
    features_ND = kept_rows(model, images, [wanted])[wanted]
    known_M, known_MP = _known(map(points, features_ND.split(BLOCK_ROWS)), len(images))
    lost = np.setdiff1d(np.arange(len(images)), known_M).tolist()
    unreadable = reasons_by_name({index: why_unreadable(images, index) or NO_ROW for index in lost}, images, model)
    return Vectors(names_of(images), known_M, known_MP, space, images, unreadable, model.work, model.workers, rows_of)


def _known(blocks: Iterable[Tensor], count: int) -> tuple[NDArray[np.int64], Tensor]:
    """Return which of `count` rows are finite, and these rows (M, P), of which no copy is made.

    Raises:
        InputError: they do not fit into memory.
    """
    known_N, known_MP = torch.zeros(count, dtype=torch.bool), torch.empty(0, 0)
    first = written = 0
    for rows_BP in blocks:
        if not first:
            _check_memory(count, rows_BP.shape[1])
            known_MP = torch.empty(count, rows_BP.shape[1])  # Memory that is not written to is not taken.
        known_B = rows_BP.isfinite().all(dim=1)
        known_N[first : first + len(rows_BP)] = known_B
        some_MP = rows_BP[known_B]
        known_MP[written : written + len(some_MP)] = some_MP
        first, written = first + len(rows_BP), written + len(some_MP)
    return known_N.nonzero()[:, 0].numpy(), known_MP[:written]


def _check_memory(count: int, width: int) -> None:
    needed, free = count * (COPIES * 4 * width + BYTES_PER_ROW), free_memory_bytes()
    if needed > free:
        raise InputError(
            f"comparing {count:,} images by {width:,} numbers takes {size(needed)}, and {size(free)} of memory are free: "
            "use --limit, or a machine with more memory"
        )


def images_of_run(model: Model) -> list[str]:
    """Return where the images of the run of a model were when it was started.

    Raises:
        InputError: the model is of no run, or the run does not say it.
    """
    folder = RunFolder(user_path(model.name))
    address: list[str] = (folder.read_config()["data"].get("address") or []) if folder.is_run() else []
    if not address:
        why = "does not say where its images are" if folder.is_run() else "is no run folder, whose images would be used"
        raise InputError(f"{model.name} {why}: name a folder, a list, … as DATA")
    return address


def why_unreadable(images: ImageSource, index: int) -> str | None:
    """Return why an image can't be read; None if it can."""
    try:
        decode(images.read(index))
    except (UnreadableImage, OSError) as fault:
        return str(fault)
    return None


def _of_table(
    table: Any,
    data: Data | None,
    before: Callable[[ImageSource | None, list[str], Work], None],
    limit: int | None,
    workers: int,
    work: Work,
) -> Vectors:
    if isinstance(table, Embeddings):
        chosen = torch.tensor(even_sample(range(len(table)), len(table) if limit is None else limit))
        names, images = [table.names[row] for row in chosen.tolist()], table.source() if data is None else None
        images = None if images is None else pictures_by_name(names, images)
        rows, what = FeatureRows.of(torch.from_numpy(table.embedding_ND)), ""
    else:
        folder = RunFolder(user_path(table)) if is_run_of_table(table) else None
        opened_table = table_of_run(folder.path, folder.clustered(), limit) if folder else open_table(table, limit)
        names, what, chosen = opened_table.names(), opened_table.describe(), torch.arange(len(opened_table))
        images = known_pictures(names, opened_table.paths(), folder) if data is None else None
        rows = FeatureRows(len(opened_table), opened_table.dim, opened_table.read)
    if data is not None:
        images = pictures_by_name(names, open_source(data, on_trouble=work.reporter.warn))
    before(images, names, work)
    if what:
        work.reporter.say(what)
    known_M, known_MP = _known(_unit_rows(rows, chosen, work), len(names))
    lost = np.setdiff1d(np.arange(len(names)), known_M).tolist()
    if lost:
        work.reporter.warn(f"{are(len(lost), 'row')} without numbers, such as {names[lost[0]]}")
    unreadable = dict.fromkeys((names[index] for index in lost), "no embedding")
    return Vectors(names, known_M, known_MP, "embedding", images, unreadable, work, workers)


def _unit_rows(rows: FeatureRows, chosen: Tensor, work: Work) -> Iterator[Tensor]:
    """Yield the chosen rows, ascending, in blocks and scaled to unit length."""
    first = 0
    for rows_BP in rows.blocks(work, "reading the table"):
        some = chosen[(chosen >= first) & (chosen < first + len(rows_BP))] - first
        yield normalize(rows_BP[some])
        first += len(rows_BP)


def _checked(vectors: Vectors) -> Vectors:
    if len(vectors.known_M) < 2:
        raise InputError(f"{are(len(vectors.known_M), 'readable image')} too few: there must be 2 or more")
    return vectors
