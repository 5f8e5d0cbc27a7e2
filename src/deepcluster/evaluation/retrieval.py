"""`retrieval`: buildings retrieved by R-MAC on Oxford5k, Paris6k and their revisited versions, as the paper's table 5.

Tolias, Sicre and Jégou (ICLR 2016), as the 2018 release uses it: images at a longer side of 1,024 px, regions of the last
convolutional stage, PCA-whitening learned on the other data set, queries cropped to their region of interest.
N images, Q queries, R regions, C channels, P numbers of a descriptor.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.evaluation.datasets import buildings
from deepcluster.evaluation.datasets.labelled import left_out, some
from deepcluster.evaluation.options import RetrievalOptions
from deepcluster.evaluation.regions import RegionReader, View, aggregate
from deepcluster.evaluation.results import Results
from deepcluster.models.trunk import FEATURES
from deepcluster.run.model import Model

SCALES = (1.0, 2**-0.5, 0.5)
KS = (1, 5, 10)

Names = Collection[str]


@dataclass(frozen=True)
class Describer:
    """Turns images into descriptors: regions at one or several sizes, whitened and summed."""

    reader: RegionReader
    sizes: tuple[int, ...]
    whitening: Whitening

    def describe(self, source: ImageSource, views: Sequence[View], what: str) -> tuple[Tensor, dict[int, str]]:
        """Return descriptors (N, P) of unit length on the CPU, zero for unreadable images, and why, by place."""
        device = self.reader.model.machine.clustering_device
        total_NP = torch.zeros(len(views), self.whitening.n_components)
        faults: dict[int, str] = {}
        for size in self.sizes:
            first = 0
            for part in self.reader.parts(source, views, size, what):
                count = len(part.counts_N)
                if len(part.rows_RC):
                    sums_NP = aggregate(part.rows_RC.to(device), part.counts_N, self.whitening)
                    total_NP[first : first + count] += sums_NP.cpu()
                faults |= {first + place: reason for place, reason in part.faults.items()}
                first += count
        return normalize(total_NP, dim=1), faults


def evaluate(model: Model, data: Path, options: RetrievalOptions) -> Results:
    """Return mean average precision on each data set in a folder, each with its own queries.

    Args:
        data: a data set (its ground truth, and its images in it or in its `jpg`), or a folder of such.

    Raises:
        InputError: it is no such data set, images are missing, a query can't be read, there is nothing to learn the
            whitening on, or the trunk has no such stage.
    """
    stage = model.trunk.last_map if options.stage is None else options.stage
    model.trunk.check_stage(stage)
    if stage == FEATURES:
        others = ", ".join(model.trunk.stages[:-1])
        raise InputError(f"--stage {FEATURES} has no map to take regions of; use one of {others}")
    reader = RegionReader(model, stage, options.levels)
    sizes = tuple(max(1, round(options.size * scale)) for scale in (SCALES if options.multiscale else SCALES[:1]))
    sets, notes = buildings.open_sets(data), list[str]()
    learned_on = {one.folder: buildings.whitening_folder(one, sets, options.whiten_on) for one in sets}
    results: dict[str, dict[str, float]] = {}
    facts: dict[str, dict[str, int]] = {}
    whitenings: dict[Path, Whitening] = {}
    is_single = sum(len(one.truths) for one in sets) == 1
    for one in sets:
        place = learned_on[one.folder]
        if place not in whitenings:
            whitenings[place] = learn_whitening(reader, place, options, notes)
        learned, searched = place.resolve(), buildings.image_folder(one.folder).resolve()
        if learned.is_relative_to(searched) or searched.is_relative_to(learned):
            why = "the whitening was learned on the images that are searched; numbers are not comparable"
            notes.append(f"{one.name}: {why}")
        describer = Describer(reader, sizes, whitenings[place])
        for truth, measured in score_set(describer, one, options, notes):
            facts[truth.name] = {"images": len(one.database(truth)), "queries": len(truth.queries)}
            for (measure, case), value in measured.items():
                label = case if case and is_single else f"{truth.name} {case}".strip()
                results.setdefault(measure, {})[label] = value
    settings = options.as_dict() | {"image_size": options.size, "stage": stage, "sizes": list(sizes)}
    settings["whitened_on"] = {one.name: str(learned_on[one.folder]) for one in sets}
    settings["pca"] = {one.name: whitenings[learned_on[one.folder]].n_components for one in sets}
    headline = next((label for label in results["mAP"] if label.endswith("medium")), next(iter(results["mAP"])))
    return Results("retrieval", {"datasets": facts}, settings, results, ("mAP", headline), tuple(notes))


def learn_whitening(reader: RegionReader, place: Path, options: RetrievalOptions, notes: list[str]) -> Whitening:
    """Return PCA-whitening of all regions of all images of a folder, at full size; limitations are added to the notes.

    Raises:
        InputError: there are no images, or none that can be read, or all are alike.
    """
    source, whitening = open_source(place), None
    views, faults, first = [View(index) for index in range(len(source))], dict[int, str](), 0
    for part in reader.parts(source, views, options.size, f"whitening on {place.resolve().name}"):
        faults |= {first + bad: reason for bad, reason in part.faults.items()}
        first += len(part.counts_N)
        if not len(part.rows_RC):
            continue
        if whitening is None:
            width = part.rows_RC.shape[1]
            whitening = Whitening(min(options.pca, width), unit_rows=True)
            if options.pca > width:
                notes.append(f"--pca {options.pca} is more than the {width} channels of {reader.stage}; {width} are used")
        whitening.update(part.rows_RC.float().to(reader.model.machine.clustering_device))
    if whitening is None:
        raise InputError(f"{place}: none of its images can be read; whitening needs some")
    whitening.finish()
    found = int((whitening.components_DP != 0).any(dim=0).sum())
    if found == 0:
        raise InputError(f"{place}: its images are all alike; whitening needs many that differ")
    if found < whitening.n_components:
        notes.append(f"the regions of {place} vary in only {found} directions; the other numbers of a descriptor are zero")
    notes += left_out(f"whitening on {place}", faults, source.name)
    return whitening


def score_set(
    describer: Describer, one: buildings.Buildings, options: RetrievalOptions, notes: list[str]
) -> Iterator[tuple[buildings.GroundTruth, Mapping[tuple[str, str], float]]]:
    """Yield each ground truth with its mean average precision (and precisions, of the revisited sets) by measure and case.

    Raises:
        InputError: a query can't be read, or more answers are averaged than there are images.
    """
    names = sorted({name for truth in one.truths for name in one.database(truth)}, key=lambda name: one.index_of[name])
    views = [View(one.index_of[name]) for name in names]
    rows_NP, faults = describer.describe(one.source, views, f"{one.name}: images")
    notes += left_out(one.name, faults, names.__getitem__)
    row_of = {name: row for row, name in enumerate(names) if row not in faults}
    for truth in one.truths:
        ranked = [name for name in one.database(truth) if name in row_of]
        if options.query_expansion > len(ranked):
            most = f"the {len(ranked):,} images of {truth.name}"
            raise InputError(f"--query-expansion {options.query_expansion} is more than {most}")
        views = [View(one.index_of[query.image], query.box) for query in truth.queries]
        queries_QP, faults = describer.describe(one.source, views, f"{truth.name}: queries")
        if faults:
            named = [f"{truth.queries[place].image} ({reason})" for place, reason in faults.items()]
            raise InputError(f"{one.folder}: images of queries can't be read: {some(named, 5)}")
        best_QN = rank(queries_QP, rows_NP[[row_of[name] for name in ranked]], options.query_expansion)
        yield truth, _measure(truth, [[ranked[index] for index in best_N] for best_N in best_QN.tolist()], notes)


def rank(queries_QP: Tensor, rows_NP: Tensor, expansion: int = 0) -> Tensor:
    """Return indices (Q, N) of the rows by cosine, the best first; all rows have unit length.

    Args:
        expansion: K; each query is averaged with its K best answers, and searched again.
    """
    best_QN = (queries_QP @ rows_NP.T).argsort(dim=1, descending=True, stable=True)
    if expansion:
        together_QP = queries_QP + rows_NP[best_QN[:, :expansion]].sum(dim=1)
        best_QN = (normalize(together_QP, dim=1) @ rows_NP.T).argsort(dim=1, descending=True, stable=True)
    return best_QN


def _measure(
    truth: buildings.GroundTruth, rankings: Sequence[Sequence[str]], notes: list[str]
) -> dict[tuple[str, str], float]:
    """Return means over the queries that have a positive, by measure and case."""
    means: dict[tuple[str, str], float] = {}
    for case in truth.cases:
        without = [query.name for query in truth.queries if not query.judged[case].positives]
        if without:
            where, count = f"{truth.name} {case}".strip(), "1 query" if len(without) == 1 else f"{len(without)} queries"
            notes.append(f"{where}: {count} without a positive image, left out of the mean: {some(without, 5)}")
        asked = [(query.judged[case], ranked) for query, ranked in zip(truth.queries, rankings, strict=True)]
        asked = [(judged, ranked) for judged, ranked in asked if judged.positives]
        values = {"mAP": [average_precision(ranked, one.positives, one.junk) for one, ranked in asked]}
        if case in buildings.REVISITED:
            precisions = [precisions_at(ranked, one.positives, one.junk, KS) for one, ranked in asked]
            values |= {f"mP@{k}": [at[k] for at in precisions] for k in KS}
        means |= {(name, case): sum(all_of) / len(asked) if asked else float("nan") for name, all_of in values.items()}
    return means


def average_precision(ranked: Sequence[str], positives: Names, junk: Names) -> float:
    """Return the area under precision over recall, as the program of the Oxford buildings computes it.

    Junk is skipped. Precision is interpolated linearly between two answers: an answer at rank r (from 1) that is the n-th
    right one adds ((n - 1) / (r - 1) + n / r) / 2 over the number of positives, where the first fraction is 1 for r = 1.
    A positive that is not ranked counts as not found. The revisited sets use the same definition.

    Args:
        ranked: names, the best first, each of them once.
        positives: at least one.
    """
    area, found, rank, before = 0.0, 0, 0, 1.0
    for name in ranked:
        if name in junk:
            continue
        rank += 1
        found += name in positives
        precision = found / rank
        if name in positives:
            area += (before + precision) / 2
        before = precision
    return area / len(positives)


def precisions_at(ranked: Sequence[str], positives: Names, junk: Names, ks: Sequence[int]) -> dict[int, float]:
    """Return the share of right answers among the first k that are not junk, for each k, as the revisited sets define it.

    If the last positive of a query is at a rank r before k, only ranks up to r count, so that few positives do not lower it.
    """
    kept = [name for name in ranked if name not in junk]
    hits = [rank for rank, name in enumerate(kept, 1) if name in positives]
    return {k: sum(rank <= min(k, hits[-1]) for rank in hits) / min(k, hits[-1]) if hits else 0.0 for k in ks}
