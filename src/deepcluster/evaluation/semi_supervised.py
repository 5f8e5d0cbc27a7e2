"""Fine-tuning of the whole network on few labels, compared with the same network from random weights.

As in the papers that report 1 % and 10 % of ImageNet's labels, with the schedule, the views, the momentum and the missing
weight decay of SwAV's published script (facebookresearch/swav, eval_semisup.py), and with two differences. The learning
rates are chosen on a held-out part of the labelled images, not on the validation images that the accuracy is measured on;
and that accuracy is the one after the last epoch, not after the best one.

N images of a loader, M of them, B batch, C classes.
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
from deepcluster.evaluation.datasets import labelled
from deepcluster.evaluation.datasets.label_choice import choose_labelled, hold_out, listed
from deepcluster.evaluation.logistic import top_of
from deepcluster.evaluation.options import SemiSupervisedOptions
from deepcluster.evaluation.results import Results
from deepcluster.evaluation.trials import Rates, Score, TestSet, Trials, batches_of, epochs_of
from deepcluster.run.model import Model, data_key
from deepcluster.run.resumable import digest_of

NAME = "semi-supervised"
# Changes with the format of the state: a state of an older version is not continued.
STATE_FORMAT = 2


@dataclass(frozen=True)
class Case:
    """Labelled images, and how the learning rates are chosen on them; all are indices into the chosen images.

    Attributes:
        name: the share of the labels, as in `10%`.
        everything_M: images on which the final network is trained.
        trained_M, held_M: images on which the networks of the grid are trained, and on which they are compared; none are
            held out where there is nothing to choose, or nothing to choose by.
    """

    name: str
    everything_M: Tensor
    trained_M: Tensor
    held_M: Tensor


def evaluate(model: Model, data: Path, options: SemiSupervisedOptions) -> Results:
    """Return top-1 and top-5 on `val` of networks fine-tuned on a part of the labels of `train`, for each share of them.

    Raises:
        InputError: wrong layout of the data, the shares, rates or the list can't be used, or more than 10 % of the images
            can't be read.
        TrainingError: the loss stayed finite with none of the rates.
        Interrupted: the state is kept; the same call continues to exactly the result it would have had.
    """
    for name in ("trunk_lr", "head_lr_factor"):
        if not getattr(options, name):
            raise InputError(f"{name} is empty; give at least one number")
    if not options.labels and options.label_list is None:
        raise InputError("labels is empty; give a share such as 0.1, or a label_list")
    parts = labelled.open_train_val(data)
    chosen = _choose(parts.train, options)
    chosen_M = torch.cat(list(chosen.values())).unique()
    source = ChosenImages(parts.train.source, chosen_M.numpy(), about="with a label")
    labels_M = parts.train.labels_N[chosen_M]
    with model.loader(source) as loader, model.loader(parts.val.source) as val_loader:
        loaders = {"labelled": loader, "val": val_loader}
        # All images once: unreadable ones are known before hours are spent, and the others are kept ready.
        with model.work.track("reading", sum(len(one.images) for one in loaders.values())) as advance:
            for one in loaders.values():
                one.fill(advance)
                check_unreadable(one, len(one.images))
        places = {name: torch.searchsorted(chosen_M, indices_M) for name, indices_M in chosen.items()}
        cases = [_case(name, _readable(places_M, loader), labels_M, options) for name, places_M in places.items()]
        images = [digest_of(case.name, case.everything_M.tolist()) for case in cases]
        facts = (data_key(source), data_key(parts.val.source), model.image_size, model.settings.reduce_to, images)
        resumable = model.resumable(NAME, STATE_FORMAT, options.as_dict(), *facts)
        trials = Trials(model, options, loader, labels_M, len(parts.train.class_names), resumable)
        test_set = TestSet(val_loader, _readable(torch.arange(len(parts.val.source)), val_loader), parts.val.labels_N)
        comparison = Comparison(options, trials, cases, test_set)
        comparison.run()
        resumable.done()
        notes = [*parts.notes, *_notes(parts, cases, labels_M, options)]
        for part, one in loaders.items():
            notes += labelled.left_out(part, one.unreadable, one.images.source.name)
    scores, top = comparison.scores, top_of(trials.n_classes)[-1]
    about = parts.describe() | {"labelled_images": {case.name: len(case.everything_M) for case in cases}}
    settings = options.as_dict() | {"image_size": model.image_size, "trained": comparison.trained()}
    results = {"top-1": {column: score.top_1 for column, score in scores.items()}}
    results[f"top-{top}"] = {column: score.top_k for column, score in scores.items()}
    return Results(NAME, about, settings, results, ("top-1", cases[-1].name), notes + comparison.notes)


class Comparison:
    """For each case, from the model's weights and from random ones: the grid of rates, then the final network.

    `scores` and `rates` are of the final network, by name of its column; `notes` tell deviations from the plan.
    """

    def __init__(self, options: SemiSupervisedOptions, trials: Trials, cases: list[Case], test_set: TestSet) -> None:
        self.options, self.trials, self.cases, self.test_set = options, trials, cases, test_set
        self.say = trials.model.work.reporter.say
        self.grid = grid_of(options)
        self.scores: dict[str, Score] = {}
        self.rates: dict[str, Rates] = {}
        self.notes: list[str] = []

    def run(self) -> None:
        """Train all networks."""
        trials, top = self.trials, top_of(self.trials.n_classes)
        total = 0
        for case, column, _ in self.columns():
            if len(case.held_M):
                names = [_name(column, "choice", rates) for rates in self.grid]
                total += sum(trials.steps_left(name, len(case.trained_M)) for name in names)
            # The rates of the final network are not chosen yet: those of the first try, unless it has begun with others.
            finals = [_name(column, "final", rates) for rates in self.grid]
            total += trials.steps_left(next(filter(trials.has_begun, finals), finals[0]), len(case.everything_M))
        with trials.resumable.track("fine-tuning", total, "steps", state=trials.state) as trials.advance:
            for case, column, scratch in self.columns():
                score, self.rates[column] = self._final(case, column, scratch)
                self.scores[column] = score
                self.say(f"{column}: top-1 {score.top_1:.1%}, top-{top[-1]} {score.top_k:.1%}")

    def columns(self) -> Iterator[tuple[Case, str, bool]]:
        """Yield each case, the name of its column, and whether the network starts from random weights."""
        for case in self.cases:
            yield case, case.name, False
            if self.options.scratch:
                yield case, f"{case.name} from scratch", True

    def trained(self) -> dict[str, dict[str, Any]]:
        """Return how the final networks were trained, by name of the column, for the results."""
        return {
            column: {
                "trunk_lr": self.rates[column].trunk,
                "head_lr": self.rates[column].head,
                "labelled_images": len(case.everything_M),
                "held_images": len(case.held_M),
                "batch_size": batches_of(len(case.everything_M), self.options.batch_size)[0],
                "epochs": epochs_of(len(case.everything_M), self.options),
            }
            for case, column, _ in self.columns()
        }

    def _final(self, case: Case, column: str, scratch: bool) -> tuple[Score, Rates]:
        """Train on all labelled images with the rates best on the held-out ones, or the next best should it diverge."""
        ranked = [middle_of(self.options)]
        if len(case.held_M):
            held, scores = TestSet(self.trials.loader, case.held_M, self.trials.labels_N), dict[Rates, Score]()
            for rates in self.grid:
                name = _name(column, "choice", rates)
                scores[rates] = self.trials.score(name, rates, case.trained_M, held, scratch=scratch)
            ranked = sorted(self.grid, key=lambda rates: rank(scores[rates]), reverse=True)
            right = f"{scores[ranked[0]].top_1:.1%} of {count_of(len(case.held_M), 'held-out image')}"
            self.say(f"{column}: chose the rates {ranked[0]}, with which {right} are right")
        for rates in ranked:
            name = _name(column, "final", rates)
            score = self.trials.score(name, rates, case.everything_M, self.test_set, scratch=scratch)
            if isfinite(score.loss):
                return score, rates
            self.notes.append(f"{column}: with the rates {rates} training on all labelled images diverged.")
        raise TrainingError(
            f"{column}: the loss did not stay finite with any of the rates {'; '.join(map(str, ranked))}. "
            "Try lower ones (--trunk-lr, --head-lr-factor)"
        )


def grid_of(options: SemiSupervisedOptions) -> list[Rates]:
    """Return all rates to try: each rate of the trunk with each multiple of it for the head."""
    pairs = product(options.trunk_lr, options.head_lr_factor)
    return list(dict.fromkeys(Rates(trunk, trunk * factor) for trunk, factor in pairs))


def middle_of(options: SemiSupervisedOptions) -> Rates:
    """Return the rates in the middle of the grid, the smaller ones of two, for cases with nothing to choose by."""
    trunks, factors = sorted(set(options.trunk_lr)), sorted(set(options.head_lr_factor))
    trunk = trunks[(len(trunks) - 1) // 2]
    return Rates(trunk, trunk * factors[(len(factors) - 1) // 2])


def rank(score: Score) -> tuple[float, float]:
    """Return the key by which rates are chosen, higher is better: top-1, then the loss."""
    return score.top_1, -score.loss


def _choose(train: labelled.Labelled, options: SemiSupervisedOptions) -> dict[str, Tensor]:
    """Return indices (M,) of the images that keep their label, by their share of all; smaller shares first."""
    if options.label_list is not None:
        indices_M = listed(train.source, Path(options.label_list))
        return {f"{100 * float(f'{len(indices_M) / len(train.source):.2g}'):g}%": indices_M}
    shares = sorted(set(options.labels))
    return {f"{100 * share:g}%": choose_labelled(train.labels_N, share, options.seed) for share in shares}


def _readable(indices_M: Tensor, loader: Loader) -> Tensor:
    return torch.tensor([index for index in indices_M.tolist() if index not in loader.unreadable], dtype=torch.int64)


def _case(name: str, indices_M: Tensor, labels_N: Tensor, options: SemiSupervisedOptions) -> Case:
    if len(labels_N[indices_M].unique()) < 2:
        raise InputError(
            f"{name} of the labels: {count_of(len(indices_M), 'image')} of a single class can't be learned from; "
            "at least two classes are needed"
        )
    trained_M, held_M = hold_out(labels_N[indices_M], options.held_out, options.seed)
    if len(grid_of(options)) == 1:
        held_M = held_M[:0]
    return Case(name, indices_M, indices_M[trained_M], indices_M[held_M])


def _name(column: str, purpose: str, rates: Rates) -> str:
    return f"{column}, {purpose}, {rates.trunk!r}, {rates.head!r}"


def _notes(parts: labelled.TrainVal, cases: list[Case], labels_N: Tensor, options: SemiSupervisedOptions) -> Iterator[str]:
    names = parts.train.class_names
    for case in cases:
        count_C = torch.bincount(labels_N[case.everything_M], minlength=len(names))
        least, most = int(count_C.min()), int(count_C.max())
        each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        yield f"{case.name}: {len(case.everything_M):,} labelled images, {each} of each class."
        without = [name for name, count in zip(names, count_C.tolist(), strict=True) if not count]
        if without:
            yield f"{case.name}: {count_of(len(without), 'class')} without any labelled image: {labelled.some(without, 5)}."
        if not len(case.held_M) and len(grid_of(options)) > 1:
            yield (
                f"{case.name}: with one labelled image per class none can be held out to choose rates by; those in the "
                f"middle of the grid were used, {middle_of(options)}."
            )
