"""`segmentation-clusters`: k-means on the cells of the test images, without any label; clusters are then matched to classes.

Cells have unit length, or are whitened first (`pca`), as in training. With as many clusters as the images show classes,
each class gets one of them by the Hungarian method, so that most pixels are right; with more (500), each cluster stands
for its most frequent class. Pixels belong to the cluster of the nearest cell. All is repeated from several starts of
k-means. The masks of the tested images decide which cluster stands for which class, as in all published numbers of this
kind.
N cells, D channels of a stage, P components, C classes, K clusters.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from deepcluster.clustering.kmeans import KMeans
from deepcluster.clustering.nearest import NearestSearch, nearest_centroids
from deepcluster.clustering.whitening import Whitening
from deepcluster.core.errors import InputError
from deepcluster.core.text import count_of
from deepcluster.core.work import Advance
from deepcluster.evaluation.datasets.dense import IGNORED
from deepcluster.evaluation.datasets.masks import MaskParts, open_masks
from deepcluster.evaluation.dense.frozen.cells import SPAN, CellSample, sample_cells
from deepcluster.evaluation.dense.frozen.maps import FrozenMaps, ImageCells, frozen_maps
from deepcluster.evaluation.dense.frozen.options import SegmentationClustersOptions
from deepcluster.evaluation.dense.frozen.places import nearest_cells
from deepcluster.evaluation.dense.frozen.predictions import draw, missing_classes
from deepcluster.evaluation.dense.spans import Spans
from deepcluster.evaluation.measures.confusion import segmentation_scores
from deepcluster.evaluation.results import Results
from deepcluster.run.model import Model

NAME = "segmentation-clusters"
# Overclustering makes no more clusters than this share of the cells.
CELLS_PER_CLUSTER = 10


@dataclass(frozen=True)
class Run:
    """One run of k-means, its number from 0."""

    stage: str
    k: int
    number: int


def match(pixels_KC: Tensor) -> Tensor:
    """Return the class of each cluster (K,), so that most pixels are right; K is the number of classes with pixels."""
    shown = pixels_KC.sum(0).nonzero()[:, 0]
    _, columns = linear_sum_assignment(pixels_KC[:, shown].numpy(), maximize=True)
    return shown[torch.from_numpy(columns)]


def merged(pixels_KC: Tensor, classes_K: Tensor) -> Tensor:
    """Return the number of pixels by class and predicted class (C, C), of clusters that stand for classes."""
    pixels_CC = torch.zeros(pixels_KC.shape[1], pixels_KC.shape[1], dtype=torch.int64)
    return pixels_CC.index_add_(1, classes_K, pixels_KC.T)


def pixels_of_cells(image: ImageCells, stage: str, n_classes: int) -> Tensor:
    """Return how many pixels of each class are nearest to each cell (N, C)."""
    axes = image.axes[stage]
    numbers_HW, counts_HW = nearest_cells(axes) * n_classes + image.mask_HW, image.mask_HW != IGNORED
    n_cells = axes[0].cells * axes[1].cells
    return torch.bincount(numbers_HW[counts_HW], minlength=n_cells * n_classes).view(n_cells, n_classes)


def space_of(cells: CellSample, stage: str, pca: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what takes cells (N, D) of a stage to the points (N, P), of unit length, that are clustered."""
    if not pca:
        return lambda rows_ND: normalize(rows_ND.float(), dim=1)
    rows_ND = cells.at(stage).rows_ND.float().to(device)
    whitening = Whitening(min(pca, *rows_ND.shape)).fit(rows_ND)
    return lambda rows_ND: whitening.transform(rows_ND.float())


def numbers_of_clusters(cells: CellSample, overclusters: int) -> tuple[int, int]:
    """Return the number of classes in the images, and that of overclustering, which is smaller where cells are few.

    Raises:
        InputError: there are fewer cells than classes.
    """
    counts = {stage: len(cells.at(stage).rows_ND) for stage in cells.frozen.stages}
    fewest, classes = min(counts, key=lambda stage: counts[stage]), int((cells.pixels_C > 0).sum())
    if classes > counts[fewest]:
        raise InputError(
            f"{count_of(classes, 'cluster')}, one per class, are more than the {count_of(counts[fewest], 'cell')} of "
            f"{fewest}: use a larger --side, or other --stages"
        )
    return classes, max(classes, min(overclusters, counts[fewest] // CELLS_PER_CLUSTER))


@dataclass(frozen=True)
class Made:
    """What `prepare` makes: pixels (K, C) of each run by cluster and class."""

    parts: MaskParts
    frozen: FrozenMaps
    cells: CellSample
    ks: tuple[int, int]
    pixels_KC: Mapping[Run, Tensor]
    unreadable: dict[int, str]
    centroids_KP: Mapping[Run, Tensor]
    spaces: Mapping[str, Callable[[Tensor], Tensor]]
    spans: tuple[Spans, ...]


def prepare(model: Model, data: Path, options: SegmentationClustersOptions) -> Made:
    """Cluster cells of the test images, and count the pixels of each cluster; all ranks together.

    Raises:
        InputError: no masks, the trunk has no such stage or takes no such images, there are fewer cells than classes, or
            more than 10 % of the images can't be read.
        Interrupted: what is done is kept; the same call continues.
    """
    parts, device = open_masks(data, options.lists), model.machine.clustering_device
    frozen = frozen_maps(model, options.stages, options.side)
    test = parts.test
    sample = sample_cells(frozen, test, options.cells, seed=options.seed, what="cells to cluster", labelled=False)
    ks = numbers_of_clusters(sample, options.overclusters)
    runs = [Run(stage, k, number) for stage in frozen.stages for k in dict.fromkeys(ks) for number in range(options.runs)]
    facts = NAME, frozen.key(test), options.cells, options.pca, options.iterations, options.seed
    spaces = {stage: space_of(sample, stage, options.pca, device) for stage in frozen.stages}
    fits = Spans(model, len(runs), *facts, runs, span=1)
    points: dict[str, Tensor] = {}

    def fit(span: range, advance: Advance) -> dict[str, object]:
        run = runs[span.start]
        if run.stage not in points:
            points.clear()
            points[run.stage] = spaces[run.stage](sample.at(run.stage).rows_ND.to(device))
        kmeans = KMeans(run.k, init="k-means++", max_iter=options.iterations)
        found = kmeans.cluster(points[run.stage], seed=options.seed + run.number, advance=lambda _: advance(0))
        advance(1)
        return {"centroids": found.centroids_KP.cpu()}

    kept = fits.compute("k-means", fit, unit="runs")
    centroids = {run: one["centroids"].float().to(device) for run, one in zip(runs, kept, strict=True)}
    counted = Spans(model, len(test), *facts, runs, "counted", span=SPAN)

    def count(span: range, advance: Advance) -> dict[str, object]:
        faults: dict[int, str] = {}
        found = {run: torch.zeros(run.k, len(test.class_names), dtype=torch.int64) for run in runs}
        with closing(frozen.images(test, span, faults, advance)) as images:
            for image in (one for some in images for one in some):
                for stage in frozen.stages:
                    pixels_NC = pixels_of_cells(image, stage, len(test.class_names))
                    search = NearestSearch(spaces[stage](image.rows(stage).to(device)))
                    for run in (run for run in runs if run.stage == stage):
                        search.use(centroids[run])
                        found[run].index_add_(0, search.search().labels_R.cpu(), pixels_NC)
                    advance(0)
        return {"unreadable": faults, "counts": [found[run] for run in runs]}

    made = counted.compute("counting pixels", count)
    pixels = {run: torch.stack([one["counts"][number] for one in made]).sum(0) for number, run in enumerate(runs)}
    unreadable = {index: why for one in made for index, why in one["unreadable"].items()}
    return Made(parts, frozen, sample, ks, pixels, unreadable, centroids, spaces, (sample.spans, fits, counted))


def evaluate(model: Model, data: Path, options: SegmentationClustersOptions) -> Results:
    """Return mIoU of clusters that stand for classes in each stage; see `prepare` for what is raised."""
    made = prepare(model, data, options)
    results = results_of_runs(made, options)
    for spans in made.spans:
        spans.done()
    return results


def results_of_runs(made: Made, options: SegmentationClustersOptions) -> Results:
    """Return mean and deviation over the runs of the scores of each stage."""
    test, (one_to_one, many) = made.parts.test, made.ks
    results: dict[str, dict[str, float]] = {}
    iou: dict[str, list[Mapping[str, float]]] = {}
    for stage in made.frozen.stages:
        for k, title in ((one_to_one, ""), (many, "overclustering ")):
            scores = []
            for run in (run for run in made.pixels_KC if (run.stage, run.k) == (stage, k)):
                pixels_KC = made.pixels_KC[run]
                classes_K = pixels_KC.argmax(1) if title else match(pixels_KC)
                scores.append(segmentation_scores(merged(pixels_KC, classes_K), test.class_names))
            for measure, values in (
                ("mIoU", [one.miou for one in scores]),
                ("pixel accuracy", [one.pixel_accuracy for one in scores]),
            ):
                results.setdefault(f"{title}{measure}", {})[stage] = float(np.mean(values))
                if len(values) > 1:
                    results.setdefault(f"{title}{measure} deviation", {})[stage] = float(np.std(values, ddof=1))
            if not title:
                iou[stage] = [one.iou for one in scores]
    best = max(results["mIoU"], key=lambda stage: results["mIoU"][stage])
    results["IoU"] = {name: float(np.mean([one[name] for one in iou[best]])) for name in iou[best][0]}
    notes = [*made.parts.notes, *made.frozen.notes, *test.left_out(made.unreadable)]
    notes.append(f"IoU by class is that of {best}, the stage with the highest mIoU, with {one_to_one} clusters")
    absent = [name for name, count in zip(test.class_names, made.cells.pixels_C.tolist(), strict=True) if not count]
    notes += missing_classes(absent, f"no pixel of {test.name} shows them, so they get no cluster and are not in the mean")
    if many < options.overclusters:
        notes.append(
            f"overclustering with {many} clusters, not {options.overclusters}: at most one per {CELLS_PER_CLUSTER} cells"
        )
    about = {"test": test.name, "test_images": len(test), "classes": len(test.class_names)}
    settings = options.as_dict() | made.frozen.settings() | {"clusters": one_to_one, "overclusters": many}
    pictures = draw(made.frozen.only(best), test, partial(_classes_of, made, Run(best, one_to_one, 0)))
    return Results(NAME, about, settings, results, ("mIoU", best), notes, pictures)


def _classes_of(made: Made, run: Run, images: Sequence[ImageCells]) -> Iterator[Tensor]:
    """Yield the class of each pixel (H, W) of some images by the clusters of a run with one cluster per class."""
    classes_K, space = match(made.pixels_KC[run]), made.spaces[run.stage]
    for image in images:
        rows_ND = image.rows(run.stage).to(made.centroids_KP[run].device)
        clusters_N = nearest_centroids(space(rows_ND), made.centroids_KP[run])[0].cpu()
        yield classes_K[clusters_N][nearest_cells(image.axes[run.stage])]
