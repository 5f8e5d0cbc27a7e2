"""The k nearest rows of each row, exactly: a coarse product rules out nearly all pairs, float32 decides among the rest.

The product of two blocks in 8-bit integers or bf16 gives an upper bound of -d²/2 for each of their pairs: rounded rows
differ from the true ones by residuals of known length, and Cauchy–Schwarz does the rest. A pair whose bound lies below
what both of its rows have found already is out. Only the maximum of each group of bounds is compared at first; the few
pairs that are left get their distance from the difference itself. So the answer is that of sorting all distances, in
float32, by (distance, number of the row): it does not depend on the product, on blocks or threads. Where rows are
searched among themselves, each pair of blocks is multiplied once for both.

M queries, N rows, A and B rows of two blocks, R rows in general, P components, K neighbours, Q pairs, S sampled rows.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from deepcluster.clustering.coarse import BF16_ROUNDING, FLOAT32_ROUNDING, INT8_REACH, coarse_kind, round_rows
from deepcluster.clustering.parallel import blocks_of, map_blocks
from deepcluster.core.errors import InputError
from deepcluster.core.work import Advance, no_advance

Metric = Literal["euclidean", "sqeuclidean", "cosine"]

# Rows of a block: the product of two, 4 MB, stays in the processor's cache; a GPU wants larger ones.
BLOCK_ROWS = 1024
BLOCK_ROWS_GPU = 8192
# Bounds of which only the maximum is compared at first.
GROUP = 32
# Blocks that a block meets before limits are told anew: too small steps cost more than the products.
BLOCKS_AT_ONCE = 8
MOST_PAIRS = 1 << 21
# Pairs whose distance is computed at once: so many, or fewer where their differences would take more bytes, which leave
# the processor's cache (of 2,048 components, 1,024 pairs at once take 3.4 times as long as 64).
BLOCK_PAIRS = 1024
BLOCK_PAIR_BYTES = 1 << 19
# The search starts with the nearest among a sample of the rows: so many for each neighbour, or this share of the rows.
SAMPLE_PER_NEIGHBOUR = 256
SAMPLE_SHARE = 1 / 16
# Nanoseconds that one pair costs, a component in each kind of product, and by itself (a core with VNNI and bf16, busy):
# they only choose the kind, which so many queries are asked for.
PRODUCT_COST = {torch.int8: 0.005, torch.bfloat16: 0.011, torch.float32: 0.024}
PAIR_COST, PAIR_COLUMN_COST = 200.0, 0.6
JUDGED_QUERIES = 256
# Sampled rows that they are compared with: so many, or so many for each neighbour.
JUDGED_ROWS, JUDGED_PER_NEIGHBOUR = 4096, 16
# Queries that are multiplied with the sample at once, at least: with fewer, fetching the sample takes longer.
LEAST_QUERIES = 64
# Usual length of a rounded row's residual, as a share of the row: bounds hold for any, and are tightest near it.
RESIDUAL = {torch.int8: 0.0091, torch.bfloat16: 0.0016}
# Neighbours that a query collects before the nearest K are picked: as many as K, and no fewer than this.
LEAST_ROOM = 11
# No neighbour yet: above the key of every distance.
NONE = torch.iinfo(torch.int64).max


def nearest_neighbours(
    queries_MP: Tensor,
    rows_NP: Tensor,
    *,
    k: int,
    metric: Metric = "euclidean",
    exclude_self: bool = False,
    advance: Advance = no_advance,
) -> tuple[Tensor, Tensor]:
    """The k nearest of `rows_NP` for each query: exact in float32, nearest first, ties to the lower number.

    Where both are one tensor, half of the work is saved. Memory beside them: a quarter of the rows or a half (the rounded
    ones), 8 bytes a neighbour, and some megabytes; cosine takes a copy of the rows.

    Args:
        queries_MP, rows_NP: any floating type, on one device.
        k: number of neighbours, K below.
        metric: "euclidean", "sqeuclidean" (squared distances) or "cosine" (similarities, highest first; that of a row of
            zeros is 0).
        exclude_self: the queries are the rows, and none is its own neighbour; copies of it may be.
        advance: called with the number of queries done since the last call; may raise to stop.

    Returns:
        distances_MK or similarities_MK, float32, and indices_MK.

    Raises:
        InputError: k is under 1 or over the number of rows, shapes do not fit, a value is not finite.
    """
    _check(queries_MP, rows_NP, k, exclude_self)
    same = queries_MP is rows_NP
    rows_NP = rows_NP.detach().float()
    queries_MP = rows_NP if same else queries_MP.detach().float()
    if metric == "cosine":
        queries_MP, rows_NP = _unit(queries_MP, rows_NP)
    search = _Search(queries_MP, rows_NP, k, exclude_self=exclude_self)
    with torch.autocast(rows_NP.device.type, enabled=False):
        search.run(advance)
    squared_MK, indices_MK = _unpack(search.keys_MW.sort(dim=1).values[:, :k])
    if metric == "cosine":
        return 1 - squared_MK / 2, indices_MK
    return (squared_MK.sqrt() if metric == "euclidean" else squared_MK), indices_MK


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
        for start, block in enumerate(table.split(BLOCK_ROWS)):
            bad = (~torch.isfinite((2 * block.float()).square_().sum(dim=1))).nonzero()
            if len(bad):
                row = start * BLOCK_ROWS + int(bad[0])
                raise InputError(f"row {row} of the {name} is not finite, or too large to be squared; leave such rows out")


def _unit(queries_MP: Tensor, rows_NP: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length, whose squared distance is 2 - 2 cosine; rows of zeros are as far from all as a right angle."""
    if queries_MP is rows_NP:
        units_NP = normalize(rows_NP)
        if bool((units_NP != 0).any(dim=1).all()):
            return units_NP, units_NP
    sides = []
    for own, table in enumerate((queries_MP, rows_NP)):
        units_RP = pad(normalize(table), (0, 2))
        units_RP[:, own - 2] = (units_RP == 0).all(dim=1).float()
        sides.append(units_RP)
    return sides[0], sides[1]


def _pack(squared_Q: Tensor, indices_Q: Tensor) -> Tensor:
    """One integer for each neighbour; their order is that of (distance, number): the bits of floats ≥ 0 are ordered."""
    return squared_Q.view(torch.int32).long().bitwise_left_shift(32).bitwise_or(indices_Q)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    return keys.bitwise_right_shift(32).int().view(torch.float32), keys.bitwise_and(2**32 - 1)


def _kinds(device: torch.device, n_components: int) -> list[torch.dtype]:
    """Products of this machine that may be the quickest, float32 at the end."""
    quick = (coarse_kind(device, n_components, first=first) for first in (False, True))
    return list(dict.fromkeys((*quick, torch.float32)))


def _rounding(kind: torch.dtype, rows_RP: Tensor) -> float:
    """What arithmetic may change a bound or a distance by, as a share of |x|² + |y|²; generous."""
    share = (2 * rows_RP.shape[1] + 32) * FLOAT32_ROUNDING
    if kind == torch.bfloat16:
        # The sum is rounded to bf16, and |x||y| ≤ (|x|² + |y|²) / 2; a GPU may round parts of it, too.
        return share + BF16_ROUNDING * (2 if rows_RP.is_cuda else 0.5)
    reduced = torch.get_float32_matmul_precision() != "highest" or (
        rows_RP.is_cuda and torch.backends.cuda.matmul.allow_tf32
    )
    return share + (2 * BF16_ROUNDING if kind == torch.float32 and reduced else 0.0)


# Rounded rows (a multiple of GROUP; those beyond the end have an infinite offset), offsets, and their unit.
_Block = tuple[Tensor, Tensor, float]
_Pairs = tuple[Tensor, Tensor]


class _Side:
    """Queries or rows, rounded for the product, block by block.

    The bound of a pair is `unit · product - offset - offset`: an offset is |x|²/2 less this row's part of all errors.
    """

    def __init__(self, rows_RP: Tensor, centre: tuple[Tensor, float], kind: torch.dtype, block_rows: int) -> None:
        self.rows_RP, (self.mean_P, self.reach), self.kind = rows_RP, centre, kind
        self.slices = [slice(at, min(at + block_rows, len(rows_RP))) for at in range(0, len(rows_RP), block_rows)]
        # float32 rows are not kept: they would be a copy of all, and are made in a hundredth of the product's time.
        self.kept = [] if kind == torch.float32 else [self._round(rows) for rows in self.slices]

    def block(self, number: int) -> _Block:
        """The rows `slices[number]`."""
        return self.kept[number] if self.kept else self._round(self.slices[number])

    def _round(self, rows: slice) -> _Block:
        centred_RP = self.rows_RP[rows] - self.mean_P
        coarse = round_rows(centred_RP, self.kind, self.reach)
        lengths_R = coarse.length_R + coarse.residual_R
        errors_R = _rounding(self.kind, centred_RP) * lengths_R.square()
        if self.kind in RESIDUAL:
            # |e||y| + |x||f| ≤ (|e|²/q + q|x|² + q|y|² + |f|²/q) / 2 for residuals e, f: a part for each row.
            usual = RESIDUAL[self.kind]
            errors_R += (coarse.residual_R.square() / usual + lengths_R.square() * usual) / 2
        unit = coarse.step**2
        missing = -len(lengths_R) % GROUP
        offsets_R = ((self.rows_RP[rows] - self.mean_P).square_().sum(dim=1) / 2 - errors_R) / unit
        return pad(coarse.rounded_RP, (0, 0, 0, missing)), pad(offsets_R, (0, missing), value=torch.inf), unit


def _bounds(one: _Block, other: _Block) -> Tensor:
    """Upper bounds_AB of -d²/2, in units."""
    (rows_AP, offsets_A, _), (rows_BP, offsets_B, _) = one, other
    product = torch._int_mm if rows_AP.dtype == torch.int8 else torch.mm
    return product(rows_AP, rows_BP.T).float().sub_(offsets_A[:, None]).sub_(offsets_B)


def _high_places(bounds_AS: Tensor, k: int) -> Tensor:
    """Columns_AK of K high bounds of each row: the highest, or where there are many columns those of the highest groups."""
    bounds_ATG = bounds_AS.view(len(bounds_AS), GROUP, -1)
    if bounds_ATG.shape[2] <= k:
        return bounds_AS.topk(k, dim=1).indices
    groups_AK = bounds_ATG.amax(dim=1).topk(k, dim=1).indices
    rows_A1 = torch.arange(len(bounds_AS), device=bounds_AS.device)[:, None]
    return bounds_ATG[rows_A1, :, groups_AK].argmax(dim=2) * bounds_ATG.shape[2] + groups_AK


def _sample(n_rows: int, k: int, device: torch.device) -> Tensor:
    """Rows (S), evenly spread, to begin with: all, where the sample would be half of them."""
    size = max(SAMPLE_PER_NEIGHBOUR * k, int(SAMPLE_SHARE * n_rows))
    size = n_rows if 2 * size >= n_rows else size
    return torch.arange(size, device=device) * n_rows // size


class _Search:
    """The nearest rows that each query has met so far, as keys, and how far another one may be.

    Queries meet the rows in ascending order, so that a later row never wins a tie.
    """

    def __init__(self, queries_MP: Tensor, rows_NP: Tensor, k: int, *, exclude_self: bool) -> None:
        self.queries_MP, self.rows_NP, self.k, self.exclude_self = queries_MP, rows_NP, k, exclude_self
        self.block_rows = BLOCK_ROWS_GPU if rows_NP.is_cuda else BLOCK_ROWS
        few = max(1, BLOCK_PAIR_BYTES // (4 * max(1, rows_NP.shape[1])))
        self.block_pairs = BLOCK_PAIRS if rows_NP.is_cuda else min(BLOCK_PAIRS, few)
        self.keys_MW = torch.full((len(queries_MP), k + max(k, LEAST_ROOM)), NONE, device=rows_NP.device)
        self.fill_M = torch.zeros(len(queries_MP), dtype=torch.int64, device=rows_NP.device)
        self.limits_M = torch.full((len(queries_MP),), torch.inf, device=rows_NP.device)

    def run(self, advance: Advance) -> None:
        """Let all queries meet all rows."""
        centre = _centre(self.rows_NP)
        sample_S = _sample(len(self.rows_NP), self.k, self.rows_NP.device)
        sample = self._quickest(centre, sample_S)
        queries = _Side(self.queries_MP, centre, sample.kind, self.block_rows)
        for number, a in enumerate(queries.slices):
            found = self._limit(a, queries.block(number), sample.block(0), sample_S)
            for pairs in found:
                self._meet(*pairs)
            if len(sample_S) == len(self.rows_NP):
                advance(a.stop - a.start)
        if len(sample_S) == len(self.rows_NP):
            return
        same, at_once = self.queries_MP is self.rows_NP, 1 if self.rows_NP.is_cuda else BLOCKS_AT_ONCE
        done = 0
        rows = queries if same else _Side(self.rows_NP, centre, queries.kind, self.block_rows)
        for one in range(len(queries.slices)):
            others = blocks_of(slice(one if same else 0, len(rows.slices)), 1)
            for start in range(0, len(others), at_once):
                self._meet_blocks(queries, one, rows, others[start : start + at_once])
            left = 1 - (one + 1) / len(queries.slices)
            so_far = round(len(self.queries_MP) * (1 - (left * left if same else left)))
            advance(so_far - done)
            done = so_far

    def _meet_blocks(self, queries: _Side, one: int, rows: _Side, others: list[slice]) -> None:
        """Let a block of queries meet some blocks of rows, and where both are one table these the queries."""
        a, block = queries.slices[one], queries.block(one)

        def look(other: slice) -> list[_Pairs]:
            b, bounds_AB = rows.slices[other.start], _bounds(block, rows.block(other.start))
            found = [self._reaching(bounds_AB, a, b, block[2])]
            if rows is queries and other.start > one:
                found.append(self._reaching(bounds_AB, b, a, block[2], columns=True))
            return found

        found = [pairs for both in map_blocks(look, others, block[0].device) for pairs in both]
        # Where copies abound pairs are many: then they meet block by block.
        step = len(found) if sum(len(queries_Q) for queries_Q, _ in found) < MOST_PAIRS else 1
        for start in range(0, len(found), step):
            queries_Q, rows_Q = (torch.cat(side) for side in zip(*found[start : start + step], strict=True))
            self._meet(queries_Q, rows_Q)

    def _quickest(self, centre: tuple[Tensor, float], sample_S: Tensor) -> _Side:
        """The sampled rows in the kind of product that promises the quickest search, judged by the first queries."""
        kinds = _kinds(self.rows_NP.device, self.rows_NP.shape[1])
        rows_SP = self.rows_NP if len(sample_S) == len(self.rows_NP) else self.rows_NP[sample_S]
        if len(kinds) == 1:
            return _Side(rows_SP, centre, kinds[0], len(rows_SP))
        judged = slice(0, min(JUDGED_QUERIES, len(self.queries_MP)))
        some_S = sample_S[:: max(1, len(sample_S) // max(JUDGED_ROWS, JUDGED_PER_NEIGHBOUR * self.k))]
        some_SP = self.rows_NP[some_S]
        costs: dict[torch.dtype, float] = {}
        for kind in reversed(kinds):
            queries = _Side(self.queries_MP[judged], centre, kind, JUDGED_QUERIES).block(0)
            sample = _Side(some_SP, centre, kind, len(some_SP)).block(0)
            if not costs:
                self._limit(judged, queries, sample, some_S)
            passed = len(self._reaching(_bounds(queries, sample), judged, judged, queries[2])[0]) / judged.stop
            # So many pairs pass at the start; later limits are nearer, and the nth row passes in proportion to 1 / n.
            pairs = passed * (1 + math.log(len(self.rows_NP) / len(rows_SP)))
            columns = rows_SP.shape[1]
            costs[kind] = PRODUCT_COST[kind] * len(self.rows_NP) * columns + (PAIR_COST + PAIR_COLUMN_COST * columns) * pairs
        return _Side(rows_SP, centre, min(kinds, key=costs.__getitem__), len(rows_SP))

    def _limit(self, rows: slice, queries: _Block, sample: _Block, sample_S: Tensor) -> list[_Pairs]:
        """So near are K of the sampled rows; they are looked for among somewhat more, those of the highest bounds.

        Where the sample is all rows, returns the pairs that reach the limit: the bounds are at hand, and no others follow.
        """
        whole = len(sample_S) == len(self.rows_NP)
        more = min(self.k + self.k // 4 + 4, len(sample_S) - self.exclude_self)

        def look(part: slice) -> _Pairs | None:
            inside = slice(part.start - rows.start, part.stop - rows.start)
            bounds_AS = _bounds((queries[0][inside], queries[1][inside], queries[2]), sample)
            if self.exclude_self:
                own = ((sample_S >= part.start) & (sample_S < part.stop)).nonzero().flatten()
                bounds_AS[sample_S[own] - part.start, own] = -torch.inf
            places_AK = _high_places(bounds_AS, more)
            queries_Q = torch.arange(part.start, part.stop, device=places_AK.device).repeat_interleave(more)
            squared_Q = torch.empty(len(queries_Q), device=places_AK.device)
            pairs = (queries_Q, sample_S[places_AK].flatten(), squared_Q)
            # Not on several threads: this is one of them.
            for some in zip(*(side.split(self.block_pairs) for side in pairs), strict=True):
                self._measure(*some)
            self.limits_M[part] = squared_Q.view(-1, more).kthvalue(self.k, dim=1).values
            return self._reaching(bounds_AS, part, slice(0, len(sample_S)), queries[2]) if whole else None

        step = max(1, min(self.block_rows // 4, max(LEAST_QUERIES, self.block_rows**2 // len(sample_S))))
        found = map_blocks(look, blocks_of(rows, step), sample_S.device)
        return [pairs for pairs in found if pairs is not None]

    def _reaching(self, bounds_AB: Tensor, queries: slice, rows: slice, unit: float, *, columns: bool = False) -> _Pairs:
        """Numbers (query, row) of the bounds that reach their query's limit; queries may be the columns."""
        n_rows, n_columns = bounds_AB.shape
        if columns:
            bounds_TGA = bounds_AB.view(GROUP, -1, n_columns)
            bounds_ATG, highest_AG = bounds_TGA.permute(2, 0, 1), bounds_TGA.amax(dim=0).T
        else:
            bounds_ATG = bounds_AB.view(n_rows, GROUP, -1)
            highest_AG = bounds_ATG.amax(dim=1)
        limits_A = pad(self.limits_M[queries], (0, len(bounds_ATG) - (queries.stop - queries.start)), value=-torch.inf)
        least_A1 = (limits_A / (-2 * unit))[:, None]
        one, group = (highest_AG >= least_A1).nonzero().unbind(dim=1)
        hit, place = (bounds_ATG[one, :, group] >= least_A1[one]).nonzero().unbind(dim=1)
        return one[hit] + queries.start, place * highest_AG.shape[1] + group[hit] + rows.start

    def _meet(self, queries_Q: Tensor, rows_Q: Tensor) -> None:
        """Add pairs to what their queries have, where they are near enough."""
        order_Q = queries_Q.argsort(stable=True)
        queries_Q, rows_Q = queries_Q[order_Q], rows_Q[order_Q]
        if self.exclude_self:
            others_Q = queries_Q != rows_Q
            queries_Q, rows_Q = queries_Q[others_Q], rows_Q[others_Q]
        squared_Q = self._squared(queries_Q, rows_Q)
        near_Q = squared_Q <= self.limits_M[queries_Q]
        queries_Q, keys_Q = queries_Q[near_Q], _pack(squared_Q[near_Q], rows_Q[near_Q])
        if len(queries_Q):
            queries_T, counts_T = torch.unique_consecutive(queries_Q, return_counts=True)
            self._add(queries_T, counts_T, keys_Q)

    def _add(self, queries_T: Tensor, counts_T: Tensor, keys_Q: Tensor) -> None:
        """Put keys behind what the queries have; where there is no room, keep the K lowest."""
        fill_T = self.fill_M[queries_T]
        room_T = fill_T + counts_T <= self.keys_MW.shape[1]
        place_Q = torch.arange(len(keys_Q), device=keys_Q.device)
        place_Q -= (counts_T.cumsum(0) - counts_T).repeat_interleave(counts_T)
        room_Q = room_T.repeat_interleave(counts_T)
        to_Q = queries_T.repeat_interleave(counts_T)
        self.keys_MW[to_Q[room_Q], (place_Q + fill_T.repeat_interleave(counts_T))[room_Q]] = keys_Q[room_Q]
        self.fill_M[queries_T] = torch.where(room_T, fill_T + counts_T, self.k)
        if bool(room_T.all()):
            return
        full_F = (~room_T).nonzero().flatten()
        found_FW = torch.full((len(full_F), int(counts_T[full_F].max())), NONE, device=keys_Q.device)
        from_Q = torch.arange(len(full_F), device=keys_Q.device).repeat_interleave(counts_T[full_F])
        found_FW[from_Q, place_Q[~room_Q]] = keys_Q[~room_Q]
        self._keep_lowest(queries_T[full_F], found_FW)

    def _keep_lowest(self, queries_F: Tensor, found_FW: Tensor) -> None:
        lowest_FK = torch.cat([self.keys_MW[queries_F], found_FW], dim=1).topk(self.k, dim=1, largest=False).values
        self.keys_MW[queries_F, : self.k], self.keys_MW[queries_F, self.k :] = lowest_FK, NONE
        squared_F = _unpack(lowest_FK.amax(dim=1))[0]
        # Nothing that comes later is nearer than K rows at distance 0.
        squared_F = torch.where(squared_F == 0, -torch.inf, squared_F)
        self.limits_M[queries_F] = torch.minimum(self.limits_M[queries_F], squared_F)

    def _squared(self, queries_Q: Tensor, rows_Q: Tensor) -> Tensor:
        squared_Q = torch.empty(len(queries_Q), device=queries_Q.device)

        def measure(part: slice) -> None:
            self._measure(queries_Q[part], rows_Q[part], squared_Q[part])

        map_blocks(measure, blocks_of(slice(0, len(queries_Q)), self.block_pairs), queries_Q.device)
        return squared_Q

    def _measure(self, queries_Q: Tensor, rows_Q: Tensor, squared_Q: Tensor) -> None:
        # From the difference itself, which does not cancel: a copy is at distance 0.
        difference = self.queries_MP.index_select(0, queries_Q).sub_(self.rows_NP.index_select(0, rows_Q))
        torch.sum(difference.square_(), dim=1, out=squared_Q)


def _centre(rows_NP: Tensor) -> tuple[Tensor, float]:
    """Mean_P of the rows, and how far 8-bit integers reach around it."""
    total_P = torch.zeros(rows_NP.shape[1], dtype=torch.float64, device=rows_NP.device)
    squares_P = torch.zeros_like(total_P)
    for block in rows_NP.split(BLOCK_ROWS):
        total_P += block.sum(dim=0, dtype=torch.float64)
    mean_P = (total_P / len(rows_NP)).float()
    for block in rows_NP.split(BLOCK_ROWS):
        squares_P += (block - mean_P).square_().sum(dim=0, dtype=torch.float64)
    return mean_P, INT8_REACH * float((squares_P.sum() / rows_NP.numel()).sqrt())
