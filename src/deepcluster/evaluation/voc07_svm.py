"""`voc07-svm`: linear SVMs on frozen stages, one per class of PASCAL VOC; with `--low-shot` also on few images.

The protocol follows Goyal et al., "Scaling and Benchmarking Self-Supervised Visual Representation Learning" (ICCV 2019);
the differences are in `DIFFERENCES` and `LOW_SHOT_DIFFERENCES`, which the results include.

N training images, n of them chosen for an SVM, M test images, C classes.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.evaluation import svm
from deepcluster.evaluation.datasets.labelled import ReadableRows, readable_rows
from deepcluster.evaluation.datasets.voc import ABSENT, CLASSES, DIFFICULT, PRESENT, Devkit, VocSplit, open_voc, splits_for
from deepcluster.evaluation.measures.rankings import AveragePrecisions, mean_average_precision
from deepcluster.evaluation.options import VocSvmOptions
from deepcluster.evaluation.results import Measured, Results
from deepcluster.run.model import Model, data_key
from deepcluster.run.resumable import ResumableState

SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
# k positives of a class come with k negatives for each of the other classes.
NEGATIVES_PER_POSITIVE = len(CLASSES) - 1
DIFFERENCES = (
    "not as in the published benchmark: images in which a class is only 'difficult' are left out of that class's SVM (there "
    "they are negatives), folds are shuffled by the seed, and AP is scikit-learn's and VOC 2007's, without interpolation"
)
LOW_SHOT_DIFFERENCES = (
    f"low-shot: k positives and {NEGATIVES_PER_POSITIVE} k negatives per class, or all there are; the cost of each SVM is "
    f"chosen by {svm.FOLDS}-fold cross-validation on these images, and is {svm.FIXED_COST:g} where k is under {svm.FOLDS}; "
    "the published benchmark takes the cost that is best on the test images, so its numbers are higher"
)


class _Case:
    """A class, and the training images that show it or do not; difficult ones are neither."""

    def __init__(self, number: int, labels_N: NDArray[np.int8]) -> None:
        self.number, self.name = number, CLASSES[number]
        self.counted_n = np.flatnonzero(labels_N != DIFFICULT)
        self.positive_n = labels_N[self.counted_n] == PRESENT
        self.positives = np.flatnonzero(labels_N == PRESENT)
        self.negatives = np.flatnonzero(labels_N == ABSENT)

    def job(self, stage: str, seed: int) -> svm.Job:
        """Return an SVM on all images that count."""
        return svm.Job(f"{stage} {self.name}", self.counted_n, self.positive_n, seed)

    def few(self, stage: str, k: int, *, seed: int, draw: int) -> svm.Job:
        """Return an SVM on k positives, and negatives in proportion; or as many as there are."""
        rng = np.random.default_rng([seed, self.number, k, draw])
        wanted = [(self.positives, k), (self.negatives, NEGATIVES_PER_POSITIVE * k)]
        positives, negatives = (rng.choice(all_n, min(count, all_n.size), replace=False) for all_n, count in wanted)
        chosen_n = np.sort(np.concatenate([positives, negatives]))
        return svm.Job(f"{stage} {self.name} k={k} draw {draw}", chosen_n, np.isin(chosen_n, positives), seed)


class _Svms:
    """Trains the SVMs of one evaluation. Finished ones are kept, so that a stop loses only those under way."""

    def __init__(self, model: Model, splits: Sequence[VocSplit], stages: Sequence[str], kept: ResumableState) -> None:
        self.model, self.kept = model, kept
        rows = _rows(model, splits, stages)
        self.notes = [note for split, one in zip(splits, rows, strict=True) for note in split.left_out(one.unreadable)]
        self.train, self.test = rows
        self.done: dict[str, Any] = kept.load() or {}
        all_cases = [_Case(number, self.train.labels_S[:, number].numpy()) for number in range(len(CLASSES))]
        self.cases = [case for case in all_cases if case.positives.size and case.negatives.size]
        self.left_out = [case.name for case in all_cases if case not in self.cases]
        # The numbers of positives that at least one class has.
        self.shots = [k for k in SHOTS if any(case.positives.size >= k for case in self.cases)]
        if not any((self.test.labels_S[:, case.number] == PRESENT).any() for case in self.cases):
            raise InputError(
                f"no class can be scored: none of VOC's {len(CLASSES)} has positives and negatives among the "
                f"{count_of(len(self.train.labels_S), 'image')} to train on, and a positive among the "
                f"{len(self.test.labels_S):,} to test on"
            )

    def score(self, jobs: Sequence[svm.Job], stage: str, what: str) -> list[AveragePrecisions]:
        """Return average precisions of each run of `len(self.cases)` jobs, which are those of the cases in order."""
        numbers, names = [case.number for case in self.cases], [case.name for case in self.cases]
        labels_MC = self.test.labels_S[:, numbers]

        def rows() -> svm.Rows:
            return svm.Rows(*(svm.unit_rows(one.rows[stage]) for one in (self.train, self.test)))

        missing = [job for job in jobs if job.key not in self.done]
        with self.kept.track(what, len(missing), "SVMs", state=lambda: self.done) as advance:
            for key, fitted in svm.fit_all(missing, rows, self.model.workers):
                self.done[key] = vars(fitted)
                advance(1)
        scores = [self.done[job.key]["scores_M"] for job in jobs]
        runs = [scores[first : first + len(names)] for first in range(0, len(scores), len(names))]
        return [mean_average_precision(labels_MC, torch.stack(run, dim=1), names) for run in runs]


def prepare(model: Model, data: Path, options: VocSvmOptions) -> None:
    """Extract the features of the images to train and to test on."""
    devkit, split, _ = _open(data, options)
    _rows(model, splits_for(devkit, split), model.stages(options.stages))


def _rows(model: Model, splits: Sequence[VocSplit], stages: Sequence[str]) -> list[ReadableRows]:
    return [readable_rows(model, one.source, one.labels_NC, stages, "pooled") for one in splits]


def _open(data: Path, options: VocSvmOptions) -> tuple[Devkit, str, bool]:
    """Return the devkit, the split to train on, and whether it is tested on `val`."""
    devkit = open_voc(data)
    # The test images of VOC 2012 have no annotations.
    val_only = options.split == "auto" and {"train", "val"} <= set(devkit.lists()) and not devkit.has_answers("test")
    return devkit, {"auto": "train" if val_only else "trainval"}.get(options.split, options.split), val_only


def evaluate(model: Model, data: Path, options: VocSvmOptions) -> Results:
    """Return mAP of linear SVMs on each stage; with `low_shot` also of SVMs trained on few images, on the best stage.

    Raises:
        InputError: no VOC devkit, a list, image or annotation is missing or damaged, no class can be scored, no such stage.
    """
    stages = model.stages(options.stages)
    devkit, split, val_only = _open(data, options)
    train, test = splits_for(devkit, split)
    images = [f"{data_key(s.source)} {hashlib.sha256(s.labels_NC.numpy().tobytes()).hexdigest()}" for s in (train, test)]
    kept = model.resumable("voc07-svm", *images, model.image_size, model.settings.reduce_to, options.as_dict())
    svms = _Svms(model, (train, test), stages, kept)
    scores: dict[str, AveragePrecisions] = {}
    for stage in stages:
        jobs = [case.job(stage, options.seed) for case in svms.cases]
        [scores[stage]] = svms.score(jobs, stage, f"SVMs on {stage}")
        model.work.reporter.detail(f"{stage}: mAP {scores[stage].mean:.3f}, of 11 points {scores[stage].mean_11_points:.3f}")
    best = max(stages, key=lambda stage: scores[stage].mean)
    results: dict[str, Measured] = {
        "mAP": {stage: scores[stage].mean for stage in stages},
        "mAP 11 points": {stage: scores[stage].mean_11_points for stage in stages},
    }
    results[f"AP on {best}"] = dict(scores[best].by_class)
    if options.low_shot:
        results |= _low_shot(svms, best, options)
    notes = [f"this {devkit.name} has no annotated test images: trained on train and tested on val"] if val_only else []
    notes += [*train.notes, *test.notes, *_notes(svms, scores[best], options)]
    kept.done()
    counts = {"train_images": len(train.source), "test_images": len(test.source), "classes": len(scores[best].by_class)}
    settings = options.as_dict() | {"split": split, "stages": list(stages), "image_size": model.image_size}
    settings |= {"costs": list(svm.COSTS), "folds": svm.FOLDS, "positive_weight": svm.POSITIVE_WEIGHT}
    settings["max_iterations"] = svm.MAX_ITERATIONS
    return Results("voc07-svm", {"description": devkit.name} | counts, settings, results, ("mAP", best), notes)


def _low_shot(svms: _Svms, stage: str, options: VocSvmOptions) -> dict[str, dict[str, float]]:
    """Return mean and (population) deviation of mAP over the draws, by k, as in the benchmark."""
    shots, draws = svms.shots, range(options.draws)
    jobs = [case.few(stage, k, seed=options.seed, draw=draw) for k in shots for draw in draws for case in svms.cases]
    means = [scores.mean for scores in svms.score(jobs, stage, f"low-shot SVMs on {stage}")]
    by_shot = np.array(means).reshape(len(shots), len(draws))
    return {
        name: {f"k={k}": float(value) for k, value in zip(shots, values, strict=True)}
        for name, values in (("low-shot mAP", by_shot.mean(axis=1)), ("low-shot deviation", by_shot.std(axis=1)))
    }


def _notes(svms: _Svms, scores: AveragePrecisions, options: VocSvmOptions) -> list[str]:
    """Return what a reader must know of the mean."""
    notes = []
    if svms.left_out:
        notes.append(f"left out of the mean, no positive or no negative image to train on: {', '.join(svms.left_out)}")
    if scores.left_out:
        notes.append(f"left out of the mean, no positive image to test on: {', '.join(scores.left_out)}")
    if few := [case.name for case in svms.cases if not svm.cross_validated(case.positive_n)]:
        notes.append(
            f"cost {svm.FIXED_COST:g}, not cross-validated, for fewer than {svm.FOLDS} images of a kind: {', '.join(few)}"
        )
    notes += svms.notes
    if stopped := sum(not kept["converged"] for kept in svms.done.values()):
        notes.append(f"{stopped:,} of {count_of(len(svms.done), 'SVM')} stopped at {svm.MAX_ITERATIONS:,} iterations")
    notes.append(DIFFERENCES)
    if options.low_shot:
        notes.append(LOW_SHOT_DIFFERENCES)
        shots = svms.shots
        if left := [f"{k}" for k in SHOTS if k not in shots]:
            notes.append(f"low-shot: no class has positives for k = {', '.join(left)}")
        for k in shots:
            if few := [case.name for case in svms.cases if case.positives.size < k]:
                notes.append(f"low-shot, k={k}: fewer positives, all there are, for {', '.join(few)}")
    return notes
