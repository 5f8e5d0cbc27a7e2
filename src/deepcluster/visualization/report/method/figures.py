"""The charts (Plotly's JSON) and the pictures of the section on the method.

D features, P components, S points, C channels, H and W pixels.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepcluster.visualization.report.collection import Floats
from deepcluster.visualization.report.page import LEGEND_ABOVE, figure_json, short

_MARGIN = {"l": 56, "r": 12, "t": 12, "b": 48}
# Up to this side a picture keeps every pixel; it is enlarged by whole pixels.
LOSSLESS = 64
QUALITY = 76


@dataclass(frozen=True)
class ClusterHistory:
    """The cluster of an image in an earlier epoch, and which share of its current cluster was there with it."""

    epoch: int
    cluster: int
    share: float


@dataclass(frozen=True)
class Picture:
    """A picture for an `img` element.

    Attributes:
        uri: its content, as an address.
        width, height: of what it shows, in pixels, before it was made smaller for the page.
        is_small: each pixel is to stay a square.
    """

    uri: str
    width: int
    height: int
    is_small: bool


def picture(pixels: NDArray[np.uint8] | Tensor, most: int = 192, *, lossless: int = LOSSLESS) -> Picture:
    """Return a picture of uint8 pixels, (H, W, 3) or grey (H, W): a small one without loss, a larger one as WebP.

    Args:
        most: the longer side of a larger one, in pixels of the page's file.
        lossless: longer side up to which every pixel is kept.
    """
    from PIL import Image

    array = np.ascontiguousarray(pixels.cpu().numpy() if isinstance(pixels, Tensor) else pixels)
    height, width = array.shape[:2]
    image, file = Image.fromarray(array), io.BytesIO()
    is_small = max(height, width) <= lossless
    if is_small:
        image.save(file, "PNG", optimize=True)
    else:
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
        image.save(file, "WEBP", quality=QUALITY, method=6)
    kind = "png" if is_small else "webp"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}", width, height, is_small)


def view_pixels(view_CHW: Tensor) -> Tensor:
    """Return pixels (H, W, 3), uint8, of a view of uint8 or in [0, 1]."""
    view_CHW = view_CHW.detach().cpu()
    bytes_CHW = view_CHW if not view_CHW.is_floating_point() else (view_CHW.clamp(0, 1) * 255).round().byte()
    return bytes_CHW.permute(1, 2, 0)


def signed_grey(values_HW: Tensor) -> Tensor:
    """Return numbers as greys: 0 is middle grey, the largest size of a number black or white."""
    return (127.5 * (1 + values_HW / values_HW.abs().max().clamp(min=1e-12))).round().byte()


def ranged_grey(values_HW: Tensor) -> Tensor:
    """Return numbers as greys: the least is black, the largest white; all alike are black."""
    low, high = values_HW.min(), values_HW.max()
    return (255 * (values_HW - low) / (high - low).clamp(min=1e-12)).round().byte()


def strip(features_D: Floats) -> str:
    """Return the features as a strip of cells, line by line."""
    is_long = len(features_D) > 1024
    across = min(128 if is_long else 64, len(features_D))
    lines = -(-len(features_D) // across)
    cells = _short(features_D.tolist()) + [None] * (lines * across - len(features_D))
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
    height, margin = 32 + (7 if is_long else 16) * max(lines, 3), {**_MARGIN, "l": 8, "b": 8}
    return _json([cell_map], height, {"visible": False}, {"visible": False, "autorange": "reversed"}, margin=margin)


def spectrum(before_P: Floats, whitened_P: Floats, points_P: Floats) -> str:
    """Return the variance of each component, on two logarithmic axes."""
    lines = {"before: as PCA finds them": before_P, "whitened": whitened_P, "and of unit length": points_P}
    traces = [_descending(name, variance_P, "component %{x}: variance %{y}") for name, variance_P in lines.items()]
    x = _axis("component, the largest first", type="log", dtick=1)
    return _json(traces, 320, x, _axis("variance", type="log", exponentformat="power", dtick=1), legend=LEGEND_ABOVE)


def directions(shares_P: Floats) -> str:
    """Return the share of the points' variance along each direction, the largest first, on two logarithmic axes."""
    marks = {"mode": "lines", "line": {"dash": "dot", "width": 1.5}, "opacity": 0.7}
    ends, name = [1, len(shares_P)], "if all directions were used alike"
    even = _trace(ends, [1 / len(shares_P)] * 2, "%{y:.2%}", name=name, **marks)
    traces = [_descending("points of these images", shares_P, "direction %{x}: %{y:.2%}"), even]
    x = _axis("direction, the largest first", type="log", dtick=1)
    return _json(traces, 300, x, _axis("share of the variance", type="log", tickformat="~%", dtick=1), legend=LEGEND_ABOVE)


def _descending(name: str, values_P: Floats, form: str) -> dict[str, Any]:
    values = [short(value) if value > 0 else None for value in values_P.tolist()]
    mode = "lines+markers" if len(values) < 40 else "lines"
    return _trace(list(range(1, len(values) + 1)), values, form, name=name, mode=mode)


def signed_bars(point_P: Floats) -> str:
    """Return the components of a point, one bar each."""
    numbers, form = list(range(1, len(point_P) + 1)), "component %{x}: %{y}<extra></extra>"
    bars = _trace(numbers, _short(point_P.tolist()), form, type="bar")
    return _json([bars], 220, _axis("component"), _axis("value"), bargap=0.15)


def ranked_bars(clusters: Sequence[int], values: Sequence[float], marked: int, *, axis: str, parts: tuple[str, str]) -> str:
    """Return horizontal bars of clusters, the first on top; the marked cluster (-1: none) has a colour of its own.

    Args:
        parts: names of the marked bar and of the others.
    """
    traces = []
    for part, is_marked in zip(parts, (True, False), strict=True):
        chosen = [pair for pair in zip(clusters, values, strict=True) if (pair[0] == marked) == is_marked]
        lengths, names = _short(value for _, value in chosen), [f"cluster {cluster}" for cluster, _ in chosen]
        text = {"text": [f"{value:.3f}" for _, value in chosen], "textposition": "auto"}
        bars = _trace(lengths, names, "%{y}: %{x}<extra></extra>", type="bar", name=part, orientation="h", **text)
        traces += [bars] if chosen else []
    order = {"categoryorder": "array", "categoryarray": [f"cluster {cluster}" for cluster in clusters]}
    y = {"type": "category", **order, "autorange": "reversed", "automargin": True, "ticksuffix": " "}
    height, layout = 90 + 28 * len(clusters), {"bargap": 0.2, "barmode": "overlay", "showlegend": True}
    return _json(traces, height, _axis(axis, rangemode="tozero"), y, legend=LEGEND_ABOVE, **layout)


def scatter(places: Mapping[int, Floats], centroids: Floats, star: Floats, own: int) -> str:
    """Return points of some clusters in two dimensions, their centroids, and the image as an open star."""
    traces = []
    for cluster, points in places.items():
        marker = {"size": 9 if cluster == own else 6, "opacity": 0.9 if cluster == own else 0.75}
        name = f"cluster {cluster}" + (" (its own)" if cluster == own else "")
        traces.append(_dots(points, f"an image of cluster {cluster}<extra></extra>", name=name, marker=marker))
    words = {"name": "centroids", "text": [str(cluster) for cluster in places], "textposition": "top center"}
    cross, form = {"size": 11, "symbol": "x"}, "centroid of cluster %{text}<extra></extra>"
    traces.append(_dots(centroids, form, mode="markers+text", marker=cross, **words))
    star_marker = {"size": 22, "symbol": "star-open", "line": {"width": 2.5}}  # Open: it may lie on its centroid's number.
    traces.append(_dots(star, "this image<extra></extra>", name="this image", marker=star_marker))
    y = _axis("second direction", zeroline=False, scaleanchor="x")
    legend = {**LEGEND_ABOVE, "itemsizing": "constant"}
    return _json(traces, 420, _axis("first direction", zeroline=False), y, legend=legend)


def _dots(points_S2: Floats, form: str, **rest: Any) -> dict[str, Any]:
    x, y = (_short(column.tolist()) for column in points_S2.T)
    return _trace(x, y, form, **{"mode": "markers", **rest})


def history_line(history: Sequence[ClusterHistory]) -> str:
    """Return the share of the image's current cluster that was with it in earlier epochs."""
    form = "epoch %{x}: %{y:.0%} of them, in cluster %{customdata}<extra></extra>"
    epochs, shares = [one.epoch for one in history], _short(one.share for one in history)
    line = _trace(epochs, shares, form, customdata=[one.cluster for one in history], mode="lines+markers")
    y = _axis("were with it already", tickformat=".0%", range=[-0.03, 1.03])
    few = {"dtick": 1} if max(epochs, default=0) <= 12 else {}
    return _json([line], 240, _axis("epoch", rangemode="tozero", **few), y)


def _short(values: Iterable[float]) -> list[float | None]:
    return [short(value) for value in values]


def _trace(x: Sequence[Any], y: Sequence[Any], form: str, **rest: Any) -> dict[str, Any]:
    return {"type": "scatter", "x": x, "y": y, "hovertemplate": form, **rest}


def _axis(title: str, **rest: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **rest}


def _json(traces: Sequence[Mapping[str, Any]], height: int, x: dict[str, Any], y: dict[str, Any], **layout: Any) -> str:
    return figure_json(traces, **{"margin": _MARGIN, "height": height, "xaxis": x, "yaxis": y, **layout})
