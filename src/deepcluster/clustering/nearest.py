"""The nearest centroid of each point: a fast coarse product rules out nearly all, float32 decides among the rest.

Products of 8-bit integers or bf16 numbers are two to five times as fast as those of float32. Their error is bounded (rounded
vectors differ from the true ones by residuals of known length, and Cauchy-Schwarz applies), so a centroid whose bound is
below the score of the best known one can't win. The few that could are compared in float32: labels and distances do not
depend on the coarse product, on blocks, threads or ranks. On a GPU one kernel finds the best two bounds of 16-bit products
(nearest_triton.py), and only points whose best two lie within the error, some 1 %, are compared with others.

N points, R of them in a search, B of them in a block; P components; K centroids, C candidates of a search; Q pairs of a
point and a centroid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from deepcluster.clustering import nearest_triton
from deepcluster.clustering.coarse import (
    FINER,
    FLOAT32_ROUNDING,
    FLOAT32_SLACK,
    HALF_GROUP,
    INT8_REACH,
    Coarse,
    CoarseCentroids,
    coarse_kind,
    round_rows,
)
from deepcluster.clustering.parallel import blocks_of, map_blocks, row_blocks, rows_at_once
from deepcluster.core.device import true_float32

# Scores of a block of points, never an N × K matrix. They exceed a core's own cache, but with fewer, threads wait for
# Python: two threads took 1.4 times as long with 2^19 (benchmarks/kmeans.py). A GPU wants larger blocks.
BLOCK_SCORES, BLOCK_SCORES_GPU = 1 << 21, 1 << 26
LEAST_BLOCK_ROWS = 128
# If a coarse product leaves more candidates per point than one, plus one for this many centroids, a finer product is faster:
# a candidate takes as long as some 250 scores (0.3 µs).
COLUMNS_PER_CANDIDATE = 256

# labels_B and squared_B.
Known = tuple[Tensor, Tensor]
# `nearest_triton.best_two`, or a function with the same arguments and results.
BestTwo = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Nearest:
    """Result of a search for R points.

    Attributes:
        labels_R: the nearest centroid; of equally near ones the lower number.
        squared_R: squared distance to it.
        others_R: lower bound of the squared distance to every other centroid that was searched; a centroid that equals one
            before it is not searched.
    """

    labels_R: Tensor
    squared_R: Tensor
    others_R: Tensor

    def put(self, rows: slice | Tensor, part: "Nearest") -> None:
        """Store the result of some of the points."""
        self.labels_R[rows], self.squared_R[rows], self.others_R[rows] = part.labels_R, part.squared_R, part.others_R


def squared_distances(points_QP: Tensor, centroids_QP: Tensor) -> Tensor:
    """Return the squared distance of each pair of rows, computed from the difference, which does not cancel."""
    return (points_QP - centroids_QP).square_().sum(dim=1)


class NearestSearch:
    """Repeated search for the nearest centroids of the same points, as in Lloyd's iterations.

    Args:
        points_NP: float32, finite.
        kind: of the coarse product (int8, bfloat16 or float32); the quickest of the machine by default.
        best_two: searches all points and centroids by the best two bounds of 16-bit products; by default the Triton kernel,
            on devices that run it.

    Attributes:
        best_two: None where searches use a coarse product of `kind`.
    """

    def __init__(self, points_NP: Tensor, *, kind: torch.dtype | None = None, best_two: BestTwo | None = None) -> None:
        self.points_NP = points_NP = points_NP.contiguous()
        blocks, device = row_blocks(points_NP), points_NP.device
        self.kind, self.best_two = kind, best_two
        self.half_width = points_NP.shape[1] + -points_NP.shape[1] % HALF_GROUP
        if kind is None and best_two is None and nearest_triton.available(device, self.half_width):
            self.best_two = nearest_triton.best_two
        totals = map_blocks(lambda block: points_NP[block].sum(dim=0, dtype=torch.float64), blocks, device)
        none_P = torch.zeros(points_NP.shape[1], dtype=torch.float64, device=device)
        self.mean_P = (sum(totals, none_P) / max(1, len(points_NP))).float()
        self.half_norms_N = torch.empty(len(points_NP), device=device)

        def measure(block: slice) -> None:
            self.half_norms_N[block] = (points_NP[block] - self.mean_P).square_().sum(dim=1) / 2

        map_blocks(measure, blocks, device)
        squares = self.half_norms_N.sum(dtype=torch.float64)
        self.reach = INT8_REACH * float((2 * squares / max(1, points_NP.numel())).sqrt())
        self.kept: dict[torch.dtype, Coarse] = {}
        self.first_K = torch.empty(0, dtype=torch.bool, device=points_NP.device)

    def use(self, centroids_KP: Tensor) -> None:
        """Set the centroids of the following searches."""
        self.centroids_KP = centroids_KP
        self.centred_KP = centroids_KP - self.mean_P
        self.half_norms_K = self.centred_KP.square().sum(dim=1) / 2
        self.first_K = first_of_equals(centroids_KP)

    def squared_distances(self, rows_R: slice | Tensor, labels_R: Tensor) -> Tensor:
        """Return the squared distances of the points `rows_R` to the centroids `labels_R`."""
        squared_R = torch.empty(len(labels_R), device=labels_R.device)

        def work(block: slice) -> None:
            if isinstance(rows_R, slice):
                points_BP = self.points_NP[rows_R][block]
            else:
                points_BP = self.points_NP.index_select(0, rows_R[block])
            squared_R[block] = squared_distances(points_BP, self.centroids_KP.index_select(0, labels_R[block]))

        map_blocks(work, blocks_of(slice(0, len(labels_R)), rows_at_once(self.points_NP)), labels_R.device)
        return squared_R

    @true_float32()
    def search(self, rows_R: Tensor | None = None, columns_C: Tensor | None = None, known: Known | None = None) -> Nearest:
        """Return the nearest among a known centroid of each point and the centroids `columns_C`.

        Args:
            rows_R: the points, ascending; all by default.
            columns_C: the centroids, ascending; all by default.
            known: the known centroid of each point and the squared distance to it. Without it, `columns_C` must be left out.
        """
        if self.best_two is not None and known is None:
            return self._fused(self.best_two, rows_R)
        n_rows, device = len(self.points_NP) if rows_R is None else len(rows_R), self.points_NP.device
        labels_R = torch.empty(n_rows, dtype=torch.int64, device=device)
        found = Nearest(labels_R, *(torch.empty(n_rows, device=device) for _ in range(2)))
        kind = self.kind or coarse_kind(device, self.points_NP.shape[1], first=known is None)
        among = _Columns(self, columns_C, kind)

        def work(block: slice) -> bool:
            rows = block if rows_R is None else rows_R[block]
            part = among.search(rows, None if known is None else (known[0][block], known[1][block]))
            if part is not None:
                found.put(block, part)
            return part is not None

        blocks = blocks_of(slice(0, n_rows), among.block_rows)
        while blocks:
            # The first block is a trial; it also caches what all blocks need.
            if work(blocks[0]):
                done = [True, *map_blocks(work, blocks[1:], device)]
                blocks = [block for block, well in zip(blocks, done, strict=True) if not well]
            if blocks:
                among = _Columns(self, columns_C, FINER[among.kind])
                blocks = [smaller for block in blocks for smaller in blocks_of(block, among.block_rows)]
        return found

    def _fused(self, best_two: BestTwo, rows_R: Tensor | None) -> Nearest:
        """Find the best two bounds in one kernel; where they leave several candidates, compare these in float32."""
        rows = slice(0, len(self.points_NP)) if rows_R is None else rows_R
        points = self.coarse(rows, torch.float16)
        centroids = CoarseCentroids(self.centred_KP, self.half_norms_K, torch.float16)
        offset_C, base_R = centroids.offsets(points, self.half_norms_N[rows])
        offset_C[: len(self.first_K)].masked_fill_(~self.first_K, torch.inf)
        unit = points.step * centroids.rows.step
        labels_R, seconds_R = best_two(points.rounded_RP, centroids.rows.rounded_RP, offset_C, scale=unit)
        found = Nearest(labels_R, self.squared_distances(rows, labels_R), 2 * (base_R - seconds_R))
        several = (found.others_R <= found.squared_R).nonzero().flatten()
        for block in blocks_of(slice(0, len(several)), max(LEAST_BLOCK_ROWS, BLOCK_SCORES_GPU // len(self.first_K))):
            self._settle_in_float32(found, rows, several[block])
        return found

    def _settle_in_float32(self, found: Nearest, rows: slice | Tensor, some: Tensor) -> None:
        """Compare some points of `found` with every centroid whose float32 score may be as high. Their bounds still hold."""
        rows_B, labels_B, squared_B = _rows(rows, some), found.labels_R[some], found.squared_R[some]
        points_BP, half_norms_B = self.points_NP.index_select(0, rows_B) - self.mean_P, self.half_norms_N[rows_B]
        offsets_K = torch.where(self.first_K, self.half_norms_K, torch.inf)
        scores_BK = torch.addmm(offsets_K, points_BP, self.centred_KP.T, beta=-1)
        slack_B = (FLOAT32_SLACK + points_BP.shape[1] * FLOAT32_ROUNDING) * (half_norms_B + self.half_norms_K.max())
        points_Q, labels_Q = (scores_BK >= (half_norms_B - squared_B / 2 - slack_B)[:, None]).nonzero(as_tuple=True)
        squared_Q = self.squared_distances(rows_B[points_Q], labels_Q)
        found.labels_R[some], found.squared_R[some] = _nearest_pairs(labels_B, squared_B, points_Q, labels_Q, squared_Q)

    def coarse(self, rows: slice | Tensor, kind: torch.dtype) -> Coarse:
        """Return points in fewer bits; 8-bit integers and 16-bit floats are kept, as every iteration needs them."""
        if kind not in (torch.int8, torch.float16):
            return round_rows(self.points_NP[rows] - self.mean_P, kind)
        if kind not in self.kept:
            longest = (2 * self.half_norms_N.max()).sqrt() if len(self.half_norms_N) else 0.0
            reach = self.reach if kind == torch.int8 else float(longest)
            width = self.half_width if kind == torch.float16 else self.points_NP.shape[1]
            rounded_NP = self.points_NP.new_empty(len(self.points_NP), width, dtype=kind)
            residual_N, length_N = torch.empty_like(self.half_norms_N), torch.empty_like(self.half_norms_N)

            def work(block: slice) -> float:
                part = round_rows(self.points_NP[block] - self.mean_P, kind, reach)
                rounded_NP[block], residual_N[block], length_N[block] = part.rounded_RP, part.residual_R, part.length_R
                return part.step

            steps = map_blocks(work, row_blocks(self.points_NP), rounded_NP.device)
            self.kept[kind] = Coarse(rounded_NP, steps[0] if steps else 1.0, residual_N, length_N)
        return self.kept[kind].take(rows)


class _Columns:
    """Centroids prepared for one search."""

    def __init__(self, owner: NearestSearch, columns_C: Tensor | None, kind: torch.dtype) -> None:
        self.owner, self.kind = owner, kind
        every_K = torch.arange(len(owner.centroids_KP), device=owner.centroids_KP.device)
        columns_C = every_K[owner.first_K] if columns_C is None else columns_C[owner.first_K[columns_C]]
        self.columns_C = columns_C
        self.place_K = torch.full_like(every_K, -1)
        self.place_K[columns_C] = every_K[: len(columns_C)]
        self.centroids = CoarseCentroids(owner.centred_KP[columns_C], owner.half_norms_K[columns_C], kind)
        self.n_columns = len(self.centroids.half_norms_C)
        scores = BLOCK_SCORES_GPU if columns_C.is_cuda else BLOCK_SCORES
        self.block_rows = max(LEAST_BLOCK_ROWS, scores // max(1, self.n_columns))

    def search(self, rows: slice | Tensor, known: Known | None) -> Nearest | None:
        """Return the nearest for a block of points; None if a finer product would be faster.

        Computes all bounds; contested points try their best candidate first, then all possible ones.
        """
        if known is not None and not self.n_columns:
            return Nearest(*known, torch.full_like(known[1], torch.inf))
        bounds = self.centroids.bounds(self.owner.coarse(rows, self.kind), self.owner.half_norms_N[rows])
        if known is None:
            bounds.group()
            labels_B = self.columns_C[bounds.best_columns()]
            known = labels_B, self.owner.squared_distances(rows, labels_B)
        bounds.leave_out(self.place_K[known[0]])
        found = Nearest(known[0].clone(), known[1].clone(), bounds.least_squares())
        contested = (found.others_R <= found.squared_R).nonzero().flatten()
        if not len(contested):
            return found
        bounds = bounds.take(contested)
        column_Q = bounds.best_columns()
        bounds.leave_out(column_Q)
        seconds_Q = bounds.least_squares()
        self._duel(found, rows, contested, column_Q, seconds_Q)
        squared_Q = found.squared_R[contested]
        still = (seconds_Q <= squared_Q).nonzero().flatten()
        points_P, columns_P = bounds.candidates(still, squared_Q)
        if self.kind in FINER and len(points_P) > len(found.labels_R) * (1 + self.n_columns / COLUMNS_PER_CANDIDATE):
            return None
        return self._settle(found, rows, contested[points_P], columns_P)

    def _duel(self, found: Nearest, rows: slice | Tensor, points_Q: Tensor, column_Q: Tensor, seconds_Q: Tensor) -> None:
        """Compare some points' nearest with one candidate each, in float32; all others are at least `seconds_Q` away."""
        labels_Q = self.columns_C[column_Q]
        squared_Q = self.owner.squared_distances(_rows(rows, points_Q), labels_Q)
        own_labels_Q, own_Q = found.labels_R[points_Q], found.squared_R[points_Q]
        wins_Q = (squared_Q < own_Q) | ((squared_Q == own_Q) & (labels_Q < own_labels_Q))
        found.labels_R[points_Q] = torch.where(wins_Q, labels_Q, own_labels_Q)
        found.squared_R[points_Q] = torch.minimum(squared_Q, own_Q)
        found.others_R[points_Q] = torch.minimum(seconds_Q, torch.maximum(squared_Q, own_Q))

    def _settle(self, found: Nearest, rows: slice | Tensor, points_P: Tensor, columns_P: Tensor) -> Nearest:
        """Compare points' nearest with any number of candidates, pair by pair, in float32."""
        if not len(points_P):
            return found
        labels_P = self.columns_C[columns_P]
        squared_P = self.owner.squared_distances(_rows(rows, points_P), labels_P)
        labels_B, squared_B = _nearest_pairs(found.labels_R, found.squared_R, points_P, labels_P, squared_P)
        smaller_B = torch.minimum(found.others_R, found.squared_R)
        return Nearest(labels_B, squared_B, torch.where(labels_B == found.labels_R, found.others_R, smaller_B))


def _nearest_pairs(
    labels_B: Tensor, squared_B: Tensor, points_Q: Tensor, labels_Q: Tensor, squared_Q: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the nearest of each point's label and those of its pairs, and the squared distance; ties to the lower label."""
    nearest_B = squared_B.scatter_reduce(0, points_Q, squared_Q, "amin")
    most = torch.iinfo(torch.int64).max
    won_Q = torch.where(squared_Q == nearest_B[points_Q], labels_Q, most)
    return torch.where(squared_B == nearest_B, labels_B, most).scatter_reduce(0, points_Q, won_Q, "amin"), nearest_B


def _rows(rows: slice | Tensor, points: Tensor) -> Tensor:
    """Return the rows of some points of a block."""
    return points + rows.start if isinstance(rows, slice) else rows[points]


def first_of_equals(rows_KP: Tensor) -> Tensor:
    """Return a mask (K) of the rows without an equal before them: the others are never the nearest of the lowest number."""
    weights_P = _weights(rows_KP.shape[1], rows_KP.device)
    mark_K = torch.cat([(block.double() * weights_P).sum(dim=1) for block in rows_KP.split(rows_at_once(rows_KP))])
    order_K = mark_K.argsort(stable=True)
    ordered_K = mark_K[order_K]
    suspects = (ordered_K[1:] == ordered_K[:-1]).nonzero().flatten()
    first_K = torch.ones(len(rows_KP), dtype=torch.bool, device=rows_KP.device)
    equal = (rows_KP[order_K[suspects]] == rows_KP[order_K[suspects + 1]]).all(dim=1)
    first_K[order_K[suspects + 1][equal]] = False
    return first_K


@cache
def _weights(size: int, device: torch.device) -> Tensor:
    """Return random weights: with evenly spaced ones many rows of small integers would have the same sum."""
    return torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)


def nearest_centroids(points_NP: Tensor, centroids_KP: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels_N and squared_N of each point's nearest centroid, exact in float32; ties go to the lower number."""
    search = NearestSearch(points_NP.float())
    search.use(centroids_KP.float())
    found = search.search()
    return found.labels_R, found.squared_R
