"""The k nearest rows of each row, exactly: float32 products rule out nearly all pairs, differences decide among the rest.

M queries, B of them in a block, N rows, P components, K neighbours, C candidates, G groups of H rows.

The product of centred rows bounds each pair's -d²/2 from above, up to |q|²/2. The rows with the highest bounds become
candidates; their distances are computed from the differences, which do not cancel. A query whose K-th distance does not
beat the bound of all other rows is searched again among more candidates. So the result is that of sorting all float32
distances by (distance, number of the row), whatever the blocks and threads.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from deepcluster.clustering.coarse import FLOAT32_ROUNDING
from deepcluster.clustering.parallel import blocks_of, map_blocks, row_blocks
from deepcluster.core.device import true_float32
from deepcluster.core.errors import InputError
from deepcluster.core.work import Advance, no_advance

Metric = Literal["euclidean", "sqeuclidean", "cosine"]

# Bounds of a block of queries stay in the processor's cache; a GPU wants larger blocks.
BLOCK_BOUNDS, BLOCK_BOUNDS_GPU = 1 << 22, 1 << 26
# Numbers in the differences that are squared at once.
BLOCK_DIFFERENCES, BLOCK_DIFFERENCES_GPU = 1 << 19, 1 << 25
# Rows of a group, of which only the highest bound is sorted at first.
GROUP = 32
# Blocks per report of progress.
BLOCKS_AT_ONCE = 8


def nearest_neighbours(
    queries_MP: Tensor,
    rows_NP: Tensor,
    *,
    k: int,
    metric: Metric = "euclidean",
    exclude_self: bool = False,
    advance: Advance = no_advance,
) -> tuple[Tensor, Tensor]:
    """Return the k nearest of `rows_NP` for each query: exact in float32, nearest first, ties to the lower number.

    Takes a centred copy of the rows as memory, and for cosine a copy of rows and queries.

    Args:
        queries_MP, rows_NP: of any floating type, on one device.
        k: number of neighbours, K below.
        metric: "euclidean", "sqeuclidean" (squared distances) or "cosine" (similarities, highest first; 0 for a row of
            zeros).
        exclude_self: the queries are the rows, and none is its own neighbour; copies of it may be.
        advance: called with the number of queries done since the last call; may raise to stop.

    Returns:
        distances_MK or similarities_MK, float32, and indices_MK.

    Raises:
        InputError: k is below 1 or above the number of rows, shapes do not match, a value is not finite.
    """
    _check(queries_MP, rows_NP, k, exclude_self)
    queries_MP, rows_NP = queries_MP.detach().float(), rows_NP.detach().float()
    if metric == "cosine":
        # At unit length d² = 2 - 2 cosine; two more columns put rows of zeros at a right angle to all.
        queries_MP, rows_NP = pad(normalize(queries_MP), (0, 2)), pad(normalize(rows_NP), (0, 2))
        for own, table in enumerate((queries_MP, rows_NP)):
            table[:, own - 2] = (table == 0).all(dim=1).float()
    search = _Search(queries_MP, rows_NP, k, exclude_self=exclude_self)
    blocks = blocks_of(slice(0, len(queries_MP)), search.block_rows)
    with true_float32():
        for start in range(0, len(blocks), BLOCKS_AT_ONCE):
            some = blocks[start : start + BLOCKS_AT_ONCE]
            map_blocks(search.search, some, rows_NP.device)
            advance(some[-1].stop - some[0].start)
    if metric == "cosine":
        return 1 - search.squared_MK / 2, search.indices_MK
    return (search.squared_MK.sqrt() if metric == "euclidean" else search.squared_MK), search.indices_MK


def _check(queries_MP: Tensor, rows_NP: Tensor, k: int, exclude_self: bool) -> None:
    shapes = f"queries {(*queries_MP.shape,)} and rows {(*rows_NP.shape,)}"
    if queries_MP.ndim != 2 or rows_NP.ndim != 2 or queries_MP.shape[1] != rows_NP.shape[1]:
        raise InputError(f"{shapes} must be two tables with the same number of columns")
    if exclude_self and len(queries_MP) != len(rows_NP):
        raise InputError(f"{shapes} must be the same rows where a row is not its own neighbour")
    others = len(rows_NP) - exclude_self
    if not 1 <= k <= others:
        raise InputError(f"k={k} neighbours must be between 1 and the {max(0, others)} rows that can be one")
    for name, table in {"rows": rows_NP, **({} if queries_MP is rows_NP else {"queries": queries_MP})}.items():
        for rows in row_blocks(table):
            bad = (~torch.isfinite((2 * table[rows].float()).square_().sum(dim=1))).nonzero()
            if len(bad):
                row = rows.start + int(bad[0])
                raise InputError(f"row {row} of the {name} is not finite, or too large to be squared; leave such rows out")


class _Search:
    """Searches blocks of queries among all rows; the results are in `squared_MK` and `indices_MK`."""

    def __init__(self, queries_MP: Tensor, rows_NP: Tensor, k: int, *, exclude_self: bool) -> None:
        self.queries_MP, self.rows_NP, self.k, self.exclude_self = queries_MP, rows_NP, k, exclude_self
        n_rows, size = rows_NP.shape
        self.centre_P = rows_NP.mean(dim=0)
        self.centred_NP = rows_NP.new_zeros(n_rows + -n_rows % GROUP, size)
        torch.sub(rows_NP, self.centre_P, out=self.centred_NP[:n_rows])
        # Share of |x|² + |q|² by which float32 arithmetic may change a bound or a distance; generous.
        self.error = (2 * size + 32) * FLOAT32_ROUNDING
        self.offsets_N = torch.full((len(self.centred_NP),), torch.inf, device=rows_NP.device)
        for rows in row_blocks(rows_NP):
            self.offsets_N[rows] = self.centred_NP[rows].square().sum(dim=1) * (0.5 - self.error)
        self.block_rows = max(1, (BLOCK_BOUNDS_GPU if rows_NP.is_cuda else BLOCK_BOUNDS) // len(self.offsets_N))
        self.squared_MK = torch.empty(len(queries_MP), k, device=rows_NP.device)
        self.indices_MK = torch.empty(len(queries_MP), k, dtype=torch.int64, device=rows_NP.device)

    def search(self, block: slice) -> None:
        """Find the neighbours of a block of queries, among more candidates where they are not enough."""
        numbers_B, count = torch.arange(block.start, block.stop, device=self.rows_NP.device), self.k + self.k // 4 + 8
        while len(numbers_B):
            numbers_B, count = numbers_B[self._search(numbers_B, min(count, len(self.rows_NP)))], 4 * count

    def _search(self, numbers_B: Tensor, count: int) -> Tensor:
        """Store the nearest of `count` candidates; return a mask of the queries to which others may be as near."""
        queries_BP = self.queries_MP[numbers_B]
        centred_BP = queries_BP - self.centre_P
        bounds_BN = torch.addmm(self.offsets_N, centred_BP, self.centred_NP.T, beta=-1)
        if self.exclude_self:
            bounds_BN.scatter_(1, numbers_B[:, None], torch.finfo(torch.float32).min)
        candidates_BC, bound_B = _highest(bounds_BN, count)
        candidates_BC = candidates_BC.sort(dim=1).values
        squared_BC = self._squared(queries_BP, candidates_BC)
        if self.exclude_self:
            squared_BC.masked_fill_(candidates_BC == numbers_B[:, None], torch.inf)
        order_BK = squared_BC.argsort(dim=1, stable=True)[:, : self.k]
        self.squared_MK[numbers_B] = squared_BK = squared_BC.gather(1, order_BK)
        self.indices_MK[numbers_B] = candidates_BC.gather(1, order_BK)
        others_B = centred_BP.square().sum(dim=1) * (1 - 2 * self.error) - 2 * bound_B
        return (squared_BK[:, -1] >= others_B) & (count < len(self.rows_NP))

    def _squared(self, queries_BP: Tensor, candidates_BC: Tensor) -> Tensor:
        squared_BC = torch.empty(candidates_BC.shape, device=queries_BP.device)
        differences = BLOCK_DIFFERENCES_GPU if queries_BP.is_cuda else BLOCK_DIFFERENCES
        step = max(1, differences // (candidates_BC.shape[1] * max(1, queries_BP.shape[1])))
        for out, queries, candidates in zip(*(x.split(step) for x in (squared_BC, queries_BP, candidates_BC)), strict=True):
            near = self.rows_NP.index_select(0, candidates.flatten()).view(*candidates.shape, -1)
            torch.sum(near.sub_(queries[:, None]).square_(), dim=2, out=out)
        return squared_BC


def _highest(bounds_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the columns (B, count) of the highest bounds of each row, and the lowest of these bounds."""
    groups_BGH = bounds_BN.view(len(bounds_BN), -1, GROUP)
    if groups_BGH.shape[1] <= count:
        highest = bounds_BN.topk(count, dim=1)
        return highest.indices, highest.values[:, -1]
    # The highest `count` bounds lie in the `count` groups of the highest maxima.
    groups = groups_BGH.amax(dim=2).topk(count, dim=1).indices
    inside = groups_BGH.gather(1, groups[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    highest = inside.topk(count, dim=1)
    return groups.gather(1, highest.indices // GROUP) * GROUP + highest.indices % GROUP, highest.values[:, -1]
