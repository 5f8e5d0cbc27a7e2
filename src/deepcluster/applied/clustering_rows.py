"""Features to cluster, read in blocks: those of images, which are kept in the cache, or the rows of a table of embeddings.

N rows of all ranks, F finite ones of this rank, B of a block, D features, P components.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepcluster.applied.clustering_options import ClusterOptions
from deepcluster.clustering.whitening import Whitening, working_bytes
from deepcluster.core.device import free_memory_bytes
from deepcluster.core.distributed import Ranks
from deepcluster.core.errors import InputError
from deepcluster.core.text import size
from deepcluster.core.work import Work
from deepcluster.run.features import FEATURE_BATCH

# Rows that are read at once.
BLOCK_ROWS = 32 * FEATURE_BATCH
# More components of few images add noise to the clusters (docs/benchmarks.md).
FEW_IMAGES, FEW_COMPONENTS, COMPONENTS = 50_000, 64, 256
# Memory per point that k-means takes beside the points: as 8-bit integers, and some numbers per point.
BYTES_PER_POINT = 100


@dataclass(frozen=True)
class FeatureRows:
    """Features by row, read as often as needed.

    Attributes:
        n_rows, dim: N and D.
        read: yields rows (B, D) of a part, `BLOCK_ROWS` at a time; of unreadable images they are NaN.
    """

    n_rows: int
    dim: int
    read: Callable[[slice, int], Iterator[Tensor]]

    @classmethod
    def of(cls, rows_ND: Tensor) -> "FeatureRows":
        """Return rows that are in memory or in a mapped file."""
        return cls(len(rows_ND), rows_ND.shape[1], lambda part, at_once: iter(rows_ND[part].split(at_once)))

    def blocks(self, work: Work, what: str) -> Iterator[Tensor]:
        """Yield the rows (B, D) of this rank, float32, and show the progress."""
        part = part_of_rank(self.n_rows, work.ranks)
        with work.track(what, part.stop - part.start, "rows") as advance:
            for rows_BD in self.read(part, BLOCK_ROWS) if part.stop > part.start else ():
                yield rows_BD.float()
                advance(len(rows_BD))


@dataclass(frozen=True)
class PointRows:
    """Points to cluster of this rank.

    Attributes:
        points_FP: float32, of unit length.
        finite_M: which of this rank's rows they are.
        whitening: what takes features to points.
    """

    points_FP: Tensor
    finite_M: Tensor
    whitening: Whitening


def part_of_rank(n_rows: int, ranks: Ranks) -> slice:
    """Return the rows of this rank: whole batches of features, so that the points do not depend on the number of ranks."""
    batches = ranks.part(-(-n_rows // FEATURE_BATCH))
    return slice(batches.start * FEATURE_BATCH, min(n_rows, batches.stop * FEATURE_BATCH))


def n_components(n_rows: int, dim: int, options: ClusterOptions) -> int:
    """Return P: the components that were asked for, or as many as suit the number of rows.

    Raises:
        InputError: there are fewer features or rows, or components without whitening were asked for.
    """
    if not options.whiten:
        if options.pca is not None:
            raise InputError(f"--pca {options.pca} goes with whitening: leave out --no-whiten, or --pca")
        return dim
    most = max(1, min(dim, n_rows - 1))
    if options.pca is not None and options.pca > most:
        raise InputError(
            f"pca={options.pca} is too wide: there are {dim:,} features of {n_rows:,} images; use --pca {most} or less"
        )
    return options.pca or min(most, FEW_COMPONENTS if n_rows < FEW_IMAGES else COMPONENTS)


def make_points(rows: FeatureRows, options: ClusterOptions, work: Work, device: torch.device) -> PointRows:
    """Whiten the rows of all ranks and scale them to unit length, in two passes over them.

    Args:
        device: where the points will lie.

    Raises:
        InputError: no row is finite, or the points do not fit into memory.
    """
    width, ranks = n_components(rows.n_rows, rows.dim, options), work.ranks
    part = part_of_rank(rows.n_rows, ranks)
    n_mine = part.stop - part.start
    if device.type == "cpu":
        _check_memory(rows, n_mine, width)
    whitening, finite_M = Whitening(width), torch.zeros(n_mine, dtype=torch.bool)
    if options.whiten:
        whitening.update(torch.empty(0, rows.dim, device=device))
    first = 0
    for rows_BD in rows.blocks(work, "whitening" if options.whiten else "checking"):
        finite_B = rows_BD.isfinite().all(dim=1)
        finite_M[first : first + len(rows_BD)] = finite_B
        if options.whiten:
            whitening.update((rows_BD if bool(finite_B.all()) else rows_BD[finite_B]).to(device))
        first += len(rows_BD)
    if not int(ranks.sum(finite_M.sum())):
        raise InputError("there is nothing to cluster: no image can be read, and no row is finite")
    if options.whiten:
        whitening.finish(ranks=ranks)
    else:
        whitening = unit_rows_only(rows.dim)
    points_FP = torch.empty(int(finite_M.sum()), width, device=device)
    first = written = 0
    for block_BD in rows.blocks(work, "points"):
        # As many rows at a time as `assign` takes: products of other shapes are rounded differently.
        for rows_BD in block_BD.to(device).split(FEATURE_BATCH):
            some_BP = whitening.transform(rows_BD[finite_M[first : first + len(rows_BD)].to(device)])
            points_FP[written : written + len(some_BP)] = some_BP
            first, written = first + len(rows_BD), written + len(some_BP)
    return PointRows(points_FP, finite_M, whitening)


def unit_rows_only(dim: int) -> Whitening:
    """Return the whitening that changes nothing but the length of the rows."""
    state = {"mean": torch.zeros(dim), "components": torch.eye(dim), "variance": torch.ones(dim)}
    return Whitening.from_state_dict({**state, "explained": torch.tensor(1.0)})


def _check_memory(rows: FeatureRows, n_mine: int, width: int) -> None:
    """Raise `InputError` unless the points, and what whitening and k-means take beside them, fit into memory."""
    needed = working_bytes(rows.dim) + n_mine * (5 * width + BYTES_PER_POINT)
    free = free_memory_bytes()
    if needed > free:
        raise InputError(
            f"the points of {n_mine:,} images take {size(needed)} with {width:,} components, and {size(free)} of memory are "
            "free: use a smaller --pca, --limit, or several machines with torchrun"
        )
