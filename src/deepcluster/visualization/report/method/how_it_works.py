"""The section "How it works": the steps of the method on one image of this run, for those who want to understand the paper.

N images.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deepcluster.core.interruption import Interruption
from deepcluster.core.progress import Reporter
from deepcluster.data.cache import DecodedImages
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.gallery.rows import shown
from deepcluster.visualization.report.method import crop_steps, steps
from deepcluster.visualization.report.method import figures as charts
from deepcluster.visualization.report.method.crop_pipeline import CropPipeline
from deepcluster.visualization.report.method.follow import (
    Companionship,
    Followed,
    Lesson,
    Spectrum,
    choose_image,
    companions,
    features_of_some,
    follow_image,
    last_lesson,
    measure_spectrum,
)
from deepcluster.visualization.report.method.head_pipeline import HeadPipeline
from deepcluster.visualization.report.method.pipeline import Floats, Pipeline
from deepcluster.visualization.report.page import Section, render

NAME, TITLE = "method", "How it works"
# The file that does each step, below the package, and what it does there.
FILES: Mapping[str, Sequence[tuple[str, str]]] = {
    "loop": (
        ("training/loop.py", "the loop of the steps (`run_epoch`)"),
        ("training/deepcluster.py", "what this method does at each of them"),
    ),
    "look": (
        ("data/views.py", "cuts the view"),
        ("models/convnets.py", "the paper's networks and the Sobel filters"),
        ("models/resnets.py", "the ResNets"),
        ("run/features.py", "extracts the features"),
    ),
    "whiten": (("clustering/whitening.py", "PCA, whitening, unit length"),),
    "group": (
        ("clustering/kmeans.py", "k-means"),
        ("clustering/repair.py", "fills empty clusters"),
        ("clustering/balanced.py", "clusters of nearly equal size, where a run asks for them"),
        ("clustering/pic.py", "power iteration clustering, the paper's other way"),
        ("clustering/hierarchical.py", "clusters within super-clusters, where a run asks for them"),
    ),
    "label": (
        ("clustering/assignment.py", "the labels, their numbers from epoch to epoch, and the draw"),
        ("models/heads.py", "the head"),
    ),
    "learn": (
        ("data/views.py", "random crops, flips and colours"),
        ("data/loader.py", "makes them ahead of the training"),
        ("training/optim.py", "one step of cross-entropy and SGD"),
    ),
}
CROP_FILES: Mapping[str, Sequence[tuple[str, str]]] = {
    "loop": (
        ("training/loop.py", "the loop of the steps (`run_epoch`)"),
        ("training/deepcluster_v2.py", "what this method does at each of them"),
    ),
    "look": (
        ("training/memory_bank.py", "remembers the points of the epoch before"),
        ("data/views.py", "cuts the view"),
        ("models/trunk.py", "makes the network"),
    ),
    "whiten": (("models/projection.py", "the projection"), ("run/space.py", "the sphere, for assign and this page")),
    "group": (
        ("clustering/kmeans.py", "k-means, on a sphere too"),
        ("clustering/repair.py", "fills empty clusters"),
    ),
    "label": (
        ("clustering/assignment.py", "the labels, and their numbers from epoch to epoch"),
        ("training/pseudo_labels.py", "hands them out"),
    ),
    "learn": (
        ("data/multi_crop.py", "random crops of several sizes"),
        ("data/views.py", "flips, colours and blur"),
        ("data/loader.py", "makes them ahead of the training"),
        ("models/projection.py", "the loss"),
        ("training/lars.py", "LARS, for very large batches"),
    ),
}


def method_section(
    collection: Collection,
    pipeline: Pipeline,
    index: int | None = None,
    *,
    reporter: Reporter | None = None,
    interruption: Interruption | None = None,
) -> Section:
    """The method step by step on one image of the collection.

    Args:
        pipeline: the run that made the collection's clusters.
        index: of the image; one that shows the method well by default.

    Raises:
        InputError: the image that is asked for can't be read, or is in no cluster.
    """
    if collection.images is None:
        return without_image("The images of this run are not at hand, so that none can be followed through its steps.")
    images = DecodedImages(collection.images, shorter_side=pipeline.reduce_to or None)
    with (reporter or Reporter(quiet=True)).track("how it works", None) as progress:

        def tick(done: int) -> None:
            progress(done)
            if interruption is not None:
                interruption.check()

        if index is None:
            followed = choose_image(collection, pipeline, images, tick)
            if followed is None:
                return without_image("No image could be read, so that none can be followed through the steps.")
        else:
            followed = follow_image(collection, pipeline, images, index, tick)
        story = companions(collection, pipeline, followed.index, tick)
        if isinstance(pipeline, CropPipeline):
            features_SD = features_of_some(collection, pipeline, images, tick)
            return _told_of_crops(collection, pipeline, followed, pipeline.points(features_SD).double().numpy(), story)
        if not isinstance(pipeline, HeadPipeline):
            raise TypeError(f"{type(pipeline).__name__} has no section")
        spectrum = measure_spectrum(collection, pipeline, images, tick)
    return _told(collection, pipeline, followed, spectrum, last_lesson(pipeline, followed), story)


def _told(
    collection: Collection,
    pipeline: HeadPipeline,
    followed: Followed,
    spectrum: Spectrum,
    lesson: Lesson | None,
    story: list[Companionship],
) -> Section:
    """The section of what was computed."""
    own = int(collection.cluster_N[followed.index])
    figures = {
        "method-features": charts.strip(followed.features_D.double().numpy()),
        "method-spectrum": charts.spectrum(spectrum.before_P, spectrum.whitened_P, spectrum.points_P),
        "method-point": charts.signed_bars(followed.point_P.double().numpy()),
    }
    parts = {
        "whiten": steps.whiten(pipeline, followed, spectrum.n_measured),
        "learn": steps.learn(pipeline, followed, lesson, figures),
        **_shared(collection, pipeline, followed, own, story, figures),
    }
    return _section("method.html.jinja", collection, pipeline, followed, figures, files=FILES, **parts)


def _told_of_crops(
    collection: Collection,
    pipeline: CropPipeline,
    followed: Followed,
    points_SP: Floats,
    story: list[Companionship],
) -> Section:
    """The section of a run of DeepCluster-v2."""
    own = int(collection.cluster_N[followed.index])
    lesson = pipeline.lesson(followed.image_HWC, followed.index)
    figures = {"method-features": charts.strip(followed.features_D.double().numpy())}
    parts = {
        "remember": crop_steps.remember(pipeline, int((collection.cluster_N >= 0).sum())),
        "project": crop_steps.project(pipeline, followed, points_SP, figures),
        "groupings": crop_steps.groupings(lesson),
        "learn": crop_steps.learn(followed, lesson, figures),
        **_shared(collection, pipeline, followed, own, story, figures),
    }
    return _section("method_crops.html.jinja", collection, pipeline, followed, figures, files=CROP_FILES, **parts)


def _shared(
    collection: Collection,
    pipeline: Pipeline,
    followed: Followed,
    own: int,
    story: list[Companionship],
    figures: dict[str, str],
) -> dict[str, Any]:
    """What both versions tell alike."""
    return {
        "own": own,
        "look": steps.look(pipeline, followed),
        "group": steps.group(collection, pipeline, followed, own, figures),
        "label": steps.label(collection, pipeline, followed, own),
        "again": steps.again(collection, story, own, figures),
    }


def _section(
    template: str,
    collection: Collection,
    pipeline: Pipeline,
    followed: Followed,
    figures: dict[str, str],
    **values: Any,
) -> Section:
    html = render(
        template,
        run=pipeline,
        arch=pipeline.trunk.arch,
        name=shown(collection.names[followed.index]),
        n_images=int((collection.cluster_N >= 0).sum()),
        n_clusters=collection.n_clusters,
        table=shown(collection.table),
        heights={name: json.loads(figure)["layout"]["height"] for name, figure in figures.items()},
        **values,
    )
    return Section(NAME, TITLE, html, figures=figures)


def without_image(why: str) -> Section:
    """The section where no image can be followed: why."""
    return Section(NAME, TITLE, render("method.html.jinja", missing=why))
