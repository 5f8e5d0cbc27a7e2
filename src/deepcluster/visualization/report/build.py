"""From what is known of a run, or of a table, to its page: its sections, within the budget of bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepcluster.core.files import write_whole
from deepcluster.core.interruption import Interruption
from deepcluster.core.progress import Reporter
from deepcluster.data.sources import ImageSource
from deepcluster.visualization.options import ReportOptions
from deepcluster.visualization.report.collection import Collection
from deepcluster.visualization.report.gallery.clusters import describe_clusters
from deepcluster.visualization.report.gallery.rows import Listing, by_importance, list_rows, sorted_rows
from deepcluster.visualization.report.gallery.section import gallery_section
from deepcluster.visualization.report.gallery.thumbnails import Thumbnails, fitting_side, make_thumbnails
from deepcluster.visualization.report.glance import RunFacts, glance_section
from deepcluster.visualization.report.map import map_points, map_section
from deepcluster.visualization.report.method.how_it_works import method_section, without_image
from deepcluster.visualization.report.method.pipeline import Pipeline
from deepcluster.visualization.report.odd import find_odd
from deepcluster.visualization.report.odd_section import odd_section
from deepcluster.visualization.report.page import Section, page_text
from deepcluster.visualization.report.pictures import pictures_section

# Of the bytes that other sections leave: for names and numbers of images. Thumbnails get what is left then.
ROWS_SHARE = 0.5
PICTURES_SHARE = 0.2


def build_report(
    path: Path,
    collection: Collection,
    about: RunFacts,
    options: ReportOptions,
    *,
    pipeline: Pipeline | None,
    pictures: Path | None,
    workers: int,
    reporter: Reporter,
    interruption: Interruption,
    refresh_seconds: int = 0,
) -> int:
    """Write the page of a collection; returns its bytes.

    Args:
        about: the run, or the table.
        pipeline: what the run does to an image; None: the page does not show how it works.
        pictures: folder of what `deepcluster visualize` has made, or would make; None for a table.
        workers: threads that decode images.
        refresh_seconds: the page reads itself again so often (0: never).
    """
    most, check = int(options.max_mb * 1e6), interruption.check
    facts = describe_clusters(collection, seed=options.seed, check=check)
    odd = find_odd(collection, check=check)
    spots = map_points(collection, images=options.map_images, seed=options.seed, reporter=reporter, check=check)
    method = _method(collection, about, pipeline, reporter, interruption)
    filters = None
    if pictures is not None:
        filters = pictures_section(pictures, max_bytes=int(PICTURES_SHARE * most), run=about.folder)

    def page(listing: Listing, thumbnails: Thumbnails) -> str:
        sections = (
            glance_section(about),
            gallery_section(collection, facts, listing, thumbnails),
            map_section(collection, spots, listing),
            method,
            odd_section(collection, odd, listing, about.complaint),
            filters,
        )
        there = [section for section in sections if section is not None]
        return page_text(collection.title, there, refresh_seconds=refresh_seconds)

    first, *rest = facts.wanted()
    wanted = [first, odd.images(), *rest, *([] if spots is None else [spots.indices_M])]
    none = Thumbnails(options.thumbnail)
    alone = len(page(list_rows(collection, [], 0), none).encode())
    listing = list_rows(collection, wanted, int(ROWS_SHARE * (most - alone)))
    left = most - len(page(listing, none).encode())
    thumbnails = none
    if collection.images is not None:
        with reporter.track("thumbnails", None) as progress:
            thumbnails = _thumbnails(collection.images, listing, wanted, left, options, workers, progress, check)
    text = page(listing, thumbnails)
    write_whole(path, text)
    return len(text.encode())


def _method(
    collection: Collection, about: RunFacts, pipeline: Pipeline | None, reporter: Reporter, interruption: Interruption
) -> Section | None:
    """How the run works; None of a table."""
    if pipeline is not None:
        return method_section(collection, pipeline, reporter=reporter, interruption=interruption)
    if not about.config:
        return None
    return without_image("The run's images or its checkpoint are not at hand, so none can be followed (--data names them).")


def _thumbnails(
    images: ImageSource,
    listing: Listing,
    wanted: Sequence[NDArray[np.int64]],
    max_bytes: int,
    options: ReportOptions,
    workers: int,
    on_images: Callable[[int], None],
    check: Callable[[], None],
) -> Thumbnails:
    """Thumbnails of listed images, the most important first: small enough that every cluster and every odd one has one."""
    collection = listing.collection
    order_N = sorted_rows(collection, np.arange(len(collection)))
    indices = by_importance(collection, wanted, order_N)
    indices = indices[listing.row_of(indices) >= 0]
    side = fitting_side(options.thumbnail, len(wanted[0]) + len(wanted[1]), max_bytes)
    return make_thumbnails(
        images, indices, side=side, max_bytes=max_bytes, workers=workers, on_images=on_images, check=check
    )
