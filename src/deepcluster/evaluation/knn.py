"""k-nearest-neighbour accuracy of frozen features, without training (cosine, weighted votes; Wu et al., CVPR 2018).

N known images, M images to classify, D features, K votes, C classes, B rows of a block.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.evaluation.datasets.labelled import ReadableRows, TrainVal, left_out, open_train_val, readable_rows
from deepcluster.evaluation.options import KnnOptions
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model

TEMPERATURE = 0.07
BLOCK_ROWS = 1024
# Votes are counted in this fraction of the nearest one's: sums of integers do not depend on their order.
PARTS = 2.0**40
# Number of votes that a summary shows; --eval-every uses the same.
USUAL_K = 20
USUAL_KS = (1, 5, 10, 20, 200)
# Only with more classes: top-5 of five classes is always right.
TOP = 5


def evaluate(model: Model, data: Path, options: KnnOptions) -> Results:
    """Return the accuracy of the votes of the nearest training images on the held-out ones; one search serves all `k`.

    Raises:
        InputError: `data` has no two parts with the same classes, or k is over the number of training images.
    """
    parts, stages, known, asked = prepare(model, data, options)
    ks = tuple(dict.fromkeys(options.k)) or tuple(k for k in USUAL_KS if k <= len(known.labels_S)) or (1,)
    _check_k(ks, len(known.labels_S), f"images of {data}'s training part that can be read")
    n_classes, device = len(parts.train.class_names), model.machine.clustering_device
    tops = (1, TOP) if n_classes > TOP else (1,)
    results: dict[str, dict[str, float]] = {f"top-{top}": {} for top in tops}
    labels = known.labels_S.to(device), asked.labels_S.to(device)
    for stage in stages:
        rows_MD, known_ND = asked.at(stage, device), known.at(stage, device)
        with model.work.track(f"neighbours by {stage}", len(rows_MD)) as advance:
            nearest = nearest_neighbours(rows_MD, known_ND, k=max(ks), metric="cosine", advance=advance)
        ranks = ranks_of_truth(nearest, *labels, ks=ks, n_classes=n_classes, temperature=options.temperature)
        for k, ranks_M in ranks.items():
            for top in tops:
                results[f"top-{top}"][_case(stage, k, stages)] = float((ranks_M < top).double().mean())
    shown = USUAL_K if USUAL_K in ks else ks[0]
    about = {"path": str(data), **parts.describe()}
    settings = {**options.as_dict(), "k": list(ks), "stages": list(stages), "image_size": model.image_size}
    notes = parts.notes + left_out("train", known.unreadable, parts.train.source.name)
    notes += left_out("val", asked.unreadable, parts.val.source.name)
    return Results("knn", about, settings, results, ("top-1", _case(stages[-1], shown, stages)), notes)


def prepare(model: Model, data: Path, options: KnnOptions) -> tuple[TrainVal, tuple[str, ...], ReadableRows, ReadableRows]:
    """Extract the features of both parts; return the parts, the stages, and the rows of each part."""
    parts = open_train_val(data)
    stages = model.stages(options.stages, usual=model.trunk.embed_stage)
    _check_k(options.k, len(parts.train.source), f"images of {data}'s training part")
    known, asked = (readable_rows(model, one.source, one.labels_N, stages) for one in (parts.train, parts.val))
    return parts, stages, known, asked


def _case(stage: str, k: int, stages: Sequence[str]) -> str:
    return f"k={k}" if len(stages) == 1 else f"{stage} k={k}"


def _check_k(ks: Sequence[int], n_known: int, what: str) -> None:
    if max(ks, default=0) > n_known:
        smaller = [str(k) for k in ks if k <= n_known] or [str(n_known)]
        raise InputError(f"k={max(ks)} neighbours are more than the {n_known:,} {what}; use --k {','.join(smaller)}")


def ranks_of_truth(
    neighbours: tuple[Tensor, Tensor],
    known_labels_N: Tensor,
    labels_M: Tensor,
    *,
    ks: Sequence[int],
    n_classes: int,
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """Return for each k how many classes (M,) are ranked before each image's own by the votes of its k nearest; 0: right.

    Ties, including classes without votes, go to the lower class index.

    Args:
        neighbours: cosines and indices (M, K) of known images, nearest first, K the largest of `ks`.
        known_labels_N, labels_M: 0 … n_classes - 1.
    """
    ranks = {k: torch.empty_like(labels_M) for k in ks}
    for rows, k, votes_BC in _votes(*neighbours, known_labels_N, n_classes, ks, temperature):
        own_B1 = labels_M[rows, None]
        own_votes_B1 = votes_BC.gather(1, own_B1)
        lower_BC = torch.arange(n_classes, device=votes_BC.device) < own_B1
        ranks[k][rows] = ((votes_BC > own_votes_B1) | ((votes_BC == own_votes_B1) & lower_BC)).sum(dim=1)
    return ranks


def _votes(
    cosines_MK: Tensor, voters_MK: Tensor, labels_N: Tensor, n_classes: int, ks: Sequence[int], temperature: float
) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield the rows of a block, k, and votes_BC of each row's k nearest, in fractions of the nearest one's vote.

    The votes of a larger k include those of a smaller one: the same tensor is updated for the next k.
    """
    for start in range(0, len(cosines_MK), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        cosines_BK = cosines_MK[rows]
        parts_BK = (((cosines_BK - cosines_BK[:, :1]) / temperature).exp() * PARTS).long()
        classes_BK = labels_N[voters_MK[rows]]
        votes_BC = torch.zeros(len(cosines_BK), n_classes, dtype=torch.int64, device=cosines_MK.device)
        counted = 0
        for k in sorted(set(ks)):
            votes_BC.scatter_add_(1, classes_BK[:, counted:k], parts_BK[:, counted:k])
            counted = k
            yield rows, k, votes_BC


def knn_predict(
    known_ND: Tensor,
    labels_N: Tensor,
    features_MD: Tensor,
    *,
    k: int = 20,
    temperature: float = TEMPERATURE,
    exclude_self: bool = False,
) -> Tensor:
    """Return labels (M,) by the votes of the k nearest known images, each weighted with exp(cosine / temperature).

    Ties go to the lower class index; among equally near images the first ones vote.

    Args:
        known_ND, labels_N: features and labels (0 … C-1) of the images that vote.
        exclude_self: `features_MD` are `known_ND`; an image does not vote for itself.

    Raises:
        InputError: k is under 1 or over the number of images that can vote.
    """
    voters = len(known_ND) - exclude_self
    if not 1 <= k <= voters:
        raise InputError(f"k={k} neighbours must be between 1 and the {count_of(voters, 'image')} that can vote")
    cosines_MK, voters_MK = nearest_neighbours(features_MD, known_ND, k=k, metric="cosine", exclude_self=exclude_self)
    predicted_M = torch.empty(len(features_MD), dtype=labels_N.dtype, device=labels_N.device)
    n_classes = int(labels_N.max()) + 1
    for rows, _, votes_BC in _votes(cosines_MK, voters_MK, labels_N, n_classes, (k,), temperature):
        predicted_M[rows] = votes_BC.argmax(dim=1)
    return predicted_M


def knn_accuracy(known_ND: Tensor, known_labels_N: Tensor, features_MD: Tensor, labels_M: Tensor, *, k: int = 20) -> float:
    """Return the share of the M images that `knn_predict` labels correctly (top-1)."""
    return float((knn_predict(known_ND, known_labels_N, features_MD, k=k) == labels_M).double().mean())


def leave_one_out_accuracy(features_ND: Tensor, labels_N: Tensor, *, k: int = 20) -> float:
    """Return the share of images that all the others label correctly."""
    return float((knn_predict(features_ND, labels_N, features_ND, k=k, exclude_self=True) == labels_N).double().mean())
