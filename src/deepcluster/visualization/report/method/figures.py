"""The charts of the section on the method, as Plotly figures (JSON) without colours of their own.

D features, P components, K clusters.
"""

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Floats = NDArray[np.float64]
_MARGIN = {"l": 56, "r": 12, "t": 12, "b": 48}


def strip(features_D: Floats) -> str:
    """The features as a strip of cells, line by line."""
    import plotly.graph_objects as go

    across = min(64 if len(features_D) <= 1024 else 128, len(features_D))
    lines = -(-len(features_D) // across)
    cells: list[float | None] = [_short(value) for value in features_D.tolist()]
    cells += [None] * (lines * across - len(cells))
    rows = [cells[line * across : (line + 1) * across] for line in range(lines)]
    figure = go.Figure(
        go.Heatmap(
            z=rows,
            customdata=(np.arange(lines * across).reshape(lines, across) + 1).tolist(),
            colorscale="Viridis",
            xgap=1 if across <= 64 else 0,
            ygap=1 if across <= 64 else 0,
            colorbar={"thickness": 10, "outlinewidth": 0},
            hovertemplate="number %{customdata}: %{z}<extra></extra>",
        )
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, autorange="reversed")
    return _json(figure, height=32 + (16 if across <= 64 else 7) * max(lines, 3), margin={**_MARGIN, "l": 8, "b": 8})


def spectrum(before_P: Floats, whitened_P: Floats, points_P: Floats) -> str:
    """Variance of each component, on two logarithmic axes."""
    import plotly.graph_objects as go

    numbers = list(range(1, len(before_P) + 1))
    figure = go.Figure()
    lines = (("before: as PCA finds them", before_P), ("whitened", whitened_P), ("and of unit length", points_P))
    for name, variance_P in lines:
        values = [_short(value) if value > 0 else None for value in variance_P.tolist()]
        figure.add_scatter(
            x=numbers,
            y=values,
            name=name,
            mode="lines+markers" if len(numbers) < 40 else "lines",
            hovertemplate="component %{x}: variance %{y}",
        )
    figure.update_xaxes(type="log", title="component, the largest first", dtick=1)
    figure.update_yaxes(type="log", title="variance", exponentformat="power", dtick=1)
    return _json(figure, height=320, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})


def directions(shares_P: Floats) -> str:
    """Share of the points' variance along each direction, the largest first, on two logarithmic axes."""
    import plotly.graph_objects as go

    numbers = list(range(1, len(shares_P) + 1))
    figure = go.Figure()
    figure.add_scatter(
        x=numbers,
        y=[_short(value) if value > 0 else None for value in shares_P.tolist()],
        name="points of these images",
        mode="lines+markers" if len(numbers) < 40 else "lines",
        hovertemplate="direction %{x}: %{y:.2%}",
    )
    even = 1 / len(shares_P)
    figure.add_scatter(
        x=[1, len(shares_P)],
        y=[even, even],
        name="if all directions were used alike",
        mode="lines",
        line={"dash": "dot", "width": 1.5},
        opacity=0.7,
        hovertemplate="%{y:.2%}",
    )
    figure.update_xaxes(type="log", title="direction, the largest first", dtick=1)
    figure.update_yaxes(type="log", title="share of the variance", tickformat="~%", dtick=1)
    return _json(figure, height=300, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})


def signed_bars(point_P: Floats) -> str:
    """The components of a point, one bar each."""
    import plotly.graph_objects as go

    bars = go.Bar(
        x=list(range(1, len(point_P) + 1)),
        y=[_short(value) for value in point_P.tolist()],
        hovertemplate="component %{x}: %{y}<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.update_xaxes(title="component")
    figure.update_yaxes(title="value")
    return _json(figure, height=220, bargap=0.15)


def ranked_bars(names: Sequence[str], values: Sequence[float], marked: int, *, axis: str, parts: tuple[str, str]) -> str:
    """Horizontal bars, the first on top; the one that is marked (-1: none) has a colour of its own.

    Args:
        parts: names of the marked bar and of the others.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for part, is_marked in zip(parts, (True, False), strict=True):
        chosen = [number for number in range(len(names)) if (number == marked) == is_marked]
        if chosen:
            figure.add_bar(
                x=[_short(values[number]) for number in chosen],
                y=[names[number] for number in chosen],
                name=part,
                orientation="h",
                text=[f"{values[number]:.3f}" for number in chosen],
                textposition="auto",
                hovertemplate="%{y}: %{x}<extra></extra>",
            )
    figure.update_xaxes(title=axis, rangemode="tozero")
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=list(names),
        autorange="reversed",
        automargin=True,
        ticksuffix=" ",
    )
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    return _json(figure, height=90 + 28 * len(names), bargap=0.2, barmode="overlay", legend=legend, showlegend=True)


def scatter(places: dict[int, Floats], centroids: Floats, own: int, star: Floats) -> str:
    """Points of some clusters in two dimensions, their centroids, and the image as a star."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for cluster, points in places.items():
        figure.add_scatter(
            x=[_short(value) for value in points[:, 0].tolist()],
            y=[_short(value) for value in points[:, 1].tolist()],
            mode="markers",
            name=f"cluster {cluster}" + (" (its own)" if cluster == own else ""),
            marker={"size": 8 if cluster == own else 5, "opacity": 0.85 if cluster == own else 0.5},
            hovertemplate=f"an image of cluster {cluster}<extra></extra>",
        )
    figure.add_scatter(
        x=[_short(value) for value in centroids[:, 0].tolist()],
        y=[_short(value) for value in centroids[:, 1].tolist()],
        mode="markers+text",
        text=[str(cluster) for cluster in places],
        textposition="top center",
        name="centroids",
        marker={"size": 11, "symbol": "x"},
        hovertemplate="centroid of cluster %{text}<extra></extra>",
    )
    figure.add_scatter(
        x=[_short(float(star[0]))],
        y=[_short(float(star[1]))],
        mode="markers",
        name="this image",
        marker={"size": 20, "symbol": "star", "line": {"width": 1.5}},
        hovertemplate="this image<extra></extra>",
    )
    figure.update_xaxes(title="first direction", zeroline=False)
    figure.update_yaxes(title="second direction", zeroline=False, scaleanchor="x")
    return _json(figure, height=420, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})


def companions_line(epochs: Sequence[int], shares: Sequence[float], clusters: Sequence[int]) -> str:
    """Share of the image's companions of now that were with it in earlier epochs."""
    import plotly.graph_objects as go

    line = go.Scatter(
        x=list(epochs),
        y=[_short(share) for share in shares],
        customdata=list(clusters),
        mode="lines+markers",
        hovertemplate="epoch %{x}: %{y:.0%} of them, in cluster %{customdata}<extra></extra>",
    )
    figure = go.Figure(line)
    figure.update_xaxes(title="epoch", rangemode="tozero")
    figure.update_yaxes(title="were with it already", tickformat=".0%", range=[-0.03, 1.03])
    return _json(figure, height=240)


def _short(value: float) -> float | None:
    """Four digits: the page need not hold more."""
    return float(f"{value:.4g}") if isfinite(value) else None


def _json(figure: "Figure", **layout: Any) -> str:
    figure.update_layout(**{"margin": _MARGIN, "template": None, **layout})
    return str(figure.to_json())
