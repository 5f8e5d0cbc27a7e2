"""The section "How it works": the steps of the method on one image of this run, for those who want to understand the paper.

N images.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deepcluster.core.work import Advance, Work
from deepcluster.data.cache import DecodedImages
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.context import Context
from deepcluster.visualization.report.method import steps
from deepcluster.visualization.report.method.explained import Explained
from deepcluster.visualization.report.method.learning import learn, learned_labels
from deepcluster.visualization.report.method.trace import (
    Trace,
    choose_image,
    cluster_history,
    features_of_some,
    trace_image,
)
from deepcluster.visualization.report.method.training_views import training_views
from deepcluster.visualization.report.page import Section, asset, render, shown

NAME, TITLE = "method", "How it works"
Files = Mapping[str, Sequence[tuple[str, str]]]
# The file that does each step, below the package, and what it does there, by the version of the method.
FILES: Mapping[int, Files] = {
    1: {
        "loop": (
            ("training/loop.py", "the loop of the steps, run_epoch"),
            ("training/deepcluster.py", "what this method does at each of them"),
        ),
        "extract": (
            ("data/views.py", "cuts the view"),
            ("models/convnets.py", "the paper's networks and the Sobel filters"),
            ("models/resnets.py", "the ResNets"),
            ("run/features.py", "extracts the features"),
        ),
        "whiten": (("clustering/whitening.py", "PCA, whitening, unit length"),),
        "cluster": (
            ("clustering/kmeans.py", "k-means"),
            ("clustering/repair.py", "fills empty clusters"),
            ("clustering/balance.py", "clusters of nearly equal size, where a run asks for them"),
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
    },
    2: {
        "loop": (
            ("training/loop.py", "the loop of the steps, run_epoch"),
            ("training/deepcluster_v2.py", "what this method does at each of them"),
        ),
        "extract": (
            ("training/memory_bank.py", "keeps the points of the previous epoch"),
            ("data/views.py", "cuts the view"),
            ("models/trunk.py", "makes the network"),
        ),
        "whiten": (
            ("models/projection.py", "the projection"),
            ("run/space.py", "the sphere, for assign and this page"),
        ),
        "cluster": (
            ("clustering/kmeans.py", "k-means, on a sphere too"),
            ("clustering/repair.py", "fills empty clusters"),
        ),
        "label": (("clustering/assignment.py", "the labels, and their numbers from epoch to epoch"),),
        "learn": (
            ("data/multi_crop.py", "random crops of several sizes"),
            ("data/views.py", "flips, colours and blur"),
            ("data/loader.py", "makes them ahead of the training"),
            ("models/projection.py", "the loss"),
            ("training/lars.py", "LARS, for very large batches"),
        ),
    },
}


def section(context: Context) -> Section | None:
    """Return the section of a run; None for a table."""
    if context.explained is not None:
        return method_section(context.collection, context.explained, work=context.work)
    if not context.run.config:
        return None
    return without_image("The run's images or its checkpoint are not at hand, so none can be followed (--data names them).")


def method_section(collection: Collection, run: Explained, index: int | None = None, *, work: Work | None = None) -> Section:
    """Return the method step by step on one image of the collection.

    Args:
        run: the run that made the collection's clusters.
        index: index of the image; one that shows the method well by default.

    Raises:
        InputError: the chosen image can't be read, or is in no cluster.
    """
    if collection.images is None:
        return without_image("The images of this run are not at hand, so none can be followed through its steps.")
    images = DecodedImages(collection.images, shorter_side=run.settings.reduce_to or None)
    with (work or Work()).track("how it works", None) as advance:
        if index is None:
            trace = choose_image(collection, run, images, advance)
        else:
            trace = trace_image(collection, run, images, index, advance)
        if trace is None:
            return without_image("No image could be read, so none can be followed through the steps.")
        return _section(collection, run, trace, images, advance)


def _section(collection: Collection, run: Explained, trace: Trace, images: DecodedImages, advance: Advance) -> Section:
    """Return the section of the image that was traced."""
    own, n_images = int(collection.cluster_N[trace.index]), int((collection.cluster_N >= 0).sum())
    features_SD = features_of_some(collection, run, images, advance)
    views = training_views(run, trace.image_HWC, trace.index)
    figures: steps.Figures = {}
    parts: dict[str, Any] = {
        "image": steps.extract(run, trace, figures),
        "nearest": steps.nearest(collection, run, trace, figures),
        "label": steps.label(collection, trace),
        "learn": learn(run, trace, views, figures),
        "again": steps.again(collection, own, cluster_history(collection, run, trace.index, advance), figures),
    }
    if run.version == 1:
        parts["whiten"] = steps.whiten(run, trace, features_SD, figures)
    else:
        parts["remember"] = steps.remember(run, n_images)
        parts["project"] = steps.project(run, trace, features_SD, figures)
        parts["learned"] = learned_labels(views)
    html = render(
        "method.html.jinja" if run.version == 1 else "method_crops.html.jinja",
        run=run,
        settings=run.settings,
        arch=run.model.trunk.arch,
        name=shown(collection.names[trace.index]),
        own=own,
        n_images=n_images,
        n_clusters=collection.n_clusters,
        table=shown(collection.table),
        files=FILES[run.version],
        heights={name: json.loads(figure)["layout"]["height"] for name, figure in figures.items()},
        **parts,
    )
    return Section(NAME, TITLE, html, figures=figures, styles=(asset("method.css"),))


def without_image(why: str) -> Section:
    """Return the section where no image can be followed: why."""
    return Section(NAME, TITLE, render("method.html.jinja", missing=why), styles=(asset("method.css"),))
