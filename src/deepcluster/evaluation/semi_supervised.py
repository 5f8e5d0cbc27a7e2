"""Fine-tuning of the whole network on few labels, beside the same network from random weights.

As in the papers that report 1 % and 10 % of ImageNet's labels (among them SwAV, whose published script the schedule, the
views, the momentum and the missing weight decay are from: `trainings`), with two differences. The rates are chosen on a
held part of the labelled images, not on the validation images that the accuracy is of; and that accuracy is of the last
epoch, not of the best one.

N images, M of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepcluster.core.errors import InputError, TrainingError
from deepcluster.core.text import count_of
from deepcluster.data.loader import Loader
from deepcluster.data.sources.joined import ChosenImages
from deepcluster.data.survey import check_unreadable
from deepcluster.evaluation.datasets.label_choice import choose_labelled, hold_out, listed
from deepcluster.evaluation.datasets.labelled import Labelled, TrainVal, open_train_val
from deepcluster.evaluation.learners.trainings import Exam, Rates, Score, Trainings, batches_of, epochs_of, top_of
from deepcluster.evaluation.options import SemiSupervisedOptions
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model, data_key
from deepcluster.run.resumable import digest_of

NAME = "semi-supervised"
# A state of an older program is not gone on with.
STATE_FORMAT = 1
FROM_SCRATCH = " from scratch"


@dataclass(frozen=True)
class Case:
    """Images with a label, and how the rates are chosen on them; all are indices into the chosen images.

    Attributes:
        name: the share of the labels, as in `10%`.
        everything_M: what the final network is trained on.
        learned_M, held_M: what the networks of the grid are trained on, and what they are compared on; none is held where
            there is nothing to choose, or nothing to choose by.
    """

    name: str
    everything_M: Tensor
    learned_M: Tensor
    held_M: Tensor


def evaluate(model: Model, data: Path, options: SemiSupervisedOptions) -> Results:
    """Top-1 and top-5 on `val` of networks fine-tuned on a part of the labels of `train`, for each share of them.

    Raises:
        InputError: the data are not laid out so, the shares, rates or the list can't be used, or more than 10 % of the
            images can't be read.
        TrainingError: with no rates did the loss stay finite.
        Interrupted: the state is kept; the same call goes on to the very result it would have had.
    """
    _check(options)
    parts = open_train_val(data)
    chosen = _choose(parts.train, options)
    looked_at_M = torch.cat(list(chosen.values())).unique()
    source = ChosenImages(parts.train.source, looked_at_M.numpy(), about="with a label")
    labels_M = parts.train.labels_N[looked_at_M]
    with model.loader(source) as loader, model.loader(parts.val.source) as val_loader:
        _read(model, {"labelled": loader, "val": val_loader})
        cases = [
            _case(name, _readable(torch.searchsorted(looked_at_M, indices_M), loader), labels_M, options)
            for name, indices_M in chosen.items()
        ]
        facts = (NAME, STATE_FORMAT, options.as_dict(), data_key(source), data_key(parts.val.source), _facts(model, cases))
        unfinished = model.resumable(*facts)
        trainings = Trainings(model, options, loader, labels_M, len(parts.train.class_names), unfinished)
        exam = Exam(val_loader, _readable(torch.arange(len(parts.val.source)), val_loader), parts.val.labels_N)
        comparison = Comparison(model, options, trainings, cases, exam)
        comparison.run()
        unfinished.done()
        notes = [*_notes(parts, cases, labels_M, options), *_unreadable({"labelled": loader, "val": val_loader})]
    return _results(model, parts, options, comparison, [*notes, *comparison.notes])


class Comparison:
    """For each case, from the model's weights and from random ones: the grid of rates, then the network that counts.

    Attributes:
        scores, rates: of that network, by name of its column.
        notes: what went otherwise than planned.
    """

    def __init__(
        self,
        model: Model,
        options: SemiSupervisedOptions,
        trainings: Trainings,
        cases: list[Case],
        exam: Exam,
    ) -> None:
        self.model, self.options, self.trainings, self.cases, self.exam = model, options, trainings, cases, exam
        self.grid = grid_of(options)
        self.scores: dict[str, Score] = {}
        self.rates: dict[str, Rates] = {}
        self.notes: list[str] = []

    def run(self) -> None:
        """Train them all."""
        total = sum(self.trainings.images_left(name, count) for name, count in self._planned())
        with self.model.work.reporter.track("fine-tuning", total) as progress:
            self.trainings.progress = progress
            for case, column, scratch in self._columns():
                self.scores[column], self.rates[column] = self._final(case, column, scratch)
                self._say(column)

    def _columns(self) -> Iterator[tuple[Case, str, bool]]:
        for case in self.cases:
            yield case, case.name, False
            if self.options.scratch:
                yield case, case.name + FROM_SCRATCH, True

    def _planned(self) -> Iterator[tuple[str, int]]:
        """Each training's name and number of images; of the final ones, whose rates are not chosen yet, the first try."""
        for case, column, _ in self._columns():
            if len(case.held_M):
                yield from ((_name(column, "choice", rates), len(case.learned_M)) for rates in self.grid)
            finals = [_name(column, "final", rates) for rates in self.grid]
            yield next(filter(self.trainings.begun, finals), finals[0]), len(case.everything_M)

    def _ranked(self, case: Case, column: str, scratch: bool) -> list[Rates]:
        """The rates of the grid, those that did best on the held images first."""
        if not len(case.held_M):
            return [middle_of(self.options)]
        held = Exam(self.trainings.loader, case.held_M, self.trainings.labels_N)
        scores = {
            rates: self.trainings.score(_name(column, "choice", rates), rates, case.learned_M, held, scratch=scratch)
            for rates in self.grid
        }
        ranked = sorted(self.grid, key=lambda rates: rank(scores[rates]), reverse=True)
        best = scores[ranked[0]]
        right = f"{best.top_1:.1%} of {count_of(len(case.held_M), 'held image')}"
        self.model.work.reporter.say(f"{column}: chose the rates {_said(ranked[0])}, which get {right} right")
        return ranked

    def _final(self, case: Case, column: str, scratch: bool) -> tuple[Score, Rates]:
        """The network trained on all labelled images with the best rates; with the next best, should it diverge."""
        ranked = self._ranked(case, column, scratch)
        for rates in ranked:
            name = _name(column, "final", rates)
            score = self.trainings.score(name, rates, case.everything_M, self.exam, scratch=scratch)
            if isfinite(score.loss):
                return score, rates
            self.notes.append(f"{column}: with the rates {_said(rates)} training on all labelled images diverged.")
        raise TrainingError(
            f"{column}: the loss did not stay finite with any of the rates {'; '.join(map(_said, ranked))}. "
            "Try lower ones (--trunk-lr, --head-lr-factor)"
        )

    def _say(self, column: str) -> None:
        score = self.scores[column]
        top = top_of(self.trainings.n_classes)
        self.model.work.reporter.say(f"{column}: top-1 {score.top_1:.1%}, top-{top[-1]} {score.top_k:.1%}")


def grid_of(options: SemiSupervisedOptions) -> list[Rates]:
    """All rates to try: each one of the trunk with each multiple of it for the head."""
    pairs = product(options.trunk_lr, options.head_lr_factor)
    return list(dict.fromkeys(Rates(trunk, trunk * factor) for trunk, factor in pairs))


def middle_of(options: SemiSupervisedOptions) -> Rates:
    """The rates in the middle of the grid, the smaller ones of two, for where there is nothing to choose by."""
    trunks, factors = sorted(set(options.trunk_lr)), sorted(set(options.head_lr_factor))
    trunk = trunks[(len(trunks) - 1) // 2]
    return Rates(trunk, trunk * factors[(len(factors) - 1) // 2])


def rank(score: Score) -> tuple[float, float]:
    """What the rates are chosen by, the greater the better: top-1, then the loss; 0 and infinite of what diverged."""
    return score.top_1, -score.loss


def _check(options: SemiSupervisedOptions) -> None:
    for name in ("trunk_lr", "head_lr_factor"):
        if not getattr(options, name):
            raise InputError(f"{name} is empty; give at least one number")
    if not options.labels and options.label_list is None:
        raise InputError("labels is empty; give a share such as 0.1, or a label_list")


def _choose(train: Labelled, options: SemiSupervisedOptions) -> dict[str, Tensor]:
    """Indices (M,) of the images that keep their label, by the share that they are; smaller shares first."""
    if options.label_list is not None:
        indices_M = listed(train.source, Path(options.label_list))
        return {_percent(float(f"{len(indices_M) / len(train.source):.2g}")): indices_M}
    return {_percent(share): choose_labelled(train.labels_N, share, options.seed) for share in sorted(set(options.labels))}


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _read(model: Model, loaders: dict[str, Loader]) -> None:
    """Decode all images once: unreadable ones are known before hours are spent, and the others are kept ready."""
    with model.work.reporter.track("reading", sum(len(loader.images) for loader in loaders.values())) as progress:
        for loader in loaders.values():
            for done in loader.read_all(torch.arange(len(loader.images))):
                progress(done)
                model.work.interruption.check()
            check_unreadable(loader, len(loader.images))


def _readable(indices_M: Tensor, loader: Loader) -> Tensor:
    return torch.tensor([index for index in indices_M.tolist() if index not in loader.unreadable], dtype=torch.int64)


def _case(name: str, indices_M: Tensor, labels_N: Tensor, options: SemiSupervisedOptions) -> Case:
    if len(labels_N[indices_M].unique()) < 2:
        raise InputError(
            f"{name} of the labels: {count_of(len(indices_M), 'image')} of a single class can't be learned from; "
            "at least two classes are needed"
        )
    learned_M, held_M = hold_out(labels_N[indices_M], options.held_out, options.seed)
    if len(grid_of(options)) == 1:
        held_M = held_M[:0]
    return Case(name, indices_M, indices_M[learned_M], indices_M[held_M])


def _facts(model: Model, cases: list[Case]) -> tuple[object, ...]:
    images = [digest_of(case.name, case.everything_M.tolist()) for case in cases]
    return model.image_size, model.settings.reduce_to, images


def _name(column: str, purpose: str, rates: Rates) -> str:
    return f"{column}, {purpose}, {rates.trunk!r}, {rates.head!r}"


def _said(rates: Rates) -> str:
    return f"{rates.trunk:g} (trunk) and {rates.head:g} (head)"


def _notes(parts: TrainVal, cases: list[Case], labels_N: Tensor, options: SemiSupervisedOptions) -> Iterator[str]:
    names = parts.train.class_names
    for case in cases:
        count_C = torch.bincount(labels_N[case.everything_M], minlength=len(names))
        least, most = int(count_C.min()), int(count_C.max())
        each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        yield f"{case.name}: {len(case.everything_M):,} labelled images, {each} of each class."
        without = [name for name, count in zip(names, count_C.tolist(), strict=True) if not count]
        if without:
            some = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
            yield f"{case.name}: {count_of(len(without), 'class')} without any labelled image: {some}."
        if not len(case.held_M) and len(grid_of(options)) > 1:
            yield (
                f"{case.name}: with one labelled image a class none can be held out to choose rates by; those in the middle "
                f"of the grid were taken, {_said(middle_of(options))}."
            )


def _unreadable(loaders: dict[str, Loader]) -> Iterator[str]:
    for part, loader in loaders.items():
        bad = sorted(loader.unreadable.items())
        if bad:
            some = "; ".join(f"{loader.images.source.name(index)} ({reason})" for index, reason in bad[:3])
            more = "; …" if len(bad) > 3 else ""
            yield f"{count_of(len(bad), f'{part} image')} can't be read and left out: {some}{more}."


def _results(model: Model, parts: TrainVal, options: SemiSupervisedOptions, found: Comparison, notes: list[str]) -> Results:
    trained: dict[str, Any] = {}
    for case, column, _ in found._columns():
        count = len(case.everything_M)
        trained[column] = {
            "trunk_lr": found.rates[column].trunk,
            "head_lr": found.rates[column].head,
            "labelled_images": count,
            "held_images": len(case.held_M),
            "batch_size": batches_of(count, options.batch_size)[0],
            "epochs": epochs_of(count, options),
        }
    top = top_of(found.trainings.n_classes)
    return Results(
        protocol=NAME,
        data=parts.describe() | {"labelled_images": {case.name: len(case.everything_M) for case in found.cases}},
        settings=options.as_dict() | {"image_size": model.image_size, "trained": trained},
        results={
            "top-1": {column: score.top_1 for column, score in found.scores.items()},
            f"top-{top[-1]}": {column: score.top_k for column, score in found.scores.items()},
        },
        headline=("top-1", found.cases[-1].name),
        notes=notes,
    )
