"""The section of new images: the cluster of a run that each falls into, and the run's images most similar to it.

Q new images, K clusters, J neighbours.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import from_numpy

from deepcluster.clustering.neighbours import nearest_neighbours
from deepcluster.core.text import count_of
from deepcluster.core.work import Advance, no_advance
from deepcluster.data.sources import ImageSource
from deepcluster.run.model import Model
from deepcluster.visualization.report.collection import Collection, Floats, Integers
from deepcluster.visualization.report.gallery.clusters import ClusterFacts
from deepcluster.visualization.report.gallery.rows import Listing
from deepcluster.visualization.report.gallery.whole import whole_picture
from deepcluster.visualization.report.page import Section, render, shown

SIMILAR: Final = 6  # Images of the run shown for each new one, of its cluster and of the most similar.
MOST_SHOWN: Final = 200  # New images with a picture.
AT_FIRST: Final = 24  # Of these, those that are shown before "more" is pressed.
PICTURE_SIDE: Final = 240


@dataclass(frozen=True)
class NewImages:
    """New images beside those of a run.

    Attributes:
        source: all new images.
        indices_Q: those that could be read, in the source.
        cluster_Q: nearest cluster of each, as `deepcluster assign` finds it; -1 where its features are not finite.
        distance_Q: distance to its centroid.
        similar_QJ: images of the run most similar to it, nearest first; no columns where no points of the run are known.
    """

    source: ImageSource
    indices_Q: Integers
    cluster_Q: Integers
    distance_Q: Floats
    similar_QJ: Integers

    def run_images(self, facts: ClusterFacts) -> list[Integers]:
        """Return images of the run that the section shows, the most important first."""
        shown_Q = np.flatnonzero(self.cluster_Q >= 0)[:MOST_SHOWN]
        return [self.similar_QJ[shown_Q].ravel(), facts.nearest_KS[self.cluster_Q[shown_Q], :SIMILAR].ravel()]


def compare_new(source: ImageSource, model: Model, collection: Collection, *, advance: Advance = no_advance) -> NewImages:
    """Return the clusters of new images and the images of the collection most similar to each.

    Args:
        model: the model that made the collection's clusters and points.
        advance: called with the number of images that were compared; may raise to stop.

    Raises:
        InputError: the model has no clusters.
    """
    _, assignment = model.clusters()
    batches = model.batches(source, torch.arange(len(source)))
    parts = [(indices_B, rows_BD.to(model.machine.feature_dtype).cpu()) for rows_BD, indices_B in batches]
    if not parts:
        none = np.zeros(0, np.int64)
        return NewImages(source, none, none, np.zeros(0), np.zeros((0, 0), np.int64))
    indices_Q, features_QD = (torch.cat(part) for part in zip(*parts, strict=True))
    finite_Q = torch.isfinite(features_QD).all(dim=1)
    points = model.points(features_QD[finite_Q])
    cluster_Q = torch.full((len(indices_Q),), -1)
    distance_Q = torch.full((len(indices_Q),), torch.nan)
    cluster_Q[finite_Q], squared = assignment.nearest(points)
    distance_Q[finite_Q] = squared.sqrt()
    known = np.flatnonzero(np.isfinite(collection.points_MP).all(axis=1)) if collection.points_MP.size else np.zeros(0, int)
    similar_QJ = np.full((len(indices_Q), min(SIMILAR, len(known))), -1, np.int64)
    if len(known) and len(points):
        rows = from_numpy(np.ascontiguousarray(collection.points_MP[known]))
        _, found = nearest_neighbours(points, rows, k=similar_QJ.shape[1], advance=advance)
        similar_QJ[finite_Q.numpy()] = collection.sample_M[known[found.numpy()]]
    return NewImages(source, indices_Q.numpy(), cluster_Q.numpy(), distance_Q.double().numpy(), similar_QJ)


def new_section(collection: Collection, facts: ClusterFacts, listing: Listing, new: NewImages) -> Section:
    """Return the section: a card for each new image, by cluster and distance."""
    assigned = np.flatnonzero(new.cluster_Q >= 0)
    order = assigned[np.lexsort((new.distance_Q[assigned], new.cluster_Q[assigned]))]
    counts_K = np.bincount(new.cluster_Q[assigned], minlength=collection.n_clusters)
    largest = np.argsort(-counts_K, kind="stable")
    n_lost = len(new.source) - len(assigned)
    html = render(
        "new.html.jinja",
        scope=f"{count_of(len(assigned), 'new image')} in {count_of(int((counts_K > 0).sum()), 'cluster')} of the run"
        + (f"; {n_lost:,} can't be read." if n_lost else "."),
        clusters=[(int(one), int(counts_K[one])) for one in largest[:40] if counts_K[one]],
        n_clusters=int((counts_K > 0).sum()),
        images=[_card(collection, facts, listing, new, int(at)) for at in order[:MOST_SHOWN]],
        n_images=len(order),
        at_first=AT_FIRST,
    )
    return Section("new", "New images", html)


def _card(collection: Collection, facts: ClusterFacts, listing: Listing, new: NewImages, at: int) -> Mapping[str, Any]:
    index, cluster, distance = int(new.indices_Q[at]), int(new.cluster_Q[at]), float(new.distance_Q[at])
    picture = whole_picture(new.source, index, side=PICTURE_SIDE)
    content = "" if picture is None else base64.b64encode(picture.content).decode("ascii")
    return {
        "name": shown(new.source.name(index)),
        "uri": f"data:{picture.media_type};base64,{content}" if picture is not None else "",
        "cluster": cluster,
        "place": _place(collection, cluster, distance),
        "inside": _rows(collection, listing, facts.nearest_KS[cluster, :SIMILAR]),
        "similar": _rows(collection, listing, new.similar_QJ[at]),
    }


def _place(collection: Collection, cluster: int, distance: float) -> str:
    """Return in words how near an image lies to the centre of its cluster, compared with the cluster's own images."""
    own = collection.distance_N[(collection.cluster_N == cluster) & np.isfinite(collection.distance_N)]
    if not len(own):
        return f"distance {distance:.3g}"
    farther = float((own >= distance).mean())
    if farther == 0:
        return f"distance {distance:.3g}: farther from the centre than all {len(own):,} images of the cluster"
    return f"distance {distance:.3g}: nearer to the centre than {farther:.0%} of the cluster's images"


def _rows(collection: Collection, listing: Listing, indices: Integers) -> list[Mapping[str, Any]]:
    """Return row and name of the images of the run that the page lists."""
    rows = listing.row_of(indices).tolist()
    pairs = zip(rows, indices.tolist(), strict=True)
    return [{"row": row, "name": shown(collection.names[index])} for row, index in pairs if row >= 0]
