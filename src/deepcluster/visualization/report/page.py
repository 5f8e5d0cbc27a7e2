"""The page: sections, what their scripts unpack, and the plotting library, in one file that makes no network requests.

Sections are HTML in which everything named by the user is escaped (Jinja's autoescape; `render`). Larger things are blobs:
gzip, then base64, unpacked by the browser when they are first needed.
"""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepcluster.core.errors import InputError
from deepcluster.core.files import write_whole
from deepcluster.core.text import printable

if TYPE_CHECKING:
    from markupsafe import Markup

ASSETS = Path(__file__).parent / "assets"
# What every page has, in this order. Scripts and styles of one section follow; they may use what `page.js` offers.
SCRIPTS = ("page.js", "rows.js", "figures.js")
STYLES = ("page.css", "gallery.css", "sections.css")
LEGEND_ABOVE = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


@dataclass(frozen=True)
class Blob:
    """Bytes that a script unpacks by name; `media_type` is that of an image, which is not compressed again, or empty."""

    content: bytes
    media_type: str = ""

    def packed(self) -> str:
        """Return it in base64, as it is in the page."""
        packed = self.content if self.media_type else gzip.compress(self.content, 6, mtime=0)
        return base64.b64encode(packed).decode("ascii")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: name of its anchor.
        title: text of its heading, and in the menu.
        html: what it shows; names given by the user are escaped.
        blobs: what its script unpacks, by name.
        figures: Plotly figures (JSON), by the id of the element that they are drawn in (`<div class="figure" id=…>`).
        scripts, styles: text of its own scripts and styles (`asset`).
    """

    name: str
    title: str
    html: "Markup"
    blobs: Mapping[str, Blob] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    scripts: Sequence[str] = ()
    styles: Sequence[str] = ()


def asset(name: str) -> str:
    """Return the text of a file in `assets`."""
    return (ASSETS / name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> "Markup":
    """Return the HTML of a template in `assets`; values are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return Markup(environment.get_template(template).render(**values))


def shown(name: str) -> str:
    """Return a name as the page has it: only text, and without NUL, which separates names in a blob."""
    try:
        name = printable(name)
    except UnicodeEncodeError:  # Half of a surrogate pair, as JSON may hold.
        name = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return name.replace("\0", "\\x00")


def json_blob(value: Any) -> Blob:
    """Return a value for `deepcluster.json(name)`. Raises ValueError where a number is not finite."""
    return Blob(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode())


def figure_json(traces: Sequence[Mapping[str, Any]], **layout: Any) -> str:
    """Return a figure of traces (plain dictionaries) as Plotly's JSON; colours of background and text are the page's."""
    from plotly.graph_objects import Figure

    figure = Figure(data=[dict(trace) for trace in traces])
    figure.update_layout(template=None, **layout)
    return str(figure.to_json())


def short(value: float) -> float | None:
    """Round to four digits, enough for a figure; None for what is not finite."""
    return float(f"{value:.4g}") if isfinite(value) else None


def write_page(path: Path, title: str, sections: Sequence[Section], *, refresh_seconds: int = 0) -> int:
    """Write the page, whole at every moment; return its size in bytes.

    Args:
        refresh_seconds: the page reloads itself at this interval (0: never).
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    blobs = {name: blob for section in sections for name, blob in section.blobs.items()}
    figures = {name: json.loads(figure) for section in sections for name, figure in section.figures.items()}
    if figures:
        blobs |= {"figures": json_blob(figures), "plotly": Blob(get_plotlyjs().encode())}
    scripts = [*map(asset, SCRIPTS), *(script for section in sections for script in section.scripts)]
    styles = [*map(asset, STYLES), *(style for section in sections for style in section.styles)]
    text = render(
        "page.html.jinja",
        title=title,
        sections=sections,
        blobs={name: (blob.media_type, blob.packed()) for name, blob in blobs.items()},
        scripts=[Markup(text) for text in dict.fromkeys(scripts)],
        styles=[Markup(text) for text in dict.fromkeys(styles)],
        refresh_seconds=refresh_seconds,
    )
    page = printable(text)  # A title or an address of the data may have bytes that are not UTF-8.
    write_whole(path, page)
    return len(page.encode())


def needs_report_extra() -> None:
    """Raise `InputError` unless the packages that make the report are installed."""
    try:
        import jinja2
        import plotly  # noqa: F401
    except ImportError as error:
        what = getattr(error, "name", None) or jinja2.__name__
        raise InputError(f"the report needs {what}; install it with: pip install jinja2 plotly") from None
