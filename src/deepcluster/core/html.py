"""Small HTML of results as notebooks show them: no scripts, no network, colours of the notebook's theme."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import import_module
from typing import Any

from deepcluster.core.errors import InputError
from deepcluster.core.text import visible

FAINT = "opacity:.65"
ACCENT = "#4c78a8"
TABLE = "border-collapse:collapse;font:inherit;font-variant-numeric:tabular-nums;color:inherit;margin:4px 0"
CELL = "text-align:right;padding:2px 10px 2px 0;white-space:nowrap"


def safe(value: object) -> str:
    """Return a value as text of HTML."""
    return escape(visible(str(value)))


def block(*parts: str) -> str:
    """Return parts, one below the other."""
    return f'<div style="font-size:13px;line-height:1.5;max-width:1100px">{"".join(parts)}</div>'


def line(text: str, *, faint: bool = False, bold: bool = False) -> str:
    """Return a line of text, which is escaped."""
    style = ";".join([FAINT] * faint + ["font-weight:600"] * bold)
    return f'<div style="{style}">{safe(text)}</div>' if style else f"<div>{safe(text)}</div>"


def folded(summary: str, *parts: str) -> str:
    """Return parts that are shown after a click on the summary, which is escaped."""
    return (
        f'<details style="margin:2px 0"><summary style="cursor:pointer">{safe(summary)}</summary>{"".join(parts)}</details>'
    )


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows with the same columns, text of numbers to the right."""
    rows = list(rows)
    # In the order of the row that has most of them: the first epoch lacks some.
    columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    head = "".join(f'<th style="{CELL};{FAINT};font-weight:500">{safe(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{CELL}">{safe(row.get(name, ""))}</td>' for name in columns) + "</tr>" for row in rows
    )
    scroll = '<div style="overflow-x:auto">'
    return f'{scroll}<table style="{TABLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bar(share: float, *, width: str = "160px") -> str:
    """Return a bar of which a share is filled."""
    filled = (
        f'<span style="display:block;width:{100 * min(1.0, max(0.0, share)):.1f}%;height:8px;background:{ACCENT}"></span>'
    )
    style = f"display:inline-block;width:{width};height:8px;border-radius:4px;overflow:hidden;background:#8884"
    return f'<span style="{style};vertical-align:middle">{filled}</span>'


def picture(content: bytes, media_type: str, *, title: str, height: int, pixelated: bool = False) -> str:
    """Return an image that the page holds itself."""
    style = f"height:{height}px;margin:0 2px 2px 0;display:inline-block" + (
        ";image-rendering:pixelated" if pixelated else ""
    )
    data = base64.b64encode(content).decode()
    return f'<img src="data:{media_type};base64,{data}" title="{safe(title)}" alt="{safe(title)}" style="{style}">'


def curve(title: str, values: Sequence[float], *, first: int = 1) -> str:
    """Return a small line chart of the finite ones of some values, of epochs from `first` on, with the first and last value.

    `title` is escaped.
    """
    points = [(first + index, value) for index, value in enumerate(values) if value - value == 0]
    if not points:
        return ""
    low, high = min(value for _, value in points), max(value for _, value in points)
    span, steps = (high - low) or 1.0, max(1, points[-1][0] - points[0][0])
    width, height, edge = 220, 64, 4
    places = [
        (
            edge + (width - 2 * edge) * (epoch - points[0][0]) / steps,
            edge + (height - 2 * edge) * (high - value) / span,
        )
        for epoch, value in points
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    end = f'<circle cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="3" fill="{ACCENT}"/>'
    label = f"{title}, epochs {points[0][0]} to {points[-1][0]}: {points[0][1]:.3g} to {points[-1][1]:.3g}"
    shape = f'<polyline points="{path}" fill="none" stroke="{ACCENT}" stroke-width="1.5"/>'
    svg = f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{safe(label)}">'
    text = f'<div style="{FAINT}">{safe(title)} {points[0][1]:.3g} → {points[-1][1]:.3g}</div>'
    return f'<div style="display:inline-block;margin:4px 24px 4px 0">{text}{svg}{shape}{end}</svg></div>'


def pandas() -> Any:
    """Return the package pandas.

    Raises:
        InputError: it is not installed.
    """
    try:
        pandas = import_module("pandas")
    except ImportError:
        raise InputError("to_pandas needs the package pandas: pip install pandas") from None
    return pandas
