"""Multinomial logistic regression on frozen features: one number in seconds, without augmentation.

Features are standardised first: the mean is subtracted and the result divided by the deviation, which counts as at least a
tenth of the root mean square of all deviations (otherwise a unit that hardly ever fires would weigh as much as any other).
The objective is

    mean over the rows of the cross-entropy  +  l2 / 2 · (sum of the squared weights of standardised features)

minimised by L-BFGS; the biases are free. It equals scikit-learn's LogisticRegression at C = 1 / (l2 · N). Neighbouring
pixels of a map are strongly correlated: along a few directions features vary a thousand times as much as along most, which
makes the search long. It uses coordinates in which the widest directions are no wider than the next one; the optimum is
the same.

N rows, B rows of a block, D features, C classes, W widest directions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepcluster.core.device import free_memory_bytes
from deepcluster.core.work import Advance, no_advance

# From strong to weak; tried in this order, each from the solution of the one before.
STRENGTHS = (10.0, 1.0, 0.1, 0.01, 0.001, 1e-4, 1e-5)
# Used where there are too few rows to choose a strength on.
USUAL_STRENGTH = 0.1
FEWEST_TO_CHOOSE = 20
HELD_OUT = 0.2
LEAST_DEVIATION = 0.1
MAX_ITERATIONS = 200
# Tolerances of the gradient, as scikit-learn's: for the last fit, and while the strength is chosen.
TOLERANCE, ROUGH_TOLERANCE = 1e-4, 1e-3
# Number of directions that are narrowed, and of passes over the rows to find them.
WIDEST, PASSES_TO_FIND = 64, 3
# Directions with less than this share of the widest one's variance are left as they are.
NARROWEST = 0.01
BLOCK_BYTES = 64 << 20
# Most rows that a probe during training uses; more would only take time.
MOST_PROBED = 50_000


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier, for rows that are not standardised: float32 weights on the device of the fit.

    Attributes:
        l2: strength of the penalty it was fitted with.
        loss: the objective at the solution.
    """

    weight_CD: Tensor
    bias_C: Tensor
    l2: float
    loss: float

    def scores(self, rows_BD: Tensor) -> Tensor:
        """Return scores (B, C) of rows on the device."""
        return torch.addmm(self.bias_C, rows_BD.float(), self.weight_CD.T)

    def accuracy(self, rows_ND: Tensor, labels_N: Tensor, *, top: Sequence[int] = (1,)) -> list[float]:
        """Return shares of the rows whose label is among the `top` highest scores; labels of -1 are left out.

        Args:
            rows_ND: on any device, possibly in a file.
        """
        right, count = torch.zeros(len(top), dtype=torch.int64), 0
        for rows_BD, labels_B in _Rows(rows_ND, labels_N, (labels_N >= 0).nonzero()[:, 0], self.bias_C.device):
            count += len(labels_B)
            right += right_among(self.scores(rows_BD), labels_B, top).cpu()
        return [float(number) / max(1, count) for number in right]


def top_of(n_classes: int) -> list[int]:
    """Return the ranks up to which the right class counts: 1 and 5, or all classes where there are fewer."""
    return sorted({1, min(5, n_classes)})


def right_among(scores_BC: Tensor, labels_B: Tensor, top: Sequence[int]) -> Tensor:
    """Return how many rows have their label among the `top` highest scores; int64, one number for each of `top`."""
    ranked_BK = scores_BC.topk(max(top), dim=1).indices
    return torch.stack([(ranked_BK[:, :most] == labels_B[:, None]).sum() for most in top])


def fit_logistic(
    rows_ND: Tensor,
    labels_N: Tensor,
    n_classes: int,
    *,
    seed: int,
    l2: float | None = None,
    device: torch.device | None = None,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
    advance: Advance = no_advance,
) -> Logistic:
    """Fit a classifier; the result is a function of the arguments, and only its own random generator is used.

    Args:
        rows_ND: of any floating type, on any device, possibly in a file; read in blocks.
        labels_N: 0 … C-1; rows with -1, which may hold NaN, are left out. Or the share of each class in each row, (N, C).
        seed: of the choice of rows on which the strength is chosen.
        l2: strength; None: the one of `STRENGTHS` with the least cross-entropy on a held-out fifth of the rows.
        device: of the computation; must support float64.
        max_iterations, tolerance: of L-BFGS; the search ends when no component of the gradient is larger.
        advance: called before each pass over the rows; may raise to stop.
    """
    device = device or torch.device("cpu")
    used_M = (labels_N.reshape(len(labels_N), -1) >= 0).all(dim=1).nonzero()[:, 0]
    chooses = l2 is None and len(used_M) >= FEWEST_TO_CHOOSE
    order_M = np.random.default_rng([seed, 20]).permutation(len(used_M))
    n_held = round(HELD_OUT * len(used_M)) if chooses else 0
    is_held_M = torch.zeros(len(used_M), dtype=torch.bool)
    is_held_M[torch.from_numpy(order_M[:n_held])] = True
    keep = len(used_M) * rows_ND.shape[1] * 4 < _room(device)
    learned, held = (_Rows(rows_ND, labels_N, used_M[which_M], device, keep=keep) for which_M in (~is_held_M, is_held_M))
    scaling = _Scaling.of([learned, held], rows_ND.shape[1], device)
    solution_CD1 = torch.zeros(n_classes, rows_ND.shape[1] + 1, device=device)
    narrow = _Narrowing.of([learned, held], scaling, seed)
    if chooses:
        l2, solution_CD1 = _choose(_Objective([learned], scaling, narrow, advance), held, solution_CD1, max_iterations)
    strength = USUAL_STRENGTH if l2 is None else l2
    objective = _Objective([learned, held], scaling, narrow, advance)
    solution_CD1, loss = _minimise(objective, solution_CD1, strength, max_iterations, tolerance)
    return Logistic(*scaling.for_raw_rows(narrow(solution_CD1)), strength, loss)


def probe_accuracy(features_ND: Tensor, labels_N: Tensor, seed: int) -> float:
    """Return the top-1 accuracy on a fifth of the rows of a classifier fitted on the others.

    The fifth is chosen by a separate random generator. At most 50,000 labelled rows are used. Rows with label -1 or NaN are
    left out; the accuracy is NaN if fewer than two remain.
    """
    labels_N = torch.where(features_ND[:, 0].isnan().cpu(), -1, labels_N.cpu())
    order_M = torch.from_numpy(np.random.default_rng([seed, 80]).permutation((labels_N >= 0).nonzero()[:, 0].numpy()))
    order_M = order_M[:MOST_PROBED]
    if len(order_M) < 2:
        return float("nan")
    n_tested = max(1, round(HELD_OUT * len(order_M)))
    tested_N, learned_N = torch.full_like(labels_N, -1), torch.full_like(labels_N, -1)
    tested_N[order_M[:n_tested]] = labels_N[order_M[:n_tested]]
    learned_N[order_M[n_tested:]] = labels_N[order_M[n_tested:]]
    fitted = fit_logistic(features_ND, learned_N, int(labels_N.max()) + 1, seed=seed, device=features_ND.device)
    return fitted.accuracy(features_ND, tested_N)[0]


class _Rows:
    """Some of the rows, block by block, as float32 on the device with their labels; kept there if there is room."""

    def __init__(self, rows_ND: Tensor, labels_N: Tensor, chosen_M: Tensor, device: torch.device, *, keep: bool = False):
        self.rows_ND, self.labels_N, self.device = rows_ND, labels_N, device
        self.parts = chosen_M.split(max(1, BLOCK_BYTES // (4 * rows_ND.shape[1]))) if len(chosen_M) else ()
        self.count = len(chosen_M)
        self._kept = list(map(self._read, self.parts)) if keep else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._kept) if self._kept is not None else map(self._read, self.parts)

    def _read(self, part_B: Tensor) -> tuple[Tensor, Tensor]:
        there_B = part_B.to(self.rows_ND.device)
        rows_BD = self.rows_ND.index_select(0, there_B).to(self.device, torch.float32)
        return rows_BD, self.labels_N[part_B.to(self.labels_N.device)].to(self.device)


@dataclass(frozen=True)
class _Scaling:
    """Standardisation of features: (row - mean_D) * scale_D; float32."""

    mean_D: Tensor
    scale_D: Tensor

    @classmethod
    def of(cls, data: Sequence[_Rows], width: int, device: torch.device) -> "_Scaling":
        """Compute it in one pass, in float64."""
        count = sum(part.count for part in data)
        sums_D = torch.zeros(width, dtype=torch.float64, device=device)
        squares_D = torch.zeros_like(sums_D)
        for part in data:
            for rows_BD, _ in part:
                wide_BD = rows_BD.double()
                sums_D += wide_BD.sum(0)
                squares_D += wide_BD.square_().sum(0)
        mean_D = sums_D / max(1, count)
        variance_D = (squares_D / max(1, count) - mean_D.square()).clamp_(min=0)
        deviation_D = variance_D.sqrt().clamp_(min=LEAST_DEVIATION * float(variance_D.mean().sqrt()))
        scale_D = torch.where(deviation_D > 0, 1 / deviation_D, 0)
        return cls(mean_D.float(), scale_D.float())

    def for_raw_rows(self, solution_CD1: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights (C, D) and biases (C,) for raw rows, from those for standardised rows (biases last)."""
        weight_CD = solution_CD1[:, :-1] * self.scale_D
        return weight_CD, solution_CD1[:, -1] - weight_CD @ self.mean_D

    def gradient(self, gradient_CD: Tensor, gradient_C: Tensor) -> Tensor:
        """Return the gradient (C, D + 1) for standardised rows, from that for raw rows."""
        scaled_CD = torch.addr(gradient_CD, gradient_C, self.mean_D, alpha=-1) * self.scale_D
        return torch.cat([scaled_CD, gradient_C[:, None]], 1)


@dataclass(frozen=True)
class _Narrowing:
    """A map from weights in the search's coordinates to weights for standardised rows: smaller along the widest directions.

    Along these, features have unit variance in the search's coordinates, so that one tolerance of the gradient suits all.
    The map is its own transpose: it also takes gradients back. Biases, the last column, stay.
    """

    directions_DW: Tensor
    less_W: Tensor
    scale: float

    @classmethod
    def of(cls, data: Sequence[_Rows], scaling: _Scaling, seed: int) -> "_Narrowing":
        """Find the directions by subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""
        width, device = len(scaling.mean_D), scaling.mean_D.device
        start_DW = torch.randn(width, min(WIDEST, width), generator=torch.Generator().manual_seed(seed)).to(device)
        for _ in range(PASSES_TO_FIND):
            directions_DW = torch.linalg.qr(start_DW).Q
            start_DW = cls._spread(data, scaling, directions_DW)
        variance_W, turn_WW = torch.linalg.eigh((directions_DW.T @ start_DW).double())
        least = max(float(variance_W[0]), NARROWEST * float(variance_W[-1]))
        less_W = torch.where(variance_W > least, (least / variance_W).sqrt() - 1, 0)
        return cls(directions_DW @ turn_WW.float(), less_W.float(), least**-0.5 if least > 0 else 1.0)

    @staticmethod
    def _spread(data: Sequence[_Rows], scaling: _Scaling, directions_DW: Tensor) -> Tensor:
        """Return the covariance of standardised rows, times directions (D, W)."""
        scaled_DW = directions_DW * scaling.scale_D[:, None]
        shift_W, sums_DW = scaling.mean_D @ scaled_DW, torch.zeros_like(directions_DW)
        for part in data:
            for rows_BD, _ in part:
                # Each column sums to zero over all rows, so the mean need not be subtracted from the other factor, too.
                sums_DW.addmm_(rows_BD.T, rows_BD @ scaled_DW - shift_W)
        return sums_DW * scaling.scale_D[:, None] / max(1, sum(part.count for part in data))

    def __call__(self, weight_CD1: Tensor) -> Tensor:
        """Return the weights in the other coordinates, (C, D + 1)."""
        weight_CD = weight_CD1[:, :-1]
        along_CW = (weight_CD @ self.directions_DW) * self.less_W
        narrow_CD = torch.addmm(weight_CD, along_CW, self.directions_DW.T).mul_(self.scale)
        return torch.cat([narrow_CD, weight_CD1[:, -1:]], 1)


@dataclass(frozen=True)
class _Objective:
    """Cross-entropy of all rows with the penalty, and its gradient."""

    data: Sequence[_Rows]
    scaling: _Scaling
    narrow: _Narrowing
    advance: Advance

    def __call__(self, solution_CD1: Tensor, l2: float) -> tuple[Tensor, Tensor]:
        """Return the objective (float64) and its gradient (C, D + 1) at weights and biases (last) of the search."""
        self.advance(1)
        solution_CD1 = self.narrow(solution_CD1)
        weight_CD, bias_C = self.scaling.for_raw_rows(solution_CD1)
        gradient_CD, gradient_C = torch.zeros_like(weight_CD), torch.zeros_like(bias_C)
        loss = torch.zeros((), dtype=torch.float64, device=bias_C.device)
        for part in self.data:
            for rows_BD, labels_B in part:
                log_BC = torch.addmm(bias_C, rows_BD, weight_CD.T).log_softmax(1)
                if labels_B.is_floating_point():
                    loss -= (log_BC * labels_B).double().sum()
                    errors_BC = log_BC.exp_().sub_(labels_B)
                else:
                    loss -= log_BC.gather(1, labels_B[:, None]).double().sum()
                    errors_BC = log_BC.exp_()
                    errors_BC[torch.arange(len(labels_B), device=labels_B.device), labels_B] -= 1
                gradient_CD.addmm_(errors_BC.T, rows_BD)
                gradient_C += errors_BC.sum(0)
        count = max(1, sum(part.count for part in self.data))
        gradient_CD1 = self.scaling.gradient(gradient_CD, gradient_C) / count
        gradient_CD1[:, :-1].add_(solution_CD1[:, :-1], alpha=l2)
        return loss / count + l2 / 2 * solution_CD1[:, :-1].double().square().sum(), self.narrow(gradient_CD1)


def _minimise(objective: _Objective, start_CD1: Tensor, l2: float, most: int, tolerance: float) -> tuple[Tensor, float]:
    """Return the weights and biases (C, D + 1) that `most` iterations of L-BFGS reach, and the objective there."""
    solution_CD1 = start_CD1.clone()
    search = torch.optim.LBFGS(
        [solution_CD1],
        max_iter=most,
        tolerance_grad=tolerance,
        tolerance_change=1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> Tensor:
        loss, solution_CD1.grad = objective(solution_CD1.detach(), l2)
        return loss

    search.step(evaluate)
    return solution_CD1.detach(), float(objective(solution_CD1.detach(), l2)[0])


def _choose(learned: _Objective, held: _Rows, start_CD1: Tensor, max_iterations: int) -> tuple[float, Tensor]:
    """Return the strength with the least cross-entropy on the rows `held`, and its solution; stop at the first increase."""
    tested = _Objective([held], learned.scaling, learned.narrow, learned.advance)
    best: tuple[float, float, Tensor] | None = None
    solution_CD1 = start_CD1
    for strength in STRENGTHS:
        solution_CD1, _ = _minimise(learned, solution_CD1, strength, max_iterations, ROUGH_TOLERANCE)
        loss = float(tested(solution_CD1, 0.0)[0])
        if best is not None and not loss < best[0]:
            break
        best = loss, strength, solution_CD1
    return (best[1], best[2]) if best is not None else (USUAL_STRENGTH, start_CD1)


def _room(device: torch.device) -> int:
    """Return the bytes that rows may take on the device."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else free_memory_bytes() // 4
