"""Plotly figures as JSON, made of plain dictionaries; colours of background and text are the page's."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

LEGEND_ABOVE = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


def figure_json(traces: Sequence[Mapping[str, Any]], **layout: Any) -> str:
    """Return a figure of traces, as Plotly writes it."""
    from plotly.graph_objects import Figure

    figure = Figure(data=[dict(trace) for trace in traces])
    figure.update_layout(template=None, **layout)
    return str(figure.to_json())


def short(value: float) -> float | None:
    """Round to four digits, enough for a figure; None for what is not finite."""
    return float(f"{value:.4g}") if isfinite(value) else None
