"""What the page of a run or a table is made of, each part computed when a section first asks for it; and its sections.

A new section is a function that makes a `Section`, and one entry in `SECTIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.work import Work
from deepcluster.data.sources import ImageSource
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report.collection import Collection, RunFacts
from deepcluster.visualization.report.gallery.clusters import ClusterFacts, describe_clusters
from deepcluster.visualization.report.gallery.rows import Listing, by_importance, gallery_section, list_rows
from deepcluster.visualization.report.gallery.thumbnails import (
    Thumbnails,
    make_thumbnails,
    most_thumbnails,
    sharpest_side,
    thumbnail_side,
)
from deepcluster.visualization.report.gallery.whole import whole_pictures
from deepcluster.visualization.report.glance import glance_section
from deepcluster.visualization.report.map import Layout, lay_out, map_section
from deepcluster.visualization.report.method.explained import Explained
from deepcluster.visualization.report.method.how_it_works import method_section, without_image
from deepcluster.visualization.report.new import NewImages, compare_new, new_section
from deepcluster.visualization.report.odd import Odd, find_odd, odd_section
from deepcluster.visualization.report.page import Blob, Section, write_page
from deepcluster.visualization.report.pictures import pictures_section


@dataclass(frozen=True)
class Context:
    """A run or a table, with all that its sections share.

    Attributes:
        collection: images in clusters.
        run: facts of the run, or of the table.
        new: images that are not of the run, to be shown beside its clusters; only with `explained`.
        explained: the run as "How it works" shows it; None for a table, and without images or a checkpoint.
        pictures: folder of what `deepcluster visualize` writes; None for a table.
        options: options of the report.
        workers: number of threads that decode images.
        work: shows progress and answers requests to stop.
    """

    collection: Collection
    run: RunFacts
    explained: Explained | None = None
    pictures: Path | None = None
    new: ImageSource | None = None
    options: ReportOptions = field(default_factory=ReportOptions)
    workers: int = 1
    work: Work = field(default_factory=Work)

    @cached_property
    def clusters(self) -> ClusterFacts:
        """Facts of each cluster."""
        with self.work.track("clusters", None, "steps") as advance:
            return describe_clusters(self.collection, seed=self.options.seed, advance=advance)

    @cached_property
    def odd(self) -> Odd:
        """Near-duplicates, outliers and clusters that look like collapse."""
        with self.work.track("near-duplicates", None) as advance:
            return find_odd(self.collection, advance=advance)

    @cached_property
    def compared(self) -> NewImages | None:
        """The new images, in the clusters of the run."""
        if self.new is None or self.explained is None:
            return None
        with self.work.track("new images", None) as advance:
            return compare_new(self.new, self.explained.model, self.collection, advance=advance)

    @cached_property
    def layout(self) -> Layout | None:
        """Places of images on the map; None where no points are known."""
        with self.work.track("map", 2, "steps") as advance:
            return lay_out(self.collection, images=self.options.map_images, seed=self.options.seed, advance=advance)

    @cached_property
    def important_N(self) -> NDArray[np.int64]:
        """Images in the order of their importance: one of each cluster, odd ones, further exemplars, those on the map."""
        first, *rest = self.clusters.exemplars()
        beside_new = [] if self.compared is None else self.compared.run_images(self.clusters)
        on_map = [] if self.layout is None else [self.layout.indices_M]
        return by_importance(self.collection, [first, *beside_new, self.odd.images(), *rest, *on_map])

    @cached_property
    def listing(self) -> Listing:
        """The images that the page lists."""
        return list_rows(self.collection, self.important_N)

    @cached_property
    def thumbnails(self) -> Thumbnails:
        """Thumbnails of the most important images; none where the images are not at hand."""
        images = self.collection.images
        side = self.options.thumbnail or thumbnail_side(self.collection.n_clusters)
        if images is None:
            return Thumbnails(side)
        if not self.options.thumbnail:
            side = sharpest_side(side, images, self.important_N)
        wanted = self.important_N[: most_thumbnails(side)]
        with self.work.track("thumbnails", len(wanted)) as advance:
            return make_thumbnails(images, wanted, side=side, workers=self.workers, advance=advance)

    @cached_property
    def whole(self) -> dict[int, Blob]:
        """Whole pictures of the images that a reader opens first, as many as the page has room for."""
        images, thumbnails = self.collection.images, self.thumbnails
        if images is None:
            return {}
        indices = self.important_N[: len(self.listing)].tolist()  # Those that are listed.
        with self.work.track("pictures", None) as advance:
            return whole_pictures(
                images,
                indices,
                above=thumbnails.side,
                most_bytes=thumbnails.bytes_left,
                workers=self.workers,
                advance=advance,
            )


def _how_it_works(context: Context) -> Section | None:
    if context.explained is not None:
        return method_section(context.collection, context.explained, work=context.work)
    if not context.run.config or context.run.config.get("clustered"):  # Nothing was trained.
        return None
    if context.run.clustered.get("stage") == "":
        return without_image("The embeddings of a table were clustered: no image went through a network here.")
    return without_image("The run's images or its checkpoint are not at hand, so none can be followed (--data names them).")


def _new_images(context: Context) -> Section | None:
    if context.compared is None:
        return None
    return new_section(context.collection, context.clusters, context.listing, context.compared)


# The sections in their order. Each is None where the page has no such section.
SECTIONS: tuple[Callable[[Context], Section | None], ...] = (
    lambda context: glance_section(context.run),
    lambda context: gallery_section(
        context.collection, context.clusters, context.listing, context.thumbnails, context.odd.similar, context.whole
    ),
    _new_images,
    lambda context: map_section(context.collection, context.layout, context.listing),
    _how_it_works,
    lambda context: odd_section(context.collection, context.odd, context.listing, context.run.complaint),
    lambda context: pictures_section(context.pictures, run=context.run.folder) if context.pictures is not None else None,
)


def build_report(path: Path, context: Context, *, refresh_seconds: int = 0) -> int:
    """Write the page of a run or a table; return its size in bytes.

    Args:
        refresh_seconds: the page reloads itself at this interval (0: never).
    """
    sections = [made for section in SECTIONS if (made := section(context)) is not None]
    return write_page(path, context.collection.title, sections, refresh_seconds=refresh_seconds)
