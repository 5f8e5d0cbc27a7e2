"""The page: sections, what their scripts unpack, and the plotting library, in one file that asks the network for nothing.

Sections are HTML with everything of a person's escaped (Jinja's autoescape; `render`). Larger things are blobs: gzip, then
base64, unpacked by the browser when they are first needed.
"""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepcluster.core.errors import InputError
from deepcluster.core.files import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

ASSETS = Path(__file__).parent / "assets"
# In this order; a section's script may use what `page.js` gives (`deepcluster.…`).
SCRIPTS = ("page.js", "rows.js", "figures.js", "gallery.js", "detail.js", "map.js")
STYLES = ("page.css", "gallery.css", "method.css", "sections.css")


@dataclass(frozen=True)
class Blob:
    """Bytes that a script unpacks by name.

    Attributes:
        content: as the script gets it.
        media_type: of an image, which is not compressed again; empty for all else.
    """

    content: bytes
    media_type: str = ""

    def packed(self) -> str:
        """Base64, as it is in the page; a third longer than the bytes."""
        return self._packed

    @cached_property
    def _packed(self) -> str:
        packed = self.content if self.media_type else gzip.compress(self.content, 6, mtime=0)
        return base64.b64encode(packed).decode("ascii")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: of its anchor.
        title: of its heading, and in the menu.
        html: what it shows; what a person named is escaped.
        blobs: what its script unpacks, by name.
        figures: Plotly figures (JSON), by the id of the element that they are drawn in (`<div class="figure" id=…>`).
    """

    name: str
    title: str
    html: "Markup"
    blobs: Mapping[str, Blob] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)


def render(template: str, **values: Any) -> "Markup":
    """The HTML of a template in `assets`; values are escaped."""
    from markupsafe import Markup

    return Markup(_environment().get_template(template).render(**values))


def json_blob(value: Any) -> Blob:
    """A value for `deepcluster.json(name)`. Raises ValueError where a number is not finite."""
    return Blob(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode())


def write_page(path: Path, title: str, sections: Sequence[Section], *, refresh_seconds: int = 0) -> int:
    """Write the page, whole at every moment; returns its bytes. Arguments as in `page_text`."""
    text = page_text(title, sections, refresh_seconds=refresh_seconds)
    write_whole(path, text)
    return len(text.encode())


def page_text(title: str, sections: Sequence[Section], *, refresh_seconds: int = 0) -> str:
    """The page.

    Args:
        refresh_seconds: the page reads itself again so often (0: never).
    """
    blobs = {name: blob for section in sections for name, blob in section.blobs.items()}
    figures = {name: figure for section in sections for name, figure in section.figures.items()}
    blobs["figures"] = json_blob({name: json.loads(figure) for name, figure in figures.items()})
    blobs["plotly"] = plotly_blob()
    return render(
        "page.html.jinja",
        title=title,
        sections=sections,
        blobs={name: (blob.media_type, blob.packed()) for name, blob in blobs.items()},
        scripts=_assets(SCRIPTS),
        styles=_assets(STYLES),
        refresh_seconds=refresh_seconds,
    )


def needs_report_extra() -> None:
    """Raise `InputError` unless what the report is made with is installed."""
    try:
        import jinja2
        import plotly  # noqa: F401
    except ImportError as fault:
        what = getattr(fault, "name", None) or jinja2.__name__
        raise InputError(f"the report needs {what}; install it with: pip install 'deepcluster[report]'") from None


@cache
def plotly_blob() -> Blob:
    """The plotting library's program, as it comes with the Python package."""
    from plotly.offline import get_plotlyjs

    return Blob(get_plotlyjs().encode())


def _assets(names: Sequence[str]) -> list["Markup"]:
    from markupsafe import Markup

    return [Markup((ASSETS / name).read_text(encoding="utf-8")) for name in names if (ASSETS / name).is_file()]


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    escaping = select_autoescape(default=True, default_for_string=True)
    return Environment(
        loader=FileSystemLoader(ASSETS), autoescape=escaping, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
