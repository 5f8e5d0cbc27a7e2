"""The section "How it works": the steps of the method on one image of this run, for those who want to understand the paper.

N images.
"""

import json
from typing import Any

from deepcluster.clustering import clusterer
from deepcluster.core.text import size
from deepcluster.core.work import Advance, Work
from deepcluster.data.cache import DecodedImages
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.method import steps
from deepcluster.visualization.report.method.explained import Explained
from deepcluster.visualization.report.method.trace import Trace, choose_image, cluster_history, features_of_some, trace_image
from deepcluster.visualization.report.method.training_views import learn, learned_labels, training_views
from deepcluster.visualization.report.page import Section, asset, render, shown

NAME, TITLE = "method", "How it works"
# Why an image may be in a cluster whose centroid is not the nearest, where that is not the doing of later training.
WHY_NOT_NEAREST = {
    "balanced": "In balanced clusters that happens where the nearest one is full.",
    "pic": "Power iteration clustering does not use the nearest mean.",
    "hierarchical": "Clusters lie within super-clusters, and the nearest is not always in the image's own.",
}


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
        given = (collection, run, images)
        trace = choose_image(*given, advance) if index is None else trace_image(*given, index, advance)
        if trace is None:
            return without_image("No image could be read, so none can be followed through the steps.")
        return _section(collection, run, trace, images, advance)


def _section(collection: Collection, run: Explained, trace: Trace, images: DecodedImages, advance: Advance) -> Section:
    own, n_images = int(collection.cluster_N[trace.index]), int((collection.cluster_N >= 0).sum())
    features_SD = features_of_some(collection, run, images, advance)
    figures: steps.Figures = {}
    parts: dict[str, Any] = {
        "image": steps.extract(run, trace, figures),
        "nearest": steps.nearest(collection, run, trace, figures),
    }
    if not run.clustered:
        views = training_views(run, trace.image_HWC, trace.index)
        parts["label"] = steps.label(collection, run, trace)
        parts["learn"] = learn(run, trace, views, figures)
        history = cluster_history(collection, run, trace.index, advance)
        parts["again"] = steps.again(collection, own, history, figures)
    if run.version == 1:
        parts["whiten"] = steps.whiten(run, trace, features_SD, figures)
    else:
        n_large, crops = run.view.crops[0][0], " and ".join(f"{count} of {side} pixels" for count, side in run.view.crops)
        memory = size(2 * n_images * n_large * run.settings.projection[1])
        parts["remember"] = {"n_large": n_large, "memory": memory, "crops": crops}
        parts["project"] = steps.project(run, trace, features_SD, figures)
        parts["learned"] = learned_labels(views)
    html = render(
        "method.html.jinja" if run.version == 1 else "method_crops.html.jinja",
        run=run,
        settings=run.settings,
        arch=run.model.trunk.arch,
        is_whitened=not run.clustered or bool(run.clustered.get("whitened")),
        name=shown(collection.names[trace.index]),
        own=own,
        explanation=clusterer(run.settings.clustering).explanation,
        why_not_nearest=WHY_NOT_NEAREST.get(run.settings.clustering),
        n_images=n_images,
        n_clusters=collection.n_clusters,
        table=shown(collection.table),
        heights={name: json.loads(figure)["layout"]["height"] for name, figure in figures.items()},
        **parts,
    )
    return Section(NAME, TITLE, html, figures=figures, scripts=(asset("method.js"),), styles=(asset("method.css"),))


def without_image(why: str) -> Section:
    """Return the section where no image can be followed: why."""
    return Section(NAME, TITLE, render("method.html.jinja", missing=why), styles=(asset("method.css"),))
