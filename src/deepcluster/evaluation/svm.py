"""Linear SVMs of one class each, with the cost chosen by cross-validation, fitted by scikit-learn in several processes.

The costs, folds, weights and limits are those of Goyal et al., "Scaling and Benchmarking Self-Supervised Visual
Representation Learning" (ICCV 2019, section 6 and its published benchmark).

N training images, n of them chosen for an SVM, M test images, D features.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from sklearn.utils.parallel import Parallel, delayed
from torch import Tensor

from deepcluster.core.device import free_memory_bytes
from deepcluster.core.processes import leave_signals_to_parent
from deepcluster.run.kept_features import readable

# The powers of ten in the instructions of the published benchmark, and the powers of two that its code adds.
COSTS = tuple(sorted([10.0**power for power in range(-7, 3)] + [2.0**-power for power in range(4, 20)]))
FOLDS = 3
POSITIVE_WEIGHT = 2.0
MAX_ITERATIONS = 2_000
TOLERANCE = 1e-4
# For too few images to hold a third of them out: LinearSVC's default.
FIXED_COST = 1.0
# Below this many numbers the SVMs take less time than starting processes.
WORTH_PROCESSES = 5_000_000
# Bytes per number of a training row: 8, once more in a fold, and 16 in liblinear's own form.
BYTES_A_NUMBER = 32


@dataclass(frozen=True)
class Job:
    """One SVM to train; `key` distinguishes it from all others of an evaluation.

    Attributes:
        chosen_n, positive_n: indices of its training images, and which of these show the class; some of both kinds.
        seed: of the folds and of the order in which liblinear visits the images.
    """

    key: str
    chosen_n: NDArray[np.int64]
    positive_n: NDArray[np.bool_]
    seed: int


@dataclass(frozen=True)
class Fitted:
    """Scores (M,) of the test images, the cost that was used, and whether the SVM converged before its last iteration."""

    scores_M: Tensor
    cost: float
    converged: bool


@dataclass(frozen=True)
class Rows:
    """Unit rows of the training and the test images, in float64 as liblinear needs them."""

    train_ND: NDArray[np.float64]
    test_MD: NDArray[np.float64]


def unit_rows(features_ND: Tensor) -> NDArray[np.float64]:
    """Return rows of unit length of the readable images (no NaN); rows of zeros stay zero."""
    rows_ND = features_ND[readable(features_ND)].float()
    lengths_N1 = rows_ND.norm(dim=1, keepdim=True)
    unit_ND: NDArray[np.float64] = (rows_ND / lengths_N1.clamp(min=torch.finfo(torch.float32).tiny)).double().numpy()
    return unit_ND


def cross_validated(positive_n: NDArray[np.bool_]) -> bool:
    """Return whether there are enough images of both kinds for cross-validation: one of each in each fold."""
    return min(int(positive_n.sum()), int((~positive_n).sum())) >= FOLDS


def in_own_span(rows_nD: NDArray[np.float64], others_MD: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return rows, and others, in n coordinates of the span of the rows instead of D, where n is at most half of D.

    The weights of an SVM lie in the span of its rows, so the scores are the same: few images of 9,600 numbers each are
    faster by D / n (`rows_nD` keep their products with one another and with the others).
    """
    if 2 * len(rows_nD) > rows_nD.shape[1]:
        return rows_nD, others_MD
    basis_Dn, corner_nn = np.linalg.qr(rows_nD.T)
    return np.ascontiguousarray(corner_nn.T), others_MD @ basis_Dn


def train_svm(rows_nD: NDArray[np.float64], positive_n: NDArray[np.bool_], cost: float, seed: int) -> LinearSVC:
    """Fit a linear SVM with L2 penalty and squared hinge loss, in which positives weigh twice."""
    svm = LinearSVC(
        C=cost,
        class_weight={True: POSITIVE_WEIGHT, False: 1.0},
        # The form with fewer unknowns, as "auto" chooses it; also for rows of as many coordinates as there are rows.
        dual=len(rows_nD) <= rows_nD.shape[1],
        tol=TOLERANCE,
        max_iter=MAX_ITERATIONS,
        random_state=seed,
    )
    with warnings.catch_warnings():
        # Large costs of the grid may run out of iterations, which is no error: `Fitted.converged` reports those used.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return svm.fit(rows_nD, positive_n)


def choose_cost(rows_nD: NDArray[np.float64], positive_n: NDArray[np.bool_], seed: int) -> float:
    """Return the cost with the best average precision on held-out thirds, stratified and shuffled; ties: the smallest."""
    if not cross_validated(positive_n):
        return FIXED_COST
    found = np.zeros((FOLDS, len(COSTS)))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(rows_nD, positive_n)
    for fold, (seen, held) in enumerate(folds):
        for number, cost in enumerate(COSTS):
            svm = train_svm(rows_nD[seen], positive_n[seen], cost, seed)
            found[fold, number] = average_precision_score(positive_n[held], svm.decision_function(rows_nD[held]))
    return COSTS[int(found.mean(axis=0).argmax())]


def fit_job(job: Job, rows: Rows) -> Fitted:
    """Choose the cost, train on all images of the job, and score the test images."""
    rows_nD, test_MD = in_own_span(rows.train_ND[job.chosen_n], rows.test_MD)
    cost = choose_cost(rows_nD, job.positive_n, job.seed)
    svm = train_svm(rows_nD, job.positive_n, cost, job.seed)
    scores_M = torch.from_numpy(svm.decision_function(test_MD))
    return Fitted(scores_M, cost, bool(np.max(svm.n_iter_) < MAX_ITERATIONS))


def fit_all(jobs: Sequence[Job], make_rows: Callable[[], Rows], workers: int) -> Iterator[tuple[str, Fitted]]:
    """Fit the jobs, and yield the key and the result of each in order; in processes if that outweighs starting them.

    Not in threads: liblinear has one random generator per process, so results would depend on the order of the threads.
    """
    if not jobs:
        return
    rows = make_rows()
    numbers = max(job.chosen_n.size for job in jobs) * rows.train_ND.shape[1]
    room = int(0.8 * free_memory_bytes() / (BYTES_A_NUMBER * numbers))
    processes = max(1, min(workers, room, len(jobs)))
    if processes == 1 or numbers < WORTH_PROCESSES:
        yield from ((job.key, fit_job(job, rows)) for job in jobs)
        return
    calls = (delayed(_fit_in_process)(job, rows.train_ND, rows.test_MD) for job in jobs)
    yield from zip((job.key for job in jobs), Parallel(processes, return_as="generator")(calls), strict=True)


def _fit_in_process(job: Job, train_ND: NDArray[np.float64], test_MD: NDArray[np.float64]) -> Fitted:
    leave_signals_to_parent()  # It keeps the results so far.
    return fit_job(job, Rows(train_ND, test_MD))
