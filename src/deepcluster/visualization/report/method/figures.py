"""The charts of the section on the method, as Plotly figures (JSON). D features, P components."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepcluster.visualization.report.method.explained import Floats
from deepcluster.visualization.report.method.trace import Neighbourhood
from deepcluster.visualization.report.plots import LEGEND_ABOVE, figure_json, short

_MARGIN = {"l": 56, "r": 12, "t": 12, "b": 48}


def strip(features_D: Floats) -> str:
    """Return the features as a strip of cells, line by line."""
    is_long = len(features_D) > 1024
    across = min(128 if is_long else 64, len(features_D))
    lines = -(-len(features_D) // across)
    cells: list[float | None] = [short(value) for value in features_D.tolist()]
    cells += [None] * (lines * across - len(cells))
    cell_map = {
        "type": "heatmap",
        "z": [cells[line * across : (line + 1) * across] for line in range(lines)],
        "customdata": (np.arange(lines * across).reshape(lines, across) + 1).tolist(),
        "colorscale": "Viridis",
        "xgap": 0 if is_long else 1,
        "ygap": 0 if is_long else 1,
        "colorbar": {"thickness": 10, "outlinewidth": 0},
        "hovertemplate": "number %{customdata}: %{z}<extra></extra>",
    }
    return _json(
        [cell_map],
        height=32 + (7 if is_long else 16) * max(lines, 3),
        margin={**_MARGIN, "l": 8, "b": 8},
        xaxis={"visible": False},
        yaxis={"visible": False, "autorange": "reversed"},
    )


def spectrum(before_P: Floats, whitened_P: Floats, points_P: Floats) -> str:
    """Return the variance of each component, on two logarithmic axes."""
    lines = {"before: as PCA finds them": before_P, "whitened": whitened_P, "and of unit length": points_P}
    traces = [_descending(name, variance_P, "component %{x}: variance %{y}") for name, variance_P in lines.items()]
    return _json(
        traces,
        height=320,
        legend=LEGEND_ABOVE,
        xaxis={"type": "log", "title": {"text": "component, the largest first"}, "dtick": 1},
        yaxis={"type": "log", "title": {"text": "variance"}, "exponentformat": "power", "dtick": 1},
    )


def directions(shares_P: Floats) -> str:
    """Return the share of the points' variance along each direction, the largest first, on two logarithmic axes."""
    even = {
        "type": "scatter",
        "x": [1, len(shares_P)],
        "y": [1 / len(shares_P)] * 2,
        "name": "if all directions were used alike",
        "mode": "lines",
        "line": {"dash": "dot", "width": 1.5},
        "opacity": 0.7,
        "hovertemplate": "%{y:.2%}",
    }
    return _json(
        [_descending("points of these images", shares_P, "direction %{x}: %{y:.2%}"), even],
        height=300,
        legend=LEGEND_ABOVE,
        xaxis={"type": "log", "title": {"text": "direction, the largest first"}, "dtick": 1},
        yaxis={"type": "log", "title": {"text": "share of the variance"}, "tickformat": "~%", "dtick": 1},
    )


def _descending(name: str, values_P: Floats, form: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": list(range(1, len(values_P) + 1)),
        "y": [short(value) if value > 0 else None for value in values_P.tolist()],
        "name": name,
        "mode": "lines+markers" if len(values_P) < 40 else "lines",
        "hovertemplate": form,
    }


def signed_bars(point_P: Floats) -> str:
    """Return the components of a point, one bar each."""
    bars = {
        "type": "bar",
        "x": list(range(1, len(point_P) + 1)),
        "y": [short(value) for value in point_P.tolist()],
        "hovertemplate": "component %{x}: %{y}<extra></extra>",
    }
    axes = {"xaxis": {"title": {"text": "component"}}, "yaxis": {"title": {"text": "value"}}}
    return _json([bars], height=220, bargap=0.15, **axes)


def ranked_bars(clusters: Sequence[int], values: Sequence[float], marked: int, *, axis: str, parts: tuple[str, str]) -> str:
    """Return horizontal bars of clusters, the first on top; the marked cluster (-1: none) has a colour of its own.

    Args:
        parts: names of the marked bar and of the others.
    """
    traces = []
    for part, is_marked in zip(parts, (True, False), strict=True):
        chosen = [pair for pair in zip(clusters, values, strict=True) if (pair[0] == marked) == is_marked]
        if chosen:
            traces.append(
                {
                    "type": "bar",
                    "x": [short(value) for _, value in chosen],
                    "y": [f"cluster {cluster}" for cluster, _ in chosen],
                    "name": part,
                    "orientation": "h",
                    "text": [f"{value:.3f}" for _, value in chosen],
                    "textposition": "auto",
                    "hovertemplate": "%{y}: %{x}<extra></extra>",
                }
            )
    return _json(
        traces,
        height=90 + 28 * len(clusters),
        bargap=0.2,
        barmode="overlay",
        legend=LEGEND_ABOVE,
        showlegend=True,
        xaxis={"title": {"text": axis}, "rangemode": "tozero"},
        yaxis={
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [f"cluster {cluster}" for cluster in clusters],
            "autorange": "reversed",
            "automargin": True,
            "ticksuffix": " ",
        },
    )


def scatter(near: Neighbourhood, own: int) -> str:
    """Return points of some clusters in two dimensions, their centroids, and the image as a star."""
    traces = [
        _dots(
            points,
            name=f"cluster {cluster}" + (" (its own)" if cluster == own else ""),
            marker={"size": 8 if cluster == own else 5, "opacity": 0.85 if cluster == own else 0.5},
            hovertemplate=f"an image of cluster {cluster}<extra></extra>",
        )
        for cluster, points in near.places.items()
    ]
    centroids = _dots(
        near.centroids,
        mode="markers+text",
        text=[str(cluster) for cluster in near.places],
        textposition="top center",
        name="centroids",
        marker={"size": 11, "symbol": "x"},
        hovertemplate="centroid of cluster %{text}<extra></extra>",
    )
    star = _dots(
        near.star[None],
        name="this image",
        marker={"size": 20, "symbol": "star", "line": {"width": 1.5}},
        hovertemplate="this image<extra></extra>",
    )
    return _json(
        [*traces, centroids, star],
        height=420,
        legend=LEGEND_ABOVE,
        xaxis={"title": {"text": "first direction"}, "zeroline": False},
        yaxis={"title": {"text": "second direction"}, "zeroline": False, "scaleanchor": "x"},
    )


def _dots(points_S2: Floats, *, mode: str = "markers", **rest: Any) -> dict[str, Any]:
    x, y = ([short(value) for value in column.tolist()] for column in points_S2.T)
    return {"type": "scatter", "x": x, "y": y, "mode": mode, **rest}


def history_line(epochs: Sequence[int], shares: Sequence[float], clusters: Sequence[int]) -> str:
    """Return the share of the image's current cluster that was with it in earlier epochs."""
    line = {
        "type": "scatter",
        "x": list(epochs),
        "y": [short(share) for share in shares],
        "customdata": list(clusters),
        "mode": "lines+markers",
        "hovertemplate": "epoch %{x}: %{y:.0%} of them, in cluster %{customdata}<extra></extra>",
    }
    return _json(
        [line],
        height=240,
        xaxis={"title": {"text": "epoch"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "were with it already"}, "tickformat": ".0%", "range": [-0.03, 1.03]},
    )


def _json(traces: Sequence[Mapping[str, Any]], **layout: Any) -> str:
    return figure_json(traces, **{"margin": _MARGIN, **layout})
