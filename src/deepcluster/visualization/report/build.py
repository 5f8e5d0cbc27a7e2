"""The sections of the page, in their order. A new section is a module with `section(context)`, and one entry here."""

from collections.abc import Callable
from pathlib import Path

from deepcluster.visualization.report import glance, map_section, odd_section, pictures
from deepcluster.visualization.report.context import Context
from deepcluster.visualization.report.gallery import section as gallery
from deepcluster.visualization.report.method import how_it_works
from deepcluster.visualization.report.page import Section, write_page

# Each returns None where the page has no such section.
SECTIONS: tuple[Callable[[Context], Section | None], ...] = (
    glance.section,
    gallery.section,
    map_section.section,
    how_it_works.section,
    odd_section.section,
    pictures.section,
)


def build_report(path: Path, context: Context, *, refresh_seconds: int = 0) -> int:
    """Write the page of a run or a table; return its size in bytes.

    Args:
        refresh_seconds: the page reloads itself at this interval (0: never).
    """
    sections = [made for section in SECTIONS if (made := section(context)) is not None]
    return write_page(path, context.collection.title, sections, refresh_seconds=refresh_seconds)
