"""The section "How it works": the steps of the method on one image of this run, for those who want to understand the paper.

N images.
"""

import json
from collections.abc import Mapping, Sequence

from deepcluster.data.cache import DecodedImages
from deepcluster.interruption import Interruption
from deepcluster.progress import Reporter
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.gallery.rows import shown
from deepcluster.visualization.report.method import figures as charts
from deepcluster.visualization.report.method import steps
from deepcluster.visualization.report.method.follow import (
    Companionship,
    Followed,
    Lesson,
    Spectrum,
    choose_image,
    companions,
    follow_image,
    last_lesson,
    measure_spectrum,
)
from deepcluster.visualization.report.method.pipeline import Pipeline
from deepcluster.visualization.report.page import Section, render

NAME, TITLE = "method", "How it works"
# The file that does each step, below the package, and what it does there.
FILES: Mapping[str, Sequence[tuple[str, str]]] = {
    "loop": (("training/deepcluster.py", "the loop, whose methods are the steps"),),
    "look": (
        ("data/views.py", "cuts the view"),
        ("models/convnets.py", "the paper's networks and the Sobel filters"),
        ("models/resnets.py", "the ResNets"),
        ("clustering/features.py", "keeps the features of all images"),
    ),
    "whiten": (("clustering/whitening.py", "PCA, whitening, unit length"),),
    "group": (
        ("clustering/kmeans.py", "k-means"),
        ("clustering/repair.py", "fills empty clusters"),
        ("clustering/balance.py", "clusters of nearly equal size, where a run asks for them"),
        ("clustering/pic.py", "power iteration clustering, the paper's other way"),
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
        spectrum = measure_spectrum(collection, pipeline, images, tick)
        lesson = last_lesson(pipeline, followed)
        story = companions(collection, pipeline, followed.index, tick)
    return _told(collection, pipeline, followed, spectrum, lesson, story)


def _told(
    collection: Collection,
    pipeline: Pipeline,
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
        "look": steps.look(pipeline, followed),
        "whiten": steps.whiten(pipeline, followed, spectrum.n_measured),
        "group": steps.group(collection, pipeline, followed, own, figures),
        "label": steps.label(collection, pipeline, followed, own),
        "learn": steps.learn(pipeline, followed, lesson, figures),
        "again": steps.again(collection, story, own, figures),
    }
    html = render(
        "method.html.jinja",
        run=pipeline,
        arch=pipeline.trunk.arch,
        name=shown(collection.names[followed.index]),
        n_images=int((collection.cluster_N >= 0).sum()),
        n_clusters=collection.n_clusters,
        own=own,
        files=FILES,
        table=shown(collection.table),
        heights={name: json.loads(figure)["layout"]["height"] for name, figure in figures.items()},
        **parts,
    )
    return Section(NAME, TITLE, html, figures=figures)


def without_image(why: str) -> Section:
    """The section where no image can be followed: why."""
    return Section(NAME, TITLE, render("method.html.jinja", missing=why))
